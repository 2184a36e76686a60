"""One run folder, whatever the network and the space: sample.py, draft.py, evaluate.py and analysis.py work with each without knowing which it is."""
import math

import numpy as np
import pytest

import analysis
import common
import evaluate

BODIES = {'unet': [], 'dit': ['--model', 'dit'], 'mmdit': ['--model', 'mmdit'], 'mamba': ['--model', 'mamba'], 'wavelet': ['--wavelet'],
          'latent': ['--latent'], 'dit in bands': ['--model', 'dit', '--patch', 2, '--wavelet'], 'dit in latents': ['--model', 'dit', '--patch', 2, '--latent'],
          'mamba in bands': ['--model', 'mamba', '--patch', 2, '--wavelet'], 'mmdit in latents': ['--model', 'mmdit', '--patch', 2, '--latent']}


@pytest.fixture(scope='module')
def vae(call, tmp_path_factory):
    return call('bravo', tmp_path_factory.mktemp('vae') / 'run', '--vae', '2')


@pytest.mark.parametrize('body', BODIES)
def test_everything_works_with(body, call, vae, phantom, cache, detector, tmp_path):
    """Train, draw, measure, adapt by a detector's gradient, draw again, errors by time, spread of seeds. Figures are finite, the gradient
    reaches the adapters, and at scale 0 they change no bit."""
    flags = [f for flag in BODIES[body] for f in ([flag, vae] if flag == '--latent' else [flag])]
    run = call('bravo', tmp_path / 'run', '--rflow', '--p-uncond', 0.1, '--lr', 0.01, '--iters', 3, *flags)
    draw = lambda name, of, *more: call('sample', tmp_path / name, '--bravo', of, '--data', phantom, '--n', 8, '--steps', 2, *more)
    image = lambda out: np.stack([common.read_nifti(f / 'bravo.nii.gz')[0] for f in sorted(out.glob('syn_*'))])
    made = image(draw('set', run))
    assert made.shape[0] == 8 and np.abs(made).max() <= 1 and np.ptp(made) > 0
    evaluate.main(evaluate.get_args(['quality', '--fake', str(tmp_path / 'set'), '--data', str(phantom), '--vgg-weights', 'none', '--cache', str(cache), '--repeats', '20',
                                     '--out', str(tmp_path / 'q'), '--device', 'cpu']))
    assert all(math.isfinite(float(r['fake'])) for r in common.read_csv(tmp_path / 'q/metrics.csv') if 'lesion' not in r['metric'])
    drafted = call('draft', tmp_path / 'draft', '--bravo', run, '--reward', detector(), '--iters', 2, '--lr', 0.03, '--k', 2)
    assert all(math.isfinite(float(r['reward'])) and float(r['grad_norm']) > 0 for r in common.read_csv(drafted / 'log.csv'))
    assert any(v.abs().max() > 0 for k, v in common.load_checkpoint(drafted)['lora'].items() if k.endswith('.B'))
    assert np.array_equal(image(draw('old', drafted, '--lora-scale', 0)), made)
    analysis.main(analysis.get_args(['timesteps', str(run), '--out', str(tmp_path)]))
    analysis.main(analysis.get_args(['uncertainty', str(run), '--data', str(phantom), '--cache', str(cache), '--seeds', '2', '--steps', '2', '--n', '2', '--device', 'cpu',
                                     '--out', str(tmp_path / 'u')]))
    assert (tmp_path / 'u/uncertainty.png').exists()
