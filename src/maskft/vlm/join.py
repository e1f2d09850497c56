"""Joining a vision tower, a projector and a language model into one LLaVA model of Transformers.

    pixels -> tower, a hidden layer -> linear, activation, linear -> language model -> head -> logits

`LlavaForConditionalGeneration` has a head without bias. Where the language model's has one, it is moved into the
head's weight and the bias of the last layer norm, which changes no logit: `absorb_head_bias`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskft.errors import ModelError

PROJECTORS = {"linear": "linear", "mlp2x_gelu": "gelu"}
"""Activation between the projector's two matrices, by the projector's name."""
_PROBE_IDS = 12
_MEAN_SHIFT = 0.25  # of the normalised hidden state, where the norm's own bias is too small to carry the head's


class Features(NamedTuple):
    """Which outputs of a tower become image tokens.

    Attributes:
        layer: index into the tower's hidden states; 0 is before the first layer, -1 after the last.
        strategy: "default" leaves the first token out (a class token), "full" keeps all.
        patch_size: pixels of a patch's side.
        extra: tokens the tower has beside one for each patch, such as class and register tokens.
        tokens: image tokens of one image.
    """

    layer: int
    strategy: Literal["default", "full"]
    patch_size: int
    extra: int
    tokens: int


def measure_tower(tower: Any, images: Any, *, layer: int, keep_class_token: bool, name: str) -> Features:
    """Run a tower on a blank image to see what it gives.

    Args:
        tower: a vision model of Transformers.
        images: its image processor.
        layer: as in `Features`.
        keep_class_token: keep every token, also where there are more than patches.
        name: of the tower, for messages.

    Raises:
        ModelError: images do not come out in one size, or the tower does not give one vector a patch.
    """
    from PIL import Image

    patch = getattr(tower.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ModelError(f"the vision tower {name} has no square patches, so it gives no image tokens. {_FITTING}")
    pixels = [dict(images(Image.new("RGB", size), return_tensors="pt")) for size in ((90, 60), (60, 90))]
    if any(set(given) != {"pixel_values"} for given in pixels) or (
        pixels[0]["pixel_values"].shape != pixels[1]["pixel_values"].shape
    ):
        raise ModelError(
            f"the image processor of {name} gives images of changing size or shape, which the LLaVA form cannot take. "
            f"{_FITTING}"
        )
    try:
        with torch.inference_mode():
            values = pixels[0]["pixel_values"].to(tower.dtype)
            hidden = tower(pixel_values=values, output_hidden_states=True).hidden_states
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"the vision tower {name} cannot read an image: {error}. {_FITTING}") from error
    if not -len(hidden) <= layer < len(hidden):
        raise ModelError(f"--vision-layer is {layer}, but {name} has the hidden states 0 to {len(hidden) - 1}.")
    height, width = values.shape[-2:]
    patches = (height // patch) * (width // patch)
    shape = tuple(hidden[layer].shape)
    if len(shape) != 3 or shape[1] < patches or shape[2] != tower.config.hidden_size:
        raise ModelError(
            f"the vision tower {name} gives hidden states of shape {shape} for {patches} patches, not one vector a "
            f"patch. {_FITTING}"
        )
    extra = shape[1] - patches
    strategy: Literal["default", "full"] = "default" if extra and not keep_class_token else "full"
    return Features(layer, strategy, patch, extra, shape[1] - (strategy == "default"))


_FITTING = "Towers that fit: SigLIP and SigLIP 2 at a fixed resolution, CLIP, DINOv2, ViT."


def join(
    language: Any,
    tower: Any,
    features: Features,
    *,
    image_token_id: int,
    projector: str,
    weights: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Any:
    """Make one LLaVA model of the parts, which it takes over without copying.

    Args:
        language: a causal language model with the layout checked by `check_language_model`, its head without bias.
        tower: a vision model.
        features: from `measure_tower`.
        image_token_id: a row of the embeddings; images take the place of this token.
        projector: a key of PROJECTORS. "linear" is kept as two matrices, the second one the identity.
        weights: of the projector, under the names `linear_1.weight`, ...; None draws them with `seed` as torch does
            for linear layers. A single linear layer is given as `linear_1` alone.

    Returns:
        LlavaForConditionalGeneration in the language model's dtype.

    Raises:
        ModelError: `weights` are of other names or shapes.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text_config = copy.deepcopy(language.config)
    config = LlavaConfig(
        text_config=text_config,
        vision_config=copy.deepcopy(tower.config),
        image_token_index=image_token_id,
        projector_hidden_act=PROJECTORS[projector],
        vision_feature_layer=features.layer,
        vision_feature_select_strategy=features.strategy,
        image_seq_length=features.tokens,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(model.model.multi_modal_projector)(config)
    if projector == "linear":
        nn.init.eye_(drawn.linear_2.weight)
        nn.init.zeros_(drawn.linear_2.bias)
    if weights is not None:
        given = {**(drawn.state_dict() if projector == "linear" else {}), **weights}
        try:
            drawn.load_state_dict(given)
        except RuntimeError as error:
            raise ModelError(f"the projector's weights do not fit these models: {error}") from error
    model.model.language_model = language.base_model
    model.model.vision_tower = tower
    model.model.multi_modal_projector = drawn
    model.lm_head = language.get_output_embeddings()
    for part in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, part, getattr(language.generation_config, part))
    return model.to(language.dtype).eval()


