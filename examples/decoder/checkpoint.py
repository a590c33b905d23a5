"""Checkpoints: a line of JSON that says what they are of, then the arrays."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import PyTree

from .data import Data
from .model import Decoder
from .settings import Settings


class State(NamedTuple):
    """All that training goes on from: batches and learning rate follow from the step."""

    model: Decoder
    opt_state: PyTree
    step: int
    history: tuple[tuple[int, float], ...]  # steps, and held-out losses there


def save(path: Path, state: State, settings: Settings, data: Data) -> None:
    header = {
        "settings": dataclasses.asdict(settings),
        "names": data.fingerprint(),
        "step": state.step,
        "history": state.history,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that no moment has half a checkpoint in the place of a whole.
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        eqx.tree_serialise_leaves(file, (state.model, state.opt_state))
    aside.replace(path)


def load(path: Path, like: State, settings: Settings, data: Data) -> State:
    """The state saved at `path`, if it is of a run with the same settings and names.

    `like` is the state of such a run before its first step.

    Raises `ValueError` that says what to type instead.
    """
    anew = "leave out --resume to start anew"
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot resume from {path}: {error.strerror}; {anew}") from None
    with file:
        try:
            header = json.loads(file.readline())
            saved, names = header["settings"], header["names"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is no checkpoint of this example; {anew}") from None
        _require_same(path, saved, settings)
        if names != data.fingerprint():
            raise ValueError(
                f"{path} was trained on other names; give the same --data and --spanish, "
                f"another --out, or {anew}"
            )
        try:
            model, opt_state = eqx.tree_deserialise_leaves(file, (like.model, like.opt_state))
        except Exception as error:  # NumPy and Equinox have many for a file that ends too early
            raise ValueError(f"{path} is damaged ({error}); {anew}") from None
    history = tuple((step, loss) for step, loss in header["history"])
    return State(model, opt_state, header["step"], history)


def _require_same(path: Path, saved: dict[str, Any], settings: Settings) -> None:
    now = dataclasses.asdict(settings)
    differ = [name for name in now if saved.get(name) != now[name]]
    if differ:
        then = ", ".join(f"{name} {saved.get(name)}" for name in differ)
        here = ", ".join(f"{name} {now[name]}" for name in differ)
        raise ValueError(
            f"{path} is of a run with {then}, and this one has {here}; resume with the settings "
            "it was begun with, give another --out, or leave out --resume to start anew"
        )
