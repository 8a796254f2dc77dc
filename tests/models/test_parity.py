"""Same numbers as transformers on PyTorch: layer by layer, then logits, losses and gradients, in float32."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from llava_jax.convert.folder import read_parameters
from llava_jax.convert.layouts import from_huggingface
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.inference.generate import Sampling, generate
from llava_jax.inference.model import Model, Processor
from llava_jax.inference.score import score
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import structure
from llava_jax.models.llama import Llama
from llava_jax.models.parameters import GraphDef, bind, parameters, skeleton
from llava_jax.models.projector import Projector
from llava_jax.shapes import LinearScaling, Llama3Scaling, TextConfig
from llava_jax.train.cross_entropy import cross_entropy
from llava_jax.train.objectives import Context, contrastive
from tests.models import oracle
from tests.tiny import CLIP, LLAVA, TEXT, make_example

VALUES = 1e-5
GRADIENTS = 1e-4
PLAIN = Context(attend_xla, unconstrained, None)

# Three tower layers, of which two are read; two decoder layers.
SHORT = dataclasses.replace(LLAVA, text=dataclasses.replace(TEXT, num_layers=2))
FULL = dataclasses.replace(SHORT, select_feature="cls_patch")
# One activation each.
PAIR = dataclasses.replace(CLIP, caption=dataclasses.replace(CLIP.caption, activation="gelu"))
MHA = dataclasses.replace(TEXT, num_kv_heads=4, rope_theta=500_000.0)
# A head wider than width over heads, as some published decoders have.
GQA = dataclasses.replace(TEXT, num_kv_heads=2, head_dim=12, norm_eps=1e-3)
TIED = dataclasses.replace(TEXT, num_kv_heads=1, tie_embeddings=True)
MISTRAL = dataclasses.replace(TEXT, sliding_window=4, rope_theta=1_000_000.0)


STRETCHED = dataclasses.replace(TEXT, rope_scaling=LinearScaling(factor=2.5))
# Of four frequencies, the first turns often enough to stay, the last is slow, and one lies between.
LLAMA3 = dataclasses.replace(
    TEXT,
    rope_scaling=Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=128),
)


def _images(*shape: int, seed: int = 0) -> np.ndarray:
    size = LLAVA.vision.image_size
    return np.random.default_rng(seed).integers(0, 256, (*shape, size, size, 3)).astype(np.uint8)


class ClipPair(NamedTuple):
    theirs: Any
    ours: Any
    images: np.ndarray
    tokens: np.ndarray


@pytest.fixture(scope="module")
def clip() -> ClipPair:
    theirs = oracle.make(transformers.CLIPModel, oracle.clip_config(PAIR), seed=1)
    tokens = np.random.default_rng(0).integers(3, 90, (4, CLIP.caption.context_length))
    # Ends at different places; the last caption goes on after its first end, and none but the first counts.
    for row, end in enumerate((11, 3, 7, 5)):
        tokens[row, end] = CLIP.caption.eos_id
    tokens[3, 9] = CLIP.caption.eos_id
    return ClipPair(theirs, oracle.ours(PAIR, oracle.state(theirs)), _images(4), tokens.astype(np.int32))


def test_every_hidden_state_of_the_tower_is_the_references(clip: ClipPair):
    with torch.no_grad():
        out = clip.theirs.vision_model(oracle.pixels(clip.images), output_hidden_states=True)
    depths = range(CLIP.vision.num_layers + 1)
    assert len(out.hidden_states) == len(depths)
    hidden = jax.jit(lambda images: [clip.ours.tower.hidden(images, depth=depth) for depth in depths])(clip.images)
    for depth in depths:
        assert oracle.error(hidden[depth], out.hidden_states[depth]) <= VALUES, depth
    assert oracle.error(jax.jit(clip.ours.tower.pooled)(clip.images), out.pooler_output) <= VALUES


def test_both_towers_and_the_contrastive_logits_are_the_references(clip: ClipPair):
    with torch.no_grad():
        out = clip.theirs(
            input_ids=torch.tensor(clip.tokens), pixel_values=oracle.pixels(clip.images), return_loss=True
        )
        pooled = clip.theirs.text_model(torch.tensor(clip.tokens)).pooler_output
    assert oracle.error(jax.jit(clip.ours.caption.pooled)(clip.tokens), pooled) <= VALUES
    image, text = jax.jit(clip.ours)(clip.images, clip.tokens)
    assert oracle.error(image, out.image_embeds) <= VALUES
    assert oracle.error(text, out.text_embeds) <= VALUES
    logits = jnp.exp(clip.ours.logit_scale[...]) * image @ text.T
    assert oracle.error(logits, out.logits_per_image) <= VALUES


def test_the_contrastive_loss_is_the_references_and_ignores_rows_that_are_no_pair(clip: ClipPair):
    with torch.no_grad():
        out = clip.theirs(
            input_ids=torch.tensor(clip.tokens[:3]), pixel_values=oracle.pixels(clip.images[:3]), return_loss=True
        )
    batch = {"images": clip.images, "tokens": clip.tokens, "is_pair": np.array([True, True, True, False])}
    sums = jax.jit(lambda batch: contrastive(clip.ours, batch, PLAIN))(batch)
    assert sums.weight == 3
    assert oracle.error(sums.loss / sums.weight, out.loss) <= VALUES


@pytest.mark.parametrize(
    "config",
    [MHA, GQA, TIED, MISTRAL, STRETCHED, LLAMA3],
    ids=["mha", "gqa", "tied", "mistral", "linear scaling", "llama3 scaling"],
)
def test_every_hidden_state_and_the_logits_of_the_decoder_are_the_references(config: TextConfig):
    cls = transformers.LlamaForCausalLM if config.sliding_window is None else transformers.MistralForCausalLM
    theirs = oracle.make(cls, oracle.llama_config(config), seed=2)
    params = {
        name.removeprefix("decoder."): jnp.asarray(value)
        for name, value in from_huggingface(oracle.state(theirs)).items()
    }
    graphdef, expected = skeleton(lambda: Llama(config, stacked=False, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert set(params) == set(expected)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (2, 13)).astype(np.int32)

    @jax.jit
    def run(params, tokens):
        decoder, seen = bind(graphdef, params), []

        def look(x):
            seen.append(x)
            return x

        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = decoder(decoder.embed_tokens(tokens), positions, constrain=look)
        return seen, hidden, hidden @ decoder.head()

    seen, hidden, logits = run(params, tokens)
    with torch.no_grad():
        out = theirs(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
    # Theirs lists the normed state in place of the last layer's own.
    assert len(seen) == config.num_layers + 1 == len(out.hidden_states)
    for depth, (found, wanted) in enumerate(zip([*seen[:-1], hidden], out.hidden_states, strict=True)):
        assert oracle.error(found, wanted.numpy()) <= VALUES, depth
    assert oracle.error(logits, out.logits.numpy()) <= VALUES


@pytest.mark.parametrize("depth", [1, 2, 3], ids=["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_the_projector_is_the_originals(depth: int):
    """`build_vision_projector` of `llava/model/multimodal_projector/builder.py`, with the original's key names."""
    torch.manual_seed(depth)
    layers: list[torch.nn.Module] = [torch.nn.Linear(6, 10)]
    for _ in range(1, depth):
        layers += [torch.nn.GELU(), torch.nn.Linear(10, 10)]
    theirs = layers[0] if depth == 1 else torch.nn.Sequential(*layers)
    tensors = {f"model.mm_projector.{name}": value.numpy() for name, value in theirs.state_dict().items()}
    params = {n.removeprefix("projector."): jnp.asarray(v) for n, v in from_huggingface(tensors).items()}
    graphdef, expected = skeleton(lambda: Projector(6, 10, depth, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert set(params) == set(expected)
    features = np.random.default_rng(0).standard_normal((2, 5, 6), np.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(features)).numpy()
    assert oracle.error(bind(graphdef, params)(jnp.asarray(features)), wanted) <= VALUES


class LlavaPair(NamedTuple):
    theirs: Any
    graphdef: GraphDef
    params: dict[str, jax.Array]
    batch: dict[str, np.ndarray]
    ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor


@pytest.fixture(scope="module", params=[SHORT, FULL], ids=["default", "full"])
def llava(request: pytest.FixtureRequest) -> LlavaPair:
    """Two rows: text, one picture, text; and picture, text, picture, text."""
    config = request.param
    theirs = oracle.make(transformers.LlavaForConditionalGeneration, oracle.llava_config(config), seed=4)
    params = oracle.ours(config, oracle.state(theirs))
    p, length = config.num_features, 44
    ids = np.random.default_rng(5).integers(3, oracle.IMAGE_ID, (2, length))
    slots = np.arange(length, length + 4 * p, dtype=np.int32).reshape(2, 2, p)
    for row, tile, start in ((0, 0, 6), (1, 0, 1), (1, 1, p + 3)):
        ids[row, start : start + p] = oracle.IMAGE_ID
        slots[row, tile] = np.arange(start, start + p)
    labels = np.where((ids == oracle.IMAGE_ID) | (np.arange(length) < 12), -100, ids)
    images = _images(2, 2, seed=6)
    following = np.concatenate([labels[:, 1:], np.full((2, 1), -100)], axis=1)
    batch = {
        "tokens": np.where(ids == oracle.IMAGE_ID, 0, ids).astype(np.int32),
        "images": images,
        "patch_slots": slots,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (2, length)),
        "segment_ids": np.ones((2, length), np.int32),
        "targets": np.maximum(following, 0).astype(np.int32),
        "is_target": following >= 0,
    }
    shown = np.stack([images[0, 0], images[1, 0], images[1, 1]])
    return LlavaPair(
        theirs,
        structure(config)[0],
        parameters(params),
        batch,
        torch.tensor(ids),
        torch.tensor(labels),
        oracle.pixels(shown),
    )


def test_logits_loss_and_gradients_of_the_whole_llava_are_the_references(llava: LlavaPair):
    llava.theirs.zero_grad()
    out = llava.theirs(input_ids=llava.ids, pixel_values=llava.pixels, labels=llava.labels)
    out.loss.backward()
    gradients = {name: value.grad.numpy() for name, value in llava.theirs.named_parameters() if value.grad is not None}
    wanted = from_huggingface(gradients)

    @jax.jit
    def run(params, batch):
        def total(params):
            model = bind(llava.graphdef, params)
            hidden = model(*(batch[n] for n in ("tokens", "images", "patch_slots", "positions", "segment_ids")))
            loss, _ = cross_entropy(hidden, model.decoder.head(), batch["targets"], batch["is_target"])
            return loss / batch["is_target"].sum(), hidden @ model.decoder.head()

        return jax.value_and_grad(total, has_aux=True)(params)

    (loss, logits), found = run(llava.params, llava.batch)
    assert oracle.error(logits, out.logits.detach().numpy()) <= VALUES
    assert oracle.error(loss, out.loss.detach().numpy()) <= VALUES
    # Every part, the tower up to the selected layer included; what theirs leaves without a gradient has none here.
    assert {name.split(".")[0] for name in wanted} == {"tower", "projector", "decoder"}
    for name, value in found.items():
        if name.endswith("k_proj.bias") and name in wanted:
            # A shift of all scores changes nothing: the derivative is zero but for rounding, on both sides.
            assert np.abs(value).max() <= GRADIENTS * np.abs(found[name.replace("k_proj", "q_proj")]).max()
        elif name in wanted:
            assert oracle.error(value, wanted[name]) <= GRADIENTS, name
        else:
            assert name.startswith(("tower.layers.2.", "tower.post_layernorm."))
            assert not np.asarray(value).any()


@pytest.mark.parametrize("llava", [SHORT], indirect=True, ids=["default"])
def test_greedy_answers_and_scores_are_the_references(llava: LlavaPair, data: Path):
    model = Model(config=SHORT, graphdef=llava.graphdef, params=llava.params)
    processor = Processor(
        tokenizer=open_tokenizer(str(data / "tokenizer")),
        template=None,
        image_mode="square",
        image_size=16,
        num_features=16,
    )
    ids = llava.ids.numpy()
    tokens = np.where(ids == oracle.IMAGE_ID, IMAGE_TOKEN, ids).astype(np.int32)
    is_answer = np.arange(tokens.shape[1]) >= 40
    prompts = [
        make_example(tokens[row].tolist(), is_answer, list(llava.batch["images"][row, : row + 1])) for row in range(2)
    ]
    with torch.no_grad():
        out = llava.theirs.generate(
            input_ids=llava.ids,
            attention_mask=torch.ones_like(llava.ids),
            pixel_values=llava.pixels,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=2,
            pad_token_id=2,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = llava.theirs(input_ids=llava.ids, pixel_values=llava.pixels).logits
    best = torch.stack(out.logits).topk(2, dim=-1).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4, "a draw decides nothing; take another seed"
    answers = generate(model, processor, prompts, Sampling(max_new_tokens=8))
    for row, answer in enumerate(answers):
        assert answer.token_ids == [int(i) for i in out.sequences[row, tokens.shape[1] :] if i != 2]
    logprobs = torch.log_softmax(logits, dim=-1)
    for row, result in enumerate(score(model, prompts)):
        at = np.flatnonzero(is_answer)
        wanted = [float(logprobs[row, i - 1, ids[row, i]]) for i in at]
        assert result.token_ids == ids[row, at].tolist()
        assert oracle.error(result.logprobs, wanted) <= VALUES
        assert oracle.error(result.sum, sum(wanted)) <= VALUES


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_a_folder_that_transformers_saved_is_read_whole_and_exactly(tmp_path: Path, dtype: torch.dtype):
    theirs = oracle.make(transformers.LlavaForConditionalGeneration, oracle.llava_config(LLAVA), seed=7).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    found = read_parameters(str(tmp_path))
    wanted = from_huggingface({name: value.float().numpy() for name, value in theirs.state_dict().items()})
    assert set(found) == set(wanted) == set(structure(LLAVA)[1])
    for name, value in found.items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), wanted[name])


def test_clip_folders_that_transformers_saved_are_read_whole(tmp_path: Path):
    theirs = oracle.make(transformers.CLIPModel, oracle.clip_config(CLIP), seed=8)
    theirs.save_pretrained(tmp_path / "clip")
    assert set(read_parameters(str(tmp_path / "clip"))) == set(structure(CLIP)[1])
    tower = oracle.make(transformers.CLIPVisionModel, oracle.clip_config(CLIP).vision_config, seed=8)
    tower.save_pretrained(tmp_path / "tower")
    assert set(read_parameters(str(tmp_path / "tower"))) == {n for n in structure(CLIP)[1] if n.startswith("tower.")}
