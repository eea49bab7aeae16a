r"""Slow copies of what the wrapped optimizer keeps in parameter space: its iterates.

Schedule-free keeps a point z beside the parameters y, and a model to evaluate is an affine combination of both;
Lookahead keeps slow weights of its own. Such an optimizer walks with a tuple of points, of which the parameters are
one. So the meta-update moves all of them, :math:`z \leftarrow z + \epsilon(\tilde z - z)`, by the same
:math:`\epsilon` as :math:`\theta`: what was an affine combination of them, still is. Which they are,
:mod:`torch_gradmatch.wrapped.traits` finds out.

Where one is an average, its weight so far moves by the same fraction, too: a meta-iteration then is the inner loop with
time running :math:`\epsilon` times as fast. Without that the k-th inner step averages with 1/k, of which
:math:`\epsilon/k` is kept, and the average hardly leaves where training began. Loss of schedule-free SGD after 150/eps
meta-iterations on three domains (lr 0.3) at the training point and at the point to evaluate, for eps = 1, 0.3, 0.1 and
0.05: 0.14/0.16 0.13/0.14 0.13/0.14 0.13/0.14; with z interpolated but not the weight 0.14/0.16 0.24/0.32 0.38/0.82
0.47/1.18; with neither 0.14/0.16 0.13/0.15 0.13/0.32 0.13/1.51.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._checks import check_entry
from torch_gradmatch._foreach import copy_all_
from torch_gradmatch.slow.copies import check_copies
from torch_gradmatch.wrapped.members import members, shown_name
from torch_gradmatch.wrapped.twin import constructor_arguments
from torch_gradmatch.wrapped.watched import WEIGHT

__all__ = ["SlowIterates"]


class SlowIterates:
    """The slow copies of one optimizer's iterates, in ``state[parameter]["slow_NAME"]``.

    An iterate that a step of the inner loop makes begins where its parameter is then, and that is the slow weight.

    Args:
        state: Where the copies live, keyed by parameter (``GradMatch.state``).
        optimizer: The wrapped optimizer.
        names: For each of its members (see :func:`~torch_gradmatch.wrapped.members.members`) the names of the iterates.
        averages: The members in whose groups there is the weight of an average.

    Attributes:
        places: Member and name of each iterate, by the key of its copies; empty for most optimizers.
    """

    def __init__(
        self,
        state: MutableMapping[Tensor, Any],
        optimizer: Optimizer,
        names: Mapping[str, Sequence[str]],
        averages: Sequence[str] = (),
    ) -> None:
        self.state = state
        self._held: set[tuple[Tensor, str]] = set()  # which copies belong to the inner loop in progress
        self._optimizer = optimizer
        self._modes: dict[tuple[str, int | None, str], bool] = {}  # after the last step
        inside = members(optimizer)
        self._averages = [inside[path] for path in averages]
        self._weights: list[float] = []  # when that loop began
        self.places = {
            f"slow_{path}.{name}" if path else f"slow_{name}": (inside[path], name)
            for path, of_path in names.items()
            for name in of_path
        }

    def _iterates(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, str, Tensor]]:
        """Return parameter, key and iterate of all that there are now."""
        found = []
        seen: set[int] = set()
        for key, (member, name) in self.places.items():
            for p in parameters:
                entry = member.state.get(p)
                value = entry.get(name) if isinstance(entry, dict) else None
                if isinstance(value, Tensor) and value.shape == p.shape and id(value) not in seen:
                    seen.add(id(value))  # two members may share one state
                    found.append((p, key, value))
        return found

    def snapshot(self, parameters: Sequence[Tensor]) -> None:
        """Copy the present iterates: an inner loop begins.

        Args:
            parameters: Those that are in it.
        """
        self.close()
        if not self.places:
            return
        self._modes, self._weights = self.modes(), self.weights()
        into, out_of = [], []
        for p, key, value in self._iterates(parameters):
            slow = self.state[p].get(key)
            if slow is None or _kind(slow) != _kind(value):
                slow = self.state[p][key] = torch.empty_like(value)
            into.append(slow)
            out_of.append(value)
            self._held.add((p, key))
        with torch.no_grad():
            copy_all_(into, out_of)

    def pairs(self, slow_weights: Mapping[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the slow copy of every iterate and the iterate itself.

        Args:
            slow_weights: Of each parameter in the inner loop.

        Returns:
            The pairs, in the order of members, names and parameters.
        """
        found = []
        for p, key, value in self._iterates(list(slow_weights)):
            if (p, key) not in self._held:
                self.state[p][key] = slow_weights[p].detach().to(value.device, value.dtype, copy=True)
                self._held.add((p, key))
            found.append((self.state[p][key], value))
        return found

    def note_modes(self) -> None:
        """Take note of the optimizer's modes: a step was taken in them, and may have changed what is no mode."""
        self._modes = self.modes()

    def modes(self) -> dict[tuple[str, int | None, str], bool]:
        """Return the switches of the optimizer, such as schedule-free's ``train_mode``: where a parameter stands.

        Returns:
            By member, number of the group (None for the object itself) and name.
        """
        found: dict[tuple[str, int | None, str], bool] = {}
        seen: set[int] = set()
        # Innermost first, for the sake of the numbers: several optimizers' groups are listed one after the other.
        for path, member in reversed(members(self._optimizer).items()):
            accepted = constructor_arguments(member)[0]
            for index, values in enumerate([*member.param_groups, vars(member)]):
                group = None if values is vars(member) else index
                if id(values) in seen:
                    continue
                seen.add(id(values))
                switches = {k: v for k, v in values.items() if isinstance(v, bool) and k not in accepted}
                found |= {(path, group, name): value for name, value in switches.items()}
        return found

    def set_modes(self, modes: Mapping[tuple[str, int | None, str], bool]) -> None:
        """Set the switches.

        Args:
            modes: What :meth:`modes` once returned.
        """
        inside = members(self._optimizer)
        for (path, group, name), value in modes.items():
            (vars(inside[path]) if group is None else inside[path].param_groups[group])[name] = value

    def changed_modes(self) -> list[str]:
        """Return the names of the switches that are not what they were after the last step of the inner loop."""
        present = self.modes() if self._modes else {}
        return [switch[-1] for switch, value in self._modes.items() if present.get(switch) != value]

    def check_mode(self, call: str) -> None:
        """Raise if the optimizer was switched to another mode in the inner loop in progress.

        Args:
            call: What is about to be done.

        Raises:
            RuntimeError: If it was: the parameters then are another point than their slow weights.
        """
        changed = self.changed_modes()
        if changed:
            raise RuntimeError(
                f"{call} after {shown_name(self._optimizer)} was switched to another mode in the middle of an inner "
                f"loop ({changed[0]!r}): its parameters are not what the slow weights are slow weights of. Call "
                "optimizer.train() first; to evaluate in the middle of an inner loop call eval() and train() inside "
                "slow_weights()"
            )

    def weights(self) -> list[float]:
        """Return the weights that averages have by now, of every group; 0 where none has begun."""
        return [group.get(WEIGHT, 0.0) for member in self._averages for group in member.param_groups]

    def set_weights(self, weights: Sequence[float]) -> None:
        """Set them.

        Args:
            weights: As :meth:`weights` returns them; groups that were added since keep theirs, and those whose average
                has not begun have none.
        """
        groups = [group for member in self._averages for group in member.param_groups]
        for group, weight in zip(groups, weights, strict=False):
            if WEIGHT in group:
                group[WEIGHT] = weight

    def slow_weights_of_averages(self) -> list[float]:
        """Return what they were when the inner loop began.

        Returns:
            As :meth:`weights`.
        """
        return self._weights

    def interpolate_weights(self, meta_lr: float) -> None:
        """Move the weights of averages as the averages are moved.

        Args:
            meta_lr: The fraction.
        """
        pairs = zip(self._weights, self.weights(), strict=False)
        self.set_weights([slow + meta_lr * (fast - slow) for slow, fast in pairs])

    def close(self) -> None:
        """End the inner loop."""
        self._held = set()
        self._modes, self._weights = {}, []

    @torch.no_grad()
    def complete(self, parameters: Sequence[Tensor]) -> None:
        """Let every iterate have a copy, also where no inner loop holds one: its present value.

        Args:
            parameters: The optimizer's.
        """
        for p, key, value in self._iterates(parameters) if self.places else ():
            if key not in self.state[p]:
                self.state[p][key] = value.clone()

    def state_dict(self, parameters: Sequence[Tensor], *, whole: bool = False) -> dict[str, Any]:
        """Return the copies that belong to an inner loop in progress.

        Args:
            parameters: The optimizer's, whose positions stand for them.
            whole: Whether to return all other copies, too.

        Returns:
            ``"slow_iterates"`` by position and key, not copied again; ``"held_iterates"``, by key the positions of
            those that belong to the inner loop; and ``"average_weights"``, numbers.
        """
        found: dict[int, dict[str, Tensor]] = {}
        held: dict[str, list[int]] = {}
        for i, p in enumerate(parameters):
            entry = self.state.get(p) or {}
            keys = [key for key in self.places if (p, key) in self._held or (whole and key in entry)]
            if keys:
                found[i] = {key: self.state[p][key] for key in keys}
            for key in keys:
                if (p, key) in self._held:
                    held.setdefault(key, []).append(i)
        return {"slow_iterates": found, "held_iterates": held, "average_weights": list(self._weights)}

    def check_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` naming the first entry that cannot be loaded.

        Args:
            state: With what :meth:`state_dict` once returned.
            parameters: Those to load it for.

        Raises:
            ValueError: If it is malformed or was saved for another optimizer.
        """
        if state.get("slow_iterates", ()) is None:  # of a version that kept none
            if self.places and state["is_open"]:
                raise ValueError(
                    "the state dict was saved by an earlier version in the middle of an inner loop, without the slow "
                    f"copies of what {shown_name(self._optimizer)} keeps beside the parameters: resume from one that "
                    "was saved between two inner loops"
                )
            return
        check_entry(state, "slow_iterates", dict)
        check_entry(state, "average_weights", list)
        if not all(isinstance(weight, float | int) for weight in state["average_weights"]):
            raise ValueError(f"the state dict's 'average_weights' is malformed (got {state['average_weights']!r:.80})")
        for i, copies in state["slow_iterates"].items():
            if not isinstance(copies, dict):
                raise ValueError(f"the state dict's 'slow_iterates' is malformed (got {copies!r:.80})")
            if not set(copies) <= set(self.places):
                raise ValueError(f"the state dict holds slow iterates {list(copies)!r:.80}, which do not exist here")
            for copy in copies.values():
                check_copies("slow iterate of parameter", {i: copy}, dict(enumerate(parameters)))
        held = state.get("held_iterates", {})  # before format 4 no others were saved
        if not isinstance(held, dict) or not all(isinstance(positions, list) for positions in held.values()):
            raise ValueError(f"the state dict's 'held_iterates' is malformed (got {held!r:.80})")
        for key, positions in held.items():
            if len(set(positions)) < len(positions):
                raise ValueError(
                    f"the state dict's 'held_iterates' has a position of {key!r} twice (got {positions!r:.80})"
                )
            copies = {i: of_p[key] for i, of_p in state["slow_iterates"].items() if key in of_p}
            check_copies(f"{key} of parameter", copies, dict(enumerate(parameters)), *positions)

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Continue from a state that :meth:`check_state_dict` found good. Its tensors are copied.

        Args:
            state: With what :meth:`state_dict` once returned.
            parameters: Those to load it for.
        """
        self.close()
        self._modes, self._weights = self.modes(), list(state["average_weights"])
        for i, copies in (state["slow_iterates"] or {}).items():
            p = parameters[i]
            for key, copy in copies.items():
                self.state[p][key] = copy.detach().clone().to(p.device)
                if "held_iterates" not in state or i in state["held_iterates"].get(key, ()):
                    self._held.add((p, key))


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
