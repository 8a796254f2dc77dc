"""Times one gradient of CLIP's contrastive loss on the quickstart's towers, with and without the larger heap.

python benchmarks/cpu_heap.py
"""

import os
import subprocess
import sys

from llava_jax.heap import HEAP

CODE = """
import time
import jax, jax.numpy as jnp
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.parameters import bind, part
from llava_jax.sizes import QUICKSTART_CLIP
from llava_jax.train.objectives import Context, contrastive

graphdef, shapes = structure(QUICKSTART_CLIP)
params = jax.tree.map(jnp.asarray, random_parameters(QUICKSTART_CLIP, {part(name) for name in shapes}, seed=0))
batch = {
    "images": jnp.zeros((64, 64, 64, 3), jnp.uint8),
    "tokens": jnp.full((64, 8), 2, jnp.int32),
    "is_pair": jnp.ones(64, bool),
}
context = Context(attend_xla, unconstrained, None)
gradient = jax.jit(jax.grad(lambda params: contrastive(bind(graphdef, params), batch, context).loss))
jax.block_until_ready(gradient(params))
seconds = []
for _ in range(15):
    start = time.perf_counter()
    jax.block_until_ready(gradient(params))
    seconds.append(time.perf_counter() - start)
print(f"{min(seconds):.3f} s at best, {sorted(seconds)[7]:.3f} s median of 15")
"""

if __name__ == "__main__":
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for label, environment in (("default heap", plain), ("larger heap", plain | {"GLIBC_TUNABLES": HEAP})):
        result = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
        )
        print(f"{label}: {result.stdout.strip()}")
