"""Turns a row into token ids and a loss mask.

The template of `data/templates.py` gives the text, in parts; each part becomes token ids by
itself, as in generation, where the next part is not there yet. So the ids of a prompt are
the first ids of its training row, always. They are also the ids of the text as a whole, but
where a tokenizer merges the first characters of an answer with the prompt.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from interviewmate_mlx.data.faults import MAX_SHOWN, Fault, group_faults
from interviewmate_mlx.data.records import Message, Record
from interviewmate_mlx.data.templates import (
    VERBATIM,
    Layout,
    Template,
    Tokenizer,
    Turn,
    lay_out,
    own_template,
    special_of,
)
from interviewmate_mlx.errors import DataError, list_faults


def template_of(records: Iterable[Record], template: Template) -> Template:
    """How a model is asked that was trained on rows: with the template if any has messages."""
    return template if any(record.messages for record in records) else VERBATIM


@dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    Attributes:
        record: the row.
        tokens: (L,) int32 token ids.
        loss_mask: (L,) bool, true on the tokens that count for the loss. The first
            never does, because there is nothing to predict it from.
        num_truncated: tokens that did not fit.
        reference: log-probability of the tokens with a loss before training, nats; known
            only where a method asks for it.
    """

    record: Record
    tokens: np.ndarray
    loss_mask: np.ndarray
    num_truncated: int = 0
    reference: float = 0.0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sides(self) -> tuple["Example", ...]:
        """What goes through the model of this row: the row. A pair has two sides."""
        return (self,)

    def content(self) -> bytes:
        """What tells this row from others."""
        return self.tokens.tobytes() + self.loss_mask.tobytes()


def encode_record(
    tokenizer: Tokenizer,
    record: Record,
    max_length: int,
    train_on: str,
    template: Template | None = None,
) -> list[Example]:
    """The tokens and the loss mask of a row.

    An answer starts a new token, as in generation, even if the tokenizer would merge it
    with the prompt. A truncated answer gets no end token, because it does not end there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        record: a checked row.
        max_length: the most tokens to keep.
        train_on: `answer` or `answers` for a loss on every answer, `last` for one on the last
            answer alone, `all` for one on every token except the first.
        template: of a conversation; by default the one that the tokenizer brings.

    Returns:
        One; more only of a conversation whose template shows earlier answers otherwise than
        they were given. Then each answer is learned in one of them, whose record ends there.

    Raises:
        ConfigError, ModelError: the template cannot be used.
        DataError: it cannot be used for this row.
    """
    layout = _lay_out(tokenizer, record, template)
    places = [n for n, message in enumerate(record.messages) if message.role == "assistant"]
    num_given = sum(place < record.num_given for place in places)  # answers without loss
    if train_on == "last":
        num_given = sum(map(len, layout.rows)) - 1
    examples, num_answers = [], 0
    for turns in layout.rows:
        unlearned = max(0, num_given - num_answers)
        num_answers += len(turns)
        if unlearned < len(turns):
            own = record
            if len(layout.rows) > 1:
                own = replace(record, messages=record.messages[: places[num_answers - 1] + 1])
            pieces = _encode_turns(tokenizer, turns, layout)
            examples.append(_example(own, pieces, max_length, train_on == "all", unlearned))
    return examples


def _example(
    record: Record,
    pieces: Iterable[tuple[list[int], bool]],
    max_length: int,
    learns_all: bool,
    num_unlearned: int,
) -> Example:
    """A row in tokens; its first answers, so many as are unlearned, carry no loss."""
    tokens: list[int] = []
    loss_mask: list[bool] = []
    num_answers = 0
    for piece, is_answer in pieces:
        num_answers += is_answer
        tokens += piece
        is_learned = is_answer and num_answers > num_unlearned
        loss_mask += [is_learned or learns_all] * len(piece)
    if loss_mask:
        loss_mask[0] = False
    return Example(
        record=record,
        tokens=np.array(tokens[:max_length], dtype=np.int32),
        loss_mask=np.array(loss_mask[:max_length], dtype=bool),
        num_truncated=max(0, len(tokens) - max_length),
    )


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Template | None = None
) -> list[int]:
    """The prompt for the next answer of a conversation: the first tokens of its training row.

    They are also the ids of the chat template's text. There are two exceptions. A special
    token that a user wrote stays text here. And an answer of an earlier turn never shares
    a token with its prompt, as if it had just been generated; a tokenizer that merges the
    two in the template's text gives other ids there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: perhaps a system message; then user and assistant in turn.
        template: by default the one that the tokenizer brings.

    Raises:
        ConfigError, ModelError: the template cannot be used.
        DataError: it cannot be used for these messages.
    """
    layout = lay_out(template or own_template(tokenizer), tokenizer, messages)
    pieces = _encode_turns(tokenizer, layout.rows[-1], layout)
    return [token for piece, _ in pieces for token in piece]


def encode_prompt(tokenizer: Tokenizer, prompt: str, template: Template | None = None) -> list[int]:
    """The tokens of a question, or, if the template is `verbatim`, of a text as it stands.

    The arguments and errors are those of `encode_messages`.
    """
    if template != VERBATIM:
        return encode_messages(tokenizer, [Message("user", prompt)], template)
    layout = _verbatim(tokenizer, prompt)
    return [
        token for piece, _ in _encode_turns(tokenizer, layout.rows[0], layout) for token in piece
    ]


def encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    """The prompt for an answer: token ids, the same as at the start of a training row."""
    return encode_prompt(tokenizer, question)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text. An end token in it is encoded as ordinary text."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def encode_records(
    tokenizer: Tokenizer,
    records: list[Record],
    max_length: int,
    train_on: str,
    template: Template | None = None,
) -> tuple[list[Example], list[Example]]:
    """Encode all rows. The arguments are those of `encode_record`.

    Returns:
        kept: rows with a loss on at least one token.
        dropped: the others, whose answers were cut off completely.

    Raises:
        ConfigError, ModelError: the template cannot be used.
        DataError: it cannot be used for some rows; all of them are named.
    """
    template = template or own_template(tokenizer)
    examples: list[Example] = []
    faults = []
    for record in records:
        try:
            examples += encode_record(tokenizer, record, max_length, train_on, template)
        except DataError as error:
            faults.append(row_fault(record, error))
    if faults:
        advice = "\n".join(dict.fromkeys(fault.advice for fault in faults))
        lines = list_faults(group_faults(faults), MAX_SHOWN)
        raise DataError(f"Rows that cannot be put into the template:\n{lines}\n{advice}")
    kept = [example for example in examples if example.loss_mask.any()]
    return kept, [example for example in examples if not example.loss_mask.any()]


def pack_texts(tokenizer: Tokenizer, records: list[Record], max_length: int) -> list[Example]:
    """Texts laid one after the other and cut into rows of one length, but for the last.

    None is padded or truncated. A row begins with the last token of the one before, so each token
    but the very first is learned once; the first of a text from the end of the one before.

    Args:
        tokenizer: a Hugging Face tokenizer.
        records: rows of `text`.
        max_length: L, of the rows to make. Their `record` is that of their first token.

    Raises:
        DataError: rows that are no texts; all of them are named.
    """
    if others := [record.source for record in records if record.messages or record.prompt]:
        raise DataError(
            "data.pack lays rows of text one after the other, and these are questions and answers:"
            f"\n{list_faults(others)}\nLeave data.pack out."
        )
    texts, _ = encode_records(tokenizer, records, sys.maxsize, "all")
    if not texts:
        return []
    tokens = np.concatenate([text.tokens for text in texts])
    ends = np.cumsum([len(text) for text in texts])
    packed = []
    for start in range(0, len(tokens) - 1, max_length - 1):
        row = tokens[start : start + max_length]
        record = texts[int(np.searchsorted(ends, start, side="right"))].record
        packed.append(Example(record, row, np.arange(len(row)) > 0))
    return packed


def row_fault(record: Record, error: DataError) -> Fault:
    """What `encode_record` says of a row, as a fault of it."""
    message, _, advice = str(error).partition("\n")
    return Fault(record.source, message.removesuffix("."), advice)


def _lay_out(tokenizer: Tokenizer, record: Record, template: Template | None) -> Layout:
    if record.messages:
        return lay_out(template or own_template(tokenizer), tokenizer, record.messages)
    return _verbatim(tokenizer, record.prompt, record.completion)


def _verbatim(tokenizer: Tokenizer, prompt: str, completion: str = "") -> Layout:
    """A text as it stands; special tokens in it are text."""
    special = special_of(tokenizer)
    hidden = special.hide([prompt, completion])
    prompt, completion = (
        special.pattern.sub(lambda m: hidden[m[0]], t) for t in (prompt, completion)
    )
    turn = Turn(prompt, completion, tokenizer.eos_token if completion else "")
    return Layout([[turn]], {char: token for token, char in hidden.items()}, special.start)


def _encode_turns(
    tokenizer: Tokenizer, turns: Iterable[Turn], layout: Layout
) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each prompt and of each answer with its end token; whether it is an answer."""
    special, after = special_of(tokenizer), ""
    if layout.start:
        yield [special.ids[layout.start]], False
    for turn in turns:
        prompt = _encode(tokenizer, turn.prompt, after, layout.hidden)
        if prompt:
            yield prompt, False
        if turn.end:
            # Together, because some tokenizers put a space before each text. But the prompt
            # must have the tokens that it has in generation, before there is an answer.
            both = _encode(tokenizer, turn.prompt + turn.answer, after, layout.hidden)
            is_split = both[: len(prompt)] == prompt
            answer = both[len(prompt) :]
            if not is_split:
                answer = _encode(tokenizer, turn.answer, "", layout.hidden)
            yield [*answer, special.ids[turn.end]], True
        after = turn.end


def _encode(tokenizer: Tokenizer, text: str, after: str, hidden: dict[str, str]) -> list[int]:
    """Token ids of a part of a conversation.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: in which special tokens are meant as such.
        after: the special token before it; "" at the beginning. Some tokenizers put a space
            before a text, but not after a special token.
        hidden: characters that stand for the text of special tokens.
    """
    special = special_of(tokenizer)
    if not any(char in text for char in hidden):
        whole = after + text
        ids = list(tokenizer.encode(whole, add_special_tokens=False, split_special_tokens=False))
        meant = [special.ids[token] for token in special.pattern.findall(whole)]
        if [n for n in ids if n in special.numbers] == [n for n in meant if n in special.numbers]:
            return ids[1:] if after else ids
    ids, start = [], 0
    for match in special.pattern.finditer(text):
        ids += _encode_plain(tokenizer, text[start : match.start()], hidden)
        ids.append(special.ids[match[0]])
        start = match.end()
    return ids + _encode_plain(tokenizer, text[start:], hidden)


def _encode_plain(tokenizer: Tokenizer, text: str, hidden: dict[str, str]) -> list[int]:
    for char, token in hidden.items():
        text = text.replace(char, token)
    return encode(tokenizer, text) if text else []
