"""`maskft export`: dtypes, shards, few bits, whole folders or none."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from maskft.adapters.export import export_merged
from maskft.data import Collator
from maskft.errors import RunError
from maskft.recipe import load_recipe
from maskft.runs import LoadedRun, load_data, load_run
from maskft.training import train
from tests.evaluation.tiny import tiny_base
from tests.faults.tiny_run import write_recipe
from tests.test_cli import call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a tiny model whose rows are as wide as a block of nf4."""
    folder = tmp_path_factory.mktemp("export")
    recipe = write_recipe(folder, save_strategy="no", max_steps=3, learning_rate=2.0)
    tiny_base(folder / "base", width=64)
    train(load_recipe(recipe), folder / "run")
    return folder / "run"


@pytest.fixture
def export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Calls the command into the folder `out` and returns what it prints."""

    def exported(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert call(monkeypatch, "export", run, tmp_path / "out", "--json", *options) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return exported


def probe_of(loaded: LoadedRun) -> dict[str, Any]:
    rows = load_data(loaded.recipe)["train"]
    return dict(Collator(loaded.processor, max_length=None).prompts([rows[0], rows[1]]))


def tuned_weights(run: Path) -> dict[str, Tensor]:
    return dict(load_run(run).model.merge_and_unload().state_dict())


def weights_in(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    return dict(model.state_dict())


def test_shards_and_their_index(run: Path, tmp_path: Path, export: Callable[..., dict[str, Any]]) -> None:
    report = export("--max-shard-size", "200KB")
    assert report["largest_logit_difference"] == report["largest_reload_difference"] == 0
    assert (report["dtype"], report["quantization"]) == ("float32", "none")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert report["bytes"] == sum(path.stat().st_size for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in shards for name in load_file(path)}
    assert held == index["weight_map"]
    written, expected = weights_in(tmp_path / "out"), tuned_weights(run)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "chat_template.jinja", "tokenizer.json", "processor_config.json"} <= files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_rounds_each_weight_to_the_nearest(
    dtype: str, run: Path, tmp_path: Path, export: Callable[..., dict[str, Any]]
) -> None:
    report = export("--dtype", dtype)
    assert report["largest_reload_difference"] == 0
    assert report["largest_logit_difference"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {dtype}
    written, expected = weights_in(tmp_path / "out"), tuned_weights(run)
    info = torch.finfo(getattr(torch, dtype))
    for name, weight in expected.items():
        assert written[name].dtype == getattr(torch, dtype)
        moved = (written[name].float() - weight).abs()
        assert (moved <= info.eps / 2 * weight.abs() + info.smallest_normal * info.eps / 2).all()


def test_what_the_command_says_of_rounding(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "export", run, tmp_path / "same") == 0
    assert "before merging and after reloading: 0 (bound: 0)" in capsys.readouterr().out
    assert call(monkeypatch, "export", run, tmp_path / "cast", "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "bfloat16 rounds a weight by at most 1/256 of itself" in said
    assert "as written and after reloading: 0 (bound: 0)" in said


@pytest.mark.parametrize(("quantize", "size"), [("nf4", 0.5), ("fp4", 0.5), ("int8", 1.0)])
def test_few_bits(quantize: str, size: float, run: Path, tmp_path: Path, export: Callable[..., dict[str, Any]]) -> None:
    report = export("--quantize", quantize)
    assert report["largest_reload_difference"] == 0
    assert report["largest_logit_difference"] > 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    expected = tuned_weights(run)
    (full,) = (weight for key, weight in expected.items() if key.endswith("layers.0.mlp.up_proj.weight"))
    assert stored[name].dtype in (torch.uint8, torch.int8)
    assert stored[name].numel() == size * full.numel()
    kept = [weight for key, weight in stored.items() if "vision" in key or "projector" in key or "lm_head" in key]
    assert kept
    assert all(weight.dtype == torch.float32 for weight in kept)
    assert not (tmp_path / "out" / "plain").exists()
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert f"language model is kept in {quantize}" in (tmp_path / "out" / "README.md").read_text()


def test_few_bits_by_torchao(run: Path, tmp_path: Path, export: Callable[..., dict[str, Any]]) -> None:
    report = export("--quantize", "int8-torchao")
    assert report["largest_reload_difference"] == 0
    assert report["largest_logit_difference"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"


def test_a_weight_beyond_float16_is_refused(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    loaded.model.get_base_model().lm_head.weight.data[0, 0] = 1e5
    with pytest.raises(
        RunError, match=r"'lm_head.weight' holds 100000, which is beyond torch.float16's largest number"
    ):
        export_merged(loaded.model, loaded.processor, tmp_path / "out", probe=probe_of(loaded), dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(run)

    def full_disk(*_: object, **__: object) -> None:
        assert any(tmp_path.glob(".out.part/*.safetensors"))  # weights are written, the processor is not
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(loaded.processor), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_merged(loaded.model, loaded.processor, tmp_path / "out", probe=probe_of(loaded))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dtype", "fp8"], "--dtype is 'fp8'; it must be one of float32, bfloat16, float16"),
        (["--quantize", "int4"], "--quantize is 'int4'; it must be one of nf4, fp4, int8, int8-torchao"),
        (["--max-shard-size", "5"], "max_shard_size is '5', but must be a whole number with KB, MB or GB"),
    ],
)
def test_mistaken_options(
    options: list[str],
    expected: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "export", run, tmp_path / "out", *options) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_few_bits_need_a_package(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("maskft.vlm.load.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    assert call(monkeypatch, "export", run, tmp_path / "out", "--quantize", "nf4") == 2
    assert "pip install 'maskft[quant]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
