"""Turns a row into token ids and a loss mask.

The template is written only here. Training, generation and the chat template of a
converted folder all use it.
"""

from dataclasses import dataclass
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
    + SYSTEM.format("{{ message['content'] }}")
    + "{% endif %}"
    "{% if message['role'] == 'user' %}"
    + QUESTION.format("{{ message['content'] }}")
    + "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    + ANSWER.format("{{ message['content'] }}")
    + "{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


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

    Prompt and answer are tokenised separately. So there is a token boundary between
    them, as in generation, even if the tokenizer would merge across it. A truncated
    answer gets no end token, because it does not end there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        record: a checked row.
        max_length: the most tokens to keep.
        train_on: `answer`, or `all` for a loss on every token except the first.
    """
    tokens: list[int] = []
    loss_mask: list[bool] = []
    for text, is_answer in _parts(record):
        piece = encode(tokenizer, text)
        if is_answer:
            piece.append(tokenizer.eos_token_id)
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


def encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    """The prompt for an answer: token ids, the same as at the start of a training row."""
    return encode(tokenizer, QUESTION.format(question.strip()))


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


def _parts(record: Record) -> list[tuple[str, bool]]:
    """Pieces of text, each with whether it is an answer. An end token follows an answer."""
    if record.messages:
        return [_render(message) for message in record.messages]
    parts = [(record.prompt, False)] if record.prompt else []
    return [*parts, (record.completion, True)]


def _render(message: Message) -> tuple[str, bool]:
    template = {"system": SYSTEM, "user": QUESTION, "assistant": ANSWER}[message.role]
    return template.format(message.content), message.role == "assistant"
