"""Finds the distorted images: makes them, has them labelled, learns to see them, scores a set.

  python classifier.py corrupt --data DIR                       six families of graded faults in real images, as a labelled set
  python classifier.py label --sets runs/synthetic              a page in your browser; every answer is on disk at once
  python classifier.py label --study runs/readers               the page of a blinded reader study (evaluate.py readers plan)
  python classifier.py train --data DIR --answers runs/label    the detector that selects (--part judge: the one that reports)
  python classifier.py score --data runs/synthetic --detector runs/detector
  python classifier.py train --minutes 1                        the built-in phantom, corruptions only

A detector knows real slices as good, faults made anew every step as bad, and whatever people said about generated images.
Two are needed: one that selects, from training patients, and one that reports, from judge patients, with another seed.
"""
import base64, fcntl, http.server, secrets, threading
from datetime import datetime, timezone
from urllib.parse import parse_qs, urlsplit

from torch.optim.swa_utils import update_bn

from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    for name, told in (('corrupt', 'real images with faults of six families, as a labelled set'), ('label', 'a page to judge images in the browser'),
                       ('train', 'the detector of distorted images'), ('score', 'what a detector says about a set')):
        c = commands.add_parser(name, help=told)
        g = c.add_argument_group('data')
        if name == 'label':
            g.add_argument('--sets', nargs='+', metavar='DIR', help='generated sets or real patients, shown mixed and blind')
            g.add_argument('--study', metavar='DIR', help='instead: serve the study that evaluate.py readers plan left there')
            g.add_argument('--n', type=number(int, 1), default=500, help='images at most, drawn at random')
        else:
            g.add_argument('--data', nargs='+', required=name == 'score', metavar='DIR', help='folders with one folder a patient'
                           + ('' if name == 'score' else '; none: the built-in phantom'))
        if name in ('corrupt', 'train'):
            g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
            g.add_argument('--labels', type=numbers(int, 1), help='mask labels that count as tumour; none: all above 0')
            g.add_argument('--empty-slices', type=number(float, 0, 1), default=0.2, help='share of slices without tumour')
            g.add_argument('--size', type=number(int, 16, 1024), default=64, help='pixels a side')
        if name == 'corrupt':
            g.add_argument('--part', choices=tuple(PARTS), default='train', help='whose slices')
            g.add_argument('--n', type=number(int, 1), default=40, help='slices; each is written whole and with every family and severity')
            g.add_argument('--severities', type=numbers(float, 0, 3), default=(1.0, 2.0, 3.0), help='0 none, 1 slight, 2 clear, 3 gross')
        if name == 'label':
            g.add_argument('--size', type=number(int, 16, 1024), help='pixels a side; none: those of the first generated set, else 128')
            g = c.add_argument_group('labelling')
            g.add_argument('--rater', type=rater_name, help='who judges; none: the page asks')
            g.add_argument('--again', type=number(float, 0, 1), default=0.1, help='share of images shown twice, for self-agreement')
            g.add_argument('--port', type=number(int, 0, 65535), default=0, help='on 127.0.0.1; 0: a free one')
        if name == 'train':
            g.add_argument('--answers', nargs='+', default=(), metavar='DIR', help='folders with a labels.csv: of label, of corrupt')
            g.add_argument('--part', choices=('train', 'judge'), default='train', help='whose slices: train selects, judge reports')
            g.add_argument('--leave-out', nargs='+', choices=CLASSES, default=(), help='families to train without, and test on')
            g.add_argument('--probe', metavar='FILE', help='VGG16 weights: a linear layer on their frozen features, of the judged images alone; seconds')
            g = c.add_argument_group('training')
            g.add_argument('--iters', type=number(int, 1), help='optimiser steps')
            g.add_argument('--minutes', type=number(float, 0, open_low=True), help='length by time: 20 steps are timed, then it is fixed; none: 5')
            g.add_argument('--batch-size', type=number(int, 4), default=32, help='half of them bad')
            g.add_argument('--lr', type=number(float, 0, open_low=True), default=2e-3, help='peak learning rate')
            g.add_argument('--warmup', type=number(int, 0), default=50, help='steps of linear warm-up')
            g.add_argument('--weight-decay', type=number(float, 0), default=0.05, help='of AdamW')
            g.add_argument('--clip', type=number(float, 0, open_low=True), default=1.0, help='gradient norm')
            g.add_argument('--ema-decay', type=number(float, 0, 1), default=0.99, help='of the weight average')
            g.add_argument('--patience', type=number(int, 1), default=20, help='stop after so many validations without a better one')
            g.add_argument('--val-every', type=number(int, 1), default=100, help='steps between validations')
            g.add_argument('--target-tpr', type=number(float, 0, 1, open_low=True), default=0.9, help='share of bad validation images that the threshold catches')
            g.add_argument('--test-slices', type=number(int, 8), default=150, help='real test slices, each also with every family and severity')
            g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws of patients')
        if name == 'score':
            g.add_argument('--detector', required=True, metavar='RUN', help='run of classifier.py train')
            g.add_argument('--threshold', type=number(float, 0, 1), help='p(bad) from which an image is bad; none: the detector\'s')
            g.add_argument('--prior', type=number(float, 0, 1, open_low=True), help='share of bad images to expect; none: that of the detector\'s validation')
        g = c.add_argument_group('run')
        g.add_argument('--out', default=dict(corrupt='runs/corrupt', label='runs/label', train='runs/detector', score='runs/score')[name], metavar='DIR')
        g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
        if name != 'score':
            g.add_argument('--seed', type=number(int, 0), default=0)
        if name in ('train', 'score'):
            g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    args = p.parse_args(argv)
    for flag in ('data', 'sets', 'answers'):
        for root in getattr(args, flag, None) or ():
            if not Path(root).is_dir():
                fail(f'--{flag} {root}: no such folder' + ('' if flag == 'answers' else '; give a folder that holds one folder a patient'))
            if flag == 'answers' and not (Path(root) / 'labels.csv').is_file():
                fail(f'--answers {root}: holds no labels.csv; give a folder of classifier.py label or corrupt')
            if flag == 'data' and args.command in ('corrupt', 'train') and (Path(root) / 'manifest.csv').exists():
                fail(f'--data {root}: is a generated set, which is neither real nor known to be good; label it, then --answers')
    if args.command == 'label':
        if bool(args.sets) == bool(args.study):
            fail('label: one of --sets and --study is required')
        if args.study and not (Path(args.study) / 'study.json').is_file():
            fail(f'--study {args.study}: holds no study.json; give a folder of evaluate.py readers plan')
        if args.study and (args.n, args.size, args.again, args.seed, args.out) != (500, None, 0.1, 0, 'runs/label'):
            fail('--study: was planned with its own images, order and folder; leave --n, --size, --again, --seed and --out away')
        args.out = args.study or args.out
    if getattr(args, 'split', None) and not Path(args.split).is_file():
        fail(f'--split {args.split}: no such file; expected a CSV with columns patient,part')
    check_out(args.out)
    if args.command == 'corrupt' and Path(args.out).exists() and any(Path(args.out).iterdir()):
        fail(f'--out {args.out}: is not empty; give a new folder')
    if args.command == 'train':
        if args.probe and not Path(args.probe).is_file():
            fail(f'--probe {args.probe}: no such file; expected VGG16 weights under torchvision\'s names')
        if args.probe and (not args.answers or args.iters or args.minutes or args.leave_out):
            fail('--probe: learns at once, of judged images alone; give --answers, leave --iters, --minutes and --leave-out away')
        if args.iters and args.minutes:
            fail('--iters and --minutes both set the length; give one')
        if not args.iters and not args.minutes:
            args.minutes = 5.0
        if set(CLASSES) == set(args.leave_out):
            fail('--leave-out: leaves no family to train with')
        args.script = 'detector'
    if args.command == 'score' and args.prior == 1:
        fail('--prior 1.0: must be below 1')
    args.dtype = 'fp32'
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions: one function a family. image (S,S) in [-1,1], mask (S,S) in {0,1}, s in (0,1], g a generator -> image, kind.
# What is random is drawn first and s only scales it, so that the same seed at a higher severity is the same fault, worse.
# ---------------------------------------------------------------------------------------------------------------------
DEFINITIONS = {
    'anatomical': 'The shape of the brain is wrong: head bent or dented, ventricles missing, doubled or in the wrong place, no midline.',
    'textural': 'The shapes are right, the fine structure is not: blurred, waxy, grainy or torn, no folds, no grey and white matter.',
    'boundary': 'The outer edge is wrong: skull or scalp with a gap, bitten off, frayed, or drawn twice.',
    'intensity': 'Brightness or contrast is wrong: too dark, too bright, flat, burnt out, uneven, or turned round in one region.',
    'artefact': 'A pattern that no anatomy makes: checkerboard, stripes, rings along edges, ghost of the head, blocks.',
    'conditioning': 'The image does not fit its mask: no tumour where the outline is, one elsewhere, or of another size.'}


def pick(g, *choices):
    return choices[int(torch.randint(len(choices), (), generator=g))]


def rand(g, low, high):
    return low + (high - low) * float(torch.rand((), generator=g))


