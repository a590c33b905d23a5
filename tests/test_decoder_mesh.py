"""The decoder of examples/decoder on many devices: `--mesh`.

Oracles: the training on one device, and the operations of the compiled programs, counted.
"""

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from draws import seed

from examples.decoder import __main__ as cli, checkpoint, data, mesh as meshes, model, train
from examples.decoder.settings import Settings

pytestmark = pytest.mark.usefixtures("optax_promotes")

ROOT = Path(__file__).parent.parent
SMALL = Settings(
    width=16, layers=2, heads=2, context=10, steps=50, batch=16, rate=0.01, seed=seed()
)
NAMES = [a + b + c for a in ("an", "ber", "ca") for b in ("de", "il", "o") for c in "klmnr"]
DATA = data.split(NAMES, SMALL.context)
SYMBOLS = len(DATA.vocabulary)  # 13: what is split over two devices leaves them whole


assert len(jax.devices()) == 8  # from here on, whatever a test asks for


def batch_at(step):
    return data.batch_at(DATA, step, size=SMALL.batch, seed=seed())


def compiled_step(mesh):
    state = meshes.place(train.start(SMALL, SYMBOLS), mesh)
    names = meshes.place_batch(batch_at(0), mesh)
    return state, train.make_step(SMALL, mesh).lower(*state, names).compile()


@pytest.fixture(scope="module")
def runs():
    """Of one device, 8, and 4 x 2: the losses of 50 steps, and the parameters after them."""
    found = {}
    with jax.numpy_dtype_promotion("standard"):
        for sizes in ("1", "8", "4x2"):
            mesh = None if sizes == "1" else meshes.make_mesh(sizes)
            (decoder, opt_state), step = compiled_step(mesh)
            losses = []
            for number in range(SMALL.steps):
                names = meshes.place_batch(batch_at(number), mesh)
                decoder, opt_state, loss = step(decoder, opt_state, names)
                losses.append(float(loss))
            found[sizes] = np.array(losses), decoder
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ("8", "4x2"))
def test_losses_agree_with_one_device(runs, sizes):
    alone, many = runs["1"][0], runs[sizes][0]
    assert alone[0] - alone[-1] > 0.5
    assert len(alone) == len(many) == 50
    np.testing.assert_allclose(many, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_parameters_lie_where_they_should(runs):
    """All eight devices have a part: of the batch, and of the features."""
    is_whole = lambda leaf: leaf.sharding.is_fully_replicated
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    for sizes in ("8", "4x2"):
        leaves = arrays(runs[sizes][1])
        assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
        split = [leaf for leaf in leaves if not is_whole(leaf)]
        assert len(split) == (0 if sizes == "8" else len(leaves) - 1)  # not the readout's bias
        for leaf in split:
            assert 2 * leaf.addressable_shards[0].data.size == leaf.size
    names = meshes.place_batch(batch_at(0), meshes.make_mesh("4x2"))
    assert names.addressable_shards[0].data.shape == (4, 10)


# ---- What the devices tell each other

COLLECTIVE = re.compile(
    r"= (?:\(.*?\)|\S+) "  # of one array, or several
    r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def collectives(compiled):
    return Counter(COLLECTIVE.findall(compiled.as_text()))


def without_norms(decoder):
    is_norm = lambda node: isinstance(node, model.PerToken)
    return jax.tree.map(
        lambda node: eqx.nn.Identity() if is_norm(node) else node, decoder, is_leaf=is_norm
    )


def of_forward(mesh, edit=lambda decoder: decoder):
    decoder = meshes.place(edit(train.start(SMALL, SYMBOLS)[0]), mesh)
    forward = eqx.filter_jit(lambda decoder, names: jax.vmap(decoder)(names))
    names = meshes.place_batch(batch_at(0), mesh)
    return collectives(forward.lower(decoder, names).compile().compiled)


def of_backward(mesh, edit=lambda decoder: decoder):
    decoder = meshes.place(edit(train.start(SMALL, SYMBOLS)[0]), mesh)
    names = meshes.place_batch(batch_at(0), mesh)
    backward = eqx.filter_jit(eqx.filter_value_and_grad(train.loss_fn))
    return collectives(backward.lower(decoder, names).compile().compiled)


@pytest.mark.slow
def test_split_batch_needs_nothing_in_the_forward():
    mesh = meshes.make_mesh("8")
    assert not of_forward(mesh)
    # The loss has sums over the batch, and so have the gradients: with the norms as without.
    assert set(of_backward(mesh)) == {"all-reduce"}
    assert of_backward(mesh) == of_backward(mesh, without_norms)
    assert not collectives(compiled_step(None)[1].compiled)


@pytest.mark.slow
def test_split_features_need_three_sums_a_norm():
    """Mean, mean of what is left, variance: an all-reduce each, of one number a token."""
    mesh = meshes.make_mesh("4x2")
    norms = 2 * SMALL.layers + 1
    added = of_forward(mesh) - of_forward(mesh, without_norms)
    assert added == {"all-reduce": 3 * norms}
    eqxs = lambda _: train.start(dataclasses.replace(SMALL, norms="eqx"), SYMBOLS)[0]
    assert of_forward(mesh, eqxs) - of_forward(mesh, without_norms) == {"all-reduce": 2 * norms}
    # Forward and backward: two means more, which XLA may send together (jax 0.10.2: always; 0.12:
    # in some processes, not in others).
    added = of_backward(mesh) - of_backward(mesh, without_norms)
    assert set(added) == {"all-reduce"}
    assert 4 * norms <= added["all-reduce"] <= 5 * norms


def test_collectives_are_counted():
    hlo = """
      %a = f32[] all-reduce(%b), channel_id=1
      %c = (f32[2]{0}, f32[]) all-reduce-start(%d, %e), to_apply=%all-reduce.clone
      %f = (f32[2]{0}, f32[]) all-reduce-done(%c)
      %g = f32[4]{0} all-gather(%all-reduce.1), dimensions={0}
      %h = f32[] add(%a, %all-to-all.2)
    """
    found = Counter(COLLECTIVE.findall(hlo))
    assert found == {"all-reduce": 2, "all-gather": 1}


# ---- The command line


def names_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES))
    return str(path)


