"""The one loop: it knows steps, time and checkpoints, and neither models, data formats nor objectives."""

import contextlib
import json
import os
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llava_jax.convert.card import ModelCard, write_card
from llava_jax.convert.folder import TOKENIZER, copy_tokenizer
from llava_jax.data.index import Index, check_refusals, load_index
from llava_jax.data.pipeline import Batch, RowReader, read_batches
from llava_jax.data.plan import Plan, make_plan
from llava_jax.data.rows import Conversations, Needs
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import CheckpointError, NumericsError, Preempted, UserError
from llava_jax.shapes import LlavaConfig
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.config import TrainConfig, flatten
from llava_jax.train.metrics import MetricsLog, Progress
from llava_jax.train.optim import make_optimizer, make_schedule
from llava_jax.train.record import RunRecord
from llava_jax.train.sharding import batch_sharding, make_mesh, num_batch_shards
from llava_jax.train.state import Layout, State, fresh_state, restored_state, saved_trees
from llava_jax.train.step import jit_step

# Batch entries that say what was read; the device has no use for them.
HOST_ONLY = ("record_ids", "num_replaced")
# Fields that may differ between the start of a run and its continuation: they change no number of it.
MAY_CHANGE = (
    "init.",
    "mesh.",
    "checkpoint_every",
    "log_every",
    "data.workers",
    "data.image_root",
    "data.records",
    "data.tokenizer",
)


def train(config: TrainConfig, workdir: str, *, name: str = "train") -> None:
    """Runs a config to its last step; the same call continues after any interruption.

    Raises:
      Preempted: SIGTERM came; the state is saved.
      NumericsError: a step was not finite; the steps saved before it are intact.
      DataError, CheckpointError, UserError: the input is at fault; the message says how.
    """
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--workdir must be a folder that can be written; got {workdir!r}: {error}.") from None
    with RunRecord(workdir) as record, _stop_on_sigterm() as stop, contextlib.closing(Checkpoints(workdir)) as saved:
        mesh = make_mesh(config.mesh)
        needs = data_needs(config)
        index = load_index(config.data.records, config.data.rows, needs, Path(workdir, "cache"))
        check_refusals(index, config.data.max_refused)
        plan = plan_data(config, index, rows_multiple=num_batch_shards(mesh) * config.accumulation)
        record.num_steps = plan.num_steps
        optimizer = make_optimizer(config.optim, plan.num_steps)
        layout = Layout(config, optimizer, mesh)
        position = {"plan": plan.fingerprint(), "data": index.fingerprint}

        step = saved.latest_step()
        if step is None:
            _describe(config, workdir)
            state = fresh_state(layout, optimizer, saved)
        else:
            _check_same_run(config, workdir, saved.position(step), position)
            state = restored_state(layout, saved, step)
        record.step = state.step
        print(f"{name}: {_summary(config, index, plan, state)}", flush=True)
        if state.step == plan.num_steps:
            return

        reader = RowReader(
            index=index,
            plan=plan,
            rows=config.data.rows,
            needs=needs,
            first_step=state.step,
            process=jax.process_index(),
            num_processes=jax.process_count(),
        )
        report = _Report(config, workdir, name, first_step=state.step, num_steps=plan.num_steps)
        compiled = None
        for batch in read_batches(reader, num_workers=config.data.workers):
            arrays = _to_devices(batch, batch_sharding(mesh))
            arguments = (state.trainable, state.frozen, state.opt_state, arrays)
            if compiled is None:
                # Compiled ahead, once: a batch of another shape is an error, not a second compilation.
                compiled = jit_step(layout, optimizer).lower(*arguments).compile()
            state.trainable, state.opt_state, metrics = compiled(*arguments)
            report.add(state.step, metrics, batch)
            state.step += 1
            is_last = state.step == plan.num_steps
            # Read once: a signal between the two questions below would stop the run without saving it.
            stopping = stop.is_set
            if state.step % config.checkpoint_every == 0 or is_last or stopping:
                report.flush()
                trainable, opt_state = saved_trees(layout, state)
                saved.save(state.step, trainable, opt_state, position)
                record.step = state.step
            if stopping and not is_last:
                saved.wait()
                raise Preempted(f"SIGTERM at step {state.step} of {plan.num_steps}: saved; run the same command again.")
        saved.wait()
        report.close()


def data_needs(config: TrainConfig) -> Needs:
    """What turning a config's records into arrays needs of its model and tokenizer."""
    data, model = config.data, config.model
    tokenizer = Tokenizer(data.tokenizer)
    vocabulary = model.text.vocab_size if isinstance(model, LlavaConfig) else model.caption.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"The model's vocabulary must hold every token; it has {vocabulary}, the tokenizer in "
            f"{data.tokenizer!r} {tokenizer.vocab_size}. Raise vocab_size or choose another tokenizer."
        )
    return Needs(
        tokenizer=tokenizer,
        image_root=data.image_root,
        image_size=model.vision.image_size,
        image_slots=model.num_features if isinstance(model, LlavaConfig) else model.vision.num_patches,
    )


