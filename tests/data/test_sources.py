"""Mixes and the sources besides JSON files: the same records whatever holds them, pictures inside or beside them."""

import base64
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.check import check_records
from llava_jax.data.index import load_index
from llava_jax.data.mix import Mix, Part, Records, as_mix, fingerprint_mix, open_records
from llava_jax.data.rows import Conversations, Needs
from llava_jax.data.sources import Tfds
from llava_jax.data.templates import V1
from llava_jax.errors import DataError, Refused

ROWS = Conversations(template=V1, length=256, tiles=4)


def _open(records) -> Records:
    return open_records(as_mix(records), as_written=False)


def _write(path: Path, names: str) -> str:
    """A file of one record a letter."""
    turns = [[{"from": "human", "value": name}, {"from": "gpt", "value": name}] for name in names]
    values = [{"conversations": turn} for turn in turns]
    lines = "".join(json.dumps(value) + "\n" for value in values)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(values))
    return str(path)


def _names(records: Records) -> str:
    return "".join(records[i].turns[0].text for i in range(len(records)))


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        ("all", "abcde"),
        ("first:2", "ab"),
        ("first:9", "abcde"),
        ("end:2", "de"),
        ("end:9", "abcde"),
        ("first:50%", "abc"),
        ("end:1%", "e"),
        ("end:100%", "abcde"),
    ],
)
def test_sampling_takes_what_the_original_takes(tmp_path: Path, sampling: str, names: str):
    path = _write(tmp_path / "a.json", "abcde")
    assert _names(_open(Mix(parts=(Part(source=path, sampling=sampling),)))) == names


def test_random_sampling_follows_the_seed(tmp_path: Path):
    path = _write(tmp_path / "a.jsonl", "abcdefghijklmnopqrstuvwxyz")
    drawn = [_names(_open(Mix(parts=(Part(source=path, sampling="random:30%"),), seed=s))) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(drawn[0]) == 8


@pytest.mark.parametrize("sampling", ["", "first", "first:0", "end:-1", "first:1.5%", "last:3", "random:%", "all:3"])
def test_sampling_that_means_nothing_is_refused(sampling: str):
    with pytest.raises(ValueError, match="sampling must be"):
        Part(source="a.json", sampling=sampling)


def test_a_brace_list_is_split_at_commas_alone(tmp_path: Path):
    for name, letters in (("a", "ab"), (" b", "c"), ("c", "de")):
        _write(tmp_path / f"{name}.json", letters)
    records = _open(f"{tmp_path}/{{a, b,c}}.json")
    assert _names(records) == "abcde"
    assert [records.locate(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert records.describe(4) == f"record 1 of {tmp_path}/c.json"


def test_a_yaml_file_mixes_as_the_original_reads_it(tmp_path: Path):
    first, second = _write(tmp_path / "a.json", "abcde"), _write(tmp_path / "b.jsonl", "vwxyz")
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"datasets:\n  - json_path: {first}\n    sampling_strategy: first:40%\n"
        f"  - json_path: {second}\n    sampling_strategy: end:1\n    weight: 2\n  - json_path: {first}\nseed: 3\n"
    )
    records = _open(str(mix))
    assert _names(records) == "abzabcde"
    assert records.mix.seed == 3
    assert records.weights.tolist() == [1, 1, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "datasets: 3",
        "datasets: []",
        "dataset: []",
        "datasets: [{json_path: 3}]",
        "datasets: [{sampling_strategy: all}]",
        "datasets: [{json_path: a.json, sampling_strategy: some}]",
        "datasets: [{json_path: a.json, sampling: all}]",
        "datasets: [{json_path: a.json, weight: -1}]",
        "datasets: [a.json]",
        "{",
        "!!python/object/apply:os.system ['false']",
    ],
)
def test_a_yaml_file_of_another_form_is_named(tmp_path: Path, text: str):
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match="mix.yaml"):
        as_mix(str(path))


def test_what_decides_the_records_decides_the_fingerprint(tmp_path: Path):
    a, b = _write(tmp_path / "a.json", "abc"), _write(tmp_path / "b.json", "xyz")
    mixes = [
        Mix(parts=(Part(source=a),)),
        Mix(parts=(Part(source=b),)),
        Mix(parts=(Part(source=a), Part(source=b))),
        Mix(parts=(Part(source=b), Part(source=a))),
        Mix(parts=(Part(source=a, sampling="random:2"),)),
        Mix(parts=(Part(source=a, sampling="random:2"),), seed=1),
        Mix(parts=(Part(source=a, weight=2.0),)),
    ]
    assert len({fingerprint_mix(mix) for mix in mixes}) == len(mixes)
    moved = _write(tmp_path / "moved.json", "abc")
    assert fingerprint_mix(as_mix(moved)) == fingerprint_mix(as_mix(a))


def _with_pictures(data: Path) -> list[dict]:
    """The records of the test data, every picture as bytes."""
    records = json.loads((data / "records.json").read_text())
    for record in records:
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        record["images"] = [{"bytes": (data / "pictures" / name).read_bytes(), "path": name} for name in names]
        record.pop("image", None)
    return records


