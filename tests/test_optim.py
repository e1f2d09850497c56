"""Optimizers for scores: fp32 as torch's, bf16 and 8 bits right on average, steps inside the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from maskft.optim import ScoreAdamW, StepInBackward, round_stochastically

SETTINGS = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-12}


def trained(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int = 20) -> Tensor:
    """The parameter after steps on a bowl whose centre moves."""
    for step in range(steps):
        optimizer.zero_grad()
        (parameter.float() - 1 + step % 3).square().sum().backward()
        optimizer.step()
    return parameter.detach().float()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(50,), (5, 10), (2, 5, 5)])
def test_fp32_is_torch_s_adamw(weight_decay: float, shape: tuple[int, ...]) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-2, 2, 50).view(shape)) for _ in range(2))
    settings = {**SETTINGS, "weight_decay": weight_decay}
    after = trained(ScoreAdamW([ours], **settings), ours), trained(torch.optim.AdamW([theirs], **settings), theirs)
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-6)


def test_bf16_follows_fp32_where_rounding_to_nearest_stands_still() -> None:
    """100 steps of 1e-4 from 1: bf16's spacing there is 0.004 to 0.008, so each step alone rounds to nothing."""

    def after(dtype: torch.dtype, optimizer: type[torch.optim.Optimizer]) -> Tensor:
        parameter = nn.Parameter(torch.ones(100, 200, dtype=dtype))
        adam = optimizer([parameter], lr=1e-4, eps=1e-12, weight_decay=0.0)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            adam.step()
        return parameter.detach().float()

    assert torch.equal(after(torch.bfloat16, torch.optim.AdamW), torch.ones(100, 200))
    # 1 - 0.01; the mean of 20 000 values that are each off by less than a spacing of 0.0078
    assert after(torch.bfloat16, ScoreAdamW).mean().item() == pytest.approx(0.99, abs=3e-4)
    assert after(torch.float32, ScoreAdamW).mean().item() == pytest.approx(0.99, abs=1e-5)


