"""Peak memory of a stage in bytes, from shapes alone: what stands on the device at its worst moment.

Counted: the weights of both models, and for finetuning float32 masters, gradients, Adam's two moments (on
several devices a share of these, and two blocks gathered) and what autograd keeps of a micro-batch. Not
counted: the program itself (torch and tokenizers: about 0.5 GB), probes and graph, and what an allocator
leaves unused. tests/test_plan.py holds this against the memory of a process.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

from data.architecture import Config, tensors
from data.checkpoint import is_norm
from data.families import FAMILIES
from data.results.work import RANK, block, choices, matrices, parted, scored, size, updates
from model import BATCH_TOKENS, CELLS, HEAD_ROWS


class Memory(NamedTuple):
    """Bytes on the device."""
    weights: int        # both models, and float32 masters
    gradients: int = 0
    adam: int = 0
    activations: int = 0
    logits: int = 0

    def peak(self) -> int:
        """All together."""
        return sum(self)


def shapes(c: Config) -> dict[str, tuple]:
    """Canonical name -> shape of every parameter."""
    return {name: shape for _, names, sizes in tensors(c) for name, shape in zip(names, sizes)}


def inside(network) -> int:
    """Of the blocks' pretrained weights but their norms: what a spread network shares out."""
    return sum(math.prod(shape) for name, shape in shapes(network.config).items()
               if name.startswith("layers.") and not is_norm(name)) * network.dtype.itemsize


def held(network, devices: int = 1) -> int:
    """Of the pretrained weights, norms in float32; spread over devices: a share of the blocks, two of them
    gathered, and the rest; on a CPU the whole blocks beside it."""
    every = sum(math.prod(shape) * (4 if is_norm(name) else network.dtype.itemsize)
                for name, shape in shapes(network.config).items())
    if devices == 1:
        return every
    blocks, here = inside(network), network.device.type == "cpu"
    return every - blocks * (not here) + blocks // devices + 2 * blocks // network.config.layers


def trained(c: Config, tune: str) -> int:
    """Parameters that finetuning trains beside the embedding's rows and the classifier."""
    if tune == "lora":
        return sum(RANK * (rows + columns) for rows, columns in matrices(c).values()) * c.layers
    if tune == "head":
        return 0
    return sum(math.prod(shape) for name, shape in shapes(c).items()
               if name not in ("embed.weight", "head.weight"))


# ---- parts of the peak -------------------------------------------------------------------------------------

def saved(c: Config, tune: str, width: int, longest: int, kept: bool, masked: bool) -> int:
    """Per token, what one block keeps for its backward pass; width: bytes of a number. kept: it is the last,
    and only keys and values are of all tokens. masked: attention holds a mask of T x T."""
    parts, q, k = block(c), c.heads * c.head_dim, c.kv_heads * c.head_dim
    # a norm keeps its input in float32; RMSNorm also x / rms(x), for its gain
    norm = 8 if tune == "full" and not FAMILIES[c.family].get("layer_norm") else 4
    first = c.width * (norm * ("norm1" in parts) + width)
    qkv = 2 * q * width + norm * k * ("k_norm" in parts) + RANK * width * 3 * (tune == "lora")
    if kept:
        return first + qkv
    look = q * width * 3 + 4 * c.heads + norm * q * ("q_norm" in parts) + longest * width * masked
    if c.attn_cap is not None:
        look += c.heads * longest * (8 + width * (width < 4))
    middle = c.width * (norm * sum(part in parts for part in ("post1", "norm2", "post2")) + width)
    mlp = c.inner * width * (4 if "gate" in parts else 2) + RANK * width * 4 * (tune == "lora")
    return first + qkv + look + middle + mlp


def rope_table(c: Config) -> int:
    """Per token: cosines and sines."""
    return 8 * c.rope[1] if c.rope else 0


def pass_bytes(c: Config, tokens: int, states: int, width: int) -> int:
    """A forward pass without gradients: the residual stream before and after attention, and the MLP's or the
    attention's parts; `states` hidden states kept of all tokens."""
    parts = max(3 * c.inner, 7 * c.heads * c.head_dim)
    return tokens * (rope_table(c) + width * ((3 + states) * c.width + parts))


def logit_bytes(network, states: int, copies: int) -> int:
    """Logits of that many states, CELLS at a time."""
    if not states:
        return 0
    c, kind, cast = network.config, network.device.type, network.dtype.itemsize < 4
    cells = min(states * c.vocab, max(CELLS[kind], c.vocab))
    return 4 * cells * (copies + cast) + 4 * min(HEAD_ROWS[kind], c.vocab) * c.width * cast


