"""Composing a vision-language model from any vision tower and any language model of Transformers.

The result is a `LlavaForConditionalGeneration` folder with a projector that has still to be trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maskft.errors import ModelError, did_you_mean
from maskft.folders import refuse_existing, staged
from maskft.vlm.chat import add_image_token, chat_template
from maskft.vlm.join import (
    PROJECTORS,
    absorb_head_bias,
    check_language_model,
    grow_embeddings,
    join,
    measure_tower,
)
from maskft.vlm.load import found_model

DTYPES = ("float32", "bfloat16", "float16")
UNUSED = ("pooler.", "head.", "vision_model.head.", "visual_projection.")
"""Parts of towers that give one vector an image; hidden states do not pass through them."""
_OTHERS = " or a hub id such as 'org/name'"
"""What may be named in place of a folder."""


def compose(
    vision: str,
    language: str,
    out: Path,
    *,
    projector: str = "mlp2x_gelu",
    vision_layer: int = -2,
    features: str = "patch",
    dtype: str | None = None,
    seed: int = 0,
    weights: Path | None = None,
) -> dict[str, Any]:
    """Write a vision-language model made of two published ones.

    Args:
        vision: folder or hub id of a vision model, or of one with a vision tower, such as SigLIP or CLIP.
        language: folder or hub id of a causal language model.
        out: new or empty folder; it appears only once it is complete.
        projector: "mlp2x_gelu" (linear, GELU, linear) or "linear".
        vision_layer: which hidden state of the tower is used; -2 is that before the last layer.
        features: "patch" leaves a class token out, "full" keeps it.
        dtype: "float32", "bfloat16" or "float16"; None that of the language model.
        seed: draws the projector.
        weights: a trained projector's file, such as the projector.safetensors of a run; None draws a new one.

    Returns:
        What was made, as plain values.

    Raises:
        ModelError: one of the two cannot be loaded, or not be composed.
        RunError: `out` exists and is not empty.
    """
    refuse_existing(out)
    check_choice("--projector", projector, PROJECTORS)
    check_choice("--features", features, ("patch", "full"))
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    trained = None if weights is None else _projector_file(weights)
    tower, images = load_tower(vision)
    measured = measure_tower(tower, images, layer=vision_layer, keep_class_token=features == "full", name=vision)
    model, tokenizer = load_language_model(language, dtype)
    return assemble(
        out,
        tower=tower,
        images=images,
        features=measured,
        language=model,
        tokenizer=tokenizer,
        name=language,
        projector=projector,
        weights=trained,
        seed=seed,
    )


def _projector_file(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the projector {path}: {error}. Give a run's projector.safetensors.") from error
    return tensors


def assemble(
    out: Path,
    *,
    tower: Any,
    images: Any,
    features: Any,
    language: Any,
    tokenizer: Any,
    name: str,
    projector: str,
    weights: Any = None,
    template: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Join loaded parts, and write model, processor and chat template. The language model is changed in place.

    Args:
        out: new or empty folder.
        tower, images: a vision model and its image processor.
        features: from `measure_tower`.
        language, tokenizer: a causal language model and its tokenizer.
        name: of the language model, for messages.
        projector, weights, seed: as `join`.
        template: called with tokenizer and image token, gives the chat template; None makes one of the tokenizer's own.

    Returns:
        What was made, as plain values.
    """
    from transformers import LlavaProcessor

    check_language_model(language, name)
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {name} has no end-of-text token. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    token, origin = add_image_token(tokenizer)
    image_token_id = tokenizer.convert_tokens_to_ids(token)
    grown = grow_embeddings(language, max(tokenizer.get_vocab().values()) + 1)
    head_error = absorb_head_bias(language, name)
    if language.generation_config.eos_token_id is None:
        language.generation_config.eos_token_id = tokenizer.eos_token_id
    language.generation_config.pad_token_id = tokenizer.pad_token_id
    chat = (
        template(tokenizer, token) if template else chat_template(tokenizer.chat_template, token, tokenizer.eos_token)
    )
    tokenizer.chat_template = None  # the processor's is the one that knows images
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=features.patch_size,
        num_additional_image_tokens=features.extra,
        vision_feature_select_strategy=features.strategy,
        image_token=token,
        chat_template=chat,
    )
    model = join(
        language, tower, features, image_token_id=image_token_id, projector=projector, weights=weights, seed=seed
    )
    with staged(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return {
        "model": str(out),
        "vision": type(tower).__name__,
        "language": type(language).__name__,
        "projector": projector,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": {
            "vision": _count(model.model.vision_tower),
            "projector": _count(model.model.multi_modal_projector),
            "language": model.num_parameters() - _count(model.model.vision_tower, model.model.multi_modal_projector),
        },
        "image_tokens": features.tokens,
        "vision_layer": features.layer,
        "image_token": token,
        "image_token_id": image_token_id,
        "image_token_is": origin,
        "embeddings_grown": grown,
        "head_bias_absorbed": head_error,
    }


def _count(*modules: Any) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def load_tower(source: str) -> tuple[Any, Any]:
    """A vision model in fp32 or as stored, and its image processor, which works on Pillow.

    Raises:
        ModelError: there is none, or it lacks weights.
    """
    from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor

    source = found_model(source, "--vision", _OTHERS)
    try:
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, "vision_config", config)
        if type(config) not in MODEL_MAPPING:
            raise ModelError(
                f"{source} ({config.model_type}) has no vision tower that Transformers can load by itself."
            )
        kind = MODEL_MAPPING[type(config)]
        tower, report = kind.from_pretrained(source, config=config, use_safetensors=True, output_loading_info=True)
        images = AutoImageProcessor.from_pretrained(source, backend="pil")
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load a vision tower and its image processor from '{source}': {error}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED))
    if missing:
        raise ModelError(
            f"'{source}' lacks {len(missing)} tensors of {kind.__name__}, such as {missing[0]}. Give a vision model's "
            "own folder or hub id."
        )
    return tower.eval(), images


def load_language_model(source: str, dtype: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Raises:
        ModelError: there is none, or it is of another kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = found_model(source, "--language", _OTHERS)
    try:
        config = AutoConfig.from_pretrained(source)
        _require_causal(config, source, MODEL_FOR_CAUSAL_LM_MAPPING)
        chosen = "auto" if dtype is None else getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=chosen, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load a language model and its tokenizer from '{source}': {error}") from error
    return model.eval(), tokenizer


def _require_causal(config: Any, source: str, known: Any) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} ({kind}) is an encoder-decoder. Give a causal language model.")
    if getattr(config, "vision_config", None) is not None:
        raise ModelError(
            f"{source} ({kind}) sees already. Use it as model.base as it is, or give a model of text alone."
        )
    if type(config) not in known:
        raise ModelError(f"{source} ({kind}) is not a causal language model.")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{source} is quantised. Give the unquantised model; a recipe's model.quantization does it later."
        )


def check_choice(option: str, given: str, allowed: Any) -> None:
    """Raise ModelError unless `given` is one of `allowed`."""
    if given not in allowed:
        raise ModelError(f"{option} is '{given}', but must be {' or '.join(allowed)}.{did_you_mean(given, allowed)}")
