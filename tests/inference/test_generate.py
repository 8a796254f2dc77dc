"""Answers: the same alone and in company, cached and computed anew, streamed and whole."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TopKLogitsWarper, TopPLogitsWarper

from llava_jax.compiler import compiler_options
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.templates import PLAIN, TEMPLATES
from llava_jax.errors import UserError
from llava_jax.inference import generate as module
from llava_jax.inference.generate import Answer, Sampling, generate, pad_prompts, restrict, sample, stream
from llava_jax.inference.model import Model, Processor, Prompt
from llava_jax.models.build import structure
from llava_jax.models.llama import NOWHERE, empty_cache
from llava_jax.models.parameters import bind
from tests.models.oracle import error
from tests.tiny import LLAVA, make_example

MINUS_INFINITY = -np.inf


def _pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(number)]


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> list[Prompt]:
    """No, one and two pictures; the last prompt is so long that the batch is padded further than the others alone."""
    return [
        processor.raw("Is it dark?", []),
        processor.raw("Which <image> colour is it, red?", _pictures(1)),
        processor.raw("Compare <image> with <image>." + " yes or no and why is it so" * 4, _pictures(2)),
    ]


@pytest.fixture(scope="module")
def greedy(model: Model, processor: Processor, prompts: list[Prompt]) -> list[Answer]:
    return generate(model, processor, prompts, Sampling(max_new_tokens=24))


def test_the_batch_is_ragged(prompts: list[Prompt]):
    lengths = [len(prompt.tokens) for prompt in prompts]
    assert len(set(lengths)) == 3
    assert module.padded(max(lengths)) > module.padded(min(lengths))
    assert [len(prompt.images) for prompt in prompts] == [0, 1, 2]


def test_a_prompt_gets_in_company_what_it_gets_alone(
    model: Model, processor: Processor, prompts: list[Prompt], greedy: list[Answer]
):
    assert len({tuple(answer.token_ids) for answer in greedy}) == 3
    for prompt, together in zip(prompts, greedy, strict=True):
        (alone,) = generate(model, processor, [prompt], Sampling(max_new_tokens=24))
        assert alone == together


def test_a_sampled_answer_depends_on_its_own_seed_alone(model: Model, processor: Processor, prompts: list[Prompt]):
    sampling = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.95, top_k=50)
    together = generate(model, processor, prompts, sampling, seeds=[7, 8, 9])
    (alone,) = generate(model, processor, [prompts[1]], sampling, seeds=[8])
    assert alone == together[1]
    turned = generate(model, processor, prompts[::-1], sampling, seeds=[9, 8, 7])
    assert turned[::-1] == together
    others = generate(model, processor, prompts, sampling, seeds=[70, 8, 90])
    assert others[1] == together[1]
    assert others[0] != together[0]
    assert others[2] != together[2]


def test_the_cache_gives_what_computing_everything_anew_does(model: Model, prompts: list[Prompt], greedy: list[Answer]):
    """Teacher-forced on the whole answer, every token is the largest logit of a forward pass without a cache."""
    inputs = pad_prompts(prompts)
    tokens = np.pad(inputs.tokens, ((0, 0), (0, 24)))
    slots = np.asarray(inputs.patch_slots)
    # What lands nowhere does so past the end.
    slots = np.where(slots < inputs.tokens.shape[1], slots, slots + 24)
    for row, (prompt, answer) in enumerate(zip(prompts, greedy, strict=True)):
        start = len(prompt.tokens)
        tokens[row, start : start + len(answer.token_ids)] = answer.token_ids

    @jax.jit
    def logits(params, inputs):
        llava = bind(model.graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape)
        return llava(inputs.tokens, inputs.images, inputs.patch_slots, positions) @ llava.decoder.head()

    inputs = inputs._replace(tokens=jnp.asarray(tokens), patch_slots=jnp.asarray(slots))
    best = np.asarray(logits(model.params, inputs).argmax(-1))
    for row, (prompt, answer) in enumerate(zip(prompts, greedy, strict=True)):
        start = len(prompt.tokens) - 1
        assert best[row, start : start + len(answer.token_ids)].tolist() == answer.token_ids
        assert len(answer.token_ids) == 24 or answer.finish_reason == "stop"


def test_counts_and_reasons(greedy: list[Answer], prompts: list[Prompt]):
    assert dataclasses.asdict(greedy[0]).keys() == {"text", "token_ids", "prompt_tokens", "finish_reason"}
    assert [answer.prompt_tokens for answer in greedy] == [len(prompt.tokens) for prompt in prompts]
    for answer in greedy:
        assert 2 not in answer.token_ids
        assert len(answer.token_ids) <= 24


def test_no_prompt_no_answer(model: Model, processor: Processor):
    assert generate(model, processor, [], Sampling()) == []


Says = Callable[[str], Model]


@pytest.mark.parametrize(("limit", "expected", "reason"), [(1, "q", "length"), (2, "qz", "length"), (9, "qz", "stop")])
def test_an_answer_ends_at_its_end_or_its_limit(
    says: Says, processor: Processor, limit: int, expected: str, reason: str
):
    told = says("qz")
    ids = processor.tokenizer.encode("qz").ids.tolist()
    assert len(ids) == 2
    (answer,) = generate(told, processor, [processor.raw("?", [])], Sampling(max_new_tokens=limit))
    assert answer.token_ids == ids[:limit]
    assert answer.finish_reason == reason
    assert answer.text == expected


def _streamed(model: Model, processor: Processor, sampling: Sampling) -> tuple[list[str], Answer]:
    *pieces, answer = stream(model, processor, processor.raw("?", []), sampling)
    assert isinstance(answer, Answer)
    assert all(isinstance(piece, str) and piece for piece in pieces)
    return pieces, answer


@pytest.mark.parametrize("text", ["it glows", " it glows", "\u00e9", " a\U0001f642b", "ab\n"])
def test_the_pieces_of_a_stream_are_the_answer(says: Says, processor: Processor, text: str):
    """A letter of several bytes comes in one piece."""
    pieces, answer = _streamed(says(text), processor, Sampling(max_new_tokens=30))
    assert answer.text == text.strip()
    assert "".join(pieces) == answer.text
    assert not any("\ufffd" in piece for piece in pieces)
    (whole,) = generate(says(text), processor, [processor.raw("?", [])], Sampling(max_new_tokens=30))
    assert whole == answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("upENDnow", "up"),
        (" upENDnow", "up"),
        ("upEN", "upEN"),
        (" upEN", "upEN"),
        ("END", ""),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_never_shown(says: Says, processor: Processor, text: str, expected: str):
    """The start of a stop string that does not come is part of the answer."""
    sampling = Sampling(max_new_tokens=30, stop=("END",))
    pieces, answer = _streamed(says(text), processor, sampling)
    assert answer.text == expected
    assert answer.finish_reason == "stop"
    assert "".join(pieces).strip() == expected


def test_the_first_of_several_stop_strings_counts(says: Says, processor: Processor):
    (answer,) = generate(
        says("abc,de;x"), processor, [processor.raw("?", [])], Sampling(max_new_tokens=30, stop=(";", ","))
    )
    assert answer.text == "abc"


def test_token_ids_end_with_the_stop_string_streamed_or_not(says: Says, processor: Processor):
    told = says("upENDnow")
    sampling = Sampling(max_new_tokens=30, stop=("END",))
    _, streamed = _streamed(told, processor, sampling)
    (whole,) = generate(told, processor, [processor.raw("?", [])], sampling)
    assert processor.tokenizer.decode(streamed.token_ids) == "upEND"
    assert whole == streamed


@pytest.mark.parametrize("end", ["\n", "#;"])
def test_an_answer_ends_where_its_template_closes_it(says: Says, processor: Processor, end: str):
    """The `###` of some templates is no token, and a model trained on them never says EOS."""
    processor = dataclasses.replace(processor, template=dataclasses.replace(PLAIN, ends=("", end)))
    model, prompt = says(f"ye{end}so"), processor.raw("?", [])
    sampling = Sampling(max_new_tokens=30)
    (answer,) = generate(model, processor, [prompt], sampling)
    assert (answer.text, answer.finish_reason) == ("ye", "stop")
    assert processor.tokenizer.decode(answer.token_ids) == "ye"
    *pieces, streamed = stream(model, processor, prompt, sampling)
    assert ("".join(map(str, pieces)), streamed) == ("ye", answer)
    raw = dataclasses.replace(processor, template=None)
    assert generate(model, raw, [prompt], sampling)[0].text == f"ye{end}so"


def test_only_ends_that_are_no_eos_are_looked_for(processor: Processor):
    assert processor.keywords.keywords == ()
    hashes = dataclasses.replace(processor, template=TEMPLATES["llava_v0"])
    assert hashes.keywords.keywords == ("###",)


def test_a_row_that_stopped_does_not_stop_the_others(model: Model, processor: Processor, prompts: list[Prompt]):
    """A stop string cut from one row's answer ends that row; the others go on as they would alone."""
    plain = generate(model, processor, prompts[:2], Sampling(max_new_tokens=24))
    pairs = (processor.tokenizer.decode(plain[0].token_ids[i : i + 2]).strip() for i in range(2, 20))
    word = next(word for word in pairs if word and word in plain[0].text and word not in plain[1].text)
    stopped = generate(model, processor, prompts[:2], Sampling(max_new_tokens=24, stop=(word,)))
    assert word not in stopped[0].text
    assert stopped[0].finish_reason == "stop"
    assert stopped[1] == plain[1]


