"""Masks and their peers through one path: training, saving, loading, the base again, merging, resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import maskft.training
from maskft.adapters.export import export_merged
from maskft.data import Collator
from maskft.errors import AdapterError, ModelError, RecipeError
from maskft.evaluation.candidates import find_candidate, wearing
from maskft.evaluation.evaluate import evaluate_run
from maskft.learnt import ADAPTER, TRAINED, result_name
from maskft.methods import LoraMethod, MaskMethod
from maskft.preview import preview
from maskft.recipe import load_recipe
from maskft.runs import LoadedRun, load_data, load_run
from maskft.training import train
from maskft.vlm.load import load_model
from tests.evaluation.tiny import tiny_base
from tests.faults.tiny_run import write_recipe
from tests.test_cli import call

PROJECTOR = "scope: [language], train_projector: true"
METHODS = {
    "mask": "{name: mask, gate: centered}",
    "mask and projector": f"{{name: mask, gate: centered, {PROJECTOR}}}",
    "random mask": "{fixed: random, keep_ratio: 0.5}",
    "magnitude mask": "{fixed: magnitude, keep_ratio: 0.5}",
    "lora": "{name: lora, rank: 2, alpha: 4}",
    "rslora": "{name: lora, rank: 2, variant: rslora, dropout: 0.1}",
    "dora": "{name: lora, rank: 2, variant: dora}",
    "lora and projector": f"{{name: lora, rank: 2, {PROJECTOR}}}",
    "unilora": "{name: unilora, rank: 2, vector_length: 100}",
    "hira": "{name: hira, rank: 2}",
    "full": "{name: full}",
    "full attention": "{name: full, scope: [language], modules: attn, layers: '1'}",
    "full by name": "{name: full, target_modules: [embed_tokens, lm_head]}",
    "projector": "{name: projector}",
}
QUICK = ("random mask", "lora and projector", "unilora", "full")
FIXED = ("random mask", "magnitude mask")
LAYER = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "gate": (32, 16), "up": (32, 16), "down": (16, 32)}
"""Shapes (out, in) of a layer of the tiny language model, which has two."""
PROJECTION = {"linear_1": (16, 16), "linear_2": (16, 16)}
WEIGHTS = 2 * sum(o * i for o, i in LAYER.values())
ENDS = 2 * sum(o + i for o, i in LAYER.values()) + sum(o + i for o, i in PROJECTION.values())
PROJECTOR_SIZE = 2 * (16 * 16 + 16)
COUNTS = {
    "mask": WEIGHTS + 2 * 16 * 16,
    "mask and projector": WEIGHTS + PROJECTOR_SIZE,
    "random mask": 0,
    "magnitude mask": 0,
    "lora": 2 * ENDS,
    "rslora": 2 * ENDS,
    "dora": 2 * ENDS + 2 * sum(o for o, _ in LAYER.values()) + 32,
    "lora and projector": 2 * (ENDS - 64) + PROJECTOR_SIZE,
    "unilora": 100,
    "hira": 2 * ENDS,
    "full attention": sum(o * i for name, (o, i) in LAYER.items() if name in "qkvo"),
    "projector": PROJECTOR_SIZE,
}
BOUNDS = {"mask": 0.0, "mask and projector": 0.0, "random mask": 0.0, "magnitude mask": 0.0}
"""Largest difference of logits by merging: masks and whole weights are what was computed with. Others compute beside
the weights, so that sums round otherwise: some units in the last place of fp32 at logits of up to about 10."""
ROUNDING = 1e-4
AGAIN = 1e-5
"""Of the same computation on tensors that lie elsewhere: kernels of a CPU may sum by alignment."""


@dataclass(frozen=True)
class Trained:
    """A finished run, with what its model's frozen tensors were when training was over, by their names in the base."""

    folder: Path
    frozen: dict[str, Tensor]
    metrics: dict[str, Any]
    run: LoadedRun
    probe: dict[str, Tensor]

    def logits(self, model: Any) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(**self.probe).logits
        return logits


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe in float32, whose test part is its training part on other images' terms."""
    return write_recipe(tmp_path_factory.mktemp("methods") / "recipe", max_steps=3, learning_rate=0.01)


