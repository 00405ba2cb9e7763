"""The baby GPT from its sequence to its picture: 12 656 parameters, what 50 steps teach it, and
what the counts say."""

import itertools
import json
import math
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from common.config.schema import load
from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model, publish
from common.program.errors import Failure, InputError
from data.baby import prepare as baby
from stages.pretrain import prepare, train
from tools.chain import __main__ as chain
from tools.chain import drawing as markov

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "baby"
# 111101111011110: what follows each window of three, by hand.
COUNTS = {"111": (3, 3), "110": (0, 2), "101": (0, 2), "011": (0, 2)}


def config(module, **keys):
    given = {key: value if isinstance(value, list) else [value] for key, value in keys.items()}
    words = [word for key, values in given.items() for word in (f"--{key}", *map(str, values))]
    name = {baby: "data", prepare: "prepare", train: "pretrain", chain: "chain"}[module]
    return load(module.Config, ["--config", str(CONFIGS / f"{name}.yaml"), *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(steps) -> folder of a baby GPT trained so long and drawn without Graphviz."""
    root, made = tmp_path_factory.mktemp("baby"), {}
    baby.main(config(baby, output_dir=root / "data"))
    sources = {"train_data": [root / "data" / "documents.jsonl"], "tokenizer": root / "data"}
    prepare.main(config(prepare, output_dir=root / "prepare", **sources))

    def run(steps: int) -> Path:
        if steps not in made:
            AcceleratorState._reset_state(True)
            made[steps] = root / str(steps)
            train.main(
                config(
                    train,
                    output_dir=made[steps],
                    train_data=root / "prepare",
                    max_steps=steps,
                    eval_steps="null",
                )
            )
            AcceleratorState._reset_state(True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(markov, "has_graphviz", lambda: False)
                patch.setattr(chain, "has_graphviz", lambda: False)
                chain.main(config(chain, model=made[steps], output_dir=made[steps] / "chain"))
        return made[steps]

    return run


def arrows(folder: Path, column: str) -> dict[str, float]:
    rows = json.loads((folder / "chain" / "chain.json").read_text())["arrows"]
    return {f"{row['state']}->{row['next']}": row[column] for row in rows}


def test_fifty_steps(trained):
    folder = trained(50)
    result = json.loads((folder / "chain" / "chain.json").read_text())
    assert result["parameters"] == 12_656 and len(result["arrows"]) == 16
    before, after = arrows(folder, "before"), arrows(folder, "after")
    assert all(abs(value - 0.5) < 0.1 for value in before.values())
    assert after["101->011"] > 0.7 and after["011->111"] > 0.7 and after["110->101"] > 0.7
    assert after["111->110"] == pytest.approx(0.5, abs=0.07)
    for state in ("000", "001", "010", "100"):  # never seen, and yet the model has an opinion
        assert max(after[f"{state}->{state[1:]}{token}"] for token in "01") > 0.65
    for column in (before, after):
        assert all(
            column[f"{s}->{s[1:]}0"] + column[f"{s}->{s[1:]}1"] == pytest.approx(1, abs=1e-5)
            for s in COUNTS
        )
    assert {
        (row["state"], row["token"]): row["count"]
        for row in result["arrows"]
        if row["state"] in COUNTS
    } == {
        (state, str(token)): count
        for state, pair in COUNTS.items()
        for token, count in enumerate(pair)
    }
    assert json.loads((folder / "chain" / "stage.json").read_text())["gate"]["passed"]


def test_before_is_what_the_run_began_with(trained):
    """Cross-entropy of the 12 windows under the arrows `before` and `after` = the losses that the
    run logged itself."""
    folder = trained(50)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [row["eval_loss"] for row in logged if "eval_loss" in row]
    for column, loss in (("before", logged[0]), ("after", logged[-1])):
        found = arrows(folder, column)
        terms = [
            n * math.log(found[f"{s}->{s[1:]}{token}"])
            for s, pair in COUNTS.items()
            for token, n in enumerate(pair)
            if n
        ]
        assert -sum(terms) / 12 == pytest.approx(loss, abs=1e-5)


def test_trained_longer_it_comes_to_the_exact_counts(trained):
    found = arrows(trained(300), "after")
    for state, (zero, one) in COUNTS.items():
        assert found[f"{state}->{state[1:]}1"] == pytest.approx(one / (zero + one), abs=0.03)


def test_transformers_opens_a_model_of_two_tokens(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained(50)
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (tokenizer("1101")["input_ids"], len(tokenizer), tokenizer.eos_token) == (
        [1, 1, 0, 1],
        2,
        None,
    )
    with torch.no_grad():
        logits = theirs(torch.tensor([[1, 0, 1]])).logits[0, -1]
    assert float(logits.softmax(-1)[1]) == pytest.approx(
        arrows(folder, "after")["101->011"], abs=1e-5
    )
    with pytest.raises(InputError, match="bare characters can only go on with text"):
        load_tokenizer(str(folder)).with_chat()


def texts(svg: Path) -> str:
    root = ET.fromstring(svg.read_text())  # well-formed
    return " ".join(
        " ".join("".join(node.itertext()).split())
        for node in root.iter("{http://www.w3.org/2000/svg}text")
    )


def test_pictures_without_graphviz(trained):
    folder = trained(50) / "chain"
    for name in ("before", "after", "counted"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.fromstring((folder / f"{name}.svg").read_text()).tag.endswith("svg")
    page = (folder / "chain.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "101 -&gt; 011" in page


@pytest.mark.skipif(not shutil.which("circo"), reason="Graphviz is not installed")
def test_pictures_of_graphviz(tmp_path):
    values = np.array([[0.25, 0.75], [1.0, 0.0]])
    markov.draw(
        markov.Chain("<t> & t", ["\\n", '"<'], ["\\n", '"<'], values, np.array([True, False])),
        tmp_path / "x",
    )
    shown = texts(tmp_path / "x.svg")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert all(
        word in shown for word in ("<t> & t", "\\n 25%", '"< 75%', "\\n 100%")
    ) and "0%" not in shown.replace("100%", "")


@pytest.mark.parametrize(("V", "context"), [(2, 1), (2, 3), (2, 4), (3, 2), (5, 1)])
def test_on_the_circle_each_state_leads_to_the_next(V, context):
    order = markov.round_order(V**context, V)
    assert sorted(order) == list(range(V**context))
    assert all(
        after // V == before % V ** (context - 1) for before, after in itertools.pairwise(order)
    )


def test_errors_name_the_fix(trained, tmp_path, tiny_gpt, tokenizer, stage_dir):
    folder = stage_dir(tiny_gpt())
    with pytest.raises(
        InputError, match=r"295 tokens and a context of 64 make 295\^65 arrows, 32 can be drawn$"
    ):
        chain.main(config(chain, model=folder, output_dir=tmp_path / "x"))
    with pytest.raises(InputError, match="context 4: the model's is 3"):
        chain.main(config(chain, model=trained(50), output_dir=tmp_path / "x", context=4))
    assert not (tmp_path / "x").exists()


def test_a_model_without_finite_probabilities_is_no_chain(trained, tmp_path):
    folder = trained(50)
    model, tokenizer = load_model(str(folder), "lm"), load_tokenizer(str(folder))
    torch.nn.init.constant_(model.trunk.wte.weight, float("nan"))
    publish(tmp_path / "nan", model, tokenizer, {"stage": "pretrain"})
    with pytest.raises(Failure, match="probabilities are not finite"):
        chain.main(config(chain, model=tmp_path / "nan", output_dir=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("seed", ["x", None, 0.5, -1, 10**30, [1]])
def test_a_foreign_config_does_not_say_how_it_began(tiny_gpt, seed):
    stage = {"config": {"n_layer": "many", "max_length": [3], "parent": 5, "seed": seed}}
    assert chain.before_training(stage, tiny_gpt()) is None


def test_a_directory_of_other_makers(trained, tmp_path, monkeypatch):
    """No stage.json: nothing is known of how it began, nor of its text."""
    monkeypatch.setattr(markov, "has_graphviz", lambda: False)
    folder = tmp_path / "bare"
    shutil.copytree(
        trained(50), folder, ignore=shutil.ignore_patterns("stage.json", "manifest.json", "chain")
    )
    chain.main(config(chain, model=folder, output_dir=tmp_path / "out"))
    result = json.loads((tmp_path / "out" / "chain.json").read_text())
    assert (
        set(result["arrows"][0]) == {"state", "token", "next", "after"} and result["distance"] == {}
    )
