"""Weights that cannot be computed with are named."""

import pytest
import torch
from torch import nn

from fastdistill.errors import UserError
from fastdistill.models.weights import check_computable, check_finite


class Quantised(torch.Tensor):
    """Tensor like torchao's: of a class of its own, with the type that it stands for, and without
    most operations."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function in (torch.isfinite, torch.abs):
            raise NotImplementedError(f"Quantised dispatch: no {function}")
        return super().__torch_function__(function, types, arguments, keywords)


def of(tensor):
    module = nn.Sequential(nn.Linear(2, 2), nn.Module())
    module[1].register_parameter("scale", nn.Parameter(tensor, requires_grad=False))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sound_weights_pass(dtype):
    module = of(torch.ones(3)).to(dtype)
    check_finite(module, "model")
    check_computable(module, "model")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.ones(3, dtype=torch.int8),
            r"model weight 1\.scale is int8, which can be neither scored nor trained; load",
        ),
        (torch.ones(3).to(torch.float8_e4m3fn), r"1\.scale is float8_e4m3fn"),
        (torch.ones(3).as_subclass(Quantised), r"1\.scale is Quantised"),
        (torch.ones(3, device="meta"), r"1\.scale is not in memory"),
    ],
)
def test_weights_that_are_not_to_be_computed_with(tensor, message):
    module = of(tensor)
    with pytest.raises(UserError, match=message):
        check_computable(module, "model")
    check_finite(module, "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value):
    with pytest.raises(UserError, match=r"model weight 1\.scale has NaN or infinite values"):
        check_finite(of(torch.tensor([1.0, value])), "model")
