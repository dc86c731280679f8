"""Chat templates of well-known models, as TRL ships them, held against transformers' rendering."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chat_templates import chat_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from interviewmate_mlx.data.prompts import encode_messages, encode_record
from interviewmate_mlx.data.records import Message, Record
from interviewmate_mlx.data.templates import own_template
from interviewmate_mlx.errors import DataError, ModelError

_TRL = find_spec("trl")
FOLDER = Path((_TRL.origin if _TRL else None) or "missing").parent / "chat_templates"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="TRL, which ships them, is not here")

# The number of rows that a conversation of three answers becomes, after a system message.
ROWS = {
    "cohere2": 1,
    "gemma3": 1,
    "gemma4": 1,
    "gptoss": 3,
    "lfm2": 1,
    "llama3_1": 1,
    "llama3_2": 1,
    "nemotron_3_nano": 1,
    "phi3_5": 1,
    "qwen2_5": 1,
    "qwen3": 3,
    "qwen3_6": 3,
    "qwen3_instruct_2507": 1,
}
REFUSED = {
    "deepseek_r1_distill": "an answer does not begin where generation does: expected '.*<think>",
    "glm4moe": "no special token ends an answer",
}
SYSTEM = Message("system", "Be brief.")
ONE = (Message("user", "What is it?"), Message("assistant", "A loss."))
MORE = (Message("user", "Two?"), Message("assistant", "2 of <|im_end|> x"), *ONE)
CONVERSATIONS = {"one": ONE, "three": (*ONE, *MORE), "system": (SYSTEM, *ONE, *MORE)}


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that knows the special tokens which a template names."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    marks = set(
        re.findall(
            r"<[|\uff5c][^<>]{1,40}?[|\uff5c]>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>", text
        )
    )
    tokenizer = chat_tokenizer("chatml")
    added = [AddedToken(mark, special=True, normalized=False) for mark in [*sorted(marks), "<BOS>"]]
    tokenizer.add_tokens(added, special_tokens=True)
    ends = ("<|im_end|>", "<|eot_id|>", "<|end|>")
    tokenizer.eos_token = next((end for end in ends if end in marks), "<|endoftext|>")
    tokenizer.bos_token = "<BOS>"
    tokenizer.chat_template = text
    return tokenizer


def naive(
    tokenizer: PreTrainedTokenizerFast, messages: tuple[Message, ...], **options: Any
) -> list[int]:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)
    return list(ids)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ROWS)
def test_each_answer_is_learned_after_what_transformers_gives_before_it(name, messages):
    tokenizer = tokenizer_for(name)
    thinks = {"enable_thinking": False} if own_template(tokenizer).name != "own" else {}
    examples = encode_record(tokenizer, Record("row", messages=messages), 9999, "answer")
    if len(messages) == 7:
        assert len(examples) == ROWS[name]
    places = [n for n, message in enumerate(messages) if message.role == "assistant"]
    learned = []
    for example in examples:
        tokens, mask = example.tokens.tolist(), [False, *example.loss_mask.tolist(), False]
        edges = [n for n in range(len(mask) - 1) if mask[n] != mask[n + 1]]
        learned += [(tokens[:a], tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert len(learned) == len(places)
    for (before, answer), place in zip(learned, places, strict=True):
        assert encode_messages(tokenizer, messages[:place]) == before
        if not any("<|im_end|>" in message.content for message in messages[: place + 1]):
            prompt = naive(tokenizer, messages[:place], add_generation_prompt=True, **thinks)
            assert prompt == before
            whole = naive(tokenizer, messages[: place + 1], **thinks)
            assert whole[: len(before) + len(answer)] == before + answer
        said = tokenizer.decode(answer[:-1])
        assert messages[place].content in said


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_template_whose_answers_cannot_be_learned_is_refused_with_the_reason(name, reason):
    with pytest.raises(ModelError, match=reason):
        encode_record(tokenizer_for(name), Record("row", messages=ONE), 9999, "answer")


def test_template_without_a_system_message_refuses_rows_that_have_one():
    with pytest.raises(DataError, match="System role not supported"):
        encode_record(tokenizer_for("gemma"), Record("r", messages=(SYSTEM, *ONE)), 99, "answer")
