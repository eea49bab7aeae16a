"""Labels of all kinds: what the sampler calls its domains, and every label that is an error."""

from __future__ import annotations

import enum
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from _samplers import LABELS, small_sampler
from torch.utils.data import DataLoader

from torch_gradmatch import DomainBatchSampler, meta_batches


def test_labels_are_plain_and_in_the_order_in_which_they_first_appear():
    for domains, labels in (
        ({np.int64(4): [0], np.str_("x"): [1]}, [4, "x"]),
        ([0, "00", "zero", " 0", "1", 10**300], [0, "00", "zero", " 0", "1", 10**300]),
    ):
        found = DomainBatchSampler(domains, 1).labels
        assert [(label, type(label)) for label in found] == [(label, type(label)) for label in labels]


def categorical(values):
    return pd.Series(values, dtype=pd.CategoricalDtype(["never", "d", "c", "b", "a"]))


NUMBERS = ["badc".index(label) for label in LABELS]
KINDS = {
    "pandas-categorical": categorical(LABELS),
    "pandas-str": pd.Series(LABELS),
    "polars-Categorical": pl.Series(LABELS, dtype=pl.Categorical),
    "polars-UInt8": pl.Series(NUMBERS, dtype=pl.UInt8),
    "numpy-str": np.array(LABELS),
    "list-of-numpy-str": list(np.array(LABELS)),
    "numpy-variable-str": np.array(LABELS, dtype=np.dtypes.StringDType()),
    "torch-strided": torch.tensor([NUMBERS, NUMBERS]).T[:, 0],
    "strings-and-integers": [f"{label}1" if label != "d" else 1 for label in LABELS],
    "enum": [enum.Enum("Hospital", {label: label for label in "badc"}, type=str)(label) for label in LABELS],
    "arrow-strings": SimpleNamespace(to_pylist=lambda: LABELS),
    "list-of-tensors": list(torch.tensor(NUMBERS)),
    "mapping-to-pandas": pd.Series(range(21)).groupby(categorical(LABELS), observed=True, sort=False).indices,
    "mapping-to-polars": {key: pl.Series([i for i, label in enumerate(LABELS) if label == key]) for key in "badc"},
    "mapping-to-anything": {-1: range(7), 2: [7, 8, 9], "d": (10,), 0: np.arange(11, 21, dtype=np.uint64)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_label_gives_the_same_batches(kind):
    sampler = DomainBatchSampler(KINDS[kind], 2, domains_per_step=2, seed=3)
    reference = small_sampler()
    assert [list(sampler), list(sampler)] == [list(reference), list(reference)]
    assert {type(label) for label in sampler.labels} <= {str, int}


MISSING = "a label should be a string or an integer; give samples without one their own, or map labels"
INDICES = "should be indices of samples, none below 0"
MALFORMED = {
    "no-label": ([], "domains should hold one label per sample, .*got none"),
    "none": (["a", None, "b"], rf"domains\[1\] is None: {MISSING}"),
    "bytes": ([b"a"], r"domains\[0\] is b'a'"),
    "bool-after-int": ([1, True], r"domains\[1\] is True"),
    "pandas-codes": (categorical(["a", None, "b"]).cat.codes, rf"domains has a -1, by which cat.codes .*{MISSING}"),
    "pandas-string-NA": (pd.Series(["a", pd.NA, "b"], dtype="string"), r"domains\[1\] is <NA>"),
    "pandas-float": (pd.Series([4, 5, None]), r"domains\[2\] is nan"),
    "numpy-masked": (np.ma.array([1, 2], mask=[False, True]), r"domains\[1\] is None"),
    "numpy-matrix": (np.array([["a"], ["b"]]), r"domains\[0\] is \['a'\]"),
    "torch-float": (torch.zeros(3), r"domains\[0\] is 0\.0"),
    "key": ({None: [0]}, rf"a key of domains is None: {MISSING}"),
    "empty": ({"a": [0], "b": np.array([], dtype=int)}, rf"domains\['b'\] {INDICES} \(got array"),
    "negative-index": ({"a": [0], "b": [1, -2]}, rf"domains\['b'\] {INDICES} \(got \[1, -2\]\)"),
    "float-index": ({"a": [0], "b": [1.5]}, rf"domains\['b'\] {INDICES} \(got \[1.5\]\)"),
    "single-index": ({"a": 7}, rf"domains\['a'\] {INDICES} \(got 7\)"),
    "shared-index": ({"a": [0, 4], "b": [1, 4]}, r"sample 4 is in the domains \['a', 'b'\] more than once"),
    "repeated-index": ({"a": [0, 4, 4]}, r"sample 4 is in the domains \['a'\] more than once"),
    "same-text": (np.array([1, "x", "1"], dtype=object), "both the integer 1 and the string '1' as labels: rename one"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_labels_and_indices_that_are_malformed_are_named(kind):
    domains, message = MALFORMED[kind]
    with pytest.raises(ValueError, match=message):
        DomainBatchSampler(domains, 1)


@pytest.mark.parametrize(
    "domains",
    ["abc", b"abc", None, 3, {1, 2}, torch.tensor(3), iter(LABELS), pd.DataFrame({"a": LABELS}), np.ndarray],
    ids=lambda domains: type(domains).__name__,
)
def test_domains_of_another_type_are_refused(domains):
    with pytest.raises(TypeError, match=r"domains should be a sequence of labels or map labels to indices \(got "):
        DomainBatchSampler(domains, 1)


@pytest.mark.parametrize("domains_per_step", [None, 2])
@pytest.mark.parametrize("domains", [["north"] * 3, {"north": [0, 1, 2]}], ids=["labels", "mapping"])
def test_a_single_domain_is_refused_unless_it_is_said_to_be_wanted(domains, domains_per_step):
    message = "domains has one label, 'north': pass domains_per_step=1 for ordinary training$"
    with pytest.raises(ValueError, match=message):
        DomainBatchSampler(domains, 1, domains_per_step=domains_per_step)
    assert len(DomainBatchSampler(domains, 1, domains_per_step=1)) == 3


@pytest.mark.parametrize("number", [7, 8, 9])
def test_labels_fit_a_data_set_of_as_many_samples_and_indices_one_that_has_them_all(number):
    for domains, fits in ((["a", "b"] * 4, number == 8), ({"a": [0, 5], "b": [1, 7]}, number >= 8)):
        sampler = DomainBatchSampler(domains, 1)
        with (
            nullcontext()
            if fits
            else pytest.raises(ValueError, match=f"8 samples, but the data set has {number}: give")
        ):
            meta_batches(DataLoader(range(number), batch_sampler=sampler))
