"""Fishr: per-sample gradients taken one by one, DomainBed's own arithmetic, and what it remembers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from _models import assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD, Adam

from torch_gradmatch import DomainBatchSampler, Fishr, GradMatch, meta_batches

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "cross entropy": F.cross_entropy,
    "label smoothing": partial(F.cross_entropy, label_smoothing=0.2),
    "squared error": lambda o, y: F.mse_loss(o, torch.eye(3, dtype=o.dtype)[y]),
}


def network(bias: bool = True, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
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


def variance_by_vmap(model: nn.Sequential, batch: Batch, loss: Loss) -> Tensor:
    """Of the head's gradients of single samples, each taken by itself."""
    z, head = model[:-1](batch[0]), model[-1]

    def one(params: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(head, params, (z[None],)), y[None])

    gradients = vmap(grad(one), in_dims=(None, 0, 0))(dict(head.named_parameters()), z, batch[1])
    every = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    return every.var(dim=0, correction=0)


class DomainBed:
    """Its class ``Fishr`` word by word, with per-sample gradients by ``vmap`` in the place of BackPACK."""

    def __init__(self, model: nn.Sequential, gamma: float, ema: float, loss: Loss = F.cross_entropy) -> None:
        self.model, self.gamma, self.ema, self.loss = model, gamma, ema, loss
        self.optimizer = Adam(model.parameters(), lr=0.01)
        self.running: list[Tensor] | None = None
        self.updates = 0

    def update(self, batches: list[Batch], start: int = 0) -> None:
        variances = [variance_by_vmap(self.model, batch, self.loss) for batch in batches]
        before = self.running or [torch.zeros_like(v) for v in variances]
        running = [self.ema * m + (1 - self.ema) * v for m, v in zip(before, variances, strict=True)]
        self.running = [m.detach().clone() for m in running]
        corrected = torch.stack([m / (1 - self.ema) for m in running])
        penalty = torch.stack([(u - corrected.mean(0)).pow(2).mean() for u in corrected]).sum() / len(batches)
        everything = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        objective = loss_of(self.model, everything, self.loss)  # type: ignore[arg-type]
        if self.updates >= start:
            objective = objective + self.gamma * penalty
        self.updates += 1
        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("start", [0, 7])
def test_is_domainbeds_over_twenty_updates(start: int, bias: bool, loss: str):
    model, theirs = network(bias), network(bias)
    reference = DomainBed(theirs, 1000.0, 0.95, LOSSES[loss])
    optimizer = GradMatch(Adam(model.parameters(), lr=0.01), Fishr(model, model[-1], 1000.0, start=start))
    for number in range(20):
        reference.update(domains(number), start)
        report = optimizer.meta_step(partial(loss_of, model, loss=LOSSES[loss]), domains(number))
        assert report.gamma == (1000.0 if number >= start else 0.0)
        for ours, p in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, p, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    loss=st.sampled_from(sorted(LOSSES)),
    ema=st.floats(0, 0.99),
    sizes=st.lists(st.integers(2, 12), min_size=2, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_direction_is_that_of_per_sample_gradients(loss: str, ema: float, sizes: list[int], seed: int):
    """Any loss, batches of any sizes: mean of the losses plus gamma times the penalty, by plain autograd."""
    model, gamma = network(), 3.0
    batches = domains(seed, tuple(sizes))
    losses = torch.stack([loss_of(model, batch, LOSSES[loss]) for batch in batches])
    variances = torch.stack([variance_by_vmap(model, batch, LOSSES[loss]) for batch in batches])  # u = v at first
    objective = losses.mean() + gamma * (variances - variances.mean(0)).square().mean()
    expected = torch.autograd.grad(objective, list(model.parameters()))
    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), Fishr(model, model[-1], gamma, ema=ema))
    optimizer.meta_step(partial(loss_of, model, loss=LOSSES[loss]), batches)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_strength_is_the_relative_length_of_the_penaltys_gradient_and_gamma_is_kept():
    parts = {}
    for gamma in (0.0, 1.0):
        model = network()
        optimizer = GradMatch(SGD(model.parameters(), lr=0.0), Fishr(model, model[-1], gamma))
        optimizer.meta_step(partial(loss_of, model), domains())
        parts[gamma] = torch.cat([p.grad.flatten() for p in model.parameters()])
    length = float(parts[0.0].norm() / (parts[1.0] - parts[0.0]).norm())
    model = network()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), Fishr(model, model[-1], strength=0.3, start=1))
    reports = [optimizer.meta_step(partial(loss_of, model), domains()) for _ in range(3)]
    assert reports[0].gamma == 0.0
    # the running variance is that of two equal batches by then: u = v + rho v
    assert reports[1].gamma == reports[2].gamma
    assert 0 < reports[1].gamma < 0.3 * length
    optimizer.method.strength = 0.6
    assert optimizer.meta_step(partial(loss_of, model), domains()).gamma != reports[1].gamma


