"""Which module may import which: arrows point one way, and there are no circles.

The picture is that of CONTRIBUTING.md. Imports are read from the source, those inside functions
included, so that nothing has to be run.
"""

import ast
import pathlib
import types

import pytest

import eqx_norms

PACKAGE = pathlib.Path(eqx_norms.__file__).parent
NORMS = {"_layer_norm", "_rms_norm", "_group_norm", "_ada_layer_norm", "_replace", "_is_norm"}
NORMS |= {"_cumulative_norm", "_segment_norm", "_steps"}
ROOMS = ("causality", "diagnostics")


def modules():
    """Every module of the package by its dotted name within it; a room's face by the room's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imported(name, path, known):
    """The modules of the package that one of them imports."""
    here = name.split(".") if name else []
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            yield inner if inner in known else target


KNOWN = dict(modules())
ARROWS = {name: {*imported(name, path, KNOWN)} - {name} for name, path in KNOWN.items()}


def test_something_is_read():
    assert len(KNOWN) > 40
    assert "_op._normalize" in ARROWS["_op"]


def test_there_are_no_circles():
    floors = {}

    def floor(name, above=()):
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in floors:
            floors[name] = 1 + max((floor(to, (*above, name)) for to in ARROWS[name]), default=0)
        return floors[name]

    for name in ARROWS:
        floor(name)
    assert max(floors.values()) > 3


@pytest.mark.parametrize("room", ROOMS)
def test_instruments_import_no_norm(room):
    for name, targets in ARROWS.items():
        if name.split(".")[0] == room:
            others = {to.split(".")[0] for to in targets} - {room}
            assert not others & (NORMS | {"_op"}), f"{name} imports {others}"


def test_layers_see_one_door():
    """And nothing below it knows a layer, or an instrument."""
    for name, targets in ARROWS.items():
        below = {to for to in targets if to.split(".")[0] == "_op"}
        if name.split(".")[0] == "_op":
            assert not {to.split(".")[0] for to in targets} & (NORMS | {*ROOMS}), name
        elif below:
            assert below == {"_op"}, f"{name} goes past the door of _op: {below}"


def test_all_public_names_are_listed():
    """So that `help(eqx_norms)` shows them."""
    is_public = lambda name, value: name[0] != "_" and not isinstance(value, types.ModuleType)
    assert {*eqx_norms.__all__} == {
        n for n, value in vars(eqx_norms).items() if is_public(n, value)
    }
    for name in eqx_norms.__all__:
        assert getattr(eqx_norms, name).__doc__
