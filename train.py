"""Training: set-up, then one loop, from top to bottom: validate, save, score and sample, step.

The position of a run is (config, step): learning rate, data order, dropout noise and what is due
are functions of the two, so a run that was stopped and resumed is the run that was not. "Step k" is
"after k optimizer steps"; the loop begins at 0, so the untrained weights are measured, too.

As a script, the preflight: torchrun --standalone --nproc_per_node=8 train.py
"""

import contextlib
import gc
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from config import Config, TrainConfig, UserError, changed_fields, from_json, to_json
from corpus.shards import find_data, manifest_sha256
from corpus.tokenizer import can_encode
from evals.in_loop import open_benchmarks, try_evaluate
from evaluation import describe, headline
from fineweb import FineWebEdu, load_batch, prefetch, sequence_indices, validation_batches
from loss import IGNORE_INDEX
from modern import build_model
from recipes import PROMPTS
from sample import continuations, load
from scoring import Scorer
from tqdm_bars import EvaluationBar, TrainingBar
from training import checkpoint, distributed
from training.attention import attention_by
from training.distributed import DistInfo, all_reduce_any, autocast
from training.logger import Logger, append_environment
from training.metrics import StepMetrics, build_scaler, check_finite, update_scale
from training.micro_batch import fit_micro_batch
from training.optim import build_optimizers, lr_at, set_lr
from training.verification import Verification
from utils import run_script

# A batch system signals torchrun and its processes, and torchrun passes that on to its processes.
SAME_REQUEST_SECONDS = 5.0


def train(
    config: Config, run: Path, info: DistInfo, resume_from=None, tries_micro_batch: bool = False
) -> tuple[int, bool]:
    """Train to the last step, or train.stop_at_step; return the step reached, and whether it is it.

    A signal ends it before, with a checkpoint. Raises UserError, before a checkpoint holds them,
    when a loss or gradient is not finite.
    """
    with StopSignal() as stop, contextlib.ExitStack() as stack:
        t = Trainer(config, run, info, stop, resume_from, tries_micro_batch)
        stack.push(t.close)
        config, c, model, bar = t.config, t.config.train, t.model, t.bar
        per_epoch = len(t.data) // config.sequences_per_step
        # A GPU's loss is read one step late: waiting for it would leave the GPU idle meanwhile. Not
        # in float16, where whether the weights change depends on the gradient norm.
        late = 1 if info.device.type == "cuda" and t.dtype != torch.float16 else 0
        batches = prefetch(t.data, config, info, t.start + 1, t.last)
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(attention_by(c.attention, info.device))
        recorded = distributed.broadcast(t.logger.recorded(t.start))  # of a resumed run's step
        gc.freeze()  # modules and code are 10^5 objects that every collection would look through
        bar.start()
        for step in range(t.start, t.last + 1):
            t.whole_step = step
            first, at_end = step == t.start, step == t.last
            saves = every(c.checkpoint_interval, step) or step % per_epoch == 0 or at_end
            saves = step > 0 and saves
            validates = saves or step == 0 or every(c.val_interval, step)
            scores = t.benchmarks and (every(c.eval_interval, step) or at_end)
            samples = c.sample_tokens > 0 and (saves or step == 0)
            if first:
                # The checkpoint that is resumed is there already; one that a signal left lacks its
                # validation loss, and is written again with it.
                validates = validates and "val" not in recorded
                saves = saves and validates
                samples = samples and "sample" not in recorded
            saved = False
            if validates or saves or scores or samples or at_end:
                t.read_metrics()
                distributed.synchronize(info.device)
                with bar.paused():
                    # 1. Validate: the same tokens every time, in every run.
                    if validates and not t.stopping:
                        t.validate(step)
                    # 2. Save, before anything that may fail for reasons of its own.
                    if saves and not t.stopping:
                        t.save(step)
                        saved = True
                    # 3. Score and sample: what raises here costs a line, never the run.
                    if (scores or samples) and not t.stopping:
                        t.score_and_sample(step, scores, samples, recorded if first else set())
            if t.stopping:  # Ctrl-C, SIGTERM or SIGHUP, on any rank
                t.read_metrics()
                if not saved and not first:
                    t.measured |= {"val_loss": None, "bits_per_byte": None}
                    with bar.paused():
                        t.save(step)
            if t.stopping or at_end:
                return step, not t.stopping

            # 4. One optimizer step.
            if t.verification is not None:  # a thread reads every byte of the data
                t.verification.check()
            batch = next(batches)  # this rank's part of the global batch of step + 1
            set_lr(t.optimizers, step + 1, c.steps, config.optim)
            losses, sequence_losses = [], []
            micro_batches = batch.tokens.split(c.micro_batch_size)  # (micro-batch, T + 1) each
            for i, tokens in enumerate(micro_batches):
                t.seed_dropout(step + 1, i)
                # DDP averages gradients over ranks in the backward pass of the last micro-batch,
                # and decides so in the forward pass; FSDP does in every one.
                accumulates = t.is_ddp and i < len(micro_batches) - 1
                with t.forward.no_sync() if accumulates else contextlib.nullcontext():
                    x, y = tokens[:, :-1], tokens[:, 1:]
                    with autocast(info.device, t.dtype):
                        token_losses, loss = t.forward(x, y, c.log_sequence_losses)
                    # Equal micro-batches, so this adds up to the mean over the global batch.
                    t.scaler.scale(loss / len(micro_batches)).backward()
                losses.append(loss.detach())
                if c.log_sequence_losses:
                    sequence_losses.append(token_losses.mean(1))
            for optimizer in t.optimizers:
                t.scaler.unscale_(optimizer)
            clip = config.optim.grad_clip or math.inf
            norm = distributed.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), clip))
            asked = stop.requested
            metrics = StepMetrics.collect(step + 1, losses, norm, asked, info, sequence_losses)
            # In float16 gradients may overflow: that step is left out, and the scale halved.
            if late or t.is_finite(metrics):
                t.whole_step = None
                for optimizer in t.optimizers:
                    t.scaler.step(optimizer)
            model.zero_grad()
            update_scale(t.scaler)
            t.pending.append(metrics)
            t.read_metrics(keep=late)
    raise AssertionError("the loop returns")


