"""A recipe: one typed, strict schema for a run. YAML file plus dotted overrides.

maskft train recipes/quickstart.yaml method.gate=soft training.max_steps=50
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from maskft.errors import RecipeError, UserError, did_you_mean, gathered
from maskft.methods import (
    QUANTIZABLE,
    FullMethod,
    HiraMethod,
    LoraMethod,
    Method,
    Section,
    UniLoraMethod,
)
from maskft.methods import MaskMethod as MaskMethod
from maskft.methods import ProjectorMethod as ProjectorMethod
from maskft.shipped import find_recipe
from maskft.yamlfile import YamlError, dump_yaml, parse_yaml, read_yaml

RELATIVE_STEP = 0.002
"""How much of itself a gate changes per step, if nothing else is said: the published gate at its rate of 0.1."""
HARD_LEARNING_RATE = 0.1
"""That of hard gates, as published."""


def _absolute(path: Path) -> Path:
    """Paths are relative to the folder of the call, and kept whole so that a run can be used from any folder."""
    return Path(os.path.expanduser(path)).absolute()  # pathlib's raises where there is no such user


def _absolute_folder(base: str) -> str:
    return str(_absolute(Path(base))) if os.path.isdir(os.path.expanduser(base)) else base


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class ModelSection(Section):
    """The frozen base model."""

    base: Annotated[str, AfterValidator(_absolute_folder)] = "embedded"
    """A folder or hub id of an image-text-to-text model; "embedded" (the composed demo model) or
    "embedded-unaligned" (the same before its projector was trained)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none", "nf4", "fp4", "int8", "int8-torchao"] = "none"
    """Keep the frozen weights of the language model in 4 or 8 bits, by bitsandbytes or torchao: docs/quantised.md."""
    attention: str | None = None
    """Transformers' attn_implementation, such as "sdpa", "eager" or "flash_attention_2"; default: its own choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder. Only for folders you trust."""


class _Data(Section):
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train on so much of the training part, drawn with `share_seed`."""
    share_seed: int = 0
    turns: Annotated[int, Field(gt=0)] = 1
    """Questions about one image in a training conversation; its rows of one question each are joined."""


class EasyVqaData(_Data):
    """The demo's data, from the package easy-vqa."""

    kind: Literal["easy-vqa"]
    part: Literal["vqa", "captions"] = "vqa"
    limits: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """At most so many rows of a split, drawn with `seed`."""
    balanced: bool = False
    """As many questions of one form with the answer yes as with no."""
    seed: int = 0


