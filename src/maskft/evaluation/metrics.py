"""Scores of single answers in [0, 1], and their mean with its uncertainty. Pure functions.

A metric is called with the answer and one or more references. `METRICS` holds them by the name a recipe gives.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from maskft.evaluation.benchmarks.vqa_text import normalise as vqa_text
from maskft.evaluation.resampling import bootstrap_interval

Metric = Callable[[str, Sequence[str]], float]
ANLS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Accuracy:
    """Mean score in [0, 1] with its 95 % intervals.

    Attributes:
        accuracy: the mean over examples.
        low, high: examples taken as independent. Wilson's interval where every score is 0 or 1, else a bootstrap's.
        correct: examples with the full score.
        examples: how many there are.
        by_image_low, by_image_high: bootstrap of images with all their questions; None where images aren't known.
    """

    accuracy: float
    low: float
    high: float
    correct: int
    examples: int
    by_image_low: float | None = None
    by_image_high: float | None = None


def accuracy(scores: Sequence[float], groups: Sequence[str] | None = None) -> Accuracy:
    """Mean of scores in [0, 1] with its intervals.

    Args:
        scores: one an example, at least one.
        groups: names the image of each example.
    """
    count, full = len(scores), sum(score == 1 for score in scores)
    if full + sum(score == 0 for score in scores) == count:
        low, high = wilson_interval(full, count)
    else:
        low, high = bootstrap_interval([scores])
    by_image = (None, None) if groups is None else bootstrap_interval([scores], groups)
    return Accuracy(math.fsum(scores) / count, low, high, full, count, *by_image)


def wilson_interval(correct: int, examples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share (95 % by default), within [0, 1]. `examples` must be positive."""
    share = correct / examples
    scale = 1 + z * z / examples
    middle = (share + z * z / (2 * examples)) / scale
    half = z * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples * examples)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def blind_guesses(train_questions: Sequence[str], train_answers: Sequence[str], questions: Sequence[str]) -> list[str]:
    """What can be said without looking at the image: each question's most frequent training answer, or the most
    frequent answer of all for a question not seen. A tuned model has learnt to see only as far as it is above this."""
    by_question: dict[str, Counter[str]] = {}
    for question, answer in zip(train_questions, train_answers, strict=True):
        by_question.setdefault(question, Counter())[answer] += 1
    overall = Counter(train_answers).most_common(1)[0][0]
    return [by_question[q].most_common(1)[0][0] if q in by_question else overall for q in questions]


def answer_type(truth: str) -> Literal["yes/no", "number", "other"]:
    """The type of an answer, of those that VQA v2 tells apart: what is learnt of one need not be learnt of another."""
    plain = _plain(truth)
    if plain in ("yes", "no"):
        return "yes/no"
    return "number" if plain.isdecimal() else "other"


def exact_match(answer: str, truth: str) -> bool:
    """Whether the two agree but for case, surrounding space and a final full stop."""
    return _plain(answer) == _plain(truth)


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer matches any reference exactly but for case, surrounding space and a final full stop."""
    return float(any(exact_match(answer, reference) for reference in references))


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: agreement with people who were asked the same, after VQA's text normalisation.

    Each of the n references is left out in turn; the answer scores min(1, m / 3), m being its matches among the
    others; the mean of that counts. With ten references this is TextVQA's official rule: 0, 0.3, 0.6, 0.9 and 1 for 0,
    1, 2, 3, and 4 or more matches. With fewer than four, 3 gives way to n - 1, so that full agreement is always 1;
    with a single one what is left is an exact match of normalised texts.
    """
    said, people = vqa_text(answer), [vqa_text(reference) for reference in references]
    if len(people) < 2:
        return float(said in people)
    matches, enough = people.count(said), min(3, len(people) - 1)
    # Summed one by one, as the official scorer does: the last digit depends on the order.
    return sum(min(1.0, (matches - (person == said)) / enough) for person in people) / len(people)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity: 1 - edits / length of the longer text, 0 below one half.

    The best reference counts; case and the amount of space don't. The rule of DocVQA's official scorer.
    """
    return max((_similarity(answer, reference) for reference in references), default=0.0)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words that answer and reference share, as SQuAD counts them: lower case, no punctuation, no articles.

    The best reference counts. Where a text has no word left, 1 if neither has, else 0.
    """
    return max((_f1(_words(answer), _words(reference)) for reference in references), default=0.0)


def choice(answer: str, references: Sequence[str]) -> float:
    """1 if answer and any reference name the same option letter, as `option_letter` reads it."""
    letter = option_letter(answer)
    return float(letter is not None and any(option_letter(reference) == letter for reference in references))


METRICS: dict[str, Metric] = {"exact": exact, "vqa": vqa, "anls": anls, "f1": token_f1, "choice": choice}
METRIC_TITLES = {
    "exact": "exact match",
    "vqa": "VQA accuracy",
    "anls": "ANLS",
    "f1": "token F1",
    "choice": "choice accuracy",
}

_LETTER_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LETTER_FIRST = re.compile(r"[\W_]*([A-Za-z])[*_]*[.):](?![A-Za-z])")
_NAMED = r"(?i:\b(?:answer|option|choice)\b(?:\s+is\b)?)[\s:(\[*\"']*"
_LETTER_NAMED = re.compile(_NAMED + r"([A-Z])\b(?!['\u2019])")
_SMALL_LETTER_NAMED = re.compile(_NAMED + r"([a-z])[\W_]*$")


def option_letter(text: str) -> str | None:
    """The option that a text chooses, "A" to "Z", or None.

    Read in this order, the first that fits:
    1. one letter is all there is but for punctuation: "B", "(b)", "**B.**";
    2. the text starts with a letter and ".", ")" or ":" behind it: "B. A red car", "(b) red";
    3. a capital after "answer", "option" or "choice", with or without "is": "The answer is (B), because"; or a small
       letter there at the very end. None if these name different letters.
    A bare word is no letter: "A red car" chooses nothing.
    """
    if found := _LETTER_ALONE.fullmatch(text) or _LETTER_FIRST.match(text):
        return found[1].upper()
    named = {*_LETTER_NAMED.findall(text), *(letter.upper() for letter in _SMALL_LETTER_NAMED.findall(text))}
    return named.pop() if len(named) == 1 else None


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            replaced = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def _similarity(a: str, b: str) -> float:
    length = max(len(a.upper()), len(b.upper()))  # the official scorer measures the raw texts, in upper case
    if length == 0:
        return 1.0
    a, b = (" ".join(text.lower().split()) for text in (a, b))
    if 1 - abs(len(a) - len(b)) / length < ANLS_THRESHOLD:  # at least so many edits, without counting them
        return 0.0
    similarity = 1 - levenshtein(a, b) / length
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    shared = (Counter(answer) & Counter(truth)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(answer), shared / len(truth)
    return 2 * precision * recall / (precision + recall)
