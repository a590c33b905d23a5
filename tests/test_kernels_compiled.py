"""The kernels, compiled for an H100 and TPUs: what they move, read from the compiled program.

pip install -e ".[accelerators]" && pytest -n auto -m accelerators
"""

import pytest

from benchmarks._child import child
from benchmarks.accelerators._cases import LAYER_ROWS, MODEL_ROWS, NO_NORM, PALLAS, Case, Split
from benchmarks.accelerators._targets import KERNELS, outcomes

pytestmark = pytest.mark.accelerators


@pytest.fixture(scope="module")
def call():
    with child() as call:
        yield call


@pytest.mark.parametrize("rows", LAYER_ROWS)
@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("layer", ("LayerNorm", "RMSNorm"))
def test_a_layer_reads_and_writes_once(call, layer, dtype, rows):
    case = Case("h100", PALLAS, layer, dtype, "backward", rows)
    cost = call("accelerators._compile.cost_of", case)
    # Forward, backward, and the sums of dweight and of dbias.
    assert cost["kernels"] == (4 if layer == "LayerNorm" else 3)
    (outcome,) = outcomes({"layers": [cost], "models": []})
    assert outcome.verdict == "met", outcome


@pytest.mark.parametrize("rows", ("4096x12288", "4099x1000", "77x32768", "5x1"))
@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("platform", ("h100", "v5e", "v6e"))
def test_any_shape_is_two_kernels(call, platform, dtype, rows):
    case = Case(platform, PALLAS, "LayerNorm", dtype, "backward", rows)
    assert call("accelerators._compile.pallas_kernels_of", case) == 2


@pytest.mark.parametrize("dtype", KERNELS)
def test_norms_of_a_model(call, dtype):
    case = Case("h100", PALLAS, "LayerNorm", dtype, "mlp", MODEL_ROWS)
    cases = case, case._replace(library="eqx"), case._replace(library=NO_NORM, layer="")
    models = [call("accelerators._compile.cost_of", c) for c in cases]
    (outcome,) = outcomes({"layers": [], "models": models})
    assert outcome.verdict == "met", outcome


@pytest.mark.parametrize("platform", ("h100", "v5e"))
def test_a_sharded_jit_gathers_no_rows(call, platform):
    """The plain path, of which four devices exchange dweight and dbias alone."""
    case = Split(platform, PALLAS, "batch")
    collectives = call("accelerators._compile.collectives_of", case)["collectives"]
    assert list(collectives) == ["all-reduce"]
    assert collectives["all-reduce"][1] == 4 * 2 * case.shape[1]
