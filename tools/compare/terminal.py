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

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short"


def marks(answer: dict[str, Any]) -> str:
    """What is known about an answer: `gold 0.93 right · reward +1.20 · cut off`."""
    words = []
    if answer.get("gold") is not None:
        words.append(f"gold {answer['gold']:.2f} {'right' if answer['correct'] else 'wrong'}")
    if answer.get("reward") is not None:
        words.append(f"reward {answer['reward']:+.2f}")
    return " · ".join(words + ([] if answer["stopped"] else ["cut off"]))


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
    columns = [name for name in ("gold", "reward", "kl", "stop_rate", "length") if name in first]
    for name in ("model", *columns):  # short headings: three models' figures fit into 80 columns
        table.add_column(name.replace("_rate", ""), justify="left" if name == "model" else "right")
    for name, row in figures.items():
        table.add_row(Text(name), *(cell(row[column]) for column in columns))
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
    while len(prompt_ids(tokenizer, kept)) > room:
        if len(kept) == 1:
            raise InputError(
                f"the message has {len(prompt_ids(tokenizer, kept))} tokens, there is room for {room}"
            )
        kept = kept[2:]  # a question and its answer
    return kept


def chat(
    model: GPT,
    tokenizer: Tokenizer,
    read: Callable[[str], str] = input,
    *,
    max_new_tokens: int,
    seed: int,
    **options: Any,
) -> None:
    """Talk with a model until end of input or /exit; answers are streamed. `options` go to
    `generate.stream`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing
    print(HELP)
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
        # At least half the context stays free for the answer.
        room = model.config.max_length - min(max_new_tokens, model.config.max_length // 2)
        try:
            kept = fit(tokenizer, asked, room)
        except InputError as error:
            print(f"({error})")
            continue
        if len(kept) < len(asked):
            print(
                f"(the oldest {(len(asked) - len(kept)) // 2} turns no longer fit into the model's context)"
            )
        said = ""
        ids = stream(
            model,
            prompt_ids(tokenizer, kept),
            max_new_tokens=max_new_tokens,
            seed=seed + turn,
            stop_ids=stop_ids(tokenizer),
            **options,
        )
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces(tokenizer, ids):
                said += piece
                print(printable(piece), end="", flush=True)
        print()
        history = [*kept, {"role": "assistant", "content": said}] if said else kept[:-1]
