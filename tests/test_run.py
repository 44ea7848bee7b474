"""The program: honesty rules, cache, result, errors, command line. Run: pytest tests/test_run.py (70 s)."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import selw2s
from conftest import ROOT, same_bits
from data import DataError
from data.cache import Stages
from data.results.metrics import hidden_truth, own_right, right_option
from selw2s import METHODS


def go(tiny, out, *more):
    return selw2s.run(selw2s.parse([*tiny, "--out", str(out), *more]))


def weights(result):
    return {name: row["weights"] for name, row in result["metrics"]["methods"].items()}


def arrays(result, out):
    with np.load(next(Path(out).glob("*/*/items.npz"))) as file:
        return {key: file[key] for key in file.files}


def slow(*cases):
    """Cases of a parametrised test that only CI runs."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("full")
    return go(tiny, out, "--methods", "all", "--seeds", "0", "1"), out


# ---------------------------------------------------------------------------------------------- honesty rules
@pytest.mark.parametrize("flags", [("--weak-seeds", "3"), *slow(
    ("--student", "answer"), ("--own", "judge"), ("--shots", "1"), ("--route", "both", "--tau", "item"),
    ("--tune", "head"))])
def test_poisoned_truth_moves_no_weight_but_the_ceilings(tiny, tmp_path, monkeypatch, flags):
    """Scramble the truth of D_u and test, in items and questions: only metrics and the ceiling may change."""
    methods = ("--methods", *(m for m in METHODS if m != "oracle"), *flags)
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
    assert {name for name in a if a[name] != b[name]} == {"ceiling"} and a.keys() >= {"fused", "zero-shot"}
    for name, row in clean["metrics"]["methods"].items():
        if name != "ceiling":
            assert row["accuracy"] == pytest.approx(1 - dirty["metrics"]["methods"][name]["accuracy"])
    for key in ("tau", "tau_rule", "layer", "l2", "smoothing", "cross_fitted"):
        assert clean["seeds"][0][key] == dirty["seeds"][0][key]


@pytest.mark.parametrize("flags, equal", [
    (("--tau", "1.01", "--alpha", "0"), "naive"), (("--tau", "0", "--alpha", "0"), "self-only"),
    (("--tau", "0"), "self-only")])
def test_switched_off_the_method_is_the_simpler_one_bit_for_bit(tiny, tmp_path, flags, equal, capsys):
    result = go(tiny, tmp_path, "--methods", "naive", "self-only", "selective", *flags)
    w = weights(result)
    assert w["selective"] == w[equal] and w["naive"] != w["self-only"]
    assert "--alpha" not in flags or "no smoothing helps" not in capsys.readouterr().out     # none was tried


@pytest.mark.slow
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
        tau = data[f"seed{seed}/transfer/tau"]
        np.testing.assert_array_equal(is_self, data[f"seed{seed}/transfer/p_ik"] >= tau)
        assert tau.mean(dtype=float) == pytest.approx(result["seeds"][seed]["tau"])


def test_every_number_of_the_table_follows_from_items_npz(full):
    result, out = full
    data = arrays(result, out)
    for name, row in result["metrics"]["methods"].items():
        for i, seed in enumerate((0, 1)):
            right = (data[f"seed{seed}/test/p/{name}"] > 0.5) == (data[f"seed{seed}/test/truth"] > 0.5)
            assert row["per_seed"][i] == pytest.approx(right.mean())
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    n = {part: max(seed["n"][part] for seed in result["seeds"]) for part in ("labelled", "transfer")}
    used = {name: row["ground_truth_labels"] for name, row in result["metrics"]["methods"].items()}
    assert used["self-only"] == used["zero-shot"] == 0 and used["ceiling"] == n["transfer"]
    assert used["oracle"] == max(seed["n"]["labelled"] + seed["n"]["transfer"] for seed in result["seeds"])
    of_d_l = ("weak", "naive", "selective", "strong-on-D_l", "graph-only", "fused")
    assert {used[m] for m in of_d_l} == {n["labelled"]}


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
    assert same_bits(before, after)
    assert len(list(Path(out).glob("*/*/result.json"))) == 1


