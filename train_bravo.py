"""Trains the image generator: a T1 BRAVO slice that fits a tumour mask.

  python train_bravo.py --rflow --steps 100                         the built-in phantom, minutes on two cores
  python train_bravo.py --rflow --data DIR --out runs/mine          your patients (one folder each: bravo.nii.gz, seg.nii.gz)
  python train_bravo.py --rflow --data DIR --volume 32 --size 64    volumes of 32 slices (train_seg.py: their masks)
  python train_bravo.py --rflow --data DIR --perceptual 0.01 --perceptual-weights vgg16.pth
  python train_bravo.py --vae 4 --data DIR --out runs/vae           an autoencoder; then the image model on its latents:
  python train_bravo.py --rflow --latent runs/vae --data DIR
  python train_bravo.py --rflow --dual t1_pre,t1_gd --data DIR      both images of a patient at once, before and after contrast agent

The network sees the noisy image and the mask as two channels. Beside train_seg.py this file has the mask channel, the
losses on images, reflow and the spaces (--wavelet, --latent, --vae); the rest is the same, line by line. Leaves in --out: ckpt.pt, log.csv,
loss_by_t.csv, samples_*.png.
"""
from common import *


def get_args(argv=None):
    p = train_parser(__doc__.split('\n')[0], 'runs/bravo')
    g = p.add_argument_group('image loss')
    g.add_argument('--perceptual', type=number(float, 0), default=0.0, help='weight of the VGG16 distance at low noise; 0: off')
    g.add_argument('--perceptual-weights', metavar='FILE', help='VGG16 weights; none: torchvision\'s are fetched')
    g.add_argument('--lpips-weights', metavar='FILE', help='LPIPS linear heads; none: layers unweighted')
    g.add_argument('--fft', type=number(float, 0), default=0.0, help='weight of the focal frequency loss at low noise; 0: off')
    g.add_argument('--fft-log', type=number(float, 0), default=0.0, help='weight of the log-magnitude spectrum loss at low noise; 0: off')
    g = p.add_argument_group('stacks')
    g.add_argument('--neighbours', type=number(int, 0, 8), default=0, metavar='K', help='also show the K slices below, for sample.py --stack; 0: off')
    g = p.add_argument_group('reflow')
    g.add_argument('--reflow', metavar='DIR', help='train on the pairs of noise and image in DIR (sample.py --pairs) instead of patients')
    g.add_argument('--distill', action='store_true', help='with --reflow: only at t=1, for images in one step')
    g = p.add_argument_group('space: where the process acts (none: on pixels)')
    g.add_argument('--wavelet', action='store_true', help='on Haar bands: 4 channels of half the side')
    g.add_argument('--latent', metavar='RUN', help='on latents: of this autoencoder (a run of --vae), or as this run on latents does')
    g = p.add_argument_group('pair')
    g.add_argument('--dual', type=two_files, metavar='PRE,POST', help='make these two images of a patient jointly, instead of bravo, as t1_pre,t1_gd')
    g = p.add_argument_group('MAISI\'s published networks (with --volume)')
    g.add_argument('--maisi-vae', metavar='FILE', help='autoencoder_v1.pt or v2: the space; with --vae 4, what that training starts from')
    g.add_argument('--maisi-unet', metavar='FILE', help='diff_unet_3d_*.pt: start from it, with the scale factor that it holds; also with --latent RUN')
    g.add_argument('--maisi-class', type=number(int, 0, 127), help='what that network calls these images (rflow); none: 9, MRI T1')
    g.add_argument('--splits', type=number(int, 1, 64), default=1, help='slabs in which the autoencoder\'s 3D convolutions are computed, to save memory')
    g = p.add_argument_group('autoencoder')
    g.add_argument('--vae', choices=tuple(VAES), help='train an autoencoder and no image model: factor an axis; multiscale: 8, in three stages')
    g.add_argument('--latent-channels', type=number(int, 1, 256), default=4, help='of the (last) latent')
    g.add_argument('--kl', type=number(float, 0), default=1e-6, help='weight of the KL, it and the L1 being sums over an image')
    g.add_argument('--gan', type=number(float, 0), default=0.0, help='pull of a patch GAN, in units of the reconstruction\'s; 0: off, 0.5 is usual')
    g.add_argument('--gan-from', type=number(float, 0, 1), default=0.5, help='share of the steps before the GAN joins')
    args = p.parse_args(argv)
    given = {k for k, v in vars(args).items() if v != p.get_default(k)}
    args = finish_spaces(finish_args(prepare_vae(prepare_maisi(args, given), given)), given)
    if args.neighbours and (args.wavelet or args.latent or args.reflow or args.dual or args.model == 'mmdit'):
        fail(f'--neighbours {args.neighbours}: shows pixels of patients as channels; leave --wavelet, --latent, --reflow, --dual and --model mmdit away')
    if args.reflow and not (args.rflow and args.init):
        fail('--reflow: straightens a trained flow; add --rflow and --init RUN, the run that made the pairs')
    if args.reflow and args.progressive:
        fail('--reflow and --progressive: pairs have one size; leave --progressive away')
    if args.reflow and (args.augment or not sorted(Path(args.reflow).glob('pairs_*.npz'))):
        fail(f'--reflow {args.reflow}: expected a folder of sample.py --pairs, and no --augment (it would part an image from its noise)')
    if args.distill and not args.reflow:
        fail('--distill: learns one step from pairs; add --reflow DIR')
    if args.reflow and args.prune:
        fail('--reflow and --prune: prune the network on patients first, then give that run to --init')
    idle = [f'--{k.replace("_", "-")}' for k in ('curriculum', 'logit_normal', 'min_snr', 'perceptual', 'fft', 'fft_log') if getattr(args, k)]
    idle += [f'--schedule {args.schedule}'] if args.schedule in WIDTHS else []
    if args.distill and idle:
        fail(f'--distill and {idle[0]}: distillation asks the network at t=1 alone, where that does nothing; leave it away')
    if args.dual and (args.latent or args.perceptual):
        fail(f'--dual and --{"latent" if args.latent else "perceptual"}: autoencoders and VGG16 know single images; leave it away (--wavelet and --fft do pairs)')
    if args.perceptual and min(args.progressive or (args.size,)) < 16:
        fail(f'--perceptual {args.perceptual:g}: VGG16 halves an image four times; use --size 16 or more')
    if args.gan and args.size < 12:
        fail(f'--gan {args.gan:g}: its patches need --size 12 or more')
    if (args.perceptual_weights or args.lpips_weights) and not args.perceptual:
        fail('--perceptual-weights and --lpips-weights do nothing without --perceptual W; 0.01 is a start')
    for name in ('perceptual_weights', 'lpips_weights'):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: no such file')
    args.script = 'bravo'
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Spaces: Haar bands and latents
# ---------------------------------------------------------------------------------------------------------------------
ONLY_VAE = {'vae', 'latent_channels', 'kl', 'gan', 'gan_from'}
WITH_VAE = ONLY_VAE | {
    'data', 'split', 'size', 'volume', 'crop', 'labels', 'empty_slices', 'speck', 'augment', 'cache', 'preset', 'channels', 'layers', 'norm_groups', 'iters', 'minutes',
    'batch_size', 'lr', 'warmup', 'lr_find', 'weight_decay', 'clip', 'ema_decay', 'out', 'seed', 'device', 'dtype', 'compile', 'save_every',
    'keep_every', 'sample_every', 'perceptual', 'perceptual_weights', 'lpips_weights', 'maisi_vae', 'splits'}


