"""The reference runs kept in data/results, and the parts of README.md that are generated from them.

    python -m data.reference                    write README.md's generated parts
    python -m data.reference --run              make every reference run again first: an hour on two cores
    python -m data.reference --run demo-sciq    only some of them
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from data.report import mean_of

TASKS = ("demo-sciq", "demo-boolq", "demo-cosmosqa")
SEEDS = ("--seeds", "0", "1", "2", "3", "4", "5")
FIGURES = ("main.svg", "p_ik.svg", "labels.svg", "pipeline.svg")
REFERENCE = {       # folder in data/results: flags of the run, files kept of it
    "demo": ((), ("result.json",)),
    **{task: (("--task", task, "--methods", "all", *SEEDS), ("result.json", "items.npz", *FIGURES))
       for task in TASKS},
    **{f"{kind}{task.removeprefix('demo')}": (
        ("--task", task, "--methods", "naive", *SEEDS, "--analysis", kind), ("result.json", "analysis.svg"))
       for kind, task in (("cross-task", "demo-sciq"), ("difficulty", "demo-sciq"),
                          *(("sweep", task) for task in TASKS))}}
DECISIONS = {       # row of the README's table of decisions: flags of its alternatives
    "D1": (("--own", "mean"), ("--own", "pmi"), ("--own", "judge")), "D2": (("--shots", "4"),),
    "D3": (("--target", "soft"),), "D4": (("--tau", "0.5"), ("--tau", "0.9")), "D5": (("--anchors", "0"),),
    "D6": (("--alpha", "0"), ("--alpha", "0.9", "--k", "10")), "D9": (("--lr", "2e-4"),),
    "D15": (("--gamma", "1"),)}
RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
BARE = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path('selw2s.py', run_name='__main__')"


def launch(flags, how=("selw2s.py",)) -> tuple[Path, str]:
    """Run the program from the repository's root: the folder of its result, and what it printed."""
    print(f"python selw2s.py {' '.join(flags)}", flush=True)
    out = subprocess.run([sys.executable, *how, *flags], cwd=ROOT, check=True, stdout=subprocess.PIPE,
                         text=True).stdout
    return ROOT / re.search(r"^written   (\S+)/ ", out, re.M)[1], out


def reference(names) -> None:
    """Make the named reference runs again and keep their files; of the decisions, one number per seed."""
    for name in names:
        if name == "decisions":
            measure_decisions()
            continue
        flags, files = REFERENCE[name]      # the demo's output is shown as it is without matplotlib
        made, out = launch(flags, ("-c", BARE) if name == "demo" else ("selw2s.py",))
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(made / file, folder / file)
        if name == "demo":
            (folder / "output.txt").write_text(out, "utf-8")


def measure_decisions() -> None:
    """Accuracy of the selective student per seed, with the defaults and with every alternative."""
    rows = []
    for task in TASKS:
        for flags in ((), *(flags for alternatives in DECISIONS.values() for flags in alternatives)):
            made, _ = launch(("--task", task, "--methods", "selective", *SEEDS, *flags))
            result = json.loads((made / "result.json").read_text("utf-8"))
            row = result["metrics"]["methods"]["selective"]
            rows.append({"task": task, "flags": " ".join(flags), "command": result["command"],
                         "code": result["code"], "accuracy": row["per_seed"],
                         "label_accuracy": row["label_accuracy"]})
    code = rows[0]["code"]
    assert all(row.pop("code") == code for row in rows)
    text = json.dumps({"code": code, "rows": rows}, indent=1)
    (RESULTS / "decisions.json").write_text(text + "\n", "utf-8")


def kept(name: str) -> dict | None:
    """result.json of a reference run; None if it was not made yet."""
    file = RESULTS / name / "result.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def spread(value, ci) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


def cell(result: dict, method: str, key: str = "accuracy", ci: str = "ci95") -> str:
    row = result["metrics"]["methods"][method]
    return spread(row[key], row[ci])


def main_block(_: str) -> str:
    """The README's first table: one row per demo task."""
    lines = ["| task | weak | naive | **selective** | ceiling | selective - naive | PGR naive | "
             "PGR selective | test items x seeds | seconds | result |", "|---" * 11 + "|"]
    commands = []
    for task in TASKS:
        result = kept(task)
        difference = result["metrics"]["methods"]["selective"]["minus_naive"]
        cells = [cell(result, m) for m in ("weak", "naive", "selective", "ceiling")]
        cells += [spread(difference["mean"], difference["ci95"])]
        cells += [cell(result, m, "pgr", "pgr_ci95") for m in ("naive", "selective")]
        cells += [f"{result['metrics']['test_items']:,} x {len(result['seeds'])}",
                  f"{sum({stage['key']: stage['seconds'] for stage in result['stages']}.values()):.0f}",
                  f"[json](data/results/{task}/result.json)"]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
        commands.append(f"    {result['command']}")
    return "\n".join(lines) + "\n\nmade by\n\n" + "\n".join(commands)


