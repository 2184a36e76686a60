"""Measures generated images against real patients, with the same measure between real patients beside each figure.

  python evaluate.py quality --fake runs/synthetic --data DIR --vgg-weights vgg16.pth     distances, diversity, lesions, memorisation
  python evaluate.py cycle --fake runs/synthetic --data DIR       does a segmenter find the mask that an image was made from?
  python evaluate.py control --fake runs/asked                    do masks hold what was asked for (sample.py --count, --requests)?
  python evaluate.py downstream --fake runs/synthetic --data DIR  does a segmenter get better on real test patients by training on the set?
  python evaluate.py downstream --engine nnunetv2 --iters 5000 --data DIR    the same with nnU-Net v2 itself, where it is installed

Each leaves metrics.json, metrics.csv and pictures in --out. Reads files, changes none.
"""
import fcntl, functools, itertools, subprocess

from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    for name, told in (('quality', 'is a generated set like real patients it has not seen?'),
                       ('cycle', 'does a segmenter find in the images the masks that they were made from?'),
                       ('control', 'do the masks hold what was asked for?')):
        c = commands.add_parser(name, help=told)
        g = c.add_argument_group('what')
        g.add_argument('--fake', required=True, metavar='DIR', help='a set made by sample.py')
        if name != 'control':
            g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients, training patients included')
            g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
        if name == 'quality':
            g.add_argument('--part', choices=('val', 'judge', 'test'), default='test', help='the real patients to compare with')
            g.add_argument('--empty-slices', type=number(float, 0, 1), default=0.2, help='share of real slices without tumour')
            g.add_argument('--vgg-weights', metavar='FILE', help='VGG16 weights; "none" leaves its metrics out; not given: fetched')
        g = c.add_argument_group('how')
        if name == 'quality':
            g.add_argument('--n', type=number(int, 8), default=1000, help='images on each side at most; fewer where a side has fewer')
        if name == 'cycle':
            g.add_argument('--train-steps', type=number(int, 1), default=800, help='of the segmenter, 16 slices of judge patients each')
        g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws, of patients (control: of masks)')
        g.add_argument('--out', default=f'runs/{name}', metavar='DIR')
        g.add_argument('--seed', type=number(int, 0), default=0)
        if name != 'control':
            g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
            g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    c = commands.add_parser('downstream', help='does a segmenter get better on real test patients by training on the set?')
    g = c.add_argument_group('what')
    g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients: training patients teach, test patients judge')
    g.add_argument('--fake', metavar='DIR', help='a set made by sample.py; not given: only the arms without one')
    g.add_argument('--gated', metavar='DIR', help='a set made by sample.py --gate; not given: its arms are left out')
    g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
    g.add_argument('--size', type=number(int, 16), metavar='S', help='of the slices; none: of --fake, else 64')
    g.add_argument('--arms', nargs='+', choices=ARMS, metavar='ARM', help=f'none: all that the sets allow of {", ".join(ARMS)}')
    g.add_argument('--cross-validate', type=number(int, 2), metavar='K', help='instead of the arms: K folds of training patients, writes cv_lesions.csv')
    g = c.add_argument_group('how')
    g.add_argument('--engine', choices=('own', 'nnunetv2'), default='own', help='nnunetv2: trains and predicts with the nnU-Net v2 that is on the PATH')
    g.add_argument('--network', choices=('nnunet', *(f'mednext-{k}' for k in MEDNEXT)), default='nnunet', help="nnU-Net's, or MedNeXt's four sizes")
    g.add_argument('--kernel', choices=('3', '5', 'upkern'), default='3', help='of MedNeXt; upkern: half the steps with 3, then 5 from its weights')
    g.add_argument('--optimizer', choices=('sgd', 'adamw'), default='sgd', help="sgd: nnU-Net's; adamw: MedNeXt's, which always has it")
    g.add_argument('--width', type=number(int, 1), default=32, help="features at full size; 32 is nnU-Net's and MedNeXt's, 8 suits a CPU")
    g.add_argument('--batch-size', type=number(int, 2), default=16, help='slices a step')
    g.add_argument('--seeds', type=number(int, 1), default=3, help='trainings of each arm')
    g.add_argument('--iters', type=number(int, 1), help='steps of every training')
    g.add_argument('--minutes', type=number(float, 0, open_low=True), help='instead of --iters: timed once, then as many steps for every training; '
                   'none of both: 5')
    g.add_argument('--tolerance', type=number(float, 0), metavar='MM', help='of the surface Dice; none: one pixel')
    g.add_argument('--repeats', type=number(int, 20), default=1000, help='bootstrap draws of patients')
    g.add_argument('--out', default='runs/downstream', metavar='DIR')
    g.add_argument('--seed', type=number(int, 0), default=0, help='of the first training')
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
    g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    args = p.parse_args(argv)
    args.dtype = 'fp32'
    for flag in ('fake', 'gated'):
        root = getattr(args, flag, None)
        if root and not (Path(root) / 'sample.json').is_file():
            fail(f'--{flag} {root}: holds no sample.json; give a set made by sample.py')
    for root in getattr(args, 'data', ()):
        if not Path(root).is_dir():
            fail(f'--data {root}: no such folder; give a folder that holds one folder a patient')
    vgg = getattr(args, 'vgg_weights', None)
    if vgg not in (None, 'none') and not Path(vgg).is_file():
        fail(f'--vgg-weights {vgg}: no such file')
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f'--out {args.out}: is a file; give a folder')
    if args.command == 'downstream':
        finish_downstream(args)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Distances between two sets. a and b are index arrays into what is given first, so that a bootstrap may repeat images:
# two copies of one image never count as a pair.
# ---------------------------------------------------------------------------------------------------------------------


def kid(kernel, a, b):
    """Kernel distance (Binkowski 2018): unbiased MMD^2 from a matrix of kernel values."""
    def within(i):
        pairs = i[:, None] != i[None]
        return kernel[np.ix_(i, i)][pairs].mean()
    return within(a) + within(b) - 2 * kernel[np.ix_(a, b)].mean()


def polynomial_kernel(x):
    """(x.y / d + 1)^3 for all pairs of x (N,d)."""
    return (x @ x.T / x.shape[1] + 1) ** 3


