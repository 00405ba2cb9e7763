"""What one stage of a recipe will do, and what that costs on given GPUs: FLOPs, seconds, memory under each ZeRO stage, disk.

The stages' loops in closed form: whoever changes a loop changes this file, and tests/test_plan.py compares the two. Not
counted: evaluations, samples for the log, reading the data, and the time that GPUs wait for each other (MFU stands for that).
"""

from dataclasses import dataclass
from typing import NamedTuple

from common.costs import (
    GPU,
    LAUNCHES,
    LAUNCHES_OUTSIDE,
    MUON_LAUNCHES,
    NUMERICS,
    activation_bytes,
    block_matrices,
    decoding_seconds,
    forward_flops,
    kv_cache_bytes,
    logits_bytes,
    lora_parameters,
    muon_flops,
    parameters,
    training_flops,
    training_seconds,
)
from common.model import GPTConfig

ROLLOUT_ROWS = 256  # stages/rl/train.py samples at most so many episodes at once
BUCKET = 1e9  # bytes of DeepSpeed's gradient bucket: reduce_bucket_size, by default 5e8 numbers of bf16
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at most, by default (stage3_max_live_parameters)


@dataclass(frozen=True)
class Work:
    """One step of a recipe on `gpus` GPUs. Rows are sequences, except that in reward a row is a prompt with all its answers."""

    step: str
    stage: str  # pretrain, sft, collect, reward, rl
    shape: GPTConfig
    gpus: int
    micro: int  # rows of a micro-batch on one GPU (collect: rows sampled together)
    accumulation: int = 1
    steps: int | None = None  # updates (rl: rollouts); None = not known
    rows: float | None = None  # rows seen in all of them, on all GPUs (rl: episodes)
    answers: float = 1  # sequences a row
    length: int = 0  # tokens of the longest row: decides on memory
    mean_length: float = 0  # of the mean row: decides on FLOPs
    logits: float = 1  # share of a row's tokens at which logits are taken
    precision: str = "bf16"  # no, bf16, fp16
    optimizer: str = "adamw"
    lora_r: int = 0
    lora_targets: tuple[str, ...] = ()
    masked: bool = False  # attention gets a mask: documents in a row, or local layers
    checkpointing: bool = False
    save_steps: int | None = None
    save_total_limit: int = 2
    prompt: float = 0  # tokens (collect, rl)
    response: float = 0
    minibatches: int = 1
    epochs: int = 1  # over each rollout
    ptx_tokens: int = 0  # pretraining tokens beside each PPO update, a GPU
    ptx_length: int = 0
    judge: GPTConfig | None = None  # shape of reward model and critic; None = the policy's
    corpus: float | None = None  # tokens of the shards

    @property
    def trained(self) -> list[tuple[GPTConfig, str]]:
        """The networks that learn, with their heads."""
        if self.stage == "rl":
            return [(self.shape, "lm"), (self.judge or self.shape, "scalar")]
        return [(self.shape, "scalar" if self.stage == "reward" else "lm")]

    @property
    def parameters(self) -> int:
        return sum(parameters(shape, head) for shape, head in self.trained)

    @property
    def frozen(self) -> int:
        """Parameters that only compute: reference and reward model in rl, the sampled model in collect."""
        if self.stage == "rl":
            return self.parameters  # policy and critic have their likes
        return parameters(self.shape) if self.stage == "collect" else 0

    @property
    def trainable(self) -> int:
        if not self.lora_r:
            return 0 if self.stage == "collect" else self.parameters
        adapters = sum(lora_parameters(shape, self.lora_r, self.lora_targets) for shape, _ in self.trained)
        return adapters + sum(shape.n_embd for shape, head in self.trained if head == "scalar")

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """Those that can be chosen: one GPU has nothing to share out, and a DeepSpeed engine takes one optimizer, not Muon
        beside AdamW."""
        return (0,) if self.gpus == 1 or self.optimizer == "muon" else (0, 1, 2, 3)

    @property
    def tokens(self) -> float | None:
        """Tokens that the training (collect: the sampling) reads or writes."""
        return None if self.rows is None else self.rows * self.answers * self.mean_length

    @property
    def rollout_rows(self) -> int:
        """Episodes a GPU samples at once."""
        episodes = self.micro * self.accumulation * self.minibatches
        return self.micro if self.stage == "collect" else min(ROLLOUT_ROWS, episodes)


