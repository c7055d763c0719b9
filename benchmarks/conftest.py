"""Benchmarks as pytest-benchmark suites: what is measured together is timed together, in interleaved rounds.

``pytest benchmarks/`` measures a small default; options widen it (``--help``). ``--benchmark-*`` work as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from resnet_fast.bench.ledger import RESULTS, Row, here, measured_by, write_run
from resnet_fast.bench.network import Case, Outcome
from resnet_fast.bench.providers import DTYPES, PROVIDERS
from resnet_fast.models.family import list_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL_MODELS = ("resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
SCALING = {
    "batch": {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)},
    "size": {"cpu": (96, 128, 160, 224, 288), "cuda": (96, 128, 160, 224, 288, 384, 512)},
    "depth": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fast")

    def words(text: str) -> list[str]:
        return text.split(",")

    group.addoption("--device", choices=("cpu", "cuda"), default=DEVICE, help=f"default here: {DEVICE}")
    group.addoption("--models", type=words, help="comma-separated architectures (default resnet50; ops: resnet18)")
    group.addoption("--batches", type=lambda text: [int(b) for b in text.split(",")], help="(default 1; on cuda 1,256)")
    group.addoption("--sizes", type=lambda text: [int(s) for s in text.split(",")], default=[224], help="(default 224)")
    group.addoption("--dtypes", type=words, help=f"of {', '.join(DTYPES)} (default fp32; on cuda bf16)")
    group.addoption("--modes", type=words, help="infer, train (default infer; with --full both)")
    group.addoption("--providers", type=words, help="ids, or kernel:ID (default: all that are installed)")
    group.addoption("--kernels", type=words, help="op level: these kernels only, ids or files of your own")
    group.addoption("--full", action="store_true", help="models, batches, dtypes and modes of the published tables")
    group.addoption("--scaling", choices=SCALING, help="a curve over batch, image size or depth instead of the table")
    group.addoption("--cold", action="store_true", help="also cold starts, each in a fresh process")
    group.addoption("--seconds", type=float, default=20.0, help="timing at most this long a case (default %(default)s)")
    group.addoption("--ledger", nargs="?", const="", metavar="FILE", help=f"write the rows into {RESULTS}/ or FILE")


def default_batches(device: str, full: bool) -> list[int]:
    if device == "cuda":
        return [1, 8, 64, 256] if full else [1, 256]
    return [1, 16] if full else [1]


def default_dtypes(device: str, full: bool) -> list[str]:
    if device == "cuda":
        return ["fp32", "bf16", "fp16"] if full else ["bf16"]
    return ["fp32"]


def model_cases(config: pytest.Config) -> list[Case]:
    """The cases that the options ask for."""
    get = config.getoption
    device, full = get("--device"), get("--full")
    models = get("--models") or (FULL_MODELS if full else ["resnet50"])
    batches = get("--batches") or default_batches(device, full)
    dtypes = get("--dtypes") or default_dtypes(device, full)
    modes = get("--modes") or (["infer", "train"] if full else ["infer"])
    sizes = get("--sizes")
    curve = get("--scaling")
    if curve == "depth":
        models = SCALING["depth"]
    elif curve == "batch":
        batches = SCALING["batch"][device]
    elif curve == "size":
        sizes = SCALING["size"][device]
    unknown = [m for m in models if m not in list_models()]
    if unknown:
        raise pytest.UsageError(f"--models: unknown {', '.join(unknown)}; known: {', '.join(list_models())}")
    return [
        Case(mode, model, dtype, batch, size, device)
        for mode in modes
        for model in models
        for dtype in dtypes
        for size in sizes
        for batch in batches
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "provider_id"} <= set(metafunc.fixturenames):
        ids = metafunc.config.getoption("--providers") or list(PROVIDERS)
        pairs = [(case, id) for case in model_cases(metafunc.config) for id in ids]
        metafunc.parametrize(("case", "provider_id"), pairs, ids=[f"{case.name}-{id}" for case, id in pairs])


class Replay:
    """A clock that stands still but for the rounds it is told.

    pytest-benchmark times one function from its first round to its last, so a drift of the machine between two tests
    would be read as a difference. Here all variants of a group are timed in interleaved rounds first; each test then
    plays its own rounds back through this clock, and statistics, JSON, groups and comparisons are pytest-benchmark's.
    """

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Replay()
ROWS = pytest.StashKey[list[Row]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "report" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def machine(pytestconfig: pytest.Config):
    return here(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def outcomes() -> dict[object, dict[str, Outcome]]:
    """What was measured already, by case or problem."""
    return {}


@pytest.fixture
def together(request: pytest.FixtureRequest, outcomes) -> Callable:
    """``together(key, member, measure)``: the outcomes of a case, measured at its first test for all collected.

    ``key`` and ``member`` name two parameters of the test; ``measure(value of key, [values of member])`` runs once.
    """

    def get(key: str, member: str, measure: Callable) -> dict[str, Outcome]:
        value = request.node.callspec.params[key]
        if value not in outcomes:
            others = [item.callspec.params for item in request.session.items if item.function is request.function]
            outcomes[value] = measure(value, [params[member] for params in others if params[key] == value])
        return outcomes[value]

    return get


@pytest.fixture
def rounds(pytestconfig: pytest.Config) -> int:
    """At most this many rounds; one under --benchmark-disable, which asks only whether everything runs."""
    return 1 if pytestconfig.getoption("benchmark_disable") else 60


@pytest.fixture
def report(benchmark, machine, pytestconfig: pytest.Config) -> Callable[[Outcome, str], None]:
    """Report an outcome as this test's benchmark; skip it, or fail it if its check was red."""

    def play(outcome: Outcome, group: str) -> None:
        if outcome.skipped is not None:
            benchmark.skipped = True
            pytest.skip(outcome.skipped)
        if outcome.wrong is not None:
            benchmark.skipped = True
            pytest.fail(f"not reported, its check is red: {outcome.wrong}", pytrace=False)
        benchmark.group = group
        benchmark.extra_info.update(asdict(outcome.row), machine=machine.name, commit=machine.commit, **machine.facts)
        pytestconfig.stash.setdefault(ROWS, []).append(outcome.row)
        seconds = iter(outcome.timing.seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(seconds)), rounds=len(outcome.timing.seconds))

    return play


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["resnet_fast"] = here(config.getoption("--device")).facts


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--ledger"), session.config.stash.get(ROWS, [])
    if path is not None and rows:
        machine = here(session.config.getoption("--device"))
        machine.facts["command"] = measured_by(["pytest", *session.config.invocation_params.args], "--ledger")
        written = write_run(rows, machine, path or None)
        session.config.get_terminal_writer().line(f"\nledger: {written}")
