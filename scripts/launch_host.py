r"""Trains on this machine: one process drives all its devices, and runs again after every preemption.

    python scripts/launch_host.py --config configs/llava15_finetune_lora_7b.py --workdir runs/lora_7b

`--set a.b=value` goes through to `llava-jax train`; `--dry-run` prints the command and runs nothing. SIGTERM is passed
on: the run saves, and this program ends as the run does, with 75.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PREEMPTED = 75
# The default of 0.75 wastes a quarter of a GPU that nothing else uses.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)

    command = ["llava-jax", "train", f"--config={arguments.config}", f"--workdir={arguments.workdir}"]
    command += [f"--set={override}" for override in arguments.set]
    environment = ENVIRONMENT | os.environ
    if arguments.dry_run:
        print(shlex.join(["env", *(f"{name}={environment[name]}" for name in ENVIRONMENT), *command]))
        return 0
    return run(command, environment)


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs the command until it ends otherwise than preempted, or until a signal asks this program to end."""
    child: subprocess.Popen | None = None
    is_stopping = False

    def pass_on(number: int, frame: Any) -> None:
        nonlocal is_stopping
        del frame
        is_stopping = True
        # The terminal sends Ctrl-C to the child by itself.
        if child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    code = PREEMPTED
    while code == PREEMPTED and not is_stopping:
        child = subprocess.Popen(command, env=environment)
        code = child.wait()
    # A child that a signal killed has a negative code; a shell says 128 + the signal.
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
