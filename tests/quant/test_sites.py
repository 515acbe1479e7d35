"""The table of sites against the model that it is about."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from halfpi.config import PRESETS, Pi05Config
from halfpi.model import Pi05
from halfpi.quant.sites import quantised_sites


def test_every_linear_is_a_site_but_those_that_stay_wide(
    tiny_config: Pi05Config, random_pi05: Callable[..., Pi05]
) -> None:
    model = random_pi05()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    listed = [name for site in quantised_sites(tiny_config) for name in site.linears]
    assert len(listed) == len(set(listed))
    wide = {"vision.projector", "action_in", "action_out", "time_mlp_in", "time_mlp_out"}
    modulations = {name for name in linears if name.endswith(".dense")}
    assert set(listed) == linears - wide - modulations


def test_the_layers_of_a_site_share_their_input(random_pi05: Callable[..., Pi05]) -> None:
    model = random_pi05()
    for site in quantised_sites(model.config):
        assert len({layer.in_features for layer in site.layers(model)}) == 1, site.name


def test_only_the_expert_has_a_scale_for_each_step(tiny_config: Pi05Config) -> None:
    for site in quantised_sites(tiny_config):
        assert site.per_step == site.name.startswith("expert.")


def test_the_full_size_has_the_sites_of_its_layers() -> None:
    sites = quantised_sites(PRESETS["pi05"])
    counts = {
        stage: sum(site.stage == stage for site in sites)
        for stage in ("vision", "prefill", "denoise")
    }
    # The prefix's last layer has keys and values only.
    assert counts == {"vision": 27 * 4, "prefill": 17 * 4 + 1, "denoise": 18 * 4}
    assert [site.name for site in sites if site.name.startswith("prefix.layers.17")] == [
        "prefix.layers.17.attn.kv"
    ]
