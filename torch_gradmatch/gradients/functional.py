r"""The exact objective of inter-domain gradient matching (IDGM) and its gradient, as pure functions.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, equation 4:

.. math::

    L_\mathrm{idgm}(\theta) = \frac1S \sum_i L_i(\theta) - \gamma\,\phi(G_1, \ldots, G_S),
    \qquad G_i = \frac{\partial L_i}{\partial\theta}.

Any agreement :math:`\phi` has the gradient :math:`\sum_i H_i v_i` with cotangents :math:`v_i = \partial\phi/\partial
G_i` and :math:`H_i` the Hessian of :math:`L_i`. :func:`idgm_loss` is the scalar itself, which composes with
``torch.func.grad``, ``jvp`` and ``vmap`` and holds the graphs of all domains. :func:`idgm_grad` is the engine for
training: a first pass for the gradients and the cotangents, a second one with a Hessian-vector product for each domain,
and one domain's graph alive at a time.

A loss function is ``loss_fn(params, batch)``, returning a scalar. One with buffers (BatchNorm's statistics, say) is
``loss_fn(params, buffers, batch)``, returning the scalar and the new buffers: pass ``buffers``, and they go from one
domain to the next. :func:`functional_loss` makes the latter of a module and a training loop's loss function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.profiler import record_function
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from torch_gradmatch._checks import (
    check_bool,
    check_int,
    check_loss,
    check_num_domains,
    check_number,
    check_reached,
    evaluating,
)
from torch_gradmatch.gradients.agreement import (
    AGREEMENTS,
    Agreement,
    RunningAgreement,
    check_agreement,
    cosine,
    running_agreement,
)
from torch_gradmatch.gradients.agreement import inner_product as gradient_inner_product
from torch_gradmatch.gradients.alignment import Alignment, GradientAlignment
from torch_gradmatch.gradients.backward import check_backward
from torch_gradmatch.gradients.flat import Vector, WeightedSum
from torch_gradmatch.gradients.hvp import (
    Check,
    Linearization,
    check_hvp,
    differentiable_attention,
    first_order,
    linearize,
    sum_of_products,
)
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.gradients.random_state import RandomState, devices_of
from torch_gradmatch.gradients.repeats import check_repeats, precision
from torch_gradmatch.parallel.foreach import clone_all, detach_all, in_transform, is_sharded, local_of
from torch_gradmatch.parallel.ranks import Ranks
from torch_gradmatch.parallel.shards import groups_of, sharded_like

__all__ = [
    "DomainGradients",
    "IDGMGradient",
    "domain_gradients",
    "functional_loss",
    "gradient_inner_product",
    "idgm_grad",
    "idgm_loss",
]

Params = Any  # tensors, or dictionaries, lists or tuples of tensors
Buffers = dict[str, Tensor]
PureLoss = Callable[[Params, Any, Any], tuple[Tensor, Any]]


class DomainGradients(NamedTuple):
    """The gradients of S domains.

    Attributes:
        gradients: For each domain the gradient of its loss, in the structure of the parameters.
        losses: Shape (S,).
        buffers: As the last domain left them, or None.
    """

    gradients: list[Params]
    losses: Tensor
    buffers: Any


class IDGMGradient(NamedTuple):
    """What :func:`idgm_grad` found. Detached.

    Attributes:
        gradient: Of the objective, in the structure of the parameters.
        reached: In the same structure, whether any domain's loss depends on the parameter; where none does the gradient
            is zero.
        losses: Loss of each domain, shape (S,).
        agreement: Value of phi, shape ().
        alignment: Inner product and norms of the domains' gradients, whatever phi is; the cosine where it was asked
            for or is phi.
        buffers: As the last domain left them, or None.
        losses_again: What was found where a loss was evaluated once more at the same parameters, by number of the
            domain, each of shape ().
        tolerance: By how much of the mean loss these may differ from the losses and count as rounding.
        gamma: As given, or as found; None where none could be found.
    """

    gradient: Params
    reached: Any
    losses: Tensor
    agreement: Tensor
    alignment: Alignment
    buffers: Any
    losses_again: dict[int, Tensor]
    tolerance: float
    gamma: float | None


class _Closure(nn.Module):
    """A loss function around a model, as a module: what ``functional_call`` can put other parameters into."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = (loss_fn,)  # not registered, if it is a module itself

    def forward(self, batch: Any) -> Tensor:
        return self._loss_fn[0](batch)


