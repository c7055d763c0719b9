"""Options and fixtures of the pytest-benchmark suites; all variants of a case are timed together, interleaved.

``pytest benchmarks/`` measures a small default; options widen it (``--help``). ``--benchmark-*`` work as usual.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from resnet_fast.bench.ledger import RESULTS, Row, here, measured_by, write_run
from resnet_fast.bench.network import Case, Measured
from resnet_fast.bench.providers import DTYPES, PROVIDERS
from resnet_fast.models.family import list_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL_MODELS = ("resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
SCALING = {
    "batch": {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)},
    "size": {"cpu": (96, 128, 160, 224, 288), "cuda": (96, 128, 160, 224, 288, 384, 512)},
    "depth": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
}


# ---------------------------------------------------------------- options


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("resnet_fast").addoption
    add("--device", choices=("cpu", "cuda"), default=DEVICE, help=f"default here: {DEVICE}")
    add(
        "--models",
        type=words,
        help="comma-separated architectures (default resnet50; ops: resnet18)",
    )
    add("--batches", type=numbers, help="(default 1; on cuda 1,256)")
    add("--sizes", type=numbers, default=[224], help="(default 224)")
    add("--dtypes", type=words, help=f"of {', '.join(DTYPES)} (default fp32; on cuda bf16)")
    add("--modes", type=words, help="infer, train (default infer; with --full both)")
    add("--providers", type=words, help="ids, or kernel:ID (default: all that are installed)")
    add("--kernels", type=words, help="op level: these kernels only, ids or files of your own")
    add(
        "--full",
        action="store_true",
        help="models, batches, dtypes and modes of the published tables",
    )
    add(
        "--scaling",
        choices=SCALING,
        help="a curve over batch, image size or depth instead of the table",
    )
    add("--cold", action="store_true", help="also cold starts, each in a fresh process")
    add(
        "--seconds",
        type=float,
        default=20.0,
        help="timing at most this long a case (default %(default)s)",
    )
    add(
        "--ledger",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"write the rows into {RESULTS}/ or FILE",
    )


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def default_batches(device: str, full: bool) -> list[int]:
    if device == "cuda":
        return [1, 8, 64, 256] if full else [1, 256]
    return [1, 16] if full else [1]


def default_dtypes(device: str, full: bool) -> list[str]:
    if device == "cuda":
        return ["fp32", "bf16", "fp16"] if full else ["bf16"]
    return ["fp32"]


def model_cases(config: pytest.Config) -> list[Case]:
    """Return the cases that the options ask for."""
    option = config.getoption
    device = option("--device")
    full = option("--full")
    models = option("--models") or (FULL_MODELS if full else ["resnet50"])
    batches = option("--batches") or default_batches(device, full)
    dtypes = option("--dtypes") or default_dtypes(device, full)
    modes = option("--modes") or (["infer", "train"] if full else ["infer"])
    sizes = option("--sizes")
    curve = option("--scaling")
    if curve == "depth":
        models = SCALING["depth"]
    elif curve == "batch":
        batches = SCALING["batch"][device]
    elif curve == "size":
        sizes = SCALING["size"][device]
    unknown = [model for model in models if model not in list_models()]
    if unknown:
        raise pytest.UsageError(
            f"--models: unknown {', '.join(unknown)}; known: {', '.join(list_models())}"
        )
    combinations = itertools.product(modes, models, dtypes, sizes, batches)
    return [
        Case(mode, model, dtype, batch, size, device)
        for mode, model, dtype, size, batch in combinations
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with the parameters ``case`` and ``provider_id`` for every case and provider."""
    if not {"case", "provider_id"} <= set(metafunc.fixturenames):
        return
    config = metafunc.config
    providers = config.getoption("--providers") or list(PROVIDERS)
    cases = model_cases(config)
    pairs = list(itertools.product(cases, providers))
    ids = [f"{case.name}-{provider_id}" for case, provider_id in pairs]
    metafunc.parametrize(("case", "provider_id"), pairs, ids=ids)


# ---------------------------------------------------------------- measuring


class ReplayClock:
    """A clock that advances only by the recorded durations of rounds.

    pytest-benchmark times one function from its first round to its last, so it would read a drift of the machine
    between two tests as a difference. Here all variants of a group are timed first, in interleaved rounds. Each test
    then replays its own rounds through this clock; statistics, JSON, groups and comparisons are pytest-benchmark's.
    """

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()
ROWS = pytest.StashKey[list[Row]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    replayed = pytest.mark.benchmark(timer=CLOCK)
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "report" in fixtures:
            item.add_marker(replayed)


@pytest.fixture(scope="session")
def machine(pytestconfig: pytest.Config):
    device = pytestconfig.getoption("--device")
    return here(device)


@pytest.fixture(scope="session")
def outcomes() -> dict[object, dict[str, Measured]]:
    """Outcomes measured so far, by case or problem."""
    return {}


@pytest.fixture
def together(request: pytest.FixtureRequest, outcomes) -> Callable:
    """``together(key, member, measure)``: the outcomes of a case, measured once, for all collected members.

    ``key`` and ``member`` name two parameters of the test. The first test of a case calls
    ``measure(value of key, [values of member])``.
    """

    def get(key: str, member: str, measure: Callable) -> dict[str, Measured]:
        value = request.node.callspec.params[key]
        if value not in outcomes:
            tests = [item for item in request.session.items if item.function is request.function]
            parameters = [test.callspec.params for test in tests]
            members = [params[member] for params in parameters if params[key] == value]
            outcomes[value] = measure(value, members)
        return outcomes[value]

    return get


@pytest.fixture
def rounds(pytestconfig: pytest.Config) -> int:
    """The maximal number of rounds; one under --benchmark-disable, which only checks that everything runs."""
    return 1 if pytestconfig.getoption("benchmark_disable") else 60


@pytest.fixture
def report(benchmark, machine, pytestconfig: pytest.Config) -> Callable[[Measured, str], None]:
    """``report(outcome, group)``: replay an outcome as this test's benchmark; skip it, or fail if its check failed."""

    def replay(outcome: Measured, group: str) -> None:
        if outcome.skipped is not None:
            benchmark.skipped = True
            pytest.skip(outcome.skipped)
        if outcome.wrong is not None:
            benchmark.skipped = True
            pytest.fail(f"not reported, its check is red: {outcome.wrong}", pytrace=False)
        benchmark.group = group
        benchmark.extra_info.update(
            asdict(outcome.row),
            machine=machine.name,
            commit=machine.commit,
            **machine.facts,
        )
        rows = pytestconfig.stash.setdefault(ROWS, [])
        rows.append(outcome.row)
        durations = outcome.timing.seconds
        remaining = iter(durations)
        benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(durations))

    return replay


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = config.getoption("--device")
    machine_info["resnet_fast"] = here(device).facts


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the ledger if it was asked for."""
    config = session.config
    path = config.getoption("--ledger")
    rows = config.stash.get(ROWS, [])
    if path is None or not rows:
        return
    machine = here(config.getoption("--device"))
    command = ["pytest", *config.invocation_params.args]
    machine.facts["command"] = measured_by(command, "--ledger")
    written = write_run(rows, machine, path or None)
    config.get_terminal_writer().line(f"\nledger: {written}")
