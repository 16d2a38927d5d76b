"""Small videos and noise that tests write and read again."""

import struct

import numpy as np


def clip(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """A white bar on a gradient, a little further to the right in each frame."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        image = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], -1).astype(np.uint8)
        image[:, 2 * number : 2 * number + 6] = 255
        frames.append(image)
    return frames


def noise(seconds: float, rate: int) -> np.ndarray:
    """[1, T], without the highest frequencies, so that codecs keep its shape."""
    steps = np.random.default_rng(0).normal(size=round(seconds * rate) + 200)
    return 0.2 * np.convolve(steps, np.hanning(200) / 20, "valid")[None, : round(seconds * rate)].astype(np.float32)


def turned(data: bytes, degrees: int) -> bytes:
    """An MP4 whose header says that it is to be turned clockwise."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    at = data.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]
