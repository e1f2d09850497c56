"""What the six benchmarks share: questions, answers, scores, and reading their files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskft.errors import DataError, gathered


@dataclass(frozen=True)
class Question:
    """One question as the model is asked it.

    Attributes:
        id: as the benchmark's question file has it; TextVQA and MME use one id for several questions.
        text: the prompt without image token, post-prompt included.
        image: the picture asked about; None for a question of text alone.
        category: the benchmark's own grouping, where it has one.
    """

    id: str | int
    text: str
    image: Path | None
    category: str | None = None


@dataclass(frozen=True)
class Answer:
    """One line of an answers file: what was asked and what the model said."""

    question_id: str | int
    prompt: str
    text: str


@dataclass(frozen=True)
class Score:
    """A benchmark's result.

    Attributes:
        score: the number papers report: in percent, but MME's perception in points (at most 2000).
        details: every sub-score and count, JSON-ready.
    """

    score: float
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def existing(*candidates: Path) -> Path:
    """The first of `candidates` that exists.

    Raises:
        DataError: none does.
    """
    for path in candidates:
        if path.exists():
            return path
    places = "\n".join(f"  - {path}" for path in candidates)
    raise DataError(f"a file of the benchmark is missing. Looked for:\n{places}")


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        DataError: it cannot be opened or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error


def read_json(path: Path) -> Any:
    """The file's JSON.

    Raises:
        DataError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One object a line; blank lines are passed over.

    Raises:
        DataError: names up to ten lines that are not JSON objects.
    """
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"line {number}: not a JSON object")
    if problems:
        raise DataError(f"{path} has lines that cannot be read:\n{gathered(problems)}")
    return rows


def read_answers(path: Path) -> list[Answer]:
    """An answers file in LLaVA's format: question_id, prompt and text are used, the rest is passed over.

    A prompt that isn't text counts as empty: TinyLLaVA-Factory writes MMMU's whole question list there. Benchmarks that
    find the question by its prompt then miss its answer.

    Raises:
        DataError: the file is empty, or names up to ten lines that lack a field or hold one of the wrong kind.
    """
    answers, problems = [], []
    for number, row in enumerate(read_json_lines(path), start=1):
        prompt = row.get("prompt")
        wrong = []
        if isinstance(row.get("question_id"), bool) or not isinstance(row.get("question_id"), str | int):
            wrong.append("question_id")
        if not isinstance(row.get("text"), str):
            wrong.append("text")
        if wrong:
            problems.append(f"answer {number}: {', '.join(wrong)} missing or of the wrong kind")
        else:
            answers.append(Answer(row["question_id"], prompt if isinstance(prompt, str) else "", row["text"]))
    if problems:
        raise DataError(f"{path} has answers that cannot be used:\n{gathered(problems)}")
    if not answers:
        raise DataError(f"{path} holds no answers.")
    return answers


def require_fields(
    path: Path, rows: Iterable[Mapping[str, Any]], fields: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Check that every row has the fields, each of its type.

    Raises:
        DataError: names the file and up to ten rows.
    """
    problems = [
        f"row {number}: '{name}' is missing or of the wrong kind"
        for number, row in enumerate(rows, start=1)
        for name, kind in fields.items()
        if not isinstance(row, Mapping) or not isinstance(row.get(name), kind)
    ]
    if problems:
        raise DataError(f"{path} is not the file that was expected:\n{gathered(problems)}")


def paths_inside(folder: Path, names: Sequence[str], *, source: Path) -> list[Path]:
    """Each name as a path under `folder`. Nothing is opened; links are followed by whoever opens the file.

    Args:
        folder: where the pictures are.
        names: relative paths as `source` has them, one a row.
        source: the file that holds the names, for the message.

    Raises:
        DataError: names `source` and up to ten rows whose path is empty, is not a path or leaves the folder.
    """
    root = Path(os.path.abspath(folder))

    def stays(name: str) -> bool:
        path = Path(os.path.abspath(root / name))
        return "\0" not in name and path != root and path.is_relative_to(root)

    problems = [f"row {number}: {name!r}" for number, name in enumerate(names, start=1) if not stays(name)]
    if problems:
        raise DataError(f"{source} names images that are not inside {folder}:\n{gathered(problems)}")
    return [folder / name for name in names]


def require_one_answer_each(expected: Iterable[Hashable], given: Sequence[Hashable], *, bench: str) -> None:
    """Every expected key answered exactly once and no other, so that no denominator is ever smaller than it should be.

    Raises:
        DataError: names up to ten missing, doubled and unknown keys each.
    """
    wanted, counts = dict.fromkeys(expected), Counter(given)
    kinds = {
        "no answer": [key for key in wanted if key not in counts],
        "more than one answer": [key for key, n in counts.items() if n > 1 and key in wanted],
        "not a question of this benchmark": [key for key in counts if key not in wanted],
    }
    problems = [f"{kind} ({len(keys)}):\n{gathered(list(map(str, keys)))}" for kind, keys in kinds.items() if keys]
    if {*map(str, kinds["no answer"])} & {*map(str, kinds["not a question of this benchmark"])}:
        problems.append("Some ids differ only in kind: a number in one file is text in the other.")
    if problems:
        raise DataError(f"the answers do not match the questions of {bench}:\n" + "\n".join(problems))


def percent(right: int, total: int) -> float:
    """100 * right / total, and 0 where there is nothing to count."""
    return 100 * right / total if total else 0.0


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where there is nothing to divide by."""
    return part / whole if whole else 0.0
