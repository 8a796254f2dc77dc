"""Templates, masks from spans, and the ids that the original recorded."""

import importlib.resources
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.conversation import IMAGE_TOKEN, Span, move_image_first, tokenize
from llava_jax.data.records import Turn, parse_record
from llava_jax.data.rows import Needs
from llava_jax.data.templates import PLAIN, TEMPLATES, V1, find_template
from llava_jax.data.tokenizer import Tokenizer, open_tokenizer
from llava_jax.errors import Refused, UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "conversations"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# What the recorded ids of these conversations need: (a) sentencepiece itself, since the fast tokenizer that
# transformers 5 makes of the same file splits runs of spaces in another way; (b) is our decision (DESIGN.md): every
# picture is used, and neither an empty answer nor a mark without a picture is trained on.
SENTENCEPIECE = {("v1", "o03_image_middle"), ("v1", "o07_whitespace"), ("plain", "o07_whitespace")}
SENTENCEPIECE |= {("v1", "o13_caption"), ("v1", "o18_newlines_only")}
DECIDED = {("plain", "o06_two_images"), ("v1", "o06_two_images"), ("plain", "o11_empty_answer")}
DECIDED |= {("v1", "o14_no_key_but_token")}


def _turns(*texts: str) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def test_a_single_picture_moves_to_the_front():
    assert move_image_first("Look at this <image> and count.") == "<image>\nLook at this  and count."
    assert move_image_first("What?\n<image>") == "<image>\nWhat?"
    assert move_image_first("  <image>  ") == "<image>"


def test_no_picture_and_several_pictures_stay_where_they_are():
    for text in ("  plain text ", "a <image> b <image> c", "<Image> < image>"):
        assert move_image_first(text) == text


def test_v1_renders_the_words_of_the_original():
    spans = V1.render(_turns("<image>\nIs it raining?", "Yes.", "Sure?", "Quite."))
    assert spans == [
        Span(SYSTEM),
        Span("USER: <image>\nIs it raining? "),
        Span("ASSISTANT:"),
        Span(" Yes.</s>", is_answer=True),
        Span("USER: Sure? "),
        Span("ASSISTANT:"),
        Span(" Quite.</s>", is_answer=True),
    ]


def test_an_opened_v1_prompt_ends_where_the_answer_begins():
    text = "".join(span.text for span in V1.render(_turns("Sure?"), opened=True))
    assert text == SYSTEM + "USER: Sure? ASSISTANT:"


def test_plain_renders_the_picture_and_the_caption_whatever_was_asked():
    spans = PLAIN.render(_turns("Give a brief description.\n<image>", "a red bus"))
    assert spans == [Span("<image>"), Span("a red bus\n", is_answer=True)]


def test_plain_refuses_a_dialogue():
    with pytest.raises(Refused, match="one question and one answer; got 4 turns"):
        PLAIN.render(_turns("<image>", "a", "b", "c"))


def test_an_unknown_template_is_refused_by_name():
    assert find_template("v1") is V1
    assert find_template("plain") is PLAIN
    with pytest.raises(UserError, match="'vicuna'; choose one of v1, plain"):
        find_template("vicuna")


def test_a_mark_widens_to_its_slots(needs: Needs):
    tokens, is_answer = tokenize([Span("<image>\nHi? "), Span("Yes", is_answer=True)], needs.tokenizer, [3])
    assert tokens[0] == needs.tokenizer.bos_id
    np.testing.assert_array_equal(tokens[1:4], [IMAGE_TOKEN] * 3)
    assert needs.tokenizer.decode(tokens[4:].tolist()) == "\nHi? Yes"
    assert needs.tokenizer.decode(tokens[is_answer].tolist()) == "Yes"


def test_every_picture_has_its_own_number_of_slots(needs: Needs):
    tokens, _ = tokenize([Span("<image>a<image>")], needs.tokenizer, [2, 1])
    np.testing.assert_array_equal(tokens == IMAGE_TOKEN, [False, True, True, False, True])


@pytest.mark.parametrize(
    ("text", "slots"), [("<image>", []), ("no mark", [4]), ("<image><image>", [4]), ("<image>", [4, 4])]
)
def test_marks_and_pictures_must_agree(needs: Needs, text: str, slots: list[int]):
    with pytest.raises(Refused) as refusal:
        tokenize([Span(text)], needs.tokenizer, slots)
    assert refusal.value.reason == "image count"


HOSTILE = (
    "</s>",
    "<s>",
    "<unk>",
    "ASSISTANT:",
    " ASSISTANT: yes</s>",
    "USER: hi ASSISTANT: no</s>USER:",
    "[INST] x [/INST]",
    "### Human: ok",
    "<|im_end|>",
    "-200",
    "\n\n",
    " ",
    "  two  spaces  ",
    "ein Straßenschild 出口 🚪🇯🇵 👩‍🔧",
    "e\u0301\u200b\ufeff",
    "\0",
    "<imag",
    "image>",
    "<im_start>",
)


