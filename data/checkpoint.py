"""A checkpoint on disk: files -> parameters under canonical names, and back; the device they go to.

No network here: model.py builds one from what this gives. Names from data/families.py, structure from the
tensors present: every tensor of the files is consumed once or is known to be none of the network's, every
expected one is there with its shape.
"""
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import write_whole
from data.architecture import Config, tensors, unread_keys
from data.families import FAMILIES
from data.tokens import TOKENIZER_FILES, LoadError, lacking, padding, read_json, there

CLASSIFIER = re.compile(r"score\.(weight|bias)|v_head\..*")  # a head that this program does not read
WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]


def check_device(device) -> None:
    """LoadError unless torch can put a tensor there."""
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch is built without CUDA
        line = next(iter(str(error).splitlines()), "")
        raise LoadError(f"device {str(device)!r} cannot be used ({line}): choose cpu, or cuda where there is "
                        "a GPU") from None


OF_MKL = ("cos", "sin", "tanh", "exp", "log", "sqrt")


def first_calls() -> None:
    """MKL picks a function's code at its first call. When several threads make that call at once, one of them
    may be given code that is right to 1e-4 only (pytorch issue 188792): hence one element each, before."""
    for name, dtype in itertools.product(OF_MKL, (torch.float32, torch.float64)):
        getattr(torch, name)(torch.ones(1, dtype=dtype))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is what PyTorch raises when a GPU's or the machine's memory runs out."""
    said = "can't allocate memory", "out of memory", "ALLOC_FAILED"  # the last is cuBLAS
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def find(source: str) -> Path:
    """The directory itself, or a hub repository's snapshot in the local cache, downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?", source):
        raise LoadError(f"{source}: no such directory")
    from huggingface_hub import snapshot_download
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except Exception as error:  # they come from three libraries and share no base class
        line = next(iter(str(error).strip().splitlines()), "")
        raise LoadError(f"{source}: no such directory, and the hub gives {type(error).__name__}: "
                        f"{line}") from None


