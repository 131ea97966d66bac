"""How much of the perplexity that NF4 costs calibration gives back, at the same bytes.

    python benchmarks/calibrate.py --data-dir DIR --model FOLDER [--characters 0] [--only wiki]

FOLDER is a plain transformers model; DIR has wikitext-2/valid.txt.gz and c4_demo/c4_demo.jsonl.gz.
The model is quantized by `fourbit quantize` as ever, calibrated on the second half of wikitext-2's
validation text, and calibrated on c4_demo alone; `fourbit eval` measures each on the first half, in
windows of 512 tokens. `--characters N` evaluates the first N only. Rows go to
results/calibrate.csv.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import append, stamp


def fourbit(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "fourbit", *map(str, words), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def perplexity(model: object, text: Path, quant: str) -> dict[str, Any]:
    told = fourbit(
        "eval", model, "--quant", quant, "--tasks", f"perplexity={text}", "--window", 512
    )
    return told["results"]["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=0, help="of the evaluated text; 0: all")
    parser.add_argument("--only", default="wiki,c4", help="what to calibrate on")
    parser.add_argument("--damping", default="0.01")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "fp4", "int8"])
    options = parser.parse_args()
    stamped = stamp()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = options.data_dir / "wikitext-2" / "valid.txt.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read()
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        held_out, wiki = folder / "held-out.txt", folder / "wiki.txt"
        held_out.write_text(first[: options.characters or None], encoding="utf-8")
        wiki.write_text(second, encoding="utf-8")
        texts = {"wiki": wiki, "c4": options.data_dir / "c4_demo" / "c4_demo.jsonl.gz"}
        variants = ["none", "absmax", *options.only.split(",")]
        found: dict[str, float] = {}
        for variant in variants:
            seconds = 0.0
            if variant == "none":
                told = perplexity(options.model, held_out, "none")
            else:
                target = folder / variant
                how = ["--quant", options.quant]
                if variant in texts:
                    how += ["--calibrate", texts[variant], "--damping", options.damping]
                written = fourbit("quantize", options.model, "-o", target, *how)
                seconds = written["seconds"]
                told = perplexity(target, held_out, options.quant)
            found[variant] = told["perplexity"]
            gap = found["absmax"] - found["none"] if "absmax" in found else 0.0
            closed = (found["absmax"] - told["perplexity"]) / gap if gap else 0.0
            row = {
                **stamped,
                "model": options.model.name,
                "quant": options.quant if variant != "none" else "none",
                "calibrated_on": variant if variant in texts else "",
                "damping": options.damping if variant in texts else "",
                "tokens": told["n"],
                "perplexity": round(told["perplexity"], 4),
                "stderr": round(told["perplexity_stderr"], 4),
                "gap_closed_percent": round(100 * closed, 1),
                "quantize_seconds": round(seconds, 1),
            }
            append("calibrate", row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
