"""What is in a checkpoint, and whether its numbers can be those of a trained model.

`inspect_checkpoint` reads headers only. `verify_checkpoint` reads every value once, in a few MiB of memory: it is
for owners of the real weights, which this project was built without. `check_predictions` asks the loaded network
to predict plain English: a wrong norm, rotation or router cannot pass it. The command line prints all three.
"""

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.model.config import ModelConfig
from stepflash.model.rope import inverse_frequencies
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.checkpoint import Checkpoint, Comparison, compare, open_checkpoint, select_mtp
from stepflash.weights.gguf import rotary_divisors
from stepflash.weights.names import expected_tensors, is_norm, layer_of
from stepflash.weights.stored import StoredTensor

# First match wins; MTP layers are told by their number, not by name.
GROUPS = (
    ("norms", re.compile(r"norm\.weight$")),
    ("embedding", re.compile(r"^model\.embed_tokens\.")),
    ("LM head", re.compile(r"^lm_head\.")),
    ("attention", re.compile(r"\.self_attn\.")),
    ("dense MLP", re.compile(r"\.mlp\.")),
    ("router", re.compile(r"\.moe\.(gate\.weight|router_bias)$")),
    ("routed experts", re.compile(r"\.moe\.")),
    ("shared experts", re.compile(r"\.share_expert\.")),
)

# English that no tokenizer finds hard; a trained model gives its tokens about -3 nats each, chance -11.8.
ENGLISH_PARAGRAPH = (
    "The river rises in the mountains and flows through three countries before it reaches the sea. In spring, "
    "when the snow melts, the water is high and cold, and the farmers who live along its banks wait until the "
    "fields are dry enough to plough. By the end of the summer the river is so low that children can walk across "
    "it. There used to be a ferry near the old mill, but since the bridge was built nobody needs it any more."
)


@dataclass(frozen=True)
class Stored:
    """Tensors of one group that are stored in one dtype."""

    group: str
    dtype_name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as its headers describe it. `config` has the MTP modules that the files really hold."""

    checkpoint: Checkpoint
    config: ModelConfig
    comparison: Comparison
    stored: list[Stored]

    @property
    def num_found(self) -> int:
        return len(expected_tensors(self.config)) - len(self.comparison.missing)


@dataclass(frozen=True)
class Finding:
    """One result of a check. `level` is "error" (it cannot be right), "warning" (it is unusual) or "note"."""

    level: str
    subject: str
    message: str


@dataclass(frozen=True)
class Verification:
    """The result of reading every value."""

    inspection: Inspection
    findings: list[Finding]
    num_tensors: int
    num_bytes: int
    seconds: float

    @property
    def passed(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)


@dataclass(frozen=True)
class Predictions:
    """How well the trunk (entry 0) and each MTP module predict a text; log-probabilities in nats per token."""

    mean_logprobs: list[float]
    top1: list[float]
    uniform_logprob: float

    @property
    def passed(self) -> bool:
        """Every head is far better than chance: at most half of its surprise."""
        return all(mean > self.uniform_logprob / 2 for mean in self.mean_logprobs)


def inspect_checkpoint(path: Path) -> Inspection:
    """Compare a checkpoint with its own configuration, from headers only.

    Raises:
        WeightsError, ConfigError: it cannot be opened. One that opens but does not fit is described, not refused.
    """
    checkpoint = open_checkpoint(path)
    config = select_mtp(checkpoint, None)
    sums: dict[tuple[str, str], list[int]] = {}
    for tensor in checkpoint.tensors.values():
        key = (group_of(tensor.name, config.num_layers), tensor.dtype_name)
        entry = sums.setdefault(key, [0, 0, 0])
        for i, amount in enumerate((1, math.prod(tensor.shape), tensor.num_bytes)):
            entry[i] += amount
    stored = [Stored(group, dtype_name, *entry) for (group, dtype_name), entry in sums.items()]
    return Inspection(checkpoint, config, compare(checkpoint, config), stored)


def group_of(released: str, num_layers: int) -> str:
    """The part of the network that a parameter belongs to."""
    layer_idx = layer_of(released)
    if layer_idx is not None and layer_idx >= num_layers:
        return f"MTP module {layer_idx - num_layers + 1}"
    return next((group for group, pattern in GROUPS if pattern.search(released)), "other")


def verify_checkpoint(path: Path, on_progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read every value of a checkpoint and report what cannot be right.

    Args:
        on_progress: called with bytes done and bytes in all, after each tensor.
    Raises:
        WeightsError, ConfigError: it cannot even be opened.
    """
    start = time.perf_counter()
    inspection = inspect_checkpoint(path)
    checkpoint = inspection.checkpoint
    findings = _header_findings(inspection)
    norms: list[Norm] = []
    done = 0
    for name, tensor in checkpoint.tensors.items():
        try:
            statistics = measure(tensor.values())
            findings += _value_findings(name, statistics)
            if tensor.scales is not None:
                findings += _scale_findings(name, tensor.scales())
            if is_norm(name):
                norms.append(Norm(name, statistics))
        except WeightsError as error:
            findings.append(Finding("error", name, str(error)))
        done += tensor.num_bytes
        if on_progress is not None:
            on_progress(done, checkpoint.num_bytes)
    findings += _norm_findings(norms, checkpoint.kind)
    if checkpoint.rope_freqs is not None:
        findings += _rotary_findings(checkpoint.rope_freqs, inspection.config)
    seconds = time.perf_counter() - start
    return Verification(inspection, findings, len(checkpoint.tensors), done, seconds)


