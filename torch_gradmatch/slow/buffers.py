r"""The slow copy of a model's buffers: BatchNorm statistics and whatever else a forward pass moves.

Unlike parameters, buffers move in the **forward** pass, before any optimizer is called. So the slow copy that belongs
to an inner loop is taken by a forward pre-hook, just before the loop's first forward pass: the first one in training
mode and with gradients enabled. One without gradients (``swa_utils.update_bn``, evaluation in training mode) can lead
to no step; what it moves is the user's. Neither does ``torch.func.functional_call`` count, which puts other tensors
into the model for a while: a copy counts only if, by the first step, the model holds the very tensors copied.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_gradmatch._checks import check_entry
from torch_gradmatch._foreach import clone_all, in_transform
from torch_gradmatch.slow.copies import SlowCopies, check_copies, slow_dtype
from torch_gradmatch.slow.finite import find_nonfinite
from torch_gradmatch.slow.saved_buffers import BufferSlots, clones

__all__ = ["SlowBuffers", "check_buffers", "no_buffers", "unfollowed"]


class _Hook:
    """A module's hook that serves a :class:`SlowBuffers`.

    It holds its owner weakly, and a copied or pickled model carries only a dead hook along, never the optimizer.
    """

    def __init__(self, owner: SlowBuffers | None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    @property
    def owner(self) -> SlowBuffers | None:
        return None if self._owner is None else self._owner()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return type(self), (None,)


class _BeforeForward(_Hook):
    """Lets the owner copy the buffers before a forward pass that may lead to a step moves them.

    Attributes:
        saw_other: Whether the module ran in training mode without gradients: what moved is the user's.
    """

    def __init__(self, owner: SlowBuffers | None) -> None:
        super().__init__(owner)
        self.saw_other = False

    def __call__(self, module: nn.Module, _args: Any) -> None:
        if not module.training:
            return
        if not torch.is_grad_enabled():
            self.saw_other = True  # also when compiled: the compiler carries this out each time
            return
        if torch.compiler.is_compiling():  # the copy made before counts; see SlowBuffers
            return
        if in_transform():  # torch.func puts other buffers into the model: its own do not move
            return
        owner = self.owner
        if owner is not None:
            owner.before_forward(module)


class _AfterLoad(_Hook):
    """Lets the owner follow ``model.load_state_dict``."""

    def __call__(self, _module: nn.Module, _incompatible_keys: Any) -> None:
        owner = self.owner
        if owner is not None:
            owner.follow()


def _inside_backward() -> bool:
    graph_task = getattr(torch._C, "_current_graph_task_id", None)
    return graph_task is not None and graph_task() != -1


_FOLLOWERS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[SlowBuffers]] = weakref.WeakKeyDictionary()


def unfollowed(model: nn.Module) -> Callable[[], None]:
    """Let no :class:`SlowBuffers` follow a model for a while.

    Args:
        model: The model.

    Returns:
        Puts the hooks back as they were, and removes those that came since.
    """
    modules = list(model.modules())
    followers = [(module, _FOLLOWERS.pop(module)) for module in modules if module in _FOLLOWERS]
    tables = [model._load_state_dict_post_hooks, *(module._forward_pre_hooks for module in modules)]
    before = [list(hooks.items()) for hooks in tables]
    for hooks in tables:
        for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]

    def follow_again() -> None:
        for hooks, items in zip(tables, before, strict=True):
            others = [(k, h) for k, h in hooks.items() if not isinstance(h, _Hook) and k not in dict(items)]
            hooks.clear()
            hooks.update(items + others)
        for module in modules:
            _FOLLOWERS.pop(module, None)
        _FOLLOWERS.update(followers)

    return follow_again


@dataclass
class _Snapshot:
    """Copies of what stood in a model's places at one moment."""

    buffers: list[Tensor | None]
    copies: list[Tensor | None]


