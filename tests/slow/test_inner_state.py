"""inner_state="reset": the wrapped optimizer as it was when it was wrapped, for optimizers of many habits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import assert_identical
from _wrapped import Averaging, CountsInDefaults, CountsInGroup, CountsOutOfSight, NeedsAModel
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from torch_gradmatch import Fish, GradMatch

CLASSES: dict[str, Any] = {
    "CountsInGroup": CountsInGroup,
    "CountsInDefaults": CountsInDefaults,
    "counts in an attribute": Averaging,
    "Adam": Adam,
    "Adagrad": lambda params: Adagrad(params, initial_accumulator_value=0.25),
    "fused Adam": lambda params: Adam(params, fused=True),
    "capturable lr": lambda params: Adam(params, lr=torch.tensor(0.01)),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
}


def step(optimizer: Optimizer, parameter: nn.Parameter, seed: int = 0) -> None:
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step(lambda: parameter.sum()) if "LBFGS" in repr(optimizer) else optimizer.step()


def made(build: Any, *, steps: int = 0) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build([parameter])
    for seed in range(steps):
        step(optimizer, parameter, seed)
    return parameter, optimizer


def visible(optimizer: Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def reset(wrapped: Optimizer, inner_steps: int = 1) -> GradMatch[Fish]:
    return GradMatch(wrapped, Fish(0.5, inner_steps=inner_steps, inner_state="reset"))


@pytest.mark.parametrize("steps", [0, 3], ids=["new", "trained"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_meta_iteration_starts_as_wrapped(name: str, steps: int):
    """After the first inner step of the third meta-iteration everything equals one step of what was wrapped."""
    (parameter, wrapped), (p_then, then) = (made(CLASSES[name], steps=steps) for _ in range(2))
    optimizer = reset(wrapped, inner_steps=2)
    for seed in range(4):
        step(optimizer, parameter, seed)
    with torch.no_grad():
        p_then.copy_(parameter)
    step(optimizer, parameter, seed=9)
    step(then, p_then, seed=9)
    assert_identical(visible(wrapped), visible(then))
    assert torch.equal(parameter, p_then)


@pytest.mark.parametrize("name", CLASSES)
def test_carry_is_the_plain_optimizer(name: str):
    expected, plain = made(CLASSES[name], steps=5)
    parameter, wrapped = made(CLASSES[name])
    optimizer = GradMatch(wrapped, Fish(1.0, inner_steps=2))
    for seed in range(5):
        step(optimizer, parameter, seed)
    assert_identical(visible(wrapped), visible(plain))
    torch.testing.assert_close(parameter, expected)


def test_what_a_scheduler_or_a_user_sets_stays():
    parameter, wrapped = made(CountsInDefaults)
    wrapped.train()
    optimizer, (group,) = reset(wrapped), wrapped.param_groups
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    group["tag"] = "backbone"
    for number, mode in enumerate((True, False, True, False), start=1):
        group["train_mode"] = mode
        step(optimizer, parameter)
        scheduler.step()
        assert (group["k"], group["d"], group["train_mode"]) == (1, 0.5, mode)
        assert (group["lr"], group["initial_lr"], group["tag"]) == (0.1 * 0.5**number, 0.1, "backbone")


def test_the_optimizer_stays_the_users_and_a_learning_rate_that_its_hook_changes_is_no_counter():
    parameter, wrapped = made(lambda params: SGD(params, lr=1.0))

    def halve(optimizer: Optimizer, *_: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    wrapped.register_step_post_hook(halve)
    optimizer = reset(wrapped)
    for _ in range(3):
        step(optimizer, parameter)
    assert optimizer.optimizer is wrapped
    assert wrapped.param_groups[0]["lr"] == 0.125


def test_a_group_added_later_starts_anew_with_the_rest():
    first, wrapped = made(CountsInDefaults)
    second, optimizer = nn.Parameter(torch.ones(2)), reset(wrapped)
    step(optimizer, first)
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(2)
    for _ in range(3):
        step(optimizer, first)
        assert [group["k"] for group in wrapped.param_groups] == [1, 1]


def test_a_checkpoint_between_meta_iterations_remembers_what_counts():
    (parameter, wrapped), (new_parameter, new_wrapped) = made(CountsInDefaults), made(CountsInDefaults)
    optimizer, new = reset(wrapped, inner_steps=2), reset(new_wrapped, inner_steps=2)
    step(optimizer, parameter)
    step(optimizer, parameter)
    new.load_state_dict(optimizer.state_dict())
    assert new.param_groups[0]["k"] == 2
    step(new, new_parameter)
    assert new.param_groups[0]["k"] == 1


def test_an_optimizer_that_cannot_be_built_again_nor_copied_returns_to_what_it_was():
    """It has a state from the beginning, and what nobody can copy among its attributes and in a group."""
    parameter, wrapped = made(lambda params: NeedsAModel(params, nn.Module()))
    wrapped.state[parameter]["start"] = torch.ones(2)
    wrapped.param_groups[0]["lock"] = wrapped.lock
    optimizer = reset(wrapped, inner_steps=2)
    for _ in range(2):
        optimizer.meta_step(lambda x: (parameter * x).sum(), [1.0, 2.0])
        wrapped.state[parameter]["start"] += 1.0
        assert wrapped.steps_taken == 2
    step(optimizer, parameter)
    assert wrapped.steps_taken == 1
    assert wrapped.state[parameter]["start"].tolist() == [1.0, 1.0]
    assert wrapped.param_groups[0]["lock"] is wrapped.lock


def test_a_function_resets_what_it_will():
    def by_hand(optimizer: CountsOutOfSight) -> None:
        optimizer.counting.number = 0

    w, inner = made(CountsOutOfSight)
    optimizer = GradMatch(inner, Fish(0.5, inner_state=by_hand))
    for _ in range(3):
        optimizer.meta_step(lambda x: (w * x).square().sum(), [1.0, 2.0])
        assert inner.counting.number == 2
    assert copy.deepcopy(optimizer).method.inner_state is by_hand
    with pytest.raises(ValueError, match="inner_state should be one of 'carry', 'reset', or a function"):
        optimizer.method.inner_state = "new"


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
def test_a_meta_step_that_fails_restores_counters(inner_state: str):
    w, wrapped = made(Averaging)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_state=inner_state))
    optimizer.meta_step(lambda x: (w * x).square().sum(), [1.0, 2.0])
    before = visible(wrapped)
    assert before["steps_taken"] == 2
    with pytest.raises(ValueError, match="nan"):
        optimizer.meta_step(lambda x: (w * x).square().sum(), [1.0, float("nan")])
    assert_identical(visible(wrapped), before)
