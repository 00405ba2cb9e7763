"""Tokenizers: ids equal transformers' on nasty text, control tokens stay out of text, bytes round
trip, errors name things."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, pre_tokenizers

from common.program.errors import InputError
from common.text.template import CHAT_TEMPLATE
from common.text.tokenizer import CONFIG, CONTROL, PATTERN, Tokenizer

STORY = (
    "The cat's hat: 17 and 2024 hats! It isn't 3.14, we'll see.\r\n\n"
    "    def f(x):\n\t\treturn x  # naïve, 日本語, שלום 🙂\n"
)
NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n\r\n",
    "a\r\nb\rc\n",
    "\0",
    "a\0b",
    "x" * 3000,
    " " * 3000 + "x",
    "\n" * 700,
    " \n" * 700 + " ",
    "\t \t ",
    "1234567890 12 345 6789",
    "12.5e-3 ½ ² Ⅷ ٣٤",
    "don't DON'T we'll I'VE 'tis it'S ſ'ſ",
    "e\u0301 n\u0303\u0323 \u0301",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "a\u200bb\u200d\ufeff\u2060",
    "日本語の文章。中文，한국어",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "𝔘𝔫𝔦 𐍈 \U0010ffff",
    "if (x<=1){return !y&&z;} // ok -> <html> ===",
    "\x85 \u2028 \u3000 \xa0 \x1c\x1d",
    "<|endoftext|><|user|> <|pad|>",
    "I\u0307 İ ß ẞ ﬁ",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe([STORY * 3, *NASTY, *NASTY, " 17 17 17"], 420)


def auto(tokenizer: Tokenizer, directory: Path, **save):
    from transformers import AutoTokenizer

    tokenizer.save(directory, **save)
    return AutoTokenizer.from_pretrained(directory)


def test_control_ids_close_the_vocabulary(bpe):
    assert bpe.vocab_size == 420
    assert (bpe.eot_id, bpe.pad_id, bpe.role_ids) == (
        415,
        416,
        {"system": 417, "user": 418, "assistant": 419},
    )
    assert [bpe.token_bytes(i) for i in range(415, 420)] == [name.encode() for name in CONTROL]
    assert bpe.control_ids == set(range(415, 420))
    assert Tokenizer.characters(["ab"], control=False).control_ids == set()


def test_literal_ids_of_a_hand_made_merge():
    tokenizer = Tokenizer.train_bpe(["ab ab ab abab"], 256 + 1 + 5)
    # GPT-2's byte order: printable ones first, so "a" is 0x61 - 0x21 = 64, "b" 65, and space 32 +
    # 188 = 220; "ab" is 256.
    assert tokenizer.encode("ab ba") == [256, 220, 65, 64]
    assert tokenizer.token_bytes(256) == b"ab"


def test_number_with_its_space_can_be_one_token(bpe):
    assert bpe.encode(" 17") == [
        next(i for i in range(bpe.vocab_size) if bpe.token_bytes(i) == b" 17")
    ]


def test_pieces():
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str
    text = "It's 12345 (ok).\n\n  \tdef  x"
    expected = ["It", "'s", " 123", "45", " (", "ok", ").\n\n", "  ", "\tdef", " ", " x"]
    assert [piece for piece, _ in split(text)] == expected


def test_ids_equal_transformers_on_nasty_text(bpe, tmp_path):
    hf = auto(bpe, tmp_path)
    rng = random.Random(7)
    every = [chr(c) for c in [*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F300, 0x1FB00)]]
    ends = " \n\t\r'sdtreTa19é<|>\u0301\u200d\u3000\x85"
    texts = NASTY + [
        "".join(f"a{c}b {c}1{c}{c} {c}\n" for c in every[i : i + 64])
        for i in range(0, len(every), 64)
    ]
    texts += [bytes([byte]).decode("latin-1") for byte in range(256)]
    texts += [
        "".join(rng.choice(ends if rng.random() < 0.6 else every) for _ in range(60))
        for _ in range(300)
    ]
    texts += [
        "".join(
            chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
            for _ in range(80)
        )
    ]
    ours = bpe.encode_batch(texts)
    for text, ids in zip(texts, ours, strict=True):
        theirs = hf(text, split_special_tokens=True)[
            "input_ids"
        ]  # else it makes control ids of "<|user|>" in text
        assert theirs == ids == bpe.encode(text), repr(text)
        assert bpe.decode(ids) == text
        assert max(ids, default=0) < 415


@pytest.mark.heavy
def test_both_regex_engines_cut_alike_over_unicode():
    """A token for letter + character exists, so tiktoken's ids tell where it cuts; expected:
    tokenizers' own cut."""
    points = [c for c in range(0x80, 0x110000, 7) if not 0xD800 <= c < 0xE000]
    prefixes = {("a" + chr(c)).encode()[:n] for c in points for n in range(2, 6)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {
        token: 256 + i
        for i, token in enumerate(sorted(prefixes, key=lambda token: (len(token), token)))
    }
    encoding = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str
    for c in points:
        text = "a" + chr(c)
        assert (len(encoding.encode_ordinary(text)) == 1) == (len(split(text)) == 1), hex(c)


def test_decode_agrees_with_transformers_on_any_ids(bpe, tmp_path):
    hf = auto(bpe, tmp_path)
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(bpe.vocab_size) for _ in range(40)]
        assert bpe.decode(ids) == hf.decode(ids, skip_special_tokens=True)
        assert bpe.decode(ids, skip_control=False) == hf.decode(ids, skip_special_tokens=False)
    assert bpe.decode([64, bpe.eot_id, 65]) == "ab"
    assert bpe.decode([64, bpe.eot_id, 65], skip_control=False) == "a<|endoftext|>b"
    assert bpe.decode([64, 10**6, 65]) == "a\ufffdb"  # of an embedding with more rows


