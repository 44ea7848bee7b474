"""The reference runs kept in data/results, and what README.md and data/results/README.md show of them.

    python tests/make_results.py                    write the generated parts of both files
    python tests/make_results.py --run              make the demo's reference runs again first: an hour
    python tests/make_results.py --run demo-sciq    only some of them
    python tests/make_results.py --run sciq-answer  a run of the real pair: hours; see tests/make_pair.py
    python tests/make_results.py --cosmosqa FILE.jsonl    CosmosQA's validation file as a task
                                                    (the estimates: tests/make_plan.py)

The real runs read the pair from ./pair and the official files from $SELW2S_DATA.
"""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import official
from data.results.metrics import bootstrap, interval, mean_of
from data.results.plan import PEAK, USED, duration
from data.results.report import right_by_method, span

RESULTS = ROOT / "data/results"
TASKS = ("demo-sciq", "demo-boolq", "demo-cosmosqa")
SEEDS = ("--seeds", "0", "1", "2", "3", "4", "5")
FIGURES = ("main.svg", "p_ik.svg", "labels.svg", "pipeline.svg")
KINDS = (("cross-task", "demo-sciq"), ("difficulty", "demo-sciq"), ("sweep", "demo-sciq"),
         ("sweep", "demo-cosmosqa"))    # on demo-boolq there is nothing to smooth
TWO = ("--weak", "data/demo/weak", "data/demo/strong")
REFERENCE = {       # folder in data/results: flags of the run, files kept of it
    "demo": ((), ("result.json",)),
    **{task: (("--task", task, "--methods", "all", "--weak-seeds", "3", *SEEDS),
              ("result.json", "items.npz", *FIGURES)) for task in TASKS},
    **{f"{kind}{task.removeprefix('demo')}": (
        ("--task", task, "--methods", "naive", *SEEDS, "--analysis", kind), ("result.json", "analysis.svg"))
       for kind, task in KINDS},
    "representation-sciq": (("--task", "demo-sciq", *TWO, "--methods", "naive", *SEEDS, "--analysis",
                             "representation"), ("result.json", "analysis.svg"))}
PAIR = ("--weak", "pair/smollm2-135m", "--strong", "pair/gemma-3-270m")
STUDENTS = ("--methods", "ceiling", "naive", "self-only", "strong-on-D_l", "graph-only", "route-only",
            "selective", "fused")
RECIPES = ("naive", "ensemble", "raven", "two-stage", "label-model")
ANSWER = ("--student", "answer")
BFLOAT16 = ("--dtype", "bfloat16")
SOFT = (*ANSWER, "--labels", "soft")
REAL = {            # the same for the real pair; a run that was not made is "not measured" in the tables
    "sciq-classifier": (("--task", "sciq", *PAIR, "--limit", "3000", *STUDENTS),
                        ("result.json", "items.npz", *FIGURES)),
    "sciq-answer": (("--task", "sciq", *PAIR, "--limit", "3000", *STUDENTS, *ANSWER,
                     "--seeds", "0", "1", "2"), ("result.json", "items.npz", *FIGURES)),
    "sciq-answer-soft": (("--task", "sciq", *PAIR, "--limit", "3000", *STUDENTS, *SOFT),
                         ("result.json", "items.npz", *FIGURES)),
    "sciq-answer-2-passes": (("--task", "sciq", *PAIR, "--limit", "3000", "--methods", "ceiling", "naive",
                              "self-only", "selective", *ANSWER, "--epochs", "2", "--seeds", "0", "1", "2",
                              *BFLOAT16), ("result.json", "items.npz", *FIGURES)),
    "sciq-supervisors": (("--task", "sciq", *PAIR, "--limit", "3000", "--methods", *RECIPES, *SOFT,
                          "--weak-seeds", "3"), ("result.json", "main.svg")),
    "boolq-answer": (("--task", "boolq", *PAIR, "--limit", "1000", *STUDENTS, *ANSWER),
                     ("result.json", "items.npz", *FIGURES)),
    "cosmosqa-answer": (("--task", "pair/cosmosqa-valid.jsonl", *PAIR, "--limit", "1000", *STUDENTS, *ANSWER,
                         *BFLOAT16), ("result.json", "items.npz", *FIGURES)),
    "cross-task-pair": (("--task", "pair/cosmosqa-valid.jsonl", *PAIR, "--limit", "1000", "--methods", "weak",
                         *ANSWER, "--analysis", "cross-task", *BFLOAT16), ("result.json", "analysis.svg")),
    "difficulty-pair": (("--task", "sciq", *PAIR, "--limit", "3000", "--methods", "weak", *ANSWER,
                         "--seeds", "0", "1", "2", "--analysis", "difficulty", *BFLOAT16),
                        ("result.json", "analysis.svg")),
    "folds-2-pair": (("--task", "sciq", *PAIR, "--limit", "3000", "--methods", "naive", *ANSWER, "--folds",
                      "2", *BFLOAT16), ("result.json", "items.npz")),
    "folds-10-pair": (("--task", "sciq", *PAIR, "--limit", "3000", "--methods", "weak", "--folds", "10",
                       *BFLOAT16), ("result.json",))}
