"""One run of this project, made by transformers.Trainer and Accelerate instead of our loop.

Everything that decides the losses is ours: initial weights, sequences and their order, what decays,
the rate of each step. The loop, the model, the loss, the optimizer's step, accumulation, clipping
and mixed precision are theirs, and so is the sharing among processes: DDP under torchrun, whatever
its configuration says (DeepSpeed, say) under accelerate launch.
"""

import importlib.metadata
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from bench.train_step import transformers_model
from config import Config, UserError
from corpus.shards import find_data, manifest_sha256
from fineweb import FineWebEdu, load_batch, validation_batches
from hf_layouts import to_transformers
from hf_tokenizer import tokenizer_files
from loss import IGNORE_INDEX
from model import GPT
from tqdm_bars import TrainingBar
from training.distributed import (
    DistInfo,
    all_reduce_sum,
    autocast,
    choose_device,
    peak_flops,
    pick_dtype,
)
from training.logger import Logger, append_environment, create_run
from training.optim import schedule
from utils import write_atomically


def train_with_trainer(config: Config) -> None:
    """Train as `config` says, with its micro-batch and number of steps; leave a run directory.

    The trained model is in its hf/, with its tokenizer. Raises UserError when there is no such data
    or the run cannot be written.
    """
    data, val_data = (
        FineWebEdu(find_data(config.data), split, config.model.block_size)
        for split in ("train", "val")
    )
    run = Path(config.train.runs_dir) / config.name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = Peer(config, run, SequencesInOrder(data, config), val_data)
    if peer.info.is_main:
        create_run(run, config)
        peer.logger = Logger(run, config, 0)
        append_environment(run, 0, _facts(peer))
    peer.evaluate()
    peer.bar.start()
    peer.train()
    if peer.evaluated_at < config.train.steps:
        peer.evaluate()
    peer.bar.close()
    if peer.info.is_main:
        peer.accelerator.unwrap_model(peer.model).save_pretrained(run / "hf")
        files = tokenizer_files(data.shards.tokenizer, config.model.block_size)
        for name, text in files.items():
            write_atomically(run / "hf" / name, text.encode())
    if dist.is_initialized():
        dist.barrier()


class SequencesInOrder(Dataset):
    """The sequences of all steps one after another, for a sampler that takes them in turn."""

    def __init__(self, data: FineWebEdu, config: Config):
        self.data, self.config = data, config
        self.per_step = config.sequences_per_step
        self._step, self._sequences = 0, torch.empty(0)

    def __len__(self) -> int:
        return self.config.train.steps * self.per_step

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sequence `index` of the run as keyword arguments of GPT2LMHeadModel, (T,) each."""
        step, place = divmod(index, self.per_step)
        if step + 1 != self._step:
            self._step, self._sequences = (
                step + 1,
                load_batch(self.data, self.config, step + 1, 0, 1).tokens,
            )
        tokens = self._sequences[place]
        return labelled(tokens[:-1], tokens[1:])


def labelled(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return keyword arguments with which GPT2LMHeadModel's loss is the mean over all targets.

    From labels alone it would predict T - 1 tokens, each from those before it in the same sequence.
    """
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


