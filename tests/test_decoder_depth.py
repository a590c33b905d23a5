"""`python -m examples.decoder.depth` and `python -m examples.decoder --memory`.

Oracles: the residual stream by a loop over the blocks, its gradient by a zero that is added there.
"""

import contextlib
import dataclasses
import io
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from draws import seed
from made_up_names import NAMES

from eqx_norms import is_norm
from examples.decoder import __main__ as cli, data, depth, memory, train
from examples.decoder.settings import Settings

pytestmark = pytest.mark.usefixtures("optax_promotes")

# More than ten: "blocks[10]" sorts before "blocks[2]".
DEEP = Settings(width=4, layers=11, heads=2, context=10, steps=3, batch=8, seed=seed())
DATA = data.split(NAMES, DEEP.context)


@pytest.mark.slow
def test_spread_by_a_loop():
    decoder, _ = train.start(DEEP, len(DATA.vocabulary))
    names = jnp.asarray(DATA.train[:8])

    def loss_and_streams(shifts):
        def one(letters, shifts):
            x = jax.vmap(decoder.embedding)(letters) + decoder.position
            streams = []
            for block, shift in zip(decoder.blocks, shifts, strict=True):
                streams.append(x := block(x) + shift)
            return jax.vmap(decoder.readout)(decoder.norm(x)), jnp.stack(streams)

        scores, streams = jax.vmap(one)(data.shifted(names), shifts)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(scores), names[..., None], -1)[..., 0]
        counted = data.counted(names)
        return jnp.sum(nats, where=counted) / counted.sum(), streams

    shifts = jnp.zeros((8, DEEP.layers, DEEP.context, DEEP.width))
    gradient = jax.jit(jax.grad(loss_and_streams, has_aux=True))
    grads, streams = gradient(shifts)
    found = depth.spread(decoder, names)
    by_block = lambda a: np.sqrt(np.mean(np.square(np.float64(a)), (0, 2, 3)))
    # Norms of four entries, one after the other, magnify rounding.
    np.testing.assert_allclose(found.stream, by_block(streams), rtol=1e-3)
    np.testing.assert_allclose(found.gradient, by_block(grads), rtol=1e-3)
    assert len(set(np.asarray(found.stream).tolist())) == DEEP.layers


@pytest.mark.slow
def test_without_norms_only_the_norms_go():
    decoder, _ = train.start(DEEP, 9)
    bare = depth.without_norms(decoder)
    blocks = zip(decoder.blocks, bare.blocks, strict=True)
    is_identity = lambda norm: isinstance(norm.layer, eqx.nn.Identity)
    assert is_identity(bare.norm)
    for block, other in blocks:
        assert is_identity(other.norm1) and is_identity(other.norm2)
        assert not is_identity(block.norm1)
        assert eqx.tree_equal((block.attention, block.mlp), (other.attention, other.mlp))
    assert not any(map(is_norm, jax.tree.leaves(bare, is_leaf=is_norm)))


def printed_by(main, command):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(command.split()) == 0
    return out.getvalue()


@pytest.mark.slow
def test_command(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    path = tmp_path / "new" / "depth.png"
    size = "--layers 3 --width 8 --batch 8 --steps 5"
    printed = printed_by(depth.main, f"--data {names} --out {path} {size}")
    assert f"figure {path.resolve()}" in printed
    found = re.findall(
        r"^\| (\S+), (with norms|without), (\w+) training \| (\S+) \|", printed, re.M
    )
    assert len(found) == 2 * 2 * 2 and all(float(value) > 0 for *_, value in found)
    for name in depth.COLOURS:
        loss = re.search(rf"^{name}: held-out loss (\S+) after 5 steps", printed, re.M)
        assert 0 < float(loss[1]) < 2 * math.log(14)
    assert path.exists()


def test_figure(tmp_path):
    found = depth.Spread(jnp.array([1.0, 2, 3]), jnp.array([0.1, 0.2, 0.1]))
    results = {name: depth.Trained(found, found, [3.0, 2.0], 2.0) for name in depth.COLOURS}
    lower = depth.Spread(found.stream / 2, found.gradient / 2)
    results["without"] = depth.Trained(lower, lower, [3.0, 4.0], 4.0)
    depth.draw(results, tmp_path / "new" / "depth.png")
    image = matplotlib.image.imread(tmp_path / "new" / "depth.png")[..., :3]
    for colour in depth.COLOURS.values():  # a curve in every third
        there = np.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.1
        assert all(third.sum() > 100 for third in np.array_split(there, 3, axis=1))


def test_says_what_diverged():
    losses = [2.0, 3.0, math.nan]
    one = depth.Trained(
        depth.Spread([1.0, 2.0], [3.0, 4.0]), depth.Spread([5.0, 6.0], [7.0, 8.0]), losses, 9
    )
    printed = depth.report({"without": one})
    assert "| gradient, without, after training | 7 | 8 |" in printed
    assert printed.endswith("without: DIVERGED, a loss of nan at step 3")


@pytest.mark.slow
def test_training_ends_with_the_first_loss_that_is_not_finite():
    small = dataclasses.replace(DEEP, layers=1)
    decoder, _ = train.start(small, len(DATA.vocabulary))
    broken = eqx.tree_at(lambda m: m.position, decoder, jnp.full((10, 4), jnp.inf))
    one = depth.trained("broken", small, DATA, broken)
    assert len(one.losses) == 1 and np.isnan(one.losses[0])


# ---- --memory


def test_memory_table(monkeypatch):
    def fake(settings):
        return 2**20 * (
            1 + 2 * settings.bf16 + 4 * settings.remat + 0.5 * (settings.norms == "eqx")
        )

    monkeypatch.setattr(memory, "temporaries", fake)
    assert printed_by(cli.main, "--memory").splitlines() == [
        "| MiB of temporaries | ours | eqx.nn |",
        "|---|---:|---:|",
        "| float32 | 1.0 | 1.5 |",
        "| `--bf16` | 3.0 | 3.5 |",
        "| `--remat` | 5.0 | 5.5 |",
        "| `--bf16 --remat` | 7.0 | 7.5 |",
    ]


@pytest.mark.slow
def test_ours_take_less():
    bytes_of = lambda **options: memory.temporaries(Settings(**options))
    assert bytes_of() < bytes_of(norms="eqx")
    assert bytes_of(bf16=True) < bytes_of(norms="eqx", bf16=True)