def frechet(x, a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^0.5) for features x (N,d) (Heusel 2017). Biased upwards for few images."""
    xa, xb = x[a] - x[a].mean(0), x[b] - x[b].mean(0)
    # tr((S_a S_b)^0.5) is the nuclear norm of the cross product of the centred features: no square root of a singular matrix
    cross = np.linalg.svd(xa @ xb.T, compute_uv=False).sum() / math.sqrt((len(a) - 1) * (len(b) - 1))
    return float(((x[a].mean(0) - x[b].mean(0)) ** 2).sum() + (xa ** 2).sum() / (len(a) - 1) + (xb ** 2).sum() / (len(b) - 1) - 2 * cross)


def prdc(distance, fake, real, k=5):
    """Precision, recall (Kynkaanniemi 2019), density, coverage (Naeem 2020) from a matrix of distances: k-th neighbour, strict <."""
    def radius(i):
        d = np.where(i[:, None] != i[None], distance[np.ix_(i, i)], np.inf)
        return np.partition(d, k - 1, 1)[:, k - 1]
    d, r_fake, r_real = distance[np.ix_(fake, real)], radius(fake), radius(real)
    inside = d < r_real
    return dict(precision=inside.any(1).mean(), recall=(d < r_fake[:, None]).any(0).mean(), density=inside.sum(1).mean() / k,
                coverage=(d.min(0) < r_real).mean())


def distances(x):
    """Euclidean distances of all pairs of x (N,d)."""
    square = (x ** 2).sum(1)
    return np.sqrt(np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0))


def radial_spectrum(images):
    """Power of each image (N,H,W) at whole spatial frequencies 1 .. H/2 cycles an image, in dB, averaged over directions."""
    n = images.shape[-1]
    f = np.fft.fftfreq(n, 1 / n)
    radius = np.hypot(f[:, None], f[None]).round().astype(int).ravel()
    window = np.hanning(n + 2)[1:-1]                                              # the borders do not meet
    power = np.abs(np.fft.fft2(images * window[:, None] * window)).reshape(len(images), -1) ** 2
    rings = np.stack([np.bincount(radius, row) for row in power]) / np.bincount(radius)
    return 10 * np.log10(rings[:, 1:n // 2 + 1] + 1e-12)


def wasserstein(a, b):
    """W1 between two samples of numbers: the area between their distribution functions. nan when one is empty."""
    if not len(a) or not len(b):
        return math.nan
    both = np.sort(np.concatenate([a, b]))
    F_a, F_b = (np.searchsorted(np.sort(v), both[:-1], 'right') / len(v) for v in (a, b))
    return float((np.abs(F_a - F_b) * np.diff(both)).sum())


def lesions(masks):
    """Of masks (N,S,S): the number of pieces of each, and for all pieces image number, diameter (pixels), centre x, y in [0,1]."""
    counts, pieces = np.zeros(len(masks), int), []
    for i, mask in enumerate(masks):
        labels, counts[i] = components(mask)
        for k in range(1, counts[i] + 1):
            y, x = np.nonzero(labels == k)
            pieces.append((i, math.sqrt(4 * len(x) / math.pi), (x.mean() + 0.5) / mask.shape[1], (y.mean() + 0.5) / mask.shape[0]))
    return counts, np.array(pieces, float).reshape(-1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# quality
# ---------------------------------------------------------------------------------------------------------------------


def memorisation(x, samples, train, held_out):
    """Share of samples nearer to a training image than to a held-out one; 0.5 when nothing is memorised. Pools of equal size."""
    return (x[np.ix_(samples, train)].min(1) < x[np.ix_(samples, held_out)].min(1)).mean()


def draw(rows, patients, g, resample):
    """Shuffled rows of a set; with `resample` those of as many patients drawn with replacement."""
    if resample and len(rows):
        names, inverse = np.unique(patients[rows], return_inverse=True)
        picked = torch.randint(len(names), (len(names),), generator=g).numpy()
        rows = np.concatenate([rows[inverse == p] for p in picked])
    return rows[torch.randperm(len(rows), generator=g).numpy()]


def quality(args):
    """The metric table: fake against --part, and as floor real training patients against --part, images drawn alike."""
    device, out = setup(args), Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('bravo'):
        fail(f'--fake {args.fake}: holds masks only; make images with sample.py --bravo RUN')
    if made['weights'] == 'raw':
        print0('note: the images were made with raw weights')
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = load_slices(args.data, made['pixels'], box=made['box'], split=args.split, cache=args.cache)
    pools = {k: real.rows(k, args.empty_slices, args.seed) for k in ('train', args.part)}
    others = np.concatenate([real.rows(k, args.empty_slices, args.seed) for k in PARTS if k not in ('train', args.part)])
    if not all(len(v) >= 8 for v in pools.values()):
        fail(f'--data {" ".join(args.data)}: has {len(pools["train"])} slices of training and {len(pools[args.part])} of {args.part} '
             'patients; at least 8 of each are needed, see --split')
    # one list of images: the real ones that are used, then the fakes
    used = np.concatenate([pools['train'], pools[args.part], others]).astype(int)
    images = np.concatenate([real.images[used], fake.images])[:, 0]
    masks = np.concatenate([real.masks[used], fake.masks])[:, 0]
    patients = np.array([real.table[i]['patient'] for i in used] + [f'fake:{r["source"] or r["folder"]}' for r in fake.table])
    a, b = len(pools['train']), len(pools['train']) + len(pools[args.part])
    train, test, others, fakes = np.arange(a), np.arange(a, b), np.arange(b, len(used)), np.arange(len(used), len(images))
    sizes = {k: f'{len(v)} images of {len(set(patients[v]))}' for k, v in dict(fake=fakes, train=train, test=test).items()}
    print0(f'fake {sizes["fake"]} sources, train {sizes["train"]} patients, {args.part} {sizes["test"]} patients')

    spectrum = radial_spectrum(images)
    counts, pieces = lesions(masks)
    piece_rows = [np.flatnonzero(pieces[:, 0] == i) for i in range(len(images))]
    pixels = images.reshape(len(images), -1).astype(np.float64)
    centre = pixels[train].mean(0)
    axes = np.linalg.svd(pixels[train] - centre, full_matrices=False)[2][:64]      # PCA of the training images
    near = distances((pixels - centre) @ axes.T)
    x = None
    if args.vgg_weights != 'none':
        vgg = VGG16(args.vgg_weights).to(device)
        with torch.no_grad():
            x = torch.cat([vgg(part.to(device))[-1].mean((2, 3)).cpu() for part in progress(torch.from_numpy(images)[:, None].split(64), 'VGG16')])
        x = x.double().numpy()
        kernel, apart = polynomial_kernel(x), distances(x)

    def measure(i, j):
        """All distances of images i to reference images j."""
        m = {}
        if x is not None:
            m |= {'KID x 1000': 1000 * kid(kernel, i, j), 'Frechet distance': frechet(x, i, j), **prdc(apart, i, j)}
        m['spectrum, dB'] = float(np.sqrt(((spectrum[i].mean(0) - spectrum[j].mean(0)) ** 2).mean()))
        pairs = torch.from_numpy(images[i])[:, None]
        half = min(len(i) // 2, 200)
        m['MS-SSIM within'] = float(ms_ssim(pairs[:half], pairs[half:2 * half]).mean())
        p, q = (pieces[np.concatenate([piece_rows[r] for r in rows])] for rows in (i, j))
        m['lesion count, W1'] = wasserstein(counts[i], counts[j])
        m['lesion diameter, W1 pixels'] = wasserstein(p[:, 1], q[:, 1])
        m['lesion place, W1 of x and y'] = (wasserstein(p[:, 2], q[:, 2]) + wasserstein(p[:, 3], q[:, 3])) / 2
        return m

    def both(k, resample):
        """One draw: (fake against part, floor against part), equal numbers of images in all three."""
        g = generator(args.seed, 'quality', k)
        f, t, r, o = (draw(rows, patients, g, resample) for rows in (fakes, train, test, others))
        n = min(len(f), len(t), len(r), args.n)
        ours, floor = measure(f[:n], r[:n]), measure(t[:n], r[:n])
        n = min(len(t), len(r))
        ours['nearer to training'] = memorisation(near, f, t[:n], r[:n])
        floor['nearer to training'] = memorisation(near, o, t[:n], r[:n]) if len(o) else math.nan
        return ours, floor

    points = [both(('point', k), False) for k in range(10)]
    draws = [both(('draw', k), True) for k in progress(range(args.repeats), 'bootstrap')]
    mean = [{name: np.mean([p[side][name] for p in points]) for name in points[0][side]} for side in (0, 1)]
    cut, nearest = copies(images, fakes, train, np.concatenate([test, others]), out)
    report(out, intervals(list(mean[0]), mean, draws), dict(
        fake=args.fake, hash=made['bravo'], part=args.part, n=int(min(len(fakes), len(train), len(test), args.n)), sizes=sizes, repeats=args.repeats,
        correlation_cut=cut, copies=int((nearest > cut).sum())))
    cycles = np.arange(1, spectrum.shape[1] + 1)
    plot(out / 'spectrum.png', {n: (cycles, spectrum[i].mean(0)) for n, i in (('fake', fakes), ('train', train), (args.part, test))},
         'radial power spectrum', 'cycles an image', 'dB', logx=True)
    print0(f'copies: {(nearest > cut).sum()} of {len(fakes)} images correlate above {cut:.3f} with a training image (the 99th percentile of real '
           f'held-out images); look at {out}/nearest.png')


def copies(images, fakes, train, held_out, out):
    """Nearest training image of each fake by correlation; the eight closest pairs as a picture. Returns the cut and the correlations."""
    to_train, to_held = correlation(images[fakes], images[train]), correlation(images[fakes], images[held_out])
    cut = copy_cut(images[train], images[held_out])
    top = np.argsort(-to_train.max(1))[:8]
    zoom = max(1, 128 // images.shape[-1])
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / 'nearest.png', [[images[fakes[i]] for i in top], [images[train[to_train[i].argmax()]] for i in top],
                                    [images[held_out[to_held[i].argmax()]] for i in top]], ['generated', 'nearest train', 'held out'], zoom)
    return cut, to_train.max(1)


# ---------------------------------------------------------------------------------------------------------------------
# Segmenters: nnU-Net's network and recipe (Isensee 2021, and nnU-Net v2), MedNeXt (Roy 2023)
# ---------------------------------------------------------------------------------------------------------------------


class PlainUNet(nn.Module):
    """nnU-Net's plain U-Net for images of `size` (H,W) or (D,H,W): two convolutions a stage, strided down, transposed up.

    An axis is halved while at least 4 would be left. Widths double from `width` up to 512 (3D: 320). In training all heads
    answer, finest first; else the finest. With 32 the parameters are nnU-Net's. GroupNorm with a group a channel is its instance norm.
    """

    def __init__(self, size, width=32, inputs=1, classes=2):
        super().__init__()
        dims, edge, strides = len(size), size, [(1,) * len(size)]
        while True:
            stride = tuple(2 if e >= 8 and e % 2 == 0 else 1 for e in edge)
            if max(stride) == 1:
                break
            strides.append(stride)
            edge = [e // s for e, s in zip(edge, stride)]
        conv, transposed = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        f = [min(width * 2 ** i, 512 if dims == 2 else 320) for i in range(len(strides))]

        def stage(a, b, stride=1):
            return nn.Sequential(*(layer for i in (0, 1) for layer in (conv(b if i else a, b, 3, 1 if i else stride, 1), GroupNorm(b, b), nn.LeakyReLU(0.01, True))))

        self.down = nn.ModuleList(stage(inputs if i == 0 else f[i - 1], f[i], s) for i, s in enumerate(strides))
        up = range(len(f) - 2, -1, -1)                                                     # coarse to fine
        self.up = nn.ModuleList(stage(2 * f[i], f[i]) for i in up)
        self.grow = nn.ModuleList(transposed(f[i + 1], f[i], strides[i + 1], strides[i + 1]) for i in up)
        self.heads = nn.ModuleList(conv(f[i], classes, 1) for i in up)
        for m in self.modules():
            if isinstance(m, (conv, transposed)):
                nn.init.kaiming_normal_(m.weight, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        kept, out = [], []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
        for grow, stage, head, skip in zip(self.grow, self.up, self.heads, kept[-2::-1]):
            x = stage(torch.cat([grow(x), skip], 1))
            if self.training or head is self.heads[-1]:
                out.insert(0, head(x))
        return out if self.training else out[0]


# expansion and number of blocks at five levels down and four up
MEDNEXT = {'s': ((2,) * 9, (2,) * 9), 'b': ((2, 3, 4, 4, 4, 4, 4, 3, 2), (2,) * 9), 'm': ((2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3)),
           'l': ((3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3))}


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, a norm for each channel, 1x1 up by `expand`, GELU, 1x1 down, and the input added; way 'down' and 'up' halve and double the size."""

    def __init__(self, dims, a, b, expand, kernel, way=None):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        resize = conv if way != 'up' else nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.depthwise = resize(a, a, kernel, 2 if way else 1, kernel // 2, groups=a)
        self.norm, self.wide, self.narrow = GroupNorm(a, a), conv(a, expand * a, 1), conv(expand * a, b, 1)
        self.skip = resize(a, b, 1, 2) if way else nn.Identity()
        self.pad = (1, 0) * dims if way == 'up' else None                                 # a stride of 2 makes 2n - 1 of n

    def forward(self, x):
        x = self.narrow(F.gelu(self.wide(self.norm(self.depthwise(x))))) + self.skip(x)
        return F.pad(x, self.pad) if self.pad else x


class MedNeXt(nn.Module):
    """MedNeXt (Roy 2023) of MEDNEXT[kind]: an axis must be a multiple of 16, 32 at least. Skips are added. Heads as in PlainUNet, at all five levels."""

    def __init__(self, kind, dims=2, kernel=3, width=32, inputs=1, classes=2):
        super().__init__()
        expand, blocks = MEDNEXT[kind]
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        f = [width * 2 ** i for i in (0, 1, 2, 3, 4, 3, 2, 1, 0)]
        stage = lambda i: nn.Sequential(*(MedNeXtBlock(dims, f[i], f[i], expand[i], kernel) for _ in range(blocks[i])))
        self.stem = conv(inputs, width, 1)
        self.encode = nn.ModuleList(map(stage, range(4)))
        self.down = nn.ModuleList(MedNeXtBlock(dims, f[i], f[i + 1], expand[i + 1], kernel, 'down') for i in range(4))
        self.middle = stage(4)
        self.up = nn.ModuleList(MedNeXtBlock(dims, f[i - 1], f[i], expand[i], kernel, 'up') for i in range(5, 9))
        self.decode = nn.ModuleList(map(stage, range(5, 9)))
        self.heads = nn.ModuleList(conv(f[i], classes, 1) for i in range(5))

    def forward(self, x):
        x, kept = self.stem(x), []
        for encode, down in zip(self.encode, self.down):
            kept.append(encode(x))
            x = down(kept[-1])
        x = self.middle(x)
        out = [self.heads[4](x)] if self.training else []
        for i, (up, decode) in enumerate(zip(self.up, self.decode)):
            x = decode(up(x) + kept[3 - i])
            if self.training or i == 3:
                out.insert(0, self.heads[3 - i](x))
        return out if self.training else out[0]


def upkern(small, net):
    """UpKern: `net` takes the weights of `small`, whose depthwise kernels are smaller and are interpolated linearly."""
    mode = {4: 'bilinear', 5: 'trilinear'}
    own, weights = net.state_dict(), small.state_dict()
    net.load_state_dict({k: v if v.shape == own[k].shape else F.interpolate(v, own[k].shape[2:], mode=mode[v.ndim]) for k, v in weights.items()})
    return net


def segmentation_loss(outputs, y):
    """Cross-entropy - soft Dice (of the tumour, over the batch; of each case in 3D), summed over heads with weights 1, 1/2, 1/4 ... of which the
    last is set to 0, then to sum 1. outputs: logits (B,2,...), finest first; y (B,1,...) in {0,1}. Down to -1 for a perfect answer."""
    weights = [0.5 ** i for i in range(len(outputs))]
    weights = [*weights[:-1], 0.0] if len(weights) > 1 else weights
    loss = 0
    for weight, out in zip(weights, outputs):
        if weight:
            t, p = F.interpolate(y, out.shape[2:], mode='nearest-exact'), out.softmax(1)[:, 1:]
            over = tuple(range(2, y.ndim)) + ((0,) if y.ndim == 4 else ())
            dice_ = (2 * (p * t).sum(over) + 1e-5) / (p.sum(over) + t.sum(over) + 1e-5)
            loss = loss + weight / sum(weights) * (F.cross_entropy(out, t[:, 0].long()) - dice_.mean())
    return loss


def spatial(x, y, angle, scale):
    """Images x (B,C,H,W) and masks y turned by angles (B,) in radians and shrunk by scales (B,), outside lies the image's minimum; masks nearest."""
    cos, sin, zero = scale * torch.cos(angle), scale * torch.sin(angle), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid, low = F.affine_grid(theta, list(x.shape), align_corners=False), x.amin((1, 2, 3), True)
    return F.grid_sample(x - low, grid, align_corners=False) + low, F.grid_sample(y, grid, mode='nearest', align_corners=False)


def intensity(x, g):
    """nnU-Net v2's changes of intensity, in its order and with its odds: noise, blur, brightness, contrast, low resolution, gamma of the
    inverted image, gamma. x (B,C,H,W) of mean 0 and deviation 1, not changed in place; g: the generator of all draws."""
    x = x.clone()

    def sometimes(p, change):
        hit = (torch.rand(len(x), generator=g) < p).nonzero()[:, 0]
        if len(hit):
            x[hit] = change(x[hit], lambda low, high: low + (high - low) * torch.rand(len(hit), 1, 1, 1, generator=g))

    def around_1(u, low, high):                                                     # below and above 1 equally often
        return torch.where(u(0, 1) < 0.5, u(low, 1), u(1, high))

    def blur(v, u):
        at = torch.arange(-3.0, 4)
        for shape, pad in (((1, 7), (3, 3, 0, 0)), ((7, 1), (0, 0, 3, 3))):
            k = torch.exp(-at ** 2 / (2 * u(0.5, 1) ** 2)).view(-1, 1, 7)
            k = (k / k.sum(2, True)).repeat_interleave(v.shape[1], 0).view(-1, 1, *shape)
            flat = F.pad(v, pad, mode='reflect').flatten(0, 1)[None]
            v = F.conv2d(flat, k, groups=len(k)).view(v.shape)
        return v

    def contrast(v, u):
        mean, low, high = v.mean((1, 2, 3), True), v.amin((1, 2, 3), True), v.amax((1, 2, 3), True)
        return ((v - mean) * around_1(u, 0.75, 1.25) + mean).clamp(low, high)

    def low_resolution(v, u):
        small = [F.interpolate(w[None], scale_factor=z, mode='nearest-exact') for w, z in zip(v, u(0.5, 1).flatten().tolist())]
        return torch.cat([F.interpolate(w, v.shape[2:], mode='bilinear') for w in small])

    def gamma(v, u, sign=1):
        mean, std, low = v.mean((1, 2, 3), True), v.std((1, 2, 3), keepdim=True), (sign * v).amin((1, 2, 3), True)
        span = (sign * v).amax((1, 2, 3), True) - low
        v = sign * (((sign * v - low) / span.clamp(min=1e-7)) ** around_1(u, 0.7, 1.5) * span + low)
        return (v - v.mean((1, 2, 3), True)) / v.std((1, 2, 3), keepdim=True).clamp(min=1e-7) * std + mean

    sometimes(0.1, lambda v, u: v + u(0, 0.1) * torch.randn(v.shape, generator=g))
    sometimes(0.1, blur)                                                            # 0.2, and half of the channels: here there is one
    sometimes(0.15, lambda v, u: v * around_1(u, 0.75, 1.25))
    sometimes(0.15, contrast)
    sometimes(0.125, low_resolution)
    sometimes(0.1, lambda v, u: gamma(v, u, -1))
    sometimes(0.3, gamma)
    return x


def nnunet_augment(x, y, g):
    """nnU-Net v2's augmentation in 2D, of a batch: any rotation (p 0.2), scale 0.7 to 1.4 (p 0.2), `intensity`, mirrors (p 1/2 each axis)."""
    n = len(x)
    hit, u = torch.rand(2, n, generator=g) < 0.2, torch.rand(2, n, generator=g)
    angle, scale = hit[0] * (2 * u[0] - 1) * math.pi, torch.where(hit[1], 0.7 + 0.7 * u[1], 1.0)
    rows = hit.any(0)
    x, y = x.clone(), y.clone()
    if rows.any():
        x[rows], y[rows] = spatial(x[rows], y[rows], angle[rows], scale[rows])
    x = intensity(x, g)
    for axis in (2, 3):
        rows = torch.rand(n, generator=g) < 0.5
        x[rows], y[rows] = x[rows].flip(axis), y[rows].flip(axis)
    return x, y


def build_segmenter(network, size, width, kernel):
    return PlainUNet(size, width) if network == 'nnunet' else MedNeXt(network[-1], len(size), kernel, width)


def z_score(x):
    return (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True).clamp(min=1e-7)


def train_segmenter(images, masks, steps, device='cpu', seed=0, network='nnunet', width=32, kernel='3', batch=16, augmented=True, optimizer='sgd'):
    """nnU-Net's recipe on slices (N,1,S,S) and masks; each slice to mean 0 and deviation 1. Returns images -> masks (N,S,S).

    Nesterov's SGD (MedNeXt, and on request: AdamW, 1e-3), the rate falls as (1 - step/steps)^0.9, gradients clipped at 12; a third of each batch is drawn
    from slices with tumour. The last weights are taken, as nnU-Net does, so that no patient is needed to choose them. No mirrors at test time.
    """
    layout = torch.channels_last if network == 'nnunet' else torch.contiguous_format      # narrow MedNeXts crash in channels_last (torch 2.13, CPU)

    def build(kernel):
        torch.manual_seed(seed_of(seed, 'segmenter') % 2 ** 32)
        net = build_segmenter(network, images.shape[2:], width, kernel).to(device, memory_format=layout)
        if network == 'nnunet' and optimizer == 'sgd':
            return net, torch.optim.SGD(net.parameters(), 0.01, 0.99, nesterov=True, weight_decay=3e-5)
        return net, torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=3e-5, eps=1e-4)

    net, opt = build(5 if kernel == '5' else 3)
    rate, tumour = opt.param_groups[0]['lr'], np.flatnonzero(masks.reshape(len(masks), -1).any(1))
    third = round(batch / 3) if len(tumour) else 0
    for step in progress(range(steps), 'segmenter', leave=False):
        if kernel == 'upkern' and step == steps // 2:
            small, (net, opt) = net, build(5)
            upkern(small, net)
        for group in opt.param_groups:
            group['lr'] = rate * (1 - step / steps) ** 0.9
        rows = np.concatenate([batch_rows(len(images), batch - third, step, seed), tumour[batch_rows(len(tumour), third, step, (seed, 'tumour'))]])
        x, y = z_score(torch.tensor(images[rows])), torch.tensor(masks[rows]).float()
        if augmented:
            x, y = nnunet_augment(x, y, generator(seed, 'segmenter', step))
        loss = segmentation_loss(net(x.to(device, memory_format=layout)), y.to(device))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 12)
        opt.step()
        if step % 50 == 49 and not math.isfinite(loss.item()):
            fail(f'segmenter: loss {loss.item()} at step {step + 1}, rate {group["lr"]:.2g}; nothing of this training is kept', 1)
    net.eval()

    @torch.no_grad()
    def segment(x):
        return np.concatenate([net(z_score(v).to(device, memory_format=layout)).argmax(1).bool().cpu().numpy() for v in torch.tensor(x).split(64)])

    return segment


