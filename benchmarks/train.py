"""A step of training against transformers on torch: real tokens/s on dense batches and on mixed lengths.

python -m benchmarks.train                          # stage 2, about 70M parameters, float32, this CPU
python -m benchmarks.train --stage stage1           # the projector alone; or --stage lora
python -m benchmarks.train --device gpu --size 7b   # LLaVA-1.5-7B's shape, bfloat16, packed rows of 2048, one H200;
                                                    # with --stacked a scanned stack of layers, not a tuple

Real tokens are those of conversations, picture slots counted and padding not. `dense` gives both sides the very same
full rows. `mixed` gives both the same conversations: the peer's in padded batches, grouped as the original's
`group_by_modality_length` groups them on 8 devices, ours packed by the plan that training uses, in no more steps.
"""

import contextlib
import functools
import os
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.apart import Answer, Calls, apart
from benchmarks.grouping import group_by_modality_length
from benchmarks.report import arguments, in_turns, publish, rate, ratio


class Job(NamedTuple):
    """Rows of `length` tokens and `tiles` pictures, conversations, the peer's batch (published: 16), LoRA's rank."""

    length: int
    tiles: int
    dense: tuple[int, int]
    conversations: int
    batch: int
    rank: int


JOBS = {
    "small": Job(length=512, tiles=8, dense=(4, 256), conversations=128, batch=16, rank=16),
    "7b": Job(length=2048, tiles=3, dense=(4, 2048), conversations=256, batch=16, rank=128),
    "tiny": Job(length=256, tiles=8, dense=(2, 64), conversations=8, batch=4, rank=4),
}
# Devices of the original's run, among which a megabatch is split evenly.
DEVICES = 8
# A dense run is one step, a mixed one several.
DENSE_REPEATS = 4


Side = Callable[[str], Answer]


def main() -> None:
    chosen = arguments(
        (__doc__ or "").splitlines()[0],
        sizes=tuple(JOBS),
        stages=("stage2", "stage1", "lora"),
        flags={"stacked": "ours with a scanned stack of layers, not a tuple"},
    )
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Without it JAX takes three quarters of a GPU, however it allocates.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # One that you have exported would reach the peer as well.
    os.environ.pop("GLIBC_TUNABLES", None)
    from llava_jax.heap import HEAP
    from llava_jax.train.environment import GPU_FLAGS

    heap = {"GLIBC_TUNABLES": HEAP}
    # Ours with the heap, or with the sums in a fixed order, that `llava-jax train` starts itself with.
    started = heap if chosen.device == "cpu" else {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS[0]}"}
    sides: dict[str, tuple[Callable[[Any], Calls], Mapping[str, str]]] = {"ours": (our_calls, started)}
    # The peer as its users start it, and with our heap.
    if not chosen.only_ours:
        sides["transformers"] = peer_calls, {}
        if chosen.device == "cpu":
            sides["transformers, our heap"] = peer_calls, heap
    seconds: dict[tuple[str, str], list[float]] = {}
    facts: dict[str, Facts] = {}
    # On a GPU both do not fit: one after the other.
    for names in [list(sides)] if chosen.device == "cpu" else [[name] for name in sides]:
        with contextlib.ExitStack() as stack:
            asked: dict[str, Side] = {}
            for name in names:
                make, environment = sides[name]
                asked[name] = stack.enter_context(apart(make, chosen, environment=environment))
                facts[name] = asked[name]("facts").value
            seconds |= timed(asked, chosen.repeats)
            facts |= {name: side("facts").value for name, side in asked.items()}
        # As soon as one side is done: what comes after it may find no room, or no time.
        report(chosen, seconds, facts)


