"""Runs of a benchmark in a page of the documentation, beside one another."""

import json
import re
from collections.abc import Callable
from pathlib import Path


def dumps(results: dict) -> str:
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def keep(files: list[Path], folder: Path, name: Callable[[dict], str], plot: Callable) -> None:
    """Puts runs and their figures into `folder`, each in the place of one of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for results in [json.loads(path.read_text()) for path in files]:
        stem = re.sub(r"\W+", "_", name(results))
        (folder / f"{stem}.json").write_text(dumps(results))
        plot(results, folder / f"{stem}.png")


def fill(
    page: str,
    marks: tuple[str, str],
    folder: Path,
    docs: Path,
    caption: Callable[[dict], str],
    report: Callable[..., str],
) -> str:
    """The page with what stands between its two marks written anew, from the runs in `folder`."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    figures = [
        f"![{caption(results)}]({folder.relative_to(docs)}/{stem}.png)"
        for stem, results in runs.items()
    ]
    begin, end = marks
    before, rest = page.split(begin)
    body = "\n\n".join([*figures, report(*runs.values())])
    return f"{before}{begin}\n\n{body}\n{end}{rest.split(end)[1]}"
