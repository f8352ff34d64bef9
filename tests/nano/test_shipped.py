"""The weights inside the package: they load, they are small, and they do what the model card says (end to end)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import stepflash
from stepflash.engine.llm import LLM
from stepflash.engine.request import SamplingParams
from stepflash.nano.evaluate import evaluate, summary
from stepflash.weights.hub import resolve_model
from stepflash.weights.load import load_model

REASONING = ("add", "multiply", "expression", "word_problem", "sort", "count_letters", "weekday")
TOOLS = ("tool_call", "tool_answer", "tool_chain")


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM("nano", max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=2048)


def card_rows(tier: str) -> dict[str, float]:
    text = (resolve_model("nano") / "README.md").read_text(encoding="utf-8")
    table = text.split(f"| {tier} tier |")[1].split("\n\n")[0]
    return {
        name: float(exact)
        for name, exact in re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) \|", table, re.MULTILINE)
    }


def test_the_package_stays_small() -> None:
    folder = resolve_model("nano")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40e6


def test_the_model_card_meets_the_first_release() -> None:
    easy = card_rows("easy")
    assert len(easy) >= 30
    assert sum(easy.values()) / len(easy) >= 0.8


def test_held_out_answers_are_as_good_as_the_card_says(nano: LLM) -> None:
    results = evaluate(nano, (*REASONING, *TOOLS), 12, ("easy",))
    accuracy, _ = summary(results, "easy")
    expected = sum(card_rows("easy")[name] for name in (*REASONING, *TOOLS)) / len((*REASONING, *TOOLS))
    # 12 prompts a task: one standard error of the mean over ten tasks is about 0.03.
    assert accuracy >= expected - 0.1


def test_a_step_accepts_two_drafts_of_three_on_reasoning_text(nano: LLM) -> None:
    _, accepted = summary(evaluate(nano, REASONING, 8, ("easy",), depth=3), "easy")
    assert accepted >= 2.0


def test_a_chat_answer_has_a_thought_and_a_result(nano: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=200)
    message = nano.chat([{"role": "user", "content": "What is 17 + 25?"}], sampling_params=sampling)[
        0
    ].message
    assert message is not None
    assert message.content == "42"
    assert message.reasoning


def test_what_the_readme_and_the_page_suggest_is_answered_right(nano: LLM) -> None:
    root = Path(stepflash.__file__).parent
    page = (root / "server" / "page" / "chat.js").read_text(encoding="utf-8")
    readme = (root.parent / "README.md").read_text(encoding="utf-8")
    asked = re.findall(r'"(.+)",', page.split("const EXAMPLES = [")[1].split("]")[0])
    asked += re.findall(r'"content": "(.+?)"', readme)
    right = {
        "What is 17 * 23?": "391",
        "What day of the week is 10 days after Monday?": "Thursday",
        "How many times does the letter a occur in banana?": "3",
        "What is 412 - 187?": "235",
        "What is 17 + 25?": "42",
        "Sort 9, 2, 5": "2, 5, 9",
    }
    conversations = [[{"role": "user", "content": question}] for question in asked]
    answers = nano.chat(conversations, sampling_params=SamplingParams(temperature=0.0))
    assert {q: a.message.content for q, a in zip(asked, answers, strict=True) if a.message} == right


def test_speculation_changes_nothing(nano: LLM) -> None:
    prompts = ["<|im_start|>user\nSort these numbers: 9, 2, 5<|im_end|>\n<|im_start|>assistant\n<think>\n"]
    answers = {
        depth: nano.generate(prompts, SamplingParams(temperature=0.0, max_tokens=80, draft_depth=depth))[
            0
        ].token_ids
        for depth in (0, 1, 2, 3)
    }
    assert all(tokens == answers[0] for tokens in answers.values())


def test_padding_rows_are_never_sampled(nano: LLM) -> None:
    assert nano.tokenizer is not None
    assert nano.tokenizer.vocab_size < nano.model.config.vocab_size
    sampling = SamplingParams(temperature=5.0, max_tokens=200, seed=1, ignore_eos=True)
    output = nano.generate([[0]], sampling)[0]
    assert max(output.token_ids) < nano.tokenizer.vocab_size


def test_fp8_experts_load_like_the_released_repository(tmp_path: Path) -> None:
    model = load_model("nano", dtype="float32", progress=False)
    weight = model.state_dict()["model.layers.1.moe.gate_proj.weight"]
    assert weight.dtype == torch.float32
    # e4m3 times a block scale: at most 255 values in a block of 128 x 128.
    assert weight[0, :128, :128].unique().numel() <= 255
