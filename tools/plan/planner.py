"""A recipe's configs -> the Work of each of its steps, before any of them ran; what had to be
assumed is said in words.

What a config does not tell (how many rows, how long they are) is read from the files where they
exist, else taken from the command line or from the configs of earlier steps; a length that nobody
knows is the longest that is allowed.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.config.overrides import Overrides
from common.config.strict_yaml import load_yaml
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
from tools.plan.recipe import Step, read_recipe
from tools.plan.workload import Work

CUSTOMARY = {"characters": 100, "gpt2": 50257}  # ids of tokenizers that are not here yet
COMPILED = (
    "torch_compile changes no figure: MFU is of what runs, launches are of eager code, "
    "the time of compiling is left out"
)
ROLLOUT_KEYS = "per_device_train_batch_size x gradient_accumulation_steps x num_minibatches x GPUs"
SAMPLE = 300  # rows that are tokenised to see how long rows are
LARGE = 500e6  # bytes: a plan reads no file beyond that


class Found(NamedTuple):
    """What the file of a step's rows tells; None = it is not here, or too large to be read."""

    rows: float | None
    """Rows to train on, as given or as in the file."""
    tokens: float | None = None
    """Mean of the first figure of `measure` over some rows."""
    parts: float | None = None
    """Mean of the second figure of `measure`."""


def measure(stage: str, tokenizer: Tokenizer, row: Row, longest: int) -> tuple[float, float]:
    """Return (tokens of the row, those that are learned) in sft, (tokens, answers) in reward,
    (tokens of the prompt, 1) elsewhere."""
    if stage == "sft":
        ids, mask = render(tokenizer, rows_to_messages(row.data))
        return min(len(ids), longest), sum(mask[:longest])
    if stage == "reward":
        answers = row.data.get("answers") or (row.data["chosen"], row.data["rejected"])
        texts = [str(answer) for answer in answers]
        prompt = len(prompt_ids(tokenizer, comparison_prompt(row.data)))
        lengths = (prompt + len(tokenizer.encode(text)) + 1 for text in texts)
        return sum(min(length, longest) for length in lengths), len(texts)
    return len(prompt_ids(tokenizer, rows_to_prompt(row.data))), 1


