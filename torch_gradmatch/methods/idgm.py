r"""IDGM: gradient matching by its exact objective, with second derivatives.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, equation 4:

.. math:: L_\mathrm{idgm} = \frac1S \sum_i L_i - \gamma\,\phi(G_1, \ldots, G_S)

with the mean inner product over pairs for :math:`\phi`. The gradient of this goes to the wrapped optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients import agreement as agreements
from torch_gradmatch.gradients.agreement import Agreement, check_agreement
from torch_gradmatch.gradients.engine import Engine, Matched, check_passes
from torch_gradmatch.gradients.hvp import HVPS
from torch_gradmatch.gradients.part import PartEngine
from torch_gradmatch.gradients.pure import functional_loss
from torch_gradmatch.gradients.replay import Replay, check_repeats
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import COMMON_CHECKS
from torch_gradmatch.methods.direction import Direction, DirectionLoop, DirectionMethod, Evaluation
from torch_gradmatch.parallel.foreach import is_sharded
from torch_gradmatch.parallel.shards import reshard

__all__ = ["IDGM"]


def _check_matched(value: Any) -> nn.Module | tuple[Tensor, ...]:
    """Return a module, or the parameters of an iterable."""
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"matched should be a module of the model or parameters of it (got {value!r:.80})")
    parameters = (value,) if isinstance(value, Tensor) else tuple(value)
    if not all(isinstance(p, Tensor) for p in parameters):
        raise TypeError(f"matched should be a module of the model or parameters of it (got {value!r:.80})")
    return parameters


@dataclass(repr=False)
class IDGM(DirectionMethod):
    r"""Minimize :math:`\frac1S\sum_i L_i - \gamma\,\phi(G_1,\ldots,G_S)` itself (equation 4), by ``meta_step``.

    **Strength, not gamma.** :math:`\gamma` has the units of 1/loss (variance, inner product) and depends on the size of
    the network: on small networks 2e-3 to 1e-1 make the matching term a tenth as long as the mean gradient, on a
    pretrained one 3e-4, and 1 drives all gradients to zero. So by default the first meta-iteration finds the gamma at
    which :math:`|\gamma\,\partial\phi/\partial\theta|` is ``strength`` times :math:`|\bar G|`. It is kept from then on,
    in ``MetaStep.gamma`` and in the optimizer's state dict.

    **The inner product is unbounded.** With gamma too large the objective falls for ever while the gradients grow, and
    the model diverges. Where the gradients cannot grow, training may settle where they are large and agree because
    nothing is learnt: warm up by ordinary training. With ``fish_gamma(lr, S)`` it does about what Fish does.
    ``agreement="variance"`` (the default) and ``"cosine"`` are bounded.

    Gradients that are differentiated again are taken by ``torch.autograd.grad``, all others by ``backward()``. The
    first meta-iteration compares the two; where they differ the error names the parameter.

    Attributes:
        model: The model. BatchNorm's statistics move once for each domain and meta-iteration.
        gamma: :math:`\gamma \ge 0`; 0 is ordinary training. None to find it by ``strength``.
        agreement: :math:`\phi`: ``"variance"``, ``"inner_product"`` (the paper's), ``"cosine"``, or a function. It
            takes the list of the domains' gradients, each a dictionary by parameter name, and returns a scalar, the
            larger the better they agree.
        strength: Length of the matching term over that of the mean gradient, at the first meta-iteration. If it is
            changed later, gamma is found anew at the next one.
        hvp: How the products of Hessian and vector are taken: ``"reverse"`` (double backward), ``"forward"``
            (``jvp`` of ``grad``), or ``"finite_difference"`` for models without second derivatives.
        matched: A module of the model, or some of its parameters: match the gradients of these instead of all, those of
            the classifier's head for instance. The derivative of phi still goes through all parameters. Only what lies
            above the matched parameters is differentiated twice, all else once, by ``backward()``: about 1.5 times
            ordinary training, 1.1 with ``keep_graphs``. Below them may lie compiled code, fused attention,
            checkpointing, ``DistributedDataParallel`` (passed as ``model``) and ``fully_shard``. The report is of the
            matched gradients. For ``hvp="reverse"``.
        keep_graphs: Keep every domain's graph instead of evaluating it twice: faster, and memory grows with S. For
            ``hvp="reverse"``.
        one_pass: Evaluate each domain once, with one graph alive, and match it with the domains before it, counted
            twice. That is exact in expectation over random orders of the domains, and exact in the mean of an order and
            its reverse (``DomainBatchSampler(order="flipflop")``). For the three named agreements; 2.3 to 3.5 times
            ordinary training.
        nonfinite: ``"raise"`` refuses a loss or gradient with NaN or infinity, and a diverging inner product, before
            anything is changed (synchronizes once in a meta-iteration). ``"ignore"`` skips these checks. Either way a
            loss that differs between the two passes is refused; ``"ignore"`` checks that in meta-iterations number 1,
            2, 4, 8 and so on. With ``one_pass`` or ``keep_graphs`` each loss is evaluated once.
        track_alignment: Measure the mean cosine of the gradients, too; costs one more vector of the size of the
            parameters. ``"pairs"`` also measures the cosine of each pair of domains, and of each domain with the sum of
            the others. It copies every gradient: S times the parameters. ``agreement="cosine"`` measures the mean
            anyway.
        process_group: The ranks that train together, ``torch.distributed.group.WORLD`` for all of them; None for one
            process, or for a model of ``torch.distributed.fsdp.fully_shard``, whose ranks find each other and which
            takes ``hvp="finite_difference"``. After every ``meta_step`` parameters are the same bits on all ranks, and
            so are the model's buffers: means over the ranks, the largest of integers. All ranks raise what one raises.
        parallel: ``"domains"``: every rank has batches of domains of its own, any number of them, and S counts those of
            all ranks. Two all-reduces of the size of the parameters, whatever S (one more where cosines are measured).
            The report is of all domains, in the order of the ranks. The model is the plain module; ``agreement`` is one
            of the three named ones. ``"data"``: every rank has its part of the batch of each domain, and each gradient
            is averaged: S + 1 all-reduces, and memory for S gradients. The model may be in
            ``DistributedDataParallel``.

    Raises:
        TypeError: If ``model`` is no module or ``process_group`` no process group.
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> import torch
        >>> from torch_gradmatch import IDGM, GradMatch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = GradMatch(sgd, IDGM(model, 1.0))
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> domains = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]])]
        >>> report = optimizer.meta_step(lambda x: model(x).square().sum() / 2, domains)
        >>> report.inner_product, report.grad_norms  # G = (1, 0) and (3, 6)
        (tensor(3.0000), tensor([1.0000, 6.7082]))
    """

    model: nn.Module
    gamma: float | None = None
    agreement: str | Agreement = "variance"
    strength: float = 0.1
    hvp: Literal["reverse", "forward", "finite_difference"] = "reverse"
    matched: nn.Module | Iterable[Tensor] | None = None
    keep_graphs: bool = False
    one_pass: bool = False
    nonfinite: Literal["raise", "ignore"] = "raise"
    track_alignment: bool | Literal["pairs"] = False
    process_group: ProcessGroup | None = None
    parallel: Literal["domains", "data"] = "domains"

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {
        "model": partial(checks.check_model, "model"),
        "gamma": checks.optional(partial(checks.check_number, "gamma", at_least=0)),
        "agreement": lambda value: (check_agreement(value), value)[1],
        "strength": partial(checks.check_number, "strength", above=0),
        "hvp": partial(checks.check_choice, "hvp", choices=HVPS),
        "matched": checks.optional(_check_matched),
        "keep_graphs": partial(checks.check_bool, "keep_graphs"),
        "one_pass": partial(checks.check_bool, "one_pass"),
        "parallel": partial(checks.check_choice, "parallel", choices=("domains", "data")),
    }

    def __post_init__(self) -> None:
        if self.matched is not None and isinstance(self.model, DistributedDataParallel):
            self.reduce_for_ddp()
            self.parallel = "data"
        super().__post_init__()

    @property
    def keeps(self) -> str:  # type: ignore[override]
        """What is lost with the state that it keeps."""
        return "gamma is found anew" if self.gamma is None else ""

    @property
    def bypasses_backward(self) -> bool:
        """Whether gradients are taken past what averages them over ranks."""
        return self.matched is None

    def check(self, loop: DirectionLoop) -> None:
        """Raise if the settings do not fit the optimizer. See ``DirectionMethod.check``.

        Raises:
            ValueError: If the optimizer has a parameter that the model does not hold, or the model is of
                ``fully_shard`` and ``hvp`` takes second derivatives, or ranks cannot share the work as the settings
                say.
        """
        needs_all = {
            "agreement as a function": check_agreement(self.agreement) not in agreements.AGREEMENTS.values(),
            "track_alignment='pairs'": self.track_alignment == "pairs",
            "one_pass=True": self.one_pass,
        }
        if self.process_group is not None and self.parallel == "domains" and any(needs_all.values()):
            raise ValueError(
                f"{next(name for name, needs in needs_all.items() if needs)} needs the gradients of all domains in one "
                "place, and with parallel='domains' each rank holds its own and their sum only: pass parallel='data'"
            )
        passes = {"keep_graphs": self.keep_graphs, "one_pass": self.one_pass}
        parameters = loop.parameters() if self.matched is None else self._matched()
        check_passes(self.agreement, self.hvp, **passes, parameters=parameters)
        if self.matched is not None and self.hvp != "reverse":
            raise ValueError(
                f"matched=... needs hvp='reverse', which only differentiates twice what lies above (got "
                f"hvp={self.hvp!r}): leave out one of them"
            )
        self._names(loop.parameters())

    def _names(self, parameters: Sequence[Tensor]) -> list[str]:
        """Return the model's name of each of the optimizer's parameters, or raise if it does not hold one."""
        if any(map(is_sharded, parameters)):
            reshard(self.model, parameters)  # which an evaluation may have left with whole parameters
        name_of = {id(p): name for name, p in self.model.named_parameters()}
        missing = [(i, tuple(p.shape)) for i, p in enumerate(parameters) if id(p) not in name_of]
        if missing:
            raise ValueError(
                f"parameter number {missing[0][0]} of the optimizer, of shape {missing[0][1]}, is not in the model "
                f"{type(self.model).__name__}: IDGM(model) needs the module that holds all of them (put several into a "
                "torch.nn.ModuleList)"
            )
        return [name_of[id(p)] for p in parameters]

    def _matched(self) -> list[Tensor]:
        """Return the parameters whose gradients are to agree, or raise if there are none that can be."""
        given = self.matched.parameters() if isinstance(self.matched, nn.Module) else self.matched or ()
        held = {id(p) for p in self.model.parameters()}
        found = [p for p in dict.fromkeys(given) if p.requires_grad]
        if not found:
            raise ValueError(
                "matched holds no parameter that requires a gradient: pass a module that is trained, such "
                "as the model's last layer"
            )
        if any(id(p) not in held for p in found):
            raise ValueError(
                f"matched should be a module of {type(self.model).__name__}, or parameters of it, and the "
                "model does not hold them: is it another model's, or a copy?"
            )
        return found

    def direction(self, given: Evaluation) -> Direction:
        """Work out the gradient of the objective. See ``DirectionMethod.direction``."""
        gamma, leaves, sharing = self.gamma, given.parameters, given.sharing
        if gamma is None and given.memory.get("strength") == self.strength:
            gamma = given.memory.get("gamma")
        phi = agreements.AGREEMENTS[self.agreement] if isinstance(self.agreement, str) else self.agreement
        scaled = (phi, 1.0, 1.0)
        agreement, by_scale, of_agreement = scaled if given.scale == 1.0 else _scaled(phi, given.scale)
        names, is_new = self._names(leaves), self.hvp not in given.kept
        pure: Any = functional_loss(self.model, given.loss) if self.hvp == "forward" else None
        replays = not (self.hvp == "reverse" and (self.keep_graphs or self.one_pass))
        matched = None if self.matched is None else self._matched()
        agreeing = dict(zip(names, leaves, strict=True))
        if matched is not None:
            agreeing = dict(zip(self._names(matched), matched, strict=True))
        engine = (Engine if matched is None else PartEngine)(
            Replay(
                lambda index, point: given.loss(index)
                if pure is None or point is None
                else pure(dict(zip(names, point, strict=True)), {}, index)[0],
                given.batches, leaves, given.places, replays=replays, chains=self.hvp == "reverse" and matched is None,
            ),
            leaves,
            agreement,
            agreeing,
            self.hvp,
            matched=matched,
            keep_graphs=self.keep_graphs,
            one_pass=self.one_pass,
            cosines=bool(self.track_alignment),
            pairs=self.track_alignment == "pairs",
            names=names if is_new else None,
            sharing=sharing,
            scale=given.scale,
        )  # fmt: skip
        found = engine.run(None if gamma is None else gamma * by_scale, self.strength)
        used = 0.0 if found.gamma is None else found.gamma / by_scale
        losses, value, measured = found.losses / given.scale, found.agreement / of_agreement, found.alignment
        with nullcontext() if sharing is None or sharing.names is None else checks.naming(sharing.names):
            self._check(given, found, losses, value, used)
        if is_new and found.gamma != 0:
            given.kept[self.hvp] = True  # compared
        if self.gamma is None and gamma is None and found.gamma is not None:
            given.memory.update(gamma=used, strength=self.strength)
        return Direction(
            gradient=[d if reached else None for d, reached in zip(found.direction, found.reached, strict=True)],
            objective=losses.mean() - used * value.to(losses.device),
            report=MetaStep(
                losses, measured.inner_product, measured.cosine, measured.grad_norms, measured.cosines, gamma=used
            ),
            buffers=found.buffers,
        )

    def _check(self, given: Evaluation, found: Matched, losses: Tensor, phi: Tensor, gamma: float) -> None:
        """Raise if something is not finite or diverges, or if a loss evaluated again is another."""
        if not given.checks:
            return
        again, tolerance = found.again / given.scale, found.tolerance
        if self.nonfinite == "ignore":
            if given.is_due and not self.one_pass:
                check_repeats(losses.tolist(), again.tolist(), tolerance)
            return
        gradient = [d for d, reached in zip(found.direction, found.reached, strict=True) if reached]
        first, (norm, agreement, *second) = given.read_finite(losses, gradient, [phi, again])
        check_repeats(first, second, tolerance)
        is_unbounded = self.agreement in ("inner_product", agreements.inner_product)
        if not (math.isfinite(norm) and math.isfinite(agreement)):
            if given.scale != 1.0:
                return  # gradients that overflowed: the scaler skips the step and lowers the scale
            remedy = (
                "lower gamma, or use agreement='variance', which is bounded"
                if is_unbounded
                else "an operation may have no finite second derivative here (norm() or sqrt() of zero): look at the "
                "losses, or lower gamma"
            )
            raise RuntimeError(
                f"IDGM diverged: the agreement of the gradients is {agreement} and the direction has norm {norm}, with "
                f"gamma={gamma:.3g}. Nothing was changed: {remedy}"
            )
        if is_unbounded:
            remedy = f"Lower gamma (it is {gamma:.3g}), or use agreement='variance', which is bounded"
            given.refuse_explosion(sum(first) / len(first), gamma * agreement, remedy)


def _scaled(phi: Agreement, scale: float) -> tuple[Agreement, float, float]:
    r"""Return what to ask for where every loss is multiplied by c, so that the gradient found is c times the true one.

    Inner product and variance are quadratic in the gradients: :math:`\frac{\gamma}{c}\phi(cG) = c\gamma\phi(G)`. The
    cosine does not change with c; a function of the user's is given the true gradients.

    Args:
        phi: The agreement.
        scale: c.

    Returns:
        Agreement to ask for, what gamma is to be multiplied by, and what the agreement's value is to be divided by.
    """
    if phi in (agreements.inner_product, agreements.variance):
        return phi, 1.0 / scale, scale**2
    if phi is agreements.cosine:
        return phi, scale, 1.0

    def of_true_gradients(gradients: Sequence[Any]) -> Tensor:
        return phi([tree_map(lambda g: g / scale, gradient) for gradient in gradients])

    return of_true_gradients, scale, 1.0
