"""The command line: flags in, functions called, one line or one JSON object out. No logic.

Bodies import what they need: ``--help`` must not pay for torch and transformers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from fourbit import __version__
from fourbit.errors import FourbitError, InputError, nearest, one_line

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


class _Lines(click.Command):
    """A command whose examples keep their line breaks in ``--help``."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            for line in self.examples.strip().splitlines():
                formatter.write(f"  {line.strip()}\n")


class _Number(click.FloatRange):
    """A float in a range; NaN is in none."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


class _TrainCommand(_Lines):
    """`train`: its flags are the fields of `TrainConfig`, listed from the schema."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        from fourbit.settings import options
        from fourbit.training.config import SHORT_FORMS, TrainConfig

        rows = [
            (f"--{o.key} {o.type_text}", f"{o.help} [{o.default_text}]")
            for o in options(TrainConfig)
        ]
        with formatter.section("Settings (the keys of the YAML file)"):
            formatter.write_dl(rows, col_max=44)
        short = [
            ("-" * (1 if len(k) == 1 else 2) + k, f"--{v}") for k, v in sorted(SHORT_FORMS.items())
        ]
        with formatter.section("Short forms"):
            formatter.write_dl(short)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fourbit")
def cli() -> None:
    """Fine-tunes language models in 4 bits (QLoRA) on the hardware you have."""


@cli.command(
    cls=_TrainCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    examples="""
    fourbit train --model smollm2 --data orders.jsonl -o runs/orders
    fourbit train config.yaml --lora.r 32 --optim.lr 1e-4
    fourbit train config.yaml --resume auto
    fourbit train config.yaml --dry-run
    """,
)
@click.argument("settings", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG.yaml] [--key value]")
@click.option("--resume", metavar="auto|STEP", help="Continue the run in its directory.")
@click.option("--overwrite", is_flag=True, help="Move an existing run aside.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan and the data audit.")
@_JSON
def train(
    settings: tuple[str, ...], resume: str | None, overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """Fine-tunes a model and writes a run directory."""
    from fourbit.distributed import joined
    from fourbit.settings import load_settings
    from fourbit.training.config import SHORT_FORMS, TrainConfig

    path, overrides = _split(settings)
    if resume is not None:
        overrides.append(("resume", resume))
    with joined() as ranks:
        resolved = load_settings(
            TrainConfig, path=path, overrides=overrides, short_forms=SHORT_FORMS
        )
        from fourbit.training.progress import Reporter
        from fourbit.training.run import train as run_training

        result = run_training(
            resolved.value,
            origins=resolved.origins,
            overwrite=overwrite,
            dry_run=dry_run,
            reporter=Reporter(),
            ranks=ranks,
        )
    if as_json and ranks.first:
        _print_json(result.as_dict())


def _split(settings: Sequence[str]) -> tuple[Path | None, list[tuple[str, str]]]:
    """``[config.yaml] --key value --key=value -o value`` to a path and pairs."""
    path: Path | None = None
    pairs: list[tuple[str, str]] = []
    rest = list(settings)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if path is not None:
                raise InputError(
                    "bad-argument",
                    where=word,
                    what="a second configuration file, or a value without its key",
                    fix="write settings as --key value",
                )
            path = Path(word)
            continue
        key, equals, value = word.lstrip("-").partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise InputError(
                    "missing-value", where=word, what="needs a value", fix=f"{word} VALUE"
                )
            value = rest.pop(0)
        # --batch-size is --batch_size; a dash inside a dotted key can only be that
        pairs.append((key.replace("-", "_"), value))
    return path, pairs


@cli.command(
    cls=_TrainCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    examples="""
    fourbit plan smollm2
    fourbit plan ./my-model --method full --max-length 2048 --json
    fourbit plan ./my-model --budget 6GB --lora.r 64
    fourbit plan org/name --device T4 --plot memory.png
    fourbit plan config.yaml
    fourbit plan org/name --nproc 4 --parallel fsdp
    """,
)
@click.argument(
    "settings", nargs=-1, type=click.UNPROCESSED, metavar="MODEL|CONFIG.yaml [--key value]"
)
@click.option("--device", help="Plan for T4, L4, RTX4090, A100-40, A100-80, H100, H200 or cpu.")
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True,
              help="Processes that train together: plans one of them.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the methods' memory, PNG.")
