"""HellaSwag's rows, the requests they become, and the two ways to judge the answers."""

import json

import numpy as np
import pytest

import hellaswag
from config import UserError
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from likelihood import Scores
from tests.tiny import ALPHABET

ROW = {
    "ind": 24,
    "activity_label": "Removing shingles",
    "ctx_a": "A man sits on a roof.",
    "ctx_b": "he",
    "ctx": "A man sits on a roof. he",
    "endings": ["sings.", "starts pulling up roofing.", "is a ski.", "rips tiles off."],
    "label": 3,
}
WIKIHOW = {
    "activity_label": "Work World",
    "ctx_a": "[header] How to write [title] Begin. [step] Take a pen. [substeps]",
    "ctx_b": "",
    "ctx": "[header] How to write [title] Begin. [step] Take a pen. [substeps]",
    "endings": ["Write [substeps] A line.", "[title] Go on.", "Stop.", "Rest  now [step] here."],
    "label": 0,
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(logprobs, tokens):
    values = np.array(logprobs, dtype=np.float64)
    return Scores(values, np.array(tokens), values < 0, values < 0)


def refuses(path, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        hellaswag.task(gpt2_tokenizer(), path=path, **arguments)
    return str(caught.value)


def lm_eval_documents(rows):
    """Return rows as lm-evaluation-harness prepares them: query, choices and gold."""
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")

    class Rows(list):
        def map(self, function):
            return [function(row) for row in self]

    return utils.process_docs(Rows(rows))


def test_raw_text_becomes_one_request_with_four_endings(tmp_path):
    tokenizer = gpt2_tokenizer()
    task = hellaswag.task(tokenizer, path=write(tmp_path / "a.jsonl", ROW, WIKIHOW))
    assert task.name == "hellaswag" and task.headline == "acc_norm" and not task.published
    assert "raw text" in task.protocol and "per token" in task.protocol
    assert "another file than the published one" in task.protocol
    for row, request in zip((ROW, WIKIHOW), task.requests, strict=True):
        assert tokenizer.decode(request.context) == row["ctx"]
        assert [tokenizer.decode(ids) for ids in request.endings] == [
            " " + ending for ending in row["endings"]
        ]
    assert [example.label for example in task.examples] == [3, 0]


def test_cleaned_text_is_lm_evaluation_harness_s(tmp_path):
    tokenizer = gpt2_tokenizer()
    path = write(tmp_path / "a.jsonl", ROW, WIKIHOW)
    task = hellaswag.task(tokenizer, cleaned=True, path=path)
    assert task.name == "hellaswag-cleaned"
    assert "per character" in task.protocol and "ctx as it is" not in task.protocol
    first, second = task.examples
    assert first.context == "Removing shingles: A man sits on a roof. He"
    assert second.context == "Work World: How to write. Begin. Take a pen. "
    assert second.endings == ("Write A line.", " Go on.", "Stop.", "Rest now here.")
    text = tokenizer.decode([*task.requests[1].context, *task.requests[1].endings[1]])
    assert text == "Work World: How to write. Begin. Take a pen.   Go on."
    for example, document in zip(task.examples, lm_eval_documents([ROW, WIKIHOW]), strict=True):
        assert example.context == document["query"]
        assert list(example.endings) == document["choices"]


def test_cleaned_text_without_its_parts_says_so(tmp_path):
    rows = [{key: row[key] for key in row if key not in ("ctx_a", "ctx_b")} for row in (ROW,)]
    task = hellaswag.task(
        gpt2_tokenizer(), cleaned=True, path=write(tmp_path / "a", WIKIHOW, *rows)
    )
    assert task.examples[1].context == "Removing shingles: A man sits on a roof. he"
    assert "ctx as it is" in task.protocol


def test_the_longest_text_wins_by_sum_or_by_token_or_by_character(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    by_token = hellaswag.task(gpt2_tokenizer(), path=path)
    by_character = hellaswag.task(gpt2_tokenizer(), cleaned=True, path=path)
    # Sums favour the first, means over 2, 8, 3 and 5 tokens the last, and over 6, 26, 9 and 15
    # characters the second.
    answer = scores([-5.0, -13.0, -6.0, -8.0], [2, 8, 3, 5])
    facts = by_token.judge(by_token.examples[0], answer)
    assert facts == {"choice": 0, "choice_norm": 3, "label": 3, "acc": 0.0, "acc_norm": 1.0}
    facts = by_character.judge(by_character.examples[0], answer)
    assert facts == {"choice": 0, "choice_norm": 1, "label": 3, "acc": 0.0, "acc_norm": 0.0}


def test_of_equal_answers_the_first_is_chosen():
    example = hellaswag.Example("a", ("b", "c", "d", "e"), 1)
    facts = hellaswag.judge_by_token(example, scores([-4, -2, -2, -4], [2, 1, 1, 2]))
    assert (facts["choice"], facts["choice_norm"]) == (1, 0)


def test_scores_have_standard_errors():
    facts = [{"acc": float(i < 2), "acc_norm": float(i < 5)} for i in range(10)]
    metrics = hellaswag.summarize(facts)
    assert metrics["acc"] == 0.2 and metrics["acc_norm"] == 0.5
    assert metrics["acc_norm_stderr"] == pytest.approx(np.sqrt(0.5 * 0.5 / 9))
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}


def test_the_test_split_has_choices_but_no_scores(tmp_path):
    unlabelled = {key: value for key, value in ROW.items() if key != "label"}
    path = write(tmp_path / "a.jsonl", unlabelled, {**ROW, "label": ""})
    task = hellaswag.task(gpt2_tokenizer(), split="test", path=path)
    assert task.name == "hellaswag-test"
    answer = scores([-2.0, -4.0, -4.0, -4.0], [1, 4, 4, 4])
    facts = [task.judge(example, answer) for example in task.examples]
    assert facts == [{"choice": 0, "choice_norm": 1}] * 2
    assert task.summarize(facts) == {}
    assert 'line 1 has no "label"' in refuses(path)


def test_the_first_examples_only(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, WIKIHOW, {"bad": True})
    assert len(hellaswag.task(gpt2_tokenizer(), limit=2, path=path).examples) == 2
    assert "has no examples" in refuses(write(tmp_path / "b.jsonl"))


def test_a_label_may_be_written_as_text(tmp_path):
    path = write(tmp_path / "a.jsonl", {**ROW, "label": "2"})
    assert hellaswag.task(gpt2_tokenizer(), path=path).examples[0].label == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ctx": None}, 'has no text "ctx"'),
        ({"ctx": 5}, 'has no text "ctx"'),
        ({"endings": None}, 'has no "endings", a list of 4 texts'),
        ({"endings": ["a", "b", "c"]}, 'has no "endings", a list of 4 texts'),
        ({"endings": ["a", "b", "c", 4]}, 'has no "endings", a list of 4 texts'),
        ({"endings": "abcd"}, 'has no "endings", a list of 4 texts'),
        ({"endings": ["a", "b", "", "d"]}, "has an empty ending (number 2, from 0)"),
        ({"endings": ["a", " \n", "c", "d"]}, "has an empty ending (number 1, from 0)"),
        ({"label": None}, 'has no "label"'),
        ({"label": 4}, "has the label 4, which is not one of 0 to 3"),
        ({"label": -1}, "has the label -1, which is not one of 0 to 3"),
        ({"label": "4"}, "has the label '4', which is not one of 0 to 3"),
        ({"label": "²"}, "has the label '²', which is not one of 0 to 3"),
        ({"label": True}, "has the label True, which is not one of 0 to 3"),
        ({"label": [3]}, "has the label [3], which is not one of 0 to 3"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, changes, complaint):
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, **changes})
    message = refuses(path)
    assert message == f"{path}, line 2 {complaint}; mend the line or fetch the file again."


