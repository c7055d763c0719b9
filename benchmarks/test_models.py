"""Networks: model × infer/train × batch × dtype × provider, a group for each case."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resnet_fast.bench.network import Case, measure
from resnet_fast.bench.providers import provider


def test_model(
    case: Case,
    provider_id: str,
    together: Callable,
    rounds: int,
    report: Callable,
    pytestconfig: pytest.Config,
) -> None:
    option = pytestconfig.getoption

    def measure_all(case: Case, ids: list[str]) -> dict:
        providers = [provider(id) for id in ids]
        return measure(
            case,
            providers,
            max_seconds=option("--seconds"),
            max_rounds=rounds,
            cold=option("--cold"),
        )

    outcomes = together("case", "provider_id", measure_all)
    report(outcomes[provider_id], case.name)
