"""A recipe's configs -> the Work of each of its steps, before any of them ran; what had to be assumed is said in words.

What a config does not tell (how many rows, how long they are) is read from the files where they exist, else taken from the
command line or from the configs of earlier steps; a length that nobody knows is the longest that is allowed.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic

from common.architecture import PRESETS, ArchitectureConfig, shape_of
from common.chat import comparison_prompt, prompt_ids, render, rows_to_messages, rows_to_prompt
from common.checkpoint import load_config
from common.config import InputError, did_you_mean, load_yaml
from common.data import Row, Shards
from common.facts import Facts, Options, Seen
from common.model import GPTConfig
from common.optim import steps_for
from common.strict_yaml import read_yaml
from common.tokenizer import Tokenizer
from common.train_config import RowsConfig
from common.workload import Work

PREPARE = "stages.pretrain.prepare"
MODULES = {"stages.pretrain.train": "pretrain", "stages.sft.train": "sft", "stages.reward.collect": "collect",
           "stages.reward.train": "reward", "stages.rl.train": "rl"}  # fmt: skip
# Defaults of keys that only one stage has; a test compares them with that stage's Config, which common may not import.
DEFAULTS: dict[str, dict[str, Any]] = {
    "prepare": {"tokenizer": "bpe", "vocab_size": 1024},
    "pretrain": {"optimizer": "adamw", "document_mask": True},
    "sft": {},
    "collect": {"answers_per_prompt": 4, "max_prompts": None, "max_new_tokens": 96, "max_prompt_length": 96, "batch_size": 192,
                "labeller": None, "contrast": None, "eval_fraction": 0.1},
    "reward": {"per_device_train_batch_size": 16},
    "rl": {"max_prompt_length": 96, "max_new_tokens": 80, "per_device_train_batch_size": 64, "num_minibatches": 2,
           "num_ppo_epochs": 4, "max_steps": 40, "save_steps": 10, "ptx_data": None, "ptx_batch_size": 16},
}  # fmt: skip
CUSTOMARY = {"characters": 100, "gpt2": 50257}  # ids of tokenizers that are not here yet
NUMBERS = {"max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length",
           "save_steps", "save_total_limit", "max_prompt_length", "max_new_tokens", "num_minibatches", "num_ppo_epochs",
           "answers_per_prompt", "max_prompts", "batch_size", "ptx_batch_size", "vocab_size"}  # fmt: skip


def shape_from(config: Mapping[str, Any], vocab_size: int, origin: str) -> GPTConfig:
    """The new model that a pretrain config describes."""
    known = ArchitectureConfig.__pydantic_fields__
    try:
        keys = ArchitectureConfig(**{key: value for key, value in config.items() if key in known})
    except pydantic.ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        raise InputError(f"{origin}: {first['loc'][0]} = {first['input']!r} is refused: {first['msg']}") from None
    return shape_of(keys, vocab_size, config["max_length"])


class Plan:
    """`works`, one for each step of a recipe folder, or for the one step whose config file is given; `facts`, with what was
    assumed and the problems that would stop a step at its start."""

    def __init__(self, path: Path, options: Options) -> None:
        if not path.exists():
            raise InputError(f"{path}: no such recipe folder or config file")
        self.folder, only = (path, None) if path.is_dir() else (path.parent, path.stem)
        self.options, self.facts = options, Facts(options)
        recipe = self.folder / "pipeline.yaml"
        written = load_yaml(recipe) if recipe.exists() else {}
        modules = {"prepare": PREPARE} | {stage: module for module, stage in MODULES.items()}
        loose = {name: {"module": module} for name, module in modules.items() if (self.folder / f"{name}.yaml").exists()}
        steps: dict[str, Any] = written.get("steps", loose)
        if only and options.stage:
            steps = {name: step for name, step in steps.items() if step["module"] == PREPARE}
            steps[only] = {"module": modules[options.stage]}
        self.base, self.variables = str(written.get("output_dir", "")), written.get("variables") or {}
        self.stages = {name: MODULES[step["module"]] for name, step in steps.items() if step.get("module") in MODULES}
        if not self.stages or (only and only not in self.stages):
            known = ", ".join(self.stages) or "none"
            raise InputError(
                f"{path}: not a step that trains or samples; those of {self.folder} are {known} (<step>.yaml); or give --stage"
            )
        prepare = next((name for name, step in steps.items() if step.get("module") == PREPARE), None)
        if unknown := {*options.rows, *options.lengths, *options.step_keys} - {*self.stages, prepare}:
            raise InputError(f"command line: {self.folder} has no step {unknown.pop()}; there are {', '.join(self.stages)}")
        stages = self.stages | ({prepare: "prepare"} if prepare else {})
        self.configs = {name: self.settings(name, stage, steps[name].get("args") or {}) for name, stage in stages.items()}
        self.prepared = self.configs.get(prepare) if prepare else None
        self.facts.shards = self.prepared and self.prepared.get("output_dir")
        self.shapes: dict[str, GPTConfig] = {}  # by the folder that a step will publish
        wanted = [name for name, stage in self.stages.items() if only in (None, name) or stage == "pretrain"]
        works = {name: self.work(name, self.stages[name]) for name in wanted}
        self.works = [work for name, work in works.items() if only in (None, name)]

    def settings(self, name: str, stage: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults < the step's file < the recipe's args < the command line."""
        file = self.folder / f"{name}.yaml"
        values, where = read_yaml(file)
        fields = RowsConfig.__pydantic_fields__ if stage not in ("prepare", "collect") else {}
        shared = {key: fields[key].get_default(call_default_factory=True) for key in fields if key != "train_data"}
        given = self.options.step_keys.get(name, {})
        read = [*shared, *DEFAULTS[stage], *ArchitectureConfig.__pydantic_fields__]
        if unread := [key for key in given if key not in read]:
            hint = did_you_mean(unread[0], read)
            raise InputError(f"command line: --{name}.{unread[0]}: not a key of {stage} that changes its costs; {hint}")
        config = {**shared, **DEFAULTS[stage], **values, **args, **given, "file": str(file)}
        for name, value in self.variables.items():
            filled = {
                key: text.replace(f"${{{name}}}", value) for key, text in config.items() if value and isinstance(text, str)
            }
            config |= filled
        for key in sorted(NUMBERS & config.keys()):
            value = config[key]
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                raise InputError(f"{where.get(key, file)}: {key} = {value} is refused; it must be a number above 0")
        return config

    def vocabulary(self, config: Mapping[str, Any]) -> int:
        shards, kind = Path(str(config.get("train_data"))) / "shards.json", (self.prepared or {}).get("tokenizer")
        if self.options.vocab_size:
            return self.options.vocab_size
        if kind == "bpe":
            return self.prepared["vocab_size"]
        if shards.exists():
            return load_yaml(shards)["vocab_size"]
        if kind in CUSTOMARY:
            self.facts.assume(f"prepare: a vocabulary of {CUSTOMARY[kind]:,}, as tokenizer: {kind}; else --vocab_size N")
            return CUSTOMARY[kind]
        raise InputError(f"{config['file']}: nothing tells the size of the vocabulary; give --vocab_size N")

    def shape(self, parent: str | None, name: str) -> GPTConfig:
        """Of the model in folder `parent`: what an earlier step will publish there, or what is there already."""
        if parent in self.shapes:
            return self.shapes[parent]
        source = self.options.model or parent or ""
        if (Path(source) / "config.json").exists():
            shape = load_config(source)
        elif source in PRESETS:
            shape = shape_from({"preset": source, "max_length": 1024}, self.options.vocab_size or 50257, source)
        elif self.shapes and not self.options.model:
            source, shape = next(iter(self.shapes.items()))
        else:
            raise InputError(f"{name}: {source} is not here, and no step makes it; give --model with a directory or a preset")
        self.facts.assume(f"{name}: a model of the shape of {source}")
        return shape

    def work(self, name: str, stage: str) -> Work:
        c, o = self.configs[name], self.options
        fresh = stage in ("pretrain", "sft") and not c["parent"]
        shape = shape_from(c, self.vocabulary(c), c["file"]) if fresh else self.shape(c.get("parent"), name)
        self.shapes[str(c.get("output_dir", f"{self.base}/{name}"))] = shape
        keys = ("max_prompt_length", "max_new_tokens") if stage in ("rl", "collect") else ("max_length",)
        needed = sum(c[key] for key in keys)
        if needed > shape.max_length and stage != "collect":  # collect stops an answer there
            words = f"{' + '.join(keys)} = {needed}, but the model's context is {shape.max_length}"
            self.facts.problems.append(f"{name}: {words}")
        length = min(needed, shape.max_length)
        if stage == "collect":
            return self.collect(c, Work(name, stage, shape, 1, c["batch_size"], steps=1, length=length, precision="no"))
        precision = c["mixed_precision"] if c["mixed_precision"] != "auto" else "bf16" if o.gpu.bf16 else "no"
        base = Work(
            name, stage, shape, o.gpus, c["per_device_train_batch_size"], c["gradient_accumulation_steps"], length=length,
            mean_length=length, precision=precision, lora_r=c["lora_r"], lora_targets=tuple(c["lora_targets"]),
            masked=shape.has_local_layers, checkpointing=o.checkpointing, save_steps=c["save_steps"],
            save_total_limit=c["save_total_limit"],
        )  # fmt: skip
        return {"pretrain": self.pretrain, "sft": self.sft, "reward": self.reward, "rl": self.rl}[stage](c, base)

    def timed(self, work: Work, c: Mapping[str, Any], count: float | None) -> Work:
        """With the number of updates and of rows seen in them; without, where they depend on a number of rows nobody knows."""
        batch = work.micro * work.accumulation * work.minibatches * work.gpus
        if c["max_steps"] is None and count is None:
            self.unknown(work, c)
            return work
        if work.stage == "rl":  # the prompts left over at the end of an epoch are not used
            count = (count or batch) // batch * batch
        try:
            steps = steps_for(c["max_steps"], c["num_train_epochs"], int(count or 1), batch)
        except InputError as error:
            raise InputError(f"{c['file']}: {error}") from None
        whole = c["max_steps"] is not None or work.stage == "rl"
        return replace(work, steps=steps, rows=steps * batch if whole else c["num_train_epochs"] * count)

    def unknown(self, work: Work, c: Mapping[str, Any]) -> None:
        self.facts.assume(
            f"{work.step}: {c.get('train_data')} is not here, so nobody knows its rows; give --rows {work.step}=N"
        )

    def pretrain(self, c: Mapping[str, Any], work: Work) -> Work:
        rows, shards = self.options.rows.get(work.step), Path(str(c.get("train_data")))
        corpus = rows * work.length if rows else None
        if c["optimizer"] == "muon" and work.gpus > 1:
            self.facts.assume(
                f"{work.step}: no ZeRO, as DeepSpeed takes one optimizer, not Muon beside AdamW; its rows: as if it did"
            )
        if rows is None and (shards / "shards.json").exists():
            found = Shards(str(shards), "train", work.length)
            rows, corpus = found.rows, float(found.tokens)
            self.facts.assume(f"{work.step}: {corpus:,.0f} tokens, those of {shards} as it is now")
        work = self.timed(replace(work, optimizer=c["optimizer"], masked=work.masked or c["document_mask"]), c, rows)
        if corpus is None and work.rows:
            corpus = work.rows * work.length
            words = f"shards of {corpus:,.0f} tokens, each seen once; else --rows {work.step}=N, rows of {work.length}"
            self.facts.assume(f"{work.step}: {words}")
        return replace(work, corpus=corpus)

    def sft(self, c: Mapping[str, Any], work: Work) -> Work:
        def measure(tokenizer: Tokenizer, row: Row) -> tuple[float, float]:
            ids, mask = render(tokenizer, rows_to_messages(row.data))
            return min(len(ids), work.length), sum(mask[: work.length])

        seen = self.facts.look(work, c, measure)
        share = seen.second / seen.first if seen.first and seen.second else 1.0
        return self.timed(replace(work, mean_length=self.facts.mean(work, seen.first), logits=share), c, seen.count)

    def sampling(self, c: Mapping[str, Any], work: Work) -> tuple[Work, Seen]:
        """With the tokens of prompts and answers; and what the prompts' file says."""
        response = min(c["max_new_tokens"], work.length - 1)
        work = replace(work, prompt=work.length - response, response=response)
        seen = self.facts.look(work, c, lambda tokenizer, row: (len(prompt_ids(tokenizer, rows_to_prompt(row.data))), 1))
        prompt = min(seen.first or work.prompt, work.prompt)
        mean = self.facts.mean(work, None, f"{prompt:.0f} of prompt + {response} of answer")
        if work.step not in self.options.lengths:
            mean = prompt + response
        return replace(work, mean_length=mean, logits=max(1.0, mean - prompt) / mean), seen

    def collect(self, c: Mapping[str, Any], work: Work) -> Work:
        work, seen = self.sampling(c, work)
        rows = min((n for n in (seen.count, c["max_prompts"]) if n), default=None)
        if rows is None:
            self.unknown(work, c)
        return replace(work, rows=rows, answers=c["answers_per_prompt"])

    def reward(self, c: Mapping[str, Any], work: Work) -> Work:
        def measure(tokenizer: Tokenizer, row: Row) -> tuple[float, float]:
            texts = [str(text) for text in row.data.get("answers") or (row.data["chosen"], row.data["rejected"])]
            prompt = len(prompt_ids(tokenizer, comparison_prompt(row.data)))
            return sum(min(prompt + len(tokenizer.encode(text)) + 1, work.length) for text in texts), len(texts)

        seen = self.facts.look(work, c, measure)
        count, answers = seen.count, self.options.answers or seen.second
        maker = next((name for name, stage in self.stages.items() if stage == "collect"), None)
        made = self.configs[maker] if maker else {"answers_per_prompt": 2, "labeller": "", "contrast": None}
        prompts = min((n for n in (self.options.rows.get(maker or ""), made.get("max_prompts")) if n), default=None)
        if count is None and prompts:
            count = round(prompts * (1 - made["eval_fraction"]))
            self.facts.assume(f"{work.step}: {count:,} comparisons, the prompts of {maker} less its eval_fraction")
        if answers is None:
            answers = made["answers_per_prompt"] + (made["labeller"] is None)
            more = f" as {maker} says" * bool(maker) + " without those that contrast adds" * bool(made["contrast"])
            self.facts.assume(f"{work.step}: {answers} answers a comparison{more}; else --answers K")
        mean = self.facts.mean(work, seen.first / seen.second if seen.first and seen.second else None)
        return self.timed(replace(work, answers=answers, mean_length=mean, logits=0), c, count)

    def rl(self, c: Mapping[str, Any], work: Work) -> Work:
        ptx = c["ptx_batch_size"] * c["max_length"] if c["ptx_data"] else 0
        work = replace(
            work, minibatches=c["num_minibatches"], epochs=c["num_ppo_epochs"], ptx_tokens=ptx, ptx_length=c["max_length"]
        )
        work, seen = self.sampling(c, work)
        judge = str(c.get("critic") or c.get("reward_model"))
        if judge not in self.shapes and (Path(judge) / "config.json").exists():
            work = replace(work, judge=load_config(judge))
        episodes = work.micro * work.accumulation * work.minibatches * work.gpus
        if seen.count and seen.count < episodes:
            keys = "per_device_train_batch_size x gradient_accumulation_steps x num_minibatches x GPUs"
            self.facts.problems.append(
                f"{work.step}: a rollout takes {episodes:,} prompts ({keys}), there are {seen.count:,.0f}"
            )
        return self.timed(work, c, seen.count)
