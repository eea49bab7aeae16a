"""Which samples a domain has, and what it weighs: labels and weights as users give them, read and checked."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

__all__ = ["IntArray", "ListLike", "check_short", "domain_weights", "indices_by_domain", "shown"]

IntArray = npt.NDArray[np.int64]
Checked = TypeVar("Checked")
MAX_RATIO = 1e100  # of two domains' weights; draws multiply their sum by floats


class _ToList(Protocol):
    """What NumPy arrays, torch tensors and pandas Series have in common."""

    def tolist(self) -> Any:
        """Return the elements as a list."""


class _PolarsToList(Protocol):
    """What Polars Series have."""

    def to_list(self) -> Any:
        """Return the elements as a list."""


ListLike: TypeAlias = _ToList | _PolarsToList


# Values in messages


class _ShortRepr(reprlib.Repr):
    """``repr`` that does not write out what is long, to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out integers of more than 4300 digits."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<an integer of {x.bit_length()} bits>"


_SHORT_REPR = _ShortRepr()


def shown(value: object) -> str:
    """Return a value as an error message shows it.

    Args:
        value: Anything.

    Returns:
        At most 200 characters, the whole ``repr`` where that is short.
    """
    text = _SHORT_REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-77:]}"


class _Shown:
    """Stands for a value in a message."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return shown(self.value)


def check_short(check: Callable[..., Checked], name: str, value: object, *limits: Any) -> Checked:
    """Return what ``check(name, value, *limits)`` returns; its error message shows a long value shortened.

    Args:
        check: ``check_int``, ``check_bool`` or ``check_choice``.
        name: Name of the argument, for the message.
        value: What the caller passed.
        *limits: What is accepted.

    Returns:
        The value.
    """
    # What the checks accept is short or a large positive integer.
    accepted = (isinstance(value, Integral) and int(value) > -(10**80)) or (isinstance(value, str) and len(value) < 80)
    return check(name, value if accepted else _Shown(value), *limits)


# Labels


def indices_by_domain(domains: Any, overlapping: bool = False) -> tuple[list[str | int], list[IntArray]]:
    """Sort the samples of a data set by domain.

    Args:
        domains: As in :class:`torch_gradmatch.DomainBatchSampler`.
        overlapping: Whether a sample may be in several domains (of a mapping), though in each only once.

    Returns:
        The labels as ``str`` and ``int``, in the order in which they first appear, and the indices of each one's
        samples.

    Raises:
        TypeError: If ``domains`` is neither a sequence nor a mapping.
        ValueError: If a label or index is missing, malformed or given twice, a string and an integer read the same, or
            a domain is empty.
    """
    if isinstance(domains, Mapping):
        labels, indices = _indices_from_mapping(domains, overlapping)
    else:
        labels, indices = _indices_from_labels(domains)
    strings = {label for label in labels if isinstance(label, str)}
    for label in labels:
        if not isinstance(label, str) and label.bit_length() < 10_000 and str(label) in strings:
            raise ValueError(
                f"domains has both the integer {shown(label)} and the string {shown(str(label))} as labels: if they "
                "are one domain, make them one type, else rename one"
            )
    return labels, indices


def _indices_from_labels(domains: Any) -> tuple[list[str | int], list[IntArray]]:
    """Return the labels and each one's samples from one label for each sample."""
    # NumPy, torch and pandas say tolist, Polars says to_list.
    to_list = getattr(domains, "tolist", None) or getattr(domains, "to_list", None)
    if isinstance(domains, type | str | bytes) or not (isinstance(domains, Sequence) or callable(to_list)):
        advice = ": pass a list of what it yields" if isinstance(domains, Iterator) else ""
        if isinstance(domains, Sampler):
            advice = (
                ": a framework has built the sampler again around one of its own. Let it be: Lightning's "
                "Trainer(use_distributed_sampler=False), and num_replicas=, rank= and split= here"
            )
        raise TypeError(
            f"domains should be a sequence of labels or a mapping from label to indices (got {shown(domains)}){advice}"
        )
    if getattr(domains, "ndim", 1) != 1:
        raise ValueError(
            f"domains should have one dimension, one label per sample (got shape {shown(tuple(domains.shape))})"
        )
    numbers: list[int] = []
    number_of: dict[Any, int] = {}
    for index, label in enumerate(domains if to_list is None else to_list()):
        if type(label) is not str and type(label) is not int:  # the usual ones cost nothing
            advice = "; give samples without one a label of their own, or leave them out: map labels to indices"
            _check_label(f"domains[{index}]", label, advice)
        numbers.append(number_of.setdefault(label, len(number_of)))
    if not numbers:
        raise ValueError("domains should hold one label per sample (got none)")
    ends = np.bincount(numbers).cumsum()
    return [_plain(label) for label in number_of], np.split(np.argsort(numbers, kind="stable"), ends[:-1])


