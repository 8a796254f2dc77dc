"""Tensors in files of torch.save, read without torch: a pickle's opcodes are followed, and nothing else is done.

No object is ever built but dictionaries, lists, tuples, numbers, strings and tensors that stay in their file; a name
outside of a short list is refused before it could mean anything.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from llava_jax.convert.tensor import BFLOAT16, Tensor, stored
from llava_jax.errors import CheckpointError

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# What a state dict's pickle may ask for, and nothing more.
ALLOWED = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"} | {
    f"torch {name}" for name in STORAGES
}
# Pickles of state dicts have some hundred bytes a tensor.
MAX_PICKLE = 100_000_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# What following a damaged or hostile file may raise, encrypted and packed zips included.
_DAMAGE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError, EOFError,
    struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_LITERALS = {"NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1", "LONG", "BINFLOAT", "FLOAT"}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES"}


class _Name(NamedTuple):
    """A global of the pickle, never looked up."""

    text: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Strided(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict saved with torch.save (zip since 1.6, or the format before), mapped.

    Raises:
      CheckpointError: the file holds anything else than named tensors; says which key asks for what.
    """
    try:
        if zipfile.is_zipfile(path):
            state, place = _read_zip(path)
        else:
            state, place = _read_legacy(path)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a dictionary of tensors")
        for key, value in state.items():
            if not isinstance(value, _Strided):
                raise ValueError(f"{key!r} must be a tensor; it is a {type(value).__name__}")
        return {key: _tensor(path, key, value, place) for key, value in state.items()}
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} must be a torch file of tensors alone: {error}. Nothing of it was run; save it as safetensors."
        ) from error


def _tensor(path: Path, key: str, value: _Strided, place: Callable[[str, int], int]) -> Tensor:
    storage, offset, shape, strides = value
    whole = [type(n) is int and n >= 0 for n in (offset, *shape, *strides)]
    if len(shape) != len(strides) or not all(whole):
        raise ValueError(f"shape, strides and offset of {key} must be whole numbers, one stride for each side")
    extent = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if offset + extent > storage.count:
        raise ValueError(f"{key} of shape {shape} reaches past the {storage.count} elements of its storage")
    itemsize = storage.dtype.itemsize
    start = place(storage.key, storage.count * itemsize) + offset * itemsize
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if all(n == 1 or s == d for n, s, d in zip(shape, strides, dense, strict=True)):
        return stored(path, key, shape, storage.dtype, start)
    flat = stored(path, key, (extent,), storage.dtype, start)
    if math.prod(shape) > extent:
        raise ValueError(f"{key} of shape {shape} repeats elements of its storage")
    steps = tuple(s * itemsize for s in strides)
    return flat.changed(shape, lambda values: np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False))


