"""Ours next to a peer's own training: the same images, weights, size and budget, the last epoch of both.

    python tests/levels.py [METHOD ...] --data elpv_poly --weights mobilenet_v2.pth --peers FOLDER
    python tests/levels.py [METHOD ...] --data phantom --weights mobilenet_v2.pth --peers FOLDER
    python tests/levels.py --report                                 the table of tests/README.md

By hand, as parity.py: peers are no dependency. anomalib 2.7 is in the same environment; --peers holds checkouts of
pytorch-cutpaste (Runinho), SimpleNet (DonaldRR), Deep-SVDD-PyTorch (lukasruff), f-AnoGAN (A03ki), UTRAD
(gordon-chenmo), Knowledge_Distillation_AD (rohban-lab) and Anomaly-Detection-PatchSVDD-PyTorch (nuclearboy95), under
these names. FLAGS has ours; `..._as_peer` undoes what we chose to do differently. `phantom` is learns.py's, for the
methods with maps. A method is level if its mean over seeds is at least the peer's less 0.02, in each score; the exit
status is 1 if one is not. A peer's training step is its own; batches and metrics are common.py's. Where a peer's
scoring is slow, or made for another size, its trained state is scored by ours: parity.py finds the two equal.

Each training adds a line to levels.jsonl; a finished line is skipped."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated
from unittest import mock

import numpy as np
import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
from conftest import ROOT, load_script
from learns import make_phantom

import common

NET = "--backbone mobilenet_v2 --weights WEIGHTS --image-size 128 --batch-size 8"
FLAGS = {  # of a method's script, and what the peer takes from them; after a _: another run of ours, the same peer
    "cfa": f"{NET} --epochs 3",
    "cflow": f"{NET} --fiber-batch 128 --epochs 4",
    "cflow_as_peer": f"{NET} --fiber-batch 128 --epochs 4 --schedule constant --augment-degrees 0",
    "csflow": f"{NET} --hidden 64 --epochs 6 --lr 1e-3",
    "cutpaste": f"{NET} --epochs 60 --freeze-epochs 3",
    "deepsvdd": "--image-size 32 --ae-epochs 10 --ae-lr 1e-4 --ae-batch-size 20 --epochs 15 --batch-size 20",
    "draem": "--textures images --image-size 64 --width 16 --epochs 8 --lr 1e-3",
    "fanogan": "--image-size 32 --batch-size 16 --gan-epochs 10 --epochs 10 --lr 1e-3",
    "ganomaly": "--image-size 32 --batch-size 8 --epochs 12",
    "mkd": "--backbone vgg16 --weights none --image-size 64 --batch-size 8 --epochs 2",
    "padim": NET,
    "patchcore": f"{NET} --ratio 0.003",
    "patchsvdd": "--image-size 96 --batch-size 8 --repeat 2 --epochs 1 --lr 1e-3 --svdd 0.001 --bank 2000",
    "rd4ad": "--backbone resnet18 --weights none --image-size 128 --batch-size 8 --epochs 3",
    "simplenet": f"{NET} --epochs 8 --noise 0.16",
    "stfpm": f"{NET} --epochs 4",
    "utrad": f"{NET} --image-size 64 --width 64 --layers 1 --batch-size 2 --lr 3e-3 --epochs 6 --activation gelu",
}
ON_PHANTOM = {  # has maps, and three times as many training images as elpv_poly; of two values the last counts
    "cfa": "--epochs 1", "cflow": "--epochs 1", "csflow": "--epochs 2", "draem": "--epochs 3", "mkd": "--epochs 1",
    "padim": "", "patchcore": "--ratio 0.0005", "patchsvdd": "--batch-size 4 --repeat 1", "rd4ad": "--epochs 1",
    "simplenet": "--epochs 3", "stfpm": "--epochs 2", "utrad": "--epochs 2",
}
SCORES, MARGIN = ["image_auroc", "pixel_auroc", "aupro"], 0.02


@dataclass
class Args:
    names: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """of FLAGS, with the phantom of ON_PHANTOM; all by default"""
    data: Path = Path("elpv_poly")
    """benchmark folder, or `phantom`"""
    weights: Path = Path("mobilenet_v2.pth")
    """ImageNet weights of torchvision's mobilenet_v2"""
    peers: Path = Path("peers")
    """folder of the official repositories"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds to train with"""
    jobs: int = 1
    """trainings at a time, one thread each"""
    report: bool = False
    """only print the table"""
    out: Path = ROOT / "runs/levels"
    """run folders"""
    jsonl: Path = Path(__file__).with_suffix(".jsonl")
    """a line is added for each training"""


