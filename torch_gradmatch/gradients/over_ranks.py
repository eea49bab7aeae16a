r"""How several processes share the evaluations of a meta-iteration, and where their results meet.

=========== ======================================== ================================================================
class       each rank has                            reduced over the ranks
=========== ======================================== ================================================================
``Alone``   all                                      nothing
``Walks``   batches of its own of all domains        the direction
``Domains`` domains of its own                       :math:`\Sigma` (and U), :math:`\sum_i H_i v_i`
``Samples`` its part of the batch of every domain    each :math:`G_i`, the direction
=========== ======================================== ================================================================

All but the first average the buffers. Before each reduction the ranks agree that none of them has failed; one that did
comes to the same agreement by ``Ranks.together``, which is around the whole evaluation.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_gradmatch.gradients.agreement import RunningAgreement
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.flat import Vector, WeightedSum
from torch_gradmatch.parallel.foreach import clone_all, local_of
from torch_gradmatch.parallel.ranks import Ranks
from torch_gradmatch.parallel.reduction import average_, max_, sum_, sums_of_numbers

__all__ = ["Alone", "Domains", "Samples", "Walks"]

Buffers = Mapping[str, Tensor]


class Alone:
    """Nothing is shared: one process, or ranks that ``fully_shard`` joins in every forward and backward pass.

    Args:
        ranks: All that raise together what one of them does.

    Attributes:
        ranks: As given.
        first: Number of this rank's first domain among all.
        mean_weight: With what weight the mean gradient is to be part of this rank's direction.
        reduces: Whether sums are reduced, so that they have to lie alike on all ranks.
        holds: Whether the gradients of the first pass have to be held for the second.
        in_step: Whether all ranks evaluate the same at the same time, so that none may evaluate a loss by itself.
        names: Of the domains of all ranks, if the ranks have others and know them.
    """

    reduces = False
    holds = False
    names: tuple[object, ...] | None = None

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.first = 0
        self.mean_weight = 1.0
        self.in_step = bool(ranks)

    def domains(self, number: int) -> int:
        """Return S.

        Args:
            number: How many domains this rank has.

        Returns:
            How many there are on all ranks.
        """
        return number

    def chosen(self, domains: list[int]) -> list[int]:
        """Return what was drawn at random, the same on all ranks.

        Args:
            domains: What this rank has drawn.

        Returns:
            What the first one has drawn.
        """
        found: list[int] = self.ranks.gather(domains)[0]
        return found

    def gradient(self, gradient: Vector, parameters: Sequence[Tensor]) -> Vector:  # noqa: ARG002
        """Return the gradient of a domain's loss.

        Args:
            gradient: That of the loss which this rank has evaluated.
            parameters: By which.

        Returns:
            One tensor for each parameter, or None.
        """
        return gradient

    def merge(self, phi: RunningAgreement, sums: GradientAlignment, losses: Tensor) -> Tensor:  # noqa: ARG002
        """Let the running sums, and the agreement, hold the gradients of all domains.

        Args:
            phi: The agreement, which has taken in this rank's.
            sums: The sums, which have as well.
            losses: Of this rank's domains.

        Returns:
            The losses of all domains.
        """
        return losses

    def finish_walks(self, direction: WeightedSum) -> bool:  # noqa: ARG002
        """Let a direction of first derivatives be that of all ranks, the same bits on each.

        Args:
            direction: What this rank has worked out.

        Returns:
            Whether it is another one now.
        """
        return False

    def finish_products(self, direction: WeightedSum) -> None:
        """Let a direction with this rank's Hessian-vector products be that of all, the same bits on each.

        Args:
            direction: What this rank has worked out.
        """

    def by_domain(self, found: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """Return what was found of each domain, of whichever rank it is.

        Args:
            found: By number of this rank's domain, each of shape (3,).
            like: The losses of all domains.

        Returns:
            Shape (S, 3); NaN where nothing was found.
        """
        missing = next(iter(found.values()), like).new_full((3,), torch.nan)
        return torch.stack([found.get(i, missing) for i in range(len(like))])

    def losses(self, losses: Tensor, again: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the losses of all domains, and what was found when some were evaluated again.

        Args:
            losses: As :meth:`merge` returned them.
            again: By number of this rank's domain.

        Returns:
            The losses; and those found again, by number of the domain among all.
        """
        return losses, {self.first + i: loss for i, loss in again.items()}

    def buffers(self, buffers: Buffers) -> Buffers:
        """Return the buffers that all ranks are to have.

        Args:
            buffers: As they are after this rank's evaluations.

        Returns:
            The mean of floating-point ones, the largest of integers.
        """
        return buffers


class Walks(Alone):
    """Every rank evaluates a direction by itself, with batches of its own; they go to the mean.

    Args:
        ranks: All that raise together.
        group: Those whose mean is taken.
        in_step: Whether the other ranks, if there are any, are joined by ``fully_shard``.
    """

    reduces = True

    def __init__(self, ranks: Ranks, group: ProcessGroup, *, in_step: bool) -> None:
        super().__init__(ranks)
        self.group = group
        self.in_step = in_step

    def finish_walks(self, direction: WeightedSum) -> bool:
        """Average the direction. See :meth:`Alone.finish_walks`."""
        self.ranks.agree()
        direction.count_also(_union(direction.indices, direction.places, direction.vector[0].device, self.group))
        average_(direction.vector, self.group)
        return True

    def buffers(self, buffers: Buffers) -> Buffers:
        """Average the buffers. See :meth:`Alone.buffers`."""
        return mean_of_buffers(buffers, self.group)


