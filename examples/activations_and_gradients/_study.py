"""What a study gets and gives, and how its claims are judged."""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..arguments import folder_path
from ..names_data import read_names
from ._common import Architecture, Pairs, Runs, letter_pairs, train
from ._plots import plt


class Settings(NamedTuple):
    pairs: Pairs
    names: int
    seeds: int
    quick: bool
    out: Path
    say: Callable[[str], Any] = lambda _: None

    def train(
        self, architecture: Architecture, configs, *, steps: int, looks: int = 50, **kwargs
    ) -> Runs:
        """Trains, or with `quick` only tries to."""
        if self.quick:
            architecture = architecture._replace(num_linear=min(architecture.num_linear, 2))
            steps, looks = steps // 20, min(looks, 5)
        activation = getattr(architecture.activation, "__name__", "")
        self.say(f"{architecture.norm} {activation}")
        return train(
            architecture,
            self.pairs,
            configs,
            steps=steps,
            seeds=self.seeds,
            every=steps // looks,
            **kwargs,
        )

    def save(self, figure, name: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.out / f"{name}.png")
        plt.close(figure)


class Claim(NamedTuple):
    study: str
    text: str
    notebook: str
    ours: str
    holds: str


class Result(NamedTuple):
    numbers: dict[str, Any]
    claims: list[Claim]


# ---- Judging


class Difference(NamedTuple):
    mean: float
    error: float
    left_out: int  # seeds at which one of the two is not finite

    def __str__(self) -> str:
        text = f"{self.mean:+.3f} ± {self.error:.3f}"
        return text + (f", {self.left_out} diverged" if self.left_out else "")


def paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Difference:
    """The mean of a - b over seeds, and its standard error.

    Both have the same initial weights and batches at a seed, which takes most of the noise out.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    finite = difference[np.isfinite(difference)]
    count = len(finite)
    mean = finite.mean() if count else np.nan
    error = finite.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    return Difference(float(mean), float(error), len(difference) - count)


def verdict(difference: Difference) -> str:
    """Whether it is negative, by two standard errors."""
    mean, error, _ = difference
    if not np.isfinite(error):
        return "one seed"
    if abs(mean) < 2 * error:
        return "no: a tie"
    return "yes" if mean < 0 else "no: opposite"


def less(study: str, text: str, notebook: str, a, b) -> Claim:
    """The claim that a is less than b, judged by the paired differences."""
    difference = paired(a, b)
    ours = f"{difference} ({spread(a)}; {spread(b)})"
    return Claim(study, text, notebook, ours, verdict(difference))


def fact(study: str, text: str, notebook: str, ours: str, holds: bool) -> Claim:
    return Claim(study, text, notebook, ours, "yes" if holds else "no")


def spread(values) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def summary(values) -> dict[str, Any]:
    """For results.json: mean and spread over seeds, and every seed."""
    values = np.asarray(values, np.float64)
    return {"mean": values.mean(), "spread": values.std(), "seeds": values}


def second_half(looks: np.ndarray) -> np.ndarray:
    """Of (seeds, looks, ...), what was seen once the first half of the training was over."""
    return looks[:, looks.shape[1] // 2 :]


def table(claims: Sequence[Claim]) -> str:
    rows = [("", "claim", "notebook", "ours", "holds"), *claims]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(r, widths, strict=True)) for r in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---- Running

STUDIES = (
    "d_data",
    "i_initialisation",
    "e1_e2_e4_e5_inside",
    "e3_gain",
    "l_g_layer_norm_by_hand",
    "e6_update_ratios",
    "e7_activations",
    "b_s_bias_and_directions",
    "e8_batch_norm",
    "e9_skips",
)


def plain(value):
    """Numbers as JSON has them; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def run(studies: Sequence[str], argv: Sequence[str] | None = None, doc: str | None = None) -> None:
    """The command line of one study or of all."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="names, or CSV")
    parser.add_argument(
        "--spanish", action="store_true", help="clean the names as Spanish surnames"
    )
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="2 seeds, few steps, shallow")
    parser.add_argument("--out", type=folder_path, default="activations_and_gradients")
    args = parser.parse_args(argv)
    try:
        from tqdm import tqdm

        if args.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {args.seeds}")
        names = read_names(args.data, spanish=args.spanish)
        args.out.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        missing = f'{error}: pip install "eqx-norms[examples]"'
        parser.error(missing if error.name == "tqdm" else str(error))
    except (ValueError, OSError) as error:
        parser.error(str(error))

    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in studies}
    seeds = min(args.seeds, 2) if args.quick else args.seeds
    settings = Settings(letter_pairs(names), len(names), seeds, args.quick, args.out)
    start, seconds = time.perf_counter(), {}
    numbers, claims = {}, []
    with tqdm(modules.items(), unit="study", disable=None) as bar:
        for name, module in bar:
            begun = time.perf_counter()
            bar.set_description(name)
            result = module.study(settings._replace(say=bar.set_postfix_str))
            numbers[name] = result.numbers
            claims += result.claims
            seconds[name] = time.perf_counter() - begun

    results = {
        "settings": {
            "data": [Path(path).name for path in args.data] or "census surnames",
            "names": settings.names,
            "pairs": len(settings.pairs.letters),
            "symbols": len(settings.pairs.vocabulary),
            "seeds": seeds,
            "quick": args.quick,
            "jax": jax.__version__,
        },
        "seconds": seconds,
        "studies": numbers,
        "claims": [claim._asdict() for claim in claims],
    }
    path = args.out / "results.json"
    path.write_text(json.dumps(plain(results), indent=1) + os.linesep)
    print(table(claims))
    print(f"\n{path} and figures, {time.perf_counter() - start:.0f} s", file=sys.stderr)
