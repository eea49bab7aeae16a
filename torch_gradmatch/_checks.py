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
    """Let messages inside the block name the domain of a batch, wherever they are written.

    Args:
        domains: Of each batch, by position; None if nobody knows.
    """
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


def check_choice(name: str, value: object, choices: Collection[str], or_else: str = "") -> str:
    """Return ``value`` if it is one of ``choices``.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        choices: The accepted values.
        or_else: What else is accepted, for the message.

    Returns:
        The value.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        accepted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} should be one of {accepted}{or_else} (got {value!r})")
    return value


def check_choice_or_function(name: str, value: object, choices: Collection[str]) -> object:
    """Return ``value`` if it is one of ``choices`` or can be called.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        choices: The accepted values.

    Returns:
        The value.
    """
    return value if callable(value) else check_choice(name, value, choices, ", or a function")


def optional(check: Callable[[object], object]) -> Callable[[object], object]:
    """Return a check that also accepts None.

    Args:
        check: Raises if a value cannot be used.

    Returns:
        The check.
    """
    return lambda value: None if value is None else check(value)


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Returns:
        The value.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} should be True or False (got {value!r})")
    return value


def check_tracking(value: object) -> bool | str:
    """Return ``value`` if it says what ``track_alignment`` should measure.

    Args:
        value: What the caller passed.

    Returns:
        The value.

    Raises:
        ValueError: If it is neither ``True`` nor ``False`` nor ``"pairs"``.
    """
    if not isinstance(value, bool) and value != "pairs":
        raise ValueError(f"track_alignment should be True, False or 'pairs' (got {value!r:.80})")
    return value


def check_int(name: str, value: object, at_least: int) -> int:
    """Return ``value`` as an ``int`` if it is an integer of at least ``at_least``.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        at_least: The smallest accepted value.

    Returns:
        The value.

    Raises:
        ValueError: If it is no integer or smaller.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        raise ValueError(f"{name} should be an integer of at least {at_least} (got {value!r})")
    return int(value)


def check_number(name: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf) -> float:
    """Return ``value`` as a ``float`` if it is a finite number in range.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        above: It should be greater than this.
        at_least: It should not be less than this.

    Returns:
        The value.

    Raises:
        ValueError: If it is no real number, not finite or out of range.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (above < number < math.inf and number >= at_least):
        accepted = f"greater than {above:g}" if above > -math.inf else f"of at least {at_least:g}"
        raise ValueError(f"{name} should be a finite number {accepted} (got {value!r})")
    return number


def check_fraction(name: str, value: object) -> float:
    """Return ``value`` as a ``float`` if it lies in (0, 1].

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Returns:
        The value.

    Raises:
        ValueError: If it is no real number in (0, 1].
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} should be a number in (0, 1] (got {value!r})")
    return number


def check_model(name: str, value: object) -> nn.Module:
    """Return ``value`` if it is a module.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Returns:
        The value.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} should be a torch.nn.Module (got {type(value).__name__})")
    return value


def check_num_domains(number: int) -> int:
    """Return S if there are two domains or more, which gradients need to be matched.

    Args:
        number: How many batches there are.

    Returns:
        The number.

    Raises:
        ValueError: If there are fewer.
    """
    if number < 2:
        raise ValueError(f"batches should hold one batch of each of at least 2 domains (got {number})")
    return number


def check_hvp_domains(value: object, domains: int) -> int:
    """Return ``value`` as an ``int`` if so many domains can be drawn.

    Args:
        value: What the caller passed.
        domains: S.

    Returns:
        The value.

    Raises:
        ValueError: If it is no integer from 1 to S.
    """
    number = check_int("hvp_domains", value, at_least=1)
    if number > domains:
        raise ValueError(f"hvp_domains should be at most the number of domains, {domains} (got {number})")
    return number


def check_entry(state: Mapping[str, Any], key: str, kind: Any) -> None:
    """Raise unless an entry of a state dict is of the right type.

    Args:
        state: The state dict.
        key: Which entry.
        kind: A type, or a union of types.

    Raises:
        ValueError: If it is missing or of another type.
    """
    if key not in state or not isinstance(state[key], kind):
        raise ValueError(f"the state dict's {key!r} is missing or malformed (got {state.get(key)!r:.80})")


def check_floating_dtype(name: str, value: object) -> torch.dtype:
    """Return ``value`` if it is a real floating-point dtype.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.

    Returns:
        The value.

    Raises:
        ValueError: If it is no floating-point ``torch.dtype``.
    """
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"{name} should be a floating-point torch.dtype such as torch.float32 (got {value!r})")
    return value


def check_loss(loss: object, batch_index: int) -> Tensor:
    """Return what a loss function returned if it is a scalar that can be differentiated.

    Reads no value, so it does not wait for an accelerator.

    Args:
        loss: What ``loss_fn(batch)`` returned.
        batch_index: Position of the batch in the meta-iteration, for the message.

    Returns:
        The loss, shape ().

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is not a scalar or is cut off from the parameters.
    """
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
    """Raise if a loss depends on none of the parameters that are trained.

    Args:
        gradient: One tensor for each parameter, None where the loss does not depend on it.
        batch_index: Position of the batch in the meta-iteration, for the message.

    Raises:
        ValueError: If all are None.
    """
    if all(g is None for g in gradient):
        raise ValueError(
            f"the loss of {name_of(batch_index)} depends on none of the parameters that the optimizer trains: "
            "does loss_fn call the model that they are of?"
        )
