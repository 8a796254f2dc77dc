"""Writing checkpoints for others: Hugging Face's L1 layout, the original's, deltas and adapters."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert.chat_template import chat_template_json, find_chat_template, template_of_original
from llava_jax.convert.checkpoint import Checkpoint, Run, check_same_decoder
from llava_jax.convert.config_json import KNOWN_TOWERS, SpecialTokens, text_fields, token_fields, vision_fields
from llava_jax.convert.delta import fingerprint, make_delta
from llava_jax.convert.fields import Fields, read_object
from llava_jax.convert.folder import copy_tokenizer, staged, write_weights
from llava_jax.convert.layouts import to_layout
from llava_jax.convert.lora_folder import Names, write_adapter
from llava_jax.convert.preprocessing import (
    PREPROCESSOR,
    PROCESSOR,
    original_fields,
    preprocessor_fields,
    processor_fields,
)
from llava_jax.convert.provenance import write_provenance
from llava_jax.convert.tensor import Tensor
from llava_jax.convert.vocabulary import EMBEDDING, HEAD, grow_vocabulary
from llava_jax.data.anyres import AnyRes
from llava_jax.data.conversation import IM_PATCH
from llava_jax.data.tokenizer import ADDED, CONFIG, JSON, Tokenizer, open_tokenizer
from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import part
from llava_jax.shapes import LinearScaling, LlavaConfig

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
# transformers' converters pad the vocabulary to it, for tensor cores.
_ROWS_MULTIPLE = 64
GENERATION = "generation_config.json"
# A tower for the original to read its shape from, in exports of models whose tower is no published one.
TOWER = "vision_tower"


def describe_huggingface(
    checkpoint: Checkpoint,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, int], tuple[str, ...]]:
    """Tensors and config.json of the L1 layout, tokens to add to the tokenizer, and notes.

    Raises:
      CheckpointError: transformers has no such model.
    """
    model, mode = _llava(checkpoint), checkpoint.image_mode
    if model.projector != "mlp2x_gelu":
        raise CheckpointError(
            f"transformers' LLaVA has two layers in its projector; this one is {model.projector!r}. Use --to original."
        )
    is_next = isinstance(mode, AnyRes)
    if is_next != model.image_newline or (isinstance(mode, AnyRes) and mode.merge != "spatial_unpad"):
        raise CheckpointError(
            "transformers' LLaVA-NeXT merges tiles as spatial_unpad with image_newline, its LLaVA has neither; got "
            f"image_mode={mode!r} with image_newline={model.image_newline}. Use --to original."
        )
    params, tokens, added, notes = _with_image_token(checkpoint)
    text = dataclasses.replace(model.text, vocab_size=params["decoder.embed_tokens.embedding"].shape[0])
    config: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration" if is_next else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if is_next else "llava",
        "text_config": text_fields(text) | token_fields(tokens),
        "vision_config": vision_fields(model.vision),
        "image_token_index": tokens.image_id,
        "image_seq_length": model.num_features,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": model.select_layer,
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[model.select_feature],
        "tie_word_embeddings": text.tie_embeddings,
        "pad_token_id": tokens.pad_id,
        "vocab_size": text.vocab_size,
        "torch_dtype": _dtype(params),
    }
    if isinstance(mode, AnyRes):
        config["image_grid_pinpoints"] = [[height, width] for width, height in mode.pinpoints]
    return to_layout(params, "huggingface", model), config, added, notes


def write_huggingface(folder: str, checkpoint: Checkpoint, *, source: str) -> tuple[str, ...]:
    """`LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`, with its processor; returns notes.

    Raises:
      CheckpointError: transformers has no such model.
    """
    tensors, config, added, notes = describe_huggingface(checkpoint)
    model, mode = _llava(checkpoint), checkpoint.image_mode or "square"
    with staged(folder) as new:
        write_weights(new, tensors)
        _write_json(new / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(
            new / GENERATION, {n: config["text_config"][n] for n in ids if config["text_config"][n] is not None}
        )
        _write_json(new / PREPROCESSOR, preprocessor_fields(mode, model.vision))
        _write_json(new / PROCESSOR, processor_fields(model, mode))
        if checkpoint.tokenizer is not None:
            copy_tokenizer(str(checkpoint.tokenizer), new, checkpoint.added_tokens)
            _add_tokens(new, added)
        _write_chat_template(new, checkpoint)
        _describe(new, checkpoint, source, notes)
    return notes


def _write_chat_template(folder: Path, checkpoint: Checkpoint) -> None:
    """The template's own, unless one that says the same came with the tokenizer."""
    template, is_framed = checkpoint.template, checkpoint.mm_use_im_start_end
    if template is None or find_chat_template(folder) == (template, is_framed):
        return
    for stale in folder.glob("chat_template.*"):
        stale.unlink()
    text = chat_template_json(template, is_framed=is_framed)
    if text is not None:
        (folder / "chat_template.json").write_text(text)


