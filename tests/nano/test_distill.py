"""Teaching the prediction modules: what they agree with, what changes, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from stepflash.errors import WeightsError
from stepflash.nano.distill import Distillation, agreement_losses, distill, export_modules
from stepflash.nano.recipe import Recipe
from stepflash.nano.train import make_pack
from stepflash.training.data import pack
from stepflash.weights.hub import NANO_FOLDER
from stepflash.weights.load import load_model


def test_agreement_is_that_of_the_models_own_drafts() -> None:
    """Module k at p against the trunk at p + k, by the model's conveniences for one document."""
    model = load_model(NANO_FOLDER, dtype="float32", progress=False)
    tokenizer = Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json"))
    batch = make_pack(tokenizer, Recipe(), 7, 0, 0, 1.0)
    start, end = batch.cu_seqlens[2:4]
    ids, mask = batch.input_ids[start:end], batch.loss_mask[start:end].tolist()
    found = agreement_losses(model, pack([(ids.tolist(), mask)]), 1.0)
    said, drafts = model.logits(ids), model.mtp_logits(ids)
    for k, (loss, share) in enumerate(found, start=1):
        rows = [p for p in range(len(ids) - k - 1) if mask[p + k + 1]]
        wanted = said[[p + k for p in rows]]
        agreed = (drafts[k - 1, rows].argmax(-1) == wanted.argmax(-1)).float().mean()
        assert share == pytest.approx(float(agreed), abs=1e-6)
        log_drafts = drafts[k - 1, rows].double().log_softmax(-1)
        entropy = -(wanted.double().softmax(-1) * log_drafts).sum(-1).mean()
        assert float(loss.detach()) == pytest.approx(float(entropy), rel=1e-4)


def test_only_the_modules_learn_and_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for run in (whole, halves):
        run.mkdir()
    plan = Distillation(tokens=12_000)  # two packs
    distill(NANO_FOLDER, whole, plan)
    distill(NANO_FOLDER, halves, plan, stop_after=0.0)
    assert not (halves / "log.jsonl").read_text()
    distill(NANO_FOLDER, halves, plan)
    for run in (whole, halves):
        export_modules(NANO_FOLDER, run, run / "out")
    before = load_file(NANO_FOLDER / "model.safetensors")
    after, same = (load_file(run / "out" / "model.safetensors") for run in (whole, halves))
    assert before.keys() == after.keys()
    changed = {name for name in before if not equal(before[name], after[name])}
    assert changed
    assert all(
        name.startswith(("model.layers.9.", "model.layers.10.", "model.layers.11.")) for name in changed
    )
    assert all(equal(after[name], same[name]) for name in after)
    assert load_model(whole / "out", dtype="bfloat16", progress=False).config.num_mtp_layers == 3


def test_an_export_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no modules\.pt"):
        export_modules(NANO_FOLDER, tmp_path, tmp_path / "out")


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
