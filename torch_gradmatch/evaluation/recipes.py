"""How a model is trained in ``leave_one_domain_out``: by a method or in a loop of one's own, and what is searched."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from torch_gradmatch._checks import check_choice
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.fishr import Fishr
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.risks import ERM, GroupDRO, VREx
from torch_gradmatch.methods.smooth_fish import SmoothFish

__all__ = ["DEFAULT", "SHARED", "Choice", "LogUniform", "Recipe", "Settings", "draw_settings", "for_model"]
__all__ += ["known_recipes", "named_recipes", "passes_of", "recipe_of"]

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
        """Draw a number between :attr:`low` and :attr:`high`."""
        return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Choice:
    """A hyperparameter that is one of a few values, each as likely.

    Attributes:
        values: The values; the first draw is the first.

    Raises:
        TypeError: If they are not a tuple or list.
        ValueError: If there is none.
    """

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple | list):
            raise TypeError(f"values should be a tuple of values (got {self.values!r:.80}): Choice((0.9, 0.99))")
        if not self.values:
            raise ValueError("values should hold at least one (got none)")

    @property
    def default(self) -> Any:
        """What the first draw is."""
        return self.values[0]

    def draw(self, generator: random.Random) -> Any:
        """Draw one of :attr:`values`."""
        return generator.choice(self.values)


# What every recipe has: settings of the optimizer, and the samples for one step of it.
SHARED: dict[str, LogUniform | Choice] = {
    "lr": LogUniform(1e-4, 1e-2, 1e-3),
    "weight_decay": LogUniform(1e-6, 1e-2, 1e-6),
    "batch_size": Choice((64, 32, 128)),
}


@dataclass(frozen=True)
class Recipe:
    """How to train a model: by a method, or by a function of one's own.

    Attributes:
        method: ``method(model, settings)`` returns the method to wrap the optimizer with; None for plain steps of the
            optimizer.
        search: The ranges of its hyperparameters, beside those of ``"lr"``, ``"weight_decay"`` and ``"batch_size"``
            that all have.
        train: ``train(model, training, settings)`` trains the model in whatever loop it likes, in the place of a
            method; see :class:`~torch_gradmatch.evaluation.training.Training`.
        order: How batches come, if it does not train by itself. ``"pooled"``: of all training samples, shuffled; only
            without a method. ``"flipflop"`` and ``"random"``: of one domain each, as
            :class:`~torch_gradmatch.DomainBatchSampler` serves them. None: ``"flipflop"`` with a method, ``"pooled"``
            without.
        passes: How often each sample is differentiated in a meta-iteration, for a method that the library does not
            know; a second derivative counts twice.

    Raises:
        TypeError: If ``method`` or ``train`` cannot be called, or a range is none.
        ValueError: If both ``method`` and ``train`` are given, or a setting is out of range.

    Example:
        >>> from torch_gradmatch import Fish
        >>> recipe = Recipe(
        ...     lambda model, settings: Fish(settings["meta_lr"], model=model),
        ...     search={"meta_lr": LogUniform(0.05, 1.0, default=0.5)},
        ... )
        >>> recipe.order
        'flipflop'
    """

    method: Callable[[nn.Module, Settings], Method] | None = None
    search: Mapping[str, LogUniform | Choice] = field(default_factory=dict)
    train: Callable[[nn.Module, Any, Settings], None] | None = None
    order: Literal["pooled", "flipflop", "random"] | None = None
    passes: float | None = None

    def __post_init__(self) -> None:
        for name in ("method", "train"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, Method) or not callable(value)):
                raise TypeError(f"{name} should be a function (got {value!r:.80}): lambda model, settings: ...")
        if self.method is not None and self.train is not None:
            raise ValueError("a Recipe should have method= or train=, not both: train= wraps the optimizer by itself")
        check_ranges("search", self.search)
        if self.order is None:
            object.__setattr__(self, "order", "pooled" if self.method is None else "flipflop")
        if check_choice("order", self.order, ("pooled", "flipflop", "random")) == "pooled" and self.method is not None:
            raise ValueError("order='pooled' is for plain steps: a method needs batches of one domain each")


def check_ranges(name: str, search: Any) -> None:
    """Raise unless something maps names of hyperparameters to ranges."""
    if not isinstance(search, Mapping):
        raise TypeError(f"{name} should map names of hyperparameters to ranges (got {search!r:.80})")
    for key, value in search.items():
        if not isinstance(value, LogUniform | Choice):
            raise TypeError(
                f"{name}[{key!r}] should be a LogUniform or a Choice (got {value!r:.80}): of one value, Choice((v,))"
            )


def passes_of(method: Method, model: nn.Module, domains: int) -> float:
    """Return how often a method differentiates each sample in a meta-iteration.

    Args:
        method: The method; of those that the library does not know it is once.
        model: The model. A second derivative counts twice, one of some of its parameters by their share of all.
        domains: S.

    Returns:
        The number.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> symmetric = SmoothFish(0.1, 0.1, symmetric=True)
        >>> [passes_of(method, model, 4) for method in (Fish(), symmetric, IDGM(model, 0.1))]
        [1.0, 2.5, 2.0]
    """
    if isinstance(method, SmoothFish) and method.symmetric:
        return (3 * domains - 2) / domains
    if isinstance(method, SmoothFish) and method.gamma not in (0, 1):
        return (2 * domains - 1) / domains
    part = method.head if isinstance(method, Fishr) else getattr(method, "matched", None)
    if part is not None:
        twice = part.parameters() if isinstance(part, nn.Module) else part
        return 1 + sum(p.numel() for p in twice) / sum(p.numel() for p in model.parameters())
    return 2.0 if isinstance(method, IDGM) and method.gamma != 0 else 1.0


def draw_settings(search: Mapping[str, LogUniform | Choice], draw: int, seed: int) -> Settings:
    """Draw hyperparameters.

    Recipes that have one of the same name and range get the same number, so that they differ by the method.

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


