"""``pytest -m gpu``: every kernel and network of ours proved on this machine's GPU, by the tasks of ``make gpu``.

Each test runs in a child process under a watchdog: a kernel that hangs or breaks the CUDA context fails its own test,
and the next one goes on.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from gpu_runs import job, watchdog

from resnet_fast.dispatch.registry import find, kernels
from tools.gpu.found import BAD
from tools.gpu.scale import Scale
from tools.gpu.watchdog import Job, Ledger, Watchdog

CHILD = [sys.executable, "-m", "tools.gpu.child"]
KERNELS = [kernel.id for kernel in kernels() if not kernel.id.startswith("cpu.")]
SECONDS = 900.0  # for one test, compilation included
SILENCE = 60.0  # seconds without an event after which a child counts as hung


@pytest.fixture
def dog(tmp_path: Path) -> Watchdog:
    """A watchdog over children that run tasks of ``make gpu``."""
    return Watchdog(CHILD, Ledger(tmp_path / "rows.jsonl"), tmp_path / "log.txt")


def assert_right(dog: Watchdog, job: Job) -> None:
    """Run a job to its end; every case that it did not leave out must be right."""
    trouble = dog.run("test", job, time.monotonic() + SECONDS)
    bad = []
    for row in dog.ledger.of("test", job.name):
        if row["status"] in BAD:
            where = f"\n{row['where']}" if row.get("where") else ""
            bad.append(f"{row['case']}: {row['status']}: {row['reason']}{where}")
    assert not bad, f"{len(bad)} cases\n" + "\n".join(bad[:20])
    assert trouble is None
    assert dog.ledger.of("test", job.name), "no case was run"


def skip_if_absent(kernel: str) -> None:
    reason = find(kernel).available()
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", Scale().dtypes)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_obeys_the_error_rule(dog: Watchdog, kernel: str, dtype: str) -> None:
    """Edge problems and those of networks against float64; NaN and infinities; CUDA graphs, threads, calls in a row."""
    skip_if_absent(kernel)
    arguments = {"kernel": kernel, "dtypes": [dtype]}
    assert_right(dog, Job(kernel, "check", arguments, silence=SILENCE))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_runs_on_the_callers_stream_and_device(dog: Watchdog, kernel: str) -> None:
    skip_if_absent(kernel)
    assert_right(dog, Job(kernel, "streams", {"kernel": kernel}, silence=SILENCE))


@pytest.mark.gpu
def test_networks_obey_the_error_rule(dog: Watchdog) -> None:
    """Drop-in, accelerate and plan, inference and all gradients of a training step, in every dtype."""
    assert_right(dog, Job("models", "models", silence=2 * SILENCE))


# ---------------------------------------------------------------- the lane itself, without a GPU


@pytest.fixture
def misbehaving(tmp_path: Path) -> Watchdog:
    """A watchdog over children whose cases do what their names say."""
    return watchdog(tmp_path)


@pytest.mark.parametrize("case", ("hang", "crash", "raise"))
def test_a_case_that_does_not_end_well_fails_its_test(misbehaving: Watchdog, case: str) -> None:
    with pytest.raises(AssertionError, match=rf"1 cases\n\s*{case}: "):
        assert_right(misbehaving, job("right", case, "right2"))
    # the watchdog went on without the case
    assert len(misbehaving.ledger.of("test")) == 3


def test_cases_that_end_well_pass(misbehaving: Watchdog) -> None:
    assert_right(misbehaving, job("right", "right2"))


def test_other_tests_see_no_gpu(request: pytest.FixtureRequest) -> None:
    """They state facts of a processor, on a machine with a GPU too."""
    if request.config.option.markexpr != "gpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
