r"""IDGM: gradient matching by its exact objective, with second derivatives.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, equation 4:

.. math:: L_\mathrm{idgm} = \frac1S \sum_i L_i - \gamma\,\phi(G_1, \ldots, G_S)

with the mean inner product over pairs for :math:`\phi`. The gradient of this goes to the wrapped optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from torch_gradmatch._checks import (
    check_bool,
    check_choice,
    check_int,
    check_model,
    check_number,
    check_tracking,
    naming,
    optional,
)
from torch_gradmatch.gradients.agreement import (
    AGREEMENTS,
    Agreement,
    check_agreement,
    cosine,
    inner_product,
    variance,
)
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.functional import IDGMGradient, functional_loss, idgm_grad
from torch_gradmatch.gradients.hvp import HVPS, check_hvp
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.gradients.repeats import check_repeats
from torch_gradmatch.methods.base import MetaStep, Method, report_of
from torch_gradmatch.methods.direction import Direction, DirectionStep
from torch_gradmatch.methods.together import shown_settings
from torch_gradmatch.parallel.ranks import check_process_group
from torch_gradmatch.parallel.shards import is_sharded, reshard

__all__ = ["IDGM"]

# gamma times the inner product over the loss. Where an IDGM that works has at most about 1 (for a quadratic loss more
# than 1 means unbounded below), one that diverges passes 10 soon after it begins to; see tests/test_idgm.py.
EXPLODED = 10.0


@dataclass
class IDGM(Method):
    r"""Minimize :math:`\frac1S\sum_i L_i - \gamma\,\phi(G_1,\ldots,G_S)` itself (equation 4), by ``meta_step``.

    **The inner product is unbounded**: with gamma too large the objective falls for ever while the gradients grow, and
    the model diverges; or, where the gradients cannot grow, training settles where they are large and agree, because
    nothing is learnt. Warm up by ordinary training. Near ``fish_gamma(lr, S)`` it does about what Fish does.
    ``agreement="variance"`` and ``"cosine"`` are bounded; variance with gamma around 1 trains well.

    Attributes:
        model: The model. Its parameters and buffers are passed functionally (``torch.func.functional_call``), so that
            BatchNorm's statistics move once for each domain and meta-iteration, as in a plain forward pass.
        gamma: :math:`\gamma \ge 0`, the strength of the matching; 0 is ordinary training.
        agreement: :math:`\phi`: ``"inner_product"`` (the paper's), ``"variance"``, ``"cosine"``, or a function that
            takes the list of the domains' gradients, each a dictionary by parameter name, and returns a scalar, the
            larger the better they agree.
        hvp: How the products of Hessian and vector are taken: ``"reverse"`` (double backward), ``"forward"``
            (``jvp`` of ``grad``), or ``"finite_difference"`` for models without second derivatives.
        hvp_domains: Take them for this many domains only, drawn anew each time from torch's random state; unbiased.
        keep_graphs: Keep every domain's graph instead of evaluating it twice: faster, and memory grows with S.
        nonfinite: ``"raise"`` refuses a loss or gradient with NaN or infinity and a diverging inner product before
            anything is changed (waits for an accelerator once in a meta-iteration); ``"ignore"`` does not look.
            Either way a loss that is not the same in both passes is refused; by ``"ignore"`` it is looked for in
            meta-iterations number 1, 2, 4, 8 and so on.
        track_alignment: Measure the mean cosine of the gradients, too, and of each with the sum of the others, where
            its Hessian-vector product is taken; costs one more vector of the size of the parameters, and one pass over
            each gradient. ``"pairs"`` measures the cosine of each pair of domains, too, and copies every gradient for
            it: S times the parameters. ``agreement="cosine"`` measures the mean anyway.
        process_group: The ranks that train together, ``torch.distributed.group.WORLD`` for all of them; None for one
            process, or for a model of ``torch.distributed.fsdp.fully_shard``, whose ranks find each other and which
            takes ``hvp="finite_difference"``. Parameters are then the same bits on all of them after every
            ``meta_step``, and so are the model's buffers: means over the ranks, the largest of integers. What is raised
            on one rank is raised on all.
        parallel: ``"domains"``: every rank has batches of domains of its own, as many as it likes, and S counts all.
            Two all-reduces of the size of the parameters, whatever S (one more where cosines are measured). The report
            is of all domains, in the order of the ranks. The model is the plain module; ``agreement`` is one of the
            three named ones. ``"data"``: every rank has its part of the batch of each domain, and each gradient is
            averaged: S + 1 all-reduces, and memory for S gradients. The model may be in ``DistributedDataParallel``.

    Raises:
        TypeError: If ``model`` is no module or ``process_group`` no process group.
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> import torch
        >>> from torch_gradmatch import IDGM, GradMatch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), IDGM(model, 1.0, "variance"))
        >>> domains = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])]
        >>> report = optimizer.meta_step(lambda x: model(x).sum(), domains)
        >>> report.inner_product, report.grad_norms
        (tensor(1.), tensor([1.0000, 2.2361]))
    """

    model: nn.Module
    gamma: float
    agreement: str | Agreement = "inner_product"
    hvp: Literal["reverse", "forward", "finite_difference"] = "reverse"
    hvp_domains: int | None = None
    keep_graphs: bool = False
    nonfinite: Literal["raise", "ignore"] = "raise"
    track_alignment: bool | Literal["pairs"] = False
    process_group: ProcessGroup | None = None
    parallel: Literal["domains", "data"] = "domains"

    checks: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        "model": partial(check_model, "model"),
        "gamma": partial(check_number, "gamma", at_least=0),
        "agreement": check_agreement,
        "hvp": partial(check_choice, "hvp", choices=HVPS),
        "hvp_domains": optional(partial(check_int, "hvp_domains", at_least=1)),
        "keep_graphs": partial(check_bool, "keep_graphs"),
        "track_alignment": check_tracking,
        "nonfinite": partial(check_choice, "nonfinite", choices=("raise", "ignore")),
        "process_group": check_process_group,
        "parallel": partial(check_choice, "parallel", choices=("domains", "data")),
    }

    if not TYPE_CHECKING:  # which would accept any name for the sake of this

        def __setattr__(self, name: str, value: object) -> None:
            if name == "hvp" and "model" in vars(self):
                check_hvp(value, self.model.parameters())
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        settings = shown_settings(self)
        model = settings.pop("model")
        return f"IDGM({model}, {', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def check_sharing(self) -> None:
        """Raise if the ranks cannot share the work as the settings say.

        Raises:
            ValueError: If each has domains of its own and a setting needs the gradients of all.
        """
        if self.process_group is None or self.parallel == "data":
            return
        asked = None
        if check_agreement(self.agreement) not in AGREEMENTS.values():
            asked = "agreement as a function"
        elif self.track_alignment == "pairs":
            asked = "track_alignment='pairs'"
        elif self.hvp_domains is not None:
            raise ValueError(
                f"hvp_domains={self.hvp_domains} draws from all domains, but with parallel='domains' each rank has its "
                "own, and those of which none is drawn would wait. Pass hvp_domains=None, or parallel='data'"
            )
        if asked is not None:
            raise ValueError(
                f"{asked} needs the gradients of all domains in one place, and with parallel='domains' each rank holds "
                "its own and their sum only: pass parallel='data'"
            )

    def start(self, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> IDGMStep:  # noqa: ARG002
        """Make the loop that carries these settings out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.
            state: Not used: no tensor of a parameter is kept from one meta-iteration to the next.

        Returns:
            The loop.

        Raises:
            ValueError: If the optimizer has a parameter that the model does not hold, or the model is of
                ``fully_shard`` and ``hvp`` takes second derivatives, or ranks cannot share the work as the settings
                say.
        """
        self.check_sharing()
        loop = IDGMStep(self, optimizer)
        check_hvp(self.hvp, loop.parameters())
        loop.names()
        return loop


class IDGMStep(DirectionStep):
    """IDGM at work on one optimizer.

    Args:
        method: The settings.
        optimizer: The wrapped optimizer.
    """

    def __init__(self, method: IDGM, optimizer: Optimizer) -> None:
        super().__init__(optimizer, method)
        self.method = method
        self.first_loss: float | None = None  # its size, in the first meta-iteration
        self._sums = GradientAlignment(cosines=False)

    def names(self) -> list[str]:
        """Return the model's name of every parameter of the optimizer, in order.

        Returns:
            The names.

        Raises:
            ValueError: If the model does not hold one.
        """
        parameters = self.parameters()
        if any(map(is_sharded, parameters)):
            reshard(self.method.model)  # which an evaluation may have left with whole parameters
        name_of = {id(p): name for name, p in self.method.model.named_parameters()}
        for position, p in enumerate(parameters):
            if id(p) not in name_of:
                raise ValueError(
                    f"parameter number {position} of the optimizer, of shape {tuple(p.shape)}, is not in the model "
                    f"{type(self.method.model).__name__}: IDGM(model) needs the module that holds all of them (put "
                    "several into a torch.nn.ModuleList)"
                )
        return [name_of[id(p)] for p in parameters]

    def evaluate(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        over: Alone,
        *,
        check: bool = True,
        scale: float = 1.0,
    ) -> Direction:
        """Work out the gradient of the objective. See ``DirectionStep.evaluate``."""
        method = self.method
        method.check_sharing()
        name_of = dict(zip(self.parameters(), self.names(), strict=True))
        params = {name_of[p]: p for p in self.trainable()}
        agreement, gamma, of_agreement = _scaled(method.agreement, method.gamma, scale)
        cosines = bool(method.track_alignment) or check_agreement(method.agreement) is cosine
        self._sums = self.running_sums(self._sums, cosines=cosines, pairs=method.track_alignment == "pairs")
        found = idgm_grad(
            functional_loss(method.model, loss_fn),
            params,
            batches,
            gamma,
            agreement,
            hvp=method.hvp,
            hvp_domains=method.hvp_domains,
            keep_graphs=method.keep_graphs,
            cosines=bool(method.track_alignment),
            sums=self._sums,
            buffers=dict(method.model.named_buffers()),
            check=False,
            over=over,
        )
        losses, phi = found.losses / scale, found.agreement / of_agreement
        with nullcontext() if over.names is None else naming(over.names):
            if check and method.nonfinite == "raise":
                self._refuse_divergence(found, losses, phi, scale, over)
            elif check and self.is_due() and found.losses_again:
                again = {i: float(loss) / scale for i, loss in found.losses_again.items()}
                check_repeats(losses.tolist(), again, found.tolerance)
        return Direction(
            gradient=[found.gradient[n] if n in params and found.reached[n] else None for n in name_of.values()],
            objective=losses.mean() - method.gamma * phi.to(losses.device),
            report=report_of(found.losses, found.alignment, scale),
            buffers=found.buffers,
        )

    def _refuse_divergence(self, found: IDGMGradient, losses: Tensor, phi: Tensor, scale: float, over: Alone) -> None:
        method = self.method
        gradient = [g for g, reached in zip(found.gradient.values(), found.reached.values(), strict=True) if reached]
        again = [loss.to(losses.device) for loss in found.losses_again.values()]
        others = [phi, torch.stack(again)] if again else [phi]
        first, (norm, agreement, *second) = self.read_finite(losses, gradient, *others, over=over)
        check_repeats(first, {i: v / scale for i, v in zip(found.losses_again, second, strict=True)}, found.tolerance)
        loss = sum(first) / len(first)
        if not (math.isfinite(norm) and math.isfinite(agreement)):
            if scale != 1.0:
                return  # gradients that overflowed: the scaler skips the step and lowers the scale
            raise RuntimeError(
                f"IDGM diverged: the agreement of the gradients is {agreement} and the direction has norm {norm}, with "
                f"gamma={method.gamma}. Nothing was changed: lower gamma, or use agreement='variance', which is "
                "bounded"
            )
        first_loss = abs(loss) if self.first_loss is None else self.first_loss
        matching = method.gamma * agreement
        exploded = matching > EXPLODED * max(abs(loss), first_loss)
        if exploded and check_agreement(method.agreement) is inner_product:
            history = "; earlier meta-iterations have led here, so go back to a checkpoint"
            raise RuntimeError(
                f"IDGM diverges: gamma times the inner product is {matching:.3g} but the mean loss {loss:.3g} (in the "
                f"first meta-iteration {first_loss:.3g}), with gamma={method.gamma}. The inner product is unbounded, "
                "and training would only raise the gradients. Nothing was changed by this meta_step()"
                f"{'' if self.first_loss is None else history}. Lower gamma, or use agreement='variance', which is "
                "bounded"
            )

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one meta-iteration. See ``GradMatch.meta_step``."""
        report = super().meta_step(loss_fn, batches, step, scaler)
        if self.first_loss is None and self.method.nonfinite == "raise":
            assert report.losses is not None
            self.first_loss = abs(float(report.losses.mean()))
        return report

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """Return what the check against divergence compares with. See ``MetaLoop.state_dict``."""
        return {"first_loss": self.first_loss}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the state is malformed. See ``MetaLoop.check_state_dict``."""
        if "first_loss" not in state or not isinstance(state["first_loss"], float | None):
            raise ValueError("the state dict's 'first_loss' is missing or malformed")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved. See ``MetaLoop.load_state_dict``."""
        super().load_state_dict(state)
        self.first_loss = state["first_loss"]


def _scaled(agreement: str | Agreement, gamma: float, scale: float) -> tuple[str | Agreement, float, float]:
    r"""Return what to ask for where every loss is multiplied by c, so that the gradient found is c times the true one.

    Inner product and variance are quadratic in the gradients: :math:`\frac{\gamma}{c}\phi(cG) = c\gamma\phi(G)`. The
    cosine does not change with c; a function of the user's is given the true gradients.

    Args:
        agreement: phi.
        gamma: The strength of the matching.
        scale: c.

    Returns:
        Agreement and gamma to ask for, and what the agreement's value is to be divided by.
    """
    phi = check_agreement(agreement)
    if scale == 1.0:
        return agreement, gamma, 1.0
    if phi in (inner_product, variance):
        return agreement, gamma / scale, scale**2
    if phi is cosine:
        return agreement, gamma * scale, 1.0

    def of_true_gradients(gradients: Sequence[Any]) -> Tensor:
        return phi([tree_map(lambda g: g / scale, gradient) for gradient in gradients])

    return of_true_gradients, gamma * scale, 1.0