def test_few_lengths_serve_all_and_padding_is_an_eighth_at_most():
    lengths = range(1, 4097)
    assert all(0 <= module.padded(n) - n <= max(15, n / 8) for n in lengths)
    assert len({module.padded(n) for n in lengths}) == 8 + 5 * 8


def test_padding_is_on_the_right_and_missing_pictures_land_nowhere(prompts: list[Prompt]):
    inputs = pad_prompts(prompts)
    b, t = inputs.tokens.shape
    assert (b, t) == (3, module.padded(max(len(prompt.tokens) for prompt in prompts)))
    assert inputs.lengths.tolist() == [len(prompt.tokens) for prompt in prompts]
    assert inputs.images.shape == (3, 2, 8, 8, 3)
    assert (np.asarray(inputs.tokens) >= 0).all()
    slots = np.asarray(inputs.patch_slots)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(
            slots[row, : len(prompt.images)].ravel(), np.flatnonzero(prompt.tokens == IMAGE_TOKEN)
        )
        assert (slots[row, len(prompt.images) :] >= t).all()
        assert len(set(slots[row].ravel().tolist())) == slots[row].size


def _restrict(logits: list[float], *, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    return restrict(jnp.array([logits], jnp.float32), jnp.int32(top_k), jnp.float32(top_p))[0].tolist()


def test_the_example_of_restrict_holds():
    logits = np.log([0.5, 0.3, 0.2]).astype(np.float32).tolist()
    assert _restrict(logits, top_p=0.6) == [*logits[:2], MINUS_INFINITY]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 0.45, [1]),
        (0, 0.55, [0, 1]),
        (0, 1e-9, [1]),
        (1, 1.0, [1]),
        (2, 1.0, [0, 1]),
        (9, 1.0, [0, 1, 2, 3]),
        # Of the two that top-k leaves, the first has 0.5 / 0.8 of the mass.
        (2, 0.6, [1]),
        (2, 0.65, [0, 1]),
    ],
)
def test_top_k_then_top_p_by_hand(top_k: int, top_p: float, kept: list[int]):
    logits = np.log([0.3, 0.5, 0.05, 0.15]).astype(np.float32).tolist()
    found = _restrict(logits, top_k=top_k, top_p=top_p)
    assert found == [value if i in kept else MINUS_INFINITY for i, value in enumerate(logits)]


