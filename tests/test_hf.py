"""The command: any model becomes a directory for transformers that says what it is."""

import json
import sys
from pathlib import Path

import pytest
import torch

import hf
import hf_import
from config import UserError
from corpus.shards import manifest_sha256
from corpus.tokenizer import gpt2_tokenizer
from sample import generate_text, load
from tests.exports import assert_same_weights
from tests.fake_hub import installed
from tests.runs import run_training
from tests.tiny import CHARACTERS, make_data, tiny_config
from utils import run_script

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps on characters, with rotary positions."""
    root = tmp_path_factory.mktemp("run")
    data = make_data(root / "data", shard_tokens=1000)
    config = tiny_config(data, root / "runs", steps=4, pos_emb="rope")
    directory = root / "runs" / "tiny"
    run_training(config)
    scores = {"hellaswag": {"metrics": {"acc_norm": 0.2531, "acc_norm_stderr": 0.0043}}}
    (directory / "evals.json").write_text(json.dumps({"step_000004": scores}))
    with (directory / "metrics.jsonl").open("a") as file:
        for step, acc in ((2, 0.125), (4, 0.25)):
            line = {"kind": "eval", "step": step, "task": "lambada", "acc": acc, "seconds": 9.5}
            file.write(json.dumps(line) + "\n")
    return directory


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty directory to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: object, capsys) -> str:
    """Give the command and return what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["hf.py", *map(str, words)])
        hf.main()
    return capsys.readouterr().out


def refusal(*words: object, capsys) -> str:
    with pytest.raises(UserError) as caught:
        command(*words, capsys=capsys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_becomes_a_directory_that_everything_opens(run, capsys):
    output = command("tiny", "--runs-dir", run.parent, capsys=capsys)
    out = Path("exports/tiny-step_000004")
    assert "a gpt_neox of transformers" in output and str(out) in output
    model, tokenizer, begins_with_eot = load(str(out))
    of_run = load(str(run))
    assert_same_weights(out, of_run[0])
    assert (tokenizer.alphabet, begins_with_eot) == (of_run[1].alphabet, True)
    texts = [generate_text(str(source), ["the cat"], temperature=0) for source in (out, run)]
    assert texts[0] == texts[1] != [""]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    spoken = transformers.AutoTokenizer.from_pretrained(out)
    ids = spoken("<|endoftext|>the cat", return_tensors="pt")
    written = theirs.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.size(1) :]
    assert texts[0][0].startswith(spoken.decode(written, skip_special_tokens=True))
    assert model.config.pos_emb == "rope"


def test_the_card_says_what_the_model_is(run, capsys):
    command(run / "checkpoints" / "step_000004", "--out", "out", capsys=capsys)
    card = Path("out/README.md").read_text()
    state = json.loads((run / "checkpoints" / "step_000004" / "state.json").read_text())
    assert str(run.parent.parent) not in card
    header, _, rest = card.removeprefix("---\n").partition("---\n")
    assert "library_name: transformers" in header and "\nlicense:" not in header
    for fact in (
        "# tiny-step_000004",
        "`gpt_neox`",
        "`gpt2`, `nano`",
        "4 of 4",
        f"{4 * 256:,}",
        "`data`",
        "kind test",
        manifest_sha256(run.parent.parent / "data"),
        f"Validation loss: {state['val_loss']:.4f}",
        f"{state['bits_per_byte']:.4f} bits a byte",
        "hellaswag",
        "25.31",
        "lambada (after step 4)",
        "25.00 %",
        "begins with `<|endoftext|>`",
        "AutoTokenizer.from_pretrained(DIRECTORY)",
    ):
        assert fact in rest, fact
    assert "after step 2" not in rest and "9.5" not in rest


def test_a_card_of_data_that_is_gone_says_less(run, capsys, monkeypatch):
    monkeypatch.setattr("hf.manifest_sha256", lambda directory: "another")
    command(run, "--out", "out", capsys=capsys)
    card = Path("out/README.md").read_text()
    assert "kind test" not in card and "4 of 4" in card


def test_a_model_of_transformers_is_converted(capsys):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained("theirs")
    command("theirs", capsys=capsys)
    out = Path("exports/theirs")
    model, saved = hf_import.load(str(out))
    assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight)
    # OpenAI's prompts have no <|endoftext|> before them, and conversion does not change that.
    assert not saved.begins_with_eot and "begins with" not in (out / "README.md").read_text()
    spoken = transformers.AutoTokenizer.from_pretrained(out)
    assert spoken("a text")["input_ids"] == gpt2_tokenizer().encode("a text").tolist()


def test_an_export_of_an_export_is_the_same(run, capsys):
    command(run, "--out", "one", capsys=capsys)
    command("one", "--out", "two", capsys=capsys)
    names = {path.name for path in Path("one").iterdir()}
    assert names == {path.name for path in Path("two").iterdir()}
    for name in names:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name


def test_a_pickle_is_converted_when_asked_and_named_when_not(capsys):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained("old")
    Path("old/model.safetensors").unlink()
    torch.save(theirs.state_dict(), "old/pytorch_model.bin")
    assert "pytorch_model.bin" in refusal("old", capsys=capsys)
    assert "is a pickle" in refusal("old/pytorch_model.bin", capsys=capsys)
    assert "name it with --out" in refusal("old", "--read-pickle", capsys=capsys)
    for source in ("old", "old/pytorch_model.bin"):
        command(source, "--out", "new", "--read-pickle", capsys=capsys)
        model, _ = hf_import.load("new")
        assert torch.equal(model.wpe.weight, theirs.transformer.wpe.weight)


def test_another_vocabulary_is_converted_without_a_tokenizer(capsys):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=97)
    transformers.GPT2LMHeadModel(config).save_pretrained("theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["hf.py", "theirs"])
        hf.main()
    assert "Without a tokenizer: theirs has 97 token ids" in capsys.readouterr().err
    assert not Path("exports/theirs/tokenizer.json").exists()


def test_models_and_data_are_published(run, capsys, tmp_path, monkeypatch):
    fake = installed(tmp_path / "hub", monkeypatch)
    data = run.parent.parent / "data"
    assert "add --push OWNER/NAME" in refusal(data, capsys=capsys)
    output = command(data, "--push", "somebody/tokens", "--private", capsys=capsys)
    assert "--source shards:somebody/tokens" in output
    assert ("create", "somebody/tokens", "dataset", True) in fake.calls
    output = command(run, "--push", "somebody/model", capsys=capsys)
    assert "Published as https://huggingface.co/somebody/model" in output
    published = fake.repository("somebody/model", "model")
    assert_same_weights(published, load(str(run))[0])
    # And from there by its name.
    assert load("somebody/model")[1].alphabet == CHARACTERS.alphabet


def test_nothing_else_is_replaced_and_unknown_names_are_one_sentence(run, capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert "mine exists and is not" in refusal(run, "--out", "mine", capsys=capsys)
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert "There is no run" in refusal("nothing", capsys=capsys)


def test_a_mistake_has_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hf.py", "nothing"])
    for stream in ("stdout", "stderr"):  # run_script wraps them
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit) as caught:
        run_script(hf.main)
    assert caught.value.code not in (0, None)
    assert "Traceback" not in capsys.readouterr().err
