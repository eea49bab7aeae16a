"""Hours of what the tests do for seconds: ``python -m soak``, with ``.`` and ``tests`` on the path.

- ``kills``: training killed at random moments and resumed from its last checkpoint is bit for bit the undisturbed one.
- ``damage``: a checkpoint that is not what was saved is refused, with everything as before; or it is loaded, and then
  what there was before leaves no trace.
- ``sequences``: random sequences of what users do agree with the oracles of the stateful tests.
- ``flat``: a long training takes no more memory than a short one.

``SOAK_SHARE=0.01`` does a hundredth of it, ``SOAK_SEED`` another; pytest's options choose. What was found is written to
``out/soak/soak.md``.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import multiprocessing as mp
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from xml.etree import ElementTree

import hypothesis
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from methods.test_stateful import DirectionMachine, FishMachine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch_gradmatch
from torch_gradmatch import IDGM, Average, DomainBatchSampler, Fish, GradMatch, SmoothFish, meta_batches

SHARE, SEED = float(os.environ.get("SOAK_SHARE", "1")), int(os.environ.get("SOAK_SEED", "0"))
DOMAINS = 4
STEPS = 200  # of a training that is killed
SAVE_EVERY = 3
MOST_MEMORY = 8 << 30  # what is damaged may ask for any
MOST_GROWTH = 1 << 20  # bytes
LOOKS = 20  # at the memory of a long training

PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["soak"])  # or each process imports torch again


# ------------------------------------------------------------------------------------------------------------ training

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 0.02}], lr=1e-2),
    "both": lambda p: [torch.optim.SGD(p[:2], lr=1e-2, momentum=0.9), torch.optim.Adam(p[2:], lr=1e-2)],
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2, history_size=3),
}


def fish(**settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: Fish(0.3, inner_steps=DOMAINS, model=m, **settings)


def smooth(gamma: float = 0.5, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda m: SmoothFish(gamma, 0.05, m, **settings)


def exact(agreement: str, **settings: Any) -> Callable[[nn.Module], Any]:
    gamma = 1e-3 if agreement == "inner_product" else 0.1  # that one is unbounded: with more it diverges here
    return lambda m: IDGM(m, gamma, agreement, **settings)


class Variant(NamedTuple):
    """One way to train: in a plain ``loop``, which is saved in the middle of a walk, or by ``meta_step``."""

    method: Callable[[nn.Module], Any]
    optimizer: str
    loop: bool = False
    dtype: torch.dtype = torch.float32
    average: Average | None = None


VARIANTS = {
    "fish-carry": Variant(fish(track_alignment=True), "adamw", loop=True, average=Average(2, 0.9)),
    "fish-reset": Variant(fish(inner_state="reset", track_alignment="pairs", buffers="latest"), "groups", loop=True),
    "fish-meta-dtype": Variant(fish(meta_dtype=torch.float32), "sgd", loop=True, dtype=torch.bfloat16),
    "fish-several": Variant(fish(inner_state="reset"), "both", loop=True),
    "fish-lbfgs": Variant(fish(), "lbfgs"),
    "fish-meta-step": Variant(fish(meta_dtype=torch.float64), "adamw"),
    "fish-alone": Variant(lambda _: Fish(0.3), "sgd"),
    "smooth-fish": Variant(smooth(track_alignment=True), "adamw"),
    "smooth-fish-symmetric": Variant(smooth(0.02, symmetric=True), "both"),  # with more it diverges here
    "idgm-inner_product": Variant(exact("inner_product", one_pass=True), "adamw", average=Average()),
    "idgm-variance-forward": Variant(exact("variance", hvp="forward"), "sgd"),
    "idgm-cosine-finite_difference": Variant(exact("cosine", hvp="finite_difference"), "both"),
}


class Training:
    """A model, its optimizer, the learning rate's schedule and a place in the data, all of which a checkpoint holds."""

    def __init__(self, name: str, seed: int) -> None:
        self.variant = variant = VARIANTS[name]
        draw = torch.Generator().manual_seed(seed)
        self.data = TensorDataset(*(torch.randn(120, n, generator=draw).to(variant.dtype) for n in (4, 1)))
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)]
        self.model = nn.Sequential(*layers).to(variant.dtype)
        wrapped = OPTIMIZERS[variant.optimizer](list(self.model.parameters()))
        self.optimizer: GradMatch[Any] = GradMatch(wrapped, variant.method(self.model), variant.average)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 2 * STEPS)
        self.sampler = DomainBatchSampler([i % DOMAINS for i in range(120)], 5, seed=5, exhausted="cycle")
        self.loader = DataLoader(self.data, batch_sampler=self.sampler, generator=torch.Generator())
        self.items = self.forever()
        self.step = 0

    def forever(self) -> Iterator[Any]:
        while True:
            yield from self.loader if self.variant.loop else meta_batches(self.loader)

    def loss_fn(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.model(x) - y).square().mean()

    def advance(self, steps: int = 1) -> None:
        for _ in range(steps):
            item = next(self.items)
            if self.variant.loop:
                self.optimizer.zero_grad()
                self.loss_fn(item).backward()
                self.optimizer.step()
            else:
                self.optimizer.meta_step(self.loss_fn, item)
            self.scheduler.step()
            self.step += 1

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "sampler": self.sampler}

    def state(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return {**states, "step": self.step, "random": torch.get_rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.items = self.forever()
        self.step = state["step"]
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
        found |= leaves(value, f"{path}[{key!r}]", exact=exact)
    return found


def difference(actual: Any, expected: Any, *, exact: bool = True) -> str | None:
    """Where two nested states differ first."""
    one, two = leaves(actual, exact=exact), leaves(expected, exact=exact)
    differ = (f"{path}: {one.get(path)} for {two.get(path)}" for path in two | one if one.get(path) != two.get(path))
    return next(differ, None)


def same(actual: Any, expected: Any, what: str) -> None:
    differ = difference(actual, expected)
    assert differ is None, f"{what}: {differ}"


# --------------------------------------------------------------------------------------------------------------- kills


def strict() -> None:
    """What every process of a training begins with: one thread, and warnings are errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")


def train(name: str, seed: int, steps: int, folder: Path, dies_after: float) -> None:
    """Train to the end, from where the checkpoint is; a clock's signal kills it, wherever it is."""
    strict()
    training = Training(name, seed)
    checkpoint, unfinished = folder / "checkpoint.pt", folder / "unfinished.pt"
    if checkpoint.exists():
        training.load(torch.load(checkpoint, weights_only=True))
    began = time.monotonic()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, dies_after)
    while training.step < steps:
        training.advance()
        if training.step % SAVE_EVERY == 0 or training.step == steps:
            state = training.state()
            torch.save(state, unfinished)
            os.replace(unfinished, checkpoint)
            with (folder / "log").open("a") as log:
                log.write(f"{training.step} {hashlib.blake2b(repr(leaves(state)).encode()).hexdigest()}\n")
    signal.setitimer(signal.ITIMER_REAL, 0)
    (folder / "seconds").write_text(str(time.monotonic() - began))


Train = Callable[[str, int, int, Path, float], None]


def comes_to_the_end(train: Train, name: str, seed: int, steps: int, folder: Path, dies_after: float = 0) -> bool:
    """Train in a process of its own, which may die."""
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=train, args=(name, seed, steps, folder, dies_after))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGALRM), "the training failed: what it raised stands above"
    return process.exitcode == 0


