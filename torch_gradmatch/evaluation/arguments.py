"""What ``leave_one_domain_out`` is given: checked in words, and tried once before anything is trained."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_gradmatch._checks import add_note, check_loss, check_reached
from torch_gradmatch.data._labels import indices_by_domain
from torch_gradmatch.evaluation.cost import describe
from torch_gradmatch.evaluation.recipes import SHARED, Choice, LogUniform, Recipe, Settings, check_ranges, draw_settings
from torch_gradmatch.evaluation.task import Task, near_duplicates, seeded
from torch_gradmatch.evaluation.training import train
from torch_gradmatch.evaluation.trial import linear_layers_called

__all__ = ["described", "merged_ranges", "probed", "tried"]

Ranges = dict[str, dict[str, LogUniform | Choice]]
ORDER = "make_model, dataset, domains, loss_fn, metric"


def check_call(make_model: Any, dataset: Any, functions: Mapping[str, Any]) -> None:
    """Raise if the extra is not installed, or an argument is of another kind.

    Args:
        make_model: As given.
        dataset: As given.
        functions: Other arguments that should be functions, by name.

    Raises:
        ModuleNotFoundError: If SciPy, joblib or tqdm is not installed.
        TypeError: If an argument is of another kind.
    """
    missing = [name for name in ("scipy", "joblib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"this needs {', '.join(missing)}: install the extra, torch_gradmatch[evidence]")
    if isinstance(make_model, nn.Module):
        raise TypeError(
            f"make_model should be a function that returns a new model (got a {type(make_model).__name__}): each run "
            "trains one of its own. Pass the function that builds it, or lambda: copy.deepcopy(model)"
        )
    for name, value in {"make_model": make_model, **functions}.items():
        if not callable(value) and not (name in ("predict", "collate_fn") and value is None):
            raise TypeError(f"{name} should be a function (got {type(value).__name__}): the order is {ORDER}")
    given = type(dataset).__name__
    if hasattr(dataset, "iloc"):
        raise TypeError(f"dataset should be a sequence of samples (got a {given}): pass df.to_dict('records')")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Mapping):
        raise TypeError(f"dataset should be a map-style Dataset or a sequence of samples (got a {given})")


def samples_by_domain(domains: Any, dataset: Any) -> dict[Any, list[int]]:
    """Return the indices of each domain's samples by label.

    Args:
        domains: As given.
        dataset: As given.

    Returns:
        The indices.

    Raises:
        TypeError: If ``domains`` is neither a sequence nor a mapping.
        ValueError: If there are fewer than three domains, one has fewer than two samples, or the labels are not of this
            data set.
    """
    labels, indices = indices_by_domain(domains)
    by_domain = {label: of_domain.tolist() for label, of_domain in zip(labels, indices, strict=True)}
    number, size = 1 + max(map(max, by_domain.values())), len(dataset)
    if number > size or (number < size and not isinstance(domains, Mapping)):
        raise ValueError(
            f"domains should have a label for each of the {size} samples of the dataset (got {number}); to leave "
            "samples out, map labels to indices"
        )
    if len(by_domain) < 3:
        raise ValueError(f"domains should have at least three labels, one of them to hold out (got {len(by_domain)})")
    for label, of_domain in by_domain.items():
        if len(of_domain) < 2:
            raise ValueError(f"domain {label!r} has one sample, to train on or to select by: leave it out, or merge it")
    return by_domain


def groups_of(groups: Any, dataset: Any) -> dict[int, Any]:
    """Return the group of each sample by its index; empty without groups.

    Raises:
        ValueError: If there is not one label for each sample.
    """
    if groups is None:
        return {}
    try:
        labels, indices = indices_by_domain(groups)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("domains", "groups")) from None
    found = {i: label for label, of_group in zip(labels, indices, strict=True) for i in of_group.tolist()}
    if len(found) != (size := len(dataset)):
        raise ValueError(f"groups should have a label for each of the {size} samples of the dataset (got {len(found)})")
    return found


def check_held_out(by_domain: Mapping[Any, Any], held_out: Sequence[Any] | None) -> dict[str, Any]:
    """Return the labels to hold out by their text.

    Raises:
        TypeError: If it is one label.
        ValueError: If one is unknown or there is none.
    """
    if isinstance(held_out, str):
        raise TypeError(f"held_out should be a list of labels (got {held_out!r}): [{held_out!r}]")
    held = {str(label): label for label in (by_domain if held_out is None else held_out)}
    for label in held.values():
        if label not in by_domain:
            raise ValueError(f"held_out should name domains (got {label!r})")
    if not held:
        raise ValueError("held_out should name at least one domain (got none)")
    return held


def merged_ranges(recipes: Mapping[str, Recipe], search: Mapping[str, LogUniform | Choice] | None) -> Ranges:
    """Return the ranges of each recipe's hyperparameters.

    Args:
        recipes: By name.
        search: Instead of their own.

    Returns:
        The ranges.

    Raises:
        TypeError: If ``search`` maps to something that is no range.
        ValueError: If it names a hyperparameter that no recipe has.
    """
    search = {} if search is None else search
    check_ranges("search", search)
    own: Ranges = {name: SHARED | dict(recipe.search) for name, recipe in recipes.items()}
    known = sorted({name for ranges in own.values() for name in ranges})
    for name in search:
        if name not in known:
            raise ValueError(f"search should name hyperparameters among {', '.join(known)} (got {name!r})")
    return {m: {name: search.get(name, value) for name, value in ranges.items()} for m, ranges in own.items()}


def made(task: Task) -> nn.Module:
    """Make two models.

    Args:
        task: Makes them.

    Returns:
        The second, on the device.

    Raises:
        TypeError: If something else is made.
        ValueError: If they share parameters: then every run would train the model of the one before.
    """
    first, model = task.make_model(), task.make_model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_model should return a torch.nn.Module (got {type(model).__name__})")
    places = {p.untyped_storage().data_ptr() for p in first.parameters() if p.numel()}
    for name, p in model.named_parameters():
        if p.numel() and p.untyped_storage().data_ptr() in places:
            raise ValueError(
                f"make_model returned the same {name} twice, so each run would go on with the model of the one before: "
                "let it build a new model, or return copy.deepcopy(model)"
            )
    return model.to(task.device)


def probed(task: Task) -> str | None:
    """Evaluate the loss once for each domain and the metric for all samples, and look for near-identical samples.

    Args:
        task: What is to be learned.

    Returns:
        The name of the model's head: the linear layer that its forward pass calls last, with something below it.

    Raises:
        TypeError: If the model is none.
        ValueError: If models share parameters, or a loss or the metric is not as it should be.
    """
    with seeded(0, task.device):
        model = made(task)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with linear_layers_called(model) as called:
            for indices in task.by_domain.values():
                loss = check_loss(task.loss_fn(model.eval(), task.batch(indices[:8])), 0)
                check_reached(torch.autograd.grad(loss, parameters, allow_unused=True), 0)
        for label, indices in task.by_domain.items():
            try:
                score = task.score(model, indices)[0]
            except Exception as error:
                add_note(error, f"raised when the metric was called with domain {label!r}")
                raise
            if not math.isfinite(score):
                raise ValueError(
                    f"the metric of domain {label!r} is {score} before training: look at its samples, or leave it out"
                )
    if not task.group_of and (found := near_duplicates(task)):
        shown = ", ".join(f"{share:.0%} of {label!r}" for label, share in found.items())
        warnings.warn(
            f"many samples have a near-identical twin in their domain ({shown}), and no groups are given: if they "
            "come from one patient, recording or scene, selection is blind to what is memorized. Pass groups=",
            stacklevel=3,
        )
    return called[-1] if called else None


def tried(
    task: Task, recipes: Mapping[str, Recipe], ranges: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Take one step by every recipe.

    Args:
        task: What is to be learned.
        recipes: By name.
        ranges: Of their hyperparameters.

    Returns:
        The recipes that can be carried out; and by name, why others cannot.

    Raises:
        Exception: What the first recipe raises.
    """
    working, left_out = {}, {}
    brief = replace(task, budget=1, evaluations=1, predictions=False)
    for name, recipe in recipes.items():
        try:
            _take_a_step(brief, recipe, draw_settings(ranges[name], 0, 0))
            working[name] = recipe
        except Exception as error:
            if name == next(iter(recipes)):
                raise
            left_out[name] = describe(error)
            warnings.warn(f"{name} is left out, since its first step failed: {left_out[name]}", stacklevel=3)
    return working, left_out


