"""Preferences are read in every form of the Hub's; whatever is wrong with one is named."""

import json

import numpy as np
import pytest
from checkpoints import write_tokenizer
from transformers import AutoTokenizer

from interviewmate_mlx.data.pairs import encode_judged, encode_pairs
from interviewmate_mlx.data.preferences import load_preferences, read_preferences
from interviewmate_mlx.data.prompts import encode_question
from interviewmate_mlx.data.records import Message, read_records
from interviewmate_mlx.errors import DataError

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
JUDGED = {"prompt": "Why?", "completion": "Because.", "label": True}
ASKED = [{"role": "user", "content": "Why?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def written(folder, *rows):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": ASKED, "chosen": said("Because."), "rejected": said("No.")},
        {"prompt": "Why?", "chosen": said("Because."), "rejected": said("No.")},
        {"prompt": ASKED, "chosen": ASKED + said("Because."), "rejected": ASKED + said("No.")},
        {"prompt": "Why?", "chosen": ASKED + said("Because."), "rejected": ASKED + said("No.")},
    ],
    ids=["texts", "messages", "text_and_messages", "whole_conversations", "both"],
)
def test_all_forms_of_a_pair_are_the_same_pair(tmp_path, row):
    (pair,) = read_preferences([written(tmp_path, row)], is_paired=True)
    asked = Message("user", "Why?")
    assert pair.chosen.messages == (asked, Message("assistant", "Because."))
    assert pair.rejected.messages == (asked, Message("assistant", "No."))


def test_a_pair_may_follow_earlier_turns_and_has_its_labels(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, *ASKED, *said("So."), *ASKED]
    row = {"prompt": prompt, "chosen": said("a"), "rejected": said("b"), "id": 3, "category": "x"}
    (pair,) = read_preferences([written(tmp_path, row)], is_paired=True)
    assert [message.role for message in pair.chosen.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert (pair.id, pair.chosen.category) == ("3", "x")


BAD_PAIRS = {
    "no_prompt": ({**PAIR, "prompt": None}, "prompt: got nothing"),
    "no_rejected": ({"prompt": "Why?", "chosen": "a"}, "rejected: got nothing"),
    "empty_rejected": ({**PAIR, "rejected": " "}, "rejected: got an empty string"),
    "empty_prompt": ({**PAIR, "prompt": ""}, "prompt: got an empty string"),
    "equal_sides": ({**PAIR, "rejected": "Because. "}, "the same answer twice"),
    "number": ({**PAIR, "chosen": 7}, "chosen: got 7, expected a text or a list of messages"),
    "not_an_object": ([1], "expected a JSON object"),
    "two_kinds": ({**PAIR, "chosen": said("a")}, "expected both alike"),
    "prompt_ends_with_an_answer": (
        {"prompt": said("a"), "chosen": said("b"), "rejected": said("c")},
        "prompt: got 'assistant' last, expected the user",
    ),
    "no_messages": ({"prompt": ASKED, "chosen": [], "rejected": said("c")}, "chosen: got 0"),
    "another_prompt": (
        {"prompt": ASKED, "chosen": said("x") + said("a"), "rejected": said("c")},
        "chosen: got 2 messages after the prompt, expected one",
    ),
    "an_answer_of_the_user": (
        {"prompt": ASKED, "chosen": ASKED, "rejected": said("c")},
        "chosen: ",
    ),
    "question_and_answer": ({"question": "a", "answer": "b"}, "expected prompt, chosen, rejected"),
}


@pytest.mark.parametrize(("row", "fault"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pair_is_named(tmp_path, row, fault):
    with pytest.raises(DataError) as caught:
        read_preferences([written(tmp_path, PAIR, row)], is_paired=True)
    assert "line 2" in str(caught.value)
    assert fault in str(caught.value)


def test_formats_are_not_mixed_in_a_file(tmp_path):
    other = {"prompt": ASKED, "chosen": said("a"), "rejected": said("b")}
    with pytest.raises(DataError, match="a prompt of text and answers of text in line 1") as caught:
        read_preferences([written(tmp_path, PAIR, other)], is_paired=True)
    assert "expected one format in a file" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**JUDGED, "label": "yes"}, "label: got 'yes', expected true or false"),
        ({**JUDGED, "label": 1}, "label: got 1, expected true or false"),
        ({"prompt": "Why?", "completion": "a"}, "label: got nothing"),
        (PAIR, "completion: got nothing"),
    ],
)
def test_bad_label_is_named(tmp_path, row, fault):
    with pytest.raises(DataError) as caught:
        read_preferences([written(tmp_path, JUDGED, row)], is_paired=False)
    assert fault in str(caught.value)


