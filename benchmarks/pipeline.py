"""Conversations and their photographs, from disk to the arrays of a step, on one core, with the original's way as peer.

python -m benchmarks.pipeline   # needs '.[benchmark]' and '.[test]'

The records are those of benchmarks/records.py, a few hundred of them, and those of them that have no picture. Ours goes
through what feeds a run: Grain, the plan, packed rows of bytes. The peer is the path of the original
(`LazySupervisedDataset`, `preprocess_v1` and the collator of `llava/train/train.py`) on transformers' tokenizer and PIL
image processor: padded batches of floats. Both know the lengths of the records before.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.grouping import group_by_modality_length
from benchmarks.images import TILE, expand_to_square
from benchmarks.report import arguments, in_turns, publish, rate, ratio

# Of the records of benchmarks/records.py; of `text` only those without a picture are kept.
SHARES = {"mix": 0.0004, "text": 0.004}
# Rows of a step, records of the peer's batch, and the length of either.
ROWS, BATCH, LENGTH = 6, 16, 2048
# What the original's constants are: `IGNORE_INDEX`, `IMAGE_TOKEN_INDEX`.
IGNORED, IMAGE = -100, -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
MARK = " ASSISTANT: "


class Example(NamedTuple):
    """One record of the peer's, a picture being one id of its own."""

    ids: list[int]
    labels: list[int]
    pixels: Any


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], sizes=("336",))
    # Everything that a pipeline does shares one core: threads of Grain, numpy and torch, too.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: list[dict[str, Any]] = []
    notes = {}
    with tempfile.TemporaryDirectory() as name:
        for kind, share in SHARES.items():
            ours = Ours(Path(name) / kind, kind, share)
            peer = None if chosen.only_ours else Peer(Path(name) / kind)
            runs = {"ours": ours.read} | ({} if peer is None else {"transformers": peer.read})
            seconds = in_turns(runs, repeats=chosen.repeats)
            for side, found in seconds.items():
                row = {"records": kind, "of": side, "tokens/s, one core": rate(ours.tokens, found)}
                row["pictures/s, one core"] = rate(ours.pictures, found) if ours.pictures else ""
                row["ours/peer"] = "" if side == "ours" else ratio(found, seconds["ours"])
                row["same ids, labels"] = "" if peer is None or side == "ours" else compared(ours, peer)
                rows.append(row)
            notes[kind] = f"{len(ours.index.records)} records, {ours.tokens:,} tokens, {ours.pictures} pictures"
    notes["what"] = (
        f"packed rows of {LENGTH} against padded batches of {BATCH}; tokens are real ones, 576 a picture; "
        f"{chosen.repeats} repeats in turns"
    )
    publish("pipeline", chosen, rows, notes)


