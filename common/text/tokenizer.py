"""Tokenizers: byte-level BPE (trained here, or GPT-2's own files) and single characters.

The directory is transformers' (`tokenizer.json`, `tokenizer_config.json`), so AutoTokenizer opens
it and gives the same ids. Encoding itself is tiktoken's, from the same merges: several times
faster, and it never looks for control tokens in text. AutoTokenizer does: by its default it turns a
"<|endoftext|>" inside ordinary text into the control id. Text from outside therefore goes through
`Tokenizer.encode` and `common.text.chat.render`.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import tokenizers
from tokenizers import trainers

from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.text.template import CHAT_TEMPLATE

CONTROL = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

# How text is cut before it is encoded

# Before merging: contractions, words with one leading mark or space, 1-3 digits
# with a leading space or none (so " 17" can be one token), punctuation, line ends, other space.
# Without (?i:) and `$`, which Oniguruma (tokenizers) and Rust (tiktoken) read differently; space
# runs are bounded, as a million overflow tiktoken's stack.
PATTERN = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s{0,256}[\r\n]|\s{1,256}(?!\S)|\s"
)
# What ByteLevel(use_regex=True) of tokenizer.json means; `\s++$` is tiktoken's own guard for long
# runs of space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s"
ANY_CHARACTER = r"[\s\S]"
# Where a long text may be cut, as no match of the pattern reaches across, nor looks there: the ids
# stay the same.
GAPS = {PATTERN: r"\S(?= )|\n(?=\S)", GPT2_PATTERN: r"\S(?=[ \n])", ANY_CHARACTER: ANY_CHARACTER}
# One character or more of each kind that a pattern may tell apart.
PROBE = (
    "".join(map(chr, [*range(0x21, 0x250), *range(0x21)]))
    + "й中あא١½²Ⅷ\u0301\u200b\u2028\u3000€→\ue000\ufffd🙂"
)
_NO_REGEX = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def _split(pattern: str) -> dict:
    """The pre-tokenizer of tokenizer.json that cuts by a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _pattern(pre_tokenizer: dict) -> str:
    """tiktoken's pattern for a pre-tokenizer of tokenizer.json. Raises InputError for one that is
    not byte-level."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = parts[-1]
    if byte_level["type"] == "ByteLevel" and not byte_level["add_prefix_space"]:
        own_regex = byte_level.get("use_regex", True)
        if len(parts) == 1 and own_regex:
            return GPT2_PATTERN
        if len(parts) == 2 and not own_regex:
            pattern = parts[0]["pattern"]["Regex"]
            if parts[0] == _split(pattern):
                return pattern
    found = json.dumps(pre_tokenizer)[:150]
    raise InputError(f"only byte-level BPE is read, not the pre-tokenizer {found}")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (its encoder.py): printable Latin-1 as itself,
    others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


_BYTE_OF = _byte_alphabet()


# Reading a directory


class _Parts(NamedTuple):
    """What a tokenizer consists of, checked to be what tiktoken can encode."""

    model: dict  # that object of tokenizer.json: type, vocab, and merges of a BPE
    pre_tokenizer: dict  # that object of tokenizer.json
    special: list[str]  # the names in the vocabulary that are not text


def _read_json(directory: Path) -> dict:
    """tokenizer.json of a directory, or as much of one as GPT-2's older files make."""
    if (directory / TOKENIZER).is_file():
        return json.loads((directory / TOKENIZER).read_text(encoding="utf-8"))
    if not (directory / "vocab.json").is_file():
        raise InputError("no tokenizer.json (nor vocab.json and merges.txt) in it")
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    return {
        "model": {"vocab": vocab, "merges": merges},
        "pre_tokenizer": _NO_REGEX | {"use_regex": True},
    }


def _read_parts(directory: Path) -> _Parts:
    """The parts of the tokenizer of a directory. Raises InputError for one that tiktoken cannot
    encode with."""
    found = _read_json(directory)
    model, pre_tokenizer = found["model"], found["pre_tokenizer"]
    tokens = found.get("added_tokens", ())
    added = {token["content"]: token["id"] for token in tokens}
    if found.get("normalizer") or not all(token["special"] for token in tokens):
        told = "a normalizer, or added tokens that are not special, change ordinary text"
        raise InputError(f"{told}: not supported")
    if model.get("type") == "WordLevel" and pre_tokenizer == _split(ANY_CHARACTER):
        return _Parts(model, pre_tokenizer, list(added))
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or affixes:
        raise InputError(f"only byte-level BPE is read, not a {model.get('type')} model")
    return _bpe_parts(model, pre_tokenizer, added)


