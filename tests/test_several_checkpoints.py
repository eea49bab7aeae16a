"""Several optimizers wrapped as one: checkpoints, copies, and what is refused of a state dict."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from _feature_training import through_file
from _models import assert_identical
from _several import (
    DOMAINS,
    every_inner_state,
    everything,
    fish,
    make_batches,
    make_model,
    matrices,
    members,
    muon_and_adamw,
    rest,
    train,
)
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR

from torch_gradmatch import Fish, GradMatch


def trainer(inner_state: str, seed: int = 0) -> tuple[nn.Module, GradMatch[Fish], OneCycleLR]:
    model = make_model(seed)
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state, track_alignment=True))
    return model, optimizer, OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=40, cycle_momentum=False)


@every_inner_state
def test_it_resumes_in_the_middle_of_an_inner_loop(inner_state: str):
    batches = make_batches(4 * DOMAINS)
    model, optimizer, scheduler = trained = trainer(inner_state)
    train(optimizer, model, batches[:5], scheduler.step)
    resumed = trainer(inner_state, seed=1)
    for one, saved in zip(resumed, through_file([each.state_dict() for each in trained]), strict=True):
        one.load_state_dict(saved)
    assert resumed[1].inner_step == 2
    assert_identical(resumed[1].state_dict(), optimizer.state_dict())
    for m, o, s in (trained, resumed):
        train(o, m, batches[5:], s.step)
    for one, other in zip(resumed, trained, strict=True):
        assert_identical(one.state_dict(), other.state_dict())
    cosines = [o.last_meta_step and o.last_meta_step.cosine for _, o, _ in (trained, resumed)]
    assert torch.equal(*cosines)


def of_other_groups(state: Any) -> Any:
    """The first would load before the second refuses."""
    state = copy.deepcopy(state)
    state["param_groups"][1]["params"].pop()
    return state


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (lambda m: [AdamW(rest(m)), Muon(matrices(m))], None, r"parameter 0 has shape \[6, 4\] in the state dict and"),
        (lambda m: [Muon(matrices(m)[:2]), AdamW([matrices(m)[2], *rest(m)])], None, "Muon with AdamW cannot load"),
        (
            lambda m: [Muon(matrices(m)), AdamW(rest(m)[:1]), AdamW(rest(m)[1:])],
            None,
            "has 2 .*groups and these optimizers 3",
        ),
        (lambda m: [Muon(matrices(m))], None, "of another model: parameter 3 does not exist here"),
        (muon_and_adamw, of_other_groups, "cannot load the state dict.*group"),
    ],
    ids=["order", "shared-out-otherwise", "more", "fewer", "second-refuses"],
)
def test_a_state_dict_of_others_is_refused_and_changes_nothing(build: Any, change: Any, message: str):
    saved_model = make_model(1)
    saved = GradMatch(muon_and_adamw(saved_model), fish())
    train(saved, saved_model, make_batches(4, seed=3))
    state = saved.state_dict() if change is None else change(saved.state_dict())
    batches, found = make_batches(DOMAINS + 3), []
    for refuses in (True, False):
        model = make_model()
        optimizer = GradMatch(build(model), fish())
        train(optimizer, model, batches[:5])
        if refuses:
            before = everything(model, optimizer)
            with pytest.raises(ValueError, match=message):
                optimizer.load_state_dict(state)
            assert_identical(everything(model, optimizer), before)
        train(optimizer, model, batches[5:])
        found.append(everything(model, optimizer))
    assert_identical(found[0], found[1])


class OwnLayout(SGD):
    """Its state dict is no state dict of torch's."""

    def state_dict(self) -> dict[str, Any]:
        return {"rates": [group["lr"] for group in self.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, rate in zip(self.param_groups, state_dict["rates"], strict=True):
            group["lr"] = rate


def test_optimizers_of_another_layout_are_saved_one_by_one():
    def build(rate: float) -> GradMatch[Fish]:
        model = make_model()
        return GradMatch([OwnLayout(matrices(model), lr=rate), AdamW(rest(model), lr=rate)], fish())

    saved, optimizer = build(0.5).state_dict(), build(0.1)
    optimizer.load_state_dict(through_file(saved))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    with pytest.raises(ValueError, match="is of 1 optimizers and there are 2 here"):
        optimizer.load_state_dict({**saved, "optimizers": saved["optimizers"][:1]})


@pytest.mark.parametrize(
    ("through", "inner_state"),
    [(copy.deepcopy, "carry"), (lambda o: pickle.loads(pickle.dumps(o)), "reset")],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_by_itself(through: Any, inner_state: str):
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state, track_alignment=True))
    scheduler = OneCycleLR(members(optimizer)[0], max_lr=0.1, total_steps=40)
    batches = make_batches(DOMAINS + 5)
    train(optimizer, model, batches[:4], scheduler.step)
    copied, its_optimizer = through((model, optimizer))
    assert members(its_optimizer)[0].param_groups[0]["params"][0] is matrices(copied)[0]
    assert its_optimizer.param_groups == its_optimizer.optimizer.param_groups
    before = everything(model, optimizer)
    train(its_optimizer, copied, batches[4:])
    assert_identical(everything(model, optimizer), before)
    train(optimizer, model, batches[4:])
    assert_identical(everything(copied, its_optimizer), everything(model, optimizer))