def logged(folder: Path) -> list[tuple[int, str]]:
    """What the log says of every checkpoint; who is killed may leave half a line."""
    lines = [line.split() for line in (folder / "log").read_text().split("\n")]
    return [(int(line[0]), line[1]) for line in lines if len(line) == 2 and len(line[1]) == 128]


def kills(name: str, number: int, train: Train = train, steps: int = STEPS) -> str:
    """Kill a training so often; whenever it ends before that, begin another."""
    draw = random.Random(f"kills {name} {number} {SEED}")
    seed, landed, runs, in_writing, in_walk = draw.randrange(2**31), 0, 0, 0, 0
    with TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        assert comes_to_the_end(train, name, seed, steps, whole)
        seconds, expected = float((whole / "seconds").read_text()), dict(logged(whole))
        while landed < number:
            runs += 1
            broken = Path(folder, f"broken-{runs}")
            ended = False
            while not ended:
                after = draw.uniform(1e-4, 2 * seconds / (number - landed + 1)) if landed < number else 0
                (broken / "unfinished.pt").unlink(missing_ok=True)
                ended = comes_to_the_end(train, name, seed, steps, broken, after)
                if not ended:
                    landed += 1
                    in_writing += (broken / "unfinished.pt").exists()
                    saved = broken / "checkpoint.pt"
                    state = torch.load(saved, weights_only=True) if saved.exists() else None
                    in_walk += bool(state and state["optimizer"]["gradmatch"].get("inner_step", 0))
            for step, found in logged(broken):
                assert found == expected[step], f"the checkpoint of step {step} is not that of the undisturbed run"
            same(*(torch.load(one / "checkpoint.pt", weights_only=True) for one in (broken, whole)), "at the end")
    return f"{name}: {landed} kills, {in_writing} while a checkpoint was written, {in_walk} resumed in an inner loop"


