"""Options of a training run: typed, with defaults, read from TOML, checked.

        config = read_config("configs/paper.toml", ["optim.lr=1e-4"])
        config.optim.lr                                   # 0.0001

`extends = "other.toml"` at the top of a file starts from that file. `--set section.key=value` changes one option. An
unknown key, a value of another type or out of range is an error of one line. Defaults are the paper's (Sec. 4.1);
where the paper is silent they are the decisions that README lists.
"""

import difflib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.errors import UserError
from common.schema import (
    BelowOne,
    Count,
    FiniteFloat,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
    Text,
    record,
    validate,
)
from guidance import S_R, S_Y, STEPS
from rope import PLACEMENTS, ReferenceSettings

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ASSETS = Path(__file__).parent / "assets"  # the embedded models: the default where no checkpoint is named
LEVELS = [(2 * k + 1) / 16 for k in range(8)]  # noise levels t of the losses on held-out clips
# Guidance scales are the paper's. It names no size, frames, fps or steps: steps are LTX-2.3's, the others ours. A
# checkpoint's own metadata (`defaults`) may name others.
VIDEO = {"height": 480, "width": 832, "frames": 121, "fps": 24.0, "steps": STEPS, "s_text": S_Y, "s_ref": S_R}


@record
class Run:
    out: Text = "runs/st-drc"  # folder of checkpoints, log and samples; a run that is there is continued
    seed: Count = 0


@record
class Model:
    ckpt: Text = ""  # an LTX-2.3 checkpoint; empty for the tiny one in assets/
    scratch: bool = False  # draw the DiT's weights anew instead of reading the checkpoint's
    gemma: Text = ""  # only for the prompts of `log.samples`; empty for the one that belongs to the checkpoint


@record
class Data:
    cache: Text = "cache"  # made by prepare.py
    workers: Annotated[int, Field(ge=0, le=256)] = 2  # processes per rank that read and augment
    max_bad: Share = 0.001  # share of the run's samples that may be damaged; at least 10 may be
    holdout: Count = 0  # clips of people who are never trained on, for a loss that can be compared (engine/holdout.py)


@record
class ReferenceOptions(ReferenceSettings):
    """Placement, timestep and fit as in rope.ReferenceSettings, and two switches of the ablation."""

    use: bool = True  # false: text-to-video, Table 1's first row
    augment: bool = True  # Eq. 5
    placement: Literal[tuple(PLACEMENTS)] = "tass"  # tass is Eq. 4; rope.PLACEMENTS explains the others
    source_id: Annotated[int, Field(ge=-1000, le=1000)] = 2
    phase_scale: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    fit: Literal["letterbox", "cover"] = "letterbox"
    timestep: Literal["clean", "shared"] = "clean"


@record
class Augment:
    """Eq. 5: the probability of each operation, drawn independently of the others, and its strength."""

    flip: Share = 0.5
    rotate: Share = 0.5
    degrees: Annotated[float, Field(ge=0, le=180)] = 10.0  # to either side
    crop: Share = 0.5
    keep: Annotated[float, Field(gt=0, le=1)] = 0.85  # at least this part of width and height
    jitter: Share = 0.8  # probability of the four strengths below
    brightness: Share = 0.2  # factors from 1 - 0.2 to 1 + 0.2
    contrast: Share = 0.2
    saturation: Share = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.02  # part of the color circle, to either side


@record
class Dropout:
    text: Share = 0.05  # p_y: probability of the empty prompt instead of the clip's
    reference: Share = 0.20  # p_r: probability of no reference tokens


@record
class Faces:
    pack: Text = "buffalo_l"  # InsightFace model pack, name or folder; empty: no identity losses
    lambda_id: NonNegativeFloat = 0.1  # Eq. 11
    lambda_tic: NonNegativeFloat = 0.05
    gamma: Annotated[float, Field(ge=0, le=1000)] = 1.0  # Eq. 12
    window: Positive = 2  # latent frames per sample that the identity losses decode
    margin: Positive = 1  # latent frames decoded on either side of them, because the decoder looks both ways
    min_weight: Share = 1e-3  # w_aux below which nothing is decoded


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@record
class LoRAOptions:
    rank: Annotated[int, Field(ge=0, le=65536)] = 0  # 0: all weights train; above: only adapters of this rank
    alpha: NonNegativeFloat = 0.0  # adapters are scaled by alpha / rank; 0: by 1
    targets: list[Text] = Field(default_factory=LORA_TARGETS.copy)  # layers with adapters, by the end of their name
    dropout: BelowOne = 0.0  # share of an adapter's input that is set to 0
    fp8: bool = False  # frozen weights stored in 8 bits (engine/fp8.py): slower, half the memory


