"""``compare`` on models of many kinds: it changes nothing, and says what it measured."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import Case, cross_entropy, make
from _study import short_timings, state_of_everything
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from torch_gradmatch import IDGM, Choice, Comparison, Fish, GradMatch, Recipe, SmoothFish, compare, fish_gamma
from torch_gradmatch.evaluation.compare import default_methods
from torch_gradmatch.methods.base import MetaLoop

BRIEF: dict[str, Any] = {"rounds": 1, "orders": 2, "show": False}


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    short_timings(monkeypatch)


def trained(case: Case, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Take a few steps of ordinary training, and leave gradients behind."""
    for batch in case.batches:
        optimizer.zero_grad()
        case.loss(case.model, batch).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("build", networks.PLAIN + networks.WITHOUT_DIFFERENCES)
def test_nothing_changes(build: Any):
    case = make(build)
    momentum = 0.0 if build is networks.sparse_embedding else 0.9  # a sparse one cannot be compared with anything
    optimizer = trained(case, SGD(case.model.parameters(), lr=0.01, momentum=momentum))
    before = state_of_everything(case.model, optimizer)
    found = compare(case.model, case.loss, case.batches, optimizer=optimizer, **BRIEF)
    assert_identical(state_of_everything(case.model, optimizer), before)
    assert found["Fish"].error is None
    assert found["IDGM"].error is None
    assert found["IDGM"].fidelity.cosine == pytest.approx(1.0, abs=1e-6)


