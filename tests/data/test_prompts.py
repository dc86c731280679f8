"""Rows to tokens: the template, the loss mask, truncation."""

import itertools

import jinja2
import numpy as np
import pytest
from checkpoints import write_tokenizer
from transformers import AutoTokenizer

from interviewmate_mlx.config import load_run
from interviewmate_mlx.data.prompts import (
    encode_question,
    encode_record,
    encode_records,
    pack_texts,
)
from interviewmate_mlx.data.records import Message, Record
from interviewmate_mlx.data.templates import CHAT_TEMPLATE
from interviewmate_mlx.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def pair(question: str, answer: str) -> Record:
    return Record("row", messages=(Message("user", question), Message("assistant", answer)))


def test_row_is_the_template_and_the_end_token(tokenizer):
    (example,) = encode_record(tokenizer, pair("Why?", "Because."), 512, "answer")
    assert tokenizer.decode(example.tokens) == "Question: Why?\nAnswer: Because.<|endoftext|>"
    assert example.tokens[-1] == tokenizer.eos_token_id


def test_loss_is_only_on_the_answer_and_the_end_token(tokenizer):
    (example,) = encode_record(tokenizer, pair("Why?", "Because."), 512, "answer")
    learned = example.tokens[example.loss_mask]
    assert tokenizer.decode(learned) == " Because.<|endoftext|>"
    assert not example.loss_mask[: len(example) - len(learned)].any()


def test_train_on_all_learns_every_token_but_the_first(tokenizer):
    (example,) = encode_record(tokenizer, pair("Why?", "Because."), 512, "all")
    assert not example.loss_mask[0]
    assert example.loss_mask[1:].all()


def test_prompt_for_generation_is_the_start_of_a_training_row(tokenizer):
    (example,) = encode_record(tokenizer, pair("Why  so?", "Because."), 512, "answer")
    prompt = encode_question(tokenizer, " Why  so?\n")
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.loss_mask[: len(prompt)].any() == False  # noqa: E712
    assert example.loss_mask[len(prompt) :].all()


def test_mask_is_exact_where_the_tokenizer_would_merge_across_the_boundary(tokenizer):
    prompt, completion = "the tr", "aining set"
    joint = tokenizer.encode(prompt + completion, add_special_tokens=False)
    apart = tokenizer.encode(prompt, add_special_tokens=False)
    assert joint[: len(apart)] != apart  # the tokenizer does merge across the boundary
    (example,) = encode_record(
        tokenizer, Record("row", prompt=prompt, completion=completion), 99, "answer"
    )
    assert tokenizer.decode(example.tokens[~example.loss_mask]) == prompt
    assert tokenizer.decode(example.tokens[example.loss_mask]) == completion + "<|endoftext|>"


def test_end_token_that_a_user_wrote_stays_text(tokenizer):
    (example,) = encode_record(tokenizer, pair("What is <|endoftext|>?", "A token."), 512, "answer")
    assert (example.tokens == tokenizer.eos_token_id).sum() == 1
    assert "What is <|endoftext|>?" in tokenizer.decode(example.tokens)


def test_conversation_learns_every_answer(tokenizer):
    messages = (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "1."),
        Message("user", "Two?"),
        Message("assistant", "2."),
    )
    (example,) = encode_record(tokenizer, Record("row", messages=messages), 512, "answer")
    assert tokenizer.decode(example.tokens) == (
        "Be brief.\n\nQuestion: One?\nAnswer: 1.<|endoftext|>"
        "Question: Two?\nAnswer: 2.<|endoftext|>"
    )
    assert tokenizer.decode(example.tokens[example.loss_mask]) == " 1.<|endoftext|> 2.<|endoftext|>"


