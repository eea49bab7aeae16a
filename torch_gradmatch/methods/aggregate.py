r"""Any aggregation of the domains' gradients: TorchJD's UPGrad, CAGrad, PCGrad, MGDA and their kind.

Quinton and Rey, *Jacobian Descent for Multi-Objective Optimization*, arXiv 2406.16232, and the works cited there: a
function from the matrix of the gradients :math:`G_1, \ldots, G_S`, one a row, to one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.backward import gradient_of
from torch_gradmatch.methods.base import COMMON_CHECKS
from torch_gradmatch.methods.direction import Direction, DirectionLoop, Evaluation
from torch_gradmatch.methods.once import OnceMethod
from torch_gradmatch.parallel.foreach import is_sharded

__all__ = ["Aggregate"]


def _check_aggregator(value: object) -> Callable[[Tensor], Tensor]:
    if not callable(value) or isinstance(value, type):
        kind = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"aggregator should be a function from a matrix (S, P) to a vector (P,) (got {kind:.80})")
    return value


@dataclass(repr=False)
class Aggregate(OnceMethod):
    """Hand the matrix of the domains' gradients to a function, and its result to the wrapped optimizer.

    Memory: the matrix, S times the parameters, and what the function takes. All parameters are on one device, not
    sharded. Each domain is evaluated once, with one graph alive.

    Attributes:
        aggregator: Takes a matrix of shape (S, P), the gradient of each of S domains by all P trained parameters one
            after the other, zero where a loss does not depend on one; returns shape (P,). Any callable, such as
            ``torchjd.aggregation.UPGrad()`` (``pip install torchjd``).
        model: As for :class:`~torch_gradmatch.ERM`.
        nonfinite: As for :class:`~torch_gradmatch.ERM`.
        process_group: As for :class:`~torch_gradmatch.ERM`, and each gradient is averaged: S all-reduces.

    Raises:
        TypeError: If ``aggregator`` cannot be called.

    Example:
        >>> import torch
        >>> from torch_gradmatch import Aggregate, GradMatch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> median = lambda matrix: matrix.median(dim=0).values
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=1.0), Aggregate(median))
        >>> domains = torch.tensor([[1.0, 0.0], [2.0, 5.0], [9.0, 1.0]])
        >>> report = optimizer.meta_step(lambda x: -(w * x).sum(), domains)
        >>> w.tolist()
        [2.0, 1.0]
    """

    aggregator: Callable[[Tensor], Tensor]
    model: nn.Module | None = None
    nonfinite: Literal["raise", "ignore"] = "raise"
    process_group: ProcessGroup | None = None

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {"aggregator": _check_aggregator}

    def check(self, loop: DirectionLoop) -> None:
        """Raise if the gradients do not go into one matrix. See ``DirectionMethod.check``."""
        parameters = loop.parameters()
        devices = {p.device for p in parameters}
        if any(map(is_sharded, parameters)) or len(devices) > 1:
            where = "sharded" if len(devices) == 1 else f"on {len(devices)} devices"
            raise ValueError(
                f"Aggregate needs whole gradients in one matrix, and the parameters are {where}: SmoothFish, Fish and "
                "IDGM(matched=...) do not"
            )

    def direction(self, given: Evaluation) -> Direction:
        """Work out the aggregated gradient. See ``DirectionMethod.direction``."""
        own = [[(p, p.dtype) for p in given.parameters]] if given.sharing is not None else []
        self.expect(given, *own * len(given.batches))
        rows: list[list[Tensor]] = []
        reached = [False] * len(given.parameters)

        def take(index: int, loss: Tensor) -> None:
            gradient = gradient_of(loss, given.parameters)
            checks.check_reached(gradient, index)
            reached[:] = [known or g is not None for known, g in zip(reached, gradient, strict=True)]
            pairs = zip(gradient, given.parameters, strict=True)
            rows.append([torch.zeros_like(p) if g is None else g for g, p in pairs])

        losses = self.losses(given, take)
        for row in rows if given.sharing is not None else ():
            given.sharing.reduce_(row, "data", "joined")  # type: ignore[union-attr]
        matrix = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        rows.clear()
        with torch.no_grad():
            found: Any = self.aggregator(matrix if given.scale == 1.0 else matrix / given.scale)
        if not isinstance(found, Tensor) or found.shape != matrix.shape[1:]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"aggregator should return a tensor of shape {tuple(matrix.shape[1:])}, one number for each of the "
                f"parameters (got {shape})"
            )
        parts = (found * given.scale).split([p.numel() for p in given.parameters])
        total = [
            part.reshape(p.shape) if is_reached else None
            for part, p, is_reached in zip(parts, given.parameters, reached, strict=True)
        ]
        return self.close(given, losses, total, losses.mean() / given.scale)
