"""Finished stages on disk, under the hash of everything that they depend on.

A run that is killed and started again finds its finished stages here, and so does another method, seed or
run that needs the same work. The inputs themselves are hashed (token ids, targets, settings, checkpoint,
source of the networks), so what is found is never stale; a damaged file is seen by its checksum and computed
again.
"""
import hashlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import data.many as many
from data import write_whole

ROOT = Path(__file__).resolve().parent.parent
NETWORK = [ROOT / name for name in (    # all stages run it
    "model.py", "data/many.py", "data/architecture.py", "data/checkpoint.py", "data/families.py",
    "data/tokens.py")]


def digest(*parts) -> str:
    """SHA-256 of the content of all parts: tensors by bytes, functions by source, lists of lists or tensors
    one by one, the rest by repr."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            h.update(f"{part.dtype}{tuple(part.shape)}".encode())
            h.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, list) and part and isinstance(part[0], (list, Tensor)):
            h.update(digest(*part).encode())
        else:
            h.update((inspect.getsource(part) if callable(part) else repr(part)).encode() + b"\0")
    return h.hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's files, by name and content."""
    h = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt", ".tiktoken") and file.is_file():
            with open(file, "rb") as f:
                h.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return h.hexdigest()


class Stages:
    """stages(...) gives a stage's values: <out>/cache/<stage>-<sha256 of what it depends on>.safetensors.

    tell(line) prints a line of the run; log has a record per stage asked for: name, cached, key, seconds;
    progress says on stderr how far the run is."""

    def __init__(self, directory: Path, tell: Callable[[str], None], device: str = "cpu"):
        self.directory, self.tell, self.device, self.log = directory, tell, device, []
        self.progress = Progress()
        processor = platform.machine(), torch.backends.cpu.get_cpu_capability()
        if device.startswith("cuda"):
            processor = torch.cuda.get_device_name(device)
        sources = [path.read_text("utf-8") for path in NETWORK]
        self.source = digest(sources, torch.__version__, torch.get_num_threads(), many.size(), processor)
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".*.safetensors.*"):     # half-written by a killed run (data.write_whole)
            with suppress(FileNotFoundError):               # another run may tidy up too
                if time.time() - left.stat().st_mtime > 86400:      # a day old: no living run writes it
                    left.unlink()

    def __call__(self, stage: str, name: str, depends: tuple, compute: Callable[[], dict], *,
                 cost: tuple[str, float] = ("", 0.0), **work) -> dict:
        """compute() -> {name: tensor or text}, or the stored ones, texts from the file's metadata.

        name, cost (kind and operations, for progress) and work (steps, tokens: numbers for the log) do not
        enter the key."""
        path = self.directory / f"{stage}-{digest(stage, self.source, *depends)}.safetensors"
        found = many.word(self.found(path) if many.rank() == 0 else None)
        if found:
            values, record = found
            self.log.append({"name": name, "cached": True, "key": path.stem[-12:], **record})
            self.progress.found(name)
            return values
        start = time.perf_counter()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        self.progress.begin(name, *cost, work.get("tokens", 0))
        try:
            values = compute()
        finally:
            self.progress.end()
        record = {"seconds": round(time.perf_counter() - start, 3), "peak_gb": peak_gb(self.device), **work}
        if "tokens" in work:
            record["tokens_per_second"] = round(work["tokens"] / max(record["seconds"], 1e-3))
        self.log.append({"name": name, "cached": False, "key": path.stem[-12:], **record})
        if many.rank() == 0:
            store(path, values, record)
        return values

    def found(self, path: Path) -> tuple[dict, dict] | None:
        """What is stored there; None if nothing, or if it is damaged."""
        try:
            return stored(path) if path.exists() else None
        except (SafetensorError, KeyError, ValueError) as error:
            self.tell(f"cache     {path.name[:40]}... is damaged ({error}): computed again")


def store(path: Path, values: dict, record: dict) -> None:
    """Values of a stage and its record as a safetensors file, whole or not at all."""
    tensors = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
    texts = {name: x for name, x in values.items() if name not in tensors}
    metadata = {"record": json.dumps(record), "texts": json.dumps(texts)}
    metadata["sha256"] = digest(metadata["record"], metadata["texts"], *chain(*sorted(tensors.items())))
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def stored(path: Path) -> tuple[dict, dict]:
    """Values and record of a stage's file; SafetensorError, KeyError or ValueError if it is damaged."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    content = digest(metadata["record"], metadata["texts"], *chain(*sorted(tensors.items())))
    if content != metadata["sha256"]:
        raise SafetensorError("its checksum differs")
    return tensors | json.loads(metadata["texts"]), json.loads(metadata["record"])


def peak_gb(device: str) -> float | None:
    """Peak memory so far in GB: of the GPU since the stage began, or of this process; None on Windows."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    try:
        import resource
    except ImportError:     # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024      # of ru_maxrss: bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


