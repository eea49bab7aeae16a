"""How far the mean of R walks is from the exact direction: random orders, and opposite pairs.

A smooth network (GELU) in float64 with one batch for each of S domains. With SGD of step alpha and ``meta_lr=1`` a
meta-iteration of Fish ends at the end of its walk; (theta - theta~) / (alpha S) less the mean gradient, averaged over R
walks in different orders, is compared with -gamma dGIP of the exact objective at gamma = ``fish_gamma(alpha, S)``, both
found by ``meta_step``. All walks have the same batches, so the order is all that differs. Walks are made one after the
other in one process and averaged, as ranks would do it; ``of_two_ranks`` shows with two real ones that it is the same.
Every draw has a network and data of its own, and ``WALKS`` walks of either kind, taken in groups of R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks._models import mlp
from benchmarks.plots import distinct, of
from benchmarks.scale.plots import middle_of
from benchmarks.scale.ranks import bar
from torch_gradmatch import IDGM, Fish, GradMatch, fish_gamma

DOMAINS = 8
WALKS = 16
NUMBERS = [1, 2, 4, 8, 16]
RATE = 0.01  # alpha
RATES = [0.2, 0.1, 0.05, 0.025, 0.0125]  # of one opposite pair
SAMPLES = 16
WIDTH = 12


class Problem:
    """A network, S batches, and the two terms of the exact direction."""

    def __init__(self, draw: int) -> None:
        torch.manual_seed(draw)
        self.model = mlp(WIDTH, 16, 16, 3, activation=nn.GELU).double()
        generator = torch.Generator().manual_seed(draw)
        self.batches = []
        for _ in range(DOMAINS):
            x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
            x += torch.randn(WIDTH, generator=generator, dtype=torch.float64)
            self.batches.append((x, torch.randint(3, (SAMPLES,), generator=generator)))
        self.start = parameters_to_vector(self.model.parameters()).detach().clone()
        self.mean = self._exact(0.0)
        self.beyond = self._exact(1.0) - self.mean  # -dGIP

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def _exact(self, gamma: float) -> Tensor:
        method = IDGM(self.model, gamma, "inner_product")
        optimizer = GradMatch(torch.optim.SGD(self.model.parameters(), lr=0.0), method)
        optimizer.meta_step(self.loss, self.batches)
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def walk(self, order: Sequence[int], rate: float, **settings: Any) -> Tensor:
        """Walk once, from the start; return the direction beyond ERM's."""
        vector_to_parameters(self.start.clone(), self.model.parameters())
        optimizer = GradMatch(torch.optim.SGD(self.model.parameters(), lr=rate), Fish(1.0, **settings))
        optimizer.meta_step(self.loss, [self.batches[i] for i in order])
        end = parameters_to_vector(self.model.parameters()).detach()
        return (self.start - end) / (rate * DOMAINS) - self.mean

    def compare(self, kind: str, orders: Sequence[Sequence[int]], rate: float, *numbers: int) -> list[dict[str, Any]]:
        """Mean cosine of means of so many walks with the exact direction; root mean square of the relative error."""
        exact = fish_gamma(rate, DOMAINS) * self.beyond
        walks = torch.stack([self.walk(order, rate) for order in orders])
        rows = []
        for number in numbers:
            found = walks.unflatten(0, (-1, number)).mean(1)
            cosine = nn.functional.cosine_similarity(found, exact, dim=1).mean().item()
            error = ((found - exact).norm(dim=1) / exact.norm()).square().mean().sqrt().item()
            rows.append({"orders": kind, "walks": number, "rate": rate, "cosine": cosine, "error": error})
        return rows


def orders_of(draw: int) -> dict[str, list[list[int]]]:
    """Random orders; and as many of which every second is the one before in reverse."""
    generator = torch.Generator().manual_seed(1000 + draw)
    random = [torch.randperm(DOMAINS, generator=generator).tolist() for _ in range(WALKS)]
    halves = [torch.randperm(DOMAINS, generator=generator).tolist() for _ in range(WALKS // 2)]
    return {"random": random, "pairs": [order for half in halves for order in (half, half[::-1])]}


def measure(draws: int) -> list[dict[str, Any]]:
    """Measure every number of walks at one alpha, one pair at several; the draws are dealt to the ranks."""
    own: list[dict[str, Any]] = []
    for draw in bar(range(dist.get_rank(), draws, dist.get_world_size()), "direction"):
        problem, orders = Problem(draw), orders_of(draw)
        rows = problem.compare("random", orders["random"], RATE, *NUMBERS)
        rows += problem.compare("pairs", orders["pairs"], RATE, *NUMBERS[1:])
        for rate in RATES:
            rows += problem.compare("one pair", orders["pairs"][:4], rate, 2)
        own += [{"draw": draw, **row} for row in rows]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return sorted((row for part in parts for row in part), key=lambda row: row["draw"])


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Slopes in log-log scale of the error over draws: against R in random orders, and against alpha of a pair."""

    def slope(kind: str, against: str) -> float:
        some = of(rows, orders=kind)
        values = sorted(distinct(some, against))
        errors = [middle_of(of(some, **{against: x}), "error") for x in values]
        return float(np.polyfit(np.log(values), np.log(errors), 1)[0])

    return {"random orders, by R": slope("random", "walks"), "a pair, by alpha": slope("one pair", "rate")}


def of_two_ranks() -> float:
    """Walk on two ranks in opposite orders; return how far their mean is from that of walks made one by one."""
    problem, (one, other) = Problem(0), orders_of(0)["pairs"][:2]
    expected = (problem.walk(one, RATE) + problem.walk(other, RATE)) / 2
    settings = {"inner_state": "reset", "model": problem.model, "process_group": dist.group.WORLD}
    found = problem.walk((one, other)[dist.get_rank()], RATE, **settings)
    return float((found - expected).norm() / expected.norm())
