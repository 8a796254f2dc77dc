"""Mixes: which records of which sources a run reads, and how often."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llava_jax.data.records import Record
from llava_jax.data.sources import Source, Tfds, fingerprint_source, open_source
from llava_jax.errors import DataError

_SAMPLING = re.compile(r"all|(first|end|random):([1-9][0-9]*)(%?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some records of one source.

    `sampling` is `all`, `first:N`, `end:N` or `random:N`, where `N%` is that share, rounded up. `weight` says how
    often an epoch reads each of them: 2.5 is twice, and a half of them, drawn anew every epoch, once more.
    """

    source: str | Tfds
    sampling: str = "all"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if _SAMPLING.fullmatch(self.sampling) is None:
            raise ValueError(
                f"sampling must be all, first:N, end:N or random:N, N a whole number from 1 on, perhaps with %; "
                f"got {self.sampling!r}."
            )
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be more than 0; got {self.weight}.")

    def choose(self, num_records: int, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
        """Numbers of the chosen records, in order; all of them if there are fewer than N.

        Example, of 5 records:    first:2 -> [0, 1]    end:2 -> [3, 4]    first:50% -> [0, 1, 2]
        """
        found = _SAMPLING.fullmatch(self.sampling)
        assert found is not None, "checked when it was made"
        how, number, percent = found.groups()
        if how is None:
            return np.arange(num_records)
        count = min(math.ceil(int(number) * num_records / 100) if percent else int(number), num_records)
        if how == "random":
            return np.sort(rng.choice(num_records, count, replace=False))
        return np.arange(count) if how == "first" else np.arange(num_records - count, num_records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Parts, one after another; `seed` decides what `random` draws."""

    parts: tuple[Part, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("A mix must have at least one part; got none.")
        if self.seed < 0:
            raise ValueError(f"The seed of a mix must be at least 0; got {self.seed}.")


Choice = str | Tfds | Mix
"""What `data.records` may be."""


def as_mix(records: Choice) -> Mix:
    """What a config names: a mix, one source, a list `/p/{a,b}.json`, or a YAML file of parts.

    Lists and YAML files are those of LLaVA-NeXT (`LazySupervisedDataset`, llava/train/train.py): names between braces
    are split at commas and nothing else; `datasets` are entries of `json_path` and `sampling_strategy`, paths relative
    to where the run is started. Beyond it an entry may have a `weight` and the file a `seed`; what that code would
    pass over, such as an unknown strategy, is refused.

    Raises:
      DataError: the YAML file is missing or of another form.
    """
    if isinstance(records, Mix):
        return records
    if isinstance(records, Tfds):
        return Mix(parts=(Part(source=records),))
    if records.endswith((".yaml", ".yml")):
        return _read_yaml(records)
    if found := re.fullmatch(r"(.*)\{(.*)\}(.*)", records):
        before, names, after = found.groups()
        return Mix(parts=tuple(Part(source=f"{before}{name}{after}") for name in names.split(",")))
    return Mix(parts=(Part(source=records),))


def _read_yaml(path: str) -> Mix:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"data.records must name a YAML file of datasets; {path!r} is none: {error}.") from None
    try:
        top = _fields(content, {"datasets": list, "seed": int})
        parts = []
        for entry in top["datasets"]:
            fields = _fields(entry, {"json_path": str, "sampling_strategy": str, "weight": (int, float)})
            sampling, weight = fields.get("sampling_strategy", "all"), float(fields.get("weight", 1))
            parts.append(Part(source=fields["json_path"], sampling=sampling, weight=weight))
        return Mix(parts=tuple(parts), seed=top.get("seed", 0))
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path!r} must hold 'datasets', a list of json_path, sampling_strategy and weight, and perhaps a 'seed': "
            f"{error}"
        ) from None


def _fields(value: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected {', '.join(kinds)}; got {value!r:.80}")
    for name, field in value.items():
        if name not in kinds or not isinstance(field, kinds[name]):
            raise ValueError(f"{name}: {field!r:.80} is not understood")
    return value


class Records:
    """The records of a mix, numbered through: its parts one after another."""

    def __init__(self, mix: Mix, sources: tuple[Source, ...]):
        self.mix, self.sources = mix, sources
        # A part that is all there, the rule, needs no list of its numbers.
        self._chosen = [
            None if part.sampling == "all" else part.choose(len(source), np.random.default_rng((mix.seed, number)))
            for number, (part, source) in enumerate(zip(mix.parts, sources, strict=True))
        ]
        lengths = [
            len(source) if chosen is None else len(chosen) for source, chosen in zip(sources, self._chosen, strict=True)
        ]
        self.starts = np.cumsum([0, *lengths])

    @property
    def path(self) -> str:
        """Says in messages where the records come from."""
        return ", ".join(source.path for source in self.sources[:3]) + (", ..." if len(self.sources) > 3 else "")

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """How often an epoch reads each record."""
        return np.repeat([part.weight for part in self.mix.parts], np.diff(self.starts))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `Refused` if it is malformed."""
        part, number = self.locate(index)
        return self.sources[part][number]

    def locate(self, index: int) -> tuple[int, int]:
        """The part of a record, and its number in that part's source."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        number, chosen = index - int(self.starts[part]), self._chosen[part]
        return part, number if chosen is None else int(chosen[number])

    def describe(self, index: int) -> str:
        part, number = self.locate(index)
        return f"record {number}" + (f" of {self.sources[part].path}" if len(self.sources) > 1 else "")


def open_records(mix: Mix, *, as_written: bool, spans: Mapping[int, np.ndarray] | None = None) -> Records:
    """The records of a mix; `spans` by part, where they were found before.

    Raises:
      DataError: a source is missing or cannot be read.
    """
    sources = []
    for number, part in enumerate(mix.parts):
        found = None if spans is None else spans.get(number)
        sources.append(open_source(part.source, as_written=as_written, spans=found))
    return Records(mix, tuple(sources))


def fingerprint_mix(mix: Mix) -> str:
    """Says whether two mixes are of the same records, wherever their files lie."""
    parts = [(fingerprint_source(part.source), part.sampling, part.weight) for part in mix.parts]
    return hashlib.sha256(repr((parts, mix.seed)).encode()).hexdigest()
