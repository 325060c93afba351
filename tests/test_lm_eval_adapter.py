"""lm-evaluation-harness asks our models, and gets what it gets from transformers' GPT-2."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import evaluate
import lm_eval_adapter
from config import UserError
from corpus.tokenizer import END_OF_TEXT, CharTokenizer, gpt2_tokenizer
from likelihood import encode_request, windows
from lm_eval_adapter import as_language_model, load_tasks, run_harness, share_contexts
from model import GPT
from scoring import Scorer
from tests.tiny import ALPHABET, ROOT, script

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tests.against_lm_eval import (
    by_harness,
    compare,
    harness_task,
    hellaswag_pairs,
    lambada_pair,
    pages,
    spread,
    wikitext_pair,
)
from tests.lm_eval_cases import ALONE, CASES, CONTEXT, asked_by_harness, instances, small_model
from tests.lm_eval_model import harness_model, hf_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def ours(model):
    return asked_by_harness(model)


@pytest.fixture(scope="module")
def theirs(model):
    return harness_model(model)


@pytest.mark.slow
def test_our_benchmarks_give_the_harness_numbers(model, theirs, real_data, tmp_path):
    pairs = [
        *hellaswag_pairs(real_data, tmp_path, raw=20, cleaned=40),
        lambada_pair(real_data, tmp_path, 30),
        wikitext_pair(real_data, 2),
    ]
    for pair in pairs:
        result = compare(pair, model, theirs)
        assert result.agrees, result
        assert result.examples in (2, 20, 30, 40)


def test_a_comparison_sees_what_differs(model, theirs, real_data, tmp_path):
    """Otherwise the test above could pass for no reason."""
    pair = lambada_pair(real_data, tmp_path, 5)
    other = harness_task("lambada", "lambada_openai", [{"text": "It was a cat"}] * 5)
    result = compare(dataclasses.replace(pair, theirs=other), model, theirs)
    assert not result.agrees and result.largest > 1e-3


def test_log_probabilities_of_any_continuation_are_the_harness_own(ours, theirs):
    # What the model itself would say is the likeliest; of other continuations hardly any is.
    said = ours.generate_until(instances("generate_until", ("The cat", {"max_gen_toks": 3})))[0]
    cases = instances("loglikelihood", *CASES, ("The cat", said))
    expected = theirs.loglikelihood(cases, disable_tqdm=True)
    for case, answer, value in zip(cases, ours.loglikelihood(cases), expected, strict=True):
        assert answer[0] == pytest.approx(value[0], abs=1e-4), case.args
        assert answer[1] == value[1], case.args
    assert expected[-1][1] and not expected[0][1]


def test_log_probabilities_of_whole_texts_are_the_harness_own(ours, theirs):
    texts = ["", "A", "The cat sat. " * 3, "One two three four. " * 200, f"A{END_OF_TEXT}B"]
    cases = instances("loglikelihood_rolling", *((text,) for text in texts))
    expected = theirs.loglikelihood_rolling(cases, disable_tqdm=True)
    assert ours.loglikelihood_rolling(cases) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("The cat", {"until": ["\n"], "max_gen_toks": 20}),
        ("The cat", {"until": [], "max_gen_toks": 40, "do_sample": False}),
        ("Die Straße heißt", {"until": "e", "max_gen_toks": 40}),
        # A prompt that loses its beginning.
        ("One two three four five. " * 60, {"max_gen_toks": 30, "temperature": 0.0}),
    ],
)
def test_greedy_texts_are_the_harness_own(ours, theirs, prompt, options):
    expected = theirs.generate_until(
        instances("generate_until", (prompt, dict(options))), disable_tqdm=True
    )
    assert ours.generate_until(instances("generate_until", (prompt, dict(options)))) == expected
    assert len(expected[0]) > 0 or "until" in options


def test_a_text_ends_before_the_first_string_that_ends_it(ours):
    whole = ours.generate_until(instances("generate_until", ("The cat", {"max_gen_toks": 30})))[0]
    stop, later = whole[20:24], whole[40:44]
    options = {"until": [later, stop], "max_gen_toks": 30}
    (text,) = ours.generate_until(instances("generate_until", ("The cat", options)))
    assert text == whole[: whole.index(stop)]


def test_drawn_texts_differ_between_repeats_and_are_repeatable(ours):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10}
    cases = instances("generate_until", *[("The cat", options)] * 3)
    texts = ours.generate_until(cases)
    assert len(set(texts)) == 3
    assert ours.generate_until(cases) == texts


ANSWERS = """
import json
from training.distributed import init_distributed
from tests.lm_eval_cases import CASES, asked_by_harness, instances, small_model

