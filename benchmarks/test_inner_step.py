"""What wrapping an optimizer costs: the inner steps and a whole meta-iteration of Fish, against the steps alone.

``test_overhead``: two networks of more than ten million parameters, so that the passes over all weights that Fish adds
are as long as they get beside the forward and backward passes. An optimizer and its wrapper take turns step by step on
one network, changing who goes first, by the clock of the process, which on one thread leaves out what other programs
take. In its ``extra_info`` are ``wrapped_over_plain``, ratios of neighbouring steps inside an open inner loop;
``meta_over_inner``, for each round S wrapped steps, the first of which copies the weights, and the interpolation over
the S plain steps beside them; and of that ``interpolation_over_inner``, a small number with little noise.

``test_step_alone`` has no network to hide behind: 159 parameters of 64 elements with gradients, and a step of the
wrapper inside an open inner loop less the time that the wrapped optimizer's own step takes within it: ``extra_us``, the
median in microseconds. ``forwarding`` is an optimizer that only passes the step on, the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks._models import Batch, Network, mlp, resnet18
from benchmarks.plots import spread
from torch_gradmatch import Fish, GradMatch

DOMAINS = 5
NETWORKS = {
    "MLP": Network(partial(mlp, 784, 2048, 4096, 512, 10), (64, 784), 10),
    "ResNet-18": Network(partial(resnet18, width=64), (16, 3, 32, 32), 10),
}
ROUNDS = {"MLP": 10, "ResNet-18": 6}  # even: each goes first as often as the other
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": partial(SGD, lr=1e-3, momentum=0.9),
    "Adam": partial(Adam, lr=1e-4),
    "AdamW": partial(AdamW, lr=1e-4),
}


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()  # one thread: no time of others is in it
    run()
    return time.process_time() - start


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_overhead(benchmark: BenchmarkFixture, network: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model, batches = NETWORKS[network].make(), NETWORKS[network].batches(DOMAINS)
    plain = OPTIMIZERS[optimizer](model.parameters())
    wrapped = GradMatch(plain, Fish(model=model))
    ratios: dict[str, list[float]] = {"wrapped_over_plain": [], "meta_over_inner": [], "interpolation_over_inner": []}

    def inner_step(optimizer: Optimizer, batch: Batch) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    def take_turns() -> None:
        """Take S steps each; that the plain ones move the weights, too, is nothing to the inner loop."""
        spent = {plain: 0.0, wrapped: 0.0}
        for index, batch in enumerate(batches):
            order = [plain, wrapped] if (len(ratios["meta_over_inner"]) + index) % 2 else [wrapped, plain]
            step = {optimizer: seconds(partial(inner_step, optimizer, batch)) for optimizer in order}
            spent = {optimizer: spent[optimizer] + step[optimizer] for optimizer in spent}
            if index > 0:
                ratios["wrapped_over_plain"].append(step[wrapped] / step[plain])
        interpolation = seconds(wrapped.interpolate)
        ratios["meta_over_inner"].append((spent[wrapped] + interpolation) / spent[plain])
        ratios["interpolation_over_inner"].append(interpolation / spent[plain])

    take_turns()  # warms up
    for values in ratios.values():
        values.clear()
    benchmark.pedantic(take_turns, rounds=ROUNDS[network])
    for name, values in ratios.items():
        low, middle, high = spread(values)
        benchmark.extra_info[name] = {"q1": low, "median": middle, "q3": high, "ratios": values}
    parameters = sum(p.numel() for p in model.parameters())
    benchmark.extra_info.update(network=network, optimizer=optimizer, parameters=parameters, domains=DOMAINS)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


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


@pytest.mark.filterwarnings("ignore:100 inner steps")  # no interpolation is wanted here
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
        plain.append(seconds(partial(step, *closure)))

    inner.step = timed  # type: ignore[method-assign]

    def run() -> None:
        extra.append(seconds(wrapped.step) - plain[-1])

    benchmark.pedantic(run, rounds=1000, warmup_rounds=50)
    benchmark.extra_info.update(
        optimizer=optimizer, wrapper=wrapper, extra_us=1e6 * median(extra), plain_us=1e6 * median(plain)
    )
