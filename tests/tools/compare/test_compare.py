"""tools.compare: structure, seeds, KL, gate, page and chat on tiny random models and a made-up
ground truth."""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import torch
from rich.console import Console

from common.config.schema import load
from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model, publish
from common.model.gpt import GPT, RewardModel
from common.model.sample import sample
from common.model.shape import GPTConfig
from common.program.errors import Failure, InputError
from common.text.chat import prompt_ids
from common.text.tokenizer import Tokenizer
from tools import page
from tools.compare import __main__ as compare
from tools.compare import report, terminal
from tools.compare.changes import changes_of
from tools.compare.checks import Bars, check_comparison, verdict
from tools.compare.measure import interval

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["red one", "blue two <script>alert(1)</script>", "red three", "blue four", "red five"]


class Verdict(NamedTuple):
    score: float
    correct: bool
    family: str


def judge(prompt: str, answer: str, stopped: bool) -> Verdict:
    """Made up: the share of e's, an answer of even length is right; prompts start with their
    family."""
    if prompt.split()[0] not in ("red", "blue"):
        raise ValueError("unknown colour")
    return Verdict(answer.count("e") / max(1, len(answer)), len(answer) % 2 == 0, prompt.split()[0])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(["red one blue two three four five, here the é is. " * 4], 290)


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory) -> Path:
    """base, sft, rl and twin (the weights of rl), reward; comparisons and prompts."""
    folder = tmp_path_factory.mktemp("runs")
    config = GPTConfig(vocab_size=290, max_length=48, n_layer=1, n_head=2, n_embd=16)
    for seed, name in enumerate(("base", "sft", "rl", "twin")):
        torch.manual_seed(min(seed, 2))
        model = GPT(config)
        torch.nn.init.normal_(model.head.weight, std=0.3)
        stage = {"stage": name, "step": 3, "parent": None, "commit": "c0ffee"}
        publish(folder / name, model, tokenizer if name == "base" else tokenizer.with_chat(), stage)
    torch.manual_seed(9)
    publish(folder / "reward", RewardModel(config), tokenizer.with_chat(), {"stage": "reward"})
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows = [
        {
            "prompt": a,
            "answers": ["eee", "xe", "", "x"],
            "sources": ["policy"] * 2 + ["bad"] * 2,
            "stopped": [True, False, True, True],
            "ranks": [0, 1, 2, 3],
        }
        for a in asked
    ]
    rows.append(
        {"prompt": asked[0], "chosen": "a", "rejected": "b"}
    )  # people's: gold is not asked about it
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def fake_gold(monkeypatch):
    module = types.ModuleType("fake_gold")
    module.judge = judge
    monkeypatch.setitem(sys.modules, "fake_gold", module)


def run(*words: object) -> None:
    compare.main(load(compare.Config, compare.arguments([str(word) for word in words])))


@pytest.fixture(scope="module")
def full(runs, tmp_path_factory):
    """The whole report: (compare.json, folder)."""
    folder = tmp_path_factory.mktemp("report")
    bars = runs / "compare.yaml"
    bars.write_text("checks: {sft_gold_at_least: 0.45}\n")
    module = types.ModuleType("fake_gold")
    module.judge = judge
    sys.modules["fake_gold"] = module
    run(
        runs / "base",
        runs / "sft",
        runs / "rl",
        "--prompts",
        runs / "prompts.jsonl",
        "--reward",
        runs / "reward",
        "--reference",
        runs / "sft",
        "--gold",
        "fake_gold",
        "--comparisons",
        runs / "eval.jsonl",
        "--best_of",
        4,
        "--best_of_prompts",
        3,
        "--max_new_tokens",
        8,
        "--shown",
        4,
        "--output_dir",
        folder,
        "--config",
        bars,
    )
    return json.loads((folder / "compare.json").read_text()), folder


