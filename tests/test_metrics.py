"""Scores of single answers by hand, Wilson's interval, the blind guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.evaluation.metrics import (
    METRIC_TITLES,
    METRICS,
    Accuracy,
    accuracy,
    anls,
    answer_type,
    blind_guesses,
    choice,
    exact,
    exact_match,
    levenshtein,
    option_letter,
    token_f1,
    vqa,
    wilson_interval,
)
from maskft.recipe import EvaluationSection

TEXTS = st.text(st.sampled_from("aAbB12 .,'-ßé\n"), max_size=12)
REFERENCES = st.lists(TEXTS, min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("correct", "examples", "low", "high"),
    [
        # z^2 = 3.841459: middle (p + z^2/2n) / (1 + z^2/n), half z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),  # z^2 / (n + z^2)
        (10, 10, 0.7224672, 1.0),
        (1, 2, 0.0945312, 0.9054688),
        (50, 100, 0.4038315, 0.5961685),
        (0, 1, 0.0, 0.7934507),
    ],
)
def test_wilson_interval(correct: int, examples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, examples) == pytest.approx((low, high), abs=1e-6)


@given(examples=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_within_bounds(examples: int, share: float) -> None:
    correct = round(share * examples)
    low, high = wilson_interval(correct, examples)
    assert 0 <= low <= correct / examples + 1e-12
    assert correct / examples - 1e-12 <= high <= 1
    mirrored = wilson_interval(examples - correct, examples)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_zero_z_gives_the_share_itself() -> None:
    assert wilson_interval(3, 4, z=0.0) == (0.75, 0.75)


@pytest.mark.parametrize(
    ("truth", "expected"),
    [("Yes.", "yes/no"), (" no ", "yes/no"), ("12", "number"), ("12 cats", "other"), ("none", "other"), ("", "other")],
)
def test_answer_type(truth: str, expected: str) -> None:
    assert answer_type(truth) == expected


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("yes", "yes"),
        ("Yes", "yes"),
        (" yes \n", "yes"),
        ("yes.", "yes"),
        ("Yes. ", "yes."),
        ("yes .", "YES"),
        ("", ""),
    ],
)
def test_exact_match(answer: str, truth: str) -> None:
    assert exact_match(answer, truth)
    assert exact_match(truth, answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("yes, it is", "yes"), ("no", "yes"), ("", "yes"), ("y es", "yes"), ("yes!", "yes"), ("1.5", "15")],
)
def test_no_match(answer: str, truth: str) -> None:
    assert not exact_match(answer, truth)


def test_accuracy() -> None:
    result = accuracy([True] * 8 + [False] * 2)
    low, high = wilson_interval(8, 10)
    assert result == Accuracy(accuracy=0.8, low=low, high=high, correct=8, examples=10)


def test_graded_scores_get_a_bootstrap_interval() -> None:
    result = accuracy([0.5, 1.0, 0.0, 0.5] * 5)
    assert (result.accuracy, result.correct, result.examples) == (0.5, 5, 20)
    # the mean of 20 draws has a standard deviation of sqrt(0.125 / 20) = 0.079
    assert (result.low, result.high) == pytest.approx((0.5 - 1.96 * 0.079, 0.5 + 1.96 * 0.079), abs=0.015)
    assert result.by_image_low is None


def test_images_are_drawn_whole() -> None:
    """Four questions about each of ten images, all right or all wrong: as if there were ten questions."""
    scores, groups = [1.0] * 20 + [0.0] * 20, [f"{number // 4}" for number in range(40)]
    result = accuracy(scores, groups)
    assert (result.low, result.high) == wilson_interval(20, 40)
    assert (result.by_image_low, result.by_image_high) == (0.2, 0.8)  # binomial(10, 1/2): 2 and 8 of 10


def test_the_blind_guess() -> None:
    questions = ["shape?", "shape?", "shape?", "red?", "red?", "any?"]
    answers = ["circle", "circle", "square", "no", "no", "no"]
    asked = ["shape?", "red?", "never seen?"]
    # the most frequent answer to the question, or the most frequent of all
    assert blind_guesses(questions, answers, asked) == ["circle", "no", "no"]


def test_the_blind_guess_wants_an_answer_to_each_question() -> None:
    with pytest.raises(ValueError, match="zip"):
        blind_guesses(["a"], ["b", "c"], ["a"])


def test_exact_takes_any_reference() -> None:
    assert exact("Yes.", ["no", "yes"]) == 1.0
    assert exact("maybe", ["no", "yes"]) == 0.0


@pytest.mark.parametrize(
    ("matches", "score"),
    # of ten people, leaving each out: m matching ones see m - 1 others, the rest m; min(1, others / 3), averaged
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_with_ten_references(matches: int, score: float) -> None:
    references = ["Two"] * matches + [f"other {number}" for number in range(10 - matches)]
    assert vqa("2", references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("A red car!", ["red car"], 1.0),  # one reference: normalised texts are equal or not
        ("blue", ["red car"], 0.0),
        ("red", ["red", "blue"], 0.5),  # leaving out red: 0 of 1; leaving out blue: 1 of 1
        ("red", ["red", "red"], 1.0),
        ("red", ["red", "red", "blue"], 2 / 3),  # 1 of 2, 1 of 2, 2 of 2
        ("red", ["red", "red", "red", "blue"], (3 * 2 / 3 + 1) / 4),
        ("red", ["red", "blue", "blue", "blue"], 3 * (1 / 3) / 4),
        ("red", [], 0.0),
    ],
)
def test_vqa_with_fewer_references(answer: str, references: list[str], score: float) -> None:
    assert vqa(answer, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("12 March", ["12  march "], 1.0),  # neither case nor space counts
        ("12 Marsh", ["12 march"], 7 / 8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),  # one half is kept
        ("abcd", ["axyz"], 0.0),  # one quarter is below it
        ("a", ["abc"], 0.0),
        ("red", ["blue", "rad"], 2 / 3),  # the best reference
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("straße", ["strasse"], 1 - 2 / 7),
        ("ß", ["s"], 0.5),  # lengths are measured in upper case, "SS",
        ("  ab", ["xb"], 0.75),  # and with their space
        ("abc ", ["x  "], 0.0),
        ("İ", ["x"], 0.0),  # lower case has two letters
        ("x", [], 0.0),
    ],
)
def test_anls(answer: str, references: list[str], score: float) -> None:
    assert anls(answer, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("The red car.", ["a Red  car"], 1.0),  # no articles, punctuation or case
        ("red car", ["blue car"], 0.5),
        ("a big red car", ["red car"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("red red", ["red car"], 0.5),  # a word counts as often as it is in both
        ("cat", ["dog", "the cat sat"], 2 * 1 * 0.5 / 1.5),
        ("the", ["a"], 1.0),  # no word is left of either
        ("the", ["cat"], 0.0),
        ("cat", ["dog"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_token_f1(answer: str, references: list[str], score: float) -> None:
    assert token_f1(answer, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b. ", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B. A red car", "B"),
        ("(b) red", "B"),
        ("B: red", "B"),
        ("**B.** red", "B"),
        ("**B**. red", "B"),
        ("The answer is B because A is wrong.", "B"),
        ("The correct answer is (C), as said.", "C"),
        ("Answer: d", "D"),
        ("The answer is a.", "A"),
        ("I choose option E", "E"),
        ("The correct option is: C", "C"),
        ("option A, so the answer is A", "A"),
        ("option A or option B", None),
        ("A red car", None),
        ("the answer is a red car", None),
        ("The answer is I'm not sure", None),
        ("e.g. a car", None),
        ("U.S. flag", None),
        ("AB", None),
        ("answers B", None),
        ("3", None),
        ("", None),
    ],
)
def test_option_letter(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


def test_choice() -> None:
    assert choice("The answer is (B).", ["B"]) == 1.0
    assert choice("b", ["A", "B. red"]) == 1.0
    assert choice("A", ["B"]) == 0.0
    assert choice("red", ["red"]) == 0.0  # no letter on either side


@pytest.mark.parametrize(
    ("a", "b", "edits"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)]
)
def test_levenshtein(a: str, b: str, edits: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == edits


@given(a=TEXTS, b=TEXTS, c=TEXTS)
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@pytest.mark.parametrize("name", METRICS)
class TestEveryMetric:
    @given(answer=st.text(max_size=30) | TEXTS, references=st.lists(st.text(max_size=30) | TEXTS, max_size=6))
    def test_lies_between_0_and_1(self, name: str, answer: str, references: list[str]) -> None:
        score = METRICS[name](answer, references)
        assert isinstance(score, float)
        assert 0 <= score <= 1

    @given(answer=TEXTS, references=REFERENCES, data=st.data())
    def test_ignores_the_order_of_references(self, name: str, answer: str, references: list[str], data) -> None:
        shuffled = data.draw(st.permutations(references))
        assert METRICS[name](answer, shuffled) == pytest.approx(METRICS[name](answer, references), abs=1e-12)

    @given(a=TEXTS, b=TEXTS)
    def test_is_symmetric_in_answer_and_a_single_reference(self, name: str, a: str, b: str) -> None:
        assert METRICS[name](a, [b]) == METRICS[name](b, [a])

    def test_full_agreement_is_1(self, name: str) -> None:
        for count in range(1, 12):
            assert METRICS[name]("B", ["B"] * count) == 1.0

    def test_can_be_chosen_in_a_recipe_and_has_a_title(self, name: str) -> None:
        assert EvaluationSection(metric=name).metric == name
        assert name in METRIC_TITLES
