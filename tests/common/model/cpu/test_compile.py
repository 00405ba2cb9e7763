"""Compiling the kernels, or not; and the matrices that only the matrix units read."""

import concurrent.futures
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.model.cpu import compile as native
from common.model.cpu import packed
from common.model.sample import sample

ROOT = Path(__file__).resolve().parents[4]
BF16 = torch.bfloat16
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


# Compiling


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The sources in a place where nothing is compiled yet."""
    for source in native.SOURCES:
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "SOURCES", sorted(tmp_path.glob("*.[ch]")))
    return tmp_path


@needs_compiler
@pytest.mark.heavy
def test_it_is_compiled_once_and_again_when_a_source_changes(folder):
    first = native.compiled()
    made = first.stat().st_mtime_ns
    assert native.compiled() == first and first.stat().st_mtime_ns == made
    (folder / "native.h").write_text((folder / "native.h").read_text() + "// changed\n")
    assert native.compiled() != first
    made = (folder / "__pycache__" / "native").iterdir()
    assert sorted(p.suffix for p in made) == [".so", ".so"]  # nothing else is left behind


DAMAGE = {
    "truncated": lambda file, other: os.truncate(file, 3000),
    "empty": lambda file, other: os.truncate(file, 0),
    "flipped": lambda file, other: file.write_bytes(file.read_bytes()[::-1]),
    "another library": lambda file, other: file.write_bytes(b"\x7fELF"),
    "a dangling link": lambda file, other: (file.unlink(), file.symlink_to("nowhere")),
    "a link": lambda file, other: (file.unlink(), file.symlink_to(other)),
    "writable by all": lambda file, other: file.chmod(0o666),
    "of another user": lambda file, other: os.chown(file, 65534, 65534),
}


def test_only_what_was_built_is_loaded(folder, monkeypatch, recwarn):
    """Otherwise it is built again, with one line."""
    other = folder / "other.so"
    other.write_bytes(bytes(range(256)) * 20)

    def compiler(command: list[str], place: str) -> None:
        shutil.copy(other, Path(place, "made.so"))

    monkeypatch.setattr(native, "run", compiler)
    monkeypatch.setenv("CC", "true")
    made = native.compiled()
    assert native.compiled() == made and not recwarn
    (made.parent / "tmpleft").mkdir()  # of a compile that was killed
    (made.parent / "tmpleft" / "kernels.o").write_text("")
    for name, damage in DAMAGE.items():
        if name == "of another user" and os.geteuid():
            continue
        damage(made, other)
        with pytest.warns(UserWarning) as told:
            found = native.compiled()
        assert found.read_bytes() == other.read_bytes() and native.is_ours(found), name
        lines = [str(warning.message) for warning in told]
        assert lines == [f"{made} is not what was built there: built again"], name
        assert sorted(made.parent.iterdir()) == [made], name


@needs_compiler
@pytest.mark.heavy
def test_processes_that_start_at_once_all_get_a_whole_library(folder):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: native.compiled(), range(4)))) == 1


@pytest.mark.parametrize(
    "script, words",
    [
        (None, r"CC \['no-such-compiler'\] is no program here"),
        ('cc "', "No closing quotation"),
        ("#!/bin/sh\nkill -9 $$", "bad-cc could not compile the kernels: it ended with -9"),
        ("#!/bin/sh\nsleep 60; true", "bad-cc is not done after 0.3 s"),
        ("#!/bin/sh\nprintf '\\033[31mred\\n two' >&2; exit 1", r"kernels: \\x1b\[31mred two"),
        ("no program", "Exec format error"),
        ("#!/bin/sh", "No such file or directory.*made.so"),
    ],
)
def test_a_compiler_of_no_use_is_one_line(script, words, folder, monkeypatch):
    monkeypatch.setenv("CC", script or "no-such-compiler")
    if script and "cc" not in script:
        (folder / "bad-cc").write_text(script + "\n")
        (folder / "bad-cc").chmod(0o755)
        monkeypatch.setenv("CC", str(folder / "bad-cc"))
    monkeypatch.setattr(native, "PATIENCE", 0.3)
    with pytest.warns(
        UserWarning, match=f"{words}.*; PyTorch's are used, which are slower$"
    ) as told:
        assert native.library.__wrapped__() is None
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert not list(folder.glob("__pycache__/native/*"))


def test_nothing_is_loaded_from_a_folder_that_others_can_write_to(folder):
    made = folder / "__pycache__" / "native"
    made.mkdir(parents=True)
    made.chmod(0o777)
    with pytest.warns(UserWarning, match="others could have written what is in .*native; delete"):
        assert native.library.__wrapped__() is None


@pytest.mark.parametrize("why", ["no compiler", "it fails", "not wanted", "no place to write to"])
@pytest.mark.heavy
def test_without_them_pytorch_computes_the_same(why, folder, monkeypatch, tiny_gpt):
    model, prompts = tiny_gpt("llama"), [[5, 9, 100], [7]]
    wanted = [s.ids for s in sample(model, prompts, max_new_tokens=8, temperature=0)]
    monkeypatch.delenv("CC", raising=False)
    if why == "no compiler":
        monkeypatch.setenv("PATH", str(folder))
    elif why == "it fails":
        (folder / "kernels.c").write_text("int broken(")
    elif why == "not wanted":
        monkeypatch.setenv("STATE_OF_GPT_NATIVE", "0")
    else:
        monkeypatch.setattr(native, "FOLDER", folder / "kernels.c")
    told = {
        "it fails": "cc could not compile.*kernels.c:1",
        "no place to write to": "Not a directory: .*kernels.c/__pycache__/native",
    }
    native.library.cache_clear()
    try:
        with (
            pytest.warns(UserWarning, match=told[why]) if why in told else contextlib.nullcontext()
        ):
            assert native.library() is None
        assert [s.ids for s in sample(model, prompts, max_new_tokens=8, temperature=0)] == wanted
    finally:
        native.library.cache_clear()


@needs_compiler
@pytest.mark.heavy
def test_a_processor_that_tells_no_flags_is_no_obstacle(folder, monkeypatch):
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: "cpu : POWER9" if "cpuinfo" in self.name else real(self, *a, **k),
    )
    assert native.compiled().exists()


@needs_compiler
@pytest.mark.heavy
def test_openmp_is_the_one_of_torch():
    """One OpenMP in the process, and its number of threads is torch's."""
    script = (
        "import torch; torch.set_num_threads(2);"
        "from common.model.cpu.compile import library;"
        "from common.model.cpu.kernels import rms_norm;"
        "assert library(); x = torch.randn(4096, 64); rms_norm(x, torch.ones(64), 1e-5);"
        "maps = open('/proc/self/maps').read();"
        "print(len({row.split()[-1] for row in maps.splitlines() if 'omp' in row.split('/')[-1]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.stdout.strip() == "1", done.stderr


def test_what_they_do_not_take_goes_to_pytorch():
    x = torch.randn(4, 6)
    for other in (x.double(), x.half(), x.t(), x.to("meta")):
        assert native.functions_for(x, other) is None


# Packed matrices


can_pack = pytest.mark.skipif(
    not packed.can_pack(nn.Linear(32, 32, dtype=BF16)), reason="no matrix units (AMX)"
)


@can_pack
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 64, 90, packed.FEW, packed.FEW + 1])
@pytest.mark.parametrize("outputs, inputs", [(32, 32), (17, 34), (100, 62), (768, 256), (256, 688)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_equals_the_plain_one(rows, outputs, inputs, bias):
    generator = torch.Generator().manual_seed(rows)
    layer, x = (
        nn.Linear(inputs, outputs, bias=bias, dtype=BF16),
        torch.randn(3, rows, inputs, generator=generator).to(BF16)[1],
    )
    true = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with packed.packed(layer), torch.no_grad():
        found = layer(x)
    assert found.shape == (rows, outputs) and found.dtype == BF16
    assert torch.allclose(found.double(), true, rtol=2**-8, atol=1e-4)  # rounded to bf16 once


@can_pack
def test_a_model_is_itself_again_afterwards(tiny_gpt):
    """With its gradients; and new weights are seen by the next sampling, as PPO needs."""
    model = tiny_gpt("llama").bfloat16()
    ids = torch.randint(0, 300, (2, 9))
    before = model(ids)
    with pytest.raises(KeyError), packed.packed(model):
        raise KeyError
    assert torch.equal(model(ids), before) and model(ids).requires_grad
    first = sample(model, [[5, 9]], max_new_tokens=6, temperature=0)[0].ids
    with torch.no_grad():
        model.head.weight.neg_()
    assert sample(model, [[5, 9]], max_new_tokens=6, temperature=0)[0].ids != first


@can_pack
def test_inside_another_and_for_other_numbers_it_changes_nothing():
    layer, x = nn.Linear(64, 64, dtype=BF16), torch.randn(4, 64).to(BF16)
    with packed.packed(layer):
        with packed.packed(layer):
            assert "forward" in vars(layer)
        assert layer(x.requires_grad_()).requires_grad
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            layer(x.float())
    assert "forward" not in vars(layer)


@can_pack
def test_other_layers_are_left_alone():
    wide, odd = nn.Linear(64, 64), nn.Linear(33, 64, dtype=BF16)
    with packed.packed(nn.ModuleList([wide, odd])):
        assert "forward" not in vars(wide) and "forward" not in vars(odd)
