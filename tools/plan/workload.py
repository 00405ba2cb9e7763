"""What one stage of a recipe will do, and what that costs on given GPUs: FLOPs, seconds, memory
under each ZeRO stage, disk.

The stages' loops in closed form: whoever changes a loop changes this file;
tests/tools/plan/test_workload.py compares the two. Not counted: evaluations, samples for the log,
reading data, and the time that GPUs wait for each other (MFU stands for that).
"""

from dataclasses import dataclass
from typing import NamedTuple

from common.model.costs import (
    GPU,
    NUMERICS,
    Head,
    activation_bytes,
    block_matrices,
    forward_flops,
    kv_cache_bytes,
    layers_of,
    lora_parameters,
    muon_flops,
    parameters,
)
from common.model.logprobs import at_once
from common.model.shape import GPTConfig
from stages.rl.rollout import ROLLOUT_ROWS

# seconds PyTorch takes to start one kernel without compilation: an order of magnitude, assumed
LAUNCH = 5e-6
# Kernels that our Block starts on a GPU: (forward and backward under autocast, one cached decoding
# step), counted by dispatch with views left out; and outside the blocks.
LAUNCHES = {"gpt2": (55, 14), "llama": (65, 21)}
LAUNCHES_OUTSIDE = (40, 30)
# Of an update, a block: 4 matrices, 5 iterations of 3 products each, and what is around them.
MUON_LAUNCHES = 4 * 25
# Most bytes alive at once around a logit in kernels.linear_logprobs, measured on PyTorch 2.13: four
# fp32 copies, where a temperature is not 1 and more tokens have gone before (logits, divided,
# log-softmax, and theirs); at 1 it is 12, in bf16 10; where kernels.c does it, less.
LOGIT_BYTES = 16
PICK_BYTES = 20  # of a logit from which a token is sampled: five fp32 copies
BUCKET = 2e9  # bytes of DeepSpeed's gradient bucket: reduce_bucket_size, 5e8 numbers of fp32
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at most, by default (stage3_max_live_parameters)


