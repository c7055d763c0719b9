"""Images of every odd kind come out as a viewer shows them, at torchvision's pixels; the rest fails in a sentence."""

from __future__ import annotations

import io
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
GREY = np.add.outer(np.arange(48) * 3, np.arange(70)).astype(np.uint8)  # 70 wide, 48 high, no symmetry
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)


def reference(image: Image.Image, preset: Preset = PRESET) -> Image.Image:
    """The plain path: torchvision's functions on a PIL image."""
    return functional.center_crop(functional.resize(image.convert("RGB"), preset.resize), [preset.crop, preset.crop])


def same(got: Image.Image, expected: np.ndarray | Image.Image) -> bool:
    expected = expected if isinstance(expected, Image.Image) else Image.fromarray(expected)
    return got.mode == "RGB" and got.tobytes() == reference(expected).tobytes()


def png16(array: np.ndarray) -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour: [H, W] or [H, W, 3]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if array.ndim == 2 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette(transparent: bool) -> tuple[Image.Image, np.ndarray]:
    """A palette image of 4 colours and what it shows; colour 1 may be transparent, hence white."""
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    image = Image.fromarray(GREY % 4).copy()
    image.putpalette(colours.tobytes())
    if transparent:
        image.info["transparency"] = 1
        colours[1] = 255
    return image, colours[GREY % 4]


def written(path, image, **options) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_lossless_files_are_what_torchvision_makes_of_them(tmp_path, mode, suffix):
    image = Image.fromarray(COLOUR).convert(mode)
    assert same(load(written(tmp_path / f"a.{suffix}", image), PRESET), image)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(tmp_path, mode, options):
    path = written(tmp_path / "a.jpg", Image.fromarray(COLOUR).convert(mode), **options)
    assert same(load(path, PRESET), Image.open(path))


def test_a_cmyk_photograph_looks_like_the_rgb_it_was_made_from(tmp_path):
    path = written(tmp_path / "a.tif", Image.fromarray(COLOUR).convert("CMYK"))
    assert same(load(path, PRESET), COLOUR)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path, transparent):
    image, shown = palette(transparent)
    for suffix in ("png", "gif"):
        assert same(load(written(tmp_path / f"a.{suffix}", image), PRESET), shown)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_lies_on_white(tmp_path, mode):
    colour = COLOUR if mode == "RGBA" else np.repeat(GREY[..., None], 3, axis=2)
    hole = GREY > 100
    planes = [*np.moveaxis(colour[..., : len(mode) - 1], 2, 0), np.where(hole, 0, 255).astype(np.uint8)]
    image = Image.merge(mode, [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes])
    shown = np.where(hole[..., None], 255, colour).astype(np.uint8)
    assert same(load(written(tmp_path / "a.png", image), PRESET), shown)
    half = Image.new("RGBA", (50, 50), (100, 0, 0, 128))
    middle = load(written(tmp_path / "b.png", half), PRESET).getpixel((16, 16))
    assert np.abs(np.array(middle) - np.array((177, 127, 127))).max() <= 1


