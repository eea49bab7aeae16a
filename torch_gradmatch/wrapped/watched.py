"""A twin of an optimizer at work on a tiny problem, and the tensors it keeps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch.wrapped.members import NO_SETTINGS, members, own_attributes
from torch_gradmatch.wrapped.twin import build_again, copy_optimizer
from torch_gradmatch.wrapped.values import copy_plain, is_plain, same

__all__ = ["WEIGHT", "Place", "Twin"]

WEIGHT = "weight_sum"  # what the implementations of schedule-free call the weight that their average has by now


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
                if p.numel() and p.dim() not in dimensions:
                    dimensions.add(p.dim())
                    shape = (2 + len(self.points), *[3, 2, 2, 2][: p.dim() - 1])[: p.dim()]  # no two are the same
                    start, c = (
                        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in range(2)
                    )
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
                        if id(value) in seen:  # two members may share one state
                            continue
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
        fresh = {k: v for group in self.optimizer.param_groups for k, v in group.items() if k not in NO_SETTINGS}
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