@pytest.mark.parametrize("logits", [[1.0, 2.0, 3.0], [0.0, 30.0, -30.0], [100.0, 0.0, -100.0], [5.0, 5.0, 5.0]])
def test_top_p_one_and_top_k_zero_keep_every_token(logits: list[float]):
    assert _restrict(logits) == logits


@pytest.mark.parametrize("top_k", [0, 1, 7, 99])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_restrict_is_the_references(top_k: int, top_p: float):
    logits = np.random.default_rng(0).standard_normal((5, 99), np.float32) * 3
    wanted = torch.tensor(logits)
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    wanted = TopPLogitsWarper(top_p)(None, wanted).numpy()
    np.testing.assert_array_equal(restrict(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)), wanted)


def test_draws_follow_the_restricted_probabilities():
    number = 20_000
    logits = jnp.tile(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (number, 1))
    seeds = jnp.arange(number, dtype=jnp.uint32)
    choose = module._Choice(jnp.float32(1.0), jnp.float32(1.0), jnp.int32(3), seeds)
    drawn = np.bincount(np.asarray(sample(logits, choose, jnp.int32(0), is_greedy=False)), minlength=4) / number
    expected = np.array([4, 3, 2, 0]) / 9
    assert drawn[3] == 0
    # Five standard deviations of a share of 4/9 among 20,000.
    np.testing.assert_allclose(drawn, expected, atol=5 * (0.25 / number) ** 0.5)


