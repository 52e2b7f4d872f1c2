"""Files to pixels and back: photos as a person would see them, videos in and out, contact sheets.

face.jpg             -> upright 8-bit RGB        -> (3, H, W) in [-1, 1]
video (3, F, H, W)   -> frames (F, H, W, 3) bytes -> H.264 in an MP4, and a sheet of frames to look at
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from errors import UserError, whole_file


def read_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB, as a viewer would show it.

    EXIF rotation is applied; 16-bit grayscale is scaled, not clipped; CMYK goes through its own colour profile if it
    has one; transparency is laid over white, which is where cut-out portraits are usually looked at.
    Raises UserError for a missing, empty or damaged file and for what is not an image.
    """
    if not Path(path).is_file():
        raise UserError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            image.load()
            return _upright_rgb(image)
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read (JPEG, PNG, WebP, TIFF, BMP, ...)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is a damaged image: {error}") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits a pixel: Pillow's convert would clip
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(values.max()))
        image = Image.fromarray(np.clip(values / top * 255, 0, 255).round().astype(np.uint8))
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        image = _through_profile(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _through_profile(image: Image.Image) -> Image.Image:
    """CMYK by its embedded ICC profile; where the profile cannot be used, as it is."""
    import io

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(video: Tensor) -> np.ndarray:
    """Video (3, F, H, W) in [-1, 1] as frames (F, H, W, 3) of bytes."""
    video = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return video.permute(1, 2, 3, 0).cpu().numpy()


def write_video(path: str | Path, frames: np.ndarray, fps: float, comment: str = "") -> None:
    """Frames (F, H, W, 3) of bytes as an H.264 MP4 that ordinary players and browsers open; complete or not there."""
    import av

    with (
        whole_file(path) as temporary,
        av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container,
    ):
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # the one that every player knows
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def contact_sheet(path: str | Path, reference: Image.Image | None, frames: np.ndarray, columns: int = 6) -> None:
    """A PNG to judge a video by: the reference, then frames (F, H, W, 3) evenly spaced from first to last."""
    height, width = frames.shape[1:3]
    cell = max(width, 160)  # tiny frames are enlarged, so that a person sees something
    size = cell, round(height * cell / width)
    picks = sorted({round(k) for k in np.linspace(0, len(frames) - 1, columns)})
    cells = [("reference", reference)] if reference is not None else []
    cells += [(f"frame {k + 1}/{len(frames)}", Image.fromarray(frames[k])) for k in picks]
    gap, line = 4, 16
    sheet = Image.new("RGB", (len(cells) * (size[0] + gap) - gap, size[1] + line), "white")
    for k, (title, image) in enumerate(cells):
        x = k * (size[0] + gap)
        ImageDraw.Draw(sheet).text((x + 2, 2), title, fill="black")
        sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (x, line))
    with whole_file(path) as temporary:
        sheet.save(temporary)