def for_model(method: Method, model: nn.Module) -> Method:
    """Return a copy of a method for another model of the same architecture.

    Args:
        method: Its model, modules and parameters among its settings are exchanged for those of the same name.
        model: The other model.

    Returns:
        The copy.
    """
    other = copy.copy(method)
    own = getattr(method, "model", None)
    if own is None or own is model:
        return other
    here: dict[str, Any] = dict(model.named_modules()) | dict(model.named_parameters())
    names = {id(value): name for name, value in [*own.named_modules(), *own.named_parameters()]}

    def moved(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(moved, value))
        return here[names[id(value)]] if id(value) in names else value

    vars(other).update({name: moved(value) for name, value in vars(method).items()})
    return other


def _cosine_decay(model: nn.Module, training: Any, settings: Settings) -> None:
    optimizer = training.optimizer(model, settings)
    for batch in training.pooled(settings["batch_size"]):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * (1 + math.cos(math.pi * training.progress)) / 2
        training.step(optimizer, model, batch)


DEFAULT = ("ERM", "ERM, balanced", "Fish", "SmoothFish", "IDGM, head", "Fishr")


def known_recipes(head: str | None = None) -> dict[str, Recipe]:
    """Return the recipes that have a name; it stands for the defaults of the method's class.

    Args:
        head: The name of the model's head, the last linear layer; None for the recipes that need none.

    Returns:
        By name. ``"ERM"`` takes batches of all samples, ``"ERM, balanced"`` steps by the mean gradient of a batch of
        each domain, ``"ERM, domains in turn"`` with a batch of one domain at a time, ``"ERM, cosine decay"`` is the
        control for averaged weights.

    Example:
        >>> list(known_recipes())[:4]
        ['ERM', 'ERM, balanced', 'Fish', 'SmoothFish']
    """
    meta_lr = {"meta_lr": LogUniform(0.05, 1.0, 0.5)}
    strength = {"strength": LogUniform(0.01, 1.0, 0.1)}
    known = {
        "ERM": Recipe(),
        "ERM, balanced": Recipe(lambda model, _: ERM(model=model)),
        "Fish": Recipe(lambda model, s: Fish(s["meta_lr"], model=model), meta_lr),
        "SmoothFish": Recipe(
            lambda model, s: SmoothFish(1.0, s["inner_lr"], model=model), {"inner_lr": LogUniform(1e-3, 0.3, 0.03)}
        ),
        "ERM, domains in turn": Recipe(order="flipflop"),
        "ERM, cosine decay": Recipe(train=_cosine_decay),
        "Fish, reset": Recipe(lambda model, s: Fish(s["meta_lr"], model=model, inner_state="reset"), meta_lr),
        "SmoothFish, symmetric": Recipe(
            lambda model, s: SmoothFish(s["gamma"], 0.01, model=model, symmetric=True),
            {"gamma": LogUniform(1e-4, 1e-1, 1e-3)},
        ),
        "IDGM": Recipe(lambda model, s: IDGM(model, strength=s["strength"]), strength),
        "VREx": Recipe(lambda model, s: VREx(s["beta"], model=model), {"beta": LogUniform(0.1, 100.0, 1.0)}),
        "GroupDRO": Recipe(lambda model, s: GroupDRO(s["eta"], model=model), {"eta": LogUniform(1e-3, 0.1, 0.01)}),
    }
    if head is not None:
        part: Any = lambda model: model.get_submodule(head)  # noqa: E731
        known["IDGM, head"] = Recipe(lambda m, s: IDGM(m, strength=s["strength"], matched=part(m)), strength)
        known["Fishr"] = Recipe(lambda m, s: Fishr(m, part(m), strength=s["strength"]), strength)
    return known


