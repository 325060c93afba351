"""Every number of a config that can be checked without data or hardware, each with its sentence."""

import math

from config import Config, ModelConfig, OptimConfig, TrainConfig, UserError, windows_per_update


def validate(config: Config) -> None:
    """Check every number that can be checked without data or hardware; raises UserError."""
    _check_model(config.model)
    _check_optim(config.optim)
    _check_train(config.train)
    windows_per_update(config)


def _check_model(model: ModelConfig) -> None:
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        _require(getattr(model, name) >= 1, f"model.{name} must be at least 1.")
    _require(
        model.n_embd % model.n_head == 0,
        f"model.n_embd {model.n_embd} must be a multiple of model.n_head {model.n_head}.",
    )
    _require(
        model.vocab_size <= 65536, "model.vocab_size must be at most 65536: shards hold uint16."
    )
    for name, value in (
        ("dropout", model.dropout),
        ("attention_dropout", model.attention_dropout or 0),
    ):
        _require(0 <= value < 1, f"model.{name} must be at least 0 and below 1.")
    _check_parts(model)


def _check_optim(optim: OptimConfig) -> None:
    _require(
        optim.head_lr is None or 0 < optim.head_lr < math.inf, "optim.head_lr must be above 0."
    )
    for name in ("lr", "muon_lr", "eps"):
        _require(0 < getattr(optim, name) < math.inf, f"optim.{name} must be above 0.")
    for name in ("weight_decay", "muon_weight_decay", "grad_clip"):
        _require(0 <= getattr(optim, name) < math.inf, f"optim.{name} must not be negative.")
    for name in ("warmup", "cooldown", "final_lr", "momentum_warmup"):
        _require(0 <= getattr(optim, name) <= 1, f"optim.{name} is a fraction between 0 and 1.")
    for name in ("beta1", "beta2", "momentum"):
        _require(0 <= getattr(optim, name) < 1, f"optim.{name} must be at least 0 and below 1.")


def _check_train(train: TrainConfig) -> None:
    _require(train.updates is None or train.updates >= 0, "train.updates must not be negative.")
    _require(train.stop_at is None or train.stop_at >= 0, "train.stop_at must not be negative.")
    _require(train.epochs is None or train.epochs > 0, "train.epochs must be above 0.")
    _require(
        train.micro_batch is None or train.micro_batch >= 1, "train.micro_batch must be 1 or more."
    )
    for name in ("tokens", "log_interval", "keep_checkpoints", "val_tokens"):
        _require(getattr(train, name) >= 1, f"train.{name} must be at least 1.")
    _require(0 <= train.loss_scale < math.inf, "train.loss_scale must not be negative.")
    _require(0 < train.timeout < math.inf, "train.timeout must be above 0 seconds.")
    _require(
        train.eval_limit is None or train.eval_limit >= 1, "train.eval_limit must be 1 or more."
    )
    _require(
        train.rows == "packed" or train.order != "shuffle_documents",
        "train.rows padded has a document in every window, so that train.order shuffle_windows "
        "shuffles documents; choose that, or sequential.",
    )
    _require(
        not train.log_window_losses or train.order != "shuffle_documents",
        "train.log_window_losses wants windows that are the same text in every epoch; choose "
        "train.order sequential or shuffle_windows.",
    )
    for name in ("val_interval", "eval_interval", "checkpoint_interval", "sample_tokens"):
        _require(getattr(train, name) >= 0, f"train.{name} must not be negative.")


def _check_parts(model: ModelConfig) -> None:
    """Check that the parts of the model go together."""
    _require(0 <= model.softcap < math.inf, "model.softcap must not be negative.")
    _require(
        model.positions == "learned" or model.n_embd // model.n_head % 2 == 0,
        f"Rotary positions turn pairs of channels, and heads of {model.n_embd // model.n_head} are "
        "odd; choose another model.n_head.",
    )
    if model.architecture == "modern":
        _require(not model.bias, "The architecture modern has no biases; add --model.no-bias.")
        return
    for name in ("qk_norm", "zero_init", "x0_shortcut", "value_residual", "softcap"):
        _require(
            not getattr(model, name),
            f"model.{name} is a part of the architecture modern; leave it out, or add "
            "--model.architecture modern --model.no-bias.",
        )
    _require(
        model.tied,
        "GPT-2's head is its token embedding; only the architecture modern takes --model.no-tied.",
    )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)
