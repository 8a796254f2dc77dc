"""What whole runs share: one compilation cache, and one uninterrupted run of each stage to compare with."""

from pathlib import Path

import pytest

from tests.train.runs import EVERY, STAGES, STARTED, finish


@pytest.fixture(autouse=True)
def _leave_no_process_behind():
    yield
    while STARTED:
        process, _ = STARTED.popitem()
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, cache: Path):
    """The uninterrupted run of a stage, made when it is first asked for."""
    made: dict[str, Path] = {}

    def reference(stage: str) -> Path:
        if stage not in made:
            workdir = tmp_path_factory.mktemp("reference") / stage
            result = finish(workdir, EVERY, cache=cache, config=STAGES[stage])
            assert result.returncode == 0, result.stderr
            made[stage] = workdir
        return made[stage]

    return reference


@pytest.fixture(scope="session")
def reference(references) -> Path:
    return references("stage2")
