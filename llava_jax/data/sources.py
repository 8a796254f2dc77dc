"""Where records lie besides JSON files: ArrayRecord files, folders of parquet or Arrow files, TFDS."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.data.records import Record, RecordFile, find_spans, parse_record
from llava_jax.errors import DataError, Refused

# How much of both ends of a large file decides its fingerprint: its footer, which says where every record lies.
END_BYTES = 1 << 20
# What a record needs of parquet and Arrow files.
COLUMNS = ("conversations", "image", "images")
# A split's name in the path of a file, as Hugging Face and TFDS write it.
_SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test)(?=[/_.-])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A data set that TFDS has written as ArrayRecord (`file_format="array_record"`) to its folder of one version.

    Its features have the names of the JSON format: `conversations`, a sequence of `from` and `value`, and `image`.
    """

    folder: str
    split: str


def fingerprint_source(source: str | Tfds) -> str:
    """Says whether two sources hold the same records, wherever they lie; nothing is parsed.

    Of a JSON file every byte counts; of the others, which may hold pictures and be large, the size and both ends.
    """
    if isinstance(source, Tfds):
        files = sorted(str(file) for file in Path(source.folder).glob("*") if _is_array_record(file))
        return f"{source.split} {_hash_ends(files)}"
    files = _find_files(source)
    if files[0].endswith((".parquet", ".arrow")) or _is_array_record(Path(files[0])):
        return _hash_ends(files)
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_files(source: str) -> list[str]:
    """The files of a path, all of one kind."""
    path = Path(source)
    if path.is_file():
        return [source]
    if not path.is_dir():
        raise DataError(f"data.records must name a file or folder of records; got {source!r}, which does not exist.")
    kinds = path.rglob("*.parquet"), filter(_is_array_record, path.iterdir()), path.rglob("data-*.arrow")
    files = next(filter(None, (sorted(map(str, kind)) for kind in kinds)), None)
    if files is None:
        raise DataError(
            f"A folder of records must hold *.parquet, *.array_record or data-*.arrow files; {source!r} holds none."
        )
    splits = {found[1] for file in files if (found := _SPLIT.search(file.removeprefix(source).lower()))}
    if len(splits) > 1:
        raise DataError(
            f"A folder of records must hold one split; {source!r} has files of {', '.join(sorted(splits))}. Give each "
            "a folder of its own and name the one to read."
        )
    return files


def _is_array_record(path: Path) -> bool:
    """Whether a file is called like one, or like a shard `name.array_record-00001-of-00002`."""
    return any(suffix.startswith((".array_record", ".arrayrecord")) for suffix in path.suffixes)


class ArrayRecords:
    """ArrayRecord files whose entries are records in JSON, pictures as names or as `{"bytes": base64}`.

    Written with `array_record.python.array_record_module.ArrayRecordWriter(path, "group_size:1")`: in larger groups
    every read decodes a whole group.
    """

    def __init__(self, path: str, files: list[str], *, as_written: bool):
        self.path, self.files, self.as_written = path, files, as_written
        self._reader: Any = None

    @property
    def reader(self) -> Any:
        if self._reader is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            try:
                self._reader = ArrayRecordDataSource(self.files)
            except (ValueError, RuntimeError, OSError) as error:
                raise DataError(f"{self.path!r} must hold ArrayRecord files: {error}. Write them again.") from None
        return self._reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `Refused` if it is malformed."""
        reader = self.reader
        try:
            (data,) = reader.__getitems__([index])
        except RuntimeError as error:
            raise Refused("malformed", str(error)) from None
        try:
            return parse_record(json.loads(data), as_written=self.as_written)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed", f"not JSON: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


class ParquetRecords:
    """Parquet files with columns `conversations` and `image` or `images`, as Hugging Face's `datasets` writes them.

    A picture is a name, or the struct of `bytes` and `path` of the Image feature. Parquet is read by row groups and
    the last one is kept: reading in the plan's order decodes a group for every record, so groups should be small
    (`row_group_size=16`), or the records be written as ArrayRecord. A damaged group costs all of its records.
    """

    def __init__(self, path: str, files: list[str], *, as_written: bool):
        self.path, self.files, self.as_written = path, files, as_written
        parquet = _import_pyarrow()
        self._groups: list[tuple[int, int]] = []
        starts = [0]
        for number, file in enumerate(files):
            try:
                footer = parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                raise DataError(f"{file!r} must be a parquet file: {error}. Write it again.") from None
            names = set(footer.schema.to_arrow_schema().names)
            if "conversations" not in names:
                raise DataError(f"{file!r} must have a column 'conversations'; it has {sorted(names)}. Rename it.")
            for group in range(footer.num_row_groups):
                self._groups.append((number, group))
                starts.append(starts[-1] + footer.row_group(group).num_rows)
        if not starts[-1]:
            raise DataError(f"{path!r} must hold at least one record; it holds none.")
        self._starts = np.array(starts)
        self._kept: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `Refused` if it is malformed."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        # One assignment, one read: threads share this object.
        kept = self._kept
        if kept is None or kept[0] != group:
            self._kept = kept = (group, self._read(group))
        return _parse_row(kept[1], index - int(self._starts[group]), as_written=self.as_written)

    def _read(self, group: int) -> Any:
        number, place = self._groups[group]
        file = _import_pyarrow().ParquetFile(self.files[number])
        names = set(COLUMNS) & set(file.schema_arrow.names)
        try:
            return file.read_row_group(place, columns=sorted(names), use_threads=False)
        except (OSError, ValueError) as error:
            raise Refused("malformed", f"row group {place} of {self.files[number]!r}: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


class ArrowRecords:
    """Arrow files as `save_to_disk` of Hugging Face's `datasets` writes them, columns as those of parquet files.

    They are mapped, not read: a record costs what it holds.
    """

    def __init__(self, path: str, files: list[str], *, as_written: bool):
        self.path, self.files, self.as_written = path, files, as_written
        self._table: Any = None

    @property
    def table(self) -> Any:
        if self._table is None:
            _import_pyarrow()
            import pyarrow

            try:
                parts = [pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all() for file in self.files]
                table = pyarrow.concat_tables(parts)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.path!r} must hold Arrow files: {error}. Write them again.") from None
            if "conversations" not in table.column_names:
                raise DataError(
                    f"{self.path!r} must have a column 'conversations'; it has {table.column_names}. Rename it."
                )
            self._table = table.select([name for name in COLUMNS if name in table.column_names])
        return self._table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `Refused` if it is malformed."""
        table = self.table
        try:
            for column in table.slice(index, 1).columns:
                for chunk in column.chunks:
                    _check_bounds(chunk)
        except (ValueError, NotImplementedError) as error:
            raise Refused("malformed", f"a row's values must lie in its file: {error}") from None
        return _parse_row(table, index, as_written=self.as_written)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}