with init_distributed() as info:
    lm = asked_by_harness(small_model(), info)
    found = [
        lm.loglikelihood(instances("loglikelihood", *CASES)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("One two.",), ("Three",))),
        lm.generate_until(instances("generate_until", *[("A cat", {"max_gen_toks": 5})] * 3)),
    ]
    if info.rank == 1:
        print(json.dumps(found))
"""


def test_two_processes_answer_as_one(ours, tmp_path):
    """The second is asked here: to the harness each process is the only one."""
    (tmp_path / "answers.py").write_text(ANSWERS)
    result = script(tmp_path / "answers.py", cwd=tmp_path, processes=2, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    pairs, texts, written = json.loads(result.stdout)
    expected = ours.loglikelihood(instances("loglikelihood", *CASES))
    assert [tuple(pair) for pair in pairs] == [(pytest.approx(v, abs=1e-6), g) for v, g in expected]
    cases = instances("loglikelihood_rolling", ("One two.",), ("Three",))
    assert texts == pytest.approx(ours.loglikelihood_rolling(cases), abs=1e-6)
    case = instances("generate_until", ("A cat", {"max_gen_toks": 5}))
    assert written == ours.generate_until(case) * 3


def test_too_many_new_tokens_and_beams_are_refused(ours):
    with pytest.raises(UserError, match=f"up to {CONTEXT} new tokens, which leaves no room"):
        ours.generate_until(instances("generate_until", ("A", {"max_gen_toks": CONTEXT})))
    with pytest.raises(UserError, match="num_beams = 4"):
        ours.generate_until(instances("generate_until", ("A", {"num_beams": 4})))


def test_an_empty_continuation_is_refused(ours):
    with pytest.raises(UserError, match="no tokens of its own: it is empty"):
        ours.loglikelihood(instances("loglikelihood", ("The cat", "")))


def test_a_text_the_alphabet_lacks_is_refused(model):
    lm = as_language_model(Scorer(model, ALONE, torch.float32), CharTokenizer(ALPHABET), 128, 512)
    with pytest.raises(UserError, match="not in this model's alphabet"):
        lm.loglikelihood(instances("loglikelihood", ("the cat", " Sat")))


def test_one_context_is_computed_once_but_no_row_outgrows_the_model(ours, theirs, monkeypatch):
    read = []
    real = lm_eval_adapter.plan

    def counting(requests, *rest):
        read.extend(requests)
        return real(requests, *rest)

    monkeypatch.setattr(lm_eval_adapter, "plan", counting)
    choices = [("The cat sat on the", f" {word}") for word in ("mat", "sofa", "roof", "lap")]
    unconditional = [("", f"Sentence number {i} is about cats.") for i in range(60)]
    cases = instances("loglikelihood", *choices, *unconditional)
    expected = theirs.loglikelihood(cases, disable_tqdm=True)
    assert ours.loglikelihood(cases) == [(pytest.approx(v, abs=1e-4), g) for v, g in expected]
    assert len(read[0].endings) == 4 and 4 <= len(read) <= 6
    assert max(len(r.context) + sum(len(e) - 1 for e in r.endings) for r in read) <= CONTEXT


def test_places_of_shared_contexts_follow_the_order_asked():
    pairs = [([1], [5]), ([2], [6, 7]), ([1], [8]), ([1], [5])]
    requests, places = share_contexts(pairs, max_length=8)
    assert places == [(0, 0), (1, 0), (0, 1), (0, 2)]
    for (context, ending), (i, j) in zip(pairs, places, strict=True):
        assert requests[i].context.tolist() == context
        assert requests[i].endings[j].tolist() == ending


TEXT = st.text(st.sampled_from(" \n\tabcé日'1.🙂"), max_size=12)


@given(context=TEXT, ending=TEXT)
@settings(deadline=None, max_examples=200)
def test_our_requests_are_cut_into_tokens_as_the_harness_cuts_them(context, ending):
    lm = types.SimpleNamespace(backend="causal", tok_encode=hf_tokenizer().encode)
    from lm_eval.api.model import TemplateLM

    if context.strip():
        before, after = TemplateLM._encode_pair(lm, context, ending)
    else:
        # The harness itself has nothing to say to a context of blanks.
        before, after = [gpt2_tokenizer().eot], hf_tokenizer().encode(context + ending)
    # An ending may be empty, or one token with the context's last one.
    assume(after and ending.strip())
    request = encode_request(gpt2_tokenizer(), context, [ending])
    assert request.context.tolist() == before
    assert request.endings[0].tolist() == after


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_hugging_face_and_our_tokenizer_agree(text):
    """Or the other comparisons would not be of the same tokens."""
    assert hf_tokenizer().encode(text) == gpt2_tokenizer().encode(text).tolist()


@given(length=st.integers(1, 60), size=st.integers(1, 20))
def test_our_windows_are_the_harness_own(length, size):
    tokens = list(range(1, length + 1))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, size, context_len=1))
    text = [0, *tokens]
    ours = [(text[a:b], text[b:c]) for a, b, c in windows(len(text), 1, size)]
    assert ours == list(theirs)


def test_the_harness_runs_its_own_tasks_on_our_model(ours, theirs, real_data, capsys):
    rows = spread(real_data / "hellaswag" / "hellaswag_val_raw_100.jsonl", 6)
    task = harness_task("hellaswag", "hellaswag", rows)
    results = run_harness(ours, {"tasks": {"hellaswag": task}}, limit=4, samples=True)
    assert capsys.readouterr().out == ""
    _, expected = by_harness(task, theirs)
    for sample, reference in zip(results["samples"]["hellaswag"], expected[:4], strict=True):
        assert sample["doc_id"] == reference["doc_id"]
        np.testing.assert_allclose(
            np.array(sample["filtered_resps"]), np.array(reference["filtered_resps"]), atol=1e-4
        )
        assert sample["acc_norm"] == reference["acc_norm"]
    kept = lm_eval_adapter.kept_results(results)["hellaswag"]
    assert kept["examples"] == 4 and 0 <= kept["metrics"]["acc_norm"] <= 1
    assert kept["metrics"]["acc_stderr"] > 0
    assert "|hellaswag|" in lm_eval_adapter.results_table(results)


def test_the_command_prints_the_harness_table_and_keeps_its_results(
    real_data, tmp_path, monkeypatch, capsys
):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=128)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    rows = spread(real_data / "hellaswag" / "hellaswag_val_raw_100.jsonl", 6)
    loaded = {"tasks": {"hellaswag": harness_task("hellaswag", "hellaswag", rows)}}
    monkeypatch.setattr(lm_eval_adapter, "load_tasks", lambda names, info: loaded)
    words = [str(tmp_path / "model"), "--lm-eval", "hellaswag", "--limit", "3", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    evaluate.main()
    assert "|hellaswag|" in capsys.readouterr().out
    kept = json.loads((tmp_path / "model" / "evals.json").read_text())["model"]
    facts = kept["lm-eval hellaswag limit=3"]
    assert facts["examples"] == 3 and facts["dtype"] == "float32"
    assert 0 <= facts["metrics"]["acc_norm"] <= 1


@pytest.fixture
def few_tasks(monkeypatch):
    """An index of a few of the harness's tasks; that of all takes ten seconds to read."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    whole = tasks.TaskManager
    folders = [str(root / name) for name in ("lambada", "wikitext", "hellaswag")]
    monkeypatch.setattr(
        tasks, "TaskManager", lambda: whole(include_defaults=False, include_path=folders)
    )


def test_unknown_tasks_are_refused_with_a_near_name(few_tasks):
    with pytest.raises(UserError, match="no task of lm-evaluation-harness 'helaswag'; did you "):
        load_tasks("lambada_openai,helaswag", ALONE)
    with pytest.raises(UserError, match="names no task"):
        load_tasks(" , ", ALONE)


def test_data_out_of_reach_is_one_sentence(few_tasks):
    with pytest.raises(UserError, match=r"could not load wikitext \(.*where the hub can be"):
        load_tasks("wikitext", ALONE)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; pip install lm_eval"):
        load_tasks("hellaswag", ALONE)


def test_articles_are_the_ones_of_the_harness(real_data):
    import wikitext

    text = (real_data / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")
    assert wikitext.articles(text) == pages(text)
    assert len(pages(text)) == 62


def test_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    lm_eval_adapter._check_hub()
    assert lm_eval_adapter.os.environ["HF_HUB_OFFLINE"] == "1"