class Ours:
    """What a run reads: its index is measured and its rows are planned before."""

    def __init__(self, folder: Path, kind: str, share: float):
        from benchmarks.records import config_of, write
        from llava_jax.data.index import load_index
        from llava_jax.data.plan import make_plan
        from llava_jax.train.loop import data_needs

        write(folder, "mix", share)
        path = folder / "mix.json"
        if kind == "text":
            records = [record for record in json.loads(path.read_text()) if "image" not in record]
            path.write_text(json.dumps(records))
        config = config_of(folder, "mix")
        self.rows, self.needs = config.data.rows, data_needs(config)
        self.index = load_index(config.data.records, self.rows, self.needs, folder / "cache", num_workers=1)
        self.plan = make_plan(
            self.index,
            self.rows.capacity,
            seed=0,
            shuffle=True,
            batch_rows=ROWS,
            batch_records=None,
            epochs=1,
            steps=None,
            rows_multiple=1,
        )
        self.tokens, self.pictures = int(self.index.tokens.sum()), int(self.index.tiles.sum())

    def read(self) -> None:
        from llava_jax.data.pipeline import RowReader, read_batches

        places = np.arange(self.plan.rows_per_step)
        reader = RowReader(
            index=self.index, plan=self.plan, rows=self.rows, needs=self.needs, first_step=0, places=places
        )
        read = sum(int((batch["segment_ids"] > 0).sum()) for batch in read_batches(reader, num_workers=0))
        assert read == self.tokens, "every record is read once"

    def example(self, number: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a record, as the peer writes them."""
        example = self.rows.load(self.index.records[number], self.needs, np.random.default_rng(0))
        ids = np.where(example.tokens < 0, IMAGE, example.tokens)
        return ids.tolist(), np.where(example.is_answer, ids, IGNORED).tolist()


class Peer:
    """The original's path, in its order: a picture is opened, padded and processed, then the text, then the batch."""

    def __init__(self, folder: Path):
        import transformers

        from llava_jax.models.clip import PIXEL_MEAN

        transformers.logging.set_verbosity_error()
        self.records = json.loads((folder / "mix.json").read_text())
        self.pictures = folder / "pictures"
        self.background = tuple(int(255 * x) for x in PIXEL_MEAN)
        self.tokenizer = read_tokenizer(folder / "tokenizer" / "tokenizer.model")
        self.processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, resample=Image.Resampling.BICUBIC
        )
        lengths = [self._length(record) for record in self.records]
        rng = np.random.default_rng(0)
        order = group_by_modality_length(lengths, BATCH, 1, lambda count: rng.permutation(count).tolist())
        self.batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]

    def read(self) -> None:
        for batch in self.batches:
            self._collate([self.example(number) for number in batch])

    def example(self, number: int) -> Example:
        record = self.records[number]
        pixels = None
        turns = [turn["value"] for turn in record["conversations"]]
        if "image" in record:
            image = Image.open(self.pictures / record["image"]).convert("RGB")
            image = expand_to_square(image, self.background)
            pixels = self.processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
            turns = [self._picture_first(text) for text in turns]
        asked = zip(turns[::2], turns[1::2], strict=True)
        text = f"{SYSTEM} " + "".join(f"USER: {question}{MARK}{answer}</s>" for question, answer in asked)
        ids = self._tokenize(text)
        labels = list(ids)
        labels[0], at = IGNORED, 1
        for place, part in enumerate(text.split("</s>")[:-1]):
            # As the original counts: BOS of a round's own tokens stands for the `</s>` that ends it.
            later = int(place > 0)
            question = part.split(MARK)[0] + MARK
            num_asked = len(self._tokenize(question)) - 2 - later
            labels[at : at + num_asked] = [IGNORED] * num_asked
            at += len(self._tokenize(part)) - later
        labels[at:] = [IGNORED] * len(labels[at:])
        return Example(ids, labels, pixels)

    @staticmethod
    def _picture_first(text: str) -> str:
        """`preprocess_multimodal`."""
        return f"<image>\n{text.replace('<image>', '').strip()}".strip() if "<image>" in text else text

    def _tokenize(self, text: str) -> list[int]:
        """`tokenizer_image_token`: pieces around pictures, each after the first without its BOS."""
        first, *others = (self.tokenizer(piece).input_ids for piece in text.split("<image>"))
        return first + [i for ids in others for i in (IMAGE, *ids[1:])]

    @staticmethod
    def _collate(examples: Sequence[Example]) -> dict[str, Any]:
        import torch

        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(e.ids) for e in examples], batch_first=True, padding_value=0)[:, :LENGTH]
        labels = pad([torch.tensor(e.labels) for e in examples], batch_first=True, padding_value=IGNORED)[:, :LENGTH]
        batch = {"input_ids": ids, "labels": labels, "attention_mask": ids != 0}
        pixels = [e.pixels for e in examples if e.pixels is not None]
        return batch | ({"images": torch.stack(pixels)} if pixels else {})

    @staticmethod
    def _length(record: Any) -> int:
        """`modality_lengths`."""
        words = sum(len(turn["value"].split()) for turn in record["conversations"])
        return words if "image" in record else -words


def read_tokenizer(model: Path) -> Any:
    """`LlamaTokenizer` of transformers; its own way to read a model file wants one version of protobuf."""
    import sentencepiece
    import transformers
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = generate_merges(vocabulary, {piece: pieces.get_score(i) for piece, i in vocabulary.items()})
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False, add_bos_token=True)


def compared(ours: Ours, peer: Peer) -> str:
    """Of how many records both make the same ids and labels, a picture's slots being many here and one there."""
    same = 0
    for number in range(len(peer.records)):
        theirs = peer.example(number)
        slots = [576 if i == IMAGE else 1 for i in theirs.ids]
        wide = [np.repeat(values, slots)[:LENGTH].tolist() for values in (theirs.ids, theirs.labels)]
        same += wide == list(ours.example(number))
    return f"{same}/{len(peer.records)}"


if __name__ == "__main__":
    main()
