"""Costs of the stages' own code at the demo's size: counted FLOPs, and the peak memory of real
runs, against the plan."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common.handoff.publish import publish
from common.model.costs import parameters
from common.model.cpu import compile as native
from common.model.gpt import GPT, RewardModel
from common.model.logprobs import linear_logprobs
from common.model.lora import add_lora, merged_state
from common.model.shape import GPTConfig
from common.text.chat import prompt_ids
from common.train.muon import muon
from common.train.placement import DTYPES, accelerator, sampler
from stages.pretrain import train
from stages.rl.experience import Experience
from stages.rl.learn import MicroBatch, Texts, losses
from stages.rl.models import ActorCritic, Models
from stages.rl.rollout import Sampling, roll_out
from stages.rl.train import Config
from stages.sft import train as sft
from tests.conftest import SENTENCES, shape
from tools.plan.planner import Plan
from tools.plan.workload import Work, flops, memory, phases

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def nothing_was_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def demo(step: str, **changes) -> Work:
    """Work of a step of configs/demo."""
    works = {work.step: work for work in Plan(ROOT / "configs/demo").works}
    return replace(works[step], **changes)


def counted(body) -> int:
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # the CPU's fused kernel is not counted
        body()
    return counter.get_total_flops()


def recompute(*models: GPT | RewardModel) -> None:
    """Their blocks, in the backward pass."""
    for block in (block for model in models for block in model.trunk.blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.heavy
def test_flops_of_a_pretraining_step(family, checkpointing):
    work = demo("pretrain", steps=1, rows=2, optimizer="muon", checkpointing=checkpointing)
    if family == "gpt2":
        work = replace(
            work,
            shape=replace(work.shape, family="gpt2", n_inner=0, attention_bias=None, mlp_bias=None),
        )
    model = GPT(work.shape)
    recompute(*[model] * checkpointing)
    optimizer, ids = (
        muon(model, 0.01, 0.01, 0.0),
        torch.randint(0, work.shape.vocab_size, (2, work.length + 1)),
    )

    def body():
        train.next_token_loss(model, ids, eot_id=3).backward()
        optimizer.step()

    # What recomputing blocks adds is 8 % beside Muon; PyTorch leaves the last product of a block
    # out of it.
    assert sum(flops(work)) == pytest.approx(counted(body), rel=0.03 if checkpointing else 0.001)


@pytest.mark.heavy
def test_flops_of_finetuning_and_of_the_reward_model():
    work = demo("sft", steps=1, rows=4, mean_length=100, logits=0.5)
    examples = [sft.Example([1] * 101, [0] * 51 + [1] * 50)] * 4
    model = GPT(work.shape)
    found = counted(lambda: sft.loss(model, examples, 0, torch.device("cpu"))[0].backward())
    assert sum(flops(work)) == pytest.approx(found, rel=0.1)
    work = demo("reward", steps=1, rows=2, mean_length=100, answers=3)
    model = RewardModel(work.shape)
    found = counted(
        lambda: model(torch.ones(6, 100, dtype=torch.long), torch.full((6,), 100)).sum().backward()
    )
    assert sum(flops(work)) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.heavy
def test_flops_of_a_ppo_rollout_and_its_updates(checkpointing):
    """Sampling, scoring by four models, and PPO's epochs with pretraining rows beside them."""
    work = demo(
        "rl",
        steps=1,
        rows=4,
        micro=2,
        minibatches=2,
        epochs=2,
        prompt=10,
        response=30,
        mean_length=40,
        logits=0.75,
        ptx_tokens=2 * 128,
        ptx_length=128,
        checkpointing=checkpointing,
    )
    work = replace(work, critic=replace(work.shape, n_layer=1, attention_pattern=("full",)))
    policy, reference = GPT(work.shape), GPT(work.shape)
    model, judge = ActorCritic(policy, RewardModel(work.critic)), RewardModel(work.shape)
    recompute(*[policy, model.critic] * checkpointing)
    cfg = Config(output_dir="x", parent="x", reward_model="x", train_data="x", ptx_coef=1.0)
    models = Models(model, policy, reference, judge)
    sampling = Sampling(30, 1.0, stop_ids=[], pad_id=0, evaluated_rows=2)
    made = []

    def sampled():
        made.append(roll_out(models, [[1] * 10] * 4, sampling, seed=0))

    def learned():
        zeros_BT = torch.zeros_like(made[0].logprobs_BT)
        experience = Experience(made[0], zeros_BT, zeros_BT, zeros_BT).rows([0, 1])
        ones = torch.ones(2, 128, dtype=torch.long)
        for _ in range(2 * 2):  # epochs x minibatches
            batch = MicroBatch(experience, Texts(ones, documents_RL=ones, targets_RL=ones))
            losses(model, batch, cfg, []).sum().backward()

    predicted = flops(work)
    assert predicted.sampling + predicted.scoring == pytest.approx(counted(sampled), rel=0.1)
    assert predicted.training + predicted.recomputing == pytest.approx(counted(learned), rel=0.1)