MINUTE = 60.0


class Progress:
    """Share of the run that is done and time left, on stderr: a bar on a terminal, erased at each stage's
    end, elsewhere a line a minute (between two steps: none comes during one).

    Work is in operations (data/results/work.py). Each kind of stage, as "finetune weak", has the rate of its
    last minute of work in this run; a kind that did none yet, that of all others together. A stage found in
    the cache is done; what lies between stages, probes and smoothing, is not foreseen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.said, self.bar = clock, clock(), None
        self.ahead = {}         # stage's name: (kind, work of one, how many are left)
        self.recent = {}        # kind: (seconds, work) of every step of its last minute
        self.done, self.name, self.kind, self.work, self.at, self.tokens = 0.0, "", "", 0.0, 0.0, 0

    def foreseen(self, name: str) -> float:
        """Takes one stage of this name off what is ahead; its work, 0 if none was."""
        kind, work, times = self.ahead.get(name, ("", 0.0, 0))
        self.ahead[name] = kind, work, max(0, times - 1)
        return work if times else 0.0

    def found(self, name: str) -> None:
        """A stage was in the cache."""
        self.done += self.foreseen(name)

    def begin(self, name: str, kind: str, work: float, tokens: int) -> None:
        """A stage begins; now its work is known exactly."""
        self.foreseen(name)
        self.name, self.kind, self.work, self.at, self.tokens = name, kind, work, 0.0, tokens
        self.last = self.clock()

    def end(self) -> None:
        """The stage is over."""
        self.done, self.work, self.at = self.done + self.work, 0.0, 0.0
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def part(self, work: float) -> Callable:
        """progress(done, of, loss) for model.py's functions, which do the next `work` of the stage."""
        start = self.at

        def progress(done, of, loss=None):
            now, at = self.clock(), start + work * done / of
            if self.kind in self.recent:
                recent = self.recent[self.kind]
                recent.append((now - self.last, at - self.at))
                while sum(seconds for seconds, _ in recent[1:]) >= MINUTE:
                    del recent[0]
            else:
                self.recent[self.kind] = []     # the first step is slow: it prepares what later ones use
            self.at, self.last = at, now
            if any(self.recent.values()):
                self.show(loss)
        return progress

    def rate(self, kind: str) -> float:
        """Work per second."""
        steps = self.recent.get(kind) or [step for steps in self.recent.values() for step in steps]
        return sum(work for _, work in steps) / max(sum(seconds for seconds, _ in steps), 1e-9)

    def state(self) -> tuple[float, float, float]:
        """Share of the run that is done, seconds left of the stage and of the run."""
        stage = (self.work - self.at) / max(self.rate(self.kind), 1e-9)
        todo = [(kind, work * times) for kind, work, times in self.ahead.values() if work * times]
        left = stage + sum(work / max(self.rate(kind), 1e-9) for kind, work in todo)
        total = self.done + self.work + sum(work for _, work in todo)
        return (self.done + self.at) / max(total, 1e-9), stage, left

    def show(self, loss: float | None) -> None:
        """The bar, twice a second, or the line of a minute."""
        terminal = sys.stderr.isatty()
        if many.rank() or self.clock() - self.said < (0.5 if terminal else MINUTE):
            return
        self.said = self.clock()
        share, stage, left = self.state()
        speed = self.rate(self.kind) * self.tokens / max(self.work, 1e-9)
        text = (f"run {share:.0%}, {duration(left)} left; {self.name} "
                f"{self.at / max(self.work, 1e-9):.0%}, {duration(stage)} left, {speed:,.0f} tokens/s"
                + ("" if loss is None else f", loss {loss:.3f}"))
        if not terminal:
            print(f"progress  {text}", file=sys.stderr, flush=True)
            return
        if self.bar is None:
            from tqdm import tqdm       # here: only a terminal needs it; it comes with huggingface_hub
            self.bar = tqdm(total=1.0, leave=False, file=sys.stderr, ncols=columns() - 1, nrows=20,
                            delay=1e-9, bar_format="|{bar:10}| {desc}")    # nrows: else none at a size of 0
        self.bar.n = share
        self.bar.set_description_str(text)


def columns() -> int:
    """Width of the terminal that stderr is, 80 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def duration(seconds: float) -> str:
    """As 0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
