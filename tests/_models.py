"""Small networks with every feature that optimizers and buffers stumble over, and comparisons between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DOMAINS = 3


class FeatureNet(nn.Module):
    """BatchNorm, a module used twice (tied weights), frozen weights, a parameter without gradient, one per domain.

    Linear layers have no bias, so that all parameters but the two named below are matrices.
    """

    def __init__(self, generator: torch.Generator, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.frozen = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 2, bias=False)
        self.per_domain = nn.ParameterList([nn.Parameter(torch.ones(1, 2)) for _ in range(DOMAINS)])
        self.unused = nn.Parameter(torch.ones(2, 3))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.frozen.requires_grad_(False)
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() == 2 and p.numel() and p is not self.unused:
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        x = torch.tanh(self.norm(self.inp(x)))
        x = torch.tanh(self.tied(torch.tanh(self.tied(x))))
        x = self.out(torch.tanh(self.frozen(x)))
        return x * self.per_domain[domain]


def make_batches(
    generator: torch.Generator, count: int, *, dtype: torch.dtype = torch.float64
) -> list[tuple[Any, ...]]:
    """``count`` batches (x, y, domain), the domains in turn."""
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(5, 1, generator=generator, dtype=torch.float64).to(dtype),
            i % DOMAINS,
        )
        for i in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    x, y, domain = batch
    return (model(x, domain) - y).square().mean()


def small_network(seed: int = 0) -> nn.Module:
    """Matrices and biases, nothing else, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def domain_loss(model: nn.Module, domain: int) -> Tensor:
    """The loss of one domain's batch, always the same."""
    generator = torch.Generator().manual_seed(100 + domain)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return (model(x) - domain).square().mean()


def leaves(actual: Any, expected: Any, path: str = "state") -> Iterator[tuple[Any, Any, str]]:
    """What two nested states hold where, pair by pair; they have to be built alike."""
    if isinstance(expected, dict):
        assert set(actual) == set(expected), f"{path}: {sorted(map(str, actual))} != {sorted(map(str, expected))}"
        for key in expected:
            yield from leaves(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), path
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            yield from leaves(a, e, f"{path}[{i}]")
    else:
        yield actual, expected, path


def assert_same_model(actual: nn.Module, expected: nn.Module, *, rtol: float = 1e-10) -> None:
    """Parameters and buffers agree."""
    assert_same_state(actual.state_dict(), expected.state_dict(), rtol=rtol)


def assert_same_state(actual: Any, expected: Any, *, rtol: float = 1e-10) -> None:
    """Nested optimizer state agrees, entry by entry."""
    for a, e, path in leaves(actual, expected):
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e, rtol=rtol, atol=rtol, msg=lambda m, path=path: f"{path}: {m}")
        elif isinstance(e, float):
            assert abs(a - e) <= rtol * max(1.0, abs(e)), path
        else:
            assert a == e, path


def assert_identical(actual: Any, expected: Any, path: str = "state") -> None:
    """Nested state agrees bit for bit."""
    for a, e, place in leaves(actual, expected, path):
        if isinstance(e, Tensor):
            assert isinstance(a, Tensor), place
            assert a.dtype == e.dtype, place
            assert torch.equal(a, e), place
        else:
            assert a == e, place
