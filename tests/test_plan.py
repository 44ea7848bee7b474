"""--plan against what is measured: operations, memory, the stages of a run.

Run: pytest tests/test_plan.py (30 s; with CI=1 three minutes, with the real pair in ./pair seven).

Memory is that of a process of its own, over what it had before the model was loaded, its tokenizer left out;
Linux alone tells it. The allocator is asked to give large pieces back at once, or the peak would tell how
it reuses them.
"""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import selw2s
from conftest import ROOT, write_llama
from data.architecture import configure
from data.results import memory, work
from data.results.plan import Row, Sketch, page, speed
from model import Choice, finetune, load, read

DEMO = {name: str(ROOT / "data/demo" / name) for name in ("weak", "strong")}
REAL = {name: str(ROOT / "pair" / name) for name in ("smollm2-135m", "gemma-3-270m")}
ATEN = torch.ops.aten
CPU_ATTENTION = {       # torch's counter knows the attention of GPUs only
    ATEN._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)}
CASES = [("full", "classifier", False), ("lora", "classifier", False), ("head", "classifier", False),
         ("full", "answer", False), ("lora", "answer", False), ("full", "classifier", True),
         ("lora", "answer", True)]
SLOW = pytest.mark.slow
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                           reason="Linux alone tells a process's peak")


