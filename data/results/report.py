"""A run's numbers: metrics, intervals, diagnostics, the table; all follow from items.npz, without a model.
Last, how a run is written down.

symbol  name here    meaning                                                     source
PGR     pgr          performance gap recovered, of accuracies on test            Burns et al. 2023, section 3
ECE     ece          expected calibration error, ten bins of equal count         arXiv 1706.04599
AUROC   auroc        P(a positive ranks above a negative), ties half

Shapes: N items, S seeds. p (N,) is a probability of y = 1, y (N,) is 0/1; right is 0/1.
"""
import hashlib
import io
import json
import os
import shlex
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.cache import digest

ROOT = Path(__file__).resolve().parent.parent.parent


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of items with (p > 1/2) = y; p (N,) probability, y (N,) 0/1."""
    return float(((p > 0.5) == (y > 0.5)).double().mean())


def cross_entropy(p: Tensor, y: Tensor) -> float:
    """Mean cross-entropy in nats of p (N,) against y (N,) in [0, 1]; p is kept 1e-12 away from 0 and 1."""
    p = p.double().clamp(1e-12, 1 - 1e-12)
    return float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())


def pgr(weak: float, student: float, ceiling: float) -> float | None:
    """Performance gap recovered, (student - weak) / (ceiling - weak); None unless ceiling > weak."""
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


def auroc(p: Tensor, y: Tensor) -> float | None:
    """P(p of a positive > p of a negative), ties count half (average ranks); None with one class only."""
    y = (y > 0.5).double()
    _, which, count = p.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0)[which]                     # (N,) average rank, from 1
    n1 = float(y.sum())
    n0 = len(y) - n1
    return float((rank * y).sum() - n1 * (n1 + 1) / 2) / (n1 * n0) if n1 and n0 else None


def brier(p: Tensor, y: Tensor) -> float:
    """Mean squared difference of p (N,) and y (N,)."""
    return float(((p - y).double() ** 2).mean())


def reliability(p: Tensor, y: Tensor, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean p, mean y, count) of equal-count bins in increasing p: the reliability diagram."""
    order = p.argsort(stable=True)
    parts = order.tensor_split(bins)
    return [(float(p[b].double().mean()), float(y[b].double().mean()), len(b)) for b in parts if len(b)]


def ece(p: Tensor, y: Tensor, bins: int = 10) -> float:
    """Expected calibration error over equal-count bins: sum of n_b/N |mean p - mean y|."""
    return sum(n * abs(mean_p - mean_y) for mean_p, mean_y, n in reliability(p, y, bins)) / len(p)


