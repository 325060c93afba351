"""Text from the command line: what is loaded, read, refused and printed."""

import io
import sys
from pathlib import Path

import pytest
import torch

import sample
from config import Config, TrainConfig, UserError, to_json
from corpus.tokenizer import TOKENIZER_FILE, CharTokenizer, gpt2_tokenizer
from model import GPT
from sample import Options, continuations, for_sampling
from tests.talking_model import CONFIG, tiny_model
from training import checkpoint
from training.distributed import pick_dtype
from utils import run_script

ALPHABET = "".join(chr(ord("!") + i) for i in range(48)) + "ß"


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def test_a_continuation_does_not_depend_on_the_other_prompts(model):
    tokenizer = CharTokenizer(ALPHABET)
    texts = continuations(model, tokenizer, ["A", "BCD", ""], 20, 1)
    assert continuations(model, tokenizer, ["BCD"], 20, 1) == texts[1:2]
    assert continuations(model, tokenizer, ["BCD"], 20, 2) != texts[1:2]
    assert all(texts)


def test_a_stop_cuts_every_continuation_that_is_left(model):
    tokenizer, left = CharTokenizer(ALPHABET), iter(range(30))
    (whole, cut, none) = continuations(
        model, tokenizer, ["A", "B", "C"], 20, 1, stop=lambda: next(left, None) is None
    )
    free = continuations(model, tokenizer, ["A", "B", "C"], 20, 1)
    assert (len(free[0]), len(free[1])) == (20, 20)
    assert (whole, cut, none) == (free[0], free[1][:10], "")


def test_documents_begin_with_eot_where_training_did():
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode("Hi there").tolist()
    assert sample.prompt_ids(tokenizer, "Hi there", True).tolist() == [50256, *ids]
    assert sample.prompt_ids(tokenizer, "Hi there", False).tolist() == ids
    for begins_with_eot in (True, False):
        assert sample.prompt_ids(tokenizer, "", begins_with_eot).tolist() == [50256]


def test_the_stream_never_cuts_a_character(monkeypatch):
    tokenizer = gpt2_tokenizer()
    text = "naïve 漢字 🙂!"
    ids = [*tokenizer.encode(text).tolist(), tokenizer.eot]
    # Some token ends inside a character, or this test could not fail.
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)
    written = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "write", written.append)
    sample.stream((torch.tensor([i]) for i in ids), tokenizer, "→ ")
    assert "".join(written) == f"→ {text}\n"
    assert len(written) > 5


def test_the_stream_shows_a_character_that_never_ends(capsys):
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode("🙂").tolist()[:1]
    sample.stream((torch.tensor([i]) for i in ids), tokenizer, "a")
    assert capsys.readouterr().out == "a\ufffd\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory of the character model, with checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("runs") / "little"
    directory.mkdir()
    config = Config(name="little", model=CONFIG, train=TrainConfig(batch_tokens=64))
    (directory / "config.json").write_text(to_json(config))
    ours = CharTokenizer(ALPHABET)
    (directory / TOKENIZER_FILE).write_text(ours.json)
    state = {"tokenizer": {"name": "char", "sha256": ours.sha256}}
    older = tiny_model()
    older.wpe.weight.data *= -1
    checkpoint.save(directory, 1, older, [], state)
    checkpoint.save(directory, 2, tiny_model(), [], state)
    return directory


