"""What nvcc makes of the CUDA kernels, seen without a GPU: no spills, shared memory in limits, the right instructions.

The convolutions are compiled for every generation (from the PTX of 8.0, but for sm_90a), the rest for two.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"
HOPPER = "arch=compute_90a,code=sm_90a"
CONVOLUTIONS = {"conv", "pointwise"}
# For each: warp-group products in a pass of the main loop, or of all loops; how often it waits for some; other
# instructions that it must have.
ON_HOPPER = {
    "conv_hopper": ({4}, {2, 3}, {"UTMASTG", "USETMAXREG"}),
    "conv_tail_hopper": ({44, 48}, {3}, {"UTMASTG"}),
    "pointwise_hopper": ({8}, {2}, {"UTMASTG", "USETMAXREG", "UTMALDG.4D.IM2COL"}),
    "conv_cluster_hopper": ({4}, {2}, {"STG.E.128", "UTMALDG.4D.IM2COL", "UTMAPF.L2.4D"}),
}
FILES = sorted(source.stem for source in CSRC.glob("cuda/*.cu"))
# what a kernel gets without asking; index_check.cpp holds dynamic shared memory to 99 kB
SHARED_STATIC = 48 * 1024
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc is not on PATH: the CUDA toolkit compiles the kernels"
)


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture, as ptxas reports it."""

    name: str
    arch: str
    spilled: int
    registers: int
    shared: int


def targets(file: str) -> list[str]:
    others = (
        "sm_80,sm_89,sm_100,sm_120"
        if file in CONVOLUTIONS
        else "sm_80,sm_120"
        if file in ON_HOPPER
        else "sm_80"
    )
    return ["-gencode", f"arch=compute_80,code=[{others}]", "-gencode", HOPPER]


def cuobjdump() -> str | None:
    """The toolkit's, or the one inside the triton wheel."""
    spec = importlib.util.find_spec("triton")
    inside = (
        [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"] if spec else []
    )
    return next((str(path) for path in inside if path.is_file()), shutil.which("cuobjdump"))


@pytest.fixture(scope="session")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[list[Compiled], Path]]:
    """Compiles a kernel file once; what ptxas said of each kernel, and the binary."""
    folder, known = tmp_path_factory.mktemp("csrc"), {}

    def compile_once(file: str) -> tuple[list[Compiled], Path]:
        if file not in known:
            binary = folder / f"{file}.fatbin"
            done = subprocess.run(
                [
                    NVCC,
                    "-fatbin",
                    "-std=c++17",
                    "-O3",
                    "-Xptxas",
                    "-v",
                    "-t",
                    "2",
                    *targets(file),
                    CSRC / "cuda" / f"{file}.cu",
                    "-o",
                    binary,
                ],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert "serialized" not in done.stdout + done.stderr, (
                "ptxas waits after every wgmma: accumulators were touched in flight"
            )
            known[file] = parse(done.stdout + done.stderr), binary
        return known[file]

    return compile_once


def parse(said: str) -> list[Compiled]:
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\S+)' for '(sm_\w+)'", part).groups()
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Compiled(
                name,
                arch,
                int(stores) + int(loads),
                int(re.search(r"Used (\d+) registers", part)[1]),
                int(shared[1]) if shared else 0,
            )
        )
    return found


@pytest.mark.parametrize("file", FILES)
def test_no_spills_and_shared_memory_within_limits(compiled, file: str) -> None:
    kernels, _ = compiled(file)
    archs = {k.arch for k in kernels}
    assert archs == {"sm_90a", *re.findall(r"sm_\d+", targets(file)[1])}
    assert [k for k in kernels if k.spilled or k.shared > SHARED_STATIC] == []


