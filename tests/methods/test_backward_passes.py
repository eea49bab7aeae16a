"""What hangs on a backward pass counts under every method: hooks, and checkpoints that accumulate into ``.grad``.

Where a gradient has to be differentiated again (IDGM in reverse and forward mode) and cannot have it, the parameter is
refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _models import small_network
from _second_order import METHODS, nothing_changes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import GradMatch, MetaStep

SECOND = ["IDGM", "IDGM-kept", "IDGM-forward"]
FIRST = [method for method in METHODS if method not in SECOND]
Loss = Callable[[Tensor], Tensor]


def domains() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.5 * torch.randn(6, 3, generator=generator, dtype=torch.float64) + 0.2 * i for i in range(3)]


def wrap(method: str, model: nn.Module) -> GradMatch[Any]:
    return GradMatch(torch.optim.Adam(model.parameters(), lr=0.05), METHODS[method](model))


def checkpointed(model: nn.Sequential, *, reentrant: bool = True) -> Loss:
    """The embeddings frozen, and their outputs made to require a gradient, as PEFT has it."""
    return lambda x: (
        model[2](checkpoint(model[:2], x.clone().requires_grad_(), use_reentrant=reentrant)).square().mean()
    )


def mask() -> Tensor:
    """Freezes the first two rows of a weight."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]


def plain(model: nn.Sequential) -> Loss:
    return lambda x: model(x).square().mean()


def hooked(model: nn.Sequential) -> Loss:
    model[0].weight.register_hook(lambda gradient: gradient * mask())
    return plain(model)


def hooked_after(model: nn.Sequential) -> Loss:
    def masks(p: Tensor) -> None:
        p.grad.mul_(mask())

    model[0].weight.register_post_accumulate_grad_hook(masks)
    return plain(model)


Prepare = Callable[[nn.Sequential], Loss]
SAME: dict[str, tuple[Prepare, Prepare]] = {  # what accumulates by itself, and what does the same otherwise
    "checkpoint": (checkpointed, partial(checkpointed, reentrant=False)),
    "hook after accumulating": (hooked_after, hooked),
}


def trained(method: str, prepare: Prepare) -> tuple[dict[str, Tensor], MetaStep]:
    """Return a model's parameters after three meta-iterations, and what the last of them reports."""
    model = small_network()
    loss_fn, optimizer = prepare(model), wrap(method, model)
    for _ in range(3):
        report = optimizer.meta_step(loss_fn, domains())
    return dict(model.state_dict()), report


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("method", FIRST)
def test_what_accumulates_by_itself_trains_as_what_does_not(method: str, kind: str):
    (ours, report), (theirs, expected) = (trained(method, prepare) for prepare in SAME[kind])
    torch.testing.assert_close(ours, theirs)
    for name in ("losses", "inner_product", "grad_norms"):
        torch.testing.assert_close(getattr(report, name), getattr(expected, name))
    if kind == "hook after accumulating":
        still = (ours["0.weight"] == small_network()[0].weight).all(dim=1)
        assert still.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("method", "kind", "prepare"),
    [
        *((method, kind, SAME[kind][0]) for method in SECOND for kind in SAME),
        ("IDGM-forward", "hook of tensors", hooked),
    ],
)
def test_where_it_cannot_be_differentiated_again_it_is_refused_by_name(method: str, kind: str, prepare: Prepare):
    model = small_network()
    loss_fn, optimizer = prepare(model), wrap(method, model)
    message = r"parameter '0.weight' by backward"
    if kind == "checkpoint":
        message = r"parameter '0.weight' \(and of 1 more\) by backward.*use_reentrant=False works.*SmoothFish and Fish"
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.meta_step(loss_fn, domains())
    if kind != "hook of tensors" and method != "IDGM-forward":  # which takes neither kind of checkpoint
        model = small_network()
        wrap(method, model).meta_step(SAME[kind][1](model), domains())


@pytest.mark.parametrize("begins", ["after gamma 0", "after a resume"])
@pytest.mark.parametrize("method", SECOND)
def test_it_is_refused_wherever_second_derivatives_begin(method: str, begins: str):
    """Not in the first meta-iteration alone: this is the first that differentiates twice, here or in this process."""
    model = small_network()
    optimizer = wrap(method, model)
    if begins == "after gamma 0":
        strength, optimizer.method.gamma = optimizer.method.gamma, 0.0
        optimizer.meta_step(checkpointed(model), domains())
        optimizer.method.gamma = strength
    else:
        optimizer.meta_step(plain(model), domains())
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = wrap(method, model)
        optimizer.load_state_dict(state)
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=r"parameter '0.weight'"):
        optimizer.meta_step(checkpointed(model), domains())


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_that_steps_in_the_backward_pass_is_refused_and_nothing_has_moved(method: str):
    """It leaves no gradient to match."""
    model = small_network()
    optimizer = wrap(method, model)
    before = copy.deepcopy(model.state_dict())
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def steps(p: Tensor) -> None:
        inner[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(steps)
    with pytest.raises(ValueError, match=r"loss of batch 0 depends on none of the parameters|parameter '0.weight'"):
        optimizer.meta_step(plain(model), domains())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
