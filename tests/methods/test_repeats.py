"""Losses that are not the same when they are evaluated again: refused, with the cause and the ways out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _networks import mean_squared_error, regression, two_layers
from _operations import waits
from _second_order import GAMMA, nothing_changes, plain_autograd
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW
from torch_gradmatch.functional import functional_loss, idgm_grad

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.gradients.replay import check_repeats

TWICE: dict[str, Callable[[nn.Module], Any]] = {
    "IDGM": lambda m: IDGM(m, GAMMA),
    "IDGM, ignore": lambda m: IDGM(m, GAMMA, nonfinite="ignore"),
    "IDGM, forward": lambda m: IDGM(m, GAMMA, hvp="forward"),
    "IDGM, finite_difference": lambda m: IDGM(m, GAMMA, hvp="finite_difference"),
    "SmoothFish": lambda m: SmoothFish(2.0, 0.1, m),
    "SmoothFish, ignore": lambda m: SmoothFish(2.0, 0.1, m, nonfinite="ignore"),
    "SmoothFish, symmetric": lambda m: SmoothFish(GAMMA, 0.1, m, symmetric=True),
}
ONCE: dict[str, Callable[[nn.Module], Any]] = {
    "IDGM, kept": lambda m: IDGM(m, keep_graphs=True),
    "IDGM, one pass": lambda m: IDGM(m, one_pass=True),
    "SmoothFish, walk": lambda m: SmoothFish(1.0, 0.1, m),
    "SmoothFish, gamma 0": lambda m: SmoothFish(0.0, 0.1, m),
    "IDGM, gamma 0": lambda m: IDGM(m, 0.0),
    "Fish": lambda m: Fish(0.5, model=m),
}


class RunningClassWeights:
    """Cross entropy whose class weights are counted from the labels seen so far, as some people do."""

    def __init__(self) -> None:
        self.seen = torch.ones(3, dtype=torch.float64)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        labels = batch[1][:, 0].gt(0).long() + batch[1][:, 0].gt(1).long()
        self.seen += torch.bincount(labels, minlength=3)
        return functional.cross_entropy(model(batch[0]), labels, weight=self.seen.sum() / self.seen)


class Counting:
    """A weight that grows with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return mean_squared_error(model, batch) * (1 + 0.01 * self.calls)


STATEFUL = {"class weights": RunningClassWeights, "counter": Counting}


def three_classes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def wide_regression() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)) for _ in range(4)]


@pytest.mark.parametrize(
    ("method", "kind"), [(m, k) for m in TWICE for k in STATEFUL if k == "counter" or m in ("IDGM", "SmoothFish")]
)
def test_a_loss_that_is_not_the_same_twice_is_refused(method: str, kind: str):
    model, loss = three_classes(), STATEFUL[kind]()
    optimizer = GradMatch(AdamW(model.parameters()), TWICE[method](model))
    message = r"the loss of batch \d is not the same twice: .*class weights.*keep_graphs=True"
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.meta_step(lambda batch: loss(model, batch), wide_regression())


@pytest.mark.parametrize(("method", "kind"), [*((m, "counter") for m in ONCE), ("IDGM, kept", "class weights")])
def test_what_evaluates_each_loss_once_takes_it(method: str, kind: str):
    model, loss = three_classes(), STATEFUL[kind]()
    optimizer = GradMatch(AdamW(model.parameters()), ONCE[method](model))
    for _ in range(3):
        optimizer.meta_step(lambda batch: loss(model, batch), wide_regression())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_keep_graphs_is_right_with_class_weights():
    """The way out that the message names: against one graph of everything."""
    model, twin = three_classes(), three_classes()
    losses = RunningClassWeights(), RunningClassWeights()
    expected = plain_autograd(twin, losses[0], wide_regression())
    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), IDGM(model, GAMMA, "inner_product", keep_graphs=True))
    optimizer.meta_step(lambda batch: losses[1](model, batch), wide_regression())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected.direction[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "begins_at", "expected"),
    [
        ("IDGM", 2, 2),
        ("IDGM", 3, 3),
        ("IDGM, finite_difference", 3, 3),
        ("IDGM, ignore", 3, 4),
        ("SmoothFish", 2, 2),
        ("SmoothFish", 3, 4),
        ("SmoothFish, ignore", 3, 4),
        ("SmoothFish, symmetric", 3, 4),
    ],
)
def test_a_loss_that_begins_to_change_later(method: str, begins_at: int, expected: int):
    """IDGM looks in every meta-iteration; where each look costs something, in those number 1, 2, 4, 8 and so on."""
    model = three_classes()
    optimizer = GradMatch(AdamW(model.parameters()), TWICE[method](model))
    steady, changing = mean_squared_error, Counting()
    refused_at = None
    for number in range(1, 5):
        loss = steady if number < begins_at else changing
        try:
            optimizer.meta_step(lambda batch, loss=loss: loss(model, batch), wide_regression())
        except ValueError:
            refused_at = number
            break
    assert refused_at == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", TWICE)
