"""`stepflash bench`: how fast this model runs here, and what fraction of the machine's memory bandwidth that is.

`decode`, `prefill` and `mtp` run the engine in this process, `serve` puts load on any server with the OpenAI API.
Every rate is a median after a warm-up; the bandwidth is measured before and after, in the same run and with the
same threads, so that a busy machine shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from stepflash.errors import ConfigError
from stepflash.settings import DEFAULT_MODEL, KV_DTYPES

if TYPE_CHECKING:
    from stepflash.engine.llm import LLM
    from stepflash.tools.bench_measure import Samples

DECODE_CONTEXTS = (16, 2048)
DEPTHS: tuple[int | None, ...] = (0, 3, None)
_ENGINE = ("format", "device", "threads", "kv_dtype", "runs")
# What each subject can be told, and what holds where nothing is said.
OPTIONS = {
    "decode": (*_ENGINE, "context", "streams", "tokens"),
    "prefill": (*_ENGINE, "context", "streams"),
    "mtp": (*_ENGINE, "tokens", "prompt"),
    "serve": ("base_url", "api_key", "rate", "requests", "input_words", "tokens"),
}
DEFAULTS: dict[str, Any] = {
    "device": "cpu", "streams": 1, "tokens": 128, "runs": 5,
    "base_url": "http://127.0.0.1:8000/v1", "rate": 2.0, "requests": 32, "input_words": 128,
}  # fmt: skip
# What `mtp` asks a model with a chat template; random ids have no structure that a draft could catch. The first
# held-out prompt of every second or third task of nano: a small model has drafts only for what it knows.
PROMPTS = (
    "How much is 66+728?",
    "What is 7*672?",
    "Calculate 156/3.",
    "Eva has 41 tickets. Ida has 9 fewer. How many tickets does Ida have?",
    "Order these numbers from low to high: 2, 75, 54, 34",
    "Spell the word money.",
    "How often is r in dinner?",
    "Spell needle from the end.",
    "Repeat after me: trostimster mokstam numsak Leo",
    "What day of the week is 18 days before Sunday?",
    "Which date comes 13 days after July 28?",
    "What is the output of this Python code?\ndef f(x):\n    return x * 3\nprint(f(9))",
    "My name is Jack.",
    "What sound does a dog make?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepflash bench`."""
    parser.add_argument("subject", choices=[*SUBJECTS, "serve"], help="what to measure")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a folder, a .gguf file or a hub id ('nano'); for serve, the name that the server knows",
    )  # fmt: skip
    engine = parser.add_argument_group("decode, prefill and mtp: the engine in this process")
    engine.add_argument(
        "--format", metavar="F", help="pack the weights: bf16, fp8, int8, int4, int4_g128, ..."
    )
    engine.add_argument("--device", metavar="DEVICE", help="cpu (the default), cuda or cuda:N")
    engine.add_argument("--threads", type=int, metavar="N", help="(torch's own choice)")
    engine.add_argument(
        "--context", type=_numbers, metavar="N[,N...]", help="prompt tokens (16,2048; for prefill 2048)"
    )
    engine.add_argument("--kv-dtype", metavar="TYPE", help=f"of keys and values: {', '.join(KV_DTYPES)}")
    engine.add_argument("--streams", type=int, metavar="N", help=f"requests at once ({DEFAULTS['streams']})")
    engine.add_argument(
        "--tokens", type=int, metavar="N", help=f"to generate, for serve, too ({DEFAULTS['tokens']})"
    )
    engine.add_argument("--runs", type=int, metavar="N", help=f"counted runs ({DEFAULTS['runs']})")
    engine.add_argument(
        "--prompt", action="append", metavar="TEXT", help="for mtp, instead of the built-in ones"
    )
    server = parser.add_argument_group("serve: load on a server with the OpenAI API")
    server.add_argument("--base-url", metavar="URL", help=f"({DEFAULTS['base_url']})")
    server.add_argument("--api-key", metavar="KEY")
    server.add_argument("--rate", type=float, metavar="R", help=f"requests a second ({DEFAULTS['rate']:g})")
    server.add_argument("--requests", type=int, metavar="N", help=f"({DEFAULTS['requests']})")
    server.add_argument("--input-words", type=int, metavar="N", help=f"({DEFAULTS['input_words']})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 if every request to a server failed."""
    subject = options.subject
    for name in sorted(set(chain.from_iterable(OPTIONS.values()))):
        if getattr(options, name) is None:
            setattr(options, name, DEFAULTS.get(name))
        elif name not in OPTIONS[subject]:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing about {subject}")
    # The first token belongs to the prompt; the time of decoding is that of those behind it.
    for name, least in (("streams", 1), ("tokens", 2 if subject in ("decode", "mtp") else 1), ("runs", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.context is None:
        options.context = DECODE_CONTEXTS if subject == "decode" else DECODE_CONTEXTS[-1:]
    if min(options.context) < 1:
        raise ConfigError(f"--context must be at least 1, got {min(options.context)}")
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {options.threads}")
    report = _serve(options) if subject == "serve" else _engine(options)
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 1 if report.get("num_failed", 0) == report.get("num_requests", -1) else 0


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    """Load, measure the bandwidth, measure the subject, measure the bandwidth again."""
    import torch

    from stepflash.engine.llm import LLM
    from stepflash.kernels import build, ops
    from stepflash.tools.bench_measure import PeakMemory, weight_formats

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = options.model or DEFAULT_MODEL
    is_mtp = options.subject == "mtp"
    llm = LLM(
        model,
        device=options.device,
        quantization=options.format,
        kv_dtype=options.kv_dtype,
        max_num_seqs=options.streams,
        max_model_len=None if is_mtp else max(options.context) + options.tokens + 1,
        max_draft_depth=3 if is_mtp else 0,
        # Decode meets the same prompt in every run and need not read it again; prefill must.
        prefix_caching=options.subject == "decode",
    )
    memory = PeakMemory()
    memory.note()
    device = str(llm.core.cache.device)
    num_bytes = 512 << 20 if device == "cpu" else 4 << 30
    before = ops.measure_bandwidth(num_bytes, device=device)
    memory.forget()  # the buffer of that measurement is not the engine's
    measured = SUBJECTS[options.subject](llm, options, before)
    peak_rss_bytes = memory.note()
    return {
        "subject": options.subject,
        "model": model,
        "format": weight_formats(llm.model),
        "kv_dtype": str(llm.core.cache.limits.dtype).removeprefix("torch."),
        "kv_bytes_per_token": llm.stats().kv_bytes_per_token,
        "kv_window_bytes": llm.stats().kv_window_bytes,
        "threads": torch.get_num_threads(),
        "device": device,
        "kernels": (build.loaded_isa() or "reference") if device == "cpu" else "triton",
        "bandwidth": before,
        "bandwidth_after": ops.measure_bandwidth(num_bytes, device=device),
        **measured,
        "peak_rss_bytes": peak_rss_bytes,
    }


def _numbers(text: str) -> tuple[int, ...]:
    """ "1024,32768" as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several like 1024,32768") from None


def _decode(llm: LLM, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """After each context, against the bytes that a step reads; `ratio` is to the shortest."""
    from stepflash.tools.bench_measure import decode_rates, step_bytes

    contexts = sorted(set(options.context))
    found = decode_rates(llm, contexts, options.tokens, options.streams, options.runs)
    rows = []
    for context, rates in zip(contexts, found, strict=True):
        middle = context + options.tokens // 2
        needed = step_bytes(llm.model, middle, options.streams, llm.core.cache.limits.dtype)
        ceiling = bandwidth / needed.total * options.streams
        rows.append(
            {
                "context": context,
                "streams": options.streams,
                **_rates(rates),
                "ratio": rates.ratio_to(found[0]),
                "bytes_per_step": round(needed.total),
                "bytes_per_token": round(needed.total / options.streams),
                "kv_bytes_per_step": needed.kv,
                "bytes_per_second": needed.total * rates.median / options.streams,
                "ceiling_tokens_per_second": ceiling,
                "fraction_of_ceiling": rates.median / ceiling,
            }
        )
    return {"results": rows}


def _prefill(llm: LLM, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Each context in each of `--streams` prompts; compute-bound, so operations are counted and compared."""
    from stepflash.model.cost import flops_per_token
    from stepflash.tools.bench_measure import measure_gemm, prefill_rates, step_bytes

    gemm = measure_gemm()
    rows = []
    for context in sorted(set(options.context)):
        rates = prefill_rates(llm, context, options.streams, options.runs)
        flops = flops_per_token(llm.model.config, context // 2)
        # A step reads the weights once for all its tokens.
        chunk = min(llm.core.config.max_num_batched_tokens, context * options.streams)
        read = step_bytes(llm.model, 1, chunk, llm.core.cache.limits.dtype).weights / chunk
        rows.append(
            {
                "context": context,
                "streams": options.streams,
                **_rates(rates),
                "bytes_per_token": round(read),
                "fraction_of_ceiling": read * rates.median / bandwidth,
                "flops_per_second": flops * rates.median,
                "fraction_of_gemm": flops * rates.median / gemm,
            }
        )
    return {"gemm_flops_per_second": gemm, "results": rows}


def _mtp(llm: LLM, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """The same prompts without drafts, with three, and adapting; answers must not depend on it."""
    from stepflash.tools.bench_measure import (
        random_prompts,
        speculation_bytes_per_token,
        speculation_rates,
    )

    if not llm.core.num_modules:
        raise ConfigError(f"{options.model or DEFAULT_MODEL} has no prediction modules; mtp needs them")
    prompts: Sequence[Sequence[int]]
    if llm.chat_template is not None and llm.tokenizer is not None:
        template, tokenizer = llm.chat_template, llm.tokenizer
        texts = options.prompt or PROMPTS
        prompts = [
            tokenizer.encode(template.render([{"role": "user", "content": text}]).text) for text in texts
        ]
    elif options.prompt:
        raise ConfigError("--prompt needs a model with a tokenizer and a chat template")
    else:
        prompts = random_prompts(llm.core.sampler.vocab_limit, DECODE_CONTEXTS[0], len(PROMPTS))
    found, is_identical = speculation_rates(llm, prompts, DEPTHS, options.tokens, options.runs)
    middle = sum(map(len, prompts)) // len(prompts) + options.tokens // 2
    kv_dtype = llm.core.cache.limits.dtype
    rows = []
    for one in found:
        read = speculation_bytes_per_token(llm.model, one, middle, kv_dtype)
        rows.append(
            {
                "draft_depth": "adaptive" if one.draft_depth is None else one.draft_depth,
                **_rates(one.rates),
                "ratio": one.rates.ratio_to(found[0].rates),
                "acceptance": list(one.acceptance),
                "tokens_per_step": one.tokens_per_step,
                "steps_by_depth": list(one.steps),
                "bytes_per_token": round(read),
                "bytes_per_second": read * one.rates.median,
                "fraction_of_ceiling": read * one.rates.median / bandwidth,
            }
        )
    return {"results": rows, "answers_identical": is_identical}


def _serve(options: argparse.Namespace) -> dict[str, Any]:
    import asyncio

    from stepflash.tools.bench_serve import Load, run_load

    load = Load(
        rate=options.rate,
        num_requests=options.requests,
        input_words=options.input_words,
        max_tokens=options.tokens,
    )
    report = asyncio.run(run_load(options.base_url, load, model=options.model, api_key=options.api_key))
    return {"subject": "serve", "base_url": options.base_url, "rate": options.rate, **report.to_json()}


SUBJECTS: dict[str, Callable[[LLM, argparse.Namespace, float], dict[str, Any]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "mtp": _mtp,
}


def _rates(rates: Samples) -> dict[str, Any]:
    return {"tokens_per_second": rates.median, "samples": [round(value, 2) for value in rates.values]}


def _print(report: Mapping[str, Any]) -> None:
    """The report as a table of what was measured and a line about the machine."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if report["subject"] == "serve":
        rows = _serve_rows(report)
        title = f"{report['base_url']} at {report['rate']:g} requests a second"
    else:
        rows = [_row(row) for row in report["results"]]
        title = f"{report['subject']}: {report['model']}, {report['format']}, {report['threads']} threads"
    console.print(title, style="bold")
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    if report["subject"] == "serve":
        console.print(
            f"{report['num_requests'] - report['num_failed']} of {report['num_requests']} answered; "
            f"{report['output_rate']:.1f} tok/s out, {report['prompt_rate']:.1f} tok/s in"
        )
        for error in report["errors"]:
            console.print(error, style="red", markup=False)
        return
    if not report.get("answers_identical", True):
        console.print("answers differ between depths", style="red")
    low, high = sorted((report["bandwidth"] / 1e9, report["bandwidth_after"] / 1e9))
    console.print(
        f"{report['kernels']} kernels; memory reads {low:.1f} to {high:.1f} GB/s; "
        f"peak memory {report['peak_rss_bytes'] / 2**30:.2f} GiB"
    )


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    """One result as texts, with the columns that its subject has."""
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "draft_depth": ("depth", str),
        "context": ("context", str),
        "streams": ("streams", str),
        "tokens_per_second": ("tok/s", "{:.1f}".format),
        "ratio": ("ratio", "{:.2f}".format),
        "acceptance": ("accepted", lambda values: _join(f"{value:.0%}" for value in values)),
        "tokens_per_step": ("tokens a step", "{:.2f}".format),
        "bytes_per_token": ("MB a token", lambda value: f"{value / 1e6:.1f}"),
        "bytes_per_second": ("GB/s", lambda value: f"{value / 1e9:.1f}"),
        "fraction_of_ceiling": ("of ceiling", "{:.2f}".format),
        "flops_per_second": ("GFLOP/s", lambda value: f"{value / 1e9:.0f}"),
        "fraction_of_gemm": ("of GEMM", "{:.2f}".format),
    }
    return {title: show(row[key]) for key, (title, show) in shown.items() if key in row}


def _serve_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    names = {"time_to_first_token": "first token", "time_per_token": "per token", "latency": "whole answer"}
    return [
        {"time": title}
        | {p: f"{report[key][p] * 1000:.0f} ms" if p in report[key] else "-" for p in ("p50", "p90", "p99")}
        for key, title in names.items()
    ]


def _join(values: Iterable[str]) -> str:
    return " ".join(values) or "-"
