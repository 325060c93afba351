"""The sampling benchmark compares things that do the same work."""

import pytest
import torch

from bench.sample import NoCache, Ours, Transformers, measure
from config import ModelConfig

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=100)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["ours", "no cache", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_draws_and_reads(name, dtype):
    if name == "transformers":
        pytest.importorskip("transformers")
    figures = measure(name, dtype, 2, 9, "cpu", CONFIG)
    assert figures.speed > 0 and figures.prefill > 0


def test_all_draw_as_many_tokens_and_ours_those_of_the_loop_without_a_cache():
    pytest.importorskip("transformers")
    prompt, drawn = torch.arange(8)[None].expand(2, -1), {}
    for way in (Ours, NoCache, Transformers):
        torch.manual_seed(0)
        drawn[way] = way(CONFIG, CPU, torch.float32).draw(prompt, 20)
        assert drawn[way].shape == (2, 20)
    assert torch.equal(drawn[Ours], drawn[NoCache])
