"""YAML from strangers is plain and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft import yamlfile
from maskft.yamlfile import YamlError, dump_yaml, parse_yaml, read_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_dumped_is_read_again(value: object) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: no", {"a": "no"}),
        ("a: 1e-3", {"a": 1e-3}),
        ("a: 2026-11-22", {"a": "2026-11-22"}),
        ("", None),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "expected the node content"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!binary aGk=", "it holds a bytes; write a string, a number"),
        ("a: !!timestamp 2026-11-22", "it holds a date"),
        ("a: [!!set {b}]", "it holds a set"),
        ("1: a", "the key 1 is no string; put it in quotes"),
        ("a: " + "[" * 32, "nested more than 32 deep"),
        ("a: &x [*x]", "an alias stands inside what it names"),
        ("a: " + "9" * 5000, "4300"),
        ("#" * 300_000, "more than 262,144 characters"),
        ("[" + "1," * 20_000 + "]", "more than 20,000 keys and values"),
        ("".join(f"{i}: &x{i} [{f'*x{i - 1}, ' * 9 if i else 1}]\n" for i in range(9)), "more than 20,000"),
        ("".join(f"{i}: &x{i} {{<<: [{f'*x{i - 1}, ' * 9 if i else ''}]}}\n" for i in range(9)), "more than 20,000"),
    ],
)
def test_refusals(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(YamlError, match=message):
        parse_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(YamlError, match=message):
        read_yaml(tmp_path / "a.yaml")


def test_as_deep_and_long_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_yaml("[" * 31 + "1" + "]" * 31)
    monkeypatch.setattr(yamlfile, "MAX_CHARACTERS", 4)
    assert parse_yaml("a: 1") == {"a": 1}
