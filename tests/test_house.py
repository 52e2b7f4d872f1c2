"""The house: which file may import which, what an import loads, how long files are, what is installed."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
METHOD = ["rope", "model", "guidance", "losses", "face", "objective"]  # README states the sum of their lines
COMMANDS = ["prepare", "train", "sample", "eval"]
# Lower rooms first. A file imports from lower rooms and, without a circle, from its own.
HOUSE = [
    ["common"],
    ["rope", "checkpoint", "vae", "model", "text", "guidance", "face", "losses"],
    ["config", "data"],
    ["objective"],
    ["clips", "evaluation", "engine"],
    COMMANDS,
    ["toy", "bench", "demo"],
]
LEVEL = {room: level for level, rooms in enumerate(HOUSE) for room in rooms}
FOLDERS = ["common", "clips", "evaluation", "engine", "toy", "bench", "demo"]
ROOMS = {path.stem: [path] for path in sorted(ROOT.glob("*.py"))} | {
    folder: sorted((ROOT / folder).rglob("*.py")) for folder in FOLDERS if (ROOT / folder).exists()
}
FILES = [path for paths in ROOMS.values() for path in paths]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
not_yet = pytest.mark.skip(reason="does not hold yet")


def imports(path):
    """The names of all modules that a file imports, at its top or inside a function; also by import_module("...")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: an import relative to its folder"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


def arrows(paths):
    """(file, room) for each room that a file imports from, its own room left out."""
    for path in paths:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for room in sorted({name.split(".")[0] for name in imports(path)} - {own}):
            if room in LEVEL:
                yield path.relative_to(ROOT).as_posix(), room


def lines(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def run(script):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until_torch(program):
    """A script that prints the wait policy at the moment when the program imports torch, or when it is loaded."""
    return f"""
import os, sys

class StopAtTorch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, StopAtTorch)
import {program}
print(os.environ.get("OMP_WAIT_POLICY"))
"""


def test_the_reader_of_imports_sees_every_kind_of_import(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "import os.path as p, toy.world\nfrom model import LTXVideo\ndef f():\n    from toy import judge\n"
        "    importlib.import_module('train')\n"
    )
    assert set(imports(file)) == {"os.path", "toy.world", "model.LTXVideo", "toy.judge", "train"}


def test_every_root_file_and_folder_has_its_place():
    assert set(ROOMS) <= set(LEVEL) and set(COMMANDS) <= set(ROOMS)
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "docs"}
    assert folders <= set(FOLDERS)


def test_no_arrow_runs_back():
    back = [
        f"{file} imports {to}" for room, paths in ROOMS.items() for file, to in arrows(paths) if LEVEL[to] > LEVEL[room]
    ]
    assert not back


def test_rooms_of_one_level_form_no_circle():
    graph = {room: {to for _, to in arrows(paths) if LEVEL[to] == LEVEL[room]} for room, paths in ROOMS.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_nobody_imports_a_command():
    assert not [f"{file} imports {room}" for file, room in arrows(FILES) if room in COMMANDS]


def test_nothing_outside_toy_imports_toy_but_the_page():
    assert not [file for file, room in arrows(FILES) if room == "toy" and not file.startswith("demo/")]


def test_commands_load_no_module_of_toy():
    script = f"import sys, {', '.join(COMMANDS)}; print([m for m in sys.modules if m.split('.')[0] == 'toy'])"
    assert run(script) == "[]"


def test_config_loads_no_heavy_library():
    heavy = ["cv2", "onnxruntime", "transformers", "av"]
    assert run(f"import config, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


def programs():
    """The modules that can be run: the commands, and each file of a folder with a main part."""
    yield from (command for command in COMMANDS if command in ROOMS)
    for path in FILES:
        if path.parent != ROOT and "__main__" in path.read_text(encoding="utf-8"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("program", list(programs()))
def test_waiting_threads_sleep_in_every_program(program, monkeypatch):
    """OpenMP reads the variable when torch is loaded, so the value counts at the moment of `import torch`."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run(until_torch(program)) == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run(until_torch(program)) == "ACTIVE", "the user's own setting"


def test_the_root_is_small():
    assert len(list(ROOT.glob("*.py"))) <= 16


@pytest.mark.parametrize("name", ["rope", "model", "vae", "text", "guidance", "losses", "face", "data", "objective"])
def test_a_method_file_is_short(name):
    assert lines(ROOMS[name]) <= 340


@not_yet
def test_all_python_without_tests_is_below_10000_lines():
    scripts = list((ROOT / "docs").rglob("*.py"))
    assert lines(FILES + scripts) < 10_000


def test_readme_states_how_long_the_method_is():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"[Tt]he method\b[^.\n]{0,100}?\b(\d[\d,]*) lines", readme)
    assert stated, "README says: the method is about N lines"
    assert int(stated[1].replace(",", "")) == round(sum(lines(ROOMS[name]) for name in METHOD), -2)


def test_readme_fits_on_a_few_screens():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme.splitlines()) <= 160
    assert len(readme) <= 11_000


def test_the_package_has_every_file():
    """A root file or folder that pyproject.toml does not name is missing where the package is installed."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(tools["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    folders = {name for name in ROOMS if name in FOLDERS} | {"assets", "configs"}
    assert folders <= {pattern.removesuffix("*") for pattern in tools["packages"]["find"]["include"]}


def test_no_test_depends_on_the_speed_of_the_machine():
    """Limits of time only end what hangs: ten minutes at least. No assertion compares times."""
    clocks = {"time", "monotonic", "perf_counter", "process_time"}
    found = []
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            limit = None
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).split(".")[-1]
                limits = [word.value for word in node.keywords if word.arg == "timeout"]
                limits += node.args[:1] if name in ("wait", "join") else []
                numbers = [value.value for value in limits if isinstance(value, ast.Constant)]
                limit = min((value for value in numbers if isinstance(value, int | float)), default=None)
            calls = [ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)]
            timed = isinstance(node, ast.Compare) and any(
                call.startswith("time.") and call.removeprefix("time.") in clocks for call in calls
            )
            if timed or (limit is not None and limit < 600):
                found.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)[:80]}")
    assert not found


def test_every_dependency_is_pinned():
    """make setup installs versions that the tests ran with, so each name in pyproject.toml has a line in pins.txt."""

    def name(requirement):
        return re.match(r"[A-Za-z0-9-]+", requirement)[0]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    optional = [requirement for extra in ("cpu", "gpu", "fp8", "dev", "demo") for requirement in extras[extra]]
    required = [*project["project"]["dependencies"], *optional, "insightface"]
    pins = (ROOT / "requirements" / "pins.txt").read_text(encoding="utf-8").splitlines()
    pinned = [name(line) for line in pins if line and not line.startswith("#")]
    assert {name(line) for line in required} == set(pinned)


def test_one_onnxruntime_is_installed():
    """onnxruntime and onnxruntime-gpu overwrite each other's files, and opencv-python those of the headless build."""
    installed = {package.name.lower() for package in importlib.metadata.distributions()}
    assert len(installed & {"onnxruntime", "onnxruntime-gpu"}) == 1
    assert "opencv-python" not in installed
