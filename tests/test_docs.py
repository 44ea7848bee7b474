"""README, --help and code say the same.

Run: pytest tests/test_docs.py (2 s; with CI=1 the demo too, 30 s).
"""
import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

import make_results
import selw2s
from conftest import ROOT
from data.results import analyses, metrics, report

README = (ROOT / "README.md").read_text("utf-8")
FILES = (ROOT / "data/README.md").read_text("utf-8")
SOURCES = [ROOT / "selw2s.py", ROOT / "model.py", ROOT / "graph.py", *sorted((ROOT / "data").rglob("*.py"))]


def test_decision_tags_of_code_and_readme_are_the_same():
    code = set(re.findall(r"\bD\d+\b(?=[],])", "".join(f.read_text("utf-8") for f in SOURCES)))
    table = re.findall(r"^\| (D\d+) \|", README, re.M)
    assert table == sorted(set(table), key=lambda t: int(t[1:])) and set(table) == code


def test_every_flag_named_in_the_readme_exists():
    flags = {"--" + f.name.replace("_", "-") for f in fields(selw2s.Config)}
    text = re.sub(r"python -m venv.*", "", README + FILES)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help"}
    others = {"--run", "--nproc-per-node"}      # of tests/make_results.py, of torchrun
    assert named <= flags | others, named - flags


def test_every_function_of_the_map_exists():
    import data
    import graph
    import model
    modules = {"data": data, "selw2s": selw2s, "model": model, "graph": graph, "report": report,
               "metrics": metrics, "analyses": analyses}
    named = re.findall(r"`(data|selw2s|model|graph|report|metrics|analyses)\.(?!py|html)(\w+)`", README)
    assert len(named) > 15
    for module, name in named:
        assert hasattr(modules[module], name), (module, name)


