"""Decoding: images of every kind give torchvision's pixels as a viewer shows them; others fail with a message."""

from __future__ import annotations

import os
import struct
import zlib

import pytest

pytest.importorskip("PIL")
np = pytest.importorskip("numpy")
functional = pytest.importorskip("torchvision.transforms.functional")

from PIL import Image, ImageOps  # noqa: E402

from resnet_fast.data.decode import Preset, describe, load, scaled_size  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")
PRESET = Preset(resize=40, crop=32)
# 70 wide, 48 high, no symmetry
GREY = np.add.outer(np.arange(48) * 3, np.arange(70)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)


def reference(image: Image.Image, preset: Preset = PRESET) -> Image.Image:
    """Resize and crop with torchvision's functions."""
    rgb = image.convert("RGB")
    resized = functional.resize(rgb, preset.resize)
    return functional.center_crop(resized, [preset.crop, preset.crop])


def same(image: Image.Image, expected: np.ndarray | Image.Image) -> bool:
    """Return whether a decoded image equals the expected one after torchvision's preprocessing."""
    if not isinstance(expected, Image.Image):
        expected = Image.fromarray(expected)
    pixels = reference(expected).tobytes()
    return image.mode == "RGB" and image.tobytes() == pixels


def largest_difference(image: Image.Image, other: Image.Image) -> int:
    return np.abs(difference(image, other)).max()


def difference(image: Image.Image, other: Image.Image) -> np.ndarray:
    first = np.asarray(image).astype(int)
    second = np.asarray(other).astype(int)
    return first - second


def png16(array: np.ndarray) -> bytes:
    """Return a 16-bit PNG, which Pillow cannot write in colour: [H, W] or [H, W, 3]."""
    height, width = array.shape[:2]
    colour_type = 0 if array.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b""
    for row in array:
        rows += b"\0" + row.astype(">u2").tobytes()
    data = zlib.compress(rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


def png_chunk(kind: bytes, data: bytes) -> bytes:
    length = struct.pack(">I", len(data))
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return length + kind + data + checksum


def palette(transparent: bool) -> tuple[Image.Image, np.ndarray]:
    """Return a palette image of 4 colours and its RGB pixels; colour 1 may be transparent, hence white."""
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    indices = GREY % 4
    image = Image.fromarray(indices).copy()
    image.putpalette(colours.tobytes())
    if transparent:
        image.info["transparency"] = 1
        colours[1] = 255
    return image, colours[indices]


def written(path, image, **options) -> str:
    image.save(path, **options)
    return str(path)


# ---------------------------------------------------------------- modes and formats


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_lossless_files_give_torchvisions_pixels(tmp_path, mode, suffix):
    image = Image.fromarray(COLOUR).convert(mode)
    path = written(tmp_path / f"a.{suffix}", image)
    assert same(load(path, PRESET), image)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(tmp_path, mode, options):
    image = Image.fromarray(COLOUR).convert(mode)
    path = written(tmp_path / "a.jpg", image, **options)
    assert same(load(path, PRESET), Image.open(path))


def test_cmyk_image_looks_like_its_rgb_source(tmp_path):
    image = Image.fromarray(COLOUR).convert("CMYK")
    path = written(tmp_path / "a.tif", image)
    assert same(load(path, PRESET), COLOUR)


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette(tmp_path, suffix, transparent):
    image, shown = palette(transparent)
    path = written(tmp_path / f"a.{suffix}", image)
    assert same(load(path, PRESET), shown)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_white(tmp_path, mode):
    colour = COLOUR
    if mode == "LA":
        colour = np.repeat(GREY[..., None], 3, axis=2)
    hole = GREY > 100
    image = Image.fromarray(colour).convert(mode)
    alpha = np.where(hole, 0, 255).astype(np.uint8)
    image.putalpha(Image.fromarray(alpha))
    shown = np.where(hole[..., None], 255, colour).astype(np.uint8)

    path = written(tmp_path / "a.png", image)

    assert same(load(path, PRESET), shown)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    image = Image.new("RGBA", (50, 50), (100, 0, 0, 128))
    path = written(tmp_path / "a.png", image)
    middle = load(path, PRESET).getpixel((16, 16))
    assert middle == pytest.approx((177, 127, 127), abs=1)


@pytest.mark.parametrize("offset", [-128, 0, 128])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_rounded_and_not_clipped(tmp_path, suffix, offset):
    wide = GREY.astype(int) * 257 + offset
    wide = np.maximum(wide, 0).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        path.write_bytes(png16(wide))
    elif suffix == "pgm":
        pixels = wide.astype(">u2").tobytes()
        path.write_bytes(b"P5 70 48 65535\n" + pixels)
    else:
        Image.fromarray(wide).save(path)
    assert same(load(str(path), PRESET), GREY)


def test_16_bit_colour(tmp_path):
    path = tmp_path / "a.png"
    wide = COLOUR.astype(np.uint16) * 257
    path.write_bytes(png16(wide))
    assert same(load(str(path), PRESET), COLOUR)


def test_floating_point_grey(tmp_path):
    pixels = (GREY + 0.4) / 255
    image = Image.fromarray(pixels.astype(np.float32))
    path = written(tmp_path / "a.tif", image)
    assert same(load(path, PRESET), GREY)


@pytest.mark.parametrize("value", [np.int32(70_000), np.float32(2.5)])
def test_pixels_without_an_agreed_scale_are_refused(tmp_path, value):
    image = Image.fromarray(np.full((9, 9), value))
    path = written(tmp_path / "a.tif", image)
    with pytest.raises(ValueError, match="no agreed scale"):
        load(path, PRESET)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    red = Image.new("RGB", (50, 40), "red")
    blue = Image.new("RGB", (50, 40), "blue")
    options = {"lossless": True} if suffix == "webp" else {}
    path = written(tmp_path / f"a.{suffix}", red, save_all=True, append_images=[blue], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    pixel = load(path, PRESET).getpixel((5, 5))
    assert pixel in {(255, 0, 0), (254, 0, 0)}  # GIF's palette has no 255


# ---------------------------------------------------------------- EXIF

LOSSLESS_OR_NEAR = {"png": {}, "tif": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", LOSSLESS_OR_NEAR)
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOUR)
    path = written(tmp_path / f"a.{suffix}", image, exif=exif, **LOSSLESS_OR_NEAR[suffix])
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    is_turned = upright.size == (48, 70)
    assert is_turned == (orientation >= 5)
    assert same(load(path, PRESET), upright)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff broken", b"Exif\0\0no TIFF header", b"Exif\0\0"]
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_broken_exif_is_ignored(tmp_path, suffix, exif):
    image = Image.fromarray(COLOUR)
    path = written(tmp_path / f"a.{suffix}", image, exif=exif)
    assert same(load(path, PRESET), Image.open(path))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 70), (32, 40), (40, 40), (500, 41), (33, 97), (256, 255)]
)
@pytest.mark.parametrize("preset", [PRESET, Preset(64, 64), Preset(37, 33)])
def test_any_size_gives_torchvisions_pixels(tmp_path, size, preset):
    image = Image.fromarray(COLOUR).resize(size)
    path = written(tmp_path / "a.png", image)
    expected = reference(image, preset)
    assert load(path, preset).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 500), (1, 3), (7, 5)])