def _take_a_step(task: Task, recipe: Recipe, settings: Settings) -> None:
    run, _ = train(task, recipe, settings, None, 0)
    if run["stopped"] is not None:
        raise RuntimeError(run["stopped"])


def described(task: Task, recipes: Mapping[str, Recipe], name: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the runs of a folder depend on.

    Args:
        task: What is to be learned.
        recipes: By name.
        name: The user's own name for what cannot be hashed.

    Returns:
        Of the task, and of each recipe.

    Raises:
        ValueError: If something cannot be hashed and has no name.
    """
    from torch_gradmatch.evaluation.fingerprint import UnhashableError, fingerprint, fingerprint_of_data

    def of(what: str, value: Any, read: Callable[[Any], str] = fingerprint) -> str:
        try:
            return read(value)
        except UnhashableError as error:
            if name is None:
                raise ValueError(
                    f"folder= needs to know whether its runs are of the same {what}, and {error}: pass name=, a name "
                    "of your own that changes whenever it does"
                ) from error
            return f"name={name}"

    with seeded(0):
        model = task.make_model()
    optimizer = task.optimizer(model.parameters(), lr=1e-3, weight_decay=0.0)
    task_parts = {
        "torch": torch.__version__,
        "data": of("dataset", task.dataset, fingerprint_of_data),
        "domains": fingerprint(task.by_domain),
        "groups": fingerprint(dict(task.group_of)),
        "model": of("make_model", [task.make_model, model.state_dict()]),
        **{part: of(part, getattr(task, part)) for part in ("loss_fn", "metric", "predict", "collate_fn")},
        "optimizer": f"{type(optimizer).__name__}({optimizer.defaults}) {of('optimizer', task.optimizer)}",
        **{part: getattr(task, part) for part in ("device", "budget", "evaluations", "validation", "domains_per_step")},
        "predictions": task.predictions,
        "name": name,
    }
    return task_parts, {key: of(f"methods[{key!r}]", recipe) for key, recipe in recipes.items()}
