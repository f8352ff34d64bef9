"""How well a quantised checkpoint agrees with the one it was made from, and the receipt that says so.

Both models read the same tokens side by side, one layer in memory at a time, so that measuring needs no more
memory than the largest layer (twice: as floats and packed). The receipt binds the numbers to the bytes; what the
loader does with it is in `stepflash.weights.receipt`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor
from torch.nn import functional as F

from stepflash.chat.tokenizer import Tokenizer
from stepflash.errors import ConfigError
from stepflash.model.attention import PackedAttention
from stepflash.model.block import DecoderLayer
from stepflash.model.config import ModelConfig
from stepflash.model.layers import RMSNorm
from stepflash.model.mtp import MTPLayer
from stepflash.model.rope import Rotation, inverse_frequencies, rotation
from stepflash.weights.checkpoint import Checkpoint, select_mtp
from stepflash.weights.load import materialize, put
from stepflash.weights.names import keeps_float32
from stepflash.weights.packed import STORED, StoredPacker, is_packable
from stepflash.weights.quantized import QuantDecoderLayer, QuantLinear, QuantMTPLayer
from stepflash.weights.receipt import RECEIPT_NAME, VERSION, receipt_digest
from stepflash.weights.signature import DIGEST, SIGNATURE, sign

MANIFEST_NAME = "stepflash-quantize.json"  # there while a checkpoint is unfinished
# Beside the weights these decide about the answers.
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja")
TEXTS = Path(__file__).with_name("receipt-texts.json")
CALIBRATION_TEXTS = Path(__file__).with_name("calibration-texts.json")
MAX_DOCUMENT_TOKENS = 256
LOGIT_ROWS = 64  # tokens whose logits exist at once
FLOAT32_LAYER_BYTES = 4 << 30  # the reference is float32 while its largest layer takes no more
# A quantised model passes if it differs less than this. Good 4-bit files of large models have a KL of 0.01 to 0.05
# nats and agree on 92 to 97 % of the tokens; broken ones are far from both limits.
MAX_MEAN_KL, MIN_TOP1 = 0.15, 0.85

OnLayer = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAgreement:
    """One layer. `error`: ||f'(x) - f(x)|| / ||f(x) - x|| on the same input x, the layer's own fault. `drift`:
    ||x' - x|| / ||x|| after it, what has added up. `routing`: share of chosen experts that both chose; None if dense.
    """

    layer: int
    error: float
    drift: float
    routing: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Agreement of two models on the same tokens; Kullback-Leibler divergences in nats, from the exact model."""

    passed: bool
    num_tokens: int
    tokens: str
    dtype: str
    mean_kl: float
    median_kl: float
    max_kl: float
    top1_agreement: float
    routing_agreement: float | None
    mtp_top1_agreement: list[float] = field(default_factory=list)
    layers: list[LayerAgreement] = field(default_factory=list)
    limits: dict[str, float] = field(
        default_factory=lambda: {"mean_kl": MAX_MEAN_KL, "top1_agreement": MIN_TOP1}
    )


# ---- tokens -------------------------------------------------------------------------------------------------


def documents(path: Path, text_file: Path | None = None, shipped: Path = TEXTS) -> tuple[list[Tensor], str]:
    """Token ids of the texts to compare or calibrate on, and a word about where they come from.

    The shipped texts, or a file whose parts are separated by lines of `---`; without a tokenizer random ids from a
    fixed seed.

    Args:
        shipped: TEXTS (English, code, a table, a tool call, arithmetic, Chinese) or CALIBRATION_TEXTS (tasks that
            nano was trained on: calibration never sees what is measured on).

    Raises:
        ConfigError: the file is empty or cannot be read.
    """
    if not (path / "tokenizer.json").is_file():
        vocab_size = ModelConfig.from_pretrained(path).vocab_size
        generator = torch.Generator().manual_seed(int(shipped == CALIBRATION_TEXTS))
        ids = torch.randint(vocab_size, (4, 128), generator=generator)
        return list(ids), "random ids: the checkpoint has no tokenizer"
    if text_file is None:
        texts, source = json.loads(shipped.read_text(encoding="utf-8")), "shipped texts"
    else:
        try:
            texts, source = text_file.read_text(encoding="utf-8").split("\n---\n"), text_file.name
        except OSError as error:
            raise ConfigError(f"{text_file}: cannot read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{text_file}: is not text in UTF-8: {error}") from error
    tokenizer = Tokenizer.from_pretrained(path)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = [(bos + tokenizer.encode(text))[:MAX_DOCUMENT_TOKENS] for text in texts if text.strip()]
    found = [torch.tensor(ids) for ids in encoded if len(ids) > 1]
    if not found:
        raise ConfigError(f"{text_file}: holds no text")
    return found, source


