"""What one meta-iteration measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_gradmatch.gradients.alignment import Measured
from torch_gradmatch.parallel.foreach import read

__all__ = ["MetaStep"]


@dataclass(frozen=True)
class MetaStep(Measured):
    """What one meta-iteration over S domains measured. Tensors: nothing synchronizes until it is read.

    Attributes:
        losses: Loss of each domain's batch, shape (S,); None after a manual loop, which shows no losses.
        inner_product: Mean inner product of the domains' gradients over pairs, shape (), when tracked.
        cosine: Mean cosine of the domains' gradients over pairs, shape (), when tracked.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,), when tracked; under ``IDGM(matched=...)``
            norms, products and cosines are of the matched parameters' gradients.
        cosines: Cosine of the gradients of each pair of domains, shape (S, S), with ``track_alignment="pairs"``.
        domains: The domains' names in the order of all these, if they are known: ``meta_step`` was given a mapping, or
            a list by :func:`~torch_gradmatch.meta_batches` from a sampler, which knows its labels; or every step of a
            manual loop was told its ``GradMatch.domain``.
        gamma: The strength of the matching, given or found, under :class:`~torch_gradmatch.IDGM` and
            :class:`~torch_gradmatch.Fishr`.
    """

    losses: Tensor | None = None
    inner_product: Tensor | None = None
    cosine: Tensor | None = None
    grad_norms: Tensor | None = None
    cosines: Tensor | None = None
    domains: tuple[Any, ...] | None = None
    gamma: float | None = None

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return what was measured as names and numbers, which any logger takes.

        Synchronizes once. The matrix :attr:`cosines` is not in it: that is a picture.

        Args:
            prefix: In front of every name, ``"train/"`` for instance.

        Returns:
            Means over the domains, ``loss`` and ``grad_norm``, and the mean over pairs ``inner_product`` and
            ``cosine``, as far as they were measured. If the domains' names are known also ``loss/NAME``,
            ``grad_norm/NAME`` and ``agreement_with_rest/NAME`` of each: without names a position stands for another
            domain each time. ``gamma`` under :class:`~torch_gradmatch.IDGM`.

        Example:
            >>> import torch
            >>> losses = torch.tensor([1.0, 2.0])
            >>> MetaStep(losses, domains=("north", "south")).scalars("train/")
            {'train/loss': 1.5, 'train/loss/north': 1.0, 'train/loss/south': 2.0}
        """
        found: dict[str, Tensor] = {}
        by_domain = {"loss": self.losses, "grad_norm": self.grad_norms, "agreement_with_rest": self.agreement_with_rest}
        for name, values in by_domain.items():
            if values is not None:
                if name != "agreement_with_rest":
                    found[name] = values.mean()
                found |= {f"{name}/{domain}": v for domain, v in zip(self.domains or (), values, strict=False)}
        means = {"inner_product": self.inner_product, "cosine": self.cosine}
        found |= {name: mean for name, mean in means.items() if mean is not None}
        numbers = dict(zip((f"{prefix}{name}" for name in found), read(list(found.values())), strict=True))
        return numbers if self.gamma is None else {**numbers, f"{prefix}gamma": self.gamma}
