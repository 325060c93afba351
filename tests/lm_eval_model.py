"""A GPT of ours as the harness knows GPT-2: transformers' model, Hugging Face's tokenizer."""

import functools
import importlib.util
import sys
import types
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hf import TRANSPOSED
from model import GPT
from tokenizer import END_OF_TEXT, RANK_FILE, gpt2_tokenizer, read_ranks


def harness_model(model: GPT, softmax_dtype: str = "float32") -> Any:
    """Return transformers' GPT-2 with our weights as the harness's own kind of model.

    Log-probabilities are summed in the softmax's dtype: a thousand in float32 are off by 1e-3.
    """
    c = model.config
    config = transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size
    )
    theirs = transformers.GPT2LMHeadModel(config)
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor[: c.vocab_size] if name == "wte.weight" else tensor
        state[f"transformer.{name}"] = tensor.T if name.endswith(TRANSPOSED) else tensor
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
    # It imports accelerate, to place models that it loads itself and to try batch sizes. Ours is
    # loaded and the size is given, so where that package is absent its names will do.
    absent = {}
    if importlib.util.find_spec("accelerate") is None:
        names = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size")
        package, utils = types.ModuleType("accelerate"), types.ModuleType("accelerate.utils")
        vars(package).update(dict.fromkeys(names), utils=utils)
        utils.get_max_memory = None
        absent = {"accelerate": package, "accelerate.utils": utils}
    sys.modules.update(absent)
    try:
        from lm_eval.models.huggingface import HFLM
    finally:
        for name in absent:
            del sys.modules[name]
    return HFLM


@functools.cache
def hf_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return Hugging Face's kind of GPT-2 tokenizer, made from OpenAI's rank table.

    The table has only each token's rank. The pair it was merged from is what its bytes come to when
    they are merged by the tokens of lower rank alone.
    """
    ranks = read_ranks(RANK_FILE)
    name = functools.partial(_printable, _byte_names())
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _merge(token, ranks, rank)
            merges.append((name(left), name(right)))
    vocabulary = {name(token): rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = gpt2_tokenizer().eot
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _merge(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], limit))
        parts[best : best + 2] = [pairs[best]]
    return parts


def _byte_names() -> list[str]:
    """Return the character that stands for each byte in Hugging Face's vocabulary of GPT-2."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b if b in visible else 256 + hidden.index(b)) for b in range(256)]


def _printable(names: list[str], token: bytes) -> str:
    return "".join(names[byte] for byte in token)
