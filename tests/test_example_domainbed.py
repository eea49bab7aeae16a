"""The algorithms for DomainBed, on a stand-in of its interface; the real one is for ``tests/ecosystem``."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _models import assert_identical
from _reference import naive_idgm
from torch import Tensor, nn

EXAMPLE = Path(__file__).parents[1] / "examples" / "domainbed"
NAMES = ["GradMatchFish", "GradMatchSmoothFish"]
NAMES += [f"GradMatchIDGM{agreement}" for agreement in ("InnerProduct", "Variance", "Cosine")]

# What of DomainBed the algorithms and train.py touch, and no more.
STAND_IN = {
    "__init__.py": "",
    "lib/__init__.py": "",
    "scripts/__init__.py": "",
    "datasets.py": "",
    "lib/misc.py": """
import zlib

def seed_hash(*args):
    return zlib.crc32(repr(args).encode())
""",
    "networks.py": """
from torch import nn

class WholeFish(nn.Module):
    def __init__(self, input_shape, num_classes, hparams, weights=None):
        super().__init__()
        first = [nn.Linear(input_shape[0], 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(hparams["dropout"])]
        self.net = nn.Sequential(*first, nn.Linear(8, num_classes))

    def forward(self, x):
        return self.net(x)
""",
    "algorithms.py": """
import torch

ALGORITHMS = ["Fish"]

def get_algorithm_class(name):
    return globals()[name]

class Algorithm(torch.nn.Module):
    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__()
        self.hparams = hparams

class Fish(Algorithm):
    pass
""",
    "hparams_registry.py": """
def _hparams(algorithm, dataset, random_seed):
    hparams = {"lr": (1e-2, 1e-3 * (1 + random_seed)), "weight_decay": (0.0, 1e-4), "dropout": (0.0, 0.1)}
    return {**hparams, "meta_lr": (0.5, 0.1)} if algorithm == "Fish" else hparams

def default_hparams(algorithm, dataset):
    return {name: default for name, (default, _) in _hparams(algorithm, dataset, 0).items()}

def random_hparams(algorithm, dataset, seed):
    return {name: drawn for name, (_, drawn) in _hparams(algorithm, dataset, seed).items()}
""",
    "command_launchers.py": "REGISTRY = {}",
    "scripts/train.py": """
import sys
from domainbed import algorithms

print(__name__, algorithms.get_algorithm_class(sys.argv[2]).__name__, sys.argv[3:])
""",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a checkout")
    for name, text in STAND_IN.items():
        file = root / "domainbed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture(scope="module")
def bed(checkout: Path) -> Iterator[SimpleNamespace]:
    """The stand-in's modules, and ours, registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        patch.syspath_prepend(str(checkout))
        names = ("algorithms", "hparams_registry", "networks")
        modules = {name: importlib.import_module(f"domainbed.{name}") for name in names}
        misc = importlib.import_module("domainbed.lib.misc")
        ours = importlib.import_module("domainbed_algorithms")
        ours.register()
        yield SimpleNamespace(**modules, misc=misc, ours=ours)
    for name in [n for n in sys.modules if n.split(".")[0] in ("domainbed", "domainbed_algorithms")]:
        del sys.modules[name]


def build(bed: SimpleNamespace, name: str, *, domains: int = 3, seed: int = 0, **hparams) -> nn.Module:
    hparams = bed.hparams_registry.default_hparams(name, "Data") | hparams
    torch.manual_seed(seed)
    return bed.algorithms.get_algorithm_class(name)((4,), 3, domains, hparams)


def draw(seed: int, domains: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 4, generator=generator).to(dtype) + d, torch.randint(0, 3, (6,), generator=generator))
        for d in range(domains)
    ]


# ----------------------------------------------------------------------------------------------------- the algorithms