def write_original(folder: str, checkpoint: Checkpoint, *, source: str) -> tuple[str, ...]:
    """What the original's `load_pretrained_model` opens: its keys, its config, its tower inside; returns notes.

    The shape of the tower is told by a folder beside the weights that `mm_vision_tower` names.
    """
    model = _llava(checkpoint)
    tensors = to_layout(checkpoint.params, "original", model)
    name = checkpoint.config.get("mm_vision_tower")
    is_named = isinstance(name, str)
    config = _original_config(checkpoint, model, tower=name if is_named else str(Path(folder).absolute() / TOWER))
    notes = _template_note(checkpoint, template_of_original(Fields(config, folder)))
    if not is_named:
        notes += (f"mm_vision_tower names {TOWER}/ of this folder by its whole path",)
    with staged(folder) as new:
        write_weights(new, tensors)
        _write_json(new / "config.json", config)
        _write_json(new / GENERATION, _generation(_special_tokens(checkpoint)))
        if not is_named:
            _write_tower(new / TOWER, checkpoint, model)
        if checkpoint.tokenizer is not None:
            copy_tokenizer(str(checkpoint.tokenizer), new, checkpoint.added_tokens)
        _describe(new, checkpoint, source, notes)
    return notes


def write_delta(folder: str, checkpoint: Checkpoint, base: Checkpoint, *, source: str) -> tuple[str, ...]:
    """The original's layout, less the base's decoder; the base's fingerprint is kept, and asked for again."""
    model = _llava(checkpoint)
    # A tower that its config only names is not the delta's to pass on.
    params = {name: value for name, value in checkpoint.params.items() if checkpoint.has_tower or part(name) != "tower"}
    tensors = to_layout(make_delta(params, base.params), "original", model)
    name = checkpoint.config.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError("A delta is written from a checkpoint of the original's layout. Use --to original first.")
    config = _original_config(checkpoint, model, tower=name)
    notes = (f"less the decoder of {base.files[0].parent}",) if base.files else ()
    notes += _template_note(checkpoint, template_of_original(Fields(config, folder)))
    with staged(folder) as new:
        write_weights(new, tensors)
        _write_json(new / "config.json", config)
        _write_json(new / GENERATION, _generation(_special_tokens(checkpoint)))
        if checkpoint.tokenizer is not None:
            copy_tokenizer(str(checkpoint.tokenizer), new, checkpoint.added_tokens)
        _describe(new, checkpoint, source, notes, base_fingerprint=fingerprint(base.params))
    return notes


def write_lora(
    folder: str, checkpoint: Checkpoint, base: Checkpoint, *, names: Names, base_name: str, source: str
) -> tuple[str, ...]:
    """A run's adapters and what it trained beside them, for the model that it began with; returns notes.

    Raises:
      CheckpointError: the run has no adapters, or `base` is not what it began with.
    """
    model, run = _llava(checkpoint), adapted_run(checkpoint)
    trained = run.trained | _rows_that_grew(checkpoint, base, base_name)
    if names != "original" and not (isinstance(base.model, LlavaConfig) and base.layout.startswith("Hugging Face")):
        raise CheckpointError(
            f"PEFT puts these adapters on a LLaVA of transformers; --base {base_name} is {base.layout}. Use --to lora."
        )
    has_tower = any(part(name) == "tower" for name in trained)
    begun, guess = str(run.init.get("tower")), base.template
    notes: tuple[str, ...] = (f"{len(trained)} trained arrays at step {run.step}, for the base {base_name}",)
    with staged(folder) as new:
        assert run.lora is not None, "an adapted run has them"
        write_adapter(new, trained, run.lora, model, base=base_name, names=names)
        if names == "original":
            tower = begun
            if has_tower or KNOWN_TOWERS.get(begun) != model.vision:
                tower = str(Path(folder).absolute() / TOWER)
                notes += (f"mm_vision_tower names {TOWER}/ of this folder by its whole path",)
                _write_tower(new / TOWER, checkpoint, model)
            config = _original_config(checkpoint, model, tower=tower)
            guess = template_of_original(Fields(config, folder))
            # Else PEFT finds the tower's layers where it looks for the decoder's.
            _write_json(new / "config.json", config | {"unfreeze_mm_vision_tower": has_tower})
        notes += _template_note(checkpoint, guess)
        _describe(new, checkpoint, source, notes, base_fingerprint=fingerprint(base.params))
    return notes


