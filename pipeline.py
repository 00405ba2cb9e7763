"""Run a recipe: a chain of stages that talk through files only; what is finished and unchanged is
skipped.

    python pipeline.py configs/demo
    python pipeline.py configs/demo --output_dir runs/y --from reward --seed 3
    python pipeline.py configs/demo --sft.learning_rate=1e-3 --to sft --dry_run

configs/demo/pipeline.yaml lists the steps in order; configs/demo/<step>.yaml is the config of one,
which also works without the pipeline; runs/demo/<step>/ is its output. Paths in a config that start
with the recipe's own output_dir (`parent: runs/demo/sft`) tell which step needs which, and follow
when --output_dir moves the run.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from common.config.command_line import CLI, Parser, cli_args, did_you_mean
from common.config.overrides import Overrides, check_overrides, split_overrides
from common.config.schema import OutputDir, check_output_dir, fingerprint, load, stage_config
from common.config.strict_yaml import load_yaml, read_yaml
from common.program.entry import guard
from common.program.errors import Failure, InputError
from common.program.files import dump, write_atomically
from common.program.files import hash_of as file_hash
from common.program.lock import refuse_held, take
from common.program.signals import STOPS, catch_signals
from common.program.terminal import printable

ROOT = Path(__file__).resolve().parent
RECIPE = "pipeline.yaml"
console = Console(highlight=False, markup=False, soft_wrap=True)


# What a recipe says


@stage_config
class Step:
    """One step of a recipe; its config is the file <step>.yaml beside pipeline.yaml."""

    module: Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]
    """Program that is run with `python -m`; it takes --config, --output_dir and --seed."""
    launch: bool = False
    """May run on several processes, through `accelerate launch`."""
    output: Annotated[str, Field(pattern=r"^(\.|\.*[\w-][\w.-]*)$")] | None = None
    """Folder in output_dir; null = the step's name; `.` = output_dir itself."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keys that win over the step's YAML file."""
    about: str | None = None
    """Why this step exists and what to look for; printed before it runs."""


@stage_config
class Recipe:
    """The content of a pipeline.yaml."""

    output_dir: OutputDir
    """Where the steps write, unless --output_dir moves it."""
    steps: Annotated[dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Step], Field(min_length=1)]
    """The steps by name, in the order in which they run."""
    about: str = ""
    """What the recipe does, in one line; shown in the list of recipes."""
    variables: dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], str | None] = Field(
        default_factory=dict
    )
    """Options of the recipe, with their defaults; null = it must be given."""
    afterwards: str = ""
    """Printed after the last step, with {output_dir} filled in."""


def recipes_in(folder: Path) -> dict[str, str]:
    """{name: what it does} of the recipes in a folder, in alphabetical order."""
    found = {}
    for file in sorted(folder.glob(f"*/{RECIPE}")):
        try:
            about = load_yaml(file).get("about")
        except InputError:  # one that is being written need not keep the others from being listed
            about = None
        found[file.parent.name] = str(about or "")
    return found


def read_recipe(folder: Path) -> Recipe:
    """The recipe in `folder`. Where there is none, the InputError lists those that are near."""
    if folder.is_file():
        fix = f"name the recipe's folder: {folder.parent}"
        raise InputError(f"{CLI}: {folder} is a file; {fix}")
    if not (folder / RECIPE).exists():
        beside = (
            folder.parent if recipes_in(folder.parent) else Path(os.path.relpath(ROOT / "configs"))
        )
        if names := list(recipes_in(beside)):
            near = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.5)
            meant = f"did you mean {beside / near[0]}? " if near else ""
            known = f"The recipes in {beside} are {', '.join(names)}"
            raise InputError(f"config file {folder / RECIPE}: No such file; {meant}{known}")
    return load(Recipe, ["--config", str(folder / RECIPE)])


# What the command line asks for


@dataclass(frozen=True)
class Request:
    """The command line of one call."""

    folder: Path
    """Folder of the recipe."""
    recipe: Recipe
    output_dir: str
    """Where this run writes."""
    first: int
    """Index of the first step that may run; earlier ones are taken as they are."""
    last: int
    """Index of the last step."""
    start: str | None
    """The step named by --from, which runs even if it is unchanged."""
    seed: int | None
    force: bool
    """Run steps even if they are unchanged."""
    dry_run: bool
    """Show what would run, and change nothing."""
    launch: str | None
    """Accelerate config of the training steps."""
    num_processes: int | None
    variables: Mapping[str, str | None]
    """Values of the recipe's variables."""
    overrides: Overrides
    """{step: {key: text}} from `--step.key=value`."""

    @property
    def names(self) -> list[str]:
        """The steps up to the last one that is asked for."""
        return list(self.recipe.steps)[: self.last + 1]