# ---------------------------------------------------------------------------------------------------------------------
# cycle
# ---------------------------------------------------------------------------------------------------------------------


def dice(a, b):
    """2 |A and B| / (|A| + |B|) of masks (N,S,S): (N,); nan where both are empty."""
    a, b = a.reshape(len(a), -1) > 0, b.reshape(len(b), -1) > 0
    with np.errstate(invalid='ignore'):
        return 2 * (a & b).sum(1) / (a.sum(1) + b.sum(1))


def cycle(args):
    """mask -> image -> mask: Dice and lesion recall by size on the images, on the same with shuffled masks, and on real test images."""
    device, out = setup(args), Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('bravo'):
        fail(f'--fake {args.fake}: holds masks only; make images with sample.py --bravo RUN')
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = load_slices(args.data, made['pixels'], box=made['box'], split=args.split, cache=args.cache)
    judge, test = real.rows('judge', 0.2, args.seed), real.rows('test', 0.0)
    rows = np.array([i for i, r in enumerate(fake.table) if r['tumour']])
    if min(map(len, (judge, test, rows))) < 8:
        fail(f'--data: {len(judge)} judge and {len(test)} test slices, --fake: {len(rows)} images with tumour; at least 8 of each are needed, see --split')
    segment = train_segmenter(real.images[judge], real.masks[judge], args.train_steps, device, args.seed, width=8, optimizer='adamw')
    images = np.concatenate([fake.images[rows], real.images[test]])
    masks = np.concatenate([fake.masks[rows], real.masks[test]])[:, 0]
    patients = np.array([f'fake:{fake.table[i]["source"] or fake.table[i]["folder"]}' for i in rows] + [real.table[i]['patient'] for i in test])
    found, fakes, reals = segment(images), np.arange(len(rows)), np.arange(len(rows), len(images))
    own = dice(found, masks)
    shuffled = np.concatenate([np.mean([dice(found[i], np.roll(masks[i], k, 0)) for k in range(1, min(11, len(i)))], 0) for i in (fakes, reals)])
    pieces = []
    for i, mask in enumerate(masks):
        labels, n = components(mask)
        pieces += [(i, math.sqrt(4 * (labels == k).sum() / math.pi), found[i][labels == k].any()) for k in range(1, n + 1)]
    pieces = np.array(pieces, float)
    edges = np.quantile(pieces[pieces[:, 0] >= len(rows), 1], (1 / 3, 2 / 3))
    piece_rows = [np.flatnonzero(pieces[:, 0] == i) for i in range(len(images))]

    def measure(i):
        p = pieces[np.concatenate([piece_rows[r] for r in i])]
        size = np.digitize(p[:, 1], edges)
        name = (f'below {edges[0]:.1f} pixels', f'{edges[0]:.1f} to {edges[1]:.1f} pixels', f'above {edges[1]:.1f} pixels')
        return {'Dice, own masks': np.nanmean(own[i]), 'Dice, shuffled masks': np.nanmean(shuffled[i]), 'Dice, own - shuffled': np.nanmean(own[i] - shuffled[i]),
                **{f'lesions found, {n}': p[size == k, 2].mean() if (size == k).any() else math.nan for k, n in enumerate(name)}}

    names, points = list(measure(fakes)), [measure(fakes), measure(reals)]
    draws = [[measure(draw(r, patients, generator(args.seed, 'cycle', k), True)) for r in (fakes, reals)] for k in range(args.repeats)]
    report(out, intervals(names, points, draws), dict(fake=args.fake, hash=made['bravo'], judge_slices=len(judge), images=len(rows), test_slices=len(test)))
    show = np.concatenate([fakes[np.linspace(0, len(fakes), 6, endpoint=False).astype(int)], reals[np.linspace(0, len(reals), 6, endpoint=False).astype(int)]])
    zoom = max(1, 128 // images.shape[-1])
    save_grid(out / 'cycle.png', [[outline(images[i, 0], m[i], c, zoom) for i in show] for m, c in ((masks, (255, 80, 60)), (found, (80, 220, 90)))],
              ['asked for', 'found'], zoom)
    print0(f'the segmenter saw {len(judge)} slices of judge patients; the left half of {out}/cycle.png is generated, the right half real')


# ---------------------------------------------------------------------------------------------------------------------
# control
# ---------------------------------------------------------------------------------------------------------------------


def match(asked, found):
    """Pairs (i, j) of asked and found lesions with the least summed distance of centres; all orders are tried up to 6, else nearest first."""
    if not len(asked) or not len(found):
        return []
    d = np.hypot(asked[:, None, 1] - found[None, :, 1], asked[:, None, 2] - found[None, :, 2])
    if max(d.shape) <= 6:
        few, many = sorted(d.shape)
        e = d if d.shape[0] == few else d.T
        best = min(itertools.permutations(range(many), few), key=lambda order: sum(e[i, j] for i, j in enumerate(order)))
        return [(i, j) if d.shape[0] == few else (j, i) for i, j in enumerate(best)]
    pairs = []
    for i, j in zip(*np.unravel_index(np.argsort(d, axis=None), d.shape)):
        if all(i != a and j != b for a, b in pairs):
            pairs.append((int(i), int(j)))
    return pairs


def spearman(a, b):
    """Rank correlation; ties share their mean rank. nan for fewer than three pairs, or where one side is constant."""
    rank_of = lambda v: np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v])
    return float(np.corrcoef(rank_of(np.asarray(a)), rank_of(np.asarray(b)))[0, 1]) if len(a) > 2 and len({*a}) > 1 and len({*b}) > 1 else math.nan


