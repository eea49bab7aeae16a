r"""The exact objective of inter-domain gradient matching (IDGM) and its gradient, as pure functions.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, equation 4:

.. math::

    L_\mathrm{idgm}(\theta) = \frac1S \sum_i L_i(\theta) - \gamma\,\phi(G_1, \ldots, G_S),
    \qquad G_i = \frac{\partial L_i}{\partial\theta}.

Any agreement :math:`\phi` has the gradient :math:`\sum_i H_i v_i` with cotangents :math:`v_i = \partial\phi/\partial
G_i` and :math:`H_i` the Hessian of :math:`L_i`. :func:`idgm_loss` is the scalar itself, which composes with
``torch.func.grad``, ``jvp`` and ``vmap`` and holds the graphs of all domains. :func:`idgm_grad` is the engine for
training (:mod:`torch_gradmatch.gradients.engine`): a first pass for the gradients and the cotangents, a second one
with a Hessian-vector product for each domain, and one domain's graph alive at a time; or all in one pass.

A loss function is ``loss_fn(params, batch)``, returning a scalar. One with buffers (BatchNorm's statistics, say) is
``loss_fn(params, buffers, batch)``, returning the scalar and the new buffers: pass ``buffers``, and they go from one
domain to the next. :func:`functional_loss` makes the latter of a module and a training loop's loss function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from torch_gradmatch._checks import check_bool, check_num_domains, check_number, named_batches
from torch_gradmatch.gradients.agreement import Agreement, check_agreement
from torch_gradmatch.gradients.agreement import inner_product as gradient_inner_product
from torch_gradmatch.gradients.alignment import Alignment
from torch_gradmatch.gradients.engine import Engine, check_passes
from torch_gradmatch.gradients.hvp import differentiable_attention
from torch_gradmatch.gradients.pure import functional_loss
from torch_gradmatch.gradients.replay import Replay, check_repeats
from torch_gradmatch.parallel.foreach import in_transform

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
        gamma: As given, or as found; None where none could be found.
    """

    gradient: Params
    reached: Any
    losses: Tensor
    agreement: Tensor
    alignment: Alignment
    buffers: Any
    gamma: float | None


