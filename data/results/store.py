"""A run on disk: what is kept of a seed; result.json, items.npz and labels.jsonl, written whole, read again,
several made one."""
import hashlib
import io
import json
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from data import DataError, many, write_whole
from data.cache import digest
from data.jsonl import TEXTS, label_rows
from data.results.metrics import hidden_truth, own_right, squared_error
from data.results.report import diagnose, summarise

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = 3      # of result.json, items.npz, labels.jsonl


def sources() -> dict[str, str]:
    """SHA-256 of every source file of the program."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/results/*.py")])
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def titled(names: list[str]) -> list[str]:
    """The names, each once: #2, #3 ... is another of the same name, as another order of training is."""
    out = []
    for name in names:
        title, count = name, 1
        while title in out:
            title, count = f"{name} #{count + 1}", count + 1
        out.append(title)
    return out


def part_arrays(config, part, known: dict, students: dict) -> dict[str, np.ndarray]:
    """A part (selw2s.Part) as items.npz has it; here metrics may read the hidden truth. known: P(IK) by
    router, students: P(y = 1) by method."""
    arrays = {"truth": hidden_truth(part), "own": part.own, "own_p": part.belief.amax(1).float(),
              "own_right": own_right(config, part), "p_ik": known[config.route],
              **{f"p_ik/{router}": p for router, p in known.items()},
              **{f"p/{method}": p for method, p in students.items()}}
    return {"id": np.array([item.id for item in part.items]),
            "group": np.array([q.group for q in part.questions]),
            **{name: x.numpy() for name, x in arrays.items()}}


OF_WEAK = ("weak", "naive", "logconf", "product", "confidence-only", "ensemble", "raven", "two-stage",
           "debate", "chain")   # what knows the weak labels alone: of no truth, if they came with a file


def truth_used(setup, prep) -> dict[str, int]:
    """Ground-truth labels that a method used; those not named here: all of D_l."""
    n_l, n_u, shots = len(prep.labelled.items), len(prep.transfer.items), setup.config.shots
    used = dict.fromkeys(OF_WEAK, n_l if setup.supervisors else 0)
    return used | {"ceiling": n_u, "self-only": shots, "zero-shot": shots, "oracle": n_l + n_u,
                   "label-model": n_l if setup.supervisors else shots}


def record(setup, prep, known: dict, s, done: dict, homophily: float) -> dict:
    """One seed's arrays and choices, as named in items.npz and result.json. Of selw2s: setup: Setup, prep:
    Prepared, known: Known by router, s: Selected, done: Predictions by method."""
    config, u = setup.config, prep.transfer
    right = ((prep.labelled.weak > 0.5) == (prep.labelled.truth > 0.5)).double()
    transfer = part_arrays(config, u, {name: k.transfer for name, k in known.items()},
                           {method: out.transfer for method, out in done.items()})
    test = part_arrays(config, prep.test, {name: k.test for name, k in known.items()},
                       {method: out.test for method, out in done.items()})
    transfer |= {name: x.numpy() for name, x in {
        "weak": u.weak, "tau": s.tau, "is_self": s.is_self, "refined": s.refined,
        "smoothed_weak": s.smoothed_weak,
        **{f"weak/{i}": labels for i, labels in enumerate(prep.supervised.every)},
        **{f"label/{method}": out.labels for method, out in done.items() if out.labels is not None}}.items()}
    return {"seed": prep.seed, "tau": float(s.tau.double().mean()), "tau_rule": s.rule,
            "layer": known[config.route].layer, "l2": known[config.route].probe.l2,
            "supervisors": setup.titles, "trained": len(setup.supervisors) > 0,
            "cross_fitted": float(right.mean()),
            "cross_fitted_error": squared_error(right, [q.group for q in prep.labelled.questions]) ** 0.5,
            "smoothing": s.chosen._asdict(), "smoothing_graph_only": s.chosen_alone._asdict(),
            "homophily": homophily, "truth_used": truth_used(setup, prep),
            "weights": {method: out.weights for method, out in done.items()},
            "n": {name: len(getattr(prep, name).items) for name in ("labelled", "transfer", "test")},
            "transfer": transfer, "test": test,
            "texts": {"question_id": [item.question_id for item in u.items],
                      "text": [item.text for item in u.items],
                      "candidate": [q.options[item.option] for item, q in zip(u.items, u.questions)]}}


