"""Running sums of gradients against pair-by-pair arithmetic."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from _models import assert_identical
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product
from hypothesis import given, settings
from torch import Tensor, nn

from torch_gradmatch.gradients.alignment import GradientAlignment, gradient_alignment

domains_and_size = {"domains": st.integers(2, 8), "size": st.integers(1, 12), "seed": st.integers(0, 2**32)}


def draw(domains: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(domains, size, generator=generator, dtype=torch.float64))


def measure(gradients: list[Tensor]) -> GradientAlignment:
    alignment = GradientAlignment()
    for g in gradients:
        alignment.add([g[:1], None, g[1:]])  # spread over parameters, one of them without gradient
    return alignment


@settings(deadline=None)
@given(**domains_and_size)
def test_running_sums_equal_all_pairs(domains, size, seed):
    gradients = draw(domains, size, seed)
    measured = measure(gradients).result()
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(gradients))
    torch.testing.assert_close(measured.cosine, mean_pairwise_cosine(gradients))
    torch.testing.assert_close(measured.grad_norms, torch.stack([g.norm() for g in gradients]))


@settings(deadline=None)
@given(**domains_and_size)
def test_the_order_of_domains_does_not_matter(domains, size, seed):
    gradients = draw(domains, size, seed)
    forwards, backwards = measure(gradients).result(), measure(gradients[::-1]).result()
    torch.testing.assert_close(forwards.inner_product, backwards.inner_product)
    torch.testing.assert_close(forwards.cosine, backwards.cosine)


@settings(deadline=None)
@given(**domains_and_size, scale=st.floats(0.1, 10.0))
def test_scaling_all_gradients_scales_the_product_and_not_the_cosine(domains, size, seed, scale):
    gradients = draw(domains, size, seed)
    plain, scaled = measure(gradients).result(), measure([scale * g for g in gradients]).result()
    torch.testing.assert_close(scaled.inner_product, scale**2 * plain.inner_product)
    torch.testing.assert_close(scaled.cosine, plain.cosine)


@settings(deadline=None)
@given(**domains_and_size)
def test_identical_domains_agree_perfectly(domains, size, seed):
    (gradient,) = draw(1, size, seed)
    measured = measure([gradient] * domains).result()
    torch.testing.assert_close(measured.inner_product, gradient @ gradient)
    torch.testing.assert_close(measured.cosine, torch.ones((), dtype=torch.float64))


@settings(deadline=None)
@given(**domains_and_size)
def test_state_survives_in_the_middle(domains, size, seed):
    gradients = draw(domains, size, seed)
    half = measure(gradients[: domains // 2])
    resumed = GradientAlignment()
    resumed.load_state_dict(half.state_dict())
    for g in gradients[domains // 2 :]:
        resumed.add([g[:1], None, g[1:]])
    whole = measure(gradients).result()
    assert torch.equal(resumed.result().inner_product, whole.inner_product)
    assert torch.equal(resumed.result().cosine, whole.cosine)
    assert torch.equal(resumed.result().grad_norms, whole.grad_norms)


def test_nearly_orthogonal_gradients_do_not_cancel():
    """|sum|^2 - sum of squares would lose all digits in single precision here."""
    gradients = [torch.tensor([1e4, 1e-4]), torch.tensor([0.0, 1.0])]
    alignment = GradientAlignment()
    for g in gradients:
        alignment.add([g])
    torch.testing.assert_close(alignment.result().inner_product, torch.tensor(1e-4))


def test_long_gradients_keep_their_digits():
    """One product over all elements would have an error of 2e-4 here."""
    gradient = torch.rand(12_000_000, generator=torch.Generator().manual_seed(0))
    alignment = GradientAlignment(cosines=False)
    for _ in range(2):
        alignment.add([gradient])
    expected = torch.dot(gradient.double(), gradient.double())
    torch.testing.assert_close(alignment.result().inner_product.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(alignment.result().grad_norms[0].double(), expected.sqrt(), rtol=2e-5, atol=0)


def test_sparse_half_and_complex_gradients():
    alignment = GradientAlignment()
    for factor in (1.0, 2.0):
        alignment.add([
            torch.sparse_coo_tensor([[0, 0, 2]], [factor, factor, factor], (4,), check_invariants=True),
            torch.full((3,), 300.0 * factor, dtype=torch.float16),  # squares overflow float16
            torch.tensor([factor + 1j * factor]),
        ])  # fmt: skip
    measured = alignment.result()
    torch.testing.assert_close(measured.inner_product, torch.tensor(2.0 * (4 + 1 + 3 * 90000 + 2)))
    torch.testing.assert_close(measured.cosine, torch.tensor(1.0))


def test_a_zero_gradient_is_orthogonal_to_all():
    alignment = GradientAlignment()
    for g in (torch.zeros(2), torch.ones(2), torch.ones(2)):
        alignment.add([g])
    torch.testing.assert_close(alignment.result().cosine, torch.tensor(1 / 3))


def test_one_domain_has_no_pairs_and_none_no_result():
    alignment = GradientAlignment()
    with pytest.raises(RuntimeError, match=r"call add\(\) first"):
        alignment.result()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        alignment.add([None, None])
    alignment.add([torch.ones(2)])
    assert alignment.result().inner_product.isnan()
    assert alignment.result().cosine.isnan()
    assert alignment.result().grad_norms.tolist() == pytest.approx([2**0.5])


def test_only_two_vectors_are_kept_whatever_the_number_of_domains():
    alignment = GradientAlignment()
    for _ in range(50):
        alignment.add([torch.randn(100)])
    state = alignment.state_dict()
    assert sum(v.numel() for part in ("sums", "unit_sums") for v in state[part].values()) == 200
    assert all(v.numel() == 1 for part in ("squares", "products", "cosines") for v in state[part])


@pytest.mark.parametrize("longest", [1, 8, 2**31 - 1])
@settings(deadline=None, max_examples=25)
@given(data=st.data(), domains=st.integers(2, 6), seed=st.integers(0, 2**32))
def test_sums_side_by_side_or_apart_with_gaps_and_a_checkpoint_between(longest: int, data, domains: int, seed: int):
    """Parameters of several sizes, dtypes and kinds, each missing in some domains; saved and loaded half way."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float64, torch.float64, torch.complex128, torch.float64, torch.float32]
    shapes = [(3,), (2, 3), (2,), (1, 1), (5,)]
    present = data.draw(
        st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=domains, max_size=domains)
    )
    alignment, flat = GradientAlignment(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_gradmatch.gradients.flat.LONGEST", longest)
        for mask in present:
            gradient = [
                torch.randn(shape, generator=generator, dtype=dtype) if there else None
                for shape, dtype, there in zip(shapes, dtypes, mask, strict=True)
            ]
            if len(alignment) == domains // 2 > 0:
                saved, alignment = alignment.state_dict(), GradientAlignment()
                alignment.check_state_dict(saved, [3, 6, 4, 1, 5])
                alignment.load_state_dict(saved)
            alignment.add(gradient)
            pairs = [
                torch.zeros(s, dtype=d) if g is None else g for g, s, d in zip(gradient, shapes, dtypes, strict=True)
            ]
            real = [torch.view_as_real(g) if g.is_complex() else g for g in pairs]
            flat.append(torch.cat([g.reshape(-1).double() for g in real]))
    measured = alignment.result()
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # some sums are in single precision
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(flat), **close)
    torch.testing.assert_close(measured.cosine, mean_pairwise_cosine(flat), **close)
    torch.testing.assert_close(measured.grad_norms, torch.stack([g.norm() for g in flat]), **close)
    for i in alignment.indices:
        like = torch.zeros(shapes[i], dtype=dtypes[i])
        start = sum(s * k for s, k in zip([3, 6, 2, 1, 5][:i], [1, 1, 2, 1, 1], strict=False))
        total = alignment.total(i, like)
        assert total.shape == like.shape
        real = torch.view_as_real(total) if total.is_complex() else total
        torch.testing.assert_close(real.reshape(-1).double(), sum(flat)[start : start + real.numel()], **close)


