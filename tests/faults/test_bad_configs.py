"""Bad configs: each is refused before a weight is read, in one line that names key, value and what
is allowed."""

import pytest
import torch

from common.config.training import RowsConfig

# (stage, lines of its YAML file or words of its command line, what the one line must say); {lm} and
# such are paths.
KEYS = [
    # unknown keys
    (
        "prepare",
        "vocab_sise: 300",
        ["prepare.yaml:", "unknown key `vocab_sise`", "did you mean `vocab_size`?"],
    ),
    ("pretrain", "n_layers: 2", ["unknown key `n_layers`", "did you mean `n_layer`?"]),
    ("sft", "learning_rat: 1e-3", ["unknown key `learning_rat`", "did you mean `learning_rate`?"]),
    (
        "collect",
        "answer_per_prompt: 2",
        ["unknown key `answer_per_prompt`", "did you mean `answers_per_prompt`?"],
    ),
    ("reward", "evaldata: x.jsonl", ["unknown key `evaldata`", "did you mean `eval_data`?"]),
    ("rl", "kl_coeff: 0.1", ["unknown key `kl_coeff`", "did you mean `kl_coef`?"]),
    ("rl", "eval_data: x.jsonl", ["unknown key `eval_data`"]),
    ("sft", "1: 2", ["unknown key `1`"]),
    (
        "sft",
        "--learning-rat 1",
        ["command line", "--learning-rat", "did you mean `learning_rate`?"],
    ),
    ("rl", "--resume_from x", ["command line", "unknown key --resume_from"]),
    ("sft", "--no_lora_r", ["command line", "--no_lora_r"]),
    ("pretrain", "max_steps=3", ["command line", "max_steps=3", "--key value"]),
    # types
    ("prepare", "vocab_size: 1.5", ["vocab_size = 1.5", "int > 0"]),
    ("pretrain", "n_layer: two", ["n_layer = two", "int >= 0"]),
    ("sft", "max_steps: 1.5", ["sft.yaml:", "max_steps = 1.5", "int > 0"]),
    ("sft", "max_steps: true", ["max_steps = True", "int > 0"]),
    ("sft", "parent: 3", ["parent = 3", "str"]),
    ("sft", "parent: [a, b]", ["parent = ['a', 'b']", "str"]),
    ("sft", "train_data: null", ["train_data = None", "str"]),
    ("sft", "lora_targets: qkv", ["lora_targets = qkv", "list of"]),
    ("sft", "torch_compile: 2", ["torch_compile = 2", "true | false"]),
    ("collect", "pairs: people.jsonl", ["pairs = people.jsonl", "list of str"]),
    ("reward", "margin: wide", ["margin = wide", "float >= 0"]),
    ("rl", "num_minibatches: 2.5", ["num_minibatches = 2.5", "int > 0"]),
    ("rl", "gamma: [1]", ["gamma = [1]", "float > 0"]),
    ("sft", "--max_steps 1.5", ["command line", "max_steps = 1.5", "int > 0"]),
    (
        "pretrain",
        "--document_mask maybe",
        ["command line", "document_mask = maybe", "true | false"],
    ),
    # numbers
    ("sft", "learning_rate: .nan", ["learning_rate = .nan"]),
    ("sft", "learning_rate: nan", ["learning_rate = nan", "finite"]),
    ("sft", "learning_rate: -1e-3", ["learning_rate = -0.001", "float >= 0"]),
    ("sft", "weight_decay: 1e999", ["weight_decay = inf", "finite"]),
    ("sft", "seed: -1", ["seed = -1", "int >= 0"]),
    ("sft", "seed: 4294967296", ["seed = 4294967296", "int >= 0 < 4294967296"]),
    ("prepare", "vocab_size: 1000000000000", ["vocab_size = 1000000000000", "<= 1000000"]),
    ("prepare", "eval_fraction: 1", ["eval_fraction = 1", "< 1"]),
    ("prepare", "weights: [0.5, -1]", ["weights.1 = -1"]),
    ("pretrain", "dropout: 1.0", ["dropout = 1.0", "< 1"]),
    ("collect", "temperature: 0", ["temperature = 0", "float > 0"]),
    ("reward", "eval_fraction: 0", ["eval_fraction = 0", "> 0"]),
    ("rl", "gamma: 1.1", ["gamma = 1.1", "<= 1"]),
    ("rl", "clip_range: -0.2", ["clip_range = -0.2", "float > 0"]),
    # sizes that nothing could have
    *[
        (stage, "per_device_train_batch_size: 1000001", ["batch_size 1000001", "1,000,000 rows"])
        for stage in ("pretrain", "sft", "reward", "rl")
    ],
    ("pretrain", "gradient_accumulation_steps: 1000000000", ["steps 1000000000", "1,000,000 rows"]),
    ("sft", "num_train_epochs: 1e308", ["num_train_epochs = 1e+308", "<= 1000000"]),
    ("rl", "clip_range: 1e308", ["clip_range = 1e+308", "<= 1000000000"]),
    ("rl", "clip_range_value: 1e308", ["clip_range_value = 1e+308", "<= 1000000000"]),
    ("sft", "lora_r: 1000000000", ["lora_r = 1000000000", "<= 4096"]),
    ("sft", "max_length: 1000000000", ["max_length = 1000000000", "<= 1048576"]),
    ("pretrain", "n_layer: 1000000000", ["n_layer = 1000000000", "<= 10000"]),
    *[
        ("pretrain", f"{key}: 1000000000", [f"{key} 1000000000", "describes no model"])
        for key in ("n_embd", "n_inner")
    ],
    (
        "pretrain",
        "context_length: 1000000000000",
        ["max_length 1000000000000", "describes no model"],
    ),
    # choices
    ("sft", "mixed_precision: fp8", ["mixed_precision = fp8", "auto | no | bf16 | fp16"]),
    ("sft", "lr_scheduler_type: linaer", ["lr_scheduler_type = linaer", "linear"]),
    ("sft", "on_bad_row: ignore", ["on_bad_row = ignore", "error | skip"]),
    ("rl", "report_to: [trackio]", ["report_to trackio", "pip install trackio"]),
    ("sft", "report_to: [mlflow]", ["report_to.0 = mlflow", "tensorboard"]),
    ("sft", "lora_targets: [q_proj]", ["lora_targets.0 = q_proj", "qkv"]),
    ("sft", "lora_targets: []", ["lora_targets = []", "length >= 1"]),
    ("pretrain", "preset: gpt5", ["preset = gpt5", "gpt2-xl"]),
    ("pretrain", "optimizer: adam", ["optimizer = adam", "adamw | muon"]),
    # YAML that is more than plain values
    ("sft", "max_steps: 1\nmax_steps: 2", ["duplicate key `max_steps`", "sft.yaml:", "keep one"]),
    (
        "sft",
        "parent: !!python/object/apply:os.system [touch {root}/ran]",
        ["python/object/apply:os.system"],
    ),
    ("rl", "env:\n  LD_PRELOAD: evil.so", ["unknown key `env`"]),
    ("sft", "lora_targets: &a [*a]", ["aliases"]),
    ("sft", "parent: [x", ["sft.yaml:", "expected"]),
    ("sft", "--config {root}/nowhere.yaml", ["nowhere.yaml", "No such file"]),
    ("sft", "--config {root}", ["config file", "directory"]),
    # several keys
    ("sft", "max_steps: null", ["max_steps and num_train_epochs", "give one of the two"]),
    ("reward", "max_steps: null", ["max_steps and num_train_epochs", "give one of the two"]),
    ("prepare", "weights: [1, 2]", ["2 weights for 1 entries of train_data"]),
    ("rl", "ptx_coef: 0.5", ["ptx_data None, ptx_coef 0.5", "both, or neither"]),
    ("rl", "eval_steps: 5", ["eval_steps 5"]),
    ("pretrain", "lora_r: 4", ["lora_r 4", "sft, reward and rl"]),
    ("pretrain", "n_head: 3", ["n_embd 32 is not a multiple of n_head 3"]),
    ("pretrain", "row_stride: 17", ["row_stride 17", "max_length 16"]),
    ("sft", "parent: null", ["parent null", "tokenizer"]),
    # places
    ("sft", "output_dir: runs/../../x", ["output_dir = runs/../../x", "`..`"]),
    ("prepare", "output_dir: ../x", ["output_dir = ../x", "`..`"]),
    ("collect", "output_dir: {lm}/../x", ["lm/../x", "`..`"]),
    ("sft", "output_dir: {file}", ["output_dir = {file}", "is a file; name a directory"]),
    ("prepare", "output_dir: {file}/x", ["output_dir = {file}/x", "{file} is a file"]),
    ("collect", "output_dir: {file}", ["output_dir = {file}", "is a file"]),
    ("rl", "output_dir: ''", ["output_dir = ''", "directory"]),
    ("sft", "output_dir: ~/x", ["output_dir = ~/x", "`~` is not expanded here"]),
    ("sft", "train_data: ~/x.jsonl", ["train_data = ~/x.jsonl", "`~` is not expanded here"]),
    *[
        (stage, f"{key}: ''", [f"{key} = ''", "a file, a folder or a Hub id is wanted"])
        for stage, key in (
            *(("sft", key) for key in ("train_data", "eval_data", "parent", "tokenizer")),
            *(("rl", key) for key in ("train_data", "parent", "reference", "reward_model")),
            *(("rl", key) for key in ("critic", "ptx_data")),
            *(("pretrain", "train_data"), ("prepare", "tokenizer"), ("collect", "train_data")),
        )
    ],
    ("prepare", "train_data: ['']", ["train_data.0 = ''", "is wanted"]),
    ("collect", "pairs: ['']", ["pairs.0 = ''", "is wanted"]),
    ("prepare", "--train_data=", ["train_data.0 = ''", "is wanted"]),
    ("sft", "output_dir: {lm}", ["output_dir {lm}: is parent too", "overwritten"]),
    ("collect", "output_dir: {lm}", ["output_dir {lm}: is parent too", "overwritten"]),
    ("rl", "output_dir: {reward}", ["output_dir {reward}: is reward_model too", "overwritten"]),
    ("sft", "parent: runs/nowhere", ["runs/nowhere", "no such directory"]),
    ("reward", "parent: {file}", ["{file}: is a file", "safetensors only"]),
    ("collect", "labeller: os:nothing", ["os:nothing", "module:function"]),
    ("collect", "labeller: os:name", ["os:name", "not a function"]),
    ("pretrain", "train_data: {lm}", ["{lm}: no shards.json there", "stages.pretrain.prepare"]),
    # longer than the model's context of 64
    ("pretrain", "parent: {lm}\nmax_length: 65", ["max_length 65", "context is 64"]),
    ("pretrain", "context_length: 8", ["max_length 16", "is 8 (context_length 8)"]),
    ("sft", "max_length: 65", ["max_length 65", "context is 64"]),
    ("reward", "max_length: 65", ["max_length 65", "context is 64"]),
    ("collect", "max_new_tokens: 15", ["max_prompt_length + max_new_tokens 65", "context is 64"]),
    ("rl", "max_prompt_length: 61", ["max_prompt_length + max_new_tokens 65", "context is 64"]),
    ("rl", "ptx_data: {shards}\nptx_coef: 1\nmax_length: 65", ["max_length 65", "context is 64"]),
    # a model of another kind
    ("sft", "parent: {reward}", ["{reward} holds a reward model", "language model"]),
    ("rl", "reward_model: {lm}", ["{lm} holds a language model", "reward model"]),
]


