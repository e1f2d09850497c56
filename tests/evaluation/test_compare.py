"""Paired comparison of answers on disk; no model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from maskft.cli import main
from maskft.errors import RunError
from maskft.evaluation.compare import compare_runs, compare_with_base, show_p
from maskft.evaluation.metrics import accuracy

Records = list[dict[str, Any]]


def record(number: int, tuned: str = "yes", **more: Any) -> dict[str, Any]:
    """A question about an image of its own, whose answer is yes."""
    return {
        "id": f"q{number}",
        "question": "Is it?",
        "image": f"/{number}.png",
        "truth": "yes",
        "base": "no",
        "tuned": tuned,
        **more,
    }


def answered(*blocks: tuple[int, str]) -> Records:
    """So many questions with each answer, in turn."""
    said = [tuned for count, tuned in blocks for _ in range(count)]
    return [record(number, tuned) for number, tuned in enumerate(said)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def _make(name: str, records: Sequence[dict[str, Any]], *, metric: str | None = None, split: str = "test") -> Path:
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        evaluation = f"evaluation: {{metric: {metric}}}\n" if metric else ""
        (run / "recipe.yaml").write_text("data: {kind: easy-vqa}\n" + evaluation)
        (run / f"answers-{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        return run

    return _make


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `maskft compare`; its exit code, stdout and stderr."""

    def _call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["maskft", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        shown = capsys.readouterr()
        return int(exit_.value.code or 0), shown.out, shown.err

    return _call


class TestTwoRuns:
    def test_one_is_better(self, make) -> None:
        a = make("a", answered((60, "yes"), (3, "yes"), (15, "no"), (22, "no")))
        b = make("b", answered((60, "yes"), (3, "no"), (15, "yes"), (22, "no")))
        found = compare_runs([a], [b])
        assert found.table == {"both": 60, "only_a": 3, "only_b": 15, "neither": 22}
        assert (found.questions, found.images) == (100, 100)
        assert (found.a.mean, found.b.mean) == (0.63, 0.75)
        assert found.difference == pytest.approx(0.12)
        assert found.p == pytest.approx(1976 / 2**18)  # 2 (1 + 18 + 153 + 816) / 2^18
        # standard deviation of the mean difference: sqrt((0.18 - 0.12^2) / 100)
        assert (found.low, found.high) == pytest.approx((0.12 - 1.96 * 0.0407, 0.12 + 1.96 * 0.0407), abs=0.01)
        assert found.better == "b"
        assert found.verdict.startswith("B is better: +12.0 points of exact match (95 % interval +")
        assert found.verdict.endswith("p = 0.008")

    def test_the_sides_change_places(self, make) -> None:
        a = make("a", answered((60, "yes"), (3, "yes"), (15, "no"), (22, "no")))
        b = make("b", answered((60, "yes"), (3, "no"), (15, "yes"), (22, "no")))
        there, back = compare_runs([a], [b]), compare_runs([b], [a])
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)
        assert (back.better, back.p) == ("a", there.p)
        assert back.verdict == there.verdict.replace("B is", "A is")

    def test_the_order_of_lines_does_not_matter(self, make) -> None:
        records = answered((30, "yes"), (30, "no"))
        a, b = make("a", records), make("b", answered((40, "yes"), (20, "no")))
        shuffled = make("c", records[::-1])
        there, again = compare_runs([a], [b]), compare_runs([shuffled], [b])
        assert (again.low, again.high, again.table, again.p) == (there.low, there.high, there.table, there.p)

    def test_not_told_apart(self, make) -> None:
        a = make("a", answered((60, "yes"), (3, "yes"), (5, "no"), (32, "no")))
        b = make("b", answered((60, "yes"), (3, "no"), (5, "yes"), (32, "no")))
        found = compare_runs([a], [b])
        assert found.better is None
        assert found.p == pytest.approx(2 * (1 + 8 + 28 + 56) / 2**8)
        assert found.verdict.startswith("not told apart: B is at +2.0 points of exact match (95 % interval -")

    def test_a_run_is_not_told_apart_from_itself(self, make) -> None:
        run = make("a", answered((60, "yes"), (40, "no")))
        found = compare_runs([run], [run])
        assert (found.difference, found.low, found.high, found.p, found.better) == (0, 0, 0, 1, None)

    def test_a_few_images_are_not_enough(self, make) -> None:
        """McNemar's test takes questions as independent; the questions about one image are not."""
        a = make("a", [record(n, "no", group=str(n % 19)) for n in range(95)])
        b = make("b", [record(n, "yes", group=str(n % 19)) for n in range(95)])
        found = compare_runs([a], [b])
        assert (found.images, found.low, found.better) == (19, 1.0, None)
        assert found.verdict.endswith("p < 0.001, but only 19 image(s)")

    def test_questions_about_one_image_are_drawn_together(self, make) -> None:
        alone_a, alone_b = answered((80, "yes"), (20, "no")), answered((90, "yes"), (10, "no"))
        together = [[{**one, "group": str(n // 5)} for n, one in enumerate(side)] for side in (alone_a, alone_b)]
        alone = compare_runs([make("a", alone_a)], [make("b", alone_b)])
        found = compare_runs([make("c", together[0])], [make("d", together[1])])
        assert (found.images, alone.images) == (20, 100)
        assert found.high - found.low > 1.8 * (alone.high - alone.low)  # sqrt(5) times as wide
        scores = accuracy([1.0] * 80 + [0.0] * 20, [f"group {n // 5}" for n in range(100)])
        assert (found.a.low, found.a.high) == (scores.by_image_low, scores.by_image_high)

    def test_graded_scores_have_no_table(self, make) -> None:
        a = [record(n, "red car", truth="a blue car") for n in range(40)]
        b = [record(n, "blue car", truth="a blue car") for n in range(40)]
        found = compare_runs([make("a", a, metric="f1")], [make("b", b, metric="f1")])
        assert (found.metric, found.a.mean, found.b.mean) == ("f1", 0.5, 1.0)
        assert (found.table, found.p, found.better) == (None, None, "b")
        assert found.verdict == "B is better: +50.0 points of token F1 (95 % interval +50.0 to +50.0)"

    def test_several_right_answers(self, make) -> None:
        records = [record(n, "red", answers=["blue", "red"]) for n in range(30)]
        found = compare_with_base([make("a", records)])
        assert (found.a.mean, found.b.mean) == (0.0, 1.0)

    def test_ids_may_repeat(self, make) -> None:
        a = [record(0, "yes"), record(0, "no"), record(0, "yes", question="Sure?")]
        found = compare_runs([make("a", a)], [make("b", a[::2] + a[1:2])])
        assert found.table == {"both": 2, "only_a": 0, "only_b": 0, "neither": 1}

    def test_rows_without_image_stand_alone(self, make) -> None:
        records = [record(n, image=None, group=None) for n in range(3)]
        assert compare_with_base([make("a", records)]).images == 3


class TestSeveralSeeds:
    def test_scores_are_averaged_over_runs(self, make) -> None:
        a = [make(f"a{seed}", answered((50 + seed, "yes"), (50 - seed, "no"))) for seed in (0, 1, 2)]
        b = [make(f"b{seed}", answered((80 + seed, "yes"), (20 - seed, "no"))) for seed in (0, 2)]
        found = compare_runs(a, b)
        assert (found.a.mean, found.b.mean) == pytest.approx((0.51, 0.81))
        assert found.a.runs == [str(run) for run in a]
        assert (found.table, found.p, found.better) == (None, None, "b")

    def test_runs_that_disagree_widen_the_interval(self, make) -> None:
        steady = [make(f"s{n}", answered((60, "yes"), (40, "no"))) for n in range(3)]
        apart = [make(f"d{n}", answered((60 + n, "yes"), (40 - n, "no"))) for n in (-30, 0, 30)]
        rest = [make(f"r{n}", answered((50, "yes"), (50, "no"))) for n in range(3)]
        narrow, wide = compare_runs(rest, steady), compare_runs(rest, apart)
        assert narrow.difference == pytest.approx(wide.difference)
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
        assert (narrow.better, wide.better) == ("b", None)

    def test_a_run_counts_once(self, make) -> None:
        run = make("a", answered((1, "yes")))
        with pytest.raises(RunError, match="is given twice on one side"):
            compare_runs([run, run], [run])


class TestErrors:
    def test_other_questions(self, make, call) -> None:
        a = make("a", [record(n) for n in range(14)])
        b = make("b", [*(record(n) for n in range(2, 14)), record(99)])
        code, out, err = call(a, b)
        assert (code, out) == (2, "")
        assert f"2 question(s) only in {a}, ids:\n  - q0\n  - q1\n1 question(s) only in {b}, ids:\n  - q99" in err

    def test_ids_are_counted_after_ten(self, make, call) -> None:
        code, _, err = call(make("a", answered((30, "yes"))), make("b", answered((2, "yes"))))
        assert code == 2
        assert "  - q11\n  ... and 18 more" in err

    @pytest.mark.parametrize("change", [{"truth": "no"}, {"answers": ["yes", "yeah"]}])
    def test_other_right_answers(self, make, call, change: dict[str, Any]) -> None:
        a, b = make("a", answered((3, "yes"))), make("b", [record(0), record(1, **change), record(2)])
        code, _, err = call(a, b)
        assert code == 2
        assert "1 question(s) with different right answers, ids:\n  - q1" in err
        assert "Evaluate both on the same data." in err

    def test_a_later_seed_is_checked_too(self, make, call) -> None:
        good = [make(name, answered((3, "yes"))) for name in "abc"]
        bad = make("d", answered((2, "yes")))
        code, _, err = call(f"{good[0]},{good[1]}", f"{good[2]}, {bad}")
        assert code == 2
        assert f"only in {good[0]}, ids:\n  - q2" in err

    def test_other_metrics(self, make, call) -> None:
        a, b = make("a", answered((3, "yes"))), make("b", answered((3, "yes")), metric="anls")
        code, _, err = call(a, b)
        assert code == 2
        assert "scored by different metrics" in err
        assert f"  - {b}: anls" in err

    def test_not_evaluated(self, make, call) -> None:
        run = make("a", answered((3, "yes")))
        code, _, err = call(run, "--base", "--split", "validation")
        assert code == 2
        assert f"Write it with: maskft evaluate {run} --split validation" in err

    def test_not_a_run(self, tmp_path: Path, call) -> None:
        code, _, err = call(tmp_path / "nowhere", "--base")
        assert code == 2
        assert "is not a run folder" in err

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "is empty"),
            (b"{\n", "line 1: not valid JSON"),
            (b"[]\n", "line 1: not an object"),
            (b'{"id": "a", "question": "b", "truth": 3, "base": ""}\n', "line 1: truth, tuned missing"),
            (b"\xff\n", "cannot be read"),
        ],
    )
    def test_damaged_answers(self, make, call, content: bytes, expected: str) -> None:
        run = make("a", [])
        (run / "answers-test.jsonl").write_bytes(content)
        code, _, err = call(run, "--base")
        assert code == 2
        assert expected in err

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["a"], "give two runs, or one with --base"),
            (["a", "b", "--base"], "give two runs, or one with --base"),
            (["a", ","], "names no run"),
            (["a", "b", "--split", "train"], "must be test or validation"),
        ],
    )
    def test_mistaken_arguments(self, call, arguments: list[str], expected: str) -> None:
        code, _, err = call(*arguments)
        assert code == 2
        assert expected in err


