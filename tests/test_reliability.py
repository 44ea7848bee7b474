"""Kill it anywhere, start it again; full disks, two runs at once, interrupts.
Run: pytest tests/test_reliability.py (40 s; with CI=1 the 20 kills too, a minute)."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import selw2s
from conftest import ROOT, same_bits
from data import write_whole
from data.cache import Stages

METHODS = ("--methods", "ceiling", "naive", "self-only", "selective")

# The program, once for every point (n, where, seconds), in a child of one process that has torch loaded:
# killed in its n-th write, before, amid or after the file is written or renamed, or after so many seconds.
# Printed per point: what it ended with, and the stages there.
MORTAL = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
import selw2s, torch._dynamo
from data import cache
real_save, real_replace = cache.save_file, os.replace
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def live(n, where):
    writes = [0]
    def save(tensors, path, *rest):
        writes[0] += 1
        if writes[0] == n and where == "before":
            die()
        real_save(tensors, path, *rest)
        if writes[0] == n and where == "middle":
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    def replace(a, b):
        if writes[0] == n and where == "written":
            die()
        real_replace(a, b)
        if writes[0] == n and where == "renamed":
            die()
    cache.save_file, os.replace = save, replace
    with open(os.devnull, "w") as sys.stdout:
        os._exit(selw2s.main({argv!r}))
for n, where, seconds in {points!r}:
    child = os.fork()
    if not child:
        live(n, where)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    there = os.listdir({out!r} + "/cache") if os.path.exists({out!r} + "/cache") else []
    print(json.dumps([status, sorted(name for name in there if name[0] != ".")]), flush=True)
"""


def deaths(argv, out, points) -> list:
    """[exit code, stages there] of the program at every point, one after the other."""
    script = MORTAL.format(root=str(ROOT), argv=argv, points=points, out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(argv, **kwargs):
    return subprocess.run([sys.executable, "selw2s.py", *argv], cwd=ROOT, capture_output=True, text=True,
                          **kwargs)


def outcome(out: Path):
    """Metrics and arrays of the one run under out."""
    result = json.loads(next(out.glob("*/*/result.json")).read_text())
    with np.load(next(out.glob("*/*/items.npz"))) as file:
        return result["metrics"], {key: file[key] for key in file.files}


def same(a, b):
    for method, row in a[0]["methods"].items():
        assert {key for key in row if row[key] != b[0]["methods"][method][key]} == set(), method
    assert a[0] == b[0] and same_bits(a[1], b[1])


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert run([*tiny, *METHODS, "--out", str(out)]).returncode == 0
    return outcome(out)


@pytest.mark.parametrize("points", [
    [(2, "middle"), (4, "written")],
    pytest.param([(1, where) for _ in range(5) for where in ("before", "middle", "written", "renamed")],
                 marks=pytest.mark.slow)])
def test_killed_at_any_write_it_goes_on(tiny, tmp_path, unbroken, points):
    """One run, killed again and again: each start counts its writes, so the end moves through all stages."""
    argv, finished = [*tiny, *METHODS, "--out", str(tmp_path)], set()
    for status, stages in deaths(argv, tmp_path, [(n, where, None) for n, where in points]):
        assert status == -signal.SIGKILL and finished <= set(stages)    # nothing finished is ever lost
        finished = set(stages)
    assert len(finished) == (4 if len(points) == 2 else 5) and not list(tmp_path.glob("*/*/result.json"))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("[!.]*")}
    assert run(argv).returncode == 0
    assert all(f.stat().st_mtime_ns == t for f, t in before.items())
    same(outcome(tmp_path), unbroken)


@pytest.mark.slow
def test_killed_at_random_times_it_goes_on(tiny, tmp_path, unbroken):
    argv = [*tiny, *METHODS, "--out", str(tmp_path)]
    ends = deaths(argv, tmp_path, [(0, "", 0.1 * i) for i in range(12)])
    assert {status for status, _ in ends} <= {-signal.SIGKILL, 0} and ends[2][0] == -signal.SIGKILL
    assert run(argv).returncode == 0
    same(outcome(tmp_path), unbroken)


