"""The shape of a GPT: its family and its sizes, checked."""

import math
from dataclasses import dataclass

from common.program.errors import InputError


@dataclass(frozen=True)
class GPTConfig:
    family: str = "llama"
    vocab_size: int = 50257
    max_length: int = 1024  # positions the model can see
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None  # grouped-query attention (llama); None = n_head
    n_inner: int | None = None  # MLP width; None = 4 C (gpt2), 8/3 C rounded up to 32 (llama)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool | None = (
        None  # of qkv and out; None = gpt2 yes (unless it has local layers), llama no
    )
    mlp_bias: bool | None = None  # None = gpt2 yes, llama no
    attention_pattern: tuple[str, ...] = (
        "full",
    )  # of the layers, repeated: "full" or "local" (GPT-3, section 2.1)
    window: int | None = None  # positions that a local layer sees, its own among them
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in ("gpt2", "llama"):
            raise InputError(f"family {self.family!r}: must be gpt2 or llama")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        set_default = object.__setattr__  # the one way to fill in a frozen dataclass
        gpt2 = self.family == "gpt2"
        set_default(self, "n_kv_head", self.n_kv_head or self.n_head)
        default_inner = 4 * self.n_embd if gpt2 else 32 * math.ceil(self.n_embd * 8 / 3 / 32)
        set_default(self, "n_inner", self.n_inner or default_inner)
        pattern = tuple(
            self.attention_pattern[i % len(self.attention_pattern)] for i in range(self.n_layer)
        )
        set_default(self, "attention_pattern", pattern)
        default_bias = gpt2 and not self.has_local_layers
        set_default(
            self,
            "attention_bias",
            default_bias if self.attention_bias is None else self.attention_bias,
        )
        set_default(self, "mlp_bias", gpt2 if self.mlp_bias is None else self.mlp_bias)
        if self.n_head % self.n_kv_head:
            raise InputError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if gpt2 and self.n_kv_head != self.n_head:
            raise InputError(
                f"n_kv_head {self.n_kv_head}: grouped heads exist in the llama family only"
            )
        if unknown := set(pattern) - {"full", "local"}:
            raise InputError(f"attention_pattern {unknown.pop()!r}: a layer is full or local")
        if self.has_local_layers and not self.window:
            raise InputError(
                "attention_pattern has local layers: give the window, in positions, that they see"
            )
        if self.has_local_layers and (self.attention_bias or (self.mlp_bias and not gpt2)):
            wanted = (
                "attention_bias: false" if gpt2 else "attention_bias: false and mlp_bias: false"
            )
            raise InputError(
                f"local layers with such biases exist in no family of transformers, to hand them on to: set {wanted}"
            )
        if self.family == "llama" and self.head_width % 2:
            raise InputError(
                f"n_embd / n_head = {self.head_width}: rotary positions need an even head width"
            )

    @property
    def has_local_layers(self) -> bool:
        return "local" in self.attention_pattern

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head
