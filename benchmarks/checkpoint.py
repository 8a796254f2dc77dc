"""Checkpoints and conversion: how long a save holds up training, how fast a restore and a conversion are.

python -m benchmarks.checkpoint                          # about 70M parameters, float32
python -m benchmarks.checkpoint --device gpu --size 7b   # LLaVA-1.5-7B's shape

The peer is `torch.save` and `torch.load` of parameters and AdamW's moments. Ours writes behind the loop's back, with
fingerprints of every array, which a restore checks. Conversion reads a Hugging Face folder in a process of its own.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import arguments, in_turns, publish, quartiles, rate, ratio

# The process tells its own peak: what the system keeps of a child begins with the pages of the parent it forked from.
CONVERT = """
import sys
from pathlib import Path
from llava_jax.cli import main
code = main(["convert", *sys.argv[1:], "--to", "jax"])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], sizes=("small", "7b", "tiny"))
    import jax
    import torch

    from benchmarks import peer
    from llava_jax.models.parameters import part
    from llava_jax.train.checkpoint import Checkpoints
    from llava_jax.train.config import OptimConfig
    from llava_jax.train.optim import make_optimizer

    config = peer.SIZES[chosen.size]
    theirs = peer.make_peer(config, device="cpu", dtype=torch.float32)
    params = peer.our_parameters(theirs)
    trainable = {name: value for name, value in params.items() if part(name) != "tower"}
    opt_state = jax.jit(make_optimizer(OptimConfig(learning_rate=1e-5), 100).init)(trainable)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((trainable, opt_state)))
    values = [value.detach() for name, value in theirs.named_parameters() if "vision_tower" not in name]
    state = {"params": values, "moments": [torch.zeros_like(value) for value in values for _ in range(2)]}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (trainable, opt_state))

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(str(Path(folder, "run")), keep=1)
        checkpoints.save_frozen({})
        checkpoints.rehearse(trainable, opt_state)
        steps = iter(range(1, 10_000))
        blocked: list[float] = []

        def save() -> float:
            begin = time.perf_counter()
            checkpoints.save(next(steps), trainable, opt_state, {"plan": "none"})
            blocked.append(time.perf_counter() - begin)
            checkpoints.wait()
            return time.perf_counter() - begin

        def peer_save() -> float:
            begin = time.perf_counter()
            torch.save(state, Path(folder, "peer.pt"))
            return time.perf_counter() - begin

        def restore() -> None:
            restored = checkpoints.restore(checkpoints.steps()[0], *shapes)
            jax.block_until_ready(restored)

        def peer_restore() -> None:
            torch.load(Path(folder, "peer.pt"))

        saves = in_turns({"ours": save, "peer": peer_save}, repeats=chosen.repeats)
        saves["blocked"] = blocked[1:]
        restores = in_turns({"ours": restore, "peer": peer_restore}, repeats=chosen.repeats)
        checkpoints.close()
        source, target = Path(folder, "hf"), Path(folder, "converted")
        theirs.save_pretrained(source)
        gigabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
        conversions, peak = converted(source, target, repeats=min(3, chosen.repeats))
    gb = size / 1e9
    rows: list[dict[str, Any]] = [
        {
            "what": "save, training held up, s",
            "ours": quartiles(saves["blocked"]),
            "torch.save": quartiles(saves["peer"]),
        },
        {"what": "save, until on disk, s", "ours": quartiles(saves["ours"]), "torch.save": quartiles(saves["peer"])},
        {"what": "restore, GB/s", "ours": rate(gb, restores["ours"]), "torch.save": rate(gb, restores["peer"])},
        {"what": "convert HF to jax, GB/s, process start included", "ours": rate(gigabytes, conversions)},
        {"what": "convert, peak memory, GB", "ours": peak / 1e9},
    ]
    rows[0]["peer/ours"] = ratio(saves["peer"], saves["blocked"])
    rows[1]["peer/ours"] = ratio(saves["peer"], saves["ours"])
    rows[2]["peer/ours"] = ratio(restores["peer"], restores["ours"])
    notes = {
        "what": f"checkpoint of {gb:.3f} GB (trained parameters and two moments, float32), model of {gigabytes:.3f} "
        f"GB; {chosen.repeats} repeats in turns; files on the local disk, page cache warm",
    }
    publish("checkpoint", chosen, rows, notes)


def converted(source: Path, target: Path, *, repeats: int) -> tuple[list[float], int]:
    """Seconds of each conversion, and the most memory in bytes that any of them held."""
    seconds, peaks = [], []
    for repeat in range(repeats):
        begin = time.perf_counter()
        command = [sys.executable, "-c", CONVERT, str(source), f"{target}{repeat}"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - begin)
        peaks.append(1024 * int(result.stdout.split()[-2]))
    return seconds, max(peaks)


if __name__ == "__main__":
    main()
