"""What a run needs in memory, known before it runs."""

from fourbit.planning.plan import Plan as Plan
from fourbit.planning.plan import Planner as Planner
from fourbit.planning.plan import plan_training as plan_training
from fourbit.planning.shape import ALL_LAYERS as ALL_LAYERS
from fourbit.planning.shape import TrainingShape as TrainingShape
