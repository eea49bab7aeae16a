"""``python -m benchmarks.same_order FOLDER OTHER``: whether two reports put the ways in the same order.

For each network and number of domains every pair of ways is compared, by time and by memory. A pair whose order differs
is listed with its ratio in either report: near 1 the two ways cost the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

Key = tuple[str, str, int]  # what was measured, network, number of domains


def figures(results: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    """The figure of every way: the median of times over ERM's, and bytes."""
    found: dict[Key, dict[str, float]] = {}
    for row in results.get("times", ()):
        if row["seconds"]:
            found.setdefault(("time", row["network"], row["domains"]), {})[row["way"]] = median(row["of_erm"])
    for row in results.get("memory", ()):
        if row["bytes"]:
            found.setdefault(("memory", row["network"], row["domains"]), {})[row["way"]] = row["bytes"]
    return found


def pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[Key, str, str, float, float]]:
    """Every pair of ways that both reports have, and how many times as much the first takes as the second in either."""
    mine, theirs = figures(one), figures(other)
    for key in mine.keys() & theirs.keys():
        ways = [way for way in mine[key] if way in theirs[key]]
        for a, b in combinations(ways, 2):
            yield key, a, b, mine[key][a] / mine[key][b], theirs[key][a] / theirs[key][b]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        reports = [json.loads((Path(folder) / "report.json").read_text()) for folder in arguments]
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.same_order: error: {error}", file=sys.stderr)
        return 2
    compared = list(pairs(*reports))
    flipped = [pair for pair in compared if (pair[3] - 1) * (pair[4] - 1) < 0]
    print(f"{len(compared)} pairs, {len(flipped)} in another order")
    for (what, network, domains), a, b, mine, theirs in sorted(flipped):
        print(f"{what}, {network}, S={domains}: {a} over {b} {mine:.3f} and {theirs:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