def _write_parquet(data: Path, folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    records = _with_pictures(data)
    folder.mkdir()
    for number, part in enumerate((records[:25], records[25:])):
        columns = {name: [record[name] for record in part] for name in ("images", "conversations")}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"train-{number}.parquet", row_group_size=4)
    return str(folder)


def _write_arrow(data: Path, folder: Path) -> str:
    """As `Dataset.save_to_disk(folder, num_shards=2)` does, `dataset_info.json` and `state.json` left out."""
    import pyarrow

    records = _with_pictures(data)
    folder.mkdir()
    for number, part in enumerate((records[:25], records[25:])):
        table = pyarrow.table({name: [record[name] for record in part] for name in ("images", "conversations")})
        with pyarrow.ipc.new_stream(folder / f"data-{number:05}-of-00002.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    return str(folder)


def _write_array_record(data: Path, folder: Path) -> str:
    from array_record.python.array_record_module import ArrayRecordWriter

    records = _with_pictures(data)
    folder.mkdir()
    for number, part in enumerate((records[:25], records[25:])):
        writer = ArrayRecordWriter(str(folder / f"train.array_record-{number:05}-of-00002"), "group_size:1")
        for record in part:
            pictures = [{"bytes": base64.b64encode(image["bytes"]).decode()} for image in record["images"]]
            writer.write(json.dumps({"image": pictures, "conversations": record["conversations"]}).encode())
        writer.close()
    return str(folder)


@pytest.mark.parametrize("write", [_write_parquet, _write_arrow, _write_array_record])
def test_other_formats_hold_the_same_examples(tmp_path: Path, data: Path, needs: Needs, write):
    path = write(data, tmp_path / "folder")
    index = load_index(path, ROWS, needs._replace(image_root="nowhere"), tmp_path / "cache")
    plain = load_index(str(data / "records.json"), ROWS, needs, tmp_path / "cache")
    np.testing.assert_array_equal(index.tokens, plain.tokens)
    np.testing.assert_array_equal(index.tiles, plain.tiles)
    assert index.refused == {}
    records = pickle.loads(pickle.dumps(index.records))
    for i in (59, 0, 24, 25, 3):
        example, other = (ROWS.load(r[i], needs, np.random.default_rng(0)) for r in (records, plain.records))
        for one, two in zip(example, other, strict=True):
            np.testing.assert_array_equal(one, two)
    assert len(pickle.dumps(index.records)) < 4_000
    again = load_index(path, ROWS, needs, tmp_path / "cache")
    np.testing.assert_array_equal(again.tokens, index.tokens)
    many = load_index(path, ROWS, needs, tmp_path / "other", num_workers=2)
    np.testing.assert_array_equal(many.tokens, index.tokens)


TEXTS = [f"Which shape has number {number}?" for number in range(6)]


def _write_texts(path: Path) -> str:
    """Six records in groups of two, bare of anything that checks or packs their bytes if the format can do without."""
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "A square."}] for text in TEXTS]
    table = pyarrow.table({"conversations": turns})
    if path.suffix == ".parquet":
        bare = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pyarrow.parquet.write_table(table, path, row_group_size=2, **bare)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            for at in range(0, len(turns), 2):
                stream.write_table(pyarrow.table({"conversations": turns[at : at + 2]}))
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for turn in turns:
            writer.write(json.dumps({"conversations": turn}).encode())
        writer.close()
    return str(path)


def _damage(path: str, written: bytes, damaged: bytes) -> None:
    data = Path(path).read_bytes()
    assert data.count(written) == 1
    assert len(damaged) == len(written)
    Path(path).write_bytes(data.replace(written, damaged))


