"""A run as data: frozen dataclasses that a Python file fills in, and overrides from the command line."""

import dataclasses
import difflib
import math
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llava_jax.data.mix import Choice
from llava_jax.data.rows import Captions, RowFormat
from llava_jax.errors import UserError
from llava_jax.models.lora import LoraConfig
from llava_jax.models.quantized import Scheme
from llava_jax.shapes import LlavaConfig, ModelConfig
from llava_jax.train.objectives import Objective, contrastive, patch_contrastive
from llava_jax.train.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is batched; exactly one of each pair `batch_*` and of `epochs`, `steps` is set.

    `records`: what is read, see `as_mix`; `image_root`: folder that picture names are relative to; `tokenizer`: folder
    with tokenizer.model or tokenizer.json; `max_refused`: share of records that may be unusable before the run refuses
    to start, or replaced before it refuses to go on.
    """

    records: Choice
    image_root: str
    tokenizer: str
    rows: RowFormat
    batch_rows: int | None = None
    batch_records: int | None = None
    epochs: int | None = None
    steps: int | None = None
    shuffle: bool = True
    workers: int = 0
    max_refused: float = 0.005

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers must be at least 0; got {self.workers}.")
        if not 0 <= self.max_refused <= 1:
            raise ValueError(f"data.max_refused is a share between 0 and 1; got {self.max_refused}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warmup, cosine decay to zero, and clipping of the global norm.

    The defaults are those of the original's scripts and of the transformers Trainer under them, but for
    `clip_norm`, which its DeepSpeed configs leave out. `part_learning_rates` overrides the rate of parts of the
    model, as `mm_projector_lr` does. `moments` is how Adam's are held between steps; bfloat16 halves their memory.
    """

    learning_rate: float
    part_learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    moments: Literal["float32", "bfloat16"] = "float32"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        rates = {f"part_learning_rates.{name}": rate for name, rate in self.part_learning_rates.items()}
        bounds = {name: (rate, 0.0, math.inf) for name, rate in rates.items()} | {
            "learning_rate": (self.learning_rate, 0.0, math.inf),
            "warmup_ratio": (self.warmup_ratio, 0.0, math.nextafter(1.0, 2.0)),
            "weight_decay": (self.weight_decay, 0.0, math.inf),
            "clip_norm": (1.0 if self.clip_norm is None else self.clip_norm, math.ulp(0.0), math.inf),
            "b1": (self.b1, 0.0, 1.0),
            "b2": (self.b2, 0.0, 1.0),
            # With less, an update by a gradient of 0 would be 0/0.
            "eps": (self.eps, 2.0**-126, math.inf),
        }
        for name, (value, low, high) in bounds.items():
            if not low <= value < high:
                raise ValueError(f"optim.{name} must be at least {low:g} and less than {high:g}; got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LifeConfig:
    """How a run is watched and kept; nothing here changes a number of it, so all may differ when it goes on.

    `keep`: newest checkpoints that stay; `stall_seconds`: without a finished step the watchdog ends the run;
    `eval_records`: record file (of the same form, pictures under `data.image_root`) whose loss is measured every
    `eval_every` steps, a multiple of `checkpoint_every`, the best such checkpoint staying too; `profile`: steps
    `a:b` to trace; `wandb_project`: Weights & Biases project to report to.
    """

    keep: int = 2
    stall_seconds: float = 1800.0
    eval_records: str | None = None
    eval_every: int | None = None
    profile: str | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"life.keep must be at least 1; got {self.keep}.")
        if not self.stall_seconds > 0:
            raise ValueError(f"life.stall_seconds must be more than 0; got {self.stall_seconds}.")
        _ = self.profile_steps

    @property
    def profile_steps(self) -> range:
        """The steps to trace, counted from 0."""
        if self.profile is None:
            return range(0)
        first, _, last = self.profile.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise ValueError(f"life.profile must be two steps a:b with a < b; got {self.profile!r}.")
        return range(int(first), int(last))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of one stage.

    `init`: where each part of the model starts, whatever `llava-jax convert` opens, or `random`;
    `trainable`: the parts that learn, the others get neither gradients nor moments; `stacked`: whether layers
    are one stack for `lax.scan` (see `models/layers.py`); `remat`: what the backward pass computes again:
    `elementwise` keeps the results of linear layers and attention, `linear` those of attention, `everything` only
    what enters each layer; `quantize`: the decoder's linear layers are frozen and held in 8 or 4 bits; `lora`: the
    decoder learns through adapters, its own parameters are frozen.
    """

    model: ModelConfig
    objective: Objective
    init: Mapping[str, str]
    trainable: tuple[str, ...]
    data: DataConfig
    optim: OptimConfig
    checkpoint_every: int
    seed: int = 42
    accumulation: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    stacked: bool = False
    remat: Literal["nothing", "elementwise", "linear", "everything"] = "nothing"
    quantize: Scheme | None = None
    lora: LoraConfig | None = None
    mesh: MeshConfig = MeshConfig()
    life: LifeConfig = LifeConfig()
    log_every: int = 1

    def __post_init__(self) -> None:
        is_pairs = isinstance(self.data.rows, Captions) or self.objective in (contrastive, patch_contrastive)
        if is_pairs and self.accumulation != 1:
            raise ValueError(
                "Pairs of pictures and captions are needed all at once; got "
                f"accumulation={self.accumulation}. Set it to 1 and spread the batch over more devices."
            )
        for name in ("checkpoint_every", "accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32; got {self.seed}.")
        if not self.trainable:
            raise ValueError("trainable must name at least one part of the model; got ().")
        if self.lora is not None and ("decoder" not in self.trainable or not isinstance(self.model, LlavaConfig)):
            raise ValueError(f"lora adapts a decoder that is trained; got trainable={self.trainable}. Add 'decoder'.")
        if self.quantize is not None and not isinstance(self.model, LlavaConfig):
            raise ValueError(f"quantize is for a LLaVA's decoder; got a {type(self.model).__name__}. Set it to None.")
        if self.quantize is not None and self.lora is None and "decoder" in self.trainable:
            raise ValueError(
                f"Quantized weights do not learn; got quantize={self.quantize!r} and a decoder that is trained. "
                "Set lora, or leave 'decoder' out of trainable."
            )


def load_config(path: str, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """The config that a Python file's `get_config()` returns, with `a.b=value` overrides applied.

    As a script, the file may import its neighbours: `from llava15_finetune_7b import get_config as finetune_7b`.
    """
    if not Path(path).is_file():
        raise UserError(f"--config must name a Python file; got {path!r}, which does not exist. See configs/.")
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        module = runpy.run_path(path)
        config = module["get_config"]() if "get_config" in module else None
    except Exception as error:
        raise UserError(f"--config {path}{_line_of(error, path)} cannot be loaded: {_in_words(error)}") from error
    finally:
        sys.path.pop(0)
    if "get_config" not in module:
        raise UserError(f"A config file must define get_config(); {path!r} does not. See configs/debug_cpu.py.")
    if not isinstance(config, TrainConfig):
        raise UserError(f"get_config() must return a TrainConfig; that of {path!r} returned {config!r:.80}.")
    for override in overrides:
        config = apply_override(config, override)
    return config


def _line_of(error: Exception, path: str) -> str:
    """Where the file was when it failed, if it is a place in the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}," if lines else ""


