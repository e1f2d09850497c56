"""The paper's recipes, written from one table: four backbones, each with stage 1 and eight ways to train stage 2.

    python recipes/paper/generate.py           # write the recipes
    python recipes/paper/generate.py --plan    # plan each on its base's config first (or those named), into plans.json

Settings are those of arXiv 2512.23073 where its public summaries give them, else TinyLLaVA-Factory's, whose backbones
the paper uses; docs/paper.md says which is which. Every file is complete in itself. To change one, change the table.
"""

from __future__ import annotations

import json
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
PLANS = HERE / "plans.json"
PAGE = HERE.parents[1] / "docs" / "paper.md"
MARKS = ("<!-- paper -->", "<!-- /paper -->")
GPUS = 8

ALIGNMENT_ROWS, INSTRUCTION_ROWS = 558_128, 665_298
"""Of blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json."""

BENCHMARKS = ("gqa", "mmmu", "mme", "pope", "scienceqa", "textvqa")
BEST = "POPE 88.5, MME 1470, GQA 66.5, MMMU 39.1, ScienceQA-IMG 80.4 and 78.1, TextVQA 64.2"


@dataclass(frozen=True)
class Backbone:
    """A language model behind SigLIP-so400m-patch14-384 and a projector of two layers.

    Attributes:
        title: for people.
        language: its id on the hub.
        full, lora: published results of TinyLLaVA-Factory: GQA, ScienceQA-IMG, TextVQA, POPE, MME, MMMU.
    """

    title: str
    language: str
    full: tuple[float, ...]
    lora: tuple[float, ...] | None = None