def soften(a, sigma):
    """Gaussian blur of a (S,S), sigma in pixels, edges repeated."""
    r = max(1, math.ceil(3 * sigma))
    k = torch.exp(-(torch.arange(-r, r + 1.0) / max(sigma, 1e-3)) ** 2 / 2)
    k = (k / k.sum())[None, None, None]
    a = F.conv2d(F.pad(a[None, None], (r, r, 0, 0), mode='replicate'), k)
    return F.conv2d(F.pad(a, (0, 0, r, r), mode='replicate'), k.transpose(2, 3))[0, 0]


def field(size, cells, g):
    """Smooth noise (S,S) whose structures are 1/cells of the side wide, largest value 1 or -1."""
    noise = smooth_noise((1, size, size), (1, cells, cells), g)[0]
    return noise / noise.abs().max()


def places(size):
    return torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing='ij')


def displaced(a, dy, dx):
    """a (S,S) read at each pixel's place plus dy, dx (pixels), bilinear."""
    y, x = places(len(a))
    grid = torch.stack([(x + dx + 0.5), (y + dy + 0.5)], -1) / len(a) * 2 - 1
    return F.grid_sample(a[None, None], grid[None], padding_mode='border', align_corners=False)[0, 0]


def head_of(image):
    """Head (S,S) in {0,1} (everything, where there is none), its centre y, x and its radius in pixels."""
    head = torch.from_numpy(head_mask(image[None].numpy())[0]).float()
    head = head if head.any() else torch.ones_like(head)
    y, x = places(len(image))
    return head, float((head * y).sum() / head.sum()), float((head * x).sum() / head.sum()), math.sqrt(float(head.sum()) / math.pi)


def anatomical(image, mask, s, g):
    S, (y, x), (head, cy, cx, R) = len(image), places(len(image)), head_of(image)
    kind = pick(g, 'warp', 'swirl', 'dent', 'double', 'fill')
    keep = (1 - 1.5 * soften(mask, S / 24)).clamp(0, 1)                  # the tumour stays where the mask says
    if kind == 'warp':
        return displaced(image, 0.11 * s * S * field(S, 4, g) * keep, 0.11 * s * S * field(S, 4, g) * keep), kind
    if kind == 'swirl':
        turn, at = rand(g, 0, 2 * math.pi), rand(g, 0.2, 0.5) * R
        py, px = y - cy - at * math.sin(turn), x - cx - at * math.cos(turn)
        a = pick(g, -1, 1) * 2.4 * s * (1 - (py.square() + px.square()).sqrt() / (0.75 * R)).clamp(min=0) * keep
        return displaced(image, a.sin() * px + (a.cos() - 1) * py, (a.cos() - 1) * px - a.sin() * py), kind
    if kind == 'dent':
        theta, bend = torch.atan2(y - cy, x - cx), 0
        for k in (2, 3, 4):
            bend = bend + rand(g, 0.4, 1) * torch.cos(k * theta + rand(g, 0, 2 * math.pi)) / k
        bend = 0.5 * s * bend * keep
        return displaced(image, bend * (y - cy), bend * (x - cx)), kind
    if kind == 'double':                                                 # what lies in the middle, a second time beside it
        turn, far = rand(g, 0, 2 * math.pi), rand(g, 0.4, 0.65) * R
        dy, dx = far * math.sin(turn), far * math.cos(turn)
        where = torch.sigmoid((0.42 * R - ((y - cy - dy).square() + (x - cx - dx).square()).sqrt()) / (S / 50)) * keep
        return image + s * where * (displaced(image, torch.tensor(-dy), torch.tensor(-dx)) - image), kind
    where = torch.sigmoid((0.6 * R - ((y - cy).square() + (x - cx).square()).sqrt()) / (S / 32)) * keep
    tissue = torch.quantile(image[where > 0.5] if (where > 0.5).any() else image, 0.6)
    return image + s * where * (tissue - image).clamp(min=0), kind       # the dark ventricles filled with tissue


