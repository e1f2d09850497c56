"""Long JSON is read a row at a time, whatever the pieces it comes in."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.data import stream
from maskft.data.stream import JsonError, NotAListError, items, lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 3)


@pytest.mark.parametrize("chunk", range(1, 12))
@pytest.mark.parametrize("number", [1.5, -0.0, 1e300, 2.5e-10, 12, -3, True])
def test_numbers_are_whole_wherever_they_are_cut(number: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    for before in range(chunk):
        values = ["x" * before, number, number]
        assert list(items(io.StringIO(json.dumps(values)))) == values


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.integers(1, 7), st.booleans())
def test_items_are_those_of_json(values: list[Any], indent: int | None, chunk: int, ascii: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        text = json.dumps(values, indent=indent, ensure_ascii=ascii)
        assert list(items(io.StringIO(text))) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "Expecting value: line 1 column 2"),
        ("[1", "Expecting ',' delimiter: line 1 column 3"),
        ("[1,]", "line 1 column 4"),
        ("[1 2]", "Expecting ',' delimiter: line 1 column 4"),
        ("[1]\n\n x", "Extra data: line 3 column 2"),
        ('[\n{"a": 1},\n{"a" 1}]', "Expecting ':' delimiter: line 3 column 6"),
        ('[{"a": "b', "Unterminated string"),
        ('[{"a": tru}]', "line 1 column 8"),
        ('["\\q"]', "Invalid"),
        (f"[{'[' * 100_000}", "nested too deeply"),
        (f"[{'9' * 5000}]", "4300"),
    ],
)
@pytest.mark.usefixtures("small")
def test_flaws_are_placed(text: str, message: str) -> None:
    with pytest.raises(JsonError, match=message.replace("(", r"\(")):
        list(items(io.StringIO(text)))


@pytest.mark.parametrize("text", ["", "{}", "3", " null"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(NotAListError):
        list(items(io.StringIO(text)))


@pytest.mark.usefixtures("small")
def test_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LONGEST", 20)
    with pytest.raises(JsonError, match="an item is longer than 20 characters: line 2 column 1"):
        list(items(io.StringIO('[1,\n"' + "x" * 100 + '"]')))
    assert list(lines(io.StringIO("a\n\n" + "x" * 19))) == [(1, "a\n"), (3, "x" * 19)]
    with pytest.raises(JsonError, match="line 2 is longer than 20 characters"):
        list(lines(io.StringIO("a\n" + "x" * 30)))


def test_what_was_passed_is_dropped() -> None:
    draw = random.Random(0)
    rows = [{"id": i, "text": "x" * draw.randrange(4000)} for i in range(2000)]
    text = json.dumps(rows)
    file = io.StringIO(text)
    assert len(text) > 3 * stream.CHUNK
    most = 0
    for number, row in enumerate(items(file)):
        assert row == rows[number]
        if number == 0:
            most = file.tell()
    assert most == stream.CHUNK
