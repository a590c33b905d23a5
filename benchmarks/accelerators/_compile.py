"""Compiles one program, and reads what it costs."""

import contextlib
import re

import jax

from ._cases import PALLAS, Case, Split
from ._devices import known_to_pallas, lowering_platform
from ._hlo import Program
from ._programs import program, split_program


def cost_of(case: Case) -> dict:
    """`kernels`, `cost` (bytes on the H100, estimated cycles on a TPU), `temporaries` in bytes."""
    compiled = _compiled(case)
    cost = Program(compiled.as_text()).cost()
    return case._asdict() | {
        "kernels": cost.kernels,
        "cost": cost.bytes if case.platform == "h100" else cost.cycles,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def pallas_kernels_of(case: Case) -> int:
    """How many there are in the program."""
    text = _compiled(case).as_text()
    return len(re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla.gpu.triton)"', text))


def _compiled(case: Case):
    needed = known_to_pallas(case.platform) if case.library == PALLAS else contextlib.nullcontext()
    with needed:
        return _compile(case.platform, *program(case))


def collectives_of(case: Split) -> dict:
    """How many of each collective, and the bytes of their results on each device."""
    text = _compile(case.platform, *split_program(case)).as_text()
    return case._asdict() | {"collectives": Program(text).collectives()}


def _compile(platform: str, function, args):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(lowering_platform(platform),)).compile()
