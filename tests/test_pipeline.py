"""The pipeline on a fake recipe: what runs, with which words on its command line, and what is
skipped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pipeline
from common.program.errors import InputError
from common.program.lock import held

# Notes its name and its arguments, writes a model and a verdict, fails or waits when told to by a
# file.
FAKE = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
here = pathlib.Path(__file__).parent
name = pathlib.Path(words[words.index("--config") + 1]).stem
out = pathlib.Path(words[words.index("--output_dir") + 1])
with (here / "log").open("a") as log:
    log.write(json.dumps([name, words]) + "\\n")
if (here / f"fail_{name}").exists():
    sys.exit(f"{name}: the stage's own words")
if (here / f"wait_{name}").exists():
    def save(*_):
        (out / "state").mkdir()
        (out / "state" / "saved").write_text("x")
        sys.exit(75)

    for kind in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is not signal.SIG_IGN:
            signal.signal(kind, save)
    (here / "waiting").write_text("x")
    time.sleep(30)
out.mkdir(parents=True, exist_ok=True)
(out / "model").write_text(name)
if name != "data":
    gate = {"passed": name != "sft", "text": f"{name} [learned]"}
    (out / "stage.json").write_text(json.dumps({"gate": gate}))
"""


# A program as ours are: its keys can be checked, it notes its config, its manifest comes last. It
# says when it ran.
TRAINER = """
import json
import pathlib
from typing import Annotated
from pydantic import Field
from common.config.schema import OutputDir, cli, stage_config, to_dict

@stage_config
class Config:
    output_dir: OutputDir
    seed: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(ge=0)] = 1e-3
    parent: str | None = None
    train_data: list[str] = []

def main(cfg):
    here, out = pathlib.Path(__file__).parent, pathlib.Path(cfg.output_dir)
    with (here / "log").open("a") as log:
        log.write(json.dumps([out.name, []]) + "\\n")
    if (here / f"fail_{out.name}").exists():
        raise SystemExit(75)
    out.mkdir(parents=True, exist_ok=True)
    (out / "model").write_text(f"{cfg.learning_rate} {cfg.parent}")
    report = {"config": to_dict(cfg), "gate": {"passed": True, "text": f"{cfg.learning_rate}"}}
    (out / "stage.json").write_text(json.dumps(report))
    (out / "manifest.json").write_text("{}")

if __name__ == "__main__":
    cli(Config, main)
"""


class Project:
    """A recipe data -> pretrain -> sft -> compare; sft reads data as well, and compare reads
    pretrain and sft."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe, self.base = root, root / "demo", str(root / "runs" / "demo")
        (root / "fake.py").write_text(FAKE)
        self.recipe.mkdir()
        self.write(
            "pipeline",
            output_dir=self.base,
            steps={
                "data": {"module": "fake"},
                "pretrain": {"module": "fake", "launch": True},
                "sft": {"module": "fake", "launch": True, "args": {"rate": 1e-4}},
                "compare": {"module": "fake", "output": "."},
            },
        )
        (root / "texts").mkdir()
        (root / "texts" / "a.txt").write_text("once")
        self.write("data", count=5)
        self.write("pretrain", texts=str(root / "texts"), steps=10)
        self.write("sft", parent=f"{self.base}/pretrain", train_data=f"{self.base}/data/sft.jsonl")
        self.write("compare", models=[f"{self.base}/pretrain", f"{self.base}/sft"], seed=1)

    def write(self, name: str, **values) -> None:
        (self.recipe / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML

    def run(self, *words: str) -> int:
        (self.root / "log").write_text("")
        return pipeline.main([str(self.recipe), *words])

    def ran(self) -> list[str]:
        return [name for name, _ in self.calls()]

    def calls(self) -> list[tuple[str, list[str]]]:
        return [json.loads(line) for line in (self.root / "log").read_text().splitlines()]

    def words(self, name: str) -> str:
        """The step's command line without --config FILE."""
        (call,) = [words for called, words in self.calls() if called == name]
        assert call[:2] == ["--config", str(self.recipe / f"{name}.yaml")]
        return " ".join(call[2:])


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Project(tmp_path)


