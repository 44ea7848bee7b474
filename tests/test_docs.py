"""README, --help and code say the same. Run: pytest tests/test_docs.py (2 s)."""
import re
from dataclasses import fields

import pytest

import selw2s
from conftest import ROOT
from data import report

README = (ROOT / "README.md").read_text("utf-8")
SOURCES = [ROOT / "selw2s.py", ROOT / "model.py", ROOT / "graph.py", *sorted((ROOT / "data").glob("*.py"))]


def test_decision_tags_of_code_and_readme_are_the_same():
    code = set(re.findall(r"\bD\d+\b(?=[],])", "".join(f.read_text("utf-8") for f in SOURCES)))
    table = re.findall(r"^\| (D\d+) \|", README, re.M)
    assert table == sorted(set(table), key=lambda t: int(t[1:])) and set(table) == code


def test_every_flag_named_in_the_readme_exists():
    flags = {"--" + f.name.replace("_", "-") for f in fields(selw2s.Config)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"python -m venv.*", "", README))) - {"--help"}
    assert named <= flags | {"--build", "--text", "--reference"}, named - flags


def test_every_function_of_the_map_exists():
    import data
    import graph
    import model
    modules = {"data": data, "selw2s": selw2s, "model": model, "graph": graph, "report": report}
    named = re.findall(r"`(data|selw2s|model|graph|report)\.(?!py)(\w+)`", README)
    assert len(named) > 15
    for module, name in named:
        assert callable(getattr(modules[module], name)), (module, name)


def test_generated_parts_of_the_readme_are_up_to_date():
    assert report.readme(README) == README


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.name)
def test_width_and_leftovers(file):
    text = file.read_text("utf-8")
    assert not [line for line in text.splitlines() if len(line) > 110]
    assert not re.search(r"TODO|FIXME|XXX|breakpoint\(|\t", text)


def test_sizes(capsys):
    with capsys.disabled():
        print("\nlines: " + ", ".join(f"{f.relative_to(ROOT)} {len(f.read_text('utf-8').splitlines())}" for f in SOURCES))


def test_top_level_is_the_design_cards():
    import subprocess
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if tracked:
        names = {path.split("/")[0] for path in tracked if not path.startswith(".") and not path.startswith("LICENSE")}
        assert names == {"selw2s.py", "model.py", "graph.py", "data", "tests", "requirements.txt", "README.md"}
