"""The shape of a GPT: its family and its sizes, checked."""

import math
from dataclasses import dataclass

from common.program.errors import InputError

# The most of each that a shape may have: several times more than any real model has.
MOST = {
    "vocab_size": 10_000_000,
    "max_length": 10_000_000,
    "n_layer": 10_000,
    "n_head": 10_000,
    "n_embd": 1_000_000,
    "n_kv_head": 10_000,
    "n_inner": 10_000_000,
    "window": 10_000_000,
}
MAY_BE_0 = ("n_layer", "n_kv_head", "n_inner", "window")


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides which tensors a model has and what it computes with them.

    What is 0 or None by default is filled in when the config is made. Raises InputError for a shape
    that cannot be, or that no family of transformers has, as it could not be handed on.
    """

    family: str = "llama"
    """llama: rotary positions, RMSNorm, SwiGLU; gpt2: learned positions, LayerNorm, GELU."""
    vocab_size: int = 50257
    """Ids."""
    max_length: int = 1024
    """Positions that the model can see: its context."""
    n_layer: int = 12
    """Blocks."""
    n_head: int = 12
    """Attention heads."""
    n_embd: int = 768
    """Width of the hidden states."""
    n_kv_head: int = 0
    """Key/value heads, each shared by a group of heads (llama); 0 = n_head."""
    n_inner: int = 0
    """Width of the MLP; 0 = 4 C (gpt2), 8/3 C rounded up to a multiple of 32 (llama)."""
    rope_theta: float = 10000.0
    """Base of the rotary positions' frequencies (llama)."""
    norm_eps: float = 1e-5
    """What the norms add to the variance."""
    tie_embeddings: bool = True
    """Input and output embedding are one matrix."""
    attention_bias: bool | None = None
    """Biases of qkv and out; None = gpt2 has them (unless it has local layers), llama not. A gpt2
    with local layers has one of out alone, as GPT-Neo."""
    mlp_bias: bool | None = None
    """Biases of the MLP; None = gpt2 has them, llama not."""
    attention_pattern: tuple[str, ...] = ("full",)
    """Kinds of the layers, "full" or "local" (GPT-3, section 2.1), repeated to n_layer."""
    window: int | None = None
    """Positions that a local layer sees, its own among them."""
    dropout: float = 0.0
    """Dropout while training."""

    def __post_init__(self) -> None:
        """Check what the defaults are made from, fill them in, check the rest."""
        if self.family not in ("gpt2", "llama"):
            raise InputError(f"family {self.family!r}: must be gpt2 or llama")
        self._check_numbers()
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self._fill_in()
        self._check_heads()
        self._check_layers()

    def _check_numbers(self) -> None:
        """Sizes are whole numbers up to MOST, others are finite; a word or a truth is no number."""
        for name, most in MOST.items():
            value, least = getattr(self, name), 0 if name in MAY_BE_0 else 1
            if name == "window" and value is None:
                continue
            if type(value) is not int or not least <= value <= most:
                wanted = f"a whole number from {least} to {most:,} is wanted"
                raise InputError(f"{name} {value!r:.40} describes no model: {wanted}")
        for name in ("rope_theta", "norm_eps", "dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                wanted = "a number from 0 on is wanted"
                raise InputError(f"{name} {value!r:.40} describes no model: {wanted}")
        for name in ("tie_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(value := getattr(self, name), bool | None):
                raise InputError(f"{name} {value!r:.40}: must be true or false")

    def _fill_in(self) -> None:
        """The defaults."""
        gpt2, kinds = self.family == "gpt2", self.attention_pattern
        inner = 4 * self.n_embd if gpt2 else 32 * math.ceil(self.n_embd * 8 / 3 / 32)
        pattern = tuple(kinds[layer % len(kinds)] for layer in range(self.n_layer))
        biased = {"attention_bias": gpt2 and "local" not in pattern, "mlp_bias": gpt2}
        filled = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "n_inner": self.n_inner or inner,
            "attention_pattern": pattern,
        }
        filled |= {name: value for name, value in biased.items() if getattr(self, name) is None}
        for name, value in filled.items():
            object.__setattr__(self, name, value)  # the one way to fill in a frozen dataclass

    def _check_heads(self) -> None:
        """Heads must share keys evenly; rotary positions turn pairs."""
        heads, kv_heads, width = self.n_head, self.n_kv_head, self.head_width
        if heads % kv_heads:
            raise InputError(f"n_head {heads} is not a multiple of n_kv_head {kv_heads}")
        if self.family == "gpt2" and kv_heads != heads:
            raise InputError(f"n_kv_head {kv_heads}: grouped heads exist in the llama family only")
        if self.family == "llama" and width % 2:
            need = "rotary positions need an even head width"
            raise InputError(f"n_embd / n_head = {width}: {need}")

    def _check_layers(self) -> None:
        """Local layers need a window, and exist in transformers without some biases only."""
        if unknown := set(self.attention_pattern) - {"full", "local"}:
            raise InputError(f"attention_pattern {unknown.pop()!r}: a layer is full or local")
        if not self.has_local_layers:
            return
        if not self.window:
            need = "give the window, in positions, that they see"
            raise InputError(f"attention_pattern has local layers: {need}")
        if self.family == "llama" and (self.attention_bias or self.mlp_bias):
            raise InputError(
                "local layers with such biases exist in no family of transformers, "
                "to hand them on to: set attention_bias: false and mlp_bias: false"
            )

    @property
    def has_local_layers(self) -> bool:
        """Whether some layer sees a window only."""
        return "local" in self.attention_pattern

    @property
    def biased(self) -> tuple[str, ...]:
        """Which matrices of a block have a bias: of qkv, out, up and down."""
        neo = self.family == "gpt2" and self.has_local_layers
        of_attention = (("out",) if neo else ("qkv", "out")) if self.attention_bias else ()
        return of_attention + (("up", "down") if self.mlp_bias else ())

    @property
    def head_width(self) -> int:
        """Width of a head, D."""
        return self.n_embd // self.n_head
