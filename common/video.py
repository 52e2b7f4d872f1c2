"""Video: frames to an MP4, GIF or WebP, and any video file to frames by their time stamps.

frames (F, H, W, 3) of bytes -> write_video -> H.264 in an MP4, or a picture that moves
any video file               -> read_video  -> F frames of any fps and size, picked by time

PyAV directly: imageio's plugin sets no encoder options, and gives neither time stamps nor rotation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError, blame, whole_file
from common.images import cover, require_file

# x264 looks ahead in a thread of its own; with its macroblock tree, the speed of that thread changes the bits.
# Without the tree, and with a fixed number of threads, equal frames give equal bytes. crf 17 makes up for it: measured,
# quality slightly above that of the tree at crf 16, in files 6 to 16% larger.
X264 = {"crf": "17", "x264-params": "mbtree=0:threads=4"}

# Media containers, and no playlist: a playlist names other files and addresses, which FFmpeg would open.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,mxf,nut,gif"


FORMATS = (".mp4", ".gif", ".webp")
IMAGE_DESCRIPTION = 270  # tag of EXIF


def write_video(path: str | Path, frames: np.ndarray, fps: float, comment: str = "") -> None:
    """Frames (F, H, W, 3) of bytes as an H.264 MP4 that players and browsers open, or, by the name's end, as a GIF or
    WebP that repeats for ever. Equal frames give equal files."""
    if Path(path).suffix.lower() in FORMATS[1:]:
        return _write_animation(Path(path), frames, fps, comment)
    import av

    with (
        whole_file(path) as temporary,
        av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # the one that every player knows
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: np.ndarray, fps: float, comment: str) -> None:
    """GIF counts time in hundredths of a second: durations differ by one, so that the whole keeps its length.

    All frames of a GIF share 256 colors, without dithering: what stands still would flicker otherwise.
    """
    ends = np.round(np.arange(1, len(frames) + 1) * 100 / fps).astype(int)
    durations = (10 * np.diff(ends, prepend=0)).tolist()  # milliseconds
    pictures = [Image.fromarray(frame) for frame in frames]
    if path.suffix.lower() == ".gif":
        chosen = frames[np.linspace(0, len(frames) - 1, min(len(frames), 16)).astype(int)]  # (16, H, W, 3)
        palette = Image.fromarray(chosen.reshape(-1, *frames.shape[2:])).quantize(256)
        pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        kind, own = "GIF", {"comment": comment.encode()}
    else:
        kind, own = "WEBP", {"quality": 90, "exif": Image.Exif()}
        own["exif"][IMAGE_DESCRIPTION] = comment.encode()
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **own)


SAME_TIME = 1e-3  # seconds; WebM and MKV count in milliseconds, so a frame's stamp may be half of one too late
SEEK_AHEAD = 1.0  # seconds before the needed time to aim at: some containers seek by decoding order, not by display


class TooShort(UserError):
    """The video is not damaged, and does not last long enough."""


def read_video(
    path: str | Path, frames: int, fps: float, height: int, width: int, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """A video's picture at the times start, start + 1/fps, ... -> (frames, height, width, 3) bytes, RGB.

    The picture at time t is the last frame stamped at or before t, at any rate, constant or not; times count from the
    first frame. Each picture is turned upright, scaled until it covers height x width, and cut around its centre: a
    video has no bars (`losses.flow_loss` averages over all of it). `end` (seconds) is where the clip ends, if that is
    before the end of the file. Raises TooShort, and UserError for a file that is missing or damaged.
    """
    times = start + np.arange(frames) / fps
    pixels = np.empty((frames, height, width, 3), np.uint8)
    if end is None or times[-1] < end - SAME_TIME:
        done, until = 0, 0.0
        for until, frame in _decode(path, start):
            below = int(np.searchsorted(times, until - SAME_TIME))  # number of pictures before the next frame
            if below > done:
                pixels[done:below] = cover(_upright_frame(frame, path), height, width)
                done = below
            if done == frames:
                return pixels
        promised = probe_video(path)
        if until < promised - 0.5 and times[-1] < promised:  # headers are off by a few frames at most
            raise UserError(f"{path} breaks off after {until:.2f} of {promised:.2f} seconds: fetch it again")
        end = until
    raise TooShort(
        f"{path} is too short: {max(0.0, end - start):.2f} seconds from {start:g} s on, "
        f"and {frames} frames at {fps:g} fps need more than {(frames - 1) / fps:.2f}"
    )


def read_frame(path: str | Path, time: float) -> Image.Image:
    """The picture `time` seconds after the video's first frame, upright and in full size."""
    frame, until = None, 0.0
    for until, frame in _decode(path, time):  # noqa: B007 (used below)
        if until > time + SAME_TIME:
            break
    if frame is None or time > until + 1:  # a second of grace: times are rounded, headers promise a little too much
        raise UserError(f"{path} shows nothing at {time:g} seconds: it is shorter, or damaged")
    return _upright_frame(frame, path)