def command_line(monkeypatch, *arguments: str) -> None:
    """Run `python sample.py ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    run_script(sample.main)


def test_load_finds_runs_and_checkpoints(run, model, monkeypatch):
    older, newer = checkpoint.all_checkpoints(run)
    by_name, tokenizer, begins_with_eot = sample.load("little", str(run.parent))
    assert begins_with_eot
    assert tokenizer.alphabet == ALPHABET
    for loaded in (by_name, sample.load(str(run))[0], sample.load(str(newer))[0]):
        assert torch.equal(loaded.wpe.weight, model.wpe.weight)
        assert torch.equal(loaded.wte.weight[:50], model.wte.weight[:50])
    assert torch.equal(sample.load(str(older))[0].wpe.weight, -model.wpe.weight)
    monkeypatch.chdir(older)
    assert torch.equal(sample.load(".")[0].wpe.weight, -model.wpe.weight)


def test_a_run_comes_before_a_hub_model_of_its_name(run, tmp_path):
    (tmp_path / "gpt2").symlink_to(run)
    assert sample.load("gpt2", str(tmp_path))[0].config == CONFIG


def test_what_is_no_model_is_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match=r"no run 'absent'.*gpt2-xl"):
        sample.load("absent", str(run.parent))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="no complete checkpoint"):
        sample.load(str(empty))


def test_command_streams_one_sample(run, model, monkeypatch, capsys):
    command_line(monkeypatch, str(run), "--prompt", "ABC", "--max-tokens", "12", "--seed", "8")
    cast = for_sampling(model, pick_dtype("auto", torch.device("cpu")))
    expected = continuations(cast, CharTokenizer(ALPHABET), ["ABC"], 12, 8)[0]
    assert capsys.readouterr().out == f"ABC{expected}\n"
    assert len(expected) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command_computes_in_the_dtype_it_is_given(run, model, monkeypatch, capsys, dtype):
    made = []
    monkeypatch.setattr(
        sample, "for_sampling", lambda *args: made.extend(args[1:]) or for_sampling(*args)
    )
    command_line(monkeypatch, str(run), "--prompt", "A", "--max-tokens", "6", "--dtype", dtype)
    cast = for_sampling(model, getattr(torch, dtype))
    expected = continuations(cast, CharTokenizer(ALPHABET), ["A"], 6, 1337)
    assert capsys.readouterr().out == f"A{expected[0]}\n"
    assert made[0] == getattr(torch, dtype)


def test_command_prints_several_samples_the_first_being_the_only_one(run, monkeypatch, capsys):
    arguments = ["little", "--runs-dir", str(run.parent), "--prompt", "ABC", "--max-tokens", "12"]
    command_line(monkeypatch, *arguments)
    alone = capsys.readouterr().out
    command_line(monkeypatch, *arguments, "--n", "3")
    together = capsys.readouterr().out
    assert together.startswith(f"--- sample 1 of 3 ---\n{alone}\n--- sample 2 of 3 ---\nABC")
    assert together.count("--- sample") == 3


def test_command_reads_standard_input(run, monkeypatch, capsys):
    arguments = [str(run), "--temperature", "0", "--max-tokens", "5", "--prompt"]
    command_line(monkeypatch, *arguments, "ABß")
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ABß\n".encode())))
    command_line(monkeypatch, *arguments, "-")
    assert capsys.readouterr().out == expected


def test_command_says_when_it_cuts_a_long_prompt(run, monkeypatch, capsys):
    command_line(monkeypatch, str(run), "--prompt", "A" * 30, "--max-tokens", "5")
    captured = capsys.readouterr()
    # Thirty characters and the end-of-text before them.
    assert captured.err == "The prompt has 31 tokens; its last 16 are kept.\n"
    assert captured.out.startswith("A" * 30)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "A\udcff"], "not UTF-8"),
        (["--prompt", "A", "--n", "0"], "--n must"),
        (["--prompt", "A", "--n", "1000000000"], "--n must"),
        (["--prompt", "A", "--max-tokens", "0"], "--max-tokens must"),
        (["--prompt", "A", "--temperature", "-1"], "--temperature must"),
        (["--prompt", "A", "--temperature", "nan"], "--temperature must"),
        (["--prompt", "A", "--temperature", "inf"], "--temperature must"),
        (["--prompt", "A", "--top-k", "0"], "--top-k must"),
        (["--prompt", "A", "--top-p", "0"], "--top-p must"),
        (["--prompt", "A", "--top-p", "1.5"], "--top-p must"),
        (["--prompt", "é"], "'é' is not in this model's alphabet"),
    ],
)
def test_command_refuses_in_one_sentence(run, monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        command_line(monkeypatch, str(run), *arguments)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_standard_input_that_is_not_utf8_is_read_as_what_it_may_be(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A\xff")))
    with pytest.raises(SystemExit):
        command_line(monkeypatch, str(run), "--prompt", "-")
    assert "is not in this model's alphabet" in capsys.readouterr().err


def test_option_defaults_are_valid():
    assert Options(source="gpt2", prompt="A").top_k == 50