class TestEightBits:
    @staticmethod
    def pair(**settings: object) -> tuple[list[nn.Parameter], list[ScoreAdamW]]:
        """The same parameter for moments in fp32 and in 8 bits."""
        start = torch.zeros(64, 128)
        parameters = [nn.Parameter(start.clone()) for _ in range(2)]
        kinds = ("float32", "int8")
        return parameters, [ScoreAdamW([p], moments=m, **settings) for p, m in zip(parameters, kinds, strict=True)]

    @pytest.mark.parametrize("beta2", [0.95, 0.999])
    def test_moves_as_fp32_does(self, beta2: float) -> None:
        """Noisy gradients whose sizes span four decades within each row, as those of scores do."""
        parameters, optimizers = self.pair(lr=0.01, betas=(0.9, beta2), eps=1e-12)
        noise = torch.Generator().manual_seed(0)
        size = 10 ** (-4 * torch.rand(64, 128, generator=noise)) * 1e-6
        drift = torch.randn(64, 128, generator=noise)
        for _ in range(100):
            gradient = size * (drift + torch.randn(64, 128, generator=noise))
            for parameter, optimizer in zip(parameters, optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        exact, ours = (p.detach() for p in parameters)
        large = size > 1e-8  # a hundredth of a row's largest, and more
        assert torch.corrcoef(torch.stack([exact[large], ours[large]]))[0, 1] > 0.99
        assert torch.corrcoef(torch.stack([exact.flatten(), ours.flatten()]))[0, 1] > 0.97
        assert ours.abs().mean() / exact.abs().mean() == pytest.approx(1, abs=0.05)

    def test_no_step_is_longer_than_exact_moments_could_make(self) -> None:
        """A gradient that stops leaves a first moment, and a second one that 8 bits round to 0."""
        parameters, optimizers = self.pair(lr=1.0, betas=(0.9, 0.95), eps=1e-30)
        gradient = torch.full((64, 128), 1e-4)
        gradient[:, 0] = 1.0
        for step in range(10):
            before = parameters[1].detach().clone()
            parameters[1].grad = gradient if step == 0 else gradient * (torch.arange(128) == 0)
            optimizers[1].step()
            assert (parameters[1].detach() - before).abs().max() < 1.2  # 1.165 is the bound for these betas

    def test_takes_two_bytes_and_eight_for_each_row(self) -> None:
        parameter = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
        optimizer = ScoreAdamW([parameter], moments="int8")
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        sizes = {name: value.nbytes for name, value in optimizer.state[parameter].items()}
        assert sizes == {"step": 4, "first": 8192, "first_scale": 256, "second": 8192, "second_scale": 256}

    def test_small_parameters_keep_fp32(self) -> None:
        parameter = nn.Parameter(torch.zeros(10))
        optimizer = ScoreAdamW([parameter], moments="int8")
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert optimizer.state[parameter]["first"].dtype == torch.float32

    def test_nothing_to_learn_changes_nothing(self) -> None:
        parameters, optimizers = self.pair(lr=1.0)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            assert not parameter.any()


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_resumed_run_goes_on_bit_by_bit(moments: str) -> None:
    parameter = nn.Parameter(torch.linspace(-2, 2, 64 * 128).view(64, 128).bfloat16())
    optimizer = ScoreAdamW([parameter], **SETTINGS, moments=moments)
    trained(optimizer, parameter, 3)
    saved = copy.deepcopy((parameter.detach(), optimizer.state_dict()))
    torch.randn(7)  # the global generator has no part in it
    whole = trained(optimizer, parameter, 3)
    resumed = nn.Parameter(saved[0])
    again = ScoreAdamW([resumed], **SETTINGS, moments=moments)
    again.load_state_dict(saved[1])
    assert torch.equal(trained(again, resumed, 3), whole)
    dtypes = {name: value.dtype for name, value in again.state[resumed].items()}
    assert dtypes == {name: value.dtype for name, value in optimizer.state[parameter].items()}


def test_a_closure_is_called_and_parameters_without_gradient_are_left() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert ScoreAdamW([parameter]).step(lambda: 1.5) == 1.5
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_settings_out_of_range(setting: dict) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        ScoreAdamW([nn.Parameter(torch.ones(1))], **setting)


def test_unknown_moments() -> None:
    with pytest.raises(ValueError, match="moments is 'int4'; allowed: float32, int8"):
        ScoreAdamW([nn.Parameter(torch.ones(1))], moments="int4")


class TestStepInBackward:
    @staticmethod
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    @staticmethod
    def loss(model: nn.Module, seed: int) -> Tensor:
        return model(torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))).square().mean()

    def test_is_the_same_step_and_frees_the_gradients(self) -> None:
        plain, inside = self.model(), self.model()
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (plain, inside)]
        hooks = StepInBackward(optimizers[1])
        for step in range(5):
            for model, optimizer in zip((plain, inside), optimizers, strict=True):
                self.loss(model, step).backward()
                if model is plain:
                    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                else:
                    assert all(p.grad is None for p in model.parameters())
                    torch.testing.assert_close(hooks.norm(), norm)
                optimizer.step()
                optimizer.zero_grad()
        for a, b in zip(plain.parameters(), inside.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_accumulates_until_it_is_ready(self) -> None:
        plain, inside = self.model(), self.model()
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (plain, inside)]
        last = False
        StepInBackward(optimizers[1], ready=lambda: last)
        for micro in range(4):
            last = micro % 2 == 1
            for model, optimizer in zip((plain, inside), optimizers, strict=True):
                self.loss(model, micro).backward()
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
        for a, b in zip(plain.parameters(), inside.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_clips_each_tensor_by_its_own_norm(self) -> None:
        parameter = nn.Parameter(torch.zeros(4))
        hooks = StepInBackward(torch.optim.SGD([parameter], lr=1.0), max_norm=0.5)
        (parameter * 10).sum().backward()
        assert hooks.norm().item() == pytest.approx(20)
        assert parameter.detach().norm().item() == pytest.approx(0.5, rel=1e-5)

    def test_shows_gradients_before_they_go_and_can_be_removed(self) -> None:
        parameter, seen = nn.Parameter(torch.zeros(2)), []
        hooks = StepInBackward(torch.optim.SGD([parameter], lr=1.0), watch=lambda p: seen.append(p.grad.clone()))
        (parameter * 3).sum().backward()
        assert torch.equal(seen[0], torch.full((2,), 3.0))
        hooks.remove()
        (parameter * 3).sum().backward()
        assert parameter.grad is not None
        assert len(seen) == 1


class TestRounding:
    @given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100))
    def test_to_one_of_the_two_neighbours(self, value: float) -> None:
        exact = torch.full((64,), value)
        rounded = round_stochastically(exact, torch.randint(65536, (64,), dtype=torch.int32))
        below = (exact.view(torch.int32) & -65536).view(torch.float32)
        above = (below.view(torch.int32) + 65536).view(torch.float32)
        assert rounded.dtype == torch.bfloat16
        assert ((rounded.float() == below) | (rounded.float() == above)).all()

    def test_is_right_on_average(self) -> None:
        values = torch.full((65536,), 1 + 0.3 * 2**-7)
        share_up = (round_stochastically(values, torch.arange(65536, dtype=torch.int32)).float() > 1).float().mean()
        assert share_up.item() == pytest.approx(0.3, abs=1e-3)

    def test_what_bf16_holds_stays(self) -> None:
        values = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), float("-inf")])
        noise = torch.full((6,), 65535, dtype=torch.int32)
        assert torch.equal(round_stochastically(values, noise).float(), values)
        assert round_stochastically(torch.tensor([float("nan")]), noise[:1]).isnan().all()
