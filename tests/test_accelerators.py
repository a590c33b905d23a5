"""What norms cost in programs compiled for an H100 and TPUs, as ratios to `eqx.nn`'s.

None is needed, and nothing is timed: bytes, cycles and temporaries are read from what XLA makes of
the model. The bounds are the targets of `python -m benchmarks.accelerators`, which has more rows.

    pip install -e ".[accelerators]" && pytest -m accelerators
"""

import pytest

from benchmarks._child import children
from benchmarks._environment import cores
from benchmarks.accelerators._cases import AXIS_NAME, MODEL_ROWS, Case, Split
from benchmarks.accelerators._targets import outcomes

pytestmark = pytest.mark.accelerators

# Each with what it is there for.
ROWS = (
    ("h100", "LayerNorm", "float32", "tanh"),  # 1.20 with the barrier that bfloat16 has
    ("h100", "LayerNorm", "bfloat16", "tanh"),  # 1.04 without it
    ("h100", "RMSNorm", "float32", "tanh"),
    ("h100", "RMSNorm", "bfloat16", "mlp"),
    ("h100", "LayerNorm", "float32", "tanh scan"),
    ("h100", "LayerNorm", "bfloat16", "tanh scan"),
    ("v5e", "RMSNorm", "bfloat16", "tanh"),  # 1.62 with the barriers of a CPU
    ("v5e", "LayerNorm", "float32", "tanh scan"),
    ("v5e", "LayerNorm", "bfloat16", "tanh scan"),
    ("v6e", "LayerNorm", "bfloat16", "tanh scan"),
)


@pytest.fixture(scope="module")
def compiled():
    """What each program costs: of the rows ours and theirs, and of split norms ours."""
    cases = {
        Case(platform, library, layer, dtype, work, MODEL_ROWS): "cost_of"
        for platform, layer, dtype, work in ROWS
        for library in ("ours", "eqx")
    }
    cases |= {Split(*how): "collectives_of" for how in SPLITS}
    with children(cores()) as submit:
        waiting = {
            case: submit(f"accelerators._compile.{function}", case)
            for case, function in cases.items()
        }
        return {case: done.result() for case, done in waiting.items()}


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_models_meet_their_targets(compiled, row):
    platform, layer, dtype, work = row
    models = [
        compiled[Case(platform, library, layer, dtype, work, MODEL_ROWS)]
        for library in ("ours", "eqx")
    ]
    judged = outcomes({"layers": [], "models": models})
    assert len(judged) == 1 + ("scan" in work)
    for outcome in judged:
        assert outcome.verdict == "met", outcome


SPLITS = [
    (platform, library, split)
    for platform in ("h100", "v5e")
    for library, split in (("ours", "batch"), ("ours", "features"), (AXIS_NAME, "features"))
]


@pytest.mark.parametrize("how", SPLITS, ids=" ".join)
def test_split_norms_exchange_sums_alone(compiled, how):
    collectives = compiled[Split(*how)]["collectives"]
    assert list(collectives) == ["all-reduce"]
    # In float32: of a split batch dweight and dbias, of split features a sum of each row for the
    # mean, in two parts, for the variance, for mean(gw) and for mean(gw * xc).
    rows, n = 8192, 4096
    _, size = collectives["all-reduce"]
    assert size == 4 * (2 * n if how[2] == "batch" else 5 * rows)
