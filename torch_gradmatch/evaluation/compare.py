"""``compare``: what each method costs, and how near it comes to exact matching, on a model of the user's own."""

from __future__ import annotations

import gc
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import check_int, check_model, check_num_domains, named_batches
from torch_gradmatch.evaluation.cost import ERM, Cost, costs, describe
from torch_gradmatch.evaluation.fidelity import ExactTerm, Fidelity, agreement_of, fidelity, name_of, random_orders
from torch_gradmatch.evaluation.recipes import SHARED, Recipe, draw_settings, named_recipes, recipe_of
from torch_gradmatch.evaluation.tables import aligned, wrapped
from torch_gradmatch.evaluation.trial import Trial, linear_layers_called
from torch_gradmatch.gradients.agreement import Agreement, fish_gamma
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.fishr import Fishr
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish
from torch_gradmatch.optimizer import GradMatch
from torch_gradmatch.several import SeveralOptimizers
from torch_gradmatch.slow.inner_state import shown_name

__all__ = ["Comparison", "Row", "compare", "default_methods"]

REFERENCE = (
    "Direction beyond ERM against -dphi/dtheta, that of the exact objective, with phi the agreement that the method "
    "matches: IDGM its own, Fish and SmoothFish the inner product. cosine: of the mean over orders of the domains; "
    "gamma: the exact objective's that comes nearest; strength: length over that of the ERM gradient."
)


