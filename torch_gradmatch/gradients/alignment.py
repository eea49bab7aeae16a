r"""How well the gradients of several domains agree, measured with running sums.

With gradients :math:`G_1, \ldots, G_S`, the mean inner product over pairs of domains (the GIP of Shi et al., ICLR 2022,
arXiv 2104.09937, equation 3, divided by the number of pairs) is

.. math:: \frac{1}{S(S-1)} \sum_{i \ne j} G_i \cdot G_j = \frac{2}{S(S-1)} \sum_i G_i \cdot \sum_{j<i} G_j .

The right-hand side needs one gradient and one running sum at a time: its cost is linear in S and no S gradients are
ever stored. Unlike :math:`|\sum_i G_i|^2 - \sum_i |G_i|^2` it subtracts nothing, so it does not cancel when gradients
are nearly orthogonal. The mean cosine is the same with every gradient divided by its norm. Only the cosines of single
pairs need all S gradients at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_gradmatch._checks import check_bool, check_loss, evaluating, named_batches, naming
from torch_gradmatch.gradients.backward import gradient_of
from torch_gradmatch.gradients.dots import dots, products_with_other_ranks, products_with_rest
from torch_gradmatch.gradients.flat import FlatVectors, Vector, WeightedSum, as_like
from torch_gradmatch.gradients.pairs import cosines_of_pairs, plot_matrix
from torch_gradmatch.gradients.rest import WithRest
from torch_gradmatch.parallel.foreach import clone_all, is_sharded
from torch_gradmatch.parallel.reduction import sum_, sums_of_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Alignment", "GradientAlignment", "gradient_alignment"]


@dataclass(frozen=True)
class Alignment(WithRest):
    """How well the gradients of S domains agree. Tensors on the first gradient's device: reading them waits for it.

    Attributes:
        inner_product: Mean inner product over pairs of domains, shape (); NaN for fewer than two domains.
        cosine: Mean cosine over pairs of domains, shape (); NaN for fewer than two domains. A zero gradient counts
            as orthogonal to all others. None if it was not asked for.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,).
        cosines: Cosine of each pair of domains, shape (S, S), symmetric with ones on the diagonal (zeros for a zero
            gradient). None if it was not asked for.
        domains: The domains' names, if they are known.
    """

    inner_product: Tensor
    cosine: Tensor | None
    grad_norms: Tensor
    cosines: Tensor | None = None
    domains: tuple[Any, ...] | None = None
    _with_rest: tuple[Tensor, ...] | None = None

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the cosines of all pairs as a picture, with the domains' names.

        Args:
            axes: Matplotlib axes to draw on; new ones if None.

        Returns:
            The axes.

        Raises:
            RuntimeError: If the cosines of pairs were not measured.
        """
        if self.cosines is None:
            raise RuntimeError("the cosines of pairs were not measured: gradient_alignment(..., pairs=True)")
        names = range(len(self.grad_norms)) if self.domains is None else self.domains
        return plot_matrix(self.cosines.tolist(), [str(name) for name in names], "cosine of gradients", axes)


