"""The benchmark of accelerators: that it counts right, and that what is written is one story.

Oracles: sums by hand. Nothing here compiles for an accelerator; `test_accelerators.py` does.
"""

import contextlib
import json
from concurrent.futures import Future

import pytest

from benchmarks.accelerators.__main__ import (
    BEGIN,
    END,
    PAGE,
    PAGE_FILES,
    filled,
    main,
    options,
    tasks,
)
from benchmarks.accelerators._cases import NO_NORM, PALLAS, Case
from benchmarks.accelerators._hlo import Cost, Program, nbytes
from benchmarks.accelerators._report import report
from benchmarks.accelerators._targets import by_case, outcomes, ratio

# ---- Costs, from the text of a program

# A loop of 8 turns: each puts a row into a stack, in place, and reads one of another stack.
LOOP = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%put (stack: f32[8,16], row: f32[16], at: s32[]) -> f32[8,16] {
  %stack = f32[8,16]{1,0} parameter(0)
  %row = f32[16]{0} parameter(1)
  %at = s32[] parameter(2)
  %doubled = f32[1,16]{1,0} fusion(%row), kind=kLoop, calls=%double
  %zero = s32[] constant(0)
  ROOT %put.1 = f32[8,16]{1,0} dynamic-update-slice(%stack, %doubled, %at, %zero)
}

%take (stack: f32[8,16], at: s32[]) -> f32[16] {
  %stack.1 = f32[8,16]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %row.1 = f32[1,16]{1,0} dynamic-slice(%stack.1, %at.1, %zero.1), dynamic_slice_sizes={1,16}
  ROOT %flat = f32[16]{0} bitcast(%row.1)
}

%body (state: (s32[], f32[8,16], f32[8,16])) -> (s32[], f32[8,16], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}, /*index=2*/f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %from = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %to = f32[8,16]{1,0} get-tuple-element(%state), index=2
  %taken = f32[16]{0} fusion(%from, %i), kind=kLoop, calls=%take
  %next = f32[8,16]{1,0} fusion(%to, %taken, %i), kind=kLoop, calls=%put
  %one = s32[] constant(1)
  %more = s32[] add(%i, %one)
  ROOT %state.1 = (s32[], f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%more, %from, %next)
}

