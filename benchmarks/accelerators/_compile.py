"""Compiles one program, and reads what it costs."""

import jax

from ._cases import Case, Split
from ._devices import lowering_platform
from ._hlo import Program
from ._programs import program, split_program


def cost_of(case: Case) -> dict:
    """`kernels`, `cost` (bytes on the H100, estimated cycles on a TPU), `temporaries` in bytes."""
    compiled = _compile(case.platform, *program(case))
    cost = Program(compiled.as_text()).cost()
    return case._asdict() | {
        "kernels": cost.kernels,
        "cost": cost.bytes if case.platform == "h100" else cost.cycles,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def collectives_of(case: Split) -> dict:
    """How many of each collective, and the bytes of their results on each device."""
    text = _compile(case.platform, *split_program(case)).as_text()
    return case._asdict() | {"collectives": Program(text).collectives()}


def _compile(platform: str, function, args):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(lowering_platform(platform),)).compile()
