"""Training that diverges is an error in words; what only looks like it is not, and the advice is what helps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import assert_identical
from _second_order import METHODS, nothing_changes
from torch import Tensor, nn
from torch.amp import GradScaler

from torch_gradmatch import IDGM, GradMatch, SmoothFish


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def domains(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator, dtype=torch.float64) + i for i in range(count)]


def sgd(model: nn.Module, method: Any, lr: float = 0.01) -> GradMatch:
    return GradMatch(torch.optim.SGD(model.parameters(), lr=lr), method)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**40])
def test_a_first_scale_that_overflows_along_the_walk_is_lowered(scale: float):
    """The walk of SmoothFish at gamma 1 leaves fp16 with the gradients: a step to be skipped, and no divergence."""
    w = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(1.0, 0.1))
    scaler = GradScaler("cpu", init_scale=scale)
    skipped = 0
    while torch.equal(w.detach(), torch.ones(2)):
        optimizer.meta_step(lambda t: (w.half() * 4 * t).float().sum(), [1.0, 2.0], scaler=scaler)
        skipped += 1
        assert skipped < 60
    assert skipped > 1
    assert scaler.get_scale() < scale
    assert bool(w.isfinite().all())


HEALTHY: dict[str, Callable[[nn.Module], Any]] = {
    "inner_product": lambda m: IDGM(m, 0.1, "inner_product"),
    "inner_product, found gamma": lambda m: IDGM(m, agreement="inner_product"),
    "SmoothFish": lambda m: SmoothFish(2.0, 0.05, m),
}


@pytest.mark.parametrize("zero", [0.0, 1e-9])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_loss_about_zero_is_healthy(name: str, zero: float):
    """A loss has no origin: less a constant it has the same gradients."""
    data = domains()

    def trained(origins: list[Tensor | float]) -> dict[str, Tensor]:
        model = network()
        optimizer = sgd(model, HEALTHY[name](model))
        for _ in range(3):
            optimizer.meta_step(lambda i: model(data[i]).square().mean() - origins[i], range(3))
        return dict(model.state_dict())

    with torch.no_grad():
        at_start = [network()(x).square().mean() - zero for x in data]
    torch.testing.assert_close(trained(at_start), trained([0.0, 0.0, 0.0]))


@pytest.mark.parametrize("gamma", [90.0, 300.0])
def test_smooth_fish_that_diverges_says_so_as_idgm_does_and_nothing_changes(gamma: float):
    model, data = network(), domains()
    optimizer = GradMatch(torch.optim.AdamW(model.parameters(), lr=0.01), SmoothFish(gamma, 0.3, model))
    before: Any = None

    def train() -> None:
        nonlocal before
        for _ in range(300):
            before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
            optimizer.meta_step(lambda x: model(x).square().mean(), data)

    message = r"training diverges: the matching term is .*go back to a checkpoint.*Lower gamma "
    message += rf"\(it is {gamma:g}\) or inner_lr \(it is 0.3\)"
    with pytest.raises(RuntimeError, match=message):
        train()
    assert_identical((dict(model.state_dict()), optimizer.state_dict()), before)


@pytest.mark.parametrize("agreement", ["variance", "cosine"])
def test_a_second_derivative_that_is_not_finite_is_not_blamed_on_the_agreement(agreement: str):
    """The norm of a bias of zeros has a gradient and no second derivative."""
    model = network()
    nn.init.zeros_(model[2].bias)
    optimizer = sgd(model, IDGM(model, 0.1, agreement))
    with (
        nothing_changes(model, optimizer),
        pytest.raises(
            RuntimeError, match=r"no finite second derivative here \(norm\(\) or sqrt\(\) of zero\)"
        ) as caught,
    ):
        optimizer.meta_step(lambda x: model(x).square().mean() + model[2].bias.norm(), domains())
    assert "variance" not in str(caught.value)


@pytest.mark.parametrize("scaler", [None, GradScaler("cpu", init_scale=4.0)], ids=["plain", "scaler"])
@pytest.mark.parametrize("method", ["SmoothFish", "SmoothFish-symmetric"])
def test_a_warning_points_to_the_line_of_the_user(method: str, scaler: GradScaler | None):
    model = network()
    chosen = METHODS[method](model)
    chosen.inner_lr = 1e-17
    optimizer = sgd(model, chosen)
    with pytest.warns(UserWarning, match="SmoothFish matches nothing") as told:
        optimizer.meta_step(lambda x: model(x).square().mean(), domains(), scaler=scaler)
    assert told[0].filename == __file__
