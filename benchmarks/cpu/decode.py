"""Decoding: tokens/s of greedy text, one row, and of a 512-token prompt, all sides in turn.

    python benchmarks/cpu/decode.py [--quick] [--only 'fourbit*']

A token's time is (N + 1 tokens) - (1 token), so neither the prompt nor what a side prepares once
is in it. llama.cpp is driven at its lowest level: one llama_decode and an argmax a token. The
answers are checked: the float32 model with the same NF4 values reads each side's text, and the
probability it gives to their choices may not fall behind its own first choice by more than bf16's
rounding does (a wrong engine loses whole nats).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol
from protocol import Case, Outcome

import models

FILE = "cpu_decode.csv"
COLUMNS = ("tokens_per_second", "prefill_tokens_per_second", "peak_mb", "weights_mb")
PROMPT, PREFILL = 32, 512
ADAPTER_STD = 0.02
REGRET = 0.05
"""Nats a token; greedy choices of bf16 sides lose a few thousandths."""
SIDES: dict[str, dict[str, Any]] = {
    "fourbit": {"side": "fourbit", "quant": "nf4"},
    "llama.cpp-Q4_0": {"side": "llama.cpp", "kind": "Q4_0"},
    "bnb": {"side": "bnb"},
    "fourbit-lora": {"side": "fourbit", "quant": "nf4", "lora": True},
    "bnb-lora": {"side": "bnb", "lora": True},
    "fourbit-int8": {"side": "fourbit", "quant": "int8"},
    "fourbit-16bit": {"side": "fourbit", "quant": None},
    "bnb-int8": {"side": "bnb", "int8": True},
    "transformers-bf16": {"side": "transformers", "dtype": "bfloat16"},
    "transformers-fp32": {"side": "transformers", "dtype": "float32"},
    "llama.cpp-Q4_1": {"side": "llama.cpp", "kind": "Q4_1"},
    "llama.cpp-Q8_0": {"side": "llama.cpp", "kind": "Q8_0"},
    "torchao-int4": {"side": "torchao"},
}
LARGE = ("fourbit", "llama.cpp-Q4_0", "bnb", "fourbit-lora", "transformers-bf16")
SAME_WEIGHTS = ("fourbit", "fourbit-lora", "bnb", "bnb-lora")
"""Sides that compute with the NF4 values that the reference has."""


def cases(options: argparse.Namespace) -> list[Case]:
    """All sides of both sizes, and what memory can deliver in the same minutes."""
    made = [Case("read", {"side": "read"})]
    for size, names in (("", tuple(SIDES)), ("-1.1b", LARGE)):
        told = models.large(options) if size else models.small(options)
        told |= {"new": (8 if options.quick else 32) if size else (32 if options.quick else 128)}
        for name in names:
            spec = {**told, **SIDES[name], "to": str(options.work / f"decoded-{name}{size}.json")}
            if spec["side"] == "llama.cpp":
                spec["file"] = str(models.gguf(spec["model"], spec["kind"], options) or "")
            made.append(Case(name + size, spec))
    return made


def regrets(outcome: Outcome, wanted: list[Case], options: argparse.Namespace) -> dict[str, float]:
    """Mean loss of probability against the float32 reference, by case."""
    measured = {row["case"] for row in outcome.rows}
    found: dict[str, float] = {}
    for case in wanted:
        name = case.name.removesuffix("-1.1b")
        if name not in SAME_WEIGHTS or case.name not in measured:
            continue
        told = {**case.spec, "side": "judge"}
        found |= {case.name: protocol.run_child(__file__, told, options, {})["regret"]}
        protocol.say(f"{case.name}: {found[case.name]:.4f} nats behind the float32 choice")
    return found


def main() -> None:
    parser = protocol.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--require-engine", help="that our 4-bit sides must report: native")
    options = parser.parse_args()
    if options.child:
        child_main(json.loads(options.child))
        return
    options = protocol.settle(options)
    wanted = cases(options)
    outcome = protocol.measure(__file__, options.results / FILE, wanted, options)
    print(protocol.table(outcome.rows, COLUMNS))
    report_bandwidth(outcome)
    lost = regrets(outcome, wanted, options)
    faults = [
        f"{name}: its choices are {regret:.3f} nats a token behind the float32 model's"
        for name, regret in lost.items()
        if name.startswith("fourbit") and not regret <= REGRET
    ]
    wrong = {
        f"{row['case']}: decoded by {row['engine']}, not {options.require_engine}"
        for row in outcome.rows
        if options.require_engine
        and row["case"].removesuffix("-1.1b") in ("fourbit", "fourbit-lora")
        and row["engine"] != options.require_engine
    }
    protocol.finish(outcome, [*faults, *sorted(wrong)])


def report_bandwidth(outcome: Outcome) -> None:
    """Weights read per second as a share of what memory delivers."""
    read = protocol.spread(outcome.rows, "read", "read_gb_s")
    if read is None:
        return
    for name in dict.fromkeys(row["case"] for row in outcome.rows):
        share = bandwidth_share(outcome.rows, name)
        if share is not None:
            print(f"{name}: {share:.0%} of the {read.median:.1f} GB/s that memory delivers")


def bandwidth_share(rows: list[protocol.Row], case: str) -> float | None:
    """``bytes of weights x tokens/s / bandwidth``, of medians."""
    read = protocol.spread(rows, "read", "read_gb_s")
    speed = protocol.spread(rows, case, "tokens_per_second")
    size = protocol.spread(rows, case, "weights_mb")
    if read is None or speed is None or size is None:
        return None
    return size.median * speed.median / 1e3 / read.median


# The children.


def child_main(spec: dict[str, Any]) -> None:
    import child

    child.begin(spec)
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "read": read_bandwidth,
        "judge": judge,
        "llama.cpp": llama_cpp,
    }
    child.emit(kinds.get(spec["side"], decode)(spec))


def read_bandwidth(spec: dict[str, Any]) -> dict[str, float]:
    import ceilings

    return {"read_gb_s": ceilings.bandwidth(7, spec["threads"])["read_gb_s"]}


Run = Callable[[list[int], int], list[int]]
"""New ids for a prompt: exactly as many as asked for."""
Maker = tuple[Run, float, str]
"""How to run, the bytes of weights a token reads, and the code that runs."""


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """A side that lives in PyTorch."""
    import child
    import peft as _peft
    import transformers as _transformers

    del _peft, _transformers
    memory = child.Memory()
    began = time.perf_counter()
    run, weights, engine = MAKERS[spec["side"]](spec)
    loaded = time.perf_counter() - began
    memory.start()
    found = time_tokens(run, spec)
    told = {"weights_mb": weights / 1e6, "engine": engine, "load_s": loaded}
    return {**found, **told, **memory.values()}


def time_tokens(run: Run, spec: dict[str, Any], *, repeats: int = 3) -> dict[str, Any]:
    """Tokens/s of new text after a short prompt, and of a long prompt."""
    import child

    text = child.tokens(spec, 1, PREFILL)[0].tolist()
    short, new = text[:PROMPT], spec["new"]
    run(short, 4)
    first = child.median_seconds(lambda: run(short, 1), repeats=repeats)
    speeds, ids = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        ids = run(short, new + 1)
        speeds.append(new / (time.perf_counter() - began - first))
        if len(ids) != new + 1:
            raise SystemExit(f"{len(ids)} tokens instead of {new + 1}")
    run(text, 1)
    prompt = child.median_seconds(lambda: run(text, 1), repeats=repeats, warmup=0)
    Path(spec["to"]).write_text(json.dumps({"prompt": short, "new": ids}))
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "prefill_tokens_per_second": PREFILL / prompt,
        "new_tokens": new,
    }


def with_adapter(model: Any, spec: dict[str, Any]) -> Any:
    """The same random adapter on every side that carries one; its B is not zero."""
    if not spec.get("lora"):
        return model
    import child
    import sides
    from peft import get_peft_model

    model = get_peft_model(model, sides.lora())
    child.seed_adapter(model, std_b=ADAPTER_STD)
    return model


def fourbit_side(spec: dict[str, Any]) -> Maker:
    """`fourbit generate`: the Generator."""
    import fourbit
    from fourbit.generate import Generator, Sampling

    quant = fourbit.QuantConfig(quant_type=spec["quant"]) if spec["quant"] else None
    model, tokenizer = fourbit.load(spec["model"], quant=quant)
    model = with_adapter(model, spec).eval()
    # no end of text: every side makes the same number of tokens
    base = model.get_base_model() if spec.get("lora") else model
    base.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    seen: list[list[int]] = []
    plain_decode = tokenizer.decode

    def listening(ids: Any, **keywords: Any) -> Any:
        seen.append(list(ids))
        return plain_decode(ids, **keywords)

    tokenizer.decode = listening
    generator = Generator(model, tokenizer, None)

    def run(prompt: list[int], count: int) -> list[int]:
        generator.answers([prompt], Sampling(max_new_tokens=count))
        return seen[-1]

    return run, stored_bytes(base), engine_of(model)


def engine_of(model: Any) -> str:
    """``native``, or why transformers' own generation serves."""
    try:
        decoding = importlib.import_module("fourbit.decoding")
    except ModuleNotFoundError:
        return "unknown"
    decoder, reason = decoding.build_decoder(model)
    return reason if decoder is None else "native"