@pytest.mark.heavy
def test_report_structure(full):
    result, folder = full
    for mode in ("sampled", "greedy"):
        assert list(result[mode]) == ["base", "sft", "rl"]
        for row in result[mode].values():
            for kind in ("gold", "reward"):
                low, high = row[kind]["ci95"]
                assert low <= row[kind]["mean"] <= high and row[kind]["n"] == 5
            assert {"kl", "stop_rate", "length"} <= set(row)
            assert {name: kind["n"] for name, kind in row["families"].items()} == {
                "blue": 2,
                "red": 3,
            }
            # means over families, weighted, are the mean over all
            parts = sum(kind["gold"] * kind["n"] for kind in row["families"].values()) / 5
            assert parts == pytest.approx(row["gold"]["mean"], abs=1e-5)
        assert result[mode]["sft"]["kl"] == 0
    assert result["sampled"]["rl"]["kl"] != 0
    assert set(result["best_of_n"]) == {"1", "2", "4"} and result["best_of_prompts"] == 3
    assert result["best_of_n"]["4"]["reward"]["mean"] > result["best_of_n"]["1"]["reward"]["mean"]
    assert result["best_of_n"]["1"]["kl"] == 0 and result["best_of_n"]["4"]["kl"] == pytest.approx(
        0.636294, abs=1e-6
    )
    # The rows of the 3 prompts that best-of answered: golds 1, .5, 0, 0 and four samples of the
    # reference, all of gold 0.
    assert (
        result["reward_model"]["all"]["n"] == 3 * (1 + 6 + 6)
        and result["reward_model"]["prompts"] == 3
    )
    assert result["reward_model"]["by_source"]["bad / policy"]["n"] == 3 * 4
    assert [row["family"] for row in result["samples"]] == [
        "blue",
        "red",
        "blue",
        "red",
    ]  # families in turn
    stage = json.loads((folder / "stage.json").read_text())
    assert stage["gate"]["passed"] is False and "sampled gold of sft is" in stage["gate"]["text"]
    assert "\n" not in stage["gate"]["text"]


def test_same_prompt_same_seed_same_stream(runs, capsys):
    words = (
        runs / "rl",
        runs / "twin",
        "--prompts",
        runs / "prompts.jsonl",
        "--seed",
        5,
        "--max_new_tokens",
        8,
        "--json",
    )
    run(*words)
    result = json.loads(capsys.readouterr().out)  # nothing but JSON on stdout
    model, tokenizer = load_model(str(runs / "rl")), load_tokenizer(str(runs / "rl"))
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    direct = sample(model, ids, max_new_tokens=8, seed=5, stop_ids=[tokenizer.eot_id])
    for row, answer in zip(result["samples"], direct, strict=True):
        said = {name: modes["sampled"]["text"] for name, modes in row["answers"].items()}
        assert said["rl"] == said["twin"] == tokenizer.decode(answer.ids)
    run(*words, "--seed", 6)
    assert json.loads(capsys.readouterr().out)["samples"] != result["samples"]


def test_several_answers_to_each_prompt(runs, capsys):
    """All of them count, whole prompts are drawn for the interval, the first is shown; greedy there
    is only one."""
    words = (
        runs / "rl",
        "--prompts",
        runs / "prompts.jsonl",
        "--gold",
        "fake_gold",
        "--max_new_tokens",
        8,
        "--json",
    )
    run(*words, "--answers_per_prompt", 3)
    result = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(str(runs / "rl")), load_tokenizer(str(runs / "rl"))
    ids = [
        prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
        for prompt in PROMPTS
        for _ in range(3)
    ]
    texts = [
        tokenizer.decode(a.ids)
        for a in sample(model, ids, max_new_tokens=8, seed=0, stop_ids=[tokenizer.eot_id])
    ]
    assert len({*texts[:3]}) > 1
    golds = [judge("red", text, True).score for text in texts]
    figures = result["sampled"]["rl"]
    assert figures["gold"]["n"] == 15 and figures["gold"]["mean"] == pytest.approx(
        sum(golds) / 15, abs=1e-6
    )
    assert (
        figures["gold"]["ci95"]
        == interval([sum(golds[i : i + 3]) for i in range(0, 15, 3)], [3] * 5)["ci95"]
    )
    blue = [len(text) % 2 == 0 for text in texts[3:6] + texts[9:12]]
    assert figures["families"]["blue"]["n"] == 6 and figures["families"]["blue"][
        "correct"
    ] == pytest.approx(sum(blue) / 6, abs=1e-6)
    assert [row["answers"]["rl"]["sampled"]["text"] for row in result["samples"]] == [
        texts[i] for i in (3, 0, 9, 6, 12)
    ]
    run(*words, "--answers_per_prompt", 3, "--temperature", 0)
    assert json.loads(capsys.readouterr().out)["greedy"]["rl"]["gold"]["n"] == 5


