"""``compare``: what exact gradient matching costs, and what Fish gives up, on a model of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from textwrap import fill
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import check_int, check_model, check_num_domains
from torch_gradmatch.compare.cost import ERM, Cost, costs, describe
from torch_gradmatch.compare.fidelity import ExactTerm, Fidelity, fidelity, random_orders
from torch_gradmatch.compare.trial import Trial, copy_optimizer
from torch_gradmatch.gradients.agreement import fish_gamma
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish
from torch_gradmatch.optimizer import GradMatch

__all__ = ["Comparison", "Cost", "Row", "compare", "default_methods"]

CLOSE, FAR = 0.9, 0.5  # cosines, between which the first-order approximation is called rough
OTHER_RATES = (0.1, 10.0)  # of the inner learning rate, at which Fish's fidelity is measured, too


@dataclass(frozen=True)
class Row:
    """What was measured of one method.

    Attributes:
        name: What it is called in the table.
        method: The method with its settings, or ``"ERM"``.
        cost: Its cost, or None if it failed.
        fidelity: How near it comes to the exact objective; None if it failed or there is nothing to compare.
        error: Why it failed, or None.
    """

    name: str
    method: str
    cost: Cost | None
    fidelity: Fidelity | None
    error: str | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Prints as tables and an answer.

    Attributes:
        setting: Model, data, optimizer and device in words.
        reference: What the fidelities are measured against, in words.
        rows: ERM first, then one for each method. After Fish come its fidelities at a tenth of the inner learning rate
            and at ten times as much, called ``"Fish, lr x 0.1"`` and so on.
        answer: "Fish or exact?", answered from the rows in sentences.
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
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        failed = [_wrapped(f"{row.name} failed: {row.error}") for row in self.rows if row.error]
        parts = [self.setting, _cost_table(self.rows), *failed, self.reference]
        if any(row.fidelity for row in self.rows):
            parts.append(_fidelity_table(self.rows))
        return "\n\n".join([*parts, self.answer])


def default_methods(model: nn.Module, lr: float, domains: int) -> dict[str, Method]:
    """Return the methods that :func:`compare` takes if it is given none.

    Args:
        model: The model.
        lr: Inner learning rate of SmoothFish.
        domains: S. The exact methods have the strength of Fish by SGD, ``fish_gamma(lr, S)``.

    Returns:
        The methods by name.
    """
    gamma = fish_gamma(lr, domains)
    return {
        "Fish": Fish(model=model),
        "SmoothFish": SmoothFish(gamma=1.0, inner_lr=lr, model=model),
        "IDGM": IDGM(model, gamma),
        "IDGM, keep_graphs": IDGM(model, gamma, keep_graphs=True),
        "IDGM, hvp_domains=1": IDGM(model, gamma, hvp_domains=1),
        "IDGM, forward": IDGM(model, gamma, hvp="forward"),
        "IDGM, finite_difference": IDGM(model, gamma, hvp="finite_difference"),
    }


def compare(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
    methods: Mapping[str, Method] | Sequence[Method] | None = None,
    optimizer: Optimizer | None = None,
    *,
    rounds: int = 5,
    orders: int = 4,
    seed: int = 0,
    show: bool = True,
) -> Comparison:
    r"""Measure cost and fidelity of methods of gradient matching on a model, at its present parameters.

    *Cost* is that of one ``meta_step`` in time and memory, beside the reference: the gradient of the mean loss and one
    step of the optimizer (ERM). The methods take turns in rounds; ratios are of times of one round. *Fidelity* compares
    each method's direction beyond ERM with that of the exact objective by the inner product; see
    :class:`~torch_gradmatch.compare.fidelity.Fidelity`. There every domain's loss sees the same random numbers
    (dropout) each time, so that what differs is the method. A method that fails does not end the comparison; its
    row says why.

    Nothing is changed: model, buffers, ``.grad``, hooks and training modes, the optimizer and the random state of
    torch, numpy and Python are afterwards what they were, bit for bit, also if it raises. The steps are taken by copies
    of the optimizer, without its hooks. Pass a model in training mode that has been trained a little: at
    initialization gradients agree by accident.

    Args:
        model: The model. It holds all parameters of the optimizer.
        loss_fn: ``loss_fn(batch)`` calls the model as usual and returns a scalar.
        batches: One batch of each of S >= 2 domains.
        methods: By name, or a sequence of them; :func:`default_methods` if left out.
        optimizer: The one you train with, wrapped or not; it is not stepped. ``torch.optim.SGD`` with learning rate
            0.01 if left out.
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
    batches = list(batches)
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
    IDGM(model, 0.0).start(plain, {})  # refuses parameters that are not in the model
    with Trial(model, loss_fn, batches, plain) as trial, torch.enable_grad():
        _refuse_nonfinite(trial)
        measured, errors = costs(trial, named, rounds)
        trial.fix_random_numbers()
        exact, reference = _reference(trial, lr)
        fidelities: dict[str, Fidelity | None] = {}
        drawn = random_orders(domains, orders, torch.Generator().manual_seed(seed))
        for name, method in named.items():
            if exact is not None and name not in errors:
                factors = (1.0, *OTHER_RATES) if isinstance(method, Fish) else (1.0,)
                try:
                    for factor in factors:
                        title = name if factor == 1.0 else _at_other_rate(name, factor)
                        fidelities[title] = fidelity(trial, method, exact, drawn, factor)
                except Exception as error:  # noqa: BLE001  any method, any reason: the row says it
                    errors[title] = describe(error)
    rows = [Row(ERM, ERM, measured[ERM], None, None)]
    for name, method in named.items():
        titles = [name, *(_at_other_rate(name, factor) for factor in OTHER_RATES)]
        rows += [
            Row(title, repr(method), measured.get(title), fidelities.get(title), errors.get(title))
            for title in titles
            if title == name or title in fidelities or title in errors
        ]
    found = Comparison(_setting(trial, plain, lr), reference, rows, _answer(rows, named))
    if show:
        print(found)  # noqa: T201  it is what was asked for
    return found


