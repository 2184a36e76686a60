"""Everything that two scripts of this repository share. Nothing else: what one script calls is in that script.

Read it top to bottom; each section uses only those above it, so a section can be copied out on its own.

  1  Runtime      one-line errors, number types for argparse, device and torchrun set-up, seeds, atomic saves, signals
  2  Data         NIfTI -> slices in [-1, 1], masks, brain box, cache, patient split, augmentation, writing patients
  3  Phantom      brains for when there are none: skull, sulci, ventricles, enhancing lesions, a pre/post pair
  4  Networks     attention, residual block, Haar, autoencoder (MAISI's), U-Net (MONAI's DiffusionModelUNet); networks of tokens: DiT,
                  the same with Mamba's scan, MMDiT with two streams, all in 2D and 3D; 2:4 sparsity, pruning; build_net
  5  Processes    Space (pixels, bands, latents); DDPM and RFlow: alpha, sigma, log-SNR, losses, the `denoise` closure
  6  Samplers     ddpm, ddim, euler, heun, DPM-Solver++, adaptive steps, all on that closure
  7  Measures     Wilson's interval, correlation, MS-SSIM; pictures: grids of slices, line plots (Pillow only)
  8  Training     shared flags and presets, EMA, learning rate, LR finder, run folder, VGG16 features
  9  Judges       people: answers, orders, the page of a reader study; the detector of distorted images, used by whatever rejects or repairs

Glossary (code name: the field's symbol)
  x_0   a clean image or mask, in [-1, 1]         x_t   the same with noise: x_t = alpha(t) x_0 + sigma(t) eps
  eps   standard normal noise                     t     time in [0, 1]; t=0 is data, t=1 is noise
  alpha, sigma   coefficients of x_0 and eps      log_snr   log(alpha^2 / sigma^2), always the full one
  v     RFlow: eps - x_0; DDPM: alpha eps - sigma x_0       x0_hat, eps_hat   the network's estimates
  net, ema   raw and averaged network             NFE   network forwards for one image
  ts    decreasing solver times, ending at 0      extra, context   conditioning vector, conditioning tokens
  part  train | val | judge | test                box   the brain box: y0, x0, y1, x1 as fractions of the view
  token   the width numbers that stand for a patch       grid   patches along each axis; N of them in all
"""
import argparse, contextlib, copy, csv, ctypes, hashlib, io, itertools, json, math, os, re, shutil, signal, sys, time, uuid, warnings
from collections import Counter, deque
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

nib.imageglobals.logger.setLevel('CRITICAL')            # what it finds wrong with a file is said by read_nifti, in one line

# ---------------------------------------------------------------------------------------------------------------------
# 1  Runtime
# ---------------------------------------------------------------------------------------------------------------------


def fail(message, code=2):
    """Ends the program with one line on stderr. Code 2: a user's mistake; 1: something else went wrong (disk, loss)."""
    print('error: ' + ' '.join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (the usage text is a --help away) and which takes no abbreviated flags."""

    def __init__(self, **kw):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kw)

    def error(self, message):
        fail(message + '; see --help')


def number(kind, low=-math.inf, high=math.inf, open_low=False):
    """An argparse type: a finite `kind` with low <= value <= high (low < value with open_low)."""

    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            finite = False
        if not (finite and low <= value <= high) or (open_low and value == low):
            name = 'a whole number' if kind is int else 'a number'
            bounds = f' above {low:g}' if open_low else f' of at least {low:g}' if low > -math.inf else ''
            bounds += f'{" and" if bounds else ""} at most {high:g}' if high < math.inf else ''
            raise argparse.ArgumentTypeError(f'{text!r} is not {name}{bounds}')
        return value

    return parse


def numbers(kind, low=-math.inf, high=math.inf):
    """An argparse type: comma-separated numbers, as a tuple."""
    one = number(kind, low, high)
    return lambda text: tuple(one(part) for part in text.split(','))


def two_files(text):
    """An argparse type: the names of two files of a patient, as t1_pre,t1_gd."""
    names = tuple(text.split(','))
    if len({*names}) != 2 or len(names) != 2 or not all(re.fullmatch(r'\w+', n) for n in names) or 'seg' in names:
        raise argparse.ArgumentTypeError(f'{text!r}: expected two different images of a patient, the first without contrast agent, as t1_pre,t1_gd')
    return names


def rater_name(text):
    """An argparse type: a name that is safe in a table."""
    if not re.fullmatch(r'\w[\w .-]{0,39}', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no name of 1 to 40 letters, digits, spaces, dots, dashes')
    return text


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    if rank() == 0:
        print(*args, flush=True)


def progress(items=None, text=None, **kw):
    """A tqdm bar on the first process, if somebody is watching a terminal."""
    return tqdm(items, text, disable=None if rank() == 0 else True, dynamic_ncols=True, mininterval=0.5, **kw)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def keep_memory():
    """Tells glibc to keep large blocks instead of giving each back to the kernel, which would clear its pages anew every
    step (7 to 15 % of a training step on the CPU). Elsewhere than with glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)                     # M_MMAP_MAX, M_TRIM_THRESHOLD


def setup(args):
    """Joins torchrun's group if there is one and resolves --device and --dtype in place. Returns the torch device."""
    keep_memory()
    if 'RANK' in os.environ and not dist.is_initialized():
        cuda = args.device != 'cpu' and torch.cuda.is_available()
        dist.init_process_group('nccl' if cuda else 'gloo')
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.device == 'cuda' and not torch.cuda.is_available():
        fail('--device cuda: this machine shows no CUDA GPU; use --device cpu')
    if args.device == 'cuda':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if args.dtype == 'auto':
        args.dtype = 'bf16' if has_bf16(args.device) else 'fp32'
    return torch.device(args.device)


def has_bf16(device):
    """Whether bf16 is faster than fp32 there: on a CPU only with AVX512-BF16 or AMX, elsewhere it is emulated."""
    if device == 'cuda':
        return torch.cuda.is_bf16_supported()
    flags = torch.cpu.get_capabilities()
    return bool(flags.get('avx512_bf16') or flags.get('amx_bf16'))


def autocast(device, dtype):
    """bf16 autocast for --dtype bf16 and pure-bf16, nothing for fp32. Losses, schedules and solver states stay in fp32 outside it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype != 'fp32')


def seed_of(*keys):
    """A 63-bit seed from any keys: stable between machines and runs, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], 'little') >> 1


def generator(*keys, device='cpu'):
    return torch.Generator(device).manual_seed(seed_of(*keys))


def atomic_write(path, data):
    """Writes bytes so that `path` holds either the old content or the new one, whatever dies when."""
    path = Path(path)
    tmp = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with open(tmp, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def check_out(path):
    """Fails, before any work, where --out could not be made a folder: it, or what it lies in, is a file or may not be written to."""
    whole = Path(path).absolute()
    there = next(p for p in (whole, *whole.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f'--out {path}: {"" if there == whole else f"{there} "}is {"a folder that may not be written to" if there.is_dir() else "a file"}; give a folder')


def make_folder(path, flag):
    """The folder `path`, made where it is missing. Fails naming the flag that asked for it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f'{flag} {path}: cannot be made a folder ({e.strerror}); give another')
    return Path(path)


def write_csv(path, header, rows):
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows([header, *rows])
    atomic_write(path, out.getvalue().encode())


def read_csv(path):
    """A CSV file with a header line, as a list of dicts. Fails on a line with another number of columns."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:          # spreadsheets write a byte-order mark
            rows = list(csv.DictReader(f))
    except (UnicodeDecodeError, csv.Error) as e:
        fail(f'{path}: is no CSV text file ({type(e).__name__}); expected comma-separated columns in UTF-8')
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            fail(f'{path}: line {i + 2} has another number of columns than the header')
    return rows


def print_table(header, rows):
    """Columns as wide as their longest cell, the first one to the left."""
    cells = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print0('  '.join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:]))]))


class Stop:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads after each step, so that it can save and leave."""

    def __init__(self):
        self.signum = 0
        self.old = {s: signal.signal(s, self.catch) for s in (signal.SIGTERM, signal.SIGINT)}

    def catch(self, signum, frame):
        self.signum = signum

    def asked(self, device):
        """The signal's number, or 0. With several processes they agree, so that all leave after the same step."""
        if world() > 1:
            flag = torch.tensor([self.signum], device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signum = int(flag)
        return self.signum

    def restore(self):
        for s, handler in self.old.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------------
# 2  Data
# ---------------------------------------------------------------------------------------------------------------------
# A root holds one folder a patient. BrainMetShare names the files exactly; BraTS ends them in these words.
ENDINGS = {'bravo': ('t1ce', 't1c'), 't1_gd': ('t1ce', 't1c'), 't1_pre': ('t1', 't1n'), 'flair': ('flair', 't2f'),
           't2': ('t2', 't2w'), 'seg': ('seg',)}
PARTS = {'train': 0.60, 'val': 0.10, 'judge': 0.15, 'test': 0.15}
MIN_HEAD = 0.10     # a slice is used when the head covers this share of the brain box
FORMAT = 2          # of the cache; raise it when anything below changes what is decoded
VENTRICLES = (4, 5, 14, 15, 24, 31, 43, 44, 63, 72)       # FreeSurfer's labels of fluid and plexus: no tumour starts there


def find_file(folder, modality):
    """The file of a modality in a patient's folder, or None."""
    for name in (f'{modality}.nii.gz', f'{modality}.nii'):
        if (folder / name).exists():
            return folder / name
    pattern = re.compile(rf'[_-]({"|".join(ENDINGS.get(modality, (modality,)))})\.nii(\.gz)?$')
    found = sorted(f for f in folder.iterdir() if pattern.search(f.name) and not f.name.startswith('.'))
    if len(found) > 1:
        fail(f'{folder}: {len(found)} files could be {modality} ({found[0].name}, {found[1].name}); keep one')
    return found[0] if found else None


def find_patients(roots, modalities):
    """Lists patients: dicts with name, folder, files {modality: path}, synthetic, and source and level (or None) that a manifest holds.

    Folders that lack a modality are counted and printed, never silently dropped. Fails when none is left.
    """
    patients = []
    for root in map(Path, roots):
        if not root.is_dir():
            fail(f'--data {root}: no such folder; give a folder that holds one folder a patient')
        groups = read_csv(root / 'groups.csv') if (root / 'groups.csv').exists() else []
        if groups and not {'folder', 'patient'} <= groups[0].keys():
            fail(f'{root}/groups.csv: columns are {",".join(groups[0])}; expected folder,patient')
        name_of = {g['folder']: g['patient'] for g in groups}
        synthetic = (root / 'manifest.csv').exists()
        manifest = read_csv(root / 'manifest.csv') if synthetic else []
        if manifest and not {'folder', 'source_patient'} <= manifest[0].keys():
            fail(f'{root}/manifest.csv: columns are {",".join(manifest[0])}; expected folder,source_patient among them')
        wrong = [r['level'] for r in manifest if r.get('level') and not re.fullmatch(r'0(\.\d+)?|1(\.0+)?', r['level'])]
        if wrong:
            fail(f'{root}/manifest.csv: level {wrong[0]!r}; expected a number from 0 (lowest slice) to 1, or nothing')
        told = {r['folder']: (r['source_patient'], float(r['level']) if r.get('level') else None) for r in manifest}
        missing, found = [], 0
        for folder in sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith('.')):
            if synthetic and folder.name not in told:
                missing.append(f'{folder.name} (not in manifest.csv)')
                continue
            files = {m: find_file(folder, m) for m in modalities}
            lacking = [m for m, f in files.items() if f is None]
            if lacking:
                missing.append(f'{folder.name} ({", ".join(lacking)})')
                continue
            found += 1
            source, level = told.get(folder.name, ('', None))
            patients.append(dict(name=name_of.get(folder.name, folder.name), folder=folder, files=files, root=root, synthetic=synthetic,
                                 source=source, level=level))
        if missing:
            print0(f'{root}: left out {len(missing)} folders that lack a file: {"; ".join(missing[:3])}'
                   + (' ...' if len(missing) > 3 else ''))
        if not found:
            fail(f'--data {root}: no patient folder with {", ".join(modalities)} (.nii.gz); see "Your data" in README')
    return patients


def part_of(name):
    """train | val | judge | test by SHA-1 of the patient's name, so that every script and machine agrees."""
    u = int(hashlib.sha1(name.encode()).hexdigest()[:8], 16) / 2 ** 32
    for part, share in PARTS.items():
        u -= share
        if u < 0:
            return part
    return 'test'


def split_patients(patients, split_file=None, training=True):
    """Sets each patient's part, in place. The one place that decides who may see whom.

    A synthetic patient has the part of its source patient (train when it has none: a mask that a model drew). For training
    it must be a training patient. Fails otherwise, or when a patient is not in split_file (columns patient,part).
    """
    table = None
    if split_file:
        if not Path(split_file).is_file():
            fail(f'--split {split_file}: no such file; expected a CSV with columns patient,part')
        rows = read_csv(split_file)
        if not rows or not {'patient', 'part'} <= rows[0].keys():
            fail(f'--split {split_file}: expected columns patient,part')
        table = {r['patient']: r['part'] for r in rows}
        wrong = [r for r in rows if r['part'] not in PARTS]
        if wrong:
            fail(f'--split {split_file}: part {wrong[0]["part"]!r} of {wrong[0]["patient"]}; use {", ".join(PARTS)}')
    decide = part_of if table is None else table.get
    for p in patients:
        p['part'] = decide(p['name']) if not p['synthetic'] else decide(p['source']) if p['source'] else 'train'
        if p['part'] is None:
            fail(f'--split {split_file}: has no line for patient {p["source"] or p["name"]}; add it')
        if training and p['synthetic'] and p['part'] != 'train':
            fail(f'{p["folder"]}: made from patient {p["source"]}, who is in the {p["part"]} part; synthetic images '
                 'may be used only when their source is a training patient')
    real = {p['name']: p['part'] for p in patients if not p['synthetic']}
    empty = [part for part in PARTS if real and part not in real.values()]
    if empty:
        print0(f'split: {len(real)} patients leave {", ".join(empty)} empty; --split FILE (columns patient,part) '
               'decides it by hand')
    return patients


def read_nifti(path):
    """A volume (Z,H,W) as displayed (image left = patient right, top = front) in float32, and its spacing (z,y,x) mm.

    Orientation comes from the affine. Fails on a damaged file and on more than three dimensions.
    """
    try:
        image = nib.as_closest_canonical(nib.load(path))
        a = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as e:                                      # nibabel, gzip and numpy raise a dozen kinds between them
        fail(f'{path}: cannot be read ({type(e).__name__}: {e}); check it with "gzip -t" and copy it again')
    while a.ndim > 3 and a.shape[-1] == 1:
        a = a[..., 0]
    if a.ndim > 3:
        fail(f'{path}: has {a.ndim} dimensions {a.shape}; expected one 3D volume, split the series first')
    a = a.reshape(a.shape + (1,) * (3 - a.ndim))
    zooms = tuple(float(z) if z > 0 else 1.0 for z in (tuple(image.header.get_zooms()) + (1.0, 1.0, 1.0))[:3])
    return a[::-1, ::-1].transpose(2, 1, 0), zooms[::-1]


def write_patient(folder, images, mask, spacing, files=None, keep=False):
    """Writes {name: (H,W) or (Z,H,W)} and a mask as a patient in the data layout; read_nifti gives the same bits back.

    spacing (y, x) or (z, y, x) mm; files {name: bytes} go beside. The folder appears at once: a kill leaves no half patient.
    keep: a folder that another process has put there meanwhile stays, instead of being replaced.
    """
    folder = Path(folder)
    tmp = folder.with_name(f'.{folder.name}.{os.getpid()}.tmp')
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    spacing = (1.0,) * (3 - len(spacing)) + tuple(spacing)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])          # LPS: stored as displayed
    for name, a in {**images, **({} if mask is None else {'seg': np.asarray(mask, np.uint8)})}.items():
        a = np.asarray(a)
        a = a.reshape((1,) * (3 - a.ndim) + a.shape).transpose(2, 1, 0)
        nib.save(nib.Nifti1Image(a, affine), tmp / f'{name}.nii.gz')
    for name, data in (files or {}).items():
        (tmp / name).write_bytes(data)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(tmp, folder)
    except OSError:
        shutil.rmtree(tmp, ignore_errors=True)
        if not (keep and folder.exists()):
            raise


def head_mask(volume):
    """Where the head is, holes filled: (Z,H,W) -> bool. Above a tenth of the bright end, then spanned by rows and columns."""
    low = volume.min()
    bright = volume[volume > low]
    if not bright.size:
        return np.zeros(volume.shape, bool)
    m = volume > low + 0.1 * (np.percentile(bright, 99) - low)

    def span(axis):
        forth = np.maximum.accumulate(m, axis)
        back = np.flip(np.maximum.accumulate(np.flip(m, axis), axis), axis)
        return forth & back

    return span(1) & span(2)


def read_patient(patient, labels=None):
    """images (C,Z,H,W) float32, mask (Z,H,W) uint8 in {0,1}, spacing (z,y,x), counts of what had to be mended.

    Non-finite image voxels become the image's lowest value and are counted. Every label above 0 is tumour, or those
    in `labels`. Fails on a mask of another shape or with values that are no labels.
    """
    notes = {'non-finite voxels set to background': 0, 'masks with several labels': 0}
    volumes = {}
    for m, f in patient['files'].items():
        volumes[m], zooms = read_nifti(f)
        first = next(iter(volumes.values()))
        if volumes[m].shape != first.shape:
            fail(f'{f}: shape {volumes[m].shape[::-1]} differs from {first.shape[::-1]} of the same patient; '
                 'resample it onto the image')
        spacing = zooms if len(volumes) == 1 else spacing
    mask = volumes.pop('seg')
    if not np.isfinite(mask).all() or (mask < 0).any() or (mask != np.round(mask)).any():
        fail(f'{patient["files"]["seg"]}: mask values must be whole numbers from 0 up, found {mask.min()}..{mask.max()}')
    notes['masks with several labels'] = int(mask.max() > 1)
    mask = np.isin(mask, labels) if labels else mask > 0
    images = np.stack(list(volumes.values()))
    bad = ~np.isfinite(images)
    if bad.any():
        notes['non-finite voxels set to background'] = int(bad.sum())
        finite = images[~bad]
        images[bad] = finite.min() if finite.size else 0
    return images, mask.astype(np.uint8), spacing, notes


def normalise(images, head):
    """images (C,Z,H,W) -> [-1, 1] by the 0.5 and 99.9 percentiles inside the head, jointly over the C modalities."""
    inside = images[:, head] if head.any() else images.reshape(len(images), -1)
    low, high = np.percentile(inside, (0.5, 99.9))
    return np.clip((images - low) / max(high - low, 1e-6) * 2 - 1, -1, 1).astype(np.float32)


def square_view(shape, spacing, box):
    """The box (fractions of the square field of view) as voxel bounds y0, x0, y1, x1; may reach outside the image."""
    extent = (shape[0] * spacing[0], shape[1] * spacing[1])
    side = max(extent)
    corner = [(extent[i % 2] - side) / 2 + box[i] * side for i in range(4)]       # mm from the image's corner
    return [round(corner[i] / spacing[i % 2]) for i in range(4)]


def measure_box(patients, labels=None):
    """The brain box of a data set: the heads of its training patients together, square, with a margin of 2 %.

    Fractions (y0, x0, y1, x1) of the field of view made square, so that files of any size and spacing agree.
    """
    low, high = np.ones(2), np.zeros(2)
    for p in progress(patients, 'brain box', leave=False):
        images, _, spacing, _ = read_patient(p, labels)
        head = head_mask(images[0])
        extent = np.array(head.shape[1:]) * spacing[1:]
        side = extent.max()
        for axis in (0, 1):
            profile = np.flatnonzero(head.mean(axis=(0, 2 - axis)) > 0.01)      # a line of noise is no head
            if profile.size:
                edges = (np.array([profile[0], profile[-1] + 1]) * spacing[1 + axis] + (side - extent[axis]) / 2) / side
                low[axis], high[axis] = min(low[axis], edges[0]), max(high[axis], edges[1])
    if (low >= high).any():
        fail('--data: no head found in any training patient; are the images empty?')
    half = max(high - low) / 2 + 0.02
    centre = (low + high) / 2
    return tuple(round(float(v), 4) for v in (*(centre - half), *(centre + half)))


def crop(a, bounds, fill):
    """a (..., H, W) cut to voxel bounds y0, x0, y1, x1; outside the image there is `fill`."""
    y0, x0, y1, x1 = bounds
    out = np.full(a.shape[:-2] + (y1 - y0, x1 - x0), fill, a.dtype)
    ys, xs = slice(max(y0, 0), min(y1, a.shape[-2])), slice(max(x0, 0), min(x1, a.shape[-1]))
    out[..., ys.start - y0:ys.stop - y0, xs.start - x0:xs.stop - x0] = a[..., ys, xs]
    return out


def components(mask):
    """Connected pieces of a mask (H,W) or (Z,H,W), 8- or 26-connected: labels 1..n in the order of their first voxel."""
    m = torch.from_numpy(np.array(mask)) > 0
    if not m.any():
        return np.zeros(mask.shape, np.int64), 0
    pool, whole = F.max_pool2d if m.ndim == 2 else F.max_pool3d, torch.zeros(m.shape, dtype=torch.int64)
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in m.nonzero(as_tuple=True))
    m = m[box]                                              # the rest of a volume would only take time
    seed = torch.arange(m.numel(), 0, -1, dtype=torch.float64).view(m.shape)
    label = seed * m
    while True:                                             # the largest seed of a piece floods it
        new = pool(label[None, None], 3, 1, 1)[0, 0] * m
        new = torch.maximum(new, label)
        if torch.equal(new, label):
            break
        label = new
    values, index = torch.unique(-label, return_inverse=True)                 # sorted: first voxel first, background last
    whole[box] = (index + 1) * m
    return whole.numpy(), len(values) - (1 if not m.all() else 0)


def lesion_records(mask):
    """The pieces of a mask (S,S), largest first: (n,3) of diameter (of a disc of that area), centre x, y; fractions of the side."""
    labels, n = components(mask)
    area = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    at = [(np.nonzero(labels == i), labels.shape[0]) for i in range(1, n + 1)]
    rows = [(math.sqrt(4 * a / math.pi) / side, (x.mean() + 0.5) / side, (y.mean() + 0.5) / side) for a, ((y, x), side) in zip(area, at)]
    return np.array(sorted(rows, reverse=True)).reshape(-1, 3)


LESIONS, TOKEN = 10, 40         # lesions that a request can hold; length of a token


def lesion_tokens(requests, hide=None):
    """Requests for masks as a set of tokens (B, 1 + LESIONS, TOKEN), the context of --controllable.

    A request is an array (n,3) of diameter, x, y as lesion_records gives them, nan where anything will do, or None: no request
    at all, the null of guidance. hide (B, LESIONS, 2): whose diameter, whose place training leaves out, so that a request may.
    One token says the count, one more each lesion; unused ones stay zero: they are padding, which attention leaves out.
    No token says its position, so their order does not matter.
    """
    out = torch.zeros(len(requests), 1 + LESIONS, TOKEN)
    waves = math.pi * 2.0 ** torch.arange(4)
    code = lambda v: torch.cat([torch.sin(waves * v), torch.cos(waves * v)])
    for b, request in enumerate(requests):
        out[b, 0, 0] = 1
        if request is None:
            out[b, 0, 1] = 1
            continue
        out[b, 0, 5 + min(len(request), LESIONS)] = 1
        for i, (size, x, y) in enumerate(request[:LESIONS]):
            out[b, 1 + i, 2] = 1
            if not (math.isnan(size) or hide is not None and hide[b, i, 0]):
                out[b, 1 + i, 3], out[b, 1 + i, 16:24] = 1, code((math.log2(max(size, 2 ** -8)) + 8) / 8)
            if not (math.isnan(x) or hide is not None and hide[b, i, 1]):
                out[b, 1 + i, 4], out[b, 1 + i, 24:32], out[b, 1 + i, 32:40] = 1, code(x), code(y)
    return out


def request_tokens(masks, args, present=None, hide=None):
    """The request that masks (B,1,S,S) fulfil, as lesion_tokens gives it and where the masks are; None for a run without --controllable.
    present (B,): where it is 0 the null takes its place; hide: as there."""
    if not args.controllable:
        return None
    here = torch.ones(len(masks)) if present is None else present
    return lesion_tokens([lesion_records(m) if p else None for m, p in zip(masks[:, 0].cpu().numpy() > 0, here)], hide).to(masks.device)


def grow_labels(labels, spacing, mm=4.0):
    """A parcellation (Z,H,W) whose brain reaches `mm` further in plane: an affine map errs by that much at the cortex, and sulci carry
    no label. Ventricles do not grow. What is 0 afterwards is outside the brain. spacing (y, x)."""
    grown = torch.from_numpy(np.where(np.isin(labels, VENTRICLES), 0, labels).astype(np.float32))
    for axis, s in enumerate(spacing):
        k = round(mm / s)
        grown = F.max_pool2d(grown, [2 * k * (axis == 0) + 1, 2 * k * (axis == 1) + 1], 1, [k * (axis == 0), k * (axis == 1)])
    return np.where(labels > 0, labels, grown.numpy()).astype(np.uint16)


def blur(v, sigma, spacing):
    """Gaussian of sigma mm on a volume (Z,H,W), as a matrix along each axis; at the border what is inside has all the weight."""
    for axis, s in enumerate(spacing):
        i = torch.arange(v.shape[axis])
        g = torch.exp(-((i[:, None] - i) * s / sigma) ** 2 / 2)
        v = (v.movedim(axis, 2) @ (g / g.sum(0))).movedim(2, axis)
    return v


