"""Conversations: ids, labels, prompts and templates as the original recorded them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_jax.data import compat
from llava_jax.data.conversation import (
    IM_END,
    IM_PATCH,
    IM_START,
    IMAGE_MARK,
    IMAGE_TOKEN,
    Template,
    Tokenized,
    marked,
    tokenize,
)
from llava_jax.data.records import Turn, parse_record
from llava_jax.data.templates import TEMPLATES, chatml, dialogue, find_template, instruct, lines, paragraphs
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import Refused, UserError
from llava_jax.inference.stopping import Keywords
from tests.conformance.report import Case, expect_fields, not_built, reads
from tests.conformance.tokenizers import named_tokenizer

COMPANIONS = ("conversations/inputs.json", "conversations/tokenizers/*/*")
# Templates of LLaVA-NeXT that belong to a later stage, with the tokenizer that only they use.
LATER = ("qwen_1_5", "qwen_2", "qwen_2_5", "llava_llama_3", "gemma_instruct")
COMPATS: dict[str, compat.Compat] = {"llava": "original", "llava_next": "next"}


def _inputs(root: Path) -> dict[str, dict]:
    inputs = json.loads((root / "conversations" / "inputs.json").read_text())
    for value in inputs:
        expect_fields(value, "id", "has_image", "conversations")
    return {value["id"]: value for value in inputs}


def _expect_built(template: str) -> None:
    if template in LATER:
        not_built(f"template {template}")
    assert template in TEMPLATES, f"unknown template {template}"


def _added(record: dict) -> tuple[str, ...]:
    """Tokens that `train()` adds, in its order."""
    padding = ("[PAD]",) * (record["version"] == "v0")
    frame = (IM_START, IM_END) * record.get("mm_use_im_start_end", False)
    return padding + (IM_PATCH,) * record.get("mm_use_im_patch_token", False) + frame


def _by_default(record: dict, conversation: dict, tokenizer: Tokenizer) -> Tokenized:
    """Our ids and mask with one slot a picture; a text alone is cut to the length as `overflow="text"` does."""
    template = find_template(record["version"])
    template = template.framed() if record["mm_use_im_start_end"] else template
    turns = parse_record({"conversations": conversation["conversations"]}).turns
    slots = [1] * (sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user"))
    slots = slots if conversation["has_image"] else []
    if conversation["has_image"] and len(slots) == 0:
        raise Refused("image count", "a picture without a mark")
    tokens, is_answer = tokenize(template.teach(template.arrange(turns)), tokenizer, slots)
    cut = None if conversation["has_image"] else record["model_max_length"]
    return Tokenized(tokens[:cut], is_answer[:cut])


def _by_original(record: dict, conversation: dict, tokenizer: Tokenizer) -> compat.Supervised:
    which = COMPATS[record["source"]]
    template = compat.template_of(record["version"], which)
    template = template.framed() if record.get("mm_use_im_start_end") else template
    turns = parse_record({"conversations": conversation["conversations"]}, as_written=True).turns
    has_image = conversation["has_image"]
    turns = compat.arrange(template, turns, which) if has_image else turns
    pad_id = compat.pad_id_of(record["version"], tokenizer)
    assert pad_id == record["pad_token_id"]
    length = record["model_max_length"]
    return compat.supervise(template, turns, tokenizer, has_image=has_image, length=length, pad_id=pad_id, compat=which)


def _kept(record: dict) -> np.ndarray:
    kept = np.zeros(len(record["input_ids"]), bool)
    for start, end in record["labels_keep"]:
        kept[start:end] = True
    return kept


def _separators(template: Template) -> list[str]:
    """What the original takes for the borders of a conversation, wherever it stands."""
    if template.style is chatml:
        return [template.ends[1], template.roles[1].strip()]
    if template.style is instruct:
        return [template.ends[1], "[/INST] "]
    return [template.ends[1], f" {template.roles[1]}: "] if template.style is dialogue else []


def _difference(record: dict, conversation: dict) -> str | None:
    """The documented reason why a recording differs from the default; None where there is none."""
    texts = [turn["value"] for turn in conversation["conversations"]]
    roles = [turn["from"] for turn in conversation["conversations"]]
    template = TEMPLATES.get(record["version"])
    marks = [text.count(IMAGE_MARK) for text in texts]
    user = sum(n for n, role in zip(marks, roles, strict=True) if role == "human")
    opens = roles[0] == "human"
    if template is None or template.name != record["template"]:
        return "another version's template in silence"
    if record["warning"]:
        return "the whole sample masked on a mismatch"
    if roles[not opens :] != [("human", "gpt")[i % 2] for i in range(len(roles) - (not opens))]:
        return "roles that do not alternate"
    if template.lesson is paragraphs:
        return "### masks that drift"
    if conversation["has_image"] != (user > 0):
        return "marks and pictures that do not agree"
    if max(marks) > 1:
        return "several pictures of a turn collapse"
    if sum(marks) > user:
        return "a mark in an answer read as a picture"
    if any(separator in text for separator in _separators(template) for text in texts):
        return "separators in the text"
    if template.style is chatml:
        return "<|im_end|> masks that drift"
    if not texts[-1]:
        return "an empty answer trained on"
    if len(record["input_ids"]) >= record["model_max_length"]:
        return "no mismatch looked for in what the model's length cuts"
    if record["source"] == "llava_next" and any(text.startswith(IMAGE_MARK) for text in texts):
        return "a picture in front left as it stands"
    if record["source"] == "llava_next" and any("QA_GT_caption_based_noisy" in text for text in texts):
        return "words of one data set deleted"
    return None


@reads("conversations/conversations_llava.jsonl", "conversations/conversations_next.jsonl")
def test_conversation(case: Case, under_original: Callable[[str], None]):
    record = case.record
    known = "id source conv_id version template tokenizer mm_use_im_start_end mm_use_im_patch_token has_image"
    known += " model_max_length pad_token_id prompt warning error input_ids labels_keep labels_other"
    expect_fields(record, *known.split())
    if record["template"] in LATER:
        not_built(f"template {record['template']}")
    conversation = _inputs(case.root)[record["conv_id"]]
    assert conversation["has_image"] == record["has_image"]
    tokenizer = named_tokenizer(case.root, record["tokenizer"], _added(record))
    if record["error"] is not None:
        with pytest.raises(Refused):
            _by_original(record, conversation, tokenizer)
        return
    kept = _kept(record)
    try:
        default = _by_default(record, conversation, tokenizer)
        is_same = (
            len(default.tokens) == len(kept)
            and (default.tokens == record["input_ids"]).all()
            and (default.is_answer == kept).all()
            and "labels_other" not in record
        )
    except (Refused, UserError):
        is_same = False
    if is_same:
        return
    reason = _difference(record, conversation)
    assert reason is not None, f"the default differs, and no documented reason explains it: {default}"
    tokens, is_label, is_mismatch = _by_original(record, conversation, tokenizer)
    np.testing.assert_array_equal(tokens, record["input_ids"])
    np.testing.assert_array_equal(is_label, kept)
    assert is_mismatch == record["warning"]
    assert "labels_other" not in record
    under_original(reason)


@reads("conversations/preprocess_multimodal_llava.jsonl", "conversations/preprocess_multimodal_next.jsonl")
def test_preprocess_multimodal(case: Case, under_original: Callable[[str], None]):
    record = case.record
    expect_fields(record, "source", "conv_id", "template", "mm_use_im_start_end", "values")
    _expect_built(record["template"])
    template = find_template(record["template"])
    template = template.framed() if record["mm_use_im_start_end"] else template
    conversation = _inputs(case.root)[record["conv_id"]]
    turns = parse_record({"conversations": conversation["conversations"]}, as_written=True).turns
    if [turn.text for turn in template.arrange(turns)] == record["values"]:
        return
    original = compat.arrange(template, turns, COMPATS[record["source"]])
    assert [turn.text for turn in original] == record["values"]
    marks = [turn.text.count(IMAGE_MARK) for turn in turns]
    if max(marks) > 1:
        under_original("several pictures of a turn collapse")
    elif any(turn.role == "assistant" and IMAGE_MARK in turn.text for turn in turns):
        under_original("a mark in an answer read as a picture")
    else:
        assert record["source"] == "llava_next"
        assert any(turn.text.startswith(IMAGE_MARK) for turn in turns)
        under_original("a picture in front left as it stands")


@reads("conversations/collate_llava.jsonl", "conversations/collate_next.jsonl")
def test_collate(case: Case, under_original: Callable[[str], None]):
    record = case.record
    known = "source version model_max_length tokenizer pad_token_id padding_side conv_ids sequence_lengths"
    expect_fields(record, *known.split(), "input_ids", "labels", "attention_mask")
    tokenizer = named_tokenizer(case.root, record["tokenizer"], _added(record))
    conversations = _inputs(case.root)
    examples = [_by_original(record, conversations[name], tokenizer) for name in record["conv_ids"]]
    assert [len(example.tokens) for example in examples] == record["sequence_lengths"]
    ids, is_label, attention = compat.collate(
        examples,
        length=record["model_max_length"],
        pad_id=record["pad_token_id"],
        compat=COMPATS[record["source"]],
        side=record["padding_side"],
    )
    np.testing.assert_array_equal(ids, record["input_ids"])
    np.testing.assert_array_equal(np.where(is_label, ids, -100), record["labels"])
    np.testing.assert_array_equal(attention, record["attention_mask"])
    under_original("padded batches, where we pack")


@reads("conversations/prompts_llava.jsonl", "conversations/prompts_next.jsonl")
def test_prompt(case: Case, under_original: Callable[[str], None]):
    record = case.record
    expect_fields(record, "source", "template", "messages", "prompt", "error")
    _expect_built(record["template"])
    template = find_template(record["template"])
    turns, unplaced = [], 0
    for i, message in enumerate(record["messages"]):
        text = message
        if isinstance(message, dict):
            expect_fields(message, "image_tuple", "text")
            text = message["text"]
            # Only a conversation's very first message is looked at; where examples open it, the text stands.
            unplaced = int(i == 0 and not template.examples)
        turns.append(Turn("assistant" if i % 2 else "user", text or ""))
    first = turns[0].text
    bare = [Turn("user", first.replace(IMAGE_MARK, "").strip()), *turns[1:]] if unplaced else turns
    if record["error"] is not None:
        _expect_no_prompt(template, bare)
        return
    if _prompt(template, template.arrange(bare, unplaced=1) if unplaced else turns) == record["prompt"]:
        return
    if unplaced and template.style is lines:
        turns = [Turn("user", f"{IMAGE_MARK}\n{bare[0].text}"), *turns[1:]]
    if template.style is lines:
        assert "".join(f"{turn.text}\n" for turn in turns if turn.text) == record["prompt"]
        under_original("a line between a picture alone and its caption")
    else:
        assert unplaced
        assert record["source"] == "llava_next"
        assert first.startswith(IMAGE_MARK)
        assert _prompt(template, turns) == record["prompt"]
        under_original("a picture in front left as it stands")


def _prompt(template: Template, turns: Sequence[Turn]) -> str:
    return "".join(span.text for span in template.render(turns))


def _expect_no_prompt(template: Template, turns: Sequence[Turn]) -> None:
    """Where the original fails we refuse; only a caption at the end, which it cannot write at all, we can."""
    if template.style is lines and turns[-1].role == "assistant" and not any(t.text for t in turns[1:-1]):
        assert _prompt(template, turns).endswith(f"{turns[-1].text}\n")
    else:
        with pytest.raises(Refused):
            template.render(turns)


@reads("conversations/templates_llava.json", "conversations/templates_next.json")
def test_template(case: Case):
    record: dict[str, Any] = case.record
    known = "system roles messages offset sep_style sep sep2 version stop_str stop_token_ids"
    expect_fields(record, *known.split(), "tokenizer_id")
    _expect_built(case.name)
    template = find_template(case.name)
    ours = {
        "system": template.system,
        "roles": list(template.roles),
        "messages": [[template.roles[turn.role == "assistant"], turn.text] for turn in template.examples],
        "offset": len(template.examples),
    }
    assert ours == {name: record[name] for name in ours}
    styles = {"SINGLE": dialogue, "TWO": dialogue, "LLAMA_2": instruct, "MPT": chatml, "PLAIN": lines}
    assert template.style is styles[record["sep_style"]]
    assert (template.lesson is paragraphs) == (record["sep_style"] == "SINGLE")
    # Where the original has one separator, both speakers end with it.
    assert template.ends == (record["sep"], record["sep2"] if record["sep2"] is not None else record["sep"])
    assert not record.get("stop_str")
    assert not record.get("stop_token_ids")


@reads("conversations/tokenize_image_token.jsonl")
def test_tokenize_image_token(case: Case):
    record = case.record
    expect_fields(record, "tokenizer", "added_tokens", "prompt", "input_ids", "chunks")
    tokenizer = named_tokenizer(case.root, record["tokenizer"], tuple(record["added_tokens"]))
    tokens, _ = tokenize(marked(record["prompt"]), tokenizer, [1] * record["prompt"].count(IMAGE_MARK))
    np.testing.assert_array_equal(tokens, record["input_ids"])
    chunks = [tokenizer.encode(chunk).ids.tolist() for chunk in record["prompt"].split(IMAGE_MARK)]
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert [opening + chunk for chunk in chunks] == record["chunks"]
    assert (tokens == IMAGE_TOKEN).sum() == len(chunks) - 1


@reads("conversations/stopping.jsonl")
def test_stopping(case: Case):
    record = case.record
    known = ("tokenizer", "keywords", "prompt_ids", "generated_ids", "generated_text", "stops_after")
    expect_fields(record, *known)
    tokenizer = named_tokenizer(case.root, record["tokenizer"])
    keywords = Keywords(record["keywords"], tokenizer)
    ids: Sequence[int] = record["generated_ids"]
    assert [n for n in range(1, len(ids) + 1) if keywords.ends(ids[:n])] == record["stops_after"]
