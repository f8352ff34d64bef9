"""Train nano from scratch: `python -m stepflash.nano.train --out DIR`.

One command from seed to weights: tokenizer, documents made on the fly, trunk, prediction modules, export. Every
pack is a function of (seed, step, worker), so a run that was interrupted goes on where it stopped, with the same
data; Ctrl-C saves first. Workers are processes with one thread each: on a CPU two of them are faster than two
threads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import nn
from torch.multiprocessing.spawn import spawn

from stepflash.model.config import ModelConfig
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.nano.recipe import CONFIG, SMOKE, Recipe
from stepflash.nano.tasks.mixture import sample
from stepflash.nano.tasks.rendering import render
from stepflash.nano.tokenizer_training import train_tokenizer, write_tokenizer
from stepflash.training.checkpoint import load_checkpoint, save_checkpoint
from stepflash.training.data import Document, PackedBatch, packs
from stepflash.training.optim import Optimizer
from stepflash.training.schedule import wsd
from stepflash.training.step import StepRates, StepReport, train_step

SAVE_EVERY_SECONDS = 300.0


def new_model(config: ModelConfig, recipe: Recipe, seed: int) -> Step3p5ForCausalLM:
    """A freshly initialised model: matrices bf16 with variance 1/fan-in, what adds to the residual smaller."""
    generator = torch.Generator().manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Step3p5ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    residual_gain = (2 * config.num_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(recipe.head_norm_init)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                gain = residual_gain if "o_proj" in name or "down_proj" in name else 1.0
                std = 0.5 if "embed_tokens" in name else gain * parameter.shape[-1] ** -0.5
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
                    0, std, generator=generator
                )
                parameter.copy_(values)
            parameter.requires_grad_(not name.endswith("router_bias"))
    return model


def new_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe) -> Optimizer:
    """The recipe's optimiser, over those of the parameters that require a gradient."""
    return Optimizer(
        named_parameters,
        weight_decay=recipe.weight_decay,
        adam_lr_scale=recipe.adam_lr_scale,
        muon_steps=recipe.muon_steps,
        muon_dtype=torch.bfloat16,
    )


def clone_first_module(model: Step3p5ForCausalLM) -> None:
    """Start the later prediction modules as copies of the first (report, section 2.2)."""
    first = model.mtp_layer(1).state_dict()
    for module in range(2, model.config.num_mtp_layers + 1):
        model.mtp_layer(module).load_state_dict(first)


def documents(tokenizer: Tokenizer, rng: Random, progress: float, max_tokens: int) -> Iterator[Document]:
    """An endless stream of tokenised examples for this point of the run; too long ones are left out."""
    while True:
        ids: list[int] = []
        mask: list[bool] = []
        for text, has_loss in render(sample(rng, progress)):
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            mask += [has_loss] * len(piece)
        if len(ids) <= max_tokens:
            yield ids, mask


def make_pack(
    tokenizer: Tokenizer, recipe: Recipe, seed: int, step: int, worker: int, progress: float
) -> PackedBatch:
    """The pack of one worker at one step; the same arguments give the same pack."""
    stream = documents(
        tokenizer, Random(f"nano {seed} {step} {worker}"), progress, recipe.max_document_tokens
    )
    return next(packs(stream, recipe.tokens_per_pack, recipe.max_document_tokens))


def rates_at(recipe: Recipe, progress: float) -> StepRates:
    return StepRates(
        lr=recipe.peak_lr * wsd(progress, warmup=recipe.warmup, decay_from=recipe.decay_from),
        router_bias=recipe.router_bias_rate if progress < recipe.router_bias_until else 0.0,
        mtp_weight=recipe.mtp_weight if progress >= recipe.mtp_from else 0.0,
    )