# ----------------------------------------------------------------------------------------------------------- the peers
# Each takes (settings, train, args), trains, and gives `predict` as our models have it. settings: those of our script.
def batches(train, settings, drop_last=False):
    for epoch in range(1, settings.epochs + 1):
        yield from train.batches(settings.batch_size, "cpu", (settings.seed, epoch), drop_last)


class Loader:
    """What a peer's own loop takes as its loader: our batches, in a new order each time; `item` is made of each."""

    def __init__(self, train, settings, batch_size, item):
        self.train, self.settings, self.batch_size, self.item, self.epoch = train, settings, batch_size, item, 0

    def __len__(self):
        return math.ceil(len(self.train) / self.batch_size)

    def __iter__(self):
        self.epoch += 1
        return map(self.item, self.train.batches(self.batch_size, "cpu", (self.settings.seed, self.epoch)))


def anomalib_scores(model, scale=common.normalize):
    """An image at a time, because CFLOW compares to the likeliest vector of a batch."""
    model.eval()

    def predict(image):
        with torch.no_grad():
            answers = [model(scale(x)) for x in image.split(1)]
        maps = [a.anomaly_map.view(1, *image.shape[2:]) for a in answers if a.anomaly_map is not None]
        return torch.cat(maps) if maps else None, torch.cat([a.pred_score.view(1) for a in answers])

    return predict


def anomalib_training(module, images, scale=common.normalize, lr=None):
    """The Lightning module's own training step and optimisers, in a plain loop."""
    from anomalib.data import ImageBatch

    optimizers = module.configure_optimizers()
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr or group["lr"]
    module.log = module.log_dict = mock.Mock()
    module.optimizers = lambda: optimizers if len(optimizers) > 1 else optimizers[0]
    module.manual_backward = torch.Tensor.backward
    module.train()
    for image in images:
        losses = module.training_step(ImageBatch(image=scale(image)), 0)
        if module.automatic_optimization:
            optimizers[0].zero_grad()
            module.backward(losses["loss"])
            if norm := module.trainer_arguments.get("gradient_clip_val"):
                torch.nn.utils.clip_grad_norm_(module.parameters(), norm)
            optimizers[0].step()
    return anomalib_scores(module.model, scale)


OFF = dict(post_processor=False, evaluator=False, visualizer=False)


def sized(module, settings, **more):
    """The module for images of our size, which it takes from its preprocessing; that is not called."""
    size = (settings.image_size, settings.image_size)
    return module(pre_processor=module.configure_pre_processor(size), **OFF, **more)


def cfa(settings, train, args):
    """anomalib knows backbones by name and downloads their weights: its extractor and first layer are replaced."""
    import anomalib.models.image.cfa.torch_model as theirs
    from anomalib.data import ImageBatch
    from anomalib.models.image import Cfa

    layers = load_script("methods/cfa.py").LAYERS[settings.backbone]
    backbone = common.feature_extractor(settings.backbone, layers, args.weights)
    width = sum(f.shape[1] for f in backbone(torch.zeros(1, 3, 64, 64)).values())
    with mock.patch.multiple(theirs, get_return_nodes=lambda name: layers, get_feature_extractor=lambda *_: backbone):
        module = Cfa("resnet18", **OFF)
        module.model.descriptor.layer = theirs.CoordConv2d(width, width, 1)
        module.model.initialize_centroid([ImageBatch(image=common.normalize(image))
                                          for image in train.batches(settings.batch_size, "cpu")])
    return anomalib_training(module, batches(train, settings, drop_last=True), lr=settings.lr)


