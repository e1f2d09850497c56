"""What a masked layer is and computes, for every kind of layer under every gate with scores in every layout."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call

from maskft.errors import UserError
from maskft.gates import TopK
from maskft.linear import masked_weight, plain_masked_weight
from maskft.tuner import MaskLayer

from .conformance import (
    EACH_ONCE,
    EVERYTHING,
    IDENTITIES,
    KINDS,
    Behaviour,
    Case,
    Exemption,
    Sweep,
    assert_all_equal,
    assert_gradients_close,
    frozen_weights,
    masked_layers,
    run,
    run_exemption,
    scores_of,
)

# -- what the layers are -----------------------------------------------------------------------------------------------


def exposes_what_peft_looks_for(case: Case) -> None:
    model = case.model()
    for layer in masked_layers(model):
        *_, out_features, in_features = layer.matrix_shape()
        assert (layer.out_features, layer.in_features) == (out_features, in_features)
        assert layer.supports_lora_conversion() == (case.kind in ("linear", "transposed", "fused"))
        assert repr(layer).startswith(f"mask.{type(layer).__name__}(")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(scores_of(model))
    assert all(model.base_model.prefix in name for name in trainable)
    assert {p.dtype for p in scores_of(model).values()} == {torch.float32}


def is_indifferent_to_names(case: Case) -> None:
    one, other = case.model(), case.model(adapter_name="some-name")
    assert torch.equal(case.output(one), case.output(other))
    assert [name.replace("default", "some-name") for name in scores_of(one)] == list(scores_of(other, "some-name"))


def starts_as_the_base(case: Case) -> None:
    base = case.output(case.net())
    assert torch.equal(case.output(case.model(init_weights=True)), base)


def starts_as_its_gate_says(case: Case) -> None:
    layers = masked_layers(case.model(init_weights=True))
    kept = total = 0
    for layer in layers:
        weight, (mask,) = layer.pretrained_matrix(), layer.masks(["default"])
        masked = masked_weight(weight, [mask]).detach()
        if case.gate == "soft":
            torch.testing.assert_close(masked, 0.9 * weight, rtol=1e-6, atol=0)
        elif case.gate in IDENTITIES:
            assert torch.equal(masked, weight)
        else:
            assert torch.equal(masked, torch.where(masked == 0, 0, weight))
            kept, total = kept + int(masked.count_nonzero()), total + masked.numel()
            if isinstance(mask.gate, TopK):
                heights = list(mask.gate.slices) or [weight.shape[-2]]
                for piece in masked.split(heights, dim=-2):
                    ranked = piece.flatten(-2)
                    assert (ranked.count_nonzero(-1) == round(0.6 * ranked.shape[-1])).all()
    if case.gate == "topk-global":
        assert kept == round(0.6 * total)


def reports_the_delta(case: Case) -> None:
    model = case.model()
    for layer in masked_layers(model):
        weight = layer.pretrained_matrix()
        (mask,) = layer.masks(["default"])
        m = mask.gate.value(mask.offset(weight), weight).detach()
        # W m - W against W (m - 1): one rounding of W m
        torch.testing.assert_close(
            layer.matrix(layer.get_delta_weight("default")), weight * (m - 1), rtol=1e-5, atol=1e-6
        )


# -- running and training ----------------------------------------------------------------------------------------------


def plain_output(case: Case, model: PeftModel) -> Tensor:
    """The model's output with masked weights made by autograd alone."""
    weights = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MaskLayer):
            (mask,) = layer.masks(["default"])
            bare = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            weights[bare] = layer.unmatrix(plain_masked_weight(layer.pretrained_matrix(), [mask]))
    y: Tensor = functional_call(case.net(), weights, (case.inputs(),))
    return y


def equals_the_plain_version(case: Case) -> None:
    """Masks bit for bit; products and gradients but for the order of summation."""
    model = case.model()
    for layer in masked_layers(model):
        weight, (mask,) = layer.pretrained_matrix(), layer.masks(["default"])
        m = mask.gate.value(mask.offset(weight), weight)
        assert torch.equal(masked_weight(weight, [mask]), m * weight)
    y = model(case.inputs())
    plain = plain_output(case, model)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)
    scores = list(scores_of(model).values())
    fast = torch.autograd.grad(y.square().sum(), scores)
    assert_gradients_close(fast, torch.autograd.grad(plain.square().sum(), scores))


