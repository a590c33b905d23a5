"""The training step, and the loop round it that can be stopped and resumed."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from eqx_norms.causality import CausalityReport, assert_causal, check_causal

from .checkpoint import State, save
from .data import AnyArray, Data, batch_at, counted, shifted
from .mesh import on_one_device, place, place_batch
from .model import LEAKING, Decoder
from .settings import Settings

LOOKS = 25  # at the held-out loss in a run, each with a checkpoint

# ---- The loss: nats a letter, where the end mark of a name is one of its letters.


def name_loss(
    model: Callable, name: Int[Array, " context"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The nats of all letters of a name, and how many letters that are."""
    nats = optax.softmax_cross_entropy_with_integer_labels(model(shifted(name)), name)
    return jnp.sum(nats, where=counted(name)), jnp.sum(counted(name), dtype=nats.dtype)


def loss_fn(model: Callable, names: Int[Array, "batch context"]) -> Float[Array, ""]:
    nats, letters = jax.vmap(lambda name: name_loss(model, name))(names)
    return nats.sum() / letters.sum()


@eqx.filter_jit
def evaluate(model: Callable, names: Int[AnyArray, "names context"]) -> Float[Array, ""]:
    """`loss_fn` of any number of names, some at a time."""
    nats, letters = jax.lax.map(lambda name: name_loss(model, name), names, batch_size=128)
    return nats.sum() / letters.sum()


# ---- The step.


def make_optimiser(settings: Settings) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.rate,
        warmup_steps=round(settings.warm_up * settings.steps),
        decay_steps=settings.steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay),
    )


def start(settings: Settings, symbols: int) -> tuple[Decoder, PyTree]:
    """The model and the optimiser's state before the first step."""
    model = Decoder(settings, symbols, key=jr.key(settings.seed))
    return model, make_optimiser(settings).init(eqx.filter(model, eqx.is_array))


def make_step(settings: Settings, mesh: Mesh | None = None) -> Any:
    """The training step, one jitted function: (model, opt_state, names) -> the same and the loss.

    It can be lowered too, which no type says. A benchmark exchanges the norms by one argument:

        settings = Settings(norms="ours")  # or "eqx"
        model, opt_state = start(settings, symbols=27)
        step = make_step(settings)
        model, opt_state, loss = step(model, opt_state, names)  # names: int32, (batch, context)
    """
    optimiser = make_optimiser(settings)

    @eqx.filter_jit
    def step(model: Decoder, opt_state: PyTree, names: Int[Array, "batch context"]):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, names)
        params = eqx.filter(model, eqx.is_array)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return *place((eqx.apply_updates(model, updates), opt_state), mesh), loss

    return step


# ---- The check.


def check(settings: Settings, model: Decoder, data: Data) -> CausalityReport:
    """Does the model read letters that it should predict? With the `LEAKING` norms alone it may.

    Raises `eqx_norms.causality.CausalityError` if it does.
    """
    letters = shifted(jnp.asarray(data.train[0]))
    ids = (0, len(data.vocabulary) - 1)  # edits are to draw from the whole alphabet
    if settings.norm in LEAKING:
        return check_causal(model, letters, token_values=ids)
    message = f"The {settings.norm} model is not trained:"
    return assert_causal(model, letters, token_values=ids, prove=True, err_msg=message)


# ---- The loop.


def train(
    settings: Settings,
    data: Data,
    state: State,
    path: Path,
    *,
    until: int | None = None,
    mesh: Mesh | None = None,
    look: Callable[[State, Int[np.ndarray, "batch context"]], None] = lambda *_: None,
) -> State:
    """Goes on from `state` to the last step, or to step `until`, with checkpoints at `path`.

    These have whole arrays, whatever the mesh. Ctrl-C ends it after the step that is under way;
    then the state's step says how far it came. Before each step `look` sees the state and the
    names.
    """
    last = settings.steps if until is None else until
    looks = {round(settings.steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    names = lambda step: batch_at(data, step, size=settings.batch, seed=settings.seed)
    batch = lambda step: place_batch(names(step), mesh)
    if state.step >= last:
        return state
    with first_ctrl_c() as stop, progress(settings, state) as bar:
        bar.set_postfix_str("compiling")
        state = place(state, mesh)
        step = make_step(settings, mesh).lower(*state[:2], batch(0)).compile()
        memory = step.compiled.memory_analysis().temp_size_in_bytes
        each = "" if mesh is None else ", on each device"
        bar.write(f"  memory    {memory / 2**20:.1f} MiB of temporaries in a training step{each}")
        if not state.history:
            state = looked(state, data, mesh)
        bar.unpause()  # its clock, so that compiling counts for no step
        while state.step < last and not stop.is_set():
            look(state, names(state.step))
            model, opt_state, loss = step(state.model, state.opt_state, batch(state.step))
            state = State(model, opt_state, state.step + 1, state.history)
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            bar.update()
            if state.step in looks:
                state = looked(state, data, mesh)
                save(path, state, settings, data)
    save(path, state, settings, data)
    return on_one_device(state, mesh)


def looked(state: State, data: Data, mesh: Mesh | None = None) -> State:
    """With the held-out loss in its history."""
    loss = float(evaluate(on_one_device(state.model, mesh), data.held_out))
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the held-out loss is {loss} at step {state.step}; give a lower --rate"
        )
    return state._replace(history=(*state.history, (state.step, loss)))


def progress(settings: Settings, state: State) -> tqdm:
    return tqdm(
        initial=state.step, total=settings.steps, desc=settings.norm, unit="step", disable=None
    )


@contextlib.contextmanager
def first_ctrl_c() -> Iterator[threading.Event]:
    """Sets an event where Ctrl-C would break off a step; pressed again it does."""
    pressed = threading.Event()

    def note(*_):
        pressed.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