@_JSON
def plan(
    settings: tuple[str, ...],
    device: str | None,
    nproc: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Says what fine-tuning MODEL needs in memory, before anything is loaded."""
    from fourbit.settings import load_settings
    from fourbit.training.config import SHORT_FORMS, TrainConfig

    path, overrides = _split(settings)
    if path is not None and path.suffix not in (".yaml", ".yml"):
        overrides.append(("model", str(path)))
        path = None
    if path is None and not any(key == "model" for key, _ in overrides):
        raise InputError(
            "missing-value", where="plan", what="no model given", fix="fourbit plan MODEL"
        )
    run = load_settings(TrainConfig, path=path, overrides=overrides, short_forms=SHORT_FORMS).value
    from fourbit.api import plan as make_plan

    result = make_plan(run.model, config=run, device=device, compare=True, processes=nproc)
    lines = result.lines()
    if plot is not None:
        from fourbit.report import plot_plans

        plans = {name: found.parts for name, found in result.methods.items()}
        title = f"Memory to fine-tune {Path(run.model).name}"
        plot_plans(plot, plans, room=result.available_bytes, title=title)
        lines.append(f"picture: {plot}")
    _show(as_json, result.as_dict(), lines)


@cli.command(
    cls=_TrainCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    examples="""
    fourbit compare config.yaml --methods full,lora,qlora -o compared
    fourbit compare config.yaml --methods qlora,qlora-fp4,qlora-int8,qlora-nf4-single -o formats
    fourbit compare config.yaml --methods qlora-r4,qlora-r16,qlora-attention -o ranks --seeds 5
    fourbit compare config.yaml --methods lora,qlora --tasks exact_match=test.jsonl -o tasks
    fourbit compare config.yaml --methods lora,qlora --text book.txt -o forgotten
    fourbit compare config.yaml --methods qlora --variant "slow=full --optim.lr 1e-5" -o y
    """,
)
@click.argument("settings", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG.yaml] [--key value]")
@click.option("--methods", required=True, help="The first is what the others are compared with.")
@click.option("--variant", multiple=True, metavar="'NAME=METHOD --key value'",
              help="One more, with settings of its own.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--seeds", type=click.IntRange(1, 100), default=3, show_default=True,
              help="Runs of each method.")  # fmt: skip
@click.option("--tasks", multiple=True, metavar="NAME=FILE", help="As for fourbit eval.")
@click.option("--text", type=click.Path(path_type=Path),
              help="General text: perplexity before and after.")  # fmt: skip
@click.option("--window", type=click.IntRange(2), default=512, show_default=True,
              help="Tokens of a perplexity window.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=None, help="Rows of each task.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True,
              help="Of a generated answer.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Move an earlier comparison aside.")
@_JSON
def compare(
    settings: tuple[str, ...],
    methods: str,
    variant: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Trains the same data by several methods and seeds: quality, memory, speed; table and page."""
    from fourbit.comparison import parse_variants

    path, overrides = _split(settings)
    variants = parse_variants(methods, variant)
    from fourbit.comparison import CompareOptions
    from fourbit.comparison import compare as run_comparison
    from fourbit.training.progress import Reporter

    result = run_comparison(
        path,
        overrides,
        variants,
        options=CompareOptions(**options),
        reporter=Reporter(),
    )
    folder = options["output"]
    pages = [f"page: {folder / 'compare.html'}", f"picture: {folder / 'compare.png'}"]
    _show(as_json, {**result.as_dict(), "output": str(folder)}, [*result.lines(), *pages])


@cli.command(cls=_Lines, examples="fourbit verify runs/orders")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--no-base", is_flag=True, help="Do not load the base model again.")
@_JSON
def verify(run: Path, no_base: bool, as_json: bool) -> None:
    """Re-checks a run: receipt, adapter, checkpoints, metrics and the base's bytes."""
    from fourbit.api import verify as verify_run
    from fourbit.errors import VerificationFailed

    receipt = verify_run(run, base=not no_base)
    lines = [f"{'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in receipt.checks]
    lines += [f"note {finding}" for finding in receipt.findings]
    values = {
        "ok": receipt.ok,
        "checks": [c.as_dict() for c in receipt.checks],
        "findings": receipt.findings,
    }
    _show(as_json, values, lines)
    if not receipt.ok:
        failed = ", ".join(check.name for check in receipt.checks if not check.ok)
        error = VerificationFailed("verify", where=str(run), what=f"failed: {failed}")
        if as_json:
            sys.exit(error.exit_code)
        raise error


_MODEL_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--adapter", type=click.Path(path_type=Path), help="Run or adapter directory."),
    click.option(
        "--quant",
        type=click.Choice(["nf4", "fp4", "int4", "int8", "none"]),
        default="nf4",
        show_default=True,
        help="How the base is held.",
    ),
    click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True),
    click.option("--temperature", type=_Number(0, 100), default=0.0, show_default=True),
    click.option("--top-p", type=_Number(0, 1, min_open=True), default=1.0),
    click.option("--seed", type=click.IntRange(0), default=0),
    click.option("--system", default=None, help="System message."),
    click.option("--chat-template", default=None, help="Built-in name or .jinja file."),
)


