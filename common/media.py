"""Files to pixels and back: photos as a person would see them, videos in and out, contact sheets.

face.jpg             -> upright 8-bit RGB        -> (3, H, W) in [-1, 1]
video (3, F, H, W)   -> frames (F, H, W, 3) bytes -> H.264 in an MP4, and a sheet of frames to look at
any video file       -> F frames at the fps and size asked for, picked by their time stamps
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from common.errors import UserError, whole_file


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading video

SAME_TIME = 1e-3  # seconds; WebM and MKV count in milliseconds, so a frame may be stamped half of one too late
SEEK_AHEAD = 1.0  # seconds before the wanted time to aim at: some containers seek by decoding order, not by display


class TooShort(UserError):
    """The video is sound and does not last long enough."""


def read_video(
    path: str | Path,
    frames: int,
    fps: float,
    height: int,
    width: int,
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """A video's picture at the times start, start + 1/fps, ... -> (frames, height, width, 3) bytes, RGB.

    A picture at time t is the last frame stamped at or before t, whatever the file's own rate is and whether it is
    constant or not; times count from the first frame. Each is turned upright, scaled until it covers height x width,
    and cut around its centre: a video has no bars (`losses.flow_loss` averages over all of it). `end` (seconds) is
    where the clip ends, if that is before the end of the file.

    Raises TooShort, and UserError for a file that is missing, damaged, or holds no video.
    """
    wanted = start + np.arange(frames) / fps
    pixels = np.empty((frames, height, width, 3), np.uint8)
    count, shown, last = 0, None, 0.0  # pictures done; the frame on display, and when it ends

    def show_until(time: float) -> None:
        """Fill in the pictures that fall before `time`, all of the frame on display."""
        nonlocal count
        first = count
        while count < frames and wanted[count] < time - SAME_TIME:
            pixels[count] = pixels[first] if count > first else cover(_upright_frame(shown, path), height, width)
            count += 1

    if end is None or wanted[-1] < end - SAME_TIME:
        for time, until, frame in _decode(path, start):
            if shown is not None:
                show_until(time)
            if count == frames:
                return pixels
            shown, last = frame, until
        if shown is not None:
            show_until(last)
        if count == frames:
            return pixels
        promised = probe_video(path)
        if last < promised - 0.5 and wanted[-1] < promised:  # headers are off by a few frames at most
            raise UserError(f"{path} breaks off after {last:.2f} of {promised:.2f} seconds: fetch it again")
        end = last
    raise TooShort(
        f"{path} is too short: {max(0.0, end - start):.2f} seconds from {start:g} s on, "
        f"and {frames} frames at {fps:g} fps need more than {(frames - 1) / fps:.2f}"
    )


def read_frame(path: str | Path, time: float) -> Image.Image:
    """What the video shows `time` seconds after its first frame, upright and in full size."""
    shown, last = None, 0.0
    for stamp, until, frame in _decode(path, time):
        if shown is not None and stamp > time + SAME_TIME:
            break
        shown, last = frame, until
    if shown is None or time > last + 1:  # a second of grace: times are rounded, headers promise a little too much
        raise UserError(f"{path} shows nothing at {time:g} seconds: it is shorter, or damaged")
    return _upright_frame(shown, path)


def count_frames(path: str | Path) -> int:
    """How many frames a video shows, by decoding all of it. Raises UserError where it is damaged or breaks off."""
    count = sum(1 for _ in _decode(path, 0.0))
    with _opened(path) as (_, stream):
        promised = stream.frames  # 0 where the container does not say
    if count == 0:
        raise UserError(f"{path} holds no frame")
    if count < promised - max(1, promised // 50):  # headers are off by a frame or two
        raise UserError(f"{path} breaks off after {count} of {promised} frames: fetch it again")
    return count


def read_frames(path: str | Path, numbers: Sequence[int]) -> np.ndarray:
    """Frames by their number, upright and in full size -> (n, H, W, 3) bytes; a number may come more than once."""
    wanted, found = set(numbers), {}
    for number, (_, _, frame) in enumerate(_decode(path, 0.0)):
        if number in wanted:
            found[number] = np.asarray(_upright_frame(frame, path))
            if len(found) == len(wanted):
                break
    if len({image.shape for image in found.values()}) > 1:
        raise UserError(f"{path} changes its size on the way")
    return np.stack([found[number] for number in numbers])


def probe_video(path: str | Path) -> float:
    """How long a video is according to its header, in seconds; 0 if the header does not say."""
    with _opened(path) as (container, stream):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1e6


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple]:
    """The container and its first video stream; whatever FFmpeg says about the file becomes a UserError."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be read as a video: {error.strerror or error}") from None


def _decode(path: str | Path, start: float) -> Iterator[tuple]:
    """(from, until, frame) in order of display, beginning at or before `start`.

    Times are seconds since the video's first frame, which is not stamped 0 in every file.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        one_frame = 1 / rate if rate else 0
        zero = stream.start_time or 0
        # A seek lands on the key frame before; where it does not (no index, or a broken one), all is decoded.
        for aim in (start - SEEK_AHEAD, 0.0) if start > SEEK_AHEAD else (0.0,):
            if start > SEEK_AHEAD:
                container.seek(zero + int(aim / stream.time_base), stream=stream)
            begun = False
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                time = (frame.pts - zero) * stream.time_base
                if not begun and aim and time > start:
                    break
                begun = True
                yield float(time), float(time + (frame.duration * stream.time_base or one_frame)), frame
            if begun:
                return


def _upright_frame(frame, path: str | Path) -> Image.Image:
    """A decoded frame as RGB, turned as the file says a player should turn it (phones film on their side)."""
    if frame.is_corrupt:
        raise UserError(f"{path} is damaged {float(frame.time):.2f} seconds in: fetch it again")
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return Image.fromarray(np.ascontiguousarray(pixels))


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled to cover height x width and cut around the centre."""
    scale = max(width / image.width, height / image.height)
    cut_x, cut_y = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = cut_x, cut_y, image.width - cut_x, image.height - cut_y
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


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