def check_predictions(model: Step3p5ForCausalLM, input_ids: Tensor) -> Predictions:
    """Predict a text with the trunk and every MTP module.

    Args:
        input_ids: [num_tokens] int64, with the tokens of `ENGLISH_PARAGRAPH` or another plain text.
    Raises:
        ValueError: fewer than 16 tokens.
    """
    if input_ids.shape[0] < 16:
        raise ValueError(f"{input_ids.shape[0]} tokens say nothing; give at least 16")
    logits = [model.logits(input_ids)]
    if model.config.num_mtp_layers:
        logits += list(model.mtp_logits(input_ids))
    mean_logprobs, top1 = [], []
    for module, of_module in enumerate(logits):
        targets = input_ids[module + 1 :]
        logprobs = of_module[: targets.shape[0]].float().log_softmax(-1)
        mean_logprobs.append(logprobs.gather(-1, targets[:, None]).mean().item())
        top1.append((logprobs.argmax(-1) == targets).float().mean().item())
    return Predictions(mean_logprobs, top1, -math.log(model.config.vocab_size))


# ---- single checks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Of all values of a tensor; the moments are over the finite ones."""

    count: int
    num_nan: int
    num_infinite: int
    mean: float
    rms: float
    largest: float
    share_negative: float


@dataclass(frozen=True)
class Norm:
    name: str
    statistics: Statistics


def measure(pieces: Iterable[Tensor]) -> Statistics:
    """One pass; sums are float64."""
    count = num_nan = num_infinite = num_negative = 0
    total = squares = largest = 0.0
    for piece in pieces:
        values = piece.float()
        finite = values.isfinite()
        if not bool(finite.all()):
            num_nan += int(values.isnan().sum())
            num_infinite += int(values.isinf().sum())
            values = values[finite]
        count += piece.numel()
        if values.numel():
            total += values.sum(dtype=torch.float64).item()
            squares += values.square().sum(dtype=torch.float64).item()
            largest = max(largest, values.abs().max().item())
            num_negative += int((values < 0).sum())
    finite_count = max(count - num_nan - num_infinite, 1)
    return Statistics(
        count=count,
        num_nan=num_nan,
        num_infinite=num_infinite,
        mean=total / finite_count,
        rms=math.sqrt(squares / finite_count),
        largest=largest,
        share_negative=num_negative / finite_count,
    )


def _header_findings(inspection: Inspection) -> list[Finding]:
    comparison, checkpoint = inspection.comparison, inspection.checkpoint
    findings = [Finding("error", name, "missing") for name in comparison.missing]
    findings += [Finding("error", name, "unexpected") for name in comparison.unexpected]
    findings += [
        Finding("error", name, f"has shape {list(found)}, expected {list(needed)}")
        for name, needed, found in comparison.wrong_shape
    ]
    announced, there = checkpoint.config.num_mtp_layers, inspection.config.num_mtp_layers
    if there < announced:
        message = f"the configuration announces {announced} MTP modules, the files hold {there}"
        findings.append(Finding("note", "MTP", message))
    if checkpoint.vision:
        message = f"{len(checkpoint.vision)} tensors of an image tower are not used"
        findings.append(Finding("note", "vision", message))
    return findings


