r"""Trains through XManager (https://github.com/google-deepmind/xmanager, `pip install xmanager`), alone or as a sweep.

    xmanager launch scripts/launch_xmanager.py -- --config=configs/debug_cpu.py --workdir=runs/debug \
        --sweep=optim.learning_rate=1e-3 --sweep=optim.learning_rate=3e-3

Each value of a swept field is a work unit with a workdir of its own, `WORKDIR/optim.learning_rate=1e-3`; several
swept fields give all their combinations, one after the other with `--executor=local`. `--executor=vertex` and
`--executor=kubernetes` run `--image` (see scripts/Dockerfile) on `--resource=a100=8` or what else that executor of
XManager knows; `--dry-run` prints the work units and starts nothing. Every work unit is one machine and runs
scripts/launch_host.py, which runs again after exit code 75. TPU pods: launch_gke.py, launch_tpu_vm.py.
"""

import asyncio
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from xmanager import xm, xm_local

_CONFIG = flags.DEFINE_string("config", None, "Python file with get_config().", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, or of the sweep's runs.", required=True)
_SET = flags.DEFINE_multi_string("set", [], "a.b=value, for every work unit.")
_SWEEP = flags.DEFINE_multi_string("sweep", [], "a.b=value, one work unit for each value of a.b.")
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "vertex", "kubernetes"], "Where to run.")
_IMAGE = flags.DEFINE_string("image", None, "Container image, for vertex and kubernetes.")
_RESOURCE = flags.DEFINE_multi_string("resource", [], "name=amount in XManager's words, such as a100=8 or ram=1e11.")
# As the other launchers spell it; absl's own spelling has underscores, and it translates neither into the other.
_DRY_RUN = flags.DEFINE_boolean("dry-run", False, "Print what would run.")
flags.DEFINE_alias("dry_run", "dry-run")


def work_units(config: str, workdir: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[list[str]]:
    """The arguments of scripts/launch_host.py for each work unit."""
    choices: dict[str, list[str]] = {}
    for choice in sweep:
        choices.setdefault(choice.partition("=")[0], []).append(choice)
    units = []
    for combination in itertools.product(*choices.values()):
        folder = "/".join([workdir.rstrip("/"), *([",".join(combination)] if combination else [])])
        units.append(
            [f"--config={config}", f"--workdir={folder}", *(f"--set={item}" for item in [*overrides, *combination])]
        )
    return units


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
    units = work_units(_CONFIG.value, _WORKDIR.value, _SET.value, _SWEEP.value)
    requirements = xm.JobRequirements(**{name: float(n) for name, _, n in (r.partition("=") for r in _RESOURCE.value)})
    executor: Any
    match _EXECUTOR.value:
        case "local":
            executor = xm_local.Local(requirements)
            program = xm.Packageable(xm.Binary(path=sys.executable), executor.Spec(), args=[_host_launcher()])
        case "vertex" | "kubernetes" as name:
            if _IMAGE.value is None:
                raise app.UsageError(f"--executor={name} needs --image; scripts/Dockerfile makes one.")
            if requirements.accelerator in xm.TpuType:
                raise app.UsageError("TPUs need scripts/launch_gke.py or scripts/launch_tpu_vm.py.")
            executor = {"vertex": xm_local.Vertex, "kubernetes": xm_local.Kubernetes}[name](requirements)
            program = xm.Packageable(xm.Container(image_path=_IMAGE.value), executor.Spec())
    if _DRY_RUN.value:
        what = [sys.executable, _host_launcher()] if _EXECUTOR.value == "local" else [_IMAGE.value]
        for number, unit in enumerate(units, start=1):
            print(f"{_EXECUTOR.value} work unit {number}, {executor.requirements}: {shlex.join([*what, *unit])}")
        return
    asyncio.run(launch(program, executor, units))


async def launch(program: xm.Packageable, executor: xm.Executor, units: Sequence[Sequence[str]]) -> None:
    async with xm_local.create_experiment(experiment_title="llava_jax") as experiment:
        (executable,) = experiment.package([program])
        for arguments in units:
            unit = await experiment.add(xm.Job(executable, executor, args=arguments))
            if isinstance(executor, xm_local.Local):
                # One machine, one run at a time.
                await unit.wait_until_complete()


def _host_launcher() -> str:
    return str(Path(__file__).with_name("launch_host.py"))


if __name__ == "__main__":
    app.run(main)
