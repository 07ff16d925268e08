"""What a model of texts is trained for."""

from typing import Literal

Task = Literal["classify", "regress", "tag", "mlm", "causal", "embed"]
OF_TOKENS = ("mlm", "causal")  # tasks whose classes are the vocabulary
SINGLE = (*OF_TOKENS, "embed")  # tasks in which two texts of a row are no pair for the network
ALIGNED = ("tag", "mlm", "causal")  # tasks with an output for each token
