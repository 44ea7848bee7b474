"""Progress on a terminal and in a pipe, with a clock of the test's own; the work that is foreseen.

Run: pytest tests/test_progress.py (20 s).
"""
import io
import os
import re
import select
import sys

import pytest
import torch

import selw2s
from data.cache import Progress, Stages, duration
from data.results.plan import ahead


class Console(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def two_kinds(clock, step, stages=4):
    """A run of a weak stage of 100 steps and strong ones, 100 steps of `step` seconds each, ten times the
    work."""
    progress = Progress(clock)
    progress.ahead = {"weak": ("finetune weak", 100.0, 1), "strong": ("finetune strong", 1000.0, stages)}
    strong = [("strong", "finetune strong", 1000.0)] * stages
    for name, kind, work in (("weak", "finetune weak", 100.0), *strong):
        progress.begin(name, kind, work, tokens=5000)
        part = progress.part(work)
        for i in range(100):
            clock.now += step if kind == "finetune weak" else 10 * step
            part(i + 1, 100, 0.5)
            yield progress
        progress.end()


def test_in_a_pipe_a_line_a_minute_and_the_estimate_is_right(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Console(False))
    total = 100 * (2 + 4 * 20)
    for progress in two_kinds(clock, 2.0):
        share, _, left = progress.state() if clock.now > 2 else (0, 0, total)
        assert abs(left - (total - clock.now)) < 0.02 * total
        assert abs(share - clock.now / total) < 0.01
    lines = sys.stderr.getvalue().splitlines()
    assert total / 60 * 0.7 < len(lines) <= total / 60
    assert lines[0] == "progress  run 1%, 2:15:40 left; weak 30%, 2:20 left, 25 tokens/s, loss 0.500"
    form = r"progress  run \d+%, \S+ left; \w+ \d+%, \S+ left, \d+ tokens/s, loss 0.500"
    assert all(re.fullmatch(form, line)
               for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("rows, columns", [(40, 120), (0, 0)])
def test_a_real_terminal_shows_a_bar(clock, monkeypatch, rows, columns):
    """Also one that does not know its size, as containers and CI have them."""
    import fcntl
    import pty
    import struct
    import termios
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        steps, shown = two_kinds(clock, 2.0), b""
        for _ in range(30):
            progress = next(steps)
            terminal.flush()
            while select.select([reader], [], [], 0)[0]:
                shown += os.read(reader, 65536)
        progress.end()
    os.close(reader)
    shown = shown.decode()
    assert "run 1%, " in shown and "weak 30%, " in shown and "tokens/s" in shown


def test_a_run_of_seconds_says_nothing_in_a_pipe(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Console(False))
    for _ in two_kinds(clock, 0.01):
        pass
    assert sys.stderr.getvalue() == ""


def test_on_a_terminal_a_bar_that_is_erased_at_each_stages_end(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Console(True))
    seen = 0
    for progress in two_kinds(clock, 2.0, stages=1):
        if progress.at == progress.work:
            text = sys.stderr.getvalue()
            assert re.search(
                r"\|.{10}\| run \d+%, \S+ left; weak 100%, 0:00 left, 25 tokens/s, loss 0.5", text)
            assert max(map(len, re.split("\r", text))) < 80    # of a terminal that does not say its width
            seen += 1
    text = sys.stderr.getvalue()
    assert seen == 2 and "\n" not in text
    assert re.search(r"\r *\r$", text)                  # blanks over the last bar, and back


def test_what_the_rate_was_long_ago_is_forgotten(clock):
    progress = Progress(clock)
    progress.begin("a", "read strong", 1e6, 0)
    part = progress.part(1e6)
    for i, seconds in enumerate([1.0] * 100 + [5.0] * 13):
        clock.now += seconds
        part(i + 1, 1000)
    assert progress.rate("read strong") == pytest.approx(1000 / 5)
    assert progress.rate("not met yet") == progress.rate("read strong")


def test_a_stage_in_the_cache_counts_as_done_and_the_run_ends_at_one(tmp_path, clock):
    def go():
        stages = Stages(tmp_path, print)
        stages.progress = Progress(clock)
        stages.progress.ahead = {name: ("read strong", 10.0, 1) for name in "abc"}
        for name, steps in (("a", 1), ("b", 2), ("c", 3), ("not foreseen", 1)):
            def compute():
                part = stages.progress.part(12.0)
                for i in range(steps):
                    clock.now += 1
                    part(i + 1, steps)
                shares.append(stages.progress.state()[0])
                return {"x": torch.ones(1)}
            stages("read", name, (name,), compute, cost=("read strong", 12.0))
            if name == "b":
                shares.append(stages.progress.state()[0])
        return stages.progress
    shares = []
    assert go().state()[::2] == (1.0, 0.0)
    assert shares == pytest.approx([12 / 32, 24 / 34, 24 / 34, 1.0, 1.0])
    (next(tmp_path.glob("*.safetensors"))).unlink()
    assert go().state()[0] == 1.0


def test_a_stage_that_fails_leaves_no_bar(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Console(True))
    stages = Stages(tmp_path, print)
    stages.progress = Progress(clock)

    def compute():
        part = stages.progress.part(1.0)
        for i in range(3):
            clock.now += 1
            part(i + 1, 9)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        stages("read", "x", (), compute, cost=("read strong", 1.0))
    assert re.search(r"\r *\r$", sys.stderr.getvalue()) and "x 33%" in sys.stderr.getvalue()


@pytest.mark.parametrize("flags", [("--shots", "2", "--seeds", "0", "1"), *(
    pytest.param(case, marks=pytest.mark.slow) for case in (
        (), ("--student", "answer", "--tune", "lora"), ("--own", "judge", "--tune", "head",
                                                        "--weak-seeds", "2")))])
def test_the_work_foreseen_is_the_work_done(tiny, tmp_path, monkeypatch, flags):
    """Every stage is foreseen by name and kind, its work to the last operation (but confidence-only's, whose
    half follows from values); in a pipe nothing is said of seconds."""
    foreseen, done, real = {}, {}, Progress.begin
    monkeypatch.setattr(selw2s, "ahead", lambda setup: foreseen.update(ahead(setup)) or dict(foreseen))
    monkeypatch.setattr(Progress, "begin", lambda self, name, kind, work, tokens: (
        done.setdefault(name, []).append((kind, work)), real(self, name, kind, work, tokens)))
    selw2s.run(selw2s.parse([*tiny, "--out", str(tmp_path), *flags, "--methods", "naive", "confidence-only",
                             "selective",
                             "strong-on-D_l", "--tau", "0.3", "--alpha", "0.5", "--k", "5"]))
    assert done.keys() == foreseen.keys()
    for name, stages in done.items():
        kind, work, times = foreseen[name]
        assert len(stages) == times and {k for k, _ in stages} == {kind}
        exact = sum(work for _, work in stages) / times
        assert exact == pytest.approx(work, rel=0.15 if name == "confidence-only" else 1e-9), name


def test_durations():
    assert [duration(s) for s in (7.4, 750, 11100)] == ["0:07", "12:30", "3:05:00"]
