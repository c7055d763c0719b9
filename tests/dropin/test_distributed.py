"""Two processes on gloo: DDP and FSDP2 train ours as they train torchvision's."""

from __future__ import annotations

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twins import images, twins, wide

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def _train(model: nn.Module, rank: int) -> None:
    """Two steps, sixteen values a channel in the last stage: over three of them batch norm blows an ulp up to 1e-7."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(2):
        optimiser.zero_grad()
        model(images(4, 64, torch.float64, seed=10 * step + rank)).square().mean().backward()
        optimiser.step()


def _full(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}


def _worker(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        ddp, sharded = [], []
        for model in twins(width_per_group=8):
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "error", message="Grad strides do not match bucket view strides"
                )
                ddp.append(
                    DistributedDataParallel(
                        wide(model).train().to(memory_format=torch.channels_last)
                    )
                )
                _train(ddp[-1], rank)
                ddp.append(DistributedDataParallel(wide(model).train()))
                _train(ddp[-1], rank)
            mesh = init_device_mesh("cpu", (2,))
            net = wide(model).train()
            net(images(3, 32, torch.float64))
            for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
                for block in stage:
                    fully_shard(block, mesh=mesh)
            sharded.append(fully_shard(net, mesh=mesh))
            _train(sharded[-1], rank)
        for mine, theirs in ((ddp[0], ddp[2]), (ddp[1], ddp[3]), tuple(sharded)):
            torch.testing.assert_close(_full(mine), _full(theirs), rtol=1e-8, atol=1e-8)
    finally:
        dist.destroy_process_group()


def test_two_processes() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(port,), nprocs=2)
