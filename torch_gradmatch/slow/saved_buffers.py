"""Buffers of a model, or of whatever modules a loss runs, saved and restored."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from torch_gradmatch._foreach import clone_all, copy_all_

__all__ = ["BufferSlots", "ForwardBuffers", "SavedBuffers", "clones"]


class BufferSlots:
    """The places in a model where its buffers are: each buffer once, by its first name in ``model.named_buffers``.

    Args:
        model: The model; the places that it has now, also those that hold None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self.of_module: dict[nn.Module, list[int]] = {}
        self._places: list[list[tuple[nn.Module, str]]] = []  # several for a buffer that several modules share
        first: dict[int, int] = {}
        for prefix, module in model.named_modules():
            for local, buffer in module._buffers.items():
                index = len(self.names) if buffer is None else first.setdefault(id(buffer), len(self.names))
                if index == len(self.names):
                    self.names.append(f"{prefix}.{local}" if prefix else local)
                    self._places.append([])
                self._places[index].append((module, local))
                self.of_module.setdefault(module, []).append(index)

    def get(self) -> list[Tensor | None]:
        """Return what stands in each place now, which may be a buffer that is not made yet (lazy).

        Returns:
            The buffers themselves, not copies.
        """
        return [self.get_one(index) for index in range(len(self._places))]

    def get_one(self, index: int) -> Tensor | None:
        """Return what stands in one place now.

        Args:
            index: Which.

        Returns:
            The buffer itself, which may not be made yet.
        """
        module, local = self._places[index][0]
        return module._buffers.get(local)

    def tensors(self) -> list[Tensor | None]:
        """Return the buffers that there are now, None in the other places.

        Returns:
            The buffers themselves, not copies.
        """
        return [None if b is None or is_lazy(b) else b for b in self.get()]

    def is_training(self, index: int) -> bool:
        """Return whether a place is in a module in training mode.

        Args:
            index: Which.

        Returns:
            True also if only one of several modules that share the buffer is.
        """
        return any(module.training for module, _ in self._places[index])

    def put(self, index: int, buffer: Tensor | None) -> None:
        """Put a tensor in a place, or in all those of a shared buffer.

        Args:
            index: Which.
            buffer: What to put there.
        """
        for module, local in self._places[index]:
            module._buffers[local] = buffer

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set buffers: in place, or by putting a new one where shape, dtype or device changed.

        Args:
            values: Value of each by name; names that are no buffer's are passed over.
        """
        buffers, new = [], []
        for index, (name, buffer) in enumerate(zip(self.names, self.tensors(), strict=True)):
            value = values.get(name)
            if value is None or value is buffer:
                continue
            if buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype:
                buffers.append(buffer)
                new.append(value)
            else:
                self.put(index, value.clone())
        copy_all_(buffers, new)


class SavedBuffers:
    """Which tensors stood in a model's places, and their values, at the moment when this was made.

    Args:
        slots: The places.
    """

    def __init__(self, slots: BufferSlots) -> None:
        self._slots = slots
        self._buffers = slots.get()
        self._values = clones(slots.tensors())

    def values(self) -> dict[str, Tensor]:
        """Return the saved values.

        Returns:
            Value of each buffer by name; not to be written to.
        """
        return {name: v for name, v in zip(self._slots.names, self._values, strict=True) if v is not None}

    def restore(self) -> None:
        """Put the same tensors in the same places again, with the saved values."""
        for index, (buffer, present) in enumerate(zip(self._buffers, self._slots.get(), strict=True)):
            if present is not buffer:
                self._slots.put(index, buffer)
        self._slots.assign(self.values())


def clones(buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return copies of some buffers, None where there is none."""
    copies = iter(clone_all([b for b in buffers if b is not None]))
    return [None if b is None else next(copies) for b in buffers]


class ForwardBuffers:
    """Buffers of whatever modules run in training mode inside the block, as they were before each ran first.

    For a meta-iteration of a method that was not given the model. As a context manager; :meth:`restore` inside it.

    Modules that ``model.compile()`` compiled in place are not seen.
    """

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._seen: set[int] = set()
        self._places: list[tuple[nn.Module, str, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(ForwardBuffers()))

    def __enter__(self) -> ForwardBuffers:
        self._saved, self._seen, self._places = [], set(), []
        self._save(self._modules)
        self._places = [
            (module, local, buffer)
            for module in self._modules
            for local, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        self._handle = register_module_forward_pre_hook(self._before_forward)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()
        self._saved, self._seen, self._places = [], set(), []

    def _before_forward(self, module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for ran in module.modules() if hasattr(module, "_orig_mod") else (module,):
            if ran._buffers and ran.training:
                self._save([ran])
                self._modules.add(ran)

    def _save(self, modules: Iterable[nn.Module]) -> None:
        found = {id(b): b for m in modules for b in m._buffers.values() if b is not None and not is_lazy(b)}
        new = [b for identity, b in found.items() if identity not in self._seen]
        self._saved += zip(new, clone_all(new), strict=True)
        self._seen.update(found)

    @torch.no_grad()
    def restore(self) -> None:
        """Set every buffer back."""
        copy_all_([b for b, _ in self._saved], [value for _, value in self._saved])
        for module, local, buffer in self._places:
            module._buffers[local] = buffer
