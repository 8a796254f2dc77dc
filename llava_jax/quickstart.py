"""The main job at small size on real pictures: tower, alignment, tuning, evaluation, and a picture of the answers."""

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import llava_jax
from llava_jax.convert.card import read_card
from llava_jax.convert.folder import TOKENIZER, read_parameters, write_model_folder
from llava_jax.data.easy_vqa import (
    Question,
    by_picture,
    caption_records,
    picture_folder,
    picture_name,
    question_records,
    questions,
    reading_records,
)
from llava_jax.data.records import Turn
from llava_jax.data.small_tokenizer import train_tokenizer
from llava_jax.data.templates import MISTRAL
from llava_jax.drawing import draw_answers, draw_losses
from llava_jax.errors import UserError
from llava_jax.inference.generate import Sampling, generate
from llava_jax.inference.model import Model, Processor, load, read_images
from llava_jax.sizes import QUICKSTART_VOCABULARY
from llava_jax.train.config import load_config
from llava_jax.train.loop import train
from llava_jax.train.metrics import read_metrics
from llava_jax.train.mirror import make_folder

# Questions answered at a time: enough to keep two cores busy, little memory.
EVAL_BATCH = 256
STAGES = {"tower": "captions", "decoder": "texts", "align": "captions", "tune": "questions"}
# Questions that the decoder learns to read on, and those that are asked of pictures in stage 2.
NUM_READING = 56_000
NUM_QUESTIONS = 26_000


def quickstart(workdir: str, *, seed: int) -> None:
    """Trains a small LLaVA on the easy-vqa pictures and says how well it answers; goes on where it was stopped.

    Leaves `model/`, `answers.png`, `loss.png`, `evaluation.json` and each stage's run in `workdir`.

    Raises:
      UserError: the easy-vqa package or the configs are not there.
    """
    start = time.perf_counter()
    root = Path(workdir)
    configs = Path(llava_jax.__file__).parents[1] / "configs"
    if not configs.is_dir():
        raise UserError(f"The quickstart runs from a clone, which has configs/; {str(configs)!r} does not exist.")
    if "://" in workdir:
        raise UserError(f"The quickstart's --workdir must be a local folder; got {workdir!r}.")
    make_folder(workdir)
    data, pictures = root / "data", root / "data" / "pictures"
    runs = {}
    for stage, records in STAGES.items():
        overrides = [
            f"seed={seed}",
            f"data.image_root={pictures}",
            f"data.tokenizer={data / 'tokenizer'}",
            f"data.records={data / f'{records}.json'}",
        ]
        if stage == "align":
            overrides += [f"init.tower={root / 'tower'}", f"init.decoder={root / 'decoder'}"]
        if stage == "tune":
            overrides += [f"init.{part}={root / 'align'}" for part in ("tower", "projector", "decoder")]
        runs[stage] = load_config(str(configs / f"quickstart_{stage}.py"), tuple(overrides))
    done = data / "done"
    if not done.is_file() or done.read_text() != str(seed):
        _write_data(data, seed=seed)
        done.write_text(str(seed))
    if not pictures.exists():
        # Not there yet, or the package has moved.
        pictures.unlink(missing_ok=True)
        pictures.symlink_to(picture_folder())
    for stage, config in runs.items():
        train(config, str(root / stage), name=stage)
    _export(root)
    _evaluate_and_draw(root)
    print(f"Took {time.perf_counter() - start:.0f} s. Ask it yourself:")
    picture = pictures / picture_name("test", 0)
    command = Path(sys.executable).with_name("llava-jax")
    print(f'  {command} generate --model {root / "model"} --image {picture} --prompt "what color is the shape?"')
    print((root / "result.txt").read_text().strip())


def _write_data(data: Path, *, seed: int) -> None:
    """Records in LLaVA's format and a tokenizer trained on their text, all from the training split."""
    data.mkdir(parents=True, exist_ok=True)
    captions = caption_records("train")
    asked = question_records("train", count=NUM_QUESTIONS, seed=seed)
    texts = reading_records("train", count=NUM_READING, seed=seed)
    for name, records in {"captions": captions, "texts": texts, "questions": asked}.items():
        (data / f"{name}.json").write_text(json.dumps(records, indent=1))
    words = [" ".join(span.text for span in MISTRAL.render([Turn("user", "?"), Turn("assistant", "!")]))]
    words += [f" {turn['value']}" for record in captions + texts for turn in record["conversations"]]
    train_tokenizer(words, data / "tokenizer", vocab_size=QUICKSTART_VOCABULARY)


