"""What a GPT costs, in closed form: parameters, FLOPs, bytes; and GPUs. Pure functions; each names
its units and its source.

Legend: L layers, C width (n_embd), H heads, K key/value heads, D head width, I MLP width, V
vocabulary, B rows, T positions. A FLOP is one multiplication or addition; GB are 10^9 bytes. "PaLM,
appendix B" is Chowdhery 2022, "ZeRO" Rajbhandari 2020.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from common.model.shape import GPTConfig

Head = Literal["lm", "scalar"]  # of a model: log-probs of ids, or one score


class GPU(NamedTuple):
    """What one GPU can do, and what it costs."""

    memory: float
    """Bytes."""
    flops: float
    """FLOP/s of dense matrix products in bf16 (V100: fp16), with sums in fp32."""
    fp32_flops: float
    """FLOP/s in fp32, where PyTorch by default uses no tensor cores."""
    bandwidth: float
    """Bytes/s between the chip and its memory."""
    price: float
    """Assumed US dollars an hour."""
    bf16: bool = True
    """Whether it computes in bf16."""


# NVIDIA's data sheets (SXM versions where there are several; without sparsity). Their GB are read
# as 10^9 bytes: chips have 5-7 % more, which is about what the CUDA context, communication buffers
# and fragmentation take. Prices are no facts but an assumption, rounded from on-demand lists of
# spring 2026, which differ between sellers by a factor of 2 to 3.
GPUS: Mapping[str, GPU] = {
    "h200": GPU(141e9, 989e12, 67e12, 4.8e12, 3.80),
    "h100": GPU(80e9, 989e12, 67e12, 3.35e12, 3.00),
    "a100-80": GPU(80e9, 312e12, 19.5e12, 2.039e12, 1.80),
    "a100-40": GPU(40e9, 312e12, 19.5e12, 1.555e12, 1.30),
    "l40s": GPU(48e9, 362e12, 91.6e12, 0.864e12, 1.00),
    "l4": GPU(24e9, 121e12, 30.3e12, 0.3e12, 0.60),
    "4090": GPU(24e9, 165e12, 82.6e12, 1.008e12, 0.50),
    "v100": GPU(32e9, 125e12, 15.7e12, 0.9e12, 0.60, bf16=False),
}
# Model FLOPs utilisation, the share of `flops` that training reaches. Published: GPT-3 .21 (V100)
# and PaLM .46 (both PaLM, table 3), LLaMA .47-.55 (from the GPU hours of its table 15), Llama 3
# 405B .38-.43 (its table 4). Ours is not measured yet.
MFU = 0.40


class Numerics(NamedTuple):
    """Bytes of a number in what the forward pass keeps for the backward pass."""

    compute: int
    """In and out of matrix products."""
    residual: int
    """The residual stream, which feeds the norms."""
    own_attention: bool = False
    """Attention's backward pass is that of cpu/attention.py, not PyTorch's."""
    own_swiglu: bool = False
    """SwiGLU's backward pass is that of cpu/kernels.py, not PyTorch's."""


# Autocast leaves the residual stream in fp32.
NUMERICS = {
    "no": Numerics(4, 4),
    "autocast": Numerics(2, 4),
    "cpu": Numerics(4, 4, own_swiglu=True),
    "cpu autocast": Numerics(2, 4, own_attention=True, own_swiglu=True),
}


def layers_of(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of one block, by the names that lora_targets uses."""
    c = config
    width = (c.n_head + 2 * c.n_kv_head) * c.head_width
    up = c.n_inner * (1 if c.family == "gpt2" else 2)  # llama: gate and up in one
    return {
        "qkv": (c.n_embd, width),
        "out": (c.n_embd, c.n_embd),
        "up": (c.n_embd, up),
        "down": (c.n_inner, c.n_embd),
    }


def block_matrices(config: GPTConfig) -> int:
    """Elements of all matrices inside the blocks: gpt2 12 L C^2 (Kaplan 2020, table 1), llama L (2
    C^2 + 2 C K D + 3 C I)."""
    return config.n_layer * sum(inputs * outputs for inputs, outputs in layers_of(config).values())


