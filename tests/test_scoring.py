"""The scoring engine equals a plain loop, for any batch size, world size and compilation."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import ModelConfig, UserError
from likelihood import Request, Scores
from model import GPT
from modern import ModernGPT, build_model
from packing import plan
from scoring import Scorer, sight
from tests.tiny import ROOT
from training.distributed import DistInfo

VOCAB, CONTEXT = 300, 64
ALONE = DistInfo(0, 0, 1, torch.device("cpu"))


def small_model(**changes) -> GPT | ModernGPT:
    torch.manual_seed(0)
    config = ModelConfig(2, 2, 32, CONTEXT, VOCAB)
    model = build_model(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights, so that answers differ by more than rounding.
            parameter.mul_(5)
        model.wte.weight[VOCAB:] = 100
    return model


def mixed_requests(count: int = 60, seed: int = 0) -> list[Request]:
    """Requests of all kinds: one to ten endings, some too long for the context, some scoring it."""
    rng = np.random.default_rng(seed)

    def text(least: int, most: int) -> np.ndarray:
        return rng.integers(VOCAB, size=rng.integers(least, most))

    requests = []
    for number in range(count):
        endings = tuple(text(1, 9) for _ in range(rng.integers(1, 11)))
        requests.append(Request(text(1, 40), endings, scores_context=number % 3 == 0))
    requests.append(Request(text(70, 90), (text(1, 9), text(5, 9)), scores_context=True))
    requests.append(Request(text(1, 2), (text(200, 300),)))
    requests.append(Request(text(80, 90), (text(100, 140), text(1, 2))))
    return requests


@torch.no_grad()
def plain(model: GPT, request: Request, max_length: int = CONTEXT) -> Scores:
    """One ending at a time, whole logits, the documented rule for what is too long."""

    def score(text: np.ndarray, first: int) -> tuple[float, bool]:
        total, greedy = 0.0, True
        while first < len(text):
            stop = min(first + max_length, len(text))
            start = max(stop - 1 - max_length, 0)
            logits, _ = model(torch.from_numpy(text[start : stop - 1])[None])
            logps = F.log_softmax(logits[0].float(), dim=-1)
            for place in range(first, stop):
                row = logps[place - 1 - start]
                total += row[text[place]].item()
                greedy &= row.argmax().item() == text[place]
            first = stop
        return total, greedy

    found = [
        score(np.concatenate((request.context, e)), len(request.context)) for e in request.endings
    ]
    context = score(request.context, 1)[0] if request.scores_context else 0.0
    return Scores(
        np.array([logprob for logprob, _ in found]),
        np.array([len(ending) for ending in request.endings]),
        np.array([greedy for _, greedy in found]),
        np.array([greedy for _, greedy in found]),
        context,
        len(request.context) - 1 if request.scores_context else 0,
    )


def assert_same(ours: list[Scores], others: list[Scores], tolerance: float = 1e-3) -> None:
    assert len(ours) == len(others)
    for a, b in zip(ours, others, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=tolerance)
        assert abs(a.context_logprob - b.context_logprob) <= tolerance
        assert a.tokens.tolist() == b.tokens.tolist() and a.context_tokens == b.context_tokens
        assert a.greedy.tolist() == b.greedy.tolist()
        assert a.logprobs.argmax() == b.logprobs.argmax()


def score(model: GPT, requests: list[Request], batch_tokens: int = 512, **options) -> list[Scores]:
    laid_out = plan(requests, options.pop("max_length", CONTEXT), batch_tokens, VOCAB)
    return Scorer(model, ALONE, torch.float32, **options).score(laid_out)


def test_equals_a_plain_loop_over_single_endings():
    model, requests = small_model(), mixed_requests()
    assert_same(score(model, requests), [plain(model, request) for request in requests])


def test_scores_of_a_soft_capped_model_are_those_of_its_capped_logits():
    parts = {"architecture": "modern", "bias": False}
    model, requests = small_model(**parts, logit_softcap=2.0), mixed_requests()
    with torch.no_grad():
        assert model(torch.arange(30)[None])[0].abs().max() <= 2.0
    capped = score(model, requests)
    assert_same(capped, [plain(model, request) for request in requests])
    uncapped = score(small_model(**parts), requests)
    pairs = zip(capped, uncapped, strict=True)
    assert np.median([abs(a.logprobs - b.logprobs).max() for a, b in pairs]) > 0.1


def test_greedy_answers_are_found():
    """Endings made by always taking the likeliest token are greedy, and only those."""
    model = small_model()
    context = np.arange(5)
    text = context
    with torch.no_grad():
        for _ in range(4):
            logits, _ = model(torch.from_numpy(text)[None])
            text = np.append(text, logits[0, -1].argmax().item())
    likeliest = text[5:]
    other = likeliest.copy()
    other[2] = (other[2] + 1) % VOCAB
    found = score(model, [Request(context, (likeliest, other, likeliest[:1]))])[0]
    assert found.greedy.tolist() == [True, False, True]
    # Without the likeliest token the next one wins; and an excluded one never does.
    laid_out = plan(
        [Request(context, (likeliest, logits[0, -1].topk(2).indices[1:].numpy()))], 64, 512, VOCAB
    )
    scorer = Scorer(model, ALONE, torch.float32)
    filtered = scorer.score(laid_out, excluded=likeliest[:1])[0]
    assert filtered.greedy.tolist()[0] and not filtered.greedy_filtered[0]
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(context)[None])
    second = logits[0, -1].topk(2).indices[1:].numpy()
    filtered = scorer.score(plan([Request(context, (second,))], 64, 512, VOCAB), likeliest[:1])[0]
    assert not filtered.greedy[0] and filtered.greedy_filtered[0]


def test_a_filter_holds_for_the_first_token_of_an_ending_only():
    model = small_model()
    context = np.arange(5)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(context)[None])
        first = logits[0, -1].argmax().item()
        logits, _ = model(torch.from_numpy(np.append(context, first))[None])
        second = logits[0, -1].argmax().item()
    assert first != second
    laid_out = plan([Request(context, (np.array([first, second]),))], 64, 512, VOCAB)
    found = Scorer(model, ALONE, torch.float32).score(laid_out, excluded=np.array([second]))[0]
    assert found.greedy[0] and found.greedy_filtered[0]


@pytest.mark.parametrize("batch_tokens", [128, 7 * 128, 64 * 128])
def test_batch_size_does_not_matter(batch_tokens):
    model, requests = small_model(), mixed_requests(200)
    assert_same(score(model, requests, batch_tokens), score(model, requests, 3 * 128), 1e-4)


def test_rows_of_any_length_give_the_same():
    model, requests = small_model(), mixed_requests(100)
    laid_out = plan(requests, CONTEXT, 512, VOCAB, few_shapes=False)
    assert len({batch.tokens.shape[1] for batch in laid_out.batches}) > 2
    found = Scorer(model, ALONE, torch.float32).score(laid_out)
    assert_same(found, score(model, requests), 1e-4)


def test_nothing_is_dropped_or_repeated():
    requests = mixed_requests(150)
    for found, request in zip(score(small_model(), requests), requests, strict=True):
        assert found.tokens.tolist() == [len(ending) for ending in request.endings]
        assert found.context_tokens == request.scores_context * (len(request.context) - 1)


@pytest.mark.parametrize("max_length", [16, 40, CONTEXT])
def test_a_shorter_context_follows_the_same_rule(max_length):
    model, requests = small_model(), mixed_requests(20)
    assert_same(
        score(model, requests, max_length=max_length),
        [plain(model, request, max_length) for request in requests],
    )


def test_padding_of_the_vocabulary_takes_no_part():
    model, request = small_model(), Request(np.arange(3), (np.arange(4),))
    before = score(model, [request])[0].logprobs
    with torch.no_grad():
        model.wte.weight[VOCAB:] = -7
    assert np.array_equal(before, score(model, [request])[0].logprobs)


def test_bfloat16_stays_near_float32_where_all_logits_are_far_from_zero():
    """As OpenAI's are: rounded to bfloat16 as they come, they would be wrong by up to a half."""
    model, requests = small_model(n_embd=64), mixed_requests(40)
    with torch.no_grad():
        # One direction that all ids share, and that every state points away from.
        model.wte.weight[:VOCAB, 0] += 10
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, -10
        logits, _ = model(torch.arange(9)[None])
    assert -120 < logits.mean() < -80
    exact, laid_out = score(model, requests), plan(requests, CONTEXT, 512, VOCAB)
    rounded = Scorer(model, ALONE, torch.bfloat16).score(laid_out)
    tokens = np.concatenate([s.tokens for s in exact])
    differences = np.concatenate(
        [a.logprobs - b.logprobs for a, b in zip(rounded, exact, strict=True)]
    )
    # 0.037; it is 0.124 with logits that are rounded as they are.
    assert np.abs(differences / tokens).max() < 0.08