# ---- comparing ----------------------------------------------------------------------------------------------


def measure(
    exact: Checkpoint,
    packed: Checkpoint,
    token_ids: Sequence[Tensor],
    tokens: str,
    on_layer: OnLayer = lambda done, total: None,
) -> Quality:
    """Run both checkpoints over the documents, layer by layer.

    Args:
        token_ids: [num_tokens] int64 each.
        tokens: where they come from, for the receipt.
        on_layer: called with the layers done and in all.
    """
    config = select_mtp(exact, None)
    dtype = _reference_dtype(exact, config)
    pair = _Pair(exact, packed, config, dtype)
    ids = torch.cat(list(token_ids))
    embedding = materialize(exact.tensors["model.embed_tokens.weight"], dtype)
    with torch.inference_mode():
        tokens_view = _Tokens([len(document) for document in token_ids], config)
        hidden = rounded = F.embedding(ids, embedding)
        layers = []
        for index in range(config.num_layers):
            agreement, hidden, rounded = pair.compare_layer(index, tokens_view, hidden, rounded)
            layers.append(agreement)
            on_layer(index + 1, len(config.layers) + 1)
        kl, same = pair.compare_heads(hidden, rounded)
        on_layer(config.num_layers + 1, len(config.layers) + 1)
        mtp = []
        lengths = [len(document) for document in token_ids]
        for module in range(1, config.num_mtp_layers + 1):
            # Module k pairs the token k places later with each hidden state: every document loses its last.
            kept = torch.cat([torch.arange(n) < n - 1 for n in lengths])
            hidden, rounded = hidden[kept], rounded[kept]
            lengths = [n - 1 for n in lengths]
            if min(lengths) < 1:
                break
            later = torch.cat([document[module:] for document in token_ids])
            same_drafts, hidden, rounded = pair.compare_mtp(
                module, _Tokens(lengths, config), F.embedding(later, embedding), hidden, rounded
            )
            mtp.append(round(same_drafts, 4))
            on_layer(config.num_layers + 1 + module, len(config.layers) + 1)
    routing = [layer.routing for layer in layers if layer.routing is not None]
    mean_kl, top1 = float(kl.mean()), float(same.float().mean())
    return Quality(
        passed=mean_kl <= MAX_MEAN_KL and top1 >= MIN_TOP1,
        num_tokens=len(ids),
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        mean_kl=round(mean_kl, 6),
        median_kl=round(float(kl.median()), 6),
        max_kl=round(float(kl.max()), 6),
        top1_agreement=round(top1, 4),
        routing_agreement=round(sum(routing) / len(routing), 4) if routing else None,
        mtp_top1_agreement=mtp,
        layers=layers,
    )


def _reference_dtype(exact: Checkpoint, config: ModelConfig) -> torch.dtype:
    sizes = [0] * len(config.layers)
    for name, stored in exact.tensors.items():
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            if index < len(sizes):
                sizes[index] += 4 * int(torch.Size(stored.shape).numel())
    return torch.float32 if max(sizes) <= FLOAT32_LAYER_BYTES else torch.bfloat16


class _Tokens:
    """Positions and visibility of documents that lie end to end."""

    def __init__(self, lengths: Sequence[int], config: ModelConfig) -> None:
        self.positions = torch.cat([torch.arange(n) for n in lengths])
        boundaries = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self.attend = PackedAttention(config.layers, boundaries, "cpu")

    def rotation(self, layer: DecoderLayer) -> Rotation:
        return rotation(inverse_frequencies(layer.rope), self.positions)


