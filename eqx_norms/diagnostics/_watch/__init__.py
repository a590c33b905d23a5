"""What happens inside a model while it trains."""

from ._look import Look as Look
from ._watch import Watch as Watch
