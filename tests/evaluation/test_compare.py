"""``compare`` on models of many kinds: it changes nothing, and says what it measured."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import Case, cross_entropy, make
from test_trial import state_of_everything
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW

from torch_gradmatch import IDGM, Choice, Comparison, Fish, GradMatch, Recipe, SmoothFish, compare, fish_gamma
from torch_gradmatch.evaluation import cost
from torch_gradmatch.evaluation.compare import default_methods
from torch_gradmatch.methods.base import MetaLoop, Method

BRIEF: dict[str, Any] = {"rounds": 1, "orders": 2, "show": False}


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cost, "SHORTEST_TIMING", 1e-9)
    gc.freeze()  # measuring memory collects garbage, among all that other tests have imported
    yield
    gc.unfreeze()


def trained(case: Case, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Take a few steps of ordinary training, and leave gradients behind."""
    for batch in case.batches:
        optimizer.zero_grad()
        case.loss(case.model, batch).backward()
        optimizer.step()
    return optimizer


# --------------------------------------------------------------------------------------------------- changes nothing


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


class Encoder(nn.Module):
    """A new user's own small Transformer: tokens to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def transformer_of_a_new_user() -> Case:
    return Case(Encoder(), cross_entropy, [(torch.randint(50, (8, 12)), torch.randint(2, (8,))) for _ in range(4)])


def test_a_new_users_transformer_gets_an_answer_and_keeps_everything(capsys: pytest.CaptureFixture[str]):
    case = make(transformer_of_a_new_user)
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
    head = next(name for name, module in reversed(list(case.model.named_modules())) if type(module) is nn.Linear)
    names = ["ERM", *default_methods(case.model, 1e-3, 4, head)]
    assert names[-3:] == ["IDGM, head", "IDGM, head, keep_graphs", "Fishr"]
    assert [row.name for row in found.rows] == names
    assert not any(row.error for row in found.rows)
    assert all(len(found[name].cost.of_erm) == 5 for name in names[1:])
    assert max(map(len, printed.splitlines())) <= 130
    trained(case, optimizer)  # and it goes on


def test_in_the_middle_of_the_users_own_inner_loop():
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(Adam(case.model.parameters(), lr=1e-3), Fish(0.5, inner_steps=5, model=case.model))
    trained(case, optimizer)
    before = state_of_everything(case.model, optimizer)
    compare(case.model, case.loss, case.batches, optimizer=optimizer, **BRIEF)
    assert_identical(state_of_everything(case.model, optimizer), before)
    assert optimizer.inner_step == 3
    trained(case, optimizer)
    assert optimizer.inner_step == 1


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


# ------------------------------------------------------------------------------------------------------------- figures


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
    assert found["Fish"].fidelity.gamma == pytest.approx(fish_gamma(lr, 3), rel=0.02)
    assert found["SmoothFish"].fidelity.gamma == pytest.approx(fish_gamma(lr, 3), rel=0.02)
    assert found["IDGM"].fidelity.gamma == pytest.approx(fish_gamma(lr, 3), rel=1e-6)
    symmetric = found["SmoothFish, symmetric"].fidelity
    assert symmetric.gamma == pytest.approx(fish_gamma(lr, 3), rel=0.02)
    assert min(symmetric.cosines) > 0.999  # of any order
    json.dumps(dataclasses.asdict(found))
    with pytest.raises(KeyError, match="Sharpness"):
        found["Sharpness"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told on Linux")
def test_peak_memory_shows_the_kept_graphs():
    """In a process of its own: what other tests have freed, and glibc has kept, would count as there or not."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [sys.executable, "-c", PEAKS]
    run = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120, env=environment)
    peaks = json.loads(run.stdout)
    activations = 512 * 2048 * 4  # one layer's, in one domain
    assert peaks["kept"] > peaks["streaming"] + 6 * activations
    assert peaks["ERM"] < peaks["streaming"]


PEAKS = """
import json

import torch
from torch import nn
from torch.optim import SGD

from torch_gradmatch import IDGM
from torch_gradmatch.evaluation import cost
from torch_gradmatch.evaluation.trial import Trial

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 64), nn.Tanh())
batches = [torch.randn(512, 64) for _ in range(8)]
methods = {"streaming": IDGM(model, 0.1), "kept": IDGM(model, 0.1, keep_graphs=True)}
with Trial(model, lambda x: model(x).square().mean(), batches, SGD(model.parameters(), lr=0.1)) as trial:
    found, errors = cost.costs(trial, methods, 1)
assert not errors
print(json.dumps({name: one.peak_bytes for name, one in found.items()}))
"""


