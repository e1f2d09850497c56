"""Answers on disk: an interruption at any byte leaves a file that is finished exactly as an uninterrupted run's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from maskft.errors import RunError
from maskft.evaluation.answering import AnswerFile, answer_all, question_row, written_prompt
from maskft.evaluation.benchmarks.common import Question, read_answers

QUESTIONS = [
    Question("a/0.png", "What?\nNow", Path("a.png")),
    Question(7, "Wo?", None),
    Question(7, "Wo denn, „Größe“?", Path("c.png")),
    Question("d", "\ud800", None),  # half of a surrogate pair, as a damaged question file may hold
    Question("e", "x" * 9, None),
]
SETTINGS = {"batch_size": 2, "max_new_tokens": 8, "dtype": "bfloat16", "learnt": "ab"}


def answer_file(folder: Path, **changes: object) -> AnswerFile:
    fields = {
        "path": folder / "gqa" / "answers" / "m-1.5.jsonl",
        "benchmark": "gqa",
        "model": "m-1.5",
        "questions": QUESTIONS,
        "batch_size": 2,
        "settings": SETTINGS,
        "environment": {"packages": {"torch": "2"}, "device": "cpu"},
        "places": {"base": "embedded"},
        **changes,
    }
    return AnswerFile(**fields)


class Model:
    """Answers by question alone, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        self.asked += [question.text for question in questions]
        return [f"answer “{len(question.text)}”\n\ud800\x00 " + question.text[:4] for question in questions]


def finish(file: AnswerFile) -> Model:
    model = Model()
    file.prepare()
    answer_all(file, model)
    return model


@pytest.fixture
def finished(tmp_path: Path) -> AnswerFile:
    file = answer_file(tmp_path / "whole")
    assert finish(file).asked == [question.text for question in QUESTIONS]
    return file