@pytest.mark.slow
def test_another_process_and_a_cold_cache_give_the_same_bits(full, tiny, tmp_path):
    result, _ = full
    subprocess.run([sys.executable, "selw2s.py", *tiny, "--methods", "all", "--seeds", "0", "1",
                    "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    other = json.loads(next(tmp_path.glob("*/*/result.json")).read_text())
    assert other["finished"] is True
    assert not any(stage["cached"] for stage in other["stages"] if stage["name"] == "weak")
    assert other["metrics"] == json.loads(json.dumps(result["metrics"]))


@pytest.mark.slow
def test_other_batch_budgets_agree_to_1e_5(full, tiny, tmp_path, monkeypatch):
    """Micro-batches of a few sequences for training, reading and predicting instead of the defaults."""
    from functools import partial
    import model
    result, out = full
    monkeypatch.setattr(selw2s, "finetune", partial(selw2s.finetune, batch_tokens=150))
    monkeypatch.setattr(selw2s, "read", partial(selw2s.read, batch_tokens=150))
    real = model.Classifier.predict
    monkeypatch.setattr(model.Classifier, "predict",
                        lambda self, ask, **more: real(self, ask, batch_tokens=150, **more))
    other = go(tiny, tmp_path, "--methods", "all", "--seeds", "0", "1")
    a, b = arrays(result, out), arrays(other, tmp_path)
    differ = 0
    for key in a:
        if a[key].dtype.kind == "f":
            np.testing.assert_allclose(b[key], a[key], rtol=0, atol=1e-5, err_msg=key)
            differ += (a[key] != b[key]).any()
    assert differ > 10                                  # it did run otherwise


@pytest.mark.slow
def test_seeds_share_one_reading(tiny, tmp_path):
    """The questions that several seeds share are read once, and what each seed takes of it is its own."""
    both = go(tiny, tmp_path / "both", "--methods", "naive", "--seeds", "0", "1")
    reads = [stage["cached"] for stage in both["stages"] if stage["name"] == "read"]
    assert reads == [False, True]
    alone = go(tiny, tmp_path / "alone", "--methods", "naive", "--seeds", "1")
    a, b = arrays(both, tmp_path / "both"), arrays(alone, tmp_path / "alone")
    for key in (key for key in b if key.startswith("seed1/")):
        assert np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f"), key
    assert not np.array_equal(a["seed0/transfer/id"], a["seed1/transfer/id"])


@pytest.mark.slow
def test_what_changes_the_result_changes_the_key(tiny, tmp_path):
    def names(*flags):
        result = go(tiny, tmp_path, "--methods", "naive", *flags)
        return {s["name"]: s["cached"] for s in result["stages"]}
    assert not any(names().values())
    assert all(names("--k", "5").values())              # concerns no stage of these methods
    assert not any(v for k, v in names("--epochs", "1").items() if not k.startswith("read"))
    cross = {f"cross-{f}": True for f in range(5)}
    assert names("--shots", "2") == {"weak": True, **cross, "read": False, "naive": True}
    folds = names("--folds", "3")
    assert folds["weak"] and folds["naive"] and not any(folds[f"cross-{f}"] for f in range(3))
    assert not any(v for k, v in names("--seeds", "1").items() if k != "read")      # questions have no seed


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
    for f in fields(selw2s.Config):
        assert "--" + f.name.replace("_", "-") in done.stdout
    but = {"logconf", "product", "confidence-only"}
    assert f"up to selective, without {' '.join(m for m in METHODS if m in but)}" in done.stdout
    assert selw2s.DEFAULT_METHODS == tuple(
        m for m in METHODS[:METHODS.index("selective") + 1] if m not in but)


@pytest.mark.figures
def test_python_gives_what_the_command_line_gives(tiny, tmp_path):
    """Methods in any order and without those of every run; the result says the command that makes it. With
    a folder whose name would be a formula, if it were read as one."""
    from data.results.store import read_run, write_items
    out = tmp_path / "$USER_$x"
    flags = [*tiny, "--methods", "selective", "naive", "--seeds", "1", "--out", str(out)]
    assert selw2s.main(flags) == 0
    file = next(out.glob("*/*/result.json"))
    result = json.loads(file.read_text("utf-8"))
    program, *said = shlex.split(result["command"])[1:]
    assert program == "selw2s.py" and selw2s.parse(said) == selw2s.parse(flags)
    if (file.parent / "main.svg").exists():         # not without matplotlib
        assert "$USER_$x" in (file.parent / "main.svg").read_text("utf-8")
    again = selw2s.run(selw2s.Config(task=tiny[1], weak=(tiny[3],), strong=tiny[5], lr=1e-3, out=str(out),
                                     methods=("selective", "naive"), seeds=(1,)))
    assert json.loads(json.dumps(again["config"])) == result["config"]
    assert json.loads(json.dumps(again["metrics"])) == result["metrics"]
    assert list(out.glob("*/*/result.json")) == [file]
    read, runs = read_run(str(file))
    other = read | {"env": read["env"] | {"threads": 99}}
    places = [write_items(result, runs, str(out)) for result in (read, read, other)]
    assert places[0] == places[1] != places[2]


@pytest.mark.parametrize("changed, words", [
    ({"task": "sciq", "weak": ("a",)}, "needs --strong MODEL"),
    ({"seeds": (0, 0)}, "--seeds (0, 0): must be"),
    ({"methods": ("best",)}, "--methods ('best',): must be of"),
    ({"methods": "all"}, "--methods 'all': must be tuple"),
    ({"keep": "oracle"}, "--keep oracle: is not among"), ({"alpha": 1.0}, "--alpha 1.0: must be"),
    ({"analysis": "cross-task", "route": "both"}, "--analysis cross-task needs")])
def test_python_is_refused_what_the_command_line_is(changed, words, tmp_path):
    with pytest.raises(DataError, match=re.escape(words)):
        selw2s.run(replace(selw2s.Config(out=str(tmp_path / "out")), **changed))
    assert not list(tmp_path.iterdir())


def test_main_returns_the_code_of_a_wrong_flag(capsys):
    assert selw2s.main(["--bogus"]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert selw2s.main(["--help"]) == 0


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


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_cannot_print_a_character(encoding, tmp_path):
    """What it cannot print is escaped, on stdout (the configuration) and on stderr (the error)."""
    done = program("--task", "\u6f22.jsonl", "--weak", "a", "--strong", "b", "--out", str(tmp_path / "out"),
                   PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 2 and r"task=\u6f22.jsonl" in done.stdout
    assert done.stderr.startswith(r"selw2s: \u6f22.jsonl: cannot be read") and done.stderr.count("\n") == 1


def test_what_the_graph_refuses_is_one_line(tiny, monkeypatch, capsys):
    from graph import affinity, knn, propagate
    nan, index, S = torch.full((2, 1), torch.nan), torch.tensor([[1], [0]]), torch.eye(2)
    for name, fault in (("knn", lambda config: knn(nan, 1)),
                        ("affinity", lambda config: affinity(index, nan)),
                        ("propagate", lambda config: propagate(S, torch.ones(2, 1), 2.0))):
        monkeypatch.setattr(selw2s, "run", fault)
        assert selw2s.main([*tiny]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"selw2s: {name}: ") and error.count("\n") == 1
    monkeypatch.setattr(selw2s, "run", lambda config: int("no number"))     # a fault of the program
    with pytest.raises(ValueError, match="no number"):
        selw2s.main([*tiny])


def test_interrupt_is_one_line_and_130(tiny, tmp_path, monkeypatch, capsys):
    def stop(*a, **k):
        raise KeyboardInterrupt
    monkeypatch.setattr(selw2s, "read", stop)
    assert selw2s.main([*tiny, "--out", str(tmp_path)]) == 130
    assert "start the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    result = go(tiny, tmp_path)
    assert [s["cached"] for s in result["stages"]][:7] == [True] * 6 + [False]     # the supervisors were kept


# ------------------------------------------------------------------------------- own answers, P(IK), analyses
@pytest.mark.parametrize("flags", [("--student", "answer"), *slow(
    ("--own", "mean"), ("--own", "pmi"), ("--own", "judge"), ("--shots", "3"), ("--target", "soft"),
    ("--anchors", "0"), ("--tune", "head"), ("--route", "belief"), ("--route", "both"), ("--tune", "lora"),
    ("--protocol", "openai"))])
def test_every_alternative_runs_and_changes_something(tiny, tmp_path, full, flags):
    fixed = ("--tau", "0.3", "--alpha", "0.5", "--k", "5")
    result, plain = go(tiny, tmp_path / "a", *fixed, *flags), go(tiny, tmp_path / "b", *fixed)
    a, b = arrays(result, tmp_path / "a"), arrays(plain, tmp_path / "b")
    assert any(a[key].shape != b[key].shape or (a[key] != b[key]).any() for key in b)
    assert result["metrics"]["methods"]["self-only"]["ground_truth_labels"] == (
        3 if "--shots" in flags else 0)


def set_up(tiny, out, *flags, told=None):
    """Everything a run shares; told: a list that gets its lines."""
    config = selw2s.parse([*tiny, "--out", str(out), *flags])
    stages = Stages(Path(out) / "cache", (told if told is not None else []).append)
    return selw2s.set_up(config, stages)[0]


def test_nothing_learns_from_a_question_whose_group_is_a_shot(tiny, tmp_path):
    """Its answer stood in the prompt: it is kept from P(IK), the choice of smoothing and the trust probe."""
    told = []
    p = selw2s.prepare(set_up(tiny, tmp_path, "--shots", "4", told=told), 0)
    prompt = next(line for line in told if line.startswith("3 prompt"))
    shown = [q for q in p.labelled.questions if selw2s.prompt(q)[:30] in prompt]
    left = {q.group for q in p.learn.questions}
    out = {q.group for q in p.labelled.questions} - left
    assert shown and all(q.group in out for q in shown) and 1 <= len(out) <= 4
    usable = sum(q.group in left for q in p.labelled.questions)
    assert len(p.learn.items) == usable <= len(p.labelled.items) - 4
    where = {item.id: i for i, item in enumerate(p.labelled.items)}
    at = [where[item.id] for item in p.learn.items]
    for name in ("weak", "own", "belief", "prompt_state", "item_state", "truth", "gold", "fold"):
        assert torch.equal(getattr(p.learn, name), getattr(p.labelled, name)[at]), name


def test_a_judged_yes_no_item_shows_the_candidate_yes(tiny, tmp_path):
    lines = [{"question": f"is thing {i} red", "options": ["yes", "no"], "answer": i % 3 % 2, "id": f"q{i}",
              "split": "train" if i < 60 else "test"} for i in range(90)]
    file, told = tmp_path / "yesno.jsonl", []
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    p = selw2s.prepare(set_up(["--task", str(file), *tiny[2:]], tmp_path, "--own", "judge", told=told), 0)
    shot = next(line for line in told if line.startswith("3 judge"))
    assert "red\\nAnswer: yes\\nRespond with 1" in shot and "[' 0', ' 1']" in shot
    for some in (p.labelled, p.transfer, p.test):
        assert some.belief.shape[1] == 2 and torch.equal(some.own, (some.belief.argmax(1) == 1).float())
        assert torch.equal(some.zero_shot, some.belief[:, 1].float())


def test_a_yes_no_item_is_the_question_and_its_states_are_the_prompts(tiny, tmp_path):
    lines = [{"question": f"is thing {i} red", "options": ["yes", "no"], "answer": i % 3 % 2, "id": f"q{i}",
              "split": "train" if i < 60 else "test"} for i in range(90)]
    file = tmp_path / "yesno.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    p = selw2s.prepare(set_up(["--task", str(file), *tiny[2:]], tmp_path), 0)
    for some in (p.labelled, p.transfer, p.test):
        assert torch.equal(some.prompt_state, some.item_state)
        assert torch.equal(some.zero_shot, some.belief[:, 1].float())       # options are no, yes
        assert torch.equal(hidden_truth(some), torch.tensor([float(q.answer) for q in some.questions]))


@pytest.mark.parametrize("flags", [("--shots", "2"), ("--folds", "20")])
def test_too_little_of_d_l_is_said_before_anything_is_trained(tiny, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(selw2s, "supervise", lambda *a, **k: pytest.fail("too late"))
    task = selw2s.load_task(tiny[1])
    few = [q._replace(group=f"g{i % 12}") for i, q in enumerate(task.train)]
    monkeypatch.setattr(selw2s, "load_task", lambda *a, **k: task._replace(train=few))
    with pytest.raises(selw2s.DataError, match="too small for --folds"):
        go(tiny, tmp_path, *flags, "--methods", "weak", "--seeds", "0", "1", "2")


def test_cross_fitted_supervisors_never_saw_the_fold_they_label(tiny, tmp_path, monkeypatch):
    seen, real = {}, selw2s.finetuned

    def spy(name, setup, start, inputs, targets, ask, *rest):
        seen[name] = [tuple(x) for x in inputs], [tuple(x) for x in ask[0]]
        return real(name, setup, start, inputs, targets, ask, *rest)
    monkeypatch.setattr(selw2s, "finetuned", spy)
    setup = set_up(tiny, tmp_path, "--folds", "4")
    p = selw2s.prepare(setup, 0)
    tokenizer = setup.supervisors[0].model.tokenizer
    ids = [tuple(x) for x in tokenizer.encode([item.text for item in p.labelled.items])]
    groups = [q.group for q in p.labelled.questions]
    for f in range(4):
        learn, ask = seen[f"cross-{f}"]
        at = [i for i in range(len(ids)) if p.labelled.fold[i] == f]
        assert ask == [ids[i] for i in at] and learn == [ids[i] for i in range(len(ids)) if i not in at]
        assert not {groups[i] for i in at} & {groups[i] for i in range(len(ids)) if i not in at}
    assert sorted(p.labelled.fold.bincount().tolist())[0] >= len(ids) // 4 - 2


def test_zero_shot_is_the_untouched_models_belief_in_the_candidate_shown(full, tiny):
    result, out = full
    data, task = arrays(result, out), selw2s.load_task(tiny[1])
    p = selw2s.prepare(set_up(tiny, out), 0)
    for some, name in ((p.transfer, "transfer"), (p.test, "test")):
        options = torch.tensor([int(item.id.rsplit("/", 1)[1]) for item in some.items])
        np.testing.assert_array_equal(data[f"seed0/{name}/p/zero-shot"],
                                      some.belief.gather(1, options[:, None])[:, 0].float().numpy())
    row = result["metrics"]["methods"]["naive"]["minus_zero-shot"]["mean"]
    methods = result["metrics"]["methods"]
    assert row == pytest.approx(methods["naive"]["accuracy"] - methods["zero-shot"]["accuracy"])


@pytest.mark.slow
def test_merged_runs_of_single_seeds_give_the_table_of_one_run(full, tiny, tmp_path, capsys):
    result, out = full
    for seed in ("0", "1"):
        go(tiny, tmp_path / seed, "--methods", "all", "--seeds", seed)
    files = [str(next((tmp_path / seed).glob("*/*/result.json"))) for seed in ("1", "0")]
    assert selw2s.main(["--merge", *files, "--out", str(tmp_path / "both")]) == 0
    both = json.loads(next((tmp_path / "both").glob("*/*/result.json")).read_text())
    assert both["metrics"] == json.loads(json.dumps(result["metrics"]))
    assert [seed["seed"] for seed in both["seeds"]] == [0, 1] == both["config"]["seeds"]
    a, b = arrays(result, out), arrays(both, tmp_path / "both")
    assert same_bits(a, b)
    capsys.readouterr()
    go(tiny, tmp_path / "other", "--methods", "all", "--seeds", "2", "--epochs", "1")
    other = str(next((tmp_path / "other").glob("*/*/result.json")))
    nothing = str(tmp_path / "none.json")
    for bad, word in ((other, "--epochs"), (files[0], "seed 1 too"), (nothing, "not a result")):
        assert selw2s.main(["--merge", *files[:1], bad, "--out", str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert word in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_damaged_or_foreign_items_npz_is_one_line(tiny, tmp_path):
    from data.results.store import read_run
    for name, methods in (("one", ("naive",)), ("other", ("weak",))):
        go(tiny, tmp_path / name, "--methods", *methods)
    path = next((tmp_path / "one").glob("*/*/result.json"))
    items, other = path.with_name("items.npz"), next((tmp_path / "other").glob("*/*/items.npz"))
    whole, rng, kinds = items.read_bytes(), np.random.default_rng(0), Counter()
    flipped = [bytearray(whole) for _ in range(300)]
    for damaged in flipped:
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
    for content in (b"", whole[:100], whole[:-30], other.read_bytes()):
        items.write_bytes(content)
        with pytest.raises(DataError, match="with its items.npz"):
            read_run(str(path))
    for content in flipped:
        items.write_bytes(content)
        try:
            read_run(str(path))         # what is flipped may be a date
        except DataError as error:
            kinds[type(error.__context__).__name__] += 1
            assert str(error).startswith(f"{path}: not a result.json of this program with its items.npz")
    assert len(kinds) > 3 and sum(kinds.values()) > 100, kinds


@pytest.mark.slow
def test_analyses_of_single_seeds_merge(tiny, tmp_path):
    flags, files = ("--methods", "weak", "--analysis", "difficulty"), []
    both = go(tiny, tmp_path / "both", *flags, "--seeds", "0", "1")
    for seed in ("1", "0"):
        go(tiny, tmp_path / seed, *flags, "--seeds", seed)
        files.append(str(next((tmp_path / seed).glob("*/*/result.json"))))
    assert selw2s.main(["--merge", *files, "--out", str(tmp_path / "merged")]) == 0
    merged = json.loads(next((tmp_path / "merged").glob("*/*/result.json")).read_text("utf-8"))
    assert merged["analysis"] == json.loads(json.dumps(both["analysis"]))


def test_own_answer_is_the_option_with_the_largest_likelihood(full, tiny):
    """Against one plain forward pass per (question, option)."""
    from model import load
    result, out = full
    data, task = arrays(result, out), selw2s.load_task(tiny[1])
    model, tokenizer = load(tiny[5])
    question = {q.id: q for q in task.test}
    for item, own in list(zip(data["seed0/test/id"], data["seed0/test/own"]))[:12]:
        name, shown = item.rsplit("/", 1)
        q, scores = question[name], []
        for i in range(4):
            head, whole = tokenizer.encode([selw2s.prompt(q), selw2s.prompt(q) + selw2s.completion(q, i)])
            hidden = model.hidden(torch.tensor([whole]), torch.tensor([len(whole)]))
            logp = model.logits(hidden)[0].log_softmax(-1)
            scores.append(sum(float(logp[t - 1, whole[t]]) for t in range(len(head), len(whole))))
        assert own == float(int(np.argmax(scores)) == int(shown))


@pytest.mark.parametrize("own", ["sum", "mean", "pmi"])
def test_options_of_one_text_share_one_belief(tiny, tmp_path, own):
    """Own answer, belief, zero-shot, P(IK)'s target, what an answering student is given: by text, as if the
    question had the option once, whichever of the twins is shown or right."""
    from data import Item, Question
    setup = set_up(tiny, tmp_path, "--own", own, "--student", "answer")
    said = []
    for options, places, answer in ((("red", "blue", "red", "gold"), (0, 1, 2, 3), 2),
                                    (("red", "blue", "gold"), (0, 1, 0, 2), 0)):
        questions = [Question(f"q{n}", "", "", "Which is it?", options, answer) for n in range(4)]
        part = [Item(f"q{n}/{place}", f"q{n}", selw2s.prompt(q) + selw2s.completion(q, place), place, 0)
                for n, (q, place) in enumerate(zip(questions, places))]
        gold = right_option(setup.config, part, questions)
        part = selw2s.Part(part, questions)
        inputs, = selw2s.student_inputs(setup, [part])
        part = selw2s.elicit(setup, "test", part, [], selw2s.read_questions(setup, questions))
        said.append((inputs, part.own, part.zero_shot, part.belief, part.prompt_state, part.item_state, gold,
                     own_right(setup.config, part)))
    for twins, once in zip(*said):
        assert torch.equal(twins, once) if isinstance(once, torch.Tensor) else twins == once
    _, label, zero_shot, belief, *_, gold, right = said[0]
    assert belief.shape == (4, 3) and label[0] == label[2] == right[0] and gold.tolist() == [0] * 4
    assert zero_shot[0] == zero_shot[2] and float(zero_shot[[0, 1, 3]].sum()) == pytest.approx(1)


def test_the_data_line_counts_options_that_repeat(tiny):
    from types import SimpleNamespace
    config, told = selw2s.parse([*tiny]), []
    model = SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(context=128)),
                            tokenizer=SimpleNamespace(encode=lambda texts: [[0] for _ in texts]))
    task = selw2s.load_task(tiny[1])
    for repeated in (0, 3):
        selw2s.fitted(task._replace(repeated=repeated), (model, model), config, told.append)
    assert "repeat" not in told[0]
    assert "; 3 option(s) repeat another of their question and count once" in told[1]


@pytest.mark.slow
def test_sweep_smooths_on_the_middle_layer_alone_where_it_says_so(tiny, tmp_path, monkeypatch):
    from data.results import analyses
    seen, real = {}, analyses.student_metrics

    def spy(setup, prep, *args):
        seen.setdefault((args[-1], setup.config.alpha), []).append(prep.transfer.item_state)
        return real(setup, prep, *args)
    monkeypatch.setattr(analyses, "student_metrics", spy)
    go(tiny, tmp_path, "--methods", "naive", "--analysis", "sweep")
    every, middle = seen["graph-only", 0.9]
    assert every.shape[1] > 1 and torch.equal(middle, every[:, :1])
    assert "auto" in [alpha for name, alpha in seen if name == "graph-only"]


def test_unconditional_prompt_and_layers_read(tiny, tmp_path):
    """--own pmi takes an option's likelihood after "A:" alone, a yes or no's after "Question:", from its
    score [D1]; probe and graph are offered the middle, the three-quarters and the final state [D14]."""
    from data import Item, Question
    from model import hidden_at
    setup = set_up(tiny, tmp_path, "--own", "pmi")
    strong = setup.strong
    questions = [Question("a", "a", "", "Who is there?", ("one", "two"), 1),
                 Question("b", "b", "", "is it red", ("no", "yes"), 0)]
    some = [Item("a/0", "a", "", 0, 0), Item("b/1", "b", "", 1, 0)]
    part = selw2s.Part(some, questions)
    got = selw2s.elicit(setup, "test", part, [], selw2s.read_questions(setup, questions))

    def score(before, after):
        head, whole = strong.tokenizer.encode([before, before + after])
        final, = strong.network.packed(torch.tensor(whole), [len(whole)])
        logp = strong.network.logits(final).log_softmax(-1)
        return sum(float(logp[t - 1, whole[t]]) for t in range(len(head), len(whole)))
    for n, (q, last) in enumerate(zip(questions, ("A:", "Question:"))):
        pmi = [score(selw2s.prompt(q), selw2s.completion(q, i)) - score(last, selw2s.completion(q, i))
               for i in range(2)]
        torch.testing.assert_close(got.belief[n], torch.tensor(pmi, dtype=torch.float64).softmax(0),
                                   rtol=1e-4, atol=1e-5)
    depth, ids = strong.network.config.layers, strong.tokenizer.encode([selw2s.prompt(q) for q in questions])
    for r, layer in enumerate(dict.fromkeys((depth // 2, 3 * depth // 4, None))):
        torch.testing.assert_close(got.prompt_state[:, r], hidden_at(strong.network, ids, layer=layer))


@pytest.mark.parametrize("shown", [0, 1, 2])
def test_the_state_of_an_item_is_that_of_its_text(tiny, tmp_path, shown):
    """Where the text of the item ends, the candidate it shows last; a yes/no question is the item [D14]."""
    from data import YES_NO, Item, Question
    from model import hidden_at
    setup = set_up(tiny, tmp_path)
    questions = [Question("a", "a", "", "Who is there?", ("one of us", "two", "nobody at all"), 1),
                 Question("b", "b", "", "is it red", YES_NO, 0)]
    texts = [selw2s.prompt(q) for q in questions]
    texts[0] += selw2s.completion(questions[0], shown)
    some = [Item(f"a/{shown}", "a", texts[0], shown, 0), Item("b/1", "b", texts[1], 1, 0)]
    every = [Question("c", "c", "", "Which colour?", ("red", "blue"), 0), *questions[::-1]]
    got = selw2s.elicit(setup, "test", selw2s.Part(some, questions), [], selw2s.read_questions(setup, every))
    strong = setup.strong
    depth, ids = strong.network.config.layers, strong.tokenizer.encode(texts)
    for r, layer in enumerate(dict.fromkeys((depth // 2, 3 * depth // 4, None))):
        torch.testing.assert_close(got.item_state[:, r], hidden_at(strong.network, ids, layer=layer))


@pytest.mark.figures
@pytest.mark.slow
@pytest.mark.parametrize("analysis, rows", [("difficulty", 3), ("sweep", 28)])
def test_analyses_give_every_row_for_every_seed(tiny, tmp_path, analysis, rows):
    result = go(tiny, tmp_path, "--methods", "naive", "--seeds", "0", "1", "--analysis", analysis)
    assert len(result["analysis"]) == rows
    for metrics in result["analysis"].values():
        assert [m["seed"] for m in metrics] == [0, 1] and all(0 <= m["accuracy"] <= 1 for m in metrics)
    if analysis == "sweep":
        naive = result["metrics"]["methods"]["naive"]
        for row in ("tau 1.01 (route-only)", "alpha 0 (graph-only)",        # the off-identities, as rows
                    "alpha 0 (graph-only, middle layer)"):
            assert [m["accuracy"] for m in result["analysis"][row]] == pytest.approx(naive["per_seed"])
        coverage = [np.mean([m["coverage"] for m in v])
                    for k, v in result["analysis"].items() if k.startswith("tau")]
        assert coverage[0] == 1 and coverage[-1] == 0 and coverage == sorted(coverage, reverse=True)


@pytest.mark.figures
@pytest.mark.slow
@pytest.mark.parametrize("analysis", ["difficulty", "sweep"])
def test_methods_weak_makes_an_analysis_train_no_student(tiny, tmp_path, analysis, monkeypatch):
    """Its rows are those of a run with students, less their accuracy; drawn and planned without them."""
    flags = ("--analysis", analysis)
    every = go(tiny, tmp_path, "--methods", "naive", *flags)["analysis"]
    monkeypatch.setattr(selw2s, "student", None)
    rows = go(tiny, tmp_path, "--methods", "weak", *flags)["analysis"]
    assert rows == {title: [{k: v for k, v in m.items() if k != "accuracy"} for m in metrics]
                    for title, metrics in every.items()}
    assert len(list(tmp_path.glob("*/*/analysis.svg"))) == 2
    planned = {row.name for row in selw2s.plan(selw2s.parse([*tiny, "--methods", "weak", *flags, "--plan"]))}
    assert planned & set(selw2s.METHODS) == {"weak"}
    flags = ("--methods", "weak", "--analysis", "representation", "--plan")      # which is of students alone
    planned = {row.name for row in selw2s.plan(selw2s.parse([*tiny, *flags]))}
    assert planned & set(selw2s.METHODS) == {"weak", "ceiling", "naive"}


def test_over_long_contexts_are_cut_at_their_end_and_no_item_is_dropped(tiny):
    from data import Question, Task, fit
    config = selw2s.parse(list(tiny))
    encoders = [selw2s.pretrained(tiny[i], False, config).tokenizer.encode for i in (3, 5)]
    words = " ".join(f"w{i}" for i in range(400))
    long = Question("a", "a", words, "Which word is last?", ("w1", "w399", "w7", "none of them at all"), 1)
    short = long._replace(id="b", group="b", context="w0 w1")
    task, counts = fit(Task("t", [short], [long], "", ""), encoders, 128)
    assert task.train == [short] and counts == {"left_out": 0, "cut": 1}
    kept = task.test[0]
    assert words.startswith(kept.context) and kept._replace(context="") == long._replace(context="")
    texts = [selw2s.prompt(kept) + selw2s.completion(kept, i) for i in range(4)]
    longest = max(len(ids) for encode in encoders for ids in encode(texts))
    assert 128 - 16 < longest <= 128
    with pytest.raises(selw2s.DataError, match="even without its context"):
        fit(Task("t", [short], [long._replace(context="", question=words)], "", ""), encoders, 128)


@pytest.mark.parametrize("between", ["", "\n"])
def test_a_context_without_spaces_is_cut_by_characters(tiny, between):
    from data import Question, Task, fit
    config = selw2s.parse(list(tiny))
    encoders = [selw2s.pretrained(tiny[i], False, config).tokenizer.encode for i in (3, 5)]
    context = between.join(f"w{i}" for i in range(400))
    long = Question("a", "a", context, "Which word is last?", ("w1", "w399", "w7", "w8"), 1)
    kept, = fit(Task("t", [], [long], "", ""), encoders, 128)[0].test
    texts = [selw2s.prompt(kept) + selw2s.completion(kept, i) for i in range(4)]
    longest = max(len(ids) for encode in encoders for ids in encode(texts))
    assert context.startswith(kept.context) and 128 - 16 < longest <= 128


def test_train_questions_that_test_asks_are_left_out(tiny):
    from data import Task, fit
    task = selw2s.load_task(tiny[1])
    leaky = Task("t", task.train, task.test + task.train[:1], "", "")
    kept, counts = fit(leaky, [], 128)
    assert {q.group for q in kept.train}.isdisjoint({q.group for q in kept.test})
    assert len(kept.train) == len(task.train) - 2 and counts["left_out"] == 2   # both questions of that group
    assert fit(leaky, [], 128, apart=False)[0] == leaky
    assert [len(part) for part in fit(leaky, [], 128, limit=7)[0][1:3]] == [7, 7]


def test_a_kept_student_gives_the_probabilities_of_the_run(tiny, tmp_path):
    from model import Classifier, load
    from safetensors.torch import load_file
    flags = ("--methods", "selective", "--keep", "selective")
    for _ in range(2):                                  # computed, then from the cache
        result = go(tiny, tmp_path, *flags)
        folder, = (tmp_path / "students").glob("task-selective-seed0-????????")
        head = load_file(folder / "model.safetensors")["score.weight"]
        whole = {**load_file(folder / "model.safetensors")}
        del whole["score.weight"]
        from safetensors.torch import save_file
        save_file(whole, tmp_path / "model.safetensors")
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        student, tokenizer = load(str(tmp_path))
        task = selw2s.load_task(tiny[1])
        texts = {i.id: i.text for i in selw2s.items(task.test, protocol="paper", seed=0)}
        data = arrays(result, tmp_path)
        p = Classifier(student, {"classifier.weight": head}).predict(
            tokenizer.encode([texts[i] for i in data["seed0/test/id"]]))
        np.testing.assert_allclose(p.numpy(), data["seed0/test/p/selective"], atol=1e-6)
        (folder / "model.safetensors").unlink()


@pytest.mark.slow
def test_a_kept_student_is_given_back_as_a_model(tiny, tmp_path):
    """As the weak one always; as the strong one where it still has a head to answer with."""
    from safetensors.torch import load_file, save_file
    untied, strong = tmp_path / "untied", Path(tiny[5])
    shutil.copytree(strong, untied)
    state = load_file(strong / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0)
    save_file(state, untied / "model.safetensors")
    raw = json.loads((strong / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    flags, kept = ("--methods", "naive", "--epochs", "1", "--tune", "head"), {}
    for name, source in (("tied", strong), ("headless", untied)):
        go(tiny, tmp_path / name, *flags, "--keep", "naive", "--strong", str(source))
        kept[name], = map(str, (tmp_path / name / "students").iterdir())
    back = go(tiny, tmp_path / "back", *flags, "--weak", kept["headless"], "--strong", kept["tied"])
    assert back["finished"]
    with pytest.raises(selw2s.LoadError, match="has a classifier's head, and no language model's"):
        go(tiny, tmp_path / "refused", *flags, "--strong", kept["headless"])


def test_heads_share_the_states_they_are_trained_on(tiny, tmp_path, monkeypatch):
    """--tune head: one pass of the weak model over the items for its supervisors, all folds and their labels,
    and one of the strong model for all students. What comes out is what training on the sequences gives."""
    import model
    read, packed = Counter(), model.Transformer.packed
    prepared, student = [], selw2s.student

    def counted(self, tokens, lengths, *rest, **named):
        read[self.config.width] += len(lengths)
        return packed(self, tokens, lengths, *rest, **named)

    def noted(method, setup, prep, *rest):
        prepared.append((setup, prep))
        return student(method, setup, prep, *rest)
    monkeypatch.setattr(model.Transformer, "packed", counted)
    monkeypatch.setattr(selw2s, "student", noted)
    methods = ("--methods", "ceiling", "naive", "strong-on-D_l", "selective")
    result = go(tiny, tmp_path, "--tune", "head", "--weak-seeds", "2", *methods)
    setup, prep = prepared[-1]      # the first ones are those of what is ahead
    n = sum(len(part.items) for part in (prep.labelled, prep.transfer, prep.test))
    assert read == {16: n, 32: 136 + n}         # 136 questions are read, each with all its options
    texts = [[item.text for item in part.items] for part in (prep.transfer, prep.test)]
    for model_of, labels, name in ((setup.supervisors[0].model, prep.labelled.truth, "weak"),
                                   (setup.strong, prep.transfer.weak, "naive")):
        learn = [item.text for item in prep.labelled.items] if name == "weak" else texts[0]
        alone = model.finetune(model_of.network, model_of.tokenizer.encode(learn), labels, lr=model_of.lr,
                               epochs=2, seed=0, tune="head")
        p = alone.predict(model_of.tokenizer.encode(texts[1]))
        np.testing.assert_allclose(arrays(result, tmp_path)[f"seed0/test/p/{name}"], p, atol=1e-6)


@pytest.mark.slow
def test_cross_task_keeps_no_model_of_another_task(tmp_path):
    go((), tmp_path, "--limit", "60", "--methods", "weak", "--keep", "weak", "--analysis", "cross-task",
       "--tune", "head", "--epochs", "1")
    folder, = (tmp_path / "students").iterdir()
    assert folder.name.startswith("demo-sciq-weak-seed0-")


@pytest.mark.figures
@pytest.mark.slow
def test_cross_task_of_a_file_takes_the_official_tasks_that_are_there(tiny, tmp_path, monkeypatch, capsys):
    """A file's questions beside sciq and boolq; cosmosqa's files cannot be had."""
    real = selw2s.load_task

    def load_task(name, *, data_dir):
        if name == "cosmosqa":
            raise selw2s.DataError("train.csv is missing, no download")
        task = real(tiny[1], data_dir=data_dir)
        return task if name == tiny[1] else task._replace(name=name, train=task.train[:-8])
    monkeypatch.setattr(selw2s, "load_task", load_task)
    result = go(tiny, tmp_path, "--methods", "weak", "--analysis", "cross-task")
    assert list(result["analysis"]) == [f"{a} -> {b}" for a in ("task.jsonl", "sciq", "boolq")
                                        for b in ("task.jsonl", "sciq", "boolq")]
    own, there = result["seeds"][0]["diagnostics"]["p_ik"], result["analysis"]["task.jsonl -> task.jsonl"][0]
    assert "accuracy" not in there and 0 <= there["label_accuracy"] <= 1     # --methods weak: no students
    assert there["auroc"] == own["test"]["auroc"] != own["transfer"]["auroc"]
    assert there["ece"] == own["test"]["ece"] != own["transfer"]["ece"]
    said = capsys.readouterr().out
    assert "data      cosmosqa is left out: train.csv is missing, no download" in said
    assert "data      sciq: 88 train and 40 test questions" in said
    monkeypatch.setattr(selw2s, "load_task", lambda name, *, data_dir: real(name, data_dir="/none"))
    monkeypatch.setattr("data.official._download", lambda name, path: None)     # nothing comes
    with pytest.raises(selw2s.DataError, match="files of none of sciq, boolq, cosmosqa can be had"):
        go(tiny, tmp_path, "--methods", "weak", "--analysis", "cross-task", "--folds", "4")


@pytest.mark.slow
def test_hard_labels_are_the_likelier_classes(tiny, tmp_path):
    """--labels hard: what a student is given, what is written of it, and nothing else, changes [D20]."""
    flags = ("--methods", "naive", "self-only", "confidence-only", "two-stage")
    soft = go(tiny, tmp_path / "soft", *flags, "--labels", "soft")
    hard = go(tiny, tmp_path / "soft", *flags, "--labels", "hard")
    (a, b), names = (weights(soft), weights(hard)), ("weak", "self-only", "naive", "two-stage")
    assert [a[name] == b[name] for name in names] == [True, True, False, False]
    by_hand = {}
    for file in (tmp_path / "soft").glob("*/*/result.json"):
        with np.load(file.parent / "items.npz") as arrays:
            which = json.loads(file.read_text())["config"]["labels"]
            by_hand[which] = {key: arrays[key] for key in arrays.files if "label" in key}
    for key, p in by_hand["soft"].items():
        if key.split("/")[-1] in ("naive", "self-only", "confidence-only"):
            want = np.where(np.isnan(p), p, (p > 0.5).astype(p.dtype))
            np.testing.assert_array_equal(by_hand["hard"][key], want, err_msg=key)
    assert "confidence-only" in " ".join(by_hand["hard"])
    answers = ("--methods", "naive", "--student", "answer")
    auto = weights(go(tiny, tmp_path / "soft", *answers))
    for which in ("soft", "hard"):
        told = weights(go(tiny, tmp_path / "soft", *answers, "--labels", which))
        assert (told["naive"] == auto["naive"]) == (which == "hard")


@pytest.mark.figures
@pytest.mark.slow
def test_halves_by_difficulty_are_halves_though_most_are_certain(tiny, tmp_path, monkeypatch):
    """p(gold) of the strong model may be 1 in float32 on most items: no value above the median is left."""
    real = selw2s.elicit

    def certain(setup, name, part, *rest):
        said = real(setup, name, part, *rest)
        gold = right_option(setup.config, part.items, part.questions)
        return said._replace(belief=torch.nn.functional.one_hot(gold, said.belief.shape[1]).float())
    monkeypatch.setattr(selw2s, "elicit", certain)
    result = go(tiny, tmp_path, "--methods", "weak", "--analysis", "difficulty", "--difficulty", "strong")
    for row in result["analysis"].values():
        assert all(0 <= m[f"ece_on_{part}"] <= 1 for m in row for part in ("easy", "hard"))


@pytest.mark.slow
def test_an_analysis_leaves_the_kept_students_alone(tiny, tmp_path):
    result = go(tiny, tmp_path, "--methods", "route-only", "--keep", "route-only", "--analysis", "sweep")
    folder, = (tmp_path / "students").iterdir()
    weights = result["metrics"]["methods"]["route-only"]["weights"][0]
    assert folder.name == f"task-route-only-seed0-{weights[:8]}"


# ------------------------------------------------------------------------------------------------------ demo
@pytest.mark.slow
def test_demo_shows_weak_naive_selective_ceiling_in_this_order(tmp_path):
    """Beside every other method, with three supervisors, in under four minutes."""
    start = time.perf_counter()
    result = selw2s.run(selw2s.parse(["--methods", "all", "--weak-seeds", "3", "--out", str(tmp_path)]))
    assert time.perf_counter() - start < 240 and len(result["metrics"]["methods"]) == len(selw2s.METHODS)
    accuracy = {name: row["accuracy"] for name, row in result["metrics"]["methods"].items()}
    assert 0.55 < accuracy["weak"] < accuracy["naive"] < accuracy["selective"] <= accuracy["ceiling"] + 0.02
    diagnostics = result["seeds"][0]["diagnostics"]
    assert diagnostics["p_ik"]["test"]["auroc"] > 0.7 and 0.2 < diagnostics["coverage"] < 0.95
    routed = {name: parts["routed"] for name, parts in diagnostics["label_accuracy"].items()}
    assert routed["own"] > routed["weak"]               # what the method lives on