def _model_options(function: Any) -> Any:
    for option in reversed(_MODEL_OPTIONS):
        function = option(function)
    return function


def _open(model: str, options: dict[str, Any]) -> Any:
    from fourbit.generate import open_generator
    from fourbit.quantize import QuantConfig

    kind = options["quant"]
    return open_generator(
        model,
        adapter=options["adapter"],
        quant=None if kind == "none" else QuantConfig(quant_type=kind),
        chat_template=options["chat_template"],
    )


def _sampling(options: dict[str, Any]) -> Any:
    from fourbit.generate import Sampling

    return Sampling(
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        top_p=options["top_p"],
        seed=options["seed"],
    )


@cli.command(
    cls=_Lines,
    examples="""
    fourbit generate smollm2 --prompt "What is a llama?"
    fourbit generate smollm2 --adapter runs/orders --prompt "Anna wants 3 mugs" --json
    """,
)
@click.argument("model")
@click.option("--prompt", required=True, help="The user's turn; - reads stdin.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without a chat template.")
@_model_options
@_JSON
def generate(model: str, prompt: str, raw: bool, as_json: bool, **options: Any) -> None:
    """Answers one prompt."""
    import time

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("empty-prompt", where="--prompt", what="is empty")
    generator = _open(model, options)
    ids = generator.prompt_ids(text if raw else _turns(options["system"], text))
    began = time.perf_counter()
    answer = generator.answers([ids], _sampling(options))[0]
    speed = answer.tokens / max(time.perf_counter() - began, 1e-9)
    values = {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": len(ids),
        "tokens_per_second": round(speed, 2),
    }
    _show(as_json, values, [answer.text])


def _turns(system: str | None, text: str) -> list[dict[str, object]]:
    turns: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": text}]


@cli.command(cls=_Lines, examples="fourbit chat smollm2 --adapter runs/orders")
@click.argument("model")
@_model_options
def chat(model: str, **options: Any) -> None:
    """Talks with a model; an empty line or Ctrl-D ends."""
    generator = _open(model, options)
    history = _turns(options["system"], "")[:-1]
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ") if interactive else input()
        except (EOFError, click.Abort):
            break
        if not line.strip():
            break
        history.append({"role": "user", "content": line})
        answer = generator.answers(
            [generator.prompt_ids(history)],
            _sampling(options),
            on_text=lambda _number, piece: click.echo(piece, nl=False),
        )[0]
        history.append({"role": "assistant", "content": answer.text})
        click.echo()


@cli.command(
    "eval",
    cls=_Lines,
    examples="""
    fourbit eval smollm2 --tasks perplexity=book.txt,hellaswag=val.jsonl.gz
    fourbit eval smollm2 --adapter runs/orders --tasks exact_match=test.jsonl
    fourbit eval org/model --tasks mmlu=test.jsonl --shots 5 --shots-from dev.jsonl --json
    fourbit eval org/model --tasks arc_easy,winogrande
    """,
)
@click.argument("model")
@click.option("--tasks", multiple=True, required=True, metavar="NAME=FILE",
              help="What to measure, on which rows.")  # fmt: skip
@click.option("--adapter", type=click.Path(path_type=Path), help="Run or adapter directory.")
@click.option(
    "--quant",
    type=click.Choice(["nf4", "fp4", "int4", "int8", "none"]),
    default="nf4",
    show_default=True,
    help="How the base is held.",
)
@click.option("--blocksize", type=int, default=None, help="Weights that share a scale. [64]")
@click.option("--no-double-quant", is_flag=True, help="Keep the scales in float32.")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto",
              show_default=True, help="Of the arithmetic.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=None, help="Rows of each task.")
@click.option(
    "--shots", type=click.IntRange(0), default=0, help="Solved rows before each question."
)
@click.option("--shots-from", type=click.Path(path_type=Path), help="File of the solved rows.")
@click.option("--batch-size", type=click.IntRange(1), default=None,
              help="Rows of a forward pass; by their length if not given.")  # fmt: skip
