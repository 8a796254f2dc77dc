"""Loading a checkpoint into arrays that lie on several processes: each reads its share of the files, and no more."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax.convert.config_json import text_fields
from llava_jax.convert.layouts import from_huggingface, to_layout
from llava_jax.convert.tensor import in_memory
from llava_jax.models.build import random_parameters
from llava_jax.models.parameters import part
from tests.convert.llavas import write_folder
from tests.tiny import LLAVA

ROOT = Path(__file__).parents[2]
WIDE = dataclasses.replace(
    LLAVA, text=dataclasses.replace(LLAVA.text, vocab_size=1024, embed_dim=128, hidden_dim=256, head_dim=32)
)
_CODE = """
import json, sys
import jax, numpy as np
from llava_jax.train import processes
processes.join()
from llava_jax.convert.arrays import place_all
from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.tensor import Tensor
from llava_jax.train.sharding import MeshConfig, make_mesh, parameter_shardings

spans = {}

def heard(self, index):
    found = self.view()[index]
    low, high = np.lib.array_utils.byte_bounds(found)
    spans[self.origin] = spans.get(self.origin, 0) + high - low
    return found

Tensor.__getitem__ = heard
values = open_checkpoint(sys.argv[1]).params
mesh = make_mesh(MeshConfig(data=1, **json.loads(sys.argv[2])))
shardings = parameter_shardings(values, mesh)
targets = {n: jax.ShapeDtypeStruct(v.shape, np.float32, sharding=shardings[n]) for n, v in values.items()}
placed = place_all(values, targets)
for name, array in placed.items():
    assert array.sharding == shardings[name], name
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(values[name].view())[shard.index], err_msg=name)
needed = sum(v.nbytes * (1 if shardings[n].is_fully_replicated else 0.5) for n, v in values.items())
print(json.dumps([needed, sum(spans.values()), sum(v.nbytes for v in values.values())]))
"""


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"fsdp": 1, "tensor": 2}], ids=str)
def test_each_of_two_processes_reads_its_half_in_whole_rows(tmp_path: Path, mesh: dict[str, int]):
    values = random_parameters(WIDE, ("decoder",), seed=0)
    tensors = to_layout({name: in_memory(value, name) for name, value in values.items()}, "original", WIDE)
    assert {part(name) for name in from_huggingface(tensors)} == {"decoder"}
    folder = write_folder(
        tmp_path / "llama", text_fields(WIDE.text), {key: tensor.view() for key, tensor in tensors.items()}
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": address}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _CODE, str(folder), json.dumps(mesh)],
            env=os.environ | settings | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in running:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, err
        needed, spanned, whole = json.loads(out.splitlines()[-1])
        assert spanned == needed
        assert needed < 0.51 * whole
    assert np.isclose(whole, sum(value.nbytes for value in values.values()))
