"""How a model is trained by one method in ``leave_one_domain_out``: its settings, their ranges, and what they cost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from torch_gradmatch._checks import check_choice, check_number
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish

__all__ = ["SHARED", "Choice", "LogUniform", "Recipe", "Settings", "default_recipes", "draw_settings"]

Settings = dict[str, Any]


@dataclass(frozen=True)
class LogUniform:
    """A hyperparameter whose logarithm is drawn uniformly.

    Attributes:
        low: The least.
        high: The largest.
        default: What the first draw is.

    Raises:
        ValueError: If not 0 < low <= default <= high.

    Example:
        >>> round(LogUniform(1e-4, 1e-2, 1e-3).draw(random.Random(0)), 6)
        0.004885
    """

    low: float
    high: float
    default: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.default <= self.high < math.inf:
            raise ValueError(f"0 < low <= default <= high should hold (got {self})")

    def draw(self, generator: random.Random) -> float:
        """Draw one.

        Args:
            generator: Where from.

        Returns:
            A number between :attr:`low` and :attr:`high`.
        """
        return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Choice:
    """A hyperparameter that is one of a few values, each as likely.

    Attributes:
        values: The values; the first draw is the first.

    Raises:
        ValueError: If there is none.
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values should hold at least one (got none)")

    @property
    def default(self) -> Any:
        """What the first draw is."""
        return self.values[0]

    def draw(self, generator: random.Random) -> Any:
        """Draw one.

        Args:
            generator: Where from.

        Returns:
            One of :attr:`values`.
        """
        return generator.choice(self.values)


# What every method has: the learning rate of the optimizer and the samples in a batch.
SHARED: dict[str, LogUniform | Choice] = {"lr": LogUniform(1e-4, 1e-2, 1e-3), "batch_size": Choice((32, 16, 64))}


@dataclass(frozen=True)
class Recipe:
    """How to train by one method.

    Attributes:
        method: ``method(model, settings)`` returns the method to wrap the optimizer with; None to take a plain step of
            the optimizer with every batch.
        gradients: ``gradients(S, settings)`` returns how many gradients of one batch a meta-iteration over S domains
            takes; a Hessian-vector product counts as one. Without a method, a step takes one.
        search: The ranges of its hyperparameters beside those that all methods have.
        order: How batches come. ``"pooled"``: of all training samples, shuffled; only without a method. ``"flipflop"``
            and ``"random"``: of one domain each, as :class:`~torch_gradmatch.DomainBatchSampler` serves them.
        warm_up: The part of the budget that goes to plain steps with the same batches before the method begins, in
            [0, 1).

    Raises:
        ValueError: If a setting is out of range.
    """

    method: Callable[[nn.Module, Settings], Method | None] = lambda _model, _settings: None
    gradients: Callable[[int, Settings], int] = lambda domains, _settings: domains
    search: Mapping[str, LogUniform | Choice] = field(default_factory=dict)
    order: Literal["pooled", "flipflop", "random"] = "flipflop"
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        check_choice("order", self.order, ("pooled", "flipflop", "random"))
        if not 0 <= check_number("warm_up", self.warm_up, at_least=0) < 1:
            raise ValueError(f"warm_up should be in [0, 1) (got {self.warm_up})")


def draw_settings(search: Mapping[str, LogUniform | Choice], draw: int, seed: int) -> Settings:
    """Draw hyperparameters.

    Methods that have one of the same name and range get the same number, so that they differ by the method.

    Args:
        search: The ranges.
        draw: Which draw, from 0; the first is of the defaults.
        seed: Of all draws.

    Returns:
        A value for each name.
    """
    if draw == 0:
        return {name: distribution.default for name, distribution in search.items()}
    return {name: of.draw(random.Random(f"{seed}/{draw}/{name}")) for name, of in search.items()}


def _fish(inner_state: Literal["carry", "reset"]) -> Callable[[nn.Module, Settings], Method]:
    return lambda model, settings: Fish(settings["meta_lr"], model=model, inner_state=inner_state)


def _idgm(agreement: str) -> Callable[[nn.Module, Settings], Method]:
    return lambda model, settings: IDGM(model, settings["gamma"], agreement, keep_graphs=True)


def default_recipes() -> dict[str, Recipe]:
    """Return the methods that ``leave_one_domain_out`` takes if it is given none.

    ERM three times: with batches of all samples, with a domain's batch in each step, and with steps by the mean
    gradient of one batch of each of S domains. What gradient matching gains over the last two is not only that domains
    count alike.

    Returns:
        By name; ERM, to which the others are compared, first.

    Example:
        >>> list(default_recipes())[:2]
        ['ERM', 'ERM, domains in turn']
    """
    meta_lr = {"meta_lr": LogUniform(0.05, 1.0, 0.5)}
    inner_lr = {"inner_lr": LogUniform(1e-3, 0.3, 0.03)}
    fish = Recipe(_fish("reset"), search=meta_lr)
    twice = lambda domains, _settings: 2 * domains  # noqa: E731  as many gradients as Hessian-vector products
    return {
        "ERM": Recipe(order="pooled"),
        "ERM, domains in turn": Recipe(),
        "ERM, mean over domains": Recipe(lambda model, _settings: SmoothFish(0.0, 0.1, model=model)),
        "Fish": fish,
        "Fish, random order": replace(fish, order="random"),
        "Fish, carried": Recipe(_fish("carry"), search=meta_lr),
        "Fish, warm start": replace(fish, warm_up=0.3),
        "SmoothFish": Recipe(
            lambda model, settings: SmoothFish(1.0, settings["inner_lr"], model=model), search=inner_lr
        ),
        "SmoothFish, symmetric": Recipe(
            lambda model, settings: SmoothFish(settings["gamma"], 0.01, model=model, symmetric=True),
            lambda domains, _settings: 3 * domains - 2,
            {"gamma": LogUniform(1e-4, 1e-1, 1e-3)},
        ),
        "IDGM, variance": Recipe(_idgm("variance"), twice, {"gamma": LogUniform(1e-3, 1e1, 1e-1)}),
        "IDGM, inner product": Recipe(_idgm("inner_product"), twice, {"gamma": LogUniform(1e-4, 1e-1, 1e-3)}),
        "IDGM, cosine": Recipe(_idgm("cosine"), twice, {"gamma": LogUniform(1e-2, 1.0, 1e-1)}),
    }
