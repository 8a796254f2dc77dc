"""Opening a checkpoint of any layout: what it is, by metadata and keys, and its parameters, still in their files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert import adapter
from llava_jax.convert.accounting import check_buffers, settle
from llava_jax.convert.card import FILE, ModelCard, read_card
from llava_jax.convert.chat_template import find_chat_template, template_of_original
from llava_jax.convert.config_json import (
    KNOWN_TOWERS,
    SpecialTokens,
    find_family,
    read_clip,
    read_huggingface,
    read_original,
    read_text,
    read_vision,
    special_tokens,
)
from llava_jax.convert.delta import apply_delta, fingerprint
from llava_jax.convert.fields import Fields, read_json, read_object
from llava_jax.convert.layouts import from_huggingface
from llava_jax.convert.preprocessing import check_preprocessor, image_mode_of_huggingface, image_mode_of_original
from llava_jax.convert.provenance import PROVENANCE, read_provenance
from llava_jax.convert.tensor import Tensor, in_memory
from llava_jax.convert.vocabulary import EMBEDDING, added_tokens, grow_vocabulary
from llava_jax.convert.weights import has_weights, locate, open_file, open_weights
from llava_jax.data.images import ImageMode, check_mode
from llava_jax.data.templates import find_template
from llava_jax.data.tokenizer import FILES
from llava_jax.errors import CheckpointError, UserError
from llava_jax.models.lora import LoraConfig
from llava_jax.models.parameters import part
from llava_jax.shapes import ClipConfig, LlavaConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.sizes import CLIP_L_336

TOKENIZER = "tokenizer"
PROJECTOR = "mm_projector.bin"
# The source's own config in a model folder: ids of special tokens and the like, which our card has no use for.
SOURCE_CONFIG = "source_config.json"
# What a tokenizer is, in the folders of others.
TOKENIZER_FILES = (*FILES, "chat_template.jinja", "chat_template.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training run at one of its steps: what it trained, with its adapters apart, and where its parts began."""

    step: int
    trained: dict[str, Tensor]
    lora: LoraConfig | None
    init: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk.

    `model` is a part's shape where the checkpoint holds no more (a decoder, a tower); `image_mode` and `template`
    are None where it does not say, `mm_use_im_start_end` is as in `ModelCard`; `added_tokens` belong into its
    tokenizer, which may be the base's and lack them; `config` is its own config.json; `has_tower` is false where the
    tower was taken from another folder; `notes` say what was done to read it; `run` is what a training workdir says
    besides its model.
    """

    model: ModelConfig | TextConfig | VisionConfig
    params: dict[str, Tensor]
    layout: str
    template: str | None = None
    image_mode: ImageMode | None = None
    mm_use_im_start_end: bool = False
    label: str = ""
    tokens: SpecialTokens = SpecialTokens()
    tokenizer: Path | None = None
    added_tokens: tuple[str, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()
    has_tower: bool = True
    notes: tuple[str, ...] = ()
    run: Run | None = None

    def card(self) -> ModelCard:
        """What a model folder says of it.

        Raises:
          CheckpointError: it is a part of a model, not one.
        """
        if not isinstance(self.model, LlavaConfig | ClipConfig) or self.image_mode is None:
            raise CheckpointError(
                f"Only a whole model can be written; this is {self.layout}. Name it in a config's init instead."
            )
        return ModelCard(
            model=self.model,
            template=self.template,
            image_mode=self.image_mode,
            label=self.label,
            mm_use_im_start_end=self.mm_use_im_start_end,
        )


def open_checkpoint(
    source: str, *, base: str | None = None, tower: str | None = None, step: int | None = None
) -> Checkpoint:
    """Opens a folder of any layout, a training workdir (newest step, or `step`), a projector file or a hub name.

    `base` is the model that a delta, a LoRA adapter or a lone projector belongs to; `tower` the CLIP folder to use
    instead of the one that the original's config names.

    Raises:
      CheckpointError: it is none of these, not every tensor and every field could be accounted for, or the model cannot
        look at pictures in the way that is stated.
    """
    found = _open(source, base, tower, step)
    if isinstance(found.model, LlavaConfig) and found.image_mode is not None:
        try:
            check_mode(found.image_mode, found.model)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from error
    return found


def _open(source: str, base: str | None, tower: str | None, step: int | None) -> Checkpoint:
    folder = locate(source)
    if step is not None and not _is_workdir(folder):
        raise CheckpointError(f"--step is for training workdirs; {source!r} is none. Leave it out.")
    if folder.is_file():
        return _open_projector_file(folder)
    if (folder / FILE).is_file():
        if base is not None:
            raise CheckpointError(f"--base is for deltas, adapters and projectors; {source!r} is whole. Leave it out.")
        return _open_ours(folder, step)
    if (folder / adapter.CONFIG).is_file():
        return _open_adapter(folder, base, tower)
    if not (folder / "config.json").is_file():
        read_card(folder)
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    family = find_family(fields)
    if not has_weights(folder) and (folder / PROJECTOR).is_file():
        return _open_projector(folder, fields, base, tower)
    weights = open_weights(folder)
    params = from_huggingface(weights.tensors)
    notes = list(check_buffers(weights.tensors, fields))
    values: dict[str, Any] = {
        "tokens": special_tokens(fields),
        "tokenizer": find_tokenizer(folder),
        "config": fields.values,
        "files": weights.files,
        "label": "",
    }
    match family:
        case "decoder":
            model = read_text(fields, fields.values["model_type"])
            fields.done()
            values["layout"] = f"a {fields.values['model_type']} decoder"
        case "tower":
            model = read_vision(fields)
            fields.done()
            check_preprocessor(folder, model)
            values["layout"] = "a CLIP vision tower"
        case "clip":
            model = read_clip(fields)
            fields.done()
            check_preprocessor(folder, model.vision)
            values |= {"layout": "CLIP", "image_mode": "square"}
        case "huggingface":
            model = read_huggingface(fields)
            values["image_mode"] = image_mode_of_huggingface(folder, fields, model.vision)
            values["template"], values["mm_use_im_start_end"] = find_chat_template(folder)
            values["layout"] = f"Hugging Face {fields.values.get('model_type', 'llava')}"
        case "original":
            values["image_mode"] = image_mode_of_original(fields)
            values["template"] = _named_template(folder, template_of_original(fields))
            values["mm_use_im_start_end"] = fields.values.get("mm_use_im_start_end") is True
            values["added_tokens"] = added_tokens(fields)
            values["layout"] = "LLaVA's own"
            if base is not None:
                below = _open_base(base)
                params = apply_delta(params, below.params)
                _check_fingerprint(folder, below.params, base)
                notes.append(f"added the base {base}")
                values["files"] += below.files
            values["has_tower"] = any(part(name) == "tower" for name in params)
            model, params, files = _with_tower(folder, fields, params, tower, notes)
            values["files"] += files
    if base is not None and family != "original":
        raise CheckpointError(f"--base is for deltas, adapters and projectors; {source!r} is {values['layout']}.")
    params = settle(model, params, str(folder), notes)
    return Checkpoint(model=model, params=params, notes=tuple(notes), **values)


def _with_tower(
    folder: Path, fields: Fields, params: dict[str, Tensor], tower: str | None, notes: list[str]
) -> tuple[LlavaConfig, dict[str, Tensor], tuple[Path, ...]]:
    """The model of an original's config, with the tower that the checkpoint holds or that its config names."""
    name = fields.take("mm_vision_tower", str)
    has_tower = any(part(key) == "tower" for key in params)
    files: tuple[Path, ...] = ()
    if tower is None and has_tower and name in KNOWN_TOWERS:
        vision = KNOWN_TOWERS[name]
        notes.append(f"its own tower, of the shape of {name}")
    else:
        # The original looks from where it is run; beside the checkpoint is where its files travel together.
        beside = folder.parent / name
        is_beside = not Path(name).exists() and beside.is_dir()
        try:
            found = open_checkpoint(tower or (str(beside) if is_beside else name))
        except CheckpointError as error:
            raise CheckpointError(f"The tower that {fields.where} names: {error} Or give it as --tower.") from error
        vision = found.model.vision if isinstance(found.model, ClipConfig) else found.model
        if not isinstance(vision, VisionConfig):
            raise CheckpointError(f"{fields.where}: mm_vision_tower={name!r} must be CLIP; it is {found.layout}.")
        if has_tower:
            notes.append(f"its own tower, of the shape of {name}")
        else:
            params = params | {key: value for key, value in found.params.items() if part(key) == "tower"}
            files = found.files
            notes.append(f"the tower of {files[0].parent}")
    model = read_original(fields, vision)
    if "image_newline" in params and not model.image_newline:
        model = dataclasses.replace(model, image_newline=True)
    return model, params, files


