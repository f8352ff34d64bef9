"""Random checkpoints: sizes against the reference generator's figures, repeatable, loadable, with a tokenizer."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from stepflash.model.config import ModelConfig
from stepflash.weights.load import load_model
from stepflash.weights.random_checkpoint import SIZES, config_json, random_tensors, write_random_checkpoint
from tests.weights.variants import MICRO, micro_config, micro_tensors


@pytest.mark.parametrize(("name", "count"), [("micro", 2812144), ("tiny", 26460640), ("mini", 1778996864)])
def test_sizes(name: str, count: int) -> None:
    """Parameters of the reference generator's checkpoints of the same names, counted there tensor by tensor."""
    config = ModelConfig.from_dict(config_json(SIZES[name]))
    assert config.num_parameters(trunk=False) == count


def test_micro_layout_is_that_of_the_reference_checkpoint() -> None:
    """Another program wrote the fixture: same tensors, shapes, dtypes; spreads alike; same network."""
    raw = config_json(SIZES["micro"])
    config, reference = ModelConfig.from_dict(raw), ModelConfig.from_pretrained(MICRO)
    assert config.layers == reference.layers
    assert {k: v for k, v in micro_config().items() if raw.get(k, v) != v} == {"eos_token_id": [1, 2]}
    tensors, fixture = dict(random_tensors(config, seed=0)), micro_tensors()
    assert tensors.keys() == fixture.keys()
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (fixture[name].shape, fixture[name].dtype)
        if tensor.numel() > 1000:
            ratio = tensor.float().std() / fixture[name].float().std()
            assert ratio == pytest.approx(1, rel=0.1), name


def test_seed_decides_everything(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(config_json(SIZES["micro"]))
    first, again, other = (dict(random_tensors(config, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_written_folder_loads_and_has_a_tokenizer(tmp_path: Path) -> None:
    count = write_random_checkpoint(tmp_path, SIZES["micro"], seed=5, shard_bytes=1 << 20)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = load_model(tmp_path, dtype="float32")
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.logits(torch.arange(20)).isfinite().all()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Grüße, 步! \x00\n\t<|im_start|>"
    ids = tokenizer.encode(text).ids
    assert ids[-1] == 3
    assert len(ids) == len(text.removesuffix("<|im_start|>").encode()) + 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 7 + 256 <= model.config.vocab_size
