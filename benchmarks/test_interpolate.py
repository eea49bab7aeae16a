"""Time of the interpolation step, slow <- slow + eps (fast - slow), fast <- slow, of whole networks.

Each way starts from the same two lists of tensors. ``flat memory`` is the limit: two in-place passes, each over one of
two flat buffers of the same bytes, reading and writing every byte once.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks._models import cdsprites, mlp
from torch_gradmatch import native_status, ops

WEIGHT = 0.1
Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """He et al., 2016: 161 tensors, 25.6 M parameters."""

    def conv(i: int, o: int, k: int) -> Shapes:
        return [(o, i, k, k), (o,), (o,)]  # and its BatchNorm

    shapes = conv(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(channels, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def encoder(*qkv: tuple[int, int]) -> Shapes:
    """A layer of width 768 with a feed-forward part four times as wide."""
    matrices = [*qkv, (768, 768), (3072, 768), (768, 3072)]
    return [shape for matrix in matrices for shape in (matrix, matrix[:1])] + [(768,)] * 4


NETWORKS: dict[str, Shapes] = {
    "CdSprites net": [tuple(p.shape) for p in cdsprites().parameters()],
    "MLP": [tuple(p.shape) for p in mlp(784, 256, 256, 10).parameters()],
    "ResNet-50": resnet50(),
    # Sanh et al., 2019, base: 100 tensors, 66.4 M parameters.
    "DistilBERT": [(30522, 768), (512, 768), (768,), (768,), *encoder((768, 768), (768, 768), (768, 768)) * 6],
    # Dosovitskiy et al., 2021: 152 tensors, 86.6 M parameters.
    "ViT-B/16": [
        (1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768), *encoder((2304, 768)) * 12,
        (768,), (768,), (1000, 768), (1000,),
    ],
}  # fmt: skip


def native(slow: list[Tensor], fast: list[Tensor]) -> Callable[[], None]:
    if not native_status().cpu:
        pytest.skip(f"no native kernel: {native_status().reason}")
    return lambda: ops.interpolate_(slow, fast, WEIGHT)


def foreach(slow: list[Tensor], fast: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        same = slow[0].dtype == fast[0].dtype
        torch._foreach_lerp_(slow, fast if same else [f.to(slow[0].dtype) for f in fast], WEIGHT)
        torch._foreach_copy_(fast, slow)

    return run


def tensor_loop(slow: list[Tensor], fast: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for s, f in zip(slow, fast, strict=True):
            s.add_(f.to(s.dtype) - s, alpha=WEIGHT)
            f.copy_(s)

    return run


def clone_and_dictionary(slow: list[Tensor], fast: list[Tensor]) -> Callable[[], None]:
    """What the public implementations do in each meta-iteration, in as many passes over dictionaries as they take.

    The network is cloned to walk with. The update is then a sum of weighted differences of state dicts, written with
    an arithmetic of dictionaries in which a difference is the sum with the negative and a sum starts from zero times
    the weights. The result is copied once more and loaded into the network.
    """
    model, inner = (nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors) for tensors in (slow, fast))

    def run() -> None:
        copy.deepcopy(model)  # the clone that walks
        outer, walked = model.state_dict(), inner.state_dict()
        zero = OrderedDict((k, 0 * t) for k, t in outer.items())
        negative = OrderedDict((k, -t) for k, t in outer.items())
        difference = OrderedDict((k, walked[k] + negative[k]) for k in outer)
        total = OrderedDict((k, zero[k] + difference[k]) for k in outer)
        scaled = OrderedDict((k, WEIGHT * t) for k, t in total.items())
        moved = OrderedDict((k, outer[k] + scaled[k]) for k in outer)
        model.load_state_dict(copy.deepcopy(moved))

    return run


def lookahead_of_pytorch_optimizer(slow: list[Tensor], fast: list[Tensor]) -> Callable[[], None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    parameters = [nn.Parameter(f) for f in fast]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    wrapper = lookahead(torch.optim.SGD(parameters, lr=0.0), k=1, alpha=WEIGHT)
    for group in wrapper.param_groups:
        wrapper.init_group(group)
        for p, s in zip(parameters, slow, strict=True):
            wrapper.state[p]["slow_params"] = s

    def run() -> None:
        with torch.no_grad():
            for group in wrapper.param_groups:
                wrapper.update(group)

    return run


def flat_memory(slow: list[Tensor], fast: list[Tensor]) -> Callable[[], None]:
    flat = [torch.cat([t.reshape(-1) for t in tensors]) for tensors in (slow, fast)]

    return lambda: torch._foreach_neg_(flat)


WAYS = {
    "native": native,
    "foreach": foreach,
    "loop over tensors": tensor_loop,
    "clone + dictionary": clone_and_dictionary,
    "Lookahead (pytorch_optimizer)": lookahead_of_pytorch_optimizer,
    "flat memory": flat_memory,
}
DTYPES = {"fp32": (torch.float32, torch.float32), "fp32/bf16": (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_interpolate(benchmark: BenchmarkFixture, network: str, dtypes: str, threads: int, way: str) -> None:
    if way.startswith(("clone", "Lookahead")) and dtypes != "fp32":
        pytest.skip("keeps slow and fast weights in one dtype")
    torch.set_num_threads(threads)  # conftest.py sets it back
    shapes = NETWORKS[network]
    slow, fast = ([torch.randn(shape).to(dtype) for shape in shapes] for dtype in DTYPES[dtypes])
    numel = sum(t.numel() for t in slow)
    run = WAYS[way](slow, fast)
    small = numel < 1_000_000
    benchmark.extra_info.update(
        network=network, dtypes=dtypes, threads=threads, way=way, tensors=len(shapes), parameters=numel,
        bytes=2 * sum(s.nbytes + f.nbytes for s, f in zip(slow, fast, strict=True)),
    )  # fmt: skip
    benchmark.pedantic(run, rounds=30 if small else 15, iterations=20 if small else 1, warmup_rounds=3)
    assert all(bool(t.isfinite().all()) for t in slow)
