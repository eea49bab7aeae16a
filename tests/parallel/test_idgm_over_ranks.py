"""IDGM on several ranks: the direction of one process that has everything, the same bits on every rank."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import _spread as ranks
import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product, naive_idgm
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import IDGM, GradMatch, SmoothFish

AGREEMENTS = ("inner_product", "variance", "cosine")
HVPS = {"reverse": 1e-12, "forward": 1e-12, "finite_difference": 1e-5}
NETWORKS = ("batch_norm", "transformer", "tied")
COUNTS = (1, 3, 1)  # domains of each rank
GAMMA = 0.3
CASES = [
    *itertools.product(NETWORKS, ["variance"], HVPS),
    ("batch_norm", "inner_product", "reverse"),
    ("batch_norm", "cosine", "reverse"),
    ("tied", "variance", "kept"),
]


def by(model: nn.Module, optimizer: Any, gamma: float | None = GAMMA, **settings: Any) -> GradMatch[IDGM]:
    return GradMatch(optimizer, IDGM(model, gamma, **ranks.world(**settings)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# --------------------------------------------------------------------------------------------------------------- parity


def one_step(name: str, batches: list[ranks.Batch], **settings: Any) -> Any:
    model = ranks.build(name)
    report = by(model, sgd(model), **settings).meta_step(partial(ranks.loss_of, model), batches)
    found = vars(report)
    found |= {"gradients": ranks.gradients_of(model), "buffers": ranks.buffers_of(model)}
    return {key: value for key, value in found.items() if value is not None}


def share(domains: list[ranks.Batch], rank: int) -> list[ranks.Batch]:
    """One rank's of the domains."""
    first = sum(COUNTS[:rank])
    return domains[first : first + COUNTS[rank]]


def steps() -> dict[Any, Any]:
    found, batches = {}, share(ranks.domain_batches(5, 1), dist.get_rank())
    for name, agreement, hvp in CASES:
        chosen = {"keep_graphs": True} if hvp == "kept" else {"hvp": hvp}
        found[name, agreement, hvp] = one_step(name, batches, agreement=agreement, track_alignment=True, **chosen)
    found["by strength"] = one_step("batch_norm", batches, gamma=None)
    return found


def test_ranks_with_some_domains_each_find_what_one_process_finds():
    everywhere = on_ranks(3, steps)
    assert all(ranks.same(everywhere[0], other) for other in everywhere)
    domains = ranks.domain_batches(5, 1)
    by_strength, model = everywhere[0].pop("by strength"), ranks.build("batch_norm")
    gamma = GradMatch(sgd(model), IDGM(model)).meta_step(partial(ranks.loss_of, model), domains).gamma
    assert by_strength["gamma"] == pytest.approx(gamma, rel=1e-9)
    torch.testing.assert_close(by_strength["gradients"], ranks.gradients_of(model))
    for (name, agreement, hvp), found in everywhere[0].items():
        check(found, name, agreement, [partial(ranks.loss_of, batch=batch) for batch in domains], HVPS.get(hvp, 1e-12))
        left = []
        for rank in range(3):
            model = ranks.build(name)
            for batch in share(domains, rank):
                ranks.loss_of(model, batch)
            left.append(ranks.buffers_of(model))
        torch.testing.assert_close(found["buffers"], ranks.mean_of_buffers(left))


def check(
    found: dict[str, Any], name: str, agreement: str, losses: list[Callable[..., Tensor]], rounding: float
) -> None:
    """Against plain autograd in this process."""
    model = ranks.build(name)
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = naive_idgm(parameters, [partial(f, model) for f in losses], GAMMA, agreement)[1]
        values = [f(model) for f in losses]
        gradients = [torch.autograd.grad(value, parameters) for value in values]
    vectors = [torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]
    flat, wanted = (torch.cat([g.reshape(-1) for g in gs]) for gs in (found["gradients"], expected))
    assert float((flat - wanted).norm() / wanted.norm()) <= rounding, (name, agreement)
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(found["losses"], torch.stack(values).detach(), **close)
    torch.testing.assert_close(found["inner_product"], mean_pairwise_inner_product(vectors), **close)
    torch.testing.assert_close(found["cosine"], mean_pairwise_cosine(vectors), **close)
    torch.testing.assert_close(found["grad_norms"], torch.stack([v.norm() for v in vectors]), **close)


# ---------------------------------------------------------------------------------------------------------- collectives


