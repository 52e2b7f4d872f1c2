"""Reading video: which frame is shown when, at which size, the right way up, and what is wrong with a file.

The clips are written here with PyAV; each frame carries its number as eight bars, black or white, so what comes out
says where it comes from whatever the codec does to it.
"""

import ctypes
import json
import os
import socket
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.images import read_image
from common.video import TooShort, count_frames, probe_video, read_frame, read_frames, read_video, write_video

HEIGHT, WIDTH = 32, 64


def bars(number: int) -> np.ndarray:
    """(32, 64, 3): bit 7 of the number is the left bar."""
    bits = [number >> (7 - k) & 1 for k in range(8)]
    return np.broadcast_to(np.repeat(bits, 8)[None, :, None] * 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    return int("".join("1" if frame[8:-8, 8 * k + 2 : 8 * k + 6].mean() > 127 else "0" for k in range(8)), 2)


def make_video(path, frames, rate=30, times=None, codec="libx264", key_every=12, **container):
    """times: when each frame is shown, in milliseconds; without, at a constant rate."""
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=rate, options={"g": str(key_every)})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[k]), stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "ts"])
def test_frames_by_time_at_constant_rate(kind, tmp_path):
    """30 fps read at 24, 12, 30 and 60, also from the middle, where a container must be sought into."""
    codec = "libvpx-vp9" if kind == "webm" else "libx264"
    path = make_video(tmp_path / f"a.{kind}", [bars(k) for k in range(120)], codec=codec)
    for fps in (24, 12, 30, 60):
        for start in (0.0, 0.5, 1.77, 3.1):
            count = int((3.95 - start) * fps)
            video = read_video(path, count, fps, HEIGHT, WIDTH, start)
            assert video.shape == (count, HEIGHT, WIDTH, 3) and video.dtype == np.uint8
            # frame j is stamped j / 30, in WebM and MKV rounded to a millisecond
            truth = [int((start + k / fps) * 30 + 0.03) for k in range(count)]
            assert [number_of(frame) for frame in video] == truth, (fps, start)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mpg"])
def test_frames_by_time_far_from_a_key_frame(kind, tmp_path):
    """Key frames every 3 seconds. MPEG-PS has no index: sought to 3.1 or 3.2 it lands at 4.3, behind what is wanted.

    And what FFmpeg makes of its time stamps after a seek is up to one frame off.
    """
    codec = "mpeg2video" if kind == "mpg" else "libx264"
    path = make_video(tmp_path / f"a.{kind}", [bars(k) for k in range(150)], codec=codec, key_every=90)
    for start in (1.5, 2.9, 4.1, 4.2):
        truth = int(start * 30 + 0.03) + np.arange(5)
        numbers = [number_of(frame) for frame in read_video(path, 5, 30, HEIGHT, WIDTH, start)]
        assert np.abs(numbers - truth).max() <= (kind == "mpg"), (start, numbers)
        assert abs(number_of(np.asarray(read_frame(path, start))) - truth[0]) <= (kind == "mpg")


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_frames_by_time_at_variable_rate(kind, tmp_path):
    """The last frame stamped at or before each time, with gaps from 3 ms to over a second."""
    gaps = np.random.default_rng(0).choice([3, 10, 33, 41, 90, 400, 1100], 80)
    times = np.concatenate([[0], np.cumsum(gaps)])
    path = make_video(tmp_path / f"v.{kind}", [bars(k) for k in range(81)], times=times)
    for fps in (24, 12):
        for start in (0.0, 4.2):
            count = int((times[-1] / 1000 - start) * fps)
            truth = [np.flatnonzero(times <= (start + k / fps) * 1000 + 1)[-1] for k in range(count)]
            video = read_video(path, count, fps, HEIGHT, WIDTH, start)
            assert [number_of(frame) for frame in video] == truth
    for time in (0.0, 2.0, 7.43):
        truth = np.flatnonzero(times <= time * 1000 + 1)[-1]
        assert number_of(np.asarray(read_frame(path, time))) == truth


