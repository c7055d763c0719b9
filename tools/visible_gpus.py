"""The architectures of the GPUs that torch can use here, as nvcc names them: ``python -m tools.visible_gpus``.

Exit code 1 where there is none: a driver without torch's CUDA build, or a machine without a GPU.
"""

from __future__ import annotations

import sys

import torch

from .gpu.extension import architecture


def visible() -> list[str]:
    """Return each architecture once, such as ["8.9", "9.0a"]."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    capabilities = {torch.cuda.get_device_capability(index) for index in range(count)}
    return [architecture(capability) for capability in sorted(capabilities)]


if __name__ == "__main__":
    found = visible()
    if not found:
        sys.exit(1)
    print(*found)