def test_fish_walks_by_one_adam_and_interpolates(bed: SimpleNamespace):
    ours = build(bed, "GradMatchFish", meta_lr=0.3, weight_decay=0.01).double()
    fast = copy.deepcopy(ours.network)
    adam = torch.optim.Adam(fast.parameters(), lr=1e-2, weight_decay=0.01)
    for update in range(5):
        batches, losses = draw(update, dtype=torch.float64), []
        slow = copy.deepcopy(fast.state_dict())
        for x, y in batches:
            loss = nn.functional.cross_entropy(fast(x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        walked = fast.state_dict()
        kept = ("num_batches_tracked",)  # an integer is not interpolated
        fast.load_state_dict({k: v if k.endswith(kept) else slow[k] + 0.3 * (v - slow[k]) for k, v in walked.items()})
        expected = {"loss": sum(losses) / 3} | {f"loss/{domain}": loss for domain, loss in enumerate(losses)}
        assert ours.update(batches) == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(ours.network.state_dict(), fast.state_dict(), rtol=1e-10, atol=1e-12)
    measured = build(bed, "GradMatchFish", track_alignment=True).update(draw(0))
    assert measured.keys() == {"loss", "grad_norm", "inner_product", "cosine"} | {
        f"{name}/{domain}" for name in ("loss", "grad_norm") for domain in range(3)
    }


@pytest.mark.parametrize("agreement", ["inner_product", "variance", "cosine"])
def test_idgm_steps_along_the_gradient_of_the_exact_objective(bed: SimpleNamespace, agreement: str):
    name = "GradMatchIDGM" + "".join(word.title() for word in agreement.split("_"))
    ours = build(bed, name, **({"gamma": 0.05} if agreement == "inner_product" else {"strength": 0.2})).double()
    network, batches = copy.deepcopy(ours.network), draw(3, dtype=torch.float64)
    losses = [lambda x=x, y=y: nn.functional.cross_entropy(network(x), y) for x, y in batches]
    measured = ours.update(batches)
    gradients = naive_idgm(list(network.parameters()), losses, measured["gamma"], agreement)[1]
    plain = naive_idgm(list(network.parameters()), losses, 0.0, agreement)[1]
    lengths = [
        torch.cat([g.flatten() for g in found]).norm() for found in (plain, torch._foreach_sub(gradients, plain))
    ]
    expected = 0.05 if agreement == "inner_product" else measured["gamma"] * 0.2 * float(lengths[0] / lengths[1])
    assert measured["gamma"] == pytest.approx(expected)
    for p, gradient in zip(ours.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-7, atol=1e-12)
    assert {(group["lr"], group["weight_decay"]) for group in ours.optimizer.param_groups} == {(1e-2, 0.0)}


def test_smooth_fish_draws_the_order_of_the_domains(bed: SimpleNamespace):
    ours = build(bed, "GradMatchSmoothFish")
    orders = set()
    for update in range(40):
        measured = ours.update(draw(update))
        report = ours.optimizer.last_meta_step
        orders.add(report.domains)
        named = dict(zip(report.domains, report.losses.tolist(), strict=True))
        assert {domain: measured[f"loss/{domain}"] for domain in range(3)} == named
    assert sorted(orders) == list(itertools.permutations(range(3)))


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_learns_and_logs_numbers(bed: SimpleNamespace, name: str):
    ours = build(bed, name, seed=3)
    torch.manual_seed(3)
    expected = bed.networks.WholeFish((4,), 3, ours.hparams)  # whose first weights are its own
    assert_identical(ours.network.state_dict(), expected.state_dict())
    logged = [ours.update(draw(0), None) for _ in range(60)]
    assert all(type(value) is float for measured in logged for value in measured.values())
    assert ("cosine" in logged[0]) == ("inner_product" in logged[0]) == (name != "GradMatchFish")
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]


@pytest.mark.parametrize("by", ["checkpoint", "deepcopy"])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_goes_on_bit_for_bit(bed: SimpleNamespace, name: str, by: str, tmp_path: Path):
    ours = build(bed, name, dropout=0.2)
    ours.update(draw(0))
    other = copy.deepcopy(ours)
    if by == "checkpoint":
        torch.save(ours.state_dict(), tmp_path / "model.pkl")
        other = build(bed, name, seed=1, dropout=0.2)
        other.load_state_dict(torch.load(tmp_path / "model.pkl", weights_only=True), strict=True)
    for algorithm in (ours, other):
        torch.manual_seed(5)
        algorithm.update(draw(1))
    assert_identical(ours.network.state_dict(), other.network.state_dict())
    assert torch.equal(ours.eval().predict(draw(9)[0][0]), other.eval().predict(draw(9)[0][0]))


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizers_state_moves_with_the_network(bed: SimpleNamespace, name: str):
    """As train.py does it on a GPU: build, load a checkpoint, then .to(device). A dtype stands for the device."""
    saved, ours = build(bed, name), build(bed, name, seed=1)
    saved.update(draw(0))
    ours.load_state_dict(saved.state_dict())
    ours.to(torch.float64)
    assert {e["exp_avg"].dtype for e in ours.optimizer.optimizer.state.values()} == {torch.float64}
    ours.update(draw(1, dtype=torch.float64))
    assert {int(e["step"]) for e in ours.optimizer.optimizer.state.values()} == {6 if name == NAMES[0] else 2}


def test_what_cannot_be_is_refused(bed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    assert build(bed, "GradMatchFish", domains=1).update(draw(0, domains=1))["loss"] > 0
    for name in NAMES[1:]:
        with pytest.raises(ValueError, match=rf"num_domains should be at least 2 for {name} \(got 1\).*--test_envs"):
            build(bed, name, domains=1)
    with pytest.raises(ValueError, match="saved by method 'IDGM'; this optimizer uses Fish"):
        build(bed, "GradMatchFish").load_state_dict(build(bed, "GradMatchIDGMVariance").state_dict())
    with pytest.raises(ValueError, match=r"hparams lacks 'strength'.*default_hparams\('GradMatchIDGMCosine'"):
        bed.ours.GradMatchIDGMCosine((4,), 3, 2, bed.hparams_registry.default_hparams("ERM", "Data"))
    wrapped = bed.hparams_registry._hparams
    bed.ours.register()  # again: nothing happens
    assert ["Fish", *NAMES] == bed.algorithms.ALGORITHMS
    assert bed.hparams_registry._hparams is wrapped
    monkeypatch.setattr(bed.algorithms, "GradMatchFish", object)
    with pytest.raises(RuntimeError, match="has an algorithm 'GradMatchFish' of its own"):
        bed.ours.register()


# ------------------------------------------------------------------------------------------------ hyperparameters


VARIED = {"GradMatchFish": {"meta_lr"}, "GradMatchSmoothFish": {"gamma", "inner_lr"}}
VARIED |= {"GradMatchIDGMInnerProduct": {"gamma"}, **{name: {"strength"} for name in NAMES[3:]}}


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_are_added_to_domainbeds(bed: SimpleNamespace, name: str):
    registry, own = bed.hparams_registry, bed.ours.ALGORITHMS[name].HPARAMS
    assert registry.default_hparams(name, "Data").keys() == {"lr", "weight_decay", "dropout"} | own.keys()
    assert registry.default_hparams("ERM", "Data").keys() == {"lr", "weight_decay", "dropout"}
    assert registry.default_hparams("Fish", "Data")["meta_lr"] == 0.5
    drawn = [registry.random_hparams(name, "Data", seed) for seed in range(30)]
    assert drawn[7] == registry.random_hparams(name, "Data", 7)
    assert drawn[7]["lr"] == pytest.approx(8e-3)  # the registry's own entry is as it was
    assert json.loads(json.dumps(drawn)) == drawn
    for hparams in [registry.default_hparams(name, "Data"), *drawn]:
        bed.algorithms.get_algorithm_class(name)((4,), 3, 2, hparams)  # in range, all of them
    assert {key for key in own if len({hparams[key] for hparams in drawn}) > 1} == VARIED[name]


def test_hyperparameters_are_drawn_by_domainbeds_scheme(bed: SimpleNamespace):
    generator = np.random.RandomState(bed.misc.seed_hash(11, "strength"))
    strength = bed.hparams_registry.random_hparams("GradMatchIDGMVariance", "Data", 11)["strength"]
    assert strength == 10 ** generator.uniform(-1.5, -0.5)
    choices = {bed.hparams_registry.random_hparams("GradMatchFish", "Data", s)["meta_lr"] for s in range(40)}
    assert choices == {0.05, 0.1, 0.5}


# ------------------------------------------------------------------------------------------------------- train.py


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_train_runs_domainbeds_script_with_the_algorithms_and_all_other_options(checkout: Path):
    done = run("--algorithm", NAMES[0], "--domainbed", checkout, "--data_dir", "some where", "--test_envs", "0", "2")
    assert done.stdout == f"__main__ {NAMES[0]} ['--data_dir', 'some where', '--test_envs', '0', '2']\n", done.stderr


def test_jobs_of_a_sweep_come_back_here(checkout: Path):
    launched: list[str] = []
    launch = runpy.run_path(str(EXAMPLE / "train.py"))["launch_here"](launched.extend, checkout)
    with pytest.raises(RuntimeError, match=r"does not begin with 'python -m domainbed.scripts.train ': torchrun"):
        launch(["python -m domainbed.scripts.train --algorithm ERM", "torchrun train.py"])
    assert launched == []
    launch(["python -m domainbed.scripts.train --algorithm ERM"])
    assert launched == [f"{sys.executable} {EXAMPLE / 'train.py'} --domainbed '{checkout}' --algorithm ERM"]


def test_without_a_checkout_help_is_ours_and_all_else_asks_for_one():
    assert "collect_results" in run("--help").stdout
    assert "--domainbed DIR is missing" in run("--algorithm", "GradMatchFish").stderr


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("networks.py", "import timm_that_is_not_here.models", "pip install timm_that_is_not_here"),
        ("datasets.py", "raise ModuleNotFoundError(name='PIL.Image')", "pip install pillow"),
        ("hparams_registry.py", None, "is no complete checkout of DomainBed"),
        ("algorithms.py", None, "is no checkout of DomainBed: it has no domainbed/algorithms.py"),
        (None, None, "git clone https://github.com/facebookresearch/DomainBed"),
    ],
    ids=["dependency", "dependency of another name", "incomplete", "something else", "no checkout"],
)
def test_what_is_missing_is_said_without_a_traceback(
    checkout: Path, tmp_path: Path, file: str | None, text: str | None, expected: str
):
    copied = tmp_path / "copied"
    if file is not None:
        shutil.copytree(checkout, copied)
        (copied / "domainbed" / file).unlink()
    if text is not None:
        (copied / "domainbed" / file).write_text(text)
    done = run("--domainbed", copied, "--algorithm", "GradMatchFish")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
