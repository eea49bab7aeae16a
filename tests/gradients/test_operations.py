"""Operations dispatched, views among them, do not grow with the number of parameters: an accelerator's launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _operations import count
from torch import Tensor, nn

from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.functional import functional_loss, idgm_grad

GAMMA = 0.1


def network(layers: int) -> nn.Sequential:
    """Three parameters and three buffers in each layer."""
    torch.manual_seed(0)
    parts = [(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*(module for layer in parts for module in layer))


@pytest.mark.parametrize("cosines", [False, True], ids=["sums", "cosines"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gradient_is_taken_in_by_few_operations(dtype: torch.dtype, cosines: bool):
    found = []
    for layers in (4, 53):
        gradients = [torch.randn_like(p, dtype=dtype) for p in network(layers).parameters()]
        assert len(gradients) == 3 * layers
        alignment = GradientAlignment(cosines=cosines)
        alignment.add(gradients)  # the first one makes the sums; from half precision, by one operation for each
        cast = len(gradients) * (cosines and dtype != torch.float32)
        found.append(count(partial(alignment.add, gradients)).total() - cast)
    assert found[0] == found[1]
    assert found[0] <= (11 if cosines else 6)


def test_it_is_told_in_few_operations():
    for layers in (4, 53):
        parameters = list(network(layers).parameters())
        alignment = GradientAlignment()
        for _ in range(3):
            alignment.add([torch.randn_like(p) for p in parameters])
        assert count(alignment.result).total() <= 20


def squared(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


def derivatives(model: nn.Module, batches: list[Tensor], hvp: str, *, keep_graphs: bool) -> Callable[[], None]:
    """Forward and backward passes as the engine needs them, by plain autograd, and nothing else."""
    leaves, loss = list(model.parameters()), squared(model)
    vector = [torch.randn_like(p) for p in leaves]

    def first(x: Tensor) -> None:
        loss(x).backward()
        model.zero_grad()

    def second(group: list[Tensor]) -> None:
        graphs = [torch.autograd.grad(loss(x), leaves, create_graph=True) for x in group]
        torch.autograd.grad([g for graph in graphs for g in graph], leaves, vector * len(group), allow_unused=True)

    def run() -> None:
        if hvp == "finite_difference":
            for x in batches * 4:
                first(x)
        elif keep_graphs:
            second(batches)
        else:
            for x in batches[:-1]:  # the last domain's graph is kept from the first pass
                first(x)
            for x in batches:
                second([x])

    return run


# Operations for each domain, beyond the derivatives themselves: with torch 2.13 21, 21, 49, 13 and 43.
OWN = {
    ("inner_product", "reverse"): 25,
    ("variance", "reverse"): 25,
    ("cosine", "reverse"): 52,
    ("inner_product", "kept"): 16,
    ("inner_product", "finite_difference"): 50,
}


@pytest.mark.parametrize(("agreement", "hvp"), OWN, ids=[f"{a}-{h}" for a, h in OWN])
def test_the_engines_own_operations(agreement: str, hvp: str):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3)]
    own: dict[tuple[int, int], Counter[str]] = {}
    way = {"keep_graphs": True} if hvp == "kept" else {"hvp": hvp}
    for layers in (4, 53):
        model = network(layers)
        pure = functional_loss(model, squared(model))

        def engine(domains: int, model: nn.Module = model, pure: Any = pure) -> None:
            params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
            idgm_grad(pure, params, batches[:domains], GAMMA, agreement, **way, buffers=buffers)

        for domains in (2, 3):
            counts = count(lambda n=domains: engine(n))
            kept = hvp == "kept"
            counts.subtract(count(derivatives(model, batches[:domains], hvp, keep_graphs=kept)))
            own[layers, domains] = Counter({name: number for name, number in counts.items() if number})
    assert own[4, 2] == own[53, 2]
    assert own[4, 3] == own[53, 3]
    assert own[4, 3].total() - own[4, 2].total() <= OWN[agreement, hvp]
