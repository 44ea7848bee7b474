"""Several processes compute what one does. Run: pytest tests/test_many.py (15 s; CI=1: two minutes).

This file is also the program that torchrun starts: python tests/test_many.py FOLDER, see worker().
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, write_llama

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
CASES = {       # name: model, student, tune, tokens of a micro-batch
    "full": ("tied", "classifier", "full", 8192), "lora": ("own", "classifier", "lora", 60),
    "head": ("tied", "classifier", "head", 8192), "answer": ("own", "answer", "full", 90),
    "answer-lora": ("tied", "answer", "lora", 8192), "half": ("half", "classifier", "full", 8192)}


def write_models(folder: Path) -> None:
    """Two checkpoints, one with a tied head, one with its own, and a tokenizer that knows letters."""
    from tokenizers import Tokenizer, models
    for name in ("tied", "own"):
        write_llama(folder / name, 32, 2, 41, seed=3)
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / name / "tokenizer.json"))
    tensors = load_file(folder / "own/model.safetensors")
    tensors["lm_head.weight"] = torch.randn(41, 32, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "own/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "own/config.json").read_text())
    (folder / "own/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def computed(folder: Path, device: str = "cpu", spreads: bool = False) -> dict[str, torch.Tensor]:
    """Hidden states, a reading, neighbours, and students after 20 steps; spreads: by networks whose weights
    are shared out."""
    import selw2s
    from model import Choice, finetune, hidden_at, load, read, spread
    first = "cpu" if spreads else device
    models = {name: load(str(folder / name), device=first)[0] for name in ("tied", "own")}
    models["half"], _ = load(str(folder / "own"), device=first, dtype=torch.bfloat16)
    if spreads:
        models = {name: spread(network, device) for name, network in models.items()}
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 41, (7 + i % 11,), generator=g).tolist() for i in range(61)]
    choices = [Choice(s[:-5], [s[-5:-3], s[-3:-1], s[-1:]], i % 3) for i, s in enumerate(texts)]
    targets = torch.rand(61, generator=g)
    out = {"hidden": hidden_at(models["tied"], texts, batch_tokens=50)}
    reading = read(models["own"], [c.prompt for c in choices], [c.options for c in choices],
                   [c.shown for c in choices], layers=(1, None), batch_tokens=70)
    every = read(models["own"], [c.prompt for c in choices], [c.options for c in choices], batch_tokens=70)
    out |= {f"read.{name}": x for name, x in reading._asdict().items()} | {"read.every": every.item_state}
    x = torch.randn(61, 8, generator=g).to(device)
    x[40:] = x[7]       # copies: ties to the lower index
    out["neighbours"], out["similarity"] = selw2s.neighbours(x, 5)
    for name, (which, student, tune, tokens) in CASES.items():
        trained = finetune(models[which], texts if student == "classifier" else choices, targets, lr=1e-3,
                           epochs=5, batch=17, seed=1, student=student, tune=tune, batch_tokens=tokens,
                           target_fn=selw2s.log_confidence, checkpoint=name == "full",
                           offload=name == "answer")
        out |= {f"{name}.{key}": x for key, x in trained.state().items()}
        out[f"{name}.p"] = trained.predict((texts if student == "classifier" else choices)[:20])
    return {name: x.detach().cpu().contiguous() for name, x in out.items()}


def kept(folder: Path) -> torch.Tensor:
    """Numbers that this process keeps of the masters of a student trained in full, and all there are; the
    same of a network that is spread, and of a student with its state."""
    from data import many
    from model import Classifier, Learner, load, spread
    network, _ = load(str(folder / "tied"))
    every = sum(x.numel() for x in network.params.values())
    state = {name: x.detach().clone() for name, x in network.params.items()}
    learner = Learner(network, [[1, 2, 3], [2, 4]], "classifier", "full", 8, 1.0, torch.Generator())
    masters = sum(x.numel() for x in learner.trained.values())
    learner.shard(False)
    wide = spread(network, "cpu")
    student = Classifier(wide, state | {"classifier.weight": torch.zeros(2, 32)})

    def mine(tensors):
        return sum(many.share(x).numel() for x in tensors.values())
    return torch.tensor([[mine(learner.trained), masters], [mine(wide.params), every],
                         [mine(student.model.params), every]])


def worker(folder: str, device: str = "cpu") -> None:
    """What a process of torchrun does."""
    from data import many
    many.start(device)
    out = computed(Path(folder), device) | {"kept": kept(Path(folder))}
    out |= {f"spread.{name}": x for name, x in computed(Path(folder), device, True).items()}
    assert many.mesh.cache_info().misses == 1       # beside a GPU each would be a gloo group of its own
    if many.rank() == 0:
        save_file(out, Path(folder) / f"{many.size()}.safetensors")
    many.stop()


def launched(processes: int, *command: str) -> subprocess.CompletedProcess:
    """A command under torchrun, or without for one process."""
    how = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*how, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("many"), torch.get_num_threads()
    write_models(folder)
    torch.set_num_threads(1)        # as torchrun's
    yield folder, computed(folder)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_compute_what_one_does(alone, processes):
    assert_same(alone, processes, "cpu", 1e-6, 1e-5)


def assert_same(alone, processes: int, device: str, reading: float, training: float):
    """What one process computed and what several do; in float32, bfloat16 has 2e-2."""
    folder, one = alone
    done = launched(processes, "tests/test_many.py", str(folder), device)
    assert done.returncode == 0, done.stderr[-3000:]
    several = load_file(folder / f"{processes}.safetensors")
    for mine, every in several.pop("kept").tolist():
        assert every / processes <= mine < 1.2 * every / processes      # norms, embedding: whole on all
    one = one | {f"spread.{name}": x for name, x in one.items()}
    assert several.keys() == one.keys()
    for name, x in one.items():
        if x.dtype == torch.int64:
            assert torch.equal(several[name], x), name
        else:
            case = name.removeprefix("spread.").split(".")[0]
            tolerance = 2e-2 if case == "half" else training if case in CASES else reading
            torch.testing.assert_close(several[name], x, rtol=tolerance, atol=tolerance, msg=name)


def test_one_process_starts_nothing_of_torch_distributed():
    from data import many
    many.start("cpu")
    assert (many.rank(), many.size()) == (0, 1) and not torch.distributed.is_initialized()
    x = torch.rand(5)
    assert many.joined(x, [1]) is x and many.total(x) is x and many.word(x) is x


def test_items_are_dealt_out_by_tokens():
    from data.many import shares
    assert shares([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]      # 9 + 1, 5 + 4
    assert shares([3, 3, 7], 1) == [[2, 0, 1]]
    assert shares([2], 3) == [[0], [], []]


def accuracies(out: Path) -> tuple[dict, dict]:
    """Of a run, by method, and its environment."""
    result = json.loads(next(out.glob("*/*/result.json")).read_text())
    return ({name: row["accuracy"] for name, row in result["metrics"]["methods"].items()}, result["env"])


@pytest.mark.slow
def test_a_whole_run_has_the_accuracies_of_one_process(tiny, tmp_path):
    """Of several processes none is left to the interpreter's end, where threads of gloo's may abort it."""
    script = tmp_path / "run.py"
    script.write_text("import atexit, os, sys, selw2s\n"
                      "if 'RANK' in os.environ:\n    atexit.register(os.abort)\n"
                      "sys.exit(selw2s.main(sys.argv[1:]))\n")
    flags = [str(script), *tiny, "--methods", "naive", "logconf", "selective", "--folds", "2"]
    ways = {"one": (1,), "two": (2,), "spread": (2, "--spread", "1", "--offload", "1")}
    for name, (processes, *more) in ways.items():
        done = launched(processes, *flags, *more, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("written ") == 1
    one, two, spread = (accuracies(tmp_path / name) for name in ways)
    assert one[0] == pytest.approx(two[0], abs=1e-9) and one[0] == pytest.approx(spread[0], abs=1e-9)
    assert (one[1]["world_size"], two[1]["world_size"], spread[1]["world_size"]) == (1, 2, 2)


BRIEF = ["--methods", "naive", "--folds", "2", "--tau", "0.5", "--alpha", "0"]
FAULT = """
import os, sys
import selw2s
real, students = selw2s.finetune, []
def finetune(*args, **kwargs):
    students.append(args)
    if len(students) == 4 and os.environ["RANK"] == "1":     # weak, two folds, and now naive
        {what}
    return real(*args, **kwargs)
