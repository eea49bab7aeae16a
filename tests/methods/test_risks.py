"""ERM, VREx, GroupDRO and Aggregate: their objectives by plain autograd, and what they remember."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net
from _models import DOMAINS, assert_same_model, domain_loss, loss_of, small_network
from _second_order import nothing_changes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import ERM, Aggregate, GradMatch, GroupDRO, VREx

BETA, ETA = 0.7, 0.5
EVERY: dict[str, Any] = {
    "ERM": ERM,
    "VREx": partial(VREx, BETA),
    "GroupDRO": partial(GroupDRO, ETA),
    "Aggregate": partial(Aggregate, lambda matrix: matrix.mean(0)),
}
every_risk = pytest.mark.parametrize("name", EVERY)


def objective(name: str, losses: Tensor, q: Tensor) -> Tensor:
    if name == "VREx":
        return losses.mean() + BETA * (losses - losses.mean()).square().mean()
    if name == "GroupDRO":
        q = q * (ETA * losses.detach()).exp()
        return (q / q.sum() * losses).sum()
    return losses.mean()


@every_risk
def test_direction_is_the_gradient_of_the_objective_step_by_step(name: str):
    """BatchNorm and a parameter of each domain's own; the losses reported; buffers as S forward passes leave them."""
    model, reference = feature_net(), feature_net()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.05), EVERY[name](model=model))
    plain = Adam(reference.parameters(), lr=0.05)
    q = torch.ones(DOMAINS, dtype=torch.float64)
    for number in range(5):
        report = optimizer.meta_step(partial(loss_of, model), batches(DOMAINS, number))
        losses = torch.stack([loss_of(reference, batch) for batch in batches(DOMAINS, number)])
        plain.zero_grad()
        objective(name, losses, q).backward()
        q = q * (ETA * losses.detach()).exp()
        q = q / q.sum()
        plain.step()
        torch.testing.assert_close(report.losses, losses.detach(), rtol=1e-9, atol=1e-12)
        assert_same_model(model, reference, rtol=1e-9)


def one_weight(method: Any) -> tuple[nn.Parameter, GradMatch[Any]]:
    w = nn.Parameter(torch.ones((), dtype=torch.float64))
    return w, GradMatch(SGD([w], lr=0.0), method)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=6), eta=st.floats(0, 20), beta=st.floats(0, 10))
def test_weights_of_the_domains(values: list[float], eta: float, beta: float):
    """Of losses w x_i the direction is sum_i w_i x_i: a softmax of eta L, and 1/S + 2 beta (L_i - mean)/S."""
    x = torch.tensor(values, dtype=torch.float64)
    of_dro = ((eta * x).softmax(0) * x).sum()
    of_rex = ((1 + 2 * beta * (x - x.mean())) / len(x) * x).sum()
    for method, expected in ((GroupDRO(eta), of_dro), (VREx(beta), of_rex)):
        w, optimizer = one_weight(method)
        optimizer.meta_step(lambda value, w=w: w * value, list(x))
        torch.testing.assert_close(w.grad, expected, rtol=1e-9, atol=1e-12)


def test_weights_of_domains_go_by_name_and_a_new_one_has_the_mean():
    w, optimizer = one_weight(GroupDRO(1.0))
    for step in ({"a": 1.0, "b": 2.0}, {"b": 0.5, "a": 1.0}, {"c": 0.0, "a": 0.0}):
        optimizer.meta_step(lambda value: w * value, step)
    memory = optimizer.state_dict()["gradmatch"]["memory"]
    found = {key.rpartition(" ")[2]: math.exp(value) for key, value in memory.items()}
    a, b = math.exp(1.0 + 1.0), math.exp(2.0 + 0.5)
    whole = (a + b) * 1.5
    assert found == pytest.approx({"'a'": a / whole, "'b'": b / whole, "'c'": (a + b) / 2 / whole}, rel=1e-9)


def test_weights_never_overflow_or_die():
    w, optimizer = one_weight(GroupDRO(100.0))
    for _ in range(20):
        optimizer.meta_step(lambda value: w * value, [0.0, 9.0])
    assert optimizer.state_dict()["gradmatch"]["memory"]["log weight of number 0"] == pytest.approx(-18000.0)
    for _ in range(21):
        optimizer.meta_step(lambda value: w * value, [9.0, 0.0])
    assert w.grad.item() == pytest.approx(9.0)  # the first domain is back


@every_risk
def test_a_direction_that_is_not_finite_changes_nothing(name: str):
    model = feature_net()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.05), EVERY[name](model=model))
    optimizer.meta_step(partial(loss_of, model), batches(DOMAINS))
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match="diverged"):
        optimizer.meta_step(lambda b: loss_of(model, b) + (model.inp.weight * 0).abs().sqrt().sum(), batches(DOMAINS))


@every_risk
def test_a_compiled_model_trains_alike(name: str):
    found = []
    for is_compiled in (False, True):
        model = small_network()
        called: Any = torch.compile(model, backend="aot_eager") if is_compiled else model
        optimizer = GradMatch(Adam(model.parameters(), lr=0.01), EVERY[name](model=model))
        for _ in range(3):
            optimizer.meta_step(partial(domain_loss, called), range(DOMAINS))
        found.append(list(model.parameters()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_the_matrix_has_a_row_for_each_domain_and_zeros_where_nothing_depends():
    """Mixed shapes, a parameter of each domain's own, one without gradient: as autograd finds them, in order."""
    model, seen = feature_net(), list[Tensor]()
    trained = [p for p in model.parameters() if p.requires_grad]

    def aggregator(matrix: Tensor) -> Tensor:
        seen.append(matrix.clone())
        return matrix.amax(0)

    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), Aggregate(aggregator, model=model))
    optimizer.meta_step(partial(loss_of, model), batches(DOMAINS))
    rows = []
    for batch in batches(DOMAINS):
        gradient = torch.autograd.grad(loss_of(model, batch), trained, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    torch.testing.assert_close(seen[0], torch.stack(rows), rtol=1e-9, atol=1e-12)
    found = torch.cat([torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten() for p in trained])
    torch.testing.assert_close(found, seen[0].amax(0), rtol=1e-9, atol=1e-12)
    assert model.unused.grad is None


@pytest.mark.parametrize("wrong", ["mean", 3, nn.Identity], ids=str)
def test_what_is_no_aggregator_is_refused(wrong: Any):
    with pytest.raises(TypeError, match=r"a function from a matrix \(S, P\) to a vector \(P,\)"):
        Aggregate(wrong)


@pytest.mark.parametrize(
    ("aggregator", "got"), [(lambda m: m, r"\(2, 21\)"), (lambda m: m.sum(), r"\(\)"), (lambda m: None, "NoneType")]
)
def test_aggregators_that_return_no_vector_are_refused(aggregator: Any, got: str):
    model = small_network()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Aggregate(aggregator))
    with pytest.raises(ValueError, match=rf"should return a tensor of shape \(21,\).*\(got {got}\)"):
        optimizer.meta_step(partial(domain_loss, model), [0, 1])
