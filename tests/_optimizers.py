"""Every optimizer of torch, pytorch_optimizer, schedulefree and timm: how it is built and stepped.

A library is imported when its recipes are asked for: ``tests/methods`` has those of the first two, ``tests/ecosystem``
all. What they have to fulfil is in ``_optimizer_laws.py``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MODULES = {
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "schedulefree": "schedulefree",
    "timm": "timm.optim",
}
Loop = Literal["plain", "closure", "sam", "loss", "pair", "graph"]


class Network(nn.Module):
    """Two matrices that fit together as LoRA factors do, and two biases.

    At parameters p + c it is with ``origin`` c what it is at p with 0.
    """

    origin = 0.0

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.build(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)

    def build(self, dtype: torch.dtype) -> None:
        self.inp = nn.Linear(4, 6, dtype=dtype)
        self.out = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.inp, x))
        return self.layer(self.out, hidden)

    def layer(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight - self.origin, layer.bias - self.origin)


class Table(Network):
    """An embedding with sparse gradients, for the optimizers that take nothing else."""

    def build(self, dtype: torch.dtype) -> None:
        self.rows = nn.Embedding(8, 3, sparse=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows((x[:, 0].abs() * 10).long() % 8) - self.origin


@dataclass(frozen=True)
class Recipe:
    """How one optimizer, ``"library.Class"`` or ``"library.Class(variant)"``, is built and stepped."""

    name: str
    cls: type[Any]
    build: Callable[[nn.Module], Any]  # ready to train
    # "plain": backward, step(). "closure": step(closure), which evaluates the model itself. "sam": backward, then
    # step(closure). "loss": backward, then step with a closure that only returns the loss. "pair": step(closure), which
    # returns the outputs, too. "graph": backward that keeps the graph for second derivatives, then step().
    loop: Loop = "plain"
    dtype: torch.dtype = torch.float64  # the widest that the class computes in
    network: type[Network] = Network
    distributed: bool = False  # whether it needs a process group

    def new_model(self, seed: int = 0) -> Any:
        return self.network(self.dtype, seed)


def optimizer_classes(library: str) -> dict[str, type[Any]]:
    """Every optimizer that a library ships, by name; torch's own only under torch."""
    found = {}
    for name, value in vars(importlib.import_module(MODULES[library])).items():
        if not inspect.isclass(value) or value is Optimizer or name.startswith("_"):
            continue
        foreign = library != "torch" and value.__module__.startswith("torch.")
        if not foreign and (issubclass(value, Optimizer) or (library == "schedulefree" and hasattr(value, "step"))):
            found[name] = value
    return found


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The groups that pytorch_optimizer's Muons want: matrices, and everything else for their AdamW."""
    others = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices(model), "use_muon": True}, {"params": others, "use_muon": False}]


