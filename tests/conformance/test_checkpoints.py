"""Checkpoints: features, embeddings, logits, losses, gradients and greedy tokens that the original recorded."""

import dataclasses
import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.conversion import convert
from llava_jax.convert.layouts import change_layout, our_name
from llava_jax.convert.torch_file import open_torch
from llava_jax.convert.vocabulary import grow_rows
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.inference.generate import Sampling, generate
from llava_jax.inference.model import load, read_images
from llava_jax.models.build import structure
from llava_jax.models.parameters import bind, part
from tests.conformance.recorded_model import (
    IGNORED,
    Recorded,
    greedy,
    largest,
    lay_out,
    open_recorded,
    run_whole,
    to_batch,
    to_bytes,
    widen_labels,
)
from tests.conformance.report import Case, expect_fields, reads

COMPANIONS = (
    "checkpoints/*_expected.npz",
    "checkpoints/new_tokens_*.npz",
    "checkpoints/new_tokens_*.bin",
    "checkpoints/pictures/*.png",
    "checkpoints/*/*.json",
    "checkpoints/*/*.safetensors",
    "checkpoints/*/*.bin",
    "checkpoints/*/tokenizer.model",
)
# Facts about the recording, which no run of ours can repeat or contradict.
FACTS = (
    "num_valid_label_positions_after_shift", "select_layer", "select_feature", "image_aspect_ratio",
    "min_greedy_margin", "distinct_generated", "generate_with_use_cache_false_in_the_original", "q_proj_grad_layer",
    "merged_shape", "vision_tower_folder", "original_class", "pictures", "max_abs_diff_eager_vs_default_attention",
    "default_attention", "fp32_vs_fp64", "sliding_window", "r", "lora_alpha", "bias", "merged_with",
    "max_abs_logit_diff_unmerged_vs_merged", "lora_keys", "non_lora_keys", "keys", "loss", "model_base",
    "hf437_max_abs_logit_diff_to_original", "hf437_folder", "hf523_max_abs_logit_diff_to_original", "hf523_folder",
    "keys_written_by_523_after_loading_the_437_folder_equal_437_keys",
)  # fmt: skip
FEATURES, LOGITS, LOSS, GRADIENTS, DELTA = 1e-5, 1e-4, 1e-5, 1e-5, 1e-3


@reads("checkpoints/index.json")
def test_checkpoint(case: Case, tmp_path: Path):
    folder = case.root / "checkpoints"
    if case.name.startswith("delta"):
        _check_delta(case.record, folder, tmp_path)
    elif case.name.startswith("new_tokens"):
        _check_new_tokens(case.record, folder)
    else:
        expect_fields(case.record, *FACTS)
        _check_model(case.name, case.record, folder)


def _check_model(name: str, record: dict[str, Any], folder: Path) -> None:
    base = folder / record["model_base"] if "model_base" in record else None
    with np.load(folder / f"{name}_expected.npz") as file:
        expected = dict(file)
    recorded = open_recorded(folder / name, base=base)
    seen = _check_numbers(recorded, expected)
    if "out/logits_default_attention" in expected:
        # transformers 4.37 leaves the sliding window out of its default attention.
        windowless = open_recorded(folder / name, base=base, windowless=True)
        batch, mask, _ = _batch(windowless, expected)
        wanted = expected["out/logits_default_attention"]
        found = run_whole(windowless, batch)[3][: len(mask), : mask.shape[1]]
        assert np.abs(found - wanted)[mask].max() <= LOGITS
        seen.add("out/logits_default_attention")
    seen |= _check_generation(recorded, expected)
    unknown = set(expected) - seen
    assert not unknown, f"unknown arrays: {sorted(unknown)}"
    for key, value in record.items():
        if key.endswith("_folder") and key.startswith("hf"):
            same = open_recorded(folder / value)
            for ours, parameter in recorded.model.params.items():
                np.testing.assert_array_equal(same.model.params[ours], parameter, err_msg=f"{value}: {ours}")
            assert same.config.text == recorded.config.text


