"""Print ratios from the JSON of ``test_interpolate.py``: ``python -m benchmarks.report_interpolate FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import table


def ratios(results: dict[str, Any]) -> str:
    """Lay out, for each network, dtypes and threads, the native time and how much longer the others take."""
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for entry in results["benchmarks"]:
        key = [entry["extra_info"][name] for name in ("parameters", "network", "tensors", "dtypes", "threads", "bytes")]
        cells.setdefault(tuple(key), {})[entry["extra_info"]["way"]] = entry["stats"]["median"]
    ways = list(dict.fromkeys(way for times in cells.values() for way in times if way != "native"))
    rows = [["network", "tensors", "M params", "dtypes", "threads", "native ms", "GB/s", *ways]]
    for (parameters, network, tensors, dtypes, threads, size), times in sorted(cells.items(), key=lambda item: item[0]):
        own = times.get("native", float("nan"))
        rows.append([
            network, str(tensors), f"{parameters / 1e6:.2f}", dtypes, str(threads),
            f"{own * 1e3:.3f}", f"{size / own / 1e9:.1f}",
            *(f"{times[way] / own:.2f}x" if way in times else "-" for way in ways),
        ])  # fmt: skip
    return table(rows)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    where = found["machine_info"]["environment"]
    print(f"torch {where['torch']}, {where['cpu']}, {where['cpus']} CPUs; {where['native']}")
    print(f"Medians. From the column foreach on: time of each way as a multiple of native's.\n\n{ratios(found)}")
