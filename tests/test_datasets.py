"""Preparation scripts on small sources in their real format."""

import csv

import numpy as np
from conftest import files_of, run_script
from PIL import Image

import common


def test_phantom_is_the_same_to_the_byte_and_a_second_run_does_nothing(phantom, tmp_path):
    arguments = ["--root", tmp_path, "--size", 64, "--train", 12, "--valid", 4, "--test", 6]
    assert run_script("datasets/phantom.py", *arguments).returncode == 0
    assert files_of(tmp_path) == files_of(phantom)
    again = run_script("datasets/phantom.py", *arguments)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = run_script("datasets/phantom.py", *arguments, "--seed", 1)
    assert other.returncode == 2 and other.stderr.count("\n") == 1


def test_phantom_has_masks_inside_the_head_and_a_manifest(phantom):
    base = phantom / "phantom"
    entries = common.list_split(base, "test")
    assert [label for _, label, _ in entries] == [0] * 6 + [1] * 6
    for image, label, mask in entries:
        assert (mask is not None) == bool(label)
        if label:
            lesion = np.asarray(Image.open(mask)) > 0
            assert 0 < lesion.mean() < 0.2 and np.asarray(Image.open(image))[lesion].mean() > 20
    with open(base / "manifest.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 12 + 8 + 12


def test_no_phantom_image_is_near_to_a_training_image(phantom):
    def means(split):  # 32x32 means, mirrored too, each of zero mean and unit length
        images = [np.asarray(Image.open(p), float) for p, *_ in common.list_split(phantom / "phantom", split)]
        small = np.stack([i.reshape(32, 2, 32, 2).mean(axis=(1, 3)) for i in images])
        small -= small.mean(axis=(1, 2), keepdims=True)
        return small / np.linalg.norm(small, axis=(1, 2), keepdims=True)

    train = means("train")
    for split in ("valid", "test"):
        for other in (means(split), means(split)[:, :, ::-1]):
            assert (other.reshape(-1, 1024) @ train.reshape(-1, 1024).T).max() < 0.99
