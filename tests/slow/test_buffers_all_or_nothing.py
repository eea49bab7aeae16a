"""Parameters and buffers are interpolated in one call, restored if it fails; what is not finite is named."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from _buffers import MEAN, batch, interpolated, network, statistics, step, wrap
from _models import assert_identical
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import Fish, GradMatch, SmoothFish, ops


def test_parameters_and_buffers_go_through_one_call(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    interpolate_ = ops.interpolate_
    monkeypatch.setattr(ops, "interpolate_", lambda s, f, w: (calls.append(len(s)), interpolate_(s, f, w)))
    model = network()
    step(model, wrap(model, inner_steps=1), 0)
    assert calls == [6 + 2]


def test_an_interpolation_that_fails_leaves_weights_and_buffers_for_another_try(monkeypatch: pytest.MonkeyPatch):
    model = network()
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0)
    fast = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(ops, "interpolate_", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            optimizer.interpolate()
    torch.testing.assert_close(model.state_dict(), fast, rtol=0, atol=0)
    assert optimizer.inner_step == 1
    optimizer.interpolate()
    for name in ("0.weight", MEAN):
        torch.testing.assert_close(model.state_dict()[name], interpolated(before[name], fast[name]))


class Replaces(nn.Module):
    """Puts a new tensor in the place of its buffer in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("method", ["Fish", "SmoothFish"])
def test_a_failing_meta_step_restores_the_buffers_of_when_it_was_called(method: str, error: type[BaseException]):
    model = nn.Sequential(Replaces(), *network())
    built = Fish(0.25, model=model) if method == "Fish" else SmoothFish(1.0, 0.1, model)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.01), built)
    model(batch(0)).sum().backward()  # a forward pass with gradients that leads to no step
    before = copy.deepcopy(model.state_dict())

    def loss_fn(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        if x.max() > 5:
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            return loss * float("nan")
        return loss

    with pytest.raises(error) as found:
        optimizer.meta_step(loss_fn, [batch(1), batch(2) + 10])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.inner_step == 0
    assert any("buffers" in note for note in getattr(found.value, "__notes__", ["buffers"]))  # Python 3.11


# --------------------------------------------------------------------------------------- slow buffers of more digits


def test_meta_dtype_keeps_buffers_moving_in_low_precision():
    def run(meta_dtype: torch.dtype | None) -> float:
        model = nn.Module()
        model.register_buffer("level", torch.ones((), dtype=torch.bfloat16))
        model.weight = nn.Parameter(torch.zeros(1))
        optimizer = GradMatch(
            SGD(model.parameters(), lr=0.01), Fish(0.01, inner_steps=1, model=model, meta_dtype=meta_dtype)
        )
        for _ in range(200):
            optimizer.zero_grad()
            model.level += 0.0625
            model.weight.square().sum().backward()
            optimizer.step()
        return model.level.item()

    assert run(None) == 1.0
    assert run(torch.float32) == pytest.approx(1.0 + 200 * 0.01 * 0.0625, abs=0.02)


def test_zero_grad_keeps_the_digits_of_slow_buffers():
    """What it copies anew between two inner loops is what the copy before rounds to."""

    def run(zero_grad: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
        optimizer = GradMatch(
            SGD(model.parameters(), lr=0.1), Fish(0.1, inner_steps=3, model=model, meta_dtype=torch.float32)
        )
        for _ in range(60):
            (optimizer if zero_grad == "ours" else optimizer.optimizer).zero_grad()
            model(torch.randn(6, 3).bfloat16() + 1.0).square().mean().backward()
            optimizer.step()
        return {name: slow.clone() for name, slow in optimizer.state_dict()["gradmatch"]["slow_buffers"].items()}

    ours = run("ours")
    assert ours["1.running_mean"].dtype is torch.float32
    torch.testing.assert_close(ours, run("the wrapped optimizer's"), rtol=0, atol=0)


def in_bf16() -> tuple[nn.Module, GradMatch[Fish], Callable[[range], None]]:
    """A network, its optimizer with slow copies in fp32, and the loop that trains it."""
    model = network().bfloat16()
    optimizer = wrap(model, inner_steps=1, meta_dtype=torch.float32)

    def train(seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(batch(seed).bfloat16()).square().mean().backward()
            optimizer.step()

    return model, optimizer, train


def test_wide_slow_buffers_are_saved_between_inner_loops():
    model, optimizer, train = in_bf16()
    train(range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["gradmatch"]["slow_buffers"][MEAN].dtype == torch.float32
    train(range(3, 6))
    resumed_model, resumed, train_resumed = in_bf16()
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train_resumed(range(3, 6))
    assert_identical(resumed_model.state_dict(), model.state_dict())
    assert_identical(resumed.state_dict(), optimizer.state_dict())


def test_surgery_on_a_wide_slow_buffer_is_honoured_where_it_happened():
    model, optimizer, train = in_bf16()

    def slow() -> Tensor:
        return optimizer.state_dict()["gradmatch"]["slow_buffers"][MEAN].clone()

    moved: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: moved.append(statistics(model)[MEAN].float()))
    train(range(2))
    before = slow()
    assert not torch.equal(before, before.bfloat16().float())
    model[1].running_mean[1] = before[1] = 3.0
    train(range(2, 3))
    torch.testing.assert_close(slow(), interpolated(before, moved[-1]), rtol=1e-6, atol=0.0)


# ----------------------------------------------------------------------------------------------------------- refused


def test_another_model_is_refused():
    model, other = network(), network()
    with pytest.raises(ValueError, match=r"model should hold the parameters .*Sequential has none of them"):
        GradMatch(SGD(model.parameters(), lr=0.01), Fish(model=other))
    with pytest.raises(ValueError, match="Is it another one, or a copy"):
        GradMatch(SGD(model.parameters(), lr=0.01), Fish(model=copy.deepcopy(model)))


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_range_that_begins_at_infinity_takes_its_latest_value(nonfinite: str):
    """As an observer's for quantization: there is no way half between infinity and a number."""

    class Observer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.tensor(-float("inf")))

        def forward(self, x: Tensor) -> Tensor:
            self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
            return x

    model = nn.Sequential(Observer(), nn.Linear(2, 1))
    optimizer = wrap(model, inner_steps=1, nonfinite=nonfinite)
    model(torch.tensor([[1.0, 4.0]])).sum().backward()
    optimizer.step()
    assert model[0].largest.item() == 4.0


def test_a_buffer_that_becomes_nan_is_named():
    model = network()
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0)
    model[1].running_var[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"the buffer '1.running_var' holds NaN or infinity.*call rollback\(\)"):
        optimizer.interpolate()
    optimizer.rollback()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
