"""What all tests share: the repository's root on the path, mark `slow`, where third-party files may lie."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"             # real data and checkpoints, when present beside the checkout
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # for pytest -n 2: who waits leaves the core


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs when CI is set in the environment, or with -m slow")
    config.addinivalue_line("markers", "figures: its runs draw their figures, a third of a small run's time")
    if os.environ.get("CI"):
        config.option.durations = 30        # where the minutes go


def pytest_collection_modifyitems(config, items):
    if os.environ.get("CI") or "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: set CI=1 or give -m slow"))


@pytest.fixture(autouse=True)
def figures_where_asked_for(request, monkeypatch):
    """Fixtures of a whole module come before this one: their runs draw."""
    if not request.node.get_closest_marker("figures"):
        import selw2s
        monkeypatch.setattr(selw2s, "figures", lambda folder, result: [])


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


def same_bits(a: dict, b: dict) -> bool:
    """Whether two dictionaries hold the same arrays, NaN for NaN."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)


def write_llama(folder: Path, width: int, layers: int, vocab: int, seed: int):
    """A llama checkpoint with random weights, in Hugging Face layout, without transformers."""
    import json

    import torch
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(seed)
    inner = 2 * width
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, width, generator=g),
               "model.norm.weight": torch.ones(width)}
    for i in range(layers):
        for name, shape in (("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (width, width)),
                            ("self_attn.v_proj", (width, width)), ("self_attn.o_proj", (width, width)),
                            ("mlp.gate_proj", (inner, width)), ("mlp.up_proj", (inner, width)),
                            ("mlp.down_proj", (width, inner))):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape, generator=g) / shape[1] ** 0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 2, "vocab_size": vocab, "max_position_embeddings": 128,
        "tie_word_embeddings": True}))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Command-line arguments: a task of 96 + 40 questions, two tiny untrained models: seconds, not sense."""
    import json
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    words = ["red", "blue", "green", "gold", "black", "white", "pink", "grey"]
    lines = []
    for i in range(136):
        options = rng.sample(words, 4)
        question = f"Which colour has thing {i // 2} seen from {rng.choice(words)}?"
        lines.append({"id": f"q{i}", "group": f"g{i // 2}", "question": question, "options": options,
                      "answer": rng.randrange(4), "split": "train" if i < 96 else "test"})
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator([line["question"] for line in lines], trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    for name, width, layers in (("weak", 16, 1), ("strong", 32, 3)):
        write_llama(folder / name, width, layers, 300, seed=width)
        bpe.save(str(folder / name / "tokenizer.json"))
    return ["--task", str(folder / "task.jsonl"), "--weak", str(folder / "weak"),
            "--strong", str(folder / "strong"), "--lr", "1e-3"]
