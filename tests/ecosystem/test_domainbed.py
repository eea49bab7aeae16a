"""The algorithms for DomainBed in an unmodified checkout of it: against its own Fish, and through its own scripts.

Free running, two implementations of Fish can only be compared in double precision: Adam divides small gradients by
their own size, so one rounding of the interpolation in single precision grows within some updates. In single
precision every update therefore begins where DomainBed's does.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

CHECKOUT = os.environ.get("DOMAINBED_DIR") and os.path.abspath(os.environ["DOMAINBED_DIR"])
EXAMPLE = Path(__file__).parents[2] / "examples" / "domainbed"
NAMES = [
    "GradMatchFish",
    "GradMatchSmoothFish",
    "GradMatchIDGMInnerProduct",
    "GradMatchIDGMVariance",
    "GradMatchIDGMCosine",
]

pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT,
        reason="set DOMAINBED_DIR to a checkout of DomainBed: git clone https://github.com/facebookresearch/DomainBed",
    ),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module")
def bed() -> Iterator[SimpleNamespace]:
    """DomainBed's modules, with the algorithms registered."""
    before = list(sys.path)
    sys.path[:0] = [CHECKOUT, str(EXAMPLE)]
    names = ("algorithms", "command_launchers", "datasets", "hparams_registry", "networks")
    modules = {name: importlib.import_module(f"domainbed.{name}") for name in names}
    misc = importlib.import_module("domainbed.lib.misc")
    ours = importlib.import_module("domainbed_algorithms")
    ours.register()
    yield SimpleNamespace(**modules, misc=misc, ours=ours)
    sys.path[:] = before


@pytest.fixture
def dtype() -> Iterator[None]:
    """DomainBed builds a network in every update, in the default dtype."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNets with random weights: the others would be downloaded."""
    build = torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda pretrained: build(weights=None))


SHAPES = {"small CNN": (3, 28, 28), "wide ResNet": (3, 32, 32), "ResNet-18": (3, 224, 224)}


def pair_of_fish(bed: SimpleNamespace, shape: tuple[int, ...], domains: int, **settings) -> tuple[nn.Module, nn.Module]:
    hparams = bed.hparams_registry.default_hparams("GradMatchFish", "Debug28")
    hparams |= {"resnet18": True, "resnet50_augmix": False, **settings}
    pair = []
    for name in ("Fish", "GradMatchFish"):
        torch.manual_seed(0)
        pair.append(bed.algorithms.get_algorithm_class(name)(shape, 2, domains, hparams))
    assert_same(*pair, rtol=0.0, atol=0.0)
    return pair[0], pair[1]


def minibatches(shape: tuple[int, ...], domains: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(0, 2, (size,), generator=generator))
        for _ in range(domains)
    ]


def assert_same(theirs: nn.Module, ours: nn.Module, *, rtol: float, atol: float) -> None:
    """Parameters and floating-point buffers, all of them."""
    expected, found = theirs.network.state_dict(), ours.network.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("dtype", "without_pretrained")
@pytest.mark.parametrize(
    ("network", "settings", "domains", "size", "updates", "rtol"),
    [
        ("small CNN", {}, 3, 4, 20, 1e-11),
        ("small CNN", {"meta_lr": 0.05, "weight_decay": 1e-3}, 2, 4, 20, 1e-11),
        ("wide ResNet", {}, 2, 3, 20, 1e-6),  # BatchNorm over few values: a rounding grows by 5 digits
        ("ResNet-18", {"lr": 5e-5}, 2, 2, 20, 1e-11),
        ("ResNet-18", {"lr": 5e-5, "freeze_bn": True}, 2, 1, 2, 1e-11),
    ],
    ids=["small CNN", "small CNN, meta_lr 0.05", "wide ResNet", "ResNet-18", "ResNet-18, freeze_bn"],
)
def test_fish_is_domainbeds(
    bed: SimpleNamespace, network: str, settings: dict, domains: int, size: int, updates: int, rtol: float
):
    torch.set_default_dtype(torch.float64)
    shape = SHAPES[network]
    theirs, ours = pair_of_fish(bed, shape, domains, **settings)
    before = copy.deepcopy(ours)
    for update in range(updates):
        batches = minibatches(shape, domains, size, update)
        theirs.update(batches)
        assert ours.update(batches)["loss"] > 0
        assert_same(theirs, ours, rtol=rtol, atol=rtol / 100)
    with pytest.raises(AssertionError):  # it is not that nothing moved
        assert_same(before, ours, rtol=1e-6, atol=1e-8)
    adam, expected = ours.optimizer.optimizer.state_dict()["state"], theirs.optimizer_inner_state["state"]
    assert adam.keys() == expected.keys()
    for position, entry in expected.items():
        assert adam[position]["step"] == entry["step"] == updates * domains
        torch.testing.assert_close(adam[position]["exp_avg"], entry["exp_avg"], rtol=rtol * 1e3, atol=rtol)


