"""Pictures: files to upright RGB, RGB to tensors and back, the sheet that shows a video at a glance.

photo.jpg  -> read_image -> upright 8-bit RGB -> to_tensor -> (3, H, W) in [-1, 1]
"""

import io
import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError, blame, whole_file

# Formats that people have photos in. Pillow knows forty more, and some of those start other programs (EPS).
FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"]
with suppress(ImportError):  # iPhones write HEIC; Pillow reads it where this package is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS.append("HEIF")

LARGEST = 50_000_000  # pixels of a picture as the rest of the program sees it: 600 MB in float32


def from_bytes(values: np.ndarray | Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1], any shape, on the device of `values`. The inverse of `to_bytes`."""
    return torch.as_tensor(values).float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Values in [-1, 1] as bytes, rounded; values outside are clamped. Any shape, on the device of `x`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) in [-1, 1]."""
    return from_bytes(np.array(image)).permute(2, 0, 1)


def to_uint8(video: Tensor) -> np.ndarray:
    """Video (3, F, H, W) in [-1, 1] as frames (F, H, W, 3) of bytes."""
    return to_bytes(video).permute(1, 2, 3, 0).cpu().numpy()


def require_file(path: str | Path, kind: str) -> None:
    """Raise UserError unless `path` is an ordinary file. Opening a pipe or a device could wait forever."""
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK):
            raise PermissionError
    except PermissionError:
        raise UserError(f"{path} may not be read by this user") from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise UserError(f"no {kind} at {path}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"no {kind} at {path}: it is a folder, a pipe or a device")


def read_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB, as a viewer would show it.

    EXIF rotation is applied; 16-bit grayscale is scaled, not clipped; CMYK goes through its own colour profile if it
    has one; transparency lies over white, as in most viewers. An animation gives its first picture. A picture of more
    than LARGEST pixels is scaled down. UserError for a file that is missing, empty, damaged, of another format than
    FORMATS, or no ordinary file.
    """
    require_file(path, "image")
    with blame(f"{path} is a damaged image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders warn about EXIF, colour tables, large pictures
        try:
            with Image.open(path, formats=FORMATS) as image:
                is_ycbcr = image.format == "TIFF" and image.tag_v2.get(262) == 6
                if is_ycbcr and not TiffImagePlugin.READ_LIBTIFF:  # Pillow's own reader fails
                    TiffImagePlugin.READ_LIBTIFF = True
                    return read_image(path)
                image.load()
                image = _upright_rgb(image)
                scale = (LARGEST / (image.width * image.height)) ** 0.5
                if scale < 1:
                    image = image.resize([max(1, int(side * scale)) for side in image.size], reducing_gap=2.0)
                return image
        except UnidentifiedImageError:
            raise UserError(f"{path} is not an image that can be read ({', '.join(FORMATS)})") from None
        except Image.DecompressionBombError:
            limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
            raise UserError(f"{path} has more than {limit} million pixels: scale it down") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # unreadable EXIF: the picture is fine, and as viewers do, it is shown as stored
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits a pixel: Pillow's convert would clip
        values = np.array(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
        if not np.isfinite(values).all():
            raise ValueError("a pixel is NaN or infinite")
        values *= 255 / top
        image = Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        with suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):  # a profile that cannot be used
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cover_box(image_width: int, image_height: int, width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centred part of an image with the shape width : height -> left, top, right, bottom, in pixels.

    One quotient per side is rounded once, so it never exceeds the image; with a common scale, 4% of all sizes would.
    """
    box_width = np.minimum(image_width, image_height * width / height)
    box_height = np.minimum(image_height, image_width * height / width)
    left, top = (image_width - box_width) / 2, (image_height - box_height) / 2
    return left, top, image_width - left, image_height - top


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled to cover height x width and cut around the centre."""
    box = cover_box(image.width, image.height, width, height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def contact_sheet(
    path: str | Path, ref_image: Image.Image | None, frames: np.ndarray, columns: int = 6, title: str = ""
) -> None:
    """A PNG of the reference, then frames (F, H, W, 3) evenly spaced from first to last, and below them the title."""
    height, width = frames.shape[1:3]
    cell = max(width, 160)  # tiny frames are enlarged, so that a person sees something
    size = cell, round(height * cell / width)
    picks = sorted({round(k) for k in np.linspace(0, len(frames) - 1, columns)})
    cells = [("reference", ref_image)] if ref_image is not None else []
    cells += [(f"frame {k + 1}/{len(frames)}", Image.fromarray(frames[k])) for k in picks]
    gap, line = 4, 16
    sheet = Image.new("RGB", (len(cells) * (size[0] + gap) - gap, size[1] + line * (2 if title else 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (text, image) in enumerate(cells):
        x = k * (size[0] + gap)
        draw.text((x + 2, 2), text, fill="black")
        sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (x, line))
    draw.text((2, line + size[1] + 2), title[: sheet.width], fill="black")  # no letter is narrower than a pixel
    with whole_file(path) as temporary:
        sheet.save(temporary)
