"""What a detector gave for a batch, on its way from the device to this machine's memory."""

from collections.abc import Collection

from mfdetr_cache.ops.devices import start_copies_to_host
from mfdetr_cache.ops.quantisation import Encoding
from mfdetr_cache.ops.quantisation_torch import EncodedMaps, encode_maps
from mfdetr_cache.types import DetectorOutput


class HostCopy:
    """Copies a batch to the host while the device goes on with the next; ``names`` of its maps.

    A GPU quantises the maps first, so that a quarter of the bytes is copied, and no core quantises.
    """

    def __init__(self, output: DetectorOutput, names: Collection[str], encoding: Encoding) -> None:
        self._output = output
        if output.class_logits.device.type == "cpu":
            self._wait = None
            return
        self._encoded = {name: encode_maps(output.maps[name], encoding) for name in names}
        tensors = [output.class_logits, output.boxes_cxcywh_norm, output.queries]
        for encoded in self._encoded.values():
            tensors += encoded.tensors
        self._wait = start_copies_to_host(tensors)

    def of_image(self, index: int) -> tuple[DetectorOutput, dict[str, EncodedMaps] | None]:
        """The outputs of one image, in any thread; waits for them.

        Its maps are in the second where a GPU quantised them.
        """
        if self._wait is None:
            return self._output.of_image(index), None
        tensors = iter(self._wait())
        heads = DetectorOutput(next(tensors), next(tensors), next(tensors), {})
        maps = {name: e.with_tensors(tensors) for name, e in self._encoded.items()}
        return heads.of_image(index), {name: e.of_image(index) for name, e in maps.items()}
