"""The cells: one gated network that updates a context from a token, `context' = f(context, x)`.

Search, training, inference and generation all call the one `update` of a cell. No loop and no
loss lives here. Axes: `C` context width, `E` embedding width, `H` hidden width, `L` layers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# sup |phi'|: ELU above 0, SiLU at x = 2.3994, GELU at x = sqrt(2), tanh at 0; rounded up. What is
# proved takes all units at their steepest, and costs the least where most of them are, as ELU's
LIPSCHITZ = {"elu": 1.0, "silu": 1.0999, "gelu": 1.1290, "tanh": 1.0}
ACTIVATIONS = {"elu": F.elu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
# of numbers of ConvexCell's delta, and so of its contexts; trained models have one in a million cut
BOUND = 16.0
# larger limits only bound the training: a larger start costs sweeps, and learns no better
LARGEST_INITIAL_COUPLING = 0.5
# singular directions that training follows: one alone is lost when another overtakes it
FOLLOWED = 8
# share of the largest singular value that the direction of its gradient must have
_LEADS = 0.99

Weights = tuple[Tensor, ...]


class Stacks(nn.Module):
    """A module that keeps several maps in one matrix, one above another, to take one product.

    An optimiser that looks at a matrix as a whole must take them apart.
    """

    stacked: Mapping[str, int] = MappingProxyType({})
    """How many maps, by the name of the matrix inside this module."""


class ContextCell(Stacks, ABC):
    """Contract of every cell: contexts `[..., C]` and embeddings `[..., E]` to contexts `[..., C]`.

    One update is split, so that loops do only what depends on the context:
    `update(context, project(x), weights())`. `project` holds all that the token alone decides
    and is one matrix product for a whole text; `weights` are the tensors that an update needs,
    with every limit applied, taken once a loop.
    """

    context_width: int
    embedding_width: int

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Return the token's part of the update, `[..., E]` to `[..., P]`."""

    @abstractmethod
    def weights(self) -> Weights:
        """Return the tensors of an update, differentiable, with limits applied."""

    @abstractmethod
    def update(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return `f(context, x)`, `[..., C]` and `[..., P]` to `[..., C]`."""

    @abstractmethod
    def forget_gates(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return the shares of the old context that an update keeps, `[..., gates, C]`."""

    def search_map(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return the map that token scope iterates; it has the fixed points of `update`."""
        return self.update(context, projected, weights)

    @property
    def separates_gate(self) -> bool:
        """Whether `update` is `forget * context + (1 - forget) * search_map`."""
        return False

    @property
    def has_idle_weights(self) -> bool:
        """Whether some parameter has no part in `update`, so that its gradient is None."""
        return False

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        """Return `f(context, x)`."""
        return self.update(context, self.project(x), self.weights())


class Stage(NamedTuple):
    """One gate of a seed cell and the hidden layers before it, as tensors."""

    from_context: Tensor
    """Context columns of the first hidden layer, `[H, C]`; `project` holds the rest of it."""
    hidden: list[Weights]
    """Weight and bias of each further hidden layer."""
    gate: Weights
    """Weight and bias of delta, forget and input gate, one product, `[3C, H]`."""
    norm: Weights
    """Gain and bias of the layer norm."""


class SeedCell(ContextCell):
    """What both seed cells share: hidden layers, gates, N(0, 0.02), dropout and clip."""

    def __init__(
        self,
        context_width: int,
        embedding_width: int,
        hidden_width: int,
        *,
        input_widths: list[int],
        num_gates: int,
        dropout: float,
        clip: float | None,
        initialisation: str,
    ) -> None:
        super().__init__()
        self.context_width = context_width
        self.embedding_width = embedding_width
        self.dropout = dropout
        self.clip = clip
        self.hidden = nn.ModuleList(nn.Linear(width, hidden_width) for width in input_widths)
        # delta, forget and input gate of one layer are one product
        self.gates = nn.ModuleList(
            nn.Linear(hidden_width, 3 * context_width) for _ in range(num_gates)
        )
        self.stacked = {f"gates.{k}.weight": 3 for k in range(num_gates)}
        self.norms = nn.ModuleList(nn.LayerNorm(context_width) for _ in range(num_gates))
        if initialisation == "normal":
            for linear in [*self.hidden, *self.gates]:
                nn.init.normal_(linear.weight, std=0.02)  # pyright: ignore[reportArgumentType]
                nn.init.zeros_(linear.bias)  # pyright: ignore[reportArgumentType]
        elif initialisation == "orthogonal":
            self._initialise_orthogonal()

    @torch.no_grad()
    def _initialise_orthogonal(self) -> None:
        """Keep the size of a signal through any number of layers (arXiv:1312.6120)."""
        for linear in self.hidden:
            nn.init.orthogonal_(linear.weight, gain=math.sqrt(2.0))  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(linear.bias)  # pyright: ignore[reportArgumentType]
        for linear in self.gates:
            for part in linear.weight.chunk(3):  # pyright: ignore
                nn.init.orthogonal_(part)
            nn.init.zeros_(linear.bias)  # pyright: ignore[reportArgumentType]

    def weights(self) -> Weights:
        """Return the parameters; the token's columns of `[x, c]` layers are left in `project`."""
        return tuple(self.parameters())

    def update(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return `f(context, x)`."""
        return self._pass(context, projected, weights)[0]

    def forget_gates(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return the forget gate of each gated layer, `[..., gates, C]`."""
        return torch.stack(self._pass(context, projected, weights)[1], dim=-2)

    @abstractmethod
    def stages(self, weights: Weights) -> list[Stage]:
        """Return what one update does, gate after gate; each reads its part of `project`."""

    def _pass(
        self, context: Tensor, projected: Tensor, weights: Weights
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `f(context, x)` and the forget gates on the way."""
        stages, forgets = self.stages(weights), []
        for stage, part in zip(stages, projected.chunk(len(stages), dim=-1), strict=True):
            h = self._phi(part + F.linear(context, stage.from_context))
            for weight, bias in stage.hidden:
                h = self._phi(F.linear(h, weight, bias))
            delta, forget, insert = F.linear(h, *stage.gate).chunk(3, dim=-1)
            forget = torch.sigmoid(forget)
            mixed = forget * context + torch.sigmoid(insert) * torch.tanh(delta)
            gain, shift = stage.norm
            context = F.layer_norm(mixed, mixed.shape[-1:], gain, shift)
            if self.clip is not None:
                context = context.clamp(-self.clip, self.clip)
            forgets.append(forget)
        return context, forgets

    def _phi(self, preactivation: Tensor) -> Tensor:
        return F.dropout(F.relu(preactivation), self.dropout, self.training)

    def _split(self, weights: Weights) -> tuple[list[Weights], list[Weights], list[Weights]]:
        """Sort `parameters()` back into (weight, bias) pairs of hidden layers, gates, norms."""
        pairs = [weights[i : i + 2] for i in range(0, len(weights), 2)]
        num_hidden, num_gates = len(self.hidden), len(self.gates)
        gates_end = num_hidden + num_gates
        return pairs[:num_hidden], pairs[num_hidden:gates_end], pairs[gates_end:]


@final
class SequentialCell(SeedCell):
    """`h = phi_L(... phi_1([x, c]))`, then one gate at the end.

    Source: the founding documents, "Sequential Architecture".

    >>> cell = SequentialCell(8, 6, 16, num_layers=2)
    >>> cell(torch.zeros(3, 8), torch.ones(3, 6)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        context_width: int,
        embedding_width: int,
        hidden_width: int,
        *,
        num_layers: int = 2,
        dropout: float = 0.0,
        clip: float | None = None,
        initialisation: str = "normal",
    ) -> None:
        first = embedding_width + context_width
        super().__init__(
            context_width,
            embedding_width,
            hidden_width,
            input_widths=[first] + [hidden_width] * (num_layers - 1),
            num_gates=1,
            dropout=dropout,
            clip=clip,
            initialisation=initialisation,
        )

    def project(self, x: Tensor) -> Tensor:
        """Return the token's part of the first layer, `[..., H]`."""
        first = self.hidden[0]
        return F.linear(x, first.weight[:, : self.embedding_width], first.bias)  # pyright: ignore

    def stages(self, weights: Weights) -> list[Stage]:
        """Return one gate after all hidden layers."""
        hidden, (gate,), (norm,) = self._split(weights)
        return [Stage(hidden[0][0][:, self.embedding_width :], hidden[1:], gate, norm)]


@final
class LayerwiseCell(SeedCell):
    """For every layer `h = phi_l([x, c]); c = gate_l(h, c)`: each layer moves the context.

    Source: the founding documents, "Layer-wise Architecture".

    >>> cell = LayerwiseCell(8, 6, 16, num_layers=3)
    >>> cell(torch.zeros(3, 8), torch.ones(3, 6)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        context_width: int,
        embedding_width: int,
        hidden_width: int,
        *,
        num_layers: int = 2,
        dropout: float = 0.0,
        clip: float | None = None,
        initialisation: str = "normal",
    ) -> None:
        super().__init__(
            context_width,
            embedding_width,
            hidden_width,
            input_widths=[embedding_width + context_width] * num_layers,
            num_gates=num_layers,
            dropout=dropout,
            clip=clip,
            initialisation=initialisation,
        )

    def project(self, x: Tensor) -> Tensor:
        """Return the token's part of every layer, `[..., L * H]`."""
        weight = torch.cat([layer.weight[:, : self.embedding_width] for layer in self.hidden])  # pyright: ignore
        return F.linear(x, weight, torch.cat([layer.bias for layer in self.hidden]))  # pyright: ignore

    def stages(self, weights: Weights) -> list[Stage]:
        """Return one hidden layer and one gate a layer."""
        return [
            Stage(weight[:, self.embedding_width :], [], gate, norm)
            for (weight, _), gate, norm in zip(*self._split(weights), strict=True)
        ]


@final
class ConvexCell(ContextCell):
    """A true convex combination: `f(c, x) = forget * c + (1 - forget) * delta(c, x)`.

    `forget` depends on the token alone; `delta = W_d phi(W_x x + g * (W_c c)) + b_d`, where `g =
    tanh(W_g x + b_g)` is what the token lets each hidden unit read of the context, and with which
    sign. Numbers of `delta` are cut at `BOUND`, which trained models hardly meet: contexts stay in
    [-BOUND, BOUND], whatever is read. The coupling `q2 = Lip(phi) * norm2(W_d) * norm2(W_c)` is
    kept under `coupling_limit` by scaling both matrices; `|g| < 1` can only lower it. That is
    exact in evaluation; in training the norms are estimates from below, and a loss made to press on
    a limit of 0.95 reached 0.99. With `q2 < 1` the fixed point of a token exists, is unique, does
    not depend on `forget`, and iterating `delta` finds it at rate `q2` (Banach). No norm touches
    the carried context: it would multiply the Jacobian and undo the damping. `certified` keeps the
    larger of `q2` and `q_inf` under the limit, which proves that gate-scan contracts too; it is far
    stricter.

    Source: gates from the token alone, minGRU (arXiv:2410.01201); token and context multiplied
    (arXiv:1606.06630); ELU (arXiv:1511.07289); spectral parametrisation by
    power iteration (arXiv:1802.05957), here of a subspace and on the product of two norms.

    >>> cell = ConvexCell(8, 6, 16, coupling_limit=0.9)
    >>> cell(torch.zeros(3, 8), torch.ones(3, 6)).shape
    torch.Size([3, 8])
    >>> cell.coupling()["q2"] <= 0.9001
    True
    """

    power_iterations = 2  # a training step; weights move little, so warm starts stay close

    def __init__(
        self,
        context_width: int,
        embedding_width: int,
        hidden_width: int,
        *,
        coupling_limit: float = 0.95,
        activation: str = "elu",
        forget_max: float = 0.999,
        longest_timescale: float = 100.0,
        certified: bool = False,
    ) -> None:
        super().__init__()
        self.context_width = context_width
        self.embedding_width = embedding_width
        self.hidden_width = hidden_width
        self.coupling_limit = coupling_limit
        self.certified = certified
        self.activation = activation
        self.forget_max = forget_max
        self.from_token = nn.Linear(embedding_width, hidden_width)
        self.from_context = nn.Linear(context_width, hidden_width, bias=False)
        self.to_delta = nn.Linear(hidden_width, context_width)
        self.to_forget = nn.Linear(embedding_width, context_width)
        self.to_share = nn.Linear(embedding_width, hidden_width)
        # orthonormal columns that follow the largest singular directions
        followed = min(FOLLOWED, context_width, hidden_width)
        self.register_buffer("context_directions", torch.ones(context_width, followed))
        self.register_buffer("delta_directions", torch.ones(hidden_width, followed))
        # unit vectors that the gradient of a norm flows along
        self.register_buffer("context_leader", torch.full((context_width,), context_width**-0.5))
        self.register_buffer("delta_leader", torch.full((hidden_width,), hidden_width**-0.5))
        self._initialise(longest_timescale)

    @torch.no_grad()
    def _initialise(self, longest_timescale: float) -> None:
        nn.init.normal_(self.from_token.weight, std=self.embedding_width**-0.5)
        nn.init.zeros_(self.from_token.bias)
        # orthogonal: Gaussian weights at the same q2 leave delta nearly blind to the context
        start = min(self.coupling_limit, LARGEST_INITIAL_COUPLING) / LIPSCHITZ[self.activation]
        # certified: dense rows would have a q_inf of 60 and more, one number a row has that of q2
        draw = _signed_permutation_ if self.certified else nn.init.orthogonal_
        draw(self.from_context.weight, gain=math.sqrt(start))
        draw(self.to_delta.weight, gain=math.sqrt(start) if start else 1.0)
        nn.init.zeros_(self.to_delta.bias)
        nn.init.normal_(self.to_forget.weight, std=0.02)
        timescale = torch.logspace(0.0, math.log10(longest_timescale), self.context_width)
        share = (torch.exp(-1.0 / timescale) / self.forget_max).clamp(max=1.0 - 1e-4)
        self.to_forget.bias.copy_(torch.logit(share))
        # most of the context is read at first, of every token another part
        nn.init.normal_(self.to_share.weight, std=0.5 * self.embedding_width**-0.5)
        nn.init.ones_(self.to_share.bias)
        self.sharpen()

    def train(self, mode: bool = True) -> "ConvexCell":
        """Switch the mode; entering evaluation first makes the norm estimates exact."""
        if self.training and not mode:
            self.sharpen()
        super().train(mode)
        return self

    @torch.no_grad()
    def sharpen(self) -> None:
        """Set the singular directions, on which the limit rests, from a full decomposition."""
        for weight, directions, leader in self._coupled():
            if not (weight.is_meta or torch.isfinite(weight).all()):
                continue  # contexts are NaN then, and whoever computes them says so
            values, vectors = torch.linalg.svd(weight.float())[1:]
            directions.copy_(vectors[: directions.shape[1]].T)
            # a decomposition picks any of those that are nearly as large; only a lost one goes
            leads = (weight @ leader).norm() >= _LEADS * values[0]
            leader.copy_(torch.where(leads, leader, vectors[0]))

    def _coupled(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [
            (
                getattr(self, linear).weight,
                self.get_buffer(f"{name}_directions"),
                self.get_buffer(f"{name}_leader"),
            )
            for linear, name in (("from_context", "context"), ("to_delta", "delta"))
        ]

    def project(self, x: Tensor) -> Tensor:
        """Return `[W_x x + b_x, share, forget]`, `[..., 2 H + C]`."""
        forget = self.forget_max * torch.sigmoid(self.to_forget(x))
        return torch.cat([self.from_token(x), torch.tanh(self.to_share(x)), forget], dim=-1)

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `project` joined: `[..., H]`, `[..., H]`, `[..., C]`."""
        widths = [self.hidden_width, self.hidden_width, self.context_width]
        token_part, share, forget = projected.split(widths, dim=-1)
        return token_part, share, forget

    def weights(self) -> Weights:
        """Return `W_c`, `W_d` with the coupling limit applied, and `b_d`.

        In training the norms follow the weights by subspace iteration. Their gradient flows along
        one vector that power iteration turns: weights begin orthogonal and a limit holds many
        singular values at one size, so that the largest is now this one and now that one by the
        last bit of a number, and a gradient along its own direction would jump with it.
        """
        norms = []
        for weight, directions, leader in self._coupled():
            if self.training and torch.is_grad_enabled():
                self._follow(weight, directions, leader)
            along = (weight @ leader.clone()).norm()
            largest = (weight @ directions[:, 0]).norm().detach()
            norms.append(largest + along - along.detach())
        if self.coupling_limit == 0.0:
            from_context = torch.zeros_like(self.from_context.weight)
            return from_context, self.to_delta.weight, self.to_delta.bias
        coupling = LIPSCHITZ[self.activation] * norms[0] * norms[1]
        if self.certified:
            given = (self.from_context.weight, self.to_delta.weight, self.to_delta.bias)
            coupling = torch.maximum(coupling, self.sup_coupling(given))
        scale = (self.coupling_limit / coupling.clamp(min=self.coupling_limit)).sqrt()
        return self.from_context.weight * scale, self.to_delta.weight * scale, self.to_delta.bias

    @torch.no_grad()
    def _follow(self, weight: Tensor, directions: Tensor, leader: Tensor) -> None:
        """Turn orthonormal columns towards the largest singular directions, the first foremost."""
        if not torch.isfinite(weight).all():
            return  # the loss is NaN then, and says so
        weight = weight / weight.abs().amax().clamp(min=1e-30)
        followed = directions
        for _ in range(self.power_iterations):
            followed = torch.linalg.qr(weight.T @ (weight @ followed))[0]
        # within their span the largest direction is exact
        inside = torch.linalg.eigh((weight @ followed).T @ (weight @ followed))[1]
        directions.copy_(followed @ inside.flip(1))
        for _ in range(self.power_iterations):
            turned = weight.T @ (weight @ leader)
            # a matrix of zeros leads nowhere
            leader.copy_(torch.where(turned.norm() > 0.0, F.normalize(turned, dim=0), leader))

    def search_map(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return `delta(context, x)`: the gate does not move the fixed point, so it is left out."""
        from_context, to_delta, bias = weights
        token_part, share, _ = self.parts(projected)
        preactivation = torch.addcmul(token_part, share, F.linear(context, from_context))
        delta = F.linear(ACTIVATIONS[self.activation](preactivation), to_delta, bias)
        return delta.clamp(-BOUND, BOUND)

    def forget_gates(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return the forget gate, which the token alone decides, `[..., 1, C]`."""
        return self.parts(projected)[2][..., None, :]

    def update(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        """Return `f(context, x)`."""
        forget = self.parts(projected)[2]
        return torch.lerp(self.search_map(context, projected, weights), context, forget)

    @property
    def separates_gate(self) -> bool:
        """Whether `update` is `forget * context + (1 - forget) * search_map`: always, here."""
        return True

    @property
    def has_idle_weights(self) -> bool:
        """Whether a limit of zero has switched `from_context` off."""
        return self.coupling_limit == 0.0

    @torch.no_grad()
    def coupling(self) -> dict[str, float]:
        """Return `q2` and `q_inf` of the weights in use, by full decomposition.

        `q2 < 1` proves a unique fixed point in token scope; `q_inf < 1` proves that gate-scan
        contracts in sequence scope. The norm of the product `W_d W_c` would prove nothing.
        """
        from_context, to_delta, bias = (weight.double() for weight in self.weights())
        norm2 = torch.linalg.matrix_norm(to_delta, 2) * torch.linalg.matrix_norm(from_context, 2)
        return {
            "q2": LIPSCHITZ[self.activation] * norm2.item(),
            "q_inf": self.sup_coupling((from_context, to_delta, bias)).item(),
        }

    def sup_coupling(self, weights: Weights) -> Tensor:
        """Return `q_inf` of weights in use, differentiable, a scalar."""
        from_context, to_delta, _ = weights
        # row sums of the product of absolute values, without the product
        rows = to_delta.abs() @ from_context.abs().sum(dim=1)
        return LIPSCHITZ[self.activation] * rows.amax()


@torch.no_grad()
def _signed_permutation_(weight: Tensor, *, gain: float) -> None:
    """Set rows of a scaled identity, shuffled, with random signs."""
    size = max(weight.shape)
    signs = torch.randint(0, 2, (size,)) * 2.0 - 1.0
    whole = gain * torch.diag(signs)[torch.randperm(size)]
    weight.copy_(whole[: weight.shape[0], : weight.shape[1]])
