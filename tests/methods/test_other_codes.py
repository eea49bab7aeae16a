"""Settings of other code, as `docs/coming_from.md` translates them: the same update, to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from torch_gradmatch import IDGM, Fish, GradMatch

S = 3
criterion = nn.functional.cross_entropy


@pytest.fixture
def first() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def groups() -> list[list[Any]]:
    """Lists of one batch from each domain."""
    generator = torch.Generator().manual_seed(1)

    def batch(domain: int) -> Any:
        x = torch.randn(16, 4, generator=generator).double() + domain
        return x, torch.randint(2, (16,), generator=generator)

    return [[batch(domain) for domain in range(S)] for _ in range(4)]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if value.is_floating_point():
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13, msg=name)


def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)


def train_as_the_authors(
    model: nn.Module,
    inner: Callable[[Any], torch.optim.Optimizer],
    groups: list[list[Any]],
    meta_lr: float,
    meta_steps: int,
    *,
    reload_inner_optim: bool,
) -> None:
    """``train_fish`` in ``src/main.py`` of YugeTen/fish at 333efa2, without its data and its logging."""
    previous = None
    for group in groups:
        model_inner = copy.deepcopy(model)
        opt_inner = inner(model_inner.parameters())
        if previous is not None and reload_inner_optim:
            opt_inner.load_state_dict(previous)
        for x, y in group:
            opt_inner.zero_grad()
            criterion(model_inner(x), y).backward()
            opt_inner.step()
        previous = opt_inner.state_dict()
        slow, fast = model.state_dict(), model_inner.state_dict()
        model.load_state_dict({name: slow[name] + meta_lr / meta_steps * (fast[name] - slow[name]) for name in slow})


@pytest.mark.parametrize("reload_inner_optim", [True, False])
def test_the_authors_fish(first: nn.Module, groups: list[list[Any]], reload_inner_optim: bool):
    theirs, ours = copy.deepcopy(first), copy.deepcopy(first)
    train_as_the_authors(theirs, adam, groups, 0.3, S, reload_inner_optim=reload_inner_optim)
    method = Fish(0.3 / S, inner_steps=S, inner_state="carry" if reload_inner_optim else "reset", model=ours)
    optimizer = GradMatch(adam(ours.parameters()), method)
    for x, y in chain.from_iterable(groups):
        optimizer.zero_grad()
        criterion(ours(x), y).backward()
        optimizer.step()
    assert_same(ours, theirs)


def test_reptile(first: nn.Module, groups: list[list[Any]]):
    batches_of_one_task = [group[0] for group in groups]
    theirs, ours = copy.deepcopy(first), copy.deepcopy(first)
    inner = torch.optim.SGD(theirs.parameters(), lr=0.1)
    before = copy.deepcopy(theirs.state_dict())
    for x, y in batches_of_one_task:
        inner.zero_grad()
        criterion(theirs(x), y).backward()
        inner.step()
    after = theirs.state_dict()
    theirs.load_state_dict({name: before[name] + (after[name] - before[name]) * 0.25 for name in before})
    optimizer = GradMatch(torch.optim.SGD(ours.parameters(), lr=0.1), Fish(0.25, inner_steps=4, model=ours))
    for x, y in batches_of_one_task:
        optimizer.zero_grad()
        criterion(ours(x), y).backward()
        optimizer.step()
    assert_same(ours, theirs)


def test_iga_of_domainbed_is_idgm_with_the_variance(first: nn.Module, groups: list[list[Any]]):
    """A sum over domains there, a mean here: gamma is S times the penalty."""
    model, penalty = copy.deepcopy(first), 0.7
    losses = [criterion(model(x), y) for x, y in groups[0]]
    grads = [torch.autograd.grad(loss, list(model.parameters()), create_graph=True) for loss in losses]
    mean_loss = torch.stack(losses).mean()
    mean_grad = torch.autograd.grad(mean_loss, list(model.parameters()), retain_graph=True)
    spread = torch.stack([(g - m).pow(2).sum() for grad in grads for g, m in zip(grad, mean_grad, strict=True)]).sum()
    expected = torch.autograd.grad(mean_loss + penalty * spread, list(model.parameters()))
    ours = copy.deepcopy(first)
    optimizer = GradMatch(torch.optim.SGD(ours.parameters(), lr=0.0), IDGM(ours, gamma=S * penalty))
    optimizer.meta_step(lambda batch: criterion(ours(batch[0]), batch[1]), groups[0])
    for p, gradient in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_lookahead(first: nn.Module, groups: list[list[Any]]):
    theirs, ours = copy.deepcopy(first), copy.deepcopy(first)
    inner = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    slow = [p.detach().clone() for p in theirs.parameters()]
    optimizer = GradMatch(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), Fish(0.5, inner_steps=S))
    for count, (x, y) in enumerate(chain.from_iterable(groups), start=1):
        for model, one in ((theirs, inner), (ours, optimizer)):
            one.zero_grad()
            criterion(model(x), y).backward()
            one.step()
        if count % S == 0:
            with torch.no_grad():
                for p, held in zip(theirs.parameters(), slow, strict=True):
                    held += 0.5 * (p - held)
                    p.copy_(held)
    assert_same(ours, theirs)
