"""Compiles every kernel for a card that is not here and counts what came out: ``ARCH FOLDER``.

ptxas and cuobjdump are inside Triton's wheel. No kernel may spill (attention: more than four
registers); registers and, where weights are counted, lane instructions a weight stay within what
was seen when the kernel was written.
An H200 issues 19.6 lane instructions in the time in which a 4-bit weight is read and 16 bits are
written, 4.0 in that in which it is read alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourbit.ops.triton import (
    adamw,
    attention,
    decoding,
    dequantize,
    elementwise,
    loss,
    norms,
    product,
    quantize,
)

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """A kernel, its arguments' types in order, constants, and what it may cost.

    A type that ends in ":16" is a multiple of 16, as a launch would find out.
    ``weights`` are those one program handles, 0 where none are counted.
    """

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    registers: int
    weights: int = 0
    instructions: float = 0.0
    warps: int = 4
    options: dict[str, Any] | None = None
    stack: int = 0


EXACT = {"enable_fp_fusion": False}
SCALES = "*u8 {absmax} *fp32 *fp32 *fp32 *fp32"
NESTED, PLAIN = SCALES.format(absmax="*u8"), SCALES.format(absmax="*fp32")
RULE = " fp32" * 7


def tile(double: bool, blocksize: int) -> dict[str, Any]:
    return {
        "BLOCKSIZE": blocksize,
        "ROWS": dequantize.TILE // blocksize,
        "DOUBLE": double,
        "WHOLE": True,
    }


def product_case(name: str, rows: int, step: int, instructions: float) -> Case:
    constants = {
        "BLOCKSIZE": 64, "DOUBLE": True, "BM": max(16, rows), "BN": 64, "BK": step, "STEPS": 16,
    }  # fmt: skip
    return Case(
        name, product.few_rows, f"*bf16 {NESTED} *fp32 i32 i32 i32", constants, 255,
        64 * step, instructions, options={**EXACT, "num_stages": 3},
    )  # fmt: skip


def joint_case(rows: int, instructions: float) -> Case:
    constants = {
        "MEMBERS": 3, "BLOCKSIZE": 64, "DOUBLE": True, "BM": max(16, rows), "BN": 64, "BK": 64,
        "STEPS": 16,
    }  # fmt: skip
    weights = "*u8 *u8 *fp32 *fp32 " * 3
    return Case(
        f"few rows of three, {rows}", decoding.few_rows_of,
        f"*bf16 {weights} *fp32 *fp32 *fp32 i32 i32 i32 i32 i32", constants, 255, 64 * 64,
        instructions, options={**EXACT, "num_stages": 3},
    )  # fmt: skip


def attend_case(wide: int) -> Case:
    positions, warps = decoding.attention_tile(wide)
    constants = {
        "CAPPED": True, "WINDOW": True, "GROUP": 4, "HEAD": wide, "BG": 16, "BD": wide,
        "BLOCK": positions, "STEPS": 4,
    }  # fmt: skip
    types = "*bf16 *bf16 *bf16 *i64 *fp32 *fp32 *fp32 i32 i32 i32 fp32 fp32 i32"
    return Case(f"attend {wide}, part", decoding.attend_part, types, constants, 168, warps=warps)


def attention_cases(name: str, width: int, dtype: str, capped: bool) -> list[Case]:
    found = []
    for kernel, backward, pointers, scalars, steps, more in (
        (attention.forward, False, f"*{dtype} *{dtype} *{dtype} *i32 *i32 *{dtype} *fp32",
         "i32 i32 i32", 12, {"SHARED": False}),
        (attention.backward_queries, True,
         f"*{dtype} *{dtype} *{dtype} *{dtype} *fp32 *fp32 *i32 *{dtype}",
         "i32 i32 i32", 15, {}),
        (attention.backward_keys, True,
         f"*{dtype} *{dtype} *{dtype} *{dtype} *fp32 *fp32 *i32 *i32 *{dtype} *{dtype}",
         "i32 i32 i32 i32", 18, {}),
    ):  # fmt: skip
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        tile = attention.tiles(kind, width, backward=backward)
        constants = {
            "BM": tile.queries, "BN": tile.keys, "W": width, "VW": width, "D": width, "DV": width,
            "CAPPED": capped, "RANGED": True, **more,
        }  # fmt: skip
        types = f"{pointers} {scalars} fp32 fp32" + " i32:16" * steps
        found.append(
            Case(f"{name}, {kernel.__name__}", kernel, types, constants, 255, warps=tile.warps,
                 options={"num_stages": tile.stages}, stack=16)
        )  # fmt: skip
    return found


CASES = [
    Case("expand bf16", dequantize.expand, f"{NESTED} *bf16 i32 i32 i32", tile(True, 64), 128,
         dequantize.TILE, 11.0, options=EXACT),
    Case("expand bf16, single", dequantize.expand, f"{PLAIN} *bf16 i32 i32 i32",
         tile(False, 64), 128, dequantize.TILE, 11.0, options=EXACT),
    Case("expand fp32", dequantize.expand, f"{NESTED} *fp32 i32 i32 i32", tile(True, 64), 168,
         dequantize.TILE, 14.0, options=EXACT),
    Case("pack", quantize.pack, "*bf16 *fp32 *u8 *u8 *fp32 i32 i32",
         {"BLOCKSIZE": 64, "ROWS": dequantize.TILE // 128}, 255, dequantize.TILE // 2, 110.0,
         options=EXACT),
    product_case("few rows, 1", 1, 64, 26.0),
    product_case("few rows, 64", 64, 64, 30.0),
    joint_case(1, 26.0),
    joint_case(64, 30.0),
    Case("finish", decoding.finish, "*fp32 *bf16 *bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32",
         {"PARTS": 2, "BIAS": True, "THIN": 1, "ADDED": True, "BM": 16, "BN": 128, "BR": 64}, 168),
    *(attend_case(wide) for wide in (64, 128, 256)),
    Case("attend, whole", decoding.attend_whole, "*fp32 *fp32 *fp32 *bf16 i32",
         {"HEAD": 128, "BD": 128, "PARTS": 16}, 168, warps=1),
    Case("rms norm", norms.rms_forward, "*bf16 *bf16 *bf16 *fp32 i32 i32 i32 fp32 fp32",
         {"WIDTH": 4096, "BLOCK": 4096}, 96, warps=8),
    Case("rms norm, back", norms.rms_backward,
         "*bf16 *bf16 *bf16 *fp32 *bf16 *bf16 i32 i32 i32 fp32",
         {"ADD": True, "WIDTH": 4096, "BLOCK": 4096}, 128, warps=8),
    Case("layer norm", norms.layer_forward, "*bf16 *bf16 *bf16 *bf16 *fp32 i32 i32 fp32",
         {"WIDTH": 768, "BLOCK": 1024}, 96),
    Case("layer norm, back", norms.layer_backward,
         "*bf16 *bf16 *bf16 *fp32 *bf16 *bf16 i32 i32",
         {"ADD": True, "WIDTH": 768, "BLOCK": 1024}, 96),
    Case("rotate", elementwise.rotate, "*bf16 *bf16 *bf16 i32 i32 i32",
         {"BACK": False, "HEAD": 128, "HALF": 64, "BLOCK": 64}, 64, warps=1),
    Case("activate", elementwise.act_forward, "*bf16 *bf16 i32 i32 i32",
         {"GELU": False, "GATED": True, "BLOCK": 1024}, 64),
    Case("activate, back", elementwise.act_backward,
         "*bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32",
         {"GELU": False, "GATED": True, "BLOCK": 1024}, 96),
    Case("activate gelu, back", elementwise.act_backward,
         "*bf16 *bf16 *bf16 *bf16 i32 i32 i32 i32 i32",
         {"GELU": True, "GATED": True, "BLOCK": 1024}, 96),
    Case("dropout", elementwise.mask_out, "*bf16 *bf16 *i64 i32 fp32 i32",
         {"USE": True, "ADD": True, "BLOCK": 1024}, 64, options=EXACT),
    Case("cross-entropy", loss.cross_entropy, "*bf16 *i64 *fp32 i32 fp32 fp32",
         {"CAPPED": True, "GRADIENT": True, "WIDTH": 128256, "BLOCK": 4096}, 168, warps=8),
    Case("adamw 32", adamw.update, "*fp32 *fp32 *fp32 *fp32 i32" + RULE, {"BLOCK": 1024}, 96,
         options=EXACT),
    Case("adamw 8", adamw.update_blocks,
         "*fp32 *fp32 *u8 *fp32 *fp32 *fp32 *u8 *fp32 *fp32 *fp32 i32" + RULE, {}, 96,
         options=EXACT),
    Case("adamw 32, many", adamw.update_table, "*i64" + RULE,
         {"DTYPE": tl.float32, "BLOCK": 1024}, 96, options=EXACT),
    Case("adamw 8, many", adamw.update_blocks_table, "*i64 *fp32 *fp32 *fp32 *fp32" + RULE,
         {"DTYPE": tl.float32}, 96, options=EXACT),
    *attention_cases("attention 64", 64, "bf16", False),
    *attention_cases("attention 128", 128, "bf16", False),
    *attention_cases("attention 128, fp16", 128, "fp16", False),
    *attention_cases("attention 256, capped", 256, "bf16", True),
    *attention_cases("attention 128, fp32", 128, "fp32", False),
    *attention_cases("attention 256, fp32", 256, "fp32", False),
]  # fmt: skip


def compiled(case: Case, arch: int) -> Any:
    names = case.kernel.arg_names
    given = iter(case.types.split())
    signature = {n: "constexpr" if n in case.constants else next(given) for n in names}
    assert not list(given), f"{case.name}: more types than arguments"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned
    )
    options = {"num_warps": case.warps, **(case.options or {})}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassembled(cubin: Path, flag: str) -> str:
    return subprocess.run([TOOL, flag, cubin], check=True, capture_output=True, text=True).stdout


def operation(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def body(sass: str) -> list[str]:
    """The largest loop where there is one, else the whole kernel."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = [
        [text for place, text in lines if int(m[1], 16) <= place <= end]
        for end, text in lines
        if (m := re.search(r"BRA.*?(0x[0-9a-f]+)", text)) and int(m[1], 16) < end
    ]
    longest = max(loops, key=len, default=[])
    return longest if len(longest) > 30 else [t for _, t in lines if operation(t) != "NOP"]


def check(case: Case, arch: int, folder: Path) -> list[str]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled(case, arch).asm["cubin"])
    usage = disassembled(cubin, "--dump-resource-usage")
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    instructions = body(disassembled(cubin, "--dump-sass"))
    each = len(instructions) * case.warps * 32 / case.weights if case.weights else 0.0
    counted = Counter(map(operation, instructions))
    told = f"{case.name}: {registers} registers, stack {stack}"
    if case.weights:
        told += f", {each:.1f} lane instructions a weight {dict(counted.most_common(6))}"
    if case.options == EXACT:
        # what must round as the reference does must not be fused
        told += f", {counted['FFMA']} FFMA"
    print(told)
    problems = []
    if stack > case.stack:
        problems.append(f"{case.name} spills")
    if registers > case.registers:
        problems.append(f"{case.name}: {registers} registers, {case.registers} allowed")
    if each > case.instructions:
        problems.append(f"{case.name}: {each:.1f} a weight, {case.instructions} allowed")
    return problems


def main() -> None:
    arch, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    problems = [problem for case in CASES for problem in check(case, arch, folder)]
    if problems:
        sys.exit("\n".join(problems))
    print(f"sm_{arch}: within budget")


if __name__ == "__main__":
    main()