def test_kl_against_a_full_forward(runs, tokenizer, capsys):
    """log pi(answer | plain prompt) - log ref(answer | chat prompt), token by token without
    batches."""
    run(
        runs / "base",
        "--prompt",
        "red one",
        "--reference",
        runs / "sft",
        "--max_new_tokens",
        6,
        "--json",
    )
    result = json.loads(capsys.readouterr().out)
    messages = [{"role": "user", "content": "red one"}]
    own = prompt_ids(tokenizer, messages)
    theirs = prompt_ids(tokenizer.with_chat(), messages)
    answer = sample(
        load_model(str(runs / "base")), [own], max_new_tokens=6, stop_ids=[tokenizer.eot_id]
    )[0].ids
    totals = []
    for name, prompt in (("base", own), ("sft", theirs)):
        logprobs = (
            load_model(str(runs / name))(torch.tensor([prompt + answer]))
            .detach()
            .log_softmax(-1)[0]
        )
        totals.append(
            sum(float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))
        )
    assert result["sampled"]["base"]["kl"] == pytest.approx(totals[0] - totals[1], abs=1e-3)


@pytest.mark.heavy
def test_page_needs_nothing_else(full):
    _, folder = full
    text = (folder / "compare.html").read_text()
    links = re.findall(r"""(?:src|srcset|action|link [^>]*href)\s*=\s*["']([^"']*)""", text)
    assert links and all(link.startswith("data:") for link in links)
    pictures = [link for link in links if link.startswith("data:image/png;base64,")]
    assert len(set(pictures)) == 4  # two plots, each for light and for dark pages
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert "&lt;script&gt;" in text  # a prompt is text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    plots = ("compare-best-of-n", "compare-families")
    wanted = [f"{plot}{theme}.png" for plot in plots for theme in ("-dark", "")]
    assert sorted(file.name for file in folder.glob("*.png")) == wanted


@pytest.mark.heavy
def test_page_links_to_the_models_from_where_it_lies(full):
    result, folder = full
    text = (folder / "compare.html").read_text()
    links = [unquote(link) for link in re.findall('<a href="([^"]*)"', text)]
    places = [(folder / link).resolve() for link in links]
    assert places == [Path(model["path"]).resolve() for model in result["models"].values()]
    assert all(link.startswith("./") for link in links)
    assert isinstance(page.link("gpt2", folder), str)  # a model of the Hub


def test_page_folds_long_answers():
    words = "say it again " * 40
    card = page.Card("base", [page.Answer("", words, "", ""), page.Answer("", "short", "", "")])
    template = page.environment().from_string(
        '{% import "macros.html" as part %}{{ part.card(card) }}'
    )
    text = template.render(card=card)
    assert text.count('<details class="long">') == 1
    told = re.sub(r"<span.*?</span>|<[^>]*>", " ", text.split("</details>")[0])
    assert told.split() == ["base", *words.split()]  # nothing is lost at the fold


def test_html_and_terminal_of_a_plain_comparison(runs, tmp_path, capsys):
    file = tmp_path / "page.html"
    run(
        runs / "base",
        runs / "sft",
        "--prompt",
        "red one",
        "--temperature",
        0,
        "--html",
        file,
        "--max_new_tokens",
        4,
    )
    out = capsys.readouterr().out
    assert "red one" in out and "base" in out and "sft" in out
    assert "<h1>Side by side: base / sft</h1>" in file.read_text()