def test_labels_of_one_kind_alone_are_refused(tmp_path):
    with pytest.raises(DataError, match="got the label true in all rows, expected both"):
        read_preferences([written(tmp_path, JUDGED, JUDGED)], is_paired=False)


def test_an_id_twice_no_rows_and_several_files_are_told(tmp_path):
    path = written(tmp_path, {**PAIR, "id": "a"}, {**PAIR, "id": "a"})
    with pytest.raises(DataError, match="id 'a' is taken by line 1"):
        load_preferences(tmp_path, is_paired=True)
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        load_preferences(tmp_path, is_paired=True)


def test_a_preference_among_other_rows_names_the_method(tmp_path):
    with pytest.raises(DataError, match=r"train\.method"):
        read_records(written(tmp_path, PAIR))


def test_the_answers_alone_count_and_the_prompt_is_the_one_of_generation(tmp_path, tokenizer):
    rows = read_preferences([written(tmp_path, PAIR)], is_paired=True)
    (pair,), dropped = encode_pairs(tokenizer, rows, 64, "answer")
    prompt = encode_question(tokenizer, "Why?")
    for side, text in ((pair.chosen, " Because."), (pair.rejected, " No.")):
        assert side.tokens[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(side.tokens[side.loss_mask]) == f"{text}<|endoftext|>"
        assert not side.loss_mask[: len(prompt)].any()
    assert (pair.learned == pair.chosen.loss_mask).all()
    assert dropped == 0
    (pair,), _ = encode_pairs(tokenizer, rows, 64, "all")
    assert pair.learned.tolist() == [False] + [True] * (len(pair.chosen) - 1)


def test_pairs_that_are_alike_once_truncated_are_left_out(tmp_path, tokenizer):
    rows = [PAIR, {"prompt": "Why?", "chosen": "The same. Then this", "rejected": "The same. No"}]
    prompt = len(encode_question(tokenizer, "Why?"))
    pairs, dropped = encode_pairs(
        tokenizer,
        read_preferences([written(tmp_path, *rows)], is_paired=True),
        prompt + 3,
        "answer",
    )
    assert (len(pairs), dropped) == (1, 1)
    assert len(pairs[0]) == prompt + 3
    nothing, dropped = encode_pairs(
        tokenizer, read_preferences([tmp_path / "train.jsonl"], is_paired=True), prompt, "answer"
    )
    assert (nothing, dropped) == ([], 2)


def test_judged_rows_know_another_row_s_answer(tmp_path, tokenizer):
    rows = [{"prompt": f"{n}?", "completion": f"say {n}", "label": n > 1} for n in range(4)]
    found, dropped = encode_judged(
        tokenizer, read_preferences([written(tmp_path, *rows)], is_paired=False), 64, 2
    )
    others = [tokenizer.decode(row.other.tokens[row.other.loss_mask]) for row in found]
    assert others == [f" say {n}<|endoftext|>" for n in (1, 0, 3, 2)]
    for number, row in enumerate(found):
        prompt = encode_question(tokenizer, f"{number}?")
        assert row.other.tokens[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(row.other.loss_mask)[0] == len(prompt)
    assert [row.is_good for row in found] == [False, False, True, True]
    assert dropped == 0


def test_the_shipped_preferences_are_sound():
    from interviewmate_mlx.config import shipped

    splits = load_preferences(shipped("data/interview-preferences"), is_paired=True)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 255, "valid": 45}
