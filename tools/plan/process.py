"""What a process on a CPU takes at most: the tensors that `memory` counts, and what loading, files,
the C library and gloo add to them there.

It is how `memory` is held against real runs, which `python -m benchmarks.plan` does. The constants
come from those runs (glibc 2.36, DeepSpeed 0.19.8, safetensors 0.8).
"""

from common.model.costs import block_matrices, parameters
from common.model.families import family_of
from common.model.shape import GPTConfig
from tools.plan.workload import BUCKET, Work, learner_bytes, memory, phases, whole_bytes

# Bytes a parameter.
LOADED = 4  # of a model's weights between its file and the model
MAPPED = 4  # of the file itself, while it is loaded
WRITTEN = 8  # of a file to publish: in safetensors' memory, and once more as Python's bytes
TRANSPOSED = 4  # of such a file, where its family stores matrices the other way round


def process_bytes(work: Work, zero: int = 0) -> float:
    """The most memory of the process that publishes, beyond that after all imports.

    Freed memory is kept (common/program/allocator.py), but glibc finds no room for an aligned
    tensor where one of the same size has been: what was freed before training is not used again.
    """
    held, of_learner = memory(work, zero, on_cpu=True), learner_bytes(work, zero, on_cpu=True)
    stays = held.weights + held.optimizer + of_learner.buckets + held.frozen
    found = phases(work, zero, on_cpu=True)
    learn = max(found.learn + reduced_bytes(work, zero), found.rollout, found.publish)
    networks = [(shape, 4 * parameters(shape, head)) for shape, head in work.networks]
    publish = max(written_bytes(work, shape, size, zero) for shape, size in networks)
    largest = max(size for _, size in networks)
    if zero:  # DeepSpeed's buckets are so large that glibc hands them back to the system
        most = max(learn, publish)
    else:  # one of the file's two copies finds room in what training has freed
        most = max(learn, learn + publish - min(largest, learn))
    loading = stays + (LOADED + MAPPED) / 4 * largest
    return max(left_bytes(work, zero) + stays + most, loading)


def left_bytes(work: Work, zero: int) -> float:
    """What lies unused from before training: weights on their way from file to model, and weights
    that DeepSpeed has laid out anew, under ZeRO-3 whole and in pieces."""
    largest = max(parameters(shape, head) for shape, head in work.networks)
    loaded = LOADED * largest if work.stage != "pretrain" else 0
    if not zero:
        return loaded
    if zero < 3:
        return loaded + 4 * work.trainable
    return loaded + 4 * work.parameters + 4 * work.trainable / work.gpus


def reduced_bytes(work: Work, zero: int) -> float:
    """A copy of DeepSpeed's bucket of gradients, that gloo adds up in."""
    return min(BUCKET, 4 * work.trainable) if zero else 0


def written_bytes(work: Work, shape: GPTConfig, size: float, zero: int) -> float:
    """What it takes to write the file of a model of `size` bytes."""
    transposed = TRANSPOSED * block_matrices(shape) if family_of(shape).transposed else 0
    return whole_bytes(work, shape, zero) + WRITTEN / 4 * size + transposed
