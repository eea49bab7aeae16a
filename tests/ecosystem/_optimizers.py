"""How every optimizer of torch, pytorch_optimizer, schedulefree and timm is built and stepped, over a small network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import pytorch_optimizer
import schedulefree
import timm.optim
import torch
from pytorch_optimizer.lr_scheduler import ProportionScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

LIBRARIES: dict[str, ModuleType] = {
    "torch": torch.optim,
    "pytorch_optimizer": pytorch_optimizer,
    "schedulefree": schedulefree,
    "timm": timm.optim,
}


class Network(nn.Module):
    """Two matrices that fit together as LoRA factors do, and two biases."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 6, dtype=dtype)
        self.out = nn.Linear(6, 3, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inp(x)))


class Table(nn.Module):
    """An embedding with sparse gradients, for the optimizers that take nothing else."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.rows = nn.Embedding(8, 3, sparse=True, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.rows.weight.copy_(torch.randn(8, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows((x[:, 0].abs() * 10).long() % 8)


Loop = Literal["plain", "closure", "sam", "loss", "pair", "graph"]


@dataclass(frozen=True)
class Recipe:
    """How one optimizer is built and stepped.

    Attributes:
        build: Makes the optimizer for a model, ready to train.
        loop: ``"plain"``: backward, ``step()``. ``"closure"``: ``step(closure)``, which evaluates the model itself.
            ``"sam"``: backward, then ``step(closure)``. ``"loss"``: backward, then ``step`` with a closure that only
            returns the loss. ``"pair"``: ``step(closure)``, which returns the outputs, too. ``"graph"``: backward
            that keeps the graph for second derivatives, then ``step()``.
        dtype: The widest that the class computes in.
        network: What it trains.
        iterates: Names of the state entries that lie where the parameters lie and that the steps depend on.
        distributed: Whether it needs a process group; see :func:`process_group`.
    """

    build: Callable[[nn.Module], Optimizer]
    loop: Loop = "plain"
    dtype: torch.dtype = torch.float64
    network: type[nn.Module] = Network
    iterates: tuple[str, ...] = ()
    distributed: bool = False

    def new_model(self, seed: int = 0) -> nn.Module:
        """Return the network, with other weights for another seed."""
        return self.network(self.dtype, seed)


def optimizer_classes(library: str) -> dict[str, type[Any]]:
    """Return every optimizer that a library ships, by name; torch's own only under torch."""
    found = {}
    for name, value in vars(LIBRARIES[library]).items():
        if not inspect.isclass(value) or value is Optimizer or name.startswith("_"):
            continue
        foreign = library != "torch" and value.__module__.startswith("torch.")
        if not foreign and (issubclass(value, Optimizer) or (library == "schedulefree" and hasattr(value, "step"))):
            found[name] = value
    return found


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups that pytorch_optimizer's Muons want: matrices, and everything else for their AdamW."""
    others = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices(model), "use_muon": True}, {"params": others, "use_muon": False}]


def momentum_sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def training(optimizer: Any) -> Any:
    """Switch an optimizer that has two modes to training."""
    optimizer.train()
    return optimizer


def gsam(model: nn.Module) -> Optimizer:
    base = momentum_sgd(model)
    steady = torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0)
    rho = ProportionScheduler(steady, max_lr=0.05, max_value=0.1, min_value=0.1)
    return pytorch_optimizer.GSAM(model.parameters(), base, model, rho)


