"""Options of the model."""

from __future__ import annotations

import dataclasses

from tokenmill.config import option
from tokenmill.quant.scheme import ACTIVATIONS, FORMATS, Rounding

__all__ = ["ModelConfig"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held in memory."""

    model: str = option("demo", "`demo` for the built-in model, a folder, or a Hugging Face id")
    dtype: str = option(
        "auto", "type of weights and activations; auto is the checkpoint's", choices=("auto", "float32", "bfloat16")
    )
    quantize: str = option(
        "none",
        "round embedding, head and linear layers to fewer bits while loading",
        choices=("none", *FORMATS.names()),
    )
    quantize_head: str = option(
        "auto",
        "the same for embedding and head alone; auto is as the layers, but int8 where those get int4",
        choices=("auto", "none", *FORMATS.names()),
    )
    activations: str = option(
        "int8", "what inputs of quantized weights are rounded to; bf16 is slower and loses less", choices=ACTIVATIONS
    )
    pack_cache: bool = option(
        False, "keep the weights as the CPU kernels want them, beside the model or in ~/.cache, for the next start"
    )
    device: str = option("auto", "where to compute; auto is cuda if there is one", choices=("auto", "cpu", "cuda"))
    max_model_len: int = option(0, "longest sequence in tokens; 0 is what model and memory allow", low=0)
    pooling: str = option(
        "auto",
        "what an embedding is made of; auto is as the model's sentence-transformers files say, else the last token",
        choices=("auto", "last", "mean"),
    )
    threads: int = option(0, "CPU threads; 0 is all usable cores", low=0)

    @property
    def rounding(self) -> Rounding:
        """What weights and their inputs are rounded to."""
        return Rounding(self.quantize, self.quantize_head, self.activations)