def test_a_new_user_gets_an_answer_and_keeps_everything(capsys: pytest.CaptureFixture[str]):
    case = make(networks.transformer)
    optimizer = AdamW(case.model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    trained(case, optimizer)
    scheduler.step()
    before = state_of_everything(case.model, optimizer), scheduler.state_dict()
    found = compare(case.model, case.loss, case.batches, optimizer=optimizer)
    assert_identical((state_of_everything(case.model, optimizer), scheduler.state_dict()), before)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "AdamW(lr=0.000" in printed
    names = ["ERM", *default_methods(case.model, 1e-3, 3, "head")]
    assert names[-3:] == ["IDGM, head", "IDGM, head, keep_graphs", "Fishr"]
    assert [row.name for row in found.rows] == names
    assert not any(row.error for row in found.rows)
    assert all(len(found[name].cost.of_erm) == 5 for name in names[1:])
    assert max(map(len, printed.splitlines())) <= 130
    trained(case, optimizer)  # and it goes on


def test_the_users_own_inner_loop_does_not_notice():
    case = make(networks.batch_norm_1d)
    own = GradMatch(Adam(case.model.parameters(), lr=1e-3), Fish(0.5, inner_steps=5, model=case.model))
    twin = copy.deepcopy((case.model, own))
    for model, optimizer, compares in ((case.model, own, True), (*twin, False)):
        for step, batch in enumerate(case.batches * 4):
            if step == 5:
                with torch.no_grad():
                    model[1].running_mean.fill_(3.0)  # between two inner loops: the next one starts from here
            if compares and step in (3, 5):
                before = state_of_everything(model, optimizer)
                compare(model, case.loss, case.batches, optimizer=optimizer, **BRIEF)
                assert_identical(state_of_everything(model, optimizer), before)
            optimizer.zero_grad()
            case.loss(model, batch).backward()
            optimizer.step()
    assert_identical(case.model.state_dict(), twin[0].state_dict())
    assert_identical(own.state_dict(), twin[1].state_dict())


@pytest.mark.parametrize("when", ["at once", "in the last domain", "after many evaluations"])
def test_nothing_changes_when_the_loss_raises(when: str):
    case = make(networks.batch_norm_1d)
    optimizer = trained(case, Adam(case.model.parameters()))
    calls = itertools.count()

    def failing(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) >= {"at once": 0, "in the last domain": 2, "after many evaluations": 100}[when]:
            raise KeyError("on purpose")
        return case.loss(case.model, batch)

    before = state_of_everything(case.model, optimizer)
    with pytest.raises(KeyError, match="on purpose"):
        compare(case.model, failing, case.batches, optimizer=optimizer, **{**BRIEF, "rounds": 3})
    assert_identical(state_of_everything(case.model, optimizer), before)


def test_the_figures_are_those_of_the_methods():
    case = make(networks.batch_norm_1d)
    lr = 1e-4
    found = compare(case.model, case.loss, case.batches, optimizer=SGD(case.model.parameters(), lr=lr), **BRIEF)
    evaluations = {row.name: row.cost.evaluations for row in found.rows if row.cost}
    assert evaluations["ERM"] == evaluations["Fish"] == evaluations["IDGM, keep_graphs"] == 3
    assert evaluations["SmoothFish"] == 3  # a walk alone
    assert evaluations["SmoothFish, symmetric"] == 3 * 3 - 2
    assert evaluations["IDGM"] == 2 * 3 - 1  # one graph is kept
    assert evaluations["IDGM, one_pass"] == 3
    assert set(found["ERM"].cost.of_erm) == {1.0}
    assert all(row.cost.seconds[0] > 0 for row in found.rows if row.cost)
    for name, tolerance in (("Fish", 0.02), ("SmoothFish", 0.02), ("SmoothFish, symmetric", 0.02), ("IDGM", 1e-6)):
        assert found[name].fidelity.gamma == pytest.approx(fish_gamma(lr, 3), rel=tolerance)
    assert min(found["SmoothFish, symmetric"].fidelity.cosines) > 0.999  # of any order
    json.dumps(dataclasses.asdict(found))
    with pytest.raises(KeyError, match="Sharpness"):
        found["Sharpness"]


PEAKS = """
import torch
from torch import nn
from torch_gradmatch import IDGM
from torch_gradmatch.evaluation import cost
from torch_gradmatch.evaluation.trial import Trial

cost.SHORTEST_TIMING = 1e-9
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 64), nn.Tanh())
batches = [torch.randn(128, 64) for _ in range(8)]
methods = {"streaming": IDGM(model, 0.1), "kept": IDGM(model, 0.1, keep_graphs=True)}
with Trial(model, lambda x: model(x).square().mean(), batches, torch.optim.SGD(model.parameters(), lr=0.1)) as trial:
    found, errors = cost.costs(trial, methods, 1)
assert not errors
print(*(found[name].peak_bytes for name in ("ERM", "streaming", "kept")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told on Linux")
def test_peak_memory_shows_the_kept_graphs():
    """In a process of its own: what other tests have freed, and glibc has kept, would count as there or not."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [sys.executable, "-c", PEAKS]
    run = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120, env=environment)
    erm, streaming, kept = map(int, run.stdout.split())
    activations = 128 * 2048 * 4  # one layer's, in one domain
    assert kept > streaming + 6 * activations
    assert erm < streaming


