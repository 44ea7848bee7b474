"""A checkpoint's tokenizer: texts -> ids, the same ids as transformers' tokenizer of that checkpoint.

From tokenizer.json, from vocab.json with merges.txt (GPT-2's, OPT's and Qwen's layout), or from qwen.tiktoken
(first-generation Qwen). No batch, no tensor: lists of ids. Q questions, K completions of one question.
"""
import base64
import json
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json"]
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]


class LoadError(ValueError):
    """A checkpoint that cannot be used: one line saying what is wrong, where, and what to do."""

    def __init__(self, text: str):  # names in a damaged file may hold line feeds, or be a page long
        line = "".join(c if c.isprintable() else " " for c in text)
        super().__init__(line if len(line) < 600 else f"{line[:400]} ... {line[-150:]}")


def there(path: Path) -> bool:
    """Whether a checkpoint has this file. LoadError for a link that leads nowhere, as caches hold them."""
    if path.is_symlink() and not path.exists():
        raise LoadError(f"{path.name} is a link to no file: this snapshot is half-downloaded, download it "
                        "again")
    return path.is_file()


def lacking(folder: Path, otherwise: str) -> str:
    """Why a file is not there: a snapshot in the hub's cache need not be whole."""
    if folder.absolute().parent.name != "snapshots":
        return otherwise
    return "this snapshot is half-downloaded, download it again, or its repository has no such file"


def read_json(path: Path) -> dict:
    """The object that a JSON file of a checkpoint holds. LoadError for anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError:
        there(path)
        why = lacking(path.parent, "a directory in Hugging Face layout is needed")
        raise LoadError(f"no {path.name} there; {why}") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path.name}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path.name}: not a JSON object")
    return value


class Tokenizer:
    """Text <-> ids. rows: of the embedding, where it is known: an id may lie beyond, a text that uses it is
    refused. LoadError for files that are missing, damaged or contradictory."""

    def __init__(self, folder: Path, family: str, rows: int | None = None):
        self.folder, self.rows = folder, rows
        try:
            self.backend = open_backend(folder, family, read_settings(folder))
            self.backend.encode("")  # what a template puts around a text need not be in the vocabulary
        except LoadError:
            raise
        except BaseException as error:
            raise damaged(error) from None

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text. special=False: without the tokens put around a text (BOS), for a text that
        continues another. LoadError for a text that gives no token, or one that the embedding lacks."""
        try:
            ids = [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]
        except BaseException as error:
            raise LoadError(f"{self.folder}: {damaged(error)}") from None
        for text, tokens in zip(texts, ids):
            if text and not tokens:
                raise LoadError(f"{self.folder}: the tokenizer has no token for {text!r:.60}: it is of "
                                "another language or model")
            if self.rows is not None and max(tokens, default=0) >= self.rows:
                raise LoadError(f"{self.folder}: {text!r:.60} has the token id {max(tokens)}, the embedding "
                                f"only {self.rows} rows: change the text, or take the model's own tokenizer")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.backend.decode(list(ids))