def test_runs_in_order_then_skips_everything(project, capfd):
    assert project.run() == 0
    assert project.ran() == ["data", "pretrain", "sft", "compare"]
    out = capfd.readouterr().out
    assert (
        "pretrain  2/4" in out
        and "PASS  pretrain [learned]" in out
        and "FAIL  sft [learned]" in out
    )
    assert project.run() == 0 and project.ran() == []
    assert "sft: unchanged, skipped" in capfd.readouterr().out


def test_paths_follow_output_dir(project):
    project.run()
    assert project.words("data") == f"--output_dir {project.base}/data"
    assert project.words("sft") == f"--output_dir {project.base}/sft --rate 0.0001"
    assert project.words("compare") == f"--output_dir {project.base}"
    other = str(project.root / "other")
    assert project.run("--output_dir", other) == 0
    wanted = f"--output_dir {other}/sft --parent {other}/pretrain"
    wanted += f" --train_data {other}/data/sft.jsonl --rate 0.0001"
    assert project.words("sft") == wanted
    assert project.words("compare") == f"--output_dir {other} --models {other}/pretrain {other}/sft"
    assert project.run("--output_dir", other) == 0 and project.ran() == []


@pytest.mark.parametrize("written", ["./{}/pretrain", "{}//pretrain", "{}/x/../pretrain"])
def test_a_path_counts_however_it_is_written(project, monkeypatch, written):
    monkeypatch.chdir(project.root)
    own = os.path.relpath(project.base) if written[0] == "." else project.base
    project.write("sft", parent=written.format(own))
    assert project.run("--to", "sft") == 0
    assert project.run("--to", "sft", "--pretrain.steps=11") == 0
    assert project.ran() == ["pretrain", "sft"]
    assert project.run("--to", "sft", "--output_dir", "other") == 0
    assert "--parent other/pretrain" in project.words("sft")


def test_a_changed_config_reruns_the_step_and_its_dependents(project):
    project.run()
    project.write("pretrain", texts=str(project.root / "texts"), steps=11)
    project.run()
    assert project.ran() == ["pretrain", "sft", "compare"]
    project.write("compare", models=[f"{project.base}/sft"], seed=1)
    project.run()
    assert project.ran() == ["compare"]
    (project.recipe / "data.yaml").write_text("# a comment\n\ncount:   5\n")
    project.run()
    assert project.ran() == []


def test_changed_bytes_of_an_input_file_count_a_new_date_does_not(project):
    project.run()
    os.utime(project.root / "texts" / "a.txt", (1, 1))
    project.run()
    assert project.ran() == []
    (project.root / "texts" / "a.txt").write_text("Once")
    project.run()
    assert project.ran() == ["pretrain", "sft", "compare"]
    (project.root / "texts" / "b.txt").write_text("more")
    project.run("--to", "pretrain")
    assert project.ran() == ["pretrain"]


def test_a_lost_output_is_made_again_with_all_that_needs_it(project):
    project.run()
    (Path(project.base) / "data" / "model").unlink()
    project.run()
    assert project.ran() == ["data", "sft", "compare"]


def test_a_parent_made_again_reruns_dependents_later(project):
    project.run()
    project.run("--from", "pretrain", "--to", "pretrain")
    assert project.ran() == ["pretrain"]
    project.run()
    assert project.ran() == ["sft", "compare"]


def test_seed_goes_to_every_step_and_is_part_of_the_fingerprint(project):
    project.run()
    project.run("--seed", "3")
    assert project.ran() == ["data", "pretrain", "sft", "compare"]
    assert all(
        words[words.index("--seed") + 1] == "3" and words.count("--seed") == 1
        for _, words in project.calls()
    )
    project.run("--seed", "3")
    assert project.ran() == []


def test_force_and_from_run_even_if_unchanged(project):
    project.run()
    assert project.run("--force", "--to", "pretrain") == 0 and project.ran() == ["data", "pretrain"]
    project.run("--from", "sft")
    assert project.ran() == ["sft", "compare"]