def _import_pyarrow() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError("Parquet and Arrow files need pyarrow. Run pip install -e '.[parquet]'.") from None
    return parquet


def _check_bounds(array: Any) -> None:
    """Raises `ValueError` if values of a mapped row lie outside their file, where reading them would end the process.

    Part by part, since pyarrow checks every value of a batch to check a row of it in full. Of the batch as a whole the
    ends alone are looked at; where one of these is wrong, all its rows are.
    """
    array.validate()
    if not array.type.num_fields:
        array.validate(full=True)
        return
    parts = array.flatten()
    for part in parts if isinstance(parts, list) else [parts]:
        _check_bounds(part)


def _parse_row(table: Any, index: int, *, as_written: bool) -> Record:
    """The record in a row of a table of pyarrow."""
    try:
        (value,) = table.slice(index, 1).to_pylist()
    except ValueError as error:
        raise Refused("malformed", f"a row must hold values of its types: {error}") from None
    images = value.get("image", value.get("images"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    return parse_record(value | {"image": [_name_or_bytes(image) for image in images]}, as_written=as_written)


def _name_or_bytes(image: Any) -> Any:
    """The Image feature holds a name where it holds no bytes."""
    return image["path"] if isinstance(image, dict) and image.get("bytes") is None and "path" in image else image


class TfdsRecords:
    """A split of a TFDS data set, read by `tfds.data_source` without TensorFlow; pictures stay encoded."""

    def __init__(self, source: Tfds, *, as_written: bool):
        self.path, self.as_written = f"{source.folder}:{source.split}", as_written
        self._source = source
        self._reader: Any = None

    @property
    def reader(self) -> Any:
        if self._reader is None:
            try:
                import tensorflow_datasets as tfds
            except ImportError:
                raise DataError(
                    "TFDS data need tensorflow-datasets; it is not installed. Run pip install -e '.[tfds]'."
                ) from None
            try:
                builder: Any = tfds.builder_from_directory(self._source.folder)
                keep = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
                self._reader = builder.as_data_source(split=self._source.split, decoders=keep)
            except (OSError, ValueError, KeyError, NotImplementedError, AssertionError) as error:
                raise DataError(f"{self.path!r} must be a TFDS split in ArrayRecord files: {error}") from None
        return self._reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `Refused` if it is malformed."""
        reader = self.reader
        try:
            value = reader[index]
        except RuntimeError as error:
            raise Refused("malformed", str(error)) from None
        # TFDS keeps a sequence of dictionaries as a dictionary of sequences, and text as bytes.
        try:
            turns = value["conversations"]
            columns = [[_text(item) for item in turns[name]] for name in ("from", "value")]
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise Refused("malformed", f"'conversations' must be a sequence of 'from' and 'value': {error!r}") from None
        record: dict[str, Any] = {
            "conversations": [{"from": role, "value": text} for role, text in zip(*columns, strict=True)]
        }
        # A feature cannot be absent: text-only records have an empty picture.
        if value.get("image"):
            record["image"] = {"bytes": value["image"]}
        return parse_record(record, as_written=self.as_written)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _hash_ends(files: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{size}\n".encode())
            for at in (0, max(0, size - END_BYTES)):
                file.seek(at)
                digest.update(file.read(END_BYTES))
    return digest.hexdigest()


# Random access to records; a pickled one ships no record, so that worker processes get one cheaply.
Source = RecordFile | ArrayRecords | ParquetRecords | ArrowRecords | TfdsRecords


def open_source(source: str | Tfds, *, as_written: bool, spans: np.ndarray | None = None) -> Source:
    """The records of a path, or of a TFDS split; `spans` are those that `find_spans` found in a JSON file before.

    Raises:
      DataError: there is nothing that can be read.
    """
    if isinstance(source, Tfds):
        return TfdsRecords(source, as_written=as_written)
    files = _find_files(source)
    if files[0].endswith(".parquet"):
        return ParquetRecords(source, files, as_written=as_written)
    if files[0].endswith(".arrow"):
        return ArrowRecords(source, files, as_written=as_written)
    if _is_array_record(Path(files[0])):
        return ArrayRecords(source, files, as_written=as_written)
    return RecordFile(source, find_spans(source) if spans is None else spans, as_written=as_written)
