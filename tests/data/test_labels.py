"""Labels of all kinds: what the sampler calls its domains, and every label that is an error."""

from __future__ import annotations

import enum

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from _samplers import LABELS, samplers, small_sampler
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch.data.sampler import DomainBatchSampler

# What the sampler calls its domains


@pytest.mark.parametrize(
    ("domains", "labels"),
    [
        (LABELS, ("b", "a", "d", "c")),
        (np.array(LABELS), ("b", "a", "d", "c")),
        (list(np.array(LABELS)), ("b", "a", "d", "c")),
        (torch.tensor([5, 2, 5, 9]), (5, 2, 9)),
        (list(np.array([5, 2, 5, 9])), (5, 2, 9)),
        ({"y": [0], "x": [1]}, ("y", "x")),
        ({np.int64(4): [0], np.str_("x"): [1]}, (4, "x")),
    ],
    ids=["list", "array", "numpy-strings", "tensor", "numpy-integers", "mapping", "numpy-keys"],
)
def test_labels_are_plain_and_in_the_order_in_which_they_first_appear(domains, labels):
    sampler = DomainBatchSampler(domains, 1)
    assert sampler.labels == labels
    assert [type(label) for label in sampler.labels] == [type(label) for label in labels]


# Every kind of label


def categorical(values):
    return pd.Series(values, dtype=pd.CategoricalDtype(["never", "d", "c", "b", "a"]))


class Arrow:
    """A column as pyarrow has it, which is no sequence."""

    def __init__(self, values):
        self.values = values

    def to_pylist(self):
        return self.values


