"""Recipes: the published numbers, and a golden copy of every resolved config, so that a change shows in review.

`python -m tests.test_recipes` writes the golden copies anew.
"""

import json
from pathlib import Path

import pytest

from llava_jax.train.config import flatten, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden" / "configs"


def resolved(path: Path) -> str:
    """Every field of a config in JSON; generated data lies in another folder on every machine."""
    leaves = flatten(load_config(str(path)))
    for name in ("data.records", "data.image_root", "data.tokenizer"):
        if Path(leaves[name]).is_absolute():
            leaves[name] = f"<generated>/{Path(leaves[name]).name}"
    return json.dumps(leaves, indent=1, default=str) + "\n"


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_resolves_to_its_golden_copy(path: Path):
    golden = GOLDEN / f"{path.stem}.json"
    assert golden.is_file(), "no golden copy: run `python -m tests.test_recipes` and commit what it writes"
    assert json.loads(resolved(path)) == json.loads(golden.read_text())


def test_every_golden_copy_has_its_config():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {path.stem for path in CONFIGS}


# Learning rate, projector's own rate, records a step, epochs, image mode, what is trained, LoRA rank and alpha: from
# scripts/{pretrain,finetune_full_schedule}.sh and scripts/v1_5/*.sh of the original.
PUBLISHED = {
    "llava_v1_pretrain_7b": (2e-3, None, 128, 1, "square", "projector", None),
    "llava_v1_finetune_7b": (2e-5, None, 128, 3, "square", "projector decoder", None),
    "llava15_pretrain_7b": (1e-3, None, 256, 1, "square", "projector", None),
    "llava15_pretrain_13b": (1e-3, None, 256, 1, "square", "projector", None),
    "llava15_finetune_7b": (2e-5, None, 128, 1, "pad", "projector decoder", None),
    "llava15_finetune_13b": (2e-5, None, 128, 1, "pad", "projector decoder", None),
    "llava15_finetune_lora_7b": (2e-4, 2e-5, 128, 1, "pad", "projector decoder", (128, 256)),
    "llava15_finetune_lora_13b": (2e-4, 2e-5, 128, 1, "pad", "projector decoder", (128, 256)),
    "llava15_finetune_qlora_7b": (2e-4, 2e-5, 128, 1, "pad", "projector decoder", (128, 256)),
    "llava15_finetune_7b_one_gpu": (2e-5, None, 128, 1, "pad", "projector decoder", None),
    "llava15_finetune_task_13b": (2e-5, None, 128, 1, "pad", "projector decoder", None),
    "llava15_finetune_task_lora_13b": (2e-4, 2e-5, 128, 1, "pad", "projector decoder", (128, 256)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name: str):
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    rate, projector_rate, records, epochs, mode, trained, lora = PUBLISHED[name]
    assert config.optim.learning_rate == rate
    assert config.optim.part_learning_rates == ({} if projector_rate is None else {"projector": projector_rate})
    assert (config.data.batch_records, config.data.epochs) == (records, epochs)
    assert config.data.rows.image_mode == mode
    assert config.data.rows.template.name == ("plain" if "pretrain" in name else "v1")
    assert " ".join(config.trainable) == trained
    assert (config.lora and (config.lora.rank, config.lora.alpha)) == lora
    assert config.lora is None or config.lora.dropout == 0.05
    # What all of them share: transformers' defaults, and no clipping (the DeepSpeed configs leave it out).
    optim = config.optim
    assert (optim.warmup_ratio, optim.weight_decay, optim.clip_norm) == (0.03, 0.0, None)
    assert (optim.b1, optim.b2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (config.seed, config.compute_dtype, config.data.rows.length) == (42, "bfloat16", 2048)
    assert config.data.shuffle


if __name__ == "__main__":
    for path in CONFIGS:
        (GOLDEN / f"{path.stem}.json").write_text(resolved(path))