class Flops(NamedTuple):
    """FLOPs of a whole step on all GPUs."""

    training: float  # forward and backward passes
    scoring: float  # forward passes of whole rows: PPO's log-probs, values and scores
    sampling: float
    optimizer: float  # Muon's; AdamW's are negligible


def flops(work: Work) -> Flops | None:
    """FLOPs of the step; None when it is not known how many rows it sees."""
    w, tokens = work, work.tokens
    if tokens is None:
        return None
    at_head = tokens * w.logits
    optimizer = muon_flops(w.shape) * (w.steps or 0) * w.gpus if w.optimizer == "muon" else 0
    if w.stage in ("pretrain", "sft", "reward"):
        head = 0 if w.stage == "reward" else at_head
        return Flops(training_flops(w.shape, tokens, w.mean_length, head, bool(w.lora_r)), 0, 0, optimizer)
    forward = forward_flops(w.shape, tokens, w.mean_length, at_head)
    if w.stage == "collect":
        return Flops(0, 0, forward, 0)
    values = forward_flops(w.judge or w.shape, tokens, w.mean_length)
    passes = 2 if w.lora_r else 3
    ptx = w.ptx_tokens * (w.steps or 0) * w.gpus * w.minibatches
    mixed_in = passes * forward_flops(w.shape, ptx, w.ptx_length, ptx)
    # An episode is sampled by the policy; scored by policy, reference, critic, reward model; learned by policy and critic.
    return Flops(w.epochs * (passes * (forward + values) + mixed_in), 2 * (forward + values), forward, 0)


def seconds(work: Work, gpu: GPU, mfu: float, zero: int = 0) -> tuple[float, str] | None:
    """(wall time, what most of it is bound by); None when the number of rows is not known."""
    w, counted = work, flops(work)
    if counted is None or w.rows is None:
        return None
    peak = gpu.fp32_flops if w.precision == "no" else gpu.flops
    sequences, layers = w.rows * w.answers / w.gpus, w.shape.n_layer
    parts = []
    if w.stage != "collect":
        passes = sequences / (w.micro * w.answers) * len(w.trained) * w.epochs
        launches = passes * (LAUNCHES[w.shape.family][0] * layers + LAUNCHES_OUTSIDE[0])
        launches += (w.steps or 0) * layers * MUON_LAUNCHES if w.optimizer == "muon" else 0
        again = 4 / 3 if w.checkpointing else 1  # checkpointing: the forward pass once more
        total = counted.training * again + counted.scoring + counted.optimizer
        parts.append(training_seconds(total, launches * again, w.gpus, peak, mfu))
    if w.stage in ("collect", "rl"):
        # Our rollouts run in fp32, as the weights are; under DeepSpeed the weights are bf16.
        rate, element = (gpu.flops, 2) if zero else (gpu.fp32_flops, 4)
        time, bound = decoding_seconds(w.shape, w.rollout_rows, w.prompt, w.response, gpu, rate, mfu, element)
        parts.append((time * sequences / w.rollout_rows, bound))
    return sum(time for time, _ in parts), max(parts)[1]


class Memory(NamedTuple):
    """Bytes on one GPU. Not all are alive together: `peak` is the most that is."""

    weights: float  # of what learns
    gradients: float
    optimizer: float
    frozen: float  # weights of what does not
    buffers: float  # autocast's bf16 copies of weights, buckets of DDP or DeepSpeed, what ZeRO-3 has gathered
    activations: float
    logits: float
    rollout: float  # KV cache and the logits of a sampling step
    peak: float