def stored_bytes(model: Any) -> float:
    """Bytes of weights that a token needs: what the layers store, the head, no embedding table."""
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    layers = sum(
        p.numel() * p.element_size() for p in model.parameters() if p is not head and p is not table
    )
    return layers + head.numel() * head.element_size()


def generate_run(model: Any) -> Run:
    """transformers' own greedy search."""
    import torch

    def run(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()

    return run


def transformers_side(spec: dict[str, Any]) -> Maker:
    import sides
    import torch

    model = sides.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    model.config.use_cache = True
    return generate_run(model), stored_bytes(model), "transformers"


def bnb_side(spec: dict[str, Any]) -> Maker:
    """bitsandbytes through transformers; in eval mode it takes its native kernels."""
    import sides

    base = sides.bnb_base(spec, int8=spec.get("int8", False)).eval()
    base.config.use_cache = True
    size = stored_bytes(base)
    return generate_run(with_adapter(base, spec).eval()), size, "bitsandbytes"


def torchao_side(spec: dict[str, Any]) -> Maker:
    """torchao's weight-only INT4, in its layout for CPUs."""
    import child
    import sides
    import torch

    quantization = child.peer("torchao.quantization")
    layout = child.peer("torchao.prototype.quantization.int4")
    model = sides.from_pretrained(spec["model"], dtype=torch.bfloat16).eval()
    model.config.use_cache = True
    size = stored_bytes(model)
    wanted = set(sides.quantized_by_all(model))
    sizes = sum(module.weight.numel() for module in wanted)
    settings = layout.PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False)
    quantization.quantize_(model, settings, filter_fn=lambda module, _name: module in wanted)
    # four bits, and two bf16 numbers for each 64 weights
    return generate_run(model), size - sizes * (2 - 0.5 - 4 / 64), "torchao"


