"""tools.plan from configs alone, on a published run, and with the defaults that our stages have."""

import importlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml

from common.config.schema import load
from common.program.errors import InputError
from common.rows.sources import read_rows
from stages.pretrain import train
from stages.sft import train as sft
from tests.conftest import SENTENCES
from tools.plan import __main__ as plan
from tools.plan.advice import alternatives
from tools.plan.planner import COMPILED, Plan
from tools.plan.recipe import CONFIGS, MODULES, read_step

ROOT = Path(__file__).resolve().parents[3]


def copy_recipe(tmp_path: Path, name: str = "demo") -> Path:
    """A recipe whose runs/ is another, empty one: nothing was run yet."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    for file in (ROOT / "configs" / name).glob("*.yaml"):
        (folder / file.name).write_text(file.read_text().replace("runs/", f"{tmp_path}/runs/"))
    return folder


def report(capsys, *argv) -> dict:
    plan.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def by_step(found: dict) -> dict[str, dict]:
    return {step["step"]: step for step in found["steps"]}


def test_demo_before_anything_ran(tmp_path, capsys):
    found = report(
        capsys,
        copy_recipe(tmp_path),
        "--sft.rows=16000",
        "--collect.rows=3000",
        "--sft.length=42",
        "--reward.answers=6",
    )
    steps = by_step(found)
    assert list(steps) == ["pretrain", "sft", "collect", "reward", "rl"]
    assert steps["pretrain"]["parameters"] == steps["sft"]["parameters"] == 2_041_536
    assert steps["pretrain"]["tokens"] == 1500 * 16 * 128
    assert steps["sft"]["steps"] == 1000 and steps["sft"]["tokens"] == 16000 * 42
    assert steps["reward"]["steps"] == 360 and steps["reward"]["tokens"] == 2160 * 6 * 128
    assert (
        steps["rl"]["parameters"] == 2_041_536 + 2_041_536 + 192
    )  # policy and critic, its scalar head
    assert steps["rl"]["tokens"] == 28 * 128 * (32 + 96)
    assert all(step["fits"] for step in found["steps"]) and found["does_not_fit"] == []
    assert any("2,160 comparisons" in line for line in found["assumed"])
    assert found["total"]["flops"] == pytest.approx(sum(step["flops"] for step in found["steps"]))


def test_what_nobody_knows_is_said_and_the_rest_is_planned(tmp_path, capsys):
    found = report(capsys, copy_recipe(tmp_path))
    steps = by_step(found)
    assert steps["sft"]["tokens"] is steps["sft"]["seconds"] is steps["sft"]["dollars"] is None
    assert steps["sft"]["memory"]["0"]["peak"] > 0 and steps["rl"]["flops"] > 0
    assert any("give --sft.rows=N" in line for line in found["assumed"])
    plan.main([str(tmp_path / "demo")])
    text = capsys.readouterr().out
    assert "give --sft.rows=N" in text and "pretrain" in text and "what is known" in text


def test_files_that_exist_are_counted(tmp_path, capsys, tokenizer):
    folder = copy_recipe(tmp_path)
    data, made = tmp_path / "runs/demo/data", tmp_path / "runs/demo/prepare"
    data.mkdir(parents=True)
    rows = [
        {"prompt": "Name an animal.", "completion": "The fox."},
        {"prompt": SENTENCES[0], "completion": SENTENCES[1]},
    ]
    (data / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 50))
    assert (
        by_step(report(capsys, folder))["sft"]["tokens"] == 100 * 128
    )  # no tokenizer yet: the longest
    tokenizer.save(made)
    examples, _ = sft.cut(read_rows(str(data / "sft.jsonl"), partial(sft.parse, tokenizer)), 128)
    assert by_step(report(capsys, folder))["sft"]["tokens"] == pytest.approx(
        sum(len(e.ids) for e in examples)
    )


def llama_65b(tmp_path: Path, **keys) -> Path:
    config = {
        "output_dir": "x",
        "train_data": "nowhere",
        "family": "llama",
        "n_layer": 80,
        "n_head": 64,
        "n_embd": 8192,
        "n_inner": 22016,
        "tie_embeddings": False,
        "max_length": 2048,
        "per_device_train_batch_size": 1,
        "max_steps": 333_786,
    }
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(config | keys))
    return tmp_path / "pretrain.yaml"


def test_llama_65b(tmp_path, capsys):
    """Touvron 2023, section 2.4: 1.4T tokens, 2048 A100-80GB, about 21 days, 380 tokens/s/GPU."""
    given = ("--vocab_size", 32000, "--gpus", 2048, "--gpu", "a100-80", "--mfu", 0.5, "--price", 2)
    found = report(capsys, llama_65b(tmp_path), *given)
    (step,) = found["steps"]
    assert step["parameters"] == pytest.approx(65.2e9, rel=0.005) and step[
        "tokens"
    ] == pytest.approx(1.4e12, rel=0.001)
    assert step["seconds"] / 86400 == pytest.approx(21, rel=0.05)
    assert step["tokens_per_second_per_gpu"] == pytest.approx(380, rel=0.05)
    assert step["dollars"] == pytest.approx(step["seconds"] / 3600 * 2048 * 2)
    # ZeRO-3 holds a part of the weights, but publishing puts all 261 GB together on every GPU.
    assert step["memory"]["3"]["weights"] < 1e9 and step["fits"] == []
    assert step["memory"]["3"]["publish"] == 8 * step["parameters"]  # and a copy to sample from
    assert "No number of GPUs helps" in step["advice"]
    assert "every GPU has the whole model" in step["advice"]


def llama_7b(tmp_path: Path, **keys) -> Path:
    return llama_65b(tmp_path, n_layer=32, n_head=32, n_embd=4096, n_inner=11008, **keys)


def test_what_does_not_fit_and_the_smallest_change(tmp_path, capsys):
    file = llama_7b(tmp_path, per_device_train_batch_size=8)
    common = (file, "--vocab_size", 32000, "--gpu", "h100")
    (line,) = report(capsys, *common, "--gpus", 8)["does_not_fit"] or [""]
    assert (
        "ZeRO stage" in line
        and "per_device_train_batch_size" in line
        and "Smallest change that fits" in line
    )
    (alone,) = report(capsys, *common)["does_not_fit"]
    assert "GPUs and ZeRO stage" in alone
    plan.main([str(file), "--vocab_size", "32000"])
    assert "Does not fit: pretrain needs" in capsys.readouterr().out


def test_the_advice_fits_when_followed(tmp_path, capsys):
    file = llama_7b(tmp_path, per_device_train_batch_size=16)
    (line,) = report(capsys, file, "--vocab_size", 32000, "--gpus", 8, "--gpu", "a100-80")[
        "does_not_fit"
    ]
    micro, accumulation = re.search(
        r"per_device_train_batch_size (\d+), gradient_accumulation_steps (\d+)", line
    ).groups()
    changes = (
        f"--pretrain.per_device_train_batch_size={micro}",
        f"--pretrain.gradient_accumulation_steps={accumulation}",
    )
    found = report(capsys, file, "--vocab_size", 32000, "--gpus", 8, "--gpu", "a100-80", *changes)
    assert int(re.search(r"ZeRO stage (\d)", line)[1]) == found["steps"][0]["fits"][0]


def test_the_changed_batch_is_the_same_batch(tmp_path):
    file = llama_7b(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    (work,) = Plan(file, 8, vocab_size=32000).works
    for factor in (1, 2, 4, 16):
        found = alternatives(work, factor)
        assert all(
            changed.micro * changed.accumulation * changed.gpus == 8 * 2 * 8
            for changed, _, _ in found
        )
        assert [len(words) for _, _, words in found] == sorted(len(words) for _, _, words in found)


def test_four_whole_models_are_too_much(tmp_path, capsys):
    llama_7b(tmp_path)
    keys = {
        "output_dir": "x",
        "parent": "y",
        "reward_model": "z",
        "train_data": "p",
        "per_device_train_batch_size": 1,
    }
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(keys))
    (line,) = report(capsys, tmp_path / "rl.yaml", "--vocab_size", 32000, "--gpu", "a100-40")[
        "does_not_fit"
    ]
    assert "No number of GPUs helps" in line and "every GPU has the whole model" in line


def test_critic_and_reward_model_have_each_their_own_shape(tmp_path, capsys):
    """A critic is learned and published, a reward model only scores: neither's size is that of the
    other."""

    def planned(**keys) -> dict:
        common = {"output_dir": "x", "parent": "nowhere", "train_data": "p"}
        (tmp_path / "rl.yaml").write_text(yaml.safe_dump(common | keys))
        return by_step(report(capsys, tmp_path / "rl.yaml", "--model", "gpt2"))["rl"]

    config = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": 2,
        "n_head": 4,
    }
    for name, width in (("small", 64), ("large", 2048)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"n_embd": width}))
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    plain, critic, judge = (
        planned(reward_model=small),
        planned(reward_model=small, critic=large),
        planned(reward_model=large),
    )
    assert (
        critic["memory"]["0"]["frozen"]
        == plain["memory"]["0"]["frozen"]
        < judge["memory"]["0"]["frozen"]
    )
    assert (
        critic["parameters"] == judge["parameters"] > plain["parameters"]
    )  # null = the reward model
    assert (
        plain["flops_by_kind"]["scoring"]
        < critic["flops_by_kind"]["scoring"]
        < judge["flops_by_kind"]["scoring"]
    )


def test_fewer_answers_at_once_need_less_memory(tmp_path):
    overrides = {"rl": {"rollout_batch_size": "3"}}
    plans = [Plan(copy_recipe(tmp_path), 1, given) for given in ({}, overrides)]
    rows = [plan.works[-1].rollout_rows for plan in plans]
    assert rows[0] > rows[1] == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["configs/demo", "--gpu", "h1000"], "gpu = h1000 is refused"),
        (["configs/demo", "--gpus", "0"], "gpus = 0 is refused"),
        (["configs/demo", "--mfu", "1.5"], "mfu = 1.5 is refused"),
        (["configs/demo", "--sft.rows=sft"], "rows = sft is refused"),
        (["configs/demo", "--sft.rows=0"], "rows = 0 is refused"),
        (["configs/demo", "--sfd.rows=3"], "no step sfd"),
        (["configs/demo", "--gpu_s", "3"], "unknown key --gpu_s"),
        (["configs/demo", "--sft.max_length=many"], "max_length = many is refused"),
        (["configs/demo", "--sft.max_lenght=3"], "did you mean `max_length`"),
        (["configs/demo", "--pretrain.n_layer=-1"], "n_layer = -1 is refused"),
        (["configs/nowhere"], "configs/nowhere: no such"),
        (["configs/demo/compare.yaml"], "not a step that trains or samples"),
        (["configs/gpt2-finetune", "--model", "runs/nowhere"], "runs/nowhere is not here"),
        (["configs/demo/rl.yaml", "--model", "gpt2"], "--model gpt2: configs/demo/rl.yaml has no"),
    ],
)
def test_mistakes_are_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words.replace("(", "\\(")) as caught:
        plan.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [a]", r"steps = \['a'\] is refused"),
        ("steps:", "steps = None is refused"),
        ("steps: {a: fake}", "steps.a = 'fake' is refused"),
        ("steps: {a: {module: fake, args: [1]}}", r"steps.a.args = \[1\] is refused"),
        ("variables: [x]", r"variables = \['x'\] is refused"),
    ],
)
def test_a_recipe_of_another_shape_is_one_line(text, words, tmp_path):
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        plan.main([str(tmp_path)])


def test_a_config_that_could_not_start_is_named(tmp_path, capsys):
    found = report(
        capsys,
        copy_recipe(tmp_path),
        "--sft.max_length=500",
        "--rl.max_new_tokens=400",
        "--rl.rows=100",
    )
    assert [line.split(":")[0] for line in found["problems"]] == ["sft", "rl", "rl"]
    assert "max_length = 500, but the model's context is 192" in found["problems"][0]


def test_gradient_checkpointing_trades_memory_for_a_third_more_time(tmp_path, capsys):
    file, given = (
        llama_7b(tmp_path, per_device_train_batch_size=8),
        ("--vocab_size", 32000, "--gpus", 8),
    )
    plain = report(capsys, file, *given)["steps"][0]
    found = report(capsys, file, *given, "--pretrain.gradient_checkpointing=true")
    (step,) = found["steps"]
    assert plain["fits"] == [] and step["fits"] == [1, 2, 3] and found["does_not_fit"] == []
    # Of 32 blocks their inputs and one block's activations, and what lies outside the blocks.
    assert step["memory"]["1"]["activations"] < 0.2 * plain["memory"]["1"]["activations"]
    assert step["memory"]["1"]["logits"] == plain["memory"]["1"]["logits"]
    for total in ("flops", "seconds"):  # 4/3 less the head, which is computed twice in either
        assert (
            step[total] == pytest.approx(4 / 3 * plain[total], rel=0.01)
            and step[total] < 4 / 3 * plain[total]
        )


def test_what_compiling_saves_is_said_to_be_unknown(tmp_path, capsys):
    file = llama_7b(tmp_path)
    plain, compiled = (
        report(capsys, file, "--vocab_size", 300, f"--pretrain.torch_compile={on}")
        for on in ("false", "true")
    )
    assert compiled["steps"] == plain["steps"]
    assert [line for line in compiled["assumed"] if line not in plain["assumed"]] == [
        f"pretrain: {COMPILED}"
    ]


def test_pretraining_refuses_lora_in_the_stage_s_words(tmp_path, capsys):
    """And is planned without, as it would run once the key is gone."""
    file = llama_7b(tmp_path)
    given = (file, "--vocab_size", 300, "--memory", 1)
    plain, lora = (report(capsys, *given, f"--pretrain.lora_r={rank}") for rank in (0, 8))
    with pytest.raises(InputError) as refused:
        train.main(train.Config(output_dir="x", train_data="y", max_steps=1, lora_r=8))
    assert lora["problems"] == [f"pretrain: {refused.value}"] and plain["problems"] == []
    assert lora["steps"] == plain["steps"] and lora["does_not_fit"] == plain["does_not_fit"]
    assert "What may: a larger GPU, gradient_checkpointing" in plain["does_not_fit"][0]
    assert "lora_r" not in plain["does_not_fit"][0]


@pytest.mark.parametrize(
    "name", sorted(path.parent.name for path in ROOT.glob("configs/*/pipeline.yaml"))
)
def test_every_recipe_can_be_planned(name, monkeypatch, tmp_path, capsys):
    if not any(
        step.get("module", "").endswith(("train", "collect"))
        for step in yaml.safe_load((ROOT / f"configs/{name}/pipeline.yaml").read_text())[
            "steps"
        ].values()
    ):
        pytest.skip("trains nothing")
    found = report(capsys, copy_recipe(tmp_path, name), "--model", "gpt2", "--vocab_size", "300")
    assert found["steps"] and all(step["memory"]["0"]["peak"] > 0 for step in found["steps"])


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_config_is_read_as_the_stage_reads_it(stage, tmp_path):
    """Defaults, file and command line, by the stage's own class."""
    required = {"parent": "p", "train_data": "t", "reward_model": "r", "output_dir": "o"}
    fields = CONFIGS[stage].__pydantic_fields__
    keys = {key: value for key, value in required.items() if key in fields}
    if stage == "prepare":
        keys["train_data"] = ["t"]
    if "num_train_epochs" in fields and stage != "rl":
        keys["num_train_epochs"] = 2
    file = tmp_path / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(keys))
    step = read_step(file, stage, {}, {}, {"seed": "7", "rows": "12"})
    module = importlib.import_module(MODULES[stage])
    assert step.config == load(module.Config, ["--config", str(file), "--seed", "7"])
    assert (step.name, step.facts.rows, step.facts.length) == (stage, 12, None)


def test_what_is_filled_in(tmp_path):
    """Variables with a default, a folder that only the recipe names, the recipe's args."""
    (tmp_path / "base.yaml").write_text("train_data: ${text}\nparent: ${model}\nmax_steps: 3\n")
    recipe = {"output_dir": "runs/x", "variables": {"text": "a.txt", "model": None}}
    step = read_step(tmp_path / "base.yaml", "pretrain", recipe, {"max_steps": 5}, {})
    config = step.config
    assert (config.train_data, config.parent) == ("a.txt", "${model}")
    assert (config.max_steps, config.output_dir) == (5, "runs/x/base")
    with pytest.raises(InputError, match=r"pipeline.yaml: max_steps = 0 is refused"):
        read_step(tmp_path / "base.yaml", "pretrain", recipe, {"max_steps": 0}, {})
