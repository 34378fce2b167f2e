"""What every test gets: two threads, a device, fixed seeds, NaN in memory that nobody filled, and each live backend in turn."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from fusedloss import backends, memory, targets

THREADS = 2
BY_NAME = {module.name: module for module in backends.BACKENDS}

# Fixtures hold no state between hypothesis' examples, and a busy machine is no failure. Deterministic at the desk and
# in CI; FUSEDLOSS_FUZZ=1000 looks further, at random.
fuzz = os.environ.get("FUSEDLOSS_FUZZ")
settings.register_profile(
    "fusedloss",
    deadline=None,
    derandomize=fuzz is None,
    max_examples=int(fuzz or 60),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fusedloss")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tests make their tensors; those marked host stay on the CPU")


def pytest_configure(config):
    config.addinivalue_line("markers", "host: hands pointers to host code, or spawns processes: CPU tensors always")
    config.addinivalue_line("markers", "unpoisoned: leave torch.empty alone (torch.compile traces through it)")
    torch.set_num_threads(THREADS)
    # It notes which functions a default device is for, at its first use: before some of them are replaced below.
    torch.utils._device._device_constructors()
    if BY_NAME["triton"].interpreted():
        from interpreted import round_as_a_device

        round_as_a_device()


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """The device under test, and the default of everything that a test makes; its module's tensors are moved there."""
    where = torch.device("cpu" if request.node.get_closest_marker("host") else request.config.getoption("--device"))
    for name, value in list(vars(request.module).items()):
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(request.module, name, value.to(where))
    with where:
        torch.manual_seed(0)
        yield where
    targets._found.clear()  # a target out of range on a device is remembered


def _poisoned(allocate):
    def filled(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and kwargs.get("out") is None:
            tensor.detach().fill_(torch.nan)  # detached: a leaf that requires a gradient is not filled
        return tensor

    return filled


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """Float memory from torch.empty, empty_like and new_empty holds NaN until it is written."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fresh_workspace(monkeypatch):
    """No scratch memory is kept from call to call: it would hold numbers where fresh memory holds NaN."""
    monkeypatch.setattr(memory, "_limit", 0)


@pytest.fixture(params=sorted(BY_NAME, key=lambda name: name != "torch"))
def backend(request, device, monkeypatch):
    """Each live backend's name in turn; "auto" prefers that one, and takes torch for what it lacks."""
    missing = BY_NAME[request.param].why_not()
    if missing is not None:
        pytest.skip(f"backend {request.param!r} is not live here: {missing}")
    if not BY_NAME[request.param].supports(device, torch.float32):
        pytest.skip(f"backend {request.param!r} takes no tensors on {device}")
    order = dict.fromkeys([BY_NAME[request.param], BY_NAME["torch"]])
    monkeypatch.setattr(backends, "BACKENDS", tuple(order))
    return request.param
