"""Pictures of a run for people: a sheet of answers, and the curves of the losses."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_jax.data.easy_vqa import Question, picture_folder, picture_name

COLUMNS, ROWS = 6, 4
RIGHT, WRONG = "#1b7f3b", "#c02626"


def draw_answers(path: Path, asked: Sequence[Question], answers: Sequence[str]) -> None:
    """A sheet of test pictures with question, answer and right answer; up to a quarter of it shows mistakes."""
    from matplotlib.figure import Figure

    rng = random.Random(0)
    wrong = [i for i, question in enumerate(asked) if answers[i] != question.answer]
    right = [i for i, question in enumerate(asked) if answers[i] == question.answer]
    chosen = rng.sample(wrong, min(len(wrong), COLUMNS * ROWS // 4))
    chosen += rng.sample(right, min(len(right), COLUMNS * ROWS - len(chosen)))
    rng.shuffle(chosen)
    figure = Figure(figsize=(2.5 * COLUMNS, 2.9 * ROWS), layout="constrained")
    mistakes = f"{len(wrong)} of {len(asked)} answers are wrong; mistakes are shown more often than they occur"
    figure.suptitle(f"Test questions and the model's answers ({mistakes})")
    for axes, i in zip(figure.subplots(ROWS, COLUMNS).flat, chosen, strict=False):
        question = asked[i]
        axes.imshow(Image.open(picture_folder() / picture_name("test", question.picture)))
        is_right = answers[i] == question.answer
        mark = "right" if is_right else f"WRONG, is {question.answer}"
        words = question.text.split()
        half = (len(words) + 1) // 2
        text = f"{' '.join(words[:half])}\n{' '.join(words[half:])}\n{answers[i] or '(nothing)'}: {mark}"
        axes.set_title(text, fontsize=9, color=RIGHT if is_right else WRONG)
        for spine in axes.spines.values():
            spine.set(color=RIGHT if is_right else WRONG, linewidth=2)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=100)


def draw_losses(path: Path, stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One curve a stage: the loss of every step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(stages), 3.5), layout="constrained")
    for axes, (stage, lines) in zip(figure.subplots(1, len(stages)), stages.items(), strict=True):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
