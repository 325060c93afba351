"""What one update holds in memory, estimated from the config alone, by what it is held for.

    memory(config, micro_batch, where) -> Memory         at the moment when most is in use
    largest_micro_batch(config, where, room) -> int      that fits

Counted are the tensors of an update without torch.compile, which keeps less, and on a CPU what lies
between them. A process has other memory too: its libraries, a CUDA context of half a GB, buffers of
NCCL. bench/memory.py compares the estimate with what is measured.
"""

import dataclasses
from dataclasses import dataclass

from config import Config, ModelConfig, divisors, windows_per_process
from counts import parameter_count

# Bytes of a number in float32, as weights, gradients, optimizer and the residual stream are.
FLOAT = 4

# Rows of logits that the loss holds at a time (cross_entropy.py), in the dtype of products and in
# float32.
CPU_LOSS_ROWS = (256, 32)
LOSS_ROWS = (8192, 8192)

# What Muon holds for each number in its largest stack of matrices (muon.py): the direction, its
# stack and what the iteration returns; and two of the iteration's matrices, in their own dtype.
MUON_FLOATS, MUON_PRODUCTS = 3, 2

# Gradients of hidden units that are there at once in a block's backward pass, by activation.
HIDDEN_GRADIENTS = {"gelu": 1, "relu2": 3, "swiglu": 3}

# Matrices, float32, that attention keeps where no fused kernel will do: T numbers a token and head.
PLAIN_ATTENTION = 3

# What a CPU's process takes beyond its tensors, as a fraction of them: gaps in glibc's heap, too
# small for others. bench/memory.py found 0.07 to 0.23 at 124M and 0.1 to 0.7 at nano, but at most
# 0.05 where glibc maps every block of a megabyte by itself.
CPU_GAPS = 0.15

# FSDP gathers a block while another is in use.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class Where:
    """One of `processes` devices: its kind (cpu, cuda, mps) and the dtype of matrix products."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    processes: int = 1

    @property
    def width(self) -> int:
        """Bytes of a number in a matrix product."""
        return 2 if self.dtype in ("bfloat16", "float16") else FLOAT


@dataclass(frozen=True)
class Memory:
    """Bytes in use on one device at one moment, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    # Weights rounded to the dtype of products and, with FSDP, those that are gathered.
    copies: float = 0
    # What the backward pass will need, and what it is computing with.
    activations: float = 0
    # Some rows of logits, and the gradients of the states and of the head.
    loss: float = 0
    # What layers on a CPU, and the optimizer, compute with.
    workspace: float = 0
    # What a CPU's allocator leaves between tensors.
    gaps: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))


def memory(config: Config, micro_batch: int, where: Where) -> Memory:
    """Return what one device holds, in bytes, at the moment of an update when that is most."""
    moments = (in_loss, in_backward, after_backward, in_optimizer)
    held = [moment(config, micro_batch, where) for moment in moments]
    most = max(held, key=lambda memory: memory.total)
    gaps = CPU_GAPS * most.total if where.device == "cpu" else 0.0
    return dataclasses.replace(most, gaps=gaps)


def largest_micro_batch(config: Config, where: Where, room: float) -> int | None:
    """Return the largest micro-batch that divides a process's windows and fits `room` bytes.

    None if not even one window fits. Raises UserError when the processes do not divide the update.
    """
    shares = divisors(windows_per_process(config, where.processes))
    fitting = [n for n in shares if memory(config, n, where).total <= room]
    return max(fitting, default=None)


def in_loss(config: Config, micro_batch: int, where: Where) -> Memory:
    """Return what is held when all activations are there, and the loss computes its gradients."""
    model, width = config.model, where.width
    tokens = micro_batch * model.block_size
    states, head = tokens * model.n_embd, model.padded_vocab_size * model.n_embd
    # The states, their gradient, and that of the head; then both as they enter the products.
    loss = (FLOAT + width) * states + FLOAT * head + scratch(model, tokens, where)
    if width < FLOAT:
        loss += width * (states + head)
    if where.device != "cpu":
        # The head's gradient from some rows, before it is added to that from others.
        loss += width * head
    held = _lasting(config, micro_batch, where)
    copies = held.copies + _rounded(config, where)
    return dataclasses.replace(
        held, copies=copies, loss=loss, activations=kept(config, micro_batch, where)
    )