def test_control_names_in_text_stay_text(bpe):
    for name in CONTROL:
        ids = bpe.encode(f"a{name}b")
        assert bpe.decode(ids) == f"a{name}b" and max(ids) < bpe.eot_id


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama"])
def test_autotokenizer_settings(bpe, tmp_path, model_type):
    """The config.json beside it must not make transformers choose a class that would rebuild the
    tokenizer."""
    from transformers import PreTrainedTokenizerFast

    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    hf = auto(bpe, tmp_path, max_length=64)
    assert isinstance(hf, PreTrainedTokenizerFast)
    assert (hf.eos_token_id, hf.pad_token_id, hf.bos_token_id) == (415, 416, None)
    assert (hf.padding_side, hf.model_max_length, len(hf), hf.vocab_size) == ("right", 64, 420, 420)
    assert hf.clean_up_tokenization_spaces is False and hf.chat_template is None
    text = " Hello , it 's\u0301 17\r\n "
    assert hf(text)["input_ids"] == bpe.encode(text) and hf.decode(bpe.encode(text)) == text


def test_training_is_deterministic_across_processes(bpe):
    code = (
        "import sys, json; from common.text.tokenizer import Tokenizer;"
        "texts, size = json.load(sys.stdin);"
        "sys.stdout.buffer.write(Tokenizer.train_bpe(texts, size).to_json().encode())"
    )
    texts = json.dumps([[STORY * 3, *NASTY, *NASTY, " 17 17 17"], 420])
    root = Path(__file__).parents[3]
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=texts.encode(),
        cwd=root,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert out.stdout.decode() == bpe.to_json()


@pytest.mark.parametrize("chat", [False, True])
def test_save_and_load_give_the_same_bytes(bpe, tmp_path, chat):
    bpe.with_chat().save(tmp_path)
    first = bpe.with_chat() if chat else bpe
    first.save(tmp_path)
    second = Tokenizer.load(tmp_path)
    assert (second.chat, (tmp_path / "chat_template.jinja").exists()) == (chat, chat)
    assert (
        second.to_json() == first.to_json() == (tmp_path / "tokenizer.json").read_bytes().decode()
    )


def test_characters(tmp_path):
    tokenizer = Tokenizer.characters(["hello\r\n wörld\0", "👩\u200d👧 \u2028"])
    text = "\r\n lo👩  \u2028\0"
    assert tokenizer.encode("\0\n\r dehlorw") == list(range(11))  # code point order
    hf = auto(tokenizer, tmp_path)
    assert (
        hf(text)["input_ids"] == tokenizer.encode(text)
        and len(hf) == tokenizer.vocab_size == 16 + 5
    )
    assert hf.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text
    assert Tokenizer.load(tmp_path).to_json() == tokenizer.to_json()
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\) at position 2"):
        tokenizer.encode("hoéh")