def test_loss_is_on_the_last_answer_alone_if_the_run_says_so(tokenizer):
    one, two = (
        (Message("user", "One?"), Message("assistant", "1.")),
        (
            Message("user", "Two?"),
            Message("assistant", "2."),
        ),
    )
    record = Record("row", messages=(*one, *two))
    (last,), (every,), (same,) = (
        encode_record(tokenizer, record, 512, train_on)
        for train_on in ("last", "answer", "answers")
    )
    assert tokenizer.decode(last.tokens[last.loss_mask]) == " 2.<|endoftext|>"
    assert tokenizer.decode(every.tokens[every.loss_mask]) == " 1.<|endoftext|> 2.<|endoftext|>"
    np.testing.assert_array_equal(last.tokens, every.tokens)
    np.testing.assert_array_equal(same.loss_mask, every.loss_mask)
    # Of one turn, and of a text as it stands, there is one answer.
    for record in (Record("row", messages=one), Record("row", prompt="a", completion="b")):
        (last,), (every,) = (encode_record(tokenizer, record, 99, on) for on in ("last", "answer"))
        np.testing.assert_array_equal(last.loss_mask, every.loss_mask)


def test_chat_template_renders_the_same_tokens(tokenizer):
    messages = (Message("system", "S"), Message("user", "Why? {}"), Message("assistant", "{B}."))
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    text = template.render(messages=turns, eos_token="<|endoftext|>", add_generation_prompt=False)
    (example,) = encode_record(tokenizer, Record("row", messages=messages), 512, "answer")
    assert tokenizer.encode(text, add_special_tokens=False) == example.tokens.tolist()
    prompt = template.render(messages=turns[1:2], eos_token="", add_generation_prompt=True)
    assert tokenizer.encode(prompt, add_special_tokens=False) == encode_question(
        tokenizer, "Why? {}"
    )


def test_truncated_answer_keeps_its_beginning_and_gets_no_end_token(tokenizer):
    (whole,) = encode_record(tokenizer, pair("Why?", "Because it is so."), 512, "answer")
    (cut,) = encode_record(tokenizer, pair("Why?", "Because it is so."), len(whole) - 3, "answer")
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:-3])
    assert cut.num_truncated == 3
    assert whole.num_truncated == 0
    assert tokenizer.eos_token_id not in cut.tokens


def test_rows_with_nothing_left_to_learn_are_returned_separately(tokenizer):
    records = [pair("Why?", "So."), pair("Why " * 50, "So.")]
    kept, dropped = encode_records(tokenizer, records, 32, "answer")
    assert [example.record for example in kept] == records[:1]
    assert [example.record for example in dropped] == records[1:]


def test_verbatim_text_is_learned_whole(tokenizer):
    (example,) = encode_record(tokenizer, Record("row", completion="Once upon"), 512, "answer")
    assert tokenizer.decode(example.tokens) == "Once upon<|endoftext|>"
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 1)


def test_packed_texts_lose_nothing_and_learn_each_token_once(tokenizer):
    texts = ["The training set.", "A mean. " * 9, "Why?"]
    records = [Record(f"row {n}", completion=text) for n, text in enumerate(texts)]
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    stream = [token for document in ids for token in document]
    for length in (8, 9, len(stream), 1000):
        rows = pack_texts(tokenizer, records, length)
        assert all(len(row) == length for row in rows[:-1])
        learned = [token for row in rows for token in row.tokens[row.loss_mask]]
        assert [rows[0].tokens[0], *learned] == stream
        for before, row in itertools.pairwise(rows):  # each sees what came before it
            assert row.tokens[0] == before.tokens[-1]
            assert not row.loss_mask[0]
        assert not any(row.num_truncated for row in rows)
    first = [row.record.source for row in pack_texts(tokenizer, records, 8)]
    assert first[0] == "row 0"
    assert first == sorted(first)
    assert len(set(first)) > 1


def test_only_texts_are_packed(tokenizer):
    records = [Record("row 1", completion="A text."), pair("Why?", "Because.")]
    records.append(Record("row 3", prompt="Why?", completion="Because."))
    with pytest.raises(DataError, match="questions and answers:\n  row\n  row 3\nLeave"):
        pack_texts(tokenizer, records, 8)
    assert pack_texts(tokenizer, [], 8) == []


def test_preferences_are_not_packed():
    with pytest.raises(ConfigError, match=r"data\.pack: got true, expected false: dpo"):
        load_run("dpo", ["data.pack=true"])
