"""What a meta-iteration costs in time and memory, beside ordinary training on the same batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

from torch.optim import Optimizer

from torch_gradmatch.evaluation.peak_memory import peak_memory
from torch_gradmatch.evaluation.trial import Trial, copy_optimizer
from torch_gradmatch.methods.base import Method
from torch_gradmatch.optimizer import GradMatch
from torch_gradmatch.slow.inner_state import wants_closure

__all__ = ["ERM", "Cost", "costs", "describe"]

ERM = "ERM"
SHORTEST_TIMING = 0.05  # seconds; what is faster runs several times in a row
WARM_UPS = 2  # now and then a method looks whether a loss is the same twice: in the 1st, 2nd, 4th ... meta-iteration


@dataclass(frozen=True)
class Cost:
    """What one meta-iteration over S domains costs.

    Attributes:
        seconds: Wall-clock time, one entry for each round. ERM takes part in every method's rounds.
        of_erm: The same over that of the ERM gradient and one step, in the same round.
        evaluations: How often the loss of a batch was evaluated; S for ERM.
        peak_bytes: Most memory above that of the model and the optimizer's state, with what the method keeps from one
            meta-iteration to the next (Fish its slow weights); see :mod:`torch_gradmatch.evaluation.peak_memory`.
    """

    seconds: list[float]
    of_erm: list[float]
    evaluations: int
    peak_bytes: int | None


def describe(error: Exception) -> str:
    """Say what went wrong; some errors have no words.

    Args:
        error: What was raised.

    Returns:
        Its message, or else its class.
    """
    return str(error) or type(error).__name__


def _erm(trial: Trial, optimizer: Optimizer) -> None:
    """Carry out one iteration of ordinary training from wherever the parameters are."""
    needs_closure = wants_closure(optimizer)
    if not needs_closure or hasattr(optimizer, "first_step"):  # SAM moves before it calls the closure
        trial.differentiate_mean_loss()
    if needs_closure:
        optimizer.step(lambda: float(trial.differentiate_mean_loss()))
    else:
        optimizer.step()


def _time(trial: Trial, run: Callable[[], object]) -> float:
    """Return the seconds of one run, without those for the way back to the first parameters."""
    elapsed, times = 0.0, 0
    while elapsed < SHORTEST_TIMING:
        trial.reset()
        trial.synchronize()
        start = perf_counter()
        run()
        trial.synchronize()
        elapsed, times = elapsed + perf_counter() - start, times + 1
    return elapsed / times


def _cost(trial: Trial, method: Method | None, rounds: int) -> tuple[Cost, list[float]]:
    """Measure a method, or ERM, which takes its steps by the same copy of the optimizer.

    Returns:
        Its cost, and the seconds that ERM took in the same rounds.
    """
    optimizer = copy_optimizer(trial.optimizer)
    erm: Callable[[], object] = partial(_erm, trial, optimizer)
    run = erm
    trial.reset()
    erm()  # makes the optimizer's state, if there is none yet
    trial.reset()
    if method is not None:
        GradMatch(optimizer, method).meta_step(trial.loss_fn, trial.batches)  # loads what is loaded once
        run = partial(GradMatch(optimizer, method).meta_step, trial.loss_fn, trial.batches)
        trial.reset()

    def warm_up() -> None:
        for _ in range(WARM_UPS):
            run()
            trial.reset()
        trial.evaluations = 0

    peak_bytes = peak_memory(run, trial.devices, warm_up)
    evaluations = trial.evaluations
    seconds: list[float] = []
    of_erm: list[float] = []
    kinds = [(seconds, run), (of_erm, erm)] if method is not None else [(seconds, run)]
    for number in range(rounds):
        for times, one in kinds[:: 1 if number % 2 else -1]:  # who is first gets other caches
            times.append(_time(trial, one))
    trial.reset()
    of_erm = of_erm or seconds
    return Cost(seconds, [s / e for s, e in zip(seconds, of_erm, strict=True)], evaluations, peak_bytes), of_erm


def costs(trial: Trial, methods: Mapping[str, Method], rounds: int) -> tuple[dict[str, Cost], dict[str, str]]:
    """Time ordinary training and every method, and measure the memory of each: one at a time, then it is freed.

    Args:
        trial: Where.
        methods: By name.
        rounds: How often each is timed.

    Returns:
        The costs, also that of :data:`ERM`, and for the methods that failed, why; by name.
    """
    erm, seconds = _cost(trial, None, rounds)
    measured, errors = {}, {}
    for name, method in methods.items():
        gc.collect()  # optimizers may be in cycles
        try:
            measured[name], in_these_rounds = _cost(trial, method, rounds)
            seconds += in_these_rounds
        except Exception as error:  # noqa: BLE001  any method, any reason: the row says it
            errors[name] = describe(error)
        if name in errors:
            trial.reset()
            trial.differentiate_mean_loss()  # if this fails it is the user's own loss, and an error of compare
    trial.reset()
    gc.collect()
    return {ERM: replace(erm, seconds=seconds, of_erm=[1.0] * len(seconds))} | measured, errors