@click.option(
    "--window", type=click.IntRange(2), default=None, help="Tokens of a perplexity window."
)
@click.option(
    "--stride", type=click.IntRange(1), default=None, help="Tokens between windows. [window]"
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True,
              help="Of a generated answer.")  # fmt: skip
@click.option("--prompt", default=None, help="Template over columns for questions, as data.prompt.")
@click.option("--completion", default=None, help="Template for answers, as data.completion.")
@click.option("--system", default=None, help="System message of chats that have none.")
@click.option("--chat-template", default=None, help="Built-in name or .jinja file.")
@click.option("--include", type=click.Path(path_type=Path), help="Folder of lm-eval task files.")
@click.option("--items", type=click.Path(path_type=Path), help="Folder for what each item gave.")
@_JSON
def evaluate(model: str, tasks: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measures a model: perplexity, multiple choice, MMLU, LAMBADA, exact match, F1.

    Tasks: hellaswag, arc_easy, arc_challenge, openbookqa, commonsense_qa, piqa, multiple_choice,
    mmlu, perplexity, lambada, exact_match, f1, each with a file; any task of lm-eval without one.
    """
    from fourbit.data import DataConfig
    from fourbit.device import DTYPES
    from fourbit.evaluation.options import EvalOptions
    from fourbit.evaluation.run import evaluate as run_evaluation
    from fourbit.evaluation.run import split_tasks
    from fourbit.quantizing.options import quant_config
    from fourbit.settings import load_settings
    from fourbit.training.progress import Reporter

    items, kind, precision = (options.pop(name) for name in ("items", "quant", "precision"))
    single, blocksize = options.pop("no_double_quant"), options.pop("blocksize")
    templates = [(k, options.pop(k)) for k in ("prompt", "completion", "system")]
    typed = [(name, text) for name, text in templates if text is not None]
    data = load_settings(DataConfig, path=None, overrides=typed)
    chosen = EvalOptions(
        quant=None
        if kind == "none"
        else quant_config(
            quant_type=kind,
            blocksize=blocksize,
            double_quant=False if single else None,
        ),
        dtype=DTYPES.get(precision),
        data=data.value,
        **options,
    )
    result = run_evaluation(model, split_tasks(tasks), options=chosen, reporter=Reporter())
    if items is not None:
        result.write_items(items)
    _show(as_json, result.as_dict(), result.lines())


@cli.command(
    cls=_Lines,
    examples="""
    fourbit merge runs/orders -o merged
    fourbit merge runs/orders -o merged --base original --dtype fp16 --json
    fourbit merge ./adapter --model ./base -o merged
    """,
)
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_OR_ADAPTER")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--model", default=None, help="Where the base lies, if not where the run says.")
@click.option(
    "--base",
    type=click.Choice(["auto", "dequantized", "original"]),
    default="auto",
    show_default=True,
    help="Weights the adapter is added to; auto: those it was trained on.",
)
@click.option(
    "--quant",
    type=click.Choice(["nf4", "fp4"]),
    default=None,
    help="How the base of an adapter without its run was held.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="Of the output; auto: the base's 16-bit dtype, else bf16.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of one file.")
@click.option("--proof-rows", type=click.IntRange(1, 4096), default=32, show_default=True,
              help="Evaluation rows that both models answer.")  # fmt: skip
@click.option("--no-proof", is_flag=True, help="Do not compare; the output is marked as unproven.")
@click.option("--requantize", is_flag=True, help="Round back into the run's 4 bits; see --force.")
@click.option("--force", is_flag=True, help="Requantize however much of the update is lost.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier merge in that folder.")
@_JSON
def merge(run: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Puts an adapter into its base's weights and proves that the result answers the same."""
    from fourbit.merging import MergeOptions
    from fourbit.merging import merge as run_merge
    from fourbit.quantize import QuantConfig
    from fourbit.training.progress import Reporter

    kind = options.pop("quant")
    chosen = MergeOptions(
        quant=None if kind is None else QuantConfig(quant_type=kind),
        proof=not options.pop("no_proof"),
        **options,
    )
    result = run_merge(run, output, options=chosen, reporter=Reporter())
    _show(as_json, result.as_dict(), result.lines())


@cli.command(cls=_Lines, examples="fourbit export runs/orders --to gguf -o orders.gguf")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_OR_ADAPTER")
@click.option("--to", type=click.Choice(["gguf"]), required=True, help="Format of the file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New file.")
@click.option("--model", default=None, help="Where the base lies, if not where the run says.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@_JSON
def export(
    run: Path, to: str, output: Path, model: str | None, overwrite: bool, as_json: bool
) -> None:
    """Writes the adapter alone for other programs: a GGUF LoRA for llama.cpp."""
    from fourbit.exporting import export_gguf

    assert to == "gguf"
    result = export_gguf(run, output, model=model, overwrite=overwrite)
    _show(as_json, result.as_dict(), result.lines())


@cli.command(
    cls=_Lines,
    examples="""
    fourbit quantize ./my-model -o my-model-4bit
    fourbit quantize org/model -o model-int8 --quant int8 --skip score --json
    fourbit quantize ./my-model -o my-model-4bit --calibrate orders.jsonl
    """,
)
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to create."
)
@click.option(
    "--quant", type=click.Choice(["nf4", "fp4", "int8"]), default="nf4", show_default=True
)
@click.option("--blocksize", type=int, default=None, help="Weights that share a scale. [64]")
@click.option("--no-double-quant", is_flag=True, help="Keep the scales in float32.")
@click.option(
    "--storage",
    type=click.Choice(["uint8", "bfloat16", "float16", "float32"]),
    default="uint8",
    show_default=True,
    help="Dtype as which packed bytes are declared.",
)
@click.option("--skip", multiple=True, metavar="NAME", help="Also leave this module plain.")
@click.option("--max-shard-size", default="2GB", show_default=True, help="Of the largest file.")
@click.option("--allow-unquantized", is_flag=True, help="Accept much that stays in 16 bits.")
@click.option("--overwrite", is_flag=True, help="Replace a model in the output folder.")
@click.option("--revision", default=None, help="Branch, tag or commit of a hub model.")
@click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE",
              help="Text, or rows as for training, to choose scales and codes for.")  # fmt: skip
