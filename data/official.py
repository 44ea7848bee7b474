"""The official releases of SciQ, BoolQ and CosmosQA: pinned by SHA-256, downloaded once, read in memory.

    SciQ       Welbl et al. 2017, arXiv 1707.06209    4 options; its support passage is not in the text
    BoolQ      Clark et al. 2019, arXiv 1905.10044    yes/no about a passage
    CosmosQA   Huang et al. 2019, arXiv 1909.00277    4 options about a passage
"""
import csv
import hashlib
import http.client
import io
import json
import os
import re
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from data import YES_NO, DataError, Question, Task, distinct, plain, write_whole

COSMOS = "https://github.com/wilburOne/cosmosqa/raw/master/data/"
FILES = {                                        # path below data_dir: bytes, SHA-256, homes
    "sciq/SciQ.zip": (2_821_345, "7f3312f6ac6b09970b32942d106a8c44ec0dad46a0369f17d635aff8e348a87c",
                      ["https://ai2-public-datasets.s3.amazonaws.com/sciq/SciQ.zip",
                       "https://s3-us-west-2.amazonaws.com/ai2-website/data/SciQ.zip"]),
    "boolq/train.jsonl": (6_525_813, "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db",
                          ["https://storage.googleapis.com/boolq/train.jsonl"]),
    "boolq/dev.jsonl": (2_238_726, "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a",
                        ["https://storage.googleapis.com/boolq/dev.jsonl"]),
    "cosmosqa/train.csv": (16_660_449, "d8d5ca1f9f6534b6530550718591af89372d976a8fc419360fab4158dee4d0b2",
                           [COSMOS + "train.csv"]),
    "cosmosqa/valid.csv": (2_128_345, "a6a94fc1463ca82bb10f98ef68ed535405e6f5c36e044ff8e136b5c19dea63f3",
                           [COSMOS + "valid.csv"]),
}
Row = tuple[Question, list[str]]                 # a question without group, the keys that tie it to others


def content(name: str, data_dir: str | None) -> bytes:
    """FILES[name], without network if it is there; DataError unless its SHA-256 is the pinned one."""
    path = Path(data_dir or os.environ.get("SELW2S_DATA") or "~/.cache/selw2s") / name
    size, sha256, _ = FILES[name]
    try:
        path = path.expanduser()                 # RuntimeError where nobody knows a home directory
        if not path.exists():
            _download(name, path)
        with path.open("rb") as file:
            body = file.read(size + 1)           # a longer file is a wrong one: its rest is not read
    except (OSError, RuntimeError) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {problem}; choose another folder with --data-dir") from None
    if (found := hashlib.sha256(body).hexdigest()) != sha256:
        raise DataError(f"{path} is not the official file: SHA-256 {found} of its first {len(body):,} bytes, "
                        f"expected {sha256}; move it away and run again to download it")
    return body


