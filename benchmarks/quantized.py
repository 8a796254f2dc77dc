"""Weights held in fewer bits: bytes, peak memory of the process, and what changes in the logits, against float32.

python -m benchmarks.quantized                                  # about 70M random parameters
python -m benchmarks.quantized --model runs/quickstart/model    # and a trained model, on easy-vqa's test questions

Every row is a process of its own, which loads the model as `generate` does and reads the memory that it took.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import arguments, publish

HELD = ("float32", "bfloat16", "int8", "nf4")
QUESTIONS, BATCH = 512, 32


def main() -> None:
    chosen = arguments(
        (__doc__ or "").splitlines()[0],
        sizes=("small", "tiny"),
        model="a trained model folder of the quickstart, measured too",
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_random(folder / "random", chosen.size)
        for name, model in {"random": str(folder / "random"), "trained": chosen.model}.items():
            if model is not None:
                rows += compare(name, {held: in_process(model, held, folder) for held in HELD})
    notes = {
        "logits": f"those that predict an answer's tokens, teacher forced; of the trained model's over the first "
        f"{QUESTIONS} test questions with their pictures, of the random one's over random tokens after a picture",
        "peak": "VmHWM of the process after loading and one forward pass over all prompts; before: when JAX was up",
    }
    publish("quantized", chosen, rows, notes)


def compare(name: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every way to hold a model; errors are of logits with float32's as the truth."""
    exact = found["float32"]["logits"].astype(np.float64)
    rows = []
    for held, one in found.items():
        logits = one["logits"].astype(np.float64)
        expected, got = _log_softmax(exact), _log_softmax(logits)
        rows.append(
            {
                "model": name,
                "held": held,
                "parameters, MB": one["bytes"] / 1e6,
                "of those the decoder's layers": one["layer_bytes"] / 1e6,
                "before, MB": one["before"] / 1e6,
                "peak, MB": one["peak"] / 1e6,
                "logits, std": float(exact.std()),
                "max error": float(np.abs(logits - exact).max()),
                "mean error": float(np.abs(logits - exact).mean()),
                "KL, nats": float((np.exp(expected) * (expected - got)).sum(axis=-1).mean()),
                "same greedy token": f"{(logits.argmax(-1) == exact.argmax(-1)).mean():.2%}",
            }
        )
    return rows


def in_process(model: str, held: str, folder: Path) -> dict[str, Any]:
    """What `measure` finds in a fresh process."""
    out = folder / "logits.npy"
    code = "import sys; from benchmarks.quantized import measure; measure(*sys.argv[1:])"
    command = [sys.executable, "-c", code, model, held, str(out)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {**json.loads(told.splitlines()[-1]), "logits": np.load(out)}


def measure(path: str, held: str, out: str) -> None:
    """Loads a model, writes its logits to `out`, and prints bytes and memory."""
    import jax
    import jax.numpy as jnp

    from llava_jax.data import easy_vqa
    from llava_jax.data.records import Turn
    from llava_jax.inference.generate import pad_prompts
    from llava_jax.inference.model import load, read_images
    from llava_jax.models.parameters import bind

    jnp.zeros(1).block_until_ready()
    before = _memory("VmRSS")
    settings: Any = {"quantize": held} if held in ("int8", "nf4") else {"dtype": jnp.dtype(held)}
    model, processor = load(path, **settings)
    sizes = {name: value.nbytes for name, value in model.params.items()}

    @jax.jit
    def forward(params: Any, inputs: Any) -> Any:
        bound = bind(model.graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1]), inputs.tokens.shape)
        hidden = bound(inputs.tokens, inputs.images, inputs.patch_slots, positions, is_newline=inputs.is_newline)
        return jnp.einsum("btd,dv->btv", hidden, bound.decoder.head(), preferred_element_type=jnp.float32)

    if processor.template is None:
        prompts = _random_prompts(processor, model.config.text.vocab_size)
    else:
        prompts = []
        for question in easy_vqa.questions("test")[:QUESTIONS]:
            picture = easy_vqa.picture_folder() / easy_vqa.picture_name("test", question.picture)
            turns = [Turn("user", question.text), Turn("assistant", question.answer)]
            prompts.append(processor.answered(turns, read_images([str(picture)])))
    found = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        logits = np.asarray(forward(model.params, pad_prompts(batch)))
        found += [logits[row, np.flatnonzero(prompt.is_answer) - 1] for row, prompt in enumerate(batch)]
    np.save(out, np.concatenate(found))
    layers = sum(size for name, size in sizes.items() if name.startswith("decoder.layers."))
    facts = {"bytes": sum(sizes.values()), "layer_bytes": layers, "before": before, "peak": _memory("VmHWM")}
    print(json.dumps(facts))


def make_random(folder: Path, size: str) -> None:
    """A model folder of random weights, of the scales of `benchmarks/peer.py`, whose answers vary."""
    from benchmarks import peer
    from llava_jax.convert.card import ModelCard
    from llava_jax.convert.folder import write_model_folder
    from llava_jax.data.generated import temporary_data
    from llava_jax.models.build import structure

    config = peer.SIZES[size]
    rng = np.random.default_rng(0)
    params = {}
    for name, value in structure(config)[1].items():
        scale = 1.0 if name.endswith("embedding") or len(value.shape) < 2 else value.shape[0] ** -0.5
        drawn = np.ones(value.shape) if name.endswith("scale") else scale * rng.standard_normal(value.shape)
        params[name] = drawn.astype(np.float32)
    data = temporary_data(num_records=4, image_size=config.vision.image_size, seed=0)
    card = ModelCard(model=config, template=None, image_mode="square", label="random")
    write_model_folder(str(folder), card, params, tokenizer=str(data / "tokenizer"), source="random")


def _random_prompts(processor: Any, vocab_size: int) -> list[Any]:
    from llava_jax.data.anyres import one_tile
    from llava_jax.data.conversation import IMAGE_TOKEN, Tokenized
    from llava_jax.data.rows import make_example

    rng = np.random.default_rng(1)
    prompts = []
    for _ in range(8):
        words = rng.integers(3, vocab_size, 96)
        tokens = np.concatenate([words[:8], np.full(processor.num_features, IMAGE_TOKEN), words[8:]]).astype(np.int32)
        is_answer = np.arange(len(tokens)) >= 8 + processor.num_features
        tile = rng.integers(0, 256, (1, processor.image_size, processor.image_size, 3), dtype=np.uint8)
        text, layout = Tokenized(tokens, is_answer), one_tile(processor.num_features)
        prompts.append(make_example(text, [tile], [layout], processor.image_size))
    return prompts


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _memory(field: str) -> int:
    """Bytes that Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
