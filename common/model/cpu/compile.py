"""The functions of kernels.c, attention.c and packed.c, compiled by the machine's C compiler and
kept beside Python's bytecode.

They are for CPUs under Linux. Where there is no compiler, or it fails, or with
STATE_OF_GPT_NATIVE=0 in the environment, there are none, and the modules of the same names compute
the same with PyTorch's operations. They take a tensor as its address and whether it is in bf16.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.[ch]"))
# Of -ffast-math only what sums need to be vector instructions: NaN and infinity stay what they are.
FAST = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
COMPILE = ("-O3", "-march=native", *FAST, "-fopenmp", "-fPIC", "-w", "-c")
# OpenMP must be the one that torch has loaded: two would fight for the cores.
LINK = ("-shared", "-nostdlib")
OPENMP = re.compile(r"/.*/lib(?:gomp|iomp5|omp)[^/]*$", re.MULTILINE)
DECLARATION = re.compile(r"^(void|int) (\w+)\(([^)]*)\)", re.MULTILINE)


@cache
def library() -> ctypes.CDLL | None:
    """The functions, declared; None where there are none. A compiler that fails is a warning."""
    if os.environ.get("STATE_OF_GPT_NATIVE") == "0":
        return None
    try:
        loaded = OPENMP.findall(Path("/proc/self/maps").read_text())
        of_torch = max(loaded, key=lambda path: re.search(r"torch[./]lib", path) is not None)
        ctypes.CDLL(of_torch, ctypes.RTLD_GLOBAL)
        functions = ctypes.CDLL(str(compiled()))
    except (OSError, ValueError):
        return None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        failed = f"{error.cmd[0]} could not compile the kernels"
        warnings.warn(f"{failed}, PyTorch's are used, which are slower: {said}", stacklevel=2)
        return None
    text = "".join(source.read_text() for source in SOURCES)
    for result, name, arguments in DECLARATION.findall(text):
        function, declared = getattr(functions, name), arguments.split(",")
        function.restype = ctypes.c_int if result == "int" else None
        function.argtypes = [] if arguments == "void" else [c_type(each) for each in declared]
    return functions


def c_type(declaration: str) -> type:
    """The type of an argument as ctypes has it: of "const void *x", of "long rows"."""
    if "*" in declaration:
        return ctypes.c_void_p
    return getattr(ctypes, f"c_{declaration.split()[-2]}")


def compiled() -> Path:
    """The shared library for this machine, made when there is none. Raises OSError without a
    compiler or a place to write to, CalledProcessError where the compiler fails."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or not shutil.which(compiler[0]):
        raise OSError("no C compiler")
    processor = re.search(r"^(flags|Features).*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    recipe = [source.read_text() for source in SOURCES]
    recipe += [processor.group() if processor else platform.processor()]
    recipe += [*compiler, *COMPILE, *LINK]
    digest = hashlib.sha256("".join(recipe).encode()).hexdigest()[:16]
    target = FOLDER / "__pycache__" / f"kernels-{digest}.so"
    if not target.exists():
        build(compiler, target)
    return target


def build(compiler: Sequence[str], target: Path) -> None:
    """Compile and link; the file is whole or not there, however many processes start at once."""
    sources = [source for source in SOURCES if source.suffix == ".c"]
    objects = [f"{source.stem}.o" for source in sources]
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        compiling = [*compiler, *COMPILE, *map(str, sources)]
        linking = [*compiler, *LINK, *objects, "-o", str(made)]
        for command in (compiling, linking):
            subprocess.run(command, cwd=scratch, check=True, capture_output=True)
        made.replace(target)


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
