"""The command: from a checkpoint and real file formats to a table and evals.json."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import evaluate
from config import UserError
from corpus.tokenizer import gpt2_tokenizer
from published import published
from tasks import TASKS
from tests.runs import run_training
from tests.tiny import make_data, script, tiny_config
from utils import parse

SENTENCES = [
    "The King 's daughter walked to the well .",
    "`` Who is there ? '' asked the frog .",
    "She did n't answer , and the frog laughed .",
    "The ball -LRB- it was gold -RRB- fell into the well .",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A directory of all four benchmarks in their own formats, a few examples of each."""
    root = tmp_path_factory.mktemp("benchmarks")
    rows = [
        {
            "ind": i,
            "activity_label": "Roof shingle removal",
            "ctx_a": f"Man {i} is sitting on a roof.",
            "ctx_b": "he",
            "ctx": f"Man {i} is sitting on a roof. he",
            "endings": [f"is {word} tiles off." for word in ("using", "ripping", "eating", "no")],
            "label": i % 4,
        }
        for i in range(7)
    ]
    write(root / "hellaswag/hellaswag_val.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    passages = [f"He gave {name} the key . Then she opened the door" for name in ("Ann", "Eve")]
    write(
        root / "lambada/lambada_test.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in passages),
    )
    write(root / "wikitext/wiki.test.raw", " \n = Frogs = \n \n Frogs are small . \n" * 3)
    for part in ("CN", "NE"):
        write(root / f"cbt/cbtest_{part}_test_2500ex.txt", cbt_questions(3))
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cbt_questions(count: int) -> str:
    words = ["frog", "well", "ball", "King", "gold", "door", "key", "tree", "bird", "house"]
    questions = []
    for number in range(count):
        lines = [f"{i + 1} {SENTENCES[(i + number) % 4]}" for i in range(20)]
        lines.append(f"21 Then the XXXXX came home .\t{words[number]}\t\t{'|'.join(words)}")
        questions.append("\n".join(lines) + "\n\n")
    return "".join(questions)


@pytest.fixture
def here(data, tmp_path, monkeypatch) -> Path:
    """An empty directory to work in, with the benchmarks where GPT2_DATA says."""
    monkeypatch.setenv("GPT2_DATA", str(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run with GPT-2's vocabulary, and a context shorter than CBT's questions."""
    root = tmp_path_factory.mktemp("run")
    shards = make_data(root / "data", shard_tokens=1000, tokenizer=gpt2_tokenizer())
    config = tiny_config(shards, root / "runs", vocab_size=50257, steps=4, block_size=64)
    directory = root / "runs" / "tiny"
    run_training(config)
    return directory


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=128))
    model.save_pretrained(directory)
    return directory


def run_command(*words: object, capsys) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
        evaluate.main()
    return capsys.readouterr().out


def test_all_tasks_of_a_checkpoint(run, here, capsys):
    output = run_command(run, capsys=capsys)
    evals = json.loads((run / "evals.json").read_text())
    assert list(evals) == ["step_000004"]
    found = evals["step_000004"]
    assert {name: facts["examples"] for name, facts in found.items()} == {
        "hellaswag": 7,
        "lambada": 2,
        "cbt": 6,
        "wikitext": 3,
    }
    assert 0 <= found["hellaswag"]["metrics"]["acc_norm"] <= 1
    assert found["hellaswag"]["metrics"]["acc_norm_stderr"] > 0
    # Of a model that has hardly learnt anything.
    assert 1e4 < found["lambada"]["metrics"]["perplexity"] < 1e6
    assert found["cbt"]["shortened"] == 6 and found["hellaswag"]["shortened"] == 0
    assert "; 6 of them do not fit 64 tokens, and were read without" in output
    assert not found["hellaswag"]["published_file"] and found["hellaswag"]["file_sha256"]
    assert "| hellaswag | acc_norm" in output and "±" in output


def test_later_results_are_added_and_settings_kept_apart(run, here, capsys):
    run_command(run, "--tasks", "hellaswag", "--limit", 3, capsys=capsys)
    run_command(run / "checkpoints" / "step_000004", "--tasks", "lambada", capsys=capsys)
    run_command(run, "--tasks", "lambada", "--max-length", 8, capsys=capsys)
    found = json.loads((run / "evals.json").read_text())["step_000004"]
    assert {"hellaswag limit=3", "lambada", "lambada max_length=8"} <= set(found)
    assert found["hellaswag limit=3"]["examples"] == 3
    whole, short = found["lambada"]["metrics"], found["lambada max_length=8"]["metrics"]
    assert whole["perplexity"] != short["perplexity"]


def test_several_models_give_one_table_with_what_is_published(
    run, transformers_model, here, capsys
):
    output = run_command(run, transformers_model, "--tasks", "hellaswag", capsys=capsys)
    rows = [line for line in output.splitlines() if line.startswith("| hellaswag")]
    # The two models' values of one metric stand together.
    assert ["acc " in row for row in rows] == [True, True, False, False]
    assert "tiny step_000004" in rows[2] and "gpt2" in rows[3] and "29.55" in rows[3]
    assert json.loads((transformers_model / "evals.json").read_text())["gpt2"]["hellaswag"]


def test_examples_are_logged_in_the_order_of_the_file(run, here, capsys):
    run_command(run, "--tasks", "hellaswag", "--log-examples", capsys=capsys)
    lines = (run / "evals" / "step_000004" / "hellaswag.jsonl").read_text().splitlines()
    facts = [json.loads(line) for line in lines]
    assert [fact["label"] for fact in facts] == [0, 1, 2, 3, 0, 1, 2]
    metrics = json.loads((run / "evals.json").read_text())["step_000004"]["hellaswag"]["metrics"]
    assert sum(fact["acc"] for fact in facts) / 7 == pytest.approx(metrics["acc"])


@pytest.mark.slow
def test_batch_size_and_two_processes_give_the_same_table(run, data, tmp_path):
    def evaluated(processes: int, *words: object) -> dict:
        result = script(
            *("evaluate.py", run, "--tasks", "hellaswag", "cbt", "--device", "cpu", *words),
            cwd=tmp_path,
            processes=processes,
            GPT2_DATA=str(data),
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("| hellaswag") == 2
        found = json.loads((run / "evals.json").read_text())["step_000004"]
        return {task: found[task]["metrics"] for task in ("hellaswag", "cbt")}

    alone = evaluated(1)
    assert evaluated(2) == alone
    assert evaluated(1, "--batch-tokens", 1) == alone


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Name at least one model"),
        (("RUN", "--tasks", "helaswag"), "no benchmark 'helaswag'; did you mean hellaswag?"),
        (("RUN", "--limit", 0), "--limit must be at least 1"),
        (("RUN", "--batch-tokens", -5), "--batch-tokens must be at least 1"),
        (("RUN", "--max-length", 65), "--max-length 65 is more than the 64 tokens that tiny"),
        (("nothing",), "There is no run 'nothing'"),
        (("RUN", "--tasks", "lambada-standard"), "lambada-dataset.tar.gz could not be fetched"),
    ],
)
def test_mistakes_are_one_sentence(run, here, monkeypatch, capsys, words, sentence):
    def offline(place, url, *_):
        raise UserError(f"{url} could not be fetched.")

    monkeypatch.setattr("benchmark.fetch_file", offline)
    words = [run if word == "RUN" else word for word in words]
    with pytest.raises(UserError, match=sentence) as error:
        run_command(*words, capsys=capsys)
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_not_written_over(run, here, capsys):
    before = (run / "evals.json").read_text() if (run / "evals.json").exists() else None
    (run / "evals.json").write_text('{"step_000004": ')
    with pytest.raises(UserError, match=r"evals.json is damaged .*; move it away"):
        run_command(run, "--tasks", "hellaswag", capsys=capsys)
    assert (run / "evals.json").read_text() == '{"step_000004": '
    (run / "evals.json").write_text(before or "{}")


def test_a_model_of_characters_is_refused(tmp_path, here, capsys):
    config = tiny_config(make_data(tmp_path / "data"), tmp_path / "runs", steps=1)
    run_training(config)
    with pytest.raises(UserError, match="hellaswag needs GPT-2's vocabulary"):
        run_command(tmp_path / "runs" / "tiny", "--tasks", "hellaswag", capsys=capsys)


def test_published_figures_name_their_protocol():
    assert [figure.value for figure in published("gpt2", "hellaswag", "acc_norm")] == [29.55]
    assert "same protocol" in published("gpt2", "wikitext", "word_perplexity")[0].source
    assert published("my-run", "hellaswag", "acc_norm") == []
    assert published("gpt2-xl", "cbt", "ne_acc_full")[0].value == 72.32


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        run_command("--help", capsys=capsys)
    shown = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    names = set()
    for stem, variants in re.findall(r"([a-z]+)\[([-a-z0-9|]+)\]", shown):
        names |= {stem, *(stem + variant for variant in variants.split("|"))}
    assert set(TASKS) <= names


def test_what_is_scored_unless_told():
    options = parse(evaluate.Options, ["some-run"])
    assert options.tasks == ("hellaswag", "lambada", "cbt", "wikitext")
    assert options.dtype == "float32"
