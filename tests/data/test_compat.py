"""What `compat` repeats of the original, through the rows that a config names, and that the default does not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data import compat
from llava_jax.data.anyres import one_tile
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.records import Record, RecordFile, Turn, find_spans
from llava_jax.data.rows import Conversations, Needs
from llava_jax.data.templates import PLAIN, TEMPLATES, V1
from llava_jax.errors import Refused

ROWS = Conversations(template=V1, length=512, tiles=2)
SHIFTING = (Turn("user", "Who says ASSISTANT: first?"), Turn("assistant", "Nobody, or USER: x ASSISTANT: y."))


def _original(rows: Conversations) -> Conversations:
    return dataclasses.replace(rows, compat="original")


def test_a_sample_that_the_original_masks_is_trained_by_default(needs: Needs):
    record = Record((), SHIFTING)
    tokens, is_answer = ROWS.tokenize(record, [], needs)
    assert needs.tokenizer.decode(tokens[is_answer].tolist()) == f" {SHIFTING[1].text}"
    supervised = compat.supervise(
        V1, SHIFTING, needs.tokenizer, has_image=False, length=512, pad_id=0, compat="original"
    )
    assert supervised.is_mismatch
    assert not supervised.is_label.any()
    np.testing.assert_array_equal(supervised.tokens, tokens)
    with pytest.raises(Refused, match="no answer token"):
        _original(ROWS).tokenize(record, [], needs)


def test_the_original_leaves_surplus_pictures_out_and_collapses_those_of_a_turn(needs: Needs, data: Path):
    rows = dataclasses.replace(ROWS, template=PLAIN)
    names = tuple(sorted(path.name for path in (data / "pictures").iterdir())[:2])
    record = Record(names, (Turn("user", "<image><image>"), Turn("assistant", "two")))
    assert len(rows.load(record, needs, np.random.default_rng(0)).images) == 2
    example = _original(rows).load(record, needs, np.random.default_rng(0))
    assert len(example.images) == 1
    assert (example.tokens == IMAGE_TOKEN).sum() == needs.num_features
    assert not example.is_answer[example.tokens == IMAGE_TOKEN].any()


def test_a_missing_picture_is_refused_under_either(needs: Needs):
    record = Record(
        ("a.png",), (Turn("user", "<image> Hi <image>"), Turn("assistant", "Two?"), Turn("user", "<image>"))
    )
    for rows in (ROWS, _original(ROWS)):
        with pytest.raises(Refused, match="image count"):
            rows.tokenize(record, [one_tile(4)], needs)


def test_records_come_as_written_under_the_original(tmp_path: Path, needs: Needs):
    path = tmp_path / "records.json"
    turns = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    spans = find_spans(str(path))
    with pytest.raises(Refused, match="alternate"):
        RecordFile(str(path), spans)[0]
    record = RecordFile(str(path), spans, as_written=_original(ROWS).as_written)[0]
    assert [turn.text for turn in record.turns] == ["a", "b", "c"]
    hashes = dataclasses.replace(_original(ROWS), template=TEMPLATES["llava_v0"])
    assert hashes.tokenize(record, [], needs).is_answer.any()
    with pytest.raises(Refused, match="alternate"):
        _original(ROWS).tokenize(record, [], needs)


def test_an_unknown_version_leads_to_v1_only_under_the_original():
    assert compat.template_of("nowhere", "original") is V1
    assert compat.template_of("v0", "original") is V1
    assert compat.template_of("v0", "next") is TEMPLATES["default"]
    assert compat.template_of("mistral_orca", "original") is V1
    assert compat.template_of("mistral_orca", "next") is TEMPLATES["mistral_orca"]


def test_the_options_of_the_original_name_the_tokens_they_need(needs: Needs):
    rows = dataclasses.replace(ROWS, mm_use_im_patch_token=True, mm_use_im_start_end=True)
    assert rows.added_tokens == ("<im_patch>", "<im_start>", "<im_end>")
    tokenizer = needs.tokenizer.with_tokens(*rows.added_tokens)
    record = Record(("a.png",), (Turn("user", "Hi <image>"), Turn("assistant", "Yes.")))
    tokens, _ = rows.tokenize(record, [one_tile(4)], needs._replace(tokenizer=tokenizer))
    first, last = np.flatnonzero(tokens == IMAGE_TOKEN)[[0, -1]]
    assert (tokens[first - 1], tokens[last + 1]) == (tokenizer.token_id("<im_start>"), tokenizer.token_id("<im_end>"))
