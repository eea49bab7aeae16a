"""An optimizer around another one: parameter groups, defaults and state are the other's, and so is its checkpoint."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_gradmatch.methods.base import MetaLoop
from torch_gradmatch.slow.average import RunningAverage
from torch_gradmatch.slow.inner_state import members, shown_name

__all__ = ["Wrapper", "is_initialization"]

OWN = "gradmatch"
IN_MID_LOOP = (
    "in the middle of an inner loop, of which torch.distributed.checkpoint does not keep the slow weights: save "
    "between two inner loops (optimizer.inner_step is 0), or by torch.save"
)
WITH_AVERAGE = (
    "with an average of the weights, which torch.distributed.checkpoint does not keep: save optimizer.state_dict() by "
    "torch.save, on each rank its own"
)


def _shared(name: str, doc: str) -> property:
    """Return a property that is the wrapped optimizer's."""

    def set_(self: Wrapper, value: Any) -> None:
        if self._linked:
            setattr(self.optimizer, name, value)

    return property(lambda self: getattr(self.optimizer, name, {}), set_, doc=doc)


class Wrapper(Optimizer):
    """What :class:`~torch_gradmatch.GradMatch` shares with the optimizer that it wraps.

    Args:
        optimizer: The optimizer to wrap. It is not built, stepped or copied, and nothing is written into it.
    """

    _loop: MetaLoop  # the method at work on the optimizer
    _average: RunningAverage | None = None

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._linked = False  # Optimizer.__init__ is about to register groups that are registered already
        super().__init__(optimizer.param_groups, self.defaults)
        self._linked = True

    param_groups: Any = _shared(
        "param_groups",
        """The wrapped optimizer's parameter groups. It is the same list, whatever is done to either.

        Of several optimizers a new list of theirs: what is done to a group is done to it, but appending here has no
        effect. ``optimizer.optimizer.optimizers[0].add_param_group(...)`` adds one.
        """,
    )
    state: Any = _shared("state", "The wrapped optimizer's state; nothing of this class is in it.")
    defaults: Any = _shared("defaults", "The wrapped optimizer's defaults.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; in an inner loop its parameters join from their present values.

        Args:
            param_group: As in ``torch.optim.Optimizer.add_param_group``.
        """
        if self._linked:
            self.optimizer.add_param_group(param_group)

    if not TYPE_CHECKING:  # which would accept any name for the sake of this

        def __getattr__(self, name: str) -> Any:
            if name in ("first_step", "second_step"):
                raise AttributeError(f"{name}() would move the parameters unseen: call step(closure)")
            found = None if name.startswith("_") else getattr(vars(self).get("optimizer"), name, None)
            if not callable(found):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return found

    # --------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict with one more entry, ``"gradmatch"``.

        That has the method's numbers and, in the middle of an inner loop, the slow weights: the model's own state dict
        holds the fast weights then, and the two together resume bit for bit. ``torch.load(..., weights_only=True)``
        reads it. As usual in torch, tensors are not copied.

        ``torch.distributed.checkpoint`` keeps the wrapped optimizer's part only, which is all there is between two
        inner loops. In the middle of one it raises ``KeyError`` with an entry of ``"state"`` that says why.

        Returns:
            The state. For a plain optimizer of the wrapped class save ``optimizer.optimizer.state_dict()``.
        """
        if self._average is not None:
            self._average.check("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = dict(self.optimizer.state_dict())
        lost = IN_MID_LOOP if self._loop.inner_step else None if self._average is None else WITH_AVERAGE
        if lost is not None and isinstance(state_dict.get("state"), dict):
            # torch.distributed.checkpoint drops top-level entries that it does not know, in silence; a parameter that
            # it does not know stops it.
            state_dict["state"] = {**state_dict["state"], lost: {}}
        parameters = self._loop.named_parameters()
        method = type(self._loop.method).__name__
        state_dict[OWN] = {"method": method, "shapes": _shapes(parameters), **self._loop.state_dict()}
        if self._average is not None:
            state_dict[OWN]["average"] = self._average.state_dict(parameters)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        A state dict without ``"gradmatch"``, the wrapped optimizer's own or one from ``torch.distributed.checkpoint``,
        counts as saved between two inner loops.

        Args:
            state_dict: The state.

        Raises:
            TypeError: If it is not a dictionary.
            ValueError: If it is of another model or method, or malformed; the message names the first mismatch and
                nothing has changed.
        """
        if self._average is not None:
            self._average.check("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict should be a dictionary (got {type(state_dict).__name__})")
        wrapped = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, wrapped)
            wrapped = wrapped if replaced is None else dict(replaced)
        # A hook of the user's renames the wrapped optimizer's part; torch's recipe puts the rest from a new state dict.
        wrapped.pop(OWN, None)
        own, state = state_dict.get(OWN), wrapped.get("state")
        lost = [key for key in (IN_MID_LOOP, WITH_AVERAGE) if isinstance(state, dict) and key in state]
        if lost:
            wrapped["state"] = {key: entry for key, entry in wrapped["state"].items() if key not in lost}
            if own is None:
                raise ValueError(f"the state dict was saved {lost[0]}")
        self._check_own(own)
        self._load_wrapped(wrapped)
        self._loop.load_state_dict(own or {})
        if self._average is not None:
            if "average" not in (own or {}):
                warnings.warn("the state dict has no average of the weights: it begins anew", stacklevel=2)
            self._average.load_state_dict((own or {}).get("average", {}), self._loop.named_parameters())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_own(self, own: Any) -> None:
        """Raise if our entry of a state dict is of another method or of other parameters, or malformed."""
        if own is not None:
            shapes = own.get("shapes") if isinstance(own, dict) else None
            if not isinstance(shapes, dict):
                raise ValueError(f"the state dict's {OWN!r} or its 'shapes' are missing or malformed (got {own!r:.80})")
            theirs, ours = own.get("method"), type(self._loop.method).__name__
            parameters = self._loop.named_parameters()
            if theirs != ours:
                raise ValueError(f"the state dict was saved by method {theirs!r}; this optimizer uses {ours}")
            for name in shapes.keys() - parameters.keys():
                raise ValueError(f"the state dict is of another model: parameter {name!r} does not exist here")
            for name, shape in _shapes(parameters).items():
                if str(shapes.get(name, shape)) != str(shape):
                    raise ValueError(f"parameter {name!r} has shape {shapes[name]} in the state dict and {shape} here")
            if self._average is not None and "average" in own:
                self._average.check_state_dict(own["average"], parameters)
            elif "average" in own:
                raise ValueError(
                    "the state dict has an average of the weights, and this optimizer keeps none: wrap it with "
                    "average=Average(), or delete state_dict['gradmatch']['average']"
                )
        self._loop.check_state_dict(own or {})

    def _load_wrapped(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's part; put everything back if it refuses."""
        before = [(vars(member), dict(vars(member))) for member in members(self.optimizer)]
        try:
            self.optimizer.load_state_dict(state_dict)
        except Exception as error:
            for attributes, kept in before:  # loading makes new dictionaries for state and groups
                attributes.clear()
                attributes.update(kept)
            name = shown_name(self.optimizer)
            raise ValueError(f"the wrapped {name} cannot load the state dict: {error!r:.300}") from error

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer.__getstate__ knows nothing of a subclass's own attributes; hooks are dropped, as it does, and so is
        # the step() that a scheduler has put on the object. It also drops such attributes of the wrapped optimizer
        # (LBFGS has some), which are carried along for it here.
        carried = [
            (member, {k: v for k, v in vars(member).items() if not _is_of_every_optimizer(k)})
            for member in members(self.optimizer)
        ]
        own = {k: v for k, v in vars(self).items() if not _is_of_every_optimizer(k)}
        return {**own, "_wrapped_attributes": carried}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for member, attributes in state.pop("_wrapped_attributes"):
            for name, value in attributes.items():
                vars(member).setdefault(name, value)
        super().__setstate__(state)


def _is_of_every_optimizer(name: str) -> bool:
    return name in ("state", "param_groups", "step") or name.startswith(("_optimizer_", "_zero_grad_"))


def _shapes(parameters: dict[Any, Tensor]) -> dict[Any, list[int]]:
    """Return the shapes of parameters by name, without those that are not made yet (lazy)."""
    return {name: list(p.shape) for name, p in parameters.items() if not is_lazy(p)}


def is_initialization(optimizer: Optimizer) -> bool:
    """Return whether ``step(closure=None)`` is the call by which ``torch.distributed.checkpoint`` makes a state.

    It sets every lr and every gradient to zero before, where there is no state, and wants to load into what the
    optimizer makes: that is no inner step.
    """
    groups = optimizer.param_groups
    if optimizer.state or any(float(group.get("lr", 0.0)) != 0.0 for group in groups):
        return False
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    if not trained or any(p.grad is None or p.grad.is_sparse for p in trained):
        return False
    found = (p.grad.any() for p in trained)  # of a DTensor the answer is the same on every rank
    return not any(bool(a.full_tensor() if hasattr(a, "full_tensor") else a) for a in found)
