"""A base read in shares, masks put on without values, and checkpoints in pieces; all in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from maskft import MaskConfig
from maskft.errors import ModelError, RunError
from maskft.sharded import ShardedTrainer, load_moments, load_values, save_moments, save_values
from maskft.tuner.base import base_fingerprint
from maskft.tuner.spread import spread
from maskft.tuner.stream import save_in_pieces, write_joined
from maskft.vlm import shares as shares_module
from maskft.vlm.shares import each_reads, load_shares, shares_are_read, weight_files
from tests.evaluation.tiny import tiny_base
from tests.tuner.models import loss, tiny_language_models, tiny_llama

EVERYONE = ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Join = Callable[[], int]


@pytest.fixture(params=[0, 1])
def join(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Join]:
    """A call makes this one of two processes that were launched with FSDP2 and never hear of each other.

    It returns which one. Before it, files are saved as one process does.
    """

    def call() -> int:
        for name, value in (*EVERYONE, ("WORLD_SIZE", "2"), ("RANK", str(request.param)), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
        dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
        return int(request.param)

    yield call
    dist.destroy_process_group()
    _clear_sharding_prop_cache()  # it holds meshes, with the number of the process that this one was


def check_shares(model: nn.Module, skeleton: nn.Module, shares: nn.Module, rank: int) -> None:
    """Each share is the process's half of the rows, as torch.chunk cuts them."""
    assert all(p.is_meta for p in skeleton.parameters())
    expected, given = dict(model.named_parameters()), dict(shares.named_parameters())
    assert expected.keys() == given.keys() == dict(skeleton.named_parameters()).keys()
    for name, whole in expected.items():
        pieces = whole.chunk(2)
        mine = pieces[rank] if rank < len(pieces) else whole[:0]
        assert torch.equal(given[name].to_local(), mine), name
        assert skeleton.get_parameter(name).dtype == whole.dtype
    buffers = dict(shares.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name


class TestLoading:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_each_process_gets_its_rows(self, join: Join, dtype: str, tmp_path: Path) -> None:
        model = AutoModelForImageTextToText.from_pretrained(tiny_base(tmp_path), dtype=getattr(torch, dtype))
        rank = join()
        assert shares_are_read()
        check_shares(model, *load_shares(str(tmp_path), dtype=dtype), rank)

    @pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "gpt2"])
    def test_names_and_layouts_of_other_checkpoints(self, join: Join, kind: str, tmp_path: Path) -> None:
        AutoModelForCausalLM.from_config(tiny_language_models()[kind]).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        rank = join()
        check_shares(model, *load_shares(str(tmp_path), dtype="float32", attention="eager"), rank)

    def test_a_process_may_get_no_row(self, join: Join, tmp_path: Path) -> None:
        tiny_llama(num_attention_heads=1, head_dim=1).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert model.model.layers[0].self_attn.q_proj.weight.shape == (1, 16)
        rank = join()
        check_shares(model, *load_shares(str(tmp_path), dtype="float32"), rank)

    def test_tied_weights_stay_tied(self, join: Join, tmp_path: Path) -> None:
        tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
        join()
        skeleton, shares = load_shares(str(tmp_path), dtype="float32")
        assert shares.lm_head.weight is shares.model.embed_tokens.weight
        assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight

    def test_damaged_files_are_refused(self, join: Join, tmp_path: Path) -> None:
        tiny_llama().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"no tensors")
        join()
        with pytest.raises(ModelError, match="in pieces"):
            load_shares(str(tmp_path), dtype="float32")

    def test_several_files(self, tmp_path: Path) -> None:
        tiny_llama().save_pretrained(tmp_path, max_shard_size="8KB")
        files = weight_files(str(tmp_path))
        assert len(files) > 1
        assert {path.name for path in files} == {path.name for path in tmp_path.glob("*.safetensors")}

    def test_one_process_reads_all(self, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in EVERYONE:
            monkeypatch.setenv(name, value)
        assert not shares_are_read()

    @pytest.mark.parametrize("before", [None, "true"])
    def test_the_environment_is_put_back(self, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(shares_module._EFFICIENT, raising=False)
        if before:
            monkeypatch.setenv(shares_module._EFFICIENT, before)
        with each_reads():
            assert os.environ[shares_module._EFFICIENT] == "false"
        assert os.environ.get(shares_module._EFFICIENT) == before


def in_pieces(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().requires_grad_(False)


def mixture() -> nn.Module:
    return AutoModelForCausalLM.from_config(tiny_language_models()["mixtral"])


CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {"gate": "topk", "init_weights": "random"},
    "low-rank": {"score_layout": "low-rank", "rank": 2},
}


@pytest.mark.usefixtures("group")
class TestValues:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize("make", [tiny_llama, mixture])
    def test_are_those_of_a_model_masked_whole(
        self, make: Callable[[], Any], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        torch.manual_seed(0)
        base = make().eval()
        shares = make()
        shares.load_state_dict(base.state_dict())
        torch.manual_seed(7)
        plain = get_peft_model(base, MaskConfig(**config))
        pieces = in_pieces(get_peft_model(on_meta(make), MaskConfig(**config)).eval())
        spread(pieces, in_pieces(shares), seed=7, device=torch.device("cpu"))
        expected = dict(plain.named_parameters())
        for name, parameter in pieces.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name]), name
            assert parameter.requires_grad == expected[name].requires_grad, name
        assert torch.equal(loss(pieces), loss(plain))
        own = pieces.peft_config["default"]
        assert own.seen_fingerprint == base_fingerprint(plain, plain.peft_config["default"], "default") is not None

    def test_a_trained_part_keeps_its_dtype(self) -> None:
        model = on_meta(tiny_llama)
        model.lm_head.double().requires_grad_(True)
        shares = tiny_llama()
        expected = shares.lm_head.weight.detach().double()
        spread(in_pieces(model), in_pieces(shares), seed=0, device=torch.device("cpu"))
        assert torch.equal(model.lm_head.weight.full_tensor(), expected)
        assert model.lm_head.weight.requires_grad
        assert not model.model.norm.weight.requires_grad

    def test_a_copy_that_is_trained_leaves_its_original(self) -> None:
        config = MaskConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = in_pieces(get_peft_model(on_meta(tiny_llama), config))
        shares = tiny_llama()
        expected = shares.lm_head.weight.detach().clone()
        spread(model, in_pieces(shares), seed=0, device=torch.device("cpu"))
        head = model.base_model.model.lm_head
        with torch.no_grad():
            head.modules_to_save["default"].weight.to_local().zero_()
        assert torch.equal(head.original_module.weight.full_tensor(), expected)

    def test_of_another_base_are_refused(self) -> None:
        model = in_pieces(get_peft_model(on_meta(lambda: tiny_llama(intermediate_size=48)), MaskConfig()))
        with pytest.raises(ModelError, match=r"do not fit the model:\n.*mlp"):
            spread(model, in_pieces(tiny_llama()), seed=0, device=torch.device("cpu"))


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A masked model in pieces after two steps; seed 0 makes none."""
    model = in_pieces(get_peft_model(tiny_llama(), MaskConfig()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01 * (1 + seed))
    for _ in range(2 if seed else 0):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.usefixtures("group")
class TestCheckpoints:
    def test_training_goes_on_as_it_would_have(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("maskft.sharded.FILE_BYTES", 4096)
        model, optimizer = trained(1)
        save_values(tmp_path, model)
        settings = save_moments(tmp_path, model, optimizer)
        assert settings[0]["lr"] == 0.02
        assert len(list((tmp_path / "moments").iterdir())) > 1
        assert {path.suffix for path in tmp_path.rglob("*.*")} == {".safetensors"}
        again, other = trained(0)
        load_values(tmp_path, again)
        load_moments(tmp_path, again, other, settings)
        for both in ((model, optimizer), (again, other)):
            loss(both[0]).backward()
            both[1].step()
        expected = dict(model.named_parameters())
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name].full_tensor()), name

    def test_other_checkpoints_are_refused(self, tmp_path: Path) -> None:
        model, optimizer = trained(0)
        with pytest.raises(RunError, match="no checkpoint of FSDP2"):
            load_values(tmp_path, model)
        with pytest.raises(RunError, match="no checkpoint of FSDP2"):
            load_moments(tmp_path, model, optimizer, [])


@pytest.mark.usefixtures("group")
class TestFiles:
    def test_joined_tensors_are_written_as_safetensors_writes_them(self, tmp_path: Path) -> None:
        tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "c": torch.randn(2, 2).bfloat16()}
        write_joined(tmp_path / "joined", tensors)
        save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
        assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()
        write_joined(tmp_path / "cast", tensors, torch.bfloat16)
        cast = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(cast, tmp_path / "whole", metadata={"format": "pt"})
        assert (tmp_path / "cast").read_bytes() == (tmp_path / "whole").read_bytes()

    def test_an_adapter_in_pieces_is_saved_as_a_whole_one(self, tmp_path: Path) -> None:
        model, _ = trained(1)
        save_in_pieces(model, tmp_path / "pieces")
        saved = load_file(tmp_path / "pieces" / "adapter_model.safetensors")
        whole = get_peft_model(tiny_llama(), MaskConfig())
        state = {n: p.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
        whole.load_state_dict(state, strict=False)
        whole.save_pretrained(tmp_path / "whole")
        expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in expected)


class Plain:
    """Stands for the Trainer: every method notes its name."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def save_model(self, *_: object) -> None:
        self.calls.append("save_model")

    def _save_optimizer_and_scheduler(self, *_: object) -> None:
        self.calls.append("_save_optimizer_and_scheduler")

    def _load_from_checkpoint(self, *_: object) -> None:
        self.calls.append("_load_from_checkpoint")

    def _load_optimizer_and_scheduler(self, *_: object) -> None:
        self.calls.append("_load_optimizer_and_scheduler")

    def _load_best_model(self) -> None:
        self.calls.append("_load_best_model")


class Trainer(ShardedTrainer, Plain):
    """As it stands before Transformers' own."""


def test_without_pieces_a_trainer_stays_as_it_is() -> None:
    trainer = Trainer()
    trainer.accelerator = SimpleNamespace(is_fsdp2=False)
    trainer.save_model("folder", _internal_call=True)
    trainer._save_optimizer_and_scheduler("folder")
    trainer._load_from_checkpoint("folder")
    trainer._load_optimizer_and_scheduler("folder")
    trainer._load_best_model()
    assert trainer.calls == [name for name in vars(Plain) if name.startswith("_load") or "save" in name]


@pytest.mark.usefixtures("group")
def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    trainer = Trainer()
    trainer.accelerator, trainer.model, trainer.optimizer = SimpleNamespace(is_fsdp2=True), model, optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    trainer.save_model(str(tmp_path), _internal_call=True)
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    expected = {name: p.full_tensor().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss(model).backward()
    optimizer.step()
    trainer.lr_scheduler.step()
    trainer.state = SimpleNamespace(best_model_checkpoint=str(tmp_path))
    trainer._load_best_model()
    for name, values in expected.items():
        assert torch.equal(model.get_parameter(name).full_tensor(), values)
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert trainer.lr_scheduler.last_epoch == 0
    assert trainer.calls == []