def check_language_model(language: Any, name: str) -> None:
    """Raise ModelError unless logits are the head's product with the last hidden state, as the LLaVA form has it.

    Logits that are scaled or capped would be others in the joined model.
    """
    base, head = language.base_model, language.get_output_embeddings()
    if not isinstance(head, nn.Linear) or base is language:
        raise ModelError(f"the language model {name} has no linear output head, so it cannot be joined to a projector.")
    if language.config.tie_word_embeddings and getattr(base, "embed_tokens", None) is not base.get_input_embeddings():
        raise ModelError(
            f"{name} ties its head to embeddings that are not called embed_tokens, which the LLaVA form cannot keep."
        )
    ids = probe_ids(language)
    with torch.inference_mode():
        logits = language(input_ids=ids).logits.float()
        plain = head(base(input_ids=ids).last_hidden_state).float()
    if not torch.allclose(logits, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item()):
        raise ModelError(
            f"the language model {name} scales or caps its logits ({type(language).__name__}), which the LLaVA form "
            "does not do. Compose with another language model."
        )


def probe_ids(language: Any) -> Tensor:
    """A few token ids spread over the vocabulary, (1, 12)."""
    rows = language.get_input_embeddings().num_embeddings
    return torch.linspace(0, rows - 1, _PROBE_IDS).long()[None]


def grow_embeddings(language: Any, rows: int) -> bool:
    """Give embeddings and head at least so many rows; new ones are the mean of the others. Returns whether it did.

    A mean row's logit is the mean of all logits, so the new token is never the likeliest.
    """
    before = language.get_input_embeddings().num_embeddings
    if rows <= before:
        return False
    language.resize_token_embeddings(rows, mean_resizing=False)
    head = language.get_output_embeddings()
    with torch.no_grad():
        for tensor in (language.get_input_embeddings().weight, head.weight, head.bias):
            if tensor is not None:
                tensor[before:] = tensor[:before].float().mean(0).to(tensor.dtype)
    return True


@torch.no_grad()
def absorb_head_bias(language: Any, name: str) -> float | None:
    """Take the bias off a language model's head without changing its logits. Returns the largest change on a probe.

    The last layer norm gives y = g*n + b with mean-free n, so that sum(n) = 0 is a direction of y the head can use:
    with v = 1/g, the head W + c v^T gives W y + c (v . b) for every y. c = bias / (v . b) adds the bias. Where v . b
    is small, b is first moved along g, and the head's product with that shift is taken off the bias.

    Args:
        language: changed in place; its head is untied from the embeddings.
        name: for messages.

    Returns:
        The largest absolute difference of logits, in the model's dtype; None where there is no bias.

    Raises:
        ModelError: there is a bias, but the hidden state is not of a layer norm.
    """
    head, base = language.get_output_embeddings(), language.base_model
    if head.bias is None:
        return None
    ids = probe_ids(language)
    before = language(input_ids=ids).logits.double()
    weight, bias = head.weight.double(), head.bias.double()
    if bias.any():
        norms = [module for module in base.children() if isinstance(module, nn.LayerNorm)]
        if len(norms) != 1 or norms[0].weight is None or norms[0].bias is None:
            raise ModelError(
                f"the output head of {name} has a bias that no layer norm stands before, so the LLaVA form, whose head "
                "has none, cannot keep it."
            )
        gain, shift = norms[0].weight.double(), norms[0].bias.double()
        dead = gain == 0  # there, y is the shift alone
        direction = dead.double() if dead.any() else 1 / gain
        along = dead.double() if dead.any() else gain
        reach = direction @ along
        if (direction @ shift).abs() < _MEAN_SHIFT * reach:
            moved = shift + along * torch.copysign(_MEAN_SHIFT * reach, direction @ shift) / reach
            norms[0].bias.copy_(moved)
        used = norms[0].bias.double()  # as rounded
        rest = bias - weight @ (used - shift)
        weight = weight + torch.outer(rest / (direction @ used), direction)
    plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(head.weight.dtype), requires_grad=False)
    language.config.tie_word_embeddings = False
    language.set_output_embeddings(plain)
    after = plain(base(input_ids=ids).last_hidden_state).double()
    return float((after - before).abs().max())
