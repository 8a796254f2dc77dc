"""The one loop: it knows steps, time and checkpoints, and neither models, data formats nor objectives."""

import contextlib
import functools
from pathlib import Path

from llava_jax.data.images import check_mode
from llava_jax.data.index import Index, check_refusals, check_replaced, load_index
from llava_jax.data.pipeline import RowReader, read_batches
from llava_jax.data.plan import Plan, make_plan
from llava_jax.data.rows import Needs
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import Preempted, UserError
from llava_jax.shapes import LlavaConfig
from llava_jax.train import processes
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.config import TrainConfig
from llava_jax.train.evaluation import HeldOut, check_evaluation
from llava_jax.train.flops import seconds_at_peak
from llava_jax.train.forecast import longest_save, save_forecast
from llava_jax.train.goodput import Clock
from llava_jax.train.identity import check_same_run, config_hash, describe
from llava_jax.train.lock import only_run
from llava_jax.train.metrics import Report
from llava_jax.train.mirror import Mirror, mirrored
from llava_jax.train.optim import make_optimizer
from llava_jax.train.profiling import Profiler
from llava_jax.train.record import RunRecord, named_shortage
from llava_jax.train.sharding import make_mesh, num_batch_shards, process_places, to_devices
from llava_jax.train.state import Layout, State, fresh_state, resumed_state, saved_trees
from llava_jax.train.step import jit_step
from llava_jax.train.stop import Stop
from llava_jax.train.watchdog import Watchdog


def train(config: TrainConfig, workdir: str, *, name: str = "train") -> None:
    """Runs a config to its last step; the same call continues after any interruption.

    A SIGTERM before the first step ends the process at once, with the exit code of `Preempted`.

    Raises:
      Preempted: SIGTERM came; the state is saved.
      NumericsError: a step was not finite; the steps saved before it are intact.
      DataError, CheckpointError, UserError: the input is at fault; the message says how.
    """
    check_evaluation(config)
    processes.begin_run()
    # Twice: the run's record must see an error with its exit code, and may itself be what finds no room.
    with named_shortage(workdir), mirrored(workdir) as mirror, only_run(mirror), RunRecord(mirror) as record:
        stop = Stop(record)
        with (
            stop.listening(),
            named_shortage(workdir),
            contextlib.closing(Checkpoints(workdir, keep=config.life.keep)) as saved,
        ):
            _run(config, mirror, name, record, stop, saved)


