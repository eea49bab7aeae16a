"""``compare``: what exact gradient matching costs, and what Fish gives up, on a model of the user's own."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import check_int, check_model, check_num_domains, named_batches
from torch_gradmatch.compare.answer import answer
from torch_gradmatch.compare.cost import ERM, Cost, costs, describe
from torch_gradmatch.compare.fidelity import ExactTerm, Fidelity, agreement_of, fidelity, name_of, random_orders
from torch_gradmatch.compare.rows import OTHER_RATES, Row, at_other_rate
from torch_gradmatch.compare.tables import cost_table, failures, fidelity_table, wrapped
from torch_gradmatch.compare.trial import Trial
from torch_gradmatch.gradients.agreement import Agreement, fish_gamma
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish
from torch_gradmatch.optimizer import GradMatch
from torch_gradmatch.several import SeveralOptimizers
from torch_gradmatch.slow.inner_state import shown_name

__all__ = ["Comparison", "Cost", "Row", "compare", "default_methods"]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Prints as tables and an answer.

    Attributes:
        setting: Model, data, optimizer and device in words.
        reference: What the fidelities are measured against, in words.
        rows: ERM first, then one for each method. After Fish come its fidelities at a tenth of the inner learning rate
            and at ten times as much, called ``"Fish, lr x 0.1"`` and so on.
        answer: "Fish or exact?", answered from the rows in sentences, with a table of the three ways: Fish, SmoothFish
            that walks to and fro, and the fastest exact method.
    """

    setting: str
    reference: str
    rows: list[Row]
    answer: str

    def __getitem__(self, name: str) -> Row:
        """Return the row of that name.

        Raises:
            KeyError: If there is none.
        """
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        parts = [self.setting, cost_table(self.rows), *failures(self.rows), self.reference]
        if any(row.fidelity for row in self.rows):
            parts.append(fidelity_table(self.rows))
        return "\n\n".join([*parts, self.answer])


def default_methods(model: nn.Module, lr: float, domains: int) -> dict[str, Method]:
    """Return the methods that :func:`torch_gradmatch.compare` takes if it is given none.

    Args:
        model: The model.
        lr: Inner learning rate of SmoothFish. To the symmetric one it is only the length of a difference. It should be
            short, and the one you train with is: a step of it moves the model little. But it should not be lost in
            rounding; where it is, the fidelities say so.
        domains: S. The exact methods have the strength of Fish by SGD, ``fish_gamma(lr, S)``.

    Returns:
        The methods by name.
    """
    gamma = fish_gamma(lr, domains)
    return {
        "Fish": Fish(model=model),
        "SmoothFish": SmoothFish(gamma=1.0, inner_lr=lr, model=model),
        "SmoothFish, symmetric": SmoothFish(gamma, inner_lr=lr, model=model, symmetric=True),
        "IDGM": IDGM(model, gamma, "inner_product"),
        "IDGM, keep_graphs": IDGM(model, gamma, "inner_product", keep_graphs=True),
        "IDGM, one_pass": IDGM(model, gamma, "inner_product", one_pass=True),
        "IDGM, forward": IDGM(model, gamma, "inner_product", hvp="forward"),
        "IDGM, finite_difference": IDGM(model, gamma, "inner_product", hvp="finite_difference"),
    }


