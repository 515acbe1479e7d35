"""The table of sites against the model that it is about."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from torch import nn

from halfpi.config import PRESETS, Pi05Config
from halfpi.model import Pi05
from halfpi.quant.sites import Site, matrix_products, quantised_sites


def test_every_linear_of_a_layer_is_in_one_product(
    tiny_config: Pi05Config, random_pi05: Callable[..., Pi05]
) -> None:
    model = random_pi05()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    listed = [name for site in matrix_products(tiny_config) for name in site.linears]
    assert len(listed) == len(set(listed))
    outside = {"vision.projector", "action_in", "action_out", "time_mlp_in", "time_mlp_out"}
    modulations = {name for name in linears if name.endswith(".dense")}
    assert set(listed) == linears - outside - modulations


def test_all_products_are_quantised_but_the_prefix_attention_and_the_out_of_vision(
    tiny_config: Pi05Config,
) -> None:
    products = matrix_products(tiny_config)
    wide = [site for site in products if site not in quantised_sites(tiny_config)]
    names = re.compile(r"vision\.layers\.\d+\.attn\.o|prefix\.layers\.\d+\.attn\.\w+")
    assert wide == [site for site in products if names.fullmatch(site.name)]
    in_order = [site for site in products if site not in wide]
    assert list(quantised_sites(tiny_config)) == in_order


def test_the_layers_of_a_site_share_their_input(random_pi05: Callable[..., Pi05]) -> None:
    model = random_pi05()
    for site in matrix_products(model.config):
        assert len({layer.in_features for layer in site.layers(model)}) == 1, site.name


def test_only_the_expert_has_a_scale_for_each_step(tiny_config: Pi05Config) -> None:
    for site in matrix_products(tiny_config):
        assert site.per_step == site.name.startswith("expert.")


@pytest.mark.parametrize(
    ("sites", "counts"),
    [
        # The prefix's last layer has keys and values only, which stay wide.
        (matrix_products, {"vision": 27 * 4, "prefill": 17 * 4 + 1, "denoise": 18 * 4}),
        (quantised_sites, {"vision": 27 * 3, "prefill": 17 * 2, "denoise": 18 * 4}),
    ],
)
def test_the_full_size_has_the_sites_of_its_layers(
    sites: Callable[[Pi05Config], tuple[Site, ...]], counts: dict[str, int]
) -> None:
    assert Counter(site.stage for site in sites(PRESETS["pi05"])) == counts


def test_the_last_layer_of_the_prefix_ends_at_keys_and_values() -> None:
    names = [site.name for site in matrix_products(PRESETS["pi05"])]
    assert [name for name in names if name.startswith("prefix.layers.17")] == [
        "prefix.layers.17.attn.kv"
    ]
