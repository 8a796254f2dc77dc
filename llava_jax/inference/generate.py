"""Answers: one prefill, then a jitted loop over a key-value cache, many prompts of unequal length at a time."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from llava_jax.compiler import compiler_options, products_in
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import UserError
from llava_jax.inference.model import Model, Processor, Prompt
from llava_jax.inference.stopping import Keywords
from llava_jax.models.attention import attend_xla
from llava_jax.models.llama import NOWHERE, Cache, empty_cache
from llava_jax.models.llava import Llava
from llava_jax.models.parameters import GraphDef, Parameters, bind
from llava_jax.models.streamed import attend_streamed, multiply

# Slots of a cache are a multiple of this, so that one program decodes answers of many lengths.
CACHE_MULTIPLE = 16
# Tokens between two looks at what came out: for stop strings, and for a reader of the stream.
CHUNK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_p` 1 and `top_k` 0 keep every token.

    The order is that of transformers' `generate`: temperature, then top-k, then top-p.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}.")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or positive and finite; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1; got {self.top_p}.")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k must be 0 (off) or positive, below 2**31; got {self.top_k}.")
        if "" in self.stop:
            raise UserError("A stop string must hold at least one letter; got ''. Leave it out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one prompt got: `token_ids` without prompt and stop token; `prompt_tokens` counts image slots."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]


class Inputs(NamedTuple):
    """Prompts of a batch, padded on the right."""

    tokens: Int[Array, "b t"]
    images: UInt8[Array, "b i size size 3"]
    patch_slots: Int[Array, "b i p"]
    is_newline: Bool[Array, "b t"] | None
    lengths: Int[Array, " b"]


class State(NamedTuple):
    """Where each row of a batch stands: its newest token is sampled, but not yet in the cache."""

    cache: Cache
    token: Int[Array, " b"]
    position: Int[Array, " b"]
    count: Int[Array, ""]
    is_done: Bool[Array, " b"]


def generate(
    model: Model, processor: Processor, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int] = ()
) -> list[Answer]:
    """Answers of all prompts; each is what the prompt gets alone, up to what closes an answer in the template.

    `seeds` holds one integer per prompt (0 by default): a sampled answer depends on its own seed only.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for chunk in _decode(model, processor, prompts, sampling, seeds, finished, chunk=sampling.max_new_tokens):
        for row, new in enumerate(chunk):
            tokens[row] += new
    return [
        _answer(processor, prompt, ids, sampling, is_finished)
        for prompt, ids, is_finished in zip(prompts, tokens, finished, strict=True)
    ]


