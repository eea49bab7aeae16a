"""Trying methods out leaves no trace; copies of optimizers step as their originals would."""

from __future__ import annotations

import copy
import inspect
import random
from contextlib import suppress
from typing import Any

import _networks as networks
import numpy as np
import pytest
import torch
from _models import assert_identical
from _networks import make
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch
from torch_gradmatch.evaluation.trial import Trial, copy_optimizer

DENSE_OPTIMIZERS = [
    value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer) and name not in ("Optimizer", "SparseAdam")
]


def quadratic(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2, bias=False).to(dtype)  # Muon takes matrices only
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 3, generator=generator))
    return model, torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)


def take_steps(optimizer: Optimizer, model: nn.Module, x: torch.Tensor, number: int = 2) -> None:
    for _ in range(number):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("kind", DENSE_OPTIMIZERS)
def test_a_copy_steps_as_the_original_and_leaves_it_alone(kind: type[Optimizer]):
    model, x = quadratic()
    original = kind(model.parameters(), lr=0.01)
    take_steps(original, model, x)
    begin = model.weight.detach().clone()
    state = copy.deepcopy(original.state_dict())
    copied = copy_optimizer(original)
    take_steps(copied, model, x)
    by_copy = model.weight.detach().clone()
    assert not torch.equal(by_copy, begin)
    assert_identical(original.state_dict(), state)
    with torch.no_grad():
        model.weight.copy_(begin)
    take_steps(original, model, x)
    assert torch.equal(model.weight, by_copy)


def test_a_copy_of_an_optimizer_that_wraps_another():
    lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    model, x = quadratic(torch.float32)
    original = lookahead(Adam(model.parameters(), lr=0.01), k=2)
    take_steps(original, model, x, 3)
    begin = model.weight.detach().clone()
    take_steps(copy_optimizer(original), model, x, 3)
    by_copy = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.copy_(begin)
    take_steps(original, model, x, 3)
    assert torch.equal(model.weight, by_copy)


def test_neither_hooks_nor_a_schedulers_count_come_along():
    model, x = quadratic()
    original = SGD(model.parameters(), lr=0.1)
    called = []
    original.register_step_pre_hook(lambda *_: called.append("before"))
    original.register_step_post_hook(lambda *_: called.append("after"))
    torch.optim.lr_scheduler.StepLR(original, 1)
    before = {k: v for k, v in vars(original).items() if k != "param_groups"}
    take_steps(copy_optimizer(original), model, x)
    assert called == []
    assert {k: v for k, v in vars(original).items() if k != "param_groups"} == before


def _dense(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient if gradient is None or gradient.layout == torch.strided else gradient.to_dense()


def state_of_everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Every tensor of model and optimizer, the random states, flags and hooks."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return copy.deepcopy({
        "parameters": {n: p.detach() for n, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": {n: _dense(p.grad) for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "identities": [id(t) for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))],
        "training": [module.training for module in model.modules()],
        "hooks": [
            [list(map(id, table)), list(map(id, table.values()))]
            for module in model.modules()
            for table in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks)
        ],
        "optimizer": optimizer.state_dict(),
        "attributes": sorted(vars(optimizer)),
        "torch": torch.get_rng_state(),
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "python": random.getstate(),
        "grad_mode": torch.is_grad_enabled(),
    })  # fmt: skip


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("build", networks.PLAIN + networks.WITHOUT_DIFFERENCES)
def test_leaving_puts_everything_back(build: Any, raises: bool):
    case = make(build)
    for p in case.model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer = SGD(case.model.parameters(), lr=0.1)
    trial = Trial(case.model, lambda batch: case.loss(case.model, batch), case.batches, optimizer)
    before = state_of_everything(case.model, optimizer)
    with suppress(ZeroDivisionError), trial:
        trial.wrap(Fish(model=case.model)).meta_step(trial.loss_fn, trial.batches)
        assert any(not torch.equal(p, before["parameters"][n]) for n, p in case.model.named_parameters())
        case.model.eval()
        assert 1 // (not raises)
    assert_identical(state_of_everything(case.model, optimizer), before)


def test_somebody_elses_inner_loop_does_not_notice():
    case = make(networks.batch_norm_1d)
    own = GradMatch(SGD(case.model.parameters(), lr=0.1), Fish(0.5, model=case.model))
    twin = copy.deepcopy((case.model, own))
    for model, optimizer, tries in ((case.model, own, True), (*twin, False)):
        if tries:
            with Trial(model, lambda batch, m=model: case.loss(m, batch), case.batches, optimizer.optimizer) as trial:
                trial.wrap(Fish(model=model)).meta_step(trial.loss_fn, trial.batches)
        with torch.no_grad():
            model[1].running_mean.fill_(3.0)  # between two inner loops: the next one starts from here
        for batch in case.batches:
            optimizer.zero_grad()
            case.loss(model, batch).backward()
            optimizer.step()
        optimizer.interpolate()
    assert_identical(case.model.state_dict(), twin[0].state_dict())


def test_fixed_random_numbers_belong_to_the_domain():
    case = make(networks.dropout)
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with Trial(case.model, lambda batch: case.loss(case.model, batch), case.batches, optimizer) as trial:
        trial.fix_random_numbers()
        forward = [float(trial.loss_fn(batch).detach()) for batch in trial.batches]
        backward = [float(trial.loss_fn(batch).detach()) for batch in reversed(trial.batches)]
        free = [float(case.loss(case.model, batch).detach()) for batch in case.batches]
    assert forward == backward[::-1]
    assert forward != free
    assert trial.evaluations == 6


def test_the_mean_gradient_is_that_of_the_mean_loss():
    case = make(networks.batch_norm_eval)
    optimizer = SGD(case.model.parameters(), lr=0.1)
    mean = sum(case.loss(case.model, batch) for batch in case.batches) / len(case.batches)
    expected = torch.autograd.grad(mean, list(case.model.parameters()))
    with Trial(case.model, lambda batch: case.loss(case.model, batch), case.batches, optimizer) as trial:
        torch.testing.assert_close(trial.differentiate_mean_loss(), mean.detach())
        for p, gradient in zip(case.model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_idgm_needs_no_more_of_a_trial_than_a_loss_and_batches():
    case = make(networks.batch_norm_1d)
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with Trial(case.model, lambda batch: case.loss(case.model, batch), case.batches, optimizer) as trial:
        trial.wrap(IDGM(case.model, 0.1)).meta_step(trial.loss_fn, trial.batches)
        by_trial = [p.detach().clone() for p in case.model.parameters()]
    GradMatch(optimizer, IDGM(case.model, 0.1)).meta_step(lambda b: case.loss(case.model, b), case.batches)
    assert_identical([p.detach() for p in case.model.parameters()], by_trial)