def test_a_cold_sample_is_greedy(model: Model, processor: Processor, prompts: list[Prompt], greedy: list[Answer]):
    cold = generate(model, processor, prompts, Sampling(max_new_tokens=24, temperature=1e-4), seeds=[1, 2, 3])
    assert cold == greedy
    only = generate(model, processor, prompts, Sampling(max_new_tokens=24, temperature=1.0, top_k=1), seeds=[1, 2, 3])
    assert only == greedy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or positive and finite; got -0.5"),
        ({"temperature": float("nan")}, "temperature must be .*; got nan"),
        ({"temperature": float("inf")}, "temperature must be .*; got inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or positive, below 2\*\*31; got -1"),
        ({"top_k": 2**31}, r"top_k must be .*; got 2147483648"),
    ],
)
def test_sampling_refuses_what_means_nothing(fields: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        Sampling(**fields)


def test_an_empty_stop_string_is_refused():
    """It would be found in every text and end every answer before its first letter."""
    with pytest.raises(UserError, match="stop"):
        Sampling(stop=("",))


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(model: Model, processor: Processor):
    prompt = processor.raw("?", [])
    room = model.config.text.max_positions - len(prompt.tokens)
    message = (
        f"must fit 512 positions; the longest prompt has {len(prompt.tokens)} tokens and max_new_tokens is {room + 1}"
    )
    with pytest.raises(UserError, match=message):
        generate(model, processor, [prompt], Sampling(max_new_tokens=room + 1))
    with pytest.raises(UserError, match=r"Shorten either\."):
        list(stream(model, processor, prompt, Sampling(max_new_tokens=room + 1)))


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3, 4], [-1, 0, 0], [2**32, 0, 0]])
def test_seeds_that_do_not_fit_are_refused(model: Model, processor: Processor, prompts: list[Prompt], seeds: list[int]):
    with pytest.raises(UserError, match="seed"):
        generate(model, processor, prompts, Sampling(max_new_tokens=1, temperature=1.0), seeds=seeds)


def test_a_prompt_without_a_token_is_refused(model: Model, processor: Processor):
    nothing = make_example([], np.zeros(0, bool), [])
    with pytest.raises(UserError, match="token"):
        generate(model, processor, [nothing], Sampling(max_new_tokens=1))


