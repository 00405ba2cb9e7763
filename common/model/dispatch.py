"""Who computes the model's inner operations: plain PyTorch, or what is faster on a CPU.

There are two tables of the same operations, with the same arguments and the same mathematics (tests
compare them): PLAIN is what attention.py and layers.py say, and what GPUs compute; ON_CPU is the
faster code in cpu/. To read the model, PLAIN is all there is to know.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from common.model import attention, layers
from common.model.cpu import attention as cpu_attention
from common.model.cpu import kernels


class Operations(NamedTuple):
    """The operations by name; attention.py and layers.py say what they take and return."""

    attention: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    swiglu: Callable[[Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    logprobs_at: Callable[..., tuple[Tensor, Tensor | None]]
    logprobs_gradient: Callable[..., Tensor]
    pick_ids: Callable[..., tuple[Tensor, Tensor]]


PLAIN = Operations(
    attention=attention.attention,
    rms_norm=layers.rms_norm,
    layer_norm=layers.layer_norm,
    swiglu=layers.swiglu,
    gelu=layers.gelu,
    logprobs_at=layers.logprobs_at,
    logprobs_gradient=layers.logprobs_gradient,
    pick_ids=layers.pick_ids,
)
ON_CPU = Operations(
    attention=cpu_attention.attention,
    rms_norm=kernels.rms_norm,
    layer_norm=kernels.layer_norm,
    swiglu=kernels.swiglu,
    gelu=kernels.gelu,
    logprobs_at=kernels.logprobs_at,
    logprobs_gradient=kernels.logprobs_gradient,
    pick_ids=kernels.pick_ids,
)


def operations(x: Tensor) -> Operations:
    """Those for the device that x is on."""
    return ON_CPU if x.is_cpu else PLAIN
