"""data/tokens.py against transformers' own tokenizers: the same ids for awkward texts.

Run: pytest tests/test_tokens.py (about 20 s on two cores). Real files are read from ../shared.
"""
import base64
import json

import pytest
from conftest import SHARED

from data.tokens import LoadError, Tokenizer, byte_letters, encode_options

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


AWKWARD = ["", " ", "  two", "a  b   c", "\n", "a\n\nb \n", "\t x", "Hello world", " hello",
           "it's they'll WE'RE", "1234567890 3.14",
           "naïve café", "e\u0301", "日本語のテキスト", "中文，标点。",
           "🙂👩‍👩‍👧", "مرحبا",
           "<|endoftext|>", "a<|endoftext|>b", "<|im_start|>user", "</s> <s>",
           "foo_bar(x)[0] != {y};", "http://a.b/c?d=e&f", "A" * 40, "\u200b\ufeff", "Q: what? A: yes",
           "...!!!", "½ ² ①", "\r\n\r\n  x"]


@pytest.mark.parametrize("files, family", [
    ("hub/tokenizers/gpt2 tokenizer.json", "gpt2"),
    ("hub/tokenizers/gpt-neox-20b tokenizer.json", "gpt_neox"),
    ("hub/tokenizers/gpt2 vocab.json merges.txt", "gpt2"),
    ("hub/Qwen__Qwen2.5-0.5B vocab.json merges.txt tokenizer_config.json", "qwen2"),
    ("checkpoints/sciq-weak tokenizer.json", "llama"), ("checkpoints/stories260K tokenizer.json", "llama")])
def test_token_ids(files, family, tmp_path):
    folder, *names = files.split()
    for name in names:
        (tmp_path / name).symlink_to(shared(folder, name))
    if names == ["tokenizer.json"]:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / names[0]))
    else:
        theirs = {"gpt2": transformers.GPT2Tokenizer,
                  "qwen2": transformers.Qwen2Tokenizer}[family].from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path, family)
    assert tokenizer.encode(AWKWARD) == [theirs(text)["input_ids"] for text in AWKWARD]
    assert tokenizer.encode(AWKWARD, special=False) == [
        theirs(text, add_special_tokens=False)["input_ids"] for text in AWKWARD]
    assert tokenizer.backend.get_vocab_size() == len(theirs)
    ids = tokenizer.encode(["The park's 3 dogs,\n naïve 🙂"])[0]
    assert tokenizer.decode(ids) == "The park's 3 dogs,\n naïve 🙂"


def test_qwen_tiktoken_ids(tmp_path):
    """First-generation Qwen has the second's vocabulary, kept as ranks: rebuilt from them, ids must be
    the same."""
    vocab = json.loads(shared("hub", "Qwen__Qwen2.5-0.5B", "vocab.json").read_text())
    letters = {c: b for b, c in byte_letters().items()}
    with open(tmp_path / "qwen.tiktoken", "wb") as file:
        for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
            file.write(base64.b64encode(bytes(letters[c] for c in token)) + f" {rank}\n".encode())
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "second").mkdir(exist_ok=True)
        (tmp_path / "second" / name).symlink_to(shared("hub", "Qwen__Qwen2.5-0.5B", name))
    first, second = Tokenizer(tmp_path, "qwen"), Tokenizer(tmp_path / "second", "qwen2")
    assert first.encode(AWKWARD) == second.encode(AWKWARD)
    assert first.backend.get_vocab_size() == 151851  # 151,643 ranks, 3 named and 205 extra special tokens
    assert first.encode(["<|extra_204|>"]) == [[151850]]


@pytest.mark.parametrize("settings, more, family", [
    (dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True), {}, "gpt2"),
    (dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_eos_token=True, pad_token="[PAD]"), {},
     "gpt2"),
    (dict(tokenizer_class="GPT2Tokenizer", additional_special_tokens=["<mask>"]), {}, "gpt_neo"),
    (dict(tokenizer_class="GPT2Tokenizer"), {"added_tokens.json": {"[PAD]": 50257},
     "special_tokens_map.json": {"pad_token": "[PAD]", "bos_token": "<s>"}}, "gpt2"),
    (dict(tokenizer_class="GPT2Tokenizer"), {}, "qwen2"),
    (dict(tokenizer_class="GPT2Tokenizer"), {}, "llama"),
    (dict(tokenizer_class="Qwen2Tokenizer"), {}, "llama")])
def test_token_ids_with_settings(settings, more, family, tmp_path):
    """What tokenizer_config.json and older files beside it say of vocab.json and merges.txt."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(shared("hub", "tokenizers", "gpt2", name))
    for name, content in (more | {"tokenizer_config.json": settings,
                                  "config.json": dict(model_type=family)}).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path, family)
    texts = AWKWARD + ["[PAD]", "<s> hi</s>", "<mask> ", "a [PAD]b", "x<|endoftext|> y", "I'M don'T 1234"]
    assert tokenizer.encode(texts) == [theirs(text)["input_ids"] for text in texts]
    assert tokenizer.backend.get_vocab_size() == len(theirs)


@pytest.mark.parametrize("names", ["tokenizer.json", "vocab.json merges.txt"])
def test_a_prefix_space_that_is_asked_for_only_is_refused(names, tmp_path):
    for name in names.split():
        (tmp_path / name).symlink_to(shared("hub", "tokenizers", "gpt2", name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(add_prefix_space=True)))
    with pytest.raises(LoadError, match="add_prefix_space"):
        Tokenizer(tmp_path, "gpt2")


def test_bos_of_vocab_and_merges(tmp_path):
    """OPT's files put </s> before a text by tokenizer_config.json alone."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "</s>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        bos_token={"content": "</s>"}, eos_token="</s>", add_bos_token=True)))
    tokenizer = Tokenizer(tmp_path, "opt")
    assert (tokenizer.encode(["abba"]) == [[3, 2, 1, 0]]
            and tokenizer.encode(["abba"], special=False) == [[2, 1, 0]])


def test_options_are_split_where_the_prompt_ends(tmp_path):
    """A token merged across the seam belongs to the completion, in all completions of that question."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4}))
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(bos_token="</s>", add_bos_token=True)))
    tokenizer = Tokenizer(tmp_path, "opt")
    prompts, completions = ["ca", "cc", "c"], [["b", "c", "bc"], ["a"], ["ab", "ca"]]
    heads, tails = encode_options(tokenizer, prompts, completions)
    assert heads == [[4, 2], [4, 2, 2], [4, 2]]
    assert tails == [[[3], [0, 2], [3, 2]], [[0]], [[3], [2, 0]]]
    for prompt, options, head, tail in zip(prompts, completions, heads, tails):
        assert [head + ids for ids in tail] == tokenizer.encode([prompt + option for option in options])