def history(folder):
    with (folder / "per-token.eqx").open("rb") as file:
        return np.array(json.loads(file.readline())["history"])


@pytest.mark.slow
def test_checkpoints_are_for_any_mesh(tmp_path):
    """Half on 4 x 2 devices, the rest on one, as all on one: but for the rounding of sums."""
    path = tmp_path / "a.eqx"
    begin = lambda: checkpoint.State(*train.start(SMALL, SYMBOLS), 0, ())
    mesh = meshes.make_mesh("4x2")
    half = train.train(SMALL, DATA, begin(), path, until=25, mesh=mesh)
    assert half.step == 25
    resumed = checkpoint.load(path, begin(), SMALL, DATA)
    for one, two in zip(jax.tree.leaves(half), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)
    resumed = train.train(SMALL, DATA, resumed, path)
    alone = train.train(SMALL, DATA, begin(), tmp_path / "b.eqx")
    assert resumed.step == alone.step == 50
    assert alone.history[0][1] - alone.history[-1][1] > 0.2
    np.testing.assert_allclose(resumed.history, alone.history, rtol=0, atol=1e-5)
    assert {
        len(leaf.devices()) for leaf in jax.tree.leaves(resumed.model) if eqx.is_array(leaf)
    } == {1}


@pytest.mark.slow
def test_devices_are_made():
    """In a process of its own, which has one CPU device unless it is asked for more."""
    make = "from examples.decoder import mesh; print(dict(mesh.make_mesh('4x2').shape))"
    run = subprocess.run([sys.executable, "-c", make], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "{'data': 4, 'features': 2}", run.stderr


@pytest.mark.slow
def test_command_trains_on_its_devices(tmp_path):
    command = [sys.executable, "-m", "examples.decoder", "--data", names_file(tmp_path)]
    size = "--quick --width 8 --batch 16 --steps 25 --mesh 4x2".split()
    run = subprocess.run(
        [*command, *size, "--out", str(tmp_path / "many")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "MiB of temporaries in a training step, on each device" in run.stdout
    found = history(tmp_path / "many")
    assert found[0, 1] - found[-1, 1] > 0.2
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([*command[3:], *size[:-2], "--out", str(tmp_path / "one")])
    np.testing.assert_allclose(found, history(tmp_path / "one"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "command, message",
    [
        ("--mesh eight", "one number of devices, or two with an x between them, got 'eight'; type"),
        ("--mesh 0", "got '0'; type --mesh 8, or --mesh 4x2"),
        ("--mesh 4x2x1", "got '4x2x1'"),
        (
            "--mesh 16",
            "wants 16 devices, but there are 8 of platform 'cpu'; type --mesh 8, or, to try ",
        ),
        (
            "--mesh 16",
            "XLA_FLAGS=--xla_force_host_platform_device_count=16 JAX_PLATFORMS=cpu in front",
        ),
        (
            "--mesh 8 --batch 20",
            "multiple of the 8 devices it is split over, got 20; try --batch 24",
        ),
        ("--mesh 2x4 --quick", "the 2 heads .* cannot be split over 4 devices; try --mesh 2x2"),
    ],
)
def test_errors(command, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--data", names_file(tmp_path), "--out", str(tmp_path), *command.split()])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)
