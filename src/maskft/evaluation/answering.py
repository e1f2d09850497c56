"""Answers on disk: written batch by batch, taken up again after any interruption.

<model>.jsonl           one line an answer, in the order of the questions, in LLaVA's format
<model>.json            what the answers were made with; an interrupted run goes on with nothing else
<model>.jsonl.part-<n>  while several processes answer: what process n has, one line a batch

Batch b holds the questions b * batch_size to (b + 1) * batch_size - 1 of the question file, wherever a run was
interrupted and however many processes answer. A batch is taken as answered once all of it is on disk; of any other,
what is there is dropped and the batch asked again. So a run that was killed at any moment ends with the file that an
uninterrupted one writes, and no batch that was written is asked twice.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maskft.data.schema import image_part, text_part, turn
from maskft.errors import RunError, gathered
from maskft.evaluation.benchmarks.common import Question
from maskft.evaluation.generation import Progress
from maskft.runs import write_atomically, write_json

Ask = Callable[[Sequence[Question]], list[str]]

_MARKED = ("scienceqa", "mmmu")
"""Benchmarks whose answers files show in `prompt` where the image stood; the others hold the question's text alone."""


def written_prompt(benchmark: str, question: Question) -> str:
    """The question as an answers file holds it."""
    return f"<image>\n{question.text}" if benchmark in _MARKED and question.image else question.text


def question_row(benchmark: str, question: Question) -> dict[str, Any]:
    """The question as a canonical row, so that its prompt is made as in training: image first, then the text."""
    images = [] if question.image is None else [{"path": str(question.image), "bytes": None}]
    content = [*(image_part() for _ in images), text_part(question.text)]
    return {
        "id": str(question.id),
        "images": images,
        "messages": [turn("user", content)],
        "origin": f"{benchmark} question {question.id}",
    }


