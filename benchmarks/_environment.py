"""What the figures depend on; no name of a machine."""

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "equinox", "flax", "dm-haiku", "keras", "torch", "numpy")


def environment(packages: tuple[str, ...] = PACKAGES) -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "cores": cores(),
        "cpu": _cpu_info("model name") or platform.machine(),
        "vectors": _vectors(),
        "python": platform.python_version(),
        "versions": {package: version for package in packages if (version := _version(package))},
    }


def cores() -> int:
    """As many as this process may use: what XLA takes by default, and torch is given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vectors() -> str | None:
    """The widest vector instructions, which XLA compiles for."""
    flags = (_cpu_info("flags") or "").split()
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sse4_2": "SSE4.2"}
    return next((name for flag, name in known.items() if flag in flags), None)


def _cpu_info(field: str) -> str | None:
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)", info.read_text(), re.M) if info.exists() else None
    return found.group(1).strip() if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
