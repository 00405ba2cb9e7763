"""The functions of kernels.c, attention.c and packed.c, compiled by the machine's C compiler and
kept beside Python's bytecode.

They are for CPUs under Linux. Where there is no compiler, or it fails, or with
STATE_OF_GPT_NATIVE=0 in the environment, there are none, and the modules of the same names compute
the same with PyTorch's operations.
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
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.[ch]"))
# Of -ffast-math only what sums need to be vector instructions: NaN and infinity stay what they are.
FAST = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
COMPILE = ("-O3", "-march=native", *FAST, "-fopenmp", "-fPIC", "-w", "-c")
LINK = (
    "-shared",
    "-nostdlib",
)  # OpenMP must be the one that torch has loaded: two would fight for the cores
OPENMP = re.compile(r"/.*/lib(?:gomp|iomp5|omp)[^/]*$", re.MULTILINE)
DECLARATION = re.compile(r"^(void|int) (\w+)\(([^)]*)\)", re.MULTILINE)


@cache
def library() -> ctypes.CDLL | None:
    """The functions, or None."""
    if os.environ.get("STATE_OF_GPT_NATIVE") == "0":
        return None
    try:
        loaded = OPENMP.findall(Path("/proc/self/maps").read_text())
        ctypes.CDLL(
            max(loaded, key=lambda path: re.search(r"torch[./]lib", path) is not None),
            ctypes.RTLD_GLOBAL,
        )
        functions = ctypes.CDLL(str(compiled()))
    except (OSError, ValueError):
        return None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        warnings.warn(
            f"{error.cmd[0]} could not compile the kernels, PyTorch's are used, which are slower: {said}",
            stacklevel=2,
        )
        return None
    for result, name, arguments in DECLARATION.findall(
        "".join(source.read_text() for source in SOURCES)
    ):
        function = getattr(functions, name)
        function.restype = ctypes.c_int if result == "int" else None
        function.argtypes = (
            [] if arguments == "void" else [c_type(argument) for argument in arguments.split(",")]
        )
    return functions


def c_type(declaration: str) -> type:
    """Of an argument: "const void *x", "long rows"."""
    return (
        ctypes.c_void_p if "*" in declaration else getattr(ctypes, f"c_{declaration.split()[-2]}")
    )


def compiled() -> Path:
    """The shared library for this machine. Raises OSError or CalledProcessError."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or not shutil.which(compiler[0]):
        raise OSError("no C compiler")
    processor = re.search(r"^(flags|Features).*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    recipe = [source.read_text() for source in SOURCES] + [
        processor.group() if processor else platform.processor(),
        *compiler,
        *COMPILE,
        *LINK,
    ]
    folder = FOLDER / "__pycache__"
    target = folder / f"kernels-{hashlib.sha256(''.join(recipe).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            sources = [source for source in SOURCES if source.suffix == ".c"]
            subprocess.run(
                [*compiler, *COMPILE, *sources], cwd=scratch, check=True, capture_output=True
            )
            objects, made = [f"{source.stem}.o" for source in sources], Path(scratch, target.name)
            subprocess.run(
                [*compiler, *LINK, *objects, "-o", made],
                cwd=scratch,
                check=True,
                capture_output=True,
            )
            made.replace(target)  # whole or not at all, however many processes start at once
    return target


def functions_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """`library()`, if these are what its functions take: contiguous, in bf16 or fp32, on a CPU."""
    for x in tensors:
        if not x.is_cpu or x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
            return None
    return None if torch.compiler.is_compiling() else library()


def tensor(x: Tensor) -> tuple[int, bool]:
    return x.data_ptr(), x.dtype == torch.bfloat16


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