def _indices_from_mapping(domains: Mapping[Any, Any], overlapping: bool) -> tuple[list[str | int], list[IntArray]]:
    """Return the labels and each one's samples from a mapping of the one to the other."""
    labels: list[str | int] = []
    indices_of: list[IntArray] = []
    for key, given in domains.items():
        _check_label("a key of domains", key)
        labels.append(_plain(key))
        try:
            indices = np.asarray(given)
        except (TypeError, ValueError):  # nested lists of unequal lengths
            indices = np.asarray(None)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"domains[{shown(key)}] should be a sequence of sample indices (got {shown(given)})")
        indices_of.append(indices.astype(np.int64))
    empty = [label for label, indices in zip(labels, indices_of, strict=True) if not indices.size]
    if empty or not labels:
        which = f"domain {shown(empty[0])} is empty, {len(empty)} of {len(labels)} are" if empty else "got no domain"
        raise ValueError(f"domains should map each label to at least one sample index ({which})")
    samples = np.concatenate(indices_of)
    owners = np.repeat(np.arange(len(labels)), [indices.size for indices in indices_of])
    order = samples.argsort(kind="stable")
    if samples[order[0]] < 0:
        owner = labels[owners[order[0]]]
        raise ValueError(f"domains[{shown(owner)}] should hold indices of at least 0 (got {samples[order[0]]})")
    # A stable sort keeps each sample's owners in order: the same one twice stands side by side.
    repeated = np.diff(samples[order]) == 0
    if overlapping:
        repeated &= np.diff(owners[order]) == 0
    for repeat in np.flatnonzero(repeated)[:1]:
        one, other = (labels[owners[position]] for position in order[repeat : repeat + 2])
        hint = "" if overlapping or one == other else " or, if domains may share samples, pass overlapping=True"
        raise ValueError(
            f"sample {samples[order[repeat]]} is in domains[{shown(one)}] and again in domains[{shown(other)}]: "
            f"give it once{hint}"
        )
    return labels, indices_of


def _check_label(name: str, label: object, advice: str = "") -> None:
    """Raise unless ``label`` is a string or an integer."""
    accepted = isinstance(label, str | Integral) and not isinstance(label, bool)
    if not accepted:
        raise ValueError(f"{name} is {shown(label)}: the label of a domain should be a string or an integer{advice}")


def _plain(label: Any) -> str | int:
    """Return a label without the subclass that NumPy or an enum gives it."""
    return str.__str__(label) if isinstance(label, str) else int(label)


# Weights


def domain_weights(weighting: Any, labels: Sequence[str | int], sizes: Sequence[int]) -> tuple[list[int] | None, str]:
    """Return what every domain weighs in a draw.

    Args:
        weighting: As in :class:`torch_gradmatch.DomainBatchSampler`.
        labels: The domains' labels.
        sizes: The samples of each.

    Returns:
        Integers in the ratio of the weights, exactly, with no common divisor, or None for ``"proportional"``, whose
        weights change; and a string that tells the weighting from any other, for a state dict.

    Raises:
        ValueError: If ``weighting`` is none, names other labels than there are or has a weight that is no positive
            finite number.
    """
    if isinstance(weighting, Mapping):
        weights = _integers(_weights_by_label(weighting, labels))
        written = ",".join(format(weight, "x") for weight in weights)
        return weights, f"weights {hashlib.blake2b(written.encode(), digest_size=16).hexdigest()}"
    if isinstance(weighting, str) and weighting in {"uniform", "proportional"}:
        return [1] * len(labels) if weighting == "uniform" else None, str.__str__(weighting)
    real = isinstance(weighting, Real) and not isinstance(weighting, bool)
    if not real or not 0 <= weighting <= 1:
        raise ValueError(
            "weighting should be 'uniform', 'proportional', a number from 0 to 1 or a mapping from every label to a "
            f"positive weight (got {shown(weighting)})"
        )
    exponent = float(weighting)
    return _integers(float(size) ** exponent for size in sizes), f"exponent {exponent}"


def _weights_by_label(weighting: Mapping[Any, Any], labels: Sequence[str | int]) -> list[float]:
    """Return the weights in the order of the labels."""
    known = set(labels)
    missing = [label for label in labels if label not in weighting]
    unknown = [label for label in weighting if label not in known]
    for which, wrong in (("no weight for", missing), ("a weight for the unknown label", unknown)):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(
                f"weighting should give a weight to every label of domains and to no other (got {which} "
                f"{shown(wrong[0])}{more}); the labels are {shown(list(labels))}"
            )
    weights: list[float] = []
    for label in labels:
        weight = weighting[label]
        try:
            number = float(weight) if isinstance(weight, Real) and not isinstance(weight, bool) else math.nan
        except OverflowError:  # a huge integer
            number = math.inf
        if not 0 < number < math.inf:
            raise ValueError(f"weighting[{shown(label)}] should be a positive finite number (got {shown(weight)})")
        weights.append(number)
    if max(weights) > MAX_RATIO * min(weights):
        raise ValueError(
            "weighting should hold weights within a factor of 1e100 of one another "
            f"(got {min(weights)} and {max(weights)})"
        )
    return weights


def _integers(weights: Iterable[float]) -> list[int]:
    """Return integers in the same ratios, exactly: a float is an integer over a power of two."""
    ratios = [weight.as_integer_ratio() for weight in weights]
    common = max(denominator for _, denominator in ratios)
    integers = [numerator * (common // denominator) for numerator, denominator in ratios]
    divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers]
