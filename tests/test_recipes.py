"""Recipes: the published numbers, and a golden copy of every resolved config, so that a change shows in review.

`python -m tests.test_recipes` writes the golden copies anew.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.index import Index
from llava_jax.data.mix import Mix, Part, Records
from llava_jax.data.records import RecordFile
from llava_jax.train.config import flatten, load_config
from llava_jax.train.loop import plan_data
from llava_jax.train.optim import make_schedule

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
    assert (config.seed, config.compute_dtype) == (42, "bfloat16")
    # No caption comes near the original's 2048 tokens, so rows of them are as long as packs well.
    assert config.data.rows.length == (1792 if name.startswith("llava15_pretrain") else 2048)
    assert config.data.shuffle


@pytest.mark.parametrize(
    ("name", "num_records", "steps", "warmup"),
    [
        ("llava15_pretrain_7b", 558_128, 2_181, 66),
        pytest.param("llava15_pretrain_13b", 558_128, 2_181, 66, marks=pytest.mark.nightly),
        ("llava15_finetune_7b", 665_298, 5_198, 156),
        *(
            pytest.param(f"llava15_finetune_{name}", 665_298, 5_198, 156, marks=pytest.mark.nightly)
            for name in ("13b", "lora_7b", "lora_13b", "qlora_7b", "7b_one_gpu")
        ),
    ],
)
def test_a_recipe_takes_the_published_steps(name: str, num_records: int, steps: int, warmup: int):
    """Of the published records, four of a thousand refused; on 16 devices, whose number decides the padding alone."""
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    rng = np.random.default_rng(0)
    tokens = rng.integers(590, 640 if "pretrain" in name else 1400, num_records).astype(np.int32)
    tokens[rng.choice(num_records, num_records // 250, replace=False)] = 0
    source = RecordFile("drawn", np.zeros((num_records, 2), np.int64))
    index = Index(
        records=Records(Mix(parts=(Part(source="drawn"),)), (source,)),
        tokens=tokens,
        tiles=(tokens > 0).astype(np.int32),
        refused={},
        fingerprint="",
    )
    plan = plan_data(config, index, rows_multiple=16 * config.accumulation)
    assert plan.num_steps == steps
    taken = np.add.reduceat(np.diff(plan.starts), np.arange(0, plan.num_rows, plan.rows_per_step))
    records = config.data.batch_records
    assert taken.tolist() == [records] * (steps - 1) + [num_records - (steps - 1) * records]
    rate = make_schedule(config.optim, steps)
    rates = np.array([rate(step) for step in (0, warmup - 1, warmup, steps - 1)], np.float32)
    # transformers' cosine: 3 % of the steps up, the highest rate at their end, then down to nothing.
    assert rates[0] == 0.0
    assert rates[2] == np.float32(config.optim.learning_rate) > rates[1] > rates[3] > 0


if __name__ == "__main__":
    for path in CONFIGS:
        (GOLDEN / f"{path.stem}.json").write_text(resolved(path))