def compare(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any] | Mapping[Any, Any],
    methods: Mapping[str, Method] | Sequence[Method] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    rounds: int = 5,
    orders: int = 4,
    seed: int = 0,
    show: bool = True,
) -> Comparison:
    r"""Measure cost and fidelity of methods of gradient matching on a model, at its present parameters.

    *Cost* is that of one ``meta_step`` in time and memory, beside the reference: the gradient of the mean loss and one
    step of the optimizer (ERM). ERM and the method take turns in rounds; ratios are of times of one round. *Fidelity*
    compares each method's direction beyond ERM with that of the exact objective by the agreement that the method
    matches; see :class:`~torch_gradmatch.compare.fidelity.Fidelity`. There every domain's loss sees the same random
    numbers (dropout) each time, so that what differs is the method. A method that fails does not end the comparison;
    its row says why.

    *Memory*: a copy of the parameters, one of the optimizer's state, and what the method at work needs itself: they are
    built, measured and freed one at a time.

    Nothing is changed: model, buffers, ``.grad``, hooks and training modes, the optimizer and the random state of
    torch, numpy and Python are afterwards what they were, bit for bit, also if it raises. The steps are taken by copies
    of the optimizer, without its hooks. Pass a model in training mode that has been trained a little: at
    initialization gradients agree by accident.

    Args:
        model: The model. It holds all parameters of the optimizer.
        loss_fn: ``loss_fn(batch)`` calls the model as usual and returns a scalar.
        batches: One batch of each of S >= 2 domains.
        methods: By name, or a sequence of them; :func:`~torch_gradmatch.compare.report.default_methods` if left out.
        optimizer: The one you train with, wrapped or not, or a list of several; it is not stepped.
            ``torch.optim.SGD`` with learning rate 0.01 if left out.
        rounds: How often each method is timed.
        orders: In how many orders of the domains a method's direction is taken; even.
        seed: Draws the orders.
        show: Whether to print the result.

    Returns:
        Rows and answer.

    Raises:
        TypeError: If the model, the optimizer or a method is not one.
        ValueError: If there are fewer than two batches, the optimizer's learning rate is 0 or it has a parameter that
            the model does not hold, a loss is not a scalar, their mean is not finite, or another argument is out of
            range.

    Example:
        >>> import torch
        >>> from torch_gradmatch import IDGM, Fish, compare
        >>> model = torch.nn.Linear(3, 1).double()
        >>> batches = [(x, x.square().sum(1, keepdim=True)) for x in torch.randn(2, 8, 3, dtype=torch.float64)]
        >>> found = compare(
        ...     model,
        ...     lambda batch: (model(batch[0]) - batch[1]).square().mean(),
        ...     batches,
        ...     {"Fish": Fish(), "exact": IDGM(model, 0.1)},
        ...     torch.optim.SGD(model.parameters(), lr=0.001),
        ...     show=False,
        ... )
        >>> found["Fish"].fidelity.cosine > 0.999, abs(found["exact"].fidelity.gamma - 0.1) < 1e-9
        (True, True)
    """
    check_model("model", model)
    batches = named_batches(batches)[1]
    domains = check_num_domains(len(batches))
    check_int("rounds", rounds, at_least=1)
    if check_int("orders", orders, at_least=1) % 2:
        raise ValueError(f"orders should be even, for an order and its reverse (got {orders})")
    plain = _plain_optimizer(optimizer, model)
    lr = float(plain.param_groups[0].get("lr", 0.01))
    if lr <= 0:
        raise ValueError(
            f"the optimizer's learning rate should be greater than 0 (got {lr}): compare at the one you train with, "
            "not at the beginning of a warm-up"
        )
    named = _named(default_methods(model, lr, domains) if methods is None else methods)
    IDGM(model, 0.0).make_loop(plain)  # refuses parameters that are not in the model
    with Trial(model, loss_fn, batches, plain) as trial, torch.enable_grad(), warnings.catch_warnings():
        _refuse_nonfinite(trial)
        warnings.filterwarnings("ignore", "SmoothFish matches nothing")  # the table says it
        measured, errors = costs(trial, named, rounds)
        trial.fix_random_numbers()
        drawn = random_orders(domains, orders, torch.Generator().manual_seed(seed))
        fidelities, said = _fidelities(trial, named, errors, drawn)
    rows = [Row(ERM, ERM, measured[ERM], None, None)]
    for name, method in named.items():
        titles = [name, *(at_other_rate(name, factor) for factor in OTHER_RATES)]
        rows += [
            Row(title, repr(method), measured.get(title), fidelities.get(title), errors.get(title))
            for title in titles
            if title == name or title in fidelities or title in errors
        ]
    reference = _reference(plain, lr, domains, said)
    found = Comparison(_setting(trial, plain, lr), reference, rows, answer(rows, named))
    if show:
        print(found)  # noqa: T201  it is what was asked for
    return found


