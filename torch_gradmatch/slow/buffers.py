r"""The slow copy of a model's buffers: BatchNorm statistics and whatever else a forward pass moves.

Unlike parameters, buffers move in the **forward** pass, before any optimizer is called. So the copy is taken by a
forward pre-hook on every module that owns buffers: the first time the module runs in training mode in an inner loop,
just before it does. Whatever a user does to the buffers between two inner loops is therefore honoured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_gradmatch.slow.weights import refresh

__all__ = ["SlowBuffers", "take_off_hooks"]


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
    """Lets the owner copy a module's buffers before a training-mode forward pass moves them."""

    def __call__(self, module: nn.Module, _args: Any) -> None:
        # A compiled forward keeps the copy made at the end of the last inner loop; see SlowBuffers.
        if torch.compiler.is_compiling() or not module.training or torch.is_inference_mode_enabled():
            return
        if torch._C._functorch.maybe_current_level() is not None:  # a functional call: the real buffers do not move
            return
        owner = self.owner
        if owner is not None:
            owner.capture(module)


class _AfterLoad(_Hook):
    """Lets the owner follow ``model.load_state_dict``."""

    def __call__(self, _module: nn.Module, _incompatible_keys: Any) -> None:
        owner = self.owner
        if owner is not None:
            owner.follow()


def take_off_hooks(model: nn.Module) -> Callable[[], None]:
    """Let no :class:`SlowBuffers` follow a model for a while.

    Args:
        model: The model.

    Returns:
        Puts the hooks back as they were, and removes those that came since.
    """
    tables = [model._load_state_dict_post_hooks, *(module._forward_pre_hooks for module in model.modules())]
    before = [list(hooks.items()) for hooks in tables]
    for hooks in tables:
        for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]

    def put_back() -> None:
        for hooks, items in zip(tables, before, strict=True):
            others = [(k, h) for k, h in hooks.items() if not isinstance(h, _Hook) and k not in dict(items)]
            hooks.clear()
            hooks.update(items + others)

    return put_back


class SlowBuffers:
    """The slow buffers of one model.

    A forward pass compiled by ``torch.compile`` does not run the hooks' bodies. Then the copy made when the last inner
    loop closed, or by ``model.load_state_dict`` since, is the one that counts; it differs only if somebody wrote into
    the buffers by other means in between.

    Args:
        model: The model whose buffers to follow: those it has now. Buffers shared by several modules count once.
        interpolate: Whether floating-point buffers move by the same interpolation as the parameters (True) or keep
            the value that the inner loop left (False). Integer and boolean buffers always keep it.
        meta_dtype: As in :func:`torch_gradmatch.slow.weights.slow_dtype`.
    """

    def __init__(self, model: nn.Module, *, interpolate: bool, meta_dtype: torch.dtype | None) -> None:
        self.model = model
        self.interpolates = interpolate
        self.meta_dtype = meta_dtype
        self.copies: dict[str, Tensor] = {}
        self.captured: set[str] = set()
        self._link()
        self.follow()

    def _link(self) -> None:
        """Find the buffers and put a hook on every module that owns one."""
        self._owners: dict[str, tuple[nn.Module, str]] = {}  # first name of each buffer -> where it is
        self._names: dict[nn.Module, list[str]] = {}
        first_name: dict[int, str] = {}
        for prefix, module in self.model.named_modules():
            for local, buffer in module._buffers.items():
                if buffer is None:
                    continue
                name = first_name.setdefault(id(buffer), f"{prefix}.{local}" if prefix else local)
                self._owners.setdefault(name, (module, local))
                self._names.setdefault(module, []).append(name)
        handles = [self.model.register_load_state_dict_post_hook(_AfterLoad(self))]
        for module in self._names:
            handles.append(module.register_forward_pre_hook(_BeforeForward(self), prepend=True))
        for hooks in (self.model._load_state_dict_post_hooks, *(m._forward_pre_hooks for m in self._names)):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook) and hook.owner is None]:
                del hooks[key]  # came along when the model was copied
        weakref.finalize(self, lambda: [handle.remove() for handle in handles]).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_owners", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._link()

    def _buffer(self, name: str) -> Tensor | None:
        module, local = self._owners[name]
        buffer = module._buffers.get(local)
        return None if buffer is None or torch.nn.parameter.is_lazy(buffer) else buffer

    def _refresh(self, names: Iterable[str]) -> None:
        for name in names:
            buffer = self._buffer(name)
            if buffer is not None:
                self.copies[name] = refresh(self.copies.get(name), buffer, self.meta_dtype)

    def follow(self) -> None:
        """Bring every copy that no open inner loop holds up to what the model holds now."""
        self._refresh([name for name in self._owners if name not in self.captured])

    def capture(self, module: nn.Module) -> None:
        """Copy the buffers of a module unless the open inner loop has copied them already.

        Args:
            module: The module about to run.
        """
        names = [name for name in self._names.get(module, ()) if name not in self.captured]
        self._refresh(names)
        self.captured.update(names)

    def capture_all(self) -> None:
        """Begin an inner loop here and now: no copy follows the model any more until it is closed."""
        self.follow()
        self.captured.update(self._owners)

    def held(self, *, loop_is_open: bool) -> dict[str, Tensor]:
        """Return the copies that belong to the inner loop in progress.

        Args:
            loop_is_open: Whether an inner step was taken; else only what a forward pass was about to move counts.

        Returns:
            Copy of each such buffer by name.
        """
        for name, (module, _) in self._owners.items():
            if name not in self.captured and not module.training:  # no forward moved it: what it holds is the user's
                self._refresh([name])
        return {n: c for n, c in self.copies.items() if loop_is_open or n in self.captured}

    @torch.no_grad()
    def interpolate(self, weight: float) -> None:
        r"""Move floating-point buffers to :math:`b + \epsilon(\tilde b - b)` if so asked, and close the loop.

        An element that the inner loop did not change stays as it is, so a constant mask of infinities survives.

        Args:
            weight: :math:`\epsilon` in (0, 1].
        """
        copies = self.held(loop_is_open=True) if self.interpolates else {}
        for name, slow in copies.items():
            fast = self._buffer(name)
            if fast is None or fast.shape != slow.shape or not (slow.is_floating_point() or slow.is_complex()):
                continue
            unchanged = slow.to(fast.dtype) == fast
            slow.copy_(torch.where(unchanged, slow, torch.lerp(slow, fast.to(slow.dtype), weight)))
            fast.copy_(slow)
        self._close()

    @torch.no_grad()
    def rollback(self, *, loop_is_open: bool) -> None:
        """Set the buffers back to what they were before the inner loop and close it.

        Args:
            loop_is_open: As in :meth:`held`.
        """
        for name, slow in self.held(loop_is_open=loop_is_open).items():
            fast = self._buffer(name)
            if fast is not None and fast.shape == slow.shape:
                fast.copy_(slow)
            else:  # the forward pass put a buffer of another shape in its place
                module, local = self._owners[name]
                module._buffers[local] = slow.clone()
        self._close()

    def _close(self) -> None:
        self.captured.clear()
        self.follow()

    def hold(self, copies: dict[str, Tensor]) -> None:
        """Take over the copies of an inner loop in progress, read from a checkpoint.

        Args:
            copies: Copy of each buffer by name.
        """
        self.captured.clear()
        self.follow()
        for name, copy in copies.items():
            buffer = self._buffer(name)
            place = copy.device if buffer is None else buffer.device
            self.copies[name] = copy.detach().clone().to(place)
        self.captured.update(copies)
