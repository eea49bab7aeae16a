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

import copy
import inspect
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._random_state import RandomState
from torch_gradmatch.wrapped.members import members, own_attributes
from torch_gradmatch.wrapped.twin import build_again, copy_optimizer

__all__ = ["STEPS", "WEIGHT", "Traits", "Twin", "copy_plain", "is_plain", "same", "traits_of"]

STEPS = (1, 2, 5, 8)  # of a twin, between looks: what holds at each look is no coincidence
WEIGHT = "weight_sum"  # what the implementations of schedule-free call the weight that their average has by now
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
        iterates: For each member (see :func:`~torch_gradmatch.wrapped.members.members`) the names of the iterates in
            ``state[parameter]``.
        averages: The members that keep an average among them, with the weight it has by now in their groups.
        hidden: Where else there are tensors that move with the parameters, in words; not those that never move.
        counters: For each member the names of the object's attributes that its steps change.
        keeps: Whether it keeps anything from one step to the next.
        forgets: Whether it works the parameters out of its state, so that a move of them is forgotten.
        manner: How the twin stepped, for another :class:`Twin`.
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
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        # Not the numbers, but which are zero: without momentum there is no state.
        switches = {k: bool(v) if isinstance(v, int | float) else repr(v) for k, v in settings.items()}
        kinds = {(p.device.type, p.dim(), p.numel() > 0 and p.requires_grad) for p in group["params"]}
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
    """Whether the steps depend on some tensors: whether they lead elsewhere if these are moved."""
    one, other = (Twin(optimizer, dtype, manner) for _ in range(2))
    for twin in (one, other):
        twin.run(sum(STEPS))
    with torch.no_grad():
        tensors = other.tensors()
        for place in places:
            if place in tensors:
                tensors[place].add_(plain.shifts[place.point])
    gradients = one.gradients()
    for twin in (one, other):
        twin.switch()
        twin.run(STEPS[-1], gradients)
    return not all(map(torch.equal, one.points, other.points))


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
    left = sum(float(((a - b) * m).sum()) for a, b, m in zip(moved.points, plain.points, moves, strict=True))
    whole = sum(float(move.square().sum()) for move in moves)
    size = sum(float(p.square().sum()) for p in plain.points)
    rounding = torch.finfo(plain.points[0].dtype).eps if plain.points else 0.0
    return whole > (1000 * rounding) ** 2 * size and left < KEPT * whole  # else it had arrived, and did not move


class Place(NamedTuple):
    """Where in an optimizer there is a tensor of a parameter's shape.

    Attributes:
        path: Of the member.
        is_entry: Whether it is an entry of ``state[parameter]``.
        name: Of the entry, or the way there.
        point: Number of the parameter.
    """

    path: str
    is_entry: bool
    name: str
    point: int

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