def _plain_optimizer(optimizer: Optimizer | Sequence[Optimizer] | None, model: nn.Module) -> Optimizer:
    if isinstance(optimizer, list | tuple):
        return SeveralOptimizers(optimizer)
    if optimizer is None:
        return torch.optim.SGD(model.parameters(), lr=0.01)
    if isinstance(optimizer, GradMatch):
        return optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer should be None or a torch.optim.Optimizer (got {type(optimizer).__name__})")
    return optimizer


def _refuse_nonfinite(trial: Trial) -> None:
    loss = float(trial.differentiate_mean_loss())
    if not math.isfinite(loss):
        raise ValueError(
            f"the mean loss of the batches is {loss}, so there is nothing to compare at these parameters: look at the "
            "batches, or take a model that has not diverged"
        )


def _named(methods: Mapping[str, Method] | Sequence[Method]) -> dict[str, Method]:
    named = dict(methods) if isinstance(methods, Mapping) else {repr(method): method for method in methods}
    if ERM in named:
        raise ValueError(f"methods should not be called {ERM!r}: that row is always there")
    for name, method in named.items():
        if not isinstance(method, Method):
            raise TypeError(f"methods[{name!r}] should be a method object such as Fish() (got {method!r})")
    return named


def _fidelities(
    trial: Trial, methods: Mapping[str, Method], errors: dict[str, str], orders: Sequence[Sequence[int]]
) -> tuple[dict[str, Fidelity | None], list[str]]:
    """Measure every method against the exact objective of its own agreement, with one exact term alive at a time.

    Args:
        trial: Where, with its random numbers fixed.
        methods: By name.
        errors: Why some failed, by name; those that fail here are added.
        orders: Orders of the domains.

    Returns:
        What was found, by name, and what is to be said of the exact terms.
    """
    fidelities: dict[str, Fidelity | None] = {}
    said: list[str] = []
    working = {name: method for name, method in methods.items() if name not in errors}
    matched = list({id(phi): phi for phi in map(agreement_of, working.values())}.values())
    for phi in matched:
        exact, problem = _exact_term(trial, phi)
        if exact is None or problem:
            problem = "for the reason above" if problem in errors.values() else f"since {problem}"
            title = "the" if len(matched) == 1 else f"the {name_of(phi)}'s"
            if exact is None:
                said.append(f"No fidelity: {title} exact direction cannot be had, {problem}")
                continue
            said.append(f"Here {title} exact direction is one by finite differences, {problem}")
        for name, method in working.items():
            factors = (1.0, *OTHER_RATES) if isinstance(method, Fish) else (1.0,)
            for factor in factors if agreement_of(method) is phi else ():
                title = name if factor == 1.0 else at_other_rate(name, factor)
                try:
                    fidelities[title] = fidelity(trial, method, exact, orders, factor)
                except Exception as error:  # noqa: BLE001  any method, any reason: the row says it
                    errors[title] = describe(error)
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


def _reference(optimizer: Optimizer, lr: float, domains: int, said: Sequence[str]) -> str:
    """Say what the fidelities are measured against, and what their figures are."""
    text = (
        "Direction beyond ERM against -dphi/dtheta, that of the exact objective, with phi the agreement that the "
        "method matches: IDGM its own, the others the inner product. Cosine: of single meta-iterations (median and "
        "quartiles over orders of the domains) and of their mean; gamma: the exact objective's that comes nearest; "
        "error: relative distance from it; strength: length over that of the ERM gradient."
    )
    if type(optimizer) is torch.optim.SGD and not any(
        g["momentum"] or g["weight_decay"] for g in optimizer.param_groups
    ):
        text += f" Fish by this SGD: fish_gamma({lr:g}, {domains}) = {fish_gamma(lr, domains):.3g}."
    return "\n\n".join(map(wrapped, [text, *said]))


def _setting(trial: Trial, optimizer: Optimizer, lr: float) -> str:
    parameters = sum(p.numel() for p in trial.parameters) / 1e6
    devices = ", ".join(sorted(str(d) for d in trial.devices))
    name = shown_name(optimizer)
    return wrapped(
        f"{type(trial.model).__name__}, {parameters:.2f} M parameters, S = {len(trial.batches)} domains, "
        f"inner optimizer {name}(lr={lr:g}), {devices}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
