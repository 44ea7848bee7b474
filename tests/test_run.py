"""The program: honesty rules, cache, result, errors, command line. Run: pytest tests/test_run.py (40 s)."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import selw2s
from conftest import ROOT


def go(tiny, out, *more):
    return selw2s.run(selw2s.parse([*tiny, "--out", str(out), *more]))


def weights(result):
    return {name: row["weights"] for name, row in result["metrics"]["methods"].items()}


def arrays(result, out):
    with np.load(next(Path(out).glob("*/*/items.npz"))) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("full")
    return go(tiny, out, "--methods", "all", "--seeds", "0", "1"), out


# ---------------------------------------------------------------------------------------------- honesty rules
def test_poisoned_truth_moves_no_weight_but_the_ceilings(tiny, tmp_path, monkeypatch):
    """Scramble the truth of D_u and test, in items and questions: only metrics and the ceiling may change."""
    methods = ("--methods", *(m for m in selw2s.METHOD_NAMES if m != "oracle"))
    clean = go(tiny, tmp_path / "clean", *methods)
    task = selw2s.load_task(tiny[1])
    drawn = selw2s.items(task.train, protocol="paper", seed=0)
    _, transfer = selw2s.halves(drawn, task.train, protocol="paper", seed=0)
    hidden = {i.question_id for i in transfer} | {q.id for q in task.test}
    real_items, real_halves, by_id = selw2s.items, selw2s.halves, {q.id: q for q in task.train + task.test}
    labels = {}                                     # halves() may look at labels only to see that both occur

    def poisoned_items(questions, **kwargs):
        out = real_items([by_id[q.id] for q in questions], **kwargs)
        labels.update({i.id: i.label for i in out})
        return [i._replace(label=1 - i.label) if i.question_id in hidden else i for i in out]

    def poison(questions):
        return [q._replace(answer=(q.answer + 1) % 4) if q.id in hidden else q for q in questions]
    monkeypatch.setattr(selw2s, "items", poisoned_items)
    monkeypatch.setattr(selw2s, "load_task",
                        lambda *a, **k: task._replace(train=poison(task.train), test=poison(task.test)))
    dirty = go(tiny, tmp_path / "dirty", *methods)
    a, b = weights(clean), weights(dirty)
    assert {name for name in a if a[name] != b[name]} == {"ceiling"}
    for name, row in clean["metrics"]["methods"].items():
        if name != "ceiling":
            assert row["accuracy"] == pytest.approx(1 - dirty["metrics"]["methods"][name]["accuracy"])
    for key in ("tau", "layer", "l2", "smoothing"):
        assert clean["seeds"][0][key] == dirty["seeds"][0][key]


@pytest.mark.parametrize("flags, equal", [
    (("--tau", "1.01", "--alpha", "0"), "naive"), (("--tau", "0", "--alpha", "0"), "self-only"),
    (("--tau", "0"), "self-only")])
def test_switched_off_the_method_is_the_simpler_one_bit_for_bit(tiny, tmp_path, flags, equal):
    result = go(tiny, tmp_path, "--methods", "naive", "self-only", "selective", *flags)
    w = weights(result)
    assert w["selective"] == w[equal] and w["naive"] != w["self-only"]


def test_route_only_and_graph_only_are_limits_too(tiny, tmp_path):
    w = weights(go(tiny, tmp_path, "--methods", "naive", "route-only", "graph-only", "selective",
                   "--alpha", "0"))
    assert w["selective"] == w["route-only"] and w["graph-only"] == w["naive"]
    w = weights(go(tiny, tmp_path, "--methods", "graph-only", "selective", "--tau", "1.01", "--alpha", "0.5",
                   "--k", "5"))
    assert w["selective"] == w["graph-only"]


def test_halves_are_disjoint_and_items_are_joined_by_id(full, tiny):
    result, out = full
    data = arrays(result, out)
    task = selw2s.load_task(tiny[1])
    group = {q.id: q.group for q in task.train + task.test}
    truth = {f"{q.id}/{i}": float(i == q.answer) for q in task.train + task.test for i in range(4)}
    for seed in (0, 1):
        ids = data[f"seed{seed}/transfer/id"].tolist()
        assert [truth[i] for i in ids] == data[f"seed{seed}/transfer/truth"].tolist()
        drawn = selw2s.items(task.train, protocol="paper", seed=seed)
        labelled = [i for i in drawn if i.id not in ids]
        assert not {group[i.question_id] for i in labelled} & {group[i.rsplit("/", 1)[0]] for i in ids}
        is_self = data[f"seed{seed}/transfer/is_self"]
        own, label = data[f"seed{seed}/transfer/own"], data[f"seed{seed}/transfer/label/selective"]
        np.testing.assert_array_equal(label[is_self], own[is_self])
        np.testing.assert_array_equal(label[~is_self], data[f"seed{seed}/transfer/refined"][~is_self])
        tau = result["seeds"][seed]["tau"]
        np.testing.assert_array_equal(is_self, data[f"seed{seed}/transfer/p_ik"] >= np.float32(tau))


def test_every_number_of_the_table_follows_from_items_npz(full):
    result, out = full
    data = arrays(result, out)
    for name, row in result["metrics"]["methods"].items():
        for i, seed in enumerate((0, 1)):
            right = (data[f"seed{seed}/test/p/{name}"] > 0.5) == (data[f"seed{seed}/test/truth"] > 0.5)
            assert row["per_seed"][i] == pytest.approx(right.mean())
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    n = result["seeds"][0]["n"]
    used = {name: row["ground_truth_labels"] for name, row in result["metrics"]["methods"].items()}
    assert used["self-only"] == 0 and used["ceiling"] == n["transfer"]
    assert used["oracle"] == n["labelled"] + n["transfer"]
    assert {used[m] for m in ("weak", "naive", "selective", "strong-on-D_l", "graph-only")} == {n["labelled"]}


# ------------------------------------------------------------------------------------------- cache and result
def comparable(result):
    return {k: result[k] for k in ("config", "data", "models", "metrics", "code")} | {
        "seeds": [{k: v for k, v in s.items()} for s in result["seeds"]]}


def test_second_run_repeats_no_stage_and_says_the_same(full, tiny):
    result, out = full
    before = arrays(result, out)
    again = go(tiny, out, "--methods", "all", "--seeds", "0", "1")
    assert all(stage["cached"] for stage in again["stages"]) and comparable(again) == comparable(result)
    after = arrays(again, out)
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    assert len(list(Path(out).glob("*/*/result.json"))) == 1


def test_another_process_and_a_cold_cache_give_the_same_bits(full, tiny, tmp_path):
    result, _ = full
    subprocess.run([sys.executable, "selw2s.py", *tiny, "--methods", "all", "--seeds", "0", "1",
                    "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    other = json.loads(next(tmp_path.glob("*/*/result.json")).read_text())
    assert other["finished"] is True
    assert not any(stage["cached"] for stage in other["stages"] if stage["name"] == "weak")
    assert other["metrics"] == json.loads(json.dumps(result["metrics"]))


def test_what_changes_the_result_changes_the_key(tiny, tmp_path):
    def names(*flags):
        result = go(tiny, tmp_path, "--methods", "naive", *flags)
        return {s["name"]: s["cached"] for s in result["stages"]}
    assert not any(names().values())
    assert all(names("--k", "5").values())              # concerns no stage of these methods
    assert not any(v for k, v in names("--epochs", "1").items() if k != "read-strong")
    assert names("--shots", "2") == {"weak": True, "cross-0": True, "cross-1": True, "read-strong": False,
                                     "naive": True}
    assert not any(v for k, v in names("--seeds", "1").items())


# ----------------------------------------------------------------------------------------------- command line
def program(*argv, **env):
    return subprocess.run([sys.executable, "selw2s.py", *argv], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | env)


def test_help_answers_without_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", "selw2s.py", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0
    assert "| torch" not in done.stderr.replace("|   ", "| ") and "numpy" not in done.stderr
    assert "python selw2s.py --task demo" in done.stdout and len(done.stdout.splitlines()) <= 66
    for f in selw2s.fields(selw2s.Config):
        assert "--" + f.name.replace("_", "-") in done.stdout


@pytest.mark.parametrize("argv, words", [
    (["--task", "nothing"], "--weak"),
    (["--task", "nothing", "--weak", "a", "--strong", "b"], "unknown task"),
    (["--no-such-flag"], "--no-such-flag"), (["--methods", "best"], "best"), (["--tau", "high"], "high"),
    (["--seeds"], "--seeds"), (["--own", "x"], "x"),
    (["--task", "missing.jsonl", "--weak", "a", "--strong", "b"], "missing.jsonl"),
])
def test_a_users_mistake_costs_one_line_and_exit_2(argv, words, tmp_path):
    done = program(*argv, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*/*"))


def test_missing_model_is_one_line(tiny, tmp_path, capsys):
    argv = [*tiny, "--out", str(tmp_path)]
    argv[argv.index("--weak") + 1] = str(tmp_path / "nowhere")
    assert selw2s.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("selw2s: ") and "nowhere" in error and "\n" not in error


def test_interrupt_is_one_line_and_130(tiny, tmp_path, monkeypatch, capsys):
    def stop(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(selw2s, "read", stop)
    assert selw2s.main([*tiny, "--out", str(tmp_path)]) == 130
    assert "start the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    result = go(tiny, tmp_path)
    assert [s["cached"] for s in result["stages"]][:4] == [True, True, True, False]
