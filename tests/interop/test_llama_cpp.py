"""Stock llama.cpp on our GGUF files: the same greedy tokens and log-probabilities, the same quantised bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepflash import LLM, SamplingParams
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.gguf_file import GGUFTensor, read_gguf
from stepflash.tools.conversion import convert
from stepflash.weights.hub import NANO_FOLDER
from stepflash.weights.load import load_model
from stepflash.weights.random_checkpoint import write_random_checkpoint
from tests.interop.llama import Llama, find_libraries
from tests.tools.test_conversion import MICRO, SMALL
from tests.weights.variants import golden

pytestmark = pytest.mark.client


@pytest.fixture(scope="module")
def llama() -> Llama:
    folder = find_libraries()
    if folder is None:
        pytest.skip("there is no llama.cpp; `make test-interop` builds it and sets STEPFLASH_LLAMA_LIB")
    return Llama(folder)


def test_micro_has_the_same_greedy_tokens(llama: Llama, tmp_path: Path) -> None:
    """Golden ids of transformers: 160 prompt tokens, 96 greedy ones; the rotary scaling bites from 64 on."""
    ids = golden("transformers-logits-f32", "ids").long()
    convert(MICRO, tmp_path / "m.gguf", "gguf", "f32")
    theirs = torch.from_numpy(llama.logits(tmp_path / "m.gguf", ids.tolist())).log_softmax(-1)
    ours = load_model(MICRO, dtype="float32").logits(ids).log_softmax(-1)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    difference = (theirs - ours).abs().amax(-1)
    print(f"\nmicro f32: log-probabilities differ by at most {difference.max():.2g}")
    assert difference.max() < 0.02  # its keys and values are float16


@pytest.mark.parametrize(
    ("type_name", "wanted"), [("f32", 1.0), ("bf16", 0.95), ("q8_0", 0.95), ("q4_k_s", 0.95)]
)
@pytest.mark.parametrize("keep_mtp", [True, False])
def test_nano_says_the_same(
    llama: Llama, tmp_path: Path, type_name: str, wanted: float, keep_mtp: bool
) -> None:
    """Our greedy answers from the same file. Below float32 it rounds activations, which turns near ties."""
    file = tmp_path / "nano.gguf"
    convert("nano", file, "gguf", type_name, keep_mtp=keep_mtp)
    tokenizer = Tokenizer.from_pretrained(NANO_FOLDER)
    llm = LLM(str(file), dtype="float32" if type_name == "f32" else "bfloat16")
    sampling = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)
    same = total = 0
    for question in ("What is 17 + 25?", "Sort 9, 2, 5, 1, 7"):
        prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n")
        answer = list(llm.generate([prompt], sampling, progress=False)[0].token_ids)
        theirs = llama.logits(file, prompt + answer).argmax(-1)[len(prompt) - 1 : -1]
        same += int((theirs == answer).sum())
        total += len(answer)
    print(f"\nnano {type_name}: {same} of {total} greedy tokens are the same")
    assert same >= wanted * total


def test_template_and_ends_are_read(llama: Llama, tmp_path: Path) -> None:
    convert("nano", tmp_path / "nano.gguf", "gguf", "bf16")
    tokenizer = Tokenizer.from_pretrained(NANO_FOLDER)
    template, ends = llama.template_and_ends(tmp_path / "nano.gguf")
    assert template == ChatTemplate.from_pretrained(NANO_FOLDER, tokenizer).sources["default"]
    assert tokenizer.eos_token_ids <= ends


def test_micro_has_the_same_tokenizer(llama: Llama, tmp_path: Path) -> None:
    convert(MICRO, tmp_path / "m.gguf", "gguf", "bf16")
    tokenizer = Tokenizer.from_pretrained(MICRO)
    for text in ("def f(x): return x + 1", "It's 12345\n\n  caf\u00e9 \u6b65<|im_end|>\n"):
        assert llama.tokenize(tmp_path / "m.gguf", text) == tokenizer.encode(text)


def raw(tensor: GGUFTensor) -> bytes:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.num_bytes)


@pytest.mark.parametrize(("type_name", "file_type"), [("q8_0", 7), ("q4_k_s", 14)])
def test_quantised_files_are_those_of_llama_quantize(
    llama: Llama, tmp_path: Path, type_name: str, file_type: int
) -> None:
    """Types and bytes of every tensor."""
    write_random_checkpoint(tmp_path / "small", replace(SMALL, layers=6, mtp=2))
    convert(tmp_path / "small", tmp_path / "f32.gguf", "gguf", "f32")
    convert(tmp_path / "small", tmp_path / "ours.gguf", "gguf", type_name)
    llama.quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", file_type)
    ours, theirs = (read_gguf(tmp_path / f"{name}.gguf").tensors for name in ("ours", "theirs"))
    types = [{name: tensor.type_name for name, tensor in side.items()} for side in (ours, theirs)]
    assert types[0] == types[1]
    assert [name for name in ours if raw(ours[name]) != raw(theirs[name])] == []