@pytest.mark.slow
def test_two_runs_at_once_in_one_directory(tiny, tmp_path, unbroken):
    both = [subprocess.Popen([sys.executable, "selw2s.py", *tiny, *METHODS, "--out", str(tmp_path)], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    assert [child.wait() for child in both] == [0, 0], [child.stderr.read() for child in both]
    same(outcome(tmp_path), unbroken)
    assert not list((tmp_path / "cache").glob(".*"))


def test_only_what_a_killed_run_left_is_tidied_up(tmp_path):
    old = time.time() - 90000
    names = (".prep-0.safetensors.1", ".gitignore", "prep-0.safetensors", ".ipynb_checkpoints")
    for name in names:
        (tmp_path / name).mkdir() if name == names[-1] else (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    (tmp_path / ".prep-0.safetensors.2").touch()        # a living run's
    Stages(tmp_path, print)
    assert {file.name for file in tmp_path.iterdir()} == {*names[1:], ".prep-0.safetensors.2"}


def test_writers_of_one_process_number_do_not_meet(tmp_path):
    """As in containers that share a disk: what one writes is not what another renames."""
    def first(temporary):
        with open(temporary, "w") as file:
            file.write("first, ")
            write_whole(tmp_path / "file", lambda other: other.write_text("second"))
            assert (tmp_path / "file").read_text() == "second"
            file.write("whole")
    write_whole(tmp_path / "file", first)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "first, whole"


def test_another_processor_finds_no_stage(tmp_path, monkeypatch):
    here = Stages(tmp_path, print).source
    assert Stages(tmp_path, print).source == here
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert Stages(tmp_path, print).source != here


@pytest.mark.figures
def test_every_file_gets_its_name_when_it_is_whole(tiny, tmp_path, monkeypatch):
    """Written in place, a figure of one run was found empty by the page of another in the same directory.
    result.json is the last."""
    named, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, path: (named.append(Path(path)), real(source, path)))
    assert selw2s.main([*tiny, "--out", str(tmp_path), "--keep", "naive"]) == 0
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {*named} and named[-1].name == "result.json"
    assert {"main.svg", "report.html", "result.json", "config.json"} < {file.name for file in files}


@pytest.mark.slow
def test_interrupt_signal(tiny, tmp_path, unbroken):
    # a shell's background jobs ignore the signal, and their children with them
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)     # noqa: E731
    child = subprocess.Popen([sys.executable, "selw2s.py", *tiny, *METHODS, "--out", str(tmp_path)], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for line in child.stdout:
        if "2 weak" in line:
            child.send_signal(signal.SIGINT)
            break
    _, error = child.communicate()
    assert child.returncode == 130 and len(error.strip().splitlines()) == 1 and "Traceback" not in error
    assert run([*tiny, *METHODS, "--out", str(tmp_path)]).returncode == 0
    same(outcome(tmp_path), unbroken)


def test_interrupt_while_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run([sys.executable, "selw2s.py"], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 130 and done.stderr.split("\n") == ["", "selw2s: interrupted", ""]


@pytest.mark.slow
def test_full_disk_loses_no_finished_stage(tiny, tmp_path, unbroken):
    """A file-size limit that the hidden states do not fit under stands in for the full disk."""
    import resource
    argv = [*tiny, *METHODS, "--out", str(tmp_path)]
    full = run(argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert len(full.stderr.strip().splitlines()) == 1
    done = {f.name for f in (tmp_path / "cache").iterdir()}
    assert len(done) == 6 and not any(name.startswith(".") for name in done)      # weak and its five folds
    assert run(argv).returncode == 0
    same(outcome(tmp_path), unbroken)


def test_loss_that_is_not_finite_names_step_and_learning_rate(tiny, tmp_path, capsys):
    assert selw2s.main([*tiny, "--out", str(tmp_path), "--lr", "1e30"]) == 2
    error = capsys.readouterr().err.strip()
    assert "step" in error and "1e+30" in error and "\n" not in error


@pytest.mark.slow
def test_rerun_repeats_and_compares(tiny, tmp_path, capsys):
    assert selw2s.main([*tiny, *METHODS, "--out", str(tmp_path / "a")]) == 0
    file = next((tmp_path / "a").glob("*/*/result.json"))
    assert selw2s.main(["--rerun", str(file), "--out", str(tmp_path / "b")]) == 0
    assert "the same as" in capsys.readouterr().out
    result = json.loads(file.read_text())
    result["metrics"]["methods"]["naive"]["accuracy"] += 0.01
    del result["metrics"]["methods"]["self-only"]
    result["code"]["selw2s.py"] = "0"
    file.write_text(json.dumps(result))
    assert selw2s.main(["--rerun", str(file), "--out", str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert "naive" in error and "self-only" in error and "code" in error
    file.write_text("{}")
    assert selw2s.main(["--rerun", str(file), "--out", str(tmp_path / "b")]) == 2


@pytest.mark.slow
def test_rerun_computes_everything_again_and_leaves_the_compared_file(tiny, tmp_path):
    assert selw2s.main([*tiny, *METHODS, "--out", str(tmp_path)]) == 0
    file = next(tmp_path.glob("*/*/result.json"))
    before = file.read_bytes()
    assert selw2s.main(["--rerun", str(file), "--out", str(tmp_path)]) == 0
    again = json.loads(next(tmp_path.glob("rerun-*/*/*/result.json")).read_text())
    first = {stage["key"]: stage["cached"] for stage in reversed(again["stages"])}      # of equal stages
    assert file.read_bytes() == before and len(first) >= 6 and not any(first.values())
