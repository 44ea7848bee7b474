"""Selective weak-to-strong generalization (Lang, Huang, Li; AAAI 2026; arXiv 2511.14166): the whole method.

A weak model labels data. A strong pretrained model answers for itself the questions that it probably knows,
P(IK), takes the weak labels, smoothed over a graph, on the others, and is finetuned on the result. This file
reads in that order: Config and command line, steps 1 to 7 in the paper's order, run(), which calls them and
reports, step 8, and last the related systems' labels. model.py is the network, graph.py the graph, data/ the
questions, data/results/ the numbers.

symbol      name here    shape         source
D_l         labelled     n_l items     half with ground truth                     Burns et al. 2023, App. A
D_u         transfer     n_u items     half whose truth only metrics, ceiling and oracle read, once its items
                                       are drawn (that balances the classes, as the benchmark does [D12])
p_w         weak         (n,)          weak supervisor's P(y = 1), soft           Burns et al. 2023
            own          (n,) 0/1      self-generated label                       paper, abstract
P(IK)       p_ik         (n,)          P(own answer is right | question)          Kadavath et al. 2022
tau         tau          float         own label iff P(IK) >= tau                 [D4]
S, F        graph.py                   smoothing of the weak labels               Zhou et al. 2004
PGR         pgr          float         (student - weak) / (ceiling - weak)        Burns et al. 2023

Shapes: n items of one part (one item per question), K options, R hidden states read per text, C width;
float32 unless said, probes float64. [D..] marks the line that takes a choice which the paper leaves open: the
README's table lists them, with their flags.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field, fields, replace

# ------------------------------------------------------------------------------------ Config and command line
ALWAYS = ("weak", "zero-shot")      # without training a student: rows of every run
METHODS = (*ALWAYS, "ceiling", "naive", "logconf", "product", "confidence-only", "self-only", "strong-on-D_l",
           "graph-only", "route-only", "selective", "fused", "trust", "ensemble", "raven", "two-stage",
           "label-model", "debate", "chain", "oracle")
DEFAULT_METHODS = (*ALWAYS, "ceiling", "naive", "self-only", "strong-on-D_l", "graph-only", "route-only",
                   "selective")
ROUTERS = ("probe", "belief", "both")
TAU_RULES = ("answers", "labels", "item")
EXAMPLES = """examples:
  python selw2s.py --task demo                                        under a minute on two cores, no download
  python selw2s.py --task demo --methods all --seeds 0 1 2 3 4 5      every control, six seeds: minutes
  python selw2s.py --task sciq --weak openai-community/gpt2 --strong openai-community/gpt2-large --device cuda
"""


def flag(default, help: str, **kwargs):
    """A field of Config that is a flag of the command line; kwargs as argparse takes them."""
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. Type object: a number, or a word."""
    task: str = flag("demo", "demo (= demo-sciq), demo-boolq, demo-cosmosqa (synthetic, with their own two "
                             "models), sciq, boolq, cosmosqa, or FILE.jsonl")
    weak: tuple = flag((), "weak model, or several: directory or hub id (the demo tasks bring their own)",
                       nargs="+", metavar="MODEL")
    strong: str = flag("", "strong pretrained model: directory or hub id", metavar="MODEL")
    weak_seeds: int = flag(1, "finetune each weak model K times, each in another order of items", metavar="K")
    methods: tuple = flag(DEFAULT_METHODS, "all, or some of: " + " ".join(METHODS), nargs="+",
                          metavar="METHOD", choices=METHODS + ("all",))
    seeds: tuple = flag((0,), "one run each: halves, training order", nargs="+", type=int, metavar="SEED")
    protocol: str = flag("paper", "balanced items and halves disjoint by passage, or OpenAI's code's [D12]",
                         choices=("paper", "openai"))
    folds: int = flag(5, "parts of D_l, each labelled by a supervisor trained on the others [D16]",
                      metavar="N")
    shots: int = flag(0, "solved examples from D_l before what the strong model answers [D2]", metavar="N")
    own: str = flag("sum", "own answer by log-likelihood: sum, per token, less unconditional; judged [D1]",
                    choices=("sum", "mean", "pmi", "judge"))
    target: str = flag("hard", "what P(IK) is trained on: answer right or not, or p(gold) [D3]",
                       choices=("hard", "soft"))
    route: str = flag("probe", "P(IK) from the hidden state, the sorted option probabilities, or both [D18]",
                      choices=ROUTERS)
    tau: object = flag("auto", "P(IK) from which the own label is used: a number, or by a rule: answers, "
                               "labels, item; auto: the best of these on D_l [D4]", metavar="X")
    anchors: int = flag(1, "1: own labels are the prior of their nodes in smoothing, 0: the weak ones [D5]",
                        choices=(0, 1))
    alpha: object = flag("auto", "smoothing, 0 = off; auto: chosen on D_l [D6]", metavar="X")
    k: object = flag("auto", "neighbours; auto: chosen on D_l [D6]", metavar="N")
    gamma: float = flag(3.0, "exponent of the affinity, max(0, cosine)^gamma [D15]", metavar="X")
    student: str = flag("classifier", "a linear head, or the model's own answer: softmax of options [D17]",
                        choices=("classifier", "answer"))
    labels: str = flag("auto", "P(y = 1), or the likelier class; auto: hard for a student that answers [D20]",
                       choices=("auto", "soft", "hard"))
    tune: str = flag("full", "what finetuning trains; head: on states that are read once for all",
                     choices=("full", "lora", "head"))
    epochs: object = flag("auto", "passes over the training items; auto: 2, of a student that answers 1 [D9]",
                          metavar="N")
    batch: int = flag(32, "items per update", metavar="N")
    lr: object = flag("auto", "learning rate; auto: by size of the model [D9]", metavar="X")
    analysis: str = flag("", "P(IK) across tasks, difficulties; tau, alpha, k varied; what weak models lack",
                         choices=("cross-task", "difficulty", "sweep", "representation"))
    difficulty: str = flag("weak", "whose loss makes an item hard in --analysis difficulty",
                           choices=("weak", "strong"))
    keep: str = flag("", "save this method's students in Hugging Face layout under <out>/students",
                     choices=tuple(m for m in METHODS if m != "zero-shot"), metavar="METHOD")
    limit: int = flag(0, "at most this many train and this many test questions (0: all)", metavar="N")
    device: str = flag("cpu", "cpu, cuda, cuda:1 ...")
    dtype: str = flag("float32", "dtype of the pretrained weights",
                      choices=("float32", "bfloat16", "float16"))
    data_dir: str = flag("", "official files (default $SELW2S_DATA, then ~/.cache/selw2s)", metavar="DIR")
    spread: int = flag(0, "1: several processes (torchrun) share out the pretrained weights too",
                       choices=(0, 1))
    offload: int = flag(0, "1: several processes keep masters and moments in the CPU's memory",
                       choices=(0, 1))
    merge: tuple = flag((), "one table of runs that differ in their seeds alone: their result.json files",
                        nargs="+", metavar="FILE")
    plan: int = flag(0, "print operations, memory and hours of the run, on one device or N, by config.json, "
                        "tokenizer and data alone", nargs="?", const=1, metavar="N")
    rerun: str = flag("", "repeat the run of a result.json and compare", metavar="FILE")
    out: str = flag("runs", "results and the stage cache go here", metavar="DIR")


MOST = 2 ** 31 - 1
LIMITS = {      # flag: least value, greatest, what it must be (NaN compares false with both)
    "folds": (2, MOST, "a whole number from 2"),
    "tau": (0, 1e9, f"{', '.join(TAU_RULES)} or a number from 0 (above 1: never the own label)"),
    "alpha": (0, 1 - 1e-9, "a number from 0 to below 1"),
    "gamma": (0, 1e9, "a number from 0"),
    "lr": (1e-300, 1e300, "a positive number"),
    "k": (1, MOST, "a whole number from 1"),
    "weak_seeds": (1, 1000, "a whole number from 1 to 1000"),
    **dict.fromkeys(("epochs", "batch"), (1, MOST, f"a whole number from 1 to {MOST}")),
    **dict.fromkeys(("shots", "limit", "plan"), (0, MOST, f"a whole number from 0 to {MOST}"))}


def number(text: str):
    """A word, an int or a float: the value of an "auto" flag; argparse shows this name."""
    if text in ("auto", *TAU_RULES):
        return text
    try:
        return int(text)
    except ValueError:
        return float(text)


def fault(f, value) -> str:
    """What the value of a field of Config must be, if this is not; "" if it is."""
    if f.type != "object" and type(value).__name__ != f.type:
        return f.type
    if choices := f.metadata.get("choices"):
        unknown = [v for v in (value if f.type == "tuple" else [value]) if v not in choices]
        return f"of {', '.join(map(str, choices))}" if unknown else ""
    if f.name == "weak":
        return "directories or hub ids" if "" in value else ""
    if f.name == "seeds":
        whole = all(type(seed) is int and 0 <= seed < 2 ** 63 for seed in value)
        return "" if value and whole and len(set(value)) == len(value) else "whole numbers from 0, each once"
    if f.name in LIMITS and not (f.name == "tau" and value in TAU_RULES):
        low, high, need = LIMITS[f.name]
        kinds = (int,) if f.name in ("k", "epochs") else (int, float)
        return "" if type(value) in kinds and low <= value <= high else need
    return ""


