"""Decode and prefill of the whole 196B architecture on one GPU, weights random and made on the card.

    python benchmarks/gpu_model.py [--format int4] [--layers N] [--streams 1,4,16] [--context 1024] [--json FILE]

The network has the shapes of Step-3.5-Flash and random codes and scales, so its text means nothing and no draft is
right, but every byte is read and every product made. int4 takes 112 GB and a card with 139 GiB; --layers leaves
layers out for smaller ones. Runs the engine as it is. Reports a decode step's median over --steps and, for a single
stream, the bytes that it must read (weights, keys and values) and their fraction of the bandwidth that a sum over
4 GiB reads. With more streams that depends on the experts they meet, and random weights route tokens alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import random_tiles
from stepflash.engine.config import EngineConfig
from stepflash.engine.core import EngineCore
from stepflash.engine.request import Request, SamplingParams
from stepflash.kernels import ops
from stepflash.kernels.formats import parse_format
from stepflash.model import cost
from stepflash.model.config import ModelConfig
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import empty_model, put
from stepflash.weights.quantized import DEFAULT_PROTECT, PackedWeight, Packer, pack_network

RELEASED = Path(__file__).parents[1] / "tests" / "fixtures" / "step-3.5-flash-config.json"


class RandomPacker(Packer):
    """Makes weights up on a device."""

    def __init__(self, format_name: str, device: str) -> None:
        super().__init__(format_name, DEFAULT_PROTECT)
        self.device = device

    def pack(self, name: str, weight: Tensor) -> PackedWeight:
        fmt = parse_format(self.format_name(name), weight.shape[-1])
        rows, columns = weight.shape[-2:]
        experts = weight.shape[0] if weight.dim() == 3 else 1
        packed = PackedWeight.__new__(PackedWeight)
        torch.nn.Module.__init__(packed)
        packed.fmt, packed.shape, packed.is_tiled = fmt, tuple(weight.shape), True
        tiles = random_tiles(fmt, experts, rows, columns, self.device)
        packed.register_buffer("packed", tiles if weight.dim() == 3 else tiles[0])
        return packed


def random_model(config: ModelConfig, format_name: str, device: str) -> Step3p5ForCausalLM:
    model = empty_model(config)
    packer = RandomPacker(format_name, device)
    pack_network(model, packer)
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        if name == "model.embed_tokens.weight":
            value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16)
        elif name.endswith("router_weight"):
            value = torch.randn(parameter.shape, device=device) / parameter.shape[-1] ** 0.5
        else:
            value = torch.zeros(parameter.shape, device=device)
        put(model, name, value)
    # Modules hold their weights in the ops' order, too; this makes them look again.
    return model.requires_grad_(False)._apply(lambda tensor: tensor).eval()


def first_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The same with fewer layers in the trunk; the prediction modules stay."""
    layers = (*config.layers[:count], *config.mtp_layers)
    return replace(config, num_layers=count, layers=layers)


def requests(config: ModelConfig, streams: int, context: int, steps: int, depth: int) -> list[Request]:
    generator = torch.Generator().manual_seed(streams)
    sampling = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True, draft_depth=depth)
    prompts = torch.randint(0, config.vocab_size, (streams, context), generator=generator).tolist()
    return [
        Request(request_id=f"{context}-{depth}-{i}", prompt_token_ids=tuple(p), sampling=sampling)
        for i, p in enumerate(prompts)
    ]