@pytest.mark.parametrize("network", ["small CNN", "wide ResNet"])
def test_a_single_precision_update_differs_by_one_rounding(bed: SimpleNamespace, network: str):
    shape = SHAPES[network]
    theirs, ours = pair_of_fish(bed, shape, 3)
    for update in range(8):
        if update:
            ours.network.load_state_dict(theirs.network.state_dict())
            ours.optimizer.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer_inner_state))
        batches = minibatches(shape, 3, 4, update)
        theirs.update(batches)
        ours.update(batches)
        assert_same(theirs, ours, rtol=1e-6, atol=1e-7)


def test_integer_buffers_count_where_domainbed_interpolates(bed: SimpleNamespace):
    theirs, ours = pair_of_fish(bed, SHAPES["wide ResNet"], 3)
    for update in range(2):
        for fish in (theirs, ours):
            fish.update(minibatches(SHAPES["wide ResNet"], 3, 2, update))
    counters = [fish.network.net[0].bn1.num_batches_tracked for fish in (theirs, ours)]
    assert [int(counter) for counter in counters] == [2, 6]


# ------------------------------------------------------------------------------------------------ DomainBed's scripts


@pytest.fixture
def train(bed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``train.py``, to be called in this process: without the 64 workers of a run, which take 20 seconds."""
    spec = importlib.util.spec_from_file_location("domainbed_train", EXAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(bed.datasets.MultipleDomainDataset, "N_WORKERS", 0)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    launchers = bed.command_launchers.REGISTRY
    monkeypatch.setattr(bed.command_launchers, "REGISTRY", dict(launchers))
    return module


def run_script(train: ModuleType, *arguments: str) -> None:
    # DomainBed's scripts put their own streams in place of the standard ones and leave them there.
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        train.main(["--domainbed", CHECKOUT, *arguments])


def read_records(output: Path) -> list[dict]:
    assert (output / "done").read_text() == "done"
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def reload(bed: SimpleNamespace, output: Path) -> tuple[nn.Module, dict]:
    saved = torch.load(output / "model.pkl", weights_only=True)
    torch.manual_seed(12345)
    algorithm = bed.algorithms.get_algorithm_class(saved["args"]["algorithm"])(
        saved["model_input_shape"], saved["model_num_classes"], saved["model_num_domains"], saved["model_hparams"]
    )
    algorithm.load_state_dict(saved["model_dict"], strict=True)
    return algorithm, saved


def assert_reloads(bed: SimpleNamespace, output: Path) -> None:
    """The checkpoint has the accuracies that the run logged, and goes on with Adam's step count."""
    algorithm, saved = reload(bed, output)
    last = read_records(output)[-1]
    args = saved["args"]
    torch.manual_seed(args["seed"])  # the debug data are random
    dataset = vars(bed.datasets)[args["dataset"]](None, args["test_envs"], saved["model_hparams"])
    for index, environment in enumerate(dataset):
        seed = bed.misc.seed_hash(args["trial_seed"], index)
        out, in_ = bed.misc.split_dataset(environment, int(len(environment) * args["holdout_fraction"]), seed)
        for name, split in (("out", out), ("in", in_)):
            loader = torch.utils.data.DataLoader(split, batch_size=64)
            accuracy = bed.misc.accuracy(algorithm, loader, None, "cpu")
            assert accuracy == pytest.approx(last[f"env{index}_{name}_acc"], abs=1e-12)
    domains = saved["model_num_domains"]
    inner_steps = domains if args["algorithm"] == "GradMatchFish" else 1
    steps = {int(entry["step"]) for entry in algorithm.optimizer.optimizer.state.values()}
    assert steps == {args["steps"] * inner_steps}
    report = algorithm.update(minibatches(tuple(saved["model_input_shape"]), domains, 4, 0))
    assert np.isfinite(report["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_domainbeds_training_script(bed: SimpleNamespace, train: ModuleType, tmp_path: Path, name: str):
    output = tmp_path / "out"
    run_script(
        train, "--algorithm", name, "--dataset", "Debug28", "--test_envs", "1", "--output_dir", str(output),
        "--steps", "5", "--checkpoint_freq", "2", "--hparams", '{"batch_size": 6}',
    )  # fmt: skip
    records = read_records(output)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(np.isfinite(record["loss"]) for record in records)
    assert all(("cosine" in record) == (name != "GradMatchFish") for record in records)
    assert records[0]["hparams"].keys() >= bed.ours.ALGORITHMS[name].HPARAMS.keys()
    assert_reloads(bed, output)


def test_domainbeds_training_script_in_a_process_of_its_own(bed: SimpleNamespace, tmp_path: Path):
    output = tmp_path / "out"
    command = [
        sys.executable, str(EXAMPLE / "train.py"), "--algorithm", "GradMatchFish", "--domainbed", CHECKOUT,
        "--dataset", "Debug28", "--test_envs", "2", "--output_dir", str(output), "--steps", "3",
        "--hparams", '{"batch_size": 4, "track_alignment": true}',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "inner_produc" in done.stdout  # DomainBed cuts its column heads
    assert -1 <= read_records(output)[-1]["cosine"] <= 1
    assert_reloads(bed, output)


def test_resnet_on_large_images(
    bed: SimpleNamespace, train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # torchvision takes pretrained weights from its cache: these are random, and it does not look.
    weights = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    output = tmp_path / "out"
    hparams = {"batch_size": 2, "resnet18": True, "resnet50_augmix": False, "freeze_bn": True, "resnet_dropout": 0.1}
    run_script(
        train, "--algorithm", "GradMatchIDGMVariance", "--dataset", "Debug224", "--output_dir", str(output),
        "--steps", "2", "--checkpoint_freq", "5", "--hparams", json.dumps(hparams),
    )  # fmt: skip
    assert "cosine" in read_records(output)[-1]
    algorithm, saved = reload(bed, output)
    assert torch.equal(algorithm.network.net[0].network.bn1.running_mean, torch.zeros(64))  # frozen
    assert not torch.equal(algorithm.network.net[0].network.conv1.weight, torch.load(weights)["conv1.weight"])
    assert saved["model_dict"].keys() == algorithm.state_dict().keys()


def test_sweep_and_its_table(
    bed: SimpleNamespace, train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    commands: list[str] = []
    bed.command_launchers.REGISTRY["collecting"] = commands.extend
    output = tmp_path / "sweep"
    algorithms = ["GradMatchFish", "GradMatchIDGMCosine", "ERM"]
    run_script(
        train, "--script", "sweep", "launch", "--datasets", "Debug28", "--algorithms", *algorithms,
        "--output_dir", str(output), "--data_dir", "none", "--command_launcher", "collecting", "--steps", "2",
        "--n_hparams", "2", "--n_trials", "1", "--single_test_envs", "--skip_confirmation",
        "--hparams", '{"batch_size": 3}',
    )  # fmt: skip
    assert len(commands) == 3 * 3 * 2
    for command in commands:
        python, script, *arguments = shlex.split(command)
        assert (python, Path(script).resolve()) == (sys.executable, EXAMPLE / "train.py")
        assert arguments[:2] == ["--domainbed", str(Path(CHECKOUT).resolve())]
        run_script(train, *arguments[2:])
    capsys.readouterr()
    run_script(train, "--script", "collect_results", "--input_dir", str(output))
    table = capsys.readouterr().out
    for algorithm in algorithms:
        assert re.search(rf"^{algorithm}\s+\d+\.\d", table, re.MULTILINE), table
