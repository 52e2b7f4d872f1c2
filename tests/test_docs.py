"""README and docs/: the names, options, files and links in them exist."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from config import DEFAULTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md")}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "bench/README.md")}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FOREIGN = {"infer.py", "generate.py"}  # of the baselines in docs/table1.md


def section(page, title):
    return PAGES[page].split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def last_column(table):
    return re.findall(r"^\| .*\| (.*) \|$", table, re.MULTILINE)[1:]


def exists(name):
    """Whether a dotted name is an object of this repository, or an option of a run."""
    parts = name.split(".")
    if len(parts) == 2 and parts[1] in DEFAULTS.get(parts[0], ()):
        return True
    for k in range(len(parts) - 1, 0, -1):
        if (ROOT / Path(*parts[:k])).with_suffix(".py").is_file():
            thing = import_module(".".join(parts[:k]))
            for part in parts[k:]:
                thing = getattr(thing, part, None)
            return thing is not None
    return False


def test_the_look_up_tells_what_exists():
    assert exists("engine.state.resume") and exists("vae.VideoVAE.decode") and exists("optim.lr")
    assert not exists("engine.state.resumed") and not exists("vae.VideoVAE.lode") and not exists("nothing.at.all")


def test_every_function_that_checks_input_exists():
    checks, module = [], ""
    for cell in last_column(section("docs/testing.md", "Where data enters")):
        for name in re.findall(r"`([\w.]+)`", cell):
            module = name.rpartition(".")[0] or module  # a name without a dot is of the module before it
            checks.append(name if "." in name else f"{module}.{name}")
    checks.remove("common.errors.parse_arguments")  # each command has one
    assert len(checks) > 40 and not [name for name in checks if not exists(name)]


def test_every_function_of_the_equations_exists():
    cells = last_column(section("README.md", "The method, equation by equation"))
    found = [name for cell in cells for name in re.findall(r"`(\w+\.[\w.]+)`", cell)]
    assert len(found) > 12 and not [name for name in found if not exists(name)]


def test_sampling_lists_every_option_and_no_other():
    command = [sys.executable, str(ROOT / "sample.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    real = set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))
    rows = section("docs/sampling.md", "Options").splitlines()
    listed = {option for row in rows if row.startswith("|") for option in OPTION.findall(row.split("|")[2])}
    assert len(real) > 30 and real == listed


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    for name, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([\w-]+))?\)", PAGES[page]):
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), name
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
    files = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|toml))`", PAGES[page])) - FOREIGN
    assert not [name for name in files if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_options_of_a_run_exist(page):
    code = "\n".join(re.findall(r"```\n(.*?)```", PAGES[page], re.DOTALL) + re.findall(r"`[^`\n]+`", PAGES[page]))
    named = {f"{part}.{key}" for part, key in re.findall(r"--set ([a-z]+)\.([a-z_]+)=", code)}
    named |= {f"{part}.{key}" for part, key in re.findall(r"`([a-z]+)\.([a-z_]+)(?: = [^`]*|=[^`]*)`", code)}
    assert not [name for name in named - {"section.key"} if not exists(name)]
