"""The functions of kernels.c, attention.c and packed.c, compiled by the machine's C compiler and
kept beside Python's bytecode.

They are for CPUs under Linux. Where there is no compiler, or it fails, or with
STATE_OF_GPT_NATIVE=0 in the environment, there are none, and the modules of the same names compute
the same with PyTorch's operations. They take a tensor as its address and whether it is in bf16.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from shutil import which

import torch
from torch import Tensor

from common.program.files import sha256
from common.program.terminal import one_line

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.[ch]"))
# Of -ffast-math only what sums need to be vector instructions: NaN and infinity stay what they are.
FAST = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
COMPILE = ("-O3", "-march=native", *FAST, "-fopenmp", "-fPIC", "-w", "-c")
# OpenMP must be the one that torch has loaded: two would fight for the cores.
LINK = ("-shared", "-nostdlib")
OPENMP = re.compile(r"/.*/lib(?:gomp|iomp5|omp)[^/]*$", re.MULTILINE)
PATIENCE = 300  # seconds for a compiler, which takes a few, and on a busy machine many
DECLARATION = re.compile(r"^(void|int) (\w+)\(([^)]*)\)", re.MULTILINE)


@cache
def library() -> ctypes.CDLL | None:
    """The functions, declared; None where there are none. That is a warning, unless there is no
    compiler or nobody wants them."""
    if os.environ.get("STATE_OF_GPT_NATIVE") == "0" or not (os.environ.get("CC") or which("cc")):
        return None
    try:
        loaded = OPENMP.findall(Path("/proc/self/maps").read_text())
        of_torch = max(loaded, key=lambda path: re.search(r"torch[./]lib", path) is not None)
        ctypes.CDLL(of_torch, ctypes.RTLD_GLOBAL)
    except (OSError, ValueError):
        return None
    try:
        return declared(ctypes.CDLL(str(compiled())))
    except subprocess.CalledProcessError as error:
        ended = f"it ended with {error.returncode}"
        why = f"{error.cmd[0]} could not compile the kernels: {one_line(error.stderr) or ended}"
    except (OSError, ValueError, AttributeError) as error:
        why = f"the kernels could not be compiled: {one_line(error)}"
    warnings.warn(f"{why[:400]}; PyTorch's are used, which are slower", stacklevel=2)
    return None


def declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions with the types that the sources declare."""
    text = "".join(source.read_text() for source in SOURCES)
    for result, name, arguments in DECLARATION.findall(text):
        function, each = getattr(functions, name), arguments.split(",")
        function.restype = ctypes.c_int if result == "int" else None
        function.argtypes = [] if arguments == "void" else [c_type(one) for one in each]
    return functions


def c_type(declaration: str) -> type:
    """The type of an argument as ctypes has it: of "const void *x", of "long rows"."""
    if "*" in declaration:
        return ctypes.c_void_p
    return getattr(ctypes, f"c_{declaration.split()[-2]}")


def compiled() -> Path:
    """The shared library for this machine, made when there is none that can be trusted.

    Raises OSError without a compiler or a place to write to, ValueError where CC is no command,
    CalledProcessError where the compiler fails, TimeoutError where it hangs.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if not compiler or not which(compiler[0]):
        raise OSError(f"CC {compiler} is no program here")
    folder = FOLDER / "__pycache__" / "native"
    folder.mkdir(0o755, parents=True, exist_ok=True)
    if not is_ours(folder):
        raise OSError(f"others could have written what is in {folder}; delete it")
    processor = re.search(r"^(flags|Features).*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    recipe = [source.read_text() for source in SOURCES]
    recipe += [processor.group() if processor else platform.processor()]
    recipe += [*compiler, *COMPILE, *LINK]
    name = f"kernels-{hashlib.sha256(''.join(recipe).encode()).hexdigest()[:16]}"
    if found := built(folder, name):
        return found
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait for it
        return built(folder, name) or build(compiler, folder, name)
    finally:
        os.close(lock)


def is_ours(path: Path) -> bool:
    """Whether nobody can have written this file or folder but us, root, and whose code this is."""
    found = path.lstat()
    return found.st_uid in (os.geteuid(), 0, FOLDER.stat().st_uid) and not found.st_mode & 0o022


def built(folder: Path, name: str) -> Path | None:
    """The library of this name, if it is what was built: it has its hash in its name."""
    for file in folder.glob(f"{name}-*.so"):
        if is_ours(file) and file.is_file() and file.stem == f"{name}-{sha256(file)[:16]}":
            return file
    return None


def build(compiler: Sequence[str], folder: Path, name: str) -> Path:
    """Compile and link; the file is whole or not there. Who calls it holds the folder's lock."""
    for left in folder.glob("tmp*"):  # by a process that was killed
        shutil.rmtree(left)
    for spoilt in folder.glob(f"{name}-*.so"):
        warnings.warn(f"{one_line(spoilt)} is not what was built there: built again", stacklevel=2)
    sources = [source for source in SOURCES if source.suffix == ".c"]
    objects = [f"{source.stem}.o" for source in sources]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, "made.so")
        run([*compiler, *COMPILE, *map(str, sources)], scratch)
        run([*compiler, *LINK, *objects, "-o", made.name], scratch)
        made.chmod(0o755)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        return made.replace(folder / f"{name}-{sha256(made)[:16]}.so")


def run(command: Sequence[str], folder: str) -> None:
    """Run a compiler. Raises CalledProcessError when it fails; one that takes PATIENCE is killed,
    with all that it started, and TimeoutError raised."""
    quiet, caught = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=quiet,
        stdout=quiet,
        stderr=caught,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command[0]} is not done after {PATIENCE} s") from None
        finally:
            if process.returncode is None:  # also after Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said)


def functions_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """`library()`, if these are what its functions take: contiguous, in bf16 or fp32, on a CPU."""
    for x in tensors:
        if not x.is_cpu or x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
            return None
    return None if torch.compiler.is_compiling() else library()


def native_for(*tensors: Tensor) -> ctypes.CDLL:
    """`functions_for` tensors that they are known to take, as who came here has asked before."""
    functions = functions_for(*tensors)
    assert functions is not None
    return functions


def tensor(x: Tensor) -> tuple[int, bool]:
    """A tensor as the functions take it: its address, and whether it is in bf16."""
    return x.data_ptr(), x.dtype == torch.bfloat16


def address(x: Tensor | None) -> int | None:
    """Where the elements are; None, which is C's NULL, for None."""
    return None if x is None else x.data_ptr()
