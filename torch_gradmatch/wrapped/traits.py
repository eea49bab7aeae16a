r"""What a wrapped optimizer is like, found out by watching another of its kind take a few steps on a tiny problem.

Fish moves the parameters between two steps of an optimizer that knows nothing of it. Where an optimizer keeps points of
parameter space by itself (the z of schedule-free, the slow weights of Lookahead, an average of the iterates), these
have to move along. No class says which of its tensors are such **iterates**, but they have a property that momenta and
sums of gradients have not. Let one twin train on :math:`f(\theta)` from :math:`\theta_0` and another on
:math:`f(\theta - c)` from :math:`\theta_0 + c`: both see the same gradients, so all that is made of gradients is the
same in both, and what is a copy or an average of parameters differs by c.

That is a property of what the optimizer does and not of its name or of one moment's values: at :math:`|\theta|^2/2`
the gradient is the parameter. Of these, an iterate is what the steps depend on: an average that is only kept for later
(that of ASGD) is right as it is, an average of the points visited. An optimizer of which no twin can be built, or which
knows better, says it by an attribute ``gradmatch_iterates``, the names of its iterates in ``state[parameter]``.

Schedule-free averages with weights, whose sum so far is in its groups. Where the points move by a fraction of what an
inner loop did, so does that sum: else the average would come to a standstill (measured: docs of ``SlowIterates``).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._random_state import RandomState
from torch_gradmatch.wrapped.members import NO_SETTINGS, members
from torch_gradmatch.wrapped.values import same
from torch_gradmatch.wrapped.watched import WEIGHT, Place, Twin

__all__ = ["STEPS", "Traits", "traits_of"]

STEPS = (1, 2, 5, 8)  # of a twin, between looks: what holds at each look is no coincidence
SAME = 1e-3  # relative: how exactly an iterate moves along; weight decay lets it lag behind a little, all of it alike
HALF = 0.5  # of c by which an average should have moved; a momentum with weight decay in it moves by less
KEPT = 0.7  # of a move of the parameters that should be left of it as many steps later as there were last


@dataclass(frozen=True)
class Traits:
    """What a wrapped optimizer is like.

    Attributes:
        known: Whether a twin could be watched; if not, the rest is what its signature and its attributes say.
        needs_closure: Whether its ``step`` cannot do without a closure.
        asks_first: Whether it calls the closure before it moves anything, as LBFGS does and SAM does not.
        iterates: For each member (the optimizer itself and those inside it, by their paths) the names of the iterates
            in ``state[parameter]``.
        averages: The members that keep an average among them, with the weight it has by now in their groups.
        hidden: Where else there are tensors that move with the parameters, in words; not those that never move.
        counters: For each member the names of the object's attributes that its steps change.
        keeps: Whether it keeps anything from one step to the next.
        forgets: Whether it works the parameters out of its state, so that a move of them is forgotten.
        manner: How the twin stepped, for another twin.
        dtype: Of its parameters.
    """

    known: bool = False
    needs_closure: bool = False
    asks_first: bool = False
    iterates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    averages: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    counters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keeps: bool = True
    forgets: bool = False
    manner: str = "plain"
    dtype: torch.dtype = torch.float64


def traits_of(optimizer: Optimizer) -> Traits:
    """Find out what an optimizer is like. It is not touched, and no random state is changed.

    Args:
        optimizer: Any.

    Returns:
        What was found.

    Example:
        >>> import torch
        >>> traits = traits_of(torch.optim.LBFGS([torch.nn.Parameter(torch.ones(2))]))
        >>> traits.needs_closure, traits.asks_first, traits.iterates
        (True, True, {})
    """
    key = _kind_of(optimizer)
    if key is not None and key in _KNOWN:
        return _KNOWN[key]
    random_state = RandomState.capture({p.device for group in optimizer.param_groups for p in group["params"]})
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")  # they were given when the user built it
            found = _watch(optimizer)
    finally:
        random_state.restore()
    told = {
        path: tuple(member.gradmatch_iterates)
        for path, member in members(optimizer).items()
        if hasattr(member, "gradmatch_iterates")
    }
    iterates = {path: names for path, names in {**found.iterates, **told}.items() if names}
    averages = (path for path, member in members(optimizer).items() if any(WEIGHT in g for g in member.param_groups))
    traits = replace(
        found,
        iterates=iterates,
        averages=tuple(path for path in dict.fromkeys((*found.averages, *averages)) if path in iterates),
        hidden=() if told else found.hidden,
    )
    if key is not None:
        _KNOWN[key] = traits
    return traits


_KNOWN: dict[Any, Traits] = {}


def _kind_of(optimizer: Optimizer) -> Any:
    """Return what the traits of torch's own optimizers depend on, to look at each kind once; None for all others."""
    if not type(optimizer).__module__.startswith("torch.optim.") or hasattr(optimizer, "gradmatch_iterates"):
        return None
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k not in NO_SETTINGS}
        # Not the numbers, but which are zero: without momentum there is no state.
        switches = {k: bool(v) if isinstance(v, int | float) else repr(v) for k, v in settings.items()}
        kinds = {(p.device.type, p.dim(), p.numel() > 0) for p in group["params"]}
        groups.append((tuple(sorted(switches.items())), frozenset(kinds)))
    return type(optimizer), tuple(groups)