DECISIONS = {       # row of the README's table of decisions: flags of its alternatives
    "D1": (("--own", "mean"), ("--own", "pmi"), ("--own", "judge")), "D2": (("--shots", "4"),),
    "D3": (("--target", "soft"),),
    "D4": (("--tau", "answers"), ("--tau", "labels"), ("--tau", "item"), ("--tau", "0.5")),
    "D5": (("--anchors", "0"),), "D6": (("--alpha", "0"), ("--alpha", "0.9", "--k", "10")),
    "D9": (("--lr", "2e-4"), ("--epochs", "1")),
    "D15": (("--gamma", "1"),),
    "D16": (("--folds", "2"), ("--folds", "10")),
    "D17": (("--student", "answer"), ("--student", "answer", "--epochs", "2")),
    "D18": (("--route", "belief"), ("--route", "both")), "D20": (("--labels", "hard"),)}
BARE = "import sys; sys.modules['matplotlib'] = None; import selw2s; sys.exit(selw2s.main())"


def launch(flags, how=("selw2s.py",), **env) -> tuple[Path, str]:
    """Run the program from the repository's root: the folder of its result, and what it printed."""
    print(f"python selw2s.py {' '.join(flags)}", flush=True)
    out = subprocess.run([sys.executable, *how, *flags], cwd=ROOT, check=True, stdout=subprocess.PIPE,
                         text=True, env=os.environ | env).stdout
    return ROOT / re.search(r"^written   (\S+)/ ", out, re.M)[1], out


def make(names) -> None:
    """Make the named reference runs again and keep their files; of the decisions, one number per seed."""
    for name in names:
        if name == "decisions":
            measure_decisions()
            continue
        flags, files = (REFERENCE | REAL)[name]     # the demo's output is shown as it is without matplotlib
        made, out = launch(flags, ("-c", BARE) if name == "demo" else ("selw2s.py",))
        folder = RESULTS / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(made / file, folder / file)
        if name == "demo":
            (folder / "output.txt").write_text(out, "utf-8")


def measure_decisions() -> None:
    """Accuracy of the selective student per seed, with the defaults and with every alternative; two runs at
    a time, of one thread each."""
    every = ((), *(flags for alternatives in DECISIONS.values() for flags in alternatives))

    def measured(task, flags):
        run = ("--task", task, "--methods", "selective", *SEEDS, *flags)
        made, _ = launch(run, ("-c", BARE), OMP_NUM_THREADS="1")
        result = json.loads((made / "result.json").read_text("utf-8"))
        row = result["metrics"]["methods"]["selective"]
        return {"task": task, "flags": " ".join(flags), "command": result["command"], "code": result["code"],
                "accuracy": row["per_seed"], "label_accuracy": row["label_accuracy"]}
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(measured, *zip(*((task, flags) for task in TASKS for flags in every))))
    code = rows[0]["code"]
    assert all(row.pop("code") == code for row in rows)
    text = json.dumps({"code": code, "rows": rows}, indent=1)
    (RESULTS / "decisions.json").write_text(text + "\n", "utf-8")


def cosmosqa_task(file: str) -> None:
    """CosmosQA's official validation questions, one JSON object a line; without "split", the program parts
    train and test by context (data/jsonl.py). For where the official training file is not at hand."""
    text = official.content("cosmosqa/valid.csv", None).decode()
    rows = [{"id": row["id"], "context": row["context"], "question": row["question"],
             "options": [row[f"answer{i}"] for i in range(4)], "answer": int(row["label"])}
            for row in csv.DictReader(io.StringIO(text, newline=""))]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{file}: {len(rows):,} questions")


