"""Settings are checked whenever they are set, and count from the next meta-iteration on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import FeatureNet, assert_identical, assert_same_model, loss_of, make_batches
from torch import nn
from torch.optim import SGD, Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

METHODS: dict[str, Any] = {
    "Fish": lambda m: Fish(model=m),
    "SmoothFish": lambda m: SmoothFish(1.0, 0.1, m),
    "IDGM": lambda m: IDGM(m, 0.1),
}
BAD: list[tuple[str, str, Any]] = [
    ("Fish", "meta_lr", 0.0),
    ("Fish", "meta_lr", float("nan")),
    ("Fish", "inner_steps", 0),
    ("Fish", "inner_steps", 2.5),
    ("Fish", "inner_state", "restart"),
    ("Fish", "buffers", "mean"),
    ("Fish", "meta_dtype", torch.int64),
    ("Fish", "track_alignment", 1),
    ("Fish", "nonfinite", "rasie"),
    ("SmoothFish", "gamma", -1.0),
    ("SmoothFish", "inner_lr", 0.0),
    ("SmoothFish", "nonfinite", "off"),
    ("SmoothFish", "track_alignment", "yes"),
    ("SmoothFish", "symmetric", 2),
    ("IDGM", "gamma", float("inf")),
    ("IDGM", "agreement", "dot"),
    ("IDGM", "hvp", "backward"),
    ("IDGM", "hvp_domains", 0),
    ("IDGM", "keep_graphs", None),
    ("IDGM", "track_alignment", 0),
    ("IDGM", "nonfinite", False),
]


@pytest.mark.parametrize(("method", "name", "value"), BAD, ids=str)
def test_a_bad_value_is_refused_also_later_and_changes_nothing(method: str, name: str, value: Any):
    settings = METHODS[method](nn.Linear(1, 1))
    before = getattr(settings, name)
    with pytest.raises(ValueError, match=rf"{name} should .*got {value!r}"):
        setattr(settings, name, value)
    assert getattr(settings, name) == before
    with pytest.raises(TypeError, match=r"model should be a torch.nn.Module .got str"):
        settings.model = "resnet"


def feature_net() -> FeatureNet:
    return FeatureNet(torch.Generator().manual_seed(0))


def batches(count: int) -> list[Any]:
    return make_batches(torch.Generator().manual_seed(1), count)


def train(model: nn.Module, optimizer: GradMatch[Fish], some: list[Any]) -> None:
    for batch in some:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


CHANGES: dict[str, Any] = {
    "meta_lr": 0.9,
    "inner_steps": 2,
    "inner_state": "reset",
    "buffers": "latest",
    "meta_dtype": torch.float64,
    "track_alignment": True,
    "nonfinite": "ignore",
}


def test_the_table_has_every_setting_of_fish():
    assert set(CHANGES) == set(Fish.__dataclass_fields__) - {"model", "process_group", "checks"}


@pytest.mark.parametrize("when", ["in an inner loop", "between two", "by meta_step"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_fish_counts_from_the_next_meta_iteration_on(name: str, when: str):
    """As if from there on another wrapper, with the new setting, had gone on with the same optimizer."""
    start: dict[str, Any] = {"meta_lr": 0.3, "inner_steps": 4}
    data = batches(12)
    model = feature_net()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.05), Fish(model=model, **start))
    train(model, optimizer, data[: 2 if when == "in an inner loop" else 4])
    setattr(optimizer.method, name, CHANGES[name])
    if when == "in an inner loop":
        train(model, optimizer, data[2:4])
    assert optimizer.inner_step == 0

    expected = feature_net()
    wrapped = Adam(expected.parameters(), lr=0.05)
    train(expected, GradMatch(wrapped, Fish(model=expected, **start)), data[:4])
    assert_identical(model.state_dict(), expected.state_dict())
    twin = GradMatch(wrapped, Fish(model=expected, **{**start, name: CHANGES[name]}))
    steps = twin.method.inner_steps or 0
    for first in range(4, 12, steps):
        some = data[first : first + steps]
        if when == "by meta_step":
            for m, o in ((model, optimizer), (expected, twin)):
                o.meta_step(lambda b, m=m: loss_of(m, b), some)
        else:
            train(model, optimizer, some)
            train(expected, twin, some)
        assert optimizer.inner_step == twin.inner_step == 0
        if name == "inner_state":  # the twin was wrapped later: "newly built" is the same for both
            assert_same_model(model, expected, rtol=1e-12)
        else:
            assert_identical(model.state_dict(), expected.state_dict())
        assert_identical(vars(optimizer.last_meta_step), vars(twin.last_meta_step))


CALLS: dict[str, Any] = {
    "step": lambda optimizer, *_: optimizer.step(),
    "meta_step": lambda optimizer, model, _: optimizer.meta_step(lambda b: loss_of(model, b), batches(2)),
    "load_state_dict": lambda optimizer, _, state: optimizer.load_state_dict(state),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_model_after_wrapping_is_refused_before_anything_moves(call: str):
    """Nobody has followed its buffers."""
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1, momentum=0.9), Fish())
    empty = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(1))
    optimizer.interpolate()
    optimizer.method.model = model
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"Fish.model was changed .*wrap the optimizer anew"):
        CALLS[call](optimizer, model, empty)
    assert_identical((model.state_dict(), optimizer.state_dict()), before)


def test_one_method_object_still_serves_several_optimizers():
    method = Fish(meta_lr=1.0, inner_steps=2)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    first, second = (GradMatch(SGD([p], lr=1.0), method) for p in parameters)
    for p in parameters:
        p.grad = torch.ones(1)
    first.step()
    method.meta_lr = 0.5  # first has begun already
    second.step()
    first.step()
    second.step()
    assert [p.item() for p in parameters] == [-2.0, -1.0]
