"""The mean of the slow weights: torch's own averaged model, step by step, whatever the method and the loop.

On several ranks: ``tests/parallel/test_every_method_on_ranks.py``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, snapshot, train
from _models import FeatureNet, assert_identical, loss_of
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from torch_gradmatch import IDGM, Average, Fish, GradMatch, SmoothFish

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "Fish": lambda model: Fish(0.3, model=model),
    "Fish reset": lambda model: Fish(0.3, inner_state="reset", model=model),
    "Fish loop": lambda model: Fish(0.3, inner_steps=3, model=model),
    "SmoothFish": lambda model: SmoothFish(1.0, 0.1, model=model),
    "IDGM": lambda model: IDGM(model, 0.1),
}


def torch_average(model: nn.Module, decay: float | None = None) -> AveragedModel:
    mean = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    return AveragedModel(model, use_buffers=True, **mean)


def averaging(method: str = "Fish") -> tuple[FeatureNet, GradMatch, AveragedModel]:
    """A network, its optimizer that keeps an average, and torch's average of the same network."""
    model = feature_net()
    return model, GradMatch(adam(model.parameters()), METHODS[method](model), Average()), torch_average(model)


def averaged(optimizer: GradMatch, model: nn.Module) -> dict[str, Any]:
    with optimizer.averaged_weights():
        return copy.deepcopy(model.state_dict())


def assert_is_average(found: dict[str, Any], expected: AveragedModel) -> None:
    theirs = expected.module.state_dict()
    for name, value in found.items():
        if value.is_floating_point():  # their weight 1/n is in single precision
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    return [SGD(parameters[:3], lr=0.1), adam(parameters[3:])]


adam = partial(Adam, lr=0.05)
WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "Adam": lambda model: adam(model.parameters()),
    "several": two_optimizers,
    "LBFGS": lambda model: LBFGS(model.parameters(), lr=0.1, max_iter=2),
}


@pytest.mark.parametrize(
    ("method", "wrapped", "start", "decay"),
    [
        *((method, "Adam", 0, None) for method in ("Fish", "Fish reset", "SmoothFish", "IDGM")),
        *(("Fish", "several", 3, 0.8), ("SmoothFish", "Adam", 3, None), ("Fish", "LBFGS", 0, 0.8)),
    ],
)
def test_is_the_averaged_model_of_torch(method: str, wrapped: str, start: int, decay: float | None):
    """After every meta-step from ``start`` on, parameters and BatchNorm's statistics; training itself is untouched."""
    model = feature_net()
    plain = copy.deepcopy(model)
    optimizer = GradMatch(WRAPPED[wrapped](model), METHODS[method](model), Average(start, decay))
    without = GradMatch(WRAPPED[wrapped](plain), METHODS[method](plain))
    expected = torch_average(plain, decay)
    for number in range(6):
        domains = batches(3, number)
        optimizer.meta_step(lambda batch: loss_of(model, batch), domains)
        without.meta_step(lambda batch: loss_of(plain, batch), domains)
        assert_identical(model.state_dict(), plain.state_dict())
        if number < start:
            with pytest.raises(RuntimeError, match=f"after meta-update number {start}.*there have been {number + 1}"):
                averaged(optimizer, model)
            continue
        expected.update_parameters(plain)
        assert_is_average(averaged(optimizer, model), expected)
        assert_identical(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("method", "every"), [("Fish loop", 3), ("IDGM", 1)])
def test_a_loop_of_steps_counts_interpolations_and_without_an_inner_loop_every_step(method: str, every: int):
    model, optimizer, expected = averaging(method)
    for number, batch in enumerate(batches(9), start=1):
        train(model, optimizer, [batch])
        if number % every == 0:
            expected.update_parameters(model)
    assert expected.n_averaged == 9 // every
    assert_is_average(averaged(optimizer, model), expected)


def test_interpolate_by_hand_counts_and_a_failed_meta_step_does_not():
    model, optimizer, expected = averaging()
    for _ in range(2):
        train(model, optimizer, batches(3))
        optimizer.interpolate()
        expected.update_parameters(model)
        with pytest.raises(ValueError, match="batch 1 is nan"):
            optimizer.meta_step(lambda b: loss_of(model, b) * (1 if b[2] == 0 else float("nan")), batches(2))
        train(model, optimizer, batches(2))
        optimizer.rollback()
    assert_is_average(averaged(optimizer, model), expected)


def test_the_block_in_an_inner_loop_leaves_no_trace():
    """Evaluating the average in the middle of a walk; what the block does to parameters is lost."""
    runs = []
    for looks in (False, True):
        model, optimizer, _ = averaging("Fish loop")
        for batch in batches(8):
            train(model, optimizer, [batch])
            if looks and optimizer.last_meta_step is not None:
                with optimizer.averaged_weights(), torch.no_grad():
                    optimizer.zero_grad()
                    model.out.weight.fill_(7.0)
                optimizer.zero_grad()
        runs.append(snapshot(model, optimizer))
    assert_identical(runs[1], runs[0])


