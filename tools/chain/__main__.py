"""A small language model as a Markov chain: each context is a state, each next token an arrow with
its probability.

    python -m tools.chain runs/baby/pretrain --output_dir runs/baby/chain

Draws the model as it began, as it is, and what the training text counts: SVG and PNG through
Graphviz (circo), or by matplotlib where that is not installed; chain.html shows them together. For
a vocabulary and a context small enough.
"""

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from common.config.schema import OutputDir, cli, stage_config, to_dict
from common.handoff.locate import lineage, load_tokenizer, read_stage
from common.handoff.publish import load_model
from common.handoff.report import provenance
from common.model.gpt import GPT
from common.model.presets import ArchitectureConfig, new_model
from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.rows.shards import Shards
from common.text.tokenizer import Tokenizer
from tools import page
from tools.chain.drawing import INSTALL, Chain, draw, has_graphviz

MOST_ARROWS = 32  # that can be read in one picture


@stage_config
class Config:
    """Draw a small language model as a Markov chain."""

    model: str
    """Directory of a language model."""
    output_dir: OutputDir
    """Where the pictures, chain.html, chain.json and stage.json go."""
    context: Annotated[int, Field(gt=0)] | None = None
    """Tokens in a state; null = the model's whole context."""
    seed: int = 0
    """Nothing is drawn by chance here."""


def symbols(tokenizer: Tokenizer, context: int, path: str) -> list[int]:
    """Ids of the text tokens, control tokens left out. InputError where they make too many
    arrows."""
    control = (
        {tokenizer.eot_id, tokenizer.pad_id, *tokenizer.role_ids.values()}
        if tokenizer.has_control
        else set()
    )
    ids = [i for i in range(tokenizer.vocab_size) if i not in control]
    if len(ids) ** (context + 1) > MOST_ARROWS:
        what = f"{len(ids)} tokens and a context of {context} make {len(ids)}^{context + 1} arrows, {MOST_ARROWS} can be drawn"
        fitting = int(math.log(MOST_ARROWS, max(2, len(ids)))) - 1
        raise InputError(f"{path}: {what}" + (f"; try --context {fitting}" if fitting > 0 else ""))
    return ids


def visible(text: str) -> str:
    return repr(text)[1:-1].replace(" ", "␣")


@torch.no_grad()
def transitions(model: GPT, ids: Sequence[int], context: int) -> np.ndarray:
    """(S, V): probability of each of `ids` after each sequence of `context` of them."""
    states = torch.tensor(list(itertools.product(ids, repeat=context)))
    return model.eval()(states)[:, -1].double().softmax(-1)[:, ids].numpy()


def counts(folder: str, ids: Sequence[int], context: int) -> np.ndarray:
    """(S, V): how often each of `ids` follows each sequence of `context` of them in the training
    text."""
    index = {token: n for n, token in enumerate(ids)}
    found = np.zeros((len(ids) ** context, len(ids)), int)
    for stream in Shards(folder, "train", context).streams:
        text = [index.get(token, -1) for token in stream.read(0, stream.tokens).tolist()]
        for window in zip(*(text[n:] for n in range(context + 1)), strict=False):
            if min(window) >= 0:
                *state, token = window
                found[sum(s * len(ids) ** n for n, s in enumerate(reversed(state))), token] += 1
    return found


def before_training(stage: dict[str, Any], vocab_size: int) -> GPT | None:
    """What the run of a stage.json began with: its parent, or a new model of its config and seed.
    None: it does not say."""
    config = stage.get("config", {})
    if config.get("parent"):
        return load_model(config["parent"], "lm")
    if not {"seed", "n_layer", "max_length"} <= config.keys():
        return None
    torch.manual_seed(config["seed"])  # as common.train.run does before a stage builds its model
    shape = ArchitectureConfig(
        **{key: config[key] for key in ArchitectureConfig.__dataclass_fields__ if key in config}
    )
    return new_model(shape, vocab_size, config["max_length"])


def distance(chain: np.ndarray, counted: np.ndarray) -> float:
    """Total variation between a model's arrows and the counted ones, mean over the windows of the
    text."""
    total = counted.sum(1)
    held = total > 0
    apart = np.abs(chain[held] - counted[held] / total[held, None]).sum(1) / 2
    return float((apart * total[held]).sum() / total.sum())


