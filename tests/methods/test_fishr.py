"""Fishr: per-sample gradients taken one by one, DomainBed's own arithmetic, and what it remembers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from _models import assert_identical
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD, Adam

from torch_gradmatch import Fishr, GradMatch

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "cross entropy": F.cross_entropy,
    "label smoothing": partial(F.cross_entropy, label_smoothing=0.2),
    "squared error": lambda o, y: F.mse_loss(o, torch.eye(3, dtype=o.dtype)[y]),
}


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias)).double()


def domains(seed: int = 0, sizes: tuple[int, ...] = (10, 10, 10, 10)) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64) * (1 + 0.3 * index),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for index, size in enumerate(sizes)
    ]


def loss_of(model: nn.Module, batch: Batch, loss: Loss = F.cross_entropy) -> Tensor:
    return loss(model(batch[0]), batch[1])


def wrap(model: nn.Sequential, gamma: float | None = None, *, lr: float = 0.01, **others: Any) -> GradMatch[Fishr]:
    return GradMatch(Adam(model.parameters(), lr=lr), Fishr(model, model[-1], gamma, **others))


def variance_by_vmap(model: nn.Sequential, batch: Batch, loss: Loss) -> Tensor:
    """Of the head's gradients of single samples, each taken by itself."""
    z, head = model[:-1](batch[0]), model[-1]

    def one(params: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(head, params, (z[None],)), y[None])

    gradients = vmap(grad(one), in_dims=(None, 0, 0))(dict(head.named_parameters()), z, batch[1])
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1).var(dim=0, correction=0)


class DomainBed:
    """Its class ``Fishr``, with per-sample gradients by ``vmap`` in the place of BackPACK, and any sizes of batches."""

    def __init__(self, model: nn.Sequential, gamma: float, ema: float, start: int, loss: Loss) -> None:
        self.model, self.gamma, self.ema, self.start, self.loss = model, gamma, ema, start, loss
        self.optimizer = Adam(model.parameters(), lr=0.01)
        self.running: list[Tensor] | None = None
        self.updates = 0

    def update(self, batches: list[Batch]) -> None:
        variances = [variance_by_vmap(self.model, batch, self.loss) for batch in batches]
        before = self.running or [torch.zeros_like(v) for v in variances]
        running = [self.ema * m + (1 - self.ema) * v for m, v in zip(before, variances, strict=True)]
        self.running = [m.detach().clone() for m in running]
        corrected = torch.stack([m / (1 - self.ema) for m in running])
        penalty = torch.stack([(u - corrected.mean(0)).pow(2).mean() for u in corrected]).sum() / len(batches)
        objective = torch.stack([loss_of(self.model, batch, self.loss) for batch in batches]).mean()
        if self.updates >= self.start:
            objective = objective + self.gamma * penalty
        self.updates += 1
        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()


@settings(deadline=None, max_examples=25)
@given(
    loss=st.sampled_from(sorted(LOSSES)),
    bias=st.booleans(),
    ema=st.floats(0, 0.99),
    start=st.integers(0, 3),
    sizes=st.lists(st.integers(2, 12), min_size=2, max_size=5).map(tuple),
    updates=st.just(5),
)
@example(loss="cross entropy", bias=True, ema=0.95, start=7, sizes=(10, 10, 10, 10), updates=20)
def test_is_domainbeds_step_by_step(
    loss: str, bias: bool, ema: float, start: int, sizes: tuple[int, ...], updates: int
):
    model, theirs = network(bias), network(bias)
    reference = DomainBed(theirs, 1000.0, ema, start, LOSSES[loss])
    optimizer = wrap(model, 1000.0, ema=ema, start=start)
    for number in range(updates):
        reference.update(domains(number, sizes))
        report = optimizer.meta_step(partial(loss_of, model, loss=LOSSES[loss]), domains(number, sizes))
        assert report.gamma == (1000.0 if number >= start else 0.0)
        for ours, p in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, p, rtol=1e-9, atol=1e-9)


