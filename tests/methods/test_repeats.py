"""Losses that are not the same when they are evaluated again: refused, with the cause and the ways out."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from _networks import mean_squared_error, regression, two_layers
from _operations import waits
from _second_order import GAMMA, METHODS, gradient_of, nothing_changes, plain_autograd
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch_gradmatch.functional import functional_loss, idgm_grad

from torch_gradmatch import IDGM, GradMatch, SmoothFish
from torch_gradmatch.gradients.replay import check_repeats

TWICE: dict[str, Any] = {
    name: METHODS[name]
    for name in ("IDGM", "IDGM-forward", "IDGM-finite_difference", "SmoothFish", "SmoothFish-symmetric")
} | {
    "IDGM, ignore": lambda m: IDGM(m, GAMMA, nonfinite="ignore"),
    "SmoothFish, ignore": lambda m: SmoothFish(2.0, 0.1, m, nonfinite="ignore"),
}
ONCE: dict[str, Any] = {name: METHODS[name] for name in ("IDGM-kept", "SmoothFish-walk", "Fish")} | {
    "IDGM, one pass": lambda m: IDGM(m, one_pass=True),
    "SmoothFish, gamma 0": lambda m: SmoothFish(0.0, 0.1, m),
    "IDGM, gamma 0": lambda m: IDGM(m, 0.0),
}


class Counting:
    """A weight that grows with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return mean_squared_error(model, batch) * (1 + 0.01 * self.calls)


def network() -> nn.Module:
    torch.manual_seed(0)
    return two_layers()


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return regression(9, 4)


@pytest.mark.parametrize("method", TWICE)
def test_a_loss_that_is_not_the_same_twice_is_refused(method: str):
    model = network()
    optimizer = GradMatch(AdamW(model.parameters()), TWICE[method](model))
    message = (
        r"the loss of batch \d is not the same twice: .* loss_fn changes in place, class weights.*keep_graphs=True"
    )
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.meta_step(partial(Counting(), model), batches())


@pytest.mark.parametrize("method", ONCE)
def test_what_evaluates_each_loss_once_takes_it(method: str):
    """And the way out that the message names is right: against one graph of everything."""
    model, loss = network(), Counting()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), ONCE[method](model))
    for number in range(1, 4):
        optimizer.meta_step(partial(loss, model), batches())
        assert loss.calls == 3 * number
        if number == 1 and method == "IDGM-kept":
            expected = plain_autograd(network(), Counting(), batches(), agreement="variance").direction
            torch.testing.assert_close(gradient_of(model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "begins_at", "expected"),
    [
        ("IDGM", 2, 2),
        ("IDGM", 3, 3),
        ("IDGM-finite_difference", 3, 3),
        ("IDGM, ignore", 3, 4),
        ("SmoothFish", 2, 2),
        ("SmoothFish", 3, 4),
        ("SmoothFish, ignore", 3, 4),
        ("SmoothFish-symmetric", 3, 4),
    ],
)
def test_a_loss_that_begins_to_change_later(method: str, begins_at: int, expected: int):
    """IDGM looks in every meta-iteration; where each look costs something, in those number 1, 2, 4, 8 and so on."""
    model, changing = network(), Counting()
    optimizer = GradMatch(AdamW(model.parameters()), TWICE[method](model))
    for number in range(1, expected):
        optimizer.meta_step(partial(mean_squared_error if number < begins_at else changing, model), batches())
    with pytest.raises(ValueError, match="is not the same twice"):
        optimizer.meta_step(partial(changing, model), batches())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", TWICE)
def test_rounding_is_no_change(method: str, dtype: torch.dtype):
    """A loss with noise of one rounding, as kernels make that add up in another order each time."""
    model = network().to(dtype)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.01), TWICE[method](model))
    calls = 0

    def loss(batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = mean_squared_error(model, tuple(x.to(dtype) for x in batch))
        return value * (1 + torch.finfo(dtype).eps * (calls % 2))

    for _ in range(4):
        optimizer.meta_step(loss, batches())


def pure(loss: Any, **settings: Any) -> Any:
    model = network()
    function = functional_loss(model, partial(loss, model))
    return idgm_grad(function, dict(model.named_parameters()), batches(), GAMMA, buffers={}, **settings)


def test_the_pure_function_refuses_it_too_but_where_it_evaluates_once():
    for hvp in ("reverse", "forward", "finite_difference"):
        with pytest.raises(ValueError, match="is not the same twice"):
            pure(Counting(), hvp=hvp)
        assert pure(Counting(), hvp=hvp, check=False).losses.isfinite().all()
    for once in ("keep_graphs", "one_pass"):
        assert pure(Counting(), **{once: True}).losses.isfinite().all()


@pytest.mark.parametrize(("check", "expected"), [(True, ["tolist"]), (False, [])])
def test_the_pure_function_waits_once_to_compare(check: bool, expected: list[str]):
    with waits() as found:
        pure(mean_squared_error, check=check)
    assert found == expected


def test_a_scaled_loss_is_compared_as_it_is():
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA))
    optimizer.meta_step(partial(mean_squared_error, model), batches(), scaler)
    with pytest.raises(ValueError, match=r"not the same twice: \d\.\d+, and \d\.\d+ when"):
        optimizer.meta_step(partial(Counting(), model), batches(), scaler)


@pytest.mark.parametrize(
    ("losses", "again", "fails"),
    [
        ([1.0, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [1.001, 2.0], False),
        ([1.0, 2.0], [1.0, 2.02], True),
        ([1.0, 2.0], [1.0, float("nan")], True),
        ([0.0, 0.0], [0.0, 0.0], False),
        ([0.0, 0.0], [0.0, 1e-9], True),
        ([0.0, -2.0], [0.005, -2.0], False),  # small beside the others: rounding of logits
        ([float("inf"), 1.0], [float("inf"), 1.0], False),
    ],
)
def test_what_counts_as_a_change(losses: list[float], again: list[float], fails: bool):
    with pytest.raises(ValueError, match="not the same twice") if fails else nullcontext():
        check_repeats(losses, again, 0.006)