# -------------------------------------------------------------------------------------------------------------- damage


def paths_in(state: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a nested state, but for the whole."""
    items: Any = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [path for key, value in items for path in ((*above, key), *paths_in(value, (*above, key)))]


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def another(draw: random.Random, value: Any, state: Any, others: Any) -> Any:
    """Something else than a value, most often not far from it, or from elsewhere."""
    elsewhere = [copy.deepcopy(at(found, draw.choice(paths_in(found)))) for found in (state, others)]
    choices: list[Any] = [None, 7, "text", [value], {"value": value}, [], {}, *elsewhere]
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


def damaged(draw: random.Random, whole: Any, others: Any) -> tuple[str, Any]:
    """Return what was done to a nested state in one place, ours every other time, and what it is then."""
    if draw.random() < 0.05:
        return "replaced whole", draw.choice([[], None, others, {}])
    state = copy.deepcopy(whole)
    found = paths_in(state)
    found.remove(("gradmatch",))  # without it a state is a plain optimizer's, which loads as such
    ours = [path for path in found if path[0] == "gradmatch"]
    path = draw.choice(ours if ours and draw.random() < 0.5 else found)
    kind = draw.choice(["missing", "foreign", *["replaced"] * 4])
    if kind == "foreign":
        path = (*draw.choice([p for p in [(), *found] if isinstance(at(state, p), dict)]), draw.choice(["foreign", -1]))
    parent, key = at(state, path[:-1]), path[-1]
    if kind == "missing":
        del parent[key]
    else:
        old = draw.choice([1, torch.ones(2, 3), {"step": 1}]) if kind == "foreign" else parent[key]
        parent[key] = another(draw, old, whole, others)
    return f"{kind}: {path}", state


def own(state: Any) -> Any:
    """What of a state this package has written, but for counters, which whoever loads has learned; else the damage."""
    ours = state.get("gradmatch") if isinstance(state, dict) else state
    return {key: entry for key, entry in ours.items() if key != "counters"} if isinstance(ours, dict) else state


def outcome(training: Training) -> Any:
    """What training comes to, or what it raises."""
    torch.manual_seed(1)
    try:
        training.advance(6)
    except Exception as error:  # noqa: BLE001  whatever it is
        return f"{type(error).__name__}: {error}"
    return training.state()


def refuses(load: Callable[[Any], None], state: Any) -> str | None:
    """The words in which a state is refused, if it is."""
    try:
        load(state)
    except ValueError as error:
        return str(error)
    except TypeError:
        if isinstance(state, dict):
            raise
        return "state dict"
    return None


def judge(name: str, state: Any, saved: dict[str, Any], steps: int) -> str:
    """Load a damaged optimizer's state in the middle of training; raise if anything is wrong then or afterwards."""

    def in_training() -> Training:
        training = Training(name, 2)
        training.advance(steps)
        return training

    live, twin = in_training(), in_training()
    before, given = copy.deepcopy(live.state()), copy.deepcopy(state)
    refusal = refuses(live.optimizer.load_state_dict, state)
    if refusal is not None:
        assert "state dict" in refusal or not isinstance(state, dict), f"a message that says nothing: {refusal}"
        same(live.state(), before, f"refused ({refusal}), but changed")
        same(outcome(live), outcome(twin), f"refused ({refusal}), but then another training")
        return "refused"
    same(state, given, "loading has changed what was loaded")
    same(live.model.state_dict(), before["model"], "loading has changed the model")

    live, fresh = in_training(), Training(name, 2)
    for training in (live, fresh):
        training.load(copy.deepcopy({**saved, "optimizer": state}))
    found, told, undamaged = map(own, (fresh.optimizer.state_dict(), state, saved["optimizer"]))
    healed, as_told = difference(found, undamaged, exact=False), difference(found, told, exact=False)
    assert healed is None or as_told is None, f"loaded, but neither as undamaged ({healed}) nor as it says ({as_told})"
    came_to = outcome(live)
    same(came_to, outcome(fresh), "loaded, but with what there was before it trains otherwise")
    if isinstance(came_to, str):
        words = ("diverge", "NaN", "not finite", "nan", "inf", "save between two lists")
        theirs = difference(told, undamaged) is None  # what is not ours has taken it
        assert theirs or any(word in came_to for word in words), f"loaded, and then {came_to}"
        return "cannot go on, as it says"
    return "the same" if healed is None else "these values"


def damage(number: int) -> str:
    """Damage the optimizer's part of one checkpoint and judge what comes of it."""
    draw = random.Random(f"damage {number} {SEED}")
    name, another_name = draw.sample(list(VARIANTS), 2)
    saved, other = Training(name, 1), Training(another_name, 3)
    saved.advance(draw.randrange(12))
    other.advance(draw.randrange(6))
    checkpoint = copy.deepcopy(saved.state())
    told, state = damaged(draw, checkpoint["optimizer"], copy.deepcopy(other.optimizer.state_dict()))
    try:
        return judge(name, state, checkpoint, draw.randrange(12))
    except BaseException as error:
        raise AssertionError(f"{name}, {told}\n{type(error).__name__}: {error}") from error


# --------------------------------------------------------------------------------------------------- sequences and flat

MACHINES: dict[str, type[RuleBasedStateMachine]] = {"fish": FishMachine, "direction": DirectionMachine}


def sequences(name: str, number: int) -> str:
    """Hypothesis prints a sequence that fails."""
    settings = hypothesis.settings(
        max_examples=max(1, round(20 * SHARE)),
        stateful_step_count=25,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    drawn = random.Random(f"sequences {name} {number} {SEED}").randrange(2**32)
    run_state_machine_as_test(hypothesis.seed(drawn)(MACHINES[name]), settings=settings)
    return f"{name}: {settings.max_examples} sequences of 25 steps"


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


def flat(name: str, iterations: int) -> str:
    torch.manual_seed(SEED)
    variant = VARIANTS[name]
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).to(variant.dtype)
    optimizer = GradMatch(
        OPTIMIZERS[variant.optimizer](list(model.parameters())), variant.method(model), variant.average
    )
    batches = [torch.randn(4, 2, dtype=variant.dtype) for _ in range(DOMAINS)]

    def loss_fn(x: Tensor) -> Tensor:
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return f"{name}, " + stays_flat(lambda: optimizer.meta_step(loss_fn, batches), iterations)


# ------------------------------------------------------------------------------------------------------------- program


@pytest.fixture
def told(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes what a part has found."""
    return lambda found: record_property(request.node.originalname.removeprefix("test_"), found)


@pytest.mark.parametrize("name", VARIANTS)
def test_flat(name: str, told: Callable[[str], None]):
    told(flat(name, max(2 * LOOKS, round(100_000 * SHARE))))


@pytest.mark.parametrize("name", VARIANTS)
def test_kills(name: str, told: Callable[[str], None]):
    told(kills(name, max(1, round(5 * SHARE))))


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("name", MACHINES)
def test_sequences(name: str, number: int, told: Callable[[str], None]):
    told(sequences(name, number))


@pytest.mark.parametrize("number", range(max(4, round(1000 * SHARE))))
def test_damage(number: int, told: Callable[[str], None]):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, limits[1]))
    try:
        told(damage(number))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def main(options: list[str]) -> int:
    """Let pytest do it, in a process that has imported nothing yet; write how often which part has found what."""
    folder = Path("out/soak")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", __file__, "-o", "addopts=", "-o", "junit_family=xunit1"]
    done = subprocess.run([*command, f"--junitxml={folder}/soak.xml", *options], check=False)
    told = ElementTree.parse(folder / "soak.xml")
    found = Counter(f"{one.get('name')}: {one.get('value')}" for one in told.iter("property"))
    found["FAILED"] = len([*told.iter("failure"), *told.iter("error")])
    versions = f"torch_gradmatch {torch_gradmatch.__version__}, torch {torch.__version__}; share {SHARE:g}"
    lines = [f"- {count} x {what}" for what, count in sorted(found.items())]
    (folder / "soak.md").write_text("\n".join(["# Soak", "", versions, "", *lines, ""]))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
