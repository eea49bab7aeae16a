"""Hours of what the tests do for seconds: ``python -m soak`` with ``.`` and ``tests`` on the path.

- ``kills``: training killed at random moments and resumed from its last checkpoint is bit for bit the undisturbed one.
- ``damage``: a checkpoint that is not what was saved is refused, with everything as before; or it is loaded, and then
  what there was before leaves no trace.
- ``sequences``: random sequences of what users do agree with the oracles of the stateful tests.
- ``flat``: a long training takes no more memory than a short one.

A part is a function of a case and a seed, which raises if something is wrong and else lists what it found.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import io
import math
import multiprocessing as mp
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import hypothesis
import torch
import torch.distributed as dist
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from methods.test_stateful import DirectionMachine, FishMachine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from tqdm import tqdm

import torch_gradmatch
from torch_gradmatch import IDGM, Average, DomainBatchSampler, DomainLoader, Fish, GradMatch, SmoothFish, meta_batches

DOMAINS = 4
STEPS = 200  # of a training that is killed
SAVE_EVERY = 3
MOST_MEMORY = 8 << 30  # what is damaged may ask for any
MOST_GROWTH = 1 << 20  # bytes
LOOKS = 20  # at the memory of a long training

PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["soak", "torch.distributed.tensor"])  # or each process imports torch again


# ------------------------------------------------------------------------------------------------------------ training


def sgd(p: list[Tensor]) -> Any:
    return torch.optim.SGD(p, lr=1e-2, momentum=0.9)


def adamw(p: list[Tensor]) -> Any:
    return torch.optim.AdamW(p, lr=1e-2, amsgrad=True)


def groups(p: list[Tensor]) -> Any:
    return torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 0.02}], lr=1e-2)


def both(p: list[Tensor]) -> Any:
    return [sgd(p[:2]), torch.optim.Adam(p[2:], lr=1e-2)]


def lbfgs(p: list[Tensor]) -> Any:
    return torch.optim.LBFGS(p, lr=1e-2, max_iter=2, history_size=3)


def fish(**settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: Fish(0.3, inner_steps=DOMAINS, model=m, **settings)


def fish_walks(model: nn.Module) -> Any:
    group = dist.group.WORLD
    return Fish(0.3, inner_state="reset", model=model, track_alignment=True, process_group=group)


def smooth(gamma: float = 0.5, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: SmoothFish(gamma, 0.05, m, **settings)


def exact(agreement: str, **settings: Any) -> Callable[[nn.Module], Any]:
    gamma = 1e-3 if agreement == "inner_product" else 0.1  # that one is unbounded: with more it diverges here
    return lambda m: IDGM(m, gamma, agreement, **settings)


class Variant(NamedTuple):
    """One way to train: in a plain ``loop``, which is saved in the middle of a walk, or by ``meta_step``."""

    method: Callable[[nn.Module], Any]
    optimizer: Callable[[list[Tensor]], Any]
    loop: bool = False
    loader: str = "plain"  # or "workers" or "streams"
    dtype: torch.dtype = torch.float32
    split: str | None = None  # of the work between two ranks
    average: Average | None = None


VARIANTS = {
    "fish-carry": Variant(fish(track_alignment=True), adamw, loop=True, average=Average(2, 0.9)),
    "fish-reset": Variant(fish(inner_state="reset", track_alignment="pairs", buffers="latest"), groups, loop=True),
    "fish-meta-dtype": Variant(fish(meta_dtype=torch.float32), sgd, loop=True, dtype=torch.bfloat16),
    "fish-several": Variant(fish(inner_state="reset"), both, loop=True),
    "fish-lbfgs": Variant(fish(), lbfgs),
    "fish-meta-step": Variant(fish(meta_dtype=torch.float64), adamw),
    "fish-alone": Variant(lambda _: Fish(0.3), sgd),
    "fish-workers": Variant(fish(track_alignment=True), adamw, loop=True, loader="workers"),
    "fish-streams": Variant(fish(), sgd, loop=True, loader="streams"),
    "smooth-fish": Variant(smooth(track_alignment=True), adamw),
    "smooth-fish-symmetric": Variant(smooth(0.02, symmetric=True), both),  # with more it diverges here
    "smooth-fish-workers": Variant(smooth(), sgd, loader="workers"),
    "idgm-inner_product": Variant(exact("inner_product", one_pass=True), adamw, average=Average()),
    "idgm-variance-forward": Variant(exact("variance", hvp="forward"), sgd),
    "idgm-cosine-finite_difference": Variant(exact("cosine", hvp="finite_difference"), both),
    "fish-walks": Variant(fish_walks, adamw, split="walks"),
    "smooth-fish-walks": Variant(
        lambda m: SmoothFish(1.0, 0.05, m, process_group=dist.group.WORLD), adamw, split="walks"
    ),
    "idgm-domains": Variant(lambda m: IDGM(m, 0.1, process_group=dist.group.WORLD), adamw, split="domains"),
}
OF_RANKS = [name for name, variant in VARIANTS.items() if variant.split is not None]
ALONE = [name for name in VARIANTS if name not in OF_RANKS]


class Training:
    """A model, its optimizer, the learning rate's schedule and a place in the data, all of which a checkpoint holds."""

    def __init__(self, name: str, seed: int, rank: int = 0) -> None:
        self.variant = variant = VARIANTS[name]
        self.seed, self.rank, self.size = seed, rank, 1 if variant.split is None else 2
        draw = torch.Generator().manual_seed(seed)
        self.data = TensorDataset(*(torch.randn(120, n, generator=draw).to(variant.dtype) for n in (4, 1)))
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)]
        self.model = nn.Sequential(*layers).to(variant.dtype)
        wrapped = variant.optimizer(list(self.model.parameters()))
        self.optimizer: GradMatch[Any] = GradMatch(wrapped, variant.method(self.model), variant.average)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 2 * STEPS)
        self.source, self.place = self.make_streams() if variant.loader == "streams" else self.make_loader()
        self.items = self.forever()
        self.step = 0

    def make_streams(self) -> tuple[Any, Any]:
        parts = {}
        for domain in range(DOMAINS):
            part = TensorDataset(*(t[domain::DOMAINS] for t in self.data.tensors))
            # With the loader's own generator torchdata (0.11) does not resume without workers.
            own = RandomSampler(part, generator=torch.Generator().manual_seed(domain))
            parts[domain] = StatefulDataLoader(part, batch_size=8, sampler=own, generator=torch.Generator())
        streams = DomainLoader(parts, 5 * DOMAINS, seed=5)
        return streams, streams

    def make_loader(self) -> tuple[Any, Any]:
        """Return what is iterated over, and what knows the place in it."""
        ranks = {"num_replicas": 2, "rank": self.rank, "split": self.variant.split} if self.size == 2 else {}
        domains = [i % DOMAINS for i in range(120)]
        place: Any = DomainBatchSampler(domains, 5, seed=5, exhausted="cycle", **ranks)
        settings: dict[str, Any] = {"batch_sampler": place, "generator": torch.Generator()}
        if self.variant.loader == "workers":  # which end when the training is killed: a fork server's would not
            loader = place = StatefulDataLoader(self.data, num_workers=2, multiprocessing_context="fork", **settings)
        else:
            loader = DataLoader(self.data, **settings)
        return (loader if self.variant.loop else meta_batches(loader)), place

    def forever(self) -> Iterator[Any]:
        while True:
            yield from self.source

    def loss_fn(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.model(x) - y).square().mean()

    def advance(self, steps: int = 1) -> None:
        for _ in range(steps):
            item = next(self.items)
            if self.size == 2:
                torch.manual_seed(self.seed + 2 * self.step + self.rank)
            if self.variant.loop:
                self.optimizer.zero_grad()
                self.loss_fn(item).backward()
                self.optimizer.step()
            else:
                self.optimizer.meta_step(self.loss_fn, item)
            self.scheduler.step()
            self.step += 1

    def state(self) -> dict[str, Any]:
        state = {"step": self.step, "model": self.model.state_dict(), "scheduler": self.scheduler.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "place": self.place.state_dict()}
        return state if self.size == 2 else {**state, "random": torch.get_rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.place.load_state_dict(state["place"])
        self.items = self.forever()
        self.step = state["step"]
        if self.size == 1:
            torch.set_rng_state(state["random"])


def leaves(state: Any, path: str = "", *, exact: bool = True) -> dict[str, str]:
    """What a nested state holds, by where it is; not exact, 1 and 1.0 and a tensor in another dtype are the same."""
    if isinstance(state, Tensor):
        kind = f"{state.dtype if exact else ''} {tuple(state.shape)}"
        if state.is_meta:
            return {path: f"{kind} meta"}
        dense = state.detach() if state.layout is torch.strided else state.detach().to_dense()
        if not exact and not dense.is_complex():
            dense = dense.double()
        content = dense.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
        return {path: f"{kind} {hashlib.blake2b(content, digest_size=12).hexdigest()}"}
    if not isinstance(state, dict | list | tuple):
        return {path: repr(state if exact or not isinstance(state, bool | int | float) else float(state))}
    found = {path: f"{'dict' if isinstance(state, dict) else 'list'} of {len(state)}"}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if key != "_base_seed":  # of torchdata's workers, who draw nothing: another in each process
            found |= leaves(value, f"{path}[{key!r}]", exact=exact)
    return found


def difference(actual: Any, expected: Any, *, exact: bool = True) -> str | None:
    """Where two nested states differ first."""
    one, two = leaves(actual, exact=exact), leaves(expected, exact=exact)
    differ = (f"{path}: {one.get(path)} for {two.get(path)}" for path in two | one if one.get(path) != two.get(path))
    return next(differ, None)


# --------------------------------------------------------------------------------------------------------------- kills


def strict() -> None:
    """What every process here begins with: one thread, and warnings are errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)  # workers are forked, and only fetch
    warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)  # torchdata's constructor calls it


def train(name: str, seed: int, steps: int, folder: Path, rank: int, store: Path, dies_after: float) -> None:
    """Train to the end, from where the checkpoint is; a clock's signal kills it, wherever it is."""
    strict()
    if VARIANTS[name].split is not None:
        dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    training = Training(name, seed, rank)
    checkpoint, unfinished = folder / "checkpoint.pt", folder / "unfinished.pt"
    if checkpoint.exists():
        training.load(torch.load(checkpoint, weights_only=True))
    began = time.monotonic()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, dies_after)
    while training.step < steps:
        training.advance()
        if rank == 0 and (training.step % SAVE_EVERY == 0 or training.step == steps):
            state = training.state()
            torch.save(state, unfinished)
            os.replace(unfinished, checkpoint)
            with (folder / "log").open("a") as log:
                log.write(f"{training.step} {hashlib.blake2b(repr(leaves(state)).encode()).hexdigest()}\n")
    signal.setitimer(signal.ITIMER_REAL, 0)
    (folder / f"seconds-{rank}").write_text(str(time.monotonic() - began))
    if training.size == 2:
        dist.destroy_process_group()


