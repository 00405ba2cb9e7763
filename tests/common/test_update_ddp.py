"""update() in two processes (DDP over gloo) gives the weights of one process: the yardstick is a plain row-by-row step.

This file is also the job that the processes run: python -m torch.distributed.run --standalone --nproc_per_node 2 FILE OUT
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
# Batches of ragged rows. The second gives rank 1 one micro-batch fewer, the third one row only to each.
BATCHES = [[40, 2, 3, 2, 17, 5, 5, 31, 2, 2, 2, 2, 60, 9, 8, 7], [50, 3, 4, 2, 2], [30, 2], [12, 2, 2, 40]]
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5),
}


def model_of(family: str):
    from common.model import GPT, GPTConfig

    torch.manual_seed(3)
    heads = {"n_kv_head": 2} if family == "llama" else {}
    model = GPT(GPTConfig(family=family, vocab_size=90, max_length=64, n_layer=2, n_head=4, n_embd=32, n_inner=64, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def rows_of(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 90, (n,), generator=generator) for n in lengths]


def job(out: str) -> None:
    """One process: its interleaved share of every batch, in micro-batches of 2."""
    from accelerate import Accelerator

    from common.data import share
    from common.optim import update

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    result = {"processes": accelerator.num_processes}
    for family in ("gpt2", "llama"):
        for name, make in OPTIMIZERS.items():
            raw = model_of(family)
            model, optimizer = accelerator.prepare(raw, make(raw.parameters()))

            def loss(batch, model=model):
                ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
                logits = model(ids[:, :-1].clamp(min=0))
                return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")[None]

            log = []
            for lengths in BATCHES:
                micro_batches = list(share(rows_of(lengths), accelerator.process_index, accelerator.num_processes, 2))
                counts = torch.tensor([sum(len(row) - 1 for batch in micro_batches for row in batch)])
                done = update(accelerator, model, [optimizer], micro_batches, loss, counts, 0.5 if name == "sgd" else 1e9)
                log.append((done.losses[0], done.grad_norm))
            result[f"{family} {name}"] = {"weights": raw.state_dict(), "log": log}
    torch.save(result, f"{out}/{accelerator.process_index}.pt")
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def plain(family: str, name: str) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Each batch whole, row by row, unpadded, divided once by its tokens."""
    model, log = model_of(family), []
    optimizer = OPTIMIZERS[name](model.parameters())
    for lengths in BATCHES:
        optimizer.zero_grad()
        rows = rows_of(lengths)
        losses = [F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum") for row in rows]
        loss = sum(losses) / sum(len(row) - 1 for row in rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5 if name == "sgd" else 1e9)
        optimizer.step()
        log.append((loss.item(), norm.item()))
    return model.state_dict(), log


def test_two_processes_equal_one(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*launcher, __file__, tmp_path], env=env, cwd=ROOT, stdout=log, stderr=log)
        try:
            code = process.wait(timeout=100)
        except subprocess.TimeoutExpired:
            code = "none, it hung"
            process.terminate()  # the launcher ends its workers
            process.wait(timeout=60)
    assert code == 0, f"exit code {code}: {(tmp_path / 'log').read_text()[-3000:]}"
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [result["processes"] for result in results] == [2, 2]
    for family in ("gpt2", "llama"):
        start = model_of(family).state_dict()
        for name in OPTIMIZERS:
            weights, log = plain(family, name)
            moved = max(float((weights[key] - start[key]).abs().max()) for key in start)
            assert moved > 2e-3
            for result in results:
                got = result[f"{family} {name}"]
                far = max(float((weights[key] - got["weights"][key]).abs().max()) for key in start)
                assert far < 1e-3 * moved, f"{family} {name}"
                for (loss, norm), (expected_loss, expected_norm) in zip(got["log"], log, strict=True):
                    assert abs(loss - expected_loss) < 1e-4 * expected_loss
                    assert abs(norm - expected_norm) < 1e-3 * expected_norm


if __name__ == "__main__":
    job(sys.argv[1])
