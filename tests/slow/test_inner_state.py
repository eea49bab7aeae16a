"""inner_state="reset": as if the wrapped optimizer were newly built, for optimizers of many habits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from _models import assert_identical
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.slow.inner_state import InnerState


class CountsInGroup(Optimizer):
    """Adds ``step`` to its groups in the first step, as the optimizers of several collections do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first = "step" not in group
            group["step"] = 1 if first else group["step"] + 1
            for p in group["params"]:
                if first:
                    self.state[p]["sum"] = torch.zeros_like(p)
                self.state[p]["sum"] += p.grad
                p -= group["lr"] / group["step"] * self.state[p]["sum"]


class CountsInDefaults(Optimizer):
    """Keeps an estimate and a counter in the defaults, as schedule-free and learning-rate-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, d0: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "d0": d0, "d": d0, "k": 0, "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"] = p.clone()
            group["k"] += 1
            group["d"] = group["d"] * 0.5
            group["history"] = torch.tensor([float(group["k"])])
            for p in group["params"]:
                p -= group["lr"] * group["d"] * p.grad


class TakesAnything(CountsInDefaults):
    """Takes keyword arguments that its signature does not name."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(options)


class NeedsMore(CountsInDefaults):
    """Cannot be built again from its groups, and starts with state of its own."""

    def __init__(self, params: Any, model: nn.Module) -> None:
        super().__init__(params)
        for p in model.parameters():
            self.state[p]["start"] = p.detach().clone()

    def step(self, closure: Any = None) -> None:
        super().step()
        for entry in self.state.values():
            entry["start"].add_(1.0)


CLASSES: dict[str, Any] = {
    "CountsInGroup": CountsInGroup,
    "CountsInDefaults": CountsInDefaults,
    "TakesAnything": lambda params: TakesAnything(params, tag="backbone"),
    "Adam": Adam,
    "Adagrad": lambda params: Adagrad(params, initial_accumulator_value=0.25),
    "fused Adam": lambda params: Adam(params, fused=True),
    "capturable lr": lambda params: Adam(params, lr=torch.tensor(0.01)),
}


def step(optimizer: Optimizer, parameter: nn.Parameter, seed: int = 0) -> None:
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def visible(optimizer: Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_meta_iteration_starts_as_newly_built(name: str):
    """After the first inner step of the third meta-iteration everything equals a new optimizer's after one step."""
    parameter = nn.Parameter(torch.ones(3))
    wrapped = CLASSES[name]([parameter])
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=2, inner_state="reset"))
    for seed in range(4):
        step(optimizer, parameter, seed)
    new_parameter = nn.Parameter(parameter.detach().clone())
    new = CLASSES[name]([new_parameter])
    step(optimizer, parameter, seed=9)
    step(new, new_parameter, seed=9)
    assert_identical(visible(wrapped), visible(new))
    assert torch.equal(parameter, new_parameter)


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "CountsInDefaults", "CountsInGroup"])
def test_an_optimizer_trained_before_wrapping_starts_anew(name: str):
    parameter = nn.Parameter(torch.ones(3))
    wrapped = CLASSES[name]([parameter])
    for seed in range(3):
        step(wrapped, parameter, seed)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=2, inner_state="reset"))
    new_parameter = nn.Parameter(parameter.detach().clone())
    new = CLASSES[name]([new_parameter])
    step(optimizer, parameter, seed=9)
    step(new, new_parameter, seed=9)
    assert_identical(visible(wrapped), visible(new))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_carry_is_the_plain_optimizer(name: str):
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain, wrapped = (CLASSES[name]([p]) for p in parameters)
    optimizer = GradMatch(wrapped, Fish(1.0, inner_steps=2))
    for seed in range(5):
        step(plain, parameters[0], seed)
        step(optimizer, parameters[1], seed)
    assert_identical(visible(wrapped), visible(plain))
    torch.testing.assert_close(parameters[1], parameters[0])