def prepare_vae(args, given):
    """Before presets are filled in: what an autoencoder does not use is refused; its number of levels follows from its factor."""
    name = next(iter(sorted(given - WITH_VAE if args.vae else given & ONLY_VAE)), None)
    if name:
        fail(f'--{name.replace("_", "-")}: ' + ('an autoencoder (--vae) has no process, condition or attention; leave it away' if args.vae
                                                else 'is for an autoencoder; add --vae'))
    if not args.vae:
        return args
    if args.dtype == 'pure-bf16':
        fail('--dtype pure-bf16: is for image and mask models; an autoencoder trains in bf16 or fp32')
    if 'gan_from' in given and not args.gan:
        fail(f'--gan-from {args.gan_from:g}: does nothing without --gan W; 0.5 is a start')
    levels, widths = len(VAES[args.vae]) + 1, args.channels or ()
    if widths and len(widths) != levels:
        fail(f'--channels has {len(widths)} levels; --vae {args.vae} has {levels}')
    if args.vae == 'multiscale' and any(4 * a % b for a, b in zip(widths, widths[1:])):
        fail(f'--channels {",".join(map(str, widths))}: the shortcuts of multiscale need 4 times each width to be a multiple of the next')
    args.attention, args.head_channels = (0,) * levels if widths else None, 1
    return args