def _watch(optimizer: Optimizer) -> Traits:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    manners = ["plain", "graph"] if closure is None else ["plain", "closure", "graph"]
    if closure is not None and closure.default is inspect.Parameter.empty:
        manners = ["closure"]
    for dtype in (torch.float64, torch.float32):
        for manner in manners:
            try:
                return _examine(optimizer, dtype, manner)
            except Exception:  # noqa: BLE001  any class of optimizer, any reason: there may be another way
                continue
    return Traits(needs_closure=manners == ["closure"], asks_first=manners == ["closure"])


def _examine(optimizer: Optimizer, dtype: torch.dtype, manner: str) -> Traits:
    """Compare a twin with a shifted one, with itself before its steps, and with one whose parameters were moved."""
    plain, shifted, moved = (Twin(optimizer, dtype, manner, shift=shift) for shift in (0.0, 1.0, 0.0))
    before = plain.attributes()
    counters: dict[str, dict[str, None]] = {}
    found: dict[Place, bool] = {}
    early: dict[Place, Tensor] = {}
    for steps in STEPS:
        for twin in (plain, shifted, moved):
            twin.run(steps)
        others = shifted.tensors()
        for place, tensor in plain.tensors().items():
            if place not in found:
                early[place] = tensor.clone()
            follows = place in others and _follows(others[place] - tensor, plain.shifts[place.point])
            found[place] = found.get(place, True) and follows
        for path, values in plain.attributes().items():
            changed = [name for name, value in values.items() if not same(value, before[path].get(name))]
            counters.setdefault(path, {}).update(dict.fromkeys(changed))
    points = [place for place, follows in found.items() if follows]
    last = plain.tensors()
    moving = [place for place in points if not same(early[place], last[place])]
    names: dict[str, dict[str, None]] = {}
    for place in points:
        if place.is_entry and place.name not in names.get(place.path, {}):
            alike = [p for p in points if p[:3] == place[:3]]
            if manner == "graph" or _matters(optimizer, plain, dtype, manner, alike):
                names.setdefault(place.path, {})[place.name] = None
    return Traits(
        known=True,
        needs_closure=manner == "closure",
        asks_first=manner == "closure" and plain.asks_first,
        iterates={path: tuple(of_path) for path, of_path in names.items()},
        averages=tuple(path for path in names if plain.has_weights(path)),
        hidden=tuple(sorted({str(place) for place in moving if not place.is_entry})),
        counters={path: tuple(changed) for path, changed in counters.items() if changed},
        keeps=plain.keeps() or any(counters.values()),
        # A gradient that is given has no graph, and does not fit the loss that a line search compares.
        forgets=manner == "plain" and _forgets(plain, moved, moving),
        manner=manner,
        dtype=dtype,
    )


def _matters(optimizer: Optimizer, plain: Twin, dtype: torch.dtype, manner: str, places: list[Place]) -> bool:
    """Whether the parameters depend on some tensors: whether steps and modes lead elsewhere if these are moved."""
    one, other = (Twin(optimizer, dtype, manner) for _ in range(2))
    for twin in (one, other):
        twin.run(sum(STEPS))
    with torch.no_grad():
        tensors = other.tensors()
        for place in places:
            if place in tensors:
                tensors[place].add_(plain.shifts[place.point])
    gradients = one.gradients()
    one.switch()
    other.switch()
    matters = not all(map(torch.equal, one.points, other.points))
    for twin in (one, other):
        twin.run(STEPS[-1], gradients)
    return matters or not all(map(torch.equal, one.points, other.points))


def _follows(difference: Tensor, shift: Tensor) -> bool:
    """Whether a tensor of the shifted twin is shifted, too: all of it by the same part of the shift, most of it."""
    fraction = float((difference * shift).sum() / shift.square().sum())
    rest = float((difference - fraction * shift).abs().max())
    return HALF <= fraction <= 1 + SAME and rest <= SAME * fraction * float(shift.abs().max())


def _forgets(plain: Twin, moved: Twin, iterates: list[Place]) -> bool:
    """Return whether little is left of a move after some steps with the same gradients.

    Parameters and iterates of one of two equal twins are moved back by half of what the last steps did, as Fish does.
    Iterates that the steps have not moved (where training began, for instance) are left alone: Fish's interpolation
    does nothing to them either.
    """
    moves = [(start - point).detach() / 2 for start, point in zip(plain.starts, plain.points, strict=True)]
    tensors = moved.tensors()
    with torch.no_grad():
        for point, move in zip(moved.points, moves, strict=True):
            point.add_(move)
        for place in iterates:
            tensors[place].add_(moves[place.point])
    gradients = plain.gradients()
    for twin in (plain, moved):
        twin.run(STEPS[-1], gradients)
    for one, other, move in zip(moved.points, plain.points, moves, strict=True):
        left, whole = float(((one - other) * move).sum()), float(move.square().sum())
        rounding = 1000 * torch.finfo(other.dtype).eps
        # A point that had arrived did not move.
        if whole > rounding**2 * float(other.square().sum()) and left < KEPT * whole:
            return True
    return False