selw2s.finetune = finetune
sys.exit(selw2s.main())
"""


def faulty(tmp_path: Path, tiny: list[str], what: str) -> tuple[subprocess.CompletedProcess, float]:
    """A run of two processes, of which the second does that before a student; and its seconds."""
    (tmp_path / "fault.py").write_text(FAULT.format(what=what))
    start = time.monotonic()
    done = launched(2, str(tmp_path / "fault.py"), *tiny, *BRIEF, "--out", str(tmp_path / "out"))
    return done, time.monotonic() - start


def test_an_error_of_one_is_one_line_and_exit_code_2_of_all(tiny, tmp_path):
    done, _ = faulty(tmp_path, tiny, 'raise selw2s.TrainError("the second process is unhappy")')
    assert done.stderr.count("selw2s: the second process is unhappy\n") == done.stderr.count("selw2s: ") == 1
    assert done.stderr.count("exitcode  : 2") == 2      # torchrun's own report
    assert not list((tmp_path / "out").glob("*/*/result.json"))


@pytest.mark.slow
def test_a_task_that_cannot_be_read_is_one_line(tiny, tmp_path):
    """Rank 0 alone reads it."""
    done = launched(2, "selw2s.py", "--task", "nowhere.jsonl", *tiny[2:], "--out", str(tmp_path))
    assert done.stderr.count("selw2s: nowhere.jsonl") == done.stderr.count("selw2s: ") == 1
    assert done.stderr.count("exitcode  : 2") == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--spread", "1")])
def test_states_that_are_not_finite_are_one_line(tiny, tmp_path, flags):
    """Found at the first step, when all label the batch once more."""
    weak, place = tmp_path / "weak", tiny.index("--weak") + 1
    shutil.copytree(tiny[place], weak)
    tensors = load_file(weak / "model.safetensors")
    tensors["model.norm.weight"] *= 3e38
    save_file(tensors, weak / "model.safetensors", {"format": "pt"})
    argv = [*tiny[:place], str(weak), *tiny[place + 1:], *flags, "--out", str(tmp_path / "out")]
    done = launched(2, "selw2s.py", *argv)
    said = "selw2s: hidden states of weak are not finite in float32"
    assert done.stderr.count(said) == done.stderr.count("selw2s: ") == 1, done.stderr[-2000:]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_line(tiny, tmp_path):
    done = launched(2, "selw2s.py", *tiny, "--lr", "1e30", "--methods", "naive", "--out", str(tmp_path))
    assert done.stderr.count("selw2s: the loss is nan") == done.stderr.count("selw2s: ") == 1


@pytest.mark.slow
def test_what_follows_a_run(tiny, tmp_path):
    """--keep saves once; --rerun by two processes finds the same; --merge and --plan are rank 0's work."""
    done = launched(2, "selw2s.py", *tiny, *BRIEF, "--keep", "naive", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "out/students").glob("*/model.safetensors"))) == 1
    file = next((tmp_path / "out").glob("*/*/result.json"))
    command = json.loads(file.read_text())["command"]
    assert command.startswith("torchrun --nproc-per-node 2 selw2s.py --task ")
    for flags, words in ((("--rerun", str(file)), "same"), (("--merge", str(file)), "written"),
                         ((*tiny, "--plan"), "operations a second")):
        done = launched(2, "selw2s.py", *flags, "--out", str(tmp_path / "other"))
        assert done.returncode == 0 and done.stdout.count(words) == 1, done.stderr[-3000:]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_line(tiny, tmp_path):
    done, seconds = faulty(tmp_path, tiny, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert done.returncode and seconds < 60
    assert done.stderr.count("selw2s: a process of this run has died") == done.stderr.count("selw2s: ") == 1
    again = launched(2, "selw2s.py", *tiny, *BRIEF, "--out", str(tmp_path / "out"))
    assert again.returncode == 0, again.stderr[-3000:]
    result = json.loads(next((tmp_path / "out").glob("*/*/result.json")).read_text())
    assert [stage["cached"] for stage in result["stages"]] == [True] * 4 + [False]


def test_more_processes_than_gpus_are_one_line(tiny, tmp_path, monkeypatch):
    """Each looks at its own GPU alone; that there are too few all see."""
    import selw2s
    from data import DataError, many
    checked = []
    monkeypatch.setattr(many, "LAUNCHED", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(selw2s, "check_device", checked.append)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "4"),
                        ("CUBLAS_WORKSPACE_CONFIG", "")):
        monkeypatch.setenv(name, value)
    config = selw2s.parse([*tiny, "--device", "cuda", "--out", str(tmp_path)])
    try:
        with pytest.raises(DataError, match=r"cuda: 4 processes on this machine, which has 3 GPU\(s\)"):
            selw2s.run(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert checked == ["cuda:2"]


def test_a_wrong_flag_costs_one_line():
    done = launched(2, "selw2s.py", "--task", "demo", "--nonsense")
    assert done.stderr.count("selw2s.py: error: unrecognized arguments: --nonsense\n") == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: not measured")
def test_several_gpus_compute_what_one_process_does(alone):
    assert_same(alone, 2, "cuda", 1e-3, 1e-3)


if __name__ == "__main__":
    worker(*sys.argv[1:])
