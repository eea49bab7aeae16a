"""Ranks that agree: all go on, or all raise."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks

from torch_gradmatch.parallel.ranks import Ranks, check_process_group
from torch_gradmatch.parallel.reduction import average_, sum_


def world() -> Ranks:
    return Ranks([dist.group.WORLD], torch.device("cpu"))


def error_of(ranks: Ranks, error: BaseException | None = None, **facts: object) -> tuple[str, str] | None:
    try:
        ranks.agree(error, facts)
    except Exception as raised:  # noqa: BLE001  whichever it is, is the result
        return type(raised).__name__, str(raised)
    return None


def agree_on_numbers() -> list[int]:
    return world().agree(None, {"number of batches": 3}, number=10 + dist.get_rank())


def test_every_rank_learns_every_number():
    assert on_ranks(3, agree_on_numbers) == [[10, 11, 12]] * 3


def fail_on_rank_1() -> tuple[str, str] | None:
    return error_of(world(), ValueError("the loss is nan") if dist.get_rank() == 1 else None)


def test_an_error_of_one_rank_is_raised_on_all():
    others, own = ("ValueError", "on rank 1: the loss is nan"), ("ValueError", "the loss is nan")
    assert on_ranks(3, fail_on_rank_1) == [others, own, others]


def fail_of_memory() -> tuple[str, str] | None:
    return error_of(world(), MemoryError("too much") if dist.get_rank() == 0 else None)


def test_an_error_of_another_kind_says_its_kind():
    assert on_ranks(2, fail_of_memory)[1] == ("RuntimeError", "on rank 0: MemoryError: too much")


def differ() -> tuple[str, str] | None:
    return error_of(world(), None, method="Fish()", batches=3 + (dist.get_rank() == 1))


def test_different_facts_are_named_on_all():
    message = "the ranks should have the same batches, but it is 3 on rank 0 and 4 on rank 1"
    assert on_ranks(3, differ) == [("ValueError", message)] * 3


def agree_on_a_mesh() -> tuple[list[int], list[int], tuple[str, str] | None]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    ranks = Ranks([mesh.get_group("inner"), mesh.get_group("outer")], torch.device("cpu"))
    error = ValueError("no") if dist.get_rank() == 3 else None
    return ranks.agree(number=dist.get_rank()), ranks.gather(dist.get_rank()), error_of(ranks, error)


def test_the_dimensions_of_a_mesh_reach_all_its_ranks():
    found = on_ranks(4, agree_on_a_mesh)
    assert [sorted(numbers) for numbers, _, _ in found] == [[0, 1, 2, 3]] * 4
    assert all(numbers == gathered for numbers, gathered, _ in found)
    assert [error for _, _, error in found] == [("ValueError", "on rank 3: no")] * 3 + [("ValueError", "no")]


def test_one_process_agrees_with_itself():
    alone = Ranks([], torch.device("cpu"))
    assert not alone
    assert alone.agree(number=7) == [7]
    with pytest.raises(ValueError, match="mine"):
        alone.agree(ValueError("mine"))


def reduce_some() -> list[torch.Tensor]:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    tensors = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64).t(),
        torch.randn((), generator=generator, dtype=torch.float64),
        torch.randn(5, generator=generator, dtype=torch.complex64),
        torch.randn(7, generator=generator).to(torch.bfloat16),
        torch.empty(0),
        torch.randn(2, generator=generator),
    ]
    before = [t.clone() for t in tensors]
    sums = [t.clone() for t in tensors]
    sum_(sums, dist.group.WORLD)
    average_(tensors, dist.group.WORLD)
    return [before, sums, tensors]


def test_sums_and_means_of_all_kinds_are_right_and_the_same_everywhere():
    found = on_ranks(3, reduce_some)
    for i in range(6):
        total = sum(before[i].to(torch.complex128) for before, _, _ in found)
        for _, sums, means in found:
            assert torch.equal(sums[i], found[0][1][i])
            assert torch.equal(means[i], found[0][2][i])
            rounding = 0.05 if sums[i].dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(sums[i].to(torch.complex128), total, rtol=rounding, atol=rounding)
            torch.testing.assert_close(means[i].to(torch.complex128), total / 3, rtol=rounding, atol=rounding)


def test_what_is_no_group_is_refused():
    assert check_process_group(None) is None
    with pytest.raises(TypeError, match=r"process_group should be .*\(got int\)"):
        check_process_group(3)