@dataclass(frozen=True)
class Work:
    """One step of a recipe on `gpus` GPUs. Rows are sequences, except that in reward a row is a
    prompt with all its answers."""

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
    sampled: int = ROLLOUT_ROWS  # episodes that a GPU samples at once, at most
    ptx_tokens: int = 0  # pretraining tokens beside each PPO update, a GPU
    ptx_length: int = 0
    judge: GPTConfig | None = None  # shape of the reward model; None = the policy's
    critic: GPTConfig | None = None  # None = the reward model's
    corpus: float | None = None  # tokens of the shards

    @property
    def networks(self) -> list[tuple[GPTConfig, Head]]:
        """Those that learn (collect: that is sampled), with their heads."""
        if self.stage == "rl":
            return [(self.shape, "lm"), (self.critic or self.judge or self.shape, "scalar")]
        return [(self.shape, "scalar" if self.stage == "reward" else "lm")]

    @property
    def parameters(self) -> int:
        """Of the networks that learn."""
        return sum(parameters(shape, head) for shape, head in self.networks)

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient: with LoRA the adapters and the scalar heads."""
        if not self.lora_r:
            return 0 if self.stage == "collect" else self.parameters
        adapters = sum(
            lora_parameters(shape, self.lora_r, self.lora_targets) for shape, _ in self.networks
        )
        return adapters + sum(shape.n_embd for shape, head in self.networks if head == "scalar")

    @property
    def moments(self) -> float:
        """Bytes of the optimizer's moments in fp32: two with AdamW, one with Muon, which has the
        matrices of the blocks."""
        return 8 * self.trainable - (
            4 * block_matrices(self.shape) if self.optimizer == "muon" else 0
        )

    @property
    def sampled_bytes(self) -> int:
        """Bytes of a number of the model that is sampled from."""
        return 2 if self.stage == "rl" and self.precision != "no" else 4

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """Those that can be chosen: one GPU has nothing to share out."""
        return (0,) if self.gpus == 1 else (0, 1, 2, 3)

    @property
    def batch(self) -> int:
        """Rows of one of the `steps`, on all GPUs."""
        return self.micro * self.accumulation * self.minibatches * self.gpus

    @property
    def tokens(self) -> float | None:
        """Tokens that the training (collect: the sampling) reads or writes."""
        return None if self.rows is None else self.rows * self.answers * self.mean_length

    @property
    def rollout_rows(self) -> int:
        """Episodes a GPU samples at once."""
        return self.micro if self.stage == "collect" else min(self.sampled, self.batch // self.gpus)


class Flops(NamedTuple):
    """FLOPs of a whole step on all GPUs."""

    training: float = 0  # forward and backward passes
    scoring: float = 0  # forward passes of whole rows: PPO's log-probs, values and scores
    sampling: float = 0
    optimizer: float = 0  # Muon's; AdamW's are negligible
    # in the backward pass: logits, with gradient_checkpointing also the blocks' forward passes
    recomputing: float = 0


def flops(work: Work) -> Flops | None:
    """FLOPs of the step; None when it is not known how many rows it sees.

    Forward and backward are 3 forward passes (PaLM, appendix B); 2 with LoRA, where weights get no
    gradient. Recomputing is one more: of the logits, which are never kept, and of the blocks where
    they are checkpointed.
    """
    w, tokens, passes = work, work.tokens, 2 if work.lora_r else 3
    if tokens is None:
        return None
    forward = forward_flops(w.shape, tokens, w.mean_length, tokens * w.logits)
    if w.stage == "collect":
        return Flops(sampling=forward)
    updates = (w.steps or 0) * w.gpus * w.minibatches
    if w.stage != "rl":
        again = forward_flops(
            w.shape, tokens if w.checkpointing else 0, w.mean_length, tokens * w.logits
        )
        muon = muon_flops(w.shape) * updates if w.optimizer == "muon" else 0
        return Flops(passes * forward, optimizer=muon, recomputing=again)
    judge, critic = w.judge or w.shape, w.networks[1][0]
    values, scores = (forward_flops(shape, tokens, w.mean_length) for shape in (critic, judge))
    corpus = w.ptx_tokens * updates
    ptx = forward_flops(w.shape, corpus, w.ptx_length, corpus)
    logits = forward_flops(w.shape, 0, 0, tokens * w.logits + corpus)
    # An episode is sampled by the policy; scored by policy, reference, critic, reward model;
    # learned by policy and critic.
    learned = forward + values + ptx
    again = w.epochs * (learned if w.checkpointing else logits)
    return Flops(
        w.epochs * passes * learned, 2 * forward + values + scores, forward, recomputing=again
    )


def seconds(work: Work, gpu: GPU, mfu: float) -> tuple[float, str] | None:
    """(wall time, what most of it is bound by); None when the number of rows is not known.

    Training runs at `mfu` of the peak FLOP/s (PaLM, section 4.1), recomputing as well, but no
    faster than a GPU starts its kernels. A token that is sampled for all rows of a rollout takes
    the longest of its arithmetic, reading all weights and the mean KV cache once at 70 % of the
    bandwidth (Pope 2022, section 2), and starting its kernels; rows that end early are counted in
    full. PPO samples from a copy in the precision of training, collect in fp32.
    """
    w, c, counted, training, sampling = work, work.shape, flops(work), (0.0, ""), (0.0, "")
    if counted is None or w.rows is None:
        return None
    if w.stage != "collect":
        again = 4 / 3 if w.checkpointing else 1  # about: the forward pass once more
        rate = (gpu.fp32_flops if w.precision == "no" else gpu.flops) * mfu * w.gpus
        launches = w.rows / (w.gpus * w.micro) * len(w.networks) * w.epochs * again
        launches *= LAUNCHES[c.family][0] * c.n_layer + LAUNCHES_OUTSIDE[0]
        launches += (w.steps or 0) * c.n_layer * MUON_LAUNCHES if w.optimizer == "muon" else 0
        arithmetic = sum(counted) - counted.sampling
        training = max((arithmetic / rate, "arithmetic"), (launches * LAUNCH, "kernel launches"))
    if w.response:
        element = w.sampled_bytes
        rate = (gpu.flops if element == 2 else gpu.fp32_flops) * mfu
        rows, mean = w.rollout_rows, w.prompt + w.response / 2
        read = element * (block_matrices(c) + c.n_embd * c.vocab_size) + kv_cache_bytes(
            c, rows, mean, element
        )
        launches = LAUNCHES[c.family][1] * c.n_layer + LAUNCHES_OUTSIDE[1]
        token, bound = max(
            (forward_flops(c, rows, mean, rows) / rate, "sampling: arithmetic"),
            (read / (0.7 * gpu.bandwidth), "sampling: memory bandwidth"),
            (launches * LAUNCH, "sampling: kernel launches"),
        )
        together = forward_flops(c, rows * w.prompt, w.prompt) / rate + w.response * token
        sampling = (w.rows * w.answers / w.gpus / rows * together, bound)
    return training[0] + sampling[0], max(training, sampling)[1]


class Memory(NamedTuple):
    """Bytes on one GPU. Not all are alive together: `peak` is the most that is."""

    weights: float  # of what learns
    gradients: float
    optimizer: float  # moments, and under ZeRO-1 and -2 DeepSpeed's own copy of the weights
    # weights of what only computes: in rl reference, reward model and the copy of the policy that
    # is sampled from, in collect the sampled model
    frozen: float
    # autocast's bf16 copies of weights, buckets of DDP or DeepSpeed, what ZeRO-3 has gathered
    buffers: float
    activations: float
    # of a few tokens at a time, and the gradient of the head's weight, which activations outlive
    logits: float
    rollout: float  # KV cache and the logits of a sampling step
    # what publishing adds: a whole model under ZeRO-3, with LoRA its merged weights
    publish: float
    peak: float


def memory(work: Work, zero: int = 0, on_cpu: bool = False) -> Memory:
    """Memory a GPU, or of a process `on_cpu`, as our code holds it; `zero` is DeepSpeed's stage.

    Weights, gradients and AdamW's two moments are fp32 everywhere, 4 + 4 + 8 bytes a parameter, and
    half precision is autocast's, 2 more for its copies. ZeRO-1 and -2 keep 4 more of what they
    share out, as the optimizer has weights of its own. ZeRO-3 shares out all weights, those of
    reference and reward model too; but where a model is started, sampled from or published, every
    process has it whole.
    """
    held, frozen = learner_bytes(work, zero, on_cpu), frozen_bytes(work, zero, on_cpu)
    activations, logits = pass_bytes(work, on_cpu)
    stays = held.weights + held.optimizer + held.buckets + frozen
    return Memory(
        held.weights,
        held.gradients,
        held.optimizer,
        frozen,
        held.buckets + held.passing,
        activations,
        logits,
        rollout_bytes(work),
        publish_bytes(work, zero),
        peak=max(stays + max(phases(work, zero, on_cpu)), start_bytes(work, zero)),
    )


class Phases(NamedTuple):
    """Bytes on one GPU beyond those that stay, at different times."""

    learn: float
    rollout: float
    publish: float


def phases(work: Work, zero: int = 0, on_cpu: bool = False) -> Phases:
    """The most that each of them takes."""
    held, pass_ = learner_bytes(work, zero, on_cpu), sum(pass_bytes(work, on_cpu))
    # Gradients are born while activations die, unless an earlier micro-batch has left its own.
    early = held.gradients if work.accumulation > 1 else 0
    learn = held.passing + max(early + pass_, held.gradients)
    rollout = rollout_bytes(work)
    if work.stage == "rl":  # before it the copy is refreshed, then answers are scored
        refreshed = whole_bytes(work, work.shape, zero)
        rollout = max(rollout, refreshed, gathered_bytes(work.parameters, zero))
    return Phases(learn, rollout, publish_bytes(work, zero))


class Learner(NamedTuple):
    """Bytes on one GPU of what learns."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float  # that stay
    passing: float  # buckets and copies of weights that are gone after an update


