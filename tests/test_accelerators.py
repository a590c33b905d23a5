"""What norms cost in programs compiled for an H100 and TPUs, as ratios to `eqx.nn`'s.

None is needed, and nothing is timed: bytes, cycles and temporaries are read from what XLA makes of
the model. The bounds are the targets of `python -m benchmarks.accelerators`, which has more rows.

    pip install -e ".[accelerators]" && pytest -n auto -m accelerators
"""

import pytest

from benchmarks._child import child
from benchmarks.accelerators._cases import AXIS_NAME, MODEL_ROWS, Case, Split
from benchmarks.accelerators._targets import outcomes

pytestmark = pytest.mark.accelerators


@pytest.fixture(scope="module")
def call():
    """Calls a function of the benchmarks as they do, in a process of its own."""
    with child() as call:
        yield call


@pytest.mark.parametrize(
    "platform, layer, dtype, work",
    [
        ("h100", "LayerNorm", "float32", "tanh"),  # 1.20 with the barrier that the next one has
        ("h100", "LayerNorm", "bfloat16", "tanh"),  # 1.04 without it
        ("h100", "LayerNorm", "bfloat16", "mlp"),  # .99 with statistics in three passes
        ("h100", "RMSNorm", "float32", "tanh"),
        ("h100", "RMSNorm", "bfloat16", "mlp"),
        ("h100", "RMSNorm", "bfloat16", "tanh, x fixed"),  # 1.04 without a barrier
        ("h100", "LayerNorm", "bfloat16", "tanh, x and norms fixed"),  # in one pass more
        ("h100", "LayerNorm", "float32", "tanh scan"),
        ("h100", "LayerNorm", "bfloat16", "tanh scan"),
        ("v5e", "RMSNorm", "bfloat16", "tanh"),  # 1.62 with the barriers of a CPU
        ("v5e", "GroupNorm", "bfloat16", "tanh"),
        ("v6e", "LayerNorm", "float32", "mlp"),  # 1.03 likewise
        ("v5e", "LayerNorm", "float32", "tanh scan"),
        ("v5e", "LayerNorm", "bfloat16", "tanh scan"),
        ("v6e", "LayerNorm", "bfloat16", "tanh scan"),
    ],
)
def test_models_meet_their_targets(call, platform, layer, dtype, work):
    models = [
        call("accelerators._compile.cost_of", Case(platform, lib, layer, dtype, work, MODEL_ROWS))
        for lib in ("ours", "eqx")
    ]
    judged = outcomes({"layers": [], "models": models})
    assert len(judged) == 1 + ("scan" in work)  # its cost, and of a scan its temporaries
    for outcome in judged:
        assert outcome.verdict == "met", outcome


@pytest.mark.parametrize("platform", ["h100", "v5e"])
@pytest.mark.parametrize(
    "library, split", [("ours", "batch"), ("ours", "features"), (AXIS_NAME, "features")]
)
def test_split_norms_exchange_sums_alone(call, platform, library, split):
    case = Split(platform, library, split)
    collectives = call("accelerators._compile.collectives_of", case)["collectives"]
    rows, n = case.shape
    if (platform, library, split) == ("v5e", "ours", "features"):
        # Of each row, the three entries in the middle of which a TPU counts from.
        assert collectives.pop("collective-permute")[1] <= 3 * 4 * rows
    assert list(collectives) == ["all-reduce"]
    # In float32: of a split batch dweight and dbias, of split features a sum of each row for the
    # mean, in two parts, for the variance, for mean(gw) and for mean(gw * xc).
    _, size = collectives["all-reduce"]
    assert size == 4 * (2 * n if split == "batch" else 5 * rows)
