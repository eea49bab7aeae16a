"""Fish or exact? What the rows of three ways to match gradients mean, in sentences.

The three are Fish, SmoothFish that walks to and fro (``symmetric=True``), and the exact objective: IDGM over all
domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from torch_gradmatch.evaluation.fidelity import Fidelity
from torch_gradmatch.evaluation.rows import OTHER_RATES, Row, at_other_rate
from torch_gradmatch.evaluation.tables import aligned, megabytes, wrapped
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish

__all__ = ["answer"]

QUESTION = "Fish or exact?"
CLOSE, FAR = 0.9, 0.5  # cosines, between which an approximation is called rough
FASTER = 0.9  # of the time, from which one way is called faster


class _Way:
    """One of the three ways.

    Args:
        row: What was measured of it.
        remark: When to prefer it.
    """

    def __init__(self, row: Row, remark: str) -> None:
        self.name = row.name
        self.row = row
        self.remark = remark
        self.works = row.cost is not None and row.error is None

    @property
    def of_erm(self) -> float:
        """Time over that of ordinary training."""
        assert self.row.cost is not None
        return median(self.row.cost.of_erm)

    @property
    def found(self) -> Fidelity | None:
        """What is known of its direction."""
        return self.row.fidelity if self.works else None

    @property
    def is_near(self) -> bool:
        """Whether its direction is known to be that of its exact objective."""
        return self.found is not None and self.found.resolved and self.found.cosine >= CLOSE

    def shortcoming(self) -> str:
        """Say, after its name, in what respect it is not near."""
        if self.found is None:
            return "could not be measured"
        if not self.found.resolved:
            return "hardly matches gradients at this inner learning rate: what it does beyond ERM is lost in rounding"
        figures = f"cosine {self.found.cosine:.2f}, {_strength(self.found)}"
        if self.found.cosine >= FAR:
            return f"is a rough stand-in for exact here ({figures})"
        return f"goes another way at this inner learning rate ({figures})"


def _strength(found: Fidelity) -> str:
    return f"{found.strength:.2g} of the ERM gradient's length"


def answer(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Say which of the three ways to prefer, what each costs and how near it comes to exact.

    Args:
        rows: What was measured.
        methods: By name.

    Returns:
        A sentence or more, a table, and when to prefer which.
    """
    by_name = {row.name: row for row in rows}
    fish = _fish(by_name, methods)
    symmetric = _symmetric(by_name, methods)
    exact = _exact(by_name, methods)
    ways = [way for way in (fish, symmetric, exact) if way is not None]
    if len(ways) < 2:
        return wrapped(
            f"{QUESTION} That takes at least two of these among the methods: a Fish, a SmoothFish with symmetric=True, "
            "and an IDGM over all domains."
        )
    working = [way for way in ways if way.works]
    if not working:
        return f"{QUESTION} None of these works here (above)."
    failed = "".join(f" {way.name} failed here (above)." for way in ways if not way.works)
    walk = _walk(by_name, methods)
    at_that_price = ""
    if walk is not None and walk.is_near and fish is not None and not fish.is_near:
        assert walk.found is not None
        at_that_price = (
            f" At the price of Fish, {walk.name} follows exact in the mean over orders (cosine "
            f"{walk.found.cosine:.2f}): it walks by SGD, and your optimizer takes the step."
        )
    parts = [wrapped(f"{QUESTION} {_verdict(by_name, fish, symmetric, exact)}{at_that_price}{failed}")]
    if len(working) > 1:
        parts.append(_table(working))
        parts += [wrapped(f"{way.name}: {way.remark}") for way in working]
        parts[2:] = ["\n".join(parts[2:])]
    return "\n\n".join([*parts, "Which trains the better model only domains held out can tell."])


def _fish(rows: Mapping[str, Row], methods: Mapping[str, Method]) -> _Way | None:
    for name, method in methods.items():
        if isinstance(method, Fish):
            return _Way(
                rows[name],
                "where its cosine is near 1 and its strength is enough, which the inner learning rate sets. Costs what "
                "ordinary training does, and fits any loop.",
            )
    return None


def _walk(rows: Mapping[str, Row], methods: Mapping[str, Method]) -> _Way | None:
    for name, method in methods.items():
        if isinstance(method, SmoothFish) and method.gamma == 1 and not method.symmetric:
            return _Way(rows[name], "")
    return None


