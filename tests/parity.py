"""Ours next to a peer's code, on the same weights and images:

    python tests/parity.py METHOD --data FOLDER [--weights FILE] [--peer FOLDER]

A comparison by hand, no test: peers are no dependency of ours. tests/peers/METHOD.py says which peer it takes (anomalib
2.7 in the same environment, or the official repository in --peer), how one state gets into both, and what differs by
choice and is undone for the comparison. Each line gives the largest difference between the two sides, relative to the
peer's largest value; the exit status is 1 if one of them exceeds 1e-4."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1])]
from conftest import load_script

import common

TOLERANCE = 1e-4


@dataclass
class Args:
    method: Annotated[str, tyro.conf.Positional]
    """a file of tests/peers/"""
    data: str
    """a benchmark folder: its first images are compared"""
    weights: str = "none"
    """of the backbone, as --weights of the scripts: a FILE for mobilenet_v2, or none (untrained, seeded)"""
    peer: str | None = None
    """the official repository, checked out, where that is the peer"""
    image_size: int = 256
    """pixels"""
    limit: int | None = 8
    """images of each split and class"""


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    known = sorted(p.stem for p in (Path(__file__).parent / "peers").glob("*.py"))
    if args.method not in known:
        raise common.Error(f"no comparison for {args.method}; there are {', '.join(known)}")
    args.root, args.predict, args.white, args.holdout = "data", None, 65535, 0
    train, _, test = common.load_benchmark(args)
    torch.manual_seed(0)
    worst = 0.0
    for what, ours, peer in load_script(f"tests/peers/{args.method}.py").compare(args, train, test):
        ours, peer = (torch.as_tensor(side).detach().double() for side in (ours, peer))
        assert ours.shape == peer.shape, f"{what}: ours has shape {tuple(ours.shape)}, the peer's {tuple(peer.shape)}"
        difference = float((ours - peer).abs().max() / peer.abs().max().clamp(min=1e-30))
        shown = f"{ours.item():.6g} and {peer.item():.6g}" if ours.numel() == 1 else f"{tuple(ours.shape)}"
        mark = " !" * (difference > TOLERANCE)
        print(f"{what:<40} {shown:<30} largest difference {difference:.1e}{mark}", flush=True)
        worst = max(worst, difference)
    raise SystemExit(int(worst > TOLERANCE))