def test_from_takes_earlier_steps_from_the_recipes_own_folder(project, capfd):
    project.run()
    other = str(project.root / "other")
    project.run("--output_dir", other, "--to", "data")
    capfd.readouterr()
    assert project.run("--output_dir", other, "--from", "sft") == 0
    assert project.ran() == ["sft", "compare"]
    assert f"--train_data {other}/data/sft.jsonl" in project.words(
        "sft"
    )  # finished in `other`: taken from there
    assert "--parent" not in project.words(
        "sft"
    )  # finished in the recipe's own folder only: as the YAML says
    assert (
        project.words("compare")
        == f"--output_dir {other} --models {project.base}/pretrain {other}/sft"
    )
    assert f"pretrain: taken from {project.base}/pretrain" in capfd.readouterr().out


def test_from_names_the_missing_step_and_a_command_that_makes_it(project):
    with pytest.raises(
        InputError, match=r"step data is not finished in .*runs/demo; make it: python pipeline.py"
    ) as error:
        project.run("--from", "sft")
    words = str(error.value).partition("pipeline.py ")[2].split()
    assert pipeline.main(words) == 0 and project.ran() == ["data"]


def test_a_failing_stage_ends_the_pipeline_with_its_code(project, capfd):
    project.run()
    (project.root / "fail_pretrain").write_text("")
    assert project.run("--force") == 1
    assert project.ran() == ["data", "pretrain"]
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2] == "pretrain: the stage's own words"
    assert lines[-1].startswith(
        "step pretrain ended with exit code 1; to go on from it: python pipeline.py "
    )
    (project.root / "fail_pretrain").unlink()
    assert pipeline.main(lines[-1].partition("pipeline.py ")[2].split()) == 0
    assert project.ran() == ["data", "pretrain", "pretrain", "sft", "compare"]


def test_exit_code_two_of_a_real_config_error(project, capfd):
    fields = "output_dir: str; count: int"
    (project.root / "real.py").write_text(
        "from common.config.schema import cli, stage_config\n"
        f"@stage_config\nclass Config: {fields}\ncli(Config, print)\n"
    )
    project.write("pipeline", output_dir=project.base, steps={"data": {"module": "real"}})
    assert project.run() == 0
    project.write("data", count=1.5)
    assert project.run() == 2
    assert f"error: {project.recipe}/data.yaml:1: count = 1.5" in capfd.readouterr().err


def test_variables(project):
    file = project.root / "rows.json"
    file.write_text("[1]")
    project.write(
        "pipeline",
        output_dir=project.base,
        variables={"rows": None, "size": "small"},
        steps={"data": {"module": "fake"}},
    )
    project.write("data", source="${rows}", names=["${size}.txt", "x"])
    with pytest.raises(
        InputError, match=r"demo needs --rows X on the command line, for \$\{rows\} in .*data.yaml"
    ):
        project.run()
    project.run("--rows", str(file))
    assert (
        project.words("data")
        == f"--output_dir {project.base}/data --source {file} --names small.txt x"
    )
    file.write_text("[2]")
    project.run("--rows", str(file))
    assert project.ran() == ["data"]
    project.run("--rows", str(file), "--size", "large")
    assert "--names large.txt x" in project.words("data")
    project.write("data", source="${row}")
    with pytest.raises(InputError, match=r"\$\{row\} is not among the variables"):
        project.run("--rows", str(file))


def test_a_key_of_one_step_on_the_command_line(project):
    project.run()
    project.run("--sft.rate=0.1", "--sft.parent=elsewhere/model", "--seed=4", "--sft.seed=5")
    assert (
        project.words("sft")
        == f"--output_dir {project.base}/sft --parent elsewhere/model --rate 0.1 --seed 5"
    )