def train(
    recipe: Recipe, out: Path, *, seed: int, worker: int, num_workers: int, stop_after: int | None = None
) -> None:
    """Run or continue one training run in `out`; every worker calls this. `stop_after` tokens it pauses."""
    torch.set_num_threads(1 if num_workers > 1 else torch.get_num_threads())
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    config = ModelConfig.from_dict({**CONFIG, "vocab_size": padded_vocabulary(tokenizer)})
    model = new_model(config, recipe, seed)
    parameters = [(name, p) for name, p in model.named_parameters() if not name.endswith("router_bias")]
    optimizer = new_optimizer(parameters, recipe)
    checkpoint = out / "checkpoint.pt"
    step, tokens = 0, 0
    saved = load_checkpoint(checkpoint)
    if saved is not None:
        step, tokens = saved["step"], saved["tokens"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    def save() -> None:
        state = {
            "step": step,
            "tokens": tokens,
            "seed": seed,
            "recipe": dataclasses.asdict(recipe),
            "config": {**CONFIG, "vocab_size": config.vocab_size},
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        save_checkpoint(checkpoint, state)

    leader = worker == 0
    last_saved = time.monotonic()
    cloned = tokens / recipe.tokens > recipe.mtp_from
    with (
        progress_bar("loss {task.fields[loss]:.3f}", is_shown=leader) as bar,
        open(out / "log.jsonl", "a", encoding="utf-8") as log,
        interruptible() as interrupted,
    ):
        task = bar.add_task("training nano", total=recipe.tokens, completed=tokens, loss=float("nan"))
        stopped = False
        while tokens < min(recipe.tokens, stop_after or recipe.tokens) and not stopped:
            started = time.monotonic()
            progress = tokens / recipe.tokens
            rates = rates_at(recipe, progress)
            if rates.mtp_weight > 0 and not cloned:
                clone_first_module(model)
                optimizer.refresh_masters("model.layers")
                cloned = True
            batch = make_pack(tokenizer, recipe, seed, step, worker, progress)
            report = train_step(model, optimizer, batch, rates)
            num_tokens, num_interrupted = _sum_over_workers(report.num_tokens, int(interrupted.is_set()))
            step, tokens, stopped = step + 1, tokens + num_tokens, num_interrupted > 0
            if leader:
                bar.update(task, completed=tokens, loss=report.losses[0])
                seconds = time.monotonic() - started
                print(json.dumps(_log_line(step, tokens, rates, report, seconds)), file=log, flush=True)
                if time.monotonic() - last_saved > SAVE_EVERY_SECONDS:
                    save()
                    last_saved = time.monotonic()
        if leader:
            save()
    if stopped and leader:
        Console(stderr=True).print(f"stopped at {tokens:,} tokens; the same command goes on from there")


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the tokenizer's ids and a few unused ones, as in the released checkpoint."""
    return -(-(tokenizer.get_vocab_size() + 1) // 64) * 64


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising: a run ends after the step in progress, and workers must agree on
    which one that is."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda signum, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _sum_over_workers(*numbers: int) -> list[int]:
    total = torch.tensor(numbers)
    if dist.is_initialized():
        dist.all_reduce(total)
    result: list[int] = total.tolist()
    return result


def _log_line(step: int, tokens: int, rates: StepRates, report: StepReport, seconds: float) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": tokens,
        "lr": round(rates.lr, 6),
        "losses": [round(loss, 4) for loss in report.losses],
        "accuracies": [round(accuracy, 4) for accuracy in report.accuracies],
        "grad_norm": round(report.grad_norm, 3),
        "max_load": round(report.max_load, 2),
        "seconds": round(seconds, 2),
    }


def progress_bar(detail: str, *, is_shown: bool = True) -> Progress:
    """Tokens done and `detail`, a template over the task's fields; nothing where standard error is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} tokens, " + detail),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not is_shown or not os.isatty(2),
    )


def _worker(worker: int, num_workers: int, port: int, recipe: Recipe, out: Path, seed: int) -> None:
    if num_workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=worker, world_size=num_workers
        )
    try:
        train(recipe, out, seed=seed, worker=worker, num_workers=num_workers)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stepflash.nano.train", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nano"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=None, help="length of the run; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=max(1, os.cpu_count() or 1), help="processes, one core each"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a run of a minute that shows that everything works"
    )
    options = parser.parse_args(arguments)
    recipe = SMOKE if options.smoke else Recipe()
    if options.tokens is not None:
        recipe = dataclasses.replace(recipe, tokens=options.tokens)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").is_file():
        write_tokenizer(out, train_tokenizer(options.seed))
    if options.workers == 1:
        _worker(0, 1, 0, recipe, out, options.seed)
        return
    port = 20000 + os.getpid() % 20000
    spawn(  # type: ignore[no-untyped-call]
        _worker, args=(options.workers, port, recipe, out, options.seed), nprocs=options.workers
    )


if __name__ == "__main__":
    main()