@dataclass(frozen=True)
class AnswerFile:
    """One model's answers to one benchmark.

    Attributes:
        path: the answers file, which ends in .jsonl.
        benchmark: its name.
        model: goes into each line as model_id.
        questions: all that are asked, in order.
        batch_size: questions asked together.
        settings: what the answers depend on, JSON-ready; a resumed run must have the same.
        environment: versions and machine, JSON-ready; must be the same while questions are left.
        places: where the weights were, for the record.
    """

    path: Path
    benchmark: str
    model: str
    questions: Sequence[Question]
    batch_size: int
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    places: Mapping[str, Any]

    @property
    def record(self) -> Path:
        """The file that says what the answers were made with."""
        return self.path.with_suffix(".json")

    @cached_property
    def batches(self) -> list[range]:
        """Positions of each batch's questions."""
        total = len(self.questions)
        return [range(i, min(i + self.batch_size, total)) for i in range(0, total, self.batch_size)]

    def check(self) -> None:
        """Make sure that the answers on disk, if any, belong to these questions and settings.

        Raises:
            RunError: says what differs and what to do.
        """
        if not self._begun():
            return
        remedy = f"Give another --output, or remove {self.path} and {self.record.name} beside it."
        try:
            recorded = json.loads(self.record.read_text(encoding="utf-8"))
            settings, environment = recorded["settings"], recorded["environment"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{self.path} holds answers, but what they were made with cannot be read from {self.record}. {remedy}"
            ) from error
        if differing := _differences(settings, self.settings):
            raise RunError(f"{self.path} was answered with other settings:\n{gathered(differing)}\n{remedy}")
        try:
            pending = self.pending()
        except _ForeignError as error:
            raise RunError(f"{self.path} holds other answers than those asked for: {error}. {remedy}") from error
        if pending and (differing := _differences(environment, self.environment)):
            raise RunError(
                f"{self.path} was begun elsewhere, and one result must come from one place:\n{gathered(differing)}\n"
                f"{remedy}"
            )

    def prepare(self) -> None:
        """Check, drop what an interruption left of a batch, and record what the answers are made with.

        Raises:
            RunError: as `check`.
        """
        self.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._begun():
            made = {"settings": self.settings, "environment": self.environment, "places": self.places}
            write_json(self.record, made)
            return
        if self.path.exists():
            whole = self._whole_lines(self.path)[: self.answered()]
            _cut(self.path, sum(len(line) + 1 for line in whole))
        for part in self._parts():
            _cut(part, sum(len(line) + 1 for line in self._whole_lines(part)))
        if not self.pending():
            self.merge()

    def pending(self) -> list[int]:
        """Numbers of the batches that have no answers on disk."""
        done = self.answered()
        journal = self.journal()
        return [b for b, batch in enumerate(self.batches) if batch.stop > done and b not in journal]

    def answered(self) -> int:
        """How many answers of whole batches the answers file holds, from its start."""
        lines = self._whole_lines(self.path) if self.path.exists() else []
        if len(lines) > len(self.questions):
            raise _ForeignError(f"{len(lines)} lines for {len(self.questions)} questions")
        for position, line in enumerate(lines):
            self._text(_loaded(line), position, "its")
        return max((batch.stop for batch in self.batches if batch.stop <= len(lines)), default=0)

    def finished(self) -> bool:
        """Whether the answers file holds every answer."""
        return self.answered() == len(self.questions)

    def journal(self) -> dict[int, list[str]]:
        """Answers in part files, by the number of their batch."""
        found = {}
        for part in self._parts():
            for line in self._whole_lines(part):
                entry = _loaded(line)
                number, lines = entry.get("batch"), entry.get("answers")
                if not isinstance(number, int) or not 0 <= number < len(self.batches) or not isinstance(lines, list):
                    raise _ForeignError(f"{part.name} has a line that is no batch of answers")
                batch = self.batches[number]
                if len(lines) != len(batch):
                    raise _ForeignError(f"{part.name} has batch {number} with {len(lines)} answers, not {len(batch)}")
                found[number] = [self._text(a, p, part.name) for a, p in zip(lines, batch, strict=True)]
        return found

    def append(self, number: int, texts: Sequence[str], size: int) -> int:
        """Write a batch, which must be the next, to the answers file of `size` bytes; return its new size.

        Raises:
            RunError: the file has another size, so another process writes to it as well.
        """
        return _append(self.path, self._lines(number, texts), size)

    def note(self, process: int, number: int, texts: Sequence[str], size: int) -> int:
        """Write any batch to the part file of a process; otherwise as `append`."""
        answers = [self._answer(p, text) for p, text in zip(self.batches[number], texts, strict=True)]
        return _append(self.part(process), json.dumps({"batch": number, "answers": answers}) + "\n", size)

    def merge(self) -> None:
        """Put the batches of all part files into the answers file, in order, and remove the part files."""
        journal = self.journal()
        if not self.finished():
            done = self._whole_lines(self.path)[: self.answered()] if self.path.exists() else []
            text = "".join(line.decode() + "\n" for line in done)
            rest = [b for b, batch in enumerate(self.batches) if batch.stop > len(done)]
            write_atomically(self.path, text + "".join(self._lines(b, journal[b]) for b in rest))
        for part in self._parts():
            part.unlink()

    def _begun(self) -> bool:
        return self.path.exists() or bool(self._parts())

    def part(self, process: int) -> Path:
        """The part file of a process."""
        return self.path.with_name(f"{self.path.name}.part-{process}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))

    @staticmethod
    def _whole_lines(path: Path) -> list[bytes]:
        """Lines without their line breaks; what follows the last one was never finished."""
        return path.read_bytes().split(b"\n")[:-1]

    def _lines(self, number: int, texts: Sequence[str]) -> str:
        answers = (self._answer(p, text) for p, text in zip(self.batches[number], texts, strict=True))
        return "".join(json.dumps(answer) + "\n" for answer in answers)

    def _answer(self, position: int, text: Any) -> dict[str, Any]:
        question = self.questions[position]
        name = f"{self.model}\n{self.benchmark}\n{position}"
        return {
            "question_id": question.id,
            "prompt": written_prompt(self.benchmark, question),
            "text": text,
            "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
            "model_id": self.model,
            "metadata": {"benchmark": self.benchmark, "max_new_tokens": self.settings["max_new_tokens"]},
        }

    def _text(self, answer: Any, position: int, where: str) -> str:
        """The text of the answer to the question at `position`; raise unless it is that question's."""
        given = answer if isinstance(answer, dict) else {}
        text = given.get("text")
        expected = self._answer(position, text if isinstance(text, str) else "")
        if wrong := [key for key, value in expected.items() if given.get(key) != value]:
            raise _ForeignError(f"in {where} line for question {position + 1}, {', '.join(wrong)} is not as expected")
        return str(text)


class _ForeignError(Exception):
    """A file holds something else than answers to these questions."""


def answer_all(
    file: AnswerFile,
    ask: Ask,
    *,
    progress: Progress = iter,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Ask every question that has no answer yet; at the end the answers file is whole.

    Args:
        file: prepared.
        ask: gives one answer a question, for the questions of one batch.
        progress: wraps the batches, for a progress bar.
        process, processes: this process's number and how many there are; each answers every `processes`-th batch.
        wait: returns once all processes have called it.
    """

    def asked(number: int) -> list[str]:
        return ask([file.questions[position] for position in file.batches[number]])

    pending = file.pending()
    wait()  # all have seen the same files
    if processes > 1:
        size = _size(file.part(process))
        for number in progress(pending[process::processes]):
            size = file.note(process, number, asked(number), size)
        wait()
        if process == 0:
            file.merge()
        return
    done, journal, size = file.answered(), file.journal(), _size(file.path)
    for number in progress([b for b, batch in enumerate(file.batches) if batch.stop > done]):
        size = file.append(number, journal[number] if number in journal else asked(number), size)
    file.merge()


def _append(path: Path, text: str, size: int) -> int:
    with path.open("ab") as file:
        if file.tell() != size:
            raise RunError(f"{path} is being written by another process. Let it finish, or give another --output.")
        file.write(text.encode())
        return file.tell()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        with path.open("r+b") as file:
            file.truncate(size)


def _loaded(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for each value that differs, nested mappings by dotted keys."""
    lines = []
    for key in sorted({*there, *now}):
        old, new = there.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} there, {new!r} now")
    return lines
