"""What every detector must keep, as a test class: subclass it in a test module and run pytest.

```python
from mfdetr_cache.detectors.conformance import DetectorConformance

class TestMyDetector(DetectorConformance):
    def make_detector(self):
        return MyDetector(...)
```
"""

import numpy as np
import torch
from PIL import Image

from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.types import DetectorOutput


class DetectorConformance:
    """Tests of the Detector protocol; :meth:`make_detector` says what is tested."""

    image_hw: tuple[int, int] = (120, 160)

    def make_detector(self) -> Detector:
        """A new instance of the detector, always with the same weights."""
        raise TypeError("a conformance test says what to test in make_detector")

    def _image(self, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (*self.image_hw, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((self.image_hw[1], self.image_hw[0]))

    def _run(self, detector: Detector, seed: int = 0) -> DetectorOutput:
        return detector.forward(self._small(detector.preprocess(self._image(seed)))[None])

    def _small(self, pixels: torch.Tensor) -> torch.Tensor:
        """At most 256 pixels a side: conformance is about shapes, not about detecting."""
        height, width = pixels.shape[-2:]
        return pixels if max(height, width) <= 256 else pixels[:, :192, :256].contiguous()

    def test_it_keeps_the_protocol_and_is_frozen(self) -> None:
        """All members of the protocol are there; evaluation mode, no gradient."""
        detector: object = self.make_detector()
        assert isinstance(detector, Detector), "a member of the protocol is missing"
        assert isinstance(detector, torch.nn.Module), "a detector is a module"
        assert not any(m.training for m in detector.modules()), "not in evaluation mode"
        assert not any(p.requires_grad for p in detector.parameters()), "parameters ask gradients"

    def test_outputs_are_as_declared(self) -> None:
        """What ``spec`` says is what ``forward`` gives, and nothing that a cache would refuse.

        Sizes of maps are the input's over the stride, to one cell.
        """
        detector = self.make_detector()
        pixels = self._small(detector.preprocess(self._image()))
        spec, output = detector.spec, detector.forward(pixels[None])
        assert output.class_logits.shape == (1, spec.num_queries, spec.num_labels)
        assert output.boxes_cxcywh_norm.shape == (1, spec.num_queries, 4)
        assert output.queries.shape == (1, spec.num_queries, spec.query_dim)
        assert len(spec.label_names) == spec.num_labels
        assert set(output.maps) >= {m.name for m in spec.maps}
        for m in spec.maps:
            assert output.maps[m.name].shape[:2] == (1, m.channels), m.name
            for axis in (-2, -1):
                cells, wanted = output.maps[m.name].shape[axis], pixels.shape[axis] / m.stride
                assert abs(cells - wanted) <= 1, f"{m.name}: {cells} cells for stride {m.stride}"
        assert sum(m.role == "c1" for m in spec.maps) <= 1
        names = [m.name for m in spec.maps]
        assert len(set(names)) == len(names)
        for values in (output.class_logits, output.queries, *output.maps.values()):
            assert torch.isfinite(values).all()
        boxes = output.boxes_cxcywh_norm
        assert ((boxes >= 0) & (boxes <= 1)).all()

    def test_preprocessing_and_geometry_agree(self) -> None:
        """``input_geometry`` foretells what ``preprocess`` gives."""
        detector = self.make_detector()
        for edge in (0, 480):
            geometry = detector.input_geometry(self.image_hw, edge)
            pixels = detector.preprocess(self._image(), edge)
            assert pixels.dtype == torch.float32
            assert tuple(pixels.shape) == (3, *geometry.input_hw)
            assert geometry.original_hw == self.image_hw

    def test_the_same_weights_are_the_same_detector(self) -> None:
        """A second instance has the same identity and gives the same numbers."""
        first, second = self.make_detector(), self.make_detector()
        assert first.spec == second.spec
        one, two = self._run(first), self._run(second)
        assert torch.equal(one.class_logits, two.class_logits)
        assert all(torch.equal(one.maps[m.name], two.maps[m.name]) for m in first.spec.maps)

    def test_an_image_does_not_depend_on_what_ran_before(self) -> None:
        """No state is carried from one image to the next."""
        detector = self.make_detector()
        before = self._run(detector, 0)
        self._run(detector, 1)
        after = self._run(detector, 0)
        assert torch.equal(before.class_logits, after.class_logits)
        assert torch.equal(before.queries, after.queries)

    def test_images_of_one_size_may_share_a_batch(self) -> None:
        """Equal sizes in a batch change nothing beyond rounding."""
        detector = self.make_detector()
        pixels = [self._small(detector.preprocess(self._image(seed))) for seed in (0, 1)]
        together = detector.forward(torch.stack(pixels))
        for index, image in enumerate(pixels):
            alone = detector.forward(image[None])
            for m in detector.spec.maps:
                scale = float(alone.maps[m.name].abs().max())
                gap = float((together.maps[m.name][index] - alone.maps[m.name][0]).abs().max())
                # Sums in another order: 1e-4 of the largest value is far above float32 noise and
                # far below what a neighbour's influence makes.
                assert gap <= 1e-4 * scale, m.name
            # Queries of nearly the same score may change places, and pass the noise through all of
            # the decoder's layers; each label's logits in their order tell what was detected.
            for ours, theirs in (
                (together.class_logits[index], alone.class_logits[0]),
                (together.boxes_cxcywh_norm[index], alone.boxes_cxcywh_norm[0]),
            ):
                gap = float((ours.sort(0)[0] - theirs.sort(0)[0]).abs().max())
                assert gap <= 1e-3 * float(theirs.abs().max())