def shrink_mask(mask, size, pixel_area, speck):
    """A slice's mask (H,W) on a size x size grid, and counts of lesions kept, rescued and dropped.

    A piece below `speck` mm^2 is dropped. A grid pixel is tumour when at least half of it is. A piece that would vanish
    by that rule keeps the one pixel that holds most of it, so that no real lesion is lost. The same of a volume (Z,H,W) on the
    grid size (D,S,S), its pieces and their limit in mm^3.
    """
    labels, n = components(mask)
    pool, size = (F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[mask.ndim - 2], (size, size) if mask.ndim == 2 else size
    area = lambda m: pool(torch.from_numpy(m.astype(np.float32))[None], size)[0].numpy()
    pieces = [m for m in (labels == i for i in range(1, n + 1)) if m.sum() * pixel_area >= speck]
    out = area(np.any(pieces, axis=0)) >= 0.5 if pieces else np.zeros(size, bool)
    rescued = 0
    for m in pieces:
        share = area(m)
        if not (out & (share > 0)).any():
            out[np.unravel_index(share.argmax(), share.shape)] = True
            rescued += 1
    return out.astype(np.uint8), np.array([len(pieces), rescued, n - len(pieces)])


def resample(images, size, depth=None):
    """images (C,Z,H,W) in [-1,1] -> (C,Z,size,size), linear after a filter where it shrinks; the same along z with depth."""
    linear = lambda v, shape: F.interpolate(v, shape, mode='bilinear', antialias=True).clamp(-1, 1)
    C, Z, H, W = images.shape
    if (H, W) != (size, size):
        images = linear(torch.from_numpy(images.reshape(-1, 1, H, W)), (size, size)).view(C, Z, size, size).numpy()
    if depth not in (None, Z):
        images = linear(torch.from_numpy(images.reshape(C, 1, Z, -1)), (depth, size * size)).view(C, depth, size, size).numpy()
    return images


def decode_patient(patient, size, box, speck, labels=None, depth=None):
    """Slices of one patient on the size x size grid: images (N,C,S,S) in [-1,1], masks (N,1,S,S), rows for the table.

    depth: instead one volume of so many slices, from the first to the last that would be used: (1,C,D,S,S), (1,1,D,S,S), one row,
    its spacing (z, y, x); pieces of its mask below speck^1.5 mm^3 are dropped (a cube on a square of speck mm^2).
    A synthetic patient is taken as it is: its files are already in [-1, 1] and cut to the box.
    """
    images, mask, spacing, notes = read_patient(patient, None if patient['synthetic'] else labels)      # what a model drew is tumour, 1
    head = head_mask(images[0])
    if patient['synthetic']:
        box, speck = (0.0, 0.0, 1.0, 1.0), 0.0
    else:
        images = normalise(images, head)
    bounds = square_view(images.shape[2:], spacing[1:], box)
    images, mask, head = crop(images, bounds, -1), crop(mask, bounds, 0), crop(head, bounds, False)
    covered = head.mean(axis=(1, 2))
    use = np.flatnonzero(covered >= MIN_HEAD) if not patient['synthetic'] else np.arange(len(mask))
    pixel = [mask.shape[1 + i] * spacing[1 + i] / size for i in (0, 1)]
    if depth and len(use):
        images, mask = (v[..., use[0]:use[-1] + 1, :, :] for v in (images, mask))
        masks, counts = shrink_mask(mask, (depth, size, size), math.prod(spacing), speck ** 1.5)
        notes.update(zip(('lesions kept', 'kept as one voxel', f'specks below {speck ** 1.5:g} mm3 dropped'), counts.tolist()))
        table = [dict(folder=patient['folder'].name, patient=patient['name'], source=patient['source'], synthetic=patient['synthetic'], z=int(use[0]),
                      level=0.5, tumour=int(masks.sum()), spacing=[len(mask) * spacing[0] / depth, *pixel])]
        return np.ascontiguousarray(resample(images, size, depth)[None], np.float32), masks[None, None], table, notes
    notes['slices with too little head left out'] = len(mask) - len(use)
    images = resample(images, size)
    masks, counts = np.zeros((len(use), 1, size, size), np.uint8), np.zeros(3, int)
    for i, z in enumerate(use):
        masks[i, 0], c = shrink_mask(mask[z], size, spacing[1] * spacing[2], speck)
        counts += c
    notes.update(zip(('lesions kept', 'kept as one pixel', f'specks below {speck:g} mm2 dropped'), counts.tolist()))
    levels = (use - use[0]) / (use[-1] - use[0]) if len(use) > 1 else [0.5 if patient['level'] is None else patient['level']]
    table = [dict(folder=patient['folder'].name, patient=patient['name'], source=patient['source'], synthetic=patient['synthetic'], z=int(z),
                  level=float(level), tumour=int(mask.sum()), spacing=pixel)
             for z, level, mask in zip(use, levels, masks)]
    return np.ascontiguousarray(images[:, use].transpose(1, 0, 2, 3), np.float32), masks, table, notes


def decode_parc(patient, size, box, z):
    """Grown labels of the slices z of a patient's parcellation, as decode_patient cuts the image: (N,1,S,S) uint16."""
    labels, spacing = read_nifti(patient['parc'])
    shape = read_nifti(patient['files']['seg'])[0].shape
    if labels.shape != shape:
        fail(f'{patient["parc"]}: shape {labels.shape[::-1]} differs from {shape[::-1]} of the mask beside it; make it with evaluate.py atlas')
    cut = crop(grow_labels(labels[z], spacing[1:]), square_view(shape[1:], spacing[1:], box), 0)[:, None]
    return F.interpolate(torch.from_numpy(cut.astype(np.float32)), (size, size), mode='nearest-exact').numpy().astype(np.uint16)


class Slices:
    """Decoded slices, memory-mapped: images (N,C,S,S) float32 in [-1,1], masks (N,1,S,S) uint8, table of N dicts, box.
    Of load_slices with depth: volumes (N,C,D,S,S), (N,1,D,S,S); where it was asked for, parc (N,1,S,S) uint16."""

    def __init__(self, directory, box):
        info = json.loads((directory / 'index.json').read_text())
        shape = info['shape']
        self.images = np.memmap(directory / 'images.f32', np.float32, 'r', shape=tuple(shape))
        self.masks = np.memmap(directory / 'masks.u8', np.uint8, 'r', shape=(shape[0], 1, *shape[2:]))
        if (directory / 'parc.u16').exists():
            self.parc = np.memmap(directory / 'parc.u16', np.uint16, 'r', shape=self.masks.shape)
        self.table, self.notes, self.box, self.part = info['table'], info['notes'], box, []

    def rows(self, part, empty=None, seed=0):
        """Row numbers of a part. empty = the wanted share of tumour-free slices: that many are drawn, seeded."""
        rows = np.array([i for i, p in enumerate(self.part) if p == part], dtype=np.int64)
        if empty is None or not len(rows):
            return rows
        tumour = np.array([self.table[i]['tumour'] > 0 for i in rows])
        full, free = rows[tumour], rows[~tumour]
        want = len(free) if empty >= 1 else min(len(free), round(len(full) * empty / (1 - empty)))
        order = torch.randperm(len(free), generator=generator(seed, 'empty slices', part)).numpy()
        return np.sort(np.concatenate([full if empty < 1 else full[:0], free[order[:want]]]))


def load_slices(roots, size, modalities=('bravo',), box=None, split=None, cache='runs/cache', labels=None, speck=4.0,
                training=True, depth=None, parc=False):
    """Decodes all patients of the roots once, then memory-maps what is on disk. Returns Slices with part set per row.
    training=False: to look at synthetic patients of any source. depth: a row is a volume of so many slices instead of a slice.
    parc: only patients with a parcellation (parc.nii.gz), which Slices then holds.

    The cache's key holds all that changes a decoded slice. It is written aside and renamed, so that several processes
    may start at once: the first to finish wins, the others throw theirs away.
    """
    labels = tuple(labels) if labels else None                            # a checkpoint holds a list
    patients = split_patients(find_patients(roots, (*modalities, 'seg', *['parc'] * parc)), split, training)
    stamp = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for p in patients for f in p['files'].values()]
    for p in patients if parc else ():
        p['parc'] = p['files'].pop('parc')                                # it is no image
    identity = [[p['name'], p['source'], p['synthetic'], p['level']] for p in patients]
    key = lambda *more: hashlib.sha256(repr((FORMAT, stamp, identity, modalities, labels, *more)).encode()).hexdigest()[:20]
    cache = make_folder(cache, '--cache')
    real = [p for p in patients if not p['synthetic']]
    for root in sorted({p['root'] for p in patients if p['synthetic']}) if training and len(modalities) == 1 else ():
        note = root / 'sample.json'
        if note.is_file() and '"dual": [' in note.read_text():
            print0(f'note: {root} holds pairs, whose images share one scale; real {modalities[0]} is read with its own')
    if box is None and not real:
        box = (0.0, 0.0, 1.0, 1.0)
    if box is None:
        note = cache / f'box_{key([p["part"] for p in patients])}.json'
        if not note.exists():
            train = [p for p in real if p['part'] == 'train']
            atomic_write(note, json.dumps(measure_box(train or real, labels)).encode())
        box = json.loads(note.read_text())
    box = tuple(box)
    directory = cache / key(size, box, speck, *([depth] if depth else []))
    if not directory.exists():
        tmp = cache / f'.{directory.name}.{uuid.uuid4().hex[:8]}.tmp'
        tmp.mkdir()
        try:
            table, totals = [], {}
            with open(tmp / 'images.f32', 'wb') as f, open(tmp / 'masks.u8', 'wb') as g, open(tmp / 'parc.u16', 'wb') if parc else io.BytesIO() as h:
                for i, p in enumerate(progress(patients, 'decoding', leave=False)):
                    images, masks, rows, notes = decode_patient(p, size, box, speck, labels, depth)
                    images.tofile(f)
                    masks.tofile(g)
                    h.write(decode_parc(p, size, box, [r['z'] for r in rows]).tobytes() if parc else b'')
                    table += [dict(r, of=i) for r in rows]
                    totals = {k: totals.get(k, 0) + notes.get(k, 0) for k in {**totals, **notes}}
            if not table:
                fail(f'--data {" ".join(map(str, roots))}: no slice has a head that covers {MIN_HEAD:.0%} of the brain box')
            shape = [len(table), len(modalities), *([depth] if depth else []), size, size]
            (tmp / 'index.json').write_text(json.dumps(dict(shape=shape, table=table, notes=totals)))
            os.rename(tmp, directory)
        except OSError:
            if not directory.exists():
                raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    data = Slices(directory, box)
    data.part = [patients[r['of']]['part'] for r in data.table]
    for r in data.table:                                                  # the cache knows no names of folders: they may be typed in many ways
        r['root'] = str(patients[r['of']]['root'])
    names = {part: len({p['name'] for p in real if p['part'] == part}) for part in PARTS}
    kind = f'volumes of {depth}x' if depth else 'slices of '
    print0(f'data: {len(real)} real and {len(patients) - len(real)} synthetic folders, {len(data.table)} {kind}{size}x{size}; '
           f'patients ' + ', '.join(f'{k} {v}' for k, v in names.items()) + f'; brain box {box}')
    told = '; '.join(f'{v} {k}' for k, v in data.notes.items() if v)
    print0(f'data: {told}' if told else 'data: nothing left out')
    return data


