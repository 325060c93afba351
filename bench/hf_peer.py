"""One run of this project, made by transformers.Trainer and Accelerate instead of our loop.

Everything that decides the losses is ours: initial weights, windows and their order, what decays,
the rate of each update. The loop, the model, the loss, the optimizer's step, accumulation, clipping
and mixed precision are theirs, and so is the sharing among processes: DDP under torchrun, whatever
its configuration says (DeepSpeed, say) under accelerate launch.
"""

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import logs
from bench.train_step import transformers_model
from config import Config, UserError, accumulation_steps, windows_per_update
from counts import flops_per_token
from cross_entropy import IGNORED
from devices import autocast, peak_flops, pick_device, pick_dtype, share_cores
from distributed import World, barrier, sum_over_ranks
from files import write_atomically
from fineweb import FineWebEdu, inputs_and_targets, read_update, validation_batches
from hf_layouts import to_transformers
from hf_tokenizer import tokenizer_files
from manifests import find_data, manifest_digest
from model import GPT
from optim import schedule
from roll_call import rank_and_size
from tqdm_bars import TrainingBar

# What their loss leaves out.
THEIR_IGNORED = -100
ALONE = World(0, 1, torch.device("cpu"))


def train_with_trainer(config: Config) -> None:
    """Train as `config` says, with its micro-batch and number of updates; leave a run directory.

    The trained model is in its hf/, with its tokenizer. Raises UserError when there is no such data
    or the run cannot be written.
    """
    data, val_data = (
        FineWebEdu(find_data(config.data), split, config.model.block_size, config.train.rows)
        for split in ("train", "val")
    )
    run = Path(config.train.runs_dir) / config.name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = Peer(config, run, WindowsInOrder(data, config), val_data)
    if peer.world.is_main:
        logs.create_run(run, config)
        logs.write_environment(run, 0, _facts(peer))
    peer.evaluate()
    peer.bar.start()
    peer.train()
    if peer.evaluated_at < config.train.updates:
        peer.evaluate()
    peer.bar.close()
    if peer.world.is_main:
        peer.accelerator.unwrap_model(peer.model).save_pretrained(run / "hf")
        files = tokenizer_files(data.stream.tokenizer, config.model.block_size)
        for name, text in files.items():
            write_atomically(run / "hf" / name, text.encode())
    barrier()


class WindowsInOrder(Dataset):
    """The windows of all updates one after another, for a sampler that takes them in turn."""

    def __init__(self, data: FineWebEdu, config: Config):
        self.data, self.config = data, config
        self.per_update = windows_per_update(config)
        self._step, self._windows = 0, torch.empty(0)

    def __len__(self) -> int:
        return self.config.train.updates * self.per_update

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window `index` of the run as keyword arguments of GPT2LMHeadModel, (T,) each."""
        step, place = divmod(index, self.per_update)
        if step + 1 != self._step:
            self._step, self._windows = (
                step + 1,
                read_update(self.data, self.config, step + 1, ALONE),
            )
        inputs, targets = inputs_and_targets(self._windows[place, None])
        return labelled(inputs[0], targets[0])


def labelled(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return keyword arguments with which GPT2LMHeadModel's loss is the mean over all targets.

    From labels alone it would predict T - 1 tokens, each from those before it in the same window.
    """
    targets = targets.where(targets != IGNORED, THEIR_IGNORED)
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


class Peer(Trainer):
    """Trainer with our schedule and validation, that writes metrics.jsonl as our loop does."""

    def __init__(self, config: Config, run: Path, data: WindowsInOrder, val_data: FineWebEdu):
        self.config, self.run, self.val_data = config, run, val_data
        self.evaluated_at = -1
        args = arguments(config, run)
        if args.n_gpu > 1:
            raise UserError(
                f"Trainer would share one process among {args.n_gpu} GPUs; start it by torchrun "
                f"--nproc_per_node={args.n_gpu} -m bench.hf_trainer."
            )
        self.world = World(args.process_index, args.world_size, args.device)
        self.dtype = pick_dtype(config.train.dtype, args.device)
        peak = peak_flops(args.device)
        self.bar = TrainingBar(
            *(0, config.train.updates, config.train.tokens_per_update),
            peak * args.world_size / flops_per_token(config.model) if peak else None,
            disable=not self.world.is_main,
        )
        super().__init__(initial_model(config), args, train_dataset=data, eval_dataset=val_data)
        # Our bar says the same.
        self.remove_callback(PrinterCallback)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return our schedule; in theirs, the first update of a warm-up has a rate of 0."""
        total, optim = self.config.train.updates, self.config.optim
        if self.lr_scheduler is None:
            # Called with the number of updates made, after the last one too.
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda done: schedule(min(done + 1, total), total, optim),
            )
        return self.lr_scheduler

    def log(self, logs_of_update: dict[str, float], start_time: float | None = None) -> None:
        """Write the train line of an update."""
        super().log(logs_of_update, start_time)
        if "loss" not in logs_of_update:
            return
        self.bar.update(logs_of_update["loss"])
        if self.world.is_main:
            line = {
                "kind": "train",
                "step": self.state.global_step,
                "tokens": self.state.global_step * self.config.train.tokens_per_update,
                "loss": logs_of_update["loss"],
                "lr": logs_of_update["learning_rate"],
                "grad_norm": logs_of_update["grad_norm"],
                "tokens_per_second": self.bar.tokens_per_second,
                "mfu": self.bar.mfu,
                "seconds": self.bar.seconds,
            }
            logs.append_metrics(self.run, line)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate on the tokens of every validation of ours, and write the val line."""
        self.evaluated_at = self.state.global_step
        with self.bar.paused():
            nats, tokens, text_bytes = self.validate()
        line = {"kind": "val", "step": self.evaluated_at}
        line["tokens"] = self.evaluated_at * self.config.train.tokens_per_update
        line["loss"] = nats / tokens
        if text_bytes:
            line["bits_per_byte"] = nats / math.log(2) / text_bytes
        self.bar.write(f"step {self.evaluated_at:>6}: validation loss {nats / tokens:.4f}")
        if self.world.is_main:
            logs.append_metrics(self.run, line)
        metrics = {"eval_loss": nats / tokens}
        # Otherwise it would be asked for again.
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def validate(self) -> tuple[float, float, float]:
        """Return nats, tokens and bytes of text of the validation tokens, over all processes."""
        token_bytes = self.val_data.stream.tokenizer.token_bytes()
        sums, device = torch.zeros(3, dtype=torch.float64), self.args.device
        self.model.eval()
        for inputs, targets in validation_batches(self.val_data, self.config, self.world):
            with autocast(device, self.dtype):
                loss = self.model(**labelled(inputs.to(device), targets.to(device))).loss
            scored = targets[targets != IGNORED]
            counts = len(scored), token_bytes[scored.numpy()].sum()
            sums += torch.tensor([loss.item() * counts[0], *counts], dtype=torch.float64)
        self.model.train()
        return tuple(sum_over_ranks(sums.to(device)).tolist())


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
    train, optim, device = config.train, config.optim, pick_device(config.train.device)
    _, size = rank_and_size()
    on_cpu = device.type == "cpu"
    if on_cpu:
        share_cores()
    return TrainingArguments(
        output_dir=str(run),
        max_steps=train.updates,
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=accumulation_steps(config, size),
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
        "world_size": peer.world.size,
        "micro_batch": peer.args.per_device_train_batch_size,
        "accumulation": peer.args.gradient_accumulation_steps,
        "data_manifest_sha256": manifest_digest(peer.val_data.stream.directory),
    }
