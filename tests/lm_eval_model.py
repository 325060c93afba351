"""A GPT of ours as the harness knows GPT-2: transformers' model, Hugging Face's tokenizer."""

import functools
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from corpus.tokenizer import END_OF_TEXT
from hf_layouts import to_transformers
from hf_tokenizer import merge_rules, vocabulary
from model import GPT


def harness_model(model: GPT, softmax_dtype: str = "float32") -> Any:
    """Return transformers' GPT-2 with our weights as the harness's own kind of model.

    Log-probabilities are summed in the softmax's dtype: a thousand in float32 are off by 1e-3.
    """
    c = model.config
    config = transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size
    )
    theirs = transformers.GPT2LMHeadModel(config)
    state = to_transformers(model.state_dict(), c)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    return harness_class()(
        theirs.eval(),
        tokenizer=hf_tokenizer(),
        batch_size=1,
        softmax_dtype=softmax_dtype,
        # In a text that repeats itself it takes one window's scores for another's.
        logits_cache=False,
    )


def harness_class() -> type:
    """Return the harness's class for models of transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM


@functools.cache
def hf_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return Hugging Face's kind of GPT-2 tokenizer, made from OpenAI's rank table."""
    inner = Tokenizer(models.BPE(vocabulary(), list(merge_rules())))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
