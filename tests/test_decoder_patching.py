"""`python -m examples.decoder.patching`.

Oracles: the decoder block by block, with what one layer returns exchanged by hand; that heads taken
together are their layer, and that nothing reaches letters before; means by loops.
"""

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from draws import seed
from made_up_names import NAMES

from examples.decoder import data, patching, train
from examples.decoder.settings import Settings

pytestmark = pytest.mark.usefixtures("optax_promotes")

SMALL = Settings(width=8, layers=2, heads=2, context=10, steps=3, batch=8, seed=seed())
DATA = data.split(NAMES, SMALL.context)
PARTS = {(part.block, part.name): part for part in patching.parts_of(SMALL)}
# Some hundred roundings of numbers of order one, which norms of eight entries may magnify.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def decoder():
    return train.start(SMALL, len(DATA.vocabulary))[0]


@pytest.fixture(scope="module")
def names():
    return jnp.asarray(DATA.train[:3])


@pytest.fixture(scope="module")
def other(decoder, names):
    return patching.outputs_of(decoder, names[::-1])


def by_hand(decoder, name, other, exchanged):
    """The nats of a name, with the outputs of layers (block, name) from another one."""

    def layers(letters, of_other):
        x = jax.vmap(decoder.embedding)(letters) + decoder.position
        for number, block in enumerate(decoder.blocks):
            h, mask = block.norm1(x), jnp.tri(len(x), dtype=bool)
            outputs = {"attention": block.attention(h, h, h, mask=mask)}
            for which in ("attention", "MLP"):
                if which == "MLP":
                    outputs[which] = jax.vmap(block.mlp)(block.norm2(x))
                if of_other is not None and (number, which) in exchanged:
                    outputs[which] = of_other[number, which]
                kept[number, which] = outputs[which]
                x = x + outputs[which]
        return jax.vmap(decoder.readout)(decoder.norm(x))

    kept = {}
    layers(data.shifted(other), None)
    of_other, kept = dict(kept), {}
    scores = layers(data.shifted(name), of_other)
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), name[:, None], -1)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("which", [(0, "attention"), (1, "MLP")])
def test_by_hand(which, decoder, names, other):
    found = patching.patched_nats(decoder, names, other, PARTS[which].masks(other))
    expected = [by_hand(decoder, *pair, {which}) for pair in zip(names, names[::-1], strict=True)]
    np.testing.assert_allclose(found, np.stack(expected), **TOLERANCE)


@pytest.mark.slow
def test_all_heads_are_the_attention(decoder, names, other):
    heads = [PARTS[1, f"head {head + 1}"].masks(other) for head in range(SMALL.heads)]
    assert not any((heads[0][key] & heads[1][key]).any() for key in other)
    together = jax.tree.map(np.logical_or, *heads)
    found, one, layer = (
        patching.patched_nats(decoder, names, other, masks)
        for masks in (together, heads[0], PARTS[1, "attention"].masks(other))
    )
    np.testing.assert_allclose(found, layer, **TOLERANCE)
    assert np.abs(one - layer).max() > 1e-3


@pytest.mark.slow
def test_one_token_reaches_no_letter_before(decoder, names, other):
    nothing = {key: np.zeros(value.shape[1:], bool) for key, value in other.items()}
    clean = patching.patched_nats(decoder, names, other, nothing)
    for which, last in (((0, "attention"), None), ((1, "MLP"), 5)):
        masks = PARTS[which].masks(other, 4)
        change = np.abs(patching.patched_nats(decoder, names, other, masks) - clean).max(0)
        assert change[4] > 1e-3 and (change[:4] == 0).all()
        if last:  # nothing goes on from the last layer to later letters
            assert (change[last:] == 0).all()
        else:
            assert change[5:].max() > 1e-4


def test_means_by_distance():
    rng = np.random.default_rng(seed(0))
    change, there = rng.normal(size=(4, 3, 4)), rng.random((3, 4)) < 0.7
    there[0] = True  # some letter at every distance
    for distance, found in enumerate(patching.means_by_distance(change, there)):
        pairs = [(taken, taken + distance) for taken in range(4 - distance)]
        expected = [change[t, n, at] for t, at in pairs for n in range(3) if there[n, at]]
        np.testing.assert_allclose(found, np.mean(expected), atol=1e-12)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    names = [*NAMES, *(name + "a" for name in NAMES)]  # more than a batch
    (tmp_path / "names.txt").write_text("\n".join(names))
    files = {"checkpoint": tmp_path / "decoder.eqx", "out": tmp_path / "patching.png"}
    argv = ["--quick", "--steps", "3", "--data", str(tmp_path / "names.txt")]
    argv += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert patching.main(argv) == 0
    assert files["checkpoint"].exists()
    out = capsys.readouterr().out
    assert "| head 1 | head 2 | attention | MLP |" in out and "| block 1 |" in out
    assert matplotlib.image.imread(files["out"]).std() > 0.05
    assert patching.main(argv) == 0  # from the checkpoint
    assert capsys.readouterr().out.endswith(out[out.index("| nats") :])