def learner_bytes(work: Work, zero: int, on_cpu: bool) -> Learner:
    """What the networks that learn take without activations."""
    total, learning = 0 if work.stage == "collect" else work.parameters, work.trainable
    copies = 2 * total if work.precision != "no" else 0
    if not zero:
        buckets = 4 * learning if work.gpus > 1 else 0
        return Learner(4 * total, 4 * learning, work.moments, buckets, copies)
    part = 4 * learning / work.gpus
    # What is reduced is copied for the step, once more as one tensor. ZeRO-1 adds up micro-batches
    # before it reduces.
    gradients = 2 * part + (4 * learning if zero == 1 and work.accumulation > 1 else 0)
    full = min(BUCKET, 4 * learning)
    bucket = full if on_cpu else BUCKET  # a CPU's takes what is written to it
    moments = work.moments / work.gpus
    if zero < 3:
        return Learner(4 * total, gradients, part + moments, 0, bucket + copies)
    # A full bucket is laid out anew before each process gets its part.
    passing = gathered_bytes(total, zero) + full + copies
    return Learner(4 * total / work.gpus, gradients, moments, bucket, passing)


def gathered_bytes(count: float, zero: int) -> float:
    """What ZeRO-3 has put together of so many parameters while it computes with them."""
    return 4 * min(count, LIVE) if zero == 3 else 0


