"""One engine on the mini checkpoint, timed on request; peers.py runs one of these in each environment.

    python benchmarks/peer_worker.py stepflash|vllm|transformers MODEL FORMAT THREADS

Prints "ready" when the model is loaded. Every line "STREAMS CONTEXT TOKENS" on standard input is a round: CONTEXT
random prompt tokens in each of STREAMS requests, then TOKENS more tokens greedily, all requests together. It answers
with one line {"prefill_seconds": ..., "decode_seconds": ...}. Engines are imported inside their functions, since
each environment has only one of them. Standard output belongs to the protocol; engines that print do so elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable

Prompts = list[list[int]]
Round = Callable[[Prompts, int], tuple[float, float]]  # prompts, tokens -> seconds of prefill, of decode
VOCAB_SIZE, MAX_STREAMS, MAX_CONTEXT = 32768, 16, 4096


def stepflash(model: str, weight_format: str, threads: int) -> Round:
    import torch

    from stepflash import LLM, SamplingParams

    torch.set_num_threads(threads)
    llm = LLM(
        model, quantization=weight_format, tokenizer=None, max_num_seqs=MAX_STREAMS, max_model_len=MAX_CONTEXT,
        max_draft_depth=0, prefix_caching=False, kv_cache_bytes=1 << 30,
    )  # fmt: skip

    def run(prompts: Prompts, tokens: int) -> tuple[float, float]:
        sampling = SamplingParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True, draft_depth=0)
        stats = [output.stats for output in llm.generate(prompts, sampling, progress=False)]
        return max(s.queue_seconds + s.prefill_seconds for s in stats), max(s.decode_seconds for s in stats)

    return run


def vllm(model: str, weight_format: str, threads: int) -> Round:
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}")
    os.environ.update(
        OMP_NUM_THREADS=str(threads), VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR"
    )
    from vllm import LLM, SamplingParams

    route_by_sigmoid()
    llm = LLM(
        model, dtype=weight_format, enforce_eager=False, enable_prefix_caching=False, max_num_seqs=MAX_STREAMS,
        max_model_len=MAX_CONTEXT, skip_tokenizer_init=True,
    )  # fmt: skip

    def seconds(prompts: Prompts, tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - start

    def run(prompts: Prompts, tokens: int) -> tuple[float, float]:
        prefill = seconds(prompts, 1)
        return prefill, seconds(prompts, tokens + 1) - prefill

    return run


def route_by_sigmoid() -> None:
    """vLLM's router for the CPU refuses sigmoid scores, except in groups; one group is the same function."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    plain = CPURouter.__init__

    def in_one_group(self: CPURouter, *args: object, **options: object) -> None:
        if options.get("scoring_func") == "sigmoid" and not options.get("use_grouped_topk"):
            options |= {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
        plain(self, *args, **options)

    CPURouter.__init__ = in_one_group


def transformers(model: str, weight_format: str, threads: int) -> Round:
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(threads)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, weight_format)).eval()

    @torch.inference_mode()
    def run(prompts: Prompts, tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        output = network(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(tokens):
            best = output.logits[:, -1:].argmax(-1)
            output = network(input_ids=best, past_key_values=output.past_key_values, use_cache=True)
        return middle - start, time.perf_counter() - middle

    return run


def main() -> None:
    engine, model, weight_format, threads = sys.argv[1:]
    # Whatever an engine prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = {"stepflash": stepflash, "vllm": vllm, "transformers": transformers}[engine](
        model, weight_format, int(threads)
    )
    print("ready", file=answers)
    for seed, line in enumerate(sys.stdin):
        streams, context, tokens = map(int, line.split())
        rng = random.Random(seed)
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(context)] for _ in range(streams)]
        prefill, decode = run(prompts, tokens)
        print(json.dumps({"prefill_seconds": prefill, "decode_seconds": decode}), file=answers)


if __name__ == "__main__":
    main()
