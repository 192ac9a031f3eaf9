"""Each pruning defence on a network where what it must find is known."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.defences import DEFENCES
from bench.defences.anp import anp
from bench.defences.api import Info, NotApplicable
from bench.defences.bnp import bnp, statistics_divergence
from bench.defences.clp import channel_lipschitz, clp
from bench.defences.common import ACCURACY_LIMIT, NormLayer, norm_layers, norm_of
from bench.defences.fp import RELATIVE_LIMIT, fp, prune_dormant
from bench.defences.known_trigger import known_trigger
from bench.defences.onp_defence import onp_defence
from bench.defences.outliers import outliers
from bench.defences.probe_race import Judge, probe_race, restore
from bench.defences.rnp import rnp
from bench.defences.units import NormUnits, SiteUnits, cut_by_number, sweep_of
from bench.zoo.attacks import Attack
from onp import demo
from onp.config import AgentConfig, Config, SynthesisConfig
from onp.data import ImageSet
from onp.evaluate import MaskEvaluator
from onp.ledger import Ledger
from onp.probes.patch import Patch
from onp.probes.probe import Probe
from onp.suspect.architectures import preactresnet
from onp.suspect.load import load_suspect
from onp.suspect.trace import trace
from tests.bench.planted import BACKDOOR, TARGET, colour_images, planted_network, scores, stamped
from tests.networks import network

Run = Callable[[nn.Module, ImageSet, Ledger], tuple[nn.Module, Info]]
CLEAN = colour_images(240, 0)


def _anp(model: nn.Module, clean: ImageSet, ledger: Ledger) -> tuple[nn.Module, Info]:
    return anp(model, clean, seed=0, ledger=ledger, iterations=20)


def _rnp(model: nn.Module, clean: ImageSet, ledger: Ledger) -> tuple[nn.Module, Info]:
    return rnp(model, clean, seed=0, ledger=ledger)


def _noise_images(count: int = 24) -> ImageSet:
    random = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=random).to(torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 10)


def _answered(model: nn.Module, images: ImageSet) -> ImageSet:
    """The images labelled with what the model answers."""
    with torch.no_grad():
        return ImageSet(images.images, model(images.floats()).argmax(1))


def _zeroed(model: nn.Module) -> list[tuple[str, int]]:
    """Norm channels without scale."""
    return [
        (layer.name, channel)
        for layer in norm_layers(model)
        for channel in (norm_of(model, layer).weight == 0).nonzero().squeeze(1).tolist()
    ]


def _same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state)


# ---- CLP ----------------------------------------------------------------------------------------


def test_clp_prunes_the_channel_of_large_lipschitz_constant_and_no_other() -> None:
    model = network("preactresnet18")
    block = model.get_submodule("layer3.1")
    with torch.no_grad():
        block.conv1.weight[5] *= 100
        block.conv2.weight[:, 5] = 0  # and nothing reads it
    suspect = nn.Sequential(nn.Identity(), model).eval()
    ledger = Ledger()
    repaired, info = clp(suspect, _noise_images(2), seed=0, ledger=ledger)
    assert _zeroed(repaired) == [("1.layer3.1.bn2", 5)]
    assert repaired.get_submodule("1.layer3.1.bn2").bias[5] == 0
    assert info.settings == {"u": 3.0, "pruned": 1, "units": 424}
    assert ledger.total == 0
    images = _noise_images(4).floats()
    with torch.no_grad():
        torch.testing.assert_close(repaired(images), suspect(images))


def test_clp_sweeps_its_threshold() -> None:
    model = network("vgg11_bn")
    _, info = clp(model, _noise_images(2), seed=0, ledger=Ledger())
    counts = [len(_zeroed(build())) for _, build in info.candidates]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2
    assert info.candidates[0][0] == "u 0"


@pytest.mark.parametrize("name", ["preactresnet18", "resnet18", "vgg11_bn", "mobilenetv2"])
def test_lipschitz_bounds_read_the_producers_that_the_trace_names(name: str) -> None:
    model = network(name)
    layers = norm_layers(model)
    bounds = channel_lipschitz(model, trace(model, (3, 32, 32)), layers)
    assert bool(bounds.isfinite().all())
    producers = {  # of some norms, by hand
        "preactresnet18": {
            "layer1.0.bn1": ["conv1"],
            "layer1.1.bn1": ["conv1", "layer1.0.conv2"],
            "layer2.1.bn1": ["layer2.0.shortcut.0", "layer2.0.conv2"],
        },
        "resnet18": {"layer2.0.bn2": ["layer2.0.conv2"]},
        "vgg11_bn": {layers[1].name: [_convolutions(model)[1]]},
        "mobilenetv2": {layers[2].name: [_convolutions(model)[2]]},
    }[name]
    for layer in layers:
        if layer.name not in producers:
            continue
        norm = norm_of(model, layer)
        assert norm.running_var is not None
        for channel in range(layer.channels):
            parts = []
            for producer in producers[layer.name]:
                kernel = model.get_submodule(producer).weight[channel].detach()
                padded = torch.zeros(kernel.shape[0], 3, 3)
                if kernel.shape[-1] == 3:
                    padded[:] = kernel
                else:
                    padded[:, 1, 1] = kernel[:, 0, 0]
                parts.append(padded.flatten(1))
            sigma = torch.linalg.svdvals(torch.cat(parts))[0]
            scale = norm.weight[channel].abs() / (norm.running_var[channel] + norm.eps).sqrt()
            torch.testing.assert_close(bounds[layer.start + channel], (sigma * scale).detach())


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def test_outliers_are_sought_within_their_layer() -> None:
    layers = norm_layers(nn.Sequential(nn.BatchNorm2d(16), nn.BatchNorm2d(16)))
    scores_ = torch.ones(32)
    scores_[16:] = 100.0
    scores_[2] = 5.0
    scores_[20] = torch.nan
    assert outliers(layers, scores_, 3.0).nonzero().squeeze(1).tolist() == [2]


# ---- BNP ----------------------------------------------------------------------------------------


def test_bnp_finds_the_channel_with_false_statistics() -> None:
    model = network("preactresnet18")
    clean = _noise_images()
    layer = next(layer for layer in norm_layers(model) if layer.name == "layer3.1.bn2")
    norm = norm_of(model, layer)
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean[7] += 8 * norm.running_var[7].sqrt()
        model.get_submodule("layer3.1.conv2").weight[:, 7] = 0
    ledger = Ledger()
    repaired, info = bnp(model, clean, seed=0, ledger=ledger)
    assert [c for name, c in _zeroed(repaired) if name == "layer3.1.bn2"] == [7]
    assert info.settings["pruned"] == len(_zeroed(repaired))
    assert ledger.total == len(clean)


def test_bnp_reads_images_cropped_by_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []

    def note(_model: nn.Module, layers: list[NormLayer], images: Tensor, _ledger: Ledger) -> Tensor:
        read.append(images)
        return torch.zeros(sum(layer.channels for layer in layers))

    monkeypatch.setattr("bench.defences.bnp.statistics_divergence", note)
    for seed in (0, 0, 1):
        bnp(planted_network(), CLEAN, seed=seed, ledger=Ledger())
    same, again, other = read
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert not torch.equal(same, CLEAN.floats())


def test_divergence_is_that_of_two_normal_distributions() -> None:
    model = planted_network()
    layers = norm_layers(model)
    images = CLEAN.floats() * 0.5
    found = statistics_divergence(model, layers, images, Ledger())
    norm = norm_of(model, layers[0])
    with torch.no_grad():
        seen = model.get_submodule("conv")(images).transpose(0, 1).flatten(1)
    own = torch.distributions.Normal(seen.mean(1), (seen.var(1, correction=0) + norm.eps).sqrt())
    assert norm.running_mean is not None
    assert norm.running_var is not None
    running = torch.distributions.Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    expected = torch.distributions.kl_divergence(own, running)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---- FP -----------------------------------------------------------------------------------------


def test_fp_prunes_dormant_units_first_and_stays_within_its_limit() -> None:
    model = network("vgg11_bn")
    last = norm_layers(model)[-1]
    with torch.no_grad():  # two inputs of the classifier never fire
        norm_of(model, last).weight[[4, 9]] = 0
        norm_of(model, last).bias[[4, 9]] = 0
    clean = _answered(model, _noise_images())
    ledger = Ledger()
    pruned, name, keep = prune_dormant(model, clean, ledger)
    assert not bool(keep[[4, 9]].any())
    assert 2 <= int((~keep).sum()) < len(keep)
    assert bool((pruned.get_submodule(name).weight[:, ~keep] == 0).all())
    with torch.no_grad():
        right = (pruned(clean.floats()).argmax(1) == clean.labels).float().mean()
    assert float(right) > 1 - RELATIVE_LIMIT
    assert ledger.total == len(clean)


def test_fp_keeps_pruned_columns_at_zero_while_tuning() -> None:
    model = planted_network()
    state = copy.deepcopy(model.state_dict())
    repaired, info = fp(model, CLEAN, seed=0, ledger=Ledger(), epochs=1)
    columns = repaired.get_submodule("linear").weight
    assert info.settings == {"layer": "linear", "pruned": 1, "units": 4}
    assert bool((columns[:, BACKDOOR] == 0).all())
    assert bool((columns[:, :BACKDOOR] != 0).all())
    assert repaired.state_dict().keys() == state.keys()
    assert _same_state(model, state)
    accuracy, success = scores(repaired)
    assert accuracy > 0.95
    assert success < 0.2


# ---- ANP and RNP --------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [_anp, _rnp])
def test_mask_defences_prune_the_planted_channel(run: Run) -> None:
    model = planted_network()
    assert scores(model) == (1.0, 1.0)
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    repaired, info = run(model, CLEAN, Ledger())
    assert _zeroed(repaired) == [("norm", BACKDOOR)]
    assert info.settings["pruned"] == 1
    accuracy, success = scores(repaired)
    assert accuracy > 0.95
    assert success == 0
    assert _same_state(model, state)
    assert torch.equal(torch.get_rng_state(), random_state)
    again, same = run(model, CLEAN, Ledger())
    assert _same_state(again, repaired.state_dict())
    assert same.settings == info.settings


def test_mask_defences_count_every_image() -> None:
    model = planted_network()
    ledger = Ledger()
    _, info = anp(model, CLEAN, seed=0, ledger=ledger, iterations=3)
    sweep = len(info.candidates) * len(CLEAN)
    assert ledger.total == 3 * 3 * 2 * 128 + sweep
    assert info.schedule.startswith("3 of 2000 iterations, mask rate 0.01")
    ledger = Ledger()
    _, info = rnp(model, CLEAN, seed=0, ledger=ledger, recovery_epochs=2)
    sweep = len(info.candidates) * len(CLEAN)
    epochs = info.settings["unlearning_epochs"]
    assert ledger.total == (3 * epochs + 2 * 2) * len(CLEAN) + sweep


@pytest.mark.parametrize("run", [_anp, _rnp])
def test_mask_defences_gate_sites_where_there_are_no_norms(run: Run) -> None:
    model = planted_network(norm=False)
    assert scores(model) == (1.0, 1.0)
    state = copy.deepcopy(model.state_dict())
    repaired, info = run(model, CLEAN, Ledger())
    assert info.settings["units"] == 4
    assert scores(repaired)[0] >= 1 - ACCURACY_LIMIT - 0.02
    assert _same_state(model, state)


@pytest.mark.parametrize("norm", [True, False])
def test_units_compute_what_their_pruned_network_does(norm: bool) -> None:
    model = planted_network(norm=norm)
    units = (
        NormUnits(model, norm_layers(model)) if norm else SiteUnits(model, trace(model, (3, 8, 8)))
    )
    images = CLEAN.floats()[:6]
    pruned = torch.tensor([[False] * 4, [True, False, False, True]])
    ledger = Ledger()
    logits = units.pruned_logits(pruned, images, ledger)
    assert ledger.total == 2 * 6
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(images))
        for row, mask in zip(logits, pruned, strict=True):
            torch.testing.assert_close(units.prune(mask)(images), row)
            torch.testing.assert_close(units.logits(images, (~mask).float()), row)


def test_the_cut_is_the_largest_count_that_clean_accuracy_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.defences.units.MOST_PRUNED", 1.0)
    model = planted_network()
    units = NormUnits(model, norm_layers(model))
    soft = torch.full((4,), 0.9)
    soft[BACKDOOR] = 0.3
    repaired, info = cut_by_number(units, soft, CLEAN, Ledger())
    assert info.settings["pruned"] == 1
    assert _zeroed(repaired) == [("norm", BACKDOOR)]
    names = ["0 units", "1 units", "2 units", "3 units", "4 units"]
    assert [name for name, _ in info.candidates] == names
    spare, needed = [unit for unit in range(4) if unit != BACKDOOR][:2]
    soft[spare], soft[needed] = 0.1, 0.2  # two of three colours still tell all three
    repaired, info = cut_by_number(units, soft, CLEAN, Ledger())
    assert _zeroed(repaired) == [("norm", spare)]
    repaired, info = cut_by_number(units, torch.ones(4), CLEAN, Ledger())
    assert [name for name, _ in info.candidates] == ["0 units"]  # none was let go
    assert _zeroed(repaired) == []


def test_equal_masks_are_cut_in_the_order_of_their_ties() -> None:
    model = planted_network()
    units = NormUnits(model, norm_layers(model))
    ties = torch.full((4,), 0.5)
    ties[BACKDOOR] = 0.1
    repaired, info = cut_by_number(units, torch.zeros(4), CLEAN, Ledger(), ties=ties)
    assert info.settings["masks_at_zero"] == 4
    assert _zeroed(repaired) == [("norm", BACKDOOR)]  # a tenth of four units is one


def test_sweep_of_counts_ends_at_the_most() -> None:
    assert sweep_of(0) == [0]
    assert sweep_of(1) == [0, 1]
    assert sweep_of(30) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 30]


# ---- the probe race and onp ---------------------------------------------------------------------


def test_probe_race_prunes_the_planted_channel() -> None:
    model = planted_network()
    state = copy.deepcopy(model.state_dict())
    ledger = Ledger()
    repaired, info = probe_race(model, CLEAN, seed=0, ledger=ledger, steps=30, draw=16)
    assert _same_state(model, state)
    assert info.settings["probe"] == f"patch->{TARGET}"
    assert info.settings["score"] > 0.9
    assert _zeroed(repaired) == [("norm", BACKDOOR)]
    assert scores(repaired) == (1.0, 0.0)
    assert len(info.candidates) == 8
    assert scores(info.candidates[0][1]()) == (1.0, 0.0)
    assert ledger.total > 2 * 30 * 16 * 8


def test_restoring_gives_back_what_the_probe_does_not_need() -> None:
    model = planted_network()
    evaluator = MaskEvaluator(trace(model, (3, 8, 8)), model)
    probe = Probe(Patch(), TARGET, _white_corner(), (0.0, 1.0), 1.0)
    judge = Judge(evaluator, CLEAN, probe)
    assert judge.success == 1.0
    mask = torch.tensor([False, True, False, True])
    assert restore(mask, judge).tolist() == [False, False, False, True]


def _white_corner() -> list[Tensor]:
    """Parameters of a patch that makes the corner white."""
    mask = torch.full((1, 1, 1, 8, 8), -20.0)
    mask[..., :4, :4] = 20.0
    return [mask, torch.full((1, 1, 3, 8, 8), 20.0)]


def test_onp_in_the_form_of_a_defence() -> None:
    model = load_suspect(demo.CHECKPOINT, demo.ARCH).model
    state = copy.deepcopy(model.state_dict())
    budget = Config(
        "tiny",
        synthesis=SynthesisConfig(steps=6, images_per_step=4, classes=2, renewal_steps=2),
        agent=AgentConfig(rounds=2, images=16),
    )
    ledger = Ledger()
    clean = demo.clean_images()[torch.arange(100)]
    repaired, info = onp_defence(model, clean, seed=0, ledger=ledger, budget=budget)
    assert _same_state(model, state)
    assert repaired.state_dict().keys() == state.keys()
    assert info.schedule == "tiny budget"
    assert info.settings["sites"] == 368 + 128
    assert (info.settings["pruned"] > 0) == (info.settings["verdict"] == "backdoor")
    assert ledger.total > 2 * 6 * 4 * 8


# ---- refusals -----------------------------------------------------------------------------------


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x.mean((2, 3)) if bool(x.sum() > 0) else x.amax((2, 3))


@pytest.mark.parametrize("name", ["clp", "bnp"])
def test_norm_defences_refuse_networks_without_norms(name: str) -> None:
    with pytest.raises(NotApplicable, match="batch norms"):
        DEFENCES[name](planted_network(norm=False), CLEAN, seed=0, ledger=Ledger())


@pytest.mark.parametrize("name", ["clp", "probe-race", "onp"])
def test_what_cannot_be_traced_is_not_applicable(name: str) -> None:
    with pytest.raises(NotApplicable, match="cannot be traced"):
        DEFENCES[name](_Untraceable().eval(), CLEAN, seed=0, ledger=Ledger())


def test_fp_needs_a_last_linear_layer() -> None:
    with pytest.raises(NotApplicable, match="linear"):
        prune_dormant(_Untraceable().eval(), CLEAN, Ledger())


def test_registry_holds_the_pruning_defences() -> None:
    assert {"fp", "anp", "clp", "bnp", "rnp", "probe-race", "onp"} <= DEFENCES.keys()
    model = preactresnet.of_width(8, 10, (1, 1, 1, 1))
    assert sum(layer.channels for layer in norm_layers(model)) == 184


# ---- the ceiling -------------------------------------------------------------------------------


class Stamp(Attack):
    name = "stamp"

    def __call__(self, images: Tensor) -> Tensor:
        return stamped(images)


@pytest.mark.parametrize("norm", [True, False])
def test_told_the_trigger_the_search_finds_the_planted_channel(norm: bool) -> None:
    suspect, ledger = planted_network(norm=norm), Ledger()
    attack = Stamp(target=TARGET, classes=3)
    repaired, info = known_trigger(suspect, CLEAN, attack=attack, seed=0, ledger=ledger)
    before, after = scores(suspect), scores(repaired)
    assert before[1] == 1.0
    assert after[0] == before[0]
    assert after[1] < 0.05
    assert info.settings["pruned"] == 1
    assert ledger.total > 0
