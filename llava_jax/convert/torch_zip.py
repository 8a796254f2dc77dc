"""Writes a dictionary of arrays as `torch.save` does, without torch: for readers that know no other file."""

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


def write_torch_zip(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One archive: `data.pkl` rebuilds the tensors from the storages `data/0, data/1, ...` (torch 1.6 and newer)."""
    names = list(arrays)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle({name: arrays[name] for name in names}))
        for number, name in enumerate(names):
            archive.writestr(f"archive/data/{number}", np.ascontiguousarray(arrays[name]).tobytes())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """{name: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}, in protocol 2.

    Assembled by hand, since the pickler would import torch to name its functions.
    """
    out = io.BytesIO()

    def text(value: str) -> None:
        data = value.encode()
        out.write(b"X" + struct.pack("<I", len(data)) + data)

    def function(module: str, name: str) -> None:
        out.write(f"c{module}\n{name}\n".encode())

    def number(value: int) -> None:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out.write(b"\x8a" + bytes([len(data)]) + data)

    def numbers(values: tuple[int, ...]) -> None:
        out.write(b"(")
        for value in values:
            number(value)
        out.write(b"t")

    out.write(b"\x80\x02}")
    for key, (name, array) in enumerate(arrays.items()):
        text(name)
        function("torch._utils", "_rebuild_tensor_v2")
        out.write(b"((")
        text("storage")
        function("torch", _STORAGES[array.dtype])
        text(str(key))
        text("cpu")
        number(array.size)
        out.write(b"tQ")
        number(0)
        numbers(array.shape)
        numbers(tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)))
        out.write(b"\x89")
        function("collections", "OrderedDict")
        out.write(b")RtRs")
    out.write(b".")
    return out.getvalue()
