"""The configuration of a run and its command line; nothing slow is imported, so --help is instant."""
from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict, dataclass, field, fields

METHOD_NAMES = ("weak", "ceiling", "naive", "logconf", "product", "confidence-only", "self-only",
                "strong-on-D_l", "graph-only", "route-only", "selective", "trust", "chain", "oracle")
DEFAULT_METHODS = ("weak", "ceiling", "naive", "self-only", "strong-on-D_l", "graph-only", "route-only",
                   "selective")
EXAMPLES = """examples:
  python selw2s.py --task demo                                        under a minute on two cores, no download
  python selw2s.py --task demo --methods all --seeds 0 1 2 3 4 5      every control, six seeds: minutes
  python selw2s.py --task sciq --weak openai-community/gpt2 --strong openai-community/gpt2-large --device cuda
"""


def number(text: str):
    """'auto', an int or a float: the value of --tau, --alpha, --k and --lr. argparse shows its name."""
    return text if text == "auto" else float(text) if any(c in text for c in ".einf") else int(text)


def option(default, help: str, **kwargs):
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; the flags of the command line are generated from it."""
    task: str = option("demo", "demo (= demo-sciq), demo-boolq, demo-cosmosqa (synthetic, with their own two "
                               "models), sciq, boolq, cosmosqa, or FILE.jsonl")
    weak: str = option("", "weak model: directory or hub id (the demo tasks bring their own)",
                       metavar="MODEL")
    strong: str = option("", "strong pretrained model: directory or hub id", metavar="MODEL")
    methods: tuple = option(DEFAULT_METHODS, "all, or some of: " + " ".join(METHOD_NAMES), nargs="+",
                            metavar="METHOD", choices=METHOD_NAMES + ("all",))
    seeds: tuple = option((0,), "one run each: halves, training order", nargs="+", type=int, metavar="SEED")
    protocol: str = option("paper", "items and halves: balanced and disjoint by passage, or draw for draw as "
                                    "OpenAI's code [D12]", choices=("paper", "openai"))
    shots: int = option(0, "solved examples from D_l in front of each question the strong model answers [D2]")
    own: str = option("sum", "self-generated answer by option likelihood: summed, per token, less the "
                             "option's unconditional one, or by judging the shown candidate [D1]",
                      choices=("sum", "mean", "pmi", "judge"))
    target: str = option("hard", "what P(IK) is trained on: answer right or not, or p(gold) [D3]",
                         choices=("hard", "soft"))
    tau: object = option("auto", "P(IK) from which the own label is used; auto: cross-fitted weak accuracy "
                                 "on D_l [D4]", metavar="X")
    anchors: int = option(1, "1: routed own labels stand in Y while the others are smoothed, "
                             "0: weak labels only [D5]", choices=(0, 1))
    alpha: object = option("auto", "smoothing, 0 = off; auto: chosen on D_l [D6]", metavar="X")
    k: object = option("auto", "neighbours; auto: chosen on D_l [D6]", metavar="N")
    gamma: float = option(3.0, "exponent of the affinity, max(0, cosine)^gamma")
    tune: str = option("full", "what finetuning trains", choices=("full", "lora", "head"))
    epochs: int = option(2, "passes over the training items")
    batch: int = option(32, "items per update")
    lr: object = option("auto", "learning rate; auto: by size of the model [D9]", metavar="X")
    analysis: str = option("", "after the methods: P(IK) across tasks, across difficulties, "
                               "or tau, alpha, k varied", choices=("cross-task", "difficulty", "sweep"))
    difficulty: str = option("weak", "whose loss makes an item hard in --analysis difficulty",
                             choices=("weak", "strong"))
    keep: str = option("", "save this method's students in Hugging Face layout under <out>/students",
                       choices=METHOD_NAMES, metavar="METHOD")
    limit: int = option(0, "use at most this many train and this many test questions (0: all)")
    device: str = option("cpu", "cpu, cuda, cuda:1 ...")
    dtype: str = option("float32", "dtype of the pretrained weights",
                        choices=("float32", "bfloat16", "float16"))
    data_dir: str = option("", "official files (default $SELW2S_DATA, then ~/.cache/selw2s)", metavar="DIR")
    rerun: str = option("", "repeat the run of a result.json and compare: every other flag but --out, "
                            "--data-dir is taken from it", metavar="FILE")
    out: str = option("runs", "results and the stage cache go here", metavar="DIR")


LIMITS = {  # flag: can its value be used (NaN compares false), what it must be
    "tau": (lambda x: 0 <= x < 1e9, "a number from 0 (above 1: never the own label)"),
    "alpha": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
    "k": (lambda x: type(x) is int and x > 0, "a whole number from 1"),
    "gamma": (lambda x: 0 <= x < 1e9, "a number from 0"),
    "lr": (lambda x: 0 < x < float("inf"), "a positive number"),
    **dict.fromkeys(("epochs", "batch"), (lambda x: 0 < x < 2 ** 31, "a whole number from 1 to 2147483647")),
    **dict.fromkeys(("shots", "limit"), (lambda x: 0 <= x < 2 ** 31, "a whole number from 0 to 2147483647")),
    "seeds": (lambda x: x and all(0 <= s < 2 ** 63 for s in x) and len(set(x)) == len(x),
              "different numbers from 0")}


def problem(config: Config) -> str:
    """The first value that cannot be used and what it must be; "" if all can. Types count too: the
    configuration may come from a file."""
    for f in fields(Config):
        value, (good, need) = getattr(config, f.name), LIMITS.get(f.name, (lambda x: True, ""))
        if value == f.default:
            continue
        if choices := f.metadata.get("choices"):
            good = lambda x: set(x if f.type == "tuple" else [x]) <= set(choices)       # noqa: E731
            need = "of " + ", ".join(map(str, choices))
        try:
            fine = (f.type == "object" or type(value).__name__ == f.type) and good(value)
        except TypeError:
            fine = False
        if not fine:
            return f"--{f.name.replace('_', '-')} {value!r:.40}: must be {need or f.type}"
    if "weak" not in config.methods:
        return "--methods: weak must be among them"
    if config.keep and config.keep not in config.methods:
        return f"--keep {config.keep}: is not among --methods {' '.join(config.methods)}"
    return ""


def shown(config: Config) -> str:
    """The resolved configuration as the program prints it first."""
    words = (f"{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
             for name, v in asdict(config).items() if v != "")
    return textwrap.fill("config    " + " ".join(words), 110, subsequent_indent=" " * 10,
                         break_long_words=False, break_on_hyphens=False)


def parse(argv: list[str] | None = None) -> Config:
    """Config from the command line; a wrong flag ends the program with one line and exit code 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="selw2s.py", allow_abbrev=False, epilog=EXAMPLES, formatter_class=formatter,
        description="Selective weak-to-strong generalization: finetune a strong model on a weak model's "
                    "labels, on its own\n"
                    "answers where it probably knows (P(IK)), and on graph-smoothed weak labels elsewhere.")
    for f in fields(Config):
        spec = dict(f.metadata)
        kind = {"int": int, "float": float, "object": number}.get(f.type, str)
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        if shown not in ("", 0):
            spec["help"] += f" (default: {'default set' if f.name == 'methods' else shown})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **{"type": kind, **spec})
    parser._get_formatter = lambda: formatter("selw2s.py", width=118, max_help_position=24)
    parser.error = lambda text: parser.exit(2, f"selw2s.py: error: {' '.join(text.split())}\n")  # no usage
    values = vars(parser.parse_args(argv))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if "all" in values["methods"]:
        values["methods"] = METHOD_NAMES
    values["methods"] = tuple(m for m in METHOD_NAMES if m == "weak" or m in values["methods"])
    config = Config(**{**values, "task": "demo-sciq" if values["task"] == "demo" else values["task"]})
    if line := problem(config):
        parser.error(line)
    if config.rerun:
        return config
    if not config.task.startswith("demo-") and not (config.weak and config.strong):
        parser.error(f"--task {config.task} needs --weak MODEL and --strong MODEL "
                     "(only the demo tasks bring their own)")
    if config.task.endswith(".jsonl") and config.analysis == "cross-task":
        parser.error("--analysis cross-task needs a demo or an official task")
    return config
