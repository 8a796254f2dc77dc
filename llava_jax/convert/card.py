"""`model.json`: what a model folder or workdir holds, so that nothing is guessed from its name."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from llava_jax.data.images import ImageMode, check_mode
from llava_jax.data.templates import find_template
from llava_jax.errors import CheckpointError, UserError
from llava_jax.shapes import ClipConfig, LlavaConfig, ModelConfig

FILE = "model.json"
FORMAT = 1
_KINDS: dict[str, type] = {"llava": LlavaConfig, "clip": ClipConfig}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Shapes, and how text and pictures were prepared in training; `template` is None where none was used.

    `mm_use_im_start_end`: every picture stands between `<im_start>` and `<im_end>`.
    """

    model: ModelConfig
    template: str | None
    image_mode: ImageMode
    label: str
    mm_use_im_start_end: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.model, LlavaConfig):
            check_mode(self.image_mode, self.model)


def write_card(folder: str | Path, card: ModelCard) -> None:
    kind = next(name for name, cls in _KINDS.items() if isinstance(card.model, cls))
    content = {"format": FORMAT, "kind": kind, **dataclasses.asdict(card)}
    Path(folder, FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_card(folder: str | Path) -> ModelCard:
    """The card of a folder; every field must be there and known.

    Raises:
      CheckpointError: there is no card, or it is damaged or of a newer format.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        raise CheckpointError(
            f"A model folder or workdir must hold {FILE}; {str(folder)!r} does not. Give the folder that "
            "`llava-jax quickstart` or `train` wrote."
        )
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}; a newer llava_jax wrote it")
        kind = _KINDS[content.pop("kind")]
        card = _build(ModelCard, content | {"model": _build(kind, content["model"])})
        if card.template is not None:
            find_template(card.template)
        return card
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise CheckpointError(f"{path} must describe a model: {error}. Write it again from its source.") from error


def _build(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass with exactly these fields."""
    hints = typing.get_type_hints(cls)
    if set(values) != set(hints):
        missing, unknown = sorted(set(hints) - set(values)), sorted(set(values) - set(hints))
        raise ValueError(f"{cls.__name__} lacks {missing} and does not know {unknown}")
    return cls(**{name: _read(f"{cls.__name__}.{name}", hints[name], value) for name, value in values.items()})


def _read(name: str, hint: Any, value: Any) -> Any:
    """A field's value from what JSON keeps of it: no tuples, no dataclasses, whole floats without a point."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    shapes = [option for option in options if dataclasses.is_dataclass(option)]
    for option in options:
        items = typing.get_args(option)
        # Of several dataclasses the fields say which; the last one tells what is wrong.
        is_dict = isinstance(value, dict) and option in shapes
        if is_dict and (option is shapes[-1] or set(value) == set(typing.get_type_hints(option))):
            return _build(option, value)
        if typing.get_origin(option) is Literal and value in items:
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list):
            kinds = [items[0]] * len(value) if items[-1] is ... else items
            return tuple(_read(name, kind, item) for kind, item in zip(kinds, value, strict=True))
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    raise ValueError(f"{name} must be {hint}; got {value!r}")
