"""Several right answers to a row's last question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from maskft.data import answer, read
from maskft.errors import DataError

from .helpers import llava, write_json

MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize("item", [llava(human="What?"), {"messages": MESSAGES}])
def test_are_kept_beside_the_one_that_is_learnt(tmp_path: Path, item: dict[str, Any]) -> None:
    rows = read(write_json(tmp_path / "a.json", [{**item, "answers": ["a cat", "kitten"]}, item]))
    assert rows["answers"][:] == [["a cat", "kitten"], None]
    assert [answer(row) for row in rows] == ["A cat.", "A cat."]


def test_from_tables_as_the_hub_has_them(tmp_path: Path) -> None:
    Dataset.from_list([{"messages": MESSAGES, "answers": ["a"]}, {"messages": MESSAGES, "answers": []}]).save_to_disk(
        tmp_path / "saved"
    )
    rows = read(tmp_path / "saved")
    assert rows["answers"][:] == [["a"], None]
    rows.to_parquet(tmp_path / "again.parquet")
    assert read(tmp_path / "again.parquet")["answers"][:] == [["a"], None]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("a cat", r"a.json item 0: 'answers' is str \('a cat'\), but must be a list of strings"),
        (["a", 3], r"a.json item 0: answers\[1\] is int \('3'\), but must be a string"),
        ([{"answer": "a"}], r"a.json item 0: answers\[0\] is dict"),
        (["\ud800"], r"a.json item 0: answers\[0\] is not valid Unicode"),
    ],
)
def test_of_another_form_are_refused(tmp_path: Path, answers: Any, message: str) -> None:
    path = write_json(tmp_path / "a.json", [llava(human="What?", answers=answers)])
    with pytest.raises(DataError, match=message):
        read(path)
