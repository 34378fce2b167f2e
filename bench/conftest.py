"""Options, the `compare` fixture, and the table at the end."""

from pathlib import Path

import harness
import pytest
import torch

ROWS = pytest.StashKey[list[harness.Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("fusedloss")
    group.addoption("--quick", action="store_true", help="small shapes, two rounds, no torch.compile: a smoke test")
    group.addoption("--rows", type=Path, metavar="FILE", help="append the results to this CSV file")
    group.addoption("--machine", default=harness.machine(), help="how the rows name the machine (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # the table below says it better
    config.addinivalue_line("markers", "shapes(*shapes): what (N, D, V) a test runs at without --quick")
    config.stash[ROWS] = []
    torch.set_num_threads(harness.THREADS)


@pytest.fixture(scope="session")
def quick(pytestconfig):
    return pytestconfig.getoption("quick")


@pytest.fixture
def compare(benchmark, pytestconfig, quick):
    """Measure a Comparison; its rows go to the table and to --rows FILE."""

    def run(comparison: harness.Comparison) -> dict[str, harness.Row]:
        rows = harness.compare(benchmark, comparison, pytestconfig.getoption("machine"), quick)
        pytestconfig.stash[ROWS] += rows
        if path := pytestconfig.getoption("rows"):
            harness.append(path, rows)
        return {row.contender: row for row in rows}

    return run


def pytest_generate_tests(metafunc):
    """A test that asks for `shape` names its shapes by a marker; --quick puts a small one in their place."""
    if marker := metafunc.definition.get_closest_marker("shapes"):
        from cases import QUICK, shape_name

        shapes = QUICK if metafunc.config.getoption("quick") else marker.args
        metafunc.parametrize("shape", shapes, ids=shape_name)


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.section(config.getoption("machine"))
        terminalreporter.write_line(f"torch {torch.__version__}, fusedloss {rows[0].commit}\n\n{harness.table(rows)}\n")
        terminalreporter.write_line(
            "ms: median of turns taken with the other contenders; ratio: to the case's first; peak: beyond inputs and"
            "\nresults, the fp32 accumulator of dW (own column) included; every case passed its check first"
        )
