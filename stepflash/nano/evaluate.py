"""How good is nano: `python -m stepflash.nano.evaluate [MODEL]`.

Greedy answers to held-out prompts that training never draws, judged exactly, task by task, and how many drafts of the
prediction modules a step accepts. Every assistant step of a tool loop is one item, after the right history.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stepflash.engine.llm import LLM, RequestOutput
from stepflash.engine.request import SamplingParams
from stepflash.nano.tasks import TASKS, Example, check, held_out, prompt_text, turns
from stepflash.nano.tasks.example import Tier

MAX_ANSWER_TOKENS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One task of one tier. `accepted[k]` of `drafted[k]` drafts of MTP module k + 1 were right."""

    task: str
    tier: Tier
    num_items: int
    num_correct: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_items if self.num_items else 0.0

    @property
    def accepted_per_step(self) -> float:
        return sum(self.accepted) / self.drafted[0] if self.drafted and self.drafted[0] else 0.0


def evaluate(
    llm: LLM, tasks: Sequence[str], count: int, tiers: Sequence[Tier], depth: int = 3
) -> list[TaskResult]:
    """Exact match of greedy answers to `count` held-out prompts per task and tier."""
    groups: list[tuple[str, Tier, list[Example]]] = []
    for tier in tiers:
        for task in tasks:
            items = [item for example in held_out(task, count, tier) for item in turns(example)]
            groups.append((task, tier, items))
    prompts = [prompt_text(item) for _, _, items in groups for item in items]
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS, draft_depth=depth)
    outputs = iter(llm.generate(prompts, sampling))
    return [_judge(task, tier, items, [next(outputs) for _ in items]) for task, tier, items in groups]


def _judge(task: str, tier: Tier, items: Sequence[Example], outputs: Sequence[RequestOutput]) -> TaskResult:
    correct = sum(check(item, output.text) for item, output in zip(items, outputs, strict=True))
    return TaskResult(
        task=task,
        tier=tier,
        num_items=len(items),
        num_correct=correct,
        drafted=_total(output.stats.num_drafted_tokens for output in outputs),
        accepted=_total(output.stats.num_accepted_tokens for output in outputs),
    )


def _total(counts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*counts, strict=True))


def summary(results: Sequence[TaskResult], tier: Tier) -> tuple[float, float]:
    """(mean exact match over the tasks, accepted drafts a step over all items) of one tier."""
    chosen = [result for result in results if result.tier == tier and result.num_items]
    accuracy = sum(result.accuracy for result in chosen) / len(chosen) if chosen else 0.0
    steps = sum(result.drafted[0] for result in chosen)
    return accuracy, sum(sum(result.accepted) for result in chosen) / steps if steps else 0.0


def accuracy_by_tier(model: str | Path, count: int) -> dict[str, dict[str, float]]:
    """By tier: `exact` and `accepted` as `summary` gives them over all tasks, and the number of `items`."""
    results = evaluate(_open(model), list(TASKS), count, ("easy", "hard"))
    found: dict[str, dict[str, float]] = {}
    for tier in sorted({result.tier for result in results}):
        exact, accepted = summary(results, tier)
        items = sum(result.num_items for result in results if result.tier == tier)
        found[tier] = {"items": items, "exact": round(exact, 4), "accepted": round(accepted, 3)}
    return found


def _open(model: str | Path) -> LLM:
    return LLM(model, max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=2048)


def to_table(results: Sequence[TaskResult]) -> Table:
    table = Table(title="held-out exact match, greedy")
    for name, justify in (("task", "left"), ("tier", "left"), ("exact", "right"), ("items", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("accepted drafts a step", justify="right")
    for r in results:
        table.add_row(r.task, r.tier, f"{r.accuracy:.2f}", str(r.num_items), f"{r.accepted_per_step:.2f}")
    for tier in sorted({r.tier for r in results}):
        accuracy, accepted = summary(results, tier)
        table.add_row(f"mean, {tier}", "", f"{accuracy:.3f}", "", f"{accepted:.2f}", style="bold")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stepflash.nano.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument(
        "--count", type=int, default=100, help="prompts per task and tier (default: %(default)s)"
    )
    parser.add_argument(
        "--task", action="append", choices=sorted(TASKS), help="only this one; may be repeated"
    )
    parser.add_argument("--tier", choices=("easy", "hard", "both"), default="both")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args(arguments)
    tiers: tuple[Tier, ...] = ("easy", "hard") if options.tier == "both" else (options.tier,)
    results = evaluate(_open(options.model), options.task or list(TASKS), options.count, tiers)
    Console().print(to_table(results))
    if options.json:
        rows = [
            asdict(r) | {"accuracy": r.accuracy, "accepted_per_step": r.accepted_per_step} for r in results
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