def sass(binary: Path, arch: str) -> dict[str, str]:
    """Machine code of each kernel in a binary, by mangled name."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip(
            "cuobjdump is neither in the triton wheel nor on PATH: the machine code cannot be read"
        )
    text = subprocess.run(
        [tool, "-sass", "-arch", arch, binary], capture_output=True, text=True, check=True
    ).stdout
    return {part.split()[0]: part for part in text.split("Function : ")[1:]}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("file", sorted(CONVOLUTIONS))
def test_convolutions_run_on_tensor_cores(compiled, file: str, arch: str) -> None:
    code = sass(compiled(file)[1], arch)
    # two 16-bit types with three tiles and one element-wise, float32 with one of each
    assert len(code) == 10
    for name, text in code.items():
        if "gemm_kernelIf" in name:
            assert "FFMA" in text and "HMMA" not in text, (
                f"{name}: float32 is neither TF32 nor anything else"
            )
            assert not ("Lb1E" in name and "LDGSTS.E.BYPASS.128" not in text), name
            continue
        assert ("HMMA.16816.F32.BF16" if "nv_bfloat16" in name else "HMMA.16816.F32 ") in text, name
        assert "LDSM.16.M88.4" in text, name
        # 16-byte asynchronous copies in, 128-bit loads of the residual, 128-bit stores
        if "Lb1E" in name:
            assert all(i in text for i in ("LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128")), name
            assert "LDL" not in text and "STL" not in text, name
            residual = [part.count("LDG.E.128") for part in re.split(r"\bSTG\b", text)]
            assert max(residual) >= 4, (
                f"{name}: no load of the residual may pass a store, so one by one each waits for DRAM"
            )


@pytest.mark.parametrize("file", sorted(ON_HOPPER))
def test_hopper_kernels_are_tensor_copies_and_warp_group_products(compiled, file: str) -> None:
    """Operands from shared memory or where the last product left them, no product waited for within a slice."""
    code = sass(compiled(file)[1], "sm_90a")
    products, waits, made_of = ON_HOPPER[file]
    assert code
    for name, text in code.items():
        types = "F32.BF16" if "nv_bfloat16" in name else "F32"
        assert re.search(rf"HGMMA\.64x\d+x16\.{types} ", text), name
        assert "UTMALDG" in text and "SYNCS.PHASECHK.TRANS64.TRYWAIT" in text, name
        assert {i for *_, parts in ON_HOPPER.values() for i in parts if i in text} == made_of, name
        assert re.search(r"\b(LDSM\.16\.M88|LDGSTS|LDL|STL)\b", text) is None, name
        # Launched as dependents: griddepcontrol.wait comes before any access to global memory, launch_dependents after.
        assert (
            text.index("ACQBULK")
            < text.index("PREEXIT")
            < re.search(r"\b(UTMALDG|UTMASTG|LDG|STG)\b", text).start()
        ), name
        assert text.count("HGMMA") in products and text.count("WARPGROUP.DEPBAR") in waits, name
        # Blocks of a cluster meet in shared memory: nobody waits for L2, neither for a slot of a ring nor at a barrier.
        assert "MEMBAR.ALL.GPU" not in text, name
    assert any("MULTICAST" in text for text in code.values()) == (file == "pointwise_hopper")
    assert any("UCGABAR_ARV" in text for text in code.values()) == (
        file in ("pointwise_hopper", "conv_cluster_hopper")
    )


def test_groups_that_work_together_start_a_tile_before_the_last_one_has_left(compiled) -> None:
    """Nobody multiplies while they wait for the staging area: the wait stands behind the first slice's products."""
    together = {
        name: text
        for name, text in sass(compiled("pointwise_hopper")[1], "sm_90a").items()
        if "HopperTileILi128ELb1E" in name
    }
    assert len(together) == 4
    for name, text in together.items():
        assert text.rindex("HGMMA") < re.search(r"\bDEPBAR\.LE SB0", text).start(), name


def test_a_cluster_neither_divides_between_products_nor_asks_for_memory_after_them(
    compiled,
) -> None:
    """A division takes over a hundred clocks, a step of the depth 128; affines and the residual would be more loads.

    The sums of other blocks are loaded at once, and used when all loads are under way.
    """
    for name, text in sass(compiled("conv_cluster_hopper")[1], "sm_90a").items():
        assert "MUFU.RCP" not in text[text.index("HGMMA") : text.rindex("WARPGROUP.DEPBAR")], name
        after = text[text.index("UCGABAR_ARV") :]
        assert "LDG" not in after, name
        reads = [part for part in after.split("STG.E.128") if "LD.E.128" in part]
        assert len(reads) == 4, f"{name}: one, two, four and eight blocks"
        for part in reads:
            assert part.count("LD.E.128") >= 4 and part.rindex("LD.E.128") < part.index("FADD"), (
                name
            )