def adapted_run(checkpoint: Checkpoint) -> Run:
    """The run of a workdir whose run trained adapters; anything else is refused."""
    run = checkpoint.run
    if run is None or run.lora is None:
        raise CheckpointError(
            f"Only a run with adapters can be written as one; this is {checkpoint.layout}. Use --to hf."
        )
    return run


def _rows_that_grew(checkpoint: Checkpoint, base: Checkpoint, base_name: str) -> dict[str, Tensor]:
    """Embedding and head, if the base has another number of tokens.

    Raises:
      CheckpointError: the base's decoder is another than the run's.
    """
    check_same_decoder(_llava(checkpoint).text, base, base_name, source=checkpoint.layout)
    ours, theirs = checkpoint.params, base.params
    for name in ours:
        is_norm = name.startswith("decoder.") and name.endswith(".scale")
        if is_norm and not np.array_equal(ours[name].view(), theirs[name].view().astype(ours[name].dtype)):
            raise CheckpointError(
                f"--base {base_name} is not what the run began with: {theirs[name].origin} differs from "
                f"{ours[name].origin}. Give the folder that init.decoder named."
            )
    names = (name for name in (EMBEDDING, HEAD) if name in ours)
    return {name: ours[name] for name in names if name not in theirs or ours[name].shape != theirs[name].shape}


def _llava(checkpoint: Checkpoint) -> LlavaConfig:
    if not isinstance(checkpoint.model, LlavaConfig):
        raise CheckpointError(f"Only a LLaVA model can be exported; this is {checkpoint.layout}. Use --to jax.")
    return checkpoint.model


def _describe(
    folder: Path, checkpoint: Checkpoint, source: str, notes: tuple[str, ...], base_fingerprint: str | None = None
) -> None:
    write_provenance(
        folder,
        source=source,
        layout=checkpoint.layout,
        files=checkpoint.files,
        notes=(*checkpoint.notes, *notes),
        unsaid={"template": checkpoint.template, "base_fingerprint": base_fingerprint},
    )


def _template_note(checkpoint: Checkpoint, guess: str | None) -> tuple[str, ...]:
    """What to tell a reader that does not know our provenance, if it would take the model for another template's."""
    if checkpoint.template in (None, guess):
        return ()
    return (f"this layout cannot say template {checkpoint.template}; elsewhere give --conv {checkpoint.template}",)


