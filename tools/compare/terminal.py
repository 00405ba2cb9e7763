"""Answers in the terminal: side by side, as a table of figures, or streamed in a chat."""

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.model.gpt import GPT
from common.model.sample import stream
from common.program.errors import InputError
from common.program.terminal import printable
from common.text.chat import Message, prompt_ids, stop_ids
from common.text.tokenizer import Tokenizer
from tools.compare.changes import table_of
from tools.compare.modes import modes
from tools.compare.numbers import columns, marks

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short"


def show(console: Console, result: dict[str, Any], count: int) -> None:
    """The first `count` samples of a comparison, and its figures in every mode."""
    names, found = list(result["models"]), modes(result)
    show_samples(console, result["samples"][:count], found[0])
    if result["prompts"] > count:
        shown = f"{count} of {result['prompts']} prompts shown"
        console.print(f"{shown}; more in --html FILE and --json", style="dim")
    if result["prompts"] > 1 or len(names) > 1:
        for mode in found:
            show_figures(console, result[mode], mode)
    if result["changes"]:
        show_changes(console, result["changes"])


def show_changes(console: Console, changes: dict[str, Any]) -> None:
    """One line a family: what it has gained or lost, and what of it may be chance."""
    header, rows = table_of(changes)
    title = Text(f"correct answers, {changes['after']} - {changes['before']}")
    table = Table(title=title, title_justify="left")
    for n, name in enumerate(header):
        table.add_column(name, justify="right" if n else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def show_samples(console: Console, samples: Sequence[dict[str, Any]], mode: str) -> None:
    """Each prompt with the models' answers beside each other; of one model alone, plainly below
    each other."""
    for row in samples:
        names = list(row["answers"])
        answers = [row["answers"][name][mode] for name in names]
        bodies = [
            Text(printable(a["text"].strip("\n"))) + Text(f"\n{marks(a)}".rstrip(), style="dim")
            for a in answers
        ]
        if len(names) == 1:
            console.print(Text(printable(row["prompt"]), style="bold"))
            console.print(bodies[0], end="\n\n")
            continue
        table = Table(
            title=Text(printable(row["prompt"]), style="bold"), title_justify="left", expand=True
        )
        for name in names:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*bodies)
        console.print(table)


def show_figures(console: Console, figures: dict[str, dict[str, Any]], mode: str) -> None:
    """One line a model: means with their 95 % intervals."""
    first = next(iter(figures.values()))
    table = Table(title=mode, title_justify="left")
    shown = columns(first)
    for name in ("model", *shown):  # short headings: three models' figures fit into 80 columns
        table.add_column(
            name.removesuffix("_rate").replace("_", " "),
            justify="left" if name == "model" else "right",
        )
    for name, row in figures.items():
        table.add_row(Text(name), *(cell(row[column]) for column in shown))
    console.print(table)


def cell(value: Any) -> str:
    """A figure, or a mean with its interval, for people: "0.721 [0.70, 0.74]"."""
    if isinstance(value, dict):
        if value["mean"] is None:
            return "-"
        low, high = value["ci95"]
        return f"{value['mean']:.3f} [{low:.2f}, {high:.2f}]"
    return "-" if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: never "-0.00"


def pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of ids as they come: a character is held back until its last byte is there; control
    tokens are left out."""
    control = tokenizer.control_ids
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if token not in control and (text := decoder.decode(tokenizer.token_bytes(token))):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def fit(tokenizer: Tokenizer, history: Sequence[Message], room: int) -> list[Message]:
    """The newest turns of `history` whose prompt has at most `room` tokens. InputError when not
    even the last has."""
    kept = list(history)
    while (tokens := len(prompt_ids(tokenizer, kept))) > room:
        if len(kept) == 1:
            raise InputError(f"the message has {tokens} tokens, there is room for {room}")
        kept = kept[2:]  # a question and its answer
    return kept


def chat(
    model: GPT,
    tokenizer: Tokenizer,
    read: Callable[[str], str] = input,
    *,
    max_new_tokens: int,
    seed: int,
    about: str | None = None,
    **options: Any,
) -> None:
    """Talk with a model until end of input or /exit; answers are streamed. `about`: what the model
    knows, said at the start. `options` go to `common.model.sample.stream`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing
    print(f"{printable(about)}\n{HELP}" if about else HELP)
    # At least half the context stays free for the answer.
    room = model.config.max_length - min(max_new_tokens, model.config.max_length // 2)
    history: list[Message] = []
    for turn in range(2**31):
        try:
            text = read("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            history = []
            print("(forgotten)")
        if not text or text == "/reset":
            continue
        asked = [*history, {"role": "user", "content": text}]
        try:
            kept = fit(tokenizer, asked, room)
        except InputError as error:
            print(f"({error})")
            continue
        if len(kept) < len(asked):
            turns = (len(asked) - len(kept)) // 2
            print(f"(the oldest {turns} turns no longer fit into the model's context)")
        options |= {"max_new_tokens": max_new_tokens, "seed": seed + turn}
        said = answer_aloud(model, tokenizer, kept, options)
        history = [*kept, {"role": "assistant", "content": said}] if said else kept[:-1]


def answer_aloud(
    model: GPT, tokenizer: Tokenizer, messages: Sequence[Message], options: dict[str, Any]
) -> str:
    """The model's answer, printed as it comes; Ctrl-C ends it where it is."""
    said = ""
    prompt = prompt_ids(tokenizer, messages)
    ids = stream(model, prompt, stop_ids=stop_ids(tokenizer), **options)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces(tokenizer, ids):
            said += piece
            print(printable(piece), end="", flush=True)
    print()
    return said
