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

from common.config.schema import InputPath, OutputDir, cli, stage_config
from common.handoff.locate import lineage, load_tokenizer, read_stage
from common.handoff.ownership import claim
from common.handoff.publish import load_model
from common.handoff.report import Gate, stage_report, write_stage_report
from common.model.gpt import GPT
from common.program.errors import Failure, InputError
from common.program.files import dump, write_atomically
from common.program.terminal import printable
from common.rows.shards import Shards
from common.text.tokenizer import Tokenizer
from tools import page
from tools.chain.drawing import INSTALL, Chain, draw, has_graphviz

# The files of a report.
WRITTEN = ("chain.json", "chain.html", "before.*", "after.*", "counted.*")
MOST_ARROWS = 32  # that can be read in one picture


@stage_config
class Config:
    """Draw a small language model as a Markov chain."""

    model: InputPath
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
    control: set[int] = set()
    if tokenizer.has_control:
        control = {tokenizer.eot_id, tokenizer.pad_id, *tokenizer.role_ids.values()}
    ids = [i for i in range(tokenizer.vocab_size) if i not in control]
    if len(ids) ** (context + 1) > MOST_ARROWS:
        arrows = f"{len(ids)}^{context + 1} arrows, {MOST_ARROWS} can be drawn"
        fitting = int(math.log(MOST_ARROWS, max(2, len(ids)))) - 1
        hint = f"; try --context {fitting}" if fitting > 0 else ""
        what = f"{len(ids)} tokens and a context of {context} make {arrows}{hint}"
        raise InputError(f"{path}: {what}")
    return ids


def visible(text: str) -> str:
    """A token as it is written in a picture: a space and control characters can be seen."""
    return repr(text)[1:-1].replace(" ", "␣")


@torch.no_grad()
def transitions(model: GPT, ids: Sequence[int], context: int) -> np.ndarray:
    """(S, V): probability of each of `ids` after each sequence of `context` of them. Raises Failure
    where they are no numbers."""
    states = torch.tensor(list(itertools.product(ids, repeat=context)))
    found = model.eval()(states)[:, -1].double().softmax(-1)[:, ids].numpy()
    if not np.isfinite(found).all():
        raise Failure("the model's probabilities are not finite: its weights are of no use")
    return found


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


def before_training(stage: dict[str, Any], model: GPT) -> GPT | None:
    """What the run that made this model began with: its parent, or a new model of its seed. None:
    its stage.json does not say."""
    config = stage.get("config", {})
    parent, seed = config.get("parent"), config.get("seed")
    if isinstance(parent, str) and parent:
        return load_model(parent, "lm")
    if "n_layer" not in config or type(seed) is not int or not 0 <= seed < 2**32:
        return None
    torch.manual_seed(seed)  # as common.train.run does before a stage builds its model
    return GPT(model.config)


def distance(chain: np.ndarray, counted: np.ndarray) -> float:
    """Total variation between a model's arrows and the counted ones, mean over the windows of the
    text."""
    total = counted.sum(1)
    held = total > 0
    apart = np.abs(chain[held] - counted[held] / total[held, None]).sum(1) / 2
    return float((apart * total[held]).sum() / total.sum())


def chains_of(
    cfg: Config, model: GPT, tokenizer: Tokenizer
) -> tuple[dict[str, Chain], np.ndarray | None]:
    """Return (the chains to draw by their file's name, the counts of the training text).

    The chains are "before" training, "after" it, and as "counted"; those are left out that nothing
    tells. Raises InputError for a context that the model does not have.
    """
    context = cfg.context or model.config.max_length
    if context > model.config.max_length:
        raise InputError(f"context {context}: the model's is {model.config.max_length}")
    stage = read_stage(cfg.model)
    ids = symbols(tokenizer, context, cfg.model)
    tokens = [visible(tokenizer.decode([i])) for i in ids]
    names = ["".join(state) for state in itertools.product(tokens, repeat=context)]

    data = str(stage.get("config", {}).get("train_data", ""))
    counted = counts(data, ids, context) if Path(data, "shards.json").exists() else None
    seen = counted.any(1) if counted is not None and counted.any() else None

    def chain(title: str, probabilities: np.ndarray) -> Chain:
        """A chain over these states."""
        return Chain(title, names, tokens, probabilities, seen)

    chains = {}
    if (begun := before_training(stage, model)) is not None:
        chains["before"] = chain("before training", transitions(begun, ids, context))
    trained = transitions(model, ids, context)
    chains["after"] = chain(f"after {stage.get('step', '?')} steps", trained)
    if counted is not None and seen is not None:
        with np.errstate(invalid="ignore"):
            shares = counted / counted.sum(1, keepdims=True)
        chains["counted"] = chain("as the training text counts", shares)
    return chains, counted


