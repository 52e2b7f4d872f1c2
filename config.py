"""What a training run is told: every option with its default, read from TOML, checked.

`extends = "other.toml"` at the top of a file starts from that file. `--set section.key=value` changes one option. An
unknown key or a value of another type is an error that names the nearest known key or the type.
"""

import difflib
from copy import deepcopy
from pathlib import Path
from typing import Any

from common.errors import UserError
from data import FITS
from rope import PLACEMENTS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

Config = dict[str, dict[str, Any]]

ASSETS = Path(__file__).parent / "assets"  # the embedded models: the default where no checkpoint is named

DEFAULTS: Config = {
    "run": {
        "out": "runs/st-drc",  # checkpoints, logs and samples go here; a run that is there is continued
        "seed": 0,
    },
    "model": {
        "ckpt": "",  # an LTX-2.3 checkpoint; empty for the tiny one in assets/
        "scratch": False,  # draw the DiT's weights anew instead of reading the checkpoint's
        "gemma": "",  # only for the prompts of `log.samples`; empty for what belongs to the checkpoint
    },
    "data": {
        "cache": "cache",  # made by data.py prepare
        "toy": 0,  # above 0: a cache of so many clips of the drawn world is made there (toy_cache.py)
        "workers": 2,  # processes per rank that read and augment
    },
    "reference": {
        "use": True,  # false: text-to-video, Table 1's first row
        "placement": "tass",  # Eq. 4, or what Sec. 3.2 argues against: overlap, temporal, fixed, remote; or phase
        "source_id": 2,  # phase: the mark of the reference's tokens
        "phase_scale": 1.0,  # phase: its strength
        "fit": "letterbox",  # Sec. 3.1; "cover": scaled to cover and cut around the centre
        "timestep": "clean",  # the reference's tokens say t = 0; "shared": they say the video's t
        "augment": True,  # Eq. 5
    },
    "dropout": {
        "text": 0.05,  # p_y, the empty prompt instead
        "reference": 0.20,  # p_r, no reference tokens
    },
    "faces": {
        "pack": "buffalo_l",  # InsightFace model pack, name or folder; empty: no identity losses
        "lambda_id": 0.1,
        "lambda_tic": 0.05,
        "gamma": 1.0,  # Eq. 12
        "window": 2,  # latent frames per sample that are decoded and looked at
        "context": 1,  # latent frames decoded with them on either side, because the decoder looks both ways
        "min_weight": 1e-3,  # w_aux below which they are not
    },
    "lora": {
        "rank": 0,  # 0: all weights are trained; above: they are frozen and adapters of this rank are trained
        "alpha": 0.0,  # adapters are scaled by alpha / rank; 0: by 1
        "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],  # ends of layer names
        "dropout": 0.0,  # of an adapter's input
        "fp8": False,  # the frozen weights are stored in 8 bits (fp8.py): slower, and half the memory
    },
    "optim": {
        "kind": "adamw",  # float32; "adamw-bf16": weights and moments in bf16 with stochastic rounding (optim.py)
        "steps": 20_000,
        "batch": 32,  # samples per step over all ranks
        "lr": 5e-5,
        "warmup": 500,  # steps of linear rise
        "decay": "constant",  # what comes after; "linear": down to zero at the last step
        "ema": 0.0,  # d of the weights' average (average.py), which is then what is exported; 0: none
        "betas": [0.9, 0.999],
        "weight_decay": 0.01,
        "clip": 1.0,  # largest norm of the whole gradient
        "noise_tokens": 0,  # noise levels t are drawn as for a video of so many tokens; 0: as for the video's own
    },
    "parallel": {
        "mode": "ddp",  # "ddp": every GPU holds the model; "fsdp": its shards
        "replicas": 1,  # fsdp: copies of the sharded model (HSDP), for instance one a node
        "micro_batch": 1,  # samples per forward pass and rank
        "precision": "bf16",  # of the computation; weights and optimizer are float32. "fp32" for tests and CPUs
        "recompute": True,  # keep only the blocks' inputs for the backward pass
        "compile": False,  # torch.compile the blocks: a slow start, faster steps
    },
    "log": {
        "every": 10,  # steps between lines
        "save_every": 500,  # steps between checkpoints
        "keep": 3,  # checkpoints kept
        "sample_every": 1000,  # steps between samples; 0: none
        "samples": [],  # [["face.jpg", "prompt"], ...], always with the same seeds
        "tensorboard": True,
        "wandb": False,  # Weights & Biases, if it is installed
    },
    "guidance": {  # of the samples (Eq. 13); an export carries them as defaults
        "steps": 30,
        "s_text": 5.0,
        "s_ref": 7.5,
    },
}

CHOICES = {
    ("reference", "placement"): tuple(PLACEMENTS),
    ("reference", "timestep"): ("clean", "shared"),
    ("reference", "fit"): tuple(FITS),
    ("optim", "decay"): ("constant", "linear"),
    ("optim", "kind"): ("adamw", "adamw-bf16"),
    ("parallel", "mode"): ("ddp", "fsdp"),
    ("parallel", "precision"): ("bf16", "fp32"),
}
ABOVE_ZERO = (
    ("optim", "steps"),
    ("optim", "batch"),
    ("optim", "lr"),
    ("optim", "clip"),
    ("parallel", "micro_batch"),
    ("parallel", "replicas"),
    ("faces", "window"),
    ("faces", "context"),
    ("log", "every"),
    ("log", "save_every"),
    ("log", "keep"),
    ("guidance", "steps"),
)

# What a run may change when it is continued; anything else would make it another run.
CHANGEABLE = {("run", "out"), ("data", "workers"), ("optim", "steps")}
CHANGEABLE |= {(section, key) for section in ("parallel", "log", "guidance") for key in DEFAULTS[section]}
CHANGEABLE -= {("parallel", "precision")}
# Of these only the name counts: files and folders may move.
PATHS = {("model", "ckpt"), ("model", "gemma"), ("data", "cache"), ("faces", "pack")}


