"""Reading data files into the canonical form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from maskft.data.rows import ImageRoot, llava_row, messages_row, require_text
from maskft.data.schema import to_dataset
from maskft.data.stream import CHUNK, JsonError, NotAListError, items, lines
from maskft.errors import DataError, did_you_mean, gathered

Format = Literal["auto", "llava", "messages"]
SUFFIXES = (".json", ".jsonl", ".parquet")
_KEYS = {"llava": "conversations", "messages": "messages"}
_CONVERTERS = {"llava": llava_row, "messages": messages_row}
_BATCH = 100


class Record(NamedTuple):
    """A row where it stands in its file, in canonical form, or what is wrong with it.

    Attributes:
        place: such as "item 3".
        raw: as the file has it.
        row: canonical; None where there is a problem.
        problem: what is wrong, and the remedy.
    """

    place: str
    raw: Any
    row: dict[str, Any] | None = None
    problem: str | None = None


def read(path: Path, *, format: Format = "auto", image_root: Path | None = None) -> Dataset:
    """Read LLaVA rows or messages-and-images rows into a canonical dataset.

    Arguments and errors are those of `scan`. Raises DataError for an empty file as well, and one that lists up to ten
    bad rows. Items of a list and rows of a table are counted from 0, lines from 1.
    """
    path = Path(path)
    problems: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for record in scan(path, format=format, image_root=image_root):
            if record.row is not None:
                yield record.row
            else:
                problems.append(f"{path.name} {record.place}: {record.problem}")

    dataset = to_dataset(rows())
    if problems:
        counted = "lines are counted from 1" if path.suffix.lower() == ".jsonl" else "items and rows from 0"
        raise DataError(f"{path}: {len(problems)} bad row(s) ({counted}):\n{gathered(problems)}")
    if not len(dataset):
        raise DataError(f"{path} holds no rows. Give a file with at least one example.")
    return dataset


def scan(path: Path, *, format: Format = "auto", image_root: Path | None = None) -> Iterator[Record]:
    """Yield every row of a data file, good or bad, in memory that does not grow with the file.

    The container follows from the suffix: `.json` (a list), `.jsonl` (an object per line), `.parquet`, or a folder
    written by `Dataset.save_to_disk`. With `format="auto"` the keys of the first row decide what the rows are:
    "conversations" means llava, "messages" means messages. Image paths are relative to `image_root` (default: the
    folder which holds `path`) and must stay below it; image files are not opened here.

    Raises DataError for a missing or unreadable file, and where neither or both of the formats would fit.
    """
    path = Path(path)
    if format not in ("auto", *_CONVERTERS):
        raise DataError(
            f"format is {format!r}, but must be auto, llava or messages.{did_you_mean(format, _CONVERTERS)}"
        )
    root = image_folder(path, image_root)
    if path.is_dir():
        records = _saved(path)
    elif path.suffix.lower() in SUFFIXES:
        records = {".json": _json, ".jsonl": _lines, ".parquet": _parquet}[path.suffix.lower()](path)
    else:
        raise DataError(
            f"{path} ends in '{path.suffix}', but must end in {', '.join(SUFFIXES)} or be a folder written by "
            f"Dataset.save_to_disk.{did_you_mean(path.suffix, SUFFIXES)}"
        )
    try:
        yield from _converted(path, records, format, ImageRoot(root))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}). Check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def image_folder(path: Path, image_root: Path | None = None) -> Path:
    """The folder that image paths of a data file are relative to.

    Raises DataError if the file or the folder does not exist.
    """
    if not os.path.exists(path):  # pathlib's raises for names that are too long
        raise DataError(f"{path} does not exist. Check the path of the data file.")
    root = Path(image_root) if image_root is not None else path.resolve().parent
    if not os.path.isdir(root):
        raise DataError(f"image_root {root} is not a folder. Give the folder to which the image paths are relative.")
    return root


def _converted(path: Path, records: Iterator[Record], format: Format, root: ImageRoot) -> Iterator[Record]:
    """Fill in the canonical rows."""
    chosen: str | None = None if format == "auto" else format
    for number, record in enumerate(records):
        row, problem = record.raw, record.problem
        if problem is None and not isinstance(row, dict):
            problem = f"is a {type(row).__name__}, but an object is needed."
        if problem is None and chosen is None:
            chosen = _detect(path, record.place, row)
        if problem is not None or chosen is None:
            yield record._replace(problem=problem)
            continue
        try:
            yield record._replace(row=_canonical(row, chosen, root, number, f"{path.name} {record.place}"))
        except DataError as error:
            yield record._replace(problem=str(error))
        except RecursionError:
            yield record._replace(problem="is nested too deeply. Flatten it.")


def _canonical(row: dict[str, Any], format: str, root: ImageRoot, number: int, origin: str) -> dict[str, Any]:
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise DataError(f"'id' is a {type(name).__name__}, but must be a string or an integer.")
    require_text(str(name), "'id'")
    converted = _CONVERTERS[format](row, root)
    return {**converted, "id": str(number if name is None else name), "origin": origin}


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


def _json(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, row in enumerate(items(file)):
                yield Record(f"item {number}", row)
    except NotAListError as error:
        raise DataError(_not_a_list(path)) from error
    except JsonError as error:
        raise DataError(f"{path} is not valid JSON ({error}). Repair the file.") from error


def _not_a_list(path: Path) -> str:
    """What a file holds instead of a list."""
    if path.stat().st_size > CHUNK:
        return f"{path} does not start with '[', but a list of rows is needed. Name a file of lines .jsonl."
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        remedy = "Name a file with an object per line .jsonl." if "Extra data" in str(error) else "Repair the file."
        return f"{path} is not valid JSON ({error}). {remedy}"
    keys = f" with the keys {sorted(content)[:10]}" if isinstance(content, dict) else ""
    return f"{path} holds a {type(content).__name__}{keys}, but a list of rows is needed."


def _lines(path: Path) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in lines(file):
                try:
                    yield Record(f"line {number}", json.loads(line))
                except (ValueError, RecursionError) as error:
                    hint = " Name a file that holds one list .json." if line.lstrip().startswith("[") else ""
                    yield Record(f"line {number}", None, None, f"is not valid JSON ({error}).{hint}")
    except JsonError as error:
        raise DataError(f"{path}: {error}. Repair the file.") from error


def _parquet(path: Path) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(file.iter_batches(batch_size=_BATCH))
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}). Write it again.") from error


def _saved(path: Path) -> Iterator[Record]:
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


def _table_rows(tables: Any) -> Iterator[Record]:
    number = 0
    for table in tables:
        for row in table.to_pylist():
            yield Record(f"row {number}", row)
            number += 1
