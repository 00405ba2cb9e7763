"""The chat format: messages -> (ids, loss mask). The one renderer of all stages.

    <|system|>text<|user|>text<|assistant|>text<|endoftext|><|user|>...

Each message is its role's control token and its content, nothing between; only an assistant's
message ends with <|endoftext|>, as it is the only one the model must learn to end. No BOS. Contents
are encoded as ordinary text, so what a user types can never become a control token. `CHAT_TEMPLATE`
gives the same ids and mask through transformers' `apply_chat_template`, with one limit that is
transformers' own: it tokenizes the joined text, so there an "<|endoftext|>" typed by a user does
become the control id. Untrusted text goes through `render` and `prompt_ids`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.text import Text

from common.program.errors import InputError
from common.program.terminal import one_line, printable
from common.text.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
ROLES = ("system", "user", "assistant")


class Rendered(NamedTuple):
    """One conversation as the model sees it."""

    ids: list[int]  # (T,) token ids
    mask: list[int]  # (T,) 1 = supervised (an assistant's content and <|endoftext|>), 0 = context


def check_messages(messages: Sequence[Mapping]) -> None:
    """Raise InputError unless `messages` is a non-empty list of known roles with text; callers add
    file and line."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        wanted = "messages must be a non-empty list of {'role', 'content'}"
        raise InputError(f"{wanted}, not {_short(messages)}", "no messages")
    for number, message in enumerate(messages, 1):
        _check_message(f"message {number}", message)


def _check_message(called: str, message: object) -> None:
    """Raise InputError unless `message` is a known role with text; `called` names it."""
    if not isinstance(message, Mapping):
        wanted = f"{called} must be {{'role', 'content'}}"
        raise InputError(f"{wanted}, not {_short(message)}", "wrong type")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise InputError(f"{called}: role {_short(role)} is none of {known}", "unknown role")
    if not isinstance(content, str):
        wanted = f"{called} ({role}): content must be text"
        raise InputError(f"{wanted}, not {_short(content)}", "wrong type")
    if role == "assistant" and not content:
        empty = f"{called} (assistant): content is empty"
        raise InputError(f"{empty}, there is nothing to learn from it", "empty answer")


