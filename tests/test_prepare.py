"""The command: its options by range, one line for each fault, and what it prints."""

import json
import os

import pytest

import prepare

FAULTS = [
    *(([f"--{name}={value}"], name) for name in ("height", "width", "frames") for value in ("0", "-64", "9" * 30)),
    *(([f"--fps={value}"], "fps") for value in ("0", "-1", "nan", "inf", "1e-300", "1e-9")),
    *(([f"--shard-gb={value}"], "shard_gb") for value in ("0", "-1", "nan", "inf", "1e300")),
    *(([f"--workers={value}"], "workers") for value in ("0", "-1", "100000")),
    *(([f"--seed={value}"], "seed") for value in ("-1", "9" * 50)),
    *(([f"--enlarge={value}"], "enlarge") for value in ("0", "0.9", "nan", "1e300")),
    *(([f"--windows={value}"], "windows") for value in ("0", "-1", "100000")),
    *(([f"--min-similarity={value}"], "min_similarity") for value in ("-2", "1.1", "nan")),
    *((["--buckets", "64x64x17", value], value) for value in ("64x64", "64x65x17", "64x64x16", "0x64x17", "axbxc")),
    (["--height=64", "--buckets", "64x64x17"], "one size"),
    (["--buckets", "64000x64000x800001"], "800001 frames of 64000x64000"),
    (["--height=x"], "height"),
    (["--dtype=float16"], "dtype"),
    (["--reference=x"], "reference"),
    (["--device=banana"], "banana"),
    (["--bogus"], "--bogus"),
    (["--height=65"], "--height 65 is not a multiple of 8"),
    (["--frames=80000000001"], "--frames 80000000001 is above 1,000,000"),
    (["--frames=800001", "--height=64000", "--width=64000"], "800001 frames of 64000x64000"),
]


def one_line(code, stderr, said):
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and said in stderr


@pytest.mark.parametrize(("options", "said"), FAULTS)
def test_options_out_of_range_are_one_line_and_nothing_is_written(options, said, root, tmp_path, in_process):
    manifest = root / "assets" / "clips" / "manifest.csv"
    words = ["--manifest", manifest, "--out", tmp_path / "c", *options]
    code, _, stderr = in_process(prepare.main, "prepare.py", *words)
    one_line(code, stderr, said)
    assert not (tmp_path / "c").exists()


def test_other_faults_are_one_line(root, tmp_path, in_process, monkeypatch):
    manifest = root / "assets" / "clips" / "manifest.csv"
    for words, said in [
        ([], "--manifest, --out"),
        (["bogus"], "--manifest"),
        (["show"], "cache"),
        (["show", tmp_path / "nowhere"], "no cache in"),
        (["vip200k"], "--annotations"),
        (["vip200k", "--annotations", manifest, "--videos", tmp_path, "--out", manifest], "would replace"),
        (["vip200k", "--annotations", manifest, "--videos", tmp_path, "--out", "o.jsonl", "--seed", "-1"], "seed"),
        (["--manifest", tmp_path / "none.csv", "--out", tmp_path / "c"], "no manifest at"),
    ]:
        code, _, stderr = in_process(prepare.main, "prepare.py", *words)
        one_line(code, stderr, said)
    for name in ("report.jsonl", "cache.json"):  # a manifest that the cache would replace
        (tmp_path / "report.jsonl").write_text(json.dumps({"video": "a.mp4", "caption": "x"}))
        before = (tmp_path / "report.jsonl").read_bytes()
        if name == "cache.json":
            os.link(tmp_path / "report.jsonl", tmp_path / "m.jsonl")  # by another name of the same file
        words = ["--manifest", tmp_path / ("m.jsonl" if name == "cache.json" else name), "--out", tmp_path]
        code, _, stderr = in_process(prepare.main, "prepare.py", *words)
        one_line(code, stderr, "would replace")
        assert (tmp_path / "report.jsonl").read_bytes() == before
    for variables, said in [({"RANK": "abc"}, "RANK"), ({"RANK": "2", "WORLD_SIZE": "2"}, "WORLD_SIZE")]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            code, _, stderr = in_process(prepare.main, "prepare.py", "--manifest", manifest, "--out", tmp_path / "c")
            one_line(code, stderr, said)


def test_without_a_checkpoint_it_says_which_model_it_uses(root, tmp_path, in_process):
    manifest = root / "assets" / "clips" / "manifest.csv"
    code, stdout, _ = in_process(prepare.main, "prepare.py", "--manifest", manifest, "--out", tmp_path / "c")
    assert code == 0 and "tiny model" in stdout and "drawn faces" in stdout
    code, stdout, _ = in_process(prepare.main, "prepare.py", "show", tmp_path / "c")
    assert code == 0 and "4 clips, 0 rows left out" in stdout and (tmp_path / "c" / "show.html").is_file()