def in_backward(config: Config, micro_batch: int, where: Where) -> Memory:
    """Return what is held when the backward pass is in the last block, and all others wait."""
    model, width = config.model, where.width
    tokens, head = micro_batch * model.block_size, model.padded_vocab_size * model.n_embd
    # The gradients of the stream, of what is added to it, and of the hidden units on both sides.
    working = FLOAT * model.n_embd + width * model.n_embd
    working += HIDDEN_GRADIENTS[model.activation] * width * model.mlp_width
    held, copies = _lasting(config, micro_batch, where), _rounded(config, where)
    if config.train.gradient_checkpointing:
        working += block_activations(model, where)
        copies /= model.n_layer
    return dataclasses.replace(
        held,
        copies=held.copies + copies,
        activations=kept(config, micro_batch, where) + tokens * working,
        loss=FLOAT * head + _left_scratch(model, tokens, where),
    )


def after_backward(config: Config, micro_batch: int, where: Where) -> Memory:
    """Return what is held when the last gradient, that of the token embedding, is added."""
    model = config.model
    tokens, table = micro_batch * model.block_size, model.padded_vocab_size * model.n_embd
    held = _lasting(config, micro_batch, where)
    gradients = FLOAT * padded_parameters(model) / _shares(config, where)
    # A tied embedding's gradient is added to the head's: on a CPU in it (lean.py), elsewhere from a
    # table of its own. What this pass has found is apart from what earlier micro-batches left.
    tables = int(model.tied and where.device != "cpu") + int(held.gradients > 0)
    return dataclasses.replace(
        held,
        gradients=gradients + tables * FLOAT * table,
        activations=2 * FLOAT * tokens * model.n_embd,
        loss=_left_scratch(model, tokens, where),
    )


def in_optimizer(config: Config, micro_batch: int, where: Where) -> Memory:
    """Return what is held while the optimizer computes."""
    model, shares = config.model, _shares(config, where)
    tokens = micro_batch * model.block_size
    workspace = _layer_scratch(model, tokens, where)
    if config.optim.optimizer == "muon":
        # Matrices of one shape are stacked: those of attention, or those into the hidden units.
        into_hidden = model.mlp_width * (2 if model.activation == "swiglu" else 1)
        stack = model.n_layer * model.n_embd * max(4 * model.n_embd, into_hidden)
        workspace += stack * (MUON_FLOATS * FLOAT + MUON_PRODUCTS * where.width)
    return Memory(
        weights=FLOAT * padded_parameters(model) / shares,
        gradients=FLOAT * padded_parameters(model) / shares,
        optimizer=optimizer_state(config) / shares,
        loss=_left_scratch(model, tokens, where),
        workspace=workspace,
    )


def kept(config: Config, micro_batch: int, where: Where) -> float:
    """Return the bytes that the forward pass keeps of all blocks for the backward pass."""
    model = config.model
    width, stream = where.width, FLOAT * model.n_embd
    # The input of the last norm, and the embedding before and after its own.
    token = stream + (2 * stream if model.architecture == "modern" else 0)
    if model.dropout:
        token += _mask(FLOAT, where) * model.n_embd
    if config.train.gradient_checkpointing:
        token += model.n_layer * stream
        if model.value_residual:
            token += 3 * width * model.n_embd
    else:
        token += model.n_layer * block_activations(model, where)
    return micro_batch * model.block_size * token


def block_activations(model: ModelConfig, where: Where) -> float:
    """Return the bytes a token that one block keeps for its backward pass."""
    width, channels = where.width, model.n_embd
    stream, product = FLOAT * channels, width * channels
    on_cpu = where.device == "cpu"
    # What enters both norms, and the matrices after them.
    token = 2 * stream + 2 * product
    if model.norm == "rmsnorm" and model.architecture == "gpt2" and on_cpu:
        # No fused kernel: what comes out is kept too, before the gain.
        token += 2 * stream
    token += _attention_activations(model, where)
    hidden = {"gelu": 2, "relu2": 2, "swiglu": 4}[model.activation]
    if model.activation == "gelu" and on_cpu:
        # What GELU gives is computed again (lean.py).
        hidden -= 1
    token += hidden * width * model.mlp_width
    if model.activation == "swiglu" and width < FLOAT:
        # Each of the two matrices rounds its input for itself.
        token += product
    if model.x0_shortcut:
        token += stream
    if model.dropout:
        token += 2 * _mask(width, where) * channels
    return token