def _plain_optimizer(optimizer: Optimizer | None, model: nn.Module) -> Optimizer:
    if optimizer is None:
        return torch.optim.SGD(model.parameters(), lr=0.01)
    if isinstance(optimizer, GradMatch):
        return optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer should be None or a torch.optim.Optimizer (got {type(optimizer).__name__})")
    copy_optimizer(optimizer)  # fails here, if it does
    return optimizer


def _refuse_nonfinite(trial: Trial) -> None:
    loss = float(trial.differentiate_mean_loss())
    if not math.isfinite(loss):
        raise ValueError(f"the mean loss of the batches is {loss}: there is nothing to compare at these parameters")


def _at_other_rate(name: str, factor: float) -> str:
    return f"{name}, lr x {factor:g}"


def _named(methods: Mapping[str, Method] | Sequence[Method]) -> dict[str, Method]:
    named = dict(methods) if isinstance(methods, Mapping) else {repr(method): method for method in methods}
    if ERM in named:
        raise ValueError(f"methods should not be called {ERM!r}: that row is always there")
    for name, method in named.items():
        if not isinstance(method, Method):
            raise TypeError(f"methods[{name!r}] should be a method object such as Fish() (got {method!r})")
    return named


# ------------------------------------------------------------------------------------------------------------ fidelity


def _reference(trial: Trial, lr: float) -> tuple[ExactTerm | None, str]:
    """Return the exact term, if it can be had, and what to say of it."""
    domains = len(trial.batches)
    problem = ""
    for hvp in ("reverse", "finite_difference"):
        try:
            exact = ExactTerm(trial, hvp)
        except (RuntimeError, ValueError) as error:
            problem = problem or str(error)
            continue
        text = (
            "Direction beyond ERM against -dGIP/dtheta, the exact objective's by the inner product. Cosine: of single "
            "meta-iterations (median and quartiles over orders of the domains) and of their mean; gamma: the exact "
            "objective's that comes nearest; error: relative distance from it; strength: length over that of the ERM "
            "gradient."
        )
        if _is_plain_sgd(trial.optimizer):
            text += f" Fish by this SGD: fish_gamma({lr:g}, {domains}) = {fish_gamma(lr, domains):.3g}."
        if hvp != "reverse":
            text += f" By finite differences, since the model has no second derivatives: {problem}"
        return exact, _wrapped(text)
    return None, _wrapped(f"No fidelity, since the exact direction cannot be had: {problem}")