Train = Callable[..., None]


def started(train: Train, name: str, seed: int, steps: int, folder: Path, dying: int = 0, after: float = 0) -> bool:
    """Train in processes of their own, one of which may die; return whether it came to the end."""
    ranks = range(1 if VARIANTS[name].split is None else 2)
    with TemporaryDirectory() as store:
        common = (name, seed, steps, folder)
        processes: list[Any] = [
            PROCESSES.Process(target=train, args=(*common, rank, Path(store, "ranks"), after if rank == dying else 0))
            for rank in ranks
        ]
        for process in processes:
            process.start()
        processes[dying].join()
        if processes[dying].exitcode == -signal.SIGALRM:
            for process in processes:
                process.kill()
        for process in processes:
            process.join()
    if processes[dying].exitcode == -signal.SIGALRM:
        return False
    assert all(process.exitcode == 0 for process in processes), "the training failed: what it raised stands above"
    return True


def logged(folder: Path) -> list[tuple[int, str]]:
    """What the log says of every checkpoint; who is killed may leave half a line."""
    lines = [line.split() for line in (folder / "log").read_text().split("\n")]
    return [(int(line[0]), line[1]) for line in lines if len(line) == 2 and len(line[1]) == 128]


def kills(case: str, seed: int, train: Train = train, steps: int = STEPS) -> list[str]:
    """Kill a training so often; whenever it ends before that, begin another."""
    name, number = case.split("/")
    draw = random.Random(f"kills {case} {seed}")
    seed_of_all, landed, runs, in_writing, in_walk = draw.randrange(2**31), 0, 0, 0, 0
    with TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        whole.mkdir()
        started(train, name, seed_of_all, steps, whole)
        seconds, expected = float((whole / "seconds-0").read_text()), dict(logged(whole))
        while landed < int(number):
            runs += 1
            broken = Path(folder, f"broken-{runs}")
            broken.mkdir()
            ended = False
            while not ended:
                after = draw.uniform(1e-4, 2 * seconds / (int(number) - landed + 1)) if landed < int(number) else 0
                dying = draw.randrange(2) if VARIANTS[name].split else 0
                (broken / "unfinished.pt").unlink(missing_ok=True)
                ended = started(train, name, seed_of_all, steps, broken, dying, after)
                if not ended:
                    landed += 1
                    in_writing += (broken / "unfinished.pt").exists()
                    saved = broken / "checkpoint.pt"
                    state = torch.load(saved, weights_only=True) if saved.exists() else None
                    in_walk += bool(state and state["optimizer"]["gradmatch"].get("inner_step", 0))
            for step, found in logged(broken):
                assert found == expected[step], f"the checkpoint of step {step} is not that of the undisturbed run"
            final, of_whole = (torch.load(one / "checkpoint.pt", weights_only=True) for one in (broken, whole))
            differ = difference(final, of_whole)
            assert differ is None, differ
    return [f"{name}: {landed} kills, {in_writing} while a checkpoint was written, {in_walk} resumed in an inner loop"]


