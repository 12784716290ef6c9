"""Files that people have and programs stumble over: `make(folder)` writes them and says what must become of each."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

#: What a good file shows: a bright square up left on dark ground, wide and low.
WIDTH, HEIGHT = 48, 32


def grey() -> np.ndarray:
    values = np.full((HEIGHT, WIDTH), 40, np.uint8)
    values[4:14, 4:20] = 220
    return values


def rgb() -> Image.Image:
    return Image.fromarray(grey()).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    """A PNG by hand, of any claimed size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def turned(orientation: int, kind: str = "JPEG", **options: object) -> bytes:
    """The picture stored lying down or mirrored, with the EXIF tag that puts it right."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    return encoded(rgb().transpose(turns[orientation]), kind, exif=exif(orientation), **options)


def array(values: np.ndarray, kind: str = "TIFF") -> bytes:
    return encoded(Image.fromarray(values), kind)


def transparent() -> Image.Image:
    """The square is opaque; around it nothing but the colour that was left under it."""
    layers = Image.new("RGBA", (WIDTH, HEIGHT), (40, 40, 40, 255))
    layers.paste((220, 220, 220, 255), (4, 4, 20, 14))
    layers.putpixel((WIDTH - 1, HEIGHT - 1), (0, 0, 0, 0))
    return layers


def good() -> dict[str, bytes]:
    """Files that are to be read as what they show."""
    g, wide = grey(), grey().astype(np.uint16)
    quality: dict[str, object] = {"quality": 95}
    jpeg = encoded(rgb(), "JPEG", **quality)
    palette = rgb().quantize(8)
    frames = [rgb(), Image.new("RGB", (WIDTH, HEIGHT), "red")]
    made = {
        "plain.png": encoded(rgb(), "PNG"),
        "plain.jpg": jpeg,
        "progressive.jpg": encoded(rgb(), "JPEG", progressive=True, **quality),
        "cmyk.jpg": encoded(rgb().convert("CMYK"), "JPEG", **quality),
        "cmyk.tif": encoded(rgb().convert("CMYK"), "TIFF"),
        "grey.png": array(g, "PNG"),
        "grey.jpg": encoded(Image.fromarray(g), "JPEG", **quality),
        "grey16.png": array(wide * 257, "PNG"),
        "grey16.tif": array(wide * 257),
        "grey12in16.tif": array(wide * 16),
        "int32.tif": array(g.astype(np.int32)),
        "int32large.tif": array(g.astype(np.int32) * 257),
        "float01.tif": array((g / 255).astype(np.float32)),
        "float255.tif": array(g.astype(np.float32)),
        "palette.png": encoded(palette, "PNG"),
        "palette-transparent.png": encoded(palette, "PNG", transparency=250),
        "bits.bmp": encoded(rgb(), "BMP"),
        "rgba.png": encoded(transparent(), "PNG"),
        "rgba.webp": encoded(transparent(), "WEBP", lossless=True),
        "rgba.tif": encoded(transparent(), "TIFF"),
        "la.png": encoded(Image.fromarray(g).convert("LA"), "PNG"),
        "plain.webp": encoded(rgb(), "WEBP", lossless=True),
        "plain.gif": encoded(palette, "GIF"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "pages.tif": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "plain.ppm": encoded(rgb(), "PPM"),
        "lzw.tif": encoded(rgb(), "TIFF", compression="tiff_lzw"),
        "plain.tga": encoded(rgb(), "TGA"),
        "lab.tif": encoded(_lab(), "TIFF"),
        "wrong-suffix.png": jpeg,
        "UPPER.JPG": jpeg,
        "bad-exif.jpg": encoded(rgb(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", **quality),
        "upright-twice.jpg": encoded(rgb(), "JPEG", exif=exif(1), **quality),
        "unknown-orientation.jpg": encoded(rgb(), "JPEG", exif=exif(99), **quality),
        "exif6.png": turned(6, "PNG"),
        "trailing.png": encoded(rgb(), "PNG") + b"rubbish after the end",
        "name with blanks, ünïcode & 'quotes'.png": encoded(rgb(), "PNG"),
        "new\nline.png": encoded(rgb(), "PNG"),
        "n" * 200 + ".png": encoded(rgb(), "PNG"),
    }
    return made | {f"exif{i}.jpg": turned(i, **quality) for i in range(2, 9)}


def _lab() -> Image.Image:
    from PIL import ImageCms

    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    converted = ImageCms.applyTransform(rgb(), transform)
    assert converted is not None
    return converted


def bad() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be explained, and a word of the reason."""
    plain = encoded(rgb(), "PNG")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    corrupt = bytearray(encoded(Image.fromarray(noise), "PNG"))
    corrupt[200:260] = b"\0" * 60
    nan = grey().astype(np.float32)
    nan[0, 0] = np.nan
    jpeg = encoded(Image.fromarray(noise), "JPEG")
    return {
        "empty.png": (b"", "empty"),
        "text.png": (b"this is no picture\n" * 9, "not a picture"),
        "page.html.jpg": (b"<!doctype html><html>404</html>", "not a picture"),
        "half.png": (plain[: len(plain) // 2], ""),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "head.gif": (b"GIF89a", ""),
        "corrupt.png": (bytes(corrupt), ""),
        "bomb.png": (png(20000, 20000, b"\0"), "pixels"),
        "bomb-small.png": (png(11000, 11000, b"\0"), "pixels"),
        "size-zero.png": (png(0, 5), ""),
        "nothing-inside.png": (png(40, 40), ""),
        "nan.tif": (array(nan), "NaN"),
        "flat.tif": (array(np.full((8, 8), 1e6, np.float32)), "no scale"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a picture"),
        "drawing.svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
        "archive.jpg": (b"PK\x03\x04" + b"\0" * 40, "not a picture"),
        "random.webp": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(range(64)), ""),
    }


def make(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write them all; the names of those that must be explained, and of those that must fail with a word of the reason."""
    fine, failing = good(), bad()
    for name, content in (fine | {name: content for name, (content, _) in failing.items()}).items():
        (folder / name).write_bytes(content)
    made: dict[str, Callable[[Path], object]] = {
        "pipe.png": os.mkfifo,
        "dangling.png": lambda path: path.symlink_to("nowhere"),
        "loop.png": lambda path: path.symlink_to("loop.png"),
    }
    for name, function in made.items():
        function(folder / name)
    words = {name: word for name, (_, word) in failing.items()}
    return list(fine), words | {"pipe.png": "not a regular file", "dangling.png": "cannot be read", "loop.png": ""}