def test_dry_run_shows_and_changes_nothing(project, capfd):
    project.run("--dry_run", "--num_processes", "2")
    lines = capfd.readouterr().out.splitlines()
    assert project.ran() == [] and not Path(project.base).exists()
    (data,) = [line for line in lines if "data.yaml" in line]
    (sft,) = [line for line in lines if "sft.yaml" in line]
    assert data.startswith("python -m fake --config")
    assert (
        "configs/accelerate/ddp.yaml --num_processes 2 --num_cpu_threads_per_process" in sft
        and " -m fake --config" in sft
    )
    project.run()
    project.write("pretrain", texts="gone", steps=10)
    capfd.readouterr()
    project.run("--dry_run")
    out = capfd.readouterr().out
    assert "data: unchanged, skipped" in out and "sft.yaml" in out and "compare.yaml" in out
    project.run("--dry_run", "--force", "--launch", "zero2.yaml")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python")]
    assert ["--config_file zero2.yaml -m fake" in line for line in lines] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--form", "sft"], "unknown option --form; did you mean `from`?"),
        (["--from", "stf"], "has no step stf; did you mean `sft`?"),
        (["--from", "sft", "--to", "data"], "--from sft comes after --to data"),
        (["--sfft.rate=1"], "--sfft.rate=1: "),
        (["--sfft.rate=1"], "/demo has no step sfft; did you mean `sft`?"),
        (["--sft.rate", "1"], "(a key of one step is set by --<step>.<key>=value)"),
    ],
)
def test_bad_command_lines(project, words, message):
    with pytest.raises(InputError) as error:
        project.run(*words)
    assert message in str(error.value)


def test_bad_recipes(project):
    project.write("data", source=f"{project.base}/sft")
    with pytest.raises(
        InputError,
        match=r"data.yaml: .*demo/sft is made by step sft, which does not run before data",
    ):
        project.run()
    (project.recipe / "pipeline.yaml").write_text(
        "output_dir: x\nsteps:\n  data:\n    modul: fake\n"
    )
    with pytest.raises(
        InputError, match=r"pipeline.yaml:3: `steps.data.module` is required \(and 1 more\)"
    ):
        project.run()
    (project.recipe / "pipeline.yaml").write_text(
        "output_dir: x\nsteps:\n  data: {module: fake; rm}\n"
    )
    with pytest.raises(
        InputError, match=r"pipeline.yaml:3: steps.data.module = fake; rm is refused"
    ):
        project.run()
    with pytest.raises(InputError, match=r"config file nowhere/pipeline.yaml: No such file"):
        pipeline.main(["nowhere"])
    (project.root / "file").write_text("")
    project.write(
        "pipeline", output_dir=str(project.root / "file"), steps={"pretrain": {"module": "fake"}}
    )
    with pytest.raises(InputError, match=r"output_dir = .*/file is a file; name a directory"):
        project.run()


def test_signals_are_forwarded_and_a_second_pipeline_is_refused(project):
    (project.root / "wait_sft").write_text("")
    words = [sys.executable, pipeline.__file__, str(project.recipe)]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.time() + 20
        while not (project.root / "waiting").exists() and time.time() < until:
            time.sleep(0.02)
        with pytest.raises(
            InputError,
            match=r"runs/demo: another pipeline, or a stage that it left, is running there",
        ):
            project.run("--from", "sft")
        first.send_signal(signal.SIGTERM)
        error = first.communicate(timeout=20)[1]
    finally:
        first.kill()
    assert first.returncode == 75 and "step sft ended with exit code 75" in error
    saved = Path(project.base, "sft", "state", "saved")
    assert saved.exists()  # the stage was waited for
    (project.root / "wait_sft").unlink()
    assert project.run() == 0 and project.ran() == ["sft", "compare"]  # and the lock is gone
    assert saved.exists()  # the same step goes on from it


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed(project, nohup):
    """The stage is told, and waited for; with nohup it goes on."""
    (project.root / "wait_sft").write_text("")
    words = [sys.executable, pipeline.__file__, str(project.recipe)]
    started = subprocess.Popen(
        ["nohup", *words] if nohup else words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.time() + 20
        while not (project.root / "waiting").exists() and time.time() < until:
            time.sleep(0.02)
        started.stdout.close()  # nobody reads its output any more
        started.send_signal(signal.SIGHUP)
        if nohup:
            time.sleep(0.2)
            assert not Path(project.base, "sft", "state").exists()
            started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=20) == 75
    finally:
        started.kill()
    assert Path(project.base, "sft", "state", "saved").exists()


