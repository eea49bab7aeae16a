"""A small training by each method with the installed package, against loops that use nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish, ops

Batch = tuple[Tensor, Tensor]

# A quarter of a difference is exact, so that a product and a sum round alike whether they are fused or not.
WEIGHT = 0.25
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def make_domains(dtype: torch.dtype = torch.float32) -> list[Batch]:
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


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def mean_loss(model: nn.Module, domains: list[Batch]) -> float:
    with torch.no_grad():
        return float(torch.stack([loss_of(model)(batch) for batch in domains]).mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 33, 100_003])
def test_the_interpolation_is_the_formula_bit_for_bit(pair: tuple[torch.dtype, torch.dtype], size: int):
    generator = torch.Generator().manual_seed(size)
    slow, fast = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for dtype in pair)
    wide = torch.float64 if slow.dtype == torch.float64 else torch.float32
    expected = (slow.to(wide) + WEIGHT * (fast.to(wide) - slow.to(wide))).to(slow.dtype)
    ops.interpolate_([slow], [fast], WEIGHT)
    assert torch.equal(slow, expected)
    assert torch.equal(fast, expected.to(fast.dtype))


def test_fish_is_its_loop_bit_for_bit_and_learns():
    domains, model = make_domains(), make_model()
    twin = copy.deepcopy(model)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), Fish(WEIGHT, inner_steps=3))
    inner = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    before = mean_loss(model, domains)
    for _ in range(40):
        slow = [p.detach().clone() for p in twin.parameters()]
        for batch in domains:
            for network, walk in ((model, optimizer), (twin, inner)):
                walk.zero_grad()
                loss_of(network)(batch).backward()
                walk.step()
        with torch.no_grad():
            for p, s in zip(twin.parameters(), slow, strict=True):
                p.copy_(s + WEIGHT * (p - s))
        assert same(model, twin)
    assert mean_loss(model, domains) < 0.7 * before


def test_idgm_is_its_objective_and_learns():
    domains, model = make_domains(torch.float64), make_model(torch.float64)
    twin, gamma = copy.deepcopy(model), 0.01
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.05), IDGM(model, gamma))
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    before = mean_loss(model, domains)
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
    assert mean_loss(model, domains) < 0.7 * before


def fish(model: nn.Module) -> GradMatch:
    return GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), Fish(0.3, inner_steps=3, model=model))


def idgm(model: nn.Module) -> GradMatch:
    return GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), IDGM(model, 1.0, "variance"))


def smooth_fish(model: nn.Module) -> GradMatch:
    return GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), SmoothFish(1.0, 0.05, model=model))


def steps(model: nn.Module, optimizer: GradMatch, first: int) -> Iterator[None]:
    """Fish by single steps, so that it can be left in the middle of a walk; the others by meta-iterations."""
    domains, number = make_domains(), first
    while True:
        if isinstance(optimizer.method, Fish):
            optimizer.zero_grad()
            loss_of(model)(domains[number % 3]).backward()
            optimizer.step()
        else:
            optimizer.meta_step(loss_of(model), domains)
        number += 1
        yield


@pytest.mark.parametrize("make", [fish, idgm, smooth_fish])
def test_training_resumes_from_a_checkpoint_bit_for_bit(make: Callable[[nn.Module], GradMatch], tmp_path: Path):
    model = make_model()
    optimizer = make(model)
    training = steps(model, optimizer, 0)
    for _ in range(7):  # under Fish the eighth would be the second step of a walk
        next(training)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    for _ in range(8):
        next(training)

    resumed = make_model()
    another = make(resumed)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    another.load_state_dict(checkpoint["optimizer"])
    training = steps(resumed, another, 7)
    for _ in range(8):
        next(training)
    assert same(model, resumed)