%condition (state.2: (s32[], f32[8,16], f32[8,16])) -> pred[] {
  %state.2 = (s32[], f32[8,16]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %turns = s32[] constant(8)
  ROOT %again = pred[] compare(%i.2, %turns), direction=LT
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %start = s32[] constant(0)
  %empty = f32[8,16]{1,0} copy(%x)
  %states = (s32[], f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%start, %x, %empty)
  %loop = (s32[], f32[8,16]{1,0}, f32[8,16]{1,0}) while(%states), condition=%condition, body=%body
  ROOT %done = f32[8,16]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_a_loop_counts_for_each_turn_and_slices_for_their_own_size():
    copy = 2 * 8 * 16 * 4
    taken = 16 * 4 + 16 * 4 + 4  # a row read and written, the index read
    put = 16 * 4 + 16 * 4 + 4
    counters = 3 * 4 + (4 + 4 + 1)  # i + 1, its two operands; i < 8
    want = Cost(1 + 8 * 4, copy + 8 * (taken + put + counters), 0)
    assert Program(LOOP).cost() == want


def test_what_is_begun_counts_as_what_is_done():
    fusion = "%taken = f32[16]{0} fusion(%from, %i), kind=kLoop, calls=%take"
    begun = (
        "%begun = ((f32[8,16]{1,0}, s32[]), f32[16]{0}, u32[]) fusion-start(%from, %i), "
        "kind=kLoop, calls=%take\n  %taken = f32[16]{0} fusion-done(%begun)"
    )
    assert fusion in LOOP
    assert Program(LOOP.replace(fusion, begun)).cost() == Program(LOOP).cost()


def test_an_array_counts_once_whatever_it_is_called():
    text = """\
%sum (a: f32[8], b: f32[8], c: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %c = f32[8]{0} parameter(2)
  %ab = f32[8]{0} add(%a, %b)
  ROOT %abc = f32[8]{0} add(%ab, %c)
}

ENTRY %main (x: f32[8], y: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %flat = f32[8]{0} bitcast(%x)
  %kept = (f32[8]{0}, f32[8]{0}) tuple(%y, %flat)
  %kept.1 = f32[8]{0} get-tuple-element(%kept), index=1
  ROOT %z = f32[8]{0} fusion(%x, %kept.1, /*index=2*/%y), kind=kLoop, calls=%sum
}
"""
    assert Program(text).cost() == Cost(1, 3 * 32, 0)  # x and y read, z written


def test_how_often_a_loop_turns():
    known = LOOP.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"},"x":1}'
    )
    assert Program(known).cost().kernels == 1 + 3 * 4
    unknown = LOOP.replace("s32[] constant(8)", "s32[] get-tuple-element(%state.2), index=0")
    with pytest.raises(ValueError, match="how often loop turns"):
        Program(unknown).cost()


def test_cycles_and_layouts_of_a_tpu():
    text = """\
ENTRY %main.3 (x.1: bf16[16,128]) -> bf16[16,128] {
  %x.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(bf16[16,128]{1,0:T(8,128)(2,1)} %x.1), \
kind=kLoop, calls=%nowhere, backend_config={"window_config":{},"estimated_cycles":"1200"}
  ROOT %z = bf16[16,128]{1,0:T(8,128)(2,1)} copy(%y), backend_config={"estimated_cycles":"34"}
}
"""
    assert Program(text).cost() == Cost(2, 4 * 16 * 128 * 2, 1234)


@pytest.mark.parametrize(
    "shape, want",
    [
        ("f32[8,4]{1,0}", 128),
        ("(f32[8,4]{1,0}, pred[])", 129),
        ("bf16[]", 2),
        ("s4[3]", 2),
        ("f8e4m3fn[5]", 5),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, want):
    assert nbytes(shape) == want


def test_collectives_are_counted_with_what_they_give():
    text = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), to_apply=%add
  %done = f32[8]{0} all-reduce-done(%start)
  %both = (f32[8]{0}, f32[4]{0}) all-reduce(%done, %x), to_apply=%add
  ROOT %all = f32[32]{0} all-gather(%done), dimensions={0}
}
"""
    assert Program(text).collectives() == {"all-reduce": (2, 32 + 48), "all-gather": (1, 128)}


# ---- Targets and tables


def row(library, cost, temporaries=0, **changes):
    case = Case("h100", library, "LayerNorm", "float32", "tanh", "8192x1024")
    case = case._replace(**({"layer": ""} if library == NO_NORM else {}) | changes)
    return case._asdict() | {"cost": cost, "kernels": 7, "temporaries": temporaries}


def run_of(*models, version="1"):
    env = {"date": "2026-01-01", "cores": 2, "cpu": "A CPU", "python": "3.12"}
    about = {"minutes": 1, "interrupted": False, "failed": [], "layers": [], "collectives": []}
    return about | {"environment": env | {"versions": {"jax": version}}, "models": list(models)}


def test_the_part_of_the_norm_is_what_it_adds():
    found = by_case([row("ours", 8.0), row("eqx", 10.0), row(NO_NORM, 4.0)])
    ours = next(case for case in found if case.library == "ours")
    assert ratio(found, ours, "cost") == 0.8
    assert ratio(found, ours, "cost", part=True) == (8 - 4) / (10 - 4)
    assert ratio(found, ours, "cost", library="flax") is None
    assert ratio(found, ours, "temporaries") is None  # 0 of 0


@pytest.mark.parametrize("without, want", [(9.8, (9.9 - 9.8) / (10 - 9.8)), (9.95, None)])
def test_a_part_that_is_next_to_nothing_has_no_ratio(without, want):
    found = by_case([row("ours", 9.9), row("eqx", 10.0), row(NO_NORM, without)])
    ours = next(case for case in found if case.library == "ours")
    assert ratio(found, ours, "cost", part=True) == want
    assert ratio(found, ours, "cost") == 0.99


@pytest.mark.parametrize(
    "changes, cost, verdict",
    [
        ({}, 1.02, "met"),
        ({}, 1.03, "missed"),
        ({"dtype": "bfloat16"}, 0.98, "missed"),
        ({"dtype": "bfloat16"}, 0.97, "met"),
        ({"dtype": "bfloat16", "layer": "RMSNorm"}, 1.02, "met"),
        ({"dtype": "bfloat16", "platform": "v5e"}, 1.02, "met"),
    ],
)
def test_targets(changes, cost, verdict):
    rows = row("ours", cost, **changes), row("eqx", 1.0, **changes)
    (outcome,) = outcomes(run_of(*rows))
    assert outcome.verdict == verdict


@pytest.mark.parametrize(
    "work, dtype, limit",
    [
        ("backward", "float32", 22),
        ("backward", "bfloat16", 12),
        ("mlp", "float32", 0.95),
        ("mlp", "bfloat16", 0.6),
    ],
)
def test_targets_of_kernels(work, dtype, limit):
    """Bytes an element of one layer, and in a model what the norms move, of eqx.nn's."""
    changes = {"work": work, "dtype": dtype}
    if work == "mlp":
        beside = [row("eqx", 100, **changes), row(NO_NORM, 90, **changes)]
        cost = lambda share: 90 + 10 * share
    else:
        beside, cost = [], lambda share: 8192 * 1024 * share
    for share, verdict in ((limit - 0.01, "met"), (limit + 0.01, "missed")):
        (outcome,) = outcomes(run_of(row(PALLAS, cost(share), **changes), *beside))
        assert outcome.verdict == verdict and "kernels" in outcome.target