def test_budget_is_that_of_the_smallest_context(runs, capsys):
    run(runs / "sft", "--prompt", "red one", "--max_new_tokens", 900, "--json")
    assert (
        "max_new_tokens 900 -> 4" in capsys.readouterr().err
    )  # context 48 less a prompt of a few tokens


def test_prompts_from_a_text_file(runs, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("red one\n\nblue two\n")
    run(runs / "sft", "--prompts", tmp_path / "p.txt", "--max_new_tokens", 2, "--json")
    assert [row["prompt"] for row in json.loads(capsys.readouterr().out)["samples"]] == [
        "red one",
        "blue two",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "name one or more model directories"),
        ("sft", "either --prompt TEXT or --prompts FILE"),
        ("sft --prompt x --prompts y", "either --prompt TEXT or --prompts FILE"),
        ("sft sft --prompt x", "named twice"),
        ("nowhere/at/all --prompt x", "no such directory"),
        ("reward --prompt x", "reward model, a language model is wanted"),
        ("sft --prompt x --reward sft", "holds a language model, a reward model is wanted"),
        ("sft --prompt x --best_of 2", "best_of needs reward"),
        ("sft --prompt x --comparisons c", "comparisons need reward and gold"),
        ("sft --prompt green --gold fake_gold", "unknown colour"),
        ("sft --prompt red --gold no_such_module", "not a module with a function judge"),
        ("sft --prompt x --output_dir sft", "output_dir sft: is models too"),
        ("sft --prompt x --html sft", "html = 'sft' is refused: name a file"),
        ("sft --prompt x --html sft/config.json/x.html", "config.json is a file; name a directory"),
        ("sft --prompts prompts.jsonl --html ./prompts.jsonl", "it is there and no page"),
        ("sft --prompt x --html sft/stage.json", "it is there and no page"),
        (f"sft --prompt x --seed 1{'0' * 30}", "seed = 1000"),
        ("base --chat", "has no chat template"),
        ("base sft --chat", "--chat takes one model"),
    ],
)
def test_errors(runs, monkeypatch, words, message):
    monkeypatch.chdir(runs)
    with pytest.raises(InputError, match=re.escape(message)):
        run(*words.split())


@pytest.mark.parametrize("judge_of_it", ["reward", "reference", "gold"])
def test_what_is_no_number_is_named(runs, tokenizer, tmp_path, monkeypatch, judge_of_it):
    """A judge that says NaN: one line and no report, never PASS."""
    model = RewardModel if judge_of_it == "reward" else GPT
    broken = model(GPTConfig(vocab_size=290, max_length=48, n_layer=1, n_head=2, n_embd=16))
    torch.nn.init.constant_(broken.trunk.wte.weight, float("nan"))
    publish(tmp_path / "broken", broken, tokenizer.with_chat(), {"stage": "x"})
    module = types.ModuleType("nan_gold")
    module.judge = lambda prompt, answer, stopped: Verdict(float("nan"), True, "red")
    monkeypatch.setitem(sys.modules, "nan_gold", module)
    words = [f"--{judge_of_it}", "nan_gold" if judge_of_it == "gold" else tmp_path / "broken"]
    with pytest.raises(Failure, match="nan"):
        run(runs / "sft", "--prompt", "red", *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "compare.json").exists()


def test_facts_of_a_foreign_stage_are_left_out(runs, tmp_path, capsys):
    shutil.copytree(runs / "sft", tmp_path / "m")
    facts = {"stage": "x", "step": 10**400, "wall_time": float("nan"), "dirty": [float("inf")]}
    (tmp_path / "m" / "stage.json").write_text(json.dumps(facts))
    (tmp_path / "m" / "manifest.json").write_text("{}")
    out = tmp_path / "out"
    run(tmp_path / "m", "--prompt", "red", "--max_new_tokens", 2, "--output_dir", out)
    model = json.loads((out / "compare.json").read_text())["models"]["m"]
    assert [model[key] for key in facts] == ["x", None, None, None]


