"""The table that conformance tests run over: kinds of layers, gates, layouts of scores, and what is excepted.

A behaviour is a function of a `Case` that raises where the case does not have it. `run` takes one through every case
of a sweep but for those that an `Exemption` names; `run_exemption` takes it through those, each of which must fail as
the table says. So the table is exact: nothing is left out that would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.pytorch_utils import Conv1D

from maskft import MaskConfig
from maskft.tuner import MaskLayer


class FusedAttention(nn.Module):
    """Something like attention, with q, k and v in one layer."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(6, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        return torch.tanh(q * k) + v


class Experts(nn.Module):
    """A mixture of 4 experts, 2 for each token; their weights lie as (experts, out, in) or (experts, in, out)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.mlp = GptOssMLP(_experts(GptOssConfig, intermediate_size=8, num_local_experts=4))
        else:
            self.mlp = Qwen3MoeSparseMoeBlock(_experts(Qwen3MoeConfig, moe_intermediate_size=8, num_experts=4))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return y[0] if isinstance(y, tuple) else y


def _experts(config: type[PreTrainedConfig], **sizes: int) -> PreTrainedConfig:
    made = config(hidden_size=8, num_experts_per_tok=2, **sizes)
    made._experts_implementation = "grouped_mm"  # as Transformers chooses for whole models
    return made


@dataclass(frozen=True)
class Kind:
    """A net with masked layers of one kind.

    Attributes:
        build: makes the net.
        shape: of its input, batch first.
        fields: of MaskConfig, which say what is masked.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fields: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["0"]})

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        if "embedding" in [type(module).__name__.lower() for module in self.build()]:
            return torch.randint(0, 9, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS = {
    "linear": Kind(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)),
        (3, 2, 6),
        {"target_modules": ["0", "2"]},
    ),
    "transposed": Kind(lambda: nn.Sequential(Conv1D(5, 6)), (3, 2, 6)),
    "conv1d": Kind(lambda: nn.Sequential(nn.Conv1d(3, 4, 2)), (2, 3, 5)),
    "conv2d": Kind(lambda: nn.Sequential(nn.Conv2d(2, 4, 2, stride=2)), (2, 2, 4, 4)),
    "grouped": Kind(lambda: nn.Sequential(nn.Conv2d(4, 6, 2, groups=2)), (2, 4, 3, 3)),
    "conv3d": Kind(lambda: nn.Sequential(nn.Conv3d(2, 3, 2)), (2, 2, 3, 3, 3)),
    "embedding": Kind(lambda: nn.Sequential(nn.Embedding(9, 5)), (4, 6)),
    "experts": Kind(lambda: nn.Sequential(Experts(transposed=False)), (2, 5, 8), EXPERTS),
    "experts-transposed": Kind(lambda: nn.Sequential(Experts(transposed=True)), (2, 5, 8), EXPERTS),
    "fused": Kind(lambda: nn.Sequential(FusedAttention()), (3, 2, 6), {"target_modules": ["qkv_proj"]}),
}
GATES: dict[str, dict[str, Any]] = {
    "soft": {"gate": "soft", "init_gate": 0.9},
    "normalized": {"gate": "normalized", "init_gate": 0.9},
    "centered": {"gate": "centered"},
    "topk": {"gate": "topk", "keep_ratio": 0.6},
    "topk-global": {"gate": "topk", "keep_ratio": 0.6, "ranking": "global"},
    "threshold": {"gate": "threshold", "init_gate": 0.6},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "low-rank": {"score_layout": "low-rank", "rank": 2},
    "row": {"score_layout": "row"},
    "column": {"score_layout": "column"},
    "block": {"score_layout": "block", "block_size": 3},
}
IDENTITIES = ("normalized", "centered", "threshold")
"""Gates that are exactly 1 at the start."""