def _original_config(checkpoint: Checkpoint, model: LlavaConfig, *, tower: str) -> dict[str, Any]:
    """The original's fields; those of a source in its layout that we have no use for stay as they were."""
    kept = dict(checkpoint.config) if "mm_vision_tower" in checkpoint.config else {}
    text = text_fields(model.text)
    is_mistral = "mistral" in str(kept.get("model_type", text["model_type"]))
    text.pop("model_type")
    # It runs under transformers 4.37, which reads rope_theta where it always was, scales a Llama alone, and wants
    # these two fields and no others.
    text.pop("rope_parameters")
    scaling = model.text.rope_scaling
    if isinstance(scaling, LinearScaling) and not is_mistral:
        text["rope_scaling"] = {"type": "linear", "factor": scaling.factor}
    elif scaling is not None:
        raise CheckpointError(
            f"The original scales the rotary positions of a Llama, and that linearly; got {scaling} of a "
            f"{'Mistral' if is_mistral else 'Llama'}. Use --to hf."
        )
    return {
        "tokenizer_model_max_length": model.text.max_positions,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "use_cache": True,
        **kept,
        **text,
        **token_fields(_special_tokens(checkpoint)),
        "architectures": ["LlavaMistralForCausalLM" if is_mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if is_mistral else "llava_llama",
        "mm_vision_tower": tower,
        "mm_hidden_size": model.vision.embed_dim,
        "mm_projector_type": model.projector,
        "mm_vision_select_layer": model.select_layer,
        "mm_vision_select_feature": model.select_feature,
        "mm_use_im_start_end": checkpoint.mm_use_im_start_end,
        "mm_use_im_patch_token": kept.get("mm_use_im_patch_token") or _has_patch_token(checkpoint),
        **original_fields(checkpoint.image_mode or "square", has_newline=model.image_newline),
        # So that the original reads the tower from here rather than from where its name points.
        "unfreeze_mm_vision_tower": True,
        "torch_dtype": _dtype(checkpoint.params),
    }


def _has_patch_token(checkpoint: Checkpoint) -> bool:
    """Whether the original, too, must number a token for patches before those that frame a picture."""
    tokenizer = _tokenizer(checkpoint) if checkpoint.mm_use_im_start_end else None
    return tokenizer is not None and tokenizer.token_id(IM_PATCH) is not None


def _write_tower(folder: Path, checkpoint: Checkpoint, model: LlavaConfig) -> None:
    folder.mkdir()
    tower = {name: value for name, value in checkpoint.params.items() if name.startswith("tower.")}
    tensors = to_layout(tower, "huggingface", model)
    write_weights(folder, {key.removeprefix("vision_tower."): value for key, value in tensors.items()})
    _write_json(folder / "config.json", vision_fields(model.vision) | {"architectures": ["CLIPVisionModel"]})
    _write_json(folder / PREPROCESSOR, preprocessor_fields("square", model.vision))


def _with_image_token(
    checkpoint: Checkpoint,
) -> tuple[dict[str, Tensor], SpecialTokens, dict[str, int], tuple[str, ...]]:
    """Parameters whose vocabulary has `<image>`, its ids, the tokens to add to the tokenizer, and notes."""
    tokens, rows = _special_tokens(checkpoint), checkpoint.params["decoder.embed_tokens.embedding"].shape[0]
    if tokens.image_id is not None:
        return dict(checkpoint.params), tokens, {}, ()
    tokenizer, first, pad_id = _tokenizer(checkpoint), rows, None
    if tokenizer is not None:
        image_id, pad_id = tokenizer.token_id(IMAGE_TOKEN), tokenizer.token_id(PAD_TOKEN)
        if image_id is not None:
            return dict(checkpoint.params), dataclasses.replace(tokens, image_id=image_id), {}, ()
        first = tokenizer.vocab_size
    added = {IMAGE_TOKEN: first} | ({PAD_TOKEN: first + 1} if pad_id is None else {})
    tokens = dataclasses.replace(tokens, image_id=first, pad_id=added.get(PAD_TOKEN, pad_id))
    needed = first + len(added)
    if needed <= rows:
        return dict(checkpoint.params), tokens, added, (f"added {', '.join(added)} to the tokenizer",)
    size = -(-needed // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    note = f"added {', '.join(added)}: {size - rows} rows of the vocabulary, each the mean of the others"
    return grow_vocabulary(checkpoint.params, size), tokens, added, (note,)


def _special_tokens(checkpoint: Checkpoint) -> SpecialTokens:
    """The ids that its config states, else those of its tokenizer: without an end others would never stop."""
    tokens = checkpoint.tokens
    found = _tokenizer(checkpoint) if tokens.eos_id is None else None
    return tokens if found is None else dataclasses.replace(tokens, bos_id=found.bos_id, eos_id=found.eos_id)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    if checkpoint.tokenizer is None:
        return None
    return open_tokenizer(str(checkpoint.tokenizer), checkpoint.added_tokens)


def _add_tokens(folder: Path, added: Mapping[str, int]) -> None:
    """Special tokens, in every file of a tokenizer that lists them."""
    if not added:
        return
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    path = folder / CONFIG
    config = read_object(path) if path.is_file() else {}
    if "added_tokens_decoder" not in config and (folder / ADDED).is_file():
        # Where the config lists tokens, the older files are not read: it must list theirs too.
        open_tokenizer(str(folder)).save(folder)
        config = read_object(path)
    config["added_tokens_decoder"] = (config.get("added_tokens_decoder") or {}) | {
        str(token_id): {"content": text, **flags} for text, token_id in added.items()
    }
    if PAD_TOKEN in added:
        config["pad_token"] = PAD_TOKEN
    _write_json(path, config)
    if (folder / JSON).is_file():
        tokenizer = read_object(folder / JSON)
        tokenizer["added_tokens"] += [{"id": token_id, "content": text, **flags} for text, token_id in added.items()]
        (folder / JSON).write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n")
    else:
        path = folder / ADDED
        _write_json(path, (read_object(path) if path.is_file() else {}) | dict(added))


def _generation(tokens: SpecialTokens) -> dict[str, Any]:
    return {name: value for name, value in token_fields(tokens).items() if value is not None}


def _dtype(params: Mapping[str, Tensor]) -> str:
    """The dtype that most of the decoder's bytes have."""
    return str(params["decoder.embed_tokens.embedding"].dtype)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2) + "\n")