def test_scaled_to_cover_and_cut_around_the_centre(tmp_path):
    ramp = np.broadcast_to(np.arange(128)[None, :, None] * 2, (64, 128, 3)).astype(np.uint8)  # value 2 x
    wide = make_video(tmp_path / "wide.mp4", [ramp] * 12)
    tall = make_video(tmp_path / "tall.mp4", [ramp.transpose(1, 0, 2)] * 12)
    # 128 x 64 to 32 x 32: half the size, columns 32 to 95 remain; cell c of the result covers columns 32 + 2c, + 1
    truth = 2 * (32 + 2 * np.arange(32) + 0.5)
    inner = slice(2, -2)
    found = read_video(wide, 1, 30, 32, 32)[0].astype(float)
    assert np.abs(found - truth[None, :, None])[:, inner].max() < 4
    found = read_video(tall, 1, 30, 32, 32)[0].astype(float)
    assert np.abs(found - truth[:, None, None])[inner].max() < 4
    # enlarged, and cut above and below: 128 x 64 to 256 x 64 doubles it, all columns and rows 16 to 47 remain
    found = read_video(wide, 1, 30, 64, 256)[0].astype(float)
    assert np.abs(found - 2 * (np.arange(256) - 0.5)[None, :, None] / 2)[:, 4:-4].max() < 4


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_turned_as_the_file_says(turn, tmp_path):
    """The track's matrix says by how much a player turns the picture clockwise; phones film on their side."""
    corner = np.full((64, 128, 3), 30, np.uint8)
    corner[:16, :32] = 220  # upper left
    path = make_video(tmp_path / "phone.mp4", [corner] * 6)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8  # version, times, id and duration, reserved, layer to volume
    assert struct.unpack(">9i", data[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]  # (x, y) -> (x cos - y sin, x sin + y cos), y downwards
    data[at : at + 36] = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    truth = np.rot90(corner, -turn // 90)
    assert np.abs(np.asarray(read_frame(path, 0)).astype(int) - truth).mean() < 6
    height, width = truth.shape[:2]
    assert np.abs(read_video(path, 3, 30, height, width)[2].astype(int) - truth).mean() < 6


def test_length_and_too_short(tmp_path):
    path = make_video(tmp_path / "short.mp4", [bars(k) for k in range(36)], rate=12)  # 3 seconds
    assert probe_video(path) == pytest.approx(3, abs=0.01)
    video = read_video(path, 36, 12, HEIGHT, WIDTH)
    assert number_of(video[-1]) == 35  # every frame, the last one included
    for frames, start, end in ((37, 0, None), (31, 0.5, None), (13, 1, 2.0), (2, 30, None)):
        with pytest.raises(TooShort, match=rf"short\.mp4.*seconds from {start:g} s.*{frames} frames at 12 fps"):
            read_video(path, frames, 12, HEIGHT, WIDTH, start, end)
    assert len(read_video(path, 12, 12, HEIGHT, WIDTH, 1, 2.0)) == 12
    assert len(read_video(path, 30, 12, HEIGHT, WIDTH, 0.5)) == 30
    with pytest.raises(UserError, match=r"short\.mp4.*9 seconds"):
        read_frame(path, 9)


def test_what_is_no_video(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (8, 16, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(60)]
    whole = make_video(tmp_path / "whole.mp4", noise, movflags="+faststart").read_bytes()
    hurt = bytearray(whole)
    hurt[len(whole) // 3 : len(whole) // 3 + 3000] = rng.integers(0, 256, 3000).astype(np.uint8).tobytes()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    files = {
        "empty.mp4": b"",
        "text.mp4": b"<html>404</html>\n" * 100,
        "hurt.mp4": bytes(hurt),
        "cut.mp4": whole[: len(whole) * 2 // 5],
        "head.mp4": whole[:200],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    for name in [*files, "folder.mp4", "missing.mp4", "sound.wav"]:
        with pytest.raises(UserError, match=name) as caught:
            read_video(tmp_path / name, 45, 24, HEIGHT, WIDTH)
        assert not isinstance(caught.value, TooShort), name  # cut.mp4 is broken, whatever is left of it
    assert len(read_video(tmp_path / "cut.mp4", 10, 24, HEIGHT, WIDTH)) == 10  # what is there can be used
    assert len(read_video(tmp_path / "whole.mp4", 45, 24, HEIGHT, WIDTH)) == 45


def test_a_title_that_is_not_utf8_costs_nothing(tmp_path):
    path = make_video(tmp_path / "a.mp4", [bars(k) for k in range(30)])
    with av.open(str(path)) as source, av.open(str(tmp_path / "titled.mp4"), "w") as out:
        out.metadata["title"] = "TITLETITLE"
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / "titled.mp4").read_bytes()
    assert data.count(b"TITLETITLE") == 1
    path.write_bytes(data.replace(b"TITLETITLE", b"Caf\xe9 \xff\xfe\x80\xc3\x28"))
    with pytest.raises(UnicodeDecodeError), av.open(str(path)):
        pass
    assert [number_of(frame) for frame in read_video(path, 30, 30, HEIGHT, WIDTH)] == list(range(30))
    assert number_of(np.asarray(read_frame(path, 0.5))) == 15 and count_frames(path) == 30
    assert number_of(read_frames(path, [7])[0]) == 7 and probe_video(path) == pytest.approx(1, abs=0.01)


READERS = [
    lambda path: read_video(path, 2, 24, HEIGHT, WIDTH),
    lambda path: read_frame(path, 0.0),
    lambda path: read_frames(path, [0]),
    count_frames,
    probe_video,
]


@pytest.fixture
def listener():
    """A socket on the loopback. At the end nobody must have come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


ADDRESSES = ["http://{}/a.mp4", "tcp://{}", "rtmp://{}/a", "rtsp://{}/a", "hls+http://{}/a.m3u8", "ftp://{}/a.mp4"]


@pytest.mark.parametrize("address", [*ADDRESSES, "cache:http://{}/a", "concat:http://{}/a|http://{}/b"])
def test_no_name_opens_the_network(tmp_path, monkeypatch, listener, address):
    """Neither as a name that is not there, nor as the name of a file that is."""
    monkeypatch.chdir(tmp_path)
    name = address.replace("{}", f"127.0.0.1:{listener}")
    for read in READERS:
        with pytest.raises(UserError, match="no video at"):
            read(name)
    path = Path(name)  # with folders "http:" and so on: "http:/127.0.0.1/a.mp4" is a good name of a file
    path.parent.mkdir(parents=True, exist_ok=True)
    make_video(tmp_path / "a.mp4", [bars(5)] * 3).rename(path)
    for read in READERS:
        read(str(path))


@pytest.fixture
def watched(tmp_path):
    """opened(): was the file secret.mp4 opened since the last call? By inotify."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        pytest.skip("no inotify here")
    secret = make_video(tmp_path / "secret.mp4", [bars(9)] * 30)
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0 and libc.inotify_add_watch(queue, bytes(secret), 0x20) >= 0  # IN_OPEN

    def opened():
        try:
            return bool(os.read(queue, 4096))
        except BlockingIOError:
            return False

    assert not opened() and count_frames(secret) == 30 and opened()  # it does notice
    while opened():
        pass
    yield opened
    os.close(queue)


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile {}\n",
    "concat": "file '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
    ' mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:full:2011"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "ism": '<SmoothStreamingMedia><StreamIndex Url="{}"/></SmoothStreamingMedia>',
    "lavfi": "movie={}",
    "ffmeta": ";FFMETADATA1\ntitle={}\n",
}


@pytest.mark.parametrize("suffix", ["own", "mp4", "avi"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_no_playlist_opens_another_file(tmp_path, monkeypatch, watched, listener, kind, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"list.{kind if suffix == 'own' else suffix}"
    for target in ("secret.mp4", str(tmp_path / "secret.mp4"), f"http://127.0.0.1:{listener}/secret.mp4"):
        path.write_text(PLAYLISTS[kind].replace("{port}", str(listener)).replace("{}", target))
        for read in READERS:
            with pytest.raises(UserError, match="cannot be read as a video"):
                read(path)
        with pytest.raises(UserError):
            read_image(path)
    assert not watched()


def test_no_command_follows_a_playlist(tmp_path, monkeypatch, watched, listener, in_process, root):
    """As video, reference video and photo of prepare, as photo of sample and its batch, as video and photo of eval."""
    import eval as evaluation
    import prepare
    import sample

    monkeypatch.chdir(tmp_path)
    clips, rows, cases = root / "assets" / "clips", [], []
    Path("videos").mkdir()
    for k, kind in enumerate(PLAYLISTS):
        for j, target in enumerate(("secret.mp4", str(tmp_path / "secret.mp4"), f"http://127.0.0.1:{listener}/a.mp4")):
            text = PLAYLISTS[kind].replace("{port}", str(listener)).replace("{}", target)
            for path in (f"{k}-{j}.{kind}", f"{k}-{j}.png", f"videos/{k}-{j}.mp4"):
                Path(path).write_text(text)
            good = {"video": str(clips / "0.mp4"), "caption": "A man."}
            rows += [good | {"video": f"{k}-{j}.{kind}"}, good | {"video": f"videos/{k}-{j}.mp4"}]
            rows += [good | {"reference_video": f"videos/{k}-{j}.mp4", "reference_time": 0.0}]
            rows += [good | {"reference": f"{k}-{j}.png"}]
            cases.append({"id": f"{k}-{j}", "reference": f"{k}-{j}.png", "prompt": "A man."})
    rows.append({"video": str(clips / "0.mp4"), "caption": "A man.", "reference": str(clips / "0.png")})
    for name, lines in (("m.jsonl", rows), ("cases.jsonl", cases)):
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, printed, _ = in_process(prepare.main, "prepare.py", "--manifest", "m.jsonl", "--out", "cache")
    assert code == 0 and f"1 clips of {len(rows)} rows" in printed
    words = ["--steps", 1, "--frames", 5]
    photo = ["--ref", "0-0.png", "--prompt", "A man.", "--out", "a.mp4"]
    assert in_process(sample.main, "sample.py", *photo, *words)[0] == 2
    code, printed, _ = in_process(sample.main, "sample.py", "--batch", "cases.jsonl", *words, "--out", "batch")
    assert code == 2 and printed.count(" failed: ") == len(cases)
    words = ["--faces", root / "assets" / "faces", "--det-size", 128, "--clip", "none", "--out", "scores"]
    code, printed, _ = in_process(evaluation.main, "eval.py", "--videos", "videos", "--cases", "cases.jsonl", *words)
    assert code == 2
    assert not watched()


def test_neither_pictures_nor_image_sequences_are_videos(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "frame1.png")
    for name in ("frame1.png", "frame%d.png", "frame*.png"):
        with pytest.raises(UserError, match=name.replace("*", r"\*")):
            read_frame(tmp_path / name, 0.0)


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for path in (
        tmp_path / "pipe.mp4",
        tmp_path / "loop.mp4",
        tmp_path,
        "/dev/zero",
        "/dev/stdin",
        "nul\0.mp4",
        "-",
        "",
    ):
        with pytest.raises(UserError, match="no video at"):
            read(path)


@pytest.mark.parametrize("error", [RuntimeError("x"), ValueError(), OverflowError(), IndexError(), KeyError("x")])
def test_whatever_a_decoder_raises_is_the_files_line(tmp_path, monkeypatch, error):
    class Broken:
        """A container of the real file whose packets cannot be decoded."""

        def __init__(self, *names, **options):
            self.container = real(*names, **options)
            self.streams = self.container.streams

        def __enter__(self):
            return self

        def __exit__(self, *caught):
            self.container.close()

        def decode(self, stream):
            raise error

    path, real = make_video(tmp_path / "a.mp4", [bars(3)] * 5), av.open
    monkeypatch.setattr(av, "open", Broken)
    for read in READERS[:4]:
        with pytest.raises(UserError, match=r"a\.mp4 cannot be read as a video: \S"):
            read(path)


def test_times_and_numbers_that_no_video_has(tmp_path):
    path = make_video(tmp_path / "a.mp4", [bars(k) for k in range(10)])
    for time in (1e18, 1e300, np.inf):
        with pytest.raises(UserError, match=r"a\.mp4"):
            read_frame(path, time)
        with pytest.raises(UserError, match=r"a\.mp4"):
            read_video(path, 2, 24, HEIGHT, WIDTH, time)
    with pytest.raises(UserError, match=r"a\.mp4 has no frame number 10"):
        read_frames(path, [3, 10])


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_has_all_frames_the_length_and_the_recipe(kind, tmp_path):
    """GIF counts in hundredths of a second, and 17 frames at 12 fps are 1.4167 s. Pictures of few colors stay equal."""
    frames = np.stack([np.tile(bars(k + 1), (2, 1, 1)) for k in range(17)])
    comment = json.dumps({"prompt": "A man nods in a café. 🙂" * 20, "seed": 3}, ensure_ascii=False)
    path = tmp_path / f"a.{kind}"
    write_video(path, frames, 12, comment)
    again = path.read_bytes()
    write_video(path, frames, 12, comment)
    assert path.read_bytes() == again and [file.name for file in tmp_path.iterdir()] == [path.name]
    with Image.open(path) as film:
        assert film.n_frames == 17 and film.info["loop"] == 0
        duration = 0
        for k in range(17):
            film.seek(k)
            shown = np.asarray(film.convert("RGB")).astype(int)
            assert abs(shown - frames[k]).max() <= (0 if kind == "gif" else 60) and number_of(shown[:HEIGHT]) == k + 1
            duration += film.info["duration"]
        assert duration == 1420 and film.info["duration"] in (80, 90)
        film.seek(0)
        text = film.info["comment"].decode() if kind == "gif" else film.getexif()[270].encode("latin-1").decode()
    assert text == comment
    times = [float(frame.time) for frame in av.open(str(path)).decode(video=0)] if kind == "gif" else []
    assert times == pytest.approx([round(100 * k / 12) / 100 for k in range(len(times))]) and len(times) in (0, 17)


def test_what_stands_still_in_a_gif_does_not_flicker(tmp_path):
    """The left half is a still gradient of more colors than GIF has, the right half changes all its colors."""
    still = np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3))
    frames = np.concatenate([np.broadcast_to(still, noise.shape), noise], 2).astype(np.uint8)
    write_video(tmp_path / "a.gif", frames, 12)
    with Image.open(tmp_path / "a.gif") as film:
        shown = []
        for k in range(6):
            film.seek(k)
            shown.append(np.asarray(film.convert("RGB"))[:, :32])
    assert all(np.array_equal(frame, shown[0]) for frame in shown)
