"""What a model makes of a passage: losses, the likeliest tokens, and pieces of whole characters."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
import passage as passages
import report
import run_facts
from config import UserError
from corpus.shards import TokenShards
from corpus.tokenizer import gpt2_tokenizer
from sample import load
from tests.runs import run_training
from tests.test_results import write_run
from tests.tiny import make_data, tiny_config


def data_of(page: Path) -> dict:
    """Return the data that a page holds."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found[1])


def passage_of(page: Path) -> dict:
    return data_of(page)["passage"]


def text_of(passage: dict) -> str:
    return "".join(piece["text"] for piece in passage["pieces"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a run of three steps on made-up words."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"steps": 3, "dropout": 0.5, "log_sequence_losses": True}
    config = tiny_config(make_data(folder / "data"), folder, **changes)
    return run_training(config)


def test_a_passage_longer_than_the_context_is_scored_token_by_token(trained):
    found = passages.read_by_model(trained, "the cat sat on a mat and ran home again. " * 2, None)
    model, tokenizer, _ = load(str(trained))
    model.eval()
    ids = torch.tensor([tokenizer.eot, *tokenizer.encode("the cat sat on a mat").tolist()])
    expected = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0][0], ids[1:]).item()
    losses = [token[1] for piece in found["pieces"] for token in piece["tokens"]]
    assert np.mean(losses[:20]) == pytest.approx(expected, rel=1e-3)
    assert found["tokens"] == len(losses) == 82 and found["left_out"] == 0
    assert found["checkpoint"] == "step_000003"
    first = found["pieces"][0]["tokens"][0]
    assert first[0] == "t" and len(first[2]) == passages.LIKELIEST
    assert [p for _, p in first[2]] == sorted((p for _, p in first[2]), reverse=True)


def test_the_report_of_a_trained_run_shows_validation_text(trained):
    passage = passage_of(report.write_report(trained))
    shards = TokenShards(run_facts.data_directory(metrics.read_run(trained))[0], "val")
    assert passage["source"] == "the beginning of the validation split"
    assert text_of(passage) == shards.tokenizer.decode(shards.read(np.array([1]), 400)[0])
    assert text_of(passage_of(report.write_report(trained, "ran home"))) == "ran home"


def test_the_losses_that_training_kept_are_ranked_with_their_text(trained):
    found = data_of(report.write_report(trained, loads_model=False))["sequences"]
    assert found["reads"] == found["sequences"] == 24
    shards = TokenShards(trained.parent / "data", "train")
    for row in found["rankings"][0]["highest"]:
        (tokens,) = shards.read(np.array([32 * row["sequence"]]), 32)
        assert row["text"] == shards.tokenizer.decode(tokens)


def test_a_passage_the_model_cannot_read_is_said_on_the_page(trained):
    passage = passage_of(report.write_report(trained, "no CAPITALS here"))
    assert "not in this model's alphabet" in passage["skipped"]


def test_a_model_that_gives_no_numbers_still_has_its_page(trained, monkeypatch):
    model, tokenizer, begins = load(str(trained))
    with torch.no_grad():
        model.wte.weight.fill_(torch.nan)
    monkeypatch.setattr(passages, "load", lambda _: (model, tokenizer, begins))
    passage = passage_of(report.write_report(trained, "cat"))
    assert text_of(passage) == "cat" and passage["loss"] is None


def test_a_run_without_a_checkpoint_says_so_on_its_page(tmp_path):
    passage = passage_of(report.write_report(write_run(tmp_path)))
    assert "no complete checkpoint yet" in passage["skipped"]


def test_characters_cut_in_two_are_put_together():
    tokenizer = gpt2_tokenizer()
    tokens = np.array([tokenizer.eot, *tokenizer.encode("a “🙂” b").tolist()])
    # At its end a character of which only the beginning is there.
    tokens = np.append(tokens, tokenizer.encode("🙂")[:1])
    count = len(tokens) - 1
    found = passages.pieces(tokenizer, tokens, np.ones(count), [[(0, 0.5)]] * count)
    assert "".join(piece["text"] for piece in found) == "a “🙂” b\N{REPLACEMENT CHARACTER}"
    assert sum(len(piece["tokens"]) for piece in found) == count
    assert any(len(piece["tokens"]) > 1 and "🙂" in piece["text"] for piece in found)
    assert found[-1]["tokens"][0][0].startswith("\\x") or "\\xf0" in found[-1]["tokens"][0][0]


def test_a_passage_is_a_file_or_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("from a file")
    assert passages.read_passage(str(tmp_path / "text.txt")) == "from a file"
    assert passages.read_passage("a text " * 100) == "a text " * 100
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        passages.read_passage(str(tmp_path / "latin"))
    with pytest.raises(UserError, match="empty"):
        passages.read_passage(" \n")
