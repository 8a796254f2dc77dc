"""One optimizer step as a pure function over flat dictionaries."""

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from llava_jax.compiler import compiler_options, products_in
from llava_jax.models.attention import ATTENTION, Attend, attend_xla
from llava_jax.models.layers import Remat
from llava_jax.models.lora import DROPOUT, dropout_keys
from llava_jax.models.parameters import GraphDef, Parameters, bind
from llava_jax.models.quantized import is_quantized
from llava_jax.train import cudnn, processes
from llava_jax.train.config import TrainConfig
from llava_jax.train.cross_entropy import cross_entropy
from llava_jax.train.objectives import Context, Objective, Sums
from llava_jax.train.sharding import batch_sharding, make_constrain
from llava_jax.train.splash import make_splash
from llava_jax.train.state import Layout

# Ends of the paths of what all tokens or pictures share, but matrices.
SHARED = (".scale", ".bias", "image_newline", "class_embedding", "position_embedding", "logit_scale")
# Batch entries that no objective sees.
TALLIED = ("checksum", "num_replaced")

# What a layer keeps for its backward pass, by what is computed again (`TrainConfig.remat`). Attention names its result;
# cuDNN's kernel has no names inside, so what else its gradient needs is recognised by what the kernel is called.
_POLICIES = jax.checkpoint_policies


def _keeps_attention(primitive: Any, *operands: Any, **settings: Any) -> bool:
    is_kernel = primitive.name.startswith(cudnn.KERNEL)
    return is_kernel or _POLICIES.save_only_these_names(ATTENTION)(primitive, *operands, **settings)


REMAT: dict[str, Remat] = {
    "nothing": None,
    "elementwise": functools.partial(
        jax.checkpoint,
        policy=_POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, _keeps_attention),
    ),
    "linear": functools.partial(jax.checkpoint, policy=_keeps_attention),
    "everything": jax.checkpoint,
}
Metrics = dict[str, Array]
Step = Callable[[Parameters, Parameters, Any, Mapping[str, Array]], tuple[Parameters, Any, Metrics]]


def jit_step(layout: Layout, optimizer: optax.GradientTransformation, *, most_records: int) -> jax.stages.Wrapped:
    """The tallied step of a config on its mesh: sharded, its state donated, ready to be lowered.

    Training runs it and `llava-jax plan` compiles it for devices that are not there. No row of a batch may hold more
    than `most_records` records.
    """
    config, mesh = layout.config, layout.mesh
    assert isinstance(mesh, Mesh), "a step is made for devices"
    step = make_step(
        layout.graphdef,
        config.objective,
        optimizer,
        context=make_context(config, mesh, most_records=most_records),
        accumulation=config.accumulation,
        compute_dtype=config.compute_dtype,
        bound=layout.bound,
        seed=config.seed,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (layout.memory[0], layout.memory[2]))
    return jax.jit(
        tallied(step),
        donate_argnums=(0, 2),
        out_shardings=(*shardings, NamedSharding(mesh, P())),
        compiler_options=compiler_options(mesh.devices.flat[0]),
    )


def make_context(config: TrainConfig, mesh: Mesh, *, most_records: int) -> Context:
    """What an objective is given on these devices."""
    return Context(
        attend=make_attend(mesh, most_records=most_records),
        constrain=make_constrain(mesh),
        remat=REMAT[config.remat],
        cross_entropy=functools.partial(cross_entropy, mesh=mesh),
    )