def model_of(start) -> dict:
    """What result.json says of a model; start: selw2s.Pretrained."""
    return {"sha256": start.sha256, "revision": start.network.revision, "lr": start.lr,
            "epochs": start.epochs}


def result_of(setup, counts: dict, runs: list[dict], analysis, seconds: float) -> dict:
    """What result.json holds; setup: selw2s.Setup; runs: one per seed (selw2s.record)."""
    config, task, stages = setup.config, setup.task, setup.stages
    gpu = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else None
    return {
        "schema": SCHEMA, "command": command(config),
        "config": asdict(config), "code": sources(),
        "data": {"name": task.name, "sha256": task.sha256, "train": len(task.train), "test": len(task.test),
                 **counts},
        "models": {"weak": [model_of(s.model) for s in setup.supervisors if not s.order],
                   "strong": model_of(setup.strong)},
        "env": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "device": config.device, "gpu": gpu, "threads": torch.get_num_threads(),
                "world_size": many.size()},
        "stages": stages.log, "seconds": round(seconds, 2), **measured(runs, config.methods),
        "analysis": analysis, "finished": True}


def command(config) -> str:
    """The command line that gives this selw2s.Config: the flags that are not at their default."""
    words = ["torchrun", "--nproc-per-node", str(many.size())] if many.size() > 1 else ["python"]
    words.append("selw2s.py")
    for f in fields(config):
        value = getattr(config, f.name)
        if value != f.default:
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + f.name.replace("_", "-"), *map(str, values)]
    return shlex.join(words)


def measured(runs: list[dict], methods) -> dict:
    """The parts of a result that follow from the seeds' arrays."""
    seeds = []
    for r in runs:
        choices = {name: value for name, value in r.items() if name not in ("transfer", "test", "texts")}
        seeds.append(choices | {"diagnostics": diagnose(r, methods)})
    return {"metrics": summarise(runs, methods), "seeds": seeds}


def write_items(result: dict, runs: list[dict], out: str) -> Path:
    """items.npz and labels.jsonl in <out>/<task>/<run id>/; returns that folder."""
    identity = {k: v for k, v in result["config"].items() if k not in ("out", "data_dir")}
    models = [model["sha256"] for model in (*result["models"]["weak"], result["models"]["strong"])]
    run_id = digest(identity, result["data"]["sha256"], models, result["code"], result["env"])[:12]
    folder = Path(out) / result["data"]["name"] / run_id
    arrays = {f"seed{r['seed']}/{part}/{name}": array
              for r in runs for part in ("transfer", "test") for name, array in r[part].items()}
    items = io.BytesIO()
    np.savez_compressed(items, **arrays)
    lines = [json.dumps(row) + "\n" for r in runs for row in label_rows(r)]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "items.npz", lambda temporary: temporary.write_bytes(items.getvalue()))
    write_whole(folder / "labels.jsonl", lambda temporary: temporary.write_text("".join(lines), "utf-8"))
    return folder


def write_result(result: dict, folder: Path) -> None:
    """result.json, a run's last file: where it stands the others do."""
    text = json.dumps(result, indent=1, allow_nan=False)
    write_whole(folder / "result.json", lambda temporary: temporary.write_text(text, "utf-8"))


def recorded(path: str) -> dict:
    """A result.json; DataError if it is none, or of another version of this program."""
    try:
        result = json.loads(Path(path).read_text("utf-8"))
        missing = [key for key in ("config", "metrics", "analysis", *INPUTS) if key not in result]
        if missing:
            raise ValueError(f"without {missing[0]}")
        if result.get("schema") != SCHEMA:
            raise ValueError(f"schema {result.get('schema')!r:.20}, this program's is {SCHEMA}")
        for value in (result["config"], result["metrics"]["methods"]):
            dict(value.items())     # AttributeError if it is none
        return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a result.json of this program ({error})") from None


