"""A recorded model run by our code: its folder opened, its batch laid out, its numbers compared."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.convert.checkpoint import Checkpoint, open_checkpoint
from llava_jax.data.anyres import find_slots
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.images import find_layout
from llava_jax.data.tokenizer import FastTokenizer
from llava_jax.inference.generate import Sampling, generate, pad_prompts
from llava_jax.inference.model import Model, Processor, Prompt
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import structure
from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from llava_jax.models.parameters import bind
from llava_jax.shapes import LlavaConfig
from llava_jax.train.objectives import Context, next_token

IGNORED = -100
PLAIN = Context(attend=attend_xla, constrain=unconstrained, remat=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """A checkpoint with its parameters in float32."""

    checkpoint: Checkpoint
    config: LlavaConfig
    model: Model


def open_recorded(folder: Path, *, base: Path | None = None, windowless: bool = False) -> Recorded:
    """The checkpoint of a folder; `windowless` ignores its sliding window."""
    checkpoint = open_checkpoint(str(folder), base=None if base is None else str(base))
    config = checkpoint.model
    assert isinstance(config, LlavaConfig)
    if windowless:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, sliding_window=None))
    params = {name: jnp.asarray(np.asarray(value), jnp.float32) for name, value in checkpoint.params.items()}
    model = Model(config=config, graphdef=structure(config)[0], params=params)
    return Recorded(checkpoint=checkpoint, config=config, model=model)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """The grey levels that normalised pixels (n, 3, h, w) or (3, h, w) came from, channels last."""
    pixels = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)
    levels = (pixels.astype(np.float64) * PIXEL_STD + PIXEL_MEAN) * 255
    found = np.clip(np.round(levels), 0, 255).astype(np.uint8)
    assert np.abs(levels - found).max() < 1e-3, "recorded pixels are grey levels"
    return found


def lay_out(
    recorded: Recorded, ids: np.ndarray, mask: np.ndarray, pictures: list[np.ndarray], sizes: list[tuple[int, int]]
) -> list[Prompt]:
    """Rows of sentinel ids as prompts; a row without a picture skips one, as the original does."""
    config, mode = recorded.config, recorded.checkpoint.image_mode
    assert mode is not None
    shape = {"image_size": config.vision.image_size, "num_features": config.num_features}
    prompts, at = [], 0
    for row, kept in zip(ids, mask, strict=True):
        tokens = row[kept.astype(bool)]
        count = int((tokens == IMAGE_TOKEN).sum())
        layouts = [find_layout(size, mode, **shape) for size in sizes[at : at + count]]
        widths = np.ones(len(tokens), int)
        widths[tokens == IMAGE_TOKEN] = [layout.num_slots for layout in layouts]
        tokens = np.repeat(tokens, widths).astype(np.int32)
        tiles = [to_bytes(picture) for picture in pictures[at : at + count]]
        none = np.zeros((0, config.vision.image_size, config.vision.image_size, 3), np.uint8)
        slots, is_newline = find_slots(tokens == IMAGE_TOKEN, layouts)
        is_answer = np.zeros(len(tokens), bool)
        prompts.append(Prompt(tokens, is_answer, np.concatenate([none, *tiles]), slots.astype(np.int32), is_newline))
        at += max(count, 1)
    return prompts


def widen_labels(ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    """Labels of widened rows, ignored on every picture's slots, padded to the longest."""
    rows = []
    for row, label, kept, prompt in zip(ids, labels, mask, prompts, strict=True):
        wide = np.full(len(prompt.tokens), IGNORED)
        wide[prompt.tokens != IMAGE_TOKEN] = label[kept.astype(bool)][row[kept.astype(bool)] != IMAGE_TOKEN]
        rows.append(wide)
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=IGNORED) for row in rows])


def to_batch(prompts: list[Prompt], labels: np.ndarray) -> dict[str, Any]:
    """What the training objective takes."""
    inputs = pad_prompts(prompts)
    b, t = inputs.tokens.shape
    labels = np.pad(labels, [(0, 0), (0, t - labels.shape[1])], constant_values=IGNORED)
    targets = np.concatenate([labels[:, 1:], np.full((b, 1), IGNORED)], axis=1)
    positions = np.broadcast_to(np.arange(t), (b, t))
    batch = {
        "tokens": inputs.tokens,
        "images": inputs.images,
        "patch_slots": inputs.patch_slots,
        "positions": jnp.asarray(positions, jnp.int32),
        "segment_ids": jnp.asarray(positions < np.asarray(inputs.lengths)[:, None], jnp.int32),
        "targets": jnp.asarray(np.maximum(targets, 0), jnp.int32),
        "is_target": jnp.asarray(targets != IGNORED),
    }
    return batch if inputs.is_newline is None else batch | {"is_newline": inputs.is_newline}


def greedy(recorded: Recorded, prompts: list[Prompt], *, count: int, eos_id: int) -> list[list[int]]:
    """Greedy tokens of each prompt."""

    class OnlyIds(FastTokenizer):
        """Stands for a tokenizer where no text is asked for."""

        vocab_size = recorded.config.text.vocab_size

        def __init__(self):
            self.eos_id = eos_id

        def decode(self, ids: Any) -> str:
            return ""

    config = recorded.config
    processor = Processor(
        tokenizer=OnlyIds(),
        template=None,
        image_mode="square",
        image_size=config.vision.image_size,
        num_features=config.num_features,
    )
    sampling = Sampling(max_new_tokens=count)
    answers = generate(recorded.model, processor, prompts, sampling)
    return [list(answer.token_ids) for answer in answers]


def largest(found: Any, wanted: Any) -> float:
    """The largest absolute difference."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max(initial=0.0))


def run_whole(recorded: Recorded, batch: dict[str, Any]) -> tuple[float, dict[str, Any], np.ndarray, np.ndarray]:
    """Loss, gradients, embeddings and logits of a batch."""

    def run(params: Any, batch: dict[str, Any]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        model = bind(recorded.model.graphdef, params)
        sums = next_token(model, batch, PLAIN)
        x = model.embed(batch["tokens"], batch["images"], batch["patch_slots"], batch.get("is_newline"))
        hidden = model.decoder(x, batch["positions"], batch["segment_ids"])
        return sums.loss / sums.weight, (x, hidden @ model.decoder.head())

    (loss, (x, logits)), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(recorded.model.params, batch)
    return float(loss), gradients, np.asarray(x), np.asarray(logits)
