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
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
NETWORK = [ROOT / name for name in (
    "model.py", "data/checkpoint.py", "data/families.py", "data/tokens.py")]    # all stages run it


def digest(*parts) -> str:
    """SHA-256 of the content of all parts: tensors by bytes, functions by source, the rest by repr."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            h.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.view(torch.uint8).numpy().tobytes())
        else:
            h.update((inspect.getsource(part) if callable(part) else repr(part)).encode() + b"\0")
    return h.hexdigest()


class Stages:
    """stages(...) gives a stage's values: <out>/cache/<stage>-<sha256 of what it depends on>.safetensors.

    tell(line) prints a line of the run; log has a record per stage asked for: name, cached, key, seconds."""

    def __init__(self, directory: Path, tell: Callable[[str], None], device: str = "cpu"):
        self.directory, self.tell, self.device, self.log = directory, tell, device, []
        gpu = [torch.cuda.get_device_name(device)] if device.startswith("cuda") else []
        sources = [path.read_text("utf-8") for path in NETWORK]
        self.source = digest(sources, torch.__version__, torch.get_num_threads(), *gpu)
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".*"):   # half-written by a killed run, a day old: no living run writes it
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink(missing_ok=True)

    def __call__(self, stage: str, name: str, depends: tuple, compute: Callable[[], dict], **work) -> dict:
        """compute() -> {name: tensor or text}, or the stored ones, texts from the file's metadata.

        name and work (steps, tokens: numbers for the log) do not enter the key."""
        path = self.directory / f"{stage}-{digest(stage, self.source, *depends)}.safetensors"
        if path.exists():
            try:
                values, record = stored(path)
                self.log.append({"name": name, "cached": True, "key": path.stem[-12:], **record})
                return values
            except (SafetensorError, KeyError, ValueError) as error:
                self.tell(f"cache     {path.name[:40]}... is damaged ({error}): computed again")
        start = time.perf_counter()
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        values = compute()
        record = {"seconds": round(time.perf_counter() - start, 3), "peak_gb": peak_gb(self.device), **work}
        if "tokens" in work:
            record["tokens_per_second"] = round(work["tokens"] / max(record["seconds"], 1e-3))
        self.log.append({"name": name, "cached": False, "key": path.stem[-12:], **record})
        store(path, values, record)
        return values


def store(path: Path, values: dict, record: dict) -> None:
    """Values of a stage and its record as a safetensors file, whole or not at all."""
    tensors = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
    texts = {name: x for name, x in values.items() if name not in tensors}
    metadata = {"record": json.dumps(record), "texts": json.dumps(texts)}
    metadata["sha256"] = digest(metadata["record"], metadata["texts"], *chain(*sorted(tensors.items())))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def counter(name: str):
    """Progress on stderr, on a terminal only, at most twice a second."""
    shown = [0.0]

    def show(step, steps, loss):
        if sys.stderr.isatty() and (time.monotonic() - shown[0] > 0.5 or step == steps):
            shown[0] = time.monotonic()
            print(f"\r{name} {step}/{steps}" if step < steps else "\r\033[K", end="", file=sys.stderr,
                  flush=True)
    return show