class Trainer:
    """What one process holds while it trains; all ranks call its methods together."""

    def __init__(self, config: Config, run: Path, info: DistInfo, stop, resume_from, tries_size):
        """Open the data, build model and optimizers, and load them from `resume_from` if given."""
        c, device = config.train, info.device
        self.run, self.info, self.stop = run, info, stop
        self.directory = find_data(config.data)
        self.data = FineWebEdu(self.directory, "train", config.model.block_size)
        self.val_data = FineWebEdu(self.directory, "val", config.model.block_size)
        self.tokenizer = self.data.shards.tokenizer
        state = {"step": 0}
        if resume_from:
            state = checkpoint.read_state(resume_from)
            before = from_json(json.dumps(state["config"]), str(resume_from))
            if changed := changed_fields(before, config):
                raise UserError(f"{resume_from} has another config ({'; '.join(changed)}).")
            if state["data_sha256"] != manifest_sha256(self.directory):
                raise UserError(
                    f"{self.directory} is not the data {resume_from} was trained on; restore that."
                )
        self.start = state["step"]
        last = c.steps if c.stop_at_step is None else min(c.stop_at_step, c.steps)
        self.last = max(last, self.start)
        self.dtype = distributed.pick_dtype(c.dtype, device)
        torch.set_float32_matmul_precision("high" if c.dtype == "tf32" else "highest")

        # Weights are drawn on the CPU, so that a seed means the same on every device.
        torch.manual_seed(c.seed)
        self.model = model = build_model(config.model)
        model.gradient_checkpointing = c.gradient_checkpointing
        if resume_from:
            checkpoint.load_model(resume_from, model)
        elif config.init_from:
            weights = load(config.init_from, c.runs_dir)[0].state_dict()
            if "wpe.weight" in weights:  # a shorter context has the first positions
                weights["wpe.weight"] = weights["wpe.weight"][: config.model.block_size]
            model.load_state_dict(weights)
        compiles = c.compile == "on" or (c.compile == "auto" and device.type == "cuda")
        if c.parallel == "fsdp" and info.world_size > 1:
            # Each block by itself, since the hooks that gather its weights lie around it.
            for block in model.h if compiles else ():
                block.compile(dynamic=False)
            distributed.apply_fsdp(model, info)
            self.forward = model
        else:
            model.to(device)
            if compiles:
                model.compile(dynamic=False)
            self.forward = distributed.wrap_ddp(model, info)
        self.is_ddp = self.forward is not model
        # FSDP replaces the parameters, so whatever refers to them comes after it.
        self.optimizers = build_optimizers(model, config.optim, self.dtype)
        if resume_from:
            checkpoint.load_optimizers(resume_from, model, self.optimizers)
        self.scaler = build_scaler(c, self.dtype, device, state.get("grad_scaler"))
        if compiles or tries_size:
            # Through what training calls, and with real data.
            tokens = load_batch(self.data, config, 1, info.rank, info.world_size).tokens
            config = fit_micro_batch(
                config, model, self.forward, tokens, info, self.dtype, tries_size, not resume_from
            )
        self.config = config

        # The record: on resume, what comes after the checkpoint is dropped.
        self.measured = {key: state.get(key) for key in ("train_loss", "val_loss", "bits_per_byte")}
        self.earlier_seconds = state.get("seconds", 0.0)
        self.pending: list[StepMetrics] = []  # of steps whose metrics are still to be read
        self.stopping = False  # all ranks agree on it
        self.whole_step: int | None = None  # the step the weights are of; None inside the optimizer
        self.logger = Logger(run, config, self.start, info.is_main)
        self.verification = None
        if info.is_main:
            checkpoint.remove_leftovers(run)
            (run / "non_finite.json").unlink(missing_ok=True)
            gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            facts = {"device": gpu, "dtype": str(self.dtype), "threads": torch.get_num_threads()}
            facts |= {"world_size": info.world_size, "data_sha256": manifest_sha256(self.directory)}
            for name in ("attention", "parallel", "micro_batch_size"):
                facts[name] = getattr(config.train, name)
            if told := append_environment(run, self.start, facts):
                print(told, flush=True)
            self.verification = Verification(self.directory)
        self.scorer, self.benchmarks = None, []
        if c.eval_interval > 0:
            self.scorer = Scorer(model, info, self.dtype, c.compile)
            self.benchmarks = open_benchmarks(config, self.tokenizer, self.scorer, info)
        peak = distributed.peak_flops(device)
        peak = peak * info.world_size / config.model.flops_per_token if peak else None
        self.bar = TrainingBar(self.start, self.last, c.batch_tokens, peak, not info.is_main)

    @property
    def seconds(self) -> float:
        """Seconds of training in the whole run so far, without validation and the like."""
        return self.earlier_seconds + self.bar.seconds

    def close(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """End; where no other rank is waited for, save what an unexpected error would lose."""
        unexpected = isinstance(error, Exception) and not isinstance(error, UserError)
        if unexpected and self.info.world_size == 1 and self.whole_step:
            with contextlib.suppress(Exception):
                self.measured |= {"val_loss": None, "bits_per_byte": None}
                self.save(self.whole_step)
        gc.unfreeze()
        self.bar.close()
        self.logger.close()
        if self.verification is not None:
            self.verification.close()

    def seed_dropout(self, step: int, micro_batch: int) -> None:
        """Make dropout noise a function of (config, step) and the place in the global batch."""
        m, c = self.config.model, self.config.train
        if max(m.dropout, m.attention_dropout or 0) > 0:
            share = self.config.sequences_per_rank(self.info.world_size)
            sequence = self.info.rank * share + micro_batch * c.micro_batch_size
            key = np.random.SeedSequence([c.seed, step, sequence])
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def is_finite(self, metrics: StepMetrics) -> bool:
        """Say whether loss and norm are; raises UserError where that ends the run."""
        scales = self.scaler.is_enabled()
        check_finite(metrics, self.config, self.run, len(self.data), self.info, scales)
        return math.isfinite(metrics.read()[1])

    def read_metrics(self, keep: int = 0) -> None:
        """Record the metrics of all steps but the last `keep`; sets `stopping`."""
        c = self.config.train
        while len(self.pending) > keep:
            metrics = self.pending.pop(0)
            self.is_finite(metrics)
            (loss, norm, asked), step = metrics.read(), metrics.step
            self.stopping = self.stopping or asked
            if metrics.sequence_losses is not None:
                indices = sequence_indices(self.config, step, len(self.data))
                self.logger.sequence_losses(step, indices, metrics.sequence_losses.cpu().numpy())
            if step % c.log_interval and step != self.last:
                self.bar.update()
                continue
            self.bar.update(loss)
            lr = lr_at(step, c.steps, self.config.optim)
            self.measured |= {"train_loss": loss, "lr": lr, "grad_norm": norm}
            line = {"kind": "train", "step": step, "tokens": step * c.batch_tokens, "loss": loss}
            # A norm that overflowed float16 has no JSON.
            line |= {"lr": lr, "grad_norm": norm if math.isfinite(norm) else None}
            line |= {"tokens_per_second": self.bar.tokens_per_second, "mfu": self.bar.mfu}
            line["seconds"] = self.seconds
            if self.scaler.is_enabled():
                line["loss_scale"] = self.scaler.get_scale()
            self.logger.log(line)

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Log the mean loss over the first val_tokens tokens of the validation split.

        Ranks share the tokens and add up. A request to stop cuts it short and sets `stopping`.
        """
        c, info, model = self.config.train, self.info, self.model
        token_bytes = self.tokenizer.token_bytes()
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes of text
        batches = validation_batches(self.val_data, self.config, info.rank, info.world_size)
        n_tokens = min(c.val_tokens, len(self.val_data) * self.config.model.block_size)
        model.eval()
        with EvaluationBar("validating", n_tokens, "tok", disable=not info.is_main) as bar:
            for inputs, targets in batches:
                self.stopping = all_reduce_any(self.stop.requested)
                if self.stopping:
                    break
                with autocast(info.device, self.dtype):
                    _, loss = model(inputs.to(info.device), targets.to(info.device))
                scored = targets[targets != IGNORE_INDEX]
                text_bytes = int(token_bytes[scored.numpy()].sum())
                n = len(scored)
                sums += torch.tensor([loss.item() * n, n, text_bytes], dtype=torch.float64)
                bar.update(n * info.world_size)
        model.train()
        if hasattr(model, "reshard"):
            model.reshard()  # FSDP keeps gathered what no backward pass follows
        if self.stopping:
            return
        nats, tokens, text_bytes = distributed.all_reduce_sum(sums).tolist()
        loss = nats / tokens
        if not math.isfinite(loss):
            raise UserError(
                f"After step {step} the validation loss is {loss:g}: the weights have diverged, so "
                "no checkpoint is made of them. Start again with a lower --optim.lr."
            )
        per_byte = nats / math.log(2) / text_bytes if text_bytes else None
        self.measured |= {"val_loss": loss, "bits_per_byte": per_byte}
        line = {"kind": "val", "step": step, "tokens": step * c.batch_tokens, "loss": loss}
        told = f"step {step:>6}: val loss {loss:.4f}"
        if per_byte is not None:
            line["bits_per_byte"] = per_byte
            told += f", {per_byte:.3f} bits per byte"
        if (lr := self.measured.get("lr")) is not None:
            told += f" | train loss {self.measured['train_loss']:.4f}, lr {lr:.2e}, "
            told += f"norm {self.measured['grad_norm']:.2f}, {self.seconds:,.0f} s"
        self.bar.write(told)
        self.logger.log(line)

    def save(self, step: int) -> None:
        """Write a checkpoint, from all ranks but by one, and delete what need not be kept."""
        state = {key: self.measured[key] for key in ("train_loss", "val_loss", "bits_per_byte")}
        state |= {
            "config": json.loads(to_json(self.config)),
            "data_sha256": manifest_sha256(self.directory),
            "seconds": self.seconds,
            "grad_scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
        }
        self.logger.sync()
        checkpoint.save(self.run, step, self.model, self.optimizers, state, self.info.is_main)
        if self.info.is_main:
            checkpoint.prune(self.run, self.config.train.keep_checkpoints, step)
        distributed.barrier()

    def score_and_sample(self, step: int, scores: bool, samples: bool, recorded: set[str]) -> None:
        """Log benchmark scores and samples, but those in `recorded`; a failure costs a line.

        A benchmark that failed on any rank is dropped on all. A request to stop sets `stopping`.
        """
        c, model, scorer = self.config.train, distributed.unsharded_copy(self.model), self.scorer
        if scores and model is not self.model:
            scorer = Scorer(model, self.info, self.dtype, c.compile)
        for benchmark in list(self.benchmarks) if scores else ():
            task, layout = benchmark
            if f"eval/{task.name}" in recorded:
                continue
            result, why = try_evaluate(scorer, task, layout, lambda: self.stop.requested)
            if why:
                self.bar.write(f"step {step:>6}: {task.name} is no longer scored ({why})")
                self.benchmarks.remove(benchmark)
                continue
            if result is None:
                break
            self.bar.write(f"step {step:>6}: {describe(task, result.metrics, c.eval_limit)}")
            if benchmark is self.benchmarks[0]:  # the one to watch
                self.bar.show_score(f"{task.name} {headline(task, result.metrics)}")
            line = {"kind": "eval", "step": step, "tokens": step * c.batch_tokens}
            line |= {"task": task.name, "examples": result.examples, **result.metrics}
            self.logger.log(line | {"seconds": result.seconds})
        if samples and self.info.is_main and not self.stop.requested:
            try:
                prompts = [p for p in PROMPTS if can_encode(self.tokenizer, p)]
                with autocast(self.info.device, self.dtype):
                    texts = continuations(
                        model, self.tokenizer, prompts, c.sample_tokens, c.seed,
                        stop=lambda: self.stop.requested,
                    )  # fmt: skip
                if not self.stop.requested:
                    self.logger.samples(step, prompts, texts)
            except Exception as error:
                self.bar.write(f"step {step:>6}: no samples ({type(error).__name__}: {error})")
        self.stopping = all_reduce_any(self.stop.requested)


class StopSignal:
    """Ctrl-C, SIGTERM and SIGHUP (a lost terminal) set `requested`: the loop saves and leaves.

    What follows within 5 s is the same request, as Slurm and torchrun repeat it; a later signal
    ends the process at once. Python runs handlers between instructions: a collective returns
    first, or ends after --train.timeout.
    """

    def __init__(self) -> None:
        self.requested, self._since, self._before = False, 0.0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # under nohup SIGHUP is ignored, and stays so
                if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            with contextlib.suppress(OSError):  # not print, which may be in the middle of a line
                os.write(2, b"\nstopping: saves after this step; a second signal ends at once\n")
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def every(interval: int, step: int) -> bool:
    """Say whether something with this interval is due; 0 is never."""
    return interval > 0 and step % interval == 0


def main() -> None:
    """Check devices, all-reduce, compiler and one training step on every process."""
    from training.preflight import check

    with distributed.init_distributed(TrainConfig.timeout) as info:
        check(distributed.choose_device(info, "auto"))


if __name__ == "__main__":
    run_script(main)