def test_what_only_the_cleaned_text_needs(tmp_path):
    only_markup = {**ROW, "endings": ["a", "b", "c", "[title]"]}
    path = write(tmp_path / "a.jsonl", only_markup)
    assert len(hellaswag.task(gpt2_tokenizer(), path=path).requests) == 1
    assert "has an empty ending (number 3, from 0)" in refuses(path, cleaned=True)
    path = write(tmp_path / "b.jsonl", {**ROW, "activity_label": None})
    assert len(hellaswag.task(gpt2_tokenizer(), path=path).requests) == 1
    assert 'line 1 has no text "activity_label"' in refuses(path, cleaned=True)


def test_a_model_that_reads_characters_is_refused_before_any_file_is_looked_for():
    with pytest.raises(UserError, match=r"^hellaswag-cleaned-train needs GPT-2's vocabulary"):
        hellaswag.task(CharTokenizer(ALPHABET), split="train", cleaned=True, fetch=False)


def test_a_part_of_the_file_in_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "hellaswag").mkdir(parents=True)
    write(tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl", ROW)
    assert "has 1 rows where 10,042 are published" in refuses(None, limit=1, fetch=False)


def test_every_row_of_the_real_file_is_scored(real_data):
    path = real_data / "hellaswag" / "hellaswag_val.jsonl"
    task = hellaswag.task(gpt2_tokenizer(), path=path)
    assert len(task.requests) == len(task.examples) == 10_042
    assert {len(request.endings) for request in task.requests} == {4}
    counts = np.bincount([example.label for example in task.examples])
    assert len(counts) == 4 and counts.min() > 2400


def test_the_real_raw_rows_are_lm_evaluation_harness_s(real_data):
    path = real_data / "hellaswag" / "hellaswag_val_raw_100.jsonl"
    task = hellaswag.task(gpt2_tokenizer(), cleaned=True, path=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    documents = lm_eval_documents(rows)
    assert len(task.examples) == 100
    for example, document in zip(task.examples, documents, strict=True):
        assert example.context == document["query"]
        assert list(example.endings) == document["choices"]
        assert example.label == document["gold"]
