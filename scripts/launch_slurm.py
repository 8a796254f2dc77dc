r"""Trains on GPU nodes under Slurm: one process a GPU, requeued by itself when preempted or out of time.

    python scripts/launch_slurm.py --nodes 2 --gpus-per-node 8 --time 24:00:00 \
        --config configs/llava15_finetune_7b.py --workdir /shared/runs/finetune_7b

Arguments after `--` go to `sbatch` (`-- --partition=gpu --account=me`); `--dry-run` prints the submission and submits
nothing. JAX reads Slurm's own variables, so the processes find each other. Five minutes before the time is up, and at
a preemption, SIGTERM comes; the run saves and exits with 75, and the job queues again under its number.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import PurePath

JOB = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --gpu-bind=none
#SBATCH --time={time}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# When one process dies the others cannot go on; those that save need their time.
srun --kill-on-bad-exit=0 --wait=300 {train}
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--time", required=True, help="limit of one turn, as Slurm writes it")
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, help="folder that every node can write")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--dry-run", action="store_true")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    arguments, more = parser.parse_args(argv[:split]), argv[split + 1 :]

    train = ["llava-jax", "train", f"--config={arguments.config}", f"--workdir={arguments.workdir}"]
    train += [f"--set={override}" for override in arguments.set]
    name = PurePath(arguments.config).stem
    job = JOB.format(
        # sbatch reads its lines with a shell's quotes.
        name=shlex.quote(name),
        log=shlex.quote(f"{name}-%j.log"),
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        time=shlex.quote(arguments.time),
        train=shlex.join(train),
    )
    if arguments.dry_run:
        print(f"{shlex.join(['sbatch', *more])} <<'JOB'\n{job}JOB")
        return 0
    return subprocess.run(["sbatch", *more], input=job, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
