"""Vectors over all parameters: gradients side by side, so that work on them is few operations, however many they are.

A gradient is copied into a flat vector by one operation and worked on there. Each parameter's piece of that vector is
a view made once, with the shape and strides of its gradient: on an accelerator a copy into such views is one launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from torch_gradmatch.gradients.dots import dots
from torch_gradmatch.parallel.foreach import clone_all, clone_kind
from torch_gradmatch.parallel.shards import Spread, local_of, spread_of

__all__ = ["FlatVectors", "WeightedSum", "as_like"]

LONGEST = 2**31 - 1  # elements of one part: more than that cuBLAS does not multiply in one call

Vector = Sequence[Tensor | None]  # one tensor for each parameter, or None


class Kind(NamedTuple):
    """What a parameter's piece looks like.

    Attributes:
        device: Where it is.
        dtype: Of the vector it is part of: real, at least single precision.
        shape: Of the gradient.
        stride: Of the gradient if that fills its memory.
        is_complex: Whether two elements of the vector are one of the gradient.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_complex: bool

    @property
    def numel(self) -> int:
        """Number of elements of the vector."""
        return torch.Size(self.shape).numel() * (2 if self.is_complex else 1)


class Place(NamedTuple):
    """Where a parameter's piece lies.

    Attributes:
        part: In which part of each vector.
        start: Its first element.
    """

    part: int
    start: int


class Route(NamedTuple):
    """How gradients of certain kinds are copied into the flat vectors.

    Attributes:
        looks: What was compared: every gradient's shape, dtype, layout and device.
        present: The positions that are not None.
        copies: For each part and dtype of gradients, which of those present and the views to copy them into.
        sparse: Which of those present are not dense.
        gaps: Parts that they do not fill.
    """

    looks: list[tuple[object, ...]]
    present: list[int]
    copies: list[tuple[list[int], list[Tensor]]]
    sparse: list[int]
    gaps: list[int]


_look = attrgetter("shape", "dtype", "layout", "device")


