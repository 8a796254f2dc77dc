"""`--golden DIR`: one test per recorded case, and a table of families at the end."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.report import NOT_BUILT, Case

SMALL = Path(__file__).parent.parent / "golden" / "conformance"
DIFFERENCES = Path(__file__).parents[2] / "docs" / "compat.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="DIR", help="recorded cases to run (default: a small copy)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reads(files, cases): files of the directory whose records the test runs")


def golden_root(config: pytest.Config) -> Path:
    root = Path(config.getoption("--golden", default=None) or SMALL)
    if not root.is_dir():
        raise pytest.UsageError(f"--golden must name a directory of recorded cases; got {str(root)!r}.")
    return root


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for marker in metafunc.definition.iter_markers("reads"):
        root = golden_root(metafunc.config)
        cases = [
            Case(file.rsplit(".", 1)[0], name, record, root)
            for file in marker.kwargs["files"]
            if (root / file).is_file()
            for name, record in marker.kwargs["cases"](root / file)
        ]
        metafunc.parametrize("case", cases, ids=[f"{case.family}-{case.name}" for case in cases])


@pytest.fixture(autouse=True)
def _family(request: pytest.FixtureRequest) -> None:
    if hasattr(request.node, "callspec") and isinstance(case := request.node.callspec.params.get("case"), Case):
        request.node.user_properties.append(("family", case.family))


@pytest.fixture
def under_original(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """To call with the reason, documented, why this case passes only under `compat="original"`."""
    documented = _documented()

    def note(reason: str) -> None:
        assert reason in documented, f"{DIFFERENCES} does not explain {reason!r}"
        request.node.user_properties.append(("original", reason))

    return note


@functools.cache
def _documented() -> set[str]:
    """The first column of the table of differences."""
    rows = [line for line in DIFFERENCES.read_text().splitlines() if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| ").replace("\\|", "|") for row in rows}


def _outcomes(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, str, str]]:
    """Family, outcome and, where it has one, the reason of every case."""
    for reports in reporter.stats.values():
        for report in reports:
            properties = dict(getattr(report, "user_properties", ()))
            if "family" not in properties:
                continue
            family = properties["family"]
            if report.failed:
                yield family, "failed", ""
            elif report.skipped:
                reason = report.longrepr[2].removeprefix("Skipped: ")
                is_ours = reason.startswith(NOT_BUILT)
                yield family, "not built yet" if is_ours else "failed", reason.removeprefix(NOT_BUILT)
            elif report.when == "call":
                original = properties.get("original", "")
                yield family, "original" if original else "passed", original


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for family, outcome, reason in _outcomes(terminalreporter):
        counts[family][outcome] += 1
        if reason:
            reasons[outcome][reason] += 1
    if not counts:
        return
    write = terminalreporter.write_line
    terminalreporter.section("conformance")
    width = max(map(len, counts))
    write(f"{'family':{width}} {'passed':>8} {'passed under':>14} {'not built':>10} {'failed':>8}")
    write(f"{'':{width}} {'':>8} {'the original':>14} {'yet':>10}")
    rows = sorted(counts.items())
    for family, row in [*rows, ("all", sum(counts.values(), Counter()))]:
        write(f"{family:{width}} {row['passed']:8} {row['original']:14} {row['not built yet']:10} {row['failed']:8}")
    for outcome, title in (("original", 'Passed under compat="original"'), ("not built yet", "Not built yet")):
        for reason, count in sorted(reasons[outcome].items()):
            write(f"{title}: {reason}: {count}")
