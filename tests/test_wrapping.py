"""Wrapping an optimizer leaves what the user has alone: the model, its modules and hooks, groups, other threads."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "carry": lambda m: Fish(0.5, model=m),
    "reset": lambda m: Fish(0.5, inner_state="reset"),
    "function": lambda m: Fish(0.5, inner_state=lambda optimizer: None),
    "SmoothFish": lambda m: SmoothFish(2.0, 0.1, m),
    "IDGM": lambda m: IDGM(m, 0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def domains() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=generator) + i for i in range(3)]


def squared(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


# ---------------------------------------------------------------------------------------------------------- the groups


class NotToBeCopied(nn.Module):
    """A large teacher, say."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("copied")


@pytest.mark.parametrize("method", METHODS)
def test_what_the_user_keeps_in_a_group_is_never_copied(method: str):
    """Not in training, when something fails, or in a rollback."""
    model = network()
    optimizer = GradMatch(Adam(model.parameters()), METHODS[method](model))
    kept = {"lock": threading.Lock(), "teacher": NotToBeCopied(), "schedule": lambda: 0.1, "file": io.BytesIO()}
    optimizer.param_groups[0].update(kept)
    optimizer.meta_step(squared(model), domains())
    with pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(squared(model), [*domains()[:2], torch.full((5, 3), torch.nan)])
    squared(model)(domains()[0]).backward()
    optimizer.step()
    optimizer.rollback()
    assert all(optimizer.param_groups[0][name] is value for name, value in kept.items())


# ----------------------------------------------------------------------------------------------------------- the model


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["torch_gradmatch"] = None  # import torch_gradmatch: ModuleNotFoundError
model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.ones(2, 3)).shape)
"""


def test_a_model_saved_whole_in_the_middle_of_an_inner_loop_loads_where_the_package_is_not_installed(tmp_path: Path):
    model = network()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, model=model))
    optimizer.meta_step(squared(model), domains())
    squared(model)(domains()[0]).backward()
    optimizer.step()
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "model.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([2, 1])" in run.stdout


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_model_can_be_scripted_after_wrapping_and_then_be_trained():
    model, twin = network(), network()
    optimizers = [GradMatch(SGD(m.parameters(), lr=0.1), Fish(0.5, model=m)) for m in (model, twin)]
    scripted = torch.jit.script(model)
    for optimizer, called in zip(optimizers, (scripted, twin), strict=True):
        for _ in range(2):
            optimizer.meta_step(squared(called), domains())
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))


def test_a_meta_step_that_fails_leaves_a_module_alone_that_another_thread_trains():
    model, other = network(), nn.BatchNorm1d(3)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1))
    begun, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        begun.wait(60)
        other(torch.ones(4, 3))
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def loss_fn(x: Tensor) -> Tensor:
        loss = squared(model)(x)
        begun.set()
        done.wait(60)
        return loss * torch.nan

    with pytest.raises(ValueError, match="batch 0 is nan"):
        optimizer.meta_step(loss_fn, domains())
    thread.join()
    assert other.num_batches_tracked.item() == 1
    torch.testing.assert_close(other.running_mean, torch.full((3,), 0.1))


LAZY: dict[str, Callable[[nn.Module], Any]] = {
    "Fish": lambda m: Fish(0.5, model=m),
    "Fish, reset": lambda m: Fish(0.5, inner_state="reset"),
    "Fish, meta_dtype": lambda m: Fish(0.5, meta_dtype=torch.float64),
    "SmoothFish": lambda m: SmoothFish(2.0, 0.1),
    "SmoothFish-walk": lambda m: SmoothFish(1.0, 0.1),
}


@pytest.mark.parametrize("method", LAZY)
def test_lazy_modules_are_made_in_the_first_forward_pass_as_under_any_optimizer(method: str):
    """From then on it is training of the same model, made before; a checkpoint may come first."""

    def lazy() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))

    made = lazy()
    made(domains()[0])
    trained = []
    for model in (made, lazy()):
        optimizer = GradMatch(Adam(model.parameters(), lr=0.1), LAZY[method](model))
        assert repr(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        for _ in range(3):
            optimizer.meta_step(squared(model), domains())
        trained.append(dict(model.state_dict()))
    torch.testing.assert_close(trained[1], trained[0])


def test_lazy_modules_in_a_loop_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.25, model=model))
    before: dict[str, Tensor] = {}
    for x in domains():
        optimizer.zero_grad()
        squared(model)(x).backward()
        before = before or copy.deepcopy(dict(model.named_parameters()))
        optimizer.step()
    fast = copy.deepcopy(dict(model.named_parameters()))
    optimizer.interpolate()
    expected = {name: slow + 0.25 * (fast[name] - slow) for name, slow in before.items()}
    torch.testing.assert_close(dict(model.named_parameters()), expected, check_stride=False)