NUMBERS = ["badc".index(label) for label in LABELS]
KINDS = {
    "pandas-object": pd.Series(LABELS, dtype=object),
    "pandas-str": pd.Series(LABELS),
    "pandas-string": pd.Series(LABELS, dtype="string"),
    "pandas-categorical": categorical(LABELS),
    "pandas-other-index": pd.Series(LABELS, index=range(100, 121)),
    "pandas-int64": pd.Series(NUMBERS),
    "pandas-Int64": pd.Series(NUMBERS, dtype="Int64"),
    "pandas-int-categorical": pd.Series(NUMBERS, dtype="category"),
    "pandas-index": pd.Index(LABELS),
    "pandas-array": pd.array(NUMBERS, dtype="Int8"),
    "polars-String": pl.Series(LABELS),
    "polars-Categorical": pl.Series(LABELS, dtype=pl.Categorical),
    "polars-Enum": pl.Series(LABELS, dtype=pl.Enum(["d", "c", "b", "a"])),
    "polars-Int64": pl.Series(NUMBERS),
    "polars-UInt8": pl.Series(NUMBERS, dtype=pl.UInt8),
    "numpy-str": np.array(LABELS),
    "numpy-variable-str": np.array(LABELS, dtype=np.dtypes.StringDType()),
    "numpy-object": np.array(LABELS, dtype=object),
    "numpy-uint8": np.array(NUMBERS, dtype=np.uint8),
    "numpy-strided": np.array(LABELS)[::-1][::-1],
    "torch-int8": torch.tensor(NUMBERS, dtype=torch.int8),
    "torch-strided": torch.tensor([NUMBERS, NUMBERS]).T[:, 0],
    "list": LABELS,
    "tuple": tuple(NUMBERS),
    "list-of-numpy-integers": list(np.array(NUMBERS)),
    "strings-and-integers": [f"{label}1" if label != "d" else 1 for label in LABELS],
    "enum": [enum.Enum("Hospital", {label: label for label in "badc"}, type=str)(label) for label in LABELS],
    "mapping-to-pandas": pd.Series(range(21)).groupby(categorical(LABELS), observed=True, sort=False).indices,
    "mapping-to-polars": {
        label: pl.Series([i for i, other in enumerate(LABELS) if other == label]) for label in "badc"
    },
    "mapping-to-anything": {-1: range(7), 2: [7, 8, 9], "d": (10,), 0: np.arange(11, 21, dtype=np.uint64)},
    "arrow-strings": Arrow(LABELS),
    "arrow-integers": Arrow(NUMBERS),
    "list-of-tensors": list(torch.tensor(NUMBERS)),
    "mapping-to-torch": {label: torch.tensor([i for i in range(21) if LABELS[i] == label]) for label in "badc"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_label_gives_the_same_batches(kind):
    sampler = DomainBatchSampler(KINDS[kind], 2, domains_per_step=2, seed=3)
    reference = small_sampler()
    assert [list(sampler), list(sampler)] == [list(reference), list(reference)]
    assert {type(label) for label in sampler.labels} <= {str, int}


MISSING = "a label should be a string or an integer; give samples without one their own, or map labels"
MALFORMED = {
    "pandas-codes": (categorical(["a", None, "b"]).cat.codes, rf"domains has a -1, by which cat.codes .*{MISSING}"),
    "arrow-null": (Arrow(["a", None]), r"domains\[1\] is None"),
    "list-of-float-tensors": (list(torch.zeros(2)), r"domains\[0\] is tensor\(0\.\)"),
    "pandas-object-None": (pd.Series(["a", "b", None], dtype=object), rf"domains\[2\] is None: .*{MISSING}"),
    "pandas-str-NaN": (pd.Series(["a", None, "b"]), rf"domains\[1\] is (nan|None): .*{MISSING}"),
    "pandas-string-NA": (pd.Series(["a", pd.NA, "b"], dtype="string"), rf"domains\[1\] is <NA>: .*{MISSING}"),
    "pandas-categorical-NaN": (categorical(["a", "b", None]), rf"domains\[2\] is nan: .*{MISSING}"),
    "pandas-Int64-NA": (pd.Series([4, 5, pd.NA], dtype="Int64"), rf"domains\[2\] is <NA>: .*{MISSING}"),
    "pandas-other-index": (pd.Series(["a", None], index=[7, 9], dtype=object), r"domains\[1\] is None"),
    "pandas-float": (pd.Series([4, 5, None]), rf"domains\[2\] is nan: .*{MISSING}"),
    "pandas-bool": (pd.Series([True, False]), r"domains\[0\] is True: "),
    "pandas-date": (pd.Series(pd.to_datetime(["2026-01-01"])), r"domains\[0\] is Timestamp"),
    "polars-null": (pl.Series(["a", None]), rf"domains\[1\] is None: .*{MISSING}"),
    "polars-Categorical-null": (pl.Series(["a", None], dtype=pl.Categorical), r"domains\[1\] is None"),
    "polars-Enum-null": (pl.Series(["a", None], dtype=pl.Enum(["a"])), r"domains\[1\] is None"),
    "polars-Int64-null": (pl.Series([1, None, 2]), r"domains\[1\] is None"),
    "polars-Boolean": (pl.Series([True]), r"domains\[0\] is True"),
    "polars-List": (pl.Series([[1]]), r"domains\[0\] is \[1\]"),
    "numpy-structured": (np.array([("a", 1)], dtype=[("name", "U1"), ("year", int)]), r"domains\[0\] is \('a', 1\)"),
    "numpy-masked": (np.ma.array([1, 2], mask=[False, True]), r"domains\[1\] is None"),
    "numpy-bytes": (np.array([b"a"]), r"domains\[0\] is b'a'"),
    "numpy-matrix": (np.array([["a"], ["b"]]), r"domains\[0\] is \['a'\]"),
    "torch-matrix": (torch.zeros(2, 1, dtype=torch.long), r"domains\[0\] is \[0\]"),
    "torch-float": (torch.zeros(3), r"domains\[0\] is 0\.0"),
    "ragged-indices": ({"a": [[1], [2, 3]]}, "inhomogeneous"),
    "generator-of-indices": ({"a": (i for i in range(3))}, r"domains\['a'\] should be .* \(got <generator"),
    "huge-index": ({"a": [2**70]}, r"domains\['a'\] should be indices of samples"),
    "same-text": ([0, "0"], "domains has both the integer 0 and the string '0' as labels: rename one"),
    "same-text-array": (np.array([1, "x", "1"], dtype=object), "both the integer 1 and the string '1'"),
    "same-text-mapping": ({"-3": [0], -3: [1], 7: [2]}, "both the integer -3 and the string '-3'"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_labels_that_are_malformed_are_named(kind):
    domains, message = MALFORMED[kind]
    with pytest.raises(ValueError, match=message):
        DomainBatchSampler(domains, 1)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ((label for label in LABELS), r"\(got <generator object"),
        (iter(LABELS), r"\(got <list_?iterator object"),
        (pd.DataFrame({"hospital": LABELS}), r"sequence of labels or map labels to indices \(got  +hospital"),
        (pl.DataFrame({"hospital": LABELS}), r"sequence of labels or map"),
        (np.ndarray, r"got <class 'numpy.ndarray'>"),
    ],
    ids=["generator", "iterator", "pandas-frame", "polars-frame", "class"],
)
def test_domains_of_another_type_are_refused(domains, message):
    with pytest.raises(TypeError, match=message):
        DomainBatchSampler(domains, 1)


def test_strings_and_integers_that_read_differently_may_be_mixed():
    labels = (0, "00", "zero", " 0", "1", 10**300)
    assert DomainBatchSampler(labels, 1).labels == labels


@pytest.mark.parametrize("domains_per_step", [None, 2])
@pytest.mark.parametrize("domains", [["north"] * 3, {"north": [0, 1, 2]}], ids=["labels", "mapping"])
def test_a_single_domain_is_refused_unless_it_is_said_to_be_wanted(domains, domains_per_step):
    message = "domains has one label, 'north': pass domains_per_step=1 for ordinary training$"
    with pytest.raises(ValueError, match=message):
        DomainBatchSampler(domains, 1, domains_per_step=domains_per_step)
    assert len(DomainBatchSampler(domains, 1, domains_per_step=1)) == 3


# Whether labels fit the data set


@given(case=samplers(), data=st.data())
@settings(deadline=None)
def test_labels_per_sample_fit_a_data_set_of_as_many_samples_alone(case, data):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    sampler.check_dataset(len(labels))
    number = data.draw(st.integers(0, 2 * len(labels)).filter(lambda number: number != len(labels)))
    with pytest.raises(ValueError, match=f"for {len(labels)} samples, but the data set has {number}: give each"):
        sampler.check_dataset(number)


@given(
    indices=st.lists(st.sets(st.integers(0, 50), min_size=1, max_size=5), min_size=2, max_size=5),
    number=st.integers(0, 60),
)
@settings(deadline=None)
def test_a_mapping_fits_a_data_set_that_has_all_its_indices(indices, number):
    domains = {f"d{place}": [place + len(indices) * index for index in own] for place, own in enumerate(indices)}
    sampler = DomainBatchSampler(domains, 1)
    largest = max(map(max, domains.values()))
    if largest < number:
        sampler.check_dataset(number)
        return
    with pytest.raises(ValueError, match=f"for {largest + 1} samples, but the data set has {number}: give each"):
        sampler.check_dataset(number)
