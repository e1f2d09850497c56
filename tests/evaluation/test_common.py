from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft import evaluation
from maskft.errors import DataError, UserError
from maskft.evaluation.benchmarks import BENCHMARKS, benchmark
from maskft.evaluation.benchmarks.common import (
    Answer,
    Score,
    existing,
    paths_inside,
    percent,
    ratio,
    read_answers,
    read_json,
    read_json_lines,
    require_fields,
    require_one_answer_each,
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_offers_the_same(name: str) -> None:
    module = benchmark(name)
    tokens = module.MAX_NEW_TOKENS
    assert tokens == (1024 if name in ("mmmu", "scienceqa") else 128)
    for function in (module.read, module.questions, module.score):
        assert callable(function)


@pytest.mark.parametrize(("name", "hint"), [("popo", "pope"), ("MME", "mme"), ("text-vqa", "textvqa")])
def test_an_unknown_benchmark_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        benchmark(name)
    assert f"no benchmark '{name}'" in str(caught.value)
    assert f"Did you mean '{hint}'?" in str(caught.value)
    assert all(known in str(caught.value) for known in BENCHMARKS)


def test_scorers_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from maskft.evaluation.benchmarks import BENCHMARKS, benchmark;"
        "[benchmark(name) for name in BENCHMARKS]; print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "maskft" in done.stdout.split()
    assert not {"torch", "transformers", "peft", "datasets"} & set(done.stdout.split())


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError, match=r"module 'maskft\.evaluation' has no attribute 'evaluate_rum'"):
        evaluation.evaluate_rum  # noqa: B018


def test_existing_names_all_places_looked_at(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    assert existing(tmp_path / "a", tmp_path / "b") == tmp_path / "b"
    with pytest.raises(DataError) as caught:
        existing(tmp_path / "c", tmp_path / "d")
    assert f"- {tmp_path / 'c'}\n" in str(caught.value)
    assert str(tmp_path / "d") in str(caught.value)


def test_json_files(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text('{"a": [1]}')
    assert read_json(file) == {"a": [1]}
    for content, expected in ((b"{", "not valid JSON"), (b"\xff", "not UTF-8"), (b"[" * 100_000, "not valid JSON")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=expected) as caught:
            read_json(file)
        assert str(file) in str(caught.value)
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_bytes('{"a": 1}\r\n\n  \n{"a": "\u2028"}'.encode())
    assert read_json_lines(file) == [{"a": 1}, {"a": "\u2028"}]
    file.write_text('{"a": 1}\n' + "[1]\n" * 6 + "{\n" * 6)
    with pytest.raises(DataError) as caught:
        read_json_lines(file)
    message = str(caught.value)
    assert "line 2: not a JSON object" in message
    assert "line 11: " in message
    assert "line 12" not in message
    assert "... and 2 more" in message


def test_answers(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(
        '{"question_id": 1, "prompt": "Is it?", "text": "No", "model_id": "m", "metadata": {}}\n'
        '{"question_id": "1", "text": ""}\n'
    )
    assert read_answers(file) == [Answer(1, "Is it?", "No"), Answer("1", "", "")]
    file.write_text('{"question_id": 1, "text": "a", "prompt": ["a", "list"]}\n')
    assert read_answers(file) == [Answer(1, "", "a")]
    file.write_text(
        '{"question_id": 1}\n{"text": "a"}\n{"question_id": true, "text": "a"}\n'
        '{"question_id": 1, "text": 2}\n{"question_id": 1, "text": "a", "prompt": ["a", "list"]}\n'
        '{"question_id": 1, "text": "a"}'
    )
    with pytest.raises(DataError) as caught:
        read_answers(file)
    message = str(caught.value)
    for part in (
        "answer 1: text",
        "answer 2: question_id",
        "answer 3: question_id",
        "answer 4: text",
    ):
        assert f"{part} missing or of the wrong kind" in message
    assert "answer 5" not in message
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no answers"):
        read_answers(file)


def test_fields() -> None:
    rows = [{"a": 1, "b": "x"}, {"a": "1", "b": "x"}, {"a": "1"}]
    require_fields(Path("f"), rows[:2], {"a": (int, str), "b": str})
    with pytest.raises(DataError, match=r"(?s)f is not the file.*row 3: 'b' is missing or of the wrong kind"):
        require_fields(Path("f"), rows, {"a": (int, str), "b": str})


def test_paths_inside_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.png", "b/c d.png", "b/../a.png", "..a/...png", "é\n.png"]
    assert paths_inside(tmp_path, names, source=Path("q")) == [tmp_path / name for name in names]
    monkeypatch.chdir(tmp_path)
    assert paths_inside(Path("."), ["a"], source=Path("q")) == [Path("a")]
    assert paths_inside(Path("../x"), ["a"], source=Path("q")) == [Path("../x/a")]
    outside = ["../a", "..", ".", "", "/a", "b/../../a", "a\0b", f"../{tmp_path.name}x/a"]
    for folder in (tmp_path, Path(".")):
        with pytest.raises(DataError) as caught:
            paths_inside(folder, ["fine", *outside], source=Path("q.jsonl"))
        message = str(caught.value)
        assert "q.jsonl names images that are not inside" in message
        assert [f"row {number}: {name!r}" in message for number, name in enumerate(["fine", *outside], start=1)] == [
            False,
            *[True] * len(outside),
        ]


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_as_a_path_is_inside_or_refused(name: str) -> None:
    try:
        (path,) = paths_inside(Path("data"), [name], source=Path("q"))
    except DataError:
        return
    assert path.is_relative_to("data")
    assert path != Path("data")


def test_one_answer_each() -> None:
    require_one_answer_each([1, 2], [2, 1], bench="B")
    require_one_answer_each([], [], bench="B")
    with pytest.raises(DataError, match="the questions of B") as caught:
        require_one_answer_each([1, 2, 3], [2, 2, 3, 4], bench="B")
    message = str(caught.value)
    for part in (
        "no answer (1):\n  - 1",
        "more than one answer (1):\n  - 2",
        "not a question of this benchmark (1):\n  - 4",
    ):
        assert part in message
    assert "kind" not in message
    with pytest.raises(DataError, match="a number in one file is text in the other"):
        require_one_answer_each([1, 2], ["1", "2"], bench="B")


def test_numbers() -> None:
    assert (percent(1, 4), percent(0, 0)) == (25.0, 0.0)
    assert (ratio(1, 4), ratio(0, 0)) == (0.25, 0.0)
    assert Score(1.5, {"a": {"b": 1}}).to_dict() == {"score": 1.5, "details": {"a": {"b": 1}}}