def _open_base(base: str | None, *, needed_by: str = "") -> Checkpoint:
    if base is None:
        raise CheckpointError(f"{needed_by} holds a part of a model. Give the model that it was trained on as --base.")
    return open_checkpoint(base)


def _open_projector(folder: Path, fields: Fields, base: str | None, tower: str | None) -> Checkpoint:
    """The original's stage 1: a projector on a decoder that did not change."""
    below = _open_base(base, needed_by=str(folder))
    found = from_huggingface(open_file(folder / PROJECTOR))
    notes = [f"the projector of {folder / PROJECTOR}", f"the decoder of {base}"]
    return _on_base(folder, fields, below, found, (folder / PROJECTOR,), tower, notes, "a LLaVA projector")


def _open_adapter(folder: Path, base: str | None, tower: str | None) -> Checkpoint:
    """A LoRA adapter, merged into its base."""
    found = adapter.open_adapter(folder)
    below = _open_base(base, needed_by=f"{folder} (an adapter of {found.base!r})")
    notes = [f"merged {len(found.pairs)} LoRA pairs into {base}", *(f"replaced {name}" for name in sorted(found.whole))]
    if not (folder / "config.json").is_file():
        params = adapter.merge(below.params, found)
        notes = [*below.notes, *notes]
        params = settle(below.model, params, str(folder), notes)
        return dataclasses.replace(
            below,
            params=params,
            layout="a LoRA adapter",
            template=_named_template(folder, below.template),
            files=(*found.files, *below.files),
            notes=tuple(notes),
        )
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    find_family(fields)
    checkpoint = _on_base(folder, fields, below, found.whole, found.files, tower, notes, "a LLaVA LoRA adapter")
    return dataclasses.replace(checkpoint, params=adapter.merge(checkpoint.params, found))


