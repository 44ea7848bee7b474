"""What --plan says of public pairs up to 72B: data/results/plan.json, of which make_results.py makes tables.

    python tests/make_plan.py TOKENIZERS    minutes; two folders in there, gpt2 and qwen, with the tokenizer's
                                            files of GPT-2 and of Qwen2.5 (first Qwen: the same ids)

Full official data from $SELW2S_DATA. Of CosmosQA it needs the validation file alone: its questions, over and
over, stand for the 25,262 of training. Their config.json is given below as far as it bears on cost.
"""
import csv
import io
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import selw2s
from data import official
from data.results.memory import Memory

QWEN = {"model_type": "qwen", "no_bias": True, "seq_length": 2048}
QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768, "use_sliding_window": False}
SHAPES = {          # hub id: config.json
    "openai-community/gpt2": {"model_type": "gpt2"},
    "openai-community/gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "Qwen/Qwen-7B": QWEN | {"hidden_size": 4096, "intermediate_size": 22016},
    "Qwen/Qwen-14B": QWEN | {"hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 40,
                             "num_attention_heads": 40, "vocab_size": 152064},
    "Qwen/Qwen2.5-0.5B": QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
    "Qwen/Qwen2.5-7B": QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064},
    "Qwen/Qwen2.5-72B": QWEN2 | {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064}}
HALF = ("--dtype", "bfloat16")
GPT2 = ("openai-community/gpt2", "openai-community/gpt2-large")
SMALL, PAPER = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"), ("Qwen/Qwen-7B", "Qwen/Qwen-14B")
LARGE = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-72B")
LORA = ("--tune", "lora", *HALF)
PLANS = [           # task, (weak, strong), other flags, devices; the first three are the README's commands
    ("sciq", GPT2, (), 1), ("boolq", SMALL, LORA, 1), ("cosmosqa", PAPER, LORA, 1),
    ("sciq", SMALL, LORA, 1), ("sciq", SMALL, (*LORA, "--student", "answer"), 1),
    ("sciq", SMALL, HALF, 1), ("sciq", SMALL, HALF, 4), ("sciq", SMALL, HALF, 8),
    ("sciq", PAPER, LORA, 1), ("sciq", PAPER, HALF, 1), ("sciq", PAPER, HALF, 8), ("sciq", PAPER, HALF, 64),
    ("sciq", PAPER, (*HALF, "--spread", "1"), 8), ("cosmosqa", PAPER, (*HALF, "--spread", "1"), 8),
    ("sciq", LARGE, ("--tune", "head", *HALF), 1), ("sciq", LARGE, LORA, 1), ("sciq", LARGE, HALF, 1),
    ("sciq", LARGE, (*LORA, "--spread", "1"), 8), ("sciq", LARGE, (*HALF, "--spread", "1"), 16),
    ("sciq", LARGE, (*HALF, "--spread", "1"), 64)]


def cosmosqa(file: Path) -> None:
    """A task of CosmosQA's official size, 25,262 and 2,985 questions, out of its validation file."""
    text = official.content("cosmosqa/valid.csv", None).decode()
    rows = itertools.cycle(list(csv.DictReader(io.StringIO(text, newline=""))))
    lines = []
    for i, row in zip(range(25262 + 2985), rows):
        lines.append(json.dumps({
            "id": str(i), "group": str(i), "split": "test" if i < 2985 else "train",
            "context": row["context"],
            "question": row["question"], "options": [row[f"answer{n}"] for n in range(4)],
            "answer": int(row["label"])}) + "\n")
    file.write_text("".join(lines), "utf-8")


def main(tokenizers: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        place, rows = Path(name), []
        for model, shape in SHAPES.items():
            kind = "gpt2" if shape["model_type"] == "gpt2" else "qwen"
            shutil.copytree(Path(tokenizers) / kind, place / model)
            (place / model / "config.json").write_text(json.dumps(shape))
        cosmosqa(place / "cosmosqa.jsonl")
        for task, (weak, strong), flags, devices in PLANS:
            which = str(place / "cosmosqa.jsonl") if task == "cosmosqa" else task
            models = ("--weak", str(place / weak), "--strong", str(place / strong))
            config = selw2s.parse(["--task", which, *models, "--device", "cuda", *flags,
                                   "--plan", str(devices)])
            stages = selw2s.plan(config)
            most = max(stages, key=lambda row: row.memory.peak())
            rows.append({"task": task, "weak": weak, "strong": strong, "flags": " ".join(flags),
                         "devices": devices, "dtype": config.dtype,
                         "tokens": sum(row.tokens for row in stages),
                         "operations": sum(row.operations for row in stages),
                         "memory": Memory._asdict(most.memory), "peak": most.memory.peak()})
    (ROOT / "data/results/plan.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
