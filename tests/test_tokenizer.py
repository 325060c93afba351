"""GPT-2's ids against plain tiktoken; characters; trained and other vocabularies."""

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from config import UserError
from corpus.tokenizer import (
    END_OF_TEXT,
    RANK_FILE,
    TOKENIZER_FILE,
    WHITESPACE,
    CharTokenizer,
    JSONTokenizer,
    can_encode,
    find_tokenizer,
    gpt2_tokenizer,
    read_ranks,
    read_tokenizer,
    train_bpe,
)

GOLDEN = {
    "": [],
    "Hello world": [15496, 995],
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    " the": [262],
    "\n": [198],
    "\n\n": [628],
    # Read as characters: in a document this is no special token.
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
}
# Pieces that the pattern treats apart: runs of whitespace, contractions, marks and wide characters.
PIECES = [
    *WHITESPACE,
    *"  \n\n",
    *"ab1.'s",
    "'ll",
    "\x1c",
    "\u200b",
    "\ufeff",
    "é",
    "漢",
    "😀",
    "<|",
]
SPACED = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
TEXTS = ["the cat sat on the mat, and the hat", "über die Straße, 日本 and back\n\n  the end"] * 9


@pytest.fixture(scope="module")
def plain():
    """The encoding as tiktoken itself defines it, on the same ranks."""
    return tiktoken.Encoding(
        name="plain", pat_str=r50k_pat_str, mergeable_ranks=read_ranks(RANK_FILE), special_tokens={}
    )


@pytest.mark.parametrize(("text", "ids"), GOLDEN.items())
def test_known_ids(text, ids):
    encoded = gpt2_tokenizer().encode(text)
    assert encoded.tolist() == ids
    assert encoded.dtype == np.uint16


@settings(max_examples=600, deadline=None)
@given(text=SPACED)
def test_whitespace_is_cut_as_tiktoken_cuts_it(plain, text):
    ids = plain.encode_ordinary(text)
    assert gpt2_tokenizer().encode(text).tolist() == ids
    # The same where the matcher gave up on a run.
    around = copy.copy(gpt2_tokenizer())
    around._exact = SimpleNamespace(encode_to_numpy=lambda *_, **__: int("too long"))
    assert around.encode(text).tolist() == ids


@settings(deadline=None)
@given(text=st.text())
def test_any_text_has_tiktokens_ids_and_comes_back(plain, text):
    ids = gpt2_tokenizer().encode(text)
    assert ids.tolist() == plain.encode_ordinary(text)
    assert gpt2_tokenizer().decode(ids) == text
    assert gpt2_tokenizer().token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("end", ["b", "", "\n.", " b" + "\t" * 1_000_000 + "\nc"])
def test_a_million_spaces_are_no_trouble(end):
    text = "a" + " " * 1_000_000 + end
    ids = gpt2_tokenizer().encode(text)
    assert gpt2_tokenizer().decode(ids) == text
    # The last space belongs to the next word.
    assert end != "b" or ids[-1] == gpt2_tokenizer().encode(" b")[0]


def test_lone_surrogates_become_replacement_characters():
    ids = gpt2_tokenizer().encode("a\ud800b")
    assert gpt2_tokenizer().decode(ids) == "a\ufffdb"


def test_half_a_character_decodes_to_a_replacement_character():
    ids = gpt2_tokenizer().encode("漢")
    assert len(ids) > 1
    assert "\ufffd" in gpt2_tokenizer().decode(ids[:1])
    assert gpt2_tokenizer().decode_bytes(ids) == "漢".encode()


def test_end_of_text_is_the_last_id_and_has_no_bytes():
    gpt2 = gpt2_tokenizer()
    assert (gpt2.eot, gpt2.vocab_size) == (50256, 50257)
    assert gpt2.token_bytes().shape == (50257,)
    assert gpt2.token_bytes()[gpt2.eot] == 0
    assert gpt2.decode([gpt2.eot]) == "<|endoftext|>"


def test_an_altered_or_missing_rank_file_is_refused(tmp_path):
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(RANK_FILE.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"gpt2.tiktoken is not OpenAI's rank table"):
        read_ranks(altered)
    with pytest.raises(UserError, match="cannot be read"):
        read_ranks(tmp_path / "none")


def test_the_bundled_file_is_what_the_tokenizer_reads():
    assert RANK_FILE.parent.name == "assets"
    assert len(read_ranks(RANK_FILE)) == 50256


# --- Characters ---


def test_characters_round_trip():
    text = "to be, or not\nto be: é漢"
    chars = CharTokenizer("".join(sorted(set(text))))
    ids = chars.encode(text)
    assert ids.dtype == np.uint16
    assert chars.decode(ids) == text
    assert chars.vocab_size == len(set(text)) + 1 == chars.eot + 1
    assert chars.token_bytes()[ids].sum() == len(text.encode())
    assert chars.decode([chars.eot]) == END_OF_TEXT and chars.token_bytes()[chars.eot] == 0
    assert can_encode(chars, "tob") and not can_encode(chars, "x") and can_encode(bpe(), "x")


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(UserError, match="'z' is not in this model's alphabet"):
        CharTokenizer("abc").encode("az")


@pytest.mark.parametrize("alphabet", ["", "aba", "".join(map(chr, range(0x20000, 0x30000)))])
def test_an_alphabet_must_be_distinct_characters_that_fit(alphabet):
    with pytest.raises(UserError, match="distinct characters"):
        CharTokenizer(alphabet)


# --- Vocabularies of tokenizer.json ---


