"""What holds under every method: it resumes, is copied and fails without a trace; no scaler or search changes it."""

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
from _second_order import METHODS, nothing_changes, train
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from torch_gradmatch import ERM, IDGM, Aggregate, Fishr, GradMatch, GroupDRO, VREx

BY_LOSSES: dict[str, Callable[[nn.Module], Any]] = {
    "ERM": lambda m: ERM(model=m),
    "VREx": lambda m: VREx(0.7, model=m),
    "GroupDRO": lambda m: GroupDRO(0.5, model=m),
    "Aggregate": lambda m: Aggregate(lambda matrix: matrix.amax(0), model=m),
    "Fishr": lambda m: Fishr(m, m[-1]),
    "Fishr later": lambda m: Fishr(m, m[-1], start=3),
    "matched": lambda m: IDGM(m, matched=m[-1]),
    "IDGM by strength": lambda m: IDGM(m),
}
EVERY = METHODS | BY_LOSSES
every_method = pytest.mark.parametrize("method", EVERY)


def named(case: Case) -> Case:
    """Its batches by the names of domains, by which some methods remember."""
    return Case(case.model, case.loss, dict(zip(("north", "south", 7), case.batches, strict=True)))


def wrap(case: Case, method: str, lr: float = 0.05) -> GradMatch[Any]:
    return GradMatch(AdamW(case.model.parameters(), lr=lr), EVERY[method](case.model))


@pytest.mark.parametrize(("method", "meta_steps"), [*((m, 1) for m in EVERY), *((m, 4) for m in BY_LOSSES)])
def test_resumes_bit_for_bit_from_a_file(method: str, meta_steps: int):
    case, resumed = named(make(networks.batch_norm_1d)), make(networks.batch_norm_1d, seed=1)
    optimizer = wrap(case, method)
    train(case, optimizer, meta_steps)
    saved = through_file({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()})
    other = wrap(resumed, method, lr=7.0)
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


@every_method
def test_what_fails_changes_nothing_and_training_goes_on(method: str):
    """A loss that is not finite or raises in the last domain, no batch at all, and a hook before the step."""
    case, oracle = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer, plain = wrap(case, method), wrap(oracle, method)
    train(case, optimizer, 1)
    train(oracle, plain, 1)

    def fails(spoil: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda batch: (spoil if batch is case.batches[2] else lambda x: x)(case.loss(case.model, batch))

    with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match="the loss of batch 2 is inf"):
        optimizer.meta_step(fails(lambda loss: loss * float("inf")), case.batches)
    with nothing_changes(case.model, optimizer), pytest.raises(ZeroDivisionError):
        optimizer.meta_step(fails(lambda loss: 1 / 0), case.batches)
    with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match="batches is empty"):
        optimizer.meta_step(fails(lambda loss: loss), [])
    if method not in ("Fish", "ERM"):
        with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match="at least 2 domains"):
            optimizer.meta_step(fails(lambda loss: loss), case.batches[:1])

    def raises(*_: Any) -> None:
        raise MemoryError

    handle = optimizer.register_step_pre_hook(raises)
    with nothing_changes(case.model, optimizer), pytest.raises(MemoryError):
        train(case, optimizer, 1)
    handle.remove()
    train(case, optimizer, 1)
    train(oracle, plain, 1)
    assert_identical(case.model.state_dict(), oracle.model.state_dict())
    assert_identical(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("method", [name for name in EVERY if name != "IDGM-finite_difference"])  # which rounds more
def test_a_scaler_changes_nothing_but_rounding_and_a_skipped_step_is_forgotten(method: str):
    cases = [make(networks.batch_norm_1d) for _ in range(2)]
    optimizers = [GradMatch(SGD(case.model.parameters(), lr=0.01), EVERY[method](case.model)) for case in cases]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(3):
        train(cases[0], optimizers[0], 1)
        optimizers[1].meta_step(lambda batch: cases[1].loss(cases[1].model, batch), cases[1].batches, scaler)
    torch.testing.assert_close(cases[1].model.state_dict(), cases[0].model.state_dict(), rtol=1e-9, atol=1e-11)
    memory = copy.deepcopy(optimizers[1].state_dict()["gradmatch"].get("memory"))
    weights = copy.deepcopy(dict(cases[1].model.named_parameters()))

    def overflows(batch: Any) -> Any:
        out = cases[1].model(batch[0])
        out.register_hook(lambda gradient: gradient * float("inf"))
        return (out - batch[1]).square().mean()

    if method in ("Fishr", "Fishr later", "matched", "IDGM by strength"):
        optimizers[1].meta_step(overflows, cases[1].batches, scaler)
        assert scaler.get_scale() == 2.0**7
        assert_identical(optimizers[1].state_dict()["gradmatch"].get("memory"), memory)
        assert_identical(dict(cases[1].model.named_parameters()), weights)


@pytest.mark.parametrize("method", [name for name in BY_LOSSES if name != "IDGM by strength"])
def test_a_line_search_remembers_one_evaluation(method: str):
    """LBFGS evaluates again and again; with one evaluation only, what is remembered is the same."""
    memories = []
    for evaluations in (1, 5):
        case = make(networks.batch_norm_eval)
        optimizer = GradMatch(LBFGS(case.model.parameters(), lr=0.01, max_iter=evaluations), EVERY[method](case.model))
        train(case, optimizer, 1)
        memories.append(optimizer.state_dict()["gradmatch"]["memory"])
    assert_identical(memories[0], memories[1])
