"""Argument checks, each with its message: it names the argument, shows the value and says what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

_DOMAINS: ContextVar[Sequence[object] | None] = ContextVar("names of the domains of the batches", default=None)


@contextmanager
def naming(domains: Sequence[object] | None) -> Iterator[None]:
    """Let messages inside the block name the domain of a batch, wherever they are written."""
    token = _DOMAINS.set(domains)
    try:
        yield
    finally:
        _DOMAINS.reset(token)


def name_of(batch_index: int) -> str:
    """Return what a message should call a batch.

    Args:
        batch_index: Its position in the meta-iteration.

    Returns:
        The position and, inside :func:`naming`, the domain.

    Example:
        >>> with naming(["north", "south"]):
        ...     name_of(1)
        "batch 1 (domain 'south')"
    """
    domains = _DOMAINS.get()
    return f"batch {batch_index}" if domains is None else f"batch {batch_index} (domain {domains[batch_index]!r:.80})"


@contextmanager
def evaluating(batch_index: int, *, again: bool = False) -> Iterator[None]:
    """Let an error that ``loss_fn`` raises say for which batch it was called, and whether for the second time."""
    try:
        yield
    except Exception as error:
        note_batch(error, batch_index, again=again)
        raise


def note_batch(error: Exception, batch_index: int, *, again: bool) -> None:
    """Let an error of ``loss_fn`` say for which batch it was called."""
    add_note(error, f"raised when loss_fn was called with {name_of(batch_index)}{SECOND_CALL if again else ''}")


SECOND_CALL = (
    " for the second time: does it change its batch (pop, an in-place operation, an iterator)? With an optimizer "
    "that takes no closure Fish, SmoothFish at gamma 1 and IDGM(hvp='reverse', keep_graphs=True) call it once for each "
    "batch"
)


def add_note(error: BaseException, text: str) -> None:
    """Let an error say something more below its own message; it stays the same object."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(text)
    else:
        vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), text]


def named_batches(batches: Iterable[Any] | Mapping[Any, Any]) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """Part batches from the names of their domains.

    Args:
        batches: A mapping from names, a list that :func:`~torch_gradmatch.meta_batches` made, or any iterable.

    Returns:
        The names in order, None if nobody knows them; and the batches.

    Example:
        >>> named_batches({"north": 1, "south": 2})
        (('north', 'south'), [1, 2])
    """
    if isinstance(batches, Mapping):
        return tuple(batches), list(batches.values())
    domains = getattr(batches, "domains", None)
    return None if domains is None else tuple(domains), list(batches)


def check_batches(
    loss_fn: object, batches: Iterable[Any] | Mapping[Any, Any]
) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """Return the names of the domains and their batches if there is one of each, and a function to hand them to."""
    if not callable(loss_fn):
        swapped = ", the batches. The two arguments are swapped" if callable(batches) else ""
        raise TypeError(
            f"loss_fn should be a function (got {type(loss_fn).__name__}{swapped}): meta_step(loss_fn, batches)"
        )
    domains, listed = named_batches(batches)
    if not listed:
        raise ValueError("batches is empty: meta_step() needs one batch of each domain")
    if domains is not None and len(domains) != len(listed):
        raise ValueError(
            f"batches holds {len(listed)} batches of {len(domains)} domains {domains!r:.200}: pass one of each"
        )
    return domains, listed


def check_choice(name: str, value: object, choices: Collection[str], or_else: str = "") -> Any:
    """Return ``value`` if it is one of ``choices``; with ``or_else`` also if it can be called."""
    if not (isinstance(value, str) and value in choices) and not (or_else and callable(value)):
        accepted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} should be one of {accepted}{or_else} (got {value!r})")
    return value


def optional(check: Callable[[object], object]) -> Callable[[object], object]:
    """Return a check that also accepts None."""
    return lambda value: None if value is None else check(value)


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} should be True or False (got {value!r})")
    return value


def check_tracking(value: object) -> bool | str:
    """Return ``value`` if it says what ``track_alignment`` should measure."""
    if not isinstance(value, bool) and value != "pairs":
        raise ValueError(f"track_alignment should be True, False or 'pairs' (got {value!r:.80})")
    return value


def check_int(name: str, value: object, at_least: int) -> int:
    """Return ``value`` as an ``int`` if it is an integer of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        raise ValueError(f"{name} should be an integer of at least {at_least} (got {value!r})")
    return int(value)


def check_number(
    name: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
) -> float:
    """Return ``value`` as a ``float`` if it is a finite number in range."""
    number = _as_float(value)
    if not (above < number < below and number >= at_least):
        accepted = "" if at_least == -math.inf else f" of at least {at_least:g}"
        accepted = f" greater than {above:g}" if above > -math.inf else accepted
        accepted += f" and less than {below:g}" if below < math.inf else ""
        raise ValueError(f"{name} should be a finite number{accepted} (got {value!r:.80})")
    return number


def _as_float(value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_fraction(name: str, value: object) -> float:
    """Return ``value`` as a ``float`` if it lies in (0, 1]."""
    number = _as_float(value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} should be a number in (0, 1] (got {value!r:.80})")
    return number


def check_model(name: str, value: object) -> nn.Module:
    """Return ``value`` if it is a module."""
    if not isinstance(value, nn.Module) or isinstance(value, torch.jit.ScriptModule):
        raise TypeError(f"{name} should be a torch.nn.Module, not a scripted one (got {type(value).__name__})")
    return value


def check_num_domains(number: int, fewest: int = 2) -> int:
    """Return S if there are two domains or more, which gradients need to be matched."""
    if number < fewest:
        raise ValueError(f"batches should hold one batch of each of at least {fewest} domains (got {number})")
    return number


def check_entry(state: Mapping[str, Any], key: str, kind: Any) -> None:
    """Raise unless an entry of a state dict is of the right type."""
    if key not in state or not isinstance(state[key], kind):
        raise ValueError(f"the state dict's {key!r} is missing or malformed (got {state.get(key)!r:.80})")


def check_floating_dtype(name: str, value: object) -> torch.dtype:
    """Return ``value`` if it is a real floating-point dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"{name} should be a floating-point torch.dtype such as torch.float32 (got {value!r})")
    return value


def check_loss(loss: object, batch_index: int) -> Tensor:
    """Return what a loss function returned if it is a scalar that can be differentiated."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn should return a scalar tensor; for {name_of(batch_index)} it returned {type(loss).__name__}"
        )
    if loss.dim() != 0 and loss.numel() != 1:
        raise ValueError(
            f"loss_fn should return a scalar tensor; for {name_of(batch_index)} it has shape {tuple(loss.shape)}: "
            "reduce it, for instance with .mean()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of {name_of(batch_index)} does not depend on any parameter that requires a gradient: "
            "was it computed under torch.no_grad() or detached?"
        )
    return loss if loss.dim() == 0 else loss.reshape(())


def check_reached(gradient: Sequence[Tensor | None], batch_index: int) -> None:
    """Raise if a loss depends on none of the parameters that are trained."""
    if all(g is None for g in gradient):
        raise ValueError(
            f"the loss of {name_of(batch_index)} depends on none of the parameters that the optimizer trains: "
            "does loss_fn call the model that they are of?"
        )


def refuse_loss(index: int, value: float) -> None:
    """Raise if a loss is not finite."""
    if not math.isfinite(value):
        error = ValueError(
            f"the loss of {name_of(index)} is {value}: nothing was changed by this meta_step(); look at that batch, or "
            "lower a learning rate"
        )
        vars(error)["happened"] = index  # from there on the gradients of all ranks are NaN
        raise error
