"""The report of all data sets: ``index.md`` and pictures, from the files that were stored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.domains import sprites
from benchmarks.domains.domainbed import TITLES
from benchmarks.domains.plots import plot_all, plot_domains
from benchmarks.domains.steps import REFERENCE, SHARES, same_steps
from benchmarks.domains.stored import agreement_of, evidence_of
from benchmarks.report import table
from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import EvidenceRow

__all__ = ["ORDER", "SPRITES", "write"]

SPRITES, SPRITES_TITLE = "cdsprites", "CdSprites-N: how many domains it takes"
ORDER = ("watch", "vowels", "heart", "names", "coloredmnist", "rotatedmnist")
CONTROLS = ("ERM, domains in turn", "ERM, mean over domains")
PICTURE = "would_i_have_won.png"


def write(folder: Path, missing: Mapping[str, str]) -> Path:
    """Write the report.

    Args:
        folder: Has a JSON file for each data set that was measured; ``index.md`` and the pictures are put there.
        missing: By name, why a data set was left out.

    Returns:
        The path of ``index.md``.

    Raises:
        ValueError: If no data set was measured.
    """
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in ORDER if _has(folder, name)}
    drawn = json.loads((folder / f"{SPRITES}.json").read_text()) if _has(folder, SPRITES) else None
    if not files and drawn is None:
        raise ValueError(f"{folder} holds no figures of any data set")
    found = {name: _titled(name, evidence_of(file["evidence"])) for name, file in files.items()}
    titles = {name: file["title"] for name, file in files.items()}
    parts = ["# Does gradient matching help on real data?", _preamble(files, drawn)]
    if found:
        plot_all({titles[name]: evidence for name, evidence in found.items()}, folder / PICTURE)
        parts += [
            "## On which of these data sets would I have won by wrapping my optimizer?",
            f"![Difference to ERM of each method on each data set]({PICTURE})",
        ]
        parts += ["\n".join(f"- **{titles[name]}**: {evidence.answer}" for name, evidence in found.items())]
        parts += ["## When it helped, when not, and what the gradients' agreement said beforehand"]
        parts += [_agreement_table(found, titles), _in_words(found, titles), *_on_sprites(drawn)]
        parts += _same_steps(found, titles)
    for name, file in files.items():
        parts += _section(folder, name, file, found[name])
    if drawn is not None:
        parts += _sprites_section(folder, drawn)
    parts += ["## Protocol, and what was cut", _protocol(files, missing)]
    path = folder / "index.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _titled(name: str, evidence: Evidence) -> Evidence:
    titles = TITLES if name.endswith("mnist") else {}
    return replace(evidence, rows=[replace(row, name=titles.get(row.name, row.name)) for row in evidence.rows])


def _has(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def _preamble(files: Mapping[str, Any], drawn: Any) -> str:
    took = ", ".join(f"{e['title']} {e['seconds'] / 60:.0f}" for e in files.values())
    whole = [f"{took}; {sum(e['seconds'] for e in files.values()) / 60:.0f} in all"] if files else []
    whole += [f"{SPRITES_TITLE} {drawn['seconds'] / 60:.0f}"] if drawn is not None else []
    return (
        "Each domain is held out, every method trains on the others with the same number of gradients and of draws of "
        "hyperparameters; nothing of the held-out domain is used for selection. Every figure comes from the runs of "
        "the command beside it, which goes on where it was broken off and finds the same figures, bit for bit on one "
        f"machine, except the seconds. Minutes it took: {'. '.join(whole)}."
    )


def _how(entry: Mapping[str, Any]) -> str:
    """Say by what a data set's figures are found again, and where they were found."""
    on = entry["environment"]
    return (
        f"`{entry['command']}` ({on['date']}, torch {on['torch']}, Python {on['python']}, {on['cpu']}, {on['cpus']} "
        f"CPUs, {entry['processes']} runs at a time of one thread each)"
    )


def _agreement_table(found: Mapping[str, Evidence], titles: Mapping[str, str]) -> str:
    rows = [["data set", "ERM, unseen", "cosine at the start", "a fifth in", "at the end", "best of gradient matching"]]
    for name, evidence in found.items():
        first = evidence.rows[0]
        cosines = ["-" if c is None else f"{c:+.2f}" for c in agreement_of(first, (0, 1, -1))]
        best = _best(evidence)
        rows.append([titles[name], f"{first.mean:.3f}", *cosines, f"{best.name} {best.difference}"])
    return table(rows)


