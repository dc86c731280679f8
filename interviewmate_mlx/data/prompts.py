"""A row becomes token ids and an answer mask.

The template is written once, here: training, generation and the chat template
of a converted folder all come from it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from interviewmate_mlx.data.records import Message, Record

QUESTION = "Question: {}\nAnswer:"
ANSWER = " {}"
SYSTEM = "{}\n\n"

# The same template in Jinja. A question's text ends in "Answer:", so a prompt for
# generation needs nothing more.
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
        record: where it comes from.
        tokens: (L,) int32 token ids.
        loss_mask: (L,) bool, true on the tokens that are predicted with a loss.
            Never on the first: nothing comes before it.
        num_truncated: tokens that did not fit.
    """

    record: Record
    tokens: np.ndarray
    loss_mask: np.ndarray
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def encode_record(tokenizer: Any, record: Record, max_length: int, train_on: str) -> Example:
    """Tokens and answer mask of a row.

    Prompt and answer are tokenised apart, so their boundary is a token boundary
    in training, as it is in generation, whatever a tokenizer would merge.
    An answer that is cut gets no end token: it did not end there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        record: a checked row.
        max_length: tokens to keep.
        train_on: `answer`, or `all` for a loss on every token but the first.
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


def encode_question(tokenizer: Any, question: str) -> list[int]:
    """The prompt for an answer: the ids a training row begins with."""
    return encode(tokenizer, QUESTION.format(question.strip()))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text: an end token that a user wrote stays text."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def encode_records(
    tokenizer: Any, records: list[Record], max_length: int, train_on: str
) -> tuple[list[Example], list[Example]]:
    """Encode all rows; those with nothing left to learn from come second."""
    examples = [encode_record(tokenizer, record, max_length, train_on) for record in records]
    kept = [example for example in examples if example.loss_mask.any()]
    return kept, [example for example in examples if not example.loss_mask.any()]


def _parts(record: Record) -> list[tuple[str, bool]]:
    """Pieces of text, and whether each is an answer (and so ends in the end token)."""
    if record.messages:
        return [_render(message) for message in record.messages]
    parts = [(record.prompt, False)] if record.prompt else []
    return [*parts, (record.completion, True)]


def _render(message: Message) -> tuple[str, bool]:
    template = {"system": SYSTEM, "user": QUESTION, "assistant": ANSWER}[message.role]
    return template.format(message.content), message.role == "assistant"
