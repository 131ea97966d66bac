"""fourbit: fine-tunes language models in 4 bits on the hardware people have.

Importing this does nothing but define names; each is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourbit.lazy import lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fourbit.absmax import dequantize_absmax as dequantize_absmax
    from fourbit.absmax import quantize_absmax as quantize_absmax
    from fourbit.api import plan as plan
    from fourbit.api import verify as verify
    from fourbit.data.config import DataConfig as DataConfig
    from fourbit.errors import FourbitError as FourbitError
    from fourbit.exporting import export_gguf as export_gguf
    from fourbit.integrations.takeover import take_over_bitsandbytes as take_over_bitsandbytes
    from fourbit.integrations.trainer import ReceiptCallback as ReceiptCallback
    from fourbit.integrations.transformers import FourbitConfig as FourbitConfig
    from fourbit.integrations.transformers import quantize_model as quantize_model
    from fourbit.linear import Linear4bit as Linear4bit
    from fourbit.linear import Linear8bit as Linear8bit
    from fourbit.loading import load as load
    from fourbit.lora import LoraSettings as LoraSettings
    from fourbit.merging.result import MergeOptions as MergeOptions
    from fourbit.merging.result import MergeResult as MergeResult
    from fourbit.merging.run import merge as merge
    from fourbit.optim import AdamW as AdamW
    from fourbit.optim import OptimConfig as OptimConfig
    from fourbit.prompts import PromptSettings as PromptSettings
    from fourbit.quantize import QuantConfig as QuantConfig
    from fourbit.quantize import QuantState as QuantState
    from fourbit.quantize import dequantize_4bit as dequantize_4bit
    from fourbit.quantize import dequantize_int8 as dequantize_int8
    from fourbit.quantize import quantize_4bit as quantize_4bit
    from fourbit.quantize import quantize_int8 as quantize_int8
    from fourbit.quantizing import QuantizeOptions as QuantizeOptions
    from fourbit.quantizing import quantize_checkpoint as quantize_checkpoint
    from fourbit.receipt import Receipt as Receipt
    from fourbit.receipt import watch as watch
    from fourbit.training.config import TrainConfig as TrainConfig
    from fourbit.training.run import TrainResult as TrainResult
    from fourbit.training.run import train as train

_HOMES = {
    "AdamW": "fourbit.optim",
    "DataConfig": "fourbit.data.config",
    "FourbitConfig": "fourbit.integrations.transformers",
    "FourbitError": "fourbit.errors",
    "Linear4bit": "fourbit.linear",
    "Linear8bit": "fourbit.linear",
    "LoraSettings": "fourbit.lora",
    "MergeOptions": "fourbit.merging.result",
    "MergeResult": "fourbit.merging.result",
    "OptimConfig": "fourbit.optim",
    "PromptSettings": "fourbit.prompts",
    "QuantConfig": "fourbit.quantize",
    "QuantState": "fourbit.quantize",
    "QuantizeOptions": "fourbit.quantizing",
    "Receipt": "fourbit.receipt",
    "ReceiptCallback": "fourbit.integrations.trainer",
    "TrainConfig": "fourbit.training.config",
    "TrainResult": "fourbit.training.run",
    "dequantize_4bit": "fourbit.quantize",
    "dequantize_absmax": "fourbit.absmax",
    "dequantize_int8": "fourbit.quantize",
    "export_gguf": "fourbit.exporting",
    "load": "fourbit.loading",
    "merge": "fourbit.merging.run",
    "plan": "fourbit.api",
    "quantize_4bit": "fourbit.quantize",
    "quantize_absmax": "fourbit.absmax",
    "quantize_checkpoint": "fourbit.quantizing",
    "quantize_int8": "fourbit.quantize",
    "quantize_model": "fourbit.integrations.transformers",
    "take_over_bitsandbytes": "fourbit.integrations.takeover",
    "train": "fourbit.training.run",
    "verify": "fourbit.api",
    "watch": "fourbit.receipt",
}

__all__ = [
    "__version__",
    "DataConfig",
    "FourbitConfig",
    "FourbitError",
    "Linear4bit",
    "Linear8bit",
    "LoraSettings",
    "MergeOptions",
    "MergeResult",
    "OptimConfig",
    "PromptSettings",
    "QuantConfig",
    "QuantState",
    "QuantizeOptions",
    "Receipt",
    "ReceiptCallback",
    "TrainConfig",
    "TrainResult",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_int8",
    "export_gguf",
    "load",
    "merge",
    "plan",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_checkpoint",
    "quantize_int8",
    "quantize_model",
    "take_over_bitsandbytes",
    "train",
    "verify",
    "watch",
]


__getattr__, __dir__ = lazily(__name__, _HOMES)
