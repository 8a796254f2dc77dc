"""What the TPU compiler expects of a step: its own estimates of cycles, added up.

python -m benchmarks.cycles --config configs/llava15_finetune_7b.py --topology v5e:8x8   # minutes of a CPU

Needs `pip install -e '.[plan]'`. Kernels written in Pallas have no estimate, attention's among them, and no wait for
links is in any; both branches of a condition are counted. Good for comparing two forms of a program, not for saying how
long a step takes.
"""

import argparse
import math
import os
import re
from collections import defaultdict

from benchmarks.report import as_table
from llava_jax.chips import TPUS

LARGEST = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v")
    chosen = parser.parse_args()
    if chosen.topology.lower().partition(":")[0] not in TPUS:
        known = ", ".join(TPUS)
        parser.error(
            f"--topology must be a slice of {known}, such as v5e:8x8; got {chosen.topology!r}. No other "
            "compiler gives estimates."
        )
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in (settings | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    found = estimates(_compile(chosen.config, chosen.topology, tuple(chosen.set)))
    total = sum(cycles for _, _, cycles in found)
    kinds: dict[str, float] = defaultdict(float)
    for kind, _, cycles in found:
        kinds[kind] += cycles
    print(f"{total / 1e6:,.0f} million cycles of each chip that the compiler has an estimate for\n")
    print(as_table([_row(total, cycles, what=kind) for kind, cycles in sorted(kinds.items(), key=lambda kv: -kv[1])]))
    print(f"\nThe {LARGEST} largest that are no products:\n")
    others = sorted((item for item in found if item[0] != "products"), key=lambda item: -item[2])
    print(as_table([_row(total, cycles, what=kind, of=of) for kind, of, cycles in others[:LARGEST]]))


def estimates(text: str) -> list[tuple[str, str, float]]:
    """Kind, operation and cycles of every instruction with an estimate, the turns of loops around it counted.

    Raises:
      ValueError: a loop does not say how often it turns.
    """
    from llava_jax.collectives import _computations, _turns

    computations, entry = _computations(text)
    found = []
    for name, turns, is_fused in _turns(computations, entry):
        for line in [] if is_fused else computations[name]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            called = re.search(r"calls=%?([\w.\-]+)", line)
            if cycles is None:
                continue
            if math.isnan(turns):
                raise ValueError(f"A loop around {line.strip()[:80]} does not say how often it turns.")
            inside = "\n".join([line, *(computations.get(called[1], []) if called else [])])
            kind = "products" if re.search(r" (?:convolution|dot)\(", inside) else "others"
            if re.search(r" copy\(", line):
                kind = "copies"
            operation, shape = re.search(r'op_name="([^"]*)"', line), re.search(r"\w+\[[\d,]*\]", line)
            of = f"{shape[0] if shape else ''} {operation[1][-70:] if operation else ''}"
            found.append((kind, of.strip(), turns * float(cycles[1])))
    return found


def _compile(config_path: str, topology: str, overrides: tuple[str, ...]) -> str:
    from jax.sharding import Mesh

    from llava_jax import targets
    from llava_jax.plan import MOST_RECORDS, NUM_STEPS, _devices, _job
    from llava_jax.train.config import load_config
    from llava_jax.train.optim import make_optimizer
    from llava_jax.train.step import abstract_tallies, jit_step

    job = _job(load_config(config_path, overrides), _devices(topology.lower()))
    assert isinstance(job.layout.mesh, Mesh), "devices make one"
    step = jit_step(job.layout, make_optimizer(job.config.optim, NUM_STEPS), most_records=MOST_RECORDS)
    tallies, votes = abstract_tallies(job.layout.mesh, job.num_rows)
    return targets.compile_absent(step, *job.layout.memory, job.batch | tallies, votes).as_text() or ""


def _row(total: float, cycles: float, **names: str) -> dict[str, str]:
    return names | {"million cycles": f"{cycles / 1e6:,.1f}", "share": f"{cycles / total:.1%}"}


if __name__ == "__main__":
    main()
