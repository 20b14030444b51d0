"""The literal loop of LayerwiseCell with derivatives by hand, so that a full run ends in an hour.

The same arithmetic as `new_llm.phase1.train_residual_literal`, dropout 0, which is what it is
compared with before it is used: for its loss, and as the faster peer in time.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from new_llm.cell import LayerwiseCell
from new_llm.config import Phase1Config
from new_llm.phase1 import LiteralEpoch

_NORM_EPSILON = 1e-5


class _Layer:
    """Views of one layer's parameters and their gradients, and what the backward needs."""

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        self.weight, self.bias, self.gate, self.gate_bias, self.scale, self.shift = parameters
        self.gradients = gradients

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        self.context = context
        self.read = torch.cat([x, context])
        self.h = torch.addmv(self.bias, self.weight, self.read).relu_()
        raw = torch.addmv(self.gate_bias, self.gate, self.h)
        width = len(context)
        self.delta = raw[:width].tanh()
        self.share = raw[width:].sigmoid()
        self.forget, self.insert = self.share[:width], self.share[width:]
        self.mixed = torch.addcmul(self.forget * context, self.insert, self.delta)
        out, self.mean, self.rstd = torch.native_layer_norm(
            self.mixed, [width], self.scale, self.shift, _NORM_EPSILON
        )
        return out

    def backward(self, gradient: Tensor, *, first: bool) -> Tensor | None:
        weight, bias, gate, gate_bias, scale, shift = self.gradients
        width = len(gradient)
        mixed, by_scale, by_shift = torch.ops.aten.native_layer_norm_backward(
            gradient, self.mixed, [width], self.mean, self.rstd, self.scale, self.shift,
            [True, True, True],
        )  # fmt: skip
        scale.copy_(by_scale)
        shift.copy_(by_shift)
        torch.mul(mixed * self.insert, 1.0 - self.delta.square(), out=gate_bias[:width])
        both = torch.cat([mixed * self.context, mixed * self.delta])
        torch.mul(both, self.share * (1.0 - self.share), out=gate_bias[width:])
        torch.outer(gate_bias, self.h, out=gate)
        torch.mul(self.gate.T.mv(gate_bias), self.h > 0, out=bias)
        torch.outer(bias, self.read, out=weight)
        if first:
            return None
        back = self.weight[:, len(self.read) - width :].T.mv(bias)
        return torch.addcmul(back, mixed, self.forget)


@torch.no_grad()
def train_literal_by_hand(
    cell: LayerwiseCell,
    embed: Callable[[Tensor], Tensor],
    ids: Tensor,
    config: Phase1Config,
    advance: Callable[..., None],
) -> list[LiteralEpoch]:
    """Train in place; the arguments and the result of the literal loop, over one long text."""
    flat = nn.Parameter(nn.utils.parameters_to_vector(cell.parameters()).clone())
    flat.grad = torch.zeros_like(flat)
    layers = _layers(cell, flat.data, flat.grad)
    optimiser = torch.optim.Adam([flat], lr=config.literal_learning_rate, fused=True)
    epochs = []
    for _ in range(config.epochs):
        converged = iterations = visited = 0
        total = 0.0
        for part in ids.split(4096):
            for x in embed(part):
                context, value = x.new_zeros(cell.context_width), math.inf
                for _ in range(config.max_iterations):
                    updated = context
                    for layer in layers:
                        updated = layer.forward(updated, x)
                    apart = updated - context
                    value = apart.dot(apart).item() / len(apart)
                    gradient: Tensor | None = apart.mul_(2.0 / len(apart))
                    for place in range(len(layers) - 1, -1, -1):
                        assert gradient is not None
                        gradient = layers[place].backward(gradient, first=place == 0)
                    norm = flat.grad.norm().item()
                    if norm > config.gradient_clip:
                        flat.grad.mul_(config.gradient_clip / (norm + 1e-6))
                    optimiser.step()
                    context = updated
                    iterations += 1
                    if value < config.threshold:
                        converged += 1
                        break
                total += value
                visited += 1
            advance(len(part), f"loss {value:.2e}")
        epochs.append(
            LiteralEpoch(
                convergence_rate=converged / visited,
                mean_iterations=iterations / visited,
                mean_loss=total / visited,
                num_positions=visited,
            )
        )
    nn.utils.vector_to_parameters(flat.data, cell.parameters())
    return epochs


def _layers(cell: LayerwiseCell, flat: Tensor, gradient: Tensor) -> list[_Layer]:
    """Cut the flat vectors into each layer's hidden, gate and norm parts."""
    views, gradients, place = [], [], 0
    for parameter in cell.parameters():
        end = place + parameter.numel()
        views.append(flat[place:end].view_as(parameter))
        gradients.append(gradient[place:end].view_as(parameter))
        place = end
    count = len(cell.hidden)
    chosen = [
        [2 * k + i + 2 * count * part for part in range(3) for i in (0, 1)] for k in range(count)
    ]
    return [_Layer([views[i] for i in row], [gradients[i] for i in row]) for row in chosen]
