"""Loading a base model and its processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskft.errors import MissingExtraError, ModelError
from maskft.targets import find_weights
from maskft.vlm.embedded import embedded_base

_EMBEDDED = {"embedded": True, "embedded-unaligned": False}
_QUANTIZERS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "int8-torchao": "torchao"}
"""Package by what `load_model` calls the quantisation."""
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_processor(base: str, *, trust_remote_code: bool = False) -> Any:
    """Load the processor (tokenizer, image processor, chat template) of a base; cheap beside its model.

    Raises:
        ModelError: there is no such base, or it has no chat template.
    """
    from transformers import AutoProcessor

    source = source_of(base)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the processor of '{base}': {error}") from error
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"'{base}' has no image processor, so it is not a vision-language model.")
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"the processor of '{base}' has no chat template; add chat_template.jinja to its folder.")
    return processor


def load_model(
    base: str,
    *,
    dtype: str,
    attention: str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
) -> Any:
    """Load an image-text-to-text model in evaluation mode, its weights frozen.

    Args:
        base: "embedded", "embedded-unaligned", a folder, or a hub id.
        dtype: "float32", "bfloat16" or "float16"; where the model is quantised, of all that is not, and to compute in.
        attention: Transformers' attn_implementation; None leaves the choice to it.
        trust_remote_code: allow Python code from the model's folder to run.
        quantization: of the linear layers of the language model; "nf4", "fp4" or "int8" by bitsandbytes,
            "int8-torchao" by torchao, or "none". Vision encoder, projector and output head stay as they are.

    Raises:
        ModelError: there is no such model, it isn't an image-text-to-text model, or it is quantised already.
        MissingExtraError: the package that quantises is not installed.
    """
    from transformers import AutoModelForImageTextToText

    source = source_of(base)
    if quantization != "none":
        require_quantizer(quantization, "model.quantization")
    try:
        chosen = {}  # an argument, even None, would take the place of what the folder says of its quantisation
        if quantization != "none":
            kept = _layers_to_keep(source, base, trust_remote_code)
            chosen["quantization_config"] = _quantization_config(quantization, dtype, kept)
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **chosen,
        )
    except ModelError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load '{base}' as an image-text-to-text model: {error}") from error
    return model.requires_grad_(False).eval()


def require_quantizer(quantization: str, asked_by: str) -> None:
    """Raise MissingExtraError where the package is not installed that a quantisation needs."""
    if find_spec(package := _QUANTIZERS[quantization]) is None:
        raise MissingExtraError(package, "pip install 'maskft[quant]'", f"{asked_by} '{quantization}'")


def load_skeleton(base: str, *, dtype: str, attention: str | None = None, trust_remote_code: bool = False) -> Any:
    """A base on the meta device, made from its config alone: every module and shape, no values. Frozen.

    Args:
        base, dtype, attention, trust_remote_code: as `load_model`; also a model of text alone.

    Raises:
        ModelError: there is no such base, or its config cannot be made into a model.
    """
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    try:
        config = AutoConfig.from_pretrained(source_of(base), trust_remote_code=trust_remote_code)
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or hasattr(config, "vision_config")
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        with torch.device("meta"):
            chosen = {} if attention is None else {"attn_implementation": attention}
            model = auto.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **chosen)
    except ModelError:
        raise
    except Exception as error:  # whatever a config that fits no model runs into while layers are made
        raise ModelError(
            f"cannot make the model of '{base}' from its config.json: {type(error).__name__}: {error}"
        ) from error
    return model.requires_grad_(False).eval()


def has_processor(base: str) -> bool:
    """Whether the folder of a base has a processor; of a hub id that is taken for granted.

    Raises:
        ModelError: there is no such base.
    """
    source = source_of(base)
    return not os.path.isdir(source) or any(os.path.isfile(Path(source, name)) for name in _PROCESSOR_FILES)


def has_weights(base: str) -> bool:
    """Whether a base's weights are on this machine: in its folder, or for a hub id in the hub's cache.

    Raises:
        ModelError: there is no such base.
    """
    from huggingface_hub import try_to_load_from_cache

    source = source_of(base)
    if os.path.isdir(source):
        return any(Path(source).glob("*.safetensors"))
    return any(isinstance(try_to_load_from_cache(source, name), str) for name in _WEIGHT_FILES)


def _quantization_config(quantization: str, dtype: str, kept: list[str]) -> Any:
    """Transformers' configuration; `kept` names modules that are not quantised."""
    if quantization == "int8-torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=kept)
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=kept,
    )


def _layers_to_keep(source: str, base: str, trust_remote_code: bool) -> list[str]:
    """Names of the outermost modules with linear layers of which none is in a layer of the language model.

    Raises:
        ModelError: the model is quantised already, or has no language model that is known.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"'{base}' is quantised already. Set model.quantization to none to use it as it is.")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    language = [weight.name for weight in find_weights(model) if weight.part == "language" and weight.kind is not None]
    if not language:
        raise ModelError(f"'{base}' has no language model that is known here, so it cannot be quantised.")

    def keep(module: nn.Module, name: str) -> Iterator[str]:
        if not any(f"{weight}.".startswith(f"{name}." if name else "") for weight in language):
            yield from [name] if any(isinstance(inner, nn.Linear) for inner in module.modules()) else []
        elif name not in language:
            for own, child in module.named_children():
                yield from keep(child, f"{name}.{own}" if name else own)

    return list(keep(model, ""))


def source_of(base: str) -> str:
    """What Transformers loads for `base`: a folder that has been found, or a hub id."""
    if base in _EMBEDDED:
        return str(embedded_base(aligned=_EMBEDDED[base]))
    return found_model(base, "model.base", f", a hub id such as 'org/name', or one of {', '.join(_EMBEDDED)}")


def found_model(source: str, what: str, others: str) -> str:
    """A model's folder, or what can be a hub id.

    Args:
        source: as it was given.
        what: the key or option that it was given for.
        others: what may be given in place of a folder, for the message.

    Raises:
        ModelError: it is neither.
    """
    folder = Path(os.path.expanduser(source))
    if os.path.isfile(folder / "config.json"):
        return str(folder)
    if source.count("/") != 1 or source.startswith((".", "~", "/")) or os.path.exists(folder):
        raise ModelError(
            f"{what} is '{source}', but there is no model there: {folder / 'config.json'} is missing. Give a folder "
            f"written by save_pretrained{others}."
        )
    return source