def _in_words(error: Exception) -> str:
    """Our own rules speak for themselves; what Python says needs its kind: `NameError: name 'x' is not defined`."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {text}"


def apply_override(config: TrainConfig, override: str) -> TrainConfig:
    """The config with one `a.b=value` applied; an unknown field is refused with the nearest known one."""
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--set takes a.b=value; got {override!r}.")
    try:
        return _replace(config, path.split("."), text, override)
    except (ValueError, TypeError) as error:
        raise UserError(f"--set {override}: {error}") from None


def _replace(node: Any, path: list[str], text: str, override: str, kind: Any = None) -> Any:
    """The node with one value replaced; `kind` is the type of a mapping's values."""
    name, *rest = path
    if isinstance(node, Mapping):
        if rest:
            raise UserError(f"--set {override}: {name!r} is a value, not a group.")
        return {**node, name: _parse(text, kind, override)}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise UserError(f"--set {override}: {name!r} is looked up in {node!r}, which has no fields.")
    names = [field.name for field in dataclasses.fields(node)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
        raise UserError(f"Unknown field {name!r} in override {override!r}. {hint}")
    kind = typing.get_type_hints(type(node))[name]
    if rest:
        value = _replace(getattr(node, name), rest, text, override, (typing.get_args(kind) or (None,))[-1])
    else:
        value = _parse(text, kind, override)
    return dataclasses.replace(node, **{name: value})


def _parse(text: str, kind: Any, override: str) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for option in options:
        if option is type(None) and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(option) is Literal and text in typing.get_args(option):
            return text
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    if str in options:
        return text
    simple = all(o in (int, float, bool, type(None)) or typing.get_origin(o) is Literal for o in options)
    if simple:
        name = kind.__name__ if isinstance(kind, type) else kind
        raise UserError(f"--set {override}: expected {name}; got {text!r}.")
    raise UserError(f"--set {override}: a field of type {kind} cannot be set here; edit the config file.")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a config by dotted path; functions by their name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        items = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
        header = {f"{prefix}type": type(config).__name__} if prefix else {}
    elif isinstance(config, Mapping):
        items, header = list(config.items()), {}
    elif isinstance(config, tuple) and any(map(dataclasses.is_dataclass, config)):
        items, header = list(enumerate(config)), {}
    else:
        return {prefix.removesuffix("."): config.__name__ if callable(config) else config}
    leaves = header
    for name, value in items:
        leaves |= flatten(value, f"{prefix}{name}.")
    return leaves
