"""Integrity: a fingerprint of every array, whatever mesh holds it, saved beside it and compared before it is used.

Orbax restores most flipped bits without a word: only an index of its files carries a checksum.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from llava_jax.errors import CheckpointError

# Odd numbers without a pattern: one for each axis, so that no two axes can be exchanged.
_AXES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
_LANES = (0x00000000, 0x5BD1E995)


class Damaged(CheckpointError):
    """A saved step or folder that does not hold what was written."""


def fingerprints(tree: Any) -> dict[str, str]:
    """The fingerprint of every array of a tree by path; equal for any sharding, mesh and number of hosts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # All are on their way before the first is fetched.
    sums = jax.device_get([array_sums(leaf) for _, leaf in leaves])
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in zip(names, sums, strict=True)}


@jax.jit
def array_sums(x: Shaped[Array, "..."]) -> UInt32[Array, " lanes"]:
    """Two sums, modulo 2^32, of an array's bits as words, each word times an odd weight that its place decides.

    Addition has no order, so any division over devices gives the same sums. An odd weight times a changed bit is
    never 0 modulo 2^32, so one flipped bit is always seen; two lanes leave other damage a chance of 2^-62 or so.
    """
    words = _words(x)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        # One counter an axis: a flat one would overflow in stacks of layers.
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(_AXES[axis % len(_AXES)])
    return jnp.stack([jnp.sum(words * _odd(place ^ jnp.uint32(lane)), dtype=jnp.uint32) for lane in _LANES])


def compare(found: Mapping[str, str], saved: Mapping[str, str], what: str) -> None:
    """Raises `Damaged`, naming the first arrays whose fingerprints differ from those that were saved."""
    if found.keys() != saved.keys():
        names = sorted(found.keys() ^ saved.keys())
        raise Damaged(f"{what} must hold the arrays that were saved; {', '.join(names[:5])} are in one alone.")
    damaged = [name for name, value in found.items() if value != saved[name]]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise Damaged(f"{what} is damaged: {', '.join(damaged[:3])}{more} differ from what was saved.")


def digest(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _words(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """The bits of every element as one or more unsigned words."""
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        return x.astype(jnp.uint8).astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)


def _odd(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Odd numbers that look drawn at random (the last rounds of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) | jnp.uint32(1)
