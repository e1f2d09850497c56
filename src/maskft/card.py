"""Model cards: a README.md for an exported model or an adapter, from what its run measured and nothing else.

The header is the YAML that Hugging Face's model cards begin with. What comes from recipes, folder names and the base's
card is not trusted: it appears as code, on one line, or in quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from maskft.errors import printable
from maskft.learnt import ADAPTER, result_name
from maskft.methods import is_fixed
from maskft.recipe import Recipe
from maskft.runs import read_metrics, run_recipe
from maskft.yamlfile import YamlError, dump_yaml, parse_yaml

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_HEAD = 1 << 16
_PATHS = (("model", "base"), ("data", "train"), ("data", "validation"), ("data", "test"), ("data", "image_root"))
_ROWS = {"base": "base", "tuned": "tuned", "blind": "best guess without the image"}
_METHODS = {
    "mask": "mask fine-tuning",
    "lora": "LoRA",
    "unilora": "Uni-LoRA",
    "hira": "HiRA",
    "full": "full fine-tuning",
    "projector": "training of the projector",
}
_METRICS = {"exact": "exact match", "vqa": "VQA accuracy", "anls": "ANLS", "f1": "F1", "choice": "option letter"}


def model_card(
    run: Path,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    quantization: str | None = None,
    storage: str | None = None,
) -> str:
    """The card of a finished run, as Markdown.

    Results are those of the run's model. Where the card is for weights or scores that were rounded since, it says so,
    and its header names no results.

    Args:
        run: the run's folder; recipe, metrics, environment, adapter's config and benchmark results are read from it.
        adapter: for what the run learnt, an adapter or trained weights; otherwise for the merged model.
        dtype: of the weights; None is the recipe's.
        quantization: of the merged model, such as "nf4".
        storage: of a packed adapter's scores.

    Raises:
        RunError, RecipeError: the folder is not a run, or a file of it is damaged.
    """
    recipe, metrics = run_recipe(run), read_metrics(run)
    name = _line(run.resolve().name)
    base = _name_of(recipe.model.base)
    licence = base_licence(recipe.model.base)
    benchmarks = _benchmarks(run)
    cast = dtype if dtype != recipe.model.dtype else None
    rounded = quantization or cast or (storage if storage in ("int8", "int4") else None)
    index = [] if rounded else _model_index(name, recipe, metrics, benchmarks)
    header = _header(recipe, licence, adapter, quantization) | ({"model-index": index} if index else {})
    sections = [
        f"---\n{dump_yaml(header)}---",
        f"# {_code(name)}",
        _introduction(recipe, base, adapter, quantization),
        f"## Results\n\n{_results(metrics, benchmarks, rounded)}",
        f"## Use\n\n{_use(recipe, base, adapter, dtype or recipe.model.dtype)}",
        f"## Base and licence\n\n{_base(run, base, licence)}",
        f"## Data\n\n{_data(recipe, metrics)}",
        f"## Training\n\n{_training(run, metrics)}",
        f"## Recipe\n\n{_fenced(dump_yaml(_without_folders(recipe)), 'yaml')}",
    ]
    return "\n\n".join(sections) + "\n"


def base_licence(base: str) -> dict[str, str]:
    """Licence fields of a card's header: those of the base's own card where it is on this machine and states them.

    Otherwise `{"license": "other", "license_name": "see-the-base"}`. Nothing is fetched.
    """
    unknown = {"license": "other", "license_name": "see-the-base"}
    if base.startswith("embedded"):
        return {"license": "other", "license_name": "apache-2.0-and-mit"}  # its parts': docs/embedded-base.md
    header = _front_matter(_card_of(base))
    licence = header.get("license")
    if not isinstance(licence, str) or not _LICENCE.fullmatch(licence):
        return unknown
    found = {"license": licence}
    if isinstance(named := header.get("license_name"), str) and _LICENCE.fullmatch(named):
        found["license_name"] = named
    if isinstance(link := header.get("license_link"), str) and re.fullmatch(r"https://[\w./%-]{1,200}", link):
        found["license_link"] = link
    return found


def _card_of(base: str) -> Path | None:
    """The base's own card, where it is on this machine."""
    if Path(base).is_dir():
        return Path(base) / CARD
    if not _HUB_ID.fullmatch(base):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base, CARD)
    return Path(found) if isinstance(found, str) else None


