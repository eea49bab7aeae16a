"""For tests on several ranks: small models, batches of which each rank has a part, and what the ranks send."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_gradmatch import GradMatch

Batch = tuple[Tensor, Tensor]
WIDTH = 7  # which two or three ranks cannot divide: shards are uneven


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class SmallTransformer(nn.Module):
    """One layer of attention, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x.unsqueeze(-1)))).sum(-1)


def two_layers(*between: nn.Module, width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, width), *between, nn.Linear(width, WIDTH))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: two_layers(nn.BatchNorm1d(5), nn.GELU()),
    "transformer": SmallTransformer,
    "tied": TiedAutoencoder,
    "smooth": lambda: two_layers(nn.Tanh()),
    # Whose parameters are many more than the numbers that ranks agree by.
    "wide": lambda: two_layers(nn.BatchNorm1d(100), nn.GELU(), width=100),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(5)
    return MODELS[name]().to(dtype)


def domain_batches(domains: int, seed: int, *, samples: int = 12, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """One whole batch of each domain, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for domain in range(domains):
        x = torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)
        y = torch.sin(x * (1 + domain)) + 0.1 * torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)
        batches.append((x.to(dtype), y.to(dtype)))
    return batches


def part(batch: Batch, rank: int, size: int) -> Batch:
    """One rank's samples of a batch."""
    return batch[0][rank::size], batch[1][rank::size]


def mine(batches: list[Batch]) -> list[Batch]:
    return [part(batch, dist.get_rank(), dist.get_world_size()) for batch in batches]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def loss_over(model: nn.Module, batch: Batch, size: int) -> Tensor:
    """The loss of a whole batch as the mean over the parts: batch norm sees one part at a time."""
    return torch.stack([loss_of(model, part(batch, rank, size)) for rank in range(size)]).mean()


def sharded(
    model: nn.Module, mesh: DeviceMesh | None = None, *, reshard: bool = True, **policy: torch.dtype
) -> FSDPModule:
    """Shard the children and then the model, as one does."""
    if mesh is None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    settings = {"mesh": mesh, "reshard_after_forward": reshard, "mp_policy": MixedPrecisionPolicy(**policy)}
    for child in model.children():
        if isinstance(child, nn.TransformerEncoderLayer) or (type(model) is nn.Sequential and list(child.parameters())):
            fully_shard(child, **settings)
    return fully_shard(model, **settings)


def spread(scheme: str, model: nn.Module) -> nn.Module:
    """Put a model on all ranks by one of the schemes whose gradients are means over the ranks."""
    if scheme == "ddp":
        return DistributedDataParallel(model)
    if scheme == "hsdp":
        return sharded(
            model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard"))
        )
    return sharded(model, reshard=scheme == "fsdp")


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any number."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [full(p.grad) for p in model.parameters()]


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): b.clone() for name, b in model.named_buffers()}


def state_of(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    """All that a failed meta-iteration has to leave as it was."""
    state = copy.deepcopy([dict(model.state_dict()), optimizer.optimizer.state_dict()["state"]])
    return [*state, [None if p.grad is None else full(p.grad) for p in model.parameters()]]


def same(one: Any, other: Any) -> bool:
    """The same bits, whatever the structure."""
    if isinstance(one, Tensor):
        return torch.equal(full(one).nan_to_num(7.0), full(other).nan_to_num(7.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def mean_of_buffers(every: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over ranks of what each has, the largest of integers."""
    together = {name: torch.stack([one[name] for one in every]) for name in every[0]}
    return {n: b.mean(0) if b.is_floating_point() else b.max(0).values for n, b in together.items()}


def world(**settings: Any) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD} | settings


def error_of(function: Callable[..., Any], *arguments: Any) -> str:
    """What a call raises, as text; nothing if it goes well."""
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001  whichever it is, is the result
        return f"{type(error).__name__}: {error}"
    return ""


def not_a_number_on_last(loss_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The loss, which is NaN on the last rank."""
    factor = float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    return lambda batch: loss_fn(batch) * factor


class Collectives(TorchDispatchMode):
    """Counts what goes through the process groups inside the block, with its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
            self.sent.append((func.__name__.split(".")[0], sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))

    def reductions(self) -> list[int]:
        """Bytes of each all-reduce."""
        return [size for name, size in self.sent if name == "allreduce_"]

    def agreements(self) -> int:
        """How many times the ranks told each other some numbers."""
        return sum(name == "_allgather_base_" and size < 100 for name, size in self.sent)
