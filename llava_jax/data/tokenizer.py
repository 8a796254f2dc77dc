"""A tokenizer from a checkpoint folder, with the character at which every token starts."""

import abc
import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from llava_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

MODEL = "tokenizer.model"
JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
# What a tokenizer is, in transformers' folders.
FILES = (MODEL, JSON, CONFIG, SPECIAL_MAP, ADDED)


class Encoding(NamedTuple):
    """Token ids and, for each, the index of the character where it starts."""

    ids: Int[np.ndarray, " t"]
    starts: Int[np.ndarray, " t"]


class Tokenizer(abc.ABC):
    """Text to ids and back, from the files of `folder`; pickles as its folder.

    `bos_id` opens every sequence, None if nothing does. `legacy` is how transformers treats text after a special
    token (None where the tokenizer has no such setting); the original's masks depend on it. `added` are special
    tokens beyond those of the folder, in order; what the folder has already is not added again.
    """

    folder: str
    added: tuple[str, ...]
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    legacy: bool | None

    @abc.abstractmethod
    def __init__(self, folder: str, added: tuple[str, ...] = ()): ...

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @abc.abstractmethod
    def encode(self, text: str) -> Encoding:
        """Ids of `text` alone: nothing is put before or after it."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 of everything that decides an id."""

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer, with what was added, as transformers reads it."""

    def with_tokens(self, *tokens: str) -> "Tokenizer":
        """The tokenizer with these special tokens, numbered after its own (`add_tokens` of the original)."""
        return type(self)(self.folder, (*self.added, *tokens))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, tuple[str, ...]]]:
        return type(self), (self.folder, self.added)


def open_tokenizer(folder: str, added: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a folder: of `tokenizer.model` if it is a Llama's, else of `tokenizer.json`.

    Where a Llama folder holds both, `tokenizer.model` wins: the original always opens the slow tokenizer
    (`use_fast=False`), so its weights know those ids, and a `tokenizer.json` made of the same model splits runs of
    spaces and text after special tokens in another way.

    Raises:
      UserError: the folder holds neither, or a file of it is damaged.
    """
    from llava_jax.data.llama_tokenizer import LlamaTokenizer

    path = Path(folder)
    kind = read_config(folder).get("tokenizer_class") or "LlamaTokenizer"
    is_llama = isinstance(kind, str) and kind.removesuffix("Fast") == "LlamaTokenizer"
    if (path / MODEL).is_file() and is_llama:
        return LlamaTokenizer(folder, tuple(added))
    if (path / JSON).is_file():
        return FastTokenizer(folder, tuple(added))
    raise UserError(
        f"A tokenizer folder must hold {JSON}, or the {MODEL} of a LlamaTokenizer; {folder!r} holds neither"
        f"{f' (tokenizer_class {kind!r})' if (path / MODEL).is_file() else ''}. "
        "Save one with transformers' AutoTokenizer.save_pretrained."
    )


def read_config(folder: str, name: str = CONFIG) -> dict[str, Any]:
    """One of the folder's JSON files, empty if it is not there."""
    path = Path(folder) / name
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON: {error}. Save the tokenizer again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object; got {config!r:.80}. Save the tokenizer again.")
    return config


def content(token: Any) -> str | None:
    """The text of a token that a config writes as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


class FastTokenizer(Tokenizer):
    """`tokenizer.json` and `tokenizer_config.json` of a folder, as transformers saves them.

    Read with the `tokenizers` library, which transformers' fast tokenizers wrap, so that no code or template of a
    checkpoint ever runs.
    """

    def __init__(self, folder: str, added: tuple[str, ...] = ()):
        self.folder = folder
        self.added = added
        config = read_config(folder)
        if not (Path(folder) / JSON).is_file():
            raise UserError(f"A tokenizer folder must hold {JSON}; {folder!r} does not. Name another folder.")
        self.eos_id = self._id(config.get("eos_token"), "eos_token")
        self.unk_id, self.pad_id = (
            None if config.get(name) is None else self._id(config[name], name) for name in ("unk_token", "pad_token")
        )
        # Whether a sequence opens with BOS is decided by the post-processor, not by the config's wishes.
        opening = self._tokenizer.encode("").ids
        bos = config.get("bos_token")
        self.bos_id = opening[0] if opening and bos and opening[0] == self._id(bos, "bos_token") else None
        # No fast tokenizer had such a setting when the original was written.
        self.legacy = None

    @functools.cached_property
    def _tokenizer(self) -> "tokenizers.Tokenizer":
        import tokenizers

        path = str(Path(self.folder) / JSON)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # The library raises nothing more special.
            raise UserError(f"{path} must be a tokenizer: {error}. Save it again.") from None
        # Whoever saved the file may have left these on; transformers switches them off at every call.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens(list(self.added))
        return tokenizer

    def _id(self, token: Any, name: str) -> int:
        text = content(token)
        token_id = None if text is None else self._tokenizer.token_to_id(text)
        if token_id is None:
            raise UserError(f"{name} of {CONFIG} must be a token of the vocabulary; got {text!r} in {self.folder!r}.")
        return token_id

    @property
    def vocab_size(self) -> int:
        # Not the number of tokens: ids may have gaps.
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> Encoding:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], np.int32)
        return Encoding(np.array(encoding.ids, np.int32), starts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def fingerprint(self) -> str:
        digest = hashlib.sha256((Path(self.folder) / JSON).read_bytes())
        digest.update("\0".join(self.added).encode())
        digest.update(repr((self.bos_id, self.eos_id)).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        copy_files(self.folder, folder)
        self._tokenizer.save(str(Path(folder) / JSON))


def copy_files(source: str, folder: str | Path, names: Sequence[str] = FILES) -> None:
    """Copies a tokenizer's files; other files of the source are left behind."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if Path(source, name).is_file() and Path(source).resolve() != target.resolve():
            shutil.copyfile(Path(source, name), target / name)
