"""The training stages: thin LightningModules over one backbone; their maths lives in `objectives/`."""

from zimage_lit.stages.dmdr import DMDRModule
from zimage_lit.stages.dpo import DPOModule
from zimage_lit.stages.flow_matching import FlowMatchingModule
from zimage_lit.stages.grpo import GRPOModule

__all__ = ["DMDRModule", "DPOModule", "FlowMatchingModule", "GRPOModule"]