@pytest.fixture
def no_weights(monkeypatch):

    def fail(folder):
        pytest.fail(f"weights of {folder} were read")

    monkeypatch.setattr("common.handoff.publish.read_weights", fail)


def refused(ended, parts):
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.out + ended.err
    assert all(part in ended.err for part in parts), ended.err


@pytest.mark.parametrize(
    ("stage", "text", "parts"), KEYS, ids=[f"{stage}-{text[:40]}" for stage, text, _ in KEYS]
)
def test_a_bad_config_is_refused_in_one_line(stage, text, parts, program, write, made, no_weights):
    text = text.format_map(made)
    words = text.split() if text.startswith("--") or "=" in text else []
    file = write(stage, "" if words else text)
    ended = program(stage, "--config", str(file), *words)
    refused(ended, [part.format_map(made) for part in parts])
    assert not (file.parent / "out" / "stage.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes fp16")
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "rl"])
def test_fp16_needs_a_gpu(stage, program, write, no_weights):
    ended = program(stage, "--config", str(write(stage, "mixed_precision: fp16")))
    refused(ended, ["mixed_precision fp16", "no or bf16"])


def test_more_processes_than_rows(good, write, monkeypatch):
    cfg = RowsConfig(train_data=good("sft")["train_data"], output_dir="x", max_steps=1)
    assert len(cfg.read(str, dict)[0]) == 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Exception, match=r"rows\.jsonl: 3 training rows for 4 processes"):
        cfg.read(str, dict)


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "sft", "collect", "reward", "rl"])
def test_the_config_without_the_mistake_runs(stage, program, write):
    ended = program(stage, "--config", str(write(stage, "")))
    assert (ended.code, ended.err.count("error")) == (0, 0), ended


