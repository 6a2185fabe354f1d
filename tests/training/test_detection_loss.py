from types import SimpleNamespace

import pytest
import torch
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from mfdetr_cache.training.detector_tuner import detection_loss

CONFIG = SimpleNamespace(
    class_cost=2.0,
    bbox_cost=5.0,
    giou_cost=2.0,
    num_labels=6,
    focal_alpha=0.25,
    auxiliary_loss=False,
    two_stage=False,
    class_loss_coefficient=2.0,
    bbox_loss_coefficient=5.0,
    giou_loss_coefficient=2.0,
    dice_loss_coefficient=0.0,
    mask_loss_coefficient=0.0,
    eos_coefficient=0.1,
    decoder_layers=1,
)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20, 6, generator=generator)
    boxes = 0.2 + 0.5 * torch.rand(20, 4, generator=generator)
    labels = torch.tensor([0, 3, 3, 5])
    wanted = 0.2 + 0.5 * torch.rand(4, 4, generator=generator)
    return logits.requires_grad_(), boxes.requires_grad_(), labels, wanted


def test_agrees_with_the_loss_deformable_detr_is_trained_with() -> None:
    logits, boxes, labels, wanted = example()
    ours = detection_loss(logits, boxes, labels, wanted, "sigmoid") / len(labels)
    target = [{"class_labels": labels, "boxes": wanted}]
    theirs, parts, _ = DeformableDetrForObjectDetectionLoss(
        logits[None], target, torch.device("cpu"), boxes[None], CONFIG
    )
    # The authors weigh the classes by 2 (cls_loss_coef), transformers by 1.
    theirs = theirs + parts["loss_ce"]
    # transformers' matcher and losses in float32: rounding of sums over 120 terms.
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine = torch.autograd.grad(ours, (logits, boxes))
    reference = torch.autograd.grad(theirs, (logits, boxes))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_softmax_detectors_learn_where_nothing_is() -> None:
    """DETR's loss, on boxes so close to the objects that both matchers agree."""
    logits, _, labels, wanted = example()
    labels = labels.clamp(max=4)
    boxes = torch.full((20, 4), 0.1)
    boxes[[3, 8, 11, 19]] = wanted + 0.01
    boxes.requires_grad_()
    config = SimpleNamespace(**{**vars(CONFIG), "num_labels": 5, "class_cost": 1.0})
    ours = detection_loss(logits, boxes, labels, wanted, "softmax") / len(labels)
    target = [{"class_labels": labels, "boxes": wanted}]
    theirs, _, _ = ForObjectDetectionLoss(
        logits[None], target, torch.device("cpu"), boxes[None], config
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, (logits, boxes)),
        torch.autograd.grad(theirs, (logits, boxes)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_an_image_without_objects_teaches_that_nothing_is_there(score_function: str) -> None:
    logits, boxes, _, _ = example()
    nothing, nowhere = torch.empty(0, dtype=torch.int64), torch.empty(0, 4)
    loss = detection_loss(logits, boxes, nothing, nowhere, score_function)
    of_logits, of_boxes = torch.autograd.grad(loss, (logits, boxes))
    assert loss > 0
    assert not of_boxes.any()
    objects = logits.shape[1] - (score_function == "softmax")
    assert (of_logits[:, :objects] > 0).all()
