"""lm-evaluation-harness (`pip install lm_eval`) with one of our models under its own tasks.

    python evaluate.py MODEL --lm-eval hellaswag,lambada_openai,wikitext

The harness makes the prompts and sums up; the model's answers come from the same engine as for our
own benchmarks. All processes run the harness over all examples, and the engine shares out the work
among them, so to the harness each looks like the only one. Importing this module does not need
the package.
"""

import contextlib
import importlib.util
import io
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from config import UserError
from corpus.tokenizer import END_OF_TEXT, Tokenizer
from likelihood import Request, Scores
from packing import plan
from sample import generate
from scoring import Scorer
from tqdm_bars import EvaluationBar
from training.distributed import DistInfo, autocast, barrier
from utils import check_name

# New tokens where a task does not say how many at most, as for the harness's own models.
NEW_TOKENS = 256
# How often the harness resamples where a standard error has no formula (LAMBADA's perplexity); its
# own 100,000 times take minutes and change the second figure of the error at most.
BOOTSTRAPS = 1000
# The harness's own default.
FEWSHOT_SEED = 1234
# What a task may ask of `generate_until`; that all else is switched off is checked.
GENERATION_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
SWITCHED_OFF = (None, False, 1, "")


class Answers:
    """What the harness asks of a language model, answered by `Scorer` and `generate`."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, max_length: int, batch_tokens: int):
        """Take a model made ready, and the most tokens it reads at once and in a batch."""
        super().__init__()
        self.scorer, self.text_tokenizer = scorer, tokenizer
        self.max_length, self.batch_tokens = max_length, batch_tokens

    @property
    def eot_token_id(self) -> int:
        """The id before a text that has nothing before it."""
        return self.text_tokenizer.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text; unlike in our data, <|endoftext|> in it is that token."""
        first, *others = [self.text_tokenizer.encode(s).tolist() for s in string.split(END_OF_TEXT)]
        return first + [i for piece in others for i in (self.eot_token_id, *piece)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple]:
        """Return (log-probability, whether it is the likeliest) of each request's continuation."""
        # The harness turns text into tokens, by its own rules, without a bar for it.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False) -> list:
        pairs = [(context or [self.eot_token_id], ending) for _, context, ending in requests]
        shared, places = share_contexts(pairs, self.max_length)
        scores = self._score("loglikelihood", shared)
        return [(float(scores[i].logprobs[j]), bool(scores[i].greedy[j])) for i, j in places]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text; that of an empty one is 0."""
        start = np.array([self.eot_token_id])
        texts = [np.array(self.tok_encode(request.args[0]), np.int64) for request in requests]
        scores = self._score("texts", [Request(start, (text,)) for text in texts if len(text)])
        found = iter(scores)
        return [float(next(found).logprobs[0]) if len(text) else 0.0 for text in texts]

    def _score(self, name: str, requests: list[Request]) -> list[Scores]:
        info, vocab_size = self.scorer.info, self.scorer.model.config.vocab_size
        few_shapes = self.scorer.few_shapes
        laid_out = plan(requests, self.max_length, self.batch_tokens, vocab_size, few_shapes)
        with EvaluationBar(name, len(requests), "request", not info.is_main) as bar:

            def progress(done: list[int], scores: list[Scores]) -> bool:
                bar.update(min(len(done) * info.world_size, bar.total - bar.n))
                return False

            return self.scorer.score(laid_out, on_progress=progress)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt, up to the first string that ends it.

        As in the harness, a long prompt loses its beginning, so that the model reads all of what it
        writes. Raises UserError when that leaves none of it, and for a way to choose tokens that
        `generate` does not have.
        """
        info = self.scorer.info
        mine = range(info.rank, len(requests), info.world_size)
        texts = {}
        with EvaluationBar("texts", len(mine), "request", not info.is_main) as bar:
            for i in mine:
                texts[i] = self._write(*requests[i].args, seed=i)
                bar.update()
        parts = [texts] * info.world_size
        if info.world_size > 1:
            dist.all_gather_object(parts, texts)
        return [parts[i % info.world_size][i] for i in range(len(requests))]

    def _write(self, prompt: str, options: dict[str, Any], seed: int) -> str:
        """Return the text after one prompt; `options` are a task's generation_kwargs."""
        options, stops = generation_options(options)
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"The task asks for up to {options['max_gen_toks']} new tokens, which leaves no "
                f"room for a prompt in the {self.max_length} tokens that the model reads at once."
            )
        ids = (self.tok_encode(prompt) or [self.eot_token_id])[-room:]
        steps = generate(
            self.scorer.model,
            torch.tensor([ids]),
            options["max_gen_toks"],
            options["temperature"],
            options.get("top_k") or None,
            options.get("top_p"),
            seed,
            self.eot_token_id,
        )
        written, text = [], ""
        with autocast(self.scorer.info.device, self.scorer.dtype):
            for (token,) in steps:
                if token == self.eot_token_id:
                    break
                written.append(int(token))
                text = self.text_tokenizer.decode(written)
                if any(stop in text for stop in stops):
                    break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


