"""What the figures depend on; no name of a machine."""

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "equinox", "flax", "dm-haiku", "keras", "torch", "numpy")


def environment() -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "cores": cores(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
    }


def cores() -> int:
    """As many as this process may use: what XLA takes by default, and torch is given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
