"""Patterns that could match for ever are refused; those that people write are not."""

from __future__ import annotations

import pytest

from maskft import MaskConfig
from maskft.errors import UserError
from maskft.tuner.patterns import flaw_of


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        "q_proj",
        r".*\.(q_proj|v_proj)$",
        r"model\.language_model\.layers\.(\d+)\.(self_attn|mlp)\..*_proj",
        r"(?:base\.)?layers\.[0-9]{1,2}\.[^.]+\.weight",
        r"[]*+(|]+x",
        r"\(\*\|\)",
        "(a|b)?c",
        "a{b}",
    ],
)
def test_usual_ones(pattern: str) -> None:
    assert flaw_of(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "flaw"),
    [
        ("(a+)+$", "repeats a group that holds a repeat or a choice"),
        ("((a|b))*", "repeats a group that holds a repeat or a choice"),
        (r"(x(\d*)y){2,}", "repeats a group"),
        ("(a|aa)+", "repeats a group"),
        (".*.*.*.*.*x", "has more than 4 repeats"),
        ("a" * 1001, "has 1001 characters; 1000 are allowed"),
        ("(", "is no regular expression"),
        ("[", "is no regular expression"),
        ("a{99999999999999999999}", "is no regular expression"),
        ("*", "is no regular expression"),
        ("a)", "is no regular expression"),
        ("\\", "is no regular expression"),
        ("(" * 490 + ")" * 490, "is no regular expression"),
    ],
)
def test_flaws(pattern: str, flaw: str) -> None:
    assert flaw in str(flaw_of(pattern))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_configurations_refuse_them(field: str) -> None:
    with pytest.raises(UserError, match=rf"{field} repeats a group"):
        MaskConfig(**{field: "(a+)+$"})


def test_each_of_several_layers_patterns() -> None:
    with pytest.raises(UserError, match=r"layers_pattern is no regular expression"):
        MaskConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=["layers", "("])
    assert MaskConfig(target_modules=["(", "(a+)+$"]).target_modules == {"(", "(a+)+$"}  # names, never matched so
