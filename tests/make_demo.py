"""The text of the demo world, and the checkpoints pretrained on it: data/demo, or a pair for real SciQ.

How the world was tuned: by hand, until on demo-sciq the weak model lay between 0.60 and 0.75 and the ceiling
at least 0.12 above it. The levers were the fame of people, the number of question, gossip and statement
lines, and the models' sizes and epochs, judged by test accuracy; the method's own settings stayed at their
defaults.
Tried and given up: 480 people half as famous (a smaller gap, a worse P(IK)); thousands of short passages with
a question each, in every edition or in some (the weak model still cannot look an answer up, and knows less):
so on demo-boolq the weak supervisor is at chance, and naive with it.
An edition is one pass of pretraining: the same facts, about as often, in newly drawn words. The tasks' own
question lines never enter the text; their facts do, as statements and as rumours called right or wrong,
without which models this small recall an answer but cannot judge one.

    python tests/make_demo.py                                   text, tokenizer and both models -> data/demo
    python tests/make_demo.py --show                            forty lines of the text, nothing built
    python tests/make_demo.py --text sciq --out DIR [--data-dir DIR]    two from SciQ's own paragraphs
"""
import argparse
import io
import json
import random
import re
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model
from data import Question, architecture, checkpoint, completion, official, prompt
from data.world import RELATIONS, SEED, Person, boolq, call, capital, cosmosqa, people, sciq, wrong_values


def statement(p: Person, relation: str, rng) -> str:
    return capital(rng.choice(RELATIONS[relation]["says"]).format(e=call(p, rng, 0.3), v=p.facts[relation]))


def rumour(p: Person, relation: str, crowd, rng) -> str:
    """A true or a false statement that ends on its value, and the verdict."""
    right = rng.random() < 0.5
    v = p.facts[relation] if right else wrong_values(p, relation, crowd, rng, 1)[0]
    says = rng.choice([s for s in RELATIONS[relation]["says"] if s.endswith("{v}.")])
    return f"Rumour: {says[:-1].format(e=call(p, rng, 0.3), v=v)} {'Right' if right else 'Wrong'}."


def quiz(q: Question, rng) -> str:
    """The answer, or guesses with the quizmaster's verdict, every second one right."""
    wrong = rng.sample([i for i in range(len(q.options)) if i != q.answer], len(q.options) - 1)
    line = prompt(q)
    again = line[-3:] if line.endswith(" A:") else " Answer:"
    if rng.random() < 0.15:
        return line + completion(q, q.answer)
    while wrong and rng.random() < 0.5:
        line += completion(q, wrong.pop()) + " Wrong." + again
    return line + completion(q, q.answer) + " Right."


def world_text(edition: int) -> list[str]:
    """The lines of one edition."""
    crowd, rng, lines = people(), random.Random(f"text {SEED} {edition}"), []

    def times(mean):
        return range(int(mean + rng.random()))

    for p in crowd:
        for r in p.facts:
            lines += [statement(p, r, rng) for _ in times(p.fame)]
            lines += [rumour(p, r, crowd, rng) for _ in times(p.fame / 2)]
        often = 0.3 * p.fame
        lines += [quiz(rng.choice([*sciq(p, p.told, crowd, rng)]), rng) for _ in times(5 * often)]
        lines += [quiz(rng.choice([*cosmosqa(p, p.told, crowd, rng)]), rng) for _ in times(2 * often)]
        for _ in times(3 * often):
            *_, q = boolq(p, p.told, crowd, rng)
            lines.append(prompt(q._replace(context="")) + completion(q, q.answer))
        for _ in times(2 * often):
            first, *more = rng.sample([*boolq(p, p.told, crowd, rng)], 5)
            lines.append(prompt(first) + completion(first, first.answer) +
                         "".join(f"\nQuestion: {q.question}" + completion(q, q.answer) for q in more))
    rng.shuffle(lines)
    return lines


# ---- checkpoints -----------------------------------------------------------------------------------------

SHAPES = {"world": dict(weak=dict(width=64, layers=3, epochs=15),
                       strong=dict(width=128, layers=4, epochs=22)),
          "sciq": dict(weak=dict(width=64, layers=2, epochs=6), strong=dict(width=256, layers=4, epochs=14))}


