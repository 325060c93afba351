"""What is due between updates: a validation, benchmarks, samples, a checkpoint."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import logs
from config import UserError, identity_digest, windows_per_update
from cross_entropy import IGNORED
from devices import autocast, synchronize
from distributed import World, any_over_ranks, barrier, sum_over_ranks
from evaluation import evaluate, headline
from fineweb import validation_batch_count, validation_batches
from in_loop_evals import sentence
from manifests import manifest_digest
from model import GPT
from recipes import PROMPTS
from sample import continuations
from scoring import Scorer
from sharding import put_away, whole_model
from tokenizer import can_encode
from tqdm_bars import EvaluationBar
from trainer import Trainer, record


class Due(NamedTuple):
    """What is to be done after an update."""

    validates: bool = False
    scores: bool = False
    samples: bool = False
    saves: bool = False


NOTHING = Due()


def what_is_due(trainer: Trainer, step: int) -> Due:
    """Return what is due after `step` updates, as the config and the length of an epoch say."""
    train = trainer.config.train
    epoch = len(trainer.data) // windows_per_update(trainer.config)
    saves = step > 0 and (_every(train.checkpoint_interval, step) or step % epoch == 0)
    saves = saves or step == trainer.last
    # At step 0 as at all multiples, and in the end.
    scores = _every(train.eval_interval, step) or step == trainer.last
    return Due(
        validates=saves or step == 0 or _every(train.val_interval, step),
        scores=scores and bool(trainer.benchmarks),
        samples=(saves or step == 0) and train.sample_tokens > 0,
        saves=saves and step > 0,
    )


def measure(trainer: Trainer, step: int, due: Due) -> None:
    """Do what is due after `step` updates: validate, score benchmarks, sample, save a checkpoint.

    A request to stop leaves it undone, for when the run is resumed.
    """
    synchronize(trainer.world.device)
    with trainer.bar.paused():
        if due.validates:
            record_validation(trainer, step)
        if (due.scores or due.samples) and not trainer.stopping:
            record_with_whole_model(trainer, step, due)
        if due.saves and not trainer.stopping:
            save_checkpoint(trainer, step)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def record_with_whole_model(trainer: Trainer, step: int, due: Due) -> None:
    """Do what calls a model in its own ways, and processes unequally often: scores and samples."""
    model = whole_model(trainer.model)
    if due.scores:
        record_scores(trainer, step, model)
    if due.samples and not trainer.stopping and trainer.world.is_main:
        write_samples(trainer, step, model)


def record_validation(trainer: Trainer, step: int) -> None:
    """Validate, write the val line and print it above the bar; raises UserError for nan or inf."""
    sums = validate(trainer)
    if trainer.stopping:
        return
    nats, tokens, text_bytes = sums
    loss = nats / tokens
    if not math.isfinite(loss):
        raise UserError(
            f"After update {step} the validation loss is {loss:g}: the weights have diverged, so "
            "no checkpoint is made of them. The ones before are good; start again with a lower "
            "--optim.lr."
        )
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else None
    trainer.losses |= {"val_loss": loss, "bits_per_byte": bits_per_byte}
    line = {"kind": "val", "step": step}
    line |= {"tokens": step * trainer.config.train.tokens_per_update, "loss": loss}
    if bits_per_byte is not None:
        line["bits_per_byte"] = bits_per_byte
    per_byte = f", {bits_per_byte:.3f} bits a byte" if bits_per_byte is not None else ""
    trainer.bar.write(f"step {step:>6}: validation loss {loss:.4f}{per_byte}")
    record(trainer, line)


def record_scores(trainer: Trainer, step: int, model: GPT) -> None:
    """Score the benchmarks, write an eval line each and print it above the bar.

    `model` is the trainer's, or a whole copy of it. A request to stop ends it, and sets `stopping`,
    without a line for what was not finished.
    """
    scorer = trainer.scorer
    if model is not trainer.model:
        scorer = Scorer(model, trainer.world, trainer.dtype, trainer.config.train.compile)
    for benchmark in trainer.benchmarks:
        task = benchmark.task
        result = evaluate(scorer, task, benchmark.plan, trainer.asked.is_set)
        trainer.stopping = result is None
        if trainer.stopping:
            return
        latest = {task.name: {"step": step, **result.metrics}}
        trainer.losses["scores"] = (trainer.losses["scores"] or {}) | latest
        trainer.bar.write(f"step {step:>6}: {sentence(benchmark, result.metrics)}")
        # The first benchmark is the one to watch.
        if benchmark is trainer.benchmarks[0]:
            trainer.bar.show_score(f"{task.name} {headline(task, result.metrics)}")
        line = {"kind": "eval", "step": step}
        line |= {"tokens": step * trainer.config.train.tokens_per_update, "task": task.name}
        line |= {"examples": result.examples, **result.metrics, "seconds": result.seconds}
        record(trainer, line)


@torch.no_grad()
def validate(trainer: Trainer) -> tuple[float, float, float]:
    """Return the nats, the tokens and the bytes of text of the validation tokens, over all ranks.

    Every validation of every run reads the same tokens; ranks share them and their sums are added.
    A request to stop cuts it short and sets `stopping`.
    """
    config, world, data = trainer.config, trainer.world, trainer.val_data
    token_bytes = data.stream.tokenizer.token_bytes()
    sums = torch.zeros(3, dtype=torch.float64)
    trainer.compiled.eval()
    batches = validation_batches(data, config, world)
    # The first process has as many batches as any; the others go round with it, to agree, and with
    # a batch of nothing where they have no more: under FSDP all call the model equally often.
    shape = (config.train.micro_batch, config.model.block_size)
    nothing = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    count = validation_batch_count(data, config, World(0, world.size, world.device))
    with EvaluationBar("validating", count, "batch", disable=not world.is_main) as bar:
        for _ in range(count):
            trainer.stopping = any_over_ranks(trainer.asked.is_set(), world)
            if trainer.stopping:
                break
            sums += _score(trainer, *next(batches, nothing), token_bytes)
            bar.update()
    trainer.compiled.train()
    put_away(trainer.model)
    # MPS has no float64, but then there is nobody to add up with.
    device = world.device if world.size > 1 else "cpu"
    return tuple(sum_over_ranks(sums.to(device)).tolist())


def _score(trainer: Trainer, inputs: Tensor, targets: Tensor, token_bytes: np.ndarray) -> Tensor:
    """Return the nats, the tokens and the bytes of text of one batch, float64 (3,)."""
    device = trainer.world.device
    scored = targets[targets != IGNORED]
    with autocast(device, trainer.dtype):
        _, mean = trainer.compiled(inputs.to(device), targets.to(device))
    text_bytes = token_bytes[scored.numpy()].sum()
    return torch.tensor([mean.item() * len(scored), len(scored), text_bytes], dtype=torch.float64)


def write_samples(trainer: Trainer, step: int, model: GPT) -> None:
    """Continue the fixed prompts with the trainer's model, or a whole copy, into samples.md."""
    train, tokenizer = trainer.config.train, trainer.data.stream.tokenizer
    prompts = [prompt for prompt in PROMPTS if can_encode(tokenizer, prompt)]
    with autocast(trainer.world.device, trainer.dtype):
        texts = continuations(model, tokenizer, prompts, train.sample_tokens, train.seed)
    logs.append_samples(trainer.run, step, prompts, texts)


def save_unmeasured(trainer: Trainer, step: int) -> None:
    """Save where a signal stopped the run; if a measurement is due, resuming begins with it."""
    trainer.losses |= {"val_loss": None, "bits_per_byte": None}
    with trainer.bar.paused():
        save_checkpoint(trainer, step)


def save_checkpoint(trainer: Trainer, step: int) -> None:
    """Save, from all processes but by one of them, and delete what need not be kept."""
    tokenizer, writes = trainer.data.stream.tokenizer, trainer.world.is_main
    state = {
        "config_digest": identity_digest(trainer.config),
        "data_manifest_sha256": manifest_digest(trainer.data.stream.directory),
        "seconds": trainer.seconds,
        "loss_scale": trainer.loss_scale.state() if trainer.loss_scale else None,
        "tokenizer": {
            "name": tokenizer.name,
            "alphabet": getattr(tokenizer, "alphabet", None),
        },
        **trainer.losses,
    }
    checkpoint.save(trainer.run, step, trainer.model, trainer.optimizers, state, writes)
    if writes:
        checkpoint.prune(trainer.run, trainer.config.train.keep_checkpoints, step)
    barrier()
