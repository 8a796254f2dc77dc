"""Answers against transformers' `generate`: time to the first token, and tokens/s after it; ours in fewer bits, too.

python -m benchmarks.generate                          # about 70M parameters, float32, this CPU
python -m benchmarks.generate --device gpu --size 7b   # LLaVA-1.5-7B's shape, bfloat16, one GPU
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.apart import Answer, Calls, apart
from benchmarks.report import arguments, in_turns, publish, quartiles, rate, ratio

# A system prompt, a picture's features and a short question, as LLaVA-1.5 has them: 46 tokens beside the picture.
TEXT_TOKENS = 46
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
BATCHES = {"cpu": (1, 8), "gpu": (1, 8, 64)}
# By the name of the row: how ours holds the decoder's linear layers, how transformers generates.
OURS = {"ours": None, "ours, int8": "int8", "ours, nf4": "nf4"}
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    # The peer as its users start it, and with the heap that `llava-jax generate` starts itself with.
    "cpu": {"transformers": {}, "transformers, our heap": {}},
    "gpu": {"transformers": {}, "transformers, compiled": {"cache_implementation": "static"}},
}


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], sizes=("small", "7b", "tiny"))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Without it JAX takes three quarters of a GPU, however it allocates.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    makers = dict.fromkeys(OURS, our_calls) | dict.fromkeys(
        [] if chosen.only_ours else PEERS[chosen.device], peer_calls
    )
    # One that you have exported would reach the peer as well.
    os.environ.pop("GLIBC_TUNABLES", None)
    seen = Seen({}, {}, {})
    # On a GPU they do not fit together: one after the other.
    for names in [list(makers)] if chosen.device == "cpu" else [[name] for name in makers]:
        with contextlib.ExitStack() as stack:
            asked = {
                name: stack.enter_context(apart(makers[name], chosen, name, environment=started(chosen, name)))
                for name in names
            }
            measure(chosen, asked, seen)
        # As soon as one is done: what comes after it may find no room, or no time.
        report(chosen, seen)


def started(chosen: Any, name: str) -> Mapping[str, str]:
    """What the environment of a row's process has besides."""
    from llava_jax.heap import HEAP

    has_heap = chosen.device == "cpu" and (name in OURS or name.endswith("our heap"))
    return {"GLIBC_TUNABLES": HEAP} if has_heap else {}


class Seen(NamedTuple):
    """By row and batch: seconds of the first token and of all, and ids; by row of ours: what it is, bytes it reads."""

    seconds: dict[tuple[str, int], tuple[list[float], list[float]]]
    answers: dict[tuple[str, int], list[list[int]]]
    facts: dict[str, tuple[str, dict[int, int]]]

    def after_first(self, name: str, batch: int) -> list[float]:
        return [whole - first for first, whole in zip(*self.seconds[name, batch], strict=True)]


def measure(chosen: Any, asked: Mapping[str, Callable[[str], Answer]], seen: Seen) -> None:
    """Asks all of them in turns, batch after batch."""
    counts = (1, new_tokens(chosen))
    for name, side in asked.items():
        if name in OURS:
            seen.facts[name] = side("facts").value
    for batch in BATCHES[chosen.device]:
        for name, side in asked.items():
            seen.answers[name, batch] = side(f"{batch} x {counts[1]}").value
        runs = {
            (name, count): lambda side=side, call=f"{batch} x {count}": side(call).seconds
            for name, side in asked.items()
            for count in counts
        }
        seconds = in_turns(runs, repeats=chosen.repeats)
        for name in asked:
            seen.seconds[name, batch] = seconds[name, 1], seconds[name, counts[1]]


def report(chosen: Any, seen: Seen) -> None:
    """The table of what was measured so far."""
    count, bandwidth = new_tokens(chosen), read_bandwidth(chosen.device)
    rows: list[dict[str, Any]] = []
    for name, batch in sorted(seen.seconds, key=lambda key: key[1]):
        first, rest = seen.seconds[name, batch][0], seen.after_first(name, batch)
        decode, is_ours = rate(batch * (count - 1), rest), name in OURS
        read = seen.facts[name if is_ours else "ours"][1][batch]
        row = {"batch": batch, "of": name, "first token, ms": quartiles([1e3 * s for s in first])}
        row["decode, tokens/s"] = decode
        row["of read bandwidth"] = f"{decode['median'] / batch * read / bandwidth:.0%}"
        row["first token, peer/ours"] = "" if is_ours else ratio(first, seen.seconds["ours", batch][0])
        row["decode, ours/peer"] = "" if is_ours else ratio(rest, seen.after_first("ours", batch))
        row["same ids"] = "" if name == "ours" else _agreement(seen.answers["ours", batch], seen.answers[name, batch])
        rows.append(row)
    notes = {
        "what": f"{seen.facts['ours'][0]}; {count} new tokens, greedy; {chosen.repeats} repeats "
        f"{'in turns' if chosen.device == 'cpu' else 'of each'}, each row in a process of its own; ratios and ids are "
        "those against the row `ours`",
        "read bandwidth": f"{bandwidth / 1e9:.1f} GB/s",
    }
    publish("generate", chosen, rows, notes)


