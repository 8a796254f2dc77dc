"""What stays of the checkpoints, and what they say of themselves."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llava_jax.train.checkpoint import Checkpoints


def test_the_newest_stay_and_the_best_beside_them(tmp_path: Path):
    saved = Checkpoints(str(tmp_path), keep=2)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: None}
    for step, loss in losses.items():
        saved.save(step, {"x": jnp.full(3, step)}, {"m": jnp.zeros(2)}, {"plan": "p"}, eval_loss=loss)
        saved.wait()
    assert saved.steps() == [6, 5, 2]
    saved.close()
    again = Checkpoints(str(tmp_path), keep=2)
    assert again.steps() == [6, 5, 2]
    values, moments = again.restore(2, {"x": jnp.zeros(3, jnp.int32)}, {"m": jnp.zeros(2)})
    again.check(2, values, moments)
    np.testing.assert_array_equal(values["x"], 2)
    again.close()


def test_half_a_step_of_a_killed_run_is_cleared_away(tmp_path: Path):
    saved = Checkpoints(str(tmp_path))
    saved.save(1, {"x": jnp.ones(3)}, {"m": jnp.zeros(2)}, {})
    saved.wait()
    saved.close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1700000000000000"
    (half / "params").mkdir(parents=True)
    saved = Checkpoints(str(tmp_path))
    assert not half.exists()
    assert saved.steps() == [1]
    saved.close()
