"""Cosines of single pairs of domains, against each pair by itself, and their picture."""

from __future__ import annotations

import pytest
import torch
from _reference import mean_pairwise_cosine, pairwise_cosines, with_rest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_gradmatch.gradients.alignment import GradientAlignment, gradient_alignment

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex128]


@st.composite
def gradients(draw: st.DrawFn) -> list[list[Tensor | None]]:
    """Of 2 to 6 domains over 3 parameters: some missing, one strided, some complex, half or sparse, some zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    found: list[list[Tensor | None]] = []
    for _ in range(draw(st.integers(2, 6))):
        domain: list[Tensor | None] = []
        for index, dtype in enumerate(dtypes):
            g = torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype)
            kind = draw(st.sampled_from(["dense", "none", "transposed", "zero"]))
            g = {"transposed": g.T.contiguous().T, "zero": torch.zeros_like(g)}.get(kind, g)
            domain.append(None if kind == "none" and index else g)
        found.append(domain)
    return found


def flat(domain: list[Tensor | None]) -> Tensor:
    parts = [torch.zeros(4, 3) if g is None else torch.view_as_real(g) if g.is_complex() else g for g in domain]
    # A complex parameter counts as twice as many real ones, also where a domain has no gradient for it.
    return torch.cat([p.double().reshape(-1) for p in parts])


@settings(deadline=None)
@given(domains=gradients())
def test_cosines_are_those_of_each_pair_by_itself(domains: list[list[Tensor | None]]):
    complex_at = [any(d[i] is not None and d[i].is_complex() for d in domains) for i in range(3)]
    whole = [
        [torch.zeros(4, 3, dtype=torch.complex128 if complex_at[i] else None) if g is None else g
         for i, g in enumerate(d)] for d in domains
    ]  # fmt: skip
    alignment = GradientAlignment(pairs=True)
    for d in domains:
        alignment.add(d)
    measured, vectors = alignment.result(), [flat(d) for d in whole]
    exact = all(g is None or g.dtype in (torch.float64, torch.complex128) for d in domains for g in d)
    tolerance = 1e-12 if exact else 2e-5
    torch.testing.assert_close(measured.cosines.double(), pairwise_cosines(vectors), rtol=0, atol=tolerance)
    torch.testing.assert_close(measured.cosine.double(), mean_pairwise_cosine(vectors), rtol=0, atol=2e-5)


def cosines_of_pairs(domains: list[list[Tensor | None]]) -> Tensor:
    alignment = GradientAlignment(pairs=True)
    for gradient in domains:
        alignment.add(gradient)
    return alignment.result().cosines


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), order=st.permutations(range(4)), factor=st.floats(0.1, 10))
def test_they_follow_the_order_and_not_the_size(seed: int, order: list[int], factor: float):
    vectors = list(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    plain = cosines_of_pairs([[g] for g in vectors])
    moved = cosines_of_pairs([[factor * vectors[i]] for i in order])
    torch.testing.assert_close(moved, plain[order][:, order])
    torch.testing.assert_close(plain, plain.T, rtol=0, atol=1e-15)


def test_the_gradients_are_copies():
    alignment, gradient = GradientAlignment(pairs=True), torch.tensor([1.0, 0.0])
    alignment.add([gradient])
    gradient.copy_(torch.tensor([0.0, 1.0]))
    alignment.add([gradient])
    assert alignment.result().cosines.tolist() == [[1.0, 0.0], [0.0, 1.0]]


# ---------------------------------------------------------------------------------------------------------- the rest


@st.composite
def lengths(draw: st.DrawFn) -> list[Tensor]:
    """Gradients of 1 to 7 domains, of very different lengths, some of them zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-4, 1.0, 1e3]), min_size=1, max_size=7))
    return [torch.randn(5, generator=generator, dtype=torch.float64) * size for size in sizes]


def rest_of(gradients: list[Tensor]) -> Tensor:
    alignment = GradientAlignment(pairs=True)
    for g in gradients:
        alignment.add([g[:2], None, g[2:]])
    return alignment.result().agreement_with_rest


@settings(deadline=None)
@given(gradients=lengths())
def test_the_gram_matrix_tells_the_cosine_with_the_sum_of_the_others(gradients: list[Tensor]):
    torch.testing.assert_close(rest_of(gradients), with_rest(gradients), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_counts_as_zero_and_not_as_rounding(dtype: torch.dtype):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = rest_of([a, 3 * a, -4 * a + 1e-5 * b, b])  # the first three's rest says nothing in single precision
    assert float(found[3]) == pytest.approx(0.0 if dtype == torch.float32 else 1.0, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_neither_underflows_nor_overflows(scale: float):
    gradients = [scale * g for g in torch.randn(3, 5, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(
        rest_of(gradients).double(), with_rest([g.double() for g in gradients]), rtol=0, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------------- pictures


def test_gradient_alignment_draws_the_pairs_with_their_names():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    w = torch.tensor([1.0, 1.0], requires_grad=True)
    domains = {"north": torch.tensor([1.0, 0.0]), "south": torch.tensor([1.0, 2.0]), 3: torch.tensor([-1.0, 0.0])}
    measured = gradient_alignment([w], lambda x: (w * x).sum(), domains, pairs=True)
    assert measured.domains == ("north", "south", 3)
    axes = measured.plot()
    try:
        axes.figure.canvas.draw()
        assert [t.get_text() for t in axes.get_xticklabels()] == ["north", "south", "3"]
        assert [t.get_text() for t in axes.get_yticklabels()] == ["north", "south", "3"]
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), measured.cosines, check_dtype=False)
        mine = plt.figure().subplots()
        assert gradient_alignment([w], lambda x: (w * x).sum(), list(domains.values()), pairs=True).plot(mine) is mine
        assert [t.get_text() for t in mine.get_xticklabels()] == ["0", "1", "2"]
        plt.close(mine.figure)
    finally:
        plt.close(axes.figure)


def test_without_pairs_there_is_nothing_to_draw():
    w = torch.ones(2, requires_grad=True)
    measured = gradient_alignment([w], lambda x: (w * x).sum(), [1.0, 2.0])
    assert (measured.cosines, measured.domains) == (None, None)
    with pytest.raises(RuntimeError, match=r"gradient_alignment\(\.\.\., pairs=True\)"):
        measured.plot()