def allocated(body) -> int:
    """Most bytes that `body` has alive at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        body()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(
        accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    )


@pytest.mark.heavy
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("language", ["C", "PyTorch"])
def test_logits_take_no_more_than_planned(temperature, dtype, language, monkeypatch):
    """In either pass of the head, over three parts of 256 tokens each."""
    if language == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    V, C, N = 8192, 16, 3 * 256
    hidden, weight = (
        torch.zeros(N, C, dtype=dtype, requires_grad=True),
        torch.zeros(V, C, requires_grad=True),
    )
    made = []
    forward = allocated(
        lambda: made.append(
            linear_logprobs(hidden, weight, torch.zeros(N, dtype=torch.long), temperature)
        )
    )
    backward = allocated(lambda: made[0][0].sum().backward())
    shape = GPTConfig(vocab_size=V, n_layer=1, n_head=1, n_embd=C, max_length=N)
    work = Work(
        "x",
        "sft",
        shape,
        gpus=1,
        micro=1,
        length=N,
        precision="no" if dtype == torch.float32 else "bf16",
    )
    found = max(forward, backward) / memory(work, on_cpu=True).logits
    assert found < 1.02 and (language == "C" or found > 0.6)


@pytest.mark.heavy
def test_publishing_merges_a_sum_of_every_target(peft):
    """Beside the model: so many bytes as LoRA has targets."""
    work = demo("sft", lora_r=4, lora_targets=("qkv", "down"))
    model, kept = GPT(work.shape), []
    assert phases(work).publish == phases(work, zero=2).publish
    add_lora(model, work.lora_r, 8, work.lora_targets)
    found = allocated(lambda: kept.append(merged_state(model)))
    # One adapter's product at a time is alive as well.
    assert phases(work).publish == pytest.approx(found, rel=0.2)
    assert phases(demo("sft")).publish == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ppo_keeps_the_copy_that_it_samples_from(precision, fresh_accelerate):
    work = demo("rl", precision=precision)
    policy, judge, made = GPT(work.shape), RewardModel(work.shape), accelerator("no", 1, 1.0)
    copy = sampler(made, policy, DTYPES[precision])
    models = [policy, judge] + ([] if copy is policy else [copy])  # the reference is as the policy
    assert memory(work).frozen == sum(p.nbytes for model in models for p in model.parameters())


def test_zero_3_splits_what_does_not_learn_too_and_gathers_in_fp32():
    """configs/accelerate/zero3.yaml: all weights are fp32, and split; PPO's copy is whole."""
    work = demo("rl", gpus=4, precision="no")
    two, three = memory(work, 2), memory(work, 3)
    policy = 4 * parameters(work.shape)
    assert three.weights == two.weights / 4 == work.parameters
    assert three.frozen == pytest.approx(two.frozen / 4 + policy)
    assert three.publish == policy and two.publish == 0
    assert three.buffers - two.buffers >= 4 * work.parameters  # gathered while they compute


# Peak memory of the real stages, in a process of its own


MEASURE = """
import json, resource, sys
import torch
from common.config.schema import load
from stages.{stage} import train
small, large = (load(train.Config, words) for words in json.loads(sys.argv[1]))
train.main(small)  # libraries load what they need at the first step
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
train.main(large)
# Not ru_maxrss, which exec inherits from whoever started this process.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak) * 1024 - before)
"""


def measured(stage: str, keys: dict, small: dict) -> float:
    """Bytes by which the process of a stage grows at its highest, after a run with the `small`
    keys."""
    argvs = [
        [word for key, value in {**keys, **more}.items() for word in (f"--{key}", str(value))]
        for more in (small, {})
    ]
    # Every tensor in a mapping of its own, which goes back when it is freed: else the heap's holes
    # would count too.
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-c", MEASURE.format(stage=stage), json.dumps(argvs)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("peak")[-1])


def planned(stage: str, keys: dict, folder: Path) -> float:
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(keys))
    (work,) = Plan(folder / f"{stage}.yaml").works
    return memory(work, on_cpu=True).peak


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and steers glibc's malloc")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.heavy
def test_peak_memory_of_pretraining(tmp_path, tokenizer, checkpointing):
    tokenizer.save(tmp_path / "shards")
    for split in ("train", "eval"):
        torch.randint(0, 290, (20_000,)).numpy().astype("uint16").tofile(
            tmp_path / f"shards/{split}-00000.bin"
        )
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "fingerprint": "x"}
    (tmp_path / "shards/shards.json").write_text(json.dumps(meta))
    keys = {
        "train_data": str(tmp_path / "shards"),
        "output_dir": str(tmp_path / "out"),
        "n_layer": 4,
        "n_head": 8,
        "n_embd": 384,
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "eval_rows": 1,
        "mixed_precision": "no",
        "gradient_checkpointing": checkpointing,
    }
    found = measured("pretrain", keys, {"output_dir": tmp_path / "small", "n_embd": 32})
    assert planned("pretrain", keys, tmp_path) == pytest.approx(found, rel=0.25)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and steers glibc's malloc")
@pytest.mark.heavy
def test_peak_memory_of_ppo(tmp_path, tokenizer):
    """Four models, sampling and PPO updates."""
    config = shape(
        "gpt2", tokenizer.vocab_size, n_embd=384, n_head=8, n_layer=4, n_inner=0, max_length=160
    )
    stage = {"stage": "test", "parent": None, "gate": {"passed": True, "text": ""}, "metrics": {}}
    publish(tmp_path / "sft", GPT(config), tokenizer, stage | {"kind": "lm"})
    publish(tmp_path / "reward", RewardModel(config), tokenizer, stage | {"kind": "reward"})
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": s}) + "\n" for s in [SENTENCES[0]] * 8)
    )
    length = len(
        prompt_ids(tokenizer, [{"role": "user", "content": SENTENCES[0]}])
    )  # all rows as long as the plan takes them
    keys = {
        "parent": str(tmp_path / "sft"),
        "reward_model": str(tmp_path / "reward"),
        "max_steps": 1,
        "train_data": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "num_minibatches": 1,
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 2,
        "max_prompt_length": length,
        "max_new_tokens": 96,
        "mixed_precision": "no",
    }
    found = measured(
        "rl", keys, {"output_dir": tmp_path / "small", "per_device_train_batch_size": 1}
    )
    assert planned("rl", keys, tmp_path) == pytest.approx(found, rel=0.25)
