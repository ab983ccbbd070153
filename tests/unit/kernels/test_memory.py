import pytest
import torch

from tokenmill.kernels.memory import zeros


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 16, 132), (1 << 20,)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_zeros_begin_with_a_cache_line(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(shape, dtype)
    assert (made.shape, made.dtype) == (shape, dtype)
    assert made.is_contiguous()
    assert not made.any()
    assert made.numel() == 0 or made.data_ptr() % 64 == 0
