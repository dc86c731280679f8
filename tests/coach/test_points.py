"""Points of an answer: sentences, weights of terms, and what covers a point."""

import math
from collections import Counter

import pytest

from interviewmate_mlx.coach.points import COVERED, points_of, sentences, term_weights, terms

TEXTS = [
    "The mean hides the tail. Watch the p99 latency instead.",
    "The mean is the sum by the count.",
    "Latency is a wait.",
    "The gradient points uphill.",
]


def test_weights_are_the_inverse_document_frequency():
    weights = term_weights(TEXTS)
    documents = [set(terms(text)) for text in TEXTS]
    counts = Counter(term for document in documents for term in document)
    assert counts["mean"] == 2
    assert weights["mean"] == pytest.approx(math.log(5 / 3))
    assert weights == {term: pytest.approx(math.log(5 / (1 + n))) for term, n in counts.items()}
    assert weights["the"] < weights["latenc"] < weights["tail"]


def test_terms_are_the_same_whatever_their_endings():
    assert terms("Overfitting models") == terms("overfit MODEL")
    assert terms("It memorises") == terms("it memorised")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One thing holds. Another does not.", ["One thing holds.", "Another does not."]),
        ("It is 0.5, e.g. this. Then stop it.", ["It is 0.5, e.g. this.", "Then stop it."]),
        ("It always wins. No.", ["It always wins. No."]),
        ("Use these: Adam is one of them.\n- a list of lines\n- and one more", [
            "Use these: Adam is one of them.", "- a list of lines", "- and one more"]),
        ("", []),
        ("one without an end", ["one without an end"]),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_share_is_the_weight_of_the_shared_terms():
    weights = term_weights(TEXTS)
    reference, answer = TEXTS[0], "Look at latency at p99"
    points = points_of(reference, answer, weights)
    assert [point.text for point in points] == sentences(reference)
    expected = []
    for sentence in sentences(reference):
        own = set(terms(sentence))
        shared = own & set(terms(answer))
        whole = sum(weights[term] for term in own)
        expected.append(pytest.approx(sum(weights[term] for term in shared) / whole))
    assert [point.share for point in points] == expected
    assert [point.is_covered for point in points] == [
        share.expected >= COVERED for share in expected
    ]
    assert [point.is_covered for point in points] == [False, True]


def test_an_answer_has_all_points_of_itself_and_none_of_another():
    weights = term_weights(TEXTS)
    for text in TEXTS:
        assert all(point.share == pytest.approx(1) for point in points_of(text, text, weights))
    assert not any(point.is_covered for point in points_of(TEXTS[0], TEXTS[3], weights))
    assert not any(point.is_covered for point in points_of(TEXTS[0], "", weights))


def test_unknown_terms_weigh_most():
    weights = term_weights(TEXTS)
    (point,) = points_of("The zebra eats hay", "the zebra", weights)
    rarest = max(weights.values())
    assert point.share == pytest.approx((weights["the"] + rarest) / (weights["the"] + 3 * rarest))