def trains_scores_alone(case: Case) -> None:
    model = case.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(model).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
        assert (parameter.grad is not None) == parameter.requires_grad
        assert torch.isfinite(parameter).all()


def moves_all_scores_at_the_first_step(case: Case) -> None:
    model = case.model(init_weights=True)
    case.loss(model).backward()
    assert all(p.grad is not None and p.grad.any() for p in scores_of(model).values())


def computes_in_half_precision(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = case.model(case.net().to(dtype))
        inputs = case.inputs()
        y = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        for parameter in scores_of(model).values():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
        before = frozen_weights(model)
        model.merge_adapter()
        with torch.no_grad():
            merged = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        assert torch.equal(merged, y)
        model.unmerge_adapter()
        assert_all_equal(frozen_weights(model), before)


def computes_under_autocast(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = case.net().to(dtype)
        inputs = case.inputs()
        x = inputs.to(dtype) if inputs.is_floating_point() else inputs
        with torch.autocast("cpu", torch.bfloat16):
            expected = net(x).dtype
            model = case.model(net)
            y = model(x)
        assert y.dtype == expected
        y.float().square().mean().backward()
        for parameter in scores_of(model).values():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()


def compiles_without_graph_breaks(case: Case) -> None:
    model = case.model()
    expected = model(case.inputs())
    gradients = torch.autograd.grad(expected.square().sum(), list(scores_of(model).values()))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # by torch itself
        y = torch.compile(model, backend="eager", fullgraph=True)(case.inputs())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    assert_gradients_close([parameter.grad for parameter in scores_of(model).values()], gradients)


def refuses_batches_of_several_adapters(case: Case) -> None:
    model = case.two()
    with pytest.raises(UserError, match="a batch cannot mix masks"):
        model(case.inputs(), adapter_names=["default", "other"])


BEHAVIOURS: dict[Behaviour, Sweep] = {
    **dict.fromkeys(
        [
            exposes_what_peft_looks_for,
            is_indifferent_to_names,
            starts_as_the_base,
            starts_as_its_gate_says,
            reports_the_delta,
            equals_the_plain_version,
            trains_scores_alone,
            moves_all_scores_at_the_first_step,
            computes_in_half_precision,
            computes_under_autocast,
            refuses_batches_of_several_adapters,
        ],
        EVERYTHING,
    ),
    compiles_without_graph_breaks: EACH_ONCE,  # half a second each
}
EXEMPTIONS = [
    Exemption(
        "starts_as_the_base",
        lambda case: case.gate == "soft",
        "The published soft gate starts at m0 < 1: `starts_as_its_gate_says` has the bound.",
    ),
    Exemption(
        "starts_as_the_base",
        lambda case: case.gate in ("topk", "topk-global"),
        "A hard mask cuts 1 - keep_ratio of the weights from the first step on.",
    ),
    Exemption(
        "moves_all_scores_at_the_first_step",
        lambda case: case.layout == "low-rank",
        "L starts at zero, so that R has no gradient before L has moved, as in LoRA.",
    ),
    Exemption(
        "compiles_without_graph_breaks",
        lambda case: case.gate == "topk-global",
        "The cut is found once for all layers, and anew when a score has changed: by Python, outside the graph.",
        raises=torch._dynamo.exc.Unsupported,
        match="torch.compiler.disable",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_conformance(behaviour: Behaviour, kind: str) -> None:
    assert run(behaviour, BEHAVIOURS[behaviour], EXEMPTIONS, kind)


@pytest.mark.parametrize("exemption", EXEMPTIONS, ids=lambda one: f"{one.behaviour}: {one.reason[:30]}")
def test_exemptions_are_exact(exemption: Exemption) -> None:
    (behaviour,) = (one for one in BEHAVIOURS if one.__name__ == exemption.behaviour)
    assert run_exemption(behaviour, BEHAVIOURS[behaviour], exemption)