@click.option("--calibrate-check", type=click.Path(path_type=Path), metavar="FILE",
              help="Other text, to see that calibration holds there too.")  # fmt: skip
@click.option("--calibrate-tokens", type=click.IntRange(1024), default=131072, show_default=True,
              help="How much of the text is used.")  # fmt: skip
@click.option("--damping", type=_Number(0, 10), default=0.01, show_default=True,
              help="More follows the calibration text less.")  # fmt: skip
@_JSON
def quantize(  # noqa: PLR0913  # one parameter for each option
    model: str,
    output: Path,
    quant: str,
    blocksize: int | None,
    no_double_quant: bool,
    storage: str,
    skip: tuple[str, ...],
    max_shard_size: str,
    allow_unquantized: bool,
    overwrite: bool,
    revision: str | None,
    as_json: bool,
    **calibration: Any,
) -> None:
    """Writes a quantized copy of MODEL, one tensor in memory at a time."""
    from fourbit.quantizing import QuantizeOptions, quantize_checkpoint
    from fourbit.quantizing.options import quant_config
    from fourbit.training.progress import Reporter

    options = QuantizeOptions(
        quant=quant_config(
            quant_type=quant,
            blocksize=blocksize,
            double_quant=False if no_double_quant else None,
            allow_unquantized=allow_unquantized,
        ),
        storage=storage,
        skip=skip,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        revision=revision,
        calibrate=_calibration(**calibration),
    )
    result = quantize_checkpoint(model, output, options=options, reporter=Reporter())
    _show(as_json, result.as_dict(), result.lines())


def _calibration(
    calibrate: Path | None, calibrate_check: Path | None, calibrate_tokens: int, damping: float
) -> Any:
    from fourbit.quantizing.calibrate import Calibration

    if calibrate is None:
        return None
    return Calibration(calibrate, calibrate_tokens, damping=damping, check=calibrate_check)


@cli.command(
    cls=_Lines,
    examples="""
    fourbit inspect smollm2
    fourbit inspect my-model-4bit --error ./my-model
    """,
)
@click.argument("model")
@click.option(
    "--error", "original", metavar="ORIGINAL", help="Also the error against this 16-bit model."
)
@_JSON
def inspect(model: str, original: str | None, as_json: bool) -> None:
    """Says what a model file or folder, or an adapter, holds."""
    from fourbit.inspection import inspect as look

    found = look(model)
    values, lines = found.as_dict(), found.lines()
    if original is not None:
        from fourbit.quantizing.compare import compare

        error = compare(model, original)
        values, lines = {**values, **error.as_dict()}, [*lines, *error.lines()]
    _show(as_json, values, lines)