def as_language_model(
    scorer: Scorer, tokenizer: Tokenizer, max_length: int, batch_tokens: int
) -> Any:
    """Return a model as an `lm_eval.api.model.LM`, for `run_harness` or the harness's own calls.

    It reads at most `max_length` tokens at once and about `batch_tokens` in a batch.
    """
    from lm_eval.api.model import TemplateLM

    # The base class brings the harness's rules for what is context and what continuation. It is
    # named only here because the package may be absent.
    class OurLanguageModel(Answers, TemplateLM):
        pass

    return OurLanguageModel(scorer, tokenizer, max_length, batch_tokens)


def share_contexts(
    pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> tuple[list[Request], list[tuple[int, int]]]:
    """Return requests for (context, ending) pairs of ids, and where each pair is in them.

    A place is (index of the request, index of the ending). Pairs of one context share a request, as
    long as it is no longer than what the model reads at once. Raises UserError when an ending has
    no tokens.
    """
    groups: list[tuple[tuple[int, ...], list[list[int]]]] = []
    newest: dict[tuple[int, ...], tuple[int, int]] = {}
    places = []
    for context, ending in pairs:
        if not ending:
            raise UserError(
                "A continuation of the task has no tokens of its own: it is empty, or merges with "
                "the end of its context."
            )
        key, more = tuple(context), len(ending) - 1
        i, length = newest.get(key, (0, max_length + 1))
        if length + more > max_length:
            i, length = len(groups), len(key)
            groups.append((key, []))
        newest[key] = i, length + more
        places.append((i, len(groups[i][1])))
        groups[i][1].append(ending)
    requests = [
        Request(np.array(context, np.int64), tuple(np.array(e, np.int64) for e in endings))
        for context, endings in groups
    ]
    return requests, places


def generation_options(asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a task's generation_kwargs, made complete, and the strings that end a text.

    Raises UserError for what `generate` cannot do, such as a search with several beams.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(asked, NEW_TOKENS)
    for name, value in options.items():
        if name not in GENERATION_OPTIONS and value not in SWITCHED_OFF:
            raise UserError(
                f"The task generates with {name} = {value!r}, which this project does not offer."
            )
    options["temperature"] = float(options.get("temperature", 0.0))
    return options, [stop for stop in (*options["until"], END_OF_TEXT) if stop]


def load_tasks(names: str, info: DistInfo) -> dict[str, Any]:
    """Return the harness's tasks and groups of tasks, by their names with commas between them.

    A name may hold * for any characters. Raises UserError when the package is missing, for unknown
    names, and when a task's data is neither in the cache nor to be had, without long attempts.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install lm_eval.")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError("--lm-eval names no task; try --lm-eval hellaswag,lambada_openai.")
    _check_hub()
    with quiet(info):
        from lm_eval.tasks import TaskManager

        # This reads ten thousand small files, which takes a while.
        manager = TaskManager()
        matches = []
        for name in wanted:
            if not manager.match_tasks([name]):
                check_name(name, manager.all_tasks, "task of lm-evaluation-harness")
            matches += manager.match_tasks([name])
        # One process fetches the data, and the others find it in the cache.
        tasks = _load(manager, matches) if info.is_main else None
        barrier()
        return tasks or _load(manager, matches)


def _load(manager: Any, names: list[str]) -> dict[str, Any]:
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    # Each of some thousand tasks fails in its own way; for the reader they are all one.
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"lm-evaluation-harness could not load {', '.join(names)} ({reason}). Tasks fetch "
            "their data from the Hugging Face hub once and keep it in the cache; give the command "
            "once where the hub can be reached."
        ) from error
    for task in loaded["tasks"].values():
        # Examples before the question: as many as the task says, chosen as the harness chooses.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _check_hub(seconds: float = 5) -> None:
    """Keep to the local cache if the hub does not answer, rather than try it again and again."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if "HF_HUB_OFFLINE" not in os.environ:
        try:
            urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=seconds)
        except urllib.error.HTTPError:
            # It answers, and that is enough.
            return
        except (OSError, ValueError):
            # The hub's client reads this when it is imported, which is yet to come.
            os.environ["HF_HUB_OFFLINE"] = "1"


@contextlib.contextmanager
def quiet(info: DistInfo) -> Iterator[None]:
    """Silence what the harness says besides bars and errors, and on all processes but one these."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not info.is_main:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def run_harness(
    model: Any, tasks: dict[str, Any], limit: int | None = None, samples: bool = False
) -> dict[str, Any]:
    """Return the harness's results of a model from `as_language_model` on what `load_tasks` gave.

    `limit` takes the first examples of each task; `samples` adds all answers. The results are the
    same on every process.
    """
    from lm_eval import evaluate

    with quiet(model.scorer.info):
        return evaluate(model, tasks, limit=limit, log_samples=samples, bootstrap_iters=BOOTSTRAPS)


def results_table(results: dict[str, Any]) -> str:
    """Return the harness's own table of results, and that of its groups where it has any."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, kind) for kind in ("results", "groups") if kind in results)


def kept_results(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is worth keeping of each task's and each group's results, by its name."""
    from importlib.metadata import version

    kept = {}
    for name, found in {**results["results"], **results.get("groups", {})}.items():
        metrics = {
            # The name of the filter that an answer went through; most tasks have none.
            key.removesuffix(",none"): value
            for key, value in found.items()
            if isinstance(value, int | float) and key not in ("sample_len",)
        }
        kept[name] = {
            "metrics": metrics,
            "examples": found.get("sample_len"),
            "shots": results["n-shot"].get(name),
            "task_version": results["versions"].get(name),
            "lm_eval": version("lm_eval"),
        }
    return kept
