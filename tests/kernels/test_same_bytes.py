"""The comparison of weights with their packed copy: every byte counts, by any number of threads, in C++ or without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from resnet_fast.kernels import cpu_library, prepack

MIB = 1 << 20
SIZES = [
    1,
    64,
    3 * MIB + 5,
    0,
    7,
    2 * MIB,
    256 << 10,
    333,
]  # of several threads' shares, and of several pieces of a share


@pytest.fixture(params=["library", "without"])
def pairs(request, monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Equal bytes in two places, by the library's op or without it."""
    if request.param == "without":
        monkeypatch.setattr(cpu_library, "available", lambda: "the CPU kernels are not built")
    elif cpu_library.available() is not None:
        pytest.skip(str(cpu_library.available()))
    made = [torch.randint(256, (size,), dtype=torch.uint8) for size in SIZES]
    return [(t, t.clone()) for t in made]


@pytest.fixture(params=[1, 2, 3, 8], ids="{} threads".format)
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def places(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.tensor([(a.data_ptr(), b.data_ptr(), a.numel()) for a, b in pairs])


def test_one_byte_anywhere_is_seen(pairs, threads) -> None:
    table, all_bytes = places(pairs), sum(SIZES)
    assert prepack.same_bytes(table)
    shares = {
        k * -(-all_bytes // threads) + near for k in range(threads) for near in (-1, 0, 1)
    }  # at the borders between threads
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    for where, start in enumerate(starts):
        inside = {at - start for at in shares} | {
            0,
            255,
            (256 << 10) - 1,
            256 << 10,
            MIB,
            SIZES[where] // 2,
            SIZES[where] - 1,
        }
        for at in sorted(inside & set(range(SIZES[where]))):
            pairs[where][1][at] ^= 1
            assert not prepack.same_bytes(table), (where, at)
            pairs[where][1][at] ^= 1
    assert prepack.same_bytes(table)


def test_nothing_to_compare_is_the_same(pairs) -> None:
    assert prepack.same_bytes(prepack.all_places([])) and prepack.same_bytes(places(pairs[3:4]))


def test_bytes_beside_a_place_do_not_matter(pairs, threads) -> None:
    a, b = pairs[2]
    b[0] ^= 1
    b[-1] ^= 1
    assert prepack.same_bytes(torch.tensor([(a.data_ptr() + 1, b.data_ptr() + 1, a.numel() - 2)]))


@pytest.mark.skipif(cpu_library.available() is not None, reason=str(cpu_library.available()))
@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 3),
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(3, 2, dtype=torch.int64).T,
    ],
)
def test_another_table_is_refused(table) -> None:
    with pytest.raises(RuntimeError, match="^same_bytes: got places of dtype .*, expected Long .N, 3. on the CPU"):
        torch.ops.resnet_fast_cpu.same_bytes(table)
