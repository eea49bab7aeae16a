"""Checkpoints of parameters that stand in another order or are frozen there: slow weights go with their names."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, through_file, train
from _models import assert_identical, loss_of
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from torch_gradmatch import IDGM, Fish, GradMatch


def adam(model: nn.Module, *, backwards: bool = False) -> torch.optim.Adam:
    named = list(model.named_parameters())
    return torch.optim.Adam(named[::-1] if backwards else named, lr=0.1)


def fish(model: nn.Module, *, backwards: bool = False) -> GradMatch[Fish]:
    method = Fish(0.5, inner_steps=3, model=model, track_alignment=True)
    return GradMatch(adam(model, backwards=backwards), method)


def by_name(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torch's recipe for loading by names: the state dict that the optimizer has, with the entries of the other."""
    adapted = copy.deepcopy(optimizer.state_dict())
    (ours,), (theirs,) = adapted["param_groups"], state_dict["param_groups"]
    ours.update({name: value for name, value in theirs.items() if name not in ("params", "param_names")})
    for number, name in zip(ours["params"], ours["param_names"], strict=True):
        saved = theirs["params"][theirs["param_names"].index(name)]
        if saved in state_dict["state"]:
            adapted["state"][number] = copy.deepcopy(state_dict["state"][saved])
    return adapted


def reordered(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The shorter way: the saved state dict, its parameters in the order of the optimizer's."""
    (theirs,), names = state_dict["param_groups"], optimizer.param_groups[0]["param_names"]
    numbers = [theirs["params"][theirs["param_names"].index(name)] for name in names]
    return {**state_dict, "param_groups": [{**theirs, "params": numbers, "param_names": names}]}


HOOKS: dict[str, tuple[Any, Any]] = {
    "recipe": (by_name, lambda optimizer: optimizer),
    "recipe, on the wrapped one": (by_name, lambda optimizer: optimizer.optimizer),
    "reordered": (reordered, lambda optimizer: optimizer),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("backwards", [False, True], ids=["same order", "reversed"])
def test_it_resumes_by_names_also_in_the_middle_of_an_inner_loop(backwards: bool, steps: int, hook: str):
    model, resumed_model = feature_net(), feature_net()
    optimizer, resumed = fish(model), fish(resumed_model, backwards=backwards)
    train(model, optimizer, batches(9)[:steps])
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    adapts, holder = HOOKS[hook]
    holder(resumed).register_load_state_dict_pre_hook(adapts)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.inner_step == steps % 3
    for m, o in ((model, optimizer), (resumed_model, resumed)):
        train(m, o, batches(9)[steps:])
    assert_identical(dict(resumed_model.state_dict()), dict(model.state_dict()))
    assert optimizer.last_meta_step is not None
    assert resumed.last_meta_step is not None
    torch.testing.assert_close(vars(resumed.last_meta_step)["cosine"], vars(optimizer.last_meta_step)["cosine"])


def test_the_gamma_that_idgm_has_found_resumes_as_well():
    model, resumed_model = feature_net(), feature_net()
    optimizer = GradMatch(adam(model), IDGM(model))
    resumed = GradMatch(adam(resumed_model, backwards=True), IDGM(resumed_model))
    found = optimizer.meta_step(partial(loss_of, model), batches(3)).gamma
    resumed.register_load_state_dict_pre_hook(by_name)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert resumed.meta_step(partial(loss_of, resumed_model), batches(6)[3:]).gamma == found


def test_a_parameter_frozen_in_the_middle_of_an_inner_loop_resumes_where_it_is_frozen(tmp_path: Path):
    """Its slow weights are those of the walk's first step; what would lose them says so when it saves."""
    model = feature_net()
    optimizer = fish(model)
    train(model, optimizer, batches(4))
    model.inp.requires_grad_(False)
    train(model, optimizer, batches(5)[4:])
    with pytest.raises(KeyError, match=r"in the middle of an inner loop.*save between two inner loops"):
        dcp.save({"optimizer": get_state_dict(model, optimizer)[1]}, checkpoint_id=tmp_path, no_dist=True)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed_model = feature_net()
    resumed_model.inp.requires_grad_(False)
    resumed = fish(resumed_model)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (resumed_model, resumed)):
        train(m, o, batches(9)[5:])
    assert_identical(dict(resumed_model.state_dict()), dict(model.state_dict()))