def momentum_sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def training(optimizer: Any) -> Any:
    """Switch an optimizer that has two modes to training."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def gsam(cls: type[Any], model: nn.Module) -> Any:
    schedule = importlib.import_module("pytorch_optimizer.lr_scheduler").ProportionScheduler
    base = momentum_sgd(model)
    steady = torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0)
    return cls(model.parameters(), base, model, schedule(steady, max_lr=0.05, max_value=0.1, min_value=0.1))


Build = Callable[[type[Any], nn.Module], Any]


def each(library: str, names: str, build: Build) -> dict[str, Build]:
    """Several classes of a library that are built alike."""
    return {f"{library}.{name}": build for name in names.split()}


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
    **dict.fromkeys(["pytorch_optimizer.AdaHessian", "pytorch_optimizer.SophiaH", "timm.Adahessian"], "graph"),
    **dict.fromkeys([f"pytorch_optimizer.{name}" for name in ("SAM", "BSAM", "LookSAM", "FriendlySAM")], "sam"),
    **dict.fromkeys([f"schedulefree.{name}ScheduleFreeClosure" for name in ("SGD", "AdamW", "RAdam")], "closure"),
    "torch.LBFGS": "closure",
    "pytorch_optimizer.WSAM": "closure",
    "pytorch_optimizer.AliG": "loss",
    "pytorch_optimizer.GSAM": "pair",
}
BUILDS: dict[str, Build] = {
    "torch.Muon": lambda cls, model: cls(matrices(model)),
    **each("pytorch_optimizer", "SpectralSphere LoRARite", lambda cls, model: cls(matrices(model))),
    **each("pytorch_optimizer", "AdaLOMO LOMO", lambda cls, model: cls(model)),
    **each(
        "pytorch_optimizer",
        "AdaGO AdaMuon DistributedMuon Muon MuonClip NorMuon",
        lambda cls, model: cls(muon_groups(model)),
    ),
    **each("pytorch_optimizer", "Magma OrthoGrad PCGrad TRAC SafeFP16Optimizer", lambda cls, model: cls(adam(model))),
    **each(
        "schedulefree", "ScheduleFreeWrapper ScheduleFreeWrapperReference", lambda cls, model: cls(momentum_sgd(model))
    ),
    "pytorch_optimizer.ScheduleFreeWrapper": lambda cls, model: cls(momentum_sgd(model)),
    "pytorch_optimizer.AdamMini": lambda cls, model: cls(model, lr=0.01, num_embeds=6, num_heads=2),
    "pytorch_optimizer.SAM": lambda cls, model: cls(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9),
    "pytorch_optimizer.LookSAM": lambda cls, model: cls(model.parameters(), torch.optim.Adam, k=2, lr=0.01),
    "pytorch_optimizer.FriendlySAM": lambda cls, model: cls(model.parameters(), torch.optim.Adam, lr=0.01),
    "pytorch_optimizer.WSAM": lambda cls, model: cls(model, model.parameters(), torch.optim.Adam, lr=0.01),
    "pytorch_optimizer.GSAM": gsam,
    "pytorch_optimizer.Lookahead": lambda cls, model: cls(momentum_sgd(model), k=2),
    "timm.Lookahead": lambda cls, model: cls(adam(model), k=2),
}
# The same class again, with the options that give it another kind of state.
VARIANTS: dict[str, Build] = {
    "torch.Adam(amsgrad)": lambda cls, model: cls(model.parameters(), lr=0.01, amsgrad=True),
    "torch.Adam(tensor lr)": lambda cls, model: cls(model.parameters(), lr=torch.tensor(0.01)),
    **each(
        "pytorch_optimizer",
        "EmoNavi(shadow) EmoFact(shadow) EmoLynx(shadow)",
        lambda cls, model: cls(model.parameters(), use_shadow=True),
    ),
    "pytorch_optimizer.Lookahead(pullback)": lambda cls, model: cls(
        momentum_sgd(model), k=2, pullback_momentum="pullback"
    ),
    "pytorch_optimizer.SAM(Adam, adaptive)": lambda cls, model: cls(
        model.parameters(), torch.optim.Adam, adaptive=True, lr=0.01
    ),
    "pytorch_optimizer.ScheduleFreeWrapper(Adam)": lambda cls, model: cls(adam(model)),
    "timm.Lookahead(Adamax)": lambda cls, model: cls(torch.optim.Adamax(model.parameters()), k=2),
}
LOOPS |= dict.fromkeys([name for name in VARIANTS if "Emo" in name], "loss")
SINGLE = {"pytorch_optimizer.FAdam"}  # computes in single precision whatever it is given
DISTRIBUTED = {"pytorch_optimizer.DeMo", "pytorch_optimizer.DistributedMuon"}
# Moves the parameters back to a sphere after each step, an interpolation like any other displacement.
PROJECTS = {"Nero"}
# What cannot be wrapped, the error of its own plain loop (or only ours), and why.
CANNOT: dict[str, tuple[type[Exception], str]] = {
    "pytorch_optimizer.LOMO": (NotImplementedError, "updates inside of backward(): there is no step to take"),
    "pytorch_optimizer.AdaLOMO": (NotImplementedError, "updates inside of backward(): there is no step to take"),
    "pytorch_optimizer.SafeFP16Optimizer": (AttributeError, "has no param_groups of its own"),
    "schedulefree.ScheduleFreeWrapper": (TypeError, "is no torch.optim.Optimizer"),
    "schedulefree.ScheduleFreeWrapperReference": (TypeError, "is no torch.optim.Optimizer"),
}
# What "reset" leaves as it is, where a new optimizer would begin anew, and why.
NOT_RESET = {
    "pytorch_optimizer.Magma": "keeps its averages in an attribute, by the id() of a parameter, not in its state",
    "timm.Adahessian": "draws from a generator in an attribute, which goes on",
    "pytorch_optimizer.ASGD": "writes into its learning rate, which reset leaves to the user and to schedulers",
    "pytorch_optimizer.SaRA": "chooses what it trains when it is built, and reset returns to when it was wrapped",
}


@contextmanager
def process_group(needed: bool) -> Iterator[None]:
    """Be alone in a process group inside the block, if one is needed and there is none."""
    needed = needed and not torch.distributed.is_initialized()
    if needed:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if needed:
            torch.distributed.destroy_process_group()


def recipes(*libraries: str) -> dict[str, Recipe]:
    """A recipe for every optimizer of these, by name."""
    classes = {f"{each}.{name}": cls for each in libraries for name, cls in sorted(optimizer_classes(each).items())}
    named = {name for name in {*OPTIONS, *LOOPS, *BUILDS, *SINGLE, *DISTRIBUTED} if name.split(".")[0] in libraries}
    unknown = {name.partition("(")[0] for name in named} - set(classes)
    assert not unknown, f"no library ships {unknown} any more"
    found = {}
    for key in (*classes, *(name for name in VARIANTS if name.split(".")[0] in libraries)):
        name = key.partition("(")[0]
        cls, options = classes[name], OPTIONS.get(name, {})
        build = VARIANTS.get(key) or BUILDS.get(key) or (lambda cls, model, o=options: cls(model.parameters(), **o))
        found[key] = Recipe(
            key,
            cls,
            lambda model, cls=cls, build=build: training(build(cls, model)),
            loop=LOOPS.get(key, LOOPS.get(name, "plain")),
            dtype=torch.float32 if name in SINGLE else torch.float64,
            network=Table if name == "torch.SparseAdam" else Network,
            distributed=name in DISTRIBUTED,
        )
    return found
