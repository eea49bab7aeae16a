"""What a meta-iteration costs in time and memory, beside ordinary training on the same batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

from torch_gradmatch.compare.peak_memory import peak_memory
from torch_gradmatch.compare.trial import Trial, copy_optimizer
from torch_gradmatch.methods.base import Method, needs_closure

__all__ = ["ERM", "Cost", "costs", "describe"]

ERM = "ERM"
SHORTEST_TIMING = 0.05  # seconds; what is faster runs several times in a row


@dataclass(frozen=True)
class Cost:
    """What one meta-iteration over S domains costs.

    Attributes:
        seconds: Wall-clock time, one entry for each round.
        of_erm: The same over that of the ERM gradient and one step, in the same round.
        evaluations: How often the loss of a batch was evaluated; S for ERM.
        peak_bytes: Most memory above what was in use before; see :mod:`torch_gradmatch.compare.peak_memory`.
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


class _Timed:
    """One way to spend a meta-iteration, with its own copy of the optimizer.

    Args:
        trial: Where.
        method: The method, or None for ERM.
    """

    def __init__(self, trial: Trial, method: Method | None) -> None:
        self.trial = trial
        self.wrapper = None if method is None else trial.wrap(method)
        self.plain = copy_optimizer(trial.optimizer)
        self.seconds: list[float] = []
        trial.reset()
        self.run()  # allocates what stays, as an optimizer's state
        trial.reset()
        trial.evaluations = 0
        self.peak_bytes = peak_memory(self.run, trial.devices)
        self.evaluations = trial.evaluations

    def run(self) -> None:
        """Carry out one meta-iteration from wherever the parameters are."""
        trial = self.trial
        if self.wrapper is not None:
            self.wrapper.meta_step(trial.loss_fn, trial.batches)
        elif needs_closure(self.plain):
            self.plain.step(lambda: float(trial.differentiate_mean_loss()))
        else:
            trial.differentiate_mean_loss()
            self.plain.step()

    def time(self) -> None:
        """Add one round's time of a run, always from the same parameters."""
        elapsed, times = 0.0, 0
        while elapsed < SHORTEST_TIMING:
            self.trial.reset()
            self.trial.synchronize()
            start = perf_counter()
            self.run()
            self.trial.synchronize()
            elapsed, times = elapsed + perf_counter() - start, times + 1
        self.seconds.append(elapsed / times)


def costs(trial: Trial, methods: Mapping[str, Method], rounds: int) -> tuple[dict[str, Cost], dict[str, str]]:
    """Time every method, and ordinary training, and measure the memory of each.

    Args:
        trial: Where.
        methods: By name.
        rounds: How often each is timed.

    Returns:
        The costs, also that of :data:`ERM`, and for the methods that failed, why; by name.
    """
    erm = _Timed(trial, None)
    timed, errors = {ERM: erm}, {}
    for name, method in methods.items():
        try:
            timed[name] = _Timed(trial, method)
        except Exception as error:  # noqa: BLE001  any method, any reason: the row says it
            errors[name] = describe(error)
    order = list(timed)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            try:
                if name in timed:
                    timed[name].time()
            except Exception as error:
                if name == ERM:  # the user's own loss or optimizer
                    raise
                errors[name] = describe(error)
                del timed[name]
    measured = {
        name: Cost(t.seconds, [s / e for s, e in zip(t.seconds, erm.seconds, strict=True)], t.evaluations, t.peak_bytes)
        for name, t in timed.items()
    }
    return measured, errors
