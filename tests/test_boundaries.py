"""Every file of JSON or TOML that the project reads, with anything in any field.

A healthy file is changed in one place: to a value that its typed record allows, its extremes included, to one that it
does not, to nothing, to more. Or its bytes are damaged. Then it is read, and what was read is used. Either that goes
well, or there is one UserError of one line with the name of the file and of the field.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_sparse
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import JsonValue, TypeAdapter
from safetensors.torch import save_file

import bench.measure as bench
import eval as evaluation
import prepare
import sample
import toy.cache
import toy.make
import toy.mixed
import toy.text
import toy.vae
import toy.world
import train
from checkpoint import OUR_METADATA, QUANTIZATION, Checkpoint
from clips.cache import TextMetadata
from clips.facts import GRID, Facts
from clips.manifest import Clip, read_manifest
from clips.show import show
from clips.vip200k import Face, Segment, vip200k
from common.cache import CachedClips, CacheSettings, NullMetadata, ShardMetadata, digest, read_metadata
from common.device import _Environment, own_place
from common.errors import Parser, UserError, printable
from common.gemma import Kind, load_gemma
from common.ltx_file import Config as LTXConfig
from common.ltx_file import Layers, Ours
from common.media import write_video
from common.schema import foreign_record
from config import ASSETS, VIDEO, Config, as_dict, read_config
from data import TrainingClips, check_cache_fits, fingerprint, latent_shape
from engine import state
from engine.check import check
from engine.logbook import Log
from engine.lora_files import LoRA
from engine.notes import notes_on_recipe
from engine.plan import Plan, plan_of
from engine.recipe import OTHERS, REFERENCE, merged_metadata, resolve_recipe
from evaluation.batch import Batch, read_comment
from evaluation.cases import Case, _Content, read_cases
from evaluation.results import Result, begin, read_results
from evaluation.vbench import _Score, read_vbench
from model import LTXVideo
from toy import ablate, copying, judge
from toy.eye import Eye, Sizes

TINY = ASSETS / "tiny.safetensors"

# ----------------------------------------------------------------------------------------------------------------------
# values, out of the JSON schema that pydantic makes of a typed record

TEXTS = ["", " ", "\0", "a\nb", "../x", "/", "nan", "1e5", "\ud800", "\u202e", "🙂", "x" * 300]
NUMBERS = [-1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**40, 10**400, -(2**63), 0.5, 1e12, 1e300, 5e-324, -0.0]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
LEAVES = st.none() | st.booleans() | st.sampled_from(NUMBERS + TEXTS) | st.text(max_size=4)
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def fitting(schema: dict, defs: dict) -> st.SearchStrategy:
    """Values that a schema allows, more often its extremes."""
    if "$ref" in schema:
        return fitting(defs[schema["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in schema:
        return st.one_of([fitting(part, defs) for part in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -(2**64)))
        most = schema.get("maximum", schema.get("exclusiveMaximum", 2**64))
        if kind == "integer":
            least, most = least + ("exclusiveMinimum" in schema), most - ("exclusiveMaximum" in schema)
            step = schema.get("multipleOf", 1)
            return st.sampled_from([-(-least // step), most // step]).map(lambda k: k * step) | st.integers(least, most)
        return st.floats(float(least), float(most)) | st.integers(int(least), int(most))
    if kind == "array":
        if "prefixItems" in schema:
            return st.tuples(*[fitting(part, defs) for part in schema["prefixItems"]]).map(list)
        least = schema.get("minItems", 0)
        return st.lists(fitting(schema.get("items", {}), defs), min_size=least, max_size=max(3, least))
    if kind == "object" and "properties" in schema:
        fields = {name: fitting(part, defs) for name, part in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=fields)
    simple = {"string": st.sampled_from(TEXTS) | st.text(max_size=4), "boolean": st.booleans(), "null": st.none()}
    return simple.get(kind, ANYTHING)


def below(schema: dict, defs: dict, key: str | int) -> dict:
    """The schema of a field of an object, or of an item of a list; {} where it says nothing."""
    for part in schema.get("anyOf", [schema]):
        part = defs[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if isinstance(key, str) and (found := part.get("properties", {}).get(key) or part.get("additionalProperties")):
            return found if isinstance(found, dict) else {}
        if isinstance(key, int) and (items := part.get("prefixItems")):
            return items[key] if key < len(items) else {}
        if isinstance(key, int) and "items" in part:
            return part["items"]
    return {}


def keys_inside(value: Any) -> list[str]:
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [*(value if isinstance(value, dict) else ()), *(key for part in inside for key in keys_inside(part))]


def changed(draw: Callable, value: Any, schema: dict, defs: dict, top: bool = True) -> tuple[Any, list[str]]:
    """`value` with a change in one place, and the names of the fields around that place."""
    keys = list(range(len(value))) if isinstance(value, list) else []
    if isinstance(value, dict):
        part = defs[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        keys = sorted({*value, *part.get("properties", {})})
    if not keys or draw(st.integers(0, 19 if top else 3)) == 0:
        new = draw(fitting(schema, defs) | ANYTHING)
        return new, [] if top else keys_inside(new)
    key = draw(st.sampled_from(keys))
    inner, rest = below(schema, defs, key), list(value.items() if isinstance(value, dict) else enumerate(value))
    names = [key] if isinstance(key, str) else []
    what = draw(st.integers(0, 9))
    if what == 0:  # nothing in its place
        rest = [(k, v) for k, v in rest if k != key]
    elif what == 1:  # an unknown one beside it
        rest.append((draw(st.text(max_size=4)), draw(ANYTHING)))
        names = []
    elif isinstance(value, dict) and key not in value:
        rest.append((key, draw(fitting(inner, defs) | ANYTHING)))
    else:
        new, more = changed(draw, dict(rest)[key], inner, defs, top=False)
        if more and isinstance(key, int):  # an error may be of what is missing there: "2.similarity is missing"
            more = [*more, f"{key}.", f"{key} ="]
        rest, names = [(k, new if k == key else v) for k, v in rest], names + more
    return (dict(rest) if isinstance(value, dict) else [v for _, v in rest]), names


def damaged(draw: Callable, data: bytes) -> bytes:
    place = draw(st.integers(0, len(data)))
    return draw(
        st.sampled_from([
            b"", data[:place], data[:place] + b"\xff" + data[place:], b"\xef\xbb\xbf" + data, b"[" * 100_000,
            data.decode().encode("utf-16"), data[:place] + b"\\ud800" + data[place:], b'{"a":' * 100_000, b"9" * 5000,
        ])
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# formats: the record, a healthy file, and the code that reads and uses it


@dataclass
class Format:
    kind: Any  # the typed record
    healthy: Any
    read: Callable[[Path, bytes], Any]  # folder, content of the file
    file: str = "files"  # its name, in every error
    instead: str = "Invalid JSON"  # words of an error that names no field
    refused: bool = True  # False: whatever is in the file, it counts as missing


@foreign_record
class Person:
    faces: list[Face]
    segments: list[Segment]


Record = dict[str, JsonValue]
SETTINGS = {key: Checkpoint(TINY).ours["defaults"][key] for key in ("height", "width", "frames", "fps")}
SETTINGS |= {"latent_shape": latent_shape(SETTINGS, Checkpoint(TINY).config["vae"]), "shards": 1, "rows_per_shard": 9}
SETTINGS |= {"checkpoint": "0123", "gemma": "4567", "faces": "89ab", "seed": 0, "manifest": "m.csv"}
BUCKET = ("height", "width", "frames", "latent_shape")
FACTS = {"boxes": [[0.1, 0.1, 0.9, 0.9], None, None], "ref_box": [0.0, 0.0, 1.0, 1.0], "similarity": 0.5, "turned": 90}
FACTS |= {"pose": [0.0, 1.0, 2.0], "background": 0.2, "signature": "0f" * 3 * GRID**2}
CASE = {"id": "a", "reference": str(ASSETS / "face.png"), "prompt": "A man nods.", "seed": 3}
SCORES = {"id": "a", "stamp": "0", "facesim_arc": 0.5, "facesim_cur": None, "clip_score": 0.3, "face_rate": 1.0}
SCORES |= {"retried": 0, "background_copy": 0.1, "pose_copy": None, "identity_drift": 0.2}
CLIP = {"video": "a.mp4", "caption": "A man nods.", "reference_video": "b.mp4", "reference_time": 0.5}
CLIP |= {"reference_box": [0.2, 0.2, 0.8, 0.8], "identity": "x", "start": 0.0, "end": 1.0}
MOMENT = {"frame_num": 24, "framerate": 24.0}
SPAN = {"beg": MOMENT, "end": {"frame_num": 99, "framerate": 24.0}}
PERSON = {
    "faces": [{"id": "b", "clip": SPAN, "fidx": 3, "xyxy_norm": [0.1, 0.1, 0.5, 0.5]}],
    "segments": [{"id": "a", "clip": SPAN, "fidx_beg": 0, "fidx_end": 20, "caption": "A man nods."}],
}
ROW = {"similarity": 0.5, "retrieved": True, "retrieved_permuted": False, "face_rate": 1.0, "drift": 0.1, "grain": 0.1}
ROW |= dict.fromkeys(["motion", "direction", "background", "shirt", "skin", "hair", "style", "glasses", "beard"], True)
ROW |= {"motions": {"nod": True}} | dict.fromkeys(["shown", "photo", "photo_read"], [0.5] * len(judge.SCENE))
OPTIONS = argparse.Namespace(**dict.fromkeys((*VIDEO, *REFERENCE, *OTHERS, "preset")))


def write_clips(folder: Path, text: bytes, part: str) -> Path:
    """A cache of one clip whose `part` (cache.json, or the metadata of one of its files) is `text`."""
    try:
        settings = json.loads(text) if part == "cache.json" else SETTINGS
        own = {"settings": digest(settings)}
    except (ValueError, RecursionError, UnicodeDecodeError):
        own = {"settings": ""}
    metadata = {"shard": own | {"clips": [{"row": 0, "name": "a:2"}], "report": []}, "null": own | {"max_tokens": 64}}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    metadata |= {part: text.decode("latin-1")} if part in metadata else {}
    (folder / "cache.json").write_bytes(text if part == "cache.json" else json.dumps(SETTINGS).encode())
    photo = bytearray((ASSETS / "face.png").read_bytes())
    clip = {"latents": torch.zeros(SETTINGS["latent_shape"], dtype=torch.bfloat16), "e_ref": torch.ones(64)}
    clip |= {"features": torch.ones(3, 8), "image": torch.frombuffer(photo, dtype=torch.uint8)}
    clip |= {"caption": torch.frombuffer(bytearray(b"A man nods."), dtype=torch.uint8)}
    if part == "facts":
        facts = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
        clip |= {"facts": facts, "strip": clip["image"][:99].clone()}
    tensors = {f"0000000.{name}": tensor for name, tensor in clip.items()}
    save_file(tensors, folder / "shard-00000.safetensors", {"cache": metadata["shard"]})
    save_file({"features": torch.ones(1, 8)}, folder / "null.safetensors", {"cache": metadata["null"]})
    return folder


def read_cache(part: str) -> Callable[[Path, bytes], None]:
    config, checkpoint = read_config(None), Checkpoint(TINY)
    models = {"checkpoint": fingerprint(checkpoint)}

    def read(folder: Path, text: bytes) -> None:
        clips = CachedClips(write_clips(folder, text, part))
        if "cache.json" in part:
            own = read_config(None, [f"data.cache={folder}"])
            plan_of(own, *train.model_and_cache(own, TINY)).report(8, 0.4)
        show(clips, folder / "show.html")
        check_cache_fits(clips.settings | models, checkpoint)
        TrainingClips(clips, config)[0]

    return read


def read_text_file(folder: Path, text: bytes) -> None:
    save_file({"0000000.features": torch.ones(1, 8)}, folder / "text.safetensors", {"cache": text.decode("latin-1")})
    if metadata := read_metadata(folder / "text.safetensors", SETTINGS, TextMetadata):  # None: it is made anew
        assert all(isinstance(problem, str) for problem in metadata.problems.values())


def in_file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    """A reader of the file of this name."""

    def reader(folder: Path, text: bytes) -> Any:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
        return read(folder / name)

    return reader


def in_metadata(entry: str, use: Callable[[Checkpoint], Any]) -> Callable[[Path, bytes], Any]:
    """A reader of tiny.safetensors with another entry in its metadata; its weights take no disk."""

    def reader(folder: Path, text: bytes) -> Any:
        whole = Checkpoint(TINY)
        shapes = {name: tensor["shape"] for name, tensor in whole.tensors.items()}
        dtypes = {name: tensor["dtype"] for name, tensor in whole.tensors.items()}
        metadata = whole.metadata | {entry: text.decode("latin-1")}
        return use(Checkpoint(write_sparse(folder / "ltx.safetensors", shapes, metadata, dtypes)))

    return reader


def build(checkpoint: Checkpoint) -> None:
    check(checkpoint)
    Plan(read_config(None), checkpoint.config, (17, 64, 64), 64).report(8, 0.4)


def resolve(checkpoint: Checkpoint) -> None:
    recipe = resolve_recipe(OPTIONS, checkpoint)
    recipe.line(), recipe.for_metadata(), list(notes_on_recipe(checkpoint, [], recipe, True))
    json.dumps(merged_metadata(checkpoint, []))


def read_lora(folder: Path, text: bytes) -> None:
    with torch.device("meta"):
        model = LTXVideo(Checkpoint(TINY).config["transformer"])
    width = model.proj_out.in_features
    pair = {"proj_out.lora_A.weight": torch.zeros(2, width), "proj_out.lora_B.weight": torch.zeros(16, 2)}
    pair["proj_out.lora_B.weight"] = torch.zeros(model.proj_out.out_features, 2)
    save_file(pair, folder / "lora.safetensors", {OUR_METADATA: text.decode("latin-1")})
    lora, base = LoRA(folder / "lora.safetensors", [model]), Checkpoint(TINY)
    recipe = resolve_recipe(OPTIONS, base, [lora])
    list(notes_on_recipe(base, [lora], recipe, True)), merged_metadata(base, [lora])


def read_header_of(folder: Path, text: bytes) -> None:
    path = folder / "ltx.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    try:
        Checkpoint(path)
    except UserError as error:
        if "is not an LTX-2.3 checkpoint" not in str(error):  # the header is whole
            raise


def read_gemma(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, text: bytes) -> None:
        gemma = folder / "gemma"
        if not gemma.is_dir():
            shutil.copytree(ASSETS / "gemma", gemma)
        for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
            (gemma / file).write_bytes(text if file == name else (ASSETS / "gemma" / file).read_bytes())
        load_gemma(gemma, "cpu", torch.float32)

    return read


def read_run(path: Path) -> None:
    config = read_config(None)
    state.require_same_options(path.parent, config)
    state.require_same_cache(path.parent, config, SETTINGS)
    state.trained_lora(path.parent, config)


def read_progress(path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    if not list(path.parent.glob("*.safetensors")):
        text = path.read_bytes()
        state.save(path.parent.parent, 3, layer, optimizer, 3, None, [])
        path.write_bytes(text)
    step, skipped = state.resume(path.parent.parent, layer, optimizer, None, False)
    assert type(step) is int and all(isinstance(name, str) for name in skipped)


@cache
def plan() -> Plan:
    return Plan(read_config(None), Checkpoint(TINY).config, (17, 64, 64), 64)


def read_log(path: Path) -> None:
    config = read_config(None, ["log.tensorboard=false", "data.holdout=8"])
    Log(config, plan(), path.parent, 5, enabled=True).close()


def read_batch(path: Path) -> None:
    Batch(path.parent, {"steps": 1, "height": 64}, [Case("a", ASSETS / "face.png", "A man.")])


def read_video_comment(folder: Path, text: bytes) -> None:
    write_video(
        folder / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 12, text.decode(errors="replace").replace("\0", "")
    )
    read_comment(folder / "a.mp4")
    batch = Batch(folder, {"steps": 1}, [Case("a", ASSETS / "face.png", "A man.")])
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    batch.is_complete(batch.cases[0])


def read_lines(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\n")  # without it, the last line counts as half
    read_results(path)


def read_list_of_cases(path: Path) -> None:
    for case in read_cases(path):
        assert case.problem is None or "\n" not in case.problem


def read_clips(path: Path) -> None:
    for clip in read_manifest(path):
        assert clip.problem is None or "\n" not in clip.problem


def read_csv(folder: Path, text: bytes) -> None:
    """The row of a JSON object, written by Python's csv."""
    import csv
    import io

    try:
        row = json.loads(text)
        assert isinstance(row, dict)
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow(row.values())
        text = file.getvalue().encode(errors="surrogateescape")
    except (ValueError, RecursionError, AssertionError, csv.Error):
        pass
    in_file("m.csv", read_clips)(folder, text)


