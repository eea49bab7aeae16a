"""Checkpoints that are not what was saved. Each loads as what it holds, or ``ValueError`` with everything as before.

A checkpoint is damaged as a file (bytes flipped, cut off) or in its entries (missing, foreign, swapped, of another
type, shape or value). It is loaded into an object that is in the middle of training. Then either

- ``torch.load`` has refused the file;
- ``load_state_dict`` raises ``ValueError``: parameters, buffers and state are bit for bit as before, and training goes
  on as that of a copy made before;
- it is loaded: what counts is that of the undamaged checkpoint, or that which the damaged one says, and training goes
  on; or what an optimizer of torch has loaded, it could not step with by itself either.
"""

from __future__ import annotations

import copy
import io
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _models import FeatureNet, loss_of, make_batches
from _wrapped import Averaging
from torch import Tensor
from torch.utils.data import DataLoader

from torch_gradmatch import (
    IDGM,
    DomainBatchSampler,
    DomainLoader,
    Fish,
    GradMatch,
    SmoothFish,
    meta_batches,
)

CHECKPOINTS = 1_000
DOMAINS = 3


# ------------------------------------------------------------------------------------------------- what is checkpointed


class Training:
    """A model and an optimizer at some point of training.

    Args:
        kind: Which method and optimizer.
        seed: Of weights and data.
    """

    wrapped = "the wrapped optimizer, which cannot step with it by itself either"

    def __init__(self, kind: str, seed: int) -> None:
        method, optimizer, dtype = TRAININGS[kind]
        self.kind, self.seed, self.dtype, self.advanced = kind, seed, dtype, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.model = FeatureNet(self.generator, dtype=dtype)
        self.optimizer = GradMatch(optimizer(list(self.model.parameters())), method(self.model))
        self.walks = isinstance(self.optimizer.method, Fish)
        self.steps = 0

    def advance(self, steps: int) -> None:
        """Train: Fish by single steps, which may end in the middle of a walk, the others by meta-iterations."""
        self.advanced += steps
        for _ in range(steps):
            drawn = make_batches(self.generator, DOMAINS, dtype=self.dtype)
            if not self.walks:
                self.optimizer.meta_step(lambda b: loss_of(self.model, b), drawn)
                continue
            batch = drawn[self.steps % DOMAINS]
            self.steps += 1

            def closure(batch: Any = batch) -> Tensor:
                self.optimizer.zero_grad()
                loss = loss_of(self.model, batch)
                loss.backward()
                return loss

            if self.kind == "fish-lbfgs":
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()

    def again(self) -> Training:
        """Another that has come as far."""
        other = Training(self.kind, self.seed)
        other.advance(self.advanced)
        return other

    def save(self) -> Any:
        return self.optimizer.state_dict()

    def load_all(self, state: Any, rest: Any) -> None:
        """As one resumes, the model's state first."""
        self.model.load_state_dict(rest)
        self.load(state)

    def load(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def everything(self) -> Any:
        """All that a load could change."""
        return copy.deepcopy((self.save(), self.model.state_dict(), self.optimizer.optimizer.state_dict()))

    def outcome(self) -> Any:
        return self.everything()

    def see_the_same_as(self, other: Training) -> None:
        """Train on what another will train on."""
        self.generator.set_state(other.generator.get_state())
        self.steps = other.steps

    def result(self) -> Any:
        """What training is for."""
        return self.model.state_dict()

    def wrapped_state(self) -> list[Any]:
        """Of each wrapped optimizer."""
        wrapped = self.optimizer.optimizer
        return [one.state_dict() for one in getattr(wrapped, "optimizers", [wrapped])]

    def wrapped_refuses(self, states: list[Any], error: BaseException) -> bool:
        """Whether the wrapped optimizer, by itself, has the same trouble: it loads what it then cannot step with."""
        model = FeatureNet(torch.Generator().manual_seed(self.seed), dtype=self.dtype)
        built = TRAININGS[self.kind][1](list(model.parameters()))
        batches = make_batches(self.generator, 4 * DOMAINS, dtype=self.dtype)
        try:
            for alone, state in zip(built if isinstance(built, list) else [built], states, strict=True):
                alone.load_state_dict(state)
                for batch in batches:

                    def closure(batch: Any = batch, alone: Any = alone) -> Tensor:
                        alone.zero_grad()
                        loss = loss_of(model, batch)
                        loss.backward()
                        return loss

                    closure()
                    alone.step(closure)
        except Exception:  # noqa: BLE001  whatever it is
            return True
        return False


class Place:
    """A sampler or a loader somewhere in its data.

    Args:
        kind: Which.
        seed: Decides where it is.
    """

    wrapped = "torchdata's loader, which cannot begin there by itself either"

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed, self.advanced = kind, seed, 0
        self.holder, self.loader = PLACES[kind]()
        self.taken: list[Any] = []
        self.iterator: Any = iter(self.loader)

    def advance(self, steps: int) -> None:
        """Take batches, and begin with the next epoch where one ends; leave a new iterator for what is loaded."""
        self.advanced += steps
        for _ in range(steps):
            item = next(self.iterator, None)
            if item is None:
                self.iterator = iter(self.loader)
            self.taken.append(plain(item))

    def again(self) -> Place:
        other = Place(self.kind, self.seed)
        other.advance(self.advanced)
        return other

    def wrapped_state(self) -> list[Any]:
        return []

    def damaged_within(self, damaged: Any, undamaged: Any) -> bool:
        """Whether the damage lies in what torchdata's loaders have saved of themselves, which is theirs to check."""

        def without(state: Any) -> Any:
            loaders = {label: {**entry, "loader": None} for label, entry in state["loaders"].items()}
            return {**state, "loaders": loaders}

        try:
            return difference(without(damaged), without(undamaged)) is None
        except (AttributeError, KeyError, TypeError):  # it has no loaders, or they are the damage
            return False

    def wrapped_refuses(self, states: list[Any], error: BaseException) -> bool:
        """Whether it is a domain's loader of torchdata that cannot begin where its own state says."""
        return traceback.extract_tb(error.__traceback__)[-1].filename.find("torchdata") >= 0

    def save(self) -> Any:
        return copy.deepcopy(self.holder.state_dict())

    def load_all(self, state: Any, rest: None) -> None:
        self.load(state)

    def load(self, state: Any) -> None:
        self.holder.load_state_dict(state)
        self.iterator = iter(self.loader)
        self.taken = []

    def everything(self) -> Any:
        return self.save()

    def outcome(self) -> Any:
        return self.taken, self.save()

    def see_the_same_as(self, other: Place) -> None:
        pass

    def result(self) -> Any:
        return self.outcome()


def plain(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.tolist()
    return [plain(part) for part in item] if isinstance(item, list | tuple) else item


def sampled(wrap: Callable[[Any], Any], **settings: Any) -> tuple[Any, Any]:
    labels = [domain for domain, size in zip("abc", (7, 12, 20), strict=True) for _ in range(size)]
    sampler = DomainBatchSampler(labels, 3, seed=5, **settings)
    return sampler, wrap(DataLoader(range(len(labels)), batch_sampler=sampler, generator=torch.Generator()))


def stateful() -> tuple[Any, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler, _ = sampled(lambda loader: loader, order="random")
    loader = StatefulDataLoader(range(39), batch_sampler=sampler, generator=torch.Generator())
    return loader, loader


def streamed(**settings: Any) -> tuple[Any, Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler

    loaders = {}
    for place, (label, size) in enumerate(zip("abc", (5, 9, 4), strict=True)):
        numbers = range(100 * place, 100 * place + size)
        own = RandomSampler(numbers, generator=torch.Generator().manual_seed(place))
        loaders[label] = StatefulDataLoader(numbers, batch_size=2, sampler=own)
    loader = DomainLoader(loaders, 12, seed=3, **settings)
    return loader, loader


PLACES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "sampler": lambda: sampled(lambda loader: loader),
    "sampler-cycle": lambda: sampled(lambda loader: loader, exhausted="cycle", weighting="proportional"),
    "sampler-walks": lambda: sampled(lambda loader: loader, num_replicas=2, rank=1, split="walks"),
    "meta_batches": lambda: sampled(lambda loader: meta_batches(loader, 3), exhausted="cycle"),
    "stateful-loader": stateful,
    "streams": streamed,
    "streams-of-two": lambda: streamed(domains_per_step=2),
}


def sgd(p: list[Tensor]) -> Any:
    return torch.optim.SGD(p, lr=0.02, momentum=0.9)


def adam(p: list[Tensor]) -> Any:
    return torch.optim.Adam(p, lr=0.01, amsgrad=True)


def groups(p: list[Tensor]) -> Any:
    return torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 0.02}], lr=0.01)


