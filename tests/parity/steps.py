"""What the scheduler comparisons of both peers share."""
import torch

from common import make_denoise


def noise_source(seed=7):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(2, 1, 8, 8, generator=g)


def trajectory(sample, net, process, x, ts, **kw):
    """All states of one of our samplers, the last one included."""
    states = []
    end = sample(make_denoise(net, process, clip=kw.pop('clip', False)), x, ts, process, noise_source(),
                 lambda i, t, x_t, x_0: states.append(x_t), **kw)
    return states[1:] + [end]


def exact_tables(scheduler, process):
    """The peers' fp32 tables lose 1 - alpha_bar near t=0 to rounding (1e-4 in the states): with ours, the steps are compared."""
    bar = torch.sigmoid(process.table)
    scheduler.alphas = bar / torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
    scheduler.alphas_cumprod, scheduler.betas, scheduler.one = bar, 1 - scheduler.alphas, torch.ones((), dtype=bar.dtype)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=bar.dtype)