def finish_spaces(args, given):
    """After presets: an autoencoder's widths where none were given, and what cannot go with a space."""
    if args.vae:
        if 'channels' not in given:
            args.channels = tuple(args.channels[0] // 2 * m for m in (1, 2, 4, 4)[:len(VAES[args.vae]) + 1])            # full: MAISI's widths
        args.attention, factor = (0,) * len(args.channels), max(math.prod(s) for s in zip(*VAES[args.vae]))
        for name, n in (('size', args.size), ('volume', args.volume or 0), *(('crop', n) for n in args.crop or ())):
            if n % factor:
                fail(f'--{name} {n}: --vae {args.vae} needs a multiple of {factor}')
        if args.iters == 0:
            fail('--iters 0: there is no autoencoder to start from; train it')
    if not (args.wavelet or args.latent):
        return args
    name, factor = '--wavelet' if args.wavelet else '--latent', (2,) * (3 if args.volume else 2)
    if args.wavelet and args.latent:
        fail('--wavelet and --latent are two spaces; give one')
    if args.target == 'eps' and args.maisi != 'ddpm':                        # which has no other, and a smaller sigma / alpha at t=1
        fail(f'{name}: near t=1 x0_hat = (x_t - sigma eps_hat) / alpha blows up, and here it cannot be clipped as in pixels; add --rflow, '
             'or --target v or x0')
    if args.init_range:
        fail(f'--init-range: is of images; leave it away with {name}')
    for k in ('crop', 'inflate'):
        if getattr(args, k):
            fail(f'{name} and --{k}: that is for volumes of voxels; leave one of them away')
    if args.latent and args.progressive:
        fail('--latent and --progressive: an autoencoder has one size; leave --progressive away')
    if args.latent:
        about, theirs = read_autoencoder(args.latent)
        factor = build_autoencoder(argparse.Namespace(**about['args']))[1]
        for k in ('size', 'volume'):
            if theirs and theirs['args'].get(k) != getattr(args, k):
                fail(f'--latent {args.latent}: was trained with --{k} {theirs["args"].get(k)}; this run has {getattr(args, k)}')
    levels = len(args.channels or (0,))
    step = 2 ** (levels - 1) if args.model == 'unet' else args.patch
    for size in args.progressive or (args.size,):
        wrong = [k for k, n, f in (('volume', args.volume or 0, factor[0]), ('size', size, max(factor[-2:]))) if n % (f * step)]
        if wrong:
            fail(f'--{wrong[0]} {getattr(args, wrong[0])}: {name} and {f"{levels} levels need" if args.model == "unet" else "patches need"} a multiple of {max(factor) * step}; '
                 f'give {"fewer --channels and --attention" if args.model == "unet" else "a smaller --patch"}')
    return args


def read_autoencoder(path):
    """What a Space stores of the autoencoder in a run (shift and scale only where the run acts on latents itself), and the run's state.
    Of a file of MAISI's autoencoder the same, and None."""
    state = load_checkpoint(path)
    if isinstance(state, dict) and 'encoder.blocks.0.conv.conv.weight' in state:
        return read_maisi_vae(path, state), None
    if not isinstance(state, dict) or not {'args', 'ema', 'box'} <= state.keys():
        fail(f'--latent {path}: is not a run of train_bravo.py')
    if 'weights' in (state.get('space') or {}):
        return state['space'], state
    if not state['args'].get('vae'):
        fail(f'--latent {path}: holds no autoencoder; give a run of train_bravo.py --vae')
    args = {k: state['args'].get(k) for k in ('vae', 'channels', 'layers', 'latent_channels', 'norm_groups', 'volume', 'maisi_vae')}
    return dict(args=args, weights=state['ema'], hash=weights_hash(state['ema'])), state


def read_maisi_vae(path, state):
    """What a Space stores of MAISI's autoencoder, its shape told by its weights."""
    try:
        weights = load_maisi_vae(state)
        downs = sorted(int(k.split('.')[1]) for k in weights if re.fullmatch(r'encoder\.\d+\.conv\.weight', k))
        shape = dict(channels=[len(weights[f'encoder.{i - 1}.norm2.weight']) for i in (*downs, 2 * downs[-1] - downs[-2])], layers=downs[0] - 1,
                     latent_channels=len(weights['mean.weight']), norm_groups=32)
        if weights['encoder.0.weight'].shape[1] != 1 or len(downs) != 2:
            fail(f'--maisi-vae {path}: has {weights["encoder.0.weight"].shape[1]} input channels and {len(downs) + 1} levels; the autoencoder of images has 1 and 3')
        about = dict(args=dict(vae='4', volume=True, maisi_vae=True, **shape), weights=weights, hash=weights_hash(weights))
        build_autoencoder(argparse.Namespace(**about['args']))[0].load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
        fail(f'--maisi-vae {path}: is no autoencoder of MAISI ({type(e).__name__} {str(e)[:150]}); expected a bare state dict, as autoencoder_v1.pt is')
    return about


def read_maisi_unet(path):
    """Of a file of MAISI's diffusion U-Net: weights under our names, kind, UNet's arguments, scale factor. The original predicts x_0 - eps where
    it is rflow: its last layer is turned round."""
    state = load_file(path)
    try:
        weights, kind, shape = load_maisi_unet({k.removeprefix('module.'): v for k, v in state['unet_state_dict'].items()})
        scale = float(state['scale_factor'])
        if kind == 'rflow':
            weights |= {k: -weights[k] for k in ('out.2.weight', 'out.2.bias')}
        return weights, kind, shape, scale
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        fail(f'--maisi-unet {path}: is no diffusion U-Net of MAISI ({type(e).__name__} {e}); expected a dict with unet_state_dict and scale_factor, as diff_unet_3d_*.pt is')


def prepare_maisi(args, given):
    """Before presets: what MAISI's files say is set, and may not be said otherwise."""
    for name in ('maisi_vae', 'maisi_unet'):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            fail(f'--{name.replace("_", "-")} {getattr(args, name)}: no such file')
        if getattr(args, name) and not args.volume:
            fail(f'--{name.replace("_", "-")}: is for volumes; add --volume D')
    if args.splits > 1 and not (args.volume and (args.vae or args.latent or args.maisi_vae)):
        fail(f'--splits {args.splits}: is for the autoencoder of volumes; add --volume, and --vae, --latent or --maisi-vae')
    if args.maisi_class is not None and not args.maisi_unet:
        fail(f'--maisi-class {args.maisi_class}: does nothing without --maisi-unet')
    fixed = {}
    if args.maisi_vae:
        about = read_maisi_vae(args.maisi_vae, load_file(args.maisi_vae))
        if args.latent or args.vae not in (None, '4'):
            fail(f'--maisi-vae {args.maisi_vae}: is an autoencoder with a factor of 4; leave --latent away, and --vae, or say --vae 4')
        if args.vae:
            fixed = {k: about['args'][k] for k in ('channels', 'layers', 'latent_channels', 'norm_groups')}
        else:
            args.latent = args.maisi_vae
    if args.maisi_unet:
        if args.vae or args.init or not args.latent:
            fail('--maisi-unet: starts a model on latents; add --maisi-vae FILE or --latent RUN, and leave --vae and --init away')
        _, args.maisi, fixed, _ = read_maisi_unet(args.maisi_unet)
        if args.rflow != (args.maisi == 'rflow'):
            fail(f'--maisi-unet {args.maisi_unet}: is the {args.maisi} version; {"add" if args.maisi == "rflow" else "leave away"} --rflow')
        fixed = {k: v for k, v in fixed.items() if k not in ('in_channels', 'out_channels')}
        if args.maisi == 'rflow':
            args.maisi_class = 9 if args.maisi_class is None else args.maisi_class
        else:
            fixed |= dict(schedule='maisi', target='eps', steps=1000)
    wrong = sorted(given & {*fixed, *(('model', 'curriculum') if args.maisi_unet else ())})
    if wrong:
        fail(f'--{wrong[0].replace("_", "-")}: follows from MAISI\'s file; leave it away')
    for name, value in fixed.items():
        setattr(args, name, tuple(value) if isinstance(value, list) else value)
        given.add(name)
    return args


def load_maisi(net, args):
    """Starts net from --maisi-unet. The channels of the mask are new columns of zeros: the network starts as what it was."""
    weights = read_maisi_unet(args.maisi_unet)[0]
    first = weights['conv_in.weight']
    weights['conv_in.weight'] = F.pad(first, (0, 0) * 3 + (0, net.in_channels - first.shape[1]))
    own = net.state_dict()                                                     # with --sparse24 under names of its own
    try:
        if plain_names(own).keys() != weights.keys():
            raise RuntimeError('other tensors: ' + ', '.join(sorted({*plain_names(own)} ^ {*weights})))
        net.load_state_dict({k: weights.get(plain_name(k), v) for k, v in own.items()})
    except RuntimeError as e:
        fail(f'--maisi-unet {args.maisi_unet}: does not fit ({str(e)[:200]}); are autoencoder and network of one release?')
    print0(f'MAISI: {len(weights)} tensors from {args.maisi_unet}, {args.maisi} version')


@torch.no_grad()
def encode_once(space, data, cache, device):
    """space.transform of every slice, on disk: memmap (N,C,h,w) float32. Written aside and renamed, as load_slices does."""
    shape = (len(data.images), *space.shape(data.images.shape[-1]))
    key = hashlib.sha256(repr((Path(data.images.filename).parent.name, space.about['hash'])).encode()).hexdigest()[:20]
    file = Path(cache) / f'latents_{key}.f32'
    if not file.exists():
        tmp = file.with_name(f'.{file.name}.{uuid.uuid4().hex[:8]}.tmp')
        try:
            with open(tmp, 'wb') as f:
                step = 1 if space.depth else 64
                for i in progress(range(0, len(data.images), step), 'encoding', leave=False):
                    space.transform(torch.tensor(data.images[i:i + step]).to(device)).cpu().numpy().tofile(f)
            os.replace(tmp, file)
        finally:
            tmp.unlink(missing_ok=True)
    return np.memmap(file, np.float32, 'r', shape=shape)


def moments(parts):
    """Mean and standard deviation (1e-4 at least) of each channel over parts (B,C,...), in fp64."""
    n, total, square = 0, 0, 0
    for z in parts:
        z, axes = z.double(), (0, *range(2, z.ndim))
        n, total, square = n + z[:, 0].numel(), total + z.sum(axes), square + z.square().sum(axes)
    return total / n, (square / n - (total / n) ** 2).clamp(min=1e-8).sqrt()


@torch.no_grad()
def make_space(args, state, data, rows, device):
    """The run's space and, for latents, the memmap of all slices before shift and scale. Shift and scale are measured once, on the
    training slices; a run that goes on keeps its own, one that starts from another (--init) that one's."""
    about, theirs = read_autoencoder(args.latent)[0] if args.latent else {}, state or (load_checkpoint(args.init) if args.init else {})
    if args.init and isinstance(theirs, dict) and 'args' in theirs:
        kind = lambda run: 'latents' if run.get('latent') else 'bands' if run.get('wavelet') else 'pixels'
        if kind(theirs['args']) != kind(vars(args)) or (theirs.get('space') or {}).get('hash') != about.get('hash'):
            fail(f'--init {args.init}: acts on {kind(theirs["args"])}, this run on {kind(vars(args))}, or they have not the same autoencoder; '
                 f'make them agree (--latent {args.init} takes the one of that run)')
    if not (args.wavelet or args.latent):
        return Space(depth=args.volume, channels=data.images.shape[1]), None
    about, channels = theirs.get('space') or about, about['args']['latent_channels'] if args.latent else (8 if args.volume else 4) * data.images.shape[1]
    if args.maisi and not state:                                             # the factor that the network knows, never one measured anew
        about |= dict(shift=torch.zeros(channels), scale=torch.full((channels,), 1 / read_maisi_unet(args.maisi_unet)[3]))
    space = Space({'shift': torch.zeros(channels), 'scale': torch.ones(channels), **about}, args.volume).to(device)
    latents = encode_once(space, data, args.cache, device) if args.latent else None
    if 'scale' not in about:
        parts = (rows[i:i + 64] for i in range(0, len(rows), 64))
        shift, scale = moments(torch.from_numpy(latents[r]) if args.latent else haar(torch.from_numpy(data.images[r])) for r in parts)
        space = Space({**about, 'shift': shift.float(), 'scale': scale.float()}, args.volume).to(device)
    told = ', '.join(f'{m:.3f} +- {s:.3f}' for m, s in zip(space.shift.flatten().tolist(), space.scale.flatten().tolist()))
    print0(f'space: {space.name} of {" x ".join(map(str, space.shape(args.size)))}, each channel shifted and scaled by its {told}; '
           'held-out errors of different spaces do not compare')
    return space, latents


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def kl(mean, log_var):
    """KL(N(mean, exp(log_var)) || N(0, 1)), summed over each image's latent: (B,)."""
    return (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1) / 2


class PatchGAN(nn.Module):
    """Judges patches of images (B,1,H,W), 34 (layers=2) or 70 (3) pixels a side (Isola 2017). Group norm, so that an image's verdict
    does not depend on its batch."""

    def __init__(self, width=32, layers=2):
        super().__init__()
        net, c = [nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2)], width
        for i in range(1, layers + 1):
            o = width * 2 ** min(i, 3)
            net += [nn.Conv2d(c, o, 4, 2 if i < layers else 1, 1), GroupNorm(8, o), nn.LeakyReLU(0.2)]
            c = o
        self.net = nn.Sequential(*net, nn.Conv2d(c, 1, 4, 1, 1))

    def forward(self, x):
        return self.net(x)