def memory(work: Work, zero: int = 0, on_cpu: bool = False) -> Memory:
    """Memory a GPU. `zero` 0 is what our code does without DeepSpeed, 1-3 is DeepSpeed's layout.

    Without: fp32 weights, gradients and AdamW's two moments, 4 + 4 + 8 bytes a parameter, and 2 for autocast's copies, 4 for
    DDP's buckets. DeepSpeed in bf16: 2 + 2 + 12, where 12 are fp32 weights and moments; stage 1 shares out the 12 among the
    GPUs, 2 also the gradients, 3 also the weights (ZeRO, section 3.1 and figure 1). Muon has one moment (4 bytes) on block
    matrices. Reference and reward model stay whole and fp32 on every GPU, at every stage, as our code keeps them.
    """
    w, shards = work, work.gpus
    half, total, learning = w.precision != "no", w.parameters, w.trainable
    muon = block_matrices(w.shape) if w.optimizer == "muon" else 0
    moments = 8 * learning - 4 * muon
    if w.stage == "collect":
        total = 0
    if zero == 0:
        weights, gradients, optimizer = 4 * total, 4 * learning, moments
        buffers = 4 * learning if shards > 1 else 0
        copies = 2 * total if half else 0
    else:
        weights = 2 * total / (shards if zero == 3 else 1)
        gradients = 2 * learning / (shards if zero >= 2 else 1)
        optimizer = (4 * learning + moments) / shards
        buffers, copies = BUCKET, min(2 * total, 2 * LIVE) if zero == 3 else 0
    frozen = 4 * w.frozen

    numerics = NUMERICS["deepspeed"] if zero else NUMERICS[("cpu " * on_cpu + "autocast" * half).strip() or "no"]
    rows, activations, logits, rollout = w.micro * w.answers, 0.0, 0.0, 0.0
    if w.stage != "collect":
        activations = sum(
            activation_bytes(shape, rows, w.length, numerics, masked=w.masked, checkpointing=w.checkpointing)
            for shape, _ in w.trained
        )
        positions = rows * (w.response if w.stage == "rl" else w.length * w.logits)
        loss = {"pretrain": "cross_entropy", "rl": "ppo"}.get(w.stage, "logprobs")
        logits = 0 if w.stage == "reward" else logits_bytes(positions, w.shape.vocab_size, loss)
        if w.ptx_tokens:  # split over the micro-batches of an update; documents do not see each other
            part = w.ptx_tokens / w.accumulation
            rows = part / w.ptx_length
            activations += activation_bytes(w.shape, rows, w.ptx_length, numerics, masked=True, checkpointing=w.checkpointing)
            logits += logits_bytes(part, w.shape.vocab_size, "logprobs")
    if w.stage in ("collect", "rl"):
        element = 2 if zero and w.stage == "rl" else 4
        # A batch that shrinks is copied: the old cache and at most 80 % of it. Picking a token: 5 fp32 copies of the logits.
        rollout = 1.8 * kv_cache_bytes(w.shape, w.rollout_rows, w.prompt + w.response, element)
        rollout += 20 * w.rollout_rows * w.shape.vocab_size
    gathered = 2 * parameters(w.shape) if zero == 3 and w.stage == "rl" else 0  # once for all tokens of a rollout
    # Gradients are born while activations die, unless an earlier micro-batch has left its own.
    early = gradients if w.accumulation > 1 else 0
    learn = copies + max(early + activations + logits, gradients)
    peak = weights + optimizer + frozen + buffers + max(learn, rollout + gathered)
    return Memory(weights, gradients, optimizer, frozen, buffers + copies, activations, logits, rollout, peak)


def disk(work: Work, zero: int = 0) -> tuple[float, float]:
    """(bytes that stay, most bytes at any time): published fp32 weights, token shards, and states, which go at the end.

    A state is weights and optimizer, 4 + 8 bytes a parameter (DeepSpeed: 2 + 12); one more is written before the oldest goes.
    """
    w = work
    if w.stage == "collect":
        return 0, 0
    kept = 4 * w.parameters
    if w.corpus is not None:
        kept += w.corpus * (2 if w.shape.vocab_size <= 1 << 16 else 4)
    muon = 4 * block_matrices(w.shape) if w.optimizer == "muon" else 0
    state = (2 if zero else 4) * w.parameters + (12 if zero else 8) * w.trainable - muon
    saves = (w.steps - 1) // w.save_steps if w.steps and w.save_steps else 0
    return kept, kept + state * min(w.save_total_limit + 1, saves)
