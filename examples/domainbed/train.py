"""Train DomainBed's benchmarks with gradient matching, in an unmodified checkout of DomainBed.

.. code-block:: sh

    git clone https://github.com/facebookresearch/DomainBed
    pip install torchvision timm wilds tqdm
    python examples/domainbed/train.py --domainbed DomainBed --algorithm GradMatchFish --dataset PACS --data_dir DATA

Puts the checkout on Python's path, makes DomainBed know the algorithms of ``domainbed_algorithms.py`` and their
hyperparameters, and runs its own ``domainbed.scripts.train``, with all options but those two below passed on as they
are. ``--script sweep`` runs ``domainbed.scripts.sweep`` instead, whose jobs then come back here, and ``--script
collect_results`` and ``--script list_top_hparams`` those; any algorithm of DomainBed may be part of the same sweep.
``--domainbed DIR --help`` shows the options of the script itself.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

CLONE = "git clone https://github.com/facebookresearch/DomainBed"
SCRIPTS = ("train", "sweep", "collect_results", "list_top_hparams")
# How sweep begins the command of a job.
JOB = "python -m domainbed.scripts.train "
# Where a module does not have the name of the package that has it.
PACKAGES = {"PIL": "pillow", "torch_gradmatch": "--no-build-isolation .  (in the root of torch_gradmatch's repository)"}

Launcher = Callable[[list[str]], None]


def launch_here(launcher: Launcher, checkout: Path) -> Launcher:
    """Let a sweep's jobs run through this file, where the algorithms are known.

    Args:
        launcher: One of DomainBed's command launchers.
        checkout: The checkout.

    Returns:
        A launcher that hands the rewritten commands to it.
    """
    here = shlex.join([sys.executable, str(Path(__file__).resolve()), "--domainbed", str(checkout)])

    def launch(commands: list[str]) -> None:
        for command in commands:
            if not command.startswith(JOB):
                raise RuntimeError(f"a job of this DomainBed's sweep does not begin with {JOB!r}: {command}")
        launcher([f"{here} {command.removeprefix(JOB)}" for command in commands])

    return launch


def prepare(checkout: Path, fail: Callable[[str], NoReturn]) -> None:
    """Put a checkout on the path, import it and register the algorithms.

    Args:
        checkout: The checkout.
        fail: Called with what is wrong with the checkout or the environment.
    """
    if not (checkout / "domainbed" / "algorithms.py").is_file():
        what = "is no checkout of DomainBed: it has no domainbed/algorithms.py" if checkout.is_dir() else "is missing"
        fail(f"--domainbed: {checkout} {what}. This gets one: {CLONE}")
    sys.path.insert(0, str(checkout))
    try:
        for module in ("datasets", "networks", "hparams_registry", "lib.misc"):
            importlib.import_module(f"domainbed.{module}")
        ours = importlib.import_module("domainbed_algorithms")
    except ModuleNotFoundError as error:
        name = str(error.name)
        if name.split(".")[0] == "domainbed":
            fail(f"--domainbed: {checkout} is no complete checkout of DomainBed: {error}. This gets one: {CLONE}")
        package = name.split(".")[0]
        fail(f"{package} is missing, which DomainBed imports: pip install {PACKAGES.get(package, package)}")
    ours.register()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script of DomainBed.

    Args:
        arguments: The command line; that of the process if left out.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s --domainbed DIR [--script NAME] [options of DomainBed's script ...]",
        description="Run DomainBed's own scripts with the algorithms of torch_gradmatch.",
        epilog="--domainbed DIR --help shows the options of DomainBed's script.",
        allow_abbrev=False,  # --d, --data ... are for DomainBed
        add_help=False,
    )
    parser.add_argument("--domainbed", type=Path, metavar="DIR", help=f"a checkout of DomainBed ({CLONE})")
    parser.add_argument("--script", choices=SCRIPTS, default="train", help="which of its scripts (default: train)")
    options, forwarded = parser.parse_known_args(arguments)
    if options.domainbed is None:
        if "-h" in forwarded or "--help" in forwarded:
            parser.print_help()
            return
        parser.error(f"--domainbed DIR is missing: the checkout of DomainBed to run. This gets one: {CLONE}")
    checkout = options.domainbed.resolve()
    prepare(checkout, parser.error)
    if options.script == "sweep":
        launchers = importlib.import_module("domainbed.command_launchers").REGISTRY
        launchers.update({name: launch_here(launcher, checkout) for name, launcher in launchers.items()})
    sys.argv = [sys.argv[0], *forwarded]
    runpy.run_module(f"domainbed.scripts.{options.script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
