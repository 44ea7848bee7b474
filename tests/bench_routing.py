"""Which router and which rule of tau give the most right labels of D_u [D4, D18], beside what D_l says of it.

    python tests/bench_routing.py --task sciq --weak pair/smollm2-135m --strong pair/gemma-3-270m --limit 3000

The flags are selw2s.py's. What a run with the same flags and --out has in its cache is not done again; no
student is trained. A JSON line per seed; data/results/routing.json keeps some.
"""
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import selw2s as s
from data.cache import Stages
from data.results.metrics import accuracy, auroc, hidden_truth, own_right


def measure(setup, seed: int) -> dict:
    """Labels right on D_u, and on D_l by held-out P(IK) and cross-fitted weak labels, by router and rule."""
    config, prep = setup.config, s.prepare(setup, seed)
    learn, transfer = prep.learn, prep.transfer
    truth, out = hidden_truth(transfer), {}
    for router in s.ROUTERS:
        known = s.know(config, prep, router)
        rows = {}
        for rule in s.TAU_RULES:
            _, of_learn, of_transfer = s.thresholds(replace(config, tau=rule), prep, known.learn)
            seen, _ = s.route(known.learn, learn.own, learn.weak, of_learn)
            labels, is_self = s.route(known.transfer, transfer.own, transfer.weak, of_transfer)
            rows[rule] = {"coverage": float(is_self.double().mean()), "on D_l": accuracy(seen, learn.truth),
                          "on D_u": accuracy(labels, truth)}
        out[router] = {"auroc": auroc(known.transfer, own_right(config, transfer)), "rules": rows,
                       "fused": accuracy(s.fused(prep, known.learn, known.transfer), truth)}
    return {"weak": accuracy(transfer.weak, truth), "cross_fitted": accuracy(learn.weak, learn.truth),
            "own": accuracy(transfer.own, truth), "zero-shot": accuracy(transfer.zero_shot, truth),
            "routers": out}


def main() -> None:
    config = s.parse()
    setup, _ = s.set_up(config, Stages(Path(config.out) / "cache", print, config.device))
    command = shlex.join(["python", "tests/bench_routing.py", *sys.argv[1:]])
    for seed in config.seeds:
        row = {"task": setup.task.name, "seed": seed, "command": command, **measure(setup, seed)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
