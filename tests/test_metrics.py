"""Exact match, Wilson's interval, the blind baseline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.evaluation.metrics import Accuracy, accuracy, blind_accuracy, exact_match, wilson_interval


@pytest.mark.parametrize(
    ("correct", "examples", "low", "high"),
    [
        # z^2 = 3.841459: middle (p + z^2/2n) / (1 + z^2/n), half z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),  # z^2 / (n + z^2)
        (10, 10, 0.7224672, 1.0),
        (1, 2, 0.0945312, 0.9054688),
        (50, 100, 0.4038315, 0.5961685),
        (0, 1, 0.0, 0.7934507),
    ],
)
def test_wilson_interval(correct: int, examples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, examples) == pytest.approx((low, high), abs=1e-6)


@given(examples=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_within_bounds(examples: int, share: float) -> None:
    correct = round(share * examples)
    low, high = wilson_interval(correct, examples)
    assert 0 <= low <= correct / examples + 1e-12
    assert correct / examples - 1e-12 <= high <= 1
    mirrored = wilson_interval(examples - correct, examples)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_zero_z_gives_the_share_itself() -> None:
    assert wilson_interval(3, 4, z=0.0) == (0.75, 0.75)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("yes", "yes"),
        ("Yes", "yes"),
        (" yes \n", "yes"),
        ("yes.", "yes"),
        ("Yes. ", "yes."),
        ("yes .", "YES"),
        ("", ""),
    ],
)
def test_exact_match(answer: str, truth: str) -> None:
    assert exact_match(answer, truth)
    assert exact_match(truth, answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("yes, it is", "yes"), ("no", "yes"), ("", "yes"), ("y es", "yes"), ("yes!", "yes"), ("1.5", "15")],
)
def test_no_match(answer: str, truth: str) -> None:
    assert not exact_match(answer, truth)


def test_accuracy() -> None:
    result = accuracy([True] * 8 + [False] * 2)
    low, high = wilson_interval(8, 10)
    assert result == Accuracy(accuracy=0.8, low=low, high=high, correct=8, examples=10)


def test_blind_accuracy() -> None:
    questions = ["shape?", "shape?", "shape?", "red?", "red?", "any?"]
    answers = ["circle", "circle", "square", "no", "no", "no"]
    asked = ["shape?", "shape?", "red?", "never seen?", "never seen?"]
    # guesses: circle, circle, no, and the most frequent answer of all, no
    result = blind_accuracy(questions, answers, asked, ["Circle.", "square", "no", "no", "yes"])
    assert (result.correct, result.examples) == (3, 5)


def test_blind_accuracy_wants_an_answer_to_each_question() -> None:
    with pytest.raises(ValueError, match="zip"):
        blind_accuracy(["a"], ["b", "c"], ["a"], ["b"])
    with pytest.raises(ValueError, match="zip"):
        blind_accuracy(["a"], ["b"], ["a"], ["b", "c"])
