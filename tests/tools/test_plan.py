"""The planner against numbers derived by hand, and properties of what fits."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.cli import build_parser
from stepflash.engine.kv_cache import LOOKAHEAD_SLOTS, CacheLimits, plan_blocks
from stepflash.errors import ConfigError
from stepflash.gguf_file import read_gguf
from stepflash.model.config import ModelConfig
from stepflash.tools.architectures import RELEASED_CONFIG
from stepflash.tools.conversion import convert
from stepflash.tools.hardware import MACHINES, Machine, parse_quantity
from stepflash.tools.plan import Request, kv_cache_bytes, make_plan, plans, recommend, splits, step_ceiling
from stepflash.tools.quantize import make_recipe, quantize_checkpoint
from stepflash.tools.serving_commands import commands, engine_cache_bytes
from stepflash.tools.weight_formats import FORMATS, sizes, weight_bytes_read, without_mtp
from stepflash.weights.checkpoint import open_checkpoint
from stepflash.weights.names import ROPE_FREQS, expected_tensors, keeps_float32, layer_of
from stepflash.weights.random_checkpoint import write_random_checkpoint
from stepflash.weights.safetensors import read_header
from tests.tools.test_conversion import SMALL

CONFIG = ModelConfig.from_pretrained(RELEASED_CONFIG)
SPARK = MACHINES["dgx-spark"]


def plan_of(machine: Machine, format_name: str, **request: object):  # type: ignore[no-untyped-def]
    return make_plan(CONFIG, "released", machine, FORMATS[format_name], Request(**request))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "trunk", "mtp"),
    [
        # 196,956,130,368 parameters, 809,390,336 in each of three modules.
        ("bf16", 2 * 196_956_130_368, 2 * 3 * 809_390_336),
        # Routed experts 190,253,629,440 in one byte and 4 bytes for each 128 x 128; the rest in two bytes.
        ("fp8", 190_253_629_440 * (1 + 4 / 16384) + 2 * (196_956_130_368 - 190_253_629_440), 6 * 809_390_336),
    ],
)
def test_weights(name: str, trunk: float, mtp: float) -> None:
    stored = sizes(CONFIG, FORMATS[name])
    assert stored.trunk == pytest.approx(trunk, rel=1e-9)
    assert stored.mtp == pytest.approx(mtp, rel=1e-9)


def test_released_fp8_repository_is_208_6_gb() -> None:
    stored = sizes(CONFIG, FORMATS["fp8"])
    assert round((stored.trunk + stored.mtp) / 1e9, 1) == 208.6


def test_released_q4_k_s_file_is_111_5_gb() -> None:
    """It has no prediction modules; with them a block more has a 5-bit `ffn_down`."""
    assert round(sizes(without_mtp(CONFIG), FORMATS["q4_k_s"]).trunk / 1e9, 1) == 111.5
    assert sizes(CONFIG, FORMATS["q4_k_s"]).trunk - sizes(without_mtp(CONFIG), FORMATS["q4_k_s"]).trunk == (
        288 * 4096 * 1280 * (176 - 144) / 256 + 4096 * 1280 * (176 - 144) / 256
    )


def test_eight_bits_edges_are_counted() -> None:
    """int4 in groups of 128 (4.125 bits) but for what is protected, in 8.125: by hand, within a thousandth."""
    expert_layer = 3 * 4096 * 1280 * 289  # one shared
    attention = sum(4096 * (2 * layer.num_heads + 16) * 128 for layer in CONFIG.trunk_layers)
    dense = 3 * 3 * 4096 * 11264
    embedding = 128896 * 4096
    low = 38 * expert_layer + attention * 38 / 45
    high = (
        4 * expert_layer + dense + attention * 7 / 45 + embedding
    )  # the LM head is as large as the embedding
    by_hand = low * 4.125 / 8 + high * 8.125 / 8 + 2 * embedding + 4 * 42 * 288 * 4097
    assert sizes(CONFIG, FORMATS["int4-g128"]).trunk == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g128", "q8_0", "q4_k_s"])
def test_sizes_are_those_of_written_files(tmp_path: Path, name: str) -> None:
    """Quantise and convert a small model, prediction modules included, and weigh the tensors."""
    write_random_checkpoint(tmp_path / "source", SMALL)
    source = open_checkpoint(tmp_path / "source")
    stored = sizes(source.config, FORMATS[name])
    if FORMATS[name].made_by == "convert":
        convert(tmp_path / "source", tmp_path / "m.gguf", "gguf", name)
        tensors = read_gguf(tmp_path / "m.gguf").tensors
        found = sum(tensor.num_bytes for key, tensor in tensors.items() if key != ROPE_FREQS)
    else:
        quantize_checkpoint(source, tmp_path / "out", make_recipe(source.config, name, edge="int8"))
        entries = [e for file in (tmp_path / "out").glob("*.safetensors") for e in read_header(file)]
        # The planner counts the float32 of memory for what the checkpoint holds in bf16.
        found = sum(
            e.num_bytes * (2 if keeps_float32(e.name) and e.dtype_name == "BF16" else 1) for e in entries
        )
    assert stored.trunk + stored.mtp == found


def test_keys_and_values_of_256k() -> None:
    # 12 GiB + 66 MiB, and 6 MiB for the prediction modules.
    request = Request(context=262144)
    assert kv_cache_bytes(CONFIG, request) == 12 * 2**30 + 72 * 2**20
    assert kv_cache_bytes(CONFIG, replace(request, with_mtp=False)) == 12 * 2**30 + 66 * 2**20
    assert kv_cache_bytes(CONFIG, replace(request, streams=3)) == 3 * (12 * 2**30 + 72 * 2**20)
    assert kv_cache_bytes(CONFIG, replace(request, kv_dtype="float8_e4m3fn")) == 6 * 2**30 + 36 * 2**20
    # int8: a float32 scale for the 128 values of a head
    assert kv_cache_bytes(CONFIG, replace(request, kv_dtype="int8")) == (6 * 2**30 + 36 * 2**20) * 132 / 128


def test_one_token_reads_the_active_parameters() -> None:
    # 11,459,365,952 active with the LM head, two bytes each.
    assert weight_bytes_read(CONFIG, FORMATS["bf16"], 1, 0) == pytest.approx(2 * 11_459_365_952)


def test_ceiling_of_a_273_gb_box() -> None:
    # Of the 11.459e9 active weights the head takes 6.5625 bits, the router 32, the `ffn_down` of six blocks and the
    # `attn_v` of four 5.5, the rest 4.5; one token's keys and values are 45 layers x 4 KiB: nothing.
    head, router = 128896 * 4096, 42 * 288 * 4097
    five_bits = 3 * 4096 * 11264 + 3 * 9 * 4096 * 1280 + 4 * 4096 * 1024
    bits = (11_459_365_952 - head - router) * 4.5 + head * 6.5625 + router * 32 + five_bits
    assert weight_bytes_read(CONFIG, FORMATS["q4_k_s"], 1, 0) == pytest.approx(bits / 8, rel=1e-3)
    ceiling = step_ceiling(CONFIG, FORMATS["q4_k_s"], Request(context=1), 0, 273e9)
    assert ceiling.tokens_per_second == pytest.approx(40.2, abs=0.05)
    assert ceiling.bound == "bandwidth"


def test_ceiling_with_one_draft() -> None:
    # Two tokens touch 1 - (280/288)^2 = 5.478 % of 190.254e9; with 6.1745e9 other active parameters and a module of
    # 809.4e6: 17.407e9 x 2 bytes. 1.8 tokens of it at 1 TB/s, context 1.
    bytes_read = 2 * (190_253_629_440 * (1 - (280 / 288) ** 2) + 6_174_542_912 + 809_390_336)
    ceiling = step_ceiling(CONFIG, FORMATS["bf16"], Request(context=1, acceptance=0.8), 1, 1e12)
    assert ceiling.tokens_per_second == pytest.approx(1.8 * 1e12 / bytes_read, rel=1e-4)


def test_drafts_that_are_never_accepted_only_cost() -> None:
    request = Request(acceptance=0.0)
    speeds = [step_ceiling(CONFIG, FORMATS["q4_k_s"], request, d, 273e9).tokens_per_second for d in range(4)]
    assert speeds == sorted(speeds, reverse=True)


def test_many_streams_are_bound_by_compute() -> None:
    slow = step_ceiling(CONFIG, FORMATS["fp8"], Request(streams=4096, context=512), 3, 4e12, rate=148e12)
    assert slow.bound == "compute"


@pytest.mark.parametrize(
    ("machine", "best"),
    [
        ("mac-studio-128", "q4_k_s"),
        ("dgx-spark", "q4_k_s"),
        ("strix-halo", "q4_k_s"),
        ("h100", None),
        ("h200", "q4_k_s"),
        ("4xh100", "fp8"),
        ("8xh100", "bf16"),
        ("8xh800", "bf16"),
        ("8xh20", "bf16"),
        ("cpu-desktop", "q4_k_s"),
    ],
)
def test_what_fits_on_the_presets(machine: str, best: str | None) -> None:
    result = recommend(MACHINES[machine], plans(CONFIG, "released", MACHINES[machine], Request()))
    assert (result.format if result else None) == best


def test_refused_by_weights() -> None:
    limit = plan_of(SPARK, "bf16").limit
    assert limit.quantity == "weights"
    assert limit.needed == pytest.approx(2 * 199_384_301_376)
    assert limit.available == 121e9
    assert "398.8 GB > 121.0 GB usable of 128.0 GB" in limit.reason


def test_refused_weights_name_what_would_do() -> None:
    reason = plan_of(SPARK, "int4-g32").limit.reason
    size = int(re.search(r"; (\d+) GB of memory would do$", reason)[1])
    assert plan_of(replace(SPARK, memory_bytes=size * 1e9), "int4-g32").fits
    assert not plan_of(replace(SPARK, memory_bytes=(size - 1) * 1e9), "int4-g32").fits
    h100 = MACHINES["h100"]
    count = int(re.search(r"; (\d+) such GPUs would do$", plan_of(h100, "fp8").limit.reason)[1])
    assert plan_of(replace(h100, count=count), "fp8").fits
    assert not plan_of(replace(h100, count=count // 2), "fp8").fits


@settings(max_examples=60)
@given(num_bytes=st.floats(1, 1e13), kind=st.sampled_from(["gpu", "unified", "cpu"]))
def test_memory_for_is_the_inverse_of_usable(num_bytes: float, kind: str) -> None:
    machine = Machine(name="m", kind=kind, memory_bytes=1e9, bandwidth=None)
    enough = replace(machine, memory_bytes=machine.memory_for(num_bytes))
    assert enough.usable_bytes == pytest.approx(num_bytes)


def test_refused_by_keys_and_values() -> None:
    plan = plan_of(SPARK, "q4_k_s", context=262144)
    assert plan.limit.quantity == "kv_cache"
    assert plan.limit.needed == 12 * 2**30 + 72 * 2**20
    assert plan.limit.needed > plan.limit.available
    assert f"1 x {plan.max_context:,} tokens" in plan.limit.reason
    # The longest context that is named fits, one more token does not.
    assert plan_of(SPARK, "q4_k_s", context=plan.max_context).fits
    assert not plan_of(SPARK, "q4_k_s", context=plan.max_context + 1).fits


def test_refused_by_context() -> None:
    limit = plan_of(MACHINES["8xh200"], "bf16", context=262145).limit
    assert (limit.quantity, limit.needed, limit.available) == ("context", 262145, 262144)


def test_refused_by_split() -> None:
    limit = plan_of(MACHINES["8xh100"], "fp8", split="tensor").limit
    assert limit.quantity == "split"
    assert "1280 expert columns / 8 = 160, not a multiple of the 128 x 128 block of fp8" in limit.reason


@pytest.mark.parametrize(
    ("format_name", "count", "legal"),
    [
        ("fp8", 2, {"tensor", "expert", "layers"}),  # 640 = 5 x 128
        ("fp8", 4, {"expert", "layers"}),  # 320
        ("fp8", 8, {"expert", "layers"}),  # 160
        ("bf16", 8, {"tensor", "expert", "layers"}),
        ("bf16", 16, {"tensor", "expert", "layers"}),  # 80 columns, 18 experts, 8 key-value heads twice
        ("int4-g32", 8, {"tensor", "expert", "layers"}),  # 160 = 5 x 32
        ("int4-g64", 8, {"expert", "layers"}),  # 160 = 2.5 x 64
        ("int4-g128", 4, {"expert", "layers"}),  # 320 = 2.5 x 128
        ("bf16", 3, {"layers"}),  # 64 query heads
        ("bf16", 5, {"layers"}),
        ("bf16", 64, set()),  # 96 query heads and 45 layers
    ],
)
def test_splits(format_name: str, count: int, legal: set[str]) -> None:
    found = splits(CONFIG, FORMATS[format_name], count)
    assert {split.kind for split in found if split.is_legal} == legal
    assert all(split.reasons for split in found if not split.is_legal)


@pytest.mark.parametrize("with_mtp", [True, False])
def test_whole_layers_are_shared_unevenly(with_mtp: bool) -> None:
    """Twelve full layers in 45 or 48, in bf16 over seven devices: the fullest by brute force from the shapes."""
    machine = Machine(name="m", kind="gpu", memory_bytes=1e12, bandwidth=None, count=7)
    plan = plan_of(machine, "bf16", split="layers", context=100_000, with_mtp=with_mtp)
    config = CONFIG if with_mtp else without_mtp(CONFIG)
    count = 48 if with_mtp else 45
    fullest = 0
    for device in range(7):
        here = range(count * device // 7, count * (device + 1) // 7)
        shapes = {
            name: math.prod(shape)
            for name, shape in expected_tensors(config).items()
            if layer_of(name) in here
            or (device == 0 and "embed_tokens" in name)
            or (device == 6 and name in ("model.norm.weight", "lm_head.weight"))
        }
        positions = sum(100_000 if layer % 4 == 0 and layer < 45 else 512 for layer in here)
        fullest = max(fullest, 2 * sum(shapes.values()) + 4096 * positions)
    assert plan.device_bytes == fullest
    assert plan.device_bytes > (plan.weight_bytes + plan.mtp_bytes + plan.kv_bytes) / 7


def test_groups_of_streams_overlap_in_a_pipeline() -> None:
    """Two devices with half of the layers each: two streams run at the speed of one, both together at twice that."""
    machine = Machine(name="m", kind="gpu", memory_bytes=1e12, bandwidth=1e12, count=2)
    one, two = (
        plan_of(machine, "bf16", split="layers", streams=n).ceilings[0].tokens_per_second for n in (1, 2)
    )
    assert two == pytest.approx(2 * one)
    alone = replace(machine, count=1)
    assert one == pytest.approx(plan_of(alone, "bf16").ceilings[0].tokens_per_second)


def test_reasons_of_splits_name_the_numbers() -> None:
    reasons = " ".join(reason for split in splits(CONFIG, FORMATS["bf16"], 7) for reason in split.reasons)
    for text in (
        "64 query heads",
        "96 query heads",
        "8 key-value heads",
        "1280 expert columns",
        "288 experts",
    ):
        assert text in reasons


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    memory=st.floats(1e9, 1e12),
    more=st.floats(0, 1e12),
    context=st.integers(1, 262144),
    streams=st.integers(1, 64),
    kind=st.sampled_from(["gpu", "unified", "cpu"]),
)
def test_more_memory_never_fits_less(
    name: str, memory: float, more: float, context: int, streams: int, kind: str
) -> None:
    def plan(size: float):  # type: ignore[no-untyped-def]
        machine = Machine(name="m", kind=kind, memory_bytes=size, bandwidth=None)
        return plan_of(machine, name, context=context, streams=streams)

    small, large = plan(memory), plan(memory + more)
    assert large.fits >= small.fits
    assert large.max_context >= small.max_context
    assert large.max_streams >= small.max_streams
    for result in (small, large):
        assert result.fits == (result.limit is None)
        assert result.fits == (result.device_bytes <= result.device_available_bytes)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    context=st.integers(1, 262143),
    depth=st.integers(0, 3),
    streams=st.integers(1, 16),
)
def test_longer_context_is_never_faster(name: str, context: int, depth: int, streams: int) -> None:
    def speed(length: int) -> float:
        request = Request(context=length, streams=streams)
        return step_ceiling(CONFIG, FORMATS[name], request, depth, 1e12).tokens_per_second

    assert speed(context + 1) <= speed(context)


def test_commands_carry_the_plan() -> None:
    machine = MACHINES["8xh100"]
    request = Request(context=131072, streams=4)
    lines = {
        c.engine: c
        for c in commands(CONFIG, plan_of(machine, "fp8", context=131072, streams=4), machine, request)
    }
    assert set(lines) == {"vllm", "sglang"}
    vllm = lines["vllm"].line
    assert "--tensor-parallel-size 8 --enable-expert-parallel" in vllm
    assert "--max-model-len 131072 --max-num-seqs 4" in vllm
    assert vllm.endswith("--quantization fp8")
    assert "--ep-size 8" in lines["sglang"].line
    assert "--speculative-num-draft-tokens 4" in lines["sglang"].line
    assert all("not run here" in command.note for command in lines.values())


def test_commands_for_whole_layers_are_pipelines() -> None:
    """64 query heads do not divide by 3: tensor parallelism of 3 would be refused by both servers."""
    machine = Machine(name="m", kind="gpu", memory_bytes=80e9, bandwidth=None, count=3)
    plan = plan_of(machine, "fp8")
    assert plan.split.kind == "layers"
    vllm, sglang = commands(CONFIG, plan, machine, Request())
    assert "--pipeline-parallel-size 3" in vllm.line
    assert "--pp-size 3" in sglang.line
    for command in (vllm, sglang):
        assert not re.search("tensor-parallel|--tp-size|speculative|SPEC|num_nextn", command.line)
        assert "without drafts" in command.note


def test_printed_stepflash_commands_are_understood() -> None:
    """Every option of the commands exists, with such a value."""
    for name, kv_dtype in (("q4_k_s", "int8"), ("int4-g128", "bfloat16"), ("q8_0", "bfloat16")):
        machine = replace(SPARK, memory_bytes=512e9)
        request = Request(context=1000, kv_dtype=kv_dtype)
        plan = plan_of(machine, name, context=1000, kv_dtype=kv_dtype)
        for line in commands(CONFIG, plan, machine, request)[-1].line.split(" && "):
            program, *arguments = shlex.split(line)
            assert program == "stepflash"
            build_parser().parse_args(arguments)


def test_commands_of_a_small_machine() -> None:
    request = Request(context=1000, streams=3)
    found = commands(CONFIG, plan_of(SPARK, "q4_k_s", context=1000, streams=3), SPARK, request)
    assert [command.engine for command in found] == ["llama.cpp", "stepflash"]
    assert "-c 3000 -np 3" in found[0].line
    made = (
        "stepflash convert stepfun-ai/Step-3.5-Flash step-3.5-flash-q4_k_s.gguf --to gguf --type q4_k_s && "
    )
    assert all(
        command.line.startswith(made) for command in found
    )  # the released file has no prediction modules
    assert (
        "serve step-3.5-flash-q4_k_s.gguf --max-num-seqs 3 --max-model-len 1000 --kv-cache-gb"
        in found[1].line
    )


def test_commands_without_modules_use_the_released_file() -> None:
    request = Request(context=1000, with_mtp=False)
    plan = plan_of(SPARK, "q4_k_s", context=1000, with_mtp=False)
    lines = [command.line for command in commands(CONFIG, plan, SPARK, request)]
    assert all("step3.5_flash_Q4_K_S.gguf" in line and "convert" not in line for line in lines)


def test_packed_command_has_the_counted_edges() -> None:
    plan = plan_of(SPARK, "int4-g128", context=1000, kv_dtype="int8")
    line = commands(CONFIG, plan, SPARK, Request(context=1000, kv_dtype="int8"))[-1].line
    assert "--format int4-g128 --edge int8 && stepflash serve" in line
    assert line.endswith("--kv-dtype int8")


@pytest.mark.parametrize(("streams", "context"), [(1, 1000), (3, 4096), (16, 100)])
def test_the_engine_holds_what_the_command_promises(streams: int, context: int) -> None:
    """The budget is enough for all streams at full length, and a MiB less is not."""
    request = Request(context=context, streams=streams)
    budget = engine_cache_bytes(CONFIG, request)
    limits = CacheLimits(
        max_num_seqs=streams,
        max_model_len=context,
        max_batched_tokens=512,
        max_deferred_tokens=64,
        num_modules=3,
    )
    blocks = streams * math.ceil((context + LOOKAHEAD_SLOTS) / 16)
    assert plan_blocks(CONFIG, limits, budget)[0] >= blocks
    assert plan_blocks(CONFIG, limits, budget - 2**20)[0] < blocks
    assert budget > kv_cache_bytes(CONFIG, request)


@pytest.mark.parametrize(
    ("text", "value"),
    [("128GB", 128e9), ("111.5 GiB", 111.5 * 2**30), ("273GB/s", 273e9), ("4TB/s", 4e12), ("1024", 1024.0)],
)
def test_quantities(text: str, value: float) -> None:
    assert parse_quantity(text, "--memory") == value


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0GB", "12 XB", "1iB", "nan", "1e3GB"])
def test_wrong_quantities(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory must be a positive number"):
        parse_quantity(text, "--memory")


@pytest.mark.parametrize(
    "wrong", [{"context": 0}, {"streams": 0}, {"acceptance": 1.1}, {"kv_dtype": "x"}, {"split": "x"}]
)
def test_wrong_requests_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Request(**wrong)  # type: ignore[arg-type]