def problem(config: Config) -> str:
    """The first value that cannot be used and what it must be; "" if all can. Types count: they may come from
    a file, or from Python."""
    for f in fields(Config):
        value = getattr(config, f.name)
        need = fault(f, value) if value != f.default else ""
        if need:
            return f"--{f.name.replace('_', '-')} {value!r:.40}: must be {need}"
    if config.rerun or config.merge:
        return ""
    config = settled(config)
    if config.student == "answer" and config.tune == "head":
        return "--student answer: has no head of its own to tune; use --tune full or lora"
    if config.keep and config.spread:
        return f"--keep {config.keep}: not with --spread 1"
    if config.keep and config.keep not in config.methods:
        return f"--keep {config.keep}: is not among --methods {' '.join(config.methods)}"
    weak, demo = config.weak or config.task.endswith(".jsonl"), config.task.startswith("demo-")
    missing = [name for name, given in (("--weak", weak), ("--strong", config.strong)) if not given]
    if not demo and missing:                                   # a .jsonl may bring weak labels
        return (f"--task {config.task} needs {' MODEL and '.join(missing)} MODEL "
                "(only the demo tasks bring their own)")
    if config.analysis == "cross-task" and (not config.weak and not demo or config.route != "probe"):
        return ("--analysis cross-task needs --weak MODEL, which labels the other tasks, and "
                "--route probe: tasks differ in their number of options")
    return ""


def settled(config: Config) -> Config:
    """The same run as its files name it: the demo's task in full, methods in their order, with those that
    every run has."""
    asked = METHODS if "all" in config.methods else (*ALWAYS, *config.methods)
    task = "demo-sciq" if config.task == "demo" else config.task
    return replace(config, task=task, methods=tuple(method for method in METHODS if method in asked))


def parser() -> argparse.ArgumentParser:
    """The command line, generated from Config; a wrong flag ends the program: one line, exit code 2."""
    def layout(prog):
        return argparse.RawDescriptionHelpFormatter(prog, width=118, max_help_position=24)

    def error(text):        # without argparse's lines of usage; of several processes the first one says it
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)   # torchrun ends all when one has ended
            out.exit(2)
        out.exit(2, f"selw2s.py: error: {' '.join(text.split())}\n")
    out = argparse.ArgumentParser(
        prog="selw2s.py", usage="python selw2s.py [--FLAG VALUE] ...", allow_abbrev=False, epilog=EXAMPLES,
        formatter_class=layout,
        description="Selective weak-to-strong generalization: finetune a strong model on a weak model's "
                    "labels, on its own\n"
                    "answers where it probably knows (P(IK)), and on graph-smoothed weak labels elsewhere.")
    out.error = error
    for f in fields(Config):
        spec = {"type": {"int": int, "float": float, "object": number}.get(f.type, str), **f.metadata}
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        if f.name == "methods":
            default = "up to selective, without logconf product confidence-only"
        if default not in ("", 0):
            spec["help"] += f" (default: {default})"
        out.add_argument("--" + f.name.replace("_", "-"), default=f.default, **spec)
    return out


