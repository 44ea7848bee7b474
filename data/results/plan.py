"""What a run has ahead of it: --plan prints it before any weight is read, progress measures by it.

stages_of runs the method's own steps (selw2s.prepare, selw2s.student) with a Ledger in the place of
data.cache.Stages: it notes what every stage is given and gives values of the right shapes back, so a plan has
the stages of the run, with the run's own inputs. For --plan the models are Sketches, known by config.json and
tokenizer. Operations: work.py; bytes: memory.py.
"""
import math
import re
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from data.architecture import configure
from data.cache import digest
from data.checkpoint import check_device
from data.results.memory import Memory, held, of_finetuning, of_reading, of_states, shapes
from data.results.report import described
from data.tokens import TOKENIZER_FILES, LoadError, Tokenizer, read_json

PEAK = {        # operations a second by the data sheets: SXM, dense, float32 without TF32
    "A100": {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
    "H100": {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}}
USED = 0.4      # of that: what a GPU reaches that is fed well
FITTED = ("fused", "trust", "oracle")       # methods whose labels are fitted to values: here they have none
EXTRA = {       # students that an analysis trains per seed beside those of --methods, if there are any
    "": {}, "cross-task": {"selective": 9}, "cross-task of a file": {"selective": 16},
    "difficulty": {"selective": 3},
    "sweep": {"route-only": 9, "graph-only": 19}, "representation": {"ceiling": 1, "naive": 1}}


# ---- the stages of a run -----------------------------------------------------------------------------------

class Row(NamedTuple):
    """One stage. items and tokens: trained on, tokens in all epochs (a state counts as one), or read;
    operations also of the items that a student labels afterwards."""
    name: str
    kind: str           # as in data.cache.Progress
    items: int
    tokens: int
    operations: int
    memory: Memory


class Ledger:
    """Stands where data.cache.Stages stands: rows has a Row per stage, once where a run would find it in its
    cache the next time. networks: by the sha256 that stages depend on."""
    progress = None     # nothing is computed

    def __init__(self, networks: dict, devices: int, spread: bool):
        self.networks, self.rows, self.seen = networks, [], set()
        self.devices, self.spread = devices, spread and devices > 1
        self.weights = sum(held(network, devices if spread else 1) for network in networks.values())
        self.random = torch.Generator().manual_seed(0)

    def tell(self, line: str) -> None:
        """Nothing: these lines tell of values."""

    def made_up(self, n: int) -> torch.Tensor:
        """(n,) labels of no meaning, others each time."""
        return torch.rand(n, generator=self.random)

    def __call__(self, stage: str, name: str, depends: tuple, compute, *, cost: tuple, tokens: int,
                 steps: int = 0) -> dict:
        """As Stages: notes the stage; values of the right shapes, but hidden states, of width 0 or 1."""
        network, key = self.networks[depends[0]], digest(stage, *depends)
        if stage == "read":
            heads, tails, layers = depends[3:]
            items, options, read = len(heads), max(map(len, tails)), len(layers)
            memory = of_reading(network, self.weights, heads, tails, read)
            scores = torch.zeros(items, options)
            values = dict(loglik=scores, option_tokens=scores, prompt_state=torch.zeros(items, read, 0),
                          item_state=torch.zeros(items, options, read, 0))
        elif stage == "states":
            items, memory = len(depends[3]), of_states(network, self.weights, depends[3])
            made = torch.Generator().manual_seed(int(key[:15], 16))     # by these, stages are told apart
            values = {"state": torch.rand(items, 1, generator=made)}
        else:
            settings, inputs, _, _, ask, _ = depends[3:]
            items, memory = len(inputs), of_finetuning(
                network, self.weights, inputs, settings, self.devices, self.spread)
            values = {f"p{i}": self.made_up(len(part)) for i, part in enumerate(ask)} | {"weights": ""}
        if key not in self.seen:
            self.rows.append(Row(name, cost[0], items, tokens, cost[1], memory))
        self.seen.add(key)
        return values


def stages_of(setup) -> list[Row]:
    """All stages of a run on an empty cache, in its order; setup: selw2s.Setup. Exact but for confidence-only
    and two-stage, whose items follow from values. Not foreseen: what --analysis prepares beside students."""
    import selw2s       # here, as it imports this module
    models = [supervisor.model for supervisor in setup.supervisors] + [setup.strong]
    ledger = Ledger({model.sha256: model.network for model in models}, max(1, setup.config.plan),
                    bool(setup.config.spread))
    config = replace(setup.config, keep="")
    setup = setup._replace(config=config, stages=ledger)
    analysis = config.analysis
    if analysis == "cross-task" and config.task.endswith(".jsonl"):     # beside the three official tasks
        analysis = "cross-task of a file"
    for seed in config.seeds:
        prep = selw2s.prepare(setup, seed)
        inputs, ask = prep.transfer.inputs, [prep.transfer.inputs, prep.test.inputs]
        for method in config.methods:
            labels = ledger.made_up(len(inputs))
            if method in FITTED:
                selw2s.finetuned(method, setup, setup.strong, inputs, labels, ask, seed)
            elif method not in selw2s.ALWAYS:
                selected = selw2s.Selected(*[labels] * len(selw2s.Selected._fields))
                selw2s.student(method, setup, prep, None, selected)
        students = set(config.methods) > set(selw2s.ALWAYS) or analysis == "representation"
        for method, times in EXTRA[analysis].items() if students else ():
            for _ in range(times):
                selw2s.finetuned(method, setup, setup.strong, inputs, ledger.made_up(len(inputs)), ask, seed)
    return ledger.rows


def ahead(setup) -> dict[str, tuple[str, float, int]]:
    """{stage: (kind, operations of one, times)} of a run, for data.cache.Progress."""
    out = {}
    for row in stages_of(setup):
        _, one, times = out.get(row.name, (row.kind, 0.0, 0))
        out[row.name] = row.kind, (one * times + row.operations) / (times + 1), times + 1
    return out


# ---- --plan ------------------------------------------------------------------------------------------------

class Sketch(NamedTuple):
    """A network known by its config.json: what is counted of a model.Transformer."""
    config: object      # data.architecture.Config
    device: torch.device
    dtype: torch.dtype


def settings_of(source: str) -> Path:
    """A model's directory; of a hub id only config.json and the tokenizer's files are fetched."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None,
                                      allow_patterns=["config.json", *TOKENIZER_FILES]))
    except Exception as error:      # they come from three libraries and share no base class
        line = next(iter(str(error).strip().splitlines()), "")
        raise LoadError(f"{source}: no such directory, and the hub gives {type(error).__name__}: "
                        f"{line}") from None


def sketched(source: str, answers: bool, config):
    """selw2s.pretrained without weights."""
    import selw2s
    folder = settings_of(source)
    try:
        read = configure(read_json(folder / "config.json"))
        tokenizer = Tokenizer(folder, read.family, read.vocab)
    except LoadError as error:
        raise LoadError(f"{source}: {error}") from None
    device = torch.device("cuda" if config.device.startswith("cuda") else "cpu")
    network = Sketch(read, device, getattr(torch, config.dtype))
    large = sum(map(math.prod, shapes(read).values())) >= selw2s.LARGE
    return selw2s.Pretrained(network, tokenizer, source, 0.0, selw2s.passes(answers, config), large)


def speed(device: str, dtype: str, c, seconds: float = 1.0) -> tuple[str, float]:
    """The device, or cpu where it cannot be used, and how many operations a second its products do, of the
    shapes of that network's MLP up to 2048, timed for about that long."""
    try:
        check_device(device)
    except LoadError:
        device = "cpu"
    width, inner = min(2048, c.width), min(2048, c.inner)
    x, w = (torch.randn(*shape, device=device).to(getattr(torch, dtype))
            for shape in ((1024, width), (width, inner)))
    times, start = -1, time.perf_counter()
    while times < 1 or time.perf_counter() - start < seconds:
        float((x @ w)[0, 0])        # waits for a GPU
        times += 1
        if times == 0:              # the first one warms up
            start = time.perf_counter()
    return device, 2 * 1024 * width * inner * times / (time.perf_counter() - start)


def duration(operations: float, per_second: float) -> str:
    """Two digits, in the unit that suits."""
    seconds = operations / per_second
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length or unit == "h":
            return f"{seconds / length:,.{0 if seconds >= 10 * length else 1}f} {unit}"


def gigabytes(x: int) -> str:
    """Three digits below 100."""
    digits = 2
    if x < 1e9:
        digits = 3
    if x >= 1e10:
        digits = 1
    return f"{x / 1e9:.{digits}f}"


def total(name: str, rows: list[Row]) -> Row:
    """Work added; the memory of the stage that needs most."""
    work = (sum(column) for column in zip(*(row[2:5] for row in rows)))
    return Row(name, "", *work, max((row.memory for row in rows), key=Memory.peak))


def page(rows: list[Row], here: tuple[str, float], dtype: str, devices: int = 1) -> str:
    """The plan as it is printed: a line per stage, all seeds added (cross-0, cross-1 ... are one). here: see
    speed."""
    by_name = {}
    for row in rows:
        by_name.setdefault(re.sub(r"-\d+$", "", row.name), []).append(row)
    speeds = [here[1], *(devices * USED * peak[dtype] for peak in PEAK.values())]
    lines = [["stage", "items", "tokens", "operations", "weights", "grad.", "Adam", "activ.", "logits",
              "peak", "here", *(f"{devices} {gpu}" if devices > 1 else gpu for gpu in PEAK)]]
    for row in [*(total(name, same) for name, same in by_name.items()), total("all", rows)]:
        lines.append([row.name, f"{row.items:,}", f"{row.tokens:,}", f"{row.operations:.2e}",
                      *map(gigabytes, (*row.memory, row.memory.peak())),
                      *(duration(row.operations, per_second) for per_second in speeds)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = [" ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths)))
             for line in lines]
    note = (f"weights to peak: GB on each device when a stage needs most. here: {here[0]}, "
            f"{here[1] / 1e9:,.0f}e9 operations a second in {dtype} products; {' and '.join(PEAK)} at "
            f"{USED:.0%} of their peak. Not counted: probes, the graph, and time that is no product: small "
            "models on short texts take longer, two or three times on a CPU, ten times on a GPU.")
    return "\n".join([*table, "", textwrap.fill(note, 110)])


def plan(config) -> list[Row]:
    """--plan: prints what a run with this selw2s.Config would cost; DataError and LoadError as the run."""
    import selw2s
    print(described(config))
    if not config.device.startswith("cuda"):    # what a GPU would do can be planned without one
        check_device(config.device)
    setup, _ = selw2s.set_up(config, SimpleNamespace(tell=print), sketched)
    rows = stages_of(setup)
    here = speed(config.device, config.dtype, setup.strong.network.config)
    print("\n" + page(rows, here, config.dtype, config.plan))
    return rows
