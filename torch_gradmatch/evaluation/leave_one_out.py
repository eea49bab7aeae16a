"""``leave_one_domain_out``: would a method have won on the user's own domains?"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import check_int, check_loss, check_number, check_reached
from torch_gradmatch.data._labels import indices_by_domain
from torch_gradmatch.evaluation.evidence import Evidence
from torch_gradmatch.evaluation.fold import Task, train
from torch_gradmatch.evaluation.journal import Journal, Key
from torch_gradmatch.evaluation.recipes import (
    SHARED,
    Choice,
    LogUniform,
    Recipe,
    Settings,
    default_recipes,
    draw_settings,
)
from torch_gradmatch.evaluation.selection import rows_of, select
from torch_gradmatch.slow.inner_state import shown_name

__all__ = ["leave_one_domain_out"]


def adam(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Make the optimizer that is taken if none is given.

    Args:
        parameters: To train.
        lr: Learning rate.

    Returns:
        ``torch.optim.Adam``.
    """
    return torch.optim.Adam(parameters, lr=lr)


def leave_one_domain_out(
    make_model: Callable[[], nn.Module],
    dataset: Any,
    domains: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    metric: Callable[[nn.Module, Any], Tensor],
    methods: Mapping[str, Recipe] | Sequence[str] | None = None,
    *,
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer] = adam,
    seeds: int = 5,
    budget: int = 1000,
    draws: int = 8,
    search: Mapping[str, LogUniform | Choice] | None = None,
    domains_per_step: int | None = None,
    held_out: Sequence[Any] | None = None,
    validation: float = 0.2,
    evaluations: int = 10,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    processes: int = 1,
    show: bool = True,
) -> Evidence:
    """Hold out each domain in turn, train on the others by every method, and say which would have won.

    The protocol is that of DomainBed (Gulrajani and Lopez-Paz, ICLR 2021, arXiv 2007.01434). Every method gets the same
    number of gradients, the same number of draws of hyperparameters and the same initial weights. Of every training
    domain a part is kept from training; the hyperparameters, and the moment of training, are those that are best there
    in the mean over training domains: the held-out domain has no say. The hyperparameters are drawn with the first seed
    and then trained with all. What the held-out domain itself would have selected is shown as the *oracle*.

    A run depends on its arguments alone, on one thread, so that two calls find the same, bit for bit, on one machine,
    on however many processes. A method that diverges in a run counts with what the run had reached; the table says so.

    Args:
        make_model: Returns a new model; called under the run's seed.
        dataset: A map-style ``Dataset``, or any sequence of samples. A ``TensorDataset`` is read fastest.
        domains: The label of each sample's domain, string or integer, or a mapping from labels to indices; as for
            :class:`~torch_gradmatch.DomainBatchSampler`. At least three domains.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar.
        metric: ``metric(model, batch)`` returns one number for each sample of a batch, shape (B,), the larger the
            better; its mean is compared. The model is in evaluation mode.
        methods: By name; the first is what the others are compared to. Or names of those of
            :func:`~torch_gradmatch.evaluation.recipes.default_recipes`; all of them if left out.
        optimizer: ``optimizer(parameters, lr)`` makes the optimizer to wrap.
        seeds: How many seeds; they are 0, 1, and so on.
        budget: Gradients of one batch in a run; a Hessian-vector product counts as one. A run ends with the first
            meta-iteration that reaches it.
        draws: How many settings of the hyperparameters are tried; the first is the defaults.
        search: Ranges of hyperparameters by name, instead of the methods' own and of ``"lr"`` and ``"batch_size"``,
            which all have.
        domains_per_step: S, the domains in a meta-iteration; None for all that are trained on.
        held_out: Labels of the domains to hold out; None for each in turn.
        validation: The part of each training domain that is kept for selection, in (0, 1).
        evaluations: How often a run is measured, beside its beginning.
        collate_fn: As in ``DataLoader``.
        device: Where to train.
        folder: Where to keep every run as soon as it is done. A call with the same arguments goes on from there; more
            ``seeds``, ``draws`` or ``methods`` only add to it.
        processes: How many runs at a time, each on one core. More than one needs joblib.
        show: Whether to show the progress and print the result.

    Returns:
        Rows and answer.

    Raises:
        ModuleNotFoundError: If scipy, or joblib for several processes, is not installed.
        TypeError: If an argument is of another kind than said.
        ValueError: If an argument is out of range, a domain has fewer than two samples, a loss is not a scalar, the
            metric does not give one number for each sample or is not finite before training, or the folder holds runs
            of something else.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> found = leave_one_domain_out(
        ...     lambda: torch.nn.Linear(4, 2),
        ...     TensorDataset(x, (x.sum(1) > 0).long()),
        ...     ["north", "south", "west"] * 20,
        ...     lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
        ...     lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
        ...     ["ERM", "Fish"],
        ...     seeds=2,
        ...     budget=40,
        ...     draws=2,
        ...     show=False,
        ... )
        >>> [row.name for row in found.rows], sorted(found["Fish"].by_domain)
        (['ERM', 'Fish'], ['north', 'south', 'west'])
    """
    recipes = _recipes(methods)
    for name, value in (("seeds", seeds), ("budget", budget), ("draws", draws), ("evaluations", evaluations)):
        check_int(name, value, at_least=1)
    check_int("processes", processes, at_least=1)
    if not check_number("validation", validation, above=0) < 1:
        raise ValueError(f"validation should be in (0, 1) (got {validation})")
    labels, indices = indices_by_domain(domains)
    by_domain = {label: of_domain.tolist() for label, of_domain in zip(labels, indices, strict=True)}
    held = _held_out(by_domain, held_out, domains_per_step)
    number = 1 + max(index for of_domain in by_domain.values() for index in of_domain)
    if number > len(dataset) or (number < len(dataset) and not isinstance(domains, Mapping)):
        raise ValueError(
            f"domains should have a label for each of the {len(dataset)} samples of the dataset (got {number}); to "
            "leave samples out, map labels to indices"
        )
    task = Task(
        make_model, dataset, by_domain, loss_fn, metric, optimizer, collate_fn, str(device),
        domains_per_step, validation, budget, evaluations,
    )  # fmt: skip
    ranges = {name: _ranges(recipe, search or {}) for name, recipe in recipes.items()}
    _refuse_unknown(search or {}, ranges)
    tried = _try_out(task, recipes, ranges)
    journal = Journal(None if folder is None else Path(folder), tried.pop("task"))
    runner = _Runner(task, recipes, ranges, tried, journal, processes, show=show)
    names = {str(label): label for label in held}
    runner.run([Key(m, h, draw, 0) for h in names for draw in range(draws) for m in recipes], names)
    chosen = {(m, h): select(journal, m, h, draws) for m in recipes for h in names}
    again = [Key(m, h, d, s) for s in range(1, seeds) for (m, h), ds in chosen.items() for d in dict.fromkeys(ds)]
    runner.run(again, names)
    rows = rows_of(journal, chosen, list(recipes), list(names), seeds)
    found = Evidence(_setting(task, list(names), seeds, draws), rows)
    if show:
        print(found)  # noqa: T201  it is what was asked for
    return found