def _attention_activations(model: ModelConfig, where: Where) -> float:
    width, on_cpu = where.width, where.device == "cpu"
    product = width * model.n_embd
    # Queries, keys and values, what attention makes of them, and its sums of exponentials.
    token = 4 * product + FLOAT * model.n_head
    if model.positions == "rotary":
        token += 2 * product
    if model.qk_norm and on_cpu and width < FLOAT:
        token += 2 * FLOAT * model.n_embd
    if model.value_residual:
        token += product
    dropout = model.dropout if model.attention_dropout is None else model.attention_dropout
    if dropout and on_cpu:
        token += PLAIN_ATTENTION * FLOAT * model.n_head * model.block_size
    if model.document_mask:
        token += width * model.block_size
    return token


def _mask(width: int, where: Where) -> int:
    """Return the bytes of a number's place in a dropout mask."""
    return width if where.device == "cpu" else 1


def scratch(model: ModelConfig, tokens: int, where: Where) -> float:
    """Return the bytes of the logits that the loss holds at a time."""
    rows = CPU_LOSS_ROWS if where.device == "cpu" else LOSS_ROWS
    products, floats = (min(count, tokens) for count in rows)
    floats *= 2 if model.softcap else 1
    return model.padded_vocab_size * (products * where.width + floats * FLOAT)


def _left_scratch(model: ModelConfig, tokens: int, where: Where) -> float:
    """Return what stays of that after the loss: on a CPU all of it."""
    return scratch(model, tokens, where) if where.device == "cpu" else 0.0


def _layer_scratch(model: ModelConfig, tokens: int, where: Where) -> float:
    """Return the bytes that a CPU keeps for one layer at a time (lean.py)."""
    if where.device != "cpu":
        return 0.0
    room = where.width * tokens * model.mlp_width if model.activation == "gelu" else 0
    if where.width < FLOAT:
        # A matrix, rounded, and its gradient before it is in float32.
        room += 2 * where.width * model.n_embd * max(3 * model.n_embd, model.mlp_width)
    return room


def padded_parameters(model: ModelConfig) -> int:
    """Return the number of trainable parameters in memory, with the vocabulary's padding."""
    padding = model.padded_vocab_size - model.vocab_size
    return parameter_count(model) + padding * model.n_embd * (1 if model.tied else 2)


def block_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of all blocks and of the last norm."""
    tables = model.vocab_size * (1 if model.tied else 2)
    tables += model.block_size if model.positions == "learned" else 0
    return parameter_count(model) - tables * model.n_embd


def optimizer_state(config: Config) -> float:
    """Return the bytes of AdamW's two averages a parameter, or of Muon's one."""
    model, in_memory = config.model, padded_parameters(config.model)
    if config.optim.optimizer == "adamw":
        return 2 * FLOAT * in_memory
    gates = 3 if model.activation == "swiglu" else 2
    matrices = model.n_layer * model.n_embd * (4 * model.n_embd + gates * model.mlp_width)
    return 2 * FLOAT * in_memory - FLOAT * matrices


def _lasting(config: Config, micro_batch: int, where: Where) -> Memory:
    """Return what is held all the time, and gradients that are there before a backward pass."""
    model, shares = config.model, _shares(config, where)
    accumulates = windows_per_process(config, where.processes) > micro_batch
    # DDP keeps gradients in its buckets, from one update to the next.
    in_buckets = where.processes > 1 and shares == 1
    parameters = padded_parameters(model)
    gathered = 0.0
    if shares > 1:
        blocks = block_parameters(model)
        gathered = FLOAT * (parameters - blocks + GATHERED_BLOCKS * blocks / model.n_layer)
    return Memory(
        weights=FLOAT * parameters / shares,
        gradients=FLOAT * parameters / shares if accumulates or in_buckets else 0.0,
        optimizer=optimizer_state(config) / shares,
        copies=gathered,
        workspace=_layer_scratch(model, micro_batch * model.block_size, where),
    )


def _rounded(config: Config, where: Where) -> float:
    """Return the bytes of the blocks' weights in the dtype of products, where that is another.

    On a CPU they are rounded again when they are needed (lean.py).
    """
    if where.width == FLOAT or where.device == "cpu":
        return 0.0
    return where.width * block_parameters(config.model)


def _shares(config: Config, where: Where) -> int:
    """Return over how many processes weights, gradients and optimizer state are shared out."""
    return where.processes if config.train.parallel == "fsdp" else 1
