"""What one meta-iteration measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_gradmatch.gradients.alignment import Alignment
from torch_gradmatch.gradients.rest import WithRest
from torch_gradmatch.parallel.foreach import read

__all__ = ["MetaStep", "report_of"]


@dataclass(frozen=True)
class MetaStep(WithRest):
    """What one meta-iteration over S domains measured. Tensors: nothing synchronizes until it is read.

    Attributes:
        losses: Loss of each domain's batch, shape (S,); None after a manual loop, which shows no losses.
        inner_product: Mean inner product of the domains' gradients over pairs, shape (), when tracked.
        cosine: Mean cosine of the domains' gradients over pairs, shape (), when tracked.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,), when tracked.
        cosines: Cosine of the gradients of each pair of domains, shape (S, S), with ``track_alignment="pairs"``.
        domains: The domains' names in the order of all these, if they are known: ``meta_step`` was given a mapping, or
            a list by :func:`~torch_gradmatch.meta_batches` from a sampler, which knows its labels.
        gamma: The strength of the matching under :class:`~torch_gradmatch.IDGM`, given or found.
    """

    losses: Tensor | None = None
    inner_product: Tensor | None = None
    cosine: Tensor | None = None
    grad_norms: Tensor | None = None
    cosines: Tensor | None = None
    domains: tuple[Any, ...] | None = None
    gamma: float | None = None
    _with_rest: tuple[Tensor, ...] | None = None

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return what was measured as names and numbers, which any logger takes.

        Synchronizes once. The matrix :attr:`cosines` is not in it: that is a picture.

        Args:
            prefix: In front of every name, ``"train/"`` for instance.

        Returns:
            Means over the domains, ``loss`` and ``grad_norm``, and the mean over pairs ``inner_product`` and
            ``cosine``, as far as they were measured. If the domains' names are known also ``loss/NAME``,
            ``grad_norm/NAME`` and ``agreement_with_rest/NAME`` of each, the last where it is a number: without names a
            position stands for another domain each time. ``gamma`` under :class:`~torch_gradmatch.IDGM`.

        Example:
            >>> import torch
            >>> MetaStep(torch.tensor([1.0, 2.0]), domains=("north", "south")).scalars("train/")
            {'train/loss': 1.5, 'train/loss/north': 1.0, 'train/loss/south': 2.0}
        """
        found: dict[str, Tensor] = {}
        for name, values in (("loss", self.losses), ("grad_norm", self.grad_norms)):
            if values is not None:
                found[name] = values.mean()
                for domain, value in zip(self.domains or (), values, strict=False):
                    found[f"{name}/{domain}"] = value
        for name, mean in (("inner_product", self.inner_product), ("cosine", self.cosine)):
            if mean is not None:
                found[name] = mean
        if self.domains is not None and (with_rest := self.agreement_with_rest) is not None:
            for domain, value in zip(self.domains, with_rest, strict=False):
                found[f"agreement_with_rest/{domain}"] = value
        numbers = zip(found, read(list(found.values())), strict=True)
        shown = {
            f"{prefix}{name}": value
            for name, value in numbers
            if not (name.startswith("agreement_with_rest/") and math.isnan(value))
        }
        return shown if self.gamma is None else {**shown, f"{prefix}gamma": self.gamma}


def report_of(losses: Tensor | None, measured: Alignment, scale: float = 1.0) -> MetaStep:
    """Report what was measured, on losses that may have been multiplied by a number.

    Args:
        losses: Shape (S,), if they are known.
        measured: How well their gradients agree.
        scale: The number.

    Returns:
        The report of the losses themselves.
    """
    inner_product, grad_norms = measured.inner_product, measured.grad_norms
    if scale != 1.0:
        inner_product, grad_norms = inner_product / scale**2, grad_norms / scale
        losses = None if losses is None else losses / scale
    with_rest = measured._with_rest
    if scale != 1.0 and with_rest is not None:
        with_rest = tuple(numbers / scale**2 for numbers in with_rest)
    return MetaStep(losses, inner_product, measured.cosine, grad_norms, measured.cosines, _with_rest=with_rest)
