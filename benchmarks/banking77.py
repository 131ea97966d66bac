"""Real data, end to end: fine-tune on banking77, score held-out rows, check the adapter elsewhere.

Scores exact match of the intent (77 labels) on `test_a` before and after, through three roads:
fourbit's 4-bit base, plain PEFT on the 16-bit base, and plain PEFT on the dequantized 4-bit base,
where logits and greedy text must equal fourbit's.

    python benchmarks/banking77.py --data-dir DIR [--steps 160] [--lr 5e-4] [--calibrate]

`--rows` of test_a are scored. With `--calibrate` the 4-bit base is calibrated on the training texts
(`quant.calibrate: data`).

DIR holds banking77/train.jsonl.gz and banking77/test_a.jsonl.gz (rows {"text", "label"};
PolyAI's banking77, CC BY 4.0). Appends one line per road to benchmarks/results/banking77.csv.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

import fourbit
from fourbit.data import DataConfig, read_rows
from fourbit.evaluation import ExactMatch, score_examples
from fourbit.generate import Generator, Sampling, open_generator
from fourbit.linear import Linear4bit
from fourbit.loading import LoadOptions, load_model
from fourbit.sources import resolve_source
from rows import append, stamp

PROMPT, COMPLETION = "{text}", "{label}"
SYSTEM = "Name the intent of the customer's message."
LOGITS_TOLERANCE = 1e-3  # float32 products in another order
PROMPTS = 20


def train(options: argparse.Namespace, run: Path) -> dict:
    """`fourbit train` as a user types it."""
    data = options.data_dir
    command = [
        *(sys.executable, "-m", "fourbit", "train", "--json", "--resume", "auto"),
        *("--model", "smollm2", "--data", str(data / "banking77/train.jsonl.gz")),
        *("--data.prompt", PROMPT, "--data.completion", COMPLETION, "--data.system", SYSTEM),
        *("--data.max_length", "512", "--batch_size", "2", "--grad_accum", "1"),
        *("--lr", str(options.lr), "--optim.max_grad_norm", "1.0", "--lora.lora_dropout", "0"),
        *("--max_steps", str(options.steps), "--eval_every", "0", "--seed", str(options.seed)),
        *("--data.eval", "200", "-o", str(run)),
        *(("--quant.calibrate", "data") if options.calibrate else ()),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with ordinary linear layers that hold the dequantized weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model


def same_as_plain_peft(base: str, run: Path, prompts: list[list[int]]) -> tuple[float, int]:
    """Largest difference of logits, and how many of the greedy texts are equal, in float32."""
    options = LoadOptions(quant=fourbit.QuantConfig(), dtype=torch.float32)
    source = resolve_source(base)
    ours = peft.PeftModel.from_pretrained(load_model(source, options), str(run / "adapter")).eval()
    plain = peft.PeftModel.from_pretrained(
        dequantized(load_model(source, options)), str(run / "adapter")
    ).eval()
    worst, equal = 0.0, 0
    for ids in prompts:
        batch = torch.tensor([ids])
        with torch.no_grad():
            worst = max(worst, float((ours(batch).logits - plain(batch).logits).abs().max()))
            texts = [m.generate(batch, max_new_tokens=16, do_sample=False) for m in (ours, plain)]
        equal += bool(torch.equal(*texts))
    return worst, equal


def score(generator: Generator, rows: list, title: str) -> tuple[ExactMatch, float]:
    began = time.perf_counter()
    found = score_examples(generator, rows, Sampling(max_new_tokens=16))
    seconds = time.perf_counter() - began
    print(f"{title}: {found.score:.1%} ± {found.stderr:.1%} of {found.n} in {seconds:.0f} s")
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rows", type=int, default=1540, help="test rows to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", action="store_true", help="the base, on the training texts")
    parser.add_argument(
        "--run", type=Path, default=None, help="keep the run here; go on where it stopped"
    )
    options = parser.parse_args()
    run = options.run or Path(tempfile.mkdtemp()) / "banking77"

    test = DataConfig(
        train=str(options.data_dir / "banking77/test_a.jsonl.gz"),
        prompt=PROMPT,
        completion=COMPLETION,
        system=SYSTEM,
        eval=0,
    )
    rows = list(read_rows(test).train)
    step = max(1, len(rows) // options.rows)
    rows = rows[::step][: options.rows]  # the file is sorted by label: spread over all of them

    quant = fourbit.QuantConfig()
    before, _ = score(open_generator("smollm2", quant=quant), rows, "untouched, nf4 base")
    result = train(options, run)
    base = str(run / "base") if options.calibrate else "smollm2"
    tuned = open_generator(base, adapter=run, quant=quant)
    after, _ = score(tuned, rows, "tuned, nf4 base")
    plain, tokenizer = fourbit.load("smollm2")
    elsewhere = Generator(
        peft.PeftModel.from_pretrained(plain, str(run / "adapter")).eval(),
        tokenizer,
        tuned.template,
    )
    on_16_bits, _ = score(elsewhere, rows, "tuned, plain PEFT on the 16-bit base")
    prompts = [tuned.prompt_ids(r.messages[:-1]) for r in rows[:: max(1, len(rows) // PROMPTS)]]
    worst, equal = same_as_plain_peft(base, run, prompts[:PROMPTS])
    print(f"plain PEFT on the dequantized base: logits differ by {worst:.1e},")
    print(f"  greedy text equal on {equal} of {PROMPTS} prompts")
    write(options, result, {"before": before, "after": after, "after_16_bit_base": on_16_bits})
    assert after.score > before.score, "the tuned model must beat the untouched one"
    assert worst <= LOGITS_TOLERANCE
    assert equal == PROMPTS
    assert abs(on_16_bits.score - after.score) <= 0.02, "more than two points apart"


def write(options: argparse.Namespace, result: dict, scores: dict[str, ExactMatch]) -> None:
    for road, found in scores.items():
        row = {
            **stamp(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.processor() or platform.machine(),
            "seed": options.seed,
            "steps": options.steps,
            "calibrated": options.calibrate,
            "road": road,
            "exact_match": f"{found.score:.4f}",
            "stderr": f"{found.stderr:.4f}",
            "n": found.n,
            "train_tokens_per_second": result["tokens_per_second"],
            "train_seconds": result["train_seconds"],
            "peak_bytes": result["peak_memory_bytes"],
            "predicted_bytes": result["predicted_peak_bytes"],
        }
        append("banking77", row)


if __name__ == "__main__":
    main()