def _symmetric(rows: Mapping[str, Row], methods: Mapping[str, Method]) -> _Way | None:
    for name, method in methods.items():
        if isinstance(method, SmoothFish) and method.symmetric and method.gamma > 0:
            return _Way(
                rows[name],
                "where its cosine is near 1: exact matching, of any strength, by first derivatives alone. It also runs "
                "where nothing can be differentiated twice (compiled models, fused attention), and holds one graph at "
                "a time, as ordinary training does.",
            )
    return None


def _exact(rows: Mapping[str, Row], methods: Mapping[str, Method]) -> _Way | None:
    """Return the fastest exact method that works; by true second derivatives and of the inner product first."""

    def rank(name: str) -> tuple[bool, bool, bool, float]:
        method, cost = methods[name], rows[name].cost
        assert isinstance(method, IDGM)
        found = rows[name].fidelity
        other = found is not None and found.agreement != "inner_product"
        time = 0.0 if cost is None else median(cost.of_erm)
        return cost is None or rows[name].error is not None, other, method.hvp == "finite_difference", time

    whole = [n for n, m in methods.items() if isinstance(m, IDGM) and not m.one_pass and m.gamma != 0]
    if not whole:
        return None
    return _Way(
        rows[min(whole, key=rank)],
        "where activations have kinks (ReLU), whose gradients no walk follows exactly, or where another agreement "
        "than the inner product is wanted (variance, cosine). Strength is free.",
    )


def _verdict(rows: Mapping[str, Row], fish: _Way | None, symmetric: _Way | None, exact: _Way | None) -> str:
    near = symmetric is not None and symmetric.is_near
    if fish is not None and fish.is_near:
        assert fish.found is not None
        other = symmetric if near else exact if exact is not None and exact.works else None
        free = f" For another strength than Fish's: {other.name}." if other is not None else ""
        return (
            f"Fish. Its mean direction beyond ERM is that of the exact objective with gamma = {fish.found.gamma:.3g} "
            f"(cosine {fish.found.cosine:.2f}, {_strength(fish.found)}).{free}"
        )
    why = [] if fish is None or not fish.works else [f"Fish {fish.shortcoming()}{_nearer(rows, fish)}."]
    if symmetric is not None and near:
        assert symmetric.found is not None
        why.append(_faster(exact, symmetric))
        verdict = (
            f"{symmetric.name}. By first derivatives alone, its direction beyond ERM is that of the exact objective "
            f"with gamma = {symmetric.found.gamma:.3g} (cosine {symmetric.found.cosine:.2f})."
        )
        return " ".join([verdict, *filter(None, why)])
    why += [] if symmetric is None or not symmetric.works else [f"{symmetric.name} {symmetric.shortcoming()}."]
    if exact is not None and exact.works:
        if exact.found is None:
            return f"How near they come to exact could not be measured. {exact.name} is exact in any case."
        return " ".join([f"exact, if it is the {_words(exact.found.agreement)} that is to be matched.", *why])
    first = fish if fish is not None and fish.works else symmetric
    name = first.name if first is not None else ""
    return " ".join([f"{name}, for want of a nearer one.", *why])


def _words(agreement: str) -> str:
    return agreement.replace("_", " ")


def _faster(exact: _Way | None, symmetric: _Way) -> str:
    if exact is None or not exact.works or exact.of_erm > FASTER * symmetric.of_erm:
        return ""
    return f"{exact.name} is faster, if there is the memory for it."


def _nearer(rows: Mapping[str, Row], fish: _Way) -> str:
    """Say where else Fish was nearer."""
    if not fish.works or fish.found is None or not fish.found.resolved:
        return ""
    others = [(factor, rows.get(at_other_rate(fish.name, factor))) for factor in OTHER_RATES]
    cosines = [(f.cosine, factor) for factor, row in others if row and (f := row.fidelity) and f.resolved]
    best, factor = max(cosines, default=(0.0, 1.0))
    if best <= fish.found.cosine + 0.05:
        return ""
    return f"; nearer at {factor:g} times the inner learning rate, {best:.2f}"


def _table(ways: Sequence[_Way]) -> str:
    unit = ways[0]
    cells = [["way", f"time / {unit.name}", "peak MB", "cosine with exact", "gamma", "strength"]]
    for way in ways:
        assert way.row.cost is not None
        figures = ["-", "-", "-"]
        if way.found is not None:
            figures = [f"{way.found.cosine:.3f}", f"{way.found.gamma:.3g}", f"{way.found.strength:.2g}"]
            if not way.found.resolved:
                figures[:2] = ["lost in rounding", "-"]
        cells.append([way.name, f"{way.of_erm / unit.of_erm:.2f}", megabytes(way.row.cost.peak_bytes), *figures])
    return aligned(cells)
