"""Fish around every optimizer of torch, pytorch_optimizer, schedulefree and timm, beside Algorithm 1 on deep copies."""

from __future__ import annotations

import copy
import io
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from _optimizers import Loop, Network, Recipe, iterates_of, process_group, recipes
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch

META_LR = 0.25  # a power of two: then every way to interpolate rounds alike, and all comparisons are exact
DOMAINS = 3
RECIPES = recipes()
Batch = tuple[Tensor, Tensor, int]
Iterates = dict[tuple[str, int, str], Tensor]  # by the parameter's name, the depth of the optimizer, and their own


@dataclass(frozen=True)
class Cannot:
    """Why a class cannot be wrapped, and the error that says so in its own plain loop, or only in ``GradMatch``."""

    why: str
    error: type[Exception]
    ours: bool = False


CANNOT = {
    "pytorch_optimizer.LOMO": Cannot("updates inside of backward(): there is no step to take", NotImplementedError),
    "pytorch_optimizer.AdaLOMO": Cannot("updates inside of backward(): there is no step to take", NotImplementedError),
    "pytorch_optimizer.SafeFP16Optimizer": Cannot("has no param_groups of its own", AttributeError),
    "schedulefree.ScheduleFreeWrapper": Cannot("is no torch.optim.Optimizer", TypeError, ours=True),
    "schedulefree.ScheduleFreeWrapperReference": Cannot("is no torch.optim.Optimizer", TypeError, ours=True),
}
SECOND = "needs backward(create_graph=True), which meta_step does not do: use step()"
NO_META_STEP = {
    "pytorch_optimizer.AdaHessian": SECOND,
    "pytorch_optimizer.SophiaH": SECOND,
    "timm.Adahessian": SECOND,
    "pytorch_optimizer.GSAM": "wants a closure that returns the outputs, too, of which meta_step knows nothing",
}
# What a class loses, or cannot load, in a checkpoint of its own; the plain loop shows it, too.
LOSSY = {
    "torch.NAdam": "keeps a product in single precision that load_state_dict casts",
    "pytorch_optimizer.QHAdam": "keeps numbers in single precision that load_state_dict casts",
    "pytorch_optimizer.Kron": "keeps factors in single precision that load_state_dict casts",
    "timm.Adahessian": "does not save its generator",
}
NO_COPY = {  # likewise, deep copies of model and optimizer together
    "pytorch_optimizer.Magma": "keeps its state by the id() of a parameter, and a copy of it has another",
    "timm.Adahessian": "keeps attributes at the parameters, which copies of parameters do not have",
}
UNSAFE = {  # with torch.load(weights_only=True), because of a deque or an object
    f"pytorch_optimizer.{name}" for name in ("AdaShift", "Conda", "SCION", "SCIONLight", "ScalableShampoo")
}
# What cannot be right, and why: (tests, cases, reason).
EXPLAINED: list[tuple[str, str, str]] = [
    (
        "follow|failed_meta_step|deep_copy",
        "pytorch_optimizer.ASGD-reset",
        "its step writes into lr and theta, which a scheduler might have changed as well: a warning says so",
    ),
    (
        "deep_copy",
        "pytorch_optimizer.(Lookahead|ScheduleFreeWrapper).*-(carry|reset)",
        "they cannot be copied themselves: their __getstate__ leaves out what their __setstate__ needs",
    ),
]
MODES = ("carry", "reset")
NAMES = [name for name in RECIPES if name not in CANNOT]
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_mode = pytest.mark.parametrize("inner_state", MODES)


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Provide a process group of one for the optimizers that ask for one."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    with process_group(name in RECIPES and RECIPES[name].distributed):
        yield