def both(p: list[Tensor]) -> Any:
    return [torch.optim.Adam(p[:3], lr=0.01), torch.optim.SGD(p[3:], lr=0.02, momentum=0.9)]


def lbfgs(p: list[Tensor]) -> Any:
    return torch.optim.LBFGS(p, lr=0.05, max_iter=2, history_size=3)


def fish(**settings: Any) -> Callable[[Any], Any]:
    return lambda model: Fish(0.3, inner_steps=4, model=model, **settings)


DOUBLE, SINGLE = torch.float64, torch.float32
TRAININGS: dict[str, tuple[Callable[[Any], Any], Callable[[list[Tensor]], Any], torch.dtype]] = {
    "fish-sgd": (fish(track_alignment=True), sgd, DOUBLE),
    "fish-reset-pairs": (fish(inner_state="reset", track_alignment="pairs", buffers="latest"), groups, DOUBLE),
    "fish-meta-dtype": (fish(meta_dtype=DOUBLE), adam, SINGLE),
    "fish-several": (fish(track_alignment=True), both, DOUBLE),
    "fish-lbfgs": (fish(), lbfgs, DOUBLE),
    "fish-averaging": (fish(), Averaging, DOUBLE),
    "fish-alone": (lambda _: Fish(0.3), sgd, DOUBLE),
    "smooth-fish": (lambda m: SmoothFish(0.5, 0.01, m), adam, DOUBLE),
    "idgm": (lambda m: IDGM(m), sgd, DOUBLE),
}