def main(cfg: Config) -> None:
    started, folder, stage = time.perf_counter(), Path(cfg.output_dir), read_stage(cfg.model)
    model, tokenizer = load_model(cfg.model, "lm"), load_tokenizer(cfg.model)
    context = cfg.context or model.config.max_length
    if context > model.config.max_length:
        raise InputError(f"context {context}: the model's is {model.config.max_length}")
    ids = symbols(tokenizer, context, cfg.model)
    tokens = [visible(tokenizer.decode([i])) for i in ids]
    names = ["".join(state) for state in itertools.product(tokens, repeat=context)]

    data = stage.get("config", {}).get("train_data", "")
    counted = counts(data, ids, context) if Path(data, "shards.json").exists() else None
    found = {"after": transitions(model, ids, context)}
    if (begun := before_training(stage, model.config.vocab_size)) is not None:
        found = {"before": transitions(begun, ids, context), **found}
    seen = None
    titles = {
        "before": "before training",
        "after": f"after {stage.get('step', '?')} steps",
        "counted": "as the training text counts",
    }
    if counted is not None and counted.any():
        with np.errstate(invalid="ignore"):
            found["counted"] = counted / counted.sum(1, keepdims=True)
        seen = counted.any(1)
    folder.mkdir(parents=True, exist_ok=True)
    if not has_graphviz():
        print(INSTALL)
    chains = {
        name: Chain(titles[name], names, tokens, values, seen) for name, values in found.items()
    }
    for name, chain in chains.items():
        draw(chain, folder / name)
    report(cfg, folder, chains, counted, model, started)


def report(
    cfg: Config,
    folder: Path,
    chains: dict[str, Chain],
    counted: np.ndarray | None,
    model: GPT,
    started: float,
) -> None:
    """The table on the terminal, chain.json, chain.html, stage.json."""
    first = next(iter(chains.values()))
    S, V = first.probabilities.shape
    rows = []
    for s in range(S):
        for v in range(V):
            values = {name: chain.probabilities[s, v] for name, chain in chains.items()}
            values = {
                name: None if np.isnan(value) else round(float(value), 6)
                for name, value in values.items()
            }
            rows.append(
                {
                    "state": first.names[s],
                    "token": first.tokens[v],
                    "next": first.names[s * V % S + v],
                    **values,
                }
            )
            rows[-1] |= {} if counted is None else {"count": int(counted[s, v])}
    cells = [
        [f"{r['state']} -> {r['next']}", *("-" if r[n] is None else f"{r[n]:.3f}" for n in chains)]
        for r in rows
    ]
    header = ["arrow", *(chain.title for chain in chains.values())]
    table = Table(*header, title=cfg.model, title_justify="left")
    for row in cells:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = f"{parameters:,} parameters, {S} states, {S * V} arrows"
    apart, passed = {}, True
    if counted is not None and counted.any():
        apart = {
            name: round(distance(chains[name].probabilities, counted), 6)
            for name in ("before", "after")
            if name in chains
        }
        text += "; mean distance from what the text counts (total variation) " + " -> ".join(
            f"{d:.3f}" for d in apart.values()
        )
        passed = apart.get("before", 1.0) > apart["after"]
    print(f"gate chain: {'PASS' if passed else 'FAIL'}  {text}")
    result = {"model": cfg.model, "parameters": parameters, "arrows": rows, "distance": apart}
    write_atomically(folder / "chain.json", dump(result))
    content = page.render(
        "chain.html",
        title=f"{cfg.model} as a Markov chain",
        unseen=first.seen is not None,
        verdict=text,
        pictures=[page.Picture(folder / f"{n}.png", chain.title) for n, chain in chains.items()],
        arrows=page.Table(header, cells),
    )
    write_atomically(folder / "chain.html", content.encode())
    done = {
        "stage": "chain",
        "kind": "report",
        **lineage(cfg.model),
        "config": to_dict(cfg),
        "metrics": apart,
    }
    done |= {
        "gate": {"passed": passed, "text": text},
        "wall_time": round(time.perf_counter() - started, 2),
        **provenance(),
    }
    write_atomically(folder / "stage.json", dump(done))


if __name__ == "__main__":
    cli(Config, main, words="model")
