"""LAMBADA's passages in both texts, and the three metrics of their last words."""

import io
import json
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import lambada
from benchmark import WebFile
from config import UserError
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from likelihood import Scores
from tests.tiny import ALPHABET

PASSAGES = [
    'He took the stone.\n\n"Is it magic?" asked Harlin',
    "No one had seen the dog of Hermione",
]


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def scores(logprob, greedy, filtered):
    one = np.ones(1, dtype=np.int64)
    return Scores(np.array([logprob]), one, np.array([greedy]), np.array([filtered]))


def refuses(path, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        lambada.task(gpt2_tokenizer(), path=path, **arguments)
    return str(caught.value)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty directory to be in, and the authors' archive to be fetched from beside it."""
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    monkeypatch.delenv("GPT2_DATA", raising=False)
    with tarfile.open(tmp_path / "web.tar.gz", "w:gz") as tar:
        text = "".join(f"{passage}\n" for passage in ("the cat sat", "a dog ran home"))
        for name, content in (("train-novels.tar", b"novels"), (lambada.MEMBER, text.encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

    def fetch(place, url, *known):
        assert url == lambada.ARCHIVE.address
        path = Path("data", place)
        path.parent.mkdir(parents=True)
        return Path(shutil.copy(tmp_path / "web.tar.gz", path))

    monkeypatch.setattr("benchmark.fetch_file", fetch)
    monkeypatch.setattr(lambada, "STANDARD", WebFile(lambada.STANDARD.path, "", rows=2))
    return tmp_path / "room"


def test_the_last_word_follows_the_rest(tmp_path):
    tokenizer = gpt2_tokenizer()
    task = lambada.task(tokenizer, path=write(tmp_path / "a.jsonl", *PASSAGES))
    assert task.name == "lambada" and task.headline == "acc" and not task.published
    assert "OpenAI's text, of another file than the published one" in task.protocol
    for passage, request in zip(PASSAGES, task.requests, strict=True):
        context, word = " ".join(passage.split(" ")[:-1]), " " + passage.split(" ")[-1]
        assert tokenizer.decode(request.context) == context
        assert [tokenizer.decode(ids) for ids in request.endings] == [word]
    assert [example.word for example in task.examples] == ["Harlin", "Hermione"]
    limited = lambada.task(tokenizer, limit=1, path=tmp_path / "a.jsonl")
    assert [example.word for example in limited.examples] == ["Harlin"]


def test_a_line_break_is_no_space(tmp_path):
    tokenizer = gpt2_tokenizer()
    task = lambada.task(tokenizer, path=write(tmp_path / "a.jsonl", "one two.\n three\n\nfour"))
    (request,) = task.requests
    assert task.examples[0].word == "three\n\nfour"
    # Whitespace at the end of the context is the ending's, as in lm-evaluation-harness.
    assert tokenizer.decode(request.context) == "one two."
    assert tokenizer.decode(request.endings[0]) == "\n three\n\nfour"


def test_three_metrics_of_the_last_word(tmp_path):
    task = lambada.task(gpt2_tokenizer(), path=write(tmp_path / "a.jsonl", *PASSAGES, *PASSAGES))
    answers = [
        scores(-0.5, True, True),
        scores(-1.0, False, False),
        scores(-1.5, False, True),
        scores(-2.0, False, False),
    ]
    facts = [task.judge(*pair) for pair in zip(task.examples, answers, strict=True)]
    assert facts[2] == {"acc": 0.0, "acc_no_stop_words": 1.0, "nats": 1.5}
    metrics = task.summarize(facts)
    assert metrics["acc"] == 0.25 and metrics["acc_no_stop_words"] == 0.5
    assert metrics["perplexity"] == pytest.approx(math.exp(1.25))
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    deviation = np.std([0.5, 1.0, 1.5, 2.0], ddof=1)
    assert metrics["perplexity_stderr"] == pytest.approx(math.exp(1.25) * deviation / 2)
    assert len(metrics) == 6


def test_the_filter_hits_stop_words_and_not_words_that_begin_like_them():
    # " Hermione" begins with the token of " Her", which is excluded, so the filter misses it.
    guessed = scores(-1.0, True, False)
    judge = lambada.judge
    assert judge(lambada.Example("of", "Hermione"), guessed)["acc_no_stop_words"] == 1.0
    assert judge(lambada.Example("I see", "them"), guessed)["acc_no_stop_words"] == 0.0
    assert judge(lambada.Example("I see", "them"), guessed)["acc"] == 1.0
    missed = scores(-1.0, False, False)
    assert judge(lambada.Example("of", "Hermione"), missed)["acc_no_stop_words"] == 0.0


def test_stop_words_are_excluded_in_both_cases(tmp_path):
    tokenizer = gpt2_tokenizer()
    ids = lambada.stop_word_ids(tokenizer)
    words = {tokenizer.decode([i]) for i in ids}
    assert {" the", " The", " them", " of", " was", " I", " Her"} <= words
    assert all(word[0] == " " and word[1:].lower() in lambada.STOP_WORDS for word in words)
    assert list(ids) == sorted(set(ids)) and len(ids) > 250
    task = lambada.task(tokenizer, path=write(tmp_path / "a.jsonl", *PASSAGES))
    assert np.array_equal(task.excluded, ids)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut', "is not valid JSON (Unterminated string starting at, column 10)"),
        ('{"txt": "no such field"}', 'has no text "text"'),
        ('{"text": ["a", "b"]}', 'has no text "text"'),
        ('{"text": "word"}', "has a text of one word only"),
        ('{"text": " word"}', "has a text of one word only"),
        ('{"text": ""}', "has no last word: its text is empty or ends in a space"),
        ('{"text": "two words "}', "has no last word: its text is empty or ends in a space"),
        ('{"text": "two words \\n"}', "has no last word: its text is empty or ends in a space"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, complaint):
    path = write(tmp_path / "a.jsonl", *PASSAGES)
    path.write_text(path.read_text() + line + "\n")
    message = refuses(path)
    assert message == f"{path}, line 3 {complaint}; mend the line or fetch the file again."


def test_an_empty_file_and_a_missing_one(tmp_path):
    assert "has no examples" in refuses(write(tmp_path / "a.jsonl"))
    assert "cannot be read (No such file or directory)" in refuses(tmp_path / "b.jsonl")


def test_a_model_that_reads_characters_is_refused_before_any_file_is_looked_for():
    with pytest.raises(UserError, match=r"^lambada-standard needs GPT-2's vocabulary"):
        lambada.task(CharTokenizer(ALPHABET), standard=True, fetch=False)


def test_the_standard_text_is_taken_out_of_its_archive(room):
    task = lambada.task(gpt2_tokenizer(), standard=True)
    assert task.name == "lambada-standard" and task.published
    assert "the authors' text;" in task.protocol
    assert [example.word for example in task.examples] == ["sat", "home"]
    # The archive is large and of no more use.
    assert [path.name for path in (room / "data" / "lambada").iterdir()] == [lambada.MEMBER]
    again = lambada.task(gpt2_tokenizer(), standard=True, fetch=False)
    assert again.path == task.path


def test_an_archive_somebody_put_there_is_used_and_kept(room, monkeypatch):
    own = room / "mine" / "lambada" / "lambada-dataset.tar.gz"
    own.parent.mkdir(parents=True)
    own.write_bytes((room.parent / "web.tar.gz").read_bytes())
    monkeypatch.setenv("GPT2_DATA", str(room / "mine"))
    task = lambada.task(gpt2_tokenizer(), standard=True, fetch=False)
    assert len(task.examples) == 2 and own.exists()
    assert task.path.resolve() == room / "data" / "lambada" / lambada.MEMBER


def test_the_standard_text_is_missing(room):
    with pytest.raises(UserError) as caught:
        lambada.task(gpt2_tokenizer(), standard=True, fetch=False)
    archive = lambada.ARCHIVE
    assert str(caught.value) == (
        f"data/{archive.path} is not here; fetch {archive.address} and put it there."
    )


def test_lines_of_the_standard_text_end_where_their_last_word_does(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_bytes(b"the cat sat \r\n\na dog ran\xc3\xa9\n")
    task = lambada.task(gpt2_tokenizer(), standard=True, path=path)
    assert [example.word for example in task.examples] == ["sat", "rané"]
    path.write_bytes(b"the cat sat\nword\n")
    assert f"{path}, line 2 has a text of one word only" in refuses(path, standard=True)
    path.write_bytes(b"the cat sat\na \xff dog\n")
    assert f"{path}, line 2 is not UTF-8" in refuses(path, standard=True)


def test_every_passage_of_the_real_text_is_scored(real_data):
    path = real_data / "lambada" / "lambada_test.jsonl"
    task = lambada.task(gpt2_tokenizer(), path=path)
    assert task.published and "another file" not in task.protocol
    assert len(task.requests) == len(task.examples) == 5_153
    assert {len(request.endings) for request in task.requests} == {1}
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    for text, example in zip(texts, task.examples, strict=True):
        assert f"{example.context} {example.word}" == text and " " not in example.word
