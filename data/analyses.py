"""What P(IK) does beyond one task: --analysis cross-task, difficulty, sweep (paper, abstract).

Every function takes method, the module selw2s itself: a script cannot be imported by what it imports.
"""
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from data import DEMO, OFFICIAL, load_task
from data.report import accuracy, auroc, ece


def student(method, config, prep, p_ik, strong, seed: int, stages, name: str = "selective") -> dict:
    """One student on prep's data with the given p_ik (N,), and what went into it: metrics of an analysis."""
    s = method.select(config, prep, p_ik)
    only = replace(config, methods=(name,), keep="")
    labels, out, _ = method.students(only, prep, s, p_ik, strong, seed, stages, lambda line: None)[name]
    U, truth = prep.D_u, method.all_truth(prep)
    right = method.judged_right(config, prep)
    return {"seed": seed, "auroc": auroc(p_ik[U], right[U]), "ece": ece(p_ik[U], right[U]), "tau": s.tau,
            "coverage": float(s.is_self.double().mean()), "label_accuracy": accuracy(labels, truth[U]),
            "homophily": method.homophily(prep, s.chosen_alone),
            "accuracy": accuracy(out[prep.n_u:], truth[prep.n_l + prep.n_u:])}


def cross_task(method, config, tasks: dict, weak, strong, stages, tell) -> dict:
    """P(IK) from one task's D_l used on each one's D_u (paper, abstract): {"A -> B": [metrics per seed]}."""
    out = {}
    for seed in config.seeds:
        prepared = {name: method.prepare(config if name == config.task else replace(config, keep=""), task,
                                         weak, strong, seed, stages, tell) for name, task in tasks.items()}
        known = {name: method.know(config, prep) for name, prep in prepared.items()}
        for (a, of_a), (b, prep) in product(known.items(), prepared.items()):
            p_ik = of_a.p_ik if a == b else of_a.probe.predict(prep.prompt[:, of_a.layer]).float()
            metrics = student(method, config, prep, p_ik, strong, seed, stages)
            out.setdefault(f"{a} -> {b}", []).append(metrics)
    return out


def difficulty(method, config, tasks: dict, weak, strong, stages, tell) -> dict:
    """P(IK) trained on the easy or hard half of D_l, measured on both halves of D_u (paper, abstract).

    Difficulty: cross-entropy of the weak supervisor (on D_l cross-fitted) or -log p_strong(gold)."""
    out = {}
    for seed in config.seeds:
        prep = method.prepare(config, tasks[config.task], weak, strong, seed, stages, tell)
        truth, U = method.all_truth(prep), prep.D_u
        guess, gold = torch.cat([prep.cross, prep.weak]), method.answers(config, prep.rows, prep.questions)
        p_gold = {"weak": torch.where(truth > 0.5, guess, 1 - guess),
                  "strong": prep.belief.gather(1, gold[:, None])[:, 0]}[config.difficulty]
        easy = {part: x.argsort(stable=True).argsort() >= (len(x) + 1) // 2    # by rank: p may be 1 for most
                for part, x in (("L", p_gold[:prep.n_l]), ("U", p_gold[U]))}
        right = method.judged_right(config, prep)[U]
        for name, rows in (("all", None), ("easy", easy["L"]), ("hard", ~easy["L"])):
            p_ik = method.know(config, prep, rows).p_ik
            metrics = student(method, config, prep, p_ik, strong, seed, stages)
            for part, at in (("easy", easy["U"]), ("hard", ~easy["U"])):
                metrics[f"auroc_on_{part}"] = auroc(p_ik[U][at], right[at])
                metrics[f"ece_on_{part}"] = ece(p_ik[U][at], right[at])
            out.setdefault(f"trained on {name}", []).append(metrics)
    return out


def sweep(method, config, tasks: dict, weak, strong, stages, tell) -> dict:
    """Labels and student as tau, alpha, k vary one at a time; read on D_u and test: choose nothing by it.

    The graph's layer is chosen on D_l, so a fixed alpha is not a blind one; alpha is varied once more with
    the graph of the middle layer's states alone."""
    out, alphas = {}, (0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
    for seed in config.seeds:
        prep = method.prepare(config, tasks[config.task], weak, strong, seed, stages, tell)
        p_ik, middle = method.know(config, prep).p_ik, prep._replace(item=prep.item[:, :1])
        for name, flag, values, layers in (
                ("route-only", "tau", (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01), prep),
                ("graph-only", "alpha", alphas, prep), ("graph-only", "k", (5, 10, 20, 50), prep),
                ("graph-only, middle layer", "alpha", (*alphas, "auto"), middle)):
            for value in values:
                other = {"alpha": 0.7} if flag == "k" else {"k": 10} if flag == "alpha" else {}
                varied = replace(config, **other, **{flag: value})
                metrics = student(method, varied, layers, p_ik, strong, seed, stages, name.split(",")[0])
                shown = value if value == "auto" else f"{value:g}"
                out.setdefault(f"{flag} {shown} ({name})", []).append(metrics)
    return out


def analysis_table(name: str, rows: dict[str, list[dict]]) -> str:
    """The means over seeds of every row of an analysis."""
    columns = [c for c in next(iter(rows.values()))[0] if c != "seed"]
    lines = [f"{name:40}" + "".join(f"{c:>16}" for c in columns)]
    for title, metrics in rows.items():
        means = [[m[c] for m in metrics if m[c] is not None] for c in columns]
        lines.append(f"{title:40}" + "".join(f"{np.mean(m):16.3f}" if m else f"{'-':>16}" for m in means))
    return "\n".join(lines)


ANALYSES = {"cross-task": cross_task, "difficulty": difficulty, "sweep": sweep}


def analyse(method, config, task, weak, strong, stages, tell) -> dict:
    """One analysis over all seeds: a printed table of means, the values per seed as the result."""
    tasks = {config.task: task}
    if config.analysis == "cross-task":
        family = DEMO[1:] if config.task in DEMO else OFFICIAL
        tasks = {name: load_task(name, data_dir=config.data_dir or None) for name in family}
        tasks = {name: method.fitted(task, (weak, strong), config, tell)[0] for name, task in tasks.items()}
    out = ANALYSES[config.analysis](method, config, tasks, weak, strong, stages, tell)
    print(f"\n{analysis_table(config.analysis, out)}")
    return out
