"""What PEFT and Transformers expect of a method beyond what its layers do: dtypes, choices of layers, checks, wraps."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations

from maskft import MaskConfig
from maskft.errors import AdapterError, ModelError, UserError
from maskft.tuner import MaskLayer
from maskft.tuner.kinds import ParamWrapper

from .conformance import KINDS, Case, assert_all_equal, masked_layers
from .models import base_hash, batch, logits, masked, scatter, scores_of, tiny_language_model, tiny_llama

EXPERTS = Case("experts", "soft", "dense")


class TestDtypeOfScores:
    @pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_is_as_configured_or_as_peft_is_asked(
        self, score_dtype: str, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
    ) -> None:
        config = MaskConfig(score_dtype=score_dtype)
        for autocast, expected in ((True, config.torch_dtype()), (False, dtype)):
            model = get_peft_model(tiny_llama(dtype=dtype), copy.deepcopy(config), autocast_adapter_dtype=autocast)
            model.add_adapter("other", copy.deepcopy(config), autocast_adapter_dtype=autocast)
            model.save_pretrained(tmp_path)
            how = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
            loaded = PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path, **how)
            loaded.load_adapter(tmp_path / "other", "other", **how)
            for one in (model, loaded):
                for name in ("default", "other"):
                    assert {p.dtype for p in scores_of(one, name).values()} == {expected}

    def test_of_injected_adapters_is_as_configured(self) -> None:
        model = inject_adapter_in_model(MaskConfig(), tiny_llama(dtype=torch.bfloat16))
        assert {p.dtype for p in scores_of(model).values()} == {torch.float32}


class TestChoiceOfLayers:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
            ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "when `target_modules` is a str"),
            ({"layers_to_transform": 0, "target_modules": "all-linear"}, "when `target_modules` is a str"),
            ({"layers_to_transform": [0], "layers": "0-3"}, "layers and layers_to_transform both choose layers"),
        ],
    )
    def test_contradictions(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            MaskConfig(**fields)

    def test_pattern_needs_names(self) -> None:
        config = MaskConfig(layers_to_transform=0, layers_pattern="layers")
        with pytest.raises(UserError, match="layers_pattern needs target_modules"):
            get_peft_model(tiny_llama(), config)

    def test_is_kept_once(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llama(), MaskConfig(layers_to_transform=[1], init_weights=False)).eval()
        assert model.peft_config["default"].layers == [1]
        assert model.peft_config["default"].layers_to_transform is None
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))

    def test_empty_is_all(self) -> None:
        assert len(scores_of(get_peft_model(tiny_llama(), MaskConfig(layers_to_transform=[])))) == 14


class TestFittingABase:
    """An adapter is refused on another base, by whatever way it is loaded."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        masked(tiny_llama()).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("layout", ["dense", "low-rank"])
    def test_scores_at_their_start_fit_any(self, layout: str, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llama(), MaskConfig(score_layout=layout))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(seed=9), tmp_path)
        assert_all_equal(scores_of(loaded).values(), scores_of(model).values())

    def test_transformers_own_loader_is_checked_when_run(self, saved: Path) -> None:
        model = tiny_llama(seed=9)
        model.load_adapter(str(saved), "mine")
        for _ in range(2):
            with pytest.raises(AdapterError, match="trained on another base"):
                logits(model)
        model.peft_config["mine"].base_fingerprint = None
        assert torch.equal(logits(model), logits(masked(tiny_llama(seed=9))))

    def test_scores_that_are_not_finite(self, saved: Path) -> None:
        model = tiny_llama()
        model.load_adapter(str(saved), "mine")
        with torch.no_grad():
            next(iter(scores_of(model, "mine").values()))[0, 0] = torch.nan
        with pytest.raises(AdapterError, match="'mine' has scores that are not finite"):
            logits(model)

    def test_once(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama()
        model.load_adapter(str(saved), "mine")
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            expected = logits(other)
            assert not other._forward_pre_hooks
            assert torch.equal(logits(other), expected)

    def test_peft_s_loader_leaves_nothing_to_check(self, saved: Path) -> None:
        loaded = PeftModel.from_pretrained(tiny_llama(), saved)
        assert not loaded.get_base_model()._forward_pre_hooks

    def test_deleted_before_it_is_run(self, saved: Path) -> None:
        model = tiny_llama(seed=9)
        model.load_adapter(str(saved), "mine")
        model.delete_adapter("mine")
        assert torch.equal(logits(model), logits(tiny_llama(seed=9)))


class TestExperts:
    def test_names_of_parameters_show(self) -> None:
        wrappers = [module for module in EXPERTS.model().modules() if isinstance(module, ParamWrapper)]
        assert {f"mask.ParamWrapper(\n  parameter_name='{one.parameter_name}'," for one in wrappers} == {
            repr(one).split("\n  (")[0] for one in wrappers
        }

    def test_second_adapter_is_put_into_the_same_wraps(self) -> None:
        assert len(masked_layers(EXPERTS.two())) == len(masked_layers(EXPERTS.model())) == 2

    def test_adapters_load_in_any_order(self, tmp_path: Path) -> None:
        model = EXPERTS.two()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(EXPERTS.net(), tmp_path / "other", adapter_name="other")
        loaded.load_adapter(tmp_path, "default")
        for name in ("default", "other"):
            model.set_adapter(name)
            loaded.set_adapter(name)
            assert torch.equal(EXPERTS.output(loaded), EXPERTS.output(model))

    @pytest.mark.parametrize("first", ["gate_up_proj", "down_proj"])
    def test_other_parameters_of_the_module_are_refused(self, first: str) -> None:
        both = ["experts.gate_up_proj", "experts.down_proj"]
        model = EXPERTS.model(target_parameters=[f"experts.{first}"])
        before = EXPERTS.output(model)
        with pytest.raises(ModelError, match=r"another adapter masks .* there. All adapters must target the same set"):
            model.add_adapter("other", EXPERTS.config(target_parameters=both))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(EXPERTS.output(model), before)

    def test_second_adapter_without_experts(self) -> None:
        model = get_peft_model(tiny_language_model("mixtral"), MaskConfig(init_weights=False)).eval()
        expected = logits(model)
        model.add_adapter("other", MaskConfig(modules="attn"))
        assert torch.equal(logits(model), expected)


class TestRefusals:
    @pytest.mark.parametrize("wrap", [nn.utils.weight_norm, parametrizations.weight_norm])
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_weights_that_are_computed(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        model = nn.Sequential(wrap(nn.Conv1d(2, 3, 2)))
        with pytest.raises(ModelError, match="'0' cannot be masked: its weight is computed from other parameters"):
            get_peft_model(model, MaskConfig(target_modules=["0"]))

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_weights_that_are_offloaded(self, name: str) -> None:
        model = get_peft_model(tiny_language_model(name), MaskConfig(init_weights=False)).eval()
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(ModelError, match="accelerate has offloaded it"):
            logits(model)


class TestGradients:
    def test_output_can_be_changed_in_place(self) -> None:
        class Halved(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(4, 6)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.lin(x).view(*x.shape[:-1], 2, 3).transpose(1, 2)
                y /= 2
                return y

        base, x = Halved(), torch.randn(2, 3, 4)
        expected = base(x)
        model = get_peft_model(base, MaskConfig(target_modules=["lin"], gate="normalized"))
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
        assert next(iter(scores_of(model).values())).grad.any()

    @pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if "experts" not in kind])
    def test_under_fsdp(self, kind: str, one_process: None) -> None:
        case = Case(kind, "soft", "dense")
        expected = case.model()
        case.loss(expected).backward()
        model = case.model()
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert torch.equal(case.output(sharded), case.output(expected))
        case.loss(sharded).backward()
        assert_all_equal([p.grad for p in scores_of(model).values()], [p.grad for p in scores_of(expected).values()])


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, for which FSDP has nothing to shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestGlobalRanking:
    """The common cut follows every change of scores that PyTorch counts."""

    def ranked(self) -> PeftModel:
        return masked(tiny_llama(), gate="topk", ranking="global", keep_ratio=0.5)

    def afresh(self, model: PeftModel) -> Tensor:
        """The output of a new model with the same scores."""
        other = get_peft_model(tiny_llama(), MaskConfig(gate="topk", ranking="global", keep_ratio=0.5)).eval()
        other.load_state_dict(model.state_dict())
        return logits(other)

    @pytest.mark.parametrize("kwargs", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    def test_follows_optimizers(self, kind: Any, kwargs: dict[str, bool]) -> None:
        model = self.ranked()
        before = logits(model)
        optimizer = kind(scores_of(model).values(), lr=1.0, **kwargs)
        model(**batch(model)).logits.square().sum().backward()
        optimizer.step()
        assert not torch.equal(logits(model), before)
        assert torch.equal(logits(model), self.afresh(model))

    @pytest.mark.parametrize("ranking", ["matrix", "global"])
    def test_straight_through_gradients_lack_the_sign_alone(self, ranking: str) -> None:
        found = []
        for straight_through in (False, True):
            settings = {"gate": "topk", "ranking": ranking, "straight_through": straight_through}
            model = masked(tiny_llama(), **settings, init_weights="random")
            scatter(model, seed=8)
            model(**batch(model)).logits.square().sum().backward()
            found.append({name: (p.detach(), p.grad) for name, p in scores_of(model).items()})
        plain, straight = found
        for name, (score, gradient) in straight.items():
            assert gradient is not None
            assert torch.equal(plain[name][0], score)
            torch.testing.assert_close(plain[name][1], gradient * score.sign())

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_follows_loading(self, low_cpu_mem_usage: bool) -> None:
        model, other = self.ranked(), self.ranked()
        scatter(other, seed=8)
        logits(model)
        set_peft_model_state_dict(model, get_peft_model_state_dict(other), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(model), self.afresh(other))

    def test_follows_new_storage_and_new_parameters(self) -> None:
        model = self.ranked()
        logits(model)
        for parameter in scores_of(model).values():
            parameter.data = -parameter.data
        assert torch.equal(logits(model), self.afresh(model))
        for layer in masked_layers(model):
            layer.cast_scores("default", torch.bfloat16)
        rounded = logits(model)
        model.float()
        assert torch.equal(rounded, self.afresh(model))

    def test_follows_copies(self) -> None:
        model = self.ranked()
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            scatter(other, seed=8)
            assert torch.equal(logits(other), self.afresh(other))
            assert torch.equal(logits(model), expected)

    def test_is_of_each_adapter(self) -> None:
        model = self.ranked()
        expected = logits(model)
        model.add_adapter("other", MaskConfig(gate="topk", ranking="global", keep_ratio=0.9, modules="attn"))
        assert torch.equal(logits(model.eval()), expected)
        model.set_adapter("other")
        kept = [layer.active_masks()[0] for layer in masked_layers(model) if "other" in layer.mask_layout]
        model.delete_adapter("default")
        assert len(kept) == 8
        assert not any("default" in layer.mask_ranking for layer in masked_layers(model))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
    def test_in_a_compiled_model_breaks_the_graph_and_is_followed(self) -> None:
        case = Case("linear", "topk-global", "dense")
        model = case.model()
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        outputs = []
        for _ in range(3):
            outputs.append(case.output(compiled))
            assert torch.equal(outputs[-1], case.output(model))
            with torch.no_grad():
                for parameter in scores_of(model).values():
                    parameter.copy_(torch.randn_like(parameter))
        assert not torch.equal(outputs[0], outputs[1])


class TestBaseWithNamesLikeOurs:
    """A base with modules called mask_something, such as those of models that segment."""

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(3, 3))
        return nn.Sequential(
            OrderedDict({"lin": nn.Linear(4, 3), "mask_decoder": head, "mask_scores": nn.Linear(3, 2)})
        )

    def test_are_the_base_s(self, tmp_path: Path) -> None:
        config = MaskConfig(target_modules=["lin", "mask_decoder.0"], init_weights=False)
        model = get_peft_model(self.net(), config).eval()
        expected = model(torch.ones(1, 4))
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable == list(scores_of(model))
        assert len(trainable) == len(get_peft_model_state_dict(model)) == 2
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(self.net(), tmp_path)(torch.ones(1, 4)), expected)
        model.delete_adapter("default")
        assert not scores_of(model)
        assert torch.equal(model.base_model(torch.ones(1, 4)), self.net()(torch.ones(1, 4)))


