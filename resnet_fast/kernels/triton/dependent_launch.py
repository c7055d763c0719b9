"""Programmatic dependent launch, from sm_90 on: the next kernel's blocks are placed while this one finishes.

Without it a GPU drains between two kernels: the next kernel's blocks are placed, and fetch their code and arguments,
once the last block of this one is done. ResNet-50 at batch 1 has more than fifty such gaps in a few tenths of a
millisecond.

``begin`` is the first statement of every kernel that is launched with ``launch.options``. It returns once all kernels
before are done and their writes are visible, because each of them waited in its turn; then it lets the next kernel in,
whose blocks take only the room that is left. So a kernel reads and writes nothing early. Kernels launched otherwise,
torch's own among them, wait for all kernels before them.
Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, "griddepcontrol".
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernels before, then let the next one's blocks in."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
