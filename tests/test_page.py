"""labels.jsonl: what it says, and a finetune by transformers from that file alone.

Run: pytest tests/test_page.py (20 s; with CI=1 the finetune too, 10 s more).
"""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import selw2s
from conftest import ROOT


def go(tiny, out, *more):
    return selw2s.run(selw2s.parse([*tiny, "--out", str(out), *more]))


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """A run of two seeds with smoothing on: result and folder."""
    out = tmp_path_factory.mktemp("ran")
    result = go(tiny, out, "--methods", "naive", "selective", "--seeds", "0", "1", "--alpha", "0.5", "--k", "5",
                "--tau", "0.4")
    return result, next(out.glob("*/*/result.json")).parent


def lines(folder):
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text("utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------- labels out
def test_labels_are_what_selective_was_trained_on(ran, tiny):
    result, folder = ran
    rows, task = lines(folder), selw2s.load_task(tiny[1])
    question = {q.id: q for q in task.train}
    with np.load(folder / "items.npz") as data:
        for seed in (0, 1):
            mine = [row for row in rows if row["seed"] == seed]
            u = {name: data[f"seed{seed}/transfer/{name}"] for name in
                 ("id", "group", "weak", "own", "p_ik", "refined", "is_self", "label/selective")}
            for name in ("id", "group"):
                assert [row[name] for row in mine] == u[name].tolist()
            for name, of in (("label", "label/selective"), ("own", "own"), ("p_ik", "p_ik"), ("refined", "refined")):
                np.testing.assert_array_equal(np.array([row[name] for row in mine], np.float32), u[of])
            np.testing.assert_array_equal(np.array([row["weak"]["weak"] for row in mine], np.float32), u["weak"])
            assert [row["source"] for row in mine] == ["own" if own else "smoothed" for own in u["is_self"]]
            for row in mine:
                q = question[row["question_id"]]
                assert row["id"].startswith(q.id + "/") and row["text"] == f"{selw2s.prompt(q)} {row['candidate']}"
                assert row["candidate"] == q.options[int(row["id"].rsplit("/", 1)[1])]
    assert {row["source"] for row in rows} == {"own", "smoothed"} and len({tuple(row) for row in rows}) == 1


def test_labels_need_no_student_and_say_weak_without_smoothing(tiny, tmp_path):
    go(tiny, tmp_path, "--methods", "weak", "--tau", "1.01", "--alpha", "0")
    rows = lines(next(tmp_path.glob("*/*/result.json")).parent)
    assert {row["source"] for row in rows} == {"weak"}
    assert all(row["label"] == row["refined"] == row["weak"]["weak"] for row in rows)


def test_a_merge_has_the_labels_of_its_runs(tiny, ran, tmp_path):
    flags = ("--methods", "naive", "selective", "--alpha", "0.5", "--k", "5", "--tau", "0.4")
    for seed in ("1", "0"):
        go(tiny, tmp_path / seed, *flags, "--seeds", seed)
    files = [str(next((tmp_path / seed).glob("*/*/result.json"))) for seed in ("1", "0")]
    assert selw2s.main(["--merge", *files, "--out", str(tmp_path / "both")]) == 0
    merged = next((tmp_path / "both").glob("*/*/labels.jsonl"))
    assert merged.read_bytes() == (ran[1] / "labels.jsonl").read_bytes()


def test_datasets_reads_the_labels(ran, tmp_path):
    datasets = pytest.importorskip("datasets", reason="only with the package datasets")
    read = datasets.load_dataset("json", data_files=str(ran[1] / "labels.jsonl"), split="train",
                                 cache_dir=str(tmp_path))
    assert list(read) == lines(ran[1])


@pytest.mark.slow
def test_transformers_finetunes_from_the_labels_alone(ran, tiny, tmp_path, monkeypatch):
    """The README's example, as it stands there, on the tiny task."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    readme = (ROOT / "README.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert len(example.splitlines()) <= 10
    strong = tmp_path / "strong"
    strong.mkdir()
    for file in Path(tiny[5]).iterdir():
        (strong / file.name).write_bytes(file.read_bytes())
    (strong / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "labels.jsonl").write_bytes((ran[1] / "labels.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    used, real = [], transformers.Trainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        used.extend(inputs["labels"][:, 0].tolist())
        return real(self, model, inputs, *args, **kwargs)
    monkeypatch.setattr(transformers.Trainer, "compute_loss", spy)
    exec(example.replace("STRONG", repr(str(strong))), {})
    with np.load(ran[1] / "items.npz") as data:     # each label once in each of two epochs
        trained_on = np.concatenate([data[f"seed{seed}/transfer/label/selective"] for seed in (0, 1)] * 2)
    np.testing.assert_array_equal(np.sort(np.array(used, np.float32)), np.sort(trained_on))
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert torch.isfinite(student.score.weight).all() and student.score.weight.shape == (1, 32)
