"""FP8 "hybrid" precision: number formats, where they apply, scales and the plain-torch model of it.

The linear layers of the three stacks multiply E4M3 by E4M3 with static scales and sum in fp32;
attention, norms, residuals and the layers at the ends stay 16-bit. docs/quantisation.md says why.
"""

from __future__ import annotations

from halfpi.quant.calibration import DispersionWarning, calibrate
from halfpi.quant.fake import FakeQuantPi05
from halfpi.quant.formats import E4M3, dequantise, quantise, scale_for
from halfpi.quant.scales import Scales, SiteScales, load_scales, save_scales
from halfpi.quant.sites import Site, quantised_sites

__all__ = [
    "E4M3",
    "DispersionWarning",
    "FakeQuantPi05",
    "Scales",
    "Site",
    "SiteScales",
    "calibrate",
    "dequantise",
    "load_scales",
    "quantise",
    "quantised_sites",
    "save_scales",
    "scale_for",
]