def some(names: Iterable[str]) -> list[Any]:
    """Methods as parameters; those that are close to others, or compile kernels, are slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", params=some(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(name: str, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    frozen: dict[str, Tensor] = {}
    save = maskft.training.save_result

    def watched(method: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad and (key := _base_name(key)):
                frozen[key] = parameter.detach().clone()
        save(method, model, *args, **kwargs)

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskft.training, "save_result", watched)
        metrics = train(load_recipe(recipe, [f"method={METHODS[name]}"]), folder)
    run = load_run(folder)
    rows = load_data(run.recipe)["train"]
    probe = Collator(run.processor, max_length=None).prompts([rows[0], rows[1]])
    return Trained(folder, frozen, metrics, run, dict(probe))


def _base_name(name: str) -> str:
    """A parameter's name in the base; empty for those of adapters."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    return "" if any(piece in name for piece in ("mask_", "lora_", "hira_", "modules_to_save")) else name


def base(trained: Trained) -> Any:
    return load_model(trained.run.recipe.model.base, dtype="float32")


def test_trains_what_it_should_and_nothing_else(name: str, trained: Trained) -> None:
    steps = 0 if name in FIXED else 3
    assert trained.metrics["train"]["steps"] == steps
    if steps:
        log = json.loads((trained.folder / "log.json").read_text())
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == 3
        assert torch.tensor(losses).isfinite().all()
    else:
        assert trained.metrics["train"]["loss"] is None
    assert trained.frozen
    before = dict(base(trained).named_parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in trained.frozen.items())
    if name in COUNTS:
        assert trained.metrics["train"]["trainable_parameters"] == COUNTS[name]
    if name == "full":
        vision = sum(p.numel() for key, p in before.items() if "vision_tower" in key)
        assert trained.metrics["train"]["trainable_parameters"] == sum(p.numel() for p in before.values()) - vision


def test_comes_back_from_disk_with_its_base_beneath(name: str, trained: Trained) -> None:
    untouched = trained.logits(base(trained))
    tuned = trained.logits(trained.run.model)
    assert (trained.folder / result_name(trained.run.recipe.method)).is_file()
    assert not torch.equal(tuned, untouched)
    with trained.run.base() as bare:
        assert torch.equal(trained.logits(bare), untouched)
    assert (trained.logits(trained.run.model) - tuned).abs().max() <= AGAIN


def test_is_worn_and_taken_off(name: str, trained: Trained) -> None:
    model = base(trained)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with wearing(model, find_candidate(str(trained.folder))) as worn:
        assert (trained.logits(worn) - trained.logits(trained.run.model)).abs().max() <= AGAIN
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_merged_is_unmerged(name: str, trained: Trained, tmp_path: Path) -> None:
    run = load_run(trained.folder)
    difference = export_merged(run.model, run.processor, tmp_path / "merged", probe=trained.probe).difference
    whole = result_name(run.recipe.method) != ADAPTER
    assert difference <= (0.0 if whole else BOUNDS.get(name, ROUNDING))


def test_goes_on_where_it_stopped(name: str, recipe: Path, trained: Trained, tmp_path: Path) -> None:
    """Up to the checkpoint of step 2 and on from there, the result is the same file."""
    again = tmp_path / "again"
    shutil.copytree(trained.folder, again)
    result = again / result_name(trained.run.recipe.method)
    result.unlink()
    shutil.rmtree(again / "checkpoints" / "checkpoint-3", ignore_errors=True)
    (again / "metrics.json").unlink()
    metrics = train(load_recipe(recipe, [f"method={METHODS[name]}"]), again)
    assert metrics["train"]["resumed_from_step"] == (None if name in FIXED else 2)
    assert result.read_bytes() == (trained.folder / result.name).read_bytes()


