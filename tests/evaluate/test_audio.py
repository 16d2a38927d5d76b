"""Promises of `unitok eval audio-tokenizer`: published definitions, scores by level, a page to listen to."""

import json

import numpy as np
import pytest
import soundfile
import torch

from unitok.cli import main
from unitok.evaluate.audio import audio_scores


def tone(seconds: float = 1.0, rate: int = 8000) -> torch.Tensor:
    t = torch.arange(round(seconds * rate)) / rate
    return (0.4 * torch.sin(2 * torch.pi * 440 * t) * (1 + torch.sin(2 * torch.pi * 3 * t)) / 2)[None]


def test_scores_follow_their_definitions():
    audio = tone()
    exact = audio_scores(audio, audio, 8000)
    assert exact["mel_distance"] == exact["stft_distance"] == 0
    assert exact["si_sdr_db"] > 80
    louder = audio_scores(0.5 * audio, audio, 8000)
    assert louder["si_sdr_db"] > 60  # scale does not count
    torch.manual_seed(0)
    noise = torch.randn_like(audio) * audio.std() * 0.1
    noisy = audio_scores(audio + noise, audio, 8000)
    assert noisy["si_sdr_db"] == pytest.approx(20, abs=0.5)  # 20 dB less noise than audio, positive is better
    assert noisy["mel_distance"] > louder["mel_distance"] * 0.1 > 0


def test_stoi_is_of_pystoi_and_only_for_audio_long_enough():
    pytest.importorskip("pystoi")
    audio = tone(2.0) + 0.05 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    assert audio_scores(audio, audio, 8000)["stoi"] == pytest.approx(1, abs=1e-3)
    assert audio_scores(torch.randn_like(audio) * 0.1, audio, 8000)["stoi"] < 0.6
    assert audio_scores(audio[:, :2000], audio[:, :2000], 8000)["stoi"] is None


def test_a_tokenizer_is_measured_by_levels_and_shown(bundle_folder, tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    for i, seconds in enumerate((0.2, 0.9, 1.4)):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", tone(seconds, 16_000)[0].numpy(), 16_000)
    soundfile.write(tmp_path / "audio" / "silent.wav", np.zeros(800), 8000)
    main(["eval", "audio-tokenizer", str(bundle_folder), str(tmp_path / "audio"), "--out", str(tmp_path / "out")])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["files"] == 3
    assert scores["skipped"] == 1
    assert scores["seconds"] == pytest.approx(2.5)
    assert [row["levels"] for row in scores["by_levels"]] == [1, 2, 3]
    assert scores["by_levels"][-1]["bits_per_second"] == scores["bits_per_second"] == 3 * 5 * scores["frame_rate"]
    assert {"si_sdr_db", "mel_distance", "stft_distance", "codebook_usage", "codebook_perplexity"} <= set(
        scores["by_levels"][0]
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "audio.jsonl").read_text().splitlines()]
    found = [row["levels"][-1]["si_sdr_db"] for row in rows[:3]]
    assert found == sorted(found)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:audio/wav") == page.count("data:image/png") == 3 * 4
    assert "si_sdr_db" in capsys.readouterr().out


def test_nothing_to_measure_is_one_line(bundle_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "audio-tokenizer", str(bundle_folder), str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "no audio files in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