def read_vip(path: Path) -> None:
    for name in ("a", "b"):
        (path.parent / f"{name}.mp4").write_bytes(b"x")
    vip200k(path, path.parent, path.parent / "out.jsonl")
    for clip in read_manifest(path.parent / "out.jsonl"):
        assert clip.problem is None or "is not after start" in clip.problem


def read_ablation(path: Path) -> None:
    copying.numbers(copying.read_results(path.parents[2]))


def read_rows(path: Path) -> None:
    rows = judge.read_rows(path)
    judge.table({"x": judge.summarize(rows)}), judge.compare(rows, rows)


def read_settings_of_ablation(path: Path) -> None:
    ablate.same_settings(ablate.Ablation(ablate.BUDGETS["minutes"], path.parent))


def read_seconds(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.make, "commands", lambda *_: [])  # nothing is trained
        toy.make.make("vae", path.parent)


def read_eye(folder: Path, text: bytes) -> None:
    eye = Eye()
    save_file(dict(eye.state_dict()), folder / "eye.safetensors", {"eye": text.decode("latin-1")})
    Eye.from_file(folder / "eye.safetensors")


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def read_toml(folder: Path, text: bytes) -> None:
    """The options of a JSON object, as TOML; and each of them as --set."""
    path = folder / "c.toml"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        path.write_bytes(text)
        return read_config(path)
    value = value if isinstance(value, dict) else {"x": value}
    path.write_text("\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()), errors="replace")
    read_config(None, [f"{k}.{key}={toml(v[key])}" for k, v in value.items() if isinstance(v, dict) for key in v])
    json.dumps(as_dict(read_config(path)))


def read_environment(folder: Path, text: bytes) -> None:
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError):
        variables = text.decode(errors="surrogateescape")
    variables = variables if isinstance(variables, dict) else {"RANK": variables}
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        for name, value in variables.items():
            if name in before:
                os.environ[name] = str(value).replace("\0", "").replace("\ud800", "")
        own_place()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}


