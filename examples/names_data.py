"""Names as text for small models: census surnames, or your own lines and CSV files."""

import csv
import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

END = "."  # ends every name; no name contains it
_HEADERS = {"name", "names", "surname", "surnames", "lastname", "last name", "last_name"}


def read_names(
    paths: str | os.PathLike | Sequence[str | os.PathLike] = (), *, spanish: bool = False
) -> list[str]:
    """The names of all `paths`, one file after the other; without any, census surnames.

    A `.csv` or `.tsv` file has a header; its column called name, names, surname or the like is
    read, or else the first. Any other file has one name a line. All are UTF-8.

    Names come back in lower case, with "_" for spaces. Empty ones (the missing values of a CSV;
    "Nan" and "Null" are people's names) and those shorter than two letters are dropped, repeated
    ones kept. With `spanish`, "de la" becomes "dela", and names with an apostrophe or a "ç",
    which are foreign there, are dropped too.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        return _cleaned(_census(), spanish)
    names = []
    for path in map(Path, paths):
        found = _cleaned(_read(path), spanish)
        if not found:
            raise ValueError(
                f"{path} has no names: give one name of two letters or more a line, or a .csv "
                "file with a header and a column of names"
            )
        names += found
    return names


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The symbols of a text; a symbol's id is its place. The end mark comes first."""

    symbols: str

    @classmethod
    def of(cls, names: Iterable[str]) -> "Vocabulary":
        """The end mark and every letter in `names`."""
        return cls(END + "".join(sorted(set().union(*names))))

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Int[np.ndarray, " letters"]:
        ids = [self.symbols.find(letter) for letter in text]
        if -1 in ids:
            raise ValueError(f"{text[ids.index(-1)]!r} is not one of the symbols {self.symbols!r}")
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i] for i in ids)


def lines(names: Iterable[str], length: int) -> Iterator[str]:
    """Cuts text into lines of `length` symbols. Each begins with a name; its last is cut."""
    line = ""
    for name in names:
        line += name + END
        if len(line) >= length:
            yield line[:length]
            line = ""


def batches(
    names: Sequence[str],
    vocabulary: Vocabulary,
    *,
    size: int,
    length: int,
    seed: int | None = None,
) -> Iterator[Int[np.ndarray, "size length"]]:
    """Batches of `size` lines, once through the names; in random order if there is a `seed`."""
    if seed is not None:
        names = np.random.default_rng(seed).permutation(names).tolist()
    rows = []
    for line in lines(names, length):
        rows.append(vocabulary.encode(line))
        if len(rows) == size:
            yield np.stack(rows)
            rows = []


def _cleaned(names: Iterable[str], spanish: bool) -> list[str]:
    cleaned = []
    for name in names:
        # NFC: "ñ" is one letter, however the file spells it.
        name = unicodedata.normalize("NFC", name).lower().replace(END, "")
        if spanish:
            name = name.replace("de la", "dela")
        name = "_".join(name.split())
        if len(name) >= 2 and not (spanish and set(name) & set("'ç")):
            cleaned.append(name)
    return cleaned


def _read(path: Path) -> list[str]:
    try:
        # -sig: spreadsheets begin UTF-8 files with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _column(file) if path.suffix.lower() in (".csv", ".tsv") else file.readlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; convert it first") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None


def _column(file: Iterable[str]) -> list[str]:
    file = iter(file)
    first = next(file, "")
    delimiter = max(",;\t", key=first.count)
    header = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=delimiter), [])]
    column = next((i for i, cell in enumerate(header) if cell in _HEADERS), 0)
    rows = csv.reader(file, delimiter=delimiter)
    return [row[column] for row in rows if len(row) > column]


def _census() -> list[str]:
    try:
        import names
    except ImportError:
        raise ImportError(
            'the census surnames are in the package "names": pip install "eqx-norms[examples]"; '
            "or give a file of your own with --data"
        ) from None
    # Four columns: the name, its frequency, the sum of frequencies so far, the rank.
    with open(names.FILES["last"], encoding="utf-8") as file:
        return [line.split()[0] for line in file if line.strip()]
