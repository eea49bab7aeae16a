"""Operations dispatched, views among them, do not grow with the number of parameters: an accelerator's launches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _operations import count
from torch import Tensor, nn

from torch_gradmatch.gradients.functional import functional_loss, idgm_grad

GAMMA = 0.1


def network(layers: int) -> nn.Sequential:
    """Three parameters and three buffers in each layer."""
    torch.manual_seed(0)
    parts = [(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*(module for layer in parts for module in layer))


def squared(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


def derivatives(model: nn.Module, batches: list[Tensor], way: str, vector: list[Tensor]) -> None:
    """Forward and backward passes as the engine needs them, by plain autograd, and nothing else."""
    leaves, loss = list(model.parameters()), squared(model)
    once = {"finite_difference": batches * 4, "kept": []}.get(way, batches[:-1])  # the last graph is kept from pass 1
    twice = {"finite_difference": [], "kept": [batches]}.get(way, [[x] for x in batches])
    for x in once:
        loss(x).backward()
        model.zero_grad()
    for group in twice:
        graphs = [torch.autograd.grad(loss(x), leaves, create_graph=True) for x in group]
        torch.autograd.grad([g for graph in graphs for g in graph], leaves, vector * len(group), allow_unused=True)


# Operations for each domain, beyond the derivatives themselves: with torch 2.13 21, 21, 49, 13 and 43.
OWN = {
    ("inner_product", "reverse"): 25,
    ("variance", "reverse"): 25,
    ("cosine", "reverse"): 52,
    ("inner_product", "kept"): 16,
    ("inner_product", "finite_difference"): 50,
}


@pytest.mark.parametrize(("agreement", "way"), OWN, ids=[f"{a}-{w}" for a, w in OWN])
def test_the_engines_own_operations(agreement: str, way: str):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3)]
    settings: dict[str, Any] = {"keep_graphs": True} if way == "kept" else {"hvp": way}
    own: dict[tuple[int, int], Counter[str]] = {}
    for layers, domains in itertools.product((4, 53), (2, 3)):
        model, some = network(layers), batches[:domains]
        params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        pure = functional_loss(model, squared(model))
        counts = count(partial(idgm_grad, pure, params, some, GAMMA, agreement, **settings, buffers=buffers))
        counts.subtract(count(partial(derivatives, model, some, way, [torch.ones_like(p) for p in params.values()])))
        own[layers, domains] = Counter({name: number for name, number in counts.items() if number})
    assert own[4, 2] == own[53, 2]
    assert own[4, 3] == own[53, 3]
    assert own[4, 3].total() - own[4, 2].total() <= OWN[agreement, way]
