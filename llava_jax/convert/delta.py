"""Deltas: a model as its difference from a base that may not be passed on."""

import hashlib
from collections.abc import Mapping

import numpy as np

from llava_jax.convert.tensor import Tensor, add_in_float32
from llava_jax.convert.vocabulary import EMBEDDING, HEAD
from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import part


def make_delta(target: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What has to be added to the base's decoder to get the target, in the target's dtype.

    Parts that the base lacks stay as they are; added vocabulary too (`make_delta.py` of the original).
    """
    _check_base(target, base)
    return {name: _combined(name, value, base, sign=-1) for name, value in target.items()}


def apply_delta(delta: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The target of a delta, in the delta's dtype (`apply_delta.py` of the original).

    Raises:
      CheckpointError: the base does not fit, or what is given is a model already.
    """
    _check_base(delta, base)
    norms = [name for name in delta if name.startswith("decoder.") and name.endswith(".scale")]
    sizes = [sum(float(np.abs(_float32(values[name])).mean()) for name in norms) for values in (delta, base)]
    # Training moves a norm's weights a little; a whole model's are as large as the base's own.
    if sizes[0] > 0.5 * sizes[1]:
        raise CheckpointError(
            f"{delta[norms[0]].origin} belongs to no delta: its norms are as large as the base's. Leave --base out."
        )
    return {name: _combined(name, value, base, sign=1) for name, value in delta.items()}


def fingerprint(params: Mapping[str, Tensor]) -> str:
    """sha256 over the decoder's norms in float32: no two models share them, and they take a megabyte to read."""
    digest = hashlib.sha256()
    for name in sorted(params):
        if name.startswith("decoder.") and name.endswith(".scale"):
            digest.update(name.encode() + _float32(params[name]).tobytes())
    return digest.hexdigest()


def _check_base(target: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    decoder = {name for name in target if part(name) == "decoder"}
    problems = [f"it lacks {name}" for name in sorted(decoder - set(base))]
    problems += [f"it has {base[name].origin} more" for name in sorted(set(base) - set(target)) if _is_decoder(name)]
    for name in sorted(decoder & set(base)):
        theirs, ours = target[name].shape, base[name].shape
        grows = name in (EMBEDDING, HEAD) and all(t >= o for t, o in zip(theirs, ours, strict=True))
        if theirs != ours and not grows:
            problems.append(f"{base[name].origin} is {ours}, must be {theirs}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"--base is not the base of this checkpoint: {'; '.join(problems[:4])}{more}.")


def _is_decoder(name: str) -> bool:
    return part(name) == "decoder"


def _combined(name: str, value: Tensor, base: Mapping[str, Tensor], *, sign: int) -> Tensor:
    if not _is_decoder(name):
        return value
    other = base[name]

    def combine(values: np.ndarray) -> np.ndarray:
        addend = other.view()

        def rows_of(rows: slice) -> np.ndarray:
            # The original loads both in the target's dtype and adds there; float32 rounds to the same.
            block = addend[rows].astype(value.dtype).astype(np.float32)
            missing = [(0, n - m) for n, m in zip(values[rows].shape, block.shape, strict=True)]
            return sign * np.pad(block, missing)

        return add_in_float32(values, rows_of)

    return value.changed(value.shape, combine)


def _float32(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.view()).astype(np.float32)
