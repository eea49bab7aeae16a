"""What a meta-iteration reports: domains by name, cosines of pairs, numbers for a logger."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from functools import partial
from typing import Any

import pytest
import torch
from _models import FeatureNet, assert_identical, loss_of, make_batches
from _operations import waits
from _reference import mean_pairwise_cosine, pairwise_cosines, with_rest
from _second_order import METHODS
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.methods.base import MetaStep

NAMES = ("north", "south", 7)
TRACKING = {
    "Fish": lambda model: Fish(0.5, track_alignment="pairs"),
    "SmoothFish": lambda model: SmoothFish(2.0, 0.1, track_alignment="pairs"),
    "SmoothFish-walk": lambda model: SmoothFish(1.0, 0.1, track_alignment="pairs"),
    "IDGM": lambda model: IDGM(model, track_alignment="pairs"),
    "IDGM-kept": lambda model: IDGM(model, 0.3, keep_graphs=True, track_alignment="pairs"),
}


def net(seed: int = 0) -> FeatureNet:
    model = FeatureNet(torch.Generator().manual_seed(seed))
    return model.eval()  # the same function wherever it is called


def batches(seed: int = 1) -> list[Any]:
    return make_batches(torch.Generator().manual_seed(seed), len(NAMES))


def linear(**settings: Any) -> tuple[nn.Parameter, GradMatch[Fish]]:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    return w, GradMatch(SGD([w], lr=0.1), Fish(0.5, **settings))


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("method", "kind"), [("Fish", dict), ("Fish", UserDict), ("SmoothFish", dict), ("IDGM", dict)])
def test_a_mapping_trains_as_the_list_of_its_values_and_names_the_domains(method: str, kind: Any):
    models, reports = [], []
    for named in (False, True):
        model = net().train()
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1), METHODS[method](model))
        given = batches()
        report = optimizer.meta_step(partial(loss_of, model), kind(zip(NAMES, given, strict=True)) if named else given)
        assert optimizer.last_meta_step is report
        models.append(model)
        reports.append(report)
    assert_identical(models[0].state_dict(), models[1].state_dict())
    assert torch.equal(reports[0].losses, reports[1].losses)
    assert [r.domains for r in reports] == [None, NAMES]


class NamedList(list[Any]):
    domains = NAMES


def test_a_list_that_knows_its_domains_names_them():
    model = net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5))
    assert optimizer.meta_step(partial(loss_of, model), NamedList(batches())).domains == NAMES
    with pytest.raises(ValueError, match=r"batches holds 2 batches of 3 domains \('north', 'south', 7\)"):
        optimizer.meta_step(partial(loss_of, model), NamedList(batches()[:2]))
    assert optimizer.meta_step(partial(loss_of, model), batches()).domains is None


def test_names_are_those_of_the_call_in_progress_only():
    w, optimizer = linear()
    optimizer.meta_step(lambda x: (w * x).sum(), {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"the loss of batch 0 is nan"):
        optimizer.meta_step(lambda x: (w * x).sum(), [float("nan")])


def step_each(w: nn.Parameter, optimizer: GradMatch[Fish], values: Any, names: Any) -> MetaStep | None:
    for value, optimizer.domain in zip(values, names, strict=True):
        optimizer.zero_grad()
        (w * value).sum().backward()
        optimizer.step()
        assert optimizer.domain is None
    return optimizer.last_meta_step


def test_a_loop_that_names_the_domain_of_every_step_reports_as_a_mapping():
    (w, optimizer), (v, whole) = linear(inner_steps=3, track_alignment="pairs"), linear(track_alignment="pairs")
    for values, names in ((1.0, 2.0, 3.0), NAMES), ((2.0, 5.0, 4.0), NAMES[::-1]):
        report = step_each(w, optimizer, values, names)
        expected = whole.meta_step(lambda x: (v * x).sum(), dict(zip(names, values, strict=True)))
        assert report.domains == names == expected.domains
        assert report.scalars() == {k: n for k, n in expected.scalars().items() if not k.startswith("loss")}
    assert torch.equal(w, v)


def test_names_of_a_loop_are_whole_or_none_and_of_one_inner_loop():
    w, optimizer = linear(inner_steps=2, track_alignment=True)
    assert step_each(w, optimizer, (1.0, 2.0), ("a", None)).domains is None
    step_each(w, optimizer, (1.0,), "a")
    optimizer.rollback()
    assert step_each(w, optimizer, (1.0, 2.0), "bc").domains == ("b", "c")
    step_each(w, optimizer, (1.0,), "a")
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.rollback()
    step_each(w, optimizer, (1.0,), "b")
    optimizer.load_state_dict(state)
    assert step_each(w, optimizer, (1.0,), "c").domains is None  # the checkpoint has no names
    step_each(w, optimizer, (1.0,), "a")
    twin = pickle.loads(pickle.dumps(optimizer))
    assert step_each(twin.param_groups[0]["params"][0], twin, (2.0,), "b").domains == ("a", "b")


def test_a_name_that_is_no_label_is_an_error():
    _, optimizer = linear()
    with pytest.raises(TypeError, match=r"domain should be a label, .* \(got tensor\(1\)\)"):
        optimizer.domain = torch.tensor(1)
    assert optimizer.domain is None


# ----------------------------------------------------------------------------------------------------------- pairs


def gradients_taken(model: nn.Module, given: list[Any], method: str) -> list[Tensor]:
    """At theta, or along the walk by SGD with the same step: Fish and SmoothFish at gamma 1."""
    along = method in ("Fish", "SmoothFish-walk")
    plain, gradients = copy.deepcopy(model), []
    for batch in given:
        parameters = [p for p in plain.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss_of(plain, batch), parameters, allow_unused=True)
        gradients.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1)
                                    for p, g in zip(parameters, found, strict=True)]))  # fmt: skip
        with torch.no_grad():
            for p, g in zip(parameters, found, strict=True):
                if g is not None and along:
                    p.sub_(g, alpha=0.1)
    return gradients


@pytest.mark.parametrize("method", TRACKING)
def test_cosines_of_pairs_are_those_of_the_gradients_taken(method: str):
    model, given = net(), batches()
    gradients = gradients_taken(model, given, method)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), TRACKING[method](model))
    report = optimizer.meta_step(partial(loss_of, model), dict(zip(NAMES, given, strict=True)))
    torch.testing.assert_close(report.cosines, pairwise_cosines(gradients), rtol=0, atol=1e-12)
    torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients), rtol=0, atol=1e-12)
    torch.testing.assert_close(report.agreement_with_rest, with_rest(gradients), rtol=0, atol=1e-9)
    assert report.domains == NAMES


def test_without_the_cosines_of_pairs_nothing_is_said_of_the_rest():
    model = net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, 0.3, "cosine", track_alignment=True))
    report = optimizer.meta_step(partial(loss_of, model), batches())
    assert report.cosine is not None
    assert report.agreement_with_rest is None


def test_a_manual_loop_measures_pairs_but_not_over_a_checkpoint_in_its_middle():
    """What was measured before is not in the checkpoint; that after it alone would be of other domains each time."""
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)

    def train(w: nn.Parameter, optimizer: GradMatch[Fish], steps: Tensor) -> None:
        for g in steps:
            optimizer.zero_grad()
            (w * g).sum().backward()
            optimizer.step()

    w, optimizer = linear(inner_steps=3, track_alignment="pairs")
    train(w, optimizer, gradients[:2])
    resumed_w, resumed = linear(inner_steps=3, track_alignment="pairs")
    resumed_w.data.copy_(w)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train(w, optimizer, gradients[2:])
    train(resumed_w, resumed, gradients[2:])
    torch.testing.assert_close(optimizer.last_meta_step.cosines, pairwise_cosines(list(gradients)))
    assert optimizer.last_meta_step.losses is None
    assert torch.equal(resumed_w, w)
    assert resumed.last_meta_step == MetaStep()
    train(resumed_w, resumed, gradients)
    torch.testing.assert_close(resumed.last_meta_step.cosines, pairwise_cosines(list(gradients)))


def test_turning_pairs_on_and_off_takes_effect_at_the_next_meta_iteration():
    w, optimizer = linear(track_alignment=True)
    for tracking, measured in ((True, False), ("pairs", True), (True, False), ("pairs", True)):
        optimizer.method.track_alignment = tracking
        report = optimizer.meta_step(lambda x: (w * x).sum(), [1.0, 2.0])
        assert (report.cosines is not None) is measured
        assert report.cosine is not None


# --------------------------------------------------------------------------------------------------------- scalars


def test_scalars_are_the_means_and_the_domains_by_name():
    w, optimizer = linear(track_alignment="pairs")
    report = optimizer.meta_step(lambda x: (w * x).sum() + x[0], {"a": torch.tensor([3.0, 4.0]), 2: torch.ones(2)})
    found = report.scalars("train/")
    assert found == {
        "train/loss": float(report.losses.mean()),
        "train/loss/a": float(report.losses[0]),
        "train/loss/2": float(report.losses[1]),
        "train/grad_norm": float(report.grad_norms.mean()),
        "train/grad_norm/a": 5.0,
        "train/grad_norm/2": pytest.approx(2**0.5),
        "train/inner_product": 7.0,
        "train/cosine": pytest.approx(7 / 50**0.5),
        "train/agreement_with_rest/a": pytest.approx(7 / 50**0.5),
        "train/agreement_with_rest/2": pytest.approx(7 / 50**0.5),
    }
    assert all(type(value) is float for value in found.values())


def test_scalars_hold_what_was_measured_only():
    assert MetaStep().scalars() == {}
    assert MetaStep(torch.tensor([1.0, 3.0])).scalars() == {"loss": 2.0}
    assert set(MetaStep(None, torch.ones(()), torch.ones(()), torch.ones(2)).scalars()) == {
        "grad_norm", "inner_product", "cosine"
    }  # fmt: skip


def test_nothing_waits_before_scalars_and_they_wait_once():
    model = net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, track_alignment=True, nonfinite="ignore"))
    with waits() as before:
        report = optimizer.meta_step(partial(loss_of, model), dict(zip(NAMES, batches(), strict=True)))
    with waits() as then:
        report.scalars()
    assert (before, then) == ([], ["tolist"])