def _bpe_parts(model: dict, pre_tokenizer: dict, added: dict[str, int]) -> _Parts:
    """The parts of a byte-level BPE. Special is what is neither a byte nor merged of bytes."""
    vocab = model["vocab"] | added
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = ["".join(pair) for pair in merges]
    if lacking := [token for token in (*_BYTE_OF, *merged) if token not in vocab]:
        raise InputError(f"only byte-level BPE is read; this vocabulary lacks {lacking[0]!r}")
    if any(vocab[a] >= vocab[b] for a, b in pairwise(merged)):
        raise InputError(
            "its ids do not follow the order of its merges, so tiktoken cannot encode with them"
        )
    special = added.keys() | (vocab.keys() - set(merged) - _BYTE_OF.keys())
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return _Parts(model, pre_tokenizer, sorted(special, key=vocab.get))


def _chat_template(directory: Path) -> str | None:
    """Our chat template where the directory has it, in either of the places where transformers
    keeps one; None without, and (one warning) where it is another maker's."""
    file, settings = directory / TEMPLATE, directory / CONFIG
    found = None
    if file.is_file():
        found = file.read_text(encoding="utf-8")
    elif settings.is_file():
        file, found = settings, json.loads(settings.read_bytes()).get("chat_template")
    if found not in (None, CHAT_TEMPLATE):
        warnings.warn(f"{file}: not this project's chat format, left out", stacklevel=3)
        return None
    return found