@record
class Optim:
    kind: Literal["adamw", "adamw-bf16"] = "adamw"  # float32; or weights and moments in bf16 (engine/optim.py)
    steps: Positive = 20_000
    batch: Positive = 32  # samples per step over all ranks
    lr: PositiveFloat = 5e-5
    warmup: Count = 500  # steps of linear rise
    decay: Literal["constant", "linear"] = "constant"  # after the warm-up; linear: zero one step after the last
    ema: BelowOne = 0.0  # decay of the weight average (engine/average.py), which is exported; 0: no average
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.01
    clip: PositiveFloat = 1.0  # largest norm of the whole gradient
    noise_tokens: Count = 0  # t is drawn as for a video of this many tokens; 0: as for the video's own number


@record
class Parallel:
    mode: Literal["ddp", "fsdp"] = "ddp"  # ddp: every GPU holds the model; fsdp: one shard of it
    replicas: Positive = 1  # fsdp: copies of the sharded model (HSDP), for instance one per node
    micro_batch: Positive = 1  # samples per forward pass and rank
    # Of the computation. Trained weights are float32, or bf16 with optim.kind = "adamw-bf16".
    precision: Literal["bf16", "fp32"] = "bf16"
    # What a block keeps for the backward pass; the rest is computed again (engine/parallel.py). A number n: the first n
    # blocks as "all", the others as "products". auto: what fits the GPU, by engine/plan.py; "all" on a CPU.
    recompute: Literal["auto", "all", "products", "none"] | Count = "auto"
    compile: bool = False  # torch.compile the blocks: a slow start, faster steps
    fp8: bool = False  # the large linear layers of inner blocks multiply in 8 bits, by torchao (engine/fp8_training.py)


@record
class LogOptions:
    every: Positive = 10  # steps between lines; the first and the last step always have one
    save_every: Positive = 500  # steps between checkpoints
    keep: Positive = 3  # number of newest checkpoints to keep; the best on the held-out clips stays too
    eval_every: Positive = 1000  # steps between the losses on the held-out clips
    sample_every: Count = 1000  # steps between samples; 0: none
    # [["face.jpg", "prompt"], ...]; empty: photo and caption of two held-out clips
    samples: list[tuple[Text, Text]] = Field(default_factory=list)
    tensorboard: bool = True
    wandb: bool = False  # Weights & Biases, if it is installed


@record
class Guidance:
    """Guidance of the run's samples (Eq. 13). An export stores the two scales as its defaults."""

    steps: Positive = STEPS
    s_text: FiniteFloat = S_Y
    s_ref: FiniteFloat = S_R


@record
class Config:
    run: Run = Field(default_factory=Run)
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    reference: ReferenceOptions = Field(default_factory=ReferenceOptions)
    augment: Augment = Field(default_factory=Augment)
    dropout: Dropout = Field(default_factory=Dropout)
    faces: Faces = Field(default_factory=Faces)
    lora: LoRAOptions = Field(default_factory=LoRAOptions)
    optim: Optim = Field(default_factory=Optim)
    parallel: Parallel = Field(default_factory=Parallel)
    log: LogOptions = Field(default_factory=LogOptions)
    guidance: Guidance = Field(default_factory=Guidance)


DEFAULTS = json.loads(json.dumps(asdict(Config())))  # as plain JSON values
# Options that a run may change when it is continued; any other change would make it another run.
CHANGEABLE = {("run", "out"), ("data", "workers"), ("data", "max_bad"), ("optim", "steps")}
CHANGEABLE |= {(section, key) for section in ("parallel", "log", "guidance") for key in DEFAULTS[section]}
CHANGEABLE -= {("parallel", "precision"), ("parallel", "fp8")}
# Options that older runs do not record. They ran with the default values.
MISSING_IN_OLD_RUNS = {("data", "max_bad"), ("data", "holdout"), ("faces", "margin"), ("parallel", "fp8")}
MISSING_IN_OLD_RUNS |= {("augment", key) for key in DEFAULTS["augment"]}
# Paths of which only the last part is compared, so files may move.
PATHS = {("model", "ckpt"), ("model", "gemma"), ("data", "cache"), ("faces", "pack")}