# -------------------------------------------------------------------------------------------------------------- damage


def paths_in(state: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a nested state, but for the whole."""
    items: Any = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [path for key, value in items for path in ((*above, key), *paths_in(value, (*above, key)))]


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def another(draw: random.Random, value: Any) -> Any:
    """Something else than a value, most often not far from it."""
    choices: list[Any] = [None, 7, "text", [value], {"value": value}, [], {}]
    if isinstance(value, Tensor):
        values, floating = value.detach().clone(), value.is_floating_point()
        line = values.reshape(-1)
        choices += [values.unsqueeze(0), line[: max(0, len(line) - 1)], torch.cat([line, line, line.new_ones(1)])]
        choices += [values.t() if values.dim() == 2 else line.unsqueeze(0), line[:0], values.expand(3, *values.shape)]
        choices += [values.to(dtype) for dtype in (torch.int64, torch.float16, torch.float64, torch.complex64)]
        choices += [values > 0, -values, torch.full_like(values, math.nan if floating else -7), values.to("meta")]
        choices += [torch.full_like(values, math.inf if floating else 2**40), values.tolist(), values.to_sparse()]
    elif isinstance(value, int | float):
        choices += [value + 1, -value - 1, value * 2 + 1, 0, not value, 10**9, 2**70, -(2**70), math.nan, math.inf]
        choices += [1e300, 0.5, True, str(value), torch.tensor(1.0)]
    elif isinstance(value, str):
        choices += [value[: len(value) // 2], value[::-1], "", value + "0", b"text"]
    elif isinstance(value, dict):
        choices += [list(value.values()), list(value), {**value, "foreign": 1}, dict(list(value.items())[1:])]
    elif isinstance(value, list):
        choices += [value[:-1], [*value, 7], value[::-1], dict(enumerate(value))]
    return draw.choice(choices)


def damage_entry(draw: random.Random, state: Any, others: Any) -> str:
    """Damage a nested state in one place, ours every other time; return what was done."""
    found = paths_in(state)
    ours = [path for path in found if path[0] == "gradmatch"]
    path = draw.choice(ours if ours and draw.random() < 0.5 else found)
    parent, key = at(state, path[:-1]), path[-1]
    kind = draw.choice(["missing", "foreign", "swapped", "other", *["replaced"] * 3])
    if kind == "missing":
        del parent[key]
        return f"missing: {path}"
    if kind == "foreign":
        where = draw.choice([p for p in [(), *found] if isinstance(at(state, p), dict)])
        name = draw.choice(["foreign", 10**6, -1, "state", "gradmatch"])
        at(state, where)[name] = another(draw, draw.choice([1, torch.ones(2, 3), {"step": 1}]))
        return f"foreign: {name!r} at {where}"
    if kind == "swapped":
        other = draw.choice([p for p in found if p[-1] == key] or found)
        if other[: len(path)] != path and path[: len(other)] != other:
            at(state, other[:-1])[other[-1]], parent[key] = at(state, path), at(state, other)
            return f"swapped: {path} and {other}"
    if kind == "other" and path in paths_in(others):
        parent[key] = at(others, path)
        return f"of another's: {path}"
    parent[key] = another(draw, parent[key])
    return f"replaced: {path} by {str(parent[key])[:80]!r}"


def damage_file(draw: random.Random, state: Any) -> tuple[str, Any]:
    """Save a state, damage the file and load that; return what was done, and None if torch refused it."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=draw.random() < 0.3)  # only zip files have a check sum
    content = bytearray(file.getvalue())
    places = [draw.randrange(len(content)) for _ in range(draw.choice([1, 1, 1, 2, 8]))]
    if draw.random() < 0.2:
        content, told = content[: places[0]], f"cut to {places[0]} of {len(content)} bytes"
    else:
        told = f"bits flipped in bytes {places} of {len(content)}"
        for place in places:
            content[place] ^= 1 << draw.randrange(8)
    try:
        return told, torch.load(io.BytesIO(bytes(content)), weights_only=True)
    except Exception:  # noqa: BLE001  whatever torch makes of it
        return told, None


def part_of_ours(name: str, part: str, state: Any) -> Any:
    """What of a state this package has written; the rest is for torch and torchdata to check."""
    try:
        if part == "optimizer":  # whoever loads has learned some counters as well
            return {key: entry for key, entry in state["gradmatch"].items() if key != "counters"}
        if VARIANTS[name].loader == "streams":
            return {**state, "loaders": {label: {**e, "loader": None} for label, e in state["loaders"].items()}}
    except (AttributeError, KeyError, TypeError):  # which is the damage
        return state
    return state


def outcome(training: Training) -> Any:
    """What training comes to, or what it raises."""
    torch.manual_seed(1)
    try:
        training.advance(6)
    except Exception as error:  # noqa: BLE001  whatever it is
        return f"{type(error).__name__}: {error}"
    return training.state()


def refuses(load: Callable[[Any], None], damaged: Any) -> str | None:
    """The words in which a state is refused, if it is."""
    try:
        load(damaged)
    except ValueError as error:
        return str(error)
    except TypeError:
        if isinstance(damaged, dict):
            raise
        return "state dict"
    return None


def judge(name: str, part: str, damaged: Any, saved: dict[str, Any], steps: int) -> str:
    """Load a damaged part of a checkpoint in the middle of training; raise if anything is wrong then or afterwards."""

    def in_training() -> Training:
        training = Training(name, 2)
        training.advance(steps)
        return training

    live, twin = in_training(), in_training()
    before, given = copy.deepcopy(live.state()), copy.deepcopy(damaged)
    refusal = refuses(getattr(live, part).load_state_dict, damaged)
    if refusal is not None:
        assert "state dict" in refusal or not isinstance(damaged, dict), f"a message that says nothing: {refusal}"
        changed = difference(live.state(), before)
        assert changed is None, f"refused ({refusal}), but changed: {changed}"
        changed = difference(outcome(live), outcome(twin))
        assert changed is None, f"refused ({refusal}), but then another training: {changed}"
        return "refused"
    changed = difference(damaged, given)
    assert changed is None, f"loading has changed what was loaded: {changed}"
    changed = difference(live.model.state_dict(), before["model"])
    assert changed is None, f"loading has changed the model: {changed}"

    live, fresh = in_training(), Training(name, 2)
    for training in (live, fresh):
        training.load(copy.deepcopy({**saved, part: damaged}))
    found, told, undamaged = (
        part_of_ours(name, part, s) for s in (getattr(fresh, part).state_dict(), damaged, saved[part])
    )
    same, as_told = difference(found, undamaged, exact=False), difference(found, told, exact=False)
    assert same is None or as_told is None, f"loaded, but neither as undamaged ({same}) nor as it says ({as_told})"
    came_to, of_fresh = outcome(live), outcome(fresh)
    changed = difference(came_to, of_fresh)
    assert changed is None, f"loaded, but with what there was before it trains otherwise: {changed}"
    if isinstance(came_to, str):
        words = ("diverge", "NaN", "not finite", "nan", "inf", "save between two lists")
        theirs = difference(told, undamaged) is None
        assert theirs or any(word in came_to for word in words), f"loaded, and then {came_to}"
        return (
            "taken by what is not ours, which cannot go on"
            if theirs
            else "values with which it cannot go on, as it says"
        )
    return "the same" if same is None else "these values"


def damage_one(number: int, seed: int) -> str:
    """Damage one checkpoint and judge what comes of it."""
    draw = random.Random(f"damage {number} {seed}")
    name, another_name = draw.sample(ALONE, 2)
    part = draw.choice(["optimizer", "optimizer", "place"] if VARIANTS[name].loader != "workers" else ["optimizer"])
    saved, other = Training(name, 1), Training(another_name, 3)
    saved.advance(draw.randrange(12))
    other.advance(draw.randrange(6))
    checkpoint = copy.deepcopy(saved.state())
    state, others = copy.deepcopy(checkpoint[part]), copy.deepcopy(other.state()[part])
    if draw.random() < 0.3:
        told, state = damage_file(draw, state)
        if state is None:
            return "torch.load refused"
    elif draw.random() < 0.05:
        state, told = draw.choice([([], "a list"), (None, "None"), (others, "another's"), ({}, "nothing")])
    else:
        told = damage_entry(draw, state, others)
    try:
        return judge(name, part, state, checkpoint, draw.randrange(12))
    except BaseException as error:
        raise AssertionError(f"{number}/1, {name}, {part}, {told}\n{type(error).__name__}: {error}") from error


def damage(case: str, seed: int) -> list[str]:
    """Damage some checkpoints, each drawn by its number."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    first, count = map(int, case.split("/"))
    return [damage_one(number, seed) for number in range(first, first + count)]


# --------------------------------------------------------------------------------------------------- sequences and flat

MACHINES: dict[str, type[RuleBasedStateMachine]] = {"fish": FishMachine, "direction": DirectionMachine}


def sequences(case: str, seed: int) -> list[str]:
    """Hypothesis prints a sequence that fails."""
    name, _, number = case.split("/")
    settings = hypothesis.settings(
        max_examples=int(number),
        stateful_step_count=25,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    drawn = random.Random(f"sequences {case} {seed}").randrange(2**32)
    run_state_machine_as_test(hypothesis.seed(drawn)(MACHINES[name]), settings=settings)
    return [f"{name}: a sequence of 25 steps"] * int(number)


def look() -> tuple[int, int]:
    """How many tensors there are, of those made since the collector was frozen, and bytes of this process's own."""
    gc.collect()
    anonymous = Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()), 1024 * int(anonymous)


