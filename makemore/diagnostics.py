"""What goes on inside a rung: how its units answer to a batch, and what comes back to them.

probe(model, idx, targets) -> {layer: Probe}
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from loss import IGNORE_INDEX

# A unit whose activation's slope is below this passes back next to nothing of a gradient.
FLAT = 0.01


@dataclass(frozen=True)
class Probe:
    """A hidden layer over one batch."""

    # What its units say, and the gradients of the loss by what they are told.
    activations: np.ndarray
    gradients: np.ndarray
    # Of all answers, the fraction at which the activation is flat; of the units, of those that are
    # flat at every place of the batch, and so learn nothing from it.
    saturated: float
    dead: float


def probe(model: nn.Module, idx: Tensor, targets: Tensor) -> dict[str, Probe]:
    """Return a `Probe` of each hidden layer, by name, in training; the model stays as it is.

    Places after the end of a word are left out. A rung without hidden layers gives none.
    """
    if not hasattr(model, "hidden_layers"):
        return {}
    # Running means and gradients change with every batch; those are the copy's.
    model = copy.deepcopy(model).train()
    told: dict[str, Tensor] = {}
    for name, module in model.hidden_layers().items():
        module.register_forward_hook(lambda _, __, output, name=name: told.update({name: output}))
    # Dropout, where there is some, is the same every time.
    torch.manual_seed(0)
    _, loss = model(idx, targets)
    gradients = torch.autograd.grad(loss, list(told.values()))
    scored, T = targets != IGNORE_INDEX, idx.size(1)
    return {
        # A layer may have places before the first, which are no one's own.
        name: _probe(model, output[:, -T:][scored], gradient[:, -T:][scored])
        for (name, output), gradient in zip(told.items(), gradients, strict=True)
    }


def _probe(model: nn.Module, told: Tensor, gradient: Tensor) -> Probe:
    """Return in figures what a layer told its units (places, units), and what came back."""
    told = told.detach().requires_grad_()
    said = model.activation(told)
    (slope,) = torch.autograd.grad(said.sum(), told)
    flat = slope.abs() < FLAT
    return Probe(
        said.detach().flatten().numpy(),
        gradient.flatten().numpy(),
        float(flat.float().mean()),
        float(flat.all(0).float().mean()),
    )
