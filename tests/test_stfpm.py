"""The mathematics of STFPM: distance, product of maps, a student that differs from its frozen teacher, sizes."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torchvision.models import get_model

import common

stfpm = load_script("methods/stfpm.py")


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def seeded(seed=0, backbone="mobilenet_v2"):
    torch.manual_seed(seed)
    return stfpm.STFPM(backbone, "none")


class Fixed(stfpm.STFPM):
    """Teacher and student give these features, {layer: (B, C, h, w)}, whatever the image."""

    def __init__(self, target, pred):
        torch.nn.Module.__init__(self)
        self.teacher, self.student = (lambda image: target), (lambda image: pred)


def test_distance_is_the_squared_difference_of_unit_vectors():
    target = {"a": torch.tensor([3.0, 0.0, 2.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 3)}
    pred = {"a": torch.stack([7 * target["a"][0, :, 0, 0],  # parallel: 0
                              torch.tensor([0.0, 5.0, 0.0]),  # at a right angle: 2
                              -target["a"][0, :, 0, 0]], dim=1).view(1, 3, 1, 3)}  # opposite: 4
    distance, = Fixed(target, pred)(torch.zeros(1, 3, 8, 8))
    assert torch.allclose(distance, torch.tensor([[[0.0, 2.0, 4.0]]]), atol=1e-6)


def test_small_distances_keep_their_digits():
    angle = torch.tensor(1e-4, dtype=torch.double)
    pred = torch.tensor([angle.cos(), angle.sin()])
    expected = float(2 - 2 * angle.cos())  # 1e-8: 2 - 2 cos in float32 is 0 there
    distance, = Fixed({"a": torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)}, {"a": pred.float().view(1, 2, 1, 1)})(
        torch.zeros(1, 3, 8, 8))
    assert float(distance) == pytest.approx(expected, rel=1e-3)


def test_map_is_the_product_of_enlarged_layer_maps_and_score_its_maximum(images):
    model = seeded()
    anomaly_map, score = model.predict(images)
    with torch.no_grad():
        sides = [net(common.normalize(images)) for net in (model.teacher, model.student)]
    expected = torch.ones(4, 64, 64)
    for k in model.teacher(images):
        t, s = (f[k] / f[k].norm(dim=1, keepdim=True) for f in sides)
        expected *= F.interpolate((2 - 2 * (t * s).sum(1))[:, None], 64, mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(anomaly_map, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(score, anomaly_map.flatten(1).max(1).values)


def test_student_of_every_seed_differs_from_an_untrained_teacher():
    weights = [seeded(seed).student.features.get_submodule("0.0").weight for seed in (0, 1)]
    untrained = seeded(0).teacher.features.get_submodule("0.0").weight
    assert not torch.equal(weights[0], weights[1])
    assert all((w - untrained).abs().max() > 0.1 for w in weights)


def test_a_step_moves_the_student_and_leaves_the_teacher(images):
    model = seeded()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.student.parameters(), 0.4)
    first, second = 0, 0
    for _ in range(3):
        second = sum(distance.mean() for distance in model(images))
        first = first or float(second.detach())
        optimizer.zero_grad()
        second.backward()
        optimizer.step()
    assert float(second.detach()) < first
    for name, value in model.state_dict().items():
        if name.startswith("teacher"):
            assert torch.equal(value, before[name]), name
        elif not name.endswith("num_batches_tracked"):
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(("backbone", "parameters"), [
    ("resnet18", 2_782_784), ("wide_resnet50_2", 24_862_528), ("mobilenet_v2", 542_528)])
def test_teacher_and_student_are_the_published_networks_up_to_the_third_stage(backbone, parameters):
    with torch.device("meta"):
        net = get_model(backbone, weights=None)
    assert stfpm.__doc__.count(f"{parameters:,}") == 1
    layer = stfpm.LAYERS[backbone][-1]
    names = [name for name, _ in net.named_children()]
    if backbone == "mobilenet_v2":
        kept = [net.features[: int(layer.split(".")[1]) + 1]]
    else:
        kept = [net.get_submodule(name) for name in names[: names.index(layer) + 1]]
    assert sum(p.numel() for part in kept for p in part.parameters()) == parameters
    if backbone != "wide_resnet50_2":
        model = seeded(backbone=backbone)
        assert sum(p.numel() for p in model.student.parameters()) == parameters
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