@pytest.mark.parametrize(
    ("file", "most"), [("conv_hopper", 9), ("conv_tail_hopper", 3), ("pointwise_hopper", 9)]
)
def test_epilogues_read_shared_memory_in_a_few_goes(compiled, file: str, most: int) -> None:
    """Before they replace what they read: one by one, each of some thirty reads would wait for the write before."""
    for name, text in sass(compiled(file)[1], "sm_90a").items():
        order = "".join(i[0] for i in re.findall(r"\b(LDS|STS|LDSM|STSM)\b", text))
        assert order and order.count("SL") <= most, (name, order)


@pytest.mark.parametrize("file", sorted(ON_HOPPER))
def test_hopper_kernels_trap_elsewhere(compiled, file: str) -> None:
    """A build for other chips has them in name only, and they say so instead of giving a wrong answer."""
    for arch in ("sm_80", "sm_120"):
        for name, text in sass(compiled(file)[1], arch).items():
            assert "BPT.TRAP" in text and len(re.findall(r"/\*[0-9a-f]{4}\*/", text)) < 40, name


@pytest.mark.parametrize("file", ("add_act", "bn_act"))
def test_no_load_or_store_asks_for_more_alignment_than_is_checked(tmp_path, file: str) -> None:
    """The launchers check 16 bytes; for newer GPUs nvcc makes accesses of 32 bytes where a type promises it."""
    ptx = tmp_path / f"{file}.ptx"
    source = CSRC / "cuda" / f"{file}.cu"
    subprocess.run(
        [NVCC, "-ptx", "-std=c++17", "-O3", "-arch=sm_120", source, "-o", ptx], check=True
    )
    accesses = re.findall(r"\b(?:ld|st)\.(?:global|shared)[\w.:]*", ptx.read_text())
    assert accesses
    wide = {access for access in accesses if access_bytes(access) > 16}
    assert not wide


def access_bytes(access: str) -> int:
    """How many bytes a PTX load or store such as ld.global.v4.f32 moves."""
    elements = re.search(r"\.v(\d)\b", access)
    bits = re.search(r"\.[a-z]+(\d+)$", access)
    return int(bits[1]) // 8 * (int(elements[1]) if elements else 1)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("file", sorted(set(FILES) - CONVOLUTIONS - set(ON_HOPPER)))
def test_vector_kernels_move_128_bits(compiled, file: str, arch: str) -> None:
    wide = {
        name: text
        for name, text in sass(compiled(file)[1], arch).items()
        if re.search(r"Li[48]E", name)
    }
    assert wide
    for name, text in wide.items():
        assert "LDG.E.128" in text, name
        assert "STG.E.128" in text or is_reduction(name), name


# For batch norm's kernels: loads of 128 bits, in 16-bit types, that are under way together: of one tensor, or of the
# residual too; of dy and x, and of y too. Two blocks of 256 threads then have 64 kB and more under way; DRAM's latency
# needs 26 kB.
TOGETHER = {"moments": 8, "normalise": 8, "gradient_sums": 9, "gradient": 9}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_batch_norm_has_its_loads_under_way_before_it_uses_the_first(compiled, arch: str) -> None:
    wide = {
        name: text for name, text in sass(compiled("bn_act")[1], arch).items() if "Li8E" in name
    }
    assert len(wide) == 2 * len(TOGETHER)
    for name, text in wide.items():
        batches = [
            len(re.findall(r"\bLDG\.E\.128", part))
            for part in re.split(r"\b(?:STG|STS|FADD|FMUL|FFMA|HADD2|F2FP)\b", text)
        ]
        assert (
            max(batches)
            >= TOGETHER[re.search(r"\d(moments|normalise|gradient_sums|gradient)_kernel", name)[1]]
        ), (
            name,
            batches,
        )


def is_reduction(name: str) -> bool:
    """First passes of batch norm: they write a few partial sums a block."""
    return "moments_kernel" in name or "gradient_sums_kernel" in name
