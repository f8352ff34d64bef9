"""A byte-level BPE tokenizer with the released model's special tokens, small enough to train in a test run."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from stepflash.gguf_file import write_gguf

SPECIAL_TOKENS = [
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
    "<|im_start|>",
    "<|im_end|>",
]
PLAIN_ADDED_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 12345 + 678 = 13023!\n\n",
    "def f(x):\n    return x['key'] + 3.14159  # it's done\r\n\tif x >= 10: print(\"ok\")\n",
    "Gr\u00fc\u00dfe aus K\u00f6ln; na\u00efve caf\u00e9 \u2014 \u20ac20 \u2026 \U0001f600\U0001f468\u200d\U0001f469",
    "\u6211\u4eec\u4eca\u5929\u53bb\u6771\u4eac\u30bf\u30ef\u30fc\u3092\u898b\u3066\u3044\u308b \uc548\ub155 "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
] * 4


@pytest.fixture(scope="session")
def step_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and the three config files, laid out as in the released repository."""
    folder = tmp_path_factory.mktemp("step")
    backend = tokenizers.Tokenizer(models.BPE())
    # Written here once more, from the published DeepSeek-V3 tokenizer.json, not imported from the package.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), "isolated"),
            pre_tokenizers.Split(
                Regex(
                    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
                    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED_TOKENS])
    backend.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": {"model_type": "step3p5", "vocab_size": 640, "bos_token_id": 0, "eos_token_id": [1]},
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]},
        "tokenizer_config.json": {
            "bos_token": {"content": SPECIAL_TOKENS[0], "special": True},
            "eos_token": SPECIAL_TOKENS[1],
            "add_bos_token": False,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def step_gguf(step_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as llama.cpp's converter writes it, with 640 rows and without tensors."""
    num_rows = 640
    description = json.loads((step_folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(num_rows)]
    types = [5] * num_rows  # unused
    for text, index in description["model"]["vocab"].items():
        tokens[index], types[index] = text, 1
    for token in description["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = 3 if token["special"] else 4  # control, user defined
    metadata = {
        "general.architecture": "step35",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in description["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.chat_template": "gguf {{ bos_token }}",
    }
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, metadata, {})
    return path
