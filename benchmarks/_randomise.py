"""Random parameters and statistics that hide no error and keep activations sane."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def randomise(model: nn.Module, calibration: Tensor) -> None:
    """Gives every batch norm random statistics, and every constant parameter random values.

    Args:
        model: in eval mode; changed in place.
        calibration: one batch the model accepts.
    """
    randomise_constants(model)
    randomise_batch_norms(model, calibration)


@torch.no_grad()
def randomise_constants(model: nn.Module) -> None:
    """Gives random values to every parameter that holds one number again and again.

    Such are the layer scales, gains and gammas that start at 0 or 1e-6, with which a branch is dead
    and its loss goes unnoticed, and biases of 0. Batch norms are `randomise_batch_norms`' task; the
    slopes of PReLU are no start but a choice.
    """
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.PReLU)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(_offset(parameter) if "bias" in name else _scale(parameter))


@torch.no_grad()
def randomise_batch_norms(model: nn.Module, calibration: Tensor) -> None:
    """Gives every batch norm random parameters and statistics that keep activations sane.

    Fresh statistics (mean 0, variance 1, no affine part) hide errors, and careless random ones
    explode or vanish over a thousand layers, after which a relative error says nothing. So each
    layer, in the order of one forward pass, takes the mean and variance of what reaches it, moves
    the mean by about half a standard deviation and the variance by a factor from 0.5 to 2; its
    scale is 0.5 to 1.5 of either sign, its offset normal with deviation 0.5.

    Args:
        model: in eval mode; changed in place.
        calibration: one batch the model accepts.
    """
    handles = [
        module.register_forward_pre_hook(_randomise_batch_norm)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        model(calibration)
    finally:
        for handle in handles:
            handle.remove()


def _randomise_batch_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not isinstance(module, _BatchNorm) or module.running_var is None:
        return
    if module.running_mean is None:
        return
    x = inputs[0].transpose(0, 1).flatten(1)
    variance = x.var(1, unbiased=False)
    # A dead channel has variance 0; a division by nearly 0 would make it the loudest one.
    variance = variance.clamp_min(0.01 * variance.mean() + 1e-6)
    mean = x.mean(1) + 0.5 * variance.sqrt() * torch.randn_like(variance)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 2.0))
    if module.affine:
        module.weight.copy_(_scale(module.weight))
        module.bias.copy_(_offset(module.bias))


def _scale(like: Tensor) -> Tensor:
    """0.5 to 1.5 of either sign."""
    sign = torch.where(torch.rand_like(like) < 0.5, -1.0, 1.0)
    return sign * torch.empty_like(like).uniform_(0.5, 1.5)


def _offset(like: Tensor) -> Tensor:
    """Normal with deviation 0.5."""
    return 0.5 * torch.randn_like(like)
