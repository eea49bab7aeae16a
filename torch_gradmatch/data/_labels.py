"""Which samples a domain has, and what it weighs: labels and weights as users give them, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from torch_gradmatch._checks import check_choice, check_number

IntArray = npt.NDArray[np.int64]
LABEL = "a label should be a string or an integer; give samples without one their own, or map labels to indices"


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
    rows = domains if isinstance(domains, Mapping) else _as_list(domains)
    if not rows:
        raise ValueError("domains should hold one label per sample, or map each label to its samples (got none)")
    found = _from_mapping(rows) if isinstance(rows, Mapping) else _from_labels(rows)
    for label in found:
        if isinstance(label, int) and str(label) in found:
            raise ValueError(f"domains has both the integer {label} and the string '{label}' as labels: rename one")
    return tuple(found), list(found.values())


def _as_list(domains: Any) -> Sequence[Any]:
    """Return the labels of all samples as a sequence, whatever column they come in."""
    labels = domains
    for name in ("tolist", "to_list", "to_pylist"):  # of NumPy, torch and pandas, of Polars, and of Arrow
        if hasattr(labels, name) and not isinstance(labels, type):
            labels = getattr(labels, name)()
    if not isinstance(labels, Sequence) or isinstance(labels, str | bytes):
        raise TypeError(f"domains should be a sequence of labels or map labels to indices (got {domains!r:.80})")
    return labels


def _from_labels(labels: Sequence[Any]) -> dict[str | int, IntArray]:
    """Read one label for each sample."""
    numbers: list[int] = []
    number_of: dict[str | int, int] = {}
    for index, given in enumerate(labels):
        # Whatever is not plainly a label costs more to look at.
        label = given if type(given) is str or type(given) is int else _plain(given)
        if label is None:  # name the row that lacks one: for its sake pandas turns the integers beside it into floats
            index = next((row for row, other in enumerate(labels) if other is None or repr(other) == "nan"), index)
            raise ValueError(f"domains[{index}] is {labels[index]!r:.80}: {LABEL}")
        numbers.append(number_of.setdefault(label, len(number_of)))
    if -1 in number_of:
        raise ValueError(f"domains has a -1, by which cat.codes of pandas marks a missing label: {LABEL}")
    ends = np.bincount(numbers).cumsum()
    return dict(zip(number_of, np.split(np.argsort(numbers, kind="stable"), ends[:-1]), strict=True))


def _from_mapping(domains: Mapping[Any, Any]) -> dict[str | int, IntArray]:
    """Read the samples of each label."""
    found: dict[str | int, IntArray] = {}
    for key, given in domains.items():
        label, indices = _plain(key), np.asarray(given)
        if label is None:
            raise ValueError(f"a key of domains is {key!r:.80}: {LABEL}")
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not indices.size or indices.astype(int).min() < 0:
            raise ValueError(f"domains[{key!r:.80}] should be indices of samples, none below 0 (got {given!r:.80})")
        found[label] = indices.astype(np.int64)
    samples, counts = np.unique(np.concatenate(list(found.values())), return_counts=True)
    for sample in samples[counts > 1][:1]:
        owners = [label for label, indices in found.items() if sample in indices]
        raise ValueError(f"sample {sample} is in the domains {owners!r:.200} more than once: give it once")
    return found


def _plain(given: Any) -> str | int | None:
    """Return a label without what NumPy, torch or an enum make of it, None if it is none."""
    label = given.item() if getattr(given, "ndim", None) == 0 else given
    if isinstance(label, str):
        return str.__str__(label)
    return int(label) if isinstance(label, Integral) and not isinstance(label, bool) else None


def domain_weights(weighting: Any, labels: Sequence[str | int]) -> list[float] | None:
    """Return what every domain weighs in a draw, None for what it has left."""
    if not isinstance(weighting, Mapping):
        chosen = check_choice("weighting, if no mapping from labels,", weighting, ("uniform", "proportional"))
        return [1.0] * len(labels) if chosen == "uniform" else None
    for label in {*labels} ^ {*weighting}:
        which = "lacks" if label in labels else "has the unknown"
        raise ValueError(f"weighting should have one weight for every label (it {which} {label!r:.80})")
    return [check_number(f"weighting[{label!r:.80}]", weighting[label], above=0) for label in labels]