def test_strength_is_the_relative_length_of_the_penaltys_gradient_and_gamma_is_kept():
    parts = []
    for gamma in (0.0, 1.0):
        model = network()
        wrap(model, gamma, lr=0.0).meta_step(partial(loss_of, model), domains())
        parts.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    length = float(parts[0].norm() / (parts[1] - parts[0]).norm())
    model = network()
    optimizer = wrap(model, lr=0.0, strength=0.3)
    found, kept = (optimizer.meta_step(partial(loss_of, model), domains()).gamma for _ in range(2))
    assert found == kept == pytest.approx(0.3 * length)
    optimizer.method.strength = 0.6
    assert optimizer.meta_step(partial(loss_of, model), domains()).gamma != found
    later = wrap(model, lr=0.0, start=1)
    gammas = [later.meta_step(partial(loss_of, model), domains()).gamma for _ in range(3)]
    assert 0.0 == gammas[0] < gammas[1] == gammas[2]


def test_running_variances_go_by_name_whatever_the_order():
    """The same meta-steps with the domains in another order each time, and without one of them in between."""
    runs = []
    for shuffled in (False, True):
        model = network()
        optimizer = wrap(model, 100.0)
        for number, order in enumerate([[0, 1, 2, 3], [3, 1, 0, 2], [1, 3], [2, 3, 1, 0]]):
            batches = {f"domain {i}": domains(number)[i] for i in (order if shuffled else sorted(order))}
            optimizer.meta_step(partial(loss_of, model), batches)
        runs.append(list(model.parameters()))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_autocast_computes_moments_in_single_precision():
    model = network().float()
    optimizer = wrap(model)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(batch[0].float()), batch[1])

    assert optimizer.meta_step(loss, domains()).gamma > 0
    memory = optimizer.state_dict()["gradmatch"]["memory"]
    assert {value.dtype for value in memory.values() if isinstance(value, Tensor)} == {torch.float32}


def test_compiled_below_the_head():
    model, compiled = network(), network()
    body = torch.compile(compiled[:-1], backend="aot_eager")

    def loss_fn(batch: Batch) -> Tensor:
        return F.cross_entropy(compiled[-1](body(batch[0])), batch[1])

    for one, loss in ((model, partial(loss_of, model)), (compiled, loss_fn)):
        optimizer = wrap(one, 10.0)
        for number in range(3):
            optimizer.meta_step(loss, domains(number))
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="pass gamma="):
        wrap(compiled).meta_step(loss_fn, domains())


def test_dropout_and_a_penalty_on_the_weights_are_no_sum_and_batch_norm_moves_once():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3)).double()
    reference = copy.deepcopy(model[:2])
    for batch in domains():
        reference(batch[0])
    wrap(model).meta_step(lambda b: loss_of(model, b) + 0.1 * model[0].weight.square().sum(), domains())
    assert model[1].num_batches_tracked == 4
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)


@pytest.mark.parametrize("head", [nn.Conv2d(3, 4, 1), network(), "head"], ids=lambda head: type(head).__name__)
def test_a_head_that_is_not_linear_is_refused(head: Any):
    with pytest.raises(TypeError, match=r"head should be a torch.nn.Linear"):
        Fishr(network(), head)


def test_heads_and_models_of_others_are_refused():
    model, other = network(), network()
    for held, head, message in (
        (model, nn.Linear(5, 3), "head should be a module of Sequential, which does not hold it"),
        (other, other[-1], "model should hold the parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            GradMatch(SGD(model.parameters(), lr=0.1), Fishr(held, head))


BAD_LOSSES: dict[str, tuple[Callable[[nn.Sequential, Batch], Tensor], str]] = {
    "sum": (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), "mean over the samples of a batch"),
    "no head": (lambda m, b: m[0](b[0]).square().mean(), "the head was called 0 times for batch 0"),
    "two calls": (lambda m, b: loss_of(m, b) + loss_of(m, b), "the head was called 2 times for batch 0"),
    "detached": (
        lambda m, b: F.mse_loss(m(b[0]).detach() * m[0].weight.mean(), b[0][:, :3]), "does not depend on the head"
    ),
    "sequence": (lambda m, b: m(b[0][None])[0].square().mean(), r"head's input has shape \(1, 10, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_losses_that_do_not_serve_are_errors_in_words(kind: str):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=BAD_LOSSES[kind][1]):
        wrap(model).meta_step(partial(BAD_LOSSES[kind][0], model), domains())
    assert_identical(model.state_dict(), before)
