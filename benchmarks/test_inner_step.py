"""What wrapping an optimizer costs: an inner step, and a whole meta-iteration of Fish, against the steps alone.

Two networks of more than ten million parameters, so that the passes over all weights that Fish adds are as long as they
get beside the forward and backward passes. An inner step is ``zero_grad``, forward, backward and ``step``.

``test_inner_step`` and ``test_meta_iteration`` time each way by itself, one after another, and the machine may change
its pace between them. ``test_overhead`` is for ratios: an optimizer and its wrapper take turns step by step, changing
who goes first, on one network, so that both find the same memory, and each ratio is of neighbours. It times by the
clock of the process, which on one thread leaves out what other programs take. In its ``extra_info`` are

``wrapped_over_plain``
    One ratio for each pair of steps inside an open inner loop. The first step of a loop, which copies the weights,
    counts only for
``meta_over_inner``
    one ratio for each round: S wrapped steps and the interpolation, over the S plain steps beside them.
``interpolation_over_inner``
    The part of the latter that is the interpolation, timed by itself: a small number with little noise.

``test_step_alone`` has no network to hide behind: 159 parameters of 64 elements with gradients, and a step of the
wrapper inside an open inner loop less the time that the wrapped optimizer's own step takes within it. ``extra_us`` in
its ``extra_info`` is the median of that in microseconds: all that an inner step costs besides the wrapped optimizer's
own. ``forwarding`` is an optimizer that only passes the step on, the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks._models import Batch, Network, resnet18
from torch_gradmatch import Fish, GradMatch

DOMAINS = 5


def wide_mlp() -> nn.Module:
    """Four layers, 784 to 10."""
    widths = (784, 2048, 4096, 512)
    layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


NETWORKS = {
    "MLP": Network(wide_mlp, (64, 784), 10),
    "ResNet-18": Network(partial(resnet18, width=64), (16, 3, 32, 32), 10),
}
ROUNDS = {"MLP": 10, "ResNet-18": 6}  # even: each goes first as often as the other
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": partial(SGD, lr=1e-3, momentum=0.9),
    "Adam": partial(Adam, lr=1e-4),
    "AdamW": partial(AdamW, lr=1e-4),
}


class Training:
    """One network with its optimizer, plain or wrapped, always from the same initial weights."""

    def __init__(self, network: str, optimizer: str, *, wrapped: bool) -> None:
        torch.manual_seed(0)
        self.model = NETWORKS[network].make()
        self.batches = NETWORKS[network].batches(DOMAINS)
        plain = OPTIMIZERS[optimizer](self.model.parameters())
        self.optimizer: Optimizer = GradMatch(plain, Fish(inner_steps=None, model=self.model)) if wrapped else plain
        self.loss = torch.zeros(())

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def inner_step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.loss.backward()
        self.optimizer.step()

    def close(self) -> None:
        """End the inner loop, where there is one."""
        if isinstance(self.optimizer, GradMatch):
            self.optimizer.interpolate()

    def iteration(self) -> None:
        """Take one step on each domain and end the inner loop."""
        for batch in self.batches:
            self.inner_step(batch)
        self.close()

    def assert_finite(self) -> None:
        assert bool(self.loss.isfinite())
        assert all(bool(p.isfinite().all()) for p in self.parameters)

    def describe(self, network: str, optimizer: str) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.parameters)
        assert parameters >= 10_000_000
        return {
            "network": network,
            "optimizer": optimizer,
            "parameters": parameters,
            "domains": DOMAINS,
            "threads": torch.get_num_threads(),
        }


class Turns:
    """Steps of a wrapped optimizer and of what it wraps, side by side."""

    def __init__(self, training: Training) -> None:
        assert isinstance(training.optimizer, GradMatch)
        self.training = training
        self.wrapped, self.plain = training.optimizer, training.optimizer.optimizer
        self.rounds = 0
        self.wrapped_over_plain: list[float] = []
        self.meta_over_inner: list[float] = []
        self.interpolation_over_inner: list[float] = []

    def round(self) -> None:
        """Take S steps each; that the plain ones move the weights, too, is nothing to the inner loop."""
        inner = wrapped = 0.0
        for index, batch in enumerate(self.training.batches):
            order = [self.plain, self.wrapped] if (self.rounds + index) % 2 else [self.wrapped, self.plain]
            seconds = {}
            for optimizer in order:
                self.training.optimizer = optimizer
                seconds[optimizer] = _seconds(partial(self.training.inner_step, batch))
            inner += seconds[self.plain]
            wrapped += seconds[self.wrapped]
            if index > 0:
                self.wrapped_over_plain.append(seconds[self.wrapped] / seconds[self.plain])
        interpolation = _seconds(self.wrapped.interpolate)
        self.meta_over_inner.append((wrapped + interpolation) / inner)
        self.interpolation_over_inner.append(interpolation / inner)
        self.rounds += 1


def _seconds(run: Callable[[], None]) -> float:
    start = time.process_time()  # one thread: no time of others is in it
    run()
    return time.process_time() - start


def _summary(ratios: list[float]) -> dict[str, Any]:
    # With --benchmark-disable there is one round, which has no quartiles.
    low, middle, high = quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"q1": low, "median": middle, "q3": high, "ratios": ratios}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_inner_step(benchmark: BenchmarkFixture, network: str, optimizer: str, wrapped: bool) -> None:
    training = Training(network, optimizer, wrapped=wrapped)
    benchmark.extra_info.update(training.describe(network, optimizer), wrapped=wrapped)
    run = partial(training.inner_step, training.batches[0])
    benchmark.pedantic(run, rounds=ROUNDS[network], warmup_rounds=1)
    training.close()
    training.assert_finite()


@pytest.mark.parametrize("wrapped", [False, True], ids=["inner steps alone", "meta-iteration"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_meta_iteration(benchmark: BenchmarkFixture, network: str, optimizer: str, wrapped: bool) -> None:
    training = Training(network, optimizer, wrapped=wrapped)
    benchmark.extra_info.update(training.describe(network, optimizer), wrapped=wrapped)
    training.inner_step(training.batches[0])  # the first one allocates the optimizer's state
    training.close()
    benchmark.pedantic(training.iteration, rounds=(ROUNDS[network] + 1) // 2)
    training.assert_finite()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_overhead(benchmark: BenchmarkFixture, network: str, optimizer: str) -> None:
    training, plain = (Training(network, optimizer, wrapped=wrapped) for wrapped in (True, False))
    for batch in training.batches[:2]:  # warms up; until the interpolation the two must not differ at all
        training.inner_step(batch)
        plain.inner_step(batch)
    for p, q in zip(training.parameters, plain.parameters, strict=True):
        assert torch.equal(p, q)
    del plain, p, q
    training.close()
    turns = Turns(training)
    benchmark.pedantic(turns.round, rounds=ROUNDS[network])
    benchmark.extra_info.update(
        training.describe(network, optimizer),
        wrapped_over_plain=_summary(turns.wrapped_over_plain),
        meta_over_inner=_summary(turns.meta_over_inner),
        interpolation_over_inner=_summary(turns.interpolation_over_inner),
    )
    assert len(turns.meta_over_inner) == turns.rounds > 0
    training.assert_finite()


MANY = 159  # parameters, as ResNet-50 has without its last layer


class Forwarding(Optimizer):
    """Does nothing but pass the step on: what is left is torch's own work around the step of any optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Nothing(Optimizer):
    """Takes no time for its steps, so that the wrapper finds its code and data in the processor's caches."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, _closure: Any = None) -> None:
        """Moves nothing."""


WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "forwarding": Forwarding,
    "Fish": lambda optimizer: GradMatch(optimizer, Fish()),
    "Fish, reset": lambda optimizer: GradMatch(optimizer, Fish(inner_state="reset")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("optimizer", ["Nothing", *OPTIMIZERS])
def test_step_alone(benchmark: BenchmarkFixture, optimizer: str, wrapper: str) -> None:
    parameters = [nn.Parameter(torch.randn(64)) for _ in range(MANY)]
    for p in parameters:
        p.grad = 1e-9 * torch.randn(64)
    inner = (OPTIMIZERS | {"Nothing": Nothing})[optimizer](parameters)
    wrapped = WRAPPERS[wrapper](inner)
    wrapped.step()  # opens the inner loop, and allocates the optimizer's state
    step, plain, extra = inner.step, [0.0], []

    def timed(*closure: Any) -> None:
        plain.append(_seconds(partial(step, *closure)))

    inner.step = timed  # type: ignore[method-assign]

    def run() -> None:
        extra.append(_seconds(wrapped.step) - plain[-1])

    benchmark.pedantic(run, rounds=1000, warmup_rounds=50)
    benchmark.extra_info.update(
        optimizer=optimizer,
        wrapper=wrapper,
        parameters=MANY,
        threads=torch.get_num_threads(),
        extra_us=1e6 * median(extra),
        plain_us=1e6 * median(plain),
    )
    assert len(plain) > len(extra) > 0
    assert all(bool(p.isfinite().all()) for p in parameters)
