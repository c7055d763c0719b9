"""What every test stands on: no GPU, one thread, a fixed seed, a registry of its own, hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import host_gpu
import pytest
import torch
from hypothesis import HealthCheck, settings

from resnet_fast.dispatch import registry as dispatch
from resnet_fast.live import network_program

# the machines that run this have few cores, and results must not depend on how many
torch.set_num_threads(1)
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """Hide every GPU unless the command line asks for the tests that need one (``-m gpu``).

    The other tests state facts of a processor: with a GPU visible, `--device` would default to it. Processes that
    tests start inherit the setting.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                reason = "needs a CUDA device; where there is one, run pytest -m gpu"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A registry of its own: what a test registers is gone afterwards, and so is what was memoised with it."""
    dispatch.kernels()  # what is first imported inside would be gone with the copy, and is never imported again
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    monkeypatch.setattr(dispatch, "_memo", {})
    return dispatch._registry


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that kept programs ran on: which pass was kept, and in which pieces."""
    ran, original = [], network_program.NetworkProgram.__call__

    def noted(self, x):
        out = original(self, x)
        ran.extend([tuple(x.shape)] if out is not None else [])
        return out

    monkeypatch.setattr(network_program.NetworkProgram, "__call__", noted)
    return ran


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc's kernels compiled for the CPU, once for all files and processes that run them."""
    root = tmp_path_factory.getbasetemp()
    return host_gpu.built_once(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)


@pytest.fixture
def gpu(host_library: Path) -> Iterator[host_gpu.HostGpu]:
    """The emulated GPU. Its settings are reset after the test: all libraries of a process share them."""
    pretended = host_gpu.HostGpu(host_library)
    yield pretended
    pretended.settings()
