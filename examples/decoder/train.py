"""The training step, and the loop round it that can be stopped and resumed."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .model import Decoder
from .settings import Settings

_END_ID = 0


def shifted(names: Int[Array, "*batch context"]) -> Int[Array, "*batch context"]:
    """What the model reads: an end mark, then the letters before the one to predict."""
    return jnp.roll(names, 1, axis=-1).at[..., 0].set(_END_ID)


def counted(names: Int[Array, "*batch context"]) -> Bool[Array, "*batch context"]:
    """The letters of a name and its one end mark; not the end marks that fill up the row."""
    return (shifted(names) != _END_ID).at[..., 0].set(True)


def letter_losses(model: Callable, names: Int[Array, "batch context"]):
    """Nats for every letter."""
    logits = jax.vmap(model)(shifted(names))
    return optax.softmax_cross_entropy_with_integer_labels(logits, names)


def loss_fn(model: Callable, names: Int[Array, "batch context"]) -> Float[Array, ""]:
    """Nats a letter, end mark included."""
    return jnp.mean(letter_losses(model, names), where=counted(names))


def make_optimiser(settings: Settings) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine decay to a tenth... of the learning rate."""
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


def make_step(settings: Settings) -> Callable:
    """The training step, one jitted function: (model, opt_state, names) -> the same and the loss.

    For a benchmark, with the norms of this library or of equinox:

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
        return eqx.apply_updates(model, updates), opt_state, loss

    return step
