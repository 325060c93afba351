"""Words and text: what is taken for what, how it is split, and what cannot be used."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch

from config import UserError
from loss import IGNORE_INDEX
from makemore import data as module
from makemore.data import batch_at, examples, load, text_words
from makemore.rungs import settings_for
from tests.test_makemore import write_words

TEXT = "Now is the winter of our discontent\nmade glorious summer by this sun.\n" * 30


def refuses(source: Path | str, seed: int = 1, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(str(source), seed, **options)
    return str(caught.value)


def word_of(row: torch.Tensor, data: module.Data) -> str:
    ids = row[row != IGNORE_INDEX].tolist()
    assert ids[0] == ids[-1] == 0
    return data.decode(ids[1:-1])


def test_words_are_split_by_seed_into_ten_parts_of_which_eight_train(tmp_path):
    path = write_words(tmp_path / "w.txt")
    data, other = load(path, 1), load(path, 2)
    assert data.kind == "words" and data.name == "w" and data.alphabet == "abeiklmnorstu"
    splits = [[word_of(row, data) for row in split] for split in (data.train, data.val, data.test)]
    assert [len(split) for split in splits] == [174, 21, 21]
    assert sorted(itertools.chain(*splits)) == sorted(Path(path).read_text().split())
    assert data.seen == set(splits[0])
    again = load(path, 1)
    assert torch.equal(again.train, data.train) and again.digest == data.digest
    assert other.digest != data.digest and not torch.equal(other.val, data.val)


def test_a_word_that_occurs_twice_is_in_one_split_only(tmp_path):
    path = tmp_path / "twice.txt"
    path.write_text("\r\n".join([f"w{i}" for i in range(20)] * 2))
    data = load(str(path), 1)
    assert sum(map(len, (data.train, data.val, data.test))) == 20


def test_text_is_split_into_tenths_that_keep_their_order(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(TEXT)
    data = load(str(path), 1)
    assert data.kind == "text" and "\n" in data.alphabet
    tenth = len(TEXT) // 10
    assert len(data.val) == len(data.test) == tenth == len(data.train) // 8
    assert data.decode(data.val.tolist()) in TEXT and data.decode(data.test.tolist()) in TEXT
    assert "winter" in data.seen and text_words("it's 2 o'clock") == ["it", "s", "o", "clock"]


def test_what_looks_like_words_can_be_taken_for_text_and_the_other_way(tmp_path):
    path = write_words(tmp_path / "w.txt")
    assert load(path, 1, kind="text").kind == "text"
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i} of it" for i in range(12)))
    data = load(str(tmp_path / "lines.txt"), 1, kind="words")
    assert data.kind == "words" and " " in data.alphabet


def test_every_epoch_reads_every_word_once_in_a_new_order(tmp_path):
    data = load(write_words(tmp_path / "w.txt"), 1)
    epochs = []
    for first in (1, 7):
        batches = [batch_at(data, 29, 16, 5, step) for step in range(first, first + 6)]
        rows = [tuple(row[row > 0].tolist()) for idx, _ in batches for row in idx]
        assert len(set(rows)) == len(rows) == len(data.train)
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def test_targets_are_the_next_characters_and_the_boundary(tmp_path):
    data = load(write_words(tmp_path / "w.txt"), 1)
    idx, targets = batch_at(data, 9, 16, 5, 3)
    again = batch_at(data, 9, 16, 5, 3)
    assert torch.equal(idx, again[0]) and torch.equal(targets, again[1])
    for inputs, wanted in zip(idx, targets, strict=True):
        length = int((wanted != IGNORE_INDEX).sum())
        assert inputs[0] == 0 == wanted[length - 1]
        assert inputs[1:length].tolist() == wanted[: length - 1].tolist()


@pytest.mark.parametrize("block_size", [1, 3, 8, 16])
@pytest.mark.parametrize("characters", [40, 41, 55, 200])
def test_every_character_of_a_text_is_measured_once(block_size, characters):
    ids = torch.arange(1, characters + 1)
    data = module.Data("t", "text", "", ids, ids, ids, frozenset(), "")
    measured = []
    for idx, targets in examples(data, ids, 16, block_size, 10_000):
        scored = targets != IGNORE_INDEX
        assert torch.equal(targets[scored], idx[scored] + 1)
        measured += targets[scored].tolist()
        # Nothing but the beginning is measured with less to see than there could be.
        late = scored & (targets > 16)
        places = torch.arange(16).expand_as(idx)[late]
        assert block_size == 16 or (places >= block_size - 1).all()
    assert sorted(measured) == list(range(2, characters + 1))


@pytest.mark.slow
def test_the_embedded_words_need_no_file():
    data = load("words", 1)
    assert data.kind == "words" and data.alphabet == "abcdefghijklmnopqrstuvwxyz"
    assert len(data.seen) > 3000 and min(map(len, data.seen)) >= 3 and data.longest <= 14
    assert settings_for("gpt2", data, 1).context > data.longest


def test_names_come_from_the_web(monkeypatch, real_data):
    asked = []

    def fake(place, *known):
        asked.append(known)
        return real_data / place

    monkeypatch.setattr(module, "fetch", fake)
    data = load("names", 1)
    assert asked == [module.NAMES]
    content = (real_data / "names" / "names.txt").read_text()
    total = sum(map(len, (data.train, data.val, data.test)))
    assert data.longest == 15 and total == len(set(content.split()))


def test_the_names_that_are_expected_are_the_real_ones(real_data):
    content = (real_data / "names" / "names.txt").read_bytes()
    assert module.NAMES[1:] == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("content", [b"", b" \n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    assert "is empty; give" in refuses(tmp_path / "empty.txt")


def test_an_alphabet_of_one_character_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join("a" * i for i in range(1, 30)))
    assert "alphabet of one character ('a')" in refuses(path)
    path.write_text("a" * 500)
    assert "alphabet of one character ('a')" in refuses(path)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1") * 20)
    assert "latin.txt is not UTF-8 text" in refuses(tmp_path / "latin.txt")


def test_too_little_to_split_is_refused(tmp_path):
    (tmp_path / "nine.txt").write_text("\n".join("abcdefghi"))
    assert "has 9 different words, too few" in refuses(tmp_path / "nine.txt")
    (tmp_path / "short.txt").write_text("a b c d")
    assert "has 7 characters, too few" in refuses(tmp_path / "short.txt")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "There is no file" in refuses(tmp_path / "none.txt")
    assert "cannot be read" in refuses(tmp_path)


@pytest.mark.parametrize("rung", ["transformer", "gpt2"])
def test_a_word_longer_than_the_context_is_refused_and_fits_a_longer_one(tmp_path, rung):
    path = tmp_path / "long.txt"
    path.write_text("\n".join([*(f"w{i}" for i in range(20)), "abcdefghijklmnopqrst"]))
    data = load(str(path), 1)
    with pytest.raises(UserError, match=f"has 20 characters.*{rung} --context 21"):
        settings_for(rung, data, 1)
    assert settings_for(rung, data, 1, context=21).context == 21
    assert settings_for("wavenet", data, 1).rung == "wavenet"


@pytest.mark.parametrize(
    ("rung", "choice", "sentence"),
    [
        ("mlp", {"context": 5}, "--context is for transformer and gpt2"),
        ("gpt2", {"context": 0}, "at least 1"),
        ("bigram", {"init": "naive"}, "begins with no weights"),
        ("nn_bigram", {"norm": "batch"}, "no layers to normalise"),
        ("gpt2", {"norm": "batch"}, "whose norm is layer"),
        ("mlp", {"steps": 0}, "--steps 0 trains nothing"),
    ],
)
def test_a_choice_that_a_rung_does_not_have_is_refused(tmp_path, rung, choice, sentence):
    data = load(write_words(tmp_path / "w.txt"), 1)
    with pytest.raises(UserError, match=sentence):
        settings_for(rung, data, 1, **choice)
