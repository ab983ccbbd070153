"""The operations a model is made of, each callable by its name.

The file `ops/<operation>.py` is the contract: shapes, dtypes, what is mutated, a plain torch reference and test cases.
`dispatch` chooses the implementation by the device of the tensors.
"""

from tokenmill.kernels.dispatch import Op
from tokenmill.kernels.ops import gelu_mul as _gelu_mul
from tokenmill.kernels.ops import kv_write as _kv_write
from tokenmill.kernels.ops import linear as _linear
from tokenmill.kernels.ops import paged_attention as _paged_attention
from tokenmill.kernels.ops import penalize as _penalize
from tokenmill.kernels.ops import rms_norm as _rms_norm
from tokenmill.kernels.ops import rope as _rope
from tokenmill.kernels.ops import sample as _sample
from tokenmill.kernels.ops import silu_mul as _silu_mul
from tokenmill.kernels.ops import token_logprobs as _token_logprobs

__all__ = [
    "OPS",
    "gelu_mul",
    "kv_write",
    "linear",
    "paged_attention",
    "penalize",
    "rms_norm",
    "rope",
    "sample",
    "silu_mul",
    "token_logprobs",
]

rms_norm = Op("rms_norm", _rms_norm.reference)
rope = Op("rope", _rope.reference)
silu_mul = Op("silu_mul", _silu_mul.reference)
gelu_mul = Op("gelu_mul", _gelu_mul.reference)
linear = Op("linear", _linear.reference)
kv_write = Op("kv_write", _kv_write.reference)
paged_attention = Op("paged_attention", _paged_attention.reference)
penalize = Op("penalize", _penalize.reference)
sample = Op("sample", _sample.reference)
token_logprobs = Op("token_logprobs", _token_logprobs.reference)

OPS = (rms_norm, rope, silu_mul, gelu_mul, linear, kv_write, paged_attention, penalize, sample, token_logprobs)
"""All of them, for `tokenmill doctor` and the contract tests."""
