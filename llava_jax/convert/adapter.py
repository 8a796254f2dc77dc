"""LoRA adapters of PEFT, merged into the weights that they were trained on."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llava_jax.convert.fields import Fields, read_json
from llava_jax.convert.layouts import Kind, change_layout, our_name
from llava_jax.convert.tensor import Tensor, add_in_float32
from llava_jax.convert.weights import open_file
from llava_jax.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.bin"
# Saved without the adapter's name, held in memory with it; some tools save what is in memory.
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_COPY = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?)?\.(?P<leaf>weight|bias)")
# Settings that the keys tell too, or that training alone reads.
_INERT = (
    "target_modules", "exclude_modules", "lora_dropout", "modules_to_save", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "eva_config", "runtime_config", "inference_mode",
    "revision", "auto_mapping", "peft_version", "task_type", "target_parameters", "qalora_group_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Pairs of low-rank factors by our parameter, what replaces whole parameters, and the base that it names."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    whole: dict[str, Tensor]
    files: tuple[Path, ...]
    base: str | None


def open_adapter(folder: Path) -> Adapter:
    """An adapter's factors, and the trained parameters beside them (`non_lora_trainables.bin`).

    Raises:
      CheckpointError: a key that means nothing here, half a pair, or a kind of adapter that adds up otherwise.
    """
    fields = Fields(read_json(folder / CONFIG), str(folder / CONFIG))
    fields.must_be("peft_type", "LORA")
    fields.must_be("bias", "none")
    # The others change the base before they begin (PiSSA, OLoRA, CorDA, LoftQ and the like).
    fields.must_be("init_lora_weights", True, False, "gaussian", "eva", "orthogonal")
    fields.ignore(*_INERT)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{str(folder)!r} must hold {' or '.join(WEIGHTS)}; it does not. Download it again.")
    files = [path]
    halves: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in open_file(path).items():
        match = _PAIR.fullmatch(key)
        if match is None:
            _add_whole(whole, path, key, tensor)
            continue
        name, kind = _known(path, f"{match['module']}.weight")
        is_float = jnp.issubdtype(tensor.dtype, jnp.floating)
        if kind != "matrix" or not is_float or match["side"] in halves.get(name, {}):
            raise CheckpointError(
                f"{path}: {key} ({tensor.dtype}) is no factor of a matrix of its own. Merge this adapter with PEFT."
            )
        halves.setdefault(name, {})[match["side"]] = tensor
        modules[name] = match["module"].removeprefix("base_model.model.")
    if (folder / NON_LORA).is_file():
        files.append(folder / NON_LORA)
        for key, tensor in open_file(folder / NON_LORA).items():
            _add_whole(whole, folder / NON_LORA, key, tensor)
    if not halves:
        raise CheckpointError(f"{path} must hold an adapter's factors; it holds none. Download it again.")
    pairs, scales = {}, {}
    for name, pair in halves.items():
        if set(pair) != {"A", "B"}:
            (tensor,) = pair.values()
            raise CheckpointError(f"{tensor.origin} has no counterpart. Download the adapter again.")
        pairs[name] = (pair["A"], pair["B"])
        scales[name] = _scale(fields, modules[name], pair["A"])
    base = fields.take("base_model_name_or_path", str, None)
    fields.done()
    return Adapter(pairs=pairs, scales=scales, whole=whole, files=tuple(files), base=base)


def _add_whole(whole: dict[str, Tensor], path: Path, key: str, tensor: Tensor) -> None:
    # What PEFT put a trained copy in the place of: the base has it.
    if ".original_module." in key:
        return
    name, kind = _known(path, key)
    if name in whole:
        raise CheckpointError(f"{path}: {key} means {name}, as {whole[name].origin} does. Remove one of them.")
    whole[name] = change_layout(tensor, kind)


def _scale(fields: Fields, module: str, a: Tensor) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    alpha = _of_module(fields, "alpha_pattern", module, fields.take("lora_alpha", float, 8.0))
    rank = _of_module(fields, "rank_pattern", module, fields.take("r", int, 8))
    if a.shape[:1] != (rank,):
        raise CheckpointError(f"{a.origin} has the shape {a.shape}; {fields.where} says r={rank:g}. Mend it.")
    return alpha / (math.sqrt(rank) if fields.take("use_rslora", bool, False) else rank)


def _of_module(fields: Fields, name: str, module: str, default: int | float) -> int | float:
    """A number, or what the first pattern that the module's name ends with says instead (`get_pattern_key` of PEFT)."""
    for pattern, value in fields.take(name, dict, {}).items():
        try:
            # A repeated group can take for ever to find no match.
            if re.search(r"\)[*+{]", pattern):
                raise ValueError("it repeats a group")
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                number = float(value)
                if not math.isfinite(number):
                    raise ValueError("it is not finite")
                return number
        except (re.error, TypeError, ValueError) as error:
            raise CheckpointError(f"{fields.where}: {name} has {pattern!r}: {value!r}, {error}. Mend it.") from error
    return default


def _known(path: Path, key: str) -> tuple[str, Kind]:
    """Our name of an adapter's key, whose prefixes count the wrappers that were around the model."""
    match = _COPY.fullmatch(re.sub(r"\.base_layer\.", ".", key))
    bare = f"{match['module']}.{match['leaf']}" if match else key
    for prefix in ("base_model.model.", "base_model.", ""):
        if bare.startswith(prefix):
            name = bare.removeprefix(prefix)
            found = our_name(name) or our_name(re.sub(r"^model\.(?=model\.)", "", name))
            if found is not None:
                return found
    raise CheckpointError(f"{path}: no rule knows {key}. This kind of adapter is not supported.")


def merge(params: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Parameters with the adapter added in, in their own dtypes (`merge_and_unload` of PEFT).

    Raises:
      CheckpointError: a factor does not fit; these are not the weights that the adapter was trained on.
    """
    merged = dict(params) | adapter.whole
    problems = []
    for name, (a, b) in adapter.pairs.items():
        if name not in merged:
            problems.append(f"it has no {name}, which {a.origin} changes")
            continue
        weight = merged[name]
        rank, wide = a.shape
        if (wide, b.shape[0]) != weight.shape or b.shape[1] != rank:
            problems.append(f"{weight.origin} is {weight.shape}, {a.origin} needs {(wide, b.shape[0])}")
            continue
        merged[name] = weight.changed(weight.shape, _adder(a, b, adapter.scales[name]))
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"--base is not the base of this adapter: {'; '.join(problems[:4])}{more}.")
    return merged


def _adder(a: Tensor, b: Tensor, scale: float):
    def add(values: np.ndarray) -> np.ndarray:
        low, high = (np.asarray(factor.view()).astype(np.float32) for factor in (a, b))
        # Ours is (in, out); theirs is B @ A, (out, in).
        return add_in_float32(values, lambda rows: scale * (low.T[rows] @ high.T))

    return add