def _front_matter(card: Path | None) -> Mapping[str, Any]:
    if card is None or not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        found = _FRONT_MATTER.match(file.read(_HEAD))
    try:
        header = parse_yaml(found[1]) if found else None
    except YamlError:
        return {}
    return header if isinstance(header, dict) else {}


def _header(recipe: Recipe, licence: Mapping[str, str], adapter: bool, quantization: str | None) -> dict[str, Any]:
    library = "transformers" if not adapter else "peft" if _has_adapter(recipe) else "maskft"
    header: dict[str, Any] = {"library_name": library}
    if _HUB_ID.fullmatch(recipe.model.base):
        header["base_model"] = recipe.model.base
        header["base_model_relation"] = "adapter" if adapter else "quantized" if quantization else "finetune"
    method = recipe.method.name
    tags = ["maskft", "mask-fine-tuning" if method == "mask" else method]
    return header | {**licence, "pipeline_tag": "image-text-to-text", "tags": tags}


def _model_index(
    name: str, recipe: Recipe, metrics: Mapping[str, Any], benchmarks: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The header's list of measured scores; empty where there are none."""
    task = {"type": "image-text-to-text"}
    results = []
    if (tuned := _score(metrics, "tuned")) is not None:
        data = _data_name(recipe)
        metric = str(metrics.get("metric", recipe.evaluation.metric))
        measured = {"type": metric, "name": _METRICS.get(metric, metric), "value": round(tuned["accuracy"], 4)}
        results.append({"task": task, "dataset": {"type": data, "name": data, "split": "test"}, "metrics": [measured]})
    for bench, score in benchmarks.items():
        measured = {"type": "score", "name": "score", "value": score}
        results.append({"task": task, "dataset": {"type": bench, "name": bench}, "metrics": [measured]})
    return [{"name": name, "results": results}] if results else []


def _introduction(recipe: Recipe, base: str, adapter: bool, quantization: str | None) -> str:
    method = "a fixed mask, not trained," if is_fixed(recipe.method) else _METHODS[recipe.method.name]
    if adapter:
        what = "An adapter" if _has_adapter(recipe) else "The trained weights"
        return f"{what} of {_code(base)}, made with {method} by maskft. The base is not in here."
    few = f" Its language model is kept in {quantization}." if quantization else ""
    return f"{_code(base)}, tuned with {method} by maskft and merged: an ordinary Transformers model.{few}"


def _has_adapter(recipe: Recipe) -> bool:
    """Whether what a run learnt is an adapter that PEFT loads."""
    return result_name(recipe.method) == ADAPTER


def _results(metrics: Mapping[str, Any], benchmarks: Mapping[str, float], rounded: str | None) -> str:
    lines: list[str] = []
    for split in ("test", "validation"):
        part = metrics if split == "test" else metrics.get(split)
        scores = {row: _score(part, row) for row in _ROWS} if isinstance(part, Mapping) else {}
        if not any(scores.values()):
            continue
        metric = str(part.get("metric", "exact")) if isinstance(part, Mapping) else "exact"
        lines += [
            f"Held-out questions ({split}), {_code(_METRICS.get(metric, metric))}:",
            "",
            "| model | score | 95 % interval | points | questions |",
            "|---|---|---|---|---|",
        ]
        for row, score in scores.items():
            if score is not None:
                bounds = [_percent(score[key]) for key in ("low", "high") if _is_number(score.get(key))]
                interval = " to ".join(bounds) if len(bounds) == 2 else ""
                counted = f"{score['correct']:g}" if _is_number(score.get("correct")) else ""
                lines.append(
                    f"| {_ROWS[row]} | {_percent(score['accuracy'])} | {interval} | {counted} | {score['examples']:,} |"
                )
        lines.append("")
    if benchmarks:
        lines += ["Benchmarks, scored as by their official scorers:", "", "| benchmark | score |", "|---|---|"]
        lines += [f"| {bench} | {score:g} |" for bench, score in benchmarks.items()]
    if not lines:
        return "Not evaluated."
    if rounded:
        lines = [f"Measured with the run's model. Here it is kept in {rounded}, which was not measured.", "", *lines]
    return "\n".join(lines).strip()


def _use(recipe: Recipe, base: str, adapter: bool, dtype: str) -> str:
    if adapter and not _has_adapter(recipe):
        return _fenced("maskft export path/to/this/folder merged/   # an ordinary Transformers model", "")
    if adapter:
        registers = ["from maskft import MaskConfig  # registers the method with PEFT"]
        lines = [
            *(registers if recipe.method.name == "mask" else []),
            "from peft import PeftModel",
            "from transformers import AutoModelForImageTextToText",
            "",
            f'base = AutoModelForImageTextToText.from_pretrained({json.dumps(base)}, dtype="{dtype}")',
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        ]
    else:
        lines = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            f'model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder", dtype="{dtype}")',
            'processor = AutoProcessor.from_pretrained("path/to/this/folder")',
        ]
    return _fenced("\n".join(lines), "python")