@pytest.fixture(autouse=True)
def explained(request: pytest.FixtureRequest) -> None:
    test, _, case = request.node.name.partition("[")
    for tests, cases, reason in EXPLAINED:
        if re.search(tests, test) and re.fullmatch(cases, case.removesuffix("]")):
            request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def domains(meta_iteration: int) -> list[Batch]:
    """Return one batch of each domain. The last entry seeds whatever draws random numbers."""
    generator = torch.Generator().manual_seed(meta_iteration)
    return [
        (
            torch.randn(5, 4, generator=generator, dtype=torch.float64),
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
            10 * meta_iteration + domain,
        )
        for domain in range(DOMAINS)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, y, seed = batch
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  what libraries draw from
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def take_step(loop: Loop, optimizer: Any, model: nn.Module, batch: Batch) -> None:
    """Take one step in the way that the class asks for."""

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward(create_graph=loop == "graph")
        return loss

    if loop == "closure":
        optimizer.step(closure)
    elif loop == "pair":
        optimizer.step(lambda: (None, closure()))
    else:
        loss = closure().detach()
        if loop == "sam":
            optimizer.step(closure)
        elif loop == "loss":
            optimizer.step(lambda: loss)
        else:
            optimizer.step()


def all_iterates(model: nn.Module, optimizer: Any, names: tuple[str, ...]) -> Iterates:
    return {
        (name, *key): tensor
        for name, p in model.named_parameters()
        for key, tensor in iterates_of(optimizer, p, names).items()
    }


class Algorithm1:
    """Fish as the paper has it, on a deep copy of the model that only the inner optimizer knows.

    ``"reset"`` makes copy and optimizer anew in each meta-iteration, ``"carry"`` keeps them. Iterates of the optimizer
    are moved like parameters; one that appears in the course of the inner loop began where the parameter did. So is
    the weight that an average of them has by now (schedule-free's).
    """

    def __init__(self, recipe: Recipe, inner_state: str, loop: Loop | None = None) -> None:
        self.recipe = recipe
        self.loop: Loop = loop or recipe.loop
        self.resets = inner_state == "reset"
        self.model = recipe.new_model()
        self.copy()

    def copy(self) -> None:
        self.inner_model = copy.deepcopy(self.model)
        self.optimizer = self.recipe.build(self.inner_model)

    def iterates(self) -> Iterates:
        return all_iterates(self.inner_model, self.optimizer, self.recipe.iterates)

    @torch.no_grad()
    def interpolate(self, slow_iterates: Iterates) -> None:
        slow = dict(self.model.named_parameters())
        for key, fast in self.iterates().items():
            start = slow_iterates.get(key, slow[key[0]])
            fast.copy_(start + META_LR * (fast - start))
        for name, fast in self.inner_model.named_parameters():
            slow[name].copy_(slow[name] + META_LR * (fast - slow[name]))
            fast.copy_(slow[name])

    def meta_iteration(self, batches: list[Batch]) -> None:
        if self.resets:
            self.copy()
        slow_iterates = {key: tensor.clone() for key, tensor in self.iterates().items()}
        slow_weights = [group.get("weight_sum", 0.0) for group in self.optimizer.param_groups]
        for batch in batches:
            take_step(self.loop, self.optimizer, self.inner_model, batch)
        self.interpolate(slow_iterates)
        for group, slow in zip(self.optimizer.param_groups, slow_weights, strict=True):
            if "weight_sum" in group:
                group["weight_sum"] = slow + META_LR * (group["weight_sum"] - slow)


def wrapped(name: str, inner_state: str, inner_steps: int | None = DOMAINS, seed: int = 0) -> tuple[nn.Module, Any]:
    recipe = RECIPES[name]
    model = recipe.new_model(seed)
    return model, GradMatch(recipe.build(model), Fish(META_LR, inner_steps=inner_steps, inner_state=inner_state))


def walk(name: str, model: nn.Module, optimizer: Any, batches: list[Batch]) -> None:
    for batch in batches:
        take_step(RECIPES[name].loop, optimizer, model, batch)


def meta_step(model: nn.Module, optimizer: Any, batches: list[Batch]) -> None:
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)


def loop_of_meta_step(name: str) -> Loop:
    """Return what a meta_step does for a class: without a closure where it can do without."""
    return "plain" if "Emo" in name else RECIPES[name].loop