def _matching(evidence: Evidence) -> list[EvidenceRow]:
    return [row for row in evidence.rows[1:] if row.name not in CONTROLS]


def _best(evidence: Evidence) -> EvidenceRow:
    return max(_matching(evidence), key=lambda row: -math.inf if row.difference is None else row.difference.mean)


def _in_words(found: Mapping[str, Evidence], titles: Mapping[str, str]) -> str:
    helped = [n for n, e in found.items() if any(r.difference and r.difference.low > 0 for r in _matching(e))]
    here = [n for n, e in found.items() if any(r.difference_here and r.difference_here.low > 0 for r in _matching(e))]
    harmed = [n for n, e in found.items() if any(r.difference and r.difference.high < 0 for r in _matching(e))]

    def listed(names: Sequence[str]) -> str:
        return ", ".join(titles[name] for name in names) or "none"

    pairs = []
    for evidence in found.values():
        (cosine,) = agreement_of(evidence.rows[0], (1,))
        gain = _best(evidence).difference
        if cosine is not None and gain is not None:
            pairs.append((cosine, gain.mean))
    said = [
        (
            f"A method of gradient matching beat ERM beyond the interval for another domain on: {listed(helped)}. "
            f"Beyond the interval for these domains and another seed on: {listed(here)}. At least one was worse than "
            f"ERM beyond the interval for another domain on: {listed(harmed)}."
        ),
        (
            "The best of several methods is chosen here by the very figures that are shown, which flatters it; what "
            "one would have had by deciding for one method beforehand is in its column above."
        ),
    ]
    if len(pairs) > 2:
        said.append(
            f"Over the {len(pairs)} data sets where it was measured, Spearman's rank correlation of ERM's mean cosine "
            f"a fifth into training with what the best method gained is {_rank_correlation(pairs):+.2f}: with so few "
            "data sets that decides nothing, and it is shown so that nobody has to guess it."
        )
    return " ".join(said)


def _on_sprites(drawn: Mapping[str, Any] | None) -> list[str]:
    if drawn is None:
        return []
    results = [sprites.Result(**result) for result in drawn["results"]]
    return [f"On sprites whose colours are drawn so as to mislead ({SPRITES_TITLE}): {sprites.sentence(results)}"]


def _same_steps(found: Mapping[str, Evidence], titles: Mapping[str, str]) -> list[str]:
    rows = [["data set", *SHARES]]
    for name, evidence in found.items():
        differences = same_steps(evidence)
        if differences:
            rows.append([titles[name], *(str(differences.get(method, "")) for method in SHARES)])
    if len(rows) == 1:
        return []
    return [
        "### What the matching itself does: as many steps of the optimizer",
        (
            "With the same number of gradients `IDGM` takes half as many steps as ordinary training, and in short runs "
            f"that alone costs accuracy. Here is each method at its end minus `{REFERENCE}`, the same optimizer on the "
            "mean gradient, after as many steps: at its end for `SmoothFish`, at half of its gradients for `IDGM`, on "
            "the line between two evaluations. Hyperparameters are those selected for the whole budget, and no moment "
            "is selected; intervals are for another domain. What is left beside zero is due to matching and to these "
            "hyperparameters; that `IDGM` needs twice the gradients for it stays true."
        ),
        table(rows),
    ]


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    from scipy.stats import spearmanr

    x, y = zip(*pairs, strict=True)
    return float(spearmanr(x, y).statistic)


def _section(folder: Path, name: str, file: Mapping[str, Any], evidence: Evidence) -> list[str]:
    picture, by_domain = f"{name}.png", f"{name}_agreement.png"
    evidence.plot(folder / picture)
    parts = [f"## {file['title']}", _how(file)]
    parts += [f"Shift: {file['shift']}. Get it: `{file['get']}`. Licence: {file['licence']}."]
    parts += ["\n".join(f"- {note}" for note in file["notes"])]
    alone = file.get("seconds_of_run", {})
    parts += [f"{_sizes(file['sizes'])} {file['chance']}", evidence.setting, _methods_table(evidence, alone)]
    parts += [
        f"{evidence.answer}",
        *_stopped(evidence),
        *file.get("more", []),
        f"![Differences to ERM, accuracy and agreement over training]({picture})",
    ]
    curves = file["evidence"]["rows"][0]["agreement_by_domain"]
    if curves:
        title = f"{file['title']}, {evidence.rows[0].name}: each training domain's gradient with the others'"
        plot_domains(curves, title, folder / by_domain)
        least = min(curves, key=lambda domain: fmean(curves[domain][1]))
        most = max(curves, key=lambda domain: fmean(curves[domain][1]))
        parts += [
            f"![Agreement of each training domain with the others]({by_domain})",
            (
                f"Over training {least} pulls most against the others (mean cosine {fmean(curves[least][1]):+.2f}), "
                f"{most} least ({fmean(curves[most][1]):+.2f})."
            ),
        ]
    return [*parts, "Settings found, median (least to most) over the held-out domains:", _settings_table(evidence)]