def _base(run: Path, base: str, licence: Mapping[str, str]) -> str:
    stated = " ".join(licence.values())
    lines = [f"- base: {_code(base)}"]
    config = _read(run / "adapter_config.json")
    if isinstance(mark := config.get("base_fingerprint"), str):
        lines.append(f"- fingerprint of the tuned weights of the base: {_code(mark)}")
    said = "see the base's licence" if licence.get("license_name") == "see-the-base" else _code(stated)
    return "\n".join([*lines, f"- licence: {said}"])


def _data(recipe: Recipe, metrics: Mapping[str, Any]) -> str:
    lines = [f"- {_code(_data_name(recipe))}, kind {_code(recipe.data.kind)}"]
    trained = metrics.get("train")
    if isinstance(trained, Mapping) and _is_number(trained.get("examples")):
        lines.append(f"- {trained['examples']:,} training examples")
    return "\n".join(lines)


def _training(run: Path, metrics: Mapping[str, Any]) -> str:
    trained = metrics.get("train")
    facts = trained if isinstance(trained, Mapping) else {}
    shown = ("steps", "epochs", "seconds", "loss", "trainable_parameters", "base_parameters")
    lines = [f"- {key.replace('_', ' ')}: {facts[key]:,}" for key in shown if _is_number(facts.get(key))]
    environment = _read(run / "environment.json")
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        lines.append("- versions: " + ", ".join(_code(f"{key} {value}") for key, value in packages.items()))
    if environment.get("commit"):
        lines.append(f"- commit of maskft: {_code(environment['commit'])}")
    return "\n".join(lines) or "Not finished."


def _benchmarks(run: Path) -> dict[str, float]:
    """Scores of the tuned model by benchmark."""
    found = _read(run / "benchmarks" / "results.json").get(run.resolve().name)
    rows = found if isinstance(found, Mapping) else {}
    scores: dict[str, Any] = {name: row.get("score") for name, row in rows.items() if isinstance(row, Mapping)}
    return {name: float(score) for name, score in scores.items() if name.isalnum() and _is_number(score)}


def _score(metrics: Any, row: str) -> dict[str, Any] | None:
    score = metrics.get(row) if isinstance(metrics, Mapping) else None
    if not isinstance(score, dict) or not all(_is_number(score.get(key)) for key in ("accuracy", "examples")):
        return None
    return score


def _without_folders(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with the names of files and folders alone: a card tells nobody where they lie."""
    content = recipe.model_dump(mode="json")
    for section, key in _PATHS:
        if isinstance(value := content[section].get(key), str):
            content[section][key] = _name_of(value)
    return content


def _data_name(recipe: Recipe) -> str:
    train = getattr(recipe.data, "train", None)
    return _line(PurePath(train).stem) if train is not None else recipe.data.kind


def _name_of(path: str) -> str:
    """The last piece of a path; a hub id as it is."""
    return path if _HUB_ID.fullmatch(path) else _line(PurePath(path).name or path)


def _read(path: Path) -> Mapping[str, Any]:
    """An object from a JSON file; empty where there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _line(text: Any) -> str:
    """Text on one line, without control characters, of a bounded length."""
    return printable(" ".join(str(text).split()))[:200]


def _code(text: Any) -> str:
    """Text as a code span, in which nothing is markup."""
    shown = _line(text) or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    pad = " " if shown[0] == "`" or shown[-1] == "`" else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _fenced(text: str, language: str) -> str:
    """A code block, whose fence is longer than any in the text."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{printable(text).rstrip()}\n{ticks}"