def test_logits_of_a_cached_step_are_those_of_a_whole_forward(
    model: Model, prompts: list[Prompt], greedy: list[Answer]
):
    """Prefill all but the last two tokens of the answer, extend by one, and compare with the sequence at once."""
    prompt, answer = prompts[2], greedy[2]
    ids = np.concatenate([prompt.tokens, np.array(answer.token_ids, np.int32)])
    whole = prompt._replace(tokens=ids.astype(np.int32), is_newline=np.zeros(len(ids), bool))
    inputs = pad_prompts([whole])
    length = inputs.tokens.shape[1]

    @jax.jit
    def both(params, inputs, at):
        llava = bind(model.graphdef, params)
        positions = jnp.arange(length)[None]
        x = llava.embed(inputs.tokens, inputs.images, inputs.patch_slots)
        full = llava.decoder(x, positions) @ llava.decoder.head()
        cache = empty_cache(model.config.text, batch=1, length=length + 2, dtype=x.dtype)
        # What comes at `at` and after is garbage that no query may see.
        is_prompt = positions < at
        garbage = jnp.where(is_prompt[..., None], x, 50.0)
        _, cache = llava.decoder.extend(garbage, jnp.where(is_prompt, positions, NOWHERE), cache)
        steps = []
        for step in range(2):
            new = jax.lax.dynamic_slice_in_dim(x, at + step, 1, axis=1)
            hidden, cache = llava.decoder.extend(new, (at + step)[None, None], cache)
            steps.append(hidden[0, 0] @ llava.decoder.head())
        return full[0], jnp.stack(steps)

    at = len(ids) - 2
    full, steps = both(model.params, inputs, jnp.int32(at))
    assert error(steps, full[at : at + 2]) <= 1e-5


def test_greedy_takes_the_first_of_the_largest_as_argmax_does():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, 1001)).astype(np.float32)
    logits[1, [7, 3, 999]] = 9.0
    logits[2], logits[3], logits[4] = -np.inf, 0.0, np.nan
    logits[5, 5] = np.inf
    logits[6, [8, 400]] = np.nan
    logits[7, 2], logits[7, 9] = np.inf, np.nan
    logits[8] = -np.abs(logits[8])
    logits[8, [20, 30]] = -0.0, 0.0
    for options in (compiler_options(jax.devices()[0], in_any_order=True), None):
        found = jax.jit(module._largest, compiler_options=options)(logits)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))


def test_answers_and_streams_that_end_in_the_same_16_slots_share_a_compilation(
    model: Model, processor: Processor, prompts: list[Prompt]
):
    advance = module._programs(jax.devices()[0]).advance
    # Other tests may have compiled any of them.
    advance.clear_cache()
    generate(model, processor, prompts[:1], Sampling(max_new_tokens=32))
    generate(model, processor, prompts[:1], Sampling(max_new_tokens=17))
    list(stream(model, processor, prompts[0], Sampling(max_new_tokens=20)))
    assert advance._cache_size() == 1
    # This one ends in the 16 slots before, so its steps read no more.
    generate(model, processor, prompts[:1], Sampling(max_new_tokens=16))
    assert advance._cache_size() == 2


@pytest.mark.nightly
def test_decoding_on_a_tpu_copies_no_cache(tpu: Any):
    """Nor before and after its tokens: what it needs beside arguments and results is less than a layer's keys."""
    text = dataclasses.replace(LLAVA.text, embed_dim=1024, hidden_dim=2048, num_heads=32, num_kv_heads=32, head_dim=128)
    graphdef, params = structure(dataclasses.replace(LLAVA, text=text), stacked=False)
    here, rows = jax.sharding.SingleDeviceSharding(tpu), jax.ShapeDtypeStruct((8,), jnp.int32)
    cache = jax.eval_shape(lambda: empty_cache(text, batch=8, length=1152, dtype=jnp.bfloat16))
    one, real = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    state = module.State(cache, rows, rows, one, jax.ShapeDtypeStruct((8,), jnp.bool))
    choose = module._Choice(real, real, one, jax.ShapeDtypeStruct((8,), jnp.uint32))
    params = {name: jax.ShapeDtypeStruct(value.shape, jnp.bfloat16) for name, value in params.items()}
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (params, state, choose, one))
    advance = module._programs(tpu).advance
    program = advance.lower(*placed, graphdef=graphdef, is_greedy=True, stop_ids=(2,)).compile()
    assert program.memory_analysis().temp_size_in_bytes < cache.layers[0].k.size * 2
