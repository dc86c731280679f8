"""How an answer relates to the written one, to itself, and to the rows that were learned.

These are counts of shared words. They say whether an answer resembles the written one and
whether it recites, not whether it is right.
"""

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from interviewmate_mlx.coach.generate import Answer
from interviewmate_mlx.errors import ConfigError

_REPEATED = 4  # words that make a repetition
_SEED = 4  # words by which copies are found
_PACKAGES = ("rouge_score", "sacrebleu")
Words = Sequence[str]


@dataclass(frozen=True)
class AnswerScore:
    """Of several answers.

    Attributes:
        rouge1, rouge2, rougeL: F-measures with stemming, mean over the answers, 0 to 1.
        chrf, bleu: of all answers together, 0 to 100.
        ended: the share that the model ended itself.
        length: words of the answers to words of the written ones.
        repetition: the share of four words in a row that came before in the same answer, mean.
        copied: the longest run of words that a training row has too, mean over the answers.
        longest_copy: the longest of them.
        answers: how many there are.
    """

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815  its name in the field
    chrf: float
    bleu: float
    ended: float
    length: float
    repetition: float
    copied: float
    longest_copy: int
    answers: int


def check_installed() -> None:
    """Refuse to begin without the packages that compute the scores.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Scores of answers need {' and '.join(missing)}.\n"
            'Install them: pip install "interviewmate-mlx[scores]". '
            "Or evaluate without generating answers.",
            "answers",
        )


def score_answers(
    answers: Sequence[Answer], written: Sequence[str], learned: Iterable[str]
) -> AnswerScore:
    """Compare answers with the written ones, and with what was learned.

    Args:
        answers: of a model; at least one.
        written: the answers in the rows, in the same order.
        learned: the texts of the training rows.
    """
    # Here, because they take a second to load, and they are an extra.
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415
    from sacrebleu import corpus_bleu, corpus_chrf  # noqa: PLC0415

    texts = [answer.text for answer in answers]
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    rouge = [scorer.score(target, text) for target, text in zip(written, texts, strict=True)]
    split = list(map(words, texts))
    copies = longest_copies(split, map(words, learned))
    return AnswerScore(
        **{kind: statistics.mean(found[kind].fmeasure for found in rouge) for kind in kinds},
        chrf=corpus_chrf(texts, [list(written)]).score,
        bleu=corpus_bleu(texts, [list(written)]).score,
        ended=statistics.fmean(answer.has_ended for answer in answers),
        length=sum(map(len, split)) / max(1, sum(len(words(text)) for text in written)),
        repetition=statistics.fmean(map(repetition, split)),
        copied=statistics.fmean(copies),
        longest_copy=max(copies),
        answers=len(answers),
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def repetition(text: Words) -> float:
    """The share of four words in a row that came before in the same text."""
    runs = list(_runs(text, _REPEATED))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def longest_copies(texts: Sequence[Words], learned: Iterable[Words]) -> list[int]:
    """For each text, the length of its longest run of words that is in one of the learned ones."""
    longest = [0] * len(texts)
    short: dict[tuple[str, ...], set[int]] = {}  # a run: the texts that have it
    seeds: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # a run: text and position
    for number, text in enumerate(texts):
        for size in range(1, _SEED):
            for run in _runs(text, size):
                short.setdefault(run, set()).add(number)
        for position, run in enumerate(_runs(text, _SEED)):
            seeds.setdefault(run, []).append((number, position))
    for row in learned:
        for size in range(1, _SEED):
            for run in _runs(row, size):
                for number in short.pop(run, ()):  # found once, it need not be found again
                    longest[number] = max(longest[number], size)
        for start, run in enumerate(_runs(row, _SEED)):
            for number, position in seeds.get(run, ()):
                shared = zip(texts[number][position:], row[start:], strict=False)
                length = sum(
                    1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], shared)
                )
                longest[number] = max(longest[number], length)
    return longest


def _runs(text: Words, size: int) -> Iterable[tuple[str, ...]]:
    return (tuple(text[start : start + size]) for start in range(len(text) - size + 1))