def _value_findings(name: str, statistics: Statistics) -> list[Finding]:
    if statistics.num_nan or statistics.num_infinite:
        message = (
            f"{statistics.num_nan} NaN and {statistics.num_infinite} infinite of {statistics.count} values"
        )
        return [Finding("error", name, message)]
    if name.endswith("router_bias"):
        # Scores are sigmoids: a bias far outside [-1, 1] would fix the choice for every token.
        if statistics.largest > 100:
            return [Finding("warning", name, f"selection bias as large as {statistics.largest:.3g}")]
    elif statistics.largest == 0 and not is_norm(name):
        return [Finding("warning", name, "all values are zero")]
    elif statistics.largest > 1e4:
        return [Finding("warning", name, f"values as large as {statistics.largest:.3g}")]
    return []


def _scale_findings(name: str, scales: Tensor) -> list[Finding]:
    num_bad = int((scales <= 0).sum())
    if num_bad:
        message = f"{num_bad} of {scales.numel()} FP8 block scales are zero or negative"
        return [Finding("error" if bool((scales < 0).any()) else "warning", name, message)]
    # e4m3 reaches 448 and its block's largest weight is put there: a scale of 1 means weights of 448.
    if scales.max().item() > 1:
        return [Finding("warning", name, f"FP8 block scales as large as {scales.max().item():.3g}")]
    return []


def _norm_findings(norms: list[Norm], kind: str) -> list[Finding]:
    """Zero-centred weights lie around 0, with both signs; with a 1 too many they lie around 1, too few around -1."""
    total = sum(norm.statistics.count for norm in norms)
    if not total:
        return []
    mean = sum(norm.statistics.mean * norm.statistics.count for norm in norms) / total
    negative = sum(norm.statistics.share_negative * norm.statistics.count for norm in norms) / total
    subject = f"{len(norms)} norm weights"
    found = f"mean {mean:.3f}, {negative:.1%} negative"
    if mean > 0.3 and negative < 0.02:
        advice = "a safetensors checkpoint must store w, not 1 + w (MLX conversions store 1 + w)"
        if kind == "gguf":
            advice = "this GGUF seems to have had its 1 added twice"
        return [Finding("error", subject, f"{found}: they look as if 1 was already added; {advice}")]
    if mean < -0.6 and negative > 0.9:
        advice = (
            "this GGUF seems to store w instead of 1 + w" if kind == "gguf" else "1 was taken off too often"
        )
        return [Finding("error", subject, f"{found}: they look as if 1 was missing; {advice}")]
    return [Finding("note", subject, f"{found}: zero-centred, as they should be")]


def _rotary_findings(rope_freqs: StoredTensor, config: ModelConfig) -> list[Finding]:
    """How far the file's rotary divisors are from those that its configuration implies (spec 6.3)."""
    try:
        divisors = rotary_divisors(rope_freqs)
    except WeightsError as error:
        return [Finding("error", rope_freqs.name, str(error))]
    rope = next((layer.rope for layer in config.layers if layer.rope.scaling is not None), None)
    if rope is None:
        return []
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    implied = rope.theta**-exponents / inverse_frequencies(rope)
    half = rope.rotary_dim // 2
    if divisors.numel() < half:
        message = f"{divisors.numel()} divisors, but {half} pairs are rotated"
        return [Finding("error", rope_freqs.name, message)]
    worst = (divisors[:half] / implied - 1).abs().max().item()
    if worst < 1e-3:
        return [Finding("note", rope_freqs.name, "rotary divisors agree with the configuration")]
    message = (
        f"rotary divisors differ from the configuration's by up to {worst:.0%}; stepflash uses the configuration's "
        'unless loaded with rope_freqs="file" (llama.cpp uses the file\'s)'
    )
    return [Finding("warning", rope_freqs.name, message)]
