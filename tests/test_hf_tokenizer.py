"""The tokenizer files of an export give transformers exactly our ids."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from corpus.tokenizer import END_OF_TEXT, CharTokenizer, JSONTokenizer, gpt2_tokenizer, train_bpe
from hf_import import open_model
from hf_tokenizer import check_vocabulary, merge_rules, tokenizer_files, vocabulary
from tests.exports import exported, small
from tests.small_models import config_of, shaken
from tests.tiny import CHARACTERS

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world, it's the year 2024; isn't that they'll've gone?",
    "   leading,  double,\tand trailing spaces   ",
    "\n\n\n\r\n \u3000\u00a0 \x85 many     kinds of\n   \n whitespace  \n",
    "Die Straße heißt 日本語 🙂👩‍👩‍👧 e\u0301 \u200b \ufffd \U0010ffff",
    "def f(x):\n\n        return {\n\t'a': x ** 2,  # no\n}\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 00000000000 ======= ........",
    " " * 300 + "x" + "\n" * 300 + "y" + "\t " * 200,
    "\x00\x01\x7f control \x1f",
    "",
]


def write(tokenizer, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in tokenizer_files(tokenizer, 77).items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    directory = write(gpt2_tokenizer(), tmp_path_factory.mktemp("tokenizer"))
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_ours(theirs, text):
    ids = gpt2_tokenizer().encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
def test_ids_of_any_text_are_ours(theirs, text):
    ids = gpt2_tokenizer().encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_its_file_is_read_back_as_the_same_bytes():
    ours = gpt2_tokenizer()
    read = JSONTokenizer("again", tokenizer_files(ours, 77)["tokenizer.json"])
    assert (read.eot, read.vocab_size) == (ours.eot, ours.vocab_size)
    assert (read.token_bytes() == ours.token_bytes()).all()
    assert all(read.decode_bytes([i]) == ours.decode_bytes([i]) for i in range(50257))


def test_ids_of_real_prose_are_ours(theirs, real_data):
    text = (real_data / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    assert theirs(text)["input_ids"] == gpt2_tokenizer().encode(text).tolist()


def test_the_end_of_text_is_a_token_of_its_own_there(theirs):
    assert theirs(f"{END_OF_TEXT}a")["input_ids"] == [50256, 64]
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert (len(theirs), theirs.model_max_length) == (50257, 77)
    assert theirs.decode([50256, 64], skip_special_tokens=True) == "a"


def test_the_rules_are_those_that_openai_published():
    rules = merge_rules()
    assert len(rules) == 50_000
    assert rules[:4] == (("Ġ", "t"), ("Ġ", "a"), ("h", "e"), ("i", "n"))
    assert all(vocabulary()["".join(pair)] == 256 + i for i, pair in enumerate(rules))


@pytest.mark.parametrize("shape", ["gpt2", "rope", "llama", "modern"])
def test_every_architecture_opens_with_its_tokenizer(shape, tmp_path):
    model = shaken(config_of(**vars(small(shape).config) | {"vocab_size": 50257}))
    directory = exported(model, tmp_path / "out", gpt2_tokenizer())
    opened = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    text = "It's  1,024 tokens,\n\n   isn't it?"
    assert opened(text)["input_ids"] == gpt2_tokenizer().encode(text).tolist()
    opened.save_pretrained(tmp_path / "back")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again(text)["input_ids"] == opened(text)["input_ids"]


OURS = CharTokenizer("\n !',.3?abcdefgé日🙂"), train_bpe(TEXTS, 290)


@pytest.mark.parametrize("shape", ["gpt2", "rope", "llama", "modern"])
@pytest.mark.parametrize("ours", OURS, ids=lambda ours: ours.name)
def test_characters_and_trained_pairs_are_tokens(shape, ours, tmp_path):
    model = shaken(config_of(**vars(small(shape).config) | {"vocab_size": ours.vocab_size}))
    directory = exported(model, tmp_path / "out", ours)
    assert (directory / "tokenizer.json").read_text(encoding="utf-8") == ours.json
    opened = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    assert len(opened) == ours.vocab_size
    rng = random.Random(0)
    for length in (0, 1, 5, 300):
        text = "".join(rng.choices(OURS[0].alphabet, k=length))
        ids = ours.encode(text).tolist()
        assert opened(text)["input_ids"] == ids
        assert opened.decode(ids) == text
    assert opened(f"{END_OF_TEXT}a")["input_ids"] == [ours.eot, *ours.encode("a").tolist()]
    if ours is OURS[0]:
        with pytest.raises(Exception, match="Missing"):
            opened("z")
    # Here it is read back, and only as it was written.
    assert open_model(str(directory))[1].sha256 == ours.sha256
    (directory / "tokenizer.json").write_text(ours.json + " ")
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer .*sha256 is another"):
        open_model(str(directory))


def test_another_vocabulary_is_refused_naming_file_and_token(tmp_path):
    check_vocabulary(tmp_path)  # without tokenizer files there is nothing to compare
    directory = write(gpt2_tokenizer(), tmp_path)
    check_vocabulary(directory)
    path = directory / "vocab.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps({**words, "Ġthe": 5}))
    with pytest.raises(UserError, match=r"vocab\.json is not .* the token 'Ġthe' has id 5 there"):
        check_vocabulary(directory)
    path.unlink()
    check_vocabulary(directory)
    write(CHARACTERS, directory)
    with pytest.raises(UserError, match=r"tokenizer\.json is not the vocabulary of the gpt2"):
        check_vocabulary(directory)
    for damaged in ("{", "[]", '{"model": 3}'):
        (directory / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            check_vocabulary(directory)
