"""AdamW with stochastic rounding: fp32 as torch's, bf16 right on average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskft.optim import StochasticAdamW, round_stochastically


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_is_torch_s_adamw(weight_decay: float) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-2, 2, 50)) for _ in range(2))
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-12, "weight_decay": weight_decay}
    optimizers = StochasticAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(20):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (parameter - 1 + step % 3).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_follows_fp32_where_rounding_to_nearest_stands_still() -> None:
    """100 steps of 1e-4 from 1: bf16's spacing there is 0.004 to 0.008, so each step alone rounds to nothing."""

    def after(dtype: torch.dtype, optimizer: type[torch.optim.Optimizer]) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.ones(20_000, dtype=dtype))
        adam = optimizer([parameter], lr=1e-4, eps=1e-12, weight_decay=0.0)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            adam.step()
        return parameter.detach().float()

    assert torch.equal(after(torch.bfloat16, torch.optim.AdamW), torch.ones(20_000))
    # 1 - 0.01; the mean of 20 000 values that are each off by less than a spacing of 0.0078
    assert after(torch.bfloat16, StochasticAdamW).mean().item() == pytest.approx(0.99, abs=3e-4)
    assert after(torch.float32, StochasticAdamW).mean().item() == pytest.approx(0.99, abs=1e-5)


def test_moments_are_fp32_and_are_saved_with_the_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    adam = StochasticAdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    adam.step()
    state = adam.state_dict()["state"][0]
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(
        ("step", "first", "second"), torch.float32
    )


def test_a_closure_is_called_and_parameters_without_gradient_are_left() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert StochasticAdamW([parameter]).step(lambda: 1.5) == 1.5
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_settings_out_of_range(setting: dict) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        StochasticAdamW([torch.nn.Parameter(torch.ones(1))], **setting)


class TestRounding:
    @given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100))
    def test_to_one_of_the_two_neighbours(self, value: float) -> None:
        exact = torch.full((64,), value)
        rounded = round_stochastically(exact)
        below = (exact.view(torch.int32) & -65536).view(torch.float32)
        above = (below.view(torch.int32) + 65536).view(torch.float32)
        assert rounded.dtype == torch.bfloat16
        assert ((rounded.float() == below) | (rounded.float() == above)).all()

    def test_is_right_on_average(self) -> None:
        values = torch.full((100_000,), 1 + 0.3 * 2**-7)
        share_up = (round_stochastically(values).float() > 1).float().mean().item()
        assert share_up == pytest.approx(0.3, abs=0.01)

    def test_what_bf16_holds_stays(self) -> None:
        values = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), float("-inf")])
        assert torch.equal(round_stochastically(values).float(), values)
        assert round_stochastically(torch.tensor([float("nan")])).isnan().all()
