"""The model of this directory for Hugging Face's transformers, complete in this file.

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

A GPT with the switches of config.json: learned positions or RoPE, LayerNorm or RMSNorm, GELU,
SwiGLU or ReLU^2, with biases or without; and, where `architecture` is "modern", the parts that it
adds: a normalised embedding, norms without gains, normalised queries and keys, values mixed with
those of the first block, the embedding mixed into every block, a soft cap, a head of its own.

Shapes: B rows, T new tokens, S tokens with those before them, C channels, V ids.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast


class GPTConfig(PreTrainedConfig):
    """What config.json says; its defaults are those of GPT-2 with 124M parameters."""

    model_type = "gpt2_reproduction"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    mlp_width: int = 3072
    block_size: int = 1024
    vocab_size: int = 50257
    dropout: float = 0.0
    attention_dropout: float | None = None
    architecture: str = "gpt2"
    pos_emb: str = "learned"
    norm: str = "layernorm"
    activation: str = "gelu"
    bias: bool = True
    document_mask: bool = False
    qk_norm: bool = False
    x0_residual: bool = False
    value_residual: bool = False
    logit_softcap: float = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class GPTForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token, from ids and the keys and values of those before them."""

    config_class = GPTConfig
    _supports_sdpa = True
    # Only where config.tie_word_embeddings says so.
    _tied_weights_keys: ClassVar = {"lm_head.weight": "wte.weight"}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.modern = config.architecture == "modern"
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos_emb == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits (B, T, V), and with labels (B, T), shifted here, their mean loss in nats.

        With `document_mask`, a token does not see the documents before its own, each of which
        begins with <|endoftext|>. As in training, this holds within one pass: with
        `past_key_values`, as in `generate`, all is taken for one document.
        """
        continues = past_key_values is not None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and not continues:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            stop = past + input_ids.size(1)
            position_ids = torch.arange(past, stop, device=input_ids.device)[None]
        mask = self.build_mask(input_ids, attention_mask, past, continues)
        x = self.hidden(input_ids, position_ids, mask, past_key_values)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        if self.config.logit_softcap:
            logits = logits * (logits / self.config.logit_softcap).square().add(1).rsqrt()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )
        return output.to_tuple() if return_dict is False else output

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Return the final normalised states (B, T, C) of ids (B, T)."""
        x, rotation = self.wte(input_ids), None
        if self.config.pos_emb == "learned":
            x = x + self.wpe(position_ids)
        else:
            rotation = rope_cos_sin(position_ids, self.config.n_embd // self.config.n_head)
        x = x0 = self.drop(self.ln_f(x) if self.modern else x)
        first_values = None
        for block in self.h:
            x, first_values = block(x, x0, first_values, rotation, mask, cache)
        return self.ln_f(x)

    def build_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None, past: int, continues: bool
    ) -> Tensor | None:
        """Return what tokens see, bool (B, 1, T, S), or None where it is all up to themselves."""
        T, device = input_ids.size(1), input_ids.device
        splits = self.config.document_mask and not continues
        padded = attention_mask is not None and not attention_mask.bool().all()
        if not splits and not padded and (past == 0 or T == 1):
            return None
        places = torch.arange(past + T, device=device)
        mask = (places <= places[past:, None])[None, None]
        if splits:
            document = (input_ids == self.config.eos_token_id).cumsum(1)
            mask = mask & (document[:, :, None] == document[:, None, :])[:, None]
        if padded:
            # Padding sees itself, for a softmax over nothing would be no number.
            itself = places == places[past:, None]
            mask = mask & (attention_mask.bool()[:, None, None, :] | itself)
        return mask


class Block(nn.Module):
    """Attention and MLP, each reading the normalised stream and adding to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_residual else None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        first_values: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * x0
        found, first_values = self.attn(self.ln_1(x), first_values, rotation, mask, cache)
        x = x + found
        return x + self.mlp(self.ln_2(x)), first_values


class Attention(nn.Module):
    """Multi-head attention over the past."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.qk_norm = layer, config.n_head, config.qk_norm
        self.dropout = config.attention_dropout
        if self.dropout is None:
            self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_drop = nn.Dropout(config.dropout)
        remembers = config.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.tensor([0.5])) if remembers else None

    def forward(
        self,
        x: Tensor,
        first_values: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        first_values = v if first_values is None else first_values
        if self.value_mix is not None:
            v = torch.lerp(v, first_values, self.value_mix.to(v.dtype))
        if self.qk_norm:
            q, k = (F.rms_norm(heads, (heads.size(-1),)) for heads in (q, k))
        if rotation is not None:
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal, dropout = mask is None and T > 1, self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).flatten(2))), first_values


class MLP(nn.Module):
    """Two layers with an activation between them, or SwiGLU's three."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        if self.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        if self.activation == "swiglu":
            hidden = F.silu(self.c_gate(x)) * hidden
        elif self.activation == "relu2":
            hidden = F.relu(hidden).square()
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return self.drop(self.c_proj(hidden))


def build_norm(config: GPTConfig) -> nn.Module:
    """Return a norm over C channels; that of a modern model has nothing to learn."""
    gain = config.architecture != "modern"
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5, elementwise_affine=gain)
    return nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=gain, bias=config.bias)


def rope_cos_sin(position_ids: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (B, 1, T, head size / 2), float32, of tokens' angles."""
    steps = torch.arange(0, head_size, 2, device=position_ids.device) / head_size
    angles = position_ids[:, None, :, None] * 10_000.0**-steps
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries or keys (B, heads, T, head size), turned, in their own dtype."""
    cos, sin = rotation
    # A position of 1,000 has no room in bfloat16's eight bits.
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
