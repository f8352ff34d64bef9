"""transformers on our safetensors: the same logits as ours, by way of a GGUF."""

import json
from pathlib import Path

import pytest
import torch

from stepflash.tools.conversion import convert
from stepflash.weights.load import load_model
from tests.tools.test_conversion import MICRO
from tests.weights.variants import golden

pytestmark = [pytest.mark.client, pytest.mark.filterwarnings("ignore")]


def test_logits_of_a_re_exported_checkpoint(tmp_path: Path) -> None:
    """Its native code knows the architecture only as the text half of Step-3.7: a wrapper config is put around."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; `make test-interop` installs it"
    )
    convert(MICRO, tmp_path / "m.gguf", "gguf", "bf16")
    convert(tmp_path / "m.gguf", tmp_path / "back", "safetensors", "bf16")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    wrapper = {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "image_token_id": 3,
        "text_config": config,
        "tie_word_embeddings": False,
        "vision_config": {"width": 64, "layers": 1, "heads": 2, "image_size": 56, "patch_size": 14},
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
    }
    (tmp_path / "back" / "config.json").write_text(json.dumps(wrapper))
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "back", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = golden("transformers-logits-f32", "ids").long()
    with torch.no_grad():
        theirs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    ours = load_model(MICRO, dtype="float32").logits(ids).log_softmax(-1)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert (theirs - ours).abs().max() < 2e-4
