"""Files of torch.save: read without torch, and nothing else than tensors."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_jax.convert.torch_file import open_torch
from llava_jax.errors import CheckpointError


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)).state_dict()
    state["turned"] = torch.arange(12.0).reshape(3, 4).t()
    state["slice"] = torch.randn(10)[2:5]
    state["parameter"] = torch.nn.Parameter(torch.randn(2).half())
    state["bfloat16"] = torch.randn(3, 2).bfloat16()
    state["scalar"] = torch.tensor(3)
    state["empty"] = torch.zeros(0, 4)
    state["shared"] = state["0.weight"]
    return state


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_every_tensor_is_the_one_that_torch_saved(tmp_path: Path, is_zip: bool):
    state = _state()
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=is_zip)
    found = open_torch(tmp_path / "a.bin")
    assert list(found) == list(state)
    for key, wanted in state.items():
        value = np.asarray(found[key])
        assert str(value.dtype) == str(wanted.dtype).removeprefix("torch."), key
        assert value.shape == found[key].shape == tuple(wanted.shape), key
        np.testing.assert_array_equal(value.astype(np.float64), wanted.detach().double().numpy(), err_msg=key)


class _Command:
    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (_Command(os.system, "touch pwned"), "posix.system"),
        (_Command(eval, "1"), "__builtin__.eval"),
        (_Command(OrderedDict, [("a", _Command(os.getcwd))]), "posix.getcwd"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.device("cpu"), "torch.device"),
    ],
    ids=["system", "eval", "nested", "module", "device"],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, name: str, is_zip: bool
):
    monkeypatch.chdir(tmp_path)
    state = {"model.norm.weight": torch.ones(2), "model.evil": value}
    torch.save(state, tmp_path / "evil.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError) as caught:
        open_torch(tmp_path / "evil.bin")
    assert f"asks for {name}" in str(caught.value)
    assert "evil.bin" in str(caught.value)
    assert "model.evil" in str(caught.value) or name == "posix.getcwd"
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "not a dictionary"),
        ({"step": 3}, "'step' must be a tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' must be a tensor"),
        ({"a": torch.ones(1).expand(5)}, "a of shape .5,. repeats"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, value: Any, message: str):
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=message):
        open_torch(tmp_path / "a.bin")


def test_damage_is_refused(tmp_path: Path):
    torch.save(_state(), tmp_path / "a.bin")
    whole = (tmp_path / "a.bin").read_bytes()
    for kept in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"cut\.bin must be a torch file"):
            open_torch(tmp_path / "cut.bin")
    # Old files hold several pickles; one of the wrong kind, and opcodes that find nothing to work on.
    magic, number = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    for content in (magic + number + number, magic + number + b"\x80\x02t.", magic + b"\x80\x02" + b"(" * 99):
        (tmp_path / "odd.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"odd\.bin must be a torch file"):
            open_torch(tmp_path / "odd.bin")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(_Command(os.system, "true")))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        open_torch(tmp_path / "raw.bin")


# Tuples in tuples, each named twice: some opcodes more, and no text or hash would ever come to its end.
NESTED = b")q\x00" + 18 * b"h\x00h\x00\x86q\x00"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\n"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"}X\x01\0\0\0ah\x00s.", "'a' must be a tensor; it is a tuple"),
        (b"}h\x00K\x01s.", "names must be strings; one is a tuple"),
        (b"}K\x01K\x01s.", "names must be strings; one is a int"),
        (b"h\x00K\x01K\x01s.", "sets items of a tuple"),
        (b"h\x00}b.", "sets attributes of a tuple"),
        (b"h\x00NR.", "it calls a tuple with"),
        (b"ccollections\nOrderedDict\nh\x00R.", "names must be strings; one is a tuple"),
        (b"ctorch._utils\n_rebuild_parameter\nh\x00R.", "it calls torch._utils _rebuild_parameter with"),
        (STORAGE + b"h\x00NK\x01tQ.", "names must be strings; one is a tuple"),
        (STORAGE + b"X\x01\0\0\0aNh\x00tQ.", "what is no storage"),
        (
            b"}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"X\x01\0\0\0aNK\x01tQK\x00h\x00h\x00tRs.",
            "shape, strides and offset of a must be whole",
        ),
    ],
)
def test_what_is_refused_is_neither_written_out_nor_hashed(tmp_path: Path, pickled: bytes, message: str):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + NESTED + pickled)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_torch(tmp_path / "a.bin")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_keys_of_old_files_are_strings(tmp_path: Path):
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    (tmp_path / "a.bin").write_bytes(b"".join(head) + b"\x80\x02" + NESTED + b".")
    with pytest.raises(CheckpointError, match="names must be strings; one is a tuple"):
        open_torch(tmp_path / "a.bin")


def test_storages_that_lie_are_refused(tmp_path: Path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}

    def write(compression: int, **changed: bytes) -> None:
        with zipfile.ZipFile(tmp_path / "b.bin", "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name, changed.get(Path(name).name, content))

    write(zipfile.ZIP_STORED)
    np.testing.assert_array_equal(np.asarray(open_torch(tmp_path / "b.bin")["a"]), np.arange(4.0))
    for compression, changed in (
        (zipfile.ZIP_STORED, {"0": b"\0" * 8}),
        (zipfile.ZIP_DEFLATED, {}),
        (zipfile.ZIP_STORED, {"byteorder": b"big"}),
    ):
        write(compression, **changed)
        with pytest.raises(CheckpointError, match="must be a torch file"):
            open_torch(tmp_path / "b.bin")