@pytest.mark.parametrize("more", [-128, 0, 128])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_rounded_and_not_clipped(tmp_path, suffix, more):
    wide = np.maximum(GREY.astype(int) * 257 + more, 0).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        path.write_bytes(png16(wide))
    elif suffix == "pgm":
        path.write_bytes(b"P5 70 48 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide).save(path)
    assert same(load(str(path), PRESET), GREY)


def test_16_bit_colour_and_floating_point(tmp_path):
    (tmp_path / "a.png").write_bytes(png16(COLOUR.astype(np.uint16) * 257))
    assert same(load(str(tmp_path / "a.png"), PRESET), COLOUR)
    path = written(tmp_path / "a.tif", Image.fromarray(((GREY + 0.4) / 255).astype(np.float32)))
    assert same(load(path, PRESET), GREY)


@pytest.mark.parametrize("array", [np.full((9, 9), 70_000, np.int32), np.full((9, 9), 2.5, np.float32)])
def test_pixels_without_an_agreed_scale_are_refused(tmp_path, array):
    with pytest.raises(ValueError, match="no agreed scale"):
        load(written(tmp_path / "a.tif", Image.fromarray(array)), PRESET)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = written(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert load(path, PRESET).getpixel((5, 5)) in {(255, 0, 0), (254, 0, 0)}  # GIF's palette has no 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}
    path = written(tmp_path / f"a.{suffix}", Image.fromarray(COLOUR), exif=exif, **options)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        assert (upright.size == (48, 70)) == (orientation >= 5)
        assert same(load(path, PRESET), upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff broken", b"Exif\0\0no TIFF header", b"Exif\0\0"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_broken_exif_does_not_cost_the_picture(tmp_path, suffix, exif):
    path = written(tmp_path / f"a.{suffix}", Image.fromarray(COLOUR), exif=exif)
    assert same(load(path, PRESET), Image.open(path))


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (32, 40), (40, 40), (500, 41), (33, 97), (256, 255)])
@pytest.mark.parametrize("preset", [PRESET, Preset(64, 64), Preset(37, 33)])
def test_any_size_gives_torchvisions_pixels(tmp_path, size, preset):
    image = Image.fromarray(COLOUR).resize(size)
    path = written(tmp_path / "a.png", image)
    assert load(path, preset).tobytes() == reference(image, preset).tobytes()


@pytest.mark.parametrize("size", [(300, 200), (1023, 517), (1600, 1200)])
def test_fast_decoding_moves_pixels_little(tmp_path, size):
    path = written(tmp_path / "a.jpg", Image.fromarray(COLOUR).resize(size), quality=92)
    exact, fast = (np.asarray(load(path, Preset(40, 32, fast=fast))).astype(int) for fast in (False, True))
    assert np.abs(exact - fast).max() <= 3
    assert np.abs(exact - fast).mean() < 1


def test_fast_decoding_of_small_images_is_exact_but_for_rounding(tmp_path):
    path = written(tmp_path / "a.png", Image.fromarray(COLOUR))
    exact, fast = (np.asarray(load(path, Preset(40, 32, fast=fast))).astype(int) for fast in (False, True))
    assert np.abs(exact - fast).max() <= 1


@pytest.mark.parametrize("keep", [0, 1, 20, 200, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated_files_fail_in_one_line(tmp_path, suffix, keep):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    raw = data.getvalue()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (Pillow's plugins raise many kinds)
        load(str(path), PRESET)
    assert describe(caught.value) and "\n" not in describe(caught.value)


def test_what_is_no_image_is_called_so(tmp_path):
    (tmp_path / "a.jpg").write_text("a text")
    with pytest.raises(OSError) as caught:
        load(str(tmp_path / "a.jpg"), PRESET)
    assert describe(caught.value) == "not an image that Pillow can read"
    (tmp_path / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with Image.open(tmp_path / "postscript.jpg") as image, pytest.raises(OSError, match="cannot identify"):
        assert image.format == "EPS"
        load(image.filename, PRESET)
    os.mkfifo(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        load(str(tmp_path / "b.jpg"), PRESET)
    with pytest.raises(FileNotFoundError) as missing:
        load(str(tmp_path / "c.jpg"), PRESET)
    assert describe(missing.value) == "No such file or directory"


def test_size_bombs_are_refused(tmp_path):
    path = written(tmp_path / "a.png", Image.new("L", (400, 300)))
    with pytest.raises(ValueError, match=r"400×300 pixels are more than 100,000 \(--max-pixels\)"):
        load(path, Preset(40, 32, max_pixels=100_000))
    path = written(tmp_path / "b.png", Image.new("L", (1, 60_000)))  # small, until its short side is resized
    with pytest.raises(ValueError, match="resized, 40×2400000 pixels are more than"):
        load(path, Preset(40, 32, max_pixels=1_000_000))
    assert load(path, Preset(40, 32, max_pixels=1_000_000, fast=True)).size == (32, 32)
    bomb = bytearray(png16(GREY))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "c.png").write_bytes(bomb)
    with pytest.raises(Image.DecompressionBombError) as caught:
        load(str(tmp_path / "c.png"), PRESET)
    assert "--max-pixels" in describe(caught.value)


def test_scaled_size_rounds_down_as_torchvision():
    for size in [(500, 375), (375, 500), (333, 500), (1, 3), (7, 5)]:
        assert scaled_size(size, 256) == functional.resize(Image.new("L", size), 256).size