def test_a_page_may_be_written_again(runs, tmp_path):
    for _ in range(2):
        words = ("--max_new_tokens", 2, "--html", tmp_path / "page.html")
        run(runs / "sft", "--prompt", "red", *words)
    assert page.is_page(tmp_path / "page.html")


def test_names_that_are_empty(runs, monkeypatch):
    monkeypatch.chdir(runs)
    for words, message in (
        (["", "--prompt", "x"], "a file, a folder or a Hub id is wanted"),
        (["sft", "--prompts", ""], "prompts = '' is refused"),
        (["sft", "--prompt", "x", "--html", ""], "html = '' is refused"),
    ):
        with pytest.raises(InputError, match=message):
            run(*words)


@pytest.mark.heavy
def test_command_line(runs):
    start = [sys.executable, "-m", "tools.compare"]
    found = subprocess.run(
        [*start, str(runs / "sft"), "--promt", "x"], capture_output=True, text=True
    )
    assert (
        found.returncode == 2
        and found.stderr == "error: command line: unknown key --promt; did you mean `prompt`?\n"
    )


def test_arguments():
    assert compare.arguments(["a", "--json", "b", "--prompt", "p", "c"]) == [
        "--json=true",
        "--prompt",
        "p",
        "--models",
        "a",
        "b",
        "c",
    ]
    assert compare.arguments(["--models", "a", "b", "--chat", "false"]) == [
        "--chat=false",
        "--models",
        "a",
        "b",
    ]


BARS = Bars(
    base_gold_at_most=0.15,
    sft_gold_at_least=0.45,
    rl_gold_gain=0.15,
    family_drop_at_most=0.03,
    reward_accuracy_at_least=0.75,
)


def figures(gold: float, half: float, **correct: float) -> dict:
    """A model that gives 100 answers to each of 50 prompts, equally many of them correct."""
    kinds = {
        kind: {"correct": share, "n": 5000, "correct_by_prompt": [round(100 * share)] * 50}
        for kind, share in correct.items()
    }
    return {"gold": {"mean": gold, "ci95": [gold - half, gold + half], "n": 200}, "families": kinds}


def judged(result: dict) -> tuple[bool, str]:
    """The gate of base, sft and rl, here b, s and r."""
    names = ["b", "s", "r"]
    result["changes"] = changes_of(result | {"gold": "fake_gold"}, names)
    result["checks"] = check_comparison(result, names, BARS)
    return verdict(result, names)


def test_gate():
    rows = {
        "b": figures(0.08, 0.01, sum=0.0),
        "s": figures(0.54, 0.02, sum=0.97),
        "r": figures(0.69, 0.02, sum=0.94),
    }
    result = {"sampled": rows, "greedy": dict(rows), "reward_model": {"accuracy": 0.75}}
    assert judged(result)[0] and len(result["checks"]) == 7  # every bound is met exactly
    result["greedy"] = rows | {"r": figures(0.57, 0.02, sum=0.9)}
    result["reward_model"] = {"accuracy": 0.7}
    passed, text = judged(result)
    assert not passed and "5 of 7 checks hold" in text
    for part in (
        "greedy gold, r's interval above s's is -0.010, not > 0",
        "accuracy against gold is 0.700, not >= 0.75",
    ):
        assert part in text
    assert "greedy correct" not in text  # one answer a prompt: shown, not judged


