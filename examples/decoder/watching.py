"""`--watch`: what goes on inside while it trains, a line of JSON for each look, and a figure.

What was seen is in the file at once, however the run ends.
"""

import json
from collections import OrderedDict
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Int
from matplotlib import pyplot as plt

from eqx_norms.diagnostics import Look, Watch

from .checkpoint import State
from .mesh import Mesh, on_one_device
from .settings import Settings
from .train import loss_fn, make_optimiser

EVERY = 100  # steps


class Watching:
    """Called before each step, it looks inside the model before every hundredth."""

    def __init__(self, settings: Settings, path: Path, step: int, mesh: Mesh | None = None):
        """Of the run with its checkpoint at `path`, which goes on from `step`."""
        self.mesh = mesh
        self.file, self.figure = path.with_suffix(".watch.jsonl"), path.with_suffix(".watch.png")
        self.watch = Watch(
            loss_fn,
            where=(eqx.nn.MultiheadAttention, eqx.nn.MLP),
            optimiser=make_optimiser(settings),
        )
        kept = [line for line in lines(self.file) if json.loads(line)["step"] < step]
        self.file.write_text("".join(kept))

    def __call__(self, state: State, names: Int[np.ndarray, "batch context"]) -> None:
        if state.step % EVERY:
            return
        model, opt_state = on_one_device((state.model, state.opt_state), self.mesh)
        look = jax.device_get(self.watch.measure(model, names, opt_state=opt_state))
        plain = Look(look.loss, *({**statistics} for statistics in look[1:]))
        entry = {"step": state.step, **jax.tree.map(np.ndarray.tolist, plain)._asdict()}
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def draw(self) -> Path:
        self.watch.plot(history(self.file), every=EVERY).savefig(self.figure, dpi=150)
        plt.close("all")
        return self.figure


def lines(path: Path) -> list[str]:
    """But for one that was broken off."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def history(path: Path) -> list[Look]:
    """The looks in a file, of the first steps on."""
    looks = []
    for line in lines(path):
        entry = json.loads(line, object_pairs_hook=OrderedDict)
        del entry["step"]
        is_leaf = lambda x: isinstance(x, list)
        looks.append(jax.tree.map(np.asarray, Look(**entry), is_leaf=is_leaf))
    return looks
