r"""Answers made comparable as VQA's scorer does: the text rule of TextVQA.

The rule is that of EvalAIAnswerProcessor (MMF's m4c_evaluators.py, which LLaVA's eval_textvqa.py uses), with what is
odd in it. In this order:

1. Lower case; every "," and "?" dropped; "'s" becomes " 's", a word of its own; line feeds and tabs become spaces;
   white space at both ends dropped.
2. Each of the marks ; / [ ] " { } ( ) = + \ _ - > < @ ` ! is dropped everywhere if any of its kind stands next to a
   space, else each becomes a space. (The official code also drops all marks of a text with a comma between digits,
   but no comma is left from step 1.)
3. A full stop is dropped unless a digit follows, but only the first 32 such: the official call hands `re.UNICODE`,
   which is 32, over as the number of replacements. Other marks, such as : & $ % ', stay.
4. Split at white space. "none", "zero", "one", ... "ten" become digits, then "a", "an" and "the" are dropped, then a
   word of `CONTRACTIONS` gets its apostrophes. Joined by single spaces.
"""

from __future__ import annotations

import re

_SUFFIXES = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "I could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "I he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'m": "I",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}


def _contractions() -> dict[str, str]:
    """Each contraction under its spellings that lack one apostrophe, and three entries that do not fit that form."""
    full = [stem + suffix for suffix, stems in _SUFFIXES.items() for stem in stems.split()]
    table = {word[:i] + word[i + 1 :]: word for word in full for i, letter in enumerate(word) if letter == "'"}
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
"""The 120 official entries. "somebody'd" loses its apostrophe. Some never match: the four with a capital I (words are
lower case by then) and those with "'s" (split off in step 1), so "that's" becomes "that 's" but "thats" "that's"."""

_MARKS = frozenset(';/[]"{}()=+\\_-><@`!')
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_DROPPED = 32
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})


def normalise(text: str) -> str:
    """The text by the module's rule; two answers agree if and only if these are equal. Takes any text."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    if marks := _MARKS.intersection(text):
        beside_space = {mark for mark in marks if f"{mark} " in text or f" {mark}" in text}
        text = text.translate({ord(mark): "" if mark in beside_space else " " for mark in marks})
    text = _FULL_STOP.sub("", text, count=_FULL_STOPS_DROPPED)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
