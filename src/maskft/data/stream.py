"""Reading long files of JSON a row at a time, in memory that does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 20
"""Characters read at a time."""
LONGEST = 1 << 26
"""Characters that one row may have."""
_EDGE = 16
"""A value that is cut at the end of what was read is noticed within so many characters of it."""
_DECODER = json.JSONDecoder()


class NotAListError(ValueError):
    """The file's JSON is no list."""


class JsonError(ValueError):
    """The file is not valid JSON; the message says where."""


def items(file: TextIO) -> Iterator[Any]:
    """Yield the items of a file that holds one JSON list.

    Raises NotAListError before the first item, and JsonError where the text is not JSON, nested too deeply for Python's
    decoder, or an item is longer than LONGEST.
    """
    text = _Window(file)
    if text.next() != "[":
        raise NotAListError
    text.skip()
    if text.next() == "]":
        text.skip()
    else:
        while True:
            text.next()
            yield text.value()
            mark = text.next()
            if mark not in (",", "]"):
                raise text.error("Expecting ',' delimiter", text.at)
            text.skip()
            if mark == "]":
                break
    if text.next():
        raise text.error("Extra data", text.at)


def lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, with their numbers, counted from 1.

    Raises JsonError for a line longer than LONGEST.
    """
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise JsonError(f"line {number} is longer than {LONGEST} characters")
        if line.strip():
            yield number, line


class _Window:
    """The part of a file that is in memory.

    Attributes:
        at: place in it of the next character.
    """

    def __init__(self, file: TextIO) -> None:
        self.at = 0
        self._file = file
        self._text = ""
        self._ended = False
        self._line, self._column = 1, 1  # of the window's first character

    def next(self) -> str:
        """The next character that is no white space, which `at` is moved to; empty at the end."""
        while True:
            while self.at < len(self._text):
                if self._text[self.at] not in " \t\n\r":
                    return self._text[self.at]
                self.at += 1
            if not self._more():
                return ""

    def skip(self) -> None:
        """Pass over one character."""
        self.at += 1

    def value(self) -> Any:
        """The JSON value that starts here; `at` is moved behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _EDGE or error.msg.startswith("Unterminated string")
                if not cut or self._ended:
                    raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.error("nested too deeply", self.at) from error
            except ValueError as error:  # an integer of thousands of digits
                raise self.error(str(error), self.at) from error
            else:
                number = isinstance(value, int | float)  # at the edge it may go on: 1 of 1.5, of 1e5, of 1e-5
                if self._ended or len(self._text) - end > (2 if number else 0):
                    self.at = end
                    return value
            if len(self._text) - self.at > LONGEST:
                raise self.error(f"an item is longer than {LONGEST} characters", self.at)
            self._more()

    def error(self, what: str, at: int) -> JsonError:
        """An error at a place of the window."""
        line, column = self._place(at)
        return JsonError(f"{what}: line {line} column {column}")

    def _place(self, at: int) -> tuple[int, int]:
        newline = self._text.rfind("\n", 0, at)
        column = at - newline if newline >= 0 else self._column + at
        return self._line + self._text.count("\n", 0, at), column

    def _more(self) -> bool:
        """Drop what has been passed and read on, as much again as is left; False at the end of the file."""
        self._line, self._column = self._place(self.at)
        left = self._text[self.at :]
        read = self._file.read(max(CHUNK, len(left)))
        self._text, self.at = left + read, 0
        self._ended = not read
        return not self._ended
