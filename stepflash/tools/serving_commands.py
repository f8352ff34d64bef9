"""The command that runs a plan, for each engine that can.

Flags of vLLM, SGLang and llama.cpp are those that the model's own README gives, with sizes from the plan. None
of these commands has been run by the authors of stepflash on the full model, and each says so.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import PurePath

from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from stepflash.tools.hardware import Machine
from stepflash.tools.plan import Plan, Request
from stepflash.tools.weight_formats import EDGE, FORMATS

RELEASED = "stepfun-ai/Step-3.5-Flash"
RELEASED_FP8 = "stepfun-ai/Step-3.5-Flash-FP8"
GGUF_FILE = {"q4_k_s": "step3.5_flash_Q4_K_S.gguf", "q8_0": "step3.5_flash_Q8_0.gguf"}
PARSERS = ["--reasoning-parser", "step3p5", "--tool-call-parser", "step3p5"]
NOT_VERIFIED = "from the model's README; not run here on the full model"
NO_DRAFTS = "; layers one after the other: without drafts, which its pipelines do not take"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    engine: str
    line: str
    note: str


def commands(
    config: ModelConfig, plan: Plan, machine: Machine, request: Request, model: str | None = None
) -> list[Command]:
    """Commands for the engines of the plan's format; `model` replaces the released checkpoint's name."""
    engines = FORMATS[plan.format].engines
    found = []
    if machine.kind == "gpu" and "vllm" in engines:
        found += [_vllm(plan, request, model), _sglang(plan, request, model)]
    if "llama.cpp" in engines:
        found.append(_llama_cpp(plan, request, model))
    # NOTE: stepflash runs one device, and its fast kernels are for x86-64 processors.
    if machine.kind == "cpu" or machine.count == 1:
        found.append(_stepflash(config, plan, machine, request, model))
    return found


def engine_cache_bytes(config: ModelConfig, request: Request) -> int:
    """The budget, to a MiB, with which stepflash's own cache holds all streams at full length.

    More than the plan's keys and values: the engine cuts them into blocks, keeps windows for a step's prefill, and
    gives a share of the rest to cached windows. So its own arithmetic is asked, by bisection.
    """
    import torch

    from stepflash.engine.core import EngineConfig
    from stepflash.engine.kv_cache import LOOKAHEAD_SLOTS, CacheLimits, plan_blocks

    engine = EngineConfig(max_num_seqs=request.streams)
    num_modules = config.num_mtp_layers if request.with_mtp else 0
    limits = CacheLimits(
        block_size=engine.block_size,
        max_num_seqs=request.streams,
        max_model_len=request.context,
        max_batched_tokens=max(engine.max_num_batched_tokens, request.streams * (1 + num_modules)),
        max_deferred_tokens=engine.max_deferred_tokens,
        num_modules=num_modules,
        dtype=torch.bfloat16 if request.kv_dtype == "bfloat16" else torch.int8,
    )
    wanted = request.streams * -(-(request.context + LOOKAHEAD_SLOTS) // engine.block_size)

    def holds_all(budget: int) -> bool:
        try:
            return plan_blocks(config, limits, budget)[0] >= wanted
        except ConfigError:
            return False

    low, high = 0, 1
    while not holds_all(high << 20):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds_all(middle << 20) else (middle, high)
    return high << 20


def _checkpoint(plan: Plan, model: str | None) -> str:
    return model or (RELEASED_FP8 if plan.format == "fp8" else RELEASED)


def _vllm(plan: Plan, request: Request, model: str | None) -> Command:
    words = ["vllm", "serve", _checkpoint(plan, model), "--served-model-name", "step3p5-flash"]
    in_turn = plan.split.kind == "layers"
    words += [f"--{'pipeline' if in_turn else 'tensor'}-parallel-size", str(plan.split.count)]
    if plan.split.kind == "expert":
        words.append("--enable-expert-parallel")
    words += ["--max-model-len", str(request.context), "--max-num-seqs", str(request.streams)]
    if request.kv_dtype != "bfloat16":
        words += ["--kv-cache-dtype", "fp8"]
    words += ["--disable-cascade-attn", "--enable-auto-tool-choice", *PARSERS]
    note = NOT_VERIFIED
    if in_turn:
        note += NO_DRAFTS
    elif request.with_mtp:
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
    in_turn = plan.split.kind == "layers"
    words += ["--pp-size" if in_turn else "--tp-size", str(plan.split.count)]
    if plan.split.kind == "expert":
        words += ["--ep-size", str(plan.split.count)]
    words += [
        "--context-length",
        str(request.context),
        "--max-running-requests",
        str(request.streams),
        *PARSERS,
    ]
    note = NOT_VERIFIED
    is_drafting = request.with_mtp and not in_turn
    if in_turn:
        note += NO_DRAFTS
    if is_drafting:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"]
        words.append("--enable-multi-layer-eagle")
    if request.kv_dtype != "bfloat16":
        words += ["--kv-cache-dtype", "fp8_e4m3"]
    line = "SGLANG_ENABLE_SPEC_V2=1 " * is_drafting + shlex.join(words)
    return Command(engine="sglang", line=line, note=note)


def _llama_cpp(plan: Plan, request: Request, model: str | None) -> Command:
    first, file = _gguf_file(plan, request, model)
    words = ["llama-server", "-m", file]
    words += ["-c", str(request.context * request.streams), "-np", str(request.streams)]
    words += ["-b", "2048", "-ub", "2048", "-fa", "on", "--jinja"]
    if request.kv_dtype != "bfloat16":
        words += ["-ctk", "q8_0", "-ctv", "q8_0"]
    note = f"{NOT_VERIFIED}; it drafts only in builds that run the prediction modules"
    return Command(engine="llama.cpp", line=first + shlex.join(words), note=note)


def _gguf_file(plan: Plan, request: Request, model: str | None) -> tuple[str, str]:
    """(a command that makes it, if need be; its name). The released files have no prediction modules."""
    if model is not None and model.endswith(".gguf"):
        return "", model
    if model is None and not request.with_mtp:
        return "", GGUF_FILE[plan.format]
    source = model or RELEASED
    file = f"{PurePath(source).name.lower()}-{plan.format}.gguf"
    words = ["stepflash", "convert", source, file, "--to", "gguf", "--type", plan.format]
    words += [] if request.with_mtp else ["--mtp", "drop"]
    return shlex.join(words) + " && ", file


def _stepflash(
    config: ModelConfig, plan: Plan, machine: Machine, request: Request, model: str | None
) -> Command:
    first, name = "", _checkpoint(plan, model)
    if plan.format in GGUF_FILE:
        first, name = _gguf_file(plan, request, model)
    elif plan.format.startswith("int"):
        packed = f"{PurePath(name).name.lower()}-{plan.format}"
        words = ["stepflash", "quantize", name, packed, "--format", plan.format, "--edge", EDGE]
        first = shlex.join(words) + " && "
        name = packed
    wanted = engine_cache_bytes(config, request)
    room = machine.usable_bytes - plan.weight_bytes - plan.mtp_bytes
    cache_gib = math.ceil(10 * wanted / 2**30) / 10 if wanted <= room else math.floor(10 * room / 2**30) / 10
    words = ["stepflash", "serve", name, "--max-num-seqs", str(request.streams)]
    words += ["--max-model-len", str(request.context), "--kv-cache-gb", f"{cache_gib:g}"]
    if request.kv_dtype != "bfloat16":
        words += ["--kv-dtype", "int8"]
    note = "run here with small models only"
    if wanted > room:
        note += (
            f"; its cache keeps a quarter for windows of cached prefixes: all {request.context:,} tokens would need "
            f"{wanted / 2**30:.1f} GiB, so shorten the context or choose a smaller format"
        )
    if machine.kind != "cpu":
        note += "; computes on the processor of this machine, the ceilings assume its full bandwidth"
    return Command(engine="stepflash", line=first + shlex.join(words), note=note)
