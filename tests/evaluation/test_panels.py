import numpy as np
from PIL import Image

from mfdetr_cache.evaluation.overlay import draw_probabilities
from mfdetr_cache.evaluation.panels import same_objects


def test_an_object_is_its_most_confident_detection() -> None:
    """Also where a less confident one of it has a better box; what is far away is nothing."""
    iou = np.array([[0.9, 0.8, 0.0], [0.0, 0.2, 0.7], [0.0, 0.1, 0.1]])
    assert same_objects(iou) == {1: 2, 0: 1}
    assert same_objects(np.zeros((0, 3))) == {}


def test_a_heat_map_is_brighter_where_it_is_more_probable() -> None:
    image = Image.new("RGB", (256, 1), (100, 100, 100))
    drawn = draw_probabilities(image, np.arange(256, dtype=np.uint8)[None])
    colours = np.array(drawn)[0].astype(int)
    assert colours[0].tolist() == [70, 70, 70]  # the image, dimmed
    assert colours[255].tolist() == [252, 255, 164]
    # Inferno rises in luminance once the image shows no more.
    luminance = np.array(drawn.convert("L"))[0].astype(int)
    assert (np.diff(luminance[64:]) >= 0).all()
