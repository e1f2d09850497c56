"""Laws of the algebra of masks, judged by the gates that the tuner makes of what was saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from maskft.adapters import combine, pack
from maskft.adapters.algebra import EDGE, inverse
from maskft.errors import AdapterError, RunError, UserError
from maskft.gates import Centered, Normalized, Soft, Threshold
from tests.tuner.models import logits

from .helpers import LAYERS, ONE, WEIGHTS, edit, gates, loaded, saved, settings

SOFT = ("soft", "normalized", "centered")
THRESHOLD = {"gate": "threshold", "init_gate": 0.6}
TOPK = {"gate": "topk", "keep_ratio": 0.7, "bits": True}


@pytest.fixture
def hard(tmp_path: Path) -> list[Path]:
    """Two thresholds and a top-k mask as bits."""
    return [
        saved(tmp_path / "a", seed=1, **THRESHOLD),
        saved(tmp_path / "b", seed=2, **THRESHOLD),
        saved(tmp_path / "c", seed=3, **TOPK),
    ]


@pytest.fixture
def soft(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / gate, seed=seed, gate=gate) for seed, gate in enumerate(SOFT)]


def same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first
    )


class TestInverse:
    @pytest.mark.parametrize(
        "gate", [Soft(0.98), Soft(0.7, 3.0), Normalized(0.98), Normalized(0.6, 0.5), Centered(), Centered(2.0)], ids=str
    )
    @given(st.lists(st.floats(-12, 12), min_size=1, max_size=20))
    def test_undoes_the_value(self, gate: Soft | Normalized | Centered, offsets: list[float]) -> None:
        offset = torch.tensor(offsets, dtype=torch.float64) * gate.temperature
        again, clipped = inverse(gate, gate.value(offset, offset))
        assert clipped == 0
        torch.testing.assert_close(again, offset, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("gate", "top"), [(Soft(0.9), 1.0), (Normalized(0.5), 2.0), (Centered(3.0), 2.0)], ids=str)
    def test_values_out_of_reach_are_clipped_and_counted(self, gate: Soft, top: float) -> None:
        m = torch.tensor([-0.5, 0.0, 0.5 * top, top, top + 1e-9, 1.5 * top, math.inf], dtype=torch.float64)
        offset, clipped = inverse(gate, m)
        assert clipped == 3  # the ends themselves are reached as nearly as fp32 can tell
        assert torch.isfinite(offset).all()
        torch.testing.assert_close(gate.value(offset, offset), m.clamp(0, top), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("gate", [Normalized(0.98), Centered()], ids=str)
    def test_one_is_offset_zero(self, gate: Normalized) -> None:
        assert inverse(gate, torch.ones(3, dtype=torch.float64))[0].eq(0).all()

    def test_a_gate_without_inverse(self) -> None:
        with pytest.raises(UserError, match="Threshold has no inverse"):
            inverse(Threshold(0.9), torch.ones(2))  # type: ignore[arg-type]

    def test_edge(self) -> None:
        assert pytest.approx(1 / (1 + math.exp(30)), rel=1e-12) == EDGE
        assert 1 - EDGE < 1


class TestHard:
    @pytest.mark.parametrize(("operation", "of"), [("union", torch.maximum), ("intersection", torch.minimum)])
    def test_is_what_it_says(self, operation: str, of: object, hard: list[Path], tmp_path: Path) -> None:
        made = combine(operation, hard, tmp_path / "out")
        first, second, third = (gates(folder) for folder in hard)
        expected = {name: of(of(first[name], second[name]), third[name]) for name in first}  # type: ignore[operator]
        assert same(gates(tmp_path / "out"), expected)
        assert (made.gate, made.layers, made.clipped) == ("threshold", LAYERS, 0)
        assert made.scores == sum(m.numel() for m in first.values())
        assert made.base_fingerprint == settings(hard[0])["base_fingerprint"] is not None
        parts = {name.rpartition(".")[2] for name in load_file(tmp_path / "out" / WEIGHTS)}
        assert parts <= {"bits", "deflate", "shape"}

    @pytest.mark.parametrize("operation", ["union", "intersection", "product"])
    def test_order_does_not_matter(self, operation: str, hard: list[Path], tmp_path: Path) -> None:
        combine(operation, hard, tmp_path / "one")
        combine(operation, hard[::-1], tmp_path / "two")
        assert same(gates(tmp_path / "one"), gates(tmp_path / "two"))

    @pytest.mark.parametrize("operation", ["union", "intersection", "product"])
    @pytest.mark.parametrize("which", [0, 2])
    def test_with_itself_is_itself(self, operation: str, which: int, hard: list[Path], tmp_path: Path) -> None:
        combine(operation, [hard[which]] * 2, tmp_path / "out")
        assert same(gates(tmp_path / "out"), gates(hard[which]))
        assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(hard[which])))

    def test_absorption(self, hard: list[Path], tmp_path: Path) -> None:
        a, b, _ = hard
        combine("union", [a, b], tmp_path / "union")
        combine("intersection", [a, tmp_path / "union"], tmp_path / "out")
        assert same(gates(tmp_path / "out"), gates(a))

    def test_product_of_hard_masks_is_their_intersection(self, hard: list[Path], tmp_path: Path) -> None:
        combine("product", hard, tmp_path / "one", weights=[1, 0.5, 2])
        combine("intersection", hard, tmp_path / "two")
        assert same(gates(tmp_path / "one"), gates(tmp_path / "two"))
        combine("product", hard, tmp_path / "three", weights=[1, 0, 0])
        assert same(gates(tmp_path / "three"), gates(hard[0]))

    def test_interpolated_hard_masks_are_soft(self, hard: list[Path], tmp_path: Path) -> None:
        made = combine("interpolate", hard[:2], tmp_path / "out", weights=[0.25, 0.75])
        first, second = (gates(folder) for folder in hard[:2])
        expected = {name: 0.25 * first[name] + 0.75 * second[name] for name in first}
        assert same(gates(tmp_path / "out"), expected, 1e-6)
        assert (made.gate, made.clipped) == ("centered", 0)
        combine("product", hard[:2], tmp_path / "product", gate="soft")
        assert same(gates(tmp_path / "product"), {name: first[name] * second[name] for name in first}, 1e-6)

    @pytest.mark.parametrize("layout", ["row", "column", "block"])
    def test_masks_of_one_small_layout_stay_in_it(self, layout: str, tmp_path: Path) -> None:
        fields = {**THRESHOLD, "score_layout": layout, "block_size": 4}
        folders = [saved(tmp_path / str(seed), seed=seed, **fields) for seed in (1, 2)]
        combine("union", folders, tmp_path / "out")
        first, second = (gates(folder) for folder in folders)
        assert same(gates(tmp_path / "out"), {name: torch.maximum(first[name], second[name]) for name in first})
        assert settings(tmp_path / "out")["score_layout"] == layout
        assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(folders[0] / WEIGHTS).keys()


class TestSoft:
    @pytest.mark.parametrize("gate", [None, *SOFT])
    def test_interpolation(self, gate: str | None, soft: list[Path], tmp_path: Path) -> None:
        weights = [0.5, 0.25, 0.25]
        made = combine("interpolate", soft, tmp_path / "out", weights=weights, gate=gate)
        every = [gates(folder) for folder in soft]
        expected = {name: sum(w * m[name] for w, m in zip(weights, every, strict=True)) for name in every[0]}
        top = {"soft": 1.0, "normalized": 1 / 0.98, "centered": 2.0}[gate or "soft"]
        assert same(gates(tmp_path / "out"), {name: m.clamp(max=top) for name, m in expected.items()}, 2e-6)
        assert made.gate == (gate or "soft")
        outside = sum(int((m > top).sum()) for m in expected.values())
        assert made.clipped == pytest.approx(outside, abs=3)
        assert (outside == 0) == (gate == "centered")

    @pytest.mark.parametrize("operation", ["interpolate", "product"])
    @pytest.mark.parametrize("end", [0, 1])
    def test_the_ends_are_the_adapters(self, operation: str, end: int, soft: list[Path], tmp_path: Path) -> None:
        pair = [soft[0], saved(tmp_path / "second", seed=8, gate="soft", temperature=2.0)]
        made = combine(operation, pair, tmp_path / "out", weights=[1 - end, end])
        assert same(gates(tmp_path / "out"), gates(pair[end]), 1e-6)
        assert made.clipped == 0

    def test_the_first_end_is_the_first_adapter_to_the_bit_of_its_output(
        self, soft: list[Path], tmp_path: Path
    ) -> None:
        combine("product", soft, tmp_path / "out", weights=[1, 0, 0])
        before, after = (load_file(folder / WEIGHTS) for folder in (soft[0], tmp_path / "out"))
        for name, scores in before.items():
            torch.testing.assert_close(after[name], scores, rtol=1e-6, atol=1e-6)

    def test_product(self, soft: list[Path], tmp_path: Path) -> None:
        weights = [0.5, 1.0, 2.0]
        combine("product", soft, tmp_path / "out", weights=weights, gate="centered")
        every = [gates(folder) for folder in soft]
        for name, m in gates(tmp_path / "out").items():
            expected = math.prod(gate[name] ** w for gate, w in zip(every, weights, strict=True))
            torch.testing.assert_close(m, expected.clamp(max=2), rtol=0, atol=2e-6)

    def test_product_acts_as_both_adapters_at_once(self, soft: list[Path], tmp_path: Path) -> None:
        combine("product", soft[1:], tmp_path / "out", gate="centered")
        both = loaded(soft[1])
        both.load_adapter(soft[2], "second")
        both.base_model.set_adapter(["default", "second"])
        torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(both), rtol=0, atol=1e-3)

    def test_packed_adapters(self, soft: list[Path], tmp_path: Path) -> None:
        for folder in soft[:2]:
            pack(folder, tmp_path / f"{folder.name}-8", "int8")
        packed = [tmp_path / f"{folder.name}-8" for folder in soft[:2]]
        combine("interpolate", packed, tmp_path / "out")
        first, second = (gates(folder) for folder in packed)
        expected = {name: ((first[name] + second[name]) / 2).clamp(max=1) for name in first}
        assert same(gates(tmp_path / "out"), expected, 2e-6)

    def test_soft_with_hard(self, soft: list[Path], hard: list[Path], tmp_path: Path) -> None:
        made = combine("product", [hard[2], soft[2]], tmp_path / "out")
        first, second = gates(hard[2]), gates(soft[2])
        assert made.gate == "centered"
        assert same(gates(tmp_path / "out"), {name: first[name] * second[name] for name in first}, 1e-6)

    @pytest.mark.parametrize("layout", ["low-rank", "row", "column", "block"])
    def test_layouts_meet_in_dense(self, layout: str, soft: list[Path], tmp_path: Path) -> None:
        other = saved(tmp_path / "other", gate="centered", score_layout=layout, rank=2, block_size=5)
        combine("interpolate", [other, soft[2]], tmp_path / "out", weights=[0.5, 0.5])
        first, second = gates(other), gates(soft[2])
        assert same(gates(tmp_path / "out"), {name: (first[name] + second[name]) / 2 for name in first}, 1e-6)
        assert settings(tmp_path / "out")["score_layout"] == "dense"

    def test_a_start_stays_a_start(self, tmp_path: Path) -> None:
        """Interpolating two masks that are 1 throughout gives one that is exactly 1 throughout."""
        folders = [saved(tmp_path / gate, gate=gate) for gate in ("normalized", "centered")]
        for folder in folders:
            edit(folder, lambda content: [scores.zero_() for scores in content.values()])
        combine("interpolate", folders, tmp_path / "out")
        assert all(not scores.any() for scores in load_file(tmp_path / "out" / WEIGHTS).values())


class TestDifferentLayers:
    def test_a_layer_left_out_is_one(self, tmp_path: Path) -> None:
        a = saved(tmp_path / "a", gate="centered", modules="attn")
        b = saved(tmp_path / "b", gate="centered", layers="1", seed=2)
        made = combine("product", [a, b], tmp_path / "out")
        first, second = gates(a), gates(b)
        names = first.keys() | second.keys()
        assert made.layers == len(names) == 8 + 7 - 4
        assert made.base_fingerprint is None
        one = torch.ones(())
        expected = {name: (first.get(name, one) * second.get(name, one)).clamp(max=2) for name in names}
        assert same(gates(tmp_path / "out"), expected, 2e-6)

    def test_union_keeps_what_one_leaves_out(self, tmp_path: Path) -> None:
        a = saved(tmp_path / "a", modules="attn", **THRESHOLD)
        b = saved(tmp_path / "b", modules="mlp", **THRESHOLD)
        combine("union", [a, b], tmp_path / "union")
        combine("intersection", [a, b], tmp_path / "both")
        assert all(m.eq(1).all() for m in gates(tmp_path / "union").values())
        assert same(gates(tmp_path / "both"), gates(a) | gates(b))

    def test_bases_of_different_names(self, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a", modules="attn"), saved(tmp_path / "b", modules="mlp")
        settings(a, base_model_name_or_path="one")
        settings(b, base_model_name_or_path="two")
        with pytest.raises(AdapterError, match=r"mask different layers, and name different bases .*a: one, .*b: two"):
            combine("product", [a, b], tmp_path / "out")

    def test_target_parameters(self, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a", modules="attn"), saved(tmp_path / "b", modules="mlp")
        settings(a, target_parameters=["experts.down_proj"])
        with pytest.raises(AdapterError, match="different layers, and one of them has target_parameters"):
            combine("product", [a, b], tmp_path / "out")


class TestRefusals:
    def test_different_bases(self, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a"), saved(tmp_path / "b", base=4)
        with pytest.raises(AdapterError, match=r"trained on different bases \(.*a: [0-9a-f]{12}, .*b: [0-9a-f]{12}\)"):
            combine("product", [a, b], tmp_path / "out")
        pack(b, tmp_path / "any", "float32", forget_base=True)
        made = combine("product", [a, tmp_path / "any"], tmp_path / "out")
        assert made.base_fingerprint == settings(a)["base_fingerprint"]

    def test_all_that_differs_is_named(self, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a"), saved(tmp_path / "b", modules_to_save=["lm_head"])
        edit(b, lambda content: content.update({f"{ONE}.mask_scores": torch.zeros(3, 3)}))
        settings(b, base_fingerprint="0" * 64)
        with pytest.raises(AdapterError, match="cannot be taken together") as caught:
            combine("product", [a, b], tmp_path / "out")
        message = str(caught.value)
        assert "different bases" in message
        assert f"{b} holds tensors that are no scores, such as base_model.model.lm_head.weight" in message
        assert f"{ONE} of {b} has scores of shape (3, 3), not (16, 16)" in message

    def test_topk_scores_in_full(self, tmp_path: Path) -> None:
        a = saved(tmp_path / "a", gate="topk")
        with pytest.raises(AdapterError, match=rf"depends on the base's weights; .*maskft pack {a} OUT --storage bits"):
            combine("union", [a, a], tmp_path / "out")
        b = saved(tmp_path / "b", gate="topk", score_layout="row")
        with pytest.raises(AdapterError, match="depends on the base's weights; merge it"):
            combine("union", [b, b], tmp_path / "out")

    def test_layouts_that_do_not_tell_the_shape(self, tmp_path: Path) -> None:
        a = saved(tmp_path / "a", score_layout="row")
        b = saved(tmp_path / "b", score_layout="column")
        with pytest.raises(AdapterError, match="nothing tells its shape"):
            combine("product", [a, b], tmp_path / "out")

    def test_scores_that_do_not_make_a_layer(self, tmp_path: Path) -> None:
        a = saved(tmp_path / "a", score_layout="low-rank", rank=2)
        edit(a, lambda content: content.pop(f"{ONE}.mask_left"))
        with pytest.raises(AdapterError, match=rf"{ONE} has {ONE}.mask_right, where mask_left, mask_right are needed"):
            combine("product", [a, a], tmp_path / "out")
        b = saved(tmp_path / "b")
        edit(b, lambda content: [content.pop(name) for name in list(content)])
        with pytest.raises(AdapterError, match="there are no scores"):
            combine("product", [b, b], tmp_path / "out")

    def test_damage(self, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a"), saved(tmp_path / "b", bits=True, **THRESHOLD)
        edit(a, lambda content: content[f"{ONE}.mask_scores"].fill_(math.nan))
        with pytest.raises(AdapterError, match=rf"{ONE}.mask_scores has values that are not finite"):
            combine("product", [a, a], tmp_path / "out")
        edit(b, lambda content: content.update({f"{ONE}.mask_scores.shape": torch.tensor([9, 9])}))
        with pytest.raises(AdapterError, match=rf"{ONE} of {b} has .* bytes"):
            combine("product", [b, b], tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    def test_arguments(self, hard: list[Path], soft: list[Path], tmp_path: Path) -> None:
        def refused(match: str, operation: str, folders: list[Path], **fields: object) -> None:
            with pytest.raises(UserError, match=match):
                combine(operation, folders, tmp_path / "out", **fields)  # type: ignore[arg-type]

        refused("operation is 'unoin'.*Did you mean 'union'", "unoin", hard)
        refused("two adapters or more", "union", hard[:1])
        refused("union takes no weights", "union", hard, weights=[1, 1, 1])
        refused(r"2 weights \(1, 0\) for 3 adapters", "product", hard, weights=[1, 0])
        refused("each must be 0 or more", "product", hard, weights=[1, -1, 1])
        refused("each must be 0 or more", "product", hard, weights=[1, math.nan, 1])
        refused("sum to 2; to interpolate they must sum to 1", "interpolate", soft[:2], weights=[1, 1])
        refused("union is for hard masks; soft: .*centered", "union", [hard[0], soft[2]])
        refused("the result's gate is 'topk'; soft, normalized, centered", "product", soft, gate="topk")
        refused("the result's gate is 'soft'", "union", hard, gate="soft")
        assert not (tmp_path / "out").exists()
        with pytest.raises(RunError, match="already exists"):
            combine("union", hard, hard[0])