def report(chosen: Any, seconds: Mapping[tuple[str, str], list[float]], facts: Mapping[str, "Facts"]) -> None:
    """The table of the sides that have run."""
    from llava_jax.train.flops import CONVENTION

    ours, peak = facts["ours"], peak_flops(chosen.device)
    rows = []
    for (kind, name), found in seconds.items():
        row = {"data": kind, "of": name, "real tokens/s": rate(ours.tokens[kind], found)}
        row["tokens of slots"] = f"{ours.tokens[kind] / facts[name].slots[kind]:.0%}"
        row["MFU"] = f"{ours.flops[kind] / np.median(found) / peak:.0%}" if name == "ours" else ""
        row["peak memory, GB"] = (facts[name].peak or "") if kind == "mixed" else ""
        row["ours/peer"] = "" if name == "ours" else ratio(found, seconds[kind, "ours"])
        rows.append(row)
    job = JOBS[chosen.size]
    notes = {
        "what": f"{chosen.stage}, {ours.what}, tower frozen, AdamW, clipping; dense {job.dense[0]} rows of "
        f"{job.dense[1]}; {chosen.repeats} repeats in turns, {DENSE_REPEATS} times as many of dense, each side in a "
        "process of its own",
        "first step of ours, compiling included": f"{ours.compiling:.1f} s",
        "loss of the first dense step": ", ".join(f"{name} {facts[name].loss:.6f}" for name in facts),
        "MFU": f"of {peak / 1e9:,.0f} GFLOP/s ({'data sheet' if chosen.device == 'gpu' else 'torch.mm here'}); "
        + CONVENTION,
    }
    publish(f"train_{chosen.stage}{'_stacked' if chosen.stacked else ''}", chosen, rows, notes)