def count_frames(path: str | Path) -> int:
    """Number of frames of a video, by decoding all of it. Raises UserError where it is damaged or breaks off."""
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
    pictures: dict[int, np.ndarray] = {}
    for number, (_, frame) in enumerate(_decode(path, 0.0)):
        if number in numbers:
            pictures[number] = np.asarray(_upright_frame(frame, path))
        if number >= max(numbers):
            break
    if missing := sorted(set(numbers) - pictures.keys()):
        raise UserError(f"{path} has no frame number {missing[0]}: it is shorter, or damaged")
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise UserError(f"{path} changes its size on the way")
    return np.stack([pictures[number] for number in numbers])


def probe_video(path: str | Path) -> float:
    """Length of a video according to its header, in seconds; 0 if the header does not say."""
    with _opened(path) as (container, stream):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1e6


def probe_rate(path: str | Path) -> float:
    """Frames per second of a video on average, according to its header; 0 if the header does not say."""
    with _opened(path) as (_, stream):
        return float(stream.average_rate or 0)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple]:
    """The container and its first video stream. Any exception about the file becomes a UserError.

    FFmpeg reads some names as addresses ("http:", "concat:") and some files as lists of other files. "file:" in front
    of the name and the two white lists leave one protocol, and containers that hold their media themselves.
    """
    import av

    require_file(path, "video")
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    with (
        blame(f"{path} cannot be read as a video"),
        av.open(f"file:{path}", options=options, metadata_errors="ignore") as container,
    ):
        if not container.streams.video:
            raise UserError(f"{path} holds no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _decode(path: str | Path, start: float) -> Iterator[tuple]:
    """(until, frame) in order of display, from a frame at or before `start` on: each frame is shown until that time.

    Times are seconds since the video's first frame, which is not stamped 0 in every file.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        zero, shown = stream.start_time or 0, None
        # A seek lands on the key frame before; where it does not (no index, or a broken one), all is decoded.
        for aim in (start - SEEK_AHEAD, 0.0) if start > SEEK_AHEAD else (0.0,):
            if start > SEEK_AHEAD:
                container.seek(zero + int(aim / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                time = (frame.pts - zero) * stream.time_base
                if shown is not None:
                    yield float(time), shown
                elif aim and time > start:
                    break
                shown = frame
            if shown is not None:
                yield float(time + (shown.duration * stream.time_base or (1 / rate if rate else 0))), shown
                return


def _upright_frame(frame, path: str | Path) -> Image.Image:
    """A decoded frame as RGB, turned as the file says a player should turn it (phones film on their side)."""
    if frame.is_corrupt:
        raise UserError(f"{path} is damaged {float(frame.time):.2f} seconds in: fetch it again")
    with blame(f"{path} cannot be read as a video"):  # not every pixel format can be converted
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return Image.fromarray(np.ascontiguousarray(pixels))