def test_a_program_that_writes_where_a_step_does_is_not_disturbed(project):
    """A stage that was started by hand, or processes that a dead launcher left."""
    with (
        held(Path(project.base, "compare")),  # the last step's folder is another one
        held(Path(project.base, "sft")),
        pytest.raises(InputError, match="runs/demo/sft: another program is running there"),
    ):
        project.run()
    assert project.ran() == []
    assert project.run() == 0


def test_a_saved_state_goes_when_its_step_has_changed(project):
    state = Path(project.base, "sft", "state")
    for change in ("none", "input", "none", "force"):
        (project.root / "fail_sft").write_text("")
        assert project.run(*["--force"] * (change == "force")) == 1
        state.mkdir(exist_ok=True)
        (project.root / "fail_sft").unlink()
        if change == "input":
            (project.root / "texts" / "a.txt").write_text("twice")
        assert project.run(*["--force"] * (change == "force")) == 0
        assert state.exists() == (change == "none")
        project.write("sft", parent=f"{project.base}/pretrain", train_data=change)


def test_a_recipe_that_is_not_there_lists_those_that_are(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    with pytest.raises(InputError) as error:
        pipeline.main(["dem"])
    wanted = (
        "config file dem/pipeline.yaml: No such file; did you mean demo? The recipes in . are demo"
    )
    assert str(error.value) == wanted
    with pytest.raises(
        InputError, match=r"did you mean .*configs/lecture\? The recipes in .*configs"
    ):
        pipeline.main(["elsewhere/lectur"])
    assert pipeline.main([]) == 2
    shown = capsys.readouterr().out
    assert "--dry_run" in shown and "demo-overoptimise" in shown and "The whole road" in shown


def test_the_recipe_tells_its_story(project, capfd):
    steps = {"data": {"module": "fake", "about": "Why, and\nwhat to look for."}}
    more = {"about": "All of it.", "afterwards": "Open {output_dir}/page.html\n{braces} stay\n"}
    project.write("pipeline", output_dir=project.base, steps=steps, **more)
    assert project.run() == 0
    out = capfd.readouterr().out
    assert "Why, and what to look for.\npython -m fake" in out
    assert out.endswith(f"Open {project.base}/page.html\n{{braces}} stay\n")
    steps["compare"] = {"module": "fake"}
    project.write("pipeline", output_dir=project.base, steps=steps, **more)
    assert project.run("--to", "data") == 0 and "page.html" not in capfd.readouterr().out


def headings(text: str) -> dict[str, str]:
    """{step: what stands after it on its heading}."""
    found = [line.split("  ") for line in text.splitlines() if "/4  " in line]
    return {words[0]: words[2].rstrip(" ─") for words in found}


def test_the_time_left_is_said_only_where_it_is_known(project, capfd):
    project.run()
    told = headings(capfd.readouterr().out)
    assert list(told) == ["data", "pretrain", "sft", "compare"]
    assert all(text.endswith("so far") for text in told.values())
    for name, seconds in {"data": 7, "pretrain": 60, "sft": 100, "compare": 3700}.items():
        file = Path(project.base, "" if name == "compare" else name)
        file /= ".pipeline.compare.json" if name == "compare" else ".pipeline.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"took": seconds}))
    project.write("sft", parent=f"{project.base}/pretrain", train_data="other")
    project.run()
    told = headings(capfd.readouterr().out)
    assert "about 1 h 3 min left" in told["sft"] and list(told) == ["sft", "compare"]
    assert "about 1 h 1 min left" in told["compare"]
    # a step that goes on from where it stopped takes less, and nobody knows how much
    (project.root / "fail_sft").write_text("")
    project.run("--force")
    (project.root / "fail_sft").unlink()
    capfd.readouterr()
    project.run()
    told = headings(capfd.readouterr().out)
    assert told["sft"].endswith("so far") and "left" in told["compare"]


def refusal(project, *words: str) -> str:
    """The one line that a call of the pipeline is refused with."""
    with pytest.raises(InputError) as error:
        project.run(*words)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--output_dir", ""], "output_dir = '' is refused: a directory's name is wanted"),
        (["--output_dir", "../x"], "a path through `..`"),
        (["--num_processes", "0"], "num_processes = 0 is refused; allowed: int >= 1"),
        (["--launch", "nosuch.yaml"], "launch = 'nosuch.yaml': no such file"),
        (["--to", "zzz"], "has no step zzz; the steps are data, pretrain, sft, compare"),
    ],
)
def test_options_are_refused_before_the_first_step(project, words, wanted):
    assert wanted in refusal(project, *words)
    assert project.ran() == []


