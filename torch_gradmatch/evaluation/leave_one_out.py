"""``leave_one_domain_out``: would a method have won on the user's own domains?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import check_bool, check_int, check_number
from torch_gradmatch.evaluation import arguments
from torch_gradmatch.evaluation.evidence import Evidence
from torch_gradmatch.evaluation.journal import Journal
from torch_gradmatch.evaluation.recipes import Choice, LogUniform, Recipe, named_recipes
from torch_gradmatch.evaluation.task import Task
from torch_gradmatch.methods.base import Method

__all__ = ["leave_one_domain_out"]


def leave_one_domain_out(
    make_model: Callable[[], nn.Module],
    dataset: Any,
    domains: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    metric: Callable[..., Any],
    methods: Mapping[str, str | Method | Recipe] | Sequence[str | Method] | None = None,
    *,
    groups: Any = None,
    predict: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None,
    predictions: bool = False,
    head: str | None = None,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    seeds: int = 5,
    budget: int = 32_000,
    draws: int = 8,
    search: Mapping[str, LogUniform | Choice] | None = None,
    domains_per_step: int | None = None,
    held_out: Sequence[Any] | None = None,
    validation: float = 0.2,
    evaluations: int = 10,
    permuted: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    name: str | None = None,
    processes: int = 1,
    show: bool = True,
) -> Evidence:
    """Hold out each domain in turn, train on the others by every method, and say what to use.

    Every method gets the same number of differentiated samples, the same draws of hyperparameters and the same initial
    weights. Of every training domain a part is kept from training; the hyperparameters, and the moment of training, are
    those that are best there in the mean over training domains: the held-out domain has no say. Every run is measured
    twice, with its weights and with their mean over its second half.

    An answer is "Yes" where the 95 % interval for another domain *and* that for another seed leave 0 out after Holm's
    correction for the number of rows.

    The protocol follows DomainBed (Gulrajani and Lopez-Paz, ICLR 2021, arXiv 2007.01434), and differs: hyperparameters
    are drawn and selected with the first seed and then trained with all, where DomainBed draws them anew for each seed;
    the moment is selected, too; validation is by group. As there, the training sets of two folds overlap, so that their
    differences are not independent: the interval for another domain is nearer to one for another domain *among these
    others*.

    Args:
        make_model: Returns a new model; called under the run's seed.
        dataset: A map-style ``Dataset``, or any sequence of samples. A ``TensorDataset`` is read fastest.
        domains: The label of each sample's domain, string or integer, or a mapping from labels to indices; as for
            :class:`~torch_gradmatch.DomainBatchSampler`. At least three domains.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar.
        metric: ``metric(model, batch)`` returns one number for each sample of a batch, shape (B,), the larger the
            better, whose mean is compared; or, with ``predict``, ``metric(outputs, targets)`` returns one number for
            all samples of a domain, such as AUROC. The model is in evaluation mode.
        methods: Names (:func:`~torch_gradmatch.evaluation.recipes.known_recipes`), method objects and recipes: a
            list, or a mapping from names of one's own. The first is what the others are compared to. If left out, ERM
            on pooled and on balanced batches, Fish, SmoothFish, and IDGM and Fishr on the head if there is one.
        groups: A label for each sample, of the patient, recording or scene that it comes from. A group is never on both
            sides of validation, nor of holding out: where domains share groups, the held-out domain is scored on a
            part of these (as large as that for validation, another one for each seed), and no method trains on it.
        predict: ``predict(model, batch)`` returns outputs and targets, tensors with a row for each sample; they reach
            ``metric`` on the CPU.
        predictions: Whether to keep the outputs and targets on the held-out domain.
        head: Name of the model's head, a linear layer; if left out, the last one that its forward pass calls.
        optimizer: ``optimizer(parameters, lr=, weight_decay=)`` makes the optimizer to wrap, as the classes of
            ``torch.optim`` do.
        seeds: How many seeds; they are 0, 1, and so on.
        budget: Samples that are differentiated in a run; a second derivative counts twice, one of the head by its share
            of the parameters. A run ends with the first step that reaches it.
        draws: How many settings of the hyperparameters are tried; the first is the defaults.
        search: Ranges of hyperparameters by name, instead of the methods' own and of ``"lr"``, ``"weight_decay"`` and
            ``"batch_size"``, which all have. A batch is shared out over the domains of a meta-iteration if that takes
            one step; Fish takes one with each batch, of that many samples. So all take about as many steps.
        domains_per_step: S, the domains in a meta-iteration; None for all that are trained on.
        held_out: Labels of the domains to hold out; None for each in turn.
        validation: The part of each training domain that is kept for selection, in (0, 1).
        evaluations: How often a run is measured, on at most 256 samples of each validation part.
        permuted: Not 0: deal the labels of the domains out anew with this seed. Then there is nothing to find: the
            control for an answer.
        collate_fn: As in ``DataLoader``.
        device: Where to train.
        folder: Where to keep every run as soon as it is done. A call with the same arguments goes on from there; more
            ``seeds``, ``draws`` or ``methods`` only add to it. Everything else is compared: all samples by hash,
            functions by their code and what they close over, the optimizer's arguments.
        name: A name for what cannot be hashed, where there is such a thing.
        processes: How many runs at a time, each on one core, by joblib.
        show: Whether to show the progress and print the result.

    Returns:
        Rows and answer.

    Raises:
        ModuleNotFoundError: If the extra ``evidence`` is not installed.
        TypeError: If an argument is of another kind than said.
        ValueError: If an argument is out of range, a domain has too few samples or groups, models share parameters, a
            loss is not a scalar, the metric is not as said, not finite before training or for the first method,
            something for the folder cannot be hashed, or the folder holds runs of something else.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> found = leave_one_domain_out(
        ...     lambda: torch.nn.Linear(4, 2),
        ...     TensorDataset(x, (x.sum(1) > 0).long()),
        ...     ["north", "south", "west"] * 20,
        ...     lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        ...     lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
        ...     ["ERM", "Fish"],
        ...     seeds=2,
        ...     budget=640,
        ...     draws=2,
        ...     show=False,
        ... )
        >>> [row.name for row in found.rows], sorted(found["Fish"].by_domain)
        (['ERM', 'ERM, averaged', 'Fish', 'Fish, averaged'], ['north', 'south', 'west'])
    """
    functions = {"loss_fn": loss_fn, "metric": metric, "optimizer": optimizer}
    arguments.check_call(make_model, dataset, functions | {"predict": predict, "collate_fn": collate_fn})
    counts = {"seeds": seeds, "budget": budget, "draws": draws, "evaluations": evaluations, "processes": processes}
    for key, value in counts.items():
        check_int(key, value, at_least=1)
    check_int("permuted", permuted, at_least=0)
    if not check_number("validation", validation, above=0) < 1:
        raise ValueError(f"validation should be in (0, 1) (got {validation})")
    if check_bool("predictions", predictions) and predict is None:
        raise ValueError("predictions=True needs predict=, which returns the outputs and targets to keep")
    by_domain = arguments.samples_by_domain(domains, dataset)
    most = len(by_domain) - 1  # all that are trained on
    if domains_per_step is not None and not 2 <= check_int("domains_per_step", domains_per_step, 1) <= most:
        raise ValueError(f"domains_per_step should be from 2 to {most} (got {domains_per_step})")
    held = arguments.check_held_out(by_domain, held_out)
    task = Task(
        make_model, dataset, by_domain, loss_fn, metric, predict, optimizer, collate_fn,
        arguments.groups_of(groups, dataset), str(device), domains_per_step, validation, budget, evaluations,
        predictions,
    )  # fmt: skip
    if permuted:
        task = task.permuted(permuted)
    for label in held.values():
        task.split(label, 0)  # raises if the groups leave nothing
    found_head = arguments.probed(task)
    recipes = named_recipes(methods, head or found_head)
    ranges = arguments.merged_ranges(recipes, search)
    recipes, left_out = arguments.tried(task, recipes, ranges)
    what, each = arguments.described(task, recipes, name) if folder is not None else ({}, dict.fromkeys(recipes, ""))
    journal = Journal(None if folder is None else Path(folder), what)
    from torch_gradmatch.evaluation.study import Study, comparable  # needs what the extra brings

    study = Study(task, recipes, ranges, each, journal, held, draws, seeds, processes, show)
    rows, not_finite = comparable(study.run())
    found = Evidence(_setting(task, held, seeds, draws), rows, left_out | not_finite, bool(permuted), study.refit)
    if show:
        print(found)  # noqa: T201  it is what was asked for
    return found


def _setting(task: Task, held: Mapping[str, Any], seeds: int, draws: int) -> str:
    samples = sum(map(len, task.by_domain.values()))
    step = task.domains_per_step or len(task.by_domain) - 1
    groups = f" in {len(set(task.group_of.values()))} groups" if task.group_of else ""
    return (
        f"{len(task.by_domain)} domains, {samples} samples{groups}, {len(held)} held out in turn; {step} domains in a "
        f"meta-iteration; {task.budget} samples differentiated in a run; {draws} draws of hyperparameters with seed 0, "
        f"the best on {task.validation:.0%} of the training domains then with {seeds} seeds. Means over held-out "
        f"domains and seeds. torch {torch.__version__}"
    )
