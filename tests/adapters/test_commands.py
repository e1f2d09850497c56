"""maskft pack, combine and distance: results on stdout, a user's mistakes with exit code 2 and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maskft.runs import read_metrics, run_recipe
from maskft.tuner import attach_saved
from maskft.vlm.load import load_model
from tests.test_cli import call
from tests.tuner.models import logits, masked, tiny_llava

from .helpers import WEIGHTS, gates, saved, settings

Call = Any


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command; return its exit code, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        code = call(monkeypatch, *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


class TestPack:
    def test_report(self, run: Call, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")
        code, out, _ = run("pack", source, tmp_path / "out", "--storage", "int4", "--json")
        report = json.loads(out)
        assert code == 0
        assert report["storage"] == "int4"
        assert report["bytes_after"] == (tmp_path / "out" / WEIGHTS).stat().st_size
        assert 0 < report["gate_error_rms"] < report["gate_error_max"]
        code, out, _ = run("pack", tmp_path / "out", tmp_path / "full", "--storage", "float32")
        assert code == 0
        assert "bits each" in out
        assert f"packed   {tmp_path / 'full'}" in out

    def test_options(self, run: Call, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")
        code, _, _ = run("pack", source, tmp_path / "out", "--storage", "int8", "--keep-scores", "--forget-base")
        assert code == 0
        assert (tmp_path / "out" / "scores.safetensors").is_file()
        assert settings(tmp_path / "out")["base_fingerprint"] is None

    @pytest.mark.parametrize("recipe", [True, False])
    def test_topk_loads_the_base(self, recipe: bool, run: Call, tmp_path: Path) -> None:
        tiny_llava().to(torch.bfloat16).save_pretrained(tmp_path / "base")
        base = load_model(str(tmp_path / "base"), dtype="bfloat16")
        masked(base, gate="topk", keep_ratio=0.8).save_pretrained(tmp_path / "source")
        arguments = ["pack", tmp_path / "source", tmp_path / "out", "--storage", "bits"]
        if recipe:
            settings(tmp_path / "source", base_model_name_or_path="nowhere")
            text = f"model: {{base: '{tmp_path / 'base'}'}}\nmethod: {{gate: topk}}\ndata: {{kind: easy-vqa}}\n"
            (tmp_path / "source" / "recipe.yaml").write_text(text)
            (tmp_path / "source" / "metrics.json").write_text('{"train": {"steps": 3}, "tuned": {"accuracy": 1}}')
        code, out, err = run(*arguments)
        assert code == 0, err
        assert "gates change" not in out
        fresh = [load_model(str(tmp_path / "base"), dtype="bfloat16") for _ in range(2)]
        before, after = (
            attach_saved(model, tmp_path / name).eval() for model, name in zip(fresh, ("source", "out"), strict=True)
        )
        assert torch.equal(logits(before), logits(after))
        if recipe:  # a run of its own, without scores of the other
            assert run_recipe(tmp_path / "out") == run_recipe(tmp_path / "source")
            assert read_metrics(tmp_path / "out") == {"train": {"steps": 3}}
            assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()

    def test_mistakes(self, run: Call, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="topk")
        settings(source, base_model_name_or_path=None)
        for arguments, message in (
            ((source, tmp_path / "out", "--storage", "int4"), "storage is 'int4' with the gate 'topk'"),
            ((source, tmp_path / "out", "--storage", "bits"), "names no base"),
            ((source, source, "--storage", "float32"), "already exists"),
            ((tmp_path / "none", tmp_path / "out", "--storage", "int4"), "holds no adapter"),
            ((source, tmp_path / "out"), "Missing option '--storage'"),
        ):
            code, out, err = run("pack", *arguments)
            assert (code, out) == (2, "")
            assert message in err
            assert "Traceback" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


class TestCombine:
    def test_union(self, run: Call, tmp_path: Path) -> None:
        a, b = (saved(tmp_path / str(seed), seed=seed, gate="threshold", init_gate=0.6) for seed in (1, 2))
        code, out, err = run("combine", "union", a, b, "--output", tmp_path / "out")
        assert (code, err) == (0, "")
        assert "union of 2 adapters: gate threshold, 14 layers" in out
        first, second = gates(a), gates(b)
        assert all(torch.equal(m, torch.maximum(first[n], second[n])) for n, m in gates(tmp_path / "out").items())

    def test_clipping_and_a_missing_fingerprint_are_told(self, run: Call, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a", gate="centered", modules="attn"), saved(tmp_path / "b", gate="centered")
        arguments = ["combine", "product", a, b, "--output", tmp_path / "out", "--weights", "1,1.5", "--gate", "soft"]
        code, out, err = run(*arguments, "--json")
        report = json.loads(out)
        assert code == 0
        assert report["gate"] == "soft"
        assert f"{report['clipped']:,} of {report['scores']:,} gates" in err
        assert report["base_fingerprint"] is None
        assert "carries no fingerprint of its base" in err

    def test_mistakes(self, run: Call, tmp_path: Path) -> None:
        a = saved(tmp_path / "a")
        for arguments, message in (
            (("unite", a, a), "the operation is 'unite'"),
            (("product", a), "two adapters or more"),
            (("union", a, a), "union is for hard masks"),
            (("product", a, a, "--weights", "1;2"), "--weights is '1;2'; write numbers separated by commas"),
            (("product", a, tmp_path / "none"), "holds no adapter"),
        ):
            code, out, err = run("combine", *arguments, "--output", tmp_path / "out")
            assert (code, out) == (2, "")
            assert message in err
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


class TestDistance:
    def test_json(self, run: Call, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a", gate="soft"), saved(tmp_path / "b", seed=2, gate="soft")
        code, out, _ = run("distance", a, b, "--json")
        report = json.loads(out)
        assert code == 0
        assert len(report["layers"]) == 14
        assert 0 < report["overall"]["mean_difference"] < report["overall"]["largest_difference"] < 1

    def test_table(self, run: Call, tmp_path: Path) -> None:
        hard = saved(tmp_path / "hard", gate="threshold")
        soft = saved(tmp_path / "soft")
        assert "Jaccard" in run("distance", hard, hard)[1]
        code, out, _ = run("distance", soft, hard)
        assert code == 0
        assert "all" in out
        assert "Jaccard" not in out

    def test_mistakes(self, run: Call, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a"), saved(tmp_path / "b", base=2)
        code, out, err = run("distance", a, b)
        assert (code, out) == (2, "")
        assert "trained on different bases" in err