def gpt2_directory(path: Path, files: str) -> Path:
    """A small GPT-2: bytes, four merges, <|endoftext|> last; the two layouts its copies on the Hub
    have."""
    from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["'", "s"]]
    vocab = {
        token: i
        for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>"])
    }
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    if files == "tokenizer.json":
        GPT2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges]).save_pretrained(path)
    else:
        (path / "vocab.json").write_text(json.dumps(vocab))
        (path / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
        )
    return path


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_gpt2_directory(tmp_path, files):
    from transformers import AutoTokenizer

    source = gpt2_directory(tmp_path / "gpt2", files)
    theirs, tokenizer = AutoTokenizer.from_pretrained(source), Tokenizer.load(source)
    assert (tokenizer.eot_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        260,
        261,
        265,
    )  # GPT-2's own stays in place
    assert not tokenizer.chat and tokenizer.decode([258]) == " the"
    ours = auto(tokenizer.with_chat(), tmp_path / "ours")
    for text in [*(t for t in NASTY if "<|" not in t), STORY, "the the's  12345\n\nthe "]:
        assert tokenizer.encode(text) == theirs(text)["input_ids"] == ours(text)["input_ids"], repr(
            text
        )
    assert max(tokenizer.encode("<|endoftext|>")) < 260
    assert Tokenizer.load(tmp_path / "ours").with_chat().to_json() == tokenizer.to_json()


def test_foreign_chat_template_is_not_taken_over(tmp_path):
    source = gpt2_directory(tmp_path / "gpt2", "vocab.json")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.warns(UserWarning, match=r"chat_template\.jinja: not this project's chat format"):
        assert not Tokenizer.load(source).chat


def test_foreign_chat_template_inside_the_settings(bpe, tmp_path):
    """Where transformers before 2025 kept it; ours may stand there too."""
    bpe.save(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    for template in ("{{ messages }}", [{"name": "default", "template": "x"}]):
        (tmp_path / CONFIG).write_text(json.dumps(settings | {"chat_template": template}))
        with pytest.warns(UserWarning, match=r"tokenizer_config\.json: not this project's chat"):
            assert not Tokenizer.load(tmp_path).chat
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    assert Tokenizer.load(tmp_path).chat


def test_a_pattern_that_leaves_characters_out_is_refused(bpe, tmp_path):
    """transformers keeps what no match covers as pieces of their own; tiktoken drops it."""
    bpe.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    content = json.loads(text)
    for pattern, lost in ((r"\p{L}+|\s+|\p{N}", r"'!' \(U\+0021\)"), (r"[^\p{Lo}]+", "'ª'")):
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"leaves out characters such as {lost}"):
            Tokenizer.load(tmp_path)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).decode([64]) == "a"


def test_untaught_ids(bpe, tmp_path):
    """A model of a directory without the chat format knows its own <|endoftext|> at most."""
    for tokenizer, untaught in (
        (bpe, [416, 417, 418, 419]),
        (bpe.with_chat(), []),
        (Tokenizer.load(gpt2_directory(tmp_path / "gpt2", "vocab.json")), [261, 262, 263, 264]),
    ):
        if tokenizer is not bpe:
            assert tokenizer.untaught_ids == untaught
        tokenizer.save(tmp_path / "saved")
        again = Tokenizer.load(tmp_path / "saved")
        assert again.untaught_ids == untaught
    foreign = gpt2_directory(tmp_path / "bare", "vocab.json")
    vocab = json.loads((foreign / "vocab.json").read_text())
    del vocab["<|endoftext|>"]
    (foreign / "vocab.json").write_text(json.dumps(vocab))
    assert Tokenizer.load(foreign).untaught_ids == [260, 261, 262, 263, 264]


def test_a_million_spaces(bpe, tmp_path):
    text = " " * 1_200_000 + "x"
    assert bpe.decode(bpe.encode(text)) == text
    with pytest.raises(
        InputError, match="run of some million spaces"
    ):  # GPT-2's own pattern overflows in tiktoken
        Tokenizer.load(gpt2_directory(tmp_path / "gpt2", "vocab.json")).encode(text)


def test_lone_surrogate_is_refused_with_its_position(bpe):
    for call in (
        bpe.encode,
        lambda text: bpe.encode_batch(["ok", text]),
        lambda text: Tokenizer.train_bpe([text], 300),
    ):
        with pytest.raises(InputError, match=r"U\+D83D at position 2"):
            call("ab\ud83d")


def test_errors_name_the_fix(tmp_path):
    with pytest.raises(InputError, match="vocab_size 260 is below 261"):
        Tokenizer.train_bpe(["abc"], 260)
    with pytest.raises(
        InputError, match="vocab_size 1000 is more than the texts yield: set it to 263"
    ):
        Tokenizer.train_bpe(["ab ab ab"], 1000)
    with pytest.raises(InputError, match=r"nowhere: no tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")
    for content, message in [
        ("{", "no readable tokenizer"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "tokenizer"),
    ]:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=message):
            Tokenizer.load(tmp_path)
