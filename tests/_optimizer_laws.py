"""What every optimizer has to fulfil under Fish: beside Algorithm 1 on deep copies, and when it is wrapped."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from _optimizers import CANNOT, NOT_RESET, PROJECTS, Loop, Recipe, process_group
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.slow.inner_state import KEEPS_POINTS

META_LR = 0.25  # a power of two: then every way to interpolate rounds alike, and all comparisons are exact
DOMAINS = 3
Batch = tuple[Tensor, Tensor, int]  # inputs, targets, and a seed for what draws random numbers


def domains(meta_iteration: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(meta_iteration)
    return [
        (*(torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 3)), 10 * meta_iteration + domain)
        for domain in range(DOMAINS)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, y, seed = batch
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  what libraries draw from
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def take_step(loop: Loop, optimizer: Any, model: nn.Module, batch: Batch, scale: float = 1.0) -> None:

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch) * scale
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


def walk(recipe: Recipe, model: nn.Module, optimizer: Any, batches: Iterable[Batch], scale: float = 1.0) -> None:
    for batch in batches:
        take_step(recipe.loop, optimizer, model, batch, scale)


def meta_step(model: nn.Module, optimizer: Any, batches: list[Batch]) -> None:
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)


def wrapped(recipe: Recipe, inner_state: Any, seed: int = 0) -> tuple[Any, Any]:
    model = recipe.new_model(seed)
    return model, GradMatch(recipe.build(model), Fish(META_LR, inner_steps=DOMAINS, inner_state=inner_state))


class Algorithm1:
    """Fish as the paper has it, on a deep copy of the model that only the inner optimizer knows.

    ``"reset"`` makes copy and optimizer anew in each meta-iteration, ``"carry"`` keeps them.
    """

    def __init__(self, recipe: Recipe, inner_state: str) -> None:
        self.recipe = recipe
        self.resets = inner_state == "reset"
        self.model = recipe.new_model()
        self.copy()

    def copy(self) -> None:
        self.inner_model = copy.deepcopy(self.model)
        self.optimizer = self.recipe.build(self.inner_model)

    def meta_iteration(self, batches: list[Batch], *, by_meta_step: bool = False) -> None:
        """Walk and interpolate; ``meta_step`` leaves out the loss where a class can do without it."""
        if self.resets:
            self.copy()
        loop = "plain" if by_meta_step and self.recipe.loop == "loss" and "Emo" in self.recipe.cls.__name__ else None
        for batch in batches:
            take_step(loop or self.recipe.loop, self.optimizer, self.inner_model, batch)
        with torch.no_grad():
            for slow, fast in zip(self.model.parameters(), self.inner_model.parameters(), strict=True):
                slow.copy_(slow + META_LR * (fast - slow))
                fast.copy_(slow)


def assert_same(actual: nn.Module, expected: nn.Module, what: str) -> None:
    for (name, ours), theirs in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda m, name=name: f"{name} after {what}: {m}")


def equal(actual: nn.Module, expected: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual.parameters(), expected.parameters(), strict=True))


def undone(recipe: Recipe) -> float:
    """Which part of a displacement of the parameters six later steps, on gradients of zero, undo.

    An interpolation is such a displacement. What undoes it is a point that the optimizer keeps: a copy or an average
    of the parameters, or their first values and the sum of the steps since.
    """

    def end(displacement: float) -> Tensor:
        model = recipe.new_model()
        optimizer = recipe.build(model)
        walk(recipe, model, optimizer, [*domains(0), *domains(1)])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(displacement)
        model.origin = displacement
        walk(recipe, model, optimizer, [*domains(2), *domains(3)], scale=0.0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    return 1.0 - (end(0.0625) - end(0.0)).mean().item() / 0.0625


@functools.cache
def keeps_points(recipe: Recipe) -> bool:
    """Whether an optimizer's next steps undo an interpolation that moves the parameters alone."""
    with process_group(recipe.distributed):
        return recipe.cls.__name__ not in PROJECTS and undone(recipe) > 0.02  # weight decay: at most .008; points: .038


def has_modes(recipe: Recipe) -> bool:
    """Whether a class trains with other parameters than it is evaluated with."""
    return callable(getattr(recipe.cls, "train", None)) and callable(getattr(recipe.cls, "eval", None))


def is_built_with_points(recipe: Recipe) -> bool:
    """Then resetting would return to them."""
    return keeps_points(recipe) and any(recipe.build(recipe.new_model()).state.values())


