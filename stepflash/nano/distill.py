"""Teach the prediction modules of a finished nano to say what its trunk says: `python -m stepflash.nano.distill RUN`.

A draft is right when it is the token that the trunk would choose, right or wrong as an answer. So the modules learn
from the trunk's own distribution rather than from the documents, chained as in decoding, while the trunk stays as it
is: no answer of the model changes, only how many tokens a step accepts. A run can be interrupted and goes on where it
stopped; `--export` then writes a copy of the checkpoint with the new modules.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from stepflash.errors import WeightsError
from stepflash.model.attention import PackedAttention
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.nano.recipe import Recipe
from stepflash.nano.train import SAVE_EVERY_SECONDS, interruptible, make_pack, new_optimizer, progress_bar
from stepflash.training.checkpoint import load_checkpoint, save_checkpoint
from stepflash.training.data import PackedBatch
from stepflash.training.losses import mtp_states, offset_weights
from stepflash.training.schedule import wsd
from stepflash.weights.hub import NANO_FOLDER
from stepflash.weights.load import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Numbers of a run. `sharpness`: the trunk's logits are multiplied by it, for drafts compete for the top."""

    tokens: int = 12_000_000
    peak_lr: float = 2e-3
    warmup: float = 0.01
    decay_from: float = 0.4
    later_weight: float = 0.85
    sharpness: float = 1.5
    seed: int = 1


def agreement_losses(
    model: Step3p5ForCausalLM, batch: PackedBatch, sharpness: float
) -> list[tuple[Tensor, float]]:
    """By module: cross-entropy in nats to the trunk's distribution, and the share of drafts that are its choice."""
    modules = model.config.num_mtp_layers
    attend = PackedAttention(model.config.layers, batch.cu_seqlens, batch.input_ids.device)
    with torch.no_grad():
        hidden_states = model(batch.input_ids, batch.positions, attend)
        rows, _ = batch.targets(1)
        wanted = torch.full((batch.input_ids.shape[0] + modules,), -1, dtype=torch.long)
        wanted[rows] = torch.arange(rows.shape[0])
        said = model.compute_logits(hidden_states[rows])  # [num_rows, vocab_size]
        choices, teacher = said.argmax(-1), F.softmax(said * sharpness, dim=-1)
    found = []
    for module, states in enumerate(mtp_states(model, hidden_states, batch, attend, modules), start=1):
        rows, _ = batch.targets(module + 1)
        at = wanted[rows + module]  # where the trunk says the same token
        logits = model.mtp_compute_logits(module, states[rows])
        loss = F.cross_entropy(logits, teacher[at])
        found.append((loss, float((logits.detach().argmax(-1) == choices[at]).float().mean())))
    return found


def distill(model_path: Path, run: Path, plan: Distillation, stop_after: float | None = None) -> None:
    """Run or continue in `run`; `stop_after` seconds it pauses."""
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    model = load_model(model_path, dtype="bfloat16")
    first = f"model.layers.{model.config.num_layers}."
    for name, parameter in model.named_parameters():
        is_module = name.startswith("model.layers.") and int(name.split(".")[2]) >= model.config.num_layers
        parameter.requires_grad_(is_module)
    recipe = Recipe()
    optimizer = new_optimizer(model.named_parameters(), recipe)
    if not optimizer.states:
        raise WeightsError(f"{model_path}: no prediction modules ({first}*) to teach")
    step = tokens = 0
    checkpoint = run / "modules.pt"
    saved = load_checkpoint(checkpoint)
    if saved is not None:
        step, tokens = saved["step"], saved["tokens"]
        optimizer.load_state_dict(saved["optimizer"])

    def save() -> None:
        state = {"step": step, "tokens": tokens, "seed": plan.seed, "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, state)

    started = last_saved = time.monotonic()
    weights = offset_weights(model.config.num_mtp_layers, plan.later_weight)
    with (
        progress_bar("agreement {task.fields[agreement]}") as bar,
        open(run / "log.jsonl", "a", encoding="utf-8") as log,
        interruptible() as interrupted,
    ):
        task = bar.add_task("teaching the modules", total=plan.tokens, completed=tokens, agreement="")
        while tokens < plan.tokens and not interrupted.is_set():
            if stop_after is not None and time.monotonic() - started > stop_after:
                break
            progress = tokens / plan.tokens
            batch = make_pack(tokenizer, recipe, plan.seed, step, 0, 1.0)
            losses = agreement_losses(model, batch, plan.sharpness)
            total: Tensor = sum(w * loss for w, (loss, _) in zip(weights, losses, strict=True))  # type: ignore[assignment]
            total.backward()  # type: ignore[no-untyped-call]
            norm = optimizer.step(
                plan.peak_lr * wsd(progress, warmup=plan.warmup, decay_from=plan.decay_from)
            )
            step, tokens = step + 1, tokens + int(batch.input_ids.shape[0])
            agreements = [round(share, 4) for _, share in losses]
            line = {"step": step, "tokens": tokens, "agreement": agreements, "grad_norm": round(norm, 3)}
            print(json.dumps(line), file=log, flush=True)
            bar.update(task, completed=tokens, agreement=" ".join(f"{a:.3f}" for a in agreements))
            if time.monotonic() - last_saved > SAVE_EVERY_SECONDS:
                save()
                last_saved = time.monotonic()
        save()
    if tokens < plan.tokens:
        Console(stderr=True).print(f"stopped at {tokens:,} tokens; the same command goes on from there")


def export_modules(model_path: Path, run: Path, out: Path) -> None:
    """Write `out`: the checkpoint with the modules of `run`; every other tensor keeps its bytes.

    Raises:
        WeightsError: the run has no checkpoint, or it is of another model.
    """
    saved: dict[str, Any] | None = load_checkpoint(run / "modules.pt")
    if saved is None:
        raise WeightsError(f"{run}: no modules.pt; first run python -m stepflash.nano.distill {run}")
    with safe_open(model_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    for name, state in saved["optimizer"]["states"].items():
        if name not in tensors or tensors[name].shape != state["master"].shape:
            raise WeightsError(f"{run}: {name} is not in {model_path}; the run is of another model")
        tensors[name] = state["master"].to(tensors[name].dtype).contiguous()
    metadata |= {"modules_tokens": str(saved["tokens"]), "modules_seed": str(saved["seed"])}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata=metadata)
    for path in model_path.iterdir():
        if path.name not in ("model.safetensors", "README.md"):
            shutil.copyfile(path, out / path.name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stepflash.nano.distill", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--model", type=Path, default=NANO_FOLDER, help="checkpoint folder; default: nano's")
    parser.add_argument(
        "--tokens", type=int, default=Distillation().tokens, help="length (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument(
        "--export", type=Path, metavar="OUT", help="write a checkpoint with the modules as they are"
    )
    options = parser.parse_args(arguments)
    if options.export is not None:
        return export_modules(options.model, options.run, options.export)
    options.run.mkdir(parents=True, exist_ok=True)
    seconds = None if options.minutes is None else options.minutes * 60
    distill(options.model, options.run, Distillation(tokens=options.tokens), seconds)


if __name__ == "__main__":
    main()