def _is_plain_sgd(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    return type(optimizer) is torch.optim.SGD and not any(g["momentum"] or g["weight_decay"] for g in groups)


# -------------------------------------------------------------------------------------------------------------- answer


def _answer(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Say in sentences what the rows of Fish and of the fastest exact method mean."""
    by_name = {row.name: row for row in rows}
    fish = next((by_name[n] for n, m in methods.items() if isinstance(m, Fish)), None)
    whole = [by_name[n] for n, m in methods.items() if isinstance(m, IDGM) and m.hvp_domains is None and m.gamma > 0]
    timed = [(median(row.cost.of_erm), row) for row in whole if row.cost is not None]
    exact_time, exact = min(timed, key=lambda item: item[0], default=(math.nan, None))
    if fish is None or not whole:
        return "Fish or exact? That takes a Fish and an IDGM over all domains among the methods."
    if fish.cost is None:
        return "Fish or exact? Fish failed here (above): lower the inner learning rate and compare again."
    if exact is None:
        return "Fish or exact? Fish: the exact objective failed on this model (above)."
    factor = exact_time / median(fish.cost.of_erm)
    longer = f"{exact.name} takes {factor:.2g} times as long as Fish for one meta-iteration."
    found = fish.fidelity
    if found is None:
        return f"Fish or exact? {longer} How near Fish comes to it could not be measured."
    if not found.resolved:
        return _wrapped(
            f"Fish or exact? {longer} Fish hardly matches gradients at this inner learning rate: what it does beyond "
            "ERM is lost in rounding. Raise it, or choose the strength freely by SmoothFish or IDGM."
        )
    strength = f"{found.strength:.2g} of the ERM gradient's length"
    others = [(factor, by_name.get(_at_other_rate(fish.name, factor))) for factor in OTHER_RATES]
    cosines = [(f.cosine, factor) for factor, row in others if row and (f := row.fidelity) and f.resolved]
    best, factor = max(cosines, default=(0.0, 1.0))
    nearer = f"; nearer at {factor:g} times the inner learning rate, {best:.2f}" if best > found.cosine + 0.05 else ""
    if found.cosine >= CLOSE:
        verdict = (
            f"Fish. Its mean direction beyond ERM is that of the exact objective with gamma = {found.gamma:.3g} "
            f"(cosine {found.cosine:.2f}, {strength}). Exact is for another strength or agreement than Fish's."
        )
    elif found.cosine >= FAR:
        verdict = (
            f"Fish is a rough stand-in for exact here (cosine {found.cosine:.2f}, {strength}{nearer}). If held-out "
            "domains do not gain by it, try the exact objective."
        )
    else:
        verdict = (
            f"exact, if it is the inner product that is to be matched: at this inner learning rate the first-order "
            f"approximation does not hold (cosine {found.cosine:.2f}, {strength}{nearer})."
        )
    return _wrapped(f"Fish or exact? {verdict} {longer} Which trains the better model only domains held out can tell.")


# -------------------------------------------------------------------------------------------------------------- tables


def _setting(trial: Trial, optimizer: Optimizer, lr: float) -> str:
    parameters = sum(p.numel() for p in trial.parameters) / 1e6
    devices = ", ".join(sorted(str(d) for d in trial.devices))
    name = type(optimizer).__name__
    return (
        f"{type(trial.model).__name__}, {parameters:.2f} M parameters, S = {len(trial.batches)} domains, "
        f"inner optimizer {name}(lr={lr:g}), {devices}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def _wrapped(text: str) -> str:
    return fill(text, width=110, break_on_hyphens=False)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _cost_table(rows: Sequence[Row]) -> str:
    cells = [["method", "ms", "time / ERM", "evaluations", "per evaluation / ERM", "peak MB"]]
    of_erm = next(row.cost.evaluations for row in rows if row.name == ERM and row.cost)
    for row in rows:
        if row.cost is not None:
            cost = row.cost
            peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.1f}"
            each = [ratio * of_erm / cost.evaluations for ratio in cost.of_erm]
            time = f"{median(cost.seconds) * 1e3:.1f}"
            cells.append([row.name, time, _spread(cost.of_erm), str(cost.evaluations), f"{median(each):.2f}", peak])
    return _aligned(cells)


def _fidelity_table(rows: Sequence[Row]) -> str:
    cells = [["method", "cosine, single", "of mean", "gamma", "error", "strength"]]
    for row in rows:
        found = row.fidelity
        if found is None:
            continue
        figures = [_spread(found.cosines), f"{found.cosine:.3f}", f"{found.gamma:.3g}", f"{found.relative_error:.1g}"]
        unresolved = ["lost in rounding", "-", "-", "-"]
        cells.append([row.name, *(figures if found.resolved else unresolved), f"{found.strength:.2g}"])
    return _aligned(cells)


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