# -------------------------------------------------------------------------------------------------------------- damage

Paths = list[tuple[Any, ...]]


def paths_in(state: Any, above: tuple[Any, ...] = ()) -> Paths:
    """Where there is something in a nested state, but for the whole."""
    items: Any = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list):
        items = enumerate(state)
    found: Paths = []
    for key, value in items:
        found += [(*above, key), *paths_in(value, (*above, key))]
    return found


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def put(state: Any, path: tuple[Any, ...], value: Any) -> None:
    at(state, path[:-1])[path[-1]] = value


def another_tensor(draw: random.Random, tensor: Tensor) -> Any:
    """A tensor of another shape, dtype, layout or value, or no tensor."""
    values = tensor.detach().clone()
    floating = values.is_floating_point()
    choices: list[Callable[[], Any]] = [
        lambda: values.unsqueeze(0),
        lambda: values.reshape(-1)[: max(0, values.numel() - 1)],
        lambda: torch.cat([values.reshape(-1), values.reshape(-1), torch.ones(1, dtype=values.dtype)]),
        lambda: values.t() if values.dim() == 2 else values.reshape(1, -1),
        lambda: torch.zeros(0, dtype=values.dtype),
        lambda: values.to(torch.int64 if floating else torch.float32),
        lambda: values.to(torch.float16),
        lambda: values.to(torch.complex64),
        lambda: values > 0,
        lambda: torch.full_like(values, math.nan if floating else -7),
        lambda: torch.full_like(values, math.inf if floating else 2**40),
        lambda: -values,
        lambda: values.to_sparse() if values.dim() and not values.is_sparse else values.unsqueeze(0),
        lambda: values.to("meta"),
        lambda: values.expand(3, *values.shape),
        values.tolist,
        lambda: str(values.tolist()),
        lambda: None,
        lambda: 3.0,
        lambda: {"value": values},
        lambda: [values],
    ]
    return draw.choice(choices)()


