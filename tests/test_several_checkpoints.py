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
    muon_and_adamw,
    rest,
    train,
)
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR

from torch_gradmatch import Fish, GradMatch


@every_inner_state
def test_it_resumes_in_the_middle_of_an_inner_loop(inner_state: str):
    batches = make_batches(4 * DOMAINS)
    whole, whole_optimizer, whole_scheduler = trainer(inner_state)
    train(whole_optimizer, whole, batches, whole_scheduler.step)
    model, optimizer, scheduler = trainer(inner_state)
    train(optimizer, model, batches[:5], scheduler.step)
    assert optimizer.inner_step == 2
    saved = through_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    again, optimizer_again, scheduler_again = trainer(inner_state, seed=1)
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    scheduler_again.load_state_dict(saved[2])
    assert optimizer_again.inner_step == 2
    assert_identical(optimizer_again.state_dict(), optimizer.state_dict())
    train(optimizer_again, again, batches[5:], scheduler_again.step)
    assert_identical(dict(again.named_parameters()), dict(whole.named_parameters()))
    assert_identical(optimizer_again.state_dict(), whole_optimizer.state_dict())
    assert whole_optimizer.last_meta_step is not None
    assert optimizer_again.last_meta_step is not None
    assert torch.equal(optimizer_again.last_meta_step.cosine, whole_optimizer.last_meta_step.cosine)


def trainer(inner_state: str, seed: int = 0) -> tuple[nn.Module, GradMatch[Fish], OneCycleLR]:
    model = make_model(seed)
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state, track_alignment=True))
    return model, optimizer, OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=40, cycle_momentum=False)


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
    model, reference = make_model(), make_model()
    optimizer, beside = GradMatch(build(model), fish()), GradMatch(build(reference), fish())
    batches = make_batches(DOMAINS + 3)
    for one, of in ((optimizer, model), (beside, reference)):
        train(one, of, batches[:5])
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_identical(everything(model, optimizer), before)
    for one, of in ((optimizer, model), (beside, reference)):
        train(one, of, batches[5:])
    assert_identical(everything(model, optimizer), everything(reference, beside))


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

    saved = build(0.5).state_dict()
    optimizer = build(0.1)
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
    scheduler = OneCycleLR(optimizer.optimizer.optimizers[0], max_lr=0.1, total_steps=40)  # type: ignore[attr-defined]
    batches = make_batches(DOMAINS + 5)
    train(optimizer, model, batches[:4], scheduler.step)
    copied, optimizer_copied = through((model, optimizer))
    assert optimizer_copied.optimizer.optimizers[0].param_groups[0]["params"][0] is matrices(copied)[0]
    assert optimizer_copied.param_groups == optimizer_copied.optimizer.param_groups
    before = everything(model, optimizer)
    train(optimizer_copied, copied, batches[4:])
    assert_identical(everything(model, optimizer), before)
    train(optimizer, model, batches[4:])
    assert_identical(everything(copied, optimizer_copied), everything(model, optimizer))