def augment(images, masks, u, how='affine'):
    """Left-right flip (p=1/2), rotation +-10 degrees, scale +-10 %, shift +-5 %: the same for an image and its mask.

    images (B,C,H,W) in [-1,1], bilinear, background outside; masks (B,1,H,W), nearest. u (B,5): uniform draws in [0,1). All slices
    of a volume (B,C,D,H,W) move alike, none along z. how='flip': the flip alone, which interpolates nothing and so blurs nothing.
    """
    if how == 'flip':
        mirrored = lambda v: torch.where((u[:, 2] < 0.5).to(v.device).view(-1, *[1] * (v.ndim - 1)), v.flip(-1), v)
        return mirrored(images), mirrored(masks)
    shapes, images, masks = (images.shape, masks.shape), images.flatten(1, -3), masks.flatten(1, -3)
    n, u = len(images), 2 * u - 1
    angle, scale, flip = u[:, 0] * math.pi / 18, 1 + 0.1 * u[:, 1], torch.where(u[:, 2] < 0, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = flip * torch.cos(angle) * scale, -torch.sin(angle) * scale
    theta[:, 1, 0], theta[:, 1, 1] = flip * torch.sin(angle) * scale, torch.cos(angle) * scale
    theta[:, :, 2] = 0.1 * u[:, 3:]                          # in half-widths, so 5 % of the width
    grid = F.affine_grid(theta, list(images[:, :1].shape), align_corners=False).to(images.device)
    moved = F.grid_sample(images + 1, grid, mode='bilinear', align_corners=False) - 1
    return moved.view(shapes[0]), F.grid_sample(masks, grid, mode='nearest', align_corners=False).view(shapes[1])


def crop_volumes(images, masks, crop, u, lesions=0.0):
    """A crop (d, s) of each volume: images and masks (B,1,D,S,S) -> (B,1,d,s,s), and where it lies (B,6): its corners z, y, x and
    far ends as fractions of the volume. u (B,4): uniform draws. lesions: the share that has a tumour voxel, any one, in its middle
    (as far as the borders let it), where there is a tumour; the others lie anywhere."""
    grid, size, out = torch.tensor(images.shape[2:]), torch.tensor([crop[0], crop[1], crop[1]]), ([], [], [])
    for image, mask, v in zip(images, masks, u):
        at = (v[1:] * (grid - size + 1)).long()
        if v[0] < lesions and mask.any():
            voxels = (mask[0] > 0).nonzero()
            at = (voxels[int(v[0] / lesions * len(voxels))].cpu() - size // 2).clamp(min=0).minimum(grid - size)
        piece = (slice(None), *(slice(a, a + s) for a, s in zip(at.tolist(), size.tolist())))
        for part, value in zip(out, (image[piece], mask[piece], torch.cat([at / grid, (at + size) / grid]))):
            part.append(value)
    return torch.stack(out[0]), torch.stack(out[1]), torch.stack(out[2]).to(images.device)


# ---------------------------------------------------------------------------------------------------------------------
# 3  Phantom
# ---------------------------------------------------------------------------------------------------------------------
PHANTOM = dict(patients=100, slices=10, size=128)         # 1,000 slices of 1.6 x 1.6 x 8 mm, about 20 MB


def smooth_noise(shape, cells, g):
    """Gaussian noise (Z,H,W), unit variance, whose structures are about 1/cells of each axis wide."""
    coarse = torch.randn(1, 1, *(c + 3 for c in cells), generator=g)
    fine = F.interpolate(coarse, [round(n * (c + 3) / c) for n, c in zip(shape, cells)], mode='trilinear', align_corners=True)[0, 0]
    fine = F.avg_pool3d(fine[None, None], 3, 1, 1, count_include_pad=False)[0, 0]      # no creases between cells
    fine = fine[tuple(slice((f - n) // 2, (f - n) // 2 + n) for f, n in zip(fine.shape, shape))]
    return (fine - fine.mean()) / fine.std()


def phantom_patient(g, slices, size):
    """One patient: t1_pre, bravo (Z,H,W) float32 from 0 to about 1, seg (Z,H,W) uint8, spacing (z,y,x) mm.

    Concentric shells (scalp, skull, CSF, folded cortex, white matter), ventricles and deep nuclei that come and go with
    the level, 1-10 lesions in 3D that enhance as rings or solid in bravo and hardly show in t1_pre, dark oedema.
    """
    rand = lambda low, high: low + (high - low) * float(torch.rand((), generator=g))
    spacing = (8.0, 1.6 * 128 / size, 1.6 * 128 / size)
    level = torch.linspace(rand(0.16, 0.24), rand(0.80, 0.88), slices)[:, None, None]   # 0 = skull base, 1 = vertex
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing='ij')
    tilt, shift = rand(-0.08, 0.08), (rand(-0.03, 0.03), rand(-0.03, 0.03))
    x, y = x - shift[0], y - shift[1]
    x, y = (x * math.cos(tilt) - y * math.sin(tilt))[None], (x * math.sin(tilt) + y * math.cos(tilt))[None]
    width, length = rand(0.66, 0.74), rand(0.82, 0.90)
    shrink = (1 - ((level - 0.45) / 0.66).square()).clamp(min=0.05).sqrt()
    shape = (slices, size, size)
    edge = 2.0 / size
    soft = lambda d, w=edge: torch.sigmoid(d / w)                    # a membership with a one-pixel border
    wobble = 0.02 * smooth_noise(shape, (2, 4, 4), g)
    r = ((x / width).square() + (y / length).square()).sqrt() / shrink + wobble
    over = lambda image, value, where: image * (1 - where) + value * where
    fold = smooth_noise(shape, (4, 18, 18), g)
    brain = soft(0.83 - r)
    # grey cortex follows the surface and the folds; CSF fills the sulci
    depth = 0.83 - r
    cortex = torch.maximum(soft(0.075 - depth), soft(0.28 - depth, 0.02) * soft(0.50 - fold.abs(), 0.08))
    sulci = soft(0.25 - depth, 0.02) * soft(0.13 - fold.abs(), 0.03)
    tissue = over(over(torch.full(shape, 0.72), 0.47, cortex), 0.16, 0.9 * sulci)
    nuclei_show = soft(0.13 - (level - 0.46).abs(), 0.03)
    horn, belly = rand(0.8, 1.25), rand(0.9, 1.1)
    ventricle = torch.zeros(shape)
    for side in (-1, 1):
        u, size_v = x * side - 0.02, horn * rand(0.88, 1.12)
        for cx, cy, rx, ry, lean in ((0.30, -0.02, 0.085, 0.17, 0.1), (0.13, 0.05, 0.085, 0.15, -0.25)):  # putamen, thalamus
            where = soft(1 - (((u - cx - lean * y) / rx).square() + ((y - cy) / ry).square()).sqrt(), 0.12)
            tissue = over(tissue, 0.56, where * nuclei_show)
        open_ = (1 - ((level - 0.56) / 0.20).square()).clamp(min=0).sqrt() * size_v
        front = ((u - 0.075 - 0.25 * (y + 0.12).clamp(max=0).abs()) / 0.058).square() + ((y + 0.16) / 0.17).square()
        back = ((u - 0.13 - 0.35 * (y - 0.2)) / 0.062).square() + ((y - 0.24) / (0.17 * belly)).square()
        for d in (front, back):
            ventricle = torch.maximum(ventricle, soft(open_ - d.sqrt(), 0.10) * (open_ > 0.05))
    tissue = over(tissue, 0.14, ventricle)
    falx = soft(0.010 - x.abs(), 0.006) * torch.maximum(soft(y.abs() - 0.42, 0.02), soft(level - 0.74, 0.02))
    tissue = over(tissue, 0.20, falx)
    pre = torch.full(shape, 0.02)
    for value, border in ((0.82, 1.0), (0.10, 0.94), (0.16, 0.87)):           # scalp, skull, CSF
        pre = over(pre, value * (1 + 0.06 * smooth_noise(shape, (3, 8, 8), g)), soft(border - r))
    pre = over(pre, tissue, brain)
    post = pre.clone()
    for cy, cx, radius in ((0.80 * length, 0.0, 0.022), (rand(-0.2, 0.2), rand(0.3, 0.5), 0.014), (rand(-0.2, 0.2), -rand(0.3, 0.5), 0.014)):
        vessel = soft(radius - ((x - cx * shrink).square() + (y - cy * shrink).square()).sqrt(), 0.006)
        post = over(post, 0.98, vessel * soft(0.90 - r))                      # sagittal sinus and two vessels
    seg = torch.zeros(shape, dtype=torch.bool)
    for _ in range(1 + min(9, int(torch.poisson(torch.tensor(4.0), generator=g)))):
        for _ in range(100):                                                  # a place inside the brain, off the ventricles
            z, cy, cx = int(rand(0, slices)), rand(-0.75, 0.75), rand(-0.6, 0.6)
            i, j = (int(((c + s) + 1) / 2 * size) for c, s in ((cy, shift[1]), (cx, shift[0])))
            if depth[z, i, j] > 0.10 and ventricle[z, i, j] < 0.1:
                break
        radius = min(max(6.5 * math.exp(0.5 * float(torch.randn((), generator=g))), 3.0), 20.0)      # mm
        mm = size * spacing[1] / 2                                            # of one unit of x
        dz = (torch.arange(slices) - z - rand(-0.4, 0.4))[:, None, None] * spacing[0]
        px, py = x[0, i, j], y[0, i, j]
        stretch, turn = rand(0.8, 1.25), rand(0, math.pi)
        along = ((x - px) * math.cos(turn) + (y - py) * math.sin(turn)) * stretch
        across = ((y - py) * math.cos(turn) - (x - px) * math.sin(turn)) / stretch
        d = ((along.square() + across.square()) * mm ** 2 + dz.square()).sqrt() / radius
        d = d * (1 + 0.10 * smooth_noise(shape, (2, 12, 12), g))
        width_mm = edge * mm / radius
        body, ring = soft(1 - d, width_mm / 2) * soft(depth, edge), radius > 7 and rand(0, 1) < 0.6
        halo = soft(rand(1.3, 1.9) - d, 0.12) * soft(depth - 0.03, edge) * (1 - ventricle)
        for image, rim in ((pre, 0.44), (post, rand(0.92, 1.05))):
            image.copy_(over(image, image * 0.78, halo))
            image.copy_(over(image, rim, body))
            if ring:
                image.copy_(over(image, 0.30, soft(rand(0.55, 0.72) - d, width_mm / 2) * soft(depth, edge)))
        seg |= body > 0.5
    bias = torch.exp(0.07 * smooth_noise(shape, (2, 2, 2), g))
    noise = lambda: 0.018 * torch.randn(2, *shape, generator=g)
    kernel = torch.tensor([1.0, 4, 1]).outer(torch.tensor([1.0, 4, 1]))[None, None] / 36             # the scanner's point spread
    blur = lambda v: F.conv2d(F.pad(v[:, None], (1, 1, 1, 1), mode='replicate'), kernel)[:, 0]
    magnitude = lambda v: ((v + noise()[0]).square() + noise()[1].square()).sqrt()           # Rician
    return magnitude(blur(pre * bias)).numpy(), magnitude(blur(post * bias)).numpy(), seg.numpy().astype(np.uint8), spacing


def make_phantom(directory, patients=PHANTOM['patients'], seed=0, slices=PHANTOM['slices'], size=PHANTOM['size']):
    """Writes the phantom in the BrainMetShare layout: bravo, t1_pre (uint8) and seg. Patient i is the same in any set."""
    directory = Path(directory)
    for i in progress(range(patients), 'phantom', leave=False):
        folder = directory / f'phantom_{seed}_{i:03d}'
        if not folder.exists():
            pre, post, seg, spacing = phantom_patient(generator('phantom', seed, i), slices, size)
            scale = 255 / max(pre.max(), post.max())
            write_patient(folder, {'t1_pre': np.uint8(pre * scale), 'bravo': np.uint8(post * scale)}, seg, spacing, keep=True)
    return directory


def phantom_root(cache='runs/cache'):
    """The built-in phantom, written once beside the cache; the run says that it is not real."""
    directory = Path(cache).parent / 'phantom'
    print0(f'no --data given: using the built-in phantom in {directory} ({PHANTOM["patients"]} made-up patients)')
    if rank() == 0:
        make_phantom(directory)
    barrier()
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# 4  Networks
# ---------------------------------------------------------------------------------------------------------------------


class CPUAttention(torch.autograd.Function):
    """softmax(q k^T) v in bf16 on the CPU, with a backward that keeps one score matrix instead of three and works in place.

    1,024 queries at a time, so that the other score matrices are small. With P = softmax(q k^T) and g the gradient of out = P v:
    dv = P^T g, dP = g v^T, dS = P * (dP - rowsum(dP * P)), dq = dS k, dk = dS^T q. Scores in q's precision, softmax in fp32 inside.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        with torch.autocast('cpu', enabled=False):              # it would copy the largest matrix of the network to fp32 and back
            kept = [(part @ k.mT).softmax(-1) for part in q.split(1024, -2)]
            out = torch.cat([p @ v for p in kept], -2)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv = [], 0, 0
        for p, q, g in zip(kept, q.split(1024, -2), g.split(1024, -2)):
            ds = g @ v.mT
            torch.ops.aten._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
            dq.append(ds @ k)
            dk, dv = dk + ds.mT @ q, dv + p.mT @ g
        return torch.cat(dq, -2), dk, dv


class CPUGroupNorm(torch.autograd.Function):
    """torch's group norm, and SiLU if asked, with a faster backward for channels_last on the CPU (its own takes 5 to 30 times the forward there).

    With xhat = (x - mean) rstd and D values a group: dx = rstd (w g - mean_D(w g) - xhat mean_D(w g xhat)), which is
    a g + b x + c with a, b, c constant in each channel. Whole rows of W x C values are multiplied at once. What SiLU's gradient
    needs is computed again instead of kept: a third of what a residual block keeps otherwise.
    """

    @staticmethod
    def norm(x, weight, bias, groups, eps):
        small = x.dtype == torch.bfloat16 and x[0].numel() < 2 ** 16                          # torch walks such maps value by value in bf16, not in fp32
        with torch.autocast('cpu', enabled=False):
            out, mean, rstd = torch.native_group_norm(*(v.float() if small else v for v in (x, weight, bias)), *x.shape[:2], x.shape[2:].numel(), groups, eps)
        return out.to(x.dtype), mean, rstd

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        out, mean, rstd = CPUGroupNorm.norm(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.silu = eps, silu
        return F.silu(out, inplace=True) if silu else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        """g like the output -> gradients of x (B,C,H,W), weight and bias (C,); g's rows must lie as x's do, or they are copied."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (B, C, H, W), groups = x.shape, mean.shape[1]
        rows = lambda v: v.permute(0, 2, 3, 1).reshape(B, H, W * C)                            # no copy in channels_last
        each = lambda v: v.float().repeat_interleave(C // groups, 1)                           # (B, groups) -> (B, C)
        along = lambda v: v.to(x.dtype).repeat(1, W)[:, None]                                  # (B, C) -> beside rows
        if ctx.silu:                                                                           # not as a x + b: in bf16 that cancels where |mean| >> std
            y = CPUGroupNorm.norm(x, weight, bias, groups, ctx.eps)[0]
            g = torch.ops.aten.silu_backward.grad_input(g, y, grad_input=y)
        x, g, mean, rstd = rows(x), rows(g), each(mean), each(rstd)
        total = lambda v: v.sum(1).float().view(B, W, C).sum(1)                             # bf16 sums add up in fp32
        mean_d = lambda v: each(v.view(B, groups, -1).sum(2) * (groups / (C * H * W)))
        g_sum = total(g)
        gx_sum = (total(x * g) - mean * g_sum) * rstd                                          # sum of g xhat
        b = -rstd.square() * mean_d(weight * gx_sum)
        c = -rstd * mean_d(weight * g_sum) - b * mean
        dx = torch.addcmul(along(c), x, along(b)).addcmul_(g, along(weight * rstd))
        return dx.view(B, H, W, C).permute(0, 3, 1, 2), gx_sum.sum(0), g_sum.sum(0), None, None, None


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, then SiLU if asked; on the CPU in channels_last with the backward above."""

    def forward(self, x, silu=False):
        if x.device.type == 'cpu' and x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return CPUGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)
        x = super().forward(x)
        return F.silu(x) if silu else x


WATCHERS = []       # functions that see queries, keys and mask of every attention before it is computed (analysis.py attention)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d), over the keys where mask (B,1,1,M) is true. Every attention goes through here.

    torch's kernel, which holds no score matrix, but for bf16 on the CPU with up to 2,048 tokens: there it takes 1.1 to 1.7 times as long
    as CPUAttention, while in fp32 that took 1.0 to 1.6 times as long as the kernel (forward and backward, one core with AMX).
    """
    for see in WATCHERS:
        see(q, k, mask)
    if mask is not None or q.device.type != 'cpu' or q.dtype != torch.bfloat16 or q.shape[-2] * k.shape[-2] > 1 << 22:
        return F.scaled_dot_product_attention(q, k, v, mask)
    return CPUAttention.apply(q * q.shape[-1] ** -0.5, k, v)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the precision of x, which autocast makes another than the weight's."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention over tokens (B,N,C): to themselves, or to a context (B,M,context_dim) when that is given.

    A context token of zeros is padding and not attended to; each image needs one that is none. qk_norm: queries and keys are
    brought to a root mean square of one in each head, times a learned scale, so that no logit can grow without end (Esser 2024).
    """

    def __init__(self, channels, head_channels, context_dim=None, bias=True, qk_norm=False, project=True):
        super().__init__()
        if channels % head_channels:
            fail(f'--head-channels {head_channels}: does not divide the {channels} channels of an attention level')
        self.heads = channels // head_channels
        if context_dim is None:
            self.qkv = nn.Linear(channels, 3 * channels, bias)
        else:
            self.q, self.kv = nn.Linear(channels, channels, bias), nn.Linear(context_dim, 2 * channels, bias)
        self.out = nn.Linear(channels, channels) if project else nn.Identity()
        self.norm_q, self.norm_k = (RMSNorm(head_channels, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def project(self, x, context=None):
        """Queries of x, keys and values of x or of the context: (B, heads, N, d) each."""
        split = lambda a, n: a.unflatten(-1, (n, self.heads, -1)).permute(2, 0, 3, 1, 4)      # (n, B, heads, N, d)
        q, k, v = split(self.qkv(x), 3) if context is None else (*split(self.q(x), 1), *split(self.kv(context), 2))
        return self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype), v

    def join(self, h):
        """Brings the heads (B, heads, N, d) together: (B,N,C)."""
        return self.out(h.transpose(1, 2).flatten(2))

    def forward(self, x, context=None):
        """x (B,N,C), context (B,M,context_dim) or none -> (B,N,C)."""
        return self.join(attention(*self.project(x, context), None if context is None else (context != 0).any(-1)[:, None, None]))


class SpatialAttention(nn.Module):
    """x + attention(norm(x)) over the positions of a feature map (MONAI's SpatialAttentionBlock)."""

    def __init__(self, channels, head_channels, groups, conv, project=True):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.attn = Attention(channels, head_channels, project=project)

    def forward(self, x, context=None):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                                       # (B, N, C)
        return x + self.attn(tokens).transpose(1, 2).reshape(x.shape)


class SpatialTransformer(nn.Module):
    """Self-attention, cross-attention to a context (B,M,context_dim), GEGLU: MONAI's SpatialTransformer with one block."""

    def __init__(self, channels, head_channels, groups, conv, context_dim):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = conv(channels, channels, 1), conv(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, head_channels, bias=False)
        self.attn2 = Attention(channels, head_channels, context_dim, bias=False)
        self.ff1, self.ff2 = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)
        zero_(self.proj_out)

    def forward(self, x, context):
        """x (B,C,*spatial), context (B,M,context_dim) -> as x."""
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), context)
        value, gate = self.ff1(self.norm3(h)).chunk(2, -1)
        h = h + self.ff2(value * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


def run_block(net, block, *inputs):
    """block(*inputs); with --checkpointing its input alone is kept in training, and the backward computes the block again."""
    return checkpoint(block, *inputs, use_reentrant=False) if net.checkpointing and net.training else block(*inputs)


class Conv3d(nn.Conv3d):
    """nn.Conv3d, with splits > 1 computed in so many slabs along the first spatial axis, each with the rows next to it that its edge needs: the
    same result with less memory beside input and output (MAISI's num_splits). Of the autoencoders, all of which share the number."""

    splits = 1

    def forward(self, x):
        """x (B,C,D,H,W) -> what nn.Conv3d makes of it."""
        if self.splits == 1:
            return super().forward(x)
        size, stride, pad = self.kernel_size[0], self.stride[0], self.padding[0]
        n, out = (x.shape[2] + 2 * pad - size) // stride + 1, None
        for a, b in ((n * i // self.splits, n * (i + 1) // self.splits) for i in range(self.splits)):
            if a < b:
                low, high = a * stride - pad, (b - 1) * stride - pad + size
                part = F.pad(x[:, :, max(low, 0):high], (0, 0, 0, 0, max(-low, 0), max(high - x.shape[2], 0)))
                part = F.conv3d(part, self.weight, self.bias, self.stride, (0, *self.padding[1:]))
                out = part.new_empty(*part.shape[:2], n, *part.shape[3:]) if out is None else out
                out[:, :, a:b] = part                                           # joined at the end, all would be there twice
        return out


def zero_(layer):
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, + time embedding (embed > 0), GroupNorm, SiLU, conv (zero at the start), + shortcut.

    resample: 'down' (means of 2 an axis) or 'up' (nearest), of what the first convolution and the shortcut see (MAISI).
    """

    def __init__(self, in_channels, out_channels, embed, groups, conv, resample=None):
        super().__init__()
        self.resample = resample
        self.norm1, self.conv1 = GroupNorm(groups(in_channels), in_channels, eps=1e-6), conv(in_channels, out_channels)
        self.time = nn.Linear(embed, out_channels) if embed else None
        self.norm2, self.conv2 = GroupNorm(groups(out_channels), out_channels, eps=1e-6), zero_(conv(out_channels, out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def forward(self, x, emb=None):
        """x (B,in_channels,*spatial), emb (B,embed), SiLU applied -> (B,out_channels,*spatial), halved or doubled with resample."""
        h = self.norm1(x, silu=True)
        if self.resample:
            half = lambda v: (F.avg_pool2d, F.avg_pool3d)[v.ndim - 4](v, 2)
            x, h = (half(v) if self.resample == 'down' else F.interpolate(v, scale_factor=2.0) for v in (x, h))
        h = self.conv1(h)
        if self.time:
            h += self.time(emb)[(...,) + (None,) * (x.ndim - 2)]             # in place: no gradient needs a convolution's result
        h = self.conv2(self.norm2(h, silu=True))
        h += self.skip(x)
        return h


class Interleave(torch.autograd.Function):
    """(B, 2^dims C, *n+1) -> (B, C, *2n): the 2^dims blocks of channels are the phases of the fine grid; phase p along an axis lies on the
    positions p .. p+n-1 of the coarse one. Autograd alone would fill a tensor of outs' size for every phase and add them up."""

    @staticmethod
    def phases(outs):
        """For each phase its part of outs (B,C,*n) and its positions on the fine grid."""
        dims = outs.ndim - 2
        return [(part[(..., *(slice(p, p + n - 1) for p, n in zip(phase, outs.shape[2:])))], (..., *(slice(p, None, 2) for p in phase)))
                for phase, part in zip(itertools.product((0, 1), repeat=dims), outs.chunk(2 ** dims, 1))]

    @staticmethod
    def forward(ctx, outs):
        dims = outs.ndim - 2
        last = (torch.channels_last, torch.channels_last_3d)[dims - 2]
        ctx.like = dict(size=outs.shape, dtype=outs.dtype, device=outs.device,
                        memory_format=last if outs.is_contiguous(memory_format=last) else torch.contiguous_format)
        y = torch.empty(**{**ctx.like, 'size': (len(outs), outs.shape[1] // 2 ** dims, *(2 * (n - 1) for n in outs.shape[2:]))})
        for part, fine in Interleave.phases(outs):
            y[fine] = part
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        outs = torch.empty(**ctx.like).zero_()
        for part, fine in Interleave.phases(outs):
            part.copy_(g[fine])
        return outs


class Upsample(nn.Module):
    """Nearest upsampling by 2, then a 3-wide convolution, computed on the small grid.

    Each output position sees the small grid through 2 taps an axis (a phase: the 3 weights, two of them summed), so one
    2-wide convolution with 2^dims times the channels does it in 4/9 (2D) or 8/27 (3D) of the multiplications.
    """

    def __init__(self, channels, conv):
        super().__init__()
        self.conv = conv(channels, channels)
        # (phase, tap, weight): phase 0 sees (w0, w1 + w2), phase 1 sees (w0 + w1, w2)
        self.register_buffer('taps', torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]), persistent=False)

    def forward(self, x):
        """x (B,C,*spatial) -> (B,C,*2 spatial)."""
        w, dims = self.conv.weight, x.ndim - 2
        axes = 'xyz'[:dims]
        rule = 'oi' + axes + ''.join(f',{a.upper()}{b}{a}' for a, b in zip(axes, 'rst')) + '->' + axes.upper() + 'oi' + 'rst'[:dims]
        small = torch.einsum(rule, w, *[self.taps.to(w.dtype)] * dims)                                    # (2,.., O, I, 2,..)
        outs = (F.conv2d, F.conv3d)[dims - 2](x, small.flatten(0, dims), self.conv.bias.repeat(2 ** dims), padding=1)
        return Interleave.apply(outs)


def space_to_depth(x, factor):
    """(B,C,*size) -> (B, C prod(factor), *size/factor): the pixels of each block become channels, none is lost (pixel-unshuffle).

    Channel c of x becomes the channels from c prod(factor) on, the block's pixels row by row. factor: one number an axis.
    """
    dims = len(factor)
    x = x.reshape(*x.shape[:2], *(n for s, f in zip(x.shape[2:], factor) for n in (s // f, f)))
    return x.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)).flatten(1, 1 + dims)


def depth_to_space(x, factor):
    """The inverse of space_to_depth (pixel-shuffle)."""
    dims = len(factor)
    size = [s * f for s, f in zip(x.shape[2:], factor)]
    x = x.unflatten(1, (-1, *factor))
    return x.permute(0, 1, *(a for i in range(dims) for a in (2 + dims + i, 2 + i))).reshape(*x.shape[:2], *size)


def haar(x):
    """Orthonormal Haar transform: (B,C,H,W) -> (B,4C,H/2,W/2), (B,C,D,H,W) -> (B,8C,D/2,H/2,W/2). Even sizes.

    Band s of channel c is out[:, s C + c]; the bits of s say along which axes it is a difference, the last axis (x) being the
    lowest bit. In 2D with the block (a b; c d): LL = (a+b+c+d)/2, LH = (a-b+c-d)/2, HL = (a+b-c-d)/2, HH = (a-b-c+d)/2.
    White noise stays white; a constant v is 2 v in LL (2^(3/2) v in 3D) and 0 elsewhere.
    """
    for axis in reversed(range(2, x.ndim)):
        a, b = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
        x = torch.cat([a + b, a - b], 1)
    return x * 2 ** (1 - x.ndim / 2)


def inverse_haar(x):
    """The inverse of haar."""
    for axis in range(2, x.ndim):
        low, high = x.chunk(2, 1)
        x = torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1)
    return x * 2 ** (1 - x.ndim / 2)


class Down(nn.Module):
    """A 3-wide convolution of stride 1 or 2 an axis, zeros padded at the far end only (Rombach 2022, MAISI).

    shortcut: added to the pixels of each block as channels, averaged in groups (DC-AE, Chen 2024, arXiv 2410.10733): what there
    is gets through before anything is learned.
    """

    def __init__(self, in_channels, out_channels, stride, shortcut=False):
        super().__init__()
        self.conv = (nn.Conv2d, Conv3d)[len(stride) - 2](in_channels, out_channels, 3, stride)
        self.stride, self.shortcut = stride, shortcut
        self.pad = [p for s in reversed(stride) for p in ((0, 1) if s == 2 else (1, 1))]

    def forward(self, x):
        h = self.conv(F.pad(x, self.pad))
        return h + self.average(x, h.shape[1], self.stride) if self.shortcut else h

    @staticmethod
    def average(x, channels, stride):
        return space_to_depth(x, stride).unflatten(1, (channels, -1)).mean(2)


class Up(Upsample):
    """Upsampling by 1 or 2 an axis: nearest, or linear with `smooth` (MAISI), then a 3-wide convolution. shortcut: the inverse of Down's."""

    def __init__(self, in_channels, out_channels, stride, smooth=False, shortcut=False):
        super().__init__(in_channels, lambda i, o: (nn.Conv2d, Conv3d)[len(stride) - 2](i, out_channels, 3, padding=1))
        self.stride, self.smooth, self.shortcut = stride, smooth, shortcut

    def forward(self, x):
        if self.smooth or min(self.stride) == 1:
            mode = 'nearest' if not self.smooth else 'bilinear' if x.ndim == 4 else 'trilinear'
            h = self.conv(F.interpolate(x, scale_factor=[float(s) for s in self.stride], mode=mode))
        else:
            h = super().forward(x)
        return h + self.repeat(x, h.shape[1], self.stride) if self.shortcut else h

    @staticmethod
    def repeat(x, channels, stride):
        return depth_to_space(x.repeat_interleave(channels * math.prod(stride) // x.shape[1], 1), stride)


class Autoencoder(nn.Module):
    """Variational autoencoder in 2D or 3D (Rombach 2022): the same function as MAISI's (3D) for the same weights (load_maisi_vae).

    channels: width of each level; strides: from each level to the next, 1 or 2 an axis (none: 2); layers: residual blocks a level.
    smooth: upsampling by interpolation instead of nearest. shortcut: residual paths of DC-AE. No attention: it is for any size.
    """

    def __init__(self, in_channels=1, latent=4, channels=(64, 128, 256), layers=2, strides=None, dims=2, norm_groups=32,
                 smooth=False, shortcut=False):
        super().__init__()
        strides = strides or [(2,) * dims] * (len(channels) - 1)
        Conv = nn.Conv2d if dims == 2 else Conv3d
        conv = lambda i, o, k=3: Conv(i, o, k, padding=k // 2)
        groups = lambda c: math.gcd(c, norm_groups)
        norm = lambda c: GroupNorm(groups(c), c, eps=1e-6)
        encoder, decoder, c = [conv(in_channels, channels[0])], [conv(latent, channels[-1])], channels[0]
        for level, o in enumerate(channels):
            for _ in range(layers):
                encoder.append(ResBlock(c, o, 0, groups, conv))
                c = o
            if level < len(channels) - 1:                    # with shortcuts it widens here: averaging in groups then keeps more than a mean
                c = channels[level + 1] if shortcut else o
                encoder.append(Down(o, c, strides[level], shortcut))
        for level, o in reversed(list(enumerate(channels))):
            for _ in range(layers):
                decoder.append(ResBlock(c, o, 0, groups, conv))
                c = o
            if level:
                c = channels[level - 1] if shortcut else o
                decoder.append(Up(o, c, strides[level - 1], smooth, shortcut))
        self.encoder = nn.Sequential(*encoder, norm(channels[-1]), conv(channels[-1], latent))
        self.decoder = nn.Sequential(*decoder, norm(channels[0]), conv(channels[0], in_channels))
        self.mean, self.log_var, self.from_latent = (conv(latent, latent, 1) for _ in range(3))

    def encode(self, x):
        """x (B,in_channels,*size) -> mean and log-variance of z (B,latent,*size/factor)."""
        h = self.encoder(x)
        return self.mean(h), self.log_var(h).clamp(-30, 20)

    def decode(self, z):
        """z (B,latent,*size/factor) -> (B,in_channels,*size)."""
        return self.decoder(self.from_latent(z))

    def forward(self, x, noise=None, stage=None):
        """Reconstruction, mean, log-variance. noise: standard normal like the latent, none: decodes the mean."""
        mean, log_var = self.encode(x)
        return self.decode(mean if noise is None else mean + (log_var / 2).exp() * noise), mean, log_var


def turn(v):
    """Volumes (B,C,z,y,x), front up and image left = patient right, as MAISI knows them: (B,C,x,y,z) towards right, front and top."""
    return v.flip(-2, -1).transpose(2, 4)


def turn_back(v):
    return v.transpose(2, 4).flip(-2, -1)


class MaisiVAE(Autoencoder):
    """MAISI's autoencoder for volumes as they are here: it knows them turned and in [0, 1]. Latents are turned back as well."""

    def __init__(self, latent=4, channels=(64, 128, 256), layers=2, norm_groups=32):
        super().__init__(1, latent, channels, layers, None, 3, norm_groups, smooth=True)

    def encode(self, x):
        return tuple(turn_back(v) for v in super().encode(turn(x) / 2 + 0.5))

    def decode(self, z):
        return 2 * turn_back(super().decode(turn(z))) - 1


class MultiScale(nn.Module):
    """Gradual compression: a chain of autoencoders that halve each axis, with DC-AE's shortcuts; stage k compresses the latent of stage k-1.

    Only the last latent is drawn from its distribution (and has a KL); those between hold their means, twice as many channels.
    """

    def __init__(self, in_channels=1, latent=4, channels=(64, 128, 256, 256), layers=2, dims=2, norm_groups=32):
        super().__init__()
        self.last = len(channels) - 2
        widths = [in_channels, *[2 * latent] * self.last, latent]
        self.stages = nn.ModuleList(Autoencoder(widths[k], widths[k + 1], channels[k:k + 2], layers, None, dims, norm_groups, shortcut=True)
                                    for k in range(self.last + 1))

    def encode(self, x, stage=None):
        for part in self.stages[:self.last + 1 if stage is None else stage + 1]:
            x, log_var = part.encode(x)
        return x, log_var

    def decode(self, z, stage=None):
        for part in reversed(self.stages[:self.last + 1 if stage is None else stage + 1]):
            z = part.decode(z)
        return z

    def forward(self, x, noise=None, stage=None):
        """As Autoencoder's, through the stages 0 .. stage (none: all)."""
        mean, log_var = self.encode(x, stage)
        return self.decode(mean if noise is None else mean + (log_var / 2).exp() * noise, stage), mean, log_var


# --vae: the strides from level to level
VAES = {'2': [(2, 2)], '2x4': [(2, 2), (1, 2)], '4': [(2, 2)] * 2, '8': [(2, 2)] * 3, 'multiscale': [(2, 2)] * 3}


def build_autoencoder(args):
    """The autoencoder that --vae, --channels, --layers, --latent-channels describe, and its factor (y, x), with --volume (z, y, x)."""
    dims, channels = 3 if getattr(args, 'volume', None) else 2, tuple(args.channels)
    strides = [s[:1] * (dims - 2) + s for s in VAES[args.vae]]
    factor = tuple(math.prod(s) for s in zip(*strides))
    if getattr(args, 'maisi_vae', None):
        return MaisiVAE(args.latent_channels, channels, args.layers, args.norm_groups), factor
    if args.vae == 'multiscale':
        return MultiScale(1, args.latent_channels, channels, args.layers, dims, args.norm_groups), factor
    return Autoencoder(1, args.latent_channels, channels, args.layers, strides, dims, args.norm_groups), factor


def time_embedding(t, channels, max_period=10000):
    """Sinusoids of t (B,) in fp32: cosines, then sines (Ho 2020); a zero column when channels is odd."""
    half = channels // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    args = t.float()[:, None] * freqs
    return F.pad(torch.cat([args.cos(), args.sin()], 1), (0, channels % 2))


def coordinates(x, where=None):
    """Where each voxel of x (B,C,D,H,W) lies in its volume, from -1 to 1 along z, y, x: (B,3,D,H,W). where: of crop_volumes; none: all of it."""
    where = x.new_tensor([0, 0, 0, 1, 1, 1]).expand(len(x), 6) if where is None else where.to(x)
    low, span, out = where[:, :3], where[:, 3:] - where[:, :3], []
    for axis, n in enumerate(x.shape[2:]):
        u = low[:, axis:axis + 1] + span[:, axis:axis + 1] * ((torch.arange(n, device=x.device) + 0.5) / n)
        out.append((2 * u - 1).view(len(x), *(n if axis == a else 1 for a in range(3))).expand(len(x), *x.shape[2:]))
    return torch.stack(out, 1)


class UNet(nn.Module):
    """The U-Net of Ho 2020 / Rombach 2022 in 2D or 3D: same function as MONAI's DiffusionModelUNet for the same weights.

    channels: width of each level, halving the size from one to the next; attention: 1 where a level attends (to itself,
    and with context_dim set also to the context); layers: residual blocks a level (the way up has one more).
    extra_dim: length of the vector `extra`, joined to the time embedding through a layer that starts at zero.
    norm_groups: of every GroupNorm. A width of 32 with MONAI's 32 groups leaves one channel a group: the norm then takes
    away the time embedding, a constant of each channel, and the level is blind to t. Narrow networks need fewer groups.
    classes, joined, updown, project: MAISI's (see there). `extra` is then the class (if there are classes), whose embedding is added to
    that of time, and vectors of the lengths `joined`, whose embeddings are set beside it; updown: residual blocks that resample
    instead of convolutions; project: attention ends with a linear layer; turned: x comes as volumes lie here, MAISI knows them turned.
    placed: trained on crops of volumes (--crop), so that `extra` says where x lies and becomes three more channels.
    """

    def __init__(self, in_channels, out_channels, channels=(128, 256, 256), attention=(0, 1, 1), layers=1,
                 head_channels=256, context_dim=None, dims=2, extra_dim=0, norm_groups=32, placed=False, classes=0, joined=(), updown=False,
                 project=True, turned=False):
        super().__init__()
        if len(attention) != len(channels):
            fail(f'--attention has {len(attention)} levels, --channels {len(channels)}; give one 0 or 1 for each level')
        self.checkpointing, self.turned = False, turned                     # see run_block
        self.in_channels, self.dims, self.scale, self.width, self.context_dim = in_channels, dims, 2 ** (len(channels) - 1), channels[0], context_dim
        Conv = nn.Conv2d if dims == 2 else nn.Conv3d
        conv = lambda i, o, k=3, stride=1: Conv(i, o, k, stride, k // 2)
        groups = lambda c: math.gcd(c, norm_groups)
        embed = 4 * channels[0]
        mlp = lambda n: nn.Sequential(nn.Linear(n, embed), nn.SiLU(), nn.Linear(embed, embed))
        res = lambda i, o, resample=None: ResBlock(i, o, (1 + len(joined)) * embed, groups, conv, resample)

        def attend(level):
            c = channels[level]
            if context_dim:
                return SpatialTransformer(c, min(head_channels, c), groups(c), conv, context_dim)
            return SpatialAttention(c, min(head_channels, c), groups(c), conv, project)

        self.placed, self.conv_in = placed, conv(in_channels + 3 * placed, channels[0])
        self.time_embed = mlp(channels[0])
        self.extra_embed = nn.Sequential(nn.Linear(extra_dim, embed), nn.SiLU(), zero_(nn.Linear(embed, embed))) if extra_dim else None
        self.class_embed, self.joined = nn.Embedding(classes, embed) if classes else None, nn.ModuleList(mlp(n) for n in joined)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        c, skips, last = channels[0], [channels[0]], len(channels) - 1
        for level, o in enumerate(channels):
            block = nn.ModuleDict(dict(resnets=nn.ModuleList(), attentions=nn.ModuleList()))
            for _ in range(layers):
                block.resnets.append(res(c, o))
                if attention[level]:
                    block.attentions.append(attend(level))
                c = o
                skips.append(c)
            if level < last:
                block['resample'] = res(c, c, 'down') if updown else conv(c, c, 3, 2)
                skips.append(c)
            self.down_blocks.append(block)
        self.middle_block = nn.ModuleDict(dict(resnet_1=res(c, c), attention=attend(last), resnet_2=res(c, c)))
        for level, o in reversed(list(enumerate(channels))):
            block = nn.ModuleDict(dict(resnets=nn.ModuleList(), attentions=nn.ModuleList()))
            for _ in range(layers + 1):
                block.resnets.append(res(c + skips.pop(), o))
                if attention[level]:
                    block.attentions.append(attend(level))
                c = o
            if level > 0:
                block['resample'] = res(c, c, 'up') if updown else Upsample(c, conv)
            self.up_blocks.append(block)
        self.out = nn.Sequential(GroupNorm(groups(c), c, eps=1e-6), nn.SiLU(), zero_(conv(c, out_channels)))

    def forward(self, x, t, context=None, extra=None):
        """x (B,in_channels,*spatial), t (B,) in [0,1], context (B,M,context_dim), extra (B,extra_dim) -> (B,out,*spatial)."""
        assert all(s % self.scale == 0 for s in x.shape[2:]), f'size {tuple(x.shape[2:])} is not a multiple of {self.scale}'
        assert (context is None) == (self.context_dim is None), 'context and context_dim go together'
        emb = self.time_embed(time_embedding(1000 * t.float(), self.width).to(self.conv_in.weight.dtype))
        if self.extra_embed is not None:
            emb = emb + self.extra_embed(extra)
        if self.class_embed is not None:
            emb, extra = emb + self.class_embed(extra[:, 0].long()), extra[:, 1:]
        if len(self.joined):
            emb = torch.cat([emb, *(layer(v) for layer, v in zip(self.joined, extra.split([m[0].in_features for m in self.joined], 1)))], 1)
        x, emb = torch.cat([x, coordinates(x, extra)], 1) if self.placed else x, F.silu(emb)
        run = lambda layer, *inputs: run_block(self, layer, *inputs)

        def level(block, h, skips=None, keep=None):
            for i, resnet in enumerate(block.resnets):
                h = run(resnet, h if skips is None else torch.cat([h, skips.pop()], 1), emb)
                if len(block.attentions):
                    h = run(block.attentions[i], h, context)
                if keep is not None:
                    keep.append(h)
            if 'resample' in block:
                h = run(block['resample'], h, emb) if isinstance(block['resample'], ResBlock) else block['resample'](h)
                if keep is not None:
                    keep.append(h)
            return h

        h = self.conv_in(turn(x) if self.turned else x)
        skips = [h]
        for block in self.down_blocks:
            h = level(block, h, keep=skips)
        mid = self.middle_block
        h = run(mid.resnet_2, run(mid.attention, run(mid.resnet_1, h, emb), context), emb)
        for block in self.up_blocks:
            h = level(block, h, skips)
        return turn_back(self.out(h)) if self.turned else self.out(h)


def load_monai(state_dict):
    """A MONAI DiffusionModelUNet state dict (core or GenerativeModels) under UNet's names, for load_state_dict(strict=True)."""
    rename = [('.conv.weight', '.weight'), ('.conv.bias', '.bias'), ('downsampler.op', 'resample'),
              ('upsampler.postconv', 'resample.conv'), ('upsampler.conv', 'resample.conv'), ('upsampler.', 'resample.conv.'),
              ('skip_connection', 'skip'), ('time_emb_proj', 'time'), ('transformer_blocks.0.', ''), ('out_proj', 'out'),
              ('to_out.0', 'out'), ('ff.linear1', 'ff1'), ('ff.linear2', 'ff2'), ('ff.net.0.proj', 'ff1'), ('ff.net.2', 'ff2')]
    flat, out = {}, {}
    for key, value in state_dict.items():
        for old, new in rename:
            key = key.replace(old, new)
        if 'attn' not in key or 'proj_attn' in key:                            # GenerativeModels: no .attn. level
            key = re.sub(r'(attentions\.\d+|middle_block\.attention)\.(to_[qkv]|proj_attn)\.', r'\1.attn.\2.', key)
        flat[key.replace('proj_attn', 'out').replace('resample.conv.conv', 'resample.conv')] = value
    for key, value in flat.items():
        stem, name = key.rsplit('.', 1)
        near = lambda letter: flat[f'{stem[:-4]}to_{letter}.{name}']
        if stem.endswith('attn2.to_q'):
            out[f'{stem[:-4]}q.{name}'] = value
        elif stem.endswith('attn2.to_k'):
            out[f'{stem[:-4]}kv.{name}'] = torch.cat([near('k'), near('v')])
        elif stem.endswith('.to_q'):
            out[f'{stem[:-4]}qkv.{name}'] = torch.cat([near('q'), near('k'), near('v')])
        elif not stem.endswith(('.to_k', '.to_v')):
            out[key] = value
    return out


def load_maisi_vae(state_dict):
    """A state dict of MAISI's AutoencoderKlMaisi, or of MONAI's AutoencoderKL without attention, under Autoencoder's names."""
    wrap = '.conv.conv.' if any(k.startswith('encoder.blocks.0.conv.conv.') for k in state_dict) else '.conv.'    # MAISI wraps twice
    rename = [('.blocks.', '.'), ('postconv', 'conv'), ('nin_shortcut', 'skip'), ('post_quant_conv', 'from_latent'), ('quant_conv_mu', 'mean'),
              ('quant_conv_log_sigma', 'log_var')]
    out = {}
    for key, value in state_dict.items():
        key = key.replace('.conv.' if 'quant_conv' in key else wrap, '.', 1)
        for old, new in rename:
            key = key.replace(old, new)
        out[key] = value
    return out


# The two published kinds of MAISI's diffusion U-Net (Guo 2024, arXiv 2409.11169; Zhao 2025, arXiv 2508.05772), as options of UNet. joined: ddpm
# top and bottom region (100 at one of head, chest, abdomen, pelvis) and spacing in 0.01 mm; rflow spacing alone.
MAISI = dict(ddpm=dict(classes=0, joined=(4, 4, 3), updown=False, project=False), rflow=dict(classes=128, joined=(3,), updown=True, project=True))


def load_maisi_unet(state_dict):
    """A state dict of MAISI's DiffusionModelUNetMaisi under UNet's names, the kind ('ddpm' or 'rflow') and the shape that it has, as UNet's
    arguments. Groups of 32 and heads of 32 channels are as published: a file does not say. Raises KeyError where it is none."""
    kind = 'rflow' if 'class_embedding.weight' in state_dict else 'ddpm'
    layers = [n for n in ('top_region_index', 'bottom_region_index', 'spacing') if kind == 'ddpm' or n == 'spacing']
    flat = {}
    for key, value in state_dict.items():
        if kind == 'ddpm' and '.out_proj.' in key:                              # published with the weights, used by no layer
            continue
        for i, name in enumerate(layers):
            key = key.replace(f'{name}_layer.', f'joined.{i}.')
        flat[re.sub(r'(up|down)sampler\.(?=norm|conv\d|time)', 'resample.', key).replace('class_embedding', 'class_embed')] = value
    weights, levels = load_monai(flat), range(len({k.split('.')[1] for k in flat if k.startswith('down_blocks.')}))
    return weights, kind, dict(
        in_channels=weights['conv_in.weight'].shape[1], out_channels=len(weights['out.2.weight']), layers=sum(k.startswith('down_blocks.0.resnets.') and
        k.endswith('norm1.weight') for k in weights), channels=tuple(len(weights[f'down_blocks.{i}.resnets.0.norm2.weight']) for i in levels),
        attention=tuple(int(f'down_blocks.{i}.attentions.0.norm.weight' in weights) for i in levels), head_channels=32, norm_groups=32)


def maisi_extra(args, spacing):
    """`extra` of MAISI's U-Net for volumes of these spacings (B,3), mm as z, y, x: the class, or head as top and bottom region, and spacing."""
    spacing = 100 * torch.as_tensor(spacing, dtype=torch.float32).flip(-1)
    told = [float(args.maisi_class)] if args.maisi == 'rflow' else [100.0, 0, 0, 0] * 2
    return torch.cat([torch.tensor([told]).expand(len(spacing), -1), spacing], 1)


# -- networks of tokens: a patch is a token. DiT, Mamba in its place, MMDiT ---------------------------------------------


def patchify(x, p):
    """(B,C,*spatial) -> (B, N, p^dims C): patches of p a side in reading order; inside a patch by place, channels last."""
    dims = x.ndim - 2
    for axis in range(dims):
        x = x.unflatten(2 + 2 * axis, (-1, p))                                                  # (B, C, n, p, n, p)
    return x.permute(0, *range(2, 2 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2), 1).flatten(1 + dims).flatten(1, dims)


def unpatchify(x, p, grid):
    """The inverse of patchify: (B, N, p^dims C) on a grid of patches -> (B,C,*spatial)."""
    dims = len(grid)
    x = x.unflatten(2, (*(p,) * dims, -1)).unflatten(1, grid)                                   # (B, n, n, p, p, C)
    x = x.permute(0, 2 * dims + 1, *(axis for i in range(dims) for axis in (1 + i, 1 + dims + i)))
    return x.reshape(*x.shape[:2], *(n * p for n in grid))


def positions(grid, width, device=None):
    """Sines and cosines of where a token lies along each axis, in patches, last axis first: (N, width), not trained (DiT)."""
    half = width // (2 * len(grid))                                                             # frequencies an axis
    freqs, tables = 10000 ** (-torch.arange(half, device=device) / half), []
    for i, n in enumerate(grid):
        angles = torch.arange(n, device=device)[:, None] * freqs
        table = torch.cat([angles.sin(), angles.cos()], 1)
        tables.append(table.view(*(n if j == i else 1 for j in range(len(grid))), -1).expand(*grid, -1))
    return F.pad(torch.cat(tables[::-1], -1).flatten(0, -2), (0, width - 2 * half * len(grid)))


def modulate(x, shift, scale):
    """LayerNorm without weights of its own, then (1 + scale), shift (B,1,width), which the time and `extra` decide."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def wide(module, x):
    """module(x) of a Linear, or a Sequential of those and activations, in fp32 where its weights are bf16 (--dtype pure-bf16): 1 + scale loses what is below 2^-8 there."""
    for layer in module if isinstance(module, nn.Sequential) else (module,):
        if isinstance(layer, nn.Linear):
            w, b = (v if v.dtype != torch.bfloat16 else v.float() for v in (layer.weight, layer.bias))
        x = F.linear(x, w, b) if isinstance(layer, nn.Linear) else layer(x)
    return x


def xavier(module):
    """Every linear layer inside starts Xavier-uniform with bias 0; what starts at zero stays."""
    for m in module.modules():
        if isinstance(m, nn.Linear) and m.weight.any():
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def cross_scan(x, grid):
    """The tokens of x (B,K,N,C) in the order of each of K = 2 dims directions: every axis in turn the slowest, forwards, then backwards.

    Those are rows, columns and both reversed in 2D (VMamba, Liu 2024, 2401.10166), six orders in 3D. x may hold the same for all K.
    """
    dims, axes = len(grid), list(range(1, len(grid) + 1))
    turned = [x[:, k].unflatten(1, grid).permute(0, *axes[k % dims:], *axes[:k % dims], dims + 1).flatten(1, dims) for k in range(2 * dims)]
    return torch.stack([v if k < dims else v.flip(1) for k, v in enumerate(turned)], 1)


def cross_merge(y, grid):
    """The K scans (B,K,N,C) put back into reading order and added: (B,N,C). cross_merge(cross_scan(x)) = sum of x over K."""
    dims, axes = len(grid), list(range(1, len(grid) + 1))
    y = y[:, :dims] + y[:, dims:].flip(2)
    back = lambda k: y[:, k].unflatten(1, (*grid[k:], *grid[:k])).permute(0, *axes[dims - k:], *axes[:dims - k], dims + 1).flatten(1, dims)
    return sum(back(k) for k in range(dims))


def ssd(x, a, b, c, chunk=32):
    """The selective scan h_t = exp(a_t) h_(t-1) + b_t x_t^T, y_t = c_t h_t with h_0 = 0, in chunks (Mamba-2, Dao 2024, 2405.21060, sec. 6).

    x (...,L,H,P) values of H heads; a (...,L,H) <= 0, one decay a head; b, c (...,L,S), shared by the heads -> y as x. Inside a
    chunk it is a masked matrix product, from chunk to chunk a recurrence of the states (H,S,P): the cost is linear in L. Only
    exp of sums of a is ever taken, never its inverse, so strong decay underflows to 0 and nothing overflows; decays below exp(-40)
    are taken as that, so that small ones beside them survive in fp32 sums. Differences of sums cost a quarter of masked sums.
    Mamba-1 decays each (channel, state) pair by itself. That is H = channels x states, P = S = 1 here (tests/test_tokens.py), exact,
    but `chunk` times the memory of its states, so no network here uses it.
    """
    length, chunk = x.shape[-3], min(chunk, x.shape[-3])
    pad = -length % chunk
    x, b, c = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(b, (0, 0, 0, pad)), F.pad(c, (0, 0, 0, pad))
    x = x.unflatten(-3, (-1, chunk)).transpose(-3, -2).contiguous()                             # (..., M, H, Q, P)
    a = F.pad(a.clamp(min=-40), (0, 0, 0, pad)).unflatten(-2, (-1, chunk)).transpose(-2, -1).cumsum(-1)     # (..., M, H, Q)
    b, c = (v.unflatten(-2, (-1, chunk)).unsqueeze(-3) for v in (b, c))                         # (..., M, 1, Q, S)
    i = torch.arange(chunk, device=x.device)
    decay = (a[..., :, None] - a[..., None, :]).masked_fill(i[:, None] < i, -math.inf).exp()    # from token j to token i >= j
    y = ((c @ b.mT) * decay) @ x
    states, state = ((b.mT * decay[..., -1:, :]) @ x).unbind(-4), 0                             # what each chunk adds (..., H, S, P)
    before = [torch.zeros_like(states[0])]
    for kept, state in zip(a[..., -1, None, None].exp().unbind(-4), states[:-1]):
        before.append(kept * before[-1] + state)
    y = y + (c * a.exp()[..., None]) @ torch.stack(before, -4)
    return y.transpose(-3, -2).flatten(-4, -3)[..., :length, :, :]


class Mamba(nn.Module):
    """Mixes tokens (B,N,width) by selective scans in 2 dims directions instead of attention; its cost is linear in N.

    As VMamba: project to u and gate z, a depthwise convolution over the grid (without it, raster scans tear neighbours apart),
    then for each direction dt, b, c from u, the scan, and the sum of the directions. As Mamba-2: one decay a head, dt =
    softplus(. + bias), A = -exp(A_log), RMSNorm of y silu(z). dt and A stay in fp32: in bf16, exp(-0.001) is 1 and nothing is forgotten.
    """

    def __init__(self, width, heads, dims, state=16):
        super().__init__()
        inner, self.directions, self.sizes = 2 * width, 2 * dims, (heads, state, state)
        self.project, self.out = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv = (nn.Conv2d, nn.Conv3d)[dims - 2](inner, inner, 3, padding=1, groups=inner)
        self.select = nn.Linear(inner, self.directions * sum(self.sizes), bias=False)
        dt = torch.exp(torch.empty(self.directions, heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))                          # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(self.directions, heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, eps=1e-5)

    def forward(self, x, grid):
        """x (B,N,width) of a grid of prod(grid) = N tokens -> as x."""
        u, z = self.project(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2).unflatten(2, grid))).flatten(2).transpose(1, 2)  # a view of channels_last both ways
        chosen = self.select(u).unflatten(-1, (self.directions, -1)).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            kind = torch.promote_types(u.dtype, torch.float32)
            u, A = u.to(kind), -self.A_log.to(kind).exp()[:, None]
            dt, b, c = cross_scan(chosen.to(kind), grid).split(self.sizes, -1)                  # (B, K, N, .)
            dt = F.softplus(dt + self.dt_bias.to(kind)[:, None])
            heads = cross_scan(u[:, None].expand(-1, self.directions, -1, -1), grid).unflatten(-1, (len(self.D), -1))
            y = cross_merge(ssd(heads * dt[..., None], dt * A, b, c).flatten(-2), grid)
            y = (y.unflatten(-1, (len(self.D), -1)) + self.D.to(kind)[:, None] * u.unflatten(-1, (len(self.D), -1))).flatten(-2)
        return self.out(self.norm(y.to(z.dtype) * F.silu(z)))


class Block(nn.Module):
    """DiT's block (Peebles 2022, 2212.09748): x += gate mixer(modulated x), x += gate MLP(modulated x), the gates zero at the start.

    context_dim: between the two, cross-attention to the context, whose output starts at zero. last: of MMDiT's second stream,
    whose tokens nobody reads any more: only queries, keys and values are left of it.
    """

    def __init__(self, width, mixer, heads, context_dim=None, last=False):
        super().__init__()
        self.ada, self.mixer = zero_(nn.Linear(width, (2 if last else 6) * width)), mixer
        self.cross = Attention(width, width // heads, context_dim) if context_dim else None
        if last:
            mixer.out = None
        else:
            self.mlp1, self.mlp2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if context_dim:
            zero_(self.cross.out)

    def modulation(self, c):
        """shift, scale, gate of the mixer, then of the MLP: (B,1,width) each."""
        return wide(self.ada, c)[:, None].split(c.shape[-1], -1)

    def forward(self, x, mod, context=None, *grid):
        """x (B,N,width), mod: six of modulation(), context (B,M,context_dim) or none -> as x."""
        x = x + mod[2] * self.mixer(modulate(x, *mod[:2]), *grid)
        if self.cross is not None:
            x = x + self.cross(F.layer_norm(x, x.shape[-1:], eps=1e-6), context)
        return self.feed(x, mod)

    def feed(self, x, mod):
        return x + mod[5] * self.mlp2(F.gelu(self.mlp1(modulate(x, *mod[3:5])), approximate='tanh'))


class JointBlock(nn.Module):
    """MMDiT's block (Esser 2024, 2403.03206): image and context tokens, each with weights of their own, attend to all of both."""

    def __init__(self, width, heads, last=False):
        super().__init__()
        self.image, self.context = (Block(width, Attention(width, width // heads, qk_norm=True), heads, last=end) for end in (False, last))
        self.last = last

    def modulation(self, c):
        return self.image.modulation(c), self.context.modulation(c)

    def forward(self, x, y, mod, mask=None):
        """x (B,N,width), y (B,M,width), mask (B,1,1,M+N): which tokens may be attended to."""
        streams = [(self.context, y, mod[1]), (self.image, x, mod[0])]
        joint = attention(*(torch.cat(v, 2) for v in zip(*(s.mixer.project(modulate(h, *m[:2])) for s, h, m in streams))), mask)
        y, x = (h if s.mixer.out is None else s.feed(h + m[2] * s.mixer.join(part), m)
                for (s, h, m), part in zip(streams, joint.split((y.shape[1], x.shape[1]), 2)))
        return x, y


class Tokens(nn.Module):
    """DiT (mixer attention) or the same network with selective scans (mixer mamba), 2D or 3D; same call as UNet.

    Masks are input channels; a context (B,M,context_dim) enters through cross-attention, tokens of zeros being padding.
    Sizes by name are in SIZES. In 2D with attention it is the function of DiT's published code, less its class embedding.
    """

    def __init__(self, in_channels, out_channels, patch=4, width=384, depth=12, heads=6, mixer='attention', context_dim=None, dims=2, extra_dim=0):
        super().__init__()
        self.checkpointing = False
        self.in_channels, self.dims, self.patch, self.width, self.context_dim, self.mixer = in_channels, dims, patch, width, context_dim, mixer
        make = {'attention': lambda i: Block(width, Attention(width, width // heads), heads, context_dim),
                'mamba': lambda i: Block(width, Mamba(width, heads, dims), heads, context_dim),
                'joint': lambda i: JointBlock(width, heads, i == depth - 1)}[mixer]
        self.embed = nn.Linear(patch ** dims * in_channels, width)
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.extra_embed = nn.Sequential(nn.Linear(extra_dim, width), nn.SiLU(), zero_(nn.Linear(width, width))) if extra_dim else None
        self.blocks = nn.ModuleList(make(i) for i in range(depth))
        self.ada, self.out = zero_(nn.Linear(width, 2 * width)), zero_(nn.Linear(width, patch ** dims * out_channels))
        xavier(self)
        for layer in self.time_embed[::2]:
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x, t, context=None, extra=None):
        """x (B,in_channels,*spatial), t (B,) in [0,1], context (B,M,context_dim), extra (B,extra_dim) -> (B,out,*spatial)."""
        assert all(s % self.patch == 0 for s in x.shape[2:]), f'size {tuple(x.shape[2:])} is not a multiple of {self.patch}'
        assert (context is None) == (self.context_dim is None), 'context and context_dim go together'
        with torch.autocast(x.device.type, enabled=False):                                      # what modulates stays in fp32
            c = wide(self.time_embed, time_embedding(1000 * t.float(), 256).to(torch.promote_types(self.embed.weight.dtype, torch.float32)))
            c = F.silu(c if self.extra_embed is None else c + wide(self.extra_embed, extra.to(c.dtype)))
            mods, last = [block.modulation(c) for block in self.blocks], wide(self.ada, c)[:, None].chunk(2, -1)
        grid = tuple(s // self.patch for s in x.shape[2:])
        place = positions(grid, self.width, x.device).to(c.dtype)
        return unpatchify(self.out(modulate(self.through(x, context, mods, grid, place), *last)), self.patch, grid)

    def through(self, x, context, mods, grid, place):
        """The tokens after all blocks."""
        h = self.embed(patchify(x, self.patch)) + place
        for block, mod in zip(self.blocks, mods):
            h = run_block(self, block, h, mod, context, *([grid] if self.mixer == 'mamba' else []))
        return h


class MMDiT(Tokens):
    """Two streams (Esser 2024): the patches of the noisy image, and those of the mask with the context's tokens behind them.

    Every channel of x behind the first out_channels is a mask; with present=True the last of all says whether the image has
    one (mask_condition): where it is 0, a learned token with the patch's position stands in for each of the mask's.
    No pool of the condition modulates, as text does there: where a mask lies is what matters, and each of its tokens is attended to.
    """

    def __init__(self, in_channels, out_channels, patch=4, width=384, depth=12, heads=6, context_dim=None, dims=2, extra_dim=0, present=False):
        super().__init__(out_channels, out_channels, patch, width, depth, heads, 'joint', context_dim, dims, extra_dim)
        masks = in_channels - out_channels - present
        assert masks or context_dim, 'MMDiT needs a mask channel or a context for its second stream'
        self.in_channels, self.channels = in_channels, (out_channels, masks, int(present))
        self.embed_mask = nn.Linear(patch ** dims * masks, width) if masks else None
        self.embed_context = nn.Linear(context_dim, width) if context_dim else None
        self.null = nn.Parameter(0.02 * torch.randn(width)) if present else None
        xavier(nn.ModuleList(m for m in (self.embed_mask, self.embed_context) if m is not None))

    def through(self, x, context, mods, grid, place):
        """The image tokens after all blocks; the second stream is left behind."""
        x, mask, present = x.split(self.channels, 1)
        h, second, count = self.embed(patchify(x, self.patch)) + place, [], None
        if self.embed_mask is not None:
            y = self.embed_mask(patchify(mask, self.patch))
            if self.null is not None:
                y = torch.where(present.flatten(1)[:, :1, None] > 0, y, self.null.to(y.dtype))
            second.append(y + place)
        if context is not None:
            second.append(self.embed_context(context))
            ones = lambda n: context.new_ones((len(context), n), dtype=torch.bool)              # padding is of the context alone
            count = torch.cat([ones(sum(s.shape[1] for s in second[:-1])), (context != 0).any(-1), ones(h.shape[1])], 1)[:, None, None]
        y = torch.cat(second, 1)
        for block, mod in zip(self.blocks, mods):
            h, y = run_block(self, block, h, y, mod, count)
        return h


SIZES = {'S': dict(width=384, depth=12, heads=6), 'B': dict(width=768, depth=12, heads=12),     # of DiT, Peebles 2022, table 1
         'L': dict(width=1024, depth=24, heads=16), 'XL': dict(width=1152, depth=28, heads=16)}


class TwoFour(nn.Module):
    """A weight whose forward value is 2:4 sparse: of every four weights along the reduction dimension the two largest stay.

    The gradient goes to all four as it is (straight through). dense = 1 switches it off: the dense tail of a training.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer('dense', torch.zeros(()))

    def mask(self, w):
        """1 where a weight stays; ties go to the earlier one. w (O,I) or (O,I,...), I a multiple of 4."""
        size = w.detach().abs().transpose(1, -1).unflatten(-1, (-1, 4))
        bigger = (size[..., None, :] > size[..., :, None]).sum(-1)                 # how many of the four are larger
        before = torch.ones(4, 4, device=w.device).tril(-1).bool()
        bigger = bigger + ((size[..., None, :] == size[..., :, None]) & before).sum(-1)
        return (bigger < 2).to(w.dtype).flatten(-2).transpose(1, -1)

    def forward(self, w):
        return w + (w * self.mask(w).maximum(self.dense.to(w.dtype)) - w).detach()


def sparsify(net):
    """Gives every linear and convolution whose rows are a multiple of 4 a 2:4 sparse weight (--sparse24). Returns net."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    fit = [m for m in layers if m.weight.shape[1] % 4 == 0]
    for m in fit:
        parametrize.register_parametrization(m, 'weight', TwoFour())
    print0(f'2:4 sparsity: {len(fit)} of {len(layers)} linears and convolutions, skipped {len(layers) - len(fit)}: rows not a multiple of 4; trained as dense products of masked weights')
    return net


def sparse_layers(net):
    """(dense weight, its TwoFour) of each sparse layer."""
    return [(m.parametrizations.weight.original, m.parametrizations.weight[0]) for m in net.modules() if parametrize.is_parametrized(m, 'weight')]


def build_net(args, in_channels, out_channels, extra_dim=0):
    """The network that the flags (or a stored run's) describe."""
    context_dim, dims = TOKEN if args.controllable else None, 3 if args.volume else 2
    sizes = dict(patch=args.patch, width=args.width, depth=args.depth, heads=args.heads, dims=dims)
    if args.model == 'unet':
        net = UNet(in_channels, out_channels, tuple(args.channels), tuple(args.attention), args.layers, args.head_channels, context_dim,
                   dims, extra_dim, args.norm_groups, bool(args.crop), **MAISI.get(args.maisi, {}), turned=bool(args.maisi))
    elif args.model == 'mmdit':
        net = MMDiT(in_channels, out_channels, **sizes, context_dim=context_dim, extra_dim=extra_dim, present=args.p_uncond > 0 and in_channels > out_channels)
    else:
        net = Tokens(in_channels, out_channels, **sizes, mixer='mamba' if args.model == 'mamba' else 'attention', context_dim=context_dim, extra_dim=extra_dim)
    net.checkpointing = args.checkpointing
    return sparsify(net) if args.sparse24 else net


def channels_last(net):
    """net in the memory layout in which its convolutions are faster. MAISI's U-Net, which is told spacings in the hundreds, stays as it is on the
    CPU: torch's group norm in channels_last takes the variance as E[x^2] - E[x]^2 there, wrong by 2e-2 where a mean is 100 times the spread."""
    if getattr(net, 'turned', False) and next(net.parameters()).device.type == 'cpu':
        return net
    deep = any(isinstance(m, nn.Conv3d) for m in net.modules())
    return net.to(memory_format=torch.channels_last_3d if deep else torch.channels_last)


def channel_sets(net):
    """Which channels of a U-Net go together: the length of each set, and of each layer the sets that it reads and writes (None: all of these
    stay). A sum ties what it adds up, a skip is read twice, queries go with their keys, GEGLU's values with their gates."""
    lengths, layers = [], []

    def new(n):
        lengths.append(n)
        return [len(lengths) - 1]

    def res(m, x):
        inside, own = new(m.conv1.out_channels), isinstance(m.skip, nn.Identity)
        out = x if own else new(m.conv2.out_channels)
        layers.extend([(m.norm1, None, x), (m.conv1, x, inside), (m.time, None, inside), (m.norm2, None, inside), (m.conv2, inside, out)])
        layers.extend([] if own else [(m.skip, x, out)])
        return out

    def heads(m, x, context=False):
        n = (m.q if context else m.qkv).in_features
        qk, v = new(n), x if isinstance(m.out, nn.Identity) else new(n)
        layers.extend([(m.q, x, qk), (m.kv, None, qk + v)] if context else [(m.qkv, x, qk + qk + v)])
        layers.extend([] if v is x else [(m.out, v, x)])

    def attend(m, x):
        layers.append((m.norm, None, x))
        if isinstance(m, SpatialAttention):
            return heads(m.attn, x)
        p, f = new(m.proj_in.out_channels), new(m.ff2.in_features)
        heads(m.attn1, p)
        heads(m.attn2, p, context=True)
        layers.extend([(m.proj_in, x, p), *((norm, None, p) for norm in (m.norm1, m.norm2, m.norm3)), (m.ff1, p, f + f), (m.ff2, f, p), (m.proj_out, p, x)])

    def level(block, x, skips=None, keep=None):
        """A level as UNet.forward walks it: the sets that come out."""
        for i, m in enumerate(block.resnets):
            x = res(m, x if skips is None else x + skips.pop())
            if len(block.attentions):
                attend(block.attentions[i], x)
            if keep is not None:
                keep.append(x)
        if 'resample' in block:
            m = block['resample']
            if isinstance(m, ResBlock):
                x = res(m, x)
            else:
                m = m.conv if isinstance(m, Upsample) else m
                layers.append((m, x, new(m.out_channels)))
                x = layers[-1][2]
            if keep is not None:
                keep.append(x)
        return x

    x = new(net.conv_in.out_channels)
    layers.append((net.conv_in, None, x))
    skips = [x]
    for block in net.down_blocks:
        x = level(block, x, keep=skips)
    x = res(net.middle_block.resnet_1, x)
    attend(net.middle_block.attention, x)
    x = res(net.middle_block.resnet_2, x)
    for block in net.up_blocks:
        x = level(block, x, skips)
    return lengths, layers + [(net.out[0], None, x), (net.out[2], x, None)]


def resize(layer, weight, bias):
    """Gives a layer these parameters, of other widths than it had."""
    layer.weight, layer.bias = nn.Parameter(weight), None if layer.bias is None else nn.Parameter(bias)
    if isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.out_channels, layer.in_channels = weight.shape[:2]


@torch.no_grad()
def prune_channels(net, score, share):
    """Takes the same share of every set of channels out of a U-Net, in place: those with the smallest mean score over all that hangs on them.

    The share is rounded, by 0.1 at most, to what leaves every norm group and every head as many: with groups of 4, 8 and 12 to quarters. A group's
    statistics are then of what is left of it; a head's products keep their scale. Returns how many stay of how many.
    """
    lengths, layers = channel_sets(net)
    attentions = [m for m in net.modules() if isinstance(m, Attention)]
    queries = [(m.qkv, 3) if hasattr(m, 'qkv') else (m.q, 1) for m in attentions]
    part = math.gcd(*(m.num_channels // m.num_groups for m, *_ in layers if isinstance(m, nn.GroupNorm)),
                    *(q.in_features // m.heads for m, (q, _) in zip(attentions, queries)))
    k = part - round(share * part)
    if not 0 < k < part or abs(1 - k / part - share) > 0.1:
        fail(f'--prune {share:g}: channels go in equal shares of every norm group and head, here {part} wide; '
             + (f'give a multiple of {1 / part:.3g}' if part > 1 else 'use --prune-how weights'))
    total, count = [torch.zeros(n) for n in lengths], [0] * len(lengths)
    for m, reads, writes in layers:
        for p, dim, sets in ((m.weight, 0, writes), (m.weight, 1, reads), (m.bias, 0, writes)):
            if p is not None and sets:
                rows = score(p).transpose(0, dim).reshape(p.shape[dim], -1).cpu()
                for s, own in zip(sets, rows.split([lengths[s] for s in sets])):
                    total[s], count[s] = total[s] + own.sum(1), count[s] + own.shape[1]
    keep = [(t / c).view(-1, part).topk(k).indices.sort().values.add(torch.arange(0, len(t), part)[:, None]).flatten() for t, c in zip(total, count)]
    at = lambda sets: torch.cat([keep[s] + sum(lengths[r] for r in sets[:i]) for i, s in enumerate(sets)]).to(net.conv_in.weight.device)
    for m, reads, writes in layers:
        weight, bias = m.weight.detach(), m.bias
        weight = weight.index_select(1, at(reads)) if reads else weight
        if writes:
            weight, bias = weight[at(writes)], None if bias is None else bias.detach()[at(writes)]
        resize(m, weight, bias)
    for q, n in queries:
        for p in (q.weight, q.bias) if q.bias is not None else (q.weight,):
            p[:len(p) // n] *= (k / part) ** 0.5
    return k, part


def fit_pruned(net, weights, path):
    """Narrows the layers of a new network to those of a pruned one's weights, so that they can be loaded. Of path, which is named where they cannot."""
    narrower = [n for n, m in net.named_modules() if isinstance(m, GroupNorm) and len(weights.get(f'{n}.weight', m.weight)) < len(m.weight)]
    if narrower and 'out.0' not in narrower:
        fail(f'{path}: was pruned inside its residual blocks alone, by an older version; prune its --init again')
    for name, m in net.named_modules():
        w = weights.get(f'{name}.weight')
        if w is None or w.ndim != m.weight.ndim:
            continue
        shape = w.shape[:1] + m.weight.shape[1:] if name == 'conv_in' else w.shape                   # its input may get more channels: load_init
        if shape != m.weight.shape:
            resize(m, m.weight.new_empty(shape), m.weight.new_empty(shape[:1]))


def prunable(net):
    """The linears and convolutions whose single weights may go: all but what reads the input and what writes the output."""
    ends = {'conv_in', 'embed', 'embed_mask', 'embed_context', 'extra_embed', 'out', 'out.2'}
    return [m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)) and not {n, n.split('.')[0]} & ends]


def prune(net, process, args, x_0, mask=None, context=None, extra=None):
    """Drops a share --prune of the weights, or of the channels, that matter least, in place. What follows trains the rest on.

    magnitude: |w|. taylor: |w dL/dw|, the loss summed over 20 times with one noise, without those whose loss is below 5 % of the largest
    (Fang 2023, Diff-Pruning, 2305.10924, eq. 8; as a mask, since the loss of v is large at both ends). weights: the smallest become
    zero. channels: see prune_channels.
    """
    if args.prune_by == 'taylor':
        noise, ts = torch.randn(x_0.shape, generator=generator('prune')).to(x_0.device), process.times(min(20, args.steps or 20))[:-1].to(x_0.device)
        loss = lambda t: process.loss(net, x_0, noise, t.expand(len(x_0)), mask, context, extra)[0].mean()
        with torch.no_grad():
            levels = torch.stack([loss(t) for t in ts])
        for t in ts[levels > 0.05 * levels.max()]:
            loss(t).backward()
    with torch.no_grad():
        score = lambda p: (p * p.grad if args.prune_by == 'taylor' else p).abs()
        total, dropped = sum(p.numel() for p in net.parameters()), 0
        if args.prune_how == 'weights':
            layers = prunable(net)
            cut = torch.cat([score(m.weight).flatten() for m in layers]).kthvalue(max(1, round(args.prune * sum(m.weight.numel() for m in layers)))).values
            for m in layers:
                m.weight *= score(m.weight) > cut
                dropped += int((m.weight == 0).sum())
            how = 'set to zero'
        else:
            kept, of = prune_channels(net, score, args.prune)
            how = f'removed: {of - kept} of every {of} channels'
            dropped = total - sum(p.numel() for p in net.parameters())
    net.zero_grad(set_to_none=True)
    for p in net.parameters() if world() > 1 else ():                                 # gradients may differ in their last bits
        dist.broadcast(p.data, 0)
    print0(f'pruned: {dropped} of {total} parameters ({dropped / total:.1%}) by {args.prune_by}, {how}')


# ---------------------------------------------------------------------------------------------------------------------
# 5  Processes
# ---------------------------------------------------------------------------------------------------------------------
# x_t = alpha(t) x_0 + sigma(t) eps, t=0 data, t=1 noise. All of a process is in alpha, sigma and log_snr; where it acts (pixels,
# Haar bands, latents) is in its Space.


class Space(nn.Module):
    """Where a process acts: x_0 = encode(image), image = decode(x_0), and a mask as channels on the grid of x_0.

    about: none for pixels, where nothing is done (channels: of an image, 2 with --dual). For Haar bands: shift and scale (C,), each band's mean and standard deviation
    over the training slices, so that every band has the same SNR at a time t. For latents (always the posterior's mean) the same of
    each channel, and args, weights, hash of the autoencoder: a run stores all of it and needs no other file. depth: slices of a
    volume (--volume); images and masks are then (B,1,D,S,S), factors (z, y, x).
    """

    def __init__(self, about=None, depth=None, channels=1):
        super().__init__()
        self.dims, self.depth = 3 if depth else 2, (depth,) if depth else ()
        self.about, self.channels, self.factor, self.autoencoder = about, channels, (1,) * self.dims, None
        if about and 'weights' in about:
            self.autoencoder, self.factor = build_autoencoder(argparse.Namespace(**about['args']))
            self.autoencoder.load_state_dict(about['weights'])
        elif about:
            self.factor = (2,) * self.dims
        if about:
            self.channels = len(about['scale'])
            self.register_buffer('shift', about['shift'].float().view(-1, *(1,) * self.dims))
            self.register_buffer('scale', about['scale'].float().view(-1, *(1,) * self.dims))
        self.eval().requires_grad_(False)

    @property
    def name(self):
        return 'pixels' if not self.about else 'latents' if self.autoencoder else 'bands'

    def shape(self, size):
        """Of x_0 for images of size x size."""
        return self.channels, *(n // f for n, f in zip((*self.depth, size, size), self.factor))

    def transform(self, images):
        """x_0 before shift and scale."""
        return haar(images) if self.autoencoder is None else self.autoencoder.encode(images)[0]

    def encode(self, images):
        """images (B,1,S,S), of a pair (B,2,S,S), in [-1,1] -> x_0 (B,channels,S/factor,S/factor)."""
        return (self.transform(images) - self.shift) / self.scale if self.about else images

    def decode(self, x_0):
        """x_0 (B,channels,S/factor,S/factor) -> images (B,1,S,S), not bounded."""
        if not self.about:
            return x_0
        x_0 = x_0 * self.scale + self.shift
        return inverse_haar(x_0) if self.autoencoder is None else self.autoencoder.decode(x_0)

    def condition(self, mask):
        """Mask channels (B,M,S,S) on the grid of x_0. Every pixel of the mask stays (space_to_depth), so no lesion can fall between the
        grid's points; mask-present, the same everywhere, stays one channel."""
        if not self.about or mask is None:
            return mask
        coarse = (slice(None), slice(1, None), *(slice(None, None, f) for f in self.factor))
        return torch.cat([space_to_depth(mask[:, :1], self.factor), mask[coarse]], 1)

    def in_channels(self, mask_channels):
        """Of the network: x_0, and `mask_channels` (0, 1 or 2) as condition() lays them out."""
        return self.channels + (math.prod(self.factor) + mask_channels - 1 if mask_channels else 0)


def like(value, x):
    """A per-image value (B,) or number, shaped to multiply x (B,C,...)."""
    return value.reshape(-1, *(1,) * (x.ndim - 1)) if torch.is_tensor(value) else value


def quantile(density, u, centre, width):
    """log-SNR at quantile 1 - u of a Laplace or Cauchy density (Hang 2024, table 1): falls as u, the share of noise, rises."""
    if density == 'laplace':
        return centre - width * torch.sign(0.5 - u) * torch.log1p(-2 * (u - 0.5).abs())
    return centre + width * torch.tan(math.pi / 2 * (1 - 2 * u))


class Process:
    """What DDPM and RFlow share. steps: the time grid {1..steps}/steps of the training (0: continuous)."""

    range = (-1.0, 1.0)                         # of x_0 inside the process; (0, 1) for networks from elsewhere (--init-range)
    density, centre, width, mix = 'uniform', 0.0, 1.0, 0.0     # of training times: see draw_t
    shift = 1.0                                 # for the sampling times (times, shift A) of a network trained with --progressive
    space = Space()                             # pixels

    def to_range(self, x):
        """From images in [-1, 1] to x_0: into the process's space and range."""
        x = self.space.encode(x)
        return self.range[0] + (x + 1) * ((self.range[1] - self.range[0]) / 2) if self.range != (-1.0, 1.0) else x

    def from_range(self, x):
        """The inverse of to_range: from x_0 to images, about [-1, 1]."""
        return self.space.decode((x - self.range[0]) * (2 / (self.range[1] - self.range[0])) - 1 if self.range != (-1.0, 1.0) else x)

    def draw_t(self, n, g, window=(0.0, 1.0), shift=1.0):
        """n training times in (0, 1], on the grid if there is one.

        density: uniform in t, inside the window (a, b] | logit-normal: t = sigmoid(N(0,1)) (Esser 2024, eq. 19) | laplace, cauchy: of
        log-SNR, by centre and width (Hang 2024, 2407.03297), of which a share `mix` is uniform over log-SNR -10 to 10 instead: the
        densities alone leave fine texture, at high log-SNR, untrained. shift A: the same for an image of A times the side.
        """
        if self.density == 'logit-normal':
            t = torch.randn(n, generator=g).sigmoid()
        elif self.density == 'uniform':
            t = window[0] + (window[1] - window[0]) * (1 - torch.rand(n, generator=g))
        else:
            u, v, even = torch.rand(3, n, generator=g, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            t = self.time_of(torch.where(even < self.mix, 20 * v - 10, quantile(self.density, u, self.centre, self.width)).clamp(-15, 15)).float()
        t = self.shifted(t, shift)
        return torch.ceil(t * self.steps).clamp(1, self.steps) / self.steps if self.steps else t

    def shifted(self, t, a):
        """t of the noise that an image of a times the side needs for the same difficulty: log-SNR - 2 log a (Hoogeboom 2023, eq. 9)."""
        return t if a == 1 else self.time_of(self.log_snr(t, torch.float64) - 2 * math.log(a)).to(t.dtype)

    def times(self, n, grid='time', shift=1.0, own=False):
        """n+1 decreasing solver times from 1 to 0, on the grid that the network was trained on.

        grid: time (equal steps of t) | log-snr (equal steps of log-SNR from near 1 to the first trained time, then 0).
        shift A: t -> A t / (1 + (A - 1) t) (Esser 2024, eq. 23); A < 1 takes large steps early and small ones at the end. own: on top of it
        the process's shift, as its training had it (shifted).
        maisi: equal steps of t, shifted, 1000 t rounded to half precision: the times of MAISI's scheduler, for sample_maisi.
        """
        if self.steps and n > self.steps:
            fail(f'--steps {n}: this run was trained on a grid of {self.steps} times; use at most {self.steps}')
        ts = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        if grid == 'log-snr':
            ends = self.log_snr(torch.tensor([0.999, 1 / (self.steps or 1000)], dtype=torch.float64), torch.float64)
            ts[:-1] = self.time_of(torch.linspace(float(ends[0]), float(ends[1]), n, dtype=torch.float64))
            ts[0] = 1
        ts = shift * ts / (1 + (shift - 1) * ts)
        if own and self.shift != 1:
            ts[1:-1] = self.shifted(ts[1:-1], self.shift)
        if grid == 'maisi':
            return ((1000 * ts).half().double() / 1000).float()
        if not self.steps:
            return ts.float()
        k = torch.round(ts * self.steps).long().tolist()
        for i in range(1, n):                                    # two times that meet on one grid point move apart
            k[i] = min(k[i], k[i - 1] - 1)
        for i in reversed(range(1, n)):
            k[i] = max(k[i], k[i + 1] + 1)
        return (torch.tensor(k, dtype=torch.float64) / self.steps).float()

    def target_of(self, x_0, eps, t):
        """What the network is asked for."""
        a, s = like(self.alpha(t), x_0), like(self.sigma(t), x_0)
        return {'eps': eps, 'x0': x_0, 'v': self.v_of(x_0, eps, a, s)}[self.target]

    def min_snr(self, t, gamma):
        """Loss weight of Min-SNR-gamma (Hang 2023): min(SNR, gamma) on the x_0 error, whatever the target.

        In each target's own space, with SNR = 0 and infinity safe: eps min(1, gamma/SNR), x0 min(SNR, gamma),
        v of DDPM min(SNR, gamma)/(SNR + 1), v of RFlow min((1-t)^2, gamma t^2).
        """
        if self.target == 'eps':
            return (gamma * torch.exp(-self.log_snr(t))).clamp(max=1)
        if self.target == 'x0':
            return torch.exp(self.log_snr(t)).clamp(max=gamma)
        return torch.minimum(self.alpha(t) ** 2, gamma * self.sigma(t) ** 2)      # = min(SNR, gamma) sigma^2

    def loss(self, net, x_0, eps, t, mask=None, context=None, extra=None, min_snr=0.0):
        """Weighted loss of each image (B,), plain squared error and x0_hat (B,C,...), for noise eps at times t (B,). mask in pixels,
        x_0 in the process's space."""
        a, s = like(self.alpha(t), x_0), like(self.sigma(t), x_0)
        x_t, mask = a * x_0 + s * eps, self.space.condition(mask)
        out = net(x_t if mask is None else torch.cat([x_t, mask], 1), self.net_time(t), context, extra).float()
        square = (out - self.target_of(x_0, eps, t)).square()
        error = square.flatten(1).mean(1)
        return error * self.min_snr(t, min_snr) if min_snr else error, square, self.split(out, x_t, a, s)[0]


class DDPM(Process):
    """Variance preserving, alpha^2 + sigma^2 = 1, on `steps` times t = k/steps (Ho 2020; cosine: Nichol 2021).

    target: eps | v = alpha eps - sigma x_0 (Salimans 2022) | x0. The network is fed (k-1)/steps, so that with 1000 steps
    its embedding sees the integers 0..999 that published DDPM checkpoints were trained on.
    """

    def __init__(self, steps=1000, schedule='linear', target='eps'):
        self.steps, self.schedule, self.target = steps, schedule, target
        k = torch.arange(steps, dtype=torch.float64)
        if schedule == 'linear':
            beta = torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64) * 1000 / steps
        elif schedule == 'maisi':                               # linear in its root (Rombach 2022)
            beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, steps, dtype=torch.float64) ** 2
        else:
            f = lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f((k + 1) / steps) / f(k / steps)
        alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), 0)
        self.table = torch.log(alpha_bar) - torch.log1p(-alpha_bar)                    # log-SNR at t = 1/steps ... 1, fp64

    def log_snr(self, t, dtype=torch.float32):
        """Linear between grid times; below the first one sigma/alpha falls linearly to 0 at t=0 (infinite log-SNR)."""
        t = torch.as_tensor(t).double()
        table, k = self.table.to(t.device), t * self.steps
        k = torch.where((k - k.round()).abs() < 1e-3, k.round(), k)                   # t is rounded, the grid is not
        low = (k.floor().long() - 1).clamp(0, self.steps - 1)
        high = (low + 1).clamp(max=self.steps - 1)
        inside = table[low] + (k - 1 - low).clamp(0, 1) * (table[high] - table[low])
        return torch.where(k < 1, table[0] - 2 * torch.log(k.clamp(min=0)), inside).to(dtype)

    def time_of(self, log_snr):
        """The inverse of log_snr, in fp64."""
        L, table = torch.as_tensor(log_snr).double(), self.table.to(log_snr.device)
        high = torch.searchsorted(-table, -L).clamp(1, self.steps - 1)                # table[high - 1] >= L > table[high]
        inside = high + (table[high - 1] - L) / (table[high - 1] - table[high])
        return torch.where(L > table[0], torch.exp((table[0] - L) / 2), inside).clamp(max=self.steps) / self.steps

    def alpha(self, t):
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t):
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def net_time(self, t):
        return t - 1 / self.steps

    def v_of(self, x_0, eps, a, s):
        return a * eps - s * x_0

    def split(self, out, x_t, a, s):
        """The network's output as x0_hat, eps_hat."""
        if self.target == 'eps':
            return (x_t - s * out) / a, out
        if self.target == 'x0':
            return out, (x_t - a * out) / s
        return a * x_t - s * out, s * x_t + a * out


class RFlow(Process):
    """Rectified flow (Liu 2022): alpha = 1 - t, sigma = t, the network predicts v = eps - x_0 and is fed t.

    steps = N trains on t in {1..N}/N, pure noise (t=1) included; 0 is continuous.
    """

    target = 'v'

    def __init__(self, steps=0):
        self.steps = steps

    def alpha(self, t):
        return 1 - torch.as_tensor(t, dtype=torch.float32)

    def sigma(self, t):
        return torch.as_tensor(t, dtype=torch.float32)

    def log_snr(self, t, dtype=torch.float32):
        t = torch.as_tensor(t).double()
        return (2 * (torch.log1p(-t) - torch.log(t))).to(dtype)

    def time_of(self, log_snr):
        """The inverse of log_snr, in fp64."""
        return torch.sigmoid(-torch.as_tensor(log_snr).double() / 2)

    def shifted(self, t, a):
        return a * t / (1 + (a - 1) * t)

    def net_time(self, t):
        return t

    def v_of(self, x_0, eps, a, s):
        return eps - x_0

    def split(self, out, x_t, a, s):
        return x_t - s * out, x_t + a * out


WIDTHS = {'laplace': 0.5, 'cauchy': 1.0}                # densities of log-SNR for --schedule: their usual width


def build_process(args):
    """The process that the flags (or a stored run's) describe, in pixels; whoever trains or loads gives it its space."""
    density = args.schedule in WIDTHS and args.schedule
    process = RFlow(args.steps) if args.rflow else DDPM(args.steps, 'cosine' if density else args.schedule, args.target)
    process.range, process.space = tuple(args.init_range or (-1.0, 1.0)), Space(depth=args.volume)
    process.density = 'logit-normal' if args.logit_normal else density or 'uniform'
    if density:
        process.centre, process.width, process.mix = args.schedule_centre, args.schedule_width, args.uniform_mix
    if args.progressive:
        process.shift = args.progressive[-1] / args.progressive[0]
    if args.maisi == 'rflow':                                   # by the side of a cube of so many latents, in units of 32
        process.shift = (args.volume * args.size ** 2 / 4 ** 3) ** (1 / 3) / 32
    return process


def mask_condition(mask, p_uncond, present=None, near=None):
    """The mask channels of a network. Trained with --p-uncond it has one more, mask-present: an empty mask is a condition
    ("no tumour"), so what says "no condition" is that channel, 0 with an empty mask where `present` (B,) is False.
    near (B,K,S,S): behind them the slices below (train_bravo.py --neighbours), 0 where there is none."""
    if p_uncond:
        here = torch.ones_like(mask) if present is None else like(present.to(mask), mask).expand_as(mask)
        mask = torch.cat([mask * here, here], 1)
    return mask if near is None else torch.cat([mask, near.to(mask)], 1)


class Guidance:
    """What make_denoise needs for classifier-free guidance: weight, interval (t in it is guided), rescale, null conditions."""

    def __init__(self, weight=1.0, interval=(0.0, 1.0), rescale=0.0, mask=None, context=None):
        self.weight, self.interval, self.rescale, self.mask, self.context = weight, interval, rescale, mask, context

    def at(self, t):
        """Which of the times t are guided: interval (a, b] as in Kynkaanniemi 2024."""
        t = torch.as_tensor(t)
        return (self.interval[0] < t) & (t <= self.interval[1]) & (self.weight != 1)

    def __call__(self, conditional, null):
        """x_0 + (W - 1) (x_0 - x_0 null) (Ho 2022; W=1 is none), its spread moved back towards x_0's (Lin 2023, eq. 15-16), and its mean
        with it: theirs is about 0, but most of an image is background at -1, which a factor about 0 would make grey."""
        x_0 = null + self.weight * (conditional - null)
        if self.rescale:
            mean, spread = (lambda v: like(v.flatten(1).mean(1), v)), (lambda v: like(v.flatten(1).std(1), v))
            there = mean(conditional) + (x_0 - mean(x_0)) * spread(conditional) / spread(x_0)
            x_0 = self.rescale * there + (1 - self.rescale) * x_0
        return x_0


def make_denoise(net, process, mask=None, context=None, extra=None, dtype='fp32', clip=False, guidance=None):
    """denoise(x_t, t) -> x0_hat, eps_hat, in fp32: the one door between a network and a sampler.

    mask (B,M,H,W) in pixels, context (B,N,D) and extra (B,E) are the conditions of the B images. guidance mixes in x_0 space a second
    forward, of the null conditions. clip bounds x0_hat to the data's range (in pixels only). Both move eps_hat along, so that
    alpha x0_hat + sigma eps_hat = x_t still holds. t: a number, or one for each image (B,), on the CPU.
    """

    def forward(x_t, t, mask, context):
        mask = process.space.condition(mask)
        with autocast(x_t.device, dtype):
            return net(x_t if mask is None else torch.cat([x_t, mask], 1), process.net_time(t), context, extra).float()

    def denoise(x_t, t):
        """x_t (B,C,...), t a number or (B,) -> x0_hat, eps_hat of x_t's shape."""
        at = guidance.at(t) if guidance else torch.tensor(False)
        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
        a, s = like(process.alpha(t), x_t), like(process.sigma(t), x_t)
        x_0, eps = process.split(forward(x_t, t, mask, context), x_t, a, s)
        if at.any():
            guided = guidance(x_0, process.split(forward(x_t, t, guidance.mask, guidance.context), x_t, a, s)[0])
            x_0 = guided if at.all() else torch.where(like(at.to(x_t.device), x_t), guided, x_0)
        if clip:                                             # a gradient (draft.py) passes as if it were not
            x_0 = x_0 + (x_0.clamp(*process.range) - x_0).detach() if x_0.requires_grad else x_0.clamp(*process.range)
        if at.any() or clip:
            eps = (x_t - a * x_0) / s
        return x_0, eps

    return denoise


# ---------------------------------------------------------------------------------------------------------------------
# 6  Samplers
# ---------------------------------------------------------------------------------------------------------------------
# sample_NAME(denoise, x, ts, process, noise, callback): x (B,C,...) is the state at ts[0], ts decreases to ts[-1] = 0; noise()
# gives fresh eps like x; callback(i, t, x_t, x0_hat) before each step. Gradients flow: the caller says no_grad.
# Every Gaussian process obeys dx = x0_hat d(alpha) + eps_hat d(sigma), so one formula serves DDPM and RFlow.


def sample_ddim(denoise, x, ts, process, noise=None, callback=None, eta=0.0):
    """DDIM (Song 2021, eq. 12 and 16), for any alpha and sigma; eta=0 is deterministic, eta=1 is ancestral. NFE = N."""
    for i, (t, u) in enumerate(zip(ts[:-1], ts[1:])):
        x_0, eps = denoise(x, t)
        if callback:
            callback(i, float(t), x, x_0)
        a, s, a_u, s_u = process.alpha(t), process.sigma(t), process.alpha(u), process.sigma(u)
        # variance of q(x_u | x_t, x_0): s_u^2 (1 - SNR_t / SNR_u), in fp64 because neighbouring SNRs cancel in fp32
        fall = process.log_snr(t, torch.float64) - process.log_snr(u, torch.float64)
        up = eta * s_u * (-torch.expm1(fall)).sqrt().float() if eta else torch.zeros(())
        x = a_u * x_0 + (s_u ** 2 - up ** 2).clamp(min=0).sqrt() * eps
        if eta and s_u > 0:
            x = x + up * noise()
    return x


def sample_ddpm(denoise, x, ts, process, noise=None, callback=None):
    """Ancestral sampling with the posterior's variance (Ho 2020, eq. 6-7), on any subset of the times. NFE = N."""
    return sample_ddim(denoise, x, ts, process, noise, callback, eta=1.0)


def sample_euler(denoise, x, ts, process, noise=None, callback=None):
    """Euler on dx = x0_hat d(alpha) + eps_hat d(sigma). For RFlow x += (u - t) v; for DDPM it is DDIM. NFE = N."""
    return sample_ddim(denoise, x, ts, process, noise, callback)


def sample_maisi(denoise, x, ts, process, noise=None, callback=None):
    """Euler as MAISI's RFlowScheduler takes it: a step goes from t to the whole thousandth at or below the next time, while the network is then
    told that time itself. The steps add up to as much as 1.01. For images as the published weights' own code makes them."""
    for i, (t, u) in enumerate(zip(ts[:-1].tolist(), ts[1:].tolist())):
        x_0, eps = denoise(x, t)
        if callback:
            callback(i, t, x, x_0)
        x = x + (math.floor(1000 * u + 1e-4) / 1000 - t) * (eps - x_0)
    return x


def sample_heun(denoise, x, ts, process, noise=None, callback=None):
    """Trapezoid rule on the same equation, second order; the last step is Euler (no network at t=0). NFE = 2N - 1."""
    for i, (t, u) in enumerate(zip(ts[:-1], ts[1:])):
        x_0, eps = denoise(x, t)
        if callback:
            callback(i, float(t), x, x_0)
        da, ds = process.alpha(u) - process.alpha(t), process.sigma(u) - process.sigma(t)
        slope = da * x_0 + ds * eps
        if u > 0:
            x_0, eps = denoise(x + slope, u)
            slope = (slope + da * x_0 + ds * eps) / 2
        x = x + slope
    return x


def sample_dpmpp(denoise, x, ts, process, noise=None, callback=None, sde=False):
    """DPM-Solver++(2M) (Lu 2022, 2211.01095, algorithm 2): second order from the step before. NFE = N.

    Written with x - alpha x0_hat for sigma eps_hat, it needs no log-SNR but in the ratio of two steps. That ratio is 0 after
    t=1, where RFlow's log-SNR is -inf; the last step, to sigma=0, is first order. sde: the same for its SDE (appendix B).
    """
    half = lambda t: float(process.log_snr(t, torch.float64)) / 2
    before = None
    for i, (t, u) in enumerate(zip(ts[:-1], ts[1:])):
        x_0, _ = denoise(x, t)
        if callback:
            callback(i, float(t), x, x_0)
        a, s, a_u, s_u, h = process.alpha(t), process.sigma(t), process.alpha(u), process.sigma(u), half(u) - half(t)
        D = x_0 + (x_0 - before[0]) * (h / before[1] / 2) if before and u > 0 else x_0
        if sde:
            fade = math.exp(-h)
            x = s_u / s * fade * x + a_u * -math.expm1(-2 * h) * D
            if u > 0:
                x = x + s_u * math.sqrt(-math.expm1(-2 * h)) * noise()
        else:
            x = a_u * D + s_u / s * (x - a * D)
        before = x_0, h
    return x


def sample_dpmpp_sde(denoise, x, ts, process, noise=None, callback=None):
    """DPM-Solver++(2M) for the SDE: fresh noise every step. NFE = N."""
    return sample_dpmpp(denoise, x, ts, process, noise, callback, sde=True)


def between(t, u, process):
    """The time half way in log-SNR, which need not be on the training grid; None next to an infinite log-SNR."""
    ends = process.log_snr(torch.stack([torch.as_tensor(t), torch.as_tensor(u)]), torch.float64)
    return process.time_of(ends.mean()).float() if ends.isfinite().all() else None


def sample_dpmpp_2s(denoise, x, ts, process, noise=None, callback=None):
    """DPM-Solver++(2S) (Lu 2022, algorithm 1, r = 1/2): a first-order step to the middle, whose x0_hat makes the whole step.

    The middles lie off the training grid. First order where a log-SNR is infinite: to t=0, and from RFlow's t=1.
    """
    for i, (t, u) in enumerate(zip(ts[:-1], ts[1:])):
        x_0, _ = denoise(x, t)
        if callback:
            callback(i, float(t), x, x_0)
        a, s, m = process.alpha(t), process.sigma(t), between(t, u, process)
        if m is not None:
            D, _ = denoise(process.alpha(m) * x_0 + process.sigma(m) / s * (x - a * x_0), m)
        x_0 = x_0 if m is None else D
        x = process.alpha(u) * x_0 + process.sigma(u) / s * (x - a * x_0)
    return x


PAIRS = {'bs23': 3, 'heun-euler': 2}           # order of the result; both estimate the error with one order less


def embedded_step(slope, x, t, h, k1, pair):
    """One step from t (B,) down by h (B,) of an embedded pair, k1 being the slope at its start: the result, that of one order less, and the slope
    at the end (none: heun-euler does not know it)."""
    H = -like(h.to(x), x)                                                                    # time runs down
    if pair == 'heun-euler':
        coarse = x + H * k1
        return x + H * (k1 + slope(coarse, t - h)) / 2, coarse, None
    k2 = slope(x + H * k1 / 2, t - h / 2)
    k3 = slope(x + H * k2 * 3 / 4, t - h * 3 / 4)
    new = x + H * (2 * k1 + 3 * k2 + 4 * k3) / 9
    k4 = slope(new, t - h)
    return new, x + H * (7 / 24 * k1 + k2 / 4 + k3 / 3 + k4 / 8), k4


def sample_adaptive(denoise, x, ts, process, noise=None, callback=None, tol=0.01, pair='bs23', trace=None):
    """RFlow's dx/dt = eps_hat - x0_hat from ts[0] to 0, with a step size that follows the error, each image its own.

    Pairs: Bogacki-Shampine 3(2), whose last slope is the next first one (1 + 3 forwards a step), or Heun-Euler (2 a step). Error:
    RMS over the image of the difference over tol (1 + |x|); PI controller with factors (0.4, 0.3) (Hairer, Solving ODEs I, II.4).
    The times are off the training grid, but not below its first, from where the slope already there leads straight to 0.
    trace: a list that gets (t, h, accepted), each (B,), of every step; h is 0 for an image that has arrived.
    """
    low, order = 1 / (process.steps or 1000), PAIRS[pair]

    def slope(x, t):
        x_0, eps = denoise(x, t)
        return eps - x_0

    t, i = torch.full((len(x),), float(ts[0]), dtype=torch.float64), 0
    h, last, refused = torch.full_like(t, 0.05), torch.ones_like(t), torch.zeros_like(t, dtype=torch.bool)
    k1 = slope(x, t)
    while (t > low).any():
        if callback:
            callback(i, t.clone(), x, x - like(t.to(x), x) * k1)                             # x0_hat = x_t - t v
        h = torch.minimum(h, t - low)
        new, coarse, k4 = embedded_step(slope, x, t, h, k1, pair)
        scale = tol * (1 + torch.maximum(x.abs(), new.abs()))
        error = ((new - coarse) / scale).flatten(1).square().mean(1).sqrt().double().cpu().clamp(min=1e-10)
        good = (error <= 1) & (t > low)
        if trace is not None:
            trace.append((t.clone(), h.clone(), good))
        grow = (0.9 * error ** (-0.7 / order) * last ** (0.4 / order)).clamp(0.2, 10)
        grow = torch.where(good, torch.where(refused, grow.clamp(max=1), grow), grow.clamp(max=0.9))
        take = like(good.to(x.device), x)
        x, t, last = torch.where(take, new, x), torch.where(good, (t - h).clamp(min=low), t), torch.where(good, error, last)
        h, refused, i = h * grow, ~good, i + 1
        if not (h[t > low] > 1e-5).all():
            fail(f'--tol {tol:g}: the step size fell to nothing; the network\'s own noise is larger than that, use a larger one', 1)
        if k4 is not None:
            k1 = torch.where(take, k4, k1)
        elif good.any():
            k1 = slope(x, t)
    return x - low * k1


SAMPLERS = {'ddpm': sample_ddpm, 'ddim': sample_ddim, 'euler': sample_euler, 'maisi': sample_maisi, 'heun': sample_heun, 'dpm++': sample_dpmpp,
            'dpm++2s': sample_dpmpp_2s, 'dpm++sde': sample_dpmpp_sde, 'adaptive': sample_adaptive}


def asked_times(sampler, ts, process):
    """The times at which a sampler with a fixed grid asks the network: their number is the NFE, forwards for one image."""
    steps = list(zip(ts[:-1], ts[1:]))
    more = {'heun': lambda: ts[1:-1].tolist(), 'dpm++2s': lambda: [float(m) for m in (between(t, u, process) for t, u in steps) if m is not None]}
    return [float(t) for t in ts[:-1]] + more.get(sampler, list)()


def note_off_grid(sampler, ts, process):
    """Says so where a sampler asks the network at times that it was not trained on."""
    N = process.steps
    if N and (sampler == 'adaptive' or any(abs(t * N - round(t * N)) > 1e-3 for t in asked_times(sampler, ts, process))):
        print0(f'note: {sampler} asks the network at times that it was not trained on, which are multiples of 1/{N}')


def default_solver(args, sampler=None, steps=None):
    """Sampler, number of its steps and whether x0_hat is bounded, where they are not asked for. args: of the run. For RFlow the second-order
    solver: with as many forwards as Euler it was nearer to real at 10 and 25 (README, "How many forwards?"). MAISI's networks were made for Euler."""
    sampler = sampler or ('euler' if args.maisi else 'dpm++' if args.rflow else 'ddim')
    if steps is None:
        steps = min((25 if args.rflow else args.steps if sampler == 'ddpm' else 50), args.steps or 25)
    return sampler, steps, not args.rflow


# ---------------------------------------------------------------------------------------------------------------------
# 7  Measures and pictures
# ---------------------------------------------------------------------------------------------------------------------


def wilson(k, n, z=1.959964):
    """Wilson's interval of a share k/n (Wilson 1927), 95 % for that z: low, high. (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    p, w = k / n, z * z / n
    middle, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / n / 4) / (1 + w)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def centred(value, draws, floor=-math.inf, ceiling=math.inf):
    """95 % interval (low, high) of a value from bootstrap draws (nan are left out), whose mean is brought to the value: drawing with
    replacement repeats images, which moves distances like KID and shares like recall to one side (Efron 1993, ch. 10). It ends at floor
    and ceiling where no draw goes beyond: a share stays one."""
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return [math.nan, math.nan]
    low, high = np.percentile(draws - draws.mean() + value, (2.5, 97.5)).tolist()
    return [max(low, floor) if draws.min() >= floor else low, min(high, ceiling) if draws.max() <= ceiling else high]


def effective(w):
    """How many equally weighted items weights w are worth (Kish 1965)."""
    return float(np.sum(w) ** 2 / np.sum(np.square(w)))


def holm(p):
    """p-values corrected for their number (Holm 1979): the k-th smallest times how many are left, never below the one before."""
    p, order = np.asarray(p, float), np.argsort(p, kind='stable')
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty(len(p))
    out[order] = np.minimum(steps, 1)
    return out


def upper_tail(x, n, p):
    """P(X >= x) for X ~ Binomial(n, p), 0 < p < 1, exactly."""
    term = lambda k: math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p))
    return min(1.0, sum(map(term, range(x, n + 1)))) if x else 1.0


def auc(bad, good):
    """P(a bad image scores above a good one), ties half (Mann-Whitney). nan without one of either."""
    if not len(bad) or not len(good):
        return math.nan
    good = np.sort(good)
    return float((np.searchsorted(good, bad, 'left') + np.searchsorted(good, bad, 'right')).mean() / (2 * len(good)))


def agreement(counts, marginals=None):
    """Agreement of raters: counts (N,J), how many of the m >= 2 raters of an image chose each of J answers. Dict of po, pe, kappa, ac1.

    po: share of pairs of raters that agree. kappa: Fleiss 1971, with the raters' own shares `marginals` (2,J) for chance Cohen 1960.
    ac1: Gwet 2008, chance sum p (1 - p) / (J - 1), which a rare answer does not upset. nan where chance alone always agrees.
    """
    m = counts.sum(1)
    po = float(np.mean(((counts ** 2).sum(1) - m) / (m * (m - 1))))
    share = (counts / m[:, None]).mean(0)
    pe = float((share ** 2).sum() if marginals is None else (marginals[0] * marginals[1]).sum())
    by_chance = float((share * (1 - share)).sum() / max(counts.shape[1] - 1, 1))
    return dict(po=po, pe=pe, kappa=(po - pe) / (1 - pe) if pe < 1 else math.nan, ac1=(po - by_chance) / (1 - by_chance))


def agree(*raters):
    """agreement() of lists of words, one a rater and as long as each other: Cohen's kappa of two, Fleiss' of more."""
    one = (np.array(raters)[..., None] == np.unique(raters)).astype(float)                                 # (m, N, J)
    return agreement(one.sum(0), one.mean(1) if len(one) == 2 else None)


def correlation(a, b):
    """Of each image of a (N,S,S) with each of b (M,S,S): (N,M) in [-1,1]."""
    def unit(images):
        flat = images.reshape(len(images), -1).astype(np.float32)
        flat = flat - flat.mean(1, keepdims=True)
        return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-8)
    return unit(a) @ unit(b).T


def copy_cut(train, held_out):
    """Above this correlation with a training image an image is a copy: the 99th percentile of real images of other patients."""
    return float(np.percentile(correlation(held_out, train).max(1), 99))


def ssim_parts(x, y):
    """Luminance and structure of SSIM (Wang 2004) of pairs x, y (N,1,H,W) in [-1,1]: maps (N,1,H-10,W-10). Window 11, sigma 1.5."""
    g = torch.exp(-(torch.arange(11.0) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g.outer(g) / g.sum() ** 2)[None, None].to(x)
    blur = lambda v: F.conv2d(v, window)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                                     # a range of 2
    return (2 * mx * my + c1) / (mx * mx + my * my + c1), (2 * cov + c2) / (vx + vy + c2)


MS_SSIM = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)                                # Wang 2003; small images use the first few


def ms_ssim(x, y):
    """Multi-scale SSIM (Wang 2003) of pairs x, y (N,1,H,W) in [-1,1]: (N,). Scales while the side is >= 11; luminance at the last alone."""
    weights, out = torch.tensor(MS_SSIM[:min(5, int(math.log2(x.shape[-1] / 11)) + 1)]), x.new_ones(len(x))
    for i, weight in enumerate((weights / weights.sum()).tolist()):
        luminance, structure = ssim_parts(x, y)
        alike = structure * luminance if i == len(weights) - 1 else structure
        out = out * alike.mean((1, 2, 3)).clamp(min=0) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return out


COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207), (140, 86, 75), (90, 90, 90))


def to_rgb(image):
    """(H,W) in [-1,1] -> (H,W,3) uint8."""
    grey = np.uint8(np.clip((np.asarray(image, np.float32) + 1) * 127.5 + 0.5, 0, 255))
    return np.repeat(grey[..., None], 3, -1)


def views(volumes, masks=None):
    """Pictures of volumes (B,D,H,W): the axial slice above the coronal one, top up, each voxel of that repeated to about cubes, at the
    plane with the most tumour or in the middle. Slices (B,H,W) are pictures already. Returns a list of (H',W)."""
    if np.ndim(volumes) == 3:
        return list(volumes)
    out = []
    for i, v in enumerate(np.asarray(volumes)):
        full = lambda axis: np.asarray(masks[i]).sum(tuple({0, 1, 2} - {axis})) if masks is not None else np.zeros(v.shape[axis])
        z, y = (int(full(axis).argmax()) if full(axis).any() else v.shape[axis] // 2 for axis in (0, 1))
        out.append(np.concatenate([v[z], v[::-1, y].repeat(max(1, round(v.shape[2] / len(v))), 0)]))
    return out


def outline(image, mask, colour=(255, 80, 60), zoom=1):
    """A slice (H,W) in [-1,1] enlarged, with the border of a mask (H,W) drawn on it: (zoom H, zoom W, 3) uint8."""
    rgb = to_rgb(image).repeat(zoom, 0).repeat(zoom, 1)
    m = (np.asarray(mask) > 0).repeat(zoom, 0).repeat(zoom, 1)
    p = np.pad(m, 1)
    inner = p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    rgb[m & ~inner] = colour
    return rgb


def grid_png(rows, labels=None, zoom=1):
    """A PNG, as bytes, of rows of pictures, (H,W) in [-1,1] or (H,W,3) uint8, with a label at the left of each row."""
    rows = [[p if np.ndim(p) == 3 else to_rgb(p).repeat(zoom, 0).repeat(zoom, 1) for p in row] for row in rows]
    pad, left = 2, 100 if labels else 0
    h, w = rows[0][0].shape[:2]
    sheet = Image.new('RGB', (left + (w + pad) * max(map(len, rows)), (h + pad) * len(rows)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        if labels:
            draw.text((4, i * (h + pad) + h // 2 - 6), labels[i], (0, 0, 0), ImageFont.load_default(12))
        for j, p in enumerate(row):
            sheet.paste(Image.fromarray(p), (left + j * (w + pad), i * (h + pad)))
    buffer = io.BytesIO()
    sheet.save(buffer, 'PNG')
    return buffer.getvalue()


def save_grid(path, rows, labels=None, zoom=1):
    atomic_write(path, grid_png(rows, labels, zoom))


def plot(path, curves, title, xlabel, ylabel, logx=False, logy=False, size=(640, 400)):
    """A line plot as PNG. curves: {name: (xs, ys)}; a name that starts with '.' is drawn as points."""
    W, H, L, R, T, B = *size, 64, 16, 30, 46
    fx, fy = (math.log10 if logx else float), (math.log10 if logy else float)
    points = {n: [(fx(x), fy(y)) for x, y in zip(*c) if math.isfinite(x) and math.isfinite(y) and (x > 0 or not logx)
                  and (y > 0 or not logy)] for n, c in curves.items()}
    xs, ys = [p[0] for c in points.values() for p in c] or [0, 1], [p[1] for c in points.values() for p in c] or [0, 1]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    put = lambda p: (L + (p[0] - x0) / (x1 - x0) * (W - L - R), H - B - (p[1] - y0) / (y1 - y0) * (H - T - B))
    image = Image.new('RGB', (W, H), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)

    def ticks(low, high, log):
        if log and high - low >= 1:
            every = (1, 2, 5) if high - low < 2.5 else (1,)
            return [k + math.log10(m) for k in range(math.floor(low), math.floor(high) + 1) for m in every if low <= k + math.log10(m) <= high]
        step = 10 ** math.floor(math.log10((high - low) / 2))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
        return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

    for axis, (low, high, log) in enumerate(((x0, x1, logx), (y0, y1, logy))):
        for k in ticks(low, high, log):
            text, at = f'{10 ** k:.4g}' if log else f'{k:.4g}', put((k, y0) if axis == 0 else (x0, k))
            draw.line([(at[0], T), (at[0], H - B)] if axis == 0 else [(L, at[1]), (W - R, at[1])], (225, 225, 225))
            width = draw.textlength(text, font)
            draw.text((at[0] - width / 2, H - B + 4) if axis == 0 else (L - width - 6, at[1] - 7), text, (60, 60, 60), font)
    draw.rectangle([L, T, W - R, H - B], outline=(120, 120, 120))
    draw.text((L, 8), title, (0, 0, 0), font)
    draw.text(((W - draw.textlength(xlabel, font)) / 2, H - 20), xlabel, (0, 0, 0), font)
    draw.text((W - R - draw.textlength(ylabel, font), 8), ylabel, (60, 60, 60), font)
    for i, (name, c) in enumerate(points.items()):
        colour, spots = COLOURS[i % len(COLOURS)], [put(p) for p in c]
        if name.startswith('.') or len(spots) == 1:
            for px, py in spots:
                draw.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        elif spots:
            draw.line(spots, colour, 2, joint='curve')
        draw.line([(W - R - 150, T + 12 + 15 * i), (W - R - 132, T + 12 + 15 * i)], colour, 3)
        draw.text((W - R - 126, T + 5 + 15 * i), name.lstrip('.'), (40, 40, 40), font)
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    atomic_write(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# 8  Training
# ---------------------------------------------------------------------------------------------------------------------
PRESETS = {
    'full': dict(size=128, channels=(128, 256, 256), attention=(0, 1, 1), layers=1, head_channels=256, norm_groups=32,
                 patch=4, **SIZES['S'], batch_size=16, lr=1e-4, warmup=500, iters=100_000),
    'small': dict(size=64, channels=(32, 64, 96), attention=(0, 0, 1), layers=1, head_channels=32, norm_groups=8,
                  patch=4, width=160, depth=6, heads=5, batch_size=8, lr=1e-3, warmup=40, minutes=7.0),
    'tiny': dict(size=16, channels=(8, 8), attention=(0, 1), layers=1, head_channels=8, norm_groups=2,
                 patch=4, width=16, depth=2, heads=2, batch_size=4, lr=1e-3, warmup=1, iters=4),
}
MODELS = {'unet': ('channels', 'attention', 'layers', 'head_channels', 'norm_groups'),      # and the flags that shape each
          **dict.fromkeys(('dit', 'mmdit', 'mamba'), ('model_size', 'patch', 'width', 'depth', 'heads'))}
YOUNGER = dict(model='unet', patch=None, width=None, depth=None, heads=None, p_uncond=0.0, controllable=False, sparse24=False, checkpointing=False,
               progressive=None, dual=None, neighbours=0, volume=None, crop=None, maisi=None, maisi_class=None,
               anatomy=0.0, anatomy_mode=None, anatomy_atlas=None)                          # flags that older runs do not hold
# May differ when a run goes on; everything else must be as it was.
FREE = {'device', 'dtype', 'compile', 'checkpointing', 'dry_run', 'out', 'save_every', 'sample_every', 'keep_every', 'cache', 'data', 'minutes', 'lr_find',
        'perceptual_weights', 'lpips_weights', 'init', 'inflate', 'split', 'bravo', 'reward', 'splits', 'maisi_unet'}


def train_parser(doc, out):
    """The flags that train_seg.py and train_bravo.py share."""
    p = Parser(description=doc)
    p.set_defaults(maisi=None)                               # which of MAISI's networks it is: train_bravo.py says
    g = p.add_argument_group('data')
    g.add_argument('--data', nargs='+', metavar='DIR', help='folders with one folder a patient; none: the built-in phantom')
    g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
    g.add_argument('--size', type=number(int, 8, 4096), help='pixels a side; none: the preset\'s')
    g.add_argument('--volume', type=number(int, 2, 4096), metavar='D', help='train on whole volumes of D slices instead of slices')
    g.add_argument('--crop', type=numbers(int, 2, 4096), metavar='D,S', help='with --volume: train on crops of D slices of S pixels a side')
    g.add_argument('--labels', type=numbers(int, 1), help='mask labels that count as tumour; none: all above 0')
    g.add_argument('--empty-slices', type=number(float, 0, 1), default=0.2, help='share of slices without tumour')
    g.add_argument('--speck', type=number(float, 0), default=4.0, help='smaller pieces of a mask are dropped, mm2; with --volume that ** 1.5 mm3')
    g.add_argument('--augment', nargs='?', const='affine', default=False, choices=('affine', 'flip'),
                   help='left-right flip, small rotation, scale and shift; flip: the flip alone, which blurs nothing')
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
    g = p.add_argument_group('network')
    g.add_argument('--preset', choices=('auto', *PRESETS), default='auto', help='auto: full with CUDA, small without')
    g.add_argument('--model', choices=tuple(MODELS), default='unet', help='the flags --channels to --norm-groups are for unet, --model-size to --heads for others')
    g.add_argument('--channels', type=numbers(int, 1, 8192), help='width of each level; none: the preset\'s')
    g.add_argument('--attention', type=numbers(int, 0, 1), help='1 for each level that attends; none: the preset\'s')
    g.add_argument('--layers', type=number(int, 1, 16), help='residual blocks a level; none: the preset\'s')
    g.add_argument('--head-channels', type=number(int, 1), help='channels of an attention head; none: the preset\'s')
    g.add_argument('--norm-groups', type=number(int, 1), help='groups of GroupNorm (MONAI: 32); none: the preset\'s')
    g.add_argument('--model-size', choices=tuple(SIZES), help='width, depth and heads of DiT-S to XL; none: the preset\'s')
    g.add_argument('--patch', type=number(int, 1), help='pixels a side of a patch; none: the preset\'s')
    g.add_argument('--width', type=number(int, 8, 8192), help='numbers in a token; none: the preset\'s')
    g.add_argument('--depth', type=number(int, 1, 128), help='blocks; none: the preset\'s')
    g.add_argument('--heads', type=number(int, 1), help='of attention or scan; none: the preset\'s')
    g.add_argument('--slice-level', action='store_true', help='condition on the level of the slice, 0 lowest to 1 highest')
    g.add_argument('--controllable', action='store_true', help='tell count, sizes and places of the lesions, as tokens (cross-attention; mmdit: its second stream)')
    g.add_argument('--checkpointing', action='store_true', help='recompute each block in the backward: less memory, a third more time')
    g.add_argument('--sparse24', action='store_true', help='2:4 sparsity: two of four weights are zero, SR-STE training')
    g.add_argument('--dense-tail', type=number(float, 0, 1), default=0.0, metavar='F', help='with --sparse24: the last share of the training is dense')
    g.add_argument('--prune', type=number(float, 0, 0.9), default=0.0, metavar='R', help='with --init: drop this share of its weights, or of its channels, train on; 0: off')
    g.add_argument('--prune-by', choices=('magnitude', 'taylor'), help='what is dropped: the smallest, or what changes the loss least; none: taylor')
    g.add_argument('--prune-how', choices=('weights', 'channels'), help='weights: set to zero; channels: removed, so that it is faster; none: channels')
    g = p.add_argument_group('process')
    g.add_argument('--rflow', action='store_true', help='rectified flow instead of DDPM')
    g.add_argument('--steps', type=number(int, 0, 100_000), help='time grid; none: 1000 for DDPM, 0 = continuous for --rflow')
    g.add_argument('--schedule', choices=('linear', 'cosine', *WIDTHS), default='cosine',
                   help='linear, cosine: of DDPM; laplace, cauchy: train on such a density of log-SNR (DDPM stays cosine)')
    g.add_argument('--schedule-centre', type=number(float, -10, 10), help='of that density, log-SNR; none: 0')
    g.add_argument('--schedule-width', type=number(float, 0, open_low=True), help='of that density; none: laplace 0.5, cauchy 1')
    g.add_argument('--uniform-mix', type=number(float, 0, 1), help='share of times that is uniform in log-SNR instead; none: 0.15')
    g.add_argument('--target', choices=('eps', 'v', 'x0'), default='eps', help='of DDPM; RFlow predicts v = eps - x_0')
    g.add_argument('--logit-normal', action='store_true', help='draw t as sigmoid(N(0,1)) instead of uniformly')
    g.add_argument('--curriculum', type=number(int, 0), default=0, metavar='N', help='train on the easiest of N ranges of t first, add the others one by one; 0: off')
    g = p.add_argument_group('training')
    g.add_argument('--iters', type=number(int, 0), help='optimiser steps; none: the preset\'s length')
    g.add_argument('--minutes', type=number(float, 0, open_low=True), help='length by time: 20 steps are timed, then it is fixed')
    g.add_argument('--progressive', type=numbers(int, 8, 4096), metavar='S,S', help='sizes to train at in turn, as 64,128,256; none: --size alone')
    g.add_argument('--batch-size', type=number(int, 1), help='images a step, over all processes; none: the preset\'s')
    g.add_argument('--accumulate', type=number(int, 1), default=1, help='parts that a process cuts its batch into')
    g.add_argument('--lr', type=number(float, 0, open_low=True), help='peak learning rate; none: the preset\'s')
    g.add_argument('--warmup', type=number(int, 0), help='steps of linear warm-up; none: the preset\'s')
    g.add_argument('--lr-find', action='store_true', help='first plot loss against learning rate, suggest one, undo; then train')
    g.add_argument('--weight-decay', type=number(float, 0), default=0.01, help='of AdamW')
    g.add_argument('--clip', type=number(float, 0, open_low=True), default=1.0, help='gradient norm')
    g.add_argument('--p-uncond', type=number(float, 0, 1), default=0.0, help='share of images trained without their condition, for --cfg')
    g.add_argument('--ema-decay', type=number(float, 0, 1), default=0.9999, help='of the weight average; 0: the raw weights')
    g.add_argument('--min-snr', type=number(float, 0), default=0.0, help='gamma of Min-SNR weighting (5 is usual); 0: off')
    g.add_argument('--init', metavar='FILE', help='start from a run of ours or a MONAI state dict')
    g.add_argument('--inflate', metavar='RUN', help='with --volume: start from a run on slices, its kernels in the middle of 3D ones')
    g.add_argument('--init-target', choices=('eps', 'v', 'x0', 'x0-eps'), help='what a MONAI network predicts')
    g.add_argument('--init-range', type=numbers(float), help='range of the images that a MONAI network was trained on, as 0,1')
    g = p.add_argument_group('run')
    g.add_argument('--out', default=out, metavar='DIR', help='run folder; the same command again resumes')
    g.add_argument('--seed', type=number(int, 0), default=0)
    g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    g.add_argument('--dtype', choices=('auto', 'bf16', 'fp32', 'pure-bf16'), default='auto',
                   help='bf16: autocast; auto: where it is fast; pure-bf16: weights, gradients and moments too')
    g.add_argument('--kahan', action='store_true', help='pure-bf16: compensated sums (10 bytes a parameter) instead of stochastic rounding (8)')
    g.add_argument('--compile', action='store_true', help='torch.compile the network')
    g.add_argument('--dry-run', action='store_true', help='print parameters, FLOPs, memory and time, train nothing')
    g.add_argument('--save-every', type=number(int, 1), default=250, help='steps between checkpoints')
    g.add_argument('--keep-every', type=number(int, 0), default=0, help='also keep every N-th step as ckpt_STEP.pt; 0: none')
    g.add_argument('--sample-every', type=number(int, 0), default=0, help='steps between pictures; 0: a quarter of the run')
    return p


def finish_args(args):
    """Presets, defaults that depend on other flags, conflicts. Called by get_args, before any work."""
    if args.preset == 'auto':
        args.preset = 'full' if torch.cuda.is_available() and args.device != 'cpu' else 'small'
    preset = dict(PRESETS[args.preset])
    if args.iters is not None or args.minutes is not None:
        preset.pop('iters', None), preset.pop('minutes', None)
    for name in [n for names in MODELS.values() for n in names if n not in MODELS[args.model]]:
        if getattr(args, name) is not None:
            fail(f'--{name.replace("_", "-")}: is for --model {" or ".join(m for m in MODELS if name in MODELS[m])}; this is {args.model}')
        preset.pop(name, None)
    if args.model_size:
        given = [f'--{n}' for n in SIZES['S'] if getattr(args, n) is not None]
        if given:
            fail(f'--model-size {args.model_size} and {given[0]}: both set the size; give one')
        preset.update(SIZES[args.model_size])
    if args.volume:                                                          # a step of few volumes, attention only where the grid is smallest
        preset['batch_size'] = 2
        preset.update(attention=(0,) * (len(preset['attention']) - 1) + (1,)) if args.model == 'unet' else None
        for name in ('slice_level', 'controllable', 'progressive', 'perceptual', 'fft', 'fft_log', 'reflow', 'gan', 'neighbours', 'anatomy', 'dual'):
            if getattr(args, name, None):
                fail(f'--volume {args.volume} and --{name.replace("_", "-")}: that is for slices; leave one of them away')
    for name in ('crop', 'inflate'):
        if getattr(args, name) and (not args.volume or args.model != 'unet'):
            fail(f'--{name} {getattr(args, name)}: is for a U-Net on volumes; add --volume D, leave --model {args.model} away')
    if args.prune and args.crop:
        fail(f'--prune {args.prune:g} and --crop: weights are judged on whole volumes; leave one of them away')
    if args.inflate and args.init:
        fail(f'--inflate {args.inflate} and --init {args.init}: both say where to start; give one')
    args.init = args.inflate or args.init
    if args.iters is not None and args.minutes is not None:
        fail('--iters and --minutes both set the length; give one')
    if args.progressive:
        if list(args.progressive) != sorted({*args.progressive}) or len(args.progressive) < 2:
            fail(f'--progressive {",".join(map(str, args.progressive))}: expected two or more rising sizes, as 64,128')
        if args.size not in (None, args.progressive[-1]):
            fail(f'--size {args.size}: --progressive ends at {args.progressive[-1]}; leave --size away')
        args.size = args.progressive[-1]
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps is None:
        args.steps = 0 if args.rflow else 1000
    if not args.rflow and args.steps < 2:
        fail(f'--steps {args.steps}: DDPM needs at least 2 times; 0 (continuous) is for --rflow')
    if args.rflow and args.target not in ('eps', 'v'):
        fail(f'--target {args.target}: RFlow predicts v = eps - x_0; leave the flag away')
    if args.rflow:
        args.target = 'v'
    if args.rflow and args.schedule == 'linear':
        fail('--schedule linear: is of DDPM; RFlow has alpha = 1 - t, leave the flag away')
    if args.logit_normal and not args.rflow:
        fail('--logit-normal: only with --rflow')
    if args.schedule in WIDTHS:
        args.schedule_centre = args.schedule_centre or 0.0
        args.schedule_width = args.schedule_width or WIDTHS[args.schedule]
        args.uniform_mix = 0.15 if args.uniform_mix is None else args.uniform_mix
    for name in ('schedule_centre', 'schedule_width', 'uniform_mix'):
        if getattr(args, name) is not None and args.schedule not in WIDTHS:
            fail(f'--{name.replace("_", "-")} {getattr(args, name):g}: is of --schedule laplace or cauchy; add one')
    if args.min_snr and (args.logit_normal or args.schedule in WIDTHS):
        print0(f'note: --min-snr {args.min_snr:g} comes on top of a density of t that already prefers some noise: the loss is weighted twice')
    if args.curriculum == 1:
        fail('--curriculum 1: one range is all of t; give 2 or more, or leave it away')
    dense = [f'--{k}' for k, on in (('logit-normal', args.logit_normal), ('schedule ' + args.schedule, args.schedule in WIDTHS),
                                    ('curriculum', args.curriculum)) if on]
    if len(dense) > 1:
        fail(f'{" and ".join(dense)}: each says which t are trained on; give one')
    if args.dense_tail and not args.sparse24:
        fail(f'--dense-tail {args.dense_tail:g}: does nothing without --sparse24')
    if args.prune and not args.init:
        fail(f'--prune {args.prune:g}: makes a trained network smaller; add --init RUN')
    if args.prune_how == 'channels' and args.model != 'unet':
        fail(f'--prune-how channels: is for --model unet; this is {args.model}, use weights')
    for name, usual in (('prune_by', 'taylor'), ('prune_how', 'channels' if args.model == 'unet' else 'weights')):
        if getattr(args, name) and not args.prune:
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: does nothing without --prune R')
        setattr(args, name, getattr(args, name) or (args.prune and usual) or None)
    if args.prune and args.sparse24:
        fail('--prune and --sparse24: both choose the weights that are zero; give one')
    if args.kahan and args.dtype != 'pure-bf16':
        fail('--kahan: does nothing without --dtype pure-bf16')
    if args.model == 'unet':
        if len(args.attention) != len(args.channels):
            fail(f'--attention has {len(args.attention)} levels, --channels {len(args.channels)}; give one 0 or 1 for each level')
        for level, (c, a) in enumerate(zip(args.channels, args.attention)):
            if (a or level == len(args.channels) - 1) and c % min(args.head_channels, c):
                fail(f'--head-channels {args.head_channels}: does not divide the {c} channels of attention level {level + 1}')
        step, why = 2 ** (len(args.channels) - 1), f'{len(args.channels)} levels need'
    else:
        if args.width % args.heads:
            fail(f'--heads {args.heads}: does not divide --width {args.width}')
        step, why = args.patch, 'patches need'
        if args.init_target:
            fail(f'--init-target {args.init_target}: describes a MONAI network, which is a U-Net; this is --model {args.model}')
    for size in args.progressive or (args.size,):
        if size % step:
            fail(f'--{"progressive" if args.progressive else "size"} {size}: {why} a multiple of {step}')
    if args.volume and args.volume % step:
        fail(f'--volume {args.volume}: {why} a multiple of {step}')
    if args.crop and (len(args.crop) != 2 or args.crop[0] > args.volume or args.crop[1] > args.size or any(n % step for n in args.crop)):
        fail(f'--crop {",".join(map(str, args.crop))}: expected D,S of at most {args.volume},{args.size}, multiples of {step}')
    parts = args.accumulate * int(os.environ.get('WORLD_SIZE', 1))
    if args.batch_size % parts:
        fail(f'--batch-size {args.batch_size}: must be a multiple of processes x --accumulate = {parts}')
    if (args.init_target or args.init_range) and not args.init:
        fail('--init-target and --init-range describe a network given with --init; give it')
    if args.init and not Path(args.init).exists():
        fail(f'--init {args.init}: no such file')
    if args.init_range and (len(args.init_range) != 2 or args.init_range[0] >= args.init_range[1]):
        fail(f'--init-range {args.init_range}: expected two rising numbers, as 0,1')
    if args.init_target:
        fits = {'v', 'x0-eps'} if args.rflow else {'eps', 'v', 'x0'}
        if args.init_target not in fits:
            fail(f'--init-target {args.init_target}: {"RFlow" if args.rflow else "DDPM"} networks predict {" or ".join(sorted(fits))}')
        if not args.rflow:
            args.target = args.init_target
    if args.split and not Path(args.split).is_file():
        fail(f'--split {args.split}: no such file; expected a CSV with columns patient,part')
    for root in args.data or ():
        if not Path(root).is_dir():
            fail(f'--data {root}: no such folder; give a folder that holds one folder a patient')
    check_out(args.out)
    return args


class EMA:
    """Average of the weights in fp32: decay min(decay, (1 + n)/(10 + n)) at update n, buffers copied (Ho 2020, with warm-up)."""

    def __init__(self, net, decay):
        self.net, self.decay, self.updates = copy.deepcopy(net).float().eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, net):
        """One step of the average towards net's weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.net.parameters()), [p.detach().float() for p in net.parameters()], 1 - decay)
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
            mine.copy_(theirs)


def stochastic(x, g):
    """fp32 -> bf16, up or down with the probabilities that make the mean exact: random bits below the cut, then cut."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, generator=g, device=x.device)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()


def pure_bf16(net):
    """All weights in bf16, in place, but Mamba's A and bias of dt, which decide how fast it forgets: in bf16 dt = 0.001 moves in steps of 3 %."""
    kept = [(p, p.data) for m in net.modules() if isinstance(m, Mamba) for p in (m.A_log, m.dt_bias)]
    net.bfloat16()
    for p, value in kept:
        p.data = value


class PureBF16(torch.optim.Optimizer):
    """AdamW (Loshchilov 2019) whose weights, gradients and moments are all bf16: 8 bytes a parameter, no fp32 copy. The few that pure_bf16
    leaves in fp32 are updated in it.

    An update is computed in fp32 and written back with stochastic rounding: to nearest, a change below 2^-9 of a weight would be
    lost every time. kahan: the weight's lost part is kept in a bf16 tensor of its own instead (10 bytes). The random bits follow
    from (seed, step), so that replicas stay equal.
    """

    def __init__(self, params, lr, weight_decay, seed, kahan=False, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, dict(lr=lr))
        self.decay, self.seed, self.kahan, self.betas, self.eps = weight_decay, seed, kahan, betas, eps

    @torch.no_grad()
    def step(self):
        """One update of all parameters, written back in bf16 by the chosen rounding. Parameters go through it in bunches: one by one, a GPU
        would wait for launches (so sixteen million numbers there); all at once, the fp32 in between would take what bf16 saves, and a CPU's cache."""
        (b1, b2), g = self.betas, None
        for group in self.param_groups:
            for p in (p for p in group['params'] if p.grad is not None and not self.state[p]):
                self.state[p].update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p), **({'lost': torch.zeros_like(p)} if self.kahan else {}))
            for bunch in bunches((((self.state[p]['step'], p.dtype), p) for p in group['params'] if p.grad is not None), 1 << (24 if group['params'][0].is_cuda else 20)):
                step, kind = self.state[bunch[0]]['step'] + 1, bunch[0].dtype
                stored = stochastic if kind == torch.bfloat16 else lambda x, g: x
                for p in bunch:
                    self.state[p]['step'] = step
                g = g or generator(self.seed, 'rounding', step, device=bunch[0].device)
                m_, v_ = ([self.state[p][name] for p in bunch] for name in 'mv')
                flat = lambda tensors: torch.cat([x.flatten() for x in tensors]).float()
                grad, p32 = flat([p.grad for p in bunch]), flat(bunch)
                m, v = flat(m_).lerp_(grad, 1 - b1), flat(v_).mul_(b2).addcmul_(grad, grad, value=1 - b2)
                put(m_, stored(m, g)), put(v_, stored(v, g))
                change = m / (1 - b1 ** step) / ((v / (1 - b2 ** step)).sqrt_().add_(self.eps))
                change = -group['lr'] * (change + self.decay * p32)
                if self.kahan:
                    lost = [self.state[p]['lost'] for p in bunch]
                    change += flat(lost)
                    new = (p32 + change).to(kind)
                    put(bunch, new), put(lost, change - (new.float() - p32))
                else:
                    put(bunch, stored(p32 + change, g))


def bunches(kinds_and_params, size):
    """Neighbours of one kind (as many steps behind them, the same dtype), in lists of about `size` numbers each."""
    out, n, last = [], 0, None
    for kind, p in kinds_and_params:
        if kind != last or n + p.numel() > size:
            out.append([])
            n, last = 0, kind
        out[-1].append(p)
        n += p.numel()
    return out


def put(tensors, flat):
    """Writes one flat tensor over many, in their order."""
    torch._foreach_copy_(tensors, [x.view(t.shape) for t, x in zip(tensors, flat.split([t.numel() for t in tensors]))])


SR_STE = 0.02       # decay of the weights outside a 2:4 mask: 2e-4 at SGD's usual lr of 0.1 (Zhou 2021) is as much a step as this at 1e-3


def build_optimizer(net, args):
    """AdamW, or its pure bf16 form, and what --sparse24 and --prune do after each of its steps; says what each flag changed."""
    if args.dtype == 'pure-bf16':
        opt = PureBF16(net.parameters(), args.lr, args.weight_decay, args.seed, args.kahan)
        count, told = sum(p.numel() for p in net.parameters()), []

        def tell(opt, *_):
            if not told:
                tensors = [v for p in net.parameters() for v in (p, p.grad, *opt.state[p].values()) if torch.is_tensor(v)]
                told.append(sum(v.numel() * v.element_size() for v in tensors) / count)
                print0(f'pure bf16: {told[0]:.2f} bytes a parameter for weights, gradients and moments (AMP: 16), the average of the weights apart')

        opt.register_step_post_hook(tell)
    else:
        opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    if args.sparse24:
        @torch.no_grad()
        def decay(opt, *_):                                  # SR-STE, apart from the gradient, as Adam would take its size away
            for i, (w, sparse) in enumerate(sparse_layers(net)):
                new = w.float() * (1 - opt.param_groups[0]['lr'] * SR_STE * (1 - sparse.mask(w).float()) * (1 - sparse.dense.float()))
                g = generator(args.seed, 'decay', i, int(opt.state[w]['step']), device=w.device) if w.dtype == torch.bfloat16 else None
                w.copy_(stochastic(new, g) if g else new)    # to nearest, bf16 would lose a change this small every time
        opt.register_step_post_hook(decay)
    if args.prune and args.prune_how == 'weights':
        masks = [(m.weight, m.weight.detach() != 0) for m in prunable(net)]

        @torch.no_grad()
        def still_zero(*_):                                  # the moments would bring pruned weights back
            for p, mask in masks:
                p *= mask
        opt.register_step_post_hook(still_zero)
    return opt


class Curriculum:
    """Which t are trained on: the easiest of N ranges at first, one more whenever the loss no longer falls (Kim 2024, 2403.10348).
    The average then forgets sooner for a while (add says when), as it has not seen the new range; the learning rate goes on.

    Easy is much noise for eps and v, whose loss there settles first, and little noise for x0. A range is added when the mean loss over
    `check` steps has fallen by less than 1 % since the last check, and after PATIENCE checks at the latest: half the training at most
    goes by before all t are in, if it has 160 N steps or more. Its state is a list of numbers, kept in the checkpoint.
    """

    PATIENCE = 4

    def __init__(self, args):
        self.n, self.args, self.state = args.curriculum, args, [1, 0, 0.0, 0, math.inf]        # ranges, checks, sum, count, last mean
        if self.n:
            print0(f'curriculum: {self.n} ranges of t, from {"little" if args.target == "x0" else "much"} noise on, the easy end for {args.target}')

    @property
    def window(self):
        share = self.state[0] / self.n if self.n else 1.0
        return (0.0, share) if self.args.target == 'x0' else (1.0 - share, 1.0)

    def add(self, losses, step):
        """Losses of the steps since the last call; decides after each `check` steps, a multiple of 20, when all of them are in. True when
        a range was added."""
        ranges, checks, total, count, last = self.state
        before = ranges
        if not self.n or ranges == self.n:
            return False
        total, count, check = total + sum(losses), count + len(losses), max(self.args.iters // (2 * self.n * self.PATIENCE) // 20 * 20, 20)
        if step % check == 0:
            mean, checks = total / count, checks + 1
            if mean > 0.99 * last or checks == self.PATIENCE:
                ranges, checks, mean = ranges + 1, 0, math.inf
                print0(f'curriculum: {ranges} of {self.n} ranges from step {step} on')
            total, count, last = 0.0, 0, mean
        self.state = [ranges, checks, total, count, last]
        if step == self.args.iters and ranges < self.n:
            print0(f'note: the curriculum ended at {ranges} of {self.n} ranges; {self.n} need {160 * self.n} steps')
        return ranges > before


def stage_of(step, args):
    """Which size of --progressive a step trains at, and the stage's first step: as many steps at each. Before the length is
    known the sizes take turns, so that iters_for times them all."""
    n = len(getattr(args, 'progressive', None) or (0,))                      # a detector has one size
    stage = min(step * n // args.iters, n - 1) if args.iters else step % n
    return stage, -(-stage * args.iters // n) if args.iters else 0


def lr_at(step, args):
    """Linear warm-up to --lr, then half a cosine down to a hundredth of it at --iters (Loshchilov 2017); warmed up again at each
    further size of --progressive."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    q = (step - args.warmup) / max(args.iters - args.warmup, 1)
    return args.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * q)) / 2) * min(1, (step - stage_of(step, args)[1] + 1) / max(args.warmup, 1))


@contextlib.contextmanager
def rehearsal(net, opt):
    """Steps taken inside are undone: network and optimiser come back bit for bit. (Noise is drawn per step, not a state.)"""
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    yield
    net.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    opt.zero_grad(set_to_none=True)


def lr_suggestions(lrs, losses):
    """Two learning rates from a smoothed range test (Smith 2017): where it falls steepest, and the middle of the valley.

    Valley: half way along the longest strictly falling subsequence. (fastai's rule of that name takes as its start not where the
    subsequence begins but its length before its end, which is later on a noisy curve.)
    """
    lrs, losses = np.asarray(lrs), np.asarray(losses)
    steep = int(np.gradient(losses, np.log(lrs)).argmin())
    length, before = np.ones(len(losses), int), np.full(len(losses), -1)
    for i in range(len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and length[j] + 1 > length[i]:
                length[i], before[i] = length[j] + 1, j
    end = start = int(length.argmax())
    while before[start] >= 0:
        start = before[start]
    span = end - start
    return float(lrs[steep]), float(lrs[start + int(span / 3) + int(span / 6)])


def lr_find(train_step, net, opt, out, low=1e-6, high=1.0, steps=100):
    """LR range test on one fixed batch (same images, t and noise, so that only the rate moves the loss), then undone.

    train_step(step, lr) -> loss. Writes lr_find.png and lr_find.csv, prints and returns the valley.
    """
    lrs, losses, mean = [], [], 0.0
    with rehearsal(net, opt):
        for i in progress(range(steps), 'lr-find', leave=False):
            lr = low * (high / low) ** (i / (steps - 1))
            loss = train_step(0, lr)[0]
            if world() > 1:                                               # each process saw its part; all must stop at the same step
                dist.all_reduce(loss)
            loss = float(loss) / world()
            mean = 0.8 * mean + 0.2 * loss
            smooth = mean / (1 - 0.8 ** (i + 1))                      # without bias towards 0
            if not math.isfinite(loss) or (losses and smooth > 4 * min(losses)):
                break
            lrs.append(lr), losses.append(smooth)
    if len(lrs) < 2:
        fail(f'--lr-find: the loss is {loss} at lr {lr:.1e} already; is the data in range?', 1)
    steep, valley = lr_suggestions(lrs, losses)
    if rank() == 0:
        write_csv(out / 'lr_find.csv', ['lr', 'loss'], zip(lrs, losses))
        plot(out / 'lr_find.png', {'smoothed loss': (lrs, losses), f'valley {valley:.1e}': ([valley] * 2, [min(losses), max(losses)]),
                                   f'steepest {steep:.1e}': ([steep] * 2, [min(losses), max(losses)])},
             'LR range test', 'learning rate', 'loss', logx=True, logy=True)
    print0(f'lr-find: valley {valley:.1e}, steepest {steep:.1e} ({len(lrs)} steps, {out / "lr_find.png"}); undone, training goes '
           'on with --lr as given')
    return valley


def iters_for(minutes, train_step, net, opt, device, lr, sizes=1):
    """How many steps fit into that time, by the median of 20 after 2 to warm up (other work for a moment moves no median), all undone; of sizes that
    take turns (--progressive) by the mean of their medians. The same number on every rank."""
    ends = []
    with rehearsal(net, opt):
        for i in range(22):
            float(train_step(i, lr)[0])
            ends.append(time.perf_counter())
        took = np.diff(ends[1:])
        seconds = torch.tensor([float(np.mean([np.median(took[k::sizes]) for k in range(sizes)]))], device=device)
    if world() > 1:
        dist.broadcast(seconds, 0)
    iters = max(int(minutes * 60 / float(seconds)), 1)
    print0(f'{float(seconds):.3f} s a step: {iters} steps in {minutes:g} minutes')
    return iters


def dry_run(net, train_step, opt, args):
    """Prints what a training costs, from real steps that are undone, at each size of --progressive: parameters, FLOPs, memory, time."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
    aten = torch.ops.aten                                                    # torch counts these kernels on GPUs only
    attentions = {aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
                  aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}
    kept, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(v):
        if v.untyped_storage().data_ptr() not in own:
            kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    stages = len(args.progressive or (0,))
    steps = [-(-k * args.iters // stages) if args.iters else k for k in range(stages)]
    with rehearsal(net, opt):
        with FlopCounterMode(display=False, custom_mapping=attentions) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            most = 0
            for step in steps:
                kept.clear()
                float(train_step(step, args.lr)[0])
                most = max(most, sum(kept.values()))
        n = sum(p.numel() for p in net.parameters())
        state = sum(v.numel() * v.element_size() for p in net.parameters() for v in (p, p, *opt.state[p].values()) if torch.is_tensor(v)) + 4 * n
        start = time.perf_counter()
        for step in 3 * steps:
            float(train_step(step, args.lr)[0])
        seconds = (time.perf_counter() - start) / (3 * stages)
    iters = args.iters if args.iters is not None else max(int(args.minutes * 60 / seconds), 1)
    print0(f'dry run: {n / 1e6:.2f} M parameters; {flops.get_total_flops() / stages * world() / 1e9:.4g} GFLOP a step of {args.batch_size}; '
           f'{state / 1e6:.0f} MB for weights, gradients, moments and average, {most / 1e6:.0f} MB kept for the backward; '
           f'{seconds:.3f} s a step, {iters} steps in {iters * seconds / 60:.1f} minutes. Nothing was trained')


def quantiles(values, n=101):
    """n evenly spaced quantiles of values (N,), a list: their distribution in short."""
    return np.quantile(np.asarray(values, float), np.linspace(0, 1, n)).tolist()


def batch_rows(n, batch, step, seed):
    """Which of n rows make the batch of a step: epochs of seeded permutations, end to end. A function of the step alone."""
    at = np.arange(step * batch, (step + 1) * batch)
    order = {e: torch.randperm(n, generator=generator(seed, 'epoch', int(e))).numpy() for e in np.unique(at // n)}
    return np.array([order[i // n][i % n] for i in at])


def save_checkpoint(out, state, keep_every=0):
    """Writes out/ckpt.pt and keeps the one before as ckpt.prev.pt. At every moment one of the two is whole.

    Serialised in memory, written aside, fsynced; then two renames. A full disk or a kill leaves the old ones alone.
    """
    out, buffer = Path(out), io.BytesIO()
    torch.save(state, buffer)
    tmp = out / 'ckpt.pt.tmp'
    try:
        with open(tmp, 'wb') as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        if keep_every and state['step'] % keep_every == 0:                                  # first: from ckpt.pt a killed run would go on without it
            atomic_write(out / f'ckpt_{state["step"]}.pt', buffer.getbuffer())
        if (out / 'ckpt.pt').exists():
            os.replace(out / 'ckpt.pt', out / 'ckpt.prev.pt')
        os.replace(tmp, out / 'ckpt.pt')
        folder = os.open(out, os.O_RDONLY)                     # the renames themselves must reach the disk
        os.fsync(folder)
        os.close(folder)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        fail(f'{out}: checkpoint of step {state["step"]} could not be saved ({e}); the one before is intact, free some '
             'space and start the same command again', 1)


def load_file(path):
    """torch.load that runs no code. Fails on anything but tensors and plain values."""
    try:
        with warnings.catch_warnings(action='ignore', category=UserWarning):       # about the pickle's version: the line below says what counts
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:                                      # torch raises many kinds for a damaged or hostile file
        fail(f'{path}: is no checkpoint that can be loaded safely ({type(e).__name__}); expected a ckpt.pt of this '
             'repository or a plain state dict')


def whole(path):
    """Whether a checkpoint file can be read to its end."""
    try:
        torch.load(path, map_location='cpu', weights_only=True)
    except Exception:
        return False
    return True


def load_checkpoint(path):
    """The state in a run folder (ckpt.pt, or ckpt.prev.pt where that one is missing or damaged) or in a file."""
    path = Path(path)
    if path.is_dir():
        files = [f for f in (path / 'ckpt.pt', path / 'ckpt.prev.pt') if f.exists()]
        if not files:
            fail(f'{path}: holds no ckpt.pt; train first, or give another run folder')
        for f in files[:-1]:
            try:
                return torch.load(f, map_location='cpu', weights_only=True)
            except Exception as e:
                print0(f'{f}: damaged ({type(e).__name__}); going back to {files[-1].name}')
        path = files[-1]
    if not path.exists():
        fail(f'{path}: no such run folder or checkpoint file')
    return load_file(path)


def patient_id(name):
    """What a checkpoint calls a patient: no name leaves the machine with it."""
    return hashlib.sha1(name.encode()).hexdigest()[:12]


def patients_seen(data, state, *files, sets=()):
    """Ids of all patients that a network learned from, sorted: the training patients of data, and whom the checkpoint that it goes on from (state)
    or those that it starts from (files; none among them are skipped) had seen, and those that made synthetic data (and sets). None where one
    of these does not say."""
    train = [r for r, part in zip(data.table, data.part) if part == 'train']
    parents = [state] if state else [load_checkpoint(f) for f in files if f]
    return joined([[patient_id(r['source'] or r['patient']) for r in train if r['source'] or not r['synthetic']],
                   *(p.get('seen') if isinstance(p, dict) else None for p in parents),
                   *map(seen_by, sorted({r['root'] for r in train if r['synthetic']} | {str(s) for s in sets if s}))])


def seen_by(root):
    """Ids of the patients whom the runs behind a folder of patients had seen: none for a real one, None where a set's sample.json does not say."""
    file = Path(root) / 'sample.json'
    try:
        return noted_seen(json.loads(file.read_text())) if file.is_file() else []
    except (ValueError, AttributeError):
        fail(f'{file}: is no JSON as sample.py writes it; make the set again')


def noted_seen(made):
    """The same of the contents of a sample.json; the first version noted everybody's part."""
    old = [patient_id(p) for p, part in made['parts'].items() if part == 'train'] if made.get('parts') else None
    return made.get('seen', old)


def joined(ids):
    """Sorted union of lists of ids; None where one is None."""
    ids = list(ids)
    return None if None in ids else sorted({*itertools.chain(*ids)})


def weights_hash(tensors):
    """12 digits that name a set of weights."""
    return hashlib.sha256(b''.join(v.float().cpu().numpy().tobytes() for v in tensors.values())).hexdigest()[:12]


def script_name(script):
    return 'classifier.py train' if script == 'detector' else f'train_{script}.py'


def open_run(args, flags='args'):
    """Makes the run folder, or finds the checkpoint to resume from. Returns it or None; fails when its `flags` differ from args."""
    out = Path(args.out)
    state = load_checkpoint(out) if any((out / f).exists() for f in ('ckpt.pt', 'ckpt.prev.pt')) else None
    barrier()                                                   # all have read before one moves it aside:
    if state is not None and rank() == 0 and (out / 'ckpt.pt').exists() and not whole(out / 'ckpt.pt'):
        os.replace(out / 'ckpt.pt', out / 'ckpt.damaged.pt')    # the next save must not push it over the good ckpt.prev.pt
    if state is None:
        if rank() == 0:
            make_folder(out, '--out')
        barrier()
        return None
    if not isinstance(state, dict) or flags not in state or 'opt' not in state:
        fail(f'{out}: its checkpoint holds no training to resume; choose another --out, or give it to --init')
    if args.script in ('seg', 'bravo') and not state['args'].get('vae') and 'curriculum' not in state:
        fail(f'{out}: was made by an older version of these scripts and cannot be resumed; give it to --init of a new run')
    new = plain(args)
    old = {**{k: v for k, v in YOUNGER.items() if k in new}, **state[flags]}
    if new.get('minutes') is not None:                          # its number of steps was frozen when it started
        new['iters'] = old['iters']
    if new.get('init') and new.get('init_range') is None:        # what the run that it started from said
        new['init_range'] = args.init_range = old.get('init_range')
    if old['script'] != args.script:
        fail(f'--out {out}: holds a run of {script_name(old["script"])}; choose another --out')
    if (old.get('dtype') == 'pure-bf16') != (args.dtype == 'pure-bf16'):
        fail(f'--dtype {args.dtype}: the run in {out} was trained with {old["dtype"]}, which keeps other weights; choose another --out')
    changed = [k for k in sorted({*old, *new} - FREE) if old.get(k) != new.get(k)]
    if changed:
        told = ', '.join(f'--{k.replace("_", "-")} {new.get(k)} (was {old.get(k)})' for k in changed[:4])
        fail(f'--out {out}: holds a run with other flags: {told}; choose another --out, or repeat its flags')
    args.iters = old['iters']
    return state


def plain(args):
    """The flags as JSON-able values, for the checkpoint and args.json."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


plain_name = lambda key: key.replace('parametrizations.weight.original', 'weight')


def plain_names(weights):
    """A state dict under the names of a network without --sparse24."""
    return {plain_name(k): v for k, v in weights.items() if not k.endswith('parametrizations.weight.0.dense')}


def inflate(weights):
    """A 2D network's state dict for the same network in 3D: each kernel in the middle slice of a 3D one, zeros before and behind it.

    A volume that does not change along z becomes the 2D network's slice at every z, borders too: no tap sees another slice, norms see D
    times the same values, attention D copies of each key, strided convolutions skip slices like those they keep. (Of other volumes it
    does not hold: norms and attention join the slices, deeper levels see every second one. Kernels repeated along z and divided by 3, as
    Carreira 2017 inflates, would fail at the borders too.)
    """
    deep = lambda w: F.pad(w[:, :, None], (0,) * 4 + (w.shape[-1] // 2,) * 2)
    return {k: deep(v) if v.ndim == 4 else v for k, v in weights.items()}


def load_init(net, args):
    """Starts net from --init FILE: a run of ours (its EMA) or a MONAI state dict. Fails when the shapes do not fit."""
    state, theirs = load_checkpoint(args.init), None
    if not isinstance(state, dict):
        fail(f'--init {args.init}: holds a {type(state).__name__}; expected a run of ours or a MONAI state dict')
    if {'args', 'ema', 'in_channels'} <= state.keys():
        weights, theirs = state['ema'], {**YOUNGER, **state['args']}
        for name in ('init_target', 'init_range'):
            if getattr(args, name) is not None:
                fail(f'--{name.replace("_", "-")}: is for a MONAI state dict; {args.init} is a run of ours and says it itself, leave the flag away')
        for name in ('model', 'rflow', 'target', 'heads', 'head_channels', 'norm_groups'):
            if theirs[name] != getattr(args, name):
                fail(f'--init {args.init}: was trained with {name} {theirs[name]}, this run has {getattr(args, name)}; make them agree')
        if bool(theirs['volume']) == (not args.volume or bool(args.inflate)):
            fail(f'--init {args.init}: was trained with --volume {theirs["volume"]}, this run has {args.volume}; a run on slices is made 3D by --inflate RUN')
        if list(theirs['dual'] or ()) != list(getattr(args, 'dual', None) or ()):
            fail(f'--init {args.init}: was trained with dual {theirs["dual"]}, this run has {getattr(args, "dual", None)}; make them agree')
        args.init_range = theirs.get('init_range')
        behind = [['mask-present'] * bool(a['p_uncond']) + ['neighbour'] * a.get('neighbours', 0) for a in (theirs, vars(args))]
        if 'neighbour' in sum(behind, []) and behind[0] != behind[1][:len(behind[0])]:           # channels of another meaning, if as many
            fail(f'--init {args.init}: was trained with p_uncond {theirs["p_uncond"]:g}, neighbours {theirs["neighbours"]}; make them agree')
    else:
        if not args.init_target:
            fail(f'--init {args.init}: is not a run of ours; say what it predicts with --init-target eps|v|x0|x0-eps')
        for key in ('state_dict', 'model_state_dict', 'unet_state_dict', 'model'):
            state = state[key] if isinstance(state.get(key), dict) else state
        try:
            weights = load_monai({k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in state.items() if torch.is_tensor(v)})
        except (KeyError, ValueError, AttributeError) as e:
            fail(f'--init {args.init}: is no state dict of MONAI\'s DiffusionModelUNet (at {e})')
        if args.init_target == 'x0-eps' and 'out.2.weight' in weights:                        # MONAI's RFlow predicts x_0 - eps: turn the last layer round
            weights['out.2.weight'], weights['out.2.bias'] = -weights['out.2.weight'], -weights['out.2.bias']
    for k in [k for k in weights if k.endswith('parametrizations.weight.original')] if not args.sparse24 else ():
        if not weights[k.replace('original', '0.dense')]:                                     # the network that was trained, without what its masks hid
            weights[k] = weights[k] * TwoFour().mask(weights[k])
    weights = inflate(plain_names(weights)) if args.inflate else plain_names(weights)
    if theirs and args.model == 'unet' and [*theirs['channels']] == [*args.channels] and len(weights.get('conv_in.weight', args.channels)) != args.channels[0]:
        if args.sparse24:
            fail(f'--init {args.init}: lacks pruned channels, and --sparse24 would prune it again; leave one of them away')
        fit_pruned(net, weights, f'--init {args.init}')
    mine, key, pixels = plain_names(net.state_dict()), *(('conv_in.weight', 1) if args.model == 'unet' else ('embed.weight', args.patch ** (3 if args.volume else 2)))
    first, want = weights.get(key), mine[key].shape[1] // pixels - (3 if args.crop else 0)
    more = 0 if first is None or first.ndim != mine[key].ndim else want - first.shape[1] // pixels
    if 0 < more <= (args.p_uncond > 0) + getattr(args, 'neighbours', 0):                      # mask-present and neighbours start without effect
        weights[key] = F.pad(first.unflatten(1, (pixels, -1)), (0, 0) * (first.ndim - 2) + (0, more)).flatten(1, 2)
    if args.crop and first is not None and first.ndim == 5 and weights[key].shape[1] == want:
        weights[key] = F.pad(weights[key], (0,) * 7 + (3,))                                   # so do coordinates
    for k in [k for k in mine if k == 'null' or k.startswith('extra_embed.') and args.slice_level]:
        weights.setdefault(k, mine[k])                                  # MMDiT's, of a run without --p-uncond; the slice level starts without effect
    wrong = [f'{k} is {tuple(weights[k].shape) if k in weights else "missing"}, here {tuple(v.shape)}' for k, v in mine.items()
             if k not in weights or weights[k].shape != v.shape] + [f'{k} has no place here' for k in weights if k not in mine]
    if wrong:
        fail(f'--init {args.init}: does not fit this network: {wrong[0]} ({len(wrong)} in all); adapt '
             + ', '.join(f'--{n.replace("_", "-")}' for n in (*MODELS[args.model], 'slice_level', 'controllable')))
    net.load_state_dict({k: weights.get(plain_name(k), v) for k, v in net.state_dict().items()})
    print0(f'init: {len(mine)} tensors from {args.init}')


def load_run(path, device='cpu', dtype='fp32', weights='ema'):
    """A trained network for any script: net (eval), process, args, step, box, spacing, levels, hash. path: run folder or checkpoint.

    weights: ema, raw, or a number: that far from raw (0) to ema (1), the LoRA scale of a run of draft.py. spacing: median pixel (y, x),
    of a volume (z, y, x), in mm of the training slices. hash: of the weights, for manifests. seen: patients_seen, none: it does not say.
    """
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not {'args', 'ema', 'box', 'in_channels'} <= state.keys():
        fail(f'{path}: is not a run of train_seg.py or train_bravo.py')
    if state['args'].get('vae'):
        fail(f'{path}: is an autoencoder; it is used by an image model trained with train_bravo.py --latent {path}')
    args = argparse.Namespace(**{**YOUNGER, **state['args']})
    net = build_net(args, state['in_channels'], state['out_channels'], state['extra_dim'])
    tensors = state['ema'] if weights == 'ema' else state.get('net')
    if tensors is None:
        fail(f'{path}: holds no raw weights; use --weights ema, and no --lora-scale')
    fit_pruned(net, tensors, path)
    if weights not in ('ema', 'raw'):
        tensors = {k: v.lerp(state['ema'][k], weights) if v.is_floating_point() else v for k, v in tensors.items()}
    net.load_state_dict(tensors)
    args.dtype, process = dtype, build_process(args)
    process.space = Space(state.get('space'), args.volume, state['out_channels']).to(device)
    return argparse.Namespace(net=channels_last(net.to(device)).eval(), process=process,
                              args=args, step=state['step'], box=tuple(state['box']), spacing=tuple(state['spacing']),
                              hash=weights_hash(tensors), path=str(path), seen=state.get('seen'), levels=state.get('levels'))


def checked(recent, done, args):
    """The losses of the steps up to `done`, averaged over processes, as numbers. Stops the run when one is none."""
    values = torch.stack(recent)
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    values = values.tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            at = done - len(values) + i
            fail(f'loss is {value} at step {at}, lr {lr_at(at, args):.2e}; stopped, the last checkpoint in {args.out} is '
                 'intact. Try a lower --lr', 1)
    return values


LOSS_BINS = torch.linspace(-10, 10, 21)               # of log-SNR; the outermost are open


REGIONS = ('all', 'tumour', 'background')


class LossByT:
    """Unweighted squared error by log-SNR and region: sums and counts, training and held-out, kept through a resume."""

    def __init__(self, device):
        self.sums = torch.zeros(2, 3, 2, len(LOSS_BINS) - 1, dtype=torch.float64, device=device)   # (train|held-out, region, sum|count, bin)

    def add(self, which, log_snr, square, mask=None):
        """square (B,C,...) of images at log_snr (B,); mask (B,1,...) in {0,1} splits each into tumour, where it has one, and the rest."""
        bins = torch.bucketize(log_snr, LOSS_BINS.to(log_snr.device)[1:-1])
        means = [square.flatten(1).mean(1)]
        if mask is not None:
            means += [(square * m).flatten(1).sum(1) / (m.flatten(1).sum(1) * square.shape[1]) for m in (mask, 1 - mask)]
        for region, error in enumerate(means):
            there = ~error.isnan() if region else torch.ones_like(error, dtype=torch.bool)             # nan: an image without a tumour
            self.sums[which, region, 0].index_add_(0, bins, torch.where(there, error, 0).double())
            self.sums[which, region, 1].index_add_(0, bins, there.double())

    def held_out(self):
        """Mean held-out error over all t."""
        return float(self.sums[1, 0, 0].sum() / self.sums[1, 0, 1].sum())

    def merge(self):
        """Brings the processes' sums together in the first one."""
        if world() > 1:
            dist.reduce(self.sums, 0)
            self.sums *= rank() == 0

    def write(self, path):
        total = self.sums.cpu()
        rows = [(name, region, f'{LOSS_BINS[b]:g}', f'{LOSS_BINS[b + 1]:g}', int(total[i, r, 1, b]), float(total[i, r, 0, b] / total[i, r, 1, b]))
                for i, name in enumerate(('train', 'held-out')) for r, region in enumerate(REGIONS) for b in range(len(LOSS_BINS) - 1)
                if total[i, r, 1, b] > 0]
        write_csv(path, ['set', 'region', 'log_snr_low', 'log_snr_high', 'count', 'mean_squared_error'], rows)


class Log:
    """log.csv: one line a report, flushed; on resume the lines after the checkpoint's step are dropped."""

    def __init__(self, path, header, step):
        self.path, self.header = Path(path), header
        rows = [r for r in read_csv(path) if int(r['step']) <= step] if self.path.exists() and step else []
        write_csv(path, header, [[r.get(h, '') for h in header] for r in rows])

    def add(self, **row):
        with open(self.path, 'a') as f:
            f.write(','.join(f'{row[h]:.6g}' if isinstance(row.get(h), float) else str(row.get(h, '')) for h in self.header) + '\n')

    @classmethod
    def start(cls, args, data, header, step):
        """Writes what a run folder holds from the start (args.json, split.csv) and opens its log."""
        out = Path(args.out)
        atomic_write(out / 'args.json', json.dumps(plain(args), indent=1).encode())
        write_csv(out / 'split.csv', ['patient', 'part', 'slices'], sorted(
            (name, part, n) for (name, part), n in Counter((r['patient'], p) for r, p in zip(data.table, data.part)).items()))
        return cls(out / 'log.csv', header, step)

    def curve(self, name):
        rows = [(int(r['step']), float(r[name])) for r in read_csv(self.path) if r[name]]
        return [r[0] for r in rows], [r[1] for r in rows]


class VGG16(nn.Module):
    """ImageNet VGG16 features and the LPIPS distance (Simonyan 2015; Zhang 2018). Frozen, fp32.

    file: torchvision's names (features.0.weight ...); none: torchvision's file is fetched; False: weights follow. heads: LPIPS linear heads
    (lin0.model.1.weight ...); none: the five layers' distances are added unweighted. depth: so many of its modules (23: to relu4_3).
    """

    LAYERS = (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512)
    TAPS = (3, 8, 15, 22, 29)                               # relu1_2, 2_2, 3_3, 4_3, 5_3
    URL = 'https://download.pytorch.org/models/vgg16-397923af.pth'

    def __init__(self, file=None, heads=None, depth=30):
        super().__init__()
        layers, c = [], 3
        for width in self.LAYERS:
            layers += [nn.MaxPool2d(2)] if width == 'M' else [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            c = c if width == 'M' else width
        self.features = nn.Sequential(*layers[:depth])
        if file is False:
            state = self.state_dict()
        elif file is None:
            try:
                state = torch.hub.load_state_dict_from_url(self.URL, map_location='cpu', weights_only=True)
            except Exception as e:
                fail(f'--perceptual: no --perceptual-weights FILE, and {self.URL} cannot be fetched ({type(e).__name__})')
        else:
            state = load_checkpoint(file)
        wanted = self.features.state_dict(prefix='features.')
        if not isinstance(state, dict) or not all(k in state and state[k].shape == v.shape for k, v in wanted.items()):
            fail(f'VGG16 weights {file}: lacks convolutions of VGG16 under torchvision\'s names (features.0.weight ...)')
        self.load_state_dict({k: state[k] for k in wanted})
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.heads = bool(heads)
        if heads:
            state = load_checkpoint(heads)
            if not isinstance(state, dict) or not all(f'lin{i}.model.1.weight' in state for i in range(5)):
                fail(f'--lpips-weights {heads}: lacks lin0.model.1.weight ... lin4.model.1.weight')
            for i in range(5):
                self.register_buffer(f'head{i}', state[f'lin{i}.model.1.weight'].float().view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x):
        """x (B,1,H,W) in [-1,1] -> the five feature maps."""
        x = ((x.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std
        out = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                out.append(x)
        return out

    def distance(self, x, y):
        """LPIPS between x and y (B,1,H,W) in [-1,1]: (B,). Channels of more than one are averaged by the caller."""
        total = 0
        for i, (a, b) in enumerate(zip(self(x), self(y))):
            a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
            d = (a - b).square()
            d = d * getattr(self, f'head{i}') if self.heads else d
            total = total + d.sum(1).mean((1, 2))
        return total


# ---------------------------------------------------------------------------------------------------------------------
# 9  Detector
# ---------------------------------------------------------------------------------------------------------------------
CLASSES = ('anatomical', 'textural', 'boundary', 'intensity', 'artefact', 'conditioning')       # defined in classifier.py
LABELS = ('rater', 'item', 'set', 'folder', 'verdict', 'class', 'severity', 'seconds', 'repeat', 'time')
# labels.csv in a label run: one line an answer. set: the directory, folder: the patient folder in it; verdict: good | bad |
# unsure; class (of CLASSES, or empty: none of them) and severity 1 to 3 only where bad; repeat 0 or 1; a later line of a rater, item, repeat wins (undo).


def read_answers(folders):
    """Answers of label folders, one for each rater, image and repeat (the last counts): dicts of LABELS, and z, the slice."""
    out = []
    for folder in map(Path, folders):
        rows = read_csv(folder / 'labels.csv')
        if not rows or not {*LABELS} <= rows[0].keys():
            fail(f'--answers {folder}: its labels.csv holds ' + (f'other columns than {",".join(LABELS)}' if rows else 'no answer'))
        z = {r['item']: int(r['z']) for r in read_csv(folder / 'items.csv')} if (folder / 'items.csv').exists() else {}
        out += [dict(r, z=z.get(r['item'], 0)) for r in {(r['rater'], r['item'], r['repeat']): r for r in rows}.values()]
    wrong = [r for r in out if r['verdict'] not in ('good', 'bad', 'unsure') or r['class'] not in ('', *CLASSES)]
    if wrong:
        fail(f'--answers {" ".join(map(str, folders))}: verdict {wrong[0]["verdict"]!r}, class {wrong[0]["class"]!r}; expected good, bad, unsure and {", ".join(CLASSES)}')
    return out


def reading_order(items, again, g):
    """(item, repeat) of all items in an order that g draws, a share of them a second time, at least 20 other images later."""
    n = len(items)
    items, gap = [sorted(items)[i] for i in torch.randperm(n, generator=g).tolist()], min(20, n // 2)
    twice = torch.randperm(n - gap, generator=g)[:round(again * n)].tolist()
    later = [(p + gap + 0.5 + float(torch.rand((), generator=g)) * (n - gap - p), items[p], 1) for p in twice]
    return [(item, repeat) for _, item, repeat in sorted([*((i, item, 0) for i, item in enumerate(items)), *later])]


READINGS = ('reader', 'order', 'item', 'repeat', 'answer', 'confidence', 'ms', 'time')       # columns of a reader study's answers


def study_order(study, reader):
    """(item, repeat, turned) in the order of a reader, from the study's seed and the name: practice, then each kind of question, a tenth
    of its items twice. turned: whether a pair shows its pictures the other way round; others never do."""
    g, items = generator(study['seed'], 'reader', reader), study['items']
    order = [(i, 0) for i in sorted(items, key=lambda i: (study['kinds'].index(items[i]['kind']), i)) if items[i]['practice']]
    for kind in study['kinds']:
        order += reading_order([i for i, v in items.items() if v['kind'] == kind and not v['practice']], 0.1, g)
    return [(item, repeat, bool(u < 0.5) and items[item]['kind'] == 'pair') for (item, repeat), u in zip(order, torch.rand(len(order), generator=g))]


class Detector(nn.Module):
    """Is an image distorted, and how? (B,2,S,S): image in [-1,1] and mask in {0,1} -> (B,7) logits: bad, then CLASSES given bad.

    Sees also the image less its 3 x 3 mean, the fine structure. Blocks of 2 x 2 pixels become channels (nothing is lost), residual
    blocks at S/2, S/4 and S/8, then mean, maximum and deviation over the positions, so that any S works. BatchNorm, because
    GroupNorm takes away an image's own contrast and energy, which is what many faults change.
    """

    def __init__(self, channels=(32, 64, 64)):
        super().__init__()
        self.stem, self.stages, c = nn.Conv2d(12, channels[0], 3, padding=1), nn.ModuleList(), channels[0]
        for i, width in enumerate(channels):
            self.stages.append(nn.ModuleDict(dict(
                down=nn.Identity() if i == 0 else nn.Conv2d(c, width, 3, stride=2, padding=1),
                norm1=nn.BatchNorm2d(width), conv1=nn.Conv2d(width, width, 3, padding=1),
                norm2=nn.BatchNorm2d(width), conv2=nn.Conv2d(width, width, 3, padding=1))))
            c = width
        self.norm, self.out = nn.BatchNorm2d(c), nn.Linear(3 * c, 1 + len(CLASSES))

    def forward(self, x):
        fine = x[:, :1] - F.avg_pool2d(x[:, :1], 3, 1, 1, count_include_pad=False)
        x = torch.cat([x, 5 * fine], 1)
        h = self.stem(F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode='replicate'), 2))
        for s in self.stages:
            h = s['down'](h)
            h = h + s['conv2'](F.silu(s['norm2'](s['conv1'](F.silu(s['norm1'](h))))))
        h = F.silu(self.norm(h))
        return self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3)), (h.var((2, 3), correction=0) + 1e-4).sqrt()], 1))


class Probe(nn.Module):
    """The same question put to frozen ImageNet features: (B,2,S,S) -> (B,7) logits. Mean and deviation over the positions of VGG16's relu3_3
    and relu4_3, the same for an image and its mirror image, then one linear layer. Blind to the mask; of the kind of fault it says only
    how often each was named. For hundreds of answers, of which a network of one's own cannot learn. file: of VGG16's weights.
    """

    def __init__(self, file=False):
        super().__init__()
        self.vgg, self.out = VGG16(file, depth=23), nn.Linear(2 * (256 + 512), 1 + len(CLASSES))

    def describe(self, images):
        """(B,1,S,S) in [-1,1] -> (B,1536)."""
        sides = [torch.cat([v for f in self.vgg(x)[2:] for v in (f.mean((2, 3)), (f.var((2, 3)) + 1e-4).sqrt())], 1) for x in (images, images.flip(-1))]
        return (sides[0] + sides[1]) / 2

    def forward(self, x):
        return self.out(self.describe(x[:, :1]))


def load_detector(path, device='cpu'):
    """A detector of classifier.py train (a run folder or a checkpoint): net (eval, frozen), temperature, threshold on p(bad), prior
    (share of bad images that p(bad) assumes), part (whose patients it learned from: train selects, judge reports), args, hash, path."""
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not {'best', 'temperature', 'threshold', 'prior', 'box', 'args'} <= state.keys():
        fail(f'{path}: is not a detector; expected a run of classifier.py train')
    if state['temperature'] is None:
        fail(f'{path}: is an unfinished detector (step {state["step"]}); run its classifier.py train command again, it goes on')
    args = argparse.Namespace(**state['args'])
    net = Probe() if getattr(args, 'probe', None) else Detector()
    try:
        net.load_state_dict(state['best'])
    except RuntimeError as e:
        fail(f'{path}: its weights do not fit this version\'s detector ({str(e).splitlines()[-1].strip()}); train it again')
    digest = weights_hash(state['best'])
    return argparse.Namespace(net=net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), hash=digest,
                              temperature=float(state['temperature']), threshold=float(state['threshold']), prior=float(state['prior']),
                              part=args.part, box=tuple(state['box']), args=args, path=str(path))


def detector_logits(detector, images, masks):
    """Calibrated logits (B,7) of images (B,1,H,W) in [-1,1] with masks (B,1,H,W) in {0,1}: p(bad) = sigmoid of the first,
    softmax of the others the classes given bad. Differentiable in the images; brought to the detector's size where H differs."""
    size = detector.args.size
    if images.shape[2:] != (size, size):
        images = F.interpolate(images, (size, size), mode='bilinear', antialias=True)
        small = [shrink_mask(m, size, 1.0, 0.0)[0] for m in masks.detach().cpu().numpy()[:, 0]]         # the rule it was trained with
        masks = torch.tensor(np.stack(small))[:, None]
    return detector.net(torch.cat([images.float(), masks.to(images.device, torch.float32)], 1)) / detector.temperature
