"""Several processes as one run: how they find each other, what one does for all, and how they end together."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

# Neither the key-value store nor the kind of machine has a public name; Orbax takes the same way.
from jax._src import cloud_tpu_init, distributed

from llava_jax.errors import UserError

# Seconds that a process which ends waits for the others, and between two looks at what the others say.
PATIENCE = 10.0
PAUSE = 0.2

_run = 0


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of one run, if the environment says that there are several; before any use of a device.

    `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` says it anywhere; Slurm, Open MPI and
    TPU pods say it by themselves (then JAX finds out who is who). A process alone joins nothing.
    """
    # SIGTERM is answered by train/stop.py; JAX's own service would take the signal away from it.
    jax.config.update("jax_enable_preemption_service", False)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if name in environment]
    if len(given) == len(names):
        address, total, number = (environment[name] for name in names)
        try:
            numbers = int(total), int(number)
        except ValueError:
            raise UserError(
                f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers; got {total!r}, {number!r}."
            ) from None
        if not 0 <= numbers[1] < numbers[0]:
            raise UserError(
                f"JAX_PROCESS_ID must be at least 0 and less than JAX_NUM_PROCESSES={total}; got {number}. "
                "Number the processes from 0."
            )
        if numbers[0] > 1:
            jax.distributed.initialize(address, *numbers, cluster_detection_method="deactivate")
    elif given and given != [names[0]]:
        missing = [name for name in names if name not in environment]
        raise UserError(f"Several processes need all of {', '.join(names)}; {', '.join(missing)} is missing. Set it.")
    elif given or _is_announced(environment):
        jax.distributed.initialize()


def _is_announced(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI have started several processes, or this is a TPU machine, which may be one of many."""
    if "tpu" in environment.get("JAX_PLATFORMS", "tpu") and cloud_tpu_init.running_in_cloud_tpu_vm:
        return True
    if "SLURM_PROCID" in environment:
        # A step started by srun; sbatch alone sets SLURM_NTASKS too, and runs its script once.
        return int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))) > 1
    return int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def begin_run() -> None:
    """Makes the keys of a run its own: what was told in an earlier one of these processes no longer counts."""
    global _run
    _run += 1


def count() -> int:
    """How many processes there are; unlike `jax.process_count`, it starts no devices to answer."""
    return distributed.global_state.num_processes


def index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id


def are_several() -> bool:
    return count() > 1


def pause() -> float:
    """Seconds between two questions to the first process, which answers all of them."""
    return PAUSE * max(1.0, count() / 16)


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return index() == 0


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The first process runs the block before the others enter it: it makes the file that they then find."""
    if not is_first():
        _wait_for(f"{name}/0")
    yield
    if is_first():
        tell(f"{name}/0", "done")


def tell(key: str, value: str) -> None:
    """Says something to the other processes; the first word on a key stands."""
    client = _client()
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(_key(key), value)


def heard(key: str) -> str | None:
    """What some process has told, or None."""
    client = _client()
    if client is None:
        return None
    try:
        return client.key_value_try_get(_key(key))
    except jax.errors.JaxRuntimeError:
        return None


def heard_all(name: str) -> list[str]:
    """What the processes have told so far under `name/<process>`."""
    client = _client()
    if client is None:
        return []
    try:
        return [value for _, value in client.key_value_dir_get(_key(f"{name}/"))]
    except jax.errors.JaxRuntimeError:
        return []


def all_agree(name: str, ok: bool) -> bool:
    """Whether every process says that it is; each asks, and all get the same answer."""
    return all(map(json.loads, _all_words(name, json.dumps(ok))))


def check_same(name: str, word: str, what: str) -> None:
    """Raises `UserError` unless every process has the same word: what follows from it must not differ."""
    if len(set(_all_words(name, word))) > 1:
        raise UserError(f"All processes of a run must have the same {what}; they differ. Give each the same.")


def _all_words(name: str, word: str) -> list[str]:
    if not are_several():
        return [word]
    tell(f"{name}/{index()}", word)
    while len(words := heard_all(name)) < count():
        time.sleep(pause())
    return words


def try_for_a_while(action: Callable[[], None]) -> None:
    """Does something on the way out that may never end, as writing to a disk that is gone; waits only so long."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(PATIENCE)


def leave(code: int) -> NoReturn:
    """Ends this process for good, the first one last: the others could not outlive it to say why they ended.

    Nothing is waited for that a dead or hanging process could hold up, as the barrier of an orderly end is.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if are_several():
        tell(f"left/{index()}", "yes")
        end = time.monotonic() + PATIENCE
        while is_first() and len(heard_all("left")) < count() and time.monotonic() < end:
            time.sleep(pause())
    os._exit(code)


def _wait_for(key: str) -> str:
    """What is told under a key, whenever that is; the signal handler's thread ends a wait that has become vain."""
    while (word := heard(key)) is None:
        time.sleep(pause())
    return word


def _client() -> Any:
    return distributed.global_state.client


def _key(key: str) -> str:
    return f"llava_jax/{_run}/{key}"