def timed(sides: Mapping[str, Side], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every run; dense ones, of one step each, by themselves and oftener.

    A peer with our heap runs these alone: mixed ones take it minutes.
    """
    runs = {
        kind: {(kind, name): lambda kind=kind, side=side: side(kind).seconds for name, side in sides.items()}
        for kind in ("dense", "mixed")
    }
    runs["mixed"].pop(("mixed", "transformers, our heap"), None)
    return in_turns(runs["dense"], repeats=DENSE_REPEATS * repeats) | in_turns(runs["mixed"], repeats=repeats)


class Facts(NamedTuple):
    """What a side tells of itself: tokens, slots and FLOPs of each kind of data, its first loss, GB at the peak.

    The peak is known where the device tells.
    """

    tokens: Mapping[str, int]
    slots: Mapping[str, int]
    loss: float
    peak: float | None
    flops: Mapping[str, int] = {}
    compiling: float = 0.0
    what: str = ""


class Data(NamedTuple):
    """What both sides train on, the same in every process: conversations, and the peer's batches of the mixed ones."""

    job: Job
    config: Any
    dense: list[Any]
    mixed: list[Any]
    grouped: list[list[int]]

    def tokens(self) -> dict[str, int]:
        return {"dense": int(np.prod(self.job.dense)), "mixed": sum(len(example.tokens) for example in self.mixed)}


def make_data(chosen: Any) -> Data:
    from benchmarks import peer

    job, config = JOBS[chosen.size], peer.SIZES[chosen.size]
    dense = conversations([job.dense[1]] * job.dense[0], config, num_text=0)
    # Stage 1 reads captions alone.
    num_text = 0 if chosen.stage == "stage1" else max(1, job.conversations // 16)
    mixed = conversations(mixed_lengths(job, config, num_text), config, num_text=num_text)
    return Data(job, config, dense, mixed, in_batches(mixed, job.batch))


def peer_calls(chosen: Any) -> Calls:
    """The peer, made here: its dense step, its mixed ones, and its facts."""
    import torch
    import transformers

    from benchmarks import peer

    transformers.logging.set_verbosity_error()
    data = make_data(chosen)
    device = {"cpu": "cpu", "gpu": "cuda"}[chosen.device]
    dtype = {"cpu": torch.float32, "gpu": torch.bfloat16}[chosen.device]
    theirs = peer.make_peer(data.config, device=device, dtype=dtype)
    step = peer_step(theirs, chosen.stage, data.job, is_large=chosen.size == "7b")
    dense = peer_batch(data.dense, data.config, device, dtype)
    mixed = [peer_batch([data.mixed[i] for i in batch], data.config, device, dtype) for batch in data.grouped]
    slots = {
        "dense": data.tokens()["dense"],
        "mixed": sum(len(batch) * max(len(data.mixed[i].tokens) for i in batch) for batch in data.grouped),
    }
    loss = step(dense)

    def facts() -> Facts:
        peak = torch.cuda.max_memory_allocated() / 1e9 if chosen.device == "gpu" else None
        return Facts(data.tokens(), slots, loss, peak)

    return {"dense": lambda: step(dense), "mixed": lambda: [step(batch) for batch in mixed], "facts": facts}


def our_calls(chosen: Any) -> Calls:
    """Ours, on a CPU with the peer's weights: its dense step, its mixed ones, and its facts."""
    import jax

    from benchmarks import peer

    data = make_data(chosen)
    weights = None
    if chosen.device == "cpu" and not chosen.only_ours:
        import torch

        weights = peer.our_parameters(peer.make_peer(data.config, device="cpu", dtype=torch.float32))
    ours = Ours(chosen, data.config, weights, stacked=chosen.stacked)
    dense = ours.place(ours.rows(data.dense, [[i] for i in range(len(data.dense))], data.job.dense[1], 1))
    mixed, num_rows = ours.pack(data.mixed, data.job, len(data.grouped))
    begin = time.perf_counter()
    loss = ours.step(dense)
    compiling = time.perf_counter() - begin
    slots = {"dense": data.tokens()["dense"], "mixed": num_rows * data.job.length}
    flops = {"dense": ours.flops(dense), "mixed": len(mixed) * ours.flops(mixed[0])}
    what = (
        f"{ours.size:,} parameters, {ours.config.compute_dtype}; mixed {len(data.mixed)} conversations of "
        f"{data.tokens()['mixed']:,} tokens, {len(data.grouped)} batches of {data.job.batch} against {len(mixed)} of "
        f"{num_rows // len(mixed)} rows of {data.job.length}"
    )

    def facts() -> Facts:
        peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9 if chosen.device == "gpu" else None
        return Facts(data.tokens(), slots, loss, peak, flops, compiling, what)

    return {"dense": lambda: ours.step(dense), "mixed": lambda: [ours.step(batch) for batch in mixed], "facts": facts}


def mixed_lengths(job: Job, config: Any, num_text: int) -> list[int]:
    """Lengths of conversations, after LLaVA's mix: most short, a long tail, one in sixteen long and without a picture.

    Log-normal, in shares of the row: text of median 1/8 (1/3 without a picture), the picture's slots beside it.
    """
    rng = np.random.default_rng(0)
    short = np.exp(rng.normal(np.log(job.length / 8), 0.8, job.conversations - num_text))
    long = np.exp(rng.normal(np.log(job.length / 3), 0.8, num_text))
    with_picture = np.clip(short, 16, job.length - config.num_features) + config.num_features
    return [int(length) for length in (*with_picture, *np.clip(long, 16, job.length))]


def conversations(lengths: Sequence[int], config: Any, *, num_text: int) -> list[Any]:
    """Conversations of random tokens, a picture near the start of all but the last `num_text`; half is answers."""
    from llava_jax.data.anyres import one_tile
    from llava_jax.data.conversation import IMAGE_TOKEN, Tokenized
    from llava_jax.data.rows import make_example

    rng = np.random.default_rng(1)
    side, made = config.vision.image_size, []
    for number, length in enumerate(lengths):
        tokens = rng.integers(3, config.text.vocab_size - 1, length, dtype=np.int32)
        has_picture = number < len(lengths) - num_text
        start = 4 + config.num_features if has_picture else 4
        if has_picture:
            tokens[4:start] = IMAGE_TOKEN
        is_answer = np.arange(length) >= (start + length) // 2
        tiles = [rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8)] if has_picture else []
        made.append(
            make_example(Tokenized(tokens, is_answer), tiles, [one_tile(config.num_features)] * len(tiles), side)
        )
    return made


def in_batches(examples: Sequence[Any], batch: int) -> list[list[int]]:
    """Numbers of the examples of every batch, as the original groups them."""
    lengths = [len(example.tokens) * (1 if len(example.images) else -1) for example in examples]
    rng = np.random.default_rng(2)
    order = group_by_modality_length(lengths, batch, DEVICES, lambda count: rng.permutation(count).tolist())
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def peer_batch(examples: Sequence[Any], config: Any, device: str, dtype: Any) -> dict[str, Any]:
    """Padded on the right to the longest, pictures already in the tower's units."""
    import torch

    from benchmarks.peer import image_id
    from llava_jax.data.conversation import IMAGE_TOKEN
    from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD

    longest = max(len(example.tokens) for example in examples)
    ids = np.zeros((len(examples), longest), np.int64)
    labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
    for row, (tokens, is_answer, *_) in enumerate(examples):
        ids[row, : len(tokens)] = np.where(tokens == IMAGE_TOKEN, image_id(config), tokens)
        labels[row, : len(tokens)] = np.where(is_answer, tokens, -100)
        mask[row, : len(tokens)] = 1
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}
    images = np.concatenate([example.images for example in examples])
    if len(images):
        normal = (images / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
        batch["pixel_values"] = torch.tensor(normal.transpose(0, 3, 1, 2), dtype=dtype)
    return {name: value.to(device) for name, value in batch.items()}


def peer_step(model: Any, stage: str, job: Job, *, is_large: bool) -> Callable[[Mapping[str, Any]], float]:
    """Forward, backward, clipping, AdamW; what a stage does not train is frozen, as the original's scripts have it."""
    import torch

    model.train()
    model.requires_grad_(stage == "stage2")
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    if is_large:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if stage == "lora":
        import peft

        linear = r".*language_model\.layers.*_proj"
        model = peft.get_peft_model(model, peft.LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=linear))
    projector.requires_grad_(True)
    tower.requires_grad_(False)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=True)

    def step(batch: Mapping[str, Any]) -> float:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Ours:
    """Our step, the one that training compiles, and its state."""

    def __init__(self, chosen: Any, config: Any, weights: Mapping[str, Any] | None, *, stacked: bool = False):
        import jax
        import jax.numpy as jnp

        from llava_jax.data.rows import Conversations, Needs
        from llava_jax.data.templates import V1
        from llava_jax.models import lora
        from llava_jax.models.parameters import stack_layers
        from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
        from llava_jax.train.objectives import next_token
        from llava_jax.train.optim import make_optimizer
        from llava_jax.train.sharding import make_mesh
        from llava_jax.train.state import Layout

        job, is_gpu = JOBS[chosen.size], chosen.device == "gpu"
        self.format = Conversations(template=V1, length=job.length, tiles=job.tiles)
        self.config = TrainConfig(
            model=config,
            objective=next_token,
            init={"tower": "random", "projector": "random", "decoder": "random"},
            trainable=("projector",) if chosen.stage == "stage1" else ("projector", "decoder"),
            lora=lora.LoraConfig(rank=job.rank, alpha=2.0 * job.rank, dropout=0.0) if chosen.stage == "lora" else None,
            data=DataConfig(records="", image_root="", tokenizer="", rows=self.format, batch_rows=1, steps=1),
            optim=OptimConfig(learning_rate=1e-6, moments="bfloat16" if is_gpu else "float32"),
            compute_dtype="bfloat16" if is_gpu else "float32",
            stacked=stacked,
            remat="linear" if chosen.size == "7b" else "nothing",
            checkpoint_every=1,
        )
        self.optimizer = make_optimizer(self.config.optim, 1000)
        self.mesh = make_mesh(self.config.mesh)
        self.layout = Layout(self.config, self.optimizer, self.mesh)
        trainable, frozen, _ = self.layout.memory
        self.size = sum(value.size for value in (trainable | frozen).values())

        if weights is not None and stacked:
            weights = stack_layers(weights)

        # Compiled once for each shape, of which there are few.
        @functools.partial(jax.jit, static_argnums=(1, 2))
        def normal(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
            return (0.02 * jax.random.normal(key, shape)).astype(dtype)

        def draw(name: str, target: Any) -> Any:
            if weights is not None and name in weights:
                return jax.device_put(jnp.array(weights[name], target.dtype), target.sharding)
            if name.endswith(lora.B):
                return jnp.zeros(target.shape, target.dtype, device=target.sharding)
            return jax.device_put(normal(jax.random.key(len(name)), target.shape, target.dtype), target.sharding)

        self.trainable = {name: draw(name, target) for name, target in trainable.items()}
        self.frozen = {name: draw(name, target) for name, target in frozen.items()}
        self.opt_state = jax.jit(self.optimizer.init)(self.trainable)
        self.make_step(most_records=1)
        self.needs = Needs(None, "", config.vision.image_size, config.num_features)  # pyright: ignore[reportArgumentType]

    def make_step(self, most_records: int) -> None:
        """The step for rows of so many records at most."""
        from llava_jax.train.step import jit_step

        self.most_records = most_records
        self.compiled = jit_step(self.layout, self.optimizer, most_records=most_records)

    def rows(self, examples: Sequence[Any], rows: Sequence[Sequence[int]], length: int, tiles: int) -> dict[str, Any]:
        """The batch of the listed rows."""
        import dataclasses

        format = dataclasses.replace(self.format, length=length, tiles=tiles)
        assert max(map(len, rows)) <= self.most_records, "the step was made for rows of fewer records"
        made = [format.assemble([examples[i] for i in row], self.needs) for row in rows]
        batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
        num_rows = len(rows)
        return batch | {"checksum": np.zeros(num_rows, np.uint32), "num_replaced": np.zeros(num_rows, np.int32)}

    def pack(self, examples: Sequence[Any], job: Job, most_steps: int) -> tuple[list[dict[str, Any]], int]:
        """Batches of packed rows, as the plan of a run packs them, and the number of rows; makes the step for them.

        A batch has as many rows as it takes to make no more updates than the peer: both learn from as much at a time.
        """
        from llava_jax.data.plan import pack

        sizes: Any = types.SimpleNamespace(
            tokens=np.array([len(example.tokens) for example in examples]),
            tiles=np.array([len(example.images) for example in examples]),
        )
        order = np.random.default_rng(3).permutation(len(examples))
        packed = pack(order, sizes, self.format.capacity)
        self.make_step(max(map(len, packed)))
        rows = -(-len(packed) // most_steps)
        packed += [[]] * (-len(packed) % rows)
        steps = [packed[i : i + rows] for i in range(0, len(packed), rows)]
        return [self.place(self.rows(examples, step, job.length, job.tiles)) for step in steps], len(packed)

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        import jax

        from llava_jax.train.sharding import batch_sharding

        return {name: jax.device_put(value, batch_sharding(self.mesh)) for name, value in batch.items()}

    def step(self, batch: Mapping[str, Any]) -> float:
        import jax.numpy as jnp

        arguments = (self.trainable, self.frozen, self.opt_state, batch, jnp.zeros(1, jnp.int32))
        self.trainable, self.opt_state, metrics = self.compiled(*arguments)
        return float(metrics["loss"])

    def flops(self, batch: Mapping[str, Any]) -> int:
        import jax

        from llava_jax.train.flops import model_flops

        shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
        return model_flops(self.layout, shapes)


def peak_flops(device: str) -> float:
    """FLOP/s: the GPU's data sheet (dense bfloat16), or the best float32 matrix product of torch on this CPU."""
    if device == "gpu":
        import jax

        from llava_jax.chips import KINDS

        return KINDS[jax.devices()[0].device_kind].flops
    import torch

    x = torch.ones(2048, 2048)
    seconds = []
    for _ in range(40):
        begin = time.perf_counter()
        _ = x @ x
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(seconds)


if __name__ == "__main__":
    main()
