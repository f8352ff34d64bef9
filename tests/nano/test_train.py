"""The trainer end to end on a model of seconds: it learns, it resumes exactly, what it exports loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepflash.nano import train as training
from stepflash.nano.export import export, quantize_blocks
from stepflash.nano.recipe import CONFIG, SMOKE
from stepflash.nano.tokenizer_training import train_tokenizer, write_tokenizer
from stepflash.training.checkpoint import load_checkpoint
from stepflash.weights.load import load_model

TINY = {
    **CONFIG,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_attention_groups": 1,
    "head_dim": 16,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 3,
        "num_attention_groups": 1,
        "head_dim": 16,
    },
    "moe_num_experts": 4,
    "moe_intermediate_size": 16,
    "share_expert_dim": 16,
}
RECIPE = replace(SMOKE, tokens=12_000, tokens_per_pack=600, mtp_from=0.4)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer(0))
    return folder


def run(folder: Path, tokenizer_folder: Path, tokens: int) -> list[dict[str, float]]:
    folder.mkdir(exist_ok=True)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    training.train(RECIPE, folder, seed=0, worker=0, num_workers=1, stop_after=tokens)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_learns_and_goes_on_where_it_stopped(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CONFIG", TINY)
    whole = run(tmp_path / "whole", tokenizer_folder, RECIPE.tokens)
    run(tmp_path / "parts", tokenizer_folder, RECIPE.tokens // 2)
    parts = run(tmp_path / "parts", tokenizer_folder, RECIPE.tokens)
    assert whole[-1]["losses"][0] < whole[0]["losses"][0] - 1.0  # type: ignore[index]
    assert len(whole[-1]["losses"]) == 4  # type: ignore[arg-type]
    assert [{**line, "seconds": 0} for line in parts] == [{**line, "seconds": 0} for line in whole]
    first = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    second = load_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert first is not None
    assert second is not None
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])

    export(tmp_path / "whole", tmp_path / "out")
    model = load_model(tmp_path / "out", dtype="float32", progress=False)
    for name, parameter in model.state_dict().items():
        saved = first["model"][name].float()
        # e4m3 has three bits of mantissa: half a step of 1/8 is 1/16, and small values share the block's scale.
        allowed = saved.abs().max() / 16 if saved.ndim == 3 else saved.abs().max() * 2**-8
        assert (parameter - saved).abs().max() <= allowed


@pytest.mark.parametrize("shape", [(2, 128, 128), (3, 130, 200), (1, 64, 32)])
def test_block_scales_follow_the_released_layout(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized, scales = quantize_blocks(weight)
    assert scales.shape == (shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
    for e in range(shape[0]):
        for row in range(0, shape[1], 37):
            for col in range(0, shape[2], 41):
                value = quantized[e, row, col].float() * scales[e, row // 128, col // 128]
                assert value.item() == pytest.approx(
                    weight[e, row, col].item(), abs=0.02 + 0.07 * abs(weight[e, row, col].item())
                )