def _read_zip(path: Path) -> tuple[Any, Callable[[str, int], int]]:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("it holds two entries of one name")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it holds {len(pickles)} entries data.pkl, not one")
        root = pickles[0].removesuffix("data.pkl")
        order = entries.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("it is not little-endian")
        if entries[pickles[0]].file_size > MAX_PICKLE:
            raise ValueError(f"its pickle has {entries[pickles[0]].file_size} bytes")
        state = _interpret(archive.read(pickles[0]))

    def place(key: str, size: int) -> int:
        info = entries.get(f"{root}data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < size or info.flag_bits & 1:
            raise ValueError(f"its entry data/{key} must be there, plain, with {size} bytes")
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
            # Lengths of the name and of the extra field, which torch pads so that tensors are aligned.
            start = info.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            if header[:4] != b"PK\x03\x04" or start + size > file.seek(0, 2):
                raise ValueError(f"its entry data/{key} is cut off")
        return start

    return state, place


def _read_legacy(path: Path) -> tuple[Any, Callable[[str, int], int]]:
    """Five pickles (magic, protocol, machine, the state, keys of its storages), then the storages themselves."""
    with open(path, "rb") as file:
        if _interpret(file) != LEGACY_MAGIC:
            raise ValueError("it is neither a zip nor an old torch file")
        _interpret(file)
        if _interpret(file).get("little_endian") is not True:
            raise ValueError("it is not little-endian")
        sizes: dict[str, int] = {}
        state = _interpret(file, sizes)
        keys = _interpret(file)
        places, end = {}, file.seek(0, 1)
        for key in map(_text, keys):
            file.seek(end)
            count = int.from_bytes(file.read(8), "little")
            places[key] = (end + 8, count * sizes[key])
            end += 8 + count * sizes[key]
        if end != file.seek(0, 2):
            raise ValueError(f"its storages end at byte {end}, the file at {file.tell()}")

    def place(key: str, size: int) -> int:
        start, found = places[key]
        if found < size:
            raise ValueError(f"its storage {key} has {found} bytes, not {size}")
        return start

    return state, place


def _interpret(source: bytes | BinaryIO, sizes: dict[str, int] | None = None) -> Any:
    """What a pickle describes, within the few opcodes and names that tensors need.

    `sizes` is told the element size of each storage.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        mark = marks.pop()
        taken = stack[mark:]
        del stack[mark:]
        return taken

    for opcode, argument, _ in pickletools.genops(source):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in _LITERALS:
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}.get(name, argument))
        elif name in _STRINGS:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "APPEND":
            list.append(stack[-2], stack.pop())
        elif name == "APPENDS":
            items = since_mark()
            list.extend(cast(list, stack[-1]), items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _set_items(stack[-1], items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            text = str(argument) if name == "GLOBAL" else " ".join([stack.pop(-2), stack.pop()])
            if text not in ALLOWED:
                raise ValueError(f"{_key(stack)} asks for {text.replace(' ', '.')}")
            stack.append(_Name(text))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), sizes))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_rebuild(function, arguments))
        elif name == "BUILD":
            # A state dict carries its modules' version numbers as an attribute.
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise ValueError(f"{_key(stack)} sets attributes of a {type(stack[-1]).__name__}")
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"{_key(stack)} uses the opcode {name}")
    raise ValueError("its pickle has no end")


def _key(stack: list[Any]) -> str:
    """The key whose value is being described: the first on the stack that has no tensor yet."""
    keys = iter(stack)
    for item in keys:
        if isinstance(item, str) and not isinstance(next(keys, None), _Strided):
            return repr(item)
    return "its pickle"


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise ValueError(f"it sets items of a {type(target).__name__}")
    for key, value in zip(map(_text, items[::2]), items[1::2], strict=True):
        if key in target:
            raise ValueError(f"it names {key!r} twice")
        target[key] = value


def _text(name: Any) -> str:
    """A name of the pickle. Of anything else no hash is asked, and no text: a hundred bytes of tuples in tuples, each
    named twice, have more parts than can be counted.
    """
    if not isinstance(name, str):
        raise ValueError(f"its names must be strings; one is a {type(name).__name__}")
    return name


def _storage(identity: Any, sizes: dict[str, int] | None) -> _Storage:
    # The format before zip adds a sixth entry, None but for views of a storage.
    kind, storage, key, _, count, *view = identity
    dtype = STORAGES[storage.text.removeprefix("torch ")] if isinstance(storage, _Name) else None
    if kind != "storage" or dtype is None or type(count) is not int or view not in ([], [None]):
        raise ValueError("it refers to what is no storage, or to a view of one")
    if sizes is not None:
        sizes[_text(key)] = dtype.itemsize
    return _Storage(_text(key), dtype, count)


def _rebuild(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name("torch._utils _rebuild_tensor_v2"), (
            _Storage() as storage,
            offset,
            tuple(shape),
            tuple(strides),
            *_,
        ):
            return _Strided(storage, offset, shape, strides)
        case _Name("torch._utils _rebuild_parameter"), (_Strided() as tensor, *_):
            return tensor
        case _Name("collections OrderedDict"), (*items,):
            found: dict[Any, Any] = {}
            _set_items(found, [part for key, value in (items[0] if items else []) for part in (key, value)])
            return found
    called = function.text if isinstance(function, _Name) else f"a {type(function).__name__}"
    raise ValueError(f"it calls {called} with what makes no tensor")
