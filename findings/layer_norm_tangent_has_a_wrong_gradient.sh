#!/usr/bin/env bash
# torch 2.13.0: the gradient of a tangent of layer_norm is wrong, without an error. The formula of its
# forward-mode derivative takes the mean and the deviation that the forward pass saved as they are, and
# they carry no gradient: reverse mode over forward mode loses the terms that go through them.
# Everything that trains through a Jacobian-vector product of a transformer meets it, such as a penalty
# on the tangent, or MeanFlow without its stop-gradient. Forward over reverse and reverse over reverse
# are right, and so are group_norm and rms_norm in all three orders. The same second derivative in
# float64, compared with central differences:
#
#     layer_norm  reverse over forward: 0.369 off   forward over reverse: 0.000 off   reverse over reverse: 0.000 off
#     group_norm  reverse over forward: 0.000 off   forward over reverse: 0.000 off   reverse over reverse: 0.000 off
#     rms_norm    reverse over forward: 0.000 off   forward over reverse: 0.000 off   reverse over reverse: 0.000 off
#
# Fails if the gradient of layer_norm's tangent is right, or one of the others is wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

torch.manual_seed(0)
x, direction, weight = (torch.randn(2, 6, dtype=torch.float64) for _ in range(3))
Function = Callable[[Tensor], Tensor]


def weighted(function: Function) -> Function:
    return lambda x: (function(x) * weight).sum()


def reverse_over_forward(function: Function) -> Tensor:
    return grad(lambda x: weighted(lambda x: jvp(function, (x,), (direction,))[1])(x))(x)


def forward_over_reverse(function: Function) -> Tensor:
    return jvp(grad(weighted(function)), (x,), (direction,))[1]


def reverse_over_reverse(function: Function) -> Tensor:
    return grad(lambda x: (grad(weighted(function))(x) * direction).sum())(x)


def central_difference(function: Function, step: float = 1e-5) -> Tensor:
    gradient = grad(weighted(function))
    return (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)


norms = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x.reshape(2, 2, 3), 2).reshape(2, 6),
    "rms_norm": lambda x: F.rms_norm(x, (6,), eps=1e-5),
}
orders = (reverse_over_forward, forward_over_reverse, reverse_over_reverse)
for name, norm in norms.items():
    expected = central_difference(norm)
    errors = [float((order(norm) - expected).norm() / expected.norm()) for order in orders]
    texts = [f"{order.__name__.replace('_', ' ')}: {error:.3f} off" for order, error in zip(orders, errors)]
    print(f"{name:<11} {'   '.join(texts)}")
    assert max(errors[1:]) < 1e-6
    assert errors[0] > 0.1 if name == "layer_norm" else errors[0] < 1e-6
PYTHON
