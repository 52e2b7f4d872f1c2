"""config.py: what is refused and how it is said, what files and --set add up to, what a continued run may change."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from common.errors import UserError
from config import CHANGEABLE, DEFAULTS, as_dict, read_config, require_same_run

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def write(tmp_path):
    """write(text, name="c.toml") -> path"""

    def to_file(text: str, name: str = "c.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


def plain(path, changes=()) -> dict:
    """read_config as plain JSON values."""
    return as_dict(read_config(path, changes))


def flat(config: dict) -> dict[str, object]:
    return {f"{section}.{key}": value for section, options in config.items() for key, value in options.items()}


def differences(a: dict, b: dict) -> dict[str, object]:
    """What b has otherwise than a."""
    return {name: value for name, value in flat(b).items() if flat(a)[name] != value}


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "text, nearest",
    [
        ("[optim]\nlearning_rate = 1e-4", "optim.learning_rate"),
        ("[optim]\nstep = 5", "did you mean optim.steps?"),
        ("[optim]\nbeta = [0.9, 0.99]", "did you mean optim.betas?"),
        ("[refrence]\nuse = true", "did you mean reference?"),
        ("[faces]\nlambda_ic = 0.1", "did you mean faces.lambda_tic?"),
        ("[parallel]\nmicrobatch = 2", "did you mean parallel.micro_batch?"),
        ("[log]\nlr = 1", "there is no option log.lr; there are every, save_every"),
        ("[qqqq]\nx = 1", "there is no section 'qqqq'"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_known_one(write, text, nearest):
    path = write(text)
    with pytest.raises(UserError, match=re.escape(nearest)) as error:
        read_config(path)
    assert str(path) in str(error.value)
    if "qqqq" in text:
        assert "did you mean" not in str(error.value)  # nothing is near


@pytest.mark.parametrize(
    "change, expected",
    [
        ("optim.steps=1.5", "a valid integer"),
        ("optim.steps=true", "a valid integer"),  # Python's bool is an int
        ("optim.lr=fast", "a valid number"),
        ("optim.lr=true", "a valid number"),
        ("reference.use=1", "a valid boolean"),
        ("reference.use=yes", "a valid boolean"),
        ("run.out=3", "a valid string"),
        ("optim.betas=0.9", "a valid array"),
        ("data.cache=2024-01-01", "a valid string"),
    ],
)
def test_a_value_of_another_type_is_an_error(write, change, expected):
    name = change.split("=")[0]
    with pytest.raises(UserError, match=rf"{name} = .*: input should be {expected}"):
        read_config(None, [change])
    section, rest = change.split(".", 1)
    key, value = rest.split("=")
    value = f'"{value}"' if value in ("fast", "yes") else value
    with pytest.raises(UserError, match=rf"{name} = .*: input should be {expected}"):
        read_config(write(f"[{section}]\n{key} = {value}"))


def test_an_integer_does_for_a_float_and_becomes_one():
    lr = read_config(None, ["optim.lr=1"]).optim.lr
    assert lr == 1.0 and type(lr) is float


CHOICES = {
    "reference.placement": ["tass", "overlap", "temporal", "fixed", "remote", "phase"],
    "reference.timestep": ["clean", "shared"],
    "reference.fit": ["letterbox", "cover"],
    "optim.decay": ["constant", "linear"],
    "optim.kind": ["adamw", "adamw-bf16"],
    "parallel.mode": ["ddp", "fsdp"],
    "parallel.precision": ["bf16", "fp32"],
    "parallel.recompute": ["auto", "all", "products", "none"],
}
ABOVE_ZERO = ["optim.steps", "optim.batch", "optim.lr", "optim.clip", "parallel.micro_batch", "parallel.replicas"]
ABOVE_ZERO += ["faces.window", "faces.margin", "log.every", "log.save_every", "log.keep", "guidance.steps"]


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in CHOICES[name]:
        assert flat(plain(None, [f"{name}={value}"]))[name] == value
    with pytest.raises(UserError, match=rf"{re.escape(name)} = 'other': input should be '{CHOICES[name][0]}'"):
        read_config(None, [f"{name}=other"])


@pytest.mark.parametrize("name", ABOVE_ZERO)
def test_above_zero(name):
    for value in ("0", "-1"):
        with pytest.raises(UserError, match=rf"{re.escape(name)} = .*: input should be greater than 0"):
            read_config(None, [f"{name}={value}"])


@pytest.mark.parametrize("name", [name for name, value in flat(DEFAULTS).items() if type(value) in (int, float)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "9223372036854775808", "-9223372036854775809"])
def test_no_number_is_beyond_all_bounds(name, value):
    with pytest.raises(UserError, match=re.escape(name)):
        read_config(None, [f"{name}={value}"])


@pytest.mark.parametrize("change", ["dropout.text=5", "dropout.reference=-0.1", "dropout.reference=nan"])
def test_dropout_is_a_share(change):
    """5 for 5 % would drop every prompt, and nothing would say so."""
    with pytest.raises(UserError, match=re.escape(change.split("=")[0])):
        read_config(None, [change])
    shares = plain(None, ["dropout.text=0", "dropout.reference=1"])["dropout"]
    assert shares == {"text": 0, "reference": 1}


@pytest.mark.parametrize("betas", ["[0.9]", '["a", 0.9]', "[0.9, 1.0]", "[0.9, 0.99, 0.999]", "[true, 0.9]"])
def test_betas_are_two_numbers_below_one(betas):
    with pytest.raises(UserError, match=r"optim\.betas"):
        read_config(None, [f"optim.betas={betas}"])


@pytest.mark.parametrize("samples", ['["face.jpg"]', '[["face.jpg"]]', '[["a", "b", "c"]]', '[["a", 1]]', "[1]"])
def test_samples_are_pairs_of_photo_and_prompt(samples):
    with pytest.raises(UserError, match=r"log\.samples"):
        read_config(None, [f"log.samples={samples}"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("[optim\nlr = 1", "is not TOML"),
        ("[optim]\nlr = 1\nlr = 2", "is not TOML"),
        ("seed = 1", "seed stands outside a section"),
        ("[[run]]\nseed = 1", "run stands outside a section"),
        ('extends = "gone.toml"', r"no config at .*gone\.toml"),
        ("extends = 3", "extends = 3 should be the name of one file"),
        ('extends = "c.toml"', "extends itself"),
        ('[run]\nextends = "c.toml"', r"there is no option run\.extends"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(write, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_config(write(text))
    assert "c.toml" in str(error.value) or "gone.toml" in str(error.value)


def test_missing_and_binary_files_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"no config at .*none\.toml"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="is not TOML"):
        read_config(tmp_path / "binary.toml")


def test_files_that_extend_each_other_are_an_error(write):
    write('extends = "b.toml"', "a.toml")
    with pytest.raises(UserError, match="extends itself"):
        read_config(write('extends = "a.toml"', "b.toml"))


# ---------------------------------------------------------------------------------------------------------------------
# what files and --set add up to


def test_without_options_it_is_the_defaults():
    assert plain(None) == DEFAULTS


def test_extends_is_below_and_set_is_on_top(write):
    write('[optim]\nlr = 1\nsteps = 10\nbatch = 2\n[data]\ncache = "old"', "base.toml")
    write('extends = "base.toml"\n[optim]\nsteps = 20\nbatch = 3', "middle.toml")
    path = write('extends = "middle.toml"\n[optim]\nbatch = 4')
    config = plain(path, ["run.seed=5", "optim.batch=6", "run.seed=7"])
    want = {"optim.lr": 1.0, "optim.steps": 20, "optim.batch": 6, "data.cache": "old", "run.seed": 7}
    assert differences(DEFAULTS, config) == want


def test_a_file_is_extended_from_its_own_folder(write, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    write("[run]\nseed = 4", "inner/base.toml")
    write('extends = "base.toml"', "inner/c.toml")
    monkeypatch.chdir(tmp_path)
    assert read_config("inner/c.toml").run.seed == 4


@pytest.mark.parametrize(
    "change, value",
    [
        ("run.seed = 3 ", 3),
        ("optim.steps=1_000", 1000),
        ("optim.lr=1e-4", 1e-4),
        ("optim.betas=[0.8, 0.95]", [0.8, 0.95]),
        ("reference.use=false", False),
        ("run.out=runs/second try", "runs/second try"),  # a bare word needs no quotes
        ('run.out="3"', "3"),
        ("run.out='true'", "true"),
        ("run.out=a=b", "a=b"),
        ("run.out=a.b=c", "a.b=c"),
        ("faces.pack=", ""),  # switched off
        ('log.samples=[["nowhere.jpg", "A man, 40, says \\"hi\\"."]]', [["nowhere.jpg", 'A man, 40, says "hi".']]),
        ("log.samples=[]", []),
    ],
)
def test_set(change, value):
    name = change.split("=")[0].strip()
    assert flat(plain(None, [change]))[name] == value


@pytest.mark.parametrize("change", ["optim.lr", "lr=1", "=1", "optim=1"])
def test_set_without_section_key_and_value(change):
    with pytest.raises(UserError, match=rf"--set {change}: write section\.key=value"):
        read_config(None, [change])


def test_set_names_itself_in_its_errors():
    with pytest.raises(UserError, match=r"--set optim\.lrr=1: there is no option optim\.lrr, did you mean optim\.lr\?"):
        read_config(None, ["optim.lrr=1"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_that_is_shipped_loads(path):
    assert plain(path).keys() == DEFAULTS.keys()


def test_the_paper_s_config_is_the_paper_s():
    """Sec. 3.4 and 4.1, in figures."""
    config = flat(plain(CONFIGS / "paper.toml"))
    want = {
        "reference.use": True,
        "reference.placement": "tass",
        "reference.augment": True,
        "dropout.text": 0.05,
        "dropout.reference": 0.20,
        "faces.lambda_id": 0.1,
        "faces.lambda_tic": 0.05,
        "faces.gamma": 1.0,
        "optim.steps": 20_000,
        "optim.batch": 32,
        "optim.lr": 5e-5,
        "guidance.s_text": 5.0,
        "guidance.s_ref": 7.5,
    }
    assert {name: config[name] for name in want} == want


def test_the_ablations_add_one_component_each():
    """Table 1, row by row: each file differs from the one above in its component alone, the last is the method."""
    rows = [plain(path) for path in sorted(CONFIGS.glob("ablation-*.toml"))]
    paper = plain(CONFIGS / "paper.toml")
    outs = [row["run"].pop("out") for row in [*rows, paper]]
    assert len(set(outs)) == len(outs) == 7
    base = {"reference.use": False, "reference.augment": False, "faces.pack": "", "guidance.s_ref": 0.0}
    paper["run"]["out"] = None
    for row in rows:
        row["run"]["out"] = None
    assert differences(paper, rows[0]) == base
    assert [differences(above, row) for above, row in pairwise(rows)] == [
        {"reference.use": True, "reference.placement": "overlap", "guidance.s_ref": rows[0]["guidance"]["s_text"]},
        {"reference.placement": "tass"},
        {"reference.augment": True},
        {"faces.pack": "buffalo_l"},
        {"guidance.s_ref": 7.5},
    ]
    assert rows[5] == paper


def test_paths_of_the_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(CONFIGS / "tiny.toml", ["faces.pack=assets/faces"])
    named = [config.faces.pack, *(face for face, _ in config.log.samples)]
    assert len(named) == 3 and all(Path(path).is_absolute() and Path(path).exists() for path in named)
    (tmp_path / "assets" / "faces").mkdir(parents=True)  # what is here comes first
    assert read_config(None, ["faces.pack=assets/faces"]).faces.pack == "assets/faces"
    assert read_config(None, ["faces.pack=antelopev2"]).faces.pack == "antelopev2"


# ---------------------------------------------------------------------------------------------------------------------
# a run that is continued


@pytest.mark.parametrize("name", flat(DEFAULTS))
def test_a_continued_run_may_change_only_what_leaves_it_the_same_run(name):
    section, key = name.split(".")
    value = DEFAULTS[section][key]
    choices = [choice for choice in CHOICES.get(name, []) if choice != value]
    other = not value if isinstance(value, bool) else {str: "other", int: 7, float: 0.25, list: []}[type(value)]
    other = choices[0] if choices else (0.5, 0.5) if name == "optim.betas" else other
    before, config = plain(None), read_config(None)
    now = replace(config, **{section: replace(getattr(config, section), **{key: other})})
    if (section, key) in CHANGEABLE:
        require_same_run(before, now, Path("runs/a"))
    else:
        with pytest.raises(UserError, match=rf"runs/a was started with {section}\.{key} = "):
            require_same_run(before, now, Path("runs/a"))


def test_what_may_change_in_a_continued_run():
    """How a step is shared out may change, the numbers it computes with may not."""
    names = {f"{section}.{key}" for section, key in CHANGEABLE}
    free = {"parallel.mode", "parallel.replicas", "parallel.micro_batch", "parallel.recompute", "data.workers"}
    assert free | {"optim.steps", "run.out", "log.save_every", "guidance.s_ref"} <= names
    fixed = {"parallel.precision", "run.seed", "optim.batch", "optim.lr", "faces.pack", "reference.placement"}
    assert not names & fixed and names <= flat(DEFAULTS).keys()


def test_a_run_of_an_older_version_is_not_taken_for_the_same():
    old = plain(None)
    del old["faces"]["min_weight"]
    with pytest.raises(UserError, match=r"faces\.min_weight = None"):
        require_same_run(old, read_config(None), Path("run"))


def test_options_that_came_later_had_their_defaults():
    old = plain(None)
    del old["augment"], old["data"]["max_bad"]
    require_same_run(old, read_config(None), Path("run"))
    with pytest.raises(UserError, match=r"augment\.flip = 0\.5"):
        require_same_run(old, read_config(None, ["augment.flip=0"]), Path("run"))


def test_shipped_configs_survive_the_way_through_json():
    config = read_config(CONFIGS / "tiny.toml")
    require_same_run(json.loads(json.dumps(as_dict(config))), config, Path("run"))


@pytest.mark.parametrize(
    "changes, word",
    [
        (["optim.ema=1.0"], "optim.ema"),
        (["optim.noise_tokens=-1"], "optim.noise_tokens"),
        (["model.scratch=true", "lora.rank=4", "parallel.mode=ddp"], "model.scratch"),
        (["optim.ema=0.9", "optim.kind=adamw-bf16"], "optim.ema"),
        (["optim.decay=cosine"], "optim.decay"),
    ],
)
def test_a_start_from_nothing_is_checked(changes, word):
    with pytest.raises(UserError, match=word):
        read_config(None, changes)
