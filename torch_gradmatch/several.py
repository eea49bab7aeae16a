"""Several optimizers as one: Muon for the matrices and AdamW for the rest, for instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch.slow.inner_state import wants_closure

__all__ = ["SeveralOptimizers", "check_optimizer"]


def check_optimizer(name: str, value: object) -> Optimizer:
    """Return ``value`` if it is an optimizer, already built and whole."""
    kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    if not isinstance(value, Optimizer):
        raise TypeError(f"{name} should be a torch.optim.Optimizer, already built (got {kind})")
    if not hasattr(value, "param_groups"):
        raise TypeError(
            f"{name} is a {kind}, which has no param_groups, so it is no whole optimizer: use one whose __init__ calls "
            "that of torch.optim.Optimizer"
        )
    return value


class SeveralOptimizers(Optimizer):
    """Several optimizers over disjoint parameters as one: a step is one step of each, in order.

    The parameter groups are those of the optimizers, one after the other. A scheduler takes this object or any of the
    optimizers. Each optimizer keeps its own state.

    Args:
        optimizers: At least one. None of them may need a closure.

    Attributes:
        optimizers: The optimizers, in order.

    Raises:
        TypeError: If one is no optimizer.
        ValueError: If the list is empty, an optimizer is in it twice or needs a closure, or two hold the same
            parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = [check_optimizer(f"optimizer[{index}]", one) for index, one in enumerate(optimizers)]
        if not self.optimizers:
            raise ValueError("optimizer is an empty list: pass at least one torch.optim.Optimizer")
        for index, optimizer in enumerate(self.optimizers):
            if any(optimizer is other for other in self.optimizers[:index]):
                raise ValueError(f"optimizer[{index}] is in the list twice: pass each optimizer once")
            if wants_closure(optimizer):
                raise ValueError(
                    f"optimizer[{index}], a {type(optimizer).__name__}, needs a closure to evaluate the loss where it "
                    "has moved the parameters, which the others would move meanwhile: wrap it by itself"
                )
        self._sizes: list[int] = []  # of the groups when they were last looked at
        self._check_disjoint()
        self._linked = False  # Optimizer.__init__ is about to register groups that are registered already
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        super().__init__(self.param_groups, {k: v for k, v in first.items() if all(k in other for other in others)})
        self._linked = True

    def _check_disjoint(self) -> None:
        """Raise if two of them hold a parameter; look only where groups were added or became longer."""
        sizes = [len(group["params"]) for group in self.param_groups]
        if sizes == self._sizes:
            return
        owner: dict[Tensor, int] = {}
        for index, optimizer in enumerate(self.optimizers):
            for position, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                if owner.setdefault(p, index) != index:
                    raise ValueError(
                        f"optimizer[{owner[p]}] and optimizer[{index}] hold the same parameter, number {position} of "
                        f"the latter's, of shape {tuple(p.shape)}: each parameter should be in one of them only"
                    )
        self._sizes = sizes

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, in a new list: to add one, add it to one of the optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._refuse("add a group to one of them, optimizer.optimizer.optimizers[0].add_param_group(...)", groups)

    @property  # type: ignore[override]
    def state(self) -> Mapping[Any, Any]:
        """What they keep for each parameter, to be read; each keeps its own."""
        return MappingProxyType({p: entry for one in self.optimizers for p, entry in one.state.items()})

    @state.setter
    def state(self, state: Any) -> None:
        self._refuse("each has its own state, optimizer.optimizer.optimizers[0].state", state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: it would not be clear whose the group is.

        Args:
            param_group: Any.
        """
        self._refuse("add a group to one of them, optimizer.optimizer.optimizers[0].add_param_group(...)", param_group)

    def _refuse(self, instead: str, _value: object) -> None:
        if self._linked:
            raise RuntimeError(f"{len(self.optimizers)} optimizers are wrapped as one: {instead}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: As in ``torch.optim.Optimizer.zero_grad``.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of each.

        Args:
            closure: Evaluated once, before all steps.

        Returns:
            What the closure returned.
        """
        self._check_disjoint()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return every optimizer's state dict in one.

        Returns:
            One like that of a single optimizer over all parameters. If one of them has another layout than
            ``torch.optim.Optimizer``'s, a list of all under ``"optimizers"``.
        """
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        if not all(map(_can_be_joined, states, self.optimizers)):
            return {"optimizers": states}
        joined: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for state, optimizer in zip(states, self.optimizers, strict=True):
            joined["state"] |= {first + index: entry for index, entry in state["state"].items()}
            for group in state["param_groups"]:
                joined["param_groups"].append({**group, "params": [first + index for index in group["params"]]})
            first += _size(optimizer)
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load every optimizer's.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: If there is another number of them.
        """
        states = state_dict["optimizers"] if "optimizers" in state_dict else self._parted(state_dict)
        if len(states) != len(self.optimizers):
            raise ValueError(f"the state dict is of {len(states)} optimizers and there are {len(self.optimizers)} here")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def _parted(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what each of them would have saved."""
        groups, states = list(state_dict["param_groups"]), []
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state dict has {len(groups)} groups and these optimizers {len(self.param_groups)}")
        for optimizer in self.optimizers:
            its_groups = [groups.pop(0) for _ in optimizer.param_groups]
            its_parameters = {index for group in its_groups for index in group["params"]}
            state = {index: entry for index, entry in state_dict["state"].items() if index in its_parameters}
            states.append({"state": state, "param_groups": its_groups})
        return states

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers, "_sizes": self._sizes, "_linked": True}

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.optimizers))


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _can_be_joined(state_dict: dict[str, Any], optimizer: Optimizer) -> bool:
    """Whether a state dict has the layout of ``torch.optim.Optimizer``'s and nothing else."""
    if set(state_dict) != {"state", "param_groups"}:
        return False
    numbers = {index for group in state_dict["param_groups"] for index in group["params"]}
    return numbers <= set(range(_size(optimizer))) and numbers.issuperset(state_dict["state"])
