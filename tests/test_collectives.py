"""Collectives of compiled programs: kinds, axes, turns of loops and bytes, by hand."""

import json
import os
import subprocess
import sys

import pytest

from llava_jax.collectives import Collective, read_collectives
from tests.train.runs import ROOT

SCRIPT = """
import json
import jax, jax.numpy as jnp
from jax import P
from llava_jax.collectives import read_collectives

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def body(x, _):
    whole = jax.lax.all_gather(x, "fsdp", tiled=True)
    return x + jax.lax.psum_scatter(whole * 2, "fsdp", tiled=True), None

@jax.shard_map(mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")))
def run(x):
    x = jax.lax.scan(body, x, None, length=5)[0]
    x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
    return x + jax.lax.psum(x, "data") + jax.lax.psum(x.sum(), ("data", "fsdp"))

compiled = jax.jit(run).lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile()
print(json.dumps(read_collectives(compiled.as_text(), dict(mesh.shape))))
"""


def test_a_sharded_function_sends_what_it_says():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = {(kind, tuple(axes)): tuple(rest) for kind, axes, *rest in json.loads(result.stdout)}
    # A shard is 8 x 16 float32, 512 bytes; four of them are gathered and scattered again in each of five turns.
    assert found == {
        ("all-gather", ("fsdp",)): (5, 5 * 2048, 5 * 1536),
        ("reduce-scatter", ("fsdp",)): (5, 5 * 2048, 5 * 1536),
        ("collective-permute", ("fsdp",)): (1, 512, 512),
        ("all-reduce", ("data",)): (1, 512, 512),
        ("all-reduce", ("data", "fsdp")): (1, 4, 7),
    }


# As the TPU compiler writes: one gather in two pieces of a channel, in a loop that says its bound in its condition
# alone and, being unrolled, counts by two; a reduction that keeps a slice; groups by the names of a mesh.
TPU = """
HloModule jit_step

%piece.1 (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[256,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, GROUPS
}

%piece.2 (p: bf16[64,128]) -> bf16[256,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %g.2 = bf16[256,128]{1,0:T(8,128)} all-gather(%p), channel_id=7, GROUPS
}

%all-reduce-scatter.3 (p: f32[256,128]) -> f32[64,128] {
  %p = f32[256,128]{1,0} parameter(0)
  %all-reduce.3 = f32[256,128]{1,0} all-reduce(%p), channel_id=8, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice = f32[64,128]{1,0} dynamic-slice(%all-reduce.3, %p)
}

%condition (c: (u32[], bf16[64,128])) -> pred[] {
  %bound = u32[]{:T(128)} constant(24)
  %c = (u32[], bf16[64,128]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %compare = pred[] compare(%i, %bound), direction=LT, metadata={op_name="while"}
}

%body (c: (u32[], bf16[64,128])) -> (u32[], bf16[64,128]) {
  %two = u32[]{:T(128)} constant(2)
  %c = (u32[], bf16[64,128]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  %x = bf16[64,128]{1,0} get-tuple-element(%c), index=1
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="while"}
  %start = bf16[256,128]{1,0} fusion(%x), kind=kCustom, calls=%piece.1
  %done = bf16[256,128]{1,0} fusion(%x), kind=kCustom, calls=%piece.2
  ROOT %tuple = (u32[], bf16[64,128]) tuple(%next, %x)
}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %loop = (u32[], bf16[64,128]) while(%x), condition=%condition, body=%body
  %scattered = f32[64,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %a = (f32[], bf16[8]) all-reduce(%x, %x), channel_id=9, replica_groups=[4,2]<=[8], to_apply=%add
}
""".replace("GROUPS", "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}")


def test_what_a_tpu_compiler_writes_is_understood():
    gathered, scattered = 256 * 128 * 2, 256 * 128 * 4
    assert read_collectives(TPU, {"data": 1, "fsdp": 4, "tensor": 2}) == [
        Collective("all-gather", ("fsdp",), 12, 12 * gathered, 9 * gathered),
        Collective("reduce-scatter", ("fsdp",), 1, scattered, scattered * 3 // 4),
        Collective("all-reduce", ("tensor",), 1, 20, 20),
    ]


# As the GPU compiler writes: several arrays in one start, operands before results in tuples of their own; branches by
# their names; moves of which the first stays at home.
GPU = """
HloModule jit_step

%supervised (x: bf16[64,128]) -> f32[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %s = ((f32[256,128]{1,0}, f32[8]{0}), (f32[64,128]{1,0}, f32[2]{0})) reduce-scatter-start(%x), channel_id=1, GROUPS
  ROOT %d = f32[64,128]{1,0} reduce-scatter-done(%s)
}

%empty (x: bf16[64,128]) -> f32[64,128] {
  ROOT %x = f32[64,128]{1,0} parameter(0)
}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %g = ((bf16[64,128]{1,0}, bf16[2]{0}), (bf16[256,128]{1,0}, bf16[8]{0})) all-gather-start(%x), channel_id=2, GROUPS
  %r = ((f32[6]{0}), f32[6]{0}) all-reduce-start(%x), channel_id=3, GROUPS, to_apply=%add
  %t = f32[5]{0} all-reduce-start(%x), channel_id=4, GROUPS, to_apply=%add
  %p = bf16[16]{0} collective-permute(%x), channel_id=5, source_target_pairs={{0,0},{1,2},{2,1},{3,3}}
  ROOT %c = f32[64,128] conditional(%x, %x, %x), true_computation=%supervised, false_computation=%empty
}
""".replace("GROUPS", "replica_groups=[1,4]<=[4]")


def test_what_a_gpu_compiler_writes_is_understood():
    gathered, scattered = (256 * 128 + 8) * 2, (256 * 128 + 8) * 4
    assert read_collectives(GPU, {"data": 1, "fsdp": 4, "tensor": 1}) == [
        Collective("reduce-scatter", ("fsdp",), 1, scattered, scattered * 3 // 4),
        Collective("all-gather", ("fsdp",), 1, gathered, gathered * 3 // 4),
        Collective("all-reduce", ("fsdp",), 2, 44, 66),
        Collective("collective-permute", ("fsdp",), 1, 32, 32),
    ]


def test_a_loop_of_unknown_turns_is_refused():
    with pytest.raises(ValueError, match="does not say how often it turns"):
        read_collectives(TPU.replace("constant(24)", "parameter(1)"), {"data": 1, "fsdp": 4, "tensor": 2})