def judges_bytes(work: Work, zero: int) -> float:
    """PPO's reference and reward model."""
    if work.stage != "rl":
        return 0.0
    count = parameters(work.shape) + parameters(work.judge or work.shape, "scalar")
    return 4 * count / (work.gpus if zero == 3 else 1)


def frozen_bytes(work: Work, zero: int, on_cpu: bool) -> float:
    """Weights of what only computes."""
    policy = parameters(work.shape)
    if work.stage == "collect":
        return 4 * policy
    copied = work.stage == "rl" and (zero == 3 or work.precision != "no")
    copy = work.sampled_bytes * policy if copied else 0
    # In bf16 a CPU also has its matrices as the matrix units want them.
    packed = 2 * policy if on_cpu and copied and work.precision != "no" else 0
    return judges_bytes(work, zero) + copy + packed


def whole_bytes(work: Work, shape: GPTConfig, zero: int) -> float:
    """What it takes to have all weights of a model at hand on every GPU: those that ZeRO-3 gathers,
    and with LoRA the sums of weights and adapters."""
    gathered = 4 * parameters(shape) if zero == 3 else 0
    layers = layers_of(shape)
    targets = sum(layers[name][0] * layers[name][1] for name in work.lora_targets)
    return gathered + (4 * shape.n_layer * targets if work.lora_r else 0)


def publish_bytes(work: Work, zero: int) -> float:
    """What publishing adds for the largest model, and under ZeRO-3 the samples for the log, which
    come from a whole copy."""
    if work.stage == "collect":
        return 0.0
    size = max(whole_bytes(work, shape, zero) for shape, _ in work.networks)
    sampled = zero == 3 and work.stage in ("pretrain", "sft")
    return size + (4 * parameters(work.shape) if sampled else 0)


def start_bytes(work: Work, zero: int) -> float:
    """What there is before DeepSpeed splits it: ZeRO-3 first takes all that learns to the GPU."""
    return 4 * work.parameters + judges_bytes(work, zero) if zero == 3 else 0.0


def pass_bytes(work: Work, on_cpu: bool) -> tuple[float, float]:
    """Bytes on one GPU of (activations, logits) of a forward and backward pass."""
    kind = ("cpu " * on_cpu + "autocast" * (work.precision != "no")).strip() or "no"
    numerics = NUMERICS[kind]
    rows = work.micro * work.answers
    part = work.ptx_tokens / work.accumulation  # ptx is split over an update's micro-batches
    passes = [(shape, rows, work.length, work.masked) for shape, _ in work.networks]
    if work.stage == "collect":
        passes = []
    if part:  # documents do not see each other
        passes.append((work.shape, part / work.ptx_length, work.ptx_length, True))
    activations = sum(
        activation_bytes(
            shape, n, length, numerics, masked=masked, checkpointing=work.checkpointing
        )
        for shape, n, length, masked in passes
    )
    if work.stage not in ("pretrain", "sft", "rl"):
        return activations, 0.0
    learned = work.response if work.stage == "rl" else work.length * work.logits
    positions = max(part, rows * learned)
    alive = min(positions, at_once("cpu" if on_cpu else "cuda", work.shape.vocab_size))
    # The weight's gradient in fp32, which all activations outlive, and what a few tokens add to it.
    gradient = 0 if work.lora_r else work.shape.n_embd * (4 + numerics.compute)
    return activations, work.shape.vocab_size * (LOGIT_BYTES * alive + gradient)


def rollout_bytes(work: Work) -> float:
    """Bytes on one GPU while answers are sampled: caches and logits."""
    if not work.response:
        return 0.0
    # A batch that shrinks is copied: the old cache and at most 80 % of it.
    tokens = work.prompt + work.response
    size = 1.8 * kv_cache_bytes(work.shape, work.rollout_rows, tokens, work.sampled_bytes)
    return size + PICK_BYTES * work.rollout_rows * work.shape.vocab_size


def disk(work: Work) -> tuple[float, float]:
    """(bytes that stay, most bytes at any time): published fp32 weights, token shards, and states,
    which go at the end.

    A state is what trains and its moments, 4 + 8 bytes a parameter, with DeepSpeed or without; one
    more is written before the oldest goes.
    """
    w = work
    if w.stage == "collect":
        return 0, 0
    kept = 4 * w.parameters + (w.corpus or 0) * (2 if w.shape.vocab_size <= 1 << 16 else 4)
    state = 4 * w.trainable + w.moments
    saves = (w.steps - 1) // w.save_steps if w.steps and w.save_steps else 0
    return kept, kept + state * min(w.save_total_limit + 1, saves)
