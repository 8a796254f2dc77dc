"""Answers against transformers' `generate`: time to the first token, and tokens/s after it.

python -m benchmarks.generate                          # about 70M parameters, float32, this CPU
python -m benchmarks.generate --device gpu --size 7b   # LLaVA-1.5-7B's shape, bfloat16, one GPU
"""

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.report import arguments, in_turns, publish, quartiles, rate, ratio

# A system prompt, a picture's features and a short question, as LLaVA-1.5 has them: 46 tokens beside the picture.
TEXT_TOKENS = 46


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], sizes=("small", "7b", "tiny"))
    import numpy as np
    import torch
    import transformers

    from benchmarks import peer
    from llava_jax import generate
    from llava_jax.data.anyres import one_tile
    from llava_jax.data.conversation import IMAGE_TOKEN, Tokenized
    from llava_jax.data.rows import make_example
    from llava_jax.inference.generate import Sampling
    from llava_jax.inference.model import Processor
    from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD

    transformers.logging.set_verbosity_error()
    config = peer.SIZES[chosen.size]
    device = {"cpu": "cpu", "gpu": "cuda"}[chosen.device]
    dtype = {"cpu": torch.float32, "gpu": torch.bfloat16}[chosen.device]
    theirs = peer.make_peer(config, device=device, dtype=dtype)
    ours = peer.our_model(config, theirs)
    processor = Processor(
        tokenizer=_Wordless(),  # pyright: ignore[reportArgumentType]
        template=None,
        image_mode="square",
        image_size=config.vision.image_size,
        num_features=config.num_features,
    )
    new_tokens = {"tiny": 8}.get(chosen.size, 64)
    bandwidth = read_bandwidth(chosen.device)
    rows: list[dict[str, Any]] = []
    for batch in {"cpu": (1, 8), "gpu": (1, 8, 64)}[chosen.device]:
        rng = np.random.default_rng(batch)
        length, side = TEXT_TOKENS + config.num_features, config.vision.image_size
        tokens = rng.integers(3, config.text.vocab_size - 1, (batch, length), dtype=np.int32)
        tokens[:, 0], tokens[:, 36 : 36 + config.num_features] = 1, IMAGE_TOKEN
        pixels = rng.integers(0, 256, (batch, 1, side, side, 3), dtype=np.uint8)
        prompts = [
            make_example(Tokenized(ids, np.zeros(length, bool)), [tile], [one_tile(config.num_features)], side)
            for ids, tile in zip(tokens, pixels, strict=True)
        ]
        normal = (pixels[:, 0] / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
        inputs = {
            "input_ids": torch.tensor(np.where(tokens == IMAGE_TOKEN, peer.image_id(config), tokens).astype(np.int64)),
            "attention_mask": torch.ones((batch, length), dtype=torch.int64),
            "pixel_values": torch.tensor(normal.transpose(0, 3, 1, 2), dtype=dtype),
        }
        inputs = {name: value.to(device) for name, value in inputs.items()}

        def answer(count: int, prompts=prompts) -> list[list[int]]:
            answers = generate(ours, processor, prompts, Sampling(max_new_tokens=count))
            return [answer.token_ids for answer in answers]

        def peer_answer(count: int, options: Any, inputs=inputs, length=length) -> list[list[int]]:
            with torch.inference_mode():
                found = theirs.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
            return found[:, length:].tolist()

        peers: dict[str, dict[str, Any]] = {"transformers": {}}
        if chosen.device == "gpu":
            peers["transformers, compiled"] = {"cache_implementation": "static"}
        if chosen.only_ours:
            peers = {}
        runs = {("ours", count): lambda count=count: answer(count) for count in (1, new_tokens)}
        for name, options in peers.items():
            for count in (1, new_tokens):
                runs[name, count] = lambda count=count, options=options: peer_answer(count, options)
        equal = {
            name: _agreement(answer(new_tokens), peer_answer(new_tokens, options)) for name, options in peers.items()
        }
        seconds = in_turns(runs, repeats=chosen.repeats)
        per_token = decode_bytes(ours.params, config, batch, length + new_tokens // 2, dtype.itemsize)

        def after_first(name: str, seconds=seconds) -> list[float]:
            return [a - b for a, b in zip(seconds[name, new_tokens], seconds[name, 1], strict=True)]

        for name in ("ours", *peers):
            decode = rate(batch * (new_tokens - 1), after_first(name))
            rows.append(
                {
                    "batch": batch,
                    "of": name,
                    "first token, ms": quartiles([1e3 * s for s in seconds[name, 1]]),
                    "decode, tokens/s": decode,
                    "of read bandwidth": f"{decode['median'] / batch * per_token / bandwidth:.0%}",
                    "first token, peer/ours": "" if name == "ours" else ratio(seconds[name, 1], seconds["ours", 1]),
                    "decode, ours/peer": "" if name == "ours" else ratio(after_first(name), after_first("ours")),
                    "same ids": "" if name == "ours" else equal[name],
                }
            )
    notes = {
        "what": f"{sum(v.size for v in ours.params.values()):,} parameters, {dtype}; prompts of "
        f"{TEXT_TOKENS + config.num_features} tokens, one picture each; {new_tokens} new tokens, greedy; "
        f"{chosen.repeats} repeats in turns",
        "read bandwidth": f"{bandwidth / 1e9:.1f} GB/s",
    }
    publish("generate", chosen, rows, notes)


def read_bandwidth(device: str) -> float:
    """Bytes per second of memory: the GPU's data sheet, or what two gigabytes of sums on the CPU show."""
    if device == "gpu":
        import jax

        from llava_jax.chips import KINDS

        return KINDS[jax.devices()[0].device_kind].memory
    import torch

    x = torch.ones(2**26)
    x.sum()
    seconds = []
    for _ in range(8):
        begin = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - begin)
    return 4 * 2**26 / min(seconds)


def decode_bytes(params: Any, config: Any, batch: int, length: int, itemsize: int) -> int:
    """What one step of decoding must read: the decoder's layers, the head, and the keys and values so far."""
    read = ("decoder.layers.", "decoder.norm", "decoder.lm_head")
    weights = sum(value.size for name, value in params.items() if name.startswith(read))
    cache = 2 * batch * length * config.text.num_layers * config.text.num_kv_heads * config.text.head_dim
    return itemsize * (weights + cache)


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many of the greedy ids agree before the first that does not, of all."""
    same = sum(_common(a, b) for a, b in zip(ours, theirs, strict=True))
    return f"{same}/{sum(map(len, theirs))}"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))


class _Wordless:
    """A tokenizer for random weights: no token stops an answer, and no words are made."""

    eos_id = -1

    def token_id(self, text: str) -> int:
        del text
        return self.eos_id

    def decode(self, ids: Sequence[int]) -> str:
        del ids
        return ""


if __name__ == "__main__":
    main()
