"""Settings of other code, as `docs/coming_from.md` translates them: the same update, to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from _networks import cross_entropy
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch

S = 3
Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()


def groups() -> list[Batches]:
    """Lists of one batch from each domain."""
    generator = torch.Generator().manual_seed(1)

    def batch(domain: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 4, generator=generator).double() + domain
        return x, torch.randint(2, (16,), generator=generator)

    return [[batch(domain) for domain in range(S)] for _ in range(4)]


def train(model: nn.Module, optimizer: Optimizer, batches: Batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()


def train_as_the_authors(model: nn.Module, meta_lr: float, meta_steps: int, *, reload_inner_optim: bool) -> None:
    """``train_fish`` in ``src/main.py`` of YugeTen/fish at 333efa2, without its data and its logging."""
    previous = None
    for group in groups():
        model_inner = copy.deepcopy(model)
        opt_inner = Adam(model_inner.parameters(), lr=1e-2, amsgrad=True)
        if previous is not None and reload_inner_optim:
            opt_inner.load_state_dict(previous)
        train(model_inner, opt_inner, group)
        previous = opt_inner.state_dict()
        slow, fast = model.state_dict(), model_inner.state_dict()
        model.load_state_dict({name: slow[name] + meta_lr / meta_steps * (fast[name] - slow[name]) for name in slow})


def train_as_reptile(model: nn.Module) -> None:
    """The batches of one task."""
    before = copy.deepcopy(model.state_dict())
    train(model, SGD(model.parameters(), lr=0.1), [group[0] for group in groups()])
    after = model.state_dict()
    model.load_state_dict({name: before[name] + (after[name] - before[name]) * 0.25 for name in before})


def train_as_lookahead(model: nn.Module) -> None:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    slow = [p.detach().clone() for p in model.parameters()]
    for group in groups():
        train(model, optimizer, group)
        with torch.no_grad():
            for p, held in zip(model.parameters(), slow, strict=True):
                held += 0.5 * (p - held)
                p.copy_(held)


EVERY_BATCH = list(chain.from_iterable(groups()))
CODES: dict[str, tuple[Callable[[nn.Module], None], Any, Batches, dict[str, Any]]] = {
    f"the authors', {reload_inner_optim=}": (
        partial(train_as_the_authors, meta_lr=0.3, meta_steps=S, reload_inner_optim=reload_inner_optim),
        partial(Adam, lr=1e-2, amsgrad=True),
        EVERY_BATCH,
        {"meta_lr": 0.3 / S, "inner_steps": S, "inner_state": "carry" if reload_inner_optim else "reset"},
    )
    for reload_inner_optim in (True, False)
} | {
    "Reptile": (
        train_as_reptile, partial(SGD, lr=0.1), [group[0] for group in groups()], {"meta_lr": 0.25, "inner_steps": 4}
    ),
    "Lookahead": (
        train_as_lookahead, partial(SGD, lr=0.1, momentum=0.9), EVERY_BATCH, {"inner_steps": S, "buffers": "latest"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_fish_is_their_loop(code: str):
    train_theirs, build, batches, settings = CODES[code]
    theirs, ours = network(), network()
    train_theirs(theirs)
    train(ours, GradMatch(build(ours.parameters()), Fish(model=ours, **settings)), batches)
    for (name, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if value.is_floating_point():
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13, msg=name)


def test_iga_of_domainbed_is_idgm_with_the_variance():
    """A sum over domains there, a mean here: gamma is S times the penalty."""
    model, ours, penalty = network(), network(), 0.7
    parameters, group = list(model.parameters()), groups()[0]
    losses = [cross_entropy(model, batch) for batch in group]
    grads = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in losses]
    mean_loss = torch.stack(losses).mean()
    mean_grad = torch.autograd.grad(mean_loss, parameters, retain_graph=True)
    spread = torch.stack([(g - m).pow(2).sum() for grad in grads for g, m in zip(grad, mean_grad, strict=True)]).sum()
    expected = torch.autograd.grad(mean_loss + penalty * spread, parameters)
    optimizer = GradMatch(SGD(ours.parameters(), lr=0.0), IDGM(ours, gamma=S * penalty))
    optimizer.meta_step(partial(cross_entropy, ours), group)
    for p, gradient in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