def arrows_of(chains: dict[str, Chain], counted: np.ndarray | None) -> list[dict[str, Any]]:
    """One row for each arrow: its probability in each chain (None for a state that does not occur),
    and its count."""
    first = next(iter(chains.values()))
    S, V = first.probabilities.shape
    rows = []
    for s, v in itertools.product(range(S), range(V)):
        values = {name: float(chain.probabilities[s, v]) for name, chain in chains.items()}
        row = {
            "state": first.names[s],
            "token": first.tokens[v],
            "next": first.names[s * V % S + v],
            **{name: None if math.isnan(p) else round(p, 6) for name, p in values.items()},
        }
        if counted is not None:
            row["count"] = int(counted[s, v])
        rows.append(row)
    return rows


def distances(chains: dict[str, Chain], counted: np.ndarray | None) -> dict[str, float]:
    """How far each model is from what the text counts; empty where nothing was counted."""
    if counted is None or not counted.any():
        return {}
    models = [name for name in ("before", "after") if name in chains]
    return {name: round(distance(chains[name].probabilities, counted), 6) for name in models}


def gate_of(arrows: int, states: int, parameters: int, apart: dict[str, float]) -> Gate:
    """Whether training brought the model nearer to what the text counts."""
    text = f"{parameters:,} parameters, {states} states, {arrows} arrows"
    if not apart:
        return Gate(True, text)
    moved = " -> ".join(f"{value:.3f}" for value in apart.values())
    text += f"; mean distance from what the text counts (total variation) {moved}"
    return Gate(apart.get("before", 1.0) > apart["after"], text)


def table_of(
    chains: dict[str, Chain], arrows: Sequence[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the probabilities."""
    header = ["arrow", *(chain.title for chain in chains.values())]
    rows = []
    for row in arrows:
        values = ["-" if row[name] is None else f"{row[name]:.3f}" for name in chains]
        rows.append([f"{row['state']} -> {row['next']}", *values])
    return header, rows


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The probabilities on the terminal."""
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def write_page(
    folder: Path,
    title: str,
    chains: dict[str, Chain],
    table: tuple[list[str], list[list[str]]],
    text: str,
) -> None:
    """chain.html: the pictures, and the probabilities as a table."""
    content = page.render(
        "chain.html",
        title=f"{title} as a Markov chain",
        unseen=next(iter(chains.values())).seen is not None,
        verdict=text,
        pictures=[page.Picture(folder / f"{n}.png", chain.title) for n, chain in chains.items()],
        arrows=page.Table(*table),
    )
    write_atomically(folder / "chain.html", content.encode())


def main(cfg: Config) -> None:
    """Draw the chains, print their probabilities, write chain.json, chain.html and stage.json."""
    started = time.perf_counter()
    model, tokenizer = load_model(cfg.model, "lm"), load_tokenizer(cfg.model)
    chains, counted = chains_of(cfg, model, tokenizer)
    folder = claim(cfg, "chain", WRITTEN)
    if not has_graphviz():
        print(INSTALL)
    for name, chain in chains.items():
        draw(chain, folder / name)

    arrows, apart = arrows_of(chains, counted), distances(chains, counted)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    states = len(chains["after"].names)
    gate = gate_of(len(arrows), states, parameters, apart)
    table = table_of(chains, arrows)
    show(printable(cfg.model), *table)
    print(gate.line("chain"))
    result = {"model": cfg.model, "parameters": parameters, "arrows": arrows, "distance": apart}
    write_atomically(folder / "chain.json", dump(result))
    write_page(folder, cfg.model, chains, table, gate.text)
    facts = {"kind": "report", **lineage(cfg.model), "metrics": apart}
    seconds = time.perf_counter() - started
    write_stage_report(folder, stage_report("chain", cfg, gate, seconds, **facts))


if __name__ == "__main__":
    cli(Config, main, words="model")
