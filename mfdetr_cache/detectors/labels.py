"""Names of a detector's class outputs."""

from collections.abc import Mapping, Sequence

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from mfdetr_cache.errors import DetectorError

# The 80 categories of COCO by their ids, 1 to 90 with ten left out.
COCO_NAMES: dict[int, str] = {
    category_id: name
    for category_id, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if name not in ("__background__", "N/A")
}

# Outputs that are no class, at most: one that RF-DETR never trains, and the root of a Roboflow
# dataset.
SPARE_OUTPUTS = 2


def output_names(
    num_outputs: int,
    known: Mapping[int, str],
    given: Sequence[str],
    where: str,
    spare_outputs: int = 0,
    num_classes: int | None = None,
) -> tuple[str, ...]:
    """A name for every output of a detector; ``LABEL_i`` where none is known.

    ``num_outputs`` does not count "no object". The user's names, if ``given``, replace those
    ``known`` from the weights, which a message calls ``where``; DetectorError if there are not as
    many as outputs, ``spare_outputs`` of which may have none, see
    :func:`names_of_checkpoint`, which takes ``num_classes`` too.
    """
    if given:
        if not 0 <= num_outputs - len(given) <= spare_outputs:
            raise DetectorError(
                f"--labels has {len(given)} names and {where} has {num_outputs} class outputs; "
                "give one name per output, in their order, also where one stands for no class (the "
                "first, if category ids began at 1)"
            )
        known = names_of_checkpoint(num_outputs, given, num_classes)
    return tuple(known.get(i) or f"LABEL_{i}" for i in range(num_outputs))


def names_of_checkpoint(
    num_outputs: int, names: Sequence[str], num_classes: int | None = None
) -> dict[int, str]:
    """Class names of an authors' checkpoint by output; empty where it has none.

    So many names that they cannot be those of the outputs are of another training. Outputs are the
    classes in their order (RT-DETR and its descendants), or category ids, so that
    there is one output more than the largest id (LW-DETR, RF-DETR). A Roboflow dataset has a root
    category 0 that is no class; its names begin at output 1 then. RF-DETR before 1.5 counts it in
    ``num_classes`` of its training and makes as many outputs; later ones number their classes from
    0 and have an output more. Published COCO checkpoints have no names.
    """
    coco = list(COCO_NAMES.values())
    if not names and num_outputs == len(coco):
        return dict(enumerate(coco))
    if num_outputs == max(COCO_NAMES) + 1 and (not names or list(names) == coco):
        return dict(COCO_NAMES)
    spare = num_outputs - len(names)
    if not 0 <= spare <= SPARE_OUTPUTS:
        return {}
    by_id = spare == SPARE_OUTPUTS or (spare == 1 and num_classes == num_outputs)
    return dict(enumerate(names, int(by_id)))
