"""A recipe's configs -> the Work of each of its steps, before any of them ran; what had to be
assumed is said in words.

What a config does not tell (how many rows, how long they are) is read from the files where they
exist, else taken from the command line or from the configs of earlier steps; a length that nobody
knows is the longest that is allowed.
"""

import ast
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import pydantic

from common.config.schema import did_you_mean
from common.config.strict_yaml import load_yaml, read_yaml
from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_config
from common.model.presets import PRESETS, ArchitectureConfig, shape_of
from common.model.shape import GPTConfig
from common.program.errors import InputError
from common.rows.shards import Shards
from common.rows.sources import Row, read_rows
from common.text.chat import comparison_prompt, prompt_ids, render, rows_to_messages, rows_to_prompt
from common.text.tokenizer import Tokenizer
from common.train.optimizers import steps_for
from tools.plan.workload import Work

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "prepare": "stages.pretrain.prepare",
    "pretrain": "stages.pretrain.train",
    "sft": "stages.sft.train",
    "collect": "stages.reward.collect",
    "reward": "stages.reward.train",
    "rl": "stages.rl.train",
}
STAGES = {module: stage for stage, module in MODULES.items()}
# What only files tell, and until they are here the command line: training rows, tokens of a mean
# row (in collect and rl of prompt and answer), answers of a comparison.
UNWRITTEN = {"rows": None, "length": None, "answers": None}
NUMBERS = {
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "save_steps",
    "save_total_limit",
    "max_prompt_length",
    "max_new_tokens",
    "num_minibatches",
    "num_ppo_epochs",
    "answers_per_prompt",
    "max_prompts",
    "batch_size",
    "ptx_batch_size",
    "vocab_size",
    "row_stride",
    *UNWRITTEN,
}
CUSTOMARY = {"characters": 100, "gpt2": 50257}  # ids of tokenizers that are not here yet
COMPILED = "torch_compile changes no figure: MFU is of what runs, launches are of eager code, the time of compiling is left out"
SAMPLE = 300  # rows that are tokenised to see how long rows are
LARGE = 500e6  # bytes: a plan reads no file beyond that


