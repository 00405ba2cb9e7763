"""nanoGPT's training step, timed: python -m benchmarks.peers.nanogpt '<JSON>'.

Its model, optimizer and parameter groups are imported from a clone, whose path is `clone`; what is
done with them is what its train.py does on a CPU (fp32, not compiled). Further keys: `text` (a
file; its characters, 90 % to train on), `n_layer`, `n_head`, `n_embd`, `block_size`, `batch`,
`steps`, `uncounted` (first steps that the clock leaves out), `bf16` (adds autocast), `warmup` and
`decay_to` of its schedule, and `evaluate`. Else its own settings: no biases, clipping at 1. The
last line is JSON: tokens a second, seconds of training, parameters, loss over the whole held-out
text.
"""

import json
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


def learning_rate(step: int, steps: int, warmup: int, lowest: float) -> float:
    """Linear warm-up, then a cosine to `lowest` at the end."""
    if step < warmup:
        return RATE * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return lowest + 0.5 * (1 + math.cos(math.pi * done)) * (RATE - lowest)


def batch_from(file: str, size: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows from random places; the file is mapped anew for each batch, as nanoGPT does against a
    leak."""
    tokens = np.memmap(file, dtype=np.uint16, mode="r")
    starts = torch.randint(len(tokens) - block, (size,))
    x, y = (
        [torch.from_numpy(tokens[i + shift : i + shift + block].astype(np.int64)) for i in starts]
        for shift in (0, 1)
    )
    return torch.stack(x), torch.stack(y)


@torch.no_grad()
def whole_loss(model: torch.nn.Module, tokens: np.ndarray, block: int, precision) -> float:
    """Mean over all windows of `block` that do not overlap."""
    model.eval()
    rows = (len(tokens) - 1) // block
    x, y = (
        torch.from_numpy(tokens[shift : shift + rows * block].astype(np.int64)).view(rows, block)
        for shift in (0, 1)
    )
    total = 0.0
    for start in range(0, rows, 64):
        with precision():
            _, loss = model(x[start : start + 64], y[start : start + 64])
        total += float(loss) * len(x[start : start + 64])
    return total / rows


class Text(NamedTuple):
    """A text as ids of its characters."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int


def read(file: str) -> Text:
    """The first nine tenths train."""
    text = Path(file).read_text(encoding="utf-8")
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    tokens = np.array([number[character] for character in text], dtype=np.uint16)
    border = int(0.9 * len(tokens))
    return Text(tokens[:border], tokens[border:], len(characters))


def train(model: torch.nn.Module, optimizer, file: str, spec: dict, precision) -> list[float]:
    """The moments at which training begins, at which the clock begins, and at which it ends."""
    size, block = spec["batch"], spec["block_size"]
    x, y = batch_from(file, size, block)
    begin = counted = time.perf_counter()
    for step in range(spec["steps"]):
        if step == spec["uncounted"]:
            counted = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec["steps"], spec["warmup"], spec["decay_to"])
        with precision():
            _, loss = model(x, y)
        x, y = batch_from(file, size, block)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return [begin, counted, time.perf_counter()]


def main(spec: dict) -> None:
    """Train as the JSON says, and print what came of it."""
    sys.path.insert(0, spec["clone"])
    sys.dont_write_bytecode = True  # the clone stays as it is
    from model import GPT, GPTConfig

    text = read(spec["text"])
    torch.manual_seed(1337)
    shape = {key: spec[key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    model = GPT(GPTConfig(**shape, vocab_size=text.vocab_size, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(WEIGHT_DECAY, RATE, BETAS, "cpu")

    def precision():
        """What the forward pass runs in."""
        return torch.autocast("cpu", torch.bfloat16) if spec["bf16"] else nullcontext()

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/train.bin"
        text.train.tofile(file)
        begin, counted, end = train(model, optimizer, file, spec, precision)
    tokens = (spec["steps"] - spec["uncounted"]) * spec["batch"] * spec["block_size"]
    done = {
        "tokens_per_second": tokens / (end - counted),
        "seconds": end - begin,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if spec["evaluate"]:
        done["loss"] = whole_loss(model, text.held_out, spec["block_size"], precision)
    print(json.dumps(done))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