def make_parser() -> Parser:
    """The options that every recipe has; --help also lists the recipes."""
    listed = "\n".join(
        textwrap.fill(about, 100, initial_indent=f"  {name:<18}", subsequent_indent=" " * 20)
        for name, about in recipes_in(ROOT / "configs").items()
    )
    parser = Parser(
        usage="%(prog)s RECIPE [options] [--STEP.KEY=VALUE ...]",
        description=__doc__,
        epilog=f"recipes in configs/:\n{listed}",
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help=f"folder with a {RECIPE}")
    for option, about, more in (
        ("--output_dir", "run there instead of the recipe's own output_dir", {}),
        (
            "--from",
            "run STEP and later ones, take earlier ones as they are",
            {"dest": "start", "metavar": "STEP"},
        ),
        ("--to", "end after STEP", {"dest": "stop", "metavar": "STEP"}),
        ("--seed", "seed of every step", {"type": int}),
        ("--force", "run steps even if unchanged", {"action": "store_true"}),
        ("--dry_run", "show what would run", {"action": "store_true"}),
        (
            "--launch",
            "accelerate config of the training steps: configs/accelerate/...",
            {"metavar": "FILE"},
        ),
        (
            "--num_processes",
            "processes of those steps (default: FILE's, else 1)",
            {"type": int, "metavar": "N"},
        ),
    ):
        parser.add_argument(option, help=about, **more)
    return parser


def parse(argv: Sequence[str]) -> Request:
    """Read the command line, in which the recipe comes first. Raises InputError for a mistake."""
    parser = make_parser()
    words, overrides = split_overrides(argv)
    if not argv or argv[0].startswith("-"):
        named = parser.parse_args(words).recipe  # help, or an error
        raise InputError(f"{CLI}: the recipe comes first: python pipeline.py {named} {argv[0]} ...")
    folder = Path(argv[0])
    recipe = read_recipe(folder)
    add_variables(parser, folder, recipe)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        refuse_option(unknown[0], options, recipe)
    check_options(options)
    check_overrides(overrides, list(recipe.steps), folder)
    first, last = step_range(folder, recipe, options)
    return Request(
        folder=folder,
        recipe=recipe,
        output_dir=options.output_dir or recipe.output_dir,
        first=first,
        last=last,
        start=options.start,
        seed=options.seed,
        force=options.force,
        dry_run=options.dry_run,
        launch=options.launch,
        num_processes=options.num_processes,
        variables={name: getattr(options, name) for name in recipe.variables},
        overrides=overrides,
    )


