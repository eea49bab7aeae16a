"""ERM against gradient matching on CdSprites-N, the data on which ordinary training learns colour and not shape.

    python examples/cdsprites.py --out out --seed 0

trains a small network on squares and ellipses of 15 domains: by ordinary training (ERM), with Fish for the same number
of gradient evaluations, with SmoothFish for three quarters, and by the exact objective, whose meta-iterations take a
Hessian-vector product for each domain besides the gradient: 2 cores, a few minutes. In every training domain colour and
shape go together, in each with other colours (``_cdsprites_data.py``), so colour is the easy answer and shape the one
that lasts. Prints a table and writes ``cdsprites.png``, ``cdsprites_domains.png`` (which domain pulls against the
others) and ``cdsprites.json``.

All methods go through the same loop (``train``), with the same data and initial weights. Those that match gradients
wrap an optimizer and take each batch from one domain; ERM takes shuffled batches of the same size from all domains
together.

- Fish walks by SGD (``--inner-optimizer adam`` and ``--paper``: by Adam, as the authors do on these data). Adam's
  steps do not shrink with the gradients: once a domain's gradient is small, its share of the walk is noise of full
  length, and what the domains' gradients have in common is lost in it. With some seeds Fish by Adam ends at chance:
  with seed 5, learning rate 1e-3 and meta_lr 0.3, two walks have a cosine of 0.10 after 300 meta-iterations (from -0.08
  to 0.10 in all), and after 600 the mean loss is 0.22 at the start of a walk and 1.8 along it.
- SmoothFish at gamma 1 takes the same walk by SGD and hands its mean gradient to Adam: at the price of Fish it chooses
  the strength of the matching (by the walk) and the size of the step (by Adam) each by itself. ``--methods symmetric``
  walks to and fro, which makes of it the exact objective by the inner product.
- The exact method matches by the variance, IDGM's default, with a ``strength`` of 1: at first the matching term is as
  long as the mean gradient, and the gamma found by that is kept. This shortcut is strong: with IDGM's default of 0.1 it
  is at 0.69 after 360 meta-iterations (seed 0). The paper's inner product is unbounded and with this optimizer diverges
  for gamma of 5e-4 and more.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937. ``--paper`` sets the
configuration of the authors' code (github.com/YugeTen/fish) and is meant for a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from _cdsprites_data import (
    Arrangement,
    CdSprites,
    DrawnSprites,
    DSpritesFile,
    SpriteDataset,
    SpriteSource,
    make_cdsprites,
)
from _cdsprites_plot import Display, Progress, Run, save_agreement, save_figure, table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from torch.utils.tensorboard import SummaryWriter
from torch_gradmatch.alignment import gradient_alignment

from torch_gradmatch import (
    IDGM,
    DomainBatchSampler,
    Fish,
    GradMatch,
    MetaStep,
    SmoothFish,
    fish_gamma,
    meta_batches,
    native_status,
)

MEASURED_TRAIN_IMAGES = 3000
LOG_EVERY = 10  # meta-iterations: reading what one measured synchronizes


@dataclass(frozen=True)
class Config:
    """What the methods share; ``main`` documents each setting in its help text."""

    domains: int
    arrangement: Arrangement
    images_per_domain: int
    eval_images: int
    size: int
    batch_size: int
    order: str
    iterations: int
    exact_iterations: int
    smooth_iterations: int
    lr: float
    inner_optimizer: str
    inner_lr: float
    meta_lr: float
    gamma: float | None
    strength: float
    smooth_gamma: float
    measurements: int
    seed: int
    device: str
    paper: bool


# ---------------------------------------------------------------------------------------------------------- methods


def make_model(config: Config) -> nn.Module:
    """Build the network: strided convolutions down to at most 4 x 4 pixels, then a linear layer.

    Returns:
        The network of the official code for ``--paper``, else a narrower one.
    """
    channels = iter((32, 32, 64, 128) if config.paper else (16, 32, 64, 64, 64))
    layers: list[nn.Module] = []
    width, side = 3, config.size
    while side > 4:
        wider = next(channels)
        layers += [nn.Conv2d(width, wider, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        width, side = wider, side // 2
    if config.paper:
        layers += [nn.Conv2d(width, 128, kernel_size=4, stride=2), nn.ReLU()]
        width, side = 128, 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, 2))


def make_adam(model: nn.Module, config: Config) -> Optimizer:
    """Build the optimizer that ERM uses as it is and the others wrap.

    Returns:
        Adam as in the official code.
    """
    return torch.optim.Adam(model.parameters(), lr=config.lr, amsgrad=True)


def make_fish(model: nn.Module, config: Config) -> Optimizer:
    """Wrap the optimizer of the walk: the one line in which training with Fish differs.

    Returns:
        The wrapped optimizer; every N-th step ends a meta-iteration.
    """
    method = Fish(meta_lr=config.meta_lr, inner_steps=config.domains, inner_state="reset", track_alignment="pairs")
    if config.inner_optimizer == "adam":
        return GradMatch(make_adam(model, config), method)
    return GradMatch(torch.optim.SGD(model.parameters(), lr=config.inner_lr), method)


def make_exact(model: nn.Module, config: Config) -> Optimizer:
    """Wrap the optimizer for the exact objective. Small graphs: it is faster to keep them than to build them twice.

    Returns:
        The wrapped optimizer.
    """
    method = IDGM(model, config.gamma, strength=config.strength, keep_graphs=True, track_alignment="pairs")
    return GradMatch(make_adam(model, config), method)


def make_smooth_fish(model: nn.Module, config: Config) -> Optimizer:
    """Wrap the optimizer for Fish with a free strength of matching.

    Returns:
        The wrapped optimizer.
    """
    method = SmoothFish(gamma=config.smooth_gamma, inner_lr=config.inner_lr, track_alignment="pairs")
    return GradMatch(make_adam(model, config), method)


def make_symmetric(model: nn.Module, config: Config) -> Optimizer:
    """Wrap the optimizer for the exact objective by the inner product, of SmoothFish's strength.

    Returns:
        The wrapped optimizer.
    """
    gamma = config.smooth_gamma * fish_gamma(config.inner_lr, config.domains)
    method = SmoothFish(gamma=gamma, inner_lr=config.inner_lr, track_alignment="pairs", symmetric=True)
    return GradMatch(make_adam(model, config), method)


def smooth_fish_gradients(domains: int, config: Config) -> int:
    """Return the gradient evaluations of a meta-iteration of SmoothFish."""
    return domains if config.smooth_gamma in (0, 1) else 2 * domains - 1


Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Batch], Tensor]


def take_steps(optimizer: Optimizer, loss_fn: LossFunction, batches: Sequence[Batch]) -> MetaStep:
    """Take a step on each batch, as any training loop does; under Fish the last one interpolates.

    Returns:
        What the meta-iteration measured; the losses, of which the optimizer knows nothing, are the loop's to add.
    """
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    measured = optimizer.last_meta_step if isinstance(optimizer, GradMatch) else None
    return replace(measured or MetaStep(), losses=torch.stack(losses), domains=getattr(batches, "domains", None))


def take_meta_step(optimizer: Optimizer, loss_fn: LossFunction, batches: Sequence[Batch]) -> MetaStep:
    """Take one step on all batches together.

    Returns:
        What it measured.
    """
    assert isinstance(optimizer, GradMatch)
    return optimizer.meta_step(loss_fn, batches)


def pooled_batches(dataset: SpriteDataset, config: Config) -> Sampler[list[int]]:
    """Shuffle all domains together, as ordinary training does.

    Returns:
        The batches of one epoch.
    """
    generator = torch.Generator().manual_seed(config.seed)
    return BatchSampler(RandomSampler(dataset, generator=generator), config.batch_size, drop_last=True)


def domain_batches(dataset: SpriteDataset, config: Config) -> Sampler[list[int]]:
    """Take each batch from one domain, and N batches in a row from the N domains; by ``flipflop``, then N in reverse.

    Returns:
        The batches of one epoch.
    """
    return DomainBatchSampler(dataset.domains, config.batch_size, seed=config.seed, drop_last=True, order=config.order)


class Method(NamedTuple):
    """One row of the table and one curve of the figure."""

    title: str
    make_optimizer: Callable[[nn.Module, Config], Optimizer]
    make_batches: Callable[[SpriteDataset, Config], Sampler[list[int]]]
    iterate: Callable[[Optimizer, LossFunction, Sequence[Batch]], MetaStep]
    iterations_setting: str = "iterations"
    gradients: Callable[[int, Config], int] = lambda domains, _: domains
    hessian_products: Callable[[int], int] = lambda _: 0

    def iterations(self, config: Config) -> int:
        """Return how many meta-iterations the method trains for."""
        return getattr(config, self.iterations_setting)


METHODS = {
    "erm": Method("ERM", make_adam, pooled_batches, take_steps),
    "fish": Method("Fish", make_fish, domain_batches, take_steps),
    "smooth_fish": Method(
        "SmoothFish",
        make_smooth_fish,
        domain_batches,
        take_meta_step,
        "smooth_iterations",
        gradients=smooth_fish_gradients,
    ),
    "symmetric": Method(
        "SmoothFish, symmetric",
        make_symmetric,
        domain_batches,
        take_meta_step,
        "smooth_iterations",
        gradients=lambda domains, _: 3 * domains - 2,
    ),
    "exact": Method(
        "Exact",
        make_exact,
        domain_batches,
        take_meta_step,
        "exact_iterations",
        hessian_products=lambda domains: domains,
    ),
}


# --------------------------------------------------------------------------------------------------------- training


class Measurements:
    """Measures a model on fixed images; its gradients are no training gradients and are not counted as such.

    Args:
        data: the splits.
        config: the settings.
    """

    def __init__(self, data: CdSprites, config: Config) -> None:
        device = torch.device(config.device)
        train, validation, unseen = (SpriteDataset(split, device) for split in data)
        count = min(len(train), MEASURED_TRAIN_IMAGES)
        rng = np.random.default_rng(config.seed)
        self.accuracy_on = {
            "train_accuracy": (train, rng.choice(len(train), count, replace=False)),
            "validation_accuracy": (validation, np.arange(len(validation))),
            "unseen_accuracy": (unseen, np.arange(len(unseen))),
        }
        self.domain_batches = [
            train.__getitems__(domain * config.images_per_domain + np.arange(config.batch_size))
            for domain in range(config.domains)
        ]

    def record(self, model: nn.Module, run: Run) -> None:
        """Append accuracies and agreement of the domains' gradients to the curves of a run."""
        with torch.no_grad():
            for curve, (dataset, indices) in self.accuracy_on.items():
                correct = 0
                for part in np.array_split(indices, -(-len(indices) // 500)):
                    images, labels = dataset.__getitems__(part)
                    correct += int((model(images).argmax(dim=1) == labels).sum())
                getattr(run, curve).append(correct / len(indices))
        criterion = nn.CrossEntropyLoss()
        agreement = gradient_alignment(
            model.parameters(), lambda batch: criterion(model(batch[0]), batch[1]), self.domain_batches, pairs=True
        )
        run.inner_product.append(float(agreement.inner_product))
        run.cosine.append(float(agreement.cosine))
        run.agreement_with_rest.append(agreement.agreement_with_rest.tolist())


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Go through a loader epoch after epoch.

    Yields:
        What it does.
    """
    while True:
        yield from loader


def train(
    name: str, data: CdSprites, config: Config, report: Callable[[Progress], None], log: Path | None = None
) -> Run:
    """Train one model by one method.

    Args:
        name: key of ``METHODS``.
        data: the splits.
        config: the settings.
        report: is told after every meta-iteration.
        log: folder for TensorBoard, in which every method has its own.

    Returns:
        Its curves.
    """
    method, run = METHODS[name], Run(name, METHODS[name].title, threads=torch.get_num_threads())
    started = time.perf_counter()
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = make_model(config).to(device)
    criterion = nn.CrossEntropyLoss()
    dataset = SpriteDataset(data.train, device)
    # The dataset hands out whole batches, so there is nothing left to collate.
    loader = DataLoader(dataset, batch_sampler=method.make_batches(dataset, config), collate_fn=lambda batch: batch)
    optimizer = method.make_optimizer(model, config)
    measurements = Measurements(data, config)
    iterations = method.iterations(config)
    measured_at = set(np.linspace(0, iterations, config.measurements + 1).round().astype(int).tolist())

    def loss_fn(batch: Batch) -> Tensor:
        return criterion(model(batch[0]), batch[1])

    def measure(iteration: int) -> None:
        before = time.perf_counter()
        run.iteration.append(iteration)
        run.gradient_evaluations.append(iteration * method.gradients(config.domains, config))
        run.hessian_products.append(iteration * method.hessian_products(config.domains))
        run.seconds_training.append(before - began - run.seconds_measuring)
        measurements.record(model, run)
        run.seconds_measuring += time.perf_counter() - before

    began = time.perf_counter()
    measure(0)
    if method.make_batches is domain_batches:  # lists that know their domains, as many in each epoch
        groups = endless(meta_batches(loader, config.domains))
    else:
        groups = iter(meta_batches(endless(loader), config.domains))
    board = None if log is None else SummaryWriter(log / name)
    measured: dict[str, float] = {}
    for iteration in range(1, iterations + 1):
        step = method.iterate(optimizer, loss_fn, next(groups))
        if iteration % LOG_EVERY == 1:
            measured = step.scalars()
            if board is not None:
                for tag, value in measured.items():
                    board.add_scalar(tag, value, iteration)
        if iteration in measured_at:
            measure(iteration)
        report(Progress(name, iteration, run.unseen_accuracy[-1], measured["loss"], measured.get("cosine")))
    if board is not None:
        board.close()
    run.seconds = time.perf_counter() - started
    return run


# --------------------------------------------------------------------------------- several methods at the same time


def work(name: str, data: CdSprites, config: Config, log: Path | None, connection: Connection) -> None:
    """Train one method in a process of its own, on one thread, and send news and at last the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, too, and ends this process
    torch.set_num_threads(1)
    # Gradients of a model that fits its training set vanish into denormal numbers, on which CPUs are slow.
    torch.set_flush_denormal(True)
    with suppress(BrokenPipeError):  # the parent is gone
        connection.send(train(name, data, config, connection.send, log))


def train_in_parallel(
    methods: Sequence[str], data: CdSprites, config: Config, log: Path | None, display: Display
) -> dict[str, Run]:
    """Train every method in a process of its own, as many at a time as there are CPUs; the last takes longest.

    Returns:
        The run of each method.

    Raises:
        RuntimeError: if a process fails.
    """
    context = multiprocessing.get_context("spawn")
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        queue = list(methods)
        waiting: dict[Any, str] = {}
        while queue or waiting:
            while queue and len(waiting) < (os.cpu_count() or 1):
                name = queue.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(name, data, config, log, sender), daemon=True)
                process.start()
                stack.callback(process.join)
                stack.callback(process.terminate)
                sender.close()
                waiting[receiver] = name
            for receiver in wait(list(waiting)):
                try:
                    news = receiver.recv()
                except EOFError:
                    raise RuntimeError(f"the process that trained {waiting[receiver]!r} ended early") from None
                if isinstance(news, Progress):
                    display.show(news)
                else:
                    runs[waiting.pop(receiver)] = news
    return runs


def train_all(methods: Sequence[str], data: CdSprites, config: Config, log: Path | None) -> dict[str, Run]:
    """Train every method: at the same time on a CPU, one after the other on a GPU.

    Returns:
        The run of each method.
    """
    lengths = {name: (METHODS[name].title, METHODS[name].iterations(config)) for name in methods}
    with Display(lengths) as display:
        if torch.device(config.device).type == "cpu" and len(methods) > 1:
            runs = train_in_parallel(methods, data, config, log, display)
        else:
            runs = {name: train(name, data, config, display.show, log) for name in methods}
    return {name: runs[name] for name in methods}


# ------------------------------------------------------------------------------------------------------ command line

DEMO = {
    "size": 32,
    "batch_size": 64,
    "order": "flipflop",
    "domains": 15,
    "arrangement": "pairs",
    "images_per_domain": 2000,
    "eval_images": 3000,
    "iterations": 600,
    "exact_iterations": 400,
    "smooth_iterations": 450,
    "lr": 1e-3,
    "inner_optimizer": "sgd",
    "inner_lr": 0.2,
    "meta_lr": 0.5,
    "gamma": None,
    "strength": 1.0,
    "smooth_gamma": 1.0,
}
# 491,520 squares and ellipses in 17 parts, 451 full batches in each, 100 epochs; 0.15 / 15 is the official code's step.
PAPER = {
    "size": 64,
    "batch_size": 64,
    "order": "flipflop",
    "domains": 15,
    "arrangement": "pairs",
    "images_per_domain": 28912,
    "eval_images": 28912,
    "iterations": 45100,
    "exact_iterations": 45100,
    "smooth_iterations": 45100,
    "lr": 1e-3,
    "inner_optimizer": "adam",
    "inner_lr": 0.2,
    "meta_lr": 0.01,
    "gamma": None,
    "strength": 1.0,
    "smooth_gamma": 1.0,
}


def _whole(least: int, most: int | None = None, even: bool = False) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most) or (even and number % 2):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"should be {'even and ' if even else ''}{limits} (got {number})")
        return number

    parse.__name__ = "whole number"  # argparse shows it in its message
    return parse


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"should be in (0, 1] (got {number})")
    return number


