"""Sampling with a cache, common.model.sample.sample beside transformers' generate: new tokens a
second.

    python -m benchmarks.sample

Same weights (a random Llama of ours, opened by transformers), prompts of 32 tokens, 64 new ones,
temperature 1, no end token: every row runs to full length. The ratio is that of the headline batch
(--batch); `batches` has all sizes. `same_greedy`: whether both give the same tokens at temperature
0 in fp32.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="rows at a time of the headline")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[1, 16, 256],
        help="other numbers of rows, also timed",
    )
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens in a prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to sample")
    shape_arguments(parser)
    args = start(parser)
    disable_progress_bar()
    new, config = args.new_tokens, llama(args, 256)
    sizes = sorted({args.batch, *args.batches})
    torch.manual_seed(1)
    prompts = torch.randint(args.vocab_size - 5, (max(sizes), args.prompt_tokens))

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(
            Path(scratch) / "model", random_llama(config), letters(args.vocab_size)
        )
        mine = {
            precision: load_model(folder).to(dtype(precision))
            for precision in ("fp32", *args.precisions)
        }
        theirs = {
            p: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype(p)).eval() for p in mine
        }
    for model in theirs.values():
        model.generation_config.eos_token_id = None

    def ours(precision: str, rows: int, temperature: float = 1.0) -> list[list[int]]:
        chosen = prompts[:rows].tolist()
        answers = sample(
            mine[precision], chosen, max_new_tokens=new, temperature=temperature, batch_size=rows
        )
        return [answer.ids for answer in answers]

    @torch.inference_mode()
    def transformers(precision: str, rows: int, temperature: float = 1.0) -> list[list[int]]:
        chosen = prompts[:rows]
        how = {"do_sample": True, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        out = theirs[precision].generate(
            chosen, attention_mask=torch.ones_like(chosen), max_new_tokens=new, **how
        )
        return out[:, args.prompt_tokens :].tolist()

    same = ours("fp32", sizes[-1], 0.0) == transformers("fp32", sizes[-1], 0.0)
    figures: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    batches: dict[str, dict[int, int]] = {}

    def timed(side: str, run: Callable[..., list[list[int]]], precision: str) -> float:
        name = f"{side} {precision}"
        for rows in sizes:
            begin = time.perf_counter()
            answers = run(precision, rows)
            figures[name][rows].append(rows * new / (time.perf_counter() - begin))
            if any(len(answer) != new for answer in answers):
                raise RuntimeError(f"{name}: an answer is shorter than {new} tokens")
        batches[name] = {
            rows: round(statistics.median(each[1:] or each)) for rows, each in figures[name].items()
        }  # no warm-up
        return figures[name][args.batch][-1]

    sides = by_precision("ours", args.precisions, partial(timed, "ours", ours))
    sides |= by_precision(
        "transformers", args.precisions, partial(timed, "transformers", transformers)
    )
    positions = args.prompt_tokens + new - 1
    side_by_side(
        "sample",
        "new tokens/s",
        sides,
        runs=args.runs,
        alone=args.alone,
        batch=args.batch,
        batches=batches,
        same_greedy=same,
        flops_per_unit=forward_flops(config, positions, (positions + 1) / 2, new) / new,
    )


def dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


if __name__ == "__main__":
    main()