def control(args):
    """Counts, sizes and places obtained against those asked for; beside each, against the requests of other masks (shuffled)."""
    out = Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('asked'):
        fail(f'--fake {args.fake}: was made without --count, --requests or --hard-cases')
    requests = [np.array([[math.nan if v is None else v for v in lesion] for lesion in r]).reshape(-1, 3) for r in made['asked']]
    rows = read_csv(Path(args.fake) / 'manifest.csv')
    got, wish = [], []
    for r in rows:
        mask = read_nifti(Path(args.fake) / r['folder'] / 'seg.nii.gz')[0][0]
        got.append(lesion_records(mask))
        wish.append(requests[int(r['condition'].split(' request ')[1].split(':')[0])])
    side = made['pixels']
    other = [wish[i] for i in torch.randperm(len(wish), generator=generator(args.seed, 'shuffled')).tolist()]

    def judge(asked, found):
        """Count error, and for each pair with a known size or place: (log sizes), hit."""
        sizes, hits = [], []
        placed = asked[np.isfinite(asked[:, 1])]
        for i, j in match(placed, found):
            hits.append(math.hypot(*(placed[i, 1:] - found[j, 1:])) * side < max(2, placed[i, 0] * side / 2 if np.isfinite(placed[i, 0]) else 2))
        hits += [False] * (len(placed) - len(hits))
        known = np.sort(asked[np.isfinite(asked[:, 0]), 0])[::-1]                      # sizes without a place are compared in order of size
        pairs = [(placed[i, 0], found[j, 0]) for i, j in match(placed, found)] if len(placed) == len(asked) else list(zip(known, np.sort(found[:, 0])[::-1]))
        sizes = [(math.log(a), math.log(b)) for a, b in pairs if np.isfinite(a) and a > 0]
        return len(found) - len(asked), sizes, hits

    scores = [[judge(a, f) for a, f in zip(w, got)] for w in (wish, other)]

    def measure(i, side_):
        some = [scores[side_][k] for k in i]
        error, sizes, hits = np.array([s[0] for s in some]), [p for s in some for p in s[1]], [h for s in some for h in s[2]]
        return {'count exact': (error == 0).mean(), 'count error, mean absolute': np.abs(error).mean(),
                'tumour or none right': np.mean([(len(got[k]) > 0) == (len((wish, other)[side_][k]) > 0) for k in i]),
                'log diameter, Spearman': spearman(*zip(*sizes)) if len(sizes) > 2 else math.nan,
                'log diameter, mean absolute error': np.mean([abs(a - b) for a, b in sizes]) if sizes else math.nan,
                'place hit': np.mean(hits) if hits else math.nan}

    every = np.arange(len(rows))
    points = [measure(every, 0), measure(every, 1)]
    draws = []
    for k in range(args.repeats):
        i = torch.randint(len(rows), (len(rows),), generator=generator(args.seed, 'control', k)).numpy()
        draws.append([measure(i, 0), measure(i, 1)])
    counts = Counter(len(w) for w in wish)
    constant = counts.most_common(1)[0]
    report(out, intervals(list(points[0]), points, draws), dict(fake=args.fake, hash=made.get('seg'), masks=len(rows), best_constant=constant[1] / len(rows)),
           ('asked for', 'shuffled'))
    print0(f'{len(rows)} masks; answering always {constant[0]} would be exact for {constant[1] / len(rows):.3f} of them')
    table = Counter((len(w), min(len(f), 9)) for w, f in zip(wish, got))
    for asked in sorted(counts):
        print0(f'  asked {asked}: ' + ', '.join(f'{n} in {table[asked, n]}' for n in range(10) if table[asked, n]))
    show = np.linspace(0, len(rows), 8, endpoint=False).astype(int)
    zoom, pictures = max(1, 128 // side), []
    for k in show:
        mask = read_nifti(Path(args.fake) / rows[k]['folder'] / 'seg.nii.gz')[0][0]
        want = np.zeros(mask.shape)
        y, x = np.mgrid[:side, :side] + 0.5
        for size, cx, cy in wish[k]:
            if np.isfinite(cx):
                want[np.hypot(x - cx * side, y - cy * side) <= max(size * side / 2 if np.isfinite(size) else 1.5, 1)] = 1
        pictures.append((want * 2 - 1, outline(mask * 2 - 1, want, zoom=zoom)))
    save_grid(out / 'control.png', [[p[0] for p in pictures], [p[1] for p in pictures]], ['asked for', 'drawn'], zoom)
    print0(f'look at {out}/control.png')


# ---------------------------------------------------------------------------------------------------------------------
# downstream
# ---------------------------------------------------------------------------------------------------------------------
ARMS = {f'{name}{end}': sets for end in ('', '_aug') for name, sets in
        (('real', ('data',)), ('synthetic', ('fake',)), ('both', ('data', 'fake')), ('gated', ('data', 'gated')))}
PAIRS = [(f'{a}{end}', f'real{end}') for end in ('', '_aug') for a in ('synthetic', 'both', 'gated')] + [('real_aug', 'real')]
METRICS = ('Dice', 'lesion-wise Dice', 'lesion recall', 'false positives a slice', 'HD95, mm', 'NSD')
LESION = ['arm', 'seed', 'patient', 'folder', 'slice', 'lesion', 'diameter', 'area', 'x', 'y', 'count', 'edge', 'hit', 'unit']
STUDY = ('data', 'fake', 'gated', 'split', 'size', 'engine', 'network', 'kernel', 'optimizer', 'width', 'batch_size', 'iters', 'minutes', 'seed')


def finish_downstream(args):
    """Checks what no parser can, fills in --size, --arms and the brain box of the sets."""
    made = {k: json.loads((Path(root) / 'sample.json').read_text()) for k, root in (('fake', args.fake), ('gated', args.gated)) if root}
    for k, m in made.items():
        if not m.get('bravo'):
            fail(f'--{k} {getattr(args, k)}: holds masks only; make images with sample.py --bravo RUN')
    boxes = {tuple(m['box']) for m in made.values()}
    if len(boxes) > 1:
        fail(f'--gated {args.gated}: its brain box is not that of --fake {args.fake}; make both with the same --bravo run')
    args.box = boxes.pop() if boxes else None
    args.size = args.size or next((m['pixels'] for m in made.values()), 64)
    multiple = 4 if args.network == 'nnunet' else 32                        # MedNeXt halves it four times and norms what is left
    if args.size % multiple:
        fail(f'--size {args.size}: must be a multiple of {multiple} for --network {args.network}')
    if args.network == 'nnunet' and args.kernel != '3':
        fail(f'--kernel {args.kernel}: is of MedNeXt; --network nnunet has 3')
    if args.engine == 'nnunetv2' and (args.network != 'nnunet' or args.optimizer != 'sgd' or args.cross_validate or not args.iters):
        fail('--engine nnunetv2: needs --iters N (its own recipe has 250000), --network nnunet, --optimizer sgd and no --cross-validate')
    for program in NNUNET if args.engine == 'nnunetv2' else ():
        if not shutil.which(program):
            fail(f'--engine nnunetv2: no {program} on the PATH; python3 -m venv nnunet && nnunet/bin/pip install nnunetv2, then PATH="$PWD/nnunet/bin:$PATH"')
    if args.iters and args.minutes:
        fail(f'--iters {args.iters} and --minutes {args.minutes:g}: give one of them')
    args.minutes = args.minutes or (None if args.iters else 5.0)
    can = [a for a, sets in ARMS.items() if all(s == 'data' or s in made for s in sets)]
    lacking = [a for a in args.arms or () if a not in can]
    if lacking:
        fail(f'--arms {lacking[0]}: needs ' + ' and '.join(f'--{s} DIR' for s in ARMS[lacking[0]] if s != 'data'))
    args.arms = args.arms or can
    args.left_out = [a for a in ARMS if a not in can]


@functools.cache
def study_slices(roots, size, box, split, cache):
    return load_slices(roots, size, box=box, split=split, cache=cache)


def arm_slices(args, arm, part='train'):
    """Images (N,1,S,S), masks and table of what an arm trains on: training patients' slices, then the slices of its sets. Any other
    part: the real slices alone. Slices of all sources are drawn alike, so a set weighs as much as it has slices."""
    images, masks, table = [], [], []
    for source in ARMS[arm] if part == 'train' else ('data',):
        s = study_slices(tuple(args.data) if source == 'data' else (getattr(args, source),), args.size, args.box, args.split, args.cache)
        rows = s.rows(part)
        images.append(s.images[rows]), masks.append(s.masks[rows])
        table += [s.table[i] for i in rows]
    return np.concatenate(images), np.concatenate(masks), table


def lesion_wise(found, truth, voxel=1.0):
    """BraTS-METS' lesion-wise Dice of masks (H,W) or (D,H,W): (sum of Dice over real lesions, how many count, how many found pieces are false).

    Pieces of the truth that touch when grown by one voxel are one lesion; those of at most 2 mm^3 (2D: mm^2; voxel is that of one) do not
    count. A found piece belongs to every lesion whose grown form it touches; one that touches none is false, whatever its size.
    """
    around = torch.tensor(list(itertools.product((-1, 0, 1), repeat=truth.ndim))).abs().sum(1) <= 2
    conv = F.conv2d if truth.ndim == 2 else F.conv3d
    grow = lambda m: conv(torch.tensor(m)[None, None].float(), around.view(1, 1, *(3,) * truth.ndim).float(), padding=1)[0, 0].numpy() > 0
    lesions_, pieces = components(grow(truth))[0] * (truth > 0), components(found)[0]
    total, n, touched = 0.0, 0, set()
    for k in np.unique(lesions_[lesions_ > 0]):
        lesion = lesions_ == k
        own = set(pieces[grow(lesion)].tolist()) - {0}
        touched |= own
        if lesion.sum() * voxel > 2:
            mine = np.isin(pieces, list(own))
            total, n = total + 2 * (mine & lesion).sum() / (mine.sum() + lesion.sum()), n + 1
    return float(total), n, len(set(np.unique(pieces).tolist()) - {0} - touched)


def border_distances(a, b, spacing):
    """mm from each border pixel of mask a (H,W) to the nearest of b; the image's diagonal where b is empty. A border pixel has one of its four
    neighbours outside."""
    def border(m):
        p = np.pad(m, 1)
        return np.argwhere(m & ~(p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:])) * spacing
    p, q = border(a), border(b)
    if not len(q):
        return np.full(len(p), math.hypot(*(np.array(a.shape) * spacing)))
    return np.hypot(*(p[:, None] - q[None]).transpose(2, 0, 1)).min(1) if len(p) else np.zeros(0)


