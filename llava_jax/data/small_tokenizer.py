"""Trains a small byte-level tokenizer on a text of our own: a 32k vocabulary would cost more than a tiny model."""

import json
from collections.abc import Iterable
from pathlib import Path

SPECIAL = ("<unk>", "<s>", "</s>")


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` as transformers does; `<s>` opens every sequence.

    Byte-level BPE knows every text, so nothing maps to `<unk>`. The vocabulary has at most `vocab_size` tokens,
    fewer where the text has no more pairs to merge.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
