"""Real photographs that lie on disk with scikit-image and scikit-learn: input for benchmarks, demonstrations and tests.

Only what is inside an installed wheel is used, so no network is needed; scikit-image's other pictures are downloads.
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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, RGB in [0, 1]
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
    """The photographs installed here, the ordinary ones first. Raises ImportError, with what to install, if none is."""
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations if spec else ():
            found += [path for name in names if (path := Path(root, folder, name)).is_file()]
    if not found:
        raise ImportError("sample photographs come with scikit-image: pip install scikit-image")
    return found


def sample(n: int) -> list[Image.Image]:
    """``n`` RGB photographs, the same in every call: the installed ones whole, then windows cut out of them."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("photographs are decoded by Pillow: pip install pillow") from error
    whole = []
    for path in files()[:n]:
        with Image.open(path) as image:
            whole.append(image.convert("RGB"))
    return whole[:n] + [_window(whole[i % len(whole)], i) for i in range(len(whole), n)]


def _window(image: Image.Image, seed: int) -> Image.Image:
    """A window of 50–90 % of each side at a place drawn from the seed."""
    draw = random.Random(seed)
    width, height = (round(side * draw.uniform(0.5, 0.9)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def batch(n: int, size: int = 224) -> Tensor:
    """``sample(n)`` as a network sees it: float32 [n, 3, size, size], NCHW, cropped and normalised as for ImageNet."""
    from .decode import Preset, crop

    preset = Preset(resize=round(size * 256 / 224), crop=size)
    pixels = b"".join(crop(image, preset).tobytes() for image in sample(n))
    x = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(n, size, size, 3).permute(0, 3, 1, 2)
    return normalise(x, torch.tensor(MEAN), torch.tensor(STD)).contiguous()


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixels/255 − mean)/std per channel: uint8 [N, 3, H, W] → float32 with the same strides.

    Bit for bit torchvision's convert_image_dtype and normalize.
    """
    x = pixels.float().div_(255)
    return x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
