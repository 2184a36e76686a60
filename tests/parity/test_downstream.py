"""The segmenters of evaluate.py against nnU-Net's network library and MONAI's MedNeXt: same weights, same inputs, same numbers.

    python -m pytest -q tests/parity/test_downstream.py        (-s prints the largest difference of each test)

In MedNeXt B, M and L MONAI gives the downward blocks the expansion of the level above, the published code (and its counts) that of the level below:
those blocks are put in its place.
"""
import pytest
import torch

pytest.importorskip('dynamic_network_architectures', reason='see tests/parity/requirements.txt')
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.networks.blocks.mednext_block import MedNeXtDownBlock
from monai.networks.nets.mednext import MedNeXt as Theirs

from evaluate import MEDNEXT, MedNeXt, PlainUNet


@torch.no_grad()
def same_weights(mine, theirs):
    """Copies all parameters in their order, which is the same; heads of MedNeXt are transposed convolutions there."""
    pairs = list(zip(mine.parameters(), theirs, strict=True))
    for p, q in pairs:
        q.copy_(p if p.shape == q.shape else p.transpose(0, 1))


@pytest.mark.parametrize('size, features, strides', [((64, 64), (32, 64, 128, 256, 512), (1, 2, 2, 2, 2)), ((16, 32, 32), (32, 64, 128, 256), (1, 2, 2, (1, 2, 2)))])
def test_nnunet(size, features, strides, randomise, gap):
    """All heads and the gradient of the input, in fp64: in fp32 rounding alone moves a 3D gradient by a hundredth."""
    conv, norm = (torch.nn.Conv2d, torch.nn.InstanceNorm2d) if len(size) == 2 else (torch.nn.Conv3d, torch.nn.InstanceNorm3d)
    theirs = PlainConvUNet(1, len(features), features, conv, 3, strides, 2, 2, 2, True, norm, {'eps': 1e-5, 'affine': True}, None, None,
                           torch.nn.LeakyReLU, {'inplace': True}, True)
    mine, theirs = randomise(PlainUNet(size)).double(), theirs.double()
    same_weights(mine, theirs.parameters())
    x, y = (torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_() for _ in range(2))
    a, b = mine(x), theirs(y)
    assert min(float(v.std()) for v in b) > 0.1 and gap(a, b, 'heads') < 1e-9
    sum(v.square().mean() for v in a).backward(), sum(v.square().mean() for v in b).backward()
    assert gap(x.grad / y.grad.std(), y.grad / y.grad.std(), 'gradient') < 1e-9


@pytest.mark.parametrize('kind, dims, kernel, width', [('s', 2, 3, 32), ('s', 2, 5, 32), ('s', 3, 3, 32), ('s', 3, 5, 32), ('b', 2, 3, 8), ('b', 3, 5, 4), ('m', 2, 5, 8),
                                                       ('m', 3, 3, 4), ('l', 2, 3, 8), ('l', 2, 5, 4)])
def test_mednext(kind, dims, kernel, width, randomise, gap):
    expand, blocks = MEDNEXT[kind]
    theirs = Theirs(dims, width, 1, 2, expand[:4], expand[5:], expand[4], kernel, True, True, blocks[:4], blocks[4], blocks[5:])
    for i in range(4):
        theirs.down_blocks[i] = MedNeXtDownBlock(width * 2 ** i, width * 2 ** (i + 1), expand[i + 1], kernel, True, dim=f'{dims}d')
    mine = randomise(MedNeXt(kind, dims, kernel, width))
    body = [p for n, p in theirs.named_parameters() if not n.startswith('out_')]
    heads = [p for out in (theirs.out_0, *reversed(theirs.out_blocks)) for p in out.parameters()]
    same_weights(mine, body + heads)
    x = torch.randn(1, 1, *(32,) * dims, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = mine(x), theirs(x)
    assert min(float(v.std()) for v in b) > 0.1 and gap(a, b, 'heads') < 1e-4
