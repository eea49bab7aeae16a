r"""The engine of exact matching: mean gradient and :math:`\sum_i H_i v_i`, in two passes over the domains or in one.

**Two passes.** The first takes the gradients :math:`G_i` and, from them alone, the cotangents :math:`v_i`; the second
one Hessian-vector product for each domain. One domain's graph is alive at a time, unless all are kept.

**One pass.** With :math:`g_i` differentiable, the cotangents are made of the gradients of the domains before (and of
its own, in the variance), counted twice: exact in expectation over random orders of the domains, and the mean of an
order and its reverse is exact. Each domain is evaluated once.

Of the named agreements only sums over the domains are kept, so the memory does not grow with S.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from torch_gradmatch._checks import check_bool, check_reached
from torch_gradmatch.gradients.agreement import (
    AGREEMENTS,
    Agreement,
    NamedAgreement,
    OwnAgreement,
    check_agreement,
    cosine,
    variance,
)
from torch_gradmatch.gradients.alignment import Alignment, GradientAlignment, accumulate
from torch_gradmatch.gradients.backward import by_autograd, check_backward, explain, gradient_of, reverse
from torch_gradmatch.gradients.hvp import check_hvp, check_symmetric, finite_difference, forward
from torch_gradmatch.gradients.replay import Replay
from torch_gradmatch.parallel.foreach import (
    WIDE,
    Vector,
    add_all_,
    by_kind,
    in_transform,
    is_sharded,
    precision,
    squared_norm,
)
from torch_gradmatch.parallel.sharing import Sharing

__all__ = ["Engine", "Matched", "check_passes", "with_zeros"]


class Matched(NamedTuple):
    """What the engine found. Detached.

    Attributes:
        direction: Of each leaf, in its dtype; zero where no loss depends on it.
        reached: Whether any domain's loss depends on the leaf.
        losses: Of the domains, shape (S,).
        again: The same when they were evaluated again at the same parameters.
        tolerance: By how much of the mean loss these may differ and count as rounding.
        agreement: Value of phi, shape ().
        alignment: What was measured of the gradients.
        buffers: As one evaluation of each domain leaves them, saved.
        gamma: As given, or as found; None where none could be found.
    """

    direction: list[Tensor]
    reached: list[bool]
    losses: Tensor
    again: Tensor
    tolerance: float
    agreement: Tensor
    alignment: Alignment
    buffers: Any
    gamma: float | None


@dataclass
class Engine:
    r"""One evaluation of the gradient of :math:`\frac1S\sum_i L_i - \gamma\,\phi`.

    Attributes:
        replay: The domains' losses.
        leaves: Where to differentiate.
        agreement: phi.
        like: The parameters in the structure in which a function of the user's gets the gradients.
        hvp: The kind of Hessian-vector product.
        matched: The parameters whose gradients are to agree (:class:`~torch_gradmatch.gradients.part.PartEngine`);
            None for all of the leaves.
        keep_graphs: Whether every graph is kept, instead of evaluating each domain again.
        one_pass: Whether to match in one pass.
        cosines: Whether to measure the mean cosine.
        pairs: Whether to measure the cosines of pairs.
        names: Of the leaves, to compare the first gradient that is differentiated again with one by ``backward()``, and
            a difference of gradients with its transpose; None to compare nothing.
        sharing: How other processes share the evaluations; None on one process.
        scale: What the losses were multiplied by.
    """

    replay: Replay
    leaves: list[Tensor]
    agreement: Agreement
    like: Any
    hvp: str = "reverse"
    keep_graphs: bool = False
    one_pass: bool = False
    cosines: bool = False
    pairs: bool = False
    names: Sequence[str] | None = None
    sharing: Sharing | None = None
    scale: float = 1.0
    matched: list[Tensor] | None = None
    _matching: list[Tensor | None] = field(default_factory=list, init=False)
    _has_graph: bool = field(default=False, init=False)

    def run(self, gamma: float | None, strength: float) -> Matched:
        """Evaluate everything.

        Args:
            gamma: Strength of the matching; None to find it by ``strength``.
            strength: How long the matching part is to be, as a multiple of the mean gradient.

        Returns:
            The direction and what was measured.

        Raises:
            RuntimeError: If an operation lacks a derivative, or no gradient depends on a parameter.
        """
        matches, sharing, size = gamma is None or gamma > 0, self.sharing, self.replay.size
        self.gamma, self.of = gamma, self.leaves if self.matched is None else self.matched
        twice = matches and self.hvp != "finite_difference" and self.matched is None  # every operation of the model
        self.domains = size if sharing is None else sharing.domains(size)
        self.sums = sums = GradientAlignment(self.cosines or self.agreement is cosine, self.pairs)
        self.total = sums.total
        is_named = self.agreement in AGREEMENTS.values()
        self.phi = (
            NamedAgreement(self.agreement, sums, self.domains) if is_named else OwnAgreement(self.agreement, self.like)
        )
        if sharing is not None:
            self._expect(sharing, matches)
        after = None
        try:
            with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
                kept = self._first_pass(matches)
                after = self.replay.save()
                reached = [total is not None for total in self.total]
                if sharing is not None and sharing.kind == "domains":
                    for vector in (sums.total, sums.units)[: 1 + sums.cosines]:
                        sharing.reduce_(with_zeros(vector, self.of), "domains")
                if matches and not self.one_pass:
                    self._second_pass(kept)
        except (RuntimeError, NotImplementedError) as error:
            explain(error, self.hvp if self.matched is None else "matched")
            raise
        finally:
            self.replay.close(after)
        if matches and not self._has_graph:
            raise RuntimeError(
                "no gradient depends on any parameter, so that there is nothing to match: its graph was lost "
                "(torch.compile, a backward pass under no_grad: use hvp='finite_difference'), or every loss is linear "
                "in the parameters"
            )
        if self.matched is not None:
            reached = [total is not None for total in self.total]
        found = [*self.replay.stacked(), torch.stack(sums.squares)]
        if sharing is not None:
            self._reduce(sharing, matches)
            found, reached = sharing.numbers(self.leaves[0], found, reached)
            sums.squares = list(found[2])
        return self._result(gamma, strength, found, reached, after[1])

    def _first_pass(self, matches: bool) -> dict[int, tuple[Vector, Vector]]:
        """Take in every domain's gradient; return what the second pass needs: those with graph, and as reduced."""
        kept: dict[int, tuple[Vector, Vector]] = {}
        by_samples = self.sharing is not None and self.sharing.kind == "data"
        for index in range(self.replay.size):
            # Only one graph is alive at a time, and the last domain's may as well be the first of the second pass.
            last = index == self.replay.size - 1
            # Before the first domain there is none: only in the variance it is matched, with itself.
            matched_now = matches and self.one_pass and (index > 0 or self.agreement is variance)
            again = matches and not self.one_pass
            keeps = self.hvp == "reverse" and (matched_now or (again and (self.keep_graphs or last)))
            with record_function("GradMatch.domain_gradient"):
                gradient = self._gradient(self.replay(index), with_graph=keeps)
            check_reached(gradient, index)
            own: Vector = gradient
            if self.sharing is not None and by_samples:
                pairs = zip(gradient, self.leaves, strict=True)
                own = parts = [torch.zeros_like(p) if g is None else g.detach().clone() for g, p in pairs]
                self.sharing.reduce_(parts, "data")
            self.sums.add(own)
            if isinstance(self.phi, OwnAgreement):
                self.phi.add(own)
            if matched_now:
                now = None if self.hvp == "reverse" else self.replay.save()
                self._add_product(index, gradient, own)
                if now is not None:
                    self.replay.restore(now)
            elif keeps or (again and by_samples):
                kept[index] = (gradient if keeps else (), own)
            del gradient, own  # before the next graph grows
        return kept

    def _second_pass(self, kept: dict[int, tuple[Vector, Vector]]) -> None:
        """Add the Hessian-vector products: first of the graphs that are kept, in one traversal, then of the others."""
        graphs = [index for index in kept if kept[index][0]]
        if graphs:
            cotangents = [v for index in graphs for v in self.phi.cotangent(index, kept[index][1])]
            gradients = [g for index in graphs for g in kept.pop(index)[0]]
            self._differentiate(gradients, cotangents)
            del gradients, cotangents
        for index in range(self.replay.size):
            if index not in graphs:
                with record_function("GradMatch.domain_gradient"):
                    loss = self.replay(index)
                    gradient = self._gradient(loss, with_graph=self.hvp == "reverse")
                self.replay.again[index] = loss.detach()
                del loss
                self._add_product(index, gradient, kept.pop(index)[1] if index in kept else gradient)
                del gradient  # before the next graph grows

    def _gradient(self, loss: Tensor, *, with_graph: bool) -> list[Tensor | None]:
        if not with_graph:
            return gradient_of(loss, self.leaves)
        gradient = by_autograd(loss, self.leaves, create_graph=True)
        if self.names is not None and not in_transform():
            names, self.names = self.names, None  # one gradient tells
            check_backward(gradient, gradient_of(loss, self.leaves, retain_graph=True), names)
        return gradient

    def _differentiate(self, gradient: Vector, vector: Vector) -> None:
        """Add the product of double backward."""
        self._has_graph |= any(g is not None and g.requires_grad for g in gradient)
        with record_function("GradMatch.hessian_vector_product"):
            accumulate(self._matching, reverse(gradient, vector, self.leaves))

    def _add_product(self, index: int, gradient: Vector, own: Vector) -> None:
        """Add one domain's Hessian-vector product."""
        vector = self.phi.cotangent(index, own, one_pass=self.one_pass)
        if self.hvp == "reverse":
            self._differentiate(gradient, vector)
            return
        again = self.replay.again.get(index, self.replay.losses[index])
        # A loss that is not the same twice has another gradient, and is refused for that.
        in_step = self.sharing is not None and self.sharing.in_step  # all ranks have to do the same
        compares = self.names is not None and not in_transform()
        if compares and not in_step:
            compares = bool(torch.isclose(again, self.replay.losses[index], equal_nan=True))

        def loss(point: list[Tensor]) -> Tensor:
            return self.replay(index, point)

        with record_function("GradMatch.hessian_vector_product"):
            if self.hvp == "forward":
                product, primals, value = forward(loss, self.leaves, vector)
                if compares and self.names is not None and torch.isclose(value, again, rtol=2**-4):
                    check_backward(primals, gradient, self.names, is_coarse=True)  # dual leaves have no hooks
                    self.names = None
            else:
                product = finite_difference(loss, self.leaves, vector)
                if compares and index == self.replay.size - 1:  # in one pass the first vector is zero
                    check_symmetric(loss, self.leaves, vector, product)
                    self.names = None
        self._has_graph |= any(p is not None for p in product)
        accumulate(self._matching, product)

    def _expect(self, sharing: Sharing, matches: bool) -> None:
        """Say what is to be reduced: each gradient, or their sums; the products; and three numbers for each domain."""
        own = [(p, p.dtype) for p in self.leaves]
        wide = [(p, WIDE.get(dtype, dtype)) for p, dtype in own]
        gradients = self.replay.size if sharing.kind == "data" else 0
        sums = (1 + self.sums.cosines) * (sharing.kind == "domains") + matches
        sharing.expect(*[own] * gradients, *[wide] * sums, numbers=3 * self.domains + len(self.leaves))

    def _reduce(self, sharing: Sharing, matches: bool) -> None:
        """Add up the products over the ranks."""
        if matches:
            sharing.reduce_(with_zeros(self._matching, self.leaves), "domains", "data")

    def _result(
        self, gamma: float | None, strength: float, found: list[Tensor], reached: list[bool], buffers: Any
    ) -> Matched:
        """Put the parts together."""
        total, like = self.total, self.replay.losses[0]
        measured = self.sums.result(self.scale)
        value = self.phi.value(measured)
        assert value is not None
        factor = self._gamma(strength) if gamma is None else gamma
        for _, (totals,) in by_kind(total):
            torch._foreach_mul_(totals, 1 / self.domains)
        if factor != 0 and self._matching:
            add_all_(total, self._matching, -factor)
        direction = [
            torch.zeros_like(leaf) if t is None or not is_reached else t.to(leaf.dtype)
            for t, leaf, is_reached in zip(total, self.leaves, reached, strict=True)
        ]
        losses, again = (values.to(like.dtype) for values in found[:2])
        epsilon = precision([losses, *self.leaves])
        # A difference magnifies a change of the loss.
        tolerance = 64 * epsilon if self.hvp == "finite_difference" else math.sqrt(epsilon)
        found_gamma = factor if gamma is not None or 0 < factor < math.inf else None
        return Matched(direction, reached, losses, again, tolerance, value, measured, buffers, found_gamma)

    def _gamma(self, strength: float) -> float:
        """Return the gamma that makes the matching part as long as ``strength`` says, 0 if none does; synchronizes."""
        total, matching = ([t for t in vector if t is not None] for vector in (self.total, self._matching))
        of_matched = squared_norm([t for t in self.sums.total if t is not None])
        of_matching = squared_norm(matching) if matching else torch.zeros_like(of_matched)
        squares = [squared_norm(total), of_matched, of_matching, torch.stack(self.sums.squares).mean()]
        lengths = torch.stack([t.to(of_matched) for t in squares]).sqrt().tolist()
        mean, mean_matched, other, every = lengths[0] / self.domains, lengths[1] / self.domains, *lengths[2:]
        if not (math.isfinite(mean) and math.isfinite(other)):
            return math.nan  # so is the direction: whoever steps refuses it
        # Equal gradients have no spread to be lowered, and what is there is rounding.
        spreads = self.agreement in (variance, cosine)
        equal = spreads and every and 1 - (mean_matched / every) ** 2 <= 64 * precision(total)
        gamma: float = 0.0 if equal or not other else strength * mean / other
        return gamma if gamma <= torch.finfo(torch.float32).max else 0.0


