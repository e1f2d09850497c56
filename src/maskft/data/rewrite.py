"""Writing some of a data file's rows into a file of the same format, values untouched."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk

from maskft.data.formats import Record

_BATCH = 100
Keep = Callable[[Record], None]


@contextlib.contextmanager
def rewritten(source: Path, out: Path) -> Iterator[Keep]:
    """Give a function that takes the records of `source` that are to be in `out`, in order.

    Args:
        source: a data file, or a folder of `Dataset.save_to_disk`.
        out: a new path of the same kind, complete when the block ends.
    """
    if source.is_dir():
        writer = _saved(source, out)
    else:
        writer = {".json": _json, ".jsonl": _lines, ".parquet": _parquet}[source.suffix.lower()](source, out)
    with writer as keep:
        yield keep


@contextlib.contextmanager
def _json(source: Path, out: Path) -> Iterator[Keep]:
    with out.open("w", encoding="utf-8") as file:
        separator = "[\n"

        def keep(record: Record) -> None:
            nonlocal separator
            file.write(separator + as_json(record.raw))
            separator = ",\n"

        yield keep
        file.write("[]\n" if separator == "[\n" else "\n]\n")


@contextlib.contextmanager
def _lines(source: Path, out: Path) -> Iterator[Keep]:
    with out.open("w", encoding="utf-8") as file:
        yield lambda record: print(as_json(record.raw), file=file)


@contextlib.contextmanager
def _parquet(source: Path, out: Path) -> Iterator[Keep]:
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow
    waiting: list[Any] = []
    with pq.ParquetWriter(out, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        def keep(record: Record) -> None:
            waiting.append(record.raw)
            if len(waiting) == _BATCH:
                flush()

        yield keep
        flush()


@contextlib.contextmanager
def _saved(source: Path, out: Path) -> Iterator[Keep]:
    kept = array("Q")

    def keep(record: Record) -> None:
        kept.append(int(record.place.rpartition(" ")[2]))

    yield keep
    load_from_disk(str(source)).select(kept).save_to_disk(str(out))


def as_json(value: Any) -> str:
    """JSON on one line; with escapes where it holds half of a surrogate pair, which UTF-8 has no place for."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