class TestOutput:
    def test_tables(self, make, call) -> None:
        a = make("a[b]", answered((60, "yes"), (3, "yes"), (15, "no"), (22, "no")))
        b = make("b", answered((60, "yes"), (3, "no"), (15, "yes"), (22, "no")))
        code, out, _ = call(a, b)
        assert code == 0
        for part in ("exact match on 100 test questions, 100 images", "a[b]", "63.0 %", "75.0 %", "+12.0", "B right"):
            assert part in out
        assert "B is better: +12.0 points" in out
        assert "one run a side" in out

    def test_json(self, make, call) -> None:
        run = make("a,b", answered((30, "yes"), (10, "no")), split="validation")
        code, out, err = call(run, "--base", "--split", "validation", "--json")
        shown = json.loads(out)
        assert code == 0
        assert shown["a"]["model"] == "base"
        assert shown["b"] == {
            "runs": [str(run)],
            "model": "tuned",
            "mean": 0.75,
            **{k: shown["b"][k] for k in ("low", "high")},
        }
        assert (shown["split"], shown["better"], shown["table"]["only_b"]) == ("validation", "b", 30)
        assert "base of" in err

    def test_several_seeds(self, make, call) -> None:
        runs = [make(name, answered((30, "yes"), (10, "no"))) for name in "ab"]
        code, out, _ = call(f"{runs[0]},{runs[1]}", "--base")
        assert code == 0
        assert "B right" not in out
        assert "one run a side" not in out
        assert "p = " not in out


def test_show_p() -> None:
    assert [show_p(p) for p in (1.0, 0.0341, 0.001, 0.00099)] == ["p = 1.000", "p = 0.034", "p = 0.001", "p < 0.001"]