def patient_metrics(found, truth, spacing, tolerance=None):
    """METRICS of one patient: masks (N,S,S) of all its slices, spacing (N,2) mm. Slices are judged in 2D, each for itself, and pooled.

    Both empty: Dice, lesion-wise Dice and NSD 1, HD95 0. One empty: 0, and HD95 the image's diagonal. Without a lesion there is no recall (nan).
    """
    total = found.sum() + truth.sum()
    scores, n, false = np.sum([lesion_wise(f, t, math.prod(s)) for f, t, s in zip(found, truth, spacing)], 0)
    hits = [bool(f[labels == k].any()) for f, (labels, m) in zip(found, map(components, truth)) for k in range(1, m + 1)]
    near, apart = [], [[], []]
    for f, t, s in zip(found, truth, spacing):
        for side, d in enumerate((border_distances(f, t, s), border_distances(t, f, s))):
            near.append(d <= (max(s) if tolerance is None else tolerance) + 1e-6)
            apart[side].append(d)
    apart, near = [np.concatenate(d) for d in apart], np.concatenate(near)
    return dict(zip(METRICS, (
        float(2 * (found & truth).sum() / total) if total else 1.0, float(scores / (n + false)) if n + false else 1.0, float(np.mean(hits)) if hits else math.nan,
        float(false / len(found)), max([float(np.percentile(d, 95)) for d in apart if len(d)], default=0.0), float(near.mean()) if len(near) else 1.0)))


