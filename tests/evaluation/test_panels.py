import numpy as np

from mfdetr_cache.evaluation.panels import same_objects


def test_an_object_is_its_most_confident_detection() -> None:
    """Also where a less confident one of it has a better box; what is far away is nothing."""
    iou = np.array([[0.9, 0.8, 0.0], [0.0, 0.2, 0.7], [0.0, 0.1, 0.1]])
    assert same_objects(iou) == {1: 2, 0: 1}
    assert same_objects(np.zeros((0, 3))) == {}
