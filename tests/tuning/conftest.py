"""A registry and a folder of tables for tests that tune kernels."""

from __future__ import annotations

import pytest

from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch import tables


@pytest.fixture
def candidates(registry, tmp_path, monkeypatch):
    """Register kernels for add_act by name, in a registry that has only ``aten`` and the CPU's besides.

    Tables are in the test's own folder.
    """
    monkeypatch.setattr(dispatch, "FAMILIES", ("aten",))
    others = [id for id in registry if not id.startswith(("aten.", "cpu."))]
    for id in others:
        del registry[id]
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    tables.load.cache_clear()

    def register(**kernels):
        for name, fn in kernels.items():
            dispatch.kernel(f"experimental.{name}", op="add_act", supports=lambda p: None)(fn)

    yield register
    tables.load.cache_clear()
