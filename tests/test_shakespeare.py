"""A text to a data directory, by character and in byte pairs."""

from pathlib import Path

import pytest

from config import UserError
from corpus import sources
from corpus.shards import TokenShards, read_manifest
from shakespeare import shakespeare
from tests.tiny import script

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 9
CUT = len(TEXT) * 9 // 10


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A directory to work in, with the text of tiny Shakespeare where a fetched one lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shakespeare").mkdir(parents=True)
    (tmp_path / "data" / "shakespeare" / "tiny.txt").write_text(TEXT)
    return tmp_path


def prepare(*words: object) -> None:
    """Give the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["shakespeare.py", *map(str, words)])
        shakespeare.main()


def stream(directory: str, split: str) -> list[int]:
    found = TokenShards(directory, split)
    return found.read([0], len(found))[0].tolist()


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_the_first_nine_tenths_train_and_the_rest_validates(work, capsys, tokenizer):
    prepare(*([] if tokenizer == "char" else ["--tokenizer", tokenizer]))
    out = Path(f"data/shakespeare-{tokenizer}")
    assert f"{out} is complete: " in capsys.readouterr().out
    manifest, codec = read_manifest(out), TokenShards(out, "val").tokenizer
    assert manifest.complete and manifest.tokenizer == codec.name == tokenizer
    assert stream(out, "train") == [codec.eot, *codec.encode(TEXT[:CUT])]
    assert stream(out, "val") == [codec.eot, *codec.encode(TEXT[CUT:])]
    assert {shard.split: shard.bytes for shard in manifest.shards} == {
        "train": CUT,
        "val": len(TEXT) - CUT,
    }


def test_any_text_has_a_directory_of_its_name_and_all_its_characters(work):
    # A character that only validation has.
    Path("mine.txt").write_text("ab" * 50 + "ü")
    prepare("--text", "mine.txt")
    assert TokenShards("data/mine-char", "train").tokenizer.alphabet == "abü"
    assert stream("data/mine-char", "val")[-1] == 2
    prepare("--text", "mine.txt", "--tokenizer", "gpt2", "--out", "elsewhere")
    assert TokenShards("elsewhere", "train").vocab_size == 50257


def test_a_finished_directory_is_left_alone_and_another_text_refused(work):
    prepare()
    before = {path: path.stat().st_mtime_ns for path in Path("data/shakespeare-char").iterdir()}
    prepare()
    Path("data/shakespeare/tiny.txt").write_text(TEXT + "More.")
    with pytest.raises(UserError, match="was prepared with digest"):
        prepare()
    with pytest.raises(UserError, match="There is no file"):
        prepare("--text", "nowhere.txt")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_complete_works_are_fetched_beside_the_short_text(work, monkeypatch):
    def fetch(place, url, size, sha256):
        assert "blakesanie" in url and size == 5_458_199
        Path("data", place).write_text(TEXT)
        return Path("data", place)

    monkeypatch.setattr(sources, "fetch", fetch)
    prepare("--text", "large")
    assert Path("data/shakespeare/large.txt").exists()
    assert TokenShards("data/shakespeare-large-char", "train").vocab_size == len(set(TEXT)) + 1


def test_it_runs_as_a_script_from_anywhere(work):
    result = script("shakespeare/shakespeare.py", "--tokenizer", "gpt2", cwd=work)
    assert result.returncode == 0 and "data/shakespeare-gpt2 is complete" in result.stdout
    result = script("shakespeare/shakespeare.py", "--text", "none.txt", cwd=work)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: There is no file none.txt")
    result = script("shakespeare/shakespeare.py", "--tokenizer", "words", cwd=work)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_the_real_one(real_data, tmp_path):
    prepare("--text", real_data / "shakespeare" / "tiny.txt", "--out", tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest.tokens("train"), manifest.tokens("val")) == (1_003_855, 111_541)
    assert manifest.vocab_size == 66
