"""Real tokens per second of model.py and of transformers (sdpa, batches of 32 padded to the longest,
attention mask), and the share of model.py's time that its matrix products alone would take.

Run: python tests/bench_model.py [--pairs 5] [--threads 2] [--shapes gpt2 llama pair/gemma-3-270m ...]
                                 [--lengths sciq cosmosqa 24 96]
Same weights, same process, runs of both in turn; a line gives the medians and the median ratio of the pairs.
Hidden states: the last token's final state of `--items` items. Reading (of sciq): the log-likelihood of every
option of `--items` questions, questions a second; transformers takes a sequence per option, 32 at a time, and
logits where an option's tokens are predicted. Finetuning: forward, backward and Adam on the
same batches of 32 in the same order, both sides timed from the end of their first step. A shape is a random
model of that shape, or a directory: a real one. Limit: torch.mm on the shapes of every linear layer (not of
attention), forward, and for finetuning twice backward, over the time of the whole. Lengths are those of real
items of ../shared/data in GPT-2 tokens, or one number for all; none: loading alone.
`--device cuda --dtype bfloat16 --shapes 1b` adds model FLOPs utilisation of a given `--peak` (TFLOP/s).
`--profile`: the ten operations in which finetuning spends most. About 15 minutes on two idle cores.
"""
import argparse
import copy
import csv
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import model as M  # noqa: E402
from make_results import keep_speed  # noqa: E402

SHARED = ROOT.parent / "shared"
SHAPES = {
    "gpt2": ("gpt2", dict(n_embd=384, n_layer=6, n_head=6)),
    "gpt2-small": ("gpt2", dict()),
    "llama": ("llama", dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
                            num_attention_heads=6, num_key_value_heads=6, vocab_size=50257,
                            max_position_embeddings=1024)),
    "1b": ("llama", dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                         num_attention_heads=32, num_key_value_heads=4, vocab_size=32000,
                         max_position_embeddings=2048)),
}


def sciq() -> list[dict]:
    """SciQ's training questions."""
    with zipfile.ZipFile(SHARED / "data/sciq/SciQ.zip") as file:
        return json.loads(file.read("SciQ dataset-2 3/train.json"))


def tokens_of(texts: list[str]) -> list[int]:
    """How many GPT-2 tokens each text has."""
    tokenizer = Tokenizer.from_file(str(SHARED / "hub/tokenizers/gpt2/tokenizer.json"))
    tokenizer.no_truncation()
    return [len(e.ids) for e in tokenizer.encode_batch(texts)]


def questions(items: int, vocab: int) -> tuple[list, list]:
    """Prompts and their options in random tokens, as long as SciQ's."""
    g = torch.Generator().manual_seed(2)

    def drawn(sizes):
        return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in sizes]
    asked = random.Random(0).sample(sciq(), items)
    prompts = drawn(tokens_of([f"Q: {q['question']} A:" for q in asked]))
    keys = ("correct_answer", "distractor1", "distractor2", "distractor3")
    options = drawn(tokens_of([f" {q[key]}" for q in asked for key in keys]))
    return prompts, [options[i:i + len(keys)] for i in range(0, len(options), len(keys))]


def lengths(kind: str, items: int) -> list[int]:
    """Lengths of items in a random order."""
    if kind.isdigit():
        return [int(kind)] * items
    rng, texts = random.Random(0), []
    if kind == "sciq":
        for q in sciq():
            answer = rng.choice([q["correct_answer"], q["distractor1"], q["distractor2"], q["distractor3"]])
            texts.append(f"Q: {q['question']} A: {answer}")
    else:
        with open(SHARED / "data/cosmosqa/valid.csv", encoding="utf-8", newline="") as file:
            for q in csv.DictReader(file):
                answer = q[f"answer{rng.randrange(4)}"]
                texts.append(f"Context: {q['context']}\nQuestion: {q['question']}\nAnswer: {answer}")
    return tokens_of(rng.sample(texts, items))