def adaptive_weight(loss, gan_loss, layer):
    """|d loss / d layer| / |d gan_loss / d layer|, at most 1e4: with it both pull equally at the decoder's last weights (Esser 2021, eq. 7).
    The published code adds 1e-4 below; 1e-8 here, against 0 / 0 alone."""
    norms = []
    for value in (loss, gan_loss):
        grad = torch.autograd.grad(value, layer, retain_graph=True)[0]
        if world() > 1:
            dist.all_reduce(grad)
        norms.append(grad.norm())
    return (norms[0] / (norms[1] + 1e-8)).clamp(max=1e4)


def vae_stage(step, args):
    """Which stage of a multi-scale autoencoder learns: each has a sixth of the steps, on frozen earlier ones; then (None) all together."""
    if args.vae != 'multiscale' or args.iters is None or 2 * step >= args.iters:
        return None
    return 2 * step * len(VAES['multiscale']) // args.iters


def train_vae(args, state, data, rows, val, seen, device):
    """Trains an autoencoder: L1 + VGG16 distance + KL + patch GAN. Run folder, resume and random numbers as the image model's.

    The loss is per pixel: mean L1 + K KL / pixels = (summed L1 + K KL) / pixels, K = --kl. The usual K = 1e-6 belongs to sums (Rombach
    2022): beside a mean L1 and an undivided KL it would be too strong by the number of pixels. A GAN (hinge loss) joins at --gan-from, but not while
    the stages of multiscale learn alone.
    """
    whole = (*([args.volume] if args.volume else []), args.size, args.size)
    out, grid = Path(args.out), (args.crop[0], args.crop[1], args.crop[1]) if args.crop else whole
    torch.manual_seed(seed_of(args.seed, 'weights') % 2 ** 32)
    net, factor = build_autoencoder(args)
    if args.maisi_vae and not state:
        net.load_state_dict(read_autoencoder(args.maisi_vae)[0]['weights'])
    net, pixels, few = channels_last(net.to(device)), math.prod(grid), 2 if args.volume else 16
    disc = PatchGAN(layers=3 if args.size >= 128 else 2).to(device, memory_format=torch.channels_last) if args.gan else nn.Module()
    ema, both = EMA(net, args.ema_decay), nn.ModuleList([net, disc])
    opt = torch.optim.AdamW([dict(params=[*net.parameters()]), *([dict(params=[*disc.parameters()], betas=(0.5, 0.9))] if args.gan else [])],
                            args.lr, weight_decay=args.weight_decay, fused=True)
    vgg = VGG16(args.perceptual_weights, args.lpips_weights).to(device) if args.perceptual else None
    start = 0
    if state:
        net.load_state_dict(state['net']), ema.net.load_state_dict(state['ema']), disc.load_state_dict(state['disc']), opt.load_state_dict(state['opt'])
        start, ema.updates = state['step'], state['ema_updates']
    if args.compile and args.gan:
        torch._functorch.config.donated_buffer = False                       # adaptive_weight goes back through the graph twice
    model = torch.compile(net) if args.compile else net
    shape = (args.latent_channels, *(n // f for n, f in zip(grid, factor)))
    stages = getattr(net, 'stages', [net])
    print0(f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters; {" x ".join(map(str, grid))} pixels become {" x ".join(map(str, shape))}: '
           f'{math.prod(factor)} times less {"volume" if args.volume else "area"}, {pixels / math.prod(shape):g} times fewer numbers')

    def reconstruct(network, x, noise=None, stage=None):
        with autocast(device, args.dtype):
            return [v.float() for v in network(x, noise, stage)]

    def train_step(step, lr):
        """One optimiser step, a function of (seed, step) like the image model's; each process takes its part. Returns loss, gradient norm."""
        B, part, stage = args.batch_size, args.batch_size // world(), vae_stage(step, args)
        mine = slice(rank() * part, (rank() + 1) * part)
        picked = rows[batch_rows(len(rows), B, step, args.seed)][mine]
        u = torch.rand(B, 5, generator=generator(args.seed, 'step', step))[mine]
        noise = torch.randn(B, *shape, generator=generator(args.seed, 'noise', step, device=device), device=device)[mine]
        x = torch.tensor(data.images[picked])
        x = augment(x, torch.zeros_like(x), u, args.augment)[0] if args.augment else x
        x = (crop_volumes(x, x, args.crop, torch.rand(B, 4, generator=generator(args.seed, 'crop', step))[mine])[0] if args.crop else x).to(device)
        for k, s in enumerate(stages):
            s.requires_grad_(stage in (None, k))
        drawn = stage in (None, len(stages) - 1)                             # only the last latent is drawn and has a KL
        recon, mean, log_var = reconstruct(model, x, noise if drawn else None, stage)
        loss = (recon - x).abs().mean()
        if vgg:
            loss = loss + args.perceptual * vgg.distance(recon, x).mean()
        total = loss + args.kl / pixels * kl(mean, log_var).mean() if drawn else loss
        if args.gan and stage is None and (args.iters is None or step >= args.gan_from * args.iters):
            disc.requires_grad_(False)
            fooled = -disc(recon).mean()
            total = total + args.gan * adaptive_weight(loss, fooled, stages[0].decoder[-1].weight) * fooled
            total.backward()
            disc.requires_grad_(True)
            ((F.relu(1 - disc(x)) + F.relu(1 + disc(recon.detach()))).mean() / 2).backward()
        else:
            total.backward()
        for p in both.parameters() if world() > 1 else ():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world()
        norm = [nn.utils.clip_grad_norm_(group['params'], args.clip) for group in opt.param_groups][0]
        for group in opt.param_groups:
            group['lr'] = lr
        opt.step()
        opt.zero_grad(set_to_none=True)
        return total.detach(), norm

    @torch.no_grad()
    def held_out(network, stage):
        """Mean L1 on validation patients, of the latent's mean."""
        picked = val[batch_rows(len(val), min(128, len(val)), 0, 0)]
        parts = [torch.tensor(data.images[picked[i:i + few]]).to(device) for i in range(0, len(picked), few)]
        return float(torch.cat([(reconstruct(network, x, None, stage)[0] - x).abs().flatten(1).mean(1) for x in parts]).mean())

    if args.lr_find and not state:
        lr_find(train_step, both, opt, out)
    if args.iters is None:
        args.iters = iters_for(args.minutes, train_step, both, opt, device, args.lr)
    show_every = args.sample_every or max(args.iters // 4, 1)
    spacing = np.median([data.table[i]['spacing'] for i in data.rows('train')], 0).tolist()
    if rank() == 0:
        log = Log.start(args, data, ['step', 'loss', 'lr', 'grad_norm', 's_per_step', 'held_out', 'held_out_raw', 'stage'], start)
    if start >= args.iters:
        print0(f'{out}: complete at step {start}; another length needs another --out')

    stop, recent, clock = Stop(), [], time.perf_counter()
    bar = progress(range(start, args.iters), initial=start, total=args.iters)
    for step in bar:
        loss, norm = train_step(step, lr_at(step, args))
        ema.update(net)
        recent.append(loss + 0 * norm)                                        # a gradient that is none counts as well
        done, stage = step + 1, vae_stage(step, args)
        signum = stop.asked(device) if world() == 1 or done % 10 == 0 else 0
        final, show = done == args.iters, done % show_every == 0 or done == args.iters
        keep = final or signum or done % args.save_every == 0 or args.keep_every and done % args.keep_every == 0
        if done % 20 == 0 or show or keep:
            values = checked(recent, done, args)
            seconds, recent = (time.perf_counter() - clock) / len(values), []
            if rank() == 0:
                bar.set_postfix(loss=f'{np.mean(values):.4f}', refresh=False)
                scores = dict(held_out_raw=held_out(net, stage), held_out=held_out(ema.net, stage)) if show and len(val) else {}
                if show:
                    reconstructions(lambda x: reconstruct(ema.net, x, None, stage)[0], data, val if len(val) else rows, device, out / f'samples_{done:06d}.png')
                log.add(step=done, loss=float(np.mean(values)), lr=lr_at(step, args), grad_norm=float(norm), s_per_step=seconds,
                        stage='all' if stage is None else stage + 1, **scores)
            clock = time.perf_counter()
        if keep and rank() == 0:
            save_checkpoint(out, dict(net=net.state_dict(), ema=ema.net.state_dict(), ema_updates=ema.updates, disc=disc.state_dict(),
                                      opt=opt.state_dict(), step=done, args=plain(args), box=list(data.box), spacing=spacing, in_channels=1,
                                      out_channels=1, extra_dim=0, seen=seen), args.keep_every)
        if signum and not final:
            bar.close()
            print0(f'{out}: stopped by signal {signum} and saved at step {done}; the same command goes on')
            raise SystemExit(128 + signum)
    stop.restore()
    if rank() == 0 and (start < args.iters or not (out / 'reconstruction.csv').exists()):           # a kill may have come between
        plot(out / 'log.png', {'loss': log.curve('loss'), 'held-out L1 (EMA)': log.curve('held_out')}, str(out), 'step', 'loss', logy=True)
        report_reconstruction(lambda x: reconstruct(ema.net, x)[0], data, data.rows('val'), device, factor, out)
        print0(f'{out}: {args.iters} steps done; look at {out}/samples_{args.iters:06d}.png, then: python train_bravo.py --rflow --latent {out}')
    barrier()


@torch.no_grad()
def reconstructions(f, data, rows, device, path):
    """A picture of eight slices, from the one with the least tumour up: real, f(real), twice their difference, lesions outlined."""
    tumour = np.array([data.table[r]['tumour'] for r in rows])
    order = np.argsort(np.where(tumour, tumour, tumour.max() + 1), kind='stable')[:max((tumour > 0).sum(), 8)]
    picked = rows[order[np.linspace(0, len(order), 8 if data.images.ndim == 4 else 3, endpoint=False).astype(int)]]
    x, masks = torch.tensor(data.images[picked]), data.masks[picked, 0]
    y, zoom, flat = f(x.to(device)).cpu(), max(1, 128 // x.shape[-1]), views(masks, masks)
    save_grid(path, [[outline(i, m, zoom=zoom) for i, m in zip(views(images[:, 0].numpy(), masks), flat)] for images in (x, y, 2 * (y - x))],
              ['real', 'reconstruction', 'difference x 2'], zoom)


BINS_MM = (5, 10, 20)                    # of a lesion's diameter in its slice: of a disc of its area


@torch.no_grad()
def report_reconstruction(f, data, rows, device, factor, out):
    """PSNR and SSIM of f(slice) on held-out patients, of whole slices and inside lesions by size: reconstruction.csv, and printed.

    PSNR = 10 log10(4 / error), with the squared error averaged over slices, or over lesions (a small one counts as much as a large
    one). "resize": area averages on a grid of the latent's size, enlarged linearly: what the factor alone would leave. Volumes are
    measured slice by slice, but for the resize.
    """
    bins = [f'lesions {a}' for a in ('below 5 mm', '5 to 10 mm', '10 to 20 mm', 'from 20 mm')]
    found = {name: [] for name in ('slices', *bins)}
    volume = len(factor) == 3
    pool, mode = (F.adaptive_avg_pool3d, 'trilinear') if volume else (F.adaptive_avg_pool2d, 'bilinear')
    for i in range(0, len(rows), 2 if volume else 16):
        picked = rows[i:i + (2 if volume else 16)]
        x, masks = torch.tensor(data.images[picked]), data.masks[picked, 0]
        y = f(x.to(device)).cpu().clamp(-1, 1)
        coarse = F.interpolate(pool(x, [s // n for s, n in zip(x.shape[2:], factor)]), x.shape[2:], mode=mode)
        if volume:
            picked, masks = picked.repeat(x.shape[2]), masks.reshape(-1, *masks.shape[2:])
            x, y, coarse = (v[:, 0].flatten(0, 1)[:, None] for v in (x, y, coarse))
        luminance, structure = ssim_parts(*(F.pad(v, (5,) * 4, mode='reflect') for v in (x, y)))
        maps = torch.cat([(y - x).square(), luminance * structure, (coarse - x).square()], 1).numpy()                       # (B, 3, S, S)
        for r, m, mask in zip(picked, maps, masks):
            row, (labels, n) = data.table[r], components(mask)
            found['slices'].append((row['patient'], *m.mean((1, 2))))
            for k in range(1, n + 1):
                mm = math.sqrt(4 * (labels == k).sum() * math.prod(row['spacing'][-2:]) / math.pi)
                found[bins[int(np.searchsorted(BINS_MM, mm, 'right'))]].append((row['patient'], *m[:, labels == k].mean(1)))
    psnr, table = lambda error: f'{10 * math.log10(4 / max(float(np.mean(error)), 1e-12)):.2f}', []
    for name, values in found.items():
        patients, error, ssim, coarse = zip(*values) if values else ((),) * 4
        table.append([name, len(values), len({*patients}), *((psnr(error), f'{np.mean(ssim):.4f}', psnr(coarse)) if values else ('',) * 3)])
    header = ['held out', 'n', 'patients', 'PSNR, dB', 'SSIM', 'PSNR of resize, dB']
    write_csv(out / 'reconstruction.csv', header, table)
    for row in (header, *table):
        print0(f'{row[0]:22s}' + ''.join(f'{v!s:>{max(len(h) + 2, 10)}s}' for h, v in zip(header[1:], row[1:])))


# ---------------------------------------------------------------------------------------------------------------------
# The image model
# ---------------------------------------------------------------------------------------------------------------------


def perceptual_loss(vgg, x0_hat, x_0, t, process):
    """Sum over the batch of the VGG16 distance between x0_hat and x_0, both as images, where it means something: SNR > 1.

    With more noise x0_hat is the mean of many brains, which must be blurred; a distance that punishes blur would pull it
    away from the mean and bias the sampler (Zhang 2018 for the distance; Lee 2024, arXiv 2405.20320 for its place).
    """
    clear = (process.log_snr(t) > 0).nonzero().flatten().to(x_0.device)           # t is on the CPU: no wait for the GPU
    if not len(clear):
        return x_0.new_zeros(())
    return vgg.distance(process.from_range(x0_hat[clear]), process.from_range(x_0[clear])).sum()


def fft_loss(x0_hat, x_0, t, process, focal=1.0, log=0.0):
    """Sum over the batch of two distances between the spectra of x0_hat and x_0, both as images, where SNR > 1, in fp32.

    focal: mean of w |F - F_0|^2, w = |F - F_0| over its largest in the image, no gradient (Jiang 2021, 2012.12821, eq. 8 with alpha 1).
    log: mean | log|F| - log|F_0| | without the mean intensity. Neither has E[x_0|x_t] as its minimum: small weights, low noise.
    """
    clear = (process.log_snr(t) > 0).nonzero().flatten().to(x_0.device)
    if not len(clear):
        return x_0.new_zeros(())
    with torch.autocast(x_0.device.type, enabled=False):                          # no FFT in bf16
        F_hat, F_0 = (torch.fft.fft2(process.from_range(v[clear].float()), norm='ortho') for v in (x0_hat, x_0))
        apart = (F_hat - F_0).abs()
        w = (apart / apart.amax((-2, -1), keepdim=True).clamp(min=1e-12)).detach()
        ratio = (torch.log(F_hat.abs() + 1e-3) - torch.log(F_0.abs() + 1e-3)).abs().flatten(2)[..., 1:]
        return focal * (w * apart.square()).flatten(1).mean(1).sum() + log * ratio.flatten(1).mean(1).sum()


def read_pairs(directory, size, split, space=Space()):
    """The shards of sample.py --pairs in one: noise, image (N,C,...) in the space, mask (N,1,S,S), level (N,). Fails when a mask's patient may not train."""
    shards = [np.load(f) for f in sorted(Path(directory).glob('pairs_*.npz'))]
    pairs = {k: np.concatenate([s[k] for s in shards]) for k in ('noise', 'image', 'mask', 'level', 'source')}
    guided = {tuple(map(float, g)) for s in shards if 'guidance' in s for g in s['guidance']} - {(1.0, 0.0, 1.0, 0.0)}
    if guided:
        print0(f'{directory}: its images were guided ({", ".join(f"--cfg {g[0]:g} from {g[1]:g} to {g[2]:g}, rescale {g[3]:g}" for g in sorted(guided))}); this run learns that: draw it without')
    if pairs['mask'].shape[-1] != size or pairs['image'].shape[1:] != space.shape(size):
        fail(f'--reflow {directory}: holds images of {pairs["mask"].shape[-1]} pixels as {pairs["image"].shape[1:]}; --size is {size}, as {space.shape(size)}')
    split_patients([dict(name=s, source=s, synthetic=True, folder=f'{directory}') for s in sorted({*pairs['source'].tolist()})], split)
    return argparse.Namespace(**{k: torch.from_numpy(v) for k, v in pairs.items() if k != 'source'})


@torch.no_grad()
def straightness(net, process, pairs, args, device, n=64, steps=25):
    """Mean over a pixel of the integral of |(noise - image) - dx/dt|^2 along the model's own paths; 0 when they are straight (Liu 2022, eq. 8)."""
    mask = pairs.mask[:n].float().to(device)
    context, mask = request_tokens(mask, args), mask_condition(mask, args.p_uncond)
    extra = pairs.level[:n, None].float().to(device) if args.slice_level else None
    start, slopes = pairs.noise[:n].to(device), []
    end = sample_euler(make_denoise(net, process, mask, context, extra, args.dtype), start, process.times(min(steps, args.steps or steps)), process,
                       None, lambda i, t, x_t, x_0: slopes.append((x_t - x_0) / t))
    return float(torch.stack([(start - end - v).square().mean() for v in slopes]).mean())


def below(table, k):
    """Row numbers of the k slices below each of a table's, the nearest first: (N,k); -1 where its folder has none."""
    of = [(r['root'], r['folder']) for r in table]
    return np.array([[i - j if i >= j and of[i - j] == of[i] else -1 for j in range(1, k + 1)] for i in range(len(of))], np.int64).reshape(len(of), k)


def worn(near, u, noise):
    """Neighbours (B,K,S,S) as a sampler may show them: an image in five has none (0 everywhere, which is no slice), the others have noise
    of standard deviation 0 to 0.2, for a drawn slice has faults, which must not grow along a stack (Ho 2022, 2106.15282). u (B,2) uniform."""
    gone, sigma = u.T[..., None, None, None]
    return torch.where((gone < 0.2) | (near == 0).all((2, 3), keepdim=True), 0.0, near + 0.2 * sigma * noise)


def main(args):
    # run folder, data
    device, out, Conv3d.splits = setup(args), Path(args.out), args.splits
    state = None if args.dry_run else open_run(args)
    print0(f'{out}: preset {args.preset}, {args.device}, {args.dtype}' + (f', going on from step {state["step"]}' if state else ''))
    roots = args.data or [phantom_root(args.cache)]
    known = state or (load_run(args.init).__dict__ if args.reflow else args.latent and read_autoencoder(args.latent)[1])   # pairs and autoencoders have a box
    sizes = args.progressive or (args.size,)                                 # data has the last one: what the run is for
    sets = {s: load_slices(roots, s, args.dual or ('bravo',), known and known['box'], args.split, args.cache, args.labels, args.speck, depth=args.volume) for s in sizes}
    data = sets[args.size]
    rows, val = data.rows('train', args.empty_slices, args.seed), data.rows('val', args.empty_slices, args.seed)
    if not len(rows):
        fail(f'--data {" ".join(map(str, roots))}: no slice of a training patient; see --split')
    space, latents = make_space(args, state, data, rows, device)
    pairs = read_pairs(args.reflow, args.size, args.split, space) if args.reflow else None
    if pairs and args.slice_level and pairs.level.isnan().any():
        fail(f'--reflow {args.reflow}: its masks know no level; leave --slice-level away, or make pairs with runs that have it')
    rows = np.arange(len(pairs.image)) if pairs else rows
    level = torch.tensor([r['level'] for r in data.table])
    levels = quantiles(pairs.level if pairs else level[rows]) if args.slice_level else None            # sample.py draws levels like these for masks that know none
    lower = below(data.table, args.neighbours)
    seen = patients_seen(data, state, args.init, args.latent, sets=[args.reflow])
    print0(f'training on {len(rows)} {"pairs" if pairs else "volumes" if args.volume else "slices"}, held out {len(val)}')
    if args.vae:
        return train_vae(args, state, data, rows, val, seen, device)

    def batch(picked, size=args.size):
        """Images in [-1,1] (B,1,[D,]S,S), with --dual (B,2,S,S), masks in {0,1} (B,1,[D,]S,S), slice level (B,1) or None, on the CPU."""
        extra = maisi_extra(args, [data.table[i]['spacing'] for i in picked]) if args.maisi else level[picked][:, None] if args.slice_level else None
        return torch.tensor(sets[size].images[picked]), torch.tensor(sets[size].masks[picked]).float(), extra

    def near(picked, size=args.size):
        """The slices below (B,K,S,S), 0 where there is none; None without --neighbours."""
        if not args.neighbours:
            return None
        return torch.tensor(sets[size].images[lower[picked]][:, :, 0] * (lower[picked] >= 0)[..., None, None].astype(np.float32))

    def to_x_0(images, picked):
        """x_0 of a batch; latents were encoded once, but an augmented image has another latent."""
        known = latents is not None and not args.augment
        return (torch.from_numpy(latents[picked]).to(device) - space.shift) / space.scale if known else process.to_range(images)

    # network, process, optimiser
    torch.manual_seed(seed_of(args.seed, 'weights') % 2 ** 32)
    net = build_net(args, in_channels=space.in_channels(1 + (args.p_uncond > 0)) + args.neighbours, out_channels=space.channels,
                    extra_dim=int(args.slice_level))
    if args.init and not state:
        load_init(net, args)
    if args.maisi and not state:
        load_maisi(net, args)
    net = net.to(device)
    process = build_process(args)
    process.space = space
    if args.prune and not state:                                             # of the network from --init; the training goes on with what is left
        few = args.batch_size if args.volume else 64
        x_0, mask, extra = (v if v is None else v.to(device) for v in batch(rows[:few]))
        prune(net, process, args, process.to_range(x_0), mask_condition(mask, args.p_uncond, near=near(rows[:few])), request_tokens(mask, args), extra)
    if state:
        fit_pruned(net, state['net'], out)
        net.load_state_dict(state['net'])
    net = channels_last(net)
    ema = EMA(net, args.ema_decay)
    if args.dtype == 'pure-bf16':
        pure_bf16(net)
    opt = build_optimizer(net, args)
    vgg = VGG16(args.perceptual_weights, args.lpips_weights).to(device) if args.perceptual else None
    losses, curriculum, start = LossByT(device), Curriculum(args), 0
    if state:
        ema.net.load_state_dict(state['ema']), opt.load_state_dict(state['opt'])
        start, ema.updates, curriculum.state = state['step'], state['ema_updates'], state['curriculum']
        losses.sums.copy_(state['loss_by_t'] * (rank() == 0))
    model = torch.compile(net) if args.compile else net
    if world() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    print0(f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {"RFlow" if args.rflow else "DDPM " + args.target}'
           f'{f", {args.steps} times" if args.steps else ", continuous time"}, batch {args.batch_size}')

    def pair_batch(picked, size):
        """The same of pairs, whose images are in the process's range already."""
        return pairs.image[picked], pairs.mask[picked].float(), pairs.level[picked].float()[:, None] if args.slice_level else None

    def train_step(step, lr):
        """One optimiser step. All that is random is a function of (seed, step) and drawn for the whole batch, of which each
        process takes its part: so resuming and the number of processes change nothing. Returns loss, gradient norm."""
        B, part = args.batch_size, args.batch_size // world() // args.accumulate
        size = sizes[stage_of(step, args)[0]]
        picked = rows[batch_rows(len(rows), B, step, args.seed)]
        g = generator(args.seed, 'step', step)
        t, u = process.draw_t(B, g, curriculum.window, process.shift if args.maisi else size / sizes[0]), torch.rand(B, 5, generator=g)
        present = torch.rand(B, generator=g) >= args.p_uncond                # whose condition the network is told
        noise = torch.randn(B, *([1, *args.crop, args.crop[1]] if args.crop else space.shape(size)),
                            generator=generator(args.seed, 'noise', step, device=device), device=device)
        if args.neighbours:                                                  # draws of their own, so that all others stay as they are
            g = generator(args.seed, 'neighbours', step)
            w, wear = torch.rand(B, 2, generator=g), torch.randn(B, args.neighbours, size, size, generator=g)
        if pairs:
            noise, t = pairs.noise[picked].to(device), torch.ones(B) if args.distill else t
        for _, sparse in sparse_layers(net) if args.dense_tail else ():
            sparse.dense.fill_(args.iters is not None and step >= (1 - args.dense_tail) * args.iters)
        total = torch.zeros((), device=device)
        for k in range(args.accumulate):
            mine = slice((rank() * args.accumulate + k) * part, (rank() * args.accumulate + k + 1) * part)
            x_0, mask, extra = (v if v is None else v.to(device, non_blocking=True) for v in (pair_batch if pairs else batch)(picked[mine], size))
            shown = near(picked[mine], size)
            if args.augment:
                x_0, mask = augment(x_0 if shown is None else torch.cat([x_0, shown.to(device)], 1), mask, u[mine], args.augment)
            if shown is not None:
                none = (shown == 0).all((2, 3), keepdim=True)                # augment fills the outside with background
                shown = torch.where(none, 0.0, x_0[:, 1:].cpu()) if args.augment else shown
                x_0, shown = x_0[:, :1], worn(shown, w[mine], wear[mine])
            if args.crop:                                                    # a third at tumours: the mask is a condition
                x_0, mask, extra = crop_volumes(x_0, mask, args.crop, torch.rand(B, 4, generator=generator(args.seed, 'crop', step))[mine], 1 / 3)
            x_0, times = x_0 if pairs else to_x_0(x_0, picked[mine]), t[mine].to(device, non_blocking=True)
            given, context = mask_condition(mask, args.p_uncond, present[mine], shown), request_tokens(mask, args, present[mine])
            last = k == args.accumulate - 1
            with contextlib.nullcontext() if last or world() == 1 else model.no_sync():
                with autocast(device, args.dtype):
                    loss, square, x0_hat = process.loss(model, x_0, noise[mine], times, given, context, extra, args.min_snr)
                loss = loss.mean()
                if vgg:
                    loss = loss + args.perceptual / part * perceptual_loss(vgg, x0_hat, x_0, t[mine], process)
                if args.fft or args.fft_log:
                    loss = loss + fft_loss(x0_hat, x_0, t[mine], process, args.fft, args.fft_log) / part
                (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
            losses.add(0, process.log_snr(times), square.detach(), None if space.about else mask)
        for group in opt.param_groups:
            group['lr'] = lr
        norm = nn.utils.get_total_norm([p.grad.float() for p in net.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(net.parameters(), args.clip, norm)
        opt.step()
        opt.zero_grad(set_to_none=True)
        return total, norm

    @torch.no_grad()
    def held_out(network):
        """Mean squared error on validation patients, with the same t and noise every time. Fills loss_by_t's second half."""
        losses.sums[1] = 0
        picked = val[batch_rows(len(val), min(128, len(val)), 0, 0)]
        t = process.times(min(len(picked), args.steps or len(picked)))[:-1]
        t = t[torch.arange(len(picked)) * len(t) // len(picked)]
        noise = torch.randn(len(picked), *space.shape(args.size), generator=generator('held-out'))
        for part in (slice(i, i + args.batch_size) for i in range(0, len(picked), args.batch_size)):
            x_0, mask, extra, eps, times = (v if v is None else v.to(device) for v in (*batch(picked[part]), noise[part], t[part]))
            with autocast(device, args.dtype):
                given = mask_condition(mask, args.p_uncond, near=near(picked[part]))
                square = process.loss(network, to_x_0(x_0, picked[part]), eps, times, given, request_tokens(mask, args), extra)[1]
            losses.add(1, process.log_snr(times), square, None if space.about else mask)
        return losses.held_out()

    @torch.no_grad()
    def picture(path, size):
        """Real slices of validation patients, their masks, and two images generated for each mask."""
        pool = val if len(val) else data.rows('train')
        full = np.array([i for i in pool if data.table[i]['tumour'] > 0], int)
        pool = full if len(full) >= 8 else pool
        picked = pool[np.linspace(0, len(pool), 2 if args.volume else 8, endpoint=False).astype(int)]
        x_0, mask, extra = (v if v is None else v.to(device) for v in batch(picked, size))
        twice = lambda v: v if v is None else torch.cat([v, v])
        given = mask_condition(mask, args.p_uncond, near=near(picked, size)), request_tokens(mask, args), extra
        denoise = make_denoise(ema.net, process, *map(twice, given), args.dtype, clip=not args.rflow and not space.about)
        noise = torch.cat([torch.randn(len(x_0), *space.shape(size), generator=generator('picture', k)) for k in range(2)]).to(device)
        sampler, steps, _ = default_solver(args)
        made = SAMPLERS[sampler](denoise, noise, process.times(steps, own=True), process)
        first, second = process.from_range(made).float().cpu().chunk(2)
        zoom, masks, names = max(1, 128 // size), mask.cpu()[:, 0], args.dual or ('generated',)
        *shown, flat = (views(v, masks) for v in (*x_0.cpu().unbind(1), masks * 2 - 1, *first.unbind(1), *second.unbind(1), masks))
        save_grid(path, [*shown, [outline(x, m, zoom=zoom) for x, m in zip(shown[-len(names) - 1], flat)]],
                  [*(f'real {n}' for n in args.dual or [])] + ['real'] * (not args.dual) + ['mask', *names, *(f'{n} 2' for n in names), 'with mask'], zoom)

    # length, learning rate test
    if args.dry_run:
        return dry_run(net, train_step, opt, args)
    if args.lr_find and not state:
        lr_find(train_step, net, opt, out)
    if args.iters is None:
        args.iters = iters_for(args.minutes, train_step, net, opt, device, args.lr, len(args.progressive or (0,)))
    if not state:
        losses.sums.zero_()                                                  # the steps above were undone
    sample_every = args.sample_every or max(args.iters // 4, 1)
    spacing = tuple(np.median([data.table[i]['spacing'] for i in data.rows('train')], 0).tolist())

    def save(step):
        losses.merge()
        if rank() == 0:
            save_checkpoint(out, dict(net=net.state_dict(), ema=ema.net.state_dict(), ema_updates=ema.updates, opt=opt.state_dict(),
                                      step=step, args=plain(args), box=list(data.box), spacing=list(spacing),
                                      in_channels=net.in_channels, out_channels=space.channels,
                                      extra_dim=int(args.slice_level), loss_by_t=losses.sums.cpu(), seen=seen, space=space.about,
                                      levels=levels, curriculum=curriculum.state), args.keep_every)
            losses.write(out / 'loss_by_t.csv')

    if rank() == 0:
        log = Log.start(args, data, ['step', 'loss', 'lr', 'grad_norm', 's_per_step', 'held_out', 'held_out_raw'], start)
    if not state and not args.iters:
        save(0)                                                              # with --init: a foreign network becomes a run
    if start >= args.iters:
        print0(f'{out}: complete at step {start}; another length needs another --out')

    if pairs and not state:
        print0(f'straightness before: {straightness(ema.net, process, pairs, args, device):.5f} a pixel (0: straight)')

    # the loop
    stop, recent, clock = Stop(), [], time.perf_counter()
    bar = progress(range(start, args.iters), initial=start, total=args.iters)
    for step in bar:
        stage, first = stage_of(step, args)
        if stage and step == first:                                          # a new size: the average forgets sooner for a while
            ema.updates = min(ema.updates, 20)
        loss, norm = train_step(step, lr_at(step, args))
        ema.update(net)
        recent.append(loss + 0 * norm)                                        # a gradient that is none counts as well
        done = step + 1
        signum = stop.asked(device) if world() == 1 or done % 10 == 0 else 0
        final, show = done == args.iters, done % sample_every == 0 or done == args.iters
        keep = final or signum or done % args.save_every == 0 or args.keep_every and done % args.keep_every == 0
        if done % 20 == 0 or show or keep:
            values = checked(recent, done, args)
            if curriculum.add(values, done):
                ema.updates = min(ema.updates, 20)
            seconds, recent = (time.perf_counter() - clock) / len(values), []
            if rank() == 0:
                bar.set_postfix(loss=f'{np.mean(values):.4f}', refresh=False)
                scores = {}
                if show and len(val):
                    scores = dict(held_out_raw=held_out(net), held_out=held_out(ema.net))
                if show:
                    picture(out / f'samples_{done:06d}.png', sizes[stage])
                log.add(step=done, loss=float(np.mean(values)), lr=lr_at(step, args), grad_norm=float(norm), s_per_step=seconds, **scores)
            clock = time.perf_counter()
        if keep:
            save(done)
        if signum and not final:
            bar.close()
            print0(f'{out}: stopped by signal {signum} and saved at step {done}; the same command goes on')
            raise SystemExit(128 + signum)
    stop.restore()
    if rank() == 0 and start < args.iters:
        plot(out / 'log.png', {'loss': log.curve('loss'), 'held-out (EMA)': log.curve('held_out')}, str(out), 'step', 'squared error', logy=True)
        told = log.curve('held_out')[1][-1:]
        print0(f'{out}: {args.iters} steps done' + (f', held-out error {told[0]:.4f} (EMA)' if told else '')
               + f'; look at {out}/samples_{args.iters:06d}.png, then: python sample.py --bravo {out}')
        if pairs:
            print0(f'straightness after: {straightness(ema.net, process, pairs, args, device):.5f} a pixel (0: straight)')
    barrier()


if __name__ == '__main__':
    main(get_args())
