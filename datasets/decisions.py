"""From a score to a decision: thresholds from normal validation images, and pictures of anomaly maps.

`common.finish` calls `on_valid` and `decide`, then `pictures` for the test images, then `write`. A copied method script
also runs without this file, but then writes no thresholds, no pictures, and no curves.csv, lesions.csv or browser/ for
report.py."""

import math

import numpy as np
from PIL import Image

import common


# ---------------------------------------------------------------------------------------------------------- thresholds
def at_specificity(normal, specificity):
    """Return (threshold, specificity s). The threshold is the ceil((n + 1) s)-th smallest of n sorted normal scores.

    Whatever the distribution of the scores, a new normal image exceeds the threshold with probability at most 1 - s
    (split conformal prediction, Vovk et al. 2005). If n is too small for s, return the maximum and n / (n + 1)."""
    rank, n = math.ceil(round((len(normal) + 1) * specificity, 9)), len(normal)
    return (normal[rank - 1], specificity) if rank <= n else (normal[-1], n / (n + 1)) if n else (None, None)


def scan_score(scores, rule):
    """Combine the scores of a scan's slices: the maximum, or the mean of the five highest ("top5")."""
    return float(np.sort(scores)[-5 if rule == "top5" else -1 :].mean())


# Replaces the result of `on_valid` if there are no normal validation images. Zero-shot maps are in [0, 1].
NOTHING_SEEN = {"from": "nothing", "labels": [], "scores": [], "scans": [], "map_range": (0, 1), "dice": None,
                "maxima": None}


def on_valid(model, valid, result):
    """Return the parts of `result` that `decide` needs. result: from `common.evaluate` for the valid split.

    A model with `scaled_by_image` has no pixel threshold, because its maps are not comparable across images. Without a
    valid split (None), `result` comes from the training images, which set the colour scale but no thresholds."""
    pixel = result.pixel
    map_range = (pixel.low, max(pixel.maxima)) if pixel.maxima else None
    if valid is None:
        return NOTHING_SEEN | dict(map_range=map_range)
    comparable = pixel.maxima and not getattr(model, "scaled_by_image", False)
    return {"from": valid.source, "labels": valid.labels.tolist(), "scores": result.scores.tolist(),
            "scans": [common.patient(path) for path in valid.paths], "map_range": map_range,
            "dice": pixel.best, "maxima": pixel.maxima if comparable else None}


def decide(seen, args):
    """Compute the thresholds image, pixel, scan (at args.specificity) and image_f1 (best F1). seen: from `on_valid`.

    Images and scans are anomalous above their threshold, pixels at or above theirs. None means no decision."""
    from sklearn.metrics import precision_recall_curve

    labels, scores = np.array(seen["labels"], int), np.float32(seen["scores"])
    normal, best, scans = np.sort(scores[labels == 0]).tolist(), None, {}
    image, reached = at_specificity(normal, args.specificity)
    if labels.any():
        precision, recall, at = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = float(np.nextafter(at[np.argmax(f1[:-1])], -np.inf, dtype=np.float32))  # just below that score
    pixel, rule = seen["dice"], "best Dice on valid"
    if not normal or seen["maxima"] is None:
        pixel, rule = None, "none: no normal images or maps, or each map has its own scale"
    elif pixel is None:
        highest, _ = at_specificity(np.sort(np.float32(seen["maxima"])[labels == 0]), args.specificity)
        pixel = float(np.nextafter(highest, np.inf, dtype=np.float32))
        rule = f"above all pixels of a normal map, at specificity {args.specificity}"
    if None not in seen["scans"]:
        for scan, value in zip(seen["scans"], scores, strict=True):
            scans.setdefault(scan, []).append(value)
    anomalous = {scan for scan, label in zip(seen["scans"], labels, strict=True) if label}
    scans = sorted(scan_score(values, args.scan_score) for scan, values in scans.items() if scan not in anomalous)
    scan = at_specificity(scans, args.specificity)[0] if len(scans) >= 20 else None
    return dict(specificity=args.specificity, reached=reached, image=image, image_f1=best, pixel=pixel, pixel_rule=rule,
                scan=scan, scan_score=args.scan_score, normal_scores=normal, normal_scans=scans,
                **{key: seen[key] for key in ("from", "map_range", "dice")})


