"""Faster ResNets for PyTorch: a drop-in for torchvision with fused Triton, CUDA and CPU kernels."""

from . import ops
from .analysis.explain import explain
from .dispatch import kernel, use
from .live.accelerate import accelerate, accelerated, restore
from .models.blocks import BasicBlock, Bottleneck
from .models.checkpoint import load_checkpoint, save_checkpoint
from .models.family import (
    create_model,
    list_models,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .models.resnet import ResNet
from .ops import across as fused
from .ops import reference
from .planning.make import load_plan, plan

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "accelerate",
    "accelerated",
    "create_model",
    "explain",
    "fused",
    "kernel",
    "list_models",
    "load_checkpoint",
    "load_plan",
    "ops",
    "plan",
    "reference",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "restore",
    "save_checkpoint",
    "use",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