def test_status_reports() -> None:
    model = EXPERTS.two()
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers) == ({"default": "MASK", "other": "MASK"}, 2)
    assert (status.active_adapters, status.available_adapters) == (["default"], ["default", "other"])
    assert {one.module_type for one in model.get_layer_status()} == {"mask.ParamWrapper"}
    trainable, total = model.get_nb_trainable_parameters()
    assert (trainable, total) == (768, 32 + 768 + 2 * 768)  # router and experts; the scores of two adapters


def test_masked_embeddings_are_saved_beside_their_scores(tmp_path: Path) -> None:
    """As PEFT does it for every method: the embedding itself goes into the file too."""
    model = get_peft_model(tiny_llama(), MaskConfig(target_modules=["embed_tokens"], init_weights=False)).eval()
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_injected_scores_wait_on_the_meta_device() -> None:
    model = inject_adapter_in_model(MaskConfig(init_weights=False), tiny_llama(), low_cpu_mem_usage=True)
    assert {p.device.type for p in scores_of(model).values()} == {"meta"}
    source = masked(tiny_llama())
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert torch.equal(logits(model.eval()), logits(source))


def test_unloading_leaves_nothing() -> None:
    base = tiny_language_model("gpt-oss")
    before = base_hash(base)
    bare = get_peft_model(base, MaskConfig(init_weights=False)).unload()
    assert bare is base
    assert base_hash(bare) == before
    assert not any(isinstance(module, MaskLayer) for module in bare.modules())
