"""Promises of the accounting: parameters exact, activations near what autograd keeps, published sizes, presets = YAML."""

from dataclasses import asdict, replace

import pytest
import torch
import yaml

from unitok.cli import main
from unitok.cli.inspect import inspect
from unitok.configs import CONFIGS
from unitok.errors import UserError
from unitok.hardware import peak_flops
from unitok.model import Decoder, DecoderConfig
from unitok.model.costs import activation_floats, cost_table, count, gathered, hours, memory_bytes
from unitok.model.inference import InferenceDecoder
from unitok.model.presets import PRESETS, preset
from unitok.pretrained import make_config

SMALL = DecoderConfig(300, 64, 3, 160, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, qk_norm="layer", attention_bias=True, norm_placement="after")])
def test_parameters_are_those_of_the_decoder_itself(config):
    model = Decoder(config)
    costs = count(config)
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert costs.in_matrices == sum(m.weight.numel() for m in linear)


def test_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config, t = replace(SMALL, num_key_value_heads=4), 128
    model = Decoder(config)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randint(0, 300, (1, t)))
    costs = count(config, t)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * t  # torch counts the whole square
    assert counter.get_total_flops() == (costs.flops_forward + attention) * t


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_about_what_autograd_keeps(checkpointed):
    config = replace(SMALL, checkpoint_activations=checkpointed)
    model, t = Decoder(config), 256
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own and x.numel() >= t * 16:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden(torch.randint(0, 300, (1, t)))
    assert activation_floats(config) * t == pytest.approx(sum(kept.values()), rel=0.25)


def test_published_sizes():
    parameters = {
        name: count(replace(p.config, vocab_size=p.config.vocab_size or 10_000)).parameters for name, p in PRESETS.items()
    }
    # Chameleon Team 2024 say 7B and 34B; transformers' Llama-2-7B has 6,738,415,616 with 32,000 ids.
    assert parameters["chameleon-7b"] == pytest.approx(7.04e9, rel=0.01)
    assert parameters["chameleon-34b"] == pytest.approx(34.3e9, rel=0.01)
    assert parameters["anygpt-7b"] - 2 * (49_418 - 32_000) * 4096 == 6_738_415_616
    for name, wanted in {"10m": 10e6, "25m": 25e6, "100m": 100e6, "350m": 350e6, "1b": 1e9}.items():
        assert count(replace(PRESETS[name].config, vocab_size=1)).in_blocks == pytest.approx(wanted, rel=0.08)


def test_memory_and_hours_follow_from_them():
    memory = memory_bytes(SMALL, positions=1000, rows=2, context=100)
    n = count(SMALL).parameters
    assert memory["weights"] == 4 * n
    assert memory["optimizer"] == 8 * n
    assert memory_bytes(SMALL, 1000, 2, 100, "muon")["optimizer"] == 8 * n - 4 * count(SMALL).in_blocks
    cache = InferenceDecoder(Decoder(SMALL)).new_cache(2, 100)
    assert memory["kv_cache"] == 2 * (cache.keys.numel() + cache.values.numel())
    assert hours(SMALL, 1e9, 1e12, 0.5, 2, 512) == pytest.approx(count(SMALL, 512).flops * 1e9 / 1e12 / 3600)


@pytest.mark.parametrize("name", PRESETS)
def test_the_yaml_of_a_preset_is_the_preset(name):
    content = yaml.safe_load((CONFIGS / "decoder" / f"{name}.yaml").read_text())
    found = asdict(make_config(DecoderConfig, content["model"]["init_args"]["decoder"], name))
    wanted = asdict(PRESETS[name].config)
    for free in ("vocab_size", "checkpoint_activations"):
        found.pop(free), wanted.pop(free)
    assert found == wanted
    assert content["data"]["init_args"]["max_length"] <= PRESETS[name].config.max_position_embeddings


def test_inspect_says_what_a_decoder_costs_without_allocating_it(bundle_folder, capsys, tmp_path):
    inspect("chameleon-34b")
    out = capsys.readouterr().out
    for wanted in ("34.3B: 33.2B in blocks", "65,536 tokens", "1,026 tokens", "48 layers, 8192 wide", "hours for"):
        assert wanted in out
    inspect(str(CONFIGS / "decoder" / "tiny.yaml"))
    assert "1.77M in blocks" in capsys.readouterr().out
    Decoder(SMALL).save_pretrained(tmp_path / "model")
    inspect(str(tmp_path / "model"))
    assert "300 tokens" in capsys.readouterr().out
    inspect(str(bundle_folder))
    out = capsys.readouterr().out
    assert "68 tokens (32 x 32 pixels)" in out
    assert "37.5 tokens (12.5 frames of 3 levels)" in out
    with pytest.raises(UserError, match=r"mfu is in \(0, 1\]"):
        inspect("100m", mfu=2)
    main(["inspect", "100m", "--tokens", "1e9", "--devices", "8", "--hardware", "a100", "--mfu", "0.5"])
    assert "1B tokens on 8 x a100 at 50% MFU" in capsys.readouterr().out
    with pytest.raises(UserError, match="choose one of tiny"):
        preset("101m")
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "101m"])
    assert stopped.value.code == 2
    assert "no such file or folder, no built-in bundle (scenes) and no preset; presets are tiny" in capsys.readouterr().err


def test_the_peak_of_a_device_is_found_by_its_drivers_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("Tesla T4") is None


def test_a_plan_for_many_devices_adds_up():
    config, costs = preset("chameleon-34b").config, count(preset("chameleon-34b").config)
    block = costs.in_blocks // config.num_hidden_layers
    assert gathered(config, costs) == 2 * config.vocab_size * config.hidden_size + config.hidden_size + 2 * block
    plan = cost_table(config, {}, tokens=1e12, hardware="h100", devices=512, batch=4096)
    assert float(plan["on each device"].split()[0]) == pytest.approx(
        16 * costs.parameters / 512e9 + 4 * gathered(config, costs) / 1e9, abs=0.01
    )
    assert float(plan["checkpoint"].split()[0]) == pytest.approx(12 * costs.parameters / 1e9, abs=0.01)
    steps = 1e12 / (4096 * 512)
    assert float(plan["step"].split()[0]) * steps / 3600 == pytest.approx(
        float(plan["time"].split()[0].replace(",", "")), rel=0.01
    )
    assert "on each device" not in cost_table(config, {})
