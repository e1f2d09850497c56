"""Masked layers whose weights are in pieces, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from maskft import MaskConfig
from maskft.audit import gradient_findings, score_findings
from maskft.errors import AdapterError, ModelError
from maskft.tuner import MaskLayer
from maskft.tuner.base import base_fingerprint
from maskft.tuner.sharding import is_first_process, is_sharded, mean_over_processes, whole
from tests.tuner.models import loss, masked, scores_of, tiny_llama, tiny_llava


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 as accelerate puts it on: each decoder layer, then the rest."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, reshard_after_forward=True)
    return fully_shard(model)


def first_layer(model: nn.Module) -> MaskLayer:
    return next(module for module in model.modules() if isinstance(module, MaskLayer))


class Partitioned(nn.Parameter):
    """A parameter as ZeRO-3 leaves it: empty, with the shape it had and the way back."""

    def __new__(cls, full: torch.Tensor) -> Partitioned:
        parameter = torch.Tensor._make_subclass(cls, torch.empty(0))
        parameter.full, parameter.ds_shape, parameter.ds_id = full, full.shape, 0
        return parameter

    def all_gather(self, param_list: list[Partitioned]) -> None:
        param_list[0].data = self.full

    def partition(self, param_list: list[Partitioned]) -> None:
        param_list[0].data = torch.empty(0)


def partition(model: nn.Module) -> nn.Module:
    """Take every parameter to pieces."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = Partitioned(parameter.detach())
    return model


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of two processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("group")
class TestFSDP2:
    def test_weights_are_freed_between_forward_and_backward(self) -> None:
        plain, pieces = masked(tiny_llama()), sharded(masked(tiny_llama()))
        layer = first_layer(pieces)
        seen: list[torch.Tensor] = []

        def look(*_: object) -> None:
            seen.extend((layer.frozen_parameter(), *layer.parameters_of("default")))

        hook = layer.register_forward_hook(look)
        value = loss(pieces)
        hook.remove()
        assert [tensor.untyped_storage().size() for tensor in seen] == [0, 0]
        value.backward()
        loss(plain).backward()
        gradients = {name: p.grad for name, p in scores_of(pieces).items()}
        for name, p in scores_of(plain).items():
            assert is_sharded(gradients[name])
            torch.testing.assert_close(whole(gradients[name]), p.grad, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("gate", ["topk", "threshold"])
    def test_hard_masks_are_the_same(self, gate: str) -> None:
        plain, pieces = masked(tiny_llama(), gate=gate), sharded(masked(tiny_llama(), gate=gate))
        assert torch.equal(loss(pieces), loss(plain))

    @pytest.mark.parametrize("do", ["merge_adapter", "merge_and_unload"])
    def test_merging_is_refused(self, do: str) -> None:
        model = sharded(masked(tiny_llama()))
        with pytest.raises(ModelError, match=r"merging a mask.* needs whole weights.* in one process"):
            getattr(model, do)()

    def test_ranking_over_the_whole_model_is_refused(self) -> None:
        model = sharded(masked(tiny_llama(), gate="topk", ranking="global"))
        with pytest.raises(ModelError, match=r"ranking is 'global'.* Use ranking 'matrix'"):
            loss(model)

    def test_weights_in_pieces_cannot_be_masked(self) -> None:
        base = tiny_llama()
        fully_shard(base)
        with pytest.raises(ModelError, match="in pieces already"):
            get_peft_model(base, MaskConfig())

    def test_one_process_saves_with_the_fingerprint_taken_before(self, launched: None) -> None:
        model = masked(tiny_llama())
        expected = base_fingerprint(model, model.peft_config["default"], "default")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sharded(model)
        saved = get_peft_model_state_dict(model, state_dict=state)
        assert len(saved) == 14
        assert model.peft_config["default"].base_fingerprint == expected is not None

    def test_scores_stay_in_pieces_for_checkpoints_in_pieces(self) -> None:
        model = sharded(masked(tiny_llama()))
        assert all(is_sharded(tensor) for tensor in get_peft_model_state_dict(model).values())
        assert model.peft_config["default"].base_fingerprint is None  # one process did not see the need to take it

    def test_the_audit_reads_what_is_in_pieces(self) -> None:
        plain, pieces = (get_peft_model(tiny_llama(), MaskConfig()) for _ in range(2))
        sharded(pieces)
        for model in (plain, pieces):
            assert list(score_findings(model, "default")) == []
            loss(model).backward()
            assert list(gradient_findings(model, "default", 1e-12)) == []
            assert [f.kind for f in gradient_findings(model, "default", 1e3)] == ["vanishing"]
            for parameter in scores_of(model).values():
                nn.init.constant_(parameter, torch.nan)
            assert [f.kind for f in score_findings(model, "default")] == ["not-finite"]


class TestZeRO3:
    @pytest.mark.parametrize("base", [tiny_llama, tiny_llava])
    def test_masks_on_a_base_in_pieces_have_whole_shapes(self, base: Callable[[], nn.Module]) -> None:
        whole_base = get_peft_model(base(), MaskConfig(scope="language"))
        pieces = get_peft_model(partition(base()), MaskConfig(scope="language"))
        assert {name: p.shape for name, p in scores_of(pieces).items()} == {
            name: p.shape for name, p in scores_of(whole_base).items()
        }

    def test_the_fingerprint_is_taken_of_gathered_weights(self, launched: None) -> None:
        plain = masked(tiny_llama())
        model = get_peft_model(partition(tiny_llama()), MaskConfig())
        configs = [m.peft_config["default"] for m in (plain, model)]
        assert base_fingerprint(model, configs[1], "default") == base_fingerprint(plain, configs[0], "default")
        assert is_sharded(first_layer(model).frozen_parameter())

    def test_merging_is_refused(self) -> None:
        model = get_peft_model(partition(tiny_llama()), MaskConfig())
        with pytest.raises(ModelError, match="needs whole weights"):
            model.merge_adapter()

    def test_ranking_over_the_whole_model_is_refused(self) -> None:
        model = get_peft_model(tiny_llama(), MaskConfig(gate="topk", ranking="global"))
        partition(model)
        layer = first_layer(model)
        with pytest.raises(ModelError, match="ranking is 'global'"):
            layer.mask("default")

    def test_scores_in_pieces_are_not_saved(self) -> None:
        model = masked(tiny_llama())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        partition(model)
        with pytest.raises(AdapterError, match=r"Call trainer\.save_model"):
            get_peft_model_state_dict(model)
        assert len(get_peft_model_state_dict(model, state_dict=state)) == 14

    def test_the_audit_reads_what_is_in_pieces(self) -> None:
        model = partition(get_peft_model(tiny_llama(), MaskConfig()))
        assert list(score_findings(model, "default")) == []
        for parameter in scores_of(model).values():
            parameter.full.fill_(torch.nan)
        assert [f.kind for f in score_findings(model, "default")] == ["not-finite"]


def test_a_process_that_has_not_read_the_base_checks_nothing(monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    model = masked(tiny_llama())
    assert base_fingerprint(model, model.peft_config["default"], "default") is None


def test_the_first_process_is_known_before_processes_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_first_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_first_process()


def test_the_mean_over_one_process(group: None) -> None:
    assert mean_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
