"""How many parameters a model has, and how many operations one of its tokens costs.

Golden numbers in the tests; nothing is built for them.
"""

from config import ModelConfig


def parameter_count(model: ModelConfig) -> int:
    """Return the number of trainable parameters, without padding (124,439,808 for GPT-2 124M)."""
    count = model.vocab_size * model.n_embd * (1 if model.tied else 2)
    if model.positions == "learned":
        count += model.block_size * model.n_embd
    return count + _blocks(model)


def flops_per_token(model: ModelConfig) -> float:
    """Return the floating-point operations of one training token, forward and backward.

    Six for each parameter but those of tables, which multiply nothing, and 12 * n_layer * n_embd *
    T for the attention products (PaLM, Chowdhery et al. 2022, appendix B).
    """
    head = model.vocab_size * model.n_embd
    attention = 12 * model.n_layer * model.n_embd * model.block_size
    return 6 * (head + _blocks(model)) + attention


def _blocks(model: ModelConfig) -> int:
    """Return the parameters of all blocks and of the last norm."""
    width, hidden = model.n_embd, model.mlp_width
    mlp_matrices = 3 if model.activation == "swiglu" else 2
    block = 4 * width**2 + mlp_matrices * width * hidden
    if model.bias:
        block += 4 * width + (mlp_matrices - 1) * hidden + width
    if model.architecture == "modern":
        # Its norms have no gains. Two numbers a block mix in the embedding, and in every block but
        # the first one mixes values.
        shortcuts = 2 * model.n_layer * model.x0_shortcut
        return model.n_layer * block + shortcuts + (model.n_layer - 1) * model.value_residual
    norm = 2 * width if model.norm == "layernorm" and model.bias else width
    return model.n_layer * (block + 2 * norm) + norm
