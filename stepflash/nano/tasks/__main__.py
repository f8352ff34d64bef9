"""`python -m stepflash.nano.tasks [TASK] [--tier hard]`: look at the data.

With a task: five rendered examples. Without: the mean number of tokens of each task, by a tokenizer trained on the
spot or by that of `--tokenizer FOLDER`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from random import Random

from stepflash.chat.tokenizer import Tokenizer
from stepflash.nano.tasks import TASKS, Example, Tier, render, sample, training_example
from stepflash.nano.tokenizer_training import train_tokenizer

TIERS: tuple[Tier, ...] = ("easy", "hard")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stepflash.nano.tasks", description=__doc__)
    parser.add_argument("task", nargs="?", choices=tuple(TASKS), help="show examples of this task")
    parser.add_argument("--tier", choices=TIERS, default="easy")
    parser.add_argument("--count", type=int, default=5, help="examples to show (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizer", help="folder of a trained tokenizer; trained on the spot when not given"
    )
    arguments = parser.parse_args(argv)
    rng = Random(arguments.seed)
    if arguments.task:
        for _ in range(arguments.count):
            print("".join(text for text, _ in render(training_example(arguments.task, arguments.tier, rng))))
            print("-" * 40)
        return
    tokenizer = (
        Tokenizer.from_pretrained(arguments.tokenizer)
        if arguments.tokenizer
        else Tokenizer(train_tokenizer())
    )
    _print_statistics(tokenizer, rng)


def _print_statistics(tokenizer: Tokenizer, rng: Random) -> None:
    print(
        f"{'task':20}{'easy':>8}{'answer':>8}{'max':>8}{'hard':>8}{'answer':>8}{'max':>8}   tokens per document"
    )
    for name in TASKS:
        cells = []
        for tier in TIERS:
            sizes = [_sizes(tokenizer, training_example(name, tier, rng)) for _ in range(200)]
            totals, answers = [total for total, _ in sizes], [loss for _, loss in sizes]
            cells.append(f"{sum(totals) / 200:8.1f}{sum(answers) / 200:8.1f}{max(totals):8d}")
        print(f"{name:20}{''.join(cells)}")
    for progress in (0.0, 0.5, 1.0):
        start = time.perf_counter()
        sizes = [_sizes(tokenizer, sample(rng, progress)) for _ in range(2000)]
        seconds, tokens = time.perf_counter() - start, sum(total for total, _ in sizes)
        answer = sum(loss for _, loss in sizes)
        print(
            f"mixture at {progress:.1f}: {tokens / 2000:.1f} tokens a document, {answer / tokens:.0%} with loss, "
            f"longest {max(sizes)[0]}, {tokens / seconds:,.0f} tokens/s generated and encoded"
        )


def _sizes(tokenizer: Tokenizer, example: Example) -> tuple[int, int]:
    """Tokens of the document, and of those the ones with loss."""
    sizes = [(len(tokenizer.encode(text)), has_loss) for text, has_loss in render(example)]
    return sum(size for size, _ in sizes), sum(size for size, has_loss in sizes if has_loss)


if __name__ == "__main__":
    main()