def decision_metrics(labels, scores, decision):
    """Compute sensitivity, specificity, F1 and balanced accuracy at decision["image"] and, with suffix _f1, at
    decision["image_f1"]; also the sensitivity at a specificity of 0.9 and 0.95 on these images."""
    from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, roc_curve

    metrics = {}
    for threshold, suffix in ((decision["image"], ""), (decision["image_f1"], "_f1")):
        if threshold is not None:
            above = scores > threshold
            of = dict(sensitivity=recall_score(labels, above), specificity=recall_score(labels, above, pos_label=0),
                      f1=f1_score(labels, above), balanced_accuracy=balanced_accuracy_score(labels, above))
            metrics |= {f"{name}{suffix}": float(value) for name, value in of.items()}
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return metrics | {f"sensitivity_at_{round(100 * s)}": float(tpr[fpr <= 1 - s + 1e-9].max()) for s in (0.9, 0.95)}


def stated(decision):
    """Describe the image threshold and its origin in words."""
    if not (n := len(decision["normal_scores"])):
        return "no threshold: no normal validation images"
    few = f"; NOTE: these support a specificity of only {decision['reached']:.2f}, not {decision['specificity']}"
    return (f"threshold {decision['image']:.4g} from {n} normal images ({decision['from']})"
            + few * (decision["reached"] < decision["specificity"]))


# ------------------------------------------------------------------------------------------------------------ pictures
def pictures(run, test, decision):
    """Return a function for `common.evaluate` that draws anomaly maps: in maps/ those of args.maps evenly spaced test
    images and, if `for_browser`, in browser/ those of all (tiles of about 6 kB for report.py)."""
    from matplotlib import colormaps

    args, folder, (low, high) = run.args, run.folder, decision["map_range"] or (0, 1)
    shown = set(common.spread(range(len(test)), len(test) if args.maps < 0 else args.maps))  # the same for all methods
    inferno = colormaps["inferno"](range(256), bytes=True)[:, :3].tobytes()

    def draw(i, anomaly_map):
        if i in shown:
            mask = test.masks[i] if test.has_masks else None
            name = f"{i:05}_{common.plain(test.paths[i].rsplit('.', 1)[0])}.png"
            save_picture(folder / "maps" / name, test.images[i], anomaly_map, decision, test.paths[i], mask)
        if for_browser(args):
            small = Image.fromarray(anomaly_map).resize([min(128, test.size)] * 2, Image.Resampling.BILINEAR)
            share = np.clip((np.asarray(small) - low) / (high - low or 1), 0, 1)
            tile = Image.fromarray(np.rint(share * 255).astype(np.uint8), "P")
            tile.putpalette(inferno)
            (folder / "browser").mkdir(exist_ok=True)
            tile.save(folder / "browser" / f"{i:05}.png")

    return draw


def for_browser(args):
    return (args.seed == 0 and args.maps) or args.maps < 0


def write(run, test, result, decision):
    """Write curves.csv, lesions.csv and, once per benchmark, the test images for report.py; return the metrics at the
    thresholds. result: from `common.evaluate` for the test split."""
    args, folder = run.args, run.folder
    if result.pixel.curve:
        common.write_csv(folder / "curves.csv", curve(result.pixel))
        rows = lesions(result.pixel, decision["pixel"])
        common.write_csv(folder / "lesions.csv", [dict(path=test.paths[row.pop("image")]) | row for row in rows])
    images = folder.parents[1] / f"images-{run.images}{f'-{args.limit}' * bool(args.limit)}"
    if for_browser(args) and not images.exists():
        with common.atomic(images) as tmp:
            tmp.mkdir()
            for i, (file, _, mask) in enumerate(test.entries):
                array, size = common.decode(file, 256, white=test.white)
                Image.fromarray(array.transpose(1, 2, 0).copy()).save(tmp / f"{i:05}.jpg", quality=85)
                if mask:
                    Image.fromarray(common.decode_mask(mask, size, 256)[0] > 0).save(tmp / f"{i:05}-mask.png")
    return decision_metrics(test.labels, result.scores, decision)


