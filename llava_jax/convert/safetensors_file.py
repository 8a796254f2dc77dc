"""safetensors files: headers that are checked before anything is believed, tensors mapped and written one by one."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llava_jax.convert.fields import no_duplicates
from llava_jax.convert.tensor import BFLOAT16, Tensor, stored
from llava_jax.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# The limit of the safetensors library itself.
MAX_HEADER = 100_000_000


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of them read yet.

    Raises:
      CheckpointError: the header is damaged, or does not describe exactly the bytes that follow it.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"its header says {length} bytes, the file has {size}")
            header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
        return _tensors(path, header, start=8 + length, size=size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error} in its header" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{path} must be a safetensors file: {reason}. Write it again from its source."
        ) from error


def _tensors(path: Path, header: Any, *, start: int, size: int) -> dict[str, Tensor]:
    tensors, spans = {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key} has the unknown dtype {entry['dtype']!r}")
        dtype = DTYPES[entry["dtype"]]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{key} has the shape {shape} at {begin}..{end}")
        if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
            raise ValueError(f"{key} of shape {shape} takes bytes {begin} to {end} of {size - start}")
        spans.append((begin, end, key))
        tensors[key] = stored(path, key, shape, dtype, start + begin)
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            raise ValueError(f"{key} begins at byte {begin}, not at {position}, where the one before it ends")
        position = end
    if position != size - start:
        raise ValueError(f"its tensors end at byte {position} of {size - start}")
    return tensors


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], written: Callable[[int], Any] = lambda _: None
) -> None:
    """Writes the header, then one tensor after the other; `written` hears the bytes of each."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide dtypes first, as the library orders them, so that every tensor is aligned.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    # transformers refuses a file that does not say "pt".
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in names:
            raise CheckpointError(f"safetensors has no dtype {tensor.dtype}; {tensor.origin} has it. Convert it first.")
        end = position + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            # A turned view must be laid out anew: its buffer would come back scrambled, without a word.
            value = np.ascontiguousarray(tensors[key].view())
            if value.nbytes != tensors[key].nbytes or value.dtype != tensors[key].dtype:
                raise CheckpointError(
                    f"{tensors[key].origin} is {value.dtype} of {value.nbytes} bytes, not as it said."
                )
            file.write(value.reshape(-1).view(np.uint8).data)
            written(value.nbytes)


def split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in shards of at most `limit` bytes, in their order; a larger tensor gets a shard of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
