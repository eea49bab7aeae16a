"""The agreements against pair-by-pair arithmetic, and their running form against autograd."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from _reference import agreement_of, mean_pairwise_cosine
from hypothesis import given, settings
from torch import Tensor

from torch_gradmatch import agreement, fish_gamma
from torch_gradmatch.gradients.agreement import AGREEMENTS, NamedAgreement, OwnAgreement
from torch_gradmatch.gradients.alignment import GradientAlignment

drawn = {"domains": st.integers(2, 7), "size": st.integers(2, 12), "seed": st.integers(0, 2**32)}
NAMES = sorted(AGREEMENTS)
law = settings(deadline=None, max_examples=25)


def draw(domains: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(domains, size, generator=generator, dtype=torch.float64))


def taken_in(chosen: Any, gradients: list[list[Tensor | None]], like: Any = None) -> NamedAgreement | OwnAgreement:
    """An agreement in its running form, with every gradient in it."""
    sums = GradientAlignment()
    named = isinstance(chosen, str)
    running: Any = NamedAgreement(AGREEMENTS[chosen], sums, len(gradients)) if named else OwnAgreement(chosen, like)
    for gradient in gradients:
        sums.add(gradient)
        if not named:
            running.add(gradient)
    running.found = lambda: running.value(sums.result())
    return running


def spread(gradient: Tensor) -> dict[str, Any]:
    """The same numbers in the nested structure of some parameters."""
    return {"first": gradient[:1].reshape(1, 1, 1), "rest": [gradient[1:]], "empty": gradient[:0]}


@pytest.mark.parametrize("name", NAMES)
@law
@given(**drawn)
def test_function_is_what_is_written(name: str, domains: int, size: int, seed: int):
    gradients = draw(domains, size, seed)
    torch.testing.assert_close(AGREEMENTS[name]([spread(g) for g in gradients]), agreement_of(name, gradients))


@pytest.mark.parametrize("name", NAMES)
@law
@given(**drawn)
def test_running_form_has_the_value_and_the_derivative(name: str, domains: int, size: int, seed: int):
    gradients = [g.requires_grad_() for g in draw(domains, size, seed)]
    expected = agreement_of(name, gradients)
    cotangents = torch.autograd.grad(expected, gradients)
    running = taken_in(name, [[g[:1], g[1:]] for g in gradients])
    torch.testing.assert_close(running.found(), expected.detach(), rtol=1e-9, atol=1e-12)
    for i, (g, v) in enumerate(zip(gradients, cotangents, strict=True)):
        found = torch.cat(running.cotangent(i, [g[:1], g[1:]]))
        torch.testing.assert_close(found, v, rtol=1e-9, atol=1e-12)


def test_variance_of_nearly_equal_gradients_keeps_digits():
    """In single precision |G|^2 has few digits left for the difference; its sums are in double."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1_000_000, generator=generator)
    gradients = [common + 1e-2 * torch.randn(1_000_000, generator=generator) for _ in range(4)]
    expected = agreement_of("variance", [g.double() for g in gradients])
    torch.testing.assert_close(
        taken_in("variance", [[g] for g in gradients]).found().double(), expected, rtol=5e-3, atol=0
    )


