"""The Llama tokenizer gives the ids that the slow tokenizer of transformers 4.37.2 gave (recorded with it)."""

import importlib.resources
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.llama_tokenizer import LlamaTokenizer
from llava_jax.data.tokenizer import FastTokenizer, Tokenizer, open_tokenizer
from llava_jax.errors import UserError

MODEL = importlib.resources.files(pytest.importorskip("mistral_common")) / "data" / "tokenizer.model.v1"
# Text, ids with legacy true, ids with legacy false; without BOS.
RECORDED = json.loads((Path(__file__).parent.parent / "golden" / "llama_tokenizer.json").read_text())


def _folder(path: Path, **config) -> str:
    path.mkdir(exist_ok=True)
    shutil.copyfile(str(MODEL), path / "tokenizer.model")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | config))
    return str(path)


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def tokenizer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tokenizer:
    special = ["<|im_start|>", {"content": "<LS>", "lstrip": True}, {"content": "<RS>", "rstrip": True}]
    special.append({"content": "<SW>", "single_word": True})
    path = tmp_path_factory.mktemp("tokenizer")
    return open_tokenizer(_folder(path, legacy=request.param, additional_special_tokens=special))


def test_ids_and_text_are_those_of_the_slow_tokenizer(tokenizer: Tokenizer):
    assert len(RECORDED) > 200
    for record in RECORDED:
        ids = record["legacy" if tokenizer.legacy else "not_legacy"]
        assert tokenizer.encode(record["text"]).ids.tolist() == ids["ids"], record["text"]
        assert tokenizer.decode(ids["ids"]) == ids["decoded"], record["text"]


def test_an_id_of_no_token_is_passed_over(tokenizer: Tokenizer, needs):
    """Published models have more rows than tokens, and sampling may draw any of them."""
    for known in (tokenizer, needs.tokenizer):
        ids, none = known.encode("a picture").ids.tolist(), known.vocab_size + 40
        assert known.decode([none, ids[0], none, *ids[1:], none]) == known.decode(ids)
        assert known.decode([none]) == ""


def test_starts_are_where_the_tokens_stand(tokenizer: Tokenizer):
    for text in ("USER: é 🚪 hi</s>USER: <|im_start|>a", "a<|im_start|> b", "<s>x", "  two", "\u2581a"):
        ids, starts = tokenizer.encode(text)
        assert (np.diff(starts) >= 0).all()
        for start, following in zip(starts, [*starts[1:], len(text)], strict=True):
            assert 0 <= start <= following <= len(text)
        for token in ("</s>", "<|im_start|>", "<s>"):
            if token in text:
                assert starts[ids.tolist().index(tokenizer.token_id(token))] == text.index(token)


def test_legacy_is_true_where_the_config_is_silent(tmp_path: Path):
    assert open_tokenizer(_folder(tmp_path)).legacy is True
    assert open_tokenizer(_folder(tmp_path, legacy=None)).legacy is True
    assert open_tokenizer(_folder(tmp_path, legacy=False)).legacy is False


def test_the_model_wins_over_the_json_beside_it_unless_it_is_no_llama(tmp_path: Path, needs):
    folder = _folder(tmp_path, eos_token="</s>")
    shutil.copyfile(Path(needs.tokenizer.folder) / "tokenizer.json", tmp_path / "tokenizer.json")
    assert isinstance(open_tokenizer(folder), LlamaTokenizer)
    assert isinstance(open_tokenizer(_folder(tmp_path, tokenizer_class="LlamaTokenizerFast")), LlamaTokenizer)
    folder = _folder(tmp_path, tokenizer_class="GemmaTokenizer", eos_token="</s>")
    assert isinstance(open_tokenizer(folder), FastTokenizer)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer_class 'GemmaTokenizer'"):
        open_tokenizer(folder)


def test_added_tokens_are_numbered_after_the_vocabulary_and_saved(tmp_path: Path):
    folder = _folder(tmp_path / "a", legacy=False)
    tokenizer = open_tokenizer(folder).with_tokens("[PAD]", "<im_start>", "</s>")
    assert [tokenizer.token_id(t) for t in ("[PAD]", "<im_start>", "</s>", "<im_end>")] == [32000, 32001, 2, None]
    assert tokenizer.vocab_size == 32002
    assert tokenizer.encode("a<im_start>b").ids.tolist().count(32001) == 1
    tokenizer.save(tmp_path / "b")
    saved = open_tokenizer(str(tmp_path / "b"))
    for text in ("x <im_start> [PAD]</s> y", "<im_start>"):
        np.testing.assert_array_equal(saved.encode(text).ids, tokenizer.encode(text).ids)
        assert saved.decode(saved.encode(text).ids.tolist()) == tokenizer.decode(tokenizer.encode(text).ids.tolist())
    assert saved.fingerprint() == tokenizer.fingerprint() != open_tokenizer(folder).fingerprint()


def test_older_folders_keep_their_tokens_in_two_files(tmp_path: Path):
    folder = _folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<im_patch>": 32000, "[PAD]": 32001}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    tokenizer = open_tokenizer(folder)
    assert tokenizer.pad_id == 32001
    assert tokenizer.encode("<im_patch>").ids.tolist() == [32000]
    # Not special: a reader sees it.
    assert tokenizer.decode([32000, 32001]) == "<im_patch>"


def test_a_tokenizer_pickles_as_its_folder(tmp_path: Path):
    tokenizer = open_tokenizer(_folder(tmp_path, legacy=False), ("<im_start>",))
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode("a<im_start>b").ids, tokenizer.encode("a<im_start>b").ids)
    assert len(pickle.dumps(tokenizer)) < 1000


def test_a_folder_without_bos_opens_nothing(tmp_path: Path):
    assert open_tokenizer(_folder(tmp_path, add_bos_token=False)).bos_id is None


def test_what_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="add_eos_token"):
        open_tokenizer(_folder(tmp_path, add_eos_token=True))
    folder = _folder(tmp_path, eos_token="<nowhere>")
    assert open_tokenizer(folder).eos_id == 32000  # transformers numbers it anew, too
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="tokenizer.model must be a sentencepiece model"):
        open_tokenizer(folder)