def lesion_rows(arm, seed, table, images, found, truth):
    """Rows of LESION: each piece of the real masks, whether found, and what might explain it. Sizes in mm as the headers say, x and y in the brain box."""
    out = []
    for r, image, f, t in zip(table, images, found, truth):
        labels, n = components(t)
        outside = np.argwhere(~np.pad(head_mask(image)[0], 1)) - 1 if n else None
        for k in range(1, n + 1):
            at = np.argwhere(labels == k)
            area, centre = len(at) * math.prod(r['spacing']), at.mean(0)
            edge = np.hypot(*((outside - centre) * r['spacing']).T).min()
            out.append([arm, seed, r['patient'], r['folder'], r['z'], k, f'{math.sqrt(4 * area / math.pi):.4g}', f'{area:.5g}',
                        *(f'{(centre[i] + 0.5) / t.shape[i]:.4f}' for i in (1, 0)), n, f'{edge:.4g}', int(f[labels == k].any()), 'mm'])
    return out


def signed_rank(d):
    """Two-sided exact p of Wilcoxon's signed-rank test (Wilcoxon 1945) of differences: zeros dropped, ties share ranks, every sign pattern
    counted. 1 without a difference."""
    d = np.asarray(d, float)
    d = d[d != 0]
    if not len(d):
        return 1.0
    size = np.abs(d)
    rank2 = np.array([2 * (size < v).sum() + (size == v).sum() + 1 for v in size])        # twice the mean rank: whole numbers
    ways = np.zeros(rank2.sum() + 1)
    ways[0] = 1
    for r in rank2:
        ways[r:] += ways[:-r].copy()
        ways /= 2
    w = rank2[d > 0].sum()
    return float(min(1.0, 2 * min(ways[:w + 1].sum(), ways[w:].sum())))


def hodges_lehmann(d):
    """The median of the means of all pairs, each with itself too (Hodges 1963)."""
    i, j = np.triu_indices(len(d))
    return float(np.median((d[i] + d[j]) / 2))


def compare_arms(values, repeats, seed):
    """values {arm: (patients, metrics)}, means over seeds -> rows [metric, comparison, n, effect, low, high, p, p_holm] of PAIRS that are there and
    of the interaction of a set with augmentation, (with set and aug - with set) - (aug - neither). Holm over a metric's comparisons."""
    rows = []
    for m, metric in enumerate(METRICS):
        of = {a: v[:, m] for a, v in values.items()}
        differ = {f'{a} - {b}': of[a] - of[b] for a, b in PAIRS if {a, b} <= of.keys()}
        differ |= {f'{a} x aug': (of[f'{a}_aug'] - of[a]) - (of['real_aug'] - of['real']) for a in ('both', 'gated')
                   if {a, f'{a}_aug', 'real', 'real_aug'} <= of.keys()}
        differ = {k: d[np.isfinite(d)] for k, d in differ.items() if np.isfinite(d).any()}
        p = [signed_rank(d) for d in differ.values()]
        for (k, d), raw, corrected in zip(differ.items(), p, holm(p)):
            draws = [hodges_lehmann(d[torch.randint(len(d), (len(d),), generator=generator(seed, 'effect', i)).numpy()]) for i in range(repeats)]
            rows.append([metric, k, len(d), hodges_lehmann(d), *np.percentile(draws, (2.5, 97.5)).tolist(), raw, corrected])
    return rows


