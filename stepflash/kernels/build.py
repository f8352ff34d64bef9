"""Compiles the C++ kernels with the system compiler and loads them, once per machine.

The shared library lies in a cache folder under a name that hashes sources, flags, compiler and torch version,
so a stale one is never loaded. Only `bindings.cpp` and `network_class.cpp` see torch's headers; the kernels are
plain C++, compiled once per instruction set (`--all` for every one, else the best of this machine), and chosen
again at run time by cpuid. Without a compiler, or with STEPFLASH_NATIVE=0, the PyTorch references run; that is
said once.

    python -m stepflash.kernels.build [--all]
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "csrc"
_BASE_FLAGS = ("-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-g0")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"),
}
_ISA_NEEDS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    "avx512_bf16": frozenset({"avx512f", "avx512_vnni", "avx512_bf16", "avx512vbmi"}),
}
_TORCH_SOURCES = ("bindings.cpp", "network_class.cpp")
_SHARED_SOURCES = (*_TORCH_SOURCES, "dispatch.cpp", "pool.cpp")
_load_lock = threading.Lock()
_loaded: bool | None = None


class BuildError(RuntimeError):
    """The compiler failed; the message holds its command and the first lines of its output."""


def machine_isas() -> tuple[str, ...]:
    """Instruction sets of this machine that have kernels, weakest first; empty where none has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ("avx2",)
    flags = next(
        (set(line.split(":", 1)[1].split()) for line in text.splitlines() if line.startswith("flags")), set()
    )
    return tuple(isa for isa, needs in _ISA_NEEDS.items() if needs <= flags)


def cache_dir() -> Path:
    """Where libraries are kept: STEPFLASH_CACHE, else the user's cache folder."""
    root = os.environ.get("STEPFLASH_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "stepflash")
    return Path(root) / "kernels"


def find_compiler() -> str | None:
    """CXX, g++ or clang++, whichever comes first."""
    candidates = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def library_path(isas: tuple[str, ...], compiler: str) -> Path:
    """The file for these sources, flags, compiler and torch; it need not exist yet."""
    digest = hashlib.sha256()
    for source in sorted(SOURCE_DIR.glob("*")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()[:1]
    digest.update(
        repr((_BASE_FLAGS, ISA_FLAGS, isas, version, torch.__version__, platform.machine())).encode()
    )
    return cache_dir() / f"stepflash-{digest.hexdigest()[:16]}.so"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = "\n".join((done.stderr or done.stdout).splitlines()[:30])
        raise BuildError(f"the compiler failed ({done.returncode}): {' '.join(command)}\n{output}")


def _compile(isas: tuple[str, ...], compiler: str, target: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    include = [f"-I{torch_dir / 'include'}", f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        jobs: list[list[str]] = []
        objects: list[str] = []

        def add(source: str, name: str, *flags: str) -> None:
            objects.append(os.path.join(folder, name + ".o"))
            jobs.append([compiler, *flags, "-c", str(SOURCE_DIR / source), "-o", objects[-1]])

        have = [f"-DSF_HAVE_{isa.upper()}" for isa in isas]
        for name in _TORCH_SOURCES:
            add(name, Path(name).stem, "-std=c++20", "-O1", "-fPIC", "-w", abi, *include)
        add("dispatch.cpp", "dispatch", "-std=c++17", *_BASE_FLAGS, *have)
        add("pool.cpp", "pool", "-std=c++17", *_BASE_FLAGS)
        for isa in isas:
            for source in sorted(SOURCE_DIR.glob("*.cpp")):
                if source.name not in _SHARED_SOURCES:
                    flags = ("-std=c++17", *_BASE_FLAGS, *ISA_FLAGS[isa], f"-DSF_ISA={isa}")
                    add(source.name, f"{source.stem}-{isa}", *flags)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, jobs))
        library = os.path.join(folder, "library.so")
        torch_lib = torch_dir / "lib"
        links = [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", "-pthread"]
        _run([compiler, "-shared", "-o", library, *objects, *links])
        os.replace(library, target)  # atomic: another process sees the whole library or none


def build(all_isas: bool = False) -> Path:
    """The compiled library, built now if it is not in the cache; safe to call from many processes at once.

    Raises:
        BuildError: no compiler, no supported instruction set, or the compiler failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    supported = machine_isas()
    isas = tuple(ISA_FLAGS) if all_isas else supported[-1:]
    if not isas:
        raise BuildError(f"no kernels for this processor ({platform.machine()}); they need x86-64 with AVX2")
    target = library_path(isas, compiler)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system even if this process dies
        if not target.exists():
            log.info("compiling kernels for %s (once)", ", ".join(isas))
            _compile(isas, compiler, target)
    return target


def load() -> bool:
    """Loads the kernels if they can be had and says whether it did; tries once per process, never raises."""
    global _loaded
    with _load_lock:
        if _loaded is None:
            _loaded = False
            if os.environ.get("STEPFLASH_NATIVE") == "0":
                return False
            try:
                library = build(all_isas="STEPFLASH_ISA" in os.environ)
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
                _loaded = True
            except (BuildError, OSError) as error:
                log.warning("native kernels are off, the slower PyTorch references run instead: %s", error)
        return _loaded


def loaded_isa() -> str | None:
    """The instruction set that the loaded kernels use, None when the references run."""
    if not load():
        return None
    function = ctypes.CDLL(str(build(all_isas="STEPFLASH_ISA" in os.environ))).stepflash_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stepflash.kernels.build", description="Compile the CPU kernels."
    )
    parser.add_argument(
        "--all", action="store_true", help="every instruction set, not only this machine's best"
    )
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        path = build(all_isas=arguments.all)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