def add_variables(parser: Parser, folder: Path, recipe: Recipe) -> None:
    """Make each variable of a recipe an option. Raises InputError for a name that is taken."""
    taken_names = {"help", "version", "recipe", "from", "to", "start", "stop"}
    taken_names |= vars(parser.parse_args([str(folder)])).keys()
    for name, value in recipe.variables.items():
        if name in taken_names:
            why = f"--{name} has a meaning for every recipe; choose another name"
            raise InputError(f"{folder / RECIPE}: variables.{name} is refused: {why}")
        about = f"of this recipe ({value or 'REQUIRED'})".replace("%", "%%")
        parser.add_argument(f"--{name}", default=value, metavar="X", help=about)


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for an option whose mistake would show only when some step starts."""
    if options.output_dir is not None:
        check_folder(options.output_dir, CLI)
    if options.num_processes is not None and options.num_processes < 1:
        number = options.num_processes
        raise InputError(f"{CLI}: num_processes = {number} is refused; allowed: int >= 1")
    if options.seed is not None and not 0 <= options.seed < 2**32:  # what numpy takes
        allowed = "int >= 0 < 4294967296"
        raise InputError(f"{CLI}: seed = {options.seed} is refused; allowed: {allowed}")
    missing = options.launch is not None and not Path(options.launch).is_file()
    if missing and not options.dry_run:
        known = "those of accelerate are in configs/accelerate/"
        raise InputError(f"{CLI}: launch = {options.launch!r}: no such file; {known}")


def check_folder(folder: str, place: str) -> None:
    """Raise InputError unless a step can write a directory of that name."""
    try:
        check_output_dir(folder)
    except ValueError as error:
        raise InputError(f"{place}: output_dir = {folder!r} is refused: {error}") from None


def refuse_option(word: str, options: argparse.Namespace, recipe: Recipe) -> None:
    """Raise InputError for an option that neither the pipeline nor the recipe has."""
    own = vars(options).keys() - {"start", "stop", "recipe"}
    known = ["from", "to", *own, *recipe.steps]
    hint = did_you_mean(re.split("[.=]", word.removeprefix("--"))[0], known)
    how = "a key of one step is set by --<step>.<key>=value"
    raise InputError(f"{CLI}: unknown option {word}; {hint} ({how})")


def step_range(folder: Path, recipe: Recipe, options: argparse.Namespace) -> tuple[int, int]:
    """Indices of the first and the last step, from --from and --to."""
    order = list(recipe.steps)
    for name in (options.start, options.stop):
        if name not in (None, *order):
            raise InputError(
                f"{CLI}: {folder} has no step {name}; {did_you_mean(name, order, 'steps')}"
            )
    first = order.index(options.start or order[0])
    last = order.index(options.stop or order[-1])
    if first > last:
        raise InputError(f"{CLI}: --from {options.start} comes after --to {options.stop}")
    return first, last


# The steps of this run, with their configs and the notes that tell whether they are done


@dataclass(frozen=True)
class Job:
    """A step of this run."""

    name: str
    step: Step
    folder: Path
    """Where it writes."""
    config: dict[str, Any] = field(default_factory=dict)
    """The config as the recipe has it, wherever the run is."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """What the command line must say beside --config."""
    needs: set[str] = field(default_factory=set)
    """Names of the earlier steps whose output it reads."""
    places: dict[str, str] = field(default_factory=dict)
    """Where each key was given, for messages."""
    whole: dict[str, Any] | None = None
    """The config as the step's program will have it, defaults and all; None where nobody knows."""
    alone: bool = True
    """Whether no other step writes into the same folder, so that what is made there is its own."""

    @property
    def note_file(self) -> Path:
        """Where the pipeline keeps its note of this step."""
        own = self.step.output is None
        return self.folder / (".pipeline.json" if own else f".pipeline.{self.name}.json")

    def note(self) -> dict[str, Any]:
        """What the pipeline noted.

        When the step began: `started`, a fingerprint; `config`, its whole config; `published`, the
        date of a manifest that was there before. When it ended well: `fingerprint`, `run`,
        `seconds`, `gate`, and `files`, what it made: {name: [size, date, sha256]}. `took`, the
        seconds that it last took from start to end in one go, where that is known.
        """
        note = read_json(self.note_file)
        return note if isinstance(note.get("files", {}), dict | list) else {}

    def write(self, note: Mapping[str, Any]) -> None:
        """At once or not at all: half a note would cost the step."""
        write_atomically(self.note_file, dump(note))

    def published(self) -> int | None:
        """Date of the manifest, the last thing that a stage writes."""
        manifest = self.folder / "manifest.json"
        return manifest.stat().st_mtime_ns if manifest.exists() else None

    def state(self) -> dict[str, Any] | None:
        """The note of a step that ended well; None when it did not, or when a file that it made is
        gone."""
        note = self.note()
        files = note.get("files")
        if files is None or not {"fingerprint", "gate"} <= note.keys():
            return None
        if all((self.folder / str(name)).exists() for name in files):
            return note
        return None

    def by_hand(self) -> str:
        """What tells that somebody else wrote here since this pipeline did; empty = nothing."""
        note = self.note()
        if "started" not in note and self.stopped_later():
            return "holds the state of a run that the pipeline did not start"
        if "files" in note:
            names = ", ".join(name for name in note["files"] if self.differs(name, note["files"]))
            return names and f"was changed since the pipeline made it ({names})"
        if not self.alone or self.published() in (None, note.get("published")):
            return ""
        if "started" not in note:
            return "holds a run that the pipeline did not make"
        wanted, found = note.get("config"), read_json(self.folder / "stage.json").get("config")
        if wanted is None or not isinstance(found, dict):  # a program that does not tell
            return ""
        other = ", ".join(
            f"{key} = {found.get(key)}, not {wanted.get(key)}"
            for key in sorted(wanted.keys() | found.keys())
            if key != "output_dir" and wanted.get(key) != found.get(key)
        )
        return other and f"holds a run that the pipeline did not make ({other})"

    def differs(self, name: str, files: Any) -> bool:
        """Whether a file is there, and is another than the one that the step made."""
        file = self.folder / name
        if not file.exists():
            return False
        if isinstance(files, list):  # a note by an older version, which has no hashes
            return file.stat().st_mtime_ns > self.note_file.stat().st_mtime_ns
        size, date, digest = files[name]
        return facts_of(file) != [size, date] and hash_of(file) != digest

    @property
    def state_folder(self) -> Path | None:
        """Where a stage keeps what a resume needs; None where other steps' folders lie as well, one
        of which may have that name."""
        return None if self.step.output == "." else self.folder / "state"

    def stopped_later(self) -> bool:
        """Whether a state lies here that is younger than the pipeline's note."""
        state = self.state_folder
        noted = self.note_file.stat().st_mtime_ns if self.note_file.exists() else 0
        return state is not None and state.is_dir() and state.stat().st_mtime_ns > noted

    def identity(self) -> str | None:
        """Changes whenever the output does: what the steps that read it depend on."""
        run = (self.state() or {}).get("run")
        if not self.by_hand():
            return run
        return fingerprint([run, {file.name: hash_of(file) for file in visible(self.folder)}])