def arms_png(path, values, table):
    """One panel a metric of METRICS[:2]: a dot for each patient, the mean and its interval, for each arm."""
    left, step, high = 60, 92, 220
    image = Image.new('RGB', (max(left + step * len(values) + 20, 560), 2 * (high + 70)), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for m in (0, 1):
        top = 30 + m * (high + 70)
        put = lambda v: top + (1 - v) * high
        draw.text((left, top - 22), f'{METRICS[m]} on real test patients: a dot is one, bar and line are the mean and its 95 %', (0, 0, 0), font)
        for v in (0, 0.25, 0.5, 0.75, 1):
            draw.line([(left, put(v)), (image.width - 20, put(v))], (225, 225, 225))
            draw.text((left - 34, put(v) - 7), f'{v:.2f}', (60, 60, 60), font)
        for i, arm in enumerate(values):
            x, colour = left + step * (i + 0.5), COLOURS[list(ARMS).index(arm) % 4]
            for j, v in enumerate(values[arm][:, m]):
                at = x - 24 + 48 * (j + 0.5) / len(values[arm])
                draw.ellipse([at - 3, put(v) - 3, at + 3, put(v) + 3], fill=colour)
            mean, *bounds = table[arm][METRICS[m]]
            draw.line([(x + 32, put(bounds[0])), (x + 32, put(bounds[1]))], (0, 0, 0), 2)
            draw.line([(x + 26, put(mean)), (x + 38, put(mean))], (0, 0, 0), 3)
            draw.text((x - draw.textlength(arm, font) / 2, top + high + 6), arm, colour, font)
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    atomic_write(path, buffer.getvalue())


def trained_once(args, name, steps, arm_images, arm_masks, seed, augmented, images, device):
    """What a training's segmenter finds in images (N,1,S,S): from results/NAME.npz if that training was finished, else trained and written."""
    file = Path(args.out) / 'results' / f'{name}.npz'
    if not file.exists():
        start = time.perf_counter()
        if args.engine == 'nnunetv2':
            found = nnunetv2(args, name, steps, augmented, device)
        else:
            found = train_segmenter(arm_images, arm_masks, steps, device, seed, args.network, args.width, args.kernel, args.batch_size, augmented,
                                    args.optimizer)(images)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, found=found)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, buffer.getvalue())
        print0(f'{name}: {len(arm_images)} slices, {steps} steps, {time.perf_counter() - start:.0f} s')
    found = np.load(file)['found']
    if found.shape != images[:, 0].shape:
        fail(f'{file}: holds {found.shape[0]} slices, expected {len(images)}; choose another --out')
    return found


def study_steps(args, device):
    """The number of steps of every training, from --iters or by timing 20; kept in study.json. Fails when a flag there differs."""
    out, now = Path(args.out), {k: v for k, v in plain(args).items() if k in STUDY}
    counts = {s: len(arm_slices(args, a)[0]) for s, a in (('data', 'real'), ('fake', 'synthetic'), ('gated', 'gated')) if getattr(args, s)}
    if (out / 'study.json').exists():
        old = json.loads((out / 'study.json').read_text())
        changed = [f'--{k.replace("_", "-")} {now[k]} (was {old[k]})' for k in STUDY if old[k] != now[k]]
        changed += [f'{n} training slices of --{s} (were {old["slices"].get(s)})' for s, n in counts.items() if old['slices'].get(s) != n]
        if changed:
            fail(f'--out {out}: holds a study with other flags: {", ".join(changed[:4])}; choose another --out, or repeat its flags')
        return old['steps']
    steps = args.iters
    if not steps:
        images, masks, _ = arm_slices(args, args.arms[0])
        seconds = []
        for n in (2, 22):
            start = time.perf_counter()
            train_segmenter(images, masks, n, device, args.seed, args.network, args.width, args.kernel, args.batch_size, optimizer=args.optimizer)
            seconds.append(time.perf_counter() - start)
        seconds = (seconds[1] - seconds[0]) / 20
        steps = max(int(args.minutes * 60 / seconds), 1)
        print0(f'{seconds:.3f} s a step of {args.batch_size}: {steps} steps in {args.minutes:g} minutes, for every training')
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / 'study.json', json.dumps(dict(now, steps=steps, slices=counts), indent=1).encode())
    return steps