po = pytorch_optimizer
OPTIONS: dict[str, dict[str, Any]] = {
    "torch.SGD": {"lr": 0.05, "momentum": 0.9},
    "torch.RMSprop": {"momentum": 0.9, "centered": True},
    "torch.ASGD": {"lr": 0.05, "t0": 2, "lambd": 0.01},
    "torch.LBFGS": {"lr": 0.1, "max_iter": 3},
    "pytorch_optimizer.ASGD": {"lr": 0.05},
    "pytorch_optimizer.AdaShift": {"keep_num": 2},
    "pytorch_optimizer.RAdam": {"degenerated_to_sgd": True},
    "pytorch_optimizer.Ranger": {"k": 2},
    "pytorch_optimizer.SaRA": {"threshold": 0.5, "lr": 0.01},
    "pytorch_optimizer.ScheduleFreeRAdam": {"silent_sgd_phase": False},
    "schedulefree.RAdamScheduleFree": {"silent_sgd_phase": False},
    "schedulefree.RAdamScheduleFreeClosure": {"silent_sgd_phase": False},
    "pytorch_optimizer.Ranger21": {"num_iterations": 100, "lookahead_merge_time": 2},
    "pytorch_optimizer.BSAM": {"num_data": 100, "lr": 0.01},
    "timm.SGDP": {"lr": 0.05, "momentum": 0.9},
    "timm.SGDW": {"lr": 0.05, "momentum": 0.9},
}
LOOPS: dict[str, Loop] = {
    "torch.LBFGS": "closure",
    "pytorch_optimizer.AdaHessian": "graph",
    "pytorch_optimizer.SophiaH": "graph",
    "timm.Adahessian": "graph",
    "pytorch_optimizer.AliG": "loss",
    "pytorch_optimizer.SAM": "sam",
    "pytorch_optimizer.GSAM": "pair",
    "pytorch_optimizer.WSAM": "closure",
    "pytorch_optimizer.BSAM": "sam",
    "pytorch_optimizer.LookSAM": "sam",
    "pytorch_optimizer.FriendlySAM": "sam",
    "schedulefree.SGDScheduleFreeClosure": "closure",
    "schedulefree.AdamWScheduleFreeClosure": "closure",
    "schedulefree.RAdamScheduleFreeClosure": "closure",
}
BUILDS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.Muon": lambda model: torch.optim.Muon(matrices(model)),
    "pytorch_optimizer.SpectralSphere": lambda model: po.SpectralSphere(matrices(model)),
    "pytorch_optimizer.LoRARite": lambda model: po.LoRARite(matrices(model)),
    "pytorch_optimizer.AdaLOMO": lambda model: po.AdaLOMO(model),
    "pytorch_optimizer.LOMO": lambda model: po.LOMO(model),
    "pytorch_optimizer.AdamMini": lambda model: po.AdamMini(model, lr=0.01, num_embeds=6, num_heads=2),
    **{
        f"pytorch_optimizer.{name}": lambda model, name=name: getattr(po, name)(muon_groups(model))
        for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
    },
    "pytorch_optimizer.SAM": lambda model: po.SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9),
    "pytorch_optimizer.LookSAM": lambda model: po.LookSAM(model.parameters(), torch.optim.Adam, k=2, lr=0.01),
    "pytorch_optimizer.FriendlySAM": lambda model: po.FriendlySAM(model.parameters(), torch.optim.Adam, lr=0.01),
    "pytorch_optimizer.WSAM": lambda model: po.WSAM(model, model.parameters(), torch.optim.Adam, lr=0.01),
    "pytorch_optimizer.GSAM": gsam,
    "pytorch_optimizer.Lookahead": lambda model: po.Lookahead(momentum_sgd(model), k=2),
    "pytorch_optimizer.Magma": lambda model: po.Magma(adam(model)),
    "pytorch_optimizer.OrthoGrad": lambda model: po.OrthoGrad(adam(model)),
    "pytorch_optimizer.PCGrad": lambda model: po.PCGrad(adam(model)),
    "pytorch_optimizer.TRAC": lambda model: po.TRAC(adam(model)),
    "pytorch_optimizer.SafeFP16Optimizer": lambda model: po.SafeFP16Optimizer(adam(model)),
    "pytorch_optimizer.ScheduleFreeWrapper": lambda model: training(po.ScheduleFreeWrapper(momentum_sgd(model))),
    "schedulefree.ScheduleFreeWrapper": lambda model: training(schedulefree.ScheduleFreeWrapper(momentum_sgd(model))),
    "schedulefree.ScheduleFreeWrapperReference": lambda model: training(
        schedulefree.ScheduleFreeWrapperReference(momentum_sgd(model))
    ),
    "timm.Lookahead": lambda model: timm.optim.Lookahead(adam(model), k=2),
}
# The same class again, with the options that give it another kind of state.
VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.Adam(amsgrad)": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    "torch.Adam(tensor lr)": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01)),
    "pytorch_optimizer.EmoNavi(shadow)": lambda model: po.EmoNavi(model.parameters(), use_shadow=True),
    "pytorch_optimizer.EmoFact(shadow)": lambda model: po.EmoFact(model.parameters(), use_shadow=True),
    "pytorch_optimizer.EmoLynx(shadow)": lambda model: po.EmoLynx(model.parameters(), use_shadow=True),
    "pytorch_optimizer.Lookahead(pullback)": lambda model: po.Lookahead(
        momentum_sgd(model), k=2, pullback_momentum="pullback"
    ),
    "pytorch_optimizer.Lookahead(Ranger)": lambda model: po.Lookahead(po.Ranger(model.parameters(), k=3), k=2),
    "pytorch_optimizer.SAM(Adam, adaptive)": lambda model: po.SAM(
        model.parameters(), torch.optim.Adam, adaptive=True, lr=0.01
    ),
    "pytorch_optimizer.ScheduleFreeWrapper(Adam)": lambda model: training(po.ScheduleFreeWrapper(adam(model))),
    "timm.Lookahead(Adamax)": lambda model: timm.optim.Lookahead(torch.optim.Adamax(model.parameters()), k=2),
}
LOOPS |= dict.fromkeys([name for name in VARIANTS if "Emo" in name], "loss")
SINGLE = {"pytorch_optimizer.FAdam"}  # computes in single precision whatever it is given
DISTRIBUTED = {"pytorch_optimizer.DeMo", "pytorch_optimizer.DistributedMuon"}
# Copies and averages of the parameters. They are Algorithm 1's business as much as the parameters are. Anchors, which
# never move once they are there (MADGRAD's x0, Prodigy's p0, TRAC's reference point), need no mention.
ITERATES: dict[str, tuple[str, ...]] = {
    "pytorch_optimizer.A2Grad": ("x_k",),
    "pytorch_optimizer.AccSGD": ("momentum_buffer",),  # the name lies
    "pytorch_optimizer.AdaSmooth": ("prev_param",),
    "pytorch_optimizer.Lookahead": ("slow_params", "slow_buffer"),
    "pytorch_optimizer.Ranger": ("slow_buffer",),
    "pytorch_optimizer.Ranger21": ("lookahead_params",),
    "pytorch_optimizer.ScheduleFreeAdamW": ("z",),
    "pytorch_optimizer.ScheduleFreeRAdam": ("z",),
    "pytorch_optimizer.ScheduleFreeSGD": ("z",),
    "pytorch_optimizer.ScheduleFreeWrapper": ("z",),
    "schedulefree.AdamWScheduleFree": ("z",),
    "schedulefree.AdamWScheduleFreeClosure": ("z",),
    "schedulefree.AdamWScheduleFreePaper": ("z",),
    "schedulefree.AdamWScheduleFreeReference": ("x", "y", "z"),
    "schedulefree.RAdamScheduleFree": ("z",),
    "schedulefree.RAdamScheduleFreeClosure": ("z",),
    "schedulefree.SGDScheduleFree": ("z",),
    "schedulefree.SGDScheduleFreeClosure": ("z",),
    "schedulefree.SGDScheduleFreeReference": ("x", "y", "z"),
    "timm.Lookahead": ("lookahead_slow_buff",),
}


