"""What a trained decoder is worth: a table, and names to read."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Int

from eqx_norms.causality import CausalityReport

from .data import Data, as_text
from .sample import FutureHidden, sample
from .train import evaluate

SAMPLES = 1000


class Outcome(NamedTuple):
    """Losses are nats a letter, where the end mark is a letter."""

    norm: str  # or "bigram"
    verdict: CausalityReport | None
    history: Sequence[tuple[int, float]]
    loss: float  # of the held-out names
    blind: float  # the same, where the letters that are yet to come are hidden
    samples: Int[np.ndarray, "names context"]
    judged: float  # the loss of the samples under the model with the per-token norm


def outcome(
    name: str,
    model: Callable,
    data: Data,
    *,
    seed: int,
    judge: Callable | None = None,
    verdict: CausalityReport | None = None,
    history: Sequence[tuple[int, float]] = (),
    write: Callable = sample,
) -> Outcome:
    context = data.train.shape[1]
    key = jr.fold_in(jr.key(seed), 1)  # the model's parameters are of the key itself
    samples = np.asarray(write(model, key, count=SAMPLES, context=context))
    return Outcome(
        norm=name,
        verdict=verdict,
        history=history,
        loss=float(evaluate(model, data.held_out)),
        blind=float(evaluate(FutureHidden(model), data.held_out)),
        samples=samples,
        judged=float(evaluate(judge, samples)) if judge is not None else np.nan,
    )


def legend(outcomes: Sequence[Outcome]) -> str:
    judged = "the loss of what it wrote, under the model with the per-token norm"
    if not any(np.isfinite(one.judged) for one in outcomes):
        judged = "wants the model with the per-token norm beside it: --norm all"
    return f"""\
reads the future?    as `check_causal` finds before training
loss                 of the held-out names: nats a letter, where an end mark is a letter
loss, future hidden  the same, where letters that are yet to come are hidden from the model
held out, trained    the share of {SAMPLES:,} names it wrote that are in these lists
judged               {judged}"""


def verdict(report: CausalityReport | None) -> str:
    if report is None:
        return ""
    return f"YES, {len(report.pairs())} pairs" if report.leak else "no"


def share(samples: Int[np.ndarray, "names context"], names: Int[np.ndarray, "names context"]):
    """Of the samples that are among the names."""
    known = {name.tobytes() for name in names}
    return np.mean([name.tobytes() in known for name in samples])


def table(outcomes: Sequence[Outcome], data: Data) -> str:
    heads = (
        "norm",
        "reads the future?",
        "loss",
        "loss, future hidden",
        "held out",
        "trained",
        "judged",
    )
    rows: list[tuple[str, ...]] = [heads]
    for one in outcomes:
        row = (
            one.norm,
            verdict(one.verdict),
            f"{one.loss:.4f}",
            f"{one.blind:.4f}",
            f"{share(one.samples, data.held_out):.1%}",
            f"{share(one.samples, data.train):.1%}",
            f"{one.judged:.4f}" if np.isfinite(one.judged) else "-",
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if place < 2 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def some_names(one: Outcome, data: Data, count: int = 12) -> list[str]:
    """The first that were written; an empty one by its lack."""
    return [name or "(nothing)" for name in as_text(one.samples[:count], data.vocabulary)]