class Plan:
    """`works`, one for each step of a recipe folder, or for the one step whose config file is
    given; in words what was `assumed`, and the `problems` that would stop a step at its start.

    `overrides` are {step: {key: text}} that win over the configs; `bf16` says whether the device
    computes in it; `model` is the shape of a parent that is not here (a directory or a preset);
    `stage` is that of a config that is no step of its folder's recipe.
    """

    def __init__(
        self,
        path: Path,
        gpus: int = 1,
        overrides: Overrides | None = None,
        *,
        bf16: bool = True,
        vocab_size: int | None = None,
        model: str | None = None,
        stage: str | None = None,
    ) -> None:
        """Read the recipe and plan its steps. Raises InputError for what a stage would refuse."""
        self.gpus, self.bf16, self.vocab_size, self.model = gpus, bf16, vocab_size, model
        self.model_used = False
        self.works: list[Work] = []
        self.assumed: list[str] = []
        self.problems: list[str] = []
        self.shapes: dict[str, GPTConfig] = {}  # by the folder that a step will publish
        steps = read_recipe(path, stage, overrides or {})
        first = {step.stage: step for step in reversed(steps)}  # of each stage
        self.prepared, self.collected = first.get("prepare"), first.get("collect")
        for step in steps:
            if step.stage != "prepare":
                self.works.append(self.work(step))
                self.shapes[step.config.output_dir] = self.works[-1].shape
            if not path.is_dir() and step.name == path.stem:
                self.keep_only(step.name)
                break
        if model and not self.model_used and not path.is_dir():
            known = "its models are here, or made by earlier steps of the recipe"
            raise InputError(f"--model {model}: {path} has no use for it, {known}; leave it out")

    def keep_only(self, name: str) -> None:
        """Forget the steps before, which were looked at for what they hand on."""
        said = (f"{name}: ", "prepare: ")
        self.assumed = [text for text in self.assumed if text.startswith(said)]
        self.problems = [text for text in self.problems if text.startswith(said)]
        self.works = self.works[-1:]

    def assume(self, step: str, text: str) -> None:
        """Note an assumption, once."""
        if (line := f"{step}: {text}") not in self.assumed:
            self.assumed.append(line)

    # The shape of a step's model

    def vocabulary(self, step: Step) -> int:
        """Ids of the tokenizer that a new model will have."""
        if self.vocab_size:
            return self.vocab_size
        prepared = self.prepared.config if self.prepared else None
        kind = prepared.tokenizer if prepared else None
        if prepared and kind == "bpe":
            return prepared.vocab_size
        shards = Path(step.config.train_data) / "shards.json"
        if shards.exists():
            return load_yaml(shards)["vocab_size"]
        if kind not in CUSTOMARY:
            unknown = "nothing tells the size of the vocabulary"
            raise InputError(f"{step.file}: {unknown}; give --vocab_size N")
        size = CUSTOMARY[kind]
        text = f"a vocabulary of {size:,}, as tokenizer: {kind}; else --vocab_size N"
        self.assume("prepare", text)
        return size

    def shape(self, parent: str | None, step: str) -> GPTConfig:
        """Of the model in folder `parent`: what an earlier step will publish there, or what is
        there already."""
        if parent in self.shapes:
            return self.shapes[parent]
        here = parent if parent and (Path(parent) / "config.json").exists() else None
        source = here or self.model or parent or ""
        self.model_used |= source == self.model
        if (Path(source) / "config.json").exists():
            shape = load_config(source)
        elif source in PRESETS:
            shape = shape_of(ArchitectureConfig(preset=source), self.vocab_size or 50257, 1024)
        elif self.shapes and not self.model:
            source, shape = next(iter(self.shapes.items()))
        else:
            fix = "give --model with a directory or a preset"
            raise InputError(f"{step}: {source} is not here, and no step makes it; {fix}")
        self.assume(step, f"a model of the shape of {source}")
        return shape

    def shape_at(self, step: Step) -> GPTConfig:
        """Shape of the model that a step trains or samples from."""
        config = step.config
        if step.stage in ("pretrain", "sft") and not config.parent:
            return shape_of(config, self.vocabulary(step), config.max_length)
        return self.shape(config.parent, step.name)

    # The work of a step

    def work(self, step: Step) -> Work:
        """All that is known of a step."""
        outline = self.sampler(step) if step.stage == "collect" else self.learner(step)
        details = {
            "pretrain": self.pretrain,
            "sft": self.sft,
            "collect": self.sampling,
            "reward": self.reward,
            "rl": self.ppo,
        }
        work, count = details[step.stage](outline, step)
        steps, rows = self.duration(work, step, count)
        if rows is None:
            unknown = f"{step.config.train_data} is not here, so nobody knows its rows"
            self.assume(step.name, f"{unknown}; give --{step.name}.rows=N")
        return replace(work, steps=steps, rows=rows)

    def sampler(self, step: Step) -> Work:
        """The outline of collect, which runs on one GPU and stops an answer where the context
        ends."""
        config, shape = step.config, self.shape_at(step)
        needed = config.max_prompt_length + config.max_new_tokens
        return Work(
            step.name,
            step.stage,
            shape,
            1,
            config.batch_size,
            length=min(needed, shape.max_length),
            precision="no",
            answers=config.answers_per_prompt,
        )

    def learner(self, step: Step) -> Work:
        """The outline of a step that trains."""
        config, shape = step.config, self.shape_at(step)
        keys = ("max_prompt_length", "max_new_tokens") if step.stage == "rl" else ("max_length",)
        needed = sum(getattr(config, key) for key in keys)
        if needed > shape.max_length:
            context = f"but the model's context is {shape.max_length}"
            self.problems.append(f"{step.name}: {' + '.join(keys)} = {needed}, {context}")
        if config.torch_compile:
            self.assume(step.name, COMPILED)
        precision = config.mixed_precision
        if precision == "auto":
            precision = "bf16" if self.bf16 else "no"
        return Work(
            step.name,
            step.stage,
            shape,
            self.gpus,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            length=min(needed, shape.max_length),
            precision=precision,
            lora_r=config.lora_r,
            lora_targets=tuple(config.lora_targets),
            masked=shape.has_local_layers,
            save_steps=config.save_steps,
            save_total_limit=config.save_total_limit,
            checkpointing=config.gradient_checkpointing,
        )

    def duration(
        self, work: Work, step: Step, count: float | None
    ) -> tuple[int | None, float | None]:
        """Return (updates, rows seen in them) of a step that has `count` rows; None where that
        depends on a number nobody knows."""
        config = step.config
        if work.stage == "collect":
            return 1, min((n for n in (count, config.max_prompts) if n), default=None)
        most, epochs, batch = config.max_steps, config.num_train_epochs, work.batch
        if most is None and count is None:
            return None, None
        if work.stage == "rl":  # the prompts left over at the end of an epoch are not used
            count = (count or batch) // batch * batch
        try:
            steps = steps_for(most, epochs, int(count or 1), batch)
        except InputError as error:
            raise InputError(f"{step.file}: {error}") from None
        if most or count is None or work.stage == "rl":
            return steps, steps * batch
        return steps, (int(epochs) if epochs == int(epochs) else epochs) * count

    # What each stage's rows tell

    def look(self, work: Work, step: Step) -> Found:
        """Read the file of a step's rows, where it is here and not too large."""
        config, source, count = step.config, Path(step.config.train_data), step.facts.rows
        if not source.exists() or size_of(source) > LARGE:
            return Found(count)
        rows = read_rows(str(source))
        if not count:
            splits = work.stage in ("sft", "reward") and config.eval_data is None
            count = round(len(rows) * (1 - (config.eval_fraction if splits else 0)))
            self.assume(work.step, f"{count:,.0f} rows, those of {source} as it is now")
        prepared = self.prepared and self.prepared.config.output_dir
        places = [Path(place) for place in (config.parent, prepared) if place]
        place = next((place for place in places if (place / "tokenizer.json").exists()), None)
        if place is None:
            return Found(count)
        tokenizer = load_tokenizer(str(place)).with_chat()
        some = random.Random(0).sample(rows, min(SAMPLE, len(rows)))
        try:
            figures = [measure(work.stage, tokenizer, row, work.length) for row in some]
        except (InputError, KeyError) as error:
            raise InputError(f"{source}: a row cannot be read: {error}") from None
        tokens, parts = zip(*figures, strict=True)
        return Found(count, sum(tokens) / len(some), sum(parts) / len(some))

    def mean(self, work: Work, step: Step, found: float | None, words: str = "") -> float:
        """Tokens of the mean row: as given, as the rows say, or the most allowed."""
        given = step.facts.length
        if not given and (words or not found):
            words = f"all rows taken as {words or work.length} tokens, the most allowed"
            self.assume(work.step, f"{words}; else --{work.step}.length=N")
        return min(work.length, given or found or work.length)

    def pretrain(self, work: Work, step: Step) -> tuple[Work, float | None]:
        """Return (the work with its corpus, rows to train on)."""
        config, count, name = step.config, step.facts.rows, step.name
        shards, stride = Path(config.train_data), config.row_stride or work.length
        corpus = count and count * stride
        if not count and (shards / "shards.json").exists():
            found = Shards(str(shards), "train", work.length, config.row_stride)
            count, corpus = found.rows, found.tokens
            self.assume(name, f"{corpus:,} tokens, those of {shards} as it is now")
        elif not count and config.max_steps:
            corpus = config.max_steps * work.batch * stride
            other = f"else --{name}.rows=N, rows of {work.length}"
            self.assume(name, f"shards of {corpus:,} tokens, each seen once; {other}")
        if config.lora_r:
            why = "pretraining trains all weights; LoRA is for sft, reward and rl"
            self.problems.append(f"{name}: lora_r {config.lora_r}: {why}")
        work = replace(
            work,
            optimizer=config.optimizer,
            masked=work.masked or config.document_mask,
            mean_length=work.length,
            corpus=corpus,
            lora_r=0,
        )
        return work, count

    def sft(self, work: Work, step: Step) -> tuple[Work, float | None]:
        """Return (the work with the length of its rows and the share that is learned, rows)."""
        found = self.look(work, step)
        share = found.parts / found.tokens if found.tokens and found.parts else 1.0
        mean = self.mean(work, step, found.tokens)
        return replace(work, mean_length=mean, logits=share), found.rows

    def reward(self, work: Work, step: Step) -> tuple[Work, float | None]:
        """Return (the work with its answers a comparison and their length, comparisons)."""
        found = self.look(work, step)
        count, answers = found.rows, step.facts.answers or found.parts
        prompts = next((earlier.rows for earlier in self.works if earlier.stage == "collect"), None)
        maker = self.collected
        if not count and prompts and maker:
            count = round(prompts * (1 - maker.config.eval_fraction))
            source = f"the prompts of {maker.name} less its eval_fraction"
            self.assume(work.step, f"{count:,} comparisons, {source}")
        if not answers:
            answers, source = self.answers_a_comparison()
            text = f"{answers} answers a comparison{source}; else --{work.step}.answers=K"
            self.assume(work.step, text)
        each = found.tokens / found.parts if found.tokens and found.parts else None
        mean = self.mean(work, step, each)
        return replace(work, answers=answers, mean_length=mean, logits=0), count

    def answers_a_comparison(self) -> tuple[int, str]:
        """Return (how many, who says so), where the comparisons are not here."""
        maker = self.collected
        if not maker:
            return 2, ""
        config = maker.config
        without = " without those that contrast adds" if config.contrast else ""
        answers = config.answers_per_prompt + (config.labeller is None)
        return answers, f" as {maker.name} says{without}"

    def sampling(self, work: Work, step: Step) -> tuple[Work, float | None]:
        """Return (the work with its prompts and answers, prompts); of collect and rl."""
        found = self.look(work, step)
        response = min(step.config.max_new_tokens, work.length - 1)
        longest = work.length - response  # prompt
        prompt = min(found.tokens or longest, longest)
        words = f"{prompt:.0f} of prompt + {response} of answer"
        mean = self.mean(work, step, prompt + response, words)
        work = replace(
            work,
            prompt=longest,
            response=response,
            mean_length=mean,
            logits=max(1.0, mean - prompt) / mean,
        )
        return work, found.rows

    def ppo(self, work: Work, step: Step) -> tuple[Work, float | None]:
        """Return (the work with all its models, prompts)."""
        work, count = self.sampling(work, step)
        config = step.config
        judge = self.shape(config.reward_model, step.name)
        critic = config.critic and self.shape(config.critic, step.name)
        work = replace(
            work,
            minibatches=config.num_minibatches,
            epochs=config.num_ppo_epochs,
            sampled=config.rollout_batch_size,
            ptx_tokens=config.ptx_batch_size * config.max_length if config.ptx_data else 0,
            ptx_length=config.max_length,
            judge=judge,
            critic=critic,
        )
        if count and count < work.batch:
            there = f"there are {count:,.0f}"
            rollout = f"a rollout takes {work.batch:,} prompts ({ROLLOUT_KEYS})"
            self.problems.append(f"{work.step}: {rollout}, {there}")
        return work, count


def size_of(source: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [source, *source.rglob("*")] if file.is_file())