def _pictures(expected: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    count = len(fnmatch.filter(expected, "in/pixel_values_*"))
    sizes = [(int(w), int(h)) for w, h in expected["in/image_sizes_wh"]]
    return [expected[f"in/pixel_values_{i}"] for i in range(count)], sizes


def _batch(recorded: Recorded, expected: dict[str, np.ndarray]) -> tuple[dict[str, Any], np.ndarray, list[int]]:
    """The recorded batch; below it, without labels, the prompt and its first greedy tokens, and where they end."""
    ids, mask = expected["in/input_ids"], expected["in/attention_mask"]
    pictures = _pictures(expected)
    prompts = lay_out(recorded, ids, mask, *pictures)
    labels = widen_labels(ids, expected["in/labels"], mask, prompts)
    merged = expected["out/merged_attention_mask"]
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    np.testing.assert_array_equal(merged, np.arange(merged.shape[1]) < lengths[:, None])
    np.testing.assert_array_equal(np.where(merged, labels, IGNORED), expected["out/merged_labels"])
    for step in range(len(expected.get("gen/first_four_step_logits", ()))):
        row = np.append(expected["gen/prompt_ids"][0], expected["gen/tokens_cache"][:step])[None]
        prompts += lay_out(recorded, row, np.ones_like(row), *pictures)
    unlabelled = np.full((len(prompts) - len(labels), labels.shape[1]), IGNORED)
    last = [len(prompt.tokens) - 1 for prompt in prompts[len(labels) :]]
    return to_batch(prompts, np.concatenate([labels, unlabelled])), merged, last


def _check_numbers(recorded: Recorded, expected: dict[str, np.ndarray]) -> set[str]:
    """Tower, projector, embeddings, logits, loss and gradients; returns the arrays compared."""
    config, params = recorded.config, recorded.model.params
    seen = {key for key in expected if key.startswith("in/")}

    @jax.jit
    def look(params: dict[str, Any], tiles: jax.Array) -> dict[str, jax.Array]:
        model = bind(recorded.model.graphdef, params)
        features = model.tower.features(tiles, depth=config.tower_depth, select=config.select_feature)
        depths = [model.tower.hidden(tiles, depth=depth) for depth in range(config.vision.num_layers + 1)]
        return {
            "clip_all_hidden": jnp.stack([hidden[:1] for hidden in depths]),
            "clip_selected_hidden": depths[config.tower_depth],
            "clip_features": features,
            "projected": model.projector(features),
        }

    for i, picture in enumerate(_pictures(expected)[0]):
        found = {f"out/{name}_{i}": value for name, value in look(params, jnp.asarray(to_bytes(picture))).items()}
        for key in set(found) & set(expected):
            assert largest(found[key], expected[key]) <= FEATURES, key
            seen.add(key)
    batch, mask, last = _batch(recorded, expected)
    loss, gradients, embedded, logits = run_whole(recorded, batch)
    length = mask.shape[1]
    rows = len(mask)
    assert np.abs(embedded[:rows, :length] - expected["out/inputs_embeds"])[mask].max() <= FEATURES
    assert np.abs(logits[:rows, :length] - expected["out/logits"])[mask].max() <= LOGITS
    for step, wanted in enumerate(expected.get("gen/first_four_step_logits", ())):
        found = logits[rows + step, last[step]]
        assert largest(found, wanted) <= LOGITS, step
        second, first = np.sort(found)[-2:]
        assert abs(first - second - expected["gen/top1_minus_top2"][step]) <= 2 * LOGITS, step
    assert largest(loss, expected["out/loss"]) <= LOSS
    if "out/grad_global_norm_without_vision_tower" in expected:
        norm = optax.tree.norm({name: value for name, value in gradients.items() if part(name) != "tower"})
        assert abs(norm - expected["out/grad_global_norm_without_vision_tower"]) <= 1e-5 * norm
    for key in fnmatch.filter(expected, "grad/*"):
        name, kind = _known(key.removeprefix("grad/"))
        assert largest(gradients[name], change_layout(expected[key], kind)) <= GRADIENTS, key
        seen.add(key)
    for key in fnmatch.filter(expected, "out/merged.*"):
        name, kind = _known(key.removeprefix("out/merged."))
        assert largest(params[name], change_layout(expected[key], kind)) <= FEATURES, key
        seen.add(key)
    return seen | {
        "out/inputs_embeds", "out/merged_attention_mask", "out/merged_labels", "out/logits", "out/loss",
        "out/grad_global_norm_without_vision_tower",
    }  # fmt: skip


def _check_generation(recorded: Recorded, expected: dict[str, np.ndarray]) -> set[str]:
    if "gen/prompt_ids" not in expected:
        return set()
    pictures, sizes = _pictures(expected)

    def prompts_of(ids: np.ndarray, mask: np.ndarray) -> list[Any]:
        return lay_out(recorded, ids, mask, pictures, sizes)

    ids = expected["gen/prompt_ids"]
    prompts = prompts_of(ids, np.ones_like(ids))
    wanted = expected["gen/tokens_cache"].tolist()
    np.testing.assert_array_equal(wanted, expected["gen/tokens_no_cache"])
    rows = expected["gen/batch_tokens"].tolist()
    both = prompts_of(expected["gen/batch_prompt_ids"], expected["gen/batch_attention_mask"])
    # One batch of three prompts, none of which ends: what each gets must not depend on the others.
    answers = greedy(recorded, [*prompts, *both], count=len(wanted), eos_id=-1)
    for answer, row in zip(answers, [wanted, *rows], strict=True):
        # The recorded batch stops at its EOS, 2, and fills up with 0.
        end = row.index(2) + 1 if row is not wanted and 2 in row else len(row)
        assert answer[:end] == row[:end]
    eos_id = int(expected["gen/eos_token_id"])
    (found,) = greedy(recorded, prompts, count=len(wanted), eos_id=eos_id)
    assert [*found, eos_id] == expected["gen/tokens_with_eos"].tolist()
    return {
        "gen/prompt_ids", "gen/tokens_cache", "gen/tokens_no_cache", "gen/first_four_step_logits", "gen/eos_token_id",
        "gen/top1_minus_top2", "gen/tokens_with_eos", "gen/batch_prompt_ids", "gen/batch_attention_mask",
        "gen/batch_tokens", "gen/raw_generate_output",
    }  # fmt: skip


def _check_delta(record: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """The recorded delta and ours both bring the target back, and they are the same delta."""
    expect_fields(record, "base", "delta", "target", "dtype", "target_vocab", "max_abs_diff_recovered_vs_target")
    base, delta, target = (str(folder / record[name]) for name in ("base", "delta", "target"))
    wanted = open_checkpoint(target)
    recovered = open_checkpoint(delta, base=base)
    assert str(wanted.params["decoder.norm.scale"].dtype) == record["dtype"]
    assert wanted.params["decoder.embed_tokens.embedding"].shape[0] == record["target_vocab"]
    assert set(recovered.params) == set(wanted.params)
    for name, value in wanted.params.items():
        assert recovered.params[name].dtype == value.dtype
        assert largest(recovered.params[name], value) <= DELTA, name
    # The tower is where the configs' relative name finds it: beside the checkpoint.
    made = tmp_path / "made"
    convert(target, str(made), to="delta", base=base)
    (tmp_path / wanted.config["mm_vision_tower"]).symlink_to(folder / wanted.config["mm_vision_tower"])
    ours = open_checkpoint(str(made)).params
    theirs = open_checkpoint(delta).params
    for name, value in theirs.items():
        assert largest(ours[name], value) <= DELTA, name
    again = open_checkpoint(str(made), base=base)
    for name, value in wanted.params.items():
        assert largest(again.params[name], value) <= DELTA, name


def _check_new_tokens(record: dict[str, Any], folder: Path) -> None:
    """Rows from 510 on, of embedding and head, after tokens were added to the base."""
    expect_fields(
        record, "base", "mm_use_im_start_end", "mm_use_im_patch_token", "vocab_after", "new_token_ids", "adapter",
        "file", "note",
    )  # fmt: skip
    base = open_checkpoint(str(folder / record["base"])).params
    rows = {"embed": np.asarray(base["decoder.embed_tokens.embedding"])}
    rows["lm_head"] = np.asarray(base["decoder.lm_head.kernel"]).T
    given = {}
    if record["adapter"] is not None:
        given = {our_name(key)[0]: value for key, value in open_torch(folder / record["adapter"]).items()}  # type: ignore[index]
    patch_id = record["new_token_ids"].get("<im_patch>")
    with np.load(folder / record["file"]) as expected:
        assert set(expected) <= {"embed", "lm_head", "mm_projector_weight"}
        for name, old in rows.items():
            wanted = expected[name]
            assert 510 + len(wanted) == record["vocab_after"]
            grown = old
            if patch_id is not None:
                # Random in the original, and part of the mean that the others start from.
                grown = np.concatenate([grown, wanted[patch_id - 510 : patch_id - 509]])
            grown = grow_rows(grown, record["vocab_after"] - len(grown))
            trained = given.get("decoder.embed_tokens.embedding")
            if name == "embed" and trained is not None:
                count = 2 * record["mm_use_im_start_end"]
                grown[len(grown) - count :] = np.asarray(trained)[-count:]
            assert largest(grown[510:], wanted) <= FEATURES, name
        if "projector.linear.0.kernel" in given:
            projector = np.asarray(given["projector.linear.0.kernel"])
            assert largest(projector, expected["mm_projector_weight"]) <= FEATURES


def _known(key: str) -> tuple[str, Any]:
    found = our_name(key)
    assert found is not None, key
    return found


@reads("checkpoints/end_to_end.json")
def test_answer(case: Case, tmp_path: Path, under_original: Callable[[str], None]):
    """From the files, a prompt and a picture to the text of the greedy answer."""
    record = case.record
    expect_fields(
        record, "conv", "max_new_tokens", "min_greedy_margin", "prompt", "input_ids", "raw_generate_output", "text",
        "context_len", "dtype", "image_size_wh", "attention_implementation", "picture", "model_base",
    )  # fmt: skip
    folder = case.root / "checkpoints"
    base = None if record.get("model_base") is None else str(folder / record["model_base"])
    convert(str(folder / case.name), str(tmp_path / "model"), to="jax", base=base)
    model, processor = load(str(tmp_path / "model"), template="v1")
    images = read_images([str(folder / record["picture"])])
    assert list(images[0].size) == record["image_size_wh"]
    prompt = processor.raw(record["prompt"], images)
    text = [token for token in record["input_ids"] if token != IMAGE_TOKEN]
    assert prompt.tokens[prompt.tokens != IMAGE_TOKEN].tolist() == text
    is_mistral = model.config.text.sliding_window is not None
    if is_mistral and record.get("attention_implementation") == "sdpa":
        under_original("a sliding window that default attention leaves out")
        config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, sliding_window=None))
        model = dataclasses.replace(model, config=config, graphdef=structure(config)[0])
    (answer,) = generate(model, processor, [prompt], Sampling(max_new_tokens=record["max_new_tokens"]))
    opening, *wanted = record["raw_generate_output"]
    assert opening == processor.tokenizer.bos_id
    eos_id = processor.tokenizer.eos_id
    assert answer.token_ids == (wanted[:-1] if wanted[-1] == eos_id else wanted)
    if "\ufffd" in answer.text and answer.text != record["text"].strip():
        # `load_pretrained_model` opens Mistral with the fast tokenizer, which breaks up more of what is no UTF-8.
        under_original("bytes that are no UTF-8, as the fast tokenizer writes them")
        fast = transformers.AutoTokenizer.from_pretrained(folder / case.name)
        assert fast.decode(wanted, skip_special_tokens=True).strip() == record["text"].strip()
        return
    assert answer.text == record["text"].strip()
