"""Names of a detector's class outputs."""

from collections.abc import Mapping, Sequence

from mfdetr_cache.errors import DetectorError

# The 80 categories of COCO, by their ids (Lin et al., "Microsoft COCO", 2014; ids of the 2017
# annotation files, 1 to 90 with ten left out).
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
_IDS_LEFT_OUT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_NAMES: dict[int, str] = dict(
    zip(
        [i for i in range(1, 91) if i not in _IDS_LEFT_OUT],
        [" ".join(name.split()) for name in _NAMES.split(",")],
        strict=True,
    )
)

# Outputs that are no class, at most: one that RF-DETR never trains, and the root of a Roboflow
# dataset.
SPARE_OUTPUTS = 2


def output_names(
    num_outputs: int,
    known: Mapping[int, str],
    given: Sequence[str],
    where: str,
    spare_outputs: int = 0,
) -> tuple[str, ...]:
    """A name for every output of a detector; ``LABEL_i`` where none is known.

    Args:
        num_outputs: Class outputs, "no object" not among them.
        known: Names stored with the weights, by output.
        given: The user's names, which replace them; empty for none.
        where: The weights, for the message.
        spare_outputs: Maximum number of unnamed outputs, see :func:`names_of_checkpoint`.

    Raises:
        DetectorError: If the number of given names does not fit.
    """
    if given:
        if not 0 <= num_outputs - len(given) <= spare_outputs:
            raise DetectorError(
                f"--labels has {len(given)} names and {where} has {num_outputs} class outputs; "
                "give one name per output, in their order, also where one stands for no class (the "
                "first, if category ids began at 1)"
            )
        known = names_of_checkpoint(num_outputs, given)
    return tuple(known.get(i) or f"LABEL_{i}" for i in range(num_outputs))


def names_of_checkpoint(num_outputs: int, names: Sequence[str]) -> dict[int, str]:
    """Class names of an authors' checkpoint by output; empty where it has none.

    So many names that they cannot be those of the outputs are of another training. Outputs are the
    classes in their order (RT-DETR and its descendants), or category ids, so that
    there is one output more than the largest id (LW-DETR, RF-DETR). A Roboflow dataset has a root
    category 0 that is no class; its names begin at output 1 then. Published COCO checkpoints have
    no names.
    """
    coco = list(COCO_NAMES.values())
    if not names and num_outputs == len(coco):
        return dict(enumerate(coco))
    if num_outputs == max(COCO_NAMES) + 1 and (not names or list(names) == coco):
        return dict(COCO_NAMES)
    spare = num_outputs - len(names)
    if not 0 <= spare <= SPARE_OUTPUTS:
        return {}
    return dict(enumerate(names, 1 if spare == SPARE_OUTPUTS else 0))
