"""The proof: which positions an output can read, whatever the numbers are."""

from ._meetings import sizes as sizes
from ._prove import Proof as Proof, Question as Question, prove as prove
