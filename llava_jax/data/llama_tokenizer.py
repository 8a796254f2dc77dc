"""The Llama tokenizer of a `tokenizer.model`, with the ids of the slow tokenizer that LLaVA was trained on."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from llava_jax.data.tokenizer import (
    ADDED,
    CONFIG,
    JSON,
    MODEL,
    SPECIAL_MAP,
    Encoding,
    Tokenizer,
    content,
    copy_files,
    read_config,
)
from llava_jax.errors import UserError

if TYPE_CHECKING:
    import sentencepiece

UNDERLINE = "\u2581"
# Special attributes in the order in which those that the vocabulary lacks are numbered.
ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Protobuf for "normalizer_spec { add_dummy_prefix: false }"; appended to a model it overrides that one field.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class AddedToken(NamedTuple):
    """A token that is cut out of the text before sentencepiece reads it (`AddedToken` of transformers).

    `lstrip` and `rstrip` eat the white space beside it; a `single_word` is none inside a longer word.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Pieces(NamedTuple):
    """A text cut by sentencepiece: pieces, their ids, and the characters where they start."""

    texts: list[str]
    ids: list[int]
    starts: Int[np.ndarray, " t"]


class LlamaTokenizer(Tokenizer):
    """`LlamaTokenizer` of transformers 4.37.2 (`tokenization_llama.py` there), over the sentencepiece library.

    With `legacy` every stretch of text between special tokens begins as a new sentence, with a space before it;
    without, only the whole text does. `tokenizer_config.json` decides; absent, it is True, as in transformers.
    """

    def __init__(self, folder: str, added: tuple[str, ...] = ()):
        self.folder = folder
        self.added = added
        config = read_config(folder)
        if config.get("add_eos_token"):
            raise UserError(
                f"add_eos_token of {folder!r} would close every stretch of a prompt; got True. Set it to false."
            )
        legacy = config.get("legacy")
        self.legacy = True if legacy is None else bool(legacy)
        self._special, self._tokens = self._read_added(config)
        self._pattern = re.compile(
            "|".join(re.escape(token.content) for token in sorted(self._tokens, key=lambda t: -len(t.content)))
        )
        self._by_content = {token.content: token for token in self._tokens}
        self._added_ids = {token.content: token_id for token, token_id in self._tokens.items()}
        self._contents = {token_id: text for text, token_id in self._added_ids.items()}
        ids = {name: self.token_id(token) for name, token in self._special.items()}
        self.bos_id = ids["bos_token"] if config.get("add_bos_token", True) else None
        self.eos_id = _known(ids["eos_token"], "eos_token", folder)
        self.unk_id = ids["unk_token"]
        self.pad_id = ids.get("pad_token")

    def _read_added(self, config: dict[str, Any]) -> tuple[dict[str, str], dict[AddedToken, int]]:
        """Special tokens by attribute, and the id of every added token (`_from_pretrained` of transformers).

        `added_tokens_decoder` of the config, where there is one, stands for the two older files.
        """
        attributes: dict[str, Any] = DEFAULTS | {
            name: config[name] for name in (*ATTRIBUTES, "additional_special_tokens") if config.get(name) is not None
        }
        tokens: dict[AddedToken, int] = {}
        if "added_tokens_decoder" in config:
            for token_id, value in config["added_tokens_decoder"].items():
                tokens[_token(value)] = int(token_id)
        else:
            others = attributes.get("additional_special_tokens", [])
            written = read_config(self.folder, SPECIAL_MAP)
            attributes |= {name: value for name, value in written.items() if value is not None}
            known = [content(token) for token in others]
            more = [token for token in written.get("additional_special_tokens", []) if content(token) not in known]
            attributes["additional_special_tokens"] = [*others, *more]
            for text, token_id in read_config(self.folder, ADDED).items():
                tokens[AddedToken(text)] = int(token_id)
        additional = [_token(value) for value in attributes.pop("additional_special_tokens", [])]
        special = {name: _token(value) for name, value in attributes.items() if name in ATTRIBUTES}
        in_order = [special[name] for name in ATTRIBUTES if name in special]
        count = len({self._model.id_to_piece(i) for i in range(len(self._model))} | {t.content for t in tokens})
        self._specials = {token.content for token in (*in_order, *additional)}
        for token in (*in_order, *additional, *map(AddedToken, self.added)):
            if any(token.content == other.content for other in tokens):
                continue
            token_id = self._model.piece_to_id(token.content)
            if self._model.id_to_piece(token_id) != token.content:
                token_id, count = count, count + 1
            tokens[token] = token_id
            self._specials.add(token.content)
        return {name: token.content for name, token in special.items()}, tokens

    @functools.cached_property
    def _model(self) -> "sentencepiece.SentencePieceProcessor":
        import sentencepiece

        path = Path(self.folder) / MODEL
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(path.read_bytes() + (b"" if self._is_legacy() else NO_DUMMY_PREFIX))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} must be a sentencepiece model: {error}. Copy it again.") from None
        return model

    def _is_legacy(self) -> bool:
        return self.legacy is True

    @property
    def vocab_size(self) -> int:
        return max(len(self._model), *(token_id + 1 for token_id in self._tokens.values()))

    def token_id(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def encode(self, text: str) -> Encoding:
        if not text:
            return Encoding(np.zeros(0, np.int32), np.zeros(0, np.int32))
        # The space before a text that is not legacy; `shift` leads back to the caller's characters.
        shift = 0 if self.legacy else 1
        text = text if self.legacy else UNDERLINE + text.replace(UNDERLINE, " ")
        ids: list[int] = []
        starts = [np.zeros(0, np.int32)]
        pieces: list[str] = []
        for start, part, token in self._split(text):
            new = Pieces([part], [self._added_ids[part]], np.zeros(1, np.int32)) if token else self._pieces(part)
            pieces += new.texts
            ids += new.ids
            starts.append(np.maximum(new.starts + (start - shift), 0))
        # Nothing comes between the start and a special token.
        first = 1 if shift and len(pieces) > 1 and pieces[0] == UNDERLINE and pieces[1] in self._specials else 0
        return Encoding(np.array(ids[first:], np.int32), np.concatenate(starts)[first:])

    def _split(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """Start, text and whether it is an added token, of every part of `text`; added tokens win from the left."""
        parts: list[tuple[int, str]] = []
        at = 0
        for match in self._pattern.finditer(text):
            parts += [(at, text[at : match.start()]), (match.start(), match.group())]
            at = match.end()
        parts = [part for part in (*parts, (at, text[at:])) if part[1]]
        for i, (start, part) in enumerate(parts):
            token = self._by_content.get(part)
            if token is None or not (token.lstrip or token.rstrip or token.single_word):
                continue
            left, right = parts[i - 1][1] if i else "", parts[i + 1][1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = (parts[i + 1][0] + len(right) - len(right.lstrip()), right.lstrip())
            if token.lstrip and left:
                parts[i - 1] = (parts[i - 1][0], left.rstrip())
            if token.single_word and left and left[-1] != " ":
                parts[i - 1], parts[i] = (parts[i - 1][0], parts[i - 1][1] + part), (start, "")
            elif token.single_word and right and right[0] != " ":
                parts[i], parts[i + 1] = (start, ""), (start, part + parts[i + 1][1])
        for start, part in parts:
            if part:
                yield start, part, part in self._by_content

    def _pieces(self, text: str) -> Pieces:
        """What sentencepiece makes of a text without added tokens."""
        if self.legacy or not text.startswith((UNDERLINE, " ")):
            return _encode(self._model, text)
        # Without its dummy prefix sentencepiece strips a leading space; one after an unknown token it keeps.
        unknown = self._special["unk_token"]
        texts, ids, starts = _encode(self._model, unknown + text)
        dropped = len(self._model.encode(unknown))
        return Pieces(texts[dropped:], ids[dropped:], np.maximum(starts[dropped:] - len(unknown), 0))

    def decode(self, ids: Sequence[int]) -> str:
        texts: list[str] = []
        run: list[str] = []
        for token_id in map(int, ids):
            text = self._contents.get(token_id)
            # Rows that pad the embedding to a round number are no tokens, and a sample may hit one all the same; as
            # transformers' fast tokenizers do, it is passed over.
            if text is None and token_id < len(self._model):
                run.append(self._model.id_to_piece(token_id))
            elif text is not None and text not in self._specials:
                before = self._join(run)
                texts += [before, text] if before else [text]
                run = []
        return " ".join([*texts, self._join(run)] if run else texts)

    def _join(self, pieces: list[str]) -> str:
        if not pieces:
            return ""
        # The space that `encode` puts before a text.
        return self._model.decode([pieces[0].removeprefix(UNDERLINE), *pieces[1:]])

    def fingerprint(self) -> str:
        digest = hashlib.sha256((Path(self.folder) / MODEL).read_bytes())
        digest.update(repr((self.legacy, self.bos_id, sorted(self._tokens.items()))).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        config = read_config(self.folder)
        copy_files(self.folder, folder)
        # A file made of the same model without the added tokens would contradict them.
        Path(folder, JSON).unlink(missing_ok=True)
        decoder = {
            str(token_id): {
                **token._asdict(),
                "normalized": token.content not in self._specials,
                "special": token.content in self._specials,
            }
            for token, token_id in sorted(self._tokens.items(), key=lambda item: item[1])
        }
        others = [text for text in self._added_ids if text in self._specials and text not in self._special.values()]
        config |= self._special
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": self.legacy, "added_tokens_decoder": decoder}
        config["additional_special_tokens"] = others
        Path(folder, CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _encode(model: "sentencepiece.SentencePieceProcessor", text: str) -> Pieces:
    mapping = model.encode(text, return_type="offset_mapping")
    starts = np.array([start for start, _ in mapping["offsets"]], np.int32)
    return Pieces(mapping["pieces"], mapping["ids"], starts)


def _token(value: Any) -> AddedToken:
    if not isinstance(value, dict):
        return AddedToken(str(value))
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(str(content(value)), **flags)


def _known(token_id: int | None, name: str, folder: str) -> int:
    if token_id is None:
        raise UserError(f"{name} of {CONFIG} must be a token of the vocabulary; {folder!r} has none.")
    return token_id
