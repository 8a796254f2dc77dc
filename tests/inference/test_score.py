"""Log-probabilities: the sum over the answer's own tokens, of a whole forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_jax.data.records import Turn
from llava_jax.data.templates import TEMPLATES, find_template
from llava_jax.errors import UserError
from llava_jax.inference.generate import pad_prompts
from llava_jax.inference.model import Model, Processor, Prompt
from llava_jax.inference.score import score
from llava_jax.models.parameters import bind
from tests.models.oracle import error
from tests.tiny import make_example


def _pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(number)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(number)]


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> list[Prompt]:
    return [
        processor.raw("Is it dark at night?", [], answer=" yes"),
        processor.raw("<image> colour:", _pictures(1), answer=" red and green"),
        processor.answered([Turn("user", "Which <image> or <image>?"), Turn("assistant", "blue")], _pictures(2)),
    ]


def test_a_score_is_the_sum_of_log_softmax_over_the_answer(model: Model, prompts: list[Prompt]):
    @jax.jit
    def logits(params, inputs):
        llava = bind(model.graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape)
        return llava(inputs.tokens, inputs.images, inputs.patch_slots, positions) @ llava.decoder.head()

    values = np.asarray(logits(model.params, pad_prompts(prompts)), np.float64)
    logprobs = values - values.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    for row, (prompt, result) in enumerate(zip(prompts, score(model, prompts), strict=True)):
        at = np.flatnonzero(prompt.is_answer)
        wanted = [logprobs[row, i - 1, prompt.tokens[i]] for i in at]
        assert result.token_ids == prompt.tokens[at].tolist()
        assert error(result.logprobs, wanted) <= 1e-5
        assert result.sum == pytest.approx(sum(wanted), rel=1e-5)
        assert result.sum == pytest.approx(sum(result.logprobs))


def test_a_prompt_scores_in_company_what_it_scores_alone(model: Model, prompts: list[Prompt]):
    (alone,) = score(model, prompts[1:2])
    together = score(model, prompts)[1]
    assert alone.token_ids == together.token_ids
    assert error(alone.logprobs, together.logprobs) <= 1e-6


def test_answer_tokens_start_at_or_after_the_prompts_end(processor: Processor):
    """A token that holds the prompt's last letters and the answer's first is not the answer's."""
    tokenizer = processor.tokenizer
    whole = tokenizer.encode("red and green")
    (joined,) = np.flatnonzero(whole.starts == 3)
    assert tokenizer.decode([int(whole.ids[joined])]).startswith(" a")
    inside = processor.raw("red ", [], answer="and green")
    np.testing.assert_array_equal(inside.tokens[1:], whole.ids)
    np.testing.assert_array_equal(inside.is_answer[1:], whole.starts >= 4)
    assert not inside.is_answer[1 + joined]
    at_edge = processor.raw("red", [], answer=" and green")
    np.testing.assert_array_equal(at_edge.tokens, inside.tokens)
    assert at_edge.is_answer[1 + joined]


def test_the_template_joins_the_answer_and_adds_no_end(processor: Processor):
    prompt = processor.answered([Turn("user", "Sure?"), Turn("assistant", "yes")], [])
    answer = prompt.tokens[prompt.is_answer]
    assert processor.tokenizer.decode(answer.tolist()) == " yes"
    assert processor.tokenizer.eos_id not in prompt.tokens
    opened = processor.ask([Turn("user", "Sure?")], [])
    np.testing.assert_array_equal(prompt.tokens[~prompt.is_answer], opened.tokens)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_adds_to_the_answers_own_words(processor: Processor, name: str):
    """The `[INST]` templates close an answer with a space and `</s>`."""
    processor = dataclasses.replace(processor, template=find_template(name))
    for text in ("yes", "yes ", " yes", "yes.\n", "</s>", "s"):
        prompt = processor.answered([Turn("user", "Sure?"), Turn("assistant", text)], [])
        expected = processor.tokenizer.encode(f" {text}").ids.tolist(), processor.tokenizer.encode(text).ids.tolist()
        assert prompt.tokens[prompt.is_answer].tolist() in expected


def test_of_a_longer_conversation_the_last_answer_alone_is_scored(processor: Processor):
    turns = [Turn("user", "a?"), Turn("assistant", "one"), Turn("user", "b?"), Turn("assistant", "two")]
    prompt = processor.answered(turns, [])
    assert processor.tokenizer.decode(prompt.tokens[prompt.is_answer].tolist()) == " two"


def test_an_empty_answer_is_refused(model: Model, processor: Processor):
    with pytest.raises(UserError, match="at least one token of its own"):
        score(model, [processor.raw("Is it?", [])])
    with pytest.raises(UserError, match="at least one token of its own"):
        score(model, [processor.answered([Turn("user", "Is it?"), Turn("assistant", "")], [])])


def test_an_answer_that_nothing_precedes_is_refused(model: Model):
    """A tokenizer without BOS and an empty prompt: nothing predicts the first token."""
    bare = make_example([5, 6], np.array([True, True]), [])
    with pytest.raises(UserError, match="before"):
        score(model, [bare])


def test_a_prompt_past_the_models_positions_is_refused(model: Model, processor: Processor):
    prompt = processor.raw("no " * 600, [], answer="yes")
    assert len(prompt.tokens) > 512
    with pytest.raises(UserError, match=rf"must fit 512 positions; got {len(prompt.tokens)} tokens\. Shorten either"):
        score(model, [prompt])


def test_no_prompt_no_score(model: Model):
    assert score(model, []) == []


def test_a_score_prints_as_plain_numbers(model: Model, prompts: list[Prompt]):
    (result,) = score(model, prompts[1:2])
    found = dataclasses.asdict(result)
    assert found.keys() == {"logprobs", "token_ids", "sum"}
    assert {type(value) for value in found["logprobs"]} == {float}
    assert {type(value) for value in found["token_ids"]} == {int}
