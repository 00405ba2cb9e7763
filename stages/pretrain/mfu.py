"""Model FLOPs utilisation (MFU; Chowdhery 2022, PaLM, appendix B): the share of what the hardware
could compute that training does compute."""

import time

import torch

from common.model.costs import GPUS

SIZE = 1024  # rows and columns of the matrices whose product is timed


class Hardware:
    """The most FLOP/s that one process's device is known to reach.

    For a known GPU that is its data sheet's figure (dense bf16). Elsewhere a matrix product is
    timed, and in a noisy moment, when others use the machine too, that comes out too slow: shares
    of 1.9 were seen. So the product is timed again now and then (`measure`), and the best figure
    counts. Training itself is a measurement, too: it cannot be faster than the hardware.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        known = [gpu.flops for key, gpu in GPUS.items() if key.split("-")[0].upper() in name]
        self.best = known[0] if known else 0.0
        self.matrix = None if known else torch.randn(SIZE, SIZE, device=device).to(dtype)
        self.measure()

    def measure(self) -> None:
        """Time a few products, unless the data sheet is known; 0.2 s on a slow core."""
        for _ in range(4 if self.matrix is not None else 0):
            start = time.perf_counter()
            torch.mm(self.matrix, self.matrix).sum().item()
            self.best = max(self.best, 2 * SIZE**3 / (time.perf_counter() - start))

    def share(self, flops: float) -> float:
        """`flops` a second, reached in training, as a share of the best figure seen: at most 1."""
        if flops > self.best:
            self.measure()
        self.best = max(self.best, flops)
        return flops / self.best