def test_the_model_comes_back_as_it_was():
    model = small_model(dropout=0.5)
    model.train()
    generator = torch.get_rng_state()
    first = score(model, mixed_requests(5))
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    assert_same(first, score(model.eval(), mixed_requests(5)), 0)
    assert not model.training


def test_weights_that_diverged_get_no_scores():
    """nan is neither more nor less than anything, so that nan could pass for the likeliest."""
    model = small_model()
    with torch.no_grad():
        model.ln_f.weight[3] = torch.nan
    with pytest.raises(UserError, match="weights have diverged"):
        score(model, mixed_requests(3))


def test_a_stop_ends_it_without_scores():
    laid_out = plan(mixed_requests(), CONTEXT, 128, VOCAB)
    calls = []

    def stop_at_third(done: list[int], scores: list[Scores]) -> bool:
        calls.append(done)
        return len(calls) == 3

    scorer = Scorer(small_model(), ALONE, torch.float32)
    assert scorer.score(laid_out, on_progress=stop_at_third) is None
    assert len(calls) == 3


def test_progress_tells_of_every_request_once_with_its_final_scores():
    model, requests = small_model(), mixed_requests()
    told: dict[int, Scores] = {}

    def note(done: list[int], scores: list[Scores]) -> bool:
        assert not told.keys() & set(done)
        told.update(zip(done, scores, strict=True))
        return False

    found = Scorer(model, ALONE, torch.float32).score(
        plan(requests, CONTEXT, 256, VOCAB), on_progress=note
    )
    assert sorted(told) == list(range(len(requests)))
    assert_same([told[i] for i in range(len(requests))], found, 0)


