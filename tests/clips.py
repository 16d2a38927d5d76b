"""Small videos and noise that tests write and read again."""

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
