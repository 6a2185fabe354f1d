"""Files that are versions of one picture, by their names."""

import re

# Roboflow writes each augmented version of a picture under its name and a hash of the version.
_VERSION = re.compile(r"\.rf\.\w{8,}(?=\.\w+$)")


def picture_of(file_name: str) -> str:
    """The name that all versions of a picture share; other files are versions of themselves.

    >>> picture_of("dog_jpg.rf.0e2133dac9def063d77175afee0153fa.jpg")
    'dog_jpg.jpg'
    """
    return _VERSION.sub("", file_name)
