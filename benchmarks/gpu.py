"""What was never timed, in one go: norms on a GPU, as a share of what a copy moves.

    python -m benchmarks.gpu          # on a machine with a GPU and JAX: at most 8 minutes
    python -m benchmarks.gpu --dry    # on any, at small sizes: that the script runs, no figures

The numbers of all libraries that are installed are held against float64 first. results.json is
written after every row, so that nothing is lost where time or the machine runs out, and tables.md
at the end. torch is timed if it has CUDA, or with `--dry`.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some as well

import jax
import numpy as np

from . import _works
from ._cases import LAYERS, NAMES, WORKS, Case, is_installed, shape_of
from ._environment import environment
from ._page import dumps
from ._report import table
from ._rivals import example_shape

ROWS = ("8192x4096", "32768x1024", "4096x12288", "65536x256")
DRY_ROWS = ("64x128",)
DTYPES = ("bfloat16", "float32")
RIVALS = ("ours", "kernel", "eqx", "flax", "tokamax", "torch", "torch.compile")
DECODER = {"layers": 12, "width": 768, "heads": 12, "context": 512, "batch": 16}
DRY_DECODER = {"layers": 1, "width": 32, "heads": 2, "context": 8, "batch": 2}
# Of y and dx over their largest entry: what a rounding of the result comes to, and some for sums.
ERROR = {"float32": 1e-5, "bfloat16": 2.0**-7}
ROUNDS, SAMPLE = 7, 10e-3  # samples of a row; seconds that each lasts at least


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dry", action="store_true", help="small sizes, on any device")
    parser.add_argument("--minutes", type=float, default=8, help="no row is begun after these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    to = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu" and not to.dry:
        parser.error(f"JAX has no GPU here, only {device.platform!r}. `--dry` tries the script.")
    started = time.perf_counter()
    results: dict = {"environment": environment(), "device": device.device_kind, "dry": to.dry}
    results |= {"errors": [], "copy": [], "rows": [], "failed": [], "left_out": []}
    to.out.mkdir(parents=True, exist_ok=True)
    for section, what, measure in tasks(to.dry, results):
        if time.perf_counter() - started > 60 * to.minutes:
            results["left_out"].append(what)
            continue
        try:
            results[section].append(what | measure())
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:300]}"
            results["failed"].append(what | {"error": text})
        results["minutes"] = round((time.perf_counter() - started) / 60, 2)
        (to.out / "results.json").write_text(dumps(results))
        print(what, flush=True)
    (to.out / "results.json").write_text(dumps(results))
    (to.out / "tables.md").write_text(report(results))
    print(report(results))
    return results


def tasks(dry: bool, results: dict) -> Iterator[tuple[str, dict, Callable[[], dict]]]:
    """`(section, what, measure)`, what matters most first: time may run out."""
    rivals = [rival for rival in RIVALS if is_there(rival, dry)]
    rows = DRY_ROWS if dry else ROWS
    for layer, dtype, rival in itertools.product(LAYERS, DTYPES, rivals):
        if not has(rival, layer):
            continue
        what = {"rival": rival, "layer": layer, "dtype": dtype}
        yield "errors", what, lambda w=what: errors(**w)
    for shape, dtype in itertools.product(rows, DTYPES):
        what = {"rows": shape, "dtype": dtype}
        yield "copy", what, lambda w=what: copy(**w)
    decoder = DRY_DECODER if dry else DECODER
    for layer, work in itertools.product(LAYERS, ("backward", "forward")):
        for shape, dtype, rival in itertools.product(rows, DTYPES, rivals):
            if not has(rival, layer):
                continue
            what = Case(layer, shape, dtype, work)._asdict() | {"rival": rival}
            yield "rows", what, lambda w=what: norm(results["copy"], **w)
        if (layer, work) == ("RMSNorm", "backward"):
            for dtype, rival in itertools.product(DTYPES, ("ours", "kernel", "eqx")):
                what = {"layer": "LayerNorm", "rows": "", "dtype": dtype, "work": "decoder"}
                what |= {"rival": rival}
                yield "rows", what, lambda d=dtype, r=rival: timed(step(r, d, decoder))


def is_there(rival: str, dry: bool) -> bool:
    if rival == "kernel":  # Of this platform; on CPUs it is numba's, or else the plain path.
        return True
    if not rival.startswith("torch"):
        return is_installed(rival)
    if not is_installed("torch"):
        return False
    import torch

    return torch.cuda.is_available() or (dry and rival == "torch")


def has(rival: str, layer: str) -> bool:
    return (rival, layer) != ("tokamax", "GroupNorm")


# ---- What is measured.


def work_of(rival: str, case: Case) -> _works.Work:
    """As on a CPU; torch's arrays are moved to the GPU if there is one."""
    if not rival.startswith("torch"):
        return _works.work_of(rival, case)
    import torch

    if not torch.cuda.is_available():
        return _works.work_of(rival, case)
    with torch.device("cuda"):
        work = _works.work_of(rival, case)
    return _works.Work(
        work.run,
        lambda a: work.take(a).cuda(),
        lambda a: work.give(a.cpu()),
        lambda result: torch.cuda.synchronize(),
    )


def errors(rival: str, layer: str, dtype: str) -> dict:
    """The worst errors of y and dx against float64, of entries that are rounded to `dtype`."""
    rows, n = 64, 128
    rounded = [jax.numpy.asarray(a).astype(dtype) for a in _works.normal(rows, n)]
    x, g = (np.asarray(a.astype("float32")) for a in rounded)
    work = work_of(rival, Case(layer, f"{rows}x{n}", dtype, "backward"))
    shape = example_shape(layer, rows, n)
    y, dx, _ = work.run(work.take(x.reshape(shape)), work.take(g.reshape(shape)))
    found = {}
    for name, got, want in zip(("y", "dx"), (y, dx), exact(layer, x, g), strict=True):
        if rival.startswith("torch"):
            got = got.float()
        got = np.float64(work.give(got)).reshape(rows, n)
        found[name] = float(f"{np.abs(got - want).max() / np.abs(want).max():.3g}")
    return found | {"right": max(found.values()) <= ERROR[dtype]}