def counted(do) -> int:
    """Operations of do() by torch's counter."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        do()
    return counter.get_total_flops()


def sketch(source: str, dtype=torch.float32) -> Sketch:
    raw = json.loads((Path(source) / "config.json").read_text())
    return Sketch(configure(raw), torch.device("cpu"), dtype)


def inputs_of(vocab: int, n: int, longest: int, student: str) -> list:
    """n inputs of different lengths: sequences, or Choices of three options."""
    g = torch.Generator().manual_seed(n)
    lengths = torch.randint(longest // 3, longest + 1, (n,), generator=g).tolist()
    sequences = [torch.randint(0, vocab, (length,), generator=g).tolist() for length in lengths]
    if student == "classifier":
        return sequences
    return [Choice(s[:-6], [s[-6:-4], s[-4:-1], s[-1:]], i % 3) for i, s in enumerate(sequences)]


def settings_of(tune: str, student: str, batch: int = 16, checkpoint: bool = False) -> dict:
    return dict(lr=1e-4, epochs=1, batch=batch, seed=0, tune=tune, checkpoint=checkpoint, student=student,
                offload=False)


# ---- operations --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, tune, student, checkpoint", [
    ("strong", "full", "classifier", False), ("weak", "lora", "answer", True),
    *(pytest.param(name, *case, marks=SLOW) for name in DEMO for case in CASES)])
def test_operations_of_finetuning_are_those_counted(name, tune, student, checkpoint):
    network, _ = load(DEMO[name])
    inputs = inputs_of(network.config.vocab, 40, 60, student)
    settings = settings_of(tune, student, checkpoint=checkpoint)
    planned = work.stage_work(sketch(DEMO[name]), inputs, [inputs[:20]], settings, None)
    trained = []
    assert planned.training == pytest.approx(
        counted(lambda: trained.append(finetune(network, inputs, [0.5] * 40, **settings))), rel=0.05)
    assert planned.predicting[0] == pytest.approx(counted(lambda: trained[0].predict(inputs[:20])), rel=0.05)
    assert planned == work.stage_work(network, inputs, [inputs[:20]], settings, None)


@SLOW
@pytest.mark.parametrize("student", ["classifier", "answer"])
def test_operations_in_bfloat16_and_of_a_rule_with_several_micro_batches(student, monkeypatch):
    network, _ = load(DEMO["strong"], dtype=torch.bfloat16)
    monkeypatch.setattr(work, "TRAIN_TOKENS", 300)
    inputs, settings = inputs_of(network.config.vocab, 40, 60, student), settings_of("lora", student)
    rule = selw2s.log_confidence
    planned = work.stage_work(sketch(DEMO["strong"], torch.bfloat16), inputs, [], settings, rule).training
    assert planned == pytest.approx(counted(lambda: finetune(
        network, inputs, [0.5] * 40, target_fn=rule, batch_tokens=300, **settings)), rel=0.05)


@pytest.mark.parametrize("name", ["weak", pytest.param("strong", marks=SLOW)])
def test_operations_of_reading_are_those_counted(name):
    network, _ = load(DEMO[name])
    choices = inputs_of(network.config.vocab, 60, 50, "answer")
    heads, tails = [c.prompt for c in choices], [c.options for c in choices]
    planned, tokens = work.reading(sketch(DEMO[name]), heads, tails)
    assert planned == pytest.approx(counted(lambda: read(network, heads, tails, [0] * 60, layers=(1, None))),
                                    rel=0.05)
    assert tokens == sum(len(head) + sum(map(len, tail)) for head, tail in zip(heads, tails))


def test_operations_of_families_by_hand():
    """2 per weight and token forward, 6 in training: grouped keys, gates, own head dimension, capped
    scores."""
    raw = dict(model_type="gemma2", vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=6, intermediate_size=30)
    network = Sketch(configure(raw), torch.device("cpu"), torch.float32)
    weights = 12 * (24 + 12 + 12) + 24 * 12 + 3 * 12 * 30
    choices = [Choice(list(range(9)), [[1], [2, 3]], 0)]        # 12 tokens, 2 states scored
    assert work.forward(network, choices) == 2 * (2 * weights * 12 + 4 * 12 * 12 * 24) + 2 * 2 * 12 * 50
    assert work.update(network, [choices], settings_of("full", "answer"), None) == \
        3 * (2 * 2 * weights * 12 + 2 * 2 * 12 * 50) + 2 * 3 * 4 * 12 * 12 * 24


# ---- memory ------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import model
from data import many
from test_plan import DEMO, do, inputs_of, settings_of, sketch
many.start("cpu")
def status(key):
    text = open("/proc/self/status").read()
    return 1024 * int(text.split(key + ":")[1].split()[0])
source, dtype, settings, n, longest, spread = {case!r}
torch.backends.mkldnn.set_flags(dtype == "float32")     # it keeps 0.1 GB of programs for products of bfloat16
network, _ = model.load(DEMO["weak"], dtype=getattr(torch, dtype))
# threads, kernels, their scratch
do(network, inputs_of(network.config.vocab, 8, 20, settings["student"]), settings)
del network
model.Tokenizer = lambda *_: None       # Gemma's takes 0.2 GB
inputs = inputs_of(sketch(source).config.vocab, n, longest, settings["student"])
before = status("VmRSS")
network, _ = model.load(source, dtype=getattr(torch, dtype))
if spread:
    network = model.spread(network, "cpu")
open("/proc/self/clear_refs", "w").write("5")       # the peak begins again
do(network, inputs, settings)
print(json.dumps(status("VmHWM") - before), flush=True)
many.stop()
"""


def do(network, inputs: list, settings: dict):
    """Finetunes and predicts; reads with three hidden states where settings are of no finetuning."""
    if settings["tune"] == "read":
        return read(network, [x.prompt for x in inputs], [x.options for x in inputs], layers=(1, 2, None))
    return finetune(network, inputs, [0.5] * len(inputs), **settings).predict(inputs[:64])


def assert_peak_is_that_measured(source: str, tune: str, student: str, checkpoint: bool, n: int, longest: int,
                                 batch: int, dtype: str = "float32", devices: int = 1, spread: bool = False):
    """Within 15 % of the resident bytes of a process that loads and does it, over what it had before."""
    network, settings = sketch(source, getattr(torch, dtype)), settings_of(tune, student, batch, checkpoint)
    inputs = inputs_of(network.config.vocab, n, longest, student)
    weights = memory.held(network, devices if spread else 1)
    if tune == "read":
        heads, tails = [x.prompt for x in inputs], [x.options for x in inputs]
        planned = memory.of_reading(network, weights, heads, tails, 3)
    else:
        planned = memory.of_finetuning(network, weights, inputs, settings, devices, spread)
    case = (source, dtype, settings, n, longest, spread)
    code = MEASURE.format(root=str(ROOT), tests=str(ROOT / "tests"), case=case)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    how = [sys.executable, "-c", code]
    if devices > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
        how = [*torchrun, "--nproc-per-node", str(devices), *how]
    done = subprocess.run(how, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.splitlines()[-1])
    print(f"{Path(source).name} {tune} {student} {checkpoint} {dtype}: "
          f"planned {planned.peak() / 1e6:.1f} MB, measured {measured / 1e6:.1f}; {planned}")
    assert planned.peak() == pytest.approx(measured, rel=0.15)


