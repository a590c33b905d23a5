"""`python -m examples.decoder --watch`.

Oracles: the same run without it, bit for bit, and the loss of a look taken on its own.
"""

import json

import jax
import numpy as np
import pytest
from draws import seed
from made_up_names import NAMES

from examples.decoder import checkpoint, data, train, watching
from examples.decoder.settings import Settings

pytestmark = pytest.mark.usefixtures("optax_promotes")

SMALL = Settings(width=4, layers=1, heads=2, context=10, steps=6, batch=8, seed=seed())
DATA = data.split(NAMES, SMALL.context)


def test_what_is_kept_of_a_file(tmp_path):
    path = tmp_path / "per-token.eqx"
    file = tmp_path / "per-token.watch.jsonl"
    file.write_text('{"step": 0}\n{"step": 100}\n{"step": 200}\n{"step": 30')
    assert watching.Watching(SMALL, path, 200).file == file
    assert file.read_text() == '{"step": 0}\n{"step": 100}\n'
    watching.Watching(SMALL, path, 0)  # anew
    assert file.read_text() == ""


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_its_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "EVERY", 2)
    path = tmp_path / "per-token.eqx"
    state = checkpoint.State(*train.start(SMALL, len(DATA.vocabulary)), 0, ())
    look = watching.Watching(SMALL, path, 0)
    stopped = train.train(SMALL, DATA, state, path, until=3, look=look)
    steps = lambda: [json.loads(line)["step"] for line in watching.lines(look.file)]
    assert steps() == [0, 2]

    # It went on to step 4, was killed as it wrote, and goes on from its checkpoint.
    with look.file.open("a") as file:
        file.write(look.file.read_text().splitlines()[1].replace('"step": 2', '"step": 4'))
        file.write('\n{"step": 6, "lo')
    assert steps() == [0, 2, 4]
    look = watching.Watching(SMALL, path, stopped.step)
    assert steps() == [0, 2]
    end = train.train(SMALL, DATA, stopped, path, look=look)
    assert steps() == [0, 2, 4]

    looks = watching.history(look.file)
    assert list(looks[0].values) == ["blocks[0].attention", "blocks[0].mlp"]
    names = data.batch_at(DATA, 0, size=8, seed=SMALL.seed)
    # The same operations in another program, on numbers of order one.
    np.testing.assert_allclose(looks[0].loss, train.loss_fn(state.model, names), rtol=1e-5)
    assert look.draw().stat().st_size > 10_000

    plain = train.train(SMALL, DATA, state, tmp_path / "plain.eqx")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(end), strict=True):
        np.testing.assert_array_equal(a, b)
