"""Nothing lost: resume to the same bits, kills at any moment, full disks, hostile files, several processes."""
import builtins
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import sample
import train_bravo
import train_seg
from common import load_checkpoint, read_csv, read_nifti, save_checkpoint

ROOT = Path(__file__).parent.parent
SCRIPTS = {'seg': train_seg, 'bravo': train_bravo}


@pytest.fixture
def train(tmp_path, phantom):
    """train(kind, name, *flags) -> run folder."""
    def go(kind, name, *flags):
        script = SCRIPTS[kind]
        script.main(script.get_args(['--preset', 'tiny', '--rflow', '--data', str(phantom), '--cache', str(tmp_path / 'cache'), '--out',
                                     str(tmp_path / name), '--sample-every', '100', *flags]))
        return tmp_path / name
    return go


def same(a, b):
    """All tensors and values of two checkpoints are equal bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ('out', 'save_every'))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def interrupt_at(monkeypatch, step, signum):
    """The process gets a signal during that step."""
    update = common.EMA.update

    def and_signal(self, net):
        update(self, net)
        if self.updates == step:
            os.kill(os.getpid(), signum)
    monkeypatch.setattr(common.EMA, 'update', and_signal)


@pytest.mark.parametrize('kind,signum', [('seg', signal.SIGTERM), ('bravo', signal.SIGINT)])
def test_resume_is_bitwise(train, monkeypatch, kind, signum):
    """4 steps = 2 + signal + resume + 2: weights, EMA, optimiser, loss by t, log, with every random thing switched on."""
    flags = ['--augment', '--slice-level', '--min-snr', '5', '--accumulate', '2', '--steps', '100']
    straight = train(kind, 'straight', *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        interrupt_at(m, 2, signum)
        train(kind, 'cut', *flags)
    assert stop.value.code == 128 + signum
    cut = train(kind, 'cut', *flags)                                             # the same command again
    assert load_checkpoint(cut)['step'] == 4 and same(load_checkpoint(straight), load_checkpoint(cut))
    loss = lambda out: {r['step']: r['loss'] for r in read_csv(out / 'log.csv')}
    assert loss(straight).keys() <= loss(cut).keys() and read_csv(straight / 'loss_by_t.csv') == read_csv(cut / 'loss_by_t.csv')


def test_lr_find_is_undone(train):
    """--lr-find and --minutes leave no trace in the weights."""
    assert same(load_checkpoint(train('bravo', 'plain'))['net'], load_checkpoint(train('bravo', 'found', '--lr-find'))['net'])


class Killed(BaseException):
    """Stands for a process that is gone: nothing catches it."""


@pytest.mark.parametrize('error', [Killed, OSError(errno.ENOSPC, 'No space left on device')], ids=['kill', 'disk full'])
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('call', ['open', 'write', 'fsync', 'replace'])
def test_checkpoint_survives(tmp_path, monkeypatch, capsys, call, when, error):
    """Failure before or after every open, write, fsync and rename of the first, second and third save: what was there before
    is still loadable, and the next save works."""
    for good in range(3):
        for nth in range(3):                                                     # of the calls of that kind in one save
            out = tmp_path / f'{good}_{nth}'
            out.mkdir()
            for step in range(good):
                save_checkpoint(out, dict(step=step, net={'w': torch.full((3,), step)}))
            count = 0

            def breaking(real):
                def wrapped(*a, **k):
                    nonlocal count
                    mine, count = count, count + 1
                    if mine == nth and when == 'before':
                        raise error
                    result = real(*a, **k)
                    if mine == nth:
                        raise error
                    return result
                return wrapped

            def open_broken(path, mode='r', *a, **k):
                f = real_open(path, mode, *a, **k)
                if call == 'write' and 'w' in mode:
                    class File:                                                  # half of the bytes reach the disk
                        __enter__, __exit__ = lambda s: s, lambda s, *e: f.close()
                        write = staticmethod(breaking(lambda data: f.write(bytes(data)[:len(data) // 2 if when == 'after' else None])))
                        flush, fileno = f.flush, f.fileno
                    return File()
                return f
            real_open = builtins.open
            with monkeypatch.context() as m:
                if call == 'open':
                    m.setattr(builtins, 'open', breaking(real_open))
                elif call == 'write':
                    m.setattr(builtins, 'open', open_broken)
                else:
                    m.setattr(os, call, breaking(getattr(os, call)))
                try:
                    save_checkpoint(out, dict(step=good, net={'w': torch.full((3,), good)}))
                except (Killed, SystemExit) as e:
                    assert not isinstance(e, SystemExit) or e.code == 1
            if good:
                state = load_checkpoint(out)
                assert state['step'] in (good - 1, good) and torch.equal(state['net']['w'], torch.full((3,), state['step']))
            save_checkpoint(out, dict(step=9, net={'w': torch.full((3,), 9)}))
            assert load_checkpoint(out)['step'] == 9
    assert 'Traceback' not in capsys.readouterr().err


def test_damaged_checkpoint(train, capsys):
    """A cut-off ckpt.pt gives way to ckpt.prev.pt, aloud, and training goes on from there; with both damaged: one line, code 2."""
    out = train('bravo', 'run', '--save-every', '2')
    data = (out / 'ckpt.pt').read_bytes()
    (out / 'ckpt.pt').write_bytes(data[:len(data) // 2])
    capsys.readouterr()
    assert load_checkpoint(out)['step'] == 2 and 'damaged' in capsys.readouterr().out
    train('bravo', 'run', '--save-every', '2')
    assert load_checkpoint(out)['step'] == 4 and torch.equal(load_checkpoint(out)['net']['out.2.weight'], torch.load(
        out / 'ckpt.pt', weights_only=True)['net']['out.2.weight'])
    for name in ('ckpt.pt', 'ckpt.prev.pt'):
        (out / name).write_bytes(b'nothing')
    with pytest.raises(SystemExit) as stop:
        load_checkpoint(out)
    assert stop.value.code == 2


def test_twenty_kills(tmp_path, phantom):
    """SIGKILL at 20 random moments of a training that saves at every step: always loadable, never going back."""
    code = textwrap.dedent(f'''
        import os, random, signal, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        torch.set_num_threads(1)
        import train_bravo
        from common import load_checkpoint
        args = lambda: train_bravo.get_args(['--preset', 'tiny', '--rflow', '--data', {str(phantom)!r}, '--cache', {str(tmp_path / 'c')!r},
            '--out', {str(tmp_path / 'run')!r}, '--save-every', '1', '--iters', '100000', '--sample-every', '100000', '--device', 'cpu'])
        random.seed(0)
        last = 0
        for i in range(20):
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                train_bravo.main(args())
            deadline = time.time() + 60
            while i == 0 and not os.path.exists({str(tmp_path / 'run/ckpt.pt')!r}) and time.time() < deadline:
                time.sleep(0.02)
            time.sleep(random.uniform(0.1, 1.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            step = load_checkpoint({str(tmp_path / 'run')!r})['step']
            assert step >= last, (step, last)
            last = step
        print('steps', last)
    ''')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split('steps')[1]) > 20


def test_non_finite_loss(train, tmp_path, monkeypatch, capsys):
    """A loss that is not a number stops the run: code 1, one line with step and lr, the checkpoint before it intact."""
    real, calls = common.Process.loss, [0]

    def loss(self, *a, **k):
        calls[0] += 1
        out = real(self, *a, **k)
        return (out[0] * float('nan'), *out[1:]) if calls[0] == 4 else out
    monkeypatch.setattr(common.Process, 'loss', loss)
    with pytest.raises(SystemExit) as stop:
        train('seg', 'nan', '--save-every', '2')
    line = capsys.readouterr().err.strip().split('\n')
    assert stop.value.code == 1 and len(line) == 1 and 'loss is nan at step 3' in line[0] and 'lr' in line[0]
    state = load_checkpoint(tmp_path / 'nan')
    assert state['step'] == 2 and all(torch.isfinite(v).all() for v in state['net'].values())


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize('way', ['load_run', 'init', 'sample'])
def test_malicious_pickle(tmp_path, capsys, way):
    """A checkpoint that would run code is refused and runs none."""
    bad, mark = tmp_path / 'bad.pt', tmp_path / 'mark'
    bad.write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(SystemExit) as stop:
        if way == 'load_run':
            common.load_run(bad)
        elif way == 'init':
            common.load_init(torch.nn.Linear(1, 1), train_seg.get_args(['--rflow', '--init', str(bad), '--init-target', 'v']))
        else:
            sample.main(sample.get_args(['--bravo', str(bad), '--masks', str(tmp_path), '--out', str(tmp_path / 'o')]))
    assert stop.value.code == 2 and not mark.exists() and len(capsys.readouterr().err.strip().split('\n')) == 1


def images(out):
    return {f.name: (read_nifti(f / 'bravo.nii.gz')[0], read_nifti(f / 'seg.nii.gz')[0]) for f in sorted(out.iterdir()) if f.is_dir()}


def test_sampling(train, tmp_path, phantom, monkeypatch, capsys):
    """A set cut off half-way and one made in other batches or numbers hold the same images; other flags are refused."""
    run = train('bravo', 'run')

    def make(name, *flags):
        sample.main(sample.get_args(['--bravo', str(run), '--data', str(phantom), '--cache', str(tmp_path / 'cache'), '--steps', '4', '--out',
                                     str(tmp_path / name), *flags]))
        return tmp_path / name
    whole, real, left = make('whole', '--n', '8', '--batch-size', '4'), sample.write_patient, [5]

    def dies(*a, **k):
        left[0] -= 1
        if left[0] < 0:
            (tmp_path / 'cut/syn_0_000099').mkdir()                              # a folder without a line in the manifest
            raise Killed
        real(*a, **k)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(sample, 'write_patient', dies)
        make('cut', '--n', '8', '--batch-size', '4')
    with open(tmp_path / 'cut/manifest.part0.csv', 'a') as f:
        f.write('syn_0_0000')                                                    # and a line that a kill cut off
    a, b = images(whole), images(make('cut', '--n', '8', '--batch-size', '4'))
    assert a.keys() == b.keys() and len(a) == 8 and len(read_csv(tmp_path / 'cut/manifest.csv')) == 8
    assert all(np.array_equal(a[k][1], b[k][1]) and np.abs(a[k][0] - b[k][0]).max() < 1e-4 for k in a)
    one, few = images(make('one', '--n', '8', '--batch-size', '1')), images(make('few', '--n', '3'))
    assert list(few) == list(a)[:3] and all(np.abs(few[k][0] - a[k][0]).max() < 1e-4 for k in few)
    assert all(np.array_equal(one[k][1], a[k][1]) and np.abs(one[k][0] - a[k][0]).max() < 1e-4 for k in a)
    with pytest.raises(SystemExit) as stop:
        make('whole', '--n', '9', '--seed', '1')
    assert stop.value.code == 2 and 'seed 1 (was 0)' in capsys.readouterr().err


def test_two_processes(train, tmp_path, phantom):
    """torchrun with two processes: the losses of one process at the same global batch, and the same set of images."""
    one = train('bravo', 'one', '--save-every', '1')
    shared = ['--data', str(phantom), '--cache', str(tmp_path / 'cache')]
    port = str(20000 + os.getpid() % 20000)

    def torchrun(*command):
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port', port, '--', *map(str, command)],
                              cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr[-3000:]
    torchrun('train_bravo.py', '--preset', 'tiny', '--rflow', *shared, '--out', tmp_path / 'two', '--sample-every', '100', '--save-every', '1')
    loss = lambda out: [float(r['loss']) for r in read_csv(out / 'log.csv')]
    assert len(loss(one)) == 4 and np.abs(np.array(loss(one)) - loss(tmp_path / 'two')).max() < 1e-5
    a, b = load_checkpoint(one), load_checkpoint(tmp_path / 'two')
    assert torch.equal(a['loss_by_t'][0, 1], b['loss_by_t'][0, 1])               # every draw was counted once
    torch.testing.assert_close(a['loss_by_t'][0, 0], b['loss_by_t'][0, 0], rtol=1e-4, atol=1e-4)
    flags = ['--bravo', one, *shared, '--n', '5', '--steps', '3']
    sample.main(sample.get_args([*map(str, flags), '--out', str(tmp_path / 's1')]))
    torchrun('sample.py', *flags, '--out', tmp_path / 's2')
    a, b = images(tmp_path / 's1'), images(tmp_path / 's2')
    assert a.keys() == b.keys() and [r['folder'] for r in read_csv(tmp_path / 's2/manifest.csv')] == list(a)
    assert all(np.array_equal(a[k][1], b[k][1]) and np.abs(a[k][0] - b[k][0]).max() < 1e-4 for k in a)