class SlowBuffers:
    """The slow buffers of one model: those from before the first forward pass of an inner loop.

    A forward pass compiled by ``torch.compile`` takes no copies. Then that counts which was taken when the last inner
    loop closed, or since by ``model.load_state_dict`` or ``GradMatch.zero_grad``; it differs only if somebody wrote
    into the buffers by other means after that.

    Where several optimizers follow one model, buffers move once: with the inner loop that closes first.

    Args:
        model: The model whose buffers to follow: those it has now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rest = _Snapshot([], [])  # when no inner loop was open
        self._snapshots: list[_Snapshot] = []  # before forward passes that may have begun an inner loop
        self._slow: dict[int, Tensor] | None = None  # of the inner loop in progress, by place
        self._left: set[int] = set()  # places that another optimizer has interpolated since
        self._wide: dict[int, Tensor] = {}  # slow values that have more digits than the buffers
        self._copies: SlowCopies | None = None  # of the buffers at rest
        self._wide_copies: SlowCopies | None = None
        self._constant: set[int] = set()  # places that held infinity or NaN: there is nothing to interpolate
        self._link()
        self.follow()

    def _link(self) -> None:
        """Find the buffers and put a hook on every module that owns one."""
        self.slots = BufferSlots(self.model)
        handles = [self.model.register_load_state_dict_post_hook(_AfterLoad(self))]
        self._hooks: list[tuple[nn.Module, int, _BeforeForward]] = []
        for module in self.slots.of_module:
            hook = _BeforeForward(self)
            handles.append(module.register_forward_pre_hook(hook, prepend=True))
            self._hooks.append((module, handles[-1].id, hook))
            _FOLLOWERS.setdefault(module, weakref.WeakSet()).add(self)
        self._listen(self._slow is None)
        for hooks in (self.model._load_state_dict_post_hooks, *(m._forward_pre_hooks for m in self.model.modules())):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook) and hook.owner is None]:
                del hooks[key]  # came along when the model was copied
        weakref.finalize(self, lambda: [handle.remove() for handle in handles]).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("slots", "_hooks", "_copies", "_wide_copies")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._copies = self._wide_copies = None
        self._link()

    def _listen(self, now: bool) -> None:
        """Take the hooks off while an inner loop has its copies: a module with a hook is slower to call."""
        for module, key, hook in self._hooks:
            hooks = cast("OrderedDict[int, Any]", module._forward_pre_hooks)
            if now:
                hooks[key] = hook
                hooks.move_to_end(key, last=False)
            else:
                hooks.pop(key, None)

    # --------------------------------------------------------------------------------------------------- where to begin

    @torch.no_grad()
    def follow(self) -> None:
        """Bring the copies up to what the model holds now, unless an inner loop may have begun already."""
        if self._slow is not None or self._snapshots:
            return
        for _, _, hook in self._hooks:
            hook.saw_other = False
        before, now = self._rest.buffers, self.slots.tensors()
        self._rest = _Snapshot(now, self._copies_of(now))
        if len(before) != len(now) or not all(map(is_, before, now)):
            self._constant = self._nonfinite(now)

    def _nonfinite(self, buffers: Sequence[Tensor | None]) -> set[int]:
        floating = {i: b for i, b in enumerate(buffers) if b is not None and _is_floating(b) and not b.is_meta}
        places = list(floating)
        return {places[i] for i in find_nonfinite(list(floating.values()))}

    def before_forward(self, module: nn.Module) -> None:
        """Copy all buffers, unless there are copies already of those that a module is about to move.

        Args:
            module: The module.
        """
        if self._slow is not None:
            return
        if self._snapshots:
            places = self.slots.of_module.get(module, ())
            now = {i: buffer for i in places if (buffer := self.slots.get_one(i)) is not None}
            if any(all(s.buffers[i] is buffer for i, buffer in now.items()) for s in self._snapshots):
                return
        elif _inside_backward():
            warnings.warn(
                f"a {type(module).__name__} ran without gradients first and runs again in the backward pass, by "
                "reentrant checkpointing: the slow copy of its buffers is that of after the first time. Use "
                "torch.utils.checkpoint with use_reentrant=False, or GradMatch.meta_step",
                RuntimeWarning,
                stacklevel=2,
            )
        buffers = self.slots.tensors()
        at_rest = len(buffers) == len(self._rest.buffers) and all(map(is_, buffers, self._rest.buffers))
        self._snapshots.append(_Snapshot(buffers, self._copies_of(buffers) if at_rest else clones(buffers)))

    def _copies_of(self, buffers: list[Tensor | None]) -> list[Tensor | None]:
        """Copy buffers to where the last copies were."""
        there = [b for b in buffers if b is not None]
        old = self._copies
        if old is None or not old.fits(there, old.slow, None):
            memory = old.slow if old is not None and len(old.slow) == len(there) else [None] * len(there)
            self._copies = old = SlowCopies(there, memory)
        old.refresh()
        copies = iter(old.slow)
        return [None if b is None else next(copies) for b in buffers]

    def begin(self, meta_dtype: torch.dtype | None) -> None:
        """Begin an inner loop here and now, whatever forward passes there were before.

        Args:
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`.
        """
        self._slow, self._snapshots = None, []
        self.follow()
        self._set_slow(dict(enumerate(self._rest.copies)), meta_dtype)

    def settle(self, meta_dtype: torch.dtype | None, *, stepped: bool) -> None:
        """Find out which copies belong to the inner loop in progress, if that is not known yet.

        Args:
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`.
            stepped: Whether a step is taken; else nothing has begun but by a forward pass.
        """
        if self._slow is not None or not (stepped or self._snapshots):
            return
        if not self._snapshots and any(hook.saw_other for _, _, hook in self._hooks):
            warnings.warn(
                "a forward pass in training mode without gradients has moved buffers since the last inner loop, and "
                "none that begins this one was seen, as if it were compiled: what the former did counts as the inner "
                "loop's. Call optimizer.zero_grad() before the forward pass, or use GradMatch.meta_step",
                RuntimeWarning,
                stacklevel=2,
            )
        now = self.slots.tensors()
        chosen = {i: self._choose(i, buffer) for i, buffer in enumerate(now)}
        if stepped or any(copy is not buffer for copy, buffer in zip(chosen.values(), now, strict=True)):
            self._set_slow(chosen, meta_dtype)

    def _choose(self, place: int, now: Tensor | None) -> Tensor | None:
        """Return the copy from before the inner loop moved a place, or what is there if the loop did not move it."""
        at_rest = self._rest.buffers[place]
        for wanted in (now, at_rest):
            for snapshot in self._snapshots:
                if snapshot.buffers[place] is wanted:
                    return snapshot.copies[place]
            if now is at_rest:
                break
        if self._snapshots:  # other tensors were in the model for a while, or somebody replaced this one since
            return now if now is at_rest else self._snapshots[0].copies[place]
        return self._rest.copies[place] if self.slots.is_training(place) else now

    @torch.no_grad()
    def _set_slow(self, chosen: Mapping[int, Tensor | None], meta_dtype: torch.dtype | None) -> None:
        slow = {i: copy for i, copy in chosen.items() if copy is not None}
        now = self.slots.get()
        still = [i for i, copy in slow.items() if copy is now[i]]
        slow.update(zip(still, clone_all([slow[i] for i in still]), strict=True))
        wide = [i for i, copy in slow.items() if slow_dtype(copy, meta_dtype) != copy.dtype]
        if wide:
            narrow, old = [slow[i] for i in wide], [self._wide.get(i) for i in wide]
            copies = self._wide_copies
            if copies is None or not copies.fits(narrow, old, meta_dtype):
                copies = self._wide_copies = SlowCopies(narrow, old, meta_dtype)
            copies.refresh()
            self._wide = dict(zip(wide, copies.slow, strict=True))
            slow.update(self._wide)
        else:
            self._wide = {}
        self._slow, self._left = slow, set()
        self._listen(False)

    # ------------------------------------------------------------------------------------------------------ how to end

    def moving(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the floating-point buffers that an interpolation is to move.

        Returns:
            Slow value and buffer by name. Left out is what keeps its latest value: a buffer whose shape changed, and
            one that held infinity or NaN (a mask, an observer's initial range), between which there is no way half.
        """
        now = self.slots.tensors()
        return {
            self.slots.names[i]: (slow, fast)
            for i, slow in (self._slow or {}).items()
            if (fast := now[i]) is not None
            and fast.shape == slow.shape
            and _is_floating(fast)
            and i not in self._constant
            and i not in self._left
        }

    def close(self) -> None:
        """End the inner loop; the buffers stay as they are. Other optimizers that follow the model leave them so."""
        if self._slow is not None:
            buffers = {id(b) for b in self.slots.tensors() if b is not None}
            for other in {f for module in self.slots.of_module for f in _FOLLOWERS.get(module, ())} - {self}:
                other.leave(buffers)
        self._end()

    def leave(self, buffers: set[int]) -> None:
        """Do not interpolate buffers that another optimizer has just interpolated; :meth:`rollback` still undoes all.

        Args:
            buffers: ``id`` of each.
        """
        if self._slow is None:
            self._snapshots = []
            self.follow()
        else:
            self._left |= {i for i, buffer in enumerate(self.slots.tensors()) if id(buffer) in buffers}

    def rollback(self) -> None:
        """Set the buffers back to what they were before the inner loop and end it."""
        self.write_slow()
        self._end()

    def write_slow(self) -> None:
        """Let the model hold the slow values of the inner loop in progress, in the buffers' own dtypes."""
        now = self.slots.tensors()
        values = {}
        for i, slow in (self._slow or {}).items():
            buffer = now[i]
            values[self.slots.names[i]] = slow if buffer is None else slow.to(buffer.dtype)
        self.slots.assign(values)

    def _end(self) -> None:
        if self._slow is not None:
            self._listen(True)
        self._slow, self._snapshots, self._left = None, [], set()
        self.follow()

    def slow_values(self) -> dict[str, Tensor]:
        """Return the slow values that belong to the inner loop in progress.

        Returns:
            Slow value of each buffer by name; empty between two inner loops.
        """
        return {self.slots.names[i]: slow for i, slow in (self._slow or {}).items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers.

        Returns:
            The buffers themselves by name.
        """
        return {n: b for n, b in zip(self.slots.names, self.slots.tensors(), strict=True) if b is not None}

    @torch.no_grad()
    def state_dict(self, *, whole: bool = False, meta_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return the slow values by name.

        Args:
            whole: Whether to return copies of the present values of all other buffers, too.
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`, for those.

        Returns:
            ``"slow_buffers"``, tensors that are not copied: those of an inner loop in progress, whose names are in
            ``"held_buffers"``, and all that have more digits than the buffers. ``"left_buffers"`` are the names of
            those that another optimizer has interpolated since the inner loop began.
        """
        known = {self.slots.names[i]: slow for i, slow in self._wide.items()} | self.slow_values()
        if whole:
            now = self.buffers()
            missing = {name: b.to(slow_dtype(b, meta_dtype), copy=True) for name, b in now.items() if name not in known}
            known = {name: missing[name] if name in missing else known[name] for name in {**now, **known}}
        return {
            "slow_buffers": known,
            "held_buffers": list(self.slow_values()),
            "left_buffers": [self.slots.names[i] for i in sorted(self._left)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :func:`check_buffers` found good. Its tensors are copied.

        Args:
            state: What :meth:`state_dict` once returned.
        """
        self._end()
        place = {name: i for i, name in enumerate(self.slots.names)}
        now = self.slots.tensors()
        slow = {}
        for name, value in state["slow_buffers"].items():
            buffer = now[place[name]]
            device = value.device if buffer is None else buffer.device
            slow[place[name]] = value.detach().clone().to(device)
        self._wide = {i: s for i, s in slow.items() if (b := now[i]) is not None and b.dtype != s.dtype}
        if state["held_buffers"]:
            self._slow = {place[name]: slow[place[name]] for name in state["held_buffers"]}
            self._listen(False)
        self._left = {place[name] for name in state["left_buffers"]}


def no_buffers() -> dict[str, Any]:
    """Return what :meth:`SlowBuffers.state_dict` has where no buffers are followed."""
    return {"slow_buffers": {}, "held_buffers": [], "left_buffers": []}


def check_buffers(state: dict[str, Any], buffers: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the first entry that cannot be loaded.

    Args:
        state: What :meth:`SlowBuffers.state_dict` once returned. What format 1 did not have yet is added.
        buffers: The buffers to load it for, by name.
    """
    check_entry(state, "slow_buffers", dict)
    state.setdefault("held_buffers", list(state["slow_buffers"]))  # format 1 had no others
    state.setdefault("left_buffers", [])
    for key in ("held_buffers", "left_buffers"):
        check_entry(state, key, list)
        check_copies("slow copy of buffer", state["slow_buffers"], buffers, *state[key])


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