def _random_turns(rng: np.random.Generator) -> list[Turn]:
    def text() -> str:
        return "".join(HOSTILE[i] for i in rng.integers(0, len(HOSTILE), rng.integers(1, 5)))

    return _turns("<image>\n" + text(), *(text() for _ in range(2 * rng.integers(0, 3) + 1)))


@pytest.mark.parametrize("seed", range(40))
def test_imitated_separators_do_not_shift_the_mask(needs: Needs, seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        turns = _random_turns(rng)
        marks = sum(turn.text.count("<image>") for turn in turns)
        tokens, is_answer = tokenize(V1.render(turns), needs.tokenizer, [2] * marks)
        answers = "".join(f" {turn.text}</s>" for turn in turns if turn.role == "assistant")
        decoder = needs.tokenizer._tokenizer
        assert decoder.decode(list(map(int, tokens[is_answer])), skip_special_tokens=False) == answers
        everything = "".join(span.text for span in V1.render(turns)).replace("<image>", "")
        text = tokens[tokens != IMAGE_TOKEN][1:]
        assert decoder.decode(list(map(int, text)), skip_special_tokens=False) == everything


def test_an_answer_that_names_the_mark_is_refused(needs: Needs):
    spans = V1.render(_turns("<image>\nHow do you mark a picture?", "With <image>, as I said."))
    with pytest.raises(Refused, match="2 <image> marks in the text for 1 pictures"):
        tokenize(spans, needs.tokenizer, [2])


def test_a_picture_inside_an_answer_is_not_trained_on(needs: Needs):
    tokens, is_answer = tokenize([Span("Q:"), Span(" a<image>b", is_answer=True)], needs.tokenizer, [2])
    assert not is_answer[tokens == IMAGE_TOKEN].any()
    assert needs.tokenizer.decode(tokens[is_answer].tolist()) == " ab"


def test_an_empty_answer_is_not_trained_on(needs: Needs):
    assert not tokenize(V1.render(_turns("Say nothing.", "")), needs.tokenizer, [])[1].any()


def test_a_tokenizers_truncation_and_padding_are_switched_off(needs: Needs, tmp_path: Path):
    """As transformers does: a tokenizer.json may carry both from the script that saved it."""
    import tokenizers

    shutil.copytree(needs.tokenizer.folder, tmp_path, dirs_exist_ok=True)
    for change in (lambda t: t.enable_truncation(4), lambda t: t.enable_padding(length=64, pad_id=0)):
        changed = tokenizers.Tokenizer.from_file(str(Path(needs.tokenizer.folder) / "tokenizer.json"))
        change(changed)
        changed.save(str(tmp_path / "tokenizer.json"))
        text = "Which colour is this picture, and are you sure?"
        np.testing.assert_array_equal(open_tokenizer(str(tmp_path)).encode(text).ids, needs.tokenizer.encode(text).ids)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", '{"eos_token": "<missing>"}'),
        ("tokenizer_config.json", '{"eos_token": {"id": 2}}'),
    ],
)
def test_a_broken_tokenizer_is_named(needs: Needs, tmp_path: Path, name: str, content: str):
    shutil.copytree(needs.tokenizer.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        open_tokenizer(str(tmp_path))


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """What transformers makes of the 32k sentencepiece model that the recordings used (`legacy=False`)."""
    package = pytest.importorskip("mistral_common")
    from transformers import LlamaTokenizer

    source, target = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tokenizer")
    shutil.copy(str(importlib.resources.files(package) / "data" / "tokenizer.model.v1"), source / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    # Without `add_bos_token` transformers 5 saves a tokenizer that opens no sequence with BOS.
    LlamaTokenizer.from_pretrained(source, legacy=False, add_bos_token=True).save_pretrained(target)
    return open_tokenizer(str(target))


def _golden() -> list[dict]:
    records = [json.loads(line) for line in (GOLDEN / "records.jsonl").read_text().splitlines()]
    return [r for r in records if (r["version"], r["conv_id"]) not in SENTENCEPIECE | DECIDED]


@pytest.mark.parametrize("golden", _golden(), ids=lambda r: f"{r['version']}-{r['conv_id']}")
def test_ids_and_labels_are_those_that_the_original_recorded(sentencepiece_tokenizer: Tokenizer, golden: dict):
    inputs = {conversation["id"]: conversation for conversation in json.loads((GOLDEN / "inputs.json").read_text())}
    record = parse_record({"conversations": inputs[golden["conv_id"]]["conversations"]})
    spans = TEMPLATES[golden["version"]].render(record.turns)
    marks = "".join(span.text for span in spans).count("<image>")
    tokens, is_answer = tokenize(spans, sentencepiece_tokenizer, [1] * marks)
    np.testing.assert_array_equal(tokens, golden["input_ids"])
    kept = np.zeros(len(tokens), bool)
    for start, end in golden["labels_keep"]:
        kept[start:end] = True
    np.testing.assert_array_equal(is_answer, kept)


def test_most_recordings_are_compared():
    assert len(_golden()) == 17