def assert_same(actual: nn.Module, expected: nn.Module, what: str) -> None:
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda m, name=name: f"{name} after {what}: {m}")


def assert_same_iterates(model: nn.Module, optimizer: Any, reference: Algorithm1) -> None:
    ours = all_iterates(model, optimizer, reference.recipe.iterates)
    theirs = reference.iterates()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def equal(actual: nn.Module, expected: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual.parameters(), expected.parameters(), strict=True))


def through_file(state: Any, name: str) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=name not in UNSAFE)


# ------------------------------------------------------------------------------------------------ against Algorithm 1


@every_mode
@every_optimizer
def test_steps_follow_algorithm_1(name: str, inner_state: str):
    reference = Algorithm1(RECIPES[name], inner_state)
    model, optimizer = wrapped(name, inner_state)
    for i in range(3):
        reference.meta_iteration(domains(i))
        walk(name, model, optimizer, domains(i))
        assert optimizer.inner_step == 0
        assert_same(model, reference.model, f"meta-iteration {i}")
        assert_same_iterates(model, optimizer.optimizer, reference)
    assert not equal(model, RECIPES[name].new_model())


@every_mode
@every_optimizer
def test_meta_step_follows_algorithm_1(name: str, inner_state: str):
    model, optimizer = wrapped(name, inner_state)
    if name in NO_META_STEP:
        start = copy.deepcopy(model)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            meta_step(model, optimizer, domains(0))
        assert equal(model, start)
        return
    reference = Algorithm1(RECIPES[name], inner_state, loop_of_meta_step(name))
    for i in range(3):
        reference.meta_iteration(domains(i))
        meta_step(model, optimizer, domains(i))
        assert_same(model, reference.model, f"meta-iteration {i}")


@every_mode
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_META_STEP])
def test_a_failed_meta_step_leaves_no_trace(name: str, inner_state: str):
    reference = Algorithm1(RECIPES[name], inner_state, loop_of_meta_step(name))
    model, optimizer = wrapped(name, inner_state)
    reference.meta_iteration(domains(0))
    meta_step(model, optimizer, domains(0))
    before = copy.deepcopy(model)
    bad = domains(1)
    bad[1][1].fill_(float("nan"))
    with pytest.raises(ValueError, match="batch 1 is nan"):
        meta_step(model, optimizer, bad)
    assert equal(model, before)
    for i in range(2, 4):
        reference.meta_iteration(domains(i))
        meta_step(model, optimizer, domains(i))
        assert_same(model, reference.model, f"meta-iteration {i}")


@every_mode
@pytest.mark.parametrize("name", [name for name in NAMES if "chedule" in name and "Closure" not in name])
def test_eval_gives_the_interpolated_average(name: str, inner_state: str):
    reference = Algorithm1(RECIPES[name], inner_state)
    model, optimizer = wrapped(name, inner_state)
    for i in range(3):
        reference.meta_iteration(domains(i))
        walk(name, model, optimizer, domains(i))
        reference.optimizer.eval()
        optimizer.eval()
        assert_same(model, reference.inner_model, f"eval() after meta-iteration {i}")
        assert i == 0 or not equal(model, reference.model)
        reference.optimizer.train()
        optimizer.train()
        assert_same(model, reference.inner_model, f"train() after meta-iteration {i}")
        reference.model.load_state_dict(reference.inner_model.state_dict())  # to and fro, it was rounded


# --------------------------------------------------------------------------------------------- checkpoints and copies


