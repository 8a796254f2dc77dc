"""Devices that are not here, as their compilers know them: TPUs of libtpu, GPUs of XLA and cuDNN."""

import ctypes
import functools
import os
import re
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jaxtyping import Array

from llava_jax.chips import GPUS, Gpu
from llava_jax.errors import UserError
from llava_jax.models.attention import Scope
from llava_jax.train import cudnn
from llava_jax.train.environment import GPU_FLAGS
from llava_jax.train.sharding import MeshConfig, batch_sharding, make_mesh
from llava_jax.train.step import make_attend

# GPUs that NVLink joins in one host.
HOST = 8
# Kernels of cuDNN are compiled too, though no GPU is there to ask (openxla/xla PR 41021); products are cuBLAS', since
# Triton's would have to be timed.
OPTIONS: dict[str, str | bool] = {
    "xla_gpu_cudnn_deviceless_compilation_mode": "CUDNN_DEVICELESS_COMPILATION_ALWAYS",
    "xla_gpu_enable_triton_gemm": False,
}
# XLA's description of a GPU (`GpuTargetConfigProto`): what NVIDIA publishes of the chip, and the limits of its
# architecture ("Compute Capabilities" in the CUDA C++ Programming Guide).
DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores}
  fpus_per_core: {lanes}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  shared_memory_per_core: {shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {most_shared}
  threads_per_core_limit: {threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def tpus(topology: str) -> list[Any]:
    """The devices of a slice such as `v5e:4x4`, a v4 chip one.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if find_spec("libtpu") is None:
        raise UserError("The TPU compiler, libtpu, is not installed. Run pip install -e '.[plan]'.")
    try:
        chip = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip).devices)
    except Exception as error:  # The library raises what its parts raise.
        raise UserError(f"The TPU compiler does not give --topology {topology!r}: {_first_line(error)}") from None


def gpus(kind: str, count: int) -> list[Any]:
    """So many GPUs, eight a host where that divides them."""
    hosts = count // HOST if count % HOST == 0 else 1
    description = _describe(kind, GPUS[kind])
    shape = f"1x{hosts}x{count // hosts}"
    return list(topologies.get_topology_desc(platform="cuda", target_config=description, topology=shape).devices)


@functools.cache
def no_gpu_compiler(kind: str) -> str | None:
    """What keeps a kind of GPUs from being compiled for on this machine; found by compiling attention for one."""
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        return "the compiler for GPUs is not installed (pip install -e '.[plan_gpu]', for Python 3.12 and newer)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "libcuda.so.1 is not there, which comes with NVIDIA's driver and which cuDNN needs"
    try:
        mesh = make_mesh(MeshConfig(), gpus(kind, 1))
        q = jax.ShapeDtypeStruct((1, 256, 1, 128), jnp.bfloat16, sharding=batch_sharding(mesh))
        ids = jax.ShapeDtypeStruct((1, 256), jnp.int32, sharding=batch_sharding(mesh))
        attend = make_attend(mesh, most_records=1)

        def total(q: Array, k: Array, v: Array, ids: Array) -> Array:
            return attend(q, k, v, Scope(ids, ids, ids, ids, causal=True)).astype(jnp.float32).sum()

        compile_absent(jax.jit(jax.grad(total, (0, 1, 2))), q, q, q, ids)
    except Exception as error:  # Whatever a compiler, or a library of another version, comes up with.
        return (
            f"what is installed is not what '.[plan_gpu]' asks for, or JAX_PLATFORMS is not cpu: {_first_line(error)}"
        )
    return None


def compile_absent(program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """The program for the devices of its arguments, which are not here."""
    devices = {device for leaf in jax.tree.leaves(arguments) for device in leaf.sharding.device_set}
    if any(device.platform != "gpu" for device in devices):
        return program.lower(*arguments).compile()
    # Also what `llava-jax train` would set on such a machine, unless it is set.
    name = GPU_FLAGS[0].removeprefix("--").split("=")[0]
    exact = {} if name in os.environ.get("XLA_FLAGS", "") else {name: True}
    with cudnn.for_absent_gpus():
        lowered = program.lower(*arguments)
    return lowered.compile(compiler_options=OPTIONS | exact)


def compiler_version(platform: str) -> str:
    """The compilers of a platform, by the versions of their packages."""
    names = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-pjrt", "nvidia-cudnn-cu13")}[platform]
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # On a TPU machine it may lie in the system and not among the packages.
        return "unknown"


def _describe(kind: str, gpu: Gpu) -> str:
    major, minor = gpu.capability
    version = [*re.findall(r"\d+", _version("nvidia-cudnn-cu13")), 0, 0, 0]
    return DESCRIPTION.format(
        name=f"NVIDIA {kind.upper()}",
        major=major,
        minor=minor,
        cores=gpu.cores,
        lanes=gpu.lanes,
        clock=gpu.clock,
        memory=gpu.hbm_bytes,
        bandwidth=int(gpu.memory),
        l2=gpu.l2_bytes,
        shared=gpu.shared_bytes,
        # A block may have all of a core's but what the system keeps.
        most_shared=gpu.shared_bytes - 1024,
        threads=gpu.threads,
        cudnn=version,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
