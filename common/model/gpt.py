"""The GPT, in two families chosen by config, and the scalar-head model that serves as reward model
and critic.

Read bottom-up: Attention, MLP, Block, Trunk, GPT. Family "gpt2": learned positions, LayerNorm,
GELU, biases (Radford 2019). Family "llama": rotary positions (Su 2021), RMSNorm, SwiGLU, grouped
heads (Touvron 2023).

Either may alternate full attention with local layers, which see a window of positions (Child 2019;
GPT-3). Rows are right-padded and contiguous, so causal attention alone keeps padding out: no
padding mask anywhere. Shape legend: B rows, T positions, S cache slots, H heads, K key/value heads,
D head width, C width, V vocabulary.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.model.attention import Rope, Tokens, additive, attention, document_mask, needed
from common.model.cache import KVCache, Slots
from common.model.cpu.kernels import (
    gelu,
    layer_norm,
    linear_logprobs,
    product_dtype,
    rms_norm,
    swiglu,
)
from common.model.shape import GPTConfig
from common.program.errors import InputError


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = (config.n_head + 2 * config.n_kv_head) * config.head_width  # queries, keys, values
        self.qkv = nn.Linear(config.n_embd, width, bias=config.attention_bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.attention_bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        tokens: Tokens | None,
        slots: Slots | None,
    ) -> Tensor:
        H, K = self.config.n_head, self.config.n_kv_head
        dropout = self.config.dropout if self.training else 0.0
        y = attention(self.qkv(x), H, K, rope, mask, dropout, tokens, slots)
        return self.dropout(self.out(y)) if self.training else self.out(y)


class MLP(nn.Module):
    """gpt2: down(gelu(up(x))). llama (SwiGLU): down(silu(gate) * up), gate and up in one matrix,
    gate first."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.family == "llama"
        self.up = nn.Linear(
            config.n_embd, config.n_inner * (2 if self.gated else 1), bias=config.mlp_bias
        )
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y = self.down(swiglu(h) if self.gated else gelu(h))
        return self.dropout(y) if self.training else y


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = norm(config)
        self.attn = Attention(config)
        self.norm2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """`context`: what Attention takes behind x."""
        x = x + self.attn(self.norm1(x), *context)
        return x + self.mlp(self.norm2(x))


def norm(config: GPTConfig) -> nn.Module:
    kind = LayerNorm if config.family == "gpt2" else RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Trunk(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, C) after the last norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = (
            nn.Embedding(config.max_length, config.n_embd) if config.family == "gpt2" else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = norm(config)
        if config.family == "llama":
            frequencies = config.rope_theta ** -(
                torch.arange(0, config.head_width, 2).float() / config.head_width
            )
            angles = torch.arange(config.max_length).float()[:, None] * frequencies
            self.register_buffer(
                "cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False
            )  # (max_length, D)
            self.register_buffer(
                "sin", torch.cat([-angles.sin(), angles.sin()], -1), persistent=False
            )

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C), or only where `keep` (B, T) is set: (N, C), row by row."""
        T = ids.shape[1]
        end = T if cache is None else cache.longest + T
        if end > self.config.max_length:
            raise InputError(
                f"{end} tokens in a row, but the model's context is {self.config.max_length}"
            )
        positions = (
            torch.arange(T, device=ids.device)[None] if cache is None else cache.place(T)
        )  # (B or 1, T)
        tokens = None if keep is None else needed(keep)
        x = self.wte(ids if tokens is None else tokens.of(ids))
        dtype = product_dtype(x)  # of queries, keys and values
        rope = None
        if self.wpe is not None:
            x = x + self.wpe(positions if tokens is None else tokens.of(positions.expand_as(ids)))
        else:
            rope = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        x = self.dropout(x)
        mask = (
            cache.mask
            if cache is not None
            else None
            if documents is None
            else document_mask(documents)
        )
        local = None
        if self.config.has_local_layers:
            slots = torch.arange(end, device=ids.device)
            back = positions[:, :, None] - slots  # (B or 1, T, S)
            local = ((back >= 0) & (back < self.config.window))[:, None]
            local = local if mask is None else local & mask
        mask, local = additive(mask, dtype), additive(local, dtype)
        for layer, (kind, block) in enumerate(
            zip(self.config.attention_pattern, self.blocks, strict=True)
        ):
            slots = None if cache is None else cache.slots(layer)
            inputs = (x, rope, local if kind == "local" else mask, tokens, slots)
            once = not self.checkpointing or cache is not None or not torch.is_grad_enabled()
            x = block(*inputs) if once else checkpoint(block, *inputs, use_reentrant=False)
        if cache is not None:
            cache.lengths = cache.lengths + T
        x = self.norm(x)
        return x if keep is None else x[keep if tokens is None else tokens.of(keep)]

    def initialise(self) -> None:
        """N(0, .02), residual projections by 1/sqrt(2 L) less (GPT-2 paper, 2.3); norms 1, biases
        0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(
                    parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0
                )
            else:
                residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                )


