"""The loss on held-out records, measured while a run trains."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from llava_jax.compiler import compiler_options, products_in
from llava_jax.data.index import check_refusals, load_index
from llava_jax.data.pipeline import RowReader, read_batches
from llava_jax.data.plan import make_plan
from llava_jax.data.rows import Needs
from llava_jax.errors import UserError
from llava_jax.models.build import structure
from llava_jax.models.parameters import Parameters, bind
from llava_jax.train import processes
from llava_jax.train.config import TrainConfig
from llava_jax.train.sharding import process_places, to_devices
from llava_jax.train.step import TALLIED, cast, make_context
from llava_jax.train.stop import Stop


class HeldOut:
    """The records of `life.eval_records`, planned once, in file order, and read anew at every measurement."""

    def __init__(
        self,
        config: TrainConfig,
        needs: Needs,
        workdir: str,
        mesh: Mesh,
        *,
        rows_per_step: int,
    ):
        assert config.life.eval_records is not None
        with processes.first_before_others("eval_index"):
            cache = Path(workdir, "cache")
            index = load_index(
                config.life.eval_records, config.data.rows, needs, cache, look_again=processes.is_first()
            )
        check_refusals(index, config.data.max_refused)
        rows = rows_per_step // config.accumulation
        plan = make_plan(
            index,
            config.data.rows.capacity,
            seed=config.seed,
            shuffle=False,
            batch_rows=rows,
            batch_records=None,
            epochs=1,
            steps=None,
            rows_multiple=rows,
        )
        processes.check_same("eval_plan", plan.fingerprint(), "held-out records")
        self._mesh, self._num_rows, self._places = mesh, rows, process_places(mesh, rows)
        self._reader = RowReader(
            index=index, plan=plan, rows=config.data.rows, needs=needs, first_step=0, places=self._places
        )

        # Dropout is for learning: here adapters see all of their inputs.
        lora = config.lora and dataclasses.replace(config.lora, dropout=0.0)
        graphdef, _ = structure(config.model, stacked=config.stacked, quantize=config.quantize, lora=lora)

        context = make_context(config, mesh, most_records=plan.most_records)

        @products_in(config.compute_dtype)
        def sums(
            trainable: Parameters, frozen: Parameters, batch: dict[str, Array], votes: Int[Array, " devices"]
        ) -> tuple[Array, Array, Array]:
            model = bind(graphdef, cast(trainable, config.compute_dtype) | cast(frozen, config.compute_dtype))
            found = config.objective(model, batch, context)
            return found.loss, found.weight, votes.sum()

        self._sums = jax.jit(sums, compiler_options=compiler_options(mesh.devices.flat[0]))

    def loss(self, trainable: Parameters, frozen: Parameters, stop: Stop, *, beat: Callable[[], None]) -> float | None:
        """The sum of losses over the sum of weights, over all records; None if the run is asked to stop meanwhile."""
        loss = weight = 0.0
        pending = None
        with contextlib.closing(read_batches(self._reader, num_workers=0)) as batches:
            # One batch is always under way while the numbers of the one before it are fetched.
            for batch in itertools.chain(batches, (None,)):
                found = pending
                if batch is not None:
                    arrays = to_devices(batch, self._mesh, self._places, self._num_rows)
                    rows = {name: value for name, value in arrays.items() if name not in TALLIED}
                    pending = self._sums(trainable, frozen, rows, stop.votes(self._mesh))
                if found is not None:
                    more, counted, votes = jax.device_get(found)
                    loss, weight = loss + float(more), weight + float(counted)
                    beat()
                    if stop.is_agreed(float(votes)):
                        return None
        return loss / max(weight, 1.0)


def check_evaluation(config: TrainConfig) -> None:
    """Refuses an evaluation that is half described, or that would fall between checkpoints."""
    life = config.life
    if (life.eval_records is None) != (life.eval_every is None):
        raise UserError(
            f"life.eval_records and life.eval_every go together; got {life.eval_records!r} and {life.eval_every}. "
            "Set both or neither."
        )
    if life.eval_every is not None and (life.eval_every < 1 or life.eval_every % config.checkpoint_every):
        raise UserError(
            f"life.eval_every must be a multiple of checkpoint_every={config.checkpoint_every}; got {life.eval_every}."
        )