class Twin:
    """An optimizer like another one, newly built, over a few tiny parameters with a loss that they lower.

    Args:
        optimizer: The other one.
        dtype: Of its parameters.
        manner: How to step: ``"plain"``, ``"closure"`` or ``"graph"``, after ``backward(create_graph=True)``.
        shift: The parameters and the minimum of the loss are shifted by this many times c.

    Attributes:
        points: The parameters.
        starts: Where they were before the last steps on the loss.
        shifts: Of each, c.
        optimizer: The twin.
        asks_first: Whether every step so far has called the closure before it moved anything.
    """

    def __init__(self, optimizer: Optimizer, dtype: torch.dtype, manner: str, *, shift: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        stand_ins: dict[Tensor, Tensor] = {}
        self.shifts: list[Tensor] = []
        self.points: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            dimensions: set[int] = set()
            for p in group["params"]:
                if p.requires_grad and p.numel() and p.dim() not in dimensions:
                    dimensions.add(p.dim())
                    shape = (2 + len(self.points), *[3, 2, 2, 2][: p.dim() - 1])[: p.dim()]  # no two are the same
                    start, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
                    self.shifts.append((4 * c).to(p.device, dtype))
                    point = nn.Parameter(start.to(p.device, dtype) + shift * self.shifts[-1])
                    self.points.append(point)
                    stand_ins[p] = point
        self.starts = [p.detach().clone() for p in self.points]
        self.asks_first = True
        self._manner = manner
        self._minima = [shift * c for c in self.shifts]
        twin = build_again(optimizer, stand_ins, decays=False)
        if twin is None:
            if any(member.state for member in members(optimizer).values()):
                raise ValueError("no twin can be built, and the state of a copy would have other shapes")
            twin = copy_optimizer(optimizer, stand_ins)
        self.optimizer = twin
        train = getattr(twin, "train", None)
        if callable(train):
            train()

    def run(self, steps: int, gradients: list[Tensor] | None = None) -> None:
        """Take some steps, with these gradients or with those of the loss."""
        _seed(self.points)
        if gradients is None:
            self.starts = [p.detach().clone() for p in self.points]
        for _ in range(steps):
            self._differentiate(gradients)
            if self._manner != "closure":
                self.optimizer.step()
                continue
            before = [p.detach().clone() for p in self.points]
            asked: list[bool] = []

            def closure(before: list[Tensor] = before, asked: list[bool] = asked) -> Tensor:
                asked.append(all(map(torch.equal, before, self.points)))
                return self._differentiate(gradients)

            self.optimizer.step(closure)  # type: ignore[arg-type]
            self.asks_first = self.asks_first and asked[:1] == [True]

    def switch(self) -> None:
        """Switch to what it would be evaluated at and back, if it has such modes."""
        for mode in ("eval", "train"):
            if callable(getattr(self.optimizer, mode, None)):
                getattr(self.optimizer, mode)()

    def _differentiate(self, gradients: list[Tensor] | None) -> Tensor:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            # log cosh and a constant: however long the steps, the gradients are bounded.
            terms = [torch.logaddexp(p - m, m - p).sum() for p, m in zip(self.points, self._minima, strict=True)]
            loss = sum(terms[1:], terms[0])
            loss.backward(create_graph=self._manner == "graph")
        if gradients is not None:
            for p, g in zip(self.points, gradients, strict=True):
                p.grad = g.clone()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Return the gradients at the present point."""
        self._differentiate(None)
        return [p.grad.detach().clone() for p in self.points if p.grad is not None]

    def tensors(self) -> dict[Place, Tensor]:
        """Return every tensor that the optimizer keeps and that has the shape of a parameter."""
        number = {id(p): i for i, p in enumerate(self.points)}
        found: dict[Place, Tensor] = {}
        seen: set[int] = set()
        for path, member in members(self.optimizer).items():
            for key, entry in list(member.state.items()):
                if id(key) in number and isinstance(entry, dict):
                    for name, value in entry.items():
                        point = number[id(key)]
                        if _is_vector(value) and value.shape == self.points[point].shape:
                            seen.add(id(value))
                            found.setdefault(Place(path, True, str(name), point), value)
        for path, member in members(self.optimizer).items():
            rest = {"state": dict(member.state), "param_groups": list(member.param_groups), **own_attributes(member)}
            for name, value in _leaves(rest, number):
                if id(value) in seen or value.dim() == 0 or not _is_vector(value):
                    continue
                for point, p in enumerate(self.points):
                    if value.shape == p.shape and value is not p:
                        seen.add(id(value))
                        found[Place(path, False, name, point)] = value
        return found

    def attributes(self) -> dict[str, dict[str, Any]]:
        """Return copies of what the objects keep outside their state and groups."""
        return {path: copy_plain(own_attributes(m), self.points) for path, m in members(self.optimizer).items()}

    def has_weights(self, path: str) -> bool:
        """Return whether the groups of a member hold the weight that an average has by now."""
        return any(WEIGHT in group for group in members(self.optimizer)[path].param_groups)

    def keeps(self) -> bool:
        """Return whether anything is in the state or was added to the groups or changed there."""
        fresh = {k: v for group in self.optimizer.param_groups for k, v in group.items() if k != "params"}
        known = getattr(self.optimizer, "defaults", {})
        counts = any(k not in known or not same(v, known[k]) for k, v in fresh.items() if is_plain(v))
        return counts or any(
            value is not None
            for member in members(self.optimizer).values()
            for entry in member.state.values()
            for value in (entry.values() if isinstance(entry, dict) else [entry])
        )


def _is_vector(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided


def _seed(points: list[nn.Parameter]) -> None:
    torch.default_generator.manual_seed(0)
    for device in {p.device for p in points}:
        if device.type not in ("cpu", "meta"):
            torch.get_device_module(device).manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is the one that an optimizer may draw from
    random.seed(0)


def _leaves(value: Any, number: Mapping[int, int], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in nested dictionaries, lists and tuples, each with the way there."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            shown = "parameter" if id(key) in number else repr(key)
            yield from _leaves(item, number, f"{path}[{shown}]" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, number, f"{path}[{index}]")


# ------------------------------------------------------------------------------------------------------------ values

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def is_plain(value: object) -> bool:
    """Return whether a value is a number, a string, a tensor or a container of such: it can be copied and compared."""
    if isinstance(value, nn.Parameter):
        return False
    if isinstance(value, Mapping):
        return all((isinstance(k, Tensor) or is_plain(k)) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, (Tensor, torch.Generator, *_SIMPLE))


def copy_plain(values: Mapping[str, Any], parameters: list[Any]) -> dict[str, Any]:
    """Copy those of some values that are plain.

    Args:
        values: By name.
        parameters: Tensors that are not copied but stay themselves: dictionaries may be keyed by them.

    Returns:
        The copies.
    """
    memo = {id(p): p for p in parameters}
    return {
        name: value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value, memo)
        for name, value in values.items()
        if is_plain(value)
    }


def same(one: object, other: object) -> bool:
    """Return whether two plain values are the same, tensors element by element."""
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.shape == other.shape
            and bool((one == other).all())
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):  # arrays have no one answer
        return False
