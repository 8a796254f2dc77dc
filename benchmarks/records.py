"""Record files of real size: opening, indexing and planning them, and the wait of a restarted run for its first batch.

python -m benchmarks.records --folder DIR   # 2 GB; needs '.[benchmark]' and '.[test]'

The two files have as many records as the data sets of LLaVA-1.5 and lengths drawn as in benchmarks/packing.py; the
words are those of Python's manual, with a few of other scripts. The pictures are forty photographs, each the picture of
thousands of records, so that their headers come from the page cache; from a cold disk they would not. The tokenizer is
Mistral's of 32,000 pieces, a `tokenizer.model` of the same kind as Llama's.
"""

import argparse
import importlib.util
import json
import os
import pydoc_data.topics
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packing import PARTS

# Questions of a record, by part of the mix.
EXCHANGES = {
    "LLaVA-Instruct": 3,
    "ShareGPT": 4,
    "VQAv2": 8,
    "GQA": 9,
    "OKVQA": 2,
    "OCR-VQA": 6,
    "A-OKVQA": 1,
    "TextCaps": 1,
    "RefCOCO": 6,
    "Visual Genome": 6,
}
# In a hundredth of the records, as in conversations that people share.
OTHER_SCRIPTS = ("😀", "größer", "日本語", "привет")
NUM_CAPTIONS = 558_128
CONFIGS = {"captions": "configs/llava15_pretrain_7b.py", "mix": "configs/llava15_finetune_7b.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written, and kept")
    parser.add_argument("--share", type=float, default=1.0, help="share of the records, to try it out")
    parser.add_argument("--only", choices=("write", "first", "again"), help="one step of it, in this process")
    parser.add_argument("--name", choices=tuple(CONFIGS), help="of one file")
    chosen = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if chosen.only:
        steps = {"write": write, "first": _first_start, "again": _second_start}
        print(json.dumps(steps[chosen.only](chosen.folder, chosen.name, chosen.share)))
        return
    from benchmarks.report import as_table, machine

    rows = []
    for name in CONFIGS:
        row: dict[str, Any] = {"file": name}
        for step in ("write", "first", "again"):
            # A process each, since a process knows only the most that it ever held.
            command = [
                sys.executable,
                "-m",
                "benchmarks.records",
                f"--folder={chosen.folder}",
                f"--share={chosen.share}",
            ]
            done = subprocess.run([*command, f"--only={step}", f"--name={name}"], stdout=subprocess.PIPE, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
    facts = machine("cpu")
    print(f"{facts['command']}\n\n{facts['machine']}; {facts['date']}; load {facts['load_average']} at the end\n")
    # A column each would be too wide to read.
    print(as_table([{"what": key} | {row["file"]: row[key] for row in rows} for key in rows[0] if key != "file"]))


def write(folder: Path, name: str, share: float) -> dict[str, Any]:
    """Writes the pictures, the tokenizer's folder and the records of one of the configs."""
    from benchmarks.images import write_photographs

    rng = np.random.default_rng(0)
    pictures, tokenizer, path = folder / "pictures", folder / "tokenizer", folder / f"{name}.json"
    pictures.mkdir(parents=True, exist_ok=True)
    tokenizer.mkdir(exist_ok=True)
    names = [file.name for file in write_photographs(pictures)]
    package = importlib.util.find_spec("mistral_common")
    assert package is not None, "pip install mistral-common"
    assert package.origin is not None
    shutil.copyfile(Path(package.origin).parent / "data" / "tokenizer.model.v1", tokenizer / "tokenizer.model")
    # As Vicuna-7B v1.5 has it.
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    words = " ".join(pydoc_data.topics.topics.values()).split()
    with open(path, "w") as file:
        file.write("[")
        for number, (part, length) in enumerate(_lengths(name, share, rng)):
            record = _caption(number, length, words, names, rng) if name == "captions" else None
            record = record or _conversation(number, part, length, words, names, rng)
            file.write(("," if number else "") + "\n" + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")
    return {"MB": round(path.stat().st_size / 1e6)}


def _lengths(name: str, share: float, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Part and words of every record, shuffled."""
    parts = {"captions": (NUM_CAPTIONS, 10, 0.45, True)} if name == "captions" else PARTS
    drawn = []
    for part, (count, mean, sigma, _) in parts.items():
        words = mean * np.exp(sigma * rng.standard_normal(round(count * share)) - sigma**2 / 2)
        drawn += [(part, max(1, int(length))) for length in words]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def _caption(number: int, length: int, words: list[str], names: list[str], rng: np.random.Generator) -> dict[str, Any]:
    return {
        "id": f"{number:09}",
        "image": names[rng.integers(len(names))],
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": _text(length, words, rng)},
        ],
    }


def _conversation(
    number: int, part: str, length: int, words: list[str], names: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    has_picture = PARTS[part][3]
    exchanges = 1 + int(rng.poisson(EXCHANGES[part] - 1))
    turns = []
    for i in range(exchanges):
        mark = "<image>\n" if has_picture and i == 0 else ""
        question, answer = (_text(max(1, length // (2 * exchanges)), words, rng) for _ in range(2))
        turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    picture = {"image": names[rng.integers(len(names))]} if has_picture else {}
    return {"id": f"{number:012}", **picture, "conversations": turns}


def _text(length: int, words: list[str], rng: np.random.Generator) -> str:
    at = int(rng.integers(len(words) - length)) if length < len(words) else 0
    text = " ".join(words[at : at + length])
    if rng.random() < 0.01:
        text += " " + OTHER_SCRIPTS[rng.integers(len(OTHER_SCRIPTS))]
    return text


def config_of(folder: Path, name: str):
    """The config, to read what `write` wrote."""
    from llava_jax.train.config import load_config

    fields = {
        "data.records": folder / f"{name}.json",
        "data.image_root": folder / "pictures",
        "data.tokenizer": folder / "tokenizer",
        "data.workers": 2,
    }
    return load_config(CONFIGS[name], tuple(f"{field}={value}" for field, value in fields.items()))


def _first_start(folder: Path, name: str, share: float) -> dict[str, Any]:
    """Reads the file, and measures every record with as many processes as there are CPUs."""
    from llava_jax.data.index import load_index
    from llava_jax.data.mix import as_mix, open_records
    from llava_jax.train.loop import data_needs

    del share
    config, cache = config_of(folder, name), folder / "cache" / name
    shutil.rmtree(cache, ignore_errors=True)
    imported = _megabytes(resource.RUSAGE_SELF)
    start = time.perf_counter()
    records = open_records(as_mix(config.data.records), as_written=False)
    opened, after = time.perf_counter(), _megabytes(resource.RUSAGE_SELF)
    index = load_index(config.data.records, config.data.rows, data_needs(config), cache)
    measured = time.perf_counter()
    return {
        "records": len(records),
        "refused": len(index.refused),
        "MB held after imports": imported,
        "open: s": opened - start,
        "open: MB at most": after,
        "index: s": measured - opened,
        "index: records/s": len(records) / (measured - opened),
        "index: MB at most": _megabytes(resource.RUSAGE_SELF),
        "index: MB of a worker at most": _megabytes(resource.RUSAGE_CHILDREN),
    }


def _second_start(folder: Path, name: str, share: float) -> dict[str, Any]:
    """What a run that was started before does until its first batch is there, for one host of 8 devices."""
    from llava_jax.data.index import load_index
    from llava_jax.data.pipeline import RowReader, read_batches
    from llava_jax.train.loop import data_needs, plan_data

    del share
    config = config_of(folder, name)
    start = time.perf_counter()
    needs = data_needs(config)
    index = load_index(config.data.records, config.data.rows, needs, folder / "cache" / name)
    loaded = time.perf_counter()
    plan = plan_data(config, index, rows_multiple=8 * config.accumulation)
    planned = time.perf_counter()
    places = np.arange(plan.rows_per_step)
    reader = RowReader(index=index, plan=plan, rows=config.data.rows, needs=needs, first_step=0, places=places)
    batches = read_batches(reader, num_workers=config.data.workers)
    next(batches)
    first = time.perf_counter()
    for _ in range(2):
        next(batches)
    third = time.perf_counter()
    batches.close()
    return {
        "again: index from the cache, s": loaded - start,
        "again: plan, s": planned - loaded,
        "again: steps": plan.num_steps,
        "again: rows a step": plan.rows_per_step,
        "again: first batch, s": first - planned,
        "again: each of the next two, s": (third - first) / 2,
        "again: MB at most": _megabytes(resource.RUSAGE_SELF),
        "again: MB of a worker at most": _megabytes(resource.RUSAGE_CHILDREN),
    }


def _megabytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1000


if __name__ == "__main__":
    main()