def bootstrap(right: np.ndarray, group: np.ndarray, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Paired bootstrap over test items and seeds: right (methods, seeds, N) 0/1, group (N,) -> accuracies
    (draws, methods).

    Items of one group (one passage, one fact in several wordings) are drawn together: they are right or wrong
    together. Every draw resamples groups once for all methods and seeds, and seeds once for all methods, so
    differences of columns are differences on the same items."""
    rng = np.random.default_rng(seed)
    methods, seeds, _ = right.shape
    _, which, size = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((methods, seeds, len(size)))
    np.add.at(sums, (slice(None), slice(None), which), right)
    out = np.empty((draws, methods))
    for i in range(draws):
        weight = np.bincount(rng.integers(len(size), size=len(size)), minlength=len(size))
        out[i] = (sums @ weight)[:, rng.integers(seeds, size=seeds)].mean(1) / (size @ weight)
    return out


def sign_flip(differences: list[float]) -> float:
    """Two-sided sign-flip p-value of per-seed differences; with S seeds it cannot go below 2 / 2^S. Exact up
    to 16 seeds, beyond by 2^16 random flips, to which the one observed counts."""
    d, least = np.asarray(differences), abs(sum(differences)) - 1e-12
    if len(d) <= 16:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
        return float((np.abs(signs @ d) >= least).mean())
    signs = np.random.default_rng(0).choice((-1, 1), (2 ** 16, len(d)))
    return float(((np.abs(signs @ d) >= least).sum() + 1) / (2 ** 16 + 1))


def ratio(part: Tensor, whole: Tensor) -> float | None:
    """Share of `whole` (bool) that is in `part` (bool); None of nothing."""
    return float(part.sum() / whole.sum()) if whole.any() else None


def diagnose(run: dict, methods) -> dict:
    """Everything said about one seed beside the accuracies; recomputable from items.npz alone."""
    u, t = ({k: torch.as_tensor(v) for k, v in run[part].items() if k not in ("id", "group")}
            for part in ("transfer", "test"))
    routed = u["is_self"]
    where = {"all": torch.ones_like(routed), "routed": routed, "unrouted": ~routed}
    labels = {}
    for key in [k for k in u if k in ("own", "weak", "refined", "smoothed_weak") or k.startswith("label/")]:
        labels[key] = {}
        for part, at in where.items():
            labels[key][part] = accuracy(u[key][at], u["truth"][at]) if at.any() else None
    return {"coverage": float(routed.double().mean()), "homophily": run["homophily"], "label_accuracy": labels,
            "p_ik": {part: diagnose_p_ik(arrays["p_ik"], arrays) for part, arrays in (("transfer", u), ("test", t))},
            "routers": diagnose_routers(u, t),
            "methods": {name: diagnose_student(name, t) for name in methods},
            "class_prior": {"transfer": float(u["truth"].mean()), "test": float(t["truth"].mean())}}


def diagnose_routers(transfer: dict[str, Tensor], test: dict[str, Tensor]) -> dict:
    """AUROC, Brier, ECE of P(IK) by every router, and the share of D_u where it is at least tau."""
    out = {}
    for key in [key for key in transfer if key.startswith("p_ik/")]:
        out[key.removeprefix("p_ik/")] = {
            "coverage": float((transfer[key] >= transfer["tau"]).double().mean()),
            **{part: {name: measure(arrays[key], arrays["own_right"])
                      for name, measure in (("auroc", auroc), ("brier", brier), ("ece", ece))}
               for part, arrays in (("transfer", transfer), ("test", test))}}
    return out


def diagnose_p_ik(p: Tensor, part: dict[str, Tensor]) -> dict:
    """How well P(IK) (n,), and the own answer's probability in its place, tell right own answers from wrong."""
    own_p, right = part["own_p"], part["own_right"]
    order = p.argsort(descending=True, stable=True)
    risk = 1 - right[order].double().cumsum(0) / torch.arange(1, len(p) + 1)
    marks = [max(1, len(p) * i // 20) for i in range(1, 21)]
    return {"own_right": float(right.double().mean()), "own_p_auroc": auroc(own_p, right),
            "own_p_ece": ece(own_p, right), "auroc": auroc(p, right), "brier": brier(p, right),
            "ece": ece(p, right), "reliability": reliability(p, right),
            "risk_coverage": [(m / len(p), float(risk[m - 1])) for m in marks]}


def diagnose_student(name: str, t: dict[str, Tensor]) -> dict:
    """Calibration of one method on test, gain and misfit (arXiv 2405.15116), imitation of weak errors; with a
    ceiling, the table of what strong and weak model know."""
    y, weak, s = (t[key].double() for key in ("truth", "p/weak", f"p/{name}"))
    gain, misfit = ((weak - y) ** 2 - (s - y) ** 2).mean(), ((s - weak) ** 2).mean()
    assert abs(gain - misfit - 2 * ((weak - s) * (s - y)).mean()) < 1e-6        # for any s: arXiv 2405.15116
    wrong, sure = (s > 0.5) != (y > 0.5), (s - 0.5).abs() >= 0.25
    doubtful = (weak - 0.5).abs() < 0.25
    imitates = ((weak > 0.5) == (s > 0.5)) & ~doubtful
    row = {"ece": ece(s, y), "brier": brier(s, y), "gain": float(gain), "misfit": float(misfit),
           "confident_wrong_that_imitate_weak": ratio(wrong & sure & imitates, wrong & sure)}
    if "p/ceiling" in t:
        right = (t["p/ceiling"] > 0.5) == (y > 0.5)
        known = right & ((t["p/ceiling"] - 0.5).abs() >= 0.25)
        row["known"] = {}
        for strong, at in (("known", known), ("unknown", ~known)):
            for word, of_weak in (("known", ~doubtful), ("unknown", doubtful)):
                row["known"][f"{strong}-strong {word}-weak"] = {
                    "n": int((at & of_weak).sum()), "accuracy": ratio(~wrong & at & of_weak, at & of_weak)}
        row["errors_strong_knew"] = ratio(wrong & known, wrong)
        row["blind"] = ratio(wrong & known & doubtful, wrong & right)
    return row


def right_by_method(runs: list[dict], methods) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong (methods, seeds, N) 0/1 and group (N,) of the test questions, joined by question id."""
    asked = [np.array([name.rsplit("/", 1)[0] for name in r["test"]["id"].tolist()]) for r in runs]
    order = [np.argsort(ids, kind="stable") for ids in asked]   # another seed may show another candidate, in
    assert all(np.array_equal(ids[o], asked[0][order[0]]) for ids, o in zip(asked, order))  # another place
    right = np.array([[((r["test"][f"p/{m}"] > 0.5) == (r["test"]["truth"] > 0.5))[o]
                       for r, o in zip(runs, order)] for m in methods], float)
    return right, runs[0]["test"]["group"][order[0]]


def interval(draws: np.ndarray) -> list[float]:
    """95 % interval of bootstrap draws."""
    return [float(q) for q in np.percentile(draws, [2.5, 97.5])]


def pgr_interval(rise: np.ndarray, gap: np.ndarray) -> list[float] | None:
    """95 % interval of rise / gap over draws; a draw without a gap counts as +-infinite."""
    span = interval(np.where(gap > 0, rise / np.where(gap > 0, gap, 1), np.copysign(np.inf, rise)))
    return span if np.isfinite(span).all() else None


def mean_label_accuracy(runs: list[dict], method: str) -> float | None:
    """Mean over seeds of the share of a method's training labels that agree with the truth of D_u."""
    found = [accuracy(*map(torch.as_tensor, (r["transfer"][f"label/{method}"], r["transfer"]["truth"])))
             for r in runs if f"label/{method}" in r["transfer"]]
    return float(np.mean(found)) if found else None


def supervisor_views(runs: list[dict]) -> dict:
    """The weak supervisor as D_l's cross-fitted labels show it and as it is on D_u: mean accuracies over seeds,
    and the difference in standard errors of its mean over items and seeds."""
    seen, real = [r["cross_fitted"] for r in runs], []
    variance = 0.0
    for r in runs:
        real.append(accuracy(*(torch.as_tensor(r["transfer"][key]) for key in ("weak", "truth"))))
        variance += seen[len(real) - 1] * (1 - seen[len(real) - 1]) / r["n"]["labelled"]
        variance += real[-1] * (1 - real[-1]) / r["n"]["transfer"]
    seen, real = float(np.mean(seen)), float(np.mean(real))
    se = variance ** 0.5 / len(runs)
    return {"cross_fitted": seen, "actual": real, "standard_errors": (seen - real) / se if se else 0.0}


def summarise(runs: list[dict], methods) -> dict:
    """Accuracy, PGR, differences to naive and to the untouched strong model per method; 95 % intervals: paired
    bootstrap, items and seeds."""
    right, group = right_by_method(runs, methods)
    draws = dict(zip(methods, bootstrap(right, group).T))       # (draws,) per method
    mean, per_seed = dict(zip(methods, right.mean((1, 2)))), dict(zip(methods, right.mean(2)))
    gap, size, defined = None, None, False
    if "weak" in mean and "ceiling" in mean:
        gap, size = draws["ceiling"] - draws["weak"], mean["ceiling"] - mean["weak"]
        defined = bool(size > 2 * gap.std())
    out = {}
    for m in methods:
        row = {"accuracy": float(mean[m]), "ci95": interval(draws[m]), "per_seed": per_seed[m].tolist(),
               "ground_truth_labels": max(r["truth_used"].get(m, r["n"]["labelled"]) for r in runs),
               "pgr": None, "pgr_ci95": None, "attainable": m != "oracle",
               "weights": [r["weights"][m] for r in runs], "label_accuracy": mean_label_accuracy(runs, m)}
        if defined and m not in ("weak", "ceiling"):
            row["pgr"] = pgr(mean["weak"], mean[m], mean["ceiling"])
            row["pgr_ci95"] = pgr_interval(draws[m] - draws["weak"], gap)
        for other in ("naive", "zero-shot"):
            if other in mean and m != other:
                difference = per_seed[m] - per_seed[other]
                row[f"minus_{other}"] = {
                    "mean": float(difference.mean()), "ci95": interval(draws[m] - draws[other]),
                    "sign_flip_p": sign_flip(difference), "smallest_p": 2 / 2 ** len(runs)}
        out[m] = row
    prior = float(np.mean([r["test"]["truth"].mean() for r in runs]))
    return {"methods": out, "supervisor": supervisor_views(runs), "class_prior": prior, "majority": max(prior, 1 - prior),
            "test_items": right.shape[2], "test_groups": len(set(group.tolist())), "seeds": len(runs),
            "pgr_defined": None if gap is None else defined,
            "gap": None if gap is None else {"mean": float(size), "se": float(gap.std())}}


def shown(value: float | None, form: str) -> str:
    """A number of the table, "-" where there is none."""
    return "-" if value is None else format(value, form)


def span(ci: list[float] | None) -> str:
    """An interval of the table."""
    return f"[{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "-"


def table(metrics: dict) -> str:
    """The final table, one row per method."""
    lines = [f"{'method':16}{'accuracy':>9}  {'95 % interval':16} {'PGR':>6}  {'95 % interval':17}{'- naive':>8}  "
             f"{'95 % interval':17}{'- zero-shot':>12}{'labels right':>13}{'truth used':>11}"]
    none = {"mean": None, "ci95": None}
    for name, r in metrics["methods"].items():
        naive, untouched = r.get("minus_naive", none), r.get("minus_zero-shot", none)
        title = name if r["attainable"] else name + " *"
        lines.append(f"{title:16}{r['accuracy']:9.3f}  {span(r['ci95']):16} {shown(r['pgr'], '.2f'):>6}  "
                     f"{span(r['pgr_ci95']):17}{shown(naive['mean'], '+.3f'):>8}  {span(naive['ci95']):17}"
                     f"{shown(untouched['mean'], '+.3f'):>12}{shown(r['label_accuracy'], '.3f'):>13}"
                     f"{r['ground_truth_labels']:>11,}")
    return "\n".join([*lines, *remarks(metrics)])


def remarks(metrics: dict) -> list[str]:
    """What has to be known to read the table."""
    n, groups = metrics["test_items"], metrics["test_groups"]
    lines = [f"test: {n:,} items, majority class {metrics['majority']:.3f}; intervals: paired bootstrap over "
             f"{groups:,} groups of items"]
    if metrics["seeds"] > 1:
        lines[0] += " and over seeds"
    if "oracle" in metrics["methods"]:
        lines[0] += "; * knows the hidden truth: not attainable"
    view = metrics["supervisor"]
    lines.append(f"weak supervisor: {view['cross_fitted']:.3f} right on D_l, cross-fitted; {view['actual']:.3f} on D_u")
    if abs(view["standard_errors"]) > 3:
        lines.append(f"WARNING: these differ by {abs(view['standard_errors']):.1f} standard errors: what was chosen on "
                     "D_l was chosen for another supervisor; use more --folds")
    if metrics["pgr_defined"] is False:
        gap = metrics["gap"]
        lines.append(f"PGR undefined: the ceiling is {gap['mean']:+.3f} from the weak model, "
                     f"under 2 standard errors ({gap['se']:.3f})")
    return lines


def mean_of(rows: list[dict], key: str) -> float:
    """Mean over seeds of those that have the number."""
    return float(np.mean([row[key] for row in rows if row[key] is not None] or [np.nan]))


def sources() -> dict[str, str]:
    """SHA-256 of every source file of the program."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/results/*.py")])
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def result_of(config, task, counts: dict, models: dict, stages, runs: list[dict], analysis, seconds: float) -> dict:
    """What result.json holds. models: weak and strong; runs: one per seed (selw2s.record)."""
    gpu = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else None
    return {
        "schema": 2, "command": shlex.join(["python", "selw2s.py", *sys.argv[1:]]), "config": asdict(config),
        "code": sources(),
        "data": {"name": task.name, "sha256": task.sha256, "train": len(task.train), "test": len(task.test),
                 **counts},
        "models": {name: {"sha256": model.sha256, "revision": model.network.revision, "lr": model.lr}
                   for name, model in models.items()},
        "env": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                "device": config.device, "gpu": gpu, "threads": torch.get_num_threads()},
        "stages": stages.log, "seconds": round(seconds, 2), **measured(runs, config.methods),
        "analysis": analysis, "finished": True}


def measured(runs: list[dict], methods) -> dict:
    """The parts of a result that follow from the seeds' arrays."""
    seeds = []
    for r in runs:
        choices = {name: value for name, value in r.items() if name not in ("transfer", "test")}
        seeds.append(choices | {"diagnostics": diagnose(r, methods)})
    return {"metrics": summarise(runs, methods), "seeds": seeds}


def write(result: dict, runs: list[dict], out: str) -> Path:
    """<out>/<task>/<run id>/items.npz, then result.json, each under a temporary name first: a result.json is
    always a whole one. Returns the folder."""
    identity = {k: v for k, v in result["config"].items() if k not in ("out", "data_dir")}
    models = [model["sha256"] for model in result["models"].values()]
    run_id = digest(identity, result["data"]["sha256"], models, result["code"])[:12]
    folder = Path(out) / result["data"]["name"] / run_id
    arrays = {f"seed{r['seed']}/{part}/{name}": array
              for r in runs for part in ("transfer", "test") for name, array in r[part].items()}
    items = io.BytesIO()
    np.savez_compressed(items, **arrays)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "items.npz", items.getvalue())
    replace_file(folder / "result.json", json.dumps(result, indent=1, allow_nan=False).encode())
    return folder


def read_run(path: str) -> tuple[dict, list[dict]]:
    """A result.json and its seeds' arrays from the items.npz beside it; DataError."""
    try:
        result = json.loads(Path(path).read_text("utf-8"))
        runs = [dict(seed, transfer={}, test={}) for seed in result["seeds"]]
        with np.load(Path(path).with_name("items.npz"), allow_pickle=False) as arrays:
            for run in runs:
                for key in arrays.files:
                    seed, part, name = key.split("/", 2)
                    if seed == f"seed{run['seed']}":
                        run[part][name] = arrays[key]
        for run in runs:
            del run["diagnostics"]
        return result, runs
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a result.json of this program with its items.npz beside it ({error})") from None


FREE = ("out", "data_dir", "rerun", "merge", "seeds", "keep")        # what merged runs may differ in


def merged(paths) -> tuple[dict, list[dict]]:
    """One result of several runs that differ in their seeds alone, and the seeds' arrays; DataError naming what
    else differs."""
    first, runs = read_run(paths[0])
    stages, commands, seconds = list(first["stages"]), [first["command"]], first["seconds"]
    for path in paths[1:]:
        other, more = read_run(path)
        a, b = ({"code": r["code"], "data": r["data"], "models": r["models"], "analysis": r["analysis"]}
                | {f"--{k}": v for k, v in r["config"].items() if k not in FREE} for r in (first, other))
        if differ := [name for name in a | b if a.get(name) != b.get(name)]:
            raise DataError(f"{path}: differs from {paths[0]} in {', '.join(differ)}; only seeds may")
        if both := {run["seed"] for run in runs} & {run["seed"] for run in more}:
            raise DataError(f"{path}: has seed {min(both)} too; give each seed once")
        runs += more
        stages += other["stages"]
        commands.append(other["command"])
        seconds += other["seconds"]
    runs.sort(key=lambda run: run["seed"])
    config = first["config"] | {"seeds": [run["seed"] for run in runs]}
    return first | {"command": "; ".join(commands), "config": config, "stages": stages, "seconds": round(seconds, 2),
                    **measured(runs, config["methods"])}, runs


def replace_file(path: Path, content: bytes) -> None:
    """The file whole, or as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
