"""Slow, obvious oracles. Imports nothing of the package.

Shi et al., Gradient Matching for Domain Generalization, ICLR 2022, arXiv 2104.09937.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class ReferenceFish:
    """Algorithm 1 as it is written: clone the model, walk with an inner optimizer, interpolate, throw the clone away.

    ``model`` holds theta and ``inner_model`` theta~ while an inner loop is open: from the first step, with all forward
    passes since the last ``zero_grad()`` before it.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        meta_lr: float,
        inner_state: str = "carry",
        buffers: str = "interpolate",
        meta_dtype: torch.dtype | None = None,
    ) -> None:
        self.meta_dtype = meta_dtype
        self.wide: dict[str, Tensor] = {}  # theta in that dtype, where it is not just the model's
        self.model = model
        self.build_optimizer = build_optimizer
        self.meta_lr = meta_lr
        self.inner_state = inner_state
        self.buffers = buffers
        self.inner_model: nn.Module | None = None
        self.inner_optimizer: torch.optim.Optimizer | None = None
        self.previous_optimizer: torch.optim.Optimizer | None = None
        self.steps_taken = 0  # in this inner loop

    def begin(self) -> None:
        """theta~ <- theta, with a new inner optimizer that may get the previous one's state."""
        self.inner_model = copy.deepcopy(self.model)
        self.inner_optimizer = self.build_optimizer(self.inner_model)
        if self.inner_state == "carry" and self.previous_optimizer is not None:
            # Entry by entry: Optimizer.load_state_dict would cast counters kept in single precision (NAdam, ASGD).
            old, new = (
                [p for group in optimizer.param_groups for p in group["params"]]
                for optimizer in (self.previous_optimizer, self.inner_optimizer)
            )
            for old_parameter, new_parameter in zip(old, new, strict=False):
                if old_parameter in self.previous_optimizer.state:
                    state = copy.deepcopy(self.previous_optimizer.state[old_parameter])
                    self.inner_optimizer.state[new_parameter] = state

    def step(self, loss_fn: Callable[[nn.Module], Tensor]) -> Tensor:
        """theta~ <- inner optimizer step on one domain's loss."""
        if self.inner_model is None:
            self.begin()
        model, optimizer = self.inner_model, self.inner_optimizer
        assert model is not None
        assert optimizer is not None

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model)
            loss.backward()
            return loss

        self.steps_taken += 1
        if isinstance(optimizer, torch.optim.LBFGS):
            return optimizer.step(closure)
        loss = closure()
        optimizer.step()
        return loss

    def attempt(self, loss_fn: Callable[[nn.Module], Tensor], *, counts: bool) -> None:
        """A step that moves nothing: it failed, or its gradients overflowed and it counts. The forward pass ran."""
        if self.inner_model is None:
            self.begin()
        assert self.inner_model is not None
        loss_fn(self.inner_model)
        self.steps_taken += counts

    def interpolate(self) -> None:
        """theta <- theta + eps (theta~ - theta)."""
        assert self.inner_model is not None
        inner = dict(self.inner_model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    self.move(name, parameter, inner[name])
            inner_buffers = dict(self.inner_model.named_buffers())
            for name, buffer in self.model.named_buffers():
                if self.buffers == "interpolate" and buffer.is_floating_point():
                    self.move(name, buffer, inner_buffers[name])
                else:
                    buffer.copy_(inner_buffers[name])
        self.end()

    def move(self, name: str, slow: Tensor, fast: Tensor) -> None:
        """Move one tensor, in the wider dtype: its digits count where they still round to the tensor."""
        wide = slow.to(self.meta_dtype or slow.dtype)
        if name in self.wide:
            wide = torch.where(self.wide[name].to(slow.dtype) == slow, self.wide[name], wide)
        self.wide[name] = wide + self.meta_lr * (fast - wide)
        slow.copy_(self.wide[name])

    def end(self) -> None:
        """Forget theta~; also how an inner loop is abandoned."""
        self.previous_optimizer = self.inner_optimizer or self.previous_optimizer
        self.inner_model = self.inner_optimizer = None
        self.steps_taken = 0

    @property
    def current_model(self) -> nn.Module:
        """What the user's model should hold now."""
        return self.model if self.inner_model is None else self.inner_model

    @property
    def optimizer_state(self) -> dict[str, Any]:
        """What the user's wrapped optimizer should hold now: its last state stays until the next inner step."""
        optimizer = self.inner_optimizer or self.previous_optimizer
        return {} if optimizer is None else optimizer.state_dict()["state"]


def mean_pairwise_inner_product(gradients: list[Tensor]) -> Tensor:
    """1/(S(S-1)) sum over i != j of G_i . G_j, pair by pair."""
    domains = len(gradients)
    pairs = [gradients[i] @ gradients[j] for i in range(domains) for j in range(domains) if i != j]
    return torch.stack(pairs).sum() / (domains * (domains - 1))


def mean_pairwise_cosine(gradients: list[Tensor]) -> Tensor:
    """The same with every gradient divided by its norm; a zero gradient is orthogonal to all."""
    return mean_pairwise_inner_product([g / g.norm() if g.norm() > 0 else g for g in gradients])


def pairwise_cosines(gradients: list[Tensor]) -> Tensor:
    """The cosine of each pair, one by one; a zero gradient has none with any, not even with itself."""
    units = [g / g.norm() if g.norm() > 0 else g for g in gradients]
    return torch.stack([torch.stack([one @ other for other in units]) for one in units])


def with_rest(gradients: list[Tensor]) -> Tensor:
    """The cosine of each gradient with the sum of the others; 0 if one of the two is zero."""
    rests = [sum(gradients[:i] + gradients[i + 1 :], torch.zeros_like(g)) for i, g in enumerate(gradients)]
    cosines = [torch.cosine_similarity(g, r, dim=0, eps=0) for g, r in zip(gradients, rests, strict=True)]
    return torch.stack(cosines).nan_to_num()


def agreement_of(name: str, gradients: list[Tensor]) -> Tensor:
    """The three agreements as they are written, on flat gradients."""
    if name == "inner_product":
        return mean_pairwise_inner_product(gradients)
    if name == "cosine":
        return mean_pairwise_cosine(gradients)
    mean = torch.stack(gradients).mean(dim=0)
    return -torch.stack([(g - mean).square().sum() for g in gradients]).mean()


def naive_idgm(
    parameters: list[Tensor],
    losses: list[Callable[[], Tensor]],
    gamma: float,
    agreement: str | Callable[[list[Tensor]], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """1/S sum L_i - gamma phi and its gradient by plain autograd, every graph kept. Losses are called in order."""
    values, gradients = [], []
    for loss in losses:
        value = loss()
        parts = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        values.append(value)
        gradients.append(torch.cat([g.reshape(-1) for g in parts]))
    phi = agreement(gradients) if callable(agreement) else agreement_of(agreement, gradients)
    objective = torch.stack(values).mean() - gamma * phi
    gradient = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
    return objective.detach(), list(gradient)


def smooth_fish_gradient(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batches: list[Any],
    gamma: float,
    inner_lr: float,
    *,
    symmetric: bool = False,
    walker: nn.Module | None = None,
) -> list[Tensor | None]:
    """Gbar + gamma (Gtilde - Gbar), Gtilde the mean of the gradients along a walk by SGD on a copy of the model.

    Symmetric: Gbar + 2 gamma / (alpha (S - 1)) (F + R - 2 Gbar), F and R those of the walk and of its reverse; each
    domain then begins with the buffers that it began with at first. On a walk it draws the random numbers that it drew
    at first. The model's buffers move once for each domain; at gamma 1 the walk is all there is, so they are its.
    """
    walker = copy.deepcopy(model) if walker is None else walker
    start = copy.deepcopy(walker.state_dict())
    parameters, walking = ([p for p in network.parameters() if p.requires_grad] for network in (model, walker))

    def gradient(network: nn.Module, wanted: list[Tensor], batch: Any) -> list[Tensor | None]:
        found = torch.autograd.grad(loss_of(network, batch), wanted, allow_unused=True)
        return [None if g is None else g.to_dense() for g in found]

    here, along, randoms, buffers = [], [], [], []
    for batch in batches:
        randoms.append(random_states())
        buffers.append(copy.deepcopy(list(model.buffers())))
        here.append(gradient(model, parameters, batch))
    after = random_states()
    forth = list(range(len(batches)))
    for order in (forth, forth[::-1]) if symmetric else (forth,):
        walker.load_state_dict(start)
        for index in order:
            set_random_states(randoms[index])
            if symmetric:
                for buffer, value in zip(walker.buffers(), buffers[index], strict=True):
                    buffer.copy_(value)
            along.append(gradient(walker, walking, batches[index]))
            with torch.no_grad():
                for p, g in zip(walking, along[-1], strict=True):
                    if g is not None:
                        p -= inner_lr * g
    set_random_states(after)
    if symmetric:
        gamma = gamma / (inner_lr * (len(batches) - 1) / 4)
    elif gamma == 1:
        for buffer, walked in zip(model.buffers(), walker.buffers(), strict=True):
            buffer.copy_(walked)
    found: list[Tensor | None] = []
    for i in range(len(parameters)):
        if all(g[i] is None for g in here):
            found.append(None)
            continue
        mean, smooth = (sum(0 if g[i] is None else g[i] for g in gs) / len(gs) for gs in (here, along))
        found.append(mean + gamma * (smooth - mean))
    return found


def random_states() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def set_random_states(states: Any) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
