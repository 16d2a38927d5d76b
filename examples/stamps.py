"""Copy the stamps of Tux Paint, a drawing program, into folders of images with captions; see docs/own-files.md.

python examples/stamps.py /usr/share/tuxpaint/stamps OUT
"""

import shutil
import sys
import zlib
from pathlib import Path

source, out = map(Path, sys.argv[1:])
for image in sorted(source.rglob("*.png")):
    path = image.relative_to(source).with_suffix("")
    if not image.with_suffix(".txt").exists():
        continue
    caption = image.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0].strip()  # translations follow
    split = "validation" if zlib.crc32(caption.encode()) % 10 == 0 else "train"  # equal captions stay together
    copy = out / split / "-".join(path.parts)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, f"{copy}.png")
    Path(f"{copy}.txt").write_text(f"{path.parts[0]}: {caption}\n", encoding="utf-8")