@pytest.mark.parametrize("name", ["data-0.arrow", "a.parquet", "a.array_record"])
def test_a_damaged_record_is_refused_and_the_others_are_read(tmp_path: Path, needs: Needs, name: str):
    path = _write_texts(tmp_path / name)
    clean = load_index(path, ROWS, needs, tmp_path / "cache")
    _damage(path, b"number 3", b"number\xa03")
    index = load_index(path, ROWS, needs, tmp_path / "cache")
    assert index.counts() == {"malformed": 1}
    assert index.usable.tolist() == [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(index.tokens[index.usable], clean.tokens[index.usable])
    assert [index.records[i].turns[0].text for i in index.usable.tolist()] == [*TEXTS[:3], *TEXTS[4:]]


def test_arrow_values_outside_their_file_are_refused(tmp_path: Path, needs: Needs):
    """Where a mapped text lies is a number in the file; pyarrow follows it out of the file, and the process ends."""
    path = _write_texts(tmp_path / "data-0.arrow")
    question, answer = len(TEXTS[0]), len("A square.")
    ends = np.cumsum([0, question, answer, question, answer], dtype=np.int32).tobytes()
    # Of the first question in the second of three batches.
    far = ends[:7] + b"\x40" + ends[8:]
    Path(path).write_bytes(Path(path).read_bytes().replace(ends, far, 2).replace(far, ends, 1))
    index = load_index(path, ROWS, needs, tmp_path / "cache")
    assert index.counts() == {"malformed": 1}
    assert index.usable.tolist() == [0, 1, 3, 4, 5]


def test_a_damaged_row_group_of_parquet_costs_its_records_alone(tmp_path: Path, needs: Needs):
    import pyarrow.parquet

    path = _write_texts(tmp_path / "a.parquet")
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    data = bytearray(Path(path).read_bytes())
    data[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    Path(path).write_bytes(data)
    index = load_index(path, ROWS, needs, tmp_path / "cache")
    assert index.counts() == {"malformed": 2}
    assert index.usable.tolist() == [0, 1, 4, 5]
    assert "row group 1 of " in index.refused[2]


def test_broken_sources_are_named(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "x.array_record").write_bytes(b"nothing at all")
    (tmp_path / "data-1.arrow").write_bytes(b"no stream")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "y.parquet")
    for name in ("empty", "x.parquet", "y.parquet", "x.array_record", "data-1.arrow", "none"):
        with pytest.raises(DataError, match=name):
            _open(str(tmp_path / name))


def test_a_folder_of_several_splits_is_refused(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]})
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"):
        path = tmp_path / "train_set" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="one split.*test, train.*a folder of its own"):
        _open(str(tmp_path / "train_set"))
    path.unlink()
    assert len(_open(str(tmp_path / "train_set"))) == 2


@pytest.mark.parametrize("image", [{"bytes": "?"}, {"bytes": None}, {"bytes": 3}, [{"bytes": "QUJD"}, 3]])
def test_a_picture_that_is_no_base64_is_refused(tmp_path: Path, image):
    path = tmp_path / "r.json"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    path.write_text(json.dumps([{"image": image, "conversations": turns}]))
    with pytest.raises(Refused, match="malformed"):
        _open(str(path))[0]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(DataError, match=r"pip install -e .\.\[parquet\]"):
        _open(str(tmp_path / "x.parquet"))


def test_without_tfds_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install -e .\.\[tfds\]"):
        _open(Tfds(folder="none", split="train"))


BUILDER = """
import io, json, sys, pathlib
import tensorflow_datasets as tfds

class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(sys.argv[1])

    def _info(self):
        turns = tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image(), "conversations": turns})
        )

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        root = pathlib.Path(sys.argv[1])
        for number, record in enumerate(json.loads((root / "one_picture.json").read_text())):
            picture = io.BytesIO((root / "pictures" / record["image"]).read_bytes())
            yield number, {"image": picture, "conversations": record["conversations"]}

Pictures(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
"""


def test_a_tfds_split_holds_the_same_examples(tmp_path: Path, data: Path, needs: Needs):
    root = Path(shutil.copytree(data, tmp_path / "data"))
    records = [r for r in json.loads((root / "records.json").read_text()) if isinstance(r.get("image"), str)]
    (root / "one_picture.json").write_text(json.dumps(records))
    subprocess.run([sys.executable, "-c", BUILDER, str(root), str(tmp_path / "tfds")], check=True, capture_output=True)
    source = Tfds(folder=str(tmp_path / "tfds" / "pictures" / "1.0.0"), split="train")
    index = load_index(source, ROWS, needs._replace(image_root="nowhere"), tmp_path / "cache")
    plain = load_index(str(root / "one_picture.json"), ROWS, needs, tmp_path / "cache")
    # TFDS shuffles when it writes.
    assert sorted(index.tokens) == sorted(plain.tokens)
    read = pickle.loads(pickle.dumps(index.records))
    found = sorted((read[i].images[0], read[i].turns) for i in range(len(read)))
    written = [plain.records[i] for i in range(len(records))]
    assert found == sorted(((root / "pictures" / record.images[0]).read_bytes(), record.turns) for record in written)
    assert "tensorflow" not in sys.modules
    (file,) = Path(source.folder).glob("*.array_record*")
    damaged = bytearray(file.read_bytes())
    # Within the second record.
    damaged[3000] ^= 1
    file.write_bytes(damaged)
    index = load_index(source, ROWS, needs._replace(image_root="nowhere"), tmp_path / "cache")
    assert index.counts() == {"malformed": 1}


def test_the_check_counts_by_source_and_packs(tmp_path: Path, data: Path, needs: Needs, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"conversations": []}]))
    refused = check_records(Mix(parts=(Part(source=str(bad)), Part(source=str(data / "records.json")))), ROWS, needs)
    printed = capsys.readouterr().out
    assert "records.json: 60 records, 60 usable, 0 refused" in printed
    assert "bad.json: 1 records, 0 usable, 1 refused\n  malformed: 1\n" in printed
    assert "all of them: 61 records, 60 usable, 1 refused" in printed
    assert "rows of 256 tokens" in printed
    assert refused["malformed"][0].startswith(f"record 0 of {bad}: ")


def test_the_index_starts_without_the_packages_of_other_formats():
    code = "import sys, llava_jax.data.index; print([m for m in ('tensorflow', 'yaml', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
