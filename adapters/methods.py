"""The methods by name."""

from clip_adapter.adapters.clap import CLAP, ZS_LP
from clip_adapter.adapters.clip_adapter import CLIP_ADAPTER
from clip_adapter.adapters.cross_modal import CROSS_MODAL
from clip_adapter.adapters.gda import GDA
from clip_adapter.adapters.linear_probe import LINEAR_PROBE
from clip_adapter.adapters.lp_plus_plus import LP_PLUS_PLUS
from clip_adapter.adapters.method import Method
from clip_adapter.adapters.proker import PROKER
from clip_adapter.adapters.rla import RLA
from clip_adapter.adapters.task_res import TASK_RES
from clip_adapter.adapters.tip_adapter import TIP_ADAPTER, TIP_ADAPTER_F
from clip_adapter.adapters.zero_shot import ZERO_SHOT

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ZERO_SHOT,
        LINEAR_PROBE,
        CLIP_ADAPTER,
        TIP_ADAPTER,
        TIP_ADAPTER_F,
        TASK_RES,
        LP_PLUS_PLUS,
        CLAP,
        ZS_LP,
        GDA,
        PROKER,
        RLA,
        CROSS_MODAL,
    )
}