class Peer(Trainer):
    """Trainer with our schedule and validation, that writes metrics.jsonl as our loop does."""

    def __init__(self, config: Config, run: Path, data: SequencesInOrder, val_data: FineWebEdu):
        self.config, self.run, self.val_data = config, run, val_data
        self.evaluated_at = -1
        args = arguments(config, run)
        if args.n_gpu > 1:
            raise UserError(
                f"Trainer would share one process among {args.n_gpu} GPUs; start it by torchrun "
                f"--nproc_per_node={args.n_gpu} -m bench.hf_trainer."
            )
        self.info = DistInfo(
            args.process_index, args.local_process_index, args.world_size, args.device
        )
        self.dtype = pick_dtype(config.train.dtype, args.device)
        peak = peak_flops(args.device)
        self.bar = TrainingBar(
            *(0, config.train.steps, config.train.batch_tokens),
            peak * args.world_size / config.model.flops_per_token if peak else None,
            disable=not self.info.is_main,
        )
        super().__init__(initial_model(config), args, train_dataset=data, eval_dataset=val_data)
        # Our bar says the same.
        self.remove_callback(PrinterCallback)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return our schedule; in theirs, the first step of a warm-up has a rate of 0."""
        total, optim = self.config.train.steps, self.config.optim
        if self.lr_scheduler is None:
            # Called with the number of steps made, after the last one too.
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda done: schedule(min(done + 1, total), total, optim),
            )
        return self.lr_scheduler

    def log(self, logs_of_step: dict[str, float], start_time: float | None = None) -> None:
        """Write the train line of a step."""
        super().log(logs_of_step, start_time)
        if "loss" not in logs_of_step:
            return
        self.bar.update(logs_of_step["loss"])
        if self.info.is_main:
            line = {
                "kind": "train",
                "step": self.state.global_step,
                "tokens": self.state.global_step * self.config.train.batch_tokens,
                "loss": logs_of_step["loss"],
                "lr": logs_of_step["learning_rate"],
                "grad_norm": logs_of_step["grad_norm"],
                "tokens_per_second": self.bar.tokens_per_second,
                "mfu": self.bar.mfu,
                "seconds": self.bar.seconds,
            }
            self.logger.log(line)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate on the tokens of every validation of ours, and write the val line."""
        self.evaluated_at = self.state.global_step
        with self.bar.paused():
            nats, tokens, text_bytes = self.validate()
        line = {"kind": "val", "step": self.evaluated_at}
        line["tokens"] = self.evaluated_at * self.config.train.batch_tokens
        line["loss"] = nats / tokens
        if text_bytes:
            line["bits_per_byte"] = nats / math.log(2) / text_bytes
        self.bar.write(f"step {self.evaluated_at:>6}: validation loss {nats / tokens:.4f}")
        if self.info.is_main:
            self.logger.log(line)
        metrics = {"eval_loss": nats / tokens}
        # Otherwise it would be asked for again.
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def validate(self) -> tuple[float, float, float]:
        """Return nats, tokens and bytes of text of the validation tokens, over all processes."""
        token_bytes = self.val_data.shards.tokenizer.token_bytes()
        sums, device = torch.zeros(3, dtype=torch.float64), self.args.device
        self.model.eval()
        for inputs, targets in validation_batches(
            self.val_data, self.config, self.info.rank, self.info.world_size
        ):
            with autocast(device, self.dtype):
                loss = self.model(**labelled(inputs.to(device), targets.to(device))).loss
            scored = targets[targets != IGNORE_INDEX]
            counts = len(scored), token_bytes[scored.numpy()].sum()
            sums += torch.tensor([loss.item() * counts[0], *counts], dtype=torch.float64)
        self.model.train()
        return tuple(all_reduce_sum(sums.to(device)).tolist())


def initial_model(config: Config) -> GPT2LMHeadModel:
    """Return GPT-2 of transformers with the weights our run begins with."""
    torch.manual_seed(config.train.seed)
    weights = to_transformers(GPT(config.model).state_dict(), config.model)
    model = transformers_model(config.model)
    # Their head is the embedding, under a second name.
    model.load_state_dict({"lm_head.weight": weights["transformer.wte.weight"], **weights})
    return model


def arguments(config: Config, run: Path) -> TrainingArguments:
    """Return what our config is in theirs; joins the other processes, where there are any."""
    train, optim = config.train, config.optim
    rank, local_rank, size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    info = choose_device(DistInfo(rank, local_rank, size, torch.device("cpu")), train.device)
    device = info.device
    on_cpu = device.type == "cpu"
    return TrainingArguments(
        output_dir=str(run),
        max_steps=train.steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=config.accumulation_steps(size),
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_epsilon=optim.eps,
        max_grad_norm=optim.grad_clip,
        bf16=pick_dtype(train.dtype, device) == torch.bfloat16,
        torch_compile=train.compile == "on",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and size > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        # The labels that are already shifted are no argument of the model by name.
        remove_unused_columns=False,
        eval_strategy="steps" if train.val_interval else "no",
        eval_steps=train.val_interval or None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=train.seed,
    )


def _facts(peer: Peer) -> dict[str, Any]:
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "accelerate")
    ]
    on_gpu = peer.args.device.type == "cuda"
    return {
        "trainer": ", ".join(versions),
        "distributed": peer.accelerator.distributed_type.value,
        "device": torch.cuda.get_device_name(peer.args.device) if on_gpu else "cpu",
        "dtype": str(peer.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "world_size": peer.info.world_size,
        "micro_batch_size": peer.args.per_device_train_batch_size,
        "accumulation": peer.args.gradient_accumulation_steps,
        "data_sha256": manifest_sha256(peer.val_data.shards.directory),
    }
