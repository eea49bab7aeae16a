"""Compare two runs of the benchmarks: ``python -m benchmarks.compare_runs BEFORE.json AFTER.json``.

Both files are what ``pytest --benchmark-json=FILE`` writes. A row is the median of one benchmark in each and their
ratio. The spread goes from the ratio of the low quartile after to the high quartile before, up to that of the high one
after to the low one before: only where it does not hold 1, and the ratio is beyond the threshold, is a row marked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


@dataclass(frozen=True)
class Timing:
    """Quartiles of one benchmark's rounds, in seconds."""

    q1: float
    median: float
    q3: float


@dataclass(frozen=True)
class Run:
    """One file: what the times depend on, and the benchmarks by full name."""

    environment: dict[str, str]
    timings: dict[str, Timing]


@dataclass(frozen=True)
class Row:
    """One benchmark in both runs."""

    name: str
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median

    @property
    def low(self) -> float:
        return self.after.q1 / self.before.q3

    @property
    def high(self) -> float:
        return self.after.q3 / self.before.q1

    def verdict(self, threshold: float) -> str:
        if self.low > 1 and self.ratio > threshold:
            return "slower"
        if self.high < 1 and self.ratio < 1 / threshold:
            return "faster"
        return ""


# -------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Run:
    """Read a file; raise ``ValueError`` with one line that names it and says what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the encoding or of JSON
        raise ValueError(f"{path} is not JSON: {str(error).splitlines()[0]}") from error
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is not what pytest --benchmark-json=FILE writes: {error}") from error


def parse(content: Any) -> Run:
    """Take out of a file's content what is compared; raise ``ValueError`` if it is not pytest-benchmark's."""
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ValueError("there is no list 'benchmarks'")
    if not isinstance(content.get("machine_info"), dict):
        raise ValueError("there is no dictionary 'machine_info'")
    timings: dict[str, Timing] = {}
    for position, entry in enumerate(content["benchmarks"]):
        name = entry.get("fullname") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"benchmark number {position} has no 'fullname'")
        if name in timings:
            raise ValueError(f"{name} is in it twice")
        timings[name] = _timing(name, entry.get("stats"))
    return Run(_environment(content["machine_info"]), timings)


def _timing(name: str, stats: Any) -> Timing:
    values = [stats.get(key) if isinstance(stats, dict) else None for key in ("q1", "median", "q3")]
    for key, value in zip(("q1", "median", "q3"), values, strict=True):
        if not isinstance(value, int | float) or isinstance(value, bool) or not (0 < value < math.inf):
            raise ValueError(f"{name} should have a positive time as stats['{key}'] (got {value!r})")
    return Timing(*values)


def _environment(machine_info: dict[str, Any]) -> dict[str, str]:
    cpu = machine_info.get("cpu")
    known = {
        "torch": machine_info.get("torch"),
        "cpu": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
        "cpus": machine_info.get("cpus"),
        "native": machine_info.get("native"),
    }
    return {key: "unknown" if value is None else str(value) for key, value in known.items()}


# -------------------------------------------------------------------------------------------------------------- showing


def match(before: Run, after: Run) -> list[Row]:
    """Pair the benchmarks that both runs have, the one that got slowest first; raise ``ValueError`` without any."""
    rows = [Row(name, t, after.timings[name]) for name, t in before.timings.items() if name in after.timings]
    if not rows:
        raise ValueError(
            f"no benchmark is in both files ({len(before.timings)} before, {len(after.timings)} after): "
            "pass two runs of the same benchmarks"
        )
    return sorted(rows, key=lambda row: (-row.ratio, row.name))


def duration(seconds: float) -> str:
    """Write a time in the largest unit of which it is at least one, with four digits."""
    seconds = float(f"{seconds:.4g}")  # first, lest what rounds up to a thousand stay in the smaller unit
    unit, size = next((u for u in UNITS if seconds >= u[1]), UNITS[-1])
    value = seconds / size
    return f"{f'{value:#.4g}'.rstrip('.') if value < 9999.5 else f'{value:.0f}'} {unit}"


def table(rows: Sequence[Row], threshold: float) -> str:
    """Lay out one aligned Markdown table."""
    cells = [["benchmark", "before", "after", "after/before", "spread", ""]]
    cells += [
        [
            row.name.replace("|", "\\|"),
            duration(row.before.median),
            duration(row.after.median),
            f"{row.ratio:.3f}",
            f"{row.low:.3f} to {row.high:.3f}",
            row.verdict(threshold),
        ]
        for row in rows
    ]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(cells[0]))]
    aligned = ["<", *">>>>", "<"]  # words to the left, numbers to the right
    columns = list(zip(widths, aligned, strict=True))
    lines = [
        " | ".join(f"{cell:{side}{width}}" for cell, (width, side) in zip(line, columns, strict=True)) for line in cells
    ]
    rule = " | ".join("-" * width if side == "<" else "-" * (width - 1) + ":" for width, side in columns)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def environments(before: Run, after: Run) -> str:
    """Describe both environments, and warn of what is not the same."""
    lines = [
        f"- {when}: " + ", ".join(f"{key}: {value}" for key, value in run.environment.items())
        for when, run in (("before", before), ("after", after))
    ]
    different = [key for key, value in before.environment.items() if after.environment[key] != value]
    if different:
        lines += ["", f"WARNING: the environments differ in {', '.join(different)}: the ratios show that, too."]
    return "\n".join(lines)


def only_in_one(before: Run, after: Run) -> str:
    """List the benchmarks that cannot be compared."""
    sections = []
    for which, run, other in (("before", before, after), ("after", after, before)):
        names = sorted(set(run.timings) - set(other.timings))
        if names:
            sections.append("\n".join([f"Only in {which}:", "", *(f"- {name}" for name in names)]))
    return "\n\n".join(sections)


def report(before: Run, after: Run, threshold: float) -> str:
    """Write the whole comparison; raise ``ValueError`` if the runs have no benchmark in common."""
    rows = match(before, after)
    verdicts = [row.verdict(threshold) for row in rows]
    summary = (
        f"{len(rows)} benchmarks in both, {verdicts.count('slower')} slower, {verdicts.count('faster')} faster: "
        f"where the spread does not hold 1 and the ratio is beyond {threshold:g}."
    )
    parts = [environments(before, after), summary, table(rows, threshold), only_in_one(before, after)]
    return "\n\n".join(part for part in parts if part)


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a ratio of at least 1, such as 1.05 (got {text!r})")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison of the two files on the command line.

    Args:
        arguments: The command line's; those of this process if left out.

    Returns:
        0, or 2 if the files cannot be compared.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_runs", description="Compare two runs.")
    parser.add_argument("before", type=Path, metavar="BEFORE.json", help="from pytest --benchmark-json=BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json", help="the same benchmarks, later")
    parser.add_argument("--threshold", type=_threshold, default=1.05, help="least ratio to mark (default: 1.05)")
    options = parser.parse_args(arguments)
    try:
        text = report(read(options.before), read(options.after), options.threshold)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