def encode_options(tokenizer: Tokenizer, prompts: list[str],
                   completions: list[list[str]]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Ids of prompts (Q) and of their completions (Q x K), split where prompt + completion stops being the
    prompt.

    The whole text is tokenised, then split: a tokenizer may merge across the seam (Qwen2 does "?" and the end
    of the line), and then the merged token counts to the completion, in all completions of that question
    alike, and what is read where the prompt ends is read before it."""
    alone = tokenizer.encode(prompts)
    whole = iter(tokenizer.encode([p + c for p, options in zip(prompts, completions) for c in options]))
    heads, tails = [], []
    for ids, options in zip(alone, completions):
        texts = [next(whole) for _ in options]
        n = min(map(len, texts)) - 1  # a completion has at least one token
        while any(text[:n] != ids[:n] for text in texts):
            n -= 1
        heads.append(texts[0][:n])
        tails.append([text[n:] for text in texts])
    return heads, tails


# ---- making one --------------------------------------------------------------------------------------------

def open_backend(folder: Path, family: str, settings: dict):
    """The tokenizers.Tokenizer of a folder, with no padding and no truncation."""
    from tokenizers import Tokenizer as Backend
    qwen = family.startswith("qwen") or str(settings.get("tokenizer_class")).startswith("Qwen")
    if there(folder / "tokenizer.json"):
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    elif there(folder / "vocab.json") and there(folder / "merges.txt"):
        backend = byte_level(read_json(folder / "vocab.json"), read_merges(folder / "merges.txt"), qwen)
        add_special(backend, settings, qwen)
    elif there(folder / "qwen.tiktoken"):
        backend = byte_level(*from_ranks(folder / "qwen.tiktoken"), True)
        backend.add_special_tokens(QWEN_SPECIAL)
    else:
        why = lacking(folder, "save the tokenizer as tokenizer.json")
        raise LoadError(f"no tokenizer.json there, nor vocab.json with merges.txt, nor qwen.tiktoken; {why}")
    words = backend.pre_tokenizer
    if settings.get("add_prefix_space") and words and b'"add_prefix_space":false' in words.__getstate__():
        raise LoadError("tokenizer_config.json asks for add_prefix_space, tokenizer.json does not")
    backend.no_padding()
    backend.no_truncation()  # GPT-2's own file says 50 tokens
    return backend


def damaged(error: BaseException) -> LoadError:
    """What to raise for an error of the tokenizers package: it raises plain Exception, and panics of its Rust
    code, PanicException, are not even that."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    line = next(iter(str(error).splitlines()), "")
    return LoadError(f"the tokenizer's files are damaged ({line}); download them again")


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt: two tokens a line, best merge first."""
    merges = []
    for n, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise LoadError(f"merges.txt:{n}: not two tokens with a space between them")
        merges.append(pair)
    return merges


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], qwen: bool):
    """A byte-level BPE over GPT-2's alphabet of visible bytes, split into words as GPT-2 or Qwen does it."""
    from tokenizers import Regex, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)
    backend.decoder = decoders.ByteLevel()
    if qwen:
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, backend.pre_tokenizer])
    return backend


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, with what older files tell beside it where it has no added_tokens_decoder."""
    def read_if_there(name):
        return read_json(folder / name) if there(folder / name) else {}

    settings = read_if_there("tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    special, added = read_if_there("special_tokens_map.json"), read_if_there("added_tokens.json")
    decoder = {place: dict(content=token, special=token in special.values())
               for token, place in added.items()}
    return settings | special | dict(added_tokens_decoder=decoder)


def padding(folder: Path, family: str, raw: dict, rows: int) -> int:
    """The token that pads a batch, which transformers wants a classifier to name: that of config.json (raw),
    else of the tokenizer, else the end of a text, else 0; below rows."""
    settings, ends = read_settings(folder), raw.get("eos_token_id")
    token, own = settings.get("pad_token"), None
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        own = open_backend(folder, family, settings).token_to_id(token)
    named = [raw.get("pad_token_id"), own, *(ends if isinstance(ends, list) else [ends])]
    return next((i for i in named if type(i) is int and 0 <= i < rows), 0)


def add_special(backend, settings: dict, qwen: bool) -> None:
    """Special tokens, BOS and EOS, with the defaults of transformers' GPT2Tokenizer and Qwen2Tokenizer."""
    add_decoded(backend, settings.get("added_tokens_decoder") or {})
    default = dict.fromkeys(("eos_token", "unk_token", "pad_token" if qwen else "bos_token"), "<|endoftext|>")
    named = {key: settings.get(key, default.get(key)) for key in (
        "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    others = more.values() if isinstance(more, dict) else more
    for token in filter(None, [*named.values(), *others]):
        backend.add_special_tokens([made(token) if isinstance(token, dict) else token])
    put_around(backend, named["bos_token"] if settings.get("add_bos_token") else None,
               named["eos_token"] if settings.get("add_eos_token") else None)


def made(token: dict):
    """A token as tokenizer_config.json writes it -> AddedToken."""
    from tokenizers import AddedToken
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def add_decoded(backend, added: dict) -> None:
    """added_tokens_decoder (id -> token): each must get the id that it names."""
    for place, token in sorted(added.items(), key=lambda entry: int(entry[0])):
        backend.add_tokens([made(token)])
        if backend.token_to_id(token["content"]) != int(place):
            raise LoadError(f"tokenizer_config.json gives {token['content']!r} the id {place}, vocab.json "
                            "another")


def put_around(backend, bos, eos) -> None:
    """Puts BOS before and EOS behind a text, where they are not None."""
    from tokenizers import processors
    bos, eos = (token["content"] if isinstance(token, dict) else token for token in (bos, eos))
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=[*filter(None, (bos, "$A", eos))],
            special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos} - {None}])


def byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: a visible character for every byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def from_ranks(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """qwen.tiktoken (base64 token, rank) -> vocabulary and merges. There two neighbours merge when together
    they are a token, lowest rank first; so every split of a token into two tokens is a merge of that token's
    rank."""
    ranks, letter = {}, byte_letters()
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            code, rank = line.split()
            token = base64.b64decode(code, validate=True)
            if not token or token in ranks or int(rank) != len(ranks):
                raise ValueError
        except ValueError:
            raise LoadError(f"{path.name}:{n}: not a new token in base64 and the rank {len(ranks)}; download "
                            "it again") from None
        ranks[token] = len(ranks)
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise LoadError(f"{path.name}: byte {missing[0]} has no rank; download it again")
    text = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                merges.append((text[token[:i]], text[token[i:]]))
    return {text[token]: rank for token, rank in ranks.items()}, merges