def _download(name: str, path: Path) -> None:
    """From the first home that serves the pinned bytes; `path` appears whole and checked, or not at all."""
    size, sha256, homes = FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in homes:
        print(f"downloading {url} ({size / 1e6:.1f} MB)", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                if not response.url.startswith("https://"):
                    raise OSError(f"redirected to {response.url}, which is not https")
                body = response.read(size + 1)   # a larger file is not it: read no further
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
            continue
        found = hashlib.sha256(body).hexdigest()
        if found == sha256:
            break
        problem = f"got {len(body):,} bytes of SHA-256 {found}, expected {size:,} of {sha256}"
    else:
        raise DataError(f"{path} is missing, no download: {problem}; get {homes[0]} and put it there")
    write_whole(path, lambda temporary: temporary.write_bytes(body))


def key(kind: str, text: str) -> str:
    """Case, spacing and punctuation do not make two texts different; signs such as + and - do, and so does
    punctuation where there is no letter, as in "2.", "(2)" and "2?"."""
    text = plain(text).casefold()
    if any(c.isalpha() for c in text):
        text = re.sub("[.,;:!?()\"'“”‘’]", " ", text)
    return " ".join([kind, *text.split()])


def grouped(rows: Iterable[Row]) -> list[Question]:
    """Questions with group: the id of the first one that a chain of shared keys leads to (union-find)."""
    rows, parent, first = list(rows), {}, {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for _, keys in rows:
        for other in keys:
            parent[root(other)] = root(keys[0])
    return [q._replace(group=first.setdefault(root(keys[0]), q.id)) for q, keys in rows]


def sciq(split: str, data_dir: str | None = None) -> Iterable[Row]:
    """split: train, valid or test. The right answer's place is a hash of the question: it tells nothing.

    Tied by passage, and by wording whatever the distractors: that is one fact, asked again. Options that
    repeat another stay, for the openai protocol; elsewhere they count once (`data.distinct`)."""
    with zipfile.ZipFile(io.BytesIO(content("sciq/SciQ.zip", data_dir))) as archive:
        rows = json.loads(archive.read(f"SciQ dataset-2 3/{split}.json"))
    for n, row in enumerate(rows):
        options = [row["distractor1"], row["distractor2"], row["distractor3"]]
        answer = zlib.crc32(row["question"].encode()) % 4
        options.insert(answer, row["correct_answer"])
        keys = [key("question", row["question"])]
        if row["support"]:
            keys.append(key("passage", row["support"]))
        yield Question(f"sciq-{split}-{n}", "", "", row["question"], tuple(options), answer), keys


def boolq(split: str, data_dir: str | None = None) -> Iterable[Row]:
    """split: train or dev. Tied by passage: no wording stands with two."""
    for n, line in enumerate(content(f"boolq/{split}.jsonl", data_dir).splitlines()):
        row = json.loads(line)
        name, answer, keys = f"boolq-{split}-{n}", int(row["answer"]), [key("passage", row["passage"])]
        yield Question(name, "", row["passage"], row["question"], YES_NO, answer), keys


def cosmosqa(split: str, data_dir: str | None = None) -> Iterable[Row]:
    """split: train or valid. Tied by passage only: the same wording asks of many stories."""
    text = content(f"cosmosqa/{split}.csv", data_dir).decode()
    for n, row in enumerate(csv.DictReader(io.StringIO(text, newline=""))):
        name, options = f"cosmosqa-{split}-{n}", tuple(row[f"answer{i}"] for i in range(4))
        keys = [key("passage", row["context"])]
        yield Question(name, "", row["context"], row["question"], options, int(row["label"])), keys


def load(name: str, data_dir: str | None = None) -> Task:
    """A benchmark in the files' order; groups span training and test questions. Raises DataError."""
    reader, held_out, licence = {"sciq": (sciq, "test", "CC BY-NC 3.0"),
                                 "boolq": (boolq, "dev", "CC BY-SA 3.0"),
                                 "cosmosqa": (cosmosqa, "valid", "CC BY 4.0")}[name]
    try:
        train, test = list(reader("train", data_dir)), list(reader(held_out, data_dir))
        for q, _ in train + test:
            "".join((q.context, q.question, *q.options)).encode()
            if not 0 <= q.answer < len(q.options) or len(distinct(q.options)) < 2:
                raise ValueError(f"answer {q.answer} of {q.options}")
    except DataError:
        raise
    except Exception as error:                   # as the hashes hold, only another pin can lead here
        raise DataError(f"{name}: the files are not in the official format ({error!r:.200}); "
                        "check the pins in data/official.py") from None
    questions = grouped(train + test)
    _, digests, homes = zip(*(FILES[file] for file in FILES if file.startswith(name)))
    source = f"official release, {licence}: {' '.join(urls[0] for urls in homes)}"
    repeated = sum(len(q.options) - len(distinct(q.options)) for q in questions)
    return Task(name, questions[:len(train)], questions[len(train):], "+".join(digests), source, repeated)
