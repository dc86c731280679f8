"""What a set of rows is like: counts, lengths, turns, scripts, and what training will see."""

import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from interviewmate_mlx.data.prompts import encode_record
from interviewmate_mlx.data.records import Record, readings
from interviewmate_mlx.data.templates import Template, Tokenizer


@dataclass(frozen=True)
class Lengths:
    """Of all rows of a split: the shortest, the median, 95 of 100 at most, and the longest."""

    shortest: int
    median: float
    most: int
    longest: int


@dataclass(frozen=True)
class SplitSummary:
    """What the rows of a split are like.

    Attributes:
        rows: how many there are.
        readings: how their keys were understood.
        turns: conversations by the number of their answers; 0 for texts as they stand.
        categories, difficulties: rows of each.
        scripts: rows by the script of most of their letters, such as Latin.
        question_words, answer_words: lengths in words.
        tokens: lengths in tokens, with the template.
        shortest, longest: where these rows are.
        num_cut: rows of more than `max_length` tokens.
        num_dropped: rows with nothing left to learn from.
        loss_share: of the tokens that are kept, those that carry loss.
    """

    rows: int
    readings: list[str]
    turns: dict[int, int]
    categories: dict[str, int]
    difficulties: dict[str, int]
    scripts: dict[str, int]
    question_words: Lengths
    answer_words: Lengths
    tokens: Lengths
    shortest: str
    longest: str
    num_cut: int
    num_dropped: int
    loss_share: float


@dataclass
class _Counts:
    """What is added up over rows."""

    turns: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    asked: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_cut: int = 0
    num_dropped: int = 0
    num_kept: int = 0  # tokens
    num_learned: int = 0  # tokens


def summarize(
    records: list[Record],
    tokenizer: Tokenizer,
    max_length: int,
    train_on: str,
    template: Template,
) -> SplitSummary:
    """Describe the rows of a split. The arguments are those of `encode_record`.

    Args:
        records: at least one.
        tokenizer: a Hugging Face tokenizer.
        max_length: the most tokens to keep.
        train_on: which tokens carry loss.
        template: of conversations.

    Raises:
        ConfigError, ModelError, DataError: as for `encode_record`.
    """
    counts = _Counts()
    for record in records:
        answers = [message.content for message in record.messages if message.role == "assistant"]
        asked = [message.content for message in record.messages if message.role != "assistant"]
        counts.turns[len(answers)] += 1
        counts.asked.append(_num_words(asked or [record.prompt]))
        counts.answered.append(_num_words(answers or [record.completion]))
        counts.scripts[
            script_of("".join([*asked, *answers, record.prompt, record.completion]))
        ] += 1
        examples = encode_record(tokenizer, record, max_length, train_on, template)
        counts.tokens.append(max(len(one) + one.num_truncated for one in examples))
        counts.num_cut += any(one.num_truncated for one in examples)
        counts.num_dropped += not any(one.loss_mask.any() for one in examples)
        counts.num_kept += sum(map(len, examples))
        counts.num_learned += sum(int(one.loss_mask.sum()) for one in examples)
    order = sorted(range(len(records)), key=counts.tokens.__getitem__)
    return SplitSummary(
        rows=len(records),
        readings=readings(records),
        turns=dict(sorted(counts.turns.items())),
        categories=_counted(record.category for record in records),
        difficulties=_counted(record.difficulty for record in records),
        scripts=dict(counts.scripts.most_common()),
        question_words=_lengths(counts.asked),
        answer_words=_lengths(counts.answered),
        tokens=_lengths(counts.tokens),
        shortest=records[order[0]].source,
        longest=records[order[-1]].source,
        num_cut=counts.num_cut,
        num_dropped=counts.num_dropped,
        loss_share=counts.num_learned / max(1, counts.num_kept),
    )


def script_of(text: str) -> str:
    """The script of most of a text's letters, such as `Latin`; `none` without letters."""
    counts: Counter[str] = Counter()
    for char, number in Counter(text).items():
        if script := _script(char):
            counts[script] += number
    return counts.most_common(1)[0][0] if counts else "none"


@lru_cache(maxsize=1 << 16)
def _script(char: str) -> str:
    """A letter's script, from its name in Unicode; "" for other signs."""
    if not char.isalpha():
        return ""
    word = unicodedata.name(char, "unknown").split()[0].split("-")[0]
    return {"CJK": "Han"}.get(word, word.capitalize())


def _num_words(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _lengths(values: list[int]) -> Lengths:
    ordered = sorted(values)
    most = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return Lengths(ordered[0], statistics.median(ordered), most, ordered[-1])


def _counted(labels: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(label for label in labels if label).items()))