def check_passes(
    agreement: str | Agreement, hvp: str, *, keep_graphs: bool, one_pass: bool, parameters: Iterable[Tensor]
) -> Agreement:
    """Return the function of an agreement if the engine can match by it as the other settings say, else raise."""
    phi, parameters = check_agreement(agreement), list(parameters)
    check_hvp(hvp, parameters)
    if check_bool("keep_graphs", keep_graphs) and hvp != "reverse":
        raise ValueError(f"keep_graphs=True needs hvp='reverse', because there is no graph to keep with hvp={hvp!r}")
    if phi not in AGREEMENTS.values() and (one_pass or any(map(is_sharded, parameters))):
        where = "with one_pass=True" if one_pass else "where parameters are sharded"
        raise ValueError(
            f"agreement should be one of {sorted(AGREEMENTS)} {where} (got a function, which needs every domain's "
            "whole gradient at the same time)"
        )
    if check_bool("one_pass", one_pass) and keep_graphs:
        raise ValueError("one_pass=True keeps no graph: leave out keep_graphs=True, or one_pass")
    return phi


@torch.no_grad()
def with_zeros(sums: list[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Put zeros in the places of a sum in which there was nothing; return it."""
    sums += [None] * (len(leaves) - len(sums))
    for index, (total, leaf) in enumerate(zip(sums, leaves, strict=True)):
        if total is None:
            sums[index] = torch.zeros_like(leaf, dtype=WIDE.get(leaf.dtype, leaf.dtype))
    return [total for total in sums if total is not None]