def cflow(settings, train, args):
    from anomalib.models.image import Cflow

    network = common.pretrained_network(settings.backbone, args.weights).eval()
    layers = load_script("methods/cflow.py").LAYERS[settings.backbone]
    module = Cflow(network, layers, False, settings.fiber_batch, settings.blocks, lr=settings.lr, **OFF)
    return anomalib_training(module, batches(train, settings, drop_last=True))


def csflow(settings, train, args):
    """Its EfficientNet-B5 is replaced; its flow takes 304 channels and no other number."""
    import anomalib.models.image.csflow.torch_model as theirs
    from anomalib.models.image import Csflow

    layer = load_script("methods/csflow.py").LAYERS[settings.backbone]
    backbone = common.feature_extractor(settings.backbone, [layer], args.weights)
    features = load_script("tests/peers/csflow.py").features_of(backbone, layer)
    with mock.patch.multiple(theirs, TimmFeatureExtractor=features, efficientnet_b5=lambda weights: None):
        module = sized(Csflow, settings, cross_conv_hidden_channels=settings.hidden)
    return anomalib_training(module, batches(train, settings), lr=settings.lr)


def deepsvdd(settings, train, args):
    """On the images that our `prepare` makes."""
    theirs = load_script("tests/peers/deepsvdd.py")
    sys.path.insert(0, str(args.peers / "Deep-SVDD-PyTorch/src"))
    from deepSVDD import DeepSVDD
    from networks.main import build_autoencoder
    from optim.ae_trainer import AETrainer

    ours = theirs.script.build_model(settings)
    images = ours.load(train.batches(256, "cpu"))

    def dataset(batch_size):
        loader = Loader(train, settings, batch_size, lambda image: (ours.prepare(image), image, image))
        return SimpleNamespace(loaders=lambda **_: (loader, None))

    peer = DeepSVDD(settings.objective, settings.nu)
    peer.set_network("cifar10_LeNet")
    peer.ae_net = AETrainer(
        "adam", settings.ae_lr, settings.ae_epochs, (settings.ae_milestone,), weight_decay=settings.ae_weight_decay,
        device="cpu").train(dataset(settings.ae_batch_size), build_autoencoder("cifar10_LeNet"))
    peer.init_network_weights_from_pretraining()
    peer.train(dataset(settings.batch_size), "adam", settings.lr, settings.epochs, (settings.milestone,),
               weight_decay=settings.weight_decay, device="cpu")

    def predict(image):
        peer.test(theirs.Loaders(images[:2], ours.prepare(image)), "cpu")
        return None, torch.tensor([score for *_, score in peer.results["test_scores"]])

    return predict