@pytest.mark.parametrize("page", make_results.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_parts_of_the_pages_are_up_to_date(page):
    text = page.read_text("utf-8")
    assert make_results.generated(text) == text


KEPT = [name for name, (_, files) in (make_results.REFERENCE | make_results.REAL).items()
        if len(files) > 1 and make_results.kept(name)]


@pytest.mark.parametrize("name", KEPT)
def test_figures_follow_from_the_result_files(name, tmp_path):
    pytest.importorskip("matplotlib")
    from data.results.figures import figures
    kept = make_results.RESULTS / name
    drawn = figures(tmp_path, make_results.kept(name))
    for file in kept.glob("*.svg"):
        assert file.name in drawn and (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_reference_runs_are_of_one_code_and_say_their_command():
    """The demo's runs; a run of the real pair, hours long, says its own."""
    runs = {name: make_results.kept(name) for name in make_results.REFERENCE}
    assert all(runs.values()), [name for name, run in runs.items() if not run]
    assert len({str(run["code"]) for run in runs.values()}) == 1
    real = {name: make_results.kept(name) for name in make_results.REAL}
    for name, run in (runs | real).items():
        flags = (make_results.REFERENCE | make_results.REAL)[name][0]
        said = run and shlex.split(run["command"])
        assert run is None or run["finished"] and said[:2] == ["python", "selw2s.py"]
        assert run is None or selw2s.parse(said[2:]) == selw2s.parse(list(flags))
    for name in make_results.TASKS:
        assert (len(runs[name]["seeds"]) == 6
                and tuple(runs[name]["metrics"]["methods"]) == selw2s.METHODS)
    assert runs["demo-sciq"]["seconds"] / 6 < 240       # all methods, three supervisors: one seed


@pytest.mark.parametrize("name", [name for name in make_results.SELECTIVE if make_results.kept(name)])
def test_differences_made_from_the_items_are_those_of_the_run(name):
    for other in ("naive", "zero-shot"):
        mean, ci = make_results.paired(name, "selective", other)
        run = make_results.kept(name)["metrics"]["methods"]["selective"][f"minus_{other}"]
        assert mean == pytest.approx(run["mean"], abs=1e-12) and ci == pytest.approx(run["ci95"], abs=1e-12)


def test_learning_rates_stand_under_their_labels(tmp_path, monkeypatch):
    def row(labels, accuracy, **more):
        return {"labels": labels, "accuracy": accuracy, "brier": accuracy / 2, "task": "sciq", "seed": 0,
                "student": "answer", "tune": "lora", "command": "tried --dtype bfloat16", **more}
    rows = [row("untouched", 0.5), row("weak", 0.6, **{"labels right": 0.7}, lr=2e-5, epochs=1),
            row("truth", 0.8, **{"labels right": 1.0}, lr=2e-5, epochs=2)]
    (tmp_path / "finetune.json").write_text(json.dumps(rows), "utf-8")
    monkeypatch.setattr(make_results, "RESULTS", tmp_path)
    start = "| sciq, 0 | answer, lora, bfloat16 |"
    assert make_results.finetune_table("").splitlines()[2:] == [
        f"{start} share of labels right |  | 0.700 | 1.000 |",
        f"{start} 2e-05, 1 | 0.500 (0.250) | 0.600 (0.300) | not measured |",
        f"{start} 2e-05, 2 | 0.500 (0.250) | not measured | 0.800 (0.400) |",
        "", "    tried --dtype bfloat16"]


ALLOWED = {"selw2s": {"model", "graph", "data"}, "model": {"data"}, "graph": set(), "data": {"data"}}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_one_way(file):
    """selw2s -> model, graph, data; model -> data.architecture, .checkpoint, .families, .tokens, .many;
    data.checkpoint -> architecture -> families and tokens; data.cache -> data.many; both data.write_whole;
    graph -> torch alone;
    data.results.work and .memory -> model, whose work they count; nothing imports selw2s but functions of
    data.results.analyses and .plan."""
    tree, room = ast.parse(file.read_text("utf-8")), file.relative_to(ROOT).with_suffix("").parts
    found = {}
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        found |= {name: node.col_offset > 0 for name in names if name.split(".")[0] in (*ALLOWED, "tests")}
    lazy = room[1:] in (("results", "analyses"), ("results", "plan")) and found.pop("selw2s", True)
    lazy = lazy or room == ("selw2s",) and found.pop("selw2s", True)    # run as a script, it imports itself
    assert lazy or "selw2s" not in found
    more = {"model"} if room[1:] in (("results", "work"), ("results", "memory")) else set()
    assert {name.split(".")[0] for name in found} <= ALLOWED[room[0]] | more, found
    if room == ("model",):
        assert set(found) <= {f"data.{name}" for name in ("architecture", "checkpoint", "families", "tokens",
                                                          "many")}
    if room in (("data", "checkpoint"), ("data", "architecture")):
        below = {"data", "data.architecture"} if room[1] == "checkpoint" else set()
        assert set(found) <= below | {"data.families", "data.tokens"}
    if room in (("data", "families"), ("data", "tokens"), ("data", "cache"), ("data", "many"), ("graph",)):
        assert set(found) <= {"data", "data.many"} and (room == ("data", "cache") or not found)
    if room[0] == "data" and "results" not in room:
        assert not any(name.startswith("data.results") for name in found)


COMMANDS = [line.strip() for line in re.findall(r"^    (?:python|python3) .*", README, re.M)]


def test_every_command_of_the_readme_is_understood():
    mine = [command for command in COMMANDS if " selw2s.py " in command and "pip install" not in command]
    assert len(mine) >= 5
    for command in mine:
        selw2s.parse(shlex.split(command.replace("mine.jsonl", "task.jsonl"))[2:])
    installs = [command for command in COMMANDS if "pip install" in command]
    assert len(installs) == 2 and installs[0].endswith("selw2s.py --task demo")


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows(tmp_path):
    """Line by line, but for numbers, which may differ in their last digits on another processor, and for the
    configuration, in which a later version may have more."""
    command = [*make_results.BARE.split("\n"), "--task", "demo", "--out", str(tmp_path)]
    out = subprocess.run([sys.executable, "-c", *command], cwd=ROOT, capture_output=True, text=True,
                         check=True).stdout

    def words(text):
        text = re.sub(r"written .*|^config .*\n(?: {10}.*\n)+", "", text, flags=re.M)
        return [re.sub(r"[-+\d.,\[\]%()\s]+", " ", line).strip()
                for line in text.splitlines() if line.strip()]
    shown = (make_results.RESULTS / "demo/output.txt").read_text("utf-8")
    assert words(out) == words(shown)


@pytest.mark.slow
def test_the_text_of_the_world_is_shown():
    out = subprocess.run([sys.executable, "tests/make_demo.py", "--show"], cwd=ROOT, capture_output=True,
                         check=True)
    assert len(out.stdout.splitlines()) >= 40


@pytest.mark.parametrize("file", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))],
                         ids=lambda f: str(f.relative_to(ROOT)))
def test_width_and_leftovers(file):
    text = file.read_text("utf-8")
    assert not [line for line in text.splitlines() if len(line) > 110]
    assert file not in SOURCES or not re.search(r"TODO|FIXME|XXX|breakpoint\(|\t", text)


def test_sizes(capsys):
    with capsys.disabled():
        print("\nlines: " + ", ".join(f"{f.relative_to(ROOT)} {len(f.read_text('utf-8').splitlines())}"
                                      for f in SOURCES))


def test_top_level_is_the_design_cards():
    import subprocess
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if tracked:
        names = {path.split("/")[0] for path in tracked
                 if not path.startswith(".")}
        assert names == {"selw2s.py", "model.py", "graph.py", "data", "tests", "requirements.txt",
                         "README.md", "LICENSE", "CITATION.cff"}
