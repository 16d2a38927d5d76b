"""How natural speech is, and how like the speaker, by networks that others trained to tell.

`pip install 'unitok-lm[examples,judges]'`
`python examples/speech/quality.py runs/speech/real/test FOLDER…`

DNSMOS (Reddy et al. 2022) estimates what listeners would say, from 1 to 5; it rates telephone speech low. The similarity is the cosine between
the voice of a file and that of the first folder, by Resemblyzer (Wan et al. 2018); for the first folder's own files it is to all others of it.
"""

import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr
from judge import RATE, read_folder
from resemblyzer import VoiceEncoder, preprocess_wav
from speechmos import dnsmos

encoder = VoiceEncoder("cpu", verbose=False)
voice: np.ndarray | None = None  # sum of the voices of the first folder, each of length 1
for name in sys.argv[1:]:
    mos, voices = [], []
    for file, _ in read_folder(Path(name)):
        samples, rate = soundfile.read(file)
        samples = soxr.resample(samples, rate, RATE)
        mos.append(dnsmos.run(np.clip(samples, -1, 1), sr=RATE)["ovrl_mos"])
        voices.append(encoder.embed_utterance(preprocess_wav(samples, RATE)))
    first = voice is None
    voice = np.sum(voices, 0) if voice is None else voice
    others = [voice - own if first else voice for own in voices]
    similarity = [own @ other / np.linalg.norm(other) for own, other in zip(voices, others, strict=True)]
    print(f"{name}: DNSMOS {np.mean(mos):.2f}, similarity {np.mean(similarity):.3f} of {len(mos)} files")
