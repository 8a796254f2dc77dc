"""Plans of the large configs by the compilers for TPUs and GPUs: one `llava-jax plan` a row, minutes of a CPU each.

python -m benchmarks.plans          # all that results/plans.json does not hold yet; '--again' for all
python -m benchmarks.plans --row 3  # one of them, again
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import as_table

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
# Config, topology, overrides: the slices that recipes are meant for, and smaller ones to try. Rows for GPUs are
# arithmetic where what the README asks for is not installed.
PLANS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("llava15_pretrain_7b", "v5e:4x4", ()),
    ("llava15_pretrain_7b", "v5e:2x2", ("accumulation=32",)),
    ("llava15_finetune_7b", "v5e:8x8", ()),
    ("llava15_finetune_7b", "v5e:8x8", ("remat=linear",)),
    ("llava15_finetune_7b", "v5e:8x8", ("remat=elementwise", "accumulation=2")),
    ("llava15_finetune_7b", "v5e:4x4", ("accumulation=8",)),
    ("llava15_finetune_7b", "v6e:4x8", ()),
    ("llava15_finetune_7b", "v6e:2x4", ("accumulation=16",)),
    ("llava15_finetune_13b", "v5e:8x16", ()),
    ("llava15_finetune_13b", "v5e:4x8", ("accumulation=4",)),
    ("llava16_finetune_34b", "v6e:16x16", ()),
    ("llava16_finetune_34b", "v5p:4x4x8", ()),
    ("llava16_finetune_34b", "v5p:4x4x8", ("mesh.data=2",)),
    ("llava16_finetune_34b", "v5p:2x2x4", ("accumulation=8",)),
    ("llava16_finetune_34b", "v6e:8x8", ("accumulation=2",)),
    ("llava15_pretrain_7b", "h100:1", ("accumulation=16",)),
    ("llava15_finetune_7b", "h200:1", ("accumulation=16", "optim.moments=bfloat16")),
    ("llava15_finetune_7b", "h200:1", ("accumulation=16", "optim.moments=bfloat16", "remat=linear")),
    ("llava15_finetune_7b", "h100:8", ("accumulation=2",)),
    ("llava15_finetune_7b", "h100:16", ()),
    ("llava15_finetune_13b", "h100:8", ("accumulation=4",)),
    ("llava15_finetune_lora_7b", "h100:1", ("accumulation=16",)),
    ("llava15_finetune_qlora_7b", "4090:1", ("stacked=true",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", type=int, help="number of one plan, from 0")
    parser.add_argument("--again", action="store_true", help="those that are there already, too")
    chosen = parser.parse_args()
    store = RESULTS / "plans.json"
    found: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    for row, command in enumerate(map(_command, PLANS)):
        if chosen.row == row or (chosen.row is None and (chosen.again or command not in found)):
            done = subprocess.run(
                [sys.executable, "-m", "llava_jax.cli", *command.split()[1:], "--json"],
                stdout=subprocess.PIPE,
                check=True,
            )
            found[command] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), **json.loads(done.stdout)}
            store.write_text(json.dumps(found, indent=1) + "\n")
    commands = [command for command in map(_command, PLANS) if command in found]
    (RESULTS / "plans.md").write_text(_report({command: found[command] for command in commands}))


def _command(plan: tuple[str, str, tuple[str, ...]]) -> str:
    config, topology, overrides = plan
    sets = "".join(f" --set {override}" for override in overrides)
    return f"llava-jax plan --config configs/{config}.py --topology {topology}{sets}"


def _report(plans: dict[str, Any]) -> str:
    rows, links = [], []
    for command, plan in plans.items():
        size, bound = plan["bytes_per_chip"], plan["step_seconds_lower_bound"]
        what = command.removeprefix("llava-jax plan --config configs/").replace(".py --topology", "")
        batch = plan["batch"]
        rows.append(
            {
                "plan": f"`{what}`",
                "chips": plan["num_devices"],
                "rows, at a time on a chip": f"{batch['rows']}, {batch['rows_per_chip_at_a_time']}",
                **{name: f"{size[name] / GIB:.2f}" if name in size else "" for name in ("arguments", "temporaries")},
                "total": f"{size['total'] / GIB:.2f}",
                "of": f"{plan['hbm_bytes'] / GIB:.0f}",
                "fits": "yes" if plan["fits"] else "no",
                "step takes at least": f"{bound['seconds']:.2f} s",
                "MFU at most": f"{plan['mfu_ceiling']:.0%}",
                "compiled": "by arithmetic" if plan["method"] == "analytic" else plan["date"],
            }
        )
        links.append({"plan": f"`{what}`"} | _traffic(plan["collectives"]))
    methods = sorted({plan["method"] for plan in plans.values()})
    return f"""# Plans: what fits where

What the compilers say on a CPU, {", ".join(methods)}: `python -m benchmarks.plans`, a row being the output of
`llava-jax plan --config configs/CONFIG.py --topology TOPOLOGY --set ...` as its first cell has it. One row of tokens a
record is assumed, as the data are not there to be packed; with packing they hold less, and micro-batches without a
record are skipped. All devices are on the mesh's `fsdp` axis, unless a row says otherwise. GiB of one chip; total =
arguments + outputs - aliased + temporaries + code, all of which the compiler lays out itself; if that is more,
arguments + the copy that a save makes of what is trained. `MFU at most` follows from the lower bound of the step's
time: it is no estimate of either. A row is of the code of its day.

A slice of half the chips of the smallest here is too small. There `arguments` double, and the copy of a save doubles
them again: more than a chip has for 7B on a `v5e:2x4` or `v6e:2x2`, 13B on a `v5e:4x4`, 34B on eight chips of v5p. Of
34B on a `v6e:4x8` (`--set accumulation=4`) the compiler says that it does not fit; stage 1 was not tried
below `v5e:2x2`.

{as_table(rows)}

What each chip receives in a step at the least, GB:

{as_table(links)}
"""


def _traffic(collectives: list[dict[str, Any]]) -> dict[str, str]:
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
    sums = {kind: sum(c["link_bytes"] for c in collectives if c["kind"] == kind) for kind in kinds}
    return {kind: f"{size / 1e9:.2f}" for kind, size in sums.items()}


if __name__ == "__main__":
    main()