class FlatVectors:
    """Named vectors over all parameters, in one part for each device and dtype, and one more to work in.

    Of a sharded parameter the vectors hold this rank's shard, and parts are by the ranks that hold the other shards,
    too.

    Args:
        names: Of the vectors.

    Attributes:
        scratch: The parts of the vector to work in; :meth:`load` fills them.
        vectors: The parts of each named one, as many and as long.
        spreads: For each part over which groups of ranks its elements are spread.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.scratch: list[Tensor] = []
        self.vectors: dict[str, list[Tensor]] = {name: [] for name in names}
        self.spreads: list[Spread] = []
        self._spread: dict[int, Spread] | None = None  # of the parameters that places are reserved for
        self._kinds: dict[int, Kind] = {}
        self._places: dict[int, Place] = {}
        self._views: dict[int, Tensor] = {}  # each parameter's piece of the scratch vector
        self._routes: list[Route] = []  # the last one taken first
        self._loaded: Route | None = None  # what the scratch vector holds, and zeros elsewhere
        self._forgotten = True  # whether the named vectors count as zero, whatever they hold
        self._released = False

    def __iter__(self) -> Iterator[int]:
        """Yield the parameters that have a place, in order."""
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def spread_of(self, index: int) -> Spread:
        """Return over which groups of ranks one parameter's elements are spread.

        Args:
            index: Which parameter.

        Returns:
            The groups; none if no place was reserved for it.
        """
        return () if self._spread is None else self._spread.get(index, ())

    def reserve(self, parameters: Sequence[Tensor]) -> None:
        """Make place for all parameters, in the same layout on every rank, whatever gradients come on which.

        To be called while the named vectors count as zero.

        Args:
            parameters: Those whose gradients are to come, or more.
        """
        spread = {i: spread_of(p) for i, p in enumerate(parameters)}
        if self._spread is None or any(self._spread.get(i, s) != s for i, s in spread.items()):
            self._kinds, self._routes = {}, []
        self._spread = spread
        self._make_place(list(spread), [local_of(p) for p in parameters])

    def load(self, gradients: Vector) -> list[int]:
        """Copy gradients into the scratch vector, zeros where there is none. Makes place for new ones.

        Args:
            gradients: One tensor for each parameter, or None. Any shape, dense or sparse, real or complex.

        Returns:
            The positions that are not None.

        Raises:
            ValueError: If a gradient has another number of elements than those before it.
        """
        self._take_memory()
        present, given = _parted(gradients)
        route = self._find(present, given)
        if route is None:
            self._make_place(present, given)
            route = self._make_route(present, given)
            self._routes = [route, *self._routes[:7]]  # few: a loss that takes ever other branches needs no more
        if self._forgotten:
            for vector in self.vectors.values():
                torch._foreach_zero_(vector)
            self._forgotten = False
        if self._loaded is not route and route.gaps:
            torch._foreach_zero_([self.scratch[part] for part in route.gaps])
        for k in route.sparse:
            given[k] = given[k].to_dense()
        for positions, views in route.copies:
            torch._foreach_copy_(views, given if len(views) == len(given) else [given[k] for k in positions])
        self._loaded = route
        return present

    def spoil(self) -> None:
        """Note that the scratch vector was written to."""
        self._loaded = None

    def put(self, vector: Sequence[Tensor]) -> None:
        """Copy a vector into the scratch vector.

        Args:
            vector: Its parts.
        """
        self._take_memory()
        for part, value in zip(self.scratch, vector, strict=True):
            part.copy_(value)
        self.spoil()

    def unload(self, like: Vector) -> list[Tensor | None]:
        """Return copies of the scratch vector's pieces.

        Args:
            like: Dense tensors of the pieces' shapes, for dtypes; None where no piece is wanted.

        Returns:
            A new tensor like each of those given.
        """
        present, given = _parted(like)
        route = self._find(present, given) or self._make_route(present, given)
        result: list[Tensor | None] = [None] * len(like)
        for positions, pieces in route.copies:
            copies: Sequence[Tensor]
            views = [as_like(piece, given[k]) for k, piece in zip(positions, pieces, strict=True)]
            if views[0].dtype == given[positions[0]].dtype:
                copies = clone_kind(views)
            else:
                copies = clone_all([given[k] for k in positions])  # the shortest way to as many new tensors
                torch._foreach_copy_(copies, views)
            for k, copy in zip(positions, copies, strict=True):
                result[present[k]] = copy
        return result

    def piece(self, name: str, index: int) -> Tensor:
        """Return one parameter's piece of a vector, as a view.

        Args:
            name: Of the vector.
            index: Which parameter.

        Returns:
            The gradient's shape, in at least single precision.
        """
        return self._piece(self.vectors[name], index)

    def flat_piece(self, name: str, index: int) -> Tensor:
        """Return a copy of one parameter's piece as a vector: complex numbers are pairs of reals.

        Args:
            name: Of the vector.
            index: Which parameter.

        Returns:
            One-dimensional and real.
        """
        return _real(self.piece(name, index)).clone(memory_format=torch.contiguous_format).view(-1)

    def zeros(self, index: int) -> Tensor:
        """Return what :meth:`flat_piece` would if it were zero, of one element in memory.

        Args:
            index: Which parameter.

        Returns:
            One-dimensional and real.
        """
        kind = self._kinds[index]
        return torch.zeros((), device=kind.device, dtype=kind.dtype).expand(kind.numel)

    def fill(self, values: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Set up anew with the values given; the gradients' shapes will show when one is loaded.

        Args:
            values: For each name, one-dimensional real vectors by parameter, the same parameters for each.
        """
        pieces = next(iter(values.values()))
        kinds = {i: Kind(v.device, v.dtype, tuple(v.shape), (1,), is_complex=False) for i, v in pieces.items()}
        self._lay_out(kinds, values)
        self._forgotten = False

    def forget(self, *, release: bool = False) -> None:
        """Count the named vectors as zero from now on. The layout stays.

        Args:
            release: Whether to give the memory back until the next gradient is loaded.
        """
        self._forgotten = True
        if release and self.scratch and not self._released:
            for part in self._parts():
                part.untyped_storage().resize_(0)
            self._loaded, self._released = None, True

    def _parts(self) -> list[Tensor]:
        return [*self.scratch, *(part for vector in self.vectors.values() for part in vector)]

    def _take_memory(self) -> None:
        if self._released:
            for part in self._parts():
                part.untyped_storage().resize_(part.numel() * part.element_size())
            torch._foreach_zero_(self.scratch)
            self._released = False

    def _find(self, present: list[int], given: list[Tensor]) -> Route | None:
        """Return the way that such gradients took before."""
        looks = list(map(_look, given))
        for position, route in enumerate(self._routes):
            if route.present == present and route.looks == looks:
                if position:
                    self._routes.insert(0, self._routes.pop(position))
                return route
        return None

    def _make_route(self, present: list[int], given: list[Tensor]) -> Route:
        groups: dict[tuple[int, torch.dtype], list[int]] = {}
        for k, (i, g) in enumerate(zip(present, given, strict=True)):
            groups.setdefault((self._places[i].part, g.dtype), []).append(k)
        filled = set(present)
        return Route(
            looks=list(map(_look, given)),
            present=present,
            copies=[(positions, [self._views[present[k]] for k in positions]) for positions in groups.values()],
            sparse=[k for k, g in enumerate(given) if g.layout != torch.strided],
            gaps=sorted({place.part for i, place in self._places.items() if i not in filled}),
        )

    def _make_place(self, present: list[int], given: list[Tensor]) -> None:
        """Lay the vectors out anew if there is a gradient that has no place or does not fit into it."""
        kinds = {i: _kind_of(g, self._kinds.get(i)) for i, g in zip(present, given, strict=True)}
        if kinds.items() <= self._kinds.items():
            return
        kept: dict[str, dict[int, Tensor]] = {}
        if not self._forgotten:
            for i, kind in kinds.items():
                if i in self._kinds and self._kinds[i].numel != kind.numel:
                    raise ValueError(
                        f"the gradient of parameter {i} has shape {kind.shape}, but one taken in before it had "
                        f"{self._kinds[i].shape}: pass the gradients of the same parameters in the same order"
                    )
            kept = {name: {i: self.flat_piece(name, i) for i in self._kinds} for name in self.vectors}
        self._lay_out(self._kinds | kinds, kept)

    def _lay_out(self, kinds: dict[int, Kind], values: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Give every parameter its place, and the vectors the values that they have there."""
        self._kinds, self._places, self._routes = dict(sorted(kinds.items())), {}, []
        self._loaded, self._released = None, False
        together: dict[tuple[torch.device, torch.dtype, Spread], list[int]] = {}
        for i, kind in self._kinds.items():
            together.setdefault((kind.device, kind.dtype, self.spread_of(i)), []).append(i)
        self.scratch, self.spreads = [], []
        for (device, dtype, spread), indices in together.items():
            lengths = [0]
            # Pairs of reals first: seen as complex numbers they have to begin at an even place.
            for i in sorted(indices, key=lambda i: not self._kinds[i].is_complex):
                numel = self._kinds[i].numel
                if lengths[-1] > 0 and lengths[-1] + numel > LONGEST:
                    lengths.append(0)
                self._places[i] = Place(len(self.scratch) + len(lengths) - 1, lengths[-1])
                lengths[-1] += numel
            self.scratch += [torch.zeros(length, device=device, dtype=dtype) for length in lengths]
            self.spreads += [spread] * len(lengths)
        self.vectors = {name: [torch.zeros_like(part) for part in self.scratch] for name in self.vectors}
        self._views = {i: self._piece(self.scratch, i) for i in self._places}
        for name, pieces in values.items():
            for i, value in pieces.items():
                piece = _real(self._piece(self.vectors[name], i))
                piece.copy_(value.view(piece.shape))

    def _piece(self, vector: Sequence[Tensor], index: int) -> Tensor:
        kind, place = self._kinds[index], self._places[index]
        part = vector[place.part]
        if not kind.is_complex:
            return part.as_strided(kind.shape, kind.stride, place.start)
        pairs = part.numel() // 2
        of_pairs = torch.view_as_complex(part[: 2 * pairs].view(pairs, 2))
        return of_pairs.as_strided(kind.shape, kind.stride, place.start // 2)


def _parted(gradients: Vector) -> tuple[list[int], list[Tensor]]:
    """Return the positions that are not None, and what is there."""
    present = [i for i, g in enumerate(gradients) if g is not None]
    return present, [g for g in gradients if g is not None]


def as_like(piece: Tensor, like: Tensor) -> Tensor:
    """Return a piece with the shape of a gradient, and complex numbers if it has them.

    Args:
        piece: The gradient's numbers, as pairs of reals in one dimension where they were loaded from a checkpoint and
            no gradient has been seen since.
        like: The gradient.

    Returns:
        The piece itself where it is like the gradient.
    """
    if piece.shape == like.shape and piece.is_complex() == like.is_complex():
        return piece
    if like.is_complex():
        return torch.view_as_complex(piece.clone().view(*like.shape, 2))  # a view need not begin at an even place
    return piece.view(like.shape)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _kind_of(gradient: Tensor, old: Kind | None) -> Kind:
    """Return the kind of piece that a gradient needs: the old one if that will do."""
    dtype = torch.promote_types(gradient.dtype.to_real(), torch.float32 if old is None else old.dtype)
    shape, is_complex = tuple(gradient.shape), gradient.is_complex()
    if old is not None and (old.device, old.dtype, old.shape, old.is_complex) == (
        gradient.device,
        dtype,
        shape,
        is_complex,
    ):
        return old
    # The gradient's own strides if it is without gaps and overlaps.
    like = gradient if gradient.layout == torch.strided else torch.empty(shape, device="meta")
    stride = tuple(torch.empty_like(like, device="meta").stride())
    return Kind(gradient.device, dtype, shape, stride, is_complex)


class WeightedSum:
    r"""A weighted sum of gradients, in at least single precision: :math:`w \bar G + \sum_k w_k V_k`.

    Args:
        flat: Where gradients have their places.
        vector: :math:`w \bar G`, in parts as those of ``flat``; written to.
        indices: The parameters that count.
    """

    def __init__(self, flat: FlatVectors, vector: list[Tensor], indices: Iterable[int]) -> None:
        self._flat = flat
        self._layout = flat.scratch
        self._vector = vector
        self._indices = frozenset(indices)

    @torch.no_grad()
    def add(self, vector: Vector, weight: float) -> None:
        """Add a vector.

        Args:
            vector: One tensor for each parameter; None counts as zero, and so does one that does not count.
            weight: Its weight.
        """
        self._flat.load([v if i in self._indices else None for i, v in enumerate(vector)])
        self._check_layout()
        for total, part in zip(self._vector, self._flat.scratch, strict=True):
            total.add_(part, alpha=weight)

    @torch.no_grad()
    def add_sum(self, other: WeightedSum, weight: float) -> None:
        """Add another sum.

        Args:
            other: Of the same gradients.
            weight: Its weight.
        """
        for total, part in zip(self.vector, other.vector, strict=True):
            total.add_(part, alpha=weight)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Euclidean norm, over all elements on whatever rank they are.

        Returns:
            Shape ().
        """
        return dots([(self.vector, self.vector)], self._flat.spreads)[0].sqrt()

    @torch.no_grad()
    def tensors(self, like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the sum.

        Args:
            like: The parameters, for shapes and dtypes.

        Returns:
            A new tensor for each parameter, None for one that does not count.
        """
        self._check_layout()
        self._flat.put(self._vector)
        return self._flat.unload([p if i in self._indices else None for i, p in enumerate(like)])

    @property
    def vector(self) -> list[Tensor]:
        """The sum itself in parts, to be reduced over ranks in place."""
        self._check_layout()
        return self._vector

    @property
    def indices(self) -> frozenset[int]:
        """The parameters that count."""
        return self._indices

    @property
    def places(self) -> list[int]:
        """The parameters that have a place, in order."""
        return list(self._flat)

    def count_also(self, indices: Iterable[int]) -> None:
        """Let more parameters count, for which other ranks have a gradient; places for them are reserved.

        Args:
            indices: Which.
        """
        self._indices |= frozenset(indices)

    def _check_layout(self) -> None:
        if self._flat.scratch is not self._layout:
            raise RuntimeError(
                "gradients of other parameters or dtypes were taken in since this sum was begun: take in every "
                "domain's gradient first"
            )