def test_kernels_stand_beside_the_plain_path():
    size = 8192 * 1024 * 6
    models = [row("ours", 20 * size), row("eqx", 25 * size), row(PALLAS, 15 * size)]
    text = report(run_of(*models, row(NO_NORM, 5 * size)))
    assert "| eqx_norms / eqx.nn | eqx_norms, pallas / eqx.nn |" in text
    assert "| 20.0 (15.0) | 25.0 (20.0) | 15.0 (10.0) | 0.80 (0.75) | 0.60 (0.50) |" in text
    cases = [case for section, _, case in tasks(options([])) if section != "collectives"]
    kernels = [case for case in cases if case.library == PALLAS]
    assert {(case.platform, case.layer) for case in kernels} == {
        ("h100", "LayerNorm"),
        ("h100", "RMSNorm"),
    }
    splits = [case for section, _, case in tasks(options([])) if section == "collectives"]
    assert splits and all(case.library != PALLAS for case in splits)


def test_a_scan_that_misses_says_what_is_there_without_norms():
    scan = {"work": "mlp scan", "dtype": "bfloat16"}
    rows = row("ours", 9, 92, **scan), row("eqx", 10, 100, **scan), row(NO_NORM, 5, 80, **scan)
    cost, temporaries = outcomes(run_of(*rows))
    assert cost.verdict == "met" and temporaries.verdict == "missed"
    assert "scan of 8 MLP blocks, LayerNorm bfloat16 (without norms 0.80) | 0.92 |" in report(
        run_of(*rows)
    )


def test_versions_stand_beside_each_other():
    size = 8192 * 1024 * 6
    rows = row("ours", 20 * size), row("eqx", 25 * size), row(NO_NORM, 15 * size)
    text = report(run_of(*rows, version="2"), run_of(*rows[:2], version="1"))
    cells = "| 6 [norm, matmul, tanh] | LayerNorm | float32 |"
    assert f"{cells} 20.0 (5.0) | 25.0 (10.0) | 0.80 (0.50) |" in text
    assert f"{cells} 20.0 | 25.0 | 0.80 |" in text
    assert text.index("**jax 2**") < text.index("**jax 1**")


def test_the_page_shows_its_results():
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1 and filled(page) == page
    assert all(f"({path.relative_to(PAGE.parent)})" in page for path in PAGE_FILES.glob("*.png"))


def test_what_is_asked_for():
    everything = tasks(options([]))
    cases = [case for section, _, case in everything if section != "collectives"]
    assert len(cases) == len(set(cases))
    some = tasks(options("--only models --platform v5e --layer RMSNorm --dtype float32".split()))
    assert {case.platform for _, _, case in some} == {"v5e"}
    assert {case.layer for _, _, case in some} == {"RMSNorm", ""}
    assert set(some) < set(everything) and set(tasks(options(["--quick"]))) < set(everything)
    with pytest.raises(SystemExit):
        options(["--platform", "a100"])


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    """Nothing is compiled: each program costs as much as its place, the fourth is Ctrl-C."""
    asked = []

    @contextlib.contextmanager
    def children(count):
        def submit(name, case):
            asked.append(case)
            future = Future()
            if len(asked) == 4:
                future.set_exception(KeyboardInterrupt())
            else:
                cost = {"kernels": 1, "cost": len(asked), "temporaries": 0}
                future.set_result(case._asdict() | cost)
            return future

        yield submit

    monkeypatch.setattr("benchmarks.accelerators.__main__.children", children)
    command = "--only models --platform h100 --layer RMSNorm --dtype float32".split()
    command += ["--out", str(tmp_path)]
    read = lambda: json.loads((tmp_path / "results.json").read_text())
    main(command)
    first, all_of_them = read(), len(asked)
    assert first["interrupted"] and len(first["models"]) < all_of_them

    asked[:] = [None] * 4
    main([*command, "--resume"])
    second = read()
    assert not second["interrupted"] and not second["failed"]
    assert len(asked) - 4 == all_of_them - len(first["models"])
    assert second["models"][: len(first["models"])] == first["models"]
    assert len(by_case(second["models"])) == all_of_them
    assert (tmp_path / "tables.md").read_text().endswith(report(second))