@functools.cache
def bpe() -> JSONTokenizer:
    """A trained vocabulary: 256 bytes, a few merged pairs, and 16 reserved ids."""
    return train_bpe(TEXTS, 290)


def library(**changes: object) -> str:
    """Return a tokenizer.json with the bytes as SentencePiece's are, but for `changes`."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"\u2581abcdt",
        "\u2581a",
    ]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}}
    model |= {"merges": [["\u2581", "a"]], "unk_token": "<unk>", "byte_fallback": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": tokens[i], "special": True, **flags} for i in range(3)]
    space = {"replacement": "\u2581", "prepend_scheme": "always", "split": False}
    record = {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model}
    record |= {"pre_tokenizer": {"type": "Metaspace", **space}, "post_processor": None}
    decoders = [{"type": "ByteFallback"}, {"type": "Metaspace", **space}, {"type": "Fuse"}]
    record |= {"decoder": {"type": "Sequence", "decoders": decoders}}
    return json.dumps({**record, **changes})


def test_the_same_texts_train_the_same_vocabulary():
    ours, again = bpe(), train_bpe(iter(TEXTS), 290)
    assert (ours.json, ours.sha256) == (again.json, again.sha256)
    assert (ours.vocab_size, ours.eot, ours.name) == (290, 289, "bpe")
    assert len(ours.encode("the the")) < 7
    assert (ours.token_bytes()[274:] == 0).all() and (ours.token_bytes()[:274] > 0).all()
    with pytest.raises(UserError, match=r"has pairs for \d+ ids; lower --vocab-size"):
        train_bpe(TEXTS, 4096)


@pytest.mark.parametrize("made", [bpe, lambda: JSONTokenizer("llama", library())])
@given(text=st.one_of(SPACED, st.text().filter(lambda text: "\u2581" not in text)))
def test_texts_come_back_and_their_bytes_are_counted(made, text):
    tokenizer = made()
    # What stands for a token elsewhere is ordinary characters in a text.
    for whole in (text, f"{text}<|endoftext|></s><|reserved_3|>"):
        ids = tokenizer.encode(whole)
        assert ids.dtype == np.uint16 and tokenizer.eot not in ids
        # SentencePiece puts a space before what has none.
        assert tokenizer.decode(ids).removeprefix(" ") == whole.removeprefix(" ")
        assert tokenizer.token_bytes()[ids].sum() == len(tokenizer.decode_bytes(ids))


def test_parts_of_characters_and_lone_surrogates_decode_to_replacement_characters():
    ids = bpe().encode("🙂")
    assert len(ids) == 4 and bpe().decode(ids[:2]) == "\ufffd" and bpe().decode(ids) == "🙂"
    assert bpe().decode_bytes(ids[1:]) == "🙂".encode()[1:]
    assert bpe().decode(bpe().encode("a\ud800b")) == "a\ufffdb"


def test_a_sentencepiece_vocabulary_is_read():
    llama = JSONTokenizer("llama", library())
    assert (llama.vocab_size, llama.eot) == (266, 2)
    assert llama.encode("a\n").tolist() == [265, 3 + 10]
    assert [llama.token_bytes()[i] for i in (2, 13, 260, 265)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "llama does not give a text back as it was"),
        (
            {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "no token for",
        ),
        ({"model": {"type": "BPE", "vocab": {"</s>": 65536}, "merges": []}}, "65,537 ids, and"),
    ],
)
def test_a_vocabulary_that_is_of_no_use_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        JSONTokenizer("llama", library(**changes))


def test_a_tokenizer_is_read_by_its_name_and_its_file(tmp_path):
    assert read_tokenizer("gpt2", tmp_path) is gpt2_tokenizer()
    path = tmp_path / TOKENIZER_FILE
    for ours in (bpe(), CharTokenizer("\nab漢"), JSONTokenizer("llama", library())):
        path.write_text(ours.json, encoding="utf-8")
        for found in (
            read_tokenizer(ours.name, tmp_path, ours.sha256),
            read_tokenizer(ours.name, tmp_path),
            find_tokenizer(str(tmp_path)),
        ):
            assert (type(found), found.sha256, found.eot) == (type(ours), ours.sha256, ours.eot)
            assert found.encode("ab").tolist() == ours.encode("ab").tolist()
        with pytest.raises(UserError, match=r"tokenizer\.json is no .*sha256 is another"):
            read_tokenizer(ours.name, tmp_path, "0" * 64)
    for damaged in (b"", b"{", b"\xff", b"[]", b'{"model": {"type": "WordLevel"}}', b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
            read_tokenizer("bpe", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        read_tokenizer("bpe", tmp_path)


def test_a_tokenizer_is_found_by_data_run_checkpoint_and_else_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer("gpt2") is gpt2_tokenizer()
    for name in ("data/mine", "runs/one/checkpoints/step_000004"):
        Path(name).mkdir(parents=True)
    Path("runs/one/checkpoints/step_000004/state.json").touch()
    for place, file in (("data/mine", "manifest.json"), ("runs/one", "metrics.jsonl")):
        (Path(place) / file).touch()
        assert find_tokenizer(place) is gpt2_tokenizer()
        (Path(place) / TOKENIZER_FILE).write_text(bpe().json)
    for name in ("mine", "data/mine", "one", "runs/one", "runs/one/checkpoints/step_000004"):
        assert find_tokenizer(name).sha256 == bpe().sha256
    with pytest.raises(
        UserError, match=r"There is no tokenizer 'nobody/nothing' \(.*\); give gpt2"
    ):
        find_tokenizer("nobody/nothing")
