"""What csrc/cpu concludes about the machine, on machines that are not here: its headers, compiled for the host and asked."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import host_gpu
import pytest

pytestmark = pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a g++")
SOURCE = """
#include "amx.h"
extern "C" bool usable(uint32_t edx, uint64_t xcr0) { return resnet_fast::cpu::amx_usable(edx, xcr0); }
extern "C" bool allowed(const char* limit) { return resnet_fast::cpu::onednn_may_amx(limit); }
extern "C" bool has() { return resnet_fast::cpu::onednn_has_amx(); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("machine")
    (folder / "machine.cpp").write_text(SOURCE)
    subprocess.run([host_gpu.compiler(), "-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{host_gpu.ROOT / 'csrc' / 'cpu'}",
                    folder / "machine.cpp", "-o", folder / "machine.so"], check=True)
    library = ctypes.CDLL(folder / "machine.so")
    for name in ("usable", "allowed", "has"):
        getattr(library, name).restype = ctypes.c_bool
    return library


BF16, TILE = 1 << 22, 1 << 24  # leaf 7, edx
SAVED = 0xe7 | 3 << 17  # AVX-512's state and both parts of AMX's


@pytest.mark.parametrize("edx, xcr0, usable", [(BF16 | TILE, SAVED, True), (TILE, SAVED, False), (BF16, SAVED, False), (BF16 | TILE, 0xe7, False),
                                               (BF16 | TILE, 0xe7 | 1 << 17, False), (BF16 | TILE, 0xe7 | 1 << 18, False), (0, 0, False)])
def test_amx_counts_where_the_processor_has_it_and_the_system_saves_it(host, edx: int, xcr0: int, usable: bool) -> None:
    assert host.usable(ctypes.c_uint32(edx), ctypes.c_uint64(xcr0)) is usable


@pytest.mark.parametrize("limit, allowed", [(None, True), (b"", True), (b"ALL", True), (b"DEFAULT", True), (b"AVX512_CORE_AMX", True),
                                            (b"avx512_core_amx_fp16", True), (b"AVX10_1_512_AMX", True), (b"AVX512_CORE_BF16", False),
                                            (b"avx512_core_fp16", False), (b"AVX10_1_512", False), (b"AVX2", False), (b"SSE41", False)])
def test_onednns_own_limit_is_read_as_onednn_reads_it(host, limit: bytes | None, allowed: bool) -> None:
    assert host.allowed(limit) is allowed


def test_this_processor_is_what_the_system_says_of_it(host, monkeypatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    if "sse2" not in flags:
        pytest.skip("the system lists no features of this processor")
    assert host.has() is ({"amx_tile", "amx_bf16"} <= set(flags))