@settings(deadline=None)
@given(**domains_and_size)
def test_without_cosines_the_rest_is_the_same(domains, size, seed):
    gradients = draw(domains, size, seed)
    alignment = GradientAlignment(cosines=False)
    for g in gradients:
        alignment.add([g[:1], None, g[1:]])
    measured, whole = alignment.result(), measure(gradients).result()
    assert measured.cosine is None
    assert torch.equal(measured.inner_product, whole.inner_product)
    assert torch.equal(measured.grad_norms, whole.grad_norms)


def test_cosines_need_their_sums_in_the_state():
    gradients = draw(4, 5, seed=0)
    with_cosines = measure(gradients[:2]).state_dict()
    without = GradientAlignment(cosines=False)
    without.check_state_dict(with_cosines, [1, 0, 4])
    without.load_state_dict(with_cosines)
    state = without.state_dict()
    assert (state["unit_sums"], state["cosines"]) == ({}, [])
    for g in gradients[2:]:
        without.add([g[:1], None, g[1:]])
    assert torch.equal(without.result().inner_product, measure(gradients).result().inner_product)
    with pytest.raises(ValueError, match="'unit_sums' holds 0 entries for 2 in 'sums': it was saved without cosines"):
        GradientAlignment().check_state_dict(state, [1, 0, 4])
    without.reset()
    between_groups = without.state_dict()
    resumed = GradientAlignment()
    resumed.check_state_dict(between_groups, [1, 0, 4])
    resumed.load_state_dict(between_groups)
    for g in gradients:
        resumed.add([g[:1], None, g[1:]])
    assert torch.equal(resumed.result().cosine, measure(gradients).result().cosine)


@pytest.mark.parametrize("reached", [3, [0, 1]], ids=["number", "unknown"])
def test_a_malformed_list_of_parameters_is_refused(reached: object):
    state = measure(draw(2, 5, seed=0)).state_dict() | {"reached": reached}
    with pytest.raises(ValueError, match="'reached' is malformed"):
        GradientAlignment().check_state_dict(state, [1, 0, 4])


