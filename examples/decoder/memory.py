"""The memory of a training step, as the compiler reports it: `python -m examples.decoder --memory`.

Nothing is trained.
"""

import dataclasses

import jax.numpy as jnp
from tqdm import tqdm

from .settings import Settings
from .train import make_step, start

SYMBOLS = 27  # the letters and the end mark
WAYS = {
    "float32": {},
    "`--bf16`": {"bf16": True},
    "`--remat`": {"remat": True},
    "`--bf16 --remat`": {"bf16": True, "remat": True},
}
LAYERS = {"ours": "ours", "eqx.nn": "eqx"}


def temporaries(settings: Settings) -> int:
    """Bytes beside parameters, optimiser state and batch."""
    names = jnp.zeros((settings.batch, settings.context), jnp.int32)
    step = make_step(settings).lower(*start(settings, SYMBOLS), names).compile()
    return step.compiled.memory_analysis().temp_size_in_bytes


def memory_table(settings: Settings) -> str:
    """Markdown, in MiB: how activations are kept, and whose norms."""
    cells = {}
    with tqdm(total=len(WAYS) * len(LAYERS), unit="step compiled", disable=None) as bar:
        for way, options in WAYS.items():
            for layers, norms in LAYERS.items():
                chosen = dataclasses.replace(settings, **options, norms=norms)
                cells[way, layers] = temporaries(chosen) / 2**20
                bar.update()
    lines = [f"| MiB of temporaries | {' | '.join(LAYERS)} |", "|---|" + "---:|" * len(LAYERS)]
    for way in WAYS:
        row = " | ".join(f"{cells[way, layers]:.1f}" for layers in LAYERS)
        lines.append(f"| {way} | {row} |")
    return "\n".join(lines)