def check_list(libraries: Iterable[Recipe]) -> None:
    given = list(libraries)
    found = {each.cls.__name__ for each in given if keeps_points(each) and not has_modes(each)}
    assert found == KEEPS_POINTS & {each.cls.__name__ for each in given}


def check_carry(recipe: Recipe) -> None:
    if keeps_points(recipe) or has_modes(recipe):
        advice = "SmoothFish" if is_built_with_points(recipe) else r'Fish\(inner_state="reset"\), SmoothFish'
        with pytest.raises(ValueError, match=f"keeps points.*{advice}"):
            wrapped(recipe, "carry")
    elif recipe.cls.__name__ not in KEEPS_POINTS:  # a class that keeps points by one of its options is refused whole
        check_algorithm_1(recipe, "carry")


def check_reset(recipe: Recipe) -> None:
    if is_built_with_points(recipe):
        with pytest.raises(ValueError, match=r"keeps points.*SmoothFish"):
            wrapped(recipe, "reset")
    elif recipe.name in NOT_RESET:
        with pytest.raises(AssertionError):
            check_algorithm_1(recipe, "reset")
    else:
        check_algorithm_1(recipe, "reset")


def check_reset_in_training(recipe: Recipe) -> None:
    model = recipe.new_model()
    optimizer = recipe.build(model)
    walk(recipe, model, optimizer, domains(0))
    with pytest.raises(ValueError, match=r"keeps points.*SmoothFish"):
        GradMatch(optimizer, Fish(inner_state="reset"))


def check_cannot(recipe: Recipe) -> None:
    error, _ = CANNOT[recipe.name]

    def use(wrap: Callable[[Any], Any]) -> None:
        model = recipe.new_model()
        optimizer = wrap(recipe.build(model))
        assert optimizer.param_groups
        take_step("plain", optimizer, model, domains(0)[0])

    with pytest.raises((error, TypeError)):
        use(GradMatch)
    if issubclass(recipe.cls, Optimizer):
        with pytest.raises(error):
            use(lambda optimizer: optimizer)


def check_algorithm_1(recipe: Recipe, inner_state: str) -> None:
    """Check two meta-iterations by hand and one by ``meta_step``."""
    reference = Algorithm1(recipe, inner_state)
    model, optimizer = wrapped(recipe, inner_state)
    for i in range(2):
        reference.meta_iteration(domains(i))
        walk(recipe, model, optimizer, domains(i))
        assert optimizer.inner_step == 0
        assert_same(model, reference.model, f"meta-iteration {i}")
    if recipe.loop in ("graph", "pair"):  # meta_step keeps no graph, and knows nothing of outputs
        model, optimizer = wrapped(recipe, inner_state)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            meta_step(model, optimizer, domains(2))
        assert equal(model, recipe.new_model())
        return
    before = copy.deepcopy(model)
    reference.meta_iteration(domains(2), by_meta_step=True)
    meta_step(model, optimizer, domains(2))
    assert_same(model, reference.model, "meta_step")
    assert not equal(model, before)


def random_states() -> list[Any]:
    """Where the generators stand that libraries draw from."""
    numpys: Any = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist(), numpys[2]]


CALLS = ("__init__", "step", "add_param_group", "zero_grad", "state_dict", "load_state_dict", "first_step")
COPIES = ("__copy__", "__deepcopy__", "__reduce_ex__", "__getstate__", "__setstate__")


def check_wrapping(recipe: Recipe, patch: pytest.MonkeyPatch) -> None:
    optimizer = recipe.build(recipe.new_model())
    done: list[str] = []
    hooks = [
        register(lambda *_: done.append("hook"))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    for cls in {type(optimizer), *(type(value) for value in vars(optimizer).values() if isinstance(value, Optimizer))}:
        for name in (*CALLS, *COPIES):
            if (method := getattr(cls, name, None)) is not None:
                patch.setattr(cls, name, functools.wraps(method)(lambda *_, name=name: done.append(name)))
    before, attributes = random_states(), dict(vars(optimizer))  # which keep what is in them alive
    for inner_state in ("carry", "reset"):
        with contextlib.suppress(ValueError):
            GradMatch(optimizer, Fish(META_LR, inner_state=inner_state))
    for hook in hooks:
        hook.remove()
    assert random_states() == before
    assert not done
    assert vars(optimizer).keys() == attributes.keys()
    assert all(vars(optimizer)[name] is value for name, value in attributes.items())