def _recipes(methods: Mapping[str, Recipe] | Sequence[str] | None) -> dict[str, Recipe]:
    known = default_recipes()
    if methods is None:
        return known
    if isinstance(methods, Mapping):
        for name, recipe in methods.items():
            if not isinstance(recipe, Recipe):
                raise TypeError(f"methods[{name!r}] should be a Recipe (got {type(recipe).__name__})")
        found = dict(methods)
    else:
        for name in methods:
            if name not in known:
                raise ValueError(f"methods should be among {', '.join(map(repr, known))} (got {name!r})")
        found = {name: known[name] for name in methods}
    if not found:
        raise ValueError("methods should hold at least one (got none)")
    return found


def _held_out(
    by_domain: Mapping[Any, Sequence[int]], held_out: Sequence[Any] | None, domains_per_step: int | None
) -> list[Any]:
    """Return the labels to hold out, once the domains are seen to do."""
    if len(by_domain) < 3:
        raise ValueError(
            f"domains should have at least three labels, one to hold out and two to match (got {len(by_domain)})"
        )
    for label, indices in by_domain.items():
        if len(indices) < 2:
            raise ValueError(
                f"domain {label!r} has one sample, and needs one to train on and one to select by: leave it out, or "
                "merge it with another"
            )
    if domains_per_step is not None and not 2 <= check_int("domains_per_step", domains_per_step, at_least=1) < len(
        by_domain
    ):
        raise ValueError(
            f"domains_per_step should be from 2 to {len(by_domain) - 1}, all that are trained on "
            f"(got {domains_per_step})"
        )
    held = list(by_domain) if held_out is None else list(held_out)
    for label in held:
        if label not in by_domain:
            raise ValueError(f"held_out should name domains (got {label!r})")
    if not held:
        raise ValueError("held_out should name at least one domain (got none)")
    return held


def _ranges(recipe: Recipe, search: Mapping[str, LogUniform | Choice]) -> dict[str, LogUniform | Choice]:
    own = SHARED | dict(recipe.search)
    return {name: search.get(name, distribution) for name, distribution in own.items()}


def _refuse_unknown(
    search: Mapping[str, LogUniform | Choice], ranges: Mapping[str, Mapping[str, LogUniform | Choice]]
) -> None:
    known = sorted({name for own in ranges.values() for name in own})
    for name in search:
        if name not in known:
            raise ValueError(f"search should name hyperparameters among {', '.join(known)} (got {name!r})")


