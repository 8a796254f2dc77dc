"""Log-probabilities of given answers, in one forward pass."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llava_jax.compiler import products_in
from llava_jax.errors import UserError
from llava_jax.inference.generate import Inputs, logits_of, pad_prompts
from llava_jax.inference.model import Model, Prompt
from llava_jax.models.parameters import GraphDef, Parameters, bind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Natural log-probability of each answer token given all before it, and their sum."""

    logprobs: list[float]
    token_ids: list[int]
    sum: float


def score(model: Model, prompts: Sequence[Prompt]) -> list[Score]:
    """Scores the answer tokens of each prompt (`Processor.answered` or `Processor.raw` with an answer).

    Prompt and answer are one text; its answer tokens are those that start at or after the prompt's end.

    Raises:
      UserError: a prompt has no answer token, or does not fit the model's positions.
    """
    if not prompts:
        return []
    for prompt in prompts:
        if prompt.is_answer[:1].any():
            raise UserError("An answer needs a token before it; got none, not even BOS. Give a prompt.")
        if not prompt.is_answer.any():
            raise UserError("An answer to score must have at least one token of its own; got an empty one.")
        if len(prompt.tokens) > model.config.text.max_positions:
            raise UserError(
                f"Prompt and answer must fit {model.config.text.max_positions} positions; got {len(prompt.tokens)} "
                "tokens. Shorten either."
            )
    with products_in(model.dtype):
        logprobs = np.asarray(_logprobs(model.params, pad_prompts(prompts), graphdef=model.graphdef))
    scores = []
    for row, prompt in enumerate(prompts):
        at = np.flatnonzero(prompt.is_answer)
        values = [float(logprobs[row, i - 1]) for i in at]
        scores.append(Score(logprobs=values, token_ids=prompt.tokens[at].tolist(), sum=float(np.sum(values))))
    return scores


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _logprobs(params: Parameters, inputs: Inputs, *, graphdef: GraphDef) -> Float[Array, "b t"]:
    """At each position, the log-probability of the token that follows."""
    model = bind(graphdef, params)
    b, t = inputs.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    hidden = model(inputs.tokens, inputs.images, inputs.patch_slots, positions, is_newline=inputs.is_newline)
    following = jnp.roll(inputs.tokens, -1, axis=1)[..., None]
    return jnp.take_along_axis(jax.nn.log_softmax(logits_of(model, hidden), axis=-1), following, axis=-1)[..., 0]