class _Pair:
    """Two checkpoints of one model, of which one layer at a time is in memory."""

    def __init__(
        self, exact: Checkpoint, packed: Checkpoint, config: ModelConfig, dtype: torch.dtype
    ) -> None:
        self.exact, self.packed, self.config, self.dtype = exact, packed, config, dtype
        self.packer = StoredPacker(packed.tensors, STORED, {})

    def compare_layer(
        self, index: int, tokens: _Tokens, hidden: Tensor, rounded: Tensor
    ) -> tuple[LayerAgreement, Tensor, Tensor]:
        """hidden, rounded: [num_tokens, hidden_size] of the two models; returned after this layer."""
        chosen: list[Tensor] = []

        def watch(layer_idx: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
            chosen.append(topk_ids)
            return topk_ids

        layer = self._float_layer(index)
        cos_sin = tokens.rotation(layer)
        after = layer(hidden, cos_sin, tokens.attend, watch)
        del layer
        quantized = self._packed_layer(index)
        alone = quantized(hidden, cos_sin, tokens.attend)
        rounded = quantized(rounded, cos_sin, tokens.attend, watch)
        agreement = LayerAgreement(
            layer=index,
            error=round(_relative(alone - after, after - hidden), 6),
            drift=round(_relative(rounded - after, after), 6),
            routing=round(_overlap(*chosen), 4) if chosen else None,
        )
        return agreement, after, rounded

    def compare_heads(self, hidden: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence and equality of the most likely token, [num_tokens] each."""
        head = materialize(self.exact.tensors["lm_head.weight"], self.dtype)
        quantized = QuantLinear(self.packer.pack("lm_head.weight", head), torch.float32)
        norms = [self._norm(checkpoint) for checkpoint in (self.exact, self.packed)]
        divergences, same = [], []
        for rows, rounded_rows in zip(hidden.split(LOGIT_ROWS), rounded.split(LOGIT_ROWS), strict=True):  # type: ignore[no-untyped-call]
            p = F.linear(norms[0](rows), head).float().log_softmax(-1)
            q = quantized(norms[1](rounded_rows)).log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
        return torch.cat(divergences), torch.cat(same)

    def compare_mtp(
        self, module: int, tokens: _Tokens, embeddings: Tensor, hidden: Tensor, rounded: Tensor
    ) -> tuple[float, Tensor, Tensor]:
        """Share of equal drafts of one module, and the hidden states of both for the next."""
        index = self.config.num_layers + module - 1
        results, drafts = [], []
        for load, states in ((self._float_layer, hidden), (self._packed_layer, rounded)):
            layer = load(index)
            assert isinstance(layer, MTPLayer)
            after = layer.combine(embeddings, states, tokens.rotation(layer), tokens.attend)
            drafts.append(
                torch.cat([layer.compute_logits(rows).argmax(-1) for rows in torch.split(after, LOGIT_ROWS)])
            )
            results.append(after)
        return float((drafts[0] == drafts[1]).float().mean()), results[0], results[1]

    def _norm(self, checkpoint: Checkpoint) -> RMSNorm:
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        put(norm, "weight", materialize(checkpoint.tensors["model.norm.weight"], torch.float32))
        return norm

    def _float_layer(self, index: int) -> DecoderLayer:
        layer = self._empty_layer(index)
        self._fill(layer, index, self.exact, lambda name: True)
        return layer.eval()

    def _packed_layer(self, index: int) -> DecoderLayer:
        layer = self._empty_layer(index)
        self._fill(layer, index, self.packed, lambda name: not is_packable(name))
        kind = QuantMTPLayer if isinstance(layer, MTPLayer) else QuantDecoderLayer
        return kind(layer, f"model.layers.{index}", self.packer).eval()  # type: ignore[arg-type]

    def _empty_layer(self, index: int) -> DecoderLayer:
        with torch.device("meta"):
            return (DecoderLayer if index < self.config.num_layers else MTPLayer)(self.config, index)

    def _fill(
        self, layer: DecoderLayer, index: int, checkpoint: Checkpoint, wanted: Callable[[str], bool]
    ) -> None:
        for name in [name for name, _ in layer.named_parameters()]:
            released = f"model.layers.{index}.{name}"
            if wanted(released):
                dtype = torch.float32 if keeps_float32(released) else self.dtype
                put(layer, name, materialize(checkpoint.tensors[released], dtype))


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.float().norm() / whole.float().norm().clamp_min(1e-30))


def _overlap(first: Tensor, second: Tensor) -> float:
    """Share of the experts in `first` that are also in the same row of `second`, both [num_tokens, top_k]."""
    return float((first[:, :, None] == second[:, None, :]).any(-1).float().mean())


# ---- the receipt --------------------------------------------------------------------------------------------


def write_receipt(
    out: Path,
    tensors: Mapping[str, Mapping[str, Any]],
    recipe: Mapping[str, Any],
    quality: Quality | None,
    key: Ed25519PrivateKey | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the receipt beside the weights; its JSON object. The run then counts as finished.

    Args:
        tensors: what `quantize_checkpoint` returned.
        key: signs it.
        tasks: accuracy before and after, if it was measured.
    """
    sources = "".join(f"{name} {entry['source_sha256']}\n" for name, entry in tensors.items())
    values: dict[str, Any] = {
        "version": VERSION,
        "recipe": dict(recipe),
        "source_sha256": hashlib.sha256(sources.encode()).hexdigest(),
        "quality": None if quality is None else asdict(quality),
        "tasks": None if tasks is None else dict(tasks),
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in FILES
            for path in sorted(out.glob(pattern))
        },
        "tensors": tensors,
    }
    if key is not None:
        values[SIGNATURE] = sign(values, key)
    values[DIGEST] = receipt_digest(values)
    part = out / f"{RECEIPT_NAME}.part"
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(part, out / RECEIPT_NAME)
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    return values
