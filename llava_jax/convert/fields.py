"""Fields of a checkpoint's JSON files: each is used, known not to change a number, or refused by name."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from llava_jax.errors import CheckpointError

# Bookkeeping, generation and training fields of transformers' configs: no forward pass reads them.
# fmt: off
INERT = frozenset((
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "name_or_path", "auto_map",
    "task_specific_params", "return_dict", "output_hidden_states", "output_attentions", "use_cache",
    "torchscript", "use_bfloat16", "pruned_heads", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder",
    "add_cross_attention", "cross_attention_hidden_size", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "finetuning_task", "tokenizer_class", "prefix", "decoder_start_token_id", "sep_token_id",
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "tf_legacy_loss", "initializer_range", "initializer_factor",
    "logit_scale_init_value", "pretraining_tp", "ignore_index", "image_seq_length", "attn_implementation",
    "max_sequence_length", "unsloth_version", "use_flash_attn",
))
# fmt: on


class Fields:
    """A JSON object whose fields are taken one by one; `done` refuses what nobody took."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be a JSON object; got {values!r:.80}. Download it again.")
        self.values: dict[str, Any] = dict(values)
        self.where = where
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """The value of a field; absent or null is the default, and without one it is refused."""
        self._taken.add(name)
        value = self.values.get(name)
        if value is None:
            if default is ...:
                raise CheckpointError(f"{self.where} must have the field {name}; it does not. Download it again.")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.where}: {name} must be {kind.__name__}; got {value!r:.80}. Mend it.")
        if kind is float and not math.isfinite(value):
            raise CheckpointError(f"{self.where}: {name} must be finite; got {value}. Mend it.")
        return value

    def must_be(self, name: str, *known: Any) -> None:
        """Refuses any value of a field but the known ones and null, since the numbers would differ."""
        self._taken.add(name)
        value = self.values.get(name)
        if value is not None and value not in known:
            raise CheckpointError(
                f"{self.where}: {name}={value!r:.80} is not supported, only "
                f"{' or '.join(map(repr, known)) or 'null'}. This checkpoint would give other numbers here."
            )

    def nested(self, name: str) -> "Fields":
        return Fields(self.take(name, dict, {}), f"{self.where}: {name}")

    def ignore(self, *names: str) -> None:
        """Fields that are known to change nothing in this place."""
        self._taken.update(names)

    def done(self) -> None:
        """Refuses fields that nobody took; null, false and empty ones ask for nothing."""
        unknown = [
            f"{name}={value!r:.40}"
            for name, value in self.values.items()
            if name not in self._taken
            and name not in INERT
            and not name.startswith("_")
            and (value not in (None, False, "", 0) and value != [] and value != {})
        ]
        if unknown:
            raise CheckpointError(
                f"{self.where} has fields that are not known here and may change the numbers: "
                f"{', '.join(unknown)}. Remove those that do not matter."
            )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file of a checkpoint."""
    return Fields(read_json(path), str(path)).values


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose names is there twice: readers differ in which they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"it names {', '.join([name for name, times in names.items() if times > 1][:8])} twice")
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file of a checkpoint.

    Raises:
      CheckpointError: there is no such file, or it is no JSON.
    """
    try:
        return json.loads(path.read_text(), object_pairs_hook=no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Download the checkpoint again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON: {error}. Download it again.") from error