def read_config(path: str | Path | None, changes: list[str] = ()) -> Config:
    """The defaults, changed by a TOML file (None for none) and by "section.key=value" strings."""
    config = deepcopy(DEFAULTS)
    if path is not None:
        _merge_file(config, Path(path))
    for change in changes:
        name, equals, text = change.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot):
            raise UserError(f"--set {change}: write section.key=value, for instance optim.lr=1e-4")
        _set(config, section, key, _parse_value(text.strip()), f"--set {change}")
    for (section, key), known in CHOICES.items():
        if config[section][key] not in known:
            raise UserError(f"{section}.{key} = {config[section][key]!r} is none of {', '.join(known)}")
    for section, key in ABOVE_ZERO:
        if not config[section][key] > 0:  # nor is nan, which TOML can write
            raise UserError(f"{section}.{key} = {config[section][key]} is not above 0")
    lora = config["lora"]
    if lora["rank"] < 0 or lora["alpha"] < 0 or not 0 <= lora["dropout"] < 1:
        raise UserError(f"lora = {lora}: rank and alpha are 0 or more, dropout is from 0 to below 1")
    if lora["rank"] and config["parallel"]["mode"] != "ddp":
        raise UserError('parallel.mode = "fsdp" trains all weights; for lora.rank above 0 set parallel.mode = "ddp"')
    if not 0 <= config["optim"]["ema"] < 1:
        raise UserError(f"optim.ema = {config['optim']['ema']} is not from 0 to below 1")
    if config["optim"]["ema"] and config["optim"]["kind"] == "adamw-bf16":
        raise UserError('optim.ema averages float32 weights: set it to 0 beside optim.kind = "adamw-bf16"')
    for section, key in (("data", "toy"), ("optim", "noise_tokens")):
        if config[section][key] < 0:
            raise UserError(f"{section}.{key} = {config[section][key]} is below 0")
    if lora["rank"] and config["model"]["scratch"]:
        raise UserError("model.scratch draws new weights and lora.rank above 0 freezes them: leave one out")
    if config["optim"]["kind"] == "adamw-bf16" and (lora["rank"] or config["parallel"]["precision"] != "bf16"):
        raise UserError(
            'optim.kind = "adamw-bf16" is for training all weights in bf16: set parallel.precision = "bf16" and '
            "lora.rank = 0"
        )
    for name, share in config["dropout"].items():
        if not 0 <= share <= 1:
            raise UserError(f"dropout.{name} = {share} is no share between 0 and 1")
    betas = config["optim"]["betas"]
    if not (len(betas) == 2 and all(type(beta) in (int, float) and 0 <= beta < 1 for beta in betas)):
        raise UserError(f"optim.betas = {betas} should be two numbers from 0 to below 1")
    for section, key in (("model", "ckpt"), ("model", "gemma"), ("faces", "pack")):
        config[section][key] = _here_or_beside_the_code(config[section][key])
    config["log"]["samples"] = [_sample(entry) for entry in config["log"]["samples"]]
    return config


def require_same_run(old: Config, new: Config, run: Path) -> None:
    """Raise UserError that names the first option in which a continued run would differ from its beginning."""
    for section, options in new.items():
        for key, value in options.items():
            before = old.get(section, {}).get(key)
            moved = (section, key) in PATHS and Path(before or "").name == Path(value).name
            if before != value and not moved and (section, key) not in CHANGEABLE:
                raise UserError(
                    f"{run} was started with {section}.{key} = {before!r} and is now given {value!r}: "
                    "continue it as it was, or give run.out another folder"
                )


def _merge_file(config: Config, path: Path, below: tuple[Path, ...] = ()) -> None:
    """The file's options over those of the file that it extends; `below` are the files that extend this one."""
    if path.resolve() in below:
        raise UserError(f"{path} extends itself, by way of {below[-1]}")
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no config at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    if "extends" in tables:
        parent = tables.pop("extends")
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {parent!r} should be the name of one file")
        _merge_file(config, path.parent / parent, (*below, path.resolve()))
    for section, options in tables.items():
        if not isinstance(options, dict):
            raise UserError(f"{path}: {section} stands outside a section")
        for key, value in options.items():
            _set(config, section, key, value, str(path))


def _set(config: Config, section: str, key: str, value: Any, where: str) -> None:
    """One option, if it is known and of the right type; an integer will do for a float."""
    if section not in config:
        raise UserError(f"{where}: there is no section {section!r}{_nearest(section, config)}")
    if key not in config[section]:
        known = [f"{s}.{k}" for s, options in config.items() for k in options]
        raise UserError(f"{where}: there is no option {section}.{key}{_nearest(f'{section}.{key}', known)}")
    expected = type(DEFAULTS[section][key])
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f"{where}: {section}.{key} = {value!r} should be of type {expected.__name__}")
    config[section][key] = value


def _sample(entry: Any) -> list[str]:
    """One entry of log.samples: a photo and a prompt."""
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise UserError(f'log.samples holds {entry!r}: each entry is ["face.jpg", "prompt"]')
    return [_here_or_beside_the_code(entry[0]), entry[1]]


def _here_or_beside_the_code(path: str) -> str:
    """A path as it is given, or in the repository's folder where it exists only there (configs name assets/...)."""
    beside = Path(__file__).parent / path
    return str(beside) if path and not Path(path).exists() and beside.exists() else path


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.3)
    return f", did you mean {match[0]}?" if match else ""


def _parse_value(text: str) -> Any:
    """A value as TOML writes it; a bare word is a string, so that a shell needs no second pair of quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
