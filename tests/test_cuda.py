"""A GPU computes what the CPU does, and the same bits each time. Skipped where there is none.

Run: pytest tests/test_cuda.py (a minute; it needs the demo's files alone).
"""
import os

import pytest
import torch

import graph
import model as M
import selw2s
from conftest import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"      # as selw2s.run; it counts when cuBLAS is first used


@pytest.fixture(autouse=True)
def deterministic():
    """As selw2s.run: what has no deterministic algorithm raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(dtype=torch.float32):
    return [M.load(str(ROOT / "data/demo/strong"), device=device, dtype=dtype)[0]
            for device in ("cpu", "cuda")]


def texts(n: int, seed: int, vocab: int, longest: int = 40):
    """n sequences of random ids of 2 to `longest` tokens."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, longest, (n,), generator=g)
    return [torch.randint(0, vocab, (int(size),), generator=g).tolist() for size in sizes]


def close(got, want, off):
    """off: of the largest."""
    got, want = got.float().cpu(), want.float()
    assert (got - want).abs().max() <= off * want.abs().max()


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_states_and_reading(dtype, off):
    cpu, cuda = both(dtype)
    vocab, width = cpu.config.vocab, cpu.config.width
    sequences = texts(60, 1, vocab)
    close(M.hidden_at(cuda, sequences), M.hidden_at(cpu, sequences), off)
    prompts, options = texts(30, 2, vocab), [texts(4, 100 + i, vocab, 6) for i in range(30)]
    got, want = (M.read(m, prompts, options, [1] * 30, layers=(2, None)) for m in (cuda, cpu))
    assert got.prompt_state.shape == (30, 2, width)
    for name in ("loglik", "prompt_state", "item_state"):
        close(getattr(got, name), getattr(want, name), off)


@pytest.mark.parametrize("student, tune, checkpoint", [
    ("classifier", "full", False), ("classifier", "full", True), ("classifier", "lora", False),
    ("classifier", "head", False), ("answer", "full", False), ("answer", "lora", True)])
def test_students(student, tune, checkpoint):
    cpu, cuda = both()
    vocab = cpu.config.vocab
    inputs = texts(64, 3, vocab)
    if student == "answer":
        inputs = [M.Choice(prompt, texts(4, 200 + i, vocab, 5), i % 4) for i, prompt in enumerate(inputs)]
    targets = torch.rand(64, generator=torch.Generator().manual_seed(4))
    how = dict(lr=1e-4, epochs=2, batch=8, seed=0, student=student, tune=tune, checkpoint=checkpoint)
    want = M.finetune(cpu, inputs, targets, **how)
    got, again = (M.finetune(cuda, inputs, targets, **how) for _ in range(2))
    close(got.predict(inputs), want.predict(inputs), 1e-3)
    untouched = M.STUDENTS[student](cuda, {} if student == "answer" else {
        "classifier.weight": torch.zeros(2, cpu.config.width)})
    assert (got.predict(inputs) - untouched.predict(inputs)).abs().max() > 1e-3     # it did learn something
    for name, x in got.state().items():
        assert torch.equal(x, again.state()[name]), name


def test_graph():
    x = torch.randn(3000, 48, generator=torch.Generator().manual_seed(5))
    Y = torch.rand(3000, 2, generator=torch.Generator().manual_seed(6))
    want, got = ((graph.normalise(graph.affinity(*graph.knn(z, 10))), z.device) for z in (x, x.cuda()))
    for alpha in (0.3, 0.97):
        a, b = (graph.propagate(S, Y.to(device), alpha).F for S, device in (want, got))
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-5)


def test_a_run(tiny, tmp_path):
    """All methods; the same bits with a cache of its own; the untouched model as on the CPU."""
    flags = ("--methods", "all", "--weak-seeds", "2")
    first, second, cpu = (
        selw2s.run(selw2s.parse([*tiny, *flags, "--out", str(tmp_path / name), "--device", device]))
        for name, device in (("a", "cuda"), ("b", "cuda"), ("cpu", "cpu")))
    rows = [result["metrics"]["methods"] for result in (first, second, cpu)]
    for method, row in rows[0].items():
        assert row["weights"] == rows[1][method]["weights"], method
        assert row["accuracy"] == rows[1][method]["accuracy"]
    assert rows[0]["naive"]["weights"] != rows[2]["naive"]["weights"]
    assert abs(rows[0]["zero-shot"]["accuracy"] - rows[2]["zero-shot"]["accuracy"]) < 0.05
