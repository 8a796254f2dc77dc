"""safetensors files: the library's bytes both ways, and headers that lie."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.convert.safetensors_file import open_safetensors, split, write_safetensors
from llava_jax.convert.tensor import in_memory
from llava_jax.errors import CheckpointError

VALUES = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "turned": np.arange(12, dtype=np.float16).reshape(3, 4).T,
    "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "bytes": np.arange(3, dtype=np.uint8),
}


def _same(found: Any, wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        got = np.asarray(found[key])
        assert (got.dtype, got.shape) == (value.dtype, value.shape), key
        assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(value).tobytes(), key


def test_what_is_written_is_what_the_library_reads(tmp_path: Path):
    heard: list[int] = []
    tensors = {key: in_memory(value, key) for key, value in VALUES.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, heard.append)
    _same(load_file(tmp_path / "a.safetensors"), VALUES)
    _same(open_safetensors(tmp_path / "a.safetensors"), VALUES)
    assert sum(heard) == sum(value.nbytes for value in VALUES.values())


def test_what_the_library_writes_is_read(tmp_path: Path):
    save_file({key: value.copy(order="C") for key, value in VALUES.items()}, tmp_path / "a.safetensors")
    _same(open_safetensors(tmp_path / "a.safetensors"), VALUES)


def _file(path: Path, header: str, data: bytes = b"") -> Path:
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + data)
    return path


def _entry(begin: int, end: int, *, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": 1, "a": 2}', "names a twice"),
        ("[]", "list"),
        ("{", "must be a safetensors file"),
        ("[" * 100_000, "must be a safetensors file"),
        (json.dumps({"a": _entry(0, 8), "b": _entry(8, 12)}), "b of shape .2,. takes bytes 8 to 12"),
        (json.dumps({"a": _entry(0, 8), "b": _entry(4, 12)}), "b begins at byte 4, not at 8"),
        (json.dumps({"a": _entry(0, 8), "b": _entry(12, 20)}), "b of shape|b begins at byte 12, not at 8"),
        (json.dumps({"a": _entry(0, 8)}), "end at byte 8 of 16"),
        (json.dumps({"a": _entry(0, 8), "b": _entry(8, 16, dtype="F4")}), "unknown dtype 'F4'"),
        (json.dumps({"a": _entry(0, 8), "b": _entry(8, 16, shape=[-1, -2])}), "b has the shape"),
        (json.dumps({"a": {"dtype": "F32", "shape": [2]}}), "no 'data_offsets'"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_key(tmp_path: Path, header: str, message: str):
    path = _file(tmp_path / "a.safetensors", header, b"\0" * 16)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_safetensors(path)
    assert "a.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_its_file_is_never_read(tmp_path: Path):
    for length in (2**63, 10**12, 17):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"\0" * 16)
        with pytest.raises(CheckpointError, match=rf"header says {length} bytes, the file has 24"):
            open_safetensors(tmp_path / "a.safetensors")


def test_shards_hold_every_tensor_once_within_the_limit():
    tensors = {f"{i}": in_memory(np.zeros(n, np.uint8), "") for i, n in enumerate((5, 5, 1, 20, 3))}
    shards = split(tensors, 10)
    assert [list(shard) for shard in shards] == [["0", "1"], ["2"], ["3"], ["4"]]
