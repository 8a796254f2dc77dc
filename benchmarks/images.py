"""Photographs from JPEG to the tower's input, on one core, against the image processor of transformers (PIL).

python -m benchmarks.images   # needs `pip install scikit-learn` for its two photographs; see setup.cfg, [benchmark]

Ours ends with bytes, since the device brings them to CLIP's units; `in float` adds that on the host, for who compares.
"""

import importlib.util
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import arguments, in_turns, publish, rate, ratio

# Width and height of what LLaVA's mix is made of: COCO, GQA and Visual Genome, TextVQA.
SHAPES = ((640, 480), (480, 640), (640, 427), (500, 375), (1024, 768))
PHOTOGRAPHS = 40
TILE = 336


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], sizes=("336",))
    # One core for all: neither decoder uses more, but numpy and torch might.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from transformers import CLIPImageProcessorPil

    from llava_jax.data.images import OneTile, decode, open_image
    from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, resample=Image.Resampling.BICUBIC
    )
    mean, deviation = (np.array(values, np.float32) for values in (PIXEL_MEAN, PIXEL_STD))

    def peer(path: Path, mode: OneTile) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        if mode == "pad":
            image = expand_to_square(image, tuple(int(255 * x) for x in PIXEL_MEAN))
        return processor.preprocess(image, return_tensors="np")["pixel_values"][0]

    def ours(path: Path, mode: OneTile) -> np.ndarray:
        return decode(open_image(path), size=TILE, mode=mode)

    def normalised(path: Path, mode: OneTile) -> np.ndarray:
        return ((ours(path, mode) / np.float32(255) - mean) / deviation).transpose(2, 0, 1)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder))
        modes: tuple[OneTile, ...] = ("square", "pad")
        for mode in modes:
            error = max(float(np.abs(normalised(path, mode) - peer(path, mode)).max()) for path in paths)
            ways = {"ours": ours, "ours, in float": normalised, "decoding alone": lambda path, _: load(path)}
            if not chosen.only_ours:
                ways["transformers"] = peer
            runs = {name: lambda way=way, mode=mode: each(way, paths, mode) for name, way in ways.items()}
            seconds = in_turns(runs, repeats=chosen.repeats)
            for name, found in seconds.items():
                compared = name.startswith("ours") and "transformers" in seconds
                rows.append(
                    {
                        "mode": mode,
                        "of": name,
                        "pictures/s, one core": rate(len(paths), found),
                        "ours/peer": ratio(seconds["transformers"], found) if compared else "",
                        "largest difference": f"{error:.1e}" if compared else "",
                    }
                )
    notes = {
        "what": f"{PHOTOGRAPHS} JPEG photographs of {', '.join(f'{w}x{h}' for w, h in SHAPES)}, quality 85 to 95, cut "
        f"from china.jpg and flower.jpg of scikit-learn, to {TILE}x{TILE}; differences in CLIP's units; "
        f"{chosen.repeats} repeats in turns; `decoding alone` is the floor: Image.open and load",
    }
    publish("images", chosen, rows, notes)


def write_photographs(folder: Path) -> list[Path]:
    """Cuts of real photographs, enlarged or shrunk to the usual shapes."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None, "pip install scikit-learn: its photographs are needed"
    source = Path(str(spec.origin)).parent / "datasets" / "images"
    originals = [Image.open(source / name).convert("RGB") for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    paths = []
    for number in range(PHOTOGRAPHS):
        image, shape = originals[number % 2], SHAPES[number % len(SHAPES)]
        share = rng.uniform(0.7, 1.0)
        scale = share * min(image.width / shape[0], image.height / shape[1])
        width, height = int(scale * shape[0]), int(scale * shape[1])
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        cut = image.resize(shape, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        cut.save(buffer, "JPEG", quality=int(rng.integers(85, 96)))
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """What the original does to a picture before the processor (`image_aspect_ratio` pad)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def load(path: Path) -> None:
    Image.open(path).load()


def each(way: Any, paths: list[Path], mode: str) -> None:
    for path in paths:
        way(path, mode)


if __name__ == "__main__":
    main()
