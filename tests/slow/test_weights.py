"""What the slow weights are copies of: the parameters before the first forward pass of an inner loop."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from _models import assert_identical
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import Fish, GradMatch


def wrap(model: nn.Module, **settings: Any) -> GradMatch[Fish]:
    return GradMatch(SGD(model.parameters(), lr=0.1, momentum=0.9), Fish(0.25, model=model, **settings))


def step(optimizer: GradMatch[Fish], *parameters: Tensor) -> None:
    """On gradients of ones."""
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_the_slow_copy_is_older_than_a_forward_pass_that_writes_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 1))  # rows longer than that are shortened
    optimizer = wrap(model)
    for ends in (optimizer.rollback, optimizer.interpolate):
        with torch.no_grad():
            model[0].weight.normal_(std=3.0)
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        model(torch.arange(2)).square().mean().backward()
        assert not torch.equal(model[0].weight, before["0.weight"])
        optimizer.step()
        with optimizer.slow_weights():
            assert_identical(dict(model.state_dict()), dict(before))
        fast = copy.deepcopy(model.state_dict())
        ends()
        fraction = 0.0 if ends == optimizer.rollback else 0.25
        expected = {name: slow + fraction * (fast[name] - slow) for name, slow in before.items()}
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "one frozen"])
def test_a_checkpoint_loaded_between_zero_grad_and_the_first_step_is_what_the_walk_begins_at(frozen: bool):
    """It writes every parameter, which no forward pass does."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(not frozen)
    loaded = {name: value + 1 for name, value in model.state_dict().items()}
    optimizer = wrap(model)
    optimizer.zero_grad()
    model.load_state_dict(loaded)
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
    optimizer.rollback()
    assert_identical(dict(model.named_parameters()), {name: loaded[name] for name, _ in model.named_parameters()})


def test_a_wide_copy_follows_a_parameter_whose_strides_change():
    """Of the same shape and memory: it was off by 2.58 once."""
    results = []
    for meta_dtype in (None, torch.float64):
        w = nn.Parameter(torch.arange(9.0).reshape(3, 3) / 4)
        optimizer = GradMatch(SGD([w], lr=0.5), Fish(0.5, inner_steps=1, meta_dtype=meta_dtype))
        for _ in range(2):
            w.grad = torch.arange(9.0).reshape(3, 3)
            optimizer.step()
            w.data = w.data.t()
            w.grad = None
        results.append(w.detach().clone())
    torch.testing.assert_close(results[1], results[0])


def test_there_is_a_way_out_after_a_change_of_shape_in_the_middle_of_an_inner_loop():
    w = nn.Parameter(torch.ones(3))
    optimizer = GradMatch(SGD([w], lr=0.5), Fish(0.5))
    step(optimizer, w)
    w.data = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"has shape \(4,\) and had \(3,\) when the inner loop began: call rollback"):
        optimizer.interpolate()
    with contextlib.suppress(RuntimeError), optimizer.slow_weights():
        assert w.tolist() == [1.0, 1.0, 1.0]
    optimizer.rollback()
    assert w.tolist() == [1.0, 1.0, 1.0]
    step(optimizer, w)
    optimizer.interpolate()
    assert w.tolist() == [0.75, 0.75, 0.75]


def test_unfreezing_in_the_middle_of_an_inner_loop():
    frozen, free = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    optimizer = GradMatch(SGD([frozen, free], lr=1.0), Fish(0.5, inner_steps=2))
    step(optimizer, free)
    frozen.requires_grad_()
    step(optimizer, frozen, free)
    assert (frozen.item(), free.item()) == (0.5, 0.0)


def test_a_frozen_parameter_with_a_left_over_gradient_moves_and_is_interpolated():
    """torch's optimizers look at the gradient only; so must the slow weights."""
    parameter = nn.Parameter(torch.ones(1), requires_grad=False)
    step(GradMatch(SGD([parameter], lr=1.0), Fish(0.5, inner_steps=1)), parameter)
    assert parameter.item() == 0.5


def test_slow_weights_kept_for_their_digits_do_not_open_an_inner_loop_when_loaded():
    """Between two inner loops a state dict holds wider slow weights, and surgery after loading still counts."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, inner_steps=1, meta_dtype=torch.float32))
    step(optimizer, parameter)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["gradmatch"]["slow_weights"][0].dtype == torch.float32
    optimizer.load_state_dict(state)
    parameter.data.fill_(3.0)
    optimizer.rollback()
    assert parameter.tolist() == [3.0, 3.0]
    optimizer.step()
    assert parameter.tolist() == [3.0, 3.0]
