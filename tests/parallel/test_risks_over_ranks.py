"""Methods that take first derivatives, or second ones of a head, on two ranks: what one finds, and what all raise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _models import assert_identical
from _ranks import on_ranks
from _spread import (
    build,
    domain_batches,
    error_of,
    loss_of,
    loss_over,
    mine,
    spread,
    weights,
    world,
)
from torch import nn
from torch.optim import Adam

from torch_gradmatch import ERM, Aggregate, Fishr, GradMatch, GroupDRO, VREx

METHODS: dict[str, Callable[..., Any]] = {  # of a model and its head
    "ERM": lambda m, _, **s: ERM(model=m, **s),
    "VREx": lambda m, _, **s: VREx(0.7, model=m, **s),
    "GroupDRO": lambda m, _, **s: GroupDRO(0.5, model=m, **s),
    "Aggregate": lambda m, _, **s: Aggregate(lambda matrix: matrix.mean(0), model=m, **s),
    "Fishr": lambda m, head, **s: Fishr(m, head, 100.0, **s),
    "Fishr by strength": lambda m, head, **s: Fishr(m, head, **s),
}
every_method = pytest.mark.parametrize("name", METHODS)


def wrap(name: str, scheme: str = "one process") -> tuple[nn.Module, GradMatch[Any]]:
    """Fishr's head may be called once only, so there is no batch norm that would see one part at a time."""
    network: Any = build("smooth" if "Fishr" in name else "batch_norm")
    model = spread(scheme, network) if scheme in {"ddp", "fsdp"} else network
    method = METHODS[name](model, network[-1], **(world() if scheme == "data" else {}))
    return model, GradMatch(Adam(model.parameters(), lr=0.01), method)


def one_rank(scheme: str, name: str) -> Any:
    model, optimizer = wrap(name, scheme)
    for number in range(4):
        report = optimizer.meta_step(partial(loss_of, model), mine(domain_batches(3, number)))
    return weights(model), report.losses, report.gamma


@every_method
@pytest.mark.parametrize("scheme", ["ddp", "fsdp", "data"])
def test_on_two_ranks_is_what_one_process_finds(scheme: str, name: str):
    if scheme == "fsdp" and name == "Aggregate":
        assert all("needs whole gradients in one matrix" in error for error in on_ranks(2, sharded_aggregate))
        return
    model, optimizer = wrap(name)
    loss_fn = partial(loss_of, model) if "Fishr" in name else partial(loss_over, model, size=2)
    for number in range(4):
        report = optimizer.meta_step(loss_fn, domain_batches(3, number))
    everywhere = on_ranks(2, one_rank, scheme, name)
    for found, losses, gamma in everywhere:
        assert gamma == (None if report.gamma is None else pytest.approx(report.gamma, rel=1e-7))
        torch.testing.assert_close(losses, report.losses, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, weights(model), rtol=1e-8, atol=1e-9)
    assert_identical(everywhere[0][0], everywhere[1][0])


def sharded_aggregate() -> str:
    return error_of(wrap, "Aggregate", "fsdp")
