"""What a step without values keeps is what a real one keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from maskft import gates, selection
from maskft.memory import MODES
from maskft.plan.skeleton import Skeleton, imagine
from maskft.plan.step import Load, batch, make_loss
from maskft.plan.trace import ROLES, Recorder, Timeline, record
from maskft.plan.ways import PLAIN, Way, with_mode
from maskft.tuner import MaskConfig
from tests.tuner.models import TEXT, tiny_llava

ROWS = {role: row for row, role in enumerate(ROLES)}


def llama(**overrides: Any) -> Skeleton:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**TEXT, **overrides})).to(torch.bfloat16)
    return Skeleton(model.requires_grad_(False).eval())


def ways(config: MaskConfig) -> dict[str, Way]:
    return {
        "soft": with_mode("soft", config, MODES["fast"], "none"),
        "bf16 scores": with_mode("soft", config, MODES["tight"], "none"),
        "topk": with_mode("topk", MaskConfig(gate="topk", target_modules=config.target_modules), PLAIN, "none"),
        "low-rank": with_mode("low", MaskConfig(score_layout="low-rank", rank=2), PLAIN, "none"),
        "LoRA": Way("LoRA", "lora", PLAIN, config, 2),
        "full": Way("full", "full", PLAIN, config, dtype=torch.bfloat16),
    }


def given_values(model: nn.Module) -> None:
    """Real tensors in place of those on the meta device."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    new = torch.randn(tensor.shape).mul_(0.1).to(tensor.dtype)
                    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    kept[name] = made.setdefault(id(tensor), new)


def timelines(skeleton: Skeleton, way: Way, load: Load) -> tuple[Timeline, Timeline]:
    """Of a pass without values, and of a real one."""
    found = []
    for fake in (FakeTensorMode(allow_non_fake_inputs=True), None):
        model = way.attached(skeleton, None)
        if fake is None:
            given_values(model)
        else:
            imagine(model, fake)
        model.train()
        if load.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        inputs = batch(load, model.config, None)
        found.append(record(model, make_loss(model, inputs, load), fake=fake, widths=(64,), inputs=inputs.values()))
    return found[0], found[1]


@pytest.mark.parametrize("name", ways(MaskConfig()))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_a_pass_without_values_keeps_what_a_real_one_keeps(
    name: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (gates, selection):  # real values are ranked in other operations
        monkeypatch.setattr(module, "is_at_hand", lambda values: False)
    skeleton = llama()
    config = skeleton.targets(MaskConfig())
    way = ways(config)[name]
    way = replace(way, config=skeleton.targets(way.config), compiled=False)
    imagined, real = timelines(skeleton, way, Load(batch=2, tokens=12, autocast=autocast, device="cpu"))
    assert imagined.turn == real.turn
    for policy in ("freed", "kept", "elsewhere"):
        assert np.array_equal(imagined.curves(gradients=policy), real.curves(gradients=policy))


def test_checkpointing_keeps_less_and_the_same_with_and_without_values() -> None:
    skeleton = llama(num_hidden_layers=4)
    way = replace(with_mode("soft", skeleton.targets(MaskConfig()), MODES["fast"], "none"), compiled=False)
    whole, _ = timelines(skeleton, way, Load(batch=1, tokens=32, device="cpu"))
    imagined, real = timelines(skeleton, way, Load(batch=1, tokens=32, checkpointing=True, device="cpu"))
    assert np.array_equal(imagined.curves(), real.curves())
    at_turn = [t.curves()[ROWS["activations"], t.turn] for t in (imagined, whole)]
    assert at_turn[0] < at_turn[1] / 2


class Squares(nn.Module):
    """y = sum((x W)^2), whose bytes are counted by hand: x W, its square and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).pow(2).sum()


def test_bytes_counted_by_hand() -> None:
    model, x = Squares(), torch.ones(2, 4)
    timeline = record(model, lambda: model(x), inputs=[x])
    kept = timeline.curves(gradients="kept")
    assert kept[ROWS["activations"], timeline.turn] == 4 * (2 * 4 + 2 * 8 + 1)  # x, x W, y
    assert kept[ROWS["temporary"], : timeline.turn + 1].max() == 4 * 2 * 8  # the squares
    assert kept[ROWS["gradients"], -1] == 4 * 4 * 8
    assert timeline.curves(gradients="freed")[ROWS["gradients"]].max() == 4 * 4 * 8
    assert timeline.curves(gradients="elsewhere")[ROWS["gradients"]].max() == 4 * 4 * 8
    assert model.weight.grad is None


def test_logits_are_told_by_their_width() -> None:
    model, x = Squares(), torch.ones(2, 4)
    timeline = record(model, lambda: model(x), widths=(8,))
    curves = timeline.curves()
    assert curves[ROWS["logits"], timeline.turn] == 4 * 2 * 8
    assert curves[ROWS["activations"], timeline.turn] == 4


def test_values_of_integers_are_real_and_decide() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x = torch.empty(6, 4)
    mask = torch.tensor([True, False, True, True, False, False])
    with Recorder(fake):
        picked = x[mask]
        assert picked.shape == (3, 4)
        assert int(mask.sum()) == 3
        zeros = torch.zeros(3)
        assert type(zeros).__name__ == "FakeTensor"
        x[mask] = picked + 1
        assert (mask.long() * 2).tolist() == [2, 0, 2, 2, 0, 0]
        wide = torch.ones(1 << 13, 1, dtype=torch.bool) & torch.ones(1, 1 << 13, dtype=torch.bool)
        assert type(wide).__name__ == "FakeTensor"


def test_images_of_a_size_that_the_encoder_does_not_take_have_its_own() -> None:
    from maskft.plan.step import image_tokens

    model = tiny_llava()
    model.config.image_seq_length = 1  # one patch, where CLIP wants four
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    imagine(model, fake)
    image = image_tokens(model, fake)
    assert image is not None
    assert (image[0], image[1]["pixel_values"].shape[-1]) == (4, 8)


@pytest.mark.parametrize(("tokens", "size"), [(9, 12), (10, 8), (None, 8)])
def test_an_image_has_a_patch_for_each_token(tokens: int | None, size: int) -> None:
    from maskft.plan.step import _images

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    vision = tiny_llava().config.vision_config
    assert _images(vision, tokens, torch.float32, fake)[-1]["pixel_values"].shape == (1, 3, size, size)


def test_images_go_through_the_vision_encoder() -> None:
    from maskft.plan.step import image_tokens

    model = tiny_llava()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    imagine(model, fake)
    image = image_tokens(model, fake)
    assert image is not None
    assert image[0] == 4
    inputs = batch(Load(batch=2, tokens=12, images=1), model.config, image)
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert (inputs["labels"] == -100).sum() == 9
    load = Load(batch=2, tokens=12, images=1, device="cpu")
    timeline = record(model, make_loss(model, inputs, load), fake=fake, inputs=inputs.values())
    assert timeline.curves().sum(axis=0).max() > 0
