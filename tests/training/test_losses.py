"""Packing and losses against the model run on each document alone (brute force)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stepflash.model.attention import PackedAttention
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.training.balance import LoadCounter, update_router_bias
from stepflash.training.data import Document, pack, packs
from stepflash.training.losses import mtp_losses, next_token_loss, offset_weights
from stepflash.weights.load import load_model

MICRO = Path(__file__).parent.parent / "fixtures" / "micro"


@pytest.fixture(scope="module")
def micro() -> Step3p5ForCausalLM:
    return load_model(MICRO, dtype="float32", progress=False)


def some_documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    documents: list[Document] = []
    for length in (9, 1, 30, 2, 17):
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        documents.append((ids, [i % 3 != 1 for i in range(length)]))
    return documents


def test_next_token_loss_is_the_mean_over_documents(micro: Step3p5ForCausalLM) -> None:
    documents = some_documents()
    batch = pack(documents)
    attend = PackedAttention(micro.config.layers, batch.cu_seqlens, "cpu")
    with torch.no_grad():
        hidden_states = micro(batch.input_ids, batch.positions, attend)
        ours = next_token_loss(micro, hidden_states, batch)
    losses = []
    for ids, mask in documents:
        logits = micro.logits(torch.tensor(ids))
        losses += [
            F.cross_entropy(logits[i - 1], torch.tensor(ids[i])) for i in range(1, len(ids)) if mask[i]
        ]
    assert ours.num_targets == len(losses)
    assert ours.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_prediction_modules_learn_what_they_are_asked_in_decoding(micro: Step3p5ForCausalLM) -> None:
    documents = some_documents()
    batch = pack(documents)
    attend = PackedAttention(micro.config.layers, batch.cu_seqlens, "cpu")
    with torch.no_grad():
        hidden_states = micro(batch.input_ids, batch.positions, attend)
        ours = mtp_losses(micro, hidden_states, batch, attend, 3)
    for module, loss in enumerate(ours, start=1):
        expected = []
        for ids, mask in documents:
            logits = micro.mtp_logits(torch.tensor(ids))[module - 1]
            offset = module + 1
            expected += [
                F.cross_entropy(logits[i - offset], torch.tensor(ids[i]))
                for i in range(offset, len(ids))
                if mask[i]
            ]
        assert loss.num_targets == len(expected)
        assert loss.loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-4)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), offset=st.integers(1, 4))
def test_targets_stay_inside_their_document(lengths: list[int], offset: int) -> None:
    documents: list[Document] = [([100 * d + i for i in range(n)], [True] * n) for d, n in enumerate(lengths)]
    batch = pack(documents)
    rows, targets = batch.targets(offset)
    found = list(zip(batch.input_ids[rows].tolist(), targets.tolist(), strict=True))
    assert found == [(ids[i], ids[i + offset]) for ids, _ in documents for i in range(len(ids) - offset)]


@given(st.lists(st.integers(1, 30), max_size=20))
def test_packs_keep_every_document_in_order(lengths: list[int]) -> None:
    documents: list[Document] = [([d] * n, [True] * n) for d, n in enumerate(lengths)]
    batches = list(packs(documents, num_tokens=32, max_length=25))
    assert all(batch.input_ids.shape[0] <= 32 for batch in batches)
    flat = [i for batch in batches for i in batch.input_ids.tolist()]
    assert flat == [d for d, n in enumerate(lengths) for _ in range(min(n, 25))]


def test_offset_weights_fall_and_sum_to_one() -> None:
    weights = offset_weights(3)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] > weights[1] > weights[2] > 0


def test_router_bias_moves_towards_balance() -> None:
    model = load_model(MICRO, dtype="float32", progress=False)
    layer = model.trunk_layers()[2]
    assert layer.moe is not None
    before = layer.moe.router_bias.clone()
    load = LoadCounter()
    load.counts[2] = torch.tensor([0, 8, 4, 4, 4, 4, 4, 4])
    update_router_bias(model, load, rate=0.5)
    moved = layer.moe.router_bias - before
    assert torch.allclose(moved, torch.tensor([0.5, -0.5, 0, 0, 0, 0, 0, 0]))
    assert load.max_over_mean() == pytest.approx(2.0)
