"""What can be done with adapters, for every kind of layer under every gate with scores in every layout."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from maskft.linear import masked_weight

from .conformance import (
    EACH_ONCE,
    EVERYTHING,
    KINDS,
    Behaviour,
    Case,
    Sweep,
    assert_all_equal,
    frozen_weights,
    masked_layers,
    run,
    scores_of,
)

# -- copies and files --------------------------------------------------------------------------------------------------


def saves_and_loads(case: Case) -> None:
    model = case.model()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {path.name for path in Path(folder).iterdir()}
        saved = load_file(Path(folder) / "adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(case.net(), folder)
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert sorted(saved) == sorted(name.removesuffix(".default") for name in scores_of(model))
    assert torch.equal(case.output(loaded), case.output(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def loads_by_way_of_the_meta_device(case: Case) -> None:
    model = case.model()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.net(), folder, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(case.output(loaded), case.output(model))


def saves_selected_adapters(case: Case) -> None:
    model = case.two()
    model.set_adapter("other")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["other"])
        assert [path.name for path in Path(folder).iterdir() if path.is_dir()] == ["other"]
        alone = PeftModel.from_pretrained(case.net(), f"{folder}/other")
        alone.load_adapter(f"{folder}/other", "again")
    assert torch.equal(case.output(alone), case.output(model))
    alone.set_adapter("again")
    assert torch.equal(case.output(alone), case.output(model))


def loads_with_a_given_configuration(case: Case) -> None:
    model, config = case.model(), case.config()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.net(), folder, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert torch.equal(case.output(loaded), case.output(model))


def copies(case: Case) -> None:
    model = case.model()
    expected = case.output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.output(other), expected)
        with torch.no_grad():
            for parameter in (p for name, p in scores_of(other).items() if "right" not in name):
                parameter.fill_(-9)
        assert not torch.equal(case.output(other), expected)
        assert torch.equal(case.output(model), expected)


def is_injected_without_a_wrapper(case: Case) -> None:
    model = case.model()
    injected = inject_adapter_in_model(case.config(), case.net()).eval()
    result = set_peft_model_state_dict(injected, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(case.output(injected), case.output(model))


def is_built_on_the_meta_device(case: Case) -> None:
    model = case.model()
    with torch.device("meta"):
        empty = KINDS[case.kind].build().eval()
    empty = get_peft_model(empty, case.config()).eval()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(case.output(empty), case.output(model))


# -- merging -----------------------------------------------------------------------------------------------------------


def merges_and_unmerges(case: Case) -> None:
    model = case.model()
    expected, before = case.output(model), frozen_weights(model)
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert torch.equal(case.output(model), expected)
        model.unmerge_adapter()
        assert_all_equal(frozen_weights(model), before)
        assert torch.equal(case.output(model), expected)


def merges_safely_or_not_at_all(case: Case) -> None:
    model = case.model()
    expected, before = case.output(model), frozen_weights(model)
    for layer in masked_layers(model):
        scores = layer.parameters_of("default")[0]
        kept = scores.detach().clone()
        with torch.no_grad():
            scores.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
            layer.merge(safe_merge=True)
        assert_all_equal(frozen_weights(model), before)
        with torch.no_grad():
            scores.copy_(kept)
    assert torch.equal(case.output(model), expected)


def merges_and_unloads(case: Case) -> None:
    net = case.net()
    names, base = list(net.state_dict()), case.output(net)
    model = case.model(net)
    expected = case.output(model)
    assert torch.equal(case.output(copy.deepcopy(model).unload()), base)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.equal(case.output(merged), expected)
    assert list(merged.state_dict()) == names
    assert not masked_layers(merged)


def multiplies_active_masks(case: Case) -> None:
    model = case.two()
    model.base_model.set_adapter(["default", "other"])
    for layer in masked_layers(model):
        weight = layer.pretrained_matrix()
        masks = layer.active_masks()
        m1, m2 = (mask.gate.value(mask.offset(weight), weight) for mask in masks)
        torch.testing.assert_close(masked_weight(weight, masks), weight * m1 * m2, rtol=1e-6, atol=0)
    case.loss(model).backward()
    assert all(p.grad is not None for name in ("default", "other") for p in scores_of(model, name).values())


def merges_several_in_any_number_of_steps(case: Case) -> None:
    model = case.two()
    model.base_model.set_adapter(["default", "other"])
    expected, before = case.output(model), frozen_weights(model)
    model.merge_adapter(["default", "other"])
    at_once = frozen_weights(model)
    assert torch.equal(case.output(model), expected)
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already following adapters were merged")
        model.merge_adapter(["default"])
        model.merge_adapter(["other"])
    assert_all_equal(frozen_weights(model), at_once)
    model.unmerge_adapter()
    assert_all_equal(frozen_weights(model), before)


# -- adapters ----------------------------------------------------------------------------------------------------------


def switches_adapters(case: Case) -> None:
    model = case.two()
    first = case.output(model)
    model.set_adapter("other")
    second = case.output(model)
    assert not torch.equal(second, first)
    assert all(p.requires_grad for p in scores_of(model, "other").values())
    assert not any(p.requires_grad for p in scores_of(model).values())
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)


def disables_adapters(case: Case) -> None:
    base = case.output(case.net())
    model = case.model()
    expected = case.output(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(case.output(model), base)
            with model.disable_adapter():
                assert torch.equal(case.output(model), base)
        assert torch.equal(case.output(model), expected)


def deletes_adapters(case: Case) -> None:
    base = case.output(case.net())
    model = case.two()
    first = case.output(model)
    model.delete_adapter("other")
    assert torch.equal(case.output(model), first)
    model.delete_adapter("default")
    assert not scores_of(model)
    assert torch.equal(case.output(model.base_model), base)
    for layer in masked_layers(model):
        kept = [getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
        assert not any(len(adapters) for adapters in kept)


BEHAVIOURS: dict[Behaviour, Sweep] = {
    **dict.fromkeys(
        [
            saves_and_loads,
            copies,
            is_injected_without_a_wrapper,
            is_built_on_the_meta_device,
            merges_and_unmerges,
            merges_safely_or_not_at_all,
            merges_and_unloads,
            multiplies_active_masks,
            merges_several_in_any_number_of_steps,
            switches_adapters,
            disables_adapters,
            deletes_adapters,
        ],
        EVERYTHING,
    ),
    # ways of loading differ in what they do around the layers
    **dict.fromkeys(
        [loads_by_way_of_the_meta_device, loads_with_a_given_configuration, saves_selected_adapters], EACH_ONCE
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_conformance(behaviour: Behaviour, kind: str) -> None:
    assert run(behaviour, BEHAVIOURS[behaviour], [], kind)