def test_lora_lies_where_masks_lie(recipe: Path, tmp_path: Path) -> None:
    for where in (
        "",
        "scope: [language], layers: '1', modules: mlp",
        "scope: [vision, projector]",
        "target_modules: [q_proj]",
    ):
        found = {}
        for name in ("mask", "lora", "unilora", "hira"):
            seen = preview(load_recipe(recipe, [f"method={{name: {name}, {where}}}"]), tmp_path / "none")
            found[name] = sorted(seen["masked_modules"] + seen["adapted_modules"])
            assert not seen["whole_parameters"]
        assert found["mask"]
        assert found["mask"] == found["lora"] == found["unilora"] == found["hira"]


def test_dry_run_names_what_is_trained_whole(recipe: Path, tmp_path: Path) -> None:
    seen = preview(load_recipe(recipe, [f"method={METHODS['lora and projector']}"]), tmp_path / "none")
    names = [f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert sorted(seen["whole_parameters"]) == sorted(names)
    seen = preview(load_recipe(recipe, [f"method={METHODS['full by name']}"]), tmp_path / "none")
    assert seen["whole_parameters"] == ["model.language_model.embed_tokens.weight", "lm_head.weight"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("{name: lora, target_modules: [q_projj]}", "cannot put LORA on LlavaForConditionalGeneration.*q_projj"),
        ("{name: hira, layers: '7'}", r"layers names \[7\], but the language part has layers 0 to 1"),
        ("{name: full, target_modules: [nothing]}", "match no module with parameters"),
        ("{name: full, modules: attn, layers: '7'}", r"layers names \[7\]"),
        (
            "{name: lora, target_modules: [linear_1], train_projector: true}",
            "cannot put LORA.*No modules",
        ),
        ("{name: unilora, target_modules: [patch_embedding]}", "cannot put UNILORA"),
    ],
)
def test_targets_that_cannot_be_are_refused(recipe: Path, tmp_path: Path, method: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        train(load_recipe(recipe, [f"method={method}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_defaults_of_training(recipe: Path, tmp_path: Path) -> None:
    content = json.loads(recipe.read_text())
    del content["training"]["learning_rate"]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    rates = {"lora": 2e-4, "unilora": 2e-3, "hira": 2e-3, "full": 2e-5, "projector": 1e-3}
    for name, rate in rates.items():
        arguments = maskft.training.training_arguments(load_recipe(path, [f"method={{name: {name}}}"]), tmp_path)
        assert (arguments.learning_rate, arguments.max_grad_norm, arguments.adam_epsilon) == (rate, 1.0, 1e-8)


def test_the_best_checkpoint_is_kept(recipe: Path, tmp_path: Path) -> None:
    """With a rate at which weights run away, the first checkpoint is the best one."""
    content = json.loads(recipe.read_text())
    content["data"]["split"] = {"validation": 0.34}
    content["training"].update(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)
    content["training"].update(learning_rate=1.0, max_grad_norm=0.0, max_steps=2)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    metrics = train(load_recipe(path, [f"method={METHODS['full attention']}"]), tmp_path / "run")
    best = metrics["train"]["best_step"]
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / TRAINED)
    saved = load_file(tmp_path / "run" / TRAINED)
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in saved.items())


def test_one_vector_is_not_taken_to_pieces(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"whose one vector lies in all layers.*ddp\.yaml"):
        maskft.training.training_arguments(load_recipe(recipe, [f"method={METHODS['unilora']}"]), tmp_path)


def test_a_projector_beside_an_adapter_has_its_own_rate(recipe: Path, tmp_path: Path) -> None:
    """With a rate next to nothing the projector stays, whatever the adapter's rate is."""
    method = f"{{name: lora, rank: 2, projector_learning_rate: 1e-30, {PROJECTOR}}}"
    train(load_recipe(recipe, [f"method={method}"]), tmp_path / "run")
    saved = load_file(tmp_path / "run" / ADAPTER)
    own = dict(load_model(str(json.loads(recipe.read_text())["model"]["base"]), dtype="float32").named_parameters())
    kept = {name: tensor for name, tensor in saved.items() if "projector" in name}
    assert len(kept) == 4
    moved = [(tensor - own[name.removeprefix("base_model.model.")]).abs().max() for name, tensor in kept.items()]
    assert max(moved) < 1e-29
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", some(["dora", "unilora", "hira", "full", "lora and projector", "projector"]))
def test_bfloat16_keeps_what_is_trained_in_fp32(kind: str, recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    kinds = set()
    save = maskft.training.save_result

    def watched(method: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        kinds.update(p.dtype for p in model.parameters() if p.requires_grad)
        save(method, model, *args, **kwargs)

    monkeypatch.setattr(maskft.training, "save_result", watched)
    run = tmp_path / "run"
    train(load_recipe(recipe, [f"method={METHODS[kind]}", "model.dtype=bfloat16", "training.max_steps=2"]), run)
    assert kinds == {torch.float32}
    loaded = load_run(run)
    whole = [p for key, p in loaded.model.named_parameters() if _base_name(key)]
    assert {p.dtype for p in whole} == {torch.bfloat16}
    rows = load_data(loaded.recipe)["train"]
    probe = Collator(loaded.processor, max_length=None).prompts([rows[0]])
    difference = export_merged(loaded.model, loaded.processor, tmp_path / "merged", probe=probe).difference
    assert difference <= (0.0 if kind in ("full", "projector") else 0.25)  # a few steps of bf16 at logits of about 10


def test_qlora_trains_in_fp32_and_merges_without_quantising_again(recipe: Path, tmp_path: Path) -> None:
    wide = tiny_base(tmp_path / "base", width=64)  # whole blocks for kernels of 4 bits
    overrides = ["method={name: lora, rank: 2}", "model.quantization=nf4", "model.dtype=bfloat16", f"model.base={wide}"]
    run = tmp_path / "run"
    metrics = train(load_recipe(recipe, overrides), run)
    ends = 2 * (128 + 96 + 96 + 128 + 3 * 192) + 2 * (64 + 64)  # q, k, v, o, gate, up, down; the projector
    assert metrics["train"]["trainable_parameters"] == 2 * ends
    saved = load_file(run / ADAPTER)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any((t != t.bfloat16().float()).any() for t in saved.values())  # never rounded to bf16
    loaded = load_run(run)
    rows = load_data(loaded.recipe)["train"]
    probe = Collator(loaded.processor, max_length=None).prompts([rows[0]])
    difference = export_merged(loaded.model, loaded.processor, tmp_path / "merged", probe=probe).difference
    assert difference <= 0.25  # a few steps of bf16 at logits of about 10
    reloaded = load_model(str(tmp_path / "merged"), dtype="bfloat16")
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}


def test_evaluation_compares_with_the_base(recipe: Path, tmp_path: Path) -> None:
    content = json.loads(recipe.read_text())
    content["data"]["test"] = content["data"]["train"]
    content["training"]["max_steps"] = 1
    rows = json.loads(Path(content["data"]["train"]).read_text())
    train_part, test_part = recipe.parent / "half.json", recipe.parent / "rest.json"
    train_part.write_text(json.dumps(rows[:6]))
    test_part.write_text(json.dumps(rows[6:]))
    content["data"].update(train=str(train_part), test=str(test_part), image_root=str(recipe.parent))
    for i in range(6, 12):  # other images than the training part's, by content
        from PIL import Image

        Image.new("RGB", (64, 64), (i, 0, 0)).save(recipe.parent / f"{i}.png")
    path = recipe.parent / "tested.yaml"
    path.write_text(json.dumps(content))
    for method in ("{name: lora}", "{name: full}", "{fixed: random, keep_ratio: 0.5}"):
        run = tmp_path / method[1:9].replace(" ", "").replace(":", "")
        train(load_recipe(path, [f"method={method}"]), run)
        scores, records = evaluate_run(run)
        assert scores["test_examples"] == len(records) == 6
        assert {"base", "tuned", "blind"} <= set(scores)


@pytest.mark.parametrize(
    ("method", "refusal"),
    [
        ("{name: lora}", "holds an adapter of method LORA, not MASK"),
        ("{name: full}", "holds weights that were trained whole (trained_weights.safetensors), and no mask"),
    ],
)
def test_commands(
    method: str,
    refusal: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, changes = tmp_path / "run", (f"method={method}", "training.max_steps=1")
    assert call(monkeypatch, "train", recipe, "--output", run, *changes) == 0
    shown = capsys.readouterr().out
    assert "trained 1 steps" in shown
    assert result_name(load_recipe(recipe, changes).method) in shown.replace("\n", "")
    for command in (["inspect", run], ["pack", run, tmp_path / "packed", "--storage", "int8"]):
        assert call(monkeypatch, *command) == 2
        assert refusal in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, "ask", run, recipe.parent / "0.png", "shape ?", "--json") == 0
    assert {"base", "tuned"} <= set(json.loads(capsys.readouterr().out))
    assert "it has no mask" in (run / "report.html").read_text()
    assert (run / "README.md").is_file() == ("lora" in method)


class TestDamaged:
    @pytest.fixture
    def run(self, recipe: Path, tmp_path: Path) -> Path:
        train(load_recipe(recipe, ["method={name: lora, rank: 2}", "training.max_steps=1"]), tmp_path / "run")
        return tmp_path / "run"

    def change(self, run: Path, **changes: Any) -> None:
        config = json.loads((run / "adapter_config.json").read_text())
        (run / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    def test_tensors(self, run: Path) -> None:
        tensors = load_file(run / ADAPTER)
        first, second, *_ = sorted(tensors)
        gone = {name: tensor for name, tensor in tensors.items() if name != first}
        save_file({**gone, "other": torch.zeros(1), second: torch.full_like(tensors[second], torch.nan)}, run / ADAPTER)
        with pytest.raises(AdapterError) as caught:
            load_run(run)
        message = str(caught.value)
        assert f"missing: {first}" in message
        assert "not in the model: other" in message
        assert f"{second} has values that are not finite" in message
        save_file({name: tensor[:1] for name, tensor in tensors.items()}, run / ADAPTER)
        with pytest.raises(AdapterError, match="cannot be put on LlavaForConditionalGeneration"):
            load_run(run)
        (run / ADAPTER).write_bytes(b"broken")
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
            load_run(run)

    def test_configuration(self, run: Path) -> None:
        self.change(run, target_modules="(a+)+")
        with pytest.raises(AdapterError, match="target_modules repeats a group"):
            load_run(run)
        self.change(run, peft_type="VERA")
        with pytest.raises(AdapterError, match="holds an adapter of method VERA"):
            load_run(run)
        (run / "adapter_config.json").write_text("[]")
        with pytest.raises(AdapterError, match="is not a JSON object"):
            load_run(run)
        (run / "adapter_config.json").write_text(" " * (2 << 20))
        with pytest.raises(AdapterError, match="has more than 1,048,576 bytes"):
            load_run(run)
        (run / "adapter_config.json").unlink()
        with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
            load_run(run)

    def test_whole_weights(self, recipe: Path, tmp_path: Path) -> None:
        run = tmp_path / "full"
        train(load_recipe(recipe, [f"method={METHODS['full attention']}", "training.max_steps=1"]), run)
        tensors = load_file(run / TRAINED)
        first, second, *_ = sorted(tensors)
        save_file({first: tensors[first][:1], second: tensors[second] * torch.inf, "x": torch.ones(1)}, run / TRAINED)
        with pytest.raises(AdapterError) as caught:
            load_run(run)
        for part in (f"{first} has shape (1, 16)", f"{second} has values that are not", "not in the model: x"):
            assert part in str(caught.value)


def test_experts_are_for_lora_alone() -> None:
    from tests.targets.zoo import FAMILIES

    name = next(name for name in FAMILIES if "Mixtral" in name)
    model = FAMILIES[name].build()
    for method in (LoraMethod(name="lora", variant="dora"), LoraMethod(name="lora", dropout=0.1)):
        with pytest.raises(ModelError, match="holds weights of experts"):
            method.peer().config(model)
    assert MaskMethod().config().target_parameters is None