def test_what_tokens_see():
    """Two requests in one row: each sees its own past, and endings do not see each other."""
    requests = [
        Request(np.array([1, 2]), (np.array([3, 4, 5]), np.array([6, 7]))),
        Request(np.array([8]), (np.array([9, 10]),)),
    ]
    batch = plan(requests, CONTEXT, 128, VOCAB).batches[0]
    assert batch.tokens[0, :8].tolist() == [1, 2, 3, 4, 6, 8, 9, 0]
    assert batch.positions[0, :7].tolist() == [0, 1, 2, 3, 2, 0, 1]
    sees = sight(batch, torch.device("cpu"), torch.float32)[0, 0, :8, :8] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


# A process of several: scores the same requests and writes what it found.
WORKER = """
import json, sys
import torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from training.distributed import init_distributed
from packing import plan
from scoring import Scorer
from tests.test_scoring import CONTEXT, VOCAB, mixed_requests, small_model

with init_distributed() as info:
    laid_out = plan(mixed_requests(), CONTEXT, 256, VOCAB)
    found = Scorer(small_model(), info, torch.float32).score(laid_out)
    lines = [[s.logprobs.tolist(), s.greedy.tolist(), s.tokens.tolist()] for s in found]
    with open(f"{{sys.argv[1]}}-{{info.rank}}.json", "w") as file:
        json.dump(lines, file)
"""


@pytest.mark.parametrize("size", [2, 3])
def test_world_size_does_not_matter(tmp_path, size):
    """Bit for bit: ranks share out whole batches, and each is computed alike anywhere."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={size}", "worker.py", "found"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    alone = score(small_model(), mixed_requests(), 256)
    expected = [[s.logprobs.tolist(), s.greedy.tolist(), s.tokens.tolist()] for s in alone]
    for rank in range(size):
        assert json.loads((tmp_path / f"found-{rank}.json").read_text()) == expected


# Rank 1 fails, then rank 0 is asked to stop; after both, all ranks still score together.
FAILING = """
import json, sys
import torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from training.distributed import init_distributed
from packing import plan
from scoring import Scorer
from tests.test_scoring import CONTEXT, VOCAB, mixed_requests, small_model

with init_distributed() as info:
    def fails(done, scores):
        if info.rank == 1:
            raise ValueError("a bad example\\nand more")
        return False

    laid_out = plan(mixed_requests(), CONTEXT, 256, VOCAB)
    scorer = Scorer(small_model(), info, torch.float32)
    found = []
    try:
        scorer.score(laid_out, on_progress=fails)
    except RuntimeError as error:
        found.append(str(error))
    found.append(scorer.score(laid_out, on_progress=lambda done, scores: info.rank == 0))
    found.append(len(scorer.score(laid_out)))
    with open(f"{{sys.argv[1]}}-{{info.rank}}.json", "w") as file:
        json.dump(found, file)
"""


def test_what_fails_or_stops_on_one_rank_does_on_all(tmp_path):
    (tmp_path / "worker.py").write_text(FAILING.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "worker.py", "found"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for rank, why in enumerate(("on another process", "ValueError: a bad example")):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found == [f"scoring failed ({why})", None, len(mixed_requests())]


def test_without_a_working_compiler_scoring_goes_on_eagerly(monkeypatch, capsys):
    def broken(function, dynamic):
        def fails(*args, **kwargs):
            raise RuntimeError("no compiler\nlong story")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    model, requests = small_model(), mixed_requests(4)
    laid_out = plan(requests, CONTEXT, 512, VOCAB)
    found = Scorer(model, ALONE, torch.float32, "on").score(laid_out)
    said = capsys.readouterr().out
    assert said == "torch.compile failed (no compiler): scoring goes on without it.\n"
    assert_same(found, score(model, requests), 1e-4)


@pytest.mark.slow
def test_compiled_equals_eager_in_few_shapes():
    model, requests = small_model(), mixed_requests(120)
    laid_out = plan(requests, CONTEXT, 512, VOCAB)
    assert len({batch.tokens.shape for batch in laid_out.batches}) <= 2
    compiled = Scorer(model, ALONE, torch.float32, "on").score(laid_out)
    assert_same(compiled, score(model, requests), 1e-4)
