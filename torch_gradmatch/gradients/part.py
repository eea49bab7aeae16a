r"""Matching the gradients of some of the parameters, the classifier's head for instance, by about ordinary training.

:math:`\phi` is that of the gradients :math:`G_i` by the matched parameters Q alone, and its derivative goes through all
parameters. ``autograd.grad`` of a loss by Q stops at Q, so that the :math:`G_i` cost a forward pass and little more.
With cotangents :math:`v_i = \partial\phi/\partial G_i` from them, and :math:`g_i` differentiable,

.. math:: \frac{\partial}{\partial\theta}\Bigl(\frac1S L_i - \gamma\, v_i \cdot g_i\Bigr)

is one backward pass for each domain. Only what lies above Q is differentiated twice; below it that is an ordinary
backward pass, which goes through compiled code, fused attention, checkpointing and ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from torch_gradmatch._checks import name_of
from torch_gradmatch.gradients.agreement import OwnAgreement, variance
from torch_gradmatch.gradients.alignment import accumulate
from torch_gradmatch.gradients.backward import by_autograd, check_backward, check_differentiable, gradient_of
from torch_gradmatch.gradients.engine import Engine, with_zeros
from torch_gradmatch.parallel.foreach import WIDE, Vector
from torch_gradmatch.parallel.sharing import Sharing

__all__ = ["PartEngine"]

Evaluated = tuple[Tensor, Vector, Vector]  # a loss, its gradient by Q, and that as reduced


class PartEngine(Engine):
    """One evaluation of the objective's gradient where the gradients of :attr:`Engine.matched` alone are to agree."""

    def _first_pass(self, matches: bool) -> dict[int, tuple[Vector, Vector]]:
        """Take in the gradients by Q; where each domain is evaluated once, all else, too."""
        self.total = []
        kept: dict[int, tuple[Vector, Vector]] = {}
        self._graphs: list[Evaluated] = []
        only_once = self.one_pass or self.keep_graphs or not matches
        for index in range(self.replay.size):
            # Before the first domain there is none: only in the variance it is matched, with itself.
            matched_now = matches and only_once and (index > 0 or self.keep_graphs or self.agreement is variance)
            with record_function("GradMatch.domain_gradient"):
                loss = self.replay(index)
                found = self._evaluated(index, loss, with_graph=matched_now, keeps=only_once)
            self.sums.add(found[2])
            if isinstance(self.phi, OwnAgreement):
                self.phi.add(found[2])
            if not only_once:
                kept[index] = ((), found[2] if self.sharing is not None else ())
            elif self.keep_graphs and matches:
                self._graphs.append(found)
            else:
                self._add([found], [index] if matched_now else [])
            del loss, found  # before the next graph grows
        return kept

    def _second_pass(self, kept: dict[int, tuple[Vector, Vector]]) -> None:
        """Add each domain's part of the direction: from the graphs that are kept, or evaluating it again."""
        if self._graphs:
            self._add(self._graphs, list(range(len(self._graphs))))
            self._graphs = []
        for index, (_, own) in kept.items():
            plain = None
            if self._separates():
                # Not by a graph that is kept: compiled code lets it be traversed once.
                with record_function("GradMatch.domain_gradient"):
                    plain = gradient_of(self.replay(index), self.leaves)
            loss = self.replay(index)
            self.replay.again[index] = loss.detach()
            gradient = by_autograd(loss, self.of, create_graph=True)
            self._add([(loss, gradient, own or gradient)], [index], plain)
            del loss, gradient  # before the next graph grows

    def _evaluated(self, index: int, loss: Tensor, *, with_graph: bool, keeps: bool) -> Evaluated:
        gradient = by_autograd(loss, self.of, create_graph=with_graph, retain_graph=keeps)
        if all(g is None for g in gradient):
            raise ValueError(f"the loss of {name_of(index)} depends on none of the matched parameters")
        own = [torch.zeros_like(q) if g is None else g.detach() for g, q in zip(gradient, self.of, strict=True)]
        if self.sharing is not None:
            own = [g.clone() for g in own]
            self.sharing.reduce_(own, "data", "joined")
        return loss, gradient, own

    def _separates(self) -> bool:
        """Whether the gradient of the losses is wanted by itself: to find gamma, or to compare."""
        return self.gamma is None or self.names is not None

    def _add(self, evaluated: Sequence[Evaluated], matched: Sequence[int], plain: Vector | None = None) -> None:
        """Add the derivative of some losses and of their matching terms by all parameters: one backward pass.

        Args:
            evaluated: The losses, with their gradients.
            matched: Numbers of these domains; none where they are not matched.
            plain: The gradient of the loss, if it is known.
        """
        losses = torch.stack([loss for loss, _, _ in evaluated]).sum()
        products = [
            (v * g.conj()).real.sum() if g.is_complex() else (v * g).sum()
            for index, (_, gradient, own) in zip(matched, evaluated, strict=False)
            for v, g in zip(self.phi.cotangent(index, own, one_pass=self.one_pass), gradient, strict=True)
            if v is not None and g is not None and g.requires_grad
        ]
        with record_function("GradMatch.backward"):
            if not products:
                accumulate(self.total, gradient_of(losses, self.leaves) if plain is None else plain)
                return
            self._has_graph = True
            check_differentiable(products, self.of)
            product = torch.stack([p.to(losses.device, losses.dtype) for p in products]).sum()
            if plain is None and self._separates():
                plain = self._by_same_graph(losses)
            if plain is not None:
                self._compare(evaluated, plain)
            if self.gamma is None:
                accumulate(self.total, plain or ())
                accumulate(self._matching, gradient_of(product, self.leaves))
            else:
                accumulate(self.total, gradient_of(losses - self.domains * self.gamma * product, self.leaves))

    def _by_same_graph(self, losses: Tensor) -> Vector | None:
        """Return the gradient of losses whose graph is traversed again; None if it cannot be and need not."""
        try:
            return gradient_of(losses, self.leaves, retain_graph=True)
        except RuntimeError as error:
            if self.gamma is None or "donated buffer" not in str(error):  # of compiled code
                raise
        self.names = None
        return None

    def _compare(self, evaluated: Sequence[Evaluated], plain: Vector) -> None:
        """Compare the first gradients that are differentiated again with what ``backward()`` finds."""
        if self.names is None:
            return
        names, self.names = self.names, None
        place = {id(leaf): position for position, leaf in enumerate(self.leaves)}
        sums: list[Tensor | None] = []
        for _, gradient, _ in evaluated:
            accumulate(sums, [None if g is None else g.detach() for g in gradient])
        trained = [(k, place[id(q)]) for k, q in enumerate(self.of) if id(q) in place]
        found, expected = [sums[k] for k, _ in trained], [plain[position] for _, position in trained]
        check_backward(found, expected, [names[position] for _, position in trained])

    def _expect(self, sharing: Sharing, matches: bool) -> None:
        """Say what is to be reduced: the gradients by Q, or their sums; and the direction, in one part or two."""
        own = [(q, q.dtype) for q in self.of]
        sums = [(q, WIDE.get(dtype, dtype)) for q, dtype in own]
        wide = [(p, WIDE.get(p.dtype, p.dtype)) for p in self.leaves]
        gradients = self.replay.size if sharing.kind == "data" else 0
        number = (1 + self.sums.cosines) * (sharing.kind == "domains")
        parts = 1 + (matches and self.gamma is None)
        numbers = 3 * self.domains + len(wide)
        sharing.expect(*[own] * gradients, *[sums] * number, *[wide] * parts, numbers=numbers)

    def _reduce(self, sharing: Sharing, matches: bool) -> None:
        """Add up the direction over the ranks; of parameters that ``fully_shard`` does not reduce, too."""
        parts = [with_zeros(self.total, self.leaves)]
        if matches and self.gamma is None:
            parts.append(with_zeros(self._matching, self.leaves))
        for part in parts:
            sharing.reduce_direction_(part, self.leaves)
