"""Ranks that agree: all go on, or all raise; they begin with the same parameters, or are told which differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _spread import error_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from torch_gradmatch.parallel import ranks as parallel_ranks
from torch_gradmatch.parallel.ranks import Ranks, average_, check_process_group, max_, sum_


def agree() -> dict[str, Any]:
    rank, ranks = dist.get_rank(), Ranks([dist.group.WORLD], torch.device("cpu"))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    over_mesh = Ranks([mesh.get_group("inner"), mesh.get_group("outer")], torch.device("cpu"))
    return {
        "numbers": ranks.vote(None, {"number of batches": 3}, 10 + rank),
        "one": error_of(ranks.vote, ValueError("the loss is nan") if rank == 1 else None),
        "memory": error_of(ranks.vote, MemoryError("too much") if rank == 0 else None),
        "facts": error_of(ranks.vote, None, {"method": "Fish()", "batches": 3 + (rank == 1)}),
        "mesh": over_mesh.vote(number=rank),
        "gathered": over_mesh.gather(rank),
        "one of a mesh": error_of(over_mesh.vote, ValueError("no") if rank == 3 else None),
    }


def test_ranks_learn_every_number_and_raise_what_one_of_them_raises():
    everywhere = on_ranks(4, agree)
    for rank, found in enumerate(everywhere):
        assert found["numbers"] == [10, 11, 12, 13]
        assert found["one"] == f"ValueError: {'' if rank == 1 else 'on rank 1: '}the loss is nan"
        assert found["memory"] == (
            "RuntimeError: on rank 0: MemoryError: too much" if rank else "MemoryError: too much"
        )
        assert found["facts"] == (
            "ValueError: the ranks should have the same batches, but it is 3 on rank 0 and 4 on rank 1"
        )
        assert sorted(found["mesh"]) == [0, 1, 2, 3]
        assert found["mesh"] == found["gathered"]
        assert found["one of a mesh"] == f"ValueError: {'' if rank == 3 else 'on rank 3: '}no"


def largest() -> list[Tensor]:
    rank = dist.get_rank()
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    tensors = [torch.tensor([rank == 1, rank == 0, False]).to(dtype) for dtype in dtypes]
    max_(tensors, dist.group.WORLD)
    return tensors


def test_the_largest_of_integers_of_every_dtype():
    for found in on_ranks(2, largest):
        assert [t.tolist() for t in found] == [[True, True, False]] + [[1, 1, 0]] * 5


def raise_twice() -> list[str]:
    ranks, error = Ranks([dist.group.WORLD], torch.device("cpu")), KeyError("the same object")

    def work() -> None:
        with ranks.together():
            if dist.get_rank() == 1:
                raise error

    return [error_of(work) for _ in range(3)]


def test_an_error_that_is_raised_again_and_again_is_told_each_time():
    told = "KeyError: 'the same object'"
    assert on_ranks(2, raise_twice) == [[f"RuntimeError: on rank 1: {told}"] * 3, [told] * 3]


def test_one_process_agrees_with_itself():
    alone = Ranks([], torch.device("cpu"))
    assert not alone
    assert alone.vote(number=7) == [7]
    with pytest.raises(ValueError, match="mine"):
        alone.vote(ValueError("mine"))
    assert check_process_group(None) is None
    with pytest.raises(TypeError, match=r"process_group should be .*\(got int\)"):
        check_process_group(3)


def reduce_some(bucket: int) -> list[Any]:
    parallel_ranks.BUCKET = bucket
    generator = torch.Generator().manual_seed(dist.get_rank())
    tensors = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64).t(),
        torch.randn((), generator=generator, dtype=torch.float64),
        torch.randn(5, generator=generator, dtype=torch.complex64),
        torch.randn(7, generator=generator).to(torch.bfloat16),
        torch.empty(0),
        *(torch.randn(n, generator=generator) for n in (2, 100, 3, 1, 50)),
    ]
    before, sums = ([t.clone() for t in tensors] for _ in range(2))
    sum_(sums, dist.group.WORLD)
    average_(tensors, dist.group.WORLD)
    parallel_ranks.BUCKET = 1 << 26
    return [before, sums, tensors]


@pytest.mark.parametrize("bucket", [1, 64, 1 << 26])
def test_sums_and_means_of_all_kinds_are_right_and_the_same_everywhere(bucket: int):
    """Whatever goes together: a bucket that was left out would keep this rank's own numbers."""
    found = on_ranks(3, reduce_some, bucket)
    for i in range(10):
        total = sum(before[i].to(torch.complex128) for before, _, _ in found)
        for _, sums, means in found:
            assert torch.equal(sums[i], found[0][1][i])
            assert torch.equal(means[i], found[0][2][i])
            rounding = 0.05 if sums[i].dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(sums[i].to(torch.complex128), total, rtol=rounding, atol=rounding)
            torch.testing.assert_close(means[i].to(torch.complex128), total / 3, rtol=rounding, atol=rounding)


# ------------------------------------------------------------------------------------------------- the same parameters


CHANGES: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "value": lambda parameters: parameters[2].data[3].add_(1),
    "order": lambda parameters: parameters[2].data.copy_(parameters[2].data.flip(0)),
    "number": lambda parameters: parameters.pop(),
    "shape": lambda parameters: parameters.__setitem__(0, nn.Parameter(torch.randn(7))),
}


def compare(change: str) -> str:
    torch.manual_seed(0)
    last = dist.get_rank() == dist.get_world_size() - 1
    parameters = [nn.Parameter(torch.randn(3, 2).t()), nn.Parameter(torch.randn(4, dtype=torch.complex64))]
    parameters += [nn.Parameter(torch.randn(5).to(torch.bfloat16)), nn.Parameter(torch.tensor(float("nan")))]
    if last and change in CHANGES:
        CHANGES[change](parameters)
    group = dist.group.WORLD
    return error_of(Ranks([group], torch.device("cpu")).check_same, parameters, group)


def compare_all() -> dict[str, str]:
    found = {change: compare(change) for change in ("nothing", *CHANGES)}
    # Rows of a 2 by 2 mesh hold other shards; only one column differs, and all have to know.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = mesh.get_group("outer"), mesh.get_group("inner")
    parameter = nn.Parameter(torch.full((2,), float(dist.get_rank(inner)) + (dist.get_rank() == 3)))
    ranks = Ranks([outer, inner], torch.device("cpu"))
    return {**found, "mesh": error_of(ranks.check_same, [parameter], outer)}


def test_the_same_parameters_pass_and_others_are_named_on_all_ranks():
    for found in on_ranks(4, compare_all):
        assert found["nothing"] == ""
        assert "same parameter number 2 of the optimizer, but it is torch.bfloat16 of shape (5,)" in found["value"]
        assert "broadcast" in found["value"]
        assert "same parameter number 2 of the optimizer" in found["order"]
        assert "same number of parameters, but it is 4 on rank 0 and 3 on rank 3" in found["number"]
        assert "number 0 of the optimizer, but it is torch.float32 of shape (2, 3)" in found["shape"]
        assert "torch.float32 of shape (7,)" in found["shape"]
        assert "number 0 of the optimizer" in found["mesh"]
