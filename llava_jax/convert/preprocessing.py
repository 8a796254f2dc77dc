"""How pictures are brought to the tower: from the files of others to our image mode, and back."""

import ast
from pathlib import Path
from typing import Any

from llava_jax.convert.fields import Fields, read_object
from llava_jax.data.anyres import AnyRes
from llava_jax.data.images import ImageMode
from llava_jax.errors import CheckpointError
from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from llava_jax.shapes import LlavaConfig, VisionConfig

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
# Bicubic, the number that Pillow gives it.
_BICUBIC = 3
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def image_mode_of_huggingface(folder: Path, config: Fields, vision: VisionConfig) -> ImageMode:
    """The mode of a Hugging Face folder, by its preprocessor's files, else what transformers would do without them.

    Raises:
      CheckpointError: a picture would be brought to other pixels than transformers makes of it.
    """
    fields = check_preprocessor(folder, vision)
    if config.values.get("model_type") == "llava_next":
        grid = fields.take("image_grid_pinpoints", list, None)
        stated = config.values.get("image_grid_pinpoints")
        if None not in (grid, stated) and grid != stated:
            raise CheckpointError(f"{fields.where} and config.json differ in image_grid_pinpoints. Make them agree.")
        # Height comes first there.
        pinpoints = tuple((width, height) for height, width in _pairs(grid or stated or _PINPOINTS, fields.where))
        return AnyRes(pinpoints=pinpoints, merge="spatial_unpad", rounding="huggingface")
    return "pad" if fields.take("do_pad", bool, False) else "square"


def check_preprocessor(folder: Path, vision: VisionConfig) -> Fields:
    """The settings of a folder's preprocessor, none where it has no file of them.

    Raises:
      CheckpointError: a picture would be brought to other pixels than by OpenAI's for CLIP.
    """
    path = next((folder / name for name in (PREPROCESSOR, PROCESSOR) if _has_images(folder / name)), None)
    if path is None:
        return Fields({}, str(folder))
    content = read_object(path)
    # Version 5 keeps the image processor's settings inside the processor's.
    fields = Fields(content.get("image_processor", content), str(path))
    for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop"):
        fields.must_be(name, True)
    fields.must_be("resample", _BICUBIC)
    for name, known in (("image_mean", PIXEL_MEAN), ("image_std", PIXEL_STD)):
        values = fields.take(name, list, list(known))
        if len(values) != 3 or any(abs(v - k) > 1e-6 for v, k in zip(values, known, strict=True)):
            fields.must_be(name, list(known))
    if abs(fields.take("rescale_factor", float, 1 / 255) - 1 / 255) > 1e-9:
        fields.must_be("rescale_factor", 1 / 255)
    side = vision.image_size
    fields.must_be("size", side, {"shortest_edge": side}, {"height": side, "width": side})
    fields.must_be("crop_size", side, {"height": side, "width": side})
    return fields


def _has_images(path: Path) -> bool:
    if not path.is_file():
        return False
    return path.name == PREPROCESSOR or "image_processor" in read_object(path)


def image_mode_of_original(config: Fields) -> ImageMode:
    """The mode that the original's config states; what it does without one is `square`."""
    mode = config.take("image_aspect_ratio", str, "square")
    merge = config.take("mm_patch_merge_type", str, "flat")
    is_known = merge in ("flat", "spatial", "spatial_unpad")
    if mode == "pad" and is_known:
        return "pad"
    if mode == "square" and is_known:
        return "square"
    if mode == "anyres" and is_known:
        grid = config.take("image_grid_pinpoints", object)
        pinpoints = tuple(_pairs(_grid(grid), config.where))
        return AnyRes(pinpoints=pinpoints, merge=merge, rounding="original")
    raise CheckpointError(
        f"{config.where}: image_aspect_ratio={mode!r} with mm_patch_merge_type={merge!r} is not supported, only "
        "square, pad and anyres, merged flat, spatial or spatial_unpad."
    )


def _grid(grid: Any) -> Any:
    """Pinpoints may be written as the text of a Python list."""
    if not isinstance(grid, str):
        return grid
    try:
        return ast.literal_eval(grid)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return grid


def _pairs(grid: Any, where: str) -> list[tuple[int, int]]:
    pairs = list | tuple
    if (
        not isinstance(grid, pairs)
        or not grid
        or not all(isinstance(p, pairs) and len(p) == 2 and all(type(n) is int and n > 0 for n in p) for p in grid)
    ):
        raise CheckpointError(f"{where}: image_grid_pinpoints must be pairs of sizes; got {grid!r:.80}. Mend it.")
    return [(p[0], p[1]) for p in grid]


def preprocessor_fields(mode: ImageMode, vision: VisionConfig) -> dict[str, Any]:
    """`preprocessor_config.json` for transformers; `pad` needs its LlavaImageProcessor (4.49 and newer)."""
    side = vision.image_size
    fields: dict[str, Any] = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    if isinstance(mode, AnyRes):
        return fields | {
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "image_grid_pinpoints": [[height, width] for width, height in mode.pinpoints],
            "do_pad": True,
        }
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if mode == "pad" else {}
    return fields | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"} | kind


def processor_fields(model: LlavaConfig, mode: ImageMode) -> dict[str, Any]:
    """`processor_config.json`: how many slots a picture takes."""
    return {
        "processor_class": "LlavaNextProcessor" if isinstance(mode, AnyRes) else "LlavaProcessor",
        "patch_size": model.vision.patch_size,
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[model.select_feature],
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }


def original_fields(mode: ImageMode, *, has_newline: bool) -> dict[str, Any]:
    """What the original's config says of pictures."""
    if isinstance(mode, AnyRes):
        pinpoints = [list(pair) for pair in mode.pinpoints]
        return {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints, "mm_patch_merge_type": mode.merge}
    return {
        "image_aspect_ratio": None if mode == "square" else mode,
        # The newline is a parameter of the checkpoint only where the merge type asks for one.
        "mm_patch_merge_type": "spatial_unpad" if has_newline else "flat",
    }
