"""Photos as a person sees them, the letterbox, and videos and contact sheets read back from the files."""

import io
import json
import os
import random
import socket
import struct
import zlib

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from common.errors import UserError
from common.images import contact_sheet, cover, cover_box, from_bytes, read_image, to_bytes, to_tensor, to_uint8
from common.video import write_video
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


def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    """Each of these blocks, never ends or shows a device when opened: nothing may open them."""
    monkeypatch.setattr(Image, "open", lambda *a, **b: pytest.fail("opened"))
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s.png"))
    (tmp_path / "to-pipe.png").symlink_to("pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    names = ["pipe.png", "s.png", "to-pipe.png", "loop.png", "dangling.png", ".", "x" * 300, "nul\0.png", "a.png/b.png"]
    for path in [*(tmp_path / name for name in names), "/dev/zero", "/dev/null", "", " ", "https://example.com/a.jpg"]:
        with pytest.raises(UserError, match="no image at"):
            read_image(path)


def eps(marker):
    """Pillow would hand it to Ghostscript, which would write a file."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({marker}) (w) file closefile\n".encode()


FOREIGN = {  # formats that nobody has photos in; each of these ended in a traceback or started a program
    "emf": b"\x01\0\0\0" + b"\0" * 36 + b" EMF" + b"\0" * 100,
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 64, 64, 96) + b"\0" * 6 + b"\x01\0\t\0" + b"\0" * 40,
    "dds": b"DDS " + struct.pack("<I", 124) + bytes(range(120)) + b"\0" * 64,
    "blp": b"BLP2" + struct.pack("<I", 9) + b"\x63\x63\x63\x63" + struct.pack("<II", 64, 64) + b"\0" * 2000,
    "qoi": b"qoif" + struct.pack(">IIBB", 64, 64, 3, 0) + b"\xfe",
    "ppm": b"P6 64 64 255\n" + b"\x40" * 64 * 64 * 3,
    "psd": b"8BPS\0\x01" + b"\0" * 6 + struct.pack(">HIIHH", 3, 64, 64, 8, 3) + b"\0\0\0\0" * 3,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>',
    "pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "hdf": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
}


@pytest.mark.parametrize("kind", ["eps", *FOREIGN])
def test_other_formats_are_not_decoded(tmp_path, kind, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = tmp_path / "photo.jpg"
    path.write_bytes(eps(tmp_path / "ran") if kind == "eps" else FOREIGN[kind])
    with pytest.raises(UserError, match=r"photo\.jpg is not an image that can be read \(JPEG, PNG"):
        read_image(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF"])
def test_formats_that_people_have(tmp_path, kind, recwarn):
    """Of an animation the first picture; lossless formats exactly."""
    image = smooth_image(48, 64)
    more = {"save_all": True, "append_images": [image.rotate(90)]} if kind in ("PNG", "WEBP", "AVIF", "GIF") else {}
    image.save(tmp_path / "photo", kind, **more)
    got = np.asarray(read_image(tmp_path / "photo")).astype(int)
    tolerance = {"PNG": 0, "TIFF": 0, "BMP": 0}.get(kind, 24)
    assert np.abs(got - np.asarray(image)).max() <= tolerance and not recwarn.list


def entries(*rows):
    """An EXIF directory of (tag, type, count, four bytes)."""
    body = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in rows)
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + body + b"\0\0\0\0"


TURNED = (0x112, 3, 1, struct.pack("<I", 6))
BROKEN_EXIF = {  # payload, is it turned
    "garbage": (b"garbage garbage garbage", False),
    "cut": (b"II*\0\x08\0\0\0\xff\xff\x12\x01", False),
    "orientation 99": (entries((0x112, 3, 1, struct.pack("<I", 99))), False),
    "orientation text": (entries((0x112, 2, 4, b"six\0")), False),
    "orientation twice": (entries((0x112, 3, 2, struct.pack("<HH", 6, 6))), True),
    "bad offsets": (entries(TURNED, (0x8769, 4, 1, b"\0\0\0\x80"), (0x100, 5, 10**6, struct.pack("<I", 10**9))), True),
    "loops": (entries(TURNED, (0x8769, 4, 1, struct.pack("<I", 8)), (0x8825, 4, 1, struct.pack("<I", 8))), True),
    "wrong types": (
        entries((0x10F, 5, 1, struct.pack("<I", 8)), TURNED, (0x8769, 2, 4, b"abc\0"), (0x501B, 1, 4, b"abcd")),
        True,
    ),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_costs_no_photo(tmp_path, name, recwarn):
    """As in a viewer: turned if the orientation can be read, otherwise as stored."""
    payload, turned = BROKEN_EXIF[name]
    smooth_image(24, 40).save(tmp_path / "photo.jpg")
    data, part = (tmp_path / "photo.jpg").read_bytes(), b"Exif\0\0" + payload
    stored = np.asarray(Image.open(tmp_path / "photo.jpg")).astype(int)
    (tmp_path / "photo.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part + data[2:])
    got = np.asarray(read_image(tmp_path / "photo.jpg")).astype(int)
    assert np.array_equal(got, np.rot90(stored, -1) if turned else stored) and not recwarn.list


def png(width, height, depth=8, color=2, rows=None, extra=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3}[color]
    line = b"\0" + b"\x40" * ((width * channels * depth + 7) // 8) if rows is None else b""
    if rows is None:
        packer = zlib.compressobj(9)
        rows = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_work(tmp_path, size):
    (tmp_path / "photo.png").write_bytes(png(*size))
    image = read_image(tmp_path / "photo.png")
    assert image.size == size
    for fitted in (cover(image, 32, 64), letterbox(image, 32, 64)):
        assert fitted.size == (64, 32)
    assert (np.asarray(cover(image, 32, 64)) == 64).all()


BOMBS = {
    "20000x20000": (lambda: png(20000, 20000, 1, 0), r"more than \d+ million pixels"),
    "2147483647 squared": (lambda: png(2**31 - 1, 2**31 - 1, rows=b"\0"), "million pixels"),
    "no pixel": (lambda: png(0, 0, rows=zlib.compress(b"")), "image"),
    "text": (lambda: png(9, 9, extra=4 * text_chunk(10**8)), "damaged image"),
    "garbage": (lambda: png(64, 64, rows=b"not zlib at all"), "damaged image"),
}


def text_chunk(size):
    data = b"zTXtk\0\0" + zlib.compress(b"A" * size, 9)
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_have_their_line(tmp_path, name, recwarn):
    make, words = BOMBS[name]
    (tmp_path / "photo.png").write_bytes(make())
    with pytest.raises(UserError, match=rf"photo\.png.*{words}"):
        read_image(tmp_path / "photo.png")
    assert not recwarn.list


def test_large_photos_give_no_warning(tmp_path, recwarn):
    """125 million pixels: Pillow warns from 89 on. They are scaled to 50 million, of the same shape and content."""
    photo = Image.new("1", (12500, 10000))
    photo.paste(1, (6250, 0, 12500, 10000))
    photo.save(tmp_path / "photo.png")
    image = read_image(tmp_path / "photo.png")
    assert not recwarn.list and 49.9e6 < image.width * image.height <= 50e6
    assert image.width / image.height == pytest.approx(1.25, rel=1e-3)
    assert np.array_equal(np.asarray(image)[::1000, [10, image.width // 2 - 10, image.width // 2 + 10, -10], 0],
                          np.tile([0, 0, 255, 255], (len(range(0, image.height, 1000)), 1)))  # fmt: skip


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_of_luma_and_chroma(tmp_path, compression):
    photo = smooth_image(24, 40)
    photo.convert("YCbCr").save(tmp_path / "photo.tif", compression=compression)
    assert np.abs(np.asarray(read_image(tmp_path / "photo.tif")).astype(int) - np.asarray(photo)).max() <= 3


@pytest.mark.parametrize("error", [RuntimeError("x"), IndexError(), ZeroDivisionError(), struct.error(), KeyError("x")])
def test_whatever_a_decoder_raises_is_damage(tmp_path, error, monkeypatch):
    smooth_image(8, 8).save(tmp_path / "photo.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"photo\.png is a damaged image: \S"):
        read_image(tmp_path / "photo.png")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers(tmp_path, value):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8).copy()
    values[0, 0] = value
    Image.fromarray(values).save(tmp_path / "photo.tif")
    with pytest.raises(UserError, match="NaN or infinite"):
        read_image(tmp_path / "photo.tif")


# ---------------------------------------------------------------------------------------------------------------------
# cover


@pytest.mark.parametrize("height, width", [(480, 832), (512, 512), (704, 1216), (128, 128), (1088, 1920), (832, 480)])
def test_the_box_of_cover_lies_in_every_picture(height, width):
    """All sizes from 1x1 to 4096x4096: inside, centred, of the target's shape, and touching two sides."""
    across = np.arange(1, 4097)[None, :]
    for first in range(1, 4097, 256):
        down = np.arange(first, first + 256)[:, None]
        box = [np.asarray(side, np.float32) for side in cover_box(across, down, width, height)]  # as Pillow takes it
        left, top, right, bottom = np.broadcast_arrays(*box)
        assert left.min() >= 0 and top.min() >= 0 and (right <= across).all() and (bottom <= down).all()
        assert (right > left).all() and (bottom > top).all()
        wide = across * height >= down * width  # in whole numbers: the picture is wider than the target
        assert (top[wide] == 0).all() and (bottom == down)[wide].all()
        assert (left[~wide] == 0).all() and (right == across)[~wide].all()
        truth = np.where(wide, down * (width / height), across * (height / width))
        assert (np.abs(np.where(wide, right - left, bottom - top) - truth) < 1e-3).all()
        assert (np.abs(left + right - across) < 1e-3).all() and (np.abs(top + bottom - down) < 1e-3).all()


@pytest.mark.parametrize("size", [(720, 480), (720, 576), (1440, 1080), (720, 1280), (3, 7), (4096, 1), (1, 4096)])
def test_cover_takes_every_picture(size):
    assert cover(Image.new("RGB", size, "white"), 480, 832).getextrema() == ((255, 255),) * 3


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


def test_all_bytes_survive_in_any_shape():
    values = np.arange(256, dtype=np.uint8)
    x = from_bytes(values)
    assert np.array_equal(x.numpy(), values.astype(np.float32) / np.float32(127.5) - 1)
    assert np.array_equal(to_bytes(x).numpy(), values)
    shifted = to_bytes(x + torch.linspace(-0.99, 0.99, 256) / 255)  # within half a level
    assert np.array_equal(shifted.numpy(), values)
    assert to_bytes(x.view(2, 4, 8, 4).bfloat16()).shape == (2, 4, 8, 4)


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
    assert np.array_equal(imageio.imread(path, plugin="pyav"), got)  # another program sees the same


@pytest.mark.parametrize("count, height, width", [(9, 64, 64), (17, 64, 64), (25, 128, 128), (9, 270, 480), (1, 8, 8)])
def test_equal_frames_give_equal_files(tmp_path, count, height, width):
    """Noise in motion: with x264's own settings, two or three of five files differ at 64x64."""
    noise = np.random.default_rng(0).integers(0, 256, (height + count, width + count, 3)).astype(np.uint8)
    frames = np.stack([noise[k : k + height, k : k + width] // 4 + 2 * k for k in range(count)])
    files = []
    for k in range(5):
        write_video(tmp_path / f"{k}.mp4", frames, 24.0, "the same")
        files.append((tmp_path / f"{k}.mp4").read_bytes())
    assert all(data == files[0] for data in files[1:])
    assert b"mbtree=0" in files[0]  # as x264 notes in the file: without it, equality may still happen by luck
    assert b"threads=4" in files[0] or height < 270  # x264 gives few rows fewer threads, the same on every machine
    write_video(tmp_path / "5.mp4", frames[:, ::-1], 24.0, "the same")
    assert (tmp_path / "5.mp4").read_bytes() != files[0]


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


def test_a_long_title_ends_at_the_edge(tmp_path):
    """A title of a megabyte took minutes: all of it was drawn."""
    for name, title in (("short", "i" * 1200), ("long", "i" * 1_000_000)):  # the sheet is below 1,200 pixels wide
        contact_sheet(tmp_path / f"{name}.png", None, colored_frames(9, 64, 64), title=title)
    assert (tmp_path / "short.png").read_bytes() == (tmp_path / "long.png").read_bytes()
