"""What an answer to an MMMU question chooses or says, and that long answers are read in linear time."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.evaluation.benchmarks.mmmu_text import choice, matches, normal, statements

LETTERS = ("A", "B", "C", "D")
OPTIONS = {"A": "red", "B": "Red fox", "C": "12", "D": "A barn"}
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B.", "B"),  # the ends' marks go
        ("'C':", "C"),  # one after the other: first : and then '
        ("C:'", None),  # so : stays behind '
        ("D?!", "D"),
        ("D!?", None),
        ("b", None),
        ("A\n", None),  # only spaces count
        ("B. It is so", None),  # a full stop inside is no space
        ("the B one", "B"),
        ("A or B", "B"),  # the last
        ("B or A", "A"),
        ("B A B", "B"),
        ("(A) or C", "A"),  # brackets go first
        ("(C), not (A)", "A"),
        ("(A), then (C), then (A)", "A"),
        ("(A", None),
        ("E", None),
        ("", None),
        ("one two three four red", None),  # five words
        ("one two three four five red", "A"),
        ("one two three four five RED FOX", "A"),  # both start at one place: the first
        ("red then a barn then a 12 end", "C"),
        ("red and 12 and a BARN at last", "D"),
        ("\ud800 \x00", None),
    ],
)
def test_choice(text: str, expected: str | None) -> None:
    assert choice(text, LETTERS, OPTIONS) == expected


def test_an_empty_option_is_in_every_long_text() -> None:
    assert choice("one two three four five six", ("A", "B"), {"A": "six", "B": ""}) == "B"
    assert choice("one two", ("A", "B"), {"A": "six", "B": ""}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", [5.0]),
        (" 5.678 ", [5.68]),
        ("1,000", [1000.0]),
        ("1,2,3", [123.0]),  # commas go, wherever they are
        ("1e5", [100000.0]),
        ("-.5", [-0.5]),
        ("1_000", [1000.0]),
        ("٣", [3.0]),
        ("2.675", [2.67]),  # as the float is
        ("inf", [math.inf]),
        ("1e999", [math.inf]),
        ("9" * 5000, [math.inf]),
        ("²", [" ²", "² "]),
        (".", [" .", ". "]),
        (",", [" ,", ", "]),
        ("", [""]),
        ("C", [" c", "c "]),
        ("MgS", ["mgs"]),
        ("5%", ["5%"]),
        ("\ud800x", ["\ud800x"]),
    ],
)
def test_normal(text: str, expected: list[str | float]) -> None:
    assert normal(text) == expected


def test_nan_is_a_number_that_equals_nothing() -> None:
    assert math.isnan(normal("NaN")[0])  # type: ignore[arg-type]
    assert not matches("nan", ["nan"])
    assert matches("inf", ["9" * 5000])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("...", [""]),
        ("Cat.", ["cat"]),
        ("The answer is 5 apples.", ["5 apples", 5.0]),
        ("So it is 5, thus the result is six", ["six"]),  # the shortest tail
        ("is \nis 7", [7.0, 7.0]),
        ("result is \n5", ["is"]),  # the empty tail of "is " gives way to the one of "result "
        ("x = 5", [5.0, 5.0]),
        ("x = 5\ny is 6", [6.0, 6.0]),  # "=" counts in the last line only
        ("x = 5\ny", ["x = 5\ny", 5.0]),
        ("it is .", ["it is"]),  # the full stop goes before the space is an end
        ("it is !", ["it is !"]),  # nothing but a mark is no tail
        ("it is ,.", ["it is ,"]),
        ("it is ?!", ["?!"]),
        ("c. Is it? It is C", [" c", "c "]),
        ("1,000 -.5 7.", ["1,000 -.5 7", 1000.0, 0.0, -0.5, 7.0]),  # a plain number may start after a comma,
        ("3e2 m", ["3e2 m", 300.0, 2.0]),  # or after an e
        ("-2,500.5", [-2500.5, -2500.0, 500.5]),
        ("12,34", [1234.0, 34.0]),
        ("1.55,", [1.55, 1.0]),  # a comma after it: only the digits before the point are plain
        ("5x 6", ["5x 6", 6.0]),
    ],
)
def test_statements(text: str, expected: list[str | float]) -> None:
    assert sorted(map(repr, statements(text))) == sorted(map(repr, expected))


@pytest.mark.parametrize(
    ("text", "truths", "expected"),
    [
        ("The answer is 1,060.004", ["1060"], True),
        ("1.0649", ["1.06"], True),
        ("1.066", ["1.06"], False),
        ("It is transformation, surely", ["Transformation"], True),
        ("trans", ["transformation"], False),
        ("Florida", ["Tampa", "Florida"], True),
        ("C", ["C"], True),
        ("a cat", ["C"], True),  # " c" is in it
        ("the mac", ["C"], False),
        ("the mac fell", ["C"], True),
        ("1/64", ["1/64"], True),
        ("64", ["1/64"], False),
        ("550 or 551", ["551"], True),
        ("551st", ["551"], False),
        ("x", [""], True),
        ("5", ["5 apples"], False),
        ("", ["5"], False),
    ],
)
def test_matches(text: str, truths: list[str], expected: bool) -> None:
    assert matches(text, truths) is expected


@given(text=ANY_TEXT, letters=st.integers(1, 9).map(lambda count: "ABCDEFGHI"[:count]))
def test_a_choice_is_one_of_the_choices(text: str, letters: str) -> None:
    found = choice(text, tuple(letters), {name: f"option {name}" for name in letters})
    assert found is None or found in letters


@given(name=st.sampled_from(LETTERS))
def test_a_parsed_letter_is_parsed_to_itself(name: str) -> None:
    assert choice(name, LETTERS, OPTIONS) == choice(f"({name})", LETTERS, OPTIONS) == name


@given(number=st.integers(-(10**9), 10**9), start=st.sampled_from(["", "The answer is ", "x = ", "so it could be "]))
def test_a_number_matches_itself_with_and_without_commas(number: int, start: str) -> None:
    assert matches(f"{start}{number}", [f"{number:,}"])
    assert matches(f"{start}{number:,}.", [str(number)])
    assert not matches(f"{start}{number}", [str(number + 1)])


@pytest.mark.parametrize("text", ["9" * 400_000 + "x", "1.1" * 150_000, "1,111" * 80_000 + "e", "is 5\n" * 80_000])
def test_long_texts_are_read_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    assert not matches(text, ["truth"])
    assert choice(text, LETTERS, {"A": "x y", "B": "y z", "C": "z a", "D": "a b"}) is None
    assert time.perf_counter() - start < 30  # a fifth of a second; in quadratic time it would be an hour
