"""DiT and MMDiT's block against diffusers': same weights, same inputs, same numbers.

    python -m pytest -q tests/parity/test_dit.py        (-s prints the largest difference of each test)

diffusers' DiT differs from the published code in two places, set right here: its time frequencies end at 1/10000 instead of one step
before, and its second LayerNorm has eps 1e-5. It always embeds a class; ours has none, so one class's row goes into a bias.
"""
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('diffusers', reason='pip install -r tests/parity/requirements.txt')
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import JointTransformerBlock

from common import JointBlock, Tokens, positions

LABEL = 3


def linear(state, mine, theirs, out):
    """Copies a linear layer, or several joined into one, under our name."""
    for end in ('weight', 'bias'):
        out[f'{mine}.{end}'] = torch.cat([state[f'{name}.{end}'] for name in theirs.split()])


def weights_of(theirs):
    """DiTTransformer2DModel's weights under our names, the embedding of class LABEL in the bias that it is added to."""
    state, out = theirs.state_dict(), {}
    kernel = state['pos_embed.proj.weight']
    out['embed.weight'], out['embed.bias'] = kernel.movedim(1, -1).flatten(1), state['pos_embed.proj.bias']
    emb = 'transformer_blocks.0.norm1.emb.'
    linear(state, 'time_embed.0', emb + 'timestep_embedder.linear_1', out), linear(state, 'time_embed.2', emb + 'timestep_embedder.linear_2', out)
    out['time_embed.2.bias'] = out['time_embed.2.bias'] + state[emb + 'class_embedder.embedding_table.weight'][LABEL]
    for i in range(len(theirs.transformer_blocks)):
        at = f'transformer_blocks.{i}.'
        linear(state, f'blocks.{i}.mixer.qkv', ' '.join(f'{at}attn1.to_{n}' for n in 'qkv'), out)
        for mine, name in (('ada', 'norm1.linear'), ('mixer.out', 'attn1.to_out.0'), ('mlp1', 'ff.net.0.proj'), ('mlp2', 'ff.net.2')):
            linear(state, f'blocks.{i}.{mine}', at + name, out)
    linear(state, 'ada', 'proj_out_1', out), linear(state, 'out', 'proj_out_2', out)
    return out


@pytest.mark.parametrize('patch, width, heads', [(2, 32, 4), (4, 48, 3), (1, 24, 2)])
def test_dit(patch, width, heads, randomise, gap):
    """Same output, same gradients of the input and of every parameter, same number of parameters less the classes."""
    theirs = randomise(DiTTransformer2DModel(heads, width // heads, in_channels=4, out_channels=8, num_layers=3, sample_size=8, patch_size=patch,
                                             num_embeds_ada_norm=10, norm_eps=1e-6)).eval()
    first = theirs.transformer_blocks[0].norm1.emb
    first.time_proj.downscale_freq_shift = 0
    for block in theirs.transformer_blocks:
        block.norm1.emb = first                                                    # one embedding for all, as published
    ours = Tokens(4, 8, patch, width, 3, heads)
    ours.load_state_dict(weights_of(theirs), strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters()) + 11 * width
    torch.testing.assert_close(positions((8 // patch,) * 2, width), theirs.pos_embed.pos_embed[0], rtol=0, atol=1e-6)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.017, 0.83])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, other = ours(a, t), theirs(b, 1000 * t, torch.tensor([LABEL, LABEL])).sample
    assert other.std() > 0.1 and gap(mine, other, 'output') < 1e-5
    assert (ours(a, t.flip(0)) - mine).abs().max() > 1e-2                          # the weights let t through
    weight = torch.randn(mine.shape, generator=g)
    (mine * weight).mean().backward(), (other * weight).mean().backward()
    assert (a.grad - b.grad).abs().max() < 1e-4 * b.grad.abs().max()
    for name, p in theirs.named_parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad                 # a state dict of gradients, to rename as the weights
    wanted = weights_of(theirs)
    wanted['time_embed.2.bias'] = wanted['time_embed.2.bias'] - first.class_embedder.embedding_table.weight[LABEL]
    for name, p in ours.named_parameters():
        assert (p.grad - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max(), name


@pytest.mark.parametrize('last', [False, True])
@torch.no_grad()
def test_joint_block(last, randomise, gap):
    """SD3.5's block: two streams, QK-norm; the last one leaves no context."""
    width, heads = 32, 4
    theirs = randomise(JointTransformerBlock(width, heads, width // heads, context_pre_only=last, qk_norm='rms_norm'))
    state, out = theirs.state_dict(), {}
    names = {'image': ('norm1', 'attn.to_%s', 'attn.norm_%s', 'attn.to_out.0', 'ff'),
             'context': ('norm1_context', 'attn.add_%s_proj', 'attn.norm_added_%s', 'attn.to_add_out', 'ff_context')}
    for stream, (ada, qkv, norm, join, feed) in names.items():
        linear(state, f'{stream}.ada', f'{ada}.linear', out)
        linear(state, f'{stream}.mixer.qkv', ' '.join(qkv % n for n in 'qkv'), out)
        for n in 'qk':
            out[f'{stream}.mixer.norm_{n}.weight'] = state[f'{norm % n}.weight']
        if stream == 'context' and last:                                           # they keep scale, then shift here; elsewhere shift, then scale
            for end in ('weight', 'bias'):
                out[f'context.ada.{end}'] = torch.cat(out[f'context.ada.{end}'].chunk(2)[::-1])
            continue
        for mine, name in (('mixer.out', join), ('mlp1', f'{feed}.net.0.proj'), ('mlp2', f'{feed}.net.2')):
            linear(state, f'{stream}.{mine}', name, out)
    ours = JointBlock(width, heads, last)
    ours.load_state_dict(out, strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    g = torch.Generator().manual_seed(1)
    x, y, c = (torch.randn(2, *n, width, generator=g) for n in ((9,), (5,), ()))
    mine, other = ours(x, y, ours.modulation(F.silu(c))), theirs(x, y, c)[::-1]
    assert gap(mine[0], other[0], 'image') < 1e-5 and (mine[0] - x).abs().max() > 0.1
    if not last:
        assert gap(mine[1], other[1], 'context') < 1e-5
    else:
        assert other[1] is None