@pytest.mark.parametrize("more", [{"output_dir": ""}, {"steps": {"data": {"output": ".."}}}])
def test_a_recipe_writes_where_it_says(project, more):
    steps = {"data": {"module": "fake", **more.get("steps", {}).get("data", {})}}
    project.write("pipeline", output_dir=more.get("output_dir", project.base), steps=steps)
    assert "is refused" in refusal(project)


def test_the_recipe_is_a_folder_and_comes_first(project):
    with pytest.raises(InputError, match=r"the recipe comes first: .*demo --seed"):
        pipeline.main(["--seed", "3", str(project.recipe)])
    with pytest.raises(InputError, match=r"is a file; name the recipe's folder: .*demo$"):
        pipeline.main([str(project.recipe / "pipeline.yaml")])


@pytest.mark.parametrize("name", ["seed", "help", "start", "to"])
def test_a_variable_cannot_be_named_as_an_option(project, name):
    steps = {"data": {"module": "fake"}}
    project.write("pipeline", output_dir=project.base, steps=steps, variables={name: "x"})
    assert f"variables.{name} is refused" in refusal(project)


def test_help_shows_a_variable_with_a_percent_sign(project, capsys):
    steps = {"data": {"module": "fake"}}
    project.write("pipeline", output_dir=project.base, steps=steps, variables={"x": "50%d"})
    with pytest.raises(SystemExit):
        project.run("--help")
    assert "50%d" in capsys.readouterr().out


@pytest.mark.parametrize("note", ["[1]", '{"files": 5}', '{"files": []}', "{", "null"])
def test_a_note_that_says_nothing_is_none(project, note):
    project.run()
    Path(project.base, "data", ".pipeline.json").write_text(note)
    assert project.run("--to", "data") == 0 and project.ran() == ["data"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "1 min 0 s"), (95, "1 min 35 s"), (7300, "2 h 1 min")],
)
def test_lasting(seconds, text):
    assert pipeline.lasting(seconds) == text


@pytest.fixture
def chain(project):
    """A recipe one -> two -> three of programs with a Config."""
    (project.root / "trainer.py").write_text(TRAINER)
    steps = {name: {"module": "trainer"} for name in ("one", "two", "three")}
    steps["two"]["args"] = {"learning_rate": 0.5}
    project.write("pipeline", output_dir=project.base, steps=steps)
    project.write("one")
    project.write("two", parent=f"{project.base}/one")
    project.write("three", parent=f"{project.base}/two")
    return project


def train_by_hand(chain, name: str, **keys) -> None:
    """Starts a step's program without the pipeline."""
    words = [f"--{key}={value}" for key, value in keys.items()]
    words += ["--config", str(chain.recipe / f"{name}.yaml"), f"--output_dir={chain.base}/{name}"]
    path = f"{pipeline.ROOT}:{chain.root}"
    subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )


@pytest.mark.parametrize(
    ("words", "step", "keys", "wanted"),
    [
        (
            ["--three.learning_rat=3"],
            {},
            {},
            "command line: unknown key `learning_rat`; did you mean `learning_rate`? (step three)",
        ),
        (["--two.learning_rate=-1"], {}, {}, "command line: learning_rate = -1 is refused"),
        (["--seed", "-1"], {}, {}, "command line: seed = -1 is refused; allowed: int >= 0 < 4294"),
        (
            [],
            {},
            {"sede": 1},
            "three.yaml:1: unknown key `sede`; did you mean `seed`? (step three)",
        ),
        ([], {}, {"seed": 1.5}, "three.yaml:1: seed = 1.5 is refused"),
        ([], {"args": {"parnt": "x"}}, {}, "pipeline.yaml:1: unknown key `parnt`"),
        ([], {"module": "nosuch.program"}, {}, "step three: module nosuch.program: there is no"),
        ([], {}, {"train_data": ["{base}/two/x.jsonl", "gone.jsonl"]}, "gone.jsonl: no such file"),
    ],
)
def test_a_mistake_in_a_later_step_ends_the_run_before_the_first(chain, words, step, keys, wanted):
    steps = {name: {"module": "trainer"} for name in ("one", "two", "three")}
    steps["three"] |= step
    chain.write("pipeline", output_dir=chain.base, steps=steps)
    text = json.dumps(keys).replace("{base}", chain.base)
    (chain.recipe / "three.yaml").write_text(text)
    found = refusal(chain, *words)
    assert wanted in found and refusal(chain, *words, "--dry_run") == found
    assert chain.ran() == [] and not Path(chain.base, "one").exists()


