"""What an answer to an MMMU question says, read as MMMU's eval_utils reads it. `mmmu` has the rule in words.

Every text is read in time linear in its length, and none raises an error: what float() takes as a number (also "nan",
"inf", "1_000" and digits of other scripts) is one, and everything else stays a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# Numbers with thousands commas, in scientific notation, and plain. A match never starts within a run of digits, which
# the look-behind says outright, so that a long run is not tried from each of its digits.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d)(?![,\d])"),
)


def choice(text: str, letters: Sequence[str], options: Mapping[str, str]) -> str | None:
    """The letter that `text` chooses, None if it chooses none.

    Args:
        text: the model's answer.
        letters: of the choices, such as A, B, C, D.
        options: letter -> text of the choice.
    """
    for mark in _MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for pattern in ("({})", " {} "):
        marks = {letter: pattern.format(letter) for letter in letters}
        if any(mark in text for mark in marks.values()):
            return _last(text, marks)
    lower = text.lower()
    contents = {letter: content.lower() for letter, content in options.items()}
    if len(text.split()) > 5 and any(content in lower for content in contents.values()):
        return _last(lower, contents)
    return None


def _last(text: str, marks: Mapping[str, str]) -> str:
    """The key whose mark starts last in `text`; of several that start at one place, the first."""
    return max(marks, key=lambda key: text.rfind(marks[key]))


def matches(text: str, truths: Sequence[str]) -> bool:
    """Whether an open answer says one of `truths`: an equal number, or a text that holds the truth's."""
    expected = [value for truth in truths for value in normal(truth)]
    numbers = [value for value in expected if isinstance(value, float)]
    texts = [value for value in expected if isinstance(value, str)]
    for said in statements(text):
        if isinstance(said, str):
            if any(expectation in said for expectation in texts):
                return True
        elif any(said == number for number in numbers):
            return True
    return False


def statements(text: str) -> list[str | float]:
    """What an open answer may mean: the tails that likely hold the answer, and each number in them, normalised."""
    tails = _tails(text.strip().strip(".").lower())
    found = [number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail)]
    return [value for raw in (*tails, *found) for value in normal(raw)]


def _tails(text: str) -> list[str]:
    """Of each line the shortest tail after an indicator word; the whole text if no line has one that says anything."""
    lines = text.split("\n")
    tails = []
    for number, line in enumerate(lines, start=1):
        best = ""
        for indicator in (*_INDICATORS, "=") if number == len(lines) else _INDICATORS:
            if indicator in line:
                tail = line.rpartition(indicator)[2].strip()
                if not best or len(tail) < len(best):  # so a tail that is empty gives way to the next
                    best = tail
        if best and best not in _MARKS:
            tails.append(best)
    return tails or [text]


def normal(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the lower-cased text; a single character only next to a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