MAKERS: dict[str, Callable[[dict[str, Any]], Maker]] = {
    "fourbit": fourbit_side,
    "transformers": transformers_side,
    "bnb": bnb_side,
    "torchao": torchao_side,
}


def llama_cpp(spec: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp without its Python conveniences."""
    import ctypes

    import child
    import numpy as np

    api = child.peer("llama_cpp")
    memory = child.Memory()
    began = time.perf_counter()
    api.llama_backend_init()
    quiet = api.llama_log_callback(lambda _level, _text, _data: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(spec["file"].encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
    settings.n_threads = settings.n_threads_batch = spec["threads"]
    context = api.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"llama.cpp cannot open {spec['file']}")
    loaded = time.perf_counter() - began
    words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def feed(ids: list[int]) -> int:
        array = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(context, api.llama_batch_get_one(array, len(ids))) != 0:
            raise SystemExit("llama_decode failed")
        logits = api.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(words,)).argmax())

    def run(prompt: list[int], count: int) -> list[int]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        found = [feed(prompt)]
        while len(found) < count:
            found.append(feed(found[-1:]))
        return found

    memory.start()
    found = time_tokens(run, spec)
    size = api.llama_model_size(model)
    told = {"weights_mb": size / 1e6, "engine": "llama.cpp", "load_s": loaded}
    return {**found, **told, **memory.values()}


def judge(spec: dict[str, Any]) -> dict[str, float]:
    """How much worse than the float32 model's first choice a side's choices were."""
    import sides
    import torch

    told = json.loads(Path(spec["to"]).read_text())
    model = sides.from_pretrained(spec["model"], dtype=torch.float32).eval()
    sides.round_to_nf4(model)
    model = with_adapter(model, spec).eval()
    ids = torch.tensor([told["prompt"] + told["new"]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(told["prompt"]) - 1 : -1]
    scores = logits.log_softmax(-1)
    taken = scores.gather(1, torch.tensor(told["new"])[:, None])[:, 0]
    return {"regret": float((scores.amax(-1) - taken).mean())}


if __name__ == "__main__":
    main()