# ---- of a stage: the moment that takes most --------------------------------------------------------------

def of_reading(network, weights: int, heads: Sequence[list], tails: Sequence[list], layers: int) -> Memory:
    """model.read, in the blocks or at the logits; weights: bytes of both models."""
    c, width, budget = network.config, network.dtype.itemsize, BATCH_TOKENS[network.device.type]
    parts = parted(choices(heads, tails), budget)
    most, states = (max(sum(map(of, part)) for part in parts) for of in (size, scored))
    out = 0     # the states it gives, of the prompt and every option: in the machine's memory
    if network.device.type == "cpu":
        out = len(heads) * (1 + max(map(len, tails))) * layers * c.width * width
    return max(Memory(weights, activations=out + pass_bytes(c, most, layers + 1, width)),
               Memory(weights, activations=out + most * (layers + 1) * c.width * width,
                      logits=logit_bytes(network, states, 2)), key=Memory.peak)


def of_states(network, weights: int, inputs: list) -> Memory:
    """One state of each input: of a sequence read, of a state (C,) there already."""
    c, width = network.config, network.dtype.itemsize
    reading = 0
    if isinstance(inputs[0], list):
        tokens = min(BATCH_TOKENS[network.device.type], sum(map(size, inputs)))
        reading = pass_bytes(c, tokens, 0, width)
    return Memory(weights, activations=reading + len(inputs) * c.width * width)


def of_finetuning(network, weights: int, inputs: list, settings: dict, devices: int = 1,
                  spread: bool = False) -> Memory:
    """model.finetune; weights: bytes of both models on each of the devices, whole or spread."""
    c, tune, width = network.config, settings["tune"], network.dtype.itemsize
    classifier, longest = isinstance(inputs[0], list), max(map(size, inputs))
    if tune == "head":
        return of_states(network, weights, inputs)
    rows = tune == "full" and classifier        # of the embedding: those in use are trained
    learnt = trained(c, tune) + (len(set().union(*inputs)) * c.width if rows else 0)
    cast = 2 * learnt if width < 4 and tune == "full" else 0    # masters in the dtype of the activations
    steps = updates(inputs, settings, devices)
    part = max((part for parts in steps for part in parts), key=lambda part: sum(map(size, part)))
    tokens = sum(map(size, part))
    layers = [saved(c, tune, width, longest, classifier and i == c.layers - 1,
                    not classifier or window is not None and window < longest)
              for i, window in enumerate(c.windows)]
    under_way = 2 * (c.inner + c.width) * width     # gradients in a block's MLP
    if settings["checkpoint"]:      # the blocks' inputs stay, and one block is computed again
        kept, cast = c.layers * c.width * width + rope_table(c), cast // c.layers
        backward = kept + max(layers) + under_way
    else:                           # a classifier's last block is gone when the first MLP's gradients come
        kept = sum(layers) + rope_table(c)
        backward = kept + max(0, under_way - layers[-1] * classifier)
    made = c.vocab * c.width * width * rows + learnt * width * (width < 4 or devices > 1)   # of the masters
    offloaded = settings["offload"] and network.device.type == "cuda"
    if spread:      # a student has its own shares; where all is trained, these are the masters'
        shares = 0 if offloaded else inside(network) // devices
        made = inside(network) // devices + made * (network.device.type == "cpu")
        weights += shares * (tune != "full")
    if devices > 1:     # two blocks, the gradients of one in both dtypes; the same of the embedding's rows
        blocks = trained(c, tune)
        cast = blocks // c.layers * (3 * width + 4) + 12 * (learnt - blocks)
        learnt = 0 if offloaded else -(-learnt // devices)
    masters = Memory(weights + 4 * learnt, adam=8 * learnt)
    earlier = 4 * learnt * any(len(parts) > 1 for parts in steps)       # gradients of earlier micro-batches
    predicting = parted(inputs, BATCH_TOKENS[network.device.type])[0]
    moments = [Memory(weights + made, activations=pass_bytes(c, sum(map(size, predicting)), 0, width),
                      logits=logit_bytes(network, sum(map(scored, predicting)), 2)),
               masters._replace(gradients=earlier, activations=tokens * kept + cast,
                                logits=logit_bytes(network, sum(map(scored, part)), 4)),
               masters._replace(gradients=earlier, activations=tokens * backward + cast),
               masters._replace(gradients=4 * learnt, activations=tokens * under_way),
               masters._replace(weights=masters.weights + made)]
    return max(moments, key=Memory.peak)
