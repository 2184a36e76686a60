"""Shared by all tests: import path, two threads at most, --slow, a small phantom, trainings of the tiny preset."""
import os
import signal
import sys
from pathlib import Path

os.environ['TQDM_DISABLE'] = '1'
if 'PYTEST_XDIST_WORKER' in os.environ:                  # pytest -n 2: a process a core, or their threads wait for each other
    os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import common
import draft
import sample
import train_bravo
import train_seg

torch.set_num_threads(min(2, torch.get_num_threads()))
SCRIPTS = {'seg': train_seg, 'bravo': train_bravo, 'sample': sample, 'draft': draft}


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests that take minutes')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs only with --slow')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if 'slow' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs --slow'))


@pytest.fixture(autouse=True)
def signals():
    """A script that leaves by an error keeps its handlers; the next test must not inherit them. Every test draws the same numbers."""
    torch.manual_seed(0)
    old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


@pytest.fixture(scope='session')
def phantom(tmp_path_factory):
    """14 patients of 3 slices, 32 x 32; no part of the split is empty (7 train, 1 val, 1 judge, 5 test)."""
    root = common.make_phantom(tmp_path_factory.mktemp('phantom'), patients=14, seed=0, slices=3, size=32)
    assert {common.part_of(f.name) for f in root.iterdir()} == set(common.PARTS)
    return root


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='session')
def call(phantom, cache):
    """call(script, out, *flags): runs seg, bravo (4 steps of the tiny preset) or sample in this process. Returns out.

    A flag given again wins over the one set here.
    """
    def go(script, out, *flags):
        first = ['--cache', cache, '--out', out, '--device', 'cpu', '--dtype', 'fp32']
        if script == 'draft':
            first += ['--data', phantom, '--batch-size', 2, '--held-out', 2, '--seeds', 2, '--eval-every', 2, '--steps', 3]
        elif script != 'sample':
            first += ['--preset', 'tiny', '--data', phantom, '--sample-every', 100]
            first += [] if {'--iters', '--minutes'} & {*flags} else ['--iters', 4]
        SCRIPTS[script].main(SCRIPTS[script].get_args([str(f) for f in (*first, *flags)]))
        return Path(out)
    return go


@pytest.fixture(scope='session')
def trained(call, tmp_path_factory):
    """A folder with three finished runs: seg and bravo (RFlow), ddpm (a bravo on a grid of 50 times)."""
    root = tmp_path_factory.mktemp('trained')
    call('seg', root / 'seg', '--rflow')
    call('bravo', root / 'bravo', '--rflow', '--lr', 0.01)
    call('bravo', root / 'ddpm', '--steps', 50)
    return root


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    """detector(part): makes a file of a detector of 16 x 16 in the format of classifier.py train, with random weights that spread p(bad)."""
    def make(part='train', name=None, seed=0):
        torch.manual_seed(common.seed_of('detector', part, seed) % 2 ** 32)
        net = common.Detector()
        torch.nn.init.normal_(net.out.weight, 0, 0.3)
        file = tmp_path_factory.mktemp('detector') / (name or f'{part}.pt')
        torch.save(dict(best=net.state_dict(), temperature=1.0, threshold=0.5, prior=0.06, box=[0.0, 0.0, 1.0, 1.0], step=1, args=dict(size=16, part=part)), file)
        return file
    return make