@LINUX
@pytest.mark.parametrize("name, tune, student, checkpoint", [
    ("strong", "full", "classifier", False), pytest.param("weak", "lora", "answer", True, marks=SLOW),
    *(pytest.param("strong", *case, marks=SLOW) for case in (*CASES, ("read", "answer", False)))])
def test_peak_memory_is_that_measured(name, tune, student, checkpoint):
    n = 2048 if tune in ("head", "read") else 256
    assert_peak_is_that_measured(DEMO[name], tune, student, checkpoint, n, 60, 128)


@SLOW
@LINUX
@pytest.mark.parametrize("tune, student, checkpoint", [("full", "answer", False), ("read", "answer", False)])
def test_peak_memory_in_bfloat16_is_that_measured(tune, student, checkpoint):
    n = 2048 if tune in ("head", "read") else 256
    assert_peak_is_that_measured(DEMO["strong"], tune, student, checkpoint, n, 60, 128, "bfloat16")


@SLOW
@LINUX
@pytest.mark.parametrize("tune, student, checkpoint, devices, spread", [
    ("full", "answer", True, 4, False), ("lora", "answer", True, 2, True)])
def test_peak_memory_of_one_of_several_processes_is_that_measured(tmp_path, tune, student, checkpoint,
                                                                  devices, spread):
    write_llama(tmp_path / "model", 384, 12, 500, seed=1)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "model/tokenizer.json"))
    assert_peak_is_that_measured(str(tmp_path / "model"), tune, student, checkpoint, 256, 60, 128,
                                 devices=devices, spread=spread)


@SLOW
@LINUX
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("tune, student, checkpoint", [
    ("full", "classifier", False), ("lora", "classifier", False), ("head", "classifier", False),
    ("full", "answer", False), ("full", "classifier", True), ("read", "answer", False)])
def test_peak_memory_of_real_models_is_that_measured(name, tune, student, checkpoint):
    if not Path(REAL[name]).is_dir():
        pytest.skip(f"no pair/{name}: python tests/make_pair.py pair")
    assert_peak_is_that_measured(REAL[name], tune, student, checkpoint, 64, 40, 32)


# ---- the stages of a run -----------------------------------------------------------------------------------

@pytest.fixture
def weightless(tiny, tmp_path):
    """tiny's command line on copies of its models without their weights."""
    argv = list(tiny)
    for name in ("weak", "strong"):
        place = argv.index(f"--{name}") + 1
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / name / file).write_bytes((Path(argv[place]) / file).read_bytes())
        argv[place] = str(tmp_path / name)
    return argv


@pytest.mark.parametrize("flags", [
    ("--methods", "all", "--folds", "2", "--seeds", "0", "1", "--weak-seeds", "2"),
    pytest.param(("--methods", "all", "--student", "answer", "--tune", "lora", "--own", "pmi"), marks=SLOW),
    pytest.param(("--methods", "chain", "--shots", "1", "--own", "mean", "--tune", "head", "--seeds", "1",
                  "2"), marks=SLOW),
    pytest.param(("--methods", "fused", "--protocol", "openai", "--own", "judge", "--tau", "0.3", "--alpha",
                  "0"), marks=SLOW)])