def functional_loss(
    model: nn.Module, loss_fn: Callable[[Any], Tensor]
) -> Callable[[dict[str, Tensor], Buffers, Any], tuple[Tensor, Buffers]]:
    """Turn a loss function that calls a model as usual into a pure function of parameters and buffers.

    While it runs, the model holds the tensors passed; afterwards its own again. Tied weights stay tied. What is not
    passed is used as the model has it.

    Args:
        model: The model that ``loss_fn`` calls.
        loss_fn: ``loss_fn(batch)`` returns a scalar.

    Returns:
        ``pure(params, buffers, batch)``, returning the loss and the new buffers; both dictionaries have the names of
        ``model.named_parameters()`` and ``model.named_buffers()``. The buffers passed are not written to.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> pure = functional_loss(model, lambda x: model(x).sum())
        >>> loss, buffers = pure({"weight": torch.tensor([[1.0, 2.0]])}, {}, torch.tensor([[3.0, 4.0]]))
        >>> loss, buffers
        (tensor(11.), {})
    """
    closure, own = _Closure(model, loss_fn), dict(model.named_parameters())

    def pure(params: dict[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Buffers]:
        held = {f"model.{name}": tensor for name, tensor in params.items() if own.get(name) is not tensor}
        copies = zip(buffers, clone_all(list(buffers.values())), strict=True)
        held |= {f"model.{name}": copy for name, copy in copies}
        loss = functional_call(closure, held, (batch,)) if held else loss_fn(batch)
        # functional_call leaves in the dictionary what a module put in a buffer's place.
        after = detach_all([held[f"model.{name}"] for name in buffers])
        return loss, dict(zip(buffers, after, strict=True))

    return pure


def _with_buffers(loss_fn: Callable[..., Any], buffers: Any) -> PureLoss:
    """Give a loss function without buffers the form of one with them."""
    if buffers is not None:
        return loss_fn
    return lambda params, none, batch: (loss_fn(params, batch), none)


def domain_gradients(
    loss_fn: Callable[..., Any], params: Params, batches: Iterable[Any], *, buffers: Any = None
) -> DomainGradients:
    """Return the gradient of each domain's loss, by ``torch.func``: itself differentiable by the parameters.

    Args:
        loss_fn: As described above.
        params: Where to differentiate.
        batches: One of each domain.
        buffers: The first domain's, for a loss function that takes them.

    Returns:
        Gradients, losses and the last buffers.

    Raises:
        ValueError: If there are no batches.

    Example:
        >>> import torch
        >>> found = domain_gradients(lambda w, target: (w - target).square(), torch.tensor(1.0), [2.0, 4.0])
        >>> found.gradients, found.losses
        ([tensor(-2.), tensor(-6.)], tensor([1., 9.]))
    """
    pure = _with_buffers(loss_fn, buffers)
    gradients, losses = [], []
    state = buffers or {}
    for batch in batches:
        differentiated = grad_and_value(lambda p, b, batch=batch: pure(p, b, batch), has_aux=True)
        gradient, (loss, state) = differentiated(params, state)
        gradients.append(gradient)
        losses.append(loss)
    if not losses:
        raise ValueError("batches is empty: one batch of each domain is needed")
    return DomainGradients(gradients, torch.stack(losses), None if buffers is None else state)


def idgm_loss(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    gamma: float | Tensor,
    agreement: str | Agreement = "inner_product",
    *,
    buffers: Any = None,
) -> Any:
    r"""Return :math:`\frac1S\sum_i L_i - \gamma\,\phi(G_1,\ldots,G_S)`, differentiable.

    Composes with ``torch.func.grad``, ``jvp`` and ``vmap``, and with plain autograd. Differentiating it holds the graph
    of every domain; :func:`idgm_grad` does not.

    Args:
        loss_fn: As described above.
        params: Where to evaluate.
        batches: One of each of S >= 2 domains.
        gamma: Strength of the matching.
        agreement: ``"inner_product"``, ``"variance"``, ``"cosine"``, or a function that takes the list of the domains'
            gradients, each in the structure of ``params``, and returns a scalar.
        buffers: The first domain's, for a loss function that takes them.

    Returns:
        The objective, shape (); with ``buffers``, the objective and the last buffers.

    Raises:
        ValueError: If there are fewer than two batches, or ``agreement`` is unknown.

    Example:
        >>> import torch
        >>> def loss(w, target):
        ...     return (w - target).square()
        >>> idgm_loss(loss, torch.tensor(1.0), [2.0, 4.0], gamma=0.1)  # (1 + 9)/2 - 0.1 (-2)(-6)
        tensor(3.8000)
        >>> torch.func.grad(lambda w: idgm_loss(loss, w, [2.0, 4.0], gamma=0.1))(torch.tensor(1.0))
        tensor(-2.4000)
    """
    batches = list(batches)
    check_num_domains(len(batches))
    phi = check_agreement(agreement)
    with differentiable_attention("reverse"):
        found = domain_gradients(loss_fn, params, batches, buffers=buffers)
        objective = found.losses.mean() - gamma * phi(found.gradients)
    return objective if buffers is None else (objective, found.buffers)


# ---------------------------------------------------------------------------------------------------- the two passes


class _Domain:
    """One domain's loss as a function of the leaves; every evaluation sees the same buffers and random numbers."""

    def __init__(self, pure: PureLoss, structure: Any, batch: Any, index: int, devices: set[torch.device]) -> None:
        self._pure = pure
        self._structure = structure
        self._batch = batch
        self._index = index
        self._devices = devices | devices_of(batch)
        self._random: RandomState | None = None
        self._is_next = True
        self._evaluated = False
        self.replays = True  # whether it will be evaluated more than once
        self.buffers: Any = None
        self.buffers_after: Any = None

    def enter(self, buffers: Any) -> None:
        """Set the buffers that the domain begins with; the next evaluation sets those that it leaves."""
        self.buffers, self.buffers_after = buffers, None
        self._is_next = True

    def release(self) -> None:
        """Hold no buffers any more."""
        self.buffers = self.buffers_after = None

    def __call__(self, leaves: list[Tensor]) -> Tensor:
        if self._random is not None:
            self._random.restore()
        elif self.replays:
            self._random = RandomState.capture(self._devices)
        with evaluating(self._index, again=self._evaluated):
            loss, buffers = self._pure(tree_unflatten(leaves, self._structure), self.buffers, self._batch)
        self._evaluated = True
        if self._is_next:  # a plain evaluation at the parameters, not one inside a transform or displaced
            self.buffers_after, self._is_next = buffers, False
            return check_loss(loss, self._index)
        return loss.reshape(())


def idgm_grad(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    gamma: float | None,
    agreement: str | Agreement = "inner_product",
    *,
    strength: float = 0.1,
    hvp: str = "reverse",
    hvp_domains: int | None = None,
    keep_graphs: bool = False,
    buffers: Any = None,
    generator: torch.Generator | None = None,
    cosines: bool = False,
    sums: GradientAlignment | None = None,
    check: bool = True,
    compare: bool = False,
    over: Alone | None = None,
) -> IDGMGradient:
    r"""Return the gradient of :func:`idgm_loss` by two passes: :math:`\bar G - \gamma\sum_i H_i v_i`.

    The first pass takes the gradients :math:`G_i` and, from them alone, the cotangents :math:`v_i`; the second one
    Hessian-vector product for each domain. Of the named agreements only sums over the domains are kept, so the memory
    does not grow with S; a function of the gradients holds all S of them. Random numbers (dropout) and buffers are the
    same in both passes, and afterwards as one pass leaves them.

    First derivatives are taken by ``backward()`` into ``.grad``, so that hooks and reentrant checkpointing work; only a
    gradient that is differentiated again goes by ``torch.autograd.grad``. The ``.grad`` of ``params`` is afterwards
    what it was; other parameters that require a gradient and take part in a loss accumulate it.

    Gamma has the units of 1/loss (with the cosine, of the loss) and depends on the width of the network: .1 of the
    gradient's length is gamma 3e-4 on one pretrained network and 2e-3 to 1e-1 on small ones. A strength has no units,
    :math:`|\gamma \sum_i H_i v_i| = \mathtt{strength} \cdot |\bar G|`.

    Args:
        loss_fn: As described above.
        params: Where to differentiate.
        batches: One of each of S >= 2 domains.
        gamma: Strength of the matching, at least 0; at 0 there is no second pass. None to find it here by
            ``strength``, from the length of both parts over all parameters; that waits for an accelerator once. If one
            of them is zero, none is found and the gradient is :math:`\bar G`.
        agreement: As in :func:`idgm_loss`.
        strength: How long the matching part is to be, as a multiple of the mean gradient; for ``gamma=None``.
        hvp: ``"reverse"``, ``"forward"`` or ``"finite_difference"``; see :mod:`torch_gradmatch.gradients.hvp`. The
            last moves the parameters for the time of an evaluation.
        hvp_domains: In the second pass take only this many domains, drawn at random, and weigh them by
            S/``hvp_domains``: unbiased. None for all.
        keep_graphs: Keep the graph of each domain's gradient from the first pass (with the two hvps that have none,
            the gradient), instead of evaluating it again: less time, memory that grows with S.
        buffers: The first domain's, for a loss function that takes them.
        generator: Draws the domains for ``hvp_domains``; torch's own if None.
        cosines: Whether to measure the mean cosine, too, whatever phi is, and each gradient's with the sum of the
            others: exact for the domains of the second pass, at one pass more over each gradient; NaN for the rest.
        sums: Running sums to use, so that their layout is made once for many calls. They are reset and afterwards
            released. None for new ones; else they are with cosines where these are needed.
        check: Whether to refuse a loss that is not the same in both passes; waits for an accelerator once. Without it
            the result says what they were.
        compare: Whether to compare the first gradient that is differentiated again with one by ``backward()`` of the
            same evaluation, and to refuse what differs; waits for an accelerator.
        over: How other processes share the evaluations; ``batches`` are then this rank's.

    Returns:
        The gradient, in the parameters' dtypes, and what was measured on the way.

    Raises:
        RuntimeError: If an operation lacks the derivative that ``hvp`` needs.
        TypeError: If a loss or the agreement's value is no tensor.
        ValueError: If there are fewer than two batches, a loss is not a scalar, depends on no parameter or is another
            one when it is evaluated again, a gradient is another one by ``backward()``, or another argument is out of
            range.

    Example:
        >>> import torch
        >>> def loss(w, target):
        ...     return (w - target).square()
        >>> found = idgm_grad(loss, torch.tensor(1.0), [2.0, 4.0], gamma=0.1)
        >>> found.gradient, found.agreement
        (tensor(-2.4000), tensor(12.))
        >>> found = idgm_grad(loss, torch.tensor(1.0), [2.0, 4.0], gamma=None, strength=0.1)  # -4 - gamma (-16)
        >>> found.gradient, found.gamma
        (tensor(-3.6000), 0.025)
    """
    batches = list(batches)
    flat, structure = tree_flatten(params)
    if over is None:
        over = Alone(Ranks(groups_of(flat), next((p.device for p in flat), torch.device("cpu"))))
    domains = check_num_domains(over.domains(len(batches)))
    gamma = None if gamma is None else check_number("gamma", gamma, at_least=0)
    strength = check_number("strength", strength, above=0)
    check_hvp(hvp, flat)
    number = domains if hvp_domains is None else _check_hvp_domains(hvp_domains, domains)
    chosen = list(range(len(batches)))
    if number < domains:
        chosen = over.chosen(sorted(torch.randperm(domains, generator=generator)[:number].tolist()))
    if gamma == 0:
        chosen = []
    # A model's own parameters stay themselves: a loss may use them past the model, as a penalty on a list of them does.
    leaves = [leaf if leaf.is_leaf and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in flat]
    if sums is None:
        sums = GradientAlignment(cosines=check_bool("cosines", cosines) or check_agreement(agreement) is cosine)
    elif cosines and not sums.cosines:
        raise ValueError(
            "cosines=True needs running sums with cosines: pass GradientAlignment() (got "
            "GradientAlignment(cosines=False))"
        )
    sums.reset()
    sharded = any(map(is_sharded, leaves))
    if sharded and check_agreement(agreement) not in AGREEMENTS.values():
        raise ValueError(
            f"agreement should be one of {sorted(AGREEMENTS)} where parameters are sharded (got a function): no rank "
            "holds a whole gradient to hand to it"
        )
    if sharded or over.reduces:
        sums.reserve(leaves)
    phi = running_agreement(agreement, sums, domains, params)
    agrees = None
    if check_bool("compare", compare) and not in_transform():
        agrees = partial(check_backward, names=_names(params))
    passes = _TwoPasses(_with_buffers(loss_fn, buffers), leaves, structure, batches, buffers or {}, hvp, over, agrees)
    try:
        with differentiable_attention(hvp) if chosen else nullcontext():
            losses, buffers_after = passes.first(phi, sums, chosen, keep_graphs=keep_graphs)
            losses = over.merge(phi, sums, losses)
            value, measured = phi.value(), sums.result()
            compares, with_rest = cosines and not sums.pairs, dict[int, Tensor]()
            if not chosen:
                direction = sums.mean()
            elif gamma is None:
                direction, matching = sums.mean(), sums.mean(0.0)  # the gradients of all ranks are in the sums
                with_rest = passes.second(phi, sums, chosen, matching, domains / number, compares=compares)
                over.finish_products(matching)
                # Equal gradients have no spread to be lowered, and what is there is rounding.
                squares = measured.grad_norms.square().mean() if agreement in ("variance", "cosine") else None
                gamma = _add_matching(direction, matching, strength, squares, over)
            else:
                direction = sums.mean(over.mean_weight)
                with_rest = passes.second(phi, sums, chosen, direction, -gamma * domains / number, compares=compares)
                over.finish_products(direction)
            if not sums.pairs:
                by_domain = (over.by_domain(with_rest, losses),) if compares else None
                measured = replace(measured, _with_rest=by_domain)
            gradient = direction.tensors([local_of(leaf) for leaf in leaves])
    finally:
        sums.reset(release=True)
    losses, losses_again = over.losses(losses, passes.losses_again)
    # Differences of gradients magnify a change of the loss by one over their step.
    epsilon = precision([losses, *leaves])
    tolerance = 64 * epsilon if hvp == "finite_difference" else math.sqrt(epsilon)
    if check and losses_again and not in_transform():
        again = torch.stack([loss.to(losses.device, losses.dtype) for loss in losses_again.values()])
        values = torch.cat([losses, again]).tolist()
        check_repeats(values[:domains], dict(zip(losses_again, values[domains:], strict=True)), tolerance)
    return IDGMGradient(
        gradient=tree_unflatten(
            [
                torch.zeros_like(leaf) if g is None else sharded_like(g, leaf)
                for g, leaf in zip(gradient, flat, strict=True)
            ],
            structure,
        ),
        reached=tree_unflatten([g is not None for g in gradient], structure),
        losses=losses,
        agreement=value,
        alignment=measured,
        buffers=None if buffers is None else over.buffers(buffers_after),
        losses_again=losses_again,
        tolerance=tolerance,
        gamma=gamma,
    )


def _check_hvp_domains(value: object, domains: int) -> int:
    """Return ``value`` as an ``int`` if so many domains can be drawn."""
    number = check_int("hvp_domains", value, at_least=1)
    if number > domains:
        raise ValueError(f"hvp_domains should be at most the number of domains, {domains} (got {number})")
    return number


def _names(params: Params) -> list[str]:
    """Return each parameter's key, or its number in a list; the keys of nested structures joined by a slash."""
    paths = [path for path, _ in tree_flatten_with_path(params)[0]]
    return ["/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path) or "0" for path in paths]


def _add_matching(
    direction: WeightedSum, matching: WeightedSum, strength: float, squares: Tensor | None, over: Alone
) -> float | None:
    """Add to the mean gradient the matching part, as long as ``strength`` says, and return the gamma that does it."""
    mean = direction.norm()
    epsilon = torch.finfo(mean.dtype).eps
    spread = torch.ones_like(mean) if squares is None else 1 - mean.square() / squares.to(mean)
    norms = torch.stack([mean, matching.norm().to(mean), spread]).tolist()
    of_mean, of_matching, spread_ = over.ranks.gather(norms)[0]  # the same bits on all ranks, whatever they compute
    if not (math.isfinite(of_mean) and math.isfinite(of_matching)):
        direction.add_sum(matching, math.nan)  # also where only the squares overflow: whoever steps refuses it
        return None
    gamma: float = strength * of_mean / of_matching if of_matching and spread_ > 64 * epsilon else 0.0
    if not 0 < gamma <= torch.finfo(torch.float32).max:
        return None
    direction.add_sum(matching, -gamma)
    return gamma


class _TwoPasses:
    """The work of :func:`idgm_grad`.

    Attributes:
        losses_again: Losses that were evaluated a second time at the parameters, by domain.
    """

    def __init__(
        self,
        pure: PureLoss,
        leaves: list[Tensor],
        structure: Any,
        batches: Sequence[Any],
        buffers: Any,
        hvp: str,
        over: Alone,
        check: Check | None,
    ) -> None:
        self._over = over
        self._check = check
        self._leaves = leaves
        self._buffers = buffers
        self._hvp = hvp
        self._devices = devices_of(leaves, buffers)
        self._domains = [_Domain(pure, structure, batch, i, self._devices) for i, batch in enumerate(batches)]
        self._kept: dict[int, tuple[Linearization, Vector]] = {}
        self._held: dict[int, Vector] = {}  # gradients that a second evaluation here would not find
        self.losses_again: dict[int, Tensor] = {}

    def _linearize(self, domain: _Domain) -> Linearization:
        check, self._check = self._check, None  # one gradient tells
        return linearize(self._hvp, domain, self._leaves, check)

    def first(
        self, phi: RunningAgreement, sums: GradientAlignment, chosen: Sequence[int], *, keep_graphs: bool
    ) -> tuple[Tensor, Any]:
        """Take in every domain's gradient.

        Returns:
            The losses, shape (S,), and the buffers that the last domain left.
        """
        losses = []
        buffers = self._buffers
        last = len(self._domains) - 1
        # If all domains go through both passes, the second finds their buffers by itself.
        chains = not keep_graphs and len(chosen) == len(self._domains)
        for i, domain in enumerate(self._domains):
            domain.enter(buffers)
            # Only one graph is alive at a time, and the last domain's may as well be the first of the second pass.
            keeps = i in chosen and (keep_graphs or i == last)
            domain.replays = i in chosen and not (keeps and self._hvp == "reverse")
            linearization: Linearization | None = None
            gradient: Vector
            with record_function("GradMatch.domain_gradient"):
                if keeps:
                    linearization = self._linearize(domain)
                    loss, gradient = linearization.gradient()
                else:
                    loss, gradient = first_order(domain, self._leaves)
            check_reached(gradient, i)
            gradient = self._over.gradient(gradient, self._leaves)
            if linearization is not None:
                self._kept[i] = (linearization, gradient)
            elif self._over.holds and i in chosen:
                self._held[i] = gradient
            losses.append(loss)
            phi.add(gradient)
            sums.add(gradient)
            del gradient  # before the next graph grows
            buffers = domain.buffers_after
            if i not in chosen or (chains and not keeps):
                domain.release()
        return torch.stack([loss.to(losses[0].device, losses[0].dtype) for loss in losses]), buffers

    def second(
        self,
        phi: RunningAgreement,
        sums: GradientAlignment,
        chosen: Sequence[int],
        direction: WeightedSum,
        scale: float,
        *,
        compares: bool,
    ) -> dict[int, Tensor]:
        r"""Add ``scale`` times :math:`\sum_i H_i v_i` over the chosen domains, at least one, to the direction.

        Returns:
            If it ``compares``, what the cosine of each one's gradient with the sum of the others' is made of.
        """
        with_rest: dict[int, Tensor] = {}
        random_state = RandomState.capture(self._devices)
        chains = len(chosen) == len(self._domains)
        waiting = [i for i in chosen if i not in self._kept]
        if self._kept and not waiting and self._hvp != "reverse":
            # All will be evaluated elsewhere only (or as dual numbers): nothing would show that a loss has changed.
            i = next(iter(self._kept))
            if any(map(is_sharded, self._leaves)):  # only a backward pass lets fully_shard go on to other parameters
                self.losses_again[i] = first_order(self._domains[i], self._leaves)[0]
            else:
                self.losses_again[i] = self._domains[i](self._leaves).detach()
        if self._kept:
            with record_function("GradMatch.hessian_vector_product"):
                if compares:
                    with_rest = {i: sums.with_rest(i, gradient) for i, (_, gradient) in self._kept.items()}
                cotangents = [phi.cotangent(i, gradient) for i, (_, gradient) in self._kept.items()]
                linearizations = [linearization for linearization, _ in self._kept.values()]
                self._kept.clear()
                direction.add(sum_of_products(linearizations, cotangents), scale)
            del cotangents
        buffers = self._buffers
        for i in waiting:
            domain = self._domains[i]
            domain.enter(buffers if chains else domain.buffers)
            with record_function("GradMatch.hessian_vector_product"):
                linearization = self._linearize(domain)
                self.losses_again[i], gradient = linearization.gradient()
                buffers = domain.buffers_after
                reduced = self._held.pop(i, gradient)
                if compares:
                    with_rest[i] = sums.with_rest(i, reduced)
                products = linearization.product(phi.cotangent(i, reduced))
            domain.release()
            direction.add(products, scale)
            del linearization, gradient, reduced, products  # before the next graph grows
        random_state.restore()
        return with_rest