def another(draw: random.Random, value: Any) -> Any:
    """Something else than a value, most often not far from it."""
    if isinstance(value, Tensor):
        return another_tensor(draw, value)
    if isinstance(value, bool):
        return draw.choice([not value, int(value), str(value), None, [value], 2])
    if isinstance(value, int | float):
        near = [value + 1, -value - 1, value * 2 + 1, 0]
        far = [10**9, 10**15, 2**70, -(2**70), math.nan, math.inf, 1e300, 0.5, True, str(value), None, [value], {}]
        return draw.choice([*near, *far, torch.tensor(float(value) if abs(value) < 1e9 else 1.0)])
    if isinstance(value, str):
        flipped = list(value)
        if flipped:
            flipped[draw.randrange(len(flipped))] = chr(draw.randrange(32, 127))
        return draw.choice(["".join(flipped), value[: len(value) // 2], "", value + "0", 7, None, [value], b"text"])
    if isinstance(value, dict):
        return draw.choice([{}, [], None, list(value.values()), list(value), 7, "text", {**value, "foreign": 1}])
    if isinstance(value, list):
        near = [[], value[:-1], [*value, 7], value[::-1], [value]]
        return draw.choice([*near, None, {}, dict(enumerate(value)), "text"])
    return draw.choice([None, 7, "text", [], {}, torch.ones(1)])


def damage_entry(draw: random.Random, state: Any, others: Callable[[], Any]) -> str:
    """Damage a nested state in one place, ours every other time; return what was done."""
    found = paths_in(state)
    ours = [path for path in found if path[0] == "gradmatch"]
    kind = draw.choice(["missing", "foreign", "swapped", *["replaced"] * 3, "other"])
    path = draw.choice(ours if ours and draw.random() < 0.5 else found)
    if kind == "missing":
        parent = at(state, path[:-1])
        del parent[path[-1]]
        return f"missing: {path}"
    if kind == "foreign":
        where = draw.choice([p for p in [(), *found] if isinstance(at(state, p), dict)])
        key: Any = draw.choice(["foreign", 10**6, -1, "state", "gradmatch"])
        at(state, where)[key] = another(draw, draw.choice([1, torch.ones(2, 3), {"step": 1}]))
        return f"foreign: {key!r} at {where}"
    if kind == "swapped":
        same = [p for p in found if p[-1] == path[-1] and p != path] or found
        other = draw.choice(same)
        if other[: len(path)] != path and path[: len(other)] != other:
            one, two = at(state, path), at(state, other)
            put(state, path, two)
            put(state, other, one)
            return f"swapped: {path} and {other}"
        kind = "replaced"
    if kind == "other":
        theirs = others()
        common = [p for p in paths_in(theirs) if p in found]
        if common:
            path = draw.choice(common)
            put(state, path, at(theirs, path))
            return f"of another's: {path}"
    value = another(draw, at(state, path))
    put(state, path, value)
    return f"replaced: {path} by {str(value)[:80]!r}"


def damage_file(draw: random.Random, state: Any) -> tuple[str, Any]:
    """Save a state, damage the file and load that; return what was done, and None if torch refused it."""
    file = io.BytesIO()
    zipped = draw.random() < 0.3
    torch.save(state, file, _use_new_zipfile_serialization=zipped)  # only zip files have a check sum
    content = bytearray(file.getvalue())
    if draw.random() < 0.2:
        cut = draw.randrange(len(content))
        content, told = content[:cut], f"cut to {cut} of {len(content)} bytes"
    else:
        count = draw.choice([1, 1, 1, 2, 8])
        places = [draw.randrange(len(content)) for _ in range(count)]
        for place in places:
            content[place] ^= 1 << draw.randrange(8)
        told = f"bits flipped in bytes {places} of {len(content)}"
    try:
        return told, torch.load(io.BytesIO(bytes(content)), weights_only=True)
    except Exception as error:  # noqa: BLE001  whatever torch makes of it
        return f"{told}: torch.load raises {type(error).__name__}", None


# ------------------------------------------------------------------------------------------------------------- verdict


def difference(actual: Any, expected: Any, path: str = "", *, exact: bool = True) -> str | None:
    """Where two nested states differ; NaN is NaN. Not exact: numbers and tensors may be those cast to another dtype."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if actual.shape != expected.shape:
            return f"{path}: shape {tuple(actual.shape)} for {tuple(expected.shape)}"
        if exact and actual.dtype != expected.dtype:
            return f"{path}: {actual.dtype} for {expected.dtype}"
        if expected.is_meta or actual.is_meta:
            return None if expected.is_meta == actual.is_meta else f"{path}: on {actual.device}"
        actual, expected = (t.to_dense() if t.layout is not torch.strided else t for t in (actual, expected))
        if not exact and expected.is_complex() and not actual.is_complex():
            return f"{path}: complex"
        same = torch.equal(*(t.detach().to(actual.dtype).nan_to_num(nan=7.25) for t in (actual, expected)))
        return None if same else f"{path}: other values"
    if isinstance(expected, dict) and isinstance(actual, dict):
        if set(actual) != set(expected):
            return f"{path}: keys {list(actual)} for {list(expected)}"
        pairs = [(key, actual[key], expected[key]) for key in expected]
    elif isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        if len(actual) != len(expected):
            return f"{path}: {len(actual)} for {len(expected)}"
        pairs = [(i, a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    else:
        if isinstance(expected, Tensor) != isinstance(actual, Tensor):
            return f"{path}: {actual!r:.60} for {expected!r:.60}"
        same = type(actual) is type(expected) if exact else True
        if not exact and isinstance(expected, str) and str(actual).startswith("<generator object Optimizer."):
            return None  # what torch makes of a text in an optimizer's state
        if isinstance(actual, float) and isinstance(expected, float) and math.isnan(actual):
            return None if same and math.isnan(expected) else f"{path}: {actual!r:.60} for {expected!r:.60}"
        return None if same and actual == expected else f"{path}: {actual!r:.60} for {expected!r:.60}"
    found = (difference(a, e, f"{path}[{key!r}]", exact=exact) for key, a, e in pairs)
    return next((one for one in found if one), None)


def decoded(state: Any) -> Any:
    """What a state dict says, without empty entries, the note for torch.distributed.checkpoint among them.

    Nor which counters were learned: whoever loads has learned some as well.
    """
    if not isinstance(state, dict):
        return state
    if isinstance(state.get("state"), dict):
        state = {**state, "state": {key: entry for key, entry in state["state"].items() if entry != {}}}
    if isinstance(state.get("gradmatch"), dict):
        state = {**state, "gradmatch": {k: v for k, v in state["gradmatch"].items() if k != "counters"}}
    return state


def as_torch_reads(told: Any, loaded: Any) -> Any:
    """What a state dict says to torch: parameters by their place in the groups, and what these lack as it was."""
    groups, of_loaded = (one.get("param_groups") if isinstance(one, dict) else None for one in (told, loaded))
    if not isinstance(groups, list) or not isinstance(of_loaded, list) or not isinstance(told.get("state"), dict):
        return told
    groups = [{**more, **group} for group, more in zip(groups, of_loaded, strict=True)]
    numbers = [number for group in groups for number in group["params"]]
    place = {number: i for i, number in enumerate(numbers)} if len(set(numbers)) == len(numbers) else {}
    for group in groups:
        group["params"] = [place.get(number, number) for number in group["params"]]
    for group, more in zip(groups, of_loaded, strict=True):  # by which AdamW is told from Adam, whatever was saved
        group |= {k: v for k, v in more.items() if k == "decoupled_weight_decay"}
    return {**told, "param_groups": groups, "state": {place.get(k, k): entry for k, entry in told["state"].items()}}


def is_finite(state: Any) -> bool:
    """Whether no number in a nested state is so large that training on it may diverge."""
    if isinstance(state, Tensor):
        state = state.to_dense()
        return (
            state.is_meta
            or not state.is_floating_point()
            or state.numel() == 0
            or bool(state.detach().abs().max() < 1e6)
        )
    if isinstance(state, dict):
        return all(map(is_finite, state.values()))
    if isinstance(state, list | tuple):
        return all(map(is_finite, state))
    return not isinstance(state, int | float) or abs(state) < 1e6


def judge(live: Any, damaged: Any, undamaged: Any, rest: Any = None) -> str:
    """Load a damaged state, and raise if anything is wrong with what comes of it.

    Args:
        live: In the middle of training.
        damaged: What to load.
        undamaged: What it was before.
        rest: What was saved beside it, undamaged: the model's state.

    Returns:
        ``"refused"``, ``"the same"``, ``"these values"``, or that the wrapped optimizer, or torchdata's loader, takes
        what it cannot go on with by itself either.
    """
    twin, reference = live.again(), live.again()
    assert difference(twin.everything(), live.everything()) is None, "another came elsewhere"
    before = live.everything()
    given = copy.deepcopy(damaged)
    try:
        live.load(damaged)
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and (isinstance(damaged, dict) or isinstance(live, Place)):
            raise
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "state dict" in message or not isinstance(damaged, dict), f"a message that says nothing: {message}"
        changed = difference(live.everything(), before)
        assert changed is None, f"refused ({message}), but changed: {changed}"
        live.advance(6)
        twin.advance(6)
        changed = difference(live.outcome(), twin.outcome())
        assert changed is None, f"refused ({message}), but then another training: {changed}"
        return "refused"
    changed = difference(damaged, given)
    assert changed is None, f"loading has changed what was loaded: {changed}"
    if isinstance(live, Training):
        changed = difference(live.model.state_dict(), before[1])
        assert changed is None, f"loading the optimizer's state has changed the model: {changed}"
    live, fresh = live.again(), make(live.kind, live.seed)
    for one, state in ((live, damaged), (fresh, damaged), (reference, undamaged)):
        one.load_all(copy.deepcopy(state), rest)
    same = difference(decoded(live.save()), decoded(reference.save()))
    said = decoded(fresh.save())
    told = difference(said, as_torch_reads(decoded(damaged), said), exact=False)
    assert same is None or told is None, f"loaded, but neither as undamaged ({same}) nor as it says ({told})"
    wrapped = copy.deepcopy(live.wrapped_state())
    fresh.see_the_same_as(live)
    try:
        live.advance(6)
    except Exception as error:
        if live.wrapped_refuses(wrapped, error):
            return f"taken by {live.wrapped}"
        if is_finite(damaged) or not any(word in str(error) for word in ("diverge", "NaN", "not finite", "nan", "inf")):
            raise
        return "these values, which are not finite"
    fresh.advance(6)
    changed = difference(live.result(), fresh.result())
    if changed is not None and isinstance(live, Place) and live.damaged_within(damaged, undamaged):
        return f"taken by {live.wrapped}"
    assert changed is None, f"loaded, but with what there was before it trains otherwise: {changed}"
    return "the same" if same is None else "these values"


def cases(share: float) -> list[str]:
    return [str(number) for number in range(max(4, round(CHECKPOINTS * share)))]


def make(kind: str, seed: int) -> Any:
    return Training(kind, seed) if kind in TRAININGS else Place(kind, seed)


def run(case: str, seed: int, folder: Path) -> dict[str, Any]:
    """Damage one checkpoint, drawn by the number of the case."""
    draw = random.Random(f"damage {case} {seed}")
    kind = draw.choice([*TRAININGS, *TRAININGS, *PLACES])
    saved = make(kind, 1)
    saved.advance(draw.randrange(12))
    state = saved.save()
    undamaged = copy.deepcopy(state)
    rest = copy.deepcopy(saved.model.state_dict()) if kind in TRAININGS else None

    def others() -> Any:
        theirs = make(draw.choice([k for k in (TRAININGS if kind in TRAININGS else PLACES) if k != kind]), 3)
        theirs.advance(draw.randrange(6))
        return theirs.save()

    live = make(kind, 2)
    live.advance(draw.randrange(12))
    told = f"{kind}: "
    if draw.random() < 0.3:
        how, state = damage_file(draw, state)
        told += how
        if state is None:
            return {"damage": told, "verdict": "torch.load refused", "kind": kind}
    elif draw.random() < 0.05:
        state, how = draw.choice([([], "a list"), (None, "None"), (others(), "another's"), ({}, "nothing")])
        told += how
    else:
        told += damage_entry(draw, state, others)
    try:
        verdict = judge(live, state, undamaged, rest)
    except BaseException as error:
        raise AssertionError(f"{told}\n{type(error).__name__}: {error}") from error
    return {"damage": told, "verdict": verdict, "kind": kind}


def figures(lines: list[dict[str, Any]]) -> list[str]:
    verdicts = Counter(line["verdict"] for line in lines)
    listed = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return [f"{len(lines):,} damaged checkpoints of {len({line['kind'] for line in lines})} kinds of objects: {listed}"]
