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
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from common.config.schema import Parser, cli_args, did_you_mean, fingerprint, load, stage_config
from common.config.strict_yaml import load_yaml
from common.program.entry import guard
from common.program.errors import InputError

ROOT = Path(__file__).resolve().parent
console = Console(highlight=False, markup=False, soft_wrap=True)


@stage_config
class Step:
    module: Annotated[
        str, Field(pattern=r"^\w+(\.\w+)*$")
    ]  # its main takes --config, --output_dir and --seed
    launch: bool = False  # may run on several processes, through `accelerate launch`
    output: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = (
        None  # default: the step's name; `.`: output_dir itself
    )
    args: dict[str, Any] = Field(default_factory=dict)  # keys that win over the step's YAML file


@stage_config
class Recipe:
    output_dir: str  # where the steps write, unless --output_dir moves it
    steps: Annotated[
        dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Step], Field(min_length=1)
    ]  # in order
    variables: dict[Annotated[str, Field(pattern=r"^[a-z]\w*$")], str | None] = Field(
        default_factory=dict
    )  # null: must be given


@dataclass(frozen=True)
class Job:
    """A step of this run: `config` as the recipe has it, wherever the run is; `overrides` what the
    command line must say."""

    name: str
    step: Step
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    needs: set[str] = field(default_factory=set)  # names of earlier steps

    @property
    def state_file(self) -> Path:
        return self.folder / (
            ".pipeline.json" if self.step.output is None else f".pipeline.{self.name}.json"
        )

    def note(self) -> dict[str, Any]:
        """What the pipeline noted: `started`, a fingerprint, when the step began; a `state` when it
        ended well."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.state_file.read_text())
        return {}

    def write(self, note: Mapping[str, Any]) -> None:
        """At once or not at all: half a note would cost the step."""
        temporary = self.state_file.with_name(self.state_file.name + ".tmp")
        temporary.write_text(json.dumps(note))
        temporary.replace(self.state_file)

    def published(self) -> int | None:  # date of the manifest, the last thing that a stage writes
        manifest = self.folder / "manifest.json"
        return manifest.stat().st_mtime_ns if manifest.exists() else None

    def state(self) -> dict[str, Any] | None:
        """The note of a step that ended well; None when it did not, or when a file that it made is
        gone."""
        note = self.note()
        return (
            note
            if "files" in note and all((self.folder / name).exists() for name in note["files"])
            else None
        )


def parse(argv: Sequence[str]) -> tuple[Recipe, argparse.Namespace]:
    """-> (recipe, options); options.step_keys is {step: {key: value}} from `--step.key=value`. The
    recipe must come first."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "pipeline.py", "%(prog)s RECIPE [options]", __doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="folder with a pipeline.yaml")
    parser.add_argument("--output_dir", help="run there instead of the recipe's own output_dir")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="STEP",
        help="run STEP and later ones, take earlier ones as they are",
    )
    parser.add_argument("--to", dest="stop", metavar="STEP", help="end after STEP")
    parser.add_argument("--seed", type=int, help="seed of every step")
    parser.add_argument("--force", action="store_true", help="run steps even if unchanged")
    parser.add_argument("--dry_run", action="store_true", help="show what would run")
    parser.add_argument(
        "--launch",
        metavar="FILE",
        help="accelerate config of the training steps: configs/accelerate/...",
    )
    parser.add_argument(
        "--num_processes",
        type=int,
        metavar="N",
        help="processes of those steps (default: FILE's, else 1)",
    )
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)  # help, or an error
    folder = Path(argv[0])
    recipe = load(Recipe, ["--config", str(folder / "pipeline.yaml")])
    for name, value in recipe.variables.items():
        parser.add_argument(
            f"--{name}", default=value, metavar="X", help=f"of this recipe ({value or 'REQUIRED'})"
        )
    options, rest = parser.parse_known_args(argv)
    options.step_keys = {name: {} for name in recipe.steps}
    for word in rest:
        match = re.fullmatch(r"--([\w-]+)\.(\w+)=(.*)", word, re.DOTALL)
        if not match or match[1] not in recipe.steps:
            known = [
                "from",
                "to",
                *(vars(options).keys() - {"start", "stop", "step_keys", "recipe"}),
                *recipe.steps,
            ]
            hint = did_you_mean(re.split("[.=]", word.removeprefix("--"))[0], known)
            raise InputError(
                f"command line: unknown option {word}; {hint} (a key of one step is set by --<step>.<key>=value)"
            )
        options.step_keys[match[1]][match[2]] = match[3]
    order = list(recipe.steps)
    if unknown := {options.start, options.stop} - {None, *order}:
        name = unknown.pop()
        raise InputError(f"command line: {folder} has no step {name}; {did_you_mean(name, order)}")
    options.first, options.last = (
        order.index(options.start or order[0]),
        order.index(options.stop or order[-1]),
    )
    if options.first > options.last:
        raise InputError(f"command line: --from {options.start} comes after --to {options.stop}")
    options.output_dir = options.output_dir or recipe.output_dir
    return recipe, options


