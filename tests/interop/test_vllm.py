"""vLLM on our safetensors: the same log-probabilities as ours, by way of a GGUF."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.llama_cpp import ENV_DIR
from stepflash.tools.conversion import convert
from stepflash.weights.load import load_model
from stepflash.weights.random_checkpoint import SIZES, write_random_checkpoint

pytestmark = pytest.mark.client
PYTHON = Path(os.environ.get("STEPFLASH_VLLM_PYTHON", ENV_DIR / "vllm" / "bin" / "python"))
SCRIPT = Path(__file__).with_name("vllm_logprobs.py")


@pytest.mark.skipif(
    not PYTHON.is_file(), reason="no vLLM; `python benchmarks/peers.py --prepare --peers vllm` installs it"
)
def test_logprobs_of_a_re_exported_checkpoint(tmp_path: Path) -> None:
    """Without clamps, for which it has no kernel on the CPU; the head dimension of 64 is its smallest."""
    write_random_checkpoint(tmp_path / "source", SIZES["tiny"])
    convert(tmp_path / "source", tmp_path / "m.gguf", "gguf", "bf16")
    folder = tmp_path / "back"
    convert(tmp_path / "m.gguf", folder, "safetensors", "bf16")
    config = json.loads((folder / "config.json").read_text())
    config |= {name: [0.0] * len(config[name]) for name in ("swiglu_limits", "swiglu_limits_shared")}
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.randint(7, config["vocab_size"], (160,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))

    command = [PYTHON, "-P", SCRIPT, folder, tmp_path / "ids.json", tmp_path / "out.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads((tmp_path / "out.json").read_text())
    theirs = torch.tensor([[row[str(token)] for token in range(config["vocab_size"])] for row in rows])
    ours = load_model(folder, dtype="float32").logits(ids)[:-1].log_softmax(-1)
    difference = (theirs - ours).abs().max()
    print(f"\ntiny without clamps: log-probabilities differ from vLLM's by at most {difference:.2g}")
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert difference < 2e-4
