"""A survey of a data file: every flaw of every row, and what the file holds, in memory that hardly grows with it.

The checks are those that run before each training. What costs most there is opening images and encoding them. With a
limit on images, the rows after it are told from headers and text: their files must be there and readable as images,
and their tokens are computed from text and image sizes, as far as that agreed with the processor on the rows before.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple

from maskft.data.checks import RowChecks, image_name
from maskft.data.formats import Record
from maskft.data.images import image_key
from maskft.data.lengths import Arithmetic

LLAVA_ROWS = 665_000
"""Rows of LLaVA-1.5's training mix, for an idea of how long a file of that size takes."""
_CHUNK = 64
"""Rows that a process is given at a time."""

MakeChecks = Callable[[], RowChecks]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class Flaw(NamedTuple):
    """A flaw of a row: its place in the file, such as "item 3", and what is wrong, with the remedy."""

    place: str
    text: str


@dataclass
class Survey:
    """What a data file holds.

    Attributes:
        rows: all of them, good and bad.
        flawed: rows with a flaw.
        images: references to images in rows that could be read.
        text_only: such rows without image.
        decoded: distinct images that were decoded.
        lengths: tokens of the rows that could be encoded.
        widths, heights: in pixels, of each distinct image.
        over: rows longer than max_length.
        cut: tokens in them beyond it.
        flaws: every one.
        contents: hashes of the decoded files, 64 bits of SHA-256, to find images that two files share.
        seconds: how long it took.
    """

    rows: int = 0
    flawed: int = 0
    images: int = 0
    text_only: int = 0
    decoded: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))
    widths: array[int] = field(default_factory=lambda: array("I"))
    heights: array[int] = field(default_factory=lambda: array("I"))
    over: int = 0
    cut: int = 0
    flaws: list[Flaw] = field(default_factory=list)
    contents: set[int] = field(default_factory=set)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "rows": self.rows,
            "flawed_rows": self.flawed,
            "images": self.images,
            "distinct_images": len(self.widths),
            "decoded_images": self.decoded,
            "text_only": self.text_only,
            "tokens": spread(self.lengths),
            "width": spread(self.widths),
            "height": spread(self.heights),
            "rows_over_max_length": self.over,
            "tokens_over_max_length": self.cut,
            "seconds": round(self.seconds, 1),
            "seconds_for_665000_rows": round(self.seconds / self.rows * LLAVA_ROWS) if self.rows else None,
            "flaws": [flaw._asdict() for flaw in self.flaws],
        }