BACKBONES = {
    "qwen2.5-0.5b": Backbone("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", (59.5, 60.3, 48.3, 86.1, 1253.0, 33.3)),
    "tinyllama-1.1b": Backbone(
        "TinyLlama-1.1B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", (58.6, 64.0, 49.6, 86.3, 1256.5, 28.3)
    ),
    "gemma-2b": Backbone("Gemma-2B", "google/gemma-2b-it", (61.6, 64.4, 53.6, 86.4, 1339.0, 31.7)),
    "phi-2": Backbone(
        "Phi-2",
        "microsoft/phi-2",
        (61.6, 71.9, 57.4, 87.2, 1462.4, 38.2),
        (59.7, 71.6, 53.8, 87.9, 1413.2, 35.6),
    ),
}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: for people.
        about: what is to be known about its settings.
        keys: lines of the recipe's `method`.
        training: lines of `training` that are its own.
        family: "mask", "lora", "full" or "stage1".
        dense: "weights" where each trained number belongs to one weight, whose gradient is computed.
        model: more lines of `model`.
    """

    title: str
    about: str
    keys: tuple[str, ...]
    training: tuple[str, ...]
    family: str
    dense: bool = True
    model: tuple[str, ...] = field(default=())


def _soft(modules: str, what: str) -> Method:
    return Method(
        f"S-MFT on {what}",
        "Learning rate, gate and scope are the paper's. It tuned init_gate and temperature for each backbone on a "
        "tenth of the data and did not publish them; 0.98 and 1 are this project's start.",
        (
            "name: mask",
            "gate: soft",
            "init_gate: 0.98",
            "temperature: 1.0",
            "scope: [language, projector]",
            f"modules: {modules}",
        ),
        ("learning_rate: 0.1",),
        "mask",
    )


METHODS = {
    "stage1": Method(
        "Stage 1: the projector is aligned",
        "Every setting is TinyLLaVA-Factory's, but for the form of a row: here the chat template is around a caption.",
        ("name: projector",),
        ("learning_rate: 1.0e-3",),
        "stage1",
    ),
    "s-mft-attn": _soft("attn", "attention: q, k, v, o"),
    "s-mft-mlp": _soft("mlp", "feed-forward layers"),
    "s-mft-both": _soft("both", "attention and feed-forward layers"),
    "h-mft": Method(
        "H-MFT on attention and feed-forward layers",
        "The learning rate is the paper's. It did not publish what share is cut; 0.9 kept, ranked by matrix, is the "
        "predecessor's (arXiv 2503.22764). Scores start from |W|, so that the smallest weights are cut first.",
        (
            "name: mask",
            "gate: topk",
            "keep_ratio: 0.9",
            "ranking: matrix",
            "scope: [language, projector]",
            "modules: both",
        ),
        ("learning_rate: 0.1",),
        "mask",
    ),
    "lora": Method(
        "LoRA of rank 128",
        "Every setting is TinyLLaVA-Factory's, but for bf16, where it has fp16. The projector is trained whole, at one "
        "rate with the factors.",
        (
            "name: lora",
            "rank: 128",
            "alpha: 256",
            "dropout: 0.05",
            "scope: [language]",
            "modules: both",
            "train_projector: true",
            "projector_learning_rate: 2.0e-4",
        ),
        ("learning_rate: 2.0e-4",),
        "lora",
        dense=False,
    ),
    "qlora": Method(
        "QLoRA of rank 128: LoRA on a language model in 4 bits",
        "Every setting is TinyLLaVA-Factory's, but for bf16, where it has fp16. The projector is trained whole, at one "
        "rate with the factors. Needs: pip install 'maskft[quant]'",
        (
            "name: lora",
            "rank: 128",
            "alpha: 256",
            "dropout: 0.05",
            "scope: [language]",
            "modules: both",
            "train_projector: true",
            "projector_learning_rate: 2.0e-4",
        ),
        ("learning_rate: 2.0e-4",),
        "lora",
        dense=False,
        model=("quantization: nf4",),
    ),
    "unilora": Method(
        "Uni-LoRA, factors drawn from one vector",
        "Rank and length of the vector are its authors' for large models (arXiv 2506.00799). Tune the learning rate.",
        (
            "name: unilora",
            "rank: 4",
            "vector_length: 524288",
            "scope: [language]",
            "modules: both",
            "train_projector: true",
            "projector_learning_rate: 2.0e-4",
        ),
        ("learning_rate: 2.0e-3",),
        "lora",
        dense=False,
    ),
    "full": Method(
        "Full fine-tuning",
        "Every setting is TinyLLaVA-Factory's. Trained weights are kept in fp32.",
        ("name: full", "scope: [language, projector]"),
        ("learning_rate: 2.0e-5",),
        "full",
    ),
}


def recipe(backbone: str, method: str, plans: dict[str, Any]) -> str:
    """The text of one recipe."""
    return "\n".join([*_head(backbone, method, plans["recipes"][f"{backbone}-{method}"]), body(backbone, method)])


def body(backbone: str, method: str) -> str:
    """The recipe without its head."""
    way = METHODS[method]
    first = method == "stage1"
    base = f"models/tinyllava-{backbone}" + ("-unaligned" if first else "")
    batch, steps = (16, 2) if first else (4, 4)
    images = "data/llava/pretrain/images" if first else "data/llava"
    data = "data/llava/pretrain/blip_laion_cc_sbu_558k.json" if first else "data/llava/llava_v1_5_mix665k.json"
    limit = 0.0 if way.family == "mask" else 1.0
    lines = [
        "model:",
        f"  base: {base}",
        "  dtype: bfloat16",
        *(f"  {line}" for line in way.model),
        "method:",
        *(f"  {line}" for line in way.keys),
        "data:",
        "  kind: files",
        "  format: llava",
        f"  train: {data}",
        f"  image_root: {images}",
        "training:",
        "  num_train_epochs: 1",
        f"  per_device_train_batch_size: {batch}",
        f"  gradient_accumulation_steps: {steps}        # x {batch} x 8 GPUs = {batch * steps * 8} rows a step",
        *(f"  {line}" for line in way.training),
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.03                    # below 1: a share of all steps",
        "  weight_decay: 0.0",
        f"  max_grad_norm: {limit}",
        "  max_length: 2048",
        "  gradient_checkpointing: true",
        "  dataloader_num_workers: 8",
        "  save_steps: 500",
        "  seed: 0",
    ]
    return "\n".join(lines) + "\n"


def _head(backbone: str, method: str, plan: dict[str, Any]) -> list[str]:
    about, way = BACKBONES[backbone], METHODS[method]
    first = method == "stage1"
    name = f"{backbone}-{method}"
    path, run = f"recipes/paper/{name}.yaml", f"runs/{name}"
    stage = "LLaVA's 558k captions" if first else "LLaVA-1.5's 665k instructions"
    alone = f"training.gradient_accumulation_steps={16 if first else 32}"
    launch = f"accelerate launch --config_file recipes/distributed/ddp.yaml --num_processes {GPUS}"
    blocks: list[tuple[str, str | list[str]]] = [
        ("", f"{way.title}. SigLIP-so400m-patch14-384 and {about.title}, one epoch of {stage}."),
        ("", way.about),
        ("Base", _base(backbone, first)),
        ("8 GPUs", [f"{launch} -m maskft.cli train {path}"]),
        ("1 GPU", [f"maskft train {path} {alone}"]),
        *_planned(way, plan),
    ]
    if first:
        blocks.append(("Next", [f"maskft export {run} models/tinyllava-{backbone}"]))
    else:
        blocks.append(("Published", _published(about, way)))
        blocks.append(("Evaluate", [f"maskft evaluate {run} --benchmark {one} --data eval" for one in BENCHMARKS]))
    lines = []
    for label, text in blocks:
        start = f"# {label:<10}" if label else "# "
        if isinstance(text, str):
            text = textwrap.wrap(text, 118 - len(start))
        for number, line in enumerate(text):
            lines.append((start if number == 0 else "#" + " " * (len(start) - 1)) + line)
        lines += ["#"] if not label else []
    return lines


def _planned(way: Method, plan: dict[str, Any]) -> list[tuple[str, str | list[str]]]:
    trained, share = plan["trainable_parameters"], 100 * plan["trainable_parameters"] / plan["base_parameters"]
    spread = f"{_size(plan['bytes_of_copies'])} on each of 8 with copies"
    rows = "Planned for rows of 2,048 tokens (maskft plan), not measured."
    return [
        ("Trained", f"{trained:,} numbers, {share:.1f} % of the base's {plan['base_parameters']:,}."),
        ("Memory", f"{_size(plan['bytes'])} on one GPU, {spread}. {rows}"),
        ("Time", _time(way, plan)),
    ]


def _base(backbone: str, first: bool) -> str:
    if not first:
        return f"models/tinyllava-{backbone}, which recipes/paper/{backbone}-stage1.yaml makes; docs/paper.md."
    language = BACKBONES[backbone].language
    return (
        f"models/tinyllava-{backbone}-unaligned, which maskft compose makes of google/siglip-so400m-patch14-384 and "
        f"{language}; docs/paper.md."
    )


def _published(about: Backbone, way: Method) -> str:
    names = ("GQA", "ScienceQA-IMG", "TextVQA", "POPE", "MME", "MMMU")

    def row(values: tuple[float, ...]) -> str:
        return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))

    full = f"full fine-tuning by TinyLLaVA-Factory: {row(about.full)}."
    if way.family == "mask":
        return f"arXiv 2512.23073's best entries, backbone and variant not given: {BEST}. For comparison, {full}"
    if way.family == "full":
        return full
    if about.lora is not None and way.title.startswith("LoRA"):
        return f"LoRA by TinyLLaVA-Factory: {row(about.lora)}. For comparison, {full}"
    return f"with this method nothing for this backbone that we know of. For comparison, {full}"


def _time(way: Method, plan: dict[str, Any]) -> str:
    hours = estimated_hours(way, plan)
    return (
        f"{_hours(hours / 8)} on 8 A100, {_hours(hours)} on one: an estimate from the arithmetic alone, not measured "
        "(docs/paper.md#cost)."
    )


def estimated_hours(way: Method, plan: dict[str, Any]) -> float:
    """GPU hours of an epoch, as `maskft.studies.at_scale.gpu_hours` counts them."""
    from maskft.studies.at_scale import gpu_hours

    rows = ALIGNMENT_ROWS if way.family == "stage1" else INSTRUCTION_ROWS
    gradients = plan["trainable_parameters"] if way.dense else 0
    return gpu_hours(rows, language=plan["language_weights"], vision=plan["vision_weights"], gradients=gradients)


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.1f} GB"


def names() -> list[str]:
    """Of all recipes, without the ending."""
    return [f"{backbone}-{method}" for backbone in BACKBONES for method in METHODS]


def table(plans: dict[str, Any]) -> str:
    """What each recipe takes, for docs/paper.md."""
    lines = [
        "| recipe | trained | memory: one GPU | each of 8 copies | A100 hours, estimated |",
        "|---|---:|---:|---:|---:|",
    ]
    for backbone in BACKBONES:
        for method in METHODS:
            plan = plans["recipes"][f"{backbone}-{method}"]
            trained, base = plan["trainable_parameters"], plan["base_parameters"]
            sizes = f"{_size(plan['bytes'])} | {_size(plan['bytes_of_copies'])}"
            hours = _hours(estimated_hours(METHODS[method], plan))
            lines.append(f"| `{backbone}-{method}` | {trained / 1e6:,.1f}M, {trained / base:.1%} | {sizes} | {hours} |")
    return "\n".join(lines)


def write(folder: Path = HERE, page: Path = PAGE) -> None:
    """Write every recipe, and the table of a page."""
    plans = json.loads(PLANS.read_text(encoding="utf-8"))
    for backbone in BACKBONES:
        for method in METHODS:
            (folder / f"{backbone}-{method}.yaml").write_text(recipe(backbone, method, plans), encoding="utf-8")
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{table(plans)}\n{MARKS[1]}{after}", encoding="utf-8")


def planned(backbone: str, method: str) -> dict[str, Any]:
    """What one recipe takes, on the base's config alone."""
    from maskft.recipe import load_recipe
    from maskft.studies.at_scale import demand

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(body(backbone, method), encoding="utf-8")
        found = demand(load_recipe(path, [f"model.base={CONFIGS / f'tinyllava-{backbone}'}"]))
    return {key: number for key, number in found.items() if key != "gradients"}


def write_plans(chosen: list[str]) -> None:
    """Plan recipes again, by name; all of them where none is named."""
    before = json.loads(PLANS.read_text(encoding="utf-8"))["recipes"] if PLANS.exists() else {}
    found = {}
    for backbone in BACKBONES:
        for method in METHODS:
            name = f"{backbone}-{method}"
            if not chosen or name in chosen:
                found[name] = planned(backbone, method)
            elif name in before:
                found[name] = before[name]
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    content = {"command": "python recipes/paper/generate.py --plan", "packages": versions, "recipes": found}
    PLANS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plan"]:
        write_plans(sys.argv[2:])
    write()
