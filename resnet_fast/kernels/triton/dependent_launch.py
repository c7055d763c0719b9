"""Programmatic dependent launch, from sm_90 on: the next kernel's blocks take their places while this one finishes.

Without it a GPU drains between two kernels: the next one's blocks are placed, and fetch their code and arguments, once the
last block of this one is done. ResNet-50 at batch 1 has more than fifty such gaps in a few tenths of a millisecond.
``begin`` is the first statement of every kernel that ``launch.options`` launches so: it returns once all kernels before are
done and what they wrote can be seen, because each of them waited in its turn; then it lets the next one in, whose blocks
take only what room is left. So nothing a kernel reads or writes is touched early. Kernels launched otherwise, torch's own
among them, wait for all before them as ever.
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
