"""The proof of programs of several devices: `shard_map` and what passes between devices.

The truth is brute force: the program runs on devices, with every position edited, and no output may
move that the proof says does not read that position. What is written here as exactly causal must be
connected nowhere else.
"""

import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from slow import few, slow

from eqx_norms.causality import check_causal
from eqx_norms.causality._proof import Question, prove
from eqx_norms.causality._proof._devices import on_one_device
from eqx_norms.causality._widen import trace

T, D = 8, 4
CAUSAL = np.tri(T, dtype=bool)


def mesh(*sizes, names=("seq", "model"), kind=AxisType.Auto):
    names = names[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def proved(fn, x, allowed=CAUSAL):
    question = Question(trace(fn, (x,)), (x,), (0,), (0,))
    return prove(question, allowed, assume_bounded=True)


def moved(fn, x, scale=3.0):
    """Brute force: `moved[t, j]`, whether another input at j changes output t."""
    run, found = jax.jit(fn), np.zeros((len(x), len(x)), bool)
    base = np.asarray(run(x))
    for j in range(len(x)):
        # By little as well: what moves far from the others has a softmax to itself, or none of it.
        for by in (-scale, -scale / 10, scale / 10, scale):
            edited = np.array(x)
            edited[j] = edited[j] + by * np.linspace(0.5, 1, x[j].size).reshape(x[j].shape)
            out = np.asarray(run(edited))
            found[:, j] |= (out != base).reshape(len(base), -1).any(1)
    return found


def sharded(local, mesh=None, **settings):
    settings = {"in_specs": P("seq"), "out_specs": P("seq"), **settings}
    return jax.shard_map(local, mesh=mesh or globals()["mesh"](4), **settings)


# Attention by a ring


def ring(q, mask, loop="scan", n=4):
    """Each device keeps its queries; keys and values go around. `mask(rows, columns)`."""
    me, size = lax.axis_index("seq"), len(q)
    next_one = [(d, (d + 1) % n) for d in range(n)]

    def step(carry, k):
        largest, bottom, top, kv = carry
        rows, columns = me * size + jnp.arange(size), (me - k) % n * size + jnp.arange(size)
        rows, columns = rows[:, None], columns[None]
        scores = q @ kv.T
        if mask is not None:
            scores = jnp.where(mask(rows, columns), scores, -jnp.inf)
        now = jnp.maximum(largest, scores.max(1))
        weights, scale = jnp.exp(scores - now[:, None]), jnp.exp(largest - now)
        bottom = scale * bottom + weights.sum(1)
        top = scale[:, None] * top + weights @ kv
        return (now, bottom, top, lax.ppermute(kv, "seq", next_one)), None

    zero = 0 * q[:, 0]  # varies between devices, as check_vma asks for
    carry = (zero - 1e30, zero, 0 * q, q)
    if loop == "scan":
        carry, _ = lax.scan(step, carry, jnp.arange(n))
    elif loop == "fori":
        carry = lax.fori_loop(0, n, lambda k, carry: step(carry, k)[0], carry)
    else:
        for k in range(n):
            carry, _ = step(carry, k)
    return carry[2] / carry[1][:, None]


causal = lambda rows, columns: rows >= columns
off_by_a_block = lambda rows, columns: rows + T // 4 >= columns


@pytest.mark.parametrize("check_vma", (True, slow(False)))
@pytest.mark.parametrize("loop", ("scan", slow("fori"), slow("unrolled")))
def test_a_ring(getkey, loop, check_vma):
    fn = sharded(functools.partial(ring, mask=causal, loop=loop), check_vma=check_vma)
    x = normal(getkey(), (T, D)) / 2
    found = proved(fn, x)
    assert found.holds
    np.testing.assert_array_equal(found.connected, CAUSAL)
    np.testing.assert_array_equal(moved(fn, x), CAUSAL)


@pytest.mark.slow
@pytest.mark.parametrize("mask", (None, off_by_a_block))
def test_a_ring_that_leaks(getkey, mask):
    fn, x = sharded(functools.partial(ring, mask=mask)), normal(getkey(), (T, D)) / 2
    found = proved(fn, x)
    assert not found.holds
    np.testing.assert_array_equal(found.connected, moved(fn, x))
    assert "connects" in found.obstacles[0]
    assert "test_proof_devices.py" in found.obstacles[0]


# Other ways to share the work


def attend(q, k, v, mask):
    return jax.nn.softmax(jnp.where(mask, q @ k.T, -jnp.inf)) @ v


def rows_and_columns(size, n=4):
    return lax.axis_index("seq") * size + jnp.arange(size)[:, None], jnp.arange(size * n)[None]


def gathered(x):
    """Each device has its queries, and everyone's keys and values."""
    rows, columns = rows_and_columns(len(x))
    everyone = lax.all_gather(x, "seq", tiled=True)
    return attend(x, everyone, everyone, rows >= columns)


def gathered_in_an_axis(x):
    rows, columns = rows_and_columns(len(x))
    everyone = lax.all_gather(x, "seq", axis=1).swapaxes(0, 1).reshape(-1, D)
    return attend(x, everyone, everyone, rows >= columns)


def put_and_summed(x):
    """An all_gather as some write it."""
    rows, columns = rows_and_columns(len(x))
    everyone = lax.dynamic_update_slice(jnp.zeros((T, D)), x, (rows[0, 0], 0))
    everyone = lax.psum(everyone, "seq")
    return attend(x, everyone, everyone, rows >= columns)


def by_heads(x):
    """Ulysses: positions are shared out, then features, then positions again."""
    mine = lax.all_to_all(x, "seq", 1, 0, tiled=True)
    out = attend(mine, mine, mine, jnp.tri(T, dtype=bool))
    return lax.all_to_all(out, "seq", 0, 1, tiled=True)


def one_at_a_time(x):
    """The same by an axis that counts devices."""
    mine = lax.all_to_all(x.reshape(-1, 4, D // 4), "seq", 1, 0).reshape(T, D // 4)
    out = attend(mine, mine, mine, jnp.tri(T, dtype=bool))
    return lax.all_to_all(out.reshape(4, -1, D // 4), "seq", 0, 1).reshape(-1, D)


def before_this_device(x):
    """A cumulative sum: of what devices before this one have, and of what it has."""
    totals = lax.all_gather(x.sum(0), "seq")
    before = jnp.arange(4) < lax.axis_index("seq")
    return jnp.cumsum(x, 0) + jnp.where(before[:, None], totals, 0).sum(0)[None]


def from_the_left(x):
    """A convolution: the last row of the device before, and zeros before the first."""
    halo = lax.ppermute(x[-1:], "seq", [(0, 1), (1, 2), (2, 3)])
    return x + jnp.concatenate([halo, x[:-1]])


def with_a_branch(x):
    """A block is looked at or not, by the number of the device."""

    def step(top, source):
        block = lax.psum(jnp.where(lax.axis_index("seq") == source, x, 0), "seq")
        rows, columns = rows_and_columns(len(x))
        mask = rows >= columns[:, : len(x)] + source * len(x)
        add = lambda: top + jnp.where(mask, jnp.exp(x @ block.T), 0) @ block
        return lax.cond(source <= lax.axis_index("seq"), add, lambda: top), None

    return lax.scan(step, 0 * x, jnp.arange(4))[0]


SHARED = {f.__name__: f for f in (gathered, gathered_in_an_axis, put_and_summed, by_heads)}
SHARED |= {f.__name__: f for f in (one_at_a_time, before_this_device, from_the_left, with_a_branch)}


@pytest.mark.parametrize("name", few(SHARED, ("gathered", "from_the_left")))
def test_what_shares_the_work_is_proved(getkey, name):
    fn, x = sharded(SHARED[name], check_vma=name != "with_a_branch"), normal(getkey(), (T, D)) / 2
    found = proved(fn, x)
    assert found.holds, found.obstacles
    np.testing.assert_array_equal(found.connected, moved(fn, x))


def tensor_parallel(x, up, down):
    """Megatron: features of the hidden layer are shared out, and the products summed."""
    return x + lax.psum(jax.nn.relu(x @ up) @ down, "model")


def scattered(x, up, down):
    """The sum, of which each device keeps its own positions."""
    everyone = lax.all_gather(x, "model", tiled=True)
    return x + lax.psum_scatter(jax.nn.relu(everyone @ up) @ down, "model", tiled=True)


@pytest.mark.parametrize("check_vma", (True, slow(False)))
@pytest.mark.parametrize(("local", "spec"), ((tensor_parallel, P()), slow(scattered, P("model"))))
def test_features_on_several_devices(getkey, local, spec, check_vma):
    up, down = normal(getkey(), (D, 8)), normal(getkey(), (8, D))
    specs = (spec, P(None, "model"), P("model", None))
    run = jax.shard_map(
        local, mesh=mesh(4, names=("model",)), in_specs=specs, out_specs=spec, check_vma=check_vma
    )
    fn, x = lambda x: run(x, up, down), normal(getkey(), (T, D)) / 2
    found = proved(fn, x, np.eye(T, dtype=bool))
    assert found.holds
    np.testing.assert_array_equal(moved(fn, x), np.eye(T, dtype=bool))


def test_what_counts_as_the_same_may_be_that_of_any_device(getkey):
    """Nobody checks it, and each device has its own."""
    fn = sharded(lambda x: jnp.tile(x, (4, 1)), out_specs=P(), check_vma=False)
    found = proved(fn, normal(getkey(), (T, D)) / 2)
    assert not found.holds
    assert found.connected.all(1).sum() == 0
    np.testing.assert_array_equal(found.connected, np.tile(np.eye(2, dtype=bool), (4, 4)))


def test_what_jax_cannot_do_side_by_side_connects_everything(getkey):
    groups = [[0, 1], [2, 3]]
    local = lambda x: lax.psum(x, "seq", axis_index_groups=groups)
    found = proved(sharded(local, check_vma=False), normal(getkey(), (T, D)) / 2)
    assert found.connected.all()
    assert "`shard_map`, which the proof has no rule for," in found.obstacles[0]


@pytest.mark.slow
def test_scores_are_looked_at_on_every_device(getkey):
    def local(x):
        rows, columns = rows_and_columns(len(x))
        everyone = lax.all_gather(x, "seq", tiled=True)
        masked = jnp.where(rows >= columns, x @ everyone.T, -1e9)
        return jax.nn.softmax(masked) @ everyone

    fn, x = sharded(local), normal(getkey(), (T, D)) / 2
    assert check_causal(fn, x, prove=True).status == "proved"
    assert check_causal(fn, 1e5 * x, prove=True).status != "proved"


def on_two_axes(x):
    """A ring in which scores are summed over shares of the features."""
    me, size, kv, out = lax.axis_index("seq"), len(x), x, 0 * x
    for k in range(2):
        rows = me * size + jnp.arange(size)[:, None]
        columns = (me - k) % 2 * size + jnp.arange(size)[None]
        scores = lax.psum(x @ kv.T, "model")
        out = out + jnp.where(rows >= columns, jnp.tanh(scores), 0) @ kv
        kv = lax.ppermute(kv, "seq", [(0, 1), (1, 0)])
    return out


def along_both(x):
    """The row before, of the device before along both axes together."""
    order = [(0, 1), (1, 2), (2, 3)]
    return x + jnp.concatenate([lax.ppermute(x[-1:], ("seq", "model"), order), x[:-1]])


def one_in_another(x):
    """A mesh of two axes, one after the other."""
    summed = lambda y: y + lax.psum(y, "model")
    spec = P(None, "model")
    inner = jax.shard_map(summed, in_specs=spec, out_specs=spec, axis_names={"model"})
    return inner(x) + lax.ppermute(x, "seq", [(0, 1)])


TWO_AXES = {
    "a ring": (on_two_axes, P("seq", "model"), None),
    "both together": (along_both, P(("seq", "model")), None),
    "the other way": (along_both, P(("model", "seq")), None),
    "one in another": (one_in_another, P("seq"), {"seq"}),
}


@pytest.mark.parametrize("name", few(TWO_AXES, ("the other way",)))
def test_a_mesh_of_two_axes(getkey, name):
    local, spec, manual = TWO_AXES[name]
    settings = {} if manual is None else {"axis_names": manual}
    run = jax.shard_map(local, mesh=mesh(2, 2), in_specs=spec, out_specs=spec, **settings)
    fn, x = jax.jit(run), normal(getkey(), (T, D)) / 2
    found = proved(fn, x)
    np.testing.assert_array_equal(found.connected, moved(fn, x))
    assert found.holds == (name != "the other way")


# Random programs

STEPS = []


def step(fn):
    STEPS.append(fn)
    return fn


@step
def _permuted(rng, x):
    pairs = zip(rng.permutation(4), rng.permutation(4), strict=True)
    kept = [pair for pair in pairs if rng.random() < 0.8]
    return x + lax.ppermute(x, "seq", [(int(a), int(b)) for a, b in kept])


@step
def _reduced(rng, x):
    reduce = (lax.psum, lax.pmax, lax.pmin, lax.pmean)[rng.integers(4)]
    here = lax.axis_index("seq") < rng.integers(1, 5)
    return x + jnp.where(here, reduce(x, "seq"), 0)


@step
def _attended(rng, x):
    rows, columns = rows_and_columns(len(x))
    everyone = lax.all_gather(x, "seq", tiled=True)
    mask = (rows + int(rng.integers(-2, 3)) >= columns) | (columns == 0)
    return attend(x, everyone, everyone, mask)


@step
def _picked(rng, x):
    everyone, me = lax.all_gather(x, "seq"), lax.axis_index("seq")
    return everyone[(me + int(rng.integers(4))) % 4] - x


@step
def _exchanged(rng, x):
    mine = lax.all_to_all(x, "seq", 1, 0, tiled=True)
    mine = jnp.cumsum(mine, 0) if rng.random() < 0.5 else mine + jnp.roll(mine, 1, 0)
    return lax.all_to_all(mine, "seq", 0, 1, tiled=True)


@step
def _scattered(rng, x):
    everyone = jnp.concatenate(
        [x * k for k in rng.normal(size=4).astype("f4") * rng.integers(2, size=4)]
    )
    return x + lax.psum_scatter(everyone, "seq", tiled=True)


@step
def _chosen(rng, x):
    branches = [lambda: x, lambda: jnp.flip(x, 0), lambda: jnp.cumsum(x, 0)]
    return lax.switch(lax.axis_index("seq") % 3, branches)


@step
def _counted(rng, x):
    return lax.fori_loop(0, lax.axis_index("seq"), lambda i, y: jnp.tanh(y + x[:1]), x)


@step
def _ringed(rng, x):
    order = [(k, (k + 1) % 4) for k in range(4)]
    offset = int(rng.integers(4))

    def turn(carry, k):
        total, y = carry
        ok = (lax.axis_index("seq") - k) % 4 <= offset
        return (total + jnp.where(ok, y, 0), lax.ppermute(y, "seq", order)), None

    return lax.scan(turn, (0 * x, x), jnp.arange(int(rng.integers(1, 5))))[0][0]


def random_program(number):
    rng = np.random.default_rng(number)
    steps = rng.choice(len(STEPS), int(rng.integers(1, 4)))

    def local(x, rng):
        for k in steps:
            x = jnp.tanh(STEPS[k](rng, x))
        return x

    return sharded(lambda x: local(x, np.random.default_rng(number)), check_vma=False)


@pytest.mark.slow
def test_random_programs_of_devices(pytestconfig):
    """A program for every ten of `--programs`, of a second each."""
    count, full = pytestconfig.getoption("--programs") // 10, 0
    for number in range(count):
        fn = random_program(seed(number))
        x = jnp.asarray(np.random.default_rng(seed(number)).normal(size=(T, D)), jnp.float32)
        found, truth = proved(fn, x).connected, moved(fn, x)
        assert not (truth & ~found).any(), number
        full += found.all()
        (eqn,) = trace(fn, (x,)).eqns
        (alone,) = jax.jit(jex.jaxpr_as_fun(on_one_device(eqn)))(np.int32(0), x)
        np.testing.assert_allclose(alone, fn(x), rtol=1e-4, atol=1e-5)
    assert full < count  # or else nothing was put to the test
