"""``same_bytes``, which compares weights with what was packed: every byte counts, with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from resnet_fast.kernels import cpu_library, prepack

KIB, MIB = 1 << 10, 1 << 20
# Some span the shares of several threads, or several pieces of a share.
SIZES = [1, 64, 3 * MIB + 5, 0, 7, 2 * MIB, 256 * KIB, 333]
NOT_BUILT = cpu_library.available()


@pytest.fixture(params=["library", "without"])
def pairs(request, monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Equal bytes in two places, for the library's op and for the comparison without it."""
    if request.param == "without":
        monkeypatch.setattr(cpu_library, "available", lambda: "the CPU kernels are not built")
    elif NOT_BUILT is not None:
        pytest.skip(NOT_BUILT)
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in SIZES]
    return [(t, t.clone()) for t in tensors]


@pytest.fixture(params=[1, 2, 3, 8], ids="{} threads".format)
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def places(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.tensor([(a.data_ptr(), b.data_ptr(), a.numel()) for a, b in pairs])


def positions_to_change(index: int, threads: int) -> list[int]:
    """Bytes of one tensor at its ends, at the borders of pieces, and at the borders between threads' shares."""
    size, start = SIZES[index], sum(SIZES[:index])
    share = -(-sum(SIZES) // threads)
    positions = {0, 255, 256 * KIB - 1, 256 * KIB, MIB, size // 2, size - 1}
    for border in range(0, share * threads, share):
        positions |= {border - start + near for near in (-1, 0, 1)}
    return sorted(positions & set(range(size)))


def test_one_changed_byte_anywhere_is_seen(pairs, threads) -> None:
    table = places(pairs)
    assert prepack.same_bytes(table)
    for index, (_, other) in enumerate(pairs):
        for position in positions_to_change(index, threads):
            other[position] ^= 1
            assert not prepack.same_bytes(table), (index, position)
            other[position] ^= 1
    assert prepack.same_bytes(table)


def test_nothing_to_compare_is_the_same(pairs) -> None:
    empty = pairs[3:4]
    assert prepack.same_bytes(prepack.all_places([]))
    assert prepack.same_bytes(places(empty))


def test_bytes_beside_a_place_do_not_matter(pairs, threads) -> None:
    a, b = pairs[2]
    b[0] ^= 1
    b[-1] ^= 1
    inside = torch.tensor([(a.data_ptr() + 1, b.data_ptr() + 1, a.numel() - 2)])
    assert prepack.same_bytes(inside)


@pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))
@pytest.mark.parametrize(
    "table",
    [
        pytest.param(torch.zeros(3, dtype=torch.int64), id="one axis"),
        pytest.param(torch.zeros(2, 3), id="float"),
        pytest.param(torch.zeros(3, 2, dtype=torch.int64), id="two columns"),
        pytest.param(torch.zeros(3, 2, dtype=torch.int64).T, id="not contiguous"),
    ],
)
def test_another_table_is_refused(table) -> None:
    with pytest.raises(
        RuntimeError, match="^same_bytes: got places of dtype .*, expected Long .N, 3. on the CPU"
    ):
        torch.ops.resnet_fast_cpu.same_bytes(table)
