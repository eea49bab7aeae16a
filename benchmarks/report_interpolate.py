"""Print ratios from the JSON of ``test_interpolate.py``: ``python benchmarks/report_interpolate.py FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Lay out, for each network, dtypes and threads, the native time and how much longer the others take."""
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    bytes_of: dict[tuple[str, str], int] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        key = (info["network"], info["dtypes"], info["threads"])
        cells.setdefault(key, {})[info["way"]] = entry["stats"]["median"]
        sizes[info["network"]] = (info["tensors"], info["parameters"])
        bytes_of[info["network"], info["dtypes"]] = info["bytes"]
    ways = list(dict.fromkeys(way for row in cells.values() for way in row if way != "native"))
    heads = ["network", "tensors", "M params", "dtypes", "threads", "native ms", "GB/s", *ways]
    rows = [heads]
    for (network, dtypes, threads), times in sorted(cells.items(), key=lambda item: (sizes[item[0][0]][1], item[0])):
        tensors, parameters = sizes[network]
        own = times.get("native", float("nan"))
        rows.append([
            network, str(tensors), f"{parameters / 1e6:.2f}", dtypes, str(threads),
            f"{own * 1e3:.3f}", f"{bytes_of[network, dtypes] / own / 1e9:.1f}",
            *(f"{times[way] / own:.2f}x" if way in times else "-" for way in ways),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def main() -> None:
    """Print the table of the file named on the command line."""
    results = json.loads(Path(sys.argv[1]).read_text())
    info = results["machine_info"]
    print(
        f"torch {info['torch']}, {info['cpu'].get('brand_raw', 'unknown CPU')}, {info['cpus']} CPUs; {info['native']}"
    )
    print("Medians. From the column foreach on: time of each way as a multiple of native's.\n")
    print(table(results))


if __name__ == "__main__":
    main()