@cli.command(
    cls=_Lines,
    examples="""
    fourbit doctor
    fourbit doctor runs/orders
    """,
)
@click.argument("run", type=click.Path(path_type=Path), required=False)
@_JSON
def doctor(run: Path | None, as_json: bool) -> None:
    """Says what this machine can do; of a run, what went wrong in it and what to change."""
    from fourbit.doctor import diagnose, diagnose_run

    diagnosis = diagnose() if run is None else diagnose_run(run)
    _show(as_json, diagnosis.as_dict(), diagnosis.lines())


@cli.command(cls=_Lines, examples="fourbit demo -o fourbit-demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("fourbit-demo"),
    show_default=True, help="Folder for data, configuration and run.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the data generator.")
@click.option("--train-rows", type=click.IntRange(16), default=None)
@click.option("--test-rows", type=click.IntRange(2), default=None)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo in that folder.")
@_JSON
def demo(
    output: Path,
    seed: int,
    train_rows: int | None,
    test_rows: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Teaches a small real model a task it cannot do, in minutes, and proves it."""
    from dataclasses import replace

    from fourbit.demo.run import DemoShape, run_demo
    from fourbit.training.progress import Reporter

    shape = DemoShape(seed=seed)
    if train_rows is not None:
        shape = replace(shape, train_rows=train_rows)
    if test_rows is not None:
        shape = replace(shape, test_rows=test_rows)
    result = run_demo(output, shape, overwrite=overwrite, reporter=Reporter())
    if as_json:
        _print_json(result.as_dict())


def _show(as_json: bool, values: dict[str, Any], lines: Sequence[str]) -> None:
    if as_json:
        _print_json(values)
    else:
        click.echo("\n".join(lines))


def _print_json(values: dict[str, Any]) -> None:
    from fourbit.files import valid_json

    click.echo(valid_json(values))


_SPINS = "10000"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: runs a command and exits with the documented code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    _wait_asleep()
    # PEFT imports it where it is installed; what it says of its kernels is not about ours
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if arguments is None and words[:1] in (["train"], ["demo"]) and not {"-h", "--help"} & {*words}:
        from fourbit import arena

        arena.preload()
    try:
        cli.main(args=words, prog_name="fourbit", standalone_mode=False)
    except FourbitError as error:
        line = "" if error.told else error.line()
        _fail(line, error.exit_code, as_json, error.as_dict())
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.UsageError as error:
        _usage(error, as_json)
    except (click.Abort, KeyboardInterrupt):
        _fail("error[interrupted] stopped before anything was written", 130, as_json)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  # the last resort: one line, the rest in a file
        _crash(error, as_json)
    sys.exit(0)


def _wait_asleep() -> None:
    """Threads that wait for each other spin for some ten microseconds, then sleep.

    libgomp's own choice is to spin for milliseconds: on a machine where another process keeps one
    core busy, threads then hold the core that the one they wait for needs. It reads this when torch
    is loaded; what a user has chosen stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _usage(error: click.UsageError, as_json: bool) -> NoReturn:
    command = error.ctx.command if error.ctx is not None else cli
    where = error.ctx.command_path if error.ctx is not None else "fourbit"
    fix = f"see {where} --help"
    name = getattr(error, "option_name", None)
    if isinstance(error, click.NoSuchOption) and name:
        known = [o for p in command.params for o in p.opts if o.startswith("--")]
        fix = nearest(name, known)
    elif error.message.startswith("No such command"):
        typed = error.message.split("'")[1]
        fix = nearest(typed, cli.commands)
    what = error.format_message().rstrip(".").splitlines()[0]
    failure = InputError("usage", where=where, what=what, fix=fix)
    _fail(failure.line(), failure.exit_code, as_json, failure.as_dict())


def _crash(error: Exception, as_json: bool) -> NoReturn:
    with tempfile.NamedTemporaryFile(
        "w", prefix="fourbit-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        log.write(traceback.format_exc())
    message = str(error).splitlines()[0] if str(error) else ""
    line = f"error[internal] {type(error).__name__}: {message}; fix: report it with {log.name}"
    _fail(one_line(line), 1, as_json)


def _fail(line: str, code: int, as_json: bool, facts: dict[str, str] | None = None) -> NoReturn:
    with contextlib.suppress(BrokenPipeError):  # nobody may be left to read it
        if line:
            click.echo(line, err=True)
        if as_json:
            click.echo(json.dumps({"error": facts or {"what": line}, "exit_code": code}))
    sys.exit(code)


if __name__ == "__main__":
    main()
