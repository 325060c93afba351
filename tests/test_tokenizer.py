"""GPT-2's ids exactly, whatever the text, and characters as ids."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from config import UserError
from corpus.tokenizer import (
    RANK_FILE,
    WHITESPACE,
    CharTokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    read_ranks,
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
@given(text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_whitespace_is_cut_as_tiktoken_cuts_it(plain, text):
    assert gpt2_tokenizer().encode(text).tolist() == plain.encode_ordinary(text)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_has_tiktokens_ids_and_comes_back(plain, text):
    ids = gpt2_tokenizer().encode(text)
    assert ids.tolist() == plain.encode_ordinary(text)
    assert gpt2_tokenizer().decode(ids) == text
    assert gpt2_tokenizer().token_bytes()[ids].sum() == len(text.encode())


def test_a_million_spaces_are_no_trouble():
    text = "a" + " " * 1_000_000 + "b"
    ids = gpt2_tokenizer().encode(text)
    assert gpt2_tokenizer().decode(ids) == text
    # The last space belongs to the next word.
    assert ids[-1] == gpt2_tokenizer().encode(" b")[0]


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


def test_characters_round_trip():
    text = "to be, or not\nto be: é漢"
    chars = CharTokenizer.from_text(text)
    ids = chars.encode(text)
    assert ids.dtype == np.uint16
    assert chars.decode(ids) == text
    assert chars.alphabet == "".join(sorted(set(text)))
    assert chars.vocab_size == len(set(text)) + 1 == chars.eot + 1
    assert chars.token_bytes()[ids].sum() == len(text.encode())
    assert chars.decode([chars.eot]) == "<|endoftext|>"


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(UserError, match="'z' is not in this model's alphabet"):
        CharTokenizer("abc").encode("az")


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_an_alphabet_must_be_distinct_characters(alphabet):
    with pytest.raises(UserError, match="distinct characters"):
        CharTokenizer(alphabet)


def test_a_manifest_names_its_tokenizer():
    assert load_tokenizer("gpt2") is gpt2_tokenizer()
    assert load_tokenizer("char", "ab").decode([1, 0]) == "ba"
    with pytest.raises(UserError, match="'bert'"):
        load_tokenizer("bert")


def test_the_bundled_file_is_what_the_tokenizer_reads():
    assert RANK_FILE.parent.name == "assets"
    assert len(read_ranks(RANK_FILE)) == 50256
