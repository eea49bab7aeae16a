"""What a meta-iteration reports: domains by name, cosines of pairs, numbers for a logger."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net
from _models import assert_identical, loss_of
from _operations import waits
from _reference import mean_pairwise_cosine, pairwise_cosines, with_rest
from _second_order import METHODS
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.methods.base import MetaStep

NAMES = ("north", "south", 7)


def linear(**settings: Any) -> tuple[nn.Parameter, GradMatch[Fish]]:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    return w, GradMatch(SGD([w], lr=0.1), Fish(0.5, **settings))


def step_each(w: nn.Parameter, optimizer: GradMatch[Fish], values: Any, names: Any) -> MetaStep | None:
    """Take a step of a manual loop on each of the gradients, and say of which domain."""
    for value, optimizer.domain in zip(values, names, strict=True):
        optimizer.zero_grad()
        (w * value).sum().backward()
        optimizer.step()
        assert optimizer.domain is None
    return optimizer.last_meta_step


class NamedList(list[Any]):
    domains = NAMES


@pytest.mark.parametrize(
    ("method", "kind"),
    [("Fish", dict), ("Fish", UserDict), ("Fish", NamedList), ("SmoothFish", dict), ("IDGM", dict)],
)
def test_a_mapping_or_a_list_that_knows_trains_as_any_list_and_names_the_domains(method: str, kind: Any):
    models, reports = [], []
    for named in (False, True):
        model, given = feature_net(), batches(3)
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1), METHODS[method](model))
        if named:
            given = kind(given if kind is NamedList else zip(NAMES, given, strict=True))
        reports.append(optimizer.meta_step(partial(loss_of, model), given))
        assert optimizer.last_meta_step is reports[-1]
        models.append(model)
    assert_identical(models[0].state_dict(), models[1].state_dict())
    assert torch.equal(reports[0].losses, reports[1].losses)
    assert [r.domains for r in reports] == [None, NAMES]


def test_a_list_that_knows_others_is_refused_and_names_are_those_of_the_call_in_progress_only():
    w, optimizer = linear()
    optimizer.meta_step(lambda x: (w * x).sum(), {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"batches holds 2 batches of 3 domains \('north', 'south', 7\)"):
        optimizer.meta_step(lambda x: (w * x).sum(), NamedList([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"the loss of batch 0 is nan"):
        optimizer.meta_step(lambda x: (w * x).sum(), [float("nan")])


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


def gradients_taken(model: nn.Module, method: str) -> list[Tensor]:
    """At theta, or along the walk by SGD with the same step: Fish and SmoothFish at gamma 1."""
    parameters, gradients = [p for p in model.parameters() if p.requires_grad], []
    for batch in batches(3):
        found = torch.autograd.grad(loss_of(model, batch), parameters, materialize_grads=True, allow_unused=True)
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
        if method in ("Fish", "SmoothFish-walk"):
            with torch.no_grad():
                for p, g in zip(parameters, found, strict=True):
                    p.sub_(g, alpha=0.1)
    return gradients


@pytest.mark.parametrize("method", ["Fish", "SmoothFish", "SmoothFish-walk", "IDGM", "IDGM-kept"])
def test_cosines_of_pairs_are_those_of_the_gradients_taken(method: str):
    model = feature_net().eval()  # the same function wherever it is called
    gradients = gradients_taken(copy.deepcopy(model), method)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), METHODS[method](model))
    for tracking in (True, "pairs"):
        optimizer.method.track_alignment = tracking  # takes effect at the next meta-iteration
        values = copy.deepcopy(model.state_dict())
        report = optimizer.meta_step(partial(loss_of, model), dict(zip(NAMES, batches(3), strict=True)))
        torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients), rtol=0, atol=1e-12)
        assert (report.cosines is None) is (report.agreement_with_rest is None) is (tracking is True)
        model.load_state_dict(values)
    torch.testing.assert_close(report.cosines, pairwise_cosines(gradients), rtol=0, atol=1e-12)
    torch.testing.assert_close(report.agreement_with_rest, with_rest(gradients), rtol=0, atol=1e-9)
    assert report.domains == NAMES


def test_a_manual_loop_measures_pairs_but_not_over_a_checkpoint_in_its_middle():
    """What was measured before is not in the checkpoint; that after it alone would be of other domains each time."""
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    (w, optimizer), (resumed_w, resumed) = (linear(inner_steps=3, track_alignment="pairs") for _ in range(2))
    step_each(w, optimizer, gradients[:2], [None] * 2)
    resumed_w.data.copy_(w)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    report = step_each(w, optimizer, gradients[2:], [None])
    torch.testing.assert_close(report.cosines, pairwise_cosines(list(gradients)))
    assert report.losses is None
    assert step_each(resumed_w, resumed, gradients[2:], [None]) == MetaStep()
    assert torch.equal(resumed_w, w)
    report = step_each(resumed_w, resumed, gradients, [None] * 3)
    torch.testing.assert_close(report.cosines, pairwise_cosines(list(gradients)))


def test_scalars_are_the_means_and_the_domains_by_name():
    w, optimizer = linear(track_alignment="pairs")
    report = optimizer.meta_step(lambda x: (w * x).sum() + x[0], {"a": torch.tensor([3.0, 4.0]), 2: torch.ones(2)})
    with waits() as waited:
        found = report.scalars("train/")
    assert waited == ["tolist"]
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
    names = {"grad_norm", "inner_product", "cosine"}
    assert set(MetaStep(None, torch.ones(()), torch.ones(()), torch.ones(2)).scalars()) == names
