"""WikiText: the articles and figures of lm-evaluation-harness, from text or from the hub's form."""

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest

import wikitext
from config import UserError
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from likelihood import Scores

TEXT = (
    ' \n = First Article = \n \n It is 3 @.@ 5 km from " here " , he said . \n \n = = Part = = \n'
    " \n The dogs ' tails ( long ) . \n \n = Second = \n \n It 's at 1 @,@ 000 ° N . \n \n"
)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    """An empty directory to work in, without evaluation data and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT2_DATA", raising=False)

    def offline(place, url, *known):
        raise UserError(f"{url} could not be fetched.")

    monkeypatch.setattr("benchmark.fetch_file", offline)
    return tmp_path


def scores_of(task, nats_per_token=2.0):
    tokens = [len(request.endings[0]) for request in task.requests]
    return [
        Scores(np.array([-nats_per_token * count]), np.array([count]), np.array([0]), np.array([0]))
        for count in tokens
    ]


def plain_articles(text):
    """A slow and obvious way to cut at titles, line by line."""
    pages, page = [], []
    for line in text.split("\n"):
        words = line.strip().split(" ")
        if len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2]):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    return [page for page in [*pages, "\n".join(page)] if page.strip()]


def test_an_article_runs_from_its_title_to_the_next():
    assert wikitext.articles(TEXT) == [
        ' = First Article = \n \n It is 3 @.@ 5 km from " here " , he said . \n \n = = Part = = \n'
        " \n The dogs ' tails ( long ) . \n ",
        " = Second = \n \n It 's at 1 @,@ 000 ° N . \n \n",
    ]


def test_text_before_the_first_title_is_an_article_unless_it_is_blank():
    assert wikitext.articles("Some text \n = A = \n")[0] == "Some text "
    assert wikitext.articles(" \n \n = A = \n") == [" = A = \n"]


@pytest.mark.parametrize("line", ["= = A = =", "= A = =", "= = A =", "A =", "= A", "=A=", "= ="])
def test_only_single_equals_signs_make_a_title(line):
    assert wikitext.articles(f" {line} \n") == []


def test_cleaning_takes_the_spaces_back():
    first, second = map(wikitext.clean, wikitext.articles(TEXT))
    assert first == (
        ' = First Article =\n\nIt is 3.5 km from "here", he said.\n\n== Part ==\n\n'
        "The dogs' tails (long).\n"
    )
    assert second == " = Second =\n\nIt's at 1,000°N.\n\n"


def harness():
    return pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")


def test_cleaning_is_the_harnesss_on_any_mixture_of_its_marks():
    preprocess, dice = harness(), random.Random(0)
    pieces = [
        *" '\"()[]{}=.,:;?!-@N°s\n5",
        " @-@ ",
        " @,@ ",
        " , ",
        " . ",
        " 's",
        "= = ",
        " N ",
        "a",
    ]
    for _ in range(3000):
        page = "".join(dice.choices(pieces, k=dice.randint(0, 40)))
        assert wikitext.clean(page) == preprocess.wikitext_detokenizer({"page": page}), repr(page)


def test_real_articles_are_cleaned_and_counted_as_by_the_harness(real_data):
    preprocess = harness()
    task = wikitext.task(gpt2_tokenizer(), path=real_data / "wikitext/wiki.test.raw")
    for page, request, scores in zip(task.examples, task.requests, scores_of(task), strict=True):
        document = {"page": page}
        text = gpt2_tokenizer().decode(request.endings[0])
        assert text == preprocess.wikitext_detokenizer(document)
        theirs, ours = preprocess.process_results(document, [-1.0]), task.judge(page, scores)
        assert theirs["word_perplexity"][1] == ours["words"]
        assert theirs["byte_perplexity"][1] == ours["bytes"]


def test_the_real_test_set_has_62_documents_and_loses_no_line(real_data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT2_DATA", str(real_data))
    task = wikitext.task(gpt2_tokenizer(), fetch=False)
    text = task.path.read_text()
    assert task.path == real_data / "wikitext/wiki.test.raw" and task.published
    assert len(task.examples) == len(task.requests) == 62
    assert task.examples == plain_articles(text)
    assert " \n" + "\n".join(task.examples) == text
    facts = [task.judge(*pair) for pair in zip(task.examples, scores_of(task), strict=True)]
    # 1,290,590 bytes of text less the first line and the newline before each title but the first.
    assert sum(fact["bytes"] for fact in facts) == 1_290_590 - 2 - 61
    assert sum(fact["words"] for fact in facts) == 241_335
    assert facts[0]["words"] == 1 + len(task.examples[0].split()) + 1


def test_every_article_is_a_request_after_endoftext(text_file):
    tokenizer = gpt2_tokenizer()
    task = wikitext.task(tokenizer, path=text_file)
    assert task.name == "wikitext" and not task.published
    for page, request in zip(task.examples, task.requests, strict=True):
        assert request.context.tolist() == [tokenizer.eot]
        assert tokenizer.decode(request.endings[0]) == wikitext.clean(page)


def test_perplexities_are_over_words_bytes_and_tokens_of_all_articles(text_file):
    task = wikitext.task(gpt2_tokenizer(), path=text_file)
    facts = [task.judge(*pair) for pair in zip(task.examples, scores_of(task), strict=True)]
    metrics = task.summarize(facts)
    tokens = sum(len(request.endings[0]) for request in task.requests)
    nats, published = 2 * tokens, "".join(task.examples)
    # Each article begins with a space; only the first ends in one, before the newline cut off.
    words = len(published.split()) + 2 + 2
    assert metrics["token_perplexity"] == pytest.approx(math.exp(2))
    assert metrics["token_perplexity_stderr"] == pytest.approx(0, abs=1e-12)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / words))
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(nats / len(published.encode())))
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(metrics["byte_perplexity"]))
    assert metrics["bits_per_byte_stderr"] > 0 and metrics["word_perplexity_stderr"] > 0
    assert task.headline in metrics


def test_a_limit_takes_the_first_articles(text_file):
    task = wikitext.task(gpt2_tokenizer(), limit=1, path=text_file)
    assert len(task.requests) == 1 and "First Article" in task.examples[0]


def test_windows_line_ends_make_no_difference(text_file, tmp_path):
    other = tmp_path / "windows.raw"
    other.write_bytes(TEXT.replace("\n", "\r\n").encode())
    tasks = [wikitext.task(gpt2_tokenizer(), path=path) for path in (text_file, other)]
    assert tasks[0].examples == tasks[1].examples


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b" \n \n", "is empty"),
        (b" = A = \n \xff \n", "is not UTF-8"),
        (b"Some other text.\n", "no title"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_not_wikitext_is_named_in_one_sentence(tmp_path, content, complaint):
    path = tmp_path / "wiki.test.raw"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        wikitext.task(gpt2_tokenizer(), path=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_characters_is_refused(text_file):
    with pytest.raises(UserError, match="wikitext-103-valid needs GPT-2's vocabulary"):
        tokenizer = CharTokenizer("abc")
        wikitext.task(tokenizer, split="valid", large=True, path=text_file)


def test_the_four_names_have_their_places_and_serve_each_other(no_data):
    files = [wikitext.web_file(*pair) for pair in itertools.product(("test", "valid"), (0, 1))]
    assert len({file.path for file in files}) == len({file.address for file in files}) == 4
    path = no_data / "data/wikitext/wiki.valid.raw"
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT.encode() + b" \n" * (3760 - TEXT.count("\n")))
    for large in (False, True):
        task = wikitext.task(gpt2_tokenizer(), split="valid", large=large, fetch=False)
        assert task.path.resolve() == path and task.published
        assert f"WikiText-{103 if large else 2} " in task.protocol


def test_a_part_of_the_published_text_is_refused_where_downloads_go(no_data):
    path = no_data / "data/wikitext/wiki.test.raw"
    path.parent.mkdir(parents=True)
    path.write_bytes(TEXT.encode())
    with pytest.raises(UserError, match="rows where 4,358 are published"):
        wikitext.task(gpt2_tokenizer(), fetch=False)


def test_missing_and_offline_say_what_to_fetch_and_where_to_put_it(no_data):
    with pytest.raises(UserError) as error:
        wikitext.task(gpt2_tokenizer(), fetch=False)
    assert "test-00000-of-00001.parquet" in str(error.value)
    assert "data/wikitext/wiki.test.parquet" in str(error.value)
    with pytest.raises(UserError, match="could not be fetched"):
        wikitext.task(gpt2_tokenizer())
    assert not (no_data / "data").exists()


def put_parquet(directory, lines, name="wiki.test.parquet"):
    """Write lines as the hub has them: with their newline, but nothing for a blank one."""
    import pyarrow
    from pyarrow import parquet

    directory.mkdir(parents=True, exist_ok=True)
    rows = [line if line.strip() else "" for line in lines]
    parquet.write_table(pyarrow.table({"text": rows}), directory / name)
    return directory / name


def test_the_hubs_parquet_file_becomes_the_published_text(real_data, no_data, monkeypatch):
    original = (real_data / "wikitext/wiki.test.raw").read_bytes()
    lines = original.decode().splitlines(keepends=True)
    calls = []

    def fetch(place, url, *known):
        calls.append(url)
        return put_parquet(Path("data", place).parent, lines, Path(place).name)

    monkeypatch.setattr("benchmark.fetch_file", fetch)
    task = wikitext.task(gpt2_tokenizer(), limit=1)
    assert task.published and task.path.read_bytes() == original
    assert [path.name for path in task.path.parent.iterdir()] == ["wiki.test.raw"]
    wikitext.task(gpt2_tokenizer(), limit=1)
    assert len(calls) == 1 and calls[0].endswith("wikitext-2-raw-v1/test-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: put_parquet(path.parent, ["a \n"] * 5), "has 5 rows, not 4,358"),
        (lambda path: put_parquet(path.parent, ["a \n"] * 4358), "sha256 differs"),
        (lambda path: path.write_bytes(b"<html>busy</html>"), "not WikiText as a Parquet"),
    ],
)
def test_a_parquet_file_of_something_else_is_never_used(no_data, spoil, complaint):
    path = no_data / "data/wikitext/wiki.test.parquet"
    path.parent.mkdir(parents=True)
    spoil(path)
    with pytest.raises(UserError, match=complaint) as error:
        wikitext.task(gpt2_tokenizer(), fetch=False)
    assert "wiki.test.parquet" in str(error.value) and "\n" not in str(error.value)
    assert not path.with_name("wiki.test.raw").exists()