def parameters(config: GPTConfig, head: Head = "lm") -> int:
    """Parameters, exactly: embeddings, positions (gpt2), blocks with biases and norms, and the head
    (tied: counted once)."""
    c = config
    biases = sum(outputs for name, (_, outputs) in layers_of(c).items() if name in c.biased)
    norm = c.n_embd * (2 if c.family == "gpt2" else 1)
    embeddings = c.n_embd * (c.vocab_size + (c.max_length if c.family == "gpt2" else 0))
    last = c.n_embd if head == "scalar" else 0 if c.tie_embeddings else c.n_embd * c.vocab_size
    return embeddings + block_matrices(c) + c.n_layer * (biases + 2 * norm) + norm + last


def lora_parameters(config: GPTConfig, rank: int, targets: Iterable[str]) -> int:
    """Trainable parameters of LoRA: r (inputs + outputs) for each matrix with an adapter (Hu 2021,
    section 4.1)."""
    layers = layers_of(config)
    return config.n_layer * rank * sum(sum(layers[name]) for name in targets)


def forward_flops(config: GPTConfig, tokens: float, length: float, head_tokens: float = 0) -> float:
    """FLOPs of a forward pass over `tokens` in rows of `length`, with logits at `head_tokens` of
    them.

    2 a matrix element and token, and 4 C T a layer and token for attention (PaLM, appendix B: the
    full T x T square, though half of it is masked); a local layer sees its window. Norms,
    activations and embedding look-ups are left out.
    """
    span = {"full": length, "local": min(length, config.window or length)}
    seen = sum(span[kind] for kind in config.attention_pattern)
    trunk = 2 * block_matrices(config) + 4 * config.n_embd * seen
    return tokens * trunk + head_tokens * 2 * config.n_embd * config.vocab_size


def muon_flops(config: GPTConfig, iterations: int = 5) -> float:
    """FLOPs of one Muon step on the block matrices: Newton-Schulz, each iteration 4 m^2 n + 2 m^3
    with m <= n (Jordan 2024)."""
    sides = [sorted(shape) for shape in layers_of(config).values()]
    return config.n_layer * iterations * sum(4 * m * m * n + 2 * m**3 for m, n in sides)


def activation_bytes(
    config: GPTConfig,
    rows: float,
    length: int,
    numerics: Numerics,
    *,
    masked: bool = False,
    checkpointing: bool = False,
) -> float:
    """Bytes that the trunk's forward pass keeps for its backward pass: rows x length tokens.

    Elements a layer and token: 7 C + 2 K D, and of the MLP 2 I (gpt2: its GELU's input and output)
    or 4 I (llama: gate and value, silu, their product; ours computes silu again). For gpt2 17 C:
    Korthikanti 2022, equation 1 (34 s b h bytes) without its dropout masks and, as attention is
    fused, without 5 a s / h, but with C for what attention returns once more: PyTorch's kernels lay
    it out head by head, as our queries are, and the next matrix reads a copy. (The one for fp32 and
    masks on GPUs does not; it is counted all the same.) Our own attention needs only that copy.
    Dropout adds a byte each for 2 C. `masked`: one mask (B, T, T) for all layers. With
    checkpointing a layer keeps its input, and one layer at a time the rest (Chen 2016; Korthikanti
    2022, section 5).
    """
    c, n = config, numerics
    norms = 2 * c.n_embd * (n.residual + n.compute)  # inputs and outputs
    attention = (c.n_embd + 2 * c.n_kv_head * c.head_width) * n.compute  # queries, keys, values
    attention += c.n_embd * n.compute * (1 if n.own_attention else 2)  # what it returns
    mlp = c.n_inner * (2 if c.family == "gpt2" else 3 if n.own_swiglu else 4) * n.compute
    dropout = 2 * c.n_embd if c.dropout else 0
    layer = norms + attention + mlp + dropout
    kept = c.n_layer * layer
    if checkpointing:
        kept = c.n_layer * c.n_embd * n.residual + layer * (c.n_layer > 0)
    kept += c.n_embd * (n.residual + n.compute)  # of the last norm; input of the head
    kept += length * n.compute if masked else 0
    return rows * length * kept


def kv_cache_bytes(config: GPTConfig, rows: float, length: float, element: int = 4) -> float:
    """Bytes of keys and values: 2 L K D B T elements (Shazeer 2019); fp32 in our rollouts, as the
    weights are."""
    return 2 * config.n_layer * config.n_kv_head * config.head_width * rows * length * element