MARK = {"settings": digest(SETTINGS)}
SHARD = MARK | {"clips": [{"row": 0, "name": "a:2"}], "report": [{"line": 3, "reason": "x"}]}
GEMMA = {name: json.loads((ASSETS / "gemma" / name).read_text()) for name in ("config.json", "tokenizer_config.json")}
LTX = {key: Checkpoint(TINY).config[key] for key in ("transformer", "vae")}
HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
HEADER |= {"b": {"dtype": "BF16", "shape": [12], "data_offsets": [24, 48]}, "__metadata__": {"config": "{}"}}
CONFIG = as_dict(read_config(None))
STUDY = {
    f"{section}.{key}": value for section, table in as_dict(ablate.read([])).items() for key, value in table.items()
}
STUDY |= asdict(ablate.BUDGETS["minutes"]) | {"marks": list(ablate.BUDGETS["minutes"].marks), "seeds": 2}
OWN = Checkpoint(TINY).ours | {"placement": "tass", "source_id": 2, "loras": ["a:1"], "training": {"a": 1}}
FORMATS = {
    "cache.json": Format(
        CacheSettings,
        SETTINGS,
        read_cache("cache.json"),
        file="",
        instead="Invalid JSON|not complete: shard-|latent_shape",
    ),
    "buckets of cache.json": Format(
        CacheSettings,
        SETTINGS | {"buckets": [{key: SETTINGS[key] for key in BUCKET}] * 2, "windows": 2},
        read_cache("cache.json"),
        file="",
        instead="Invalid JSON|not complete: shard-|latent_shape",
    ),
    "facts of a clip": Format(Facts, FACTS, read_cache("facts"), refused=False),
    "shard of a cache": Format(ShardMetadata, SHARD, read_cache("shard"), instead="holds no clip|missing or damaged"),
    "null of a cache": Format(
        NullMetadata, MARK | {"max_tokens": 64}, read_cache("null"), instead="null.safetensors|its features"
    ),
    "text file of a cache": Format(TextMetadata, MARK | {"problems": {"3": "x"}}, read_text_file, refused=False),
    "config.json of a run": Format(
        Config,
        CONFIG | {"cache": digest(SETTINGS)},
        in_file("config.json", read_run),
        instead="Invalid JSON|another cache",
    ),
    "progress.json": Format(
        state.Progress, {"step": 3, "skipped": ["a"]}, in_file("run/step-000003/progress.json", read_progress)
    ),
    "log.jsonl": Format(Record, {"step": 3, "loss": 0.5}, in_file("log.jsonl", read_log), refused=False),
    "batch.json": Format(Record, {"steps": 1, "height": 64}, in_file("batch.json", read_batch)),
    "held_out.jsonl": Format(Record, {"step": 3, "loss": 0.5}, in_file("held_out.jsonl", read_log), refused=False),
    "comment of a video": Format(Record, {"steps": 1, "seed": 0, "ref": "face.png"}, read_video_comment, refused=False),
    "eval.json": Format(
        Record, {"a": 1}, in_file("eval.json", lambda path: begin(path, {"a": 1}, "give another --out"))
    ),
    "results.jsonl": Format(Result, SCORES, in_file("results.jsonl", read_lines), instead="Invalid JSON|not a result"),
    "cases": Format(_Content, CASE, in_file("cases.jsonl", read_list_of_cases), instead="line 1|UTF-8|lists no case"),
    "manifest.jsonl": Format(Clip, CLIP, in_file("m.jsonl", read_clips), instead="lists no clip"),
    "manifest.csv": Format(Clip, CLIP, read_csv, instead="line 1|UTF-8|lists no clip"),
    "VIP-200K": Format(
        list[Person], [PERSON, PERSON], in_file("vip.json", read_vip), instead="not JSON|segments can be"
    ),
    "config of a checkpoint": Format(
        LTXConfig, LTX, in_metadata("config", build), instead="Invalid JSON|looks like|does not fit"
    ),
    "own entry of a checkpoint": Format(Ours, OWN, in_metadata(OUR_METADATA, resolve)),
    "quantization of a checkpoint": Format(Layers, {"layers": {"a": {"format": "x"}}}, in_metadata(QUANTIZATION, vars)),
    "header of a checkpoint": Format(
        dict[str, Any], HEADER, read_header_of, instead="Invalid JSON|a whole|damaged header|metadata: "
    ),
    "own entry of a LoRA": Format(Ours, OWN, read_lora),
    "config of Gemma": Format(Kind, GEMMA["config.json"], read_gemma("config.json"), instead=""),
    "tokenizer_config of Gemma": Format(
        Record, GEMMA["tokenizer_config.json"], read_gemma("tokenizer_config.json"), instead=""
    ),
    "VBench": Format(
        dict[str, tuple[float, list[_Score]]],
        {"aesthetic_quality": [0.5, [{"video_path": "v/a.mp4", "video_results": 0.5}]]},
        in_file("x_eval_results.json", lambda path: read_vbench(path.parent, {"a": "0"})),
    ),
    "results of an ablation": Format(
        list[judge.VideoRow],
        [ROW] * 3,
        in_file("results/apart/base-0-0-10.json", read_ablation),
        instead="Invalid JSON|has no videos of",
    ),
    "settings of an ablation": Format(Record, STUDY, in_file("settings.json", read_settings_of_ablation)),
    "rows of the judge": Format(
        dict[str, list[judge.VideoRow]],
        {judge.OWN: [ROW] * 3},
        in_file("rows.json", read_rows),
        instead="Invalid JSON|has no videos of the kind|has other people",
    ),
    "seconds of make": Format(dict[str, int], {"vae": 3}, in_file("seconds.json", read_seconds)),
    "judge's network": Format(Sizes, Eye().sizes, read_eye, instead="Invalid JSON|loading state_dict"),
    "options of a run": Format(Config, CONFIG, read_toml, file="", instead="not TOML|no config at|Control characters"),
    "environment": Format(_Environment, {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, read_environment, "environment"),
}


def explore(name: str, folder: Path, examples: int) -> None:
    form = FORMATS[name]
    schema = TypeAdapter(form.kind).json_schema()
    defs = schema.get("$defs", {})
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    form.read(folder, json.dumps(form.healthy).encode())
    refused = []

    @settings(max_examples=examples, suppress_health_check=quiet, phases=[Phase.generate])  # to shrink takes minutes
    @given(st.data())
    def one(data):
        whole = data.draw(st.integers(0, 5)) > 0
        value, fields = changed(data.draw, form.healthy, schema, defs)
        fields = fields or [""]
        text = json.dumps(value).encode()
        if not whole:
            text, fields = damaged(data.draw, text), [""]
        try:
            form.read(folder, text)
        except UserError as error:
            refused.append(error)
            message = printable(str(error))
            assert 0 < len(message) <= 1500
            assert form.file in message
            if not re.search(form.instead, message):
                assert any(field in message or field.replace("_", "-") in message for field in fields), (
                    message,
                    fields,
                )

    one()
    assert bool(refused) == form.refused


@pytest.fixture
def quiet_process(tmp_path, monkeypatch):
    """A process group of one, as a run has it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield tmp_path / "files"
    dist.destroy_process_group()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_or_refused(name, quiet_process, capsys):
    quiet_process.mkdir()
    explore(name, quiet_process, 2 if "Gemma" in name else 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_files_are_read_or_refused(name, quiet_process, capsys):
    quiet_process.mkdir()
    explore(name, quiet_process, 30 if "Gemma" in name else 120)


PIPES = {"shard of a cache": "shard-00000.safetensors", "null of a cache": "null.safetensors"}
PIPES |= {"config.json of a run": "config.json", "progress.json": "run/step-000003/progress.json"}
PIPES |= {"results.jsonl": "results.jsonl", "VBench": "x_eval_results.json", "judge's network": "eye.safetensors"}
PIPES |= {"results of an ablation": "results/apart/base-0-0-10.json", "rows of the judge": "rows.json"}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_not_waited_for(name, quiet_process, monkeypatch):
    quiet_process.mkdir()
    path = quiet_process / PIPES[name]
    FORMATS[name].read(quiet_process, json.dumps(FORMATS[name].healthy).encode())
    path.unlink()
    os.mkfifo(path)
    readers = {
        "shard of a cache": CachedClips, "null of a cache": CachedClips,
        "config.json of a run": lambda folder: read_run(path), "progress.json": lambda folder: read_progress(path),
        "results.jsonl": lambda folder: read_results(path), "VBench": lambda folder: read_vbench(folder, {"a": "0"}),
        "judge's network": lambda folder: Eye.from_file(path), "rows of the judge": lambda folder: read_rows(path),
        "results of an ablation": lambda folder: read_ablation(path),
    }  # fmt: skip
    with pytest.raises(UserError, match=path.name):
        readers[name](quiet_process)


# ----------------------------------------------------------------------------------------------------------------------
# options


class Listed(Exception):
    """Carries the options of a command."""


def options_of(run: Callable, patch: pytest.MonkeyPatch) -> list[argparse.Action]:
    with patch.context() as once:
        once.setattr(Parser, "parse_args", lambda self, *_, **__: (_ for _ in ()).throw(Listed(self._actions)))
        once.setattr(sys, "argv", ["x"])
        try:
            run()
        except Listed as found:
            return [
                action for action in found.args[0] if action.option_strings and action.dest not in ("help", "device")
            ]
    raise AssertionError("no parser")


def resolve_sample() -> None:
    options = sample.parse_arguments()
    if not options.check:
        checkpoint = Checkpoint(TINY)
        recipe = resolve_recipe(options, checkpoint)
        sample.single_outputs(options, recipe, 1)


GOOD = {  # command: what runs without the work, and its healthy options
    "sample": (resolve_sample, ["--prompt", "A man nods.", "--out", "o/a.mp4"]),
    "prepare": (
        lambda: prepare.make_cache(sys.argv[1:]),
        ["--manifest", str(ASSETS / "clips/manifest.csv"), "--out", "c"],
    ),
    "vip200k": (
        lambda: prepare.make_manifest(sys.argv[1:]),
        ["--annotations", "v.json", "--videos", ".", "--out", "m.jsonl"],
    ),
    "train": (train.main, ["--plan"]),
    "eval": (evaluation.parse_arguments, ["--videos", "v", "--cases", "c.jsonl"]),
    "judge": (judge.parse_arguments, []),
    "toy.cache": (toy.cache.main, ["--out", "t", "--count", "3"]),
    "bench": (bench.main, []),
    "toy.world": (toy.world.main, []),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_any_value_of_any_option(name, examples, tmp_path, monkeypatch, capsys):
    """The command's checks take it, or there is a UserError of one line; the work behind them is left out."""
    run, good = GOOD[name]
    monkeypatch.chdir(tmp_path)
    Path("v.json").write_text(json.dumps([PERSON]))
    monkeypatch.setattr("clips.cache.fill", lambda *_: None)
    monkeypatch.setattr("toy.cache.fill", lambda *_, **__: None)
    monkeypatch.setattr(train, "plan_of", lambda *_: plan())
    monkeypatch.setattr(bench, "table", lambda *_: [])
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "ceilings", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(toy.world, "sheet", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(toy.world, "animation", lambda *_: [Image.new("RGB", (8, 8))] * 2)
    actions = options_of(run, monkeypatch)

    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def one(data):
        words = list(good)
        for action in data.draw(st.lists(st.sampled_from(actions), min_size=1, max_size=3)):
            words.append(action.option_strings[0])
            if action.nargs != 0:
                choices = list(action.choices or ())
                own = st.sampled_from([*choices, str(action.default)]) | st.integers(-2, 40).map(str)
                value = data.draw(own | st.sampled_from(NUMBERS + TEXTS).map(str) | st.text(max_size=4))
                words[-1] += f"={value}".replace("\0", "").replace("\ud800", "\udcff")  # as a shell's arguments are
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["x", *words])
            sys.stdout.reconfigure(errors="backslashreplace")  # as one_line_errors does
            try:
                run()
            except UserError as error:
                assert 0 < len(printable(str(error))) <= 1500
            except OSError as error:  # a name that no file can have; one_line_errors makes a line of it
                assert error.filename or error.strerror

    one()


PROMPT = ["--prompt", "A man nods."]
REFUSED = {  # of sample.py, and a part of the line
    "device": ([*PROMPT, "--device", "hpu"], "device 'hpu' cannot be used here"),
    "prompt": (["--prompt", "caf\udce9"], "--prompt is not UTF-8 text"),
    "negative": ([*PROMPT, "--negative", "\udcff"], "--negative is not UTF-8 text"),
    "size": ([*PROMPT, "--height", 16384, "--width", 16384, "--frames", 65537], "and this machine has"),
    "folder": ([*PROMPT, "--out", "folder.mp4"], "folder.png is a folder: name a file"),
    "sheet": ([*PROMPT, "--out", "holiday.mp4"], "holiday.png is there, and the contact sheet would replace it"),
    "no world": (PROMPT, "RANK and WORLD_SIZE go together"),
    "no address": (PROMPT, "RANK is set and MASTER_ADDR is not"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_options_that_cannot_be_met(kind, in_process, tmp_path, monkeypatch):
    options, reason = REFUSED[kind]
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    shutil.copy(ASSETS / "face.png", "holiday.png")
    for name in {"no world": ["RANK"], "no address": ["RANK", "WORLD_SIZE"]}.get(kind, []):
        monkeypatch.setenv(name, str(2 * (name == "WORLD_SIZE")))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, _, error = in_process(sample.main, "sample.py", *options)
    assert code == 2 and error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.mp4"))
    assert Path("holiday.png").read_bytes() == (ASSETS / "face.png").read_bytes()


@pytest.mark.parametrize(
    ("command", "options", "reason"),
    [
        (toy.vae, ["--clips", 0], "--clips: 0 is not from 1 to 1,000,000"),
        (toy.text, ["--batch", -1], "--batch: -1 is not from 1 to 1,000,000"),
        (toy.vae, ["--out", "."], ". is a folder"),
        (toy.world, ["--seed", -1], "--seed: -1 is not from 0"),
        (toy.text, ["--seed", -1], "--seed: -1 is not from 0"),
        (toy.mixed, ["--seed", -1, "--out", "x"], "--seed: -1 is not from 0"),
        (toy.world, ["--out", "a.bogus"], "--out ends in .png"),
        (judge, ["--train", "."], ". is a folder"),
    ],
)
def test_options_of_the_toy_commands(command, options, reason, in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = in_process(command.main, command.__name__, *options)
    assert code == 2 and reason in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
