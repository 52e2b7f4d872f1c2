"""Manifests with every fault, and VIP-200K's annotations."""

import json
from collections import Counter

import pytest

from clips.manifest import read_manifest
from clips.vip200k import vip200k
from common.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def test_csv_and_jsonl_say_the_same(tmp_path):
    (tmp_path / "m.csv").write_text(
        "\ufeffvideo,caption,reference,identity,start,end,reference_video,reference_time,reference_box,extra\r\n"
        'a/b.mp4,"She said ""hi"", then left.",r.png,7,1.5,4,,,,x\r\n'
        'c.mp4," zwei\nZeilen ",,,,,d.webm,2.25,"0.1, 0.2 0.5,0.75",\r\n',
        encoding="utf-8",
    )
    rows = [
        {"video": "a/b.mp4", "caption": 'She said "hi", then left.', "reference": "r.png", "identity": 7, "start": 1.5,
         "end": 4, "extra": [1]},
        {"video": "c.mp4", "caption": "zwei\nZeilen", "reference_video": "d.webm", "reference_time": "2.25",
         "reference_box": [0.1, 0.2, 0.5, 0.75], "start": None},
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    csv, jsonl = read_manifest(tmp_path / "m.csv"), read_manifest(str(tmp_path / "m.jsonl"))
    assert [clip.line for clip in csv] == [2, 4] and [clip.line for clip in jsonl] == [1, 3]
    for a, b in zip(csv, jsonl):
        assert vars(a) | {"line": 0} == vars(b) | {"line": 0} and a.problem is None
    assert csv[0].video == tmp_path / "a/b.mp4" and csv[0].reference == tmp_path / "r.png"
    assert (csv[0].identity, csv[0].start, csv[0].end) == ("7", 1.5, 4.0) and csv[
        0
    ].caption == 'She said "hi", then left.'
    assert csv[1].reference_video == tmp_path / "d.webm" and csv[1].reference_box == (0.1, 0.2, 0.5, 0.75)
    assert (csv[1].start, csv[1].end, csv[1].reference_time, csv[1].caption) == (0.0, None, 2.25, "zwei\nZeilen")


def test_bad_rows_keep_their_place_and_say_why(tmp_path):
    rows = [
        ('{"video": "a.mp4", "caption": "good"}', None),
        ('{"video": "a.mp4", "caption": ', "JSON"),
        ("[1, 2]", "object"),
        ('"text"', "object"),
        ('{"video": " ", "caption": "x"}', "video is missing"),
        ('{"caption": "x"}', "video is missing"),
        ('{"video": "a.mp4", "caption": "x", "start": "soon"}', "start = 'soon'"),
        ('{"video": "a.mp4", "caption": "x", "start": -1}', "start = -1"),
        ('{"video": "a.mp4", "caption": "x", "end": NaN}', "end = nan"),
        ('{"video": "a.mp4", "caption": "x", "start": 3, "end": 3}', "end 3 is not after start 3"),
        ('{"video": "a.mp4", "caption": "x", "reference_video": "b.mp4"}', "reference_time go together"),
        ('{"video": "a.mp4", "caption": "x", "reference_box": [0.1, 0.2, 0.3]}', "reference_box"),
        ('{"video": "a.mp4", "caption": "x", "reference_box": [100, 20, 300, 400]}', "reference_box"),
        (r'{"video": "a\u0000.mp4", "caption": "x"}', "video = 'a\\x00"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "recursion"),
        ('{"video": "a.mp4", "caption": "x", "start": ' + "9" * 5000 + "}", "out of range"),
        ('{"video": "a.mp4", "caption": "x", "end": ' + "9" * 400 + "}", "end = 999"),
        ('{"video": ["a.mp4"], "caption": "x"}', "video = ['a.mp4']"),
        ('{"video": "a.mp4", "caption": "x", "reference_box": [-0.9, -0.9, -0.5, -0.5]}', "reference_box"),
        ('{"video": "a.mp4", "caption": "x", "reference_box": {"a": 1}}', "reference_box"),
        (r'{"video": "a.mp4", "caption": "half an emoji \ud83d"}', "hex escape"),
        ('{"video": "b.mp4", "caption": "good"}', None),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(text for text, _ in rows))
    clips = read_manifest(tmp_path / "m.jsonl")
    assert [clip.line for clip in clips] == list(range(1, len(rows) + 1))
    for clip, (_, problem) in zip(clips, rows):
        assert clip.problem is None if problem is None else problem in clip.problem
    (tmp_path / "m.jsonl").write_bytes(
        b'{"video": "a.mp4", "caption": "\xe9"}\n{"video": "b.mp4", "caption": "\xc3\xa9"}'
    )
    latin, utf8 = read_manifest(tmp_path / "m.jsonl")
    assert "unicode" in latin.problem and utf8.problem is None and utf8.caption == "é"
    (tmp_path / "m.csv").write_text("video,caption\na.mp4,x\nb.mp4,x,y,z\nc.mp4\n,x\n")
    clips = read_manifest(tmp_path / "m.csv")
    assert [clip.problem for clip in clips] == [None, "more fields than columns", None, "row: video is missing"]
    assert clips[2].caption == ""  # an empty caption is found in prepare, with the other reasons


def test_what_is_no_manifest(tmp_path):
    for name, content, said in [
        ("a.csv", "video,text\na.mp4,x\n", r"a\.csv, line 1: no column 'caption'.*text"),
        ("only.csv", "file,caption\n", r"only\.csv, line 1: no column 'video'"),
        ("a.jsonl", '\n{"video": "a.mp4", "text": "x"}\n', r"a\.jsonl, line 2: no column 'caption'"),
        ("twice.csv", "video,caption,video\na.mp4,x,b.mp4\n", r"twice\.csv, line 1: two columns 'video'"),
        ("empty.csv", "", r"empty\.csv lists no clip"),
        ("head.csv", "video,caption\n", r"head\.csv lists no clip"),
        ("a.txt", "x", r"a\.txt.*\.csv or \.jsonl"),
        ("latin.csv", "video,caption\na.mp4,é".encode("latin-1"), r"latin\.csv is not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=said):
            read_manifest(tmp_path / name)
    with pytest.raises(UserError, match=r"no manifest at .*missing\.csv"):
        read_manifest(tmp_path / "missing.csv")


# ---------------------------------------------------------------------------------------------------------------------
# VIP-200K


def annotation(video, first, last, rate, **more):
    clip = {"beg": {"frame_num": first, "framerate": rate}, "end": {"frame_num": last, "framerate": rate}}
    return {"id": video, "clip": clip} | more


def test_vip200k_takes_references_from_other_clips_only(tmp_path):
    """Of VIP-200K's own example: frames 1016 to 1147 at 23.976 fps, a segment 0 to 130 and a face in frame 16."""
    rate, (a, b) = 23.976, ([0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.7, 0.8])
    one = {
        "faces": [
            annotation("aaa", 1016, 1147, rate, fidx=16, xyxy_norm=a),
            annotation("aaa", 2000, 2300, rate, fidx=5, xyxy_norm=b),
            annotation("bbb", 1016, 1147, 30.0, fidx=60, xyxy_norm=b),
            annotation("gone", 0, 50, 30.0, fidx=1, xyxy_norm=b),
        ],
        "segments": [
            annotation("aaa", 1016, 1147, rate, fidx_beg=0, fidx_end=130, caption="First."),
            annotation("aaa", 2000, 2300, rate, fidx_beg=24, fidx_end=200, caption="Zweitens: ä."),
            annotation("gone", 0, 50, 30.0, fidx_beg=0, fidx_end=49, caption="Missing."),
        ],
    }
    lonely = {
        "faces": [
            annotation("bbb", 5, 95, 30.0, fidx=3, xyxy_norm=a),
            annotation("gone", 0, 9, 30.0, fidx=1, xyxy_norm=a),
        ],
        "segments": [
            annotation("bbb", 5, 95, 30.0, fidx_beg=0, fidx_end=89, caption="Nobody else."),
            {"id": "bbb", "caption": "no clip"},
        ],
    }  # fmt: skip
    (tmp_path / "vip.json").write_text(json.dumps([one, lonely]))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "aaa.webm").write_bytes(b"x")
    (tmp_path / "videos" / "bbb.mp4").write_bytes(b"x")
    (tmp_path / "videos" / "gone.mp4.part").write_bytes(b"x")
    (tmp_path / "videos" / "gone.mp4").write_bytes(b"")  # a download that never began
    seen = Counter()
    for seed in range(12):
        counts = vip200k(tmp_path / "vip.json", tmp_path / "videos", tmp_path / "m.jsonl", seed)
        first, second = read_manifest(tmp_path / "m.jsonl")
        assert first.problem is None and second.problem is None and first.identity == second.identity
        assert first.video.name == second.video.name == "aaa.webm" and first.caption == "First."
        assert (first.start, first.end) == pytest.approx((1016 / rate, 1147 / rate), abs=1e-5)
        assert (second.start, second.end) == pytest.approx((2024 / rate, 2201 / rate), abs=1e-5)
        ours = {"aaa.webm": (2005 / rate, tuple(b)), "bbb.mp4": (1076 / 30, tuple(b))}
        time, box = ours[first.reference_video.name]
        assert first.reference_time == pytest.approx(time, abs=1e-5) and first.reference_box == box
        ours["aaa.webm"] = (1032 / rate, tuple(a))
        time, box = ours[second.reference_video.name]
        assert second.reference_time == pytest.approx(time, abs=1e-5) and second.reference_box == box
        seen[first.reference_video.name] += 1
    assert len(seen) == 2  # drawn, not always the first
    assert counts == {
        "segments": 5, "written": 2, "video missing": 1, "no face in another clip": 1, "unreadable": 1,
        "videos": 3, "videos missing": 1,
    }  # fmt: skip
    text = (tmp_path / "m.jsonl").read_text()
    vip200k(tmp_path / "vip.json", tmp_path / "videos", tmp_path / "m.jsonl", 11)
    assert (tmp_path / "m.jsonl").read_text() == text and "ä" in text


def test_vip200k_says_what_is_wrong(tmp_path):
    (tmp_path / "videos").mkdir()
    for content, said in [
        ("{", "vip.json is not JSON"),
        ('{"faces": []}', "vip.json.*item 0 has no lists"),
        ('[{"faces": [], "segments": []}, {"faces": []}]', "vip.json.*item 1 has no lists"),
        ('[{"faces": [], "segments": []}]', "none of 0 segments"),
    ]:
        (tmp_path / "vip.json").write_text(content)
        with pytest.raises(UserError, match=said):
            vip200k(tmp_path / "vip.json", tmp_path / "videos", tmp_path / "m.jsonl")
        assert not (tmp_path / "m.jsonl").exists()
    (tmp_path / "vip.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"vip\.json is not JSON"):
        vip200k(tmp_path / "vip.json", tmp_path / "videos", tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="no annotations"):
        vip200k(tmp_path / "videos", tmp_path / "videos", tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="nowhere"):
        vip200k(tmp_path / "vip.json", tmp_path / "nowhere", tmp_path / "m.jsonl")


def test_vip200k_a_bad_item_costs_itself(tmp_path):
    """Each field of a face and of a segment broken in several ways, beside a good one of each."""
    face = annotation("y", 5, 95, 30.0, fidx=3, xyxy_norm=[0.1, 0.2, 0.3, 0.4])
    segment = annotation("x", 0, 90, 30.0, fidx_beg=0, fidx_end=89, caption="Good.")
    bad_clips = [None, {}, {"beg": {"frame_num": 0, "framerate": 0}}, {"beg": {"frame_num": 0, "framerate": "30"}}]
    bad_numbers = [-1, 1.5, "1", 10**400, True, None]
    bad_faces = [5, None, *({**face, "id": bad} for bad in (5, ["y"], "a\0"))]
    bad_faces += [{**face, "clip": bad} for bad in bad_clips] + [{**face, "fidx": bad} for bad in bad_numbers]
    bad_faces += [{**face, "xyxy_norm": bad} for bad in (None, [0, 0, 1], [0.5, 0.5, 0.1, 0.1], [[0], 0, 1, 1])]
    bad_segments = ["x", *({**segment, "clip": bad} for bad in bad_clips)]
    bad_segments += [{**segment, key: bad} for key in ("fidx_beg", "fidx_end") for bad in bad_numbers]
    bad_segments += [{**segment, "caption": bad} for bad in (7, None, "half an emoji \ud83d")]
    persons = [5, {"faces": [*bad_faces, face], "segments": [*bad_segments, segment]}, {"faces": {}, "segments": []}]
    (tmp_path / "vip.json").write_text(json.dumps(persons))
    (tmp_path / "videos").mkdir()
    for name in "xy":
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"x")
    counts = vip200k(tmp_path / "vip.json", tmp_path / "videos", tmp_path / "m.jsonl")
    (clip,) = read_manifest(tmp_path / "m.jsonl")
    assert (clip.caption, clip.reference_video.name, clip.problem) == ("Good.", "y.mp4", None)
    assert clip.reference_time == pytest.approx(8 / 30, abs=1e-5)
    assert counts["unreadable"] == len(bad_segments) and counts["unreadable persons"] == 2 and counts["written"] == 1
