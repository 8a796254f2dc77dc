r"""Trains on TPU slices of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk, `pip install xpk`).

    python scripts/launch_gke.py --cluster my-cluster --zone us-west4-a --name finetune-7b --tpu-type v5litepod-64 \
        --image gcr.io/my-project/llava-jax --config configs/llava15_finetune_7b.py --workdir gs://my-bucket/finetune_7b

`scripts/Dockerfile` makes the image. Arguments after `--` go to `xpk workload create` (`-- --spot`); `--dry-run` prints
the command and runs nothing (add `-- --dry-run` instead to see what xpk would do). The processes find each other by
what GKE tells a TPU pod. Exit code 75, preempted and saved, restarts the workload, as xpk does by itself for a pod that
was killed; every other code of ours ends it. What the config names (`weights/`, `data/`, an earlier stage) must be in
the image or on a mount of the pods that `--set` names; the workdir alone may be in a bucket.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--name", required=True, help="of the workload")
    parser.add_argument("--tpu-type", required=True, help="such as v5litepod-64 or v6e-32")
    parser.add_argument("--image", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, help="gs:// folder that every pod can write")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--dry-run", action="store_true")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    arguments, more = parser.parse_args(argv[:split]), argv[split + 1 :]

    train = ["llava-jax", "train", f"--config={arguments.config}", f"--workdir={arguments.workdir}"]
    train += [f"--set={override}" for override in arguments.set]
    command = [
        *("xpk", "workload", "create"),
        f"--cluster={arguments.cluster}",
        f"--zone={arguments.zone}",
        f"--workload={arguments.name}",
        f"--tpu-type={arguments.tpu_type}",
        f"--docker-image={arguments.image}",
        f"--command={shlex.join(train)}",
        "--restart-on-exit-codes=75",
        "--max-restarts=1000",
        # A save of 7B with its moments to a bucket takes longer than the default of 30 s.
        "--termination-grace-period-seconds=300",
        *more,
    ]
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
