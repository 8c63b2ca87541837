"""--predict: score images or scans with a trained model, classify them as normal or anomalous, and write heat maps.

scores.csv lists the score of each image (or slice), its percentile among the normal validation images, and the
decision; scans.csv lists the same for scans. maps/ has pictures, masks/ the pixels at or above the pixel threshold, and
raw/ (--save-maps) the anomaly maps. Masks and raw maps have the image's size and, for a scan, its format.
predict.json records the input and the checkpoint. `common.finish` calls `predict`; a copied method script needs this
file and volumes.py only for --predict."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import decisions
import numpy as np
import torch
from PIL import Image

import common


def predict(run, model, kept):
    """Score args.predict and write the run folder. If files are damaged, list them last and exit with status 1.

    kept: the content of model.pt."""
    args, folder, asked = run.args, run.folder, Path(run.args.predict)
    decision = decisions.decide(kept.get("seen", decisions.NOTHING_SEEN), args)
    if args.checkpoint and "seen" not in kept:
        print(f"NOTE: {args.checkpoint} has no thresholds: its run was not finished, or lacked datasets/decisions.py")
    files = common.files_in(asked) if asked.is_dir() else [asked]
    readable = [file for file in files if file.suffix.lower() in common.SUFFIXES]
    images = [file for file in readable if not is_mask(file, asked)]
    if len(images) < len(readable):
        print(f"NOTE: {len(readable) - len(images)} masks in {asked} are not scored")
    if images and (others := sorted(set(files) - set(readable))):  # scans, or images in other formats
        print(f"NOTE: {asked} contains images, so {len(others)} other files are not scored, e.g. {others[0]}")
    rows, scans, damaged = score_images(run, model, decision, images) if images else score_scans(run, model, decision)
    for name, table in dict(scores=rows, scans=scans).items():
        if table:
            common.write_csv(folder / f"{name}.csv", table)
    record = dict(input=str(asked.resolve()), checkpoint=args.checkpoint and str(Path(args.checkpoint).resolve()),
                  checkpoint_sha256=args.checkpoint and common.sha256(args.checkpoint), damaged=damaged,
                  thresholds={k: decision[k] for k in ("image", "pixel", "scan")}, about=decisions.stated(decision),
                  weights=kept["weights"],
                  args={k: v for k, v in dataclasses.asdict(args).items() if k != "data"},
                  scored=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    (folder / "predict.json").write_text(json.dumps(record, indent=1))
    common.remove(folder / "model.pt")  # left by a zero-shot method
    os.close(run.lock)
    if not images:
        show_ranking(scans, "scans", decision["scan"], len(decision["normal_scans"]), 20)
    else:
        show_ranking(rows, "images", decision["image"], len(decision["normal_scores"]), 1)
    print(decisions.stated(decision), f"results: {folder}", sep="\n")
    if damaged:
        print(*[f"not scored: {message}" for message in damaged], sep="\n", file=sys.stderr)
        raise SystemExit(1)


def is_mask(file, folder):
    """Return True if the file is in a mask folder of a benchmark below `folder`."""
    names = [name.lower() for name in file.parts[len(folder.parts) : -1]]
    return any(name in common.MASKS or common.ROLES.get(name, ("", False))[1] for name in names)


def score_images(run, model, decision, files):
    """Return (rows of scores.csv, [] in place of scans, damaged files)."""
    args, asked, rows, damaged = run.args, Path(run.args.predict), [], []
    for start in common.progress(range(0, len(files), args.batch_size), "images"):
        arrays = {}
        for file in files[start : start + args.batch_size]:
            try:
                arrays[file] = common.decode(file, args.image_size, white=args.white)[0]
            except common.Error as e:
                damaged.append(str(e))
        for file, (anomaly_map, score) in zip(arrays, scored(run, model, list(arrays.values())), strict=True):
            name = file.relative_to(asked).as_posix() if asked.is_dir() else file.name
            rows.append(answer(name, score, decision["normal_scores"], decision["image"]))
            if anomaly_map is not None and (args.maps or args.save_maps != "no"):
                image, _ = common.decode(file, white=args.white)
                save_maps(run, len(rows) - 1, image, anomaly_map, decision, rows[-1])
    return rows, [], damaged


def score_scans(run, model, decision):
    """Return (rows of scores.csv, one per slice; rows of scans.csv; damaged files). Blank slices are not scored.

    Write the maps of each scan in its format, and a picture of its slice with the highest score."""
    import volumes  # imported here because images need neither nibabel nor pydicom

    args, rows, scan_rows = run.args, [], []
    scans, damaged = volumes.find_scans(args.predict)
    if not scans and not damaged:
        raise common.Error(f"--predict {args.predict}: no image ({' '.join(sorted(common.SUFFIXES))}), NIfTI volume or "
                           "DICOM series")
    for scan in common.progress(scans, "scans"):
        try:
            slices = {z: scan.slice(z) for z in range(len(scan)) if not scan.blank(z)}
            if not slices:
                raise volumes.Damaged(f"{scan.source}: all {len(scan)} slices are blank")
        except common.Error as e:
            damaged.append(str(e))
            continue
        small = [common.to_array(Image.fromarray(image), args.image_size) for image in slices.values()]
        maps = np.full((len(scan), args.image_size, args.image_size), np.nan, np.float32)
        own = {}
        for z, (anomaly_map, score) in zip(slices, scored(run, model, small), strict=True):
            own[z] = answer(f"{scan.name}#{z:04}", score, decision["normal_scores"], decision["image"])
            maps[z] = np.nan if anomaly_map is None else anomaly_map
        score = decisions.scan_score([row["score"] for row in own.values()], args.scan_score)
        scan_rows.append(answer(scan.name, score, decision["normal_scans"], decision["scan"])
                         | dict(slices=len(scan), blank=len(scan) - len(slices)))
        rows += own.values()
        if not np.isnan(maps).all():
            z = max(own, key=lambda z: own[z]["score"])
            image = common.to_array(Image.fromarray(slices[z]))
            save_maps(run, len(scan_rows) - 1, image, maps[z], decision, own[z])
            scan.save_maps(run.folder, maps, decision["pixel"], decision["map_range"][0])
    return rows, scan_rows, damaged


def scored(run, model, arrays):
    """Yield (map (S, S) or None, score) for each image, uint8 (3, S, S)."""
    for start in range(0, len(arrays), run.args.batch_size):
        image = torch.from_numpy(np.stack(arrays[start : start + run.args.batch_size])).to(run.device).float() / 255
        maps, scores = common.score(model, image, run.args.batch_size)
        yield from zip([None] * len(image) if maps is None else maps, scores.tolist(), strict=True)


def answer(name, score, normal, threshold):
    """Return a row of scores.csv or scans.csv. normal: sorted scores of normal images or scans."""
    percentile = round(100 * float(np.searchsorted(normal, score, "right")) / len(normal), 2) if normal else None
    decided = None if threshold is None else "anomalous" if score > threshold else "normal"
    return dict(path=name, score=score, percentile=percentile, decision=decided)


def save_maps(run, index, image, anomaly_map, decision, row):
    """Draw an image (3, H, W) and its map (S, S); write a mask if there is a threshold, and the raw map."""
    name = f"{index:05}_{common.plain(row['path'].rsplit('.', 1)[0])}"
    title = f"{row['path']}  score {row['score']:.4g}  {row['decision'] or ''}"
    if run.args.maps:
        decisions.save_picture(run.folder / "maps" / f"{name}.png", image, anomaly_map, decision, title)
    own = Image.fromarray(anomaly_map).resize(image.shape[:0:-1], Image.Resampling.BILINEAR)
    masks, raw = run.folder / "masks", run.folder / "raw"
    if decision["pixel"] is not None:
        masks.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(own) >= np.float32(decision["pixel"])).save(masks / f"{name}.png")
    if run.args.save_maps != "no":
        raw.mkdir(exist_ok=True)
        np.save(raw / f"{name}.npy", np.asarray(own)) if run.args.save_maps == "npy" else own.save(raw / f"{name}.tiff")


def show_ranking(rows, what, threshold, normal, needed):
    """Print the five rows with the highest scores and the number of rows above the threshold."""
    print(f"five highest scores of {len(rows)} {what}; percentiles among {normal} normal {what}\n"
          "       score  percentile  decision   path")
    for row in sorted(rows, key=lambda row: -row["score"])[:5]:
        percentile, decided = row["percentile"] if normal else "-", row["decision"] or "-"
        print(f"{row['score']:>12.4g}  {percentile:>10}  {decided:<9}  {row['path']}")
    if threshold is None:
        print(f"{len(rows)} {what}, not decided: a threshold needs {needed} or more normal validation {what}, "
              f"not {normal}")
    else:
        above = sum(row["decision"] == "anomalous" for row in rows)
        print(f"{len(rows)} {what}, {above} above the threshold {threshold:.4g}")
