"""Which view of D_l predicts best what smoothing will do on D_u [D6]: label accuracy of D_u after the choice.

    python tests/bench_smoothing.py --task demo-sciq --seeds 0 1 2 3 4 5          the flags of selw2s.py

Weak labels are smoothed alone (as in graph-only). Each view chooses alpha, k and the layer on D_l:
    fold          a graph per fold of D_l: labels of one supervisor, but a fifth of the density
    fold, k/5     the same, k divided by the number of folds: the same neighbourhood
    all           one graph of D_l: the density, but labels of several supervisors, some of which saw the
                  neighbours' truth
    fold + D_u    a graph per fold, of it and D_u, labelled by that fold's supervisor: what selw2s.py does
Beside them: no smoothing, and the best of the grid on D_u, which nobody can choose. A JSON line per seed;
data/results/smoothing_choice.json keeps them.
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import selw2s
from data.cache import Stages
from data.results.metrics import accuracy, hidden_truth


def d_l_views(prep, by_fold: bool) -> list:
    """Graphs of D_l alone: one per fold, or one of all."""
    learn, out, numbers = prep.learn, [], {}
    group = torch.tensor([numbers.setdefault(q.group, len(numbers)) for q in learn.questions])
    for f in learn.fold.unique() if by_fold else [None]:
        at = torch.ones(len(learn.fold), dtype=torch.bool) if f is None else learn.fold == f
        scored = torch.ones(int(at.sum()), dtype=torch.bool)
        near = [selw2s.neighbours(states, max(selw2s.KS)) for states in learn.item_state[at].unbind(1)]
        out.append(selw2s.View(near, learn.weak[at], learn.truth[at], scored, group[at]))
    return out


def best_on_transfer(prep, config) -> float:
    """Label accuracy of the best candidate of the grid on D_u itself."""
    truth, transfer = hidden_truth(prep.transfer), prep.transfer
    found = [accuracy(transfer.weak, truth)]
    for states in transfer.item_state.unbind(1):
        near = selw2s.neighbours(states, max(selw2s.KS))
        grid = selw2s.smooth_grid(near, transfer.weak, selw2s.ALPHAS, selw2s.KS, config.gamma)
        found += [accuracy(p, truth) for p in grid.values()]
    return max(found)


def measure(prep, config) -> dict:
    """{view: label accuracy of D_u after its choice, and the choice}."""
    truth, transfer = hidden_truth(prep.transfer), prep.transfer
    folds, ks = len(prep.supervised.by_fold), selw2s.KS
    chosen = {"fold": selw2s.choose_smoothing(d_l_views(prep, True), config),
              "all": selw2s.choose_smoothing(d_l_views(prep, False), config),
              "fold + D_u": selw2s.choose_smoothing(selw2s.views(prep, config), config)}
    selw2s.KS = tuple(max(1, round(k / folds)) for k in ks)
    near = selw2s.choose_smoothing(d_l_views(prep, True), config)
    chosen["fold, k/5"] = near._replace(k=ks[selw2s.KS.index(near.k)])
    selw2s.KS = ks
    out = {"none": {"accuracy": accuracy(transfer.weak, truth)},
           "best": {"accuracy": best_on_transfer(prep, config)}}
    for view, c in chosen.items():
        p = selw2s.smooth(transfer.item_state[:, c.layer], transfer.weak, c.alpha, c.k, config.gamma)
        out[view] = {"accuracy": accuracy(p, truth), **c._asdict()}
    return out


def main() -> None:
    config = selw2s.parse()
    (setup, _), rows = selw2s.set_up(config, Stages(Path(config.out) / "cache", print, config.device)), []
    for seed in config.seeds:
        prep = selw2s.prepare(setup, seed)
        rows.append({"task": setup.task.name, "seed": seed, "folds": config.folds, **measure(prep, config)})
        print(json.dumps(rows[-1]), flush=True)
    views = [key for key in rows[0] if key not in ("task", "seed", "folds")]
    means = [f"{view} {sum(row[view]['accuracy'] for row in rows) / len(rows):.3f}" for view in views]
    print(f"{setup.task.name}: {', '.join(means)}")


if __name__ == "__main__":
    main()