def render(tokenizer: Tokenizer, messages: Sequence[Mapping]) -> Rendered:
    """Ids and loss mask of a conversation. Raises InputError as `check_messages` and
    `Tokenizer.encode` do."""
    check_messages(messages)
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        content = tokenizer.encode(message["content"])
        ids += [tokenizer.role_ids[message["role"]], *content]
        mask += [0] * (1 + len(content))
        if message["role"] == "assistant":
            ids.append(tokenizer.eot_id)
            mask[len(mask) - len(content) :] = [1] * (len(content) + 1)
    return Rendered(ids, mask)


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Mapping]) -> list[int]:
    """The ids a model is asked to go on from; `messages` must end with the user's.

    With a chat tokenizer they end with <|assistant|>. A base model knows no roles: it gets
    <|endoftext|> (a document starts), the last message as plain text and a newline; without control
    tokens the message alone.
    """
    check_messages(messages)
    last = messages[-1]["role"]
    if last != "user":
        raise InputError(
            f"a prompt must end with the user's message, not the {last}'s", "no prompt"
        )
    if not tokenizer.has_control:
        return tokenizer.encode(messages[-1]["content"])
    if not tokenizer.chat:
        return [tokenizer.eot_id, *tokenizer.encode(messages[-1]["content"] + "\n")]
    return [*render(tokenizer, messages).ids, tokenizer.role_ids["assistant"]]


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: <|endoftext|> alone, or none for a tokenizer without control
    tokens."""
    return (tokenizer.eot_id,) if tokenizer.has_control else ()


def rows_to_messages(row: Mapping) -> list[Message]:
    """Messages of a data row that ends with an answer, by the columns it has (a None column counts
    as absent).

    `messages` | `prompt` + `completion`, each text or messages | Alpaca `instruction`, `input`,
    `output` | ShareGPT `conversations` of `from`, `value`. Raises InputError naming the columns
    found when they are none of these, and for an answer that its `label` (of KTO) calls bad.
    """
    messages = _read_columns(row, with_answer=True)
    if row.get("label") in (False, "false", "False"):  # 0 is False too
        bad = "label false: people call this answer bad, so it is none to learn"
        raise InputError(bad, "label false")
    last = messages[-1]["role"]
    if last != "assistant":
        found = f"the last message is the {last}'s"
        raise InputError(f"{found}, there is no answer to learn from", "no answer")
    return messages


def rows_to_prompt(row: Mapping) -> list[Message]:
    """Messages of a data row up to the user's last: a row of `rows_to_messages`, or one without an
    answer."""
    messages = _read_columns(row, with_answer=False)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        lacking = "the row has no user's message at its end, or right before its answer"
        raise InputError(f"{lacking}, to be the prompt", "no prompt")
    return messages


def comparison_prompt(row: Mapping) -> list[Message]:
    """Messages of a comparison's prompt: `prompt` (text or messages), `conversations`, or `chosen`
    (messages or a transcript) less its last message.

    Raises InputError naming the columns found when there is none of these.
    """
    prompt = row["prompt"] if row.get("prompt") is not None else row.get("conversations")
    if prompt is None and isinstance(chosen := transcript(row.get("chosen")), list):
        prompt = chosen[:-1]
    if prompt is None or prompt == []:
        found = one_line(", ".join(sorted(map(str, row)))) or "none"
        needed = "a comparison needs prompt (or conversations), and answers or chosen"
        raise InputError(f"columns found: {found}; {needed}", "columns")
    return _checked([_sharegpt(turn) for turn in _side(prompt, "user")])


def transcript(value: Any) -> Any:
    """A conversation as HH-RLHF writes it (Bai 2022), "\\n\\nHuman: ...\\n\\nAssistant: ...", as
    messages; what is none stays as it is."""
    if not isinstance(value, str) or not value.startswith("\n\nHuman:"):
        return value
    said = re.split(r"\n\n(Human|Assistant):", value)[1:]
    return [
        {"role": "user" if who == "Human" else "assistant", "content": text.strip()}
        for who, text in zip(said[::2], said[1::2], strict=True)
    ]


def _read_columns(row: Mapping, with_answer: bool) -> list[Message]:
    """The messages of a row of any of the formats; without `with_answer` it may lack the answer."""
    has = {name for name, value in row.items() if value is not None}
    if "messages" in has:
        return _checked(row["messages"])
    if "prompt" in has and ("completion" in has or not with_answer):
        answer = _side(row["completion"], "assistant") if with_answer else []
        return _checked(_side(row["prompt"], "user") + answer)
    if "instruction" in has and ("output" in has or not with_answer):
        answer = [{"role": "assistant", "content": row["output"]}] if with_answer else []
        return _checked([_alpaca_user(row), *answer])
    if isinstance(row.get("conversations"), list):
        return _checked([_sharegpt(turn) for turn in row["conversations"]])
    found = one_line(", ".join(sorted(map(str, has)))) or "none"
    accepted = "prompt | instruction, (input)"
    if with_answer:
        accepted = "prompt, completion | instruction, (input,) output"
    accepted = f"messages | {accepted} | conversations (a list)"
    raise InputError(f"columns found: {found}; accepted: {accepted}", "columns")


def _checked(messages: Sequence[Mapping]) -> list[Message]:
    """Role and content alone of messages that `check_messages` lets pass."""
    check_messages(messages)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def colour_preview(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> Text:
    """The decoded text with supervised tokens in green and the others dim; unprintable characters
    as escapes."""
    preview = Text()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            text = tokenizer.decode(ids[start:end], skip_control=False)
            preview.append(printable(text), style="green" if mask[start] else "dim")
            start = end
    return preview


def _side(value: object, role: str) -> list:
    """The messages of a column that holds a text, which is the role's, or messages."""
    if not isinstance(value, str | list):
        wanted = f"the {role}'s side must be text or a list of messages"
        raise InputError(f"{wanted}, not {_short(value)}", "wrong type")
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _alpaca_user(row: Mapping) -> Message:
    """The user's message: the instruction, and behind a blank line the input if there is one."""
    instruction, extra = row["instruction"], row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        found = f"{_short(instruction)} and {_short(extra)}"
        raise InputError(f"instruction and input must be text, not {found}", "wrong type")
    return {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}


def _sharegpt(turn: Any) -> Any:
    """A turn of ShareGPT as a message; what is none stays as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role = {"human": "user", "gpt": "assistant"}.get(str(turn["from"]), turn["from"])
    return {"role": role, "content": turn.get("value")}


def _short(value: object) -> str:
    """The value as Python writes it, 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
