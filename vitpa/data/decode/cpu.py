"""JPEGs decoded on the CPU by TurboJPEG, through FFCV's compiled library: the pixels of FFCV's own loader."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitpa.data.manifest import BetonError, Pixels

TJPF_RGB, TJ_FLAGS = 0, 2048 | 32768  # turbojpeg.h: red, green, blue; TJFLAG_FASTDCT, and TJFLAG_LIMITSCANS: 500 at most


def decode_jpeg(stored: npt.NDArray[np.uint8], out: Pixels) -> bool:
    """Decode a JPEG into `out`, (H, W, 3) uint8 C-contiguous RGB; False if it is damaged or of another size.

    If True, each pixel of `out` has been written. The call and the flags are those of FFCV's `imdecode` (libffcv.cpp:
    TurboJPEG with the fast DCT), so the pixels are those of FFCV's loader. That one does not ask for the size, though: of a
    JPEG that is smaller than `out` it writes what there is, and a larger one it shrinks. Runs without Python's global lock.
    """
    height, width = out.shape[:2]
    with jpeg_decompressor() as (library, handle):
        if _size(library, handle, stored) != (height, width):
            return False
        place = stored.ctypes.data, stored.size, out.ctypes.data
        code: int = library.tjDecompress2(handle, *place, width, 0, height, TJPF_RGB, TJ_FLAGS)
    return code == 0  # after a warning, too, it is not


def jpeg_size(stored: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    """Height and width that a JPEG's header says; None if it cannot be read."""
    with jpeg_decompressor() as (library, handle):
        return _size(library, handle, stored)


def _size(library: ctypes.CDLL, handle: int, stored: npt.NDArray[np.uint8]) -> tuple[int, int] | None:
    found = _FOUND()
    at = ctypes.addressof(found)
    code = library.tjDecompressHeader3(handle, stored.ctypes.data, stored.size, at, at + 4, at + 8, at + 12)
    return (found[1], found[0]) if code == 0 else None


_FOUND = ctypes.c_int * 4  # width, height, subsampling, colours


class jpeg_decompressor:  # noqa: N801 - used as a function
    """TurboJPEG's decoder, new for each image: it keeps tables of the one before, and where in its header an error was."""

    def __enter__(self) -> tuple[ctypes.CDLL, int]:
        self.library = _turbojpeg()
        self.handle = self.library.tjInitDecompress()
        if not self.handle:
            raise MemoryError("TurboJPEG's decoder cannot be made")
        return self.library, self.handle

    def __exit__(self, *_: object) -> None:
        self.library.tjDestroy(self.handle)


@functools.cache
def _turbojpeg() -> ctypes.CDLL:
    """TurboJPEG, by way of FFCV's compiled library, which is linked with it."""
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob("_libffcv*.so")]
    if not libraries:
        raise BetonError("FFCV's compiled library is not installed; JPEG images need it: pip install ffcv")
    try:
        library = ctypes.CDLL(str(libraries[0]))
        pointer, length, number = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
        for name, result, arguments in (
            ("tjInitDecompress", pointer, []),
            ("tjDestroy", number, [pointer]),
            ("tjGetErrorStr2", ctypes.c_char_p, [pointer]),
            ("tjDecompressHeader3", number, [pointer, pointer, length, *[pointer] * 4]),
            ("tjDecompress2", number, [pointer, pointer, length, pointer, *[number] * 5]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BetonError(f"{libraries[0]}: FFCV's compiled library cannot be used: {error}") from error
    return library
