"""Settings are checked and converted whenever they are set, and count from the next meta-iteration on."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from _feature_training import batches, feature_net, snapshot, train
from _models import assert_identical, loss_of, small_network
from _second_order import EVERY
from torch import nn
from torch.optim import SGD, Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
BAD: dict[str, dict[str, tuple[Any, ...]]] = {
    "Fish": {
        "meta_lr": (0.0, 1.5, NAN, HUGE, "0.1", True),
        "inner_steps": (0, 2.5, True),
        "inner_state": ("restart", None),
        "meta_dtype": (torch.int64, "float32"),
        "track_alignment": (1, "pair", None),
        "buffers": ("mean",),
        "nonfinite": ("rasie",),
    },
    "SmoothFish": {
        "gamma": (-1.0, HUGE),
        "inner_lr": (0.0, NAN, HUGE),
        "symmetric": (1, 2),
        "track_alignment": ("yes",),
        "nonfinite": ("warn",),
    },
    "IDGM": {
        "gamma": (-1.0, INF, HUGE),
        "strength": (0.0, HUGE),
        "one_pass": (1,),
        "keep_graphs": (1,),
        "agreement": ("mean",),
        "hvp": ("double",),
        "track_alignment": ("pair",),
        "nonfinite": ("warn",),
    },
    "Fishr": {"ema": (1.0, -0.1), "start": (-1,), "strength": (0,), "gamma": (-1,)},
    "VREx": {"beta": (-1,)},
    "GroupDRO": {"eta": (NAN,)},
    "ERM": {"nonfinite": ("maybe",)},
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, bad in BAD.items() for name in bad])
def test_a_bad_value_is_named_and_shown_also_later_and_changes_nothing(method: str, name: str):
    settings = EVERY[method](small_network())
    before = vars(settings).copy()
    for value in BAD[method][name]:
        with pytest.raises(ValueError, match=rf"{name} should .*got {value!r:.80}"):
            setattr(settings, name, value)
        assert vars(settings) == before
        with pytest.raises(ValueError, match=rf"{name} should .*got {value!r:.80}"):
            type(settings)(**{**before, name: value})


@pytest.mark.parametrize("method", BAD)
def test_a_wrong_model_and_a_misspelt_setting_are_refused(method: str):
    settings = EVERY[method](small_network())
    with pytest.raises(TypeError, match=r"model should be a torch.nn.Module, not a scripted one .got str"):
        settings.model = "resnet"
    with pytest.raises(AttributeError, match=rf"{method} has no setting 'meta_Ir'; its settings are .*nonfinite"):
        settings.meta_Ir = 1.0


@pytest.mark.parametrize(
    ("method", "name"),
    [("Fish", "meta_lr"), ("SmoothFish", "gamma"), ("SmoothFish", "inner_lr"), ("IDGM", "gamma"), ("IDGM", "strength")],
)
def test_a_number_of_any_kind_is_kept_as_a_float(method: str, name: str):
    settings = EVERY[method](small_network())
    setattr(settings, name, np.float32(0.25))
    given = type(settings)(**{**vars(settings), name: np.float32(0.25)})
    for kept in (getattr(settings, name), getattr(given, name)):
        assert kept.hex() == (0.25).hex()


def test_repr_shows_settings_and_only_the_class_of_the_model():
    assert repr(SmoothFish(1.0, 0.1, nn.Linear(1, 1))) == (
        "SmoothFish(gamma=1.0, inner_lr=0.1, model=Linear, nonfinite='raise', track_alignment=False, symmetric=False)"
    )
    model = nn.Linear(1, 1)
    assert "gamma=0.5, agreement='variance', strength=0.1, hvp='reverse'" in repr(IDGM(model, 0.5))
    for matched, shown in ((model, "Linear"), ([model.weight], "1 parameters")):
        assert f"matched='{shown}'" in repr(IDGM(model, matched=matched))


CHANGES: dict[str, Any] = {
    "meta_lr": 0.9,
    "inner_steps": 2,
    "inner_state": "reset",
    "buffers": "latest",
    "meta_dtype": torch.float64,
    "track_alignment": True,
    "nonfinite": "ignore",
}


@pytest.mark.parametrize("when", ["in an inner loop", "by meta_step"])
@pytest.mark.parametrize("name", sorted(set(Fish.__dataclass_fields__) - {"model", "process_group", "checks"}))
def test_a_setting_of_fish_counts_from_the_next_meta_iteration_on(name: str, when: str):
    """As if from there on another wrapper, with the new setting, had gone on with the same optimizer."""
    start: dict[str, Any] = {"meta_lr": 0.3, "inner_steps": 4}
    data = batches(12)
    model, expected = feature_net(), feature_net()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.05), Fish(model=model, **start))
    wrapped = Adam(expected.parameters(), lr=0.05)
    twin = GradMatch(wrapped, Fish(model=expected, **{**start, name: CHANGES[name]}))
    begun = 2 if when == "in an inner loop" else 4
    train(model, optimizer, data[:begun])
    setattr(optimizer.method, name, CHANGES[name])
    train(model, optimizer, data[begun:4])
    train(expected, GradMatch(wrapped, Fish(model=expected, **start)), data[:4])
    for first in range(4, 12, twin.method.inner_steps):
        some = data[first : first + twin.method.inner_steps]
        for m, o in ((model, optimizer), (expected, twin)):
            assert o.inner_step == 0
            if when == "by meta_step":
                o.meta_step(partial(loss_of, m), some)
            else:
                train(m, o, some)
        assert_identical(model.state_dict(), expected.state_dict())
        assert_identical(vars(optimizer.last_meta_step), vars(twin.last_meta_step))


@pytest.mark.parametrize("call", ["step", "meta_step", "load_state_dict"])
def test_another_model_after_wrapping_is_refused_before_anything_moves(call: str):
    """Nobody has followed its buffers."""
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1, momentum=0.9), Fish())
    arguments: Any = {"meta_step": (partial(loss_of, model), batches(2)), "load_state_dict": (optimizer.state_dict(),)}
    train(model, optimizer, batches(1))
    optimizer.interpolate()
    before = snapshot(model, optimizer)
    optimizer.method.model = model
    with pytest.raises(RuntimeError, match=r"Fish.model .*was changed .*wrap the optimizer anew"):
        getattr(optimizer, call)(*arguments.get(call, ()))
    optimizer.method.model = None
    assert_identical(snapshot(model, optimizer), before)


def test_one_method_object_serves_several_optimizers():
    method = Fish(meta_lr=1.0, inner_steps=2)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    first, second = (GradMatch(SGD([p], lr=1.0), method) for p in parameters)
    for p in parameters:
        p.grad = torch.ones(1)
    first.step()
    method.meta_lr = 0.5  # first has begun already
    for optimizer in (second, first, second):
        optimizer.step()
    assert [p.item() for p in parameters] == [-2.0, -1.0]
