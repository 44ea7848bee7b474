"""Time and memory of a run against the number of its questions: by --plan up to a million, and measured.

    python tests/bench_growth.py        # half an hour: data/results/growth.json and .svg
    python tests/bench_growth.py --draw # the figure alone

The demo's two models, and the questions of demo-sciq over and over, each with a number so that no two are of
one wording; a quarter as many test questions. Measured runs are processes of their own on an empty cache.
"""
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import selw2s
from data import load_task
from data.results.plan import speed

PLANNED, MEASURED = (1000, 4000, 16000, 64000, 256000, 1_000_000), (1000, 4000, 16000)
MODELS = ("--weak", "data/demo/weak", "--strong", "data/demo/strong", "--methods", "naive", "selective")
RESULTS = ROOT / "data/results"


def write_task(file: Path, n: int) -> None:
    """n training and n / 4 test questions."""
    asked = load_task("demo-sciq").train
    with open(file, "w", encoding="utf-8") as out:
        for i in range(n + n // 4):
            q = asked[i % len(asked)]
            row = {"question": q.question.replace("?", f" in case {i}?"), "options": q.options,
                   "answer": q.answer, "split": "train" if i < n else "test"}
            out.write(json.dumps(row) + "\n")


def planned(task: Path, per_second: float) -> dict:
    """By --plan, which prints it too: operations, seconds of the products alone, bytes."""
    start = time.perf_counter()
    rows = selw2s.plan(selw2s.parse(["--task", str(task), *MODELS, "--plan"]))
    operations = sum(row.operations for row in rows)
    return {"operations": operations, "seconds": operations / per_second,
            "peak": max(row.memory.peak() for row in rows), "planning": time.perf_counter() - start}


def measured(task: Path, out: Path) -> dict:
    """Of a process: seconds of its stages and in all, and its peak bytes."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "selw2s.py", "--task", str(task), *MODELS, "--out", str(out)],
                             cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0
    result = json.loads(next(out.glob("*/*/result.json")).read_text())
    return {"seconds": time.perf_counter() - start, "peak": 1024 * used.ru_maxrss,
            "stages": sum(stage["seconds"] for stage in result["stages"] if not stage["cached"])}


def draw(rows: list[dict]) -> None:
    """growth.svg: minutes and gigabytes against questions, planned lines, measured points."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams |= {"svg.hashsalt": "selw2s", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for ax, key, unit, title in ((axes[0], "seconds", 60, "minutes"), (axes[1], "peak", 1e9, "GB")):
        for kind, style, label in (("planned", "-", "--plan: products, weights, activations"),
                                   ("measured", "o", "measured: the whole process")):
            there = [row for row in rows if row.get(kind)]
            ax.plot([row["questions"] for row in there], [row[kind][key] / unit for row in there], style,
                    label=label)
        ax.set(xscale="log", yscale="log", xlabel="training questions", ylabel=title)
    axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "growth.svg", metadata={"Date": None})


def main() -> None:
    if sys.argv[1:] == ["--draw"]:
        return draw(json.loads((RESULTS / "growth.json").read_text("utf-8")))
    rows, (network, _) = [], selw2s.load(MODELS[3])
    _, per_second = speed("cpu", "float32", network.config)
    for n in PLANNED:
        with tempfile.TemporaryDirectory() as name:
            task = Path(name) / "task.jsonl"
            write_task(task, n)
            row = {"questions": n, "command": shlex.join(["python", "tests/bench_growth.py"]),
                   "planned": planned(task, per_second)}
            if n in MEASURED:
                row["measured"] = measured(task, Path(name) / "out")
        rows.append(row)
        print(json.dumps(row), flush=True)
        (RESULTS / "growth.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    draw(rows)


if __name__ == "__main__":
    main()
