"""Turns a row into token ids and a loss mask.

The template is written only here. Training, generation and the chat template of a
converted folder all use it, and all three give the same token ids. Exceptions are a text
that holds a special token, and a tokenizer that merges the first characters of an answer
with the prompt: see `encode_messages`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from interviewmate_mlx.data.records import Message, Record

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "TokenizerWrapper | PreTrainedTokenizerBase"

QUESTION = "Question: {}\nAnswer:"
ANSWER = " {}"
SYSTEM = "{}\n\n"

# The same template in Jinja. A question's text ends in "Answer:", so there is nothing to
# add for `add_generation_prompt`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    + SYSTEM.format("{{ message['content'] | trim }}")
    + "{% endif %}"
    "{% if message['role'] == 'user' %}"
    + QUESTION.format("{{ message['content'] | trim }}")
    + "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    + ANSWER.format("{{ message['content'] | trim }}")
    + "{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class Template(StrEnum):
    """How a prompt is put to a model: as it was put in training."""

    QUESTIONS = "questions"  # the template above
    VERBATIM = "verbatim"  # as it stands


def template_of(records: Iterable[Record]) -> Template:
    """The template of rows: that of questions if any row is a conversation."""
    has_conversation = any(record.messages for record in records)
    return Template.QUESTIONS if has_conversation else Template.VERBATIM


@dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    Attributes:
        record: the row.
        tokens: (L,) int32 token ids.
        loss_mask: (L,) bool, true on the tokens that count for the loss. The first
            never does, because there is nothing to predict it from.
        num_truncated: tokens that did not fit.
    """

    record: Record
    tokens: np.ndarray
    loss_mask: np.ndarray
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def encode_record(tokenizer: Tokenizer, record: Record, max_length: int, train_on: str) -> Example:
    """The tokens and the loss mask of a row.

    An answer starts a new token, as in generation, even if the tokenizer would merge it
    with the prompt. A truncated answer gets no end token, because it does not end there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        record: a checked row.
        max_length: the most tokens to keep.
        train_on: `answer`, or `all` for a loss on every token except the first.
    """
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for piece, is_answer in _encode_turns(tokenizer, _turns(record)):
        tokens += piece
        loss_mask += [is_answer or train_on == "all"] * len(piece)
    if loss_mask:
        loss_mask[0] = False
    return Example(
        record=record,
        tokens=np.array(tokens[:max_length], dtype=np.int32),
        loss_mask=np.array(loss_mask[:max_length], dtype=bool),
        num_truncated=max(0, len(tokens) - max_length),
    )


def encode_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The prompt for the next answer of a conversation: the first tokens of its training row.

    They are also the ids of the chat template's text. There are two exceptions. A special
    token that a user wrote stays text here. And an answer of an earlier turn never shares
    a token with its prompt, as if it had just been generated; a tokenizer that merges the
    two in the template's text gives other ids there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: perhaps a system message; then user and assistant in turn.
    """
    pieces = _encode_turns(tokenizer, _dialogue_turns(messages))
    return [token for piece, _ in pieces for token in piece]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, template: Template = Template.QUESTIONS
) -> list[int]:
    """The tokens of a question, or of a verbatim prompt as it stands."""
    if template == Template.VERBATIM:
        return encode(tokenizer, prompt)
    return encode_messages(tokenizer, [Message("user", prompt)])


def encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    """The prompt for an answer: token ids, the same as at the start of a training row."""
    return encode_prompt(tokenizer, question)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text. An end token in it is encoded as ordinary text."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def encode_records(
    tokenizer: Tokenizer, records: list[Record], max_length: int, train_on: str
) -> tuple[list[Example], list[Example]]:
    """Encode all rows. The arguments are those of `encode_record`.

    Returns:
        kept: rows with a loss on at least one token.
        dropped: the others, whose answers were cut off completely.
    """
    examples = [encode_record(tokenizer, record, max_length, train_on) for record in records]
    kept = [example for example in examples if example.loss_mask.any()]
    return kept, [example for example in examples if not example.loss_mask.any()]


@dataclass(frozen=True)
class _Turn:
    """What is between two end tokens: text that is given, and perhaps the answer to it."""

    prompt: str
    answer: str = ""


def _turns(record: Record) -> list[_Turn]:
    if record.messages:
        return _dialogue_turns(record.messages)
    return [_Turn(record.prompt, record.completion)]


def _dialogue_turns(messages: Iterable[Message]) -> list[_Turn]:
    turns, prompt = [], ""
    for message in messages:
        content = message.content.strip()
        if message.role == "assistant":
            turns.append(_Turn(prompt, ANSWER.format(content)))
            prompt = ""
        else:
            prompt += (SYSTEM if message.role == "system" else QUESTION).format(content)
    return [*turns, _Turn(prompt)] if prompt else turns


def _encode_turns(tokenizer: Tokenizer, turns: Iterable[_Turn]) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each prompt and of each answer with its end token; whether it is an answer."""
    for number, turn in enumerate(turns):
        read = _encode_after_end if number else encode
        prompt = read(tokenizer, turn.prompt) if turn.prompt else []
        if prompt:
            yield prompt, False
        if turn.answer:
            # Together, because some tokenizers put a space before each text. But the prompt
            # must have the tokens that it has in generation, before there is an answer.
            both = read(tokenizer, turn.prompt + turn.answer)
            is_split = both[: len(prompt)] == prompt
            answer = both[len(prompt) :] if is_split else encode(tokenizer, turn.answer)
            yield [*answer, tokenizer.eos_token_id], True


def _encode_after_end(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that follows an end token.

    Some tokenizers put a space before a text, but not after a special token.
    """
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if any(content in text for content in special):  # a special token would not stay text
        return encode(tokenizer, text)
    end = tokenizer.eos_token
    ids = list(tokenizer.encode(end + text, add_special_tokens=False, split_special_tokens=False))
    return ids[1:] if ids[:1] == [tokenizer.eos_token_id] else encode(tokenizer, text)
