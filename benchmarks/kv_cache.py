"""What keys and values in fewer bits cost: `python benchmarks/kv_cache.py [MODEL]`.

Weights stay in float32, so that the cache alone differs. Two measurements, through the engine:

- held-out texts are dictated to the model token by token, and what it would have said at each place is compared
  with what it says over a float32 cache: Kullback-Leibler divergence in nats a token and agreement of the best token;
- greedy answers to held-out prompts are judged exactly, task by task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stepflash.engine.llm import LLM
from stepflash.engine.request import Request, SamplingParams
from stepflash.nano.evaluate import evaluate, summary
from stepflash.nano.tasks import TASKS, completion, held_out, prompt_text

KV_DTYPES = ("float32", "bfloat16", "int8")
TEXT_TOKENS = 1000


class Dictation:
    """Allows the text and nothing else. Never says that it is forced: then the model would not be asked."""

    def __init__(self, token_ids: Sequence[int], start: int) -> None:
        self.token_ids, self.at = token_ids, start

    def mask(self) -> list[int]:
        return [self.token_ids[min(self.at, len(self.token_ids) - 1)]]

    def accept(self, token_id: int) -> None:
        self.at += 1

    def rollback(self, num_tokens: int) -> None:
        self.at -= num_tokens

    def forced(self) -> list[int]:
        return []


def texts(llm: LLM, count: int) -> list[list[int]]:
    """`count` texts of about a thousand tokens: held-out prompts of all tasks with their answers, end to end."""
    assert llm.tokenizer is not None
    names = sorted(TASKS)
    found = []
    for number in range(count):
        words, token_ids = "", []
        for place in range(len(names)):
            task = names[(number + 7 * place) % len(names)]
            examples = held_out(task, number + 1, "easy")
            example = examples[number % len(examples)]
            words += prompt_text(example) + completion(example.messages[-1])
            token_ids = llm.tokenizer.encode(words)
            if len(token_ids) >= TEXT_TOKENS:
                break
        found.append(token_ids[:TEXT_TOKENS])
    return found


def dictate(llm: LLM, documents: Sequence[list[int]]) -> Tensor:
    """Log-probabilities [num_tokens, vocab_size] of everything after the first 16 tokens of each text."""
    core, start = llm.core, 16
    rows: dict[tuple[int, int], Tensor] = {}
    seeds = {}
    choose = core.sampler.choose

    def record(logits: Tensor, chosen: Sequence[Any], *rest: Any) -> Any:
        for row, line in zip(chosen, logits, strict=True):
            rows[seeds[row.state.seed], row.position] = line[: core.sampler.vocab_limit].log_softmax(-1)
        return choose(logits, chosen, *rest)

    core.sampler.choose = record  # type: ignore[method-assign]
    for number, token_ids in enumerate(documents):
        seeds[number] = number
        sampling = SamplingParams(
            max_tokens=len(token_ids) - start, temperature=0.0, seed=number, ignore_eos=True, draft_depth=0
        )
        core.add(
            Request(
                request_id=str(number),
                prompt_token_ids=tuple(token_ids[:start]),
                sampling=sampling,
                constraint=Dictation(token_ids, start),
            )
        )
    while core.has_work:
        core.step()
    core.sampler.choose = choose  # type: ignore[method-assign]
    return torch.stack([rows[key] for key in sorted(rows)])


def measure(
    model: str, kv_dtype: str, num_texts: int, count: int, reference: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    llm = LLM(
        model,
        dtype="float32",
        kv_dtype=kv_dtype,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        max_model_len=2048,
        prefix_caching=False,
    )
    logprobs = dictate(llm, texts(llm, num_texts))
    results = evaluate(llm, sorted(TASKS), count, ("easy",))
    accuracy, accepted = summary(results, "easy")
    row: dict[str, Any] = {
        "kv_dtype": kv_dtype,
        "kv_bytes_per_token": llm.stats().kv_bytes_per_token,
        "kv_window_bytes": llm.stats().kv_window_bytes,
        "num_tokens": len(logprobs),
        "accuracy": accuracy,
        "num_prompts": sum(result.num_items for result in results),
        "accepted_drafts_per_step": accepted,
    }
    if reference is not None:
        kl = (reference.exp() * (reference - logprobs)).sum(-1).clamp(min=0)
        same = reference.argmax(-1) == logprobs.argmax(-1)
        row |= {
            "mean_kl": float(kl.mean()),
            "median_kl": float(kl.median()),
            "max_kl": float(kl.max()),
            "top1_agreement": float(same.float().mean()),
        }
    return row, logprobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--texts", type=int, default=16, help="of a thousand tokens (%(default)s)")
    parser.add_argument("--count", type=int, default=20, help="prompts a task (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    reference: Tensor | None = None
    rows = []
    for kv_dtype in KV_DTYPES:
        row, logprobs = measure(options.model, kv_dtype, options.texts, options.count, reference)
        reference = logprobs if reference is None else reference
        rows.append(row)
    if options.json:
        print(json.dumps({"model": options.model, "results": rows}))
        return
    table = Table(title=f"{options.model}: keys and values in fewer bits")
    for name in rows[-1]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        values = [row.get(name, 0.0) for name in rows[-1]]
        table.add_row(*(f"{v:.6f}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)


if __name__ == "__main__":
    main()