def _sizes(sizes: Mapping[str, int]) -> str:
    few = len(sizes) <= 15
    shown = ", ".join(f"{label} {number}" for label, number in sizes.items()) if few else ""
    text = f"{sum(sizes.values())} samples in {len(sizes)} domains of {min(sizes.values())} to {max(sizes.values())}"
    return text + (f": {shown}." if few else ".")


def _methods_table(evidence: Evidence, alone: Mapping[str, float]) -> str:
    first = evidence.rows[0]
    rows = [["method", "unseen", f"over {first.name}, another domain", "another seed", "worst", "oracle", "seconds"]]
    for row in evidence.rows:
        label, score = row.worst
        rows.append(
            [
                row.name,
                f"{row.mean:.3f}",
                "" if row.difference is None else str(row.difference),
                "" if row.difference_here is None else str(row.difference_here),
                f"{score:.3f} ({label})",
                f"{row.oracle_mean:.3f}",
                f"{alone.get(row.name, row.seconds):.2f}",
            ]
        )
    return table(rows)


def _stopped(evidence: Evidence) -> list[str]:
    return [
        f"{row.name}: {number} of the selected runs ended early ({reason}) and count as far as they came."
        for row in evidence.rows
        for reason, number in row.stopped.items()
    ]


def _settings_table(evidence: Evidence) -> str:
    names = list(dict.fromkeys(n for row in evidence.rows for own in row.settings.values() for n in own))
    rows = [["method", *names]]
    for row in evidence.rows:
        cells = []
        for name in names:
            values = [own[name] for own in row.settings.values() if name in own]
            cells.append(_spread(values))
        rows.append([row.name, *cells])
    return table(rows)


def _spread(values: Sequence[Any]) -> str:
    if not values:
        return ""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return ", ".join(sorted({str(value) for value in values}))
    if min(values) == max(values):
        return f"{values[0]:.3g}"
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _sprites_section(folder: Path, file: Mapping[str, Any]) -> list[str]:
    settings, results = file["settings"], [sprites.Result(**result) for result in file["results"]]
    picture = f"{SPRITES}.png"
    sprites.plot(results, folder / picture)
    return [
        f"## {SPRITES_TITLE}",
        _how(file),
        (
            f"{settings['gradients']} gradients of one batch in every run, whatever N and method, and "
            f"{settings['images']} training images in all domains together; {len(settings['seeds'])} seeds, mean and "
            "range. How it was set up, and by what, is said in `benchmarks/domains/sprites.py`."
        ),
        sprites.sentence(results),
        sprites.table(results),
        f"![Accuracy on unseen colours against the number of domains]({picture})",
        "Accuracy on training images, which tells whether there was enough training:",
        sprites.table(results, "train"),
    ]


def _protocol(files: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    lines = [
        (
            "- Hyperparameters are drawn at random with seed 0, the first draw is the defaults; those that are best "
            "on the parts kept of the training domains, mean over domains, then train with all seeds. The moment of "
            "training is selected the same way. *Oracle*: the draw that is best on the held-out domain itself, at the "
            "end of training; nobody has it who does not know that domain."
        ),
        (
            "- *Another domain*: the mean over seeds of each held-out domain is one number, Student's interval over "
            "them; it answers what a user asks. *Another seed*: the mean over domains of each seed, for these very "
            "domains. Both are paired with ERM. No interval is corrected for the number of methods."
        ),
        "- A Hessian-vector product counts as one gradient; it takes longer than one, see the seconds.",
        (
            "- Seconds are of training once with the default settings on one thread, with nothing beside it, without "
            "measuring, median of three; of MNIST means of the selected runs, with others beside them."
        ),
    ]
    lines += [f"- {file['title']}: {file['cut']}" for file in files.values() if file["cut"]]
    lines += [f"- Left out: {name}, {reason}" for name, reason in missing.items()]
    return "\n".join(lines)
