"""Analyses of runs by name, from folders to JSON, and the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from maskft.analysis import attribution
from maskft.analysis.attribution import ANALYSES, OF_ONE
from maskft.analysis.bound import learnt_bits, occam_bound
from maskft.analysis.forgetting import Text, compared, cut, forgetting, read_text, reference_text, surprise
from maskft.analysis.gap import at_level, common_level, gaps, read_curves, smoothed
from maskft.data import answer
from maskft.data.easy_vqa import COLORS, load_easy_vqa
from maskft.errors import DataError, RunError
from maskft.vlm.load import load_model
from tests.adapters.helpers import edit
from tests.analysis.runs import make_log, make_pair
from tests.test_cli import call


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "a"))


def test_bound(run: Path) -> None:
    (found,) = ANALYSES["bound"]([run])["runs"]
    assert (found["questions"], found["images"]) == (20, 10)
    assert found["training_error"] == pytest.approx(0.1)  # both questions of one picture in ten
    assert found["test_error"] == pytest.approx(0.3)
    assert found["blind_error"] == pytest.approx(0.5)
    expected = occam_bound(learnt_bits(run)["total"], 10, found["training_error"])
    assert (found["kl"], found["hoeffding"]) == (expected.kl, expected.hoeffding)
    assert found["says_something"] is False
    assert found["hoeffding"] > 1
    assert occam_bound(found["bits"], found["images_needed"], 0.1).kl <= 0.5
    (run / "answers-test.jsonl").unlink()
    assert "test_error" not in OF_ONE["bound"](run)
    (run / "answers-train.jsonl").unlink()
    with pytest.raises(RunError, match=r"maskft evaluate .* --split train"):
        OF_ONE["bound"](run)


def test_drift(run: Path) -> None:
    with pytest.raises(RunError, match=r"has 0 checkpoint\(s\).*save_steps"):
        OF_ONE["drift"](run)
    for step, share in ((4, 0.5), (8, 0.75)):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(run / name, folder / name)
        edit(folder, lambda content, share=share: [scores.mul_(share) for scores in content.values()])
    found = OF_ONE["drift"](run)
    assert [one["step"] for one in found["checkpoints"]] == [4, 8]
    assert found["first_with_last"] == pytest.approx(1.0)
    first, last = found["checkpoints"]
    assert first["since_last_one"] is None
    assert last["since_last_one"] == pytest.approx(first["to_last"])
    assert last["from_start"] > first["from_start"] > 0


def test_agreement(pair: tuple[Path, Path], run: Path) -> None:
    found = ANALYSES["agreement"](list(pair))
    (one,) = found["pairs"]
    assert one["relation"] == "seed"
    assert (found["shared"], found["by_chance"]) == (one["shared"], one["by_chance"])
    assert abs(one["deviations"]) < 5
    assert abs(one["correlation"]) < 0.1
    assert len(one["by_layer"]) == len(found["runs"][0]["distance_by_layer"]) == 2
    (same,) = ANALYSES["agreement"]([pair[0], run])["pairs"]
    assert (same["shared"], same["relation"]) == (1.0, "repeat")
    assert same["deviations"] > 50
    assert same["by_layer"] == [1.0, 1.0]
    with pytest.raises(RunError, match="two or more"):
        ANALYSES["agreement"]([run])
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("{name: mask}", "{name: projector}"))
    with pytest.raises(RunError, match="has no mask: its method is 'projector'"):
        ANALYSES["agreement"]([pair[0], run])


def test_forgetting(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = forgetting(pair[0], Text("red circle <image> what shape? " * 200, "a test"))
    assert found["perplexity_base"] != found["perplexity_tuned"]
    assert found["nats_lost"] == pytest.approx(math.log(found["perplexity_tuned"] / found["perplexity_base"]))
    assert found["tokens"] == found["windows"] * 255
    assert (found["text"], len(found["sha256"])) == ("a test", 64)
    with pytest.raises(DataError, match="at least 256 are needed"):
        forgetting(pair[0], Text("red", "a test"))
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"text\.txt cannot be read"):
        read_text(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("Etwas.")
    assert read_text(tmp_path / "text.txt") == Text("Etwas.", str(tmp_path / "text.txt"))


def test_the_reference_text_is_long_and_the_same_each_time() -> None:
    text = reference_text()
    assert len(text.content) > 100_000
    assert text == reference_text()
    assert "import" in text.content
    assert text.source.startswith("pydoc_data.topics of Python 3.")


def test_surprise_is_the_models_own_loss(pair: tuple[Path, Path]) -> None:
    model = load_model(str(pair[0].parent / "base"), dtype="float32")
    ids = torch.randint(5, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    assert surprise(model, ids.tolist(), batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_windows_are_spread_and_do_not_overlap() -> None:
    assert cut(range(100), 10, 3) == [list(range(s, s + 10)) for s in (0, 30, 60)]
    assert cut(range(29), 10, 5) == [list(range(10)), list(range(10, 20))]


def test_differences_are_of_the_same_windows() -> None:
    found = compared([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert found["nats_lost"] == pytest.approx(0.5)
    assert found["standard_error"] == pytest.approx(0.0)
    assert found["perplexity_base"] == pytest.approx(math.exp(2))
    assert compared([1.0], [1.0])["standard_error"] == math.inf


def test_gap_at_equal_training_loss(pair: tuple[Path, Path]) -> None:
    a, b = pair
    make_log(a, [3.0, 2.0, 1.0, 0.5, 0.5], {10: 3.0, 30: 2.0, 50: 1.5})
    make_log(b, [3.0, 2.5, 2.0, 2.0, 2.0], {})
    found = gaps([a, b])
    assert found["level"] == pytest.approx(2.3)  # the mean of all five: what b reaches
    first, second = found["runs"]
    assert (first["step"], second["step"]) == (30, 50)
    assert first["training"] == pytest.approx(2.0)
    assert first["gap"] == pytest.approx(0.0)
    assert first["last"] == pytest.approx(1.5 - 1.4)
    assert (second["held_out"], second["gap"], second["last"]) == (None, None, None)
    assert first["accuracy_gap"] is None
    scores = {"tuned": {"accuracy": 0.75}, "answers-train": {"tuned": {"accuracy": 0.9}}}
    (a / "metrics.json").write_text(json.dumps(scores))
    assert gaps([a])["runs"][0]["accuracy_gap"] == pytest.approx(0.15)
    (a / "metrics.json").unlink()


def test_curves() -> None:
    assert smoothed({1: 4.0, 2: 2.0, 3: 0.0}, 2) == {1: 4.0, 2: 3.0, 3: 1.0}
    assert common_level([{1: 2.0, 2: 1.0}, {1: 0.5}]) == 1.5
    assert at_level({1: 2.0}, {}, 1.0) is None
    between = [at_level({step: 0.0}, {10: 1.0, 20: 3.0}, 1.0) for step in (5, 10, 15, 25)]
    assert [point.held_out for point in between if point] == [1.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("text", [None, "[", "[1]", '[{"loss": 1}]', '[{"step": 1, "eval_loss": 2}]'])
def test_damaged_logs(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "log.json").write_text(text)
    with pytest.raises(RunError, match="log"):
        read_curves(tmp_path)


def test_captions(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = OF_ONE["captions"](run, images=6)
    assert (found["images"], found["images_of_training"]) == (6, 0)
    assert found["exact_base"] == found["named_base"] == 0.0  # of random weights

    truths = [answer(row) for row in load_easy_vqa("captions", limits={"test": 3})["test"]]
    other = next(color for color in COLORS if color not in truths[1])
    said = iter(
        [
            [truth.replace("A ", "I see a ") for truth in truths],
            [truths[0], f"{truths[1]} And a {other} one.", truths[2].split()[1]],
        ]
    )
    monkeypatch.setattr("maskft.analysis.captions.generate_answers", lambda *_, **__: next(said))
    found = OF_ONE["captions"](run, images=3)
    assert (found["exact_base"], found["named_base"]) == (0.0, 1.0)
    assert (found["exact_tuned"], found["named_tuned"]) == (1 / 3, 1 / 3)  # one has another colour too, one no shape


def test_probes(pair: tuple[Path, Path]) -> None:
    found = OF_ONE["probes"](pair[0])
    assert [one["question"] for one in found["attributes"]] == ["What colour?", "Is it red?"]
    colour = found["attributes"][0]
    assert (colour["answers"], colour["train"], colour["test"]) == (3, 36, 24)
    assert colour["majority"] == pytest.approx(1 / 3)
    for place in ("image", "last"):
        base, tuned = (colour["layers"][place][name] for name in ("base", "tuned"))
        assert len(base) == len(tuned) == 3
        assert all(0 <= value <= 1 for value in base + tuned)
    means = [sum(one["layers"]["image"]["base"]) / 3 for one in found["attributes"]]
    assert found["image_base"] == pytest.approx(sum(means) / 2)
    assert found["majority"] == pytest.approx(sum(one["majority"] for one in found["attributes"]) / 2)
    assert colour["layers"]["image"]["base"][0] > 0.8  # the vision tower tells colours apart


def test_nothing_to_probe_for(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace(", test: ", ", validation: "))
    with pytest.raises(RunError, match="nothing to probe for"):
        OF_ONE["probes"](run)


def test_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "analyse", "bound", run, "--json", "--output", "bound.json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "bound.json").read_text())
    assert said["runs"][0]["images"] == 10
    assert call(monkeypatch, "analyse", "bound", run) == 0
    shown = capsys.readouterr().out
    for text in (f"bound: {run}", "says something", "no", "training error", "0.1"):
        assert text in shown
    made = {
        "level": 0.5,
        "runs": [{"run": "r", "of": [{"question": "What?", "layers": {"image": [0.1, 0.9]}}], "none": [None]}],
        "pairs": [{"a": "x", "b": "y", "shared": None}],
    }
    monkeypatch.setitem(attribution.ANALYSES, "gap", lambda runs: made)
    assert call(monkeypatch, "analyse", "gap", run) == 0
    shown = capsys.readouterr().out
    for text in ("level  0.5", "gap: r", "What?: layers, image", "0.1 to 0.9", "gap: x and y", "none"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bond", "r"],
            "there is no analysis 'bond'; there are agreement, gap, bound, captions, drift, forgetting",
        ),
        (["bound", "nowhere"], "nowhere is not a run folder"),
        (["bound", "r", "--output", "no/where.json"], "its folder does not exist"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "analyse", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