def test_rounding_is_no_change(method: str, dtype: torch.dtype):
    """A loss with noise of one rounding, as kernels make that add up in another order each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.01), TWICE[method](model))
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = mean_squared_error(model, tuple(x.to(dtype) for x in batch))
        return value * (1 + torch.finfo(dtype).eps * (calls % 2))

    for _ in range(4):
        optimizer.meta_step(loss, wide_regression())


@pytest.mark.parametrize("way", ["reverse", "forward", "finite_difference", "keep_graphs", "one_pass"])
def test_the_pure_function_refuses_it_too(way: str):
    model, counting = three_classes(), Counting()
    pure = functional_loss(model, lambda batch: counting(model, batch))
    params = dict(model.named_parameters())

    def run(**settings: Any) -> Any:
        chosen = {way: True} if way in ("keep_graphs", "one_pass") else {"hvp": way}
        return idgm_grad(pure, params, wide_regression(), GAMMA, **chosen, buffers={}, **settings)

    if way in ("keep_graphs", "one_pass"):
        assert run().losses.isfinite().all()
        return
    with pytest.raises(ValueError, match="is not the same twice"):
        run()
    assert run(check=False).losses.isfinite().all()


@pytest.mark.parametrize(("check", "expected"), [(True, ["tolist"]), (False, [])])
def test_the_pure_function_waits_once_to_compare(check: bool, expected: list[str]):
    model = three_classes()
    pure = functional_loss(model, lambda batch: mean_squared_error(model, batch))
    with waits() as found:
        idgm_grad(pure, dict(model.named_parameters()), wide_regression(), GAMMA, buffers={}, check=check)
    assert found == expected


def test_a_scaled_loss_is_compared_as_it_is():
    model, counting = two_layers(), Counting()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    steady = mean_squared_error
    optimizer.meta_step(lambda batch: steady(model, batch), regression(7, 4), scaler)
    with pytest.raises(ValueError, match=r"not the same twice: \d\.\d+, and \d\.\d+ when"):
        optimizer.meta_step(lambda batch: counting(model, batch), regression(7, 4), scaler)


@pytest.mark.parametrize(
    ("losses", "again", "fails"),
    [
        ([1.0, 2.0], {}, False),
        ([1.0, 2.0], {0: 1.0, 1: 2.0}, False),
        ([1.0, 2.0], {0: 1.001}, False),
        ([1.0, 2.0], {1: 2.02}, True),
        ([1.0, 2.0], {1: float("nan")}, True),
        ([0.0, 0.0], {1: 0.0}, False),
        ([0.0, 0.0], {1: 1e-9}, True),
        ([0.0, -2.0], {0: 0.005}, False),  # small beside the others: rounding of logits
        ([float("inf"), 1.0], {0: float("inf")}, False),
    ],
)
def test_what_counts_as_a_change(losses: list[float], again: dict[int, float], fails: bool):
    second = [again.get(i, loss) for i, loss in enumerate(losses)]
    if fails:
        with pytest.raises(ValueError, match="not the same twice"):
            check_repeats(losses, second, 0.006)
    else:
        check_repeats(losses, second, 0.006)
