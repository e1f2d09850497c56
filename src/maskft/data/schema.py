"""The one form in which all data travels through the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from maskft.errors import DataError

IMAGE_MARKER = "<image>"
ROLES = ("system", "user", "assistant")

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List({"path": Value("string"), "bytes": Value("binary")}),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "answers": List(Value("string")),
        "origin": Value("string"),
    }
)
"""`answers` holds right answers to the last question for evaluation, where there are more than the assistant's; else
it is null. Nothing is learnt from them."""
COLUMNS = tuple(FEATURES)


def image_part() -> dict[str, Any]:
    """Return the content part which stands where an image goes."""
    return {"type": "image", "text": None}


def text_part(text: str) -> dict[str, Any]:
    """Return a content part of text."""
    return {"type": "text", "text": text}


def turn(role: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one message."""
    return {"role": role, "content": parts}


def text_of(message: Mapping[str, Any]) -> str:
    """What a turn says, without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def to_dataset(rows: Iterable[Mapping[str, Any]], *, chunk: int = 10_000) -> Dataset:
    """Build a canonical dataset from canonical rows, `chunk` rows at a time so that memory stays small."""
    schema = FEATURES.arrow_schema
    tables = []
    iterator = iter(rows)
    while block := list(islice(iterator, chunk)):
        tables.append(pa.Table.from_pylist(block, schema=schema))
    return Dataset(pa.concat_tables(tables) if tables else schema.empty_table())


def require_canonical(dataset: Dataset) -> None:
    """Raise DataError unless the dataset has exactly the canonical columns."""
    given = list(dataset.column_names)
    if set(given) != set(COLUMNS):
        raise DataError(
            f"The dataset has the columns {given}, but {list(COLUMNS)} are needed. Read it with maskft.data.read()."
        )
