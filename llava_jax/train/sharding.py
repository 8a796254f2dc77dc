"""Which device holds what: the mesh, one table from parameter path to axes, and the layout of activations."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import Constrain

# A plan's devices may be counted without being there.
AnyMesh = Mesh | AbstractMesh
# A batch's rows are spread over both; parameters over `fsdp` and `tensor`.
BATCH_AXES = ("data", "fsdp")

# First column: the whole path, without a stack's or a layer's number. Every parameter matches exactly one row.
RULES: tuple[tuple[str, P], ...] = (
    (r"decoder\.embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"decoder\.lm_head\.kernel", P("fsdp", "tensor")),
    (r"decoder\.layers\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.(kernel|codes)", P("fsdp", "tensor")),
    (r"decoder\.layers\.(self_attn\.o_proj|mlp\.down_proj)\.(kernel|codes)", P("tensor", "fsdp")),
    (r"decoder\.layers\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.absmax", P(None, "tensor")),
    (r"decoder\.layers\.(self_attn\.o_proj|mlp\.down_proj)\.absmax", P(None, "fsdp")),
    (r"decoder\.layers\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.lora_a", P("fsdp", None)),
    (r"decoder\.layers\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.lora_b", P(None, "tensor")),
    (r"decoder\.layers\.(self_attn\.o_proj|mlp\.down_proj)\.lora_a", P("tensor", None)),
    (r"decoder\.layers\.(self_attn\.o_proj|mlp\.down_proj)\.lora_b", P(None, "fsdp")),
    (r"decoder\.(norm|layers\.\w+_layernorm)\.scale", P()),
    (r"projector\.linear\.kernel", P("fsdp", "tensor")),
    (r"projector\.linear\.bias", P("tensor")),
    (r"(tower|caption)\.layers\.(self_attn\.[qkv]_proj|mlp\.fc1)\.kernel", P("fsdp", "tensor")),
    (r"(tower|caption)\.layers\.(self_attn\.[qkv]_proj|mlp\.fc1)\.bias", P("tensor")),
    (r"(tower|caption)\.layers\.(self_attn\.out_proj|mlp\.fc2)\.kernel", P("tensor", "fsdp")),
    (r"(tower|caption)\.layers\.(self_attn\.out_proj|mlp\.fc2)\.bias", P()),
    (r"(tower|caption)\.(layers\.)?\w*layer_?norm\d?\.(scale|bias)", P()),
    (r"tower\.patch_embedding\.kernel", P(None, "fsdp")),
    (r"(tower|caption)\.(class|position)_embedding", P()),
    (r"caption\.token_embedding\.embedding", P("tensor", "fsdp")),
    (r"(visual|text)_projection\.kernel", P("fsdp", "tensor")),
    (r"logit_scale|image_newline", P()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 takes all that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (by default all), with the compiler choosing layouts between our constraints."""
    devices = jax.devices() if devices is None else devices
    # Hosts of GPUs may count as slices, too; their network carries any mesh.
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise ValueError(f"A run takes one TPU slice; got {len(slices)}. Start it on one, of more chips if need be.")
    sizes = mesh_sizes(config, len(devices))
    # jax.make_mesh refuses an axis that is a part of one of the torus, as tensor=2 of a v6e:4x8.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis; refuses a mesh that does not use all of them."""
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [name for name, size in sizes.items() if size == -1]
    taken = 1
    for size in sizes.values():
        taken *= max(size, 1)
    if (
        min(sizes.values()) < -1
        or 0 in sizes.values()
        or len(free) > 1
        or num_devices % taken
        or (not free and taken != num_devices)
    ):
        raise ValueError(
            f"The mesh must use all {num_devices} devices, with at most one axis of -1; got "
            + ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
            + "."
        )
    if free:
        sizes[free[0]] = num_devices // taken
    return sizes


