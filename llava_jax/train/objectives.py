"""Objectives: from a model and a batch to a sum of losses and the weight to divide it by."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llava_jax.models.attention import Attend, Constrain
from llava_jax.models.clip import Clip, unit
from llava_jax.models.layers import Remat
from llava_jax.models.llava import Llava
from llava_jax.train.cross_entropy import CrossEntropy, cross_entropy


class Context(NamedTuple):
    """What the mesh and the memory budget ask of a model; no objective knows more of either."""

    attend: Attend
    constrain: Constrain
    remat: Remat
    cross_entropy: CrossEntropy = cross_entropy


class Sums(NamedTuple):
    """Sums over a (micro-)batch: they add over micro-batches, hosts and packing; one division comes last."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    counts: dict[str, Float[Array, ""]]


@runtime_checkable
class Objective(Protocol):
    """Whatever gives sums that add up over rows; only `next_token`'s do so over micro-batches, too."""

    __name__: str

    def __call__(self, model, batch: Mapping[str, Array], context: Context) -> Sums: ...


def next_token(model: Llava, batch: Mapping[str, Array], context: Context) -> Sums:
    """Next-token prediction on the answers; weight counts supervised tokens.

    `counts`: `tokens`, those that are no padding; `correct`, targets that have the largest logit.
    """
    hidden = model(
        batch["tokens"],
        batch["images"],
        batch["patch_slots"],
        batch["positions"],
        batch["segment_ids"],
        batch.get("is_newline"),
        **_of_layers(context),
    )
    loss, correct = context.cross_entropy(hidden, model.decoder.head(), batch["targets"], batch["is_target"])
    counts = {"tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.float32), "correct": correct}
    return Sums(loss, batch["is_target"].sum(dtype=jnp.float32), counts)


def contrastive(model: Clip, batch: Mapping[str, Array], context: Context) -> Sums:
    """CLIP's symmetric contrastive loss over the pairs of the global batch (arXiv 2103.00020, figure 3).

    Every pair's negatives are all other pairs of the batch, on whatever device, so a batch cannot be split.
    `counts`: `tokens`, here pictures; `correct`, pictures whose most similar caption is a right one (captions
    that repeat count as the same).
    """
    image, text = model(batch["images"], batch["tokens"], **_of_layers(context))
    return _pairs(model, image, text, batch)


def patch_contrastive(model: Clip, batch: Mapping[str, Array], context: Context) -> Sums:
    """As `contrastive`, for the mean of the patches before the last layer instead of the class token after it.

    LLaVA reads the patches of that layer. A tower that is trained on its class token alone need not keep in them what
    they tell together, and a small one may not (compare patch-aligned contrastive learning, arXiv 2212.04994).
    """
    tower = model.tower
    hidden = tower.hidden(batch["images"], depth=tower.num_layers - 1, **_of_layers(context))
    image = model.visual_projection(tower.post_layernorm(hidden[:, 1:].mean(axis=1)))
    return _pairs(model, unit(image), model.embed_captions(batch["tokens"], **_of_layers(context)), batch)


def _of_layers(context: Context) -> dict[str, Any]:
    """What every run of layers is given."""
    return {"attend": context.attend, "constrain": context.constrain, "remat": context.remat}


def _pairs(model: Clip, image: Float[Array, "n c"], text: Float[Array, "n c"], batch: Mapping[str, Array]) -> Sums:
    is_pair = batch["is_pair"]
    # The temperature is kept from growing without bound, as CLIP does (its section 2.5: at most 100).
    scale = jnp.exp(jnp.minimum(model.logit_scale[...].astype(jnp.float32), jnp.log(100.0)))
    logits = scale * jnp.einsum("ic,jc->ij", image, text, preferred_element_type=jnp.float32)
    logits = jnp.where(is_pair[None, :] & is_pair[:, None], logits, jnp.finfo(jnp.float32).min)
    matches = jnp.diagonal(logits)
    losses = 0.5 * (jax.nn.logsumexp(logits, axis=0) + jax.nn.logsumexp(logits, axis=1)) - matches
    num_pairs = is_pair.sum(dtype=jnp.float32)
    nearest = batch["tokens"][jnp.argmax(logits, axis=1)]
    is_right = (nearest == batch["tokens"]).all(axis=1) & is_pair
    counts = {"tokens": num_pairs, "correct": is_right.sum(dtype=jnp.float32)}
    return Sums(jnp.where(is_pair, losses, 0.0).sum(), num_pairs, counts)