def make_attend(mesh: Mesh, *, most_records: int) -> Attend:
    """The attention of a mesh's devices: splash on TPUs, cuDNN's on GPUs that can, plain XLA elsewhere."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return make_splash(mesh)
    if device.platform != "gpu":
        return attend_xla
    # What is compiled for GPUs that are not here cannot be tried.
    can = _has_cudnn() if _is_here(device) else cudnn.is_known(device)
    return cudnn.make_cudnn(mesh, most_records) if can else attend_xla


def _is_here(device: Any) -> bool:
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:
        return False


@functools.cache
def _has_cudnn() -> bool:
    """Whether the kernel works on the GPUs of every process; those on which it does not say so, once."""
    reason = cudnn.why_not()
    if reason is not None:
        print(f"attention: plain XLA's; cuDNN's is not used: {reason}", file=sys.stderr, flush=True)
    return processes.all_agree("cudnn", reason is None)


def make_step(
    graphdef: GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    context: Context,
    accumulation: int,
    compute_dtype: jax.typing.DTypeLike,
    bound: Mapping[str, Any] = types.MappingProxyType({}),
    seed: int = 0,
) -> Step:
    """The step `(trainable, frozen, opt_state, batch) -> (trainable, opt_state, metrics)`.

    Only `trainable` is differentiated, so frozen parts get neither gradients nor moments nor saved activations.
    Micro-batches add sums and counts; the one division comes last and is guarded, so that a batch without a
    supervised token has zero gradient, not NaN. A step whose loss or gradient is not finite updates nothing
    and says so in `metrics["finite"]`; `metrics["computed"]` is the share of micro-batches that were not skipped.

    `bound` is what the model is bound to, abstractly; where that includes keys of dropout, each micro-batch of each
    step gets its own, from the seed and the optimizer's count alone.
    """

    drops = any(name.endswith(DROPOUT) for name in bound)

    def sums_and_gradients(
        trainable: Parameters, frozen: Parameters, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Sums, Parameters]:
        def total(trainable: Parameters) -> tuple[Array, Sums]:
            sums = objective(bind(graphdef, trainable | frozen | dropout_keys(bound, key)), batch, context)
            return sums.loss, sums

        (_, sums), gradients = jax.value_and_grad(total, has_aux=True)(trainable)
        return sums, gradients

    @products_in(compute_dtype)
    def step(trainable: Parameters, frozen: Parameters, opt_state: Any, batch: Mapping[str, Array]):
        key = jax.random.key(seed)
        if drops:
            key = jax.random.fold_in(key, opt_state[-1].count)
        # Cast here, not within, so that it is done once for all micro-batches.
        compute = functools.partial(sums_and_gradients, *(cast(x, compute_dtype) for x in (trainable, frozen)))
        if accumulation == 1:
            (sums, gradients), computed = compute(batch, key), jnp.ones(())
        else:
            (sums, gradients), computed = _accumulate(compute, batch, key, accumulation)
        scale = 1.0 / jnp.maximum(sums.weight, 1.0)
        gradients = {name: gradient.astype(trainable[name].dtype) * scale for name, gradient in gradients.items()}
        loss, norm = sums.loss * scale, optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, new_state = optimizer.update(gradients, opt_state, trainable)
        new_trainable = optax.apply_updates(trainable, updates)
        kept_trainable, kept_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new_trainable, new_state), (trainable, opt_state)
        )
        metrics = {"loss": loss, "grad_norm": norm, "finite": finite, "weight": sums.weight, "computed": computed}
        metrics |= sums.counts
        return kept_trainable, kept_state, metrics

    return step


def cast(values: Parameters, dtype: jax.typing.DTypeLike) -> Parameters:
    """Parameters in the dtype that a step computes in.

    Codes and their scales are dequantized to it as they are. What all tokens or pictures share stays as it is: its
    gradient is a sum over them, which would stop growing in bfloat16, and layers round what they compute with it.
    """
    return {name: value if _stays(name) else value.astype(dtype) for name, value in values.items()}


def _stays(name: str) -> bool:
    return is_quantized(name) or name.endswith(SHARED)


def _accumulate(
    compute: Callable[[Mapping[str, Array], Key[Array, ""]], tuple[Sums, Parameters]],
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    accumulation: int,
) -> tuple[tuple[Sums, Parameters], Float[Array, ""]]:
    """Adds up the sums and gradients of `accumulation` micro-batches, and says which share of them held any token.

    The others are skipped; `process_places` makes them whole. Micro-batch j takes rows j, j + accumulation, ...: a
    share of every device's rows, so that nothing moves.
    """
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    is_needed = (micro_batches["segment_ids"] > 0).any(axis=(1, 2))
    keys = jax.random.split(key, accumulation)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(compute, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)

    def body(total: Any, x: tuple[Any, ...]) -> tuple[Any, None]:
        *micro_batch, is_needed = x
        add = functools.partial(jax.tree.map, jnp.add)
        return jax.lax.cond(is_needed, lambda: add(total, compute(*micro_batch)), lambda: total), None

    total, _ = jax.lax.scan(body, zeros, (micro_batches, keys, is_needed))
    return total, is_needed.mean()


def abstract_tallies(mesh: Mesh, num_rows: int) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """What `tallied` needs besides a step's rows: entries of the batch, and the votes of the devices."""
    rows = batch_sharding(mesh)
    entries = {
        name: jax.ShapeDtypeStruct((num_rows,), dtype, sharding=rows)
        for name, dtype in zip(TALLIED, (jnp.uint32, jnp.int32), strict=True)
    }
    return entries, jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, P(mesh.axis_names)))


def tallied(step: Step) -> Callable[..., tuple[Parameters, Any, Metrics]]:
    """The step, which also adds up what each host says of its rows and whether it was asked to stop."""

    def tallied_step(
        trainable: Parameters, frozen: Parameters, opt_state: Any, batch: Mapping[str, Array], votes: Array
    ):
        rows = {name: value for name, value in batch.items() if name not in TALLIED}
        trainable, opt_state, metrics = step(trainable, frozen, opt_state, rows)
        tallies = {
            "records": jnp.sum(batch["checksum"], dtype=jnp.uint32),
            "replaced": jnp.sum(batch["num_replaced"]),
            "stop_votes": jnp.sum(votes),
        }
        return trainable, opt_state, metrics | tallies

    return tallied_step