def stays_flat(advance: Callable[[], object], iterations: int) -> str:
    """Call a function again and again, and raise if memory grows after the first tenth of it."""
    gc.collect()
    gc.freeze()  # what was there before is nothing new, and there is much of it
    looks = []
    try:
        for _ in range(LOOKS):
            for _ in range(iterations // LOOKS):
                advance()
            looks.append(look())
    finally:
        gc.unfreeze()
    tensors, growth = (last - first for last, first in zip(looks[-1], looks[LOOKS // 10 - 1], strict=True))
    assert tensors == 0, f"{tensors} tensors more at the end than after a tenth: {looks}"
    assert growth <= MOST_GROWTH, f"{growth:,} bytes more at the end than after a tenth: {looks}"
    return f"{iterations} meta-iterations: {growth / 1024:+,.0f} KiB"


def flat(case: str, seed: int) -> list[str]:
    name, iterations = case.split("/")
    torch.manual_seed(seed)
    variant = VARIANTS[name]
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).to(variant.dtype)
    optimizer = GradMatch(variant.optimizer(list(model.parameters())), variant.method(model), variant.average)
    batches = [torch.randn(4, 2, dtype=variant.dtype) for _ in range(DOMAINS)]

    def loss_fn(x: Tensor) -> Tensor:
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return [f"{name}, " + stays_flat(lambda: optimizer.meta_step(loss_fn, batches), int(iterations))]


# ------------------------------------------------------------------------------------------------------------- program

PARTS: dict[str, Callable[[str, int], list[str]]] = {
    "flat": flat,
    "kills": kills,
    "sequences": sequences,
    "damage": damage,
}


def cases(part: str, share: float) -> list[str]:
    """What is carried out of a part, the whole of it or a share."""
    if part == "kills":  # 102, of which 27 on two ranks
        return [f"{name}/{max(1, round(share * (9 if name in OF_RANKS else 5)))}" for name in VARIANTS]
    if part == "flat":
        return [
            f"{name}/{max(2 * LOOKS, round(100_000 * share))}" for name in ALONE if VARIANTS[name].loader == "plain"
        ]
    if part == "sequences":
        return [f"{name}/{i}/{max(1, round(20 * share))}" for i in range(10) for name in MACHINES]
    number = max(4, round(1000 * share))
    return [f"{first}/{min(20, number - first)}" for first in range(0, number, 20)]


def apart(part: str, case: str, seed: int) -> list[str]:
    """Carry out a case in a process of its own."""
    if part == "kills":  # which has its own
        return PARTS[part](case, seed)
    with ProcessPoolExecutor(1, PROCESSES, strict) as pool:
        return pool.submit(PARTS[part], case, seed).result()


def main(arguments: list[str] | None = None) -> int:
    """Carry out some parts and write what was found; return how many cases failed, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="how much of it: 0.01 for a hundredth")
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="where soak.md is written")
    parser.add_argument("--only", metavar="CASE", help="carry out one case of one part")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()!r}: choose of {', '.join(PARTS)}")
    if options.only is not None and len(parts) != 1:
        parser.error("--only is a case of one part: name that part")
    began = time.monotonic()
    found: dict[str, Counter[str]] = {part: Counter() for part in parts}
    failed = []
    with ThreadPoolExecutor(options.jobs) as jobs:
        waiting: dict[Future[list[str]], tuple[str, str]] = {}
        for part in parts:
            for case in cases(part, options.share) if options.only is None else [options.only]:
                waiting[jobs.submit(apart, part, case, options.seed)] = part, case
        for done in tqdm(as_completed(waiting), total=len(waiting)):
            part, case = waiting[done]
            error = done.exception()
            if error is None:
                found[part].update(done.result())
                continue
            command = f"PYTHONPATH=.:tests python -m soak {part} --seed {options.seed} --only '{case}'"
            failed.append(f"FAILED `{command}`\n\n```\n{''.join(traceback.format_exception(error))[-3000:]}```")
            tqdm.write(failed[-1], file=sys.stderr)
    versions = f"torch_gradmatch {torch_gradmatch.__version__}, torch {torch.__version__}"
    text = ["# Soak", f"{versions}; share {options.share:g}, {(time.monotonic() - began) / 60:.1f} minutes."]
    for part, told in found.items():
        text += [f"## {part}", "\n".join(f"- {count} x {what}" for what, count in sorted(told.items()))]
    page = "\n\n".join([*text, *failed]) + "\n"
    if options.only is None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.md").write_text(page)
    tqdm.write(page, file=sys.stdout)
    return min(100, len(failed))


if __name__ == "__main__":
    sys.exit(main())
