r"""Fishr: equal variances of the classifier head's per-sample gradients in all domains.

Rame, Dancette and Cord, *Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization*, ICML 2022, arXiv
2109.02934. With :math:`v_i` the variance, over the samples of domain i, of the head's gradients of single samples, and
running variances :math:`m_i \leftarrow \rho\, m_i + (1 - \rho)\, v_i`, :math:`u_i = m_i / (1 - \rho)`,

.. math:: \frac1S \sum_i L_i + \gamma\,\frac1S \sum_i \overline{(u_i - \bar u)^2}

(the bar over the square: the mean over coordinates). For a linear head with inputs z and outputs o, and a loss L that
is a mean over B samples, a sample's gradient is :math:`\delta z^\mathsf T` with
:math:`\delta = B\,\partial L/\partial o`, so that

.. math:: v = \mathrm E[\delta^2 (z^2)^\mathsf T] - \mathrm E[\delta z^\mathsf T]^2

takes two matrix products, whatever the loss. Differences from the official code (and DomainBed's): there BackPACK takes
every sample's gradient, the domains go through the network as one batch (which matters to BatchNorm),
and the optimizer is made anew when the penalty begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.alignment import accumulate
from torch_gradmatch.gradients.backward import gradient_of
from torch_gradmatch.gradients.engine import with_zeros
from torch_gradmatch.gradients.replay import RandomState, devices_of
from torch_gradmatch.methods.base import COMMON_CHECKS
from torch_gradmatch.methods.direction import Direction, DirectionLoop, Evaluation
from torch_gradmatch.methods.once import OnceMethod, domain_keys
from torch_gradmatch.parallel.foreach import WIDE, squared_norm

__all__ = ["Fishr"]

Call = tuple[Tensor, Tensor]  # input and output of the head


def _check_head(value: object) -> nn.Linear:
    if not isinstance(value, nn.Linear):
        raise TypeError(
            f"head should be a torch.nn.Linear of the model (got {type(value).__name__}): per-sample gradients of "
            "other layers take more than two matrix products; IDGM(matched=...) matches the mean gradients of any layer"
        )
    return value


@dataclass(repr=False)
class Fishr(OnceMethod):
    r"""Match the variances over samples of the head's gradients, at the price of ordinary training.

    All parameters are trained. Every domain is evaluated once in a meta-iteration, with S graphs alive. Each domain has
    running variances, by name where the batches have names (a mapping, or :func:`~torch_gradmatch.meta_batches` from a
    sampler), else by position; then every meta-step needs the same number of batches. They are in the optimizer's
    state dict.

    ``loss_fn`` has to be a mean over the samples of a batch (cross-entropy, squared error, label smoothing). The first
    meta-iteration evaluates a batch together with a copy of itself, and refuses a loss that grows. ``loss_fn`` calls
    the head once, with a matrix (samples, features).

    Attributes:
        model: The model.
        head: Its last layer, a ``torch.nn.Linear``; ``fully_shard`` may have sharded it.
        gamma: :math:`\gamma \ge 0`, DomainBed's lambda (1000 there); 0 is ordinary training. None to find it by
            ``strength`` at meta-iteration number ``start``.
        strength: Length of the penalty's gradient over that of the mean gradient, at that meta-iteration.
        ema: :math:`\rho \in [0, 1)`, the decay of the running variances, from the first meta-iteration on.
        start: Number of the first meta-iteration with the penalty, from 0.
        nonfinite: As for :class:`~torch_gradmatch.ERM`.
        process_group: As for :class:`~torch_gradmatch.ERM`; the statistics are those of the whole batches.

    Raises:
        TypeError: If ``head`` is no linear layer.
        ValueError: If a setting is out of range; the message names it and shows the value.
    """

    model: nn.Module
    head: nn.Linear
    gamma: float | None = None
    strength: float = 0.1
    ema: float = 0.95
    start: int = 0
    nonfinite: Literal["raise", "ignore"] = "raise"
    process_group: ProcessGroup | None = None

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {
        "model": partial(checks.check_model, "model"),
        "head": _check_head,
        "gamma": checks.optional(partial(checks.check_number, "gamma", at_least=0)),
        "strength": partial(checks.check_number, "strength", above=0),
        "ema": partial(checks.check_number, "ema", at_least=0, below=1),
        "start": partial(checks.check_int, "start", at_least=0),
    }
    keeps: ClassVar[str] = "the running variances begin anew, and so does the search for gamma"

    def check(self, loop: DirectionLoop) -> None:
        """Raise if the model does not hold the head or the parameters. See ``DirectionMethod.check``."""
        if not any(module is self.head for module in self.model.modules()):
            raise ValueError(
                f"head should be a module of {type(self.model).__name__}, which does not hold it: is it another "
                "model's, or a copy?"
            )
        if set(loop.parameters()).isdisjoint(self.model.parameters()):
            raise ValueError(f"model should hold the parameters that are trained: {type(self.model).__name__} has none")

    def direction(self, given: Evaluation) -> Direction:
        """Work out the gradient of the objective. See ``DirectionMethod.direction``."""
        gamma = self.gamma
        if gamma is None and given.memory.get("strength") == self.strength:
            gamma = given.memory.get("gamma")
        is_on = given.number >= self.start and gamma != 0
        size = len(given.batches)
        self._expect(given, size, finds=is_on and gamma is None)
        graphs: list[Tensor] = []
        moments: list[Tensor] = []  # E[delta^2 z^2] and E[delta z] of each domain, shape (2, n)
        with self._recording() as calls:

            def take(index: int, loss: Tensor) -> None:
                moments.append(self._moments(given, index, loss, calls, with_graph=is_on))
                graphs.append(loss)

            if given.checks and "is mean" not in given.kept:
                self._check_mean(given, calls)  # before there are graphs, which need the buffers as they are then
            losses = self.losses(given, take)
        whole = torch.stack([m.detach() for m in moments])
        if given.sharing is not None:
            given.sharing.reduce_([whole], "data", "joined")
        means = whole[:, 1]
        cotangents, penalty = self._cotangents(given, whole[:, 0] - means.square())
        mean_loss = torch.stack([loss / size for loss in graphs]).sum()
        terms = [(c * (m[0] - 2 * mean * m[1])).sum() for c, m, mean in zip(cotangents, moments, means, strict=True)]
        term = torch.stack(terms).sum().to(mean_loss) * given.scale
        total: list[Tensor | None] = []
        is_found = is_on and gamma is None
        if gamma is None and is_on:
            gamma = self._find(given, mean_loss, term, total)
        else:
            objective = mean_loss + gamma * term if gamma is not None and is_on else mean_loss
            accumulate(total, gradient_of(objective, given.parameters))
        used = gamma if is_on and gamma is not None else 0.0
        value = losses.mean() / given.scale + used * penalty.to(losses)
        return self.close(given, losses, total, value, gamma=used, is_reduced=is_found)

    def _expect(self, given: Evaluation, size: int, *, finds: bool) -> None:
        """Say what is to be reduced: moments of all domains; and the direction, in two parts to find gamma."""
        coordinates = self.head.weight.numel() + (0 if self.head.bias is None else self.head.bias.numel())
        like = given.parameters[0]
        dtype = WIDE.get(like.dtype, like.dtype)
        wide = [(p, WIDE.get(p.dtype, p.dtype)) for p in given.parameters]
        self.expect(given, [(like.new_zeros(size, 2, coordinates), dtype)], *[wide] * finds)

    @contextmanager
    def _recording(self) -> Iterator[list[Call]]:
        """Note inputs and outputs of the head."""
        calls: list[Call] = []

        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            calls.append((inputs[0] if inputs else named["input"], output))

        hook = self.head.register_forward_hook(note, with_kwargs=True)
        try:
            yield calls
        finally:
            hook.remove()

    def _moments(self, given: Evaluation, index: int, loss: Tensor, calls: list[Call], *, with_graph: bool) -> Tensor:
        """Return the two moments of the head's per-sample gradients, shape (2, n)."""
        name = checks.name_of(index)
        if len(calls) != 1:
            raise ValueError(
                f"the head was called {len(calls)} times for {name}, and Fishr needs one forward pass through it: does "
                "loss_fn call the model, uncompiled from the head on?"
            )
        z, o = calls.pop()
        if z.dim() != 2:
            raise ValueError(
                f"the head's input has shape {tuple(z.shape)} for {name}, and Fishr needs a matrix (samples, "
                "features): with a sequence a sample's gradient is a sum, which takes more than two matrix products"
            )
        delta = None
        if o.requires_grad:
            (delta,) = torch.autograd.grad(loss, o, retain_graph=True, create_graph=with_graph, allow_unused=True)
        if delta is None:
            raise ValueError(
                f"the loss of {name} does not depend on the head's output: is it detached, or checkpointed?"
            )
        size, wide = len(z), WIDE.get(z.dtype, z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            delta, z = delta.to(wide) * (size / given.scale), z.to(wide)
            second, first = delta.square().T @ z.square() / size, delta.T @ z / size
            parts = [second.flatten(), first.flatten()]
            if self.head.bias is not None:
                of_bias = delta.square().mean(0), delta.mean(0)
                parts = [torch.cat(pair) for pair in zip(parts, of_bias, strict=True)]
            return torch.stack(parts)

    def _cotangents(self, given: Evaluation, variances: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the penalty's derivative by each :math:`v_i`, shape (S, n), and the penalty; go on averaging."""
        keys = [f"variance of {key}" for key in domain_keys(given)]
        if given.checks:  # a line search evaluates again from the same running variances
            given.kept["before"] = {key: given.memory.get(key) for key in keys}
        before = [given.kept["before"].get(key) for key in keys]
        past = torch.stack(
            [torch.zeros_like(v) if m is None else m.to(v) for m, v in zip(before, variances, strict=True)]
        )
        latest = self.ema * past + (1 - self.ema) * variances
        if given.checks and (given.scale == 1.0 or bool(torch.isfinite(latest).all())):
            given.memory.update(zip(keys, latest.clone(), strict=True))
        deviations = latest / (1 - self.ema)
        deviations = deviations - deviations.mean(0)
        return 2 * deviations / deviations.numel(), deviations.square().mean()

    def _find(self, given: Evaluation, loss: Tensor, term: Tensor, total: list[Tensor | None]) -> float:
        """Put the direction together from both parts, and find gamma on the way: 0 if none does."""
        try:
            accumulate(total, gradient_of(loss, given.parameters, retain_graph=True))
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise RuntimeError(
                    "gamma cannot be found through compiled code, whose graph can be traversed once: pass gamma=, or "
                    "set torch._functorch.config.donated_buffer = False before it is compiled"
                ) from error
            raise
        of_term: list[Tensor | None] = []
        accumulate(of_term, gradient_of(term, given.parameters))
        for part in (total, of_term) if given.sharing is not None else ():
            given.sharing.reduce_direction_(with_zeros(part, given.parameters), given.parameters)  # type: ignore[union-attr]
        lengths = [squared_norm([t for t in part if t is not None]).sqrt() for part in (total, of_term)]
        mean, other = torch.stack([length.to(lengths[0]) for length in lengths]).tolist()
        if not (math.isfinite(mean) and math.isfinite(other) and other > 0):
            return 0.0
        gamma: float = self.strength * mean / other
        if not math.isfinite(gamma):
            return 0.0
        accumulate(total, of_term, gamma)
        given.memory.update(gamma=gamma, strength=self.strength)
        return gamma

    def _check_mean(self, given: Evaluation, calls: list[Call]) -> None:
        """Raise if the loss of the same samples twice is larger than that of once: then it is a sum."""
        if given.sharing is not None and given.sharing.in_step:
            return  # no rank may evaluate anything by itself
        batch = given.batches[0]
        state, buffers = RandomState.capture(devices_of(given.parameters, batch)), given.places and given.places.save()
        try:
            with checks.evaluating(0):
                once = given.of_batch(batch).item() / given.scale
            size = len(calls[0][0]) if calls else 0
            state.restore()
            twice = _of_samples_twice(given, batch, size)
        finally:
            calls.clear()
            state.restore()
            if given.places is not None and buffers:
                given.places.restore(buffers)
        if twice is not None and abs(twice - 2 * once) < abs(twice - once):
            raise ValueError(
                f"loss_fn should return the mean over the samples of a batch, and it is {once:.4g} for "
                f"{checks.name_of(0)} and {twice:.4g} for the same samples twice: use reduction='mean'"
            )
        given.kept["is mean"] = True


def _of_samples_twice(given: Evaluation, batch: Any, size: int) -> float | None:
    """Return the loss of a batch together with its copy; None where samples cannot be put together like this."""

    def double(leaf: Any) -> Any:
        is_samples = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
        return torch.cat([leaf, leaf]) if is_samples else leaf

    try:
        return given.of_batch(tree_map(double, batch)).item() / given.scale
    except Exception:  # noqa: BLE001  whatever it is that loss_fn cannot do with it
        return None
