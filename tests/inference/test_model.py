"""Opening a folder, and turning conversations and pictures into prompts."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.convert.card import ModelCard
from llava_jax.convert.folder import write_model_folder
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.records import Turn
from llava_jax.data.templates import PLAIN, V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import CheckpointError, UserError
from llava_jax.inference.generate import Sampling, generate
from llava_jax.inference.model import Model, Processor, load, read_images
from llava_jax.models.build import random_parameters
from tests.inference.conftest import SMALL
from tests.tiny import CLIP

RED = Image.new("RGB", (8, 8), (255, 0, 0))


@pytest.fixture(scope="module")
def folder(values: dict[str, np.ndarray], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    card = ModelCard(model=SMALL, template="v1", image_mode="pad", label="test")
    write_model_folder(str(folder), card, values, tokenizer=str(data / "tokenizer"), source="random")
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_loaded_model_answers_as_the_one_written(folder: Path, model: Model, processor: Processor):
    loaded, its_processor = load(str(folder))
    assert loaded.config == SMALL
    assert its_processor.template is V1
    assert its_processor.image_mode == "pad"
    assert (its_processor.image_size, its_processor.num_features) == (8, 4)
    assert set(loaded.params) == set(model.params)
    for name, value in model.params.items():
        np.testing.assert_array_equal(loaded.params[name], value)
    # The structures are equal, so that a second model of the same shape compiles nothing.
    assert loaded.graphdef == model.graphdef
    assert hash(loaded.graphdef) == hash(model.graphdef)
    sampling = Sampling(max_new_tokens=4)
    turns = [Turn("user", "Which colour?")]
    assert generate(loaded, its_processor, [its_processor.ask(turns, [RED])], sampling) == generate(
        model, processor, [processor.ask(turns, [RED])], sampling
    )


def test_pictures_are_framed_if_the_card_says_so(values: dict[str, np.ndarray], data: Path, tmp_path: Path):
    card = ModelCard(model=SMALL, template="v1", image_mode="pad", label="test", mm_use_im_start_end=True)
    open_tokenizer(str(data / "tokenizer"), ("<im_start>", "<im_end>")).save(tmp_path / "tokenizer")
    write_model_folder(str(tmp_path / "m"), card, values, tokenizer=str(tmp_path / "tokenizer"), source="random")
    for template in (None, "llava_v0"):
        _, processor = load(str(tmp_path / "m"), template=template)
        tokens = processor.ask([Turn("user", "Which?")], [RED]).tokens
        first, last = np.flatnonzero(tokens == IMAGE_TOKEN)[[0, -1]]
        known = [processor.tokenizer.token_id(name) for name in ("<im_start>", "<im_end>")]
        assert [tokens[first - 1], tokens[last + 1]] == known


def test_frames_that_the_tokenizer_would_spell_in_letters_are_refused(copy: Path):
    card = json.loads((copy / "model.json").read_text()) | {"mm_use_im_start_end": True}
    (copy / "model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="tokens <im_start> and <im_end>; the tokenizer of .* does not have both"):
        load(str(copy))


def test_a_named_template_replaces_the_folders(folder: Path):
    assert load(str(folder), template="plain")[1].template is PLAIN


def test_unknown_templates_are_refused(folder: Path):
    with pytest.raises(UserError, match="Unknown conversation template 'vicuna'; choose one of v1, plain"):
        load(str(folder), template="vicuna")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"from a folder or a hub name; '.*nowhere' does not exist\."):
        load(str(tmp_path / "nowhere"))


def test_a_clip_folder_cannot_answer(data: Path, tmp_path: Path):
    card = ModelCard(model=CLIP, template=None, image_mode="square", label="tower")
    params = random_parameters(CLIP, {"logit_scale"}, seed=0)
    write_model_folder(str(tmp_path / "clip"), card, params, tokenizer=str(data / "tokenizer"), source="random")
    with pytest.raises(CheckpointError, match="Only a LLaVA model can answer; '.*clip' holds a Clip model"):
        load(str(tmp_path / "clip"))


def test_a_folder_without_a_template_asks_for_one(copy: Path):
    card = json.loads((copy / "model.json").read_text()) | {"template": None}
    (copy / "model.json").write_text(json.dumps(card))
    _, processor = load(str(copy))
    for ask in (processor.ask, processor.answered):
        with pytest.raises(UserError, match="give --conv"):
            ask([Turn("user", "?")], [])
    assert processor.raw("?", []).tokens.size == 2


def test_a_folder_without_its_tokenizer_is_refused(copy: Path):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match=r"must hold tokenizer\.json"):
        load(str(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused_by_name(copy: Path, name: str):
    path = copy / "tokenizer" / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=name):
        load(str(copy))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model: Model, data: Path, tmp_path: Path):
    """An id past the vocabulary has no embedding: it would become NaN, and the answer nonsense in silence."""
    text = dataclasses.replace(SMALL.text, vocab_size=300)
    config = dataclasses.replace(SMALL, text=text)
    params = random_parameters(config, {"tower", "projector", "decoder"}, seed=0)
    card = ModelCard(model=config, template="v1", image_mode="pad", label="test")
    write_model_folder(str(tmp_path / "short"), card, params, tokenizer=str(data / "tokenizer"), source="random")
    with pytest.raises(CheckpointError, match="vocab"):
        load(str(tmp_path / "short"))


def test_pictures_that_the_text_does_not_place_come_first(processor: Processor):
    placed = processor.ask([Turn("user", "<image>\n<image>\nWhich?")], [RED, RED])
    left = processor.ask([Turn("user", "Which?")], [RED, RED])
    np.testing.assert_array_equal(placed.tokens, left.tokens)
    assert (left.tokens == IMAGE_TOKEN).sum() == 2 * SMALL.num_features
    later = processor.ask([Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "Which?")], [RED])
    first = processor.ask([Turn("user", "<image>\nHello"), Turn("assistant", "Hi"), Turn("user", "Which?")], [RED])
    np.testing.assert_array_equal(later.tokens, first.tokens)


def test_a_question_reads_as_in_training(processor: Processor):
    prompt = processor.ask([Turn("user", "Which?")], [])
    assert prompt.tokens[0] == processor.tokenizer.bos_id
    assert processor.tokenizer.decode(prompt.tokens[1:].tolist()) == f"{V1.system} USER: Which? ASSISTANT:"
    assert not prompt.is_answer.any()


def test_raw_text_gets_the_opening_token_and_nothing_else(processor: Processor):
    prompt = processor.raw("a <image> b", [RED])
    before, after = processor.tokenizer.encode("a ").ids, processor.tokenizer.encode(" b").ids
    expected = [processor.tokenizer.bos_id, *before, *[IMAGE_TOKEN] * SMALL.num_features, *after]
    assert prompt.tokens.tolist() == expected
    np.testing.assert_array_equal(prompt.images, np.array(RED)[None])


@pytest.mark.parametrize(("text", "pictures"), [("<image> <image>", 1), ("<image>", 2), ("<image>", 0), ("none", 1)])
def test_marks_and_pictures_must_agree(processor: Processor, text: str, pictures: int):
    marks = text.count("<image>")
    message = f"{marks} <image> marks in the text for {pictures} pictures.*Give one --image per <image> mark"
    with pytest.raises(UserError, match=message):
        processor.raw(text, [RED] * pictures)
    if marks:
        with pytest.raises(UserError, match=message):
            processor.ask([Turn("user", text)], [RED] * pictures)


def test_text_that_is_no_unicode_is_the_users_error(processor: Processor):
    """What a shell hands over of bytes that are not UTF-8."""
    for encode in (lambda: processor.raw("a\udcffb", []), lambda: processor.ask([Turn("user", "\udcff")], [])):
        with pytest.raises(UserError, match=r"valid Unicode; got a lone surrogate in .*udcff.*UTF-8"):
            encode()


def test_a_conversation_that_the_template_cannot_hold_is_the_users_error(processor: Processor):
    plain = dataclasses.replace(processor, template=PLAIN)
    assert plain.ask([Turn("user", "")], [RED]).tokens.tolist() == [1] + [IMAGE_TOKEN] * SMALL.num_features
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    with pytest.raises(UserError, match="plain"):
        plain.ask(turns, [])
    with pytest.raises(UserError, match="plain"):
        plain.answered([*turns, Turn("assistant", "d")], [])


def test_pictures_are_read_or_refused_by_name(tmp_path: Path):
    RED.save(tmp_path / "red.png")
    (image,) = read_images([str(tmp_path / "red.png")])
    np.testing.assert_array_equal(np.array(image), np.array(RED))
    (tmp_path / "words.png").write_text("no picture")
    data = (tmp_path / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    # A colour profile without a byte, behind the pixels: Pillow raises an IndexError.
    (tmp_path / "profile.png").write_bytes(data[:-12] + struct.pack(">I4sI", 0, b"iCCP", 0) + data[-12:])
    for name in ("missing.png", "words.png", "cut.png", "profile.png", ""):
        with pytest.raises(UserError, match=f"--image must name a readable picture; '.*{name}' is not"):
            read_images([str(tmp_path / name)])