def test_a_direction_lost_in_rounding_is_said():
    case = make(networks.batch_norm_1d)
    found = compare(case.model, case.loss, case.batches, optimizer=SGD(case.model.parameters(), lr=1e-17), **BRIEF)
    assert "lost in rounding" in str(found)


@dataclasses.dataclass
class Broken(Method):
    message: str

    def make_loop(self, optimizer: Any) -> MetaLoop:
        raise RuntimeError(self.message)


def test_a_method_that_fails_is_named_and_the_others_go_on():
    case = make(networks.sparse_embedding)  # torch has no forward derivative of it
    methods = {"mine": Broken("no such luck"), "forward": IDGM(case.model, 0.1, hvp="forward"), "Fish": Fish()}
    found = compare(case.model, case.loss, case.batches, methods, SGD(case.model.parameters(), 0.01), **BRIEF)
    assert found["mine"].error == "no such luck"
    assert found["mine"].cost is None
    assert "hvp" in found["forward"].error
    assert found["Fish"].fidelity is not None
    assert "mine failed: no such luck" in str(found)


@dataclasses.dataclass
class BreaksLater(Fish):
    """Works a few times, then fails without a word."""

    left: int = 3

    def make_loop(self, optimizer: Any) -> MetaLoop:
        loop = super().make_loop(optimizer)
        whole = loop.meta_step

        def meta_step(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise NotImplementedError
            return whole(*arguments)

        loop.meta_step = meta_step
        return loop


def test_a_method_that_fails_later_without_a_word_is_named_too():
    case = make(networks.batch_norm_1d)
    methods = {"mine": BreaksLater(), "exact": IDGM(case.model, 0.1)}
    optimizer = SGD(case.model.parameters(), 0.01)
    before = state_of_everything(case.model, optimizer)
    found = compare(case.model, case.loss, case.batches, methods, optimizer, **{**BRIEF, "rounds": 3})
    assert_identical(state_of_everything(case.model, optimizer), before)
    assert found["mine"].error == "NotImplementedError"
    assert found["mine"].cost is None
    assert "mine failed: NotImplementedError" in str(found)
    assert len(found["exact"].cost.of_erm) == 3


def test_without_second_derivatives_the_reference_is_by_finite_differences():
    case = make(networks.batch_norm_1d)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (Opaque.apply(case.model(batch[0])) - batch[1]).square().mean()

    found = compare(case.model, loss_fn, case.batches, optimizer=SGD(case.model.parameters(), lr=1e-4), **BRIEF)
    assert "By finite differences for the inner_product: " in found.reference
    assert "finite_difference" in found["IDGM"].error
    printed = str(found).replace("\n", " ")
    assert "IDGM; IDGM, keep_graphs; IDGM, one_pass failed: " in printed
    assert found["IDGM, finite_difference"].fidelity.cosine == pytest.approx(1.0, abs=1e-4)
    assert found["Fish"].fidelity.cosine > 0.99


def test_every_method_is_measured_against_what_it_matches():
    case = make(networks.batch_norm_1d)
    methods = {
        "Fish": Fish(),
        "variance": IDGM(case.model, 0.5, "variance"),
        "product": IDGM(case.model, 0.1, "inner_product"),
        "cosine": IDGM(case.model, 0.2, "cosine"),
    }
    optimizer = SGD(case.model.parameters(), lr=1e-4)
    found = compare(case.model, case.loss, case.batches, methods, optimizer, **BRIEF)
    assert [row.fidelity.agreement for row in found.rows[2:]] == ["variance", "inner_product", "cosine"]
    for name, gamma in (("variance", 0.5), ("product", 0.1), ("cosine", 0.2)):
        assert found[name].fidelity.cosine == pytest.approx(1.0, abs=1e-9)
        assert found[name].fidelity.gamma == pytest.approx(gamma, rel=1e-6)
        assert f"\n{name}".ljust(9) in str(found)
    assert found["Fish"].fidelity.gamma == pytest.approx(fish_gamma(1e-4, 3), rel=0.05)


def test_a_loss_with_a_memory_is_named_once():
    case = make(networks.batch_norm_1d)
    calls = itertools.count(1)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return case.loss(case.model, batch) * (1 + 0.1 * next(calls))

    found = compare(case.model, loss_fn, case.batches, optimizer=SGD(case.model.parameters(), lr=1e-4), **BRIEF)
    assert found["Fish"].cost is not None
    assert "not the same twice" in found["SmoothFish, symmetric"].error
    printed = str(found).replace("\n", " ")
    assert printed.count("is not the same twice") <= 3
    assert "No fidelity for the inner_product: " in printed


def test_a_gradient_penalty_in_the_loss_is_no_hindrance():
    case = make(networks.batch_norm_1d)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(case.model(x).sum(), x, create_graph=True)
        return case.loss(case.model, batch) + slope.square().mean()

    found = compare(case.model, loss_fn, case.batches, optimizer=SGD(case.model.parameters(), lr=1e-5), **BRIEF)
    assert found["IDGM"].fidelity.cosine == pytest.approx(1.0, abs=1e-6)


def test_lbfgs_has_costs_and_no_fidelity():
    case = make(networks.batch_norm_1d)
    optimizer = LBFGS(case.model.parameters(), lr=0.1, max_iter=3)
    before = state_of_everything(case.model, optimizer)
    found = compare(case.model, case.loss, case.batches, {"Fish": Fish(), "exact": IDGM(case.model, 0.1)}, optimizer)
    assert_identical(state_of_everything(case.model, optimizer), before)
    assert not any(row.error for row in found.rows)
    assert found["Fish"].fidelity is None
    assert found["Fish"].cost.evaluations > 3


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


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "net"}, TypeError, "model should be"),
        ({"batches": []}, ValueError, "domain"),
        ({"batches": [1]}, ValueError, "domain"),
        ({"methods": {"a": 3}}, TypeError, r"methods\['a'\] should be a name, a method object .* \(got int\)"),
        ({"methods": [Fish(), Fish(0.25)]}, ValueError, r"should have a name each \(got 'Fish' twice\)"),
        ({"methods": "Fish"}, TypeError, "methods should be a list or a mapping"),
        ({"methods": {"mine": Recipe(train=print)}}, ValueError, r"methods\['mine'\] should have a method of one"),
        ({"loss_fn": [1, 2]}, TypeError, r"loss_fn should be a function \(got list\): the order is model, loss_fn"),
        ({"methods": {"ERM": Fish()}}, ValueError, "another name than 'ERM'"),
        ({"optimizer": 3}, TypeError, "optimizer should be None or"),
        ({"optimizer": SGD([nn.Parameter(torch.ones(2))], 0.1)}, ValueError, "is not in the model"),
        ({"optimizer": "warm-up"}, ValueError, r"learning rate should be greater than 0 \(got 0.0\)"),
        ({"rounds": 0}, ValueError, "rounds should be"),
        ({"orders": 3}, ValueError, "orders should be even"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str):
    case = make(networks.batch_norm_1d)
    arguments: dict[str, Any] = {"model": case.model, "loss_fn": case.loss, "batches": case.batches, **BRIEF}
    if changed.get("optimizer") == "warm-up":
        changed = {"optimizer": SGD(case.model.parameters(), lr=0.0)}
    with pytest.raises(error, match=message):
        compare(**{**arguments, **changed})


@pytest.mark.parametrize("wrong", ["vector", "constant", "nan"])
def test_a_wrong_loss_is_named(wrong: str):
    case = make(networks.batch_norm_1d)
    losses = {
        "vector": lambda model, batch: model(batch[0]).square().sum(1),
        "constant": lambda model, batch: torch.ones(()),
        "nan": lambda model, batch: case.loss(model, batch) * math.nan,
    }
    before = state_of_everything(case.model, SGD(case.model.parameters(), lr=0.1))
    with pytest.raises((ValueError, RuntimeError)):
        compare(case.model, losses[wrong], case.batches, **BRIEF)
    assert_identical(state_of_everything(case.model, SGD(case.model.parameters(), lr=0.1)), before)
