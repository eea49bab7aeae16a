"""A small training by each method with the installed package, against loops that use nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

WEIGHT = 0.25  # a quarter of a difference is exact: then a product and a sum round alike, fused or not


def make_domains(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Three domains of one regression, each with a shift of its own."""
    generator = torch.Generator().manual_seed(0)
    domains = []
    for shift in (-1.0, 0.0, 1.0):
        x = torch.randn(64, 5, generator=generator, dtype=dtype) + shift
        noise = torch.randn(64, 1, generator=generator, dtype=dtype)
        domains.append((x, x[:, :1] - x[:, 1:2] + shift * x[:, 2:3] + 0.1 * noise))
    return domains


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def loss_of(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_fish_is_its_loop_bit_for_bit():
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), Fish(WEIGHT, inner_steps=3))
    inner = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        slow = copy.deepcopy(list(twin.parameters()))
        for batch in make_domains():
            for network, walk in ((model, optimizer), (twin, inner)):
                walk.zero_grad()
                loss_of(network)(batch).backward()
                walk.step()
        with torch.no_grad():
            for p, s in zip(twin.parameters(), slow, strict=True):
                p.copy_(s + WEIGHT * (p - s))
        assert same(model, twin)


def test_idgm_is_its_objective():
    domains, model, gamma = make_domains(torch.float64), make_model(torch.float64), 0.01
    twin = copy.deepcopy(model)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.05), IDGM(model, gamma, "inner_product"))
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.meta_step(loss_of(model), domains)
        losses = [loss_of(twin)(batch) for batch in domains]
        gradients = [torch.autograd.grad(loss, list(twin.parameters()), create_graph=True) for loss in losses]
        flat = [torch.cat([g.flatten() for g in of_one]) for of_one in gradients]
        inner_product = (flat[0] @ flat[1] + flat[0] @ flat[2] + flat[1] @ flat[2]) / 3
        plain.zero_grad()
        (torch.stack(losses).mean() - gamma * inner_product).backward()
        plain.step()
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-10, atol=1e-12)


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "Fish": lambda model: Fish(0.3, inner_steps=3, model=model),
    "IDGM": lambda model: IDGM(model, 1.0, "variance"),
    "SmoothFish": lambda model: SmoothFish(1.0, 0.05, model=model),
}


@pytest.mark.parametrize("method", METHODS)
def test_training_resumes_from_a_checkpoint_bit_for_bit(method: str, tmp_path: Path):
    def train(model: nn.Module, optimizer: GradMatch, first: int, last: int) -> None:
        domains = make_domains()
        for number in range(first, last):
            if method == "Fish":  # by single steps, so that it can be left in the middle of a walk
                optimizer.zero_grad()
                loss_of(model)(domains[number % 3]).backward()
                optimizer.step()
            else:
                optimizer.meta_step(loss_of(model), domains)

    (model, optimizer), (resumed, another) = (
        (model, GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), METHODS[method](model)))
        for model in (make_model(), make_model())
    )
    train(model, optimizer, 0, 7)  # under Fish the eighth would be the second step of a walk
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    train(model, optimizer, 7, 15)
    for each, state in zip((resumed, another), torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        each.load_state_dict(state)
    train(resumed, another, 7, 15)
    assert same(model, resumed)