def sciq_text(data_dir: str | None = None) -> list[str]:
    """SciQ's support paragraphs and the question-answer lines of its validation split. Paragraphs that hold a
    train or test question word for word, and validation questions that are also one, are left out."""
    with zipfile.ZipFile(io.BytesIO(official.content("sciq/SciQ.zip", data_dir))) as archive:
        rows = {name: json.loads(archive.read(f"SciQ dataset-2 3/{name}.json"))
                for name in ("train", "valid", "test")}
    asked = {official.key("", row["question"]) for name in ("train", "test") for row in rows[name]}
    seen, lines = set(), []
    for row in [row for split in rows.values() for row in split]:
        whole, sentences = official.key("", row["support"]), re.split(r"(?<=[.?!:]) ", row["support"])
        if row["support"] and whole not in seen and not asked & {official.key("", s) for s in sentences} and \
                official.key("", row["question"]) not in whole:
            lines.append(row["support"])
        seen.add(whole)
    return lines + [f"Q: {row['question']} A: {row['correct_answer']}" for row in rows["valid"]
                    if official.key("", row["question"]) not in asked]


def train_tokenizer(lines: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab` ids; id 0 ends a line."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return bpe


def untrained(vocab: int, width: int, layers: int, seed: int) -> tuple[dict, model.Transformer]:
    """-> the content of config.json, a llama of that shape: matrices N(0, 1 / fan-in), norms 1."""
    raw = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=vocab, hidden_size=width,
               intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=4,
               hidden_act="silu", max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=10000.0,
               tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, torch_dtype="float16")
    config, generator, params = architecture.configure(raw), torch.Generator().manual_seed(seed), {}
    for _, (name,), (shape,) in architecture.tensors(config):
        std = 0.05 if name == "embed.weight" else shape[-1] ** -0.5
        params[name] = torch.randn(shape, generator=generator) * std if len(shape) == 2 else torch.ones(shape)
    return raw, model.Transformer(config, params)


def pretrain(net: model.Transformer, text, bpe: Tokenizer, epochs: int, tell, lr=3e-3, tokens=1024) -> None:
    """Next-token prediction on text(0), text(1), ... in place: Adam, warm-up over 50 steps, then linear to 0.
    Lines never see each other; a step takes lines until it has `tokens` tokens."""
    optimiser = torch.optim.Adam(net.requires_grad_().parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    step, steps, start = 0, None, time.time()
    for epoch in range(epochs):
        rows = [encoding.ids + [0] for encoding in bpe.encode_batch(text(epoch))]
        steps = steps or epochs * sum(map(len, rows)) // tokens
        while rows:
            batch = []
            while rows and sum(map(len, batch)) < tokens:
                batch.append(rows.pop()[:512])
            x, lengths = model.pack([row[:-1] for row in batch], net.device)             # (P,)
            y, _ = model.pack([row[1:] for row in batch], net.device)                    # (P,)
            for group in optimiser.param_groups:
                group["lr"] = lr * min((step + 1) / 50, max(1 - step / steps, 0.01))
            loss = F.cross_entropy(net.logits(net.packed(x, lengths)[0]), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            left = (time.time() - start) / step * (steps - step) / 60
            tell(f"step {step}/{steps}  loss {loss.item():.3f}  {left:.1f} min left", step % 200 == 0)


def build(kind: str, out: Path, data_dir: str | None, seed: int) -> None:
    """Text, tokenizer and both checkpoints -> out/weak, out/strong."""
    lines = [] if kind == "world" else sciq_text(data_dir)

    def text(edition):
        return world_text(edition) if kind == "world" else random.Random(edition).sample(lines, len(lines))

    bpe = train_tokenizer(text(0), 2048 if kind == "world" else 4096)
    for name, shape in SHAPES[kind].items():
        def tell(line, end):
            if end or sys.stderr.isatty():
                print(f"\r{name}: {line}", end="\n" if end else "", file=sys.stderr, flush=True)

        raw, net = untrained(bpe.get_vocab_size(), shape["width"], shape["layers"], seed)
        pretrain(net, text, bpe, shape["epochs"], tell)
        (out / name).mkdir(parents=True, exist_ok=True)
        whole = checkpoint.export(net.config, net.params)
        tensors = {key: value.detach().half() for key, value in whole.items()}
        save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})
        (out / name / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        bpe.save(str(out / name / "tokenizer.json"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's two models, or two for SciQ.")
    parser.add_argument("--show", action="store_true", help="forty lines of the demo's text, nothing else")
    parser.add_argument("--text", choices=sorted(SHAPES), default="world", help="what to pretrain on")
    parser.add_argument("--out", type=Path, default=ROOT / "data/demo", help="default data/demo")
    parser.add_argument("--data-dir", help="where SciQ.zip lies, as in selw2s.py")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    args = parser.parse_args(argv)
    if args.show:
        print("\n".join(world_text(0)[:40]))
    else:
        build(args.text, args.out, args.data_dir, args.seed)


if __name__ == "__main__":
    main()