def _on_base(
    folder: Path,
    fields: Fields,
    below: Checkpoint,
    found: Mapping[str, Tensor],
    files: tuple[Path, ...],
    tower: str | None,
    notes: list[str],
    layout: str,
) -> Checkpoint:
    """A LLaVA of a base's parameters and those `found`, which come first."""
    mode, template = image_mode_of_original(fields), _named_template(folder, template_of_original(fields))
    size = fields.take("vocab_size", int, 32_000)
    params = grow_vocabulary(_whole_rows(below.params, found, size), size)
    model, params, more = _with_tower(folder, fields, params, tower, notes)
    check_same_decoder(model.text, below, str(below.files[0].parent), source=fields.where)
    params = settle(model, params, str(folder), notes)
    return Checkpoint(
        model=model,
        params=params,
        layout=layout,
        template=template,
        image_mode=mode,
        mm_use_im_start_end=fields.values.get("mm_use_im_start_end") is True,
        tokens=special_tokens(fields),
        tokenizer=find_tokenizer(folder) or below.tokenizer,
        added_tokens=added_tokens(fields),
        config=fields.values,
        files=(*files, *below.files, *more),
        notes=tuple(notes),
    )


def _whole_rows(base: Mapping[str, Tensor], found: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """The base's parameters under those found, which may hold the rows of new tokens alone."""
    params = dict(base) | dict(found)
    new = found.get(EMBEDDING)
    if new is not None and EMBEDDING in base and new.shape[0] < base[EMBEDDING].shape[0]:
        old = grow_vocabulary({EMBEDDING: base[EMBEDDING]}, size)[EMBEDDING]
        params[EMBEDDING] = old.changed(
            old.shape, lambda rows: np.concatenate([rows[: len(rows) - new.shape[0]], new.view().astype(rows.dtype)])
        )
    return params


def check_same_decoder(text: TextConfig, below: Checkpoint, name: str, *, source: str) -> None:
    """Refuses a base whose shape differs in more than its vocabulary."""
    base = below.model.text if isinstance(below.model, LlavaConfig) else below.model
    if not isinstance(base, TextConfig):
        raise CheckpointError(f"--base must be a decoder; {name} is {below.layout}. Give what {source} was trained on.")
    free = {"vocab_size": 1, "max_positions": 1, "tie_embeddings": text.tie_embeddings}
    wanted, given = (dataclasses.asdict(dataclasses.replace(config, **free)) for config in (text, base))
    differing = [f"{name} is {given[name]}, must be {wanted[name]}" for name in wanted if wanted[name] != given[name]]
    if differing:
        raise CheckpointError(
            f"--base {name} is not the base that {source} was trained on: {'; '.join(differing)}. Give another."
        )


def _open_projector_file(path: Path) -> Checkpoint:
    """A file of a projector alone (`mm_projector.bin`), for a config's `init`."""
    params = {name: value for name, value in from_huggingface(open_file(path)).items() if part(name) == "projector"}
    if not params:
        raise CheckpointError(f"A file of weights must hold a projector; {path} does not. Give the folder instead.")
    widths = [params[name].shape for name in sorted(params) if name.endswith(".kernel")]
    shape = dataclasses.replace(CLIP_L_336, embed_dim=widths[0][0], num_heads=1)
    return Checkpoint(model=shape, params=params, layout="a projector", files=(path,))


def _open_ours(folder: Path, step: int | None) -> Checkpoint:
    """A model folder or a training workdir."""
    card = read_card(folder)
    run = None
    if _is_workdir(folder):
        from llava_jax.convert.workdir import open_workdir

        params, run = open_workdir(str(folder), step=step)
        files, layout = (), f"a training workdir at step {run.step}"
    else:
        weights = open_weights(folder)
        params, files, layout = weights.tensors, weights.files, "a model folder"
    config = read_object(folder / SOURCE_CONFIG) if (folder / SOURCE_CONFIG).is_file() else {}
    return Checkpoint(
        model=card.model,
        params=params,
        layout=layout,
        template=card.template,
        image_mode=card.image_mode,
        mm_use_im_start_end=card.mm_use_im_start_end,
        label=card.label,
        tokens=special_tokens(Fields(config, str(folder / SOURCE_CONFIG))),
        tokenizer=find_tokenizer(folder / TOKENIZER),
        config=config,
        files=files,
        run=run,
    )


def _is_workdir(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() and not has_weights(folder)


def find_tokenizer(folder: Path) -> Path | None:
    """The folder, if a tokenizer is in it."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES[:2]) else None


def _named_template(folder: Path, guess: str | None) -> str | None:
    """The template that our own export names, null if none was known; the guess elsewhere."""
    written = read_provenance(folder)
    name = written.take("template", str, None) if "template" in written.values else guess
    try:
        return None if name is None else find_template(name).name
    except UserError as error:
        raise CheckpointError(f"{written.where}: {error}") from error


def _check_fingerprint(folder: Path, base: Mapping[str, Tensor], name: str) -> None:
    """Refuses another base than the one that our own delta was made from."""
    wanted = read_provenance(folder).values.get("base_fingerprint")
    if wanted is not None and wanted != fingerprint(base):
        raise CheckpointError(
            f"--base {name} is not the base of {folder}: its norms have another sha256 than {PROVENANCE} says."
        )


def without_files(params: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Parameters in memory, as tensors to write."""
    return {name: in_memory(np.asarray(value), f"{origin}: {name}") for name, value in params.items()}