def curve(pixel):
    """Return points {fpr, tpr, pro} on the curves of `pixel`, a `common.PixelMetrics` after `compute`."""
    places = np.concatenate([np.linspace(0, 0.01, 50), np.linspace(0.01, 0.3, 100), np.linspace(0.3, 1, 50)])
    fpr, *others = pixel.curve
    columns = [[0, *places], *([0, *np.interp(places, fpr, y)] for y in others)]
    return [dict(zip(("fpr", "tpr", "pro"), map(float, point), strict=True)) for point in zip(*columns, strict=True)]


def lesions(pixel, threshold):
    """Return a dict for each region in `pixel` (a `common.PixelMetrics` after `compute`): image (index), lesion (number
    within the image), area (pixels), overlap (fraction at or above `threshold`) and fpr_0.015, ..., fpr_0.300 (overlap
    at the threshold with this false positive rate over all normal pixels)."""
    scores, region = np.concatenate(pixel.anomalous), np.concatenate(pixel.region)
    area, rates = np.bincount(region), [0.015 * k for k in range(1, 21)]
    above = {f"fpr_{rate:.3f}": scores > pixel.normal[pixel.n - 1 - int(rate * pixel.n)] for rate in rates}
    above |= {} if threshold is None else dict(overlap=scores >= np.float32(threshold))
    share = {name: np.bincount(region[hit], minlength=len(area)) / area for name, hit in above.items()}
    first = np.searchsorted(pixel.regions, pixel.regions)  # the first region of the same image
    return [dict(image=image, lesion=int(k - first[k]), area=int(area[k]), overlap=None)
            | {name: round(float(column[k]), 4) for name, column in share.items()}
            for k, image in enumerate(pixel.regions)]


def save_picture(file, image, anomaly_map, decision, title, mask=None):
    """Draw a uint8 image (3, H, W) with the contour of its mask (H, W). Next to it, overlay the image with the anomaly
    map (colour scale of the validation maps, low values transparent) and the contour of the anomalous pixels."""
    from matplotlib.figure import Figure

    (h, w), (low, high), pixel = image.shape[1:], decision["map_range"] or (0, 1), decision["pixel"]
    width, height = (4 * max(side / max(h, w), 0.25) for side in (w, h))  # of a panel in inches
    figure = Figure((2 * width + 1.1, height + 0.6))
    figure.suptitle(title.encode("latin-1", "replace").decode("latin-1"), y=0.99, parse_math=False, fontsize=9)

    def axes(left, width):
        size = figure.get_size_inches()
        return figure.add_axes((left / size[0], 0.1 / size[1], width / size[0], height / size[1]))

    left, right = axes(0.1, width), axes(width + 0.2, width)
    for ax in (left, right):
        ax.imshow(image.transpose(1, 2, 0), extent=(0, w, h, 0))
        ax.autoscale(False)
        ax.axis("off")
    opacity = 0.7 * np.clip((anomaly_map - low) / (high - low or 1), 0, 1)
    heat = right.imshow(anomaly_map, "inferno", vmin=low, vmax=high, alpha=opacity, extent=(0, w, h, 0))
    left.set_title("image" + ", ground truth (green)" * (mask is not None), fontsize=9)
    right.set_title("anomaly map" + ", decision (cyan)" * (pixel is not None), fontsize=9)
    for ax, area, colour in ((left, mask, "lime"), (right, pixel is not None and anomaly_map >= pixel, "cyan")):
        if np.any(area):
            ax.contour(np.pad(area, 1), [0.5], colors=colour, extent=(-1, w + 1, -1, h + 1))
    bar = figure.colorbar(heat, cax=axes(2 * width + 0.3, 0.15), extend="max")
    if pixel is not None:
        bar.ax.axhline(pixel, color="cyan")
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)
