"""PaDiM (Defard, Setkov, Loesch, Audigier, ICPR 2021, arXiv:2011.08785).

At each position of the image the features from three layers of a pretrained CNN are modelled by one Gaussian, fitted
on normal images in a single pass without training. A position is as anomalous as its Mahalanobis distance from
its Gaussian.

Settings: thesis, Table 3.4: 100 features with resnet18, 550 with wide_resnet50_2 (the default here; the thesis has one
row of results and does not say whose). Other backbones have no published number.
Differences from the paper: 256 pixels, not 256 cropped to 224; images are not cropped, since lesions may lie at the
border.
Differences from xiahaifeng1995/PaDiM-Anomaly-Detection-Localization-master, the port that everybody uses: none in the
Gaussians and distances. The features of all images are never held: mean and covariance are accumulated batch by batch
(Chan et al.), so memory does not grow with their number. The blocks of covariance and Cholesky factor that belong to a
deep layer are the same at the 4 or 16 positions that it covers: they are computed and held once, on its own grid.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# The layers of strides 4, 8 and 16, and how many of all their channels are drawn at random (thesis, Table 3.4).
LAYERS = {
    "resnet18": (["layer1", "layer2", "layer3"], 100),
    "resnet50": (["layer1", "layer2", "layer3"], 550),
    "wide_resnet50_2": (["layer1", "layer2", "layer3"], 550),
    "mobilenet_v2": (["features.3", "features.6", "features.13"], 100),  # our choice: no published setting
}
EPSILON = 0.01  # added to the covariance's diagonal (paper, Sec. 3.2)


@dataclass
class Args:
    data: str = "phantom"
    """benchmark (brain, liver, resc, oct2017, chest, histo, phantom) or a folder in a layout that is read"""
    root: str = "data"
    """folder of the prepared benchmarks; decoded images are cached below it"""
    out: str = "runs"
    """results go to <out>/<data>/<method>/seed<k>"""
    seed: int = 0
    """seeds Python, NumPy and PyTorch"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    image_size: int = 256
    """images are resized to this many pixels squared (thesis, 4.3.3)"""
    batch_size: int = 16
    """images a batch; changes nothing but speed and memory"""
    limit: int | None = None
    """at most this many images of each split and class, for quick looks"""
    maps: int = 50
    """how many test images get a picture; 0 none, -1 all"""
    overwrite: bool = False
    """replace a finished run in the folder, or one that was stopped, instead of keeping it or going on"""
    checkpoint: str | None = None
    """a model.pt: skip training and evaluate it on --data"""
    predict: str | None = None
    """with --checkpoint: score this image, folder of images or NIfTI volume; no labels needed"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """of the backbone: imagenet (torchvision's), none (untrained), auto (imagenet, else none), or a FILE"""
    features: int | None = None
    """d, channels drawn at random from all layers; None is the thesis' number for the backbone"""


class PaDiM(nn.Module):
    """Layers go from the coarsest grid (l = 0) to the finest: d_l channels of layer l are drawn, on P_l = h_l * w_l
    positions. The vector x at a position of grid l holds the drawn channels of layers 0..l, D_l = d_0 + ... + d_l."""

    def __init__(self, backbone, weights, features, image_size):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone} is unknown: take {', '.join(LAYERS)}, or add its layers to "
                               f"LAYERS")
        layers, published = LAYERS[backbone]
        self.backbone = common.feature_extractor(backbone, layers, weights)
        self.layers = layers[::-1]
        shapes = [f.shape[1:] for f in self.features(torch.zeros(1, 3, image_size, image_size))]  # (C, h, w)
        channels = [c for c, _, _ in shapes]
        features = published if features is None else features
        if not 0 < features <= sum(channels):
            raise common.Error(f"--features {features}: {backbone} has {sum(channels)} channels in {', '.join(layers)}")
        if image_size % 16:
            raise common.Error(f"--image-size {image_size}: the layers' grids must lie in one another; take a multiple "
                               f"of 16")
        drawn = torch.randperm(sum(channels))[:features].sort().values  # the same for all positions
        for l, (start, (c, h, w)) in enumerate(zip([0, *torch.tensor(channels).cumsum(0)], shapes, strict=False)):
            mine = drawn[(drawn >= start) & (drawn < start + c)] - start
            depth = int((drawn < start + c).sum())
            if not len(mine):
                raise common.Error(f"--features {features}: the draw left {self.layers[l]} out; take more, or another "
                                   f"--seed")
            self.register_buffer(f"channels{l}", mine)  # (d_l,)
            self.register_buffer(f"mean{l}", torch.zeros(h * w, len(mine)))  # (P_l, d_l)
            self.register_buffer(f"whiten{l}", torch.zeros(h * w, len(mine), depth))  # (P_l, d_l, D_l), see fit
        self.grids = [(h, w) for _, h, w in shapes]

    def features(self, image):
        found = self.backbone(common.normalize(image))
        return [found[k] for k in self.layers]

    def embed(self, image):
        """(B, 3, H, W) -> the drawn channels of each layer l by position, (P_l, B, d_l)."""
        for l, feature in enumerate(self.features(image)):
            drawn = feature.index_select(1, self.get_buffer(f"channels{l}")).flatten(2)  # (B, d_l, P_l)
            yield drawn.flatten(0, 1).T.contiguous().unflatten(1, drawn.shape[:2])  # PyTorch is fast in two dimensions

    def joint(self, coarser, own, l):
        """(P_l-1, n, D_l-1), (P_l, n, d_l) -> (P_l, n, D_l): coarser layers repeated onto grid l (nearest), layer l."""
        if l == 0:
            return own
        n, depth = coarser.shape[1:]
        (h, w), (height, width) = self.grids[l - 1 : l + 1]
        x = own.new_empty(len(own), n, depth + own.shape[2])
        x.view(h, height // h, w, width // w, n, -1)[..., :depth] = coarser.view(h, 1, w, 1, n, depth)
        x[..., depth:] = own
        return x

    @torch.inference_mode()
    def fit(self, batches):
        """Mean and covariance of each position from batches of normal images, then the whitening of `predict`."""
        n = 0
        means = [self.get_buffer(f"mean{l}").zero_() for l in range(len(self.layers))]
        scatter = [self.get_buffer(f"whiten{l}").zero_() for l in range(len(self.layers))]  # rows of layer l only
        for image in batches:
            b, z = len(image), None
            for l, x in enumerate(self.embed(image)):
                mean = x.mean(dim=1)  # (P_l, d_l)
                delta = mean - means[l]
                between = (n * b / (n + b)) ** 0.5 * delta  # Chan et al. 1979: the two means' scatter, as one more row
                own = torch.cat([x.sub_(mean[:, None]), between[:, None]], dim=1)  # (P_l, b + 1, d_l)
                z = self.joint(z, own, l)
                scatter[l].baddbmm_(own.mT, z)
                means[l] += delta * (b / (n + b))
            n += b
        # From here the buffers of scatter are overwritten by rows of L^-1. With the covariance S (+ epsilon I) = L L^T,
        # |L^-1 (x - m)|^2 is the squared Mahalanobis distance. L^-1 is lower triangular, so its rows of layer l need
        # layers 0..l only and are shared like them. With C the covariance of layer l with coarser ones, V the rows of
        # L^-1 above, S_l the covariance within layer l: A = C V^T are the new rows of L, R R^T = S_l - A A^T its new
        # diagonal block, and R^-1 [-A V, I] the new rows of L^-1.
        for l in range(len(self.layers)):
            d, depth = scatter[l].shape[1:]
            for where in torch.arange(len(scatter[l]), device=scatter[l].device).split(64):  # few, as each takes MBs
                cov = exact(scatter[l][where]) / max(n - 1, 1)  # (64, d_l, D_l)
                own = cov[:, :, depth - d :] + EPSILON * torch.eye(d, device=cov.device)
                a_v = torch.zeros_like(cov[:, :, : depth - d])
                if l:
                    v = self._coarser(scatter, l, where)  # (64, D_l - d_l, D_l - d_l)
                    a = cov[:, :, : depth - d] @ v.mT
                    own, a_v = own - a @ a.mT, a @ v
                eye = torch.eye(d, device=cov.device, dtype=cov.dtype).expand_as(own)
                r = torch.linalg.cholesky(own)
                rows = torch.linalg.solve_triangular(r, torch.cat([-a_v, eye], dim=2), upper=False)
                scatter[l][where] = rows.float().to(where.device)

    def _coarser(self, whiten, l, where):
        """L^-1 of layers 0..l-1 at positions `where` of grid l, (n, D, D), put together from their own grids."""
        height, width = self.grids[l]
        parts = []
        for k in range(l):
            h, w = self.grids[k]
            part = whiten[k][(where // width * h // height) * w + where % width * w // width]  # (n, d_k, D_k)
            part = exact(part)
            parts.append(F.pad(part, (0, whiten[l - 1].shape[2] - part.shape[2])))
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): the Mahalanobis distance, smoothed; anomaly score (B,): its maximum."""
        self.eval()
        squared, x = 0, None
        for l, own in enumerate(self.embed(image)):
            x = self.joint(x, own.sub_(self.get_buffer(f"mean{l}")[:, None]), l)  # (P_l, B, D_l)
            z = x @ self.get_buffer(f"whiten{l}").mT  # (P_l, B, d_l)
            share = z.square().sum(2).T.unflatten(1, self.grids[l])[:, None]  # (B, 1, h, w)
            squared = share + (F.interpolate(squared, self.grids[l]) if l else 0)  # nearest: coarser layers are shared
        anomaly_map = F.interpolate(squared.sqrt(), image.shape[-2:], mode="bilinear")  # paper, Eq. 2: the root
        anomaly_map = smooth(anomaly_map)[:, 0]
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def exact(x):
    """In float64; on the CPU where the device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def smooth(anomaly_map, sigma=4):
    """Gaussian filter of (B, 1, H, W) cut at 4 sigma, edge pixels mirrored, equal to scipy.ndimage.gaussian_filter."""
    radius = 4 * sigma
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=anomaly_map.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for dim in (2, 3):  # separable
        size = anomaly_map.shape[dim]
        head, tail = (anomaly_map.narrow(dim, s, radius).flip(dim) for s in (0, size - radius))
        padded = torch.cat([head, anomaly_map, tail], dim)
        anomaly_map = F.conv2d(padded, kernel.view((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)))
    return anomaly_map


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = PaDiM(args.backbone, args.weights, args.features, args.image_size).to(run.device)
    if not args.checkpoint:
        model.fit(common.progress(train.batches(args.batch_size, run.device), "fitting", len(train) / args.batch_size))
        run.keep(model)
    common.finish(run, model, (train, valid, test))