def _try_out(
    task: Task, recipes: Mapping[str, Recipe], ranges: Mapping[str, Mapping[str, LogUniform | Choice]]
) -> dict[str, Any]:
    """Call everything once, so that what is wrong with it is raised now and not taken for a diverging run.

    Returns:
        What the method of each recipe is in words; and, as ``"task"``, what the runs depend on.

    Raises:
        TypeError: If what is called returns something of another kind.
        ValueError: If a loss or the metric is not as it should be, or a method cannot do with its batches.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = task.make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"make_model should return a torch.nn.Module (got {type(model).__name__})")
        model = model.to(task.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses = {}
        for label, indices in task.by_domain.items():
            loss = check_loss(task.loss_fn(model.eval(), task.batch_of(indices[:8])), 0)
            check_reached(torch.autograd.grad(loss, parameters, allow_unused=True), 0)
            losses[str(label)] = float(loss.detach())
        task.score(model, next(iter(task.by_domain.values()))[:8])
        found: dict[str, Any] = {}
        for name, recipe in recipes.items():
            method = recipe.method(model, draw_settings(ranges[name], 0, 0))
            if method is not None and recipe.order == "pooled":
                raise ValueError(
                    f"methods[{name!r}] has order='pooled', and {method} needs batches of one domain each: set "
                    "order='flipflop' or 'random'"
                )
            found[name] = f"{recipe.order}, warm_up={recipe.warm_up}, {method!r}"
    found["task"] = {
        "torch": torch.__version__,
        "samples": {str(label): len(indices) for label, indices in task.by_domain.items()},
        "parameters": [list(p.shape) for p in parameters],
        "losses": losses,
        "optimizer": shown_name(task.optimizer(parameters, 1e-3)),
        "budget": task.budget,
        "evaluations": task.evaluations,
        "validation": task.validation,
        "domains_per_step": task.domains_per_step,
    }
    return found


class _Runner:
    """Carries runs out that the journal does not have."""

    def __init__(
        self,
        task: Task,
        recipes: Mapping[str, Recipe],
        ranges: Mapping[str, Mapping[str, LogUniform | Choice]],
        described: Mapping[str, str],
        journal: Journal,
        processes: int,
        *,
        show: bool,
    ) -> None:
        self._task, self._recipes, self._ranges, self._described = task, recipes, ranges, described
        self._journal, self._processes, self._show = journal, processes, show

    def run(self, keys: Sequence[Key], labels: Mapping[str, Any]) -> None:
        """Make sure that the journal has these runs.

        Args:
            keys: Which.
            labels: The held-out domains, by their labels as text.
        """
        settings = {key: draw_settings(self._ranges[key.method], key.draw, 0) for key in keys}
        for key in keys:
            if key in self._journal:
                self._refuse_another(key, settings[key])
        missing = [key for key in keys if key not in self._journal]
        arguments = [(self._recipes[k.method], settings[k], labels[k.held_out], k.seed) for k in missing]
        with _progress(len(missing), show=self._show) as bar:
            for position, run in _carry_out(self._task, arguments, self._processes):
                key = missing[position]
                own = {"settings": settings[key], "by": self._described[key.method]}
                self._journal.add(key, own | run)
                if bar is not None:
                    bar.set_postfix_str(f"{key.method}, held out: {key.held_out}", refresh=False)
                    bar.update()

    def _refuse_another(self, key: Key, settings: Settings) -> None:
        known = self._journal[key]
        for name, value in (("settings", settings), ("by", self._described[key.method])):
            if known[name] != value:
                raise ValueError(
                    f"the folder has a run of {key.method!r} with {known[name]}, and here it is {value}: give the "
                    "method another name, or pass another folder"
                )


def _progress(total: int, *, show: bool) -> Any:
    if not show or not total:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return nullcontext()
    return tqdm(total=total, unit="run", mininterval=0.1 if sys.stderr.isatty() else 30.0)


def _carry_out(
    task: Task, arguments: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield positions and runs in whatever order they are done."""
    if processes == 1 or len(arguments) < 2:
        for position, own in enumerate(arguments):
            yield position, train(task, *own)
        return
    import cloudpickle
    from joblib import Parallel, delayed

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.pickle"  # once, instead of with each run
        path.write_bytes(cloudpickle.dumps(task))
        parent = os.getpid()
        calls = (delayed(_in_child)(str(path), position, parent, *own) for position, own in enumerate(arguments))
        yield from Parallel(n_jobs=processes, return_as="generator_unordered", batch_size=1)(calls)


def _in_child(path: str, position: int, parent: int, *arguments: Any) -> tuple[int, dict[str, Any]]:
    _end_with(parent)
    return position, train(_task_in(path), *arguments)


@cache
def _end_with(parent: int) -> None:
    """End this process soon after the one that started it, also where that one is killed and cannot say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def _task_in(path: str) -> Task:
    import cloudpickle

    task: Task = cloudpickle.loads(Path(path).read_bytes())
    return task


def _setting(task: Task, held: Sequence[str], seeds: int, draws: int) -> str:
    samples = sum(map(len, task.by_domain.values()))
    step = len(task.by_domain) - 1 if task.domains_per_step is None else task.domains_per_step
    return (
        f"{len(task.by_domain)} domains, {samples} samples, {len(held)} held out in turn; {step} domains in a "
        f"meta-iteration; {task.budget} gradients in a run, {draws} draws of hyperparameters with seed 0, the best on "
        f"{task.validation:.0%} of the training domains' samples then with {seeds} seeds. Means over held-out domains "
        f"and seeds. torch {torch.__version__}"
    )