def stream(
    model: Model, processor: Processor, prompt: Prompt, sampling: Sampling, *, seed: int = 0
) -> Iterator[str | Answer]:
    """Pieces of one answer's text as they come, and last the whole `Answer`."""
    ids: list[int] = []
    shown = ""
    words = (*sampling.stop, *processor.keywords.keywords)
    finished = [False]
    for chunk in _decode(model, processor, [prompt], sampling, [seed], finished, chunk=1):
        ids += chunk[0]
        text = _cut(processor.tokenizer.decode(ids), words)[0].strip()
        # Bytes of an unfinished letter decode to a replacement mark, and a stop string may be on its way.
        held = max((k for stop in words for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
        ready = text[: len(text) - held]
        if not text.endswith("\ufffd") and ready.startswith(shown) and len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    answer = _answer(processor, prompt, ids, sampling, finished[0])
    if answer.text.startswith(shown) and len(answer.text) > len(shown):
        yield answer.text[len(shown) :]
    yield answer


def _decode(
    model: Model,
    processor: Processor,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    finished: list[bool],
    *,
    chunk: int,
) -> Iterator[list[list[int]]]:
    """New token ids of each row, a chunk of steps at a time; marks rows that ended by a stop in `finished`."""
    if not prompts:
        return
    if seeds and len(seeds) != len(prompts):
        raise UserError(f"There must be one seed per prompt; got {len(seeds)} seeds for {len(prompts)} prompts.")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"A seed must be at least 0 and below 2**32; got {', '.join(map(str, seeds))}.")
    keywords = processor.keywords
    has_words = bool(sampling.stop or keywords.keywords)
    chunk = min(chunk, CHUNK) if has_words else chunk
    inputs = pad_prompts(prompts)
    longest = int(inputs.lengths.max()) + sampling.max_new_tokens
    if longest > model.config.text.max_positions:
        raise UserError(
            f"Prompt and answer must fit {model.config.text.max_positions} positions; the longest prompt has "
            f"{int(inputs.lengths.max())} tokens and max_new_tokens is {sampling.max_new_tokens}. Shorten either."
        )
    choose = _Choice(
        jnp.float32(sampling.temperature or 1.0),
        jnp.float32(sampling.top_p),
        jnp.int32(sampling.top_k),
        jnp.array(list(seeds) or [0] * len(prompts), jnp.uint32),
    )
    stop_ids = (processor.tokenizer.eos_id,)
    static = {"graphdef": model.graphdef, "is_greedy": sampling.temperature == 0.0, "stop_ids": stop_ids}
    length = -(-(inputs.tokens.shape[1] + sampling.max_new_tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    prefill, advance = _programs(jax.local_devices()[0])
    with products_in(model.dtype):
        state = prefill(model.params, inputs, choose, cache_length=length, **static)
    texts: list[list[int]] = [[] for _ in prompts]
    rows_done = np.zeros(len(prompts), bool)
    new = np.asarray(state.token)[:, None]
    count = 1
    while True:
        pieces = []
        for row in range(len(prompts)):
            ids = [] if rows_done[row] else _until_stop(new[row], stop_ids)
            ended = not rows_done[row] and len(ids) < new.shape[1]
            if has_words and not rows_done[row]:
                for n in range(1, len(ids) + 1):
                    if _is_closed(texts[row] + ids[:n], processor.tokenizer, sampling.stop, keywords):
                        ids, ended = ids[:n], True
                        break
            texts[row] += ids
            finished[row] |= ended
            rows_done[row] |= ended
            pieces.append(ids)
        yield pieces
        steps = min(chunk, sampling.max_new_tokens - count)
        if steps == 0 or rows_done.all():
            return
        state = state._replace(is_done=jnp.asarray(rows_done))
        with products_in(model.dtype):
            state, new = advance(model.params, state, choose, jnp.int32(steps), **static)
        count += steps
        new = np.asarray(new)[:, :steps]


def padded(length: int) -> int:
    """The length to compile for, so that few programs serve all: padding is 15 slots or an eighth at most.

    Example: 110 -> 112, 650 -> 704, 3000 -> 3072.
    """
    step = max(16, 2 ** (length.bit_length() - 1) // 8)
    return -(-length // step) * step


def pad_prompts(prompts: Sequence[Prompt]) -> Inputs:
    """One batch: prompts on the left, padding after them; patches that land nowhere have slots past the end."""
    if not all(len(prompt.tokens) for prompt in prompts):
        raise UserError("A prompt must have at least one token; got an empty one. Write something.")
    longest = max(len(prompt.tokens) for prompt in prompts)
    length = padded(longest)
    tiles = max(len(prompt.images) for prompt in prompts)
    size = prompts[0].images.shape[1:]
    patches = max(prompt.patch_slots.shape[1] for prompt in prompts)
    has_newlines = any(prompt.is_newline.any() for prompt in prompts)
    tokens = np.zeros((len(prompts), length), np.int32)
    images = np.zeros((len(prompts), tiles, *size), np.uint8)
    is_newline = np.zeros((len(prompts), length), bool)
    patch_slots = np.tile(length + np.arange(tiles * patches, dtype=np.int32), (len(prompts), 1))
    patch_slots = patch_slots.reshape(len(prompts), tiles, patches)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = np.where(prompt.tokens == IMAGE_TOKEN, 0, prompt.tokens)
        if len(prompt.images):
            images[row, : len(prompt.images)] = prompt.images
            free = patch_slots[row, : len(prompt.images)]
            patch_slots[row, : len(prompt.images)] = np.where(prompt.patch_slots < 0, free, prompt.patch_slots)
            is_newline[row, : len(prompt.tokens)] = prompt.is_newline
    lengths = np.array([len(prompt.tokens) for prompt in prompts], np.int32)
    newlines = jnp.asarray(is_newline) if has_newlines else None
    return Inputs(jnp.asarray(tokens), jnp.asarray(images), jnp.asarray(patch_slots), newlines, jnp.asarray(lengths))


class _Choice(NamedTuple):
    """The traced side of `Sampling`, and a seed per row."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    seeds: UInt32[Array, " b"]


class _Programs(NamedTuple):
    prefill: jax.stages.Wrapped
    advance: jax.stages.Wrapped


@functools.cache
def _programs(device: Any) -> _Programs:
    """`_prefill` and `_advance`, to be compiled as suits the device."""
    compiled = functools.partial(jax.jit, compiler_options=compiler_options(device, in_any_order=True))
    return _Programs(
        compiled(_prefill, static_argnames=("graphdef", "cache_length", "is_greedy", "stop_ids")),
        compiled(_advance, static_argnames=("graphdef", "is_greedy", "stop_ids"), donate_argnames=("state",)),
    )


def _prefill(
    params: Parameters,
    inputs: Inputs,
    choose: _Choice,
    *,
    graphdef: GraphDef,
    cache_length: int,
    is_greedy: bool,
    stop_ids: tuple[int, ...],
) -> State:
    """Fills the cache with the prompts and samples each row's first token."""
    model = bind(graphdef, params)
    b, t = inputs.tokens.shape
    x = model.embed(inputs.tokens, inputs.images, inputs.patch_slots, inputs.is_newline)
    # The prompts attend to each other alone, not to the slots of the answers to come.
    cache = empty_cache(model.config.text, batch=b, length=t, dtype=x.dtype)
    positions = jnp.where(jnp.arange(t) < inputs.lengths[:, None], jnp.arange(t), NOWHERE)
    hidden, cache = model.decoder.extend(x, positions, cache)
    cache = cache.grow(cache_length)
    last = jnp.take_along_axis(hidden, inputs.lengths[:, None, None] - 1, axis=1)[:, 0]
    count = jnp.zeros((), jnp.int32)
    token = sample(logits_of(model, last), choose, count, is_greedy=is_greedy)
    return State(cache, token, inputs.lengths, count + 1, _is_stop(token, stop_ids))


def _advance(
    params: Parameters,
    state: State,
    choose: _Choice,
    steps: Int[Array, ""],
    *,
    graphdef: GraphDef,
    is_greedy: bool,
    stop_ids: tuple[int, ...],
) -> tuple[State, Int[Array, "b n"]]:
    """Up to `steps` more tokens of each row, fewer once every row has stopped.

    There is room for as many as the cache holds, so that one compilation serves streams and whole answers alike.
    """
    model = bind(graphdef, params)
    attend = attend_streamed if model.decoder.is_streamed else attend_xla
    new = jnp.full((len(state.token), state.cache.positions.shape[1]), stop_ids[0], jnp.int32)

    def goes_on(carry: tuple[Int[Array, ""], State, Int[Array, "b n"]]) -> Bool[Array, ""]:
        n, state, _ = carry
        return (n < steps) & ~state.is_done.all()

    def body(carry: tuple[Int[Array, ""], State, Int[Array, "b n"]]):
        n, state, new = carry
        x = model.decoder.embed_tokens(state.token[:, None])
        hidden, cache = model.decoder.extend(x, state.position[:, None], state.cache, attend=attend)
        token = sample(logits_of(model, hidden[:, 0]), choose, state.count, is_greedy=is_greedy)
        is_done = state.is_done | _is_stop(token, stop_ids)
        return (
            n + 1,
            State(_as_it_came(cache), token, state.position + 1, state.count + 1, is_done),
            new.at[:, n].set(token),
        )

    _, state, new = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), state, new))
    return state, new


def _as_it_came(cache: Cache) -> Cache:
    """The cache in the layout of an argument: XLA's TPU compiler would choose another for a loop, and copy it twice."""
    layers = jax.tree.map(lambda x: with_layout_constraint(x, Layout((0, 1, 2))), cache.layers)
    return cache._replace(layers=layers)


def sample(logits: Float[Array, "b v"], choose: _Choice, count: Int[Array, ""], *, is_greedy: bool) -> Int[Array, " b"]:
    """The next token of each row; row r's draw depends on its seed and `count` alone."""
    if is_greedy:
        return _largest(logits)
    kept = restrict(logits / choose.temperature, choose.top_k, choose.top_p)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), count))(choose.seeds)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def _largest(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """`jnp.argmax` of each row, by two passes over vectors; on CPUs that one compares number by number."""
    is_nan = jnp.isnan(logits)
    # Asked for apart: the largest of numbers with a NaN may be a number (see WITHOUT_YNNPACK in compiler.py).
    is_largest = jnp.where(is_nan.any(axis=-1, keepdims=True), is_nan, logits == logits.max(axis=-1, keepdims=True))
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(is_largest, ids, len(ids) - 1).min(axis=-1)


def restrict(logits: Float[Array, "b v"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "b v"]:
    """Logits with -inf wherever top-k, then top-p, leaves a token out.

    Top-p keeps the fewest largest tokens whose probabilities add up to at least `top_p`.

    Example, probabilities [0.5, 0.3, 0.2], top_p=0.6:   the first two stay.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    limit = jnp.where(top_k > 0, top_k, logits.shape[-1])
    within_k = jnp.where(rank < limit, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(within_k, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may bring the sum to 1 before the last token; top_p = 1 keeps them all the same.
    kept = (rank < limit) & ((mass_before < top_p) | (top_p >= 1))
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def logits_of(model: Llava, hidden: Float[Array, "*axes d"]) -> Float[Array, "*axes v"]:
    """What a decoder's hidden states say of the next token, in float32."""
    head = model.decoder.head()
    if model.decoder.is_streamed:
        return multiply(hidden, head.T)
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def _is_stop(token: Int[Array, " b"], stop_ids: tuple[int, ...]) -> Bool[Array, " b"]:
    return jnp.isin(token, jnp.array(stop_ids))


def _until_stop(ids: Int[np.ndarray, " n"], stop_ids: tuple[int, ...]) -> list[int]:
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return [int(i) for i in (ids[: stops[0]] if stops.size else ids)]


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    found = [text.find(word) for word in stop if word in text]
    return (text[: min(found)], True) if found else (text, False)


def _is_closed(ids: list[int], tokenizer: Tokenizer, stop: tuple[str, ...], keywords: Keywords) -> bool:
    return keywords.ends(ids) or (bool(stop) and _cut(tokenizer.decode(ids), stop)[1])


def _answer(processor: Processor, prompt: Prompt, ids: list[int], sampling: Sampling, is_finished: bool) -> Answer:
    keywords = processor.keywords
    text = _cut(processor.tokenizer.decode(ids), (*sampling.stop, *keywords.keywords))[0].strip()
    ids = keywords.before(ids)
    reason = "stop" if is_finished else "length"
    return Answer(text=text, token_ids=ids, prompt_tokens=len(prompt.tokens), finish_reason=reason)