def test_statistics_estimated_inside_are_kept_with_the_average_and_lost_from_the_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    optimizer = GradMatch(SGD(model.parameters(), lr=0.5), Fish(0.5, model=model), average=Average())
    for _ in range(2):
        optimizer.meta_step(lambda x: model(x).square().mean() + model[0](x).mean(), data)
    own = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    expected.load_state_dict(averaged(optimizer, model))
    update_bn(data, expected)
    with optimizer.averaged_weights():
        update_bn(data, model)
    assert_identical(model.state_dict(), own)
    assert_identical(averaged(optimizer, model), expected.state_dict())
    with suppress(ZeroDivisionError), optimizer.averaged_weights():
        model[1].reset_running_stats()
        raise ZeroDivisionError
    assert_identical(averaged(optimizer, model), expected.state_dict())  # not what was half done
    assert_identical(model.state_dict(), own)


def test_half_precision_is_averaged_in_single_and_of_slow_weights_all_digits_count():
    """A walk of a thousandth of a bfloat16's digits: in the parameters nothing moves, in the slow weights it does."""
    w = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    optimizer = GradMatch(SGD([w], lr=2**-5), Fish(2**-6, meta_dtype=torch.float32), average=Average())
    for _ in range(4):
        optimizer.meta_step(lambda scale: w * scale, [torch.ones(())])
    assert w.item() == 1.0
    (mean,) = optimizer.state_dict()["gradmatch"]["average"]["weights"].values()
    assert mean.dtype == torch.float32
    slow = [1.0]
    for _ in range(4):
        slow.append(slow[-1] + 2**-6 * (1 - 2**-5 - slow[-1]))
    assert mean.item() == pytest.approx(sum(slow[1:]) / 4, rel=1e-7)


def test_a_grad_scaler_steps_and_skips():
    """A step that is skipped counts: the weights are taken in once more, as by ``update_parameters`` after it."""
    model = nn.Linear(3, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), SmoothFish(1.0, 0.1), average=Average())
    expected = torch_average(model)
    for overflow in (False, False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).mean()).backward()
        if overflow:
            model.weight.grad.fill_(float("inf"))
        before = model.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.weight) == overflow
        expected.update_parameters(model)
    assert_is_average(averaged(optimizer, model), expected)


def test_parameters_may_join_and_masks_have_no_mean():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    model[1].requires_grad_(False)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(1.0, model=model), average=Average())
    seen = []
    for number in range(4):
        model[1].requires_grad_(number >= 2)
        optimizer.meta_step(lambda x: model(x).square().mean(), [torch.ones(1, 2).double()])
        seen.append(copy.deepcopy(model.state_dict()))
        # There is no copy of what is frozen.
        assert len(optimizer.state_dict()["gradmatch"]["average"]["weights"]) == (2 if number < 2 else 4)
    found = averaged(optimizer, model)
    mean = torch.stack([s["0.weight"] for s in seen]).mean(0)
    late = seen[2]["1.weight"] + (seen[3]["1.weight"] - seen[2]["1.weight"]) / 4
    torch.testing.assert_close([found["0.weight"], found["1.weight"]], [mean, late], rtol=1e-12, atol=1e-12)
    assert torch.equal(found["mask"], model.mask)


# ---------------------------------------------------------------------------------------------------------- refusals


def one_weight(**settings: Any) -> tuple[nn.Parameter, GradMatch]:
    """After one step."""
    w = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(SGD([w], lr=0.1), Fish(inner_steps=1), **settings)
    w.grad = torch.ones(2)
    optimizer.step()
    return w, optimizer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Average(start=-1), ValueError, "start should be an integer of at least 0"),
        (lambda: Average(decay=1.0), ValueError, "decay should be a number in (0, 1)"),
        (lambda: Average(decay=0), ValueError, "decay should be a number in (0, 1]"),
        (lambda: one_weight(average=0.9), TypeError, "average should be an Average"),
        (lambda: one_weight()[1].averaged_weights(), RuntimeError, "keeps no average"),
        (lambda: setattr(one_weight()[1], "average", Average(3)), AttributeError, "average cannot be replaced"),
    ],
    ids=["start", "decay 1", "decay 0", "number", "none", "later"],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_calls_that_make_no_sense_inside_the_block():
    w, optimizer = one_weight(average=Average())
    state = optimizer.state_dict()
    calls = {
        "step": optimizer.step,
        "interpolate": optimizer.interpolate,
        "rollback": optimizer.rollback,
        "meta_step": lambda: optimizer.meta_step(lambda x: (w * x).sum(), [torch.ones(())]),
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    with optimizer.averaged_weights(), optimizer.averaged_weights():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name}\(\) inside averaged_weights"):
                call()
    optimizer.step()


def test_checkpoints_without_an_average_or_of_another_model():
    (_, kept), (_, plain) = one_weight(average=Average()), one_weight()
    state = kept.state_dict()
    with pytest.raises(ValueError, match="this optimizer keeps none"):
        plain.load_state_dict(state)
    for without in (plain.state_dict(), plain.optimizer.state_dict()):
        with pytest.warns(UserWarning, match="it begins anew"):
            kept.load_state_dict(without)
        with pytest.raises(RuntimeError, match="no average yet"), kept.averaged_weights():
            pass
    average = state["gradmatch"]["average"]
    for damaged, message in (
        (average | {"weights": {0: torch.ones(3)}}, "average of parameter 0 has shape"),
        (average | {"weights": {1: torch.ones(2)}}, "which does not exist here"),
        (average | {"number": "3"}, "'number' is missing or malformed"),
        (None, "'average' is malformed"),
    ):
        with pytest.raises(ValueError, match=message):
            kept.load_state_dict(state | {"gradmatch": state["gradmatch"] | {"average": damaged}})
