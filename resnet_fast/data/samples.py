"""Sample photographs from the scikit-image and scikit-learn packages, for benchmarks, demonstrations and tests.

Uses only files inside the installed wheels, so it needs no network; scikit-image downloads its other pictures.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# Mean and standard deviation of ImageNet's training images, RGB in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Photographs only: the packages also ship charts, text and phantoms.
PHOTOS = {
    "skimage": (
        "data",
        (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "rocket.jpg",
            "motorcycle_left.png",
            "motorcycle_right.png",
            "camera.png",
            "coins.png",
            "hubble_deep_field.jpg",
            "retina.jpg",
            "ihc.png",
            "moon.png",
            "brick.png",
            "grass.png",
            "gravel.png",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}


def files() -> list[Path]:
    """Return the photographs installed here, ordinary ones first; raises ImportError, with what to install, if none."""
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        roots = spec.submodule_search_locations if spec else ()
        for root in roots:
            paths = (Path(root, folder, name) for name in names)
            found += [path for path in paths if path.is_file()]
    if not found:
        raise ImportError("sample photographs come with scikit-image: pip install scikit-image")
    return found


def sample(n: int) -> list[Image.Image]:
    """Return ``n`` RGB photographs, the same in every call: the installed ones, then windows cut out of them."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("photographs are decoded by Pillow: pip install pillow") from error
    images = []
    for path in files()[:n]:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    count = len(images)
    windows = [_window(images[i % count], seed=i) for i in range(count, n)]
    return images + windows


def _window(image: Image.Image, seed: int) -> Image.Image:
    """Return a window of 50–90 % of each side at a place drawn from the seed."""
    random_source = random.Random(seed)
    width = round(image.width * random_source.uniform(0.5, 0.9))
    height = round(image.height * random_source.uniform(0.5, 0.9))
    left = random_source.randint(0, image.width - width)
    top = random_source.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def batch(n: int, size: int = 224) -> Tensor:
    """Return ``sample(n)`` as a network's input: float32 [n, 3, size, size], cropped and normalised as for ImageNet."""
    from .decode import Preset, crop

    preset = Preset(resize=round(size * 256 / 224), crop=size)
    pixels = bytearray()
    for image in sample(n):
        pixels += crop(image, preset).tobytes()
    nhwc = torch.frombuffer(pixels, dtype=torch.uint8).view(n, size, size, 3)
    nchw = nhwc.permute(0, 3, 1, 2)
    return normalise(nchw, torch.tensor(MEAN), torch.tensor(STD)).contiguous()


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (pixels/255 − mean)/std per channel: uint8 [N, 3, H, W] → float32 with the same strides.

    The result equals torchvision's convert_image_dtype and normalize bit for bit.
    """
    x = pixels.float().div_(255)
    return x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
