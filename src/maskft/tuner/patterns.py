"""Regular expressions from strangers: Python's can take longer than anyone waits on a name of fifty characters."""

from __future__ import annotations

import re

MAX_LENGTH = 1000
MAX_REPEATS = 4
"""Unbounded ones in a pattern: the time to match grows with the length of a name to this power at most."""
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def flaw_of(pattern: str) -> str | None:
    """Why a pattern is not matched against names of modules, or None.

    Besides what is no regular expression, these are long patterns, those with more than MAX_REPEATS repeats, and
    repeats of what holds a repeat or a choice, such as (a+)+, whose time doubles with every character.
    """
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters; {MAX_LENGTH} are allowed"
    if (flaw := _repeats(pattern)) is not None:
        return flaw
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return None


def _repeats(pattern: str) -> str | None:
    count, at = 0, 0
    open_groups = [False]  # for each, whether it holds a repeat or a choice
    while at < len(pattern):
        char = pattern[at]
        closed = False
        if char == "\\":
            at += 2
        elif char == "[":
            at = _behind_set(pattern, at)
        else:
            at += 1
        if char == "(":
            open_groups.append(False)
        elif char == "|":
            open_groups[-1] = True
        elif char == ")" and len(open_groups) > 1:
            closed = open_groups.pop()
            open_groups[-1] = open_groups[-1] or closed
        repeat = _REPEAT.match(pattern, at)
        if repeat is None or char in "(|":
            continue
        if closed:
            return "repeats a group that holds a repeat or a choice, which can take for ever to match"
        open_groups[-1] = True
        count += 1
        at = repeat.end()
        if count > MAX_REPEATS:
            return f"has more than {MAX_REPEATS} repeats (*, + or {{...}})"
    return None


def _behind_set(pattern: str, at: int) -> int:
    """The place behind a set of characters that starts at `at`."""
    at += 1
    if pattern[at : at + 1] == "^":
        at += 1
    first = at
    while at < len(pattern) and (pattern[at] != "]" or at == first):
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