def test_the_plan_is_the_run(flags, tiny, weightless, tmp_path):
    """Stage by stage: names, items, tokens, steps and operations, the last as progress had them; of
    confidence-only and two-stage, whose items follow from values, about. No weight is there to read."""
    asked, real = {}, selw2s.Stages.__call__

    def noted(self, stage, name, depends, compute, **about):
        out = real(self, stage, name, depends, compute, **about)
        inputs = depends[4 if stage == "finetune" else 3]
        if not self.log[-1]["cached"]:
            asked[name, self.log[-1]["key"]] = [len(inputs), about["tokens"], about["cost"][1]]
        return out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selw2s.Stages, "__call__", noted)
        result = selw2s.run(selw2s.parse([*tiny, *flags, "--out", str(tmp_path / "out")]))
    recorded = {(stage["name"], stage["key"]): stage for stage in result["stages"] if not stage["cached"]}
    rows = selw2s.plan(selw2s.parse([*weightless, *flags, "--plan", "--out", str(tmp_path / "none")]))
    assert asked.keys() == recorded.keys()
    left = {}
    for row in rows:
        left.setdefault(row.name, []).append(row)
    for key, amounts in asked.items():
        same = [row for row in left[key[0]] if [row.items, row.tokens, row.operations] == amounts]
        row = (same or left[key[0]])[0]
        left[key[0]].remove(row)
        exact = row.name not in ("confidence-only", "two-stage first", "two-stage")
        near = 1 if row.name == "two-stage" else 0.15     # half of the items to all of them
        assert [row.items, row.tokens, row.operations] == pytest.approx(amounts, rel=0 if exact else near)
        assert recorded[key]["tokens"] == amounts[1]
        if exact and "steps" in recorded[key]:
            passes = 1 if "answer" in flags and row.kind == "finetune strong" else 2
            assert recorded[key]["steps"] == passes * -(-row.items // 32)
    # what is planned beyond that had the labels of another method, by chance: found in the cache
    found = {stage["name"] for stage in result["stages"] if stage["cached"]}
    assert {name for name, rows in left.items() if rows} <= found
    assert not (tmp_path / "none").exists()


def test_labels_of_the_file_need_no_weak_model(weightless, tmp_path):
    task = Path(weightless[weightless.index("--task") + 1])
    lines = [json.loads(line) | {"weak": [0.1, 0.2, 0.3, 0.4]} for line in task.read_text().splitlines()]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    strong = weightless[weightless.index("--strong") + 1]
    task = str(tmp_path / "labelled.jsonl")
    rows = selw2s.plan(selw2s.parse(["--task", task, "--strong", strong, "--methods", "naive", "--plan"]))
    assert [row.name for row in rows] == ["read", "naive"]


def test_what_is_printed(weightless, capsys):
    """All in 110 columns; a GPU is planned without one; LoRA has small gradients and moments."""
    def go(*flags):
        rows = selw2s.plan(selw2s.parse([*weightless, "--plan", *flags]))
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 110
        return rows, text
    rows, text = go("--seeds", "0", "1", "--device", "cuda", "--dtype", "bfloat16")
    lines = [line.split() for line in text.splitlines() if line.startswith(("stage ", "cross ", "all "))]
    assert lines[0][:4] == ["stage", "items", "tokens", "operations"]
    assert lines[0][-3:] == ["here", "A100", "H100"]
    assert int(lines[1][1].replace(",", "")) == sum(row.items for row in rows if row.name.startswith("cross"))
    assert int(lines[2][2].replace(",", "")) == sum(row.tokens for row in rows)
    assert f"here: {'cuda' if torch.cuda.is_available() else 'cpu'}, " in text
    lora, _ = go("--tune", "lora", "--methods", "naive")
    assert 0 < lora[-1].memory.adam < rows[-1].memory.adam
    swept, _ = go("--methods", "naive", "--analysis", "sweep")
    assert Counter(row.name for row in swept)["graph-only"] == 7 + 4 + 8     # alphas, k, alphas and auto


def test_the_hours_are_operations_by_speed():
    network = sketch(DEMO["strong"])
    device, per_second = speed("cpu", "float32", network.config, seconds=0.05)
    assert device == "cpu" and 1e8 < per_second < 1e14
    assert speed("cuda:99", "bfloat16", network.config, seconds=0.01)[0] == "cpu"
    row = Row("naive", "finetune strong", 10, 100, int(3.6e15), memory.Memory(10 ** 9))
    words = page([row], ("cpu", 1e12), "float32").splitlines()[1].split()
    assert words[-6:] == ["60", "min", "7.7", "min", "2.2", "min"]      # 1, 0.4 x 19.5, 0.4 x 67 times 1e12


@pytest.mark.slow
def test_several_devices_share_masters_gradients_and_moments(weightless, capsys, monkeypatch):
    """Both models are whole on each: only what is trained in float32 is shared, or goes to the CPU."""
    monkeypatch.setitem(memory.BATCH_TOKENS, "cuda", 64)    # or these models would need most to predict
    def naive(*flags):
        return selw2s.plan(selw2s.parse([*weightless, "--device", "cuda", "--plan", *flags]))[-1]
    one, four, offloaded = naive(), naive("4"), naive("4", "--offload", "1")
    text = capsys.readouterr().out
    assert "4 A100" in text and "4 H100" in text and max(map(len, text.splitlines())) <= 110
    assert one.operations == four.operations
    assert four.memory.adam == pytest.approx(one.memory.adam / 4, abs=8) and offloaded.memory.adam == 0
    assert one.memory.weights - four.memory.weights == pytest.approx(3 / 8 * one.memory.adam, abs=8)
    assert four.memory.activations < one.memory.activations
    assert offloaded.memory.weights < four.memory.weights
    assert naive("--spread", "1").memory == one.memory


@pytest.mark.slow
def test_a_model_of_72_billion_parameters_is_planned_at_once(weightless, tmp_path):
    config = Path(weightless[weightless.index("--strong") + 1]) / "config.json"
    config.write_text(json.dumps({
        "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064}))
    rows = selw2s.plan(selw2s.parse([*weightless, "--plan", "--dtype", "bfloat16", "--tune", "lora"]))
    naive = rows[-1]
    assert naive.memory.weights == pytest.approx(2 * 72.7e9, rel=0.01)
    # a product's two operations, forward, again (activation checkpointing) and backward by activations alone
    per_token = (naive.operations / (naive.tokens + naive.tokens * 68 / 48 / 2)) / 70.2e9
    assert 4 < per_token < 6
    assert rows[0].memory.weights > 2 * 72e9      # the strong model is there from the beginning
    flags = ["--dtype", "bfloat16", "--tune", "lora", "--device", "cuda", "--plan", "8", "--spread", "1"]
    naive = selw2s.plan(selw2s.parse([*weightless, *flags]))[-1]
    embedding, block = 2 * 2 * 152064 * 8192, 2 * 70.2e9 / 80       # and a head; bytes
    assert naive.memory.weights == pytest.approx(embedding + (2 + 10 + 10 + 10) * block, rel=0.02)


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "bert"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer")])
def test_a_wrong_model_costs_one_line(damage, words, weightless, capsys):
    damage(Path(weightless[weightless.index("--strong") + 1]))
    assert selw2s.main([*weightless, "--plan"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize("flags, words", [
    (("--weak", "no/such-model"), "no/such-model"), (("--weak", "../x/y"), "../x/y"),
    (("--device", "tpu"), "tpu"),
    (("--shots", "999"), "--shots"), (("--task", "nothing"), "nothing")])
def test_a_wrong_flag_costs_one_line(flags, words, weightless, capsys):
    assert selw2s.main([*weightless, "--plan", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_of_a_hub_id_no_weight_is_fetched(weightless, monkeypatch, tmp_path):
    import huggingface_hub
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **how: asked.update(how, name=name) or str(tmp_path / "weak"))
    selw2s.plan(selw2s.parse([*weightless, "--plan", "--weak", "some/model@abc"]))
    assert asked["name"] == "some/model" and asked["revision"] == "abc"
    assert "config.json" in asked["allow_patterns"] and "tokenizer.json" in asked["allow_patterns"]
    assert not [pattern for pattern in asked["allow_patterns"] if "safetensors" in pattern]