def test_what_a_scheduler_or_a_user_sets_stays():
    parameter = nn.Parameter(torch.ones(3))
    wrapped = CountsInDefaults([parameter])
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    wrapped.param_groups[0]["tag"] = "backbone"
    for seed in range(3):
        step(optimizer, parameter, seed)
        scheduler.step()
    step(optimizer, parameter)
    group = wrapped.param_groups[0]
    assert group["lr"] == 0.1 * 0.5**3
    assert group["initial_lr"] == 0.1
    assert group["tag"] == "backbone"
    assert (group["k"], group["d"]) == (1, 0.5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_mode_the_user_switched_on_stays_on(trained: bool):
    parameter = nn.Parameter(torch.ones(3))
    wrapped = CountsInDefaults([parameter])
    wrapped.train()
    if trained:
        step(wrapped, parameter)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    for _ in range(2):
        step(optimizer, parameter)
        assert wrapped.param_groups[0]["train_mode"] is True
        assert wrapped.param_groups[0]["k"] == 1


def test_hyperparameters_of_a_group_of_its_own_survive():
    def build() -> tuple[Optimizer, list[nn.Parameter]]:
        parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
        groups = [{"params": parameters[:1], "lr": 0.3, "lr_decay": 0.5}, {"params": parameters[1:]}]
        return Adagrad(groups, lr=0.1, initial_accumulator_value=4.0), parameters

    def step_all(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            p.grad = torch.ones(2)
        optimizer.step()

    wrapped, parameters = build()
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    step_all(optimizer, parameters)
    step_all(optimizer, parameters)
    new, new_parameters = build()
    step_all(new, new_parameters)
    assert_identical(visible(wrapped), visible(new))


def test_a_group_added_later_starts_anew_with_the_rest():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    wrapped = CountsInDefaults([first])
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    step(optimizer, first)
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(2)
    for _ in range(3):
        step(optimizer, first)
        assert [group["k"] for group in wrapped.param_groups] == [1, 1]


def test_a_checkpoint_between_meta_iterations_remembers_what_counts():
    def build() -> tuple[nn.Parameter, GradMatch]:
        parameter = nn.Parameter(torch.ones(2))
        return parameter, GradMatch(CountsInDefaults([parameter]), Fish(0.5, inner_steps=2, inner_state="reset"))

    parameter, optimizer = build()
    step(optimizer, parameter)
    step(optimizer, parameter)
    new_parameter, new = build()
    new.load_state_dict(optimizer.state_dict())
    assert new.param_groups[0]["k"] == 2
    step(new, new_parameter)
    assert new.param_groups[0]["k"] == 1


def test_an_optimizer_that_cannot_be_built_again_returns_to_what_it_was_when_wrapped():
    parameter = nn.Parameter(torch.ones(2))
    module = nn.Module()
    module.weight = parameter
    wrapped = NeedsMore([parameter], module)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    for seed in range(3):
        step(optimizer, parameter, seed)
        assert wrapped.state[parameter]["start"].tolist() == [2.0, 2.0]
        assert wrapped.param_groups[0]["k"] == 1


def test_an_optimizer_that_refuses_to_be_built_again_later_says_so():
    class Positive(Adagrad):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            if any(group.get("lr", lr) <= 0 for group in params if isinstance(group, dict)):
                raise ValueError("lr must be positive")
            super().__init__(params, lr=lr)

    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(Positive([parameter]), Fish(0.5, inner_steps=1, inner_state="reset"))
    step(optimizer, parameter)
    optimizer.param_groups[0]["lr"] = 0.0
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match="Positive could not be built again"):
        step(optimizer, parameter)
    assert torch.equal(parameter, before)


def test_reset_keeps_the_users_optimizer_object_and_its_hooks():
    parameter = nn.Parameter(torch.ones(2))
    wrapped = SGD([parameter], lr=0.1, momentum=0.9)
    calls: list[int] = []
    wrapped.register_step_post_hook(lambda *_: calls.append(1))
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    step(optimizer, parameter)
    step(optimizer, parameter)
    assert optimizer.optimizer is wrapped
    assert calls == [1, 1]


def test_a_learning_rate_that_a_hook_inside_the_step_changes_is_no_counter():
    parameter = nn.Parameter(torch.ones(2))
    wrapped = SGD([parameter], lr=1.0)

    def halve(optimizer: Optimizer, *_: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    wrapped.register_step_post_hook(halve)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    for _ in range(3):
        step(optimizer, parameter)
    assert wrapped.param_groups[0]["lr"] == 0.125


def test_an_option_that_the_signature_does_not_name_stays():
    parameter = nn.Parameter(torch.ones(2))
    wrapped = TakesAnything([parameter], d0=3.0)
    step(wrapped, parameter)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    step(optimizer, parameter)
    assert wrapped.param_groups[0]["d0"] == 3.0


def test_building_again_repeats_no_warning():
    class Warns(Adagrad):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            warnings.warn("this optimizer is experimental", stacklevel=2)
            super().__init__(params, lr=lr)

    parameter = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="experimental"):
        wrapped = Warns([parameter])
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=1, inner_state="reset"))
    for _ in range(2):
        step(optimizer, parameter)
        assert wrapped.state[parameter]["step"] == 1


# ------------------------------------------------------------------------------------------------- saved and restored


def test_a_saved_state_takes_the_memory_of_the_last_one(monkeypatch: pytest.MonkeyPatch):
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    state = InnerState(optimizer, resets=False)
    for _ in range(3):
        parameter.grad = torch.ones(3)
        optimizer.step()
        state.save()
        saved = {k: v.clone() for k, v in optimizer.state[parameter].items()}
        optimizer.step()
        assert state.restore()
        torch.testing.assert_close(dict(optimizer.state[parameter]), saved, rtol=0, atol=0)
        assert not state.restore()  # only once
        with monkeypatch.context() as patch:  # no copy is made anew
            patch.setattr("torch_gradmatch.slow.inner_state.clone_all", None)
            state.save()
            state.forget()
            assert not state.restore()
