"""From files to devices: every device's part is read, and no more."""

import os
import subprocess
import sys
from pathlib import Path

_CODE = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from llava_jax.convert.arrays import place
from llava_jax.convert.layouts import change_layout
from llava_jax.convert.safetensors_file import open_safetensors, write_safetensors
from llava_jax.convert.tensor import in_memory

value = np.arange(96, dtype=np.float16).reshape(12, 8)
path = Path(sys.argv[1], "a.safetensors")
write_safetensors(path, {"a": in_memory(value, "a")})
tensor = change_layout(open_safetensors(path)["a"], "matrix")
read = []

class Heard:
    shape = tensor.shape
    def __getitem__(self, index):
        part = tensor[index]
        read.append(part.shape)
        return part

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
for spec, parts in ((P("fsdp"), {(4, 12)}), (P("data", "fsdp"), {(4, 6)}), (P(None, "fsdp"), {(8, 6)})):
    read.clear()
    array = place(Heard(), np.float32, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(array, value.T)
    assert array.dtype == np.float32
    assert set(read) == parts, (spec, read)
print("right")
"""


def test_each_device_is_given_its_part_and_no_more_is_read(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", _CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
    )
    assert run.stdout == "right\n", run.stderr