@dataclasses.dataclass
class Broken(Fish):
    """Works a few times, then fails."""

    error: Exception = dataclasses.field(default_factory=NotImplementedError)
    left: int = 0

    def make_loop(self, optimizer: Any) -> MetaLoop:
        loop = super().make_loop(optimizer)
        whole = loop.meta_step

        def meta_step(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error
            return whole(*arguments)

        loop.meta_step = meta_step
        return loop


def test_a_method_that_fails_is_named_and_the_others_go_on():
    case = make(networks.sparse_embedding)  # torch has no forward derivative of it
    methods = {
        "mine": Broken(error=RuntimeError("no such luck")),
        "later, without a word": Broken(left=3),
        "forward": IDGM(case.model, 0.1, hvp="forward"),
        "Fish": Fish(),
    }
    optimizer = SGD(case.model.parameters(), 0.01)
    before = state_of_everything(case.model, optimizer)
    found = compare(case.model, case.loss, case.batches, methods, optimizer, **{**BRIEF, "rounds": 3})
    assert_identical(state_of_everything(case.model, optimizer), before)
    for name, error in (("mine", "no such luck"), ("later, without a word", "NotImplementedError")):
        assert found[name].error == error
        assert found[name].cost is None
        assert f"{name} failed: {error}" in str(found)
    assert "hvp" in found["forward"].error
    assert len(found["Fish"].cost.of_erm) == 3
    assert found["Fish"].fidelity is not None


def test_other_forms_of_the_arguments():
    case = make(networks.batch_norm_1d)
    case.model.float()
    batches = ((x.float(), y.float()) for x, y in case.batches)
    found = compare(case.model, case.loss, batches, [SmoothFish(2.0, 0.01), Fish(0.3)], **BRIEF)
    assert "SGD(lr=0.01)" in found.setting
    assert [row.name.split("(")[0] for row in found.rows if row.cost] == ["ERM", "SmoothFish", "Fish"]
    assert isinstance(found, Comparison)
    assert math.isfinite(found.rows[1].fidelity.gamma)


def test_names_objects_and_recipes_as_for_leave_one_domain_out():
    """Also a function that makes the model, and one that makes the optimizer."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = {name: (torch.randn(8, 3), torch.randint(2, (8,))) for name in ("north", "south", "west")}
    methods = {
        "ERM": "ERM",
        "whole": "IDGM, one_pass", "balanced": "ERM, balanced", "mine": IDGM(model, 0.1, matched=model[2]),
        "searched": Recipe(lambda m, s: Fish(s["meta_lr"], model=m), {"meta_lr": Choice((0.25,))}),
        "head": "IDGM, head",
    }  # fmt: skip
    found = compare(lambda: copy.deepcopy(model), cross_entropy, batches, methods, torch.optim.Adam, head="2", **BRIEF)
    assert [row.name for row in found.rows] == list(methods)
    assert not any(row.error for row in found.rows)
    assert [row.name for row in found.rows if row.fidelity] == ["whole", "searched"]
    assert "Adam(lr=0.001)" in found.setting


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model should be"),
        ({"batches": []}, ValueError, "domain"),
        ({"batches": [1]}, ValueError, "domain"),
        ({"methods": {"a": 3}}, TypeError, r"methods\['a'\] should be a name, a method object .* \(got int\)"),
        ({"methods": {"mine": Recipe(train=print)}}, ValueError, r"methods\['mine'\] should have a method of one"),
        ({"loss_fn": [1, 2]}, TypeError, r"loss_fn should be a function \(got list\): the order is model, loss_fn"),
        ({"methods": {"ERM": Fish()}}, ValueError, "another name than 'ERM'"),
        ({"optimizer": 3}, TypeError, "optimizer should be None or"),
        ({"optimizer": SGD([nn.Parameter(torch.ones(2))], 0.1)}, ValueError, "is not in the model"),
        ({"optimizer": lambda p, **_: SGD(p, lr=0.0)}, ValueError, r"rate should be greater than 0 \(got 0.0\)"),
        ({"rounds": 0}, ValueError, "rounds should be"),
        ({"orders": 3}, ValueError, "orders should be even"),
        ({"loss_fn": lambda m, b: m(b[0]).square().sum(1)}, ValueError, "scalar"),
        ({"loss_fn": lambda m, b: torch.ones(())}, ValueError, "does not depend on any parameter"),
        ({"loss_fn": lambda m, b: m(b[0]).sum() * math.nan}, ValueError, "mean loss of the batches is nan"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named_and_nothing_changes(changed: dict[str, Any], error: type[Exception], message: str):
    case = make(networks.batch_norm_1d)
    own: dict[str, Any] = {"model": case.model, "loss_fn": case.loss, "batches": case.batches, **BRIEF}
    before = state_of_everything(case.model, SGD(case.model.parameters(), lr=0.1))
    with pytest.raises(error, match=message):
        compare(**{**own, **changed})
    assert_identical(state_of_everything(case.model, SGD(case.model.parameters(), lr=0.1)), before)
