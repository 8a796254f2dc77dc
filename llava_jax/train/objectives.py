"""Objectives: from a model and a batch to a sum of losses and the weight to divide it by."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llava_jax.models.attention import Attend, Constrain
from llava_jax.models.clip import Clip, unit
from llava_jax.models.layers import Remat
from llava_jax.models.llava import Llava

# Logits of this many tokens of each row exist at a time; the whole [b t v] never does.
LOSS_CHUNK = 512


class Context(NamedTuple):
    """What the mesh and the memory budget ask of a model; no objective knows more of either."""

    attend: Attend
    constrain: Constrain
    remat: Remat


class Sums(NamedTuple):
    """Sums over a (micro-)batch: they add over micro-batches, hosts and packing; one division comes last."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    counts: dict[str, Float[Array, ""]]


@runtime_checkable
class Objective(Protocol):
    """`splits` says whether a batch may be split into micro-batches whose sums add up to the same."""

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
        attend=context.attend,
        constrain=context.constrain,
        remat=context.remat,
    )
    loss, correct = cross_entropy(hidden, model.decoder.head(), batch["targets"], batch["is_target"])
    counts = {"tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.float32), "correct": correct}
    return Sums(loss, batch["is_target"].sum(dtype=jnp.float32), counts)


def contrastive(model: Clip, batch: Mapping[str, Array], context: Context) -> Sums:
    """CLIP's symmetric contrastive loss over the pairs of the global batch (arXiv 2103.00020, figure 3).

    Every pair's negatives are all other pairs of the batch, on whatever device, so a batch cannot be split.
    `counts`: `tokens`, here pictures; `correct`, pictures whose most similar caption is a right one (captions
    that repeat count as the same).
    """
    image, text = model(batch["images"], batch["tokens"], attend=context.attend)
    return _pairs(model, image, text, batch)


def patch_contrastive(model: Clip, batch: Mapping[str, Array], context: Context) -> Sums:
    """As `contrastive`, for the mean of the patches before the last layer instead of the class token after it.

    LLaVA reads the patches of that layer. A tower that is trained on its class token alone need not keep in them what
    they tell together, and a small one may not (compare patch-aligned contrastive learning, arXiv 2212.04994).
    """
    tower = model.tower
    hidden = tower.hidden(batch["images"], depth=tower.num_layers - 1, attend=context.attend)
    image = model.visual_projection(tower.post_layernorm(hidden[:, 1:].mean(axis=1)))
    return _pairs(model, unit(image), model.embed_captions(batch["tokens"], attend=context.attend), batch)


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


def cross_entropy(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    is_target: Bool[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed float32 cross entropy of the supervised tokens, and how many of them have the largest logit.

    Works through the row in chunks and computes each chunk's logits again for the gradient.
    """
    b, t, d = hidden.shape
    chunk = min(LOSS_CHUNK, t)
    short = -t % chunk
    hidden, targets, is_target = (
        jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)).reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        for x in (hidden, targets, is_target)
    )

    @jax.checkpoint
    def chunk_sums(hidden_bcd, targets_bc, is_target_bc):
        logits = jnp.einsum("bcd,dv->bcv", hidden_bcd, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, targets_bc[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        right = (picked >= logits.max(axis=-1)) & is_target_bc
        return jnp.where(is_target_bc, losses, 0.0).sum(), right.sum(dtype=jnp.float32)

    def body(sums, chunk):
        return jax.tree.map(jnp.add, sums, chunk_sums(*chunk)), None

    return jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), (hidden, targets, is_target))[0]
