"""Which samples a domain has, and what it weighs: labels and weights as users give them, read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NoReturn, cast

import numpy as np
from torch.utils.data import Sampler

from torch_gradmatch._checks import check_number
from torch_gradmatch.data._draw import IntArray

__all__ = ["check_label", "domain_weights", "indices_by_domain"]

MISSING = "give samples without one a label of their own, or leave them out: map labels to indices"


def indices_by_domain(domains: Any) -> tuple[tuple[str | int, ...], list[IntArray]]:
    """Sort the samples of a data set by domain.

    Args:
        domains: As in :class:`torch_gradmatch.DomainBatchSampler`.

    Returns:
        The labels as ``str`` and ``int``, in the order in which they first appear, and the indices of each one's
        samples.

    Raises:
        TypeError: If ``domains`` is neither a sequence nor a mapping.
        ValueError: If a label or index is missing, malformed or given twice, a string and an integer read the same, or
            a domain is empty.
    """
    labels, indices = (_from_mapping if isinstance(domains, Mapping) else _from_labels)(domains)
    strings = {label for label in labels if isinstance(label, str)}
    for label in labels:
        if isinstance(label, int) and abs(label) < 10**18 and str(label) in strings:
            raise ValueError(f"domains has both the integer {label} and the string '{label}' as labels: rename one")
    return tuple(labels), indices


def _from_labels(domains: Any) -> tuple[list[str | int], list[IntArray]]:
    """Read one label for each sample."""
    numbers: list[int] = []
    number_of: dict[str | int, int] = {}
    labels = _as_list(domains)
    for index, given in enumerate(labels):
        label: Any = given
        if type(label) is not str and type(label) is not int:  # the usual ones cost nothing
            if getattr(label, "ndim", None) == 0 and not isinstance(label, np.generic):  # a tensor for each sample
                label = label.item()
            if not _is_label(label):
                _refuse_label(labels, index)
        if label == -1:
            raise ValueError(f"domains[{index}] is -1, by which cat.codes of pandas marks a missing label: {MISSING}")
        numbers.append(number_of.setdefault(label, len(number_of)))
    if not numbers:
        raise ValueError("domains should hold one label per sample (got none)")
    ends = np.bincount(numbers).cumsum()
    return [_plain(label) for label in number_of], np.split(np.argsort(numbers, kind="stable"), ends[:-1])


def _as_list(domains: Any) -> Sequence[Any]:
    """Return the labels of all samples as a sequence, whatever column they come in."""
    # NumPy, torch and pandas say tolist, Polars to_list, Arrow to_pylist.
    readers = [getattr(domains, name) for name in ("tolist", "to_list", "to_pylist") if hasattr(domains, name)]
    if isinstance(domains, type | str | bytes) or not (isinstance(domains, Sequence) or readers):
        advice = ": pass a list of what it yields" if isinstance(domains, Iterator) else ""
        if isinstance(domains, Sampler):  # Lightning has built the sampler again around one of its own
            advice = ": pass Lightning's Trainer(use_distributed_sampler=False), and num_replicas, rank and split here"
        raise TypeError(
            f"domains should be a sequence of labels or a mapping from label to indices (got {domains!r:.80}){advice}"
        )
    if getattr(domains, "ndim", 1) != 1:
        raise ValueError(f"domains should have one dimension, one label per sample (got shape {(*domains.shape,)})")
    return cast("Sequence[Any]", readers[0]() if readers else domains)


def _refuse_label(labels: Sequence[Any], index: int) -> NoReturn:
    """Raise for the row that is missing where one is: it makes pandas turn the integers beside it into floats."""
    index = next((row for row, label in enumerate(labels) if label is None or repr(label) == "nan"), index)
    raise ValueError(
        f"domains[{index}] is {labels[index]!r:.80}: the label of a domain should be a string or an integer; {MISSING}"
    )


def _from_mapping(domains: Mapping[Any, Any]) -> tuple[list[str | int], list[IntArray]]:
    """Read the samples of each label."""
    found: dict[str | int, IntArray] = {}
    for key, given in domains.items():
        label = check_label("domains", key)
        try:
            indices = np.asarray(given)
        except (TypeError, ValueError):  # nested lists of unequal lengths
            indices = np.asarray(None)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"domains[{key!r:.80}] should be a sequence of sample indices (got {given!r:.80})")
        indices = indices.astype(np.int64)
        if not indices.size or indices.min() < 0:
            which = f"got {indices.min()}" if indices.size else "the domain is empty"
            raise ValueError(f"domains[{key!r:.80}] should hold at least one sample index, none below 0 ({which})")
        found[label] = indices
    if not found:
        raise ValueError("domains should map each label to its samples (got no domain)")
    labels, indices_of = list(found), list(found.values())
    samples = np.concatenate(indices_of)
    order = samples.argsort(kind="stable")
    for repeat in np.flatnonzero(np.diff(samples[order]) == 0)[:1]:
        owners = np.repeat(np.arange(len(labels)), list(map(len, indices_of)))
        one, other = (labels[owners[position]] for position in order[repeat : repeat + 2])
        where = f"domains[{one!r:.80}] and again in domains[{other!r:.80}]"
        raise ValueError(f"sample {samples[order[repeat]]} is in {where}: give it once")
    return labels, indices_of


def check_label(name: str, key: Any) -> str | int:
    """Return a key of the argument ``name`` as a plain label, if it can be the label of a domain."""
    if not _is_label(key):
        raise ValueError(f"a key of {name} is {key!r:.80}: the label of a domain should be a string or an integer")
    return _plain(key)


def _is_label(label: Any) -> bool:
    return isinstance(label, str | Integral) and not isinstance(label, bool)


def _plain(label: Any) -> str | int:
    """Return a label without the subclass that NumPy or an enum gives it."""
    return str.__str__(label) if isinstance(label, str) else int(label)


def domain_weights(
    weighting: Any, labels: Sequence[str | int], choices: Sequence[str] = ("uniform", "proportional")
) -> list[float] | None:
    """Return what every domain weighs in a draw.

    Args:
        weighting: As in :class:`torch_gradmatch.DomainBatchSampler`.
        labels: The domains' labels.
        choices: The words that are accepted.

    Returns:
        Positive numbers, or None for ``"proportional"``, whose weights change.

    Raises:
        ValueError: If ``weighting`` is none, names other labels than there are or has a weight that is no positive
            finite number.
    """
    if isinstance(weighting, str) and weighting in choices:
        return [1.0] * len(labels) if weighting == "uniform" else None
    if not isinstance(weighting, Mapping):
        raise ValueError(
            f"weighting should be one of {', '.join(map(repr, choices))}, or a mapping from every label to a positive "
            f"weight (got {weighting!r:.80})"
        )
    known = set(labels)
    if wrong := [label for label in (*labels, *weighting) if label not in weighting or label not in known]:
        which = "lacks" if wrong[0] in known else "has the unknown"
        raise ValueError(f"weighting should have one weight for every label (it {which} {wrong[0]!r:.80})")
    return [check_number(f"weighting[{label!r:.80}]", weighting[label], above=0) for label in labels]