def draem(settings, train, args):
    """Repaired: its focal loss, which gives normal pixels no weight with today's kornia."""
    from anomalib.models.image import Draem
    from anomalib.models.image.draem.torch_model import DiscriminativeSubNetwork, ReconstructiveSubNetwork
    from kornia.losses import FocalLoss

    module = Draem(args.data / "train/good", **OFF)
    module.model.reconstructive_subnetwork = ReconstructiveSubNetwork(base_width=settings.width)
    module.model.discriminative_subnetwork = DiscriminativeSubNetwork(6, 2, settings.width // 2)
    module.loss.focal_loss = FocalLoss(alpha=None, reduction="mean")
    module.configure_optimizers = lambda: torch.optim.Adam(module.model.parameters(), settings.lr)
    return anomalib_training(module, batches(train, settings), scale=lambda image: image)


def cutpaste(settings, train, args):
    """Its network is a ResNet-18; the backbone is put in its place."""
    from torchvision import transforms as T

    load = load_script("tests/peers/cutpaste.py").load
    augmentation, density, network = (load(args.peers / "pytorch-cutpaste", name) for name in
                                      ("cutpaste", "density", "model"))
    random.seed(settings.seed)
    model = network.ProjectionNet(False, [512, 512, 128], 3)
    model.resnet18 = common.pretrained_network(settings.backbone, args.weights)
    model.resnet18.classifier, model.resnet18.fc = torch.nn.Identity(), torch.nn.Identity()
    model.head[0] = torch.nn.Linear(1280, 512)
    model.freeze_resnet()
    normalize = T.Compose([T.ToTensor(), lambda image: common.normalize(image[None])[0]])
    three_way = augmentation.CutPaste3Way(transform=normalize)
    augment = T.Compose([T.ToPILImage(), T.ColorJitter(0.1, 0.1, 0.1, 0.1), three_way])
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, settings.epochs)
    endless = (image for epoch in range(10**6)
               for image in train.batches(settings.batch_size, "cpu", (settings.seed, epoch), True))
    for step, image in zip(range(settings.epochs), endless, strict=False):
        if step == settings.freeze_epochs:
            model.unfreeze()
        kinds = augmentation.cut_paste_collate_fn([augment(x) for x in image])
        _, logits = model(torch.cat(kinds))
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3).repeat_interleave(len(image)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(step)
    model.eval()

    def embed(image):
        with torch.no_grad():
            return torch.nn.functional.normalize(model(common.normalize(image))[0], p=2, dim=1)

    gaussian = density.GaussianDensityTorch()
    gaussian.fit(torch.cat([embed(image) for image in train.batches(64, "cpu")]))
    return lambda image: (None, gaussian.predict(embed(image)))


def fanogan(settings, train, args):
    """Its programs write their networks and pictures to the current folder."""
    theirs = load_script("tests/peers/fanogan.py")
    sys.path[:0] = [str(args.peers / "f-AnoGAN"), str(args.peers / "f-AnoGAN/mvtec_ad")]
    del sys.modules["fanogan"]  # ours; theirs has the same name
    from fanogan.train_encoder_izif import train_encoder_izif
    from fanogan.train_wgangp import train_wgangp
    from model import Discriminator, Encoder, Generator

    opt = SimpleNamespace(img_size=settings.image_size, latent_dim=settings.latent, channels=3, n_critic=5,
                          lr=settings.lr, b1=0.5, b2=0.999, sample_interval=10**9, n_epochs=settings.gan_epochs)
    loader = Loader(train, settings, settings.batch_size, lambda image: (2 * theirs.script.augment(image) - 1, None))
    peer = Generator(opt), Discriminator(opt), Encoder(opt)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        train_wgangp(opt, *peer[:2], loader, "cpu")
        opt.n_epochs = settings.epochs
        train_encoder_izif(opt, *peer, loader, "cpu")
    ours = theirs.script.build_model(settings)
    theirs.load(ours, *peer)
    return ours.predict


def ganomaly(settings, train, args):
    from anomalib.models.image import Ganomaly

    module = sized(Ganomaly, settings, batch_size=settings.batch_size, n_features=settings.features,
                   latent_vec_size=settings.latent)
    return anomalib_training(module, batches(train, settings, drop_last=True), lr=settings.lr)


def mkd(settings, train, args):
    """Both have the same random VGG-16. Its map is its test function's, which is written for 128 pixels."""
    theirs = load_script("tests/peers/mkd.py")
    network, losses, functions = theirs.official(str(args.peers / "Knowledge_Distillation_AD"))
    config = theirs.CONFIG | dict(lamda=settings.value_weight)
    vgg16 = mock.patch.object(network, "vgg16", lambda _: common.pretrained_network("vgg16", settings.weights))
    with vgg16, mock.patch("torch.nn.Module.cuda", lambda net: net), contextlib.redirect_stdout(io.StringIO()):
        vgg, cloner = network.get_networks(config)
    vgg.requires_grad_(False)  # for speed: its optimizer has the cloner's parameters only
    criterion = losses.MseDirectionLoss(settings.value_weight)
    optimizer = torch.optim.Adam(cloner.parameters(), settings.lr)
    for image in batches(train, settings):  # train.py, which needs a GPU
        image = common.normalize(image)
        loss = criterion(cloner(image), vgg(image))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def predict(image):
        image = common.normalize(image)
        with mock.patch("torch.Tensor.cuda", lambda x: x), mock.patch.object(
                functions, "roc_curve", return_value=([0, 1], [0, 1], [0, 1])) as ranked, torch.enable_grad():
            functions.detection_test(cloner, vgg, [(image, torch.zeros(len(image)))], config)
            grads = [abs(functions.GuidedBackprop(cloner, vgg, "cpu").generate_gradients(x, config))
                     for x in image.split(1)]
        maps = [functions.gaussian_filter((g - g.min()) / (g.max() - g.min()), sigma=4)[0] for g in grads]
        return torch.as_tensor(np.stack(maps)), torch.as_tensor(ranked.call_args.args[1])

    return predict


def padim(settings, train, args):
    from anomalib.models.image.padim.torch_model import PadimModel

    layers, drawn = load_script("methods/padim.py").LAYERS[settings.backbone]
    network = common.pretrained_network(settings.backbone, args.weights).eval()
    model = PadimModel(network, layers[::-1], pre_trained=False, n_features=settings.features or drawn)
    model.train()
    for image in train.batches(settings.batch_size, "cpu"):
        model(common.normalize(image))
    model.fit()
    return anomalib_scores(model)


def patchcore(settings, train, args):
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    layers = load_script("methods/patchcore.py").LAYERS[settings.backbone]
    network = common.pretrained_network(settings.backbone, args.weights).eval()
    model = PatchcoreModel(layers, network, pre_trained=False, num_neighbors=settings.neighbors)
    model.train()
    for image in train.batches(settings.batch_size, "cpu"):
        model(common.normalize(image))
    model.subsample_embedding(settings.ratio)
    return anomalib_scores(model)


def patchsvdd(settings, train, args):
    """Scored by ours: its own embeds a patch at a time."""
    theirs = load_script("tests/peers/patchsvdd.py")
    sys.path.insert(0, str(args.peers / "Anomaly-Detection-PatchSVDD-PyTorch"))
    from codes import datasets, utils
    from codes.networks import EncoderHier, PositionClassifier

    for name in ("generate_coords_position", "generate_coords_svdd"):  # which its datasets ask for 256 pixels
        draw = getattr(datasets, name)
        setattr(datasets, name, lambda _h, _w, k, draw=draw: draw(settings.image_size, settings.image_size, k))
    np.random.seed(settings.seed)
    ours = theirs.script.build_model(settings)
    ours.fit_mean(train.batches(settings.batch_size, "cpu"))
    images = torch.cat(list(train.batches(settings.batch_size, "cpu"))) - ours.mean
    encoder, position = EncoderHier(64, 64), {k: PositionClassifier(k, 64) for k in (64, 32)}
    optimizer = torch.optim.Adam([p for net in (encoder, *position.values()) for p in net.parameters()], settings.lr)
    pairs = {(kind, k): dataset(images, K=k, repeat=settings.repeat) for k in (64, 32)
             for kind, dataset in (("position", datasets.PositionDataset), ("svdd", datasets.SVDD_Dataset))}
    loader = torch.utils.data.DataLoader(utils.DictionaryConcatDataset(pairs), settings.batch_size, shuffle=True)
    for batch in (batch for _ in range(settings.epochs) for batch in loader):  # main_train.py, which needs a GPU
        optimizer.zero_grad()
        loss = sum(PositionClassifier.infer(position[k], enc, batch["position", k])
                   + settings.svdd * datasets.SVDD_Dataset.infer(enc, batch["svdd", k])
                   for k, enc in ((64, encoder), (32, encoder.enc)))
        loss.backward()
        optimizer.step()
    for source, target in ((encoder.enc, ours.small), (encoder.conv1, ours.join1), (encoder.conv2, ours.join2)):
        theirs.copy(source, target)
    ours.fit(train, settings.batch_size, "cpu", settings.bank)
    return ours.predict


def rd4ad(settings, train, args):
    """Its decoder exists for ResNets only; both have the same random teacher."""
    from anomalib.models.image import ReverseDistillation

    module = sized(ReverseDistillation, settings, backbone=settings.backbone, pre_trained=False)
    state = common.pretrained_network(settings.backbone, settings.weights).state_dict()
    assert not module.model.encoder.feature_extractor.load_state_dict(state, strict=False).missing_keys
    return anomalib_training(module, batches(train, settings), lr=settings.lr)


def simplenet(settings, train, args):
    theirs = load_script("tests/peers/simplenet.py")
    ours = load_script("methods/simplenet.py").build_model(settings)
    settings.peer = str(args.peers / "SimpleNet")
    peer = theirs.peer_of(settings, ours, settings.backbone)
    peer.noise_std, peer.logger = settings.noise, mock.MagicMock()
    with contextlib.redirect_stderr(io.StringIO()):
        peer._train_discriminator([dict(image=common.normalize(image)) for image in batches(train, settings)])

    def predict(image):
        scores, maps, _ = peer._predict(common.normalize(image))
        return torch.stack([torch.as_tensor(m) for m in maps]), torch.as_tensor(scores).flatten()

    return predict


def stfpm(settings, train, args):
    """Repaired: given a network, its teacher and its student are that one, frozen; the student is replaced."""
    from anomalib.models.components import TimmFeatureExtractor
    from anomalib.models.image import Stfpm
    from torchvision.models import get_model

    layers = load_script("methods/stfpm.py").LAYERS[settings.backbone]
    module = Stfpm(common.pretrained_network(settings.backbone, args.weights).eval(), layers, **OFF)
    student = get_model(settings.backbone, weights=None)
    module.model.student_model = TimmFeatureExtractor(backbone=student, layers=layers, requires_grad=True)
    return anomalib_training(module, batches(train, settings), lr=settings.lr)


def utrad(settings, train, args):
    """Scored by ours: its own is written for 256 pixels. Its features are ours."""
    theirs = load_script("tests/peers/utrad.py")
    peers, ours = load_script(args.peers / "UTRAD/models.py"), theirs.script.build_model(settings)
    sides, n = [level.side for level in ours.levels], [settings.layers] * len(ours.levels)
    peer = peers.MultiLevelTransformer(SimpleNamespace(activation=settings.activation), ours.embed.in_channels, sides,
                                       settings.width, theirs.script.HEADS, n, n, 4 * settings.width)
    peer.apply(peers.weights_init_normal)
    lines = theirs.between((args.peers / "UTRAD/main.py").read_text(), "loss = criterion(recon, outputs)",
                           "(loss+loss_scale).backward()")
    optimizer = torch.optim.Adam(peer.parameters(), settings.lr, (0.5, 0.999))
    for image in batches(train, settings):  # main.py, which is one function
        space = dict(torch=torch, criterion=torch.nn.MSELoss(), outputs=ours.features(image))
        space["recon"], space["std"] = peer(space["outputs"])
        exec(lines, space)
        optimizer.zero_grad()
        (space["loss"] + space["loss_scale"]).backward()
        optimizer.step()
    state = {theirs.renamed(name): value for name, value in peer.state_dict().items() if name != "zeros"}
    state["position"] = state["position"].view_as(ours.position)
    kept = {name: value for name, value in ours.state_dict().items() if name.startswith("backbone")}
    ours.load_state_dict(kept | state)
    return ours.predict


# ------------------------------------------------------------------------------------------------------- the trainings
def flags_of(name, data):
    more = ON_PHANTOM.get(name.split("_")[0], "") if data == "phantom" else ""
    return f"{FLAGS[name]} {more}".strip()


def scores_of(metrics):
    return {name: round(metrics[name], 4) for name in SCORES if metrics.get(name) is not None}


def train_one(args, name, seed, who):
    """A training of ours or of the peer's, as a line of levels.jsonl."""
    method, started = name.split("_")[0], time.perf_counter()
    flags = [str(args.weights) if flag == "WEIGHTS" else flag for flag in flags_of(name, args.data.name).split()]
    out = args.out / f"{who}-{name}-{seed}"
    flags = ["--data", str(args.data), "--root", str(args.out), "--out", str(out), "--seed", str(seed), "--device",
             "cpu", "--maps", "0", "--overwrite", *flags, *["--eval-every", str(10**6)] * ("--epochs" in flags)]
    if who == "ours":
        command = [sys.executable, ROOT / f"methods/{method}.py", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise common.Error(done.stderr.strip().splitlines()[-1:])
        metrics = json.loads((out / args.data.name / method / f"seed{seed}/results.json").read_text())["metrics"]
        shutil.rmtree(out)
    else:
        torch.manual_seed(seed)
        settings = tyro.cli(load_script(f"methods/{method}.py").Args, args=flags)
        train, _, test = common.load_benchmark(settings)
        model = SimpleNamespace(predict=globals()[method](settings, train, args))
        metrics = common.evaluate(model, test, 8, torch.device("cpu")).metrics
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"],
                            capture_output=True, text=True).stdout.strip()
    return dict(name=name, data=args.data.name, seed=seed, who=who, flags=flags_of(name, args.data.name),
                scores=scores_of(metrics), seconds=round(time.perf_counter() - started, 1), commit=commit)


def read_lines(file):
    """{(name, data, who, seed): line} of the commands in FLAGS."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {(l["name"], l["data"], l["who"], l["seed"]): l for l in lines
            if l["name"] in FLAGS and l["flags"] == flags_of(l["name"], l["data"])}


def compared(lines):
    """Rows (name, data, score, our values, the peer's, whether level), of the seeds that both have."""
    for data, name in sorted({(data, name) for name, data, *_ in lines}):
        seeds = [seed for n, d, who, seed in lines if (n, d, who) == (name, data, "ours")]
        method = name.split("_")[0]
        seeds = [seed for seed in sorted(seeds) if (method, data, "peer", seed) in lines]
        for score in SCORES:
            ours, peer = ([lines[key, data, who, seed]["scores"].get(score) for seed in seeds]
                          for key, who in ((name, "ours"), (method, "peer")))
            if seeds and None not in ours + peer:
                yield name, data, score, ours, peer, statistics.mean(ours) >= statistics.mean(peer) - MARGIN


def report(lines):
    print("| training | data | score | ours | peer | level |\n|" + " --- |" * 6)
    for name, data, score, *sides, level in compared(lines):
        ours, peer = (f"{statistics.mean(side):.3f} ({', '.join(f'{v:.3f}' for v in side)})" for side in sides)
        label = score.replace("_", " ").replace("auroc", "AUROC").replace("aupro", "AUPRO")
        print(f"| {name} | {data} | {label} | {ours} | {peer} | {'yes' if level else '**no**'} |")


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    if unknown := set(args.names) - set(FLAGS):
        raise common.Error(f"no training of {', '.join(sorted(unknown))}; there are {', '.join(FLAGS)}")
    if args.report:
        report(read_lines(args.jsonl))
        raise SystemExit
    os.environ["OMP_NUM_THREADS"] = "1"
    args.names = args.names or list(ON_PHANTOM if args.data.name == "phantom" else FLAGS)
    if args.data == Path("phantom"):
        args.data = make_phantom(ROOT / "runs/learns")
    args.data, args.weights, args.peers = args.data.resolve(), args.weights.resolve(), args.peers.resolve()
    done, broken = read_lines(args.jsonl), []
    left = [(name, seed, who) for seed in args.seeds for name in args.names for who in ("ours", "peer")
            if (name, args.data.name, who, seed) not in done and (who == "ours" or "_" not in name)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {pool.submit(train_one, args, *job): job for job in left}
        for job in as_completed(jobs):
            try:
                line = job.result()
            except Exception as e:  # whatever a peer raises; the others go on
                broken.append(f"{jobs[job]}: {e!r}")
                continue
            with open(args.jsonl, "a") as f:
                f.write(json.dumps(line) + "\n")
            print(*jobs[job], line["scores"], line["seconds"], flush=True)
    rows = [row for row in compared(read_lines(args.jsonl)) if row[0] in args.names and row[1] == args.data.name]
    broken += [f"{name}: {score} is below the peer's" for name, _, score, *_, level in rows if not level]
    print(*broken, sep="\n", file=sys.stderr)
    raise SystemExit(bool(broken))
