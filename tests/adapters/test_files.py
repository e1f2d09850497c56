"""Packing a saved adapter: same masks, small files, all or nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from maskft.adapters import files, pack
from maskft.adapters.files import SCORES, SavedAdapter, needs_base
from maskft.errors import AdapterError, RunError, UserError
from tests.tuner.models import logits, tiny_llama

from .helpers import CONFIG, ONE, WEIGHTS, edit, gates, loaded, saved, settings

SOFT = ("soft", "normalized", "centered")


class TestSoft:
    @pytest.mark.parametrize("gate", SOFT)
    @pytest.mark.parametrize("storage", ["int8", "int4"])
    def test_gates_change_by_what_is_reported(self, gate: str, storage: str, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate=gate)
        packed = pack(source, tmp_path / "out", storage)
        before, after = gates(source), gates(tmp_path / "out")
        changes = torch.cat([(after[name] - m).flatten() for name, m in before.items()])
        assert packed.gate_error_max == pytest.approx(changes.abs().max().item(), rel=1e-3)
        assert packed.gate_error_rms == pytest.approx(changes.square().mean().sqrt().item(), rel=1e-3)
        assert 0 < packed.gate_error_max < (0.15 if storage == "int4" else 0.01)

    def test_report_of_the_sizes(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")
        packed = pack(source, tmp_path / "out", "int8")
        assert packed.scores == sum(tensor.numel() for tensor in load_file(source / WEIGHTS).values())
        assert packed.bytes_before == (source / WEIGHTS).stat().st_size
        assert packed.bytes_after == (tmp_path / "out" / WEIGHTS).stat().st_size < packed.bytes_before
        assert packed.bits_per_score == pytest.approx(8 * packed.bytes_after / packed.scores)

    def test_folder(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")
        before = {path.name: path.read_bytes() for path in source.iterdir()}
        pack(source, tmp_path / "new" / "out", "int4", beside={"note.txt": "ü"})
        out = tmp_path / "new" / "out"
        assert {path.name for path in out.iterdir()} == {WEIGHTS, CONFIG, "README.md", "note.txt"}
        assert settings(out) == {**settings(source), "storage": "int4"}
        assert (out / "note.txt").read_text(encoding="utf-8") == "ü"
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]

    def test_scores_that_are_kept_give_the_adapter_back(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")
        pack(source, tmp_path / "packed", "int4", keep_scores=True)
        assert (tmp_path / "packed" / SCORES).read_bytes() == (source / WEIGHTS).read_bytes()
        pack(tmp_path / "packed", tmp_path / "full", "float32")
        one, two = load_file(source / WEIGHTS), load_file(tmp_path / "full" / WEIGHTS)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert settings(tmp_path / "full") == settings(source)

    def test_from_packed_to_packed(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="soft")
        pack(source, tmp_path / "8", "int8")
        pack(tmp_path / "8", tmp_path / "4", "int4")
        pack(tmp_path / "8", tmp_path / "full", "float32")
        assert torch.equal(logits(loaded(tmp_path / "full")), logits(loaded(tmp_path / "8")))
        torch.testing.assert_close(logits(loaded(tmp_path / "4")), logits(loaded(source)), rtol=0, atol=0.3)
        with pytest.raises(AdapterError, match="packed already: it has no scores in full to keep"):
            pack(tmp_path / "8", tmp_path / "none", "int4", keep_scores=True)

    @pytest.mark.parametrize("layout", ["low-rank", "row", "column", "block"])
    def test_other_layouts_stay_in_full(self, layout: str, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", score_layout=layout, rank=2, block_size=4)
        packed = pack(source, tmp_path / "out", "int4")
        assert (packed.gate_error_rms, packed.gate_error_max) == (None, None)
        assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(source)))

    def test_modules_to_save_go_along(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", modules_to_save=["lm_head"])
        pack(source, tmp_path / "out", "int8")
        one, two = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
        name = "base_model.model.lm_head.weight"
        assert torch.equal(one[name], two[name])
        assert SavedAdapter(source).others == [name]

    def test_bfloat16_scores(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", score_dtype="bfloat16")
        pack(source, tmp_path / "out", "int8")
        assert {p.dtype for name, p in loaded(tmp_path / "out").named_parameters() if "mask_" in name} == {
            torch.bfloat16
        }


class TestHard:
    def test_threshold_needs_no_base(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="threshold", init_gate=0.6)
        packed = pack(source, tmp_path / "out", "bits")
        assert packed.gate_error_rms is None
        before, after = gates(source), gates(tmp_path / "out")
        assert all(torch.equal(after[name], m) for name, m in before.items())

    @pytest.mark.parametrize("ranking", ["matrix", "global"])
    def test_topk_needs_the_base(self, ranking: str, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="topk", keep_ratio=0.7, ranking=ranking)
        assert needs_base(SavedAdapter(source), "bits")
        with pytest.raises(AdapterError, match="depends on the base's weights"):
            pack(source, tmp_path / "out", "bits")
        pack(source, tmp_path / "out", "bits", model=tiny_llama(), keep_scores=True, forget_base=True)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, CONFIG, "README.md", SCORES}
        assert settings(tmp_path / "out") == {**settings(source), "storage": "bits", "base_fingerprint": None}
        before, after = gates(source), gates(tmp_path / "out")
        assert all(torch.equal(after[name], m) for name, m in before.items())

    def test_topk_bits_are_copied_without_the_base(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="topk", keep_ratio=0.7, bits=True)
        assert not needs_base(SavedAdapter(source), "bits")
        pack(source, tmp_path / "bits", "bits")
        pack(source, tmp_path / "full", "float32")
        for name, m in gates(source).items():
            assert torch.equal(gates(tmp_path / "bits")[name], m), name
            assert torch.equal(gates(tmp_path / "full")[name], m), name

    def test_of_another_base(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="topk")
        with pytest.raises(AdapterError, match="trained on another base"):
            pack(source, tmp_path / "out", "bits", model=tiny_llama(seed=3))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_topk_of_another_layout_stays_in_full(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="topk", score_layout="block", block_size=4)
        assert not needs_base(SavedAdapter(source), "bits")
        pack(source, tmp_path / "out", "bits")
        assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(source)))


def test_forgetting_the_base_lets_it_load_on_another(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    pack(source, tmp_path / "out", "int8", forget_base=True)
    assert logits(loaded(tmp_path / "out", base=5)).shape == logits(loaded(source)).shape


class TestRefusals:
    @pytest.mark.parametrize(
        ("gate", "storage", "message"),
        [
            ("soft", "bits", "storage is 'bits' with the gate 'soft'"),
            ("threshold", "int4", "storage is 'int4' with the gate 'threshold'"),
            ("soft", "int3", "storage is 'int3'; allowed"),
        ],
    )
    def test_storage_that_does_not_suit(self, gate: str, storage: str, message: str, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate=gate)
        with pytest.raises(UserError, match=message):
            pack(source, tmp_path / "out", storage)
        assert not (tmp_path / "out").exists()

    def test_an_existing_output(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")
        before = {path.name: path.read_bytes() for path in source.iterdir()}
        with pytest.raises(RunError, match="already exists and is not empty"):
            pack(source, source, "int4")
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
        (tmp_path / "empty").mkdir()
        pack(source, tmp_path / "empty", "int4")
        assert (tmp_path / "empty" / WEIGHTS).is_file()

    def test_all_flaws_are_gathered(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source")

        def change(content: dict[str, Tensor]) -> None:
            names = [f"{ONE}.mask_scores", *(f"{ONE.replace('q_proj', x)}.mask_scores" for x in ("k_proj", "v_proj"))]
            content[names[0]][0, 0] = math.nan
            content[names[1]] = content[names[1]].long()
            content[f"{names[2]}.int8"] = torch.zeros(2, 2, dtype=torch.int8)

        edit(source, change)
        with pytest.raises(AdapterError, match="has flaws") as caught:
            pack(source, tmp_path / "out", "int8")
        message = str(caught.value)
        assert f"{ONE}.mask_scores has values that are not finite numbers" in message
        assert f"{ONE.replace('q_proj', 'k_proj')}.mask_scores has values that are not finite numbers" in message
        assert f"{ONE.replace('q_proj', 'v_proj')}.mask_scores has the parts" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_a_mask_where_the_gate_is_soft(self, tmp_path: Path) -> None:
        source = saved(tmp_path / "source", gate="threshold", bits=True)
        settings(source, gate="soft", storage="float32")
        for storage in ("int4", "float32"):
            with pytest.raises(AdapterError, match="holds a hard mask, and the gate is 'soft'"):
                pack(source, tmp_path / "out", storage)

    @pytest.mark.parametrize("size", [0, 100, -1])
    @pytest.mark.parametrize("name", [WEIGHTS, SCORES])
    def test_truncated_files(self, name: str, size: int, tmp_path: Path) -> None:
        pack(saved(tmp_path / "source"), tmp_path / "packed", "int4", keep_scores=True)
        file = tmp_path / "packed" / name
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(AdapterError, match=rf"{name} cannot be read: .*damaged"):
            SavedAdapter(tmp_path / "packed", full=name == SCORES)

    def test_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="holds no adapter"):
            pack(tmp_path / "none", tmp_path / "out")
        source = saved(tmp_path / "source")
        settings(source, temperature="hot")
        with pytest.raises(AdapterError, match="a value of the wrong type"):
            pack(source, tmp_path / "out")


@pytest.mark.parametrize("broken", ["save_file", "os.replace", "shutil.copyfile"])
def test_a_failure_midway_leaves_nothing(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    *module, name = broken.split(".")
    monkeypatch.setattr(getattr(files, module[0]) if module else files, name, fail)
    with pytest.raises(OSError, match="disk full"):
        pack(source, tmp_path / "out", "int4", keep_scores=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "half").write_text("x")
    pack(source, tmp_path / "out", "int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not (tmp_path / "out" / "half").exists()