def open_tensors(path: Path):
    """An open safetensors file. LoadError for one that is missing or damaged."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise LoadError(f"{path.name}: missing, truncated or damaged ({error}); download it again") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it: model.safetensors where it is there, whatever an
    index beside it says, as in transformers; else the files of the index, which must agree with it."""
    index, mapped = folder / "model.safetensors.index.json", None
    files = [folder / "model.safetensors"]
    if not files[0].exists() and there(index):
        mapped = read_json(index).get("weight_map")
        if not isinstance(mapped, dict) or any(Path(str(file)).name != file for file in mapped.values()):
            raise LoadError(f"{index.name}: weight_map must give plain file names in the same directory")
        files = [folder / file for file in sorted(set(mapped.values()))]
    elif not files[0].exists():
        raise LoadError(f"no model.safetensors there; {no_weights(folder)}")
    found = {}
    for path in files:
        if not os.path.exists(path):  # Path.exists raises for a name that no file can have
            raise LoadError(f"{path.name}: missing, though {index.name} names it: this checkpoint is "
                            "half-downloaded, download it again")
        with open_tensors(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    if mapped is not None and {name: path.name for name, path in found.items()} != mapped:
        odd = sorted(set(mapped) ^ set(found)) or ["a name in two files"]
        raise LoadError(f"{index.name} and its files disagree, first on {odd[0]}")
    return found


def no_weights(folder: Path) -> str:
    """What a folder has that lacks both model.safetensors and an index. LoadError for a link to no file."""
    there(folder / "model.safetensors")
    if any(folder.glob("*-*.safetensors")):
        return "only shards without their model.safetensors.index.json: download that too"
    pickles = "pickle checkpoints are refused: convert to safetensors"
    return pickles if any(folder.glob("*.bin")) else lacking(folder, pickles)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, its values finite. The file is opened for each, so that the pages of its memory map are
    given back at once."""
    try:
        with open_tensors(path) as file:
            x = file.get_tensor(name)
    except SafetensorError as error:  # a type that PyTorch has not
        raise LoadError(f"tensor {name} in {path.name} cannot be read ({error}): use float32, float16 or "
                        "bfloat16") from None
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LoadError(f"tensor {name} is {x.dtype}: quantised checkpoints and other types are refused, use "
                        "float32, float16 or bfloat16")
    if x.numel() and not all(map(math.isfinite, x.aminmax())):  # NaN is its own least and greatest
        raise LoadError(f"tensor {name} holds NaN or infinity: {path.name} is damaged, download it again")
    return x


def bare(name: str, prefix: str) -> str:
    """A tensor's name without the family's prefix, or as much of it as is there: of OPT's model.decoder. some
    checkpoints have decoder. alone."""
    for part in re.findall(r"[^.]+\.", prefix):
        name = name.removeprefix(part)
    return name


def read_params(c: Config, files: dict[str, Path], device, dtype) -> tuple[dict[str, Tensor], list[str]]:
    """All parameters under canonical names, and the tensors ignored. Every tensor of the files is consumed
    once, or is a known buffer or a classifier's head; every expected one is there with its shape, but perhaps
    the language model's own head where a classifier was saved."""
    row, params = FAMILIES[c.family], {}
    left = {bare(name, row["prefix"]): (path, name) for name, path in files.items()}
    if len(left) != len(files):
        raise LoadError(f"some tensors are there both with and without the prefix {row['prefix']!r}")
    ignored = [name for name in left if re.fullmatch(row["buffers"], name) or CLASSIFIER.fullmatch(name)]
    for name in ignored:
        del left[name]
    head, embed = (row["names"][part] + ".weight" for part in ("head", "embed"))
    if c.tied and embed not in left and head in left:  # one tensor, saved under its other name
        left[embed] = left.pop(head)
    for source, names, shapes in tensors(c):
        if source not in left:
            if source == head and "score.weight" in ignored:
                continue
            raise LoadError(f"tensor {source} is missing")
        stored = read_tensor(*left.pop(source))
        for name, piece in zip(names, canonical(c, source, stored, shapes)):
            params[name] = piece.to(device, torch.float32 if is_norm(name) else dtype, copy=True).contiguous()
            if dtype == torch.float16 and not params[name].isfinite().all():
                raise LoadError(f"tensor {source} does not fit into float16: choose bfloat16 or float32")
            if is_norm(name) and row.get("plus_one"):
                params[name] += 1
    if c.tied and head in left and not torch.equal(read_tensor(*left.pop(head)).to(device, dtype),
                                                   params["embed.weight"]):
        raise LoadError(f"tie_word_embeddings ties the head to the embedding, but {head} differs from it")
    if left:
        raise LoadError(f"{len(left)} unexpected tensors, the first is {next(iter(left))}")
    return params, ignored


def summary(c: Config, params: dict[str, Tensor], ignored: list[str], raw: dict) -> str:
    """The line that says what was loaded, and what of the checkpoint was left aside."""
    head = "tied"
    if not c.tied:
        head = "own" if "head.weight" in params else "no"
    count, dtype = sum(x.numel() for x in params.values()) / 1e6, params["embed.weight"].dtype
    line = (f"{c.family}: {len(params)} tensors, {len(ignored)} ignored, {head} head, {count:.1f}M "
            f"parameters, {str(dtype).removeprefix('torch.')}")
    if named := [name for name in ignored if CLASSIFIER.fullmatch(name)]:
        line += f"; a classifier's head ignored: {', '.join(named):.300}"
    if unread := unread_keys(raw):
        line += f"; unknown keys of config.json ignored: {', '.join(unread):.300}"
    return "".join(letter if letter.isprintable() else " " for letter in line)


def canonical(c: Config, source: str, stored: Tensor, shapes: list[tuple]) -> tuple[Tensor, ...]:
    """A tensor of the file -> the parts fused in it, each (out, in) as the network wants it."""
    row = FAMILIES[c.family]
    x = stored.t() if turned(row, source, stored) else stored
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if x.shape != whole:
        raise LoadError(f"tensor {source} has shape {tuple(x.shape)}, config.json implies {whole}")
    if row.get("per_head") and len(shapes) == 3:
        x = x.view(c.heads, 3, c.head_dim, *whole[1:]).transpose(0, 1).reshape(whole)
    return x.split([shape[0] for shape in shapes])


def is_norm(name: str) -> bool:
    """Norms are kept and computed in float32, whatever the dtype."""
    return "norm" in name or "post" in name


def turned(row: dict, source: str, x: Tensor) -> bool:
    """Whether the file keeps this matrix as (in, out)."""
    return row.get("transposed", False) and source.startswith("h.") and x.ndim == 2


def export(c: Config, params: dict[str, Tensor], head: bool = False) -> dict[str, Tensor]:
    """read_params backwards: the family's own names and layout, on the CPU; with the language model's head
    only if asked, where it has one of its own: a classifier has another."""
    row, out = FAMILIES[c.family], {}
    for source, names, _ in tensors(c):
        whose = "" if names == ["head.weight"] else row["prefix"]
        if not whose and not head:
            continue
        x = torch.cat([params[name].detach() for name in names])
        if row.get("per_head") and len(names) == 3:
            x = x.view(3, c.heads, c.head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        if row.get("plus_one") and is_norm(names[0]):
            x = x - 1
        out[whose + source] = (x.t() if turned(row, source, x) else x).contiguous().cpu()
    return out


def merged(params: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters, LoRA added to the matrices that it stands beside."""
    out = dict(params)
    for stem in [name.removesuffix(".lora_a") for name in params if name.endswith(".lora_a")]:
        delta = params[stem + ".lora_b"].float() @ params[stem + ".lora_a"].float()  # (O, C)
        out[stem + ".weight"] = (params[stem + ".weight"].float() + delta).to(dtype)
    return out


def save(model, folder: Path, classifier: Tensor | None = None) -> None:
    """A model.Transformer in Hugging Face layout, LoRA merged, with its tokenizer. With a classifier's head
    (2, C) it loads as AutoModelForSequenceClassification where the family has one; without, with its own
    head, as AutoModelForCausalLM, and as a checkpoint here. FileExistsError for the pretrained model's own
    folder and for one with a sharded model."""
    if folder.resolve() == model.folder.resolve() or any(folder.glob("*.index.json")):
        raise FileExistsError(f"{folder}: holds another model")
    files = export(model.config, merged(model.params, model.dtype), head=classifier is None)
    stale, said = ["torch_dtype"], {"dtype": str(model.dtype).removeprefix("torch.")}
    if classifier is not None:
        files["score.weight"] = classifier.detach().cpu()
        stale += ["architectures", "auto_map", "num_labels", "label2id"]
        said["id2label"] = {"0": "no", "1": "yes"}
        said["pad_token_id"] = padding(model.folder, model.config.family, model.raw, model.config.vocab)
    raw = {key: value for key, value in model.raw.items() if key not in stale}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", lambda temporary: save_file(files, temporary, {"format": "pt"}))
    for name in TOKENIZER_FILES:
        if (model.folder / name).is_file():
            write_whole(folder / name, lambda temporary: shutil.copyfile(model.folder / name, temporary))
    text = json.dumps(raw | said, indent=1)     # last: without it a folder is no model
    write_whole(folder / "config.json", lambda temporary: temporary.write_text(text, "utf-8"))