STEPS = "steps: {data: {module: data.demo.prepare}, sft: {module: stages.sft.train, launch: true}}"
RECIPES = [
    (
        "output_dirr: x\n" + STEPS,
        [],
        ["pipeline.yaml:1", "unknown key `output_dirr`", "did you mean `output_dir`?"],
    ),
    ("output_dir: x", [], ["`steps` is required"]),
    ("output_dir: x\nsteps: {}", [], ["steps = {}", "at least 1 item", "pipeline.yaml:2"]),
    ("output_dir: x\nsteps: [data]", [], ["steps = ['data']", "mapping"]),
    ("output_dir: 3\n" + STEPS, [], ["output_dir = 3", "str"]),
    ("output_dir: x\nsteps: {a: {module: 'os; rm'}}", [], ["steps.a.module = os; rm"]),
    (
        "output_dir: x\nsteps: {a: {module: m, launch: sometimes}}",
        [],
        ["steps.a.launch = sometimes"],
    ),
    ("output_dir: x\nsteps: {a: {modul: m}}", [], ["steps.a"]),
    ("output_dir: x\nsteps: {a: {module: m, output: ../b}}", [], ["steps.a.output = ../b"]),
    ("output_dir: x\nsteps: {a: {module: m}, a: {module: n}}", [], ["duplicate key `steps.a`"]),
    ("output_dir: x\nenv: {PATH: x}\n" + STEPS, [], ["unknown key `env`"]),
    ("output_dir: !!python/name:os.system\n" + STEPS, [], ["python/name:os.system"]),
    ("output_dir: x\n" + STEPS, ["--from", "sftt"], ["no step sftt", "did you mean `sft`?"]),
    (
        "output_dir: x\n" + STEPS,
        ["--from", "sft", "--to", "data"],
        ["--from sft comes after --to data"],
    ),
    ("output_dir: x\n" + STEPS, ["--sftt.seed=1"], ["--sftt.seed=1", "did you mean `sft`?"]),
    ("output_dir: x\n" + STEPS, ["--seed", "one"], ["--seed", "'one'"]),
    ("output_dir: x\n" + STEPS, [], ["data.yaml", "No such file"]),
]


@pytest.mark.parametrize(("recipe", "words", "parts"), RECIPES)
def test_a_bad_recipe_is_refused_in_one_line(recipe, words, parts, program, tmp_path):
    (tmp_path / "pipeline.yaml").write_text(recipe)
    refused(program("pipeline", str(tmp_path), *words), parts)


def test_no_recipe(program, tmp_path):
    refused(
        program("pipeline", str(tmp_path / "nowhere")), ["nowhere/pipeline.yaml", "No such file"]
    )


def test_there_are_enough_cases():
    assert len(KEYS) + len(RECIPES) >= 60