def test_scaled_size_rounds_down_as_torchvision(size):
    resized = functional.resize(Image.new("L", size), 256)
    assert scaled_size(size, 256) == resized.size


@pytest.mark.parametrize("size", [(300, 200), (1023, 517), (1600, 1200)])
def test_fast_decoding_changes_pixels_little(tmp_path, size):
    image = Image.fromarray(COLOUR).resize(size)
    path = written(tmp_path / "a.jpg", image, quality=92)
    exact = load(path, Preset(40, 32))
    fast = load(path, Preset(40, 32, fast=True))
    assert largest_difference(exact, fast) <= 3
    assert np.abs(difference(exact, fast)).mean() < 1


def test_fast_decoding_of_small_images_is_exact_but_for_rounding(tmp_path):
    path = written(tmp_path / "a.png", Image.fromarray(COLOUR))
    exact = load(path, Preset(40, 32))
    fast = load(path, Preset(40, 32, fast=True))
    assert largest_difference(exact, fast) <= 1


def test_too_many_pixels_are_refused(tmp_path):
    path = written(tmp_path / "a.png", Image.new("L", (400, 300)))
    with pytest.raises(ValueError, match=r"400×300 pixels are more than 100,000 \(--max-pixels\)"):
        load(path, Preset(40, 32, max_pixels=100_000))


def test_narrow_image_is_refused_for_its_resized_size(tmp_path):
    path = written(tmp_path / "a.png", Image.new("L", (1, 60_000)))
    with pytest.raises(ValueError, match="resized, 40×2400000 pixels are more than"):
        load(path, Preset(40, 32, max_pixels=1_000_000))
    fast = load(path, Preset(40, 32, max_pixels=1_000_000, fast=True))  # resizes only the crop
    assert fast.size == (32, 32)


def test_decompression_bomb_is_refused(tmp_path):
    bomb = bytearray(png16(GREY))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    path = tmp_path / "a.png"
    path.write_bytes(bomb)
    with pytest.raises(Image.DecompressionBombError) as caught:
        load(str(path), PRESET)
    assert "--max-pixels" in describe(caught.value)


# ---------------------------------------------------------------- damaged files and files that are no images


@pytest.mark.parametrize("length", [0, 1, 20, 200, 0.5, 0.95], ids=lambda length: f"keep {length}")
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated_files_fail_in_one_line(tmp_path, suffix, length):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    if isinstance(length, float):
        length = int(len(content) * length)
    path.write_bytes(content[:length])

    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (Pillow's plugins raise many kinds)
        load(str(path), PRESET)

    line = describe(caught.value)
    assert line
    assert "\n" not in line


def test_text_is_not_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("a text")
    with pytest.raises(OSError) as caught:
        load(str(path), PRESET)
    assert describe(caught.value) == "not an image that Pillow can read"


def test_postscript_is_not_passed_to_ghostscript(tmp_path):
    path = tmp_path / "postscript.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(OSError, match="cannot identify"):
        load(str(path), PRESET)


def test_fifo_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        load(str(path), PRESET)


def test_missing_file_is_described_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        load(str(tmp_path / "a.jpg"), PRESET)
    assert describe(missing.value) == "No such file or directory"