def _strength(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"should be finite and above 0 (got {number})")
    return number


def _gamma(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"should be finite and at least 0 (got {number})")
    return number


def _method_names(text: str) -> list[str]:
    asked = {name.strip().lower() for name in text.split(",")}
    if unknown := sorted(asked - set(METHODS)):
        raise argparse.ArgumentTypeError(f"should be some of {','.join(METHODS)} (got {unknown[0]!r})")
    return [name for name in METHODS if name in asked]


def _usable_device(text: str) -> str:
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(
        description="Train ERM, Fish, SmoothFish and the exact objective on CdSprites-N and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and cdsprites.json")
    add(
        "--seed",
        type=_whole(0, 2**32 - 1),
        default=0,
        help="decides images, colours, initial weights and order of batches",
    )
    add(
        "--methods",
        type=_method_names,
        default="erm,fish,smooth_fish,exact",
        help=f"which to train, separated by commas: {','.join(METHODS)}",
    )
    add("--device", type=_usable_device, default="cpu", help="torch device; a CPU trains the methods side by side")
    add("--dsprites", type=Path, metavar="FILE", help="take sprites from the dSprites npz file instead of drawing them")
    add("--domains", type=_whole(2, 100), help="training domains N, also the inner steps of a meta-iteration")
    add(
        "--arrangement",
        choices=get_args(Arrangement),
        help="which hues the shapes wear in training: in pairs around the colour wheel, or at random",
    )
    add("--images-per-domain", type=_whole(2, even=True), help="training images of each domain")
    add("--eval-images", type=_whole(2, even=True), help="images of validation and as many of test")
    add("--size", type=_whole(16, 128), help="side of the images in pixels")
    add("--batch-size", type=_whole(1), help="images in a batch, of ERM as of Fish")
    add("--order", choices=("flipflop", "random"), help="of the domains, where each batch is from one")
    add("--iterations", type=_whole(1), help="meta-iterations of ERM and Fish; each is N gradient evaluations")
    add(
        "--exact-iterations",
        type=_whole(1),
        help="meta-iterations of the exact objective; each N Hessian products more",
    )
    add(
        "--smooth-iterations",
        type=_whole(1),
        help="meta-iterations of SmoothFish; each is N gradient evaluations (2 N - 1 at another gamma than 1, 3 N - 2 "
        "if symmetric)",
    )
    add("--lr", type=_rate, help="learning rate of Adam, in ERM and after SmoothFish's and the exact gradient")
    add("--inner-optimizer", choices=("sgd", "adam"), help="by which Fish walks: SGD, or Adam as ERM has it")
    add("--inner-lr", type=_rate, help="learning rate of the walk by SGD, of Fish and of SmoothFish")
    add("--meta-lr", type=_rate, help="the fraction of its inner walk that Fish keeps")
    exact = parser.add_mutually_exclusive_group()
    exact.add_argument("--gamma", type=_gamma, help="of the exact objective, instead of --strength")
    exact.add_argument("--strength", type=_strength, help="find its gamma: matching term over mean gradient, at first")
    add("--smooth-gamma", type=_gamma, help="strength of the matching in SmoothFish, in multiples of its walk's")
    add("--measurements", type=_whole(1), default=30, help="points of the curves; their gradients are not counted")
    add("--log", type=Path, metavar="DIR", help="write each method's losses and agreement there, for TensorBoard")
    add("--paper", action="store_true", help="the configuration of the authors' code as defaults; meant for a GPU")
    parser.set_defaults(**DEMO)
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Config, SpriteSource]:
    """Read the command line; what is wrong with it ends the program with a message.

    Returns:
        The arguments, the settings of the runs, and where the sprites come from.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.paper:
        parser.set_defaults(**PAPER)
        options = parser.parse_args(arguments)
        if options.size != PAPER["size"]:
            parser.error(f"argument --size: the network of --paper takes 64 pixels (got {options.size})")
    if options.batch_size > options.images_per_domain:
        parser.error(f"argument --batch-size: should be at most --images-per-domain (got {options.batch_size})")
    source: SpriteSource = DrawnSprites()
    if options.dsprites is not None:
        try:
            source = DSpritesFile(options.dsprites)
        except (OSError, ValueError) as error:
            parser.error(f"argument --dsprites: {error}")
    needed = (options.domains * options.images_per_domain + 2 * options.eval_images) // 2
    if needed > source.available:
        parser.error(
            f"{needed} different squares and as many ellipses are asked for, and there are {source.available}: "
            "lower --domains, --images-per-domain or --eval-images"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    names = Config.__dataclass_fields__
    return options, Config(**{name: value for name, value in vars(options).items() if name in names}), source


def environment(config: Config) -> dict[str, str | int]:
    """Describe what the times depend on.

    Returns:
        Versions, device and number of CPUs.
    """
    device = torch.device(config.device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "interpolation": str(native_status()),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "cpus": os.cpu_count() or 1,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status.
    """
    options, config, source = parse(arguments)
    try:
        data = make_cdsprites(
            source,
            domains=config.domains,
            images_per_domain=config.images_per_domain,
            eval_images=config.eval_images,
            size=config.size,
            seed=config.seed,
            arrangement=config.arrangement,
        )
    except ValueError as error:  # what is wrong with a dSprites file may show only now
        print(f"cdsprites.py: error: {error}", file=sys.stderr)
        return 2
    print(
        f"CdSprites-{config.domains}: {len(data.train.labels)} training images of {config.size} pixels, seed "
        f"{config.seed}\n"
        f"interpolation by {native_status()}"
    )
    try:
        runs = train_all(options.methods, data, config, options.log)
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    print(f"\n{table(list(runs.values()))}\n")
    print(
        "unseen colours: accuracy on test images; Hv: products of Hessian and vector; inner product: of two training\n"
        "domains' gradients, mean over pairs and over training. Measuring the curves is in the seconds only.\n"
    )
    save_figure(options.out / "cdsprites.png", data, list(runs.values()))
    save_agreement(options.out / "cdsprites_domains.png", list(runs.values()))
    results = {
        "config": asdict(config) | {"sprites": "drawn" if options.dsprites is None else "dsprites file"},
        "environment": environment(config),
        "final": {name: run.final() for name, run in runs.items()},
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    (options.out / "cdsprites.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {', '.join(str(options.out / f'cdsprites{end}') for end in ('.png', '_domains.png', '.json'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
