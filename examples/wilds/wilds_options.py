"""The command line of ``train.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from wilds_settings import OURS, PAPER, PaperSettings

__all__ = ["METHODS", "parse"]

METHODS = ("fish", "smooth_fish", "idgm", "erm")


def parse(description: str, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, PaperSettings]:
    """Read the command line and fill in the data set's settings where it is silent.

    Args:
        description: What the script does.
        arguments: Without the program's name; None for those of the process.

    Returns:
        Options and the data set's settings.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, choices=list(PAPER))
    add("--root", required=True, type=Path, help="folder of the WILDS data sets")
    add("--method", required=True, choices=METHODS)
    add("--out", type=Path, help="folder of the run; default runs/DATASET-METHOD-seedSEED")
    add("--resume", action="store_true", help="continue the run in --out; begin one if there is none")
    add("--download", action="store_true", help="download the data set if it is missing")
    add("--seed", type=int, default=0)
    add("--fold", choices="ABCDE", default="A", help="PovertyMap: which countries are held out")
    add("--weights", default="pretrained", help='"pretrained", "none" or a path; see wilds_models.py')
    paper = parser.add_argument_group("the authors' settings of the data set, unless given")
    for name, kind in (("lr", float), ("batch_size", int), ("domains_per_step", int), ("warm_start", int)):
        paper.add_argument(f"--{name.replace('_', '-')}", type=kind)
    paper.add_argument("--meta-lr", type=float, help="step of Fish's interpolation itself, not the authors' number")
    paper.add_argument("--epochs", type=int)
    paper.add_argument("--iterations", type=int, help="stop after so many (meta-)iterations, after the warm start")
    paper.add_argument("--eval-every", type=int, help="iterations between evaluations; 0: at the end of epochs only")
    ours = parser.add_argument_group("settings of methods that the authors did not run on WILDS")
    ours.add_argument("--gamma", type=float, default=OURS.gamma, help="strength of SmoothFish")
    ours.add_argument("--inner-lr", type=float, default=OURS.inner_lr, help="of SmoothFish's walk")
    ours.add_argument("--strength", type=float, default=OURS.strength, help="of the exact objective: 0.03 to 0.3")
    ours.add_argument("--agreement", choices=("inner_product", "variance", "cosine"), default=OURS.agreement)
    add("--image-size", type=int, default=224, help="side of images in pixels")
    add("--max-tokens", type=int, help="of a text; default 512 for Amazon, 300 for CivilComments")
    add("--eval-batch-size", type=int, default=256)
    add("--amp", action="store_true", help="run the network in bfloat16 (autocast)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=4, help="processes that load data")
    add("--log-every", type=int, default=50, help="iterations between rows of log.csv, after the first")
    add("--checkpoint-every", type=int, default=500, help="iterations between checkpoints within an epoch")
    options = parser.parse_args(arguments)

    settings = PAPER[options.dataset]
    for name in ("lr", "batch_size", "domains_per_step", "warm_start", "epochs", "eval_every"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(settings, name))
    if options.meta_lr is None:
        options.meta_lr = settings.epsilon
    if options.max_tokens is None:
        options.max_tokens = 512 if options.dataset == "amazon" else 300
    if options.out is None:
        fold = f"-fold{options.fold}" if options.dataset == "poverty" else ""
        options.out = Path("runs") / f"{options.dataset}-{options.method}{fold}-seed{options.seed}"
    at_least = {"warm_start": 0, "eval_every": 0, "workers": 0, "seed": 0, "iterations": 1}
    for name in ("batch_size", "domains_per_step", "epochs", "image_size", "max_tokens", "eval_batch_size"):
        at_least[name] = 1
    at_least |= {"log_every": 1, "checkpoint_every": 1}
    for name, smallest in at_least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            parser.error(f"--{name.replace('_', '-')} should be at least {smallest} (got {value})")
    if options.method != "erm" and options.domains_per_step < 2:
        parser.error(f"--domains-per-step should be at least 2 to match gradients (got {options.domains_per_step})")
    return options, settings
