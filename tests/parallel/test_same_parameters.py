"""Ranks that begin with the same parameters, or are told which differ."""

from __future__ import annotations

import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import nn

from torch_gradmatch.parallel.agreement import check_same_parameters
from torch_gradmatch.parallel.ranks import Ranks


def compare(change: str) -> str | None:
    last = dist.get_rank() == dist.get_world_size() - 1
    parameters = [nn.Parameter(torch.randn(3, 2).t()), nn.Parameter(torch.randn(4, dtype=torch.complex64))]
    parameters += [nn.Parameter(torch.randn(5).to(torch.bfloat16)), nn.Parameter(torch.tensor(float("nan")))]
    if last and change == "value":
        parameters[2].data[3] += 1
    if last and change == "number":
        parameters.pop()
    if last and change == "shape":
        parameters[0] = nn.Parameter(torch.randn(7))
    group = dist.group.WORLD
    try:
        check_same_parameters(parameters, group, Ranks([group], torch.device("cpu")))
    except ValueError as error:
        return str(error)
    return None


def test_the_same_parameters_pass_and_others_are_named():
    assert on_ranks(3, compare, "nothing") == [None] * 3
    for message in on_ranks(3, compare, "value"):
        assert "number 2 of the optimizer, of shape (5,), holds other values" in message
        assert "broadcast" in message
    for message in on_ranks(3, compare, "number"):
        assert "one has 4 of them and one 3" in message
    for message in on_ranks(3, compare, "shape"):
        assert "number 0 is torch.float32 of shape (2, 3) on one and torch.float32 of shape (7,) on another" in message


def compare_within_a_mesh() -> str | None:
    """Rows of a 2 by 2 mesh hold other shards; only one column differs, and all have to know."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = mesh.get_group("outer"), mesh.get_group("inner")
    parameter = nn.Parameter(torch.full((2,), float(dist.get_rank(inner))))
    if dist.get_rank() == 3:
        parameter.data += 1
    try:
        check_same_parameters([parameter], outer, Ranks([outer, inner], torch.device("cpu")))
    except ValueError as error:
        return str(error)
    return None


def test_all_ranks_of_a_mesh_raise_if_those_of_one_group_differ():
    found = on_ranks(4, compare_within_a_mesh)
    assert all(message is not None and "number 0 of the optimizer" in message for message in found)
