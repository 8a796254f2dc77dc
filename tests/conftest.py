"""Fixtures that the tests share; everything runs on one CPU device unless a test starts its own process."""

import os
from importlib.metadata import version
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Compiling is most of what these small tests do, and what they hold does not depend on how well XLA optimizes.
FLAGS = ["xla_backend_optimization_level=0", "xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    # The newer of two emitters of fused loops takes several times as long. JAX 0.12 does not know the flag, and ends.
    FLAGS.append("xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{flag}" for flag in FLAGS))

from pathlib import Path

import pytest

from llava_jax import targets
from llava_jax.data.generated import generate_data
from llava_jax.data.rows import Needs
from llava_jax.data.tokenizer import open_tokenizer
from tests.tiny import LLAVA

NUM_RECORDS = 60


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records.json, pictures/ and tokenizer/."""
    folder = tmp_path_factory.mktemp("data")
    generate_data(folder, num_records=NUM_RECORDS, image_size=LLAVA.vision.image_size, seed=1)
    return folder


@pytest.fixture(scope="session")
def needs(data: Path) -> Needs:
    return Needs(
        tokenizer=open_tokenizer(str(data / "tokenizer")),
        image_root=str(data / "pictures"),
        image_size=LLAVA.vision.image_size,
        num_features=LLAVA.num_features,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those in tests/train first: they take longest, and a last one would run while the other workers have nothing."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/train/"))


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A chip of v5e, as its compiler knows it."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install -e '.[plan]'")
    # As the command line has it: no TPU is asked for, and another process may hold the library.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return targets.tpus("v5e:2x2")[0]
