"""What a set of rows is like, held against counting by hand."""

import pytest
from checkpoints import write_tokenizer
from transformers import AutoTokenizer

from interviewmate_mlx.data.records import Message, Record
from interviewmate_mlx.data.summary import Lengths, script_of, summarize
from interviewmate_mlx.data.templates import PLAIN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ids(tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def test_summary_is_what_counting_by_hand_gives(tokenizer):
    one = Record(
        "a line 1",
        messages=(Message("user", "What is it?"), Message("assistant", "A loss.")),
        category="x",
        reading="question, answer",
    )
    two = Record(
        "a line 2",
        messages=(
            Message("system", "Be brief."),
            *(Message("user", "Почему так?"), Message("assistant", "Да, и нет, и да.")),
            *(Message("user", "So?"), Message("assistant", "Yes")),
        ),
        category="y",
        reading="messages",
    )
    text = Record("a line 3", completion="once upon a time", reading="text")
    found = summarize([one, two, text], tokenizer, 40, "answer", PLAIN)
    answers = [[" A loss."], [" Да, и нет, и да.", " Yes"], ["once upon a time"]]
    prompts = [
        ["Question: What is it?\nAnswer:"],
        ["Be brief.\n\nQuestion: Почему так?\nAnswer:", "Question: So?\nAnswer:"],
        [],
    ]
    learned = [sum(ids(tokenizer, text) + 1 for text in texts) for texts in answers]
    tokens = [
        own + sum(ids(tokenizer, text) for text in texts)
        for own, texts in zip(learned, prompts, strict=True)
    ]
    assert tokens[1] > 40 > max(tokens[0], tokens[2])
    assert found.rows == 3
    assert found.turns == {0: 1, 1: 1, 2: 1}
    assert found.categories == {"x": 1, "y": 1}
    assert found.scripts == {"Latin": 2, "Cyrillic": 1}
    assert found.question_words == Lengths(0, 3, 5, 5)
    assert found.answer_words == Lengths(2, 4, 6, 6)
    assert found.tokens == Lengths(min(tokens), sorted(tokens)[1], max(tokens), max(tokens))
    assert (found.longest, found.num_cut, found.num_dropped) == ("a line 2", 1, 0)
    assert sorted(found.readings) == [
        "1 row: messages",
        "1 row: question, answer",
        "1 row: text",
    ]
    assert 0 < found.loss_share < 1
    short = summarize([one], tokenizer, 8, "answer", PLAIN)
    assert (short.num_dropped, short.loss_share) == (1, 0)
    whole = summarize([one, text], tokenizer, 999, "answer", PLAIN)
    kept = tokens[0] + tokens[2]
    assert whole.loss_share == pytest.approx((learned[0] + learned[2] - 1) / kept)


@pytest.mark.parametrize(
    ("text", "script"),
    [("abc é", "Latin"), ("漢字 a", "Han"), ("ひらがな", "Hiragana"), ("한국", "Hangul"),
     ("مرحبا", "Arabic"), ("123 !?", "none"), ("", "none"), ("हिन्दी", "Devanagari")],
)  # fmt: skip
def test_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script
