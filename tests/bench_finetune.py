"""Learning rate, passes, hard or soft labels of a student, by a fold of D_l, never by test [D9, D20].

    python tests/bench_finetune.py --task sciq --weak pair/smollm2-135m --strong pair/gemma-3-270m \
        --limit 3000 --student answer

The flags are selw2s.py's. A student trains on all folds of D_l but the first and is asked for that one: with
the labels that a run's students get (cross-fitted weak, routed; soft and hard) and with truth. What a run
with the same flags and --out has in its cache is not done again. A JSON line per student;
data/results/finetune.json keeps some.
"""
import json
import shlex
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import selw2s as s
from data.cache import Stages
from data.results.metrics import accuracy, brier

GRID = (1.0, 1), (1.0, 2), (0.5, 1), (2.0, 1)   # part of --lr auto, passes over the training items
FOLD = 0                                        # held out


def measure(setup, seed: int):
    """Accuracy and Brier score on the held fold, of the strong model untouched and of every student tried."""
    prep = s.prepare(setup, seed)
    learn, held, start = prep.learn, prep.learn.fold == FOLD, setup.strong
    rows, truth = (~held).nonzero()[:, 0], learn.truth[held]
    asked, inputs = [learn.inputs[i] for i in held.nonzero()[:, 0]], [learn.inputs[i] for i in rows]
    p_ik = s.know(setup.config, prep, setup.config.route).learn
    _, tau, _ = s.thresholds(setup.config, prep, p_ik)
    routed, _ = s.route(p_ik, learn.own, learn.weak, tau)
    hard = replace(setup.config, labels="hard")
    labels = {"routed": routed, "routed, hard": s.learnt(hard, routed), "weak": learn.weak,
              "weak, hard": s.learnt(hard, learn.weak), "truth": learn.truth}
    about = {"task": setup.task.name, "seed": seed, "trained": len(inputs), "held": len(asked),
             "student": setup.config.student, "tune": setup.config.tune}

    def scores(p):
        return {"accuracy": accuracy(p, truth), "brier": brier(p, truth), **about}
    yield {"labels": "untouched", **scores(learn.zero_shot[held])}
    for (factor, epochs), name in product(GRID, labels):
        tried = setup._replace(strong=start._replace(lr=factor * start.lr, epochs=epochs))
        targets = labels[name][rows]
        out = s.finetuned(f"{name} {factor} {epochs}", tried, tried.strong, inputs, targets, [asked], seed)
        yield {"labels": name, "labels right": accuracy(targets, learn.truth[rows]),
               "lr": tried.strong.lr, "epochs": epochs, **scores(out.p[0])}


def main() -> None:
    config = s.parse()
    setup, _ = s.set_up(config, Stages(Path(config.out) / "cache", print, config.device))
    command = shlex.join(["python", "tests/bench_finetune.py", *sys.argv[1:]])
    for seed in config.seeds:
        for row in measure(setup, seed):
            print(json.dumps({**row, "command": command}), flush=True)


if __name__ == "__main__":
    main()
