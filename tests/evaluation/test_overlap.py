"""Scores of answers: the libraries' own, and counts that a naive program gives too."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import BLEU, CHRF

from interviewmate_mlx.coach.generate import Answer
from interviewmate_mlx.errors import ConfigError
from interviewmate_mlx.evaluation import overlap
from interviewmate_mlx.evaluation.overlap import (
    check_installed,
    longest_copies,
    repetition,
    score_answers,
    words,
)

WRITTEN = [
    "Overfitting is when a model learns the noise of its training rows, not what they share.",
    "The mean is pulled by outliers; the median is not.",
    "A learning rate sets how long a step is.",
]
ANSWERS = [
    "Overfitting is learning the noise of the training rows.",
    "The median is not pulled by outliers, the mean is. The median is not pulled by outliers.",
    "",
]


def test_scores_are_the_libraries():
    answers = [
        Answer(text, ended) for text, ended in zip(ANSWERS, [True, False, True], strict=True)
    ]
    found = score_answers(answers, WRITTEN, ["nothing of the kind"])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    each = [scorer.score(w, a) for w, a in zip(WRITTEN, ANSWERS, strict=True)]
    for kind in ("rouge1", "rouge2", "rougeL"):
        expected = sum(scores[kind].fmeasure for scores in each) / 3
        assert getattr(found, kind) == pytest.approx(expected)
    assert found.chrf == pytest.approx(CHRF().corpus_score(ANSWERS, [WRITTEN]).score)
    assert found.bleu == pytest.approx(BLEU().corpus_score(ANSWERS, [WRITTEN]).score)
    assert found.rouge1 > found.rouge2 > 0
    assert found.ended == pytest.approx(2 / 3)
    assert found.length == pytest.approx((9 + 17 + 0) / (16 + 10 + 9))
    assert found.answers == 3


def test_perfect_answers_have_perfect_scores():
    found = score_answers([Answer(text, True) for text in WRITTEN], WRITTEN, WRITTEN)
    assert (found.rouge1, found.rouge2, found.rougeL) == (1, 1, 1)
    assert found.chrf == pytest.approx(100)
    assert found.bleu == pytest.approx(100)
    assert (found.length, found.repetition) == (1, 0)
    assert found.longest_copy == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("one two three", 0),
        ("one two three four five", 0),
        ("a b c d a b c d", 1 / 5),  # five runs of four, the last one is the first again
        ("so so so so so so so", 3 / 4),
    ],
)
def test_repetition_is_the_share_of_runs_seen_before(text, expected):
    assert repetition(words(text)) == pytest.approx(expected)


def naive_copy(text: list[str], learned: list[list[str]]) -> int:
    for size in range(len(text), 0, -1):
        runs = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
        for row in learned:
            if any(tuple(row[i : i + size]) in runs for i in range(len(row) - size + 1)):
                return size
    return 0


@pytest.mark.parametrize("vocabulary", [3, 12, 60])
def test_longest_copies_are_a_naive_search_s(vocabulary):
    draw = random.Random(vocabulary)

    def text(most: int) -> list[str]:
        return [str(draw.randrange(vocabulary)) for _ in range(draw.randrange(most))]

    for _ in range(30):
        texts, learned = [text(25) for _ in range(5)], [text(40) for _ in range(8)]
        if learned[0]:  # one that recites
            texts[0] = texts[0][:3] + learned[0]
        expected = [naive_copy(one, learned) for one in texts]
        assert longest_copies(texts, learned) == expected


def test_words_do_not_know_case_and_punctuation():
    assert words("It's Größe, 0.5 (half)!") == ["it", "s", "größe", "0", "5", "half"]


def test_missing_package_is_named_with_its_extra(monkeypatch):
    check_installed()
    monkeypatch.setattr(overlap, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rouge_score and sacrebleu.*\n.*\[scores\]") as caught:
        check_installed()
    assert caught.value.arguments == ("answers",)