class GradientAlignment:
    """Running sums over the gradients of one group of domains.

    Memory: two vectors of the size of the parameters, the sums and one to work in, whatever the number of domains; a
    third one for cosines. In single precision for parameters in half. They stay from one group to the next unless
    :meth:`reset` releases them. A gradient is taken in by few operations, whatever the number of parameters.

    Args:
        cosines: Whether to measure cosines, too.
        pairs: Whether to measure the cosine of each pair of domains by itself. That takes a copy of every gradient:
            memory of S times the parameters, and S(S - 1)/2 inner products in the end.

    Example:
        >>> import torch
        >>> alignment = GradientAlignment()
        >>> for gradient in torch.tensor([[3.0, 0.0], [1.0, 1.0]]):
        ...     alignment.add([gradient])
        >>> measured = alignment.result()
        >>> measured.inner_product, measured.cosine, measured.grad_norms
        (tensor(3.), tensor(0.7071), tensor([3.0000, 1.4142]))
    """

    def __init__(self, cosines: bool = True, pairs: bool = False) -> None:
        self.cosines = check_bool("cosines", cosines)
        self.pairs = check_bool("pairs", pairs)
        self._flat = FlatVectors(["sums", "units"] if cosines else ["sums"])
        self.reset()

    def reset(self, *, release: bool = False) -> None:
        """Forget all gradients: a new group of domains begins.

        Args:
            release: Whether to give the memory back until then.
        """
        self._flat.forget(release=release)
        self._reached: set[int] = set()
        self._squares: list[Tensor] = []
        self._products: list[Tensor] = []
        self._cosines: list[Tensor] = []
        self._gradients: list[dict[int, Tensor]] = []  # with pairs, of each domain by parameter
        self._first = 0  # number of the first gradient taken in here, once those of other ranks are in, too

    def reserve(self, parameters: Sequence[Tensor]) -> None:
        """Prepare for the gradients of certain parameters, after :meth:`reset`.

        Needed where ranks are to reduce the sums, which have to lie alike on all, and where parameters are ``DTensor``
        s, of which :meth:`add` gets the local shards.

        Args:
            parameters: The parameters, in the order of the gradients.
        """
        self._flat.reserve(parameters)

    @torch.no_grad()
    def add(self, gradients: Vector) -> None:
        """Take in one domain's gradient.

        Args:
            gradients: One tensor for each parameter, always in the same order; None counts as zero. Any shape, dense
                or sparse, real or complex.

        Raises:
            ValueError: If every gradient is None, or one has another shape than in the domains before.
        """
        if all(g is None for g in gradients):
            raise ValueError("no parameter has a gradient: call backward() before the gradients are measured")
        present = self._flat.load(gradients)
        self._reached.update(present)
        if self.pairs:
            self._gradients.append(dict(zip(present, clone_all([g for g in gradients if g is not None]), strict=True)))
        parts, sums = self._flat.scratch, self._flat.vectors["sums"]
        # With the sums before this gradient is in them, so that nothing has to be subtracted.
        others = [parts, *self._flat.vectors.values()]
        squared, product, *with_units = dots([(parts, other) for other in others], self._flat.spreads)
        self._products.append(product)
        self._squares.append(squared)
        if self.cosines:
            units = self._flat.vectors["units"]
            # Of a zero gradient nothing is left to scale: by anything that every part's dtype has.
            scale = squared.clamp(min=max(torch.finfo(part.dtype).tiny for part in parts)).rsqrt()
            self._cosines.append(with_units[0] * scale)
            for unit, part in zip(units, parts, strict=True):
                unit.addcmul_(part, scale.to(part.device, part.dtype))
        for total, part in zip(sums, parts, strict=True):
            total.add_(part)

    def result(self) -> Alignment:
        """Return the agreement of the gradients taken in since the last reset.

        Returns:
            The means over pairs and the norms, in the precision of the gradients but at least single.

        Raises:
            RuntimeError: If no gradient was taken in.
        """
        if not self._squares:
            raise RuntimeError("no gradient was measured: call add() first")
        domains = len(self._squares)
        pairs = domains * (domains - 1) / 2 if domains > 1 else float("nan")
        squares, products = torch.stack(self._squares), torch.stack(self._products)
        is_running = self.cosines and len(products) == domains  # those of other ranks are one product
        return Alignment(
            inner_product=products.sum() / pairs,
            cosine=torch.stack(self._cosines).sum() / pairs if self.cosines else None,
            grad_norms=squares.sqrt(),
            cosines=self._cosines_of_pairs() if self.pairs else None,
            _with_rest=(squares, products) if is_running else None,
        )

    def _cosines_of_pairs(self) -> Tensor:
        return cosines_of_pairs(self._gradients, self._flat.spread_of).to(self._squares[0])

    @torch.no_grad()
    def merge(
        self, group: ProcessGroup, counts: Sequence[int], rank: int, numbers: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        r"""Take in what the other ranks of a group have taken in, in the order of the ranks.

        One all-reduce of the sums and, with cosines, one of the sums of unit gradients; and one of a few numbers.
        Afterwards all is as if every gradient had been taken in here.

        Args:
            group: The ranks; :meth:`reserve` came before the first gradient on each of them.
            counts: How many gradients each rank has taken in, none of them zero.
            rank: This one's place among them.
            numbers: Any that are to be summed over the ranks along with it.

        Returns:
            What the squared distances of all gradients from their mean are more in sum than those from the mean of
            each rank's, shape (); and the sums of the numbers.
        """
        domains, number = sum(counts), counts[rank]
        self._first = sum(counts[:rank])
        found = {}
        for name, total in self._flat.vectors.items():
            self._flat.put(total)
            sum_(total, group)
            found[name] = products_with_other_ranks(self._flat.scratch, total, self._flat.spreads, number, domains)
        squares = self._squares[0].new_zeros(domains)
        squares[self._first : self._first + number] = torch.stack(self._squares)
        reached = torch.zeros(len(self._flat), device=squares.device)
        reached[torch.tensor([i in self._reached for i in self._flat], device=squares.device)] = 1
        own = [squares, reached, found["sums"][1]]
        for products, name in ((self._products, "sums"), (self._cosines, "units")):
            if products:  # of every pair once
                own.append(torch.stack(products).sum() + found[name][0] / 2)
        merged = sums_of_numbers([*own, *numbers], group)
        squares, reached, between = merged[0].to(squares.dtype), merged[1] > 0, merged[2].to(squares.dtype)
        self._squares = list(squares)
        self._reached = {i for i, is_reached in zip(self._flat, reached.tolist(), strict=True) if is_reached}
        for k, products in enumerate([self._products, self._cosines]):
            if products:
                products[:] = [merged[3 + k].to(squares.dtype)]
        return between, merged[len(own) :]

    def norm(self, domain: int) -> Tensor:
        """Return the Euclidean norm of one domain's gradient.

        Args:
            domain: Which one, from 0, in the order of :meth:`add` on this rank.

        Returns:
            Shape ().
        """
        return self._squares[self._first + domain].sqrt()

    @torch.no_grad()
    def with_rest(self, domain: int, gradient: Vector) -> Tensor:
        """Return what the cosine of one domain's gradient with the sum of all others' is made of, once all are in.

        Args:
            domain: Which one, from 0, in the order of :meth:`add` on this rank.
            gradient: That domain's gradient, once more: nothing but sums is kept of it.

        Returns:
            Their product and the squares of their lengths, shape (3,).
        """
        self._flat.load(gradient)
        product, rest = products_with_rest(self._flat.scratch, self._flat.vectors["sums"], self._flat.spreads)
        return torch.stack([product, self._squares[self._first + domain], rest])

    def total(self, index: int, like: Tensor, *, unit: bool = False) -> Tensor:
        """Return the sum over domains of one parameter's gradient, to be read: it may be the running sum itself.

        Args:
            index: Which parameter; some domain had a gradient for it.
            like: A gradient of it, for shape and kind.
            unit: Whether every domain's whole gradient counts with length one.

        Returns:
            The shape of ``like``, in at least single precision.
        """
        return as_like(self._flat.piece("units" if unit else "sums", index), like)

    @torch.no_grad()
    def mean(self, weight: float = 1.0) -> WeightedSum:
        r"""Begin a weighted sum with the mean of the gradients, :math:`w \bar G`, to which others can be added.

        It is made of as much memory as the running sums, and of their layout: take in every domain's gradient first.

        Args:
            weight: w.

        Returns:
            The sum, of those parameters for which some domain had a gradient.

        Example:
            >>> import torch
            >>> alignment = GradientAlignment()
            >>> for gradient in torch.tensor([[3.0, 0.0], [1.0, 1.0]]):
            ...     alignment.add([gradient])
            >>> direction = alignment.mean()
            >>> direction.add([torch.tensor([10.0, 10.0])], weight=-0.1)
            >>> direction.tensors(like=[torch.zeros(2)])
            [tensor([ 1.0000, -0.5000])]
        """
        scaled = [total * (weight / len(self)) for total in self._flat.vectors["sums"]]
        return WeightedSum(self._flat, scaled, self._reached)

    @torch.no_grad()
    def combined(
        self, gradient: Vector, ratio: float | Tensor, scale: float | Tensor, *, unit: bool = False
    ) -> list[Tensor | None]:
        r"""Return ``scale`` :math:`(\Sigma + \mathtt{ratio}\; G)`, with :math:`\Sigma` the sum of the gradients.

        Args:
            gradient: G, as in :meth:`add` but dense; one that was taken in.
            ratio: A number or a tensor of shape ().
            scale: A number or a tensor of shape ().
            unit: Whether every domain's whole gradient counts with length one in the sum.

        Returns:
            A new tensor like each one given, None where that is None.
        """
        self._flat.load(gradient)
        for part, total in zip(self._flat.scratch, self._flat.vectors["units" if unit else "sums"], strict=True):
            a, b = (c.to(part.device, part.dtype) if isinstance(c, Tensor) else c for c in (ratio, scale))
            part.mul_(a).add_(total).mul_(b)
        self._flat.spoil()
        return self._flat.unload(gradient)

    @property
    def indices(self) -> list[int]:
        """The parameters for which some domain had a gradient, in order."""
        return sorted(self._reached)

    @torch.no_grad()
    def dot_unit_total(self, gradient: Vector) -> Tensor:
        """Return the inner product of a gradient with the sum of the unit gradients.

        Args:
            gradient: As in :meth:`add`; one that was taken in.

        Returns:
            Shape ().
        """
        self._flat.load(gradient)
        return dots([(self._flat.scratch, self._flat.vectors["units"])], self._flat.spreads)[0]

    @torch.no_grad()
    def squared_distance(self, gradient: Vector, scale: float) -> Tensor:
        """Return the squared distance of a gradient from ``scale`` times the sum of those taken in.

        Args:
            gradient: As in :meth:`add`; None counts as zero.
            scale: A number.

        Returns:
            Shape ().
        """
        self._flat.load(gradient)
        for part, total in zip(self._flat.scratch, self._flat.vectors["sums"], strict=True):
            part.sub_(total, alpha=scale)
        self._flat.spoil()
        return dots([(self._flat.scratch, self._flat.scratch)], self._flat.spreads)[0]

    def __len__(self) -> int:
        return len(self._squares)

    def state_dict(self, only: Collection[int] | None = None) -> dict[str, Any]:
        """Return the running sums as plain tensors and numbers.

        A parameter of earlier groups without gradient in this one has zeros, of one element in memory: the order in
        which numbers are summed up depends on its place.

        Args:
            only: Leave out the sums of all other parameters.

        Returns:
            The state; copies of the sums.
        """
        indices = [i for i in self._flat if only is None or i in only]
        sums, units = (
            {i: self._flat.flat_piece(name, i) if i in self._reached else self._flat.zeros(i) for i in indices}
            if name in self._flat.vectors
            else {}
            for name in ("sums", "units")
        )
        return {
            "sums": sums,
            "unit_sums": units,
            "squares": list(self._squares),
            "products": list(self._products),
            "cosines": list(self._cosines),
            "reached": self.indices,
            **({"gradients": list(self._gradients)} if self.pairs else {}),
        }

    def check_state_dict(self, state: Mapping[str, Any], sizes: Sequence[int]) -> None:
        """Raise if :meth:`load_state_dict` could not use a state.

        Args:
            state: What :meth:`state_dict` once returned, with or without cosines.
            sizes: Number of (real) elements of each parameter's gradient, in order.

        Raises:
            ValueError: Names the entry that is missing or does not fit.
        """
        for key in ("sums", "unit_sums"):
            vectors = state.get(key)
            if not isinstance(vectors, dict) or not all(isinstance(v, Tensor) for v in vectors.values()):
                raise ValueError(f"the state dict's alignment's {key!r} is missing or malformed")
            if any(i not in range(len(sizes)) or v.shape != (sizes[i],) for i, v in vectors.items()):
                raise ValueError(f"the state dict's alignment's {key!r} does not fit this optimizer's parameters")
        for key in ("squares", "products", "cosines"):
            scalars = state.get(key)
            if not isinstance(scalars, list) or not all(isinstance(v, Tensor) and v.dim() == 0 for v in scalars):
                raise ValueError(f"the state dict's alignment's {key!r} is missing or malformed")
        reached = state.get("reached", [])
        if not isinstance(reached, list) or any(i not in state["sums"] for i in reached):
            raise ValueError(f"the state dict's alignment's 'reached' is malformed (got {reached!r:.80})")
        for key, like in (("unit_sums", "sums"), ("cosines", "squares")):
            if self.cosines and state["squares"] and len(state[key]) != len(state[like]):
                raise ValueError(
                    f"the state dict's alignment's {key!r} holds {len(state[key])} entries for {len(state[like])} in "
                    f"{like!r}: it was saved without cosines, which are wanted here; save it between two groups of "
                    "domains"
                )
        if self.pairs and state["squares"]:
            gradients = state.get("gradients")
            if not isinstance(gradients, list) or len(gradients) != len(state["squares"]):
                raise ValueError(
                    "the state dict's alignment's 'gradients' is missing or malformed: it was saved without the "
                    "cosines of pairs, which are wanted here; save it between two groups of domains"
                )
            for gradient in gradients:
                if not isinstance(gradient, dict) or any(
                    i not in range(len(sizes)) or not isinstance(g, Tensor) or _real_size(g) != sizes[i]
                    for i, g in gradient.items()
                ):
                    raise ValueError(
                        "the state dict's alignment's 'gradients' does not fit this optimizer's parameters"
                    )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from running sums that :meth:`state_dict` returned. Cosines are dropped if not wanted here.

        Args:
            state: The state.
        """
        self.reset()
        units = state["unit_sums"] if state["squares"] else state["sums"]  # between two groups all are zero
        values = {"sums": state["sums"], "units": units}
        self._flat.fill({name: values[name] for name in self._flat.vectors})
        if not state["squares"]:
            self._flat.forget()
        self._reached = set(state.get("reached", state["sums"]))
        self._squares, self._products = list(state["squares"]), list(state["products"])
        self._cosines = list(state["cosines"]) if self.cosines else []
        if self.pairs and state["squares"]:
            self._gradients = [dict(gradient) for gradient in state["gradients"]]

    # The vectors' pieces are views: a copy would have views of the vectors that it was copied from.

    def __getstate__(self) -> dict[str, Any]:
        return {"cosines": self.cosines, "pairs": self.pairs, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, state["cosines"], state["pairs"])
        self.load_state_dict(state["state"])


def _real_size(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def gradient_alignment(
    parameters: Iterable[Tensor],
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any] | Mapping[Any, Any],
    pairs: bool = False,
) -> Alignment:
    """Measure how well the gradients of several domains agree at the present parameters.

    The gradients are taken by ``backward()``, as in training. The ``.grad`` of the parameters given is afterwards what
    it was; other parameters that require a gradient and take part in a loss accumulate it. The model runs as
    ``loss_fn`` runs it: in training mode BatchNorm statistics move and dropout draws random numbers.

    Args:
        parameters: The parameters to differentiate by; those that need no gradient are left out.
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batches: One batch of each domain; a mapping names the domains.
        pairs: Whether to measure the cosine of each pair of domains, too, which takes memory for S gradients.

    Returns:
        The agreement; ``.plot()`` draws that of pairs.

    Raises:
        ValueError: If there are no batches, or a loss is not a scalar or depends on no parameter.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> domains = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])]
        >>> gradient_alignment([w], lambda x: (w * x).sum(), domains).inner_product
        tensor(1.)
        >>> north_and_south = dict(zip(["north", "south"], domains))
        >>> gradient_alignment([w], lambda x: (w * x).sum(), north_and_south, pairs=True).cosines
        tensor([[1.0000, 0.4472],
                [0.4472, 1.0000]])
    """
    domains, batches = named_batches(batches)
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        raise ValueError("parameters holds no tensor that requires a gradient: pass those that are to be trained")
    alignment = GradientAlignment(pairs=pairs)
    if any(map(is_sharded, wanted)):
        alignment.reserve(wanted)
    with naming(domains):
        for index, batch in enumerate(batches):
            with evaluating(index):
                loss = loss_fn(batch)
            alignment.add(gradient_of(check_loss(loss, index), wanted))
    if not len(alignment):
        raise ValueError("batches is empty: one batch of each domain is needed")
    return replace(alignment.result(), domains=domains)