def check_text(text: str) -> str:
    """The text. Raises InputError, telling the place, when it has a lone surrogate and so no
    UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"lone surrogate U+{ord(text[error.start]):04X}"
        what = f"{surrogate} at position {error.start} of the text, not valid Unicode"
        fix = "decode it again from its source, or drop it"
        raise InputError(f"{what}: {fix}", "lone surrogate") from None
    return text


# What a tokenizer.json of another shape than we know ends in.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Tokenizer:
    """Text <-> ids, made by `train_bpe`, `characters` or `load`. The ids of `CONTROL` close the
    vocabulary, in that order.

    Characters may do without them (`has_control` False): such a model goes on with text, and no
    document ever ends.
    """

    def __init__(
        self,
        model: dict,
        pre_tokenizer: dict,
        special: Sequence[str] = (),
        template: str | None = None,
        control: bool = True,
    ):
        """model, pre_tokenizer: those objects of a tokenizer.json; special: names in the
        vocabulary, not text; control: append what it lacks of CONTROL."""
        missing = [name for name in CONTROL if name not in special and control]
        vocab = _with_control(model["vocab"], missing)
        self._model = model | {"vocab": vocab}
        self._pre_tokenizer = pre_tokenizer
        self._special = {name: vocab[name] for name in (*special, *missing)}
        self.template = template
        self.vocab_size = len(vocab)
        self.has_control = control
        self._appended = frozenset(missing)
        self._prepare_encoding()

    def _prepare_encoding(self) -> None:
        """What encodes and decodes: ids of characters, or tiktoken with the ranks of its merges."""
        text_ids = {
            token: i for token, i in self._model["vocab"].items() if token not in self._special
        }
        self._char_ids: dict[str, int] = {}
        self._tiktoken: tiktoken.Encoding | None = None
        if self._model["type"] == "WordLevel":
            pattern, self._char_ids = ANY_CHARACTER, text_ids
            ranks = {token.encode(): i for token, i in text_ids.items()}
        else:
            pattern = _pattern(self._pre_tokenizer)
            ranks = {bytes(_BYTE_OF[char] for char in token): i for token, i in text_ids.items()}
            self._tiktoken = tiktoken.Encoding(
                "ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
        names = {i: name.encode() for name, i in self._special.items()}
        self._bytes = {i: token for token, i in ranks.items()} | names
        # A text may be cut behind a match; None: nobody knows where.
        self.gap = re.compile(GAPS[pattern]) if pattern in GAPS else None

    # Making one

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE of exactly `vocab_size` ids (else InputError), bytes and control included;
        same texts, same file."""
        lowest = 256 + len(CONTROL)
        if vocab_size < lowest:
            parts = f"256 bytes, {len(CONTROL)} control tokens"
            raise InputError(f"vocab_size {vocab_size} is below {lowest} ({parts})")
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [_split(PATTERN), _NO_REGEX]}
        empty = {"type": "BPE", "vocab": {}, "merges": []}
        untrained = json.dumps({"model": empty, "pre_tokenizer": pre_tokenizer})
        backend = tokenizers.Tokenizer.from_str(untrained)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(CONTROL),
            min_frequency=2,
            initial_alphabet=list(_BYTE_OF),
            show_progress=False,
        )
        backend.train_from_iterator((check_text(text) for text in texts), trainer)
        trained = json.loads(backend.to_str())["model"]
        if (got := len(trained["vocab"]) + len(CONTROL)) < vocab_size:
            more = f"vocab_size {vocab_size} is more than the texts yield"
            raise InputError(f"{more}: set it to {got} or give more text")
        return cls({key: trained[key] for key in empty}, pre_tokenizer)

    @classmethod
    def characters(cls, texts: Iterable[str], control: bool = True) -> "Tokenizer":
        """One id for each character of the texts, in code point order; `encode` refuses any other
        character.

        control False: these are all its ids.
        """
        chars: set[str] = set()
        for text in texts:
            chars.update(check_text(text))
        vocab = {char: i for i, char in enumerate(sorted(chars))}
        # unk_token is left out of the vocabulary on purpose: tokenizers then refuses an unknown
        # character as we do.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        return cls(model, _split(ANY_CHARACTER), control=control)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read our own directory, or any byte-level BPE one of transformers (GPT-2's:
        tokenizer.json or vocab.json).

        A control token the directory has keeps its id, the others are appended. A chat template
        other than ours is not taken over (one warning), as `chat.render` would not agree with it.
        Raises InputError on any other tokenizer.
        """
        directory = Path(directory)
        try:
            parts = _read_parts(directory)
            # Characters are our own kind: where they have no control tokens, none are wanted.
            control = parts.model["type"] != "WordLevel" or bool(parts.special)
            made = cls(*parts, _chat_template(directory), control)
            made.check_covers()
            return made
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            what = f"no readable tokenizer ({type(error).__name__}: {error})"
            raise InputError(f"{directory}: {what}") from error

    def check_covers(self) -> None:
        """Raise InputError where the pattern of its maker leaves out characters, which transformers
        would encode all the same."""
        for char in "" if self.gap else PROBE:
            text = f"a{char} {char}\n{char}1{char}"
            if self.decode(self.encode(text)) != text:
                lost = f"its pattern leaves out characters such as {char!r} (U+{ord(char):04X})"
                raise InputError(f"{lost}, which would be lost")

    def with_chat(self) -> "Tokenizer":
        """The same ids, with the chat template stored beside them. Raises InputError where there
        are no control tokens."""
        self._id_of(CONTROL[2])
        return Tokenizer(self._model, self._pre_tokenizer, tuple(self._special), CHAT_TEMPLATE)

    # Control tokens

    def _id_of(self, name: str) -> int:
        """The id of a control token. Raises InputError where there are none."""
        if name not in self._special:
            bare = "a model of bare characters can only go on with text"
            raise InputError(f"the tokenizer has no {name}: {bare}")
        return self._special[name]

    @property
    def eot_id(self) -> int:
        """The id of <|endoftext|>, which ends a document and an answer."""
        return self._id_of(CONTROL[0])

    @property
    def pad_id(self) -> int:
        """The id of <|pad|>, which fills rows up."""
        return self._id_of(CONTROL[1])

    @property
    def role_ids(self) -> dict[str, int]:
        """The ids that begin the messages of "system", "user" and "assistant"."""
        return {name[2:-2]: self._id_of(name) for name in CONTROL[2:]}

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that are no text: those of CONTROL, and other special tokens of its maker."""
        return frozenset(self._special.values())

    @property
    def untaught_ids(self) -> list[int]:
        """The control ids that a model with this tokenizer has not learned: none where it was
        taught the chat format, else all but that of an <|endoftext|> which it had itself."""
        known = CONTROL if self.chat else CONTROL[:1]
        names = [name for name in CONTROL if name not in known or name in self._appended]
        return [self._special[name] for name in names if name in self._special]

    @property
    def chat(self) -> bool:
        """True when it has the chat template: its model was taught the chat format."""
        return self.template is not None

    # Encoding and decoding

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, so "<|endoftext|>" stays text. InputError on a lone surrogate or
        unknown character."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; BPE runs on all cores when there are several."""
        for text in texts:
            check_text(text)
        if self._tiktoken is None:  # characters
            return [[self._char_id(text, i) for i in range(len(text))] for text in texts]
        try:
            if len(texts) == 1:  # a pool of threads costs more than one text
                return [self._tiktoken.encode_ordinary(texts[0])]
            threads = os.cpu_count() or 1
            return self._tiktoken.encode_ordinary_batch(list(texts), num_threads=threads)
        except BaseException as error:
            # A Rust panic derives from BaseException: GPT-2's pattern on a million spaces.
            if type(error).__name__ != "PanicException":
                raise
            long = "the text holds a run of some million spaces: shorten it"
            raise InputError(long, "long run of spaces") from None

    def _char_id(self, text: str, index: int) -> int:
        """The id of one character of a text. Raises InputError for one that has none."""
        try:
            return self._char_ids[text[index]]
        except KeyError:
            what = f"character {text[index]!r} (U+{ord(text[index]):04X}) at position {index}"
            known = f"none of this tokenizer's {len(self._char_ids)}; a BPE knows them all"
            raise InputError(f"{what} is {known}", "unknown character") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (a control token's name). Raises KeyError for an id outside the
        vocabulary."""
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, and so do ids that no token has: many
        models have more rows of the embedding than tokens."""
        skip = self.control_ids if skip_control else ()
        found = b"".join(self._bytes.get(i, b"\xff") for i in ids if i not in skip)
        return found.decode("utf-8", errors="replace")

    # Writing

    def to_json(self) -> str:
        """The text of tokenizer.json, the same for the same tokenizer."""
        ordered = sorted(self._model["vocab"].items(), key=lambda item: item[1])
        settings = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content = {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": name, **settings, "special": True}
                for name, i in ordered
                if name in self._special
            ],
            "pre_tokenizer": self._pre_tokenizer,
            # no BOS; and offsets keep leading spaces, which the assistant mask is made from
            "post_processor": None,
            "decoder": {"type": "Fuse"} if self._tiktoken is None else _NO_REGEX,
            "model": self._model | {"vocab": dict(ordered)},
        }
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    def save(self, directory: str | Path, max_length: int | None = None) -> None:
        """Write the files AutoTokenizer reads, each at once or not at all; `max_length` (tokens) is
        the model's context. Raises Failure when one cannot be written."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.has_control:
            config |= {"eos_token": CONTROL[0], "pad_token": CONTROL[1]}
        config |= {"padding_side": "right", "clean_up_tokenization_spaces": False}
        if max_length is not None:
            config["model_max_length"] = max_length
        write_atomically(directory / TOKENIZER, self.to_json().encode())
        write_atomically(directory / CONFIG, dump(config))
        if self.template is None:
            (directory / TEMPLATE).unlink(missing_ok=True)
        else:
            write_atomically(directory / TEMPLATE, self.template.encode())


def _with_control(vocab: dict[str, int], missing: Sequence[str]) -> dict[str, int]:
    """The vocabulary with the missing control tokens behind it. Raises InputError where their names
    are ordinary text in it, or its ids have gaps."""
    if clash := [name for name in missing if name in vocab]:
        raise InputError(
            f"the vocabulary has {clash[0]!r} as ordinary text; it must be a control token"
        )
    vocab = vocab | {name: len(vocab) + i for i, name in enumerate(missing)}
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise InputError(f"the {len(vocab)} token ids are not 0..{len(vocab) - 1} without gaps")
    return vocab


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids mean the same in both; a chat template makes no difference."""
    return a.to_json() == b.to_json()


def translate(ids: Sequence[int], source: Tokenizer, target: Tokenizer) -> list[int]:
    """A response's ids in another vocabulary: its text encoded anew, and the end token where it has
    one."""
    ended = bool(ids) and ids[-1] == source.eot_id
    return [*target.encode(source.decode(ids)), *([target.eot_id] if ended else [])]
