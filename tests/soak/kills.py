"""Training killed at random moments, resumed from its last checkpoint, and compared with one that nobody disturbed.

Compared are all checkpoints on the way, by a digest in the log, and the last one entry by entry: parameters, slow
weights, the wrapped optimizer's state, buffers, schedule, the loader's place and torch's random state.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _models import assert_identical

from soak import train as training
from soak.processes import start, strict_and_alone

KILLS = 100
OF_RANKS = 24  # of them
LIMIT = 240.0  # seconds for one start
SAVE_EVERY = 3
TESTS = Path(__file__).parents[1]

Train = Callable[[dict[str, Any]], None]


def cases(share: float) -> list[str]:
    """Each variant with its part of the kills."""
    alone = [name for name, variant in training.VARIANTS.items() if variant.split is None]
    of_ranks = [name for name in training.VARIANTS if name not in alone]
    found = []
    for names, kills in ((alone, KILLS - OF_RANKS), (of_ranks, OF_RANKS)):
        total = max(1, round(kills * share))
        dealt = [total * (i + 1) // len(names) - total * i // len(names) for i in range(len(names))]
        found += [f"{name}/{number}" for name, number in zip(names, dealt, strict=True) if number]
    return found


def in_process(train: Train, settings: dict[str, Any]) -> None:
    """Train in a process of its own; what is raised is left in the folder."""
    strict_and_alone()
    try:
        train(settings)
    except BaseException:
        Path(settings["folder"], "error").write_text(traceback.format_exc())
        raise


class Alone:
    """A training in one process, started again by whoever killed it."""

    def __init__(self, train: Train, settings: dict[str, Any]) -> None:
        self.train, self.settings, self.folder = train, settings, Path(settings["folder"])

    def start(self) -> None:
        for name in ("began-0-0", "checkpoint.unfinished"):
            (self.folder / name).unlink(missing_ok=True)
        self.process = start(in_process, self.train, self.settings)

    def wait_to_begin(self) -> bool:
        """Wait until it trains; return whether it does."""
        wait_for(lambda: (self.folder / "began-0-0").exists() or not self.process.is_alive())
        return (self.folder / "began-0-0").exists()

    def is_over(self) -> bool:
        """Whether it came to the end; raise if it failed."""
        if self.process.is_alive():
            return False
        self.process.join()
        if self.process.exitcode != 0:
            raise AssertionError((self.folder / "error").read_text())
        return True

    def stop(self) -> None:
        """End it, if it is not over."""
        if self.process.is_alive():
            self.process.kill()

    def kill(self, draw: random.Random) -> bool:
        """Kill it; return whether it was still at work."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


class OfRanks:
    """A training on two ranks, started again by torchrun."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.folder, self.restarts = settings, Path(settings["folder"]), -1
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.restarts += 1
        if self.process is not None:
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "100", "-m", "soak.train", json.dumps(self.settings)]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        with (self.folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                command, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            )

    def told(self) -> list[Path]:
        return [self.folder / f"began-{self.restarts}-{rank}" for rank in range(2)]

    def wait_to_begin(self) -> bool:
        assert self.process is not None
        process = self.process
        wait_for(lambda: all(path.exists() for path in self.told()) or process.poll() is not None)
        return all(path.exists() for path in self.told())

    def is_over(self) -> bool:
        assert self.process is not None
        if self.process.poll() is None:
            return False
        if self.process.returncode != 0:
            raise AssertionError((self.folder / "errors").read_text()[-6000:])
        return True

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()  # and it ends the ranks
            self.process.wait()

    def kill(self, draw: random.Random) -> bool:
        (self.folder / "checkpoint.unfinished").unlink(missing_ok=True)
        pid = int(draw.choice(self.told()).read_text())
        try:
            if b"soak.train" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return False  # it is over, and the number another's
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            return False
        return True


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not happens():
        if time.monotonic() > end:
            raise AssertionError(f"nothing happened for {LIMIT:.0f} s")
        time.sleep(0.005)


def logged(folder: Path) -> list[tuple[int, str]]:
    """What the log says of every checkpoint. A process that is killed may leave half a line."""
    lines = (folder / "log").read_text().split("\n") if (folder / "log").exists() else []
    parts = [line.split() for line in lines]
    return [(int(part[0]), part[1]) for part in parts if len(part) == 2 and len(part[1]) == 24]


def compare(broken: Path, whole: Path) -> None:
    """Raise unless every checkpoint of a training is that of another, bit for bit."""
    expected = dict(logged(whole))
    for step, found in logged(broken):
        assert found == expected[step], f"the checkpoint of step {step} is another than that of the undisturbed run"
    final, of_whole = (torch.load(one / "checkpoint.pt", weights_only=True) for one in (broken, whole))
    assert_identical(training.comparable(final), training.comparable(of_whole))


def run(case: str, seed: int, folder: Path, train: Train = training.train, steps: int | None = None) -> dict[str, Any]:
    """Kill a training so often; whenever it ends before that, begin with another."""
    name, _, number = case.partition("/")
    kills = int(number)
    draw = random.Random(f"kills {name} {seed}")
    variant = training.VARIANTS[name]
    folder = folder / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"variant": name, "seed": draw.randrange(2**31), "save_every": SAVE_EVERY, "steps": steps}

    def begin(where: str) -> Alone | OfRanks:
        (folder / where).mkdir(parents=True)
        its = {**settings, "folder": str(folder / where)}
        return Alone(train, its) if variant.split is None else OfRanks(its)

    whole = broken = begin("whole")
    landed = runs = in_writing = in_walk = 0
    resumed_at: list[int] = []
    try:
        whole.start()
        wait_for(whole.is_over)
        seconds = float((whole.folder / "seconds").read_text())
        while landed < kills:
            runs += 1
            broken = begin(f"broken-{runs}")
            broken.start()
            while landed < kills and broken.wait_to_begin():
                time.sleep(draw.uniform(0.0, 2 * seconds / (kills - landed + 1)))
                if broken.is_over() or not broken.kill(draw):
                    break
                landed += 1
                in_writing += (broken.folder / "checkpoint.unfinished").exists()
                saved = broken.folder / "checkpoint.pt"
                state = torch.load(saved, weights_only=True) if saved.exists() else None
                resumed_at.append(state["step"] if state else 0)
                in_walk += bool(state and state["optimizer"]["gradmatch"].get("inner_step", 0))
                broken.start()
            wait_for(broken.is_over)
            compare(broken.folder, whole.folder)
    finally:
        broken.stop()
    shutil.rmtree(folder)  # stays if something is wrong
    return {
        "kills": landed,
        "while_writing": in_writing,
        "resumed_in_a_walk": in_walk,
        "resumed_at": resumed_at,
        "steps": steps or variant.steps,
        "runs": runs,
    }


def figures(lines: list[dict[str, Any]]) -> list[str]:
    def total(key: str) -> int:
        return sum(line[key] for line in lines)

    told = (
        f"{total('kills')} times SIGKILL in the middle of training, {total('runs')} runs of {len(lines)} variants, "
        "each resumed from its last checkpoint and bit for bit the undisturbed one at every checkpoint; "
        f"{total('while_writing')} of the kills while a checkpoint was written, {total('resumed_in_a_walk')} resumed "
        "in the middle of an inner loop"
    )
    places = [f"- {line['case']}: resumed at {line['resumed_at']} of {line['steps']} steps" for line in lines]
    return [told, "", *places]