def run(
    core: EngineCore, config: ModelConfig, streams: int, context: int, steps: int, depth: int
) -> dict[str, Any]:
    """Prefill seconds, and the median of decode steps in which all streams take part."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for request in requests(config, streams, context, steps * (1 + depth) + 8, depth):
        core.add(request)
    while not core.is_decoding:
        core.step()
    torch.cuda.synchronize()
    prefill = time.perf_counter() - start
    seconds, tokens = [], []
    for _ in range(steps):
        start = time.perf_counter()
        outputs = core.step()
        seconds.append(time.perf_counter() - start)  # a step ends with its tokens on the host
        tokens.append(sum(len(output.token_ids) for output in outputs))
    for request in requests(config, streams, context, 1, depth):
        core.abort(request.request_id)
    step = statistics.median(seconds[3:])
    return {
        "streams": streams, "context": context, "draft_depth": depth, "step_ms": step * 1e3,
        "tokens_per_s": statistics.mean(tokens[3:]) / step, "tokens_per_step": statistics.mean(tokens[3:]),
        "prefill_tokens_per_s": streams * context / prefill,
    }  # fmt: skip


def step_bytes(config: ModelConfig, bits: float, context: int) -> float:
    """What a plain decode step of one sequence must read."""
    cached = cost.kv_bytes_per_token(config, 2) * context + cost.kv_bytes_per_sequence(config, 2)
    return cost.num_active_parameters(config) * bits / 8 + cached


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", default="int4")
    parser.add_argument("--layers", type=int, help="of the trunk; all 45 if left out")
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--context", default="1024", help="tokens of a prompt, several with commas")
    parser.add_argument("--depths", default="0,3", help="draft depths, for a single stream")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: `stepflash bench` measures the CPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bandwidth = ops.measure_bandwidth(4 << 30, device="cuda")
    config = ModelConfig.from_dict(json.loads(RELEASED.read_text()))
    if options.layers:
        config = first_layers(config, options.layers)
    start = time.perf_counter()
    with torch.inference_mode():
        model = random_model(config, options.format, "cuda")
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated() / 1e9
    print(
        f"{torch.cuda.get_device_name()}, {bandwidth / 1e9:.0f} GB/s read; {options.format}, "
        f"{config.num_layers} layers, {used:.1f} GB of weights made in {time.perf_counter() - start:.0f} s"
    )
    streams, contexts = ([int(n) for n in text.split(",")] for text in (options.streams, options.context))
    depths = [int(n) for n in options.depths.split(",")]
    core = EngineCore(
        model,
        EngineConfig(
            max_num_seqs=max(streams), max_num_batched_tokens=2048, prefix_caching=False,
            max_model_len=max(contexts) + 1024, kv_cache_bytes=12 << 30,
        ),
    )  # fmt: skip
    bits = parse_format(options.format, config.hidden_size).bits_per_weight
    rows = []
    print(
        f"{'streams':>8}{'context':>9}{'drafts':>8}{'step ms':>9}{'tok/s':>9}{'tok/step':>9}{'GB read':>9}"
        f"{'of read':>9}{'prefill tok/s':>15}"
    )
    for context in contexts:
        for count in streams:
            for depth in depths if count == 1 else [0]:
                run(core, config, count, 64, 6, depth)  # compiles and captures
                row = run(core, config, count, context, options.steps, depth)
                is_plain = count == 1 and not depth
                row["gb_read"] = step_bytes(config, bits, context) / 1e9 if is_plain else None
                row["of_read"] = row["gb_read"] * 1e12 / row["step_ms"] / bandwidth if is_plain else None
                rows.append(row)
                print(
                    f"{count:8}{context:9}{depth:8}{row['step_ms']:9.2f}{row['tokens_per_s']:9.1f}"
                    f"{row['tokens_per_step']:9.2f}"
                    + (f"{row['gb_read']:9.2f}{row['of_read']:9.2f}" if is_plain else f"{'':18}")
                    + f"{row['prefill_tokens_per_s']:15.0f}",
                    flush=True,
                )
    stats = core.stats()
    print(
        f"cache {stats.kv_total_bytes / 1e9:.2f} GB, "
        f"peak of the card {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    )
    if options.json:
        head = {"device": torch.cuda.get_device_name(), "bandwidth": bandwidth, "format": options.format}
        options.json.write_text(json.dumps(head | {"weights_gb": used, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
