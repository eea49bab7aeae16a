"""Fish: what the random sequences of ``test_stateful.py`` do not reach, and ``with optimizer.slow_weights():``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, snapshot, train
from _models import assert_identical, assert_same_model, assert_same_state, loss_of
from _reference import ReferenceFish, mean_pairwise_cosine, mean_pairwise_inner_product
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from torch_gradmatch import Fish, GradMatch


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def lbfgs(model: nn.Module) -> Optimizer:
    return LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


@pytest.mark.parametrize(("build", "follows"), [(lbfgs, True), (sgd, False)], ids=["LBFGS", "SGD without model"])
def test_meta_step_is_the_manual_loop(build: Callable[[nn.Module], Optimizer], follows: bool):
    """Without a model buffers keep their latest value."""
    model = feature_net()
    oracle = ReferenceFish(copy.deepcopy(model), build, 0.7, buffers="interpolate" if follows else "latest")
    optimizer = GradMatch(build(model), Fish(0.7, model=model if follows else None))
    for seed in range(3):
        report = optimizer.meta_step(partial(loss_of, model), batches(3, seed))
        losses = [oracle.step(lambda m, b=b: loss_of(m, b)) for b in batches(3, seed)]
        oracle.interpolate()
        assert_same_model(model, oracle.model, rtol=1e-9)
        assert_same_state(optimizer.optimizer.state_dict()["state"], oracle.optimizer_state, rtol=1e-8)
        torch.testing.assert_close(report.losses, torch.stack(losses).detach())
        assert report.inner_product is report.cosine is report.grad_norms is None


@pytest.mark.parametrize("manual", [False, True], ids=["meta_step", "loop"])
def test_tracked_alignment_is_that_of_the_inner_gradients(manual: bool):
    model = feature_net()
    optimizer = GradMatch(sgd(model), Fish(0.5, track_alignment=True))
    gradients: list[Tensor] = []

    def keep(*_: Any) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        gradients.append(torch.cat([g.reshape(-1) for g in grads]))

    optimizer.register_step_pre_hook(keep)
    for seed in range(2):
        gradients.clear()
        if manual:
            train(model, optimizer, batches(4, seed))
            optimizer.interpolate()
        else:
            optimizer.meta_step(partial(loss_of, model), batches(4, seed))
        report = optimizer.last_meta_step
        assert (report.losses is None) is manual
        torch.testing.assert_close(report.inner_product, mean_pairwise_inner_product(gradients))
        torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients))
        torch.testing.assert_close(report.grad_norms, torch.stack([g.norm() for g in gradients]))


def test_a_failed_step_leaves_no_half_measured_alignment():
    model = nn.Linear(2, 1)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=2, track_alignment=True))

    def fail_once(*_: Any) -> None:
        handle.remove()
        raise MemoryError

    handle = optimizer.optimizer.register_step_pre_hook(fail_once)
    model(torch.ones(3, 2)).sum().backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    assert optimizer.inner_step == 0
    for is_measured in (False, True):  # at first three gradients for two steps
        optimizer.step()
        optimizer.step()
        assert optimizer.inner_step == 0
        assert (optimizer.last_meta_step.inner_product is not None) is is_measured


@pytest.mark.parametrize(("meta_dtype", "lost"), [(None, 0.0), (torch.float32, 400 * 0.01 * 0.0625)], ids=str)
def test_meta_dtype_keeps_what_bfloat16_would_lose(meta_dtype: torch.dtype | None, lost: float):
    """A meta_lr so small that every single interpolation rounds away in bf16 still adds up in fp32."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = GradMatch(SGD([parameter], lr=0.0625), Fish(0.01, inner_steps=1, meta_dtype=meta_dtype))
    for _ in range(400):
        optimizer.zero_grad()
        parameter.sum().backward()
        optimizer.step()
    assert float(parameter.detach().mean()) == pytest.approx(1.0 - lost, abs=0.01 if lost else 0.0)


