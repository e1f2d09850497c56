"""What docs/theory.md states of shrinking gates, checked on matrices: the inequalities, and the counterexamples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskft.gates import Centered, Normalized, Soft


@st.composite
def shrunk(draw: Callable) -> tuple[Tensor, Tensor]:
    """A matrix W and a mask M in [0, 1], of up to 6 x 6."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    m = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    return w, m.round() if draw(st.booleans()) else m


def spectral(w: Tensor) -> float:
    return float(torch.linalg.matrix_norm(w, 2))


ABOVE = 1 + 1e-12


@given(shrunk())
def test_entries_keep_their_sign_and_shrink(pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    masked = w * m
    assert ((masked == 0) | (masked.sign() == w.sign())).all()
    assert (masked.abs() <= w.abs()).all()


@pytest.mark.parametrize("norm", ["fro", 1, math.inf])
@given(shrunk())
def test_norms_of_absolute_values_shrink(norm, pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    assert torch.linalg.matrix_norm(w * m, norm) <= torch.linalg.matrix_norm(w, norm) * ABOVE


@given(shrunk())
def test_how_far_a_mask_can_go(pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    assert torch.linalg.matrix_norm(w * m - w) <= (1 - m.min()) * torch.linalg.matrix_norm(w) * ABOVE


def test_the_spectral_norm_can_grow() -> None:
    w, m = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert spectral(w) == pytest.approx(math.sqrt(2))
    assert spectral(w * m) == pytest.approx((1 + math.sqrt(5)) / 2)
    assert float(torch.linalg.matrix_norm(w * m, "nuc")) < float(torch.linalg.matrix_norm(w, "nuc"))


def test_it_can_grow_without_limit() -> None:
    w, norms = torch.ones(1, 1, dtype=torch.float64), []
    for _ in range(6):  # Sylvester's matrices, whose rows are orthogonal
        w = torch.cat([torch.cat([w, w], 1), torch.cat([w, -w], 1)])
        norms.append(spectral(w * (w > 0)) / spectral(w))
    assert norms == sorted(norms)
    n = len(w)
    assert norms[-1] >= (n + 1) / 2 / math.sqrt(n)


@given(shrunk())
def test_how_much_it_can_grow(pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    rank = int(torch.linalg.matrix_rank(w))
    assert spectral(w * m) <= math.sqrt(rank) * spectral(w) * ABOVE
    assert spectral(w * m) <= spectral(w.abs()) * ABOVE
    assert spectral(w * m) <= float(m.norm(dim=1).max()) * spectral(w) * ABOVE  # Schur's test
    assert spectral(w * m) <= float(m.norm(dim=0).max()) * spectral(w) * ABOVE


@given(shrunk())
def test_nonnegative_weights_contract(pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    assert spectral(w.abs() * m) <= spectral(w.abs()) * ABOVE


@given(shrunk())
def test_row_and_column_masks_contract(pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    assert spectral(m[:, :1] * w) <= float(m[:, 0].max()) * spectral(w) * ABOVE
    assert spectral(w * m[:1]) <= float(m[0].max()) * spectral(w) * ABOVE
    kept = m[:, :1].clamp(min=0.1)
    assert torch.linalg.matrix_rank(kept * w) == torch.linalg.matrix_rank(w)


def test_a_mask_can_raise_the_rank() -> None:
    assert torch.linalg.matrix_rank(torch.ones(4, 4) * torch.eye(4)) == 4


@given(shrunk())
def test_the_distance_of_outputs(pair: tuple[Tensor, Tensor]) -> None:
    w, m = pair
    x = torch.linspace(-1, 1, w.shape[1], dtype=torch.float64)
    bound = (1 - m.min()) * torch.linalg.matrix_norm(w) * x.norm()
    assert ((w * m - w) @ x).norm() <= bound * ABOVE


def test_no_mask_turns_a_layer_round() -> None:
    """<W' x, -W x> with x = e_j: every reachable column lies in the closed half space of W's own."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(5, 5, generator=draw)
    for _ in range(50):
        m = torch.rand(5, 5, generator=draw)
        assert ((w * m * w).sum(0) >= 0).all()


def test_with_a_norm_behind_it_only_ratios_count() -> None:
    """Halving all but one unit is, behind RMSNorm, doubling that one."""
    x = torch.randn(7, dtype=torch.float64)

    def rms_norm(values: Tensor) -> Tensor:
        return values / values.square().mean().sqrt()

    less, more = torch.full((7,), 0.5, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    less[3], more[3] = 1.0, 2.0
    torch.testing.assert_close(rms_norm(less * x), rms_norm(more * x))


def test_row_masks_of_up_are_column_masks_of_down() -> None:
    draw = torch.Generator().manual_seed(0)
    gate, up, down, x = (torch.randn(6, 6, generator=draw, dtype=torch.float64) for _ in range(4))
    a = torch.rand(6, generator=draw, dtype=torch.float64)

    def block(up: Tensor, down: Tensor) -> Tensor:
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    torch.testing.assert_close(block(a[:, None] * up, down), block(up, down * a))


def test_row_masks_of_values_are_column_masks_of_outputs() -> None:
    draw = torch.Generator().manual_seed(0)
    value, out, tokens = (torch.randn(6, 6, generator=draw, dtype=torch.float64) for _ in range(3))
    weights = torch.softmax(torch.randn(6, 6, generator=draw, dtype=torch.float64), dim=-1)
    a = torch.rand(6, generator=draw, dtype=torch.float64)
    first = weights @ (tokens @ (a[:, None] * value).T) @ out.T
    torch.testing.assert_close(first, weights @ (tokens @ value.T) @ (out * a).T)


def test_row_masks_keep_where_a_unit_turns_on() -> None:
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 5, generator=draw), torch.randn(5, 100, generator=draw)
    a = torch.rand(8, generator=draw) + 0.01
    assert torch.equal((a[:, None] * w) @ x > 0, w @ x > 0)


@pytest.mark.parametrize(
    ("gate", "top"), [(Soft(init_gate=0.98), 1.0), (Normalized(init_gate=0.98), 1 / 0.98), (Centered(), 2.0)]
)
def test_ranges_of_the_gates(gate, top: float) -> None:
    d = torch.linspace(-80, 80, 1001, dtype=torch.float64).view(1, -1)
    m = gate.value(d, torch.ones_like(d))
    assert m.min() >= 0
    assert top * (1 - 1e-6) < m.max() <= top * (1 + 1e-6)


def test_products_of_norms_bound_a_perceptrons_lipschitz_constant() -> None:
    draw = torch.Generator().manual_seed(0)
    layers = [torch.randn(8, 8, generator=draw, dtype=torch.float64) for _ in range(3)]
    masks = [torch.rand(8, 1, generator=draw, dtype=torch.float64) for _ in range(3)]

    def network(x: Tensor, weights: list[Tensor]) -> Tensor:
        for w in weights:
            x = torch.relu(w @ x)
        return x

    before = math.prod(map(spectral, layers))
    rows = [w * m for w, m in zip(layers, masks, strict=True)]
    after = math.prod(map(spectral, rows))
    assert after <= before
    for _ in range(50):
        x, y = (torch.randn(8, generator=draw, dtype=torch.float64) for _ in range(2))
        assert (network(x, rows) - network(y, rows)).norm() <= after * (x - y).norm()
