"""Muon for the matrices of layers, as fast as a CPU allows.

`torch.optim.Muon` takes its products in bfloat16, which a CPU without such instructions emulates at
a hundredth of the speed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import divided_as, whole

# of x, x^3, x^5: as steep at 0 as a quintic can be that stays near 1
_QUINTIC = (3.4445, -4.7750, 2.0315)


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether products in bfloat16 are faster than those in float32.

    >>> isinstance(fast_bfloat16(torch.device("cpu")), bool)
    True
    """
    if device.type != "cpu":
        return True
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def orthogonalised(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """Return matrices `[N, A, B]` with singular values near 1 and the same singular vectors.

    Source: Newton-Schulz with a quintic (Jordan et al. 2024): values end in about [0.7, 1.2].

    >>> values = torch.linalg.svdvals(orthogonalised(torch.diag(torch.tensor([4.0, 1.0]))[None]))
    >>> bool((values > 0.6).all() and (values < 1.3).all())
    True
    """
    if matrices.device.type == "cpu" and len(matrices) > 1:
        # one matrix with its products stays in a core's cache, all together do not
        return torch.cat([orthogonalised(one[None], steps=steps) for one in matrices])
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised, for matrices; on a GPU all of a shape at once.

    A group of parameters may say how many maps each of its matrices holds, one above another, as
    `parts`: each is turned by itself, as if it were a matrix of its own.

    The update has the root mean square that AdamW's has, so that one learning rate fits both.

    Args:
        params: matrices, all `[A, B]`, or groups of them.
        lr: learning rate.
        weight_decay: decoupled, a step and unit of `lr`.
        momentum: share of the gradients before; Nesterov's.
        dtype: of the orthogonalisation; None is bfloat16 where its products are fast, else float32.
            In bfloat16 two sums of a gradient in another order end in directions 6e-3 apart.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; its scale
    from arXiv:2502.16982.

    >>> weight = nn.Parameter(torch.eye(2))
    >>> optimiser = Muon([weight], lr=0.1)
    >>> weight.sum().backward()
    >>> optimiser.step()
    >>> bool((weight < torch.eye(2)).all())
    True
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                # a matrix that is divided among processes is turned whole: there are few, and small
                directions = [whole(self._direction(p, group["momentum"])) for p in parameters]
                fast = fast_bfloat16(parameters[0].device)
                wide = self.dtype or (torch.bfloat16 if fast else torch.float32)
                stacked = torch.stack(directions).to(wide)
                height = shape[0] // group["parts"]
                maps = stacked.reshape(-1, height, shape[1])
                moved = orthogonalised(maps).view_as(stacked).to(directions[0].dtype)
                rate = 0.2 * math.sqrt(max(height, shape[1])) * group["lr"]
                for parameter, direction in zip(parameters, moved, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(divided_as(direction, parameter), alpha=-rate)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
