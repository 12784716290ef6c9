"""Pictures as people have them, read so that a model sees what a person sees, or refused with the reason.

Turned by their EXIF orientation, transparency on white, 16- and 32-bit and float values scaled and never clipped, the first
frame of several. What was done is said in `Picture.notes`. Needs no torch.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from fastrel.errors import InputError

#: What is read. Formats that start other programs (EPS) or hold drawings are left out.
Image.init()
FORMATS = tuple(
    kind
    for kind in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
    if kind in Image.OPEN
)

#: Suffixes by which pictures are found in folders and archives.
SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm"),
        *(".png", ".pnm", ".ppm", ".sgi", ".tga", ".tif", ".tiff", ".webp"),
    }
)

#: Larger pictures are refused before they are decoded: Pillow's own limit, 89 million pixels.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

#: Larger files are not read.
MAX_BYTES = 1 << 29


@dataclass(frozen=True)
class Picture:
    """An RGB picture, and what was done to it that its owner may want to know."""

    image: Image.Image
    notes: tuple[str, ...] = ()


def read(source: str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a file or in bytes, of at most `max_pixels` (and at most `MAX_PIXELS`).

    Raises:
        InputError: whatever is wrong with it: no regular file, unreadable, no picture, corrupt, too large, values that
            cannot be shown.
    """
    data = source if isinstance(source, bytes) else file_bytes(source)
    if not data:
        raise InputError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    raise InputError(f"{opened.width} x {opened.height} pixels; at most {max_pixels} are read")
                return _picture(opened)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"more pixels than the {max_pixels} that are read") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"not a picture in a format that is read ({', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise InputError("not enough memory to decode it") from error
    except Exception as error:  # decoders raise anything on corrupt data: struct.error, KeyError, SyntaxError, …
        raise InputError(f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def seen(image: Image.Image) -> Picture:
    """An open picture as `read` gives it from a file: upright, transparency on white, wide values scaled; of several frames this one.

    Raises:
        InputError: values that cannot be shown.
        OSError: it cannot be decoded.
    """
    image.load()
    upright, turned = _upright(image)
    plain, scaled = _eight_bit(upright)
    return Picture(plain, (*turned, *scaled))


def noise() -> Image.Image:
    """A picture of noise, 256 × 256, the same every time: for what needs some picture."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))


def file_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file; pipes and devices are refused instead of waited for.

    Raises:
        InputError: it cannot be read, is no regular file, or is larger than `MAX_BYTES`.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise InputError("a folder, not a file" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        if found.st_size > MAX_BYTES:
            raise InputError(f"a file of {found.st_size} bytes; at most {MAX_BYTES} are read")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise error if isinstance(error, InputError) else InputError(f"cannot be read: {reason}") from error


def _picture(opened: Image.Image) -> Picture:
    notes = []
    if getattr(opened, "is_animated", False):
        opened.seek(0)
        notes.append("the first of several frames or pages")
    found = seen(opened)
    return Picture(found.image, (*notes, *found.notes))


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    try:
        orientation = image.getexif().get(0x0112, 1)
        return (image, []) if orientation == 1 else (ImageOps.exif_transpose(image), ["turned as its EXIF data says"])
    except Exception:  # an EXIF block that is not one; the picture itself may be fine
        return image, ["its EXIF data is corrupt, so it was not turned"]


def _eight_bit(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """In RGB with 8 bits, and how it came to that."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, []
    if image.mode.startswith("I") or image.mode == "F":
        values, note = _levels(np.asarray(image))
        return Image.fromarray(values).convert("RGB"), note
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        return converted, []
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        low, _ = layers.getchannel("A").getextrema()
        if low == 255:
            return layers.convert("RGB"), []
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB"), ["transparency shown on white"]
    return image.convert("RGB"), []


def _levels(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Values [H, W] of 16 or 32 bits as grey levels of 8, and the scale that was used.

    Floats in 0 … 1 by that; others, and integers, by the first of 255, 4095 (12 bits) and 65535 that none exceeds; what
    is below 0 or higher, from its lowest value to its highest.
    """
    if not np.isfinite(values).all():
        raise InputError("its values hold NaN or infinity; mask them first")
    low, high = float(values.min()), float(values.max())
    ranges = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 4095.0, 65535.0)
    if low >= 0 and high <= ranges[-1]:
        low, high = 0.0, next(top for top in ranges if high <= top)
    if high <= low:
        raise InputError(f"every pixel is {low:g}, so there is no scale to show it with")
    levels = ((values.astype(np.float64) - low) / (high - low) * 255).round().astype(np.uint8)
    return levels, [f"{values.dtype.name} values from {low:g} to {high:g} shown as black to white"]