def _with_buffers(loss_fn: Callable[..., Any], buffers: Any) -> PureLoss:
    """Give a loss function without buffers the form of one with them; check what one with them returns."""
    if buffers is None:
        return lambda params, none, batch: (loss_fn(params, batch), none)

    def pure(params: Params, state: Any, batch: Any) -> tuple[Tensor, Any]:
        returned = loss_fn(params, state, batch)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                "loss_fn(params, buffers, batch) should return the loss and the new buffers, because buffers was "
                f"passed (got {type(returned).__name__})"
            )
        return returned

    return pure


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
        >>> loss = lambda w, target: (w - target).square()
        >>> found = domain_gradients(loss, torch.tensor(1.0), [2.0, 4.0])
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
        >>> objective = lambda w: idgm_loss(loss, w, [2.0, 4.0], gamma=0.1)
        >>> objective(torch.tensor(1.0))  # (1 + 9)/2 - 0.1 (-2)(-6)
        tensor(3.8000)
        >>> torch.func.grad(objective)(torch.tensor(1.0))
        tensor(-2.4000)
    """
    batches = list(batches)
    check_num_domains(len(batches))
    phi = check_agreement(agreement)
    with differentiable_attention("reverse"):
        found = domain_gradients(loss_fn, params, batches, buffers=buffers)
        objective = found.losses.mean() - gamma * phi(found.gradients)
    return objective if buffers is None else (objective, found.buffers)


# ------------------------------------------------------------------------------------------------------- the gradient


def idgm_grad(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    gamma: float | None,
    agreement: str | Agreement = "inner_product",
    *,
    strength: float = 0.1,
    hvp: str = "reverse",
    keep_graphs: bool = False,
    one_pass: bool = False,
    buffers: Any = None,
    cosines: bool = False,
    check: bool = True,
    compare: bool = False,
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
        keep_graphs: Keep the graph of each domain's gradient from the first pass, instead of evaluating it again: less
            time, memory that grows with S. For ``hvp="reverse"``: the other two have no graph.
        one_pass: Match each domain with those before it, counted twice: unbiased over random orders of the domains, and
            the mean of an order and its reverse is exact. Each domain is evaluated once (by ``"reverse"``), and one
            graph is alive. For the named agreements.
        buffers: The first domain's, for a loss function that takes them.
        cosines: Whether to measure the mean cosine, too, whatever phi is.
        check: Whether to refuse a loss that is not the same in both passes; waits for an accelerator once.
        compare: Whether to compare the first gradient that is differentiated again with one by ``backward()`` of the
            same evaluation, and the first difference of gradients with its transpose, and to refuse what differs; waits
            for an accelerator.

    Returns:
        The gradient, in the parameters' dtypes, and what was measured on the way.

    Raises:
        RuntimeError: If an operation lacks the derivative that ``hvp`` needs, or no gradient depends on a parameter.
        TypeError: If a loss or the agreement's value is no tensor.
        ValueError: If there are fewer than two batches, a loss is not a scalar, depends on no parameter or is another
            one when it is evaluated again, a gradient is another one by ``backward()``, a parameter stands twice in
            ``params``, or another argument is out of range.

    Example:
        >>> import torch
        >>> def loss(w, target):
        ...     return (w - target).square()
        >>> w = torch.tensor(1.0)
        >>> found = idgm_grad(loss, w, [2.0, 4.0], gamma=0.1)
        >>> found.gradient, found.agreement
        (tensor(-2.4000), tensor(12.))
        >>> found = idgm_grad(loss, w, [2.0, 4.0], gamma=None, strength=0.1)
        >>> found.gradient, found.gamma  # -4 - gamma (-16)
        (tensor(-3.6000), 0.025)
    """
    batches = named_batches(batches)[1]
    if buffers is None and hasattr(loss_fn, "closure_around"):
        raise ValueError("loss_fn is a functional_loss, which takes buffers: pass buffers=dict(model.named_buffers())")
    flat, structure = tree_flatten(params)
    check_num_domains(len(batches))
    gamma = None if gamma is None else check_number("gamma", gamma, at_least=0)
    strength = check_number("strength", strength, above=0)
    phi = check_passes(agreement, hvp, keep_graphs=keep_graphs, one_pass=one_pass, parameters=flat)
    if len({id(p) for p in flat}) < len(flat):
        raise ValueError("params holds a tensor twice, which would count twice: pass it under one name")
    # A model's own parameters stay themselves: a loss may use them past the model, as a penalty on a list of them does.
    leaves = [leaf if leaf.is_leaf and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in flat]
    pure, state = _with_buffers(loss_fn, buffers), _State(buffers or {})

    def loss(index: int, point: list[Tensor] | None) -> Tensor:
        at = tree_unflatten(leaves if point is None else point, structure)
        found, state.value = pure(at, state.value, batches[index])
        return found

    names = _names(params) if check_bool("compare", compare) else None
    replays = not (hvp == "reverse" and (keep_graphs or one_pass))
    replay = Replay(loss, batches, leaves, state, replays=replays, chains=hvp == "reverse")
    check_bool("cosines", cosines)
    engine = Engine(replay, leaves, phi, params, hvp, keep_graphs, one_pass, cosines, names=names)
    found = engine.run(gamma, strength)
    if check and replay.again and not in_transform():
        losses, again = torch.stack([found.losses, found.again]).tolist()
        check_repeats(losses, again, found.tolerance)
    gradient, reached = tree_unflatten(found.direction, structure), tree_unflatten(found.reached, structure)
    after = None if buffers is None else found.buffers
    return IDGMGradient(
        gradient, reached, found.losses, found.agreement, found.alignment, buffers=after, gamma=found.gamma
    )


class _State:
    """Buffers that a pure function takes and returns."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def save(self) -> Any:
        return self.value

    def restore(self, value: Any) -> None:
        self.value = value


def _names(params: Params) -> list[str]:
    """Return each parameter's key, or its number in a list; the keys of nested structures joined by a slash."""
    paths = [path for path, _ in tree_flatten_with_path(params)[0]]
    return ["/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path) or "0" for path in paths]
