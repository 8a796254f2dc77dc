"""What a run tells: a line per step in JSONL, curves in TensorBoard, progress on the terminal."""

import importlib
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from llava_jax.errors import CheckpointError, NumericsError, UserError
from llava_jax.train import processes
from llava_jax.train.config import TrainConfig
from llava_jax.train.goodput import Clock
from llava_jax.train.mirror import Mirror
from llava_jax.train.optim import make_schedule

WANDB_ID = "wandb_id"
METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends each step's numbers; on resume forgets what lies past the step that was restored."""

    def __init__(self, workdir: str, *, first_step: int, wandb_project: str | None = None, run_name: str = ""):
        path = Path(workdir) / METRICS_FILE
        kept = _lines_before(path, first_step)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)
        self._boards: list[_Board | _Wandb] = [_Board(Path(workdir) / "tensorboard", first_step=first_step)]
        if wandb_project is not None:
            self._boards.append(_Wandb(wandb_project, Path(workdir), run_name))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records a step, counted from 0."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for board in self._boards:
            board.write(step, {name: value for name, value in values.items() if isinstance(value, float)})

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


class _Board:
    """TensorBoard's own event writer; a restart hides the curves past the step it restarts from."""

    def __init__(self, folder: Path, *, first_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Generated code, whose names no type checker sees.
        self._proto: Any = event_pb2
        self._writer = EventFileWriter(str(folder))
        restart = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._writer.add_event(self._proto.Event(wall_time=time.time(), step=first_step, session_log=restart))

    def write(self, step: int, values: dict[str, float]) -> None:
        event = self._proto.Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases, for those who ask for it; a resumed workdir goes on in its old run."""

    def __init__(self, project: str, workdir: Path, run_name: str):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UserError(
                f"life.wandb_project={project!r} needs Weights & Biases. Run pip install -e '.[wandb]', or set it "
                "to none."
            ) from None
        # Of the run, not of the path: containers give many workdirs the same one.
        known = workdir / WANDB_ID
        if not known.is_file():
            known.write_text(secrets.token_hex(8))
        self._run: Any = wandb.init(
            project=project, dir=workdir, name=run_name or None, id=known.read_text(), resume="allow"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """The steps that a workdir has recorded, in order."""
    return [json.loads(line) for line in _lines_before(Path(workdir) / METRICS_FILE, None)]


def _lines_before(path: Path, step: int | None) -> list[str]:
    """Complete lines of steps before `step`; a kill may have cut the last line short."""
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n") and (step is None or json.loads(line)["step"] < step):
                lines.append(line)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} must hold one step a line; line {number} is none: {error!r}. Remove that line."
            ) from None
    return lines


class Progress:
    """A bar with loss, tokens/s, MFU and time left on a terminal; plain lines, a few seconds apart, elsewhere."""

    def __init__(self, *, first_step: int, num_steps: int, name: str, seconds_between_lines: float = 10.0):
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            initial=first_step, total=num_steps, desc=name, unit="step", disable=not self._is_terminal, file=sys.stderr
        )
        self._name, self._num_steps, self._first_step = name, num_steps, first_step
        self._pause = seconds_between_lines
        self._start = self._last_line = time.perf_counter()

    def update(self, step: int, *, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        """Shows that `step` (counted from 0) is done; `mfu` only where there is one."""
        told = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s" + ("" if mfu is None else f", {mfu:.1%} MFU")
        if self._is_terminal:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(1)
            return
        now = time.perf_counter()
        if now - self._last_line >= self._pause or step + 1 == self._num_steps:
            self._last_line = now
            left = (now - self._start) / (step + 1 - self._first_step) * (self._num_steps - step - 1)
            print(f"{self._name}: step {step + 1}/{self._num_steps}, {told}, {left:.0f} s left", flush=True)

    def close(self) -> None:
        self._bar.close()


class Report:
    """Fetches a step's numbers when the next one is already running, so that the device never waits for us."""

    def __init__(
        self, config: TrainConfig, mirror: Mirror, name: str, clock: Clock, *, first_step: int, num_steps: int
    ):
        self._factor = make_schedule(config.optim, num_steps)
        self._log_every = config.log_every
        self._replaced = 0
        is_first = processes.is_first()
        project = config.life.wandb_project
        run_name = Path(mirror.workdir).name
        self._log = None
        if is_first:
            self._log = MetricsLog(mirror.folder, first_step=first_step, wandb_project=project, run_name=run_name)
        self._progress = Progress(first_step=first_step, num_steps=num_steps, name=name) if is_first else None
        self._clock = clock
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._last = time.perf_counter()
        self.num_replaced = 0
        # Of one step without skipped micro-batches; None where the devices have no published peak, and so no MFU.
        self.seconds_at_peak: float | None = None
        # Devices whose process was asked to stop, as the newest finished step counted them.
        self.stop_votes = 0.0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's numbers, and writes those of the step before if it is one of every `log_every`."""
        if self._pending is not None:
            self._fetch(is_written=self._pending[0] % self._log_every == 0)
        self._pending = step, metrics

    def flush(self, **more: float) -> None:
        """Writes the pending step, `more` beside it: what is saved, and what ends a run, has its line."""
        if self._pending is not None:
            self._fetch(is_written=True, **more)

    def _fetch(self, *, is_written: bool, **more: float) -> None:
        """Raises `NumericsError` if the pending step was not finite."""
        assert self._pending is not None
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.stop_votes = values.pop("stop_votes")
        if not values.pop("finite"):
            raise NumericsError(
                f"Loss and gradients must be finite; step {step} gave loss={values['loss']}, "
                f"grad_norm={values['grad_norm']}. It changed nothing and was not saved. Lower optim.learning_rate "
                "or look at its records."
            )
        self.num_replaced += int(values["replaced"])
        self._replaced += int(values["replaced"])
        mfu = None if self.seconds_at_peak is None else self.seconds_at_peak * values["computed"] / seconds
        if is_written:
            # Of buckets and replaced records, all since the line before.
            line = values | {
                "learning_rate": self._factor(step),
                "seconds": round(seconds, 6),
                **({} if mfu is None else {"mfu": round(mfu, 6)}),
                **{f"seconds_{name}": round(value, 6) for name, value in self._clock.take().items()},
                # The sum, modulo 2^32, of the checksums of all rows on all hosts.
                "records": f"{int(values['records']):08x}",
                "replaced": self._replaced,
                **more,
            }
            self._replaced = 0
            if self._log is not None:
                self._log.write(step, line)
        if self._progress is not None:
            self._progress.update(step, loss=values["loss"], tokens_per_second=values["tokens"] / seconds, mfu=mfu)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._log is not None:
            self._log.close()
        if self.num_replaced:
            print(f"{self.num_replaced} damaged records were replaced; see 'replaced' in the metrics.", flush=True)
