"""``python -m soak [stateful kills damage flat]``: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from soak import damage, flat, kills, report, stateful
from soak.processes import Call

PARTS: dict[str, ModuleType] = {"damage": damage, "stateful": stateful, "kills": kills, "flat": flat}
LIMITS = {"damage": 300.0, "stateful": 1200.0, "kills": 1800.0, "flat": 7200.0}  # seconds for a case


def carry_out(
    names: list[str], share: float, seed: int, out: Path, only: str | None, jobs: int
) -> dict[str, list[dict[str, Any]]]:
    """Carry out the cases that have not been yet, each in a process of its own, and go on after those that fail."""
    lines: dict[str, list[dict[str, Any]]] = {}
    waiting: deque[tuple[str, str]] = deque()
    for name in names:
        cases = [only] if only is not None else PARTS[name].cases(share)
        done = {} if only is not None else report.read(out / f"{name}.jsonl", seed, cases)
        lines[name] = list(done.values())
        waiting += [(name, case) for case in cases if case not in done]
    bars = {
        name: tqdm(
            total=len(lines[name]) + sum(part == name for part, _ in waiting), initial=len(lines[name]), desc=name
        )
        for name in names
    }
    running: dict[int, tuple[str, str, Call]] = {}
    while waiting or running:
        for slot in range(jobs):
            if slot not in running and waiting:
                # One works from the end, where the long ones are, the others from the beginning.
                name, case = waiting.pop() if slot == 0 else waiting.popleft()
                running[slot] = name, case, Call(PARTS[name].run, case, seed, out, limit=LIMITS[name])
        time.sleep(0.01)
        for slot, (name, case, call) in list(running.items()):
            result = call.result()
            if result is None:
                continue
            del running[slot]
            ok, value = result
            line = {"case": case, "seed": seed, "ok": ok, "seconds": round(call.seconds, 2)}
            line |= value if ok else {"error": value}
            report.write(out / f"{name}.jsonl", line)
            lines[name].append(line)
            bars[name].update()
            if not ok:
                tqdm.write(f"FAILED {report.command(name, line)}\n{value}", file=sys.stderr)
    for bar in bars.values():
        bar.close()
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Carry out some parts and write what was found; return how many cases failed, at most 100."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="how much of it: 0.01 for a hundredth")
    parser.add_argument(
        "--out", type=Path, default=Path("out/soak"), help="what is there with this seed is not done again"
    )
    parser.add_argument("--only", metavar="CASE", help="carry out one case of one part again")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args(arguments)
    names = options.parts or list(PARTS)
    for name in names:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}: choose of {', '.join(PARTS)}")
    if options.only is not None and len(names) != 1:
        parser.error("--only is a case of one part: name that part")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    lines = carry_out(names, options.share, options.seed, options.out, options.only, options.jobs)
    seconds = time.monotonic() - began
    text = report.page({name: PARTS[name] for name in names}, lines, options.share, seconds)
    if options.only is None:
        (options.out / "soak.md").write_text(text)
    tqdm.write(text, file=sys.stdout)
    return min(100, sum(not line["ok"] for of_part in lines.values() for line in of_part))


if __name__ == "__main__":
    sys.exit(main())
