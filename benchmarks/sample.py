"""Sampling with a cache, common.model.sample.sample beside transformers' generate: new tokens a
second.

    python -m benchmarks.sample

Same weights (a random Llama of ours, opened by transformers), prompts of 32 tokens, 64 new ones,
temperature 1, no end token: every row runs to full length. The ratio is that of the headline batch
(--batch); `batches` has all sizes. `same_greedy`: whether both give the same tokens at temperature
0 in fp32.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.side_by_side import arguments, side_by_side, start
from benchmarks.workload import (
    by_precision,
    letters,
    llama,
    random_llama,
    shape_arguments,
    write_model,
)
from common.handoff.publish import load_model
from common.model.costs import forward_flops
from common.model.sample import sample
from common.model.shape import GPTConfig


class Bench:
    """Both models, the prompts, and the figures of each batch size."""

    def __init__(self, args: argparse.Namespace, config: GPTConfig) -> None:
        """Make the model, and let both sides open it."""
        self.args, self.sizes = args, sorted({args.batch, *args.batches})
        self.figures: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.batches: dict[str, dict[int, int]] = {}  # medians; the first figure is warm-up
        torch.manual_seed(1)
        shape = (max(self.sizes), args.prompt_tokens)
        self.prompts = torch.randint(args.vocab_size - 5, shape)
        precisions = dict.fromkeys(("fp32", *args.precisions))
        with tempfile.TemporaryDirectory() as scratch:
            model, tokenizer = random_llama(config), letters(args.vocab_size)
            folder = write_model(Path(scratch) / "model", model, tokenizer)
            self.mine = {p: load_model(folder).to(dtype(p)) for p in precisions}
            opened = AutoModelForCausalLM.from_pretrained
            self.theirs = {p: opened(folder, dtype=dtype(p)).eval() for p in precisions}
        for model in self.theirs.values():
            model.generation_config.eos_token_id = None

    def sampled(self, precision: str, rows: int, temperature: float = 1.0) -> list[list[int]]:
        """The ids that our model goes on with."""
        answers = sample(
            self.mine[precision],
            self.prompts[:rows].tolist(),
            max_new_tokens=self.args.new_tokens,
            temperature=temperature,
            batch_size=rows,
        )
        return [answer.ids for answer in answers]

    @torch.inference_mode()
    def generated(self, precision: str, rows: int, temperature: float = 1.0) -> list[list[int]]:
        """The ids that theirs goes on with."""
        chosen = self.prompts[:rows]
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        how["max_new_tokens"] = self.args.new_tokens
        out = self.theirs[precision].generate(chosen, attention_mask=torch.ones_like(chosen), **how)
        return out[:, self.args.prompt_tokens :].tolist()

    def same_greedy(self) -> bool:
        """Whether both give the same tokens at temperature 0 in fp32."""
        largest = self.sizes[-1]
        return self.sampled("fp32", largest, 0.0) == self.generated("fp32", largest, 0.0)

    def ours(self, precision: str) -> float:
        """New tokens a second of the headline batch, ours."""
        return self.timed(f"ours {precision}", precision)

    def transformers(self, precision: str) -> float:
        """New tokens a second of the headline batch, theirs."""
        return self.timed(f"transformers {precision}", precision)

    def timed(self, name: str, precision: str) -> float:
        """Time all batch sizes and note their figures; that of the headline batch."""
        run, new = self.sampled if name.startswith("ours") else self.generated, self.args.new_tokens
        for rows in self.sizes:
            begin = time.perf_counter()
            answers = run(precision, rows)
            self.figures[name][rows].append(rows * new / (time.perf_counter() - begin))
            if any(len(answer) != new for answer in answers):
                raise RuntimeError(f"{name}: an answer is shorter than {new} tokens")
        found = self.figures[name]
        self.batches[name] = {
            rows: round(statistics.median(each[1:] or each)) for rows, each in found.items()
        }
        return found[self.args.batch][-1]


def main() -> None:
    """Make the models, compare what they say, time them."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="rows at a time of the headline")
    others = "other numbers of rows, also timed"
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 256], help=others)
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens in a prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to sample")
    shape_arguments(parser)
    args = start(parser)
    disable_progress_bar()
    new, config = args.new_tokens, llama(args, 256)
    bench = Bench(args, config)
    sides = by_precision("ours", args.precisions, bench.ours)
    sides |= by_precision("transformers", args.precisions, bench.transformers)
    positions = args.prompt_tokens + new - 1
    side_by_side(
        "sample",
        "new tokens/s",
        sides,
        runs=args.runs,
        alone=args.alone,
        batch=args.batch,
        batches=bench.batches,
        same_greedy=bench.same_greedy(),
        flops_per_unit=forward_flops(config, positions, (positions + 1) / 2, new) / new,
    )


def dtype(precision: str) -> torch.dtype:
    """The precision's name in torch."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


if __name__ == "__main__":
    main()
