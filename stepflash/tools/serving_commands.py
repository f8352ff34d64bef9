"""The command that runs a plan, for each engine that can.

Flags of vLLM, SGLang and llama.cpp are those that the model's own README gives, with sizes from the plan. None
of these commands has been run by the authors of stepflash on the full model, and each says so.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from stepflash.tools.hardware import Machine
from stepflash.tools.plan import Plan, Request
from stepflash.tools.weight_formats import FORMATS

RELEASED = "stepfun-ai/Step-3.5-Flash"
RELEASED_FP8 = "stepfun-ai/Step-3.5-Flash-FP8"
GGUF_FILE = {"q4_k_s": "step3.5_flash_Q4_K_S.gguf", "q8_0": "step3.5_flash_Q8_0.gguf"}
PARSERS = ["--reasoning-parser", "step3p5", "--tool-call-parser", "step3p5"]
NOT_VERIFIED = "from the model's README; not run here on the full model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    engine: str
    line: str
    note: str


def commands(plan: Plan, machine: Machine, request: Request, model: str | None = None) -> list[Command]:
    """Commands for the engines of the plan's format; `model` replaces the released checkpoint's name."""
    engines = FORMATS[plan.format].engines
    found = []
    if machine.kind == "gpu" and "vllm" in engines:
        found += [_vllm(plan, request, model), _sglang(plan, request, model)]
    if "llama.cpp" in engines:
        found.append(_llama_cpp(plan, request, model))
    # NOTE: stepflash runs one device, and its fast kernels are for x86-64 processors.
    if machine.kind == "cpu" or machine.count == 1:
        found.append(_stepflash(plan, machine, request, model))
    return found


def _checkpoint(plan: Plan, model: str | None) -> str:
    return model or (RELEASED_FP8 if plan.format == "fp8" else RELEASED)


def _vllm(plan: Plan, request: Request, model: str | None) -> Command:
    words = ["vllm", "serve", _checkpoint(plan, model), "--served-model-name", "step3p5-flash"]
    words += ["--tensor-parallel-size", str(plan.split.count)]
    if plan.split.kind == "expert":
        words.append("--enable-expert-parallel")
    words += ["--max-model-len", str(request.context), "--max-num-seqs", str(request.streams)]
    if request.kv_dtype != "bfloat16":
        words += ["--kv-cache-dtype", "fp8"]
    words += ["--disable-cascade-attn", "--enable-auto-tool-choice", *PARSERS]
    note = NOT_VERIFIED
    if request.with_mtp:
        words += ["--hf-overrides", '{"num_nextn_predict_layers": 1}']
        words += ["--speculative_config", '{"method": "step3p5_mtp", "num_speculative_tokens": 1}']
        note += "; one draft only"
    words.append("--trust-remote-code")
    if plan.format == "fp8":
        words += ["--quantization", "fp8"]
    return Command(engine="vllm", line=shlex.join(words), note=note)


def _sglang(plan: Plan, request: Request, model: str | None) -> Command:
    words = [
        "sglang",
        "serve",
        "--model-path",
        _checkpoint(plan, model),
        "--served-model-name",
        "step3p5-flash",
    ]
    words += ["--tp-size", str(plan.split.count)]
    if plan.split.kind == "expert":
        words += ["--ep-size", str(plan.split.count)]
    words += [
        "--context-length",
        str(request.context),
        "--max-running-requests",
        str(request.streams),
        *PARSERS,
    ]
    if request.with_mtp:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"]
        words.append("--enable-multi-layer-eagle")
    if request.kv_dtype != "bfloat16":
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    line = "SGLANG_ENABLE_SPEC_V2=1 " + shlex.join(words)
    return Command(engine="sglang", line=line, note=NOT_VERIFIED)


def _llama_cpp(plan: Plan, request: Request, model: str | None) -> Command:
    words = ["llama-server", "-m", model or GGUF_FILE.get(plan.format, "MODEL.gguf")]
    words += ["-c", str(request.context * request.streams), "-np", str(request.streams)]
    words += ["-b", "2048", "-ub", "2048", "-fa", "on", "--jinja"]
    if request.kv_dtype != "bfloat16":
        words += ["-ctk", "q8_0", "-ctv", "q8_0"]
    note = f"{NOT_VERIFIED}; drafting needs a file with the prediction modules and a build that runs them"
    return Command(engine="llama.cpp", line=shlex.join(words), note=note)


def _stepflash(plan: Plan, machine: Machine, request: Request, model: str | None) -> Command:
    name = model or (GGUF_FILE.get(plan.format) or _checkpoint(plan, model))
    first = ""
    if plan.format.startswith("int"):
        packed = f"step-3.5-flash-{plan.format}"
        first = shlex.join(["stepflash", "quantize", name, packed, "--format", plan.format]) + " && "
        name = packed
    cache_gib = math.ceil(10 * plan.kv_bytes / 2**30) / 10
    words = ["stepflash", "serve", name, "--max-num-seqs", str(request.streams)]
    words += ["--kv-cache-gb", f"{cache_gib:g}"]
    note = "run here with small models only"
    if machine.kind != "cpu":
        note += "; computes on the processor of this machine, the ceilings assume its full bandwidth"
    return Command(engine="stepflash", line=first + shlex.join(words), note=note)