INPUTS = ("code", "data", "models", "env")      # what a result depends on beside its configuration


def compared(old: dict, new: dict, path: str) -> str:
    """What a run repeated came to; DataError naming what came out differently, and what differs of the inputs
    (code, data, models, environment), where to look."""
    new = json.loads(json.dumps(new))
    before, after = old["metrics"]["methods"], new["metrics"]["methods"]
    moved = [part for part in INPUTS if old[part] != new[part]]
    differ = [name for name in after | before if before.get(name) != after.get(name)]
    if old["analysis"] != new["analysis"]:
        differ.append("the analysis")
    if differ:
        raise DataError(f"not the same as {path}: {', '.join(differ)}; "
                        f"differing inputs: {', '.join(moved) or 'none'}")
    remark = f", though {', '.join(moved)} differ" if moved else ""
    return f"the same as {path} in every method's metrics and weights{remark}"


def read_run(path: str) -> tuple[dict, list[dict]]:
    """A result.json and its seeds' arrays and texts from items.npz and labels.jsonl beside it; DataError."""
    result = recorded(path)
    try:
        runs = [dict(seed, transfer={}, test={}) for seed in result["seeds"]]
        with np.load(Path(path).with_name("items.npz"), allow_pickle=False) as arrays:
            for run in runs:
                for key in arrays.files:
                    seed, part, name = key.split("/", 2)
                    if seed == f"seed{run['seed']}":
                        run[part][name] = arrays[key]
        with open(Path(path).with_name("labels.jsonl"), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for run in runs:
            run["texts"] = {key: [row[key] for row in rows if row["seed"] == run["seed"]] for key in TEXTS}
            del run["diagnostics"]
            for method in result["config"]["methods"]:
                run["test"][f"p/{method}"]      # KeyError: items.npz is of another run
        return result, runs
    except Exception as error:      # NumPy's reader raises a dozen kinds on a damaged file
        raise DataError(f"{path}: not a result.json of this program with its items.npz and labels.jsonl "
                        f"beside it ({error})") from None


FREE = ("out", "data_dir", "rerun", "merge", "seeds", "keep")        # what merged runs may differ in


def merged(paths) -> tuple[dict, list[dict]]:
    """One result of several runs that differ in their seeds alone, and the seeds' arrays; DataError naming
    what else differs."""
    first, runs = read_run(paths[0])
    stages, commands, seconds = list(first["stages"]), [first["command"]], first["seconds"]
    analysis = first["analysis"] or {}      # {title: a row per seed}
    for path in paths[1:]:
        other, more = read_run(path)
        a, b = ({**{key: r[key] for key in ("code", "data", "models")}, "analysis": list(r["analysis"] or ())}
                | {f"--{k}": v for k, v in r["config"].items() if k not in FREE} for r in (first, other))
        if differ := [name for name in a | b if a.get(name) != b.get(name)]:
            raise DataError(f"{path}: differs from {paths[0]} in {', '.join(differ)}; only seeds may")
        if both := {run["seed"] for run in runs} & {run["seed"] for run in more}:
            raise DataError(f"{path}: has seed {min(both)} too; give each seed once")
        runs += more
        analysis = {title: rows + other["analysis"][title] for title, rows in analysis.items()}
        stages += other["stages"]
        commands.append(other["command"])
        seconds += other["seconds"]
    for rows in (runs, *analysis.values()):
        rows.sort(key=lambda row: row["seed"])
    config = first["config"] | {"seeds": [run["seed"] for run in runs]}
    both = measured(runs, config["methods"]) | {"analysis": analysis or None, "seconds": round(seconds, 2)}
    return first | {"command": "; ".join(commands), "config": config, "stages": stages, **both}, runs
