"""The command line: one function per command; heavy imports happen inside them, so that --help is quick."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from llava_jax.errors import UserError, exit_code
from llava_jax.heap import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; user errors print one message, no trace."""
    arguments = _parser().parse_args(argv)
    if argv is None and arguments.run in (_quickstart, _train, _generate, _chat, _score):
        keep_freed_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tqdm import tqdm

    # The monitor of its bars is a thread that ends with the process, and CPython 3.11 may crash as it does.
    tqdm.monitor_interval = 0
    is_training = arguments.run is _train
    if is_training and argv is None:
        signal.signal(signal.SIGTERM, _stopped_before_it_began)
    code = _exit_code(arguments)
    if is_training and code and argv is None:
        from llava_jax.train import processes

        # All is closed or has failed to; neither Orbax's threads nor other processes have more to say.
        processes.leave(code)
    return code


def _stopped_before_it_began(number: int, frame: object) -> None:
    """Answers a SIGTERM that comes while modules are imported; see train/stop.py for all later ones."""
    del number, frame
    os.write(2, b"llava-jax: SIGTERM before the run began; run the same command again.\n")
    os._exit(75)


def _exit_code(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"llava-jax: {error}", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        # Configs check themselves with plain ValueErrors; anything else is a defect and keeps its trace.
        if isinstance(error, ValueError) and getattr(arguments, "config", None):
            print(f"llava-jax: {error}", file=sys.stderr)
            return exit_code(error)
        traceback.print_exc()
        return 70
    except KeyboardInterrupt:
        print("llava-jax: interrupted", file=sys.stderr)
        return exit_code(KeyboardInterrupt())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava-jax", description="LLaVA in pure JAX: train, generate, score.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quickstart = commands.add_parser("quickstart", help="train and evaluate a small LLaVA on real pictures")
    quickstart.add_argument("--workdir", default="runs/quickstart", help="default: %(default)s")
    quickstart.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    quickstart.set_defaults(run=_quickstart)

    train = commands.add_parser("train", help="run a config; resumes by itself")
    train.add_argument("--config", required=True, metavar="FILE", help="Python file with get_config()")
    train.add_argument("--workdir", required=True, metavar="DIR")
    train.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override one field")
    train.set_defaults(run=_train)

    convert = commands.add_parser("convert", help="write a checkpoint of any layout in another")
    convert.add_argument("source", metavar="SRC", help="folder of any layout, training workdir, or hub name")
    convert.add_argument("target", metavar="DST", help="folder to write")
    convert.add_argument(
        "--to",
        required=True,
        choices=("jax", "hf", "original", "delta", "lora", "lora-hf", "lora-hf-4.51"),
        help="lora: a run's adapters as the original reads them; lora-hf: as PEFT does on transformers' LLaVA",
    )
    convert.add_argument("--step", type=int, metavar="N", help="a workdir's saved step (default: its newest good one)")
    convert.add_argument("--base", metavar="SRC", help="what a delta, an adapter or a projector belongs to")
    convert.add_argument(
        "--tower", metavar="SRC", help="CLIP folder, instead of the one that the original's config names"
    )
    convert.set_defaults(run=_convert)

    data = commands.add_parser("data", help="look at a config's data").add_subparsers(required=True, metavar="WHAT")
    check = data.add_parser("check", help="read every record once and count what is refused, by reason")
    check.add_argument("--config", required=True, metavar="FILE")
    check.add_argument("--set", action="append", default=[], metavar="a.b=value")
    check.set_defaults(run=_check_data)

    plan = commands.add_parser("plan", help="say whether a config fits a topology, and the least that a step costs")
    plan.add_argument("--config", required=True, metavar="FILE")
    plan.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:16x16, v5p:4x4x8 or h100:8")
    plan.add_argument("--set", action="append", default=[], metavar="a.b=value")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)

    generate = commands.add_parser("generate", help="answer one prompt")
    _add_request(generate)
    generate.add_argument("--prompt", required=True)
    _add_sampling(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk about pictures; /reset forgets, /exit or end of file leaves")
    _add_request(chat)
    _add_sampling(chat)
    chat.set_defaults(run=_chat)

    score = commands.add_parser("score", help="log-probability of an answer")
    _add_request(score)
    score.add_argument("--prompt", required=True)
    score.add_argument("--answer", required=True)
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(run=_score)
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, workdir, or LLaVA of any layout")
    parser.add_argument(
        "--image", action="extend", nargs="+", default=[], metavar="FILE", help="pictures, in the order of the marks"
    )
    parser.add_argument("--conv", metavar="NAME", help="conversation template, or raw (default: the model's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="hold the decoder in 8 or 4 bits (default: whole)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; default: %(default)s")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _quickstart(arguments: argparse.Namespace) -> None:
    from llava_jax.quickstart import quickstart

    quickstart(arguments.workdir, seed=arguments.seed)


def _train(arguments: argparse.Namespace) -> None:
    from llava_jax.train.environment import prepare

    prepare(arguments.workdir)
    from llava_jax.train import processes
    from llava_jax.train.config import load_config
    from llava_jax.train.loop import train

    processes.join()
    train(load_config(arguments.config, tuple(arguments.set)), arguments.workdir)


def _convert(arguments: argparse.Namespace) -> None:
    from llava_jax.convert.conversion import convert

    kept = {name: getattr(arguments, name) for name in ("to", "base", "tower", "step")}
    print(convert(arguments.source, arguments.target, **kept))


def _check_data(arguments: argparse.Namespace) -> None:
    from llava_jax.data.check import check_records
    from llava_jax.errors import DataError
    from llava_jax.train.config import load_config
    from llava_jax.train.loop import data_needs

    config = load_config(arguments.config, tuple(arguments.set))
    refused = check_records(config.data.records, config.data.rows, data_needs(config))
    if refused:
        raise DataError(f"{sum(map(len, refused.values()))} records were refused; mend or remove them.")


def _plan(arguments: argparse.Namespace) -> None:
    # The TPU compiler runs here without a TPU; unless told so, it looks for one and complains.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # The library lets one process at a time have the TPU; here nobody has one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from llava_jax.plan import as_text, plan
    from llava_jax.train.config import load_config

    result = plan(load_config(arguments.config, tuple(arguments.set)), arguments.topology)
    print(json.dumps(dataclasses.asdict(result), indent=2) if arguments.json else as_text(result))


def _open(arguments: argparse.Namespace):
    from llava_jax.inference.model import load, read_images

    # First what is quick to refuse: a model takes minutes to load.
    images = read_images(arguments.image)
    template = None if arguments.conv in (None, "raw") else arguments.conv
    model, processor = load(arguments.model, template=template, dtype=arguments.dtype, quantize=arguments.quantize)
    if arguments.conv == "raw":
        processor = dataclasses.replace(processor, template=None)
    return model, processor, images


def _sampling(arguments: argparse.Namespace):
    from llava_jax.inference.generate import Sampling

    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        stop=tuple(arguments.stop),
    )


def _generate(arguments: argparse.Namespace) -> None:
    from llava_jax.data.records import Turn
    from llava_jax.inference.generate import generate, stream

    sampling = _sampling(arguments)
    model, processor, images = _open(arguments)
    if arguments.conv == "raw":
        prompt = processor.raw(arguments.prompt, images)
    else:
        prompt = processor.ask([Turn("user", arguments.prompt)], images)
    if arguments.json:
        (answer,) = generate(model, processor, [prompt], sampling, seeds=[arguments.seed])
        print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
        return
    for piece in stream(model, processor, prompt, sampling, seed=arguments.seed):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
    print()


def _chat(arguments: argparse.Namespace) -> None:
    from llava_jax.data.records import Turn
    from llava_jax.inference.generate import stream

    if arguments.conv == "raw":
        raise UserError("chat needs a conversation template; got --conv raw. Use generate for raw prompts.")
    sampling = _sampling(arguments)
    model, processor, images = _open(arguments)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            # Gives `input` a line that can be edited, and the earlier ones.
            import readline  # noqa: F401
        print("/reset starts anew, /exit or Ctrl-D ends.", file=sys.stderr)
    turns: list[Turn] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            turns = []
        elif text:
            try:
                prompt = processor.ask([*turns, Turn("user", text)], images)
                for piece in stream(model, processor, prompt, sampling, seed=arguments.seed):
                    if isinstance(piece, str):
                        print(piece, end="", flush=True)
                    else:
                        turns += [Turn("user", text), Turn("assistant", piece.text)]
                print()
            except UserError as error:
                # One bad question must not cost the conversation.
                print(f"llava-jax: {error}", file=sys.stderr)


def _score(arguments: argparse.Namespace) -> None:
    from llava_jax.data.records import Turn
    from llava_jax.inference.score import score

    model, processor, images = _open(arguments)
    if arguments.conv == "raw":
        prompt = processor.raw(arguments.prompt, images, answer=arguments.answer)
    else:
        turns = [Turn("user", arguments.prompt), Turn("assistant", arguments.answer)]
        prompt = processor.answered(turns, images)
    (result,) = score(model, [prompt])
    print(json.dumps(dataclasses.asdict(result)) if arguments.json else f"{result.sum:.4f}")


if __name__ == "__main__":
    sys.exit(main())
