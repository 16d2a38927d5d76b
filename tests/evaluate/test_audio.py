"""Promises of `unitok eval audio-tokenizer`: published definitions, scores by level, a page to listen to."""

import json

import numpy as np
import pytest
import soundfile
import torch

from unitok.cli import main
from unitok.evaluate.audio import sound_scores


def tone(seconds: float = 1.0, rate: int = 8000) -> torch.Tensor:
    t = torch.arange(round(seconds * rate)) / rate
    return (0.4 * torch.sin(2 * torch.pi * 440 * t) * (1 + torch.sin(2 * torch.pi * 3 * t)) / 2)[None]


def test_scores_follow_their_definitions():
    sound = tone()
    exact = sound_scores(sound, sound, 8000)
    assert exact["mel_distance"] == exact["stft_distance"] == 0
    assert exact["si_sdr_db"] > 80
    louder = sound_scores(0.5 * sound, sound, 8000)
    assert louder["si_sdr_db"] > 60  # scale does not count
    torch.manual_seed(0)
    noise = torch.randn_like(sound) * sound.std() * 0.1
    noisy = sound_scores(sound + noise, sound, 8000)
    assert noisy["si_sdr_db"] == pytest.approx(20, abs=0.5)  # 20 dB less noise than sound, positive is better
    assert noisy["mel_distance"] > louder["mel_distance"] * 0.1 > 0


def test_stoi_is_of_pystoi_and_only_for_sounds_long_enough():
    pytest.importorskip("pystoi")
    sound = tone(2.0) + 0.05 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    assert sound_scores(sound, sound, 8000)["stoi"] == pytest.approx(1, abs=1e-3)
    assert sound_scores(torch.randn_like(sound) * 0.1, sound, 8000)["stoi"] < 0.6
    assert sound_scores(sound[:, :2000], sound[:, :2000], 8000)["stoi"] is None


def test_a_tokenizer_is_measured_by_levels_and_shown(bundle_folder, tmp_path, capsys):
    (tmp_path / "sounds").mkdir()
    for i, seconds in enumerate((0.2, 0.9, 1.4)):
        soundfile.write(tmp_path / "sounds" / f"{i}.wav", tone(seconds, 16_000)[0].numpy(), 16_000)
    soundfile.write(tmp_path / "sounds" / "silent.wav", np.zeros(800), 8000)
    main(["eval", "audio-tokenizer", str(bundle_folder), str(tmp_path / "sounds"), "--out", str(tmp_path / "out")])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["sounds"] == 3
    assert scores["skipped"] == 1
    assert scores["seconds"] == pytest.approx(2.5)
    assert [row["levels"] for row in scores["by_levels"]] == [1, 2, 3]
    assert scores["by_levels"][-1]["bits_per_second"] == scores["bits_per_second"] == 3 * 5 * scores["frame_rate"]
    assert {"si_sdr_db", "mel_distance", "stft_distance", "codebook_usage", "codebook_perplexity"} <= set(
        scores["by_levels"][0]
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "sounds.jsonl").read_text().splitlines()]
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