def downstream(args):
    """Trains a segmenter on each arm, with each seed, and compares them on the real test patients; or on folds of training patients."""
    device, out = setup(args), Path(args.out)
    images, masks, table = arm_slices(args, 'real', 'test')
    arm_images, arm_masks, arm_table = arm_slices(args, 'real')
    patients = np.array([r['patient'] for r in table])
    if len({*patients}) < 2 or not arm_masks.any():
        fail(f'--data {" ".join(args.data)}: {len({*patients})} test patients (2 are needed), {int(arm_masks.any((1, 2, 3)).sum())} training slices with '
             'tumour; see --split')
    n = sum(p.numel() for p in build_segmenter(args.network, (args.size,) * 2, args.width, 5 if args.kernel == '5' else 3).parameters())
    print0(f'{args.network}, {n:,} parameters, slices of {args.size}x{args.size}'
           + ('' if args.width == 32 else f'; width {args.width}, the published networks have 32'))
    if args.cross_validate:
        return cross_validate(args, arm_images, arm_masks, arm_table, device)
    if args.left_out:
        print0(f'left out for want of a set: {", ".join(args.left_out)}')
    steps = study_steps(args, device)
    truth, names = masks[:, 0] > 0, sorted({*patients})
    spacing = np.array([r['spacing'] for r in table])
    results, found, rows = {a: [] for a in args.arms}, {}, []
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in args.arms:
            own_images, own_masks, _ = arm_slices(args, arm)
            f = trained_once(args, f'{arm}_{seed}', steps, own_images, own_masks, seed, arm.endswith('_aug'), images, device)
            if not (f & truth).any():
                print0(f'WARNING: {arm}_{seed} touches no real lesion: this training failed, and its zeros compare nothing; take more steps')
            scores = {p: patient_metrics(f[patients == p], truth[patients == p], spacing[patients == p], args.tolerance) for p in names}
            atomic_write(out / 'results' / f'{arm}_{seed}.json', json.dumps(dict(arm=arm, seed=seed, steps=steps, slices=len(own_images), patients=scores), indent=1).encode())
            results[arm].append([list(scores[p].values()) for p in names])
            found.setdefault(arm, f)
            rows += lesion_rows(arm, seed, table, images, f, truth)
    write_csv(out / 'lesions.csv', LESION, rows)
    write_csv(out / 'patients.csv', ['arm', 'seed', 'patient', *METRICS],
              [[arm, args.seed + k, p, *v] for arm, r in results.items() for k, s in enumerate(r) for p, v in zip(names, s)])

    values = {arm: np.mean(r, 0) for arm, r in results.items()}                                   # (patients, metrics)
    draws = [torch.randint(len(names), (len(names),), generator=generator(args.seed, 'downstream', k)).numpy() for k in range(args.repeats)]
    summary = {arm: {m: [float(np.nanmean(v[:, i])), *np.nanpercentile([np.nanmean(v[d, i]) for d in draws], (2.5, 97.5)).tolist()]
                     for i, m in enumerate(METRICS)} for arm, v in values.items()}
    tests = compare_arms(values, args.repeats, args.seed)
    print0(f'{len(names)} real test patients, {len(table)} slices (2D, pooled over a patient), {args.seeds} seeds, {steps} steps; mean over patients')
    print_table(['arm', *METRICS], [[arm, *(f'{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]' for v in s.values())] for arm, s in summary.items()])
    header = ['metric', 'comparison', 'patients', 'effect', 'low', 'high', 'p', 'p_holm']
    print0()
    print_table(header, [[*r[:3], *(f'{v:.3f}' for v in r[3:])] for r in tests if r[0] in METRICS[:2]])
    write_csv(out / 'tests.csv', header, tests)
    write_csv(out / 'metrics.csv', ['arm', *(f'{m}{end}' for m in METRICS for end in ('', ', low', ', high'))],
              [[arm, *itertools.chain(*s.values())] for arm, s in summary.items()])
    keys = [k for k in summary if k != args.arms[0]]                                              # as analysis.py compare reads it: against the first arm
    atomic_write(out / 'metrics.json', json.dumps(dict(
        fake=args.fake, gated=args.gated, network=args.network, width=args.width, parameters=n, steps=steps, seeds=args.seeds, patients=len(names),
        slices=len(table), arms=summary, tests=[dict(zip(header, r)) for r in tests],
        metrics={f'{m}, {k}': dict(zip(('fake', 'fake_low', 'fake_high', 'floor', 'floor_low', 'floor_high'), summary[k][m] + summary[args.arms[0]][m]))
                 for k in keys for m in METRICS}), indent=1).encode())
    arms_png(out / 'arms.png', values, summary)
    pair = next(([a, b] for b, a in (('both_aug', 'real_aug'), ('both', 'real')) if {a, b} <= found.keys()), args.arms[:2])
    order = np.flatnonzero(truth.any((1, 2)))
    order = order[np.argsort(np.mean([dice(found[a], truth)[order] for a in pair], 0), kind='stable')]
    show, zoom = np.concatenate([order[:5], order[len(order) // 2 - 2:][:5]]), max(1, 128 // args.size)
    save_grid(out / 'slices.png', [[outline(images[i, 0], m[i], c, zoom) for i in show] for m, c in
                                   ((truth, (255, 80, 60)), *((found[a], (80, 220, 90)) for a in pair))], ['truth', *pair], zoom)
    print0(f'look at {out}/arms.png, and at {out}/slices.png: the five worst slices, then five typical ones')


def cross_validate(args, images, masks, table, device):
    """real_aug on all folds but one of the training patients, its lesions found or missed in that one: cv_lesions.csv. No test patient is seen."""
    out, patients = Path(args.out), np.array([r['patient'] for r in table])
    names = sorted({*patients})
    if len(names) < args.cross_validate:
        fail(f'--cross-validate {args.cross_validate}: there are {len(names)} training patients')
    steps, rows, truth = study_steps(args, device), [], masks[:, 0] > 0
    order = torch.randperm(len(names), generator=generator(args.seed, 'folds')).tolist()
    fold = {names[k]: i % args.cross_validate for i, k in enumerate(order)}
    for k in range(args.cross_validate):
        held = np.array([fold[p] == k for p in patients])
        f = trained_once(args, f'cv{args.cross_validate}_{k}', steps, images[~held], masks[~held], args.seed, True, images[held], device)
        rows += lesion_rows('real_aug', args.seed, [r for r, h in zip(table, held) if h], images[held], f, truth[held])
    write_csv(out / 'cv_lesions.csv', LESION, rows)
    hits = [r[LESION.index('hit')] for r in rows]
    print0(f'{len(names)} training patients in {args.cross_validate} folds: {sum(hits)} of {len(hits)} lesions found; {out}/cv_lesions.csv')


# ---------------------------------------------------------------------------------------------------------------------
# downstream --engine nnunetv2: the published program, through its command line, on the same slices
# ---------------------------------------------------------------------------------------------------------------------
NNUNET = ('nnUNetv2_plan_and_preprocess', 'nnUNetv2_train', 'nnUNetv2_predict')
TRAINER = """import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA


class nnUNetTrainerShort(nnUNetTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = {epochs}, {steps}, 1, 1


class nnUNetTrainerShortNoDA(nnUNetTrainerShort, nnUNetTrainerNoDA):
    pass
"""


def export_nnunet(args, arm, raw):
    """Writes an arm as nnU-Net v2's raw data: training slices real_*, syn_*, those of val patients val_*, test slices test_*. dataset.json last.

    Every pixel measures 1 and a slice is 999 thick, so that nnU-Net sees the same 64 x 64 (or --size) pixels as --engine own, resamples nothing.
    """
    shutil.rmtree(raw, ignore_errors=True)
    for folder in ('imagesTr', 'labelsTr', 'imagesTs'):
        (raw / folder).mkdir(parents=True)
    n = 0
    for part in ('train', 'val', 'test'):
        images, masks, table = arm_slices(args, arm, part)
        if not table:
            fail(f'--data {" ".join(args.data)}: no slice of a {part} patient, and nnU-Net needs some; see --split')
        for i, (image, mask, row) in enumerate(zip(images, masks, table)):
            name = f'{part if part != "train" else "real" if row["root"] in map(str, args.data) else "syn"}_{i:06d}'
            for folder, a in ((f'images{"Ts" if part == "test" else "Tr"}/{name}_0000', image), *([] if part == 'test' else [(f'labelsTr/{name}', mask)])):
                nib.save(nib.Nifti1Image(a[0].T[..., None], np.diag([1.0, 1, 999, 1])), raw / f'{folder}.nii.gz')
            n += part != 'test'
    atomic_write(raw / 'dataset.json', json.dumps(dict(channel_names={'0': 'T1'}, labels=dict(background=0, tumour=1), numTraining=n, file_ending='.nii.gz')).encode())


def nnunetv2(args, name, steps, augmented, device):
    """What nnU-Net v2, trained on an arm, finds in the test slices: (N,S,S) bool. Goes on where a killed call stopped: export, plans, epoch.

    Every arm has raw data, plans, splits and results of its own. Real val patients validate, synthetic slices only train. Its last weights
    are taken, without mirrors at test time, as --engine own does. It draws from no seed: seeds are repeats.
    """
    arm, seed = name.rsplit('_', 1)
    root, here = Path(args.out).resolve() / 'nnunet' / arm, 'Dataset001_study'
    raw, plans = root / 'raw' / here, root / 'preprocessed' / here
    # passive: threads that spin while they wait made a step 30 times as long on cores that others use
    env = {'nnUNet_def_n_proc': '1', 'nnUNet_compile': 'f', 'OMP_WAIT_POLICY': 'PASSIVE', **os.environ, 'nnUNet_raw': str(raw.parent),
           'nnUNet_preprocessed': str(plans.parent), 'nnUNet_results': str(root / f'results_{seed}'), 'nnUNet_extTrainer': str(root / 'trainer')}
    root.mkdir(parents=True, exist_ok=True)
    with open(root / 'lock', 'w') as lock:                                # its programs hold it too: one may outlive a killed call
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f'{root}: another process is still at work there; end it, or wait')

        def run(program, *flags):
            log = root / f'{program}_{seed}.log'
            print0(f'{name}: {program} {" ".join(flags)}; log: {log}')
            with open(log, 'w') as f:
                more = {'nnUNet_n_proc_DA': os.environ.get('nnUNet_n_proc_DA', '0') if program == NNUNET[1] else '1'}           # its planner fails with 0
                code = subprocess.run([program, *flags], env={**env, **more}, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()]).returncode
            if code:
                last = [line for line in log.read_text(errors='replace').splitlines() if line.strip()][-1:]
                fail(f'{program} ended with code {code}: {"".join(last) or "it said nothing"}; see {log}. The same command tries this step again; to begin the arm anew, '
                     f'remove {root}', 1)

        if not (raw / 'dataset.json').exists():
            export_nnunet(args, arm, raw)
        cases = sorted(f.name[:-7] for f in (raw / 'labelsTr').iterdir())
        if not (plans / 'splits_final.json').exists():
            run(NNUNET[0], '-d', '1', '-c', '2d', '--verify_dataset_integrity', '-np', '1', '-npfp', '1')
            told = json.loads((plans / 'nnUNetPlans.json').read_text())
            net = told['configurations']['2d']
            net['batch_size'], shape = args.batch_size, net['architecture']['arch_kwargs']
            shape['features_per_stage'] = [min(args.width * 2 ** i, 512) for i in range(shape['n_stages'])]
            atomic_write(plans / 'nnUNetPlans.json', json.dumps(told, indent=1).encode())
            folds = [dict(train=[c for c in cases if not c.startswith('val_')], val=[c for c in cases if c.startswith('val_')])]
            atomic_write(plans / 'splits_final.json', json.dumps(folds, indent=1).encode())
        epochs = min(20, steps)
        (root / 'trainer').mkdir(exist_ok=True)
        (root / 'trainer/short.py').write_text(TRAINER.format(epochs=epochs, steps=round(steps / epochs)))
        how = ('-device', torch.device(device).type, '-tr', 'nnUNetTrainerShort' if augmented else 'nnUNetTrainerShortNoDA')
        if not (root / f'results_{seed}' / here / f'{how[-1]}__nnUNetPlans__2d/fold_0/checkpoint_final.pth').exists():
            run(NNUNET[1], '1', '2d', '0', *how, '--c')
        run(NNUNET[2], '-i', str(raw / 'imagesTs'), '-o', str(root / f'found_{seed}'), '-d', '1', '-c', '2d', '-f', '0', *how, '--disable_tta', '-npp', '1', '-nps', '1')
    files = sorted((root / f'found_{seed}').glob('test_*.nii.gz'))
    return np.stack([np.asarray(nib.load(f).dataobj)[..., 0].T > 0 for f in files])


HEADER = ['metric', 'fake', 'fake_low', 'fake_high', 'floor', 'floor_low', 'floor_high', 'above_low', 'above_high']


def intervals(names, points, draws):
    """Rows of HEADER: value and 2.5 to 97.5 % of the draws for both sides, and the interval of their difference."""
    def between_(values):
        values = np.array(values, float)
        return [float(np.nanpercentile(values, q)) if np.isfinite(values).any() else math.nan for q in (2.5, 97.5)]
    return [[n, float(points[0][n]), *between_([d[0][n] for d in draws]), float(points[1][n]), *between_([d[1][n] for d in draws]),
             *between_([d[0][n] - d[1][n] for d in draws])] for n in names]


def report(out, table, about, sides=('fake', 'real')):
    """Prints the table and writes metrics.csv and metrics.json."""
    print0(f'{"":34}{sides[0]:>9}  {"95 %":^19}{sides[1]:>9}  {"95 %":^19}  difference, 95 %')
    for name, *v in table:
        print0(f'{name:34}{v[0]:9.3f}  [{v[1]:7.3f}, {v[2]:7.3f}]  {v[3]:9.3f}  [{v[4]:7.3f}, {v[5]:7.3f}]  [{v[6]:7.3f}, {v[7]:7.3f}]')
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'metrics.csv', HEADER, table)
    atomic_write(out / 'metrics.json', json.dumps({**about, 'metrics': {r[0]: dict(zip(HEADER[1:], r[1:])) for r in table}}, indent=1).encode())


def main(args):
    {'quality': quality, 'cycle': cycle, 'control': control, 'downstream': downstream}[args.command](args)


if __name__ == '__main__':
    main(get_args())
