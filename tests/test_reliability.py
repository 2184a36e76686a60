"""What must hold when something dies: resuming to the same bits, whole checkpoints, whole sets, 1 process as 2."""
import csv
import errno
import functools
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import conftest
import sample
from common import load_checkpoint, read_nifti, save_checkpoint

ROOT = Path(common.__file__).parent
HARD = ['--augment', '--slice-level', '--min-snr', 5, '--accumulate', 2, '--save-every', 2, '--sample-every', 2]


class Killed(BaseException):
    """Stands for a SIGKILL inside this process: nothing in the scripts may catch it and carry on."""


def code(f, *args):
    with pytest.raises(SystemExit) as e:
        f(*args)
    return e.value.code


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: '), lines
    return lines[0]


def flat(tree, at=''):
    """A nested state as {path: leaf}."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, part in items for k, v in flat(part, f'{at}/{name}').items()}
    return {at: tree}


def assert_same_run(a, b):
    """Equal bit for bit: every tensor and number of the checkpoint, the flags but --out, the log but its clock."""
    x, y = flat(load_checkpoint(a)), flat(load_checkpoint(b))
    assert x.keys() == y.keys()
    for k in x.keys() - {'/args/out', '/args/lr_find'}:
        same = torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype if torch.is_tensor(x[k]) else x[k] == y[k]
        assert same, k
    logs = [[{k: v for k, v in r.items() if k != 's_per_step'} for r in common.read_csv(f / 'log.csv')] for f in (a, b)]
    assert logs[0] == logs[1]
    assert (a / 'loss_by_t.csv').read_bytes() == (b / 'loss_by_t.csv').read_bytes()


def signal_at(monkeypatch, step, signum):
    """The process sends itself a signal in the middle of a training step."""
    update = common.EMA.update

    def patched(self, net):
        update(self, net)
        if self.updates == step:
            os.kill(os.getpid(), signum)
    monkeypatch.setattr(common.EMA, 'update', patched)


# -- stopping and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, flags, signum', [('seg', ['--rflow', '--logit-normal'], signal.SIGTERM),
                                                 ('bravo', ['--rflow'], signal.SIGTERM),
                                                 ('bravo', ['--target', 'v', '--steps', 20], signal.SIGINT)])
def test_resume_gives_the_same_bits(call, tmp_path, monkeypatch, kind, flags, signum):
    """SIGTERM (code 143) or Ctrl-C (130) at step 2 of 4 and the same command again: the run that was never stopped."""
    straight = call(kind, tmp_path / 'straight', *flags, *HARD)
    with monkeypatch.context() as m:
        signal_at(m, 2, signum)
        assert code(call, kind, tmp_path / 'cut', *flags, *HARD) == 128 + signum
    assert load_checkpoint(tmp_path / 'cut')['step'] == 2
    assert_same_run(straight, call(kind, tmp_path / 'cut', *flags, *HARD))


def test_stop_between_checkpoints_saves(call, tmp_path, monkeypatch):
    """A signal at a step without a checkpoint saves there and nothing is lost; the weights come out the same."""
    straight = call('bravo', tmp_path / 'straight', '--rflow')
    with monkeypatch.context() as m:
        signal_at(m, 3, signal.SIGTERM)
        assert code(call, 'bravo', tmp_path / 'cut', '--rflow') == 143
    assert load_checkpoint(tmp_path / 'cut')['step'] == 3
    a, b = (load_checkpoint(f) for f in (straight, call('bravo', tmp_path / 'cut', '--rflow')))
    assert all(torch.equal(a[n][k], b[n][k]) for n in ('net', 'ema') for k in a[n])


def test_a_complete_run_stays_as_it_is(call, tmp_path, capsys):
    out = call('seg', tmp_path / 'run', '--rflow')
    before = (out / 'ckpt.pt').read_bytes(), (out / 'log.csv').read_bytes()
    call('seg', out, '--rflow')
    assert 'complete at step 4' in capsys.readouterr().out
    assert before == ((out / 'ckpt.pt').read_bytes(), (out / 'log.csv').read_bytes())


def test_a_run_from_a_run_with_another_range_goes_on(call, trained, tmp_path, capsys):
    """The range comes from the file given to --init; the same command again finds itself."""
    torch.save(common.load_checkpoint(trained / 'bravo') | dict(args=common.load_checkpoint(trained / 'bravo')['args'] | dict(init_range=[0.0, 1.0])), tmp_path / 'start.pt')
    for said in ('4 steps done', 'complete at step 4'):
        out = call('bravo', tmp_path / 'out', '--rflow', '--init', tmp_path / 'start.pt')
        assert said in capsys.readouterr().out
    assert common.load_run(out).args.init_range == [0.0, 1.0]


@pytest.mark.parametrize('kind', ['seg', 'bravo'])
def test_lr_find_is_undone(call, tmp_path, monkeypatch, kind):
    """--lr-find leaves no trace in the run: same bits as without."""
    monkeypatch.setattr(conftest.SCRIPTS[kind], 'lr_find', functools.partial(common.lr_find, steps=20))
    plain = call(kind, tmp_path / 'plain', '--rflow')
    assert_same_run(plain, call(kind, tmp_path / 'found', '--rflow', '--lr-find'))
    assert len(common.read_csv(tmp_path / 'found/lr_find.csv')) > 10 and (tmp_path / 'found/lr_find.png').exists()
    assert not (tmp_path / 'plain/lr_find.csv').exists()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def state(step):
    return dict(step=step, w=torch.full((100,), float(step)))


class Faults:
    """Raises `error` before or after the n-th disk call of common; a write that it raises before is half done."""

    def __init__(self, monkeypatch, n, when, error):
        self.n, self.when, self.error, self.calls = n, when, error, []
        for name in ('replace', 'fsync'):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        real = open

        def fake_open(*args, **kw):
            file = self.wrap('open', real)(*args, **kw)
            return Handle(file, self)
        monkeypatch.setattr(common, 'open', fake_open, raising=False)

    def wrap(self, name, f, half=None):
        def call(*args, **kw):
            mine = len(self.calls) == self.n
            self.calls.append(name)
            if mine and self.when == 'before':
                if half:
                    half(*args)
                raise self.error
            result = f(*args, **kw)
            if mine:
                raise self.error
            return result
        return call

    @property
    def hit(self):
        return len(self.calls) > self.n


class Handle:
    def __init__(self, file, faults):
        self.file, self.fileno = file, file.fileno
        self.write = faults.wrap('write', file.write, lambda data: file.write(data[:len(data) // 2]))
        self.flush = faults.wrap('flush', file.flush)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def try_save(monkeypatch, out, step, n, when, error):
    """A save with a fault at disk call n. Returns the calls made, or None when it had fewer than that."""
    with monkeypatch.context() as m:
        faults = Faults(m, n, when, error)
        try:
            save_checkpoint(out, state(step))
        except (Killed, SystemExit) as e:
            assert isinstance(error, Killed) == isinstance(e, Killed) and getattr(e, 'code', 1) == 1
    return faults.calls if faults.hit else None


def whole(out):
    """The step in the folder, after a look at the tensor too."""
    found = load_checkpoint(out)
    assert torch.equal(found['w'], state(found['step'])['w'])
    return found['step']


FULL = OSError(errno.ENOSPC, 'No space left on device')
DAMAGE = {'half': lambda b: b[:1000], 'no end': lambda b: b[:-99], 'empty': lambda b: b'', 'text': lambda b: b'x'}


@pytest.mark.parametrize('error', [FULL, Killed()], ids=['full disk', 'kill'])
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('saved', [0, 1, 2])
def test_a_fault_at_any_disk_call_of_a_save(tmp_path, monkeypatch, capsys, error, when, saved):
    """With `saved` whole saves before: the folder then holds the old state or the new one, and the next save works."""
    seen = set()
    for n in range(100):
        out = tmp_path / str(n)
        out.mkdir()
        for step in range(1, saved + 1):
            save_checkpoint(out, state(step))
        capsys.readouterr()
        calls = try_save(monkeypatch, out, saved + 1, n, when, error)
        if calls is None:
            break
        seen |= {*calls}
        if isinstance(error, OSError):
            line = one_line(capsys)
            assert 'No space left' in line and f'step {saved + 1}' in line
            assert not list(out.glob('*.tmp'))
        if saved:
            assert whole(out) in (saved, saved + 1)
        elif (out / 'ckpt.pt').exists():
            assert whole(out) == 1
        save_checkpoint(out, state(saved + 2))
        assert whole(out) == saved + 2
    assert seen == {'open', 'write', 'flush', 'fsync', 'replace'} and n >= 6


def test_two_kills_in_a_row(tmp_path, monkeypatch):
    """A kill at any call of one save and then at any call of the next: never less than what was there before."""
    for first in range(100):
        for second in range(100):
            out = tmp_path / f'{first}_{second}'
            out.mkdir()
            save_checkpoint(out, state(1)), save_checkpoint(out, state(2))
            a = try_save(monkeypatch, out, 3, first, 'before', Killed())
            then = whole(out)
            b = try_save(monkeypatch, out, 4, second, 'before', Killed())
            assert then >= 2 and whole(out) >= then
            if a is None or b is None:
                break
        if a is None:
            break
    assert first >= 6


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_falls_back(tmp_path, capsys, damage):
    """ckpt.pt damaged: ckpt.prev.pt and a line that says so. Both: code 2 and one line."""
    save_checkpoint(tmp_path, state(1)), save_checkpoint(tmp_path, state(2))
    capsys.readouterr()
    (tmp_path / 'ckpt.pt').write_bytes(damage((tmp_path / 'ckpt.pt').read_bytes()))
    assert whole(tmp_path) == 1
    told = capsys.readouterr()
    assert not told.err and 'ckpt.pt: damaged' in told.out and 'going back to ckpt.prev.pt' in told.out
    (tmp_path / 'ckpt.prev.pt').write_bytes(damage((tmp_path / 'ckpt.prev.pt').read_bytes()))
    assert code(load_checkpoint, tmp_path) == 2
    assert 'ckpt.prev.pt' in one_line(capsys)


def test_resume_from_a_damaged_checkpoint(call, tmp_path, monkeypatch):
    """The run goes on from the one before to the same bits; a kill in its first save leaves that one loadable."""
    flags = ['--rflow', *HARD]
    straight = call('bravo', tmp_path / 'straight', *flags)
    out = tmp_path / 'cut'
    shutil.copytree(straight, out)
    (out / 'ckpt.pt').write_bytes((out / 'ckpt.pt').read_bytes()[:1000])

    real, count = os.replace, []

    def replace(a, b):
        real(a, b)
        if 'ckpt' in str(a):
            count.append(a)
            raise Killed
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', replace)
        with pytest.raises(Killed):
            call('bravo', out, *flags)
    assert len(count) == 1 and load_checkpoint(out)['step'] in (2, 4)
    assert_same_run(straight, call('bravo', out, *flags))


def python(*args):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})


KILLER = '''
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import train_bravo
from common import load_checkpoint
w = torch.nn.Parameter(torch.zeros(1))
w.grad = torch.zeros(1)
torch.optim.AdamW([w], fused=True).step()                          # its slow imports, once and not 20 times
file, flags = Path(sys.argv[1]) / 'ckpt.pt', sys.argv[2:]
rng, steps = random.Random(0), []


def stamp():
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:                                          # never saved, or between two renames
        return 0


for i in range(20):
    before = stamp()
    pid = os.fork()
    if not pid:
        sys.stdout = open(os.devnull, 'w')
        try:
            train_bravo.main(train_bravo.get_args(flags))
        finally:
            os._exit(1)
    limit = time.time() + 60
    while stamp() in (0, before) and time.time() < limit:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.6))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, 'the training ended by itself'
    state = load_checkpoint(file.parent)
    assert all(v.isfinite().all() for v in state['net'].values())
    steps.append(state['step'])
assert steps == sorted(steps) and len(set(steps)) == 20, steps
print('steps', *steps)
'''


def test_twenty_sigkills(call, tmp_path, phantom, cache):
    """A real training that saves at every step, killed at 20 random moments: always whole, always further on."""
    out = tmp_path / 'run'
    flags = ['--preset', 'tiny', '--rflow', '--iters', 10 ** 6, '--save-every', 1, '--data', phantom, '--cache', cache]
    done = python('-c', KILLER, out, *flags, '--out', out)
    assert done.returncode == 0 and 'steps' in done.stdout, done.stdout + done.stderr
    rows = common.read_csv(out / 'log.csv')
    assert [int(r['step']) for r in rows] == sorted({int(r['step']) for r in rows})


# -- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['seg', 'bravo'])
@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_number_that_is_none_stops_the_run(call, tmp_path, monkeypatch, capsys, kind, what):
    """A NaN loss, or NaN gradient of a finite loss: code 1, a line with step and rate, the last checkpoint is good."""
    real, calls = common.Process.loss, []

    def loss(self, *args, **kw):
        value, *rest = real(self, *args, **kw)
        calls.append(1)
        if len(calls) == 3:
            value = value * math.nan if what == 'loss' else value + (value * 0).sqrt()
        return (value, *rest)
    monkeypatch.setattr(common.Process, 'loss', loss)
    assert code(call, kind, tmp_path / 'run', '--rflow', '--save-every', 1, '--iters', 8) == 1
    line = one_line(capsys)
    assert 'step 2' in line and 'lr ' in line and 'Try a lower --lr' in line
    found = load_checkpoint(tmp_path / 'run')
    assert found['step'] == 2 and all(v.isfinite().all() for n in ('net', 'ema') for v in found[n].values())


def test_lr_find_on_a_loss_that_is_none(call, tmp_path, monkeypatch, capsys):
    """No finite loss at any rate ends in a line, not in a traceback."""
    real = common.Process.loss
    monkeypatch.setattr(common.Process, 'loss', lambda self, *a, **k: tuple(v * math.nan for v in real(self, *a, **k)))
    assert code(call, 'bravo', tmp_path / 'run', '--rflow', '--lr-find') == 1
    one_line(capsys)


# -- files from strangers ---------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('how', ['load_run', 'folder', 'sample', 'init', 'perceptual', 'lpips', 'resume'])
@pytest.mark.parametrize('form', ['torch', 'pickle'])
@pytest.mark.filterwarnings('error:Detected pickle protocol')
def test_a_hostile_file_is_refused_and_not_run(call, tmp_path, capsys, how, form):
    mark, file, out = tmp_path / 'mark', tmp_path / 'ckpt.pt', tmp_path / 'out'
    content = dict(args=Evil(mark), ema={}, box=(), in_channels=1)
    torch.save(content, file) if form == 'torch' else file.write_bytes(pickle.dumps(content))
    if how == 'resume':
        out.mkdir(), shutil.copy(file, out / 'ckpt.pt'), shutil.copy(file, out / 'ckpt.prev.pt')
    run = {'load_run': lambda: common.load_run(file), 'folder': lambda: common.load_run(tmp_path),
           'sample': lambda: call('sample', out, '--bravo', file, '--seg', file),
           'init': lambda: call('bravo', out, '--init', file, '--init-target', 'eps'),
           'perceptual': lambda: call('bravo', out, '--perceptual', 0.1, '--perceptual-weights', file),
           'resume': lambda: call('bravo', out), 'lpips': lambda: None}[how]
    if how == 'lpips':
        torch.save(vgg_state(), tmp_path / 'vgg.pt')
        run = lambda: common.VGG16(tmp_path / 'vgg.pt', file)
    assert code(run) == 2
    assert 'loaded safely' in one_line(capsys) and not mark.exists()


def vgg_state():
    """A VGG16 of zeros: the right names and shapes."""
    c, i, out = 3, 0, {}
    for w in common.VGG16.LAYERS:
        if w != 'M':
            out |= {f'features.{i}.weight': torch.zeros(1).expand(w, c, 3, 3), f'features.{i}.bias': torch.zeros(w)}
            c, i = w, i + 1
        i += 1
    return out


# -- sets -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(trained):
    return ['--seg', trained / 'seg', '--bravo', trained / 'bravo']


def read_set(out):
    """{folder: (manifest line, {file: array or bytes})}; the manifest and the folders must name the same patients."""
    with open(out / 'manifest.csv', newline='') as f:
        rows = {r['folder']: r for r in csv.DictReader(f)}
    assert {f.name for f in out.iterdir() if f.is_dir()} == rows.keys() and not list(out.glob('*.part*'))
    load = lambda f: read_nifti(f)[0] if f.name.endswith('.nii.gz') else f.read_bytes()
    return {n: (rows[n], {f.name: load(f) for f in sorted((out / n).iterdir())}) for n in sorted(rows)}


def assert_same_set(a, b, tolerance=0.0):
    a, b = read_set(a), read_set(b)
    assert a.keys() == b.keys()
    for n in a:
        assert a[n][0] == b[n][0] and a[n][1].keys() == b[n][1].keys()
        assert np.array_equal(a[n][1]['seg.nii.gz'], b[n][1]['seg.nii.gz'])
        x, y = a[n][1]['bravo.nii.gz'], b[n][1]['bravo.nii.gz']
        assert np.abs(x - y).max() <= tolerance and np.std(x) > 0.01


@pytest.mark.parametrize('where', ['in a file', 'before the manifest'])
def test_a_killed_set_goes_on(call, pair, tmp_path, monkeypatch, where):
    """Killed inside the 4th patient: what is half done goes, the rest stays, and the whole equals one never killed."""
    flags = [*pair, '--steps', 3, '--seg-steps', 3, '--n', 6, '--batch-size', 1]
    straight = call('sample', tmp_path / 'straight', *flags)
    out, count = tmp_path / 'cut', []
    name = 'nib.save' if where == 'in a file' else 'write_patient'
    real = common.nib.save if where == 'in a file' else sample.write_patient

    def dying(*args):
        count.append(1)
        real(*args)
        if len(count) == (7 if where == 'in a file' else 4):                    # two files a patient
            raise Killed
    with monkeypatch.context() as m:
        m.setattr(common.nib, 'save', dying) if where == 'in a file' else m.setattr(sample, name, dying)
        with pytest.raises(Killed):
            call('sample', out, *flags)
    half = [f for f in out.iterdir() if f.is_dir()]
    assert len(half) == 4 and len([f for f in half if f.name.startswith('.')]) == (where == 'in a file')
    kept = {f.name: f.stat().st_mtime_ns for f in half if f.name < 'syn_0_000003' and f.name[0] != '.'}
    assert len(kept) == 3
    call('sample', out, *flags)
    assert_same_set(straight, out)
    assert kept == {n: (out / n).stat().st_mtime_ns for n in kept}
    assert not [f for f in out.iterdir() if f.name.startswith('.')] and (out / 'grid.png').exists()


def test_a_set_stopped_by_a_signal(call, pair, tmp_path, monkeypatch):
    """SIGTERM ends after the batch with 143; a manifest line that was cut off is not believed."""
    flags = [*pair, '--steps', 2, '--seg-steps', 2, '--n', 5, '--batch-size', 2]
    straight, real = call('sample', tmp_path / 'straight', *flags), sample.write_patient
    with monkeypatch.context() as m:
        m.setattr(sample, 'write_patient', lambda *a: (real(*a), os.kill(os.getpid(), signal.SIGTERM)))
        assert code(call, 'sample', tmp_path / 'cut', *flags) == 143
    part = tmp_path / 'cut/manifest.part0.csv'
    assert len(part.read_text().splitlines()) == 2
    part.write_text(part.read_text()[:-3])
    call('sample', tmp_path / 'cut', *flags)
    assert_same_set(straight, tmp_path / 'cut', 1e-4)


def test_a_set_with_other_flags_is_refused(call, trained, pair, tmp_path, capsys):
    """Another seed, solver length or model: code 2, and the set stays as it was. More images: allowed."""
    flags = [*pair, '--steps', 2, '--seg-steps', 2, '--n', 2]
    out = call('sample', tmp_path / 'set', *flags)
    before = {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    other = {'steps 3 (was 2)': ['--steps', 3], 'seed 1 (was 0)': ['--seed', 1], 'bravo': ['--bravo', trained / 'ddpm']}
    for word, more in other.items():
        capsys.readouterr()
        assert code(call, 'sample', out, *flags, *more) == 2
        assert word in one_line(capsys)
        assert before == {f: f.read_bytes() for f in out.rglob('*') if f.is_file()}
    assert len(read_set(call('sample', out, *flags, '--n', 3))) == 3


def test_the_batch_and_the_number_asked_for_change_no_image(call, pair, tmp_path, monkeypatch):
    """Batches of 1 and 4: the same noise to the bit, images within 1e-4. n=3 and n=8: the same first three."""
    flags = [*pair, '--steps', 4, '--seg-steps', 4]
    noise, real = {}, sample.SAMPLERS['dpm++']

    def spy(denoise, x, *args, **kw):
        noise.setdefault(name, []).append(x.clone())
        return real(denoise, x, *args, **kw)
    monkeypatch.setitem(sample.SAMPLERS, 'dpm++', spy)
    for name, n, batch in (('1', 8, 1), ('4', 8, 4), ('3', 3, 4)):
        call('sample', tmp_path / name, *flags, '--n', n, '--batch-size', batch)
    take = lambda name, k: torch.cat(noise[name][k::2])                        # masks and images take turns
    for k in (0, 1):
        assert torch.equal(take('1', k), take('4', k)) and torch.equal(take('3', k), take('4', k)[:3])
    assert not torch.equal(take('1', 0), take('1', 1)) and len(take('1', 0)) == 8
    assert_same_set(tmp_path / '1', tmp_path / '4', 1e-4)
    first, more = read_set(tmp_path / '3'), read_set(tmp_path / '4')
    for n in first:
        assert first[n][0] == more[n][0] and np.array_equal(first[n][1]['seg.nii.gz'], more[n][1]['seg.nii.gz'])
        assert np.abs(first[n][1]['bravo.nii.gz'] - more[n][1]['bravo.nii.gz']).max() <= 1e-4


# -- two processes ----------------------------------------------------------------------------------------------------

BOTH = '''
import json, os, sys
import torch
torch.set_num_threads(1)
import sample, train_bravo, train_seg
import common
real, last = common.EMA.update, []
common.EMA.update = lambda ema, net: (last.append(net), real(ema, net))[1]
for name, flags in json.loads(sys.argv[1]):
    script = dict(bravo=train_bravo, seg=train_seg, sample=sample)[name]
    script.main(script.get_args(flags))
    if 'pure-bf16' in flags:
        bits = [None] * 2
        torch.distributed.all_gather_object(bits, [v.view(torch.int16).tolist() for v in last[-1].parameters()])
        common.print0(f'replicas {"agree" if bits[0] == bits[1] else "differ"} {({v.dtype for v in last[-1].parameters()} == {torch.bfloat16})}')
'''


def test_two_processes_equal_one(call, pair, tmp_path, phantom, cache):
    """torchrun with 2: the same losses (1e-5) and weights of RFlow images and DDPM masks, the same folders and masks, images within 1e-4.
    In pure bf16 both processes hold the same bits, though each rounds by chance."""
    trains = {'bravo': ['--rflow', '--slice-level', '--augment', '--accumulate', 2, '--save-every', 1, '--sample-every', 2],
              'seg': ['--steps', 50, '--controllable', '--p-uncond', 0.1, '--min-snr', 5, '--save-every', 1, '--sample-every', 2]}
    draw = [*pair, '--steps', 3, '--seg-steps', 3, '--n', 5, '--batch-size', 2]
    one = {k: call(k, tmp_path / f'one_{k}', *f) for k, f in trains.items()}
    first = call('sample', tmp_path / 'set_one', *draw)
    shared = ['--cache', cache, '--device', 'cpu', '--dtype', 'fp32', '--out']
    jobs = [(k, ['--preset', 'tiny', '--data', phantom, '--iters', 4, *f, *shared, tmp_path / f'two_{k}']) for k, f in trains.items()]
    jobs.append(('bravo', ['--preset', 'tiny', '--data', phantom, '--iters', 3, '--rflow', *shared, tmp_path / 'two_pure', '--dtype', 'pure-bf16']))
    jobs.append(('sample', [*draw, *shared, tmp_path / 'set_two']))
    (tmp_path / 'both.py').write_text(BOTH)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    done = python('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                  f'--master_port={port}', tmp_path / 'both.py', json.dumps([(k, [str(f) for f in flags]) for k, flags in jobs]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('replicas agree True') == 1 and done.stdout.count('4 steps done') == 2 and done.stdout.count('5 patients (') == 1
    for kind in trains:
        a, b = (common.read_csv(f / 'log.csv') for f in (one[kind], tmp_path / f'two_{kind}'))
        assert len(a) == len(b) == 4
        for x, y in zip(a, b):
            assert x['step'] == y['step'] and x['lr'] == y['lr'] and abs(float(x['loss']) - float(y['loss'])) <= 1e-5
        x, y = load_checkpoint(one[kind]), load_checkpoint(tmp_path / f'two_{kind}')
        for k in x['ema']:
            torch.testing.assert_close(x['ema'][k], y['ema'][k], rtol=0, atol=1e-4)
        torch.testing.assert_close(x['loss_by_t'][:, :, 1], y['loss_by_t'][:, :, 1], rtol=0, atol=0)  # counts
        torch.testing.assert_close(x['loss_by_t'][:, :, 0], y['loss_by_t'][:, :, 0], rtol=1e-4, atol=1e-5)
    assert_same_set(first, tmp_path / 'set_two', 1e-4)


def test_a_kept_checkpoint_survives_a_kill(call, tmp_path, monkeypatch):
    """Killed while ckpt_2.pt is written: the run goes on from before it, and leaves it too."""
    write, go = common.atomic_write, lambda: call('bravo', tmp_path / 'run', '--rflow', '--keep-every', 2)

    def killed(path, data):
        if str(path).endswith('ckpt_2.pt'):
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as m:
        m.setattr(common, 'atomic_write', killed)
        with pytest.raises(KeyboardInterrupt):
            go()
    assert sorted(f.name for f in go().glob('ckpt_*.pt')) == ['ckpt_2.pt', 'ckpt_4.pt']


def test_two_may_write_the_phantom(tmp_path):
    """The second finds the first one's patient there and throws his away; elsewhere a patient is replaced."""
    image, mask = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.uint8)
    write = lambda value, **more: common.write_patient(tmp_path / 'p', dict(bravo=image + value), mask, (1, 1), **more)
    write(1), write(2, keep=True)
    assert read_nifti(tmp_path / 'p/bravo.nii.gz')[0].max() == 1 and [f.name for f in tmp_path.iterdir()] == ['p']
    write(3)
    assert read_nifti(tmp_path / 'p/bravo.nii.gz')[0].max() == 3 and [f.name for f in tmp_path.iterdir()] == ['p']
