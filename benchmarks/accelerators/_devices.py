"""Devices that are described, not present: XLA compiles for them all the same."""

import contextlib
import functools as ft
import importlib.metadata
import os
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

# No process here holds a TPU, so that several may compile for one; and nobody is asked for one.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

PACKAGES = {"h100": "jax-cuda12-plugin", "v5e": "libtpu", "v6e": "libtpu"}
# An H100 SXM, as XLA asks for it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def lowering_platform(platform: str) -> str:
    return "cuda" if platform == "h100" else "tpu"


@ft.cache
def devices(platform: str, count: int = 1) -> list[jax.Device]:
    """One or four of them."""
    try:
        importlib.metadata.version(PACKAGES[platform])
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f'Compiling for {platform} needs {PACKAGES[platform]}: pip install -e ".[accelerators]"'
        ) from error
    if platform == "h100":
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology=f"1x{count}x1",
            target_config=_H100,
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{platform}:2x2")
    return described.devices[:count]


@contextlib.contextmanager
def known_to_pallas(platform: str) -> Iterator[None]:
    """Tells JAX of 0.12 and later for which GPU it compiles a kernel; older ones do not ask."""
    if platform != "h100" or jax.__version_info__ < (0, 12):
        yield
        return
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("_",), axis_types=(AxisType.Auto,), abstract_device=device)
    # Nothing public says so: that a "gpu" is "cuda", JAX looks up among the devices that are there.
    named = "jax._src.xla_bridge.canonicalize_platform"
    with use_abstract_mesh(mesh), mock.patch(named, lambda name: "cuda" if name == "gpu" else name):
        yield
