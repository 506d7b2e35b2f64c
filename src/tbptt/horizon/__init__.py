"""How far back the gradients of a model need to go."""

from tbptt.horizon.influence import Influence, influences
from tbptt.horizon.lyapunov import lyapunov_exponents
from tbptt.horizon.measure import measure
from tbptt.horizon.recommend import Recommendation
from tbptt.horizon.report import HorizonReport
from tbptt.horizon.statistics import Band

__all__ = ["Band", "HorizonReport", "Influence", "Recommendation", "influences", "lyapunov_exponents", "measure"]
