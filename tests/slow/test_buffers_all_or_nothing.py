"""Buffers are interpolated once, and all or nothing; what is not finite is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _buffers import backward, interpolated, network, statistics, wrap
from _models import assert_identical
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch, ops


@pytest.mark.parametrize("settings", [{}, {"buffers": "latest"}], ids=["interpolate", "latest"])
@pytest.mark.parametrize("first_to_close", [0, 1])
def test_two_optimizers_that_follow_one_model_move_its_buffers_once(first_to_close: int, settings: dict[str, Any]):
    model = network()
    optimizers = [
        GradMatch(torch.optim.SGD(model[i].parameters(), lr=0.01), Fish(0.25, model=model, **settings)) for i in (0, 2)
    ]
    for seed in range(3):
        before = statistics(model)
        for step in range(2):
            backward(model, 10 * seed + step)
            for optimizer in optimizers:
                optimizer.step()
        moved = statistics(model)
        optimizers[first_to_close].interpolate()
        optimizers[1 - first_to_close].interpolate()
        name = "1.running_mean"
        expected = moved[name] if settings else interpolated(before[name], moved[name])
        torch.testing.assert_close(statistics(model)[name], expected)


def test_of_two_optimizers_the_longer_inner_loop_leaves_the_buffers_to_the_shorter_also_when_resumed():
    finals = []
    for resumed in (False, True):
        model = network()
        methods = [Fish(0.25, inner_steps=steps, model=model) for steps in (2, 4)]
        optimizers = [
            GradMatch(torch.optim.SGD(model[i].parameters(), lr=0.01), method)
            for i, method in zip((0, 2), methods, strict=True)
        ]
        expected = statistics(model)["1.running_mean"]
        for step in range(4):
            backward(model, step)
            moved = statistics(model)["1.running_mean"]
            for optimizer in optimizers:
                optimizer.step()
            if step % 2:
                expected = interpolated(expected, moved)
                if step == 1:
                    torch.testing.assert_close(statistics(model)["1.running_mean"], expected)
            if resumed and step == 2:
                saved = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))
                model.load_state_dict(saved[0])
                for optimizer, state in zip(optimizers, saved[1], strict=True):
                    optimizer.load_state_dict(state)
        torch.testing.assert_close(statistics(model)["1.running_mean"], expected)
        finals.append(model.state_dict())
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=0)


def test_parameters_and_buffers_go_through_one_call(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    interpolate_ = ops.interpolate_
    monkeypatch.setattr(ops, "interpolate_", lambda s, f, w: (calls.append(len(s)), interpolate_(s, f, w)))
    model = network()
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
    assert calls == [6 + 2]


def test_an_interpolation_that_fails_leaves_weights_and_buffers_for_another_try(monkeypatch: pytest.MonkeyPatch):
    model = network()
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    backward(model, 0)
    optimizer.step()
    fast = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(ops, "interpolate_", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            optimizer.interpolate()
    torch.testing.assert_close(model.state_dict(), fast, rtol=0, atol=0)
    assert optimizer.inner_step == 1
    optimizer.interpolate()
    for name in ("0.weight", "1.running_mean"):
        torch.testing.assert_close(model.state_dict()[name], interpolated(before[name], fast[name]))


def test_a_failing_meta_step_restores_the_buffers_of_when_it_was_called():
    model = network()
    optimizer = wrap(model)
    backward(model, 0)  # a forward pass with gradients that leads to no step
    before = statistics(model)

    def fails(x: Tensor) -> Tensor:
        model(x)
        raise KeyError("label")

    with pytest.raises(KeyError):
        optimizer.meta_step(fails, [torch.randn(4, 2)])
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_wide_slow_buffers_are_saved_between_inner_loops():
    """A BatchNorm in bf16 whose slow statistics are in fp32: the resumed run is the uninterrupted one, bit for bit."""

    def build() -> tuple[nn.Module, GradMatch]:
        model = network().bfloat16()
        return model, wrap(model, inner_steps=1, meta_dtype=torch.float32)

    def train(model: nn.Module, optimizer: GradMatch, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["slow_buffer:1.running_mean"].dtype == torch.float32
    train(model, optimizer, range(3, 6))
    resumed_model, resumed = build()
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed_model, resumed, range(3, 6))
    assert_identical(resumed_model.state_dict(), model.state_dict())
    assert_identical(resumed.state_dict(), optimizer.state_dict())


def test_surgery_on_a_wide_slow_buffer_is_honoured_where_it_happened():
    model = network().bfloat16()
    optimizer = wrap(model, inner_steps=1, meta_dtype=torch.float32)
    for meta_iteration in range(3):
        model(torch.randn(8, 2).bfloat16()).square().mean().backward()
        moved = statistics(model)["1.running_mean"].float()
        optimizer.step()
        if meta_iteration == 1:
            slow = optimizer.state_dict()["state"][0]["slow_buffer:1.running_mean"].clone()
            assert not torch.equal(slow, slow.bfloat16().float())
            model[1].running_mean[1] = slow[1] = 3.0
    now = optimizer.state_dict()["state"][0]["slow_buffer:1.running_mean"]
    torch.testing.assert_close(now, interpolated(slow, moved), rtol=1e-6, atol=0.0)


def test_another_model_is_refused():
    model, other = network(), network()
    with pytest.raises(ValueError, match=r"model should hold the parameters .*Sequential has none of them"):
        GradMatch(torch.optim.SGD(model.parameters(), lr=0.01), Fish(model=other))
    with pytest.raises(ValueError, match="Is it another one, or a copy"):
        GradMatch(torch.optim.SGD(model.parameters(), lr=0.01), Fish(model=copy.deepcopy(model)))


# --------------------------------------------------------------------------------------------------------- not finite


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
    backward(model, 0)
    optimizer.step()
    model[1].running_var[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"the buffer '1.running_var' holds NaN or infinity.*call rollback\(\)"):
        optimizer.interpolate()
    optimizer.rollback()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
