"""A model's buffers, BatchNorm's statistics for instance: read, saved, restored and set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from torch_gradmatch.parallel.foreach import clone_all, copy_all_

__all__ = ["Buffers"]


class Buffers:
    """The places in a model where its buffers are: each buffer once, by its first name in ``model.named_buffers``.

    A module may put another tensor in the place of a buffer, so that the places are kept and not the tensors.

    Args:
        model: The model; the places that it has now, also those that hold None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self._places: list[list[tuple[nn.Module, str]]] = []  # several for a buffer that several modules share
        first: dict[int, int] = {}
        for prefix, module in model.named_modules():
            for local, buffer in module._buffers.items():
                index = len(self.names) if buffer is None else first.setdefault(id(buffer), len(self.names))
                if index == len(self.names):
                    self.names.append(f"{prefix}.{local}" if prefix else local)
                    self._places.append([])
                self._places[index].append((module, local))

    def tensors(self) -> list[Tensor | None]:
        """Return the buffers that there are now, None in the place of one that is not made yet."""
        found = [places[0][0]._buffers.get(places[0][1]) for places in self._places]
        return [None if b is None or is_lazy(b) else b for b in found]

    def named(self) -> dict[str, Tensor]:
        """Return the buffers that there are now, by name."""
        return {name: b for name, b in zip(self.names, self.tensors(), strict=True) if b is not None}

    def norms(self) -> list[int | None]:
        """Return for each place of a BatchNorm in training mode a number that its forward pass changes, else None."""
        owners = [places[0][0] for places in self._places]
        return [
            sum(b._version for b in m._buffers.values() if b is not None and not is_lazy(b))
            if isinstance(m, _NormBase) and m.training
            else None
            for m in owners
        ]

    def save(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return every buffer with a copy of its value, for :meth:`restore`."""
        tensors = self.tensors()
        copies = iter(clone_all([b for b in tensors if b is not None]))
        return [(b, None if b is None else next(copies)) for b in tensors]

    def values(self, saved: list[tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
        """Return the copies that :meth:`save` made, by name."""
        return {name: value for name, (_, value) in zip(self.names, saved, strict=True) if value is not None}

    @torch.no_grad()
    def restore(self, saved: list[tuple[Tensor | None, Tensor | None]]) -> None:
        """Put the same tensors in the same places again, with the values that they had.

        Args:
            saved: What :meth:`save` returned.
        """
        for index, (now, (before, _)) in enumerate(zip(self.tensors(), saved, strict=True)):
            if before is not None and now is not before:
                self._put(index, before)
        self.assign({name: v for name, (_, v) in zip(self.names, saved, strict=True) if v is not None})

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set buffers: in place, or by putting a new one where the shape changed.

        Args:
            values: Value of each by name, in any dtype.
        """
        targets, sources = [], []
        for index, (name, buffer) in enumerate(zip(self.names, self.tensors(), strict=True)):
            value = values.get(name)
            if value is None or value is buffer:
                continue
            if buffer is not None and buffer.shape == value.shape:
                targets.append(buffer)
                sources.append(value)
            else:
                self._put(index, value.to(value.dtype if buffer is None else buffer.dtype, copy=True))
        copy_all_(targets, sources)

    def _put(self, index: int, buffer: Tensor) -> None:
        for module, local in self._places[index]:
            module._buffers[local] = buffer
