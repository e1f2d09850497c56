"""maskft inspect: what is printed agrees with what was found, as tables and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from maskft.analysis import saved_masks, statistics
from maskft.cli.inspect import sparkline
from maskft.vlm.load import load_model
from tests.adapters.helpers import edit, saved, settings
from tests.adapters.test_commands import run  # noqa: F401 (a fixture)
from tests.tuner.models import masked, tiny_llava

Call = Any


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([None, 1.0]) == " █"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1.0] * 24 + [8.0] * 24) == "▂" * 12 + "█" * 12  # neighbours are averaged
    assert sparkline([*[None] * 24, *[7.0] * 6]) == " " * 12 + "███"


def test_one_adapter(run: Call, tmp_path: Path) -> None:  # noqa: F811
    folder = saved(tmp_path / "a", gate="soft")
    code, out, _ = run("inspect", folder, "--json")
    report = json.loads(out)
    assert code == 0
    (one,) = report["adapters"]
    assert report["overlaps"] == []
    expected = {mask.name: statistics(mask) for mask in saved_masks(folder)}
    assert one["layers"].keys() == {name.removeprefix("base_model.model.") for name in expected}
    assert one["layers"]["model.layers.1.mlp.up_proj"]["mean"] == pytest.approx(
        expected["base_model.model.model.layers.1.mlp.up_proj"].mean
    )
    assert one["overall"]["change"] is None
    code, out, _ = run("inspect", folder)
    assert code == 0
    for text in ("gate soft", "q_proj", "saturated", "language: distance by layer", "█"):
        assert text in out
    assert "change" not in out


def test_several_and_drift(run: Call, tmp_path: Path) -> None:  # noqa: F811
    a, b = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)
    for folder, seed in ((a, 1), (b, 2)):
        text = f"data: {{kind: easy-vqa}}\ntraining: {{seed: {seed}}}\n"
        (folder / "recipe.yaml").write_text(text)
    early = shutil.copytree(a, a / "checkpoints" / "checkpoint-3")
    edit(early, lambda content: [scores.mul_(0.1) for scores in content.values()])
    code, out, _ = run("inspect", a, b, "--drift", "--json")
    report = json.loads(out)
    assert code == 0
    (pair,) = report["overlaps"]
    assert (pair["a"], pair["b"], pair["relation"]) == (str(a), str(b), "seed")
    assert abs(pair["overlap"]["shared"] - pair["overlap"]["by_chance"]) < 5 * pair["overlap"]["deviation"]
    assert abs(pair["measures"]["correlation"]) < 0.1
    assert [step["step"] for step in report["adapters"][0]["drift"]] == [3]
    assert "drift" not in report["adapters"][1]
    code, out, _ = run("inspect", a, b, "--drift")
    assert code == 0
    for text in ("checkpoints", "what masks have in common", "by chance", "seed"):
        assert text in out


def test_a_base_tells_the_change(run: Call, tmp_path: Path) -> None:  # noqa: F811
    tiny_llava().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    masked(load_model(base, dtype="bfloat16"), gate="topk", keep_ratio=0.8).save_pretrained(tmp_path / "hard")
    masked(load_model(base, dtype="bfloat16"), gate="soft").save_pretrained(tmp_path / "soft")
    for name in ("hard", "soft"):
        settings(tmp_path / name, base_model_name_or_path=base)
    code, out, err = run("inspect", tmp_path / "hard", tmp_path / "hard", "--json")  # a topk mask needs the base
    report = json.loads(out)
    assert code == 0, err
    assert report["adapters"][0]["overall"]["kept"] == pytest.approx(0.8, abs=0.01)
    assert report["overlaps"][0]["overlap"]["shared"] == 1
    assert report["overlaps"][0]["measures"] is None
    code, out, err = run("inspect", tmp_path / "soft", "--rank")
    assert code == 0
    for text in ("loading the base", "change", "rank", "projector: linear_1"):
        assert text in out + err


def test_hard_masks_and_the_projector_alone(run: Call, tmp_path: Path) -> None:  # noqa: F811
    folder = saved(tmp_path / "a", gate="topk", bits=True, keep_ratio=0.7)
    code, out, _ = run("inspect", folder)
    assert code == 0
    assert "share kept by layer" in out
    base = tiny_llava()
    masked(base, scope=["projector"]).save_pretrained(tmp_path / "projector")
    code, out, _ = run("inspect", tmp_path / "projector")
    assert code == 0
    assert "language: " not in out


def test_mistakes(run: Call, tmp_path: Path) -> None:  # noqa: F811
    for arguments, message in (
        ((tmp_path,), "holds no adapter"),
        ((saved(tmp_path / "a"), saved(tmp_path / "b", base=3)), "trained on different bases"),
        ((), "Missing argument"),
    ):
        code, out, err = run("inspect", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
