"""A small problem for functions of parameters: one vector, a few domains, and every agreement by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GAMMA = 0.3
AGREEMENTS = ["inner_product", "variance", "cosine", "own"]


def own_agreement(gradients: Any) -> Tensor:
    """Of any structure in the library, of flat vectors in the reference: minus the largest distance from the first."""
    flat = [torch.cat([t.reshape(-1) for t in torch.utils._pytree.tree_leaves(g)]) for g in gradients]
    return -torch.stack([(g - flat[0]).square().sum() for g in flat[1:]]).logsumexp(dim=0)


def phi_of(chosen: str) -> Any:
    return own_agreement if chosen == "own" else chosen


def regression(theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ theta) - y).square().mean()


def drawn(seed: int, domains: int, size: int = 4) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Parameters, and a batch of each domain."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(6, size + 1, generator=generator, dtype=torch.float64) for _ in range(domains)]
    batches = [(batch[:, :size], batch[:, size]) for batch in draw]
    return torch.randn(size, generator=generator, dtype=torch.float64), batches