class Remembering(nn.Module):
    """A large buffer that never moves, one in half precision that does, and one that moves on one rank only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("still", torch.randn(10_000))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.bfloat16))
        self.register_buffer("here", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean(dim=0).to(torch.bfloat16)
        self.here += dist.get_rank()
        return (torch.tanh(x @ self.weight)).square().mean()


def buffers_that_move(method: str) -> Any:
    torch.manual_seed(0)
    model = Remembering()
    chosen: Any = IDGM(model, GAMMA, **ranks.world())
    if method != "IDGM":
        chosen = SmoothFish(1.0, 0.1, model, **ranks.world(parallel=method))
    optimizer = GradMatch(sgd(model), chosen)
    batches = [torch.randn(5, 4, dtype=torch.float64) + dist.get_rank() for _ in range(2)]
    with ranks.Collectives() as collectives:
        optimizer.meta_step(model, batches)
    return collectives.reductions(), ranks.buffers_of(model)


@pytest.mark.parametrize("method", ["IDGM", "walks", "data"])
def test_only_buffers_that_moved_are_reduced_and_in_their_own_dtype(method: str):
    everywhere = on_ranks(2, buffers_that_move, method)
    assert ranks.same(*everywhere)
    reductions, buffers = everywhere[0]
    assert reductions[-2:] == [4 * 2, 3 * 4]
    assert max(reductions) < 1000
    assert buffers["here"].tolist() == [1.0] * 3  # the mean of 0 and 2
    assert buffers["seen"].dtype == torch.bfloat16
    assert bool(buffers["seen"].any())


# --------------------------------------------------------------------------------------------------------------- errors


def refusals() -> dict[str, str]:
    plain = ranks.build("smooth")
    batches = ranks.domain_batches(2, dist.get_rank())
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    chosen: dict[str, dict[str, Any]] = {
        "function": {"agreement": lambda gradients: gradients[0]["0.bias"].square().sum()},
        "pairs": {"track_alignment": "pairs"},
        "one pass": {"one_pass": True},
        "one domain": {"parallel": "walks"},
    }
    found = {
        name: ranks.error_of(lambda settings=settings: by(plain, sgd(plain), **settings))
        for name, settings in chosen.items()
    }
    optimizer = by(plain, sgd(plain))
    optimizer.method.one_pass = True
    found["one pass later"] = ranks.error_of(optimizer.meta_step, partial(ranks.loss_of, plain), batches)
    before = copy.deepcopy(plain.state_dict())
    optimizer = by(plain, sgd(plain), parallel="data")
    ddp = DistributedDataParallel(plain)
    found["ddp unseen"] = ranks.error_of(optimizer.meta_step, partial(ranks.loss_of, ddp), batches)
    assert ranks.same(before, plain.state_dict())
    for name, method in {
        "ddp": IDGM(ddp, GAMMA),
        "ddp by domains": IDGM(ddp, GAMMA, **ranks.world()),
        "ddp by walks": SmoothFish(1.0, 0.1, model=ddp, **ranks.world()),
        "ddp alone": IDGM(ddp, GAMMA, process_group=alone, parallel="data"),
    }.items():
        found[name] = ranks.error_of(lambda method=method: GradMatch(sgd(plain), method))
    inside = FullyShardedDataParallel(ranks.build("smooth"), device_id=torch.device("cpu"), use_orig_params=True)
    found["fsdp1"] = ranks.error_of(lambda: GradMatch(sgd(inside), SmoothFish(1.0, 0.1, model=inside)))
    return found


def test_what_cannot_be_shared_is_refused():
    for found in on_ranks(2, refusals):
        assert "parallel='data'" in found["function"]
        assert "track_alignment='pairs' needs" in found["pairs"]
        assert "one_pass=True needs the gradients of all domains" in found["one pass"]
        assert "parallel='data'" in found["one pass"]
        assert found["one pass"] == found["one pass later"]
        assert "parallel should be one of" in found["one domain"]
        assert "gradient of parameter '0.weight'" in found["ddp unseen"]
        assert "DistributedDataParallel (process_group=..., parallel='data'" in found["ddp unseen"]
        assert "IDGM(..., process_group=torch.distributed.group.WORLD, parallel='data')" in found["ddp"]
        for name in ("ddp by domains", "ddp by walks"):
            assert "pass and call the plain module" in found[name]
        assert "if the model's process group is another one, that" in found["ddp alone"]
        assert "use torch.distributed.fsdp.fully_shard" in found["fsdp1"]


def copied_and_named() -> Any:
    model = ranks.build("smooth")
    optimizer = by(model, sgd(model))
    rank = dist.get_rank()
    named = {f"{rank}{number}": batch for number, batch in enumerate(ranks.domain_batches(1 + rank, rank))}
    domains = optimizer.meta_step(partial(ranks.loss_of, model), named).domains
    _, duplicate = copy.deepcopy((model, optimizer))
    assert duplicate.method.process_group is optimizer.method.process_group
    assert "process_group='2 ranks', parallel='domains'" in repr(optimizer.method)
    duplicate.meta_step(partial(ranks.loss_of, duplicate.method.model), ranks.domain_batches(1, rank))
    return domains, ranks.error_of(pickle.dumps, optimizer), ranks.gradients_of(duplicate.method.model)


def test_a_report_names_the_domains_of_all_ranks_and_a_copy_trains_among_the_same():
    everywhere = on_ranks(2, copied_and_named)
    assert ranks.same(*everywhere)
    domains, pickling, _ = everywhere[0]
    assert domains == ("00", "10", "11")
    assert "with a process_group cannot be pickled" in pickling