@dataclass(frozen=True)
class Case:
    """One kind of layer under one gate, with scores in one layout."""

    kind: str
    gate: str
    layout: str

    def net(self) -> nn.Module:
        """The net, with the same weights each time."""
        torch.manual_seed(1)
        return KINDS[self.kind].build().eval()

    def inputs(self) -> Tensor:
        return KINDS[self.kind].inputs()

    def config(self, **fields: Any) -> MaskConfig:
        """A configuration whose offsets are spread as N(0, 1), unless it says otherwise."""
        named = {**KINDS[self.kind].fields, **GATES[self.gate], **LAYOUTS[self.layout]}
        return MaskConfig(**{"init_weights": False, **named, **fields})

    def model(self, net: nn.Module | None = None, adapter_name: str = "default", **fields: Any) -> PeftModel:
        """The net with one adapter, the same scores each time."""
        bare = self.net() if net is None else net
        torch.manual_seed(2)
        return get_peft_model(bare, self.config(**fields), adapter_name=adapter_name).eval()

    def two(self) -> PeftModel:
        """The net with the adapters "default" and "other", whose scores differ; the first is active."""
        model = self.model()
        torch.manual_seed(5)
        model.add_adapter("other", self.config())
        return model.eval()

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            y: Tensor = model(self.inputs())
        return y

    def loss(self, model: nn.Module) -> Tensor:
        y: Tensor = model(self.inputs())
        return y.float().square().mean()


def masked_layers(model: nn.Module) -> list[MaskLayer]:
    return [module for module in model.modules() if isinstance(module, MaskLayer)]


def frozen_weights(model: nn.Module) -> list[Tensor]:
    """Copies of the weights under masks as they are now, merged or not."""
    return [layer.frozen_parameter().detach().clone() for layer in masked_layers(model)]


def scores_of(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    ending = f".{adapter_name}"
    return {n: p for n, p in model.named_parameters() if ".mask_" in n and n.endswith(ending)}


def assert_all_equal(ones: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def assert_gradients_close(ones: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Equal but for the order in which products were summed, whose parts may be larger than the sum."""
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


Behaviour = Callable[[Case], None]
Sweep = Sequence[Case]

EVERYTHING: Sweep = [Case(*names) for names in product(KINDS, GATES, LAYOUTS)]
"""Every combination."""
EACH_ONCE: Sweep = list(
    dict.fromkeys(
        [Case(kind, "soft", "dense") for kind in KINDS]
        + [Case("linear", gate, "dense") for gate in GATES]
        + [Case("linear", "soft", layout) for layout in LAYOUTS]
        + [Case("experts", gate, layout) for gate, layout in (("topk", "low-rank"), ("centered", "block"))]
    )
)
"""Every kind, gate and layout at least once, for behaviours that take long and know nothing of two of the three."""


@dataclass(frozen=True)
class Exemption:
    """Cases that do not have a behaviour.

    Attributes:
        behaviour: its function's name.
        where: which cases.
        reason: why.
        raises: what the behaviour raises there.
        match: pattern of the message.
    """

    behaviour: str
    where: Callable[[Case], bool]
    reason: str
    raises: type[BaseException] = AssertionError
    match: str | None = None


def run(behaviour: Behaviour, sweep: Sweep, exemptions: Sequence[Exemption], kind: str) -> int:
    """Take a behaviour through the cases of a kind that have it; returns how many there are."""
    cases = [case for case in sweep if case.kind == kind and not _exempt(behaviour, case, exemptions)]
    for case in cases:
        try:
            behaviour(case)
        except Exception as error:
            raise AssertionError(f"{behaviour.__name__} fails for {case}") from error
    return len(cases)


def run_exemption(behaviour: Behaviour, sweep: Sweep, exemption: Exemption) -> int:
    """See that all its cases lack the behaviour; returns how many there are."""
    cases = [case for case in sweep if exemption.where(case)]
    for case in cases:
        with pytest.raises(exemption.raises, match=exemption.match):
            behaviour(case)
    return len(cases)


def _exempt(behaviour: Behaviour, case: Case, exemptions: Sequence[Exemption]) -> bool:
    return any(one.behaviour == behaviour.__name__ and one.where(case) for one in exemptions)
