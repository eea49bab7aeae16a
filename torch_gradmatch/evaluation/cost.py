"""What a meta-iteration costs in time and memory, beside ordinary training on the same batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter

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


class _Pair:
    """A method and ERM, which take their steps by one and the same copy of the optimizer.

    Args:
        trial: Where.
        method: The method, or None for ERM alone.
    """

    def __init__(self, trial: Trial, method: Method | None) -> None:
        self.trial = trial
        self.optimizer = copy_optimizer(trial.optimizer)
        trial.reset()
        self.run_erm()  # makes the optimizer's state, if there is none yet
        self.run: Callable[[], object] = self.run_erm
        if method is not None:
            trial.reset()
            self._runner(method)()  # loads what is loaded once
            self.run = self._runner(method)
        trial.reset()

    def _runner(self, method: Method) -> Callable[[], object]:
        """Return what carries out one meta-iteration from wherever the parameters are."""
        return partial(GradMatch(self.optimizer, method).meta_step, self.trial.loss_fn, self.trial.batches)

    def run_erm(self) -> None:
        """Carry out one iteration of ordinary training from wherever the parameters are."""
        needs_closure = wants_closure(self.optimizer)
        if not needs_closure or hasattr(self.optimizer, "first_step"):  # SAM moves before it calls the closure
            self.trial.differentiate_mean_loss()
        if needs_closure:
            self.optimizer.step(lambda: float(self.trial.differentiate_mean_loss()))
        else:
            self.optimizer.step()

    def measure(self) -> tuple[int, int | None]:
        """Measure one meta-iteration after the first few.

        Returns:
            Number of evaluations, and the peak of memory in bytes.
        """

        def warm_up() -> None:
            for _ in range(WARM_UPS):
                self.run()
                self.trial.reset()
            self.trial.evaluations = 0

        peak = peak_memory(self.run, self.trial.devices, warm_up)
        return self.trial.evaluations, peak

    def time(self, run: Callable[[], object]) -> float:
        """Time a run.

        Args:
            run: :attr:`run` or :meth:`run_erm`.

        Returns:
            Seconds for one, without those for the way back to the first parameters.
        """
        elapsed, times = 0.0, 0
        while elapsed < SHORTEST_TIMING:
            self.trial.reset()
            self.trial.synchronize()
            start = perf_counter()
            run()
            self.trial.synchronize()
            elapsed, times = elapsed + perf_counter() - start, times + 1
        return elapsed / times


def _cost(trial: Trial, method: Method | None, rounds: int) -> tuple[Cost, list[float]]:
    """Measure one method.

    Returns:
        Its cost, and the seconds that ERM took in the same rounds.
    """
    pair = _Pair(trial, method)
    evaluations, peak_bytes = pair.measure()
    seconds: list[float] = []
    of_erm: list[float] = []
    for number in range(rounds):
        kinds = [(seconds, pair.run), (of_erm, pair.run_erm)] if method is not None else [(seconds, pair.run)]
        for times, run in kinds[:: 1 if number % 2 else -1]:  # who is first gets other caches
            times.append(pair.time(run))
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
    measured, errors = {ERM: erm}, {}
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
    measured[ERM] = Cost(seconds, [1.0] * len(seconds), erm.evaluations, erm.peak_bytes)
    return measured, errors
