"""Exact match and its uncertainty. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers in [0, 1] with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    correct: int
    examples: int


def exact_match(answer: str, truth: str) -> bool:
    """Whether the two agree but for case, surrounding space and a final full stop."""
    return _normal(answer) == _normal(truth)


def _normal(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def accuracy(right: Sequence[bool]) -> Accuracy:
    """Share of True with its Wilson interval; `right` has one entry an example and isn't empty."""
    correct = sum(right)
    low, high = wilson_interval(correct, len(right))
    return Accuracy(correct / len(right), low, high, correct, len(right))


def wilson_interval(correct: int, examples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share (95 % by default), within [0, 1]. `examples` must be positive."""
    share = correct / examples
    scale = 1 + z * z / examples
    middle = (share + z * z / (2 * examples)) / scale
    half = z * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples * examples)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def blind_accuracy(
    train_questions: Sequence[str], train_answers: Sequence[str], questions: Sequence[str], answers: Sequence[str]
) -> Accuracy:
    """What can be had without looking at the image: each question's most frequent training answer, or the most
    frequent answer of all for a question not seen. A tuned model has learnt to see only as far as it is above this."""
    by_question: dict[str, Counter[str]] = {}
    for question, answer in zip(train_questions, train_answers, strict=True):
        by_question.setdefault(question, Counter())[answer] += 1
    overall = Counter(train_answers).most_common(1)[0][0]
    guesses = [by_question[q].most_common(1)[0][0] if q in by_question else overall for q in questions]
    return accuracy([exact_match(guess, truth) for guess, truth in zip(guesses, answers, strict=True)])
