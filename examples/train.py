"""Training on one machine or many: DDP, autocast, a checkpoint that survives a kill. The trainer is torch's own tools.

python examples/train.py --data FOLDER                       # FOLDER/class/image.jpg, as torchvision's ImageFolder
torchrun --nproc-per-node 8 examples/train.py --data FOLDER  # all the GPUs of a machine
python examples/train.py --steps 5                           # random images, to see it run
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import resnet_fast

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def random_images(args: argparse.Namespace) -> torch.utils.data.Dataset:
    """Return as many random images as all processes take."""
    count = args.steps * args.batch * WORLD_SIZE
    images = torch.randn(count, 3, args.size, args.size)
    return torch.utils.data.TensorDataset(images, torch.randint(args.classes, (count,)))


def image_folder(args: argparse.Namespace) -> torch.utils.data.Dataset:
    """Return an ImageFolder with the usual augmentation."""
    from torchvision import datasets
    from torchvision.transforms import v2

    augmentation = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(args.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return datasets.ImageFolder(args.data, augmentation)


def loader(args: argparse.Namespace) -> torch.utils.data.DataLoader:
    """Return batches of images and labels; each process takes its own part."""
    images = random_images(args) if args.data is None else image_folder(args)
    sampler = torch.utils.data.DistributedSampler(images) if WORLD_SIZE > 1 else None
    return torch.utils.data.DataLoader(
        images,
        args.batch,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=args.workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="resnet18", choices=resnet_fast.list_models())
    p.add_argument("--data", help="folder of one folder for each class; default: random images")
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--batch", type=int, default=8, help="for each process")
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--steps", type=int, default=5, help="stop after so many")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--checkpoint", type=Path, help="saved at the end; continued from if it exists")
    return p.parse_args()


def train(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Take SGD steps on cross-entropy and print the loss of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step, (x, y) in zip(range(args.steps), loader(args), strict=False):
        x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
        y = y.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if RANK == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)


def main() -> None:
    args = arguments()
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if WORLD_SIZE > 1:
        dist.init_process_group()
    torch.manual_seed(0)
    net = resnet_fast.create_model(args.model, num_classes=args.classes)
    if args.checkpoint and args.checkpoint.exists():
        resnet_fast.load_checkpoint(net, args.checkpoint)
    net.to(device, memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(net) if WORLD_SIZE > 1 else net

    train(model, args, device)

    if args.checkpoint and RANK == 0:
        resnet_fast.save_checkpoint(net, args.checkpoint)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
