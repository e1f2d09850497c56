"""Tokens of a row from its text and the sizes of its images, without opening them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from maskft.data.collate import Collator
from maskft.data.schema import image_part, text_part, turn

Size = tuple[int, int]


class Arithmetic:
    """The length of a row as the length of its text, an image counting as one token, plus what each image adds.

    What an image of a size adds is measured once, on a blank one. Whether the sum is what training sees depends on
    the processor, so `compare` is to be called with rows whose length is known; after one that differs, or without
    any with an image, `length` knows nothing.
    """

    def __init__(self, collator: Collator) -> None:
        self._collator = collator
        self._added: dict[Size, int] = {}
        self._agreed = 0
        self._differs = False

    def compare(self, row: Mapping[str, Any], sizes: Sequence[Size], length: int) -> None:
        """Take note of the known length of a row whose images have these sizes, (width, height) in pixels."""
        if sizes and not self._differs and self._agreed < 64:
            self._differs = self._sum(row, sizes) != length
            self._agreed += 1

    def length(self, row: Mapping[str, Any], sizes: Sequence[Size]) -> int | None:
        """Tokens of a row, or None where that can't be told."""
        return None if self._differs or not self._agreed else self._sum(row, sizes)

    def _sum(self, row: Mapping[str, Any], sizes: Sequence[Size]) -> int | None:
        try:
            return self._collator.text_length(row["messages"]) + sum(self._of(size) for size in sizes)
        except Exception:  # processors that take no text without its images raise many kinds
            return None

    def _of(self, size: Size) -> int:
        """What an image of this size adds to the length."""
        if size not in self._added:
            messages = [turn("user", [image_part(), text_part("Q?")]), turn("assistant", [text_part("A.")])]
            whole = self._collator.length_with(messages, [Image.new("RGB", size)])
            self._added[size] = whole - self._collator.text_length(messages)
        return self._added[size]
