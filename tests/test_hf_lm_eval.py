"""lm-evaluation-harness, told `--model hf`, gives an export the scores that we give the model."""

import pytest

from corpus.tokenizer import gpt2_tokenizer
from tests.exports import SHAPES, exported
from tests.small_models import config_of, shaken

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from tests.against_lm_eval import compare, hellaswag_pairs, lambada_pair, silent, wikitext_pair
from tests.lm_eval_model import harness_class

pytestmark = pytest.mark.slow


@pytest.fixture
def harness():
    """The harness's class for models of transformers, which loads one from its directory."""
    with silent():
        return harness_class()


@pytest.mark.parametrize("shape", ["gpt2", "rope", "llama", "modern untied"])
def test_an_export_has_the_scores_of_its_model(shape, harness, real_data, tmp_path):
    sizes = {"block_size": 128, "vocab_size": 50257}
    model = shaken(config_of(**SHAPES[shape][1], **sizes))
    directory = exported(model, tmp_path / "out", gpt2_tokenizer())
    with silent():
        theirs = harness(
            str(directory),
            device="cpu",
            dtype="float32",
            batch_size=1,
            trust_remote_code=True,
            softmax_dtype="float64",
            # In a text that repeats itself it takes one window's scores for another's.
            logits_cache=False,
        )
    assert theirs.max_length == 128 and theirs.prefix_token_id == 50256
    for pair in (
        # The one under the harness's own protocol.
        hellaswag_pairs(real_data, tmp_path, raw=3, cleaned=1)[1],
        lambada_pair(real_data, tmp_path, 4),
        wikitext_pair(real_data, 1),
    ):
        result = compare(pair, model, theirs)
        assert result.agrees, result