def new_tokens(chosen: Any) -> int:
    return {"tiny": 8}.get(chosen.size, 64)


def draw(config: Any, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts, IMAGE_TOKEN where a picture's features go, and the pictures, the same in every process."""
    from llava_jax.data.conversation import IMAGE_TOKEN

    rng = np.random.default_rng(batch)
    length, side = TEXT_TOKENS + config.num_features, config.vision.image_size
    tokens = rng.integers(3, config.text.vocab_size - 1, (batch, length), dtype=np.int32)
    tokens[:, 0], tokens[:, 36 : 36 + config.num_features] = 1, IMAGE_TOKEN
    return tokens, rng.integers(0, 256, (batch, 1, side, side, 3), dtype=np.uint8)


def make_peer(chosen: Any) -> Any:
    import torch

    from benchmarks import peer

    device, dtype = {"cpu": ("cpu", torch.float32), "gpu": ("cuda", torch.bfloat16)}[chosen.device]
    return peer.make_peer(peer.SIZES[chosen.size], device=device, dtype=dtype)


def our_calls(chosen: Any, name: str) -> Calls:
    """One of ours, with the peer's weights where there is one: ids of answers by batch and number of tokens; facts."""
    from benchmarks import peer
    from llava_jax import generate
    from llava_jax.data.anyres import one_tile
    from llava_jax.data.conversation import Tokenized
    from llava_jax.data.rows import make_example
    from llava_jax.inference.generate import Sampling
    from llava_jax.inference.model import Processor, hold

    config = peer.SIZES[chosen.size]
    dtype = DTYPES[chosen.device]
    values = peer.random_parameters(config, dtype) if chosen.only_ours else values_of_peer(chosen)
    size = sum(value.size for value in values.values())
    model = hold(config, values, dtype=dtype, quantize=OURS[name])
    # No longer held beside it.
    del values
    processor = Processor(
        tokenizer=_Wordless(),  # pyright: ignore[reportArgumentType]
        template=None,
        image_mode="square",
        image_size=config.vision.image_size,
        num_features=config.num_features,
    )

    def answer(prompts: Any, count: int) -> list[list[int]]:
        return [answer.token_ids for answer in generate(model, processor, prompts, Sampling(max_new_tokens=count))]

    calls: dict[str, Any] = {}
    batches = BATCHES[chosen.device]
    for batch in batches:
        prompts = [
            make_example(
                Tokenized(ids, np.zeros(len(ids), bool)),
                [tile],
                [one_tile(config.num_features)],
                config.vision.image_size,
            )
            for ids, tile in zip(*draw(config, batch), strict=True)
        ]
        for count in (1, new_tokens(chosen)):
            calls[f"{batch} x {count}"] = functools.partial(answer, prompts, count)
    length = TEXT_TOKENS + config.num_features
    what = f"{size:,} parameters, {dtype}; prompts of {length} tokens, one picture"
    middle = length + new_tokens(chosen) // 2
    read = {batch: decode_bytes(model, batch, middle) for batch in batches}
    return calls | {"facts": lambda: (what, read)}


def values_of_peer(chosen: Any) -> Any:
    import torch

    from benchmarks import peer

    values = peer.our_parameters(make_peer(chosen))
    # What torch still holds of the peer; nothing on a CPU.
    torch.cuda.empty_cache()
    return values


def peer_calls(chosen: Any, name: str) -> Calls:
    """The peer: ids of answers by batch and number of tokens."""
    import torch
    import transformers

    from benchmarks import peer
    from llava_jax.data.conversation import IMAGE_TOKEN
    from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD

    transformers.logging.set_verbosity_error()
    config, theirs = peer.SIZES[chosen.size], make_peer(chosen)

    options = PEERS[chosen.device][name]

    def answer(inputs: Any, count: int) -> list[list[int]]:
        with torch.inference_mode():
            found = theirs.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
        return found[:, inputs["input_ids"].shape[1] :].tolist()

    calls: dict[str, Any] = {}
    for batch in BATCHES[chosen.device]:
        tokens, pixels = draw(config, batch)
        normal = (pixels[:, 0] / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
        inputs = {
            "input_ids": torch.tensor(np.where(tokens == IMAGE_TOKEN, peer.image_id(config), tokens).astype(np.int64)),
            "attention_mask": torch.ones(tokens.shape, dtype=torch.int64),
            "pixel_values": torch.tensor(normal.transpose(0, 3, 1, 2), dtype=theirs.dtype),
        }
        inputs = {key: value.to(theirs.device) for key, value in inputs.items()}
        for count in (1, new_tokens(chosen)):
            calls[f"{batch} x {count}"] = functools.partial(answer, inputs, count)
    return calls


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


def decode_bytes(model: Any, batch: int, length: int) -> int:
    """What one step of decoding must read: the decoder's layers, the head, and the keys and values so far."""
    read, text = ("decoder.layers.", "decoder.norm", "decoder.lm_head"), model.config.text
    weights = sum(value.nbytes for name, value in model.params.items() if name.startswith(read))
    cache = 2 * batch * length * text.num_layers * text.num_kv_heads * text.head_dim
    return weights + cache * model.dtype.itemsize


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