def test_a_zero_gradient_is_orthogonal_to_all_and_has_no_cosine_derivative():
    gradients = [torch.zeros(3).requires_grad_(), torch.ones(3).requires_grad_(), torch.arange(3.0).requires_grad_()]
    value = agreement.cosine(gradients)
    torch.testing.assert_close(value, mean_pairwise_cosine([g.detach() for g in gradients]))
    derivative = torch.autograd.grad(value, gradients)
    assert all(bool(torch.isfinite(d).all()) for d in derivative)
    running = taken_in("cosine", [[g] for g in gradients])
    assert running.cotangent(0, [gradients[0]])[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(running.cotangent(1, [gradients[1]])[0], derivative[1])


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_a_domain_without_gradient_for_a_parameter_counts_as_zero(name: str):
    """And gets no cotangent there: its loss does not depend on the parameter."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    second[1] = 0.0
    chosen: Any = agreement.variance if name == "own" else name
    if name == "own":
        chosen = lambda gradients: agreement.variance(gradients)  # noqa: E731  another object: not recognized
    given_gradients = [[first[0], second[0]], [first[1], None]]
    running = taken_in(chosen, given_gradients, like=[first[0], second[0]])
    flat = [torch.cat([first[i], second[i]]).requires_grad_() for i in range(2)]
    expected = agreement_of("variance" if name == "own" else name, flat)
    torch.testing.assert_close(running.found(), expected.detach())
    cotangents = torch.autograd.grad(expected, flat)
    torch.testing.assert_close(running.cotangent(0, given_gradients[0])[1], cotangents[0][3:])
    assert running.cotangent(1, given_gradients[1])[1] is None


def test_complex_gradients_count_as_pairs_of_reals():
    generator = torch.Generator().manual_seed(0)
    gradients = list(torch.randn(3, 4, generator=generator, dtype=torch.complex128))
    pairs = [torch.view_as_real(g).reshape(-1) for g in gradients]
    for name in NAMES:
        torch.testing.assert_close(AGREEMENTS[name](gradients), agreement_of(name, pairs))
    running = taken_in("cosine", [[g] for g in gradients])
    leaves = [p.requires_grad_() for p in pairs]
    expected = torch.autograd.grad(mean_pairwise_cosine(leaves), leaves)
    found = running.cotangent(1, [gradients[1]])[0]
    torch.testing.assert_close(torch.view_as_real(found).reshape(-1), expected[1])


def test_half_precision_is_summed_in_single():
    gradients = [torch.full((5000,), 1.0, dtype=torch.bfloat16) for _ in range(3)]
    assert agreement.inner_product(gradients).item() == 5000.0
    steep = [torch.full((4,), 300.0, dtype=torch.float16) for _ in range(3)]  # squares overflow
    assert [AGREEMENTS[name](steep).item() for name in NAMES] == pytest.approx([1.0, 4 * 300.0**2, 0.0])
    running = taken_in("inner_product", [[g] for g in gradients])
    cotangent = running.cotangent(0, gradients[:1])[0]
    assert cotangent.dtype == torch.bfloat16
    assert cotangent[0].item() == pytest.approx(2 / 3, rel=1e-2)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([torch.ones(2)], r"at least 2 domains \(got 1\)"),
        ([torch.ones(2), torch.ones(1)], r"shapes of the first \(got \[\[\(2,\)\], \[\(1,\)\]\]\)"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], "Node keys mismatch"),
    ],
    ids=["one", "shapes", "keys"],
)
@pytest.mark.parametrize("name", NAMES)
def test_other_gradients_than_two_alike_are_refused(name: str, gradients: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        AGREEMENTS[name](gradients)


def test_an_unknown_name_is_shown_with_the_choices():
    with pytest.raises(ValueError, match=r"'inner_product', 'variance', 'cosine', or a function.*got 'covariance'"):
        agreement.check_agreement("covariance")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda g: 1.0, TypeError, r"should return a scalar tensor \(got float\)"),
        (lambda g: g[0][0], ValueError, r"shape \(2,\)"),
        (lambda g: g[0][0].sum().detach(), ValueError, "depends on the gradients in a differentiable way"),
        (lambda g: g[0][0].sum().to(torch.complex64), ValueError, "real scalar"),
    ],
    ids=["number", "vector", "detached", "complex"],
)
def test_an_own_function_must_return_a_differentiable_scalar(function: Any, error: type[Exception], message: str):
    running = taken_in(function, [[torch.ones(2)]] * 2, like=[torch.ones(2)])
    with pytest.raises(error, match=message):
        running.found()


def test_fish_gamma():
    assert fish_gamma(0.1, 15) == pytest.approx(0.35)
    assert fish_gamma(0.1, 1) == 0.0
    for bad in (0.0, -1.0, float("nan"), True, "0.1"):
        with pytest.raises(ValueError, match="lr should be a finite number greater than 0"):
            fish_gamma(bad, 3)
    with pytest.raises(ValueError, match="num_domains"):
        fish_gamma(0.1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_paired_by_key_and_not_by_order(name: str):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    expected = AGREEMENTS[name]([torch.cat([x, y]), torch.cat([y, x])])
    torch.testing.assert_close(AGREEMENTS[name]([{"a": x, "b": y}, {"b": x, "a": y}]), expected)
