"""Photos as a person sees them, the letterbox, and videos and contact sheets read back from the files."""

import io
import json
import random
import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.media import contact_sheet, read_image, to_tensor, to_uint8, write_video
from data import letterbox


def noise_image(height, width, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def smooth_image(height, width):
    """Colours that survive JPEG: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x], axis=-1)
    return Image.fromarray(values.round().astype(np.uint8))


def seen(image, path, **options):
    """Save, read, as an array; `read_image` must always give plain RGB."""
    image.save(path, **options)
    got = read_image(path)
    assert got.mode == "RGB"
    return np.asarray(got).astype(int)


# ---------------------------------------------------------------------------------------------------------------------
# photos

# What each EXIF orientation asks a viewer to do with the stored pixels.
ORIENTATIONS = {
    1: lambda s: s,
    2: lambda s: s[:, ::-1],
    3: lambda s: s[::-1, ::-1],
    4: lambda s: s[::-1],
    5: lambda s: s.swapaxes(0, 1),
    6: lambda s: np.rot90(s, -1),
    7: lambda s: np.rot90(s, 2).swapaxes(0, 1),
    8: lambda s: np.rot90(s, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix, tolerance", [("png", 0), ("jpg", 12)])
def test_exif_orientation(tmp_path, orientation, suffix, tolerance):
    stored, exif = smooth_image(24, 40), Image.Exif()
    exif[0x0112] = orientation
    got = seen(stored, tmp_path / f"photo.{suffix}", exif=exif)
    want = ORIENTATIONS[orientation](np.asarray(stored)).astype(int)
    assert got.shape == want.shape and np.abs(got - want).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(tmp_path, mode):
    image = noise_image(8, 9, mode)
    values = np.asarray(image).astype(float)
    color, alpha = values[..., :-1], values[..., -1:] / 255
    want = color * alpha + 255 * (1 - alpha)
    got = seen(image, tmp_path / "cut-out.png")
    assert np.abs(got - np.broadcast_to(want, got.shape)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_a_transparent_entry(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 200, 30, 90, 20, 250])
    image.putpixel((1, 0), 1)
    got = seen(image, tmp_path / f"palette.{suffix}", transparency=0)
    assert got.tolist() == [[[255, 255, 255], [90, 20, 250]]]


def test_palette_with_half_transparent_entries(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 100, 0, 200])
    image.putpixel((1, 0), 1)
    got = seen(image, tmp_path / "palette.png", transparency=bytes([128, 255]))
    assert np.abs(got - [[[127, 127, 127], [100, 0, 200]]]).max() <= 1


def test_palette_without_transparency(tmp_path):
    image = smooth_image(16, 16).quantize(8)
    assert np.array_equal(seen(image, tmp_path / "palette.png"), np.asarray(image.convert("RGB")))


def test_grayscale_and_one_bit(tmp_path):
    gray = noise_image(5, 7, "L")
    assert np.array_equal(seen(gray, tmp_path / "gray.png"), np.asarray(gray)[..., None].repeat(3, axis=2))
    bits = gray.point(lambda v: v > 128, mode="1")
    assert np.array_equal(seen(bits, tmp_path / "bits.png"), 255 * np.asarray(bits, int)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    got = seen(Image.fromarray(values), tmp_path / f"deep.{suffix}")
    want = np.round(values / 65535 * 255)
    assert np.array_equal(got, want[..., None].repeat(3, axis=2))


def test_cmyk_jpeg_is_not_a_negative(tmp_path):
    inks = {"white": (0, 0, 0, 0), "black": (0, 0, 0, 255), "cyan": (255, 0, 0, 0), "red": (0, 255, 255, 0)}
    want = {"white": (255, 255, 255), "black": (0, 0, 0), "cyan": (0, 255, 255), "red": (255, 0, 0)}
    for name, ink in inks.items():
        for profile in (None, b"not a profile"):
            path = tmp_path / f"{name}.jpg"
            got = seen(Image.new("CMYK", (16, 16), ink), path, icc_profile=profile, quality=95)
            assert np.abs(got - want[name]).max() < 40, (name, profile)


@pytest.mark.parametrize(
    "write, words",
    [
        (None, "no image at"),
        (b"", "not an image"),
        (b"GIF89a, he said", "image"),
        (b"A letter to a friend.", "not an image"),
    ],
)
def test_what_is_not_an_image(tmp_path, write, words):
    path = tmp_path / "photo.jpg"
    if write is not None:
        path.write_bytes(write)
    with pytest.raises(UserError, match=words) as error:
        read_image(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_and_damaged_images_never_end_in_a_traceback(tmp_path, kind):
    rng, buffer, path = random.Random(kind), io.BytesIO(), tmp_path / "photo"
    noise_image(40, 60).save(buffer, kind)
    whole, refused = buffer.getvalue(), 0
    for _ in range(60):
        data = bytearray(whole[: rng.randrange(len(whole))])
        if rng.random() < 0.5:
            data = bytearray(whole)
            for _ in range(5):
                data[min(int(rng.expovariate(1 / 60)), len(data) - 1)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert read_image(path).mode == "RGB"
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 10


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(UserError, match="no image"):
        read_image(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# letterbox and tensors


@pytest.mark.parametrize("seed", range(25))
def test_letterbox_keeps_the_aspect_ratio_in_the_middle_of_black(seed):
    rng = random.Random(seed)
    photo = Image.new("RGB", (rng.randint(1, 700), rng.randint(1, 700)), "white")
    height, width = rng.randint(1, 20) * 32, rng.randint(1, 30) * 32
    boxed = letterbox(photo, height, width)
    assert boxed.size == (width, height) and boxed.mode == "RGB"
    values = np.asarray(boxed).astype(int)
    white = values.min(axis=2) == 255
    assert np.isin(values, [0, 255]).all()  # nothing in between: bars are black, the rest is the photo
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    assert white[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    top, bottom = rows[0], height - 1 - rows[-1]
    left, right = columns[0], width - 1 - columns[-1]
    assert abs(top - bottom) <= 1 and abs(left - right) <= 1
    assert (top + bottom == 0) or (left + right == 0)  # the largest scale that fits
    scale = min(height / photo.height, width / photo.width)
    assert abs(len(rows) - max(1, photo.height * scale)) <= 0.5 + 1e-6
    assert abs(len(columns) - max(1, photo.width * scale)) <= 0.5 + 1e-6


def test_letterbox_of_the_right_size_changes_nothing():
    photo = noise_image(64, 96)
    assert np.array_equal(np.asarray(letterbox(photo, 64, 96)), np.asarray(photo))


def test_letterbox_shows_the_whole_photo():
    values = np.asarray(letterbox(smooth_image(300, 200), 96, 160)).astype(int)
    inside = values[:, 48:112]
    assert (values[:, :48] == 0).all() and (values[:, 112:] == 0).all()
    assert np.abs(inside[0, 0] - [0, 0, 128]).max() < 6 and np.abs(inside[-1, -1] - [255, 255, 128]).max() < 6


def test_bytes_to_tensor_and_back():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor[:, None])[0], np.asarray(image))
    assert to_tensor(Image.fromarray(np.array([[[255, 0, 0]]], dtype=np.uint8))).flatten().tolist() == [1, -1, -1]


def test_beyond_the_range_is_clamped_and_axes_are_frames_rows_columns():
    video = torch.full((3, 2, 4, 5), 7.0)
    video[:, 1] = -7.0
    frames = to_uint8(video)
    assert frames.shape == (2, 4, 5, 3) and frames.dtype == np.uint8
    assert (frames[0] == 255).all() and (frames[1] == 0).all()
    assert to_uint8(video.bfloat16()).shape == (2, 4, 5, 3)


# ---------------------------------------------------------------------------------------------------------------------
# videos and contact sheets


def colored_frames(count, height, width):
    """Frames that tell which they are, and which way up: a colour ramp that brightens over time."""
    base = np.asarray(smooth_image(height, width)).astype(float)
    return np.stack([base * (0.3 + 0.7 * k / max(1, count - 1)) for k in range(count)]).round().astype(np.uint8)


@pytest.mark.parametrize("fps", [24.0, 23.976, 12.0, 29.97, 60.0])
def test_video_reads_back_as_it_was_written(tmp_path, fps):
    path, frames, comment = tmp_path / "clip.mp4", colored_frames(9, 64, 96), json.dumps({"seed": 3, "prompt": 'ä "q"'})
    write_video(path, frames, fps, comment)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (96, 64)
        assert stream.frames == 9 and abs(float(stream.average_rate) - fps) < 1e-3
        assert json.loads(container.metadata["comment"]) == {"seed": 3, "prompt": 'ä "q"'}
        decoded = [frame for frame in container.decode(stream)]
    times = [frame.time for frame in decoded]
    assert np.allclose(times, np.arange(9) / fps, atol=1e-3)
    got = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(int)
    assert np.abs(got - frames).mean() < 6


@pytest.mark.parametrize("count, height, width", [(1, 32, 32), (2, 8, 8), (17, 480, 832)])
def test_videos_of_extreme_sizes(tmp_path, count, height, width):
    write_video(tmp_path / "clip.mp4", colored_frames(count, height, width), 24.0)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(decoded).shape == (count, height, width, 3)


def test_players_find_the_index_in_front(tmp_path):
    """moov before mdat: a browser starts before the whole file is there."""
    write_video(tmp_path / "clip.mp4", colored_frames(5, 32, 32), 24.0)
    data, atoms, place = (tmp_path / "clip.mp4").read_bytes(), [], 0
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        atoms.append(kind.decode())
        place += size
    assert place == len(data) and atoms.index("moov") < atoms.index("mdat")


def test_a_video_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(av.FFmpegError):  # yuv420p wants even sides
        write_video(tmp_path / "clip.mp4", np.zeros((3, 33, 33, 3), dtype=np.uint8), 24.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count, height, width", [(17, 64, 64), (121, 48, 96), (3, 200, 320), (1, 64, 64)])
def test_contact_sheet_shows_the_reference_then_first_to_last(tmp_path, count, height, width):
    reference, frames = noise_image(height, width, seed=1), colored_frames(count, height, width)
    contact_sheet(tmp_path / "sheet.png", reference, frames)
    sheet = Image.open(tmp_path / "sheet.png")
    cell = max(width, 160)
    rows, cells = round(height * cell / width), min(6, count) + 1
    assert sheet.mode == "RGB" and sheet.size == (cells * (cell + 4) - 4, rows + 16)
    for k, image in ((0, reference), (1, Image.fromarray(frames[0])), (cells - 1, Image.fromarray(frames[-1]))):
        x = k * (cell + 4)
        got = np.asarray(sheet.crop((x, 16, x + cell, 16 + rows))).astype(int)
        want = np.asarray(image.resize((cell, rows), Image.Resampling.LANCZOS)).astype(int)
        assert np.array_equal(got, want), k


def test_contact_sheet_without_reference(tmp_path):
    contact_sheet(tmp_path / "sheet.png", None, colored_frames(9, 64, 64))
    assert Image.open(tmp_path / "sheet.png").width == 6 * 164 - 4
