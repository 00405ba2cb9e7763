"""The GPT, in two families chosen by config, and the scalar-head model that serves as reward model
and critic.

Read bottom-up: Attention, MLP, Block, Trunk, GPT. Family "gpt2": learned positions, LayerNorm,
GELU, biases (Radford 2019). Family "llama": rotary positions (Su 2021), RMSNorm, SwiGLU, grouped
heads (Touvron 2023). The operations themselves are in attention.py and layers.py.

Either may alternate full attention with local layers, which see a window of positions (Child 2019;
GPT-3). Rows are right-padded and contiguous, so causal attention alone keeps padding out: no
padding mask anywhere. Shape legend: B rows, T positions, S cache slots, H heads, K key/value heads,
D head width, C width, V vocabulary, N tokens.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.model.attention import Context, additive, document_mask, rotary_tables, window_mask
from common.model.cache import KVCache
from common.model.cpu.tokens import needed
from common.model.dispatch import operations
from common.model.logprobs import linear_logprobs
from common.model.ops import product_dtype
from common.model.shape import GPTConfig
from common.program.errors import InputError


class Attention(nn.Module):
    """Self-attention between its two matrices: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        """Queries, keys and values of all heads come from one matrix."""
        super().__init__()
        self.config = config
        width = (config.n_head + 2 * config.n_kv_head) * config.head_width
        self.qkv = nn.Linear(config.n_embd, width, bias="qkv" in config.biased)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias="out" in config.biased)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Raises RuntimeError where a cache would lose gradients."""
        qkv = self.qkv(x)
        if context.slots is not None and qkv.requires_grad:
            raise RuntimeError(
                "attention with a cache is for sampling, without gradients: use torch.no_grad()"
            )
        dropout = self.config.dropout if self.training else 0.0
        heads = (self.config.n_head, self.config.n_kv_head)
        y = self.out(operations(qkv).attention(qkv, *heads, context, dropout))
        return self.dropout(y) if self.training else y


class MLP(nn.Module):
    """gpt2: down(gelu(up(x))). llama (SwiGLU): down(silu(gate) * value), gate and value from one
    matrix `up`, gate first."""

    def __init__(self, config: GPTConfig) -> None:
        """Of width n_inner inside."""
        super().__init__()
        self.gated = config.family == "llama"
        inner = config.n_inner * (2 if self.gated else 1)
        self.up = nn.Linear(config.n_embd, inner, bias="up" in config.biased)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias="down" in config.biased)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        h = self.up(x)
        y = self.down(operations(h).swiglu(h) if self.gated else operations(h).gelu(h))
        return self.dropout(y) if self.training else y


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with what is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return operations(x).layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with what is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return operations(x).rms_norm(x, self.weight, self.eps)


def norm(config: GPTConfig) -> nn.Module:
    """The family's norm of a hidden state."""
    kind = LayerNorm if config.family == "gpt2" else RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normed stream and added to it (pre-norm)."""

    def __init__(self, config: GPTConfig) -> None:
        """All blocks are alike; which of them are local is in the context that they get."""
        super().__init__()
        self.norm1 = norm(config)
        self.attn = Attention(config)
        self.norm2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, C) after the last norm."""

    def __init__(self, config: GPTConfig) -> None:
        """With PyTorch's initial weights; see `initialise`."""
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass
        learned = config.family == "gpt2"  # positions
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.max_length, config.n_embd) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = norm(config)
        if not learned:
            tables = rotary_tables(config.max_length, config.head_width, config.rope_theta)
            for name, table in zip(("cos", "sin"), tables, strict=True):
                self.register_buffer(name, table, persistent=False)  # (max_length, D)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C), or only where `keep` (B, T) is set: (N, C), row by row.

        With a cache, ids are the next tokens of its rows. documents: see GPT. Raises InputError for
        more positions than the model can see.
        """
        positions = self.positions(ids, cache)  # (B or 1, T)
        tokens = needed(keep)  # on a CPU: those of padded rows that matter
        take = tokens.of if tokens else _all
        x = self.wte(take(ids))
        dtype = product_dtype(x)  # of queries, keys and values
        masks, rope = self.masks(positions, cache, documents, dtype), None
        if self.wpe is not None:
            x = x + self.wpe(take(positions))
        else:
            rope = self.cos[positions].to(dtype), self.sin[positions].to(dtype)
        x = self.dropout(x)
        for layer, kind in enumerate(self.config.attention_pattern):
            slots = None if cache is None else cache.slots(layer)
            x = self.run(self.blocks[layer], x, Context(rope, masks[kind], slots, tokens))
        if cache is not None:
            cache.advance(ids.shape[1])
        x = self.norm(x)
        return x if keep is None else x[take(keep)]

    def positions(self, ids: Tensor, cache: KVCache | None) -> Tensor:
        """Where each of ids (B, T) is in its row: (1, T), or with a cache (B, T)."""
        T = ids.shape[1]
        end = T if cache is None else cache.longest + T
        if end > self.config.max_length:
            context = self.config.max_length
            raise InputError(f"{end} tokens in a row, but the model's context is {context}")
        return torch.arange(T, device=ids.device)[None] if cache is None else cache.place(T)

    def masks(
        self,
        positions: Tensor,
        cache: KVCache | None,
        documents: Tensor | None,
        dtype: torch.dtype,
    ) -> dict[str, Tensor | None]:
        """What is added to the scores of each kind of layer, made once for all layers; None:
        causal."""
        full = local = None
        if cache is not None:
            full = cache.mask
        elif documents is not None:
            full = document_mask(documents)
        if self.config.has_local_layers:
            keys = positions.shape[1] if cache is None else cache.longest
            assert self.config.window is not None  # as GPTConfig has checked
            local = window_mask(positions, keys, self.config.window)
            local = local if full is None else local & full
        return {"full": additive(full, dtype), "local": additive(local, dtype)}

    def run(self, block: Block, x: Tensor, context: Context) -> Tensor:
        """One block; while training with checkpointing it keeps nothing but its input (Chen
        2016)."""
        if self.checkpointing and context.slots is None and torch.is_grad_enabled():
            return checkpoint(block, x, context, use_reentrant=False)
        return block(x, context)

    def initialise(self) -> None:
        """N(0, .02), residual projections by 1/sqrt(2 L) less (GPT-2 paper, 2.3); norms 1, biases
        0."""
        residual = 0.02 / math.sqrt(2 * max(self.config.n_layer, 1))
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=residual)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                of_norm = "norm" in name and name.endswith("weight")
                nn.init.constant_(parameter, 1.0 if of_norm else 0.0)


def _all(x: Tensor) -> Tensor:
    """Every token."""
    return x


class Head(nn.Linear):
    """The output embedding: a score (logit) for each id as the next one."""

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropies: bool = False,
    ) -> Any:
        """hidden (..., C) -> logits (..., V).

        With targets (...) -> their log-probs (...) at `temperature` instead of logits, which then
        are never all in memory; with `entropies`, (log-probs, entropies of the distributions).
        """
        return predict(hidden, self.weight, targets, temperature, entropies)


def predict(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    entropies: bool = False,
) -> Any:
    """What a Head of this weight (V, C) gives."""
    if targets is None:
        return F.linear(hidden, weight)
    logprobs, entropy = linear_logprobs(
        hidden.flatten(0, -2), weight, targets.flatten(), temperature, entropies
    )
    logprobs = logprobs.view_as(targets)
    return logprobs if entropy is None else (logprobs, entropy.view_as(targets))


class GPT(nn.Module):
    """Language model: ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: GPTConfig) -> None:
        """With random weights; with tie_embeddings, head and input embedding share one matrix."""
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
        """Logits (B, T, V), or only where `keep` (B, T) is set: (N, V), row by row.

        `documents` (B, T): the document each token is of, where several are packed into a row;
        attention stays inside it. With `targets` (B, T) or (N) -> their log-probs, of the same
        shape, instead of logits; see Head.
        """
        hidden = self.trunk(ids, documents=documents, keep=keep)
        return self.head(hidden, targets, temperature, entropies)

    def resize_vocabulary(self, size: int, seed: int = 0) -> range:
        """Grow the embeddings to at least `size` ids (a parent that lacks our control tokens);
        returns the new ids.

        New rows are drawn from the normal distribution that has the mean and the covariance of the
        old ones (Hewitt 2021): likely rows, of which no two are alike.
        """
        old = self.config.vocab_size
        if size <= old:
            return range(0)
        self.config = self.trunk.config = replace(self.config, vocab_size=size)
        generator = torch.Generator().manual_seed(seed)
        for module in (self.trunk.wte, self.head):
            weight = module.weight.data
            draws = torch.randn(size - old, old, generator=generator) / math.sqrt(old)
            mean = weight.mean(0, keepdim=True)
            added = mean + draws @ weight - draws.sum(1, keepdim=True) * mean
            module.weight = nn.Parameter(torch.cat([weight, added]))
        if self.config.tie_embeddings:
            self.head.weight = self.trunk.wte.weight
        return range(old, size)


class RewardModel(nn.Module):
    """Trunk and scalar head: a score for each row (reward model) or a value for each position
    (critic).

    `shift` is subtracted from scores, so that reference answers average 0 (Stiennon 2020,
    InstructGPT). It lies beside the weights because transformers' classification head has no bias
    to carry it.
    """

    def __init__(self, config: GPTConfig, trunk: Trunk | None = None) -> None:
        """With random weights, or over the trunk of another model."""
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
