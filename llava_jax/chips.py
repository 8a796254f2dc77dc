"""What makers publish of their chips: memory, peak speed, bandwidth."""

import dataclasses

GIB = 2**30
# What the launchers let JAX take of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION); by itself it takes 0.75.
GPU_SHARE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peaks of one device as JAX counts devices: dense bfloat16 FLOP/s, bytes/s of memory, bytes/s that come in.

    `link` is all links of a device together, one direction; `kept_bytes` of its memory no program is given.
    """

    hbm_bytes: int
    flops: float
    memory: float
    link: float
    kept_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        return self.hbm_bytes - self.kept_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """What XLA's compiler asks about a GPU beside its peaks.

    `cores` are streaming multiprocessors, each with `lanes` float32 units, `threads` at most and `shared_bytes` of
    shared memory; `clock` is the boost clock in GHz.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    clock: float
    l2_bytes: int
    shared_bytes: int

    @property
    def usable_bytes(self) -> int:
        return round(GPU_SHARE * self.hbm_bytes)


# cloud.google.com/tpu/docs: v4, v5e, v5p, v6e, tpu7x. A tpu7x chip is two devices, so its figures are halved. Where
# the pages give two link speeds, it is the faster: a bound may be too low, never too high. What is kept of the memory,
# their compiler says when it refuses a program.
TPUS = {
    "v4": Chip(hbm_bytes=32 * GIB, kept_bytes=int(1.25 * GIB), flops=275e12, memory=1228e9, link=300e9),
    "v5e": Chip(hbm_bytes=16 * GIB, kept_bytes=int(0.25 * GIB), flops=197e12, memory=819e9, link=200e9),
    "v5p": Chip(hbm_bytes=95 * GIB, flops=459e12, memory=2765e9, link=600e9),
    "v6e": Chip(hbm_bytes=32 * GIB, kept_bytes=int(0.75 * GIB), flops=918e12, memory=1640e9, link=448e9),
    "tpu7x": Chip(hbm_bytes=96 * GIB, kept_bytes=int(1.25 * GIB), flops=1153.5e12, memory=3690e9, link=600e9),
}
AMPERE = {"capability": (8, 0), "cores": 108, "lanes": 64, "threads": 2048, "clock": 1.41, "shared_bytes": 164 * 1024}
HOPPER = {"capability": (9, 0), "cores": 132, "lanes": 128, "threads": 2048, "clock": 1.98, "shared_bytes": 228 * 1024}
ADA = {"capability": (8, 9), "cores": 128, "lanes": 128, "threads": 1536, "clock": 2.52, "shared_bytes": 100 * 1024}
# NVIDIA's data sheets, SXM where there is one: bfloat16 without sparsity, NVLink (PCIe for the 4090) one way; the
# architectures' limits are those of "Compute Capabilities" in the CUDA C++ Programming Guide; the memory of Hoppers is
# what nvidia-smi reports.
GPUS = {
    "a100-40gb": Gpu(hbm_bytes=40 * GIB, flops=312e12, memory=1555e9, link=300e9, l2_bytes=40 * 2**20, **AMPERE),
    "a100-80gb": Gpu(hbm_bytes=80 * GIB, flops=312e12, memory=2039e9, link=300e9, l2_bytes=40 * 2**20, **AMPERE),
    "h100": Gpu(hbm_bytes=81559 * 2**20, flops=989.4e12, memory=3350e9, link=450e9, l2_bytes=50 * 2**20, **HOPPER),
    "h200": Gpu(hbm_bytes=143771 * 2**20, flops=989.4e12, memory=4800e9, link=450e9, l2_bytes=50 * 2**20, **HOPPER),
    "4090": Gpu(hbm_bytes=24 * GIB, flops=165.2e12, memory=1008e9, link=32e9, l2_bytes=72 * 2**20, **ADA),
}
# Devices by the name that JAX calls them (`device_kind`); a card that is not named here, such as one for PCIe with
# lower clocks, has no peak rather than a wrong one. No CPU is: their makers publish no peak of matrix products.
KINDS = {
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU7x": TPUS["tpu7x"],
    "NVIDIA A100-SXM4-40GB": GPUS["a100-40gb"],
    "NVIDIA A100-SXM4-80GB": GPUS["a100-80gb"],
    "NVIDIA H100 80GB HBM3": GPUS["h100"],
    "NVIDIA H200": GPUS["h200"],
    "NVIDIA GeForce RTX 4090": GPUS["4090"],
}
