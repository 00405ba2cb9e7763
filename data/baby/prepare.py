"""A sequence of symbols, once to train and once to evaluate on, and the tokenizer of its symbols
alone (Karpathy's baby GPT).

python -m data.baby.prepare --config configs/baby/data.yaml --output_dir runs/baby/data
"""

import time
from typing import Annotated

from pydantic import Field

from common.config.schema import OutputDir, cli, stage_config
from common.handoff.ownership import claim
from common.handoff.report import STAGE, TOKENIZER, Gate, stage_report, vouch, write_stage_report
from common.program.files import MANIFEST, write_jsonl
from common.text.tokenizer import Tokenizer

PUBLISHED = ("documents.jsonl", *TOKENIZER, STAGE)


@stage_config
class Config:
    """The sequence of the baby GPT."""

    output_dir: OutputDir = "runs/baby/data"
    """Where documents.jsonl and the tokenizer go."""
    text: Annotated[str, Field(min_length=2)] = "111101111011110"
    """The sequence; each character is a symbol."""
    seed: int = 0
    """Nothing is drawn here."""


def main(cfg: Config) -> None:
    """Write documents.jsonl, the tokenizer and stage.json."""
    started, folder = time.perf_counter(), claim(cfg, "data", PUBLISHED)
    tokenizer = Tokenizer.characters([cfg.text], control=False)
    (folder / MANIFEST).unlink(missing_ok=True)  # the folder counts again once it is back
    tokenizer.save(folder)
    write_jsonl(folder / "documents.jsonl", [{"text": cfg.text}] * 2)  # half of them is held out
    gate = Gate(True, f"{len(cfg.text)} symbols, {tokenizer.vocab_size} different ones")
    print(gate.line("data"))
    report = stage_report("data", cfg, gate, time.perf_counter() - started, kind="data")
    write_stage_report(folder, report)
    vouch(folder, PUBLISHED)


if __name__ == "__main__":
    cli(Config, main)
