"""A text to a data directory, by character and in byte pairs."""

import re
from pathlib import Path

import pytest

import sources
from config import UserError
from corpus.shards import TokenShards, read_manifest
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from fineweb import FineWebEdu
from shakespeare.shakespeare import prepare
from tests.corpora import contents
from tests.tiny import script

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 9


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A directory to work in, with the text of tiny Shakespeare where a download puts it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shakespeare").mkdir(parents=True)
    (tmp_path / "data" / "shakespeare" / "tiny.txt").write_text(TEXT)
    return tmp_path


def letters(count: int) -> str:
    """Return so many different characters."""
    return "".join(map(chr, range(0x20000, 0x20000 + count)))


def stream(directory, split: str) -> list[int]:
    found = TokenShards(directory, split)
    return found.read([0], len(found))[0].tolist()


def refuses(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **options, quiet=True)
    return str(caught.value)


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_the_first_nine_tenths_train_and_the_rest_validates(work, tokenizer):
    manifest = prepare(tokenizer=tokenizer, quiet=True)
    out, cut = Path(f"data/shakespeare-{tokenizer}"), int(0.9 * len(TEXT))
    codec = CharTokenizer.from_text(TEXT) if tokenizer == "char" else gpt2_tokenizer()
    assert stream(out, "train") == [codec.eot, *codec.encode(TEXT[:cut])]
    assert stream(out, "val") == [codec.eot, *codec.encode(TEXT[cut:])]
    assert manifest == read_manifest(out) and manifest.complete
    assert [shard.bytes for shard in manifest.shards] == [len(TEXT) - cut, cut]
    assert {path.name for path in out.iterdir()} == {
        "manifest.json",
        f"shakespeare-{tokenizer}_val_000000.npy",
        f"shakespeare-{tokenizer}_train_000001.npy",
    }
    sequences = FineWebEdu(out, "train", 16)
    assert sequences[0][0].tolist() == stream(out, "train")[:16]


def test_the_alphabet_is_that_of_the_whole_text(work):
    # A character that only validation has.
    Path("mine.txt").write_text("ab" * 50 + "ü")
    manifest = prepare("mine.txt", quiet=True)
    assert (manifest.alphabet, manifest.vocab_size) == ("abü", 4)
    assert manifest.name == "mine-char"
    codec = TokenShards("data/mine-char", "val").tokenizer
    assert codec.decode(stream("data/mine-char", "val")) == "<|endoftext|>" + "ab" * 5 + "ü"


def test_a_finished_directory_is_left_alone_and_another_text_refused(work, capsys):
    prepare()
    assert re.fullmatch(
        r"data/shakespeare-char is complete: \d+ training and \d+ validation tokens in 2 shards, "
        r"0.0 MB.\n",
        capsys.readouterr().out,
    )
    before = contents(Path("data/shakespeare-char"))
    times = [path.stat().st_mtime_ns for path in Path("data/shakespeare-char").iterdir()]
    prepare()
    assert "data/shakespeare-char is already complete" in capsys.readouterr().out
    out = Path("data/shakespeare-char")
    assert "with tokenizer char, not gpt2" in refuses(tokenizer="gpt2", out=out)
    Path("data/shakespeare/tiny.txt").write_text(TEXT + "More.")
    assert "was prepared with source digest" in refuses()
    assert contents(out) == before
    assert [path.stat().st_mtime_ns for path in out.iterdir()] == times


def test_texts_that_will_not_do(work):
    assert "There is no file nowhere.txt; --text names one, or: tiny, large" in refuses(
        "nowhere.txt"
    )
    assert "cannot be read (Is a directory)" in refuses("data")
    for content, sentence in (
        (b"", "holds no characters, too few to split"),
        (b"\xef\xbb\xbf", "holds no characters"),
        ("ü".encode(), "holds one character, too few to split"),
        (b"na\xefve", "is not UTF-8 text"),
        (letters(65536).encode(), "65,536 distinct characters, and tokens have room for 65,535"),
    ):
        Path("bad.txt").write_bytes(content)
        assert sentence in refuses("bad.txt")
    assert not Path("data/bad-char").exists()


def test_two_characters_are_enough(work):
    Path("two.txt").write_text("ab")
    prepare("two.txt", quiet=True)
    assert (stream("data/two-char", "train"), stream("data/two-char", "val")) == ([2, 0], [2, 1])


def test_as_many_characters_as_fit(work):
    Path("many.txt").write_text(letters(65535))
    manifest = prepare("many.txt", quiet=True)
    assert manifest.vocab_size == 65536
    assert stream("data/many-char", "val")[0] == 65535


def test_the_complete_works_are_fetched_beside_the_short_text(work, monkeypatch):
    def fetch(url, path, sha256, size):
        assert "blakesanie" in url and size == 5_458_199
        path.write_text(TEXT)
        return path

    monkeypatch.setattr(sources, "download", fetch)
    prepare("large", quiet=True)
    assert Path("data/shakespeare/large.txt").exists()
    assert TokenShards("data/shakespeare-large-char", "train").vocab_size == len(set(TEXT)) + 1


def test_it_runs_as_a_script_from_anywhere(work):
    result = script("shakespeare/shakespeare.py", "--tokenizer", "gpt2", cwd=work)
    assert (result.returncode, result.stderr) == (0, "")
    assert "data/shakespeare-gpt2 is complete" in result.stdout
    result = script("shakespeare/shakespeare.py", "--text", "none.txt", cwd=work)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: There is no file none.txt") and "\n" in result.stderr
    result = script("shakespeare/shakespeare.py", "--tokenizer", "words", cwd=work)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_the_real_one(real_data, tmp_path):
    manifest = prepare(str(real_data / "shakespeare" / "tiny.txt"), out=tmp_path, quiet=True)
    assert (manifest.tokens("train"), manifest.tokens("val")) == (1_003_855, 111_541)
    assert manifest.vocab_size == 66
