"""Checking all rows before training starts, so that nothing fails hours later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from maskft.data.collate import IGNORED, Collator
from maskft.data.images import image_size, missing_file, open_image
from maskft.data.schema import IMAGE_MARKER, require_canonical
from maskft.errors import DataError, gathered


@dataclass(frozen=True)
class Summary:
    """What a checked dataset holds: rows, image references, rows without image, tokens of the longest row."""

    examples: int
    images: int
    text_only: int
    longest: int | None


def check(
    dataset: Dataset,
    *,
    processor: Any = None,
    max_length: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Summary:
    """Check every row of a canonical dataset and return what it holds.

    Every distinct image is decoded once. With a processor every row without flaw is also encoded as in training and
    its tokens are counted, `max_length` being the limit in tokens. `progress` wraps the iteration over rows.
    Raises one DataError which lists the first ten flaws with their origin and remedy, and counts all.
    """
    require_canonical(dataset)
    if not len(dataset):
        raise DataError("The data set is empty. Give at least one example.")
    inspect = RowChecks(processor, max_length)
    flaws: list[str] = []
    count = text_only = longest = 0
    for row in dataset if progress is None else progress(dataset):
        found, length = inspect(row)
        longest = max(longest, length)
        flaws.extend(f"{row['origin']}: {flaw}" for flaw in found)
        count += len(row["images"])
        text_only += not row["images"]
    if flaws:
        raise DataError(f"The data has {len(flaws)} flaw(s) in {len(dataset)} rows:\n{gathered(flaws)}")
    return Summary(len(dataset), count, text_only, longest if processor is not None else None)


def decoded_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels of an image, all of which is decoded. Raises DataError as `open_image`."""
    return open_image(image).size


class RowChecks:
    """Tells the flaws of one row after another; remembers which images it has decoded.

    Attributes:
        collator: encodes rows as training does; None without a processor.
        max_length: limit in tokens.
        sizes: width and height in pixels of each distinct image that could be read, by `image_name`.
    """

    def __init__(self, processor: Any = None, max_length: int | None = None) -> None:
        self.collator = Collator(processor) if processor is not None else None
        self.max_length = max_length
        self.sizes: dict[str | bytes, tuple[int, int]] = {}
        self._markers = {IMAGE_MARKER, getattr(processor, "image_token", None) or IMAGE_MARKER}
        self._problems: dict[str | bytes, str] = {}

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[str], int]:
        """The flaws of a canonical row, each with its remedy, and its tokens as training sees it.

        There are 0 tokens without a processor, and for rows with flaws.
        """
        found = [*self.form(row), *self._image_flaws(row)]
        return self.length(row) if not found else (found, 0)

    def form(self, row: Mapping[str, Any]) -> list[str]:
        """The flaws that show without opening an image."""
        return [*_turn_flaws(row), *_count_flaws(row, self._markers)]

    def length(self, row: Mapping[str, Any]) -> tuple[list[str], int]:
        """What is wrong with a row's tokens, and their number."""
        if self.collator is None:
            return [], 0
        length, problem = _length(row, self.collator, self.max_length)
        return [problem] if problem else [], length

    def headers(self, row: Mapping[str, Any]) -> list[str]:
        """The flaws that show in the headers of a row's images, whose sizes are remembered."""
        return [problem for image in row["images"] if (problem := self._image_flaw(image, image_size))]

    def _image_flaws(self, row: Mapping[str, Any]) -> list[str]:
        return [problem for image in row["images"] if (problem := self._image_flaw(image))]

    def _image_flaw(
        self, image: Mapping[str, Any], look: Callable[[Mapping[str, Any]], tuple[int, int]] = decoded_size
    ) -> str | None:
        key = image_name(image)
        if key not in self.sizes and key not in self._problems:
            if image["bytes"] is None and image["path"] and not os.path.isfile(image["path"]):
                self._problems[key] = missing_file(image["path"])
            else:
                try:
                    self.sizes[key] = look(image)
                except DataError as error:
                    self._problems[key] = str(error)
        return self._problems.get(key)


def image_name(image: Mapping[str, Any]) -> str | bytes:
    """What tells the images of a data set apart without opening files: the path, or the SHA-256 of the content."""
    content: bytes | None = image["bytes"]
    return str(image["path"]) if content is None else hashlib.sha256(content).digest()


def _turn_flaws(row: Mapping[str, Any]) -> Iterator[str]:
    messages = row["messages"]
    if not messages:
        yield "has no messages. Add a user and an assistant turn, or remove the row."
        return
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        yield "has a system turn only. Add a user and an assistant turn, or remove the row."
        return
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            place = "the first turn" if number == 0 else f"turn {number + 1}"
            yield (
                f"{place} is by {message['role']}, but {expected} is expected: turns alternate, user first, after at "
                "most one system turn. Reorder, join or remove turns."
            )
            return
    if turns[-1]["role"] != "assistant":
        yield "the last turn is not the assistant's, so there is nothing to learn. Add the answer or drop the question."
    for number, message in enumerate(turns, start=1):
        kind = "answer" if message["role"] == "assistant" else "question"
        if not any(part["type"] == "image" or (part["text"] or "").strip() for part in message["content"]):
            effect = ", all its labels would be masked" if kind == "answer" else ""
            yield f"turn {number}, the {kind} by {message['role']}, is empty{effect}. Fill it in or remove the row."


def _count_flaws(row: Mapping[str, Any], markers: set[str]) -> Iterator[str]:
    given, marked = len(row["images"]), 0
    for message in row["messages"]:
        for part in message["content"]:
            if part["type"] == "image":
                marked += 1
                if message["role"] != "user":
                    yield f"an image stands in a turn by {message['role']}. Move it to a user turn."
            for marker in sorted(markers):
                if marker in (part["text"] or ""):
                    yield (
                        f"the image token '{marker}' stands in a text part of the turn by {message['role']}, where "
                        "it marks no image. Remove it, or use an image part."
                    )
    if given and not marked:
        yield f"has {given} image(s) but no {IMAGE_MARKER} token. Put {IMAGE_MARKER} into a user turn."
    elif marked and not given:
        yield f"has {marked} {IMAGE_MARKER} token(s) but no image. Name the image file or remove the token."
    elif given != marked:
        yield f"has {given} image(s) but {marked} {IMAGE_MARKER} token(s). Make the numbers equal."


def _length(row: Mapping[str, Any], collator: Collator, max_length: int | None) -> tuple[int, str | None]:
    """Return the tokens of a row as training sees it and, if it does not fit, what is lost and the remedy."""
    try:
        batch = collator([row])
    except DataError as error:
        return 0, str(error).removeprefix(f"{row['origin']}: ")
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    length = len(ids)
    if not bool((labels != IGNORED).any()):
        return length, "no token of it is an answer, all labels would be masked. Check the chat template's markers."
    if max_length is None or length <= max_length:
        return length, None
    lost = []
    image_id = getattr(collator.processor, "image_token_id", None)
    if image_id is not None and bool((ids[max_length:] == image_id).any()):
        lost.append("image tokens would be cut off")
    if not bool((labels[:max_length] != IGNORED).any()):
        lost.append("all answer labels would be cut off")
    what = f": {' and '.join(lost)}" if lost else ""
    return length, (
        f"has {length} tokens, but max_length is {max_length}{what}. Set max_length to at least {length}, "
        "or shorten or remove the row."
    )