def read_config(path: str | Path | None, changes: list[str] | tuple[str, ...] = ()) -> Config:
    """The defaults, changed by a TOML file (None for none) and by "section.key=value" strings."""
    tables: dict[str, dict[str, Any]] = {}
    if path is not None:
        _merge_file(tables, Path(path))
    for change in changes:
        name, equals, text = change.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise UserError(f"--set {change}: write section.key=value, for instance optim.lr=1e-4")
        _set(tables, section, key, _parse_value(text.strip()), f"--set {change}")
    for section, key in (("model", "ckpt"), ("model", "gemma"), ("faces", "pack")):
        if isinstance(value := tables.get(section, {}).get(key), str):
            tables[section][key] = _here_or_beside_the_code(value)
    samples = tables.get("log", {}).get("samples")
    for sample in samples if isinstance(samples, list) else ():
        if isinstance(sample, list) and sample and isinstance(sample[0], str):
            sample[0] = _here_or_beside_the_code(sample[0])
    config = validate(Config, tables, f"{path}" if path and not changes else "options")
    _check_together(config)
    return config


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The options as plain JSON values: config.json of a run, metadata of an export."""
    return validate(dict[str, dict[str, Any]], asdict(config), "options")


def require_same_run(old: dict[str, Any], new: Config, run: Path) -> None:
    """Raise UserError with the first option that differs between the start of the run and now."""
    for section, options in as_dict(new).items():
        for key, value in options.items():
            default = DEFAULTS[section][key] if (section, key) in MISSING_IN_OLD_RUNS else None
            before = old.get(section, {}).get(key, default)
            same_name = (section, key) in PATHS and Path(str(before)).name == Path(value).name
            if before != value and not same_name and (section, key) not in CHANGEABLE:
                raise UserError(
                    f"{run} was started with {section}.{key} = {before!r} and this command has {value!r}: "
                    "continue it as it was, or give run.out another folder"
                )


def _check_together(config: Config) -> None:
    """Raise UserError for options that exclude each other."""
    lora, optim, parallel = config.lora, config.optim, config.parallel
    in_bf16 = optim.kind == "adamw-bf16"
    if lora.rank and parallel.mode != "ddp":
        raise UserError('parallel.mode = "fsdp" trains all weights; for lora.rank above 0 set parallel.mode = "ddp"')
    if lora.fp8 and not lora.rank:
        raise UserError("lora.fp8 stores frozen weights in 8 bits, and without adapters none are frozen: set lora.rank")
    if parallel.replicas > 1 and parallel.mode != "fsdp":
        raise UserError('parallel.replicas are groups of shards: set parallel.mode = "fsdp"')
    if lora.rank and config.model.scratch:
        raise UserError("model.scratch draws new weights and lora.rank above 0 freezes them: leave one out")
    if parallel.fp8 and (lora.rank or parallel.precision != "bf16"):
        raise UserError('parallel.fp8 is for training all weights: set parallel.precision = "bf16" and lora.rank = 0')
    if optim.ema and in_bf16:
        raise UserError('optim.ema averages float32 weights: set it to 0 with optim.kind = "adamw-bf16"')
    if in_bf16 and (lora.rank or parallel.precision != "bf16"):
        raise UserError(
            'optim.kind = "adamw-bf16" is for training all weights in bf16: set parallel.precision = "bf16" and '
            "lora.rank = 0"
        )


def _merge_file(tables: dict, path: Path, extended_by: tuple[Path, ...] = ()) -> None:
    """The file's options over those of the file that it extends; `extended_by` are the files that extend this one."""
    if path.resolve() in extended_by:
        raise UserError(f"{path} extends itself, by way of {extended_by[-1]}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    if "extends" in table:
        parent = table.pop("extends")
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {parent!r} should be the name of one file")
        _merge_file(tables, path.parent / parent, (*extended_by, path.resolve()))
    for section, options in table.items():
        if not isinstance(options, dict):
            raise UserError(f"{path}: {section} stands outside a section: write it below one, like [optim]")
        for key, value in options.items():
            _set(tables, section, key, value, str(path))


def _set(tables: dict, section: str, key: str, value: Any, where: str) -> None:
    """Set one option. Raise UserError if its name is unknown or its value has a wrong type or range."""
    if section not in DEFAULTS:
        raise UserError(f"{where}: there is no section {section!r}{_nearest(section, DEFAULTS)}")
    if key not in DEFAULTS[section]:
        raise UserError(f"{where}: there is no option {section}.{key}{_nearest(key, DEFAULTS[section], section)}")
    try:
        kind = next(field.type for field in fields(Config) if field.name == section)
        validate(kind, {key: value}, where)
    except UserError as error:
        raise UserError(str(error).replace(f"{where}: {key}", f"{where}: {section}.{key}", 1)) from None
    tables.setdefault(section, {})[key] = value


def _here_or_beside_the_code(path: str) -> str:
    """`path`, or the same path inside the repository if it exists only there (configs name assets/...)."""
    beside = Path(__file__).parent / path
    return str(beside) if path and not Path(path).exists() and beside.exists() else path


def _nearest(name: str, known: Any, section: str = "") -> str:
    """A suggestion. If no name is similar: all names of the section."""
    if match := difflib.get_close_matches(name, list(known), n=1, cutoff=0.6):
        return f", did you mean {section + '.' if section else ''}{match[0]}?"
    return f"; there are {', '.join(known)}"


def _parse_value(text: str) -> Any:
    """A value as TOML writes it; a bare word is a string, so that a shell needs no second pair of quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
