"""The tokenizers that the recordings name, as folders that the product opens."""

import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llava_jax.data.tokenizer import Tokenizer, open_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")


def _sp32k(root: Path) -> Path:
    """The 32k sentencepiece model of the recordings; a directory without it leaves it to the package it came from."""
    path = root / "conversations" / "tokenizers" / "sp32k" / "tokenizer.model"
    if path.is_file():
        return path
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


@functools.cache
def named_tokenizer(root: Path, name: str, added: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer that a record calls `name`, with tokens that the run adds."""
    if name.startswith("bytebpe_"):
        return open_tokenizer(str(root / "conversations" / "tokenizers" / name), added)
    base = name.removesuffix("_chatml")
    special = CHATML if name.endswith("_chatml") else ()
    config: dict = {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": list(special)}
    with tempfile.TemporaryDirectory() as opened:
        folder = Path(opened)
        if base == "fast":
            config |= {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
            config["unk_token"] = "<unk>"
            _write_fast(_sp32k(root), folder / "tokenizer.json", special)
        else:
            assert base in ("slow_legacy_false", "slow_legacy_true"), f"unknown tokenizer {name}"
            config["legacy"] = base == "slow_legacy_true"
            shutil.copyfile(_sp32k(root), folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return open_tokenizer(str(folder), added)


def _write_fast(model: Path, target: Path, special: Sequence[str]) -> None:
    """What `LlamaTokenizerFast` of transformers 4.37.2 makes of a sentencepiece BPE model (`LlamaConverter` there)."""
    import sentencepiece
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor()
    pieces.Load(str(model))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    merges = []
    for piece in vocabulary:
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(pieces.get_score(vocabulary[piece]), pair) for pair in known]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", *special)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(target))