def test_running_variances_go_by_name_whatever_the_order():
    """The same meta-steps with the domains in another order each time, and without one of them in between."""
    orders = [[0, 1, 2, 3], [3, 1, 0, 2], [1, 3], [2, 3, 1, 0]]
    runs = []
    for shuffled in (False, True):
        model = network()
        optimizer = GradMatch(Adam(model.parameters(), lr=0.01), Fishr(model, model[-1], 100.0))
        for number, order in enumerate(orders):
            batches = domains(number)
            order = order if shuffled else sorted(order)
            optimizer.meta_step(partial(loss_of, model), {f"domain {i}": batches[i] for i in order})
        runs.append(list(model.parameters()))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_batches_of_a_sampler_know_their_names():
    model = network()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fishr(model, model[-1], 1.0))

    labels = [i % 4 for i in range(40)]
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    sampler = DomainBatchSampler(labels, 5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_sampler=sampler)
    for batches in meta_batches(loader, 4):
        optimizer.meta_step(partial(loss_of, model), batches)
    remembered = [key for key in optimizer.state_dict()["gradmatch"]["memory"] if key.startswith("variance of ")]
    assert sorted(remembered) == [f"variance of {i}" for i in range(4)]


def test_autocast_computes_moments_in_single_precision():
    model = network().float()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fishr(model, model[-1]))

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(batch[0].float()), batch[1])

    report = optimizer.meta_step(loss, domains())
    assert report.gamma > 0
    memory = optimizer.state_dict()["gradmatch"]["memory"]
    assert {value.dtype for value in memory.values() if isinstance(value, Tensor)} == {torch.float32}


def test_compiled_below_the_head():
    model, compiled = network(), network()
    body = torch.compile(compiled[:-1], backend="aot_eager")
    losses = {
        id(model): partial(loss_of, model),
        id(compiled): lambda batch: F.cross_entropy(compiled[-1](body(batch[0])), batch[1]),
    }
    for one in (model, compiled):
        optimizer = GradMatch(SGD(one.parameters(), lr=0.1), Fishr(one, one[-1], 10.0))
        for number in range(3):
            optimizer.meta_step(losses[id(one)], domains(number))
    for p, q in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    optimizer = GradMatch(SGD(compiled.parameters(), lr=0.1), Fishr(compiled, compiled[-1]))
    with pytest.raises(RuntimeError, match="pass gamma="):
        optimizer.meta_step(losses[id(compiled)], domains())


# ------------------------------------------------------------------------------------------------------- bad input


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.head(-x)


def test_heads_and_losses_that_do_not_serve_are_errors_in_words():
    model = network()
    for head in (nn.Conv2d(3, 4, 1), model, "head"):
        with pytest.raises(TypeError, match=r"head should be a torch.nn.Linear"):
            Fishr(model, head)
    for wrong, message in (
        ({"head": nn.Linear(5, 3)}, "head should be a module of Sequential, which does not hold it"),
        ({"model": (other := network()), "head": other[-1]}, "model should hold the parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            GradMatch(SGD(model.parameters(), lr=0.1), Fishr(**{"model": model, "head": model[-1], **wrong}))
    before = copy.deepcopy(model.state_dict())
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fishr(model, model[-1]))
    for loss, message in (
        (lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum"), "mean over the samples of a batch"),
        (lambda b: model[0](b[0]).square().mean(), "the head was called 0 times for batch 0"),
        (lambda b: loss_of(model, b) + loss_of(model, b), "the head was called 2 times for batch 0"),
        (
            lambda b: F.mse_loss(model(b[0]).detach() * model[0].weight.mean(), b[0][:, :3]),
            "does not depend on the head",
        ),
        (lambda b: model(b[0][None])[0].square().mean(), r"head's input has shape \(1, 10, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.meta_step(loss, domains())
        assert_identical(model.state_dict(), before)
    twice = Twice()
    with pytest.raises(ValueError, match="called 2 times"):
        GradMatch(SGD(twice.parameters(), lr=0.1), Fishr(twice, twice.head)).meta_step(
            partial(loss_of, twice), domains()
        )
    optimizer.meta_step(partial(loss_of, model), domains())
    with pytest.raises(ValueError, match="holds 3 domains without names, and earlier ones held 4"):
        optimizer.meta_step(partial(loss_of, model), domains()[:3])
    with pytest.warns(UserWarning, match="running variances begin anew"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())


def test_dropout_and_a_penalty_on_the_weights_are_no_sum_and_batch_norm_moves_once():
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3)).double()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fishr(model, model[-1]))
    loss = lambda b: loss_of(model, b) + 0.1 * model[0].weight.square().sum()  # noqa: E731
    reference = copy.deepcopy(model[:2])
    for batch in domains():
        reference(batch[0])
    optimizer.meta_step(loss, domains())
    assert model[1].num_batches_tracked == 4
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)