def plan_data(config: TrainConfig, index: Index, *, rows_multiple: int) -> Plan:
    data = config.data
    return make_plan(
        index,
        data.rows.capacity,
        seed=config.seed,
        shuffle=data.shuffle,
        batch_rows=data.batch_rows,
        batch_records=data.batch_records,
        epochs=data.epochs,
        steps=data.steps,
        rows_multiple=rows_multiple,
    )


class _Report:
    """Fetches a step's numbers when the next one is already running, so that the device never waits for us."""

    def __init__(self, config: TrainConfig, workdir: str, name: str, *, first_step: int, num_steps: int):
        self._factor = make_schedule(config.optim, num_steps)
        self._log_every = config.log_every
        self._log = MetricsLog(workdir, first_step=first_step) if jax.process_index() == 0 else None
        self._progress = Progress(first_step=first_step, num_steps=num_steps, name=name)
        self._pending: tuple[int, dict[str, jax.Array], Batch] | None = None
        self._last = time.perf_counter()
        self.num_replaced = 0

    def add(self, step: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
        self.flush()
        self._pending = step, metrics, batch

    def flush(self) -> None:
        """Writes the pending step; raises `NumericsError` if it was not finite."""
        if self._pending is None:
            return
        step, metrics, batch = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not values.pop("finite"):
            raise NumericsError(
                f"Loss and gradients must be finite; step {step} gave loss={values['loss']}, "
                f"grad_norm={values['grad_norm']}. It changed nothing and was not saved. Lower optim.learning_rate "
                "or look at its records."
            )
        self.num_replaced += int(batch["num_replaced"].sum())
        line = values | {
            "learning_rate": self._factor(step),
            "seconds": round(seconds, 6),
            "records": f"{zlib.crc32(np.ascontiguousarray(batch['record_ids']).tobytes()):08x}",
            "replaced": int(batch["num_replaced"].sum()),
        }
        if self._log is not None and step % self._log_every == 0:
            self._log.write(step, line)
        self._progress.update(step, loss=values["loss"], tokens_per_second=values["tokens"] / seconds)

    def close(self) -> None:
        self._progress.close()
        if self._log is not None:
            self._log.close()
        if self.num_replaced:
            print(f"{self.num_replaced} damaged records were replaced; see 'replaced' in the metrics.", flush=True)


class _Stop:
    is_set = False


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[_Stop]:
    """Turns SIGTERM into a flag that the loop reads between steps; restores the handler after."""
    stop = _Stop()

    def handle(number: int, frame: Any) -> None:
        del number, frame
        stop.is_set = True

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _to_devices(batch: Batch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
        if name not in HOST_ONLY
    }


def _describe(config: TrainConfig, workdir: str) -> None:
    """Makes the workdir say what it holds, so that it opens as a model wherever it is copied."""
    if jax.process_index() != 0:
        return
    rows = config.data.rows
    template = rows.template.name if isinstance(rows, Conversations) else None
    copy_tokenizer(config.data.tokenizer, Path(workdir, TOKENIZER))
    label = f"trained: {', '.join(config.trainable)}"
    write_card(workdir, ModelCard(model=config.model, template=template, image_mode=rows.image_mode, label=label))
    temporary = Path(workdir, "config.json.tmp")
    temporary.write_text(json.dumps(flatten(config), indent=2) + "\n")
    os.replace(temporary, Path(workdir, "config.json"))


def _check_same_run(
    config: TrainConfig, workdir: str, saved_position: dict[str, Any], position: dict[str, Any]
) -> None:
    """Refuses to continue a run with another config or other data."""
    path = Path(workdir, "config.json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    now = json.loads(json.dumps(flatten(config)))
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise CheckpointError(
            f"A run continues only with the config it began with; {workdir!r} has another: {'; '.join(changed[:5])}. "
            "Put it back or choose another --workdir."
        )
    if saved_position != position:
        raise CheckpointError(
            f"A run continues only on the data it began with; the records, the tokenizer or the plan of {workdir!r} "
            "have changed. Put them back or choose another --workdir."
        )


def _summary(config: TrainConfig, index: Index, plan: Plan, state: State) -> str:
    """One line that says what is about to run."""
    refused = ", ".join(f"{count} {reason}" for reason, count in index.counts().items())
    used = int(index.tokens[plan.records].sum())
    full = plan.num_rows * config.data.rows.capacity.tokens
    trained = sum(value.size for value in state.trainable.values())
    total = trained + sum(value.size for value in state.frozen.values())
    return (
        f"{len(index.usable):,} of {len(index.records):,} records usable"
        + (f" (refused: {refused})" if refused else "")
        + f"; {plan.num_steps:,} steps of {plan.rows_per_step} rows, {used / full:.1%} full; "
        + f"training {trained:,} of {total:,} parameters"
        + (f"; resuming at step {state.step:,}" if state.step else "")
    )
