"""Networks: model × infer/train × batch × dtype × provider, one group for each case."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resnet_fast.bench.network import Case, measure
from resnet_fast.bench.providers import provider


def test_model(
    case: Case, provider_id: str, together: Callable, rounds: int, report: Callable, pytestconfig: pytest.Config
) -> None:
    get = pytestconfig.getoption

    def all_providers(case: Case, ids: list[str]) -> dict:
        return measure(
            case, [provider(id) for id in ids], max_seconds=get("--seconds"), max_rounds=rounds, cold=get("--cold")
        )

    report(together("case", "provider_id", all_providers)[provider_id], case.name)