def test_a_state_without_the_list_of_parameters_is_of_all_that_have_sums():
    state = measure(draw(2, 5, seed=0)).state_dict()
    del state["reached"]
    GradientAlignment().check_state_dict(state, [1, 0, 4])
    resumed = GradientAlignment()
    resumed.load_state_dict(state)
    assert resumed.indices == [0, 2]


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("cosines", [False, True])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_copy_goes_its_own_way(through, cosines: bool, before: int):
    gradients = draw(4, 6, seed=0)
    original = GradientAlignment(cosines=cosines)
    for g in gradients[:before]:
        original.add([g[:1], None, g[1:].reshape(5, 1)])
    twin = through(original)
    for g in gradients[before:]:
        twin.add([g[:1], None, g[1:].reshape(5, 1)])
    assert len(original) == before
    for g in gradients[before:]:
        original.add([g[:1], None, g[1:].reshape(5, 1)])
    assert_identical(vars(twin.result()), vars(original.result()))
    assert torch.equal(twin.total(2, gradients[0][1:].reshape(5, 1)), original.total(2, gradients[0][1:].reshape(5, 1)))
    # Working at one does not reach the other.
    twin.add([gradients[0][:1], None, gradients[0][1:].reshape(5, 1)])
    torch.testing.assert_close(original.total(0, gradients[0][:1]), sum(gradients)[:1])


def test_the_next_group_knows_nothing_of_the_last():
    """The layout stays, and with it the place of a parameter that now has no gradient."""
    alignment = GradientAlignment()
    alignment.add([torch.full((2,), float("nan")), torch.full((3,), float("inf"))])
    for release in (False, True):
        alignment.reset(release=release)
        assert alignment.indices == []
        assert len(alignment) == 0
        for factor in (1.0, 2.0):
            alignment.add([None, torch.full((3,), factor)])
        assert alignment.indices == [1]
        assert alignment.result().inner_product == 6.0
        assert alignment.result().cosine == pytest.approx(1.0)
        (none, mean) = alignment.mean().tensors([torch.zeros(2), torch.zeros(3)])
        assert none is None
        assert mean.tolist() == [1.5] * 3


def test_another_shape_is_refused_within_a_group_only():
    alignment = GradientAlignment()
    alignment.add([torch.ones(3)])
    with pytest.raises(
        ValueError, match=r"gradient of parameter 0 has shape \(1,\), but one taken in before it had \(3,\)"
    ):
        alignment.add([torch.ones(1)])  # copied into three elements it would count three times
    assert len(alignment) == 1
    alignment.reset()
    alignment.add([torch.ones(1)])
    assert alignment.result().grad_norms.tolist() == [1.0]


@pytest.mark.parametrize("weight", [1.0, -0.5])
@settings(deadline=None, max_examples=25)
@given(**domains_and_size)
def test_the_mean_and_vectors_added_to_it(weight: float, domains, size, seed):
    gradients = draw(domains, size, seed)
    direction = measure(gradients).mean(weight)
    extra = draw(1, size, seed + 1)[0]
    direction.add([extra[:1], torch.ones(7), extra[1:]], 0.25)  # no domain had a gradient for the second
    first, none, rest = direction.tensors([extra[:1], torch.ones(7), extra[1:]])
    assert none is None
    expected = weight * sum(gradients) / domains + 0.25 * extra
    torch.testing.assert_close(torch.cat([first, rest]), expected)


def test_a_sum_is_refused_once_the_layout_changed():
    alignment = GradientAlignment()
    alignment.add([torch.ones(3), None])
    direction = alignment.mean()
    alignment.add([torch.ones(3), torch.ones(2)])
    with pytest.raises(RuntimeError, match="take in every domain's gradient first"):
        direction.tensors([torch.ones(3), torch.ones(2)])


def test_the_probe_measures_the_domains_gradients_and_touches_no_grad():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.weight.grad = torch.full((1, 3), 9.0)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(3)]

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    measured = gradient_alignment(model.parameters(), loss_fn, iter(batches))
    gradients = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(b), list(model.parameters()))]) for b in batches
    ]
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(gradients))
    assert model.weight.grad.tolist() == [[9.0] * 3]
    assert model.bias.grad is None


def test_the_probe_refuses_what_it_cannot_measure():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="batches is empty"):
        gradient_alignment([w], lambda x: (w * x).sum(), [])
    with pytest.raises(ValueError, match="no tensor that requires a gradient"):
        gradient_alignment([torch.ones(1)], lambda x: (w * x).sum(), [torch.ones(2)])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        gradient_alignment([w], lambda x: w * x, [torch.ones(2)])


def test_sums_that_were_released_before_there_were_any_take_gradients_in():
    """As after a first meta-iteration whose loss raised."""
    alignment = GradientAlignment()
    alignment.reset(release=True)
    alignment.add([torch.ones(2)])
    assert float(alignment.result().grad_norms[0]) == pytest.approx(2**0.5)