def test_lines_are_llavas(finished: AnswerFile) -> None:
    lines = [json.loads(line) for line in finished.path.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["a/0.png", 7, 7, "d", "e"]
    assert list(lines[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert lines[0]["prompt"] == "What?\nNow"
    assert lines[0]["model_id"] == "m-1.5"
    assert len({line["answer_id"] for line in lines}) == 5
    assert [answer.text for answer in read_answers(finished.path)] == Model()(QUESTIONS)


def test_the_record_says_what_they_were_made_with(finished: AnswerFile) -> None:
    record = json.loads((finished.path.parent / "m-1.5.json").read_text())
    assert record["settings"] == SETTINGS
    assert record["environment"]["packages"] == {"torch": "2"}
    assert record["places"] == {"base": "embedded"}
    assert sorted(path.name for path in finished.path.parent.iterdir()) == ["m-1.5.json", "m-1.5.jsonl"]


@pytest.mark.parametrize(
    ("benchmark", "image", "expected"),
    [
        ("scienceqa", Path("a.png"), "<image>\nWhich?"),
        ("scienceqa", None, "Which?"),
        ("mmmu", Path("a.png"), "<image>\nWhich?"),
        ("textvqa", Path("a.png"), "Which?"),
        ("mme", Path("a.png"), "Which?"),
    ],
)
def test_the_prompt_that_is_written(benchmark: str, image: Path | None, expected: str) -> None:
    assert written_prompt(benchmark, Question("1", "Which?", image)) == expected


def test_the_row_that_is_asked() -> None:
    row = question_row("gqa", QUESTIONS[0])
    assert row["images"] == [{"path": "a.png", "bytes": None}]
    assert row["messages"] == [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?\nNow"}]}
    ]
    assert row["origin"] == "gqa question a/0.png"
    assert question_row("gqa", QUESTIONS[1])["images"] == []


def test_after_a_kill_at_any_byte_the_file_ends_the_same_and_nothing_is_asked_twice(
    finished: AnswerFile, tmp_path: Path
) -> None:
    whole = finished.path.read_bytes()
    record = finished.record.read_bytes()
    for size in range(len(whole) + 1):
        file = answer_file(tmp_path / "killed")
        file.path.parent.mkdir(parents=True)
        file.record.write_bytes(record)
        file.path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        kept = lines if lines == len(QUESTIONS) else lines // 2 * 2
        assert finish(file).asked == [question.text for question in QUESTIONS[kept:]]
        assert file.path.read_bytes() == whole
        assert file.record.read_bytes() == record
        shutil.rmtree(tmp_path / "killed")


def test_a_kill_before_the_first_batch_binds_to_nothing(tmp_path: Path) -> None:
    answer_file(tmp_path).prepare()
    other = answer_file(tmp_path, settings={**SETTINGS, "dtype": "float32"})
    finish(other)
    assert json.loads(other.record.read_text())["settings"]["dtype"] == "float32"


@pytest.mark.parametrize("name", ["dtype", "learnt", "max_new_tokens", "batch_size"])
def test_other_settings_are_refused(name: str, finished: AnswerFile, tmp_path: Path) -> None:
    before = finished.path.read_bytes()
    other = answer_file(tmp_path / "whole", settings={**SETTINGS, name: "z"})
    with pytest.raises(RunError, match=f"{name}: .* there, 'z' now") as error:
        other.prepare()
    assert "another --output, or remove" in str(error.value)
    assert finished.path.read_bytes() == before


def test_another_environment_is_refused_while_questions_are_left(finished: AnswerFile, tmp_path: Path) -> None:
    newer = answer_file(tmp_path / "whole", environment={"packages": {"torch": "3"}, "device": "cpu"})
    record = finished.record.read_bytes()
    assert finish(newer).asked == []
    assert finished.record.read_bytes() == record
    finished.path.write_bytes(finished.path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"packages\.torch: '2' there, '3' now"):
        newer.prepare()


FOREIGN = {
    "another question": (
        {"questions": [*QUESTIONS[:2], Question(7, "Wer?", None), *QUESTIONS[3:]]},
        "question 3, prompt",
    ),
    "another id": ({"questions": [Question("b", "What?\nNow", None), *QUESTIONS[1:]]}, "question 1, question_id"),
    "fewer questions": ({"questions": QUESTIONS[:3]}, "5 lines for 3 questions"),
    "another model": ({"model": "n"}, "question 1, answer_id, model_id"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_answers_to_other_questions_are_refused(case: str, finished: AnswerFile, tmp_path: Path) -> None:
    changes, expected = FOREIGN[case]
    with pytest.raises(RunError, match=expected):
        answer_file(tmp_path / "whole", **changes).prepare()


@pytest.mark.parametrize("line", [b"not JSON", b"[1]", b'{"text": 3}', b"\xff"])
def test_a_line_that_is_no_answer_is_refused(line: bytes, finished: AnswerFile) -> None:
    lines = finished.path.read_bytes().split(b"\n")
    lines[1] = line
    finished.path.write_bytes(b"\n".join(lines))
    with pytest.raises(RunError, match="question 2, question_id"):
        finished.prepare()


@pytest.mark.parametrize("record", [None, b"", b"[]", b"{}", b'{"settings": {}}'])
def test_answers_without_a_readable_record_are_refused(record: bytes | None, finished: AnswerFile) -> None:
    finished.record.unlink()
    if record is not None:
        finished.record.write_bytes(record)
    with pytest.raises(RunError, match="what they were made with cannot be read"):
        finished.prepare()


def together(folder: Path, processes: int, fail_after: int | None = None) -> list[Model]:
    """Answer with several threads in the place of processes; each fails after so many batches."""
    file = answer_file(folder)
    file.prepare()
    models = [Model() for _ in range(processes)]
    barrier = threading.Barrier(processes)

    def work(process: int) -> None:
        def ask(questions: Sequence[Question]) -> list[str]:
            if fail_after is not None and len(models[process].asked) >= 2 * fail_after:
                barrier.abort()
                raise InterruptedError
            return models[process](questions)

        with contextlib.suppress(InterruptedError, threading.BrokenBarrierError):
            answer_all(file, ask, process=process, processes=processes, wait=lambda: barrier.wait() and None)

    threads = [threading.Thread(target=work, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return models


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_several_processes_write_the_same_file(processes: int, finished: AnswerFile, tmp_path: Path) -> None:
    models = together(tmp_path / "many", processes)
    file = answer_file(tmp_path / "many")
    assert file.path.read_bytes() == finished.path.read_bytes()
    assert file.record.read_bytes() == finished.record.read_bytes()
    assert sorted(text for model in models for text in model.asked) == sorted(q.text for q in QUESTIONS)
    assert max(len(model.asked) for model in models) <= 4
    assert len(list(file.path.parent.iterdir())) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_what_several_processes_left_is_taken_up_by_any_number(
    processes: int, finished: AnswerFile, tmp_path: Path
) -> None:
    left = together(tmp_path / "many", 2, fail_after=1)
    file = answer_file(tmp_path / "many")
    assert not file.path.exists()
    done = [text for model in left for text in model.asked]
    assert 0 < len(done) < 5
    again = together(tmp_path / "many", processes)
    assert sorted([*done, *(text for model in again for text in model.asked)]) == sorted(q.text for q in QUESTIONS)
    assert file.path.read_bytes() == finished.path.read_bytes()
    assert len(list(file.path.parent.iterdir())) == 2


def test_after_a_kill_at_any_byte_of_a_part_file_the_end_is_the_same(finished: AnswerFile, tmp_path: Path) -> None:
    source = answer_file(tmp_path / "source")
    source.prepare()
    size = 0
    for number in (2, 0):
        size = source.note(1, number, Model()([QUESTIONS[position] for position in source.batches[number]]), size)
    whole = source.part(1).read_bytes()
    for size in range(0, len(whole) + 1, 7):
        file = answer_file(tmp_path / "killed")
        file.path.parent.mkdir(parents=True)
        shutil.copy(finished.record, file.record)
        file.part(1).write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        assert len(finish(file).asked) == [5, 4, 2][lines]
        assert file.path.read_bytes() == finished.path.read_bytes()
        assert not list(file.path.parent.glob("*part*"))
        shutil.rmtree(tmp_path / "killed")


def test_parts_that_a_kill_left_after_merging_are_removed(finished: AnswerFile) -> None:
    finished.note(0, 1, Model()(QUESTIONS[2:4]), 0)
    assert finish(finished).asked == []
    assert len(list(finished.path.parent.iterdir())) == 2


def test_parts_that_hold_every_batch_are_merged_without_asking(finished: AnswerFile, tmp_path: Path) -> None:
    file = answer_file(tmp_path / "parts")
    file.prepare()
    for number, batch in enumerate(file.batches):
        file.note(number, number, Model()([QUESTIONS[position] for position in batch]), 0)
    assert finish(file).asked == []
    assert file.path.read_bytes() == finished.path.read_bytes()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"batch": 9, "answers": []}, "no batch of answers"),
        ({"batch": 0, "answers": [{}]}, "batch 0 with 1 answers, not 2"),
        ({"batch": 2, "answers": [{"question_id": "e"}]}, "in m-1.5.jsonl.part-0 line for question 5, prompt"),
    ],
)
def test_part_files_of_something_else_are_refused(line: dict, expected: str, tmp_path: Path) -> None:
    file = answer_file(tmp_path)
    file.prepare()
    file.part(0).write_text(json.dumps(line) + "\n")
    with pytest.raises(RunError, match=expected):
        file.prepare()


def test_one_batch_that_holds_all(tmp_path: Path) -> None:
    file = dataclasses.replace(answer_file(tmp_path), batch_size=100)
    finish(file)
    assert len(file.path.read_text().splitlines()) == 5