@dataclass(frozen=True)
class Row:
    """What was measured of one method.

    Attributes:
        name: What it is called in the table.
        method: The method with its settings, or ``"ERM"``.
        cost: Its cost, or None if it failed.
        fidelity: How near it comes to the exact objective; None if it failed or matches nothing.
        error: Why it failed, or None.
    """

    name: str
    method: str
    cost: Cost | None
    fidelity: Fidelity | None
    error: str | None

    def cells(self) -> list[str]:
        """Return its line of the table."""
        cost, found = self.cost, self.fidelity
        cells = [self.name, *["-"] * 7]
        if cost is not None:
            peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.1f}"
            times = f"{median(cost.of_erm):.2f} ({min(cost.of_erm):.2f} to {max(cost.of_erm):.2f})"
            cells[1:5] = [f"{median(cost.seconds) * 1e3:.1f}", times, str(cost.evaluations), peak]
        if found is not None:
            figures = [f"{found.cosine:.3f}", f"{found.gamma:.3g}"] if found.resolved else ["lost in rounding", "-"]
            cells[5:] = [*figures, f"{found.strength:.2g}"]
        return cells


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Prints as a table.

    Attributes:
        setting: Model, data, optimizer and device in words.
        reference: What the fidelities are measured against, in words.
        rows: ERM first, then one for each method.
    """

    setting: str
    reference: str
    rows: list[Row]

    def __getitem__(self, name: str) -> Row:
        """Return the row of that name.

        Raises:
            KeyError: If there is none.
        """
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        heads = ["method", "ms", "time / ERM", "evaluations", "peak MB", "cosine", "gamma", "strength"]
        failed: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.error is not None:  # alike but for figures
                failed.setdefault(re.sub(r"\d[\d.e+-]*", "#", row.error), []).append(row)
        said = [wrapped(f"{'; '.join(row.name for row in rows)} failed: {rows[0].error}") for rows in failed.values()]
        return "\n\n".join([self.setting, aligned([heads, *(row.cells() for row in self.rows)]), *said, self.reference])


def default_methods(model: nn.Module, lr: float, domains: int, head: str | None = None) -> dict[str, Method]:
    """Return the methods that :func:`torch_gradmatch.compare` takes if it is given none.

    Args:
        model: The model.
        lr: Inner learning rate of SmoothFish. To the symmetric one it is only the length of a difference. It should be
            short, and the one you train with is: a step of it moves the model little. But it should not be lost in
            rounding; where it is, the fidelities say so.
        domains: S. The exact methods have the strength of Fish by SGD, ``fish_gamma(lr, S)``.
        head: Name of the model's head, for those that match its gradients alone, at the strength of a tenth.

    Returns:
        The methods by name.
    """
    gamma = fish_gamma(lr, domains)
    found: dict[str, Method] = {
        "Fish": Fish(model=model),
        "SmoothFish": SmoothFish(gamma=1.0, inner_lr=lr, model=model),
        "SmoothFish, symmetric": SmoothFish(gamma, inner_lr=lr, model=model, symmetric=True),
        "IDGM": IDGM(model, gamma, "inner_product"),
        "IDGM, keep_graphs": IDGM(model, gamma, "inner_product", keep_graphs=True),
        "IDGM, one_pass": IDGM(model, gamma, "inner_product", one_pass=True),
        "IDGM, forward": IDGM(model, gamma, "inner_product", hvp="forward"),
        "IDGM, finite_difference": IDGM(model, gamma, "inner_product", hvp="finite_difference"),
    }
    if head is not None:
        part: Any = model.get_submodule(head)
        found |= {
            "IDGM, head": IDGM(model, matched=part),
            "IDGM, head, keep_graphs": IDGM(model, matched=part, keep_graphs=True),
            "Fishr": Fishr(model, part),
        }
    return found


def compare(
    model: nn.Module | Callable[[], nn.Module],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any] | Mapping[Any, Any],
    methods: Mapping[str, str | Method | Recipe] | Sequence[str | Method] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | Callable[..., Optimizer] | None = None,
    *,
    head: str | None = None,
    rounds: int = 5,
    orders: int = 4,
    seed: int = 0,
    show: bool = True,
) -> Comparison:
    r"""Measure cost and fidelity of methods of gradient matching on a model, at its present parameters.

    *Cost* is that of one ``meta_step`` in time and memory, beside the reference: the gradient of the mean loss and one
    step of the optimizer (ERM). ERM and the method take turns in rounds; ratios are of times of one round. *Fidelity*
    compares each method's direction beyond ERM with that of the exact objective by the agreement that the method
    matches; see :class:`~torch_gradmatch.evaluation.fidelity.Fidelity`. There every domain's loss sees the same random
    numbers (dropout) each time, so that what differs is the method. A method that fails does not end the comparison;
    its row says why.

    *Memory*: a copy of the parameters, one of the optimizer's state, and what the method at work needs itself: they are
    built, measured and freed one at a time.

    Nothing is changed: model, buffers, ``.grad``, hooks and training modes, the optimizer and the random state of
    torch, numpy and Python are afterwards what they were, bit for bit, also if it raises. The steps are taken by copies
    of the optimizer, without its hooks. Pass a model in training mode that has been trained a little: at
    initialization gradients agree by accident.

    Args:
        model: The model, or a function that makes one. It holds all parameters of the optimizer.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar.
        batches: One batch of each of S >= 2 domains.
        methods: As for :func:`~torch_gradmatch.leave_one_domain_out`;
            :func:`~torch_gradmatch.evaluation.compare.default_methods` if left out.
        optimizer: The one you train with, wrapped or not, or a list of several; it is not stepped. Or a function that
            makes one, ``optimizer(parameters, lr=, weight_decay=)``. ``torch.optim.SGD`` with learning rate 0.01 if
            left out.
        head: As for :func:`~torch_gradmatch.leave_one_domain_out`.
        rounds: How often each method is timed.
        orders: In how many orders of the domains a method's direction is taken; even.
        seed: Draws the orders.
        show: Whether to print the result.

    Returns:
        The rows.

    Raises:
        TypeError: If the model, the loss, the optimizer or a method is not one.
        ValueError: If there are fewer than two batches, the optimizer's learning rate is 0 or it has a parameter that
            the model does not hold, a loss is not a scalar, their mean is not finite, two methods have one name, or
            another argument is out of range.

    Example:
        >>> import torch
        >>> from torch_gradmatch import IDGM, Fish, compare
        >>> model = torch.nn.Linear(3, 1).double()
        >>> domains = torch.randn(2, 8, 3, dtype=torch.float64)
        >>> batches = [(x, x.square().sum(1, keepdim=True)) for x in domains]
        >>> found = compare(
        ...     model,
        ...     lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        ...     batches,
        ...     {"Fish": Fish(), "exact": IDGM(model, 0.1)},
        ...     torch.optim.SGD(model.parameters(), lr=0.001),
        ...     show=False,
        ... )
        >>> found["Fish"].fidelity.cosine > 0.999
        True
        >>> round(found["exact"].fidelity.gamma, 8)
        0.1
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn should be a function (got {type(loss_fn).__name__}): the order is model, loss_fn, batches"
        )
    own = model if isinstance(model, nn.Module) or not callable(model) else model()
    check_model("model", own)
    batches = named_batches(batches)[1]
    domains = check_num_domains(len(batches))
    check_int("rounds", rounds, at_least=1)
    if check_int("orders", orders, at_least=1) % 2:
        raise ValueError(f"orders should be even, for an order and its reverse (got {orders})")
    plain = _plain_optimizer(optimizer, own)
    lr = float(plain.param_groups[0].get("lr", 0.01))
    if lr <= 0:
        raise ValueError(f"the optimizer's learning rate should be greater than 0 (got {lr}): compare after a warm-up")
    IDGM(own, 0.0).make_loop(plain)  # refuses parameters that are not in the model
    with (
        Trial(own, lambda batch: loss_fn(own, batch), batches, plain) as trial,
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        with linear_layers_called(own) as called:
            loss = float(trial.differentiate_mean_loss())
        if not math.isfinite(loss):
            raise ValueError(f"the mean loss of the batches is {loss}: look at them, or has the model diverged?")
        named = _methods(methods, own, lr, domains, head or (called[-1] if called else None))
        warnings.filterwarnings("ignore", "SmoothFish matches nothing")  # the table says it
        measured, errors = costs(trial, named, rounds)
        trial.fix_random_numbers()
        drawn = random_orders(domains, orders, torch.Generator().manual_seed(seed))
        fidelities, said = _fidelities(trial, named, errors, drawn)
    shown = {ERM: ERM} | {name: repr(method) for name, method in named.items()}
    rows = [Row(n, what, measured.get(n), fidelities.get(n), errors.get(n)) for n, what in shown.items()]
    found = Comparison(_setting(trial, plain, lr), "\n\n".join(map(wrapped, [REFERENCE, *said])), rows)
    if show:
        print(found)  # noqa: T201  it is what was asked for
    return found


def _plain_optimizer(optimizer: Any, model: nn.Module) -> Optimizer:
    if isinstance(optimizer, list | tuple):
        return SeveralOptimizers(optimizer)
    if optimizer is None:
        return torch.optim.SGD(model.parameters(), lr=0.01)
    if callable(optimizer) and not isinstance(optimizer, Optimizer):
        optimizer = optimizer(model.parameters(), lr=SHARED["lr"].default, weight_decay=SHARED["weight_decay"].default)
    if isinstance(optimizer, GradMatch):
        return optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer should be None or a torch.optim.Optimizer (got {type(optimizer).__name__})")
    return optimizer


def _methods(methods: Any, model: nn.Module, lr: float, domains: int, head: str | None) -> dict[str, Method]:
    own = default_methods(model, lr, domains, head)
    if methods is None:
        return own
    here = {name: recipe_of(name, method) for name, method in own.items()}
    named: dict[str, Method] = {}
    for name, recipe in named_recipes(methods, head, here).items():
        if recipe.method is not None and name != ERM:
            named[name] = recipe.method(model, draw_settings({**SHARED, **recipe.search}, 0, 0))
        elif recipe != Recipe():
            raise ValueError(
                f"methods[{name!r}] should have a method of one meta-iteration, and another name than {ERM!r}, whose "
                "row is always there"
            )
    return named


def _fidelities(
    trial: Trial, methods: Mapping[str, Method], errors: dict[str, str], orders: Sequence[Sequence[int]]
) -> tuple[dict[str, Fidelity | None], list[str]]:
    """Measure every method against the exact objective of its own agreement, of which one is alive at a time."""
    fidelities: dict[str, Fidelity | None] = {}
    said: list[str] = []
    matching = {name: phi for name, m in methods.items() if name not in errors and (phi := agreement_of(m))}
    for phi in {id(phi): phi for phi in matching.values()}.values():
        exact, problem = _exact_term(trial, phi)
        if problem:
            what = "No fidelity" if exact is None else "By finite differences"
            why = "for the reason above" if problem in errors.values() else problem
            said.append(f"{what} for the {name_of(phi)}: {why}")
        for name in [name for name, its in matching.items() if its is phi and exact is not None]:
            assert exact is not None
            try:
                fidelities[name] = fidelity(trial, methods[name], exact, orders)
            except Exception as error:  # noqa: BLE001  any method, any reason: the row says it
                errors[name] = describe(error)
            gc.collect()
        del exact  # before the next
    return fidelities, said


def _exact_term(trial: Trial, phi: Agreement) -> tuple[ExactTerm | None, str]:
    """Return the exact term, if it can be had, and what stood in the way of it by second derivatives."""
    problem = ""
    for hvp in ("reverse", "finite_difference"):
        try:
            return ExactTerm(trial, hvp, phi), problem
        except (RuntimeError, ValueError) as error:
            problem = problem or describe(error)
    return None, problem


def _setting(trial: Trial, optimizer: Optimizer, lr: float) -> str:
    parameters = sum(p.numel() for p in trial.parameters) / 1e6
    devices = ", ".join(sorted(str(d) for d in trial.devices))
    return wrapped(
        f"{type(trial.model).__name__}, {parameters:.2f} M parameters, S = {len(trial.batches)} domains, inner "
        f"optimizer {shown_name(optimizer)}(lr={lr:g}), {devices}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
