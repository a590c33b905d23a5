"""What diagnose, jax_debug_nans and a table of norms say of the sick and the healthy models.

    python benchmarks/diagnosis.py --write         # the table of docs/diagnosis.md
    python benchmarks/diagnosis.py --models gru convnet    # these rows of it
    python benchmarks/diagnosis.py --cost 12      # of so many blocks: diagnose, Watch
    python benchmarks/diagnosis.py --states --batches 1 32 255 256    # what is said of healthy ones

The models are those that our own tests use. A tool is asked whether anything is wrong, and where.
The table of norms is what people log: the norm of each parameter and of its gradient, read by the
same thresholds as ours: not finite, exactly zero, or 1000 times smaller or larger from the first
weight to the last.
"""

import argparse
import pathlib
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax

from eqx_norms.diagnostics import Watch, diagnose

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import diagnosis_architectures  # which adds to the zoo, as the next ones
import diagnosis_models
import diagnosis_more
import diagnosis_zoo as zoo

MODULES = (diagnosis_architectures, diagnosis_models, diagnosis_more, zoo)

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "diagnosis.md"


def ours(case):
    """Pairs of kind and place, the worst first."""
    found = diagnose(case.loss_fn, case.model, *case.args, **case.options).findings
    return [finding[:2] for finding in found]


def debug_nans(case):
    """Where it stops, which is a line of code and no path."""
    with jax.debug_nans(True):
        try:
            # As its documentation advises, for a jitted function alone names no operation.
            eqx.filter_jit(eqx.filter_value_and_grad(case.loss_fn))(case.model, *case.args)
        except FloatingPointError as error:
            return [("non-finite", str(error).splitlines()[0])]
    return []


def norms(case):
    """Parameters whose norms stand out."""
    loss, grads = eqx.filter_jit(eqx.filter_value_and_grad(case.loss_fn))(case.model, *case.args)
    found = [] if jnp.isfinite(loss) else [("non-finite", "loss")]
    sizes = {}
    params = jtu.tree_leaves_with_path(eqx.filter(case.model, eqx.is_inexact_array))
    for (keys, param), grad in zip(params, jtu.tree_leaves(grads), strict=True):
        path = jtu.keystr(keys).removeprefix(".")
        size, own = (float(jnp.linalg.norm(jnp.float32(x))) for x in (grad, param))
        if not (size < float("inf") and own < float("inf")):
            found.append(("non-finite", path))
        elif size == 0:
            found.append(("no gradient", path))
        elif param.ndim > 1:
            sizes[path] = size
    if sizes:
        first, *_, last = [*sizes, *sizes]  # one weight is both
        change = sizes[first] / sizes[last]
        if change > 1e3:
            found.append(("exploding gradient", first))
        elif change < 1e-3:
            found.append(("vanishing gradient", first))
    return found


def at_its_place(found, illness):
    """Of an illness of parameters, the submodule that holds all of them will do, and any of it."""
    return any(
        kind == k and (where == w or where.startswith((f"{w}.", f"{w}[")))
        for kind, where in found
        for k, w in illness
    )


def verdict(tool, case):
    """In a word; what is found elsewhere is a symptom."""
    found = tool(case)
    if not found:
        return "-"
    if tool is debug_nans:
        return "stops"
    if not case.illness:
        return "false alarm"
    return "found" if at_its_place(found, case.illness) else "symptom"


TOOLS = {"`diagnose`": ours, "`jax_debug_nans`": debug_nans, "norms": norms}


def table(key, names, tools, write):
    """Every model, every tool; what is not asked for stays as it is in the page."""
    models = zoo.SICK | zoo.HEALTHY
    rows = _page()[1]
    print("\n".join(HEAD))
    for name in names or models:
        case = models[name](key)
        kind, where = case.illness[0] if case.illness else ("healthy", "")
        illness = f"{kind}, `{where or 'the model'}`" if case.illness else kind
        title = name.replace("_", " ")
        old = rows.get(title, [title, illness, *[""] * len(TOOLS)])
        answers = [
            verdict(TOOLS[tool], case) if tool in tools else cell
            for tool, cell in zip(TOOLS, old[2:], strict=True)
        ]
        rows[title] = [title, illness, *answers]
        print(_line(rows[title]), flush=True)
        if write:  # after each, for all of them take hours
            page, _ = _page()
            titles = (n.replace("_", " ") for n in models)
            lines = [_line(rows[title]) for title in titles if title in rows]
            PAGE.write_text("\n".join([page[0], *HEAD, *lines]) + page[1])


HEAD = (
    "| model | illness | " + " | ".join(TOOLS) + " |",
    "|---" * (2 + len(TOOLS)) + "|",
)


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _page():
    """What comes before and after the table in the page, and its rows by their titles."""
    text = PAGE.read_text()
    start = text.index(HEAD[0])
    end = text.index("\n\n", start)
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    whole = lambda row: row + [""] * (2 + len(TOOLS) - len(row))
    rows = [whole(cells(line)) for line in text[start:end].splitlines()[2:]]
    return (text[:start].rstrip("\n") + "\n", text[end:]), {row[0]: row for row in rows}


def in_all_states(seed, names, states, batches):
    """A line for each healthy model, state and size of a batch."""
    for name in names or zoo.HEALTHY:
        for batch in batches:
            for module in MODULES:
                setattr(module, "BATCH", batch)  # noqa: B010
            case = zoo.HEALTHY[name](jr.key(seed))
            for state in states:
                found = ours(zoo.STATES[state](case))
                what = ", ".join(f"{kind} at {where or 'the model'}" for kind, where in found)
                print(f"{name}, {state}, {batch} examples: {what or '-'}", flush=True)


def cost(key, depth):
    """Processor seconds, which other processes disturb less than time."""
    model = zoo.Transformer(key, depth)
    ids = zoo.tokens(key)
    optim = optax.adam(1e-3)
    state = optim.init(zoo.weights(model))

    @eqx.filter_jit
    def step(model, state, ids):
        loss, grads = eqx.filter_value_and_grad(zoo.next_token)(model, ids)
        updates, state = optim.update(grads, state, zoo.weights(model))
        return eqx.apply_updates(model, updates), state, loss

    watch = Watch(zoo.next_token, where=lambda path, module: True, optimiser=optim)
    jitted = eqx.filter_jit(watch.measure)
    runs = {
        "step": lambda: step(model, state, ids)[2],
        "diagnose": lambda: diagnose(zoo.next_token, model, ids, optimiser=(optim, state)).loss,
        "Watch": lambda: watch.measure(model, ids, opt_state=state),
        "Watch, jitted": lambda: jitted(model, ids, opt_state=state),
    }
    for name, run in runs.items():
        for which in ("the first call", "again"):
            start = time.process_time()
            jax.block_until_ready(run())
            took = time.process_time() - start
            print(f"{depth} blocks, {name}, {which}: {took:.3f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", type=int, metavar="BLOCKS", help="of the decoder of the zoo")
    parser.add_argument("--models", nargs="*", help="of the zoo; all by default")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--write", action="store_true", help="into docs/diagnosis.md")
    parser.add_argument("--states", nargs="*", help="of healthy models; all by default")
    parser.add_argument("--batches", nargs="*", type=int, default=[32])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.cost:
        cost(jr.key(chosen.seed), chosen.cost)
    elif chosen.states is not None:
        in_all_states(chosen.seed, chosen.models, chosen.states or zoo.STATES, chosen.batches)
    else:
        table(jr.key(chosen.seed), chosen.models, chosen.tools, chosen.write)