def named_recipes(methods: Any, head: str | None, own: Mapping[str, Recipe] | None = None) -> dict[str, Recipe]:
    """Return recipes by name for whatever somebody has given as ``methods``.

    Args:
        methods: A mapping from names, or a sequence, of names, method objects and recipes; None for the default ones.
        head: As for :func:`known_recipes`.
        own: Other recipes that have a name.

    Returns:
        The recipes.

    Raises:
        TypeError: If it is neither, or one of them is of another kind.
        ValueError: If a name is unknown or there twice, or there is none.
    """
    known = {**known_recipes(head), **(own or {})}
    if methods is None:
        return {name: known[name] for name in DEFAULT if name in known}
    if isinstance(methods, str | Method | Recipe) or not isinstance(methods, Mapping | Sequence):
        raise TypeError(f"methods should be a list or a mapping from names (got {methods!r:.80}): ['ERM', 'Fish']")
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(_name_of(m), m) for m in methods]
    found: dict[str, Recipe] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"methods should have a name each (got {name!r} twice): pass a mapping from names")
        if isinstance(value, str) and value not in known:
            needs = " ('IDGM, head' and 'Fishr' need head=)" if value in ("IDGM, head", "Fishr") else ""
            raise ValueError(f"methods should be among {', '.join(map(repr, known))} (got {value!r}){needs}")
        found[name] = known[value] if isinstance(value, str) else recipe_of(name, value)
    if not found:
        raise ValueError("methods should hold at least one (got none)")
    return found


def _name_of(value: Any) -> str:
    if isinstance(value, Recipe):
        raise TypeError("a Recipe has no name of its own: pass methods as a mapping, {'mine': Recipe(...)}")
    return value if isinstance(value, str) else type(value).__name__


def recipe_of(name: Any, value: Any) -> Recipe:
    """Return a recipe of a method object, or a recipe as it is; raise ``TypeError`` of anything else."""
    if isinstance(value, Method):
        return Recipe(lambda model, _: for_model(value, model))
    if not isinstance(value, Recipe):
        given = type(value).__name__
        raise TypeError(f"methods[{name!r}] should be a name, a method object such as Fish() or a Recipe (got {given})")
    return value
