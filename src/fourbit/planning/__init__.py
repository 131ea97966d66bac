"""What a run needs in memory, known before it runs."""

from fourbit.planning.budget import recommend as recommend
from fourbit.planning.plan import Plan as Plan
from fourbit.planning.plan import Planner as Planner
from fourbit.planning.plan import baseline_on as baseline_on
from fourbit.planning.plan import holes_on as holes_on
from fourbit.planning.plan import plan_training as plan_training
from fourbit.planning.shape import ALL_LAYERS as ALL_LAYERS
from fourbit.planning.shape import TrainingShape as TrainingShape
