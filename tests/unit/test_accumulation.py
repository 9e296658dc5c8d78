"""Gradients of micro-batches add up: nothing in a model makes two gradients share memory."""

import pytest
import torch

from pretrain import config
from pretrain.models.build import build
from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.init import initialise
from pretrain.models.udit import UDiTConfig
from tests import tiny

KINDS = {"dit": DiTConfig, "dit-moe": DiTMoEConfig, "udit": UDiTConfig, "udit-moe": UDiTConfig}


@pytest.mark.parametrize("name", KINDS)
def test_two_backward_passes_give_twice_the_gradient(name: str) -> None:
    tree = tiny.MODELS[name] | {"input_size": 16, "in_channels": 4, "num_classes": 10}
    model = build(config.part(KINDS[name], tree))
    initialise(model, seed=0, zero_std=0.05)
    x, t = torch.randn(4, 4, 16, 16), torch.rand(4) * 1000
    once: dict[str, torch.Tensor] = {}
    for _ in range(2):
        model(x, t, torch.arange(4)).square().sum().backward()
        once = once or {n: p.grad.clone() for n, p in model.named_parameters()}
    places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places), "two gradients share memory"
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[key], rtol=1e-4, atol=1e-6)