def test_meta_dtype_never_narrows():
    parameter = nn.Parameter(torch.full((1,), 1 + 1e-12, dtype=torch.float64))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, meta_dtype=torch.float32))
    parameter.sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["gradmatch"]["slow_weights"][0].dtype == torch.float64
    optimizer.interpolate()
    assert parameter.item() == 1 + 1e-12


def test_steps_that_never_interpolate_warn_once():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(SGD([parameter], lr=1.0))
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


class LooksAhead(SGD):
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        (parameter,) = self.param_groups[0]["params"]
        parameter += 1.0
        with torch.enable_grad():
            loss = closure()
        parameter -= 1.0
        super().step()
        return loss


def test_a_closure_is_evaluated_anew_once_the_optimizer_has_moved_the_parameters():
    """The gradient that ``meta_step`` has checked is that of the first call only if nothing moved before it."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(LooksAhead([parameter], lr=0.5), Fish(1.0))
    report = optimizer.meta_step(lambda target: (parameter - target).square().sum(), [3.0])
    assert report.losses.tolist() == [9.0]  # of the batch at the parameters as they were
    assert parameter.item() == 2.0  # by the gradient one ahead


SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (torch.float64, {}),
    "reset, tracked": (torch.float64, {"inner_state": "reset", "track_alignment": True}),
    "buffers keep the latest": (torch.float64, {"buffers": "latest"}),
    "bf16 with fp32 slow weights": (torch.bfloat16, {"meta_dtype": torch.float32}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_block_of_slow_weights_shows_them_and_leaves_no_trace(case: str):
    """Four inner steps in a loop. A run with blocks everywhere is the run without, bit for bit."""
    dtype, settings = SETTINGS[case]
    steps = [(x.to(dtype), y.to(dtype), domain) for x, y, domain in batches(15)]
    runs = []
    for looks in (False, True):
        model = feature_net().to(dtype)
        optimizer = GradMatch(Adam(model.parameters(), lr=0.05), Fish(0.3, inner_steps=4, model=model, **settings))
        for number, batch in enumerate(steps):
            if optimizer.inner_step == 0:
                slow = copy.deepcopy(model.state_dict())
            train(model, optimizer, [batch])
            if not looks or optimizer.inner_step == 0:
                continue  # there what a block does stays
            fast = snapshot(model, optimizer)
            with optimizer.slow_weights():
                assert_identical(model.state_dict(), slow)
                loss_of(model, steps[number - 1])  # moves buffers
                with torch.no_grad():
                    model.out.weight.fill_(7.0)  # lost
            assert_identical(snapshot(model, optimizer), fast)
        runs.append(snapshot(model, optimizer))
    assert_identical(runs[1], runs[0])


def in_the_middle() -> tuple[nn.Module, GradMatch[Fish]]:
    model = feature_net()
    optimizer = GradMatch(sgd(model), Fish(model=model))
    train(model, optimizer, batches(2))
    return model, optimizer


def test_an_exception_in_the_block_passes_and_the_fast_weights_are_back():
    """Also after a block in a block, which has nothing more to do."""
    model, optimizer = in_the_middle()
    slow, fast = feature_net().state_dict(), snapshot(model, optimizer)

    def nested() -> None:
        with optimizer.slow_weights():
            with optimizer.slow_weights():
                assert_identical(model.state_dict(), slow)
            assert_identical(model.state_dict(), slow)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nested()
    assert_identical(snapshot(model, optimizer), fast)
    train(model, optimizer, batches(1))
    assert optimizer.inner_step == 3


@pytest.mark.parametrize("call", ["step", "interpolate", "rollback", "meta_step", "state_dict", "load_state_dict"])
def test_what_the_block_cannot_do_right_is_refused_and_changes_nothing(call: str):
    model, optimizer = in_the_middle()
    before = snapshot(model, optimizer)
    arguments: Any = {"meta_step": (partial(loss_of, model), batches(2)), "load_state_dict": (before[1],)}
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=r"inside slow_weights\(\).*Leave the block first"):
        getattr(optimizer, call)(*arguments.get(call, ()))
    assert_identical(snapshot(model, optimizer), before)