class Domains(Alone):
    """Every rank has domains of its own.

    Args:
        ranks: All that raise together.
        group: Those that have domains.
        counts: How many each of these has.
        rank: This one's place among these.
        names: Of all domains, in the order of the ranks, if they are known.
        in_step: As for :class:`Walks`.
    """

    reduces = True

    def __init__(
        self,
        ranks: Ranks,
        group: ProcessGroup,
        counts: Sequence[int],
        rank: int,
        *,
        names: Sequence[object] | None,
        in_step: bool,
    ) -> None:
        super().__init__(ranks)
        self.names = None if names is None else tuple(names)
        self.group = group
        self.in_step = in_step
        self.first = [0, *accumulate(counts)][rank]
        self.mean_weight = 1.0 if rank == 0 else 0.0
        self._counts = counts
        self._rank = rank

    def domains(self, number: int) -> int:  # noqa: ARG002
        """Return the number on all ranks. See :meth:`Alone.domains`."""
        return sum(self._counts)

    def merge(self, phi: RunningAgreement, sums: GradientAlignment, losses: Tensor) -> Tensor:
        """Reduce the sums. See :meth:`Alone.merge`."""
        self.ranks.agree()
        placed = losses.new_zeros(sum(self._counts))
        placed[self.first : self.first + len(losses)] = losses
        between, numbers = sums.merge(self.group, self._counts, self._rank, [placed, *phi.numbers()])
        phi.merge(between, numbers[1:])
        return numbers[0].to(losses.dtype)

    def finish_products(self, direction: WeightedSum) -> None:
        """Sum the products up. See :meth:`Alone.finish_products`."""
        self.ranks.agree()
        sum_(direction.vector, self.group)

    def by_domain(self, found: Mapping[int, Tensor], like: Tensor) -> Tensor:
        """Put them together: of all domains, or of none on any rank. See :meth:`Alone.by_domain`."""
        if not found:
            return super().by_domain(found, like)
        values = torch.stack([found[i] for i in range(self._counts[self._rank])])
        placed = values.new_zeros(sum(self._counts), 3)
        placed[self.first : self.first + len(values)] = values
        return sums_of_numbers([placed], self.group)[0].to(values.dtype)

    def buffers(self, buffers: Buffers) -> Buffers:
        """Average the buffers. See :meth:`Alone.buffers`."""
        return mean_of_buffers(buffers, self.group)


class Samples(Alone):
    """Every rank has its part of each domain's batch: the mean of their losses is the domain's.

    Args:
        ranks: All that raise together.
        group: Those that have the parts.
    """

    reduces = True
    holds = True

    def __init__(self, ranks: Ranks, group: ProcessGroup) -> None:
        super().__init__(ranks)
        self.group = group

    def gradient(self, gradient: Vector, parameters: Sequence[Tensor]) -> Vector:
        """Average a gradient. See :meth:`Alone.gradient`."""
        reached = [g is not None for g in gradient]
        present = [i for i, is_reached in enumerate(reached) if is_reached]
        if len(set(self.ranks.agree(number=zlib.crc32(bytes(reached))))) > 1:
            present = _union(present, range(len(gradient)), parameters[0].device, self.group)
        # Copies: those that autograd returns may share memory.
        given = [(i, gradient[i]) for i in present]
        copies = clone_all([torch.zeros_like(local_of(parameters[i])) if g is None else g for i, g in given])
        average_(copies, self.group)
        found: list[Tensor | None] = [None] * len(gradient)
        for i, copy in zip(present, copies, strict=True):
            found[i] = copy
        return found

    def finish_products(self, direction: WeightedSum) -> None:
        """Average the products, and with them the mean gradient. See :meth:`Alone.finish_products`."""
        self.ranks.agree()
        average_(direction.vector, self.group)

    def losses(self, losses: Tensor, again: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Average the losses. See :meth:`Alone.losses`."""
        size = self.group.size()
        first, *second = (total / size for total in sums_of_numbers([losses, *again.values()], self.group))
        return first.to(losses.dtype), {i: loss.to(losses.dtype) for i, loss in zip(again, second, strict=True)}

    def buffers(self, buffers: Buffers) -> Buffers:
        """Average the buffers. See :meth:`Alone.buffers`."""
        return mean_of_buffers(buffers, self.group)


def mean_of_buffers(buffers: Buffers, group: ProcessGroup) -> Buffers:
    """Return buffers that are the same on every rank.

    Args:
        buffers: By name.
        group: The ranks.

    Returns:
        The mean of floating-point ones, the same bits where all had the same; the largest of integers.
    """
    found = dict(zip(buffers, clone_all([local_of(b) for b in buffers.values()]), strict=True))
    averaged = {name: b for name, b in found.items() if b.is_floating_point() or b.is_complex()}
    real = [torch.view_as_real(b) if b.is_complex() else b for b in averaged.values()]
    for b, total in zip(real, sums_of_numbers(real, group), strict=True):
        b.copy_(total / group.size())
    max_([b for name, b in found.items() if name not in averaged], group)
    return found


def _union(
    indices: Sequence[int] | frozenset[int], places: Sequence[int], device: torch.device, group: ProcessGroup
) -> list[int]:
    """Return those places that are among the indices on any rank."""
    flags = torch.tensor([i in indices for i in places], device=device)
    max_([flags], group)
    return [i for i, flag in zip(places, flags.tolist(), strict=True) if flag]
