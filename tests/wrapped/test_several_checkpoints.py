"""Several optimizers wrapped as one: checkpoints, copies, and what is refused of a state dict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _layout import in_format_3
from _models import assert_identical
from _several import (
    DOMAINS,
    every_inner_state,
    everything,
    fish,
    loss_of,
    make_batches,
    make_model,
    matrices,
    muon_and_adamw,
    rest,
    through_a_file,
    train,
)
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish


@every_inner_state
def test_it_resumes_in_the_middle_of_an_inner_loop(inner_state: str):
    batches = make_batches(4 * DOMAINS)
    whole, whole_optimizer, whole_scheduler = trainer(inner_state)
    train(whole_optimizer, whole, batches, whole_scheduler.step)
    model, optimizer, scheduler = trainer(inner_state)
    train(optimizer, model, batches[:5], scheduler.step)
    assert optimizer.inner_step == 2
    saved = through_a_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
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


@pytest.mark.parametrize("kind", [SmoothFish, IDGM])
def test_the_other_methods_resume(kind: type[Any]):
    def build(seed: int) -> tuple[nn.Module, GradMatch[Any]]:
        model = make_model(seed)
        method = SmoothFish(2.0, 0.1) if kind is SmoothFish else IDGM(model, 0.5, "variance")
        return model, GradMatch(muon_and_adamw(model), method)

    batches = make_batches(DOMAINS * 4)
    groups = [batches[i : i + DOMAINS] for i in range(0, len(batches), DOMAINS)]
    (whole, whole_optimizer), (model, optimizer), (again, optimizer_again) = build(0), build(0), build(1)
    for group in groups:
        whole_optimizer.meta_step(lambda batch: loss_of(whole, batch), group)
    for group in groups[:2]:
        optimizer.meta_step(lambda batch: loss_of(model, batch), group)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    for group in groups[2:]:
        optimizer_again.meta_step(lambda batch: loss_of(again, batch), group)
    assert_identical(dict(again.named_parameters()), dict(whole.named_parameters()))
    assert_identical(optimizer_again.state_dict(), whole_optimizer.state_dict())


def without(name: str) -> Callable[[Any], Any]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def shortened(state: Any) -> Any:
    return {**state, "optimizers": state["optimizers"][:1]}


def second_of_other_groups(state: Any) -> Any:
    """The first loads before the second refuses."""
    first, second = copy.deepcopy(state["optimizers"])
    second["param_groups"][0]["params"].pop()
    return {**state, "optimizers": [first, second]}


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (lambda m: [SGD(matrices(m), lr=0.1), AdamW(rest(m))], None, r"is of .*torch\.Muon.*wraps.*torch\.SGD"),
        (lambda m: muon_and_adamw(m)[::-1], None, r"Muon with torch\.AdamW.*AdamW with torch\.Muon: build the same"),
        (lambda m: [Muon(matrices(m)), AdamW(rest(m)[:1]), AdamW(rest(m)[1:])], None, r"AdamW with torch\.AdamW"),
        (lambda m: [AdamW(m.parameters())], None, "build the same optimizer"),
        (lambda m: AdamW(m.parameters()), None, "build the same optimizer"),
        (
            lambda m: [Muon(matrices(m)[:2]), AdamW([matrices(m)[2], *rest(m)])],
            None,
            "group 0 has 3 parameters in the state dict and 2 in this",
        ),
        (lambda m: [Muon(matrices(m)[::-1]), AdamW(rest(m))], None, r"parameter 0 has shape \[6, 4\]"),
        (muon_and_adamw, second_of_other_groups, "cannot load the state dict.*group"),
        (muon_and_adamw, without("optimizers"), "cannot load the state dict"),
        (muon_and_adamw, without("gradmatch"), "no 'gradmatch' entry"),
        (muon_and_adamw, shortened, "is of 1 optimizers and there are 2 here"),
        (muon_and_adamw, lambda state: {**state, "optimizers": None}, "cannot load the state dict"),
    ],
    ids=[
        "another",
        "order",
        "more",
        "fewer",
        "plain",
        "shared-out-otherwise",
        "shapes",
        "second-refuses",
        "no-entry",
        "not-ours",
        "shortened",
        "None",
    ],
)
def test_a_state_dict_of_others_is_refused_and_changes_nothing(build: Any, change: Any, message: str):
    saved_model = make_model(1)
    saved = GradMatch(muon_and_adamw(saved_model), fish())
    train(saved, saved_model, make_batches(4, seed=3))
    state = saved.state_dict() if change is None else change(in_format_3(saved))
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


def test_text_for_what_is_kept_of_a_parameter_is_refused_though_torch_loads_it():
    model = make_model()
    optimizer = GradMatch([SGD(matrices(model), lr=0.1), SGD(rest(model), lr=0.1, momentum=0.9)], fish())
    train(optimizer, model, make_batches(4))
    state = in_format_3(optimizer)
    state["optimizers"][1]["state"][0] = "text"
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="the state of a parameter should be a dictionary"):
        optimizer.load_state_dict(state)
    assert_identical(everything(model, optimizer), before)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
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