def _export(root: Path) -> None:
    """The tuned model as a folder of its own."""
    tuned = root / "tune"
    card = dataclasses.replace(read_card(tuned), label="easy-vqa quickstart")
    write_model_folder(
        str(root / "model"),
        card,
        read_parameters(str(tuned)),
        tokenizer=str(tuned / TOKENIZER),
        source="trained from random weights on easy-vqa 1.0 by llava-jax quickstart",
    )


def _evaluate_and_draw(root: Path) -> None:
    """Asks every test question alone, with and without its picture, and writes down what came out."""
    model, processor = load(str(root / "model"))
    asked = questions("test")
    answers = _ask(model, processor, asked, is_blind=False)
    blind = _ask(model, processor, asked, is_blind=True)
    frequent = _most_frequent(questions("train"), asked)
    table = {
        "model": _accuracies(asked, answers),
        "picture withheld": _accuracies(asked, blind),
        "most frequent answer": _accuracies(asked, frequent),
    }
    (root / "evaluation.json").write_text(
        json.dumps({"accuracy": table, "answers": list(zip(map(list, asked), answers, strict=True))}, indent=1)
    )
    kinds = list(table["model"])
    print(f"\n{'accuracy, %':<22}" + "".join(f"{kind:>12}" for kind in kinds))
    for name, by_kind in table.items():
        print(f"{name:<22}" + "".join(f"{100 * by_kind[kind]:>12.2f}" for kind in kinds))
    counts = collections.Counter(question.kind for question in asked)
    counts |= {"all": len(asked), "not yes/no": len(asked) - counts["yes/no"]}
    print(f"{'questions':<22}" + "".join(f"{counts[kind]:>12}" for kind in kinds) + "\n")
    draw_answers(root / "answers.png", asked, answers)
    draw_losses(root / "loss.png", {stage: read_metrics(str(root / stage)) for stage in STAGES})
    (root / "result.txt").write_text(
        f"accuracy: {100 * table['model']['all']:.2f} % of {len(asked)}; "
        f"blind {100 * table['picture withheld']['all']:.2f} %\n"
    )


def _ask(model: Model, processor: Processor, asked: Sequence[Question], *, is_blind: bool) -> list[str]:
    """Greedy answers, each question in a conversation of its own."""
    pictures = {
        picture: read_images([str(picture_folder() / picture_name("test", picture))]) for picture in by_picture(asked)
    }
    answers: list[str] = []
    sampling = Sampling(max_new_tokens=4)
    label = "evaluating, blind" if is_blind else "evaluating"
    for i in tqdm(range(0, len(asked), EVAL_BATCH), desc=label, unit="batch", disable=None):
        # The last batch is filled up with questions asked before, so that one compilation serves all.
        batch = [asked[j % len(asked)] for j in range(i, i + EVAL_BATCH)]
        prompts = [
            processor.ask([Turn("user", question.text)], [] if is_blind else pictures[question.picture])
            for question in batch
        ]
        answers += [answer.text for answer in generate(model, processor, prompts, sampling)]
    return answers[: len(asked)]


def _most_frequent(seen: Sequence[Question], asked: Sequence[Question]) -> list[str]:
    """For each question the answer that its words had most often in training."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in seen:
        counts[question.text][question.answer] += 1
    return [counts[question.text].most_common(1)[0][0] if counts[question.text] else "" for question in asked]


def _accuracies(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Share of exactly right answers, by kind of question and over all."""
    right: dict[str, list[bool]] = {kind: [] for kind in ("shape", "colour", "yes/no", "not yes/no", "all")}
    for question, answer in zip(asked, answers, strict=True):
        is_right = answer == question.answer
        right[question.kind].append(is_right)
        right["all"].append(is_right)
        if question.kind != "yes/no":
            right["not yes/no"].append(is_right)
    return {kind: sum(values) / len(values) for kind, values in right.items()}
