"""A tokenizer from a checkpoint folder, with the character at which every token starts."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from llava_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers


class Encoding(NamedTuple):
    """Token ids and, for each, the index of the character where it starts."""

    ids: Int[np.ndarray, " t"]
    starts: Int[np.ndarray, " t"]


class Tokenizer:
    """`tokenizer.json` and `tokenizer_config.json` of a folder, as transformers saves them.

    Read with the `tokenizers` library, which transformers' fast tokenizers wrap, so that no code or template of a
    checkpoint ever runs. Pickles as its folder.
    """

    def __init__(self, folder: str):
        self.folder = folder
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"A tokenizer folder must hold tokenizer.json; got {folder!r}, which does not. "
                "Save one with transformers' AutoTokenizer.save_pretrained."
            )
        config_path = Path(folder) / "tokenizer_config.json"
        try:
            config = json.loads(config_path.read_text()) if config_path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{config_path} must be JSON: {error}. Save the tokenizer again.") from None
        if not isinstance(config, dict):
            raise UserError(f"{config_path} must hold a JSON object; got {config!r:.80}. Save the tokenizer again.")
        self.eos_id = self._id(config.get("eos_token"), "eos_token")
        # Whether a sequence opens with BOS is decided by the post-processor, not by the config's wishes.
        opening = self._tokenizer.encode("").ids
        bos = config.get("bos_token")
        self.bos_id = opening[0] if opening and bos and opening[0] == self._id(bos, "bos_token") else None

    @functools.cached_property
    def _tokenizer(self) -> "tokenizers.Tokenizer":
        import tokenizers

        path = str(Path(self.folder) / "tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # The library raises nothing more special.
            raise UserError(f"{path} must be a tokenizer: {error}. Save it again.") from None
        # Whoever saved the file may have left these on; transformers switches them off at every call.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _id(self, token: str | dict | None, name: str) -> int:
        text = token.get("content") if isinstance(token, dict) else token
        token_id = None if text is None else self._tokenizer.token_to_id(text)
        if token_id is None:
            raise UserError(
                f"{name} of tokenizer_config.json must be a token of the vocabulary; got {text!r} in {self.folder!r}."
            )
        return token_id

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> Encoding:
        """Ids of `text` alone: nothing is put before or after it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int32)
        return Encoding(np.array(encoding.ids, np.int32), starts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._tokenizer.decode(list(map(int, ids)))

    def fingerprint(self) -> str:
        """sha256 of the file that decides every id."""
        return hashlib.sha256((Path(self.folder) / "tokenizer.json").read_bytes()).hexdigest()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str]]:
        return Tokenizer, (self.folder,)