def results_block(_: str) -> str:
    """All methods and label sources on the demo tasks."""
    runs = {task: kept(task) for task in TASKS}

    def row(name, get):
        return f"| {name} | " + " | ".join(get(result) for result in runs.values()) + " |"

    def mean(get):
        return lambda r: f"{np.mean([get(seed['diagnostics']) for seed in r['seeds']]):.3f}"
    titles = {"selective": "**selective**", "oracle": "oracle (not attainable)"}
    lines = [row("accuracy on test [95 % interval]", lambda r: r["data"]["name"]),
             "|---" * (len(runs) + 1) + "|"]
    lines += [row(titles.get(m, m), lambda r, m=m: cell(r, m))
              for m in runs["demo-sciq"]["metrics"]["methods"]]
    lines += [row("majority class", lambda r: f"{r['metrics']['majority']:.3f}")]
    lines += [row(name, mean(get)) for name, get in (
        ("own answers right, questions of D_u", lambda d: d["p_ik"]["transfer"]["own_right"]),
        ("P(IK): AUROC on D_u", lambda d: d["p_ik"]["transfer"]["auroc"]),
        ("P(IK): AUROC on test", lambda d: d["p_ik"]["test"]["auroc"]),
        ("P(IK): ECE on test", lambda d: d["p_ik"]["test"]["ece"]),
        ("own answer's probability in its place: AUROC", lambda d: d["p_ik"]["test"]["own_p_auroc"]),
        ("own label used on D_u", lambda d: d["coverage"]),
        *((f"{name} labels right", lambda d, key=key: d["label_accuracy"][key]["all"]) for name, key in (
            ("weak", "weak"), ("own", "own"), ("smoothed weak", "smoothed_weak"),
            ("selective's", "label/selective"), ("oracle's", "label/oracle"))))]
    return "\n".join(lines)


def analysis_block(_: str) -> str:
    """P(IK) across tasks and difficulties."""
    cross, hard = kept("cross-task-sciq"), kept("difficulty-sciq")

    def means(rows, *keys):
        return [f"{mean_of(rows, key):.2f}" for key in keys]
    lines = ["| P(IK) trained on | " + " | ".join(f"used on {b}" for b in TASKS) + " |",
             "|---" * (len(TASKS) + 1) + "|"]
    for a in TASKS:
        cells = (means(cross["analysis"][f"{a} -> {b}"], "auroc", "ece", "accuracy") for b in TASKS)
        lines.append(f"| {a} | " + " | ".join(map(", ".join, cells)) + " |")
    lines += ["", f"AUROC and ECE on D_u, accuracy of the selective student; {len(cross['config']['seeds'])} "
              "seeds. On demo-sciq, difficulty being the weak model's loss:", "",
              "| P(IK) trained on | AUROC on easy items of D_u | on hard ones | selective student |",
              "|---|---|---|---|"]
    for name, rows in hard["analysis"].items():
        cells = " | ".join(means(rows, "auroc_on_easy", "auroc_on_hard", "accuracy"))
        lines.append(f"| {name.removeprefix('trained on ')} items of D_l | {cells} |")
    return "\n".join(lines)


def smoothing_block(_: str) -> str:
    """Where smoothing helps, where it hurts: label accuracy on D_u with alpha fixed, and with it chosen."""
    how, middle = " (graph-only)", " (graph-only, middle layer)"
    fixed = [title[:-len(how)] for title in kept("sweep-sciq")["analysis"]
             if title.startswith("alpha ") and title.endswith(how)]
    lines = ["| labels of D_u right | graph on | " + " | ".join(fixed) + " | chosen on D_l |",
             "|---" * (len(fixed) + 3) + "|"]
    for task in TASKS:
        rows, chosen = kept(f"sweep{task.removeprefix('demo')}")["analysis"], kept(task)
        alone = chosen["metrics"]["methods"]["graph-only"]["label_accuracy"]
        auto = mean_of(rows["alpha auto" + middle], "label_accuracy")
        for where, suffix, last in (("chosen layer", how, alone), ("middle layer", middle, auto)):
            cells = [f"{mean_of(rows[title + suffix], 'label_accuracy'):.3f}" for title in fixed]
            lines.append(f"| {task} | {where} | " + " | ".join([*cells, f"{last:.3f}"]) + " |")
    return "\n".join(lines)


def decisions_block(text: str) -> str:
    """The table of decisions, its last column filled in: effects on the selective student."""
    rows = json.loads((RESULTS / "decisions.json").read_text("utf-8"))["rows"]
    accuracies, out = {(row["task"], row["flags"]): np.array(row["accuracy"]) for row in rows}, []
    for line in text.splitlines():
        tag, effects = re.match(r"\| (D\d+) \|", line), []
        for flags in map(" ".join, DECISIONS.get(tag[1], ()) if tag else ()):
            changes = [accuracies[task, flags] - accuracies[task, ""] for task in TASKS]
            effects.append(f"`{flags}` " + ", ".join(
                f"{c.mean():+.3f} ± {c.std(ddof=1) / len(c) ** 0.5:.3f}" for c in changes))
        out.append(" | ".join([*line.split(" | ")[:4], "; ".join(effects) + " |"]) if effects else line)
    return "\n".join(out)


def readme(text: str) -> str:
    """README.md with every part between <!-- name --> and <!-- end --> made anew from data/results."""
    printed = (RESULTS / "demo/output.txt").read_text("utf-8").splitlines()
    parts = {"main": main_block, "results": results_block, "analysis": analysis_block,
             "smoothing": smoothing_block, "decisions": decisions_block,
             "output": lambda _: "\n".join("    " + line for line in printed)}
    return re.sub(r"<!-- (\w+) -->\n(.*?)<!-- end -->",
                  lambda m: f"<!-- {m[1]} -->\n{parts[m[1]](m[2])}\n<!-- end -->", text, flags=re.S)


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        reference(sys.argv[2:] or [*REFERENCE, "decisions"])
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