def textural(image, mask, s, g):
    S, head = len(image), head_of(image)[0]
    kind = pick(g, 'blur', 'wax', 'scatter', 'grain')
    if kind == 'blur':
        return soften(image, s * S / 32), kind
    if kind == 'wax':                                                    # a median filter leaves edges and takes the texture
        k = 2 * max(1, round(S / 26)) + 1
        patches = F.unfold(F.pad(image[None, None], (k // 2,) * 4, mode='replicate'), k)[0]
        return image + s * (patches.median(0).values.view(S, S) - image), kind
    if kind == 'scatter':
        return displaced(image, *(0.03 * s * S * (2 * torch.rand(2, S, S, generator=g) - 1) * soften(head, 1))), kind
    return image + 0.9 * s * field(S, max(4, S // 3), g) * (image + 1) * soften(head, 1), kind


def boundary(image, mask, s, g):
    S, (y, x), (head, cy, cx, R) = len(image), places(len(image)), head_of(image)
    kind = pick(g, 'frayed', 'bite', 'twice', 'gap')
    inside = soften(head, S / 20)
    edge, theta = 4 * inside * (1 - inside), torch.atan2(y - cy, x - cx)
    turn = rand(g, -math.pi, math.pi)
    if kind == 'frayed':
        push = 0.16 * s * S * field(S, max(4, S // 6), g) * edge
        return displaced(image, push * torch.sin(theta), push * torch.cos(theta)), kind
    if kind == 'bite':                                                   # its centre on the edge of the head
        ray = head * ((theta - turn + math.pi) % (2 * math.pi) - math.pi).abs().lt(0.15)
        far = float((ray * ((y - cy).square() + (x - cx).square()).sqrt()).max()) or R
        d = ((y - cy - far * math.sin(turn)).square() + (x - cx - far * math.cos(turn)).square()).sqrt()
        return image + (-1 - image) * torch.sigmoid(((0.1 + 0.45 * s) * R - d) / (S / 40)), kind
    if kind == 'twice':                                                  # a second, larger outline around the first
        larger = displaced(image, (cy - y) * 0.14, (cx - x) * 0.14)
        return torch.maximum(image, image + s * (larger - image) * (1 - soften(head, S / 80))), kind
    width = 0.35 + 0.9 * s
    sector = torch.sigmoid((width - ((theta - turn + math.pi) % (2 * math.pi) - math.pi).abs()) / 0.1)
    return image + (-1 - image) * (0.4 + 0.6 * s) * sector * edge.clamp(0, 1) ** 0.5, kind


def intensity(image, mask, s, g):
    S, (y, x), (head, cy, cx, R) = len(image), places(len(image)), head_of(image)
    kind = pick(g, 'gamma', 'bias', 'burnt', 'flat', 'inverted')
    if kind == 'gamma':
        return ((image + 1) / 2) ** math.exp(pick(g, -1.1, 1.1) * s) * 2 - 1, kind
    if kind == 'bias':
        return (image + 1) * torch.exp(1.3 * s * field(S, 2, g)) - 1, kind
    middle = image[head > 0].median()
    if kind == 'burnt':
        return image + 3 * s * (image - middle) * soften(head, 1), kind
    if kind == 'flat':
        return image - 0.85 * s * (image - middle) * soften(head, 1), kind
    turn, at = rand(g, 0, 2 * math.pi), rand(g, 0, 0.5) * R
    d = ((y - cy - at * math.sin(turn)).square() + (x - cx - at * math.cos(turn)).square()).sqrt()
    where = torch.sigmoid((rand(g, 0.35, 0.6) * R - d) / (S / 32)) * head
    return image + 2 * s * where * ((where * image).sum() / where.sum().clamp(min=1e-6) - image), kind


def checkerboard(size, period):
    """Fields of 1 and -1, period/2 pixels wide."""
    y, x = places(size)
    return 1 - 2 * ((y // (period / 2) + x // (period / 2)) % 2)


def artefact(image, mask, s, g):
    S, (y, x) = len(image), places(len(image))
    kind = pick(g, 'checkerboard', 'stripes', 'ringing', 'ghost', 'blocks')
    if kind == 'checkerboard':
        return image + 0.25 * s * checkerboard(S, pick(g, 2, 4, 8)), kind
    if kind == 'stripes':
        turn, waves = rand(g, 0, math.pi), rand(g, 5, 0.4 * S)
        return image + 0.3 * s * torch.sin(2 * math.pi * waves / S * (x * math.cos(turn) + y * math.sin(turn))), kind
    if kind == 'ringing':                                                # the outer part of k-space cut off (Gibbs)
        f = torch.fft.fftfreq(S).abs() * 2
        inner = (f <= 1 - 0.6 * s).float()
        return torch.fft.ifft2(torch.fft.fft2(image) * inner[:, None] * inner).real, kind
    if kind == 'ghost':                                                  # half a field of view away, as odd and even lines differ
        return image + 0.5 * s * (torch.roll(image, S // 2, pick(g, 0, 1)) + 1), kind
    n = pick(g, 4, 8)
    blocks = torch.randn(n, n, generator=g).repeat_interleave(math.ceil(S / n), 0).repeat_interleave(math.ceil(S / n), 1)[:S, :S]
    return image + 0.3 * s * blocks * (image + 1).clamp(max=1), kind


def conditioning(image, mask, s, g):
    S, (y, x), (head, cy, cx, R) = len(image), places(len(image)), head_of(image)
    kind = pick(g, 'gone', 'elsewhere', 'size', 'another') if mask.any() else 'another'
    wide = F.max_pool2d(mask[None, None], 3, 1, 1)[0, 0]
    soft, room = soften(wide, S / 100), soften(head, S / 16) * (1 - soften(wide, S / 24)) - 0.3 * ((y - cy).square() + (x - cx).square()).sqrt() / R
    free = torch.nonzero(room >= torch.quantile(room, 0.9))              # inside the brain and off the tumour
    py, px = free[int(torch.randint(len(free), (), generator=g))].tolist()
    if kind == 'another':                                                # a bright tumour that nobody asked for
        radius, value = rand(g, 0.05, 0.09) * S, torch.quantile(image[head > 0], 0.98).clamp(min=float(image[head > 0].median()) + 0.5)
        d = ((y - py).square() + (x - px).square()).sqrt() * (1 + 0.15 * field(S, 8, g))
        spot = torch.sigmoid((radius - d) / (S / 100))
        core = torch.sigmoid((0.55 * radius - d) / (S / 100)) * pick(g, 0, 0.8)          # a ring, or solid
        return image + s * spot * (value - core * (value + 0.6) - image), kind
    ty, tx = float((mask * y).sum() / mask.sum()), float((mask * x).sum() / mask.sum())
    if kind == 'size':
        grow, radius = 1 + 1.6 * s, math.sqrt(float(mask.sum()) / math.pi) + 1
        pull = (1 / grow - 1) * torch.exp(-((y - ty).square() + (x - tx).square()) / (1.8 * radius * grow) ** 2)
        return displaced(image, pull * (y - ty), pull * (x - tx)), kind
    known = soften(1 - wide, S / 16).clamp(min=1e-4)
    filled = soften(image * (1 - wide), S / 16) / known                   # from around the tumour
    out = image + s * soft * (filled - image)
    if kind == 'elsewhere':
        dy, dx = torch.tensor(ty - py), torch.tensor(tx - px)
        out = out + s * displaced(soft, dy, dx) * head * (displaced(image, dy, dx) - out)
    return out, kind


FAMILIES = dict(zip(CLASSES, (anatomical, textural, boundary, intensity, artefact, conditioning)))


def corrupt_image(image, mask, family, severity, *seed):
    """A fault in an image (S,S) float32 in [-1,1]: severity 0 (none, the same bits) to 3 (gross). The mask stays. Returns image, kind."""
    if severity == 0:
        return image.clone(), ''
    out, kind = FAMILIES[family](image, mask.float(), severity / 3, generator('corrupt', family, *seed))
    return out.clamp(-1, 1), kind


def example(size=72):
    """A phantom slice with a tumour: image (S,S) in [-1,1], mask (S,S)."""
    _, post, seg, _ = phantom_patient(generator('phantom', 0, 1), 9, size)
    z = int(seg[3:7].sum((1, 2)).argmax()) + 3
    return torch.from_numpy(normalise(post[None], head_mask(post))[0, z]), torch.from_numpy(seg[z]).float()


def corrupt(args):
    """Writes a set of real slices, whole and faulty: manifest.csv, labels.csv (what train --answers reads), families.png."""
    out = Path(args.out)
    roots = args.data or [phantom_root(args.cache)]
    data = load_slices(roots, args.size, split=args.split, cache=args.cache, labels=args.labels)
    rows = data.rows(args.part, args.empty_slices, args.seed)
    if not len(rows):
        fail(f'--data {" ".join(map(str, roots))}: no slice of a {args.part} patient; see --split')
    rows = np.sort(rows[torch.randperm(len(rows), generator=generator(args.seed, 'slices')).numpy()[:args.n]])
    faults = [('', 0.0), *((f, s) for f in CLASSES for s in args.severities if s)]
    names = torch.randperm(len(rows) * len(faults), generator=generator(args.seed, 'names')).tolist()       # that say nothing about what is inside
    manifest, labels, bar = [], [], progress(None, 'corrupt', total=len(names))
    for i, row in enumerate(rows):
        image, mask, t = torch.tensor(data.images[row, 0]), torch.tensor(data.masks[row, 0]), data.table[row]
        for k, (family, severity) in enumerate(faults):
            made, kind = corrupt_image(image, mask, family, severity, args.seed, i)
            folder = f'cor_{args.seed}_{names[i * len(faults) + k]:06d}'
            write_patient(out / folder, {'bravo': made.numpy()}, mask.numpy(), t['spacing'])
            manifest.append([folder, t['patient'], t['folder'], t['z'], family, kind, f'{severity:g}', args.seed])
            labels.append(['corruption', folder, str(out), folder, 'bad' if family else 'good', family,
                           min(3, max(1, round(severity))) if family else '', '', 0, ''])
            bar.update()
    write_csv(out / 'manifest.csv', ['folder', 'source_patient', 'source_folder', 'z', 'family', 'kind', 'severity', 'seed'], sorted(manifest))
    write_csv(out / 'labels.csv', LABELS, sorted(labels))
    image, mask = (torch.tensor(a[rows[(data.masks[rows].sum((1, 2, 3)) > 0).argmax()], 0]) for a in (data.images, data.masks))
    save_grid(out / 'families.png', [[outline(corrupt_image(image, mask, f, s, seed)[0], mask * (f == 'conditioning'), zoom=max(1, 128 // args.size))
                                      for seed in (0, 1) for s in (0, 1, 2, 3)] for f in CLASSES], CLASSES)
    print0(f'{out}: {len(rows)} slices of {args.part} patients, each whole and with {len(faults) - 1} faults; look at {out}/families.png')


# ---------------------------------------------------------------------------------------------------------------------
# Labelling: who is shown what, what is on disk, the server, the page.
# ---------------------------------------------------------------------------------------------------------------------


class Study:
    """Images in an order of each rater's own, some of them twice, and answers, which are on disk before anybody goes on."""

    file, header = 'labels.csv', LABELS

    def __init__(self, out, items, seed, again, rater=None):
        self.path, self.items, self.seed, self.again, self.rater = Path(out) / self.file, items, seed, again, rater
        self.lock, self.orders, self.answers = threading.Lock(), {}, {}
        if not self.path.exists():
            write_csv(self.path, self.header, [])
        raw = self.path.read_bytes()
        if not raw.endswith(b'\n'):                                      # cut off while it was written: nobody was told that it was saved
            print0(f'{self.path}: its last line is not whole and is dropped')
            atomic_write(self.path, raw[:raw.rfind(b'\n') + 1])
        for r in read_csv(self.path):
            self.answers[r[self.header[0]], r['item'], int(r['repeat'])] = r

    def order(self, rater):
        """The sequence of (item, repeat) for a rater: seeded by the name. A repeat comes at least 20 other images later."""
        if rater not in self.orders:
            self.orders[rater] = reading_order(self.items, self.again, generator(self.seed, 'order', rater))
        return self.orders[rater]

    def state(self, rater, at=None):
        """What the page shows: the first image without an answer, or an earlier one (at)."""
        order = self.order(rater)
        done = next((i for i, key in enumerate(order) if (rater, *key) not in self.answers), len(order))
        at = done if at is None else min(max(at, 0), done)
        state = dict(rater=rater, at=at, done=done, total=len(order))
        if at == len(order):
            return dict(state, text='\n'.join(summary(self.answers.values())))
        item, was = order[at][0], self.answers.get((rater, *order[at]), {})
        return dict(state, item=item, outline=self.items[item]['outline'], size=self.items[item]['size'],
                    was=' '.join(was[k] for k in ('verdict', 'class', 'severity') if was.get(k)))

    def answer(self, a):
        """Checks one answer of the page and puts it on disk. Returns the next state, or a word about what is wrong."""
        rater, at, seconds = a.get('rater'), a.get('at'), a.get('seconds')
        if not self.knows(rater):
            return 'no such rater'
        if type(at) is not int or type(seconds) not in (int, float) or not 0 <= seconds < 1e6:
            return 'at or seconds is no number'
        bad = a.get('verdict') == 'bad'
        if a.get('verdict') not in ('good', 'bad', 'unsure') or a.get('class') not in (('', *CLASSES) if bad else ('',)) \
                or a.get('severity') not in ((1, 2, 3) if bad else ('',)) or type(a['severity']) is not (int if bad else str):
            return 'verdict, class or severity is none of those on the page'
        with self.lock:
            order, now = self.order(rater), self.state(rater)
            if not 0 <= at <= now['done'] or at >= len(order) or order[at][0] != a.get('item'):
                return 'this image is not the one to be answered; load the page again'
            where = self.items[a['item']]
            row = [rater, a['item'], where['set'], where['folder'], a['verdict'], a['class'], str(a['severity']), f'{seconds:.2f}',
                   str(order[at][1])]
            return self.save(rater, *order[at][:2], row)

    def knows(self, rater):
        return isinstance(rater, str) and re.fullmatch(r'\w[\w .-]{0,39}', rater) and self.rater in (None, rater)

    def save(self, rater, item, repeat, row):
        """Puts a row and the time on disk. Returns the next state."""
        line, row = io.StringIO(), [*row, datetime.now(timezone.utc).isoformat(timespec='seconds')]
        csv.writer(line, lineterminator='\n').writerow(row)
        with open(self.path, 'ab') as f:
            f.write(line.getvalue().encode())
            f.flush()
            os.fsync(f.fileno())
        self.answers[rater, item, repeat] = dict(zip(self.header, row))
        return self.state(rater)


class Reading(Study):
    """A reader study (evaluate.py readers plan): one way, every item answered once in its turn; nobody here knows what is real."""

    file, header = 'answers.csv', READINGS

    def __init__(self, out, plan, rater=None):
        super().__init__(out, plan['items'], plan['seed'], None, rater)
        self.plan = plan

    def order(self, rater):
        if rater not in self.orders:
            self.orders[rater] = study_order(self.plan, rater)
        return self.orders[rater]

    def state(self, rater, at=None):
        """The first item without an answer; there is no way back."""
        order = self.order(rater)
        at = next((i for i, key in enumerate(order) if (rater, *key[:2]) not in self.answers), len(order))
        if at == len(order):
            return dict(rater=rater, at=at, total=at)
        item, repeat, turned = order[at]
        about = self.items[item]
        return dict(rater=rater, at=at, total=len(order), item=item, repeat=repeat, **{**about, 'pictures': about['pictures'][::-1 if turned else 1]})

    def answer(self, a):
        rater, answer, sure, ms = (a.get(k) for k in ('rater', 'answer', 'confidence', 'ms'))
        if not self.knows(rater):
            return 'no such rater'
        with self.lock:
            now = self.state(rater)
            kind = now.get('kind')
            if not kind or type(a.get('at')) is not int or (a['at'], a.get('item')) != (now['at'], now['item']):
                return 'this is not the item to be answered; load the page again'
            grades = r'[1-5](;[1-5]){%d}' % (len(self.plan['grades']) - 1)
            good = isinstance(answer, str) and (answer in ('real', 'generated') if kind == 'real' else answer in now['pictures'] if kind == 'pair' else re.fullmatch(grades, answer))
            if not good or type(sure) is not (int if kind == 'real' else str) or sure not in ((1, 2, 3) if kind == 'real' else ('',)) or type(ms) is not int or not 0 <= ms < 1e9:
                return 'answer, confidence or ms is none of those on the page'
            return self.save(rater, now['item'], now['repeat'], [rater, now['at'], now['item'], now['repeat'], answer, sure, ms])


def summary(rows):
    """Lines about answers: counts of each rater, agreement with oneself and with each other (good, bad or unsure)."""
    first = {}
    for r in rows:
        first.setdefault((r['rater'], int(r['repeat'])), {})[r['item']] = r['verdict']
    told, raters = [], sorted({rater for rater, _ in first})
    for rater in raters:
        mine, again = first.get((rater, 0), {}), first.get((rater, 1), {})
        count = Counter(mine.values())
        told.append(f'{rater}: {len(mine)} images, ' + ', '.join(f'{count[v]} {v}' for v in ('good', 'bad', 'unsure')))
        if both := [i for i in again if i in mine]:
            told.append('{}, the same image again: {po:.0%} alike, kappa {kappa:.2f} ({} images)'.format(
                rater, len(both), **agree([mine[i] for i in both], [again[i] for i in both])))
    for i, one in enumerate(raters):
        for other in raters[i + 1:]:
            if both := [k for k in first.get((one, 0), {}) if k in first.get((other, 0), {})]:
                told.append('{} and {}: {po:.0%} alike, kappa {kappa:.2f} ({} images)'.format(
                    one, other, len(both), **agree(*([first[r, 0][item] for item in both] for r in (one, other)))))
    return told or ['no answers yet']


def border(mask):
    """The border of a mask (S,S) as an SVG path along the edges of its pixels, in pixels."""
    m = np.pad(np.asarray(mask) > 0, 1)
    across = [f'M{x - 1} {y}h1' for y, x in zip(*np.nonzero(m[1:] != m[:-1]))]
    down = [f'M{x} {y - 1}v1' for y, x in zip(*np.nonzero(m[:, 1:] != m[:, :-1]))]
    return ''.join(across + down)


def strip(family, image, mask):
    """Three faults of a family, slight, clear and gross, each of another kind and the plainest of some seeds: PNG."""
    pictures, kinds = [], set()
    for severity in (1, 2, 3):
        made = [corrupt_image(image, mask, family, severity, 'example', seed) for seed in range(12)]
        plain, kind = max((m for m in made if m[1] not in kinds), key=lambda m: float((m[0] - image).abs().mean()))
        kinds.add(kind)
        pictures.append(outline(plain, mask * (family == 'conditioning')))
    return grid_png([pictures])


class Handler(http.server.BaseHTTPRequestHandler):
    """Fixed routes under the token; nothing of a request ever becomes a path. server.study, .token, .pictures: see label."""

    timeout, server_version, sys_version = 20, 'label', ''

    def log_message(self, *args):
        pass

    def reply(self, code, body, kind='text/plain; charset=utf-8'):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(code)
        for name, value in (('Content-Type', kind), ('Content-Length', len(body)), ('Cache-Control', 'no-store'), ('X-Content-Type-Options', 'nosniff'),
                            ('Referrer-Policy', 'no-referrer'), ('Content-Security-Policy', "default-src 'none'; img-src 'self'; connect-src 'self'; "
                             "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def route(self):
        """What was asked for, after /TOKEN/, and the query; None when it has been refused."""
        port, hosts = self.server.server_port, self.headers.get_all('Host', [])
        good = [f'{name}:{port}' for name in ('127.0.0.1', 'localhost')]
        if len(hosts) != 1 or hosts[0] not in good or self.headers.get('Origin', f'http://{hosts[0]}') not in [f'http://{g}' for g in good]:
            return self.reply(403, 'wrong host')
        url = urlsplit(self.path)
        parts = url.path.split('/', 2)
        if len(parts) != 3 or not secrets.compare_digest(parts[1].encode(), self.server.token.encode()):
            return self.reply(404, 'no such page; use the address that the program printed')
        return parts[2], parse_qs(url.query)

    def do_GET(self):
        asked = self.route()
        if not asked:
            return
        name, query, study = *asked, self.server.study
        if name == '':
            return self.reply(200, self.server.page, 'text/html; charset=utf-8')
        if name in self.server.pictures:
            return self.reply(200, self.server.pictures[name], 'image/png')
        if name != 'state':
            return self.reply(404, 'no such page')
        rater, at = query.get('rater', [study.rater])[0], query.get('at', [None])[0]
        if rater is None:
            return self.reply(200, '{"ask": true}', 'application/json')
        if not re.fullmatch(r'\w[\w .-]{0,39}', rater) or study.rater not in (None, rater) or not re.fullmatch(r'-?\d{1,6}', at or '0'):
            return self.reply(400, 'a name has 1 to 40 letters, digits, spaces, dots or dashes')
        with study.lock:
            self.reply(200, json.dumps(study.state(rater, None if at is None else int(at))), 'application/json')

    def do_POST(self):
        asked = self.route()
        if not asked:
            return
        length = self.headers.get('Content-Length', '')
        if asked[0] != 'answer':
            return self.reply(404, 'no such page')
        if not re.fullmatch(r'\d{1,18}', length) or 'Transfer-Encoding' in self.headers:
            return self.reply(411, 'a length is needed')
        if int(length) > 4096:
            return self.reply(413, 'too long')
        try:
            a = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):                             # also of bytes that are no UTF-8, and of 4,000 brackets
            return self.reply(400, 'no JSON')
        told = self.server.study.answer(a) if isinstance(a, dict) else 'no JSON object'
        self.reply(400, told) if isinstance(told, str) else self.reply(200, json.dumps(told), 'application/json')


def label(args):
    """Serves the page until Ctrl-C. labels.csv (of a study answers.csv) holds the answers, items.csv what each opaque item is (the page never knows)."""
    if args.study:
        plan = json.loads((Path(args.study) / 'study.json').read_text())
        pictures = {f'image/{p}.png': base64.b64decode(data) for p, data in plan['pictures'].items()}
        return serve(args, pictures, (Path(args.study) / 'page.html').read_text(), lambda: Reading(args.out, plan, args.rater), lambda study: [f'{len(study.answers)} answers'])
    out, size, box = Path(args.out), args.size, None
    for root in map(Path, args.sets):
        if (root / 'manifest.csv').exists():
            made = json.loads((root / 'sample.json').read_text()) if (root / 'sample.json').exists() else {}
            box = box or made.get('box')                                 # real patients beside it are cut alike
            size = size or read_nifti(find_patients([root], ('bravo', 'seg'))[0]['files']['bravo'])[0].shape[-1]
    data = load_slices(args.sets, size or 128, box=box, cache=args.cache, training=False)
    rows = np.sort(torch.randperm(len(data.table), generator=generator(args.seed, 'items')).numpy()[:args.n])
    items, pictures = {}, {}
    for i in rows:
        t, image, mask = data.table[i], data.images[i, 0], data.masks[i, 0]
        name = hashlib.sha256(repr((args.seed, t['root'], t['folder'], t['z'])).encode() + image.tobytes() + mask.tobytes()).hexdigest()[:16]
        buffer = io.BytesIO()
        Image.fromarray(to_rgb(image)[..., 0]).save(buffer, 'PNG')
        pictures[f'image/{name}.png'] = buffer.getvalue()
        items[name] = dict(set=t['root'], folder=t['folder'], z=t['z'], outline=border(mask), size=image.shape[0])
    shown = example()
    pictures.update({f'example/{c}.png': strip(c, *shown) for c in CLASSES})

    def start():
        known = {r['item']: r for r in read_csv(out / 'items.csv')} if (out / 'items.csv').exists() else {}
        of = {(r['set'], r['folder'], r['z']): name for name, r in known.items()}
        for name, r in items.items():
            if of.get((r['set'], r['folder'], str(r['z'])), name) != name:
                fail(f'--out {out}: the images of {r["set"]}, --seed or --size have changed since they were labelled there; give another --out')
        header = ['item', 'set', 'folder', 'z']
        write_csv(out / 'items.csv', header, [[n, *(r[h] for h in header[1:])] for n, r in sorted({**known, **items}.items())])
        return Study(out, items, args.seed, args.again, args.rater)

    serve(args, pictures, PAGE.replace('CLASSES', json.dumps([[c, DEFINITIONS[c]] for c in CLASSES])), start, lambda study: summary(study.answers.values()))


def serve(args, pictures, page, start, told):
    """The page, its pictures {path: PNG} and the study that start() makes, until Ctrl-C; then prints the lines told(study)."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / 'lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f'--out {out}: another classifier.py label is serving it; stop that one first')
    study = start()
    try:
        server = http.server.ThreadingHTTPServer(('127.0.0.1', args.port), Handler)
    except OSError as e:
        fail(f'--port {args.port}: cannot be used ({e.strerror}); leave it away for a free one')
    server.daemon_threads, server.study, server.token, server.pictures, server.page = True, study, secrets.token_urlsafe(18), pictures, page
    server.handle_error = lambda request, who: print0(f'a request ended early: {sys.exc_info()[1]!r}')
    stop = Stop()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print0(f'{len(study.items)} images. Open http://127.0.0.1:{server.server_port}/{server.token}/ on this machine; Ctrl-C ends, the same command goes on')
    while not stop.signum:
        time.sleep(0.2)
    server.shutdown()
    stop.restore()
    print0('\n'.join([f'{study.path}:', *told(study)]))


PAGE = r"""<!doctype html><meta charset=utf-8><title>Good or distorted?</title>
<style>
*{box-sizing:border-box}body{margin:0;height:100vh;display:flex;flex-direction:column;background:#111;color:#ddd;font:15px/1.35 system-ui,sans-serif}
header{display:flex;gap:20px;align-items:center;padding:8px 16px;background:#1c1c1c}progress{flex:1;height:8px}
main{flex:1;min-height:0;display:flex}#left{flex:1;min-width:0;display:flex;flex-direction:column;align-items:center;padding:10px}
#frame{flex:1;min-height:0;aspect-ratio:1;max-width:100%;overflow:hidden;background:#000;position:relative;cursor:zoom-in}
#stage,#stage>*{position:absolute;inset:0;width:100%;height:100%}path{fill:none;stroke:#ff5a3c;stroke-width:1.5px;vector-effect:non-scaling-stroke}
#say{min-height:30px;padding:6px;font-weight:600}.bad{color:#ff7a5c}#keys button,.c{cursor:pointer}
#keys{display:flex;flex-wrap:wrap;gap:6px;justify-content:center}button{background:#2a2a2a;color:#eee;border:1px solid #444;border-radius:6px;padding:3px 8px;font:inherit;font-size:13px}
aside{width:500px;overflow:auto;padding:4px 10px;background:#181818}.c{display:flex;gap:10px;padding:3px;border-radius:6px;border:1px solid transparent;font-size:12px;line-height:1.25}
.c img{width:222px;height:74px;object-fit:cover;flex:none}.c b{font-size:14px}.c.on{border-color:#ff7a5c;background:#2a1d1a}kbd{background:#333;border-radius:4px;padding:0 6px;border:1px solid #555}
#ask{margin:auto;text-align:center}input{font:inherit;padding:8px;background:#222;color:#eee;border:1px solid #555}.gone{display:none!important}pre{text-align:left}
</style>
<header><span id=who></span><progress id=bar value=0></progress><span id=count></span></header>
<main><div id=ask class=gone><p>Your name (it goes with your answers)</p><form id=form><input id=name maxlength=40 autofocus> <button>Start</button></form></div>
<div id=end class=gone style="margin:auto"><h2>All done, thank you.</h2><pre id=text></pre><p>You can close this page. <kbd>Z</kbd> goes back.</div>
<div id=left class=gone><div id=frame><div id=stage><img id=img alt=""><svg id=svg><path id=path /></svg></div></div><div id=say></div><div id=keys></div></div>
<aside id=side class=gone><div style="font-size:13px;padding:4px">Bad? Press the number of its main fault, then how bad: <kbd>1</kbd> slight <kbd>2</kbd> clear <kbd>3</kbd> gross.
The examples show these three, left to right, on a made-up brain.</div></aside></main>
<script>
const classes = CLASSES, $ = id => document.getElementById(id)
let rater = null, s = null, since = 0, busy = false, fault = null, scale = 1
classes.forEach(([name, told], i) => {
  const row = document.createElement('div'), picture = new Image(), text = document.createElement('div')
  row.className = 'c'; picture.src = 'example/' + name + '.png'; picture.alt = name
  text.innerHTML = '<kbd>' + (i + 1) + '</kbd> <b>' + name + '</b><br>' + told
  row.append(picture, text); row.onclick = () => key(String(i + 1), true); $('side').append(row)
})
for (const [k, text] of [['g', 'good'], ['u', 'unsure'], ['b', 'bad in another way'], ['z', 'undo'], ['m', 'mask outline'], ['p', 'pixels'], ['+', 'zoom'], ['-', ''], ['0', 'fit']]) {
  const b = document.createElement('button')
  b.innerHTML = '<kbd>' + k.toUpperCase() + '</kbd> ' + text; b.onclick = () => { b.blur(); key(k) }; $('keys').append(b)
}
const say = (text, bad) => { $('say').textContent = text; $('say').className = bad ? 'bad' : '' }
function choose(name) {                                   // a fault waits for its severity
  fault = name
  document.querySelectorAll('.c').forEach((row, i) => row.classList.toggle('on', classes[i][0] === name))
  say(name === null ? '' : (name || 'bad in another way') + ': 1 slight, 2 clear, 3 gross?  (Esc: back)', true)
}
function zoom(to, x = .5, y = .5) {
  scale = Math.min(8, Math.max(1, to)); $('stage').style.transformOrigin = 100 * x + '% ' + 100 * y + '%'; $('stage').style.transform = 'scale(' + scale + ')'
}
async function load(url, body) {
  if (busy) return
  busy = true
  try {
    const r = await fetch(url, body && {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body)})
    if (!r.ok) throw new Error(await r.text())
    await show(await r.json())
  } catch (e) {
    const lost = e instanceof TypeError
    say((body ? 'NOT saved: ' : '') + (lost ? 'the program does not answer. Start it again and open the address that it prints; what was saved is safe.' : e.message), true)
  }
  busy = false
}
async function show(n) {
  for (const [id, on] of [['ask', n.ask], ['left', n.item], ['side', n.item], ['end', n.text]]) $(id).classList.toggle('gone', !on)
  if (n.ask) return $('name').focus()
  s = n; rater = n.rater; location.hash = encodeURIComponent(rater)
  $('who').textContent = rater; choose(null)
  if (n.text) $('text').textContent = n.text
  else await picture(n)                                   // only then is it counted, and keys work again
  $('bar').max = n.total; $('bar').value = n.done; $('count').textContent = n.done + ' of ' + n.total
}
async function picture(n) {
  const next = new Image()
  next.src = 'image/' + n.item + '.png'; await next.decode()
  next.id = 'img'; next.style.imageRendering = $('img').style.imageRendering; $('img').replaceWith(next)
  $('svg').setAttribute('viewBox', '0 0 ' + n.size + ' ' + n.size); $('path').setAttribute('d', n.outline); zoom(1)
  if (n.at < n.done) say('gone back; you said: ' + n.was)
  since = performance.now()
}
function answer(verdict, name = '', severity = '') {
  load('answer', {rater, at: s.at, item: s.item, verdict, class: name, severity, seconds: (performance.now() - since) / 1000})
}
const state = at => 'state?rater=' + encodeURIComponent(rater) + (at === undefined ? '' : '&at=' + at)
function key(k, click) {
  if (!s || busy) return
  if (k === 'z' || k === 'Backspace') return fault !== null ? choose(null) : load(state(s.at - 1))
  if (!s.item) return
  if (k === 'Escape') return choose(null)
  if (k === 'm') return $('svg').classList.toggle('gone')
  if (k === 'p') return $('img').style.imageRendering = $('img').style.imageRendering ? '' : 'pixelated'
  if (k === '+' || k === '=') return zoom(scale * 1.5)
  if (k === '-') return zoom(scale / 1.5)
  if (k === '0') return zoom(1)
  if (k === 'g') return answer('good')
  if (k === 'u') return answer('unsure')
  if (k === 'b') return choose('')
  if (fault !== null && !click && '123'.includes(k)) return answer('bad', fault, Number(k))
  if ((fault === null || click) && '123456'.includes(k)) choose(classes[k - 1][0])
}
addEventListener('keydown', e => {
  if (e.target.id === 'name' || e.repeat || e.ctrlKey || e.metaKey || e.altKey) return
  if (e.key === 'Backspace') e.preventDefault()
  key(e.key.length === 1 ? e.key.toLowerCase() : e.key)
})
$('frame').addEventListener('wheel', e => {
  const box = $('frame').getBoundingClientRect()
  e.preventDefault(); zoom(scale * (e.deltaY < 0 ? 1.25 : .8), (e.clientX - box.left) / box.width, (e.clientY - box.top) / box.height)
}, {passive: false})
$('form').onsubmit = e => { e.preventDefault(); rater = $('name').value.trim(); load(state()) }
rater = decodeURIComponent(location.hash.slice(1))
load(rater ? state() : 'state')
</script>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Calibration and figures of a detector
# ---------------------------------------------------------------------------------------------------------------------


def auc_interval(bad, good, bad_patients, good_patients, repeats, *seed):
    """AUC with 2.5 and 97.5 % of bootstrap draws of patients, who bring all their images, good and bad."""
    names = np.unique(np.concatenate([bad_patients, good_patients]))
    of = {n: (bad[bad_patients == n], good[good_patients == n]) for n in names}
    draws = []
    for k in range(repeats):
        picked = [of[names[i]] for i in torch.randint(len(names), (len(names),), generator=generator('auc', k, *seed)).tolist()]
        draws.append(auc(*(np.concatenate([p[side] for p in picked]) for side in (0, 1))))
    draws = [d for d in draws if math.isfinite(d)]
    low, high = np.percentile(draws, (2.5, 97.5)) if draws else (math.nan, math.nan)
    return [auc(bad, good), float(low), float(high)]


def nll(z, y):
    """Mean negative log-likelihood of y (N,) in {0,1} under logits z (N,)."""
    return float(np.mean(np.logaddexp(0, z) - y * z))


def fit_temperature(z, y):
    """The T that makes z/T (N,) most likely (Guo 2017), between 0.05 and 20. Convex in 1/T: the root of its slope by bisection."""
    low, high = 1 / 20, 1 / 0.05
    for _ in range(60):
        a = (low + high) / 2
        slope = np.mean((1 / (1 + np.exp(-np.clip(a * z, -500, 500))) - y) * z)
        low, high = (a, high) if slope < 0 else (low, a)
    return 2 / (low + high)


def threshold_for(p_bad, tpr):
    """The highest threshold t such that p >= t holds for at least that share of the bad images."""
    return float(np.sort(p_bad)[::-1][math.ceil(tpr * len(p_bad) - 1e-9) - 1])


def shift_prior(p, old, new):
    """p(bad) for another share of bad images: its logit moves by logit(new) - logit(old)."""
    odds = p / np.maximum(1 - p, 1e-12) * (new / (1 - new)) / (old / (1 - old))
    return odds / (1 + odds)


def ece(p, y, bins=15):
    """Expected calibration error (Guo 2017): bins of equal width, |mean p - share bad| weighted by size. And the bins' means."""
    at = np.minimum((p * bins).astype(int), bins - 1)
    n, sum_p, sum_y = (np.bincount(at, w, bins) for w in (None, p, y))
    used = n > 0
    return float(np.abs(sum_p - sum_y).sum() / len(p)), sum_p[used] / n[used], sum_y[used] / n[used]


def ece_floor(p, draws=200):
    """The mean ECE of outcomes drawn from p itself: what a perfectly calibrated detector shows with as many images."""
    u = torch.rand(draws, len(p), generator=generator('ece'), dtype=torch.float64).numpy()
    return float(np.mean([ece(p, (row < p).astype(float))[0] for row in u]))


# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------


def judged_images(folders, size, split, cache, box, labels=None):
    """Judged images of label folders: images (N,1,S,S), masks, bad (N,) in {0,1}, kind (N,) in 0..5 or -1, patients, parts.

    Several raters: the majority of good and bad; ties and "unsure" are left out and counted. A repeat is not a second vote.
    """
    votes = {}
    for r in read_answers(folders):
        if r['repeat'] == '0':
            votes.setdefault(r['set'], {}).setdefault((r['folder'], r['z']), []).append(r)
    images, masks, bad, kind, patients, parts, doubtful = [], [], [], [], [], [], 0
    for root, items in votes.items():
        if not Path(root).is_dir():
            fail(f'--answers: {root}, whose images were judged, is no folder here; run from where classifier.py label ran')
        data = load_slices([root], size, box=box, split=split, cache=cache, labels=labels, training=False)
        row_of = {(t['folder'], t['z']): i for i, t in enumerate(data.table)}
        for key, rows in sorted(items.items()):
            if key not in row_of:
                fail(f'--answers: {root}/{key[0]} (slice {key[1]}) was judged and is not there any more')
            count = Counter(r['verdict'] for r in rows)
            if count['good'] == count['bad']:
                doubtful += 1
                continue
            i, named = row_of[key], Counter(r['class'] for r in rows if r['class']).most_common(1)
            bad.append(int(count['bad'] > count['good']))
            kind.append(CLASSES.index(named[0][0]) if named and bad[-1] else -1)
            images.append(np.array(data.images[i])), masks.append(np.array(data.masks[i]))
            patients.append(data.table[i]['source'] or data.table[i]['patient']), parts.append(data.part[i])
    print0(f'answers: {len(bad)} images, {sum(bad)} bad; {doubtful} left out as unsure or undecided')
    if not bad:
        fail(f'--answers {" ".join(map(str, folders))}: no image is judged good or bad')
    return argparse.Namespace(images=np.stack(images), masks=np.stack(masks), bad=np.array(bad), kind=np.array(kind),
                              patients=np.array(patients), part=np.array(parts))


def faulty(data, rows, which, seed):
    """The slices rows of data, each with the fault (family, severity) that which gives for it: images (N,1,S,S)."""
    made = [corrupt_image(torch.tensor(data.images[r, 0]), torch.tensor(data.masks[r, 0]), f, s, seed, int(r), f, s)[0]
            for r, (f, s) in zip(rows, which)]
    return torch.stack(made)[:, None]


@torch.no_grad()
def logits_of(predict, images, masks, device):
    """predict(images, masks) for N images (N,1,S,S) and masks in parts of 64: logits (N,7), numpy, fp64."""
    parts = (slice(i, i + 64) for i in range(0, len(images), 64))
    copy_ = lambda a: torch.tensor(np.asarray(a), dtype=torch.float32, device=device)
    return np.concatenate([predict(copy_(images[p]), copy_(masks[p])).double().cpu().numpy() for p in parts])


def logistic(x, y, strength):
    """Weights (D,) and bias of logistic regression of y (N,) in {0,1} on x (N,D), fp64: the minimum of the summed NLL + strength / 2 |w|^2."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=2000, tolerance_grad=1e-8, tolerance_change=0, history_size=20, line_search_fn='strong_wolfe')

    def loss():
        opt.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ w[1:] + w[0], y, reduction='sum') + strength / 2 * w[1:].square().sum()
        value.backward()
        return value

    opt.step(loss)
    w = w.detach().numpy()
    return w[1:], float(w[0])


def fit_probe(args, answers, device):
    """A Probe of the judged images of --part: what a checkpoint of a detector holds, and lines about images that it had not learned from.

    Patients (of the masks) are cut into 5 folds or fewer, each judged by what the others teach: the strength of the regularisation, temperature and
    threshold come from there, where no image judges itself. The layer that is kept has learned from all.
    """
    net, mine = Probe(args.probe).to(device).eval(), answers.part == args.part
    y, owners = answers.bad[mine].astype(float), answers.patients[mine]
    names = np.unique(owners)
    order = names[torch.randperm(len(names), generator=generator(args.seed, 'folds')).numpy()].tolist()
    fold, folds = np.array([order.index(o) % 5 for o in owners]), range(min(5, len(names)))
    if len(folds) < 2 or any(len(np.unique(y[fold != k])) < 2 for k in folds):
        fail(f'--probe: needs images judged good and bad of several {args.part} patients; --answers has {int(y.sum())} bad of {len(y)}, of {len(names)}')
    x = np.concatenate([net.describe(torch.from_numpy(v).to(device)).cpu().double().numpy() for v in np.split(answers.images[mine], range(64, len(y), 64))])

    def learn(rows, strength):
        """Weights (D,) and bias on the features as they are; standardised by those rows alone, so that the others tell nothing."""
        mean, scale = x[rows].mean(0), (x[rows].std(0) + 1e-6) * math.sqrt(x.shape[1])
        w, b = logistic((x[rows] - mean) / scale, y[rows], strength)
        return w / scale, b - (mean / scale) @ w

    def unseen(strength):
        z = np.zeros(len(y))
        for k in folds:
            w, b = learn(fold != k, strength)
            z[fold == k] = x[fold == k] @ w + b
        return z

    tried = {s: unseen(s) for s in (0.03, 0.1, 0.3, 1, 3, 10)}
    strength = min(tried, key=lambda s: nll(tried[s], y))
    z = tried[strength]
    w, b = learn(y >= 0, strength)
    kinds = np.bincount(answers.kind[mine][answers.kind[mine] >= 0], minlength=len(CLASSES)) + 1
    with torch.no_grad():
        net.out.weight.zero_()[0] = torch.from_numpy(w)
        net.out.bias.copy_(torch.from_numpy(np.array([b, *np.log(kinds / kinds.sum())])))
    temperature = fit_temperature(z, y)
    threshold = threshold_for(1 / (1 + np.exp(-z[y > 0] / temperature)), args.target_tpr)
    best = {k: v.half() if k.startswith('vgg') else v for k, v in net.state_dict().items()}
    said = 1 / (1 + np.exp(-z / temperature)) >= threshold
    caught, flagged = float(said[y > 0].mean()), float(said[y == 0].mean())
    lines = [['AUC, judged images, patients left out in turn', *auc_interval(z[y > 0], z[y == 0], owners[y > 0], owners[y == 0], args.repeats, args.seed), int(y.sum())],
             ['bad caught at threshold', caught, '', '', int(y.sum())], ['good flagged at threshold', flagged, '', '', int((y == 0).sum())]]
    print0(f'{args.out}: {len(y)} judged images of {len(names)} {args.part} patients, {int(y.sum())} bad; strength {strength:g}, temperature {temperature:.2f}; threshold '
           f'{threshold:.3f} catches {caught:.1%} of the bad and {flagged:.1%} of the good')
    return dict(best=best, temperature=temperature, threshold=threshold, prior=float(y.mean())), lines


def train(args):
    # run folder, data
    device, out = setup(args), Path(args.out)
    if world() > 1:
        fail('classifier.py train: runs in one process; leave torchrun away')
    state = open_run(args)
    roots = args.data or [phantom_root(args.cache)]
    data = load_slices(roots, args.size, box=state and state['box'], split=args.split, cache=args.cache, labels=args.labels)
    pools = {part: data.rows(part, args.empty_slices, args.seed) for part in (args.part, 'val', 'test')}
    for part, rows in pools.items():
        if not len(rows):
            fail(f'--data {" ".join(map(str, roots))}: no slice of a {part} patient; see --split')
    rows, val = pools[args.part], pools['val'][batch_rows(len(pools['val']), min(256, len(pools['val'])), 0, args.seed)]
    answers = judged_images(args.answers, args.size, args.split, args.cache, data.box, args.labels) if args.answers else None
    judged = {k: np.flatnonzero((answers.part == args.part) & (answers.bad == k)) for k in (0, 1)} if answers else {0: [], 1: []}
    if args.probe:
        if state and (out / 'metrics.json').exists():
            return print0(f'{out}: complete; another probe needs another --out')
        kept, lines = fit_probe(args, answers, device)                        # again where a kill came before its figures: it takes seconds
        save_checkpoint(out, dict(kept, step=0, opt={}, args=plain(args), box=list(data.box)))
        return figures(args, out, data, pools['test'], answers, device, lines)
    known = [f for f in CLASSES if f not in args.leave_out]
    print0(f'{out}: {args.device}' + (f', going on from step {state["step"]}' if state else '')
           + f'; learns from {len(rows)} slices of {args.part} patients, {len(judged[0])} images judged good, {len(judged[1])} bad; '
           f'families {", ".join(known)}' + (f', without {", ".join(args.leave_out)}' if args.leave_out else ''))

    # network, optimiser
    torch.manual_seed(seed_of(args.seed, 'weights') % 2 ** 32)
    net = Detector().to(device, memory_format=torch.channels_last)
    ema, opt = EMA(net, args.ema_decay), torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    start, best, found, waited, temperature, threshold = 0, None, math.inf, 0, None, None
    if state:
        net.load_state_dict(state['net']), ema.net.load_state_dict(state['ema']), opt.load_state_dict(state['opt'])
        start, ema.updates, best, found, waited, temperature = (state[k] for k in ('step', 'ema_updates', 'best', 'found', 'waited', 'temperature'))
    half = args.batch_size // 2

    def batch(step):
        """Half good, half bad, all a function of (seed, step): images and masks (B,2,S,S), bad (B,), class (B,) or -1. Where
        answers are given, they are half of either half."""
        g = generator(args.seed, 'step', step)
        parts = []
        for bad in (0, 1):
            n = half // 2 if len(judged[bad]) else 0
            real = rows[batch_rows(len(rows), half - n, step, (args.seed, bad))]
            x, m, kind = torch.tensor(data.images[real]), torch.tensor(data.masks[real]).float(), [-1] * (half - n)
            if n:                                              # classes alike often, then images
                kinds = np.unique(answers.kind[judged[bad]])
                wish = kinds[torch.randint(len(kinds), (n,), generator=g).numpy()]
                own = [judged[bad][answers.kind[judged[bad]] == k] for k in wish]
                own = [int(o[int(torch.randint(len(o), (), generator=g))]) for o in own]
                x, m = torch.cat([x, torch.tensor(answers.images[own])]), torch.cat([m, torch.tensor(answers.masks[own]).float()])
                kind += answers.kind[own].tolist()
            moved, moved_mask = augment(x, m, torch.rand(half, 5, generator=g))
            some = torch.rand(half, generator=g)[:, None, None, None] < 0.5             # so that interpolation tells nothing
            x, m = torch.where(some, moved, x), torch.where(some, moved_mask, m)
            x = (x + 0.03 * torch.rand(half, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)).clamp(-1, 1)
            for i in range(half - n if bad else 0):
                kind[i] = CLASSES.index(pick(g, *known))
                x[i, 0] = corrupt_image(x[i, 0], m[i, 0], CLASSES[kind[i]], pick(g, 1, 2, 3), args.seed, step, i)[0]
            parts.append((x, m, kind))
        x, m = (torch.cat([p[i] for p in parts]) for i in (0, 1))
        y = torch.cat([torch.zeros(half), torch.ones(half)])
        return torch.cat([x, m], 1).to(device), y.to(device), torch.tensor(parts[0][2] + parts[1][2], device=device)

    def train_step(step, lr):
        """One optimiser step: cross-entropy of bad, and half of that of the class among the bad ones. Returns loss, gradient norm."""
        x, y, kind = batch(step)
        z = net(x.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(z[:, 0], y) + 0.5 * F.cross_entropy(z[:, 1:], kind, ignore_index=-1, reduction='sum') / half
        for group in opt.param_groups:
            group['lr'] = lr
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.detach(), norm

    # validation: each slice once whole and once with a fault, families and severities in turn; and what people judged
    turns = [(f, s) for s in (1, 2, 3) for f in known]
    held = [data.images[val], faulty(data, val, [turns[i % len(turns)] for i in range(len(val))], 'val').numpy()]
    held_masks, held_bad = [data.masks[val]] * 2, [np.zeros(len(val)), np.ones(len(val))]
    if answers and (answers.part == 'val').any():
        for l, a in ((held, answers.images), (held_masks, answers.masks), (held_bad, answers.bad)):
            l.append(a[answers.part == 'val'])
    held, held_masks, held_bad = np.concatenate(held), np.concatenate(held_masks), np.concatenate(held_bad)

    # BatchNorm's statistics belong to the weights that they were measured with: for the average they are measured anew, on these
    still = [batch(-1 - i)[0].contiguous(memory_format=torch.channels_last) for i in range(8)]

    def save(step):
        save_checkpoint(out, dict(net=net.state_dict(), ema=ema.net.state_dict(), ema_updates=ema.updates, opt=opt.state_dict(), step=step,
                                  best=best, found=found, waited=waited, temperature=temperature, threshold=threshold, prior=float(held_bad.mean()), args=plain(args), box=list(data.box)))

    # length, the loop
    if args.iters is None:
        args.iters = iters_for(args.minutes, train_step, net, opt, device, args.lr)
    atomic_write(out / 'args.json', json.dumps(plain(args), indent=1).encode())
    log = Log(out / 'log.csv', ['step', 'loss', 'lr', 'grad_norm', 's_per_step', 'val_nll', 'val_auc'], start)
    stop, recent, clock, done = Stop(), [], time.perf_counter(), start
    bar = progress(range(start, args.iters), initial=start, total=args.iters)
    for step in bar:
        if waited >= args.patience:
            break
        loss, norm = train_step(step, lr_at(step, args))
        ema.update(net)
        recent.append(float(loss + 0 * norm))
        if not math.isfinite(recent[-1]):
            fail(f'loss is {recent[-1]} at step {step}, lr {lr_at(step, args):.2e}; stopped, the last checkpoint in {out} is intact. Try a lower --lr', 1)
        done, signum = step + 1, stop.asked(device)
        if done % args.val_every == 0 or done == args.iters:
            seconds = (time.perf_counter() - clock) / len(recent)
            update_bn(still, ema.net)
            z = logits_of(lambda i, m: ema.net(torch.cat([i, m], 1)), held, held_masks, device)[:, 0]
            score = nll(z / fit_temperature(z, held_bad), held_bad)
            best, found, waited = ({k: v.clone() for k, v in ema.net.state_dict().items()}, score, 0) if score < found else (best, found, waited + 1)
            log.add(step=done, loss=float(np.mean(recent)), lr=lr_at(step, args), grad_norm=float(norm), s_per_step=seconds, val_nll=score,
                    val_auc=auc(z[held_bad > 0], z[held_bad == 0]))
            bar.set_postfix(loss=f'{np.mean(recent):.3f}', val_nll=f'{score:.3f}', refresh=False)
            recent, clock = [], time.perf_counter()
        if signum or done % args.val_every == 0:
            save(done)
        if signum and done < args.iters:
            bar.close()
            print0(f'{out}: stopped by signal {signum} and saved at step {done}; the same command goes on')
            raise SystemExit(128 + signum)
    stop.restore()
    if temperature is not None and (out / 'metrics.json').exists():
        return print0(f'{out}: complete at step {start}; another length needs another --out')

    # the best network of the validations: temperature, threshold, figures
    final = copy.deepcopy(ema.net)                                          # in eval mode, unlike net: BatchNorm
    final.load_state_dict(best)
    z = logits_of(lambda i, m: final(torch.cat([i, m], 1)), held, held_masks, device)[:, 0]
    temperature = fit_temperature(z, held_bad)
    p = 1 / (1 + np.exp(-z / temperature))
    threshold = threshold_for(p[held_bad > 0], args.target_tpr)
    print0(f'{out}: best validation NLL {found:.4f}, temperature {temperature:.2f}; threshold {threshold:.3f} catches {(p[held_bad > 0] >= threshold).mean():.1%} '
           f'of the bad validation images and {(p[held_bad == 0] >= threshold).mean():.1%} of the good')
    save(done)
    figures(args, out, data, pools['test'], answers, device)


def figures(args, out, data, rows, answers, device, first=()):
    """What the detector does on test patients, below lines that are known: metrics.csv and .json, confusion.csv, worst.png, reliability.png."""
    detector = load_detector(out, device)
    predict = lambda i, m: detector_logits(detector, i, m)
    rows = rows[torch.randperm(len(rows), generator=generator(args.seed, 'test')).numpy()[:args.test_slices]]
    patients, masks = np.array([data.table[r]['patient'] for r in rows]), data.masks[rows]
    cells = [('', 0), *((f, s) for f in CLASSES for s in (1, 2, 3))]
    images = [faulty(data, rows, [cell] * len(rows), args.seed) for cell in progress(cells, 'test', leave=False)]
    z = np.stack([logits_of(predict, x, masks, device) for x in images])                                 # (19, N, 7)
    table = list(first)

    def row(name, picked, good=z[0, :, 0], owners=patients):
        bad = z[picked, :, 0].ravel() if isinstance(picked, list) else picked[0]
        bad_owners = np.tile(patients, len(picked)) if isinstance(picked, list) else picked[1]
        table.append([name, *auc_interval(bad, good, bad_owners, owners, args.repeats, args.seed), len(bad)])

    row('AUC, all families', list(range(1, len(cells))))
    for f in CLASSES:
        at, note = [i for i, c in enumerate(cells) if c[0] == f], ' (left out)' if f in args.leave_out else ''
        row(f'AUC, {f}{note}', at)
        for i in at:
            row(f'AUC, {f}{note}, severity {cells[i][1]}', [i])
    # as in validation: each slice whole, and once with a fault
    turn = 1 + np.arange(len(rows)) % (len(cells) - 1)
    p = 1 / (1 + np.exp(-np.concatenate([z[0, :, 0], z[turn, np.arange(len(rows)), 0]])))
    y = np.repeat([0.0, 1.0], len(rows))
    error, mean_p, share = ece(p, y)
    table += [r for r in (['ECE', error, '', '', len(p)], ['ECE of a perfectly calibrated one', ece_floor(p), '', '', len(p)],
                          ['bad caught at threshold', (p[y > 0] >= detector.threshold).mean(), '', '', len(rows)],
                          ['good flagged at threshold', (p[y == 0] >= detector.threshold).mean(), '', '', len(rows)]) if r[0] not in {line[0] for line in first}]
    if answers:
        held = ~np.isin(answers.part, (args.part, 'val'))
        za, bad = logits_of(predict, answers.images, answers.masks, device)[:, 0], answers.bad > 0
        if (held & bad).any() and (held & ~bad).any():
            row('AUC, judged images of other patients', (za[held & bad], answers.patients[held & bad]), za[held & ~bad], answers.patients[held & ~bad])
            pa = 1 / (1 + np.exp(-za[held]))
            table += [['ECE, judged images', ece(pa, answers.bad[held])[0], '', '', int(held.sum())],
                      ['ECE of a perfectly calibrated one, judged images', ece_floor(pa), '', '', int(held.sum())]]
        else:
            print0('answers: none, or only good or only bad ones, about images of other patients than it learned from: no AUC on them')
    said = np.where(z[..., 0] >= math.log(detector.threshold / (1 - detector.threshold)) if detector.threshold < 1 else False, z[..., 1:].argmax(-1) + 1, 0)
    truth = np.array([CLASSES.index(f) + 1 if f else 0 for f, _ in cells])
    confusion = np.array([[(said[truth == a] == b).sum() for b in range(7)] for a in range(7)])
    write_csv(out / 'confusion.csv', ['truth', 'good', *CLASSES], [[n, *r] for n, r in zip(('good', *CLASSES), confusion.tolist())])
    header = ['metric', 'value', 'low', 'high', 'n']
    write_csv(out / 'metrics.csv', header, table)
    for name, value, low, high, n in table:
        print0(f'{name:52}{value:7.3f}  ' + (f'[{low:.3f}, {high:.3f}]' if low != '' else '').ljust(16) + f'{n:6d}')
    plot(out / 'reliability.png', {'perfect': ([0, 1], [0, 1]), '.test images': (mean_p, share)}, f'ECE {error:.3f}', 'p(bad)', 'share that is bad')
    show = lambda i, n: outline(images[i][n, 0], masks[n, 0], zoom=max(1, 128 // args.size))
    worst = [[show(0, n) for n in np.argsort(-z[0, :, 0])[:8]]]
    for s in (3, 2, 1):
        at = [i for i, c in enumerate(cells) if c[1] == s]
        order = np.dstack(np.unravel_index(np.argsort(z[at, :, 0], axis=None)[:8], (len(at), len(rows))))[0]
        worst.append([show(at[i], n) for i, n in order])
    save_grid(out / 'worst.png', worst, ['good, called bad', 'gross, called good', 'clear', 'slight'])
    atomic_write(out / 'metrics.json', json.dumps(dict(
        part=args.part, seed=args.seed, hash=detector.hash, temperature=detector.temperature, threshold=detector.threshold, prior=detector.prior,
        left_out=list(args.leave_out), slices=len(rows), patients=len({*patients}), detector={r[0]: dict(zip(header[1:], r[1:])) for r in table}), indent=1).encode())
    print0(f'{len(rows)} slices of {len({*patients})} test patients; look at {out}/worst.png, {out}/reliability.png and {out}/confusion.csv')


def score(args):
    """scores.csv: p(bad), the classes given bad, the verdict, for each slice; best_worst.png."""
    device, out = setup(args), Path(args.out)
    detector = load_detector(args.detector, device)
    data = load_slices(args.data, detector.args.size, box=detector.box, cache=args.cache, labels=detector.args.labels, training=False)
    z = logits_of(lambda i, m: detector_logits(detector, i, m), data.images, data.masks, device)
    p, threshold = 1 / (1 + np.exp(-z[:, 0])), detector.threshold
    if args.prior:
        p, threshold = shift_prior(p, detector.prior, args.prior), shift_prior(threshold, detector.prior, args.prior)
    threshold = threshold if args.threshold is None else args.threshold
    of = np.exp(z[:, 1:] - z[:, 1:].max(1, keepdims=True))
    of /= of.sum(1, keepdims=True)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'scores.csv', ['folder', 'z', 'p_bad', *CLASSES, 'verdict'], [
        [t['folder'], t['z'], f'{a:.6f}', *(f'{c:.4f}' for c in b), 'bad' if a >= threshold else 'good'] for t, a, b in zip(data.table, p, of)])
    order, zoom = np.argsort(p, kind='stable'), max(1, 128 // detector.args.size)
    show = [[outline(data.images[i, 0], data.masks[i, 0], zoom=zoom) for i in part] for part in (order[:8], order[8:16], order[-16:-8], order[-8:]) if len(part)]
    save_grid(out / 'best_worst.png', show, ['best', '', '', 'worst'][:len(show)])
    print0(f'{out}/scores.csv: {len(p)} slices, {(p >= threshold).mean():.1%} bad at threshold {threshold:.3f}, mean p(bad) {p.mean():.3f} (it assumes '
           f'{args.prior or detector.prior:.0%} bad); detector {detector.hash} ({detector.part} patients); look at {out}/best_worst.png')


def main(args):
    {'corrupt': corrupt, 'label': label, 'train': train, 'score': score}[args.command](args)


if __name__ == '__main__':
    main(get_args())
