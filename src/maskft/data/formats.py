"""Reading data files into the canonical form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from maskft.data.rows import ImageRoot, llava_row, messages_row, require_text
from maskft.data.schema import to_dataset
from maskft.errors import DataError, did_you_mean, gathered

Format = Literal["auto", "llava", "messages"]
SUFFIXES = (".json", ".jsonl", ".parquet")
_KEYS = {"llava": "conversations", "messages": "messages"}
_CONVERTERS = {"llava": llava_row, "messages": messages_row}
_BATCH = 1000


class _Record(NamedTuple):
    """A row as it stands in the file, or what is wrong with it, and where it stands."""

    place: str
    row: Any
    problem: str | None = None


def read(path: Path, *, format: Format = "auto", image_root: Path | None = None) -> Dataset:
    """Read LLaVA rows or messages-and-images rows into a canonical dataset.

    The container follows from the suffix: `.json` (a list), `.jsonl` (an object per line), `.parquet`, or a folder
    written by `Dataset.save_to_disk`. With `format="auto"` the keys of the first row decide what the rows are:
    "conversations" means llava, "messages" means messages. Image paths are relative to `image_root` (default: the
    folder which holds `path`) and must stay below it; image files are not opened here.

    Raises DataError for a missing, unreadable or empty file, and one that lists up to ten bad rows. Items of a list
    and rows of a table are counted from 0, lines from 1.
    """
    path = Path(path)
    if format not in ("auto", *_CONVERTERS):
        raise DataError(
            f"format is {format!r}, but must be auto, llava or messages.{did_you_mean(format, _CONVERTERS)}"
        )
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the path of the data file.")
    root = Path(image_root) if image_root is not None else path.resolve().parent
    if not root.is_dir():
        raise DataError(f"image_root {root} is not a folder. Give the folder to which the image paths are relative.")
    if path.is_dir():
        records = _saved(path)
    elif path.suffix.lower() in SUFFIXES:
        records = {".json": _json, ".jsonl": _lines, ".parquet": _parquet}[path.suffix.lower()](path)
    else:
        raise DataError(
            f"{path} ends in '{path.suffix}', but must end in {', '.join(SUFFIXES)} or be a folder written by "
            f"Dataset.save_to_disk.{did_you_mean(path.suffix, SUFFIXES)}"
        )
    problems: list[str] = []
    try:
        dataset = to_dataset(_convert(path, records, format, ImageRoot(root), problems))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}). Check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if problems:
        counted = "lines are counted from 1" if path.suffix.lower() == ".jsonl" else "items and rows from 0"
        raise DataError(f"{path}: {len(problems)} bad row(s) ({counted}):\n{gathered(problems)}")
    if not len(dataset):
        raise DataError(f"{path} holds no rows. Give a file with at least one example.")
    return dataset


def _convert(
    path: Path, records: Iterator[_Record], format: Format, root: ImageRoot, problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield canonical rows and collect in `problems` what is wrong with the others."""
    chosen: str | None = None if format == "auto" else format
    for number, (place, row, problem) in enumerate(records):
        if problem is None and not isinstance(row, dict):
            problem = f"is a {type(row).__name__}, but an object is needed."
        if problem is not None:
            problems.append(f"{path.name} {place}: {problem}")
            continue
        if chosen is None:
            chosen = _detect(path, place, row)
        try:
            name = row.get("id")
            if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
                raise DataError(f"'id' is a {type(name).__name__}, but must be a string or an integer.")
            require_text(str(name), "'id'")
            converted = _CONVERTERS[chosen](row, root)
        except DataError as error:
            problems.append(f"{path.name} {place}: {error}")
            continue
        converted["id"] = str(number if name is None else name)
        converted["origin"] = f"{path.name} {place}"
        yield converted


def _detect(path: Path, place: str, row: dict[str, Any]) -> str:
    found = [name for name, key in _KEYS.items() if key in row]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path.name} {place}: has both {list(_KEYS.values())}. Choose with format=llava or messages.")
    hint = "".join(did_you_mean(str(key), _KEYS.values()) for key in row)
    raise DataError(
        f"{path.name} {place}: has the keys {sorted(row)}, but 'conversations' (LLaVA) or 'messages' is needed.{hint}"
    )


def _json(path: Path) -> Iterator[_Record]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        remedy = "Name a file with an object per line .jsonl." if "Extra data" in str(error) else "Repair the file."
        raise DataError(f"{path} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(rows, list):
        keys = f" with the keys {sorted(rows)[:10]}" if isinstance(rows, dict) else ""
        raise DataError(f"{path} holds a {type(rows).__name__}{keys}, but a list of rows is needed.")
    for number, row in enumerate(rows):
        yield _Record(f"item {number}", row)


def _lines(path: Path) -> Iterator[_Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _Record(f"line {number}", json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                hint = " Name a file that holds one list .json." if line.lstrip().startswith("[") else ""
                yield _Record(f"line {number}", None, f"is not valid JSON ({error}).{hint}")


def _parquet(path: Path) -> Iterator[_Record]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=_BATCH))
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}). Write it again.") from error


def _saved(path: Path) -> Iterator[_Record]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataError(f"{path} holds a DatasetDict with the splits {splits}. Give the folder of one split.")
    if not (path / "state.json").is_file():
        raise DataError(f"{path} is a folder without state.json. Give a data file or a folder of Dataset.save_to_disk.")
    try:
        dataset = load_from_disk(str(path)).with_format("arrow")
    except Exception as error:  # datasets raises many kinds on damaged folders
        raise DataError(f"{path} cannot be loaded as a saved dataset ({error}). Save it again.") from error
    yield from _table_rows(dataset.iter(batch_size=_BATCH))


def _table_rows(tables: Any) -> Iterator[_Record]:
    number = 0
    for table in tables:
        for row in table.to_pylist():
            yield _Record(f"row {number}", row)
            number += 1
