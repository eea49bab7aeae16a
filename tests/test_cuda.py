"""The CUDA kernel. Complete, but it runs only where there is a GPU: ``make test-cuda``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_ops import KERNEL_PAIRS, assert_is_the_formula, draw
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch, native_status
from torch_gradmatch.slow.ops import interpolate_

MISSING = "no NVIDIA GPU" if not torch.cuda.is_available() else native_status().reason
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (torch.cuda.is_available() and native_status().cuda), reason=f"no CUDA kernel: {MISSING}"),
]


def on_gpu(sizes: Sequence[int], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [draw([size], dtype, "contiguous", generator).cuda() for size in sizes]
    return [torch.cat([t.new_zeros(1), t])[1:] for t in tensors] if layout == "misaligned" else tensors


@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("pair", KERNEL_PAIRS, ids=str)
def test_is_the_formula(pair: tuple[torch.dtype, torch.dtype], weight: float, layout: str):
    """Sizes around the width of a vector and of a block's chunk, with tails and empty tensors."""
    sizes = [0, 1, 3, 7, 8, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 100_003]
    slow, fast = (on_gpu(sizes, dtype, seed, layout) for seed, dtype in enumerate(pair))
    before = [(s.cpu(), f.cpu()) for s, f in zip(slow, fast, strict=True)]
    interpolate_(slow, fast, weight)
    for s, f, (s0, f0) in zip(slow, fast, before, strict=True):
        assert_is_the_formula(s.cpu(), f.cpu(), s0, f0, weight)


def test_agrees_with_the_cpu_on_special_numbers():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38] * 3000)
    for pair in KERNEL_PAIRS:
        fast, slow = special.to(pair[1]), special.flip(0).to(pair[0])
        gpu_slow, gpu_fast = slow.cuda(), fast.cuda()
        interpolate_([slow], [fast], 0.3)
        interpolate_([gpu_slow], [gpu_fast], 0.3)
        torch.testing.assert_close(gpu_slow.cpu(), slow, equal_nan=True, rtol=1e-6, atol=1e-45)
        torch.testing.assert_close(gpu_fast.cpu(), fast, equal_nan=True, rtol=1e-2, atol=1e-7)


def test_at_most_two_launches_for_161_tensors():
    slow, fast = (on_gpu([1000] * 161, torch.float32, seed) for seed in range(2))
    interpolate_(slow, fast, 0.5)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        interpolate_(slow, fast, 0.5)
        torch.cuda.synchronize()
    assert 1 <= sum("interpolate_kernel" in event.name for event in profiler.events()) <= 2


def test_thousands_of_tensors():
    slow = [torch.full((i % 5,), float(i), device="cuda") for i in range(3000)]
    fast = [torch.zeros_like(s) for s in slow]
    interpolate_(slow, fast, 0.25)
    for i, s in enumerate(slow):
        assert s.tolist() == [0.75 * i] * (i % 5)


def test_runs_on_the_current_stream():
    slow, fast = torch.zeros(1 << 22, device="cuda"), torch.zeros(1 << 22, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the kernel has to wait for this and then see what is written next
        fast.fill_(1.0)
        interpolate_([slow], [fast], 0.5)
    assert not stream.query()  # and nothing waited for it
    stream.synchronize()
    assert bool((slow == 0.5).all())


def test_a_cuda_graph_captures_and_replays_it():
    slow, fast = on_gpu([5000, 3], torch.float32, 0), on_gpu([5000, 3], torch.float32, 1)
    start = [t.clone() for t in slow + fast]
    interpolate_(slow, fast, 0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        interpolate_(slow, fast, 0.25)
    torch._foreach_copy_(slow + fast, start)
    graph.replay()
    torch.cuda.synchronize()
    for s, f, s0, f0 in zip(slow, fast, start[:2], start[2:], strict=True):
        assert_is_the_formula(s.cpu(), f.cpu(), s0.cpu(), f0.cpu(), 0.25)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used_and_the_current_one_kept():
    slow, fast = torch.zeros(100, device="cuda:1"), torch.ones(100, device="cuda:1")
    torch.cuda.set_device(0)
    interpolate_([slow, torch.zeros(3, device="cuda:0")], [fast, torch.ones(3, device="cuda:0")], 0.5)
    assert torch.cuda.current_device() == 0
    assert bool((slow == 0.5).all())


def test_a_list_with_tensors_on_cpu_and_gpu():
    slow, fast = ([make(5), make(5, device="cuda")] for make in (torch.zeros, torch.ones))
    interpolate_(slow, fast, 0.5)
    assert all(t.tolist() == [0.5] * 5 for t in slow + fast)


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4097
    slow = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    fast = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    interpolate_([slow], [fast], 0.25)
    assert bool((slow[:: 2**20] == 0.25).all())
    assert bool((slow[-5000:] == 0.25).all())


def test_opcheck():
    slow, fast = on_gpu([5, 4096], torch.float32, 0), on_gpu([5, 4096], torch.float32, 1)
    torch.library.opcheck(torch.ops.torch_gradmatch.interpolate_.default, (slow, fast, 0.5))


def test_a_graph_built_before_is_stale():
    fast = torch.zeros(3, device="cuda")
    loss = (torch.ones(3, device="cuda", requires_grad=True) * fast).sum()
    interpolate_([torch.ones(3, device="cuda")], [fast], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_found_before_interpolating(loss: float):
    """On a GPU losses are read once in a meta-iteration, so the error comes at its end; the parameters are restored."""
    parameter = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = GradMatch(torch.optim.SGD([parameter], lr=0.1), Fish(0.5))
    with pytest.raises(ValueError, match="the loss of batch 1"):
        optimizer.meta_step(lambda scale: (parameter * scale).sum(), [1.0, loss, 1.0])
    assert parameter.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fish_on_a_gpu_is_fish_on_a_cpu(dtype: torch.dtype):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
        x = torch.randn(6, 4, 8, dtype=dtype)
        model.to(device)
        method = Fish(0.5, inner_steps=3, meta_dtype=torch.float32)
        optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
        for batch in x.to(device):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        results.append([p.detach().cpu() for p in model.parameters()])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