class Head(nn.Linear):
    """hidden (N, C) -> logits (N, V); with targets (N) -> (log-probs of the targets at
    `temperature`, entropies if asked)."""

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropies: bool = False,
    ) -> Any:
        if targets is None:
            return super().forward(hidden)
        logprobs, entropy = linear_logprobs(
            hidden.flatten(0, -2), self.weight, targets.flatten(), temperature, entropies
        )
        logprobs = logprobs.view_as(targets)
        return (logprobs, entropy.view_as(targets)) if entropies else logprobs


class GPT(nn.Module):
    """Language model: ids (B, T) -> logits (B, T, V), or only where `keep` (B, T) is set: (N, V),
    row by row.

    `documents` (B, T): the document each token is of, where several are packed into a row;
    attention stays inside it. With `targets` (B, T) or (N) -> their log-probs, of the same shape,
    instead of logits; see Head.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)
        self.trunk.initialise()
        nn.init.normal_(self.head.weight, std=0.02)
        if config.tie_embeddings:
            self.head.weight = self.trunk.wte.weight

    def forward(
        self,
        ids: Tensor,
        keep: Tensor | None = None,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropies: bool = False,
    ) -> Any:
        hidden = self.trunk(ids, documents=documents, keep=keep)
        return (
            self.head(hidden)
            if targets is None
            else self.head(hidden, targets, temperature, entropies)
        )

    def resize_vocabulary(self, size: int) -> None:
        """Grow the embeddings to at least `size` ids (a parent that lacks our control tokens); new
        rows are the mean."""
        old = self.config.vocab_size
        if size <= old:
            return
        self.config = self.trunk.config = replace(self.config, vocab_size=size)
        for module in {self.trunk.wte: 0, self.head: 0}:
            weight = module.weight.data
            module.weight = nn.Parameter(
                torch.cat([weight, weight.mean(0, keepdim=True).expand(size - old, -1)])
            )
        if self.config.tie_embeddings:
            self.head.weight = self.trunk.wte.weight


class RewardModel(nn.Module):
    """Trunk and scalar head: a score for each row (reward model) or a value for each position
    (critic).

    `shift` is subtracted from scores, so that reference answers average 0 (Stiennon 2020,
    InstructGPT). It lies beside the weights because transformers' classification head has no bias
    to carry it.
    """

    def __init__(self, config: GPTConfig, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk or Trunk(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        self.register_buffer("shift", torch.zeros(()))
        if trunk is None:
            self.trunk.initialise()
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))

    def values(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Score head at every position: (B, T) -> (B, T), or where `keep` (B, T) is set: (N), row
        by row.

        In fp32 (bf16 would round small gaps away), shift applied.
        """
        hidden = self.trunk(ids, keep=keep)
        with torch.autocast(ids.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(-1) - self.shift

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Score at each row's last real token: ids (B, T), lengths (B) -> (B)."""
        last = torch.arange(ids.shape[1], device=ids.device) == lengths[:, None] - 1
        return self.values(ids, last)