def test_a_family_fails_only_where_chance_cannot_explain_its_loss():
    """Both times 5 points of sums are lost: a little everywhere, or all on few prompts while
    others gain."""
    rows = {"b": figures(0.08, 0.01, sum=0.0), "s": figures(0.54, 0.02, sum=0.5)}
    result = {"sampled": rows | {"r": figures(0.69, 0.02, sum=0.45)}}
    result["reward_model"] = {"accuracy": 0.8}
    passed, text = judged(result)
    assert not passed
    assert re.search(
        r"correct sum, r - s is -0.050 \[-0.\d\d\d, -0.\d\d\d\], not >= -0.03, or with 0", text
    )
    scattered = figures(0.69, 0.02, sum=0.45)
    scattered["families"]["sum"]["correct_by_prompt"] = [0, 90] * 25
    result["sampled"]["r"] = scattered
    assert judged(result)[0]
    row = result["changes"]["sampled"]["families"]["sum"]
    assert row["mean"] == -0.05 and row["interval"][1] > 0 and not row["worse"]
    shown = Console(record=True, width=80)
    terminal.show_changes(shown, result["changes"])
    ends = "[{:+.3f}, {:+.3f}]".format(*row["interval"])
    assert f"-0.050 {ends}" in shown.export_text()
    assert report.changes(result["changes"]).rows == [["sum", f"-0.050 {ends}"]]
    assert f"-0.050 [{row['interval'][0]:.3f}" in report.checks(result).rows[-2][1]


def test_only_the_checks_that_a_config_names():
    names, rows = ["b", "s", "r"], {n: figures(0.5, 0.01, sum=0.5) for n in "bsr"}
    result = {"sampled": rows, "greedy": rows, "reward_model": {"accuracy": 0.1}}
    assert check_comparison(result, names, None) == []
    some = check_comparison(result, names, Bars(sft_gold_at_least=0.5))
    assert [(check["name"], check["passed"]) for check in some] == [("sampled gold of s", True)]
    reward = {n: {"reward": {"mean": i, "ci95": [i, i]}} for i, n in enumerate("bsr")}
    assert [c["name"] for c in check_comparison({"sampled": reward}, names, None)] == [
        "sampled reward, r - s"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "checks: {base_gold: 0.1}",
            "unknown key `checks.base_gold`; did you mean `base_gold_at_most`?",
        ),
        ("checks: {rl_gold_gain: 15}", "checks.rl_gold_gain = 15 is refused"),
        ("checks: 3", "; allowed: mapping of base_gold_at_most, sft_gold_at_least"),
    ],
)
def test_checks_of_a_config_are_strict(tmp_path, text, message):
    file = tmp_path / "compare.yaml"
    file.write_text(f"models: [a]\n{text}\n")
    with pytest.raises(InputError, match=re.escape(message)):
        load(compare.Config, ["--config", str(file)])


def test_pieces_hold_back_half_a_character(tokenizer):
    ids = [*tokenizer.encode("a"), *(i for i in range(290) if tokenizer.token_bytes(i) == b"\xc3")]
    second = next(i for i in range(290) if tokenizer.token_bytes(i) == b"\xa9")
    assert list(
        terminal.pieces(tokenizer, iter([*ids, second, tokenizer.role_ids["user"], ids[0]]))
    ) == ["a", "é", "a"]
    assert list(terminal.pieces(tokenizer, iter(ids))) == ["a", "\ufffd"]
    assert terminal.printable("a\x1b[2Jé\n") == "a\\x1b[2Jé\n"


def test_chat_keeps_what_fits_and_forgets(runs, capsys, monkeypatch):
    model, tokenizer = load_model(str(runs / "sft")), load_tokenizer(str(runs / "sft"))
    seen = []

    def fake_stream(model, prompt, **options):
        seen.append(tokenizer.decode(prompt, skip_control=False))
        yield from tokenizer.encode("three")

    monkeypatch.setattr(terminal, "stream", fake_stream)
    lines = iter(["red", "blue", "/reset", "", "one", "here " * 60, "/exit"])
    terminal.chat(model, tokenizer, lambda _: next(lines), max_new_tokens=8, seed=0)
    assert seen == [
        "<|user|>red<|assistant|>",
        "<|user|>red<|assistant|>three<|endoftext|><|user|>blue<|assistant|>",
        "<|user|>one<|assistant|>",
    ]
    out = capsys.readouterr().out
    assert out.count("three") == 3 and "(forgotten)" in out and "there is room for 40" in out
    turns = [{"role": role, "content": "one two three"} for role in ("user", "assistant", "user")]
    assert terminal.fit(tokenizer, turns, 12) == turns[2:]