def partition(name: str) -> P:
    """The axes of one parameter; a stack of layers has its layer axis in front, on no mesh axis."""
    plain = re.sub(r"\.\d+(?=\.)", "", name)
    specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, plain)]
    if len(specs) != 1:
        raise ValueError(
            f"{len(specs)} sharding rules match {name}; exactly one must. Mend llava_jax/train/sharding.py:RULES."
        )
    is_stack = ".layers." in name and re.search(r"\.layers\.\d+\.", name) is None
    return P(None, *specs[0]) if is_stack else specs[0]


def parameter_shardings(params: Mapping[str, Any], mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Shardings of parameters by path; refuses dimensions that an axis does not divide, all of them at once."""
    specs = {name: partition(name) for name in params}
    problems = [
        f"{name} {value.shape} over {axis}={mesh.shape[axis]}"
        for name, value in params.items()
        for size, axis in zip(value.shape, specs[name], strict=False)
        if axis is not None and size % mesh.shape[axis]
    ]
    if problems:
        raise ValueError(
            "Every sharded dimension must be divisible by its mesh axis; not so: "
            + "; ".join(problems[:5])
            + ". Choose another mesh."
        )
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def like_parameters(tree: Any, shardings: Mapping[str, NamedSharding], mesh: AnyMesh) -> Any:
    """Shardings of an optimizer state: what has a parameter's path lies as that parameter, scalars everywhere."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        key = str(getattr(path[-1], "key", "")) if path else ""
        return shardings.get(key, NamedSharding(mesh, P()))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def num_batch_shards(mesh: AnyMesh) -> int:
    """How many equal parts the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_places(mesh: Mesh, num_rows: int, *, accumulation: int = 1) -> Int[np.ndarray, " k"]:
    """The rows of a batch of `num_rows` that this process reads, in the order in which its devices hold them.

    The first micro-batch takes the first rows, a run of them on each device, the second the next, and so on, so that
    rows without a record, the last of a batch, make up whole micro-batches.

    Example, 8 rows, 2 devices, accumulation=2, whose micro-batches are every other row of a device:
        device 0 holds 0, 4, 1, 5;  device 1 holds 2, 6, 3, 7   =>   micro-batches 0, 1 | 2, 3 and 4, 5 | 6, 7
    """
    if num_rows % num_batch_shards(mesh):
        raise ValueError(
            f"The rows of a step must be a multiple of the {num_batch_shards(mesh)} devices that share them; "
            f"got {num_rows}. Change data.batch_rows or the mesh."
        )
    slices = batch_sharding(mesh).addressable_devices_indices_map((num_rows,)).values()
    held = np.unique(np.concatenate([np.arange(num_rows)[index] for index in slices]))
    by_device = np.arange(num_rows).reshape(accumulation, num_batch_shards(mesh), -1).transpose(1, 2, 0)
    return by_device.ravel()[held]


def to_devices(
    batch: Mapping[str, np.ndarray],
    mesh: Mesh,
    places: Int[np.ndarray, " k"],
    num_rows: int,
    *,
    accumulation: int = 1,
) -> dict[str, jax.Array]:
    """This process's rows, those at `places`, as its share of the global batch; `record_ids` stay on the host."""

    def share(value: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every device has rows"
            first, last, _ = index[0].indices(num_rows)
            # The first that a device holds, it has of the first micro-batch.
            start = int(np.flatnonzero(places == first // accumulation)[0])
            return value[start : start + last - first]

        return jax.make_array_from_callback((num_rows, *value.shape[1:]), batch_sharding(mesh), rows)

    return {name: share(value) for name, value in batch.items() if name != "record_ids"}


def make_constrain(mesh: Mesh) -> Constrain:
    """Keeps the residual stream cut by rows; without it XLA gathers activations between layers."""
    sharding = NamedSharding(mesh, P(BATCH_AXES, None, None))

    def constrain(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return jax.lax.with_sharding_constraint(x, sharding)

    return constrain