def each(value: Any, change: Callable[[str], Any]) -> Any:
    """`change` of a string, or of every string in a list; other values as they are."""
    if isinstance(value, list):
        return [each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def resolve(
    name: str, recipe: Recipe, options: argparse.Namespace, earlier: Mapping[str, Job]
) -> Job:
    """The step with its variables filled in, and paths into the run moved to where the steps before
    it have their output."""
    step, file, base = recipe.steps[name], options.recipe / f"{name}.yaml", Path(recipe.output_dir)
    written, needs = load_yaml(file), set()
    makers = {other.output or key: key for key, other in recipe.steps.items()}

    def fill(match: re.Match) -> str:
        if match[1] not in recipe.variables:
            raise InputError(
                f"{file}: {match[0]} is not among the variables of {options.recipe}/pipeline.yaml"
            )
        if (value := getattr(options, match[1])) is None:
            raise InputError(
                f"{options.recipe} needs --{match[1]} X on the command line, for {match[0]} in {file}"
            )
        return value

    def move(text: str) -> str:
        if not (Path(text) == base or text.startswith(f"{base}/")):
            return text
        path = Path(text).relative_to(base)
        maker = makers.get(path.parts[0]) if path.parts else None
        if maker is None:  # no folder tells who makes it: it may be any earlier step
            needs.update(earlier)
        elif maker in earlier:
            needs.add(maker)
            return str(earlier[maker].folder.joinpath(*path.parts[1:]))
        elif maker != name:
            raise InputError(
                f"{file}: {text} is made by step {maker}, which does not run before {name}"
            )
        return str(Path(options.output_dir) / path)

    seed = {} if options.seed is None else {"seed": options.seed}
    config = {**written, **step.args, **seed, **options.step_keys[name]}
    config.pop("output_dir", None)
    config = {
        key: each(value, lambda text: re.sub(r"\$\{(\w+)\}", fill, text))
        for key, value in config.items()
    }
    folder = Path(options.output_dir, step.output or name)
    moved = {"output_dir": str(folder), **{key: each(value, move) for key, value in config.items()}}
    overrides = {
        key: value
        for key, value in moved.items()
        if key in ("output_dir", *seed) or value != written.get(key, ...)
    }
    return Job(name, step, folder, config, overrides, needs)


def input_hashes(config: Mapping[str, Any], own: Sequence[str]) -> dict[str, str]:
    """{path: sha256} of each file that a value names or that lies in a folder so named; `own` run
    folders left out."""
    hashes: dict[str, str] = {}

    def note(text: str) -> None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # a prompt, say, can be too long for a path or hold a NUL
            path, real = Path(text), Path(text).resolve()
            if real in (ROOT, *ROOT.parents) or any(
                real.is_relative_to(Path(folder).resolve()) for folder in own
            ):
                return
            for file in [path, *path.rglob("*")]:
                if file.is_file() and not file.name.startswith("."):
                    with file.open("rb") as content:
                        hashes[str(file)] = hashlib.file_digest(content, "sha256").hexdigest()

    each(list(config.values()), note)
    return hashes


def command(job: Job, options: argparse.Namespace) -> list[str]:
    """What runs the step. One process needs no `accelerate launch`, which for one process costs two
    seconds, turns every exit code into 1, and when stopped leaves the stage behind as an orphan."""
    start, number = [sys.executable, "-m"], options.num_processes
    if job.step.launch and (options.launch or (number or 1) > 1):
        start += ["accelerate.commands.accelerate_cli", "launch"]
        start += ["--config_file", options.launch or str(ROOT / "configs/accelerate/ddp.yaml")]
        if number:
            threads = max(1, (os.cpu_count() or 1) // number)
            start += ["--num_processes", str(number), "--num_cpu_threads_per_process", str(threads)]
        start += ["-m"]
    return [
        *start,
        job.step.module,
        "--config",
        str(options.recipe / f"{job.name}.yaml"),
        *cli_args(job.overrides),
    ]


def run(words: Sequence[str], lock: int, code_file: Path) -> tuple[int, bool]:
    """-> (exit code of the stage, was the pipeline told to stop). Signals go on to the stage, which
    decides what to save."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "EXIT_CODE_FILE": str(code_file),
    }
    code_file.unlink(missing_ok=True)
    # In a session of its own Ctrl-C reaches the stage once, from here. It holds the lock too,
    # should it outlive the pipeline.
    child = subprocess.Popen(words, env=env, start_new_session=True, pass_fds=[lock])
    stops: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [
        signal.signal(kind, lambda number, _: (stops.append(number), child.send_signal(number)))
        for kind in kinds
    ]
    code = child.wait()
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)
    with contextlib.suppress(OSError, ValueError):
        code = int(code_file.read_text()) if code else 0
    code_file.unlink(missing_ok=True)
    return (code if code >= 0 else 128 - code), bool(stops)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Only one pipeline at a time writes to `folder`. The kernel drops the lock when its holders
    are gone, however they end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"output_dir {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"output_dir {folder}: another pipeline, or a stage that it left, is running there"
            ) from None
        yield file.fileno()


def execute(
    job: Job, key: str, options: argparse.Namespace, lock: int
) -> tuple[int, dict[str, Any]]:
    """Run one step; when it ends well, note its fingerprint, the files that it made, and its own
    verdict."""
    verdict_file, clock = job.folder / "stage.json", time.perf_counter()
    old = verdict_file.stat().st_mtime_ns if verdict_file.exists() else None
    job.folder.mkdir(parents=True, exist_ok=True)
    note, stopped = {} if options.force else job.note(), False
    done = note.get("started") == key and job.published() not in (None, note.get("published"))
    if (
        done or note.get("started") != key
    ):  # what an interrupted run left goes on only where nothing has changed
        shutil.rmtree(job.folder / "state", ignore_errors=True)
    if not done:  # as it is where the stage outlived its pipeline
        job.write({"started": key, "published": job.published()})
        code, stopped = run(command(job, options), lock, Path(options.output_dir, ".exit_code"))
        if code:
            return code, {}
    state = {
        "fingerprint": key,
        "run": uuid.uuid4().hex,
        "seconds": round(time.perf_counter() - clock, 1),
        "gate": "",
    }
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if done or verdict_file.stat().st_mtime_ns != old:
            verdict = json.loads(verdict_file.read_text())["gate"]
            state["gate"] = f"{'PASS' if verdict['passed'] else 'FAIL'}  {verdict['text']}"
    names = [
        path.name
        for path in job.folder.iterdir()
        if path.is_file() and not path.name.startswith(".")
    ]
    job.write(state | {"files": sorted(names) if job.step.output is None else []})
    return (130 if stopped else 0), state


def main(argv: Sequence[str]) -> int:
    recipe, options = parse(argv)
    names, first = list(recipe.steps)[: options.last + 1], options.first
    plan: dict[str, Job] = {}
    for i, name in enumerate(
        names
    ):  # all before the first step runs: a mistake in the last config shows at once
        if i >= first:
            plan[name] = resolve(name, recipe, options, plan)
            continue
        step, bases = recipe.steps[name], dict.fromkeys([options.output_dir, recipe.output_dir])
        found = [
            job
            for base in bases
            if (job := Job(name, step, Path(base, step.output or name))).state()
        ]
        if not found:
            again = (
                f"python pipeline.py {options.recipe} --output_dir {options.output_dir} --to {name}"
            )
            raise InputError(
                f"--from {options.start}: step {name} is not finished in {' or '.join(bases)}; make it: {again}"
            )
        plan[name] = found[0]
        console.print(f"{name}: taken from {found[0].folder}", style="dim")
    table, ran = (
        Table("step", "seconds", "gate", title=options.output_dir, title_justify="left"),
        set(),
    )
    with (
        contextlib.nullcontext(-1) if options.dry_run else locked(Path(options.output_dir)) as lock
    ):
        for i, name in enumerate(names[first:], first):
            # No hash of the code goes in: an edited comment would cost a pretraining. After a
            # change of code: --from STEP. Nor where it runs (--launch). A parent that ran again,
            # for whatever reason, has a new `run`.
            job = plan[name]
            parents = {need: (plan[need].state() or {}).get("run") for need in job.needs}
            hashes = input_hashes(job.config, [options.output_dir, recipe.output_dir])
            key, state = fingerprint([job.step.module, job.config, hashes, parents]), job.state()
            if (
                state
                and state["fingerprint"] == key
                and not (options.force or options.start or job.needs & ran)
            ):
                console.print(f"{name}: unchanged, skipped", style="dim")
                table.add_row(name, "skipped", state["gate"])
                continue
            console.rule(f"{name}  {i + 1}/{len(recipe.steps)}", align="left")
            console.print(shlex.join(["python", *command(job, options)[1:]]), style="dim")
            ran.add(name)
            if options.dry_run:
                continue
            code, state = execute(job, key, options, lock)
            if code:
                again = shlex.join(
                    name if word == options.start else word for word in argv if word != "--force"
                )
                print(
                    f"step {name} ended with exit code {code}; to go on from it: python pipeline.py {again}",
                    file=sys.stderr,
                )
                return code
            console.print(f"{name}: {state['seconds']} s  {state['gate']}")
            table.add_row(name, str(state["seconds"]), state["gate"])
    if not options.dry_run:
        console.print(table)
    return 0


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
