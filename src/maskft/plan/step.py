"""One training step of a model without values: its batch, its forward pass and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maskft.data import IGNORED
from maskft.errors import RecipeError

CHUNK_TOKENS, CHUNK_WORDS = 4096, 32768
"""Size of the piece of logits that TRL's loss works on at a time on GPUs (TRL 1.16, trl.kernels.chunked_logprob)."""
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Load:
    """What a step works on.

    Attributes:
        batch: rows of one forward pass.
        tokens: of each row, image tokens included.
        images: of each row.
        accumulation: forward passes of one step.
        checkpointing: gradient checkpointing.
        autocast: dtype of autocast; None leaves it off.
        device: "gpu" or "cpu", which have losses of their own.
    """

    batch: int
    tokens: int
    images: int = 0
    accumulation: int = 1
    checkpointing: bool = False
    autocast: torch.dtype | None = None
    device: str = "gpu"


def image_tokens(model: Any, fake: FakeTensorMode) -> tuple[int, dict[str, Any]] | None:
    """Tokens of one image and the inputs that hold it; None where the model doesn't see, or in a way not known here.

    The image is as large as makes the number of tokens that the config names, or else as the vision encoder's own.

    Args:
        model: with fake values.
        fake: the mode of its values.
    """
    vision = getattr(model.config, "vision_config", None)
    if vision is None or not hasattr(model, "get_image_features"):
        return None
    expected = getattr(model.config, "image_seq_length", None)
    found = []
    for inputs in _images(vision, expected, model.dtype, fake):
        try:
            with torch.no_grad(), fake:
                output = model.get_image_features(**inputs)
        except Exception:  # another family's form of an image
            continue
        features = getattr(output, "pooler_output", None)
        features = getattr(output, "last_hidden_state", output) if features is None else features
        count = sum(f.shape[-2] for f in features) if isinstance(features, list | tuple) else features.shape[-2]
        found.append((int(count), inputs))
    return next((image for image in found if image[0] == expected), found[0] if found else None)


def _images(vision: Any, tokens: int | None, dtype: torch.dtype, fake: FakeTensorMode) -> list[dict[str, Any]]:
    """One image in the sizes that a model may want: its encoder's, and the square that has a patch for each token."""
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    sizes = [] if size is None else [(size, size) if isinstance(size, int) else tuple(size)]
    if tokens and isinstance(patch, int) and math.isqrt(tokens) ** 2 == tokens:
        sizes.append((math.isqrt(tokens) * patch,) * 2)
    with fake:
        return [{"pixel_values": torch.empty(1, 3, *each, dtype=dtype)} for each in dict.fromkeys(sizes)]


def batch(load: Load, config: Any, image: tuple[int, dict[str, Any]] | None) -> dict[str, Tensor]:
    """Inputs and labels of one forward pass. All rows but the last have `load.tokens` tokens; of several rows the last
    is one shorter, as rows differ in real batches, so that there is an attention mask.

    Raises:
        RecipeError: the images have more tokens than a row.
    """
    ids = torch.full((load.batch, load.tokens), 3)
    labels = torch.full_like(ids, 3)
    mask = torch.ones_like(ids)
    if load.batch > 1:
        mask[-1, -1] = 0
        labels[-1, -1] = IGNORED
    inputs: dict[str, Any] = {}
    if image is not None and load.images:
        count = image[0] * load.images
        if count >= load.tokens:
            raise RecipeError(
                f"{load.images} image(s) take {count} tokens, and a row has {load.tokens}. Give more tokens "
                "(training.max_length or --tokens) or fewer images."
            )
        ids[:, :count] = _image_token(config)
        labels[:, :count] = IGNORED
        for name, value in image[1].items():
            inputs[name] = value.new_empty(load.batch * load.images * value.shape[0], *value.shape[1:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **inputs}


def _image_token(config: Any) -> int:
    token = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token is None else token)


def make_loss(model: Any, inputs: dict[str, Tensor], load: Load) -> Loss:
    """The loss that training on `load.device` computes, as a function without arguments."""
    items = (inputs["labels"] != IGNORED).sum()
    if load.device == "cpu":
        from maskft.trainer import labelled_loss

        run = _as_prepared(model, load)
        return lambda: labelled_loss(run, inputs, items)
    chunked = find_spec("trl.kernels") is not None
    run = _as_prepared(_Chunked(model) if chunked else model, load)
    return lambda: run(**inputs, use_cache=False).loss


def _as_prepared(model: Any, load: Load) -> Any:
    """The forward pass as accelerate makes it: under autocast, with outputs in fp32."""
    if load.autocast is None:
        return model

    def run(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=load.autocast):
            return model(**inputs)

    return convert_outputs_to_fp32(run)


class _Chunked:
    """A model whose loss comes from pieces of the logits, with the memory that TRL's needs on a GPU."""

    def __init__(self, model: Any) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model

    def __call__(self, *, labels: Tensor, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1]
        head = self.model.get_output_embeddings()
        mask = labels[:, 1:] != IGNORED
        values: Tensor = _ChunkedLogProbabilities.apply(hidden[mask], head.weight)  # type: ignore[no-untyped-call]
        return CausalLMOutput(loss=-values.sum())


class _ChunkedLogProbabilities(torch.autograd.Function):
    """hidden (n, h), weight (v, h) -> (n,), by tiles of the logits that are made anew in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        kept = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(hidden.shape[0], CHUNK_TOKENS), CHUNK_WORDS)
        return kept[0] + tile[0, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        dhidden = torch.empty_like(hidden, dtype=torch.float32)
        dweight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = hidden.new_empty(min(hidden.shape[0], CHUNK_TOKENS), CHUNK_WORDS)
        dhidden += tile[0, 0]
        return dhidden.to(hidden.dtype), None if dweight is None else dweight.to(weight.dtype)