def exact(layer: str, x, g) -> tuple[np.ndarray, np.ndarray]:
    """In float64 y and dx, with weight 1 and bias 0: rows are what is normalised in all layers."""
    x, g = np.float64(x), np.float64(g)
    mean = lambda a: a.mean(-1, keepdims=True)
    centred = lambda a: a - mean(a) * (layer != "RMSNorm")
    rstd = 1 / np.sqrt(mean(centred(x) ** 2) + _works.EPS)
    xhat = centred(x) * rstd
    return xhat, rstd * (centred(g) - xhat * mean(g * xhat))


def copy(rows: str, dtype: str) -> dict:
    """Bytes a second that a change of sign reads and writes."""
    case = Case("LayerNorm", rows, dtype, "forward")
    ms = timed(thunk("copy", case))["ms"]
    return {"ms": ms, "bytes_per_s": 2 * entries(case) / (ms / 1e3)}


def norm(copies: list[dict], rival: str, **what: str) -> dict:
    """Also `share`: what must be moved at the copy's bandwidth, over the time it took."""
    case = Case(**what)
    found = timed(thunk(rival, case))
    same = [c for c in copies if (c["rows"], c["dtype"]) == (case.rows, case.dtype)]
    if same:  # x and y; for both directions x and g are read, and dx is written.
        least = {"forward": 2, "backward": 5}[case.work] * entries(case) / same[0]["bytes_per_s"]
        found["share"] = float(f"{1e3 * least / found['ms']:.3g}")
    return found


def entries(case: Case) -> int:
    """Bytes of x."""
    rows, n = shape_of(case.rows)
    return rows * n * (2 if case.dtype == "bfloat16" else 4)


def thunk(rival: str, case: Case) -> tuple[Callable, Callable]:
    """A call that does not wait, and what waits for its result."""
    work = work_of(rival, case)
    x, g = map(work.take, _works.normal(*case.shape, layer=case.layer))
    return lambda: work.run(x, g), work.wait


def step(rival: str, dtype: str, sizes: dict) -> tuple[Callable, Callable]:
    """A training step of examples/decoder with 12 blocks, always from the same state."""
    import eqx_norms
    from examples.decoder.settings import Settings
    from examples.decoder.train import make_step, start

    theirs = "ours" if rival == "ours" else "eqx"
    settings = Settings(norms=theirs, bf16=dtype == "bfloat16", **sizes)
    state = start(settings, 27)
    if rival == "kernel":
        state = tuple(eqx_norms.replace_norms(part, implementation="kernel") for part in state)
    run, shape = make_step(settings), (settings.batch, settings.context)
    names = jax.numpy.asarray(np.random.default_rng(0).integers(0, 27, shape), "int32")
    return lambda: run(*state, names), jax.block_until_ready


def timed(thunk: tuple[Callable, Callable]) -> dict:
    """Median and quartiles of the time of a call. A device works through calls in their order."""
    run, wait = thunk
    wait(run())  # compiles
    once = _sample(run, wait, 1)
    calls = max(1, min(1000, int(SAMPLE / once)))
    each = [1e3 * _sample(run, wait, calls) for _ in range(ROUNDS)]
    low, middle, high = (float(f"{q:.4g}") for q in np.percentile(each, (25, 50, 75)))
    return {"ms": middle, "ms_quartiles": [low, high], "calls": calls}


def _sample(run: Callable, wait: Callable, calls: int) -> float:
    started, result = time.perf_counter(), None
    for _ in range(calls):
        result = run()
    wait(result)
    return (time.perf_counter() - started) / calls


# ---- The page.


def report(results: dict) -> str:
    parts = [f"# Norms on {results['device']}"]
    if results["dry"]:
        parts.append("**A dry run: its times say nothing.**")
    versions = results["environment"]["versions"].items()
    parts.append(", ".join(f"{name} {version}" for name, version in versions))
    wrong = [e for e in results["errors"] if not e["right"]]
    parts.append(
        f"y and dx against float64: {len(results['errors']) - len(wrong)} of "
        f"{len(results['errors'])} right."
    )
    parts += [
        f"- wrong: {e['rival']} {e['layer']} {e['dtype']}, {e['y']:.1e}, {e['dx']:.1e}"
        for e in wrong
    ]
    for work, title in WORKS.items():
        rows = [row for row in results["rows"] if row["work"] == work]
        if rows:
            parts.append(f"## {title}: ms, and the share of a copy's bandwidth\n\n{_times(rows)}")
    parts += [f"- failed: `{failed}`" for failed in results["failed"]]
    if results["left_out"]:
        parts.append(f"Time ran out before {len(results['left_out'])} rows.")
    return "\n\n".join(parts) + "\n"


def _times(rows: list[dict]) -> str:
    found = {(r["layer"], r["rows"], r["dtype"], r["rival"]): r for r in rows}
    rivals = [rival for rival in RIVALS if any(key[3] == rival for key in found)]
    lines = []
    for key in dict.fromkeys(key[:3] for key in found):
        lines.append([" ".join(filter(None, key)), *(_cell(found.get((*key, r))) for r in rivals)])
    return table(["", *(NAMES.get(rival, rival) for rival in rivals)], lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:.3g}" + (f", {row['share']:.2f}" if "share" in row else "")


if __name__ == "__main__":
    main()
