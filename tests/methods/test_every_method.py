"""What holds under every method: it resumes, is copied, fails and is skipped without a trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import _networks as networks
import pytest
import torch
from _feature_training import through_file
from _models import assert_identical
from _networks import Case, make
from _second_order import EVERY, MORE_METHODS, nothing_changes, train
from torch.optim import LBFGS, SGD, AdamW

from torch_gradmatch import Average, GradMatch

every_method = pytest.mark.parametrize("method", EVERY)
one_and_two = pytest.mark.parametrize("several", [False, True], ids=["one optimizer", "two"])


def named(case: Case) -> Case:
    """Its batches by the names of domains, by which some methods remember."""
    return Case(case.model, case.loss, dict(zip(("north", "south", 7), case.batches, strict=True)))


def wrap(case: Case, method: str, lr: float = 0.05, *, several: bool = False) -> GradMatch[Any]:
    parameters = list(case.model.parameters())
    both = [SGD(parameters[:3], lr=lr, momentum=0.9), AdamW(parameters[3:], lr=lr)]
    return GradMatch(both if several else AdamW(parameters, lr=lr), EVERY[method](case.model), Average(2, 0.7))


@one_and_two
@pytest.mark.parametrize(("method", "meta_steps"), [*((m, 1) for m in EVERY), *((m, 4) for m in MORE_METHODS)])
def test_resumes_bit_for_bit_from_a_file(method: str, meta_steps: int, several: bool):
    """The average too, before its start and after it."""
    case, resumed = named(make(networks.batch_norm_1d)), make(networks.batch_norm_1d, seed=1)
    optimizer = wrap(case, method, several=several)
    train(case, optimizer, meta_steps)
    saved = through_file({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()})
    other = wrap(resumed, method, lr=7.0, several=several)
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(case, optimizer)
    train(Case(resumed.model, resumed.loss, case.batches), other)
    assert_identical(resumed.model.state_dict(), case.model.state_dict())
    assert_identical(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", [name for name in EVERY if name != "Aggregate"])  # a function without a name
def test_a_copy_of_model_and_optimizer_goes_on_alike(method: str, how: Callable[[Any], Any]):
    case = make(networks.batch_norm_1d)
    optimizer = wrap(case, method)
    train(case, optimizer)
    model, twin = how((case.model, optimizer))
    assert twin.method.model is model is not case.model
    train(case, optimizer)
    assert not torch.equal(model[0].weight, case.model[0].weight)
    train(Case(model, case.loss, case.batches), twin)
    assert_identical(model.state_dict(), case.model.state_dict())
    assert_identical(twin.state_dict(), optimizer.state_dict())


@one_and_two
@every_method
def test_what_fails_changes_nothing_and_training_goes_on(method: str, several: bool):
    """Too few batches, and a hook before the last optimizer's step. Losses that fail: ``test_undo.py``."""
    case = make(networks.batch_norm_1d)
    optimizer = wrap(case, method, several=several)
    train(case, optimizer, 1)
    for batches, message in (([], "batches is empty"), (case.batches[:1], "at least 2 domains")):
        if batches and method in ("Fish", "ERM"):
            train(Case(case.model, case.loss, batches), optimizer, 1)
            continue
        with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match=message):
            optimizer.meta_step(lambda batch: case.loss(case.model, batch), batches)

    def raises(*_: Any) -> None:
        raise MemoryError

    last = getattr(optimizer.optimizer, "optimizers", [optimizer])[-1]
    handle = (last if method == "Fish" else optimizer).register_step_pre_hook(raises)
    with nothing_changes(case.model, optimizer), pytest.raises(MemoryError):
        train(case, optimizer, 1)
    handle.remove()
    train(case, optimizer, 1)


@pytest.mark.parametrize("method", [name for name in EVERY if name != "Fish"])
def test_there_is_no_inner_loop_but_in_fish(method: str):
    case = make(networks.batch_norm_1d)
    optimizer = wrap(case, method)
    train(case, optimizer)
    with nothing_changes(case.model, optimizer):
        optimizer.rollback()
        with pytest.raises(RuntimeError, match=r"has no inner loop .*: call meta_step"):
            optimizer.interpolate()
    assert optimizer.inner_step == 0


@pytest.mark.parametrize("method", [name for name in MORE_METHODS if name != "IDGM by strength"])
def test_a_line_search_remembers_one_evaluation(method: str):
    """LBFGS evaluates again and again; with one evaluation only, what is remembered is the same."""
    memories = []
    for evaluations in (1, 5):
        case = make(networks.batch_norm_eval)
        optimizer = GradMatch(LBFGS(case.model.parameters(), lr=0.01, max_iter=evaluations), EVERY[method](case.model))
        train(case, optimizer, 1)
        memories.append(optimizer.state_dict()["gradmatch"]["memory"])
    assert_identical(memories[0], memories[1])


@pytest.mark.parametrize(("method", "told"), [("GroupDRO", "weights of the domains"), ("Fishr", "running variances")])
def test_another_number_of_domains_without_names_is_refused_and_a_state_without_ours_is_told_of(method: str, told: str):
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), EVERY[method](case.model))
    train(case, optimizer, 1)
    with pytest.raises(ValueError, match="holds 2 domains without names, and earlier ones held 3"):
        train(Case(case.model, case.loss, case.batches[:2]), optimizer, 1)
    with pytest.warns(UserWarning, match=f"{told} begin anew"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