@contextmanager
def process_group(needed: bool) -> Iterator[None]:
    """Be alone in a process group inside the block, if one is needed."""
    if not needed:
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def nested(optimizer: Any) -> list[Any]:
    """Return an optimizer and those that it wraps, at any depth."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return [optimizer, *(found for each in inner for found in nested(each))]


def iterates_of(optimizer: Any, parameter: nn.Parameter, names: tuple[str, ...]) -> dict[tuple[int, str], Tensor]:
    """Return the iterates that an optimizer keeps for a parameter, by depth and name."""
    found = {}
    for depth, each in enumerate(nested(optimizer)):
        entry = each.state.get(parameter, {})
        found |= {(depth, name): entry[name] for name in names if name in entry}
    return found


def _plain(library: str, name: str, cls: type[Any]) -> Callable[[nn.Module], Any]:
    options = OPTIONS.get(f"{library}.{name}", {})

    def build(model: nn.Module) -> Any:
        optimizer = cls(model.parameters(), **options)
        return training(optimizer) if hasattr(optimizer, "train") else optimizer

    return build


def recipes() -> dict[str, Recipe]:
    """Return a recipe for every optimizer, by ``"library.Class"`` or ``"library.Class(variant)"``."""
    found: dict[str, Recipe] = {}
    for library in LIBRARIES:
        for name, cls in sorted(optimizer_classes(library).items()):
            key = f"{library}.{name}"
            found[key] = Recipe(BUILDS.get(key) or _plain(library, name, cls))
    found |= {key: Recipe(build) for key, build in VARIANTS.items()}
    unknown = {*OPTIONS, *LOOPS, *BUILDS, *ITERATES, *SINGLE, *DISTRIBUTED} - set(found)
    assert not unknown, f"no library ships {unknown} any more"
    for key, recipe in found.items():
        name = key.partition("(")[0]
        found[key] = replace(
            recipe,
            loop=LOOPS.get(key, LOOPS.get(name, "plain")),
            dtype=torch.float32 if name in SINGLE else torch.float64,
            network=Table if name == "torch.SparseAdam" else Network,
            iterates=ITERATES.get(name, ()),
            distributed=name in DISTRIBUTED,
        )
    return found