class Split(Section):
    """Shares of the training file to hold out, by image."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0


class FilesData(_Data):
    """LLaVA JSON, or messages + images as JSON, JSON lines, parquet or a saved Hugging Face data set."""

    kind: Literal["files"]
    train: AbsolutePath
    validation: AbsolutePath | None = None
    test: AbsolutePath | None = None
    image_root: AbsolutePath | None = None
    """Folder that image paths are relative to; default: the folder of each file."""
    format: Literal["auto", "llava", "messages"] = "auto"
    split: Split = Split()


class EvaluationSection(Section):
    """How answers are generated (greedy, batched) and scored."""

    batch_size: Annotated[int, Field(gt=0)] = 32
    max_new_tokens: Annotated[int, Field(gt=0)] = 16
    metric: Literal["exact", "vqa", "anls", "f1", "choice"] = "exact"
    """Scores one answer; see maskft.evaluation.metrics."""


class AuditSection(Section):
    """A look at the first steps: do all masks learn, and is the start a sane one?"""

    strict: bool = False
    """Stop at a finding instead of warning."""


class Recipe(Section):
    """Everything that defines a run."""

    model: ModelSection = ModelSection()
    method: Annotated[Method, Field(discriminator="name")] = MaskMethod()
    data: Annotated[EasyVqaData | FilesData, Field(discriminator="kind")]
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of TRL's SFTConfig."""
    evaluation: EvaluationSection = EvaluationSection()
    audit: AuditSection = AuditSection()

    def to_yaml(self) -> str:
        """The whole recipe with every default written out."""
        return dump_yaml(self.model_dump(mode="json"))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a file or a shipped one's name, and apply overrides such as "training.max_steps=24".

    Raises:
        RecipeError: no such file, not YAML, an unknown key (the nearest valid one is named), a wrong value.
    """
    path = find_recipe(path)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
    except ValueError as error:  # also of text that is not UTF-8
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}.")
    for override in overrides:
        _apply(content, override)
    if isinstance(content.get("method"), dict):
        content["method"].setdefault("name", "mask")
    try:
        recipe = Recipe.model_validate(content)
        recipe.method.check()
        _check_quantization(recipe)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{gathered([_explain(e, content) for e in error.errors()])}") from error
    except UserError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def method_settings(recipe: Recipe) -> dict[str, Any]:
    """Fields of `training` that follow from the method's own keys.

    Raises:
        RecipeError: `training` says otherwise.
    """
    method = recipe.method
    if not isinstance(method, MaskMethod):
        return {}
    if method.memory != "fast" and "optim" in recipe.training:
        raise RecipeError(
            f"method.memory is '{method.memory}', which brings an optimizer of its own, but training.optim is "
            f"'{recipe.training['optim']}'. Give one of them."
        )
    if method.relative_step is not None and "learning_rate" in recipe.training:
        raise RecipeError("method.relative_step and training.learning_rate both set the learning rate. Give one.")
    config = method.config()
    try:
        return {"learning_rate": config.learning_rate(method.relative_step or RELATIVE_STEP)}
    except UserError as error:
        if method.relative_step is not None:
            raise RecipeError(str(error)) from error
        return {"learning_rate": HARD_LEARNING_RATE}


def _check_quantization(recipe: Recipe) -> None:
    """Raise RecipeError where the method cannot train beside quantised weights."""
    method, quantization = recipe.method.name, recipe.model.quantization
    if quantization != "none" and method not in QUANTIZABLE:
        raise RecipeError(
            f"model.quantization is '{quantization}', which is for the methods {' and '.join(QUANTIZABLE)}; train "
            f"'{method}' with none."
        )


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise RecipeError(f"'{override}' is not an override; write key=value, for example training.max_steps=24.")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        raise RecipeError(f"the value of '{override}' is not valid YAML: {error}") from error
    *sections, last = key.split(".")
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"'{override}': '{section}' holds a value, not a section.")
    target[last] = value


def _explain(error: Any, content: dict[str, Any]) -> str:
    """One line for one of pydantic's errors, in terms of the file's keys."""
    key = ".".join(_path(error["loc"], content, missing=error["type"] == "missing"))
    if error["type"] == "extra_forbidden":
        allowed = _allowed(error["loc"][:-1])
        nearest = did_you_mean(str(error["loc"][-1]), allowed)
        return f"unknown key '{key}'.{nearest} Allowed there: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"'{key}' is missing."
    if error["type"].startswith("union_tag"):
        ctx = error["ctx"]
        tag, allowed = ctx["discriminator"].strip("'"), ctx.get("expected_tags", "'easy-vqa', 'files'")
        return f"'{key}.{tag}' is {ctx.get('tag', 'missing')}; it must be one of {allowed}."
    return f"'{key}' is {error['input']!r}: {error['msg']}."


def _path(loc: Sequence[str | int], content: Any, *, missing: bool) -> list[str]:
    """The pieces of a place that are in the file; pydantic also puts names of a union's variants there."""
    path = []
    for piece in loc:
        inside = piece in content if isinstance(content, dict) else isinstance(content, list) and isinstance(piece, int)
        if inside:
            content = content[piece]
            path.append(str(piece))
    return [*path, str(loc[-1])] if missing else path


def _allowed(loc: Iterable[Any]) -> list[str]:
    """Keys allowed at a place of the schema."""
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSection,
        "method": MaskMethod,
        "evaluation": EvaluationSection,
        "audit": AuditSection,
        "easy-vqa": EasyVqaData,
        "files": FilesData,
        "mask": MaskMethod,
        "lora": LoraMethod,
        "unilora": UniLoraMethod,
        "hira": HiraMethod,
        "full": FullMethod,
        "projector": ProjectorMethod,
        "split": Split,
    }
    names = [piece for piece in loc if piece in sections]
    return list((sections[names[-1]] if names else Recipe).model_fields)