Jobs = dict[str, Job]  # by step, in order


def each(value: Any, change: Callable[[str], Any]) -> Any:
    """`change` of a string, or of every string in a list; other values as they are."""
    if isinstance(value, list):
        return [each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def resolve(name: str, request: Request, earlier: Jobs) -> Job:
    """The step with its variables filled in, and with paths into the run moved to where the steps
    before it have their output."""
    step, file = request.recipe.steps[name], request.folder / f"{name}.yaml"
    written, places = read_yaml(file)
    lines = read_yaml(request.folder / RECIPE)[1]
    seed = {} if request.seed is None else {"seed": request.seed}
    config = {**written, **step.args, **seed, **request.overrides.get(name, {})}
    if "output_dir" in {**step.args, **request.overrides.get(name, {})}:
        raise InputError(f"step {name}: output_dir is refused; `output` or --output_dir moves it")
    config.pop("output_dir", None)
    config = each_value(config, lambda text: fill(text, file, request))
    needs: set[str] = set()

    def move_and_note(text: str) -> str:
        """Moves a path, and notes whose output it is."""
        moved, makers = move(text, name, request, earlier)
        needs.update(makers)
        return moved

    folder = Path(request.output_dir, step.output or name)
    check_folder(str(folder), f"step {name}")
    moved = {"output_dir": str(folder), **each_value(config, move_and_note)}
    overrides = {
        key: value
        for key, value in moved.items()
        if key in ("output_dir", *seed) or value != written.get(key, ...)
    }
    places |= {key: lines[f"steps.{name}.args.{key}"] for key in step.args}
    places |= dict.fromkeys([*seed, *request.overrides.get(name, {})], CLI)
    alone = is_alone(name, request)
    return Job(name, step, folder, config, overrides, needs, places, alone=alone)


def is_alone(name: str, request: Request) -> bool:
    """Whether no other step of the recipe writes into this one's folder."""
    folders = [step.output or key for key, step in request.recipe.steps.items()]
    return folders.count(request.recipe.steps[name].output or name) == 1


def each_value(config: Mapping[str, Any], change: Callable[[str], Any]) -> dict[str, Any]:
    """The config with `change` of all strings in its values."""
    return {key: each(value, change) for key, value in config.items()}


def fill(text: str, file: Path, request: Request) -> str:
    """`text` with each ${variable} replaced by its value. Raises InputError for one that the recipe
    does not have, or that was not given."""

    def value_of(match: re.Match) -> str:
        """The value of one variable."""
        name, recipe = match[1], request.folder
        if name not in request.variables:
            raise InputError(f"{file}: {match[0]} is not among the variables of {recipe}/{RECIPE}")
        if (value := request.variables[name]) is None:
            where = f"for {match[0]} in {file}"
            raise InputError(f"{recipe} needs --{name} X on the command line, {where}")
        return value

    return re.sub(r"\$\{(\w+)\}", value_of, text)


def move(text: str, name: str, request: Request, earlier: Jobs) -> tuple[str, set[str]]:
    """Return (the path where this run has it, the earlier steps that may make it).

    Text that is no path into the recipe's output_dir stays as it is. Raises InputError for a path
    that a later step makes.
    """
    recipe = request.recipe
    # However it is written (`./runs/x`, `runs//x`); links stay links.
    base, path = (Path(os.path.abspath(one)) for one in (recipe.output_dir, text))  # noqa: PTH100
    if not text or not path.is_relative_to(base):
        return text, set()
    makers = {step.output or key: key for key, step in recipe.steps.items()}
    path = path.relative_to(base)
    maker = makers.get(path.parts[0]) if path.parts else None
    here = str(Path(request.output_dir) / path)
    if maker is None:  # no folder tells who makes it: it may be any earlier step
        return here, set(earlier)
    if maker in earlier:
        return str(earlier[maker].folder.joinpath(*path.parts[1:])), {maker}
    if maker == name:
        return here, set()
    file, order = request.folder / f"{name}.yaml", f"which does not run before {name}"
    raise InputError(f"{file}: {text} is made by step {maker}, {order}")


def taken(name: str, request: Request) -> Job:
    """A step before --from, as it was finished in this run's folder or in the recipe's own.

    Raises InputError where it was not.
    """
    step, bases = request.recipe.steps[name], bases_of(request)
    for base in bases:
        job = Job(name, step, Path(base, step.output or name), alone=is_alone(name, request))
        by_hand = job.by_hand()
        if job.state() or (by_hand and job.published()):
            told = f"; it {by_hand}" if by_hand else ""
            console.print(f"{name}: taken from {job.folder}{told}", style="dim")
            return job
    again = f"python pipeline.py {request.folder} --output_dir {request.output_dir} --to {name}"
    missing = f"step {name} is not finished in {' or '.join(bases)}"
    raise InputError(f"--from {request.start}: {missing}; make it: {again}")


def bases_of(request: Request) -> list[str]:
    """The folder of this run, and the recipe's own where that is another one."""
    return list(dict.fromkeys([request.output_dir, request.recipe.output_dir]))


def plan(request: Request) -> Jobs:
    """All steps up to the last one, before the first runs: a mistake in the last config shows at
    once."""
    jobs: Jobs = {}
    for i, name in enumerate(request.names):
        before = i < request.first
        jobs[name] = taken(name, request) if before else resolve(name, request, jobs)
    return jobs


# Which steps are due


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def visible(folder: Path) -> list[Path]:
    """The files in a folder, hidden ones left out."""
    return sorted(
        file for file in folder.glob("*") if file.is_file() and not file.name.startswith(".")
    )


def facts_of(file: Path) -> list[int]:
    """Size and date of the last change."""
    return [file.stat().st_size, file.stat().st_mtime_ns]


def hash_of(file: Path) -> str:
    """sha256 of a file as it is now."""
    return file_hash(file, *facts_of(file))


def input_hashes(config: Mapping[str, Any], own: Sequence[str]) -> dict[str, str]:
    """{path: sha256} of each file that a value names or that lies in a folder so named; `own` run
    folders left out."""
    hashes: dict[str, str] = {}
    outside = [Path(folder).resolve() for folder in own]

    def note(text: str) -> None:
        """Hashes what `text` names, if it names something."""
        path, real = Path(text), Path(text).resolve()
        if real in (ROOT, *ROOT.parents) or any(real.is_relative_to(base) for base in outside):
            return
        for file in [path, *path.rglob("*")]:
            if file.is_file() and not file.name.startswith("."):
                hashes[str(file)] = hash_of(file)

    def note_path(text: str) -> None:
        """A prompt, say, can be too long for a path, or hold a NUL."""
        with contextlib.suppress(OSError, ValueError):
            note(text)

    each(list(config.values()), note_path)
    return hashes


def key_of(job: Job, jobs: Jobs, request: Request) -> str:
    """Fingerprint of all that decides on a step's output.

    No hash of the code goes in: an edited comment would cost a pretraining. After a change of code:
    --from STEP. Nor where it runs (--launch). A parent that ran again, for whatever reason, or that
    somebody has changed, has a new identity.
    """
    parents = {need: jobs[need].identity() for need in job.needs}
    hashes = input_hashes(job.config, [request.output_dir, request.recipe.output_dir])
    return fingerprint([job.step.module, job.config, hashes, parents])


def is_due(job: Job, jobs: Jobs, request: Request, ran: set[str]) -> bool:
    """Whether a step must run, given those that `ran` (or will have run) before it."""
    if request.force or request.start or job.needs & ran:
        return True
    state = job.state()
    return state is None or state["fingerprint"] != key_of(job, jobs, request)


def due_steps(jobs: Jobs, request: Request, ran: set[str], coming: Sequence[str]) -> list[str]:
    """Those of the steps in `coming` that must run, given those that `ran` before them."""
    ran, due = set(ran), []
    for name in coming:
        if is_due(jobs[name], jobs, request, ran):
            ran.add(name)
            due.append(name)
    return due


def seconds_left(jobs: Jobs, request: Request, due: Sequence[str]) -> float | None:
    """Seconds that the steps in `due` will take, if they take as long as they last did in this
    folder; None where one of them never ran through."""
    total = 0.0
    for name in due:
        note = jobs[name].note()
        resumes = "files" not in note and not request.force  # it goes on from where it stopped
        if resumes or "took" not in note:
            return None
        total += note["took"]
    return total


# What is checked before the first step runs


def refuse_what_is_made_by_hand(jobs: Jobs, request: Request) -> None:
    """Raise InputError for the first step whose folder holds what somebody else made, which would
    be overwritten or taken for the recipe's own. --from names the step that may go."""
    order = list(request.recipe.steps)
    for name in request.names[request.first :]:
        found = jobs[name].by_hand()
        if not found or request.force or name == request.start:
            continue
        later = order[order.index(name) + 1 :]
        keep = f"--from {later[0]}" if later else "--output_dir with another folder"
        ways = f"to keep it: {keep}; to make it again in its place: --from {name}"
        raise InputError(f"step {name}: {jobs[name].folder} {found}; {ways}")


def check_configs(jobs: Jobs, due: Sequence[str], request: Request) -> Jobs:
    """The jobs, those that are due with their whole config. Raises InputError for the first key
    that a step's program would refuse.

    Programs without a Config, which are left unchecked, cost nothing. Those that have one are asked
    in another process, as this one imports no stage.
    """
    asked = []
    for i, name in enumerate(due):
        job = jobs[name]
        try:
            command(job, request)
        except InputError as error:  # what no command line can say
            raise InputError(f"step {name}: {error}") from None
        if has_config(job):
            asked.append(
                {
                    "step": name,
                    "module": job.step.module,
                    "file": str(request.folder / f"{name}.yaml"),
                    "given": job.overrides,
                    "places": job.places,
                    "made": [str(jobs[earlier].folder) for earlier in due[:i]],
                }
            )
        elif request.dry_run:
            console.print(
                f"{name}: {job.step.module} has no Config to check its keys by", style="dim"
            )
    if not asked:
        return jobs
    child = subprocess.run(
        [sys.executable, "-m", "common.config.check"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path()},
    )
    if child.returncode:
        raise Failure(f"the configs could not be checked (exit code {child.returncode})")
    answer = json.loads(child.stdout)
    if "refused" in answer:
        raise InputError(answer["refused"])
    configs = answer["configs"]
    return {name: replace(job, whole=configs.get(name)) for name, job in jobs.items()}


def has_config(job: Job) -> bool:
    """Whether the source of a step's program says that it has a Config. It is not imported for
    that, which would perhaps run it. Raises InputError where there is no such program."""
    module = job.step.module
    path = module.replace(".", "/")
    folders = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    for folder in folders:
        for file in (Path(folder, path, "__main__.py"), Path(folder, f"{path}.py")):
            if file.is_file():
                source = file.read_text(encoding="utf-8", errors="replace")
                return "@stage_config" in source and 'if __name__ == "__main__":' in source
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(module)
        if found and not found.submodule_search_locations:  # a program, though no file of ours
            return False
    raise InputError(f"step {job.name}: module {module}: there is no such program")


# Running a step


def search_path() -> str:
    """Where a program that is started looks for modules: here first, wherever it is started."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def command(job: Job, request: Request) -> list[str]:
    """What runs the step.

    One process needs no `accelerate launch`, which for one process costs two seconds, turns every
    exit code into 1, and when stopped leaves the stage behind as an orphan.
    """
    words, number = [sys.executable, "-m"], request.num_processes
    if job.step.launch and (request.launch or (number or 1) > 1):
        file = request.launch or str(ROOT / "configs/accelerate/ddp.yaml")
        words += ["accelerate.commands.accelerate_cli", "launch", "--config_file", file]
        if number:
            threads = max(1, (os.cpu_count() or 1) // number)
            words += ["--num_processes", str(number)]
            words += ["--num_cpu_threads_per_process", str(threads)]
        words += ["-m"]
    config = str(request.folder / f"{job.name}.yaml")
    return [*words, job.step.module, "--config", config, *cli_args(job.overrides)]


def run(words: Sequence[str], lock: int, code_file: Path) -> tuple[int, bool]:
    """Return (exit code of the stage, whether the pipeline was told to stop).

    Signals go on to the stage, which decides what to save.
    """
    env = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # a large model is not saved in 30 s
        **os.environ,
        "PYTHONPATH": search_path(),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "EXIT_CODE_FILE": str(code_file),
    }
    code_file.unlink(missing_ok=True)
    # In a session of its own Ctrl-C reaches the stage once, from here. It holds the lock too,
    # should it outlive the pipeline.
    child: subprocess.Popen | None = None
    stops: list[int] = []

    def forward(number: int, _: Any) -> None:
        """Hands a signal on to the stage."""
        stops.append(number)
        if child:
            child.send_signal(number)

    before = {kind: signal.getsignal(kind) for kind in STOPS}
    catch_signals(forward)
    child = subprocess.Popen(words, env=env, start_new_session=True, pass_fds=[lock])
    if stops:  # came before there was a stage
        child.send_signal(stops[0])
    code = child.wait()
    for kind, handler in before.items():
        signal.signal(kind, handler)
    with contextlib.suppress(OSError, ValueError):
        code = int(code_file.read_text()) if code else 0
    code_file.unlink(missing_ok=True)
    return (code if code >= 0 else 128 - code), bool(stops)


@contextlib.contextmanager
def locked(folder: Path, jobs: Jobs) -> Iterator[int]:
    """Only one pipeline at a time writes to `folder`, and only when nobody writes where its steps
    do; gives the file descriptor of the lock."""
    with take(folder / ".pipeline.lock", "another pipeline, or a stage that it left,") as lock:
        for job in jobs.values():
            refuse_held(job.folder)
        yield lock.fileno()


def execute(job: Job, key: str, request: Request, lock: int) -> tuple[int, dict[str, Any]]:
    """Run one step; return (exit code, its note).

    When it ends well, the note has its fingerprint, the files that it made, and its own verdict.
    """
    refuse_held(job.folder)  # a stage that was started by hand meanwhile
    verdict_file, clock = job.folder / "stage.json", time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    old = {file.name: facts_of(file) for file in visible(job.folder)}
    before = job.note()
    note, stopped = {} if request.force else before, False
    goes_on = note.get("started") == key
    done = goes_on and job.published() not in (None, note.get("published")) and not job.by_hand()
    if job.state_folder and (done or not goes_on):
        # What an interrupted run left goes on only where nothing has changed.
        shutil.rmtree(job.state_folder, ignore_errors=True)
    took = {"took": before["took"]} if "took" in before else {}
    if done:  # the stage outlived its pipeline
        old = {}
    else:
        began = {"started": key, "published": job.published(), "config": job.whole}
        job.write({**began, **took})
        code, stopped = run(command(job, request), lock, Path(request.output_dir, ".exit_code"))
        if code:
            return code, {}
    seconds = round(time.perf_counter() - clock, 1)
    if not goes_on:
        took = {"took": seconds}
    made = [file for file in visible(job.folder) if old.get(file.name) != facts_of(file)]
    gate = gate_of(verdict_file) if verdict_file in made else ""
    if job.step.output is not None:  # beside what others may have written before or meanwhile
        ours = before.get("files", [])
        made = [file for file in made if file.name not in old or file.name in ours]
    state = {
        "fingerprint": key,
        "run": uuid.uuid4().hex,
        "seconds": seconds,
        **took,
        "gate": gate,
        "files": {f.name: [*facts_of(f), hash_of(f)] for f in made} if job.alone else {},
    }
    job.write(state)
    return (130 if stopped else 0), state


def gate_of(verdict_file: Path) -> str:
    """The gate in a stage.json in one line; empty where it has none."""
    with contextlib.suppress(KeyError, TypeError):
        gate = read_json(verdict_file)["gate"]
        return printable(f"{'PASS' if gate['passed'] else 'FAIL'}  {gate['text']}")
    return ""


# Running all of them


def lasting(seconds: float) -> str:
    """4.2 -> "4 s", 95 -> "1 min 35 s", 7300 -> "2 h 2 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def announce(job: Job, request: Request, so_far: float, left: float | None) -> None:
    """Print what begins, why, and how long the whole will still take."""
    number = list(request.recipe.steps).index(job.name) + 1
    title = f"{job.name}  {number}/{len(request.recipe.steps)}"
    if not request.dry_run:
        title += f"  {lasting(so_far)} so far"
        title += (
            ""
            if left is None
            else f", about {lasting(left)} left if each step takes as long as last time"
        )
    console.rule(title, align="left")
    if job.step.about:
        console.print(textwrap.fill(" ".join(job.step.about.split()), 100))
    console.print(shlex.join(["python", *command(job, request)[1:]]), style="dim")


def run_steps(jobs: Jobs, request: Request, lock: int, argv: Sequence[str]) -> int:
    """Run the steps that are due, in order, then print the table. Returns the exit code of the
    first that fails, else 0."""
    table = Table("step", "seconds", "gate", title=request.output_dir, title_justify="left")
    ran: set[str] = set()
    begun, names = time.perf_counter(), request.names[request.first :]
    refuse_what_is_made_by_hand(jobs, request)
    jobs = check_configs(jobs, due_steps(jobs, request, ran, names), request)
    for i, name in enumerate(names):
        job = jobs[name]
        if not is_due(job, jobs, request, ran):
            console.print(f"{name}: unchanged, skipped", style="dim")
            table.add_row(name, "skipped", (job.state() or {})["gate"])
            continue
        left = seconds_left(jobs, request, due_steps(jobs, request, ran, names[i:]))
        announce(job, request, time.perf_counter() - begun, left)
        ran.add(name)
        if request.dry_run:
            continue
        code, state = execute(job, key_of(job, jobs, request), request, lock)
        if code:
            say_how_to_go_on(name, code, request, argv)
            return code
        console.print(f"{name}: {state['seconds']} s  {state['gate']}")
        table.add_row(name, str(state["seconds"]), state["gate"])
    if not request.dry_run:
        table.add_section()
        table.add_row("all", f"{time.perf_counter() - begun:.1f}", "")
        console.print(table)
    return 0


def say_how_to_go_on(name: str, code: int, request: Request, argv: Sequence[str]) -> None:
    """Print the command that continues a run whose step `name` has failed."""
    words = [name if word == request.start else word for word in argv if word != "--force"]
    again = f"python pipeline.py {shlex.join(words)}"
    print(
        f"step {name} ended with exit code {code}; to go on from it: {again}",
        file=sys.stderr,
    )


def main(argv: Sequence[str]) -> int:
    """Run a recipe; returns the exit code."""
    if not argv:
        make_parser().print_help()
        return 2
    request = parse(argv)
    jobs = plan(request)
    if request.dry_run:
        return run_steps(jobs, request, -1, argv)
    with locked(Path(request.output_dir), jobs) as lock:
        code = run_steps(jobs, request, lock, argv)
    whole = request.last == len(request.recipe.steps) - 1
    if code == 0 and whole and request.recipe.afterwards:
        console.print(
            request.recipe.afterwards.replace("{output_dir}", request.output_dir).rstrip()
        )
    return code


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
