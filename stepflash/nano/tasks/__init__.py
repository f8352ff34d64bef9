"""The tasks that nano learns: generators, their mixture over training, held-out sets and answer checks.

Everything is generated from a seed; nothing is downloaded. No torch here.
"""

from stepflash.nano.tasks.checking import check
from stepflash.nano.tasks.example import Example, Tier, belongs_to_held_out, belongs_to_training, turns
from stepflash.nano.tasks.mixture import TASKS, held_out, sample, training_example, weights
from stepflash.nano.tasks.rendering import completion, prompt_text, render

__all__ = [
    "TASKS",
    "Example",
    "Tier",
    "belongs_to_held_out",
    "belongs_to_training",
    "check",
    "completion",
    "held_out",
    "prompt_text",
    "render",
    "sample",
    "training_example",
    "turns",
    "weights",
]