def loaded(name: str, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Return a new model and optimizer with the state of another."""
    new_model = RECIPES[name].new_model(seed=1)
    new = RECIPES[name].build(new_model)
    new_model.load_state_dict(model.state_dict())
    new.load_state_dict(through_file(optimizer.state_dict(), name))
    return new_model, new


def deep_copied(_: str, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    return copy.deepcopy((model, optimizer))


def survives(name: str, copier: Callable[[str, nn.Module, Any], tuple[nn.Module, Any]]) -> bool:
    """Return whether the class, without us, goes on after a copy was made as if nothing had happened."""
    model = RECIPES[name].new_model()
    optimizer = RECIPES[name].build(model)
    walk(name, model, optimizer, domains(0))
    try:
        new_model, new = copier(name, model, optimizer)
        for batch in [*domains(1), *domains(2)]:
            walk(name, model, optimizer, [batch])
            walk(name, new_model, new, [batch])
    except (AttributeError, RuntimeError):
        return False
    return equal(new_model, model)


@every_mode
@every_optimizer
def test_resumes_in_the_middle_of_an_inner_loop(name: str, inner_state: str):
    model, optimizer = wrapped(name, inner_state)
    walk(name, model, optimizer, [*domains(0), *domains(1)[:2]])
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name)
    if name in LOSSY:
        assert not survives(name, loaded), f"{name} is lossy no more"
        return
    new_model, new = wrapped(name, inner_state, seed=1)
    new_model.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    for batch in [*domains(1)[2:], *domains(2), *domains(3)]:
        walk(name, model, optimizer, [batch])
        walk(name, new_model, new, [batch])
        assert equal(new_model, model)
    assert new.inner_step == 0


@every_mode
@every_optimizer
def test_a_deep_copy_goes_its_own_way(name: str, inner_state: str):
    model, optimizer = wrapped(name, inner_state)
    expected = Algorithm1(RECIPES[name], inner_state)
    walk(name, model, optimizer, [*domains(0), *domains(1)[:2]])
    if name in NO_COPY:
        assert not survives(name, deep_copied), f"{name} can be copied now"
        return
    new_model, new = copy.deepcopy((model, optimizer))
    for m, o in ((new_model, new), (model, optimizer)):
        walk(name, m, o, [*domains(1)[2:], *domains(2)])
        assert o.inner_step == 0
    assert equal(new_model, model)
    for i in range(3):
        expected.meta_iteration(domains(i))
    assert_same(model, expected.model, "a copy was made")


def class_of(name: str) -> str:
    return name.partition("(")[0]


def pairs_of_classes() -> Iterator[tuple[str, str]]:
    """Yield each optimizer with the next one, and with those of the same name in another library."""
    for name, other in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True):
        if class_of(name) != class_of(other):
            yield name, other
    for name in NAMES:
        for other in NAMES:
            if name < other and name.partition(".")[2] == other.partition(".")[2]:
                yield name, other


@pytest.mark.parametrize(("name", "other"), pairs_of_classes())
def test_the_state_of_another_class_is_refused(name: str, other: str):
    """Though it has the same model, and often enough the same keys."""
    ours, theirs = RECIPES[name], RECIPES[other]
    model = Network(torch.float64)
    optimizer = GradMatch(ours.build(model), Fish(META_LR, inner_steps=DOMAINS))
    with process_group(theirs.distributed and not ours.distributed):
        other_model = Network(torch.float64)
        state = GradMatch(theirs.build(other_model), Fish(META_LR, inner_steps=DOMAINS)).state_dict()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state dict"):
        optimizer.load_state_dict(state)
    assert_identical(optimizer.state_dict(), before)


def assert_identical(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert set(actual) == set(expected)
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_identical(ours, theirs)
    elif not hasattr(expected, "__dict__"):
        assert actual == expected


# ------------------------------------------------------------------------------------------ beside the optimizer itself


def random_states() -> list[Any]:
    """Return where the generators stand that libraries draw from."""
    numpys: Any = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist(), numpys[2]]


@every_mode
@every_optimizer
def test_wrapping_draws_no_random_numbers(name: str, inner_state: str):
    model = RECIPES[name].new_model()
    optimizer = RECIPES[name].build(model)
    before = random_states()
    GradMatch(optimizer, Fish(META_LR, inner_state=inner_state))
    assert random_states() == before


class Shy(torch.optim.SGD):
    """Steps halfway towards the mean of where it has been, and touches no parameters but those of a model it knows."""

    @classmethod
    def of(cls, model: nn.Module) -> Shy:
        for p in model.parameters():
            p.is_known = True
        return cls(model.parameters(), lr=0.05)

    def step(self, closure: Any = None) -> Any:
        if not all(hasattr(p, "is_known") for group in self.param_groups for p in group["params"]):
            raise RuntimeError("these are not my parameters")
        loss = super().step(closure)
        self.move()
        return loss

    @torch.no_grad()
    def move(self) -> None:
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", p.clone())
            mean.lerp_(p, 0.25)
            p.lerp_(mean, 0.5)


class Outspoken(Shy):
    gradmatch_iterates = ("mean",)


@every_mode
def test_an_optimizer_may_name_its_iterates(inner_state: str):
    recipe = Recipe(Outspoken.of, iterates=("mean",))
    reference = Algorithm1(recipe, inner_state)
    model = recipe.new_model()
    optimizer = GradMatch(Outspoken.of(model), Fish(META_LR, inner_steps=DOMAINS, inner_state=inner_state))
    for i in range(3):
        reference.meta_iteration(domains(i))
        for batch in domains(i):
            take_step("plain", optimizer, model, batch)
        assert_same(model, reference.model, f"meta-iteration {i}")


class Secretive(Shy):
    """Counts its steps where nobody finds it."""

    steps: ClassVar[list[int]] = []

    def move(self) -> None:
        self.steps.append(1)


def train_by_reset(build: Callable[[nn.Module], Any]) -> None:
    model = RECIPES["torch.SGD"].new_model()
    optimizer = GradMatch(build(model), Fish(inner_steps=DOMAINS, inner_state="reset"))
    for i in range(3):
        walk("torch.SGD", model, optimizer, domains(i))


def test_a_reset_that_finds_nothing_warns_once():
    with pytest.warns(UserWarning, match=r"reset.*Secretive") as caught:
        train_by_reset(Secretive.of)
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_a_reset_of_what_keeps_nothing_is_silent():
    train_by_reset(lambda model: torch.optim.SGD(model.parameters(), lr=0.05))


# ------------------------------------------------------------------------------------------------- what cannot be had


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_wrapped_says_why(name: str):
    reason, recipe = CANNOT[name], RECIPES[name]

    def use(wrap: Callable[[Any], Any]) -> None:
        model = recipe.new_model()
        optimizer = wrap(recipe.build(model))
        assert optimizer.param_groups
        take_step("plain", optimizer, model, domains(0)[0])

    with pytest.raises((reason.error, TypeError)):
        use(GradMatch)
    if reason.ours:
        use(lambda optimizer: optimizer)
    else:
        with pytest.raises(reason.error):
            use(lambda optimizer: optimizer)


def test_the_lists_of_exceptions_name_optimizers():
    assert {*CANNOT, *NO_META_STEP, *LOSSY, *NO_COPY, *UNSAFE} <= set(RECIPES)


@pytest.mark.parametrize("name", ["pytorch_optimizer.Ranger", "schedulefree.SGDScheduleFree", "timm.Lookahead"])
def test_the_methods_of_the_wrapped_optimizer_are_within_reach(name: str):
    _, optimizer = wrapped(name, "carry")
    for method in ("eval", "train", "sync_lookahead", "compute_hutchinson_hessian"):
        assert hasattr(optimizer, method) == hasattr(optimizer.optimizer, method)
    with pytest.raises(AttributeError, match="no_such_method"):
        optimizer.no_such_method  # noqa: B018


@every_mode
@pytest.mark.parametrize("name", [name for name in NAMES if RECIPES[name].loop == "sam" and "BSAM" not in name])
def test_sharpness_aware_steps_in_two_parts(name: str, inner_state: str):
    """``first_step`` and ``second_step`` by hand are what ``step(closure)`` is."""
    reference = Algorithm1(RECIPES[name], inner_state)
    model, optimizer = wrapped(name, inner_state)
    for i in range(3):
        reference.meta_iteration(domains(i))
        for batch in domains(i):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, batch).backward()
            optimizer.second_step(zero_grad=True)
        assert optimizer.inner_step == 0
        assert_same(model, reference.model, f"meta-iteration {i}")