def _run(config: TrainConfig, mirror: Mirror, name: str, record: RunRecord, stop: Stop, saved: Checkpoints) -> None:
    clock = Clock()
    workdir = mirror.folder
    record.seconds = clock.total
    mesh = make_mesh(config.mesh)
    needs = data_needs(config)
    with processes.first_before_others("index"):
        mirror.fetch()
        look_again = processes.is_first() and not saved.steps()
        index = load_index(config.data.records, config.data.rows, needs, Path(workdir, "cache"), look_again=look_again)
        mirror.carry()
    check_refusals(index, config.data.max_refused)
    plan = plan_data(config, index, rows_multiple=num_batch_shards(mesh) * config.accumulation)
    position = {"plan": plan.fingerprint(), "data": index.fingerprint}
    processes.check_same("plan", f"{position['plan']}/{plan.rows_per_step}", "records, pictures and tokenizer")
    processes.check_same("config", config_hash(config), "config and --set values")
    record.num_steps = plan.num_steps
    optimizer = make_optimizer(config.optim, plan.num_steps)
    layout = Layout(config, optimizer, mesh)

    state = resumed_state(layout, saved, check=functools.partial(check_same_run, config, workdir, position))
    if state is None:
        describe(config, workdir)
        mirror.carry()
        state = fresh_state(layout, optimizer, saved)
    record.step = state.step
    saved.rehearse(*saved_trees(layout, state))
    if processes.is_first():
        print(f"{name}: {_summary(config, index, plan, state, num_shards=num_batch_shards(mesh))}", flush=True)
    if state.step == plan.num_steps:
        return
    if processes.is_first():
        print(f"{name}: {save_forecast(mirror.workdir, (state.trainable, state.opt_state))}", flush=True)

    places = process_places(mesh, plan.rows_per_step, accumulation=config.accumulation)
    reader = RowReader(index=index, plan=plan, rows=config.data.rows, needs=needs, first_step=state.step, places=places)
    held_out = None
    if config.life.eval_every is not None:
        held_out = HeldOut(config, needs, workdir, mesh, rows_per_step=plan.rows_per_step)
    clock.lap("start")
    first_step = state.step
    save_seconds = longest_save((state.trainable, state.opt_state))
    report = Report(config, mirror, name, clock, first_step=first_step, num_steps=plan.num_steps)
    compiled = None
    with (
        contextlib.closing(report),
        contextlib.closing(Profiler(workdir, config.life.profile_steps)) as profiler,
        Watchdog(config.life.stall_seconds, workdir, stop.end_process) as watchdog,
        contextlib.closing(read_batches(reader, num_workers=config.data.workers)) as batches,
    ):
        watchdog.beat()
        for batch in batches:
            clock.lap("data")
            arrays = to_devices(batch, mesh, places, plan.rows_per_step, accumulation=config.accumulation)
            arguments = (state.trainable, state.frozen, state.opt_state, arrays, stop.votes(mesh))
            if compiled is None:
                # Compiled ahead, once: a batch of another shape is an error, not a second compilation.
                with watchdog.paused():
                    step = jit_step(layout, optimizer, most_records=plan.most_records)
                    compiled = step.lower(*arguments).compile()
                    report.seconds_at_peak = seconds_at_peak(layout, arrays)
                    stop.start_stepping()
                clock.lap("start")
            profiler.before(state.step)
            state.trainable, state.opt_state, metrics = compiled(*arguments)
            report.add(state.step, metrics)
            check_replaced(report.num_replaced, plan.num_records(first_step, state.step), config.data.max_refused)
            profiler.after(state.step, metrics)
            state.step += 1
            watchdog.beat()
            clock.lap("step")
            is_last = state.step == plan.num_steps
            # Asked once: a signal between the two questions below would stop the run without saving it.
            stopping = stop.is_agreed(report.stop_votes)
            if state.step % config.checkpoint_every == 0 or is_last or stopping:
                eval_loss, every = None, config.life.eval_every
                if held_out is not None and every and not stopping and (is_last or state.step % every == 0):
                    eval_loss = held_out.loss(state.trainable, state.frozen, stop, beat=watchdog.beat)
                    clock.lap("eval")
                report.flush(**({} if eval_loss is None else {"eval_loss": eval_loss}))
                trainable, opt_state = saved_trees(layout, state)
                # Before the step itself becomes visible: a saved step has the metrics of all steps before it.
                mirror.carry()
                # Which waits for the save before, if that is still being written.
                with watchdog.patient(save_seconds):
                    saved.save(state.step, trainable, opt_state, position, eval_loss=eval_loss)
                # Copies, where layers are stacked in memory: the next steps need their room.
                del trainable, opt_state
                record.step = state.step
                watchdog.beat()
                clock.lap("save")
            if stopping and not is_last:
                with watchdog.patient(save_seconds):
                    saved.wait()
                raise Preempted(f"SIGTERM at step {state.step} of {plan.num_steps}: saved; run the same command again.")
        with watchdog.patient(save_seconds):
            saved.wait()
        clock.lap("save")


def data_needs(config: TrainConfig) -> Needs:
    """What turning a config's records into arrays needs of its model and tokenizer."""
    data, model = config.data, config.model
    tokenizer = open_tokenizer(data.tokenizer, data.rows.added_tokens)
    vocabulary = model.text.vocab_size if isinstance(model, LlavaConfig) else model.caption.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"The model's vocabulary must hold every token; it has {vocabulary}, the tokenizer in "
            f"{data.tokenizer!r} {tokenizer.vocab_size}. Raise vocab_size or choose another tokenizer."
        )
    if isinstance(model, LlavaConfig):
        check_mode(data.rows.image_mode, model)
    return Needs(
        tokenizer=tokenizer,
        image_root=data.image_root,
        image_size=model.vision.image_size,
        num_features=model.num_features if isinstance(model, LlavaConfig) else model.vision.num_patches,
        max_positions=model.text.max_positions if isinstance(model, LlavaConfig) else None,
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


def _summary(config: TrainConfig, index: Index, plan: Plan, state: State, *, num_shards: int) -> str:
    """One line that says what is about to run."""
    refused = ", ".join(f"{count} {reason}" for reason, count in index.counts().items())
    used = int(index.tokens[plan.records].sum())
    finest = plan.rows_per_step // num_shards
    rows, fewest = (plan.rows_computed(accumulation) for accumulation in (config.accumulation, finest))
    share, could = (used / config.data.rows.capacity.tokens / x.sum() for x in (rows, fewest))
    hint = f" (accumulation={finest} would skip more: {could:.1%})" if could > 1.2 * share else ""
    trained = sum(value.size for value in state.trainable.values())
    total = trained + sum(value.size for value in state.frozen.values())
    return (
        f"{len(index.usable):,} of {len(index.records):,} records usable"
        + (f" (refused: {refused})" if refused else "")
        + f"; {plan.num_steps:,} steps of {rows.mean():.4g} rows, {share:.1%} full"
        + (hint if isinstance(config.model, LlavaConfig) else "")
        + "; "
        + f"training {trained:,} of {total:,} parameters"
        + (f"; resuming at step {state.step:,}" if state.step else "")
    )