def test_a_program_without_a_config_is_not_checked_and_that_is_said(project, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # nor does it cost another process
    assert project.run("--sft.rat=1", "--dry_run") == 0
    assert "sft: fake has no Config to check its keys by" in capfd.readouterr().out


@pytest.mark.heavy
def test_a_run_by_hand_is_not_taken_for_the_one_that_was_stopped(chain):
    (chain.root / "fail_one").touch()
    assert chain.run() == 75
    (chain.root / "fail_one").unlink()
    train_by_hand(chain, "one", learning_rate=0)
    found = refusal(chain)
    assert (
        "one holds a run that the pipeline did not make (learning_rate = 0.0, not 0.001)" in found
    )
    assert found.endswith("to keep it: --from two; to make it again in its place: --from one")
    model = Path(chain.base, "one", "model")
    assert model.read_text() == "0.0 None"
    assert chain.run("--from", "two") == 0
    assert chain.ran() == ["two", "three"] and model.read_text() == "0.0 None"
    assert chain.run("--from", "one", "--to", "one") == 0
    assert chain.ran() == ["one"] and model.read_text() == "0.001 None"


def test_what_a_stage_finished_after_its_pipeline_was_killed_is_taken(chain, capfd):
    (chain.root / "fail_one").touch()
    assert chain.run() == 75
    (chain.root / "fail_one").unlink()
    train_by_hand(chain, "one")
    assert chain.run() == 0 and chain.ran() == ["two", "three"]
    assert "one: 0.0 s  PASS  0.001" in capfd.readouterr().out


def test_a_finished_step_that_was_trained_again_by_hand_is_seen(project, capfd):
    assert project.run() == 0
    for name in ("model", "stage.json"):
        Path(project.base, "pretrain", name).write_text("by hand")
    found = refusal(project)
    assert "pretrain was changed since the pipeline made it (model, stage.json); to keep" in found
    assert found.endswith("--from sft; to make it again in its place: --from pretrain")
    assert refusal(project, "--dry_run") == found and project.ran() == []
    capfd.readouterr()
    assert project.run("--from", "sft") == 0 and project.ran() == ["sft", "compare"]
    assert f"pretrain: taken from {project.base}/pretrain; it was cha" in capfd.readouterr().out
    assert refusal(project) == found  # as it still is not what the recipe says
    assert project.run("--from", "pretrain") == 0 and project.ran() == [
        "pretrain",
        "sft",
        "compare",
    ]
    assert project.run() == 0 and project.ran() == []


def test_what_was_made_of_a_changed_parent_is_made_again_of_the_right_one(project):
    project.run()
    model = Path(project.base, "sft", "model")
    before = model.read_text()
    model.write_text("by hand")
    assert project.run("--from", "compare") == 0
    model.write_text(before)
    assert project.run() == 0 and project.ran() == ["compare"]


def test_content_counts_and_a_date_does_not(project):
    project.run()
    for name in ("model", "stage.json"):
        os.utime(Path(project.base, "sft", name), (1, 1))
    (Path(project.base) / "sft" / "notes").write_text("the user's own")
    assert project.run() == 0 and project.ran() == []
    (Path(project.base) / "sft" / "notes").write_text("longer")
    assert project.run() == 0 and project.ran() == []


def test_the_last_step_by_hand(project):
    project.run()
    Path(project.base, "model").write_text("by hand")
    assert "to keep it: --output_dir with another folder; to make it" in refusal(project)
    assert project.run("--force") == 0 and "compare" in project.ran()


def test_a_folder_that_the_pipeline_never_wrote_to(project):
    model = Path(project.base, "pretrain", "model")
    model.parent.mkdir(parents=True)
    model.write_text("by hand")
    (model.parent / "manifest.json").write_text("{}")
    assert "pretrain holds a run that the pipeline did not make; to keep it" in refusal(project)
    assert project.run("--to", "data") == 0
    assert project.run("--from", "sft") == 0 and project.ran() == ["sft", "compare"]
    assert model.read_text() == "by hand"


@pytest.mark.parametrize("finished", [True, False])
def test_the_state_of_a_run_by_hand_is_kept(project, finished):
    if finished:
        project.run()
    saved = Path(project.base, "sft", "state", "saved")
    saved.parent.mkdir(parents=True)
    saved.touch()
    project.write("sft", changed=True)
    assert "holds the state of a run that the pipeline did not start" in refusal(project)
    assert saved.exists()


def test_a_step_named_state_is_no_state(project):
    steps = {"state": {"module": "fake"}, "compare": {"module": "fake", "output": "."}}
    project.write("pipeline", output_dir=project.base, steps=steps)
    project.write("state")
    project.run()
    assert Path(project.base, "state", "model").exists()


def test_the_page_in_a_shared_folder_is_made_again_where_it_is_gone(project):
    Path(project.base).mkdir(parents=True)
    log = Path(project.base, "log")
    log.write_text("of tee")
    project.run()
    log.write_text("of tee, later")
    project.run()
    assert project.ran() == []
    Path(project.base, "model").unlink()  # what compare made
    project.run()
    assert project.ran() == ["compare"]
    note = Path(project.base, ".pipeline.compare.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"files": []}))  # an older version's
    assert project.run("--from", "compare") == 0
    assert json.loads(note.read_text())["gate"] == "PASS  compare [learned]"


def test_a_note_of_an_older_version_counts_where_the_dates_do(project):
    """It has names of files, and no hashes."""
    project.run()
    note = Path(project.base, "sft", ".pipeline.json")
    old = json.loads(note.read_text())
    note.write_text(json.dumps(old | {"files": list(old["files"])}))
    project.run()
    assert project.ran() == []
    Path(project.base, "sft", "model").write_text("by hand")
    os.utime(note, (1, 1))
    assert "sft was changed since the pipeline made it (model, stage.json)" in refusal(project)


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 200_000], ids=["nul", "half", "long"])
def test_what_no_command_line_can_say(project, text):
    steps = {"data": {"module": "fake", "args": {"rate": text}}}
    project.write("pipeline", output_dir=project.base, steps=steps)
    assert "rate: a command line cannot hold" in refusal(project)


def test_a_file_where_a_step_writes_is_one_line(project):
    Path(project.base).mkdir(parents=True)
    Path(project.base, "data").touch()
    assert "step data: output_dir = " in (found := refusal(project, "--dry_run"))
    assert found.endswith("demo/data is a file; name a directory")


def test_a_step_writes_where_the_pipeline_says(project):
    assert "step sft: output_dir is refused" in refusal(project, "--sft.output_dir=elsewhere")


def test_a_program_that_cannot_run_is_one_line(chain):
    (chain.root / "broken.py").write_text(TRAINER + "\n1 +")
    steps = {"one": {"module": "trainer"}, "two": {"module": "broken"}}
    chain.write("pipeline", output_dir=chain.base, steps=steps)
    assert "broken: cannot run: SyntaxError: invalid syntax" in refusal(chain)