# -------------------------------------------------------------------------------------------- generated parts
def keep_speed(row: dict) -> None:
    """A row of a benchmark into data/results/speed.json, in the place of an older one of its name, peer and
    device. row: what, peer, device, unit, ours and theirs (medians), times (as fast: median of the pairs,
    least, most), pairs, command, perhaps limit (share of the time that the products alone would take)."""
    file = RESULTS / "speed.json"
    rows = json.loads(file.read_text("utf-8")) if file.exists() else []
    same = [i for i, old in enumerate(rows) if all(old[k] == row[k] for k in ("what", "peer", "device"))]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    file.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def kept(name: str) -> dict | None:
    """result.json of a reference run; None if it was not made yet."""
    file = RESULTS / name / "result.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def spread(value, ci) -> str:
    """A number with its interval."""
    if value is None:
        return "undefined"
    return f"{value:.3f} {span(ci)}" if ci else f"{value:.3f}"


def cell(result: dict, method: str, key: str = "accuracy", ci: str = "ci95") -> str:
    """One method's number with its interval."""
    row = result["metrics"]["methods"].get(method)
    return "not measured" if row is None else spread(row[key], row[ci])


def row_of(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def difference(result: dict, method: str, to: str) -> str:
    """Accuracy of a method less that of another, with its paired interval."""
    row = result["metrics"]["methods"][method].get(f"minus_{to}")
    return "not measured" if row is None else f"{row['mean']:+.3f} {span(row['ci95'])}"


def seconds(result: dict) -> float:
    """Of all stages that a result needed, each once, wherever they were computed."""
    return sum({stage["key"]: stage["seconds"] for stage in result["stages"]}.values())


def smoothed(result: dict) -> int:
    """In how many seeds selective's weak labels were smoothed."""
    return sum(run["smoothing"]["alpha"] > 0 for run in result["seeds"])


def main_table(names) -> str:
    """One row per run: the methods that the claim is about. A demo's says that it is synthetic."""
    shown = ("weak", "zero-shot", "naive", "self-only", "selective", "fused", "strong-on-D_l", "ceiling")
    head = ["run", *shown, "selective - naive", "selective - zero-shot", "PGR naive", "PGR zero-shot",
            "PGR selective", "smoothed in", "test items x seeds", "minutes"]
    lines = [row_of(head), "|---" * len(head) + "|"]
    for name in names:
        result = kept(name)
        if result is None:
            lines.append(row_of([name, "not measured", *[""] * (len(head) - 2)]))
            continue
        cells = [cell(result, m) for m in shown]
        cells += [difference(result, "selective", other) for other in ("naive", "zero-shot")]
        cells += [cell(result, m, "pgr", "pgr_ci95") for m in ("naive", "zero-shot", "selective")]
        cells += [f"{smoothed(result)} of {len(result['seeds'])} seeds",
                  f"{result['metrics']['test_items']:,} x {len(result['seeds'])}",
                  f"{seconds(result) / 60:.1f}"]
        world = " (synthetic)" if name in TASKS else ""
        lines.append(row_of([f"[{name}](data/results/{name}/result.json){world}", *cells]))
    return "\n".join(lines)


def commands(names) -> str:
    """What made each run, or would."""
    flags = [(REFERENCE | REAL)[name][0] for name in names]
    return "\n".join("    " + " ".join(("python selw2s.py", *these)) for these in flags)


def methods_table(names) -> str:
    """All methods and label sources of some runs."""
    runs = {name: kept(name) for name in names if kept(name)}
    if not runs:
        return "not measured"

    def row(title, get):
        return row_of([title, *(get(result) for result in runs.values())])

    def mean(get):
        return lambda r: f"{np.mean([get(seed['diagnostics']) for seed in r['seeds']]):.3f}"
    titles = {"selective": "**selective**", "zero-shot": "**zero-shot** (the strong model untouched)",
              "oracle": "oracle (not attainable)"}
    methods = list(dict.fromkeys(m for r in runs.values() for m in r["metrics"]["methods"]))
    lines = [row_of(["accuracy on test [95 % interval]", *runs]), "|---" * (len(runs) + 1) + "|"]
    lines.append(row("seeds", lambda r: str(len(r["seeds"]))))
    lines += [row(titles.get(m, m), lambda r, m=m: cell(r, m)) for m in methods]
    lines.append(row("majority class", lambda r: f"{r['metrics']['majority']:.3f}"))
    lines.append(row("own answers right among all options, D_u",
                     mean(lambda d: d["p_ik"]["transfer"]["own_right"])))
    for router in ("probe", "belief", "both"):
        for part, where in (("transfer", "D_u"), ("test", "test")):
            lines.append(row(f"P(IK) by {router}: AUROC / ECE on {where}",
                             lambda r, a=router, b=part: router_cell(r, a, b)))
    lines.append(row("tau's rule, by seed", lambda r: " ".join(s["tau_rule"] for s in r["seeds"])))
    lines.append(row("own label used on D_u", mean(lambda d: d["coverage"])))
    sources = [r["seeds"][0]["diagnostics"]["label_accuracy"] for r in runs.values()]
    for key in dict.fromkeys(key for source in sources for key in source):
        if key in ("weak/0", *(f"label/{m}" for m in ("weak", "naive", "logconf", "product", "self-only",
                                                      "graph-only", "selective", "ceiling"))):
            continue        # weak, own, smoothed weak, refined under other names; the truth
        title = key.replace("_", " ")
        if key.startswith("label/"):
            title = f"{key.removeprefix('label/')}'s"
        if key.startswith("weak/"):
            title = f"supervisor {int(key.removeprefix('weak/')) + 1}"
        lines.append(row(f"labels right: {title}", lambda r, k=key: label_cell(r, k)))
    lines.append(row("supervisor right on D_l, cross-fitted",
                     lambda r: f"{r['metrics']['supervisor']['cross_fitted']:.3f}"))
    return "\n".join(lines)


def router_cell(result: dict, router: str, part: str) -> str:
    """AUROC / ECE of P(IK) by one router, means over seeds."""
    rows = [seed["diagnostics"]["routers"][router][part] for seed in result["seeds"]]
    return " / ".join(f"{mean_of(rows, key):.3f}" for key in ("auroc", "ece"))


def label_cell(result: dict, key: str) -> str:
    """Share of right labels of D_u, mean over seeds."""
    rows = [seed["diagnostics"]["label_accuracy"] for seed in result["seeds"]]
    return f"{np.mean([r[key]['all'] for r in rows]):.3f}" if key in rows[0] else "not measured"


def means(rows: list[dict], *keys) -> list[str]:
    """Of every key, over seeds."""
    return [f"{mean_of(rows, key):.2f}" for key in keys]


def cross_task_table(name: str) -> str:
    """P(IK) from one task's D_l used on each one's D_u."""
    result = kept(name)
    if result is None:
        return "not measured"
    tasks = list(dict.fromkeys(pair.split(" -> ")[0] for pair in result["analysis"]))
    lines = [row_of(["P(IK) trained on", *(f"used on {b}" for b in tasks)]), "|---" * (len(tasks) + 1) + "|"]
    for a in tasks:
        every = [result["analysis"][f"{a} -> {b}"] for b in tasks]
        last = "accuracy" if "accuracy" in every[0][0] else "label_accuracy"        # --methods weak
        cells = (means(rows, "auroc", "ece", last) for rows in every)
        lines.append(row_of([a, *map(", ".join, cells)]))
    return "\n".join(lines)


def difficulty_table(name: str) -> str:
    """P(IK) from all, easy, hard items of D_l, used on easy and hard ones of D_u."""
    result = kept(name)
    if result is None:
        return "not measured"
    trained = "accuracy" in result["analysis"]["trained on all"][0]         # not under --methods weak
    last = ("accuracy", "selective student") if trained else ("label_accuracy", "selective's labels right")
    head = ["P(IK) trained on", "AUROC on easy items of D_u", "on hard ones", last[1]]
    lines = [row_of(head), "|---" * 4 + "|"]
    for title, rows in result["analysis"].items():
        cells = means(rows, "auroc_on_easy", "auroc_on_hard", last[0])
        lines.append(row_of([title.removeprefix("trained on ") + " items of D_l", *cells]))
    return "\n".join(lines)


def folds_table(_: str) -> str:
    """The supervisor as D_l shows it beside the supervisor as it is, by the number of folds [D16]."""
    head = ("folds", "dtype", "each trained on", "right on D_l, cross-fitted", "right on D_u",
            "standard errors apart")
    lines = [row_of(head), "|---" * 6 + "|"]
    for folds, name in ((2, "folds-2-pair"), (5, "sciq-classifier"), (10, "folds-10-pair")):
        result = kept(name)
        if result is None:
            lines.append(row_of([str(folds), "not measured", "", "", "", ""]))
            continue
        of, labelled = result["metrics"]["supervisor"], result["seeds"][0]["n"]["labelled"]
        cells = (f"{of[key]:.3f}" for key in ("cross_fitted", "actual"))
        dtype = result["config"]["dtype"]
        lines.append(row_of([str(folds), dtype, f"{labelled - labelled // folds:,}", *cells,
                             f"{of['standard_errors']:+.1f}"]))
    return "\n".join(lines)


def bfloat16_table(_: str) -> str:
    """SciQ, seed 0, in both dtypes, where the number of folds plays no part: the same test items."""
    runs = on_test("sciq-answer")[:1] + on_test("folds-2-pair")
    head = ["accuracy on test", "float32", "bfloat16", "difference", "right or wrong alike"]
    lines = [row_of(head), "|---" * len(head) + "|"]
    for method in ("weak", "zero-shot", "naive"):
        (right,), group = right_by_method(runs, [method])       # (2, N): float32, bfloat16
        draws = bootstrap(right[:, None], group)
        (a, b), alike = right.mean(1), (right[0] == right[1]).mean()
        change = f"{b - a:+.3f} {span(interval(draws[:, 1] - draws[:, 0]))}"
        lines.append(row_of([method, f"{a:.3f}", f"{b:.3f}", change, f"{alike:.3f}"]))
    return "\n".join(lines)


def representation_table(_: str) -> str:
    """What each weak model's states lack, and what that predicts."""
    result = kept("representation-sciq") or {"analysis": {}}
    head = ("weak model of demo-sciq", "norm of P_s (I - P_w)", "predicted error", "measured error",
            "its labels of D_u right", "its student on test")
    keys = ("norm", "predicted_error", "error", "label_accuracy", "accuracy")
    lines = [row_of(head), "|---" * 6 + "|"]
    for name, rows in result["analysis"].items():
        lines.append(row_of([name, *(f"{mean_of(rows, key):.3f}" for key in keys)]))
    return "\n".join(lines)


def smoothing_table(_: str) -> str:
    """Where smoothing helps, where it hurts: label accuracy on D_u with alpha fixed, and with it chosen."""
    how, middle = " (graph-only)", " (graph-only, middle layer)"
    fixed = [title[:-len(how)] for title in kept("sweep-sciq")["analysis"]
             if title.startswith("alpha ") and title.endswith(how)]
    lines = [row_of(["right", "graph on", *fixed, "chosen on D_l"]),
             "|---" * (len(fixed) + 3) + "|"]
    for task in ("demo-sciq", "demo-cosmosqa"):
        rows, chosen = kept(f"sweep{task.removeprefix('demo')}")["analysis"], kept(task)
        alone = chosen["metrics"]["methods"]["graph-only"]["label_accuracy"]
        auto = mean_of(rows["alpha auto" + middle], "label_accuracy")
        for where, suffix, last in (("chosen layer", how, alone), ("middle layer", middle, auto)):
            cells = [f"{mean_of(rows[title + suffix], 'label_accuracy'):.3f}" for title in fixed]
            lines.append(row_of([task, f"{where}: labels", *cells, f"{last:.3f}"]))
        students = [f"{mean_of(rows[title + how], 'accuracy'):.3f}" for title in fixed]
        alone = chosen["metrics"]["methods"]["graph-only"]["accuracy"]
        lines.append(row_of([task, "chosen layer: their student on test", *students, f"{alone:.3f}"]))
    return "\n".join(lines)


def choice_table(_: str) -> str:
    """Which view of D_l chooses smoothing best (tests/bench_smoothing.py)."""
    rows = json.loads((RESULTS / "smoothing_choice.json").read_text("utf-8"))
    views = ("none", "best", "fold", "fold, k/5", "all", "fold + D_u")
    lines = [row_of(["labels of D_u right", *views, "seeds"]), "|---" * (len(views) + 2) + "|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        cells = [f"{np.mean([r[v]['accuracy'] for r in mine]):.3f}" for v in views]
        lines.append(row_of([task, *cells, str(len(mine))]))
    return "\n".join(lines)


def routing_table(_: str) -> str:
    """Labels of D_u right by router and rule of tau (tests/bench_routing.py)."""
    rows = json.loads((RESULTS / "routing.json").read_text("utf-8"))
    lines = [row_of(["task, seed", "router", "AUROC", "answers", "labels", "item", "fused", "weak", "own"]),
             "|---" * 9 + "|"]
    for row in rows:
        title = f"{row['task']}, {row['seed']}"
        if "--target soft" in row["command"]:
            title += ", soft target"
        for router, of in row["routers"].items():
            best = max(of["rules"], key=lambda rule: of["rules"][rule]["on D_l"])
            cells = {rule: f"{r['on D_u']:.3f}" for rule, r in of["rules"].items()}
            cells[best] = f"**{cells[best]}**"
            rest = [f"{x:.3f}" for x in (of["fused"], row["weak"], row["own"])]
            lines.append(row_of([title, router, f"{of['auroc']:.3f}", *cells.values(), *rest]))
    commands = dict.fromkeys(row["command"] for row in rows)
    return "\n".join([*lines, "", *(f"    {command}" for command in commands)])


def finetune_table(_: str) -> str:
    """Learning rates and passes tried on D_l (tests/bench_finetune.py): accuracy (Brier), by labels."""
    rows = json.loads((RESULTS / "finetune.json").read_text("utf-8"))
    groups = {}     # (task, seed, student): {labels: its rows}
    for row in rows:
        dtype = "bfloat16" if "bfloat16" in row["command"] else "float32"
        student = f"{row['student']}, {row['tune']}, {dtype}"
        group = groups.setdefault((row["task"], row["seed"], student), {})
        group.setdefault(row["labels"], []).append(row)
    names = list(dict.fromkeys(row["labels"] for row in rows if row["labels"] != "untouched"))
    lines = [row_of(["task, seed", "student", "learning rate, passes", "untouched", *names]),
             "|---" * (4 + len(names)) + "|"]

    def scores(found):
        return f"{found[0]['accuracy']:.3f} ({found[0]['brier']:.3f})" if found else "not measured"
    for (task, seed, student), group in groups.items():
        untouched, head = scores(group.pop("untouched")), [f"{task}, {seed}", student]
        right = [f"{group[name][0]['labels right']:.3f}" if name in group else "" for name in names]
        lines.append(row_of([*head, "share of labels right", "", *right]))
        for tried in dict.fromkeys((row["lr"], row["epochs"]) for some in group.values() for row in some):
            cells = [[row for row in group.get(name, []) if (row["lr"], row["epochs"]) == tried]
                     for name in names]
            lines.append(row_of([*head, f"{tried[0]:g}, {tried[1]}", untouched, *map(scores, cells)]))
    commands = dict.fromkeys(row["command"] for row in rows)
    return "\n".join([*lines, "", *(f"    {command}" for command in commands)])


def decisions_table(text: str) -> str:
    """The table of decisions, its last column filled in: effects on the selective student."""
    rows = json.loads((RESULTS / "decisions.json").read_text("utf-8"))["rows"]
    accuracies, out = {(row["task"], row["flags"]): np.array(row["accuracy"]) for row in rows}, []
    for line in text.splitlines():
        tag, effects = re.match(r"\| (D\d+) \|", line), []
        for flags in map(" ".join, DECISIONS.get(tag[1], ()) if tag else ()):
            if any((task, flags) not in accuracies for task in TASKS):
                effects.append(f"`{flags}` not measured")
                continue
            changes = [accuracies[task, flags] - accuracies[task, ""] for task in TASKS]
            effects.append(f"`{flags}` " + ", ".join(
                f"{c.mean():+.3f} ± {c.std(ddof=1) / len(c) ** 0.5:.3f}" for c in changes))
        out.append(" | ".join([*line.split(" | ")[:4], "; ".join(effects) + " |"]) if effects else line)
    return "\n".join(out)


def demo_table(_: str) -> str:
    """The table that the demo prints."""
    printed = (RESULTS / "demo/output.txt").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith("method "))
    end = next(i for i in range(start, len(printed)) if not printed[i])
    return "\n".join("    " + line for line in printed[start:end])


def verdict(name: str, other: str) -> str:
    """What the paired interval of selective's difference to another row says."""
    mean, (low, high) = paired(name, "selective", other)
    side = "above" if low > 0 else "below" if high < 0 else "not told apart from"
    return f"{side} {other} ({mean:+.3f} {span((low, high))})"


SAID = {"weak": "weak", "zero-shot": "zero-shot: the strong model untouched",
        "naive": "naive: on the weak labels", "self-only": "self-only: on its own labels",
        "selective": "**selective**", "fused": "fused (beyond the paper)",
        "strong-on-D_l": "strong-on-D_l: on the truth of D_l", "ceiling": "ceiling: on the truth of D_u"}


def headed(name: str) -> str:
    """A real run by its task and the flags that tell it from others."""
    config = kept(name)["config"]
    others = "".join(f" --{flag} {config[flag]}" for flag in ("labels", "epochs") if config[flag] != "auto")
    return f"{name.split('-')[0]}, `--student {config['student']}{others}`"


def on_test(name: str) -> list[dict]:
    """What a run's items.npz holds of test, per seed, as right_by_method takes it."""
    with np.load(RESULTS / name / "items.npz") as arrays:
        starts = [f"seed{seed}/test/" for seed in kept(name)["config"]["seeds"]]
        return [{"test": {key.removeprefix(start): arrays[key] for key in arrays.files
                          if key.startswith(start)}} for start in starts]


def paired(name: str, method: str, other: str) -> tuple[float, list[float]]:
    """Accuracy of a method less another's on the same items, with its 95 % interval; as result.json has them
    for naive and zero-shot alone."""
    right, group = right_by_method(on_test(name), (method, other))
    draws = bootstrap(right, group)
    return right[0].mean() - right[1].mean(), interval(draws[:, 0] - draws[:, 1])


def found(name: str) -> str:
    """What the intervals of one run of the real pair tell, as it came out."""
    result = kept(name)
    metrics, seeds, on = result["metrics"], len(result["seeds"]), smoothed(result)
    told = [verdict(name, other) for other in ("naive", "self-only", "zero-shot")]
    how = f"smoothing was on in {on} of {seeds} seeds" if on else "smoothing was off, so it is route-only"
    if not on and not any(run["diagnostics"]["coverage"] for run in result["seeds"]):
        how = "no own label passed tau and smoothing was off, so it is naive"
    said = [f"- {headed(name)}: selective is {told[0]}, {told[1]} and {told[2]}; {how}."]
    if seeds > 1:
        p = metrics["methods"]["selective"]["minus_naive"]
        said.append(f"Over seeds alone, p = {p['sign_flip_p']:.2f} for the first (sign-flip test, with so "
                    f"few at least {p['smallest_p']:.2f}).")
    if not metrics["pgr_defined"]:
        said.append("The ceiling is not clearly above the weak model: there is no gap to recover.")
    apart = metrics["supervisor"]["standard_errors"]
    if abs(apart) > 3:
        said.append(f"The supervisor seems {'worse' if apart < 0 else 'better'} on D_l than it is on D_u, by "
                    f"{abs(apart):.1f} standard errors.")
    rows = [metrics["methods"][m] for m in SAID if m in metrics["methods"]]
    if all(row["ci95"][0] <= metrics["majority"] <= row["ci95"][1] for row in rows):
        said.append("No row is told apart from the majority class.")
    return " ".join([*said, f"[Result](data/results/{name}/result.json)."])


def finding(_: str) -> str:
    """What the method did on real data: a table, a column per task and kind of student, and what it tells."""
    names = [name for name in SELECTIVE if kept(name)]
    if not names:
        return "On real data: not measured."
    results = [kept(name) for name in names]

    def across(get, *keys):
        return ["; ".join(get(result, key) for key in keys) for result in results]

    def counted(result, part):
        return f"{round(np.mean([run['n'][part] for run in result['seeds']])):,}"

    def auroc_on_test(result, router):
        return router_cell(result, router, "test").split(" / ")[0]
    rows = [["accuracy on test [95 % interval]", *map(headed, names)],
            ["items in D_l; D_u; test", *across(counted, "labelled", "transfer", "test")],
            ["seeds", *(str(len(result["seeds"])) for result in results)],
            *([title, *(cell(result, m) for result in results)] for m, title in SAID.items()),
            ["majority class", *(f"{result['metrics']['majority']:.3f}" for result in results)],
            ["labels of D_u right: weak; own; selective's", *across(label_cell, "weak", "own", "refined")],
            ["AUROC on test: P(IK); option probabilities", *across(auroc_on_test, "probe", "belief")]]
    table = [row_of(rows[0]), "|---" * len(rows[0]) + "|", *map(row_of, rows[1:])]
    return "\n".join([*table, "", *map(found, names)])


def plans_table(_: str) -> str:
    """What --plan says (tests/make_plan.py); the README's commands first."""
    head = ["task, weak -> strong", "flags", "tokens trained on or read", "operations", "devices",
            "GB on each", *PEAK]
    lines = [row_of(head), "|---" * len(head) + "|"]
    for plan in json.loads((RESULTS / "plan.json").read_text("utf-8")):
        pair = " -> ".join(plan[model].split("/")[1] for model in ("weak", "strong"))
        speeds = [plan["devices"] * USED * peak[plan["dtype"]] for peak in PEAK.values()]
        flags = f"`{plan['flags']}`" if plan["flags"] else ""
        lines.append(row_of([f"{plan['task']}, {pair}", flags, f"{plan['tokens'] / 1e6:.1f}M",
                             f"{plan['operations']:.1e}", str(plan["devices"]), f"{plan['peak'] / 1e9:,.0f}",
                             *(duration(plan["operations"], speed) for speed in speeds)]))
    return "\n".join(lines)


def speed_table(_: str) -> str:
    """What bench_model.py and bench_graph.py measured with --keep."""
    rows = json.loads((RESULTS / "speed.json").read_text("utf-8"))
    lines = [row_of(["what", "beside", "here", "there", "times as fast", "products alone", "device"]),
             "|---" * 7 + "|"]
    for row in rows:
        median, least, most = (f"{x:.2f}" for x in row["times"])
        limit = f"{row['limit']:.2f}" if "limit" in row else ""
        ours, theirs = (f"{row[side]:,.0f}" if row[side] >= 100 else f"{row[side]:.3g}"
                        for side in ("ours", "theirs"))
        lines.append(row_of([row["what"], row["peer"], f"{ours} {row['unit']}", theirs,
                             f"**{median}** ({least} to {most}, {row['pairs']} pairs)", limit,
                             row["device"]]))
    commands = dict.fromkeys(row["command"] for row in rows)
    return "\n".join([*lines, "", *(f"    {command}" for command in commands)])


def sharing_table(_: str) -> str:
    """What a run of several seeds had computed once instead of again, by the record of its stages."""
    head = ("sciq-answer, seeds", "stages", "asked for", "computed", "minutes", "minutes if none were shared")
    result = kept("sciq-answer")
    if result is None:
        return "not measured"
    kinds = {"reading": ("read",), "weak supervisors": ("weak", "cross-"), "students": ("",)}
    of, lines = {kind: [] for kind in kinds}, [row_of(head), "|---" * len(head) + "|"]
    for stage in result["stages"]:
        kind = next(kind for kind, starts in kinds.items() if stage["name"].startswith(starts))
        of[kind].append(stage)
    for kind, stages in of.items():
        once = {stage["key"]: stage["seconds"] for stage in stages}
        minutes = sum(once.values()) / 60, sum(stage["seconds"] for stage in stages) / 60
        lines.append(row_of([str(len(result["seeds"])), kind, str(len(stages)), str(len(once)),
                             *(f"{x:.1f}" for x in minutes)]))
    return "\n".join(lines)


def growth_table(_: str) -> str:
    """Time and memory of a run by its size (tests/bench_growth.py)."""
    rows = json.loads((RESULTS / "growth.json").read_text("utf-8"))
    head = ["training questions", "operations", "minutes of products, planned", "minutes, measured",
            "GB, planned", "GB of the process, measured", "seconds that planning took"]
    lines = [row_of(head), "|---" * len(head) + "|"]
    for row in rows:
        plan, real = row["planned"], row.get("measured")
        minutes, peak = ("not measured",) * 2
        if real:
            minutes, peak = f"{real['seconds'] / 60:.1f}", f"{real['peak'] / 1e9:.2f}"
        lines.append(row_of([f"{row['questions']:,}", f"{plan['operations']:.1e}",
                             f"{plan['seconds'] / 60:.2f}", minutes, f"{plan['peak'] / 1e9:.2f}", peak,
                             f"{plan['planning']:.0f}"]))
    return "\n".join([*lines, "", f"    {rows[0]['command']}"])


RUNS = [name for name, (flags, _) in REAL.items() if not {"--analysis", "--folds"} & set(flags)]
SELECTIVE = [name for name, (flags, _) in REAL.items() if "selective" in flags]
PARTS = {"finding": finding, "results": lambda _: main_table([*SELECTIVE, *TASKS]), "output": demo_table,
         "real-commands": lambda _: commands(REAL), "demo-commands": lambda _: commands(REFERENCE),
         "real-methods": lambda _: methods_table(RUNS), "demo-methods": lambda _: methods_table(TASKS),
         "cross-task-pair": lambda _: cross_task_table("cross-task-pair"),
         "cross-task-sciq": lambda _: cross_task_table("cross-task-sciq"),
         "difficulty-pair": lambda _: difficulty_table("difficulty-pair"),
         "difficulty-sciq": lambda _: difficulty_table("difficulty-sciq"),
         "representation": representation_table, "smoothing": smoothing_table, "choice": choice_table,
         "folds": folds_table, "bfloat16": bfloat16_table,
         "routing": routing_table, "finetune": finetune_table,
         "decisions": decisions_table, "plans": plans_table, "growth": growth_table, "speed": speed_table,
         "sharing": sharing_table}
PAGES = (ROOT / "README.md", RESULTS / "README.md")


def generated(text: str) -> str:
    """A page with every part between <!-- name --> and <!-- end --> made anew from data/results."""
    return re.sub(r"<!-- ([\w-]+) -->\n(.*?)<!-- end -->",
                  lambda m: f"<!-- {m[1]} -->\n{PARTS[m[1]](m[2])}\n<!-- end -->", text, flags=re.S)


def main() -> None:
    if sys.argv[1:2] == ["--cosmosqa"]:
        return cosmosqa_task(sys.argv[2])
    if sys.argv[1:2] == ["--run"]:
        make(sys.argv[2:] or [*REFERENCE, "decisions"])
    for page in PAGES:
        page.write_text(generated(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
