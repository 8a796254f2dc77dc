"""Templates, masks from spans, and the ids that the original recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.conversation import IMAGE_TOKEN, Span, Template, marked, move_image_first, tokenize
from llava_jax.data.records import Turn
from llava_jax.data.rows import Needs
from llava_jax.data.templates import PLAIN, TEMPLATES, V1, find_template
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import Refused, UserError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def _turns(*texts: str) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def test_a_single_picture_moves_to_the_front():
    assert move_image_first("Look at this <image> and count.") == "<image>\nLook at this  and count."
    assert move_image_first("What?\n<image>") == "<image>\nWhat?"
    assert move_image_first("  <image>  ") == "<image>"


def test_no_picture_and_several_pictures_stay_where_they_are():
    for text in ("  plain text ", "a <image> b <image> c", "<Image> < image>", "<im<image>age>"):
        assert move_image_first(text) == text


def test_v1_renders_the_words_of_the_original():
    spans = V1.render(_turns("<image>\nIs it raining?", "Yes.", "Sure?", "Quite."))
    assert spans == [
        Span(SYSTEM),
        Span("USER: "),
        Span("<image>", is_picture=True),
        Span("\nIs it raining? "),
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
    spans = PLAIN.teach(_turns("Give a brief description.\n<image>", "a red bus"))
    assert spans == [Span("<image>", is_picture=True), Span("a red bus\n", is_answer=True)]


def test_plain_refuses_a_dialogue():
    with pytest.raises(Refused, match="one question and one answer; got 4 turns"):
        PLAIN.teach(_turns("<image>", "a", "b", "c"))


def test_an_unknown_template_is_refused_by_name():
    assert find_template("v1") is V1
    assert find_template("plain") is PLAIN
    with pytest.raises(UserError, match="'vicuna'; choose one of v1, plain, "):
        find_template("vicuna")


def test_a_mark_widens_to_its_slots(needs: Needs):
    tokens, is_answer = tokenize([*marked("<image>\nHi? "), Span("Yes", is_answer=True)], needs.tokenizer, [3])
    assert tokens[0] == needs.tokenizer.bos_id
    np.testing.assert_array_equal(tokens[1:4], [IMAGE_TOKEN] * 3)
    assert needs.tokenizer.decode(tokens[4:].tolist()) == "\nHi? Yes"
    assert needs.tokenizer.decode(tokens[is_answer].tolist()) == "Yes"


def test_every_picture_has_its_own_number_of_slots(needs: Needs):
    tokens, _ = tokenize(marked("<image>a<image>"), needs.tokenizer, [2, 1])
    np.testing.assert_array_equal(tokens == IMAGE_TOKEN, [False, True, True, False, True])


@pytest.mark.parametrize(
    ("text", "slots"), [("<image>", []), ("no mark", [4]), ("<image><image>", [4]), ("<image>", [4, 4])]
)
def test_marks_and_pictures_must_agree(needs: Needs, text: str, slots: list[int]):
    with pytest.raises(Refused) as refusal:
        tokenize(marked(text), needs.tokenizer, slots)
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


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_mark_in_an_answer_is_a_word_of_the_answer(needs: Needs, template: Template):
    turns = _turns("How do you mark it? <image>", "With <image>, as I said.")
    tokens, is_answer = tokenize(template.teach(template.arrange(turns)), needs.tokenizer, [2])
    assert (tokens == IMAGE_TOKEN).sum() == 2
    assert not is_answer[tokens == IMAGE_TOKEN].any()
    assert needs.tokenizer.decode(tokens[is_answer].tolist()).strip().startswith("With <image>, as I said.")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_template_trains_its_answers_and_what_closes_them(needs: Needs, template: Template):
    closing = {"###": "\n###", "\n": "\n"}.get(template.ends[1], template.ends[1])
    turns = _turns("<image>\nIs it?", "Yes USER: </s> ###") + _turns("Sure?", "[/INST] quite") * (
        template.name[-5:] != "plain"
    )
    tokens, is_answer = tokenize(template.teach(template.arrange(turns)), needs.tokenizer, [2])
    trained = needs.tokenizer._tokenizer.decode(tokens[is_answer].tolist(), skip_special_tokens=False)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    assert [part.strip() for part in _cut(trained, answers)] == [closing.strip()] * len(answers)


def _cut(text: str, answers: list[str]) -> list[str]:
    """What follows each answer in `text`, which holds them in this order."""
    ends = []
    for answer in answers:
        end, text = text.split(answer, 1)
        ends.append(end)
    return [*ends[1:], text]


def test_a_tagged_template_writes_its_tag_around_every_picture():
    template = TEMPLATES["v1_mmtag"]
    (turn,) = template.arrange(_turns("What? <image>"))
    assert turn.text == "<Image><image></Image>\nWhat?"
    assert template.framed().arrange(_turns("<image>"))[0].text == "<Image><im_start><image><im_end></Image>"
    assert V1.framed().arrange(_turns("a <image> b"))[0].text == "<im_start><image><im_end>\na  b"


def test_pictures_beside_the_text_come_first():
    assert V1.arrange(_turns("Which?"), unplaced=2)[0].text == "<image>\n<image>\nWhich?"
    # As the original's chats, where nothing is asked too.
    assert V1.arrange(_turns(" "), unplaced=1)[0].text == "<image>\n"
    opening = TEMPLATES["v1_mmtag"].arrange(_turns("Which?"), unplaced=1)
    assert [turn.text for turn in opening] == ["<Image><image></Image>", "Received.", "Which?"]


def test_the_question_that_holds_the_systems_words_must_not_be_empty():
    with pytest.raises(Refused, match="llama_2 template must not be empty"):
        TEMPLATES["llama_2"].render(_turns("", "Yes."))


def test_only_prompts_open_with_the_examples():
    template = TEMPLATES["v0"]
    assert "renewable" in "".join(span.text for span in template.render(_turns("Hi?"), opened=True))
    lesson = "".join(span.text for span in template.teach(_turns("Hi?", "Yes.")))
    assert lesson == f"{template.system}\n\n### Human: Hi?\n### Assistant: Yes.\n### "


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


def test_a_vocabulary_with_gaps_ends_after_its_largest_id(tmp_path: Path, data: Path):
    """Every id needs an embedding, however many tokens there are."""
    shutil.copytree(data / "tokenizer", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 999, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 999
    path.write_text(json.dumps(content))
    assert open_tokenizer(str(tmp_path)).vocab_size == 1000


def test_another_end_of_sequence_is_another_tokenizer(tmp_path: Path, data: Path, needs: Needs):
    """It is named in a file beside the vocabulary, and stands in every row."""
    shutil.copytree(data / "tokenizer", tmp_path, dirs_exist_ok=True)
    assert open_tokenizer(str(tmp_path)).fingerprint() == needs.tokenizer.fingerprint()
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("</s>", "<s>"))
    assert open_tokenizer(str(tmp_path)).fingerprint() != needs.tokenizer.fingerprint()