def parse(argv: list[str] | None = None) -> Config:
    """Config from the command line (sys.argv by default)."""
    command_line = parser()
    values = vars(command_line.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    config = Config(**values)
    if line := problem(config):
        command_line.error(line)
    return settled(config)


if __name__ == "__main__":   # a script ends here; what follows is the module
    parse()             # --help and a wrong flag are answered before torch, seconds away, is imported
    try:
        import selw2s   # this file once more, under the name by which data.results.analyses knows it
    except KeyboardInterrupt:
        print("\nselw2s: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(selw2s.main())

import math
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from data import (DEMO, DataError, Item, Question, Task, check_transcripts, column_of, columns_shown,
                  completion, deal, fit, halves, items, judged, load_task, many, options_of, prompt,
                  unconditional)
from data.cache import Stages, digest, folder_digest
from data.checkpoint import check_device, out_of_memory
from data.results.analyses import analyse
from data.results.figures import figures
from data.results.metrics import accuracy, auroc, cross_entropy, hidden_truth, right_option, true_labels
from data.results.page import write_page
from data.results.plan import ahead, plan
from data.results.report import data_line, described, p_ik_line, smoothing_line, table
from data.results.store import (compared, merged, record, recorded, result_of, titled, write_items,
                                write_result)
from data.results.work import forward, reading, stage_work
from data.tokens import LoadError, encode_options
from graph import GraphError, affinity, knn, normalise, propagate
from model import STUDENTS, Choice, TrainError, finetune, hidden_at, load, read, spread

HERE = Path(__file__).resolve().parent
LARGE = 1e9     # parameters from which a model's activations are recomputed in the backward pass


# --------------------------------------------------------------------------------------------- the two models
class Pretrained(NamedTuple):
    """One of the two models as it comes, and how it is finetuned."""
    network: object
    tokenizer: object
    sha256: str         # of its files
    lr: float
    epochs: int
    large: bool         # LARGE or more


def learning_rate(size: int, answers: bool, config: Config) -> float:
    """--lr, or by size: Burns' 1e-5 from a billion parameters, 5e-5 below, 5e-4 below 50M; LoRA, which starts
    from B = 0, ten times that; a student that answers starts where it stands: two fifths [D9]."""
    if config.lr != "auto":
        return float(config.lr)
    lr = 1e-5
    if size < 1e9:
        lr = 5e-5
    if size < 5e7:
        lr = 5e-4
    if config.tune == "lora":
        lr *= 10
    return 0.4 * lr if answers else lr                                                              # [D9]


def passes(answers: bool, config: Config) -> int:
    """--epochs, or Burns' two; of a student that answers one [D9]."""
    if config.epochs != "auto":
        return config.epochs
    return 1 if answers else 2


def pretrained(source: str, answers: bool, config: Config) -> Pretrained:
    """Load a checkpoint; answers: whether its students answer instead of classify [D17]."""
    spreads = config.spread and many.size() > 1
    network, tokenizer = load(source, device="cpu" if spreads else config.device,
                              dtype=getattr(torch, config.dtype))
    size = sum(p.numel() for p in network.params.values())
    if spreads:
        network = spread(network, config.device)
    return Pretrained(network, tokenizer, folder_digest(network.folder), learning_rate(size, answers, config),
                      passes(answers, config), size >= LARGE)


class Outcome(NamedTuple):
    """A finetuned model: its P(y = 1) of every item asked for, and the SHA-256 of its weights."""
    p: list[Tensor]     # one (n,) per list of items
    weights: str


class Supervisor(NamedTuple):
    """A weak model and one order of its training items (--weak-seeds)."""
    model: Pretrained
    order: int


class Setup(NamedTuple):
    """What all steps of a run share."""
    config: Config
    task: Task          # as all models can read it
    supervisors: tuple[Supervisor, ...]     # those that are trained; a task's file may bring more
    strong: Pretrained
    titles: list[str]   # of all supervisors: those that are trained, then those of the task's file
    stages: Stages      # finished ones on disk; tells of the others


def finetuned(name: str, setup: Setup, start: Pretrained, inputs: list, targets: Tensor, ask: list, seed: int,
              rule=None) -> Outcome:
    """Finetune a pretrained model on items with soft targets (n,), and let it label others.

    inputs: token sequences or states (classifier), or Choices (a student that answers); ask: lists of the
    same; rule: target of a step from student's and given probability (model.finetune's target_fn). A stage:
    kept on disk. With --keep the finetuned model is saved too."""
    config = setup.config
    settings = dict(lr=start.lr, epochs=start.epochs, batch=config.batch, seed=seed, tune=config.tune,
                    checkpoint=start.large, offload=bool(config.offload),
                    student="answer" if isinstance(inputs[0], Choice) else "classifier")
    keep, progress = name == config.keep, setup.stages.progress
    work = stage_work(start.network, inputs, ask, settings, rule)

    def compute():
        student = finetune(start.network, inputs, targets, target_fn=rule,
                           progress=progress.part(work.training), **settings)
        state, out = student.state(), {}
        for i, part in enumerate(ask):
            out[f"p{i}"] = student.predict(part, progress=progress.part(work.predicting[i]))
        if keep and many.rank() == 0:
            out |= {f"state.{key}": x.cpu() for key, x in state.items()}
        return out | {"weights": digest(*(state[key] for key in sorted(state)))}
    depends = (start.sha256, config.dtype, config.device, settings, inputs, targets, rule, ask, keep)
    kind = "finetune strong" if start is setup.strong else "finetune weak"
    out = setup.stages("finetune", name, depends, compute, cost=(kind, work.training + sum(work.predicting)),
                       tokens=work.tokens, steps=start.epochs * -(-len(inputs) // config.batch))
    if keep and many.rank() == 0:
        state = {key.removeprefix("state."): x for key, x in out.items() if key.startswith("state.")}
        folder = f"{Path(config.task).stem}-{name}-seed{seed}-{out['weights'][:8]}"
        STUDENTS[settings["student"]](start.network, state).save(Path(config.out) / "students" / folder)
    return Outcome([out[f"p{i}"] for i in range(len(ask))], out["weights"])


# ------------------------------------------------------------------------------------------- the three parts
class Part(NamedTuple):
    """One part of a seed's data, D_l, D_u or test, a row per item. Steps 1, 2 and 3 fill it in, None before;
    truth, gold and fold are D_l's, None elsewhere."""
    items: list[Item]           # 1: n; labels of D_u and test are read for ceiling, oracle and metrics only
    questions: list[Question]   # n, the items' own; their answers likewise
    inputs: list | None = None          # n, what a student is given: token ids, a state, or a Choice [D17]
    weak: Tensor | None = None          # 2: (n,) weak P(y = 1); on D_l cross-fitted
    own: Tensor | None = None           # 3: (n,) self-generated label, 0/1
    zero_shot: Tensor | None = None     # (n,) P(y = 1) of the strong model untouched, its belief in the item
    belief: Tensor | None = None        # (n, K) float64, p of each option text (--own judge: no, yes)
    prompt_state: Tensor | None = None  # (n, R, C) its hidden states where the question ends, nothing shown
    item_state: Tensor | None = None    # (n, R, C) its hidden states where the item's text ends
    truth: Tensor | None = None         # 1: (n,) labels
    gold: Tensor | None = None          # (n,) column of `belief` that is right
    fold: Tensor | None = None          # (n,) of the item's group: its supervisor and probe saw the others


def take(part: Part, rows: Tensor) -> Part:
    """Some rows of a part, rows (n,) bool."""
    at = rows.nonzero()[:, 0]
    out = {}
    for name, value in part._asdict().items():
        if value is not None:
            out[name] = [value[i] for i in at] if isinstance(value, list) else value[at]
    return Part(**out)


# --------------------------------------------------------------------------------------- 1. Split and format
class Split(NamedTuple):
    """The three parts, and what of D_l is shown to the strong model."""
    labelled: Part
    transfer: Part
    test: Part
    examples: list[tuple[Item, Question]]   # of D_l, solved in front of what the strong model answers [D2]
    usable: Tensor                      # (n_l,) bool: not of an example's group, whose answer was shown


def split(setup: Setup, seed: int) -> Split:
    """1. Questions -> binary items -> D_l, D_u, test (Burns et al. 2023, App. A); D_l into folds [D16]."""
    config, task = setup.config, setup.task
    drawn = items(task.train, protocol=config.protocol, seed=seed)
    labelled, transfer = halves(drawn, task.train, protocol=config.protocol, seed=seed)
    test = items(task.test, protocol=config.protocol, seed=seed if config.protocol == "openai" else 0)
    setup.stages.tell(f"1 split    {len(labelled):,} labelled, {len(transfer):,} transfer, {len(test):,} "
                      f"test items   e.g. {labelled[0].text!r:.70} -> {labelled[0].label}")
    if config.shots > len(labelled) // 2:
        raise DataError(f"--shots {config.shots} would use up D_l, {len(labelled)} items: at most half")
    question = {q.id: q for q in task.train + task.test}
    parts = [Part(some, [question[item.question_id] for item in some]) for some in (labelled, transfer, test)]
    picked = np.random.default_rng(seed).choice(len(labelled), config.shots, replace=False)
    examples = [(labelled[i], parts[0].questions[i]) for i in picked]
    in_prompt = {q.group for _, q in examples}
    usable = torch.tensor([q.group not in in_prompt for q in parts[0].questions])
    fold = torch.tensor(deal(labelled, task.train, config.folds, random.Random(f"folds {seed}")))    # [D16]
    for f in range(config.folds):
        others = {item.label for item, other in zip(labelled, fold) if other != f}
        if not (fold[usable] == f).any() or len(others) < 2:
            raise DataError(f"D_l, {len(labelled)} items, is too small for --folds {config.folds} and "
                            f"--shots {config.shots}; give fewer, or more questions, in more groups")
    parts[0] = parts[0]._replace(truth=true_labels(labelled), fold=fold,
                                 gold=right_option(config, labelled, parts[0].questions))
    return Split(*parts, examples, usable)


# ---------------------------------------------------------------------------------------- 2. Weak supervisors
class Supervised(NamedTuple):
    """The weak labels of a seed, P(y = 1), by the weak supervisor, the first one. Those of a task's file are
    taken as they stand: nobody trained on D_l made them."""
    labelled: Tensor    # (n_l,) cross-fitted: the only weak labels that may be held against truth
    transfer: Tensor    # (n_u,) of the supervisor trained on all of D_l
    test: Tensor        # (n_test,) NaN where a file has none
    weights: str        # hash of that supervisor, or of a file's labels
    by_fold: Tensor     # (folds, n_u) D_u's labels by each of the cross-fitted supervisors
    every: Tensor       # (S, n_u) D_u's labels by every supervisor; NaN where one abstains


def end_states(name: str, setup: Setup, start: Pretrained, sequences: list) -> Tensor:
    """(n, C) hidden states of a pretrained model, after the final norm, where sequences end; a stage."""
    config, progress = setup.config, setup.stages.progress
    kind = "read strong" if start is setup.strong else "read weak"
    work = forward(start.network, sequences)

    def compute():
        return {"state": hidden_at(start.network, sequences, progress=progress.part(work)).cpu()}
    return setup.stages("states", f"states {name}", (start.sha256, config.dtype, config.device, sequences),
                        compute, cost=(kind, work), tokens=sum(map(len, sequences)))["state"]


def classified(name: str, setup: Setup, start: Pretrained, texts: list[list[str]]) -> list[list]:
    """What a classifier is given of the texts of each part: token ids, or, with --tune head, which leaves the
    network as it is, the hidden state where a text ends, read once for all that is trained on it."""
    sequences = [start.tokenizer.encode(part) for part in texts]
    if setup.config.tune != "head":
        return sequences
    states = end_states(name, setup, start, [ids for part in sequences for ids in part])
    return [list(part) for part in states.split([len(part) for part in sequences])]


def trained_labels(name: str, setup: Setup, supervisor: Supervisor, inputs: list[list], truth: Tensor,
                   seed: int) -> Outcome:
    """A supervisor, finetuned on D_l's truth (n_l,), labels D_u and test (Outcome.p); inputs: of labelled,
    transfer and test."""
    labelled, *ask = inputs
    return finetuned(name, setup, supervisor.model, labelled, truth, ask, seed + 1000 * supervisor.order)


def given_labels(setup: Setup, part: Part) -> Tensor:
    """(G, n) P(y = 1) by the G supervisors of the task's file; NaN where one abstains, or says nothing of
    test."""
    def said(name, item, q):
        p = dict(q.weak).get(name)
        return p[column_of(q.options, item.option)] if p else float("nan")
    names = [name for name, _ in setup.task.train[0].weak]
    every = list(zip(part.items, part.questions))
    labels = torch.tensor([[said(name, *pair) for pair in every] for name in names], dtype=torch.float32)
    return labels.reshape(len(names), len(part.items))      # of no supervisor too


def first_or_mean(labels: Tensor) -> Tensor:
    """(n,) the first supervisor's labels; where it abstains, the mean of the others; labels (S, n)."""
    return torch.where(labels[0].isnan(), labels.nanmean(0), labels[0])


def supervise(setup: Setup, parts: Split, seed: int) -> Supervised:
    """2. Finetune every weak model on D_l's ground truth; it labels D_u and test. For each fold of D_l the
    first one once more, trained on the other folds, labels that fold, and D_u too [D16]."""
    texts, truth = [[item.text for item in part.items] for part in parts[:3]], parts.labelled.truth
    given = [given_labels(setup, part) for part in parts[:3]]
    trained, inputs = [], []        # inputs: of each model, the same for all its orders
    for i, supervisor in enumerate(setup.supervisors):
        name = f"weak {i + 1}" if i else "weak"
        if supervisor.order == 0:
            inputs.append(classified(name, setup, supervisor.model, texts))
        trained.append(trained_labels(name, setup, supervisor, inputs[-1], truth, seed))
    transfer, test = (torch.cat([out.p[i][None] for out in trained] + [given[i + 1]]) for i in range(2))
    weak, folds = first_or_mean(transfer), setup.config.folds
    if trained:
        cross, by_fold = cross_fitted(setup, parts.labelled, inputs[0], seed)
        weights, made = trained[0].weights, f"cross-fitted ({folds} folds)"
    else:
        cross, by_fold = first_or_mean(given[0]), weak.expand(folds, -1)
        weights, made = digest(*given), "labels as they came"
    setup.stages.tell(f"2 weak     accuracy on D_l {accuracy(cross, truth):.3f}, {made}; supervisors: "
                      f"{len(transfer)}")
    return Supervised(cross, weak, first_or_mean(test), weights, by_fold, transfer)


def cross_fitted(setup: Setup, part: Part, inputs: list[list], seed: int) -> tuple[Tensor, Tensor]:
    """Supervised.labelled and .by_fold; part: D_l, inputs as trained_labels has them [D16]."""
    weak, folds, (labelled, transfer, _) = setup.supervisors[0].model, setup.config.folds, inputs
    cross, by_fold = torch.empty(len(labelled)), torch.empty(folds, len(transfer))
    for f in range(folds):
        learn, held = (part.fold != f).nonzero()[:, 0], (part.fold == f).nonzero()[:, 0]
        out = finetuned(f"cross-{f}", setup, weak, [labelled[i] for i in learn], part.truth[learn],
                        [[labelled[i] for i in held], transfer], seed)
        cross[held], by_fold[f] = out.p
    return cross, by_fold


# ----------------------------------------------------------------------------------- 3. Self-generated labels
def likelihoods(name: str, setup: Setup, prompts: list[str], completions: list[list[str]],
                layers: tuple) -> dict[str, Tensor]:
    """Each completion's log-likelihood, and its and its prompt's hidden states of these layers, in one pass
    (model.Reading); a stage."""
    strong, config = setup.strong, setup.config
    heads, tails = encode_options(strong.tokenizer, prompts, completions)
    longest = max(len(head) + max(map(len, tail)) for head, tail in zip(heads, tails))
    if longest > strong.network.config.context:
        raise DataError(f"a prompt of {longest} tokens is over the strong model's "
                        f"{strong.network.config.context}: use fewer --shots, --own sum, shorter questions")
    depends = (strong.sha256, config.dtype, config.device, heads, tails, layers)
    (work, tokens), progress = reading(strong.network, heads, tails), setup.stages.progress

    def compute():
        return read(strong.network, heads, tails, layers=layers, progress=progress.part(work))._asdict()
    return setup.stages("read", name, depends, compute, cost=("read strong", work), tokens=tokens)


def untied(belief: Tensor, questions: list[Question]) -> Tensor:
    """belief (n, K) with a millionth more for one of several options that are the largest, which one by the
    question's id: a tie, as half precision makes them, favours neither the first option nor "no" [D1]."""
    largest, out = belief == belief.amax(1, keepdim=True), belief.clone()
    for n in (largest.sum(1) > 1).nonzero()[:, 0].tolist():
        tied = largest[n].nonzero()[:, 0]
        out[n, tied[zlib.crc32(questions[n].id.encode()) % len(tied)]] += 1e-6
    return out


class Said(NamedTuple):
    """What the pretrained strong model says of Q questions, O options."""
    row: dict[str, int]     # of a question's id
    score: Tensor           # (Q, O) float64, of each option [D1]
    prompt_state: Tensor    # (Q, R, C)
    option_state: Tensor    # (Q, O, R, C)


def read_questions(setup: Setup, questions: list[Question], before: str = "") -> Said:
    """3a. One pass over questions, each after the solved examples `before` [D2]. Of all questions of the
    task, without examples, it is the same for all seeds."""
    own, completions, depth = setup.config.own, options_of(questions), setup.strong.network.config.layers
    layers = tuple(dict.fromkeys((depth // 2, 3 * depth // 4, None)))   # offered to probe and graph [D14]
    reads = likelihoods("read", setup, [before + prompt(q) for q in questions], completions, layers)
    score = reads["loglik"]
    if own == "mean":
        score = score / reads["option_tokens"].clamp_min(1)
    if own == "pmi":
        alone = [unconditional(q) for q in questions]
        other = likelihoods("read unconditional", setup, alone, completions, ())["loglik"]
        score = score - other.nan_to_num(neginf=0.0)
    row = {q.id: i for i, q in enumerate(questions)}
    return Said(row, score, reads["prompt_state"], reads["item_state"])


def judgement(setup: Setup, name: str, part: Part, examples: list[tuple[Item, Question]]) -> Tensor:
    """(n, 2) float64 log-likelihoods that the candidate shown is wrong, and right, as the strong model judges
    it [D1]."""
    before = "".join(f"{judged(item, q)} {item.label}\n\n" for item, q in examples)
    prompts = [before + judged(item, q) for item, q in zip(part.items, part.questions)]
    completions = [[" 0", " 1"]] * len(prompts)
    if name == "labelled":
        setup.stages.tell(f"3 judge    {prompts[0]!r:.200} + one of {completions[0]}")
    return likelihoods(f"read {name} judge", setup, prompts, completions, ())["loglik"]


def elicit(setup: Setup, name: str, part: Part, examples: list[tuple[Item, Question]], said: Said) -> Part:
    """3b. The option with the largest log-likelihood given the question is the strong model's own answer
    [D1]; the own label of an item is 1 if the candidate it shows is that answer."""
    items, questions = part.items, part.questions
    row = [said.row[q.id] for q in questions]
    column = torch.tensor(columns_shown(items, questions))                                  # (n,)
    score, prompt_state, at_option = said.score[row], said.prompt_state[row], said.option_state[row, column]
    # where the item's text ends: a yes/no question is itself the item
    whole = torch.tensor([item.text == prompt(q) for item, q in zip(items, questions)])
    item_state = torch.where(whole[:, None, None], prompt_state, at_option)
    if setup.config.own == "judge":
        score, column = judgement(setup, name, part, examples), torch.ones_like(column)
    belief = untied(score.softmax(1), questions)                                            # (n, K)
    own = (belief.argmax(1) == column).float()                              # hard: 0 or 1 [D13]
    zero_shot = belief.gather(1, column[:, None])[:, 0].float()
    return part._replace(own=own, zero_shot=zero_shot, belief=belief, prompt_state=prompt_state,
                         item_state=item_state)


def answer_right(learn: Part) -> Tensor:
    """(n,) bool, the strong model's own answer is right; of D_l."""
    return learn.belief.argmax(1) == learn.gold


def student_inputs(setup: Setup, parts: list[Part]) -> list[list]:
    """What a student is given of each item of each part, in training and after: its text (classified), or the
    question with all options and which of them is shown [D17]."""
    if setup.config.student == "classifier":
        texts = [[item.text for item in part.items] for part in parts]
        return classified("strong", setup, setup.strong, texts)
    out = []
    for part in parts:
        prompts, completions = [prompt(q) for q in part.questions], options_of(part.questions)
        heads, tails = encode_options(setup.strong.tokenizer, prompts, completions)
        out.append([Choice(*given) for given in zip(heads, tails, columns_shown(part.items, part.questions))])
    return out


class Prepared(NamedTuple):
    """Steps 1 to 3 of one seed."""
    seed: int
    labelled: Part      # D_l
    learn: Part         # D_l less the groups of --shots examples: what steps 4 to 6 learn from
    transfer: Part      # D_u
    test: Part
    supervised: Supervised


def prepare(setup: Setup, seed: int) -> Prepared:
    """Steps 1 to 3 for one seed."""
    parts = split(setup, seed)
    supervised, out = supervise(setup, parts, seed), {}
    before = "".join(prompt(q) + completion(q, q.answer) + "\n\n" for _, q in parts.examples)
    first = parts.labelled.questions[0]
    setup.stages.tell(f"3 prompt   {before + prompt(first)!r:.200} + one of {options_of([first])[0]}")
    said = read_questions(setup, setup.task.train + setup.task.test, before)
    for name, part, inputs in zip(("labelled", "transfer", "test"), parts, student_inputs(setup, parts[:3])):
        part = part._replace(inputs=inputs, weak=getattr(supervised, name))
        out[name] = elicit(setup, name, part, parts.examples, said)
    learn = take(out["labelled"], parts.usable)
    right = answer_right(learn).double().mean()
    setup.stages.tell(f"3 own      strong model's own answers right on {right:.3f} of D_l's questions, "
                      f"untouched accuracy {accuracy(learn.zero_shot, learn.truth):.3f}")
    return Prepared(seed, learn=learn, supervised=supervised, **out)


# --------------------------------------------------------------------------------------------------- 4. P(IK)
L2_GRID = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01)


class Probe(NamedTuple):
    """A linear probe: P(y = 1 | features) = sigmoid(features @ weight + bias). Fields in float64."""
    weight: Tensor      # (C,)
    bias: Tensor        # ()
    l2: float           # penalty l2/2 |standardised weight|^2 beside the mean cross-entropy
    held_out: Tensor    # (n,) out-of-fold probability of each training row (empty when l2 was given)
    loss: float         # out-of-fold cross-entropy, nats (nan when l2 was given)

    def predict(self, features: Tensor) -> Tensor:
        """features (n, C) -> (n,) probability, float64, where the features are."""
        w, b = self.weight.to(features.device), self.bias.to(features.device)
        return torch.sigmoid(features.double() @ w + b)


def logistic(x: Tensor, y: Tensor, l2: float, w: Tensor, tol: float = 1e-8) -> Tensor:
    """argmin_w of mean CE(sigmoid(x w), y) + l2/2 |w|^2, bias (last entry) unpenalised; gradient norm <= tol.

    x (n, C + 1) float64, last column ones, y (n,) in [0, 1], w (C + 1,) start. Newton's method, each step by
    conjugate gradients: a width of thousands costs matrix-vector products only. TrainError at once if x or y
    is not finite, or if not converged."""
    penalty = torch.full_like(w, l2)
    penalty[-1] = 0

    def loss(w):
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y) + (penalty * w * w).sum() / 2

    for _ in range(200):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) / len(y) + penalty * w
        size = gradient.norm()
        if not size.isfinite():
            raise TrainError("the probe's features are not finite: use --dtype bfloat16 or float32")
        if size <= tol:
            return w
        curvature = p * (1 - p) / len(y)
        step, r = torch.zeros_like(w), -gradient
        direction, rr = r, r @ r
        for _ in range(10 * len(w)):
            curved = x.T @ (curvature * (x @ direction)) + penalty * direction
            scale = rr / (direction @ curved)
            step, r = step + scale * direction, r - scale * curved
            rr, previous = r @ r, rr
            if rr.sqrt() <= min(0.1, float(size)) * size:
                break
            direction = r + (rr / previous) * direction
        now, length = loss(w), 1.0
        while loss(w + length * step) > now + 1e-12 * now.abs() and length > 1e-6:
            length /= 2
        w = w + length * step
    raise TrainError(f"probe not converged: gradient norm {float(size):.1e} after 200 Newton steps")


def fit_probe(features: Tensor, target: Tensor, *, l2: float | None = None,
              fold: Tensor | None = None) -> Probe:
    """Linear probe: L2 logistic regression to convergence in float64 (paper: P(IK); Kadavath et al. 2022).

    features (n, C), target (n,) in [0, 1]; fold (n,) int: rows that share a fold are held out together
    (groups must not straddle folds; default: five by position). l2=None: chosen of L2_GRID by held-out
    cross-entropy, ties to the larger. Features are standardised inside, with mean and deviation (over n - 1)
    of all rows, held-out ones too: they are not labels; the returned weights apply to raw features."""
    x, y = features.double(), target.double()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = torch.cat([(x - mean) / scale, x.new_ones(len(x), 1)], 1)           # (n, C + 1)
    fold = torch.arange(len(x), device=x.device) % 5 if fold is None else fold.to(x.device)
    best, held_out, start = float("nan"), y[:0], x.new_zeros(x.shape[1])
    if l2 is None:
        candidates, warm = {}, {int(f): start for f in fold.unique()}
        for trial in L2_GRID:   # largest penalty first: each fit starts from the last
            p = torch.empty_like(y)
            for f, w in warm.items():
                warm[f] = w = logistic(x[fold != f], y[fold != f], trial, w, tol=1e-5)
                p[fold == f] = torch.sigmoid(x[fold == f] @ w)
            candidates[trial] = (cross_entropy(p, y), p)
        l2 = min(candidates, key=lambda trial: candidates[trial][0])
        best, held_out = candidates[l2]
    w = logistic(x, y, l2, start)
    weight = w[:-1] / scale
    return Probe(weight, w[-1] - weight @ mean, l2, held_out, best)


def router_features(router: str, part: Part) -> list[Tensor]:
    """What P(IK) may look at, one (n, d) float64 per candidate [D18]: a hidden state where the question ends
    (probe), the sorted log-probabilities of the options (belief), or both side by side."""
    states = [state.double() for state in part.prompt_state.unbind(1)]
    belief = part.belief.sort(1, descending=True).values.clamp_min(1e-6).log()          # (n, K)
    match router:
        case "probe":
            return states
        case "belief":
            return [belief]
        case "both":
            return [torch.cat([state, belief], 1) for state in states]
    raise ValueError(router)


class Known(NamedTuple):
    """Step 4: P(IK) of every question by one router, (n,) float32 per part."""
    router: str
    learn: Tensor       # out of fold: the probe was trained on the other folds
    transfer: Tensor
    test: Tensor
    layer: int          # which of the R hidden states it looks at
    probe: Probe

    def predict(self, part: Part) -> Tensor:
        """(n,) P(IK) of a part that took no part in training the probe."""
        return self.probe.predict(router_features(self.router, part)[self.layer]).float()


def know(config: Config, prep: Prepared, router: str) -> Known:
    """4. P(IK): a linear probe, before any candidate is shown, of whether the own answer is right; trained on
    D_l, L2 and layer by cross-validation there."""
    target = answer_right(prep.learn).double()
    if config.target == "soft":     # p(right option) [D3]
        target = prep.learn.belief.gather(1, prep.learn.gold[:, None])[:, 0].double()
    probes = [fit_probe(features.to(config.device), target.to(config.device), fold=prep.learn.fold)
              for features in router_features(router, prep.learn)]
    layer = min(range(len(probes)), key=lambda r: probes[r].loss)
    probe = Probe(*(x.cpu() if isinstance(x, Tensor) else x for x in probes[layer]))
    known = Known(router, probe.held_out.float(), None, None, layer, probe)
    return many.word(known._replace(transfer=known.predict(prep.transfer), test=known.predict(prep.test)))


# --------------------------------------------------------------------------------------------------- 5. Route
def route(p_ik: Tensor, self_label: Tensor, weak_label: Tensor, tau) -> tuple[Tensor, Tensor]:
    """The selection (paper, abstract): own label where P(IK) >= tau, weak label elsewhere [D4].

    All (n,); tau a float, compared in p_ik's dtype, or, for a per-item router, (n,). Returns (label (n,),
    is_self (n,) bool)."""
    is_self = p_ik >= tau
    return torch.where(is_self, self_label, weak_label), is_self


def log_odds(p: Tensor) -> Tensor:
    """log p / (1 - p), float64, p kept 1e-6 away from 0 and 1."""
    p = p.double().clamp(1e-6, 1 - 1e-6)
    return p.log() - (1 - p).log()


def thresholds(config: Config, prep: Prepared, p_learn: Tensor) -> tuple[str, Tensor, Tensor]:
    """The rule of tau and tau for every row of D_l and of D_u [D4]; p_learn: P(IK) on D_l, held out.

    answers  P(IK) >= a, the supervisor's accuracy on D_l. Cautious: P(IK) is of answers, a of labels.
    labels   r >= a, where r = P(IK) + (1 - P(IK)) q is the probability that the own *label* is right and q
             the share of right own labels among D_l's wrongly answered questions, at most 1 - 1e-6
    item     r >= the supervisor's own confidence in the item, calibrated on D_l
    auto     the one of these whose labels of D_l are most often right; of equals the first
    All are thresholds on P(IK), as r >= x where P(IK) >= (x - q) / (1 - q)."""
    learn, transfer = prep.learn, prep.transfer

    def every(value):
        return [torch.full_like(part.weak, value) for part in (learn, transfer)]
    if config.tau not in ("auto", *TAU_RULES):
        return "fixed", *every(float(config.tau))
    weak_right, unknown = (learn.weak > 0.5) == (learn.truth > 0.5), ~answer_right(learn)
    a, q = weak_right.double().mean(), 0.0
    if unknown.any():
        q = min(accuracy(learn.own[unknown], learn.truth[unknown]), 1 - 1e-6)
    sure = fit_probe(log_odds(learn.weak).abs()[:, None], weak_right.double(), fold=learn.fold)
    confidence = [sure.held_out, sure.predict(log_odds(transfer.weak).abs()[:, None])]
    rules = {"answers": every(float(a)), "labels": every((float(a) - q) / (1 - q)),
             "item": [((c - q) / (1 - q)).float() for c in confidence]}

    def right(rule):
        return accuracy(route(p_learn, learn.own, learn.weak, rules[rule][0])[0], learn.truth)
    best = max(rules, key=right) if config.tau == "auto" else config.tau
    return best, *rules[best]


# -------------------------------------------------------------------------------------------------- 6. Smooth
ALPHAS, KS = (0.3, 0.5, 0.7, 0.9, 0.97), (5, 10, 20, 50)


def neighbours(features: Tensor, k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """k nearest by cosine, on device, features centred: one direction dominates raw hidden states [D15]."""
    x = features.float()
    x, k = x - x.mean(0), min(k, len(x) - 1)
    return knn(x.to(device), k) if many.size() == 1 else many.nearest(knn, x, k, device)


def smooth_grid(near, prior: Tensor, alphas, ks, gamma: float) -> dict[tuple[float, int], Tensor]:
    """{(alpha, k): smoothed P(y = 1) (m,)} of a prior (m,), from one neighbour list, whose first k columns
    are the k nearest: one function for choosing and for use."""
    index, similarity = near
    Y = torch.stack([1 - prior, prior], 1).to(index.device)                 # (m, 2)
    out = {}
    for k in ks:
        S = normalise(affinity(index[:, :k], similarity[:, :k], gamma=gamma))
        for alpha in alphas:
            result = propagate(S, Y, alpha)
            if not result.residual <= 1e-5:
                raise TrainError(f"propagation not converged (alpha {alpha}, residual {result.residual:.1e})")
            no, yes = result.F.unbind(1)
            out[alpha, k] = (yes / (no + yes)).float().to(prior.device)
    return out


def smooth(features: Tensor, prior: Tensor, alpha: float, k: int, gamma: float, device="cpu") -> Tensor:
    """Smoothed P(y = 1) (n,): F = (1 - alpha)(I - alpha S)^-1 Y on the kNN graph of the items' hidden states.

    features (n, C) hidden states at the item's last token, prior (n,) P(y = 1). alpha = 0: prior itself."""
    if alpha == 0:
        return prior
    return smooth_grid(neighbours(features, k, device), prior, (alpha,), (k,), gamma)[alpha, k]


class Smoothing(NamedTuple):
    """What was chosen on D_l, and the label accuracy there before and after (None: nothing to choose by)."""
    layer: int          # column of the hidden states read
    alpha: float
    k: int
    before: float | None
    after: float | None


class View(NamedTuple):
    """One fold of D_l beside D_u, m items, labelled by the supervisor that saw neither, so that labels and
    density are those smoothing will meet; only the fold's truth is known [D6]."""
    near: list          # of each of the R hidden states read, the neighbour list; empty: nothing to choose
    prior: Tensor       # (m,) P(y = 1)
    truth: Tensor       # (m,) what is known of it, else NaN
    scored: Tensor      # (m,) bool: has truth, and would be smoothed
    group: Tensor       # (m,) int: questions of one group are right or wrong together


def views(prep: Prepared, config: Config) -> list[View]:
    """One per fold of D_l, the fold's items first; all of them are scored."""
    learn, transfer, out, k = prep.learn, prep.transfer, [], max(KS) if config.k == "auto" else config.k
    number = {q.group: n for n, q in enumerate(learn.questions + transfer.questions)}
    groups = [torch.tensor([number[q.group] for q in part.questions]) for part in (learn, transfer)]
    for f in learn.fold.unique().tolist():
        at, near = learn.fold == f, []
        if config.alpha != 0:
            states = torch.cat([learn.item_state[at], transfer.item_state])
            near = [neighbours(x, k, config.device) for x in states.unbind(1)]
        prior = torch.cat([learn.weak[at], prep.supervised.by_fold[f]])
        truth = torch.cat([learn.truth[at], torch.full_like(transfer.own, torch.nan)])
        out.append(View(near, prior, truth, ~truth.isnan(), torch.cat([groups[0][at], groups[1]])))
    return out


def routed_views(graphs: list[View], prep: Prepared, routed_learn: Tensor, routed_transfer: Tensor,
                 anchors: bool) -> list[View]:
    """The views where rows, routed_* (n,) bool, take the own label: those are not scored and, with anchors,
    have it as their prior [D5]. D_u's rows are routed as they will be, by a probe that saw the fold too."""
    learn, transfer, out = prep.learn, prep.transfer, []
    for f, view in zip(learn.fold.unique(), graphs):
        at = learn.fold == f
        is_self = torch.cat([routed_learn[at], routed_transfer])
        own = torch.cat([learn.own[at], transfer.own])
        prior = torch.where(is_self, own, view.prior) if anchors else view.prior
        out.append(view._replace(prior=prior, scored=view.scored & ~is_self))
    return out


def choose_smoothing(graphs: list[View], config: Config) -> Smoothing:
    """The alpha, k, layer that make the scored labels most accurate, of those that repair more groups than
    they break by McNemar's test, p < .05 over the number of candidates: the best of many noisy ones looks
    better than it is; of equals the lowest layer, then k, then alpha. None: alpha = 0, no smoothing [D6]. A
    fixed --alpha is always taken. --k auto: those of KS below the smallest view's m (5 in any case)."""
    auto, smallest = config.alpha == "auto", min(len(view.prior) for view in graphs)
    alphas = ALPHAS if auto else (float(config.alpha),)
    ks = tuple(k for k in KS if k < max(smallest, 6)) if config.k == "auto" else (config.k,)

    def right_of(labels):       # 1.0 where the label of a scored item is right, all views' in turn
        return torch.cat([((p > 0.5) == (view.truth > 0.5))[view.scored].double()
                          for view, p in zip(graphs, labels)])
    group = torch.cat([view.group[view.scored] for view in graphs])
    right = right_of([view.prior for view in graphs])
    if len(right) < 2 or smallest < 2:      # nothing to choose by
        return Smoothing(0, 0.0 if auto else alphas[0], ks[0], None, None)
    before = float(right.mean())
    best = Smoothing(0, 0.0, ks[0], before, before)
    if config.alpha not in ("auto", 0):
        best = best._replace(after=-1.0)    # which a fixed alpha beats
    layers = len(graphs[0].near)
    z = NormalDist().inv_cdf(1 - 0.05 / max(1, layers * len(alphas) * len(ks)))
    for layer in range(layers):
        found = [smooth_grid(view.near[layer], view.prior, alphas, ks, config.gamma) for view in graphs]
        for alpha, k in found[0]:
            now = right_of([smoothed[alpha, k] for smoothed in found])
            net = torch.zeros(1 + int(group.max())).double().index_add(0, group, now - right).sign()
            clear = not auto or net.sum() > z * net.abs().sum() ** 0.5
            if clear and float(now.mean()) > best.after:
                best = Smoothing(layer, alpha, k, before, float(now.mean()))
    return many.word(best)


class Selected(NamedTuple):
    """Steps 5 and 6: labels of D_u, (n_u,) each."""
    rule: str               # how tau was found [D4]
    tau: Tensor             # of each item
    is_self: Tensor         # bool, routed to the own label
    routed: Tensor          # own label where routed, weak label elsewhere
    refined: Tensor         # weak labels smoothed, beside the own ones with --anchors 1
    selective: Tensor       # own label where routed, refined elsewhere: the method
    smoothed_weak: Tensor   # weak labels smoothed alone: graph-only's
    chosen: Smoothing
    chosen_alone: Smoothing


def select(config: Config, prep: Prepared, p_learn: Tensor, p_transfer: Tensor) -> Selected:
    """5. Route: own label where P(IK) >= tau. 6. Smooth the other weak labels over the graph of D_u; for the
    control graph-only, all of them.

    p_learn, p_transfer: P(IK) of prep.learn's and prep.transfer's rows."""
    learn, transfer = prep.learn, prep.transfer
    rule, tau_learn, tau = thresholds(config, prep, p_learn)
    routed, is_self = route(p_transfer, transfer.own, transfer.weak, tau)
    _, is_self_learn = route(p_learn, learn.own, learn.weak, tau_learn)

    graphs = views(prep, config)
    routed_graphs = routed_views(graphs, prep, is_self_learn, is_self, bool(config.anchors))
    chosen, alone = choose_smoothing(routed_graphs, config), choose_smoothing(graphs, config)           # [D6]
    prior = routed if config.anchors else transfer.weak                                             # [D5]

    def smoothed(labels, c):
        return smooth(transfer.item_state[:, c.layer], labels, c.alpha, c.k, config.gamma, config.device)
    refined, smoothed_weak = smoothed(prior, chosen), smoothed(transfer.weak, alone)
    selective = torch.where(is_self, transfer.own, refined)
    return many.word(Selected(rule, tau, is_self, routed, refined, selective, smoothed_weak, chosen, alone))


def homophily(transfer: Part, chosen: Smoothing, device: str) -> float:
    """Share of neighbours on the graph of D_u that share the truth; for metrics."""
    index, _ = neighbours(transfer.item_state[:, chosen.layer], chosen.k, device)
    truth = hidden_truth(transfer)
    return float((truth[index.cpu()] == truth[:, None]).double().mean())


# ------------------------------------------------------------------------------------------------ 7. Students
class Predictions(NamedTuple):
    """What a method, trained or not, says of D_u and test."""
    labels: Tensor | None       # (n_u,) what it was trained on (weak, zero-shot: its own), NaN: left out;
                                # None: no one label per item
    transfer: Tensor            # (n_u,) P(y = 1)
    test: Tensor                # (n_test,) P(y = 1)
    weights: str                # hash of the trained tensors


def labels_of(method: str, setup: Setup, prep: Prepared, known: Known, s: Selected) -> Tensor:
    """(n_u,) P(y = 1) that a method trains its student on, NaN: left out; (n_u, S) for a rule that needs the
    supervisors' one by one."""
    match method:
        case "ceiling":
            return hidden_truth(prep.transfer)
        case "naive":
            return prep.transfer.weak
        case "self-only":           # tau = 0
            return prep.transfer.own
        case "graph-only":          # tau > 1
            return s.smoothed_weak
        case "route-only":          # alpha = 0
            return s.routed
        case "selective":
            return s.selective
    return related(method, setup, prep, known, s)


def learnt(config: Config, labels: Tensor) -> Tensor:
    """labels as a student is given them: P(y = 1), or 1 where it exceeds 1/2 and else 0; NaN stays [D20]."""
    if config.labels == "soft" or config.labels == "auto" and config.student == "classifier":
        return labels
    return torch.where(labels.isnan(), labels, (labels > 0.5).float())


def student(method: str, setup: Setup, prep: Prepared, known: Known, s: Selected) -> Predictions:
    """7. The pretrained strong model finetuned on one label set, of D_u or, strong-on-D_l, of D_l."""
    ask = [prep.transfer.inputs, prep.test.inputs]
    if method == "strong-on-D_l":
        inputs, targets, labels = prep.labelled.inputs, prep.labelled.truth, None
    else:
        inputs = prep.transfer.inputs
        targets = many.word(learnt(setup.config, labels_of(method, setup, prep, known, s)))
        labels = targets if targets.ndim == 1 else None
    if labels is not None:
        rows = (~labels.isnan()).nonzero()[:, 0]
        inputs, targets = [inputs[i] for i in rows], targets[rows]
    rule = {"logconf": log_confidence, "product": product, "raven": raven()}.get(method)
    out = finetuned(method, setup, setup.strong, inputs, targets, ask, prep.seed, rule)
    return Predictions(labels, *out.p, out.weights)


# ---------------------------------------------------------------------------------------------------- The run
def one_seed(setup: Setup, seed: int) -> dict:
    """Steps 1 to 7 for one seed: arrays of every label source and of every method's probabilities."""
    config, tell = setup.config, setup.stages.tell
    prep = prepare(setup, seed)
    routers = {router: know(config, prep, router) for router in ROUTERS}
    known = routers[config.route]
    tell(p_ik_line(routers, known, answer_right(prep.learn), prep.learn.prompt_state.shape[1]))
    s = select(config, prep, known.learn, known.transfer)
    tell(f"5 route    tau {s.tau.double().mean():.3f} ({s.rule}): own label on "
         f"{s.is_self.double().mean():.3f} of D_u")
    tell(smoothing_line(s.chosen, auto=config.alpha == "auto"))
    transfer, test = prep.transfer, prep.test
    untouched = setup.strong.sha256
    done = {"weak": Predictions(transfer.weak, transfer.weak, test.weak, prep.supervised.weights),
            "zero-shot": Predictions(transfer.zero_shot, transfer.zero_shot, test.zero_shot, untouched)}
    for method in config.methods:
        if method not in done:
            done[method] = student(method, setup, prep, known, s)
            tell(f"7 student  {method}")
    return record(setup, prep, routers, s, done, homophily(transfer, s.chosen_alone, config.device))


def loaded(name: str, config: Config) -> Task:
    """A task's questions, or DataError; of several processes rank 0 reads (downloads) them."""
    return many.by_first(lambda: load_task(name, data_dir=config.data_dir or None), DataError)


def fitted(task, models: tuple[Pretrained, ...], config: Config, tell) -> tuple[Task, dict]:
    """The task as all models can read it, and how many of its questions had to be changed for that [D11]."""
    room = min(1024, *(model.network.config.context for model in models))
    task, counts = fit(task, [model.tokenizer.encode for model in models], room,
                       apart=config.protocol == "paper", limit=config.limit)
    tell(data_line(task, counts, room, synthetic=config.task in DEMO))
    return task, counts


def set_up(config: Config, stages: Stages, load_model=pretrained) -> tuple[Setup, dict]:
    """Task and models loaded, and how many questions had to be changed; load_model: --plan has its own.
    DataError for what the task's file and the flags do not give each other."""
    task, sources = loaded(config.task, config), config.weak
    if config.task in DEMO and not sources:
        sources = (str(HERE / "data/demo/weak"),)
    if not sources and not task.train[0].weak:
        raise DataError(f'--task {config.task} needs --weak MODEL, or "weak" labels on its lines')
    if not sources and (config.keep == "weak" or config.analysis == "representation"):
        raise DataError("--keep weak and --analysis representation need --weak MODEL")
    heard, trained = len(task.train[0].transcripts), len(sources) * config.weak_seeds
    if "debate" in config.methods and heard and heard != trained:
        raise DataError(f"--methods debate: {config.task} has {heard} transcripts a question for {trained} "
                        "supervisors: give as many, --weak A B C or --weak-seeds K")
    weak = [load_model(source, False, config) for source in sources]
    strong = load_model(config.strong or str(HERE / "data/demo/strong"), config.student == "answer", config)
    task, counts = fitted(task, (*weak, strong), config, stages.tell)
    supervisors = tuple(Supervisor(model, order) for model in weak for order in range(config.weak_seeds))
    names = [Path(source).resolve().name for source in sources for _ in range(config.weak_seeds)]
    titles = titled(names + [name for name, _ in task.train[0].weak])
    if "debate" in config.methods:
        check_transcripts(task.train + task.test, [supervisor.model for supervisor in supervisors], titles)
    return Setup(config, task, supervisors, strong, titles, stages), counts


def run(config: Config) -> dict:
    """The method for all seeds; its files in <out>/<task>/<run id>/; returns the result."""
    if line := problem(config):
        raise DataError(line)
    config, start = settled(config), time.perf_counter()

    def tell(line: str):
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", flush=True)
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {config.out}: {error.strerror}; choose another folder") from None
    if config.device.startswith("cuda"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)    # with warn_only attention would not be
        torch.utils.deterministic.fill_uninitialized_memory = False
    if many.LAUNCHED and config.device.startswith("cuda:"):
        raise DataError(f"--device {config.device}: several processes take --device cuda, a GPU each")
    check_device(many.own_device(config.device))    # on another's, each would leave half a gigabyte
    if many.LAUNCHED and config.device == "cuda" and torch.cuda.device_count() < many.here():
        raise DataError(f"--device cuda: {many.here()} processes on this machine, which has "
                        f"{torch.cuda.device_count()} GPU(s): start one for each")
    many.start(config.device)
    print(described(config))
    setup, counts = set_up(config, Stages(Path(config.out) / "cache", tell, config.device))
    setup.strong.network.check_head()
    setup.stages.progress.ahead = ahead(setup)
    runs = [one_seed(setup, seed) for seed in config.seeds]
    analysis = analyse(setup) if config.analysis else None
    result = result_of(setup, counts, runs, analysis, time.perf_counter() - start)
    if many.rank() == 0:
        finish(result, runs, config.out)
    many.word(None)     # none goes on before it is written
    return result


def finish(result: dict, runs: list[dict], out: str) -> None:
    """8. Write the result, its figures and the page, print the table."""
    folder, remark = write_items(result, runs, out), []
    try:
        drawn = figures(folder, result)
    except ImportError:
        drawn, remark = [], ["(figures: pip install matplotlib, then run the same command again)"]
    write_page(folder, result, runs, drawn)
    write_result(result, folder)
    print(f"\n{table(result['metrics'])}\n")
    files = ["result.json", "items.npz", "labels.jsonl", "report.html", *drawn, *remark]
    print(f"written   {folder}/ {' '.join(files)}")


def rerun(config: Config) -> None:
    """Repeat the run recorded in a result.json and compare; raises DataError if it differs."""
    old = recorded(config.rerun)
    fresh = str(Path(config.out) / f"rerun-{digest(old)[:12]}")     # with a cache of its own
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in old["config"].items()}
    values |= {"out": fresh, "data_dir": config.data_dir or values.get("data_dir", "")}
    try:
        again = Config(**values)
        line = problem(again) or ("" if again == settled(again) else "its --methods are no run's")
    except TypeError as error:
        line = str(error)
    if line:
        raise DataError(f"{config.rerun}: not a result.json of this program ({line})")
    print(compared(old, run(again), config.rerun))


def main(argv: list[str] | None = None) -> int:
    """0 done, 2 a user's mistake (one line on stderr), 130 interrupted (finished stages are kept)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a character that the console cannot print is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        config = parse(argv)
        if many.rank() and (config.merge or config.plan):
            return 0
        if config.merge:
            finish(*merged(config.merge), config.out)
        elif config.rerun:
            rerun(config)
        elif config.plan:
            plan(config)
        else:
            run(config)
        many.stop()
        return 0
    except SystemExit as end:       # of parse: --help, or a line that is said already
        return end.code
    except (LoadError, DataError, TrainError, GraphError) as error:
        return many.failed(f"selw2s: {error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not out_of_memory(error):
            if many.lost(error):
                return many.failed(many.LOST)
            raise
        return many.failed("selw2s: out of memory: use --tune lora, a smaller model, --limit, or a machine "
                           "with more (finished stages are kept: start again)")
    except (OSError, SafetensorError) as error:
        return many.failed(f"selw2s: {error} (finished stages are kept: start again)")
    except KeyboardInterrupt:
        return many.failed(many.STOPPED, 130)


# -------------------------------------------------------------------- Related systems: not the paper's method
def related(method: str, setup: Setup, prep: Prepared, known: Known, s: Selected) -> Tensor:
    """The labels of D_u of what the paper is compared with or builds on; as labels_of."""
    weak, every = prep.transfer.weak, prep.supervised.every
    match method:
        case "logconf" | "product":
            return weak
        case "confidence-only":
            return torch.where(surer(weak), weak, torch.nan)
        case "fused":
            return fused(prep, known.learn, known.transfer)
        case "trust":
            return trust(prep, known.transfer)
        case "ensemble":        # the finetune-ensemble row of Lang et al. 2025, arXiv 2501.13124
            return every.nanmean(0)
        case "raven":
            return every.T
        case "two-stage":
            return two_stage(setup, prep)
        case "label-model":
            return label_model(torch.cat([every, prep.transfer.own[None]]))[0]
        case "debate":
            return debate(setup, prep).nanmean(0)
        case "chain":           # weak -> student -> student
            return student("naive", setup, prep, known, s).transfer
        case "oracle":          # a router that knows where the own label is right: not attainable
            knows = [(part.own == hidden_truth(part)).float() for part in (prep.learn, prep.transfer)]
            return select(replace(setup.config, tau=0.5), prep, *knows).selective
    raise ValueError(method)


def log_confidence(p: Tensor, w: Tensor, fraction: float, a_max: float = 0.5, ramp: float = 0.2) -> Tensor:
    """Target of Burns' auxiliary confidence loss: (1 - a) w + a 1[p > t], t making as many of a batch
    positive as the weak labels' sum says (rounded half to even; ties of p to the lower index); a grows
    linearly to a_max in the first fifth of steps, no jump."""
    a = a_max * min(1.0, fraction / ramp)
    positives = int(round(float(w.mean()) * len(w)))
    hard = torch.zeros_like(w)
    hard[p.argsort(descending=True, stable=True)[:positives]] = 1
    return (1 - a) * w + a * hard


def product(p: Tensor, w: Tensor, fraction: float) -> Tensor:
    """Target: student times weak probability, renormalised, at every fraction of the steps alike (Lang et al.
    2025, arXiv 2501.13124); of hard labels these labels, naive's."""
    yes, no = p * w, (1 - p) * (1 - w)
    return yes / (yes + no).clamp_min(1e-12)


def surer(labels: Tensor, share: float = 0.5) -> Tensor:
    """(n,) bool, the more confident share of each class that labels (n,) predict, so that their balance
    survives [D10]."""
    sure, out = (labels - 0.5).abs(), torch.zeros_like(labels, dtype=torch.bool)
    for of_class in ((labels > 0.5).nonzero()[:, 0], (labels <= 0.5).nonzero()[:, 0]):
        surest = sure[of_class].argsort(descending=True, stable=True)
        out[of_class[surest[:math.ceil(share * len(of_class))]]] = True
    return out


def trust(prep: Prepared, p_ik: Tensor) -> Tensor:
    """Per-item router, the symmetric form: own label where P(IK) (n_u,) >= P(weak right), a second probe."""
    learn, transfer = prep.learn, prep.transfer
    right = (learn.weak > 0.5) == (learn.truth > 0.5)
    probe = fit_probe(learn.item_state[:, -1], right.double(), fold=learn.fold)
    return route(p_ik, transfer.own, transfer.weak, probe.predict(transfer.item_state[:, -1]))[0]


def fused(prep: Prepared, p_learn: Tensor, p_transfer: Tensor) -> Tensor:
    """(n_u,) P(y = 1) by a logistic regression on the weak log-odds, the strong model's log-odds of the
    candidate shown, P(IK) and their products, fitted on D_l's truth with cross-fitted weak labels. Beyond the
    paper: it weighs what the method chooses between."""
    def features(part, p_ik):
        weak, strong, known = log_odds(part.weak), log_odds(part.zero_shot), p_ik.double()
        return torch.stack([weak, strong, known, weak * strong, weak * known, strong * known], 1)
    probe = fit_probe(features(prep.learn, p_learn), prep.learn.truth, fold=prep.learn.fold)
    return probe.predict(features(prep.transfer, p_transfer)).float()


def raven() -> Callable:
    """The rule of RAVEN (its code at commit f959c17): targets are the supervisors' mean under weights on the
    simplex, which follow the gradient of the student's loss. For a tenth of the steps they are equal, and
    only items on which all supervisors agree are learnt from. Its image code's way of mixing probabilities
    with its text code's rate [D19]."""
    weight, used, last = None, None, -1.0       # next step's, this step's, its fraction

    def target(p, w, fraction, rate=1e-2, warm_up=0.1):     # w (B, S), NaN where one abstains
        nonlocal weight, used, last
        there, start = ~w.isnan(), torch.full_like(w[0], 1 / w.shape[1])
        if fraction > last:     # else the step starts anew for want of memory, with the weights it had
            used, last = start if weight is None else weight, fraction
        share = used * there
        mean = (share * w.nan_to_num()).sum(1) / share.sum(1)
        if fraction < warm_up:
            agree = ((w > 0.5) | ~there).all(1) | ((w <= 0.5) | ~there).all(1)
            return torch.where(agree, mean, p)      # p itself: nothing to learn
        p = p.clamp(1e-6, 1 - 1e-6)[:, None]
        loss = -(w * p.log() + (1 - w) * (1 - p).log()).nanmean(0)          # (S,)
        loss = torch.where(loss.isnan(), loss.nanmean(), loss)      # who is silent in a batch neither wins
        weight = (used - rate * loss).clamp_min(1e-6)               # nor loses by it
        weight = weight / weight.sum()
        return mean
    return target


def two_stage(setup: Setup, prep: Prepared, share: float = 0.5, sure: float = 0.75) -> Tensor:
    """Two-stage filtering (arXiv 2503.04249) for classification, without its rewriting of questions: a
    student of the more consistent share of items (by the confidence of the supervisors' mean; of votes that
    is their agreement) labels the others; (n_u,) labels of the first and of those it is sure of [D19]."""
    mean, inputs = prep.supervised.every.nanmean(0), prep.transfer.inputs
    first = surer(mean, share)
    rows, others = first.nonzero()[:, 0], (~first).nonzero()[:, 0]
    if not len(others):
        return mean
    out = finetuned("two-stage first", setup, setup.strong, [inputs[i] for i in rows],
                    learnt(setup.config, mean[rows]), [[inputs[i] for i in others]], prep.seed)
    labels = torch.where(first, mean, torch.nan)
    labels[others] = torch.where((out.p[0] - 0.5).abs() >= sure - 0.5, out.p[0], torch.nan)
    return labels


def label_model(votes: Tensor) -> tuple[Tensor, Tensor]:
    """One-coin EM over votes (V, n) P(y = 1), NaN where one abstains: each voter is right with a probability
    of its own, .5 to .99, independently (Dawid and Skene 1979; in the place of WSGAN's encoder, arXiv
    2203.12023 [D19]). P(y = 1) (n,), float32, and the accuracies (V,) found."""
    there = (~votes.isnan()).double()
    sign = (2.0 * (votes > 0.5) - 1) * there                                # +1 yes, -1 no, 0 abstains
    p = 0.5 + 0.5 * sign.sum(0) / there.sum(0).clamp_min(1)                 # the majority's share
    for _ in range(1000):
        voted_right = (sign > 0) * p + (sign < 0) * (1 - p)                 # (V, n)
        right = (voted_right.sum(1) / there.sum(1).clamp_min(1)).clamp(0.5, 0.99)
        before, p = p, torch.sigmoid(log_odds(p.mean()) + (sign * log_odds(right)[:, None]).sum(0))
        if (p - before).abs().max() < 1e-9:
            break
    return p.float(), right


def debate(setup: Setup, prep: Prepared) -> Tensor:
    """(S, n_u) labels by supervisors that read a transcript, "transcripts" of the task's file, each its own,
    in front of every question (arXiv 2501.13124, whose transcripts come from debates of strong models)."""
    out, truth = prep.supervised.every.clone(), prep.labelled.truth
    for i, supervisor in enumerate(setup.supervisors):
        texts = []
        for part in (prep.labelled, prep.transfer, prep.test):
            pairs = zip(part.questions, part.items)
            texts.append(["\n".join([*q.transcripts[i:i + 1], item.text]) for q, item in pairs])
        inputs = classified(f"debate {i + 1}", setup, supervisor.model, texts)
        out[i] = trained_labels(f"debate {i + 1}", setup, supervisor, inputs, truth, prep.seed).p[0]
    return out
