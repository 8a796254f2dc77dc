"""`llava-jax convert`: one checkpoint, opened in whatever layout it has and written in another."""

import dataclasses
import time
from collections import Counter
from typing import Literal

from llava_jax.convert.accounting import expected_parameters
from llava_jax.convert.checkpoint import Checkpoint, open_checkpoint
from llava_jax.convert.export import adapted_run, write_delta, write_huggingface, write_lora, write_original
from llava_jax.convert.folder import check_parameters, write_model_folder
from llava_jax.convert.lora_folder import Names
from llava_jax.convert.safetensors_file import total_bytes
from llava_jax.errors import UserError
from llava_jax.models.parameters import part

Target = Literal["jax", "hf", "original", "delta", "lora", "lora-hf", "lora-hf-4.51"]
# Whose names adapters get.
_NAMES: dict[str, Names] = {"lora": "original", "lora-hf": "hf", "lora-hf-4.51": "hf-4.51"}


def convert(
    source: str, target: str, *, to: Target, base: str | None = None, tower: str | None = None, step: int | None = None
) -> str:
    """Writes the checkpoint `source` to the folder `target` and returns what was done, in words.

    `base` is what a delta, an adapter or a lone projector belongs to; with `to="delta"`, what to subtract; with one of
    `lora`, what the run began with, if its config does not say. `step` is one of a training workdir's.

    Raises:
      CheckpointError: something could not be accounted for, or the target layout has no such model.
    """
    begin = time.monotonic()
    if to == "delta" and base is None:
        raise UserError("--to delta needs --base, the model to take the difference from.")
    is_for_target = to == "delta" or to in _NAMES
    checkpoint = open_checkpoint(source, base=None if is_for_target else base, tower=tower, step=step)
    check_parameters(checkpoint.params, expected_parameters(checkpoint.model), source)
    notes: tuple[str, ...] = ()
    match to:
        case "jax":
            if not checkpoint.label:
                checkpoint = dataclasses.replace(checkpoint, label=f"converted from {source}")
            record = {"layout": checkpoint.layout, "files": checkpoint.files, "notes": checkpoint.notes}
            tokenizer = None if checkpoint.tokenizer is None else str(checkpoint.tokenizer)
            write_model_folder(
                target,
                checkpoint.card(),
                checkpoint.params,
                tokenizer=tokenizer,
                source=source,
                added_tokens=checkpoint.added_tokens,
                config=checkpoint.config,
                record=record,
            )
        case "hf":
            notes = write_huggingface(target, checkpoint, source=source)
        case "original":
            notes = write_original(target, checkpoint, source=source)
        case "delta":
            assert base is not None, "checked above"
            notes = write_delta(target, checkpoint, open_checkpoint(base), source=source)
        case _:
            below = base or _beginning(checkpoint)
            names, parts = _NAMES[to], open_checkpoint(below)
            notes = write_lora(target, checkpoint, parts, names=names, base_name=below, source=source)
    return summary(checkpoint, source, target, to, notes, seconds=time.monotonic() - begin)


def _beginning(checkpoint: Checkpoint) -> str:
    """Where the decoder of a run began."""
    begun = adapted_run(checkpoint).init.get("decoder")
    if begun in (None, "random"):
        raise UserError(
            f"Adapters belong to a model; {checkpoint.layout} says init.decoder={begun!r}. Give that model as --base."
        )
    return begun


def summary(
    checkpoint: Checkpoint, source: str, target: str, to: str, notes: tuple[str, ...], *, seconds: float
) -> str:
    """What a person wants to check before trusting the result."""
    sizes: Counter[str] = Counter()
    for name, tensor in checkpoint.params.items():
        sizes[part(name)] += tensor.size
    dtypes = Counter(str(tensor.dtype) for tensor in checkpoint.params.values())
    size = total_bytes(checkpoint.params.values())
    lines = [
        f"{source}: {checkpoint.layout} -> {target}: {to}",
        f"  {len(checkpoint.params):,} tensors, {size / 1e9:.3f} GB in {seconds:.1f} s; "
        + ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.most_common()),
        "  parameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()),
        f"  template: {checkpoint.template or 'not known, give --conv'}; pictures: {checkpoint.image_mode}; "
        f"tokenizer: {'copied' if checkpoint.tokenizer else 'none found'}",
        *(f"  {note}" for note in (*checkpoint.notes, *notes)),
    ]
    return "\n".join(lines)
