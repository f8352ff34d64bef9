"""`stepflash quantize` on the micro checkpoint: bytes, receipts, interruptions, memory.

Independent sources: packing a loaded model, the safetensors library, SHA-256 over the files, dense recomputation of
the quality from both whole models, the peak memory that the kernel reports.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stepflash.cli import main
from stepflash.errors import ConfigError, WeightsError
from stepflash.model.config import ModelConfig
from stepflash.tools import quantize
from stepflash.tools.quantize import edge_layers, make_recipe, quantize_checkpoint
from stepflash.tools.receipt import documents, measure
from stepflash.weights.checkpoint import open_checkpoint
from stepflash.weights.load import load_model
from stepflash.weights.receipt import RECEIPT_NAME, read_receipt, receipt_digest, verdict

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
RELEASED = Path(__file__).parents[1] / "fixtures" / "step-3.5-flash-config.json"
IDS = torch.arange(3, 60) * 7 % 512


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFLASH_DEBUG", raising=False)
    monkeypatch.delenv("STEPFLASH_ALLOW_KNOWN_BAD", raising=False)
    monkeypatch.setenv("STEPFLASH_TRUSTED_SIGNERS", "/nonexistent")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Micro in int4 by the command, with its receipt."""
    out = tmp_path_factory.mktemp("quantised") / "int4"
    # Random weights amplify every rounding: micro in 4 bits is honestly reported as bad, with status 1.
    assert (
        main(
            [
                "quantize",
                str(MICRO),
                str(out),
                "--format",
                "int4-g32",
                "--edge",
                "bf16",
                "--rounding",
                "nearest",
                "--json",
            ]
        )
        == 1
    )
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit_receipt(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    path = folder / RECEIPT_NAME
    values = json.loads(path.read_text())
    change(values)
    if sign:
        values["receipt_sha256"] = receipt_digest(values)
    path.write_text(json.dumps(values))


# ---- recipe -------------------------------------------------------------------------------------------------


def test_edges_of_the_released_model_are_those_that_broke() -> None:
    assert edge_layers(45) == (0, 1, 2, 3, 4, 43, 44)
    assert edge_layers(8) == (0, 7)
    recipe = make_recipe(
        ModelConfig.from_pretrained(RELEASED), "int4-g32", [("model.layers.43.*", "fp8")], "bf16"
    )
    name = "model.layers.{}.self_attn.q_proj.weight"
    formats = {i: recipe.format_name(name.format(i)) for i in (0, 4, 5, 42, 43, 44, 45, 47)}
    assert formats == {
        0: "bf16", 4: "bf16", 5: "int4_g32", 42: "int4_g32", 43: "fp8", 44: "bf16", 45: "int8", 47: "int8",
    }  # fmt: skip
    assert recipe.format_name("model.layers.20.self_attn.g_proj.weight") == "bf16"


def test_defaults_never_worsen_a_format() -> None:
    config = ModelConfig.from_pretrained(MICRO)
    assert make_recipe(config, "bf16").rules == ()
    assert "int8" not in dict(make_recipe(config, "int8").rules).values()
    assert not any("layers.0." in pattern for pattern, _ in make_recipe(config, "int4", edge="none").rules)


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        (("model.layers.99.*", "int8"), "matches no weight"),
        (("*.moe.up_proj.weight", "int8"), "run as one and must have one format"),
        (("*", "int3"), "unknown weight format 'int3'"),
    ],
)
def test_unusable_rules(protect: tuple[str, str], message: str, tmp_path: Path) -> None:
    source = open_checkpoint(MICRO)
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(source, tmp_path / "out", make_recipe(source.config, "int4", [protect]))
    assert not (tmp_path / "out").exists()


# ---- the checkpoint -----------------------------------------------------------------------------------------


def test_loads_as_what_packing_at_load_gives(made: Path) -> None:
    rules = dict(make_recipe(ModelConfig.from_pretrained(MICRO), "int4", edge="bf16").rules)
    expected = load_model(MICRO, progress=False, quantization="int4", protect=rules)
    actual = load_model(made, progress=False)
    assert torch.equal(actual.logits(IDS), expected.logits(IDS))
    assert torch.equal(actual.mtp_logits(IDS).nan_to_num(), expected.mtp_logits(IDS).nan_to_num())