def defaults(module: str, name: str = "Config") -> dict[str, Any]:
    """{key: default, None where required} of a step's config; read as text, as code outside a stage
    may not import it."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    origins = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    config = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
    )
    found = {}
    for base in reversed(config.bases):
        found |= defaults(origins.get(base.id, module), base.id)
    fields = (node for node in config.body if isinstance(node, ast.AnnAssign))
    return found | {
        field.target.id: field.value and ast.literal_eval(field.value) for field in fields
    }


def settings(
    file: Path, stage: str, recipe: Mapping, args: Mapping, given: Mapping
) -> dict[str, Any]:
    """Defaults < the step's file < the recipe's args < the command line."""
    values, where = read_yaml(file)
    variables = {name: text for name, text in (recipe.get("variables") or {}).items() if text}
    known = defaults(MODULES[stage]) | UNWRITTEN
    config = known | values | args | given
    for key, value in config.items():
        place = "command line" if key in given else where.get(key, file)
        if key not in known:
            raise InputError(
                f"{place}: {key} is not a key of {stage}; {did_you_mean(key, list(known))}"
            )
        if key in NUMBERS and value is not None and (type(value) not in (int, float) or value <= 0):
            raise InputError(f"{place}: {key} = {value} is refused; it must be a number above 0")
    filled = {
        key: Template(text).safe_substitute(variables)
        for key, text in config.items()
        if isinstance(text, str)
    }
    output = filled.get("output_dir") or f"{recipe.get('output_dir')}/{file.stem}"
    return config | filled | {"output_dir": output, "step": file.stem, "stage": stage, "file": file}


def read_recipe(
    path: Path, stage: str | None, keys: Mapping[str, Mapping]
) -> dict[str, dict[str, Any]]:
    """{step: its settings} of a recipe's folder, or, where it has no pipeline.yaml, of the configs
    that are named as stages."""
    if not path.exists():
        raise InputError(f"{path}: no such recipe folder or config file")
    folder, only = (path, None) if path.is_dir() else (path.parent, path.stem)
    recipe = load_yaml(folder / "pipeline.yaml") if (folder / "pipeline.yaml").exists() else {}
    loose = {
        name: {"module": module}
        for name, module in MODULES.items()
        if (folder / f"{name}.yaml").exists()
    }
    steps = recipe.get("steps", loose) | (
        {only: {"module": MODULES[stage]}} if only and stage else {}
    )
    steps = {name: step for name, step in steps.items() if step.get("module") in STAGES}
    known = [name for name, step in steps.items() if step["module"] != MODULES["prepare"]]
    if not known or only not in (None, *known):
        wanted = (
            f"those of {folder} are {', '.join(known) or 'none'} (<step>.yaml); or give --stage"
        )
        raise InputError(f"{path}: not a step that trains or samples; {wanted}")
    if unknown := keys.keys() - steps.keys():
        raise InputError(
            f"command line: {folder} has no step {unknown.pop()}; there are {', '.join(steps)}"
        )
    return {
        name: settings(
            folder / f"{name}.yaml",
            STAGES[step["module"]],
            recipe,
            step.get("args") or {},
            keys.get(name, {}),
        )
        for name, step in steps.items()
    }


def shape_from(config: Mapping[str, Any], vocab_size: int, origin: str | Path) -> GPTConfig:
    """The new model that a config describes."""
    try:
        keys = ArchitectureConfig(
            **{key: config[key] for key in ArchitectureConfig.__pydantic_fields__ if key in config}
        )
    except pydantic.ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        raise InputError(
            f"{origin}: {first['loc'][0]} = {first['input']!r} is refused: {first['msg']}"
        ) from None
    return shape_of(keys, vocab_size, config["max_length"])


def measure(stage: str, tokenizer: Tokenizer, row: Row, longest: int) -> tuple[float, float]:
    """(tokens of the row, those that are learned) in sft, (tokens, answers) in reward, (tokens of
    the prompt, 1) elsewhere."""
    if stage == "sft":
        ids, mask = render(tokenizer, rows_to_messages(row.data))
        return min(len(ids), longest), sum(mask[:longest])
    if stage == "reward":
        texts = [
            str(text)
            for text in row.data.get("answers") or (row.data["chosen"], row.data["rejected"])
        ]
        prompt = len(prompt_ids(tokenizer, comparison_prompt(row.data)))
        return sum(min(prompt + len(tokenizer.encode(text)) + 1, longest) for text in texts), len(
            texts
        )
    return len(prompt_ids(tokenizer, rows_to_prompt(row.data))), 1


class Plan:
    """`works`, one for each step of a recipe folder, or for the one step whose config file is
    given; in words what was `assumed`, and the `problems` that would stop a step at its start.

    `keys` are {step: {key: value}} that win over the configs; `model` is the shape of a parent that
    is not here (a directory or a preset); `stage` is that of a config that is no step of its
    folder's recipe.
    """

    def __init__(
        self,
        path: Path,
        gpus: int = 1,
        keys: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        bf16: bool = True,
        vocab_size: int | None = None,
        model: str | None = None,
        stage: str | None = None,
    ) -> None:
        self.gpus, self.bf16, self.vocab_size, self.model = gpus, bf16, vocab_size, model
        configs = read_recipe(path, stage, keys or {})
        made = {c["stage"]: c for c in reversed(configs.values())}  # the first of each stage
        self.prepared, self.collected = made.get("prepare", {}), made.get("collect", {})
        self.works, self.assumed, self.problems = list[Work](), list[str](), list[str]()
        self.shapes: dict[str, GPTConfig] = {}  # by the folder that a step will publish
        for name, c in configs.items():
            if c["stage"] != "prepare":
                self.works.append(self.work(c))
                self.shapes[c["output_dir"]] = self.works[-1].shape
            if (
                not path.is_dir() and name == path.stem
            ):  # earlier steps were looked at for what they hand on
                said = (f"{name}: ", "prepare: ")
                self.assumed, self.problems = (
                    [t for t in ts if t.startswith(said)] for ts in (self.assumed, self.problems)
                )
                self.works = self.works[-1:]
                break

    def assume(self, step: str, text: str) -> None:
        if (line := f"{step}: {text}") not in self.assumed:
            self.assumed.append(line)

    def vocabulary(self, c: Mapping[str, Any]) -> int:
        shards, kind = Path(str(c["train_data"])) / "shards.json", self.prepared.get("tokenizer")
        if self.vocab_size or kind == "bpe":
            return self.vocab_size or self.prepared["vocab_size"]
        if shards.exists():
            return load_yaml(shards)["vocab_size"]
        if kind not in CUSTOMARY:
            raise InputError(
                f"{c['file']}: nothing tells the size of the vocabulary; give --vocab_size N"
            )
        self.assume(
            "prepare",
            f"a vocabulary of {CUSTOMARY[kind]:,}, as tokenizer: {kind}; else --vocab_size N",
        )
        return CUSTOMARY[kind]

    def shape(self, parent: str | None, step: str) -> GPTConfig:
        """Of the model in folder `parent`: what an earlier step will publish there, or what is
        there already."""
        if parent in self.shapes:
            return self.shapes[parent]
        found = parent and (Path(parent) / "config.json").exists()
        source = parent if found else self.model or parent or ""
        if (Path(source) / "config.json").exists():
            shape = load_config(source)
        elif source in PRESETS:
            shape = shape_from(
                {"preset": source, "max_length": 1024}, self.vocab_size or 50257, source
            )
        elif self.shapes and not self.model:
            source, shape = next(iter(self.shapes.items()))
        else:
            raise InputError(
                f"{step}: {source} is not here, and no step makes it; give --model with a directory or a preset"
            )
        self.assume(step, f"a model of the shape of {source}")
        return shape

    def look(
        self, work: Work, c: Mapping[str, Any]
    ) -> tuple[float | None, float | None, float | None]:
        """(rows to train on, as given or as in the file; of some of them the means of what
        `measure` finds)."""
        source, count = Path(str(c["train_data"])), c["rows"]
        if (
            not source.exists()
            or sum(f.stat().st_size for f in [source, *source.rglob("*")] if f.is_file()) > LARGE
        ):
            return count, None, None
        rows = read_rows(str(source))
        if not count:
            held_out = (
                c["eval_fraction"]
                if work.stage in ("sft", "reward") and c["eval_data"] is None
                else 0
            )
            count = round(len(rows) * (1 - held_out))
            self.assume(work.step, f"{count:,.0f} rows, those of {source} as it is now")
        places = [Path(place) for place in (c["parent"], self.prepared.get("output_dir")) if place]
        if not (
            place := next((place for place in places if (place / "tokenizer.json").exists()), None)
        ):
            return count, None, None
        tokenizer, some = (
            load_tokenizer(str(place)).with_chat(),
            random.Random(0).sample(rows, min(SAMPLE, len(rows))),
        )
        try:
            tokens, parts = zip(
                *(measure(work.stage, tokenizer, row, work.length) for row in some), strict=True
            )
        except (InputError, KeyError) as error:
            raise InputError(f"{source}: a row cannot be read: {error}") from None
        return count, sum(tokens) / len(some), sum(parts) / len(some)

    def work(self, c: Mapping[str, Any]) -> Work:
        step, stage = c["step"], c["stage"]
        fresh = stage in ("pretrain", "sft") and not c["parent"]
        shape = (
            shape_from(c, self.vocabulary(c), c["file"]) if fresh else self.shape(c["parent"], step)
        )
        keys = (
            ("max_prompt_length", "max_new_tokens")
            if stage in ("rl", "collect")
            else ("max_length",)
        )
        needed = sum(c[key] for key in keys)
        if needed > shape.max_length and stage != "collect":  # collect stops an answer there
            self.problems.append(
                f"{step}: {' + '.join(keys)} = {needed}, but the model's context is {shape.max_length}"
            )
        length = min(needed, shape.max_length)
        if stage == "collect":
            work = Work(
                step,
                stage,
                shape,
                1,
                c["batch_size"],
                length=length,
                precision="no",
                answers=c["answers_per_prompt"],
            )
        else:
            if c["torch_compile"]:
                self.assume(step, COMPILED)
            precision = (
                c["mixed_precision"]
                if c["mixed_precision"] != "auto"
                else "bf16"
                if self.bf16
                else "no"
            )
            work = Work(
                step,
                stage,
                shape,
                self.gpus,
                c["per_device_train_batch_size"],
                c["gradient_accumulation_steps"],
                length=length,
                precision=precision,
                lora_r=c["lora_r"],
                lora_targets=tuple(c["lora_targets"]),
                masked=shape.has_local_layers,
                save_steps=c["save_steps"],
                save_total_limit=c["save_total_limit"],
                checkpointing=c["gradient_checkpointing"],
            )
        details = {"pretrain": self.pretrain, "sft": self.sft, "reward": self.reward}.get(
            stage, self.sampling
        )
        work, count = details(work, c)
        steps, rows = self.duration(work, c, count)
        if rows is None:
            self.assume(
                step,
                f"{c['train_data']} is not here, so nobody knows its rows; give --{step}.rows=N",
            )
        return replace(work, steps=steps, rows=rows)

    def duration(
        self, work: Work, c: Mapping[str, Any], count: float | None
    ) -> tuple[int | None, float | None]:
        """(updates, rows seen in them) of a step that has `count` rows; None where that depends on
        a number nobody knows."""
        if work.stage == "collect":
            return 1, min((n for n in (count, c["max_prompts"]) if n), default=None)
        most, epochs, batch = c["max_steps"], c["num_train_epochs"], work.batch
        if most is None and count is None:
            return None, None
        if work.stage == "rl":  # the prompts left over at the end of an epoch are not used
            count = (count or batch) // batch * batch
        try:
            steps = steps_for(most, epochs, int(count or 1), batch)
        except InputError as error:
            raise InputError(f"{c['file']}: {error}") from None
        return steps, steps * batch if most or work.stage == "rl" else epochs * count

    def mean(self, work: Work, c: Mapping[str, Any], found: float | None, words: str = "") -> float:
        """Tokens of the mean row: as given, as the rows say, or the most allowed."""
        if not c["length"] and (words or not found):
            words = f"all rows taken as {words or work.length} tokens, the most allowed"
            self.assume(work.step, f"{words}; else --{work.step}.length=N")
        return min(work.length, c["length"] or found or work.length)

    def pretrain(self, work: Work, c: Mapping[str, Any]) -> tuple[Work, float | None]:
        shards, count, stride, step = (
            Path(str(c["train_data"])),
            c["rows"],
            c["row_stride"] or work.length,
            work.step,
        )
        corpus = count and count * stride
        if not count and (shards / "shards.json").exists():
            found = Shards(str(shards), "train", work.length, c["row_stride"])
            count, corpus = found.rows, found.tokens
            self.assume(step, f"{corpus:,} tokens, those of {shards} as it is now")
        elif not count and c["max_steps"]:
            corpus = c["max_steps"] * work.batch * stride
            self.assume(
                step,
                f"shards of {corpus:,} tokens, each seen once; else --{step}.rows=N, rows of {work.length}",
            )
        if c["lora_r"]:
            refused = f"lora_r {c['lora_r']}: pretraining trains all weights; LoRA is for sft, reward and rl"
            self.problems.append(f"{step}: {refused}")
        masked, mean = work.masked or c["document_mask"], work.length
        return replace(
            work, optimizer=c["optimizer"], masked=masked, mean_length=mean, corpus=corpus, lora_r=0
        ), count

    def sft(self, work: Work, c: Mapping[str, Any]) -> tuple[Work, float | None]:
        count, tokens, learned = self.look(work, c)
        share = learned / tokens if tokens and learned else 1.0
        return replace(work, mean_length=self.mean(work, c, tokens), logits=share), count

    def reward(self, work: Work, c: Mapping[str, Any]) -> tuple[Work, float | None]:
        count, tokens, found = self.look(work, c)
        maker, answers = self.collected, c["answers"] or found
        prompts = next((earlier.rows for earlier in self.works if earlier.stage == "collect"), None)
        if not count and prompts:
            count = round(prompts * (1 - maker["eval_fraction"]))
            self.assume(
                work.step,
                f"{count:,} comparisons, the prompts of {maker['step']} less its eval_fraction",
            )
        if not answers:
            answers = maker["answers_per_prompt"] + (maker["labeller"] is None) if maker else 2
            more = (
                f" as {maker['step']} says"
                + " without those that contrast adds" * bool(maker["contrast"])
                if maker
                else ""
            )
            self.assume(
                work.step, f"{answers} answers a comparison{more}; else --{work.step}.answers=K"
            )
        mean = self.mean(work, c, tokens / found if tokens and found else None)
        return replace(work, answers=answers, mean_length=mean, logits=0), count

    def sampling(self, work: Work, c: Mapping[str, Any]) -> tuple[Work, float | None]:
        """Of collect and rl: prompts and answers."""
        count, tokens, _ = self.look(work, c)
        response = min(c["max_new_tokens"], work.length - 1)
        longest = work.length - response  # prompt
        prompt = min(tokens or longest, longest)
        mean = self.mean(
            work, c, prompt + response, f"{prompt:.0f} of prompt + {response} of answer"
        )
        work = replace(
            work,
            prompt=longest,
            response=response,
            mean_length=mean,
            logits=max(1.0, mean - prompt) / mean,
        )
        if work.stage == "rl":
            ptx = c["ptx_batch_size"] * c["max_length"] if c["ptx_data"] else 0
            judge, critic = (
                c[key] and self.shape(c[key], work.step) for key in ("reward_model", "critic")
            )
            work = replace(
                work,
                minibatches=c["num_minibatches"],
                epochs=c["num_ppo_epochs"],
                ptx_tokens=ptx,
                ptx_length=c["max_length"],
                judge=judge,
                critic=critic,
            )
            if count and count < work.batch:
                keys = "per_device_train_batch_size x gradient_accumulation_steps x num_minibatches x GPUs"
                self.problems.append(
                    f"{work.step}: a rollout takes {work.batch:,} prompts ({keys}), there are {count:,.0f}"
                )
        return work, count
