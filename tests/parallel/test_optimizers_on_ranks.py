"""An optimizer that talks to other ranks by itself can be wrapped: ZeRO's."""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from _ranks import on_ranks
from _spread import Batch, build, distance, domain_batches, error_of, loss_of, loss_over, mine, same, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import Fish, GradMatch

with warnings.catch_warnings():  # of torch about torch.jit.script, which it uses there
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


def walk(model: nn.Module, optimizer: GradMatch[Fish], batches: list[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def from_rank_0(state: Any) -> Any:
    """What rank 0 would write to a file, read on every rank."""
    file = io.BytesIO()
    torch.save(state, file)
    sent = [file.getvalue()]
    dist.broadcast_object_list(sent, 0)
    return torch.load(io.BytesIO(sent[0]), weights_only=True)


def over_zero(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Save after some steps, load on both ranks, go on with both."""

    def make() -> tuple[nn.Module, GradMatch[Fish]]:
        model = DistributedDataParallel(build("smooth"))
        zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
        return model, GradMatch(zero, Fish(0.3, inner_steps=3, model=model))

    model, optimizer = make()
    batches = mine([batch for seed in range(3) for batch in domain_batches(3, seed)])
    walk(model, optimizer, batches[:steps])
    optimizer.consolidate_state_dict(0)
    refused = error_of(optimizer.state_dict)
    state = from_rank_0((model.state_dict(), optimizer.state_dict()) if dist.get_rank() == 0 else None)
    resumed_model, resumed = make()
    resumed_model.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert resumed.inner_step == optimizer.inner_step == steps % 3
    for one, its in ((model, optimizer), (resumed_model, resumed)):
        walk(one, its, batches[steps:])
    return weights(model), weights(resumed_model), refused


def test_the_state_that_zero_consolidates_loads_on_all_ranks():
    """Also in the middle of an inner loop; and the parameters are those of plain Adam on one process."""
    model = build("smooth")
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=0.01), Fish(0.3, model=model))
    for seed in range(3):
        optimizer.meta_step(partial(loss_over, model, size=2), domain_batches(3, seed))
    for steps in (3, 4):
        (first, resumed, refused), (last, resumed_there, refused_there) = on_ranks(2, over_zero, steps)
        assert same(first, last)
        assert same(resumed, first)
        assert same(resumed_there, first)
        assert distance(first, weights(model)) < 1e-9
        assert not refused
        assert "consolidate_state_dict" in refused_there
