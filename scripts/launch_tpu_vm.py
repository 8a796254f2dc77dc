r"""Trains on a TPU VM or pod slice with nothing but gcloud: makes it, installs this checkout's commit on it, trains.

    python scripts/launch_tpu_vm.py --name llava --zone us-west4-a --type v5litepod-16 --version v2-alpha-tpuv5-lite \
        --config configs/llava15_pretrain_7b.py --workdir gs://my-bucket/pretrain_7b

Arguments after `--` go to `gcloud ... create` (`-- --spot`); `--dry-run` prints the shell program and runs nothing.
The same command continues on a VM that is there, with the commit that is checked out then, and starts one that is
stopped. JAX finds the workers of a TPU VM by itself. Exit code 75 runs the training again, on a new VM when the old one
was taken away; it ends when you stop the VM. A VM that cannot be made is tried again every minute: stop it if what
gcloud says is about an argument. It is left standing at the end: delete it.

What the config names (`weights/`, `data/`, an earlier stage in `runs/`) must be on every worker, on a disk or mount of
yours that `--set` names: `--set data.image_root=/mnt/data --set init.decoder=/mnt/weights/vicuna-7b-v1.5 ...`. The
workdir alone may be in a bucket. Relative paths, `--config` too, begin at `~/llava_jax` on the workers, the top of the
commit. A launch replaces what the last launch put there and leaves what you put there; all of it goes with a VM that
is taken away.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
# The files of the last launch are listed, since those beside them are the user's. The package is built from the
# archive, where no build of an older commit lies. The VM images have Python 3.10, which JAX has left.
INSTALL = " && ".join(
    [
        "[ ! -e llava_jax/.git ] || { echo 'A launch overwrites llava_jax, now a clone; rename it.' >&2; exit 2; }",
        "mkdir -p llava_jax",
        "touch .llava_jax.files",
        r"(cd llava_jax && xargs -d '\n' rm -f --) < .llava_jax.files",
        "tar -tzf .llava_jax.tar.gz | grep -v '/$' > .llava_jax.files",
        "tar -xzf .llava_jax.tar.gz -C llava_jax",
        "pip3 install -q --user uv",
        ".local/bin/uv venv -q --clear --python 3.12 .llava_jax.venv",
        ".local/bin/uv pip install -q -p .llava_jax.venv './.llava_jax.tar.gz[tpu]'",
    ]
)
PROGRAM = """\
set -u
archive=$(mktemp -d)/.llava_jax.tar.gz
git -C {top} archive --format=tar.gz --output="$archive" HEAD || exit
code=75
while [ "$code" -eq 75 ]; do
    state=$({tpu} describe {name} --format='value(state)')
    case "$state" in
        READY) ;;
        '') {tpu} create {name} {create} || sleep 60; continue ;;
        STOPPED) {tpu} start {name} || sleep 60; continue ;;
        # Taken away, it stays in the list, useless, until it is deleted.
        PREEMPTED | TERMINATED) {tpu} delete {name} --quiet || sleep 60; continue ;;
        # On the way to another state: CREATING, STOPPING, REPAIRING ...
        *ING) echo {name} "is $state; waiting." >&2; sleep 60; continue ;;
        *) echo "A VM must be READY or STOPPED;" {name} "is $state. Delete it or take another --name." >&2; exit 2 ;;
    esac
    # The training ends with the code of the first worker that failed.
    {tpu} scp "$archive" {name}: {all} && {tpu} ssh {name} {all} --command={install} &&
        {tpu} ssh {name} {all} --command={train}
    code=$?
    [ "$code" -eq 0 ] || case $({tpu} describe {name} --format='value(state)') in
        READY) ;;
        # Whoever stopped it does not want it started again.
        STOPPING | STOPPED) exit "$code" ;;
        *) code=75 ;;
    esac
done
exit "$code"
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--type", required=True, help="accelerator type, such as v5litepod-16")
    parser.add_argument("--version", required=True, help="runtime version, such as v2-alpha-tpuv5-lite")
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, help="gs:// folder")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--dry-run", action="store_true")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    arguments, more = parser.parse_args(argv[:split]), argv[split + 1 :]

    train = ["llava-jax", "train", f"--config={arguments.config}", f"--workdir={arguments.workdir}"]
    train += [f"--set={override}" for override in arguments.set]
    program = PROGRAM.format(
        top=shlex.quote(str(TOP)),
        # One variable of gcloud's own instead of --zone on every line.
        tpu=f"CLOUDSDK_COMPUTE_ZONE={shlex.quote(arguments.zone)} gcloud compute tpus tpu-vm",
        name=shlex.quote(arguments.name),
        create=shlex.join([f"--accelerator-type={arguments.type}", f"--version={arguments.version}", *more]),
        install=shlex.quote(INSTALL),
        train=shlex.quote(f"cd llava_jax && ../.llava_jax.venv/bin/{shlex.join(train)}"),
        # All at once: a worker that started last would be waited for by those that it waits for.
        all="--worker=all --batch-size=all",
    )
    if arguments.dry_run:
        print(program, end="")
        return 0
    return subprocess.run(["bash", "-c", program]).returncode


if __name__ == "__main__":
    sys.exit(main())
