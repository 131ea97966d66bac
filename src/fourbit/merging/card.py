"""The model card in a merged folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fourbit import __version__

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
```"""


def merged_card(record: Mapping[str, Any], *, hub_base: str | None) -> str:
    """Markdown with the YAML header that hubs read.

    Args:
        record: what ``merge.json`` holds.
        hub_base: hub id of the base; None for a local one.
    """
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["fourbit", "merged"]}
    if hub_base is not None:
        front["base_model"] = hub_base
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    kind = "its 4-bit weights, restored" if record["base"] == "dequantized" else "its own weights"
    proof = record["proof"]
    if proof is None:
        proven = "**Not proven**: merged with `--no-proof`, the answers were never compared."
    else:
        proven = (
            f"Compared with the adapter on its base over {proof['positions']} positions"
            f" ({proof['asked']}): largest difference of a logit {proof['max_abs_diff']:.3g},"
            f" mean KL {proof['kl']:.3g}, same likeliest token at"
            f" {proof['top1_agreement']:.2%}, token loss {proof['loss_before']:.4f} with the"
            f" adapter and {proof['loss_after']:.4f} merged."
        )
    return (
        f"---\n{header}\n---\n# Model merged with fourbit {__version__}\n\n"
        f"- base: `{record['model']}`"
        + (f" at revision `{record['revision']}`" if record["revision"] else "")
        + f"\n- the adapter was added to {kind}\n- dtype: {record['dtype']}\n\n"
        f"{proven} All figures are in `merge.json`.\n\n{_LOAD}\n"
    )
