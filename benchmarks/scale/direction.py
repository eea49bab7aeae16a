"""How far the mean of R walks is from the exact direction: random orders, and opposite pairs.

A smooth network (GELU) in float64 with one batch for each of S domains. With SGD of step alpha and ``meta_lr=1`` a
meta-iteration of Fish ends at the end of its walk; (theta - theta~) / (alpha S) less the mean gradient, averaged over R
walks in different orders, is compared with -gamma dGIP of the exact objective at gamma = ``fish_gamma(alpha, S)``, both
found by ``meta_step``. All walks have the same batches, so the order is all that differs. Walks are made one after the
other in one process and averaged, as ranks would do it; ``on_ranks`` shows with two real ones that it is the same.

Every draw has a network and data of its own, and ``WALKS`` walks of either kind; each R takes them in groups of R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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
        generator = torch.Generator().manual_seed(draw)
        torch.manual_seed(draw)
        layers = [nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)]
        self.model = nn.Sequential(*layers).double()
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

    def compare(self, found: Tensor, rate: float) -> tuple[float, float]:
        """Cosine with the exact direction beyond ERM, and relative error."""
        exact = fish_gamma(rate, DOMAINS) * self.beyond
        cosine = nn.functional.cosine_similarity(found, exact, dim=0)
        return float(cosine), float((found - exact).norm() / exact.norm())


def orders_of(draw: int) -> dict[str, list[list[int]]]:
    """Random orders; and as many of which every second is the one before in reverse."""
    generator = torch.Generator().manual_seed(1000 + draw)
    random = [torch.randperm(DOMAINS, generator=generator).tolist() for _ in range(WALKS)]
    halves = [torch.randperm(DOMAINS, generator=generator).tolist() for _ in range(WALKS // 2)]
    return {"random": random, "pairs": [order for half in halves for order in (half, half[::-1])]}


def measure(draws: int, told: Callable[..., object]) -> list[dict[str, Any]]:
    """Measure every number of walks at one alpha, one pair at several; the draws are dealt to the ranks."""
    rows: list[dict[str, Any]] = []
    for draw in range(dist.get_rank(), draws, dist.get_world_size()):
        problem, orders = Problem(draw), orders_of(draw)
        for kind, some in orders.items():
            walks = torch.stack([problem.walk(order, RATE) for order in some])
            for number in NUMBERS:
                if number == 1 and kind == "pairs":
                    continue
                found = [problem.compare(group.mean(0), RATE) for group in walks.split(number)]
                rows.append(row(draw, kind, number, RATE, found))
        for rate in RATES:
            walks = torch.stack([problem.walk(order, rate) for order in orders["pairs"][:4]])
            found = [problem.compare(group.mean(0), rate) for group in walks.split(2)]
            rows.append(row(draw, "one pair", 2, rate, found))
        told()
    return rows


def row(draw: int, kind: str, walks: int, rate: float, found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Cosine: mean over the groups of walks; error: root of the mean square, of which theory speaks."""
    cosines, errors = zip(*found, strict=True)
    error = mean(e * e for e in errors) ** 0.5
    return {"draw": draw, "orders": kind, "walks": walks, "rate": rate, "cosine": mean(cosines), "error": error}


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Slopes in log-log scale of the error over draws: against R in random orders, and against alpha of a pair."""

    def slope(kind: str, against: str) -> float:
        values = sorted({r[against] for r in rows if r["orders"] == kind})
        errors = [mean(r["error"] ** 2 for r in rows if (r["orders"], r[against]) == (kind, x)) ** 0.5 for x in values]
        return float(np.polyfit(np.log(values), np.log(errors), 1)[0])

    return {"random orders, by R": slope("random", "walks"), "a pair, by alpha": slope("one pair", "rate")}


def of_one_rank(told: Callable[..., object]) -> float:
    """Walk on two ranks in opposite orders; return how far their mean is from that of walks made one by one."""
    problem, (one, other) = Problem(0), orders_of(0)["pairs"][:2]
    expected = (problem.walk(one, RATE) + problem.walk(other, RATE)) / 2
    settings = {"inner_state": "reset", "model": problem.model, "process_group": dist.group.WORLD}
    found = problem.walk((one, other)[dist.get_rank()], RATE, **settings)
    if dist.get_rank() == 0:
        told()
    return float((found - expected).norm() / expected.norm())