def test_other_programs_can_read_the_file(made: Path) -> None:
    (file,) = made.glob("*.safetensors")
    tensors = load_file(file)
    quantization = json.loads((made / "config.json").read_text())["quantization_config"]["tensors"]
    name = "model.layers.3.moe.up_proj.weight"
    assert quantization[name] == {"format": "int4_g32", "shape": [8, 64, 128]}
    # 4 bits and a float16 scale for 32 weights: 4.5 bits each.
    assert tensors["model.layers.3.moe.up_proj.qweight"].shape == (8, 64 * 128 * 9 // 16)
    source = load_file(MICRO / "model-00001.safetensors")
    kept = [
        n for n in source if "embed" in n or "norm" in n or "router" in n or n.endswith("moe.gate.weight")
    ]
    assert all(torch.equal(tensors[n], source[n]) for n in kept)
    assert len(kept) == len([n for n in tensors if not n.endswith("qweight")])
    assert (made / "tokenizer.json").read_bytes() == (MICRO / "tokenizer.json").read_bytes()


def test_an_output_is_no_source_and_is_not_overwritten(made: Path, tmp_path: Path) -> None:
    recipe = make_recipe(ModelConfig.from_pretrained(MICRO), "int8")
    with pytest.raises(WeightsError, match="is already quantised"):
        quantize_checkpoint(open_checkpoint(made), tmp_path / "again", recipe)
    with pytest.raises(ConfigError, match="exists already and is not empty"):
        quantize_checkpoint(open_checkpoint(MICRO), made, recipe)


@pytest.mark.parametrize("interrupted_after", [0, 30, 100])
def test_resuming_gives_the_same_bytes(
    interrupted_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(MICRO)
    recipe = make_recipe(source.config, "int8")
    tensors = quantize_checkpoint(source, tmp_path / "whole", recipe, shard_bytes=1 << 20)

    write, count = quantize._write_tensor, 0

    def failing(*arguments: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count > interrupted_after:
            raise KeyboardInterrupt
        return write(*arguments)

    parts = tmp_path / "parts"
    monkeypatch.setattr(quantize, "_write_tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, parts, recipe, shard_bytes=1 << 20)
    monkeypatch.setattr(quantize, "_write_tensor", write)
    with pytest.raises(ConfigError, match="another source or recipe"):
        quantize_checkpoint(source, parts, make_recipe(source.config, "int4"))
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert (len(finished) > 0) == (interrupted_after == 100)
    resumed = quantize_checkpoint(source, parts, recipe, shard_bytes=1 << 20)
    assert resumed == tensors
    assert all((parts / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


# ---- the receipt --------------------------------------------------------------------------------------------


def test_receipt_lists_the_digests_of_the_files(made: Path) -> None:
    receipt = read_receipt(made)
    assert receipt is not None
    (file,) = made.glob("*.safetensors")
    for name, tensor in load_file(file).items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert receipt.digests[name.replace("qweight", "weight")] == hashlib.sha256(raw).hexdigest()
    assert receipt.is_good is False
    assert verdict(receipt).startswith("bad: KL ")


def test_quality_is_that_of_the_whole_models(made: Path) -> None:
    token_ids, origin = documents(MICRO)
    quality = measure(open_checkpoint(MICRO), open_checkpoint(made), token_ids, origin)
    exact, packed = load_model(MICRO, "float32"), load_model(made, "float32")
    p = torch.cat([exact.logits(ids) for ids in token_ids]).log_softmax(-1)
    q = torch.cat([packed.logits(ids) for ids in token_ids]).log_softmax(-1)
    assert quality.num_tokens == len(p)
    assert quality.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=2e-3)
    assert quality.top1_agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=5e-3
    )
    drafts = [
        torch.cat([model.mtp_logits(ids)[2, : len(ids) - 3].argmax(-1) for ids in token_ids])
        for model in (exact, packed)
    ]
    assert quality.mtp_top1_agreement[2] == pytest.approx(
        float((drafts[0] == drafts[1]).float().mean()), abs=5e-3
    )


def test_protected_layers_have_little_error_of_their_own(made: Path) -> None:
    receipt = read_receipt(made)
    assert receipt is not None
    layers = receipt.values["quality"]["layers"]
    errors = [layer["error"] for layer in layers]
    assert max(errors[0], errors[7]) < 0.01 < 0.1 < min(errors[1:7])
    assert [layer["routing"] is None for layer in layers] == [True, True] + [False] * 6


def test_what_does_not_pass_says_what_was_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights amplify every rounding: micro at 4 bits is far from its original."""
    out = tmp_path / "out"
    assert main(["quantize", str(MICRO), str(out), "--rounding", "nearest"]) == 1
    told = capsys.readouterr().out
    assert "did not pass: wanted are a mean KL of at most 0.15 and an agreement of at least 85%" in told


def test_a_flipped_bit_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = copy.glob("*.safetensors")
    for place in (0.3, 0.9999):  # a packed tensor, and one of the floats at the end
        raw = bytearray(file.read_bytes())
        raw[int(len(raw) * place)] ^= 1
        file.write_bytes(raw)
        with pytest.raises(WeightsError, match=f"not the bytes that .*{RECEIPT_NAME} lists"):
            load_model(copy, progress=False)
        assert main(["inspect", str(copy), "--verify"]) == 2
        raw[int(len(raw) * place)] ^= 1
        file.write_bytes(raw)
    load_model(copy, progress=False)
    capsys.readouterr()


def test_an_edited_receipt_is_refused(copy: Path) -> None:
    edit_receipt(copy, lambda values: values["quality"].update(passed=True), sign=False)
    with pytest.raises(WeightsError, match="was changed after it was made"):
        load_model(copy, progress=False)
    (copy / RECEIPT_NAME).write_text("[]")
    with pytest.raises(WeightsError, match="not a receipt"):
        load_model(copy, progress=False)


def test_good_unknown_and_bad(
    copy: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING, "stepflash")
    load_model(copy, progress=False)
    assert "POOR QUALITY: bad: KL" in caplog.text
    assert main(["inspect", str(copy)]) == 1
    assert "bad: KL" in capsys.readouterr().out

    caplog.clear()
    edit_receipt(copy, lambda values: values["quality"].update(passed=True))
    load_model(copy, progress=False)
    assert "unknown: its receipt is not signed" in caplog.text
    assert "QUALITY" not in caplog.text
    assert main(["inspect", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["receipt"]["is_good"] is True

    edit_receipt(copy, lambda values: values.update(quality=None))
    assert verdict(read_receipt(copy)) == "unknown: its receipt has digests but no measurement"
    (copy / RECEIPT_NAME).unlink()
    load_model(copy, progress=False)
    assert f"unknown: it has no {RECEIPT_NAME}" in caplog.text
    assert verdict(read_receipt(copy)) == "unknown: no receipt"


# ---- while loading ------------------------------------------------------------------------------------------


def test_tasks_of_nano_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One prompt of each task; int8 answers nearly as well as the original, which is far above guessing."""
    command = ["quantize", "nano", str(tmp_path / "out"), "--format", "int8", "--no-measure", "--json"]
    assert main([*command, "--tasks", "1"]) == 0
    assert "stepflash-receipt.json" not in caplog.text  # the receipt is not there yet
    told = json.loads(capsys.readouterr().out)["tasks"]
    assert told == read_receipt(tmp_path / "out").values["tasks"]
    for tier, least in (("easy", 0.7), ("hard", 0.45)):
        before, after = told[tier]["before"], told[tier]["after"]
        assert before["items"] == after["items"] >= 30
        assert before["exact"] > least
        assert abs(after["exact"] - before["exact"]) < 0.15
    assert main(["quantize", str(MICRO), str(tmp_path / "micro"), "--tasks", "1"]) == 2
    assert "nano's tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "micro").exists()
    assert main(["quantize", "nano", str(tmp_path / "few"), "--tasks", "-1"]) == 2
    assert capsys.readouterr().err == "stepflash: error: --tasks must be 0 or more, got -1\n"


def test_texts_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, message in (("no.txt", "cannot read: No such file"), ("latin.txt", "is not text in UTF-8")):
        for option in ("--text", "--calibration"):
            command = ["quantize", str(MICRO), str(tmp_path / "out"), option, str(tmp_path / name)]
            assert main(command) == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantization_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12", "--raw", "--json"]
    command = ["generate", str(MICRO), "--prompt", "one two", *options]
    assert main([*command, "--quantization", "int4-g64"]) == 0
    answer = json.loads(capsys.readouterr().out)
    model = load_model(MICRO, "float32", progress=False, quantization="int4_g64")
    ids = list(answer["prompt_token_ids"])
    for token_id in answer["token_ids"]:
        assert token_id == int(model.logits(torch.tensor(ids))[-1].argmax())
        ids.append(token_id)
    assert main([*command, "--quantization", "int3"]) == 2
    assert "unknown weight format 'int3'" in capsys.readouterr().err


# ---- memory -------------------------------------------------------------------------------------------------

MEMORY_PROGRAM = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from stepflash.tools.quantize import make_recipe, quantize_checkpoint
from stepflash.weights.checkpoint import open_checkpoint
from stepflash.weights.load import load_model

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

source, out = Path(sys.argv[1]), Path(sys.argv[2])
# What the libraries take once: kernels, and torch's own tables for a network without memory.
load_model(sys.argv[4], progress=False, quantization="int8")
start = peak()
if sys.argv[3] == "write":
    checkpoint = open_checkpoint(source)
    quantize_checkpoint(checkpoint, out, make_recipe(checkpoint.config, "int8"), shard_bytes=64 << 20)
else:
    load_model(out, progress=False)
print(peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """250 MB of weights are quantised within 100 MB, and loaded within their own size."""
    from stepflash.weights.random_checkpoint import Size, write_random_checkpoint

    size = Size(
        hidden=512, layers=4, dense=1, experts=52, top_k=4, expert_inter=512, shared_inter=64, inter=512, heads=4,
        sliding_heads=4, kv_heads=2, head_dim=64, window=32, vocab=512, context=4096, rope_original=256, mtp=0,
    )  # fmt: skip
    write_random_checkpoint(tmp_path / "source", size, shard_bytes=64 << 20)
    stored = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors")) / 2**20
    assert stored > 230

    def growth(what: str) -> float:
        command = [sys.executable, "-c", MEMORY_PROGRAM, tmp_path / "source", tmp_path / "out", what, MICRO]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)

    assert growth("write") < 100
    packed = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) / 2**20
    # Beside the weights: huge pages are whole, and the reader's buffer.
    assert growth("load") < packed + 30