def spread(values: Sequence[int]) -> dict[str, int] | None:
    """Smallest, median, 99th percentile and largest; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "median": ordered[last // 2],
        "p99": ordered[round(0.99 * last)],
        "max": ordered[last],
    }


def survey(
    records: Iterable[Record],
    make_checks: MakeChecks,
    *,
    images: int | None = None,
    workers: int = 1,
    keep: Callable[[Record], None] = lambda record: None,
    progress: Progress = lambda items: items,
) -> Survey:
    """Look at every row.

    Args:
        records: as `scan` yields them.
        make_checks: gives the checks to each process; it must be importable from there where `workers` is above 1.
        images: decode so many distinct images at most; None decodes all.
        workers: processes; 1 is this one alone.
        keep: called with each row that has no flaw, in order.
        progress: wraps the iteration over rows.
    """
    started = time.monotonic()
    found = Survey()
    names: set[int] = set()
    max_length: int | None = None
    for record, seen in _looked_at(progress(records), make_checks, images, workers):
        found.rows += 1
        found.flawed += bool(seen.flaws)
        found.flaws.extend(Flaw(record.place, text) for text in seen.flaws)
        if record.row is not None:
            found.images += len(record.row["images"])
            found.text_only += not record.row["images"]
        if seen.length:
            found.lengths.append(seen.length)
            max_length = seen.max_length
            if max_length is not None and seen.length > max_length:
                found.over += 1
                found.cut += seen.length - max_length
        for image in seen.images:
            if image.name not in names:
                names.add(image.name)
                found.widths.append(image.width)
                found.heights.append(image.height)
                if image.content is not None:
                    found.decoded += 1
                    found.contents.add(image.content)
        if not seen.flaws:
            keep(record)
    found.seconds = time.monotonic() - started
    return found


class _Image(NamedTuple):
    """A distinct image: hash of its name, size, and hash of its content where it was decoded."""

    name: int
    width: int
    height: int
    content: int | None


class _Seen(NamedTuple):
    """What was found in a row."""

    flaws: list[str]
    length: int = 0
    max_length: int | None = None
    images: tuple[_Image, ...] = ()


class _Inspector:
    """The checks of one process, with its share of the images that may be decoded."""

    def __init__(self, checks: RowChecks, images: int | None) -> None:
        self._checks = checks
        self._left = images
        self._known: set[int] = set()
        self._arithmetic = Arithmetic(checks.collator) if images is not None and checks.collator is not None else None

    def __call__(self, records: Sequence[Record]) -> list[_Seen]:
        return [self._look(record) for record in records]

    def _look(self, record: Record) -> _Seen:
        row = record.row
        if row is None:
            return _Seen([str(record.problem)])
        decoding = self._left is None or self._left > 0
        flaws, length = self._checks(row) if decoding else self._glance(row)
        sizes = self._checks.sizes
        if decoding and not flaws and self._arithmetic is not None:
            self._arithmetic.compare(row, [sizes[image_name(image)] for image in row["images"]], length)
        images = []
        for image in row["images"]:
            name = image_name(image)
            if name in sizes and _short(name) not in self._known:
                self._known.add(_short(name))
                content = int(image_key(image)[:16], 16) if decoding else None
                images.append(_Image(_short(name), *sizes[name], content))
        if self._left is not None:
            self._left -= len(images)
        return _Seen(flaws, length, self._checks.max_length, tuple(images))

    def _glance(self, row: dict[str, Any]) -> tuple[list[str], int]:
        """Flaws and tokens of a row, without decoding where arithmetic can tell the tokens."""
        flaws = [*self._checks.form(row), *self._checks.headers(row)]
        if flaws or self._arithmetic is None:
            return flaws, 0
        length = self._arithmetic.length(row, [self._checks.sizes[image_name(image)] for image in row["images"]])
        limit = self._checks.max_length
        if length is None or (limit is not None and length > limit):
            return self._checks.length(row)
        return [], length


def _short(name: str | bytes) -> int:
    """64 bits of a hash."""
    content = name.encode() if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _looked_at(
    records: Iterable[Record], make_checks: MakeChecks, images: int | None, workers: int
) -> Iterator[tuple[Record, _Seen]]:
    """Each record with what was found in it, in order."""
    if workers == 1:
        inspect = _Inspector(make_checks(), images)
        for record in records:
            yield record, inspect([record])[0]
        return
    make_checks()  # what is wrong with the base shows here, in words
    share = None if images is None else -(-images // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (make_checks, share))
    waiting: deque[tuple[list[Record], Future[list[_Seen]]]] = deque()

    def oldest() -> Iterator[tuple[Record, _Seen]]:
        chunk, future = waiting.popleft()
        yield from zip(chunk, future.result(), strict=True)

    rows = iter(records)
    with pool:
        while chunk := list(islice(rows, _CHUNK)):
            waiting.append((chunk, pool.submit(_inspect, chunk)))
            if len(waiting) > 2 * workers:
                yield from oldest()
        while waiting:
            yield from oldest()


_inspector: _Inspector | None = None
"""Of a worker process."""


def _start(make_checks: MakeChecks, images: int | None) -> None:
    """Make a worker process ready."""
    import torch

    global _inspector
    torch.set_num_threads(1)
    _inspector = _Inspector(make_checks(), images)


def _inspect(records: list[Record]) -> list[_Seen]:
    assert _inspector is not None
    return _inspector([record._replace(raw=None) for record in records])
