"""What a model of texts is trained for."""

from typing import Literal, get_args

Task = Literal["classify", "regress", "tag", "mlm", "causal", "embed"]
TASKS: tuple[Task, ...] = get_args(Task)
OF_TOKENS = ("mlm", "causal")  # tasks whose classes are the vocabulary
ALIGNED = ("tag", "mlm", "causal")  # tasks with an output for each token
