"""Fish: what the random sequences of ``test_fish_stateful.py`` do not reach, and its direction for small steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import (
    FeatureNet,
    assert_identical,
    assert_same_model,
    assert_same_state,
    loss_of,
    make_batches,
)
from _reference import ReferenceFish, mean_pairwise_cosine, mean_pairwise_inner_product
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, batch: tuple[Any, ...]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(("build", "follows"), [(lbfgs, True), (sgd, False)], ids=["LBFGS", "SGD without model"])
def test_meta_step_is_the_manual_loop(build: Callable[[nn.Module], torch.optim.Optimizer], follows: bool):
    """Without a model buffers keep their latest value. Other optimizers and settings: ``test_fish_stateful.py``."""
    model = FeatureNet(torch.Generator().manual_seed(0))
    oracle = ReferenceFish(copy.deepcopy(model), build, 0.7, buffers="interpolate" if follows else "latest")
    optimizer = GradMatch(build(model), Fish(0.7, model=model if follows else None))
    batches = make_batches(torch.Generator().manual_seed(2), 9)
    for start in range(0, 9, 3):
        report = optimizer.meta_step(lambda b: loss_of(model, b), batches[start : start + 3])
        losses = [oracle.step(lambda m, b=b: loss_of(m, b)) for b in batches[start : start + 3]]
        oracle.interpolate()
        assert_same_model(model, oracle.model, rtol=1e-9)
        assert_same_state(optimizer.optimizer.state_dict()["state"], oracle.optimizer_state, rtol=1e-8)
        torch.testing.assert_close(report.losses, torch.stack(losses).detach())
        assert report.losses.shape == (3,)
        assert report.inner_product is report.cosine is report.grad_norms is None


def test_two_parameters_on_the_same_storage():
    """Tied by storage, not by being the same object: what is walked twice is interpolated once."""
    first = nn.Parameter(torch.ones(3))
    second = nn.Parameter(first.detach())
    assert second.data_ptr() == first.data_ptr()
    optimizer = GradMatch(torch.optim.SGD([first, second], lr=0.5), Fish(0.25, inner_steps=1))
    (first + second).sum().backward()
    optimizer.step()
    assert first.tolist() == second.tolist() == [1.0 - 0.25 * 2 * 0.5] * 3


# ------------------------------------------------------------------------------------- its direction, for the theorem


def quartic_losses(generator: torch.Generator, domains: int, size: int, scale: float = 1.0) -> list[Any]:
    """Smooth losses with third derivatives, each with its own data; curvature grows with the square of the scale."""
    data = [scale * torch.randn(6, size, generator=generator, dtype=torch.float64) for _ in range(domains)]
    targets = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(domains)]
    return [
        lambda theta, x=x, y=y: (torch.tanh(x @ theta) - y).square().mean() for x, y in zip(data, targets, strict=True)
    ]


def expected_fish_direction(losses: list[Any], theta: Tensor, alpha: float) -> Tensor:
    """(theta - theta~) / (alpha S) averaged over all orders of the domains, through the public API."""
    directions = []
    for order in itertools.permutations(losses):
        parameter = nn.Parameter(theta.clone())
        optimizer = GradMatch(torch.optim.SGD([parameter], lr=alpha), Fish(meta_lr=1.0))
        optimizer.meta_step(lambda loss, p=parameter: loss(p), order)
        directions.append((theta - parameter.detach()) / (alpha * len(losses)))
    return torch.stack(directions).mean(dim=0)


# ------------------------------------------------------------------------------------------------------ tracking


@pytest.mark.parametrize("manual", [False, True], ids=["meta_step", "loop"])
def test_tracked_alignment_is_that_of_the_inner_gradients(manual: bool):
    model = FeatureNet(torch.Generator().manual_seed(0))
    optimizer = GradMatch(sgd(model), Fish(0.5, track_alignment=True))
    gradients: list[Tensor] = []

    def keep(*_: Any) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        gradients.append(torch.cat([g.reshape(-1) for g in grads]))

    optimizer.register_step_pre_hook(keep)
    for batches in (make_batches(torch.Generator().manual_seed(s), 4) for s in range(2)):
        gradients.clear()
        if manual:
            for batch in batches:
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
            optimizer.interpolate()
            report = optimizer.last_meta_step
            assert report.losses is None
        else:
            report = optimizer.meta_step(lambda b: loss_of(model, b), batches)
            assert optimizer.last_meta_step is report
        torch.testing.assert_close(report.inner_product, mean_pairwise_inner_product(gradients))
        torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients))
        torch.testing.assert_close(report.grad_norms, torch.stack([g.norm() for g in gradients]))


def test_tracking_changes_nothing_and_measures_closures_once():
    results = []
    for track in (False, True):
        model = FeatureNet(torch.Generator().manual_seed(0))
        optimizer = GradMatch(lbfgs(model), Fish(0.5, inner_steps=2, track_alignment=track))
        for batch in make_batches(torch.Generator().manual_seed(1), 2):
            optimizer.step(closure_of(optimizer, model, batch))
        results.append(model.state_dict())
    assert_identical(results[1], results[0])
    assert optimizer.last_meta_step.grad_norms.shape == (2,)


def test_a_failed_step_leaves_no_half_measured_alignment():
    model = nn.Linear(2, 1)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=2, track_alignment=True))

    def fail_once(*_: Any) -> None:
        handle.remove()
        raise RuntimeError("out of memory")

    handle = optimizer.optimizer.register_step_pre_hook(fail_once)
    model(torch.ones(3, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.inner_step == 0
    optimizer.step()
    optimizer.step()
    assert optimizer.inner_step == 0
    assert optimizer.last_meta_step.inner_product is None  # three gradients were measured for two steps
    optimizer.step()
    optimizer.step()
    assert optimizer.last_meta_step.inner_product is not None


# ------------------------------------------------------------------------------------------------------ precision


def test_meta_dtype_keeps_what_bfloat16_would_lose():
    """A meta_lr so small that every single interpolation rounds away in bf16 still adds up in fp32."""

    def train(meta_dtype: torch.dtype | None) -> float:
        parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = GradMatch(torch.optim.SGD([parameter], lr=0.0625), Fish(0.01, inner_steps=1, meta_dtype=meta_dtype))
        for _ in range(400):
            optimizer.zero_grad()
            parameter.sum().backward()
            optimizer.step()
        return float(parameter.detach().mean())

    assert train(None) == 1.0
    assert train(torch.float32) == pytest.approx(1.0 - 400 * 0.01 * 0.0625, abs=0.01)


def test_meta_dtype_never_narrows():
    parameter = nn.Parameter(torch.full((1,), 1 + 1e-12, dtype=torch.float64))
    optimizer = GradMatch(torch.optim.SGD([parameter], lr=0.0), Fish(0.5, meta_dtype=torch.float32))
    parameter.sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["gradmatch"]["slow_weights"][0].dtype == torch.float64
    optimizer.interpolate()
    assert parameter.item() == 1 + 1e-12


# ------------------------------------------------------------------------------------------------------ elsewhere


def test_steps_that_never_interpolate_warn_once():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(torch.optim.SGD([parameter], lr=1.0))
    parameter.grad = torch.ones(1)
    for _ in range(99):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"100 inner steps .* without an interpolation.*Fish\(inner_steps=S\)") as told:
        optimizer.step()
    assert told[0].filename == __file__
    for _ in range(150):  # a warning is an error here
        optimizer.step()
    optimizer.interpolate()
    assert parameter.item() == -125.0


def test_a_closure_is_evaluated_anew_once_the_optimizer_has_moved_the_parameters():
    """The gradient that ``meta_step`` has checked is that of the first call only if nothing moved before it."""

    class LooksAhead(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor]) -> Tensor:
            (parameter,) = self.param_groups[0]["params"]
            parameter += 1.0
            with torch.enable_grad():
                loss = closure()
            parameter -= 1.0
            super().step()
            return loss

    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(LooksAhead([parameter], lr=0.5), Fish(1.0))
    report = optimizer.meta_step(lambda target: (parameter - target).square().sum(), [3.0])
    assert report.losses.tolist() == [9.0]  # of the batch at the parameters as they were
    assert parameter.item() == 2.0  # by the gradient one ahead