def pad(sequences, device):
    n = torch.tensor([len(s) for s in sequences], device=device)
    tokens = torch.zeros(len(sequences), int(n.max()), dtype=torch.int64)
    for i, s in enumerate(sequences):
        tokens[i, :len(s)] = torch.tensor(s)
    return tokens.to(device), (torch.arange(tokens.shape[1], device=device) < n[:, None]).long(), n - 1


class Theirs:
    def __init__(self, whole, fused):
        self.net, self.head, self.fused = whole.base_model, whole.get_output_embeddings(), fused

    def last(self, sequences):
        tokens, mask, at = pad(sequences, self.net.device)
        x = self.net(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return x[torch.arange(len(at), device=at.device), at]

    @torch.no_grad()
    def hidden(self, sequences):
        return torch.cat([self.last(sequences[a:a + 32]) for a in range(0, len(sequences), 32)])

    @torch.no_grad()
    def loglik(self, prompts, options):
        """(Q, O): a sequence per option, logits at its tokens alone."""
        pairs, out = [(p, o) for p, each in zip(prompts, options) for o in each], []
        for a in range(0, len(pairs), 32):
            part = pairs[a:a + 32]
            tokens, mask, _ = pad([p + o for p, o in part], self.net.device)
            x = self.net(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            row = torch.tensor([i for i, (_, o) in enumerate(part) for _ in o])
            at = torch.tensor([len(p) + j for p, o in part for j in range(len(o))])
            logp = self.head(x[row, at - 1]).float().log_softmax(-1)
            score = logp.gather(1, tokens[row, at][:, None])[:, 0]
            out += [part.sum() for part in score.split([len(o) for _, o in part])]
        return torch.stack(out).view(len(prompts), -1).double().cpu()

    def train(self, sequences, targets, seed, tick):
        head = torch.nn.Linear(self.net.config.hidden_size, 2, bias=False).to(self.net.device)
        torch.nn.init.zeros_(head.weight)
        adam = torch.optim.Adam([*self.net.parameters(), *head.parameters()], lr=1e-6, fused=self.fused)
        for rows in torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).split(32):
            z = head(self.last([sequences[i] for i in rows]).to(head.weight.dtype)).float()
            w = targets[rows].to(z.device)
            F.cross_entropy(z, torch.stack([1 - w, w], 1)).backward()
            adam.step()
            adam.zero_grad()
            tick()


def timed(work, device, clock) -> float:
    """Seconds of work(tick), from its first tick on if it ticks."""
    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return clock()

    ticks = [now()]
    work(lambda: ticks.append(now()))
    return (ticks[-1] - ticks[1]) if len(ticks) > 1 else now() - ticks[0]


def packs(sequences, budget: int) -> list[int]:
    """Tokens of every batch that model.py makes of them."""
    sizes = [len(s) for s in sequences]
    return [sum(sizes[i] for i in batch) for batch in M.batches(sizes, budget)]


def products(net, packs: list[int], backward: bool):
    """The matrix products of every linear layer on packs of so many tokens, and nothing else."""
    weights = [w for name, w in net.params.items() if name.startswith("layers.") and w.ndim == 2]
    most, size = max(packs), {n for w in weights for n in w.shape}
    x = {n: torch.randn(most, n, device=net.device).to(net.dtype) for n in size}
    for tokens in packs:
        for w in weights:
            out, into = x[w.shape[0]][:tokens], x[w.shape[1]][:tokens]
            torch.mm(into, w.T)
            if backward:
                torch.mm(out, w), torch.mm(out.T, into)


def head_products(net, prompts, options):
    """The head's product on every state that predicts a token of an option, once each."""
    states = sum(1 + sum(len(o) - 1 for o in each) for each in options)
    head = net.embed.weight if net.head.weight is None else net.head.weight
    step = max(1, M.CELLS[net.device.type] // len(head))
    x = torch.randn(step, head.shape[1], device=net.device)
    for a in range(0, states, step):
        torch.mm(x[:states - a], head.T.float())


def pairs(name, count, tokens, flops, a, clock, ours, theirs, limit, unit="tokens/s"):
    runs = (theirs, ours, lambda tick: limit())
    for run in runs:
        timed(run, a.device, clock)
    seconds = [[timed(run, a.device, clock) for run in runs] for _ in range(count)]
    their, our, _ = (tokens / statistics.median(column) for column in zip(*seconds))
    ratios, limits = sorted(x / y for x, y, _ in seconds), sorted(z / y for _, y, z in seconds)
    used = f", {flops * our / a.peak / 1e10:.1f} % of peak" if a.peak else ""
    print(f"{name:28s} transformers {their:9.0f}  model.py {our:9.0f} {unit}  ratio "
          f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {count} pairs){used}; "
          f"limit {statistics.median(limits):.2f} ({limits[0]:.2f} to {limits[-1]:.2f})", flush=True)
    keep(name, unit, our, their, ratios, a, limit=statistics.median(limits))


def keep(name, unit, our, their, ratios, a, **more):
    """With --keep, a row of data/results/speed.json; ratios (sorted): how many times as fast, or as small."""
    if a.keep:
        device = f"CPU, {a.threads} threads" if a.device == "cpu" else torch.cuda.get_device_name()
        keep_speed({"what": f"{name}, {a.dtype}", "peer": "transformers", "device": device, "unit": unit,
                    "ours": our, "theirs": their, "pairs": len(ratios),
                    "times": [statistics.median(ratios), ratios[0], ratios[-1]],
                    "command": shlex.join(["python", "tests/bench_model.py", *sys.argv[1:]]), **more})


LOAD = """
import sys, time
sys.path.insert(0, {root!r})
import torch, transformers, model
from transformers import AutoModelForCausalLM, AutoTokenizer
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
if {ours}:
    kept = model.load({folder!r}, dtype=torch.{dtype})
else:
    kept = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.{dtype})
    AutoTokenizer.from_pretrained({folder!r})
print(time.perf_counter() - start, (status("VmHWM") - before) * 1024 / 1e6)
"""


def loading(shape: str, a):
    """Seconds, and peak memory in MB, of loading model and tokenizer into a process of its own (Linux)."""
    def once(ours):
        code = LOAD.format(root=str(ROOT), folder=shape, dtype=a.dtype, ours=ours)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return [float(x) for x in done.stdout.split()[-2:]]
    rows = [(once(True), once(False)) for _ in range(a.pairs + 1)][1:]     # the first one fills the cache
    for i, (what, unit) in enumerate((("load", "s"), ("memory of loading", "MB"))):
        our, their = (statistics.median(row[side][i] for row in rows) for side in (0, 1))
        ratios = sorted(theirs[i] / ours[i] for ours, theirs in rows)
        print(f"{shape} {what}: transformers {their:.2f}, model.py {our:.2f} {unit}", flush=True)
        keep(f"{shape} {what}", unit, our, their, ratios, a)


def both(shape: str, a):
    """model.py's and transformers' model of one shape, same weights."""
    if shape not in SHAPES:
        dtype = getattr(torch, a.dtype)
        ours, _ = M.load(shape, device=a.device, dtype=dtype)
        return ours, transformers.AutoModelForCausalLM.from_pretrained(shape, dtype=dtype,
                                                                       attn_implementation="sdpa")
    kind, numbers = SHAPES[shape]
    config = transformers.AutoConfig.for_model(kind, **numbers)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(folder + "/tokenizer.json")
        return M.load(folder, device=a.device, dtype=getattr(torch, a.dtype))[0], net


def reading(shape, ours, theirs, a, clock):
    """Questions a second, the log-likelihood of every option."""
    prompts, options = questions(a.items, ours.config.vocab)
    mine, its = M.read(ours, prompts[:16], options[:16]).loglik, theirs.loglik(prompts[:16], options[:16])
    error = (mine - its).abs().max() / its.abs().max()
    assert error < (3e-6 if a.dtype == "float32" else 0.005), error
    sizes = [[0] * (len(p) + sum(map(len, each))) for p, each in zip(prompts, options)]

    def limit():
        products(ours, packs(sizes, a.batch_tokens), False)
        head_products(ours, prompts, options)
    pairs(f"{shape} sciq reading", a.pairs, len(prompts), 0, a, clock,
          lambda tick: M.read(ours, prompts, options, batch_tokens=a.batch_tokens),
          lambda tick: theirs.loglik(prompts, options), limit, "questions/s")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--items", type=int, default=256)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--shapes", nargs="+", default=["gpt2", "llama"],
                   help=f"of {', '.join(SHAPES)}, or directories of models")
    p.add_argument("--lengths", nargs="*", default=["sciq", "cosmosqa", "24", "96"])
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--batch-tokens", type=int)
    p.add_argument("--train-tokens", type=int, default=M.TRAIN_TOKENS)
    p.add_argument("--peak", type=float, help="TFLOP/s of the device in this dtype")
    p.add_argument("--fused-adam", action="store_true", help="give transformers the fused Adam as well")
    p.add_argument("--profile", action="store_true", help="the ten operations that finetuning spends most on")
    p.add_argument("--keep", action="store_true", help="rows into data/results/speed.json")
    p.add_argument("--cpu-time", action="store_true",
                   help="count CPU seconds, for a machine that others use (one thread)")
    a = p.parse_args()
    a.batch_tokens = a.batch_tokens or M.BATCH_TOKENS[a.device]
    clock = time.process_time if a.cpu_time else time.perf_counter
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    for shape in a.shapes:
        if shape not in SHAPES and a.device == "cpu":
            loading(shape, a)
        ours, net = both(shape, a)
        config = net.config
        theirs = Theirs(net.eval().to(a.device, getattr(torch, a.dtype)), a.fused_adam or None)
        start = copy.deepcopy(theirs.net.state_dict())
        weights = sum(x.numel() for name, x in ours.params.items() if name.startswith("layers"))
        for length in a.lengths:
            g = torch.Generator().manual_seed(1)
            sequences = [torch.randint(0, config.vocab_size, (n,), generator=g).tolist()
                         for n in lengths(length, a.items)]
            targets = torch.rand(a.items, generator=g)
            theirs.net.load_state_dict(start)
            mine, its = M.hidden_at(ours, sequences[:64]).float(), theirs.hidden(sequences[:64]).float()
            error = (mine - its).abs().max() / its.abs().max()
            assert error < (1e-4 if a.dtype == "float32" else 0.1), error
            padded = sum(32 * max(map(len, sequences[i:i + 32])) for i in range(0, a.items, 32))
            print(f"{shape} {length}: {a.items} items, "
                  f"padding costs {padded / sum(map(len, sequences)):.2f} x")
            order = torch.randperm(a.items, generator=torch.Generator().manual_seed(0)).split(32)
            pairs(f"{shape} {length} hidden", a.pairs, sum(map(len, sequences)), 2 * weights, a, clock,
                  lambda tick: M.hidden_at(ours, sequences, batch_tokens=a.batch_tokens),
                  lambda tick: theirs.hidden(sequences),
                  lambda: products(ours, packs(sequences, a.batch_tokens), False))
            if length == "sciq":
                reading(shape, ours, theirs, a, clock)
            timed_tokens = sum(len(sequences[i]) for rows in order[1:] for i in rows)
            pairs(f"{shape} {length} finetune", a.pairs, timed_tokens, 6 * weights, a, clock,
                  lambda tick: M.finetune(ours, sequences, targets, lr=1e-6, epochs=1, seed=0,
                                          batch_tokens=a.train_tokens, progress=lambda *_: tick()),
                  lambda tick: theirs.train(sequences, targets, 0, tick),
                  lambda: products(ours, [n for rows in order[1:] for n in packs(
                      [sequences[i] for i in rows], a.train_tokens)], True))
            if a.profile:
                with torch.profiler.profile() as profile:
                    M.finetune(ours, sequences, targets, lr=1e-6, epochs=1, seed=0)
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=10,
                                                   max_name_column_width=50))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
