"""What a run needs in memory, known before it runs."""

from typing import TYPE_CHECKING

from fourbit.lazy import lazily
from fourbit.planning.presets import PRESETS as PRESETS
from fourbit.planning.presets import Preset as Preset
from fourbit.planning.presets import preset_of as preset_of
from fourbit.planning.shape import ALL_LAYERS as ALL_LAYERS
from fourbit.planning.shape import Kernels as Kernels
from fourbit.planning.shape import TrainingShape as TrainingShape
from fourbit.planning.shape import kernels_of as kernels_of

if TYPE_CHECKING:
    from fourbit.planning.advice import side_by_side as side_by_side
    from fourbit.planning.budget import recommend as recommend
    from fourbit.planning.plan import Plan as Plan
    from fourbit.planning.plan import Planner as Planner
    from fourbit.planning.plan import Room as Room
    from fourbit.planning.plan import plan_training as plan_training

# a configuration names shapes; only a plan needs models
_HOMES = {
    "Plan": "fourbit.planning.plan",
    "Planner": "fourbit.planning.plan",
    "Room": "fourbit.planning.plan",
    "plan_training": "fourbit.planning.plan",
    "recommend": "fourbit.planning.budget",
    "side_by_side": "fourbit.planning.advice",
}
__getattr__, __dir__ = lazily(__name__, _HOMES)
