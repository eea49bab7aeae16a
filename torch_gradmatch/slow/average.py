r"""The mean of the slow weights over training, often better on unseen domains than the weights themselves.

After meta-update number :math:`t` from ``start`` on (of a method without inner loop: after step number :math:`t`),

.. math::

    \bar\theta_t = \bar\theta_{t-1} + \tfrac1{t+1}\,(\theta_t - \bar\theta_{t-1})
    \qquad\text{or}\qquad
    \bar\theta_t = d\,\bar\theta_{t-1} + (1 - d)\,\theta_t .

Equal weights: Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, UAI 2018, arXiv
1803.05407 (SWA). On unseen domains: Cha et al., *SWAD*, NeurIPS 2021, arXiv 2102.08604; Arpit et al., *Ensemble of
Averages*, NeurIPS 2022, arXiv 2110.10832. The arithmetic is that of ``torch.optim.swa_utils.AveragedModel``. There the
average is a second model; here it is one copy of the parameters, which the model holds inside a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_gradmatch._checks import check_entry, check_fraction, check_int
from torch_gradmatch.parallel.foreach import WIDE, by_kind, clone_all, copy_all_, find_nonfinite, local_of, sharded_like
from torch_gradmatch.parallel.shards import reshard
from torch_gradmatch.slow.buffers import Buffers
from torch_gradmatch.slow.copies import check_copies

__all__ = ["Average", "RunningAverage"]


@dataclass(frozen=True)
class Average:
    r"""Keep the mean of the slow weights: ``GradMatch(optimizer, method, average=Average())``.

    ``with optimizer.averaged_weights():`` lets the model hold it. It costs one copy of the trained parameters, and one
    pass over them in each meta-iteration. Weights average well while they stay in one basin: at a constant learning
    rate once the loss falls slowly (``start``), or from a pretrained model. A step that a ``GradScaler`` skips counts.

    Attributes:
        start: Number of the first meta-update that counts, from 0.
        decay: :math:`d \in (0, 1)` for an exponential mean (EMA) over about :math:`1/(1-d)` meta-updates; None for
            equal weights (SWA).

    Raises:
        ValueError: If one is out of range.

    Example:
        >>> import torch
        >>> from torch_gradmatch import Average, Fish, GradMatch
        >>> w = torch.nn.Parameter(torch.tensor(4.0))
        >>> sgd = torch.optim.SGD([w], lr=0.25)
        >>> optimizer = GradMatch(sgd, Fish(meta_lr=1.0), average=Average())
        >>> for _ in range(2):  # 4 -> 2 -> 1
        ...     _ = optimizer.meta_step(lambda x: (w * x).square(), [torch.tensor(1.0)])
        >>> with optimizer.averaged_weights():
        ...     w.item()
        1.5
    """

    start: int = 0
    decay: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_int("start", self.start, at_least=0))
        if self.decay is not None:
            decay = check_fraction("decay", self.decay)
            if decay == 1:
                raise ValueError("decay should be a number in (0, 1) (got 1): the first weights would stay for ever")
            object.__setattr__(self, "decay", decay)


class RunningAverage:
    """The average of one optimizer's slow weights, and of the model's floating-point buffers if they are followed.

    Half precision is averaged in single. A parameter that joins later begins with the value that it has then; of a
    frozen one there is no copy.

    Args:
        settings: When, and by which mean.
        model: The model whose buffers to average; None for none.

    Attributes:
        number: Meta-updates so far.
        count: Those taken in.
        is_shown: Whether we are inside :meth:`shown`.
    """

    def __init__(self, settings: Average, model: nn.Module | None) -> None:
        self.settings = settings
        self.model = model
        self.places = None if model is None else Buffers(model)
        self.number = self.count = 0
        self.is_shown = False
        self._is_inside = False
        self._weights: dict[Tensor, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._constant: set[str] = set()  # buffers that hold infinity or NaN (a mask), of which there is no mean

    def check(self, call: str) -> None:
        """Raise if parameters hold the average, so that a call makes no sense."""
        if self.is_shown:
            raise RuntimeError(
                f"{call} inside averaged_weights(): parameters hold the average there, for evaluating or saving a "
                "model. Leave the block first"
            )

    @contextmanager
    def meta_step(self) -> Iterator[None]:
        """Let the steps inside the block count for nothing: they are part of a meta-iteration, whose end counts."""
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    @torch.no_grad()
    def take(self, theta: Mapping[Tensor, Tensor]) -> None:
        """Take in the weights after a meta-update.

        Args:
            theta: Slow weights by parameter.
        """
        if self._is_inside:
            return
        self.number += 1
        if self.number <= self.settings.start:
            return
        self.count += 1
        weight = 1 / self.count if self.settings.decay is None else 1 - self.settings.decay
        made = {p: t for p, t in theta.items() if (p.requires_grad or p in self._weights) and not is_lazy(p)}
        self._weights = _moved(self._weights, made, weight)
        if self.places is not None:
            buffers = self.places.named()
            floating = [name for name, b in buffers.items() if b.is_floating_point() or b.is_complex()]
            if self.count == 1:
                self._constant = {floating[i] for i in find_nonfinite([buffers[name] for name in floating])}
            averaged = {name: buffers[name] for name in floating if name not in self._constant}
            known = {name: mean for name, mean in self._buffers.items() if name in averaged}
            others = zip(buffers, clone_all(list(buffers.values())), strict=True)
            self._buffers = dict(others) | _moved(known, averaged, weight)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let parameters and followed buffers hold the average inside the block."""
        if not self.count:
            raise RuntimeError(
                f"there is no average yet: it begins after meta-update number {self.settings.start}, counted from 0 "
                f"(Average.start), and there have been {self.number}"
            )
        if self.is_shown:
            yield
            return
        reshard(self.model, self._weights, "averaged_weights()")
        values, saved = clone_all(list(self._weights)), None if self.places is None else self.places.save()
        self.is_shown = True
        try:
            self._write(self._weights.values())
            if self.places is not None:
                self.places.assign(self._buffers)
            yield
            if self.places is not None:  # statistics that were estimated inside (update_bn) belong to the average
                now = self.places.values(self.places.save())
                self._buffers = {name: _widened(value, value) for name, value in now.items()}
        finally:
            self._write(values)
            if self.places is not None and saved is not None:
                self.places.restore(saved)
            self.is_shown = False

    def _write(self, values: Any) -> None:
        """Let the parameters hold some values, also where they are sharded or cast."""
        reshard(self.model, self._weights)
        copy_all_(list(self._weights), list(values))
        torch.clear_autocast_cache()

    def state_dict(self, parameters: Mapping[Any, Tensor]) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs.

        Args:
            parameters: All the optimizer's, by name.

        Returns:
            The numbers, and the copies themselves.
        """
        weights = {name: self._weights[p] for name, p in parameters.items() if p in self._weights}
        return {"number": self.number, "count": self.count, "weights": weights, "buffers": dict(self._buffers)}

    def check_state_dict(self, state: Any, parameters: Mapping[Any, Tensor]) -> None:
        """Raise ``ValueError`` naming the first entry of a state that cannot be loaded."""
        if not isinstance(state, dict):
            raise ValueError(f"the state dict's 'average' is malformed (got {state!r:.80})")
        for key in ("number", "count"):
            check_entry(state, key, int)
        check_copies("average of parameter", state.get("weights"), parameters)
        check_copies("average of buffer", state.get("buffers"), {} if self.places is None else self.places.named())

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[Any, Tensor]) -> None:
        """Continue from a state that :meth:`check_state_dict` found good. Its tensors are copied.

        Args:
            state: What :meth:`state_dict` once returned; empty to begin anew.
            parameters: As for it.
        """
        self.number, self.count = state.get("number", 0), state.get("count", 0)
        self._weights = {parameters[n]: _widened(v, parameters[n]) for n, v in state.get("weights", {}).items()}
        buffers = {} if self.places is None else self.places.named()
        self._buffers = {n: _widened(v, buffers[n]) for n, v in state.get("buffers", {}).items()}
        floating = [n for n, v in self._buffers.items() if v.is_floating_point() or v.is_complex()]
        self._constant = {floating[i] for i in find_nonfinite([self._buffers[n] for n in floating])}


def _widened(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy, at least in single precision, on the device and with the placements of another tensor."""
    local = local_of(value).detach()
    return sharded_like(local.to(local_of(like).device, WIDE.get(local.dtype, local.dtype), copy=True), like)


def _moved(means: dict[Any, Tensor], values: Mapping[Any, Tensor], weight: float) -> dict[Any, Tensor]:
    """Return means moved towards values by a weight, in place; one that is new or of another shape is the value."""
    known = [key for key, value in values.items() if key in means and means[key].shape == value.shape]
    for _, (mean, value) in by_kind([means[key] for key in known], [values[key] for key in known]):
        wide = [v if v.dtype == m.dtype else v.to(m.dtype) for m, v in zip(mean, value, strict=True)]
        torch._foreach_lerp_(mean, wide, weight)
    old = set(known)
    return {key: means[key] if key in old else _widened(value, value) for key, value in values.items()}
