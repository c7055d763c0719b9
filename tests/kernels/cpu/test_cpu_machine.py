"""What csrc/cpu concludes about other machines than this one: its headers, compiled for the host."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import host_gpu
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a g++")
SOURCE = """
#include "amx.h"
#include "cut.h"
extern "C" bool usable(uint32_t edx, uint64_t xcr0) { return resnet_fast::cpu::amx_usable(edx, xcr0); }
extern "C" bool allowed(const char* limit) { return resnet_fast::cpu::onednn_may_amx(limit); }
extern "C" bool has() { return resnet_fast::cpu::onednn_has_amx(); }
extern "C" void cut(int64_t rows, int64_t panels, int64_t most, int64_t threads, int64_t* found) {
  const resnet_fast::cpu::Cut cut(rows, panels, most, threads);
  found[0] = cut.rows, found[1] = cut.panels, found[2] = cut.down, found[3] = cut.across;
}
extern "C" int64_t work(int64_t rows, int64_t panels) { return resnet_fast::cpu::Cut::work(1, rows, panels); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("machine")
    (folder / "machine.cpp").write_text(SOURCE)
    subprocess.run(
        [
            host_gpu.compiler(),
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
            "-fPIC",
            "-shared",
            f"-I{host_gpu.ROOT / 'csrc' / 'cpu'}",
            folder / "machine.cpp",
            "-o",
            folder / "machine.so",
        ],
        check=True,
    )
    library = ctypes.CDLL(folder / "machine.so")
    for name in ("usable", "allowed", "has"):
        getattr(library, name).restype = ctypes.c_bool
    library.work.restype = ctypes.c_int64
    return library


# ---------------------------------------------------------------- oneDNN's AMX


BF16, TILE = 1 << 22, 1 << 24  # leaf 7, edx
SAVED = 0xE7 | 3 << 17  # AVX-512's state and both parts of AMX's


@pytest.mark.parametrize(
    "edx, xcr0, usable",
    [
        (BF16 | TILE, SAVED, True),
        (TILE, SAVED, False),
        (BF16, SAVED, False),
        (BF16 | TILE, 0xE7, False),
        (BF16 | TILE, 0xE7 | 1 << 17, False),
        (BF16 | TILE, 0xE7 | 1 << 18, False),
        (0, 0, False),
    ],
)
def test_amx_counts_where_the_processor_has_it_and_the_system_saves_it(
    host, edx: int, xcr0: int, usable: bool
) -> None:
    assert host.usable(ctypes.c_uint32(edx), ctypes.c_uint64(xcr0)) is usable


@pytest.mark.parametrize(
    "limit, allowed",
    [
        (None, True),
        (b"", True),
        (b"ALL", True),
        (b"DEFAULT", True),
        (b"AVX512_CORE_AMX", True),
        (b"avx512_core_amx_fp16", True),
        (b"AVX10_1_512_AMX", True),
        (b"AVX512_CORE_BF16", False),
        (b"avx512_core_fp16", False),
        (b"AVX10_1_512", False),
        (b"AVX2", False),
        (b"SSE41", False),
    ],
)
def test_onednns_own_limit_is_read_as_onednn_reads_it(
    host, limit: bytes | None, allowed: bool
) -> None:
    assert host.allowed(limit) is allowed


def test_this_processor_is_what_the_system_says_of_it(host, monkeypatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    if "sse2" not in flags:
        pytest.skip("the system lists no features of this processor")
    assert host.has() is ({"amx_tile", "amx_bf16"} <= set(flags))


# ---------------------------------------------------------------- blocks for threads

# Rows at batch 1, panels of AVX-512, rows that the cache holds: ResNet-50's convolutions; the last four are Winograd's.
LAYERS = [
    (12544, 2, 891),
    (3136, 2, 2048),
    (3136, 8, 2048),
    (3136, 2, 512),
    (3136, 4, 512),
    (784, 4, 113),
    (784, 16, 1024),
    (784, 16, 512),
    (784, 4, 256),
    (784, 8, 256),
    (196, 8, 56),
    (196, 32, 512),
    (196, 32, 256),
    (196, 8, 128),
    (196, 16, 128),
    (49, 16, 28),
    (49, 64, 256),
    (49, 64, 128),
    (49, 16, 64),
    (392, 2, 97),
    (98, 4, 62),
    (28, 8, 35),
    (8, 16, 19),
]


def cut(host, rows: int, panels: int, most: int, threads: int) -> tuple[int, int, int, int]:
    found = (ctypes.c_int64 * 4)()
    host.cut(*map(ctypes.c_int64, (rows, panels, most, threads)), found)
    return tuple(found)


def largest_share(host, rows: int, panels: int, most: int, threads: int) -> int:
    """Of the thread that has the most to do, when torch hands out equal numbers of consecutive blocks."""
    r, p, down, across = cut(host, rows, panels, most, threads)
    blocks = [
        (min(r, rows - i * r), min(p, panels - j * p)) for i in range(down) for j in range(across)
    ]
    each = -(-len(blocks) // threads)
    return max(
        sum(host.work(*map(ctypes.c_int64, block)) for block in blocks[i : i + each])
        for i in range(0, len(blocks), each)
    )


@given(
    rows=st.integers(1, 3000),
    panels=st.integers(1, 70),
    most=st.integers(1, 900),
    threads=st.integers(1, 200),
)
def test_blocks_cover_everything_once_and_fit_the_cache(host, rows, panels, most, threads) -> None:
    r, p, down, across = cut(host, rows, panels, most, threads)
    assert 1 <= r <= most and (down - 1) * r < rows <= down * r
    assert 1 <= p and (across - 1) * p < panels <= across * p and across <= threads


@pytest.mark.parametrize("batch", [1, 2, 16, 128])
@pytest.mark.parametrize("wider", [1, 2], ids=["AVX-512", "AVX2"])
def test_one_and_two_threads_share_as_they_did_when_they_were_measured(
    host, batch: int, wider: int
) -> None:
    for rows, panels, most in LAYERS:
        rows, panels = rows * batch, panels * wider
        for threads in (1, 2):
            down = -(-rows // most)
            if down > 1 or rows >= threads * 56:
                down = -(-down // threads) * threads
            r = -(-rows // down)
            across = 1 if -(-rows // r) >= threads else min(panels, threads)
            assert cut(host, rows, panels, most, threads) == (
                r,
                -(-panels // across),
                -(-rows // r),
                across,
            ), (
                rows,
                panels,
                most,
                threads,
            )


@pytest.mark.parametrize(
    "batch, threads, least",
    [
        (1, 4, 0.88),
        (1, 8, 0.86),
        (1, 16, 0.85),
        (1, 32, 0.7),
        (16, 24, 0.88),
        (16, 64, 0.88),
        (128, 48, 0.92),
        (128, 64, 0.94),
    ],
)
def test_many_threads_have_about_equal_shares(host, batch: int, threads: int, least: float) -> None:
    """By the model of a block's work, layer by layer; Winograd's last two at batch 1 have too little work to share."""
    for rows, panels, most in LAYERS[:-2] if batch == 1 else LAYERS:
        rows *= batch
        balance = (
            largest_share(host, rows, panels, most, 1)
            / threads
            / largest_share(host, rows, panels, most, threads)
        )
        assert balance >= least, (rows, panels, most, balance)
