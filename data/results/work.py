"""The work of a run in floating-point operations, from shapes alone: --plan tells it, progress measures by
it.

2 per multiplication and addition of a matrix product, as torch.utils.flop_counter counts them: attention's
products of T x T in full, their backward pass 2.5 times the forward one. A trained matrix costs its forward
pass three times, one beside LoRA twice, and once more where activations are computed again. What is no
product (norms, softmax, launching it all) is not counted. tests/test_plan.py holds this against the counter.

A network is a model.Transformer, or a plan.Sketch without weights: config, device and dtype are read. Inputs
are token sequences or states (of a Classifier) or model.Choices (of an Answerer, and of reading).
"""
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from data.architecture import Config, tensors
from data.many import shares
from model import ALIKE, BATCH_TOKENS, TRAIN_TOKENS, Choice, alike, batches

RANK = 8        # of LoRA: model.finetune's default


@functools.cache
def block(c: Config) -> dict[str, tuple]:
    """Shapes of a block's weights by part, as in q, q_norm; all blocks are alike."""
    return {name.split(".")[2]: shape for _, names, shapes in tensors(c) for name, shape in zip(names, shapes)
            if name.startswith("layers.0.") and name.endswith(".weight")}


def matrices(c: Config) -> dict[str, tuple[int, int]]:
    """Those of them that are matrices, (out, in)."""
    return {part: shape for part, shape in block(c).items() if len(shape) == 2}


def size(x) -> int:
    """Tokens of an input; a state counts as one."""
    if isinstance(x, torch.Tensor):
        return 1
    return len(x.prompt) + sum(map(len, x.options)) if isinstance(x, Choice) else len(x)


def scored(x) -> int:
    """States of an input that get logits: the end of a Choice's prompt, and each option's tokens but the
    last; none of a sequence."""
    return 1 + sum(map(len, x.options)) - len(x.options) if isinstance(x, Choice) else 0


def parted(inputs: list, budget: int) -> list[list]:
    """Inputs in batches of at most that many tokens, as model.py makes them."""
    return [[inputs[i] for i in part] for part in batches(list(map(size, inputs)), budget)]


def choices(heads: Sequence[list], tails: Sequence[list[list]]) -> list[Choice]:
    """What model.read reads, as inputs."""
    return [Choice(head, tail, 0) for head, tail in zip(heads, tails)]


# ---- of one batch ------------------------------------------------------------------------------------------

def linear(c: Config, tune: str, tokens: int, kept: int | None, backward: bool, first: bool) -> int:
    """Of one block's linear maps on tokens, of which kept go on after attention (None: all). first: LoRA
    needs no gradient below the first block's queries, keys and values."""
    total = 0
    for part, (rows, columns) in matrices(c).items():
        n = tokens if kept is None or part in ("k", "v") else kept
        rounds = 1 + 2 * backward
        if tune == "lora":
            below = backward and not (first and part in ("q", "k", "v"))
            total += 2 * n * RANK * (rows * (1 + 2 * backward) + columns * (1 + backward + below))
            rounds = 1 + below
        total += 2 * n * rows * columns * rounds
    return total


def looks(c: Config, lengths: list[int], kept: bool, least: float) -> int:
    """Of one block's attention: scores and weighted sums of the padded rectangles (model.Run)."""
    slots = sum(len(run) * max(run) * (1 if kept else max(run)) for run in alike(lengths, least))
    return 4 * slots * c.heads * c.head_dim


def logits(c: Config, inputs: list) -> int:
    """Of the classifier, or of the logits of Choices."""
    return sum(2 * c.width * (scored(x) * c.vocab if isinstance(x, Choice) else 2) for x in inputs)


def passed(network, inputs: list, tune: str, *, backward: bool = False, again: bool = False) -> int:
    """Of a batch through all blocks, forward, and backward if asked. again: the backward pass computes every
    block a second time. Of sequences only the last tokens go through all of the last block."""
    c, lengths, total = network.config, list(map(size, inputs)), 0
    keep, least = isinstance(inputs[0], list), ALIKE[network.device.type]
    kinds = Counter((i == 0, keep and i == c.layers - 1) for i in range(c.layers))
    for (first, last), times in kinds.items():
        kept, look = len(lengths) if last else None, looks(c, lengths, last, least)
        one = linear(c, tune, sum(lengths), kept, backward, first) + look
        if backward:
            one += int(look * (2.5 if c.attn_cap is None else 2))
        if again:       # but not what comes after the last input that is needed, mostly that of down
            one += linear(c, tune, sum(lengths), kept, False, first) + look
            if tune == "full" and "post2" not in block(c):
                one -= 2 * (kept or sum(lengths)) * c.inner * c.width
        total += times * one
    return total


# ---- of a stage --------------------------------------------------------------------------------------------

def forward(network, inputs: list, tune: str = "full") -> int:
    """Of forward passes over inputs, with their logits; states have theirs behind them."""
    if inputs and isinstance(inputs[0], torch.Tensor):
        return logits(network.config, inputs)
    return sum(passed(network, part, tune) + logits(network.config, part)
               for part in parted(inputs, BATCH_TOKENS[network.device.type]))


def reading(network, heads: Sequence[list], tails: Sequence[list[list]]) -> tuple[int, int]:
    """Operations and tokens of model.read."""
    inputs = choices(heads, tails)
    return forward(network, inputs), sum(map(size, inputs))


def updates(inputs: list, settings: dict, devices: int = 1) -> list[list[list]]:
    """The micro-batches of each update of an epoch, in the order of model.finetune's first; of several
    devices each one's own."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(settings["seed"]))
    steps = [[inputs[i] for i in step] for step in order.split(settings["batch"])]
    return [parted([step[i] for i in share], TRAIN_TOKENS) for step in steps
            for share in shares(list(map(size, step)), devices) if share]


def update(network, parts: list[list], settings: dict, rule: Callable | None) -> int:
    """Of one update, forward and backward passes of its micro-batches."""
    total, tune = 0, settings["tune"]
    for part in parts:      # logits of Choices: the head is not trained, but its products are made again
        total += passed(network, part, tune, backward=True, again=settings["checkpoint"])
        again = isinstance(part[0], Choice) and network.dtype.itemsize < 4      # by Transformer.logits itself
        total += logits(network.config, part) * (4 if again else 3)
    if rule is not None and len(parts) > 1:     # it needs the whole batch's p first
        total += sum(passed(network, part, tune) + logits(network.config, part) for part in parts)
    return total


class StageWork(NamedTuple):
    """Of one finetune stage, in operations; tokens: of all epochs of training."""
    training: int
    predicting: list[int]       # per list of inputs asked for
    tokens: int


def stage_work(network, inputs: list, ask: list[list], settings: dict, rule: Callable | None) -> StageWork:
    """As selw2s.finetuned takes them; settings of model.finetune, rule its target_fn."""
    tune, epochs = settings["tune"], settings["epochs"]
    if tune == "head":      # states once, if they are not there, then the classifier on them
        read = 0 if isinstance(inputs[0], torch.Tensor) else forward(network, inputs)
        training = read + 3 * epochs * logits(network.config, inputs)
    else:
        training = epochs * sum(update(network, parts, settings, rule) for parts in updates(inputs, settings))
    return StageWork(training, [forward(network, part, tune) for part in ask],
                     epochs * sum(map(size, inputs)))
